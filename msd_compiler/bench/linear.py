"""One linear layer, every way that onnxruntime has to compute it on a CPU, OpenVINO's if it is installed, and ours.

Codes of FLOAT4E2M1 are multiplied by nobody but us. Twice such a value is an integer, so the others compute the very same product
from int8 codes and half the scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Protocol

import ml_dtypes
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

AS_INT8 = " as int8"
"""Behind the name of a way that computes a product of FLOAT4E2M1 from int8 codes."""

_TWICE_E2M1 = (2 * np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)).astype(np.int8)


@dataclass(frozen=True)
class Weight:
    """How the weight of a layer is stored: symmetric codes."""

    name: str
    bits: int
    block: int | None
    """Steps of K that share a scale; None: all."""
    is_float: bool = False
    """Codes are FLOAT4E2M1, scales powers of two: MXFP4."""
    beside: Weight | None = None
    """Another one, whose product in our op stands in the same table."""
    rows: tuple[int, ...] | None = None
    """Of the M of a grid, those that are timed; None: all."""


INT4 = Weight("int4 block 32", 4, 32)


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
        INT4,
        Weight("mxfp4 block 32", 4, 32, is_float=True, beside=INT4, rows=(1, 8, 128)),
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
            for (k, n), weight in product(shapes, self.weights):
                yield k, n, weight, tuple(m for m in rows if weight.rows is None or m in weight.rows)


@dataclass(frozen=True)
class Layer:
    """A weight, as codes and scales."""

    weight: Weight
    codes: np.ndarray
    """``[K, N]`` int8; of a weight of floats, twice their values."""
    scales: np.ndarray
    """``[K / block, N]`` float32, of these codes."""
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
        if weight.is_float:
            # any 16 numbers in a row are places in the table: negative ones count from its end
            codes, scales = _TWICE_E2M1[codes], np.exp2(np.rint(np.log2(scales)))
        floats = codes.astype(np.float32)
        floats.reshape(k // block, block, n)[...] *= scales[:, None]
        return cls(weight, codes, scales, floats)

    @property
    def stored_bytes(self) -> int:
        """Of codes and scales, these in float32, as every op reads them."""
        return self.codes.size * self.weight.bits // 8 + self.scales.nbytes

    def as_int8(self) -> Layer:
        """The same product, from codes of 8 bits."""
        return replace(self, weight=replace(self.weight, bits=8, is_float=False))

    def product(self, x: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Those columns of ``x @ W`` in float64."""
        exact: np.ndarray = x.astype(np.float64) @ self.floats[:, columns].astype(np.float64)
        return exact


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


def _mxfp4(layer: Layer) -> onnx.ModelProto:
    layout = {"axis": 0, "block_size": layer.weight.block, "output_dtype": TensorProto.FLOAT}
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scales"], ["w"], **layout),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="layer"),
    ]
    codes = (layer.codes / np.float32(2)).astype(ml_dtypes.float4_e2m1fn)
    scales = (2 * layer.scales).astype(ml_dtypes.float8_e8m0fnu)
    tensors = [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")]
    return _model(layer, nodes, tensors, opset=24)


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
    spelled = _mxfp4(layer) if layer.weight.is_float else _dequantized(layer)
    return api.compile(spelled, verify=False).model


def _model(
    layer: Layer, nodes: list[onnx.NodeProto], tensors: list[TensorProto], *, opset: int = 21
) -> onnx.ModelProto:
    k, n = layer.codes.shape
    value = helper.make_tensor_value_info
    inputs, outputs = [value("x", TensorProto.FLOAT, ["M", k])], [value("y", TensorProto.FLOAT, ["M", n])]
    graph = helper.make_graph(nodes, "layer", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
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
    takes_float4: bool = False
    """Codes of FLOAT4E2M1 are multiplied as they are."""


MEASURE = Way("MatMul float32", _float, "float32", reads_floats=True)
OURS = Way("msd.MatMul", _compiled, "int16", partial(_session, portable=False), takes_float4=True)
PORTABLE = Way("msd.MatMul portable", _compiled, "int8", passes=2, takes_float4=True)
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
        opened = list(_opened(Layer.random(k, n, weight), ways, threads, report.notes))
        for m in rows:
            report.rows += _product(weight, opened, m, runs, seconds)
        report.limits = report.limits.best(measure_limits(threads, grid.read_bytes))
    for row in report.rows:
        row.limit = report.limits.reached(row.time.median_ms / 1e3, row.unit, row.operations, row.stored_bytes)
    progress("timing layers", len(layers), len(layers))
    return report


@dataclass(frozen=True)
class _Contender:
    """A way, and the layer that it computes."""

    name: str
    way: Way
    layer: Layer
    """The table's, the same in int8 codes, or the one beside it."""
    bind: Opened = field(repr=False)


def _entries(layer: Layer, ways: tuple[Way, ...]) -> Iterator[tuple[str, Way, Layer]]:
    for way in ways:
        as_it_is = way.takes_float4 or way.reads_floats or not layer.weight.is_float
        yield (way.name, way, layer) if as_it_is else (way.name + AS_INT8, way, layer.as_int8())
    (k, n), beside = layer.codes.shape, layer.weight.beside
    if beside is not None:
        yield f"{OURS.name} {beside.name.split()[0]}", OURS, Layer.random(k, n, beside)


def _opened(layer: Layer, ways: tuple[Way, ...], threads: int, notes: list[str]) -> Iterator[_Contender]:
    for name, way, own in _entries(layer, ways):
        try:
            yield _Contender(name, way, own, way.open(way.build(own), threads))
        except MsdError as error:
            if way is MEASURE or (way is OURS and not own.weight.is_float):  # an old runtime has no opset 24
                raise
            note = f"{name}, {layer.weight.name}: {error}"
            if note not in notes:
                notes.append(note)


def _product(weight: Weight, opened: list[_Contender], m: int, runs: int, seconds: float) -> list[LinearRow]:
    k, n = opened[0].layer.codes.shape
    x = np.random.default_rng(m).standard_normal((m, k)).astype(np.float32)
    columns = np.unique(np.linspace(0, n - 1, SAMPLE).astype(int))
    bound = {each.name: each.bind({"x": x}) for each in opened}
    times = in_turns(bound, runs=runs, seconds=seconds)
    rows = []
    for each in opened:
        time, way, layer = times[each.name], each.way, each.layer
        rows.append(
            LinearRow(
                way=each.name,
                m=m,
                k=k,
                n=n,
                weight=weight.name,
                time=time,
                ratio=time.median_ms / times[MEASURE.name].median_ms,
                relative_l2=relative_l2(bound[each.name].output("y")[:, columns], layer.product(x, columns)),
                unit=way.unit,
                operations=2 * way.passes * m * k * n,
                stored_bytes=layer.floats.nbytes if way.reads_floats else layer.stored_bytes,
            )
        )
    return rows
