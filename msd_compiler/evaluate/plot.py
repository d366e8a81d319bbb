"""An evaluation as a picture."""

from __future__ import annotations

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
    edges = 10 ** np.linspace(*DECADES, (DECADES[1] - DECADES[0]) * BINS_PER_DECADE + 1)
    for number, run in enumerate(found.runs):
        style = {"color": f"C{number}", "label": run.name}
        left.stairs(run.kl_histogram, edges, fill=True, alpha=0.35, **style)
        margins = np.sort([flip.margin for flip in run.flips])[::-1]
        if len(margins):
            right.plot(margins, np.arange(1, len(margins) + 1), marker=".", drawstyle="steps-post", **style)
    left.set(xscale="log", xlabel="KL divergence from the oracle, nats", ylabel="tokens", title="every token")
    filled = np.flatnonzero(np.sum([run.kl_histogram for run in found.runs], axis=0))
    if len(filled):
        left.set_xlim(edges[filled[0]], edges[filled[-1] + 1])
    right.set(xlabel="margin in the oracle's logits", ylabel="flips with at least this margin", title="flips")
    right.set(xscale="log", yscale="log")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return figure
