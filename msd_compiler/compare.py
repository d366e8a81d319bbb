"""How far two outputs are apart."""

from __future__ import annotations

import numpy as np

from .report import Agreement, Disagreement

_LISTED = 20


def relative_l2(found: np.ndarray, oracle: np.ndarray) -> float:
    """``|found - oracle| / |oracle|`` in float64; the plain distance where the oracle is all zeros.

    Where both are NaN, or the same infinity, they agree; where only one is, they are infinitely far apart.
    """
    distance, size = _difference(found, oracle)
    if not np.isfinite(distance).all():
        return float("inf")
    norm = float(np.linalg.norm(size))
    return float(np.linalg.norm(distance)) / (norm or 1.0)


def max_abs(found: np.ndarray, oracle: np.ndarray) -> float:
    """Largest difference of an element."""
    distance, _ = _difference(found, oracle)
    return float(np.abs(distance).max(initial=0)) if np.isfinite(distance).all() else float("inf")


def argmax_agreement(found: np.ndarray, oracle: np.ndarray) -> Agreement:
    """Equal arg-max over the last dimension: for logits, equal greedy tokens."""
    width = oracle.shape[-1]
    a = found.astype(np.float64).reshape(-1, width)
    b = oracle.astype(np.float64).reshape(-1, width)
    chosen, right = a.argmax(axis=1), b.argmax(axis=1)
    rows = np.flatnonzero(chosen != right)
    margins = b[rows, right[rows]] - b[rows, chosen[rows]]
    worst_first = rows[np.argsort(-margins, kind="stable")]
    return Agreement(
        equal=1 - len(rows) / len(b) if len(b) else 1.0,
        positions=len(b),
        disagreements=[
            Disagreement(
                index=[int(i) for i in np.unravel_index(row, oracle.shape[:-1])],
                oracle=int(right[row]),
                found=int(chosen[row]),
                margin=float(b[row, right[row]] - b[row, chosen[row]]),
            )
            for row in worst_first[:_LISTED]
        ],
    )


def _difference(found: np.ndarray, oracle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if found.shape != oracle.shape:
        return np.array([np.inf]), np.array([1.0])
    a, b = found.astype(np.float64), oracle.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        distance = np.where(same, 0, a - b)
    return np.where(np.isnan(distance), np.inf, distance), np.where(np.isfinite(b), b, 0)
