"""Where a model spends its time: onnxruntime's own profiler, its file read back."""

from __future__ import annotations

import json
import os
import statistics
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
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
    runs = node_runs(events)[1:]
    took: dict[tuple[str, str, int], list[float]] = {}
    for node in (node for run in runs for node in run):
        took.setdefault((node.name, node.op, node.index), []).append(node.ms)
    ms = {key: statistics.median(times) * len(times) / len(runs) for key, times in took.items()}
    whole = sum(ms.values()) or 1.0
    rows = [SiteTime(node=node, op=op, ms=time, share=time / whole) for (node, op, _), time in ms.items()]
    return sorted(rows, key=lambda row: -row.ms)


@dataclass(frozen=True)
class NodeRun:
    """One node, run once."""

    name: str
    """Its own, or what onnxruntime made of it where it fused nodes; without one, its op."""
    op: str
    index: int
    """In the graph that onnxruntime runs."""
    ms: float
    shape: tuple[int, ...] | None
    """Of its first output; None: the profiler does not say."""


def node_runs(events: Iterable[dict[str, Any]]) -> list[list[NodeRun]]:
    """By run of the session, in order, the nodes that were run in it, from the profiler's events."""
    events = list(events)
    ends = sorted(e["ts"] + e["dur"] for e in events if e.get("cat") == "Session" and e["name"] == "model_run")
    runs: list[list[NodeRun]] = [[] for _ in ends]
    for event in events:
        number = bisect_left(ends, event.get("ts", 0))
        if event.get("cat") != "Node" or not event["name"].endswith(_SUFFIX) or number == len(ends):
            continue
        facts = event.get("args", {})
        runs[number].append(
            NodeRun(
                name=event["name"].removesuffix(_SUFFIX),
                op=facts.get("op_name", ""),
                index=int(facts.get("node_index") or -1),
                ms=event["dur"] / 1e3,
                shape=_shape(facts.get("output_type_shape")),
            )
        )
    return runs


def _shape(said: list[dict[str, list[int]]] | None) -> tuple[int, ...] | None:
    """Of ``[{"float": [2, 6, 512]}]``."""
    return None if not said else tuple(next(iter(said[0].values()), ()))
