"""Documents as windows of at most a fixed length: what a model sees at once, and which of its predictions count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..errors import OptionError
from .tokens import Tokens


@dataclass(frozen=True)
class Windows:
    """How documents are cut.

    A window feeds up to ``size`` tokens, and what it predicts for the token behind each of them counts. The next one starts
    ``stride`` tokens later; what the one before has predicted does not count again. So every token of a document but the first
    counts once, whatever size and stride.

    Raises:
        OptionError: a number is out of range.
    """

    size: int = 512
    stride: int | None = None
    """None: the size, no overlap. Less: tokens are seen with at least ``size - stride`` tokens before them."""
    batch: int = 1
    """Windows that run together; only those of one length do, for nothing is padded."""

    def __post_init__(self) -> None:
        if self.size < 1 or self.batch < 1:
            raise OptionError(f"window ({self.size}) and batch ({self.batch}) must be 1 or more")
        if self.stride is not None and not 1 <= self.stride <= self.size:
            raise OptionError(f"stride is {self.stride}; it must be 1 to {self.size}, the window")


@dataclass(frozen=True, eq=False)
class Batch:
    """Windows of one length."""

    tokens: np.ndarray
    """``[B, n]`` int64: what is fed."""
    targets: np.ndarray
    """``[B, n]`` int64: the token behind each."""
    positions: np.ndarray
    """``[B, n]`` int64: where that token stands in all tokens."""
    counted: int
    """The last so many columns count."""


def batches(tokens: Tokens, how: Windows) -> Iterator[Batch]:
    """All windows, in the order of the documents but for those that wait until their batch is full."""
    waiting: dict[tuple[int, int], list[tuple[np.ndarray, int]]] = {}
    for window, position, counted in _windows(tokens, how):
        group = waiting.setdefault((len(window), counted), [])
        group.append((window, position))
        if len(group) == how.batch:
            yield _batch(waiting.pop((len(window), counted)), counted)
    for (_, counted), group in waiting.items():
        yield _batch(group, counted)


def _windows(tokens: Tokens, how: Windows) -> Iterator[tuple[np.ndarray, int, int]]:
    """Tokens of a window and one more, where its second token stands, and how many of its predictions count."""
    for document, start in zip(tokens.documents, tokens.starts, strict=True):
        end = 0  # predictions of tokens up to here are there
        for first in range(0, len(document) - 1, how.stride or how.size):
            window = document[first : first + how.size + 1]
            last = first + len(window) - 1
            if last > end:
                yield window, start + first + 1, last - end
            end = max(end, last)


def _batch(group: list[tuple[np.ndarray, int]], counted: int) -> Batch:
    rows = np.stack([window for window, _ in group])
    starts = np.array([position for _, position in group])
    return Batch(rows[:, :-1], rows[:, 1:], starts[:, None] + np.arange(rows.shape[1] - 1), counted)
