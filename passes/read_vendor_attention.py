"""Attention ops of com.microsoft: ``MultiHeadAttention`` with a cache -> AttentionSite; a row for the others."""

from __future__ import annotations

from math import sqrt
from types import MappingProxyType

from msd_compiler.attention import AttentionSite
from msd_compiler.facts import ReasonCode, Reject
from msd_compiler.linked import Linked
from msd_compiler.pattern import Any, Match, Maybe, Op
from msd_compiler.reader import Reader

from .activation import rows_of
from .attention_cache import element_type_of
from .attention_logits import NO_CACHE, named, not_followed
from .read_attention_op import own_cache
from .shape_values import ShapeValues

_DOMAINS = ("com.microsoft",)

_INPUTS = MappingProxyType(
    {
        "MultiHeadAttention": (
            *("q", "k", "v", "bias", "key_padding_mask", "mask", "past_key", "past_value"),
            *("past_length", "cache_indirection"),
        ),
        "DecoderMaskedMultiHeadAttention": (
            *("q", "k", "v", "mask_index", "mask", "past_key", "past_value", "past_length", "beam_width"),
            *("cache_indirection", "bias"),
        ),
    }
)
"""Ops that take queries, keys and values, with their inputs in order."""

_NOT_FOLLOWED = ("bias", "key_padding_mask", "mask_index", "beam_width", "cache_indirection")
_ATTRIBUTES = frozenset(
    {"num_heads", "mask_filter_value", "scale", "unidirectional", "past_present_share_buffer", "output_qk"}
)
_LOGITS_OUTPUT = 3


class ReadMultiHeadAttention(Reader):
    """Queries, keys and values side by side in three dimensions, a cache of four.

    Source: onnxruntime's operator documentation (ContribOperators).
    """

    patterns = tuple(
        Op(op, Any("q"), *[Maybe(Any(name)) for name in inputs[1:]], domains=_DOMAINS, name="attention")
        for op, inputs in _INPUTS.items()
    )

    def read(self, m: Match, linked: Linked) -> AttentionSite | None:
        """See `Reader`."""
        node, values = m.op("attention"), ShapeValues(m.scope, linked)
        heads = int(node.attrs.get("num_heads", 0))
        q = values.dims(m.tensor("q"))
        known: dict[str, int | str] = {"heads": heads, "kv_heads": heads} if heads > 0 else {}
        if m.maybe("past_key") is None and m.maybe("past_value") is None:
            raise Reject(ReasonCode.NO_CACHE, NO_CACHE, **known)
        try:
            return self._site(m, linked, heads, q, values)
        except Reject as reject:
            raise Reject(reject.code, reject.reason, **known) from None

    def _site(
        self, m: Match, linked: Linked, heads: int, q: tuple[int | None, ...] | None, values: ShapeValues
    ) -> AttentionSite:
        node = m.op("attention")
        key, value, mask = m.maybe("k"), m.maybe("v"), m.maybe("mask")
        used = [name for name in _NOT_FOLLOWED if m.maybe(name) is not None] + sorted(set(node.attrs) - _ATTRIBUTES)
        if used:
            raise not_followed(f"{named(node)}: its {used[0]!r} is not followed")
        if key is None or value is None:
            raise not_followed(
                f"{named(node)} takes queries, keys and values packed together; three tensors are needed"
            )
        if any(t.outputs or not t.is_empty() for t in node.outputs[_LOGITS_OUTPUT:]):
            raise not_followed(f"{named(node)} also returns its logits")
        shared = m.maybe("past_length") is not None or bool(int(node.attrs.get("past_present_share_buffer", 0)))
        if shared:
            raise not_followed(
                f"{named(node)} writes into a cache with room for more, whose length it takes from the host"
            )
        key_cache, value_cache = own_cache(node, m.maybe("past_key"), m.maybe("past_value"), m.scope)
        sides = [values.dims(c.past) or (None,) * 4 for c in (key_cache, value_cache)]
        size, value_size = sides[0][3], sides[1][3]
        if q is None or len(q) != 3 or any(len(values.dims(t) or ()) != 3 for t in (key, value)):
            raise not_followed(f"{named(node)}: queries, keys and values of 3 dimensions are needed")
        if heads < 1 or not size or not value_size or sides[0][1] not in (None, heads):
            raise not_followed(
                f"{named(node)}: {heads} heads, cache of {list(sides[0])}; the file must tell heads and columns"
            )
        dims = None if mask is None else values.dims(mask)
        if mask is not None and (dims is None or len(dims) != 4):
            raise not_followed(f"its mask {mask.name!r} needs 4 dimensions that the file tells")
        shape = linked.shape(m.scope, m.tensor("q"))
        return AttentionSite(
            scope=m.scope,
            node=node,
            replaced=(node,),
            form=node.op,
            q=m.tensor("q"),
            k=key,
            v=value,
            y=node.outputs[0],
            key_cache=key_cache,
            value_cache=value_cache,
            heads=heads,
            kv_heads=heads,
            head_size=size,
            value_head_size=value_size,
            element_type=element_type_of(key_cache.past, m.scope),
            scale=float(node.attrs.get("scale", 0.0)) or 1 / sqrt(size),
            mask=mask,
            causal=bool(int(node.attrs.get("unidirectional", 0))),
            packed=True,
            rows=rows_of(shape),
        )


_PACKED = "multiplies by the weights of queries, keys and values itself, and has one cache for keys and values"

_OTHERS = MappingProxyType(
    {
        "Attention": (_PACKED, 4),
        "QAttention": (_PACKED, 8),
        "DecoderMaskedSelfAttention": (_PACKED, 4),
        "DecoderAttention": ("multiplies by the weights of queries, keys and values itself", 8),
        "PagedAttention": ("keeps its cache in pages", 3),
        "SparseAttention": ("leaves out blocks of its cache", 3),
        "PackedAttention": ("takes sequences without their padding", None),
        "PackedMultiHeadAttention": ("takes sequences without their padding", None),
        "LongformerAttention": ("leaves out what is far off", None),
        "QOrderedAttention": ("multiplies int8 codes", None),
    }
)
"""By op: why it is not followed, and which input holds its cache, None if it has none."""


class ReportOtherAttention(Reader):
    """Ops that do more than attention, or keep their cache in another way: a row, no rewrite."""

    patterns = (Op(tuple(_OTHERS), *[Maybe(Any()) for _ in range(16)], domains=_DOMAINS, name="attention"),)

    def read(self, m: Match, linked: Linked) -> None:
        """See `Reader`."""
        node = m.op("attention")
        why, past = _OTHERS[node.op]
        heads = int(node.attrs.get("num_heads", 0))
        known: dict[str, int | str] = {"heads": heads} if heads > 0 else {}
        if past is None or len(node.inputs) <= past or node.inputs[past].is_empty():
            raise Reject(ReasonCode.NO_CACHE, NO_CACHE, **known)
        raise Reject(ReasonCode.ATTENTION_FORM, f"{named(node)} {why}; MultiHeadAttention is followed", **known)
