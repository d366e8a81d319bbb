"""``msd.MatMulIntegerToFloat`` as an ONNX function of standard ops: what runs where the native library is not.

The text follows `reference.py` and agrees with it, and with every native kernel, to the last bit. A code of 16 bits is two
uint8 operands, its high and its low byte, each with the zero point's own: exact over the whole range (METHOD: given codes).
For the rest see `matmul.body`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import onnx

from ..matmul.weight_body import GROUPS, WEIGHT
from ..spelling import parse_body, reshape_with_zeros


@dataclass(frozen=True)
class _Width:
    """How codes of one width are multiplied: inputs of the product by name, and the text of it."""

    digits: tuple[str, ...]
    """uint8 tensors [M, K] that a code is made of."""
    setup: str
    whole: str
    """From ``d0``, ``d1``, the weight ``w`` and its zero points ``z`` to ``exact``: an integer, in int32 or double."""
    group: str
    """Likewise for up to `layout.LONGEST_GROUP` steps of K, in int32."""


_BYTE = _Width(
    ("codes_byte",),
    """
    codes_byte = Cast <to = 2> (codes)
    z0 = Cast <to = 2> (z_code)""",
    whole="exact = MatMulInteger (d0, w, z0, z)",
    group="exact = MatMulInteger (d0, w, z0, z)",
)
_TWO_PRODUCTS = """
    high_product = MatMulInteger (d0, w, z0, z)
    low_product = MatMulInteger (d1, w, z1, z)"""
_TWO_BYTES = _Width(
    ("high_byte", "low_byte"),
    """
    byte = Constant <value = float {256}> ()
    byte_int = Constant <value = int32 {256}> ()
    byte_double = Constant <value = double {256}> ()
    high_raw = Div (codes, byte)
    high = Floor (high_raw)
    high_codes = Mul (high, byte)
    low = Sub (codes, high_codes)
    z_high_raw = Div (z_code, byte)
    z_high = Floor (z_high_raw)
    z_high_code = Mul (z_high, byte)
    z_low = Sub (z_code, z_high_code)
    high_byte = Cast <to = 2> (high)
    low_byte = Cast <to = 2> (low)
    z0 = Cast <to = 2> (z_high)
    z1 = Cast <to = 2> (z_low)""",
    whole=f"""{_TWO_PRODUCTS}
    high_exact = Cast <to = 11> (high_product)
    low_exact = Cast <to = 11> (low_product)
    high_weighted = Mul (high_exact, byte_double)
    exact = Add (high_weighted, low_exact)""",
    group=f"""{_TWO_PRODUCTS}
    high_weighted = Mul (high_product, byte_int)
    exact = Add (high_weighted, low_product)""",
)


def _whole(width: _Width) -> str:
    """All K at once: one scale and zero point per column."""
    return f"""
    {width.setup}
    {chr(10).join(f"d{i} = Reshape ({digit}, whole_shape)" for i, digit in enumerate(width.digits))}
    w_shape_2d = Concat <axis = 0> (minus_one, n)
    w = Reshape (w_GBN, w_shape_2d)
    z_rows = Slice (zero_points_GN, at_0, at_1, at_0)
    z = Reshape (z_rows, n)
    {width.whole}
    product = Cast <to = 1> (exact)
    sw = Reshape (scales_first, n)
    scale = Mul (s_x, sw)
    acc = Mul (product, scale)
    """


def _grouped(width: _Width) -> str:
    count = len(width.digits)
    inputs = ", ".join(f"uint8[?, ?] d{i}" for i in range(count))
    turned = "\n".join(f"d{i}_GMB = Transpose <perm = [1, 0, 2]> ({digit})" for i, digit in enumerate(width.digits))
    return f"""
    {width.setup}
    {turned}
    m = Shape (x_groups)
    m_1 = Slice (m, at_0, at_1)
    acc_shape = Concat <axis = 0> (m_1, n)
    acc_zero = Expand (zero_f, acc_shape)
    acc = Scan <num_scan_inputs = {count + 3}, body = group (
            float[?, ?] sum_in, {inputs}, uint8[?, ?] w, float[1, ?] sw, uint8[?] z
        ) => (float[?, ?] sum_out) {{
        {width.group}
        product = Cast <to = 1> (exact)
        scale = Mul (s_x, sw)
        contribution = Mul (product, scale)
        sum_out = Add (sum_in, contribution)
    }}> (acc_zero, {", ".join(f"d{i}_GMB" for i in range(count))}, w_GBN, scales_float, zero_points_GN)
    """


@cache
def matmul_integer_to_float_body(opset: int) -> onnx.FunctionProto:
    """The function ``msd.MatMulIntegerToFloat`` for a model of default-domain opset ``opset``.

    Raises:
        ValueError: ``opset`` is below `spelling.OLDEST_OPSET`.
    """
    text = f"""<layout>
        (A, a_scale, a_zero_point, B, scales, zero_points, bias, plan) => (Y) {{
    {WEIGHT}
    code_bits = Slice (plan, at_3, at_4)
    signed = Slice (plan, at_4, at_5)
    zero_f = Constant <value = float {{0}}> ()
    one_shape = Constant <value = int64[1] {{1}}> ()
    no_shape = Constant <value = int64[0] {{}}> ()
    s_x = Reshape (a_scale, one_shape)
    sixteen_bits = Constant <value = int64[1] {{16}}> ()
    is_wide = Equal (code_bits, sixteen_bits)
    half_word = Constant <value = float[1] {{32768}}> ()
    half_byte = Constant <value = float[1] {{128}}> ()
    half = Where (is_wide, half_word, half_byte)
    is_signed = Cast <to = 1> (signed)
    shift = Mul (half, is_signed)

    a_float = Cast <to = 1> (A)
    z_float = Cast <to = 1> (a_zero_point)
    z_one = Reshape (z_float, one_shape)
    x = Sub (a_float, z_one)
    {GROUPS}
    z_shifted = Add (z_one, shift)
    codes = Add (x_groups, z_shifted)
    z_code = Reshape (z_shifted, no_shape)
    scales_shape = Shape (scales)
    scale_groups = Slice (scales_shape, at_1, at_2)
    one_scale = Equal (scale_groups, at_1)
    whole_shape = Concat <axis = 0> (minus_one, k_padded)
    scales_first = Slice (scales_float, at_0, at_1, at_0)
    acc_rows = If <
        then_branch = two_bytes () => (float[?, ?] y16) {{
            y16 = If <
                then_branch = whole_of_two () => (float[?, ?] y16w) {{ {_whole(_TWO_BYTES)} y16w = Identity (acc) }},
                else_branch = groups_of_two () => (float[?, ?] y16g) {{ {_grouped(_TWO_BYTES)} y16g = Identity (acc) }}
            > (one_scale)
        }},
        else_branch = one_byte () => (float[?, ?] y8) {{
            y8 = If <
                then_branch = whole_of_one () => (float[?, ?] y8w) {{ {_whole(_BYTE)} y8w = Identity (acc) }},
                else_branch = groups_of_one () => (float[?, ?] y8g) {{ {_grouped(_BYTE)} y8g = Identity (acc) }}
            > (one_scale)
        }}
    > (is_wide)
    y_rows = Add (acc_rows, bias)
    a_shape = Shape (A)
    leading = Slice (a_shape, at_0, minus_one)
    y_shape = Concat <axis = 0> (leading, n)
    {reshape_with_zeros(opset, "Y", "y_rows", "y_shape")}
}}
"""
    return parse_body(opset, "MatMulIntegerToFloat", text)
