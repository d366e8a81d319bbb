"""Constants that onnxruntime cannot dequantize become some that it can, and mean the same."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from support import model, needs_opset, run

from msd_compiler.runtime_constants import bytes_with_float_constants, with_float_constants, with_int8_constants
from msd_compiler.source import Source

K, N = 40, 6
RNG = np.random.default_rng(0)
F4 = RNG.integers(0, 16, (K, N)).astype(np.uint8).view(ml_dtypes.float4_e2m1fn)
F8 = RNG.integers(0, 120, (K, N)).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
I4 = RNG.integers(-8, 8, (K, N)).astype(ml_dtypes.int4)
E8 = RNG.integers(118, 126, (2, N)).astype(np.uint8).view(ml_dtypes.float8_e8m0fnu)
S8 = RNG.integers(40, 126, (2, N)).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
F32 = RNG.uniform(0.1, 1, (2, N)).astype(np.float32)
G = np.float32(0.01)


def means(w, s, z=0.0):
    return (w.astype(np.float64) - z) * s.astype(np.float64).repeat(32, 0)[:K]


DQ = "DequantizeLinear<axis=0, block_size=32, output_dtype=1>"
HALF = DQ.replace("dtype=1", "dtype=10")
CASES = {
    # nodes that make d of constants, the constants, d, ops of the int8 form
    "float4, float8e8m0": (f"d = {DQ}(w, s)", {"w": F4, "s": E8}, means(F4, E8), ["DequantizeLinear"]),
    "float4, float32": (f"d = {DQ}(w, s)", {"w": F4, "s": F32}, means(F4, F32), ["DequantizeLinear"]),
    "float4, zero points": (f"d = {DQ}(w, s, z)", {"w": F4, "s": F32, "z": F4[:2]}, means(F4, F32, F4[:2].astype(np.float64).repeat(32, 0)[:K]), ["DequantizeLinear"]),
    "float4, two levels": (f"t = DequantizeLinear(s, g)  d = {DQ}(w, t)", {"w": F4, "s": S8, "g": G}, means(F4, S8.astype(np.float32) * G), ["DequantizeLinear"]),
    "float4 per tensor": ("d = DequantizeLinear(w, g)", {"w": F4, "g": G}, F4.astype(np.float64) * G, ["DequantizeLinear"]),
    "float4 to float16": (f"h = {HALF}(w, s)  d = Cast<to=1>(h)", {"w": F4, "s": E8}, means(F4, E8), ["DequantizeLinear", "Cast", "Cast"]),
    "float8, float8e8m0": (f"d = {DQ}(w, s)", {"w": F8, "s": E8}, means(F8, E8), ["DequantizeLinear"]),
    "int4, float8e8m0": (f"d = {DQ}(w, s)", {"w": I4, "s": E8}, means(I4, E8), ["DequantizeLinear"]),
    "scales cast": (f"c = Cast<to=1>(s)  d = {DQ}(w, c)", {"w": I4, "s": E8}, means(I4, E8), ["DequantizeLinear"]),
    "TensorRT's name": ("d = trt.TRT_INT4DequantizeLinear<axis=0, block_size=32>(w, s)", {"w": I4, "s": F32}, means(I4, F32), ["DequantizeLinear"]),
}  # fmt: skip


def source(nodes, tensors, opset=24, graph="({x}) => (float[40,6] y) {{ {nodes}  y = Add(d, x) }}"):
    proto = model(graph.format(nodes=nodes, x="float[40,6] x"), opset=opset, **tensors)
    proto.opset_import.add(domain="trt", version=1)
    return Source(proto, Path.cwd())


def without_trt(found):
    imports = [o for o in found.proto.opset_import if o.domain != "trt"]
    del found.proto.opset_import[:]
    found.proto.opset_import.extend(imports)
    return found.proto


@pytest.mark.parametrize("change", [with_float_constants, with_int8_constants], ids=["floats", "int8"])
@pytest.mark.parametrize("name", CASES)
def test_means_the_same(name, change):
    needs_opset(24)
    nodes, tensors, expected, int8_ops = CASES[name]
    given = source(nodes, tensors)
    before = given.proto.SerializeToString(deterministic=True)
    changed = without_trt(change(given))
    assert given.proto.SerializeToString(deterministic=True) == before
    x = np.zeros((K, N), np.float32)
    np.testing.assert_allclose(run(changed, {"x": x}, portable=True)["y"], expected, rtol=1e-6)
    made = [n.op_type for n in changed.graph.node if n.op_type != "Add"]
    if change is with_int8_constants:
        assert sorted(made) == sorted(int8_ops)
    elif name != "scales cast":  # what is left of that is int4
        assert set(made) <= {"Cast"}


def test_below_blocks():
    """No DequantizeLinear has blocks at opset 17: floats it is."""
    nodes, tensors, expected, _ = CASES["TensorRT's name"]
    changed = without_trt(with_int8_constants(source(nodes, tensors, opset=17)))
    assert [n.op_type for n in changed.graph.node] == ["Add"]
    np.testing.assert_allclose(
        run(changed, {"x": np.zeros((K, N), np.float32)}, portable=True)["y"], expected, rtol=1e-6
    )


@pytest.mark.parametrize("change", [with_float_constants, with_int8_constants], ids=["floats", "int8"])
def test_within_a_branch(change):
    needs_opset(24)
    body = f"c = Constant<value = bool {{1}}> ()  y = If(c) <then_branch = a () => (float[40,6] p) {{ d = {DQ}(w, s)  p = Add(d, x) }}, else_branch = b () => (float[40,6] q) {{ q = Neg(x) }}>"
    proto = model(f"(float[40,6] x) => (float[40,6] y) {{ {body} }}", opset=24, w=F4, s=E8)
    changed = change(Source(proto, Path.cwd())).proto
    found = run(changed, {"x": np.zeros((K, N), np.float32)}, portable=True)["y"]
    np.testing.assert_allclose(found, means(F4, E8), rtol=1e-6)


def test_what_has_none_stays():
    given = Source(model("(float[2] x) => (float[2] y) { y = Neg(x) }"), Path.cwd())
    assert with_float_constants(given) is given
    assert with_int8_constants(given) is given
    computed = source(f"d = {DQ}(w, x)", {"w": F4}, graph="(float[2,6] x) => (float[40,6] d) {{ {nodes} }}")
    assert with_float_constants(computed).proto.graph.node == computed.proto.graph.node  # its scales are an input


def test_shapes_that_do_not_fit():
    given = source(f"d = {DQ}(w, s)", {"w": F4, "s": E8[:1]})
    for change in (with_float_constants, with_int8_constants):
        assert [n.op_type for n in change(given).proto.graph.node][-1] == "Add"


def test_bytes():
    given = source(f"d = {DQ}(w, s)", {"w": F4, "s": E8})
    assert bytes_with_float_constants(given) == K * N // 2 + 2 * N + 4 * K * N
    assert onnx.TensorProto.FLOAT4E2M1 in {t.data_type for t in given.proto.graph.initializer}
