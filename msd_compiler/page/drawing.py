"""A site before and after, as small graphs: boxes and arrows with their places, which the template draws."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from ..facts import ReasonCode
from ..report import Outcome, SiteRow

_LINE, _GAP, _LETTER, _PADDING = 28.0, 20.0, 7.3, 20.0
"""Pixels: height of a line of text in its box, between boxes, width of a letter, left and right of a text together."""

_INPUTS = {"linear": ("weight", "activation"), "attention": ("cache", "query"), "embedding": ("table", "ids")}
"""By kind: what is stored or kept, and what comes anew with every run."""


@dataclass(frozen=True)
class Box:
    """A text, and perhaps a note under it; ``x`` and ``y`` are the corner, in pixels."""

    text: str
    role: Literal["input", "op", "ours"]
    x: float
    y: float
    width: float
    note: str = ""

    @property
    def height(self) -> float:
        """A line, or two."""
        return _LINE + (18 if self.note else 0)

    @property
    def middle(self) -> float:
        """Where arrows from above arrive."""
        return self.x + self.width / 2


@dataclass(frozen=True)
class Arrow:
    """A straight line to its head."""

    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True)
class Drawing:
    """One graph: a chain from top to bottom, and one input from the left."""

    title: str
    width: float
    height: float
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]

    @property
    def text(self) -> str:
        """What the picture shows, for those who do not see it."""
        chain = " to ".join(f"{box.text} ({box.note})" if box.note else box.text for box in self.boxes[:-1])
        return f"{self.title}: {chain}; {self.boxes[-1].text} joins"


def drawings(site: SiteRow) -> tuple[Drawing, ...]:
    """The site as the source spells it and, where it was rewritten, as the result does."""
    ops = [op.strip() for op in site.form.split("->")]
    if site.outcome is not Outcome.REWRITTEN:
        return (_drawing("as it stands", site, ops),)
    return _drawing("before", site, ops), _drawing("after", site, [_op_of(site, ops)], _note(site))


def _op_of(site: SiteRow, ops: list[str]) -> str:
    if site.reason_code is ReasonCode.FLOAT_ACTIVATIONS:
        return ops[-1]
    if site.kind == "attention":
        return "msd.Attention"
    return "msd.MatMulIntegerToFloat" if site.error_bound == 0 else "msd.MatMul"


def _note(site: SiteRow) -> str:
    if site.terms is None:
        return "activations stay float"
    terms = site.activation or f"{site.terms} INT8 term{'s' if site.terms > 1 else ''}"
    return terms if site.group is None else f"{terms}, groups of {site.group}"


def _drawing(title: str, site: SiteRow, ops: list[str], note: str = "") -> Drawing:
    """What comes anew joins at the op that multiplies: ops above it prepare the weight, or append to the cache."""
    chained, joining = _INPUTS[site.kind]
    if site.kind == "attention" and site.format is None:
        chained = "keys, values"  # it has no cache
    join = next((i for i, op in enumerate(ops) if any(word in op for word in ("MatMul", "Gemm", "Attention"))), 0)
    if ops[0] == "DynamicQuantizeLinear":  # prepares the activation
        chained, joining = joining, chained
    column = max(_width(text) for text in (chained, note, *ops))
    left = _width(joining) + _GAP
    boxes: list[Box] = []
    y = 2.0
    for text in (chained, *ops):
        is_op = bool(boxes)
        width = _width(max(text, note, key=len) if is_op else text)
        role: Literal["input", "op", "ours"] = "input" if not is_op else "ours" if note else "op"
        boxes.append(Box(text, role, left + (column - width) / 2, y, width, note if is_op else ""))
        y += boxes[-1].height + _GAP
    arrows = [Arrow(a.middle, a.y + a.height, b.middle, b.y) for a, b in pairwise(boxes)]
    arrows.append(Arrow(boxes[-1].middle, y - _GAP, boxes[-1].middle, y))
    at = boxes[1 + join]
    boxes.append(Box(joining, "input", 1, at.y + (at.height - _LINE) / 2, _width(joining)))
    arrows.append(Arrow(1 + _width(joining), at.y + at.height / 2, at.x, at.y + at.height / 2))
    return Drawing(title, left + column + 1, y + 2, tuple(boxes), tuple(arrows))


def _width(text: str) -> float:
    return round(len(text) * _LETTER + _PADDING, 1)
