"""Operands and sessions that the tests of the ops share."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from msd_compiler.runtime_ops import library_path
from msd_compiler.runtime_ops.matmul import layout, reference
from onnx import TensorProto, helper

ONNX_TYPE = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(ml_dtypes.bfloat16): TensorProto.BFLOAT16,
}
INPUT_TYPES = {
    "B": TensorProto.UINT8,
    "scales": TensorProto.FLOAT,
    "zero_points": TensorProto.UINT8,
    "offsets": TensorProto.FLOAT,
    "bias": TensorProto.FLOAT,
    "plan": TensorProto.INT64,
}


@dataclass(frozen=True)
class Site:
    """A weight as ``msd.MatMul`` reads it."""

    plan: layout.Plan
    codes: np.ndarray
    B: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray
    offsets: np.ndarray
    bias: np.ndarray

    def operands(self) -> dict[str, np.ndarray]:
        return {
            "B": self.B,
            "scales": self.scales,
            "zero_points": self.zero_points,
            "offsets": self.offsets,
            "bias": self.bias,
            "plan": self.plan.tensor(),
        }

    def reference(self, a: np.ndarray) -> np.ndarray:
        return reference.matmul(a, **{k: v for k, v in self.operands().items() if k != "B"}, b=self.B)

    def weight(self) -> np.ndarray:
        """``[K, N]`` float64."""
        n, groups = len(self.bias), self.plan.groups
        shift = layout.unpack_columns(self.zero_points, n, groups).astype(np.float64)
        shift = shift + layout.unpack_columns(self.offsets, n, groups)
        scales = layout.unpack_columns(self.scales, n, groups).astype(np.float64)
        of = np.arange(self.plan.k) // self.plan.block_size
        return (layout.decode(self.codes, self.plan.codebook) - shift[of]) * scales[of]

    def but(self, **changes: np.ndarray) -> Site:
        return replace(self, **changes)


CODINGS: dict[str, dict[str, Any]] = {
    "int2": {"bits": 2},
    "int4": {"bits": 4},
    "int8": {"bits": 8},
    "e2m1": {"bits": 4, "codebook": layout.Codebook.E2M1},
}
"""What weights are made of, as arguments of `make_site`: kernels have a loop for each."""


@pytest.fixture(params=CODINGS)
def coding(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Runs the test with each of `CODINGS`."""
    return CODINGS[request.param]


MX_FORMATS = [form for form in layout.ActivationFormat if form is not layout.ActivationFormat.INT8]


@pytest.fixture(params=MX_FORMATS, ids=lambda form: form.label)
def mx_format(request: pytest.FixtureRequest) -> layout.ActivationFormat:
    """Runs the test with each microscaling format of activations."""
    return layout.ActivationFormat(request.param)


def uneven(rows: int, k: int, dtype: type = np.float32) -> np.ndarray:
    """Activations at the edges of what a scale can be: 9 rows or more, some with NaN and Inf."""
    rng = np.random.default_rng(5)
    farthest = 14 if dtype == np.float16 else 126
    a = rng.normal(size=(rows, k)) * 2.0 ** rng.integers(-farthest, farthest - 2, (rows, 1))
    a[0] = rng.integers(-30, 31, k) / 4  # halves between values
    a[1, k // 3], a[2, k // 2], a[3, -1] = np.nan, np.inf, -np.inf
    a[4] = 0
    a[5] = np.resize([7.4375, -8, 8.5, 7.5, 1.75, 0.25, 448, 464], k)
    a[6] = 2.0**-14 if dtype == np.float16 else 2.0**-100
    a[7] = a[6] * 0.99
    a[8] = np.resize([65504, 1e-7] if dtype == np.float16 else [3.3e38, 1e-42], k)
    return a.astype(dtype)


def make_site(
    k: int,
    n: int,
    *,
    bits: int = 8,
    block_size: int = 32,
    terms: int = 2,
    per_row: bool = False,
    columns: str = "one",
    codebook: layout.Codebook = layout.Codebook.INTEGER,
    activation: layout.ActivationFormat = layout.ActivationFormat.INT8,
    seed: int = 0,
) -> Site:
    """Random operands. ``columns``: what zero points and offsets are, "one" number, one per "column" or per "group".

    ``terms`` are those of INT8 activations: each other format has its own number.
    """
    rng = np.random.default_rng(seed)
    if activation is not layout.ActivationFormat.INT8:
        terms = 3 if activation is layout.ActivationFormat.MXFP8 else 1
    plan = layout.Plan(k, bits, block_size, terms, per_row, codebook=codebook, activation=activation)
    codes = rng.integers(0, 2**bits - (codebook is layout.Codebook.E2M1), (k, n)).astype(np.uint8)
    groups = {"one": 1, "column": 1, "group": plan.groups}[columns]
    if columns == "one":
        zero_point = layout.E2M1_ZERO if codebook is layout.Codebook.E2M1 else 2 ** (bits - 1)
        zero_points = np.full((1, 1, 1), zero_point, np.uint8)
        offsets = np.zeros((1, 1, 1), np.float32)
    else:
        zero_points = layout.pack_columns(rng.integers(0, 256, (groups, n)).astype(np.uint8))
        offsets = layout.pack_columns(rng.normal(size=(groups, n)).astype(np.float32))
    scales = layout.pack_columns(rng.uniform(0.01, 1, (groups, n)).astype(np.float32))
    bias = rng.normal(size=n).astype(np.float32)
    return Site(plan, codes, layout.pack_codes(codes, plan), scales, zero_points, offsets, bias)


def options(threads: int = 1, *, native: bool = True, optimize: bool = True) -> ort.SessionOptions:
    chosen = ort.SessionOptions()
    chosen.intra_op_num_threads = threads
    chosen.log_severity_level = 4  # what the tests provoke needs no log
    chosen.enable_cpu_mem_arena = False  # each tensor ends where its memory does, so that a sanitizer sees its bounds
    chosen.enable_mem_pattern = False
    level = ort.GraphOptimizationLevel
    chosen.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    if native:
        chosen.register_custom_ops_library(str(library_path()))
    return chosen


def matmul_node(name: str, dtype: int, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
    stated = {"layout": layout.LAYOUT, "output_dtype": dtype} | attributes
    stated = {key: value for key, value in stated.items() if value is not None}
    return helper.make_node("MatMul", inputs, [output], name=name, domain="msd", **stated)


def displaced(array: np.ndarray, by: int) -> np.ndarray:
    """A copy that begins so many bytes behind a multiple of 16, and ends where its memory ends."""
    memory = np.empty(array.nbytes + by, np.uint8)
    copy: np.ndarray = np.ndarray(array.shape, array.dtype, memory, by)
    copy[...] = array
    return copy


def open_model(dtype: np.dtype, **attributes: object) -> onnx.ModelProto:
    """One node whose every operand is a graph input of any shape, so that one session serves all cases.

    A and Y are float32 behind casts where NumPy's way into the runtime has no such type.
    """
    onnx_type = ONNX_TYPE[np.dtype(dtype)]
    is_cast = dtype == ml_dtypes.bfloat16
    outer = TensorProto.FLOAT if is_cast else onnx_type
    value = helper.make_tensor_value_info
    node = matmul_node("site", onnx_type, ["A", *INPUT_TYPES], "Y", **attributes)
    nodes = [node]
    if is_cast:
        node.input[0], node.output[0] = "A_cast", "Y_cast"
        nodes = [
            helper.make_node("Cast", ["A"], ["A_cast"], to=onnx_type),
            node,
            helper.make_node("Cast", ["Y_cast"], ["Y"], to=TensorProto.FLOAT),
        ]
    graph = helper.make_graph(
        nodes,
        "open",
        [value("A", outer, None), *(value(key, t, None) for key, t in INPUT_TYPES.items())],
        [value("Y", outer, None)],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("msd", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(library_path()))
    library.msd_isa_names.restype = ctypes.c_char_p
    return library


@pytest.fixture(params=["avx512-vnni", "avx-vnni", "avx2", "neon-dotprod", "scalar"])
def variant(request: pytest.FixtureRequest, library: ctypes.CDLL) -> Iterator[str]:
    """Runs the test with each native kernel of this machine."""
    if library.msd_select_isa(request.param.encode()) == 0:
        pytest.skip(f"this machine does not run {request.param}")
    yield request.param
    library.msd_select_isa(b"")


OPSETS = [11, 12, 13, 14, 17, 18, 21, 23, 25]


@pytest.fixture(params=OPSETS, ids=lambda opset: f"opset{opset}")
def opset(request: pytest.FixtureRequest) -> int:
    """Runs the test at each of these opsets that the installed onnxruntime runs."""
    graph = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", request.param)], ir_version=8)
    try:
        ort.InferenceSession(model.SerializeToString(), options(native=False))
    except Exception:
        pytest.skip(f"onnxruntime {ort.__version__} does not run opset {request.param}")
    return int(request.param)


@pytest.fixture(scope="session")
def native() -> Callable[..., np.ndarray]:
    """``native(a, site, threads=1)``: one run of the native op."""
    sessions: dict[tuple[np.dtype, int], ort.InferenceSession] = {}

    def run(a: np.ndarray, site: Site, threads: int = 1) -> np.ndarray:
        key = (a.dtype, threads)
        if key not in sessions:
            sessions[key] = ort.InferenceSession(open_model(a.dtype).SerializeToString(), options(threads))
        fed = a.astype(np.float32) if a.dtype == ml_dtypes.bfloat16 else a
        (y,) = sessions[key].run(None, {"A": fed, **site.operands()})
        return y.astype(a.dtype)

    return run


@dataclass(frozen=True)
class Helpers:
    """The functions above, for test modules: they are collected one by one and cannot import each other."""

    codings = tuple(CODINGS.values())
    uneven = staticmethod(uneven)
    make_site = staticmethod(make_site)
    options = staticmethod(options)
    displaced = staticmethod(displaced)
    matmul_node = staticmethod(matmul_node)
    open_model = staticmethod(open_model)
    onnx_type = staticmethod(lambda dtype: ONNX_TYPE[np.dtype(dtype)])


@pytest.fixture(scope="session")
def helpers() -> Helpers:
    return Helpers()
