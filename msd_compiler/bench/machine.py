"""What this machine can do at best."""

from __future__ import annotations

import time
from pathlib import Path

LEAST_BYTES = 2**28
ROUNDS = 7


def read_bytes_per_second(size: int | None = None) -> float:
    """How fast one thread reads memory: the best of several searches for a byte that is not there.

    The C library searches 32 bytes or more at a time, faster than memory gives them.

    Args:
        size: bytes of the buffer; None: four times the last cache, 256 MiB at least.
    """
    if size is None:
        size = max(LEAST_BYTES, 4 * last_cache_bytes())
    buffer = bytes([2]) * size  # not zeros: those would be one page of memory, again and again
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        buffer.find(b"\x01")
        best = min(best, time.perf_counter() - began)
    return size / best


def last_cache_bytes() -> int:
    """The largest cache of the first core; 0 where the system does not say."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = file.read_text().strip()[:-1], file.read_text().strip()[-1:]
        if number.isdigit():
            sizes.append(int(number) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(unit, 1))
    return max(sizes)
