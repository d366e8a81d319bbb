"""Operands and sessions for the tests of ``msd.Attention``."""

from __future__ import annotations

from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from msd_compiler.runtime_ops import library_path
from msd_compiler.runtime_ops.attention import reference
from msd_compiler.runtime_ops.attention.layout import APPEND, GROW, LAYOUT, SHARED, Plan, pack_codes, unpack_codes
from onnx import TensorProto, helper

INPUTS = ["query", "key", "value", "past_key", "past_value", "key_scale", "value_scale", "mask", "sinks", "lengths",
          "plan", "factors"]  # fmt: skip
OUTPUTS = ["Y", "present_key", "present_value", "present_key_scale", "present_value_scale"]
CACHE_TYPE = {8: TensorProto.INT8, 4: TensorProto.UINT8}
FLOAT_TYPE = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(ml_dtypes.bfloat16): TensorProto.BFLOAT16,
}
ACTIVATIONS = INPUTS[:3]


@dataclass(frozen=True)
class Case:
    """Operands of one call."""

    operands: dict[str, np.ndarray]

    @property
    def plan(self) -> Plan:
        return Plan.of(self.operands["plan"])

    @property
    def dtype(self) -> np.dtype:
        return self.operands["query"].dtype

    def but(self, **changes: np.ndarray) -> Case:
        return Case({**self.operands, **changes})

    def reference(self) -> reference.Attended:
        return reference.attention(**self.operands)

    def exact(self) -> np.ndarray:
        """Y in float64 over the same codes and scales: attention as everybody knows it."""
        p, o = self.plan, {key: np.asarray(value, np.float64) for key, value in self.operands.items()}
        out = self.reference()
        y = np.zeros((*o["query"].shape[:3], o["value"].shape[3]))
        group = o["query"].shape[1] // o["key"].shape[1]
        for b in range(len(y)):
            length = int(np.broadcast_to(o["lengths"], len(y))[b])
            behind = o["past_key"].shape[2] if p.cache == APPEND else length
            tokens = np.r_[:length, behind : behind + o["key"].shape[2]]
            position = len(tokens) - y.shape[2] + np.arange(y.shape[2])[:, None]
            t = np.arange(len(tokens))
            seen = np.ones((y.shape[2], len(tokens)), bool)
            if p.causal:
                seen &= t <= position
            if p.window:
                seen &= t > position - p.window
            for h in range(y.shape[1]):
                at = (b, h // group)
                k = dequantized(out.present_key, out.present_key_scale, p.bits, o["key"].shape[3])[at][tokens]
                v = dequantized(out.present_value, out.present_value_scale, p.bits, o["value"].shape[3])[at][tokens]
                scale, cap = o["factors"]
                s = o["query"][b, h] @ k.T * scale
                s = cap * np.tanh(s / cap) if cap else s
                mask = np.broadcast_to(o["mask"], (*y.shape[:3], o["mask"].shape[3]))[b, h]
                s = np.where(seen, s + (mask if mask.shape[1] == 1 else mask[:, tokens]), -np.inf)
                sink = np.broadcast_to(o["sinks"], y.shape[1])[h]
                top = np.maximum(s.max(axis=1, initial=-np.inf), sink)[:, None]
                top = np.where(top == -np.inf, 0, top)
                w = np.exp(s - top)
                total = w.sum(axis=1, keepdims=True) + np.exp(sink - top)
                y[b, h] = np.where(total > 0, w @ v / np.where(total > 0, total, 1), 0)
        return y


def dequantized(packed: np.ndarray, scales: np.ndarray, bits: int, columns: int) -> np.ndarray:
    return unpack_codes(packed, columns, bits).astype(np.float64) * scales


def make_case(
    *,
    batch: int = 1,
    heads: int = 1,
    group: int = 1,
    queries: int = 1,
    new: int | None = None,
    past: int = 20,
    columns: int = 16,
    value_columns: int | None = None,
    bits: int = 8,
    scales: str = "tensor",
    shared: bool = False,
    grow: bool = False,
    causal: bool = True,
    window: int = 0,
    lengths: list[int] | None = None,
    mask: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
    scale: float | None = None,
    cap: float = 0,
    sigma: float = 1,
    dtype: type = np.float32,
    seed: int = 0,
) -> Case:
    """Random operands. ``scales``: one per "tensor", per "channel" or "dynamic", per token. Caches have ``past`` tokens."""
    rng = np.random.default_rng(seed)
    new = queries if new is None else new
    value_columns = value_columns or columns
    plan = Plan(bits, scales == "dynamic", GROW if grow else SHARED if shared else APPEND, causal, window)

    def side(width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (batch, heads, past, width))
        shape = {"tensor": (1, 1, 1, 1), "channel": (1, heads, 1, width), "dynamic": (batch, heads, past, 1)}[scales]
        step = rng.uniform(0.5, 2, shape).astype(np.float32) * np.float32(2.0 ** (3 - bits))
        fresh = rng.normal(size=(batch, heads, new, width)).astype(dtype)
        return fresh, pack_codes(codes, bits), step

    key, past_key, key_scale = side(columns)
    value, past_value, value_scale = side(value_columns)
    query = (sigma * rng.normal(size=(batch, heads * group, queries, columns))).astype(dtype)
    if lengths is None:
        lengths = [past - new if shared else past]
    return Case(
        {
            "query": query,
            "key": key,
            "value": value,
            "past_key": past_key,
            "past_value": past_value,
            "key_scale": key_scale,
            "value_scale": value_scale,
            "mask": np.zeros((1, 1, 1, 1), np.float32) if mask is None else mask.astype(np.float32),
            "sinks": np.array([-np.inf] if sinks is None else sinks, np.float32),
            "lengths": np.array(lengths, np.int64),
            "plan": plan.tensor(),
            "factors": np.array([columns**-0.5 if scale is None else scale, cap], np.float32),
        }
    )


def open_model(
    dtype: np.dtype = np.float32, bits: int = 8, cache: str = "append", **attributes: object
) -> onnx.ModelProto:
    """One node whose every operand is a graph input of any shape, so that one session serves all cases.

    bfloat16 is float32 behind casts, for NumPy's way into the runtime has no such type.
    """
    onnx_type, value = FLOAT_TYPE[np.dtype(dtype)], helper.make_tensor_value_info
    is_cast = dtype == ml_dtypes.bfloat16
    outer = TensorProto.FLOAT if is_cast else onnx_type
    types = dict.fromkeys(INPUTS, TensorProto.FLOAT) | dict.fromkeys(ACTIVATIONS, outer)
    types |= {"past_key": CACHE_TYPE[bits], "past_value": CACHE_TYPE[bits]}
    types |= {"lengths": TensorProto.INT64, "plan": TensorProto.INT64}
    stated = {"layout": LAYOUT, "cache": cache, "output_dtype": onnx_type} | attributes
    node = helper.make_node(
        "Attention", INPUTS, OUTPUTS, "site", domain="msd", **{k: v for k, v in stated.items() if v is not None}
    )
    nodes = [node]
    if is_cast:
        for i, name in enumerate(ACTIVATIONS):
            node.input[i] = f"{name}_cast"
            nodes.insert(0, helper.make_node("Cast", [name], [f"{name}_cast"], to=onnx_type))
        node.output[0] = "Y_cast"
        nodes.append(helper.make_node("Cast", ["Y_cast"], ["Y"], to=TensorProto.FLOAT))
    out_types = [outer, CACHE_TYPE[bits], CACHE_TYPE[bits], TensorProto.FLOAT, TensorProto.FLOAT]
    graph = helper.make_graph(
        nodes,
        "open",
        [value(name, t, None) for name, t in types.items()],
        [value(name, t, None) for name, t in zip(OUTPUTS, out_types, strict=True)],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("msd", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def options(threads: int = 1) -> ort.SessionOptions:
    chosen = ort.SessionOptions()
    chosen.intra_op_num_threads = threads
    chosen.log_severity_level = 4  # what the tests provoke needs no log
    chosen.enable_cpu_mem_arena = False  # each tensor ends where its memory does, so that a sanitizer sees its bounds
    chosen.enable_mem_pattern = False
    chosen.register_custom_ops_library(str(library_path()))
    return chosen


@dataclass
class Native:
    """Runs cases through onnxruntime, one session per type."""

    sessions: dict[tuple, ort.InferenceSession] = field(default_factory=dict)

    def session(self, case: Case, threads: int = 1) -> ort.InferenceSession:
        key = (case.dtype, case.plan.bits, case.plan.kind, threads)
        if key not in self.sessions:
            self.sessions[key] = ort.InferenceSession(open_model(*key[:3]).SerializeToString(), options(threads))
        return self.sessions[key]

    def __call__(self, case: Case, threads: int = 1) -> reference.Attended:
        is_cast = case.dtype == ml_dtypes.bfloat16
        fed = {k: v.astype(np.float32) if is_cast and k in ACTIVATIONS else v for k, v in case.operands.items()}
        y, *others = self.session(case, threads).run(None, fed)
        return reference.Attended(y.astype(case.dtype), *others)

    def in_place(self, case: Case, threads: int = 1) -> reference.Attended:
        """The caches bound as inputs and as outputs."""
        session = self.session(case, threads)
        bound = {k: ort.OrtValue.ortvalue_from_numpy(np.array(v)) for k, v in case.operands.items()}
        binding = session.io_binding()
        for name, value in bound.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("Y")
        for name, past in zip(OUTPUTS[1:], ["past_key", "past_value", "key_scale", "value_scale"], strict=True):
            binding.bind_ortvalue_output(name, bound[past])
        session.run_with_iobinding(binding)
        y, *others = binding.get_outputs()
        return reference.Attended(y.numpy(), *(np.array(o.numpy()) for o in others))  # theirs is the bound memory


def assert_same_bits(found: reference.Attended, expected: reference.Attended) -> None:
    """Equal with the sign of 0, and NaN where NaN is (of any sign and payload); cache bytes equal."""
    for name, a, b in zip(found._fields, found, expected, strict=True):
        assert a.dtype == b.dtype, name
        assert a.shape == b.shape, name
        if a.dtype.kind in "iu":
            np.testing.assert_array_equal(a, b, err_msg=name)
            continue
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_array_equal(a, b, err_msg=name)
        is_number = ~np.isnan(b)
        np.testing.assert_array_equal(np.signbit(a[is_number]), np.signbit(b[is_number]), err_msg=name)


MASK_SHAPES = [
    (1, 1, 1, 1),
    (2, 1, 1, 1),
    (1, 4, 1, 1),
    (1, 1, 5, 1),
    (1, 1, 1, 305),
    (2, 4, 5, 305),
    (2, 1, 5, 400),
    (1, 4, 1, 306),
]
MASK_KINDS = ["finite", "boolean", "lowest"]


def mask_of(kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """A mask of that shape; "lowest" hides by the least finite number, as exporters do."""
    rng = np.random.default_rng(3)
    hidden = rng.random(shape) < 0.4
    return {
        "finite": rng.normal(size=shape),
        "boolean": np.where(hidden, -np.inf, 0),
        "lowest": np.where(hidden, np.finfo(np.float32).min, 0),
    }[kind]
