"""Single layers of random codes, as onnxruntime and our ops compute them, to be timed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from .. import api
from ..bench.timing import QUIET, Bound
from ..runtime import open_model
from ..runtime_ops.matmul.layout import LAYOUT, Plan
from .cpu import cpu_attention, cpu_linear
from .profile import CpuProfile, Way
from .work import AttentionWork, LinearWork


@dataclass(frozen=True)
class Product:
    """One linear layer, computed in one way, on so many rows."""

    way: Way
    work: LinearWork
    rows: int
    terms: int | None = None
    """Of `Way.MSD`."""

    def predicted(self, profile: CpuProfile) -> float:
        """Seconds, by the profile."""
        return cpu_linear(profile, self.way, self.work, self.rows, self.terms).seconds

    @property
    def layer(self) -> tuple[Any, ...]:
        """Equal for jobs that one session does."""
        return self.way, self.work, self.terms


@dataclass(frozen=True)
class Step:
    """Attention of one layer, computed in one way, for some new tokens."""

    way: Way
    work: AttentionWork
    batch: int
    tokens: int
    context: int
    """Tokens in the cache, new ones included."""

    def predicted(self, profile: CpuProfile) -> float:
        """Seconds, by the profile."""
        return cpu_attention(profile, self.way, self.work, self.batch, self.tokens, self.context).seconds

    @property
    def layer(self) -> tuple[Any, ...]:
        """Equal for jobs that one session does."""
        return self.way, self.work


Job: TypeAlias = Product | Step

_OPSETS = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("msd", 1)]
_NODE = "layer"
_SCALE = np.float32(1 / 128)
_IN_PLACE = {"present_key": "past_key", "present_value": "past_value"}


def open_session(model: onnx.ModelProto, *, portable: bool = True) -> onnxruntime.InferenceSession:
    """A session of one thread that is not disturbed by others' threads."""
    return open_model(model, Path(), **QUIET, portable=portable, intra_op_num_threads=1)


@singledispatch
def open_layer(job: Job) -> onnxruntime.InferenceSession:
    """A session of the job's layer.

    Raises:
        RuntimeRefused: this onnxruntime does not have it, or the native library cannot be used.
    """
    raise TypeError(type(job))


@singledispatch
def bind(job: Job, session: onnxruntime.InferenceSession) -> Bound:
    """The session of the job's layer, on inputs of the job's sizes."""
    raise TypeError(type(job))


@open_layer.register
def _(job: Product) -> onnxruntime.InferenceSession:
    build = {Way.MSD: _ours, Way.FLOAT_WEIGHT: _float_weight}.get(job.way, _quantized)
    return open_session(build(job), portable=job.way is not Way.MSD)


@bind.register
def _(job: Product, session: onnxruntime.InferenceSession) -> Bound:
    shape = (job.rows, job.work.k)
    return Bound(session, {"x": np.random.default_rng(0).standard_normal(shape, dtype=np.float32)})


def _quantized(job: Product) -> onnx.ModelProto:
    """``MatMulNBits``, or with a scale per column the spelling that becomes one when the session opens."""
    work = job.work
    if work.per_channel:
        nodes = [
            helper.make_node("DequantizeLinear", ["codes", "scales"], ["w"], axis=1),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ]
        code_type = TensorProto.INT8 if work.bits == 8 else TensorProto.INT4
        tensors = [_random("codes", code_type, (work.k, work.n), work.bits), _scales(work.n)]
        return _model(work, nodes, tensors)
    attributes = {"K": work.k, "N": work.n, "bits": work.bits, "block_size": work.group}
    attributes["accuracy_level"] = 0 if job.way is Way.FLOAT else 4
    node = helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", **attributes)
    shape = (work.n, work.groups, work.group * work.bits // 8)
    return _model(work, [node], [_random("codes", TensorProto.UINT8, shape), _scales(work.n, work.groups)])


def _ours(job: Product) -> onnx.ModelProto:
    work = job.work
    assert job.terms is not None
    plan = Plan(work.k, work.bits, work.group, job.terms, per_row=False)
    shape = plan.packed_shape(work.n)
    rest = {
        "zero_points": np.full((1, 1, 1), 2 ** (work.bits - 1), np.uint8),
        "offsets": np.zeros((1, 1, 1), np.float32),
        "bias": np.zeros(work.n, np.float32),
        "plan": plan.tensor(),
    }
    names = ["x", "codes", "scales", *rest]
    node = helper.make_node("MatMul", names, ["y"], domain="msd", layout=LAYOUT, output_dtype=TensorProto.FLOAT)
    tensors = [_random("codes", TensorProto.UINT8, shape), _scales(shape[0], 1 if work.per_channel else shape[1], 16)]
    return _model(work, [node], tensors + [numpy_helper.from_array(array, name) for name, array in rest.items()])


def _float_weight(job: Product) -> onnx.ModelProto:
    work = job.work
    weight = np.random.default_rng(0).standard_normal((work.k, work.n), dtype=np.float32)
    return _model(work, [helper.make_node("MatMul", ["x", "w"], ["y"])], [numpy_helper.from_array(weight, "w")])


def _random(name: str, data_type: int, shape: Sequence[int], bits: int = 8) -> TensorProto:
    """Codes over their whole range."""
    content = np.random.default_rng(0).bytes(math.prod(shape) * bits // 8)
    return TensorProto(name=name, data_type=data_type, dims=shape, raw_data=content)


def _scales(*shape: int) -> TensorProto:
    return numpy_helper.from_array(np.full(shape, _SCALE), "scales")


def _model(work: LinearWork, nodes: list[onnx.NodeProto], tensors: list[TensorProto]) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    inputs, outputs = [value("x", TensorProto.FLOAT, ["M", work.k])], [value("y", TensorProto.FLOAT, ["M", work.n])]
    graph = helper.make_graph(nodes, "layer", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=_OPSETS, ir_version=10)


@open_layer.register
def _(job: Step) -> onnxruntime.InferenceSession:
    model = _group_query_attention(job.work)
    if job.way is Way.MSD:
        rewritten = api.compile(model, overrides=[f"{_NODE}=2"], verify=False).model  # whatever it is predicted to gain
        return open_session(rewritten, portable=False)
    return open_session(model)


@bind.register
def _(job: Step, session: onnxruntime.InferenceSession) -> Bound:
    work, rng = job.work, np.random.default_rng(0)
    feed = {"query": rng.standard_normal((job.batch, job.tokens, work.heads * work.head_size), dtype=np.float32)}
    for name in ("key", "value"):
        shape = (job.batch, job.tokens, work.kv_heads * work.head_size)
        feed[name] = rng.standard_normal(shape, dtype=np.float32)
        cache = (job.batch, work.kv_heads, job.context, work.head_size)
        feed[f"past_{name}"] = _random_cache(cache, work.bits, rng)
    feed["lengths"] = np.full(job.batch, job.context - 1, np.int32)
    feed["total"] = np.array([job.context], np.int32)
    return Bound(session, feed, in_place=_IN_PLACE)


def _random_cache(shape: tuple[int, ...], bits: int, rng: np.random.Generator) -> np.ndarray:
    if bits == 32:
        return rng.standard_normal(shape, dtype=np.float32)
    *most, columns = shape
    kept = (*most, columns * bits // 8)
    return np.frombuffer(rng.bytes(math.prod(kept)), np.int8 if bits == 8 else np.uint8).reshape(kept)


def _group_query_attention(work: AttentionWork) -> onnx.ModelProto:
    names = ["query", "key", "value", "past_key", "past_value", "lengths", "total"]
    attributes: dict[str, Any] = {"num_heads": work.heads, "kv_num_heads": work.kv_heads}
    stored = []
    wide, narrow = work.heads * work.head_size, work.kv_heads * work.head_size
    if work.bits != 32:
        names += [""] * 5 + ["key_scale", "value_scale"]
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": work.bits}
        stored = [numpy_helper.from_array(np.full(narrow, _SCALE), name) for name in ("key_scale", "value_scale")]
    outputs = ["y", *_IN_PLACE]
    node = helper.make_node("GroupQueryAttention", names, outputs, _NODE, domain="com.microsoft", **attributes)
    value, float_ = helper.make_tensor_value_info, TensorProto.FLOAT
    cache_type = {32: float_, 8: TensorProto.INT8, 4: TensorProto.UINT8}[work.bits]
    columns = work.head_size // 2 if work.bits == 4 else work.head_size
    inputs = [value("query", float_, ["B", "S", wide])]
    inputs += [value(name, float_, ["B", "S", narrow]) for name in ("key", "value")]
    inputs += [value(name, cache_type, ["B", work.kv_heads, "P", columns]) for name in _IN_PLACE.values()]
    inputs += [value("lengths", TensorProto.INT32, ["B"]), value("total", TensorProto.INT32, [1])]
    made = [value("y", float_, ["B", "S", wide])]
    made += [value(name, cache_type, ["B", work.kv_heads, "T", columns]) for name in _IN_PLACE]
    graph = helper.make_graph([node], "layer", inputs, made, stored)
    return helper.make_model(graph, opset_imports=_OPSETS[:2], ir_version=10)
