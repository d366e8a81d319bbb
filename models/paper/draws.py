"""Random inputs, the two ways to make bf16 of them, and how far results are apart."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]


def _with_loud_values(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.standard_normal(shape) * np.where(rng.random(shape) < 0.01, 10, 1)


def _with_loud_channel(factor: float) -> Draw:
    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        x = rng.standard_normal(shape)
        x[:, shape[1] // 2] *= factor
        return x

    return draw


LOUD_CHANNELS = {f"normal, one channel {factor} times": _with_loud_channel(factor) for factor in (60, 1000)}

DRAWS: dict[str, Draw] = {
    "normal, deviation 1": lambda rng, shape: rng.standard_normal(shape),
    "normal, deviation 0.5": lambda rng, shape: rng.normal(0, 0.5, shape),
    "uniform, -1 to 1": lambda rng, shape: rng.uniform(-1, 1, shape),
    "uniform, -3 to 3": lambda rng, shape: rng.uniform(-3, 3, shape),
    "Laplace": lambda rng, shape: rng.laplace(size=shape),
    "exponential": lambda rng, shape: rng.exponential(size=shape),
    "Student, 3 degrees": lambda rng, shape: rng.standard_t(3, shape),
    "normal, 1 % ten times": _with_loud_values,
    **LOUD_CHANNELS,
}


def generator(seed: int, *names: object) -> np.random.Generator:
    """Numbers of their own for every experiment, so that one has the same whether or not others run."""
    return np.random.default_rng([seed, zlib.crc32(repr(names).encode())])


def truncated(x: np.ndarray) -> np.ndarray:
    """bf16 as the paper makes it, by clearing the low 16 bits: every value moves towards 0, by 0.28 % on average."""
    return (np.asarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def rounded(x: np.ndarray) -> np.ndarray:
    """bf16, round to nearest."""
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def relative_l2(y: np.ndarray, exact: np.ndarray) -> float:
    """Norm of the difference over that of the exact result."""
    return float(np.linalg.norm(y - exact) / np.linalg.norm(exact))


@dataclass(frozen=True)
class Errors:
    """Of all outputs, in percent."""

    l2: float
    over: tuple[float, ...]
    """Outputs further off than 0.1, 1 and 5 % of themselves."""

    @classmethod
    def of(cls, y: np.ndarray, exact: np.ndarray) -> Errors:
        """Compare."""
        off = np.abs(y - exact) / np.abs(exact)
        return cls(100 * relative_l2(y, exact), tuple(100 * float((off > t).mean()) for t in (0.001, 0.01, 0.05)))
