"""What readers ask of an activation: whether the model rounds it itself, and how many rows it has."""

from __future__ import annotations

from math import prod
from types import MappingProxyType

import onnx_graphsurgeon as gs
from onnx import TensorProto

from msd_compiler.facts import ActivationCodes, LowBitWeight, ReasonCode, Reject
from msd_compiler.linked import Linked, Scope, optional_input, stated_type
from msd_compiler.source import type_name

_MOVES_ONLY = frozenset({"Cast", "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"})
"""Ops that leave an activation's values as they are."""


def origin(tensor: gs.Tensor) -> gs.Tensor:
    """Where the tensor's values come from, through ops that only move them."""
    while tensor.inputs and tensor.inputs[0].op in _MOVES_ONLY and tensor.inputs[0].inputs:
        tensor = tensor.inputs[0].inputs[0]
    return tensor


_DEQUANTIZERS = ("DequantizeLinear", "TRT_FP8DequantizeLinear", "TRT_MXFP8DequantizeLinear")

_PRODUCED = MappingProxyType(
    {
        "DynamicQuantizeLinear": int(TensorProto.UINT8),
        "TRT_FP4DynamicQuantize": int(TensorProto.FLOAT4E2M1),
        "TRT_FP8QuantizeLinear": int(TensorProto.FLOAT8E4M3FN),
        "TRT_MXFP8DynamicQuantize": int(TensorProto.FLOAT8E4M3FN),
    }
)
"""By op that rounds to one type, that type."""

_CODE_TYPES = frozenset({TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT16, TensorProto.INT16})


def given_codes(x: gs.Tensor, weight: LowBitWeight, scope: Scope, linked: Linked) -> ActivationCodes | None:
    """The integers that the model's own rounding makes of an activation; None if it stays float.

    Raises:
        Reject: it is rounded in a way that no exact product follows, or in one that onnxruntime follows as well.
    """
    known: dict[str, int | str] = {"k": weight.k, "n": weight.n, "format": weight.format}
    start = origin(x)
    node = start.inputs[0] if start.inputs else None
    if node is None or node.op not in _DEQUANTIZERS or scope.constant(node.inputs[0]) is not None:
        return None
    codes, scale = node.inputs[0], node.inputs[1]
    zero_point = optional_input(node, 2)
    element_type = _code_type(codes, zero_point, scope)
    if element_type is None or element_type not in _CODE_TYPES:
        name = "unknown" if element_type is None else type_name(element_type)
        needed = "8 or 16 bits are needed, or --activations upgrade, which leaves the rounding out"
        raise _not_followed(codes, f"of type {name}; {needed}", known)
    for tensor, what in ((scale, "scale"), (zero_point, "zero point")):
        if tensor is not None and not linked.is_single(scope, tensor):
            raise _not_followed(codes, f"whose {what} {tensor.name!r} is not one value", known)
    if not weight.is_plain:
        raise _not_followed(codes, "and its weight has scales along K, or zero points that are no integers", known)
    if element_type == TensorProto.UINT8 and weight.format.startswith("uint8 per "):
        raise Reject(
            ReasonCode.ALREADY_EXACT,
            "uint8 by uint8: onnxruntime multiplies these codes exactly, and as fast",
            **known,
        )
    return ActivationCodes(codes, scale, zero_point, element_type, _moves(x, start))


def _not_followed(codes: gs.Tensor, how: str, known: dict[str, int | str]) -> Reject:
    producer = codes.inputs[0] if codes.inputs else None
    source = f"{producer.op} {(producer.name or codes.name)!r}" if producer else f"input {codes.name!r}"
    return Reject(ReasonCode.ACTIVATION_QUANTIZED, f"the model gives its activation as codes ({source}) {how}", **known)


def _code_type(codes: gs.Tensor, zero_point: gs.Tensor | None, scope: Scope) -> int | None:
    stored = None if zero_point is None else scope.constant(zero_point)
    if stored is not None:
        return int(stored.data_type)
    producer = codes.inputs[0] if codes.inputs else None
    if producer is not None and producer.op == "Cast":
        return int(producer.attrs["to"])
    if producer is not None and producer.op in _PRODUCED:
        return _PRODUCED[producer.op]
    if producer is not None and producer.op == "QuantizeLinear":
        own = scope.constant(producer.inputs[2]) if len(producer.inputs) > 2 else None
        return int(own.data_type if own is not None else producer.attrs.get("output_dtype", 0) or TensorProto.UINT8)
    return stated_type(codes)


def _moves(x: gs.Tensor, start: gs.Tensor) -> tuple[gs.Node, ...]:
    """The nodes between the two, in the order of data flow."""
    moves: list[gs.Node] = []
    while x is not start:
        moves.insert(0, x.inputs[0])
        x = x.inputs[0].inputs[0]
    return tuple(moves)


def rows_of(shape: list[int | str | None] | None, *, last: int = 1) -> int | str | None:
    """Rows of an activation: the product of all dimensions but the ``last`` ones; None if one is unknown."""
    if shape is None or any(d is None for d in shape[:-last]):
        return None
    rows = shape[:-last]
    number = prod(d for d in rows if isinstance(d, int))
    names = [d for d in rows if isinstance(d, str)]
    if not names:
        return number
    return "*".join([str(number)] * (number != 1) + names)


def transposed(shape: list[int | str | None] | None) -> list[int | str | None] | None:
    """A shape with its last two dimensions exchanged."""
    return None if shape is None else [*shape[:-2], *shape[:-3:-1]]
