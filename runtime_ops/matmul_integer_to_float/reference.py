"""What ``msd.MatMulIntegerToFloat`` means, in NumPy. The function body and every native kernel give the same bits.

    Y[m, n] = bias[n] + sum over groups g of  float(C) * (a_scale * s_w[g, n])
    C = sum over k in g of (w[k, n] - z[g, n]) * (A[m, k] - a_zero_point)

C is an exact integer, whatever the codes and zero points: a product that a runtime's own kernel would saturate (uint8 by
int8 where there is no VNNI) is none here. Groups are added in ascending order in float32, every product and sum rounded on
its own. Where a column has one scale and zero point for all K, all K is one group: the result has then the very bits of
``MatMulInteger -> Cast -> Mul(., Mul(a_scale, s_w)) -> Add``, on which the codes of the layers behind it hang.
"""

from __future__ import annotations

import numpy as np

from ..matmul.layout import unpack_codes, unpack_columns
from .layout import CodesPlan


def matmul_integer_to_float(
    a: np.ndarray,
    a_scale: np.ndarray,
    a_zero_point: np.ndarray,
    b: np.ndarray,
    scales: np.ndarray,
    zero_points: np.ndarray,
    bias: np.ndarray,
    plan: np.ndarray,
) -> np.ndarray:
    """``a_scale * (A - a_zero_point) @ W + bias`` with exact integer products.

    Args:
        a: ``[..., K]`` uint8, int8, uint16 or int16.
        a_scale: one float32, activation units per code.
        a_zero_point: one value of A's type.
        b: ``[tiles, groups, lines, 64]`` uint8, see `matmul.layout`.
        scales: ``[tiles, groups | 1, 16]`` float32, weight units per code; 1 only up to `layout.LONGEST_SUM` of K.
        zero_points: ``[tiles, groups, 16]``, ``[tiles, 1, 16]`` or ``[1, 1, 1]`` uint8; not the first where scales have 1.
        bias: ``[N]`` float32.
        plan: ``[5]`` int64, see `layout.CodesPlan`.

    Returns:
        ``[..., N]`` float32.
    """
    p = CodesPlan.of(plan)
    n = len(bias)
    codes = a.reshape(-1, p.k).astype(np.int64) - int(a_zero_point.reshape(()))
    s_x = np.float32(a_scale.reshape(()))
    w = unpack_codes(b, n, p).astype(np.int64)
    length = p.k if scales.shape[1] == 1 else p.block_size
    groups = -(-p.k // length)
    s = unpack_columns(scales, n, groups)
    z = unpack_columns(zero_points, n, groups).astype(np.int64)

    total = np.zeros((len(codes), n), np.float32)
    for g in range(groups):
        steps = slice(g * length, (g + 1) * length)
        product = codes[:, steps] @ (w[steps] - z[g])
        total = total + product.astype(np.float32) * (s_x * s[g])
    y: np.ndarray = total + bias
    return y.reshape(*a.shape[:-1], n)
