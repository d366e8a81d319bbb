"""GroupQueryAttention over a low-bit cache, rewritten: against the op itself, without optimizations, in its own runtime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import run

import msd_compiler
from msd_compiler.compare import relative_l2
from msd_compiler.facts import ReasonCode
from msd_compiler.report import Outcome
from msd_compiler.runtime import runtime_version

RUNTIME = runtime_version()
pytestmark = pytest.mark.skipif(RUNTIME < (1, 27), reason="GroupQueryAttention keeps a low-bit cache from 1.27 on")

HEADS, KV_HEADS, SIZE = 4, 2, 16
TOLERANCE = 5e-4


def gqa(
    *,
    batch: int = 1,
    tokens: int = 1,
    past: int = 10,
    seqlens: list[int] | None = None,
    packed: bool = False,
    rotary: bool = False,
    interleaved: bool = False,
    positions: bool = False,
    bias: bool = False,
    sink: bool = False,
    kind: str = "PER_TENSOR",
    bits: int = 8,
    float_cache: bool = False,
    **attributes: object,
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model of one node and its feed."""
    rng = np.random.default_rng(0)
    total = (max(seqlens) if seqlens else past + tokens - 1) + 1
    wide = HEADS * SIZE + 2 * KV_HEADS * SIZE
    columns = {"q": wide} if packed else {"q": HEADS * SIZE, "k": KV_HEADS * SIZE, "v": KV_HEADS * SIZE}
    feed = {name: rng.standard_normal((batch, tokens, n)).astype(np.float32) for name, n in columns.items()}
    shape = (batch, KV_HEADS, past, SIZE // 2 if bits == 4 and not float_cache else SIZE)
    for name in ("pk", "pv"):
        if float_cache:
            feed[name] = rng.standard_normal(shape).astype(np.float32)
        elif bits == 8:
            feed[name] = rng.integers(-127, 128, shape).astype(np.int8)
        else:
            feed[name] = rng.integers(0, 256, shape).astype(np.uint8)
    feed["lens"] = np.array(seqlens or [past + tokens - 1] * batch, np.int32)
    stored = {"total": np.array([total], np.int32)}
    names = ["q", "", "", "pk", "pv", "lens", "total"] if packed else ["q", "k", "v", "pk", "pv", "lens", "total"]
    names += [""] * 7
    if rotary:
        angles = rng.uniform(0, 6, (64, SIZE // 2))
        stored |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
        names[7:9] = ["cos", "sin"]
        attributes |= {"do_rotary": 1, "rotary_interleaved": int(interleaved)}
    if positions:
        start = feed["lens"].astype(np.int64)[:, None] + 1 - tokens
        feed["positions"] = start + np.arange(tokens)
        names[9] = "positions"
    if bias:
        feed["bias"] = rng.standard_normal((batch, HEADS, tokens, total)).astype(np.float32)
        names[10] = "bias"
    if sink:
        stored["sink"] = rng.standard_normal(HEADS).astype(np.float32)
        names[11] = "sink"
    if not float_cache:
        n = 1 if kind == "PER_TENSOR" else KV_HEADS * SIZE
        step = 0.02 if bits == 8 else 0.3
        stored |= {name: rng.uniform(step, 2 * step, n).astype(np.float32) for name in ("ks", "vs")}
        names[12:14] = ["ks", "vs"]
        attributes |= {"k_quant_type": kind, "v_quant_type": kind, "kv_cache_bit_width": bits}
    while not names[-1]:
        names.pop()
    node = helper.make_node(
        "GroupQueryAttention",
        names,
        ["y", "present_k", "present_v"],
        "gqa",
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=KV_HEADS,
        **attributes,
    )
    value, cache = helper.make_tensor_value_info, TensorProto.FLOAT
    if not float_cache:
        cache = TensorProto.INT8 if bits == 8 else TensorProto.UINT8
    inputs = [value(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in feed.items()]
    dims = [batch, KV_HEADS, "present", shape[3]]
    outputs = [value("y", TensorProto.FLOAT, [batch, tokens, HEADS * SIZE])]
    outputs += [value(n, cache, dims) for n in ("present_k", "present_v")]
    graph = helper.make_graph([node], "g", inputs, outputs, [numpy_helper.from_array(v, n) for n, v in stored.items()])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), feed


CASES = {
    "decode": {},
    "prefill": {"tokens": 7, "past": 0},
    "continued": {"tokens": 5, "past": 12},
    "room": {"past": 30, "seqlens": [12]},
    "ragged": {"batch": 3, "past": 30, "seqlens": [12, 3, 29]},
    "ragged, growing": {"batch": 2, "past": 12, "seqlens": [12, 3]},
    "per channel": {"kind": "PER_CHANNEL", "tokens": 3},
    "4 bits": {"bits": 4, "tokens": 3},
    "4 bits per channel": {"bits": 4, "kind": "PER_CHANNEL"},
    "packed": {"packed": True, "tokens": 4},
    "rotary": {"rotary": True, "tokens": 4},
    "rotary, packed, ragged": {"rotary": True, "packed": True, "batch": 2, "past": 30, "seqlens": [12, 3]},
    "rotary, interleaved": {"rotary": True, "interleaved": True, "tokens": 4},
    "rotary, positions": {"rotary": True, "positions": True, "tokens": 4},
    "scale": {"scale": 0.5, "tokens": 3},
    "window": {"local_window_size": 4, "tokens": 3},
    "soft cap": {"softcap": 2.0, "tokens": 3},
    "bias": {"bias": True, "tokens": 3},
    "sinks": {"sink": True, "tokens": 3},
    "smooth softmax": {"smooth_softmax": 1, "tokens": 3},
    "long": {"past": 700, "tokens": 2},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("portable", [False, True], ids=["native", "portable"])
def test_as_the_op_itself(case, portable):
    source, feed = gqa(**case)
    done = msd_compiler.compile(source, verify=False)
    (row,) = done.report.sites
    assert (row.kind, row.outcome, row.heads, row.kv_heads, row.head_size) == (
        "attention", Outcome.REWRITTEN, HEADS, KV_HEADS, SIZE,
    )  # fmt: skip
    assert row.cache_bytes == row.source_cache_bytes == 2 * KV_HEADS * SIZE * case.get("bits", 8) // 8
    expected, found = run(source, feed, portable=True), run(done.model, feed, portable=portable)
    assert relative_l2(found["y"], expected["y"]) <= TOLERANCE
    for name in ("present_k", "present_v"):
        assert found[name].shape == expected[name].shape
        past = [n + 1 for n in feed["lens"]]
        for b, valid in enumerate(past):
            codes = found[name][b, :, :valid].astype(int) - expected[name][b, :, :valid]
            assert np.abs(codes).max() <= (
                0 if not case.get("rotary") else 16
            )  # rotated values may round to a neighbour
            assert np.mean(codes != 0) <= 0.01


@pytest.mark.parametrize("samples", [False, True], ids=["dynamic", "samples"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_float_cache_made_low_bit(samples, bits):
    source, feed = gqa(float_cache=True, tokens=6, past=0, rotary=True)
    how = msd_compiler.KvCache(bits, [msd_compiler.Feed("sample", feed)] if samples else None)
    done = msd_compiler.compile(source, kv_cache=how, verify=False)  # its lengths are an input: any feed would do
    (row,) = done.report.sites
    assert row.reason_code is ReasonCode.CACHE_ROUNDED
    assert row.source_cache_bytes == 2 * KV_HEADS * SIZE * 4
    assert row.cache_bytes == 2 * KV_HEADS * (SIZE * bits // 8 + (0 if samples else 4))
    fed = dict(feed)
    for name in ("pk", "pv"):
        width = SIZE * bits // 8
        fed[name] = np.zeros((1, KV_HEADS, 0, width), np.int8 if bits == 8 else np.uint8)
        if not samples:
            fed[f"{name}_scale"] = np.zeros((1, KV_HEADS, 0, 1), np.float32)
    exact = run(source, feed, portable=True)["y"]
    for portable in (False, True):
        found = run(done.model, fed, portable=portable)
        assert relative_l2(found["y"], exact) <= (0.02 if bits == 8 else 0.2)


def test_without_the_flag_a_float_cache_stays():
    source, _ = gqa(float_cache=True)
    done = msd_compiler.compile(source, verify=False)
    assert done.model.graph == source.graph
    assert done.report.sites[0].reason_code is ReasonCode.FLOAT_CACHE


REFUSED = {
    "heads do not divide": ({"num_heads": 3}, "3 query heads do not share 2 key heads evenly"),
    "scales of another model": (
        {"kind": "PER_CHANNEL", "kv_num_heads": 1},
        "the scales of its cache are 32, neither 1 nor 1 heads of 16",
    ),
}


@pytest.mark.parametrize(("changes", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(changes, words):
    attributes = {k: changes[k] for k in changes if k.endswith("heads")}
    source, _ = gqa(**{k: v for k, v in changes.items() if k not in attributes})
    for attribute in source.graph.node[0].attribute:
        if attribute.name in attributes:
            attribute.i = attributes[attribute.name]
    (row,) = msd_compiler.inspect(source).sites
    assert (row.reason_code, words in row.reason) == (ReasonCode.ATTENTION_FORM, True), row.reason
