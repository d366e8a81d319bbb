"""Attention as one op, of ONNX and of onnxruntime, and what is not followed with its reason code."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from attention_facts import assert_facts, linked_of
from msd_compiler.passes import ATTENTION_READERS
from support import model, needs_opset

from msd_compiler.attention import AttentionSite
from msd_compiler.errors import ModelError
from msd_compiler.facts import Reject
from msd_compiler.reader import find_sites

B, S, P, T, D, DV = 2, 3, 5, 8, 8, 6
FOUR = f"float[N,4,S,{D}] q, float[N,2,S,{D}] k, float[N,2,S,{DV}] v, float[N,2,P,{D}] past_k, float[N,2,P,{DV}] past_v"
THREE = f"float[N,S,32] q, float[N,S,16] k, float[N,S,12] v, float[N,2,P,{D}] past_k, float[N,2,P,{DV}] past_v"
ALIKE = f"float[N,S,32] q, float[N,S,32] k, float[N,S,32] v, float[N,4,P,{D}] past_k, float[N,4,P,{D}] past_v"
CACHES = f", float[N,2,T,{D}] K, float[N,2,T,{DV}] V"
OUT_4 = f"float[N,4,S,{DV}] y" + CACHES
OUT_3 = f"float[N,S,{4 * DV}] y" + CACHES
OUT_ALIKE = f"float[N,S,32] y, float[N,4,T,{D}] K, float[N,4,T,{D}] V"
HEADS = "q_num_heads=4, kv_num_heads=2"


@dataclass(frozen=True)
class Call:
    name: str
    inputs: str
    outputs: str
    body: str
    expected: dict = field(default_factory=dict)
    opset: int = 24
    tensors: dict = field(default_factory=dict)

    def proto(self):
        return model(f"({self.inputs}) => ({self.outputs}) {{ {self.body} }}", opset=self.opset, **self.tensors)


def feed_of(call):
    rng = np.random.default_rng(0)
    sizes = {"N": B, "S": S, "P": P, "T": T}
    feed = {}
    for declared in call.inputs.replace("] ", "]|").split(", "):
        kind, name = declared.split("|")
        dims = [sizes[d] if d in sizes else int(d) for d in kind[kind.index("[") + 1 : -1].split(",")]
        feed[name] = rng.standard_normal(dims).astype(np.float32)
        if kind.startswith("bool"):
            feed[name] = np.tril(np.ones(dims, bool), P) & (rng.random(dims) < 0.8)
            feed[name][..., 0] = True  # runtimes differ in what they give for a row that sees nothing
        if name == "valid":
            feed[name] = np.array([4, 8], np.int64)
        if name == "at":
            feed[name] = np.array([1, 5], np.int64)
    return feed


def attention(attributes="", operands="q, k, v, , past_k, past_v", outputs="y, K, V"):
    return f"{outputs} = Attention{f'<{attributes}>' if attributes else ''}({operands})"


OUTSIDE = "K = Concat<axis=2>(past_k, k)  V = Concat<axis=-2>(past_v, v)  "
SCATTERED = "K = TensorScatter(past_k, k, at)  V = TensorScatter(past_v, v, at)  "
ROOM = FOUR.replace(",P,", ",T,") + ", int64[N] at, int64[N] valid"
REPEATED = OUTSIDE + "".join(
    f"{x}u = Unsqueeze({x}, two)  {x}e = Expand({x}u, groups)  {x}r = Reshape({x}e, {x}four)  " for x in "KV"
)
REPEATS = {
    "two": np.array([2], np.int64),
    "groups": np.array([1, 1, 2, 1, 1], np.int64),
    "Kfour": np.array([0, 4, -1, D], np.int64),
    "Vfour": np.array([0, 4, -1, DV], np.int64),
}
MASK = ", float[S,T] mask"
# fmt: off
MHA = "y, K, V = com.microsoft.MultiHeadAttention<num_heads=4{}>(q, k, v, , , {}, past_k, past_v)"
TAKEN = [
    Call("4 dimensions", FOUR, OUT_4, attention()),
    Call("3 dimensions", THREE, OUT_3, attention(HEADS), {"packed": True}),
    Call("opset 23", FOUR, OUT_4, attention(), opset=23),
    Call("causal", FOUR, OUT_4, attention("is_causal=1"), {"causal": True}),
    Call("scale", FOUR, OUT_4, attention("scale=0.25"), {"scale": 0.25}),
    Call("soft cap", FOUR, OUT_4, attention("softcap=2.0"), {"soft_cap": 2.0}),
    Call("float mask", FOUR + MASK, OUT_4, attention(operands="q, k, v, mask, past_k, past_v"), {"mask_rank": 2}),
    Call("bool mask", FOUR + ", bool[N,1,S,T] mask", OUT_4, attention("is_causal=1", "q, k, v, mask, past_k, past_v"), {"mask_is_bool": True, "causal": True}),
    Call("mask of 3 dimensions", THREE + ", bool[1,S,T] mask", OUT_3, attention(HEADS, "q, k, v, mask, past_k, past_v"), {"mask_is_bool": True, "mask_rank": 3, "packed": True}),
    Call("cache outside", FOUR + MASK, OUT_4, OUTSIDE + attention("scale=0.5", "q, K, V, mask", "y"), {"scale": 0.5, "mask_rank": 2, "form": "Concat -> Attention"}),
    Call("cache outside, heads repeated", FOUR + ", bool[N,1,S,T] mask", OUT_4, REPEATED + attention("", "q, Kr, Vr, mask", "y"), {"mask_is_bool": True, "form": "Concat -> Attention"}, tensors=REPEATS),
    Call("scattered cache", ROOM, OUT_4, SCATTERED + attention("is_causal=1", "q, K, V, , , , valid", "y"), {"causal": True, "valid": "valid", "at": "at", "form": "TensorScatter -> Attention"}),
    Call("scattered cache, mask", ROOM + ", bool[N,1,S,T] mask", OUT_4, SCATTERED + attention("", "q, K, V, mask, , , valid", "y"), {"valid": "valid", "at": "at", "mask_is_bool": True, "form": "TensorScatter -> Attention"}),
    Call("MultiHeadAttention", ALIKE, OUT_ALIKE, MHA.format("", ""), {"packed": True, "kv_heads": 4, "value_head_size": D, "form": "MultiHeadAttention"}),
    Call("MultiHeadAttention, causal, scale", ALIKE, OUT_ALIKE, MHA.format(", unidirectional=1, scale=0.3", ""), {"packed": True, "kv_heads": 4, "value_head_size": D, "causal": True, "scale": 0.3, "form": "MultiHeadAttention"}),
    Call("MultiHeadAttention, mask", ALIKE + ", float[N,4,S,T] mask", OUT_ALIKE, MHA.format("", "mask"), {"packed": True, "kv_heads": 4, "value_head_size": D, "form": "MultiHeadAttention"}),
]
# fmt: on


def read(call):
    linked = linked_of(call.proto())
    return linked, find_sites(linked, ATTENTION_READERS, ())


def fact_of(call):
    linked, sites = read(call)
    (site,) = sites
    assert isinstance(site.found, AttentionSite), site.found.reason
    return linked, sites, site.found


@pytest.mark.parametrize("call", TAKEN, ids=lambda call: call.name)
def test_fact(call):
    _, _, fact = fact_of(call)
    expected = {
        "heads": 4, "kv_heads": 2, "head_size": D, "value_head_size": DV, "element_type": 1, "soft_cap": 0.0, "causal": False,
        "window": 0, "packed": False, "mask_rank": 4, "mask_is_bool": False, "more_masks": (), "rows": "N*S", "form": "Attention",
        "rotary": None, "sinks": None, "lengths": None, "shape_readers": (),
    } | call.expected  # fmt: skip
    places = {
        "scale": expected.pop("scale", D**-0.5),
        "valid": expected.pop("valid", None),
        "at": expected.pop("at", None),
    }
    assert {name: getattr(fact, name) for name in expected} == expected
    assert fact.scale == pytest.approx(places["scale"], rel=1e-6)
    assert (fact.valid and fact.valid.name) == places["valid"]
    assert (fact.key_cache.at and fact.key_cache.at.name) == places["at"]
    assert (fact.q.name, fact.k.name, fact.v.name, fact.y.name) == ("q", "k", "v", "y")
    assert [c.past.name for c in (fact.key_cache, fact.value_cache)] == ["past_k", "past_v"]
    assert [c.present.name for c in (fact.key_cache, fact.value_cache)] == ["K", "V"]
    assert (fact.mask and fact.mask.name) == ("mask" if " mask" in call.inputs else None)


@pytest.mark.parametrize("call", TAKEN, ids=lambda call: call.name)
def test_means_what_the_runtime_computes(call):
    needs_opset(call.opset)
    linked, sites, _ = fact_of(call)
    assert assert_facts(linked, sites, feed_of(call)) == 1


def test_window():
    """Opset 25 has windows; ``left_window_size`` leaves out the token itself."""
    _, _, fact = fact_of(Call("", FOUR, OUT_4, attention("left_window_size=2, right_window_size=0"), opset=25))
    assert (fact.window, fact.causal) == (3, True)


FORM, NO_CACHE = "attention_form", "no_cache"
# fmt: off
KEPT = [
    (NO_CACHE, "both products", Call("no cache", FOUR, OUT_4, OUTSIDE + attention("", "q, k, v", "y"))),
    (NO_CACHE, "both products", Call("no past", FOUR, OUT_4, attention("", "q, k, v"))),
    (FORM, "also returns its logits", Call("logits", FOUR, OUT_4 + ", float[N,4,S,T] l", attention("qk_matmul_output_mode=1", outputs="y, K, V, l"))),
    (FORM, "right_window_size 1", Call("window of later tokens", FOUR, OUT_4, attention("right_window_size=1"), opset=25)),
    (FORM, "attribute 'new_one'", Call("unknown attribute", FOUR, OUT_4, attention("new_one=1"))),
    (FORM, "counts queries from the start", Call("causal, cache outside", FOUR, OUT_4, OUTSIDE + attention("is_causal=1", "q, K, V", "y"))),
    (FORM, "come from no cache", Call("keys alone", FOUR, f"float[N,4,S,{DV}] y, float[N,2,T,{D}] K", "K = Concat<axis=2>(past_k, k)  " + attention("", "q, K, v", "y"))),
    (FORM, "does not return its keys", Call("no present", FOUR, f"float[N,4,S,{DV}] y", attention(outputs="y"))),
    (FORM, "no input of the model", Call("computed past", FOUR, OUT_4, "p = Neg(past_k)  " + attention(operands="q, k, v, , p, past_v"))),
    (FORM, "is read by Neg", Call("past read elsewhere", FOUR, OUT_4 + f", float[N,2,P,{D}] w", attention() + "  w = Neg(past_k)")),
    (FORM, "needs 4 dimensions", Call("MultiHeadAttention, unknown mask", ALIKE + ", float mask", OUT_ALIKE, MHA.format("", "mask"))),
    (FORM, "its 'bias' is not followed", Call("MultiHeadAttention, bias", ALIKE + ", float[96] b", OUT_ALIKE, "y, K, V = com.microsoft.MultiHeadAttention<num_heads=4>(q, k, v, b, , , past_k, past_v)")),
    (FORM, "packed together", Call("MultiHeadAttention, packed", ALIKE + ", float[N,S,4,3,8] qkv", OUT_ALIKE, "y, K, V = com.microsoft.MultiHeadAttention<num_heads=4>(qkv, , , , , , past_k, past_v)")),
    (NO_CACHE, "both products", Call("MultiHeadAttention, no cache", ALIKE, "float[N,S,32] y", "y = com.microsoft.MultiHeadAttention<num_heads=4>(q, k, v)")),
    (NO_CACHE, "both products", Call("com.microsoft.Attention", "float[N,S,32] x, float[32,96] w, float[96] b", "float[N,S,32] y", "y = com.microsoft.Attention<num_heads=4>(x, w, b)")),
    (FORM, "multiplies by the weights", Call("com.microsoft.Attention, past", "float[N,S,32] x, float[32,96] w, float[96] b, float[2,N,4,P,8] past", "float[N,S,32] y, float[2,N,4,T,8] new", "y, new = com.microsoft.Attention<num_heads=4>(x, w, b, , past)")),
    (FORM, "room for more", Call("DecoderMaskedMultiHeadAttention", ALIKE + ", int32[1] n", OUT_ALIKE, "y, K, V = com.microsoft.DecoderMaskedMultiHeadAttention<num_heads=4, past_present_share_buffer=1>(q, k, v, , , past_k, past_v, n)")),
]
# fmt: on


@pytest.mark.parametrize(("code", "words", "call"), KEPT, ids=[call.name for *_, call in KEPT])
def test_kept(code, words, call):
    (site,) = read(call)[1]
    assert isinstance(site.found, Reject)
    assert site.found.code == code
    assert words in site.found.reason
    assert site.found.known["heads"] == 4


@pytest.mark.parametrize(
    "attributes", ['scale="x"', "is_causal=[1, 2]", 'softcap="y"', "q_num_heads=[0], kv_num_heads=0"]
)
def test_malformed(attributes):
    """A sentence about the model, or a row with a reason: never a traceback."""
    try:
        (site,) = read(Call("", FOUR, OUT_4, attention(attributes)))[1]
    except ModelError:
        return
    assert isinstance(site.found, Reject)
