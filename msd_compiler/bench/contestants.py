"""Models that are compared: files, open, with inputs; and what each does in a process of its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from ..errors import ModelError
from ..inputs import Feed, generate
from ..runtime import RuntimeRefused, library_path, run, session
from ..source import Source
from ..verification import Progress
from . import fresh
from .report import FreshRow
from .timing import QUIET


@dataclass
class Contestant:
    """One model, open."""

    label: str
    source: Source
    session: onnxruntime.InferenceSession
    is_portable: bool
    """Whether it has no op of ours, and needs no library."""
    feeds: Sequence[Feed] = ()
    is_alike: bool = True
    """Whether its inputs are those of the first model."""

    @property
    def path(self) -> Path:
        """Its file."""
        assert self.source.path is not None
        return self.source.path


def session_options(threads: int | None, *, portable: bool) -> dict[str, Any]:
    """Of every timed session; threads None: onnxruntime's default."""
    return {**QUIET, "portable": portable, **({} if threads is None else {"intra_op_num_threads": threads})}


def open_contestant(label: str, source: Source, threads: int | None) -> Contestant:
    """Open a model's file.

    Raises:
        ModelError: it is no file.
        RuntimeRefused: onnxruntime does not load it.
    """
    if source.path is None:
        raise ModelError(f"{label!r} is no file")
    is_portable = all(opset.domain != "msd" for opset in source.proto.opset_import)
    return Contestant(
        label, source, session(source.path, **session_options(threads, portable=is_portable)), is_portable
    )


def made_feeds(contestant: Contestant) -> list[Feed]:
    """Inputs made from its signature.

    Raises:
        NoInputs: none were found on which it runs.
    """
    return generate(contestant.source.proto, lambda arrays: run(contestant.session, None, arrays))


def fresh_rows(
    contestants: list[Contestant], threads: int | None, folder: Path, starts: int, notes: list[str], progress: Progress
) -> list[FreshRow]:
    """Medians over processes that are started in turns; what fails gets a note and no row."""
    found: dict[str, list[dict[str, float | None]]] = {c.label: [] for c in contestants}
    failed: set[str] = set()
    for turn in range(starts):
        progress("starting fresh processes", turn, starts)
        for c in contestants:
            if c.label in failed:
                continue
            try:
                found[c.label].append(_fresh(c, threads, folder))
            except RuntimeRefused as error:
                failed.add(c.label)
                notes.append(str(error))
    progress("starting fresh processes", starts, starts)
    return [
        FreshRow.model_validate({"model": label, **{key: _median([m[key] for m in all_]) for key in all_[0]}})
        for label, all_ in found.items()
        if label not in failed and all_
    ]


def _median(values: Sequence[float | None]) -> float | None:
    """The middle value, an observed one."""
    known = [value for value in values if value is not None]
    return statistics.median_low(known) if known else None


def _fresh(contestant: Contestant, threads: int | None, folder: Path) -> dict[str, float | None]:
    """What a process of its own says of a model.

    Raises:
        RuntimeRefused: the process ends otherwise.
    """
    feed = contestant.feeds[0].arrays
    is_bfloat16 = {name: array.dtype.name == "bfloat16" for name, array in feed.items()}
    arrays = [a.view(np.uint16) if is_bfloat16[name] else a for name, a in feed.items()]
    np.savez(folder / "inputs.npz", *arrays)
    request: fresh.Request = {
        "model": str(contestant.path.resolve()),
        "library": None if contestant.is_portable else str(library_path()),
        "arrays": str(folder / "inputs.npz"),
        "names": list(feed),
        "bfloat16": [name for name, yes in is_bfloat16.items() if yes],
        "threads": threads,
    }
    command = [sys.executable, "-P", os.fspath(Path(fresh.__file__))]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise RuntimeRefused(f"{contestant.label} does not run in a fresh process: {reason[0]}")
    said: dict[str, float | None] = json.loads(done.stdout.splitlines()[-1])
    return said
