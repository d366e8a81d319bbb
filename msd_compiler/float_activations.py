"""A model whose activations are rounded, without that rounding: its weights stay low-bit, its activations become float.

Integer ops are spelled out (`unfuse`); then every ``QuantizeLinear`` whose codes only move and end in a
``DequantizeLinear`` of the same scale and zero point goes, and that with it. So do TensorRT's roundings to FP8, MXFP8 and NVFP4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from .edit import Edit
from .linked import Linked, Scope, optional_input
from .source import Source
from .unfuse import everything, unfused

_MOVES = frozenset(
    {
        "Reshape",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Flatten",
        "Identity",
        "Slice",
        "Gather",
        "Split",
        "Expand",
        "Concat",
        "Tile",
    }
)
"""Ops that mean the same on codes and on the values that they stand for."""

_ALL_ARE_DATA = frozenset({"Concat"})
"""Those whose inputs are all data; of the others only the first is."""

_PRODUCTS = frozenset({"MatMul", "Gemm", "MatMulNBits"})

_ROUNDINGS = frozenset(
    {
        "QuantizeLinear",
        "DynamicQuantizeLinear",
        "TRT_FP4DynamicQuantize",
        "TRT_FP8QuantizeLinear",
        "TRT_MXFP8DynamicQuantize",
    }
)
_BACK = frozenset({"DequantizeLinear", "TRT_FP8DequantizeLinear", "TRT_MXFP8DequantizeLinear"})


@dataclass(frozen=True)
class _Rounding:
    """Where values become codes: ``QuantizeLinear`` or ``DynamicQuantizeLinear``."""

    node: gs.Node
    scale: gs.Tensor
    zero_point: gs.Tensor | None


def float_activations(linked: Linked) -> tuple[Source, dict[str, str]]:
    """The model without its activations' rounding, and by name of a product how its activation was rounded.

    What rounds a constant stays (it is a weight), and so does what leaves the model as codes or meets other codes on its
    way: a low-bit cache.
    """
    source = linked.source
    spelled, _ = unfused(linked, everything)
    if spelled is not source:
        linked = Linked.of(spelled)
    edit = Edit(spelled)
    dropped: dict[str, str] = {}
    is_changed = spelled is not source
    for scope in linked.scopes:
        roundings = _removable(scope, linked)
        is_changed = is_changed or bool(roundings)
        for codes, rounding in roundings.items():
            if rounding.node.outputs[0].name == codes:
                edit.rename(scope, codes, str(rounding.node.inputs[0].name))
        for node in scope.graph.nodes:
            if node.op in _BACK and node.inputs[0].name in roundings:
                edit.bypass(scope, node, str(node.inputs[0].name))
                rounding = roundings[node.inputs[0].name].node
                dropped.update((name, rounding.op) for name in _products_of(node.outputs[0]))
            elif any(t.name in roundings for t in node.outputs):
                for tensor in node.outputs:
                    edit.undeclare(scope, str(tensor.name))
    if not is_changed:
        return source, {}
    return replace(spelled, proto=edit.finish()), dropped


def _products_of(tensor: gs.Tensor) -> Iterator[str]:
    """Names of the products that a dequantized activation comes to, through what only moves it."""
    for node in tensor.outputs:
        if node.op in _PRODUCTS:
            yield str(node.name or node.outputs[0].name)
        elif node.op in (*_MOVES, "Cast"):
            for output in node.outputs:
                yield from _products_of(output)


def _removable(scope: Scope, linked: Linked) -> dict[str, _Rounding]:
    """By name the code tensors that may be float as well, each with the rounding that it comes from."""
    found: dict[str, _Rounding] = {}
    tensors: list[gs.Tensor] = []
    for node in scope.graph.nodes:  # in graph order, so that what a move reads is known
        rounding = _rounding(node) if node.op in _ROUNDINGS and scope.constant(node.inputs[0]) is None else None
        if rounding is not None:
            found[node.outputs[0].name] = rounding
            tensors.append(node.outputs[0])
        elif node.op in _MOVES:
            data = _data(node)
            first = found.get(data[0].name) if data else None
            if first and all(t.name in found and _same(scope, linked, found[t.name], first) for t in data):
                found.update((t.name, first) for t in node.outputs)
                tensors += node.outputs
    leaving = {t.name for t in scope.graph.outputs} | _read_within(scope, linked)
    while True:
        kept = {
            t.name for t in tensors if t.name in found and t.name not in leaving and _may_go(t, found, scope, linked)
        }
        if len(kept) == len(found):
            return found
        found = {name: rounding for name, rounding in found.items() if name in kept}


def _data(move: gs.Node) -> list[gs.Tensor]:
    return list(move.inputs if move.op in _ALL_ARE_DATA else move.inputs[:1])


def _may_go(tensor: gs.Tensor, found: dict[str, _Rounding], scope: Scope, linked: Linked) -> bool:
    """Whether all that is made of the codes, and all that they are made of, may be float."""
    rounding = found[tensor.name]
    producer = tensor.inputs[0]
    if producer.op in _MOVES and any(t.name not in found for t in _data(producer)):
        return False
    for node in tensor.outputs:
        if node.op in _BACK and node.inputs[0] is tensor:
            if not _same(scope, linked, rounding, _rounding_of(node)) or any(t is tensor for t in node.inputs[1:]):
                return False
        elif node.op in _MOVES:
            if any(t.name not in found for t in node.outputs):
                return False
        else:
            return False
    return True


def _rounding(node: gs.Node) -> _Rounding | None:
    """What a rounding divides by; None if what is made of it cannot be told."""
    if node.op in ("QuantizeLinear", "TRT_FP8QuantizeLinear"):
        return _rounding_of(node)
    scale, zero_point = node.outputs[1], node.outputs[2] if node.op == "DynamicQuantizeLinear" else None
    if node.op != "TRT_FP4DynamicQuantize":
        return _Rounding(node, scale, zero_point)
    users = scale.outputs  # NVFP4's scales are codes themselves
    return _Rounding(node, users[0].outputs[0], None) if len(users) == 1 and users[0].op in _BACK else None


def _rounding_of(node: gs.Node) -> _Rounding:
    """Scale and zero point of a QuantizeLinear or DequantizeLinear."""
    return _Rounding(node, node.inputs[1], optional_input(node, 2))


def _same(scope: Scope, linked: Linked, a: _Rounding, b: _Rounding) -> bool:
    return _equal(scope, linked, a.scale, b.scale) and _equal(scope, linked, a.zero_point, b.zero_point)


def _equal(scope: Scope, linked: Linked, a: gs.Tensor | None, b: gs.Tensor | None) -> bool:
    """Whether two tensors hold the same: they are one, or stored with equal values; an absent zero point is 0."""
    if a is b:
        return True
    values = [np.zeros(()) if t is None else linked.array(scope, t) for t in (a, b)]
    first, second = values
    return first is not None and second is not None and bool(np.array_equal(first.reshape(-1), second.reshape(-1)))


def _read_within(scope: Scope, linked: Linked) -> set[str]:
    """Names of this graph's tensors that graphs nested in it read."""
    inner = [s for s in linked.scopes if _is_within(s, scope)]
    return {str(t.name) for s in inner for node in s.graph.nodes for t in node.inputs} | {
        str(t.name) for s in inner for t in s.graph.outputs
    }


def _is_within(scope: Scope, outer: Scope) -> bool:
    at = scope.parent
    while at is not None:
        if at is outer:
            return True
        at = at.parent
    return False
