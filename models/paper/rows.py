"""What the tables are made of: figures of the paper beside ours, and when two of them agree."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRINTED: dict[str, Any] = tomllib.loads((Path(__file__).parent / "printed.toml").read_text(encoding="utf-8"))
"""The paper's figures, by table."""

WITHIN = 0.05
"""How far a figure may be from the printed one, as a fraction of it."""


@dataclass(frozen=True)
class Row:
    """One figure of the paper, and what its set-up and an honest one give."""

    name: str
    printed: str | None
    """As the paper prints it; None if it prints none."""
    same: float | None
    honest: float | None
    note: str
    """Why they differ, in a sentence."""

    @property
    def miss(self) -> float | None:
        """How far the same set-up is from the printed figure, as a fraction of it; None where it agrees."""
        if self.printed is None or self.same is None:
            return None
        return miss(self.printed, self.same)


@dataclass(frozen=True)
class Table:
    """Rows with the paper's figures."""

    title: str
    about: str
    """What was computed, and the unit."""
    rows: Sequence[Row]
    digits: int = 3

    @property
    def notes(self) -> Sequence[str]:
        """Every note once, in order."""
        return list(dict.fromkeys(row.note for row in self.rows))


@dataclass(frozen=True)
class Grid:
    """Figures of which the paper prints none: a name, and a figure for each column."""

    title: str
    about: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float]]]
    digits: int = 3


Part = Table | Grid


def miss(printed: str, measured: float) -> float | None:
    """Signed distance from the printed figure as a fraction of it; None within 5 %, or within its own rounding."""
    low, _, high = printed.partition("–")
    nearest = min(max(measured, float(low)), float(high or low))
    distance = measured - nearest
    digits = len(low.partition(".")[2])
    if abs(distance) <= max(WITHIN * nearest, 0.5 * 10.0**-digits):
        return None
    return distance / nearest


def shown(figure: float | None, digits: int = 3) -> str:
    """A figure with so many digits; three are what a different random draw leaves of most."""
    if figure is None:
        return "–"
    mantissa, exponent, power = f"{figure:#.{digits}g}".partition("e")
    return f"{mantissa.rstrip('.')}{exponent}{int(power)}" if exponent else mantissa.rstrip(".")


def shown_miss(found: float | None) -> str:
    """Percent of the printed figure."""
    return "" if found is None else f"{100 * found:+.0f} %"
