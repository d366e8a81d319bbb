"""The demo's work: round, compile, evaluate, generate, in that order; files in one folder."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from .. import api
from ..errors import ModelError
from ..evaluate.attach import with_evaluation
from ..evaluate.measure import evaluate
from ..evaluate.report import DEFAULT, Evaluation
from ..evaluate.tokens import Tokens
from ..generate import Generated, generate
from ..models.massive import quantized, with_massive_activations
from ..oracle_session import open_oracle
from ..quantize import widths
from ..report import Report
from ..runtime import session
from ..source import is_external, load, nbytes, stored_tensors
from ..verification import Progress, silent
from .material import Material
from .report import Demo, Measured

COMPILED, FLOAT = "compiled", "float32"

PREDICTIONS = 4000
"""Tokens of the text that are predicted: enough to tell sessions apart."""

NEW_TOKENS = 48
ROUNDS = 5
"""Times that every model continues the prompt, in turns."""

FACTOR = 300.0


@dataclass(frozen=True)
class Shown:
    """The demo, and the report of its int4 model with the evaluation in it."""

    demo: Demo
    report: Report


@dataclass(frozen=True)
class _Rounded:
    """One rounding of the model: files and what they did on the text."""

    weights: str
    source: Path
    result: Path
    report: Report
    evaluation: Evaluation

    def rows(self) -> list[Measured]:
        """The default session, and what was compiled."""
        by_name = {run.name: run for run in self.evaluation.runs}
        found = []
        for name, path, run in ((DEFAULT, self.source, DEFAULT), (COMPILED, self.result, self.result.name)):
            row = by_name[run]
            found.append(
                Measured(
                    weights=self.weights,
                    run=name,
                    bytes=_bytes(path),
                    perplexity=row.perplexity,
                    exact_perplexity=self.evaluation.oracle.perplexity,
                    changed=len(row.flips),
                )
            )
        return found


def show(material: Material, folder: Path, *, progress: Progress = silent) -> Shown:
    """Everything the demo shows.

    Args:
        folder: an existing one, for the models that are made.

    Raises:
        ModelError: the model is no float decoder.
        RuntimeRefused: onnxruntime does not run it.
    """
    model = load(material.model).proto
    tokens = _first(material.tokens, PREDICTIONS)
    bits = sorted(widths(), reverse=True)
    rounded = [_rounded(model, b, folder / f"int{b}.onnx", tokens, progress, closely=b == bits[-1]) for b in bits]
    floats = evaluate(material.model, tokens=tokens, progress=progress)
    perplexity = floats.oracle.perplexity
    in_floats = Measured(
        weights=FLOAT,
        run=DEFAULT,
        bytes=_bytes(material.model),
        perplexity=perplexity,
        exact_perplexity=perplexity,
        changed=len(next(run for run in floats.runs if run.name == DEFAULT).flips),
    )
    massive = _massive(model, bits[0], folder, tokens, progress)
    everything = [*rounded, *massive]
    rows = [in_floats, *(row for r in everything for row in r.rows())]
    paths = [material.model, *(path for r in everything for path in (r.source, r.result))]
    exact = [material.model, *(path for r in everything for path in (r.source, r.source))]
    rows = _continued(material, rows, paths, exact, progress)
    usual = len(rows) - 2 * len(massive)
    demo = Demo(
        model=material.about,
        parameters=sum(prod(t.dims) for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT),
        predictions=floats.tokens.predictions,
        prompt=material.text(material.prompt),
        new_tokens=NEW_TOKENS,
        rows=rows[:usual],
        factor=FACTOR,
        massive=rows[usual:],
    )
    smallest = rounded[-1]
    return Shown(demo, with_evaluation(smallest.report, smallest.evaluation))


def _first(tokens: Tokens, count: int) -> Tokens:
    """So many of them, whole documents but for the last."""
    documents: list[np.ndarray] = []
    left = count
    for document in tokens.documents:
        if left < 2:
            break
        documents.append(document[: left + 1])
        left -= len(documents[-1]) - 1
    return Tokens(tokens.name, tuple(documents))


def _rounded(
    model: onnx.ModelProto, bits: int, source: Path, tokens: Tokens, progress: Progress, *, closely: bool = False
) -> _Rounded:
    """As onnxruntime's own tools write it, then compiled, both evaluated; ``closely``: layer by layer, too, for the report."""
    source.write_bytes(quantized(model, bits).SerializeToString(deterministic=True))
    result = source.with_suffix(".msd.onnx")
    compiled = api.compile(source, result, measure=closely, progress=progress)
    found = evaluate(source, [result], tokens=tokens, per_site=closely, progress=progress)
    return _Rounded(f"int{bits}", source, result, compiled.report, found)


def _massive(model: onnx.ModelProto, bits: int, folder: Path, tokens: Tokens, progress: Progress) -> list[_Rounded]:
    try:
        loud = with_massive_activations(model, FACTOR)
    except ModelError:
        return []  # not of Llama's kind: nothing to show it on
    return [_rounded(loud, bits, folder / f"int{bits}-massive.onnx", tokens, progress)]


def _continued(
    material: Material, rows: list[Measured], paths: list[Path], exact: list[Path], progress: Progress
) -> list[Measured]:
    """Rows with speed and continuation; ``exact`` are the sources whose oracle chooses the tokens to compare with."""
    sessions = {path: session(path, intra_op_num_threads=1) for path in paths}  # idle threads of one disturb the others
    runs: dict[Path, list[Generated]] = {path: [] for path in paths}
    for done in range(ROUNDS):
        progress("generating", done, ROUNDS)
        for path in paths:
            runs[path].append(_generate(sessions[path], material))
    progress("generating", ROUNDS, ROUNDS)
    chosen = {path: _generate(open_oracle(load(path))[0], material).rows[0] for path in dict.fromkeys(exact)}
    found = []
    for row, path, source in zip(rows, paths, exact, strict=True):
        ids = runs[path][0].rows[0]
        equal = [a == b for a, b in zip(ids, chosen[source], strict=True)]
        seconds = float(np.median(np.concatenate([run.decode_ms for run in runs[path]]))) / 1e3
        update = {
            "tokens_per_second": 1 / seconds,
            "continuation": material.text(ids),
            "as_exact": equal.index(False) if False in equal else len(equal),
        }
        found.append(row.model_copy(update=update))
    return found


def _generate(opened: onnxruntime.InferenceSession, material: Material) -> Generated:
    return generate(opened, [list(material.prompt)], max_new_tokens=NEW_TOKENS)


def _bytes(path: Path) -> int:
    """The model's file, and what it stores in others."""
    return path.stat().st_size + sum(nbytes(t) for t in stored_tensors(load(path).proto) if is_external(t))
