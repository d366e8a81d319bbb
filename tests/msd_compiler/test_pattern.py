from pathlib import Path

import numpy as np
import pytest
from support import model

from msd_compiler.linked import Linked
from msd_compiler.pattern import Any, Chain, Const, Maybe, OneOf, Op, match
from msd_compiler.source import Source

W = {"w": np.ones((4, 4), np.float32), "v": np.ones((4, 4), np.float32), "shape": np.array([4, 4])}


def found(pattern, nodes):
    """What ``pattern`` binds at the node that makes ``y``: names of tensors, op types of nodes; None if it does not fit."""
    linked = Linked.of(Source(model(f"(float[4,4] x) => (float[4,4] y) {{ {nodes} }}", **W), Path()))
    scope = linked.scopes[0]
    m = match(pattern, scope.graph.outputs[0].inputs[0], scope)
    if m is None:
        return None
    return {
        name: tuple(n.op for n in v) if isinstance(v, tuple) else getattr(v, "op", getattr(v, "name", v))
        for name, v in m.bound.items()
    }


ADD = Op("Add", Any("a"), Any("b"))
SQUARE = Op("Mul", Any("a"), Any("a"), name="mul")
CHAIN = Op("MatMul", Any("x"), Chain(("Cast", "Reshape", "Transpose"), Const("w"), name="chain"))
RELU_OR_NEG = OneOf((Op("Relu", Any("a")), Op("Neg", Any("b"))))

# fmt: off
TABLE = {
    "op": (ADD, "y = Add(x, w)", {"a": "x", "b": "w"}),
    "another op": (ADD, "y = Sub(x, w)", None),
    "one of several ops": (Op(("Sub", "Add"), Any("a"), Any("b"), name="op"), "y = Add(x, w)", {"op": "Add", "a": "x", "b": "w"}),
    "another domain": (ADD, "y = com.microsoft.Add(x, w)", None),
    "its domain": (Op("Add", Any("a"), Any("b"), domains=("com.microsoft",)), "y = com.microsoft.Add(x, w)", {"a": "x", "b": "w"}),
    "default domain by its name": (ADD, "y = ai.onnx.Add(x, w)", {"a": "x", "b": "w"}),
    "one input too many": (Op("Sum", Any("a")), "y = Sum(x, w)", None),
    "one input too few": (Op("Sum", Any("a"), Any("b")), "y = Sum(x)", None),
    "optional input there": (Op("Sum", Any("a"), Maybe(Any("b"))), "y = Sum(x, w)", {"a": "x", "b": "w"}),
    "optional input absent": (Op("Sum", Any("a"), Maybe(Any("b"))), "y = Sum(x)", {"a": "x", "b": None}),
    "optional input empty": (Op("Clip", Any("a"), Maybe(Any("b")), Any("c")), "y = Clip(x, , w)", {"a": "x", "b": None, "c": "w"}),
    "empty inputs at the end": (Op("Clip", Any("a")), "y = Clip(x, , )", {"a": "x"}),
    "optional constant that is none": (Op("Sum", Any("a"), Maybe(Const("b"))), "y = Sum(w, x)", None),
    "constant": (Op("Add", Any("a"), Const("b")), "y = Add(x, w)", {"a": "x", "b": "w"}),
    "no constant": (Op("Add", Any("a"), Const("b")), "y = Add(w, x)", None),
    "Constant node": (Op("Add", Any("a"), Const("b")), "c = Constant <value_float = 1.0> ()  y = Add(x, c)", {"a": "x", "b": "c"}),
    "commutes": (Op("Add", Any("a"), Const("b"), commutes=True), "y = Add(w, x)", {"a": "x", "b": "w"}),
    "commutes, as written first": (Op("Add", Any("a"), Any("b"), commutes=True), "y = Add(w, x)", {"a": "w", "b": "x"}),
    "one name, one tensor": (SQUARE, "y = Mul(x, x)", {"mul": "Mul", "a": "x"}),
    "one name, two tensors": (SQUARE, "y = Mul(x, w)", None),
    "nested": (Op("Add", Op("Relu", Any("a")), Op("Neg", Any("b"))), "r = Relu(x)  n = Neg(w)  y = Add(r, n)", {"a": "x", "b": "w"}),
    "nested, other order": (Op("Add", Op("Relu", Any("a")), Op("Neg", Any("b")), commutes=True), "r = Relu(x)  n = Neg(w)  y = Add(n, r)", {"a": "x", "b": "w"}),
    "second output": (Op("Relu", Op("Split", Any("a"))), "s, t = Split<axis=0, num_outputs=2>(x)  y = Relu(t)", None),
    "first output": (Op("Relu", Op("Split", Any("a"))), "s, t = Split<axis=0, num_outputs=2>(x)  y = Relu(s)", {"a": "x"}),
    "first spelling": (Op("Abs", RELU_OR_NEG), "r = Relu(x)  y = Abs(r)", {"a": "x"}),
    "second spelling": (Op("Abs", RELU_OR_NEG), "r = Neg(x)  y = Abs(r)", {"b": "x"}),
    "no spelling": (Op("Abs", RELU_OR_NEG), "r = Exp(x)  y = Abs(r)", None),
    "empty chain": (CHAIN, "y = MatMul(x, w)", {"x": "x", "w": "w", "chain": ()}),
    "chain, in the order of data flow": (CHAIN, "r = Reshape(w, shape)  t = Transpose(r)  c = Cast<to=1>(t)  y = MatMul(x, c)", {"x": "x", "w": "w", "chain": ("Reshape", "Transpose", "Cast")}),
    "chain through another op": (CHAIN, "r = Relu(w)  t = Transpose(r)  y = MatMul(x, t)", None),
    "chain through another domain": (CHAIN, "t = com.microsoft.Transpose(w)  y = MatMul(x, t)", None),
    "chain by a computed shape": (CHAIN, "s = Shape(x)  r = Reshape(w, s)  y = MatMul(x, r)", None),
    "chain from no constant": (CHAIN, "t = Transpose(x)  y = MatMul(x, t)", None),
    "chain, names agree": (Op("MatMul", Any("x"), Chain(("Transpose",), Any("x"))), "t = Transpose(x)  y = MatMul(x, t)", {"x": "x"}),
    "anonymous": (Op("Add", Any(), Const()), "y = Add(x, w)", {}),
}
# fmt: on


@pytest.mark.parametrize(("pattern", "nodes", "bound"), TABLE.values(), ids=TABLE)
def test_match(pattern, nodes, bound):
    assert found(pattern, nodes) == bound


@pytest.mark.parametrize(("length", "fits"), [(16, True), (17, False)])
def test_longest_chain(length, fits):
    nodes = "  ".join(f"t{i + 1} = Transpose(t{i})" for i in range(length)).replace("(t0)", "(w)")
    assert (found(CHAIN, f"{nodes}  y = MatMul(x, t{length})") is not None) is fits


def test_what_a_match_gives():
    linked = Linked.of(Source(model("(float[4,4] x) => (float[4,4] y) { [n] y = MatMul(x, w) }", **W), Path()))
    scope = linked.scopes[0]
    pattern = Op("MatMul", Any("x"), Chain(("Cast",), Const("w"), name="chain"), Maybe(Any("none")), name="product")
    m = match(pattern, scope.graph.nodes[0], scope)
    assert (m.tensor("x").name, m.maybe("none"), m.op("product").name, m.chain("chain")) == ("x", None, "n", ())


def test_patterns_are_values():
    assert Op("Add", Any("a"), Const("b")) == Op("Add", Any("a"), Const("b"))
    assert hash(CHAIN) == hash(
        Op("MatMul", Any("x"), Chain(("Cast", "Reshape", "Transpose"), Const("w"), name="chain"))
    )
