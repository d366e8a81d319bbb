"""From an operand of attention up to the cache that it is read from, and what writes that cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from msd_compiler.attention import Cache, CacheCodes
from msd_compiler.linked import Linked, Scope
from msd_compiler.pattern import DEFAULT_DOMAINS

from .attention_layout import CACHE, MOVES, Axis, Layout
from .attention_logits import COPIES, maker, named, not_followed
from .shape_values import Dims, ShapeValues

_SCALINGS = frozenset({"Mul", "Div"})
_CODED = frozenset({"DequantizeLinear", "QuantizeLinear"})
_WRITERS = frozenset({"Concat", "TensorScatter"})
_FROM_PAST = COPIES | MOVES | _CODED | {"Gather", "Split", "Slice", "Cast"}
"""Ops through which a past may reach the node that appends to it, followed or not."""

_LONGEST_CHAIN = 32
_TOKENS = 2
"""The dimension of a cache that grows."""


@dataclass(frozen=True)
class Operand:
    """Where an operand of attention comes from."""

    source: gs.Tensor
    """What the chain starts from: the cache with its new tokens, if it comes from one."""
    chain: tuple[gs.Node, ...]
    """From there to the operand, in the order of data flow."""
    writer: gs.Node | None
    """What appends new tokens to a past, None if there is no cache."""


@dataclass(frozen=True)
class Kept:
    """An operand that is a cache with this call's tokens."""

    cache: Cache
    new: gs.Tensor
    """New tokens ``[B, Hkv, L, D]``, float."""
    nodes: tuple[gs.Node, ...]
    """What turns them into the operand, in the order of data flow: for low-bit caches the rounding too."""
    scale: float
    """Factor that the operand has beyond the cache's values."""
    group: int | None
    """How often its heads are repeated, None if unknown."""
    heads: int | None
    columns: int | None
    element_type: int
    axes: MappingProxyType[int, tuple[Axis, ...]]
    """By ``id`` of a tensor from the cache to the operand: its dimensions."""


def is_input(tensor: gs.Tensor, scope: Scope) -> bool:
    """Whether the tensor is an input of the graph or of one around it."""
    at: Scope | None = scope
    while at is not None:
        if any(tensor is t for t in at.graph.inputs):
            return True
        at = at.parent
    return False


def is_output(tensor: gs.Tensor, scope: Scope) -> bool:
    """Whether the tensor is an output of the graph."""
    return any(tensor is t for t in scope.graph.outputs)


def is_copy(node: gs.Node) -> bool:
    """Whether the node's output is its first input: Identity, or a Concat of one."""
    return node.op in COPIES or (node.op == "Concat" and len(node.inputs) == 1)


def uncopied(tensor: gs.Tensor, scope: Scope) -> gs.Tensor:
    """What the tensor is a copy of."""
    for _ in range(_LONGEST_CHAIN):
        node = maker(tensor, scope)
        if node is None or not is_copy(node):
            break
        tensor = node.inputs[0]
    return tensor


def trace(operand: gs.Tensor, scope: Scope, values: ShapeValues) -> Operand:
    """Follow an operand up to the cache that it is read from, or to what is none."""
    chain: list[gs.Node] = []
    tensor = operand
    for _ in range(_LONGEST_CHAIN):
        node = maker(tensor, scope)
        if node is None or (node.domain or "") not in DEFAULT_DOMAINS:
            break
        if node.op in _WRITERS and not is_copy(node):
            return Operand(tensor, tuple(chain), node if _past_input(node, scope) is not None else None)
        if node.op in _SCALINGS:
            first = 0 if values.is_single(node.inputs[1]) else 1
            if not values.is_single(node.inputs[1 - first]):
                break
            step = node.inputs[first]
        elif is_copy(node) or node.op in MOVES or node.op in _CODED or node.op == "Cast":
            step = node.inputs[0]
        else:
            break
        chain.insert(0, node)
        tensor = step
    return Operand(tensor, tuple(chain), None)


def _past_input(writer: gs.Node, scope: Scope) -> gs.Tensor | None:
    """The graph input that a writer's past comes from, however it does."""
    tensor = writer.inputs[0]
    for _ in range(_LONGEST_CHAIN):
        if is_input(tensor, scope):
            return tensor
        node = maker(tensor, scope)
        if node is None or not (node.op in _FROM_PAST or is_copy(node)):
            return None
        tensor = node.inputs[0]
    return None


def read_kept(operand: Operand, wanted: Sequence[Axis], scope: Scope, linked: Linked, values: ShapeValues) -> Kept:
    """The facts of an operand with a cache.

    Args:
        wanted: the dimensions that the product takes.

    Raises:
        Reject: something between input and product, or input and output, is not followed.
    """
    writer = operand.writer
    assert writer is not None
    past = _past(writer, scope)
    new, at = _written(writer, values)
    dims = _cache_dims((past, new, writer.outputs[0]), values)
    layout = Layout(dims, values)
    codes, rounding, new, chain = _codes(operand, new, dims, scope, linked)
    scale = 1.0
    element_type = element_type_of(past, scope) if codes is None else _code_scale_type(codes, chain[0], scope)
    axes = {id(writer.outputs[0]): CACHE}
    for node in chain:
        if codes is not None and node is chain[0]:
            pass  # reads the codes
        elif node.op in MOVES:
            layout.follow(node)
        elif node.op in _SCALINGS:
            first = 0 if values.is_single(node.inputs[1]) else 1
            scale *= _factor(node, first, values)
        elif node.op == "Cast" and node.attrs["to"] != element_type:
            raise not_followed(
                f"{named(node)} changes the type of a cache; queries, keys and values of one type are needed"
            )
        elif node.op in _CODED:
            raise not_followed(f"{named(node)} rounds what is read from the float cache {past.name!r}")
        axes[id(node.outputs[0])] = tuple(layout.axes)
    if not layout.is_as(wanted):
        raise not_followed(
            f"the dimensions of the cache {past.name!r} meet the product in another order than attention's"
        )
    present = _present(writer, scope)
    copy = () if present is writer.outputs[0] else (present.inputs[0],)
    cache = Cache(past, present, writer, codes, at)
    return Kept(
        cache,
        new,
        (*rounding, writer, *copy, *chain),
        scale,
        layout.group,
        dims[1],
        dims[3],
        element_type,
        MappingProxyType(axes),
    )


def _past(writer: gs.Node, scope: Scope) -> gs.Tensor:
    past = uncopied(writer.inputs[0], scope)
    root = _past_input(writer, scope) or past
    if past is not root:
        node = writer
        while (before := maker(node.inputs[0], scope)) is not None:
            node = before
        raise not_followed(
            f"the past comes through {named(node)} from the input {root.name!r}; one input [B, heads, tokens, columns] for "
            "keys and one for values is needed"
        )
    if scope.parent is not None:
        raise not_followed(f"its cache {past.name!r} is kept inside a branch or loop; the main graph is needed")
    return past


def _written(writer: gs.Node, values: ShapeValues) -> tuple[gs.Tensor, gs.Tensor | None]:
    """The new tokens and, for a cache with room, where they go."""
    axis = int(writer.attrs.get("axis", -2))
    dims = next((d for d in map(values.dims, (*writer.inputs[:2], writer.outputs[0])) if d is not None), None)
    rank = None if dims is None else len(dims)
    if rank not in (None, 4) or axis % (rank or 4) != _TOKENS:
        raise not_followed(
            f"{named(writer)} writes along dimension {axis} of {rank or 'unknown rank'}; the cache must be "
            "[B, heads, tokens, columns]"
        )
    if writer.op == "Concat":
        if len(writer.inputs) != 2:
            raise not_followed(f"{named(writer)} joins {len(writer.inputs)} tensors; past and new tokens are needed")
        return writer.inputs[1], None
    if writer.attrs.get("mode", "linear") not in ("linear", b"linear"):
        raise not_followed(f"{named(writer)} writes in a circle, so that tokens are out of order")
    if len(writer.inputs) < 3 or writer.inputs[2].is_empty():
        raise not_followed(f"{named(writer)} always writes to the start of its cache; write_indices are needed")
    return writer.inputs[1], writer.inputs[2]


def _cache_dims(tensors: Sequence[gs.Tensor], values: ShapeValues) -> Dims:
    """``[B, Hkv, T, D]``, from whichever tensor tells: past, new tokens or present."""
    known = [d for d in map(values.dims, tensors) if d is not None and len(d) == 4]
    heads, columns = (next((d[i] for d in known if d[i] is not None), None) for i in (1, 3))
    return (None, heads, None, columns)


def _present(writer: gs.Node, scope: Scope) -> gs.Tensor:
    """The graph output, perhaps a copy."""
    written = writer.outputs[0]
    copies = [n.outputs[0] for n in written.outputs if n.op in COPIES]
    present = next((t for t in (written, *copies) if is_output(t, scope)), None)
    if present is None:
        raise not_followed(f"the cache that {named(writer)} writes is no output of the model")
    return present


def _factor(node: gs.Node, first: int, values: ShapeValues) -> float:
    value = values.scalar(node.inputs[1 - first])
    if value is None or (node.op == "Div" and (first != 0 or value == 0)):
        raise not_followed(f"the factor of {named(node)} is no number that the file tells")
    return value if node.op == "Mul" else 1.0 / value


def element_type_of(tensor: gs.Tensor, scope: Scope) -> int:
    """Element type of an input of the graph."""
    return next(int(v.type.tensor_type.elem_type) for v in scope.proto.input if v.name == tensor.name)


def _code_scale_type(codes: CacheCodes, dequantize: gs.Node, scope: Scope) -> int:
    stored = scope.constant(codes.scale)
    assert stored is not None
    return int(dequantize.attrs.get("output_dtype", 0) or stored.data_type)


def _codes(
    operand: Operand, new: gs.Tensor, dims: Dims, scope: Scope, linked: Linked
) -> tuple[CacheCodes | None, tuple[gs.Node, ...], gs.Tensor, tuple[gs.Node, ...]]:
    """For a cache of int8: its codes, the node that rounds new tokens, those tokens, and the chain from where it is read."""
    chain = tuple(operand.chain)
    writer = operand.writer
    assert writer is not None
    past = uncopied(writer.inputs[0], scope)
    if not is_input(past, scope) or element_type_of(past, scope) not in (TensorProto.INT8, TensorProto.UINT8):
        return None, (), new, chain
    read = chain[0] if chain else None
    rounding = maker(new, scope)
    if read is None or read.op != "DequantizeLinear" or rounding is None or rounding.op != "QuantizeLinear":
        raise not_followed(
            f"the cache {past.name!r} holds integers; QuantizeLinear before and DequantizeLinear right after {named(writer)} are needed"
        )
    if element_type_of(past, scope) != TensorProto.INT8:
        raise not_followed(f"the cache {past.name!r} is uint8; int8 codes with zero point 0 are needed")
    scales = [_scale(node, past, dims, scope, linked) for node in (rounding, read)]
    (first, first_axis), (second, second_axis) = scales
    if first.shape != second.shape or first_axis != second_axis or (first != second).any():
        raise not_followed(f"{named(rounding)} and {named(read)} have different scales for the cache {past.name!r}")
    return CacheCodes(8, read.inputs[1], first_axis), (rounding,), rounding.inputs[0], chain


def _scale(node: gs.Node, past: gs.Tensor, dims: Dims, scope: Scope, linked: Linked) -> tuple[np.ndarray, int | None]:
    """The scales of a QuantizeLinear or DequantizeLinear of a cache, and the dimension that they belong to."""
    value = linked.array(scope, node.inputs[1])
    if value is None or not np.isfinite(np.asarray(value, np.float64)).all():
        raise not_followed(f"the scales of {named(node)} are no finite numbers stored in the file")
    if len(node.inputs) > 2 and not node.inputs[2].is_empty():
        zero_point = linked.array(scope, node.inputs[2])
        if zero_point is None or np.asarray(zero_point, np.int64).any():
            raise not_followed(
                f"the zero points of {named(node)} are not all 0, so that the cache {past.name!r} is asymmetric"
            )
    if value.size == 1:
        return value.reshape(-1), None
    axis = int(node.attrs.get("axis", 1)) % 4
    if value.ndim != 1 or axis not in (1, 3) or value.size != dims[axis] or node.attrs.get("block_size", 0):
        raise not_followed(
            f"the scales of {named(node)} have shape {list(value.shape)} along dimension {axis}; one, one per head or one "
            "per column is needed"
        )
    return value, axis
