"""An Add of a constant row becomes the product's bias, and nothing else does."""

import numpy as np
import pytest
from support import activation, assert_same_numbers, model, ops, weight

K, N = 40, 20
INT8 = weight("int8", (K, N), (N,))
B = activation((N,), seed=3)
FOLDED = ["msd.MatMul"]
LEFT_ALONE = ["msd.MatMul", "Add"]
X2, X3, ANY_RANK = "float[3,40] x", "float[2,3,40] x", "float[] x"


def constant(*values):
    return f"Constant <value_floats = [{', '.join(str(v) for v in values)}]> ()"


# fmt: off
TABLE = {
    "second": ("y = Add(p, b)", {"b": B}, X2, FOLDED),
    "first": ("y = Add(b, p)", {"b": B}, X2, FOLDED),
    "[1,N]": ("y = Add(p, b)", {"b": B[None]}, X2, FOLDED),
    "[1,1,N]": ("y = Add(p, b)", {"b": B[None, None]}, X3, FOLDED),
    "[1,N] to rank 3": ("y = Add(p, b)", {"b": B[None]}, X3, FOLDED),
    "scalar": ("y = Add(p, b)", {"b": B[0]}, X2, FOLDED),
    "[1]": ("y = Add(p, b)", {"b": B[:1]}, X2, FOLDED),
    "rank of x unknown": ("y = Add(p, b)", {"b": B}, ANY_RANK, FOLDED),
    "vector": ("y = Add(p, b)", {"b": B}, "float[40] x", FOLDED),
    "Constant node": (f"b = {constant(*range(20))}  y = Add(p, b)", {}, X2, FOLDED),
    "Constant scalar": ("b = Constant <value_float = 1.5> ()  y = Add(p, b)", {}, X2, FOLDED),
    "Cast": ("c = Cast<to=1>(b)  y = Add(p, c)", {"b": B.astype(np.float16)}, X2, FOLDED),
    "Identity": ("c = Identity(b)  y = Add(p, c)", {"b": B}, X2, FOLDED),
    "Reshape": ("c = Reshape(b, shape)  y = Add(p, c)", {"b": B[:, None], "shape": np.array([N])}, X2, FOLDED),
    "Reshape to [1,N]": ("c = Reshape(b, shape)  y = Add(p, c)", {"b": B, "shape": np.array([1, -1])}, X2, FOLDED),
    "dequantized": ("c = DequantizeLinear(b, bs)  y = Add(p, c)", {"b": np.arange(N, dtype=np.int32) * 1000, "bs": np.float32(1e-3)}, X2, FOLDED),
    "dequantized, [1]": ("c = DequantizeLinear<axis=0>(b, bs, bz)  y = Add(c, p)", {"b": np.arange(N, dtype=np.int8), "bs": np.ones(1, np.float32), "bz": np.ones(1, np.int8)}, X2, FOLDED),
    "dequantized per channel": ("c = DequantizeLinear<axis=0>(b, bs, bz)  y = Add(c, p)", {"b": np.arange(N, dtype=np.int8), "bs": np.abs(B), "bz": np.arange(N, dtype=np.int8)[::-1].copy()}, X2, FOLDED),
    "two Adds": ("q = Add(p, b)  y = Add(q, c)", {"b": B, "c": -B}, X2, LEFT_ALONE),

    "rank grows": ("y = Add(p, b)", {"b": B[None, None]}, X2, LEFT_ALONE),
    "rank grows, unknown": ("y = Add(p, b)", {"b": B[None]}, ANY_RANK, LEFT_ALONE),
    "rank grows, vector": ("y = Add(p, b)", {"b": B[None]}, "float[40] x", LEFT_ALONE),
    "rank grows, computed": ("c = Reshape(b, shape)  y = Add(p, c)", {"b": B, "shape": np.array([1, 1, N])}, X2, ["Reshape", *LEFT_ALONE]),
    "rank grows, [1,1]": ("y = Add(p, b)", {"b": B[:1, None]}, "float[40] x", LEFT_ALONE),
    "a row each": ("y = Add(p, b)", {"b": activation((3, N))}, X2, LEFT_ALONE),
    "a number per row": ("y = Add(p, b)", {"b": activation((3, 1))}, X2, LEFT_ALONE),
    "rows grow": ("y = Add(p, b)", {"b": activation((3, N))}, "float[1,40] x", LEFT_ALONE),
    "an input": ("y = Add(p, b)", {}, X2 + ", float[20] b", LEFT_ALONE),
    "computed": ("c = Neg(b)  y = Add(p, c)", {"b": B}, X2, ["Neg", *LEFT_ALONE]),
    "itself": ("y = Add(p, p)", {}, X2, LEFT_ALONE),
    "used twice": ("q = Add(p, b)  y = Add(p, q)", {"b": B}, X2, ["msd.MatMul", "Add", "Add"]),
    "not an Add": ("y = Mul(p, b)", {"b": B}, X2, ["msd.MatMul", "Mul"]),
}
# fmt: on


def feed(inputs):
    shapes = {X3: (2, 3, K), "float[40] x": (K,), "float[1,40] x": (1, K)}
    return {"x": activation(shapes.get(inputs, (3, K)))} | ({"b": B} if " b" in inputs else {})


@pytest.mark.parametrize(("nodes", "tensors", "inputs", "result"), TABLE.values(), ids=TABLE)
def test_after_matmul(nodes, tensors, inputs, result):
    text = f"({inputs}) => (float[] y) {{ d = DequantizeLinear(w, s)  p = MatMul(x, d)  {nodes} }}"
    done = assert_same_numbers(model(text, **INT8 | tensors), feed(inputs))
    assert sorted(ops(done.model)) == sorted(result)


def test_output_of_the_model():
    text = f"({X2}) => (float[3,20] y, float[3,20] p) {{ d = DequantizeLinear(w, s)  p = MatMul(x, d)  y = Add(p, b) }}"
    done = assert_same_numbers(model(text, **INT8, b=B), feed(X2))
    assert ops(done.model) == LEFT_ALONE


def test_gemm_with_bias():
    text = f"({X2}) => (float[3,20] y) {{ d = DequantizeLinear(w, s)  p = Gemm<beta=0.5>(x, d, b)  y = Add(c, p) }}"
    done = assert_same_numbers(model(text, **INT8, b=B, c=2 * B), feed(X2))
    assert ops(done.model) == FOLDED


def test_gemm_with_addend():
    text = f"({X2}) => (float[3,20] y) {{ d = DequantizeLinear(w, s)  p = Gemm(x, d, c)  y = Add(b, p) }}"
    done = assert_same_numbers(model(text, **INT8, b=B, c=activation((3, N))), feed(X2))
    assert ops(done.model) == ["msd.MatMul", "Add", "Add"]


@pytest.mark.parametrize("b", [B[:5], B[0], activation((N, 1))])
def test_weight_on_the_left(b):
    text = "(float[40,5] x) => (float[20,5] y) { d = DequantizeLinear<axis=0>(w, s)  p = MatMul(d, x)  y = Add(p, b) }"
    done = assert_same_numbers(model(text, **weight("int8", (N, K), (N,)), b=b), {"x": activation((K, 5))})
    assert ops(done.model) == ["Transpose", "msd.MatMul", "Transpose", "Add"]


@pytest.mark.parametrize("b", [B[:1], activation((3, 1)), B[:4]])
def test_one_column(b):
    """With N = 1 a row of the result is broadcast over the constant, not the other way round."""
    text = "(float[3,40] x) => (float[] y) { d = DequantizeLinear(w, s)  p = MatMul(x, d)  y = Add(p, b) }"
    assert_same_numbers(model(text, **weight("int8", (K, 1), (1,)), b=b), {"x": activation((3, K))})


def test_shared_bias_stays():
    text = f"({X2}) => (float[3,20] y, float[20] z) {{ d = DequantizeLinear(w, s)  p = MatMul(x, d)  y = Add(p, b)  z = Neg(b) }}"
    source = model(text, **INT8, b=B)
    done = assert_same_numbers(source, feed(X2))
    assert ops(done.model) == ["msd.MatMul", "Neg"]
    assert source.graph.initializer[2] in done.model.graph.initializer


def test_captured_by_a_branch():
    text = f"""({X2}, bool c) => (float[3,20] y, float[3,20] z) {{
        d = DequantizeLinear(w, s)  p = MatMul(x, d)  y = Add(p, b)
        z = If(c) <then_branch = t () => (float[3,20] u) {{ u = Neg(p) }}, else_branch = e () => (float[3,20] v) {{ v = Identity(p) }}> }}"""
    for condition in (True, False):
        done = assert_same_numbers(model(text, **INT8, b=B), feed(X2) | {"c": np.array(condition)})
    assert ops(done.model) == ["msd.MatMul", "Add", "If"]


def test_added_in_a_branch():
    text = f"""({X2}, bool c) => (float[3,20] z) {{
        d = DequantizeLinear(w, s)  p = MatMul(x, d)
        z = If(c) <then_branch = t () => (float[3,20] u) {{ u = Add(p, b) }}, else_branch = e () => (float[3,20] v) {{ v = Identity(p) }}> }}"""
    for condition in (True, False):
        done = assert_same_numbers(model(text, **INT8, b=B), feed(X2) | {"c": np.array(condition)})
    assert ops(done.model) == ["msd.MatMul", "If"]
