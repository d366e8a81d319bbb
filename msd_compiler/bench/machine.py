"""What this machine can do at best: multiply-adds on registers, and reading memory."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from pydantic import BaseModel

from ..runtime import RuntimeRefused, library_path

Unit = Literal["float32", "int16", "int8"]
"""What is multiplied; sums are float32 or int32."""

LEAST_BYTES = 2**28
MOMENTS = 15
"""What else goes on slows a loop down, so the best of several moments counts."""
ROUNDS = 10**6
"""Of a bare loop: milliseconds."""


class LimitShare(BaseModel):
    """How much of what the machine can do at best was reached."""

    share: float
    """The larger one of the two below."""
    by: Literal[Unit, "memory"]
    """Whose share that is: of a unit's multiply-adds, or of the bytes that memory gives."""
    compute_share: float | None
    """Multiply-adds per second over the unit's; None: its rate is not known."""
    memory_share: float
    """Bytes of the weight per second over what is read from memory; above 1 if the weight stays in a cache."""


class Limits(BaseModel):
    """Rates, of as many threads together as sessions have."""

    operations_per_second: dict[Unit, float]
    """Of bare loops on registers, by the instruction set that the native library uses; a multiply-add is two. Without
    the units that it has no loop for."""
    read_bytes_per_second: float
    """Over a buffer larger than the last cache."""
    last_cache_bytes: int
    """0 where the system does not say. Weights that fit are read from there, not from memory."""

    def best(self, other: Limits) -> Limits:
        """The larger of both rates: those of the quieter moment."""
        mine, theirs = self.operations_per_second, other.operations_per_second
        return Limits(
            operations_per_second={unit: max(rate, theirs.get(unit, 0)) for unit, rate in mine.items()},
            read_bytes_per_second=max(self.read_bytes_per_second, other.read_bytes_per_second),
            last_cache_bytes=self.last_cache_bytes,
        )

    def least_seconds(self, unit: Unit, operations: float, size: float) -> float:
        """The roofline: what so many operations and bytes take at least, the slower of both."""
        rate = self.operations_per_second.get(unit)
        return max(operations / rate if rate else 0.0, size / self.read_bytes_per_second)

    def reached(self, seconds: float, unit: Unit, operations: float, size: float) -> LimitShare:
        """What a time is of the limit.

        Args:
            seconds: it took.
            unit: that multiplies.
            operations: a multiply-add is two.
            size: bytes that must be read once.
        """
        rate = self.operations_per_second.get(unit)
        compute = operations / seconds / rate if rate else None
        memory = size / seconds / self.read_bytes_per_second
        by_unit = compute is not None and compute > memory
        return LimitShare(
            share=max(compute or 0.0, memory),
            by=unit if by_unit else "memory",
            compute_share=compute,
            memory_share=memory,
        )


def measure_limits(threads: int = 1, read_bytes: int | None = None) -> Limits:
    """Run bare loops of the native library, in so many threads at once; a fraction of a second.

    Args:
        threads: that compute or read.
        read_bytes: of the buffer that is read; None: four times the last cache, 256 MiB at least.

    Raises:
        RuntimeRefused: the native library is missing or an old one.
    """
    library = _library()
    if read_bytes is None:
        read_bytes = max(LEAST_BYTES, 4 * last_cache_bytes())
    with ThreadPoolExecutor(threads) as pool:

        def multiplied(unit: Unit, _: int) -> float:
            operations: float = library.msd_multiply_add(unit.encode(), ROUNDS)
            return operations

        def rate(work: Callable[[int], float]) -> float:
            """The most that all threads did in a second; ``work`` gets the thread's number and says what it did."""
            best = 0.0
            for _ in range(MOMENTS):
                began = time.perf_counter()
                done = sum(pool.map(work, range(threads)))
                best = max(best, done / (time.perf_counter() - began))
            return best

        units: tuple[Unit, ...] = get_args(Unit)
        loops = {unit: rate(partial(multiplied, unit)) for unit in units}
        parts = np.full((threads, read_bytes // threads // 8), 1)  # not zeros: those would be one page, again and again
        read = rate(lambda i: 8 * library.msd_read(parts[i].ctypes.data, parts.shape[1]))
    return Limits(
        operations_per_second={unit: found for unit, found in loops.items() if found},
        read_bytes_per_second=read,
        last_cache_bytes=last_cache_bytes(),
    )


def _library() -> ctypes.CDLL:
    try:
        path = library_path()
        library = ctypes.CDLL(str(path))
        library.msd_multiply_add.restype = ctypes.c_double
        library.msd_multiply_add.argtypes = [ctypes.c_char_p, ctypes.c_int64]
        library.msd_read.restype = ctypes.c_int64
        library.msd_read.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    except (FileNotFoundError, OSError) as error:
        raise RuntimeRefused(str(error)) from error
    except AttributeError as error:
        raise RuntimeRefused(
            f"native library {str(path)!r} is an old one: it has no msd_multiply_add and msd_read; build it anew"
        ) from error
    return library


def last_cache_bytes() -> int:
    """The largest cache of the first core; 0 where the system does not say."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = file.read_text().strip()[:-1], file.read_text().strip()[-1:]
        if number.isdigit():
            sizes.append(int(number) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(unit, 1))
    return max(sizes)
