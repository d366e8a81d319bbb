"""The input ``plan`` of ``msd.MatMulIntegerToFloat``; its weight is stored as that of ``msd.MatMul``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..matmul.layout import Storage

LONGEST_GROUP = 128
"""A sum of 128 products |Q - z| <= 65535 by |w - z| <= 255 fits int32, and 256 do not."""

LONGEST_SUM = 32768
"""K up to which a column may have one scale: so many products of bytes fit int32."""


@dataclass(frozen=True)
class CodesPlan(Storage):
    """How the weight is stored and what the activation's codes are: the input ``plan``, int64[5]."""

    code_bits: int
    """8 or 16 per activation code."""
    signed: bool
    """Whether they are int8 or int16, not uint8 or uint16: a function body cannot ask for A's type."""

    def tensor(self) -> np.ndarray:
        """The input ``plan``."""
        return np.array([self.k, self.bits, self.block_size, self.code_bits, self.signed], np.int64)

    @classmethod
    def of(cls, tensor: np.ndarray) -> CodesPlan:
        """Read the input ``plan``."""
        k, bits, block_size, code_bits, signed = (int(v) for v in tensor)
        return cls(k, bits, block_size, code_bits, bool(signed))
