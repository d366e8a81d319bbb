"""The verification must see what it is there to see: wrong weights, wrong kernels, rounding, slowness."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from support import activation, compiled, meaning, model, nbits_weight, weight

import msd_compiler
from msd_compiler import VerificationFailed, api, verification
from msd_compiler.report import Method
from msd_compiler.runtime import TimedOut
from msd_compiler.source import Source

GRAPH = """(FLOAT[B, S, 64] x) => (FLOAT[B, S, 48] logits) {
    h = com.microsoft.MatMulNBits <K = 64, N = 64, bits = 4, block_size = 32, accuracy_level = 4> (x, b, s)
    d = DequantizeLinear(w, t)
    logits = MatMul(h, d)
}"""


def two_layers(floats: str = "float32") -> onnx.ModelProto:
    head = weight("int8", (64, 48), (48,), floats=floats)
    name = {"float32": "float", "float16": "float16", "bfloat16": "bfloat16"}[floats]
    return model(GRAPH.replace("FLOAT", name), **nbits_weight(64, 64, 32, floats=floats), w=head["w"], t=head["s"])


def test_the_figures_are_those_of_an_independent_oracle(tmp_path):
    source = two_layers()
    done = msd_compiler.compile(source)
    feed = {"x": activation((2, 3, 64))}
    found = msd_compiler.verify(source, done.model, inputs=feed, runs=1).outputs[0]
    expected = meaning(source, feed)["logits"]
    result = msd_compiler.session(done.model.SerializeToString()).run(None, feed)[0]
    exact = np.linalg.norm(result - expected) / np.linalg.norm(expected)
    assert found.relative_l2 == pytest.approx(exact, rel=0.1)  # the oracle itself is float32
    assert found.native_to_portable_l2 == 0
    assert found.baseline_relative_l2 > 20 * found.relative_l2
    assert found.argmax.positions == 6


@pytest.mark.parametrize("floats", ["float16", "bfloat16"])
def test_half_precision_is_measured_against_float32_with_its_own_tolerance(floats):
    done = msd_compiler.compile(two_layers(floats))
    row = done.report.verification.outputs[0]
    assert row.source_relative_l2 > 0
    assert row.tolerance == max(1e-3, 2 * row.source_relative_l2)
    assert row.relative_l2 <= row.tolerance


def test_a_wrong_weight_is_found_and_named(monkeypatch):
    """One code of one layer packed wrongly: the whole and the layer alone both show it."""
    pack = api.lower_linear.__globals__["pack_codes"]

    def wrong(codes, plan):
        codes = codes.copy()
        codes[:, 0] ^= 8
        return pack(codes, plan)

    monkeypatch.setitem(api.lower_linear.__globals__, "pack_codes", wrong)
    with pytest.raises(VerificationFailed, match="worst layers alone: 'h'"):
        msd_compiler.compile(two_layers())


def test_what_takes_too_long_is_verified_layer_by_layer(monkeypatch):
    def over(*_, **__):
        raise TimedOut("over")

    monkeypatch.setattr(api, "verify_whole", over)
    found = msd_compiler.compile(two_layers()).report.verification
    assert (found.method, found.passed, len(found.sites)) == (Method.SITES, True, 2)
    assert "60 s" in found.note
    assert all(0 < s.relative_l2 < 1e-4 for s in found.sites)


def test_large_models_are_verified_layer_by_layer(monkeypatch):
    monkeypatch.setattr(api, "WHOLE_UP_TO", 100)
    assert msd_compiler.compile(two_layers()).report.verification.method is Method.SITES


def test_layers_that_the_time_does_not_reach_are_counted():
    decided = api.decide(Source(two_layers(), None), api.Options(), verification.silent)
    report = api._report(decided)
    proto, products = api._rewrite(decided, report, api.WeightStore(None), verification.silent)
    found = verification.verify_sites(Source(proto, None), products, clock=verification.Clock(1e-9))
    assert (len(found.sites), found.note) == (1, "1 of 2 layers in the time given")


def test_a_code_at_a_rounding_boundary_is_no_failure():
    codes = np.full((4, 100), 50, np.int8)
    assert verification._rounding_of_codes(codes) == pytest.approx(np.sqrt(100) / 1000)


def test_the_source_is_kept_out_of_the_default_session_s_rounding():
    """The oracle has level 0 and no fusions, so a perfect copy of the source's meaning is at distance 0 from it."""
    source = two_layers()
    same = msd_compiler.verify(source, source, inputs={"x": activation((1, 2, 64))}, runs=1).outputs[0]
    assert same.relative_l2 > 1e-3  # the source as a default session runs it
    assert same.relative_l2 == same.baseline_relative_l2


def test_inputs_that_the_model_refuses_are_named():
    done = compiled(two_layers())
    with pytest.raises(msd_compiler.MsdError, match="x"):
        msd_compiler.verify(two_layers(), done.model, inputs={"y": np.zeros(3, np.float32)})


def test_a_model_that_the_runtime_cannot_load_is_verified_layer_by_layer():
    source = two_layers()
    source.graph.node.add(op_type="FromTheFuture", domain="com.microsoft", input=["logits"], output=["z"])
    source.graph.output[0].name = "z"
    found = msd_compiler.compile(source).report.verification
    assert (found.method, found.passed, len(found.sites)) == (Method.SITES, True, 2)
    assert "FromTheFuture" in found.note
