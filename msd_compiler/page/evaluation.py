"""What the page says of an evaluation on a text: runs, flips and their margins, and layers whose activations lose most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from ..evaluate.plot import draw_divergences
from ..evaluate.report import DEFAULT, LEVEL_ZERO, Evaluation, Flip, RunRow, SiteNoise
from ..report import Report
from ..screen import number_of
from .figure import AFTER, BEFORE, INK, MARK, Plot, svg
from .plots import FULL, HOLLOW, Series, over_sites

LISTED = 50
"""Flips of a run that the page lists, largest margins first; its data hold all of them."""

_DRAWN = 1000
"""Flips of a run that are drawn."""


@dataclass(frozen=True)
class Flips:
    """Of one run."""

    run: str
    count: int
    largest: list[Flip]
    is_open: bool
    """Whether they are shown from the start: the result's are."""


def result_run(report: Report) -> RunRow | None:
    """The run of the report's own result: the one of its name, or else the first of a result."""
    found = report.evaluation
    if found is None:
        return None
    path = report.result or ""
    named = found.run(path) or found.run(PurePath(path).name)
    return named if named in found.results else next(iter(found.results), None)


def today(found: Evaluation) -> RunRow | None:
    """The source in a default session; None: it did not open."""
    return found.run(DEFAULT)


def run_name(run: RunRow) -> str:
    """As the page calls it."""
    return {DEFAULT: "today’s session", LEVEL_ZERO: "source, accuracy level 0"}.get(run.name, run.name)


def about(found: Evaluation) -> str:
    """``9,869 predictions in 25 documents, windows of 512 tokens``."""
    t = found.tokens
    apart = "" if t.stride == t.window else f", {t.stride} apart"
    documents = number_of(t.documents, "document")
    return f"{t.predictions:,} predictions in {documents}, windows of {t.window} tokens{apart}"


def flip_counts(report: Report) -> str | None:
    """``113 of 9,869 top tokens change in today’s session, none in the result``; None: one of them is missing."""
    ours, found = result_run(report), report.evaluation
    before = None if found is None else today(found)
    if found is None or ours is None or before is None:
        return None
    counts = [f"{len(run.flips):,}" if run.flips else "none" for run in (before, ours)]
    return (
        f"{counts[0]} of {found.tokens.predictions:,} top tokens change in today’s session, {counts[1]} in the result"
    )


def flips(report: Report) -> Iterator[Flips]:
    """Runs with flips, the result first."""
    ours = result_run(report)
    runs = [] if report.evaluation is None else report.evaluation.runs
    for run in sorted(runs, key=lambda run: run is not ours):
        if run.flips:
            yield Flips(run_name(run), len(run.flips), run.flips[:LISTED], run is ours)


def noise_of_sites(report: Report) -> dict[str, SiteNoise]:
    """By node, where layers were looked at."""
    return {} if report.evaluation is None else {row.node: row for row in report.evaluation.sites or ()}


def evaluation_plots(report: Report) -> list[Plot]:
    """KL divergences, flips, and layers, where there are any."""
    found = report.evaluation
    if found is None:
        return []
    made = []
    if any(run.flips for run in found.runs):
        many = [run_name(run) for run in found.runs if len(run.flips) > _DRAWN]
        text = "Every flip by its place in the text and its margin, the logits that the token found is short of."
        if many:
            text += f" Of {' and '.join(many)} the {_DRAWN:,} with the largest margins."
        made.append(Plot("flip-margins", "Flips and their margins", text, _flips_plot(report, found)))
    made.append(
        Plot(
            "divergences",
            "KL divergence of every token",
            "From the oracle’s distribution to the run’s, in nats; the first bin has all that is smaller.",
            svg("divergences", lambda axis: draw_divergences(axis, found, _names(found), _colors(report, found))),
        )
    )
    noise, numbers = noise_of_sites(report), {site.node: number for number, site in enumerate(report.sites, 1)}
    int8 = {numbers[node]: row.int8_ratio for node, row in noise.items() if node in numbers and row.int8_ratio}
    ours = {numbers[node]: row.msd_ratio for node, row in noise.items() if node in numbers and row.msd_ratio}
    if int8:
        series = [
            Series("int8 a block", int8, HOLLOW),
            Series("two INT8 terms", ours, FULL),
        ]
        made.append(
            Plot(
                "noise",
                "Activation error over weight error",
                "Of each layer’s output on this text: what rounding its activations does, over what rounding its weights "
                "did. Above the line activations lose more digits than the weights have: there tokens flip.",
                over_sites("activation error / weight error", series, (1.0, "as much")),
            )
        )
    return made


def _names(found: Evaluation) -> list[str]:
    return [run_name(run) for run in found.runs]


def _colors(report: Report, found: Evaluation) -> list[str]:
    """The result in the colour of what is, today's session in that of what was."""
    ours, others = result_run(report), iter((MARK, INK))
    known = {DEFAULT: BEFORE} | ({} if ours is None else {ours.name: AFTER})
    return [known.get(run.name) or next(others, INK) for run in found.runs]


def _flips_plot(report: Report, found: Evaluation) -> str:
    def draw(axis: Any) -> None:
        for run, name, color in zip(found.runs, _names(found), _colors(report, found), strict=True):
            drawn = [flip for flip in run.flips[:_DRAWN] if flip.margin > 0]  # two equal logits have none
            if drawn:
                marker = "^" if color == AFTER else "o"
                places, margins = np.array([(flip.position, flip.margin) for flip in drawn]).T
                style = {"marker": marker, "markersize": 3.5, "markerfacecolor": color if marker == "^" else "none"}
                axis.plot(places, margins, linestyle="none", color=color, label=f"{name}, {len(run.flips):,}", **style)
        axis.set(yscale="log", xlabel="position in the text, tokens", ylabel="margin, logits")

    return svg("flip-margins", draw)
