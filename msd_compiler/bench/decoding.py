"""Decoder models side by side: the prompt, and a token at a time over caches of several lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
import onnxruntime

from ..compare import relative_l2
from ..errors import ModelError, MsdError
from ..generate import Decoder
from ..generate.interface import read_interface, writes_into_buffers
from ..verification import Progress, silent
from .report import DecodeRow
from .timing import in_turns

WARM_UPS = 1


@dataclass(frozen=True)
class DecodeGrid:
    """What decoders are timed on."""

    prompt: int = 512
    """Tokens."""
    cached: tuple[int, ...] = (512, 1024, 2048)
    """Tokens in the cache before the first timed decode step, ascending."""
    buffers: bool = False
    """Caches are buffers where a model can write into one, as onnxruntime-genai has them; else only where it must."""


def time_decoding(
    models: Mapping[str, tuple[onnxruntime.InferenceSession, onnx.ModelProto]],
    grid: DecodeGrid,
    *,
    runs: int,
    seconds: float,
    notes: list[str],
    exact: str | None = None,
    progress: Progress = silent,
) -> list[DecodeRow]:
    """Rows for the prompt and for every length of the cache, if all models are decoders with a cache; else none.

    Args:
        models: session and graph by label; the first is the measure.
        grid: what to time.
        runs: of each, for a median.
        seconds: for each comparison.
        notes: gets what was left out, and why.
        exact: label of the model whose logits the others' distances are from; None: no distances.
        progress: told what is being done.
    """
    room = max(grid.prompt, *grid.cached) + runs + WARM_UPS + 1
    decoders: dict[str, Decoder] = {}
    for label, (session, proto) in models.items():
        try:
            can_write = grid.buffers and read_interface(session, proto).no_buffer is None
            capacity = room if can_write or writes_into_buffers(proto) else None
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
            rows += _cell(decoders, tokens, cached, grid.prompt, runs, seconds, exact)
        except MsdError as error:
            notes.append(f"decoding stops at {cached or tokens} tokens: {error}")
            break
    progress("timing prompt and decode", len(cells), len(cells))
    return rows


def _cell(
    decoders: Mapping[str, Decoder],
    tokens: int,
    cached: int,
    piece: int,
    runs: int,
    seconds: float,
    exact: str | None,
) -> list[DecodeRow]:
    logits: dict[str, np.ndarray] = {}
    calls: dict[str, Callable[[], object]] = {}
    for label, decoder in decoders.items():
        if cached:
            _fill(decoder, cached, piece)
        calls[label] = partial(_step, label, decoder, tokens, logits, from_start=not cached)
    times = in_turns(calls, runs=runs, seconds=seconds, warm_ups=WARM_UPS)
    measure = next(iter(times.values())).median_ms
    return [
        DecodeRow(
            model=label,
            tokens=tokens,
            cached=cached,
            time=time,
            tokens_per_second=1e3 * tokens / time.median_ms,
            ratio=time.median_ms / measure,
            relative_l2=None if exact is None else relative_l2(logits[label], logits[exact]),
        )
        for label, time in times.items()
    ]


def _step(label: str, decoder: Decoder, tokens: int, logits: dict[str, np.ndarray], *, from_start: bool) -> None:
    """Every model takes as many steps, so the last logits of all are those of the same tokens."""
    if from_start:
        decoder.reset()
    logits[label] = decoder.step(_tokens(tokens))


def _fill(decoder: Decoder, length: int, piece: int) -> None:
    """Go on from what the last comparison left in the cache, if that is not too much."""
    if decoder.length > length:
        decoder.reset()
    while decoder.length < length:
        decoder.step(_tokens(min(piece, length - decoder.length)))


def _tokens(count: int) -> np.ndarray:
    """Ids that every vocabulary has, ``[1, count]``."""
    return np.random.default_rng(0).integers(0, 32, (1, count))
