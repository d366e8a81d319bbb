"""What to fill an input with, by its role."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from .roles import Role
from .signature import Input

Array: TypeAlias = "np.ndarray[Any, Any]"
Sizes: TypeAlias = Mapping[str, int]

DEFAULT_VOCABULARY = 16  # of ids no table of the graph bounds
SEARCH_STEPS = 8  # tokens a search may add to its prompt
BEAMS = 3


@dataclass(frozen=True)
class Fill:
    """A recipe for an array.

    Attributes:
        kind: a key of `MAKERS`.
        low: constant, first count, least integer, or least of a uniform draw.
        high: one above the largest, or the largest of a uniform draw, or the deviation of a normal one.
    """

    kind: str
    low: float = 0
    high: float = 0


Maker: TypeAlias = "Callable[[np.random.Generator, tuple[int, ...], np.dtype[Any], Fill], Array]"


def _integers(g: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any], fill: Fill) -> Array:
    drawn = dtype if dtype.kind in "iu" else np.dtype(np.int16)  # the narrow types of ml_dtypes cannot be drawn
    return g.integers(int(fill.low), int(fill.high), shape, drawn)


def _count(_: np.random.Generator, shape: tuple[int, ...], _dtype: np.dtype[Any], fill: Fill) -> Array:
    length = shape[-1] if shape else 1
    counted = np.minimum(np.arange(int(fill.low), int(fill.low) + length), max(int(fill.high) - 1, 0))
    return np.broadcast_to(counted, shape) if shape else counted[0]


def _uniform(g: np.random.Generator, shape: tuple[int, ...], _dtype: np.dtype[Any], fill: Fill) -> Array:
    return g.random(shape, np.float32) * np.float32(fill.high - fill.low) + np.float32(fill.low)


MAKERS: dict[str, Maker] = {
    "constant": lambda _, shape, dtype, fill: np.full(shape, fill.low, dtype),
    "count": _count,
    "integers": _integers,
    "normal": lambda g, shape, _, fill: g.standard_normal(shape, np.float32) * np.float32(fill.high),
    "uniform": _uniform,
}


def make(fill: Fill, shape: tuple[int, ...], dtype: np.dtype[Any], *, seed: int, name: str) -> Array:
    """The array of a recipe; the same numbers for the same seed and name, whatever the other inputs are."""
    if 0 in shape:
        return np.zeros(shape, dtype)
    g = np.random.default_rng([seed % 2**32, zlib.crc32(name.encode())])
    made = np.asarray(MAKERS[fill.kind](g, shape, dtype, fill)).astype(dtype, copy=False)
    return np.ascontiguousarray(made).reshape(shape)


def _ids(i: Input, _: Sizes) -> Fill:
    return Fill("integers", 0, max(i.bound or DEFAULT_VOCABULARY, 1))


def _types(i: Input, _: Sizes) -> Fill:
    return Fill("integers", 0, min(max(i.bound or 1, 1), 2))


def _positions(i: Input, s: Sizes) -> Fill:
    return Fill("count", s["past"], i.bound or 2**31)


def _mask(i: Input, _: Sizes) -> Fill:
    # 1 keeps in a mask of one row; one with a row per query is added to the scores
    return Fill("constant", 0 if i.dtype.kind == "f" and len(i.dims) >= 3 else 1)


def _zero_point(i: Input, _: Sizes) -> Fill:
    if i.dtype.itemsize > 2:
        return Fill("constant", 0)
    middle = 0 if i.dtype.kind == "i" else 2 ** (8 * i.dtype.itemsize - 1)
    return Fill("integers", middle - 8, middle + 8)


def _values(i: Input, _: Sizes) -> Fill:
    kind, size = i.dtype.kind, i.dtype.itemsize
    if kind == "b":
        return Fill("constant", 1)
    if kind not in "iu":
        return Fill("normal", 0, 1)
    if size > 1:
        return Fill("integers", 0, 2)
    # the largest range in which no kernel's 16-bit sum of two u8*s8 products saturates
    return Fill("integers", -64, 64) if kind == "i" else Fill("integers", 0, 256)


def _constant(value: float) -> Callable[[Input, Sizes], Fill]:
    return lambda _i, _s: Fill("constant", value)


FILLS: dict[Role, Callable[[Input, Sizes], Fill]] = {
    Role.IDS: _ids,
    Role.TYPES: _types,
    Role.POSITIONS: _positions,
    Role.MASK: _mask,
    Role.ZERO_POINT: _zero_point,
    Role.SCALE: lambda _i, _s: Fill("uniform", 0.01, 0.03),
    Role.SEQLENS: lambda _i, s: Fill("constant", s["total"] - 1),
    Role.TOTAL_LENGTH: lambda _i, s: Fill("constant", s["total"]),
    Role.PAST_LENGTH: lambda _i, s: Fill("constant", s["past"]),
    Role.MAX_LENGTH: lambda _i, s: Fill("constant", s["seq"] + SEARCH_STEPS),
    Role.MIN_LENGTH: lambda _i, s: Fill("constant", s["seq"] + 1),
    Role.NUM_BEAMS: _constant(BEAMS),
    Role.NUM_RETURNED: _constant(BEAMS - 1),
    Role.ONE: _constant(1),
    Role.ZERO: _constant(0),
    Role.USE_CACHE: lambda _i, s: Fill("constant", int(s["past"] > 0)),
}


def fill_for(i: Input, sizes: Sizes) -> Fill:
    """The usual fill of an input: random where any number will do."""
    return FILLS.get(i.role, _values)(i, sizes)


def tame_fill_for(i: Input, sizes: Sizes) -> Fill:
    """The fill least likely to be refused: integers are 0, searches have one beam, a mask is the other way round."""
    usual = fill_for(i, sizes)
    if i.role in (Role.NUM_BEAMS, Role.NUM_RETURNED):
        return Fill("constant", 1)
    if i.role is Role.MASK:
        return Fill("constant", 1 - usual.low)
    if usual.kind == "integers" or i.role is Role.POSITIONS:
        return Fill("constant", 0)
    return replace(usual, high=usual.high / 10) if usual.kind == "normal" else usual
