"""An attention of the result alone, against float64 over the same codes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from .attention import AttentionSite, CachePlan
from .compare import max_abs, relative_l2
from .report import SiteError
from .runtime import SAY_NOTHING, open_model, run
from .runtime_ops.attention.layout import APPEND, Plan, pack_codes, unpack_codes
from .source import Source

PAST, TOKENS = 300, 3
"""More than a tile of 256, and a query beside the last."""

TOLERANCE = 5e-4
"""Largest relative L2: probabilities keep 16 bits."""

_OPSET, _IR = 17, 8
_INPUTS = ("query", "key", "value", "past_key", "past_value", "key_scale", "value_scale")


@dataclass(frozen=True)
class RewrittenAttention:
    """One ``msd.Attention`` of the result and what it stands for."""

    site: str
    node: onnx.NodeProto
    fact: AttentionSite
    cache: CachePlan


def attention_error(result: Source, product: RewrittenAttention, seed: int) -> SiteError:
    """Run the op on random tokens and a random cache, appended to.

    Raises:
        RuntimeRefused: it does not run.
    """
    fact, cache = product.fact, product.cache
    plan = Plan(cache.bits, cache.dynamic, APPEND, fact.causal, fact.window)
    feed = _random_feed(fact, cache, plan, np.random.default_rng(seed))
    value = helper.make_tensor_value_info
    names = [*_INPUTS, "mask", "sinks", "lengths", "plan", "factors"]
    outputs = ["y", "present_key", "present_value", "present_key_scale", "present_value_scale"]
    node = helper.make_node(
        "Attention",
        names,
        outputs,
        name=product.node.name,
        domain="msd",
        **{a.name: helper.get_attribute_value(a) for a in product.node.attribute if a.name == "layout"},
        cache=plan.kind,
        output_dtype=TensorProto.FLOAT,
    )
    types = [TensorProto.FLOAT, *[TensorProto.INT8 if cache.bits == 8 else TensorProto.UINT8] * 2, TensorProto.FLOAT]
    alone = helper.make_model(
        helper.make_graph(
            [node],
            "site",
            [value(n, helper.np_dtype_to_tensor_dtype(feed[n].dtype), feed[n].shape) for n in names],
            [value(n, t, None) for n, t in zip(outputs, [*types, TensorProto.FLOAT], strict=True)],
        ),
        opset_imports=[helper.make_opsetid("", _OPSET), helper.make_opsetid("msd", 1)],
        ir_version=_IR,
    )
    session = open_model(alone, result.folder, name=f"attention {product.site!r}", log_severity_level=SAY_NOTHING)
    y, *present = run(session, None, feed)
    expected = float64_attention(fact, cache, feed["query"], present, float(feed["factors"][0]))
    return SiteError(
        node=product.site, relative_l2=relative_l2(y, expected), max_abs=max_abs(y, expected), tolerance=TOLERANCE
    )


def _random_feed(fact: AttentionSite, cache: CachePlan, plan: Plan, rng: np.random.Generator) -> dict[str, np.ndarray]:
    feed: dict[str, np.ndarray] = {
        "query": rng.standard_normal((1, fact.heads, TOKENS, fact.head_size)).astype(np.float32)
    }
    sides = (("key", fact.head_size, cache.key_scale), ("value", fact.value_head_size, cache.value_scale))
    for name, size, scale in sides:
        if scale is None:
            scale = rng.uniform(0.5, 1.5, (1, fact.kv_heads, PAST, 1)).astype(np.float32) / plan.largest
        shape = (1, fact.kv_heads, PAST, size)
        codes = rng.integers(-plan.largest, plan.largest + 1, shape).astype(np.int8)
        fresh = (
            rng.standard_normal((1, fact.kv_heads, TOKENS, size)) * scale.mean(axis=2, keepdims=True) * plan.largest / 3
        )
        feed |= {name: fresh.astype(np.float32), f"past_{name}": pack_codes(codes, plan.bits), f"{name}_scale": scale}
    # The logits' spread is what the scales make of it; the factor brings it to that of a trained model's.
    spread = float(np.mean(feed["key_scale"])) * plan.largest * np.sqrt(fact.head_size / 3)
    return feed | {
        "mask": np.zeros((1, 1, 1, 1), np.float32),
        "sinks": np.array([-np.inf], np.float32),
        "lengths": np.array([PAST], np.int64),
        "plan": plan.tensor(),
        "factors": np.array([1 / max(spread, 1e-30), fact.soft_cap], np.float32),
    }


def float64_attention(
    fact: AttentionSite, cache: CachePlan, query: np.ndarray, present: list[np.ndarray], scale: float
) -> np.ndarray:
    """Attention over a cache's codes, nothing rounded.

    Args:
        query: ``[B, Hq, S, D]``.
        present: keys, values, and their scales, as the op returns them.
        scale: factor of the logits.
    """
    codes = [
        unpack_codes(p, s, cache.bits) for p, s in zip(present[:2], (fact.head_size, fact.value_head_size), strict=True)
    ]
    keys, values = (c.astype(np.float64) * s for c, s in zip(codes, present[2:], strict=True))
    group = fact.heads // fact.kv_heads
    logits = query.astype(np.float64) @ np.repeat(keys, group, axis=1).swapaxes(2, 3) * scale
    if fact.soft_cap:
        logits = fact.soft_cap * np.tanh(logits / fact.soft_cap)
    token = np.arange(keys.shape[2])
    position = (keys.shape[2] - query.shape[2] + np.arange(query.shape[2]))[:, None]
    hidden = np.zeros(logits.shape[2:], bool)
    if fact.causal:
        hidden |= token > position
    if fact.window:
        hidden |= token <= position - fact.window
    logits = np.where(hidden, -np.inf, logits)
    weights = np.exp(logits - logits.max(axis=3, keepdims=True))
    y: np.ndarray = weights / weights.sum(axis=3, keepdims=True) @ np.repeat(values, group, axis=1)
    return y
