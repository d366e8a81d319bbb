"""What a graph computes from shapes and constants alone, as far as the file tells: a head size, its root, a target shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import MappingProxyType

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from msd_compiler.linked import Linked, Scope
from msd_compiler.pattern import DEFAULT_DOMAINS

Dims = tuple[int | None, ...]
"""A shape; None for a dimension that is not known."""

_DEEPEST = 48
_OF_SAME_TYPE = frozenset(
    {"Identity", "Expand", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Slice", "Gather", "GatherND"}
)
_TRUTHS = frozenset({"And", "Or", "Not", "Xor", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "IsNaN"})
_LARGEST = 64
"""Elements of a value that may be about shapes."""


class ShapeValues:
    """Shapes and small values of a graph's tensors; an element that is not known is None."""

    def __init__(self, scope: Scope, linked: Linked):
        self._scope = scope
        self._linked = linked
        self._dims: dict[int, Dims | None] = {}
        self._values: dict[int, np.ndarray | None] = {}

    def scalar(self, tensor: gs.Tensor) -> float | None:
        """The tensor's only element; None if it is not known, or not alone."""
        value = self.value(tensor)
        if value is None or value.size != 1 or value.reshape(-1)[0] is None:
            return None
        return float(value.reshape(-1)[0])

    def is_single(self, tensor: gs.Tensor) -> bool:
        """Whether the tensor is known to have one element."""
        dims = self.dims(tensor)
        value = self.value(tensor)
        return (dims is not None and all(d == 1 for d in dims)) or (value is not None and value.size == 1)

    def is_bool(self, tensor: gs.Tensor) -> bool:
        """Whether the tensor is known to hold truth values."""
        stored = self._scope.constant(tensor)
        if stored is not None:
            return bool(stored.data_type == TensorProto.BOOL)
        if tensor.dtype is not None:
            return bool(np.dtype(tensor.dtype) == np.bool_)
        node = tensor.inputs[0] if tensor.inputs else None
        while node is not None and node.op in _OF_SAME_TYPE and node.inputs:
            before = node.inputs[0]
            if before.dtype is not None:
                return bool(np.dtype(before.dtype) == np.bool_)
            node = before.inputs[0] if before.inputs else None
        return node is not None and (node.op in _TRUTHS or (node.op == "Cast" and node.attrs["to"] == TensorProto.BOOL))

    def dims(self, tensor: gs.Tensor, depth: int = 0) -> Dims | None:
        """The tensor's shape; None if even the rank is unknown."""
        if id(tensor) not in self._dims:
            self._dims[id(tensor)] = None  # while it is being found, and where the chain is too long
            self._dims[id(tensor)] = self._find_dims(tensor, depth)
        return self._dims[id(tensor)]

    def value(self, tensor: gs.Tensor, depth: int = 0) -> np.ndarray | None:
        """The tensor's elements as Python numbers, each None if unknown; None if not even their number is known."""
        if id(tensor) not in self._values:
            self._values[id(tensor)] = None
            found = self._find_value(tensor, depth)
            self._values[id(tensor)] = found if found is None or found.size <= _LARGEST else None
        return self._values[id(tensor)]

    def _find_dims(self, tensor: gs.Tensor, depth: int) -> Dims | None:
        stored = self._scope.constant(tensor)
        if stored is not None:
            return tuple(stored.dims)
        declared = self._linked.shape(self._scope, tensor)
        known = None if declared is None else tuple(d if isinstance(d, int) else None for d in declared)
        if (known is not None and None not in known) or depth >= _DEEPEST or not tensor.inputs:
            return known
        node = tensor.inputs[0]
        rule = _SHAPE_RULES.get(node.op) if (node.domain or "") in DEFAULT_DOMAINS else None
        found = None if rule is None else rule(self, node, depth + 1)
        if known is None or found is None or len(known) != len(found):
            return found if known is None else known
        return tuple(a if a is not None else b for a, b in zip(known, found, strict=True))

    def _find_value(self, tensor: gs.Tensor, depth: int) -> np.ndarray | None:
        stored = self._scope.constant(tensor)
        if stored is not None:
            if math.prod(stored.dims) > _LARGEST:
                return None
            return _objects(self._linked.source.array(stored).tolist(), tuple(stored.dims))
        if depth >= _DEEPEST or not tensor.inputs or (tensor.inputs[0].domain or "") not in DEFAULT_DOMAINS:
            return None
        node = tensor.inputs[0]
        if node.op in _NUMBERS:
            return self._elementwise(_NUMBERS[node.op], node, depth)
        rule = _VALUE_RULES.get(node.op)
        return None if rule is None else rule(self, node, depth + 1)

    def _elementwise(self, compute: Callable[..., object], node: gs.Node, depth: int) -> np.ndarray | None:
        values = [self.value(t, depth + 1) for t in node.inputs]
        if not values or any(v is None for v in values):
            return None
        arrays = np.broadcast_arrays(*(v for v in values if v is not None))
        rows = zip(*(a.reshape(-1) for a in arrays), strict=True)
        return _objects([_computed(compute, row) for row in rows], arrays[0].shape)


def _objects(values: object, shape: tuple[int, ...]) -> np.ndarray:
    """An array of Python objects; NumPy alone would make numbers of them."""
    made = np.empty(math.prod(shape), object)
    made[:] = np.array(values, object).reshape(-1)
    return made.reshape(shape)


def _computed(compute: Callable[..., object], arguments: Sequence[object]) -> object:
    """None where an argument is unknown, or where there is no such number."""
    if any(a is None for a in arguments):
        return None
    try:
        return compute(*arguments)
    except (ArithmeticError, ValueError, TypeError):
        return None


def _divided(a: float, b: float) -> float:
    """As ONNX divides: integers towards zero."""
    if isinstance(a, int) and isinstance(b, int):
        quotient = abs(a) // abs(b)
        return quotient if (a < 0) == (b < 0) else -quotient
    return a / b


_NUMBERS: MappingProxyType[str, Callable[..., object]] = MappingProxyType(
    {
        "Add": lambda a, b: a + b,
        "Sub": lambda a, b: a - b,
        "Mul": lambda a, b: a * b,
        "Div": _divided,
        "Mod": lambda a, b: a % b,
        "Pow": math.pow,
        "Sqrt": math.sqrt,
        "Reciprocal": lambda a: 1.0 / a,
        "Neg": lambda a: -a,
        "Abs": abs,
        "Floor": math.floor,
        "Min": min,
        "Max": max,
        "Equal": lambda a, b: a == b,
        "Less": lambda a, b: a < b,
        "Greater": lambda a, b: a > b,
        "And": lambda a, b: a and b,
        "Or": lambda a, b: a or b,
        "Not": lambda a: not a,
        "Identity": lambda a: a,
    }
)
"""Ops on numbers, element by element."""


# --- values --------------------------------------------------------------------------------------------------------


def _where(known: ShapeValues, node: gs.Node, depth: int) -> np.ndarray | None:
    values = [known.value(t, depth) for t in node.inputs]
    if any(v is None for v in values):
        return None
    condition, yes, no = np.broadcast_arrays(*(v for v in values if v is not None))
    chosen = [
        None if c is None and a != b else a if c is None or c else b
        for c, a, b in zip(condition.reshape(-1), yes.reshape(-1), no.reshape(-1), strict=True)
    ]
    return _objects(chosen, condition.shape)


def _cast(known: ShapeValues, node: gs.Node, depth: int) -> np.ndarray | None:
    value = known.value(node.inputs[0], depth)
    to = helper.tensor_dtype_to_np_dtype(node.attrs["to"])
    if value is None or node.attrs["to"] == TensorProto.STRING:
        return None

    def convert(element: object) -> object:
        return np.asarray(element).astype(to).item()

    return _objects([_computed(convert, (e,)) for e in value.reshape(-1)], value.shape)


def _first(known: ShapeValues, node: gs.Node, depth: int) -> np.ndarray | None:
    return known.value(node.inputs[0], depth)


def _shape(known: ShapeValues, node: gs.Node, depth: int) -> np.ndarray | None:
    dims = known.dims(node.inputs[0], depth)
    if dims is None:
        return None
    cut = dims[node.attrs.get("start", 0) : node.attrs.get("end")]
    return _objects(cut, (len(cut),))


def _gather(known: ShapeValues, node: gs.Node, depth: int) -> np.ndarray | None:
    data, indices = (known.value(t, depth) for t in node.inputs)
    if data is None or indices is None or data.ndim != 1 or any(i is None for i in indices.reshape(-1)):
        return None
    return _objects([data[i] for i in indices.reshape(-1)], indices.shape)


def _slice(known: ShapeValues, node: gs.Node, depth: int) -> np.ndarray | None:
    data = known.value(node.inputs[0], depth)
    if data is None or data.ndim != 1:
        return None
    if len(node.inputs) > 1:
        given = [known.scalar(t) for t in node.inputs[1:] if not t.is_empty()]
        given = [given[0], given[1], given[3] if len(given) > 3 else 1.0]
    else:
        given = [float(node.attrs["starts"][0]), float(node.attrs["ends"][0]), 1.0]
    if any(g is None for g in given):
        return None
    start, end, step = (int(g) for g in given if g is not None)
    return data[slice(start, end, step)]


def _concat(known: ShapeValues, node: gs.Node, depth: int) -> np.ndarray | None:
    values = [known.value(t, depth) for t in node.inputs]
    if any(v is None or v.ndim != 1 for v in values):
        return None
    return np.concatenate([v for v in values if v is not None])


def _flat(known: ShapeValues, node: gs.Node, depth: int) -> np.ndarray | None:
    """Unsqueeze, Squeeze, Reshape of a number or a list: a list, but where Squeeze leaves a number."""
    value = known.value(node.inputs[0], depth)
    if value is None or value.ndim > 1:
        return None
    return value.reshape(()) if node.op == "Squeeze" and value.size == 1 else value.reshape(-1)


def _constant_of_shape(known: ShapeValues, node: gs.Node, depth: int) -> np.ndarray | None:
    shape = known.value(node.inputs[0], depth)
    if shape is None or any(d is None for d in shape) or math.prod(shape) > _LARGEST:
        return None
    value = node.attrs.get("value")
    fill = np.asarray(value.values).reshape(-1)[0].item() if isinstance(value, gs.Constant) else 0.0
    return _objects([fill] * math.prod(shape), tuple(shape))


_VALUE_RULES: MappingProxyType[str, Callable[[ShapeValues, gs.Node, int], np.ndarray | None]] = MappingProxyType(
    {
        "Where": _where,
        "Cast": _cast,
        "CastLike": _first,
        "Shape": _shape,
        "Gather": _gather,
        "Slice": _slice,
        "Concat": _concat,
        "Unsqueeze": _flat,
        "Squeeze": _flat,
        "Reshape": _flat,
        "ConstantOfShape": _constant_of_shape,
    }
)


# --- shapes --------------------------------------------------------------------------------------------------------


def _same(known: ShapeValues, node: gs.Node, depth: int) -> Dims | None:
    return known.dims(node.inputs[0], depth)


def _broadcast(known: ShapeValues, node: gs.Node, depth: int) -> Dims | None:
    shapes = [known.dims(t, depth) for t in node.inputs]
    if any(s is None for s in shapes):
        return None
    return _together([s for s in shapes if s is not None])


def _together(shapes: Sequence[Dims]) -> Dims:
    """Shapes broadcast together: where one has more than 1 that is it, where all have 1 it is 1."""
    rank = max(len(s) for s in shapes)
    columns = zip(*((1,) * (rank - len(s)) + s for s in shapes), strict=True)
    return tuple(next((d for d in c if d is not None and d != 1), None if None in c else 1) for c in columns)


def _transposed(known: ShapeValues, node: gs.Node, depth: int) -> Dims | None:
    dims = known.dims(node.inputs[0], depth)
    if dims is None:
        return None
    return tuple(dims[p] for p in node.attrs.get("perm", range(len(dims))[::-1]))


def _reshaped(known: ShapeValues, node: gs.Node, depth: int) -> Dims | None:
    target = known.value(node.inputs[1], depth)
    if target is None:
        return None
    before = known.dims(node.inputs[0], depth) or ()
    copies = not node.attrs.get("allowzero", 0)
    made: list[int | None] = []
    for i, length in enumerate(target.reshape(-1)):
        is_copy = length == 0 and copies
        made.append((before[i] if i < len(before) else None) if is_copy else length)
    if made.count(-1) == 1 and before and None not in before and None not in made:
        rest = math.prod(d for d in made if d is not None and d != -1)
        made[made.index(-1)] = math.prod(d for d in before if d is not None) // rest if rest else None
    return tuple(None if d == -1 else d for d in made)


def _unsqueezed(known: ShapeValues, node: gs.Node, depth: int) -> Dims | None:
    dims = known.dims(node.inputs[0], depth)
    axes = node.attrs["axes"] if "axes" in node.attrs else known.value(node.inputs[1], depth)
    if dims is None or axes is None or any(a is None for a in axes):
        return None
    rank = len(dims) + len(axes)
    ones = {int(a) % rank for a in axes}
    rest = iter(dims)
    return tuple(1 if i in ones else next(rest) for i in range(rank)) if len(ones) == len(axes) else None


def _expanded(known: ShapeValues, node: gs.Node, depth: int) -> Dims | None:
    dims, target = known.dims(node.inputs[0], depth), known.value(node.inputs[1], depth)
    return None if dims is None or target is None else _together([dims, tuple(target.reshape(-1))])


def _multiplied(known: ShapeValues, node: gs.Node, depth: int) -> Dims | None:
    a, b = (known.dims(t, depth) for t in node.inputs)
    if a is None or b is None or len(a) < 2 or len(b) < 2:
        return None
    return (*_together([a[:-2], b[:-2]]), a[-2], b[-1]) if len(a) > 2 or len(b) > 2 else (a[-2], b[-1])


_SHAPE_RULES: MappingProxyType[str, Callable[[ShapeValues, gs.Node, int], Dims | None]] = MappingProxyType(
    {
        **dict.fromkeys(("Identity", "Cast", "CastLike", "Dropout", "Softmax", "Neg", "Tanh"), _same),
        **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _same),
        **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Where", "And", "Or", "LessOrEqual", "Less", "Equal"), _broadcast),
        "Transpose": _transposed,
        "Reshape": _reshaped,
        "Expand": _expanded,
        "Unsqueeze": _unsqueezed,
        "MatMul": _multiplied,
    }
)
