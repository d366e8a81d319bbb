"""The command ``msd``: a thin layer over `api`, with words, colours and exit statuses."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import typer
from rich.console import Console

from . import api, genai, screen
from .api import DEFAULT_TOLERANCE, DEFAULT_VERIFY_SECONDS, VerificationFailed
from .compile_options import DEFAULTS, CompileOptions, with_options
from .cost.commands import calibrate, targets
from .demo.command import demo
from .errors import MsdError, OptionError, OutputError
from .evaluate.command import evaluate
from .generate import Generated, prompt_of
from .generate import generate as generate_tokens
from .picture import check_plot
from .report import Report, embedded_report
from .screen import progress_bars
from .source import load
from .verification import read_feed

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
Tolerance = Annotated[float, typer.Option(help="largest relative L2 of any output")]


def _generating(help: str, **bounds: float) -> Any:
    return typer.Option(help=help, rich_help_panel="With --generate", **bounds)  # type: ignore[arg-type]


Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="a row for every layer")]


ReportOption = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE.html|json", help="write the report there, too: a page to open, or data"),
]


@app.command(epilog="Example: msd compile model.onnx -o fast.onnx --report report.html")
@with_options
def compile(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="default: MODEL's stem + .msd.onnx; a GenAI folder's: -msd"),
    ] = None,
    options: CompileOptions = DEFAULTS,
    report: ReportOption = None,
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
    arguments = options.arguments()
    with progress_bars(quiet=json_) as progress:
        path = output if output is not None else api.default_output(model)
        if report is not None:
            _check_report(report, model, path)
        try:
            compiled = api.compile(
                model,
                path,
                **arguments,
                verify=verify,
                verify_seconds=verify_seconds,
                tolerance=tolerance,
                measure=report is not None,
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
            _console().print(f"wrote {path}", soft_wrap=True)
        else:
            why = "already rewritten" if embedded_report(compiled.model) else "nothing to rewrite"
            _console().print(f"{why}: {path} is a copy", soft_wrap=True)
        if genai.is_result(path):
            _console().print(genai.VERSIONS, soft_wrap=True, highlight=False)


@app.command(epilog="Example: msd inspect model.onnx --json")
@with_options
def inspect(
    model: Model,
    options: CompileOptions = DEFAULTS,
    report: ReportOption = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg|png", help="draw the layers' roofline")] = None,
    verbose: Verbose = False,
    json_: Json = False,
) -> None:
    """Show a model's linear layers: formats, sizes, what compile would do, and why not; of a result, what it did."""
    arguments = options.arguments()
    if report is not None:
        _check_report(report, model, model)
    if plot is not None:
        check_plot(plot)
    found = api.inspect(model, **arguments)
    if plot is not None:
        from .roofline import draw_roofline  # here, for matplotlib takes a while

        draw_roofline(found, plot)
    _write_report(report, found)
    _show(found, json_, verbose)
    if plot is not None and not json_:
        _console().print(f"wrote {plot}", soft_wrap=True)


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
    with progress_bars(quiet=json_) as progress:
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
    inputs: Annotated[
        Path, typer.Option(metavar="FILE.npz", help="an array per input; to generate: input_ids, and attention_mask")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE.npz", help="an array per output; to generate: tokens, optional"),
    ] = None,
    portable: Annotated[bool, typer.Option("--portable", help="without the native library")] = False,
    generate: Annotated[bool, typer.Option("--generate", help="continue a prompt, with the model's KV cache")] = False,
    max_new_tokens: Annotated[int | None, _generating("tokens to add; default: 64", min=1)] = None,
    temperature: Annotated[float | None, _generating("default: 0, the likeliest token", min=0)] = None,
    top_k: Annotated[int | None, _generating("draw among so many likeliest tokens", min=1)] = None,
    top_p: Annotated[float | None, _generating("draw among tokens of so much probability", min=0, max=1)] = None,
    seed: Annotated[int | None, _generating("of the drawing; default: 0", min=0)] = None,
    stop: Annotated[list[int] | None, _generating("an id that ends a row; may be repeated")] = None,
    capacity: Annotated[int | None, _generating("tokens in caches that are buffers", min=1)] = None,
    json_: Json = False,
) -> None:
    """Run a model once, with the native kernels or, to compare, without; or generate tokens with it."""
    given: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
    }
    given |= {"seed": seed, "stop": stop or None, "capacity": capacity}
    chosen = {name: value for name, value in given.items() if value is not None}
    if chosen and not generate:
        raise OptionError(f"--{next(iter(chosen)).replace('_', '-')} says how to --generate")
    if output is None and not generate:
        raise OptionError("--output FILE.npz is needed: where to write the arrays")
    if output is not None:
        _check_writable(output, model, inputs)
    arrays = read_feed(inputs).arrays
    if generate:
        prompt = prompt_of(arrays, inputs)
        with progress_bars(quiet=json_) as progress:
            progress("generating", 0, 1)
            generated = generate_tokens(model, prompt, portable=portable, **chosen)
        _save_arrays(output, {"tokens": generated.tokens})
        _show_generated(generated, output, json_)
        return
    with progress_bars(quiet=json_) as progress:
        progress("running", 0, 1)
        results = api.run(model, arrays, portable=portable)
    _save_arrays(output, results)
    shapes = {name: list(array.shape) for name, array in results.items()}
    if json_:
        print(json.dumps({"output": str(output), "shapes": shapes}, indent=2))
    else:
        for name, shape in shapes.items():
            _console().print(f"{name} {shape}", soft_wrap=True, highlight=False, markup=False)


def _save_arrays(output: Path | None, arrays: dict[str, np.ndarray]) -> None:
    if output is None:
        return
    try:
        with output.open("wb") as file:
            np.savez(file, **{name: _storable(array) for name, array in arrays.items()})  # type: ignore[arg-type]
    except OSError as error:
        raise OutputError(f"output {str(output)!r} cannot be written: {error.strerror}") from error


def _show_generated(generated: Generated, output: Path | None, as_json: bool) -> None:
    speed = generated.tokens_per_second
    if as_json:
        facts = {"tokens": generated.rows, "prefill_ms": generated.prefill_ms}
        facts |= {"decode_ms": generated.decode_ms.tolist(), "tokens_per_second": speed}
        print(json.dumps(facts | {"output": None if output is None else str(output)}, indent=2))
        return
    for row in generated.rows:
        _console().print(" ".join(map(str, row)), soft_wrap=True, highlight=False, markup=False)
    rate = f", then {speed:.3g} tokens per second" if speed is not None else ""
    _console().print(f"prompt {generated.prefill_ms:.3g} ms{rate}", soft_wrap=True, highlight=False)


class Suite(StrEnum):
    """Benchmarks that need no model."""

    LINEAR = "linear"
    ATTENTION = "attention"
    DECODE = "decode"


@app.command("bench", epilog="Example: msd bench model.onnx --plot model.svg")
def bench_(
    model: Annotated[Path | None, typer.Argument(metavar="MODEL", help="the measure of the others")] = None,
    results: Annotated[
        list[Path] | None, typer.Argument(metavar="RESULT", help="default: MODEL, compiled for the occasion")
    ] = None,
    suite: Annotated[Suite | None, typer.Option(help="without a model: layers of common sizes; whole decoders")] = None,
    inputs: Annotated[
        Path | None, typer.Option(metavar="FILE.npz", help="an array per input; default: made from the signature")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="of every session; default: onnxruntime's, for a suite 1", min=1)
    ] = None,
    runs: Annotated[int, typer.Option(help="of each, in turns, for a median", min=15)] = 15,
    seconds: Annotated[float, typer.Option(help="for each comparison; then fewer runs, 3 at least", min=0)] = 30.0,
    portable: Annotated[
        bool, typer.Option("--portable", help="with --suite linear: our op without the native library, too")
    ] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg|png", help="draw it, too")] = None,
    json_: Json = False,
) -> None:
    """Time models, or single layers, side by side on this machine, and say how right each is.

    Of models: runs in turns, with medians, quartiles and ratios to the first one; prompt and next tokens of a decoder; time to open,
    first run and peak memory in fresh processes; the nodes that take longest.

    Suites: linear, products of one layer, every way that onnxruntime has (and OpenVINO, if it is installed), and how much of the
    machine's limit each reaches; attention, one layer's over its cache; decode, decoders of 336 million parameters, int8 and int4,
    which take some minutes and 1.5 GB of temporary files.
    """
    from . import bench  # here, for the other commands start without it

    if (model is None) == (suite is None):
        raise OptionError("one of MODEL and --suite is needed: what to time")
    if suite is not None and inputs is not None:
        raise OptionError("--inputs are for a MODEL; a suite makes its own")
    if portable and suite is not Suite.LINEAR:
        raise OptionError("--portable is for --suite linear")
    if plot is not None:
        check_plot(plot)
    feed = None if inputs is None else read_feed(inputs)
    report: bench.Report
    with progress_bars(quiet=json_) as progress:
        if model is not None:
            effort = bench.Effort(runs, seconds)
            report = bench.bench_models(
                model, results or [], inputs=feed, threads=threads, effort=effort, progress=progress
            )
        else:
            options: dict[str, Any] = {"threads": threads or 1, "runs": runs, "seconds": seconds, "progress": progress}
            if suite is Suite.LINEAR:
                grid = bench.LinearGrid() if plot is not None or json_ else bench.LinearGrid(ramp=())
                report = bench.bench_linear(portable=portable, grid=grid, **options)
            elif suite is Suite.ATTENTION:
                report = bench.bench_attention(**options)
            else:
                report = bench.bench_decode(**options)
    if plot is not None:
        bench.plot(report, plot)
    if json_:
        print(report.model_dump_json(indent=2))
        return
    _console().print(bench.view(report))
    if plot is not None:
        _console().print(f"wrote {plot}", soft_wrap=True)


@app.command("doctor", epilog="Example: msd doctor")
def doctor_(json_: Json = False) -> None:
    """Show what runs on this machine and why: onnxruntime, native library, instruction set, CPUs; and what is wrong.

    Exit status 1: the native library cannot be used.
    """
    from . import doctor  # here, as in `bench_`

    diagnosis = doctor.examine()
    if json_:
        print(diagnosis.model_dump_json(indent=2))
    else:
        _console().print(doctor.diagnosis_view(diagnosis))
    if not diagnosis.usable:
        raise typer.Exit(FAILED)


app.command("evaluate", epilog="Example: msd evaluate model.onnx model.msd.onnx --text text.txt")(evaluate)
app.command("targets", epilog="Example: msd targets")(targets)
app.command("calibrate", epilog="Example: msd calibrate -o here.toml")(calibrate)


app.command("demo", epilog="Example: msd demo -o models")(demo)


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


def _check_report(path: Path, model: Path, target: Path) -> None:
    """See, before the work, that the report can be written, and outside the folders if the result is a folder."""
    from .page import check_format  # here, as in `_write_report`

    check_format(path)
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
        from .page import write_report  # here, for other commands do without a page

        write_report(report, path)
