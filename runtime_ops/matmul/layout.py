"""How ``msd.MatMul`` stores its weight: layout ``n16k4``, number 1.

One layout serves every instruction set, so a file made on one machine runs on any other. The unit is a
*line* of 64 bytes: 16 output columns times 4 consecutive steps of K, the shape that ``vpdpbusd``, SDOT and
AMX multiply, and that holds the pairs of ``vpmaddwd`` and ``vpdpwssd``. Codes are unsigned with a zero point.

``B`` is ``uint8[tiles, groups, lines, 64]``, C order:

* ``tiles = ceil(N / 16)``: tile ``t`` holds columns ``16 t .. 16 t + 15``; columns beyond N are zero codes;
* ``groups = ceil(K / block_size)``: group ``g`` starts at ``k = g * block_size``; a group has one weight scale
  and (unless the plan says per row) one activation scale, and is one exact integer sum;
* ``lines = ceil(block_size / (4 U))`` with ``U = 8 / bits`` codes to a byte: a group never shares a line,
  and the codes beyond its end, or beyond K, are zero bits that meet zero activations;
* byte ``4 c + i`` of line ``l`` holds column ``c`` of the tile; its bits ``[u * bits, (u + 1) * bits)`` are the code at
  ``k = g * block_size + 4 * (l * U + u) + i``.

``scales`` (float32), ``zero_points`` (uint8) and ``offsets`` (float32) are ``[tiles, groups, 16]``, so that a kernel
reads them beside the lines they belong to; ``groups`` is 1 where all groups share a value, and zero points and offsets
that are one number everywhere are ``[1, 1, 1]``. ``offsets`` is the part of a zero point that is no integer.

A *codebook* says what the codes stand for: themselves, or the numbers of a table of 16. `CODEBOOKS` holds the tables, whose
numbers take the codes' place in every formula, so that zero points are numbers of the table too.

In a data file B starts at a multiple of 64 bytes; a kernel may not rely on it (an embedded tensor is unaligned).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

LAYOUT = "n16k4/1"
"""Value of the required attribute ``layout``: a kernel refuses any other."""

TILE = 16
"""Output columns of a line."""

QUAD = 4
"""Consecutive K of one column in a line."""

LONGEST_GROUP = 256
"""A sum of 256 products of a 16-bit code (at most 32258) and a weight (|w - z| <= 255) fits int32."""

_AT_ONCE = 2**21
"""Bytes that are packed at a time: they stay in the cache, and what is in memory beside the weight is little."""


class Codebook(IntEnum):
    """What weight codes stand for; the values are those of the input ``plan``."""

    INTEGER = 0
    """Themselves."""
    E2M1 = 1
    """Twice the 15 values of FLOAT4E2M1, in ascending order, raised by `E2M1_ZERO`: 4 bits."""


class ActivationFormat(IntEnum):
    """How a group of the activation becomes codes and a scale; the values are those of the input ``plan``. See `mx`."""

    INT8 = 0
    """INT8 terms, the scale from the largest magnitude: `reference.decompose`."""
    MXFP4_E1M2_X2 = 1
    """Two passes of 4 bits on the paper's grid, a scale of a power of two."""
    MXFP4_E1M2 = 2
    """One pass."""
    MXFP4_E2M1_X2 = 3
    """Two passes on the grid of the OCP standard."""
    MXFP4_E2M1 = 4
    """One pass."""
    MXFP8 = 5
    """E4M3, one pass."""

    @property
    def label(self) -> str:
        """The name that users give and read."""
        return _LABELS[self]

    @classmethod
    def named(cls, label: str) -> ActivationFormat:
        """The format of a label.

        Raises:
            KeyError: no format has it.
        """
        return {text: found for found, text in _LABELS.items()}[label]


_LABELS = {
    ActivationFormat.INT8: "int8",
    ActivationFormat.MXFP4_E1M2_X2: "mxfp4x2",
    ActivationFormat.MXFP4_E1M2: "mxfp4",
    ActivationFormat.MXFP4_E2M1_X2: "mxfp4x2-e2m1",
    ActivationFormat.MXFP4_E2M1: "mxfp4-e2m1",
    ActivationFormat.MXFP8: "mxfp8",
}


E2M1_ZERO = 12
"""Zero point of `Codebook.E2M1`: what the code of 0 stands for."""

CODEBOOKS = {
    Codebook.E2M1: np.array([0, 4, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 24, 24], np.uint8),
}
"""By code, 0 to 15, ascending; the last is not used."""


@dataclass(frozen=True)
class Storage:
    """How a weight is stored: the first three numbers of every plan."""

    k: int
    """Length of the reduction, the last dimension of A."""
    bits: int
    """2, 4 or 8 per weight code."""
    block_size: int
    """K-steps per group, 1 to `LONGEST_GROUP`; the last group may be shorter."""

    @property
    def groups(self) -> int:
        """Groups along K, the last one perhaps shorter."""
        return -(-self.k // self.block_size)

    @property
    def codes_per_byte(self) -> int:
        """Weight codes in a byte of ``B``."""
        return 8 // self.bits

    @property
    def lines(self) -> int:
        """Lines of 64 bytes per tile and group."""
        return -(-self.block_size // (QUAD * self.codes_per_byte))

    def packed_shape(self, n: int) -> tuple[int, int, int, int]:
        """Shape of ``B`` for ``n`` output columns."""
        return (-(-n // TILE), self.groups, self.lines, TILE * QUAD)


@dataclass(frozen=True)
class Plan(Storage):
    """What ``msd.MatMul`` needs to know and cannot read off its inputs' shapes: the input ``plan``, int64[7].

    It is an input and not a set of attributes because at opset 11 no attribute can become a tensor, and the
    function body must run there.
    """

    terms: int
    """INT8 terms of the activation, 1 to 3."""
    per_row: bool
    """One activation scale for the whole row instead of one per row and group."""
    codebook: Codebook = field(default=Codebook.INTEGER, kw_only=True)
    """What weight codes stand for."""
    activation: ActivationFormat = field(default=ActivationFormat.INT8, kw_only=True)
    """What a digit of the activation is."""

    def tensor(self) -> np.ndarray:
        """The input ``plan``."""
        numbers = (self.k, self.bits, self.block_size, self.terms, self.per_row, self.codebook, self.activation)
        return np.array(numbers, np.int64)

    @classmethod
    def of(cls, tensor: np.ndarray) -> Plan:
        """Read the input ``plan``."""
        k, bits, block_size, terms, per_row, codebook, activation = (int(v) for v in tensor)
        formats = Codebook(codebook), ActivationFormat(activation)
        return cls(k, bits, block_size, terms, bool(per_row), codebook=formats[0], activation=formats[1])


def pack_codes(codes: np.ndarray, plan: Storage) -> np.ndarray:
    """Arrange weight codes as the ops read them.

    Args:
        codes: ``[K, N]`` uint8 in ``[0, 2**bits)``.
        plan: K, bits and block size.

    Returns:
        ``[tiles, groups, lines, 64]`` uint8.
    """
    packed = np.empty(plan.packed_shape(codes.shape[1]), np.uint8)
    if codes.strides[0] < codes.strides[1]:
        _pack_columns_of_k(codes, plan, packed)
    else:
        _pack_rows_of_n(codes, plan, packed)
    return packed


def _pack_columns_of_k(codes: np.ndarray, plan: Storage, packed: np.ndarray) -> None:
    """`pack_codes` where the K of a column are neighbours: each four are a word already; some tiles at a time."""
    k = len(codes)
    tiles, groups, lines, _ = packed.shape
    whole, depth = k // plan.block_size, lines * plan.codes_per_byte * QUAD
    step = max(1, _AT_ONCE // (TILE * groups * depth))
    for first in range(0, tiles, step):
        count = min(step, tiles - first)
        columns = codes[:, first * TILE : (first + count) * TILE].T
        blocks = columns[:, : whole * plan.block_size].reshape(len(columns), whole, plan.block_size)
        padded = np.zeros((count * TILE, groups, depth), np.uint8)
        padded[: len(columns), :whole, : plan.block_size] = blocks
        if whole < groups:
            padded[: len(columns), whole, : k - whole * plan.block_size] = columns[:, whole * plan.block_size :]
        words = padded.view(np.uint32).reshape(count, TILE, groups * lines, plan.codes_per_byte)
        joined = _joined(words, 3, plan.bits)
        packed[first : first + count].view(np.uint32).reshape(count, -1, TILE)[...] = joined.transpose(0, 2, 1)


def _pack_rows_of_n(codes: np.ndarray, plan: Storage, packed: np.ndarray) -> None:
    """`pack_codes` where the columns of a K are neighbours: four rows interleaved, then lines put in place; some groups at a time."""
    n = codes.shape[1]
    tiles, groups, lines, width = packed.shape
    depth = lines * plan.codes_per_byte * QUAD
    placed = packed.reshape(tiles, groups, lines * width).view(f"V{width}")
    step = max(1, _AT_ONCE // (depth * tiles * TILE))
    for first in range(0, groups, step):
        count = min(step, groups - first)
        padded = np.zeros((count, depth, tiles * TILE), np.uint8)
        for g in range(count):
            rows = codes[(first + g) * plan.block_size : (first + g + 1) * plan.block_size]
            padded[g, : len(rows), :n] = rows
        joined = _joined(padded.reshape(count, lines, plan.codes_per_byte, QUAD, -1), 2, plan.bits)
        quads = np.empty((count, lines, tiles * TILE, QUAD), np.uint8)
        for i in range(QUAD):
            quads[..., i] = joined[:, :, i]
        placed[:, first : first + count] = quads.reshape(count, lines, -1).view(f"V{width}").transpose(2, 0, 1)


def _joined(codes: np.ndarray, axis: int, bits: int) -> np.ndarray:
    """The codes along an axis side by side in their bytes, the first in the lowest bits."""
    joined: np.ndarray
    joined, *others = np.moveaxis(codes, axis, 0)
    for position, part in enumerate(others, 1):
        joined = joined | part << codes.dtype.type(position * bits)
    return joined


def unpack_codes(packed: np.ndarray, n: int, plan: Storage) -> np.ndarray:
    """The inverse of `pack_codes`: ``[K, n]`` uint8."""
    tiles, groups, lines, _ = packed.shape
    u = plan.codes_per_byte
    shifts = np.arange(0, 8, plan.bits, dtype=np.uint8)
    parts = (packed[..., None] >> shifts) & np.uint8(2**plan.bits - 1)
    axes = parts.reshape(tiles, groups, lines, TILE, QUAD, u).transpose(1, 2, 5, 4, 0, 3)
    padded = axes.reshape(groups, lines * u * QUAD, tiles * TILE)
    return padded[:, : plan.block_size, :n].reshape(groups * plan.block_size, n)[: plan.k]


def decode(codes: np.ndarray, codebook: Codebook) -> np.ndarray:
    """The numbers that weight codes stand for, of the codes' shape: uint8."""
    numbers: np.ndarray = codes if codebook is Codebook.INTEGER else CODEBOOKS[codebook][codes]
    return numbers


def pack_columns(values: np.ndarray) -> np.ndarray:
    """Arrange one value per group and column, ``[groups, N]``, as ``[tiles, groups, 16]``; padding is 0."""
    groups, n = values.shape
    tiles = -(-n // TILE)
    padded = np.zeros((groups, tiles * TILE), values.dtype)
    padded[:, :n] = values
    return np.ascontiguousarray(padded.reshape(groups, tiles, TILE).transpose(1, 0, 2))


def unpack_columns(packed: np.ndarray, n: int, groups: int) -> np.ndarray:
    """The inverse of `pack_columns`, with shared values repeated: ``[groups, n]``."""
    columns = packed.transpose(1, 0, 2).reshape(packed.shape[1], -1)[:, :n]
    return np.broadcast_to(columns, (groups, n))
