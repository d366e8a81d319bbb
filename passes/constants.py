"""Constants that are added to every row."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from msd_compiler.constant_values import constant_value
from msd_compiler.linked import Linked, Scope


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
