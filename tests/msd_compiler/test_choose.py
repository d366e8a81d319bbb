from __future__ import annotations

import numpy as np
import onnx
from support import compiled, model, weight

from msd_compiler.report import Outcome, ReasonCode

ROUNDED = """(float[M, 64] x) => (float[M, 32] y, int8[M, 32] codes) {
    d1 = DequantizeLinear(w, s)
    a = MatMul(x, d1)
    r = Relu(a)
    codes = QuantizeLinear(r, step, zero)
    d2 = DequantizeLinear(w2, s2)
    y = MatMul(a, d2)
}"""


def rounded_model() -> onnx.ModelProto:
    second = weight("int8", (32, 32), (32,), seed=3)
    return model(
        ROUNDED,
        **weight("int8", (64, 32), (32,)),
        w2=second["w"],
        s2=second["s"],
        step=np.float32(0.05),
        zero=np.int8(0),
    )


def test_layers_before_a_rounding_get_three_terms():
    before, after = compiled(rounded_model(), terms=None).report.sites
    assert (before.terms, before.reason_code, before.outcome) == (3, ReasonCode.ROUNDED_DOWNSTREAM, Outcome.REWRITTEN)
    assert "QuantizeLinear" in before.reason
    assert (after.terms, after.reason_code) == (2, None)


def test_terms_given_are_terms_taken():
    assert [s.terms for s in compiled(rounded_model(), terms=1).report.sites] == [1, 1]


def test_an_attention_with_a_low_bit_cache_rounds():
    graph = """(float[1, S, 64] x, int8[1, 1, P, 32] pk, int8[1, 1, P, 32] pv, int32[1] seqlens, int32 total)
        => (float[1, S, 32] y, int8[1, 1, T, 32] k, int8[1, 1, T, 32] v) {
        d = DequantizeLinear(w, s)
        qkv = MatMul(x, d)
        y, k, v = com.microsoft.GroupQueryAttention <num_heads = 1, kv_num_heads = 1, k_quant_type = "PER_TENSOR",
            v_quant_type = "PER_TENSOR", kv_cache_bit_width = 8> (qkv, , , pk, pv, seqlens, total, , , , , , ks, ks)
    }"""
    one = np.full(1, 0.1, np.float32)
    site, _ = compiled(model(graph, **weight("int8", (64, 96), (96,)), ks=one), terms=None).report.sites
    assert site.terms == 3
