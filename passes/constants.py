"""Small constants that a file computes instead of storing: a dequantized bias, a cast or reshaped one."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper

from msd_compiler.linked import Linked, Scope

_LONGEST_CHAIN = 8


def row_vector(
    tensor: gs.Tensor, scope: Scope, linked: Linked, n: int, *, rank: int | None = None
) -> np.ndarray | None:
    """A constant that is added to every row alike, as ``[n]`` float32; None if it is anything else.

    Args:
        rank: of what it is added to; a constant of a higher rank would raise it.
    """
    value = constant_value(tensor, scope, linked)
    if value is None or value.size not in (1, n) or any(d != 1 for d in value.shape[:-1]):
        return None
    if rank is not None and value.ndim > rank:
        return None
    if value.dtype.kind in "iub" or (value.size == 1 and value.ndim and value.shape[-1] not in (1, n)):
        return None
    return np.broadcast_to(value.astype(np.float32).reshape(-1), (n,))


def constant_value(tensor: gs.Tensor, scope: Scope, linked: Linked, depth: int = _LONGEST_CHAIN) -> np.ndarray | None:
    """The value of a tensor that depends on constants alone, through DequantizeLinear, Cast, Identity or Reshape."""
    stored = linked.array(scope, tensor)
    if stored is not None or depth == 0 or not tensor.inputs:
        return stored
    node = tensor.inputs[0]
    if node.op not in ("DequantizeLinear", "Cast", "Identity", "Reshape"):
        return None
    values = [None if t.is_empty() else constant_value(t, scope, linked, depth - 1) for t in node.inputs]
    if any(v is None and not t.is_empty() for v, t in zip(values, node.inputs, strict=True)):
        return None
    first = values[0]
    assert first is not None
    if node.op == "Cast":
        return first.astype(helper.tensor_dtype_to_np_dtype(node.attrs["to"]))
    if node.op == "DequantizeLinear":
        return _dequantize(node, first, values[1], values[2] if len(values) > 2 else None)
    if node.op == "Reshape":
        target = values[1]
        return None if target is None or (target < -1).any() or 0 in target else first.reshape(target)
    return first


def _dequantize(
    node: gs.Node, codes: np.ndarray, scales: np.ndarray | None, zero: np.ndarray | None
) -> np.ndarray | None:
    """A bias's DequantizeLinear: one scale, or one per element of a vector."""
    if scales is None or node.attrs.get("block_size", 0) or not (scales.size == 1 or scales.shape == codes.shape):
        return None
    offset = 0 if zero is None else zero.astype(np.int64)
    if scales.size == 1:
        scales = scales.reshape(())
        offset = np.reshape(offset, ()) if np.size(offset) == 1 else offset
    return (codes.astype(np.int64) - offset).astype(np.float32) * scales.astype(np.float32)
