"""The evaluation itself: windows of tokens through the oracle and every run, a batch at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from ..errors import OutputError
from ..source import Source, load
from ..verification import Progress, silent
from .report import Evaluation, TokensRow
from .run import Opened, check_fit, model_digest, open_runs
from .score import Predictions, RunTally, Tally
from .sites import ROWS, site_noise
from .state import State, StateFile
from .tokens import Tokens, read_tokens, tokens_of
from .windows import Batch, Windows, batches

SAVE_EVERY = 1.0
"""Seconds between two writes of the state: what a kill loses at most, with the batch at work."""


def evaluate(
    source: str | PathLike[str] | onnx.ModelProto,
    results: Sequence[str | PathLike[str] | onnx.ModelProto] = (),
    *,
    tokens: Tokens | str | PathLike[str] | Sequence[Any] | np.ndarray,
    windows: Windows | None = None,
    threads: int | None = None,
    resume: str | PathLike[str] | None = None,
    per_site: bool = False,
    progress: Progress = silent,
) -> Evaluation:
    """Compare a language model's default session, the same with accuracy levels at 0, and results with its oracle.

    Teacher-forced: every model sees the text's tokens, whatever it predicts. Memory holds the logits of one batch of windows, of
    the oracle and of every run.

    Args:
        source: a file, a folder with one model in it, or a parsed model: a decoder of tokens, with a KV cache or without.
        results: what was made of it, or other models of the same vocabulary.
        tokens: what to evaluate on: `read_tokens`' file; ids ``[T]``, or ``[docs, T]`` with -1 behind a document's end; several
            documents; or what `read_text` gives.
        windows: how documents are cut; None: 512 tokens, no overlap, one at a time.
        threads: of the runs' sessions; None: onnxruntime's default.
        resume: a file that holds how far the evaluation has come, made if it is not there; the evaluation goes on from it.
        per_site: also look at every linear layer's own error on the text's first activations.
        progress: told what is being done.

    Raises:
        ModelError: a model cannot be read, is no decoder, has another vocabulary, or gives NaN.
        OptionError: tokens are no ids, or outside the vocabulary; a window's size means nothing.
        MsdError: a file cannot be read, or the state is of another evaluation.
        RuntimeRefused: onnxruntime does not load or run a model.
    """
    windows = windows or Windows()
    if isinstance(tokens, (str, PathLike)):
        tokens = read_tokens(Path(tokens))
    elif not isinstance(tokens, Tokens):
        tokens = tokens_of(tokens)
    state_file = StateFile(None if resume is None else Path(resume))
    if state_file.path is not None and (state_file.path.is_dir() or not state_file.path.parent.is_dir()):
        raise OutputError(f"state {str(resume)!r} cannot be written: it must be a file in an existing folder")
    before, after = load(source), [load(result) for result in results]
    opened = open_runs(before, after, windows.size, threads)
    check_fit(opened.oracle, opened.runs, tokens)
    new = State({}, Tally(), {run.name: RunTally() for run in opened.runs})
    if state_file.path is not None:
        new.of = _belongs_to(before, after, tokens, windows)
    state = state_file.read(new)
    _go_through(opened, tokens, windows, state, state_file, progress)
    notes, sites = list(opened.notes), None
    if per_site:
        first = _first(tokens, windows)
        sites, others = site_noise(before, opened.oracle, first, progress=progress)
        if others:
            notes.append(
                f"{others} layers are not looked at: the model rounds their activations, or they stand in a body"
            )
    about = TokensRow(
        name=tokens.name,
        digest=tokens.digest,
        documents=len(tokens.documents),
        count=tokens.count,
        window=windows.size,
        stride=windows.stride or windows.size,
        batch=windows.batch,
        predictions=state.oracle.count,
    )
    return Evaluation(
        source=str(before.path) if before.path else None,
        onnxruntime=onnxruntime.__version__,
        tokens=about,
        oracle=state.oracle.row(),
        runs=[tally.of(name) for name, tally in state.runs.items()],
        sites=sites,
        notes=notes,
    )


def _go_through(
    opened: Opened, tokens: Tokens, windows: Windows, state: State, file: StateFile, progress: Progress
) -> None:
    total = sum(1 for _ in batches(tokens, windows))
    written = time.monotonic()
    for batch in islice(batches(tokens, windows), state.done, None):
        progress("evaluating", state.done, total)
        exact = opened.oracle.logits(batch)
        part = Predictions(batch.targets[:, -batch.counted :].ravel(), batch.positions[:, -batch.counted :].ravel())
        part.add(state.oracle, exact, {run.name: (state.runs[run.name], run.logits(batch)) for run in opened.runs})
        state.done += 1
        if state.done == total or time.monotonic() - written >= SAVE_EVERY:
            file.write(state)
            written = time.monotonic()
    progress("evaluating", total, total)


def _belongs_to(source: Source, results: Sequence[Source], tokens: Tokens, windows: Windows) -> dict[str, str]:
    """What figures belong to: with another of these they would be others."""
    models = {f"result {i + 1}": model_digest(result) for i, result in enumerate(results)}
    return {
        "source": model_digest(source),
        **models,
        "tokens": tokens.digest,
        "window": f"{windows.size} by {windows.stride or windows.size}, batch {windows.batch}",
        "onnxruntime": onnxruntime.__version__,
    }


def _first(tokens: Tokens, windows: Windows) -> list[Batch]:
    """So many batches that a layer has `ROWS` tokens to be looked at on."""
    found: list[Batch] = []
    count = 0
    for batch in batches(tokens, windows):
        if count >= ROWS:
            break
        found.append(batch)
        count += batch.tokens.size
    return found
