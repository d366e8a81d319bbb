"""The roofline of a report: what each layer reaches of what the target could do with so much work per byte."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import OptionError
from .picture import check_plot, save_plot
from .report import PricingRow, Report, SiteRow


def draw_roofline(report: Report, path: Path) -> None:
    """Write the picture, SVG or PNG.

    Raises:
        OptionError: nothing was priced, or the file is of another type.
        OutputError: the file cannot be written.
    """
    check_plot(path)
    if report.pricing is None or not report.pricing.before.seconds:
        raise OptionError("no layer of the model was priced: there is nothing to draw")
    save_plot(roofline(report, report.pricing), path)


def roofline(report: Report, pricing: PricingRow) -> Any:
    """A matplotlib figure: operations per second over operations per byte, before and after, under the target's roof."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    draw_on(axis, report, pricing)
    axis.set_title(f"layers on {pricing.target}, predicted, {pricing.workload}", fontsize=9)
    axis.legend()
    return figure


def draw_on(axis: Any, report: Report, pricing: PricingRow) -> None:
    """Points and roof, on an axis of matplotlib's."""
    intensities: list[float] = []
    for number, phase in enumerate(pricing.phases):
        for name, marker in (("as it stands", "o"), ("as chosen", "^")):
            found = (point for site in report.sites for point in _point(site, name == "as chosen", number))
            points = list(dict.fromkeys(found))  # layers of one shape are one point
            intensities += [x for x, _ in points]
            color = f"C{number}"
            faces = color if name == "as chosen" else "none"
            axis.scatter(
                [x for x, _ in points],
                [y / 1e9 for _, y in points],
                marker=marker,
                edgecolors=color,
                facecolors=faces,
                alpha=0.7,
                label=f"{phase.name}, {name}",
            )
    left, right = min(intensities) / 3, max(intensities) * 3
    ridge = pricing.peak_ops_per_second / pricing.read_bytes_per_second
    corners = [left, *([ridge] if left < ridge < right else []), right]
    roof = [min(pricing.peak_ops_per_second, x * pricing.read_bytes_per_second) / 1e9 for x in corners]
    axis.plot(corners, roof, color="0.4", linestyle="--", label="what the target can do")
    axis.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="10^9 operations per second")
    axis.grid(which="major", alpha=0.3)


def _point(site: SiteRow, chosen: bool, phase: int) -> Iterable[tuple[float, float]]:
    """Multiply-adds per byte and per second, where the site was priced."""
    name = site.choice if chosen else site.candidates[0].name if site.candidates else None
    for candidate in site.candidates:
        if candidate.name == name and candidate.phases:
            price = candidate.phases[phase]
            products = sum(count for unit, count in price.ops.items() if unit != "vector")
            yield products / price.bytes, products / price.seconds
