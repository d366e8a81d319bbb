"""One linear layer, every way that onnxruntime has to compute it on a CPU, OpenVINO's if it is installed, and ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .. import api
from ..compare import relative_l2
from ..errors import MsdError
from ..runtime import open_model
from ..verification import Progress, silent
from .machine import Unit, measure_limits
from .openvino import OpenVino, is_installed
from .report import LinearReport, LinearRow, Setting
from .spellings import nbits_codes, onnx_codes
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
    ramp: tuple[tuple[int, int], ...] = ((4096, 1024), (4096, 2048), (1024, 4096), (2048, 4096), (11008, 4096))
    """More K, N, so that times can be drawn over each."""
    ramp_rows: tuple[int, ...] = (1, 128)
    """M of those."""
    read_bytes: int | None = None
    """Of the buffer for the read bandwidth; None: by the machine's last cache."""

    def layers(self) -> Iterator[tuple[int, int, Weight, tuple[int, ...]]]:
        """K, N, weight, and all M of each layer."""
        for shapes, rows in ((self.shapes, self.rows), (self.ramp, self.ramp_rows)):
            yield from ((k, n, weight, rows) for k, n in shapes for weight in self.weights)


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
    data_type, content = onnx_codes(layer.codes, layer.weight.bits)
    codes = TensorProto(name="codes", data_type=data_type, dims=layer.codes.shape, raw_data=content.tobytes())
    return _model(layer, nodes, [codes, numpy_helper.from_array(scales, "scales")])


def _nbits(accuracy_level: int) -> Callable[[Layer], onnx.ModelProto]:
    def build(layer: Layer) -> onnx.ModelProto:
        (k, n), bits = layer.codes.shape, layer.weight.bits
        block = layer.weight.block or NBITS_BLOCK
        codes = nbits_codes(layer.codes, bits, block)
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


class Run(Protocol):
    """A layer with its input bound."""

    def __call__(self) -> None:
        """Compute it."""

    def output(self, name: str) -> np.ndarray:
        """What it gave."""


Opened = Callable[[Mapping[str, np.ndarray]], Run]
"""An open model: takes inputs by name."""


def _session(model: onnx.ModelProto, threads: int, *, portable: bool = True) -> Opened:
    session = open_model(model, Path(), **QUIET, portable=portable, intra_op_num_threads=threads)
    return partial(Bound, session)


def _openvino(model: onnx.ModelProto, threads: int, *, rounds_activations: bool = True) -> Opened:
    return OpenVino(model, threads, **({} if rounds_activations else {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0})).bind


@dataclass(frozen=True)
class Way:
    """A way to compute the layer."""

    name: str
    build: Callable[[Layer], onnx.ModelProto]
    unit: Unit
    """What multiplies: its rate is the limit."""
    open: Callable[[onnx.ModelProto, int], Opened] = _session
    """The model, in so many threads."""
    passes: int = 1
    """Products of that unit that make one."""
    reads_floats: bool = False
    """The weight is read as float32, not as codes and scales."""


MEASURE = Way("MatMul float32", _float, "float32", reads_floats=True)
OURS = Way("msd.MatMul", _compiled, "int16", partial(_session, portable=False))
PORTABLE = Way("msd.MatMul portable", _compiled, "int8", passes=2)
WAYS = (
    MEASURE,
    Way("DequantizeLinear -> MatMul", _dequantized, "int8"),
    Way("MatMulNBits level 0", _nbits(0), "float32"),
    Way("MatMulNBits level 4", _nbits(4), "int8"),
    OURS,
)
"""The first one is what the ratios refer to."""
OPENVINO = (
    Way("OpenVINO", _dequantized, "int8", _openvino),
    Way("OpenVINO float activations", _dequantized, "float32", partial(_openvino, rounds_activations=False)),
)
"""As it comes it rounds activations to int8 where the processor has such products, and not elsewhere."""


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
        limits=measure_limits(threads, grid.read_bytes),
        rows=[],
        ramp=list(grid.ramp),
    )
    ways = (*WAYS, *([PORTABLE] if portable else []), *(OPENVINO if is_installed() else []))
    layers = list(grid.layers())
    for number, (k, n, weight, rows) in enumerate(layers):
        progress("timing layers", number, len(layers))
        layer = Layer.random(k, n, weight)
        opened = dict(_opened(layer, ways, threads, report.notes))
        for m in rows:
            report.rows += _product(layer, opened, m, runs, seconds)
        report.limits = report.limits.best(measure_limits(threads, grid.read_bytes))
    for row in report.rows:
        row.limit = report.limits.reached(row.time.median_ms / 1e3, row.unit, row.operations, row.stored_bytes)
    progress("timing layers", len(layers), len(layers))
    return report


def _opened(layer: Layer, ways: tuple[Way, ...], threads: int, notes: list[str]) -> Iterator[tuple[Way, Opened]]:
    for way in ways:
        try:
            yield way, way.open(way.build(layer), threads)
        except MsdError as error:
            if way in (MEASURE, OURS):
                raise
            note = f"{way.name}, {layer.weight.name}: {error}"
            if note not in notes:
                notes.append(note)


def _product(layer: Layer, opened: dict[Way, Opened], m: int, runs: int, seconds: float) -> list[LinearRow]:
    k, n = layer.codes.shape
    x = np.random.default_rng(m).standard_normal((m, k)).astype(np.float32)
    columns = np.unique(np.linspace(0, n - 1, SAMPLE).astype(int))
    exact = x.astype(np.float64) @ layer.floats[:, columns].astype(np.float64)
    bound = {way.name: bind({"x": x}) for way, bind in opened.items()}
    times = in_turns(bound, runs=runs, seconds=seconds)
    rows = []
    for way in opened:
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
                unit=way.unit,
                operations=2 * way.passes * m * k * n,
                stored_bytes=layer.floats.nbytes if way.reads_floats else layer.stored_bytes,
            )
        )
    return rows
