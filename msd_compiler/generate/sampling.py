"""The choice of the next token from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Integral, Real

import numpy as np

from ..errors import OptionError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the same seed and logits choose the same tokens.

    Attributes:
        temperature: of the softmax that tokens are drawn from; 0 takes the likeliest.
        top_k: draw among the so many likeliest; None: all.
        top_p: draw among the fewest likeliest that have this probability together; None: all.
        seed: of the random numbers, 0 or more.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    _random: np.random.Generator = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        given = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "seed": self.seed}
        for name, value in given.items():
            whole = name in ("top_k", "seed")
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral if whole else Real)):
                raise OptionError(f"{name} is {value!r}; it must be {'an integer' if whole else 'a number'}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise OptionError(f"temperature is {self.temperature}; it must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise OptionError(f"top_k is {self.top_k}; it must be 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise OptionError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise OptionError("top_k and top_p say what to draw from; give a temperature above 0 with them")
        if self.seed < 0:
            raise OptionError(f"seed is {self.seed}; it must be 0 or more")
        object.__setattr__(self, "_random", np.random.default_rng(self.seed))

    def choose(self, logits: np.ndarray) -> np.ndarray:
        """The next token of every row.

        Args:
            logits: ``[B, V]`` float32, no NaN.

        Returns:
            ``[B]`` int64. Of equal logits the lower id comes first.
        """
        if self.temperature == 0:
            return np.asarray(logits.argmax(axis=1), np.int64)
        order = np.argsort(-logits, axis=1, kind="stable")[:, : self.top_k]
        ranked = np.take_along_axis(logits, order, axis=1).astype(np.float64)
        with np.errstate(over="ignore"):  # of a temperature near 0: all but the likeliest become 0
            weights = np.exp((ranked - ranked[:, :1]) / self.temperature)
        cumulated = np.cumsum(weights / weights.sum(axis=1, keepdims=True), axis=1)
        last = (cumulated < (1 if self.top_p is None else self.top_p)).sum(axis=1)
        last = np.minimum(last, cumulated.shape[1] - 1)
        drawn = self._random.random(len(logits)) * np.take_along_axis(cumulated, last[:, None], axis=1)[:, 0]
        place = np.minimum((cumulated <= drawn[:, None]).sum(axis=1), last)
        return np.asarray(np.take_along_axis(order, place[:, None], axis=1)[:, 0], np.int64)
