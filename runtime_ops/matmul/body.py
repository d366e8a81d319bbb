"""``msd.MatMul`` as an ONNX function of standard ops: what runs where the native library is not.

The text follows `reference.py` step by step and agrees with it, and with every native kernel, to the
last bit. A function is inlined at the *model's* opset, so the reductions, the only ops here whose form
changed between opset 11 and today, are spelled for it. No attribute can become a tensor at opset 11;
that is why the op takes its plan as an input.

Choices that are not obvious:

* both operands of ``MatMulInteger`` are uint8 with a zero point: the one pairing that is exact on every
  CPU and fast on most;
* the terms are stacked as rows [T * M, B] of one product: one row alone is half as fast again as in T products;
* their products are taken apart and added: ``ReduceSum`` of int32 takes as long as the product itself, or longer;
* ``Scan`` over the K-groups: one batched product would hold G x M x N partial sums;
* all that the ``Scan`` reads from around it is constant, and it stands in no other ``Scan``: where a model has a
  constant ``If`` within a constant ``If``, onnxruntime takes both away, and loses other names or dies;
* ``Div(limit, peak)`` then ``Mul``: onnxruntime keeps its bits, where it turns ``Div(1, scale)`` then
  ``Mul`` into another division;
* the last op makes Y itself and is no ``Cast`` that the runtime drops: so Y keeps the shape that the model declares for it,
  and the runtime fuses what follows as it does behind the native kernel, to the same bits;
* what depends on the weight alone is cast outside the branches: onnxruntime 1.24 to 1.27 lose a constant that they
  folded within the branch they then keep;
* ``poison``, a sum of 0 * x, carries NaN and Inf, which ``ReduceMax`` and ``Cast`` lose.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import onnx

from ..spelling import Reductions, parse_body, reshape_with_zeros
from .formats_body import FORMATS, NUMBERS, choice
from .weight_body import GROUPS, WEIGHT


@dataclass(frozen=True)
class _Arithmetic:
    """How one branch computes: terms 1 and 2 in float32, 3 in float64 (METHOD: 254^2 * 127 is almost 2^23)."""

    real: str
    real_id: int
    suffix: str
    """Of the names of scales, offsets and bias in that type."""
    limit: str
    radix: str
    """And what only `combine` needs: the runtime tells the user of constants that nothing uses."""
    combine: str
    """Ops from ``passes`` (int32 [T, M, N]) to ``exact`` [M, N]."""


_FLOAT32 = _Arithmetic(
    real="float",
    real_id=1,
    suffix="_float",
    limit="limits = Constant <value = float[2] {127, 32258}> ()\nlimit = Slice (limits, terms_less_1, terms)",
    radix="""
        radix_all = Constant <value = float[2] {254, 1}> ()
        base_wide = Constant <value = int64[1] {254}> ()
        weight_of_first_wide = Mul (terms_less_1, base_wide)
        weight_of_first = Cast <to = 6> (weight_of_first_wide)""",
    # A single term is both the first and the last, and counts once.
    combine="""
        first = Gather (passes, term_0)
        last = Gather (passes, last_term)
        first_weighted = Mul (first, weight_of_first)
        exact = Add (first_weighted, last)""",
)
_FLOAT64 = _Arithmetic(
    real="double",
    real_id=11,
    suffix="_double",
    limit="limit = Constant <value = double[1] {8193532}> ()",
    radix="""
        radix_all = Constant <value = double[3] {64516, 254, 1}> ()
        term_1 = Constant <value = int64 {1}> ()""",
    combine="""
        passes_exact = Cast <to = 11> (passes)
        first = Gather (passes_exact, term_0)
        middle = Gather (passes_exact, term_1)
        last = Gather (passes_exact, last_term)
        first_weighted = Mul (first, base)
        upper = Add (first_weighted, middle)
        upper_weighted = Mul (upper, base)
        exact = Add (upper_weighted, last)""",
)


def _branch(a: _Arithmetic, reduce: Reductions, weight: str, formats: bool) -> str:
    """Decompose the grouped activation and multiply it with the unpacked ``weight``, group by group."""
    rounded, step = ("chosen_codes", "chosen_step") if formats else ("rounded", "step_raw")
    return f"""
    half = Constant <value = uint8 {{128}}> ()
    term_0 = Constant <value = int64 {{0}}> ()
    last_term = Constant <value = int64 {{-1}}> ()
    zero = Constant <value = {a.real} {{0}}> ()
    base = Constant <value = {a.real} {{254}}> ()
    shift = Constant <value = {a.real} {{128}}> ()
    {a.limit}
    {a.radix}
    negative_terms = Neg (terms)
    radix = Slice (radix_all, negative_terms, end)
    x_real = Cast <to = {a.real_id}> (x_groups)
    peak_real = Cast <to = {a.real_id}> (safe_peak)
    poison_real = Cast <to = {a.real_id}> (poison)

    inverse = Div (limit, peak_real)
    scaled = Mul (x_real, inverse)
    rounded = Round (scaled)
    {choice(rounded, "mx_codes", "rounded", a.real_id) if formats else ""}
    codes = Where (live, {rounded}, zero)
    step_raw = Div (peak_real, limit)
    {choice(step, "mx_step", "step_raw", a.real_id) if formats else ""}
    step_live = Where (live, {step}, zero)
    step = Add (step_live, poison_real)
    {reduce("code_sums", "ReduceSum", "codes", 2)}

    radix_levels_shape = Constant <value = int64[4] {{-1, 1, 1, 1}}> ()
    radix_levels = Reshape (radix, radix_levels_shape)
    levels_raw = Div (codes, radix_levels)
    levels = Round (levels_raw)
    radix_coarser = Mul (radix_levels, base)
    coarser_raw = Div (codes, radix_coarser)
    coarser = Round (coarser_raw)
    coarser_based = Mul (coarser, base)
    digits = Sub (levels, coarser_based)
    digits_shifted = Add (digits, shift)
    digits_uint8 = Cast <to = 2> (digits_shifted)

    digits_GTMB = Transpose <perm = [2, 0, 1, 3]> (digits_uint8)
    stacked_shape = Concat <axis = 0> (groups, minus_one, block)
    digits_stacked = Reshape (digits_GTMB, stacked_shape)
    step_GM1 = Transpose <perm = [1, 0, 2]> (step)
    sums_GM1 = Transpose <perm = [1, 0, 2]> (code_sums)
    passes_shape = Concat <axis = 0> (terms, minus_one, n)
    m = Shape (x_groups)
    m_1 = Slice (m, at_0, at_1)
    acc_shape = Concat <axis = 0> (m_1, n)
    acc_zero = Expand (zero, acc_shape)
    acc = Scan <num_scan_inputs = 7, body = group (
            {a.real}[?, ?] sum_in, uint8[?, ?] d, {a.real}[?, 1] sx, {a.real}[?, 1] r,
            uint8[?, ?] w, {a.real}[1, ?] sw, uint8[?] z, {a.real}[1, ?] o
        ) => ({a.real}[?, ?] sum_out) {{
        passes_stacked = MatMulInteger (d, w, half, z)
        passes = Reshape (passes_stacked, passes_shape)
        {a.combine}
        product = Cast <to = {a.real_id}> (exact)
        drift = Mul (o, r)
        centred = Sub (product, drift)
        scale = Mul (sx, sw)
        contribution = Mul (centred, scale)
        sum_out = Add (sum_in, contribution)
    }}> (acc_zero, digits_stacked, step_GM1, sums_GM1, {weight}, scales{a.suffix}, zero_points_GN, offsets{a.suffix})
    biased = Add (acc, bias{a.suffix})
    """


@cache
def matmul_body(opset: int, *, codebooks: bool = False, formats: bool = False) -> onnx.FunctionProto:
    """The function ``msd.MatMul`` for a model of default-domain opset ``opset``.

    Args:
        codebooks: it knows other codebooks than `Codebook.INTEGER`.
        formats: it knows other activation formats than `ActivationFormat.INT8`. A plan's INT8 then costs what the other
            formats do, for the runtime computes both.

    Raises:
        ValueError: ``opset`` is below `spelling.OLDEST_OPSET`.
    """
    reduce = Reductions(opset)
    weight = "w_numbers" if codebooks else "w_GBN"
    text = f"""<layout, output_dtype> (A, B, scales, zero_points, offsets, bias, plan) => (Y) {{
    {WEIGHT}
    {NUMBERS if codebooks else ""}
    terms = Slice (plan, at_3, at_4)
    per_row = Slice (plan, at_4, at_5)
    end = Constant <value = int64[1] {{9223372036854775807}}> ()
    offsets_t = Transpose <perm = [1, 0, 2]> (offsets)
    offsets_2d = Reshape (offsets_t, columns_shape)
    offsets_cut = Slice (offsets_2d, at_0, n, at_1)
    offsets_3d = Reshape (offsets_cut, middle_shape)
    per_group = Concat <axis = 0> (groups, at_1, at_1)
    offsets_float = Expand (offsets_3d, per_group)
    bias_float = Identity (bias)
    scales_wide = Cast <to = 11> (scales_3d)
    offsets_wide = Cast <to = 11> (offsets_3d)
    scales_double = Expand (scales_wide, per_column)
    offsets_double = Expand (offsets_wide, per_group)
    bias_double = Cast <to = 11> (bias)
    x = Cast <to = 1> (A)
    {GROUPS}
    zero_f = Constant <value = float {{0}}> ()
    one_f = Constant <value = float {{1}}> ()
    tiny = Constant <value = float {{7.888609052210118e-31}}> ()
    magnitude = Abs (x_groups)
    nothing = Mul (x_groups, zero_f)
    {reduce("group_peak", "ReduceMax", "magnitude", 2)}
    {reduce("group_poison", "ReduceSum", "nothing", 2)}
    {reduce("row_peak", "ReduceMax", "group_peak", 1)}
    {reduce("row_poison", "ReduceSum", "group_poison", 1)}
    by_row = Cast <to = 9> (per_row)
    peak = Where (by_row, row_peak, group_peak)
    poison = Where (by_row, row_poison, group_poison)
    finite = Equal (poison, poison)
    is_tiny = Less (peak, tiny)
    is_not_tiny = Not (is_tiny)
    live = And (finite, is_not_tiny)
    safe_peak = Where (live, peak, one_f)
    {FORMATS if formats else ""}

    three = Constant <value = int64[1] {{3}}> ()
    terms_less_1 = Sub (terms, at_1)
    three_terms = Equal (terms, three)
    y_rows = If <
        then_branch = in_float64 () => (float[?, ?] y64) {{
            {_branch(_FLOAT64, reduce, weight, formats)}
            y64 = Cast <to = 1> (biased)
        }},
        else_branch = in_float32 () => (float[?, ?] y32) {{
            {_branch(_FLOAT32, reduce, weight, formats)}
            y32 = Identity (biased)
        }}
    > (three_terms)
    a_shape = Shape (A)
    leading = Slice (a_shape, at_0, minus_one)
    y_shape = Concat <axis = 0> (leading, n)
    y_typed = Cast <to : int = @output_dtype> (y_rows)
    {reshape_with_zeros(opset, "Y", "y_typed", "y_shape")}
}}
"""
    return parse_body(opset, "MatMul", text)
