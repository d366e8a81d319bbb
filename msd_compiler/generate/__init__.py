"""Generating tokens with a decoder model, source or compiled, its caches bound as inputs and outputs."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from ..errors import ModelError, OptionError
from ..runtime import open_model, session
from ..source import load
from .decoder import Decoder
from .interface import writes_into_buffers
from .sampling import Sampling

__all__ = ["PAST_STOP", "Decoder", "Generated", "generate", "prompt_of"]

PAST_STOP = -1
"""Fills `Generated.tokens` behind a row's stop id."""


@dataclass(frozen=True, eq=False)
class Generated:
    """New tokens, and how long they took.

    Attributes:
        tokens: ``[B, new]`` int64; behind a row's stop id, which it includes, come -1.
        logits: ``[B, new, V]`` float32, those that each token was chosen from, if they were to be kept.
        prefill_ms: time of the step that took the prompt, milliseconds.
        decode_ms: ``[new - 1]`` float64, of every step that took one more token per row, milliseconds. Choosing is not in it.
    """

    tokens: np.ndarray
    logits: np.ndarray | None
    prefill_ms: float
    decode_ms: np.ndarray

    @property
    def rows(self) -> list[list[int]]:
        """The tokens of every row, without what comes behind its stop id."""
        return [[int(token) for token in row if token != PAST_STOP] for row in self.tokens]

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens that the decode steps took, of all rows, per second; None if there was no such step."""
        seconds = float(self.decode_ms.sum()) / 1e3
        return len(self.tokens) * len(self.decode_ms) / seconds if seconds > 0 else None


def generate(
    model: str | os.PathLike[str] | onnx.ModelProto | onnxruntime.InferenceSession,
    prompt: np.ndarray | Sequence[Sequence[int] | np.ndarray],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: int | Sequence[int] = (),
    capacity: int | None = None,
    keep_logits: bool = False,
    portable: bool = False,
    **options: Any,
) -> Generated:
    """Continue prompts, a token per row and step.

    Args:
        model: a file, a folder with one model in it, a parsed model, or an open session of any origin.
        prompt: ``[B, S]`` ids, or a list of ids per row. Rows of different length are padded on the left, if the model has a mask
            and positions and looks at them row by row.
        max_new_tokens: 1 or more. Ends sooner when every row has a stop id.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        top_k: draw among the so many likeliest tokens.
        top_p: draw among the fewest likeliest tokens with this probability together.
        seed: of the drawing.
        stop: ids that end a row.
        capacity: tokens of the caches' buffers, for models that write into them (GroupQueryAttention): room for the prompt and all new
            tokens but the last. None: caches grow, or, if they cannot, buffers just large enough.
        keep_logits: return them.
        portable: see `session`.
        options: see `session`.

    Raises:
        OptionError: the prompt or an option cannot be.
        ModelError: the model cannot be read, is no decoder, or its logits are not numbers.
        RuntimeRefused: onnxruntime does not load or run the model.
    """
    tokens, padding = _padded(prompt)
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
        raise OptionError(f"max_new_tokens is {max_new_tokens!r}; it must be 1 or more")
    stops = np.atleast_1d(stop)
    if stops.ndim != 1 or (stops.size and stops.dtype.kind not in "iu"):
        raise OptionError(f"stop is {stop!r}; it must be a token id, or several")
    sampling = Sampling(temperature, top_k, top_p, seed)
    needed = tokens.shape[1] + max_new_tokens - 1
    if isinstance(capacity, Integral) and 1 <= capacity < needed:
        raise OptionError(
            f"capacity {capacity} is too small: {tokens.shape[1]} prompt tokens and {max_new_tokens} new ones need {needed}"
        )
    decoder = _decoder(model, capacity, needed, portable, options)

    logits, prefill_ms = _timed_step(decoder, tokens, padding)
    new: list[np.ndarray] = []
    kept: list[np.ndarray] = []
    decode_ms: list[float] = []
    done = np.zeros(len(tokens), bool)
    while True:
        if np.isnan(logits).any():
            raise ModelError(f"logits for new token {len(new)} are not numbers (NaN)")
        chosen = sampling.choose(logits)
        new.append(np.where(done, PAST_STOP, chosen))
        if keep_logits:
            kept.append(logits)
        done |= np.isin(chosen, stops)
        if len(new) == max_new_tokens or done.all():
            break
        logits, ms = _timed_step(decoder, chosen[:, None])
        decode_ms.append(ms)
    stacked = np.stack(kept, axis=1) if keep_logits else None
    return Generated(np.stack(new, axis=1), stacked, prefill_ms, np.array(decode_ms, np.float64))


def prompt_of(arrays: Mapping[str, np.ndarray], path: Path) -> list[np.ndarray]:
    """The prompt in the arrays of a file.

    Args:
        arrays: ``input_ids`` ``[B, S]``; where rows differ in length also ``attention_mask`` ``[B, S]``, 0 for ids that do not count.
        path: the file, for messages.

    Returns:
        A row of ids per prompt.

    Raises:
        OptionError: the arrays are others.
    """
    ids = arrays.get("input_ids")
    unknown = sorted(set(arrays) - {"input_ids", "attention_mask"})
    if ids is None or unknown:
        found = ", ".join(map(repr, sorted(arrays))) or "nothing"
        raise OptionError(f"prompt {str(path)!r} holds {found}; input_ids, and attention_mask or not, are needed")
    mask = arrays.get("attention_mask", np.ones(ids.shape, np.int64))
    if ids.ndim != 2 or mask.shape != ids.shape:
        raise OptionError(
            f"prompt {str(path)!r}: input_ids are {list(ids.shape)}, attention_mask {list(mask.shape)}; "
            "both must be [batch, tokens]"
        )
    return [row[keep] for row, keep in zip(ids, mask != 0, strict=True)]


def _timed_step(decoder: Decoder, tokens: np.ndarray, padding: np.ndarray | None = None) -> tuple[np.ndarray, float]:
    """Logits of the last token ``[B, V]``, and milliseconds."""
    began = time.perf_counter()
    logits = decoder.step(tokens, padding=padding)
    return logits[:, -1].copy(), (time.perf_counter() - began) * 1e3


def _decoder(model: Any, capacity: int | None, needed: int, portable: bool, options: dict[str, Any]) -> Decoder:
    if isinstance(model, onnxruntime.InferenceSession):
        if portable or options:
            named = [*(["portable"] if portable else []), *options]
            raise OptionError(f"{', '.join(named)} cannot be set for a session that is open; give the model's file")
        return Decoder(model, capacity=capacity)
    source = load(model)
    if source.path is not None:
        opened = session(source.path, portable=portable, **options)
    else:
        opened = open_model(source.proto, source.folder, portable=portable, **options)
    if capacity is None and writes_into_buffers(source.proto):
        capacity = needed
    return Decoder(opened, model=source.proto, capacity=capacity)


def _padded(prompt: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ids ``[B, S]``, 0 where padded on the left, and how many are ``[B]``."""
    try:
        rows = [np.asarray(row) for row in prompt]
    except (TypeError, ValueError) as error:
        raise OptionError(f"the prompt is {type(prompt).__name__}; integers [batch, tokens] are needed") from error
    if not rows:
        raise OptionError("the prompt has no rows")
    for index, row in enumerate(rows):
        if row.ndim != 1 or len(row) == 0 or row.dtype.kind not in "iu":
            found = "is empty" if row.ndim == 1 and len(row) == 0 else f"is {row.dtype}{list(row.shape)}"
            raise OptionError(f"row {index} of the prompt {found}; a row of one or more integers is needed")
    longest = max(map(len, rows))
    padding = np.array([longest - len(row) for row in rows], np.int64)
    tokens = np.zeros((len(rows), longest), np.int64)
    for index, row in enumerate(rows):
        tokens[index, padding[index] :] = row
    return tokens, padding
