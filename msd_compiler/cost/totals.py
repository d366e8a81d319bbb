"""What a whole graph takes: sums over its sites, and the longest chain of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import networkx as nx

from .candidates import Candidate
from .workload import Workload


def sums(candidates: Iterable[Candidate], workload: Workload) -> tuple[float, float, dict[str, float]]:
    """Seconds, bytes and operations by unit of a run of all these, mean over the workload."""
    seconds = moved = 0.0
    ops: dict[str, float] = defaultdict(float)
    for candidate in candidates:
        for phase, price in zip(workload.phases, candidate.prices, strict=True):
            seconds += phase.share * price.seconds
            moved += phase.share * price.bytes
            for unit, count in price.ops.items():
                ops[unit] += phase.share * count
    return seconds, moved, dict(ops)


def critical_path(flow: nx.DiGraph[int], seconds: Mapping[int, float]) -> float:
    """The longest chain of nodes that wait for each other.

    Args:
        flow: a graph's nodes by position, each with an edge to those that it reads from.
        seconds: by position; others are not counted.
    """
    done: dict[int, float] = {}
    for node in reversed(list(nx.topological_sort(flow))):
        before: Sequence[float] = [done[producer] for producer in flow.successors(node)]
        done[node] = seconds.get(node, 0.0) + max(before, default=0.0)
    return max(done.values(), default=0.0)
