"""Activations in microscaling (MX) formats, as integer codes: what FP4 and FP8 hardware would multiply, in NumPy.

A block has one scale, a power of two, and its values are rounded to a grid of 4 or 8 bits; a second pass rounds what the
first left, ``radix`` times finer. In the grid's own unit every value is a small integer, and so is the sum of both passes:
``x ~ codes * scales`` as in `reference`, so one integer kernel serves all formats. The codes of two MXFP4 passes fit int8.

With Mb the block's largest magnitude, in float32 and in this order:

    u  = the smallest power of two with peak * u >= Mb      (integers: the exponent, and one comparison of mantissas)
    t  = x * (1 / u)
    Q1 = clip(rint(t / h) * h, -largest, largest)           h = max(1, 2^(floor(log2 |t|) - mantissa_bits))
    Q2 = the same of (t - Q1) * radix
    one pass:    codes = Q1                  scale = u
    two passes:  codes = radix * Q1 + Q2     scale = u / radix

    grid   integers are   mantissa_bits   largest   peak     radix
    E1M2   4 * value      2               7         7.4375   16      u = alpha / 4, beta = alpha / 16: the paper's MXFP4
    E2M1   2 * value      1               12        8        8       u = alpha / 8, scales alpha / 4 and alpha / 32: OCP's
    E4M3   512 * value    3               229376    229376           u = scale / 512

Only ``rint`` rounds (half to even, which is OCP's even mantissa). The other operations are exact: products and quotients are
by powers of two, u and 1/u are normal float32 for every Mb from 2^-100 up, and ``t - Q1`` is what rounding t left, a
multiple of t's last bit and no longer than t. A t below float32's normal range rounds to code 0 whether flushed or not.

h is 1 everywhere on E1M2, and on E2M1 below 4, else 2, for there t stays within 8 in both passes. E2M1 and E4M3 are
therefore never clipped; on E1M2 7.4375 becomes 7, and a remainder of 8 becomes 7.

After two passes an element is at most alpha / 64 of its block off, on either grid; that is reached.

Source: arXiv 2605.13915 section 3.3, Algorithm 1, Theorem 5.2 (E1M2 and its limit, 1.859375 = 7.4375 / 4); OCP Microscaling
Formats 1.0 section 5.3 (E2M1, E4M3). The integers, two passes on E2M1 and the guards are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from . import reference
from .layout import ActivationFormat, Plan

BLOCK = 32
"""Values of an MX block. Groups of any other length work too."""

ScaleRule = Literal["paper", "least_error"]
"""How a block's scale is found, see `decompose_mx`."""


@dataclass(frozen=True)
class Grid:
    """A small float type in units of its smallest positive value; the module says what the numbers are."""

    mantissa_bits: int
    largest: int
    peak: float
    """The block's largest magnitude is at most this, in units of the first pass."""
    radix: int
    """By how much finer a second pass is."""


E1M2 = Grid(mantissa_bits=2, largest=7, peak=7.4375, radix=16)
E2M1 = Grid(mantissa_bits=1, largest=12, peak=8, radix=8)
E4M3 = Grid(mantissa_bits=3, largest=448 * 512, peak=448 * 512, radix=1)


@dataclass(frozen=True)
class MxFormat:
    """A grid, once or twice."""

    grid: Grid
    passes: int

    @property
    def limit(self) -> int:
        """No code is larger."""
        return self.grid.largest * (1 if self.passes == 1 else self.grid.radix + 1)

    @property
    def error_bound(self) -> float:
        """Largest error of an element over its block's largest magnitude, which is more than half the peak in the scale's unit."""
        if self.passes == 2:  # what the second pass leaves of a remainder that saturates: one of its units
            return 2 / (self.grid.peak * self.grid.radix)
        step = max(1.0, 2.0 ** (np.ceil(np.log2(self.grid.peak)) - 1 - self.grid.mantissa_bits))
        return float(step / self.grid.peak)

    @property
    def radix(self) -> int:
        """The first pass's unit in units of the codes."""
        return 1 if self.passes == 1 else self.grid.radix


MX_FORMATS = {
    ActivationFormat.MXFP4_E1M2_X2: MxFormat(E1M2, 2),
    ActivationFormat.MXFP4_E1M2: MxFormat(E1M2, 1),
    ActivationFormat.MXFP4_E2M1_X2: MxFormat(E2M1, 2),
    ActivationFormat.MXFP4_E2M1: MxFormat(E2M1, 1),
    ActivationFormat.MXFP8: MxFormat(E4M3, 1),
}


def decompose_as(
    x: np.ndarray, plan: Plan, activation: ActivationFormat, scale_rule: ScaleRule = "paper"
) -> reference.Decomposed:
    """Split activation rows into integer codes: `decompose_mx`, or `reference.decompose` for INT8, which has one rule."""
    if activation is ActivationFormat.INT8:
        return reference.decompose(x, plan)
    return decompose_mx(x, plan, MX_FORMATS[activation], scale_rule)


def decompose_mx(x: np.ndarray, plan: Plan, form: MxFormat, scale_rule: ScaleRule = "paper") -> reference.Decomposed:
    """Split activation rows into integer codes of an MX format.

    Args:
        x: ``[M, K]`` float32 (wider and narrower types are converted first).
        plan: K and the block size; the last block may be shorter. Terms, and a scale for the whole row, are INT8's alone.
        scale_rule: ``"least_error"``, *ours*, takes half the paper's scale where a block's squared error is smaller with
            it, though the largest values may saturate. For comparison: no kernel has it.

    Returns:
        Codes within `MxFormat.limit`; scales float32, powers of two. A block whose largest magnitude is below
        `reference.SMALLEST_PEAK` has scale 0 and codes 0, one with NaN or Inf scale NaN and codes 0.
    """
    x = np.asarray(x, np.float32)
    padded = np.zeros((len(x), plan.groups * plan.block_size), np.float32)
    padded[:, : plan.k] = x
    groups = padded.reshape(len(x), plan.groups, plan.block_size)

    largest = np.abs(groups).max(axis=2, keepdims=True, initial=0)
    finite = np.isfinite(largest)
    live = finite & (largest >= reference.SMALLEST_PEAK)
    exponent = unit_exponent(np.where(live, largest, np.float32(1)), form.grid.peak)
    groups = np.where(live, groups, np.float32(0))

    codes = _codes(groups, exponent, form)
    if scale_rule == "least_error":
        halved = _codes(groups, exponent - 1, form)
        better = _error(groups, halved, exponent - 1, form) < _error(groups, codes, exponent, form)
        codes = np.where(better, halved, codes)
        exponent = exponent - better
    scale = np.ldexp(np.float32(1) / np.float32(form.radix), exponent)
    scales = np.where(live, scale, np.where(finite, np.float32(0), np.float32(np.nan)))
    return reference.Decomposed(codes.astype(np.int32), scales[..., 0])


def unit_exponent(largest: np.ndarray, peak: float) -> np.ndarray:
    """e of the smallest ``u = 2**e`` with ``peak * u >= largest``, for finite float32 ``largest`` > 0; int32, exact."""
    mantissa, exponent = np.frexp(np.asarray(largest, np.float32))
    limit, shift = np.frexp(np.float32(peak))
    found: np.ndarray = exponent - shift + (mantissa > limit)
    return found


def round_to_grid(t: np.ndarray, grid: Grid) -> np.ndarray:
    """The nearest value of a grid, halves to the even mantissa, saturating; float32, in the grid's unit."""
    _, exponent = np.frexp(t)  # |t| in [2^(e-1), 2^e)
    step = np.maximum(exponent - 1 - grid.mantissa_bits, 0)
    rounded = np.ldexp(np.rint(np.ldexp(t, -step)), step)
    clipped: np.ndarray = np.clip(rounded, -np.float32(grid.largest), np.float32(grid.largest))
    return clipped


def _codes(groups: np.ndarray, exponent: np.ndarray, form: MxFormat) -> np.ndarray:
    t = groups * np.ldexp(np.float32(1), -exponent)
    first = round_to_grid(t, form.grid)
    if form.passes == 1:
        return first
    radix = np.float32(form.grid.radix)
    second = round_to_grid((t - first) * radix, form.grid)
    codes: np.ndarray = radix * first + second
    return codes


def _error(groups: np.ndarray, codes: np.ndarray, exponent: np.ndarray, form: MxFormat) -> np.ndarray:
    """Squared error of each block, in units of its scale's square at ``exponent`` 0: float64, one per block."""
    values = np.ldexp(codes.astype(np.float64) / form.radix, exponent)
    error: np.ndarray = ((groups - values) ** 2).sum(axis=2, keepdims=True)
    return error
