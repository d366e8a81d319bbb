"""One linear layer, every way that onnxruntime has to compute it on a CPU, and ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .. import api
from ..compare import relative_l2
from ..errors import MsdError
from ..runtime import open_model
from ..verification import Progress, silent
from .machine import last_cache_bytes, read_bytes_per_second
from .report import LinearReport, LinearRow, Setting
from .timing import QUIET, Bound, check_threads, in_turns

SAMPLE = 128
"""Columns whose product is computed in float64."""

NBITS_BLOCK = 128
"""Block of a MatMulNBits whose weight has one scale per column: it gets the column's scale again and again."""


@dataclass(frozen=True)
class Weight:
    """How the weight of a layer is stored: symmetric codes."""

    name: str
    bits: int
    block: int | None
    """Steps of K that share a scale; None: all."""


@dataclass(frozen=True)
class LinearGrid:
    """What layers are timed."""

    rows: tuple[int, ...] = (1, 8, 16, 32, 128, 512)
    """M."""
    shapes: tuple[tuple[int, int], ...] = ((2048, 2048), (4096, 4096), (4096, 11008))
    """K, N."""
    weights: tuple[Weight, ...] = (
        Weight("int8 per channel", 8, None),
        Weight("int8 block 128", 8, 128),
        Weight("int4 block 32", 4, 32),
    )
    read_bytes: int | None = None
    """Of the buffer for the read bandwidth; None: by the machine's last cache."""


@dataclass(frozen=True)
class Layer:
    """A weight, as codes and scales."""

    weight: Weight
    codes: np.ndarray
    """``[K, N]`` int8."""
    scales: np.ndarray
    """``[K / block, N]`` float32."""
    floats: np.ndarray = field(repr=False)
    """``[K, N]`` float32: what they mean."""

    @classmethod
    def random(cls, k: int, n: int, weight: Weight) -> Layer:
        """Codes over their whole range, scales within a factor of two."""
        rng = np.random.default_rng(0)
        top = 2 ** (weight.bits - 1)
        codes = rng.integers(-top, top, (k, n), dtype=np.int8)
        block = weight.block or k
        scales = (rng.uniform(0.5, 1, (k // block, n)) / top / np.sqrt(k)).astype(np.float32)
        floats = codes.astype(np.float32)
        floats.reshape(k // block, block, n)[...] *= scales[:, None]
        return cls(weight, codes, scales, floats)

    @property
    def stored_bytes(self) -> int:
        """Of codes and scales."""
        return self.codes.size * self.weight.bits // 8 + self.scales.nbytes


def _float(layer: Layer) -> onnx.ModelProto:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return _model(layer, [node], [numpy_helper.from_array(layer.floats, "w")])


def _dequantized(layer: Layer) -> onnx.ModelProto:
    block = layer.weight.block
    layout = {"axis": 1} if block is None else {"axis": 0, "block_size": block}
    scales = layer.scales[0] if block is None else layer.scales
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scales"], ["w"], **layout),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="layer"),
    ]
    if layer.weight.bits == 8:
        codes = numpy_helper.from_array(layer.codes, "codes")
    else:
        nibbles = layer.codes.reshape(-1, 2).astype(np.uint8) & 15
        packed = (nibbles[:, 0] | nibbles[:, 1] << 4).tobytes()
        codes = TensorProto(name="codes", data_type=TensorProto.INT4, dims=layer.codes.shape, raw_data=packed)
    return _model(layer, nodes, [codes, numpy_helper.from_array(scales, "scales")])


def _nbits(accuracy_level: int) -> Callable[[Layer], onnx.ModelProto]:
    def build(layer: Layer) -> onnx.ModelProto:
        (k, n), bits = layer.codes.shape, layer.weight.bits
        block = layer.weight.block or NBITS_BLOCK
        codes = (layer.codes.T.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8).reshape(n, k // block, block)
        if bits == 4:
            codes = codes[..., ::2] | codes[..., 1::2] << 4
        scales = np.repeat(layer.scales.T, k // block // len(layer.scales), axis=1)
        attributes = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": accuracy_level}
        node = helper.make_node("MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", **attributes)
        tensors = {"b": codes, "s": scales}
        return _model(layer, [node], [numpy_helper.from_array(np.ascontiguousarray(a), t) for t, a in tensors.items()])

    return build


def _compiled(layer: Layer) -> onnx.ModelProto:
    return api.compile(_dequantized(layer), verify=False).model


def _model(layer: Layer, nodes: list[onnx.NodeProto], tensors: list[TensorProto]) -> onnx.ModelProto:
    k, n = layer.codes.shape
    value = helper.make_tensor_value_info
    inputs, outputs = [value("x", TensorProto.FLOAT, ["M", k])], [value("y", TensorProto.FLOAT, ["M", n])]
    graph = helper.make_graph(nodes, "layer", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@dataclass(frozen=True)
class Way:
    """A way to compute the layer."""

    name: str
    build: Callable[[Layer], onnx.ModelProto]
    portable: bool = True
    """Without the native library."""
    reads_floats: bool = False
    """The weight is read as float32, not as codes and scales."""


MEASURE = Way("MatMul float32", _float, reads_floats=True)
OURS = Way("msd.MatMul", _compiled, portable=False)
PORTABLE = Way("msd.MatMul portable", _compiled)
WAYS = (
    MEASURE,
    Way("DequantizeLinear -> MatMul", _dequantized),
    Way("MatMulNBits level 0", _nbits(0)),
    Way("MatMulNBits level 4", _nbits(4)),
    OURS,
)
"""The first one is what the ratios refer to."""


def bench_linear(
    *,
    threads: int = 1,
    runs: int = 15,
    seconds: float = 30.0,
    portable: bool = False,
    grid: LinearGrid | None = None,
    progress: Progress = silent,
) -> LinearReport:
    """Time the products of a grid.

    Args:
        threads: in every session.
        runs: of each way, for a median.
        seconds: for each product; then fewer runs.
        portable: time our op without the native library, too.
        grid: what to time.
        progress: told what is being done.

    Raises:
        OptionError: threads is less than 1.
        RuntimeRefused: the native library cannot be used.
    """
    check_threads(threads)
    grid = grid or LinearGrid()
    report = LinearReport(
        setting=Setting.here(threads),
        read_bytes_per_second=0,
        last_cache_bytes=last_cache_bytes(),
        rows=[],
    )
    ways = (*WAYS, *([PORTABLE] if portable else []))
    layers = [(k, n, weight) for k, n in grid.shapes for weight in grid.weights]
    for number, (k, n, weight) in enumerate(layers):
        progress("timing layers", number, len(layers))
        layer = Layer.random(k, n, weight)
        sessions = dict(_opened(layer, ways, threads, report.notes))
        for m in grid.rows:
            report.rows += _product(layer, sessions, m, runs, seconds)
        # what else goes on here slows it down, so the best of several moments counts
        report.read_bytes_per_second = max(report.read_bytes_per_second, read_bytes_per_second(grid.read_bytes))
    for row in report.rows:
        if row.m == 1:
            row.bandwidth_share = row.stored_bytes / (row.time.median_ms / 1e3) / report.read_bytes_per_second
    progress("timing layers", len(layers), len(layers))
    return report


def _opened(layer: Layer, ways: tuple[Way, ...], threads: int, notes: list[str]) -> Iterator[tuple[Way, Any]]:
    for way in ways:
        try:
            options = {**QUIET, "portable": way.portable, "intra_op_num_threads": threads}
            yield way, open_model(way.build(layer), Path(), **options)
        except MsdError as error:
            if way in (MEASURE, OURS):
                raise
            note = f"{way.name}, {layer.weight.name}: {error}"
            if note not in notes:
                notes.append(note)


def _product(layer: Layer, sessions: dict[Way, Any], m: int, runs: int, seconds: float) -> list[LinearRow]:
    k, n = layer.codes.shape
    x = np.random.default_rng(m).standard_normal((m, k)).astype(np.float32)
    columns = np.unique(np.linspace(0, n - 1, SAMPLE).astype(int))
    exact = x.astype(np.float64) @ layer.floats[:, columns].astype(np.float64)
    bound = {way.name: Bound(session, {"x": x}) for way, session in sessions.items()}
    times = in_turns(bound, runs=runs, seconds=seconds)
    rows = []
    for way in sessions:
        time = times[way.name]
        rows.append(
            LinearRow(
                way=way.name,
                m=m,
                k=k,
                n=n,
                weight=layer.weight.name,
                time=time,
                ratio=time.median_ms / times[MEASURE.name].median_ms,
                relative_l2=relative_l2(bound[way.name].output("y")[:, columns], exact),
                stored_bytes=layer.floats.nbytes if way.reads_floats else layer.stored_bytes,
            )
        )
    return rows
