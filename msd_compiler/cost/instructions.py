"""Instructions per weight on a CPU, by counting (METHOD section 8): what tells one form of a product from another unmeasured.

Loads of weights and arithmetic; not the broadcasts of activations, which a tile's columns share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """By rows of the activation."""

    floats: Callable[[float], float]
    """Dequantized in registers, multiplied by float32 FMA."""
    fused: Callable[[float], float]
    """One pass of the 16-bit code."""
    two_passes: Callable[[float], float]
    """Two passes of INT8 terms."""


COUNTS = {
    "avx2": Counts(lambda m: (2 + m) / 8, lambda m: (1 + 2 * m) / 16, lambda m: 8 * m / 32),
    "avx512-vnni": Counts(lambda m: (2 + m) / 16, lambda m: (2 + 2 * m) / 64, lambda m: 2 * m / 64),
}
"""By instruction set, as the native library names it: vpmaddwd against maddubs with its sign, madd and add; vpdpwssd against
vpdpbusd. Arm's dot products take bytes: there the fused code is two passes already."""


def two_passes_over_fused(instruction_set: str, rows: float) -> float | None:
    """How many times the instructions of the fused code two passes take; None: there is no such choice."""
    counts = COUNTS.get(instruction_set)
    return None if counts is None else counts.two_passes(rows) / counts.fused(rows)
