"""Which shapes and fills to try, likeliest first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, cycle
from typing import Any

import numpy as np

from . import dims
from .fills import Array, Fill, fill_for, make, tame_fill_for
from .roles import Role
from .signature import Input, Signature

MAX_BYTES = 256 * 2**20  # of all inputs of one feed together
USUAL_BYTES = 32 * 2**20  # above it, smaller shapes are tried first

# The sizes of quantities that no hypothesis changes.
FIXED = {"@one": 1, "@channels": 3, "@encoder": 7, "@samples": 1600, "@frames": 100}
FREE_SIZES = (3, 4, 5, 8)  # of symbols nothing is known about, in the order they appear


@dataclass(frozen=True)
class Guess:
    """One hypothesis.

    Attributes:
        batch: sequences at once.
        seq: new tokens.
        past: tokens in the cache.
        image: height and width.
        head: which candidate is the size of a cache's last axis.
        free: size of every symbol nothing is known about; 0 gives each its own.
        per_column: a vector of scales of unknown length has one per column, else a single one.
        mask_total: a mask covers the past even where the model gives it the new tokens' symbol.
        full_cache: every slot of a cache holds a token, else it is a buffer with room for more.
        tame: integers are 0 and masks the other way round.
    """

    batch: int = 2
    seq: int = 6
    past: int = 0
    image: int = 224
    head: int = 0
    free: int = 0
    per_column: bool = True
    mask_total: bool = False
    full_cache: bool = True
    tame: bool = False

    def with_lengths_of(self, other: Guess) -> Guess:
        """This hypothesis for as many new and past tokens as ``other`` has."""
        return replace(self, seq=other.seq, past=other.past)


# What else may hold, likeliest first; each alone, then two together.
CHANGES: tuple[dict[str, Any], ...] = (
    {"batch": 1},
    {"mask_total": True},
    {"per_column": False},
    {"full_cache": False},
    {"head": 1},
    {"free": 4},
    {"seq": 1},
    {"tame": True},
    {"head": 2},
    {"image": 32},
    {"free": 1},
    {"image": 30},
    {"head": 3},
    {"seq": 32},
    {"free": 32},
    {"image": 64},
    {"head": 4},
)


@dataclass(frozen=True)
class Plan:
    """A hypothesis applied to a signature: per input its shape and fill."""

    shapes: tuple[tuple[int, ...], ...]
    fills: tuple[Fill, ...]

    def nbytes(self, signature: Signature) -> int:
        """The size of all its arrays together."""
        return sum(math.prod(s) * i.dtype.itemsize for s, i in zip(self.shapes, signature.inputs, strict=True))

    def arrays(self, signature: Signature, seed: int) -> dict[str, Array]:
        """The arrays themselves."""
        return {
            i.name: make(fill, shape, i.dtype, seed=seed, name=i.name)
            for i, shape, fill in zip(signature.inputs, self.shapes, self.fills, strict=True)
        }


def starts(signature: Signature) -> dict[str, Guess]:
    """The feeds a model should get, by name, and the likeliest hypothesis of each."""
    caches = [i for i in signature.inputs if i.role is Role.CACHE]
    if not caches:
        return {"single": Guess()}
    grows = any(isinstance(size, str) for i in caches for size in i.dims if size not in ("@batch", "@one"))
    decode = {"decode": Guess(past=5, seq=1)}
    return {"prefill": Guess()} | decode if grows else decode


def hypotheses(start: Guess) -> Iterator[Guess]:
    """``start``, then what differs from it in one respect, then in two."""
    yield start
    for count in (1, 2):
        for changes in combinations(CHANGES, count):
            if len({name for change in changes for name in change}) == count:
                yield replace(start, **{name: value for change in changes for name, value in change.items()})


def plan(signature: Signature, guess: Guess) -> Plan:
    """Shapes and fills under a hypothesis.

    Raises:
        ValueError: a dim is an expression that cannot be evaluated.
    """
    sizes = _sizes(signature, guess)
    shapes = tuple(_shape(i, guess, sizes) for i in signature.inputs)
    quantities = {name.removeprefix("@"): size for name, size in sizes.items() if name.startswith("@")}
    fill = tame_fill_for if guess.tame else fill_for
    return Plan(shapes, tuple(fill(i, quantities) for i in signature.inputs))


def plans(signature: Signature, start: Guess) -> Iterator[tuple[Guess, Plan]]:
    """The distinct plans that fit in memory, those of usual size first."""
    seen: set[Plan] = set()
    large: list[tuple[Guess, Plan]] = []
    for guess in hypotheses(start):
        try:
            made = plan(signature, guess)
        except ValueError:
            continue
        if made in seen:
            continue
        seen.add(made)
        nbytes = made.nbytes(signature)
        if nbytes <= USUAL_BYTES:
            yield guess, made
        elif nbytes <= MAX_BYTES:
            large.append((guess, made))
    yield from sorted(large, key=lambda pair: pair[1].nbytes(signature))


def _sizes(signature: Signature, guess: Guess) -> dict[str, int]:
    """The size of every quantity and symbol."""
    seq = _fixed(signature, {Role.IDS, Role.POSITIONS}, -1) or guess.seq
    past, total = guess.past, _fixed(signature, {Role.MASK}, -1)
    cached = _fixed(signature, {Role.CACHE}, -2)
    if past and total is not None and total > seq:
        past = total - seq
    covered = past + seq
    if past and cached is not None:
        past = cached if guess.full_cache else max(0, min(past, cached - seq))
        covered = past + seq if guess.full_cache else cached
    sizes = FIXED | {"@batch": guess.batch, "@seq": seq, "@past": past, "@total": covered, "@image": guess.image}
    sizes["@buffer"] = past + seq + 10
    columns = _columns(signature)
    free = cycle(FREE_SIZES)
    scales_only = _symbols(signature, scales=True) - _symbols(signature, scales=False)
    for i in signature.inputs:
        for size in i.dims:
            for symbol in dims.symbols(size) if isinstance(size, str) else ():
                if symbol in sizes:
                    continue
                meant = signature.aliases.get(symbol, symbol)
                quantity = dims.meaning(symbol) if meant == symbol and symbol != size else None
                if isinstance(meant, int):
                    sizes[symbol] = meant
                elif meant in sizes:
                    sizes[symbol] = sizes[meant]
                elif quantity is not None:
                    sizes[symbol] = sizes[f"@{quantity}"]
                elif symbol in scales_only:
                    continue
                else:
                    sizes[symbol] = guess.free or next(free)
    width = columns if isinstance(columns, int) else sizes.get(columns or "", 1)
    sizes |= dict.fromkeys(
        scales_only - sizes.keys(), (guess.free if guess.free > 1 else width) if guess.per_column else 1
    )
    return sizes


def _shape(i: Input, guess: Guess, sizes: dict[str, int]) -> tuple[int, ...]:
    shape = list(i.dims)
    if (
        i.role is Role.MASK
        and guess.mask_total
        and len(shape) >= 2
        and isinstance(shape[-1], str)
        and shape[-1] != "@encoder"
    ):
        shape[-1] = "@total"
    if i.role is Role.CACHE and not guess.full_cache:
        shape = ["@buffer" if size == "@past" else size for size in shape]
    if i.head_sizes:
        shape[-1] = i.head_sizes[min(guess.head, len(i.head_sizes) - 1)]
    return tuple(size if isinstance(size, int) else dims.evaluate(size, sizes) for size in shape)


def _fixed(signature: Signature, roles: set[Role], axis: int) -> int | None:
    """The size of an axis of the inputs of some roles where the model fixes it."""
    found = {i.dims[axis] for i in signature.inputs if i.role in roles and len(i.dims) >= max(2, -axis)}
    sizes = [size for size in found if isinstance(size, int)]
    return sizes[0] if len(found) == len(sizes) == 1 else None


def _columns(signature: Signature) -> int | str | None:
    """The last axis of the last matrix of integers: what a vector of scales has an entry for."""
    matrices = (i for i in signature.inputs if i.role is Role.VALUES and i.dtype.kind in "iu" and len(i.dims) >= 2)
    return next((i.dims[-1] for i in reversed(list(matrices))), None)


def _symbols(signature: Signature, *, scales: bool) -> set[str]:
    return {
        size
        for i in signature.inputs
        if (i.role in (Role.SCALE, Role.ZERO_POINT)) is scales
        for size in i.dims
        if isinstance(size, str) and not size.startswith("@")
    }


def is_finite(outputs: object) -> bool:
    """Whether no number in the outputs (arrays, or lists of arrays) is infinite or not a number."""
    if isinstance(outputs, np.ndarray):
        if outputs.dtype.kind == "V":  # bfloat16 and the like
            outputs = outputs.astype(np.float32)
        return outputs.dtype.kind not in "fc" or bool(np.isfinite(outputs).all())
    return not isinstance(outputs, list | tuple) or all(map(is_finite, outputs))
