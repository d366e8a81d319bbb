"""Attention as two products and a softmax, in every spelling, and what is not followed with its reason code."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from attention_facts import assert_facts, linked_of
from msd_compiler.passes import ATTENTION_READERS
from onnx import helper, numpy_helper
from support import model, needs_opset

from msd_compiler.attention import AttentionSite
from msd_compiler.errors import ModelError
from msd_compiler.facts import Reject
from msd_compiler.reader import find_sites

B, S, P, T, D = 2, 3, 5, 8, 8
SCALE = 1 / np.sqrt(D)
LOWEST = float(np.finfo(np.float32).min)

CONSTANTS = {
    "scale": np.float32(SCALE),
    "root": np.float32(np.sqrt(SCALE)),
    "divisor": np.float32(np.sqrt(D)),
    "one": np.float32(1),
    "zero": np.float32(0),
    "cap": np.float32(2),
    "hidden": np.float32(-np.inf),
    "low": np.float32(-1e4),
    "lowest": np.float32(LOWEST),
    "bias": np.linspace(-1, 1, T, dtype=np.float32).reshape(1, 1, 1, T),
    "i0": np.array(0, np.int64),
    "i1": np.array(1, np.int64),
    "l0": np.array([0], np.int64),
    "l2": np.array([2], np.int64),
    "l3": np.array([3], np.int64),
    "last": np.array([-1], np.int64),
    "before_last": np.array([-2], np.int64),
    "end": np.array([2**63 - 1], np.int64),
    "groups": np.array([1, 1, 2, 1, 1], np.int64),
    "four_heads": np.array([0, 4, -1, D], np.int64),
    "three_dims": np.array([-1, T, D], np.int64),
    "k_turned": np.array([B, 4, D, T], np.int64),
    "half": np.array([0.5], np.float32),
    "per_column": np.linspace(0.02, 0.05, D, dtype=np.float32),
    "per_head": np.linspace(0.02, 0.05, 4, dtype=np.float32),
    "step": np.float32(0.03),
    "other_step": np.float32(0.04),
    "no_zero": np.int8(0),
    "column_zeros": np.zeros(D, np.int8),
    "head_zeros": np.zeros(4, np.int8),
    "some_zero": np.int8(3),
}

CACHE = "K = Concat<axis=-2>(past_k, k)  V = Concat<axis=2>(past_v, v)  "
K_T = "kt = Transpose<perm=[0,1,3,2]>(K)  "
PRODUCT = "p0 = MatMul(q, kt)  "
SCALED = "l = Mul(p0, scale)  "
MASKED = "m = Add(l, mask)  "
SOFTMAX = "a = Softmax<axis=-1>(m)  "
END = "y = MatMul(a, V)  "
OUT = "t = Transpose<perm=[0,2,1,3]>(y)  out = Identity(t)"
PLAIN = CACHE + K_T + PRODUCT + SCALED + MASKED + SOFTMAX + END
QUANTIZED = {"past": "int8"}


def graph(
    body: str,
    *,
    kv: int = 4,
    past: str = "float",
    mask: str = "float",
    outputs: str = "",
    tail: str = OUT,
    dtype: str = "float",
):
    """A model of one attention; ``mask`` is float or bool ``[B, 1, S, T]``."""
    shape = f"[B,{kv},P,{D}]".replace("B", "N")
    head = (
        f"({dtype}[N,4,S,{D}] q, {dtype}[N,{kv},S,{D}] k, {dtype}[N,{kv},S,{D}] v, {past}{shape} past_k, {past}{shape} past_v, "
        f"{mask}[N,1,S,T] mask) => ({dtype}[N,S,4,{D}] out, {past}[N,{kv},T,{D}] K, {past}[N,{kv},T,{D}] V{outputs}) "
    )
    used = {
        n: v
        for n, v in CONSTANTS.items()
        if n in set(body.replace("(", " ").replace(",", " ").replace(")", " ").split())
    }
    return model(head + "{ " + body + tail + " }", opset=18 if "per_" not in body else 21, **used)


def feed_of(kv: int = 4, past: str = "float", mask: str = "float", dtype: str = "float"):
    rng = np.random.default_rng(0)
    floats = np.float32 if dtype == "float" else np.float16

    def normal(*shape):
        return rng.standard_normal(shape).astype(floats)

    def cache():
        return normal(B, kv, P, D) if past != "int8" else rng.integers(-127, 128, (B, kv, P, D)).astype(np.int8)

    seen = np.tril(np.ones((S, T), bool), P)[None, None] & (rng.random((B, 1, S, T)) < 0.8)
    seen[..., 0] = True
    masks = {
        "bool": seen,
        "float": np.where(seen, 0, -1e4).astype(floats),
        "float16": np.where(seen, 0, -1e4).astype(floats),
    }
    return {
        "q": normal(B, 4, S, D),
        "k": normal(B, kv, S, D),
        "v": normal(B, kv, S, D),
        "past_k": cache(),
        "past_v": cache(),
        "mask": masks[mask],
    }


@dataclass(frozen=True)
class Taken:
    name: str
    body: str
    expected: dict = field(default_factory=dict)
    more: dict = field(default_factory=dict)


def repeated(x):
    return f"{x}u = Unsqueeze({x}, l2)  {x}e = Expand({x}u, groups)  {x}r = Reshape({x}e, four_heads)  "


TURNED = (
    "ks = Shape(K)  ks3 = Slice(ks, last, end)  ks2 = Slice(ks, before_last, last)  ks01 = Slice(ks, l0, before_last)  "
    "to3 = Concat<axis=0>(last, ks2, ks3)  kf = Reshape(K, to3)  kft = Transpose<perm=[0,2,1]>(kf)  "
    "to4 = Concat<axis=0>(ks01, ks3, ks2)  kt = Reshape(kft, to4)  "
)
GUARD = "n = IsNaN(a0)  a = Where(n, zero, a0)  "
HEAD_SIZE = "qs = Shape(q)  hs = Slice(qs, last, end)  hf = Cast<to=1>(hs)  hr = Sqrt(hf)  "
CODES = "kq = QuantizeLinear(k, step, no_zero)  vq = QuantizeLinear(v, step, no_zero)  K = Concat<axis=2>(past_k, kq)  V = Concat<axis=2>(past_v, vq)  "
READ = "kd = DequantizeLinear(K, step, no_zero)  vd = DequantizeLinear(V, step)  kt = Transpose<perm=[0,1,3,2]>(kd)  "
REST = PRODUCT + SCALED + MASKED + SOFTMAX

# fmt: off
TAKEN = [
    Taken("factor on the logits", PLAIN, {"scale": SCALE}),
    Taken("factor in front", CACHE + K_T + PRODUCT + "l = Mul(scale, p0)  " + MASKED + SOFTMAX + END, {"scale": SCALE}),
    Taken("divided", CACHE + K_T + PRODUCT + "l = Div(p0, divisor)  " + MASKED + SOFTMAX + END, {"scale": SCALE}),
    Taken("mask in front", CACHE + K_T + PRODUCT + SCALED + "m = Add(mask, l)  " + SOFTMAX + END, {"mask": "mask"}),
    Taken("two masks", CACHE + K_T + PRODUCT + SCALED + "m0 = Add(l, bias)  m = Add(mask, m0)  " + SOFTMAX + END, {"mask": "mask", "more": 1}),
    Taken("no mask", CACHE + K_T + PRODUCT + "m = Mul(p0, scale)  " + SOFTMAX + END, {"mask": None}),
    Taken("no factor", CACHE + K_T + "m = MatMul(q, kt)  " + SOFTMAX + END, {"scale": 1.0, "mask": None}),
    Taken("factor on queries is in them", CACHE + K_T + "q1 = Mul(q, scale)  l = MatMul(q1, kt)  " + MASKED + SOFTMAX + END, {"scale": 1.0, "q": "q1"}),
    Taken("factor on keys", CACHE + K_T + "k1 = Div(kt, divisor)  l = MatMul(q, k1)  " + MASKED + SOFTMAX + END, {"scale": SCALE}),
    Taken("factor before the transposition", CACHE + "k1 = Mul(scale, K)  kt = Transpose<perm=[0,1,3,2]>(k1)  l = MatMul(q, kt)  " + MASKED + SOFTMAX + END, {"scale": SCALE}),
    Taken("root on both", CACHE + K_T + "q1 = Mul(q, root)  k1 = Mul(kt, root)  l = MatMul(q1, k1)  " + MASKED + SOFTMAX + END, {"scale": np.sqrt(SCALE), "q": "q1"}),
    Taken("factor computed from the head size", HEAD_SIZE + CACHE + K_T + PRODUCT + "l = Div(p0, hr)  " + MASKED + SOFTMAX + END, {"scale": SCALE}),
    Taken("reciprocal of the root", HEAD_SIZE + "hi = Reciprocal(hr)  " + CACHE + K_T + PRODUCT + "l = Mul(p0, hi)  " + MASKED + SOFTMAX + END, {"scale": SCALE}),
    Taken("root of the factor, computed", HEAD_SIZE + "hd = Div(one, hr)  hc = Cast<to=1>(hd)  h2 = Sqrt(hc)  " + CACHE + K_T + "q1 = Mul(q, h2)  k1 = Mul(kt, h2)  l = MatMul(q1, k1)  " + MASKED + SOFTMAX + END, {"scale": np.sqrt(SCALE), "q": "q1"}),
    Taken("power of the head size", "qs = Shape<start=-1>(q)  hf = Cast<to=1>(qs)  hp = Pow(hf, half)  " + CACHE + K_T + PRODUCT + "l = Div(p0, hp)  " + MASKED + SOFTMAX + END, {"scale": SCALE}),
    Taken("soft cap", CACHE + K_T + PRODUCT + "s0 = Mul(p0, scale)  s1 = Div(s0, cap)  s2 = Tanh(s1)  l = Mul(s2, cap)  " + MASKED + SOFTMAX + END, {"scale": SCALE, "soft_cap": 2.0}),
    Taken("keys turned as three dimensions", CACHE + TURNED + PRODUCT + SCALED + MASKED + SOFTMAX + END),
    Taken("heads repeated", CACHE + repeated("K") + repeated("V") + "kt = Transpose<perm=[0,1,3,2]>(Kr)  " + REST + "y = MatMul(a, Vr)  ", {}, {"kv": 2}),
    Taken("heads repeated, shape computed", CACHE + "vs = Shape(V)  v0 = Slice(vs, l0, l2)  v2 = Slice(vs, l2, end)  to5 = Concat<axis=0>(v0, l2, v2)  Ku = Unsqueeze(K, l2)  Ke = Expand(Ku, to5)  Kr = Reshape(Ke, four_heads)  "
          + repeated("V") + "kt = Transpose<perm=[0,1,3,2]>(Kr)  " + REST + "y = MatMul(a, Vr)  ", {}, {"kv": 2}),
    Taken("turned while repeated", CACHE + repeated("K") + repeated("V") + "kt = Transpose<perm=[0,1,3,2]>(Kr)  k1 = Mul(kt, root)  q1 = Mul(q, root)  l = MatMul(q1, k1)  " + MASKED + SOFTMAX + "y = MatMul(a, Vr)  ", {"q": "q1"}, {"kv": 2}),
    Taken("one head for all", CACHE + K_T + PRODUCT + SCALED + MASKED + SOFTMAX + END, {}, {"kv": 1}),
    Taken("guard against rows that see nothing", CACHE + K_T + PRODUCT + SCALED + MASKED + "a0 = Softmax(m)  " + GUARD + END),
    Taken("-inf where the mask is false", CACHE + K_T + PRODUCT + SCALED + "m = Where(mask, l, hidden)  " + SOFTMAX + END, {"mask": "mask", "mask_is_bool": True}, {"mask": "bool"}),
    Taken("-10000 where the mask is false", CACHE + K_T + PRODUCT + SCALED + "m = Where(mask, l, low)  " + SOFTMAX + END, {"mask_is_bool": True}, {"mask": "bool"}),
    Taken("-inf where the mask is true", "hide = Not(mask)  " + CACHE + K_T + PRODUCT + SCALED + "m = Where(hide, hidden, l)  " + SOFTMAX + END, {"mask": None, "more": 1}, {"mask": "bool"}),
    Taken("both masks", CACHE + K_T + PRODUCT + SCALED + "m0 = Where(mask, l, hidden)  m = Add(m0, bias)  " + SOFTMAX + END, {"mask": "bias", "more": 1}, {"mask": "bool"}),
    Taken("additive mask made of a bool", "fm = Where(mask, zero, lowest)  " + CACHE + K_T + PRODUCT + SCALED + "m = Add(l, fm)  " + SOFTMAX + END, {"mask": "fm", "mask_is_bool": False}, {"mask": "bool"}),
    Taken("shape of the logits read by the mask", CACHE + K_T + PRODUCT + SCALED + "ls = Shape(l)  em = Expand(mask, ls)  m = Where(em, l, hidden)  " + SOFTMAX + END, {"mask": "em", "shapes": 1}, {"mask": "bool"}),
    Taken("shape of the cache read by the mask", CACHE + "kh = Shape(K)  k3 = Slice(kh, l2, l3)  kx = ConstantOfShape(k3)  fx = Add(mask, kx)  " + K_T + PRODUCT + SCALED + "m = Add(l, fx)  " + SOFTMAX + END, {"mask": "fx", "shapes": 1}),
    Taken("dropout and copies", CACHE + K_T + PRODUCT + SCALED + MASKED + "a0 = Softmax<axis=3>(m)  a1 = Dropout(a0)  a = Identity(a1)  " + END),
    Taken("FusedMatMul", CACHE + "l = com.microsoft.FusedMatMul<alpha=0.5, transB=1>(q, K)  " + MASKED + SOFTMAX + "y = com.microsoft.FusedMatMul(a, V)  ", {"scale": 0.5}),
    Taken("a copy of the past", "pk = Concat<axis=0>(past_k)  K = Concat<axis=2>(pk, k)  V = Concat<axis=2>(past_v, v)  " + K_T + REST + END, {"key_past": "past_k"}),
    Taken("int8 cache", CODES + READ + REST + "y = MatMul(a, vd)  ", {"codes": None, "k": "k"}, QUANTIZED),
    Taken("int8 cache, scale per column", CODES.replace("step", "per_column").replace("no_zero", "column_zeros").replace("QuantizeLinear", "QuantizeLinear<axis=-1>") + READ.replace("step", "per_column").replace("no_zero", "column_zeros").replace("DequantizeLinear", "DequantizeLinear<axis=3>") + REST + "y = MatMul(a, vd)  ", {"codes": 3}, QUANTIZED),
    Taken("int8 cache, scale per head", CODES.replace("step", "per_head").replace("no_zero", "head_zeros").replace("QuantizeLinear", "QuantizeLinear<axis=1>") + READ.replace("step", "per_head").replace("no_zero", "head_zeros") + REST + "y = MatMul(a, vd)  ", {"codes": 1}, QUANTIZED),
    Taken("softmax of halves in float32", CACHE + K_T + "lx = MatMul(q, kt)  l1 = Cast<to=1>(lx)  l = Mul(l1, scale)  f = Cast<to=1>(mask)  m = Add(l, f)  a0 = Softmax<axis=-1>(m)  a = Cast<to=10>(a0)  " + END,
          {"element_type": 10, "mask": "f"}, {"dtype": "float16", "past": "float16", "mask": "float16"}),
]
# fmt: on


def read(proto):
    linked = linked_of(proto)
    sites = find_sites(linked, ATTENTION_READERS, ())
    return linked, sites


@pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.name)
def test_taken(case):
    proto = graph(case.body, **case.more)
    needs_opset(proto.opset_import[0].version)
    linked, sites = read(proto)
    (site,) = sites
    fact = site.found
    assert isinstance(fact, AttentionSite), fact.reason
    kv = case.more.get("kv", 4)
    assert (fact.heads, fact.kv_heads, fact.head_size, fact.value_head_size) == (4, kv, D, D)
    assert fact.node.op == "Softmax"
    assert fact.form.split(" -> ")[-1] in ("MatMul", "FusedMatMul")
    assert (fact.causal, fact.window, fact.packed, fact.sinks, fact.lengths) == (False, 0, False, None, None)
    assert [c.present.name for c in (fact.key_cache, fact.value_cache)] == ["K", "V"]
    assert fact.key_cache.past.name == "past_k"
    assert (fact.k.name, fact.v.name, fact.y.name) == ("k", "v", "y")
    assert fact.rows == "N*S"
    expected = {
        "scale": fact.scale,
        "mask": "mask" if fact.mask and fact.mask.name == "mask" else "",
        "q": "q",
    } | case.expected
    assert fact.scale == pytest.approx(expected["scale"], rel=1e-6)
    assert fact.q.name == expected["q"]
    assert fact.soft_cap == expected.get("soft_cap", 0.0)
    assert len(fact.more_masks) == expected.get("more", 0)
    assert len(fact.shape_readers) == expected.get("shapes", 0)
    assert fact.element_type == expected.get("element_type", 1)
    if "mask" in case.expected:
        assert (fact.mask and fact.mask.name) == case.expected["mask"]
    assert fact.mask_is_bool == expected.get("mask_is_bool", fact.mask_is_bool)
    assert (fact.key_cache.codes is None) == ("codes" not in expected)
    if "codes" in expected:
        assert (fact.key_cache.codes.bits, fact.key_cache.codes.axis) == (8, expected["codes"])
    assert assert_facts(linked, sites, feed_of(**case.more)) == 1


def test_scatter():
    head = (
        f"(float[N,4,S,{D}] q, float[N,2,S,{D}] k, float[N,2,S,{D}] v, float[N,2,T,{D}] past_k, float[N,2,T,{D}] past_v, "
        f"float[N,1,S,T] mask, int64[N] at) => (float[N,4,S,{D}] out, float[N,2,T,{D}] K, float[N,2,T,{D}] V) "
    )
    body = (
        "K = TensorScatter(past_k, k, at)  V = TensorScatter<axis=2>(past_v, v, at)  " + repeated("K") + repeated("V")
    )
    body += "kt = Transpose<perm=[0,1,3,2]>(Kr)  " + REST + "y = MatMul(a, Vr)  out = Identity(y)"
    used = {n: CONSTANTS[n] for n in ("scale", "l2", "groups", "four_heads")}
    proto = model(head + "{" + body + "}", opset=24, **used)
    linked, sites = read(proto)
    fact = sites[0].found
    assert isinstance(fact, AttentionSite), fact.reason
    assert (fact.heads, fact.kv_heads, fact.key_cache.writer.op, fact.key_cache.at.name) == (
        4,
        2,
        "TensorScatter",
        "at",
    )
    needs_opset(24)
    feed = feed_of(2) | {"at": np.array([0, 4], np.int64)}
    feed |= {n: np.pad(feed[n], ((0, 0), (0, 0), (0, T - P), (0, 0))) for n in ("past_k", "past_v")}
    assert assert_facts(linked, sites, feed) == 1


@dataclass(frozen=True)
class Kept:
    name: str
    code: str
    words: str
    body: str
    more: dict = field(default_factory=dict)
    outputs: str = ""


NEW = "K = Identity(k)  V = Identity(v)  "
F, N = "attention_form", "no_cache"
# fmt: off
KEPT = [
    Kept("no cache", N, "both products are of activations", NEW + K_T + PRODUCT + SCALED + MASKED + SOFTMAX + END),
    Kept("no cache, unknown factor", N, "both products are of activations", NEW + K_T + PRODUCT + "l = Mul(p0, mask)  m = Identity(l)  " + SOFTMAX + END),
    Kept("no cache, rounded", N, "both products", NEW + K_T + PRODUCT + SCALED + MASKED + "r = QuantizeLinear(m, step, no_zero)  d = DequantizeLinear(r, step, no_zero)  a = Softmax(d)  " + END),
    Kept("only keys have a cache", F, "its values 'v' come from no cache", "K = Concat<axis=2>(past_k, k)  V = Identity(past_v)  " + K_T + REST + "y = MatMul(a, v)  "),
    Kept("rounded logits", F, "rounds its logits", CACHE + K_T + PRODUCT + SCALED + MASKED + "r = QuantizeLinear(m, step, no_zero)  d = DequantizeLinear(r, step, no_zero)  a = Softmax(d)  " + END),
    Kept("rounded keys", F, "rounds what is read from the float cache 'past_k'", CACHE + "r = QuantizeLinear(K, step, no_zero)  d = DequantizeLinear(r, step, no_zero)  kt = Transpose<perm=[0,1,3,2]>(d)  " + REST + END),
    Kept("unknown factor", F, "the factor 'mask' of Mul", CACHE + K_T + PRODUCT + "m = Mul(p0, mask)  " + SOFTMAX + END),
    Kept("mask that is scaled", F, "the mask that Add 'lx' applies is scaled", CACHE + K_T + PRODUCT + "lx = Add(p0, mask)  m = Mul(lx, scale)  " + SOFTMAX + END),
    Kept("fill that does not hide", F, "puts 'zero' in place of logits", CACHE + K_T + PRODUCT + SCALED + "m = Where(mask, l, zero)  " + SOFTMAX + END, {"mask": "bool"}),
    Kept("two products added", F, "combines two products", CACHE + K_T + PRODUCT + SCALED + "o = MatMul(q, kt)  m = Add(l, o)  " + SOFTMAX + END),
    Kept("softmax over queries", F, "is over dimension 2 of 4", CACHE + K_T + PRODUCT + SCALED + MASKED + "a = Softmax<axis=2>(m)  " + END),
    Kept("clipped logits", F, "Clip 'm' between its first product and its softmax", CACHE + K_T + PRODUCT + SCALED + "m = Clip(l, low, one)  " + SOFTMAX + END),
    Kept("scaled probabilities", F, "Mul 'b' between its softmax and its second product", CACHE + K_T + REST + "b = Mul(a, scale)  y = MatMul(b, V)  "),
    Kept("probabilities returned", F, "is read outside the attention too, by Neg 'w'", CACHE + K_T + REST + END + "w = Neg(a)  ", outputs=", float[N,4,S,T] w"),
    Kept("cache read elsewhere", F, "the cache 'K' is read by Neg 'w' as well", CACHE + K_T + REST + END + "w = Neg(K)  ", outputs=", float[N,4,T,8] w"),
    Kept("past read elsewhere", F, "the cache 'past_k' is read by Neg 'w' as well", CACHE + K_T + REST + END + "w = Neg(past_k)  ", outputs=", float[N,4,P,8] w"),
    Kept("past turned", F, "the past comes through Transpose 'pt' from the input 'past_k'", "pt = Transpose<perm=[0,1,2,3]>(past_k)  K = Concat<axis=2>(pt, k)  V = Concat<axis=2>(past_v, v)  " + K_T + REST + END),
    Kept("keys not turned", F, "another order", "K = Concat<axis=2>(past_k, k)  V = Concat<axis=2>(past_v, v)  kt = Identity(K)  " + REST + END),
    Kept("mask of the logits", F, "depend on MatMul 'p0'", CACHE + K_T + PRODUCT + SCALED + "b = Greater(l, zero)  m = Where(b, l, hidden)  " + SOFTMAX + END),
    Kept("asymmetric int8 cache", F, "zero points", CODES.replace("no_zero", "some_zero") + READ.replace("no_zero", "some_zero") + REST + "y = MatMul(a, vd)  ", QUANTIZED),
    Kept("int8 cache, two scales", F, "have different scales", CODES + READ.replace("step", "other_step") + REST + "y = MatMul(a, vd)  ", QUANTIZED),
    Kept("Einsum", F, "Einsum 'p0' is a product that is not followed", CACHE + "p0 = Einsum<equation=\"bhsd,bhtd->bhst\">(q, K)  " + SCALED + MASKED + SOFTMAX + END),
    Kept("values scaled", F, "scales its values by", CACHE + K_T + REST + "vs = Mul(V, scale)  y = MatMul(a, vs)  "),
]
# fmt: on


@pytest.mark.parametrize("case", KEPT, ids=lambda case: case.name)
def test_kept(case):
    (site,) = read(graph(case.body, outputs=case.outputs, **case.more))[1]
    assert isinstance(site.found, Reject)
    assert (site.found.code, site.found.known) == (case.code, {"heads": 4, "head_size": D})
    assert case.words in site.found.reason


def test_joint_past():
    body = "pk = Gather<axis=0>(past, i0)  pv = Gather<axis=0>(past, i1)  K = Concat<axis=2>(pk, k)  V = Concat<axis=2>(pv, v)  "
    head = f"(float[N,4,S,{D}] q, float[N,4,S,{D}] k, float[N,4,S,{D}] v, float[2,N,4,P,{D}] past, float[N,1,S,T] mask) => (float[N,4,S,{D}] y, float[N,4,T,{D}] K, float[N,4,T,{D}] V) "
    proto = model(
        head + "{" + body + K_T + REST + END + "}", opset=18, **{n: CONSTANTS[n] for n in ("i0", "i1", "scale")}
    )
    (site,) = read(proto)[1]
    assert site.found.code == "attention_form"
    assert "Gather 'pk' from the input 'past'" in site.found.reason


@pytest.mark.parametrize(
    "body",
    [
        "z = Softmax(q)  out = Transpose<perm=[0,2,1,3]>(z)  K = Concat<axis=2>(past_k, k)  V = Concat<axis=2>(past_v, v)",
        "w = MatMul(q, square)  s = Softmax(w)  z = MatMul(s, v8)  out = Transpose<perm=[0,2,1,3]>(z)  K = Concat<axis=2>(past_k, k)  V = Concat<axis=2>(past_v, v)",
    ],
    ids=["no product", "router by a stored weight"],
)
def test_is_no_attention(body):
    proto = graph(body, tail="")
    for name in ("square", "v8"):
        if name in body:
            proto.graph.initializer.append(_named(name))
    assert read(proto)[1] == []


def _named(name):
    return numpy_helper.from_array(np.eye(D, dtype=np.float32), name)


@pytest.mark.parametrize(
    ("op", "attribute", "value"),
    [
        ("Transpose", "perm", [0, 1, 9, 2]),
        ("Transpose", "perm", 3),
        ("Softmax", "axis", "x"),
        ("Concat", "axis", [1, 2]),
        ("Concat", "axis", 7),
    ],
)
def test_malformed(op, attribute, value):
    """A sentence about the model, or a row with a reason: never a traceback."""
    proto = graph(PLAIN)
    for node in proto.graph.node:
        if node.op_type == op:
            del node.attribute[:]
            node.attribute.append(helper.make_attribute(attribute, value))
    try:
        (site,) = read(proto)[1]
    except ModelError:
        return
    assert isinstance(site.found, Reject)


def test_inside_a_branch():
    shape = "float[N,4,T,8]"
    body = PLAIN.replace("y = MatMul", "z = MatMul")
    proto = model(
        f"(bool c, float[N,4,S,8] q, float[N,4,S,8] k, float[N,4,S,8] v, float[N,4,P,8] past_k, float[N,4,P,8] past_v, float[N,1,S,T] mask) "
        f"=> (float[N,4,S,8] y, {shape} pk, {shape} pv) {{ y, pk, pv = If (c) <"
        f"then_branch = g1 () => (float[N,4,S,8] z, {shape} K, {shape} V) {{ {body} }}, "
        f"else_branch = g2 () => (float[N,4,S,8] z2, {shape} K2, {shape} V2) {{ z2 = Identity(q)  K2 = Identity(k)  V2 = Identity(v) }}> }}",
        opset=18,
        scale=CONSTANTS["scale"],
    )
    (site,) = read(proto)[1]
    assert site.found.code == "attention_form"
    assert "inside a branch or loop" in site.found.reason
