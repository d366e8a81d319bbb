"""Massive activations in any float decoder: chosen channels far louder, and the same function.

``python models/massive.py MODEL -o OUT --factor 300`` multiplies a few entries of every norm's gain and divides what the layers
behind it multiply them by. In float32 nothing else changes. Trained models of some size have such channels; this gives them to a
small one, so that onnxruntime issue 29849 can be seen on it: rounded to 8 bits beside a channel 300 times as large, the others
of its block are gone. ``--quantize`` then rounds weights as users do, in ``MatMulNBits`` of accuracy level 4.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from msd_compiler import ModelError, Quantization
from msd_compiler.quantize import quantize
from msd_compiler.source import Source, load

LEVEL = 4
"""What onnxruntime-genai's builder writes for a CPU."""


@dataclass(frozen=True)
class Norm:
    """A gain and the layers that read what it scales, and nothing else."""

    node: onnx.NodeProto
    gain: np.ndarray
    layers: tuple[onnx.NodeProto, ...]


def with_massive_activations(
    model: onnx.ModelProto, factor: float, *, channels: int = 2, seed: int = 0
) -> onnx.ModelProto:
    """A copy of a model whose norms' outputs have channels ``factor`` times as large, and the layers behind them undo it.

    Args:
        model: float32, its weights embedded; a norm ends in ``Mul`` by a stored gain ``[K]``, and only ``MatMul`` with
            stored weights ``[K, N]``, transposed ones too, read its numbers.
        channels: of every norm.
        seed: which ones; the same for every factor.

    Raises:
        ModelError: the model has no such norm.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in copy.graph.initializer}
    found = list(norms(copy.graph, stored))
    if not found:
        raise ModelError("the model has no norm whose gain only MatMul with stored weights follow")
    choice = np.random.RandomState(seed)  # NumPy's frozen generator: the same channels everywhere
    for norm in found:
        scale = np.ones(norm.gain.size, np.float32)
        scale[choice.permutation(norm.gain.size)[:channels]] = factor
        _replace(copy.graph, norm.node, norm.gain.reshape(-1) * scale, "massive")
        for layer in norm.layers:
            weight = _weight(copy.graph, layer.input[1], stored)
            assert weight is not None
            _replace(copy.graph, layer, (weight / scale[:, None]).astype(np.float32), "massive", place=1)
    _drop_unread(copy.graph)
    return copy


def norms(graph: onnx.GraphProto, stored: dict[str, np.ndarray]) -> Sequence[Norm]:
    """What can be scaled, in graph order."""
    found = []
    outputs = {o.name for o in graph.output}
    for node in graph.node:
        gains = [stored[i] for i in node.input if i in stored and stored[i].ndim == 1 and stored[i].size > 1]
        if node.op_type != "Mul" or len(gains) != 1 or node.output[0] in outputs:
            continue
        readers = [n for n in graph.node if node.output[0] in n.input and n.op_type != "Shape"]
        weights = [_weight(graph, n.input[1], stored) for n in readers if n.op_type == "MatMul"]
        fits = [w is not None and w.ndim == 2 and len(w) == gains[0].size for w in weights]
        if readers and len(fits) == len(readers) and all(fits):
            found.append(Norm(node, gains[0], tuple(readers)))
    return found


def _weight(graph: onnx.GraphProto, name: str, stored: dict[str, np.ndarray]) -> np.ndarray | None:
    """A stored weight as the product sees it; None if it is not stored."""
    if name in stored:
        return stored[name]
    made = next((n for n in graph.node if name in n.output), None)
    if made is None or made.op_type != "Transpose" or made.input[0] not in stored:
        return None
    perm = next((list(a.ints) for a in made.attribute if a.name == "perm"), None)
    return stored[made.input[0]].transpose(perm)


def _replace(
    graph: onnx.GraphProto, node: onnx.NodeProto, values: np.ndarray, suffix: str, place: int | None = None
) -> None:
    """A node's stored input, or the one at ``place``, replaced by a tensor of its own, for others may read the old one."""
    names = {t.name for t in graph.initializer}
    if place is None:
        place = next(i for i, name in enumerate(node.input) if name in names)
    name = f"{node.output[0]}.{suffix}"
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values, np.float32), name))
    node.input[place] = name


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Nodes and tensors that nothing reads any more."""
    while True:
        read = {i for n in graph.node for i in n.input} | {o.name for o in graph.output}
        inner = [a.g for n in graph.node for a in n.attribute if a.HasField("g")]
        read |= {i for g in inner for n in g.node for i in n.input} | {o.name for g in inner for o in g.output}
        nodes = [n for n in graph.node if not read.isdisjoint(n.output)]
        if len(nodes) == len(graph.node):
            break
        del graph.node[:]
        graph.node.extend(nodes)
    tensors = [t for t in graph.initializer if t.name in read]
    del graph.initializer[:]
    graph.initializer.extend(tensors)


def quantized(model: onnx.ModelProto, bits: int) -> onnx.ModelProto:
    """A float model with its weights rounded by onnxruntime's quantizer, in blocks of 32, at accuracy level 4.

    Raises:
        ModelError: it has no linear layers with float weights.
    """
    rounded, done = quantize(Source(model, Path()), Quantization(bits))
    if not done:
        raise ModelError("the model has no linear layers with float weights that can be rounded")
    result = onnx.ModelProto()
    result.CopyFrom(rounded.proto)
    for node in result.graph.node:
        if node.op_type == "MatMulNBits":
            node.attribute.append(helper.make_attribute("accuracy_level", LEVEL))
    return result


def main() -> None:
    """Write the model that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a float32 decoder with its weights embedded")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write")
    parser.add_argument("--factor", type=float, default=300.0, help="how much larger the channels become")
    parser.add_argument("--channels", type=int, default=2, help="of every norm")
    parser.add_argument("--seed", type=int, default=0, help="which channels")
    parser.add_argument("--quantize", type=int, choices=(4, 8), help="bits of the weights; without, they stay float")
    arguments = parser.parse_args()
    model = with_massive_activations(
        load(arguments.model).proto, arguments.factor, channels=arguments.channels, seed=arguments.seed
    )
    if arguments.quantize:
        model = quantized(model, arguments.quantize)
    arguments.output.write_bytes(model.SerializeToString(deterministic=True))
    print(arguments.output)


if __name__ == "__main__":
    main()
