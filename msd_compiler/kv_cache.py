"""A float cache made low-bit: what the scales are, and the model with the same rounding in standard ops, which is the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from .attention import AttentionSite, Cache, CachePlan, Scales, caches, handing_on, not_lowered
from .build import NodeBuilder
from .edit import Edit
from .errors import ModelError
from .generate import Decoder
from .inputs import Feed
from .linked import Linked
from .oracle_session import open_oracle
from .runtime import RuntimeRefused, run
from .runtime_ops.attention.layout import unpack_codes
from .runtime_ops.matmul.reference import SMALLEST_PEAK
from .save import weight_bytes
from .source import Source

_EVEN_UP_TO = 2**30
"""Bytes of weights up to which a model is run to look at its keys."""

_PROMPTS = (256, 64, 16)
"""Tokens of a prompt that say something about keys, as many as the model takes."""

_FEWEST_WORDS = 100
"""Token ids below it are taken to exist."""

_HEADROOM = np.float32(1.125)
"""Of scales measured on samples: other text goes a little beyond them, and what is beyond a scale is cut off."""


@dataclass(frozen=True)
class KvCache:
    """How to make a float cache low-bit."""

    bits: Literal[4, 8] = 8
    samples: Sequence[Feed] | None = None
    """Inputs on which the scales, one per head and column, are measured; None: every token has its own, which travels with it."""

    @property
    def largest(self) -> int:
        """Largest code."""
        return int(2 ** (self.bits - 1) - 1)

    def __str__(self) -> str:
        return f"int{self.bits}, {'per token and head' if self.samples is None else 'per channel'}"


def cache_plans(source: Source, sites: Mapping[str, AttentionSite], how: KvCache) -> dict[str, CachePlan]:
    """The cache plan of each site, by the site's name.

    Raises:
        RuntimeRefused: the model does not run on the samples.
        ModelError: what it returns for them holds NaN or Inf.
    """
    if not sites:
        return {}
    if how.samples is None:
        evened = _evened(source, [site for site in sites.values() if _may_be_evened(site)])
        return {
            name: CachePlan(
                how.bits,
                None,
                None,
                _travelling(site.key_cache),
                _travelling(site.value_cache),
                *evened.get(str(site.key_cache.present.name), (None, None)),
            )
            for name, site in sites.items()
        }
    ranges = _ranges(source, [str(c.present.name) for site in sites.values() for c in caches(site)], how.samples)
    plans = {}
    for name, site in sites.items():
        low, high = ranges[str(site.key_cache.present.name)]
        told = (
            _may_be_evened(site) and site.key_cache.writer.op == "Concat"
        )  # GroupQueryAttention's own codes have no shift
        shift = (low + high) / 2 if told else np.zeros_like(low)
        key = _scale(_HEADROOM * np.maximum(high - shift, shift - low), how.largest)
        value = _scale(_HEADROOM * np.maximum(*np.abs(ranges[str(site.value_cache.present.name)])), how.largest)
        plans[name] = CachePlan(how.bits, key, value, key_shift=shift if shift.any() else None)
    return plans


def why_not(site: AttentionSite, how: KvCache) -> str | None:
    """Why a float cache cannot become codes; None if it can."""
    reason = not_lowered(site)
    if reason is not None:
        return reason
    if site.scope.parent is not None:
        return "its cache is not the main graph's"
    if how.bits == 4 and (site.head_size % 2 or site.value_head_size % 2):
        return "its heads have an odd number of columns, which two to a byte do not hold"
    for cache in caches(site):
        if cache.writer.op not in _WRITERS:
            return f"its cache is written by {cache.writer.op}"
        known = {id(node) for node in (*site.replaced, cache.writer)}
        for tensor in (cache.past, cache.present):
            other = next(_readers_of_values(tensor, known), None)
            if other is not None:
                return f"{other.op} {(other.name or other.outputs[0].name)!r} reads its cache {tensor.name!r} too"
    for cache in caches(site):
        for graph_values, tensor in ((site.scope.graph.inputs, cache.past), (site.scope.graph.outputs, cache.present)):
            if not any(tensor is value for value in graph_values):
                return f"its cache {tensor.name!r} is no input or output of the model"
    return None


def _readers_of_values(tensor: gs.Tensor, known: set[int]) -> Iterator[gs.Node]:
    """Nodes that need the cache's values: its shape is the same in codes."""
    for alias in _aliases(tensor, known):
        yield from (n for n in alias.outputs if id(n) not in known and n.op != "Shape" and not _hands_on(n))


def _aliases(tensor: gs.Tensor, known: set[int]) -> Iterator[gs.Tensor]:
    """The tensor, and under which other names it is handed on."""
    yield tensor
    for node in tensor.outputs:
        if id(node) not in known and _hands_on(node):
            yield from _aliases(node.outputs[0], known)


def _hands_on(node: gs.Node) -> bool:
    return node.op == "Identity" or (node.op == "Concat" and len(node.inputs) == 1)


def _travelling(cache: Cache) -> Scales:
    return Scales(f"{cache.past.name}_scale", f"{cache.present.name}_scale")


def _scale(peak: np.ndarray, largest: int) -> np.ndarray:
    """``[1, Hkv, 1, D]``; a column that is always zero gets the scale 1."""
    return np.where(peak > 0, peak / largest, 1).astype(np.float32)


def _may_be_evened(site: AttentionSite) -> bool:
    """Whether a constant taken off all keys changes nothing: it moves all logits of a query alike."""
    return not (site.soft_cap or site.sinks is not None or site.smooth) and site.element_type == TensorProto.FLOAT


def _evened(source: Source, sites: Sequence[AttentionSite]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By key cache, what to take off the keys and what to divide them by, from a prompt of random tokens.

    Rotary embedding leaves a head one or two columns that hardly turn, large and almost the same for every token. They would
    set the scale of all others. Any numbers would do: they change what is rounded, not what is meant. They are kept short, so
    that another machine's last bits do not change them. Nothing is evened out where the model is no decoder, or large.
    """
    if not sites or weight_bytes(source.proto) > _EVEN_UP_TO:
        return {}
    evened = {}
    for name, tokens in _keys_of_a_prompt(source).items():
        mean, spread = tokens.mean(axis=(0, 2), keepdims=True), tokens.std(axis=(0, 2), keepdims=True)
        if np.isfinite(mean).all() and (spread > 0).all():
            balance = np.exp2(np.clip(np.rint(np.log2(spread) / 2), -30, 30))
            evened[name] = (np.rint(mean / balance * 4) / 4 * balance).astype(np.float32), balance.astype(np.float32)
    wanted = {str(site.key_cache.present.name) for site in sites}
    return {name: both for name, both in evened.items() if name in wanted}


def _keys_of_a_prompt(source: Source) -> dict[str, np.ndarray]:
    """The caches after random tokens, by name; of fewer where the model takes no more, none where it is no decoder."""
    try:
        session, _ = open_oracle(source)
        decoder = Decoder(session, model=source.proto)
    except (RuntimeRefused, ModelError):
        return {}
    vocabulary = decoder.interface.ids.bound or _FEWEST_WORDS
    for count in _PROMPTS:
        decoder.reset()
        try:
            decoder.step(np.random.default_rng(0).integers(0, vocabulary, (1, count)))
        except RuntimeRefused:
            continue
        return {n: v.astype(np.float64) for n, v in decoder.caches().items() if v.ndim == 4}
    return {}


def _ranges(source: Source, presents: list[str], samples: Sequence[Feed]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By cache its least and largest values, ``[1, Hkv, 1, D]``, over batch and tokens of all samples."""
    session, widen = open_oracle(source)
    ranges: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for sample in samples:
        for name, value in zip(presents, run(session, presents, widen(dict(sample.arrays))), strict=True):
            tokens = np.asarray(value, np.float32)
            if not np.isfinite(tokens).all():
                raise ModelError(f"{source.name}: {name!r} is not finite on {sample.name}; no scale fits it")
            if tokens.size:
                low, high = tokens.min(axis=(0, 2), keepdims=True), tokens.max(axis=(0, 2), keepdims=True)
                known = ranges.get(name, (low, high))
                ranges[name] = np.minimum(known[0], low), np.maximum(known[1], high)
    missing = next((name for name in presents if name not in ranges), None)
    if missing is not None:
        raise ModelError(f"{source.name}: {missing!r} holds no tokens on the samples; give some that are not empty")
    return ranges


_WRITERS = frozenset({"Concat", "GroupQueryAttention", "Attention", "MultiHeadAttention"})
"""Ops that append to a cache in a way that ``msd.Attention`` follows."""


def has_oracle(sites: Mapping[str, AttentionSite], how: KvCache) -> bool:
    """Whether `with_rounded_cache` can say what they become: an op that keeps its cache itself has no codes for it.

    GroupQueryAttention has, but no scales per token.
    """
    told = {"Concat"} if how.samples is None else {"Concat", "GroupQueryAttention"}
    return all(cache.writer.op in told for site in sites.values() for cache in caches(site))


def with_rounded_cache(linked: Linked, sites: Mapping[str, AttentionSite], plans: Mapping[str, CachePlan]) -> Source:
    """The model with its caches as codes, in standard ops: what a result with a low-bit cache must mean.

    New keys and values are rounded, stored, and read back as floats; the attention itself stays as it was. A
    GroupQueryAttention does so itself when told the scales.
    """
    edit = Edit(linked.source)
    for name, site in sites.items():
        plan = plans[name]
        scales = (plan.key_scale, plan.value_scale)
        travelling = (plan.key_scales, plan.value_scales)
        evened = ((plan.key_shift, plan.key_balance), (None, None))
        if site.node.op == "GroupQueryAttention":
            _round_own_cache(site, plan, edit)
            store_caches_as_codes(edit, site, plan)
            continue
        for node in handing_on(site):
            edit.replace(site.scope, [node], [])
        for cache, scale, names, even in zip(caches(site), scales, travelling, evened, strict=True):
            _round_cache(site, cache, plan.bits, scale, names, even, edit)
        store_caches_as_codes(edit, site, plan)
    return replace(linked.source, proto=edit.finish())


def _round_own_cache(site: AttentionSite, plan: CachePlan, edit: Edit) -> None:
    """The same op, its cache in codes: inputs 12 and 13 are the scales, ``[Hkv * D]``."""
    position = site.scope.position(site.node)
    assert position is not None
    build = NodeBuilder(edit, str(site.node.name))
    node = onnx.NodeProto()
    node.CopyFrom(site.scope.proto.node[position])
    node.input.extend([""] * (14 - len(node.input)))
    for index, scale in ((12, plan.key_scale), (13, plan.value_scale)):
        assert scale is not None
        node.input[index] = build.constant("cache_scale", scale.reshape(-1))
    told = ("k_quant_type", "v_quant_type", "kv_cache_bit_width")
    kept = [a for a in node.attribute if a.name not in told]
    del node.attribute[:]
    node.attribute.extend(kept)
    values = ("PER_CHANNEL", "PER_CHANNEL", plan.bits)
    node.attribute.extend(onnx.helper.make_attribute(n, v) for n, v in zip(told, values, strict=True))
    edit.replace(site.scope, [site.node], [node])


def _round_cache(
    site: AttentionSite,
    cache: Cache,
    bits: int,
    scale: np.ndarray | None,
    names: Scales | None,
    evened: tuple[np.ndarray | None, np.ndarray | None],
    edit: Edit,
) -> None:
    """The Concat of a cache as: codes of the new tokens, codes of all, values of all."""
    past, new = cache.writer.inputs
    build = NodeBuilder(edit, str(cache.writer.name or cache.present.name))
    x = str(new.name) if site.element_type == TensorProto.FLOAT else build.node("Cast", new.name, to=TensorProto.FLOAT)
    largest = 2 ** (bits - 1) - 1
    shift, balance = evened
    if shift is not None:
        x = build.node("Sub", x, build.constant("shift", shift))
    if balance is not None:
        x = build.node("Div", x, build.constant("balance", balance))
    if scale is not None:
        steps = build.node("Mul", x, build.constant("inverse", np.float32(1) / scale))
        all_scales = build.constant("scale", scale)
        lowest = -largest - 1
    else:
        assert names is not None
        steps, new_scales = _dynamic(x, largest, build)
        build.node("Concat", names.past, new_scales, axis=2)
        build.rename_last(names.present)
        all_scales = names.present
        lowest = -largest
    bounds = [build.constant(str(b), np.array(b, np.float32)) for b in (lowest, largest)]
    codes = build.node("Round", build.node("Clip", steps, *bounds))
    joined = build.node("Concat", str(past.name), _packed(codes, bits, build), axis=2)
    values = build.node("Mul", _unpacked(joined, bits, build), all_scales)
    if balance is not None:
        values = build.node("Mul", values, build.constant("balance", balance))
    if shift is not None:
        values = build.node("Add", values, build.constant("shift", shift))
    if site.element_type != TensorProto.FLOAT:
        values = build.node("Cast", values, to=site.element_type)
    build.node("Identity", joined)
    for name in {str(cache.writer.outputs[0].name), str(cache.present.name)}:
        edit.reroute(site.scope, name, values)
    edit.replace(site.scope, [cache.writer], build.finish(str(cache.present.name)))


def _dynamic(x: str, largest: int, build: NodeBuilder) -> tuple[str, str]:
    """Steps and scales ``[B, Hkv, L, 1]`` of tokens that have their own."""
    peak = build.reduce_max(build.node("Abs", x), axis=3)
    one, zero, tiny, limit = (
        build.constant(n, np.array(v, np.float32))
        for n, v in (("1", 1), ("0", 0), ("tiny", SMALLEST_PEAK), ("largest", largest))
    )
    is_tiny = build.node("Less", peak, tiny)
    safe = build.node("Where", is_tiny, one, peak)
    factor = build.node("Where", is_tiny, zero, build.node("Div", limit, safe))
    return build.node("Mul", x, factor), build.node("Where", is_tiny, zero, build.node("Div", safe, limit))


def _packed(codes: str, bits: int, build: NodeBuilder) -> str:
    """Whole numbers as the cache holds them: int8, or two to a byte, 8 up, the even column in the low bits."""
    if bits == 8:
        return build.node("Cast", codes, to=TensorProto.INT8)
    up = build.node("Add", codes, build.constant("8", np.array(8, np.float32)))
    low, high = (_every_second(up, start, build) for start in (0, 1))
    joined = build.node("Add", low, build.node("Mul", high, build.constant("16", np.array(16, np.float32))))
    return build.node("Cast", joined, to=TensorProto.UINT8)


def _every_second(x: str, start: int, build: NodeBuilder) -> str:
    bounds = (("start", start), ("end", 2**31 - 1), ("axis", 3), ("step", 2))
    return build.node("Slice", x, *(build.constant(n, np.array([v], np.int64)) for n, v in bounds))


def _unpacked(stored: str, bits: int, build: NodeBuilder) -> str:
    """The inverse, as float32."""
    values = build.node("Cast", stored, to=TensorProto.FLOAT)
    if bits == 8:
        return values
    sixteen, eight = (build.constant(str(v), np.array(v, np.float32)) for v in (16, 8))
    high = build.node("Floor", build.node("Div", values, sixteen))
    low = build.node("Sub", values, build.node("Mul", high, sixteen))
    apart = build.node("Concat", *(build.unsqueeze(x, [4]) for x in (low, high)), axis=4)
    flat = build.node("Reshape", apart, build.constant("joined", np.array([0, 0, 0, -1], np.int64)))
    return build.node("Sub", flat, eight)


def float_caches(
    sites: Mapping[str, AttentionSite], plans: Mapping[str, CachePlan]
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """What turns a feed of codes into one of the floats that they stand for."""

    def convert(feed: Mapping[str, Any]) -> dict[str, Any]:
        floats = dict(feed)
        for name, plan in plans.items():
            site = sites[name]
            sides = (
                (site.key_cache, site.head_size, plan.key_scale, plan.key_scales),
                (site.value_cache, site.value_head_size, plan.value_scale, plan.value_scales),
            )
            for cache, size, scale, names in sides:
                past = str(cache.past.name)
                given = floats.pop(names.past) if names is not None else scale
                dtype = onnx.helper.tensor_dtype_to_np_dtype(site.element_type)
                values = unpack_codes(feed[past], size, plan.bits) * np.asarray(given)
                if cache is site.key_cache:
                    values = values * (1 if plan.key_balance is None else plan.key_balance)
                    values = values + (0 if plan.key_shift is None else plan.key_shift)
                floats[past] = values.astype(dtype)
        return floats

    return convert


def store_caches_as_codes(edit: Edit, site: AttentionSite, plan: CachePlan) -> None:
    """Change the model's signature: caches are codes, and scales that travel with them are inputs and outputs."""
    kind = TensorProto.INT8 if plan.bits == 8 else TensorProto.UINT8
    known = {id(node) for node in site.replaced}
    sides = ((plan.key_scales, site.head_size), (plan.value_scales, site.value_head_size))
    for cache, (names, size) in zip(caches(site), sides, strict=True):
        for tensor in (cache.past, cache.present):
            for alias in _aliases(tensor, known):
                edit.undeclare(site.scope, str(alias.name))
        for value in edit.signature(str(cache.past.name), str(cache.present.name)):
            declared = value.type.tensor_type
            if names is not None:
                scale = onnx.ValueInfoProto()
                scale.CopyFrom(value)
                scale.type.tensor_type.elem_type = TensorProto.FLOAT
                if len(declared.shape.dim) == 4:
                    last = scale.type.tensor_type.shape.dim[3]
                    last.Clear()
                    last.dim_value = 1
                is_past = value.name == cache.past.name
                scale.name = names.past if is_past else names.present
                (edit.proto.graph.input if is_past else edit.proto.graph.output).append(scale)
            declared.elem_type = kind
            if plan.bits == 4 and len(declared.shape.dim) == 4:
                declared.shape.dim[3].dim_value = -(-size // 2)
