"""Massive activations: the same function in float32, and channels that a session which rounds them cannot bear."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from msd_compiler.models import BUNDLED
from onnx import numpy_helper
from support import model

import msd_compiler
from msd_compiler import ModelError
from msd_compiler.evaluate.measure import evaluate
from msd_compiler.runtime import open_model, run

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))
import massive

SHARED = Path(__file__).parents[3] / "shared" / "models" / "lm_stories260k"
HIDDEN = 64


def two_layers(norm: str = "n = Mul(r, gain)") -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    return model(
        f"(float[M, {HIDDEN}] x) => (float[M, 32] y, float[M, {HIDDEN}] z) "
        f"{{ r = Tanh(x) {norm} y = MatMul(n, w) t = Transpose<perm = [1, 0]>(v) z = MatMul(n, t) }}",
        gain=rng.uniform(0.5, 2, HIDDEN).astype(np.float32),
        w=rng.standard_normal((HIDDEN, 32)).astype(np.float32),
        v=rng.standard_normal((HIDDEN, HIDDEN)).astype(np.float32),
    )


def outputs(proto: onnx.ModelProto) -> list[np.ndarray]:
    x = np.random.default_rng(1).standard_normal((5, HIDDEN)).astype(np.float32)
    return run(open_model(proto, Path()), None, {"x": x})


@pytest.mark.parametrize("factor", [1, 30, 300, 1000])
def test_same_function(factor):
    before, after = two_layers(), massive.with_massive_activations(two_layers(), factor)
    onnx.checker.check_model(after, full_check=True)
    for a, b in zip(outputs(before), outputs(after), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # sums of 64 products in float32


def test_few_channels_become_as_loud_as_asked():
    gains = [
        numpy_helper.to_array(next(t for t in m.graph.initializer if t.name in ("gain", "n.massive")))
        for m in (two_layers(), massive.with_massive_activations(two_layers(), 300, channels=3))
    ]
    assert sorted(np.round(gains[1] / gains[0])) == [1.0] * 61 + [300.0] * 3


def test_nothing_unread_stays():
    names = {t.name for t in massive.with_massive_activations(two_layers(), 30).graph.initializer}
    assert names == {"n.massive", "y.massive", "z.massive"}


def test_refuses_a_norm_that_others_read():
    with pytest.raises(ModelError, match="no norm whose gain only MatMul"):
        massive.with_massive_activations(two_layers("n = Mul(r, gain) other = Relu(n)"), 30)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not here")
@pytest.mark.parametrize("exporter", ["ts17", "dynamo18"])
@pytest.mark.parametrize(("bits", "factor"), [(8, 1), (4, 30), (8, 300), (4, 1000)])
def test_trained_model(exporter, bits, factor, tmp_path):
    float_model = onnx.load(SHARED / f"stories260k_fp32_{exporter}.onnx")
    loud = massive.with_massive_activations(float_model, factor)
    assert len(massive.norms(loud.graph, {t.name: numpy_helper.to_array(t) for t in loud.graph.initializer})) == 11
    source, result = tmp_path / "source.onnx", tmp_path / "result.onnx"
    onnx.save(massive.quantized(loud, bits), source)
    msd_compiler.compile(source, result)
    found = evaluate(source, [result], tokens=SHARED / "eval_tokens.npz")
    default, _, ours = found.runs
    assert f"{ours.perplexity:.4g}" == f"{found.oracle.perplexity:.4g}"
    assert ours.same_top >= 0.999
    assert all(flip.margin <= 0.02 for flip in ours.flips)
    assert default.kl_mean >= 100 * ours.kl_mean
    assert len(default.flips) >= (100 if factor == 1 else 1000)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "factor"), [(8, 1000), (4, 300)])
def test_the_bundled_model(bits, factor, tmp_path):
    """At 4 bits some layers keep float activations, which is faster there than three terms."""
    source, result = tmp_path / "source.onnx", tmp_path / "result.onnx"
    onnx.save(
        massive.quantized(massive.with_massive_activations(onnx.load(BUNDLED / "model.onnx"), factor), bits), source
    )
    compiled = msd_compiler.compile(source, result)
    assert compiled.report.verification.passed
    assert "activations were looked at" in compiled.report.verification.note
    found = evaluate(source, [result], tokens=BUNDLED / "evaluation.npz")
    default, _, ours = found.runs
    assert f"{ours.perplexity:.4g}" == f"{found.oracle.perplexity:.4g}"
    assert all(flip.margin <= 0.02 for flip in ours.flips)
    assert default.perplexity > 2 * found.oracle.perplexity


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not here")
@pytest.mark.parametrize("factor", [1, 300])
def test_float_model_keeps_its_perplexity(factor):
    float_model = onnx.load(SHARED / "stories260k_fp32_ts17.onnx")
    loud = massive.with_massive_activations(float_model, factor)
    found = evaluate(loud, tokens=SHARED / "eval_tokens.npz")
    assert found.oracle.perplexity == pytest.approx(4.0281, abs=1e-4)
