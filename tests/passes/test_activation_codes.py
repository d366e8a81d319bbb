"""Activations that the model itself rounds, in every spelling: kept as codes, exactly, or upgraded to float."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import pytest
from support import (
    TOLERANCE,
    activation,
    assert_same_numbers,
    compiled,
    meaning,
    model,
    nbits_weight,
    only_row,
    ops,
    run,
    weight,
)

from msd_compiler.compare import relative_l2
from msd_compiler.exact_products import exact_products
from msd_compiler.facts import ReasonCode
from msd_compiler.float_activations import float_activations
from msd_compiler.linked import Linked
from msd_compiler.source import load

M, K, N = 3, 40, 20
EXACT = 1e-6


@dataclass(frozen=True)
class Spelling:
    """A graph from ``x`` to ``y``, its tensors, the terms it gets and its form."""

    nodes: str
    tensors: dict = field(default_factory=dict)
    terms: int = 1
    form: str = "DequantizeLinear -> MatMul"
    x: str = f"float[{M},{K}] x"
    opset: int = 21

    def model(self) -> onnx.ModelProto:
        return model(f"({self.x}) => (float[] y) {{ {self.nodes} }}", opset=self.opset, **self.tensors)

    def feed(self) -> dict[str, np.ndarray]:
        dims = self.x.split("[")[1].split("]")[0]
        return {"x": 0.5 * activation(tuple(int(d) for d in dims.split(",")))}


def zero(kind: str, at: int) -> dict[str, np.ndarray]:
    return {"xs": np.float32(2e-2 if kind.endswith("8") else 1e-4), "xz": np.array(at, kind)}


INT8 = weight("int8", (K, N), (N,), True)
TURNED = weight("int8", (N, K), (N,), True)
BIAS = {"c": np.linspace(-1, 1, N, dtype=np.float32)}
QDQ = "q = QuantizeLinear(x, xs, xz)  f = DequantizeLinear(q, xs, xz)  "
DQ = "d = DequantizeLinear(w, s, z)  "
DYNAMIC = "q, qs, qz = DynamicQuantizeLinear(x)  "
CHAIN = DYNAMIC + "i = MatMulInteger(q, w, qz, z)  v = Cast<to=1>(i)  "
CHAIN_FORM = "DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul"
U8 = zero("uint8", 120)
YS = {"ys": np.float32(0.5), "yz": np.uint8(100)}

# fmt: off
KEPT = {
    **{f"{kind}, zero point {at}": Spelling(QDQ + DQ + "y = MatMul(f, d)", INT8 | zero(kind, at), terms)
       for kind, terms, points in (("uint8", 1, (0, 120, 255)), ("int8", 1, (-128, 0, 127)), ("uint16", 2, (0, 32768, 30000, 65535)), ("int16", 2, (-32768, 0, 5, 32767)))
       for at in points},
    "no zero point": Spelling("q = QuantizeLinear(x, xs, xz)  f = DequantizeLinear(q, xs)  " + DQ + "y = MatMul(f, d)", INT8 | zero("int8", 0)),
    "bias": Spelling(QDQ + DQ + "m = MatMul(f, d)  y = Add(c, m)", INT8 | U8 | BIAS),
    "Gemm": Spelling(QDQ + DQ.replace("(w", "<axis=0>(w") + "y = Gemm<transB=1, alpha=0.5, beta=2.0>(f, d, c)", TURNED | U8 | BIAS, form="DequantizeLinear -> Gemm"),
    "Gemm, transA": Spelling(QDQ + DQ + "y = Gemm<transA=1>(f, d)", INT8 | U8, form="DequantizeLinear -> Gemm", x=f"float[{K},{M}] x"),
    "on the left": Spelling(QDQ + DQ.replace("(w", "<axis=0>(w") + "y = MatMul(d, f)", TURNED | U8, x=f"float[{K},{M}] x"),
    "per tensor": Spelling(QDQ + DQ + "y = MatMul(f, d)", weight("int8", (K, N), (), True) | U8),
    "int4 blocks": Spelling(QDQ + DQ.replace("(w", "<axis=0, block_size=8>(w") + "y = MatMul(f, d)", weight("int4", (K, N), (5, N), True) | zero("uint16", 40000), 2),
    "uint8 blocks": Spelling(QDQ + DQ.replace("(w", "<axis=0, block_size=8>(w") + "y = MatMul(f, d)", weight("uint8", (K, N), (5, N), True) | U8),
    "long block": Spelling(QDQ + DQ.replace("(w", "<axis=0, block_size=256>(w") + "y = MatMul(f, d)", weight("int8", (600, N), (3, N), True) | zero("int16", 9), 2, x="float[3,600] x"),
    "experts": Spelling(QDQ + DQ.replace("(w", "<axis=2>(w") + "y = MatMul(f, d)", weight("int8", (4, K, N), (N,), True) | U8, x=f"float[4,{M},{K}] x"),
    "moved": Spelling(QDQ + DQ + "t = Transpose(f)  r = Reshape(t, shape)  y = MatMul(r, d)", INT8 | U8 | {"shape": np.array([M, 1, K])}, x=f"float[{K},{M}] x"),
    "MatMulNBits": Spelling(QDQ + f"y = com.microsoft.MatMulNBits<K={K}, N={N}, bits=4, block_size=16>(f, b, s, z)", nbits_weight(K, N, 16, zeros="packed") | zero("uint16", 30000), 2, "MatMulNBits"),
    "dynamic, QDQ": Spelling(DYNAMIC + "f = DequantizeLinear(q, qs, qz)  " + DQ + "y = MatMul(f, d)", INT8),

    "chain": Spelling(CHAIN + "t = Mul(qs, s)  y = Mul(v, t)", INT8, form=CHAIN_FORM),
    "chain, other order": Spelling(CHAIN + "t = Mul(s, qs)  y = Mul(t, v)", INT8, form=CHAIN_FORM),
    "chain, two Muls": Spelling(CHAIN + "t = Mul(v, qs)  y = Mul(s, t)", INT8, form=CHAIN_FORM),
    "chain, two Muls, scale last": Spelling(CHAIN + "t = Mul(v, s)  y = Mul(t, qs)", INT8, form=CHAIN_FORM),
    "chain, a Mul of another matter behind": Spelling(CHAIN + "t = Mul(qs, s)  u = Mul(v, t)  y = Mul(u, h)", INT8 | {"h": np.float32(0.125)}, form=CHAIN_FORM),
    "chain, bias": Spelling(CHAIN + "t = Mul(qs, s)  u = Mul(v, t)  y = Add(u, c)", INT8 | BIAS, form=CHAIN_FORM),
    "chain, one zero point for all columns": Spelling(CHAIN + "t = Mul(qs, s)  y = Mul(v, t)", INT8 | {"z": np.int8(3)}, form=CHAIN_FORM),
    "chain, per tensor": Spelling(CHAIN + "t = Mul(qs, s)  y = Mul(v, t)", weight("int8", (K, N), (), True), form=CHAIN_FORM),
    "chain, opset 11": Spelling(CHAIN + "t = Mul(qs, s)  y = Mul(v, t)", INT8, form=CHAIN_FORM, opset=11),
    "chain of a static activation": Spelling("q = QuantizeLinear(x, xs, xz)  i = MatMulInteger(q, w, xz, z)  v = Cast<to=1>(i)  y = Mul(v, s)", INT8 | U8, form="MatMulInteger -> Cast -> Mul"),
    "DynamicQuantizeMatMul": Spelling("y = com.microsoft.DynamicQuantizeMatMul(x, w, s, z, c)", INT8 | BIAS, form="DynamicQuantizeMatMul"),
    "DynamicQuantizeMatMul, no zero point": Spelling("y = com.microsoft.DynamicQuantizeMatMul(x, w, s)", INT8, form="DynamicQuantizeMatMul"),
    "MatMulIntegerToFloat": Spelling(DYNAMIC + "y = com.microsoft.MatMulIntegerToFloat(q, w, qs, s, qz, z, c)", INT8 | BIAS, form="DynamicQuantizeLinear -> MatMulIntegerToFloat"),
    "MatMulIntegerToFloat, int8": Spelling("q = QuantizeLinear(x, xs, xz)  y = com.microsoft.MatMulIntegerToFloat(q, w, xs, s, xz)", INT8 | zero("int8", -7), form="MatMulIntegerToFloat"),
    "QLinearMatMul": Spelling("q = QuantizeLinear(x, xs, xz)  i = QLinearMatMul(q, xs, xz, w, s, z, ys, yz)  y = DequantizeLinear(i, ys, yz)", INT8 | U8 | YS, form="QLinearMatMul"),
    "QGemm": Spelling("q = QuantizeLinear(x, xs, xz)  y = com.microsoft.QGemm<transB=1, alpha=0.5>(q, xs, xz, w, s, z, c)", TURNED | U8 | {"c": np.arange(N, dtype=np.int32)}, form="QGemm"),
}
# fmt: on


@pytest.mark.parametrize("spelling", KEPT.values(), ids=KEPT)
def test_kept(spelling):
    """The product of the codes, exact but for the last float32 rounding."""
    if spelling.opset < 13:  # onnxruntime's QuantizeLinear of int8 per channel; the reference needs none of it
        done = compiled(spelling.model())
        feed = spelling.feed()
        assert relative_l2(run(done.model, feed)["y"], meaning(spelling.model(), feed)["y"]) <= EXACT
    else:
        done = assert_same_numbers(spelling.model(), spelling.feed(), tolerance=EXACT, terms=None)
    (row,) = done.report.sites
    assert (row.terms, row.form, row.error_bound) == (spelling.terms, spelling.form, 0)
    assert row.reason_code is ReasonCode.ACTIVATION_CODES
    assert "msd.MatMulIntegerToFloat" in ops(done.model)
    assert not {"MatMulInteger", "QLinearMatMul", "QGemm", "MatMul", "Gemm"} & set(ops(done.model))


def test_saturation_is_said():
    assert "saturates on CPUs without VNNI" in only_row(KEPT["chain"].model()).reason
    assert "saturates" not in only_row(KEPT["MatMulIntegerToFloat, int8"].model()).reason


SATURATES = {"uint8, zero point 255", "int8, zero point 127", "uint16, zero point 65535", "int16, zero point 32767"}
SATURATES |= {"uint8, zero point 0", "int8, zero point -128", "uint16, zero point 0", "int16, zero point -32768"}
WITHOUT_FORM = {"chain, opset 11", "chain of a static activation"}
"""DequantizeLinear has no scale per channel there; the activation's scale cannot be told from the weight's."""


@pytest.mark.parametrize("spelling", [s for n, s in KEPT.items() if n not in SATURATES | WITHOUT_FORM])
def test_upgraded(spelling):
    """No rounding is left: as near the source as its rounding is fine, and where the text allows, the float product itself."""
    source, feed = spelling.model(), spelling.feed()
    done = compiled(source, activations="upgrade")
    (row,) = done.report.sites
    assert (row.terms, row.reason_code) == (2, ReasonCode.ACTIVATION_UPGRADED)
    rounding = {"QuantizeLinear", "DynamicQuantizeLinear"}
    assert ops(done.model).count("QuantizeLinear") == 0
    assert not rounding & set(ops(done.model))
    native, portable = run(done.model, feed)["y"], run(done.model, feed, portable=True)["y"]
    assert native.tobytes() == portable.tobytes()
    assert relative_l2(native, meaning(source, feed)["y"]) < (0.05 if spelling.terms == 1 else 1e-3)
    if QDQ in spelling.nodes:
        plain = replace(spelling, nodes=spelling.nodes.replace(QDQ, "f = Identity(x)  "))
        assert relative_l2(native, meaning(plain.model(), feed)["y"]) < TOLERANCE


def test_a_rounding_that_others_need_stays():
    """Codes that leave the model, and those that meet codes from outside on their way (an int8 cache), are not dropped."""
    spelling = KEPT["uint8, zero point 120"]
    proto = spelling.model()
    proto.graph.output.append(onnx.helper.make_tensor_value_info("q", onnx.TensorProto.UINT8, [M, K]))
    done = compiled(proto, activations="upgrade")
    assert done.report.sites[0].reason_code is ReasonCode.ACTIVATION_CODES
    cache = f"(float[{M},{K}] x, uint8[2,{K}] past) => (float[] y, uint8[] present) {{ q = QuantizeLinear(x, xs, xz)  "
    cache += "present = Concat<axis=0>(past, q)  f = DequantizeLinear(present, xs, xz)  " + DQ + "y = MatMul(f, d) }"
    done = compiled(model(cache, **INT8, **U8), activations="upgrade")
    assert "QuantizeLinear" in ops(done.model)
    assert done.report.sites[0].reason_code is ReasonCode.ACTIVATION_CODES


def test_moves_between_the_two_become_float():
    text = (
        "q = QuantizeLinear(x, xs, xz)  t = Transpose(q)  r = Reshape(t, shape)  f = DequantizeLinear(r, xs, xz)  " + DQ
    )
    tensors = INT8 | U8 | {"shape": np.array([M, 1, K])}
    proto = model(f"(float[{K},{M}] x) => (float[] y) {{ {text} y = MatMul(f, d) }}", **tensors)
    done = compiled(proto, activations="upgrade")
    assert ops(done.model) == ["Transpose", "Reshape", "msd.MatMul"]
    x = activation((K, M))
    expected = meaning(
        model(f"(float[{M},1,{K}] x) => (float[] y) {{ {DQ} y = MatMul(x, d) }}", **INT8), {"x": x.T.reshape(M, 1, K)}
    )
    assert relative_l2(run(done.model, {"x": x})["y"], expected["y"]) < TOLERANCE


@pytest.mark.parametrize("extra", ["y = Neg(f)", "f2 = DequantizeLinear(q, xs2, xz)  y = Add(f, f2)"])
def test_pairs_of_one_scale_only(extra):
    """A pair whose scales differ is no rounding alone."""
    proto = model(
        f"(float[{M},{K}] x) => (float[] y) {{ q = QuantizeLinear(x, xs, xz)  f = DequantizeLinear(q, xs, xz)  {extra} }}",
        **U8,
        xs2=np.float32(1),
    )
    spelled, _ = float_activations(Linked.of(load(proto)))
    assert ("QuantizeLinear" in ops(spelled.proto)) == ("xs2" in extra)


def test_the_source_s_kernel_is_not_trusted():
    """Bits of the rewritten chain are those of MatMulInteger with both operands as uint8, which no CPU saturates."""
    spelling = KEPT["chain, bias"]
    feed = spelling.feed()
    report = compiled(spelling.model()).report
    assert report.sites[0].terms == 1
    exact = exact_products(Linked.of(load(spelling.model()))).proto
    stored = {t.name: t for t in exact.graph.initializer}
    product = next(n for n in exact.graph.node if n.op_type == "MatMulInteger")
    assert {stored[name].data_type for name in (product.input[1], product.input[3])} == {onnx.TensorProto.UINT8}
    found, expected = run(compiled(spelling.model()).model, feed)["y"], run(exact, feed, portable=True)["y"]
    assert relative_l2(found, expected) <= 2e-7
