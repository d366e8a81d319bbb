"""A trained language model with a low-bit cache: its perplexity and its tokens, beside those of its float self."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import msd_compiler
from msd_compiler import Decoder, Feed, KvCache

MODELS = Path(__file__).parents[2] / "shared" / "models" / "lm_stories260k"
WINDOW = 512

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODELS.is_dir(), reason=f"{MODELS} is not here"),
]


def documents(name: str) -> list[np.ndarray]:
    with np.load(MODELS / name) as data:
        ids, offsets = data["ids"].astype(np.int64), data["offsets"]
    return [ids[a:b] for a, b in pairwise(offsets)]


def logits_of(model: object, texts: list[np.ndarray]) -> list[np.ndarray]:
    """``[tokens - 1, V]`` of every window of every text, one prefill each."""
    session = msd_compiler.session(model, intra_op_num_threads=1)
    decoder = Decoder(session)
    found = []
    for text in texts:
        for start in range(0, len(text), WINDOW):
            window = text[start : start + WINDOW]
            if len(window) > 1:
                decoder.reset()
                found.append(decoder.step(window[None])[0, :-1].astype(np.float64))
    return found


def targets(texts: list[np.ndarray]) -> np.ndarray:
    windows = [text[s : s + WINDOW] for text in texts for s in range(0, len(text), WINDOW)]
    return np.concatenate([w[1:] for w in windows if len(w) > 1])


def perplexity(logits: list[np.ndarray], wanted: np.ndarray) -> float:
    rows = np.concatenate(logits)
    rows = rows - rows.max(axis=1, keepdims=True)
    nll = np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(len(rows)), wanted]
    return float(np.exp(nll.mean()))


@pytest.fixture(scope="module")
def texts() -> list[np.ndarray]:
    return documents("eval_tokens.npz")


@pytest.fixture(scope="module")
def float_logits(texts) -> list[np.ndarray]:
    return logits_of(MODELS / "stories260k_fp32_dynamo18.onnx", texts)


def samples() -> list[Feed]:
    """Calibration text, other documents than the evaluation's, as the model's own inputs."""
    feeds = []
    for i, text in enumerate(documents("calib_tokens.npz")[:16]):
        ids = text[None, :WINDOW]
        ones, positions = np.ones_like(ids), np.arange(ids.shape[1])[None]
        caches = {
            f"past_key_values.{layer}.{kind}": np.zeros((1, 4, 0, 8), np.float32)
            for layer in range(5)
            for kind in ("key", "value")
        }
        feeds.append(Feed(str(i), {"input_ids": ids, "attention_mask": ones, "position_ids": positions} | caches))
    return feeds


CASES = {
    # cache, most that perplexity may rise, largest margin of a token that changes
    "int8, samples": (lambda: KvCache(8, samples()), 0.005, 0.5),
    "int8": (lambda: KvCache(8), 0.005, 0.25),
    "int4": (lambda: KvCache(4), 0.2, 20.0),
}


@pytest.mark.parametrize(("cache", "rise", "margin"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("exporter", ["dynamo18", "ts17"])
def test_low_bit_cache(texts, float_logits, cache, rise, margin, exporter, tmp_path):
    out = tmp_path / "out.onnx"
    msd_compiler.compile(MODELS / f"stories260k_fp32_{exporter}.onnx", out, kv_cache=cache())
    found = logits_of(out, texts)
    wanted = targets(texts)
    before, after = perplexity(float_logits, wanted), perplexity(found, wanted)
    assert before == pytest.approx(4.0281, abs=2e-3)
    exact, low = np.concatenate(float_logits), np.concatenate(found)
    best, other = exact.argmax(axis=1), low.argmax(axis=1)
    rows = np.flatnonzero(best != other)
    lost = exact[rows, best[rows]] - exact[rows, other[rows]]
    figures = f"perplexity {before:.4f} -> {after:.4f}, {len(rows)} of {len(best)} tokens differ, "
    print(f"{exporter}: {figures}{(lost > 0.25).sum()} by more than 0.25 logit, at most {lost.max(initial=0):.3f}")
    assert after <= before * (1 + rise)
    assert lost.max(initial=0) <= margin
