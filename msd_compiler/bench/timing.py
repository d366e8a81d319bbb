"""Running things in turns against the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from pydantic import BaseModel

from ..errors import OptionError
from ..runtime import array_of, ort_value, run_bound

LEAST_RUNS = 3
"""Runs of each that are made however long they take."""

QUIET: dict[str, Any] = {"log_severity_level": 4, "config": {"session.force_spinning_stop": "1"}}
"""Options of every timed session: its threads do not wait busily while another session's turn is."""


class Time(BaseModel):
    """Times of one thing, milliseconds of wall time."""

    median_ms: float
    first_quartile_ms: float
    third_quartile_ms: float
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Time:
        """Summary of single times, one or more."""
        ms = [1e3 * s for s in seconds]
        low, middle, high = statistics.quantiles(ms, method="inclusive") if len(ms) > 1 else ms * 3
        return cls(median_ms=middle, first_quartile_ms=low, third_quartile_ms=high, runs=len(ms))


class Bound:
    """A session with its inputs bound once, so that only the run itself is timed.

    Attributes:
        names: of the outputs.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        arrays: Mapping[str, np.ndarray],
        in_place: Mapping[str, str] | None = None,
    ) -> None:
        """Bind.

        Args:
            session: of any model.
            arrays: by input name.
            in_place: outputs that are written into an input's array, and that input.
        """
        self.names = [output.name for output in session.get_outputs()]
        self._session = session
        self._binding = session.io_binding()
        self._held = {name: ort_value(array) for name, array in arrays.items()}  # the runtime reads arrays in place
        for name, value in self._held.items():
            self._binding.bind_ortvalue_input(name, value)
        for name in self.names:
            if in_place and name in in_place:
                self._binding.bind_ortvalue_output(name, self._held[in_place[name]])
            else:
                self._binding.bind_output(name, "cpu")

    def __call__(self) -> None:
        """One run.

        Raises:
            RuntimeRefused: an input does not fit, or a node fails.
        """
        run_bound(self._session, self._binding)

    def output(self, name: str) -> np.ndarray:
        """An output of the last run."""
        return np.array(array_of(self._binding.get_outputs()[self.names.index(name)]))


def check_threads(threads: int | None) -> None:
    """See that a session can have so many.

    Raises:
        OptionError: it cannot.
    """
    if threads is not None and threads < 1:
        raise OptionError(f"threads is {threads}; it must be 1 or more")


def in_turns(
    calls: Mapping[str, Callable[[], object]], *, runs: int, seconds: float, warm_ups: int = 1
) -> dict[str, Time]:
    """Time several things, one run of each after the other, so that what disturbs the machine disturbs all of them.

    Who begins a round changes from round to round.

    Args:
        calls: by name.
        runs: rounds.
        seconds: when these are over no further round begins, but `LEAST_RUNS` are made.
        warm_ups: rounds before, not timed.
    """
    names = list(calls)
    took: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(warm_ups):
        for name in names:
            calls[name]()
    end = time.monotonic() + seconds
    for done in range(runs):
        if done >= LEAST_RUNS and time.monotonic() > end:
            break
        first = done % len(names) if names else 0
        for name in names[first:] + names[:first]:
            began = time.perf_counter()
            calls[name]()
            took[name].append(time.perf_counter() - began)
    return {name: Time.of(times) for name, times in took.items()}
