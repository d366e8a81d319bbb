"""Float layers rounded by onnxruntime's quantizer: the weight is what it made of it, everything else is as it was."""

import importlib
import json
import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from support import (
    HALF_TOLERANCE,
    TOLERANCE,
    activation,
    assert_same_numbers,
    dequantize_nbits,
    meaning,
    model,
    nbits_weight,
    ops,
    rows,
)
from typer.testing import CliRunner

import msd_compiler
from msd_compiler.cli import app
from msd_compiler.compare import relative_l2
from msd_compiler.errors import ModelError, OptionError
from msd_compiler.facts import ReasonCode
from msd_compiler.quantize import Quantization, quantize
from msd_compiler.report import Method, Outcome
from msd_compiler.runtime import open_model, runtime_version
from msd_compiler.source import Source, load

rounding = importlib.import_module("msd_compiler.quantize")
try:
    rounding._imported()
except OptionError as error:  # onnx_ir, which onnxruntime 1.24 and later import and do not require
    pytest.skip(str(error), allow_module_level=True)

DATA = Path(__file__).parents[1] / "data/exported"
SHARED = Path(__file__).parents[3] / "shared/models/exported"

RUNTIME = runtime_version()
ROUNDS_TO_8 = (1, 22)
RUNS_8 = (1, 23)

K, N = 72, 12
B = activation((N,), seed=3)
X = "float[3,72] x"

REPLACED = "{} with a {} weight, rounded by onnxruntime's quantizer"


def linear_rows(report):
    """Rows of linear layers."""
    return [site for site in report.sites if site.kind == "linear"]


def needs(bits, oldest=ROUNDS_TO_8):
    if bits == 8 and oldest > RUNTIME:
        pytest.skip(f"8 bits need onnxruntime {oldest[0]}.{oldest[1]}")


def source(proto):
    return Source(proto, Path.cwd())


def rounded(proto, bits=4, block=32, symmetric=True):
    """The rounded model and what was done; the source stays as it was, and the same comes out twice."""
    before = proto.SerializeToString(deterministic=True)
    result, done = quantize(source(proto), Quantization(bits, block, symmetric))
    assert proto.SerializeToString(deterministic=True) == before
    assert {v.name for v in result.proto.graph.value_info} <= {o for n in result.proto.graph.node for o in n.output}
    again, _ = quantize(source(proto), Quantization(bits, block, symmetric))
    assert again.proto.SerializeToString(deterministic=True) == result.proto.SerializeToString(deterministic=True)
    return result.proto, done


def stored(proto):
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def dequantized(proto):
    """``[K, N]``: the weight of the model's one MatMulNBits."""
    (node,) = (n for n in proto.graph.node if n.op_type == "MatMulNBits")
    values = stored(proto)
    inputs = [values[name] for name in node.input[1:]]
    if len(inputs) == 3:
        inputs[2] = inputs[2].astype(np.int64)  # `meaning` widens integers
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert "accuracy_level" not in attributes
    return dequantize_nbits(*inputs, **attributes)


def with_weight(proto, w):
    """The model with another value of ``w``, as float64."""
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    for tensor in changed.graph.initializer:
        if tensor.name == "w":
            tensor.CopyFrom(numpy_helper.from_array(w, "w"))
    return changed


# fmt: off
FORMS = {
    # graph, further initializers, inputs, whether w is stored as [N, K], ops after compilation
    "MatMul": ("y = MatMul(x, w)", {}, X, False, ["msd.MatMul"]),
    "MatMul of rank 3": ("y = MatMul(x, w)", {}, "float[2,3,72] x", False, ["msd.MatMul"]),
    "MatMul and bias": ("p = MatMul(x, w)  y = Add(p, b)", {"b": B}, X, False, ["msd.MatMul"]),
    "rank of x unknown": ("y = MatMul(x, w)", {}, "float[] x", False, ["msd.MatMul"]),
    "Transpose": ("t = Transpose(w)  y = MatMul(x, t)", {}, X, True, ["msd.MatMul"]),
    "Transpose with perm": ("t = Transpose<perm=[1,0]>(w)  y = MatMul(x, t)", {}, X, True, ["msd.MatMul"]),
    "Transpose that moves nothing": ("t = Transpose<perm=[0,1]>(w)  y = MatMul(x, t)", {}, X, False, ["msd.MatMul"]),
    "Identity": ("t = Identity(w)  y = MatMul(x, t)", {}, X, False, ["msd.MatMul"]),
    "Gemm": ("y = Gemm(x, w)", {}, X, False, ["msd.MatMul"]),
    "Gemm, bias": ("y = Gemm(x, w, b)", {"b": B}, X, False, ["msd.MatMul"]),
    "Gemm, transB": ("y = Gemm<transB=1>(x, w, b)", {"b": B}, X, True, ["msd.MatMul"]),
    "Gemm, transA": ("y = Gemm<transA=1>(x, w, b)", {"b": B}, "float[72,3] x", False, ["Transpose", "msd.MatMul"]),
    "Gemm, Transpose and transB": ("t = Transpose(w)  y = Gemm<transB=1>(x, t)", {}, X, False, ["msd.MatMul"]),
    "Gemm, alpha": ("y = Gemm<alpha=0.7>(x, w)", {}, X, False, ["msd.MatMul", "Mul"]),
    "Gemm, beta": ("y = Gemm<beta=0.3>(x, w, b)", {"b": B}, X, False, ["msd.MatMul"]),
    "Gemm, beta 0": ("y = Gemm<beta=0.0>(x, w, b)", {"b": B}, X, False, ["msd.MatMul"]),
    "Gemm, all": ("y = Gemm<alpha=-1.7, beta=0.3, transB=1>(x, w, b)", {"b": B}, X, True, ["msd.MatMul", "Mul", "Add"]),
    "Gemm, scalar": ("y = Gemm(x, w, b)", {"b": B[0]}, X, False, ["msd.MatMul"]),
    "Gemm, [1]": ("y = Gemm(x, w, b)", {"b": B[:1]}, X, False, ["msd.MatMul"]),
    "Gemm, [1,N]": ("y = Gemm(x, w, b)", {"b": B[None]}, X, False, ["msd.MatMul"]),
    "Gemm, [M,1]": ("y = Gemm<beta=2.0>(x, w, b)", {"b": activation((3, 1))}, X, False, ["msd.MatMul", "Add"]),
    "Gemm, [M,N]": ("y = Gemm<beta=2.0>(x, w, b)", {"b": activation((3, N))}, X, False, ["msd.MatMul", "Add"]),
    "Gemm, an input": ("y = Gemm<beta=0.3>(x, w, b)", {}, f"{X}, float[12] b", False, ["msd.MatMul", "Mul", "Add"]),
}
# fmt: on


def form(name, floats="float32"):
    """The model, a feed, and whether its weight is stored transposed."""
    graph, tensors, inputs, transposed, _ = FORMS[name]
    w = activation((N, K) if transposed else (K, N), floats, seed=2)
    rank3 = "2,3,72" in inputs
    y = "float[] y" if "float[]" in inputs else "float[2,3,12] y" if rank3 else "float[3,12] y"
    text = f"({inputs}) => ({y}) {{ {graph} }}"
    if floats != "float32":
        text, tensors = text.replace("float[", f"{floats}["), {k: v.astype(floats) for k, v in tensors.items()}
    shape = (2, 3, K) if rank3 else (K, 3) if "72,3" in inputs else (3, K)
    feed = {"x": activation(shape, floats)} | ({"b": B.astype(floats)} if " b" in inputs else {})
    return model(text, w=w, **tensors), feed, transposed


@pytest.mark.parametrize("name", FORMS)
def test_forms(name):
    proto, feed, transposed = form(name)
    result, done = rounded(proto)
    assert list(done.values()) == [REPLACED.format("Gemm" if "Gemm" in name else "MatMul", "float32")]
    assert relative_l2(meaning(result, feed)["y"], rounded_in_place(proto, result, feed, transposed)) <= 1e-7
    compiled = assert_same_numbers(result, feed)
    assert ops(compiled.model) == FORMS[name][-1]
    assert [s.node for s in linear_rows(compiled.report)] == list(done)


def rounded_in_place(proto, result, feed, transposed):
    """What the float model means with the result's dequantized weight in it."""
    w = dequantized(result)
    return meaning(with_weight(proto, np.ascontiguousarray(w.T if transposed else w)), feed)["y"]


def test_gemm_in_float16():
    proto, feed, transposed = form("Gemm, all", "float16")
    result, _ = rounded(proto, symmetric=False)
    assert relative_l2(meaning(result, feed)["y"], rounded_in_place(proto, result, feed, transposed)) <= 2**-11
    assert_same_numbers(result, feed, tolerance=1e-3)  # three steps, each rounded


@pytest.mark.parametrize("floats", ["float32", "float16"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_near(bits, block, symmetric, floats):
    """No element is further from its weight than a step: the largest of a symmetric block has no code of its own."""
    needs(bits)
    proto, feed, _ = form("MatMul", floats)
    result, done = rounded(proto, bits, block, symmetric)
    assert list(done.values()) == [REPLACED.format("MatMul", floats)]
    w, found = stored(proto)["w"].astype(np.float64), dequantized(result)
    for start in range(0, K, block):
        part = w[start : start + block]
        low, high = np.minimum(part.min(0), 0), np.maximum(part.max(0), 0)
        step = (2 * np.maximum(-low, high) if symmetric else high - low) / (2**bits - 1)
        steps = np.abs(found[start : start + block] - part) / step
        assert steps.max() <= 1.01
        assert np.median(steps) < 0.4
    assert_same_numbers(result, feed, tolerance=HALF_TOLERANCE[floats])


@pytest.mark.parametrize(
    ("graph", "w"),
    [
        ("(float[3,16] x) => (float[3,20] y) { y = MatMul(x, w) }", activation((16, 20))),  # shorter than a block
        ("(float[3,72] x) => (float[3,1] y) { y = MatMul(x, w) }", activation((72, 1))),
        ("(float[72,3] x) => (float[20,3] y) { y = MatMul(w, x) }", activation((20, 72))),
        ("(float[2,3,72] x) => (float[2,3,12] y) { y = MatMul(x, w) }", activation((2, 72, 20))),
        ("(float[72] x) => (float[20] y) { y = MatMul(x, w) }", activation((72, 20))),
        ("(double[3,72] x) => (double[3,20] y) { y = MatMul(x, w) }", activation((72, 20)).astype(np.float64)),
        ("(float[3,72] x, float[72,20] v) => (float[3,20] y) { z = Neg(w) y = MatMul(x, v) }", activation((72, 20))),
        ("(float[3,72] x) => (float[3,20] y) { z = MatMul(v, w) y = MatMul(x, z) }", activation((72, 20))),
    ],
    ids=["short", "one column", "on the left", "experts", "vector", "float64", "an input", "both constant"],
)
def test_left_float(graph, w):
    tensors = {"v": activation((72, 72))} if "(v," in graph else {}
    given = source(model(graph, w=w, **tensors))
    result, done = quantize(given, Quantization(4))
    assert (result is given, done) == (True, {})


def test_what_is_left_float_has_its_row():
    graph = "(float[3,72] x) => (float[3,8] y) { h = MatMul(x, w) y = MatMul(h, v) }"
    result, _ = rounded(model(graph, w=activation((72, 20)), v=activation((20, 8))))
    first, second = rows(result)
    assert (first.outcome, first.format) == (Outcome.REWRITTEN, "int4 block 32")
    assert (second.outcome, second.reason_code) == (Outcome.KEPT, ReasonCode.FLOAT_WEIGHT)


def test_quantized_layers_stay():
    graph = (
        "(float[3,64] x) => (float[3,20] y) { h = com.microsoft.MatMulNBits<K=64, N=40, bits=4, block_size=16>(x, b, s)"
        " y = MatMul(h, w) }"
    )
    proto = model(graph, w=activation((40, 20)), **nbits_weight(64, 40, 16))
    result, done = rounded(proto)
    assert len(done) == 1
    assert result.graph.node[0] == proto.graph.node[0]
    assert ops(result) == ["MatMulNBits", "MatMulNBits"]
    assert_same_numbers(result, {"x": activation((3, 64))}, rewritten=2)


def test_a_tied_head_is_rounded_and_the_table_stays():
    graph = (
        "(int64[3] ids) => (float[3,50] logits) { h = Gather(table, ids) t = Transpose(table) logits = MatMul(h, t) }"
    )
    proto = model(graph, table=activation((50, 64)))
    result, done = rounded(proto)
    assert list(done) == ["logits"]
    assert ops(result) == ["Gather", "MatMulNBits"]
    assert stored(result)["table"].tobytes() == stored(proto)["table"].tobytes()


def test_converted_weight():
    graph = "(float[3,72] x) => (float[3,20] y) { t = Cast<to=1>(w) y = MatMul(x, t) }"
    w = activation((72, 20), "float16")
    result, done = rounded(model(graph, w=w))
    direct, _ = rounded(model("(float[3,72] x) => (float[3,20] y) { y = MatMul(x, w) }", w=w.astype(np.float32)))
    assert list(done.values()) == [REPLACED.format("MatMul", "float32")]
    assert dequantized(result).tobytes() == dequantized(direct).tobytes()


def test_nested_graph():
    graph = """(bool c, float[3,72] x) => (float[3,20] y) {
        y = If (c) <then_branch = a () => (float[3,20] t) { t = MatMul(x, w) },
                    else_branch = b () => (float[3,20] e) { e = Gemm(x, w, bias) }> }"""
    proto = model(graph, w=activation((72, 20)), bias=activation((20,)))
    result, done = rounded(proto)
    assert set(done) == {"t", "e"}
    assert set(stored(result)) == {"w_Q4", "w_scales", "bias"}  # one weight for both
    assert_same_numbers(result, {"c": np.array(True), "x": activation((3, 72))}, rewritten=2)


def test_wide_weights_are_handed_over_in_parts(monkeypatch):
    proto, _, _ = form("MatMul")
    whole, _ = rounded(proto, symmetric=False)
    monkeypatch.setattr(rounding, "_PART", 4 * K * 7)
    parts, _ = rounded(proto, symmetric=False)
    assert parts.SerializeToString(deterministic=True) == whole.SerializeToString(deterministic=True)


# --- exported models -----------------------------------------------------------------------------------------------


def model_tolerance():
    return 5e-4  # as in test_exported_models: 16 bits of every activation through two to six random layers


@pytest.mark.parametrize("bits", [4, 8])
def test_bert_with_external_data(bits, monkeypatch):
    needs(bits, RUNS_8)
    given = load(DATA / "bert_fp32_ts14.onnx")
    result, done = quantize(given, Quantization(bits))
    assert len(done) == len(linear_rows(msd_compiler.inspect(DATA / "bert_fp32_ts14.onnx")))
    assert result.folder == given.folder
    open_model(result.proto, result.folder, log_severity_level=4)
    monkeypatch.chdir(given.folder)
    assert_compiles(result, done)


@pytest.mark.parametrize(
    ("name", "layers"),
    [("gpt2_fp32_dynamo18", 9), ("llama_gqa_fp32_ts17", 15), ("llama_gqa_fp32_dynamo18", 15)],
)
def test_exported(name, layers):
    path = SHARED / f"{name}.onnx"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    result, done = quantize(load(path), Quantization(4, symmetric=False))
    assert len(done) == layers
    assert_compiles(result, done)


def assert_compiles(result, done):
    compiled = msd_compiler.compile(result.proto, tolerance=model_tolerance())
    assert [s.node for s in linear_rows(compiled.report)] == list(done)
    assert {s.outcome for s in linear_rows(compiled.report)} == {Outcome.REWRITTEN}
    assert compiled.report.verification.method == Method.WHOLE
    layers = msd_compiler.compile(result.proto, verify_seconds=1e-6, tolerance=TOLERANCE).report.verification
    assert layers.method == Method.SITES
    assert layers.passed


# --- what can go wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((3,), "weights cannot be rounded to 3 bits; it must be 4 or 8"),
        ((4, 48), "block size is 48; it must be 16, 32, 64, 128 or 256"),
        ((4, 512), "block size is 512; it must be 16, 32, 64, 128 or 256"),
    ],
)
def test_options(options, message):
    with pytest.raises(OptionError) as raised:
        Quantization(*options)
    assert str(raised.value) == message


def test_quantizer_too_old(monkeypatch):
    if RUNTIME >= ROUNDS_TO_8:
        monkeypatch.setattr(rounding, "_MODULES", [(module, name, (4,)) for module, name, _ in rounding._MODULES])
    with pytest.raises(OptionError, match=r"rounds to 4 bits; 8 bits need onnxruntime 1\.22 or later"):
        rounded(form("MatMul")[0], bits=8)


def test_quantizer_lacks_a_package(monkeypatch):
    def missing(path):
        raise ModuleNotFoundError("No module named 'onnx_ir'", name="onnx_ir")

    monkeypatch.setattr(rounding.importlib, "import_module", missing)
    with pytest.raises(OptionError, match="needs the package 'onnx_ir': pip install onnx-ir"):
        rounded(form("MatMul")[0])


def test_weight_is_not_finite():
    proto, _, _ = form("MatMul")
    w = activation((K, N))
    w[1, 2] = np.inf
    with pytest.raises(ModelError, match="weight 'w' holds NaN or Inf"):
        quantize(source(with_weight(proto, w)), Quantization(4))


def test_malformed():
    graph = "(float[3,72] x) => (float[3,20] y) { t = Transpose<perm=[0,2]>(w) y = MatMul(x, t) }"
    with pytest.raises(ModelError, match="MatMul 'y' cannot be read: list index out of range"):
        quantize(source(model(graph, w=activation((72, 20)))), Quantization(4))


def test_silence(capfd, caplog):
    caplog.set_level(logging.DEBUG)
    handlers = list(logging.getLogger().handlers)
    rounded(form("Gemm, all")[0])
    assert logging.getLogger().handlers == handlers
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


# --- through the commands ------------------------------------------------------------------------------------------


def float_model(**options):
    graph = "(float[3,72] x) => (float[3,8] y) { h = MatMul(x, w) y = Gemm(h, v) }"
    return model(graph, w=activation((72, 48)), v=activation((48, 8)), **options)


def test_compile_says_what_was_rounded_and_how_far_that_is():
    report = msd_compiler.compile(float_model(), quantization=Quantization(4)).report
    assert [s.reason for s in report.sites] == [
        REPLACED.format("MatMul", "float32"),
        REPLACED.format("Gemm", "float32"),
    ]
    (row,) = report.verification.outputs
    assert row.relative_l2 <= TOLERANCE
    assert 0.01 < row.rounding_relative_l2 < 0.3  # two layers of 4 bits
    sites = msd_compiler.inspect(float_model(), quantization=Quantization(4)).sites
    assert sites == report.sites


def test_without_quantization_nothing_changes():
    report = msd_compiler.compile(float_model()).report
    assert {s.reason_code for s in linear_rows(report)} == {ReasonCode.FLOAT_WEIGHT}


def test_below_the_oldest_opset_nothing_is_rounded():
    compiled = msd_compiler.compile(float_model(opset=10, ir=5), quantization=Quantization(4))
    assert not compiled.changed
    assert {s.reason_code for s in linear_rows(compiled.report)} == {ReasonCode.FLOAT_WEIGHT}


def test_command_line(tmp_path):
    onnx.save(float_model(), tmp_path / "m.onnx")
    run = CliRunner().invoke(app, ["compile", str(tmp_path / "m.onnx"), "--quantize", "int4", "--asymmetric", "--json"])
    assert run.exit_code == 0
    assert {s["format"] for s in json.loads(run.stdout)["sites"]} == {"uint4 block 32, zero points"}
    refused = CliRunner().invoke(app, ["inspect", str(tmp_path / "m.onnx"), "--block-size", "32"])
    assert refused.exit_code != 0
