"""What ``msd.MatMulIntegerToFloat`` means, in NumPy. The function body and every native kernel give the same bits.

    Y[m, n] = bias[n] + sum over groups g of  a_scale * s_w[g, n] * (C - offset[g, n] * R)
    C = sum over k in g of (w[k, n] - z[g, n]) * (A[m, k] - a_zero_point)    R = sum over k in g of (A[m, k] - a_zero_point)

C and R are exact integers, whatever the codes and zero points: a product that a runtime's own kernel would saturate
(uint8 by int8 where there is no VNNI) is none here. Groups are added in ascending order in float32, every product and sum
rounded on its own, as in ``msd.MatMul``.
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
    offsets: np.ndarray,
    bias: np.ndarray,
    plan: np.ndarray,
) -> np.ndarray:
    """``a_scale * (A - a_zero_point) @ W + bias`` with exact integer products.

    Args:
        a: ``[..., K]`` uint8, int8, uint16 or int16.
        a_scale: one float32, activation units per code.
        a_zero_point: one value of A's type.
        b: ``[tiles, groups, lines, 64]`` uint8, see `matmul.layout`.
        scales: ``[tiles, groups | 1, 16]`` float32, weight units per code.
        zero_points: ``[tiles, groups | 1, 16]`` or ``[1, 1, 1]`` uint8.
        offsets: as ``zero_points``, float32; what a zero point has beyond its integer.
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
    s = unpack_columns(scales, n, p.groups)
    z = unpack_columns(zero_points, n, p.groups).astype(np.int64)
    o = unpack_columns(offsets, n, p.groups)

    total = np.zeros((len(codes), n), np.float32)
    for g in range(p.groups):
        steps = slice(g * p.block_size, (g + 1) * p.block_size)
        q = codes[:, steps]
        product = (q @ (w[steps] - z[g])).astype(np.float32)
        code_sum = q.sum(axis=1, keepdims=True).astype(np.float32)
        total = total + (product - o[g] * code_sum) * (s_x * s[g])
    return (total + bias).reshape(*a.shape[:-1], n)
