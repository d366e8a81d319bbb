"""The plots of sites: time, error, bytes, roofline, and what was measured beside what was predicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..report import CandidateRow, Measurement, PricingRow, Report, SiteRow
from .figure import AFTER, BEFORE, LINE, MARK, QUIET, Plot, svg
from .units import clock


@dataclass(frozen=True)
class Series:
    """Points over the sites' numbers."""

    label: str
    points: dict[int, float]
    style: dict[str, Any]


HOLLOW = {"color": BEFORE, "marker": "o", "markerfacecolor": "none"}
FULL = {"color": AFTER, "marker": "^", "markeredgewidth": 0}
"""Marks of what was, and of what is."""

_THIN = "\N{THIN SPACE}"


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
    crosses = [Series("measured alone", measured, {"color": MARK, "marker": "x", "markersize": 3.5})]
    return [
        Plot(
            "time",
            "Predicted time per site",
            "Of a run, mean over the workload. Sites are numbered as in the table.",
            over_sites("seconds", _before_after(sites, lambda c: c.seconds)),
        ),
        *_measured_plots(report, pricing),
        Plot(
            "error",
            "Error per site",
            "Relative L2 of a site’s own output, predicted; the dashed line is the budget.",
            over_sites(
                "relative L2",
                [*_before_after(sites, lambda c: c.error), *(crosses if measured else [])],
                (pricing.budget, "budget"),
            ),
        ),
        Plot(
            "bytes",
            "Bytes per site",
            "Read and written in a run, mean over the workload.",
            over_sites("bytes", _before_after(sites, moved)),
        ),
        Plot(
            "roofline",
            "Roofline",
            f"What sites reach, as predicted, under the roof of {pricing.target}. A circle is a site as it stands, a "
            "triangle as chosen.",
            _roofline(report, pricing),
        ),
    ]


def chosen(site: SiteRow) -> CandidateRow | None:
    """The candidate that was taken."""
    return next((candidate for candidate in site.candidates if candidate.name == site.choice), None)


def measured_seconds(site: SiteRow, report: Report) -> tuple[float | None, float | None]:
    """Before and after, mean over the workload as predictions are; None: not measured in every phase."""
    phases = [] if report.pricing is None else report.pricing.phases
    if not phases or len(site.measured) != len(phases):
        return None, None

    def mean(ms: Sequence[float | None]) -> float | None:
        known = [one for one in ms if one is not None]
        return sum(p.share * one / 1e3 for p, one in zip(phases, known, strict=True)) if len(known) == len(ms) else None

    return mean([row.before_ms for row in site.measured]), mean([row.after_ms for row in site.measured])


def _measured_plots(report: Report, pricing: PricingRow) -> list[Plot]:
    measurement = report.measurement
    if measurement is None:
        return []
    found = []
    times = [(number, measured_seconds(site, report)) for number, site in enumerate(report.sites, 1)]
    before = {number: was for number, (was, _) in times if was}
    after = {number: now for number, (_, now) in times if now}
    if before and after:
        wholes = (f"{one.name} {_ms(one.before_ms)}, then {_ms(one.after_ms)}" for one in measurement.phases)
        text = (
            f"The same, by onnxruntime’s profiler, on {_machine(measurement)}. All nodes together: {'; '.join(wholes)}."
        )
        series = [Series("as it stands", before, HOLLOW), Series("in the result", after, FULL)]
        found.append(Plot("measured", "Measured time per site", text, over_sites("measured", series)))
    pairs = _pairs(report)
    if pairs:
        ratios = [f"{phase} {_ratio(pairs, phase)}" for phase in dict.fromkeys(phase for phase, *_ in pairs)]
        text = (
            f"A mark per site and phase, on the dashed line where both are equal. Predicted for {pricing.target}, measured "
            f"on {_machine(measurement)}. Predicted over measured, median: {', '.join(ratios)}."
        )
        empty = [one.empty_node_ms for one in measurement.phases if one.empty_node_ms is not None]
        if empty:
            text += f" Nodes that compute nothing measure {_ms(min(empty))}: that is the profiler’s own time."
        found.append(Plot("predicted", "Predicted against measured time", text, _against(pairs)))
    return found


def _ms(value: float | None) -> str:
    return clock(None if value is None else value / 1e3)


def _machine(measurement: Measurement) -> str:
    return f"{measurement.cpu}, {measurement.threads} thread{'s' if measurement.threads > 1 else ''}"


_Pair = tuple[str, bool, float, float]
"""Phase, whether in the result, seconds measured and predicted."""


def _pairs(report: Report) -> list[_Pair]:
    """Of sites that were measured and priced; a site that was kept is measured twice, and counts as it stands."""
    numbers = {} if report.pricing is None else {phase.name: i for i, phase in enumerate(report.pricing.phases)}
    found = []
    for site in report.sites:
        kept = site.candidates[0] if site.candidates else None
        for row in site.measured:
            for is_after, ms, candidate in ((False, row.before_ms, kept), (True, row.after_ms, chosen(site))):
                if ms and candidate is not None and candidate.phases and not (is_after and candidate is kept):
                    found.append((row.phase, is_after, ms / 1e3, candidate.phases[numbers[row.phase]].seconds))
    return found


def _ratio(pairs: Sequence[_Pair], phase: str) -> str:
    return f"{median(predicted / measured for name, _, measured, predicted in pairs if name == phase):.2g}"


def _against(pairs: Sequence[_Pair]) -> str:
    def draw(axis: Any) -> None:
        from matplotlib.ticker import EngFormatter, NullFormatter

        for is_after, label, style in ((False, "as it stands", HOLLOW), (True, "as chosen", FULL)):
            points = [(measured, predicted) for _, after, measured, predicted in pairs if after is is_after]
            axis.plot(*zip(*points, strict=True) if points else ([], []), linestyle="none", label=label, **style)
        values = [value for _, _, *both in pairs for value in both]
        ends = (min(values) / 1.5, max(values) * 1.5)
        axis.plot(ends, ends, color=QUIET, linewidth=1, linestyle="--", label="equal")
        axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured", ylabel="predicted")
        for one in (axis.xaxis, axis.yaxis):
            one.set_major_formatter(EngFormatter(unit="s", sep=_THIN))
            one.set_minor_formatter(NullFormatter())

    return svg("predicted", draw)


def _before_after(sites: Sequence[tuple[int, SiteRow]], value: Callable[[CandidateRow], float | None]) -> list[Series]:
    before, after = dict[int, float](), dict[int, float]()
    for number, site in sites:
        for found, candidate in ((before, site.candidates[0]), (after, chosen(site))):
            at = None if candidate is None else value(candidate)
            if at:
                found[number] = at
    return [Series("as it stands", before, HOLLOW), Series("as chosen", after, FULL)]


_UNITS = {"seconds": "s", "measured": "s", "bytes": "B"}


def over_sites(what: str, series: Sequence[Series], line: tuple[float, str] | None = None) -> str:
    """A mark per site and series, the first two of a site joined by a line.

    Args:
        what: of what; "seconds", "measured" and "bytes" have units, others are written at the axis.
        series: two or more.
        line: a dashed one at this height, and what it is.
    """

    def draw(axis: Any) -> None:
        from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

        before, after = series[0].points, series[1].points
        both = [number for number in before if number in after]
        xs = [x for number in both for x in (number, number, None)]
        ys = [y for number in both for y in (before[number], after[number], None)]
        size = 1.0 if len(before) <= 60 else 0.6
        axis.plot(xs, ys, color=LINE, linewidth=1.5 * size**2)
        for one in series:
            style = {"markersize": 4.5} | one.style
            style["markersize"] *= size
            axis.plot(list(one.points), list(one.points.values()), linestyle="none", label=one.label, **style)
        if line is not None:
            axis.axhline(line[0], color=QUIET, linewidth=1, linestyle="--", label=line[1])
        axis.set(yscale="log", xlabel="site", ylabel=what)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.yaxis.set_minor_formatter(NullFormatter())
        if what in _UNITS:
            values = [y for one in series for y in one.points.values()]
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 100 * min(values) else (1,)))
            axis.yaxis.set_major_formatter(EngFormatter(unit=_UNITS[what], sep=_THIN))
            axis.set_ylabel("")
        axis.grid(visible=False, axis="x")

    return svg(what, draw)


def _roofline(report: Report, pricing: PricingRow) -> str:
    from ..roofline import draw_on

    def draw(axis: Any) -> None:
        draw_on(axis, report, pricing)
        axis.set_ylabel("10⁹ operations per second")

    return svg("roofline", draw)
