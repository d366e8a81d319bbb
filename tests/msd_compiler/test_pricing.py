"""What the cost model decides about whole models, and how the report says it."""

from __future__ import annotations

import time

import networkx as nx
import numpy as np
import onnx
import pytest
from msd_compiler.runtime_ops.matmul.layout import ActivationFormat
from onnx import TensorProto, helper
from support import model, weight

import msd_compiler
from msd_compiler import cli
from msd_compiler.compare import relative_l2
from msd_compiler.cost.error import FORMAT_ERRORS
from msd_compiler.cost.totals import critical_path
from msd_compiler.inputs import Feed
from msd_compiler.report import Outcome, ReasonCode, SiteRow

NBITS = """(float[M, 256] x) => (float[M, 64] z) {
    a = com.microsoft.MatMulNBits <K = 256, N = 256, bits = 4, block_size = 32, accuracy_level = 4> (x, b1, s1)
    r = Relu(a)
    z = com.microsoft.MatMulNBits <K = 256, N = 64, bits = 4, block_size = 32, accuracy_level = 4> (r, b2, s2)
}"""
LAYER = "(float[M, 512] x) => (float[M, 128] y) { d = DequantizeLinear(w, s)  y = MatMul(x, d) }"


def nbits() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    return model(
        NBITS,
        b1=rng.integers(0, 256, (256, 8, 16), np.uint8),
        s1=rng.uniform(0.01, 0.02, (256, 8)).astype(np.float32),
        b2=rng.integers(0, 256, (64, 8, 16), np.uint8),
        s2=rng.uniform(0.01, 0.02, (64, 8)).astype(np.float32),
    )


def sites(proto: onnx.ModelProto, **options: object) -> list[SiteRow]:
    return msd_compiler.compile(proto, **options).report.sites


def test_two_terms_by_default():
    for row in sites(nbits()):
        assert (row.outcome, row.terms, row.choice) == (Outcome.REWRITTEN, 2, "2 terms")
        by_name = {c.name: c for c in row.candidates}
        assert list(by_name)[:2] == ["keep", "float activations"]
        assert by_name["keep"].error > 1e-3
        assert "above the budget of 0.0001" in by_name["keep"].why_not
        assert by_name["2 terms"].why_not is None


def test_a_budget_that_only_three_terms_keep():
    assert [row.terms for row in sites(model(LAYER, **weight("int8", (512, 128), (128,))), budget=1e-6)] == [3]


def test_a_layer_that_does_not_pay_is_left_alone_with_the_numbers():
    """Many rows on an accelerator whose matrix unit multiplies bf16 half as fast as int8: two terms gain nothing."""
    done = msd_compiler.compile(
        model(LAYER, **weight("int8", (512, 128), (128,))), target="h200", workload="prefill=1@100000"
    )
    (row,) = done.report.sites
    assert not done.changed
    assert (row.outcome, row.reason_code, row.choice) == (Outcome.KEPT, ReasonCode.DOES_NOT_PAY, "keep")
    keep, ours = (next(c for c in row.candidates if c.name == name) for name in ("keep", "2 terms"))
    assert keep.seconds < ours.seconds
    assert "as it stands it takes" in row.reason
    assert done.report.pricing.before == done.report.pricing.after


def test_overrides(tmp_path):
    onnx.save(nbits(), tmp_path / "m.onnx")
    done = msd_compiler.compile(tmp_path / "m.onnx", tmp_path / "out.onnx", overrides=["a=keep", "?=3"])
    (output, *_), (alone,) = done.report.verification.outputs, done.report.verification.sites
    assert output.relative_l2 > 1e-3  # what is kept rounds its activations as it always did
    assert alone.relative_l2 < 1e-6
    assert msd_compiler.verify(tmp_path / "m.onnx", tmp_path / "out.onnx").passed
    first, second = done.report.sites
    assert (first.outcome, first.reason_code) == (Outcome.KEPT, ReasonCode.AS_ASKED)
    assert (second.outcome, second.terms) == (Outcome.REWRITTEN, 3)


def test_float_activations_as_asked():
    done = msd_compiler.compile(nbits(), overrides=["*=float"])
    assert {row.reason_code for row in done.report.sites} == {ReasonCode.FLOAT_ACTIVATIONS}
    levels = [
        helper.get_attribute_value(attribute)
        for node in done.model.graph.node
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    ]
    assert levels == [0, 0]
    assert done.report.verification.outputs[0].relative_l2 < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overrides": ["a"]}, "override 'a'; needed GLOB=WHAT, WHAT being one of keep, float, 1, 2, 3"),
        ({"overrides": ["a=4"]}, "override 'a=4'"),
        ({"overrides": ["nobody=keep"]}, "'nobody=keep' is about no layer of the model; there are 'a', 'z'"),
        ({"budget": 0.0}, "budget is 0.0; it must be a positive number"),
        ({"target": "abacus"}, "abacus: neither a target"),
        ({"workload": "decode"}, "workload has 'decode'; needed name=share@sizes"),
    ],
)
def test_what_cannot_be_asked(options, message):
    with pytest.raises(msd_compiler.OptionError, match=message.replace("?", r"\?")):
        msd_compiler.inspect(nbits(), **options)


def test_only_nbits_can_say_float():
    with pytest.raises(msd_compiler.OptionError, match="only MatMulNBits has accuracy_level"):
        msd_compiler.inspect(model(LAYER, **weight("int8", (512, 128), (128,))), overrides=["*=float"])


def test_samples_predict_the_error(tmp_path):
    """One channel 200 times as large: the law, fed with samples, foretells what the layer alone then does."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 512)).astype(np.float32)
    x[:, 100] *= 200
    layer = model(LAYER, **weight("int8", (512, 128), (128,)))
    (row,) = sites(layer, samples=[Feed("given", {"x": x})], budget=1.0, terms=2)
    predicted = next(c.error for c in row.candidates if c.name == "2 terms")
    exact = x.astype(np.float64) @ np.asarray(_weights(layer), np.float64)
    msd_compiler.compile(layer, tmp_path / "out.onnx", terms=2)
    y = msd_compiler.run(tmp_path / "out.onnx", {"x": x})["y"]
    # one column of the weight is nearly all of the output, so single columns vary
    assert relative_l2(y, exact) == pytest.approx(predicted, rel=0.25)
    blind = next(c.error for c in sites(layer)[0].candidates if c.name == "2 terms")
    assert predicted != blind


def test_massive_activations_whose_weights_are_small_need_three_terms(tmp_path):
    """Issue 29849: the output is no larger for them, so the crest of the activation alone would say far too little."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((64, 512)).astype(np.float32)
    x[:, [100, 300]] *= 300
    parts = weight("int8", (512, 128), (128,))
    parts["w"][[100, 300]] //= 100
    layer = model(LAYER, **parts)
    samples = [Feed("given", {"x": x})]
    (row,) = sites(layer, samples=samples)
    assert row.terms == 3
    (row,) = sites(layer, samples=samples, budget=1.0, terms=2)
    exact = x.astype(np.float64) @ np.asarray(_weights(layer), np.float64)
    msd_compiler.compile(layer, tmp_path / "out.onnx", terms=2)
    y = msd_compiler.run(tmp_path / "out.onnx", {"x": x})["y"]
    predicted = next(c.error for c in row.candidates if c.name == "2 terms")
    assert relative_l2(y, exact) == pytest.approx(predicted, rel=0.25)


def _weights(proto: onnx.ModelProto) -> np.ndarray:
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    return tensors["w"].astype(np.float32) * tensors["s"]


def test_samples_with_nan():
    layer = model(LAYER, **weight("int8", (512, 128), (128,)))
    with pytest.raises(msd_compiler.ModelError, match="activation 'x' is not finite on given"):
        msd_compiler.inspect(layer, samples=[Feed("given", {"x": np.full((1, 512), np.nan, np.float32)})])


def test_prices_do_not_travel_in_the_result():
    once, twice = (msd_compiler.compile(nbits(), target=target).model for target in ("cpu-avx2", "cpu-avx512-vnni"))
    assert once.SerializeToString(deterministic=True) == twice.SerializeToString(deterministic=True)


def test_totals():
    pricing = msd_compiler.inspect(nbits(), target="cpu-avx2").pricing
    chosen = [
        next(c for c in row.candidates if c.name == row.choice)
        for row in msd_compiler.inspect(nbits(), target="cpu-avx2").sites
    ]
    assert pricing.after.seconds == pytest.approx(sum(c.seconds for c in chosen))
    assert pricing.after.critical_path_seconds == pytest.approx(pricing.after.seconds)  # one behind the other
    assert pricing.unpriced == {"Relu": 1}
    assert len(pricing.digest) == 12


def test_the_critical_path_is_the_longest_chain():
    reads = nx.DiGraph([(2, 0), (2, 1), (3, 2)])
    assert critical_path(reads, {0: 1.0, 1: 5.0, 3: 2.0}) == 7.0
    assert critical_path(nx.DiGraph(), {}) == 0.0


def seven_billion() -> onnx.ModelProto:
    """The products of a Llama with 7 B parameters: their shapes, and external data that nobody wrote."""
    graph = onnx.GraphProto(name="g")
    graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "tokens", 4096]))
    last = "x"
    for layer in range(32):
        for name, k, n in (
            ("q", 4096, 4096),
            ("k", 4096, 4096),
            ("v", 4096, 4096),
            ("o", 4096, 4096),
            ("up", 4096, 11008),
        ):
            y = _product(graph, f"{name}{layer}", last, k, n)
            last = y if name == "o" else last
        last = _product(graph, f"down{layer}", y, 11008, 4096)
    _product(graph, "head", last, 4096, 32000)
    graph.output.append(helper.make_tensor_value_info("head_y", TensorProto.FLOAT, ["batch", "tokens", 32000]))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _product(graph: onnx.GraphProto, name: str, x: str, k: int, n: int) -> str:
    for what, data_type, dims, size in (
        ("b", TensorProto.UINT8, [n, k // 32, 16], n * k // 2),
        ("s", TensorProto.FLOAT, [n, k // 32], n * k // 8),
    ):
        tensor = graph.initializer.add(name=f"{name}_{what}", data_type=data_type, dims=dims)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "nowhere.data"), ("offset", "0"), ("length", str(size))):
            tensor.external_data.add(key=key, value=value)
    attributes = {"K": k, "N": n, "bits": 4, "block_size": 32, "accuracy_level": 4}
    graph.node.append(
        helper.make_node(
            "MatMulNBits", [x, f"{name}_b", f"{name}_s"], [f"{name}_y"], name, domain="com.microsoft", **attributes
        )
    )
    return f"{name}_y"


def test_seven_billion_parameters_take_seconds(tmp_path):
    path = tmp_path / "seven.onnx"
    path.write_bytes(seven_billion().SerializeToString())
    with (tmp_path / "nowhere.data").open("wb") as data:
        data.truncate(4096 * 32000)  # a hole: nothing of it is read
    began = time.perf_counter()
    report = msd_compiler.inspect(path, workload="decode=0.8@batch1,context4096;prefill=0.2@512")
    assert time.perf_counter() - began < 5
    assert report.summary.rewritten == 32 * 6 + 1
    assert (
        report.model_dump()
        == msd_compiler.inspect(path, workload="decode=0.8@batch1,context4096;prefill=0.2@512").model_dump()
    )


def test_the_roofline_is_drawn(tmp_path, capsys, monkeypatch):
    onnx.save(nbits(), tmp_path / "m.onnx")
    arguments = ["msd", "inspect", str(tmp_path / "m.onnx"), "--plot", str(tmp_path / "roof.svg"), "--verbose"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code
    assert "prefill, as chosen" in (tmp_path / "roof.svg").read_text()
    shown = capsys.readouterr().out
    assert "candidates" in shown
    assert "predicted for cpu-" in shown


def test_what_two_terms_are_not_enough_for_gets_three_without_being_asked(tmp_path):
    """The model's own norm makes two channels 3000 times as large: seen only once it has run."""
    parts = weight("int8", (512, 128), (128,))
    parts["w"][[100, 300]] = 0
    gain = np.ones(512, np.float32)
    gain[[100, 300]] = 3000
    text = "(float[M, 512] x) => (float[M, 128] y) { h = Mul(x, gain)  d = DequantizeLinear(w, s)  y = MatMul(h, d) }"
    done = msd_compiler.compile(model(text, gain=gain, **parts), tmp_path / "out.onnx")
    assert [row.terms for row in done.report.sites] == [3]
    assert done.report.verification.passed
    assert "activations were looked at" in done.report.verification.note
    with pytest.raises(msd_compiler.VerificationFailed, match="--terms 3"):
        msd_compiler.compile(model(text, gain=gain, **parts), tmp_path / "two.onnx", terms=2)
    assert not (tmp_path / "two.onnx").exists()


@pytest.mark.parametrize(
    ("what", "terms", "group"),
    [("mxfp4x2", 1, 32), ("mxfp4", 1, 32), ("mxfp4x2-e2m1", 1, 32), ("mxfp4-e2m1", 1, 32), ("mxfp8", 3, 32)],
)
def test_activations_in_mx_formats_where_they_are_asked_for(what, terms, group, tmp_path):
    """Groups are MX blocks, whatever the weight's are; library and body give the same bits, as far off as the law says."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((64, 512)).astype(np.float32)
    layer = model(LAYER, **weight("int8", (512, 128), (128,)))
    done = msd_compiler.compile(layer, tmp_path / "out.onnx", overrides=[f"*={what}"], tolerance=1.0)
    (row,) = done.report.sites
    assert (row.activation, row.terms, row.group, row.choice) == (what, terms, group, what)
    y = msd_compiler.run(tmp_path / "out.onnx", {"x": x})["y"]
    np.testing.assert_array_equal(y, msd_compiler.run(tmp_path / "out.onnx", {"x": x}, portable=True)["y"])
    predicted = next(iter(FORMAT_ERRORS[f] for f in ActivationFormat if f.label == what))
    assert relative_l2(y, x.astype(np.float64) @ _weights(layer)) == pytest.approx(predicted, rel=0.05)
    with pytest.raises(msd_compiler.VerificationFailed, match="MX formats keep 3 to 7 bits"):
        msd_compiler.compile(layer, tmp_path / "not.onnx", overrides=[f"*={what}"])
