"""What readers ask of an activation: whether the model rounds it itself, and how many rows it has."""

from __future__ import annotations

from math import prod

import onnx_graphsurgeon as gs

from msd_compiler.facts import ReasonCode, Reject
from msd_compiler.linked import Scope

_MOVES_ONLY = frozenset({"Cast", "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"})
"""Ops that leave an activation's values as they are."""


def origin(tensor: gs.Tensor) -> gs.Tensor:
    """Where the tensor's values come from, through ops that only move them."""
    while tensor.inputs and tensor.inputs[0].op in _MOVES_ONLY and tensor.inputs[0].inputs:
        tensor = tensor.inputs[0].inputs[0]
    return tensor


def refuse_quantized(x: gs.Tensor, scope: Scope, **known: int | str) -> None:
    """See that ``x`` is a float activation.

    Raises:
        Reject: it comes from a ``DequantizeLinear`` of something computed: the model rounds it, and means to.
    """
    start = origin(x)
    producer = start.inputs[0] if start.inputs else None
    if producer is None or producer.op != "DequantizeLinear" or scope.constant(producer.inputs[0]) is not None:
        return
    codes = producer.inputs[0]
    node = codes.inputs[0] if codes.inputs else None
    rounded_by = f"{node.op} {(node.name or codes.name)!r}" if node else f"input {codes.name!r}"
    raise Reject(
        ReasonCode.ACTIVATION_QUANTIZED,
        f"the model itself gives its activation as integer codes ({rounded_by}); that rounding is part of its meaning",
        **known,
    )


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
