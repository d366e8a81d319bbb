"""Where a model spends its time: onnxruntime's own profiler, its file read back."""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Any

from ..inputs import Feed
from ..runtime import session
from .report import ProfileRow, SiteTime
from .timing import Bound

RUNS = 5
_SUFFIX = "_kernel_time"


def profiled(
    label: str, model: Path, feed: Feed, options: dict[str, Any], folder: str | os.PathLike[str], top: int
) -> ProfileRow:
    """Profile a few runs, after one that does not count.

    Args:
        label: what the row calls the model.
        model: its file.
        feed: its inputs.
        options: of the session.
        folder: for the profiler's file.
        top: nodes to list.

    Raises:
        RuntimeRefused: the model does not run.
    """
    prefix = os.fspath(Path(folder) / "profile")
    opened = session(model, enable_profiling=True, profile_file_prefix=prefix, **options)
    bound = Bound(opened, feed.arrays)
    for _ in range(1 + RUNS):
        bound()
    file = Path(opened.end_profiling())
    sites = site_times(json.loads(file.read_text()))
    file.unlink()
    return ProfileRow(model=label, inputs=feed.name, nodes_ms=sum(s.ms for s in sites), top=sites[:top])


def site_times(events: list[dict[str, Any]]) -> list[SiteTime]:
    """Nodes by time in a run, longest first, from the profiler's events; the first run is left out."""
    ends = sorted(e["ts"] + e["dur"] for e in events if e.get("cat") == "Session" and e["name"] == "model_run")
    took: dict[tuple[str, str, str], list[float]] = {}
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith(_SUFFIX) or event["ts"] < ends[0]:
            continue
        facts = event.get("args", {})
        key = (event["name"].removesuffix(_SUFFIX), facts.get("op_name", ""), facts.get("node_index", ""))
        took.setdefault(key, []).append(event["dur"] / 1e3)
    runs = len(ends) - 1
    ms = {key: statistics.median(times) * len(times) / runs for key, times in took.items()}
    whole = sum(ms.values()) or 1.0
    rows = [SiteTime(node=node, op=op, ms=time, share=time / whole) for (node, op, _), time in ms.items()]
    return sorted(rows, key=lambda row: -row.ms)
