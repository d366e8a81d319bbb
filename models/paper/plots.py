"""The pictures beside the tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cost
import matplotlib
from matplotlib.figure import Figure
from rows import Grid, Part

from msd_compiler.cost import paper

REPRODUCIBLE = {"svg.hashsalt": "paper", "svg.fonttype": "none"}


def draw(parts: Iterable[Part], folder: Path) -> None:
    """Write the picture of every table that has one, as SVG; the same figures give the same bytes."""
    with matplotlib.rc_context(REPRODUCIBLE):
        for part in parts:
            if part.title in PICTURES:
                name, function = PICTURES[part.title]
                figure = Figure(figsize=(8, 4), layout="constrained")
                function(figure.subplots(), part)
                figure.savefig(folder / name, metadata={"Date": None})


def _terms(axis: Any, grid: Grid) -> None:
    width = 0.8 / len(grid.columns)
    for place, column in enumerate(grid.columns):
        x = [i + (place - (len(grid.columns) - 1) / 2) * width for i in range(len(grid.rows))]
        axis.bar(x, [figures[place] for _, figures in grid.rows], width, label=column)
    axis.set(yscale="log", ylabel="L2 error of a product, %")
    _distributions(axis, grid)


def _bits(axis: Any, grid: Grid) -> None:
    styles = {0: "C0s", 1: "C0+", 4: "C1s", 5: "C1+", 8: "C2o"}
    for column, style in styles.items():
        axis.plot([figures[column] for _, figures in grid.rows], style, label=grid.columns[column])
    axis.set(ylabel="effective bits")
    axis.grid(alpha=0.3)
    _distributions(axis, grid)


def _distributions(axis: Any, grid: Grid) -> None:
    axis.set_xticks(range(len(grid.rows)), [name for name, _ in grid.rows], rotation=25, ha="right", fontsize=8)
    axis.figure.legend(fontsize=8, ncols=3, loc="outside upper center")


def _lengths(axis: Any, grid: Grid) -> None:
    tokens = [int(name.split()[0]) for name, _ in grid.rows]
    for column, name in enumerate(grid.columns):
        axis.plot(tokens, [figures[column] for _, figures in grid.rows], marker="o", label=name)
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="L2 error, %")
    axis.set_xticks(tokens, tokens)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _work(axis: Any, _part: Part) -> None:
    rows = range(1, 65)
    for color, head_size in enumerate((128, 576)):
        ratios = [
            paper.dequantized_attention_flops(r, cost.KEYS, head_size)
            / paper.msd_attention_flops(r, cost.KEYS, head_size)
            for r in rows
        ]
        axis.plot(rows, ratios, color=f"C{color}", label=f"{head_size} columns")
        even, printed = (f(cost.KEYS, head_size) for f in (paper.break_even_rows, paper.printed_break_even_rows))
        axis.plot([even], [1], f"C{color}o", label=f"equal at {even:.0f} rows")
        axis.plot([printed], [1], f"C{color}x", markersize=9, label=f"as printed: {printed:.0f} rows")
    axis.axhline(1, color="0.6", linewidth=0.8, zorder=0)
    axis.set(xscale="log", yscale="log", xlabel="query rows", ylabel="work, dequantizing over decomposing")
    axis.minorticks_off()
    for ticks, set_ticks in (((1, 2, 4, 8, 16, 32, 64), axis.set_xticks), ((1, 2, 5, 10, 20), axis.set_yticks)):
        set_ticks(ticks, ticks)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


PICTURES: dict[str, tuple[str, Callable[[Any, Any], None]]] = {
    "Activations of other shapes, one to three terms": ("terms.svg", _terms),
    "Both grids, and a scale chosen by error": ("bits.svg", _bits),
    "Attention by length": ("lengths.svg", _lengths),
    "Section 4.4: the cost of attention": ("work.svg", _work),
}
"""File and drawing by the title of the table beside which it stands."""
