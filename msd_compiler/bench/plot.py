"""Benchmarks as a picture, drawn by matplotlib, which is an extra."""

from __future__ import annotations

from functools import singledispatch
from pathlib import Path
from typing import Any

from ..errors import OptionError, OutputError
from .report import AttentionReport, LinearReport, ModelsReport, Report
from .timing import Time

FORMATS = (".svg", ".png")


def check_plot(path: Path) -> None:
    """See, before the work, that a picture can be drawn there.

    Raises:
        OptionError: matplotlib is not installed, or the file is of another type.
        OutputError: the file is in no folder.
    """
    if path.suffix.lower() not in FORMATS:
        raise OptionError(f"plot {str(path)!r} must end with {' or '.join(FORMATS)}")
    if path.is_dir() or not path.parent.is_dir():
        raise OutputError(f"plot {str(path)!r} cannot be written: it must be a file in an existing folder")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OptionError("--plot needs matplotlib: pip install 'msd-compiler[bench]'") from error


def plot(report: Report, path: Path) -> None:
    """Draw a report.

    Raises:
        OptionError: matplotlib is not installed, or the file is of another type.
        OutputError: the file cannot be written.
    """
    check_plot(path)
    figure = draw(report)
    threads = "" if report.setting.threads is None else f", threads: {report.setting.threads}"
    figure.suptitle(f"{report.setting.cpu}, onnxruntime {report.setting.onnxruntime}{threads}", fontsize=9)
    try:
        figure.savefig(path)
    except OSError as error:
        raise OutputError(f"plot {str(path)!r} cannot be written: {error.strerror}") from error


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
    shapes = list(dict.fromkeys((row.k, row.n) for row in report.rows))
    weights = list(dict.fromkeys(row.weight for row in report.rows))
    figure = _figure(len(shapes), len(weights))
    axes = figure.subplots(len(shapes), len(weights), squeeze=False)
    for i, (k, n) in enumerate(shapes):
        for j, weight in enumerate(weights):
            axis = axes[i][j]
            rows = [r for r in report.rows if (r.k, r.n, r.weight) == (k, n, weight)]
            for way in dict.fromkeys(r.way for r in rows):
                line = [r for r in rows if r.way == way]
                ms = [r.time.median_ms for r in line]
                axis.errorbar([r.m for r in line], ms, yerr=_errors([r.time for r in line]), marker=".", label=way)
            axis.set(title=f"{k} x {n}, {weight}", xlabel="M", ylabel="ms", xscale="log", yscale="log")
    axes[0][0].legend(fontsize=7)
    return figure


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
