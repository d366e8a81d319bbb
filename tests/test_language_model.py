"""Trained language models with low-bit caches and weights: perplexity and tokens, beside those of their float selves."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from msd_compiler.models import BUNDLED
from support import needs_opset

import msd_compiler
from msd_compiler import Decoder, Feed, Float4Quantization, KvCache, OptionError, Quantization
from msd_compiler.evaluate.measure import evaluate
from msd_compiler.evaluate.tokens import Tokens, read_tokens, tokens_of
from msd_compiler.quantize import quantize
from msd_compiler.source import load

MODELS = Path(__file__).parents[2] / "shared" / "models" / "lm_stories260k"
WINDOW = 512

pytestmark = pytest.mark.slow
needs_models = pytest.mark.skipif(not MODELS.is_dir(), reason=f"{MODELS} is not here")


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


@needs_models
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


# --- low-bit weights -----------------------------------------------------------------------------------------------

ROUNDINGS = {
    # how, perplexity of the stories' model (float: 4.0281) and of the bundled one (float: 16.3595)
    "int8": (Quantization(8), 4.0306, 16.3585),
    "int4": (Quantization(4), 4.5692, 16.8912),
    "mxfp4": (Float4Quantization("mxfp4"), 5.1484, 17.1356),
    "mxfp4, least error": (Float4Quantization("mxfp4", "least_error"), 5.0305, 17.2173),
    "nvfp4": (Float4Quantization("nvfp4"), 4.7341, 16.9590),
    "nvfp4, least error": (Float4Quantization("nvfp4", "least_error"), 4.5096, 16.7505),
}
"""Blocks of 32, NVFP4 of 16. The numbers are measured; 1 % is room for other versions of onnxruntime's quantizer."""

cases = pytest.mark.parametrize("name", ROUNDINGS)


def check_rounded(
    path: Path, how: Quantization | Float4Quantization, tokens: Tokens, expected: float, out: Path
) -> None:
    """Rounding may cost what it costs; what is compiled of the rounded model may change nothing."""
    if isinstance(how, Float4Quantization):
        needs_opset(24)
    try:
        rounded, layers = quantize(load(path), how)
    except OptionError as error:  # an old quantizer knows 4 bits alone
        pytest.skip(str(error))
    done = msd_compiler.compile(path, out, quantization=how)
    assert done.report.verification.passed
    assert {site.node for site in done.report.sites} >= layers.keys()
    found = evaluate(rounded.proto, [out], tokens=tokens)
    (result,) = found.results
    margin = max((flip.margin for flip in result.flips), default=0)
    print(
        f"perplexity {found.oracle.perplexity:.4f} -> {result.perplexity:.4f}, {len(result.flips)} flips, {margin:.4f}"
    )
    assert found.oracle.perplexity == pytest.approx(expected, rel=0.01)
    assert result.perplexity == pytest.approx(found.oracle.perplexity, rel=5e-5)
    assert result.same_top >= 0.999
    assert margin <= 0.02


@needs_models
@cases
def test_low_bit_weights(name, texts, tmp_path):
    how, expected, _ = ROUNDINGS[name]
    path = MODELS / "stories260k_fp32_dynamo18.onnx"
    check_rounded(path, how, tokens_of(texts), expected, tmp_path / "out.onnx")


@cases
def test_low_bit_weights_of_the_bundled_model(name, tmp_path):
    how, _, expected = ROUNDINGS[name]
    tokens = read_tokens(BUNDLED / "evaluation.npz")
    check_rounded(BUNDLED / "model.onnx", how, tokens, expected, tmp_path / "out.onnx")
