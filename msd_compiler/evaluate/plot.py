"""An evaluation as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..picture import check_plot, save_plot
from .report import BINS_PER_DECADE, DECADES, Evaluation


def plot(found: Evaluation, path: Path) -> None:
    """Draw how KL divergences are distributed, and flips by margin.

    Raises:
        OptionError: the file is of another type.
        OutputError: the file cannot be written.
    """
    check_plot(path)
    save_plot(draw(found), path)


def draw(found: Evaluation) -> Any:
    """The evaluation as a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.8, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = [f"C{number}" for number in range(len(found.runs))]
    draw_divergences(left, found, [run.name for run in found.runs], colors)
    left.set(title="every token")
    for run, color in zip(found.runs, colors, strict=True):
        margins = np.sort([flip.margin for flip in run.flips])[::-1]
        if len(margins):
            right.plot(margins, np.arange(1, len(margins) + 1), marker=".", drawstyle="steps-post", color=color)
    right.set(xlabel="margin in the oracle's logits", ylabel="flips with at least this margin", title="flips")
    right.set(xscale="log", yscale="log")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def draw_divergences(axis: Any, found: Evaluation, names: Sequence[str], colors: Sequence[str]) -> None:
    """How the KL divergences of each run are distributed, on an axis of matplotlib's."""
    edges = 10 ** np.linspace(*DECADES, (DECADES[1] - DECADES[0]) * BINS_PER_DECADE + 1)
    for run, name, color in zip(found.runs, names, colors, strict=True):
        axis.stairs(run.kl_histogram, edges, fill=True, alpha=0.35, color=color, label=name)
    axis.set(xscale="log", xlabel="KL divergence from the oracle, nats", ylabel="tokens")
    filled = np.flatnonzero(np.sum([run.kl_histogram for run in found.runs], axis=0))
    if len(filled):
        axis.set_xlim(edges[filled[0]], edges[filled[-1] + 1])
