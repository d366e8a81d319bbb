"""What ``msd.Attention`` means, in NumPy. Every native kernel gives the same bits.

    S[i, t] = cap(float(C) * (s_q * scale) * key_scale[t]) + mask[i, t]       C = sum over d of Q[i, d] * K[t, d]
    P = exp(S - m)      l = sum over t of rint(P * 32258)      O = sum over t of rint(P * v[t] * 32258) * V[t]
    Y = O / l * value_scale

Q are the query's codes (two INT8 terms fused into 16 bits, `matmul.reference.decompose`), K and V the cache's. Scales that are given
once (*static*) multiply the query before it is decomposed, and Y; scales of tokens (*dynamic*) stand where the formulas have
``key_scale[t]`` and ``v[t]``. C and the sums over a tile are exact integers; every other operation is float32 and rounds on its own
(no FMA), in the order written here.

Tokens are taken in tiles of 256, counted from the sequence's first; in a tile m is the row's own maximum there, and v the token's
scale by the largest that the row sees there. Tiles merge in ascending order:

    m' = max(m, m_t)    a = exp(m - m')    b = exp(m_t - m')    l = l * a + float(l_t) * b    O = O * a + float(O_t) * (b * largest)

A row's result hangs on nothing but what it sees: not on hidden tokens, the batch, the cache's capacity, or on how many tokens a call brings.

Source: arXiv 2605.13915 section 4; the fused code, the tile's own maximum, scales per token and the guards are ours.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..matmul.layout import Plan as RowPlan
from ..matmul.reference import LIMITS, SMALLEST_PEAK, decompose
from .layout import APPEND, GROW, TILE, Plan, pack_codes, unpack_codes

_LIMIT = np.float32(LIMITS[2])
"""Code of the probability 1."""

_EXP_BELOW = np.float32(-87)
"""Of a smaller argument `exp` is 0: no subnormal arises."""
_LOG2_E = np.float32(1.44269504)
_LN_2 = np.float32(0.693359375), np.float32(-2.12194440e-4)
"""In two parts; the first has 9 bits, so that its multiples are exact."""
_EXP_SERIES = [np.float32(c) for c in (0.0013814598, 0.008368717, 0.04166839, 0.16666521, 0.49999994)]
"""(exp(r) - 1 - r) / r^2 for abs(r) <= ln(2) / 2, highest power first."""


class Attended(NamedTuple):
    """The outputs, in order."""

    y: np.ndarray
    present_key: np.ndarray
    present_value: np.ndarray
    present_key_scale: np.ndarray
    present_value_scale: np.ndarray


def exp(x: np.ndarray) -> np.ndarray:
    """``e**x`` for float32 x <= 0 (or NaN), to 1 ULP; 0 below -87; exp(0) is 1 and no result is larger."""
    x = np.asarray(x, np.float32)
    inside = np.where(x < _EXP_BELOW, np.float32(0), x)
    n = np.rint(inside * _LOG2_E)
    r = (inside - n * _LN_2[0]) - n * _LN_2[1]
    series = np.full_like(r, _EXP_SERIES[0])
    for coefficient in _EXP_SERIES[1:]:
        series = series * r + coefficient
    y = (series * (r * r) + r) + np.float32(1)
    power = np.where(np.isnan(n), 0, n).astype(np.int32)
    return np.where(x < _EXP_BELOW, np.float32(0), np.ldexp(y, power))


def soft_cap(s: np.ndarray, cap: np.float32) -> np.ndarray:
    """``cap * tanh(s / cap)``, good to ``cap * 2**-23``; ``s`` itself if cap is 0."""
    if cap == 0:
        return s
    x = s * (np.float32(1) / cap)
    e = exp(np.float32(-2) * np.abs(x))
    capped: np.ndarray = np.copysign(cap * ((1 - e) / (1 + e)), x)
    return capped


def quantize(x: np.ndarray, scale: np.ndarray, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Codes of new tokens.

    Args:
        x: ``[B, Hkv, L, D]`` float32.
        scale: static: ``[1, 1, 1, 1]`` or ``[1, Hkv, 1, D]`` float32. Not read if the plan is dynamic.

    Returns:
        Codes ``[B, Hkv, L, D]`` int8, halves rounded to even, and the scales that dynamic tokens get, ``[B, Hkv, L, 1]`` float32.
        Dynamic: 0 for a token that counts as zero, NaN for one with NaN or Inf. Static: what is beyond the range is clipped
        as in onnxruntime, and NaN becomes 0, for a code cannot say it.
    """
    if plan.dynamic:
        peak = np.abs(x).max(axis=-1, keepdims=True)
        finite = np.isfinite(x).all(axis=-1, keepdims=True)
        live = finite & (peak >= SMALLEST_PEAK)
        peak = np.where(live, peak, np.float32(1))
        largest = np.float32(plan.largest)
        with np.errstate(invalid="ignore"):
            codes = np.where(live, np.rint(x * (largest / peak)), 0)
        scales = np.where(live, peak / largest, np.where(finite, np.float32(0), np.float32(np.nan)))
    else:
        with np.errstate(all="ignore"):
            steps = x * (np.float32(1) / scale)
        codes = np.rint(np.clip(np.where(np.isnan(steps), 0, steps), -plan.largest - 1, plan.largest))
        scales = np.zeros((*x.shape[:-1], 1), np.float32)
    return codes.astype(np.int8), scales


def attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    past_key: np.ndarray,
    past_value: np.ndarray,
    key_scale: np.ndarray,
    value_scale: np.ndarray,
    mask: np.ndarray,
    sinks: np.ndarray,
    lengths: np.ndarray,
    plan: np.ndarray,
    factors: np.ndarray,
) -> Attended:
    """Store new tokens in a low-bit cache and attend over its codes.

    Args:
        query: ``[B, Hq, S, D]`` float32, float16 or bfloat16 (T). Query i stands at position ``length + L - S + i``.
        key: ``[B, Hkv, L, D]`` T, new tokens; L may be 0. Hkv divides Hq.
        value: ``[B, Hkv, L, Dv]`` T.
        past_key: ``[B, Hkv, P, D]`` int8, or ``[B, Hkv, P, ceil(D / 2)]`` uint8 for 4 bits, see `layout`.
        past_value: likewise with Dv.
        key_scale: float32, query units per code. Static: ``[1, 1, 1, 1]`` or ``[1, Hkv, 1, D]``. Dynamic: ``[B, Hkv, P, 1]``.
        value_scale: likewise with Dv.
        mask: added to the logits, float32; each dimension is that of ``[B, Hq, S, T]`` or 1, the last may exceed T. -Inf hides.
            Columns are tokens as stored: T is P + L if appended, else the longest ``length + L``.
        sinks: ``[Hq]`` float32, logit of a token without value, or ``[1]`` with -Inf for none.
        lengths: ``[B]`` or ``[1]`` int64, valid tokens of the past. They are the first; what is stored behind them is not read.
        plan: ``[5]`` int64, see `layout.Plan`.
        factors: ``[2]`` float32: softmax scale; soft cap, 0 for none, applied before the mask.

    Returns:
        Y ``[B, Hq, S, Dv]`` T; 0 for a query that sees nothing, NaN for one whose logits, or the scales it sees, are not
        finite. The cache with the new tokens: appended, ``[B, Hkv, P + L, ...]``; or with them at ``length .. length + L``,
        of the same shape if shared, with as many tokens as the longest sequence has if it grows (new room is zeros); and its scales, which for static ones are those given.
    """
    p = Plan.of(plan)
    lengths = np.broadcast_to(lengths, len(query))
    new_tokens, past = key.shape[2], past_key.shape[2]
    stored = []
    for new, cache, scale in ((key, past_key, key_scale), (value, past_value, value_scale)):
        codes, scales = quantize(new.astype(np.float32), scale, p)
        present = _stored(cache, pack_codes(codes, p.bits), lengths, p)
        stored.append((present, _stored(scale, scales, lengths, p) if p.dynamic else scale))
    (keys, key_scales), (values, value_scales) = stored

    y = np.zeros((*query.shape[:3], value.shape[3]), np.float32)
    group = query.shape[1] // key.shape[1]
    for b, length in enumerate(lengths):
        behind = past if p.cache == APPEND else length
        tokens = np.concatenate([np.arange(length), np.arange(behind, behind + new_tokens)])
        for h in range(key.shape[1]):
            heads = slice(h * group, (h + 1) * group)
            y[b, heads] = _attend(
                query[b, heads].astype(np.float32),
                unpack_codes(keys[b, h], key.shape[3], p.bits)[tokens],
                unpack_codes(values[b, h], value.shape[3], p.bits)[tokens],
                _of_head(key_scales, b, h, tokens, p),
                _of_head(value_scales, b, h, tokens, p),
                _mask_of(mask, b, heads, tokens),
                np.broadcast_to(sinks, query.shape[1])[heads],
                p,
                factors,
            )
    return Attended(y.astype(query.dtype), keys, values, key_scales, value_scales)


def _stored(past: np.ndarray, new: np.ndarray, lengths: np.ndarray, p: Plan) -> np.ndarray:
    if p.cache == APPEND:
        return np.concatenate([past, new], axis=2)
    present = past.copy()
    if p.cache == GROW:
        missing = max(0, int(lengths.max(initial=0)) + new.shape[2] - past.shape[2])
        present = np.concatenate([past, np.zeros((*past.shape[:2], missing, past.shape[3]), past.dtype)], axis=2)
    for b, length in enumerate(lengths):
        present[b, :, length : length + new.shape[2]] = new[b]
    return present


def _of_head(scale: np.ndarray, b: int, h: int, tokens: np.ndarray, p: Plan) -> np.ndarray:
    """``[tokens]`` of dynamic scales, ``[1]`` or ``[D]`` of static ones."""
    own: np.ndarray = scale[b, h, tokens, 0] if p.dynamic else scale[0, h if scale.shape[1] > 1 else 0, 0]
    return own


def _mask_of(mask: np.ndarray, b: int, heads: slice, tokens: np.ndarray) -> np.ndarray:
    """``[G | 1, S | 1, tokens | 1]``."""
    mask = mask[b if mask.shape[0] > 1 else 0]
    if mask.shape[0] > 1:
        mask = mask[heads]
    return mask if mask.shape[2] == 1 else mask[:, :, tokens]


def _attend(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    key_scale: np.ndarray,
    value_scale: np.ndarray,
    mask: np.ndarray,
    sinks: np.ndarray,
    p: Plan,
    factors: np.ndarray,
) -> np.ndarray:
    """The queries ``[G, S, D]`` that share a key head, over its valid tokens ``[T, D]`` and ``[T, Dv]``."""
    group, s, d = query.shape
    scale, cap = factors
    with np.errstate(all="ignore"):
        rows = (query if p.dynamic else query * key_scale).reshape(-1, d)
        parts = decompose(rows, RowPlan(d, 8, d, 2, True))
        codes, factor = (
            parts.codes.reshape(group * s, d).astype(np.float64),
            parts.scales * scale,
        )  # sums exact in either

        sink = np.repeat(sinks, s)
        m = np.where(sink < np.inf, sink, np.float32(0))
        l = np.where(sink < np.inf, np.where(sink > -np.inf, _LIMIT, np.float32(0)), np.float32(np.nan))  # noqa: E741
        o = np.zeros((group * s, values.shape[1]), np.float32)
        position = np.tile(np.arange(s) + len(keys) - s, group)[:, None]

        for start in range(0, len(keys), TILE):
            t = np.arange(start, min(start + TILE, len(keys)))
            logits = (codes @ keys[t].T.astype(np.float64)).astype(np.float32) * factor
            if p.dynamic:
                logits = logits * key_scale[t]
            logits = soft_cap(logits, cap)
            added = mask if mask.shape[2] == 1 else mask[:, :, t]
            added = np.broadcast_to(added, (group, s, len(t))).reshape(-1, len(t))
            hidden = added == -np.inf
            if p.causal:
                hidden = hidden | (t > position)
            if p.window:
                hidden = hidden | (t <= position - p.window)
            logits = np.where(hidden, np.float32(-np.inf), logits + added)

            seen = logits != -np.inf
            sound = ~(seen & ~(logits < np.inf)).any(axis=1)
            m_t = np.where(sound, logits.max(axis=1), np.float32(0))
            probability = np.where(seen, exp(np.where(seen, logits - m_t[:, None], 0)), np.float32(0))
            p_codes = np.rint(probability * _LIMIT)
            l_t = p_codes.sum(axis=1, dtype=np.float64).astype(np.float32)
            largest = np.ones(group * s, np.float32)
            if p.dynamic:
                magnitude = np.where(seen, np.abs(value_scale[t]), np.float32(0))
                largest = magnitude.max(axis=1)
                sound &= np.isfinite(largest)
                live = largest >= SMALLEST_PEAK
                inverse = np.where(live, _LIMIT / largest, np.float32(0))[:, None]
                p_codes = np.where(live[:, None] & seen, np.rint(probability * (value_scale[t] * inverse)), 0)
            l_t = np.where(sound, l_t, np.float32(np.nan))
            o_t = np.where(sound[:, None], p_codes, 0).astype(np.float64) @ values[t].astype(np.float64)

            some = seen.any(axis=1)
            m_new = np.maximum(m, m_t)
            a, b = exp(m - m_new), exp(m_t - m_new)
            l = np.where(some, l * a + l_t * b, l)  # noqa: E741
            merged = o * a[:, None] + o_t.astype(np.float32) * (b * np.where(sound, largest, 1))[:, None]
            o = np.where(some[:, None], merged, o)
            m = np.where(some, m_new, m)

        y = np.where((l == 0)[:, None], np.float32(0), o / l[:, None])
        if not p.dynamic:
            y = np.where((l == 0)[:, None], y, y * value_scale)
    return y.reshape(group, s, values.shape[1])
