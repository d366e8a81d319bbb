"""Benchmarks as a person reads them in a terminal: tables that fit 80 columns."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import singledispatch

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..screen import distance_text, number_of, titled_table
from .machine import Limits, LimitShare
from .report import (
    AttentionReport,
    AttentionRow,
    DecodeReport,
    DecodeRow,
    DecoderRows,
    FreshRow,
    LinearReport,
    LinearRow,
    ModelsReport,
    ProfileRow,
    RunRow,
    Setting,
)
from .timing import Time

_MIB = 2**20


@singledispatch
def view(report: object) -> RenderableType:
    """The whole report."""
    raise TypeError(type(report))


@view.register
def _(report: ModelsReport) -> RenderableType:
    parts = [_setting(report.setting), _runs(report.runs)]
    if report.decoding:
        parts.append(_decoding(report.decoding))
    if report.fresh:
        parts.append(_fresh(report.fresh))
    parts += [_profile(row) for row in report.profiles]
    return Group(*parts, *_notes(report.notes))


@view.register
def _(report: LinearReport) -> RenderableType:
    layers: dict[tuple[int, int, str], list[LinearRow]] = {}
    for row in report.rows:
        if (row.k, row.n) not in report.ramp:
            layers.setdefault((row.k, row.n, row.weight), []).append(row)
    parts: list[RenderableType] = [_setting(report.setting), _limits(report.limits)]
    for (k, n, weight), rows in layers.items():
        parts += [_layer(f"{k} x {n}, {weight}", rows), _layer_shares(rows)]
    parts.append(Text(_spread([row.time for row in report.rows])))
    return Group(*parts, Text(_SHARES), *_notes(report.notes))


@view.register
def _(report: DecodeReport) -> RenderableType:
    shape = f"Llama's shape, {report.parameters / 1e6:.3g} million parameters"
    parts: list[RenderableType] = [_setting(report.setting), Text(shape), _limits(report.limits)]
    for decoder in report.decoders:
        steps = dict.fromkeys((row.tokens, row.cached) for row in decoder.decoding)
        parts += [_decoder_step(decoder, *step) for step in steps]
        if decoder.fresh:
            parts.append(_fresh(decoder.fresh, decoder.weight))
    times = [row.time for decoder in report.decoders for row in decoder.decoding]
    if times:
        parts.append(Text(_spread(times, "from the logits of level 0") + f"; {_SHARES}"))
    return Group(*parts, *_notes(report.notes))


@view.register
def _(report: AttentionReport) -> RenderableType:
    tables = []
    for batch in dict.fromkeys(row.batch for row in report.rows):
        rows = {(r.way, f"{r.cached} + {r.tokens}"): r for r in report.rows if r.batch == batch}
        tables.append(_grid(f"batch {batch}, cached + new tokens", "ms at", rows))
    shape = f"{report.heads} heads, {report.kv_heads} of keys and values, {report.size} columns"
    spread = _spread([row.time for row in report.rows])
    return Group(_setting(report.setting), Text(shape), *tables, Text(spread), *_notes(report.notes))


def _setting(setting: Setting) -> RenderableType:
    threads = "threads by default" if setting.threads is None else number_of(setting.threads, "thread")
    isa = f", {setting.instruction_set}" if setting.instruction_set else ""
    return Text(f"{setting.cpu}{isa}; onnxruntime {setting.onnxruntime}, {threads}", style="bold")


def _runs(rows: list[RunRow]) -> RenderableType:
    figures = ("median ms", "quartiles", "ratio", "relative L2")
    table = titled_table("a run, in turns", ("inputs", "model"), figures)
    for row in rows:
        distance = max(row.relative_l2.values(), default=None)
        table.add_row(
            row.inputs,
            row.model,
            *_time(row.time),
            _ratio(row.ratio),
            distance_text(distance),
        )
    counts = sorted({row.time.runs for row in rows})
    table.caption = (
        f"{_range(counts)} runs; ratio of medians to the first model; relative L2 from its oracle, worst output"
    )
    table.caption_justify = "left"
    return table


def _decoding(rows: list[DecodeRow]) -> RenderableType:
    table = titled_table(
        "a decoder's step, batch 1", ("tokens", "model"), ("median ms", "quartiles", "tokens/s", "ratio")
    )
    for row in rows:
        step = f"{row.tokens} after {row.cached}"
        table.add_row(step, row.model, *_time(row.time), _figure(row.tokens_per_second), _ratio(row.ratio))
    return table


def _decoder_step(decoder: DecoderRows, tokens: int, cached: int) -> RenderableType:
    figures = ("ms", "tokens/s", "ratio", "rel. L2", "limit %")
    step = f"{number_of(tokens, 'token')} after {cached}" if cached else f"a prompt of {number_of(tokens, 'token')}"
    table = titled_table(f"{decoder.weight}, {step}", ("model",), figures)
    for row in decoder.decoding:
        if (row.tokens, row.cached) == (tokens, cached):
            figure, rate = _figure(row.time.median_ms), _figure(row.tokens_per_second)
            distance = "-" if row.relative_l2 is None else f"{row.relative_l2:.1e}"
            table.add_row(row.model, figure, rate, _ratio(row.ratio), distance, _share(row.limit))
    return table


def _fresh(rows: list[FreshRow], what: str = "") -> RenderableType:
    figures = ("open ms", "first run ms", "peak MiB", "model's MiB")
    table = titled_table(f"{what}, in a fresh process" if what else "in a fresh process", ("model",), figures)
    for row in rows:
        peak, own = "-", "-"
        if row.peak_bytes is not None:
            peak = f"{row.peak_bytes / _MIB:.0f}"
        if row.peak_bytes is not None and row.before_bytes is not None:
            own = f"{(row.peak_bytes - row.before_bytes) / _MIB:.0f}"
        table.add_row(row.model, _figure(row.open_ms), _figure(row.first_run_ms), peak, own)
    return table


def _profile(row: ProfileRow) -> RenderableType:
    title = f"{row.model}: longest nodes ({row.inputs}, all take {row.nodes_ms:.3g} ms under the profiler)"
    table = titled_table(title, ("node", "op"), ("ms", "share"))
    for site in row.top:
        table.add_row(site.node, site.op, _figure(site.ms), f"{site.share:.0%}")
    return table


def _limits(limits: Limits) -> RenderableType:
    rates = ", ".join(f"{unit} {rate / 1e9:.3g}" for unit, rate in limits.operations_per_second.items())
    text = f"limits: {rates} GOP/s (a multiply-add is two); " if rates else "limits: "
    text += f"{limits.read_bytes_per_second / 1e9:.3g} GB/s are read from memory"
    if limits.last_cache_bytes:
        text += f"; the last cache holds {limits.last_cache_bytes / _MIB:.3g} MiB"
    return Text(text)


_SHARES = "% of limit: of a unit's rate or, with m, of what memory gives; more than 100m: the weight is in a cache"


def _share(limit: LimitShare | None) -> str:
    return "-" if limit is None else f"{100 * limit.share:.0f}{'m' if limit.by == 'memory' else ' '}"


def _layer(title: str, rows: list[LinearRow]) -> RenderableType:
    return _grid(title, "ms at M =", {(row.way, str(row.m)): row for row in rows})


def _layer_shares(rows: list[LinearRow]) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column("% of limit at M =", overflow="fold")
    cells = {(row.way, row.m): _share(row.limit) for row in rows}
    for m in dict.fromkeys(row.m for row in rows):
        table.add_column(f"{m} ", justify="right")
    table.add_column("unit", justify="right")
    for way, unit in {row.way: row.unit for row in rows}.items():
        table.add_row(way, *(share for (name, _), share in cells.items() if name == way), unit)
    return table


def _grid(
    title: str,
    corner: str,
    rows: Mapping[tuple[str, str], LinearRow | AttentionRow],
) -> RenderableType:
    """A line per way, a column per size, medians in milliseconds; ``rows`` by both."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, title=title, title_justify="left")
    table.add_column(corner, overflow="fold")
    sizes = list(dict.fromkeys(size for _, size in rows))
    for heading in (*sizes, "rel. L2"):
        table.add_column(heading, justify="right")
    for way in dict.fromkeys(way for way, _ in rows):
        worst = max(row.relative_l2 for (name, _), row in rows.items() if name == way)
        medians = (_figure(rows[way, size].time.median_ms) for size in sizes)
        table.add_row(way, *medians, f"{worst:.1e}")
    return table


def _time(time: Time) -> tuple[str, str]:
    return _figure(time.median_ms), f"{_figure(time.first_quartile_ms)} - {_figure(time.third_quartile_ms)}"


def _figure(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}"


def _spread(times: Sequence[Time], oracle: str = "from float64, the worst of the line") -> str:
    spreads = [(t.third_quartile_ms - t.first_quartile_ms) / t.median_ms for t in times]
    runs = _range(sorted({t.runs for t in times}))
    return (
        f"medians of {runs} runs in turns; between the quartiles lie {statistics.median(spreads):.0%} of a median, "
        f"{max(spreads):.0%} at most; rel. L2: {oracle}"
    )


def _notes(notes: Iterable[str]) -> list[RenderableType]:
    return [Text(f"note: {note}") for note in notes]


def _range(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
