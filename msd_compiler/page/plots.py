"""The page's plots, drawn by matplotlib as SVG whose colours are the page's own, so that they follow light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..report import CandidateRow, PricingRow, Report, SiteRow

_INKS = {
    "#010101": "var(--ink)",
    "#020202": "var(--quiet)",
    "#030303": "var(--line)",
    "#040404": "var(--before)",
    "#050505": "var(--after)",
    "#060606": "var(--mark)",
    "#666666": "var(--quiet)",  # the roof, which other pictures have in grey
}
"""Colours to draw with, and what the page's style sheet is to make of them."""
_INK, _QUIET, _LINE, _BEFORE, _AFTER, _MARK, _ = _INKS

_STYLE = {
    "svg.fonttype": "none",  # text stays text: the page's font, found by a search, read aloud
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.5,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _QUIET,
    "ytick.labelcolor": _QUIET,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "text.color": _INK,
    "font.size": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.labelcolor": _INK,
    "lines.markersize": 4,
}


@dataclass(frozen=True)
class Plot:
    """A picture, what it is called, and what it says."""

    name: str
    title: str
    text: str
    svg: str


@dataclass(frozen=True)
class _Series:
    """Points over the sites' numbers."""

    label: str
    points: dict[int, float]
    style: dict[str, Any]


def plots(report: Report) -> list[Plot]:
    """Those that the report has figures for."""
    pricing = report.pricing
    sites = [(number, site) for number, site in enumerate(report.sites, 1) if site.candidates]
    if pricing is None or not pricing.before.seconds or not sites:
        return []
    shares = [phase.share for phase in pricing.phases]

    def moved(candidate: CandidateRow) -> float | None:
        pairs = zip(shares, candidate.phases, strict=False)
        return sum(share * p.bytes for share, p in pairs) if candidate.phases else None

    alone = {} if report.verification is None else {s.node: s.relative_l2 for s in report.verification.sites}
    measured = {number: alone[site.node] for number, site in sites if alone.get(site.node)}
    crosses = [_Series("measured alone", measured, {"color": _MARK, "marker": "x", "markersize": 3.5})]
    return [
        Plot(
            "time",
            "Predicted time per site",
            "Of a run, mean over the workload. Sites are numbered as in the table.",
            _over_sites(_before_after(sites, lambda c: c.seconds), "seconds"),
        ),
        Plot(
            "error",
            "Error per site",
            "Relative L2 of a site’s own output, predicted; the dashed line is the budget.",
            _over_sites(
                [*_before_after(sites, lambda c: c.error), *(crosses if measured else [])],
                "relative L2",
                pricing.budget,
            ),
        ),
        Plot(
            "bytes",
            "Bytes per site",
            "Read and written in a run, mean over the workload.",
            _over_sites(_before_after(sites, moved), "bytes"),
        ),
        Plot(
            "roofline",
            "Roofline",
            f"What sites reach, as predicted, under the roof of {pricing.target}. A circle is a site as it stands, a "
            "triangle as chosen.",
            _roofline(report, pricing),
        ),
    ]


def _before_after(sites: Sequence[tuple[int, SiteRow]], value: Callable[[CandidateRow], float | None]) -> list[_Series]:
    before, after = dict[int, float](), dict[int, float]()
    for number, site in sites:
        for found, candidate in ((before, site.candidates[0]), (after, chosen(site))):
            at = None if candidate is None else value(candidate)
            if at:
                found[number] = at
    hollow = {"color": _BEFORE, "marker": "o", "markerfacecolor": "none"}
    return [
        _Series("as it stands", before, hollow),
        _Series("as chosen", after, {"color": _AFTER, "marker": "^", "markeredgewidth": 0}),
    ]


def chosen(site: SiteRow) -> CandidateRow | None:
    """The candidate that was taken."""
    return next((candidate for candidate in site.candidates if candidate.name == site.choice), None)


def _over_sites(series: Sequence[_Series], unit: str, budget: float | None = None) -> str:
    """A mark per site and series, the first two of a site joined by a line."""

    def draw(axis: Any) -> None:
        from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

        before, after = series[0].points, series[1].points
        both = [number for number in before if number in after]
        xs = [x for number in both for x in (number, number, None)]
        ys = [y for number in both for y in (before[number], after[number], None)]
        size = 1.0 if len(before) <= 60 else 0.6
        axis.plot(xs, ys, color=_LINE, linewidth=1.5 * size**2)
        for one in series:
            style = {"markersize": 4.5} | one.style
            style["markersize"] *= size
            axis.plot(list(one.points), list(one.points.values()), linestyle="none", label=one.label, **style)
        if budget is not None:
            axis.axhline(budget, color=_QUIET, linewidth=1, linestyle="--", label="budget")
        axis.set(yscale="log", xlabel="site", ylabel=unit)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.yaxis.set_minor_formatter(NullFormatter())
        if budget is None:
            values = [y for one in series for y in one.points.values()]
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 100 * min(values) else (1,)))
            axis.yaxis.set_major_formatter(EngFormatter(unit="s" if unit == "seconds" else "B", sep="\N{THIN SPACE}"))
            axis.set_ylabel("")
        axis.grid(visible=False, axis="x")

    return _svg(unit, draw)


def _roofline(report: Report, pricing: PricingRow) -> str:
    from ..roofline import draw_on

    def draw(axis: Any) -> None:
        draw_on(axis, report, pricing)
        axis.set_ylabel("10⁹ operations per second")

    return _svg("roofline", draw)


def _svg(salt: str, draw: Callable[[Any], None]) -> str:
    """What ``draw`` puts on one axis; the same bytes for the same figures."""
    from cycler import cycler
    from matplotlib import style
    from matplotlib.figure import Figure

    cycle = cycler(color=[_AFTER, _BEFORE, _MARK, _INK])
    text = io.StringIO()
    with style.context(["default", _STYLE | {"svg.hashsalt": salt, "axes.prop_cycle": cycle}]):
        figure = Figure(figsize=(4.9, 3.3), layout="constrained")
        axis = figure.subplots()
        draw(axis)
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=3, handletextpad=0.3, columnspacing=1.2)
        figure.savefig(text, format="svg", metadata={"Date": None})
    return _inline(text.getvalue())


def _inline(document: str) -> str:
    """An SVG document as a part of the page: no prolog, no ids that others have too, the page's colours and font."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    for ink, color in _INKS.items():
        svg = svg.replace(ink, color)
    return svg.replace("<svg ", '<svg aria-hidden="true" ', 1)
