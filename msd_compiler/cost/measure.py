"""This machine against the clock, one thread: layers, an empty node, reading, and products on registers."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from ..bench.machine import measure_limits
from ..bench.report import Setting
from ..bench.timing import Bound
from ..runtime import RuntimeRefused, library_path
from .layers import Job, bind, open_layer, open_session

BATCH = 2e-3
"""Seconds of calls that are timed together: the clock, and what wakes up now and then, are little beside them."""

QUANTILE = 0.25
"""Of the rounds: what else runs on the machine only ever adds time."""

LEAST_ROUNDS = 1
"""Made however long they take."""

_NODES = 100


class Machine(Protocol):
    """What is measured: a processor, or in a test a pretended one."""

    def describe(self) -> Setting:
        """What it is."""

    def node_seconds(self) -> float:
        """Of a node that does next to nothing."""

    def operations_per_second(self) -> float:
        """int16, on registers, two per multiply-add."""

    def read_rates(self, sizes: Sequence[int]) -> list[float]:
        """Bytes per second, buffers of so many bytes read again and again."""

    def times(self, jobs: Sequence[Job], rounds: int, seconds: float) -> list[float | None]:
        """Seconds of each job, measured in turns, as one node among others takes; None: this onnxruntime has no such layer."""


class ThisMachine:
    """The processor that this runs on, in one thread."""

    def __init__(self) -> None:
        """Measure what a run takes beside its nodes."""
        one, many = (bind_additions(count) for count in (1, _NODES))
        least = [_in_turns([one, many], rounds=7, seconds=5.0) for _ in range(3)]
        run, run_of_many = (min(times) for times in zip(*least, strict=True))
        self._node: float = max((run_of_many - run) / (_NODES - 1), 1e-8)
        self._session = max(run - self._node, 0.0)

    def describe(self) -> Setting:
        """Processor and versions."""
        return Setting.here(1)

    def node_seconds(self) -> float:
        """One of many additions of four numbers."""
        return self._node

    def operations_per_second(self) -> float:
        """The better of some moments."""
        rate: float = measure_limits(1, 2**24).operations_per_second["int16"]
        return rate

    def read_rates(self, sizes: Sequence[int]) -> list[float]:
        """By a bare loop of the native library; the sizes in turns."""
        read = _reader()
        buffers = [np.full(size // 8, 1) for size in sizes]  # not zeros: those would be one page, again and again
        calls = [lambda b=b: read(b.ctypes.data, b.size) for b in buffers]  # type: ignore[misc]
        return [
            b.nbytes / seconds for b, seconds in zip(buffers, _in_turns(calls, rounds=9, seconds=10.0), strict=True)
        ]

    def times(self, jobs: Sequence[Job], rounds: int, seconds: float) -> list[float | None]:
        """Each session is open once; what a run takes beside its nodes is taken off."""
        sessions = {}
        for job in jobs:
            if job.layer not in sessions:
                try:
                    sessions[job.layer] = open_layer(job)
                except RuntimeRefused:
                    sessions[job.layer] = None
        bound = {i: bind(job, session) for i, job in enumerate(jobs) if (session := sessions[job.layer]) is not None}
        took = dict(zip(bound, _in_turns(list(bound.values()), rounds, seconds), strict=True))
        return [max(took[i] - self._session, self._node) if i in took else None for i in range(len(jobs))]


def bind_additions(count: int) -> Bound:
    """So many additions of four numbers, one after the other."""
    names = ["x", *(f"t{i}" for i in range(1, count)), "y"]
    nodes = [helper.make_node("Add", [a, "c"], [b]) for a, b in pairwise(names)]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    ones = np.ones(4, np.float32)
    graph = helper.make_graph(nodes, "additions", [x], [y], [numpy_helper.from_array(ones, "c")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return Bound(open_session(model), {"x": ones})


def _in_turns(calls: Sequence[Callable[[], object]], rounds: int, seconds: float) -> list[float]:
    """Seconds of a call of each: a quantile over rounds of batches. A call before a batch of short ones warms the caches."""
    repeats = []
    for call in calls:
        call()
        repeats.append(max(1, round(BATCH / max(_timed(call, 1), 1e-7))))
    took: list[list[float]] = [[] for _ in calls]
    end = time.monotonic() + seconds
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.monotonic() > end:
            break
        for call, repeat, found in zip(calls, repeats, took, strict=True):
            if repeat > 1:
                call()
            found.append(_timed(call, repeat) / repeat)
    return [float(np.quantile(found, QUANTILE)) for found in took]


def _timed(call: Callable[[], object], repeat: int) -> float:
    began = time.perf_counter()
    for _ in range(repeat):
        call()
    return time.perf_counter() - began


def _reader() -> Callable[[int, int], int]:
    """``msd_read`` of the native library: address, number of eight bytes.

    Raises:
        RuntimeRefused: the library is missing or an old one.
    """
    try:
        read: Callable[[int, int], int] = ctypes.CDLL(str(library_path())).msd_read
    except (OSError, AttributeError) as error:
        raise RuntimeRefused(f"the native library cannot be used to measure: {error}") from error
    read.restype, read.argtypes = ctypes.c_int64, [ctypes.c_void_p, ctypes.c_int64]  # type: ignore[attr-defined]
    return read
