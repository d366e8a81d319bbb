"""The paper's cost model, from the closed forms that msd-compiler's own accelerator targets use."""

from __future__ import annotations

from collections.abc import Iterator

from rows import PRINTED, Grid, Part, Row, Table

from msd_compiler.cost import paper

KEYS = 8192
SIZE = 4096
ROWS = (1, 8, 64, 512)

SUMS = "The printed ratios follow from the paper's own two sums; there is no second set-up of a formula."
SHORT = (
    "The short formula compares all of MSD's vector work with the dequantization alone; honest are both of the paper's sums in full, from which "
    "its table of ratios is made."
)
TRAFFIC = (
    "One tensor's way (read, written as bf16, read again) stands against keys and values together; like for like it is 5 times, 3 as the paper counts layers, "
    "and, honest, once for a kernel that dequantizes in registers."
)


def tables(_seed: int, _fast: bool) -> Iterator[Part]:
    """All of them: they are formulas."""
    yield attention()
    yield layers()


def attention() -> Part:
    """Section 4.4."""
    printed = PRINTED["cost"]
    rows = []
    for head_size in (128, 576):
        for queries, ratio in printed[str(head_size)].items():
            dequantized = paper.dequantized_attention_flops(int(queries), KEYS, head_size)
            same = dequantized / paper.msd_attention_flops(int(queries), KEYS, head_size)
            rows.append(Row(f"work, {head_size} columns, {queries} query rows", ratio, same, same, SUMS))
    for head_size, even in printed["break_even"].items():
        same, honest = (f(KEYS, int(head_size)) for f in (paper.printed_break_even_rows, paper.break_even_rows))
        rows.append(Row(f"break-even, {head_size} columns, query rows", even, same, honest, SHORT))
    dequantized_bytes, msd_bytes = paper.printed_attention_bytes(KEYS, 128)
    codes = 2.0 * KEYS * 128
    honest = paper.dequantized_values_bytes(codes, codes, trips=0) / msd_bytes
    rows.append(Row("bytes of the cache", printed["bytes"], dequantized_bytes / msd_bytes, honest, TRAFFIC))
    about = f"Dequantizing over decomposing: vector work and bytes, {KEYS} cached tokens, tiles of {paper.TILE}; and where the work is equal."
    return Table("Section 4.4: the cost of attention", about, rows)


def layers() -> Part:
    """Section 3.9."""
    int8, mxfp4 = float(SIZE * SIZE), SIZE * SIZE / 2
    rows = []
    for b in ROWS:
        of_bf16 = paper.bf16_bytes(b, SIZE, SIZE)
        moved = (
            paper.dequantized_bytes(b, SIZE, SIZE, int8),
            paper.dequantized_bytes(b, SIZE, SIZE, int8, trips=0),
            paper.msd_bytes(b, SIZE, SIZE, int8),
            paper.msd_bytes(b, SIZE, SIZE, int8, reads=2),
            paper.msd_bytes(b, SIZE, SIZE, mxfp4),
        )
        work = paper.dequantizing_flops(int8) / paper.msd_flops(b, SIZE, SIZE)
        rows.append((f"batch {b}", [work, *(m / of_bf16 for m in moved)]))
    return Grid(
        "Section 3.9: the cost of a layer",
        f"{SIZE} x {SIZE}. Vector work of dequantizing over that of decomposing; bytes moved, over those of a bf16 layer. The paper counts a dequantized "
        "weight as written once; *in registers* it is not, as in a good kernel on a CPU or a GPU.",
        ["work", "dequantized", "dequantized, in registers", "MSD", "MSD, weight read twice", "MSD, MXFP4"],
        rows,
    )
