"""What a site takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Price:
    """What a site takes in one run."""

    seconds: float
    bytes: float
    """Read and written, in memory or cache."""
    ops: Mapping[str, float] = field(default_factory=dict)
    """By unit: "matrix int8", "vector", ...; a multiply-add is two."""

    def times(self, count: int) -> Price:
        """Of so many such."""
        return Price(self.seconds * count, self.bytes * count, {unit: count * n for unit, n in self.ops.items()})


class NoFigure(Exception):
    """The target has no figure for that way: the candidate cannot be priced."""
