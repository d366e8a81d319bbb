"""A model as linked nodes and tensors, for reading: who produces what, who consumes it, what is constant.

graphsurgeon links the graph; the file itself is edited as a ModelProto (`edit`), for graphsurgeon's export loses
metadata, value infos and overloads. Node ``i`` of a linked graph is node ``i`` of its GraphProto.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from math import prod

import networkx as nx
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper, numpy_helper
from onnx_graphsurgeon.logger import G_LOGGER

from .errors import ModelError
from .source import Source, copy_fields, graphs, nbytes

G_LOGGER.severity = G_LOGGER.CRITICAL + 1
"""graphsurgeon prints what it cannot represent; nothing is exported through it, and what it cannot read it also raises."""

_SMALL = 1024
"""Bytes up to which a constant may say something about shapes."""


@dataclass(eq=False)
class Scope:
    """One graph of the model: the main one, or the body of an If, Loop or Scan."""

    index: int
    """Position of the graph in the order of `source.graphs`."""
    proto: onnx.GraphProto
    graph: gs.Graph
    parent: Scope | None
    constants: dict[str, TensorProto] = field(default_factory=dict)

    @cached_property
    def _positions(self) -> dict[int, int]:
        return {id(node): i for i, node in enumerate(self.graph.nodes)}

    def position(self, node: gs.Node) -> int | None:
        """Index of the node in this graph; None if it stands in another one."""
        return self._positions.get(id(node))

    @cached_property
    def flow(self) -> nx.DiGraph[int]:
        """The graph's nodes by position, each with an edge to those that it reads from."""
        flow: nx.DiGraph[int] = nx.DiGraph()
        flow.add_nodes_from(range(len(self.graph.nodes)))
        for position, node in enumerate(self.graph.nodes):
            producers = (self.position(p) for tensor in node.inputs for p in tensor.inputs)
            flow.add_edges_from((position, p) for p in producers if p is not None)
        return flow

    def constant(self, tensor: gs.Tensor | str) -> TensorProto | None:
        """The stored value of a tensor (initializer or ``Constant`` node, of this graph or one around it)."""
        name = tensor if isinstance(tensor, str) else tensor.name
        scope: Scope | None = self
        while scope is not None:
            if name in scope.constants:
                return scope.constants[name]
            scope = scope.parent
        return None


@dataclass(frozen=True)
class Linked:
    """A model's graphs, linked."""

    source: Source
    scopes: tuple[Scope, ...]

    @classmethod
    def of(cls, source: Source) -> Linked:
        """Link all graphs of a model.

        Raises:
            ModelError: the graph is malformed beyond what can be linked.
        """
        try:
            main = gs.import_onnx(_decodable(source.proto))
            scopes = tuple(_scopes(source.proto.graph, main, None, count()))
        except Exception as error:  # graphsurgeon has no list of what it raises on malformed graphs
            raise ModelError(f"{source.name}: the graph cannot be read: {error}") from error
        for scope in scopes:
            _refuse_second_definitions(source, scope)
            _refuse_cycles(source, scope)
        return cls(source, scopes)

    def nodes(self) -> Iterator[tuple[Scope, int, gs.Node]]:
        """All nodes with the graph and the position they stand at."""
        for scope in self.scopes:
            for position, node in enumerate(scope.graph.nodes):
                yield scope, position, node

    def array(self, scope: Scope, tensor: gs.Tensor) -> np.ndarray | None:
        """The value of a constant tensor, or None if it is not constant."""
        stored = scope.constant(tensor)
        return None if stored is None else self.source.array(stored)

    def shape(self, scope: Scope, tensor: gs.Tensor) -> list[int | str | None] | None:
        """The tensor's shape as the file declares or shape inference finds it; None if even the rank is unknown."""
        shape = tensor.shape
        at: Scope | None = scope
        while shape is None and at is not None:
            shape = self._inferred.get((at.index, tensor.name))
            at = at.parent
        return None if shape is None else [None if isinstance(d, int) and d < 0 else d for d in shape]

    def is_single(self, scope: Scope, tensor: gs.Tensor) -> bool:
        """Whether a tensor is known to hold one value."""
        stored = scope.constant(tensor)
        if stored is not None:
            return bool(prod(stored.dims) == 1)
        if tensor.inputs and tensor.inputs[0].op == "DynamicQuantizeLinear":  # its scale and zero point, where asked
            return True
        shape = self.shape(scope, tensor)
        return shape is not None and all(d == 1 for d in shape)

    @cached_property
    def _inferred(self) -> dict[tuple[int, str], list[int | str | None]]:
        """By graph and name: two branches may use a name for two things."""
        light = _without_weights(self.source.proto)
        try:
            inferred = onnx.shape_inference.infer_shapes(light)
        except Exception:  # GenAI's default-domain ops make it refuse the whole model; then nothing is known
            return {}
        return {
            (index, value.name): [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in shape.dim]
            for index, graph in enumerate(graphs(inferred))
            for value in (*graph.value_info, *graph.output, *graph.input)
            if value.type.tensor_type.HasField("shape")
            for shape in [value.type.tensor_type.shape]
        }


def _refuse_second_definitions(source: Source, scope: Scope) -> None:
    """See that a name stands for one tensor: who reads it would get one, and who removes what is unused the other.

    Constants may share one, for onnxruntime takes them so, and its own tools have written it.

    Raises:
        ModelError: a node writes what another one, a constant or an input is called.
    """
    stored = {t.name for t in scope.proto.initializer}
    computed = {v.name for v in scope.proto.input} - stored
    for node in scope.proto.node:
        is_constant = node.op_type == "Constant"
        for name in filter(None, node.output):
            if name in computed or (name in stored and not is_constant):
                raise ModelError(
                    f"{source.name}: {node.op_type} {(node.name or name)!r} writes {name!r}, "
                    "which is the name of another tensor"
                )
            (stored if is_constant else computed).add(name)


def optional_input(node: gs.Node, index: int) -> gs.Tensor | None:
    """An input of a node, None if it is absent."""
    if index >= len(node.inputs) or node.inputs[index].is_empty():
        return None
    return node.inputs[index]


def stated_type(tensor: gs.Tensor) -> int | None:
    """TensorProto type that the file, or shape inference, states of a tensor; None if none is."""
    return None if tensor.dtype is None else int(helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)))


def _refuse_cycles(source: Source, scope: Scope) -> None:
    """See that no node waits for itself: whoever follows a graph upstream must come to an end.

    Raises:
        ModelError: one does.
    """
    flow = scope.flow
    if not nx.is_directed_acyclic_graph(flow):
        position, _ = nx.find_cycle(flow)[0][:2]
        node = scope.graph.nodes[position]
        name = node.name or (node.outputs[0].name if node.outputs else "")
        raise ModelError(f"{source.name}: node {name!r} ({node.op}) depends on its own output")


def _scopes(proto: onnx.GraphProto, graph: gs.Graph, parent: Scope | None, indices: Iterator[int]) -> Iterator[Scope]:
    scope = Scope(next(indices), proto, graph, parent)
    scope.constants.update((t.name, t) for t in proto.initializer)
    yield scope
    for proto_node, node in zip(proto.node, graph.nodes, strict=True):
        if proto_node.op_type == "Constant" and proto_node.output:
            value = _constant_node_value(proto_node)
            if value is not None:
                scope.constants[proto_node.output[0]] = value
        for attribute in proto_node.attribute:
            if attribute.HasField("g"):
                yield from _scopes(attribute.g, node.attrs[attribute.name], scope, indices)


def _constant_node_value(node: onnx.NodeProto) -> TensorProto | None:
    for attribute in node.attribute:
        if attribute.name == "value":
            return attribute.t
        if attribute.name in ("value_float", "value_floats"):
            return numpy_helper.from_array(np.array(helper.get_attribute_value(attribute), np.float32))
        if attribute.name in ("value_int", "value_ints"):
            return numpy_helper.from_array(np.array(helper.get_attribute_value(attribute), np.int64))
    return None


def _decodable(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model without string attributes that hold no text (compiled blobs), which graphsurgeon cannot import."""
    if all(_is_text(attribute.s) for attribute in _attributes(proto)):
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for attribute in _attributes(copy):
        if not _is_text(attribute.s):
            attribute.s = b""
    return copy


def _attributes(proto: onnx.ModelProto) -> Iterator[onnx.AttributeProto]:
    for body in (*graphs(proto), *proto.functions):
        for node in body.node:
            yield from node.attribute


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose large initializers keep type and shape only: all that shape inference asks of them."""
    light = onnx.ModelProto()
    copy_fields(proto, light, but="graph")
    copy_fields(proto.graph, light.graph, but="initializer")
    for tensor in proto.graph.initializer:
        if prod(tensor.dims) * 8 <= _SMALL and nbytes(tensor) <= _SMALL:
            light.graph.initializer.append(tensor)
        else:
            light.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    for graph in graphs(light):
        for value in (*graph.input, *graph.output, *graph.value_info):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_value < 0:  # some exporters' unknown; shape inference may abort the process on it
                    dim.ClearField("dim_value")
    return light
