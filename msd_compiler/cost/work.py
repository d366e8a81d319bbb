"""What there is to compute at a site, whichever way it is computed."""

from __future__ import annotations

from dataclasses import dataclass

FLOAT_BITS = 16
"""From here on a value is a float, below it a code."""


@dataclass(frozen=True)
class LinearWork:
    """``[M, K] x [K, N]`` with a low-bit weight."""

    k: int
    n: int
    bits: int
    """Of a code of the weight."""
    group: int
    """Steps of K that share an activation scale; a weight with longer blocks is split into such."""
    per_channel: bool = False
    """One weight scale per column."""
    copies: int = 1
    """Matrices of that shape: experts."""
    is_fp4: bool = False
    """Codes are FP4 values in blocks of 32 with a power of two each (MXFP4): hardware with FP4 takes them as they are."""

    @property
    def is_coded(self) -> bool:
        """Whether there is anything to dequantize."""
        return self.bits < FLOAT_BITS

    @property
    def groups(self) -> int:
        """Of an activation row."""
        return -(-self.k // self.group)

    @property
    def weight_bytes(self) -> float:
        """Codes and float32 scales of one matrix."""
        return self.k * self.n * self.bits / 8 + 4 * self.n * (1 if self.per_channel else self.groups)


@dataclass(frozen=True)
class AttentionWork:
    """Attention over a cache."""

    heads: int
    kv_heads: int
    head_size: int
    bits: int
    """Of a value in the cache: 4, 8, 16 or 32."""

    @property
    def is_coded(self) -> bool:
        """Whether there is anything to dequantize."""
        return self.bits < FLOAT_BITS

    @property
    def queries_per_head(self) -> int:
        """Query heads that share keys and values."""
        return self.heads // self.kv_heads


def mean_seen(tokens: int, context: int) -> float:
    """Tokens that the last `tokens` of `context` see on average, each up to itself."""
    return context - (tokens - 1) / 2
