"""``msd.MatMulIntegerToFloat`` as an ONNX function of standard ops: what runs where the native library is not.

The text follows `reference.py` and agrees with it, and with every native kernel, to the last bit. A code of 16 bits is two
uint8 operands, its high and its low byte, each with the zero point's own: exact over the whole range (METHOD: given codes).
For the rest see `matmul.body`.
"""

from __future__ import annotations

from functools import cache

import onnx
from onnx import parser

from ..matmul.weight_body import GROUPS, OLDEST_OPSET, WEIGHT
from ..spelling import Reductions, reshape_with_zeros

_SCAN = """
    m = Shape (x_groups)
    m_1 = Slice (m, at_0, at_1)
    acc_shape = Concat <axis = 0> (m_1, n)
    acc_zero = Expand (zero_f, acc_shape)
    acc = Scan <num_scan_inputs = {inputs}, body = group (
            float[?, ?] sum_in, {planes}, float[?, 1] r, uint8[?, ?] w, float[1, ?] sw, uint8[?] z, float[1, ?] o
        ) => (float[?, ?] sum_out) {{
        {product}
        product = Cast <to = 1> (exact)
        drift = Mul (o, r)
        centred = Sub (product, drift)
        scale = Mul (s_x, sw)
        contribution = Mul (centred, scale)
        sum_out = Add (sum_in, contribution)
    }}> (acc_zero, {digits}, sums_GM1, w_GBN, scales_float, zero_points_GN, offsets_float)
"""

_BYTE = """
    codes_byte = Cast <to = 2> (codes)
    z_byte = Cast <to = 2> (z_code)
    codes_GMB = Transpose <perm = [1, 0, 2]> (codes_byte)
    """ + _SCAN.format(
    inputs=6, planes="uint8[?, ?] d", product="exact = MatMulInteger (d, w, z_byte, z)", digits="codes_GMB"
)

_TWO_BYTES = """
    byte = Constant <value = float {256}> ()
    byte_int32 = Constant <value = int32 {256}> ()
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
    z_high_byte = Cast <to = 2> (z_high)
    z_low_byte = Cast <to = 2> (z_low)
    high_GMB = Transpose <perm = [1, 0, 2]> (high_byte)
    low_GMB = Transpose <perm = [1, 0, 2]> (low_byte)
    """ + _SCAN.format(
    inputs=7,
    planes="uint8[?, ?] dh, uint8[?, ?] dl",
    product="""
        high_product = MatMulInteger (dh, w, z_high_byte, z)
        low_product = MatMulInteger (dl, w, z_low_byte, z)
        high_weighted = Mul (high_product, byte_int32)
        exact = Add (high_weighted, low_product)""",
    digits="high_GMB, low_GMB",
)


@cache
def matmul_integer_to_float_body(opset: int) -> onnx.FunctionProto:
    """The function ``msd.MatMulIntegerToFloat`` for a model of default-domain opset ``opset``.

    Raises:
        ValueError: ``opset`` is below `OLDEST_OPSET`.
    """
    if opset < OLDEST_OPSET:
        raise ValueError(f"msd.MatMulIntegerToFloat has a body from opset {OLDEST_OPSET} on, got {opset}")
    reduce = Reductions(opset)
    text = f"""
<domain: "msd", opset_import: ["" : {opset}]>
MatMulIntegerToFloat <layout>
        (A, a_scale, a_zero_point, B, scales, zero_points, offsets, bias, plan) => (Y) {{
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
    {reduce("code_sums", "ReduceSum", "x_groups", 2)}
    sums_GM1 = Transpose <perm = [1, 0, 2]> (code_sums)
    z_shifted = Add (z_one, shift)
    codes = Add (x_groups, z_shifted)
    z_code = Reshape (z_shifted, no_shape)
    y_rows = If <
        then_branch = two_bytes () => (float[?, ?] y16) {{
            {_TWO_BYTES}
            y16 = Add (acc, bias)
        }},
        else_branch = one_byte () => (float[?, ?] y8) {{
            {_BYTE}
            y8 = Add (acc, bias)
        }}
    > (is_wide)
    a_shape = Shape (A)
    leading = Slice (a_shape, at_0, minus_one)
    y_shape = Concat <axis = 0> (leading, n)
    {reshape_with_zeros(opset, "Y", "y_rows", "y_shape")}
}}
"""
    return parser.parse_function(text)
