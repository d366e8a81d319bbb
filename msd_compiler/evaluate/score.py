"""Logits against the oracle's: perplexity, KL divergence, top tokens. float64 throughout."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import ModelError
from .report import BINS_PER_DECADE, DECADES, Flip, OracleRow, RunRow

_AT_ONCE = 2**20
"""Logits held as float64."""

_BINS = (DECADES[1] - DECADES[0]) * BINS_PER_DECADE


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """``[rows, V]`` float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def kl_divergence(exact: np.ndarray, found: np.ndarray) -> np.ndarray:
    """``[rows]`` sum over tokens of ``p (log p - log q)``, nats, for two `log_softmax`.

    Computed as ``p (q/p - 1 - log(q/p))``: as the probabilities of either sum to 1 that is the same, and no term is negative, so
    that divergences far below float64's 1e-16 of ``log p`` are right, too.
    """
    possible = exact > -np.inf
    difference = np.subtract(found, exact, out=np.zeros_like(exact), where=possible)
    return np.asarray((np.exp(exact) * (np.expm1(difference) - difference)).sum(axis=1))


@dataclass
class Tally:
    """What is known of the oracle after some of the predictions."""

    count: int = 0
    nll: float = 0.0
    """Sum of the text's negative log probabilities, nats."""
    hits: int = 0
    """Top tokens that are the text's."""

    @property
    def perplexity(self) -> float:
        """So far."""
        mean = self.nll / max(self.count, 1)
        return math.exp(mean) if mean < 700 else math.inf

    def row(self) -> OracleRow:
        """Of the report."""
        return OracleRow(perplexity=self.perplexity, accuracy=self.hits / max(self.count, 1))


@dataclass
class RunTally(Tally):
    """The same of a run, and how far from the oracle it is."""

    kl_sum: float = 0.0
    kl_max: float = 0.0
    flips: list[tuple[int, float, int, int, int]] = field(default_factory=list)
    """The fields of `Flip`."""
    histogram: list[int] = field(default_factory=lambda: [0] * _BINS)

    def of(self, name: str) -> RunRow:
        """Of the report."""
        flips = [Flip(**dict(zip(Flip.model_fields, flip, strict=True))) for flip in self.flips]
        return RunRow(
            name=name,
            perplexity=self.perplexity,
            kl_mean=self.kl_sum / max(self.count, 1),
            kl_max=self.kl_max,
            same_top=1 - len(flips) / max(self.count, 1),
            flips=sorted(flips, key=lambda flip: (-flip.margin, flip.position)),
            kl_histogram=self.histogram,
        )


@dataclass(frozen=True, eq=False)
class Predictions:
    """The rows of a batch that count."""

    targets: np.ndarray
    """``[rows]`` int64."""
    positions: np.ndarray
    """``[rows]`` int64."""

    def add(self, oracle: Tally, exact: np.ndarray, runs: dict[str, tuple[RunTally, np.ndarray]]) -> None:
        """Count them.

        Args:
            exact: the oracle's logits, ``[rows, V]``.
            runs: by name what is known of each, and its logits.

        Raises:
            ModelError: logits are NaN, or none is finite.
        """
        step = max(1, _AT_ONCE // exact.shape[1])
        for first in range(0, len(self.targets), step):
            part = slice(first, first + step)
            rows, targets = np.arange(len(self.targets[part])), self.targets[part]
            right, exact_part = self._checked("the oracle", part, exact), exact[part]
            best = exact_part.argmax(axis=1)
            _count(oracle, right, best, targets)
            for name, (tally, logits) in runs.items():
                found = self._checked(name, part, logits)
                top = logits[part].argmax(axis=1)
                _count(tally, found, top, targets)
                kl = kl_divergence(right, found)
                tally.kl_sum += float(kl.sum())
                tally.kl_max = max(tally.kl_max, float(kl.max()))
                tally.histogram = (np.array(tally.histogram) + _histogram(kl)).tolist()
                margins = exact_part[rows, best].astype(np.float64) - exact_part[rows, top]
                columns: list[Any] = [self.positions[part], margins, best, top, targets]
                tally.flips += [tuple(c[i].item() for c in columns) for i in np.flatnonzero(top != best)]

    def _checked(self, name: str, part: slice, logits: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            found = log_softmax(logits[part])
        wrong = np.isnan(found).any(axis=1)
        if wrong.any():
            place = int(self.positions[part][int(wrong.argmax())])
            raise ModelError(f"{name}: the logits that predict token {place} are NaN, or none of them is finite")
        return found


def _count(tally: Tally, found: np.ndarray, top: np.ndarray, targets: np.ndarray) -> None:
    tally.count += len(targets)
    tally.nll -= float(found[np.arange(len(targets)), targets].sum())
    tally.hits += int((top == targets).sum())


def _histogram(kl: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        places = np.floor((np.log10(kl) - DECADES[0]) * BINS_PER_DECADE)
    return np.bincount(np.clip(places, 0, _BINS - 1).astype(np.int64), minlength=_BINS)
