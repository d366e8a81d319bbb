"""A decoder of Llama's shape with seeded random low-bit weights, as exporters write it, in three spellings of its products.

Codes are drawn as codes: no weight is ever in memory as float32, and no more than one layer's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .spellings import DataFile, nbits_codes, onnx_codes, random_scales

EPSILON = 1e-6
ROPE_THETA = 10000.0

DEQUANTIZE = "DequantizeLinear -> MatMul"
LEVEL_0 = "MatMulNBits level 0"
LEVEL_4 = "MatMulNBits level 4"
LEVELS = {LEVEL_0: 0, LEVEL_4: 4}
SPELLINGS = (DEQUANTIZE, LEVEL_0, LEVEL_4)
"""How products are written; all mean the same, but level 4 allows the runtime to round activations to int8."""


@dataclass(frozen=True)
class Llama:
    """What the decoder is made of: by default 336 million parameters."""

    hidden: int = 1024
    layers: int = 24
    heads: int = 16
    kv_heads: int = 4
    intermediate: int = 2816
    vocabulary: int = 32000
    block: int = 32
    """Steps of K that share a scale."""
    positions: int = 4096
    """Tokens that the tables of the rotary embedding cover."""
    seed: int = 0

    @property
    def head_size(self) -> int:
        """Columns of a head."""
        return self.hidden // self.heads

    @property
    def weights(self) -> int:
        """Of all products: multiply-adds of a token."""
        return sum(item.k * item.n for item in _steps(self) if isinstance(item, Product))

    @property
    def parameters(self) -> int:
        """Of products, embedding and norms."""
        return self.weights + self.vocabulary * self.hidden + (2 * self.layers + 1) * self.hidden

    def stored_bytes(self, bits: int) -> int:
        """Of all products: codes, and a float32 scale per block and column."""
        return self.weights * bits // 8 + 4 * self.weights // self.block


@dataclass(frozen=True)
class Product:
    """A linear layer whose spelling is open."""

    name: str
    x: str
    k: int
    n: int

    @property
    def y(self) -> str:
        """What it gives."""
        return f"/{self.name.replace('.', '/')}/output_0"


def write(folder: Path, llama: Llama, bits: int) -> dict[str, Path]:
    """Write the decoder in every spelling; they share what they can of the data beside them.

    Inputs: ``input_ids`` int64 ``[batch, sequence]``, ``attention_mask`` int64 ``[batch, total_sequence]``,
    ``past_key_values.{i}.key`` and ``.value`` float32 ``[batch, kv_heads, past_sequence, head_size]``. Outputs: ``logits``
    float32 ``[batch, sequence, vocabulary]``, ``present.{i}.key`` and ``.value``.

    Returns:
        The model files by spelling.
    """
    source = np.random.RandomState(llama.seed)  # NumPy's frozen generator: the same bytes on every machine
    nodes: dict[str, list[onnx.NodeProto]] = {spelling: [] for spelling in SPELLINGS}
    tensors: dict[str, list[TensorProto]] = {spelling: [] for spelling in SPELLINGS}
    with ExitStack() as files:
        shared, blocked, nbits = (
            files.enter_context(DataFile(folder / f"{name}.data")) for name in ("shared", "dequantize", "nbits")
        )
        for tensor in _shared(llama, source, shared):
            for stored in tensors.values():
                stored.append(tensor)
        for item in _steps(llama):
            if not isinstance(item, Product):
                for spelled in nodes.values():
                    spelled.append(item)
                continue
            codes, scales = _drawn(source, item, llama.block, bits)
            for spelling, made in (
                (DEQUANTIZE, _dequantized(item, codes, scales, llama.block, bits, blocked)),
                *_nbits(item, codes, scales, llama.block, bits, nbits).items(),
            ):
                nodes[spelling] += made[0]
                tensors[spelling] += made[1]
    paths = {}
    for number, spelling in enumerate(SPELLINGS):
        paths[spelling] = folder / f"llama.{number}.onnx"
        paths[spelling].write_bytes(_model(llama, nodes[spelling], tensors[spelling]).SerializeToString())
    return paths


Spelled = tuple[list[onnx.NodeProto], list[TensorProto]]


def _drawn(source: np.random.RandomState, product: Product, block: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes ``[K, N]`` int8 over their whole range, scales ``[K / block, N]``."""
    k, n, top = product.k, product.n, 2 ** (bits - 1)
    codes = np.frombuffer(source.bytes(k * n), np.int8).reshape(k, n) >> (8 - bits)
    return codes, random_scales(source, k, 2 * top, k // block, n)


def _dequantized(
    product: Product, codes: np.ndarray, scales: np.ndarray, block: int, bits: int, data: DataFile
) -> Spelled:
    name = product.name
    data_type, content = onnx_codes(codes, bits)
    stored = [data.add(f"{name}.weight", data_type, codes.shape, content), data.add_floats(f"{name}.scales", scales)]
    inputs, w = [tensor.name for tensor in stored], f"{name}.dequantized"
    nodes = [
        helper.make_node("DequantizeLinear", inputs, [w], w, axis=0, block_size=block),
        helper.make_node("MatMul", [product.x, w], [product.y], name),
    ]
    return nodes, stored


def _nbits(
    product: Product, codes: np.ndarray, scales: np.ndarray, block: int, bits: int, data: DataFile
) -> dict[str, Spelled]:
    name = product.name
    packed = nbits_codes(codes, bits, block)
    stored = [
        data.add(f"{name}.weight", TensorProto.UINT8, packed.shape, packed),
        data.add_floats(f"{name}.scales", scales.T),
    ]
    inputs = [product.x, *(tensor.name for tensor in stored)]
    attributes = {"K": product.k, "N": product.n, "bits": bits, "block_size": block}
    return {
        spelling: (
            [
                helper.make_node(
                    "MatMulNBits",
                    inputs,
                    [product.y],
                    name,
                    domain="com.microsoft",
                    accuracy_level=level,
                    **attributes,
                )
            ],
            stored,
        )
        for spelling, level in LEVELS.items()
    }


def _shared(llama: Llama, source: np.random.RandomState, data: DataFile) -> Iterator[TensorProto]:
    """Embedding, norms and the tables of the rotary embedding."""
    embedding = source.random_sample((llama.vocabulary, llama.hidden)).astype(np.float32)
    yield data.add_floats("model.embed_tokens.weight", (embedding - np.float32(0.5)) * np.float32(12**0.5))
    names = [f"model.layers.{i}.{kind}_layernorm" for i in range(llama.layers) for kind in ("input", "post_attention")]
    for name in (*names, "model.norm"):
        yield data.add_floats(f"{name}.weight", (0.5 + source.random_sample(llama.hidden)).astype(np.float32))
    frequencies = ROPE_THETA ** -(np.arange(0, llama.head_size, 2) / llama.head_size)
    angles = np.outer(np.arange(llama.positions), frequencies)
    yield data.add_floats("cos_cache", np.cos(angles).astype(np.float32))
    yield data.add_floats("sin_cache", np.sin(angles).astype(np.float32))
    for name in ("one", "axis"):  # in the model, where shape inference looks for them
        yield numpy_helper.from_array(np.array([1]), name)
    yield numpy_helper.from_array(np.array(1), "index")


class _Steps:
    """Nodes in order, products without their spelling."""

    def __init__(self) -> None:
        self.all: list[onnx.NodeProto | Product] = []

    def op(self, op: str, inputs: list[str], *outputs: str, domain: str = "", **attributes: Any) -> str:
        """Append a node named after its first output, which is returned."""
        self.all.append(helper.make_node(op, inputs, list(outputs), outputs[0], domain=domain, **attributes))
        return outputs[0]

    def product(self, name: str, x: str, k: int, n: int) -> str:
        """Append a product; returns what it gives."""
        product = Product(name, x, k, n)
        self.all.append(product)
        return product.y

    def norm(self, name: str, residual: str, branch: str | None) -> tuple[str, str]:
        """Append an RMS norm of ``residual + branch``; returns what it gives, and that sum."""
        y, weight = f"{name}.y", f"{name}.weight"
        if branch is None:
            return self.op("SimplifiedLayerNormalization", [residual, weight], y, axis=-1, epsilon=EPSILON), residual
        inputs, total = [residual, branch, weight], f"{name}.sum"
        op, domain = "SkipSimplifiedLayerNormalization", "com.microsoft"
        return self.op(op, inputs, y, "", "", total, domain=domain, epsilon=EPSILON), total


def _steps(llama: Llama) -> list[onnx.NodeProto | Product]:
    steps, hidden, narrow = _Steps(), llama.hidden, llama.kv_heads * llama.head_size
    tokens = steps.op("ReduceSum", ["attention_mask", "axis"], "tokens", keepdims=0)
    last = steps.op("Cast", [steps.op("Sub", [tokens, "one"], "last")], "seqlens_k", to=TensorProto.INT32)
    length = steps.op("Gather", [steps.op("Shape", ["attention_mask"], "mask_shape"), "index"], "length", axis=0)
    total = steps.op("Cast", [length], "total_sequence_length", to=TensorProto.INT32)
    residual = steps.op("Gather", ["model.embed_tokens.weight", "input_ids"], "model.embed_tokens")
    branch = None
    for i in range(llama.layers):
        layer = f"model.layers.{i}"
        normed, residual = steps.norm(f"{layer}.input_layernorm", residual, branch)
        q = steps.product(f"{layer}.self_attn.q_proj", normed, hidden, hidden)
        k, v = (steps.product(f"{layer}.self_attn.{name}_proj", normed, hidden, narrow) for name in "kv")
        attended = steps.op(
            "GroupQueryAttention",
            [q, k, v, *_caches("past_key_values", i), last, total, "cos_cache", "sin_cache"],
            f"{layer}.attention",
            *_caches("present", i),
            domain="com.microsoft",
            num_heads=llama.heads,
            kv_num_heads=llama.kv_heads,
            do_rotary=1,
        )
        branch = steps.product(f"{layer}.self_attn.o_proj", attended, hidden, hidden)
        normed, residual = steps.norm(f"{layer}.post_attention_layernorm", residual, branch)
        gate, up = (steps.product(f"{layer}.mlp.{name}_proj", normed, hidden, llama.intermediate) for name in _GATED)
        silu = steps.op("Mul", [gate, steps.op("Sigmoid", [gate], f"{layer}.mlp.sigmoid")], f"{layer}.mlp.silu")
        mixed = steps.op("Mul", [silu, up], f"{layer}.mlp.mixed")
        branch = steps.product(f"{layer}.mlp.down_proj", mixed, llama.intermediate, hidden)
    normed, _ = steps.norm("model.norm", residual, branch)
    steps.op("Identity", [steps.product("lm_head", normed, hidden, llama.vocabulary)], "logits")
    return steps.all


_GATED = ("gate", "up")


def _caches(kind: str, layer: int) -> list[str]:
    return [f"{kind}.{layer}.{part}" for part in ("key", "value")]


def _model(llama: Llama, nodes: list[onnx.NodeProto], tensors: list[TensorProto]) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    inputs = [value("input_ids", TensorProto.INT64, ["batch", "sequence"])]
    inputs.append(value("attention_mask", TensorProto.INT64, ["batch", "total_sequence"]))
    outputs = [value("logits", TensorProto.FLOAT, ["batch", "sequence", llama.vocabulary])]
    for kind, values, length in (
        ("past_key_values", inputs, "past_sequence"),
        ("present", outputs, "total_sequence"),
    ):
        shape = ["batch", llama.kv_heads, length, llama.head_size]
        values += [value(name, TensorProto.FLOAT, shape) for i in range(llama.layers) for name in _caches(kind, i)]
    graph = helper.make_graph(nodes, "llama", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
