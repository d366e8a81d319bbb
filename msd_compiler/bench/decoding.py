"""Decoder models side by side: the prompt, and a token at a time over caches of several lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
import onnxruntime

from ..errors import ModelError, MsdError
from ..generate import Decoder
from ..generate.interface import writes_into_buffers
from ..verification import Progress, silent
from .report import DecodeRow
from .timing import Time, in_turns

WARM_UPS = 1


@dataclass(frozen=True)
class DecodeGrid:
    """What decoders are timed on."""

    prompt: int = 512
    """Tokens."""
    cached: tuple[int, ...] = (512, 1024, 2048)
    """Tokens in the cache before the first timed decode step, ascending."""


def time_decoding(
    models: Mapping[str, tuple[onnxruntime.InferenceSession, onnx.ModelProto]],
    grid: DecodeGrid,
    *,
    runs: int,
    seconds: float,
    notes: list[str],
    progress: Progress = silent,
) -> list[DecodeRow]:
    """Rows for the prompt and for every length of the cache, if all models are decoders with a cache; else none.

    Args:
        models: session and graph by label; the first is the measure.
        grid: what to time.
        runs: of each, for a median.
        seconds: for each comparison.
        notes: gets what was left out, and why.
        progress: told what is being done.
    """
    room = max(grid.prompt, *grid.cached) + runs + WARM_UPS + 1
    decoders: dict[str, Decoder] = {}
    for label, (session, proto) in models.items():
        try:
            capacity = room if writes_into_buffers(proto) else None
            decoders[label] = Decoder(session, model=proto, capacity=capacity)
        except ModelError:
            return []
        if not decoders[label].interface.caches:
            return []
    rows: list[DecodeRow] = []
    cells = [(grid.prompt, 0), *((1, length) for length in grid.cached)]
    for number, (tokens, cached) in enumerate(cells):
        progress("timing prompt and decode", number, len(cells))
        try:
            rows += _cell(decoders, tokens, cached, grid.prompt, runs, seconds)
        except MsdError as error:
            notes.append(f"decoding stops at {cached or tokens} tokens: {error}")
            break
    progress("timing prompt and decode", len(cells), len(cells))
    return rows


def _cell(
    decoders: Mapping[str, Decoder], tokens: int, cached: int, piece: int, runs: int, seconds: float
) -> list[DecodeRow]:
    calls: dict[str, Callable[[], object]] = {}
    for label, decoder in decoders.items():
        decoder.reset()
        if cached:
            _fill(decoder, cached, piece)
            calls[label] = partial(decoder.step, _tokens(1))
        else:
            calls[label] = partial(_prompt, decoder, tokens)
    times = in_turns(calls, runs=runs, seconds=seconds, warm_ups=WARM_UPS)
    measure = next(iter(times.values())).median_ms
    return [_row(label, tokens, cached, time, measure) for label, time in times.items()]


def _row(label: str, tokens: int, cached: int, time: Time, measure: float) -> DecodeRow:
    rate = 1e3 * tokens / time.median_ms
    ratio = time.median_ms / measure
    return DecodeRow(model=label, tokens=tokens, cached=cached, time=time, tokens_per_second=rate, ratio=ratio)


def _prompt(decoder: Decoder, tokens: int) -> None:
    decoder.reset()
    decoder.step(_tokens(tokens))


def _fill(decoder: Decoder, length: int, piece: int) -> None:
    while decoder.length < length:
        decoder.step(_tokens(min(piece, length - decoder.length)))


def _tokens(count: int) -> np.ndarray:
    """Ids that every vocabulary has, ``[1, count]``."""
    return np.random.default_rng(0).integers(0, 32, (1, count))
