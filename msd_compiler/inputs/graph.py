"""A model as values and their uses: follow an input forward to the ops that read it, a size back to a constant."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeAlias

import onnx
from onnx import numpy_helper

MAX_NODES = 500_000  # indexed; calls of calls of functions could else grow without bound
MAX_DEPTH = 50
MAX_STEPS = 20_000  # followed from one input
MAX_CONSTANT = 64  # elements of a constant that is read as a shape or an axis

Shape: TypeAlias = tuple[int | str | None, ...]
"""Per axis a size, a symbol, or None where nothing is declared."""

SAME_NUMBERS = frozenset(
    {
        "Cast",
        "Identity",
        "Reshape",
        "Unsqueeze",
        "Squeeze",
        "Flatten",
        "Transpose",
        "Expand",
        "Tile",
        "Concat",
        "Slice",
        "Clip",
        "Split",
        "Where",
        "Min",
        "Max",
    }
)
SAME_SHAPE = frozenset(
    {
        "Cast",
        "Identity",
        "Clip",
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "Softmax",
        "Relu",
        "Tanh",
        "Sigmoid",
        "Gelu",
        "FastGelu",
        "Neg",
        "Sqrt",
        "Dropout",
        "LayerNormalization",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "RMSNormalization",
        "RotaryEmbedding",
    }
)
ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div"})
# op -> the slots of its left and right operand
PRODUCTS = {
    "MatMul": (0, 1),
    "MatMulInteger": (0, 1),
    "MatMulIntegerToFloat": (0, 1),
    "DynamicQuantizeMatMul": (0, 1),
    "FusedMatMul": (0, 1),
    "Gemm": (0, 1),
    "QLinearMatMul": (0, 3),
    "QGemm": (0, 3),
}
SEARCHES = frozenset({"BeamSearch", "GreedySearch", "Sampling", "WhisperBeamSearch"})


@dataclass(eq=False)
class Scope:
    """The names of one graph or of one call of a function."""

    parent: Scope | None = None
    tensors: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    producers: dict[str, Any] = field(default_factory=dict)
    uses: dict[str, list[Use]] = field(default_factory=lambda: defaultdict(list))
    actuals: dict[str, Value] = field(default_factory=dict)
    sizes: dict[tuple[str, int], int | None] = field(default_factory=dict)  # what `size_of` found already

    def home(self, name: str) -> Scope:
        """The scope that defines ``name``: this one or one around it."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.tensors or name in scope.producers or name in scope.shapes or name in scope.actuals:
                return scope
            scope = scope.parent
        return self


@dataclass(frozen=True)
class Value:
    """A tensor: its name and the scope that defines it."""

    scope: Scope
    name: str


@dataclass(frozen=True)
class Use:
    """``node`` reads a value at ``slot``; ``inner`` are the names the value has inside the node's bodies."""

    node: Any
    slot: int
    scope: Scope
    inner: tuple[Value, ...] = ()

    def operand(self, slot: int) -> Value | None:
        """The value the node reads at another slot; None where the slot is empty."""
        if slot >= len(self.node.input) or not self.node.input[slot]:
            return None
        name = self.node.input[slot]
        return Value(self.scope.home(name), name)


def attribute(node: Any, name: str, default: Any = None) -> Any:
    """The value of an attribute, ``default`` where it is absent."""
    for a in node.attribute:
        if a.name == name:
            return onnx.helper.get_attribute_value(a)
    return default


def declared_shape(info: Any) -> Shape | None:
    """Sizes and symbols of a value info; None where no shape is declared. A negative size counts as unknown."""
    if not info.type.HasField("tensor_type") or not info.type.tensor_type.HasField("shape"):
        return None
    return tuple(
        d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else d.dim_param or None
        for d in info.type.tensor_type.shape.dim
    )


def index_model(model: Any) -> Scope:
    """Index the main graph, its subgraphs and the bodies of the functions it calls."""
    functions = {(f.domain, f.name): f for f in model.functions}
    left = MAX_NODES

    def enter(body: Any, parent: Scope | None, actuals: dict[str, Value], depth: int) -> Scope:
        nonlocal left
        scope = Scope(parent, actuals=actuals)
        nodes = list(islice(body.node, max(left, 0)))
        left -= len(nodes)
        for info in (*getattr(body, "value_info", ()), *getattr(body, "output", ()), *body.input):
            if not isinstance(info, str) and (shape := declared_shape(info)) is not None:
                scope.shapes[info.name] = shape
        for tensor in getattr(body, "initializer", ()):
            scope.tensors[tensor.name] = tensor
        for node in nodes:
            scope.producers.update((name, node) for name in node.output if name)
            if node.op_type == "Constant" and (tensor := attribute(node, "value")) is not None:
                scope.tensors[node.output[0]] = tensor
        for node in nodes:
            bodies = _bodies(node, scope, depth)
            for slot, name in enumerate(node.input):
                if name:
                    home = scope.home(name)
                    home.uses[name].append(Use(node, slot, scope, _inner(node, slot, bodies)))
        return scope

    def _bodies(node: Any, scope: Scope, depth: int) -> list[tuple[Any, Scope]]:
        if depth >= MAX_DEPTH:
            return []
        function = functions.get((node.domain, node.op_type))
        if function is not None:
            actuals = {
                formal: Value(scope.home(name), name)
                for formal, name in zip(function.input, node.input, strict=False)
                if name
            }
            return [(function, enter(function, None, actuals, depth + 1))]
        graphs = [g for a in node.attribute for g in ((a.g,) if a.HasField("g") else a.graphs)]
        outer = None if node.op_type in SEARCHES else scope
        return [(g, enter(g, outer, {}, depth + 1)) for g in graphs]

    def _inner(node: Any, slot: int, bodies: list[tuple[Any, Scope]]) -> tuple[Value, ...]:
        if not bodies or node.op_type == "If" or (node.op_type in SEARCHES and slot):
            return ()
        names = ((scope, body.input[slot]) for body, scope in bodies if slot < len(body.input))
        return tuple(Value(scope, name if isinstance(name, str) else name.name) for scope, name in names)

    return enter(model.graph, None, {}, 0)


def uses_of(value: Value, through: frozenset[str]) -> Iterator[Use]:
    """Every use of ``value``, nearest first, looking through the ops of ``through`` and into bodies."""
    seen = {value}
    queue = [value]
    steps = 0
    for current in queue:  # grows while it is walked
        for use in current.scope.uses.get(current.name, ()):
            steps += 1
            if steps > MAX_STEPS:
                return
            yield use
            onward = list(use.inner)
            if use.node.op_type in through and (use.slot == 0 or use.node.op_type in ("Concat", "Where", "Min", "Max")):
                onward += [Value(use.scope, name) for name in use.node.output if name]
            for step in onward:
                if step not in seen:
                    seen.add(step)
                    queue.append(step)


def constant(value: Value | None) -> list[Any] | None:
    """The numbers of a small constant; None for anything else."""
    tensor = None if value is None else value.scope.tensors.get(value.name)
    if tensor is None:
        return None
    count = 1
    for size in tensor.dims:
        count *= size
    if not 0 <= count <= MAX_CONSTANT:
        return None
    try:
        return list(numpy_helper.to_array(tensor).ravel().tolist())
    except Exception:  # a malformed tensor tells nothing; the runtime will report it
        return None


def size_of(value: Value | None, axis: int, depth: int = 0) -> int | None:
    """The size of one axis if constants of the graph decide it.

    Args:
        value: any tensor.
        axis: negative, counted from the last.
        depth: steps already taken back.
    """
    if value is None or depth > MAX_DEPTH or axis >= 0:
        return None
    known, key = value.scope.sizes, (value.name, axis)
    if key not in known:
        known[key] = None  # ends a walk in circles
        known[key] = _find_size(value.scope, value.name, axis, depth)
    return known[key]


def _find_size(scope: Scope, name: str, axis: int, depth: int) -> int | None:
    if name in scope.actuals:
        return size_of(scope.actuals[name], axis, depth + 1)
    shape = tuple(scope.tensors[name].dims) if name in scope.tensors else scope.shapes.get(name, ())
    if -axis <= len(shape) and isinstance(size := shape[axis], int):
        return size
    node = scope.producers.get(name)
    return None if node is None else _size_of_result(Use(node, 0, scope), name, axis, depth + 1)


def _size_of_result(use: Use, name: str, axis: int, depth: int) -> int | None:
    node, op = use.node, use.node.op_type

    def size(slot: int, at: int = axis) -> int | None:
        return size_of(use.operand(slot), at, depth)

    if op in SAME_SHAPE:
        return size(0)
    if op in ELEMENTWISE:
        return next((s for s in (size(1), size(0)) if s is not None and s > 1), None)
    if op == "MatMulNBits":
        return int(attribute(node, "N", 0)) or None if axis == -1 else size(0)
    if op in PRODUCTS:
        left, right = PRODUCTS[op]
        return size(right, -2 if attribute(node, "transB", 0) else -1) if axis == -1 else size(left)
    if op == "Transpose":
        perm = list(attribute(node, "perm", ()))
        return size(0, perm[axis] - len(perm) if -axis <= len(perm) else -1) if perm else None
    if op == "Reshape":
        return _element(use.operand(1), axis)
    if op == "Concat":
        parts = [size(slot) for slot in range(min(len(node.input), MAX_CONSTANT))]
        along = attribute(node, "axis", -1)
        if axis != (along if along < 0 else along - 4):  # a rank nobody declares: attention's tensors have 4 axes
            return next((s for s in parts if s is not None), None)
        return None if None in parts else sum(s for s in parts if s is not None)
    if op == "Split" and attribute(node, "axis", 0) == axis:
        split, whole = constant(use.operand(1)) or list(attribute(node, "split", ())), size(0)
        if len(split) == len(node.output):
            return int(split[list(node.output).index(name)])
        return None if whole is None else whole // len(node.output)
    return None


def _element(shape: Value | None, axis: int) -> int | None:
    """One positive entry of a shape that is constant, or put together from constants and sizes."""
    numbers = constant(shape)
    if numbers is None and shape is not None:
        node = shape.scope.producers.get(shape.name)
        if node is None or node.op_type != "Concat" or -axis > len(node.input):
            return None
        entry = node.input[axis]
        numbers = constant(Value(shape.scope.home(entry), entry))
        if numbers is None or len(numbers) != 1:
            return None
        axis = -1
    if numbers is None or -axis > len(numbers):
        return None
    return int(numbers[axis]) if numbers[axis] > 0 else None
