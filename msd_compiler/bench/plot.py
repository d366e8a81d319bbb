"""Benchmarks as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from typing import Any, Literal

from ..picture import check_plot, save_plot
from .linear import AS_INT8, MEASURE, OURS
from .report import AttentionReport, DecodeReport, DecodeRow, LinearReport, LinearRow, ModelsReport, Report
from .timing import Time


def plot(report: Report, path: Path) -> None:
    """Draw a report.

    Raises:
        OptionError: the file is of another type.
        OutputError: the file cannot be written.
    """
    check_plot(path)
    figure = draw(report)
    threads = "" if report.setting.threads is None else f", threads: {report.setting.threads}"
    figure.suptitle(f"{report.setting.cpu}, onnxruntime {report.setting.onnxruntime}{threads}", fontsize=9)
    save_plot(figure, path)


@singledispatch
def draw(report: object) -> Any:
    """The report as a matplotlib figure."""
    raise TypeError(type(report))


@draw.register
def _(report: ModelsReport) -> Any:
    inputs = list(dict.fromkeys(row.inputs for row in report.runs))
    figure = _figure(len(inputs) + bool(report.decoding), 1)
    axes = figure.subplots(len(inputs) + bool(report.decoding), 1, squeeze=False)[:, 0]
    for axis, name in zip(axes, inputs, strict=False):
        rows = [row for row in report.runs if row.inputs == name]
        times = [row.time for row in rows]
        axis.barh([r.model for r in rows], [t.median_ms for t in times], xerr=_errors(times), capsize=3)
        axis.invert_yaxis()
        axis.set(title=name, xlabel="ms, median and quartiles")
    if report.decoding:
        for label in report.models:
            steps = [row for row in report.decoding if row.model == label and row.tokens == 1]
            axes[-1].plot([r.cached for r in steps], [r.tokens_per_second for r in steps], marker="o", label=label)
        axes[-1].set(title="tokens per second", xlabel="tokens in the cache", ylim=(0, None))
        axes[-1].legend(fontsize=7)
    return figure


@draw.register
def _(report: LinearReport) -> Any:
    weights = list(dict.fromkeys(row.weight for row in report.rows))
    shapes = list(dict.fromkeys((row.k, row.n) for row in report.rows if (row.k, row.n) not in report.ramp))
    lines = [_over_m(*shape) for shape in shapes]
    if report.ramp:
        lines += [_over("n", report), _over("k", report)]
    figure = _figure(len(lines), len(weights))
    axes = figure.subplots(len(lines), len(weights), squeeze=False)
    for i, line in enumerate(lines):
        for j, weight in enumerate(weights):
            _draw_times(axes[i][j], report, line, weight)
    curves = [axis.get_legend_handles_labels() for axis in axes[0]]
    named = {label: handle for handles, labels in curves for handle, label in zip(handles, labels, strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


@dataclass(frozen=True)
class _Line:
    """What a row of pictures shows."""

    title: str
    size: Literal["m", "n", "k"]
    """What grows from left to right."""
    contains: Callable[[LinearRow], bool]
    rows: tuple[int, ...] = ()
    """M of the curves; none: M is what grows."""


def _over_m(k: int, n: int) -> _Line:
    return _Line(f"K = {k}, N = {n}", "m", lambda row: (row.k, row.n) == (k, n))


def _over(size: Literal["n", "k"], report: LinearReport) -> _Line:
    """Curves over N, or over K: through the layers of which the other one is that of most in the ramp."""
    other: Literal["n", "k"] = "k" if size == "n" else "n"
    fixed = statistics.mode(getattr(row, other) for row in report.rows if (row.k, row.n) in report.ramp)
    rows = tuple(dict.fromkeys(row.m for row in report.rows if (row.k, row.n) in report.ramp))
    title = f"{other.upper()} = {fixed}, M = {' and '.join(map(str, rows))}"
    return _Line(title, size, lambda row: getattr(row, other) == fixed and row.m in rows, rows)


def _draw_times(axis: Any, report: LinearReport, line: _Line, weight: str) -> None:
    """Times of every way, and the limits of float32 and of our products: no time can be below its own."""
    found = [row for row in report.rows if row.weight == weight and line.contains(row)]
    found.sort(key=lambda row: getattr(row, line.size))
    ways = list(dict.fromkeys(row.way for row in report.rows))
    colors = list(dict.fromkeys(way.removesuffix(AS_INT8) for way in ways))  # never both in one picture
    for way in ways:
        color = f"C{colors.index(way.removesuffix(AS_INT8))}"
        for curve, m in enumerate(line.rows or (None,)):
            rows = [row for row in found if row.way == way and m in (None, row.m)]
            if not rows:
                continue
            style: dict[str, Any] = {"color": color, "label": way if curve == 0 else None}
            sizes, times = [getattr(row, line.size) for row in rows], [row.time for row in rows]
            width = 2.2 if way == OURS.name else 1.1
            axis.errorbar(sizes, [t.median_ms for t in times], _errors(times), marker=".", linewidth=width, **style)
            if way in _LIMITS:
                least = [1e3 * report.limits.least_seconds(r.unit, r.operations, r.stored_bytes) for r in rows]
                style["label"] = f"limit of {way}" if curve == 0 else None
                axis.plot(sizes, least, linestyle="--", linewidth=1, **style)
    axis.set(title=f"{weight}: {line.title}", xlabel=line.size.upper(), ylabel="ms", xscale="log", yscale="log")
    ticks = sorted({getattr(row, line.size) for row in found})
    axis.set_xticks(ticks, list(map(str, ticks)))
    axis.minorticks_off()
    axis.grid(visible=True, linewidth=0.4, alpha=0.5)


_LIMITS = (MEASURE.name, OURS.name)


@draw.register
def _(report: DecodeReport) -> Any:
    steps = list(dict.fromkeys((row.tokens, row.cached) for d in report.decoders for row in d.decoding))
    if not steps:
        return _figure(1, 1)
    figure = _figure(len(steps), len(report.decoders))
    axes = figure.subplots(len(steps), len(report.decoders), squeeze=False, sharey=True)
    for i, (tokens, cached) in enumerate(steps):
        for j, decoder in enumerate(report.decoders):
            rows = [row for row in decoder.decoding if (row.tokens, row.cached) == (tokens, cached)]
            step = f"{tokens} after {cached}" if cached else f"a prompt of {tokens}"
            _draw_rates(axes[i][j], rows, f"{decoder.weight}: {step}")
    axes[0][0].invert_yaxis()  # of all, for they share it
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    return figure


def _draw_rates(axis: Any, rows: list[DecodeRow], title: str) -> None:
    """Tokens per second as bars, and the limit of each as a mark."""
    names, rates = [row.model for row in rows], [row.tokens_per_second for row in rows]
    bars = axis.barh(names, rates, color=[f"C{i}" for i in range(len(rows))], height=0.6)
    for place, row in enumerate(rows):
        if row.limit is not None:
            label = "limit: the rate of multiply-adds, or memory" if place == 0 else None
            axis.plot([row.tokens_per_second / row.limit.share] * 2, [place - 0.4, place + 0.4], "k--", label=label)
    for text in axis.bar_label(bars, [f"{rate:.3g}" for rate in rates], padding=3, fontsize=8):
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
    axis.set(title=title, xlabel="tokens per second", xlim=(0, None))


@draw.register
def _(report: AttentionReport) -> Any:
    batches = list(dict.fromkeys(row.batch for row in report.rows))
    figure = _figure(1, len(batches))
    for axis, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        for way in dict.fromkeys(row.way for row in report.rows):
            rows = [row for row in report.rows if (row.way, row.batch) == (way, batch)]
            steps, times = [f"{r.cached} + {r.tokens}" for r in rows], [r.time for r in rows]
            axis.errorbar(steps, [t.median_ms for t in times], yerr=_errors(times), fmt="o", capsize=3, label=way)
        axis.set(title=f"batch {batch}", xlabel="cached + new tokens", ylabel="ms", yscale="log")
        axis.legend(fontsize=7)
    return figure


def _errors(times: list[Time]) -> list[list[float]]:
    """From the median down to the first quartile and up to the third."""
    down = [t.median_ms - t.first_quartile_ms for t in times]
    return [down, [t.third_quartile_ms - t.median_ms for t in times]]


def _figure(rows: int, columns: int) -> Any:
    from matplotlib.figure import Figure

    return Figure(
        figsize=(max(6.4, 4.4 * columns), max(2.2, (2.2 if columns == 1 else 3.4) * rows)), layout="constrained"
    )
