"""An evaluation as a person reads it in a terminal: tables that fit 80 columns."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from ..screen import distance_text, number_of, titled_table
from .report import DEFAULT, LEVEL_ZERO, Evaluation, RunRow, SiteNoise

_FLIPS, _SITES = 5, 12
"""Rows that are listed: flips of each run, layers."""


def view(found: Evaluation) -> RenderableType:
    """The whole evaluation."""
    parts: list[RenderableType] = [Text(_about(found), style="bold"), Text(), _runs(found)]
    if any(run.flips for run in found.runs):
        parts += [Text(), _flips(found.runs)]
    if found.sites:
        parts += [Text(), _sites(found.sites)]
        parts.append(Text(_site_line(found.sites)))
    parts += [Text(f"note: {note}") for note in found.notes]
    return Group(*parts)


def _about(found: Evaluation) -> str:
    t = found.tokens
    overlap = "" if t.stride == t.window else f", {t.stride} apart"
    documents = number_of(t.documents, "document")
    return f"{t.predictions} predictions in {documents}, windows of {t.window} tokens{overlap}"


def _runs(found: Evaluation) -> RenderableType:
    figures = ("perplexity", "KL mean", "max", "same top", "flips", "margin")
    table = titled_table("against the oracle, what the model means", ("run",), figures)
    table.collapse_padding = True
    table.columns[0].min_width = max(len(name) for name in (DEFAULT, LEVEL_ZERO))
    table.add_row("oracle", f"{found.oracle.perplexity:.4f}", "", "", "", "", "")
    for run in found.runs:
        table.add_row(
            run.name,
            f"{run.perplexity:.4f}",
            _short(run.kl_mean),
            _short(run.kl_max),
            f"{run.same_top:.3%}",
            str(len(run.flips)),
            f"{run.flips[0].margin:.3g}" if run.flips else "-",
        )
    table.caption = "KL: nats a token; flips: other top tokens; margin: logits that the worst lost"
    table.caption_justify = "left"
    return table


def _short(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _flips(runs: list[RunRow]) -> RenderableType:
    table = titled_table("flips, largest margin first", ("run",), ("token", "margin", "oracle", "found", "text"))
    for run in runs:
        for number, flip in enumerate(run.flips[:_FLIPS]):
            ids = (str(flip.oracle), str(flip.found), str(flip.target))
            table.add_row(run.name if number == 0 else "", str(flip.position), f"{flip.margin:.4f}", *ids)
        if len(run.flips) > _FLIPS:
            table.add_row("", f"... {len(run.flips) - _FLIPS} more", "", "", "", "")
    return table


def _sites(rows: list[SiteNoise]) -> RenderableType:
    figures = ("crest", "weight", "int8", "two terms", "ratio")
    table = titled_table("layers on this text, worst first", ("node",), figures)
    for row in rows[:_SITES]:
        errors = [distance_text(e) for e in (row.weight_error, row.int8_error, row.msd_error)]
        style = "yellow" if row.int8_ratio > 1 else ""
        table.add_row(row.node, f"{row.crest:.3g}", *errors, Text(f"{row.int8_ratio:.3g}", style))
    shown = f"{_SITES} of {len(rows)}; " if len(rows) > _SITES else ""
    table.caption = f"{shown}relative L2 of the output: weights off by step / sqrt(12); activations in int8 a block; ratio: of these two"
    table.caption_justify = "left"
    return table


def _site_line(rows: list[SiteNoise]) -> str:
    int8, msd = sum(row.int8_ratio > 1 for row in rows), sum(row.msd_ratio > 1 for row in rows)
    layers = number_of(len(rows), "layer")
    return f"int8 activations lose more than the weights' rounding in {int8} of {layers}, two terms in {msd}"
