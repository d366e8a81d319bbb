"""Whole decoders of Llama's shape with random weights: every way that onnxruntime has to run them on a CPU, and ours."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .. import api
from ..errors import MsdError, OutputError
from ..source import load
from ..verification import Progress, silent
from .contestants import Contestant, fresh_rows, made_feeds, open_contestant
from .decoding import DecodeGrid, time_decoding
from .llama import DEQUANTIZE, LEVEL_0, LEVEL_4, Llama, write
from .machine import Limits, Unit, measure_limits
from .report import DecodeReport, DecodeRow, DecoderRows, Setting
from .timing import check_threads

COMPILED = "compiled"
UNITS: dict[str, Unit] = {DEQUANTIZE: "int8", LEVEL_0: "float32", LEVEL_4: "int8", COMPILED: "int16"}
"""What multiplies in each."""


@dataclass(frozen=True)
class DecodersGrid:
    """What is timed."""

    llama: Llama = field(default_factory=Llama)
    bits: tuple[int, ...] = (8, 4)
    """Of the weights."""
    steps: DecodeGrid = field(default_factory=lambda: DecodeGrid(prompt=512, cached=(512,), buffers=True))
    starts: int = 3
    """Fresh processes per model, for a median."""
    read_bytes: int | None = None
    """Of the buffer for the read bandwidth; None: by the machine's last cache."""


def bench_decode(
    *,
    threads: int = 1,
    runs: int = 15,
    seconds: float = 30.0,
    grid: DecodersGrid | None = None,
    progress: Progress = silent,
) -> DecodeReport:
    """Time prompt and next tokens of decoders that are made in a temporary folder: 1.5 GB by default.

    Args:
        threads: in every session.
        runs: of each way, for a median.
        seconds: for each comparison; then fewer runs.
        grid: what to time.
        progress: told what is being done.

    Raises:
        OptionError: threads is less than 1.
        OutputError: there is no room in the temporary folder.
        RuntimeRefused: the native library cannot be used.
    """
    check_threads(threads)
    grid = grid or DecodersGrid()
    llama = grid.llama
    report = DecodeReport(
        setting=Setting.here(threads),
        limits=measure_limits(threads, grid.read_bytes),
        shape=asdict(llama),
        parameters=llama.parameters,
        weights=llama.weights,
        decoders=[],
    )
    for bits in grid.bits:
        told = _named(progress, f"int{bits}: ")
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            report.decoders.append(_decoder(Path(folder), bits, grid, threads, runs, seconds, report.notes, told))
        report.limits = report.limits.best(measure_limits(threads, grid.read_bytes))
    for decoder in report.decoders:
        for row in decoder.decoding:
            _judge(row, report.limits, llama.weights, decoder.stored_bytes)
    return report


def _named(progress: Progress, what: str) -> Progress:
    return lambda stage, done, total: progress(what + stage, done, total)


def _decoder(
    folder: Path,
    bits: int,
    grid: DecodersGrid,
    threads: int,
    runs: int,
    seconds: float,
    notes: list[str],
    progress: Progress,
) -> DecoderRows:
    weight = f"int{bits} block {grid.llama.block}"
    progress("writing the decoder", 0, 1)
    try:
        files = write(folder, grid.llama, bits)
    except OSError as error:
        raise OutputError(f"the decoder cannot be written to {str(folder)!r}: {error.strerror}") from error
    progress("writing the decoder", 1, 1)
    files[COMPILED] = folder / "compiled.onnx"
    api.compile(files[DEQUANTIZE], files[COMPILED], verify=False, progress=progress)
    contestants: list[Contestant] = []
    for label, path in files.items():
        progress("opening sessions", len(contestants), len(files))
        try:
            contestants.append(_open(label, path, threads))
        except MsdError as error:
            if label in (DEQUANTIZE, COMPILED):
                raise
            notes.append(f"{label}, {weight}: {error}")
    progress("opening sessions", len(files), len(files))
    decoding = time_decoding(
        {c.label: (c.session, c.source.proto) for c in contestants},
        grid.steps,
        runs=runs,
        seconds=seconds,
        notes=notes,
        exact=LEVEL_0 if any(c.label == LEVEL_0 for c in contestants) else None,
        progress=progress,
    )
    fresh = fresh_rows(contestants, threads, folder, grid.starts, notes, progress)
    return DecoderRows(weight=weight, stored_bytes=grid.llama.stored_bytes(bits), decoding=decoding, fresh=fresh)


def _open(label: str, path: Path, threads: int) -> Contestant:
    contestant = open_contestant(label, load(path), threads)
    contestant.feeds = made_feeds(contestant)
    return contestant


def _judge(row: DecodeRow, limits: Limits, weights: int, stored_bytes: int) -> None:
    seconds, operations = row.time.median_ms / 1e3, 2 * weights * row.tokens
    row.limit = limits.reached(seconds, UNITS[row.model], operations, stored_bytes)
