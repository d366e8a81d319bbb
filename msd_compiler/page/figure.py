"""A picture of the page: drawn by matplotlib as SVG whose colours are the page's own, so that it follows light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

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
INK, QUIET, LINE, BEFORE, AFTER, MARK, _ = _INKS

_STYLE = {
    "svg.fonttype": "none",  # text stays text: the page's font, found by a search, read aloud
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": LINE,
    "axes.labelcolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "text.color": INK,
    "font.size": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.labelcolor": INK,
    "lines.markersize": 4,
}


@dataclass(frozen=True)
class Plot:
    """A picture, what it is called, and what it says."""

    name: str
    title: str
    text: str
    svg: str


def svg(salt: str, draw: Callable[[Any], None]) -> str:
    """What ``draw`` puts on one axis; the same bytes for the same figures.

    Args:
        salt: another one for each picture of a page.
        draw: takes an axis of matplotlib's.
    """
    from cycler import cycler
    from matplotlib import style
    from matplotlib.figure import Figure

    cycle = cycler(color=[AFTER, BEFORE, MARK, INK])
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
    text = document[document.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", text, count=1)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r"\n\s*", "\n", text)
    text = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), text)  # of a point: enough
    text = _MARKS.sub(_as_markers(), text)
    for ink, color in _INKS.items():
        text = text.replace(ink, color)
    return text.replace("<svg ", '<svg aria-hidden="true" ', 1)


_MARKS = re.compile(
    r'<g( clip-path="[^"]*")>\n((?:<use xlink:href="#([^"]*)"[^>]*style="([^"]*)"/>\n)'
    r'(?:<use xlink:href="#\3"[^>]*style="\4"/>\n)+)</g>'
)
"""Marks that are all alike."""


def _as_markers() -> Callable[[re.Match[str]], str]:
    """Makes one element of a thousand marks, a line that nobody sees with a marker at each of its points: a page opens sooner."""
    numbers = count()

    def line(marks: re.Match[str]) -> str:
        clip, uses, shape, style = marks.groups()
        points = re.findall(r' x="([^"]*)" y="([^"]*)"', uses)
        name = f"{shape}-{next(numbers)}"
        size = 'markerUnits="userSpaceOnUse" markerWidth="1" markerHeight="1" overflow="visible"'
        marker = f'<marker id="{name}" {size}><use xlink:href="#{shape}" style="{style}"/></marker>'
        at = " ".join(f'marker-{where}="url(#{name})"' for where in ("start", "mid", "end"))
        path = "L".join(f"{x} {y}" for x, y in points)
        return f'<g{clip}>\n{marker}\n<path d="M{path}" style="fill: none; stroke: none" {at}/>\n</g>'

    return line
