"""How ``msd.Attention`` stores its cache: layout ``attention/1``.

The cache is ``[B, Hkv, tokens, bytes]``, a token's codes side by side, signed and symmetric: what onnxruntime's
GroupQueryAttention keeps, so that a cache can be handed from one to the other.

* 8 bits: int8, one code a byte, ``-128 .. 127``;
* 4 bits: uint8, two codes a byte, the even column in the low bits; a nibble is ``code + 8``, a code ``-8 .. 7``.
  Where the columns are odd in number, the high bits of the last byte are 0 when written and ignored when read.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np

LAYOUT = "attention/1"
"""Value of the required attribute ``layout``: a kernel refuses any other."""

TILE = 256
"""Tokens whose probabilities share a maximum. Tiles are counted from a sequence's first token: part of the contract."""

LONGEST_HEAD = 512
"""Columns of a key: 512 products of a 16-bit code (at most 32258) and a key's (at most 128) fit int32."""

APPEND, SHARED, GROW = 0, 1, 2
CACHES = ("append", "shared", "grow")
"""What becomes of the past: new tokens go behind all of it; behind its valid tokens, where there must be room; behind its
valid tokens, and where there is no room the cache gets longer, as in onnxruntime's GroupQueryAttention."""


@dataclass(frozen=True)
class Plan:
    """What ``msd.Attention`` needs to know and cannot read off its inputs' shapes: the input ``plan``, int64[5].

    It is an input and not a set of attributes because at opset 11 no attribute can become a tensor, and the
    function body must run there.
    """

    bits: int
    """4 or 8 per code of the cache."""
    dynamic: bool
    """One scale per token and head, made when the token is stored; else the scales are given once and for all."""
    cache: int
    """What becomes of the past, as a number of `CACHES`."""
    causal: bool
    """A query sees no token behind its own position."""
    window: int
    """How many tokens up to its own a query sees; 0 for all."""

    @property
    def kind(self) -> str:
        """Value of the attribute ``cache``, which says the same as `cache` to shape inference."""
        return CACHES[self.cache]

    @property
    def largest(self) -> int:
        """Largest code that a scale per token gives."""
        return (1 << (self.bits - 1)) - 1

    def tensor(self) -> np.ndarray:
        """The input ``plan``."""
        return np.array(astuple(self), np.int64)

    @classmethod
    def of(cls, tensor: np.ndarray) -> Plan:
        """Read the input ``plan``."""
        bits, dynamic, cache, causal, window = (int(v) for v in tensor)
        return cls(bits, bool(dynamic), cache, bool(causal), window)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes ``[..., D]`` as the cache holds them: int8 ``[..., D]``, or uint8 ``[..., ceil(D / 2)]`` for 4 bits."""
    if bits == 8:
        return codes.astype(np.int8)
    nibbles = np.zeros((*codes.shape[:-1], codes.shape[-1] + codes.shape[-1] % 2), np.uint8)
    nibbles[..., : codes.shape[-1]] = codes + 8
    packed: np.ndarray = nibbles[..., ::2] | nibbles[..., 1::2] << 4
    return packed


def unpack_codes(packed: np.ndarray, columns: int, bits: int) -> np.ndarray:
    """The inverse of `pack_codes`: ``[..., columns]`` int8."""
    if bits == 8:
        return packed
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], 2 * packed.shape[-1])
    return nibbles[..., :columns].astype(np.int8) - np.int8(8)
