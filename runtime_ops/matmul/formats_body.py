"""The parts of ``msd.MatMul``'s function body that only some models have: codebooks of weights, MX formats of activations.

Steps of the function text, after those of `weight_body`. Where a body has them they serve every plan, its integers and INT8
terms too; both are chosen by the plan's numbers without an ``If``, of which the body has one already.

The exponent of a float is found without ``Log``, whose last bits are each runtime's own: divided by 2^64 where it is not
below, then by 2^32 and so on, a number ends as its mantissa, and divided by that is its power of two. Every step is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from .layout import CODEBOOKS, ActivationFormat, Codebook
from .mx import MX_FORMATS, MxFormat


def _constant(name: str, dtype: str, numbers: np.ndarray) -> str:
    shape = ", ".join(str(dim) for dim in numbers.shape)
    return f"{name} = Constant <value = {dtype}[{shape}] {{{', '.join(str(n) for n in numbers.ravel().tolist())}}}> ()"


NUMBERS = f"""
    {_constant("tables", "uint8", np.array([np.arange(256), np.resize(CODEBOOKS[Codebook.E2M1], 256)]))}
    codebook_at = Constant <value = int64 {{5}}> ()
    codebook = Gather (plan, codebook_at)
    table = Gather (tables, codebook)
    w_indices = Cast <to = 6> (w_GBN)
    w_numbers = Gather (table, w_indices)
"""
"""Makes ``w_numbers`` of ``w_GBN``: what the codes stand for in the plan's codebook."""


def _mantissa(y: str, x: str, exponents: tuple[int, ...]) -> str:
    """``y`` in [1, 2), ``x`` over a power of two, for ``x`` from 1 to below 2 to the power of the exponents' sum and 1."""
    text = ""
    for e in exponents:
        text += f"""
    {y}_limit_{e} = Constant <value = float {{{2.0**e}}}> ()
    {y}_is_below_{e} = Less ({x}, {y}_limit_{e})
    {y}_by_{e} = Where ({y}_is_below_{e}, one_f, {y}_limit_{e})
    {y}_{e} = Div ({x}, {y}_by_{e})"""
        x = f"{y}_{e}"
    return f"{text}\n    {y} = Identity ({x})"


def _on_grid(q: str, t: str) -> str:
    """``q``: `mx.round_to_grid` of ``t``, which is below 2^18 (of MXFP8; the other grids' are at most 8)."""
    return f"""
    {q}_magnitude = Abs ({t})
    {q}_scaled = Div ({q}_magnitude, mantissas)
    {q}_from_1 = Max ({q}_scaled, one_f)
    {_mantissa(f"{q}_mantissa", f"{q}_from_1", (8, 4, 2, 1))}
    {q}_spacing = Div ({q}_from_1, {q}_mantissa)
    {q}_spacings = Div ({t}, {q}_spacing)
    {q}_rounded = Round ({q}_spacings)
    {q}_value = Mul ({q}_rounded, {q}_spacing)
    {q}_not_below = Max ({q}_value, grid_smallest)
    {q} = Min ({q}_not_below, grid_largest)
    """


def _by_format(name: str, of: Callable[[MxFormat], float]) -> str:
    """``name`` [1]: that number of the plan's format; 1 for INT8, whose results are not used."""
    numbers = np.array([of(MX_FORMATS[f]) if f in MX_FORMATS else 1 for f in ActivationFormat], np.float32)
    return f"{_constant(f'{name}_by_format', 'float', numbers)}\n    {name} = Gather ({name}_by_format, activation)"


def _mantissa_of(peak: float) -> float:
    return 2 * math.frexp(peak)[0]


FORMATS = f"""
    activation_at = Constant <value = int64[1] {{6}}> ()
    activation = Gather (plan, activation_at)
    is_mx = Cast <to = 9> (activation)
    {_by_format("peak_mantissa", lambda f: _mantissa_of(f.grid.peak))}
    {_by_format("peak_power", lambda f: f.grid.peak / _mantissa_of(f.grid.peak))}
    {_by_format("mantissas", lambda f: 2**f.grid.mantissa_bits)}
    {_by_format("grid_largest", lambda f: f.grid.largest)}
    {_by_format("code_radix", lambda f: f.radix)}
    {_by_format("second_passes", lambda f: f.passes - 1)}
    grid_smallest = Neg (grid_largest)

    two_f = Constant <value = float {{2}}> ()
    far_up = Constant <value = float {{{2.0**100}}}> ()
    is_below_1 = Less (safe_peak, one_f)
    lift = Where (is_below_1, far_up, one_f)
    lifted = Mul (safe_peak, lift)
    {_mantissa("mantissa", "lifted", (64, 32, 16, 8, 4, 2, 1))}
    power = Div (safe_peak, mantissa)
    smaller_unit = Div (power, peak_power)
    exceeds = Greater (mantissa, peak_mantissa)
    once_or_twice = Where (exceeds, two_f, one_f)
    unit = Mul (smaller_unit, once_or_twice)

    in_units = Div (x_groups, unit)
    {_on_grid("first_pass", "in_units")}
    left_over = Sub (in_units, first_pass)
    left_in_units = Mul (left_over, code_radix)
    {_on_grid("second_pass", "left_in_units")}
    first_codes = Mul (first_pass, code_radix)
    second_codes = Mul (second_pass, second_passes)
    mx_codes = Add (first_codes, second_codes)
    mx_step = Div (unit, code_radix)
"""
"""Makes `mx.decompose_mx` of ``x_groups`` with the plan's format: ``mx_codes`` [M, G, block] and ``mx_step`` [M, G, 1]."""


def choice(y: str, mx: str, int8: str, real_id: int) -> str:
    """``y``: which of both the plan asks for, in the type that the branch computes in."""
    return f"""
    {mx}_real = Cast <to = {real_id}> ({mx})
    {y} = Where (is_mx, {mx}_real, {int8})"""
