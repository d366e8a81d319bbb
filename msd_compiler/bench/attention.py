"""Attention of one layer over a cache that is a buffer: onnxruntime's op with a float32 and an int8 cache, and ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from .. import api
from ..compare import relative_l2
from ..runtime import open_model, runtime_version
from ..verification import Progress, silent
from .report import AttentionReport, AttentionRow, Setting
from .timing import QUIET, Bound, check_threads, in_turns

STEP = np.float32(1 / 32)
"""Of every scale: codes of 127 are four standard deviations. A power of two, so that a stored token's code is the one it was made of."""


@dataclass(frozen=True)
class AttentionGrid:
    """What is timed."""

    batches: tuple[int, ...] = (1, 4)
    steps: tuple[tuple[int, int], ...] = ((1, 1024), (1, 4096), (1, 16384), (512, 0))
    """New tokens, tokens in the cache."""
    heads: int = 32
    kv_heads: int = 8
    size: int = 128
    """Columns of a head."""


@dataclass(frozen=True)
class Operands:
    """Of one step."""

    query: np.ndarray
    """``[B, S, heads x size]`` float32."""
    keys: np.ndarray
    """``[B, kv_heads, cached + S, size]`` int8, multiples of `STEP`; the last S are the new tokens'."""
    values: np.ndarray

    @classmethod
    def random(cls, batch: int, tokens: int, cached: int, grid: AttentionGrid) -> Operands:
        """Of normal distribution, but for the codes' rounding."""
        rng = np.random.default_rng(0)
        query = rng.standard_normal((batch, tokens, grid.heads * grid.size), dtype=np.float32)
        shape = (batch, grid.kv_heads, cached + tokens, grid.size)
        keys, values = (
            np.clip(np.rint(rng.standard_normal(shape, dtype=np.float32) / STEP), -127, 127).astype(np.int8)
            for _ in range(2)
        )
        return cls(query, keys, values)

    def feed(self, *, float_cache: bool) -> dict[str, np.ndarray]:
        """Inputs of `_model`, the cache as a buffer with room for the new tokens."""
        batch, tokens, _ = self.query.shape
        total = self.keys.shape[2]
        feed = {"query": self.query}
        for name, codes in (("key", self.keys), ("value", self.values)):
            new = codes[:, :, total - tokens :].astype(np.float32) * STEP
            feed[name] = np.ascontiguousarray(new.transpose(0, 2, 1, 3)).reshape(batch, tokens, -1)
            past = codes.astype(np.float32) * STEP if float_cache else codes.copy()
            past[:, :, total - tokens :] = 0
            feed[f"past_{name}"] = past
        feed["lengths"] = np.full(batch, total - 1, np.int32)
        feed["total"] = np.array([total], np.int32)
        return feed

    def exact(self) -> np.ndarray:
        """What the last token of the first sequence gets, ``[heads x size]`` float64."""
        kv_heads, _, size = self.keys.shape[1:]
        keys, values = (a[0].astype(np.float64) * float(STEP) for a in (self.keys, self.values))
        query = self.query[0, -1].astype(np.float64).reshape(kv_heads, -1, size)
        logits = query @ keys.transpose(0, 2, 1) / np.sqrt(size)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return np.asarray(weights / weights.sum(axis=-1, keepdims=True) @ values).reshape(-1)


def _model(grid: AttentionGrid, *, float_cache: bool) -> onnx.ModelProto:
    names = ["query", "key", "value", "past_key", "past_value", "lengths", "total"]
    attributes: dict[str, Any] = {"num_heads": grid.heads, "kv_num_heads": grid.kv_heads}
    stored = []
    if not float_cache:
        names += [""] * 5 + ["key_scale", "value_scale"]
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        scales = np.full(grid.kv_heads * grid.size, STEP)
        stored = [numpy_helper.from_array(scales, name) for name in ("key_scale", "value_scale")]
    node = helper.make_node(
        "GroupQueryAttention",
        names,
        ["y", "present_key", "present_value"],
        "layer",
        domain="com.microsoft",
        **attributes,
    )
    cache_type = TensorProto.FLOAT if float_cache else TensorProto.INT8
    value, wide, narrow = helper.make_tensor_value_info, grid.heads * grid.size, grid.kv_heads * grid.size
    inputs = [value("query", TensorProto.FLOAT, ["B", "S", wide])]
    inputs += [value(name, TensorProto.FLOAT, ["B", "S", narrow]) for name in ("key", "value")]
    cache = ["B", grid.kv_heads, "P", grid.size]
    inputs += [value(name, cache_type, cache) for name in ("past_key", "past_value")]
    inputs += [value("lengths", TensorProto.INT32, ["B"]), value("total", TensorProto.INT32, [1])]
    outputs = [value("y", TensorProto.FLOAT, ["B", "S", wide])]
    outputs += [value(name, cache_type, ["B", grid.kv_heads, "T", grid.size]) for name in IN_PLACE]
    graph = helper.make_graph([node], "layer", inputs, outputs, stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


IN_PLACE = {"present_key": "past_key", "present_value": "past_value"}
"""Outputs that are written where an input lies."""


@dataclass(frozen=True)
class AttentionWay:
    """A way to compute the step."""

    name: str
    build: Callable[[AttentionGrid], onnx.ModelProto]
    float_cache: bool = False
    portable: bool = True
    """Without the native library."""
    since: tuple[int, int] = (1, 20)
    """The first onnxruntime that has it."""


MEASURE = AttentionWay("GroupQueryAttention float32", lambda grid: _model(grid, float_cache=True), float_cache=True)
THEIRS = AttentionWay("GroupQueryAttention int8", lambda grid: _model(grid, float_cache=False), since=(1, 27))
OURS = AttentionWay(
    "msd.Attention int8",
    lambda grid: api.compile(_model(grid, float_cache=False), overrides=["*=2"], verify=False).model,
    portable=False,
)
WAYS = (MEASURE, THEIRS, OURS)
"""The first one is what the ratios refer to."""


def bench_attention(
    *,
    threads: int = 1,
    runs: int = 15,
    seconds: float = 30.0,
    grid: AttentionGrid | None = None,
    progress: Progress = silent,
) -> AttentionReport:
    """Time the steps of a grid, the caches bound as inputs and as outputs.

    Args:
        threads: in every session.
        runs: of each way, for a median.
        seconds: for each step; then fewer runs.
        grid: what to time.
        progress: told what is being done.

    Raises:
        OptionError: threads is less than 1.
        RuntimeRefused: the native library cannot be used, or onnxruntime refuses a model.
    """
    check_threads(threads)
    grid = grid or AttentionGrid()
    report = AttentionReport(
        setting=Setting.here(threads), heads=grid.heads, kv_heads=grid.kv_heads, size=grid.size, rows=[]
    )
    sessions = dict(_opened(grid, threads, report.notes))
    cells = [(batch, *step) for batch in grid.batches for step in grid.steps]
    for number, (batch, tokens, cached) in enumerate(cells):
        progress("timing steps", number, len(cells))
        operands = Operands.random(batch, tokens, cached, grid)
        report.rows += _step(operands, sessions, runs, seconds)
    progress("timing steps", len(cells), len(cells))
    return report


def _opened(grid: AttentionGrid, threads: int, notes: list[str]) -> Iterator[tuple[AttentionWay, Any]]:
    installed = runtime_version()
    for way in WAYS:
        if installed < way.since:
            needed = ".".join(map(str, way.since))
            notes.append(f"{way.name} needs onnxruntime {needed} or later; {onnxruntime.__version__} is installed")
            continue
        options = {**QUIET, "portable": way.portable, "intra_op_num_threads": threads}
        yield way, open_model(way.build(grid), Path(), **options)


def _step(operands: Operands, sessions: dict[AttentionWay, Any], runs: int, seconds: float) -> list[AttentionRow]:
    batch, tokens, _ = operands.query.shape
    bound = {
        way.name: Bound(session, operands.feed(float_cache=way.float_cache), in_place=IN_PLACE)
        for way, session in sessions.items()
    }
    times = in_turns(bound, runs=runs, seconds=seconds)
    exact = operands.exact()
    return [
        AttentionRow(
            way=name,
            batch=batch,
            tokens=tokens,
            cached=operands.keys.shape[2] - tokens,
            time=time,
            ratio=time.median_ms / times[MEASURE.name].median_ms,
            relative_l2=relative_l2(bound[name].output("y")[0, -1], exact),
        )
        for name, time in times.items()
    ]
