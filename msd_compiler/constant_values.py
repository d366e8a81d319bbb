"""Constants that a file computes instead of storing: a dequantized bias, scales that are codes themselves, a cast or reshaped one."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper

from .linked import Linked, Scope
from .weight_view import WeightView

_LONGEST_CHAIN = 8

DEQUANTIZERS = ("DequantizeLinear", "TRT_INT4DequantizeLinear")
"""``DequantizeLinear`` and what modelopt calls it for TensorRT: same inputs, attributes and meaning."""

DEQUANTIZER_DOMAINS = ("", "ai.onnx", "com.microsoft", "trt", "msd")
"""Domains that have one. ``msd`` is for models that are on their way: it has ONNX's latest meaning at any opset."""


def constant_value(tensor: gs.Tensor, scope: Scope, linked: Linked, depth: int = _LONGEST_CHAIN) -> np.ndarray | None:
    """The value of a tensor that depends on constants alone, through DequantizeLinear, Cast, Identity or Reshape.

    None if it does not, or if the shapes do not fit. What is dequantized comes as float32.
    """
    stored = linked.array(scope, tensor)
    if stored is not None or depth == 0 or not tensor.inputs:
        return stored
    node = tensor.inputs[0]
    if node.op not in (*DEQUANTIZERS, "Cast", "Identity", "Reshape"):
        return None
    values = [None if t.is_empty() else constant_value(t, scope, linked, depth - 1) for t in node.inputs]
    if any(v is None and not t.is_empty() for v, t in zip(values, node.inputs, strict=True)):
        return None
    first, *others = values
    assert first is not None
    if node.op == "Cast":
        return first.astype(helper.tensor_dtype_to_np_dtype(node.attrs["to"]))
    if node.op in DEQUANTIZERS:
        return _dequantized_by(node, first, *others)
    if node.op == "Reshape":
        target = others[0]
        return None if target is None or (target < -1).any() or 0 in target else first.reshape(target)
    return first


def _dequantized_by(
    node: gs.Node, codes: np.ndarray, scales: np.ndarray | None = None, zero_points: np.ndarray | None = None
) -> np.ndarray | None:
    axis, block_size = int(node.attrs.get("axis", 1)), int(node.attrs.get("block_size", 0))
    if scales is None or not -codes.ndim <= axis < max(codes.ndim, 2):
        return None
    axis = axis % codes.ndim if axis < codes.ndim else codes.ndim - 1
    try:
        for values in (scales, zero_points):
            if values is not None:
                WeightView.stored_as(codes.shape, values.shape, axis, block_size)
    except ValueError:
        return None
    return dequantized(codes, scales, zero_points, axis=axis, block_size=block_size)


def dequantized(
    codes: np.ndarray,
    scales: np.ndarray,
    zero_points: np.ndarray | None = None,
    *,
    axis: int,
    block_size: int = 0,
) -> np.ndarray:
    """``(codes - zero_points) * scales``.

    Args:
        codes: integers, or floats of 4 or 8 bits.
        scales: one, one per slice of ``axis``, or, with ``block_size``, of the codes' rank; any float type.
        zero_points: as scales, of the codes' type; None for 0.
        axis: in ``[0, rank)``.

    Returns:
        float32, shape of the codes. The products are float32, whatever type the op is told to produce.

    Source: ONNX DequantizeLinear, opsets 10 to 25.
    """

    def beside(values: np.ndarray) -> np.ndarray:
        if block_size:
            return values.repeat(block_size, axis)[(slice(None),) * axis + (slice(codes.shape[axis]),)]
        if values.size == 1:
            return values.reshape(())
        return values.reshape([-1 if d == axis else 1 for d in range(codes.ndim)])

    is_integer = codes.dtype.name.lstrip("u").startswith("int")
    exact: np.ndarray = codes.astype(np.int64 if is_integer else np.float32)
    if zero_points is not None:
        exact = exact - beside(zero_points.astype(exact.dtype))
    with np.errstate(over="ignore"):  # infinite, as ONNX has it
        values: np.ndarray = exact.astype(np.float32, copy=False) * beside(scales.astype(np.float32))
    return values
