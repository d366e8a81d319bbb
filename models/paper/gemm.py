"""INT8 products: Tables 9 to 11 of the paper, distributions, terms, bounds and the scale's granularity.

Codes are exact in float64, and products are summed in it: what shows is the rounding of the operands alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from draws import DRAWS, LOUD_CHANNELS, Draw, Errors, generator, relative_l2, rounded, truncated
from msd_compiler.runtime_ops.matmul.layout import LONGEST_GROUP, Plan
from msd_compiler.runtime_ops.matmul.reference import LIMITS, decompose
from rows import PRINTED, Grid, Part, Row, Table

SIZES = (512, 1024, 2048, 4096)
GROUP = 128
"""Values that share a scale where it is not the row: what msd-compiler takes for weights with a scale per channel."""

WAYS = {"dequantized": "dequantized", "one": "K = 1", "msd": "MSD, K = 2"}

TRUNCATION = (
    "Clearing bits moves input and weight towards 0, 0.28 % each and always the same way; rounded to nearest, and with a bf16 input "
    "that all three are given, the weight's own rounding is what stays."
)
ONE_TERM = (
    "The paper's formulas, with a normal row's M of 3.9 deviations, give this error and these shares. Its L2 error is what a scale per 128 values "
    "gives (last rows), its second and third share are of neither."
)
SAME_ERROR = "Nothing but the decomposition's own error, and that is the same for inputs that are bf16."
MSD_SHARES = (
    "Shares follow from the L2 error, and that of a normal row is at the upper end of what prints as 0.003; with a scale per 128 "
    "values (last rows) they come near."
)
SIZE = (
    "Errors are averages over rows: nothing hangs on the size but MSD's M, the maximum of a longer row. The paper's errors fall with the size, "
    "dequantized and MSD by about the same factor, which none of its formulas says."
)


@dataclass(frozen=True)
class Layer:
    """Operands: ``x`` ``[M, K]`` float32, ``codes`` ``[K, N]`` float64 within ±127, ``scales`` ``[N]`` float64."""

    x: np.ndarray
    codes: np.ndarray
    scales: np.ndarray

    @classmethod
    def random(cls, rng: np.random.Generator, shape: tuple[int, int, int], draw: Draw) -> Layer:
        """As the paper draws them: any codes alike, scales from 0.01 to 1."""
        m, k, n = shape
        codes = rng.integers(-127, 128, (k, n)).astype(np.float64)
        scales = rng.uniform(0.01, 1, n).astype(np.float32)
        return cls(draw(rng, (m, k)).astype(np.float32), codes, scales.astype(np.float64))

    def exact(self) -> np.ndarray:
        """The product in float64."""
        return self.times(self.x)

    def dequantized(self, to_bf16: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """The product of bf16 values, made by `truncated` or `rounded`."""
        return to_bf16(self.x).astype(np.float64) @ to_bf16(self.codes * self.scales).astype(np.float64)

    def decomposed(self, terms: int, group: int | None = None) -> np.ndarray:
        """The product of an activation of ``terms`` INT8 terms; a scale per row, or per group."""
        k = self.x.shape[1]
        plan = Plan(k, 8, group or LONGEST_GROUP, terms, per_row=group is None)
        return self.times(decompose(self.x, plan).values(k))

    def times(self, x: np.ndarray) -> np.ndarray:
        """``x`` times the weight."""
        product: np.ndarray = x.astype(np.float64) @ self.codes
        product *= self.scales
        return product


def both(layer: Layer, ways: dict[str, tuple[int, int | None] | None]) -> dict[str, tuple[Errors, Errors]]:
    """Errors in the same and the honest set-up, by way: terms and group, or None for dequantizing."""
    found = []
    for to_bf16, at in ((truncated, layer), (rounded, Layer(rounded(layer.x), layer.codes, layer.scales))):
        exact = at.exact()
        found.append(
            {
                name: Errors.of(at.dequantized(to_bf16) if way is None else at.decomposed(*way), exact)
                for name, way in ways.items()
            }
        )
    return {name: (found[0][name], found[1][name]) for name in ways}


def tables(seed: int, fast: bool) -> Iterator[Part]:
    """All of them; fast: without the sizes that take long."""
    if not fast:
        yield from products(seed)
    yield sizes(seed, fast)
    yield distributions(seed, fast)
    if not fast:
        yield bounds(seed)
        yield granularity(seed)


def products(seed: int) -> Iterator[Part]:
    """Tables 9 and 10."""
    layer = Layer.random(generator(seed, "products"), (4096, 4096, 4096), DRAWS["normal, deviation 1"])
    found = both(
        layer,
        {"dequantized": None, "one": (1, None), "msd": (2, None), "one by group": (1, GROUP), "msd by group": (2, GROUP)},
    )  # fmt: skip
    by_group = {"one by group": "K = 1, a scale per 128", "msd by group": "MSD, a scale per 128"}
    notes = {"dequantized": TRUNCATION, "one": ONE_TERM, "msd": SAME_ERROR}
    yield Table(
        "Table 9: L2 error of a product",
        "4096 x 4096 x 4096, normal activations, int8 weights, in percent.",
        [
            Row(label, PRINTED["9"].get(way), found[way][0].l2, found[way][1].l2, notes.get(way, SAME_ERROR))
            for way, label in (WAYS | by_group).items()
        ],
    )
    notes["msd"] = MSD_SHARES
    yield Table(
        "Table 10: outputs by relative error",
        "The same products: outputs that are further off than 0.1, 1 and 5 % of themselves, in percent of all.",
        [
            Row(
                f"{label}: off by more than {limit}",
                PRINTED["10"][way][i] if way in PRINTED["10"] else None,
                found[way][0].over[i],
                found[way][1].over[i],
                notes.get(way, SAME_ERROR),
            )
            for way, label in (WAYS | by_group).items()
            for i, limit in enumerate(("0.1 %", "1 %", "5 %"))
        ],
    )


def sizes(seed: int, fast: bool) -> Part:
    """Table 11."""
    rows = []
    for size in SIZES[:2] if fast else SIZES:
        layer = Layer.random(generator(seed, "size", size), (size, size, size), DRAWS["normal, deviation 1"])
        for way, (same, honest) in both(layer, {"dequantized": None, "msd": (2, None)}).items():
            printed = PRINTED["11"][str(size)][way]
            rows.append(Row(f"{size}: {WAYS[way]}", printed, same.l2, honest.l2, SIZE))
    return Table("Table 11: L2 error by size", "Square products as in Table 9, in percent.", rows)


def distributions(seed: int, fast: bool) -> Part:
    """Every distribution, every number of terms."""
    ways = {
        "dequantized": None,
        "K = 1": (1, None),
        "K = 2": (2, None),
        "K = 2, per 128": (2, GROUP),
        "K = 3": (3, None),
    }
    rows = []
    for name, draw in list(DRAWS.items())[: 3 if fast else None]:
        found = both(Layer.random(generator(seed, "distribution", name), (256, 4096, 256), draw), ways)
        rows.append((name, [found["dequantized"][0].l2, *(honest.l2 for _, honest in found.values())]))
    return Grid(
        "Activations of other shapes, one to three terms",
        "L2 error of a product, 256 x 4096 x 256, in percent. The first column is the paper's set-up, the others are the honest one, which for decomposed "
        "activations gives the same. A scale is the row's unless it says per 128.",
        ["dequantized, truncated", *ways],
        rows,
    )


def bounds(seed: int) -> Part:
    """How near the largest error comes to the bounds of the paper's section 3."""
    rows = []
    for name, draw in DRAWS.items():
        x = draw(generator(seed, "bound", name), (2000, 4096)).astype(np.float32)
        peak = np.abs(x).max(axis=1, keepdims=True).astype(np.float64)
        ratios = []
        for terms in (1, 2, 3):
            parts = decompose(x, Plan(4096, 8, LONGEST_GROUP, terms, per_row=True))
            error = np.abs(x - parts.values(4096)) / (peak / (2 * LIMITS[terms]))
            ratios.append(float(error.max()))
        rows.append((name, ratios))
    return Grid(
        "The bounds of INT8",
        "Largest error of an element over its bound, M/254, M/64516 and M/16387064, of 8 million elements each. K = 2 works in float32, which adds up to 4 M / 2^24 (1.5 % of the "
        "bound); K = 3 in float64.",
        ["K = 1", "K = 2", "K = 3"],
        rows,
        digits=5,
    )


def granularity(seed: int) -> Part:
    """What a scale per group saves beside a loud channel."""
    groups = {"per 32": 32, "per 128": 128, "per 512": 512, "per row": None}
    rows = []
    for name, draw in LOUD_CHANNELS.items():
        layer = Layer.random(generator(seed, "granularity", name), (512, 4096, 512), draw)
        exact = layer.exact()
        rows.append((name, [100 * relative_l2(layer.decomposed(2, group), exact) for group in groups.values()]))
    return Grid(
        "Scales per group, beside a loud channel",
        "L2 error of a product with K = 2, 512 x 4096 x 512, in percent. The paper has one scale per row; in groups a loud channel coarsens only its own.",
        list(groups),
        rows,
    )
