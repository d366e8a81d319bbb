"""Constants that onnxruntime has no kernel to dequantize (float4, float8e8m0 scales, TensorRT's names), in a form that it has one for.

An oracle gets the floats that they mean. In a result, what no rewrite took (an embedding, a layer that is kept) becomes int8
codes with float32 scales, which mean the same to the bit: twice a float4 is an integer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from .build import NodeBuilder
from .constant_values import DEQUANTIZER_DOMAINS, DEQUANTIZERS, constant_value
from .edit import Edit
from .inline import inlined
from .linked import Linked, Scope, optional_input
from .save import weight_bytes
from .source import Source, graphs, nbytes, stored_tensors

_UNKNOWN_TYPES = frozenset({TensorProto.FLOAT4E2M1, TensorProto.FLOAT8E8M0})
"""Element types that onnxruntime 1.20 to 1.32 has no CPU kernel for (Cast, DequantizeLinear)."""

_UNKNOWN_DOMAINS = frozenset({"trt", "msd"})

_BLOCKS_NEED_OPSET = 21
"""Before, DequantizeLinear has no blocks."""

Store = Callable[[str, np.ndarray], TensorProto]


def with_float_constants(source: Source) -> Source:
    """The model with a float constant in place of each such DequantizeLinear or Cast of constants; itself if it has none.

    Raises:
        ModelError: the model's graph, functions or constants cannot be read.
    """
    return _changed(source, _as_floats, None)


def with_int8_constants(source: Source, store: Store | None = None) -> Source:
    """The model with a DequantizeLinear of int8 codes in place of each such one; itself if it has none.

    Below opset 21, where none has blocks, with a float constant.

    Args:
        store: see `Edit`.

    Raises:
        ModelError: as for `with_float_constants`.
    """
    return _changed(source, _as_int8 if source.opset >= _BLOCKS_NEED_OPSET else _as_floats, store)


def bytes_with_float_constants(source: Source) -> int:
    """Bytes of all tensors that the model of `with_float_constants` stores, about."""
    four_bits = (t for t in stored_tensors(source.proto) if t.data_type == TensorProto.FLOAT4E2M1)
    return weight_bytes(source.proto) + sum(8 * nbytes(t) for t in four_bits)


_Change = Callable[[Linked, Scope, gs.Node, Edit], None]


def _changed(source: Source, change: _Change, store: Store | None) -> Source:
    if not _may_have_such(source):
        return source
    flat = inlined(source)
    linked, edit = Linked.of(flat), Edit(flat, store)
    found = [(scope, node) for scope, _, node in linked.nodes() if _is_such(node, scope)]
    for scope, node in found:
        change(linked, scope, node, edit)
    return replace(flat, proto=edit.finish()) if found else source


def _may_have_such(source: Source) -> bool:
    nodes = (n for body in (*graphs(source.proto), *source.proto.functions) for n in body.node)
    return any(t.data_type in _UNKNOWN_TYPES for t in stored_tensors(source.proto)) or any(
        n.op_type in DEQUANTIZERS and n.domain in _UNKNOWN_DOMAINS for n in nodes
    )


def _is_such(node: gs.Node, scope: Scope) -> bool:
    domain = node.domain or ""
    if node.op not in (*DEQUANTIZERS, "Cast") or domain not in DEQUANTIZER_DOMAINS:
        return False
    stored = [scope.constant(t) for t in node.inputs if not t.is_empty()]
    return domain in _UNKNOWN_DOMAINS or any(t is not None and t.data_type in _UNKNOWN_TYPES for t in stored)


def _as_floats(linked: Linked, scope: Scope, node: gs.Node, edit: Edit) -> None:
    value = constant_value(node.outputs[0], scope, linked)
    if value is None:
        return
    if node.op == "Cast":
        edit.bypass(scope, node, edit.constant(str(node.outputs[0].name), value))
        return
    build = NodeBuilder(edit, str(node.outputs[0].name))
    _finish(build.constant("dequantized", value), scope, node, edit, build)


def _as_int8(linked: Linked, scope: Scope, node: gs.Node, edit: Edit) -> None:
    stored = scope.constant(node.inputs[0])
    if node.op == "Cast" or stored is None:
        _as_floats(linked, scope, node, edit)
        return
    scales = constant_value(node.inputs[1], scope, linked)
    if scales is None:
        return
    build = NodeBuilder(edit, str(node.outputs[0].name))
    names = [str(t.name) for t in (node.inputs[0], optional_input(node, 2)) if t is not None]
    scales = scales.astype(np.float32)
    if stored.data_type == TensorProto.FLOAT4E2M1:
        arrays = [linked.array(scope, t) for t in (node.inputs[0], optional_input(node, 2)) if t is not None]
        names = [build.constant("codes", (2 * a.astype(np.float32)).astype(np.int8)) for a in arrays if a is not None]
        scales = scales * np.float32(0.5)
    # counted from the back, for then onnxruntime does not fuse it with a product that rounds activations to int8
    axis, block_size = int(node.attrs.get("axis", 1)), int(node.attrs.get("block_size", 0))
    attributes: dict[str, Any] = {"axis": axis - len(stored.dims) if axis >= 0 else axis}
    attributes |= {"block_size": block_size} if block_size else {}
    codes, *zero_points = names
    made = build.node("DequantizeLinear", codes, build.constant("scales", scales), *zero_points, **attributes)
    _finish(made, scope, node, edit, build)


def _finish(made: str, scope: Scope, node: gs.Node, edit: Edit, build: NodeBuilder) -> None:
    """Let a float32 tensor take the node's place, in the type that it produces."""
    element_type = _produced_type(scope, node)
    if element_type != TensorProto.FLOAT:
        made = build.node("Cast", made, to=element_type)
    if build.nodes:
        edit.replace(scope, [node], build.finish(str(node.outputs[0].name)))
    else:
        edit.bypass(scope, node, made)


def _produced_type(scope: Scope, node: gs.Node) -> int:
    """What a DequantizeLinear produces: as it says, or its scales' type."""
    asked = int(node.attrs.get("output_dtype", 0))
    at, tensor = 0, node.inputs[1]
    while not asked and at < 3:  # a cast, a dequantization
        stored = scope.constant(tensor)
        if stored is not None:
            return int(stored.data_type)
        producer = tensor.inputs[0] if tensor.inputs else None
        if producer is None:
            break
        asked = int(producer.attrs.get("to" if producer.op == "Cast" else "output_dtype", 0))
        tensor, at = producer.inputs[min(1, len(producer.inputs) - 1)], at + 1
    return asked or int(TensorProto.FLOAT)
