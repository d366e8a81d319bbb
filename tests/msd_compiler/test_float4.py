"""MXFP4 and NVFP4 made of float weights: every number by the standards' rules, and whole models of any opset."""

import json

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import HALF_TOLERANCE, TOLERANCE, activation, model, needs_opset, ops, relative_l2, run
from typer.testing import CliRunner

import msd_compiler
from msd_compiler.cli import app
from msd_compiler.errors import ModelError, OptionError
from msd_compiler.facts import ReasonCode
from msd_compiler.float4 import BLOCK_SIZES, round_to_float4
from msd_compiler.quantize import Float4Quantization
from msd_compiler.report import Method, Outcome

FORMATS = ("mxfp4", "nvfp4")
RULES = ("standard", "least_error")

MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
"""Of E2M1; every second has an even mantissa."""


def nearest(value):
    """The E2M1 number next to ``value``: of two that are as near the one with an even mantissa."""
    distance = np.abs(MAGNITUDES - abs(value))
    near = np.flatnonzero(distance == distance.min())
    chosen = near[0] if len(near) == 1 else next(i for i in near if i % 2 == 0)
    return np.copysign(MAGNITUDES[chosen], value)


def scales_of(rounded):
    """``[blocks, N]`` float64."""
    whole = 1 if rounded.scale_of_scales is None else np.float32(rounded.scale_of_scales)
    return (rounded.scales.astype(np.float32) * np.float32(whole)).astype(np.float64)


def values_of(rounded, format):
    return rounded.codes.astype(np.float64) * scales_of(rounded).repeat(BLOCK_SIZES[format], 0)[: len(rounded.codes)]


def blocks_of(weight, format):
    block = BLOCK_SIZES[format]
    return [weight[first : first + block] for first in range(0, len(weight), block)]


WEIGHTS = st.builds(
    lambda k, n, seed, spread: (
        np.random.default_rng(seed).standard_normal((k, n)) * 2.0 ** np.random.default_rng(seed + 1).uniform(-spread, spread, (k, n))
    ).astype(np.float32),
    st.integers(1, 80), st.integers(1, 6), st.integers(0, 9999), st.sampled_from((0.0, 3.0, 30.0)),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(WEIGHTS, st.sampled_from(FORMATS))
def test_codes(weight, format):
    rounded = round_to_float4(weight, format)
    scales = scales_of(rounded)
    assert scales.shape == (-(-len(weight) // BLOCK_SIZES[format]), weight.shape[1])
    for block, part in enumerate(blocks_of(weight, format)):
        for (k, n), value in np.ndenumerate(part):
            scaled = np.float32(value) / np.float32(scales[block, n]) if scales[block, n] else 0.0
            code = float(rounded.codes[block * BLOCK_SIZES[format] + k, n])
            assert code == nearest(np.clip(scaled, -6, 6))


@settings(max_examples=60, deadline=None)
@given(WEIGHTS)
def test_mx_scales(weight):
    """OCP MX: the largest power of two in the block, over E2M1's largest, 4."""
    scales = scales_of(round_to_float4(weight, "mxfp4"))
    for block, part in enumerate(blocks_of(weight, "mxfp4")):
        for n, peak in enumerate(np.abs(part).max(0)):
            assert peak == 0 or 4 * scales[block, n] <= peak < 8 * scales[block, n]


@settings(max_examples=60, deadline=None)
@given(WEIGHTS)
def test_nv_scales(weight):
    """A block's peak over 6, in units that take the tensor's peak to 6 * 448."""
    rounded = round_to_float4(weight, "nvfp4")
    whole = np.abs(weight).max() / np.float32(6 * 448)
    assert rounded.scale_of_scales == whole
    assert rounded.scales.astype(np.float32).max() == 448
    for block, part in enumerate(blocks_of(weight, "nvfp4")):
        wanted = np.abs(part).max(0) / np.float32(6) / whole
        np.testing.assert_array_equal(rounded.scales[block], np.minimum(wanted, 448).astype(ml_dtypes.float8_e4m3fn))


@settings(max_examples=60, deadline=None)
@given(WEIGHTS, st.sampled_from(FORMATS))
def test_least_error_is_least(weight, format):
    standard, best = (round_to_float4(weight, format, rule) for rule in RULES)
    for one, other, part in zip(
        blocks_of(values_of(standard, format), format),
        blocks_of(values_of(best, format), format),
        blocks_of(weight, format),
        strict=True,
    ):
        before, after = (((values - part) ** 2).sum(0) for values in (one, other))
        assert (after <= before * (1 + 1e-6)).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 5), st.sampled_from(FORMATS), st.integers(0, 99))
def test_what_is_rounded_stays(k, n, format, seed):
    rng = np.random.default_rng(seed)
    codes = MAGNITUDES[rng.integers(0, 8, (k, n))] * rng.choice([-1, 1], (k, n))
    codes[:: BLOCK_SIZES[format]] = 6  # so that every block has the largest
    exponents = rng.integers(-5, 9, (-(-k // BLOCK_SIZES[format]), n))
    exponents[0] = 9
    weight = (codes * (2.0**exponents).repeat(BLOCK_SIZES[format], 0)[:k]).astype(np.float32)
    for rule in RULES:
        found = values_of(round_to_float4(weight, format, rule), format)
        np.testing.assert_allclose(found, weight, rtol=1e-6 if format == "nvfp4" else 0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("peak", [0.0, 1e-45, 1e-38, 3.4e38])
def test_ends_of_the_range(peak, format, rule):
    weight = np.zeros((40, 3), np.float32)
    weight[5, 1] = -peak
    rounded = round_to_float4(weight, format, rule)
    assert np.isfinite(scales_of(rounded)).all()
    found = values_of(rounded, format)
    assert np.count_nonzero(found) <= 1
    if peak > 1e-38:
        assert abs(found[5, 1] / -peak - 1) < 0.26


def test_parts(monkeypatch):
    weight = activation((100, 37))
    whole = [round_to_float4(weight, format, rule) for format in FORMATS for rule in RULES]
    monkeypatch.setattr("msd_compiler.float4._AT_ONCE", 1000)
    parts = [round_to_float4(weight, format, rule) for format in FORMATS for rule in RULES]
    for one, other in zip(whole, parts, strict=True):
        assert one.codes.tobytes() == other.codes.tobytes()
        assert one.scales.tobytes() == other.scales.tobytes()


# --- whole models ----------------------------------------------------------------------------------------------------

K, N = 100, 12
B = activation((N,), seed=3)
FORMS = {
    # nodes, whether w is stored as [N, K], y as the weight's [K, N] gives it
    "MatMul": ("y = MatMul(x, w)", False, lambda x, w: x @ w),
    "MatMul, Add": ("p = MatMul(x, w)  y = Add(p, b)", False, lambda x, w: x @ w + B),
    "Transpose": ("t = Transpose(w)  y = MatMul(x, t)", True, lambda x, w: x @ w),
    "Gemm": ("y = Gemm<alpha=-1.7, beta=0.3, transB=1>(x, w, b)", True, lambda x, w: -1.7 * (x @ w) + 0.3 * B),
}


def source(form, floats="float32", opset=17):
    nodes, transposed, meaning = FORMS[form]
    w = (activation((N, K) if transposed else (K, N), floats, seed=2) * np.float32(0.1)).astype(floats)
    b = {"b": B.astype(floats)} if " b)" in nodes else {}
    scalar = {"float32": "float", "float16": "float16"}[floats]
    return (
        model(f"({scalar}[3,{K}] x) => ({scalar}[3,{N}] y) {{ {nodes} }}", opset=opset, w=w, **b),
        (w.T if transposed else w),
        meaning,
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("floats", ["float32", "float16"])
@pytest.mark.parametrize("opset", [11, 17, 24])
def test_model(opset, floats, form, format, rule):
    needs_opset(opset)
    proto, w, meaning = source(form, floats, opset)
    before = proto.SerializeToString(deterministic=True)
    done = msd_compiler.compile(proto, quantization=Float4Quantization(format, rule), terms=2)
    assert proto.SerializeToString(deterministic=True) == before
    (row,) = done.report.sites
    assert (row.outcome, row.format) == (Outcome.REWRITTEN, f"{format} block {BLOCK_SIZES[format]}")
    assert row.reason_code is ReasonCode.WEIGHT_ROUNDED
    by = "the standard's rule" if rule == "standard" else "least squared error"
    assert (
        row.reason
        == f"{proto.graph.node[-1 if 'Add' not in form else 0].op_type} with a {floats} weight, rounded to {format}, block scales by {by}"
    )
    assert done.report.verification.method is Method.WHOLE
    assert 0.02 < done.report.verification.outputs[0].rounding_relative_l2 < 0.2
    x = activation((3, K), floats)
    expected = meaning(x.astype(np.float64), values_of(round_to_float4(w, format, rule), format))
    for portable in (False, True):
        found = run(done.model, {"x": x}, portable=portable)["y"]
        assert relative_l2(found, expected) <= HALF_TOLERANCE[floats] * (1 if floats == "float32" else 2)
    assert all(o.version == opset for o in done.model.opset_import if not o.domain)


def test_layers_shorter_than_a_block_stay():
    proto = model(f"(float[3,20] x) => (float[3,{N}] y) {{ y = MatMul(x, w) }}", w=activation((20, N)))
    assert not msd_compiler.compile(proto, quantization=Float4Quantization("mxfp4")).changed
    assert msd_compiler.compile(proto, quantization=Float4Quantization("nvfp4")).changed


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize("overrides", [("one=keep",), ("*=keep",)])
def test_kept_layers_are_rounded_and_run(overrides, opset, tmp_path):
    w = activation((K, N), seed=2)
    proto = model(
        f"(float[3,{K}] x) => (float[3,{N}] y, float[3,{N}] z) {{ y = MatMul(x, w)  z = MatMul(x, v) }}",
        opset=opset,
        w=w,
        v=2 * w,
    )
    proto.graph.node[0].name, proto.graph.node[1].name = "one", "other"
    onnx.save(proto, tmp_path / "float.onnx")
    done = msd_compiler.compile(
        tmp_path / "float.onnx",
        tmp_path / "out.onnx",
        quantization=Float4Quantization("nvfp4"),
        terms=2,
        overrides=overrides,
    )
    assert ops(done.model).count("msd.MatMul") == (1 if overrides == ("one=keep",) else 0)
    x, expected = activation((3, K)), values_of(round_to_float4(w, "nvfp4"), "nvfp4")
    for found in (run(done.model, {"x": x}), run(onnx.load(tmp_path / "out.onnx"), {"x": x}, portable=True)):
        assert relative_l2(found["y"], x @ expected) <= TOLERANCE
        assert relative_l2(found["z"], x @ (2 * expected)) <= TOLERANCE


def test_nan_weight():
    w = activation((K, N))
    w[3, 4] = np.nan
    proto = model(f"(float[3,{K}] x) => (float[3,{N}] y) {{ y = MatMul(x, w) }}", w=w)
    with pytest.raises(ModelError, match="weight 'w' holds NaN or Inf"):
        msd_compiler.compile(proto, quantization=Float4Quantization("mxfp4"))


def test_options():
    with pytest.raises(OptionError, match="cannot be rounded to 'fp4'; it must be mxfp4 or nvfp4"):
        Float4Quantization("fp4")
    with pytest.raises(OptionError, match="scale rule is 'best'; it must be standard or least_error"):
        Float4Quantization("mxfp4", "best")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("--quantize", "mxfp4", "--block-size", "16"),
            "--block-size and --asymmetric say how to --quantize to int4 or int8",
        ),
        (("--quantize", "nvfp4", "--asymmetric"), "--block-size and --asymmetric"),
        (("--quantize", "int4", "--scale-rule", "standard"), "--scale-rule says how to --quantize to mxfp4 or nvfp4"),
        (("--scale-rule", "least-error"), "--scale-rule says how"),
    ],
)
def test_command_refuses(options, words, tmp_path):
    path = tmp_path / "float.onnx"
    onnx.save(source("MatMul")[0], path)
    result = CliRunner().invoke(app, ["compile", str(path), *options])
    assert isinstance(result.exception, OptionError)
    assert words in str(result.exception)


def test_command(tmp_path):
    path = tmp_path / "float.onnx"
    onnx.save(source("Gemm")[0], path)
    result = CliRunner().invoke(
        app, ["compile", str(path), "--quantize", "mxfp4", "--scale-rule", "least-error", "--json"]
    )
    assert result.exit_code == 0
    (row,) = json.loads(result.stdout)["sites"]
    assert (row["format"], row["reason_code"]) == ("mxfp4 block 32", "weight_rounded")
    assert row["reason"].endswith("by least squared error")
