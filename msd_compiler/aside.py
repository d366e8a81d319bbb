"""A hidden folder beside a result, for what is not finished."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

if sys.platform != "win32":
    import fcntl


class Aside:
    """A new folder ``FOLDER/.STEM.*.partial``, locked as long as it is there: the lock says that somebody is at work in it.

    What processes that were killed left of results of that stem goes when the next one is made.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, folder: Path, stem: str):
        _clear_leftovers(folder, stem)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=f".{stem}.", suffix=".partial", dir=folder))
            self._lock = _lock(self.path, wait=True)
            if self.path.is_dir():
                return
            if self._lock is not None:  # taken for a leftover in the instant before the lock
                os.close(self._lock)

    def remove(self) -> None:
        """Remove the folder and all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _clear_leftovers(folder: Path, stem: str) -> None:
    """Remove what processes that are no more left of results of this name; a lock does not outlive its process."""
    ours = re.compile(re.escape(f".{stem}.") + r"[a-z0-9_]{8}\.partial")
    for left in [p for p in folder.iterdir() if ours.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]:
        lock = _lock(left, wait=False)
        if lock is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path, *, wait: bool) -> int | None:
    """A handle that keeps others from locking the folder; None if they do already, or it cannot be locked."""
    if sys.platform == "win32":
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        return None
    return handle
