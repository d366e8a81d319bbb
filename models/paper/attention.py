"""Attention over an int8 cache: Table 12 of the paper, lengths, and what rounding the probabilities costs by tile.

The paper does not say how large its logits are, and every error of attention hangs on that. `DEVIATION` was found by trying: with it
the nine figures of Table 12 come out together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from draws import Errors, generator, relative_l2, rounded, truncated
from msd_compiler.runtime_ops.attention import layout, reference
from msd_compiler.runtime_ops.matmul.layout import Plan
from msd_compiler.runtime_ops.matmul.reference import LIMITS, decompose
from rows import PRINTED, Grid, Part, Row, Table

from msd_compiler.cost.paper import TILE as PAPER_TILE

COLUMNS = 64
QUERIES = 1024
DEVIATION = 1.06
"""Of the logits."""
LENGTHS = (64, 256, 1024, 4096, 16384)
TILES = (64, 256, 1024)

WAYS = {"dequantized": "dequantized", "tiled": "dequantized, in tiles", "msd": "MSD"}
FIGURES = ("L2 error", "off by more than 1 %", "off by more than 5 %")

TRUNCATION = (
    "Query, keys, values and probabilities all move towards 0 when their low bits are cleared; rounded to nearest, on a query that is bf16 for all, "
    "the errors average out."
)
QUERY = (
    "The printed figures are the truncation of the query; compared with a reference that is given the same query, MSD's own error is left (msd.Attention, "
    "float32)."
)
OWN = "Two terms of query and probabilities, and nothing else: the paper's running maximum, against the tile's own in msd.Attention."


@dataclass(frozen=True)
class Head:
    """``query`` ``[N, D]`` float32; ``keys``, ``values`` ``[T, D]`` int8 codes, their scales ``[D]`` float32."""

    query: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    key_scale: np.ndarray
    value_scale: np.ndarray

    @classmethod
    def random(cls, rng: np.random.Generator, tokens: int) -> Head:
        """Normal queries, keys and values; the cache is rounded to int8, one scale per column."""
        query = (DEVIATION * rng.standard_normal((QUERIES, COLUMNS))).astype(np.float32)
        (keys, key_scale), (values, value_scale) = (_int8(rng.standard_normal((tokens, COLUMNS))) for _ in range(2))
        return cls(query, keys, values, key_scale, value_scale)

    def rounded(self) -> Head:
        """The same with a bf16 query."""
        return Head(rounded(self.query), self.keys, self.values, self.key_scale, self.value_scale)

    def exact(self) -> np.ndarray:
        """The meaning: ``softmax(Q K^T / sqrt(D)) V`` of the cache's values, float64."""
        return attend(_logits(self.query, self.keys * self.key_scale), self.values * self.value_scale)

    def dequantized(self, to_bf16: Callable[[np.ndarray], np.ndarray], tile: int | None = None) -> np.ndarray:
        """With query, keys, values and probabilities in bf16, made by `truncated` or `rounded`."""
        logits = _logits(to_bf16(self.query), to_bf16(self.keys * self.key_scale))
        return attend(logits, to_bf16(self.values * self.value_scale).astype(np.float64), to_bf16, tile)

    def decomposed(self, tile: int = PAPER_TILE) -> np.ndarray:
        """As the paper has it: two terms of the query per row, two of the probabilities under the running maximum."""
        plan = Plan(COLUMNS, 8, COLUMNS, 2, per_row=True)
        logits = _logits(decompose(self.query * self.key_scale, plan).values(COLUMNS), self.keys)
        return attend(logits, self.values.astype(np.float64), two_terms, tile) * self.value_scale

    def op(self) -> np.ndarray:
        """``msd.Attention``, float32."""
        cache = {"past_key": self.keys[None, None], "past_value": self.values[None, None]}
        new = np.zeros((1, 1, 0, COLUMNS), np.float32)
        attended = reference.attention(
            query=self.query[None, None],
            key=new,
            value=new,
            **cache,
            key_scale=self.key_scale[None, None, None],
            value_scale=self.value_scale[None, None, None],
            mask=np.zeros((1, 1, 1, 1), np.float32),
            sinks=np.array([-np.inf], np.float32),
            lengths=np.array([len(self.keys)]),
            plan=layout.Plan(8, dynamic=False, cache=layout.APPEND, causal=False, window=0).tensor(),
            factors=np.array([COLUMNS**-0.5, 0], np.float32),
        )
        return attended.y[0, 0]


def _int8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = (np.abs(x).max(axis=0) / 127).astype(np.float32)
    return np.clip(np.rint(x / scale), -127, 127).astype(np.int8), scale


def _logits(query: np.ndarray, keys: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = query.astype(np.float64) @ keys.astype(np.float64).T
    scaled *= COLUMNS**-0.5
    return scaled


def two_terms(p: np.ndarray) -> np.ndarray:
    """Probabilities from 0 to 1 in two INT8 terms of the fixed scales 1/127 and 1/(127 * 254)."""
    return np.rint(p * LIMITS[2]) / LIMITS[2]


def attend(
    logits: np.ndarray,
    values: np.ndarray,
    rounding: Callable[[np.ndarray], np.ndarray] | None = None,
    tile: int | None = None,
    *,
    own_maximum: bool = False,
) -> np.ndarray:
    """``softmax(logits) @ values`` tile by tile in float64, the probabilities rounded.

    Args:
        logits: ``[N, T]`` float64.
        values: ``[T, D]`` float64.
        tile: tokens at a time; all at once if None.
        own_maximum: probabilities are relative to the tile's own maximum, not to the largest so far.
    """
    tile = tile or logits.shape[1]
    top = np.full((len(logits), 1), -np.inf)
    total, out = np.zeros((len(logits), 1)), np.zeros((len(logits), values.shape[1]))
    for start in range(0, logits.shape[1], tile):
        part = logits[:, start : start + tile]
        own = part.max(axis=1, keepdims=True)
        larger = np.maximum(top, own)
        base = own if own_maximum else larger
        p = np.exp(part - base)
        product = (p if rounding is None else rounding(p)).astype(np.float64) @ values[start : start + tile]
        before, now = np.exp(top - larger), np.exp(base - larger)
        out = out * before + product * now
        total = total * before + p.sum(axis=1, keepdims=True) * now
        top = larger
    return out / total


def tables(seed: int, fast: bool) -> Iterator[Part]:
    """All of them; fast: without the longest caches."""
    if not fast:
        yield table_12(seed)
    yield lengths(seed, fast)
    if not fast:
        yield tiles(seed)


def table_12(seed: int) -> Part:
    """Dequantized, in tiles and not, and decomposed."""
    head = Head.random(generator(seed, "attention"), 16384)
    given = head.rounded()
    exact, exact_of_given = head.exact(), given.exact()
    query_truncated = Head(truncated(head.query), head.keys, head.values, head.key_scale, head.value_scale)
    same = {
        "dequantized": head.dequantized(truncated),
        "tiled": head.dequantized(truncated, PAPER_TILE),
        "msd": query_truncated.decomposed(),
        "own": head.decomposed(),
    }
    honest = {
        "dequantized": given.dequantized(rounded),
        "tiled": given.dequantized(rounded, PAPER_TILE),
        "msd": given.op(),
        "own": given.op(),
    }
    labels = WAYS | {"own": "MSD, query not truncated"}
    notes = {"msd": QUERY, "own": OWN}
    rows = []
    for way, label in labels.items():
        found = [figures(y[way], e) for y, e in ((same, exact), (honest, exact_of_given))]
        printed = PRINTED["12"].get(way, [None] * 3)
        rows += [
            Row(f"{label}: {name}", printed[i], found[0][i], found[1][i], notes.get(way, TRUNCATION))
            for i, name in enumerate(FIGURES)
        ]
    about = (
        f"16384 tokens, {COLUMNS} columns, {QUERIES} normal queries, int8 cache with a scale per column, in percent. The paper does not say "
        f"how large its logits are; a deviation of {DEVIATION} was found by trying, and is the one number that was fitted."
    )
    return Table("Table 12: attention", about, rows)


def figures(y: np.ndarray, exact: np.ndarray) -> tuple[float, ...]:
    """As `FIGURES` names them, in percent."""
    found = Errors.of(y, exact)
    return found.l2, *found.over[1:]


def lengths(seed: int, fast: bool) -> Part:
    """From 64 tokens to 16384."""
    rows = []
    for tokens in LENGTHS[:3] if fast else LENGTHS:
        head = Head.random(generator(seed, "length", tokens), tokens)
        given = head.rounded()
        exact, exact_of_given = head.exact(), given.exact()
        same = head.dequantized(truncated, PAPER_TILE), head.decomposed()
        honest = given.dequantized(rounded, PAPER_TILE), given.op()
        found = [relative_l2(y, exact) for y in same] + [relative_l2(y, exact_of_given) for y in honest]
        rows.append((f"{tokens} tokens", [100 * f for f in found]))
    return Grid(
        "Attention by length",
        f"L2 error in percent, {COLUMNS} columns; the cache in the paper's tiles of {PAPER_TILE}, in msd.Attention's of {layout.TILE}. "
        "MSD's query is not truncated in either.",
        ["dequantized, truncated", "MSD, running maximum", "dequantized, rounded", "msd.Attention"],
        rows,
    )


def tiles(seed: int) -> Part:
    """The probabilities alone, by how sharp they are, by tile and by what they are relative to."""
    rows = []
    for deviation in (0.3, 1.3, 2.6):
        rng = generator(seed, "tiles", deviation)
        logits = rng.normal(0, deviation, (QUERIES, 16384))
        values = rng.standard_normal((16384, COLUMNS))
        exact = attend(logits, values)
        found = [
            relative_l2(attend(logits, values, two_terms, tile, own_maximum=own), exact)
            for own in (False, True)
            for tile in TILES
        ]
        rows.append((f"logits of deviation {deviation}", [100 * f for f in found]))
    kinds = ("running maximum", "own maximum")
    return Grid(
        "Probabilities in two terms, by tile",
        f"L2 error in percent, 16384 tokens; query, keys and values exact. The paper's probabilities are relative to the running maximum, those of msd.Attention "
        f"to the own of their tile of {layout.TILE}: as much work, and a row's sharpest token no longer sets the step for all that follow.",
        [f"{kind}, {tile}" for kind in kinds for tile in TILES],
        rows,
    )
