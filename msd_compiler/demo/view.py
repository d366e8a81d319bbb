"""The demo as a person reads it in a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from ..screen import titled_table
from .measure import COMPILED, FLOAT
from .report import Demo, Measured

_CHANGED = "yellow"

_ABOUT = (
    "Its weights were rounded {} by onnxruntime's quantizer. A default session then rounds activations to "
    "int8 as well; compiled, they keep 16 bits. Exact: what the rounded weights mean with float activations. Changed: of {} "
    "tokens of a text, those that are predicted otherwise than exactly."
)


def view(demo: Demo) -> RenderableType:
    """The whole demo."""
    parts: list[RenderableType] = [
        Text(f"{demo.model}: {demo.parameters / 1e6:.2f} million parameters", style="bold"),
        Text(_ABOUT.format(_codes(demo), demo.predictions)),
        Text(),
        _table(demo.rows),
    ]
    if demo.massive:
        text = f"The same function with some channels {demo.factor:g} times as large, as large models have them (issue 29849):"
        parts += [Text(), Text(text), _table(demo.massive)]
    parts += [Text(), *_continuations(demo), Text(), Text(_verdict(demo), style="bold")]
    return Group(*parts)


def _codes(demo: Demo) -> str:
    return " and ".join(dict.fromkeys(f"to {row.weights}" for row in demo.rows if row.weights != FLOAT))


def _table(rows: list[Measured]) -> RenderableType:
    table = titled_table("", ("weights", "run"), ("MB", "perplexity", "exact", "changed", "tokens/s"))
    for row in rows:
        table.add_row(
            row.weights,
            row.run,
            f"{row.bytes / 1e6:.2f}",
            f"{row.perplexity:.4f}",
            f"{row.exact_perplexity:.4f}",
            Text(str(row.changed), _CHANGED if row.changed else ""),
            f"{row.tokens_per_second:.0f}",
        )
    return table


def _continuations(demo: Demo) -> Iterator[RenderableType]:
    """The paragraphs; where one leaves the exact model's way it is marked."""
    yield Text(f"{demo.prompt.strip()} ...", style="bold")
    loud = f", {demo.factor:g} times"
    for row, suffix in (*((r, "") for r in demo.rows), *((r, loud) for r in demo.massive)):
        leaves = row.as_exact < demo.new_tokens
        said = f": not exact from token {row.as_exact + 1}" if leaves else ""
        yield Text(f"{row.weights}{suffix}, {row.run}{said}", style=_CHANGED if leaves else "green")
        yield Padding(Text(" ".join(row.continuation.split())), (0, 0, 0, 4))


def _verdict(demo: Demo) -> str:
    low_bit = [row for row in demo.rows if row.weights != FLOAT]
    today, ours = (
        " and ".join(f"{row.changed} ({row.weights})" for row in low_bit if (row.run == COMPILED) is compiled)
        for compiled in (False, True)
    )
    massive = [row.changed for row in demo.massive]
    with_massive = [f", {changed} with massive activations" for changed in massive] or ["", ""]
    return (
        f"Tokens of {demo.predictions} predicted otherwise than the weights say: {today}{with_massive[0]}. "
        f"Compiled: {ours}{with_massive[1]}."
    )
