"""Weights rounded to FLOAT4E2M1 in blocks along K, each with a scale of 8 bits: MXFP4 and NVFP4.

    MXFP4   blocks of 32, scale = 2^(floor(log2(peak)) - 2)                         (FLOAT8E8M0; 2 is E2M1's largest exponent)
    NVFP4   blocks of 16, scale = e4m3(peak / 6 / whole) * whole                    whole = max|W| / (6 * 448), one for the tensor
    codes = e2m1(clip(W / scale, -6, 6))                                            nearest, halves to the even mantissa

``peak`` is a block's largest magnitude. That is the standards' rule; *least error* also tries neighbouring scales and takes the one
with the smallest sum of squared differences.

Source: OCP Microscaling Formats 1.0, section 6.3; NVIDIA's description of NVFP4 (two-level scaling). The roundings of single numbers
are those of ml_dtypes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import ml_dtypes
import numpy as np

LARGEST = np.float32(6)
"""Of E2M1."""

_LARGEST_E4M3 = np.float32(448)
_LARGEST_E4M3_BITS = 0x7E

_MX_OFFSETS = (0, 1, -1)
_NV_OFFSETS = (0, 1, 2, 3, 4, -1, -2)
"""Steps from the standard's scale that `least_error` tries, the standard's first: of the exponent, and of E4M3's bits, 8 to an octave
(4 up is 1.5 times the scale, with which the peak becomes 4 instead of 6)."""

Format: TypeAlias = Literal["mxfp4", "nvfp4"]
ScaleRule: TypeAlias = Literal["standard", "least_error"]

BLOCK_SIZES: dict[Format, int] = {"mxfp4": 32, "nvfp4": 16}
"""Steps of K that share a scale."""


@dataclass(frozen=True)
class Float4:
    """A weight ``[K, N]`` as 4-bit codes and scales, the last block perhaps shorter."""

    codes: np.ndarray
    """``[K, N]`` float4_e2m1fn."""
    scales: np.ndarray
    """``[blocks, N]`` float8_e8m0fnu or float8_e4m3fn."""
    scale_of_scales: np.ndarray | None = None
    """Of the latter: a float32 scalar."""


def round_to_float4(weight: np.ndarray, format: Format, scale_rule: ScaleRule = "standard") -> Float4:
    """Round a weight.

    Args:
        weight: ``[K, N]`` of finite floats.
    """
    if format == "mxfp4":
        return _rounded(weight, BLOCK_SIZES[format], _mx_scales(_MX_OFFSETS if scale_rule == "least_error" else (0,)))
    peak = np.float32(np.abs(weight).max(initial=0))
    whole = peak / (LARGEST * _LARGEST_E4M3)
    if whole < np.finfo(np.float32).tiny:
        whole = np.float32(1)  # nothing but zeros, or as good as
    offsets = _NV_OFFSETS if scale_rule == "least_error" else (0,)
    found = _rounded(weight, BLOCK_SIZES[format], _nv_scales(whole, offsets))
    return Float4(found.codes, found.scales, np.asarray(whole, np.float32))


_Candidates: TypeAlias = Callable[[np.ndarray], list[tuple[np.ndarray, np.ndarray]]]
"""From the blocks' peaks, scales to try: as they are stored, and as float32."""

_AT_ONCE = 2**18
"""Numbers that are rounded at a time: they stay in the cache."""


def _mx_scales(offsets: tuple[int, ...]) -> _Candidates:
    def candidates(peaks: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        _, exponent = np.frexp(peaks)  # peak in [2^(e-1), 2^e)
        lowest = np.where(peaks > 0, exponent - 1 - 2, -127)
        stored = [(np.clip(lowest + o, -127, 127) + 127).astype(np.uint8) for o in offsets]
        return [(s.view(ml_dtypes.float8_e8m0fnu), np.ldexp(np.float32(1), s.astype(np.int32) - 127)) for s in stored]

    return candidates


def _nv_scales(whole: np.float32, offsets: tuple[int, ...]) -> _Candidates:
    def candidates(peaks: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        standard = np.minimum(peaks / LARGEST / whole, _LARGEST_E4M3).astype(ml_dtypes.float8_e4m3fn)
        bits = standard.view(np.uint8).astype(np.int16)
        stored = [np.clip(bits + o, 0, _LARGEST_E4M3_BITS).astype(np.uint8) for o in offsets]
        typed = [s.view(ml_dtypes.float8_e4m3fn) for s in stored]
        return [(t, t.astype(np.float32) * whole) for t in typed]

    return candidates


def _rounded(weight: np.ndarray, block: int, candidates: _Candidates) -> Float4:
    k, n = weight.shape
    blocks = -(-k // block)
    codes: np.ndarray | None = None
    scales: np.ndarray | None = None
    width = max(1, _AT_ONCE // (blocks * block))
    for first in range(0, n, width):
        columns = slice(first, min(first + width, n))
        padded = np.zeros((blocks * block, columns.stop - first), np.float32)
        padded[:k] = weight[:, columns]
        grouped = padded.reshape(blocks, block, -1)
        chosen_codes, chosen_scales = _best(grouped, candidates(np.abs(grouped).max(axis=1)))
        if codes is None or scales is None:
            codes, scales = np.empty((k, n), chosen_codes.dtype), np.empty((blocks, n), chosen_scales.dtype)
        codes[:, columns] = chosen_codes.reshape(blocks * block, -1)[:k]
        scales[:, columns] = chosen_scales
    assert codes is not None
    assert scales is not None
    return Float4(codes, scales)


def _best(grouped: np.ndarray, scales: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Codes and stored scales of the candidate with the least squared error, block by block; the first of equals."""
    (best_stored, value), *others = scales
    best = _codes(grouped, value)
    if not others:
        return best, best_stored
    best_stored, least = best_stored.copy(), _error(grouped, best, value)
    for stored, other in others:
        codes = _codes(grouped, other)
        error = _error(grouped, codes, other)
        better = error < least
        best = np.where(better[:, None], codes.view(np.uint8), best.view(np.uint8)).view(best.dtype)
        best_stored[better] = stored[better]
        least = np.minimum(error, least)
    return best, best_stored


def _codes(grouped: np.ndarray, scales: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scaled = np.where(scales[:, None] > 0, grouped / scales[:, None], np.float32(0))
    codes: np.ndarray = np.clip(scaled, -LARGEST, LARGEST).astype(ml_dtypes.float4_e2m1fn)
    return codes


def _error(grouped: np.ndarray, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # a weight beyond float32 is infinitely far off
        difference = grouped - codes.astype(np.float32) * scales[:, None]
    error: np.ndarray = np.square(difference, dtype=np.float64).sum(axis=1)
    return error
