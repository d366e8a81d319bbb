"""What readers say of attention, computed again: y from the fact's own q, k, v and masks in float64, against the model's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from msd_compiler import inputs
from msd_compiler.attention import AttentionSite, Cache
from msd_compiler.compare import relative_l2
from msd_compiler.inline import inlined
from msd_compiler.linked import Linked
from msd_compiler.oracle import is_widened, oracle_model, widen_inputs
from msd_compiler.reader import Site
from msd_compiler.runtime import open_model, run
from msd_compiler.source import load

Arrays = dict[str, np.ndarray]


def linked_of(model: Path | onnx.ModelProto) -> Linked:
    return Linked.of(inlined(load(model)))


def observed(site: AttentionSite) -> list[str]:
    """Names of all tensors that the fact names."""
    caches = (site.key_cache, site.value_cache)
    tensors = [site.q, site.k, site.v, site.y, site.mask, site.valid, *(m.tensor for m in site.more_masks)]
    tensors += [t for c in caches for t in (c.past, c.present, c.at, c.codes and c.codes.scale)]
    tensors += [r.node.outputs[0] for r in site.shape_readers]
    return [str(t.name) for t in tensors if t is not None]


def values_of(linked: Linked, names: list[str], feed: Arrays | None = None) -> list[Arrays]:
    """Tensors of a model by name, computed in float32 without optimizations, for every generated feed."""
    source = linked.source
    widened = is_widened(source.proto)
    proto = oracle_model(source.proto, source.array)
    given = {v.name for v in (*proto.graph.input, *proto.graph.output)}
    stored = {t.name: source.array(t) for t in source.proto.graph.initializer if t.name in names}
    for scope in linked.scopes[:1]:
        stored |= {n: source.array(t) for n in names if (t := scope.constant(n)) is not None}
    for name in dict.fromkeys(names):
        if name not in given and name not in stored:
            proto.graph.output.append(onnx.ValueInfoProto(name=name))
    off = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = open_model(
        proto, source.folder, name=source.name, portable=True, graph_optimization_level=off, log_severity_level=4
    )
    outputs = [o.name for o in session.get_outputs()]

    def attempt(arrays: Arrays) -> list[np.ndarray]:
        return run(session, outputs, widen_inputs(arrays) if widened else arrays)

    feeds = [feed] if feed is not None else [f.arrays for f in inputs.generate(source.proto, attempt)]
    return [{**stored, **feed, **dict(zip(outputs, attempt(feed), strict=True))} for feed in feeds]


def by_head(x: np.ndarray, heads: int, packed: bool) -> np.ndarray:
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3) if packed else x


def filled(cache: Cache, new: np.ndarray, values: Arrays) -> np.ndarray:
    """The cache with new tokens in float64; that the model's own is the same is checked."""
    past, present = (np.asarray(values[t.name], np.float64) for t in (cache.past, cache.present))
    scale = np.ones(1)
    if cache.codes is not None:
        scale = np.asarray(values[cache.codes.scale.name], np.float64)
        if cache.codes.axis is not None:
            scale = scale.reshape([-1 if a == cache.codes.axis else 1 for a in range(4)])
        new = np.clip(np.rint(new / scale), -128, 127)
    if cache.at is None:
        whole = np.concatenate([past, new], axis=2)
    else:
        whole = past.copy()
        for b, at in enumerate(np.broadcast_to(values[cache.at.name], len(past))):
            whole[b, :, at : at + new.shape[2]] = new[b]
    np.testing.assert_array_equal(whole, present)
    return whole * scale


def attended(site: AttentionSite, values: Arrays) -> np.ndarray:
    """Attention as the fact describes it."""
    q = by_head(np.asarray(values[site.q.name], np.float64), site.heads, site.packed)
    assert site.k is not None
    assert site.v is not None
    new = [by_head(np.asarray(values[t.name], np.float64), site.kv_heads, site.packed) for t in (site.k, site.v)]
    k, v = (filled(c, x, values) for c, x in zip((site.key_cache, site.value_cache), new, strict=True))
    assert (k.shape[1], k.shape[3], v.shape[3]) == (site.kv_heads, site.head_size, site.value_head_size)
    assert (q.shape[1], q.shape[3]) == (site.heads, site.head_size)
    k, v = (np.repeat(x, site.heads // site.kv_heads, axis=1) for x in (k, v))
    s = q @ k.swapaxes(2, 3) * site.scale
    s = site.soft_cap * np.tanh(s / site.soft_cap) if site.soft_cap else s
    if site.mask is not None:
        s = masked(s, values[site.mask.name], site.mask_rank, site.mask_is_bool, hides=False)
    for mask in site.more_masks:
        s = masked(s, values[mask.tensor.name], mask.rank, mask.is_bool, hides=mask.hides)
    total = np.full(len(q), s.shape[3]) if site.valid is None else values[site.valid.name].reshape(-1)
    t = np.arange(s.shape[3])
    for b, length in enumerate(total):
        position = length - s.shape[2] + np.arange(s.shape[2])[:, None]
        seen = np.broadcast_to(t < length, s.shape[2:])
        seen = seen & (t <= position) if site.causal else seen
        seen = seen & (t > position - site.window) if site.window else seen
        s[b] = np.where(seen, s[b], -np.inf)
    top = s.max(axis=3, keepdims=True)
    weights = np.exp(s - np.where(top == -np.inf, 0, top))
    sums = weights.sum(axis=3, keepdims=True)
    y = np.where(sums > 0, weights @ v / np.where(sums > 0, sums, 1), 0)
    return y.transpose(0, 2, 1, 3).reshape(len(y), y.shape[2], -1) if site.packed else y


def masked(s: np.ndarray, mask: np.ndarray, rank: int, is_bool: bool, *, hides: bool) -> np.ndarray:
    assert np.ndim(mask) == rank
    assert (np.asarray(mask).dtype == bool) == is_bool
    return np.where(mask ^ hides, s, -np.inf) if is_bool else s + mask


def assert_facts(linked: Linked, sites: list[Site], feed: Arrays | None = None, *, tolerance: float = 1e-4) -> int:
    """Every found site's y, cache, shapes and region; how many were looked at."""
    found = [site.found for site in sites if isinstance(site.found, AttentionSite) and site.found.rotary is None]
    if not found:
        return 0
    for values in values_of(linked, [name for site in found for name in observed(site)], feed):
        for site in found:
            y = attended(site, values)
            assert np.isfinite(y).all()
            assert relative_l2(values[site.y.name].astype(np.float64), y) <= tolerance, site.node.name
            _assert_shapes(site, values)
    for site in found:
        assert_region(linked, site)
    return len(found)


def _assert_shapes(site: AttentionSite, values: Arrays) -> None:
    q = by_head(values[site.q.name], site.heads, site.packed)
    sizes = {"batch": len(q), "queries": q.shape[2], "tokens": values[site.key_cache.present.name].shape[2]}
    for reader in site.shape_readers:
        dims = [d if isinstance(d, int) else sizes[d] for d in reader.dims]
        cut = dims[reader.node.attrs.get("start", 0) : reader.node.attrs.get("end")]
        assert cut == values[reader.node.outputs[0].name].tolist(), reader.node.name


def assert_region(linked: Linked, site: AttentionSite) -> None:
    """Nobody needs what goes away; what stays can be computed without it, and what attention reads without what it gives."""
    gone = {id(n) for n in (*site.replaced, *(r.node for r in site.shape_readers))}
    own = {t.name for t in (site.y, site.key_cache.present, site.value_cache.present)}
    given = own | {r.node.outputs[0].name for r in site.shape_readers}
    positions = [site.scope.position(n) for n in site.replaced]
    assert positions == sorted(positions)
    assert {id(site.node), id(site.key_cache.writer), id(site.value_cache.writer)} <= gone
    operands = [site.q, site.k, site.v, site.mask, site.valid, *(m.tensor for m in site.more_masks)]
    for given_here, ends in ((given, site.scope.graph.outputs), (given - own, operands)):
        pending, seen = [t for t in ends if t is not None], set()
        while pending:
            tensor = pending.pop()
            if id(tensor) in seen or tensor.name in given_here:
                continue
            seen.add(id(tensor))
            for node in tensor.inputs:
                assert id(node) not in gone, f"{tensor.name} needs {node.op} {node.name}"
                pending.extend(node.inputs)
