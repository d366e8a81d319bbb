"""What each input of a model is: its role, its axes as quantities, and what the graph says of its sizes and its range."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from . import dims
from .graph import (
    PRODUCTS,
    SAME_NUMBERS,
    SAME_SHAPE,
    Scope,
    Use,
    Value,
    attribute,
    constant,
    declared_shape,
    index_model,
    size_of,
    uses_of,
)
from .roles import LAYOUTS, NAMES, SCALARS, SLOTS, TABLES, Role


@dataclass(frozen=True)
class Input:
    """One input.

    Attributes:
        name: as in the model.
        dtype: of its elements.
        declared: as in the model, for messages.
        dims: per axis a size, a symbol, an expression over symbols or "@quantity".
        role: what it is for.
        bound: integers must be below; None where nothing bounds them.
        head_sizes: candidates for the last axis, likeliest first; empty where it is known.
    """

    name: str
    dtype: np.dtype[Any]
    declared: tuple[int | str, ...]
    dims: tuple[int | str, ...]
    role: Role
    bound: int | None = None
    head_sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Signature:
    """The inputs a caller must give.

    Attributes:
        inputs: in the model's order, without those that have a default and optional ones.
        unsupported: name -> type of the inputs no array can be made for.
        aliases: a symbol of the model -> the size, "@quantity" or symbol it stands for.
    """

    inputs: tuple[Input, ...]
    unsupported: dict[str, str]
    aliases: dict[str, int | str]


_OPS_OF_SLOTS = {op for op, _ in (*SLOTS, *TABLES)}
HEAD_SIZES = (64, 32, 128, 16, 80, 96, 8, 256)  # usual ones, where the graph does not tell
_HEADS = {  # op -> attributes that count the heads of its caches, and of its query
    "GroupQueryAttention": ("kv_num_heads", "num_heads"),
    "MultiHeadAttention": ("num_heads", "num_heads"),
    "DecoderMaskedMultiHeadAttention": ("num_heads", "num_heads"),
    "DecoderMaskedSelfAttention": ("num_heads", "num_heads"),
    "Attention": ("num_heads", "num_heads"),
    "QAttention": ("num_heads", "num_heads"),
    "ai.onnx.Attention": ("kv_num_heads", "q_num_heads"),
}


def read_signature(model: Any) -> Signature:
    """Read what the model declares and what its graph does with each input; no tensor data is touched but small constants."""
    top = index_model(model)
    outputs = {o.name for o in model.graph.output}
    inputs: list[Input] = []
    unsupported: dict[str, str] = {}
    for info in model.graph.input:
        kind = info.type.WhichOneof("value")
        if info.name in top.tensors or kind == "optional_type":
            continue
        dtype = _dtype(info) if kind == "tensor_type" else None
        if dtype is None:
            unsupported[info.name] = _type_name(info, kind)
        else:
            inputs.append(_read_input(Value(top, info.name), dtype, declared_shape(info), outputs))
    aliases = _aliases(inputs) | _equal_inner_axes(top, inputs)
    unified = (replace(i, dims=tuple(aliases.get(d, d) if isinstance(d, str) else d for d in i.dims)) for i in inputs)
    return Signature(tuple(unified), unsupported, aliases)


def _dtype(info: Any) -> np.dtype[Any] | None:
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type))
    except KeyError:
        return None
    return None if dtype.kind in "OSUc" else dtype


def _type_name(info: Any, kind: str | None) -> str:
    if kind != "tensor_type":
        return kind or "no type"
    try:
        return str(onnx.TensorProto.DataType.Name(info.type.tensor_type.elem_type)).lower()
    except ValueError:
        return f"element type {info.type.tensor_type.elem_type}"


def _named(node: Any, table: Container[str]) -> str:
    """The name of an op in a table: its domain's own, "ai.onnx.Attention", where the table has one; ours have no other."""
    own = f"{node.domain or 'ai.onnx'}.{node.op_type}"
    return own if node.domain == "msd" or own in table else str(node.op_type)


def _at(use: Use) -> tuple[str, int]:
    """The key of a use in `SLOTS` and `TABLES`."""
    return _named(use.node, _OPS_OF_SLOTS), use.slot


def _read_input(
    value: Value, dtype: np.dtype[Any], shape: tuple[int | str | None, ...] | None, outputs: set[str]
) -> Input:
    uses = list(uses_of(value, SAME_NUMBERS))
    direct = list(uses_of(value, SAME_SHAPE))
    rank = len(shape) if shape is not None else 2
    role = _role(value.name, dtype, rank, uses, outputs)
    if shape is None:
        shape = (None,) * (1 if role in SCALARS | {Role.SCALE, Role.ZERO_POINT} else 4 if role is Role.CACHE else 2)
    declared = tuple("?" if size is None else size for size in shape)
    heads = _head_sizes(direct) if role is Role.CACHE else ()
    resolved: list[int | str] = []
    for axis, size in enumerate(shape):
        known = size if isinstance(size, int) else _size_by_use(axis - len(shape), len(shape), role, direct)
        resolved.append(known if known is not None else size or f"?{value.name}:{axis}")
    _name_axes(value.name, resolved, role)
    if not (heads and isinstance(resolved[-1], str)):
        heads = ()
    return Input(value.name, dtype, declared, tuple(resolved), role, _bound(uses), heads)


def _role(name: str, dtype: np.dtype[Any], rank: int, uses: list[Use], outputs: set[str]) -> Role:
    kind = dtype.kind if dtype.kind in "iufb" else "f"  # bfloat16 and the like call themselves void
    for use in uses:
        at_slot = SLOTS.get(_at(use))
        if at_slot is not None and _fits(at_slot, kind):
            return at_slot
    for pattern, kinds, ranks, role in NAMES:
        if kind in kinds and (ranks is None or rank in ranks) and pattern.search(name.lower()):
            return role
    if kind in "iu" and any(_at(use) in TABLES for use in uses):
        return Role.IDS
    for use in uses:
        if kind in "iu" and use.node.op_type == "Sub" and use.slot == 1 and constant(use.operand(0)) == [1]:
            return Role.MASK  # 1 - mask, then times a large negative number
        if rank in (4, 5) and use.node.op_type == "Concat" and use.node.output[0] in outputs:
            return Role.CACHE
    return Role.VALUES


def _fits(role: Role, kind: str) -> bool:
    wants = {
        Role.SCALE: "f",
        Role.ZERO_POINT: "iu",
        Role.CACHE: "fiu",
        Role.VALUES: "f",
        Role.MASK: "iufb",
        Role.ONE: "iuf",
    }
    return kind in wants.get(role, "iub" if role is Role.ZERO else "iu")


def _name_axes(name: str, sizes: list[int | str], role: Role) -> None:
    """Replace open axes by "@quantity" where the symbol's name or the role's layout tells."""
    layout = LAYOUTS.get(role, {}).get(len(sizes), ("",) * len(sizes))
    if role in SCALARS:
        layout = ("one",) * len(sizes)
    elsewhere = re.search(r"encoder|(^|_)enc_|cross", name.lower()) is not None
    for axis, (size, usual) in enumerate(zip(sizes, layout, strict=True)):
        if not isinstance(size, str) or dims.parse(size) is not None:
            continue
        named = dims.meaning(size) if not size.startswith("?") else None
        quantity = named or usual
        if role is Role.CACHE and usual == "past" and named in (None, "seq", "total"):
            quantity = "past"
        if elsewhere and quantity in ("past", "total", "seq"):
            quantity = "encoder"
        if quantity == "buffer" and role not in (Role.CACHE, Role.ZERO):
            quantity = "seq"
        if role is Role.CACHE and axis == len(sizes) - 1 and named != "past":
            quantity = ""
        if quantity:
            sizes[axis] = f"@{quantity}"


def _size_by_use(axis: int, rank: int, role: Role, uses: list[Use]) -> int | None:
    """The size the ops that read an input need on one (negative) axis."""
    for use in uses:
        node, op = use.node, use.node.op_type
        if op in PRODUCTS and rank >= 2 and not _transposes(node):
            left, right = PRODUCTS[op]
            need = {(left, -1): (right, -2), (right, -2): (left, -1)}.get((use.slot, axis))
            if need and (size := size_of(use.operand(need[0]), need[1])) is not None:
                return size
        elif op == "MatMulNBits" and (use.slot, axis) == (0, -1):
            return int(attribute(node, "K", 0)) or None
        elif op.endswith("Normalization") and (use.slot, axis) == (0, -1):
            slot = 2 if op.startswith("Skip") else 1
            if axis == -1 and (size := size_of(use.operand(slot), -1)) is not None:
                return size
        elif op == "Conv" and use.slot == 0 and axis == 1 - rank:
            size = size_of(use.operand(1), axis)
            return None if size is None else size * int(attribute(node, "group", 1))
        elif op == "Concat" and role is Role.CACHE:
            along = attribute(node, "axis", 0)
            siblings = [use.operand(slot) for slot in range(min(len(node.input), 8)) if slot != use.slot]
            if (along if along < 0 else along - rank) != axis and axis not in (-2, -rank):
                size = next((s for sibling in siblings if (s := size_of(sibling, axis)) is not None), None)
                if size is not None:
                    return size
        elif role is Role.CACHE and axis == -3 and (key := _named(node, _HEADS)) in _HEADS:
            return int(attribute(node, _HEADS[key][0], 0)) or None
    return None


def _head_sizes(uses: list[Use]) -> tuple[int, ...]:
    """Candidates for the last axis of a cache, from the attention that reads it, the usual ones last."""
    found = [size for use in uses for size in _head_sizes_by_use(use)]
    packed = any(attribute(use.node, "kv_cache_bit_width", 0) == 4 for use in uses)
    candidates = [(size + 1) // 2 if packed else size for size in (*found, *HEAD_SIZES)]
    if packed:
        candidates += found
    return tuple(dict.fromkeys(size for size in candidates if size > 0))


def _head_sizes_by_use(use: Use) -> Iterator[int]:
    node = use.node
    key = _named(node, _HEADS)
    if key not in _HEADS:
        return
    for name in node.output[1:3]:
        if isinstance(size := use.scope.shapes.get(name, (None,))[-1], int):
            yield size
    kv_heads, heads = (int(attribute(node, a, 0)) for a in _HEADS[key])
    separate = len(node.input) > 1 and bool(node.input[1])
    if node.op_type in ("QAttention", "Attention") and key != "ai.onnx.Attention":
        width, parts = size_of(use.operand(1), -1), 3 * heads
    else:
        width, parts = size_of(use.operand(0), -1), heads if separate else heads + 2 * kv_heads
    if width is not None and parts > 0 and width % parts == 0:
        yield width // parts
    if separate and kv_heads > 0 and (width := size_of(use.operand(1), -1)) is not None and width % kv_heads == 0:
        yield width // kv_heads
    scale = attribute(node, "scale", 0.0)
    if isinstance(scale, float) and 1e-3 < scale < 1 and math.isfinite(scale):
        yield round(1 / scale**2)
    if node.op_type == "GroupQueryAttention" and (half := size_of(use.operand(7), -1)) is not None:
        yield 2 * half


def _bound(uses: list[Use]) -> int | None:
    """The length of the shortest table the input is an index into."""
    lengths = []
    for use in uses:
        if _at(use) not in TABLES:
            continue
        slot, axis = TABLES[_at(use)]
        if axis is None:
            axis = int(attribute(use.node, "gather_axis" if use.node.op_type == "GatherBlockQuantized" else "axis", 0))
        table = use.operand(slot)
        if table is not None and (length := _table_length(table, axis)):
            lengths.append(length)
    return min(lengths, default=None)


def _table_length(table: Value, axis: int) -> int | None:
    if axis >= 0:
        rank = _rank(table)
        if rank is None or axis >= rank:
            return None
        axis -= rank
    return size_of(table, axis)


def _rank(value: Value, depth: int = 0) -> int | None:
    """The rank of a table, looking back through the ops that keep it."""
    scope, name = value.scope, value.name
    if name in scope.actuals:
        return _rank(scope.actuals[name], depth + 1) if depth < 50 else None
    if name in scope.tensors:
        return len(scope.tensors[name].dims)
    if name in scope.shapes:
        return len(scope.shapes[name])
    node = scope.producers.get(name)
    if node is None or depth >= 50 or not node.input or node.op_type not in SAME_SHAPE | {"Transpose"}:
        return None
    return _rank(Value(scope.home(node.input[0]), node.input[0]), depth + 1)


def _aliases(inputs: list[Input]) -> dict[str, int | str]:
    """Symbols whose quantity or size one input tells, for the inputs and expressions that tell nothing themselves."""
    aliases: dict[str, int | str] = {}
    for i in sorted(inputs, key=lambda i: i.role is Role.CACHE):  # some caches call their past "seq_len"
        for symbol, meant in zip(i.declared, i.dims, strict=True):
            if isinstance(symbol, str) and symbol != meant and symbol != "?":
                aliases.setdefault(symbol, meant)
    return aliases


def _equal_inner_axes(top: Scope, inputs: list[Input]) -> dict[str, int | str]:
    """The inner axes of a product of two inputs are one symbol, whatever the model calls them."""
    by_value = {Value(top, i.name): i for i in inputs}
    equal: dict[str, int | str] = {}
    for i in inputs:
        for use in uses_of(Value(top, i.name), SAME_SHAPE):
            left, right = PRODUCTS.get(use.node.op_type, (None, 0))
            other = by_value.get(use.operand(right) or Value(top, ""))
            if use.slot != left or other is None or min(len(i.dims), len(other.dims)) < 2 or _transposes(use.node):
                continue
            ours, theirs = i.dims[-1], other.dims[-2]
            if isinstance(theirs, str) and ours != theirs:
                equal.setdefault(theirs, ours)
            elif isinstance(ours, str) and ours != theirs:
                equal.setdefault(ours, theirs)
    return equal


def _transposes(node: Any) -> bool:
    return any(attribute(node, name, 0) for name in ("transA", "transB"))
