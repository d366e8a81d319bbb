"""Editing a model: nodes replaced, what became unused removed, everything else left byte for byte."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper, numpy_helper

from .errors import ModelError
from .linked import Scope
from .source import Source, graphs, scoped_graphs

FUNCTIONS_NEED_IR = 8
"""A model-local function needs this IR version or a later one."""

_OPSET_IF_NONE = 21
"""Default-domain opset for a model that imports none, all its ops being of other domains."""


class Edit:
    """A copy of a model in which nodes are replaced.

    New constants go to the main graph, which every nested graph sees, once for equal contents.

    Args:
        source: the model; it is not touched.
        store: puts an array away and returns the initializer that stands for it; None: which holds it itself.
    """

    def __init__(self, source: Source, store: Callable[[str, np.ndarray], TensorProto] | None = None):
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(source.proto)
        self.opset = source.opset
        self._store = store or _held
        self._graphs = graphs(self.proto)
        self._names = {name for graph in self._graphs for name in _names_of(graph)}
        self._declared = [{v.name for v in (*g.value_info, *g.output)} for g in self._graphs]
        self._constants: dict[bytes, str] = {}
        self._replacements: dict[int, dict[int, list[onnx.NodeProto]]] = {}
        self._renames: dict[int, dict[str, str]] = defaultdict(dict)
        self._reroutes: dict[int, dict[str, str]] = defaultdict(dict)
        self._undeclared: dict[int, set[str]] = defaultdict(set)

    @property
    def function_opset(self) -> int:
        """Default-domain opset that the functions added are inlined at."""
        return self.opset or min(onnx.defs.onnx_opset_version(), _OPSET_IF_NONE)

    def replace(self, scope: Scope, nodes: Iterable[gs.Node], by: list[onnx.NodeProto]) -> None:
        """Put ``by`` where the last of ``nodes`` stands and take all of ``nodes`` away.

        The new nodes keep what the first one says of its origin (torch's module paths are in a node's metadata).
        """
        positions = sorted(p for n in nodes if (p := scope.position(n)) is not None)
        for position in positions:
            _refuse_graphs(scope.proto.node[position])
        origin = scope.proto.node[positions[0]]
        for node in by:
            node.metadata_props.extend(origin.metadata_props)
            node.doc_string = origin.doc_string
        plan = self._replacements.setdefault(scope.index, {})
        plan.update({p: [] for p in positions})
        plan[positions[-1]] = by

    def declare(self, scope: Scope, name: str, element_type: int, shape: Sequence[int | str | None]) -> None:
        """State type and shape of a tensor if the file does not: what runtimes see of a function's result."""
        declared = self._declared[scope.index]
        if name not in declared:
            declared.add(name)
            value = helper.make_tensor_value_info(name, element_type, shape)
            self._graphs[scope.index].value_info.append(value)

    def undeclare(self, scope: Scope, name: str) -> None:
        """Forget what the file says of a tensor's type and shape: the edit changes it."""
        self._undeclared[scope.index].add(name)

    def constant(self, name: str, value: np.ndarray) -> str:
        """The name of an initializer that holds ``value``: a new one, or one made before with the same content."""
        digest = hashlib.sha256(f"{value.dtype} {value.shape} ".encode())
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        key = digest.digest()
        if key not in self._constants:
            unique = self.unique(name)
            self.proto.graph.initializer.append(self._store(unique, value))
            self._constants[key] = unique
        return self._constants[key]

    def unique(self, name: str) -> str:
        """``name``, or ``name`` with a number that no tensor or node has yet."""
        candidate, number = name, 1
        while candidate in self._names:
            number += 1
            candidate = f"{name}_{number}"
        self._names.add(candidate)
        return candidate

    def rename(self, scope: Scope, tensor: str, to: str) -> None:
        """Let all who read ``tensor`` read ``to``."""
        self._renames[scope.index][tensor] = to

    def reroute(self, scope: Scope, tensor: str, to: str) -> None:
        """Let the nodes of the model that read ``tensor`` read ``to``; not those that are new, and no graph output."""
        self._reroutes[scope.index][tensor] = to

    def signature(self, *names: str) -> list[onnx.ValueInfoProto]:
        """What the model says of those of its inputs and outputs, to be changed."""
        return [v for v in (*self.proto.graph.input, *self.proto.graph.output) if v.name in names]

    def bypass(self, scope: Scope, node: gs.Node, to: str) -> None:
        """Take a node away and let all who read its output read ``to``; a graph output keeps its name."""
        position = scope.position(node)
        assert position is not None
        _refuse_graphs(scope.proto.node[position])
        self._replacements.setdefault(scope.index, {})[position] = []
        self.rename(scope, str(node.outputs[0].name), to)

    def finish(self, functions: Sequence[tuple[onnx.FunctionProto, int]] = ()) -> onnx.ModelProto:
        """Apply the replacements, drop what only they used, and add the functions that the new nodes call.

        Args:
            functions: each with the version of its domain.
        """
        for index, reroutes in self._reroutes.items():
            _rename(self.proto, index, reroutes, outputs=False)
        suspects: set[tuple[int, str]] = set()
        made: set[tuple[int, str]] = set()
        for index in sorted(self._replacements, reverse=True):  # nested graphs before those around them
            graph, plan = self._graphs[index], self._replacements[index]
            nodes: list[onnx.NodeProto] = []
            for position, node in enumerate(graph.node):
                if position in plan:
                    suspects.update((index, name) for name in (*node.input, *node.output) if name)
                    nodes += plan[position]
                    made.update((index, name) for new in plan[position] for name in new.output)
                else:
                    nodes.append(node)
            _keep(graph.node, nodes)
        for index, names in self._undeclared.items():
            values = self._graphs[index].value_info
            _keep(values, [v for v in values if v.name not in names])
        for index, renames in self._renames.items():
            suspects.update((index, name) for name in renames)
            _rename(self.proto, index, renames)
        _drop_unused(self.proto, suspects - made)
        for function, version in functions:
            self.import_domain("", self.function_opset)
            self.import_domain(function.domain, version)
            self._define(function)
        self._raise_ir_version()
        return self.proto

    def import_domain(self, domain: str, version: int) -> None:
        """See that the model imports a domain whose ops the new nodes use."""
        if not any((o.domain or "ai.onnx") == (domain or "ai.onnx") for o in self.proto.opset_import):
            self.proto.opset_import.append(helper.make_opsetid(domain, version))

    def _define(self, function: onnx.FunctionProto) -> None:
        for known in self.proto.functions:
            if (known.domain, known.name) == (function.domain, function.name):
                if known != function:
                    raise ModelError(
                        f"the model already defines {function.domain}.{function.name} otherwise (another version wrote it); "
                        "compile the original model instead"
                    )
                return
        self.proto.functions.append(function)

    def _raise_ir_version(self) -> None:
        if self.proto.ir_version < 4:
            # Below IR 4 every initializer is also listed as an input; from 4 on that would make it replaceable.
            stored = {t.name for t in self.proto.graph.initializer}
            inputs = [i for i in self.proto.graph.input if i.name not in stored]
            del self.proto.graph.input[:]
            self.proto.graph.input.extend(inputs)
        self.proto.ir_version = max(self.proto.ir_version, FUNCTIONS_NEED_IR)


def _refuse_graphs(node: onnx.NodeProto) -> None:
    """See that a node that goes away holds no graph: none of the ops that do has one, and graphs are known by number."""
    if any(a.HasField("g") or a.graphs for a in node.attribute):
        name = node.name or next(iter(node.output), "")
        raise ModelError(f"{node.op_type} {name!r} holds a graph, and the op has no attribute that is one")


def _held(name: str, value: np.ndarray) -> TensorProto:
    return numpy_helper.from_array(value, name)


def _names_of(graph: onnx.GraphProto) -> Iterable[str]:
    for node in graph.node:
        yield node.name
        yield from node.output
    yield from (v.name for v in (*graph.input, *graph.output, *graph.initializer))


def _drop_unused(proto: onnx.ModelProto, suspects: set[tuple[int, str]]) -> None:
    """Remove the producers of ``suspects`` that nobody reads any more, and theirs in turn.

    A tensor that was unused before stays: it is none of our business. A name belongs to the innermost graph that
    defines it, so two branches may use one for two things.
    """
    scoped = scoped_graphs(proto)
    producers: dict[tuple[int, str], int] = {}
    defined: set[tuple[int, str]] = set()
    for index, (graph, _) in enumerate(scoped):
        producers.update(((index, name), p) for p, node in enumerate(graph.node) for name in node.output if name)
        defined.update((index, value.name) for value in (*graph.input, *graph.initializer))
    defined.update(producers)

    def owner(index: int, name: str) -> tuple[int, str]:
        at: int | None = index
        while at is not None and (at, name) not in defined:
            at = scoped[at][1]
        return index if at is None else at, name

    uses: Counter[tuple[int, str]] = Counter()
    for index, (graph, _) in enumerate(scoped):
        uses.update(owner(index, o.name) for o in graph.output)
        uses.update(owner(index, name) for node in graph.node for name in node.input if name)

    gone: list[set[str]] = [set() for _ in scoped]
    dead: list[set[int]] = [set() for _ in scoped]
    pending = [tensor for tensor in {owner(*s) for s in suspects} if uses[tensor] == 0]
    while pending:
        index, name = pending.pop()
        gone[index].add(name)
        position = producers.get((index, name))
        if position is None or position in dead[index]:
            continue
        node = scoped[index][0].node[position]
        if any(uses[index, o] for o in node.output) or any(a.HasField("g") for a in node.attribute):
            continue
        dead[index].add(position)
        for read in {owner(index, n) for n in node.input if n}:
            uses[read] -= sum(owner(index, n) == read for n in node.input)
            if uses[read] == 0:
                pending.append(read)

    for index in sorted(range(len(scoped)), reverse=True):  # a graph's messages move when those around it are kept
        graph = scoped[index][0]
        if dead[index]:
            _keep(graph.node, [n for p, n in enumerate(graph.node) if p not in dead[index]])
        if gone[index]:
            stored = {t.name for t in graph.initializer} & gone[index]
            for field in (graph.initializer, graph.input):
                if any(v.name in stored for v in field):
                    _keep(field, [v for v in field if v.name not in stored])
            if any(v.name in gone[index] for v in graph.value_info):
                _keep(graph.value_info, [v for v in graph.value_info if v.name not in gone[index]])


def _rename(proto: onnx.ModelProto, index: int, renames: dict[str, str], *, outputs: bool = True) -> None:
    """Change what the nodes of a graph, and of those nested in it that define no such name, read."""

    def final(name: str) -> str:
        seen = {name}
        while name in renames and renames[name] not in seen:
            name = renames[name]
            seen.add(name)
        return name

    scoped = scoped_graphs(proto)
    hidden: list[set[str] | None] = [None] * len(scoped)  # names that mean something else in a graph; None: not within
    for at, (graph, parent) in enumerate(scoped):
        own = {v.name for v in (*graph.input, *graph.initializer)} | {o for node in graph.node for o in node.output}
        if at == index:
            hidden[at] = set()
        elif parent is not None and hidden[parent] is not None:
            hidden[at] = (hidden[parent] or set()) | own
        masked = hidden[at]
        if masked is None:
            continue
        for node in graph.node:
            for i, name in enumerate(node.input):
                if name in renames and name not in masked:
                    node.input[i] = final(name)
        for output in graph.output if outputs else ():
            name = output.name
            if name in renames and name not in masked and final(name) != name:
                graph.node.add(op_type="Identity", input=[final(name)], output=[name], name=f"{name}/Identity")


def _keep(field, kept: list) -> None:  # type: ignore[no-untyped-def, type-arg]
    """Set a repeated field to some of its own messages."""
    copies = [type(message).FromString(message.SerializeToString()) for message in kept]
    del field[:]
    field.extend(copies)
