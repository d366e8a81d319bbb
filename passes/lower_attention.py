"""AttentionSite -> [Split, Reshape, Transpose, RotaryEmbedding] -> msd.Attention -> [Transpose, Reshape]."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from msd_compiler.runtime_ops.attention.layout import APPEND, GROW, LAYOUT, Plan
from onnx import TensorProto

from msd_compiler.attention import AttentionSite, CachePlan, Mask, caches
from msd_compiler.build import NodeBuilder
from msd_compiler.edit import Edit
from msd_compiler.linked import Linked


def plan_of_cache(site: AttentionSite, linked: Linked) -> CachePlan:
    """The plan of a cache that is low-bit already."""
    scales = []
    for cache, size in zip(caches(site), (site.head_size, site.value_head_size), strict=True):
        assert cache.codes is not None
        value = linked.array(site.scope, cache.codes.scale)
        assert value is not None
        shape = (1, site.kv_heads, 1, size)
        if value.size == 1:
            given = value.reshape(1, 1, 1, 1)
        elif cache.codes.axis is None:
            given = value.reshape(shape)
        else:
            given = np.broadcast_to(value.reshape([-1 if d == cache.codes.axis else 1 for d in range(4)]), shape)
        scales.append(np.ascontiguousarray(given, np.float32))
    assert site.key_cache.codes is not None
    key_scale, value_scale = scales
    return CachePlan(site.key_cache.codes.bits, key_scale, value_scale)


def lower_attention(site: AttentionSite, cache: CachePlan, build: NodeBuilder) -> list[onnx.NodeProto]:
    """The nodes that compute ``site.y`` and the caches with the new tokens."""
    q, k, v = _operands(site, build)
    lengths = _past_lengths(site, q, build)
    if site.rotary is not None:
        q, k = _rotated(site, q, k, lengths, build)
    q, k, v = (
        _by_head(x, heads, size, build) if site.packed else x
        for x, heads, size in (
            (q, site.heads, site.head_size),
            (k, site.kv_heads, site.head_size),
            (v, site.kv_heads, site.value_head_size),
        )
    )
    q, k = _even_out(site, cache, q, k, build)
    kind = APPEND if site.lengths is None else GROW
    plan = Plan(cache.bits, cache.dynamic, kind, site.causal, site.window)
    made = build.node_of(
        5,
        "Attention",
        q,
        k,
        v,
        str(site.key_cache.past.name),
        str(site.value_cache.past.name),
        *_scales(cache, build),
        _mask(site, build),
        _sinks(site, build),
        lengths,
        build.constant("plan", plan.tensor()),
        build.constant("factors", np.array([site.scale, site.soft_cap], np.float32)),
        domain="msd",
        name=str(site.node.name),
        layout=LAYOUT,
        cache=plan.kind,
        output_dtype=site.element_type,
    )
    node = build.nodes[-1]
    node.output[1:3] = [str(c.present.name) for c in caches(site)]
    if cache.key_scales is not None and cache.value_scales is not None:
        node.output[3:] = [cache.key_scales.present, cache.value_scales.present]
    if site.packed:
        y = build.node("Transpose", made[0], perm=[0, 2, 1, 3])
        shape = np.array([0, 0, site.heads * site.value_head_size], np.int64)
        build.node("Reshape", y, build.constant("packed", shape))
        return build.finish(site.y.name)
    node.output[0] = site.y.name
    return build.nodes


def _operands(site: AttentionSite, build: NodeBuilder) -> tuple[str, str, str]:
    if site.k is not None and site.v is not None:
        return str(site.q.name), str(site.k.name), str(site.v.name)
    sizes = [site.heads * site.head_size, site.kv_heads * site.head_size, site.kv_heads * site.value_head_size]
    q, k, v = build.split(str(site.q.name), sizes, axis=-1)
    return q, k, v


def _by_head(x: str, heads: int, size: int, build: NodeBuilder) -> str:
    """``[B, S, H * D]`` -> ``[B, H, S, D]``."""
    apart = build.node("Reshape", x, build.constant("heads", np.array([0, 0, heads, size], np.int64)))
    return build.node("Transpose", apart, perm=[0, 2, 1, 3])


def _even_out(site: AttentionSite, cache: CachePlan, q: str, k: str, build: NodeBuilder) -> tuple[str, str]:
    """Keys of columns that are alike: what they have in common taken off, large columns made smaller and their queries larger."""
    if cache.key_shift is not None:
        k = build.node("Sub", k, build.constant("key_shift", cache.key_shift))
    if cache.key_balance is not None:
        k = build.node("Mul", k, build.constant("key_balance", 1 / cache.key_balance))
        of_queries = np.repeat(cache.key_balance, site.heads // site.kv_heads, axis=1)
        q = build.node("Mul", q, build.constant("query_balance", of_queries))
    return q, k


def _past_lengths(site: AttentionSite, q: str, build: NodeBuilder) -> str:
    """``[B]`` or ``[1]`` int64: valid tokens of the past."""
    if site.lengths is None:
        return build.dimension(str(site.key_cache.past.name), 2)
    # After this call there are seqlens_k + 1. A first prompt may be padded behind: then it is longer than that.
    last = build.node("Cast", site.lengths.name, to=TensorProto.INT64)
    flat = build.node("Reshape", last, build.constant("flat", np.array([-1], np.int64)))
    total = build.node("Add", flat, build.constant("1", np.array([1], np.int64)))
    past = build.node("Sub", total, build.dimension(q, 1))
    return build.node("Max", past, build.constant("0", np.array([0], np.int64)))


def _rotated(site: AttentionSite, q: str, k: str, lengths: str, build: NodeBuilder) -> tuple[str, str]:
    rotary = site.rotary
    assert rotary is not None
    if rotary.positions is None:
        scalar = build.constant("scalar", np.array([], np.int64))
        bounds = [build.constant(str(i), np.array(i, np.int64)) for i in (0, 1)]
        tokens = build.node("Reshape", build.dimension(q, 1), scalar)
        steps = build.node("Range", bounds[0], tokens, bounds[1])
        positions = build.node("Add", build.unsqueeze(lengths, [1]), steps)
    else:
        positions = build.node("Cast", rotary.positions.name, to=TensorProto.INT64)
    rotated = [
        build.node(
            "RotaryEmbedding",
            x,
            positions,
            rotary.cos.name,
            rotary.sin.name,
            domain="com.microsoft",
            interleaved=int(rotary.interleaved),
            num_heads=heads,
        )
        for x, heads in ((q, site.heads), (k, site.kv_heads))
    ]
    return rotated[0], rotated[1]


def _scales(cache: CachePlan, build: NodeBuilder) -> tuple[str, str]:
    if cache.key_scales is not None and cache.value_scales is not None:
        return cache.key_scales.past, cache.value_scales.past
    assert cache.key_scale is not None
    assert cache.value_scale is not None
    return build.constant("key_scale", cache.key_scale), build.constant("value_scale", cache.value_scale)


def _mask(site: AttentionSite, build: NodeBuilder) -> str:
    """``[B | 1, Hq | 1, S | 1, T | 1]`` float32, all masks added."""
    masks = list(site.more_masks)
    if site.mask is not None:
        masks.insert(0, Mask(site.mask, site.mask_rank, site.mask_is_bool))
    if not masks:
        return build.constant("mask", np.zeros((1, 1, 1, 1), np.float32))
    first, *others = (_additive(mask, site, build) for mask in masks)
    for other in others:
        first = build.node("Add", first, other)
    return first


def _additive(mask: Mask, site: AttentionSite, build: NodeBuilder) -> str:
    values = str(mask.tensor.name)
    if mask.is_bool:
        seen, hidden = (build.constant(n, np.array(x, np.float32)) for n, x in (("0", 0), ("hidden", -np.inf)))
        values = build.node("Where", values, *((hidden, seen) if mask.hides else (seen, hidden)))
    elif site.element_type != TensorProto.FLOAT:
        values = build.node("Cast", values, to=TensorProto.FLOAT)
    return build.unsqueeze(values, list(range(4 - mask.rank)))


def _sinks(site: AttentionSite, build: NodeBuilder) -> str:
    if site.sinks is not None:
        return build.node("Cast", site.sinks.name, to=TensorProto.FLOAT)
    if site.smooth:
        return build.constant("sinks", np.zeros(site.heads, np.float32))
    return build.constant("sinks", np.array([-np.inf], np.float32))


def keep_shapes(site: AttentionSite, bits: int, edit: Edit) -> None:
    """Let those who ask for the shape of a tensor that goes away, or that becomes codes, still get it.

    torch's TorchScript exporter takes the head size of a result from the repeated values. The tokens are counted as those of
    the past and the new ones: a mask may depend on them, and so may not wait for the attention.
    """
    readers: list[tuple[gs.Node, tuple[int | str, ...]]] = [(r.node, r.dims) for r in site.shape_readers]
    if bits == 4:
        for cache, size in zip(caches(site), (site.head_size, site.value_head_size), strict=True):
            past = ("batch", site.kv_heads, "past", size)
            readers += [(node, past) for node in cache.past.outputs if node.op == "Shape"]
    for node, dims in readers:
        build = NodeBuilder(edit, str(node.name or node.outputs[0].name))
        wanted = dims[node.attrs.get("start", 0) : node.attrs.get("end", len(dims))]
        parts = [_dimension(site, dim, build) for dim in wanted]
        build.node("Concat", *parts, axis=0)
        edit.replace(site.scope, [node], build.finish(str(node.outputs[0].name)))


def _dimension(site: AttentionSite, dim: int | str, build: NodeBuilder) -> str:
    """``[1]`` int64."""
    past = str(site.key_cache.past.name)
    if isinstance(dim, int):
        return build.constant(str(dim), np.array([dim], np.int64))
    if dim == "batch":
        return build.dimension(past, 0)
    if dim == "queries":
        return build.dimension(str(site.q.name), 1 if site.packed else 2)
    if dim == "past":
        return build.dimension(past, 2)
    assert site.k is not None
    new = build.dimension(str(site.k.name), 1 if site.packed else 2)
    return build.node("Add", build.dimension(past, 2), new)
