"""Inputs to verify a model on, from nothing but the model: its signature, what its graph does with each input, and trials."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ..errors import MsdError
from .fills import Array
from .hypotheses import Guess, is_finite, plans, starts
from .signature import Signature, read_signature

__all__ = ["Feed", "NoInputs", "generate"]

MAX_RUNS = 40
MAX_MESSAGE = 300  # characters of what the runtime said


@dataclass(frozen=True)
class Feed:
    """Arrays for every required input of a model.

    Attributes:
        name: "prefill" (several tokens, empty cache), "decode" (one token, filled cache) or "single" (no cache).
        arrays: by input name.
    """

    name: str
    arrays: dict[str, Array]


class NoInputs(MsdError):
    """No inputs were found on which the model runs; says what was tried and how to give some."""


Run = Callable[[dict[str, Array]], Sequence[Any]]


def generate(model: Any, run: Run, *, seed: int = 0) -> list[Feed]:
    """Feeds on which the model runs, with finite outputs wherever any feed tried gives them.

    Args:
        model: an `onnx.ModelProto`; the data of its large tensors is not read and may be missing.
        run: runs the model on arrays by input name; any exception means that it refuses them.
        seed: of the random numbers; the same seed gives the same feeds.

    Returns:
        "prefill" and "decode", those of the two that run, for a model with a cache; else "single".
        No feed is larger than 256 MiB, and `run` is called at most 40 times.

    Raises:
        NoInputs: the model refuses everything tried, or an input is of a type no array can be made for.
    """
    signature = read_signature(model)
    if signature.unsupported:
        listed = ", ".join(f"{name!r} is {kind}" for name, kind in signature.unsupported.items())
        raise NoInputs(
            f"inputs can be made for tensors of numbers only: {listed}; give your own with --inputs FILE.npz"
        )
    trials = _Trials(signature, run, seed)
    found: list[_Found] = []
    for name, start in starts(signature).items():
        if found:  # what one feed needed, the next one needs too
            start = found[-1].guess.with_lengths_of(start)
        if (feed := trials.find(name, start, MAX_RUNS // len(starts(signature)))) is not None:
            found.append(feed)
    if not found:
        raise NoInputs(trials.failure())
    return [f.feed for f in found if f.finite] or [f.feed for f in found]


@dataclass(frozen=True)
class _Found:
    feed: Feed
    guess: Guess
    finite: bool


@dataclass
class _Trials:
    """Runs of one model on one hypothesis after the other."""

    signature: Signature
    run: Run
    seed: int
    count: int = 0
    refusal: str = "every shape tried is larger than 256 MiB"

    def find(self, name: str, start: Guess, runs: int) -> _Found | None:
        """The first hypothesis with finite outputs, else the first that runs."""
        second_best: _Found | None = None
        for guess, plan in islice(plans(self.signature, start), runs):
            try:
                feed = Feed(name, plan.arrays(self.signature, self.seed))
                self.count += 1
                finite = is_finite(self.run(feed.arrays))
            except Exception as error:  # whatever it is, the runtime refuses these inputs
                self.refusal = " ".join(str(error).split())[:MAX_MESSAGE] or type(error).__name__
                continue
            if finite:
                return _Found(feed, guess, finite)
            second_best = second_best or _Found(feed, guess, finite)
        return second_best

    def failure(self) -> str:
        """Why there are no feeds, in a sentence."""
        inputs = ", ".join(f"{i.name!r} {i.dtype}[{', '.join(map(str, i.declared))}]" for i in self.signature.inputs)
        return (
            f"no inputs found on which the model runs ({self.count} tried); it wants {inputs or 'none'}; "
            f"the last refusal: {self.refusal}; give your own with --inputs FILE.npz"
        )
