"""MXFP4 activations: Tables 1 and 13 to 16 of the paper, the OCP grid, and a scale chosen by error."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from draws import DRAWS, Draw, generator, relative_l2, rounded, truncated
from msd_compiler.runtime_ops.matmul import mx
from msd_compiler.runtime_ops.matmul.layout import ActivationFormat, Plan
from msd_compiler.runtime_ops.matmul.mx import MX_FORMATS, MxFormat, ScaleRule
from rows import PRINTED, Grid, Part, Row, Table

MSD, MXFP8 = MX_FORMATS[ActivationFormat.MXFP4_E1M2_X2], MX_FORMATS[ActivationFormat.MXFP8]
OCP = MX_FORMATS[ActivationFormat.MXFP4_E2M1_X2]
WAYS = {"msd": ("MSD, two MXFP4 passes", MSD), "mxfp8": ("MXFP8", MXFP8)}

VERSIONS = {
    "v1": ("v1: limit 1.75, beta = alpha / 8", MxFormat(mx.Grid(2, 7, 7, 8), 2)),
    "v2": ("v2: limit 1.75, beta = alpha / 16", MxFormat(mx.Grid(2, 7, 7, 16), 2)),
    "v3": ("v3: limit 1.859375, beta = alpha / 16", MSD),
}

SIZES = (256, 512, 1024, 2048, 4096)

INPUT = (
    "The error of rounding the activation alone; a bf16 value above alpha lies on a code or exactly between two, where it is furthest from both, and "
    "that costs up to 0.1 bit."
)
TRUNCATED_INPUT = (
    "The printed figures are those of an activation whose low 16 bits were cleared, compared with one that was not; both formats given the same bf16 "
    "input, MSD's error is its own."
)
UNTRUNCATED_INPUT = "MXFP8 is given the unrounded activation, so its printed figures are its own error."
CLIPPED = "Of remainders that may lie anywhere within two of beta's units an eighth lies beyond 1.75; bf16 inputs often lie on that limit itself."
REACHED = "Reached and never exceeded; bf16 inputs meet the worst case, a tie, exactly."


def decomposed(x: np.ndarray, form: MxFormat, rule: ScaleRule = "paper") -> np.ndarray:
    """What the codes of blocks of 32 stand for, float64."""
    k = x.shape[1]
    return mx.decompose_mx(x, Plan(k, 8, mx.BLOCK, 1, per_row=False), form, rule).values(k)


def bits(x: np.ndarray, form: MxFormat, rule: ScaleRule = "paper") -> float:
    """Effective bits: the relative L2 error as a power of two."""
    return -float(np.log2(relative_l2(decomposed(x, form, rule), x)))


def weights(rng: np.random.Generator, size: int) -> np.ndarray:
    """E1M2 values ``[size, size]``, which both formats multiply exactly."""
    return rng.integers(-7, 8, (size, size)) / 4


def tables(seed: int, fast: bool) -> Iterator[Part]:
    """All of them; fast: without the products and blocks that take long."""
    if not fast:
        yield versions(seed)
    yield effective_bits(seed)
    yield formats(seed, fast)
    if not fast:
        yield products(seed)
    yield sizes(seed, fast)
    if not fast:
        yield bound(seed)


def versions(seed: int) -> Part:
    """Table 1."""
    rng = generator(seed, "versions")
    x, w = DRAWS["normal, deviation 1"](rng, (2048, 2048)).astype(np.float32), weights(rng, 2048)
    inputs = x, rounded(x)
    exact = [v @ w for v in inputs]
    rows = []
    for version, (name, form) in VERSIONS.items():
        printed = PRINTED["1"][version]
        errors = [relative_l2(decomposed(v, form) @ w, e) for v, e in zip(inputs, exact, strict=True)]
        rows += [
            Row(f"{name}: bits", printed["bits"], *(bits(v, form) for v in inputs), INPUT),
            Row(f"{name}: L2 error of the product", printed["l2"], *errors, INPUT),
            Row(
                f"{name}: clipped in the second pass, %",
                printed.get("clipped"),
                *(clipped(v, form) for v in inputs),
                CLIPPED,
            ),
        ]
    about = "2048 x 2048, normal activations. L2 errors as fractions. Here the paper's activation is not truncated."
    return Table("Table 1: how the decomposition was found", about, rows)


def clipped(x: np.ndarray, form: MxFormat) -> float:
    """Remainders beyond the grid's largest value, in percent."""
    blocks = x.reshape(-1, mx.BLOCK)
    unit = mx.unit_exponent(np.abs(blocks).max(axis=1, keepdims=True), form.grid.peak)
    t = np.ldexp(blocks, -unit)
    remainder = (t - mx.round_to_grid(t, form.grid)) * form.grid.radix
    return 100 * float((np.abs(remainder) > form.grid.largest).mean())


def effective_bits(seed: int) -> Part:
    """Table 13."""
    rows = []
    for way, (name, form) in WAYS.items():
        for draw, printed in PRINTED["13"].items():
            x = sample(seed, draw)
            rows.append(Row(f"{name}: {draw}", printed.get(way), bits(x, form), bits(rounded(x), form), INPUT))
    about = "Bits of 2 million values in blocks of 32."
    return Table("Table 13: effective bits", about, rows)


def sample(seed: int, draw: str) -> np.ndarray:
    """2 million values of a distribution."""
    return DRAWS[draw](generator(seed, "bits", draw), (1000, 2048)).astype(np.float32)


def formats(seed: int, fast: bool) -> Part:
    """Every format with both rules for the scale."""
    rules: tuple[ScaleRule, ...] = "paper", "least_error"
    kinds = [form for kind, form in MX_FORMATS.items() if kind is not ActivationFormat.MXFP8]
    rows = []
    for draw in list(DRAWS)[: 2 if fast else None]:
        x = rounded(sample(seed, draw))
        rows.append((draw, [*(bits(x, form, rule) for form in kinds for rule in rules), bits(x, MXFP8)]))
    names = ["E1M2 twice", "E1M2", "E2M1 twice", "E2M1"]
    gains = [[figures[i + 1] - figures[i] for _, figures in rows] for i in range(0, 2 * len(names), 2)]
    gained = ", ".join(f"{name} {min(g):.2f} to {max(g):.2f}" for name, g in zip(names, gains, strict=True))
    return Grid(
        "Both grids, and a scale chosen by error",
        "Effective bits, honest set-up (bf16 inputs). E2M1 is OCP's FP4. Beside the paper's scale, *least error*: half of it where that makes a block's "
        f"squared error smaller, though its largest values may saturate and the bound of alpha / 64 no longer holds. It gains, in bits: {gained}.",
        [*(name + suffix for name in names for suffix in ("", ", least error")), "MXFP8"],
        rows,
    )


def errors_of_products(rng: np.random.Generator, draw: Draw, size: int) -> Iterator[tuple[str, str, float, float, str]]:
    """Way, its name, L2 errors in the same and the honest set-up, and why they differ."""
    x, w = draw(rng, (size, size)).astype(np.float32), weights(rng, size)
    exact, exact_of_rounded = x @ w, rounded(x) @ w
    for way, (name, form) in WAYS.items():
        given = truncated(x) if form is MSD else x
        same = relative_l2(decomposed(given, form) @ w, exact)
        honest = relative_l2(decomposed(rounded(x), form) @ w, exact_of_rounded)
        yield way, name, same, honest, TRUNCATED_INPUT if form is MSD else UNTRUNCATED_INPUT


def products(seed: int) -> Part:
    """Table 14."""
    rows = []
    for draw, printed in PRINTED["14"].items():
        for way, name, *found in errors_of_products(generator(seed, "products", draw), DRAWS[draw], 2048):
            rows.append(Row(f"{draw}: {name}", printed[way], *found))
    return Table("Table 14: L2 error of a product", "2048 x 2048 x 2048, as a fraction.", rows)


def sizes(seed: int, fast: bool) -> Part:
    """Table 15."""
    rows = []
    for size in SIZES[:3] if fast else SIZES:
        draw = DRAWS["normal, deviation 0.5"]
        for way, name, *found in errors_of_products(generator(seed, "size", size), draw, size):
            rows.append(Row(f"{size}: {name}", PRINTED["15"][way], *found))
    return Table("Table 15: L2 error by size", "Square products of normal activations, as a fraction.", rows)


def bound(seed: int) -> Part:
    """Table 16, and the OCP grid."""
    rows = []
    kinds = (("E1M2", MSD, PRINTED["16"]["bound"]), ("E2M1, ours", OCP, None))
    for grid, form, printed in kinds:
        for name in list(DRAWS)[:7]:
            largest = [0.0, 0.0]
            rng = generator(seed, "bound", name)
            for _ in range(8):
                x = DRAWS[name](rng, (25_000, mx.BLOCK)).astype(np.float32)
                for i, given in enumerate((x, rounded(x))):
                    parts = mx.decompose_mx(given, Plan(mx.BLOCK, 8, mx.BLOCK, 1, per_row=False), form)
                    ratio = np.abs(given - parts.values(mx.BLOCK)) / parts.scales
                    largest[i] = max(largest[i], float(ratio.max()))
            rows.append(Row(f"{grid}: {name}", printed, *largest, REACHED))
    about = "Largest error of an element over alpha / 64, of 200 thousand blocks each."
    return Table("Table 16: the bound of MXFP4", about, rows, digits=5)
