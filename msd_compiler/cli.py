"""The command ``msd``: a thin layer over `api`, with words, colours and exit statuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from . import api, genai, screen
from .api import DEFAULT_TOLERANCE, DEFAULT_VERIFY_SECONDS, VerificationFailed
from .decide import Activations
from .errors import MsdError, OptionError, OutputError
from .quantize import Quantization
from .report import Report, embedded_report
from .source import load
from .verification import read_feed, silent

FAILED, MISTAKE = 1, 2
"""Exit statuses: the result is not right enough; the user's input cannot be."""

app = typer.Typer(
    name="msd",
    help="Multiply low-bit weights directly: rewrite quantized ONNX models for onnxruntime, with 16-bit activations.",
    epilog="Try: msd demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="an .onnx file, or a folder with one in it")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document and nothing else")]
Terms = Annotated[
    int | None,
    typer.Option(
        help="INT8 terms of the activation; default: 2, and 3 where the model rounds the result on", min=1, max=3
    ),
]
Tolerance = Annotated[float, typer.Option(help="largest relative L2 of any output")]


class Codes(StrEnum):
    """What float weights can be rounded to."""

    INT4 = "int4"
    INT8 = "int8"


Quantize = Annotated[
    Codes | None, typer.Option(help="round the weights of float layers, by onnxruntime's own quantizer")
]
BlockSize = Annotated[int | None, typer.Option(help="with --quantize: steps of K that share a scale; default: 32")]
Asymmetric = Annotated[bool, typer.Option("--asymmetric", help="with --quantize: blocks have zero points")]
ActivationsOption = Annotated[
    Activations,
    typer.Option(
        "--activations", help="those that the model itself rounds: keep their codes, exactly, or upgrade to float"
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="a row for every layer")]


@app.command(epilog="Example: msd compile model.onnx -o fast.onnx --report report.json")
def compile(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="default: MODEL's stem + .msd.onnx; a GenAI folder's: -msd"),
    ] = None,
    terms: Terms = None,
    quantize: Quantize = None,
    block_size: BlockSize = None,
    asymmetric: Asymmetric = False,
    activations: ActivationsOption = Activations.KEEP,
    report: Annotated[Path | None, typer.Option(metavar="FILE.json", help="write the report there, too")] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="compare the result with the oracle")] = True,
    verify_seconds: Annotated[float, typer.Option(help="time for that; then layer by layer")] = DEFAULT_VERIFY_SECONDS,
    tolerance: Tolerance = DEFAULT_TOLERANCE,
    verbose: Verbose = False,
    json_: Json = False,
) -> None:
    """Rewrite a model's quantized linear layers, prove the result right, and report.

    A folder with a genai_config.json becomes a folder that onnxruntime-genai loads: model, tokenizer, library and all.

    Exit status 1: the result was further from the oracle than allowed and was not kept. 2: a mistake in the input.
    """
    quantization = _quantization(quantize, block_size, asymmetric)
    with _progress(quiet=json_) as progress:
        target = output if output is not None else api.default_output(model)
        if report is not None:
            _check_report(report, model, target)
        try:
            compiled = api.compile(
                model,
                target,
                terms=terms,
                quantization=quantization,
                activations=activations.value,
                verify=verify,
                verify_seconds=verify_seconds,
                tolerance=tolerance,
                progress=progress,
            )
        except VerificationFailed as failure:
            _write_report(report, failure.report)
            _show(failure.report, json_, verbose)
            _complain(f"not written: {failure}")
            raise typer.Exit(FAILED) from None
    _write_report(report, compiled.report)
    _show(compiled.report, json_, verbose)
    if not json_:
        if compiled.changed:
            _console().print(f"wrote {target}", soft_wrap=True)
        else:
            why = "already rewritten" if embedded_report(compiled.model) else "nothing to rewrite"
            _console().print(f"{why}: {target} is a copy", soft_wrap=True)
        if genai.is_result(target):
            _console().print(genai.VERSIONS, soft_wrap=True, highlight=False)


@app.command(epilog="Example: msd inspect model.onnx --json")
def inspect(
    model: Model,
    terms: Terms = None,
    quantize: Quantize = None,
    block_size: BlockSize = None,
    asymmetric: Asymmetric = False,
    activations: ActivationsOption = Activations.KEEP,
    verbose: Verbose = False,
    json_: Json = False,
) -> None:
    """Show a model's linear layers: formats, sizes, what compile would do, and why not; of a result, what it did."""
    quantization = _quantization(quantize, block_size, asymmetric)
    report = api.inspect(model, terms=terms, quantization=quantization, activations=activations.value)
    _show(report, json_, verbose)


@app.command(epilog="Example: msd verify model.onnx model.msd.onnx --inputs prompt.npz")
def verify(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="the model as it was")],
    result: Annotated[Path, typer.Argument(metavar="RESULT", help="the compiled model")],
    inputs: Annotated[
        Path | None, typer.Option(metavar="FILE.npz", help="an array per input; default: made from the signature")
    ] = None,
    runs: Annotated[int, typer.Option(help="runs for the median times", min=1)] = 5,
    tolerance: Tolerance = DEFAULT_TOLERANCE,
    json_: Json = False,
) -> None:
    """Run source and result on the same inputs and compare both with the source's exact meaning."""
    feeds = None if inputs is None else [read_feed(inputs)]
    with _progress(quiet=json_) as progress:
        verification = api.verify(source, result, inputs=feeds, runs=runs, tolerance=tolerance, progress=progress)
    if json_:
        print(verification.model_dump_json(indent=2, exclude_none=True))
    else:
        _console().print(screen.verification_view(verification))
    if not verification.passed:
        raise typer.Exit(FAILED)


@app.command(epilog="Example: msd run model.msd.onnx --inputs prompt.npz -o logits.npz")
def run(
    model: Model,
    inputs: Annotated[Path, typer.Option(metavar="FILE.npz", help="an array per input")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.npz", help="an array per output")],
    portable: Annotated[bool, typer.Option("--portable", help="without the native library")] = False,
    json_: Json = False,
) -> None:
    """Run a model once, with the native kernels or, to compare, without."""
    _check_writable(output, model, inputs)
    with _progress(quiet=json_) as progress:
        progress("running", 0, 1)
        arrays = api.run(model, read_feed(inputs).arrays, portable=portable)
    try:
        with output.open("wb") as file:
            np.savez(file, **{name: _storable(array) for name, array in arrays.items()})  # type: ignore[arg-type]
    except OSError as error:
        raise OutputError(f"output {str(output)!r} cannot be written: {error.strerror}") from error
    shapes = {name: list(array.shape) for name, array in arrays.items()}
    if json_:
        print(json.dumps({"output": str(output), "shapes": shapes}, indent=2))
    else:
        for name, shape in shapes.items():
            _console().print(f"{name} {shape}", soft_wrap=True, highlight=False, markup=False)


@app.command(epilog="Example: msd demo -o demo.msd.onnx")
def demo(
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="OUT", help="keep the result there")] = None,
    json_: Json = False,
) -> None:
    """Compile the bundled model, verify it and show the table: a small Llama with a KV cache, int4 and int8 weights."""
    with as_file(files("msd_compiler") / "data" / "tiny_llama.onnx") as model, _progress(quiet=json_) as progress:
        compiled = api.compile(model, output, progress=progress)
    _show(compiled.report, json_, verbose=False)
    if not json_:
        print_demo_verdict(_console(), compiled.report)
        if output is not None:
            _console().print(f"wrote {output}", soft_wrap=True)


def print_demo_verdict(console: Console, report: Report) -> None:
    """What was gained, in one line."""
    outputs = report.verification.outputs if report.verification else []
    gains = [o.baseline_relative_l2 / o.relative_l2 for o in outputs if o.baseline_relative_l2 and o.relative_l2]
    if gains:
        console.print(
            f"[bold]{min(gains):.0f} to {max(gains):.0f} times closer to the model's meaning than today's session.[/]"
        )


def main() -> None:
    """Entry point: every mistake is one sentence and exit status 2."""
    onnxruntime.set_default_logger_severity(4)  # what goes wrong comes as an exception, once
    try:
        app()
    except MsdError as error:
        _complain(str(error))
        sys.exit(MISTAKE)
    except KeyboardInterrupt:
        _complain("interrupted; nothing was written")
        sys.exit(130)


def _storable(array: np.ndarray) -> np.ndarray:
    """bfloat16, which NumPy's file format does not know, as float32."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _console() -> Console:
    return Console()


def _complain(message: str) -> None:
    Console(stderr=True).print(f"msd: {message}", style="red", soft_wrap=True, highlight=False, markup=False)


def _show(report: Report, as_json: bool, verbose: bool) -> None:
    if as_json:
        print(report.json_text(), end="")
    else:
        screen.print_report(_console(), report, verbose=verbose)


def _quantization(codes: Codes | None, block_size: int | None, asymmetric: bool) -> Quantization | None:
    if codes is None:
        if block_size is not None or asymmetric:
            raise OptionError("--block-size and --asymmetric say how to --quantize: int4 or int8")
        return None
    return Quantization(4 if codes is Codes.INT4 else 8, 32 if block_size is None else block_size, not asymmetric)


def _check_report(path: Path, model: Path, target: Path) -> None:
    """See, before the work, that the report can be written, and outside the folders if the result is a folder."""
    if not api.makes_folder(model, target):
        _check_writable(path, model, target)
        return
    _check_place(path)
    for folder in (model, target):
        if path.resolve().is_relative_to(folder.resolve()):
            raise OutputError(f"report {str(path)!r} lies in {str(folder)!r}; name a file elsewhere")


def _check_writable(path: Path, model: Path, *others: Path) -> None:
    """See, before the work, that a file can be written and is none of those it is about."""
    _check_place(path)
    api.refuse_overwriting(load(model), path)
    if path.resolve() in [other.resolve() for other in others]:
        raise OutputError(f"{str(path)!r} is named twice; two files are needed")


def _check_place(path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir():
        raise OutputError(f"{str(path)!r} cannot be written: it must be a file in an existing folder")


def _write_report(path: Path | None, report: Report) -> None:
    if path is not None:
        try:
            path.write_text(report.json_text())
        except OSError as error:
            raise OutputError(f"report {str(path)!r} cannot be written: {error.strerror}") from error


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar per stage on a terminal; nothing elsewhere."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield silent
        return
    columns: tuple[Any, ...] = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show
