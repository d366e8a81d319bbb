"""Models side by side on this machine: speed, distance from the first one's meaning, start, memory, and where time goes."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from .. import api
from ..compare import relative_l2
from ..errors import ModelError, OptionError
from ..inputs import Feed, generate
from ..oracle_session import open_oracle
from ..report import embedded_report
from ..runtime import RuntimeRefused, library_path, run, session
from ..save import weight_bytes
from ..source import Source, load
from ..verification import WHOLE_UP_TO, Progress, silent
from . import fresh
from .decoding import DecodeGrid, time_decoding
from .profile import profiled
from .report import FreshRow, ModelsReport, RunRow, Setting
from .timing import QUIET, Bound, check_threads, in_turns


@dataclass(frozen=True)
class Effort:
    """How much is timed."""

    runs: int = 15
    """Of each, for a median."""
    seconds: float = 30.0
    """For each comparison; then fewer runs, `timing.LEAST_RUNS` at least."""
    grid: DecodeGrid = field(default_factory=DecodeGrid)
    starts: int = 3
    """Fresh processes per model, for a median."""
    top: int = 10
    """Nodes to list."""


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


def bench_models(
    model: Path,
    results: Sequence[Path] = (),
    *,
    inputs: Feed | None = None,
    threads: int | None = None,
    effort: Effort | None = None,
    progress: Progress = silent,
) -> ModelsReport:
    """Time models in turns.

    Args:
        model: the measure.
        results: what to compare it with; none: its compiled result, made in a temporary folder.
        inputs: for all models; None: made from their signatures.
        threads: in every session; None: onnxruntime's default.
        effort: how much is timed.
        progress: told what is being done.

    Raises:
        ModelError: a model cannot be read.
        OptionError: threads is less than 1, or the inputs are others than a model's.
        NoInputs: no inputs were found on which a model runs.
        RuntimeRefused: onnxruntime does not load or run one of them.
    """
    check_threads(threads)
    effort = effort or Effort()
    notes: list[str] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        files = dict(zip(_labels([model, *results]), [model, *results], strict=True))
        models: dict[str, str | None] = {label: str(path) for label, path in files.items()}
        sources = {label: load(path) for label, path in files.items()}
        if not results:
            compiled = _compiled(sources[model.name], model, Path(folder), notes, progress)
            if compiled is not None:
                sources["compiled"], models["compiled"] = load(compiled), None
        contestants = [_open(label, source, threads) for label, source in sources.items()]
        progress("looking for inputs", 0, 1)
        expected = _prepare(contestants, inputs, notes)
        runs: list[RunRow] = []
        for number, name in enumerate(expected):
            progress("timing runs", number, len(expected))
            runs += _time_feed(name, contestants, expected[name], effort)
        progress("timing runs", len(expected), len(expected))
        decoding = time_decoding(
            {c.label: (c.session, c.source.proto) for c in contestants},
            effort.grid,
            runs=effort.runs,
            seconds=effort.seconds,
            notes=notes,
            progress=progress,
        )
        fresh_rows = _all_fresh(contestants, threads, Path(folder), effort.starts, notes, progress)
        profiles = []
        for number, c in enumerate(contestants):
            progress("profiling", number, len(contestants))
            profiles.append(
                profiled(c.label, c.path, c.feeds[-1], _options(threads, portable=c.is_portable), folder, effort.top)
            )
        progress("profiling", len(contestants), len(contestants))
        return ModelsReport(
            setting=Setting.here(threads),
            models=models,
            runs=runs,
            decoding=decoding,
            fresh=fresh_rows,
            profiles=profiles,
            notes=notes,
        )


def _labels(paths: Sequence[Path]) -> list[str]:
    """A short name of each file, or, where two have the same, its whole path; the same file twice is counted."""
    names = [path.name for path in paths]
    labels = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
    return [
        label if labels.count(label) == 1 else f"{label} ({labels[: i + 1].count(label)})"
        for i, label in enumerate(labels)
    ]


def _compiled(source: Source, model: Path, folder: Path, notes: list[str], progress: Progress) -> Path | None:
    if embedded_report(source.proto) is not None:
        notes.append("the model is a compiled result: timed alone")
        return None
    target = folder / "compiled.onnx"
    if not api.compile(model, target, verify=False, progress=progress).changed:
        notes.append("nothing in the model can be rewritten: timed alone")
        return None
    return target


def _options(threads: int | None, *, portable: bool) -> dict[str, Any]:
    return {**QUIET, "portable": portable, **({} if threads is None else {"intra_op_num_threads": threads})}


def _open(label: str, source: Source, threads: int | None) -> Contestant:
    if source.path is None:
        raise ModelError(f"{label!r} is no file")
    is_portable = all(opset.domain != "msd" for opset in source.proto.opset_import)
    return Contestant(label, source, session(source.path, **_options(threads, portable=is_portable)), is_portable)


def _prepare(
    contestants: list[Contestant], inputs: Feed | None, notes: list[str]
) -> dict[str, dict[str, np.ndarray] | None]:
    """Give every contestant its feeds; returns, by feed, the outputs of the first one's oracle, None if there is none."""
    first = contestants[0]
    if inputs is not None:
        for c in contestants:
            _check_names(inputs, c)
    first.feeds = [inputs] if inputs is not None else _made(first)
    for other in contestants[1:]:
        other.is_alike = _inputs(other) == _inputs(first)
        if inputs is not None or other.is_alike:
            other.feeds = first.feeds
        else:
            other.feeds = _made(other)
            notes.append(f"{other.label} has other inputs than {first.label}: timed on its own, not compared")
    if weight_bytes(first.source.proto) > WHOLE_UP_TO:
        notes.append("weights above 1 GB: outputs are not compared with the oracle, which would take them as float32")
        return {feed.name: None for feed in first.feeds}
    try:
        oracle, widen = open_oracle(first.source)
        names = [o.name for o in oracle.get_outputs()]
        return {f.name: dict(zip(names, run(oracle, None, widen(f.arrays)), strict=True)) for f in first.feeds}
    except RuntimeRefused as error:
        notes.append(f"no oracle to compare with: {error}")
        return {feed.name: None for feed in first.feeds}


def _check_names(inputs: Feed, contestant: Contestant) -> None:
    taken, given = sorted(_inputs(contestant)), sorted(inputs.arrays)
    if taken != given:
        raise OptionError(
            f"the inputs given are {', '.join(map(repr, given)) or 'none'}; "
            f"{contestant.label} takes {', '.join(map(repr, taken)) or 'none'}"
        )


def _inputs(contestant: Contestant) -> dict[str, str]:
    return {i.name: i.type for i in contestant.session.get_inputs()}


def _made(contestant: Contestant) -> list[Feed]:
    return generate(contestant.source.proto, lambda arrays: run(contestant.session, None, arrays))


def _time_feed(
    name: str, contestants: list[Contestant], expected: Mapping[str, np.ndarray] | None, effort: Effort
) -> list[RunRow]:
    bound = {c.label: Bound(c.session, f.arrays) for c in contestants for f in c.feeds if f.name == name}
    times = in_turns(bound, runs=effort.runs, seconds=effort.seconds, warm_ups=2)
    measure = times[contestants[0].label].median_ms
    rows = []
    for c in contestants:
        if c.label not in times:
            continue
        distances: dict[str, float] = {}
        if c.is_alike and expected is not None:
            numbers = {n: e for n, e in expected.items() if n in bound[c.label].names and _kind(e) is not None}
            found = {n: bound[c.label].output(n) for n in numbers}
            distances = {n: relative_l2(found[n], e) for n, e in numbers.items() if _kind(found[n]) == _kind(e)}
        time = times[c.label]
        rows.append(
            RunRow(model=c.label, inputs=name, time=time, ratio=time.median_ms / measure, relative_l2=distances)
        )
    return rows


def _kind(value: Any) -> str | None:
    """Codes, or values; None for what is neither."""
    if not isinstance(value, np.ndarray) or value.dtype.kind in "OSU":
        return None
    return "codes" if value.dtype.kind in "iub" else "values"


def _all_fresh(
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
