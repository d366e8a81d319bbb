import contextlib
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.parser import parse_model

from msd_compiler.oracle import half_precision, is_widened, oracle_model, widen_inputs
from msd_compiler.runtime import RuntimeRefused, open_model
from msd_compiler.source import stored_tensors

OFF = {"graph_optimization_level": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL}
SHARED = Path(__file__).parents[2] / "../shared/models"

# the parser takes float16 and bfloat16 constants as bits
HEAD = '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1, "f": 1]>\n'


def run(model, folder=Path(), /, **feed):
    opened = open_model(model, folder, portable=True, log_severity_level=4, **OFF)
    return opened.run(None, widen_inputs(feed))


def assert_oracle(before, after):
    oracle = oracle_model(parse_model(HEAD + before))
    assert numbers(oracle) == numbers(parse_model(HEAD + after))
    assert oracle_model(oracle) == oracle


def numbers(model):
    """The model as text, in which it does not show how a constant's data is stored."""
    for tensor in stored_tensors(model):
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    return str(model)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("g (float16[2] x) => (float16[2] y) { y = Relu(x) }", "g (float[2] x) => (float[2] y) { y = Relu(x) }"),
        (
            "g (float16[2] x) => (bfloat16 y) <float16[2] w = {15360, 16384}, bfloat16 v> { t = Add(x, w)  y = Neg(v) }",
            "g (float[2] x) => (float y) <float[2] w = {1, 2}, float v> { t = Add(x, w)  y = Neg(v) }",
        ),
        (
            "g (seq(float16[2]) x) => (optional(float16[N]) y) { y = SequenceAt(x, i) }",
            "g (seq(float[2]) x) => (optional(float[N]) y) { y = SequenceAt(x, i) }",
        ),
        (
            "g (float[2] x) => (float[2] y) { t = Cast<to = 10>(x)  y = Cast<to = 1>(t) }",
            "g (float[2] x) => (float[2] y) { t = Cast<to = 1>(x)  y = Cast<to = 1>(t) }",
        ),
        (
            "g (int64[1] n) => (float16[N] y) { y = ConstantOfShape<value = float16[1] {64511}>(n) }",
            "g (int64[1] n) => (float[N] y) { y = ConstantOfShape<value = float[1] {-65504}>(n) }",
        ),
        (
            "g () => (float16[N] y) { t = RandomNormal<dtype = 16, shape = [10, 16]>()  y = EyeLike<dtype = 10, k = 10>(t) }",
            "g () => (float[N] y) { t = RandomNormal<dtype = 1, shape = [10, 16]>()  y = EyeLike<dtype = 1, k = 10>(t) }",
        ),
        (
            "g (int8[2] x) => (double[2] y) <float16 s = {14336}> {"
            " t = DequantizeLinear<output_dtype = 10>(x, s)  u = QuantizeLinear<output_dtype = 3, precision = 10>(t, s)"
            " y = Cast<to = 11>(u) }",
            "g (int8[2] x) => (double[2] y) <float s = {0.5}> {"
            " t = DequantizeLinear<output_dtype = 1>(x, s)  u = QuantizeLinear<output_dtype = 3, precision = 1>(t, s)"
            " y = Cast<to = 11>(u) }",
        ),
        (
            "g (float16[2] x, bool c) => (float16[2] y) { y = If<"
            " then_branch: graph = t () => (float16[2] a) { k = Constant<value = float16[2] {15360, 16384}>()  a = Add(x, k) },"
            " else_branch: graph = e () => (float16[2] b) { u = Cast<to = 10>(x)  b = Identity(u) }>(c) }",
            "g (float[2] x, bool c) => (float[2] y) { y = If<"
            " then_branch: graph = t () => (float[2] a) { k = Constant<value = float[2] {1, 2}>()  a = Add(x, k) },"
            " else_branch: graph = e () => (float[2] b) { u = Cast<to = 1>(x)  b = Identity(u) }>(c) }",
        ),
        (  # a type that reaches Cast through two functions, under other names, and one that is a plain number
            "g (float[2] x) => (float16[2] y) { y = f.outer<kind = 10, steps = 10>(x) }\n"
            '<domain: "f", opset_import: ["": 17, "f": 1]> outer <kind, steps> (x) => (y) { y = f.inner<as: int = @kind, n: int = @steps>(x) }\n'
            '<domain: "f", opset_import: ["": 17]> inner <as, n> (x) => (y) { t = Cast<to: int = @as>(x)  y = Foo<n: int = @n>(t) }',
            "g (float[2] x) => (float[2] y) { y = f.outer<kind = 1, steps = 10>(x) }\n"
            '<domain: "f", opset_import: ["": 17, "f": 1]> outer <kind, steps> (x) => (y) { y = f.inner<as: int = @kind, n: int = @steps>(x) }\n'
            '<domain: "f", opset_import: ["": 17]> inner <as, n> (x) => (y) { t = Cast<to: int = @as>(x)  y = Foo<n: int = @n>(t) }',
        ),
        (
            "g (float[2] x) => (float[2] y) { y = f.F(x) }\n"
            '<domain: "f", opset_import: ["": 17]> F <kind: int = 16> (x) => (y) { t = Cast<to: int = @kind>(x)  y = CastLike(t, x) }',
            "g (float[2] x) => (float[2] y) { y = f.F(x) }\n"
            '<domain: "f", opset_import: ["": 17]> F <kind: int = 1> (x) => (y) { t = Cast<to: int = @kind>(x)  y = CastLike(t, x) }',
        ),
    ],
)
def test_widens(before, after):
    assert_oracle(before, after)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "g (float[2,32] x) => (float[2,4] y) { y = com.microsoft.MatMulNBits<K = 32, accuracy_level = 4>(x, b, s) }",
            "g (float[2,32] x) => (float[2,4] y) { y = com.microsoft.MatMulNBits<K = 32, accuracy_level = 0>(x, b, s) }",
        ),
        (
            "g (float[2] x, bool c) => (float[2] y) { y = If<"
            " then_branch: graph = t () => (float[2] a) { a = com.microsoft.MatMulNBits<accuracy_level = 4>(x, b, s) },"
            " else_branch: graph = e () => (float[2] b) { b = Identity(x) }>(c) }",
            "g (float[2] x, bool c) => (float[2] y) { y = If<"
            " then_branch: graph = t () => (float[2] a) { a = com.microsoft.MatMulNBits<accuracy_level = 0>(x, b, s) },"
            " else_branch: graph = e () => (float[2] b) { b = Identity(x) }>(c) }",
        ),
        (
            "g (float[2] x) => (float[2] y) { y = f.F<level = 4>(x) }\n"
            '<domain: "f", opset_import: ["com.microsoft": 1]> F <level> (x) => (y)'
            " { y = com.microsoft.MatMulNBits<accuracy_level: int = @level>(x, x, x) }",
            "g (float[2] x) => (float[2] y) { y = f.F<level = 4>(x) }\n"
            '<domain: "f", opset_import: ["com.microsoft": 1]> F <level> (x) => (y)'
            " { y = com.microsoft.MatMulNBits<accuracy_level = 0>(x, x, x) }",
        ),
    ],
)
def test_accuracy_levels(before, after):
    assert_oracle(before, after)


def test_leaves_the_rest_alone():
    model = parse_model(
        HEAD + "g (float[] x, double[2] d, float8e4m3fn[2] e) => (float y, int64[2] n) <float[3] w = {1, 2, 3}>"
        " { y = ReduceSum(x)  m = Cast<to = 11>(x)  n = f.Foo<dtype = 7, k = 10>(d) }"
    )
    model.graph.value_info.add(name="of any shape").type.tensor_type.elem_type = TensorProto.FLOAT
    model.graph.value_info.add(name="without type")
    model.metadata_props.add(key="k", value="")
    assert oracle_model(model) == model
    assert half_precision(model) is None


def test_source_is_not_edited():
    model = parse_model(HEAD + "g (float16[2] x) => (float16[2] y) <float16[2] w = {15360, 16384}> { y = Add(x, w) }")
    before = model.SerializeToString(deterministic=True)
    oracle_model(model)
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("text", "half"),
    [
        ("g (float16[2] x) => (float[2] y) { y = Foo(x) }", TensorProto.FLOAT16),
        ("g (float[2] x) => (float[2] y) { t = Cast<to = 16>(x)  y = Cast<to = 1>(t) }", TensorProto.BFLOAT16),
        ("g (float16[2] x) => (float[2] y) <bfloat16[1] w = {1}> { y = Foo(x, w) }", TensorProto.BFLOAT16),
        (
            "g (float[2] x) => (float[2] y) { w = Constant<value = float16 {1}>()  y = CastLike(x, w) }",
            TensorProto.FLOAT16,
        ),
        ("g (float[2] x) => (float[2] y) { y = Foo<n = 10>(x) }", None),
    ],
)
def test_half_precision(text, half):
    assert half_precision(parse_model(HEAD + text)) == half
    assert is_widened(parse_model(HEAD + text)) == (half is not None)


def test_sparse_initializer():
    model = parse_model(HEAD + "g (float16[4] x) => (float16[4] y) { y = Add(x, w) }")
    values = numpy_helper.from_array(np.array([1.5, -2], np.float16), "w")
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([0, 2])), [4])
    )
    (y,) = run(oracle_model(model), x=np.zeros(4, np.float16))
    assert y.tolist() == [1.5, 0, -2, 0]


def test_constants_are_exact():
    values = np.array([-65504, np.inf, -np.inf, 2**-24, 1 / 3], np.float16)
    model = parse_model(HEAD + "g (float16[5] x) => (float16[5] y) { y = Identity(w) }")
    for stored in (numpy_helper.from_array(values, "w"), helper.make_tensor("w", TensorProto.FLOAT16, [5], values)):
        model.graph.ClearField("initializer")
        model.graph.initializer.append(stored)
        widened = oracle_model(model).graph.initializer[0]
        assert widened.data_type == TensorProto.FLOAT
        assert numpy_helper.to_array(widened).tolist() == values.astype(np.float32).tolist()


def test_float16_model_is_its_float32_twin():
    text = 'g ({0}[2,3] x, bool c) => ({0}[2,3] y) <{0} eps = {{{2}}}> {{ t = f.Norm(x, eps)  y = If<\
 then_branch: graph = t () => ({0}[2,3] a) {{ a = MatMul(t, w) }},\
 else_branch: graph = e () => ({0}[2,3] b) {{ u = Cast<to = {1}>(t)  b = Add(u, u) }}>(c) }}\n\
<domain: "f", opset_import: ["": 17]> Norm (x, eps) => (y) {{ k = Constant<value = {0} {{{3}}}>()  s = Mul(x, k)\
 a = Add(s, eps)  y = Tanh(a) }}'
    w = np.random.default_rng(0).standard_normal((3, 3)).astype(np.float16)
    half, full = (
        parse_model(HEAD + text.format(*kind)) for kind in (("float16", 10, 12288, 16896), ("float", 1, 0.125, 3))
    )
    half.graph.initializer.append(numpy_helper.from_array(w, "w"))
    full.graph.initializer.append(numpy_helper.from_array(w.astype(np.float32), "w"))
    x = np.random.default_rng(1).standard_normal((2, 3)).astype(np.float16)
    for c in (np.array(True), np.array(False)):
        assert np.array_equal(run(oracle_model(half), x=x, c=c), run(full, x=x.astype(np.float32), c=c))


def test_bfloat16_does_not_load_and_its_oracle_does():
    w = np.random.default_rng(0).standard_normal((8, 4)).astype(ml_dtypes.bfloat16)
    x = np.random.default_rng(1).standard_normal((2, 8)).astype(ml_dtypes.bfloat16)
    model = parse_model(HEAD + "g (bfloat16[2,8] x) => (bfloat16[2,4] y) { y = MatMul(x, w) }")
    model.graph.initializer.append(numpy_helper.from_array(w, "w"))
    with pytest.raises(RuntimeRefused, match="Could not find an implementation for MatMul"):
        run(model, x=x)
    (y,) = run(oracle_model(model), x=x)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, x.astype(np.float64) @ w.astype(np.float64), rtol=1e-6, atol=1e-6)  # float32 sums


def test_external_data(tmp_path):
    w = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float16)
    v = np.random.default_rng(1).standard_normal((4, 4)).astype(np.float32)
    model = parse_model(
        HEAD + "g (float16[2,64] x) => (float[2,4] y) { t = MatMul(x, w)  u = Cast<to = 1>(t)  y = MatMul(u, v) }"
    )
    model.graph.initializer.extend([numpy_helper.from_array(w, "w"), numpy_helper.from_array(v, "v")])
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    lazy = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    read = []

    def reader(tensor):
        read.append(tensor.name)
        return numpy_helper.to_array(tensor, str(tmp_path))

    oracle = oracle_model(lazy, reader)
    assert read == ["w"]
    assert [tensor.data_location for tensor in oracle.graph.initializer] == [TensorProto.DEFAULT, TensorProto.EXTERNAL]
    x = np.ones((2, 64), np.float16)
    (y,) = run(oracle, tmp_path, x=x)
    np.testing.assert_allclose(y, x.astype(np.float64) @ w.astype(np.float64) @ v, rtol=1e-5, atol=1e-5)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.data", "m.onnx"]


def test_level_4_rounds_and_the_oracle_does_not():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (32, 2, 16), dtype=np.uint8)
    scales = rng.random(64, dtype=np.float32)
    x = rng.standard_normal((4, 64)).astype(np.float32)
    model = parse_model(
        HEAD + "g (float[4,64] x) => (float[4,32] y)"
        " { y = com.microsoft.MatMulNBits<accuracy_level = 4, K = 64, N = 32, bits = 4, block_size = 32>(x, b, s) }"
    )
    model.graph.initializer.extend([numpy_helper.from_array(codes, "b"), numpy_helper.from_array(scales, "s")])
    weights = np.stack([codes & 15, codes >> 4], -1).reshape(32, 2, 32) - 8.0
    exact = x @ (weights * scales.reshape(32, 2, 1)).reshape(32, 64).T

    def error(model):
        return np.linalg.norm(run(model, x=x)[0] - exact) / np.linalg.norm(exact)

    assert error(model) > 1e-3
    assert error(oracle_model(model)) < 1e-6  # float32 sums of 64 terms


def test_stash_type_follows():
    model = parse_model(
        HEAD
        + "g (bfloat16[2,4] x) => (bfloat16[2,4] y, bfloat16[2,1] mean) <bfloat16[4] s = {16256, 16256, 16256, 16256}>"
        " { y, mean = LayerNormalization<axis = -1, stash_type = 16>(x, s) }"
    )
    _, mean = run(oracle_model(model), x=np.ones((2, 4), ml_dtypes.bfloat16))
    assert mean.tolist() == [[1], [1]]


def test_widen_inputs():
    ids = np.arange(3)
    feed = {
        "x": np.array([1, 2], np.float16),
        "b": np.array([1, 2], ml_dtypes.bfloat16),
        "s": [np.float16(3), ids],
        "ids": ids,
        "d": np.zeros(1),
    }
    widened = widen_inputs(feed)
    assert [widened[name].dtype for name in ("x", "b", "d")] == [np.float32, np.float32, np.float64]
    assert widened["s"][0].dtype == np.float32
    assert widened["s"][1] is ids
    assert widened["ids"] is ids
    assert feed["x"].dtype == np.float16


def shared_models():
    """Files of ../shared/models whose names say MatMulNBits or half precision."""
    words = re.compile(r"nbits|_q[48]_|16|precision")
    files = [*SHARED.glob("*/*.onnx"), *SHARED.glob("nodes/*/model.onnx")]
    return sorted(file for file in files if words.search(str(file.relative_to(SHARED))))


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/models is not here")
@pytest.mark.parametrize("file", shared_models(), ids=lambda file: str(file.relative_to(SHARED)))
def test_shared_models_load(file):
    model = onnx.load(file, load_external_data=False)
    oracle = oracle_model(model)
    assert half_precision(oracle) is None
    try:
        open_model(oracle, file.parent, portable=True, log_severity_level=4, **OFF)
    except RuntimeRefused as error:
        with contextlib.suppress(RuntimeRefused):
            open_model(model, file.parent, portable=True, log_severity_level=4, **OFF)
            pytest.fail(f"the oracle does not load, its source does: {error}")
        pytest.skip(f"too new for this runtime: {error}")
