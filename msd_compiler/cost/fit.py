"""From measured times to a kernel's figures: what its closed form says, solved for the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .cpu import new_values
from .layers import Product, Step
from .profile import Curve
from .work import mean_seen

_REPEATS = 20
"""The small figures are found from what the large ones leave over, and these anew without the small ones: each time an
order of magnitude closer."""


@dataclass(frozen=True)
class LinearFigures:
    """Of a `LinearKernel`."""

    call: float
    per_activation: float
    per_output: float
    per_weight: Curve
    per_group: Curve


def fit_linear(times: Mapping[Product, float], node: float) -> LinearFigures:
    """Figures that explain the times of products in one way.

    Args:
        times: seconds. At every M, of one K and N in one or two lengths of groups; with few columns, at the least and a
            large M, for what does not grow with N; and with a short K at a large M, for what does not grow with K.
        node: seconds of a node that does next to nothing.
    """
    k, n = max(job.work.k for job in times), max(job.work.n for job in times)
    narrow = sorted((job for job in times if job.work.n < n), key=lambda job: job.rows)
    short = [job for job in times if job.work.k < k]
    whole = [job for job in times if (job.work.k, job.work.n) == (k, n)]
    call = per_activation = per_output = 0.0
    for _ in range(_REPEATS):
        weights: dict[float, float] = {}
        groups: dict[float, float] = {}
        for rows in sorted({job.rows for job in whole}):
            beside = node + call + rows * (k * per_activation + n * per_output)
            # Seconds of a column, by number of groups: a line.
            line = {job.work.groups: (times[job] - beside) / n for job in whole if job.rows == rows}
            groups[rows], at_none = _line(line)
            weights[rows] = at_none / k
        per_weight, per_group = _curve(weights), _curve(groups)
        rest = {
            job: times[job]
            - node
            - job.work.n * (job.work.k * per_weight(job.rows) + job.work.groups * per_group(job.rows))
            for job in (*narrow, *short)
        }
        if narrow:
            few, many = (rest[job] - job.rows * job.work.n * per_output for job in (narrow[0], narrow[-1]))
            per_activation = max(0.0, (many - few) / ((narrow[-1].rows - narrow[0].rows) * k))
            call = max(0.0, few - narrow[0].rows * k * per_activation)
        if short:
            left = [(rest[job] - call - job.rows * job.work.k * per_activation) / (job.rows * n) for job in short]
            per_output = max(0.0, sum(left) / len(left))
    return LinearFigures(call, per_activation, per_output, per_weight, per_group)


@dataclass(frozen=True)
class AttentionFigures:
    """Of an `AttentionKernel`."""

    call: float
    per_activation: float
    per_cached: Curve
    per_logit: Curve


def fit_attention(times: Mapping[Step, float], node: float, *, shares_heads: bool, is_causal: bool) -> AttentionFigures:
    """Figures that explain the times of attention in one way.

    Args:
        times: seconds. Of every number of rows in two sizes of heads; and with few tokens in the cache, of one new token
            and, with none before, of many, for what does not grow with the cache.
        node: seconds of a node that does next to nothing.
        shares_heads: see `AttentionKernel`.
        is_causal: likewise.
    """
    long = max(job.context for job in times)

    def rows_of(job: Step) -> int:
        return job.work.queries_per_head * job.tokens if shares_heads else job.tokens

    def pairs_of(job: Step) -> float:
        heads = job.work.kv_heads if shares_heads else job.work.heads
        return job.batch * heads * (mean_seen(job.tokens, job.context) if is_causal else job.context)

    def new_of(job: Step) -> int:
        return new_values(job.work, job.batch, job.tokens)

    short = sorted((job for job in times if job.context < long), key=new_of)
    call = per_activation = 0.0
    for _ in range(_REPEATS):
        values: dict[float, float] = {}
        logits: dict[float, float] = {}
        for rows in sorted({rows_of(job) for job in times if job.context == long}):
            line = {
                job.work.head_size: (times[job] - node - call - new_of(job) * per_activation) / pairs_of(job)
                for job in times
                if job.context == long and rows_of(job) == rows
            }
            values[rows], logits[rows] = _line(line)
        per_cached, per_logit = _curve(values), _curve(logits)
        rest = [
            times[job]
            - node
            - pairs_of(job) * (job.work.head_size * per_cached(rows_of(job)) + per_logit(rows_of(job)))
            for job in short
        ]
        if rest:
            few, many = new_of(short[0]), new_of(short[-1])
            per_activation = max(0.0, (rest[-1] - rest[0]) / (many - few))
            call = max(0.0, rest[0] - few * per_activation)
    return AttentionFigures(call, per_activation, per_cached, per_logit)


def _line(points: Mapping[int, float]) -> tuple[float, float]:
    """Slope and value at 0 of the line through the first and last point, neither below 0; of one point: all at 0."""
    (first, low), (last, high) = min(points.items()), max(points.items())
    if first == last:
        return 0.0, max(0.0, low)
    slope = max(0.0, min((high - low) / (last - first), high / last))
    return slope, max(0.0, (low + high - slope * (first + last)) / 2)


def _curve(values: Mapping[float, float]) -> Curve:
    return Curve(at=tuple(values), seconds=tuple(values.values()))


def read_share(felt: Sequence[float], waiting: Sequence[float]) -> float:
    """How much faster than the bare loop a kernel reads from memory, in what it waits; 1 where nothing tells.

    Args:
        felt: seconds that jobs take longer than from a cache, by the figures.
        waiting: seconds that the bare loop waits for as many bytes.
    """
    if sum(waiting) <= 0:
        return 1.0
    return sum(waiting) / max(sum(felt), _LEAST_FELT * sum(waiting))


_LEAST_FELT = 0.05
