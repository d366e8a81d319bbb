"""A small decoder of Llama's shape with low-bit weights and a KV cache, built from a seed: the demo's model.

``python models/tiny_llama.py -o msd_compiler/data`` writes the file that the package carries.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs

FILE = "tiny_llama.onnx"
OPSET = 21
IR_VERSION = 10

Format = Literal["int4", "int8"]
"""How a layer's weights are stored: ``MatMulNBits`` in blocks of 32, or ``DequantizeLinear -> MatMul`` per column."""


@dataclass(frozen=True)
class Parameters:
    """What the model is made of."""

    hidden: int = 256
    intermediate: int = 300
    """No multiple of 32: the last block of every ``down_proj`` is a short one."""
    heads: int = 8
    kv_heads: int = 4
    head_size: int = 32
    vocabulary: int = 512
    formats: tuple[Format, ...] = ("int4", "int4", "int8", "int4")
    """One entry per layer. The head is int8 and shares its codes with the embedding."""
    rope_theta: float = 10000.0
    epsilon: float = 1e-6
    loud_channels: int = 2
    """Channels that each norm makes 20 to 60 times louder, as in trained models: one sets the step of its whole block."""
    seed: int = 0


class Numbers:
    """Random numbers that are the same on every machine: NumPy's frozen generator, additions, no libm."""

    def __init__(self, seed: int):
        self._source = np.random.RandomState(seed)

    def bell(self, *shape: int) -> np.ndarray:
        """Sums of four uniform numbers: bell-shaped, mean 0, variance 1, float32."""
        a, b, c, d = self._source.random_sample((4, *shape))
        numbers: np.ndarray = ((a + b) + (c + d) - 2.0) * 3.0**0.5
        return numbers.astype(np.float32)

    def norm(self, size: int, loud: int) -> np.ndarray:
        """A norm's weight: near 1/4, so that what leaves it is about 1 in RMS, but for ``loud`` channels."""
        weight = (1.0 + 0.1 * self.bell(size)) / 4
        channels = self._source.permutation(size)[:loud]
        weight[channels] *= (20.0 + 40.0 * self._source.random_sample(loud)).astype(np.float32)
        return weight.astype(np.float32)


def quantize_blocks(weight: np.ndarray, block: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Round a weight to 4 bits with one scale per block along K and no zero points.

    Args:
        weight: ``[K, N]`` float32.
        block: steps of K that share a scale, even; the last block may be shorter.

    Returns:
        ``[N, blocks, block / 2]`` uint8, two codes a byte, the first in the low half, 8 means 0; ``[N, blocks]`` float32.

    Source: com.microsoft.MatMulNBits. As in onnxruntime's quantizer the largest magnitude of a block becomes code 0.
    """
    k, n = weight.shape
    blocks = -(-k // block)
    padded = np.pad(weight, ((0, blocks * block - k), (0, 0))).T.reshape(n, blocks, block)
    extreme = np.take_along_axis(padded, np.abs(padded).argmax(axis=2, keepdims=True), axis=2)
    scale = extreme / np.float32(-8)
    codes = np.clip(np.rint(padded / scale) + 8, 0, 15).astype(np.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scale[..., 0]


def quantize_channels(weight: np.ndarray, *, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Round a weight to int8 in [-127, 127] with one float32 scale per slice of ``axis``."""
    scale = np.abs(weight).max(axis=1 - axis, keepdims=True) / np.float32(127)
    return np.rint(weight / scale).astype(np.int8), scale.reshape(-1)


class Graph:
    """A graph under construction: names as exporters give them, constants where they are used."""

    def __init__(self, name: str):
        self._graph = gs.Graph(name=name, opset=OPSET, import_domains=_opsets(), ir_version=IR_VERSION)
        self._path = ""
        self._names: Counter[str] = Counter()

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Nodes made inside are named below ``name``."""
        outer, self._path = self._path, f"{self._path}/{name}"
        yield
        self._path = outer

    def input(self, name: str, dtype: type, *shape: int | str) -> gs.Variable:
        """An input of the model."""
        tensor = gs.Variable(name, dtype, shape)
        self._graph.inputs.append(tensor)
        return tensor

    def output(self, tensor: gs.Variable, name: str, *shape: int | str) -> None:
        """Make a tensor a float32 output of the model."""
        tensor.name = name
        self._graph.outputs.append(self.shaped(tensor, *shape))

    @staticmethod
    def shaped(tensor: gs.Variable, *shape: int | str) -> gs.Variable:
        """A float32 tensor whose shape goes into the file, where shape inference would not find it."""
        tensor.dtype, tensor.shape = np.float32, shape
        return tensor

    def weight(self, name: str, values: np.ndarray) -> gs.Constant:
        """A stored tensor, named below the scope."""
        return gs.Constant(f"{self._path[1:].replace('/', '.')}.{name}", values)

    def op(
        self, op: str, *inputs: gs.Tensor | np.ndarray | np.generic, domain: str | None = None, **attrs: Any
    ) -> gs.Variable:
        """Append a node with one output. Arrays among the inputs become constants."""
        name = f"{self._path}/{op}"
        count = self._names[name]
        self._names[name] += 1
        name = f"{name}_{count}" if count else name
        tensors = [
            i if isinstance(i, gs.Tensor) else gs.Constant(f"{name}/constant_{at}", np.asarray(i))
            for at, i in enumerate(inputs)
        ]
        output = gs.Variable(f"{name}_output_0")
        self._graph.nodes.append(gs.Node(op, name, attrs, tensors, [output], domain=domain))
        return output

    def finish(self) -> onnx.ModelProto:
        """The model, checked."""
        model = gs.export_onnx(self._graph)
        model.producer_name, model.producer_version = "models/tiny_llama.py", "1"
        onnx.checker.check_model(model, full_check=False)
        return model


def _ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def _opsets() -> list[onnx.OperatorSetIdProto]:
    return [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid("com.microsoft", 1)]


@dataclass(frozen=True)
class Positions:
    """What all layers share: the angles of the rotary embedding, and which query may see which key."""

    cos: gs.Variable
    """``[batch, 1, sequence, head_size]``, like ``sin``."""
    sin: gs.Variable
    mask: gs.Variable
    """``[batch, 1, sequence, total_sequence]``: 0, or the least float32."""


def build(p: Parameters | None = None) -> onnx.ModelProto:
    """Build the model.

    Inputs: ``input_ids`` and ``position_ids`` int64 ``[batch, sequence]``, ``attention_mask`` int64
    ``[batch, total_sequence]`` (0: padding), ``past_key_values.{i}.key`` and ``.value`` float32
    ``[batch, kv_heads, past_sequence, head_size]``. Outputs: ``logits`` and ``present.{i}.key`` and ``.value``.
    """
    p = p or Parameters()
    g, random = Graph("tiny_llama"), Numbers(p.seed)
    ids = g.input("input_ids", np.int64, "batch", "sequence")
    attention_mask = g.input("attention_mask", np.int64, "batch", "total_sequence")
    position_ids = g.input("position_ids", np.int64, "batch", "sequence")
    cache = ("batch", p.kv_heads, "past_sequence", p.head_size)
    past = [
        (
            g.input(f"past_key_values.{i}.key", np.float32, *cache),
            g.input(f"past_key_values.{i}.value", np.float32, *cache),
        )
        for i in range(len(p.formats))
    ]

    presents = []
    with g.scope("model"):
        with g.scope("embed_tokens"):
            table = _dequantized(g, random.bell(p.vocabulary, p.hidden), axis=0)
            x = g.op("Gather", table, ids, axis=0)
        positions = _positions(g, p, ids, position_ids, attention_mask)
        for i, stored in enumerate(p.formats):
            with g.scope(f"layers.{i}"):
                x, present = _layer(g, p, random, stored, x, past[i], positions)
            presents.append(present)
        x = _rms_norm(g, p, random, "norm", x)
    with g.scope("lm_head"):
        logits = g.op("MatMul", x, g.op("Transpose", table, perm=[1, 0]))

    g.output(logits, "logits", "batch", "sequence", p.vocabulary)
    for i, (key, value) in enumerate(presents):
        g.output(key, f"present.{i}.key", "batch", p.kv_heads, "total_sequence", p.head_size)
        g.output(value, f"present.{i}.value", "batch", p.kv_heads, "total_sequence", p.head_size)
    return g.finish()


def _positions(
    g: Graph, p: Parameters, ids: gs.Variable, position_ids: gs.Variable, attention_mask: gs.Variable
) -> Positions:
    with g.scope("rotary_emb"):
        frequencies = (p.rope_theta ** -(np.arange(0, p.head_size, 2) / p.head_size)).astype(np.float32)
        position = g.op("Unsqueeze", g.op("Cast", position_ids, to=onnx.TensorProto.FLOAT), _ints(1, 3))
        half = g.op("Mul", position, g.weight("inv_freq", frequencies))
        angles = g.op("Concat", half, half, axis=-1)
        cos, sin = g.op("Cos", angles), g.op("Sin", angles)
    with g.scope("causal_mask"):
        # What a query may see goes by its place in the cache, not by position_ids: those are shifted by padding.
        total = g.op("Squeeze", g.op("Shape", attention_mask, start=1))
        new = g.op("Squeeze", g.op("Shape", ids, start=1))
        keys = g.op("Range", np.int64(0), total, np.int64(1))
        queries = g.op("Unsqueeze", g.op("Range", g.op("Sub", total, new), total, np.int64(1)), _ints(1))
        causal = g.op("LessOrEqual", keys, queries)
        present = g.op("Unsqueeze", g.op("Cast", attention_mask, to=onnx.TensorProto.BOOL), _ints(1, 2))
        visible = g.op("And", causal, present)
        mask = g.op("Where", visible, np.float32(0), np.finfo(np.float32).min)
    return Positions(cos, sin, mask)


def _layer(
    g: Graph,
    p: Parameters,
    random: Numbers,
    stored: Format,
    x: gs.Variable,
    past: tuple[gs.Variable, gs.Variable],
    positions: Positions,
) -> tuple[gs.Variable, tuple[gs.Variable, gs.Variable]]:
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``; and the layer's cache."""

    def linear(name: str, x: gs.Variable, n: int, k: int) -> gs.Variable:
        with g.scope(name):
            weight = random.bell(k, n) / np.float32(k**0.5)
            if stored == "int4":
                codes, scale = quantize_blocks(weight)
                tensors = g.weight("weight_Q4", codes), g.weight("weight_scales", scale)
                attrs = {"K": k, "N": n, "accuracy_level": 4, "bits": 4, "block_size": 32}
                y = g.op("MatMulNBits", x, *tensors, domain="com.microsoft", **attrs)
            else:
                y = g.op("MatMul", x, _dequantized(g, weight, axis=1))
        return g.shaped(y, "batch", "sequence", n)

    def split(x: gs.Variable, heads: int) -> gs.Variable:
        return g.op("Transpose", g.op("Reshape", x, _ints(0, 0, heads, p.head_size)), perm=[0, 2, 1, 3])

    def rotate(x: gs.Variable) -> gs.Variable:
        middle, end, last = _ints(p.head_size // 2), _ints(p.head_size), _ints(3)
        first, second = g.op("Slice", x, _ints(0), middle, last), g.op("Slice", x, middle, end, last)
        turned = g.op("Concat", g.op("Neg", second), first, axis=-1)
        return g.op("Add", g.op("Mul", x, positions.cos), g.op("Mul", turned, positions.sin))

    def repeat(x: gs.Variable) -> gs.Variable:
        copies = g.op("Expand", g.op("Unsqueeze", x, _ints(2)), _ints(1, 1, p.heads // p.kv_heads, 1, 1))
        return g.op("Reshape", copies, _ints(0, p.heads, -1, p.head_size))

    normed = _rms_norm(g, p, random, "input_layernorm", x)
    with g.scope("self_attn"):
        q = rotate(split(linear("q_proj", normed, p.heads * p.head_size, p.hidden), p.heads))
        k = rotate(split(linear("k_proj", normed, p.kv_heads * p.head_size, p.hidden), p.kv_heads))
        v = split(linear("v_proj", normed, p.kv_heads * p.head_size, p.hidden), p.kv_heads)
        key, value = g.op("Concat", past[0], k, axis=2), g.op("Concat", past[1], v, axis=2)
        scores = g.op("MatMul", q, g.op("Transpose", repeat(key), perm=[0, 1, 3, 2]))
        scores = g.op("Mul", scores, np.float32(p.head_size**-0.5))
        weights = g.op("Softmax", g.op("Add", scores, positions.mask), axis=-1)
        mixed = g.op("Transpose", g.op("MatMul", weights, repeat(value)), perm=[0, 2, 1, 3])
        mixed = g.op("Reshape", mixed, _ints(0, 0, p.heads * p.head_size))
        mixed = g.shaped(mixed, "batch", "sequence", p.heads * p.head_size)
        attended = linear("o_proj", mixed, p.hidden, p.heads * p.head_size)
    x = g.op("Add", x, attended)

    normed = _rms_norm(g, p, random, "post_attention_layernorm", x)
    with g.scope("mlp"):
        gate = linear("gate_proj", normed, p.intermediate, p.hidden)
        up = linear("up_proj", normed, p.intermediate, p.hidden)
        silu = g.op("Mul", gate, g.op("Sigmoid", gate))
        down = linear("down_proj", g.op("Mul", silu, up), p.hidden, p.intermediate)
    return g.op("Add", x, down), (key, value)


def _rms_norm(g: Graph, p: Parameters, random: Numbers, name: str, x: gs.Variable) -> gs.Variable:
    with g.scope(name):
        mean = g.op("ReduceMean", g.op("Pow", x, np.float32(2)), _ints(-1), keepdims=1)
        root = g.op("Sqrt", g.op("Add", mean, np.float32(p.epsilon)))
        scaled = g.op("Mul", x, g.op("Reciprocal", root))
        return g.op("Mul", scaled, g.weight("weight", random.norm(p.hidden, p.loud_channels)))


def _dequantized(g: Graph, weight: np.ndarray, *, axis: int) -> gs.Variable:
    codes, scale = quantize_channels(weight, axis=axis)
    # Zero points of 0 say nothing, but onnxruntime 1.20 moves the node and takes its absent ones for uint8.
    zero_points = g.weight("weight_zero_point", np.zeros_like(scale, np.int8))
    return g.op(
        "DequantizeLinear", g.weight("weight_int8", codes), g.weight("weight_scale", scale), zero_points, axis=axis
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Write ``tiny_llama.onnx`` into a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="made if it does not exist")
    parser.add_argument("--seed", type=int, default=Parameters.seed)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / FILE
    path.write_bytes(build(Parameters(seed=options.seed)).SerializeToString(deterministic=True))
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
