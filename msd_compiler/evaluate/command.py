"""The command: evaluate a model and its results on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import OptionError


def evaluate(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="the model as it was: a decoder of tokens")],
    results: Annotated[list[Path] | None, typer.Argument(metavar="RESULT", help="what was compiled of it")] = None,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="UTF-8 text; needs tokenizers")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="with --text; default: tokenizer.json beside SOURCE")
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz", help="ids: 'tokens' in a row with 'offsets' of documents, or a row each, padded with -1"
        ),
    ] = None,
    window: Annotated[int, typer.Option(help="tokens that a model sees at once", min=1)] = 512,
    stride: Annotated[
        int | None, typer.Option(help="tokens from one window to the next; default: all of it, no overlap", min=1)
    ] = None,
    batch: Annotated[int, typer.Option(help="windows of one length that run together", min=1)] = 1,
    threads: Annotated[
        int | None, typer.Option(help="of every session but the oracle's; default: onnxruntime's", min=1)
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="FILE", help="keep figures there as they come, and go on from them")
    ] = None,
    per_site: Annotated[
        bool, typer.Option("--per-site", help="also each layer's own error on the text's activations")
    ] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg|png", help="draw it, too")] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html|json", help="the report that RESULT carries, with what is found here"),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="print one JSON document and nothing else")] = False,
) -> None:
    """Measure perplexity, KL divergence and changed tokens on a text, against the model's exact meaning.

    Run are the source in a default session, the same with all accuracy levels at 0, and the results; every model sees the text's
    tokens, whatever it predicts. A flip is a top token that is not the oracle's; its margin, what it is short of in logits.
    """
    from ..page import write_report
    from ..picture import check_plot
    from ..screen import progress_bars
    from .attach import carried_report, check_report, with_evaluation
    from .measure import evaluate as measure
    from .plot import plot as draw
    from .tokens import read_text, read_tokens, tokenizer_beside
    from .view import view
    from .windows import Windows

    if (text is None) == (tokens is None):
        raise OptionError("one of --text and --tokens is needed: what to evaluate on")
    if tokenizer is not None and text is None:
        raise OptionError("--tokenizer is for --text")
    if plot is not None:
        check_plot(plot)
    carried = None
    if report is not None:
        check_report(report, [source, *(results or [])])
        carried = carried_report(source, results or [])
    windows = Windows(window, stride, batch)
    if text is not None:
        given = read_text(text, tokenizer or tokenizer_beside(source))
    else:
        assert tokens is not None
        given = read_tokens(tokens)
    with progress_bars(quiet=json_) as progress:
        found = measure(
            source,
            results or [],
            tokens=given,
            windows=windows,
            threads=threads,
            resume=resume,
            per_site=per_site,
            progress=progress,
        )
    if plot is not None:
        draw(found, plot)
    if report is not None and carried is not None:
        write_report(with_evaluation(carried, found), report)
    if json_:
        print(found.json_text(), end="")
        return
    Console().print(view(found))
    for path in (plot, report):
        if path is not None:
            Console().print(f"wrote {path}", soft_wrap=True)
