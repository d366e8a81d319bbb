"""What stands beside the model: held-out text for evaluations, prompts, the record of the training and its curve."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from corpus import Document
from training import CONTEXT

EVALUATION, CALIBRATION, FIRST = 10_000, 2_000, 2_000
PROMPTS = ("Class definitions\n\n", "A function call", 'The "with" statement is used to')


@dataclass(frozen=True)
class Tokens:
    """A document and its ids, or the first of them; the token that begins a document is before all."""

    document: Document
    ids: np.ndarray


def chosen(held_out: Sequence[Tokens]) -> tuple[list[Tokens], list[Tokens]]:
    """Documents for evaluations and other ones for calibration, as many as their tokens need, in the order of their hashes."""
    found: tuple[list[Tokens], list[Tokens]] = ([], [])
    remaining = sorted(held_out, key=lambda t: hashlib.sha256(t.document.text.encode()).digest())
    for group, wanted in zip(found, (EVALUATION, CALIBRATION), strict=True):
        while remaining and sum(t.ids.size for t in group) < wanted:
            group.append(remaining.pop(0))
    return found


def save_tokens(documents: Sequence[Tokens], path: Path) -> None:
    """One after the other in ``ids``; the i-th is ``ids[offsets[i]:offsets[i + 1]]``."""
    offsets = np.cumsum([0, *(t.ids.size for t in documents)])
    ids = np.concatenate([t.ids for t in documents])
    np.savez_compressed(path, ids=ids.astype(np.int32), offsets=offsets.astype(np.int32))


def save_text(documents: Sequence[Tokens], path: Path) -> None:
    """The same to read; two blank lines, which no document has, stand between them."""
    path.write_text("\n\n\n".join(t.document.text for t in documents) + "\n", "utf-8", newline="\n")


def save_prompts(encode: Any, path: Path) -> None:
    """Beginnings that the model continues."""
    rows = [{"text": text, "ids": encode(text).ids} for text in PROMPTS]
    path.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


def sources(documents: Sequence[Document]) -> list[dict[str, Any]]:
    """Where the text is from, and how much of it; the hash is of all documents in order, a zero byte behind each."""
    found = []
    for name in sorted({d.source for d in documents}):
        texts = [d for d in documents if d.source == name]
        digest = hashlib.sha256(b"".join(d.text.encode() + b"\0" for d in texts))
        found.append(
            {
                "name": name,
                "documents": len(texts),
                "held_out": sum(d.held_out for d in texts),
                "bytes": sum(len(d.text.encode()) for d in texts),
                "sha256": digest.hexdigest(),
            }
        )
    return found


def versions() -> dict[str, str]:
    """Of everything that had a part in the weights and the file."""
    names = ("torch", "transformers", "tokenizers", "numpy", "onnx", "onnxscript", "onnxruntime")
    return {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"} | {
        name: version(name).partition("+")[0] for name in names
    }


def evaluated(model: Path, documents: Sequence[Tokens]) -> dict[str, Any]:
    """Perplexity in onnxruntime, float32, one thread; in windows of the context that do not overlap, as ``msd evaluate`` counts."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    losses = [_losses(session, t.ids) for t in documents]
    loss, count = sum(float(x.sum()) for x in losses), sum(x.size for x in losses)
    return {
        "tokens": sum(t.ids.size for t in documents),
        "predictions": count,
        "loss": loss / count,
        "perplexity": math.exp(loss / count),
    }


def with_bits(result: dict[str, Any], documents: Sequence[Tokens]) -> dict[str, Any]:
    """An evaluation of whole documents with bits a byte, which can be compared between vocabularies."""
    size = sum(len(t.document.text.encode()) for t in documents)
    return result | {"bits_per_byte": result["loss"] * result["predictions"] / math.log(2) / size}


def first(documents: Sequence[Tokens], tokens: int = FIRST) -> list[Tokens]:
    """Of documents only so many tokens, the last document cut."""
    found = []
    for t in documents:
        if tokens > 1:
            found.append(Tokens(t.document, t.ids[:tokens]))
        tokens -= t.ids.size
    return found


def draw(record: dict[str, Any], path: Path) -> None:
    """The curve of both losses as SVG, the same bytes for the same record."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "msd"}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    axes.plot(record["step"], record["train_loss"], label="training")
    axes.plot(record["step"], record["validation_loss"], label="held out")
    axes.plot(record["kept_step"], min(record["validation_loss"]), "o", color="C1", label="kept")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def _losses(session: onnxruntime.InferenceSession, ids: np.ndarray) -> np.ndarray:
    """Minus the logarithm of what the model gave each token but the first."""
    found = [np.empty(0)]
    for start in range(0, len(ids) - 1, CONTEXT):
        window = ids[start : start + CONTEXT + 1].astype(np.int64)
        logits = session.run(["logits"], _feed(session, window[:-1]))[0][0].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        found.append(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), window[1:]])
    return np.concatenate(found)


def _feed(session: onnxruntime.InferenceSession, ids: np.ndarray) -> dict[str, np.ndarray]:
    """A prefill: every cache is empty."""
    feed = {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64)}
    caches = [i for i in session.get_inputs() if i.name.startswith("past")]
    empty = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in caches}
    return feed | {"position_ids": np.arange(len(ids))[None]} | empty
