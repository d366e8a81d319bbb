"""The command: show on a language model what the compiler does."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console

from ..errors import OptionError, OutputError

REPORT = Path("msd-demo.html")


def demo(
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL", help="a float32 decoder of your own; default: the bundled one")
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npz", help="with MODEL: what to evaluate it on, as msd evaluate takes it"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="keep the models there; it is made")
    ] = None,
    report: Annotated[
        Path, typer.Option(metavar="FILE.html|json", help="where the report of the int4 model is written")
    ] = REPORT,
    json_: Annotated[bool, typer.Option("--json", help="print one JSON document and nothing else")] = False,
) -> None:
    """Round a trained language model to int8 and int4, compile, and show what that does to text, speed and size."""
    from ..evaluate.attach import check_report
    from ..page import write_report
    from ..screen import progress_bars
    from .material import bundled, of_files
    from .measure import show
    from .view import view

    if (model is None) != (tokens is None):
        raise OptionError("MODEL and --tokens belong together: a decoder, and what to evaluate it on")
    check_report(report, [] if model is None else [model])
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{str(output)!r} is no folder that models can be kept in: {error}") from error
    with ExitStack() as stack:
        folder = output or Path(stack.enter_context(TemporaryDirectory(prefix="msd-demo-")))
        material = bundled() if model is None or tokens is None else of_files(model, tokens)
        progress = stack.enter_context(progress_bars(quiet=json_))
        shown = show(material, folder, progress=progress)
    write_report(shown.report, report)
    if json_:
        print(shown.demo.model_dump_json(indent=2))
        return
    console = Console()
    console.print(view(shown.demo))
    console.print(f"what was done to the int4 model, and why: {report}", soft_wrap=True)
    if output is not None:
        console.print(f"models: {output}", soft_wrap=True)
