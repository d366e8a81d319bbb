"""A low-bit weight's numbers as floats: for measuring, never for a result."""

from __future__ import annotations

import numpy as np

from .facts import LowBitWeight
from .runtime_ops.matmul.layout import decode


def float_values(weight: LowBitWeight) -> tuple[np.ndarray, np.ndarray]:
    """``W[k, n]``, and the scale of each: how far apart two neighbouring codes are; float32.

    Raises:
        ModelError: see `LowBitWeight.load`.
    """
    data = weight.load()
    block = weight.block_size or weight.k
    group = np.arange(weight.k) // block if len(data.scales) > 1 else np.zeros(weight.k, np.int64)
    steps = np.broadcast_to(data.scales[group], data.codes.shape).astype(np.float32)
    zeros: np.ndarray = data.zero_points.astype(np.float32)
    if data.offsets is not None:
        zeros = zeros + data.offsets
    if data.input_scales is not None:
        steps = steps * data.input_scales[:, None]
    values = decode(data.codes, weight.codebook).astype(np.float32)
    values -= zeros[group] if len(zeros) > 1 else zeros
    with np.errstate(over="ignore"):  # infinite in the model, too
        values *= steps
    return values, steps
