"""The models of an evaluation, each open once: tokens in, logits of every token out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from ..errors import ModelError, MsdError, OptionError
from ..exact_products import exact_products
from ..generate import Decoder
from ..generate.interface import writes_into_buffers
from ..inline import inlined
from ..linked import Linked
from ..oracle import is_widened, levels_at_zero
from ..oracle_session import open_oracle
from ..runtime import SAY_NOTHING, RuntimeRefused, open_model
from ..source import Source
from .report import DEFAULT, LEVEL_ZERO
from .tokens import Tokens
from .windows import Batch

_LEVEL = {"session.qdq_matmulnbits_accuracy_level": "0"}
"""What keeps ``DequantizeLinear -> MatMul``, too, from rounding activations in a default session."""


@dataclass(frozen=True)
class Run:
    """One way to run a model."""

    name: str
    decoder: Decoder

    def logits(self, batch: Batch) -> np.ndarray:
        """``[B * counted, V]`` float32, of the predictions that count.

        Raises:
            ModelError: the model gives the logits of the last token only.
            RuntimeRefused: it does not run on a window.
        """
        self.decoder.reset()
        try:
            found = self.decoder.step(batch.tokens)
        except MsdError as error:
            raise type(error)(f"{self.name}: a window of {batch.tokens.shape[1]} tokens: {error}") from error
        finally:
            self.decoder.reset()  # caches of a window need not wait for the next one
        if found.shape[1] != batch.tokens.shape[1]:
            raise ModelError(
                f"{self.name}: it gives the logits of the last token only; those of every token are needed"
            )
        return found[:, -batch.counted :].reshape(-1, found.shape[-1])

    def vocabulary(self) -> int:
        """Tokens that it gives logits of."""
        output = next(o for o in self.decoder.session.get_outputs() if o.name == self.decoder.interface.logits)
        declared = output.shape[-1] if output.shape else None
        return declared if isinstance(declared, int) else int(self._of_one_token().shape[-1])

    def _of_one_token(self) -> np.ndarray:
        width = self.decoder.interface.ids.dims[1]
        self.decoder.reset()
        return self.decoder.step(np.zeros((1, width if isinstance(width, int) else 1), np.int64))


@dataclass(frozen=True)
class Opened:
    """The oracle, and everything that is compared with it."""

    oracle: Run
    runs: tuple[Run, ...]
    notes: tuple[str, ...]
    """What is left out, and why."""


def open_runs(source: Source, results: Sequence[Source], window: int, threads: int | None) -> Opened:
    """Open the source in three ways, and its results.

    Raises:
        ModelError: a model is no decoder; says what is missing.
        RuntimeRefused: onnxruntime does not load one. If it is the source as it is, a note says so instead.
    """
    options: dict[str, Any] = {} if threads is None else {"intra_op_num_threads": threads}
    session, _ = open_oracle(_without_saturation(source))
    # what the graph says of types is not so of its oracle where that is widened
    oracle = _run("the oracle", source, session, window, None if is_widened(source.proto) else source.proto)
    runs, notes = [], []
    exact = Source(levels_at_zero(source.proto), source.folder, source.path)
    for name, way, config in ((DEFAULT, source, {}), (LEVEL_ZERO, exact, _LEVEL)):
        try:
            opened = _open(way, portable=is_portable(way), config=config, **options)
        except RuntimeRefused as error:
            notes.append(f"{name} is left out: {error}")
            continue
        runs.append(_run(name, way, opened, window, way.proto))
    for name, result in zip(_names(results), results, strict=True):
        opened = _open(result, portable=is_portable(result), **options)
        runs.append(_run(name, result, opened, window, result.proto))
    return Opened(oracle, tuple(runs), tuple(notes))


def check_fit(oracle: Run, runs: Sequence[Run], tokens: Tokens) -> None:
    """See that tokens and runs fit the oracle.

    Raises:
        OptionError: a token is outside the vocabulary.
        ModelError: a run has another vocabulary.
    """
    size = oracle.vocabulary()
    if tokens.largest >= size:
        raise OptionError(f"{tokens.name}: token id {tokens.largest}, and the model's vocabulary is 0 to {size - 1}")
    for run in runs:
        found = run.vocabulary()
        if found != size:
            raise ModelError(f"{run.name}: its vocabulary has {found} tokens, the source's has {size}")


def model_digest(source: Source) -> str:
    """SHA-256 of a model's files, or of the parsed model if it has none."""
    if source.path is None:
        return hashlib.sha256(source.proto.SerializeToString(deterministic=True)).hexdigest()
    digest = hashlib.sha256()
    for place in source.files():
        with place.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _without_saturation(source: Source) -> Source:
    """The same meaning, without integer products that some CPUs saturate."""
    flat = inlined(source)
    exact = exact_products(Linked.of(flat))
    return source if exact is flat else exact


def is_portable(source: Source) -> bool:
    """Whether it has no op of ours, and needs no library."""
    return all(opset.domain != "msd" for opset in source.proto.opset_import)


def _run(
    name: str, source: Source, session: onnxruntime.InferenceSession, window: int, graph: onnx.ModelProto | None
) -> Run:
    try:
        capacity = window if writes_into_buffers(source.proto) else None
        return Run(name, Decoder(session, model=graph, capacity=capacity))
    except ModelError as error:
        raise ModelError(f"{source.name}: {error}") from error


def _open(source: Source, **options: Any) -> onnxruntime.InferenceSession:
    return open_model(source.proto, source.folder, name=source.name, log_severity_level=SAY_NOTHING, **options)


def _names(results: Sequence[Source]) -> list[str]:
    """A short name of each; where two would have the same, the whole path, and a number behind what is there twice."""
    short = [Path(r.name).name if r.path else "result" for r in results]
    names = [n if short.count(n) == 1 else r.name for n, r in zip(short, results, strict=True)]
    return [n if names.count(n) == 1 else f"{n} ({names[: i + 1].count(n)})" for i, n in enumerate(names)]
