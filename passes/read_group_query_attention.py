"""com.microsoft.GroupQueryAttention -> AttentionSite: packed or separate q, k, v, rotary inside, low-bit cache or float."""

from __future__ import annotations

from math import sqrt

import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from msd_compiler.attention import AttentionSite, Cache, CacheCodes, Rotary
from msd_compiler.facts import ReasonCode, Reject
from msd_compiler.linked import Linked
from msd_compiler.pattern import Any, Match, Maybe, Op
from msd_compiler.reader import Reader

from .activation import rows_of
from .attention_logits import NO_CACHE

_INPUTS = (
    "query",
    "key",
    "value",
    "past_key",
    "past_value",
    "seqlens_k",
    "total_sequence_length",
    "cos_cache",
    "sin_cache",
    "position_ids",
    "attention_bias",
    "head_sink",
    "k_scale",
    "v_scale",
    "q_norm",
    "k_norm",
)
_OUTPUTS = 3


class ReadGroupQueryAttention(Reader):
    """The op of onnxruntime-genai's builder.

    A cache may have room for more tokens than it holds: new ones go to ``seqlens_k + 1 - S``, and one that is too short grows.

    Source: onnxruntime's operator documentation (ContribOperators, GroupQueryAttention).
    """

    patterns = (
        Op(
            "GroupQueryAttention",
            *[Maybe(Any(name)) for name in _INPUTS],
            domains=("com.microsoft",),
            name="attention",
        ),
    )

    def read(self, m: Match, linked: Linked) -> AttentionSite | None:
        """See `Reader`."""
        node = m.op("attention")
        heads, kv_heads = (int(node.attrs.get(name, 0)) for name in ("num_heads", "kv_num_heads"))
        known: dict[str, int | str] = {"heads": heads, "kv_heads": kv_heads}
        past_key, past_value, lengths = (m.maybe(name) for name in ("past_key", "past_value", "seqlens_k"))
        if past_key is None or past_value is None or lengths is None or len(node.outputs) < _OUTPUTS:
            raise Reject(ReasonCode.NO_CACHE, NO_CACHE, **known)
        if kv_heads < 1 or heads < 1 or heads % kv_heads:
            raise Reject(ReasonCode.ATTENTION_FORM, f"{heads} query heads do not share {kv_heads} key heads evenly")
        for name in ("q_norm", "k_norm"):
            if m.maybe(name) is not None:
                raise Reject(ReasonCode.ATTENTION_FORM, f"its input {name} is not followed", **known)
        if len(node.outputs) > _OUTPUTS and not all(t.is_empty() for t in node.outputs[_OUTPUTS:]):
            raise Reject(ReasonCode.ATTENTION_FORM, "its logits are an output of the model too", **known)

        query, key, value = m.tensor("query"), m.maybe("key"), m.maybe("value")
        head_size = self._head_size(m, linked, query, key, heads, kv_heads)
        if head_size is None:
            raise Reject(ReasonCode.UNKNOWN_RANK, f"the head size cannot be told from {query.name!r}", **known)
        known["head_size"] = head_size
        codes = self._codes(m, linked, node, known)
        scale = float(node.attrs.get("scale", 0.0)) or 1 / sqrt(head_size)
        window = int(node.attrs.get("local_window_size", -1))
        shape = linked.shape(m.scope, query)
        rotary = None
        if int(node.attrs.get("do_rotary", 0)):
            cos, sin = m.maybe("cos_cache"), m.maybe("sin_cache")
            if cos is None or sin is None:
                raise Reject(ReasonCode.ATTENTION_FORM, "it rotates without cos_cache and sin_cache", **known)
            interleaved = bool(node.attrs.get("rotary_interleaved", 0))
            rotary = Rotary(cos, sin, m.maybe("position_ids"), interleaved)
        element_type = TensorProto.FLOAT
        if query.dtype is not None:
            element_type = helper.np_dtype_to_tensor_dtype(query.dtype)
        return AttentionSite(
            scope=m.scope,
            node=node,
            replaced=(node,),
            form=node.op,
            q=query,
            k=key,
            v=value,
            y=node.outputs[0],
            key_cache=Cache(past_key, node.outputs[1], node, codes and codes[0]),
            value_cache=Cache(past_value, node.outputs[2], node, codes and codes[1]),
            heads=heads,
            kv_heads=kv_heads,
            head_size=head_size,
            value_head_size=head_size,
            element_type=int(element_type),
            scale=scale,
            soft_cap=float(node.attrs.get("softcap", 0.0)),
            mask=m.maybe("attention_bias"),
            causal=True,
            window=max(window, 0),
            sinks=m.maybe("head_sink"),
            smooth=bool(int(node.attrs.get("smooth_softmax", 0)) == 1),
            packed=True,
            rotary=rotary,
            lengths=lengths,
            rows=rows_of(shape),
        )

    @staticmethod
    def _head_size(
        m: Match, linked: Linked, query: gs.Tensor, key: gs.Tensor | None, heads: int, kv_heads: int
    ) -> int | None:
        """From the cache, which has 4-bit codes two to a byte, or from the query, which may hold keys and values too."""
        cos = m.maybe("cos_cache")
        shape = linked.shape(m.scope, query)
        if shape is not None and isinstance(shape[-1], int):
            return shape[-1] // (heads if key is not None else heads + 2 * kv_heads)
        past = linked.shape(m.scope, m.tensor("past_key"))
        if past is not None and len(past) == 4 and isinstance(past[3], int):
            is_packed = int(m.op("attention").attrs.get("kv_cache_bit_width", 8)) == 4
            return past[3] * 2 if is_packed and m.maybe("k_scale") is not None else past[3]
        stored = m.scope.constant(cos) if cos is not None else None
        return None if stored is None or len(stored.dims) != 2 else int(2 * stored.dims[1])

    @staticmethod
    def _codes(
        m: Match, linked: Linked, node: gs.Node, known: dict[str, int | str]
    ) -> tuple[CacheCodes, CacheCodes] | None:
        kinds = [_text(node.attrs.get(name, "NONE")) for name in ("k_quant_type", "v_quant_type")]
        if kinds == ["NONE", "NONE"]:
            return None
        bits = int(node.attrs.get("kv_cache_bit_width", 8))
        scales = [m.maybe(name) for name in ("k_scale", "v_scale")]
        for kind, scale in zip(kinds, scales, strict=True):
            if kind not in ("PER_TENSOR", "PER_CHANNEL") or bits not in (4, 8):
                raise Reject(ReasonCode.ATTENTION_FORM, f"a cache of {bits} bits, {kind}, is not followed", **known)
            value = None if scale is None else linked.array(m.scope, scale)
            if value is None:
                raise Reject(ReasonCode.ATTENTION_FORM, "the scales of its cache are not stored in the file", **known)
            if value.size not in (1, int(known["kv_heads"]) * int(known["head_size"])):
                raise Reject(
                    ReasonCode.ATTENTION_FORM,
                    f"the scales of its cache are {value.size}, neither 1 nor {known['kv_heads']} heads of {known['head_size']}",
                    **known,
                )
        key, value_scale = scales
        assert key is not None
        assert value_scale is not None
        return CacheCodes(bits, key), CacheCodes(bits, value_scale)


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value) or "NONE"
