"""Models side by side on this machine: speed, distance from the first one's meaning, start, memory, and where time goes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import api
from ..compare import relative_l2
from ..errors import OptionError
from ..inputs import Feed
from ..oracle_session import open_oracle
from ..report import embedded_report
from ..runtime import RuntimeRefused, run
from ..save import weight_bytes
from ..source import Source, load
from ..verification import WHOLE_UP_TO, Progress, silent
from .contestants import Contestant, fresh_rows, made_feeds, open_contestant, session_options
from .decoding import DecodeGrid, time_decoding
from .profile import profiled
from .report import ModelsReport, RunRow, Setting
from .timing import Bound, check_threads, in_turns


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
        contestants = [open_contestant(label, source, threads) for label, source in sources.items()]
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
        fresh = fresh_rows(contestants, threads, Path(folder), effort.starts, notes, progress)
        profiles = []
        for number, c in enumerate(contestants):
            progress("profiling", number, len(contestants))
            profiles.append(
                profiled(
                    c.label, c.path, c.feeds[-1], session_options(threads, portable=c.is_portable), folder, effort.top
                )
            )
        progress("profiling", len(contestants), len(contestants))
        return ModelsReport(
            setting=Setting.here(threads),
            models=models,
            runs=runs,
            decoding=decoding,
            fresh=fresh,
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


def _prepare(
    contestants: list[Contestant], inputs: Feed | None, notes: list[str]
) -> dict[str, dict[str, np.ndarray] | None]:
    """Give every contestant its feeds; returns, by feed, the outputs of the first one's oracle, None if there is none."""
    first = contestants[0]
    if inputs is not None:
        for c in contestants:
            _check_names(inputs, c)
    first.feeds = [inputs] if inputs is not None else made_feeds(first)
    for other in contestants[1:]:
        other.is_alike = _inputs(other) == _inputs(first)
        if inputs is not None or other.is_alike:
            other.feeds = first.feeds
        else:
            other.feeds = made_feeds(other)
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
