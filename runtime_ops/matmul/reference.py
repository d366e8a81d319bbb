"""What ``msd.MatMul`` means, in NumPy. The function body and every native kernel give the same bits.

    Y[m, n] = bias[n] + sum over groups g of  s_x[m, g] * s_w[g, n] * (C - offset[g, n] * R)
    C = sum over k in g of (w[k, n] - z[g, n]) * Q[m, k]          R = sum over k in g of Q[m, k]

Q are the activation's codes (`decompose`), w the numbers that the weight's codes stand for (`layout.decode`), C and R exact
integers. Terms 1 and 2 work in float32, and so do the scales; 3 terms in float64, for 254^2 * 127 is almost 2^23. Groups are
added in ascending order, every product and sum rounded on its own (no FMA), so the same row has the same bits at every batch
size, thread count and instruction set.

Source: arXiv 2605.13915 section 3 (the decomposition); the fused code, the groups and the guards are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .layout import ActivationFormat, Plan, decode, unpack_codes, unpack_columns

LIMITS = {1: 127, 2: 127 * 254, 3: 127 * 254**2}
"""Largest activation code by number of terms."""

SMALLEST_PEAK = np.float32(2.0**-100)
"""A group whose largest magnitude is below it counts as zero: no subnormal arises, so flush-to-zero changes nothing."""


@dataclass(frozen=True)
class Decomposed:
    """An activation as integer codes: ``x ~ codes * scales``, group by group."""

    codes: np.ndarray
    """``[M, groups, block_size]`` int32, the tail of K filled with 0."""
    scales: np.ndarray
    """``[M, groups]`` float32, float64 for 3 terms; 0 for a group that counts as zero, NaN for one with NaN or Inf."""

    def values(self, k: int) -> np.ndarray:
        """The activation that the codes stand for, ``[M, k]`` float64."""
        x = self.codes * self.scales[:, :, None].astype(np.float64)
        return x.reshape(len(x), -1)[:, :k]


def real_type(terms: int) -> type[np.floating]:
    """The type that scales and sums are held in."""
    return np.float64 if terms == 3 else np.float32


def decompose(x: np.ndarray, plan: Plan) -> Decomposed:
    """Split activation rows into integer codes: ``plan.terms`` INT8 digits, or what `mx` says of ``plan.activation``.

    Args:
        x: ``[M, K]`` float32 (wider and narrower types are converted first).

    Returns:
        Of INT8, codes within ``LIMITS[plan.terms]``, rounded half to even. Error per element: at most
        ``max|x| / (2 * LIMITS)`` of its group (or row), plus ``4 * max|x| * 2**-24`` of float32 rounding.
    """
    if plan.activation is not ActivationFormat.INT8:
        from . import mx  # which is made of what is here

        return mx.decompose_as(x, plan, plan.activation)
    x = np.asarray(x, np.float32)
    real = real_type(plan.terms)
    limit = real(LIMITS[plan.terms])
    padded = np.zeros((len(x), plan.groups * plan.block_size), np.float32)
    padded[:, : plan.k] = x
    groups = padded.reshape(len(x), plan.groups, plan.block_size)

    axes = (1, 2) if plan.per_row else 2
    peak = np.abs(groups).max(axis=axes, keepdims=True, initial=0)
    finite = np.isfinite(groups).all(axis=axes, keepdims=True)
    live = finite & (peak >= SMALLEST_PEAK)
    peak = np.where(live, peak, 1).astype(real)
    with np.errstate(invalid="ignore"):
        # |x| <= peak, so neither factor's rounding can carry a code beyond the limit: nothing to clip.
        codes = np.where(live, np.rint(groups.astype(real) * (limit / peak)), 0)
    scales = np.where(live, peak / limit, np.where(finite, 0, np.nan)).astype(real)
    return Decomposed(codes.astype(np.int32), np.broadcast_to(scales[..., 0], groups.shape[:2]))


def matmul(
    a: np.ndarray,
    b: np.ndarray,
    scales: np.ndarray,
    zero_points: np.ndarray,
    offsets: np.ndarray,
    bias: np.ndarray,
    plan: np.ndarray,
) -> np.ndarray:
    """``A @ W + bias`` with the activation decomposed and the weight left as codes.

    Args:
        a: ``[..., K]`` float32, float16 or bfloat16.
        b: ``[tiles, groups, lines, 64]`` uint8, see `layout`.
        scales: ``[tiles, groups | 1, 16]`` float32, weight units per code.
        zero_points: ``[tiles, groups | 1, 16]`` or ``[1, 1, 1]`` uint8.
        offsets: as ``zero_points``, float32; what a zero point has beyond its integer.
        bias: ``[N]`` float32.
        plan: ``[7]`` int64, see `layout.Plan`.

    Returns:
        ``[..., N]`` of A's type.
    """
    p = Plan.of(plan)
    n = len(bias)
    real = real_type(p.terms)
    x = decompose(a.reshape(-1, p.k), p)
    w = decode(unpack_codes(b, n, p), p.codebook).astype(np.int64)
    s = unpack_columns(scales, n, p.groups).astype(real)
    z = unpack_columns(zero_points, n, p.groups).astype(np.int64)
    o = unpack_columns(offsets, n, p.groups).astype(real)

    total = np.zeros((len(x.codes), n), real)
    for g in range(p.groups):
        w_g = w[g * p.block_size : (g + 1) * p.block_size] - z[g]
        q = x.codes[:, g, : len(w_g)].astype(np.int64)
        product = (q @ w_g).astype(real)
        code_sum = q.sum(axis=1, keepdims=True).astype(real)
        total = total + (product - o[g] * code_sum) * (x.scales[:, g, None] * s[g])
    y = (total + bias.astype(real)).astype(np.float32)
    return y.reshape(*a.shape[:-1], n).astype(a.dtype)
