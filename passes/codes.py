"""Weight codes as integers: their types, and how they lie in bytes."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from msd_compiler.source import release

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

_AT_ONCE = 2**24
"""Bytes changed at a time."""


def integers(values: np.ndarray) -> np.ndarray:
    """Codes of any integer type, wide enough to be added to."""
    return values.astype(np.int16)


def shared(values: np.ndarray) -> np.ndarray:
    """``[1, 1]`` if all entries are one number."""
    first = values.flat[0]
    return np.full((1, 1), first, values.dtype) if (values == first).all() else values


def unsigned(codes: np.ndarray, bits: int, *, signed: bool) -> np.ndarray:
    """Codes of any integer type as uint8, signed ones raised by half their range: ``-8 .. 7`` become ``0 .. 15``."""
    stored = codes.view(np.uint8)
    if bits == 8 and not signed:
        return stored
    raised, mask = np.uint8(1 << (bits - 1) if signed else 0), np.uint8(2**bits - 1)
    made = np.empty_like(stored)
    outermost = int(np.argmax(stored.strides))
    old, new = np.moveaxis(stored, outermost, 0), np.moveaxis(made, outermost, 0)
    step = max(1, _AT_ONCE * len(old) // max(1, old.size))
    for start in range(0, len(old), step):
        part = new[start : start + step]
        np.bitwise_xor(old[start : start + step], raised, out=part)  # in two's complement that is the addition
        if bits < 8:
            np.bitwise_and(part, mask, out=part)
        release(stored)
    return made
