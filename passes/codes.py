"""Weight codes as integers: their types, and how they lie in bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container
from dataclasses import dataclass

import numpy as np
from msd_compiler.runtime_ops.matmul.layout import E2M1_ZERO, Codebook
from onnx import TensorProto

from msd_compiler.facts import ReasonCode, Reject
from msd_compiler.source import Source, release, type_name

CODE_BITS = {
    TensorProto.INT8: 8,
    TensorProto.UINT8: 8,
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    TensorProto.INT2: 2,
    TensorProto.UINT2: 2,
}
"""Integer code types that are read, with their width."""

WEIGHT_BITS = {**CODE_BITS, TensorProto.FLOAT4E2M1: 4}
"""All that are read of stored weights."""

CODEBOOK_OF = {TensorProto.FLOAT4E2M1: Codebook.E2M1}
"""By type, what codes stand for where that is not themselves."""

SIGNED = frozenset({TensorProto.INT8, TensorProto.INT4, TensorProto.INT2})

FLOAT_TYPES = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})
"""Types of scales and activations."""

_E2M1_CODES = np.array([*range(7, 15), *range(7, -1, -1)], np.uint8)
"""By bit pattern of a FLOAT4E2M1 (sign, then magnitude in ascending order), its place among the 15 values."""

_AT_ONCE = 2**24
"""Bytes changed at a time."""


class Codes(ABC):
    """The codes of a weight: their shape and type now, their numbers when they are needed."""

    name: str
    dims: tuple[int, ...]
    data_type: int
    """TensorProto type, one of `WEIGHT_BITS` where the weight is read."""
    bounds: tuple[int, int]
    """Smallest and largest code that there can be."""

    @abstractmethod
    def array(self, part: int | None = None) -> np.ndarray:
        """The numbers; ``part``: those of one index of the first dimension at least, the others may be anything.

        Raises:
            ModelError: they cannot be read.
        """


@dataclass(frozen=True)
class StoredCodes(Codes):
    """Codes as a tensor of the file."""

    source: Source
    tensor: TensorProto

    @property
    def name(self) -> str:  # type: ignore[override]
        """See `Codes`."""
        return str(self.tensor.name)

    @property
    def dims(self) -> tuple[int, ...]:  # type: ignore[override]
        """See `Codes`."""
        return tuple(self.tensor.dims)

    @property
    def data_type(self) -> int:  # type: ignore[override]
        """See `Codes`."""
        return int(self.tensor.data_type)

    @property
    def bounds(self) -> tuple[int, int]:  # type: ignore[override]
        """See `Codes`."""
        return code_range(self.data_type)

    def array(self, part: int | None = None) -> np.ndarray:
        """See `Codes`."""
        return self.source.array(self.tensor)


def refuse_type(what: str, data_type: int, known: Container[int] = WEIGHT_BITS.keys()) -> None:
    """See that codes are of a type that is read.

    Raises:
        Reject: they are not.
    """
    if data_type in known:
        return
    name = type_name(data_type)
    needed = "int2, int4, int8, their unsigned forms and float4e2m1 are multiplied directly"
    raise Reject(
        ReasonCode.WEIGHT_TYPE,
        f"{what} {name}{', which has no small-integer form' if name.startswith('float') else ''}; {needed}",
    )


def code_range(data_type: int) -> tuple[int, int]:
    """Smallest and largest code of a type."""
    half = 1 << (WEIGHT_BITS[data_type] - 1)
    return (-half, half - 1) if data_type in SIGNED else (0, 2 * half - 1)


def integers(values: np.ndarray, data_type: int) -> np.ndarray:
    """What codes count: themselves, of a float type in units of `unit`; wide enough to be added to."""
    if data_type in CODE_BITS:
        return values.astype(np.int16)
    return (values.astype(np.float32) / unit(data_type)).astype(np.int16)


def unit(data_type: int) -> np.float32:
    """What a code of 1 is worth: 1, and half of FLOAT4E2M1's 1."""
    return np.float32(0.5 if CODEBOOK_OF.get(data_type) is Codebook.E2M1 else 1)


def middle(data_type: int, bits: int) -> int:
    """What `unsigned` makes of 0, as a number of the codebook."""
    if CODEBOOK_OF.get(data_type) is Codebook.E2M1:
        return E2M1_ZERO
    return 1 << (bits - 1) if data_type in SIGNED else 0


def shared(values: np.ndarray) -> np.ndarray:
    """``[1, 1]`` if all entries are one number."""
    first = values.flat[0]
    return np.full((1, 1), first, values.dtype) if (values == first).all() else values


def unsigned(codes: np.ndarray, data_type: int, bits: int) -> np.ndarray:
    """Codes of any type as uint8, signed ones raised by half their range: ``-8 .. 7`` become ``0 .. 15``.

    Those of FLOAT4E2M1 become the index of their value among all 15: ``-6 .. 6`` become ``0 .. 14``.
    """
    stored = codes.view(np.uint8)
    if bits == 8 and data_type not in SIGNED:
        return stored
    raised, mask = np.uint8(1 << (bits - 1) if data_type in SIGNED else 0), np.uint8(2**bits - 1)
    made = np.empty_like(stored)
    outermost = int(np.argmax(stored.strides))
    old, new = np.moveaxis(stored, outermost, 0), np.moveaxis(made, outermost, 0)
    step = max(1, _AT_ONCE * len(old) // max(1, old.size))
    for start in range(0, len(old), step):
        part = new[start : start + step]
        np.bitwise_xor(old[start : start + step], raised, out=part)  # in two's complement that is the addition
        if bits < 8:
            np.bitwise_and(part, mask, out=part)
        if data_type in CODEBOOK_OF:
            part[...] = _E2M1_CODES[part]
        release(stored)
    return made
