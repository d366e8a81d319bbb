"""``msd.Attention`` as onnxruntime sees it: what it refuses and how it says so, shapes, float16 graphs, the neighbour's cache."""

import numpy as np
import onnxruntime as ort
import pytest
from attention_support import INPUTS, OUTPUTS, Native, assert_same_bits, make_case, open_model, options
from msd_compiler.runtime_ops.attention.layout import LAYOUT
from msd_compiler.runtime_ops.attention.schema import SCHEMA
from onnx import TensorProto, helper

from msd_compiler.runtime import runtime_version

WHO = r"msd\.Attention \(node 'site'\): "


@pytest.fixture(scope="module")
def native():
    return Native()


def f32(*shape):
    return np.ones(shape, np.float32)


def i8(*shape):
    return np.ones(shape, np.int8)


PLAN = {"bits": 0, "dynamic": 1, "cache": 2, "causal": 3, "window": 4}

# Of a case with B 2, Hq 4, Hkv 2, S 3, L 3, P 10, D 16, Dv 20, appended.
REFUSED = {
    "query of rank 3": ({"query": f32(2, 3, 64)}, r"query has shape \[2, 3, 64\], needed \[B, Hq, S, D\]"),
    "query of rank 0": ({"query": np.float32(1)}, r"query has shape \[\], needed \[B, Hq, S, D\]"),
    "query with D 0": ({"query": f32(2, 4, 3, 0)}, r"query has shape .* with D 1 to 512"),
    "query with D 513": ({"query": f32(2, 4, 3, 513)}, r"query has shape .* with D 1 to 512"),
    "query with other columns": ({"query": f32(2, 4, 3, 15)}, r"key has shape \[2, 2, 3, 16\], needed \[2, 2, 3, 15\]"),
    "query of another batch": ({"query": f32(3, 4, 3, 16)}, r"key has shape \[2, 2, 3, 16\], needed \[3, 2, 3, 16\]"),
    "3 query heads": ({"query": f32(2, 3, 3, 16)}, "query has 3 heads and key 2, needed a multiple"),
    "0 query heads": ({"query": f32(2, 0, 3, 16)}, "query has 0 heads and key 2, needed a multiple"),
    "0 key heads": (
        {"key": f32(2, 0, 3, 16), "value": f32(2, 0, 3, 20)}, "query has 4 heads and key 0, needed a multiple",
    ),
    "key of rank 3": ({"key": f32(2, 3, 32)}, r"key has shape \[2, 3, 32\], needed \[B, Hkv, L, D\]"),
    "value of rank 3": ({"value": f32(2, 3, 32)}, r"value has shape \[2, 3, 32\], needed \[B, Hkv, L, Dv\]"),
    "value with Dv 0": ({"value": f32(2, 2, 3, 0)}, r"value has shape .* with Dv 1 to 512"),
    "value with fewer tokens": ({"value": f32(2, 2, 2, 20)}, r"value has shape \[2, 2, 2, 20\], needed \[2, 2, 3, 20\]"),
    "value with fewer heads": ({"value": f32(2, 1, 3, 20)}, r"value has shape \[2, 1, 3, 20\], needed \[2, 2, 3, 20\]"),
    "cache of rank 3": ({"past_key": i8(2, 2, 160)}, r"past_key has shape \[2, 2, 160\], needed \[B, Hkv, P, bytes\]"),
    "cache with other columns": ({"past_key": i8(2, 2, 10, 8)}, r"past_key has shape .* needed \[2, 2, 10, 16\]"),
    "cache of another batch": ({"past_key": i8(1, 2, 10, 16)}, r"past_key has shape .* needed \[2, 2, 10, 16\]"),
    "caches of two lengths": ({"past_value": i8(2, 2, 9, 20)}, r"past_value has shape .* needed \[2, 2, 10, 20\]"),
    "value cache of rank 5": ({"past_value": i8(2, 2, 10, 20, 1)}, r"past_value has shape .* needed \[2, 2, 10, 20\]"),
    "key scale of rank 0": ({"key_scale": np.float32(1)}, r"key_scale has shape \[\], needed \[1, 1, 1, 1\] or \[1, 2, 1, 16\]"),
    "key scale of one head": ({"key_scale": f32(1, 1, 1, 16)}, r"key_scale has shape \[1, 1, 1, 16\], needed"),
    "value scale of key": ({"value_scale": f32(1, 2, 1, 16)}, r"value_scale has .* needed \[1, 1, 1, 1\] or \[1, 2, 1, 20\]"),
    "scales of tokens": ({"key_scale": f32(2, 2, 10, 1)}, r"key_scale has shape \[2, 2, 10, 1\], needed"),
    "scales once if dynamic": ({"dynamic": 1}, r"key_scale has shape \[1, 1, 1, 1\], needed \[2, 2, 10, 1\]"),
    "mask of rank 2": ({"mask": f32(3, 13)}, r"mask has shape \[3, 13\], needed \[2, 4, 3, 13\] \(or more tokens\), or 1"),
    "mask with fewer tokens": ({"mask": f32(1, 1, 3, 12)}, r"mask has shape .* needed \[2, 4, 3, 13\]"),
    "mask with fewer queries": ({"mask": f32(1, 1, 2, 13)}, r"mask has shape .* needed \[2, 4, 3, 13\]"),
    "mask with key heads": ({"mask": f32(1, 2, 3, 13)}, r"mask has shape .* needed \[2, 4, 3, 13\]"),
    "mask of another batch": ({"mask": f32(3, 1, 1, 13)}, r"mask has shape .* needed \[2, 4, 3, 13\]"),
    "mask empty": ({"mask": f32(1, 1, 1, 0)}, r"mask has shape .* needed \[2, 4, 3, 13\]"),
    "sinks of key heads": ({"sinks": f32(2)}, r"sinks has shape \[2\], needed \[4\], or \[1\] with -Inf"),
    "one sink": ({"sinks": f32(1)}, r"sinks has shape \[1\], needed \[4\], or \[1\] with -Inf for none"),
    "sinks of rank 0": ({"sinks": np.float32(-np.inf)}, r"sinks has shape \[\], needed \[4\]"),
    "lengths of rank 0": ({"lengths": np.int64(3)}, r"lengths has shape \[\], needed \[1\] or \[2\]"),
    "lengths of 3": ({"lengths": np.ones(3, np.int64)}, r"lengths has shape \[3\], needed \[1\] or \[2\]"),
    "lengths empty": ({"lengths": np.ones(0, np.int64)}, r"lengths has shape \[0\], needed \[1\] or \[2\]"),
    "length negative": ({"lengths": np.array([3, -1])}, "lengths has -1, needed 0 to 10: the cache holds 10 tokens"),
    "length beyond": ({"lengths": np.array([11, 3])}, "lengths has 11, needed 0 to 10"),
    "length huge": ({"lengths": np.array([2**63 - 1])}, "lengths has 9223372036854775807, needed 0 to 10"),
    "length lowest": ({"lengths": np.array([-(2**63)])}, "lengths has -9223372036854775808"),
    "plan too short": ({"plan": np.array([8, 0, 0, 1])}, r"plan has shape \[4\], needed \[5\]: bits, dynamic, cache"),
    "plan of rank 2": ({"plan": np.array([[8, 0, 0, 1, 0]])}, r"plan has shape \[1, 5\], needed \[5\]"),
    "bits 4": ({"bits": 4}, "plan has bits = 4, needed 8 for the cache's element type"),
    "bits 2**32 + 8": ({"bits": 2**32 + 8}, "plan has bits = 4294967304"),
    "dynamic 2": ({"dynamic": 2}, "plan has dynamic = 2, needed 0 or 1"),
    "cache": ({"cache": 1}, "plan has cache = 1, needed 0 for cache = 'append'"),
    "causal -1": ({"causal": -1}, "plan has causal = -1, needed 0 or 1"),
    "window -1": ({"window": -1}, r"plan has window = -1, needed 0 \(none\) or more"),
    "factors of 3": ({"factors": f32(3)}, r"factors has shape \[3\], needed \[2\]: softmax scale, soft cap"),
    "scale NaN": ({"factors": np.array([np.nan, 0], np.float32)}, "factors has scale = nan, needed a finite number"),
    "cap negative": ({"factors": np.array([1, -30], np.float32)}, "factors has soft cap = -30.*, needed 0"),
    "cap NaN": ({"factors": np.array([1, np.nan], np.float32)}, "factors has soft cap = nan, needed 0"),
    "cap tiny": ({"factors": np.array([1, 1e-40], np.float32)}, "factors has soft cap = .*, needed 0"),
}  # fmt: skip


def small_case(**changes):
    return make_case(batch=2, heads=2, group=2, queries=3, past=10, columns=16, value_columns=20, **changes)


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(native, case):
    changes, message = REFUSED[case]
    fed = small_case()
    feed = fed.operands | {key: np.asarray(new) for key, new in changes.items() if key in INPUTS}
    for name, at in PLAN.items():
        if name in changes:
            feed["plan"] = feed["plan"].copy()
            feed["plan"][at] = changes[name]
    with pytest.raises(Exception, match=WHO + message):
        native.session(fed).run(None, feed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": np.array([8])}, "lengths has 8, needed 0 to 7: the cache has room for 10 tokens, 3 are new"),
        ({"past_key": i8(2, 2, 2, 16), "past_value": i8(2, 2, 2, 20)}, "lengths has .*, needed 0 to -1"),
        ({"mask": f32(1, 1, 3, 9)}, r"mask has shape .* needed \[2, 4, 3, 10\]"),
    ],
)
def test_refuses_of_a_shared_cache(native, changes, message):
    fed = small_case(shared=True)
    with pytest.raises(Exception, match=WHO + message):
        native.session(fed).run(None, fed.operands | changes)


def test_refuses_bytes_of_4_bits(native):
    fed = small_case(bits=4)
    with pytest.raises(Exception, match=WHO + r"past_key has shape \[2, 2, 10, 16\], needed \[2, 2, 10, 8\]"):
        native.session(fed).run(None, fed.operands | {"past_key": np.ones((2, 2, 10, 16), np.uint8)})


def test_empty_tensors_of_any_size(native):
    """A batch that fits no memory, of nothing: no loop and no allocation may follow it."""
    fed = small_case().operands
    empty = {k: np.zeros((2**40, fed[k].shape[1], 0, fed[k].shape[3]), fed[k].dtype) for k in INPUTS[:5]}
    y, *_ = native.session(small_case()).run(None, fed | empty | {"lengths": np.array([0])})
    assert y.shape == (2**40, 4, 0, 20)


def test_survives_what_it_refused(native):
    fed = small_case()
    with pytest.raises(Exception, match="needed"):
        native.session(fed).run(None, fed.operands | {"lengths": np.array([-1])})
    assert_same_bits(native(fed), fed.reference())


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"layout": "attention/2"}, "the cache has layout 'attention/2', this library reads 'attention/1'"),
        ({"layout": None}, "attribute layout is absent, needed 'attention/1'"),
        ({"layout": 1}, "attribute layout is absent, needed 'attention/1'"),
        ({"cache": "ring"}, "attribute cache is 'ring', needed 'append', 'shared' or 'grow'"),
        ({"cache": None}, "attribute cache is absent, needed 'append', 'shared' or 'grow'"),
        ({"output_dtype": None}, "attribute output_dtype is absent"),
        ({"output_dtype": 11}, "output_dtype is 11, needed query's element type, 1"),
    ],
)
def test_refuses_at_load(attributes, message):
    with pytest.raises(Exception, match=WHO + message):
        ort.InferenceSession(open_model(**attributes).SerializeToString(), options())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("key", TensorProto.FLOAT16), ("past_value", TensorProto.UINT8), ("lengths", TensorProto.INT32)],
)
def test_refuses_types_at_load(name, dtype):
    model = open_model()
    next(i for i in model.graph.input if i.name == name).type.tensor_type.elem_type = dtype
    with pytest.raises(Exception, match="Attention"):
        ort.InferenceSession(model.SerializeToString(), options())


def test_float16_node_between_float_nodes(variant):
    """onnxruntime runs a float16 node in float where its neighbours have no float16 kernel, and drops the casts."""
    case = make_case(queries=3, dtype=np.float16, columns=20)
    model = open_model(np.float16)
    model.graph.node[0].input[0], model.graph.node[0].output[0] = "q", "h"
    model.graph.node.insert(0, helper.make_node("Add", ["query", "query"], ["q"]))
    model.graph.node.append(helper.make_node("Add", ["h", "h"], ["Y"]))
    session = ort.InferenceSession(model.SerializeToString(), options())
    (y,) = session.run(["Y"], dict(case.operands))
    doubled = case.but(query=2 * case.operands["query"])
    np.testing.assert_array_equal(y, 2 * doubled.reference().y)


def test_inferred_shape():
    model = open_model()
    for tensor, shape in [("query", ["b", 4, "s", 16]), ("value", ["b", 2, "s", 20])]:
        value = next(i for i in model.graph.input if i.name == tensor)
        value.CopyFrom(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, shape))
    (y, *_) = ort.InferenceSession(model.SerializeToString(), options()).get_outputs()
    assert y.shape == ["b", 4, "s", 20]


def test_many_callers_at_once(native):
    from concurrent.futures import ThreadPoolExecutor

    cases = [make_case(heads=2, group=2, queries=1 + 5 * i, past=300 * i, columns=32, seed=i) for i in range(4)]
    session = native.session(cases[0], 2)
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda case: session.run(["Y"], case.operands)[0], cases * 4))
    for case, y in zip(cases * 4, outputs, strict=True):
        np.testing.assert_array_equal(y, case.reference().y)


def test_schema_and_reference_agree():
    assert [parameter.name for parameter in SCHEMA.inputs] == INPUTS
    assert [parameter.name for parameter in SCHEMA.outputs] == OUTPUTS
    assert (SCHEMA.domain, SCHEMA.name) == ("msd", "Attention")
    assert sorted(SCHEMA.attributes) == ["cache", "layout", "output_dtype"]
    assert LAYOUT == "attention/1"


def group_query_attention(case, **attributes):
    """The same call of onnxruntime's own op: ``(y, present_key, present_value)``."""
    o = case.operands
    b, heads, s, _ = o["query"].shape
    per = "PER_CHANNEL" if o["key_scale"].size > 1 else "PER_TENSOR"
    cache = TensorProto.INT8 if case.plan.bits == 8 else TensorProto.UINT8
    node = helper.make_node(
        "GroupQueryAttention",
        ["q", "k", "v", "pk", "pv", "lengths", "total", *[""] * 3, "bias", "", "ks", "vs"],
        ["y", "prk", "prv"],
        domain="com.microsoft",
        num_heads=heads,
        kv_num_heads=o["key"].shape[1],
        k_quant_type=per,
        v_quant_type=per,
        kv_cache_bit_width=case.plan.bits,
        scale=float(o["factors"][0]),
        softcap=float(o["factors"][1]),
        local_window_size=case.plan.window or -1,
        **attributes,
    )
    total = o["past_key"].shape[2] + o["key"].shape[2]
    mask = np.broadcast_to(o["mask"], (1, 1, s, total if o["mask"].shape[3] == 1 else o["mask"].shape[3]))
    feed = {
        **{n: o[k].transpose(0, 2, 1, 3).reshape(b, s, -1) for n, k in (("q", "query"), ("k", "key"), ("v", "value"))},
        **{"pk": o["past_key"], "pv": o["past_value"], "bias": np.ascontiguousarray(mask)},
        **{"ks": o["key_scale"].reshape(-1), "vs": o["value_scale"].reshape(-1)},
        **{"lengths": np.full(b, total - 1, np.int32), "total": np.array(total, np.int32)},
    }
    kinds = dict.fromkeys(feed, TensorProto.FLOAT) | {"pk": cache, "pv": cache}
    kinds |= {"lengths": TensorProto.INT32, "total": TensorProto.INT32}
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "theirs",
        [value(n, t, None) for n, t in kinds.items()],
        [value("y", TensorProto.FLOAT, None), value("prk", cache, None), value("prv", cache, None)],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    y, key, val = ort.InferenceSession(model.SerializeToString(), options()).run(None, feed)
    return y.reshape(b, s, heads, -1).transpose(0, 2, 1, 3), key, val


@pytest.mark.skipif(runtime_version() < (1, 27), reason="its cache has codes since 1.27")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("scales", ["tensor", "channel"])
@pytest.mark.parametrize("changes", [{}, {"window": 5}, {"cap": 3}, {"mask": True}, {"cap": 3, "mask": True}])
def test_the_same_cache_as_group_query_attention(native, bits, scales, changes):
    """Codes of new tokens to the bit, ties and clipping included; the result as far as theirs in float32 goes."""
    if "mask" in changes:
        changes = changes | {"mask": np.random.default_rng(1).normal(size=(1, 1, 3, 15))}
    case = make_case(heads=2, group=2, queries=3, past=12, bits=bits, scales=scales, columns=16, **changes)
    steps = np.random.default_rng(2).integers(-140, 140, case.operands["key"].shape) / np.float32(2)
    case = case.but(key=(steps * case.operands["key_scale"]).astype(np.float32))
    y, key, value = group_query_attention(case)
    ours = native(case)
    np.testing.assert_array_equal(ours.present_key, key)
    np.testing.assert_array_equal(ours.present_value, value)
    assert np.linalg.norm(ours.y - y) / np.linalg.norm(y) <= 5e-4
