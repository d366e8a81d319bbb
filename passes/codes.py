"""Weight codes as integers: their types, and how they lie in bytes."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

CODE_BITS = {
    TensorProto.INT8: 8,
    TensorProto.UINT8: 8,
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    TensorProto.INT2: 2,
    TensorProto.UINT2: 2,
}
"""Code types that are read, with their width."""

SIGNED = frozenset({TensorProto.INT8, TensorProto.INT4, TensorProto.INT2})

FLOAT_TYPES = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})
"""Types of scales and activations."""


def integers(values: np.ndarray) -> np.ndarray:
    """Codes of any integer type, wide enough to be added to."""
    return values.astype(np.int16)


def shared(values: np.ndarray) -> np.ndarray:
    """``[1, 1]`` if all entries are one number."""
    first = values.flat[0]
    return np.full((1, 1), first, values.dtype) if (values == first).all() else values


def unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Codes of ``bits`` bits, low bits first, along the last axis."""
    if bits == 8:
        return packed
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    return parts.reshape(*packed.shape[:-1], -1)
