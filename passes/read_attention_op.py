"""ONNX ``Attention`` (opset 23 and later) -> AttentionSite: its own cache, or one that a node before it writes."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from math import sqrt

import onnx_graphsurgeon as gs
from onnx import TensorProto

from msd_compiler.attention import AttentionSite, Cache
from msd_compiler.facts import ReasonCode, Reject
from msd_compiler.linked import Linked, Scope
from msd_compiler.pattern import Any, Match, Maybe, Op
from msd_compiler.reader import Reader

from .activation import rows_of
from .attention_cache import Kept, element_type_of, is_input, is_output, read_kept, trace
from .attention_layout import CACHE
from .attention_logits import NO_CACHE, named, not_followed
from .attention_operands import places, sizes, told_shapes
from .attention_region import region_of
from .shape_values import ShapeValues

_INPUTS = ("q", "k", "v")
_OPTIONAL = ("mask", "past_key", "past_value", "valid")
_ATTRIBUTES = frozenset(
    {
        *("is_causal", "kv_num_heads", "q_num_heads", "qk_matmul_output_mode", "scale", "softcap"),
        *("softmax_precision", "left_window_size", "right_window_size"),
    }
)
_LOGITS_OUTPUT = 3


class ReadAttentionOp(Reader):
    """The op of ONNX itself, as torch's and other exporters write it."""

    patterns = (Op("Attention", *map(Any, _INPUTS), *[Maybe(Any(name)) for name in _OPTIONAL], name="attention"),)

    def read(self, m: Match, linked: Linked) -> AttentionSite | None:
        """See `Reader`."""
        call = _Call(m, linked, ShapeValues(m.scope, linked))
        known = call.known()
        if m.maybe("past_key") is not None or m.maybe("past_value") is not None:
            is_own = True
        elif any(call.traced(name) for name in ("k", "v")):
            is_own = False
        else:
            raise Reject(ReasonCode.NO_CACHE, NO_CACHE, **known)
        try:
            call.check()
            return call.with_own_cache() if is_own else call.with_cache_outside()
        except Reject as reject:
            raise Reject(reject.code, reject.reason, **known) from None


@dataclass(frozen=True)
class _Call:
    """One node."""

    m: Match
    linked: Linked
    values: ShapeValues

    @property
    def node(self) -> gs.Node:
        return self.m.op("attention")

    def _int(self, name: str, default: int) -> int:
        return int(self.node.attrs.get(name, default))

    def traced(self, name: str) -> bool:
        """Whether the operand comes from a cache that a node outside writes."""
        return trace(self.m.tensor(name), self.m.scope, self.values).writer is not None

    def known(self) -> dict[str, int | str]:
        """Heads and head size, as far as the file tells."""
        heads, kv_heads, size = self._sizes()
        found = {"heads": heads, "kv_heads": kv_heads, "head_size": size}
        return {name: value for name, value in found.items() if value}

    def _sizes(self) -> tuple[int | None, int | None, int | None]:
        q, k = (self.values.dims(self.m.tensor(name)) for name in ("q", "k"))
        if (q is not None and len(q) == 3) or self._int("q_num_heads", 0):
            heads = self._int("q_num_heads", 0)
            width = q[-1] if q else None
            return heads, self._int("kv_num_heads", 0), width // heads if width and heads > 0 else None
        if q is None or len(q) != 4:
            return None, None, None
        return q[1], k[1] if k is not None and len(k) == 4 else None, q[3]

    def check(self) -> None:
        """See that nothing is asked of the node that a site does not hold.

        Raises:
            Reject: something is.
        """
        unknown = sorted(set(self.node.attrs) - _ATTRIBUTES)
        if unknown:
            raise not_followed(f"{named(self.node)} has the attribute {unknown[0]!r}, which is not followed")
        if any(_is_used(t, self.m.scope) for t in self.node.outputs[_LOGITS_OUTPUT:]):
            raise not_followed(f"{named(self.node)} also returns its logits, and they are read")
        if self._int("right_window_size", -1) > 0:
            raise not_followed(
                f"{named(self.node)} has right_window_size {self._int('right_window_size', -1)}; 0 or -1 is needed"
            )
        mask = self.m.maybe("mask")
        dims = None if mask is None else self.values.dims(mask)
        if mask is not None and (dims is None or not 2 <= len(dims) <= 4):
            raise not_followed(
                f"its mask {mask.name!r} has {'an unknown shape' if dims is None else len(dims)}; 2 to 4 dimensions are needed"
            )

    def with_own_cache(self) -> AttentionSite:
        """The facts of a node that takes and returns its cache."""
        m, node = self.m, self.node
        key_cache, value_cache = own_cache(node, m.maybe("past_key"), m.maybe("past_value"), m.scope)
        if m.maybe("valid") is not None:
            raise not_followed(f"{named(node)} has a past and nonpad_kv_seqlen; one of them is needed")
        past, past_value = (self.values.dims(c.past) for c in (key_cache, value_cache))
        heads, kv_heads, size = self._sizes()
        if past is not None and len(past) == 4:
            kv_heads, size = past[1] or kv_heads, past[3] or size
        value_size = past_value[3] if past_value is not None and len(past_value) == 4 else None
        q = self.values.dims(m.tensor("q"))
        if not heads or not kv_heads or not size or not value_size or q is None or heads % kv_heads:
            raise not_followed(
                f"{named(node)}: heads {heads} and {kv_heads}, columns {size} and {value_size}; the file must tell all"
            )
        return self._site(
            (m.tensor("k"), m.tensor("v")),
            (key_cache, value_cache),
            (heads, kv_heads, size, value_size),
            packed=len(q) == 3,
            element_type=element_type_of(key_cache.past, m.scope),
            replaced=(node,),
        )

    def with_cache_outside(self) -> AttentionSite:
        """The facts of a node whose keys and values are a cache that other nodes write."""
        m, node = self.m, self.node
        operands = [trace(m.tensor(name), m.scope, self.values) for name in ("k", "v")]
        for operand, what in zip(operands, ("keys", "values"), strict=True):
            if operand.writer is None:
                raise not_followed(f"its {what} {operand.source.name!r} come from no cache, unlike the other ones")
        key, value = (read_kept(o, CACHE, m.scope, self.linked, self.values) for o in operands)
        valid = m.maybe("valid")
        is_placed = (
            self._int("is_causal", 0)
            or self._int("left_window_size", -1) >= 0
            or self._int("right_window_size", -1) >= 0
        )
        if is_placed and valid is None:
            raise not_followed(
                f"{named(node)} counts queries from the start of the cache; nonpad_kv_seqlen or a mask is needed"
            )
        if value.scale != 1.0:
            raise not_followed(f"its values are scaled by {value.scale:g}; 1 is needed")
        q = m.tensor("q")
        found = sizes(q, key, value, self.values, repeats=True)
        masks = [t for t in (m.maybe("mask"), valid) if t is not None]
        region = region_of(
            m.scope,
            core=(node,),
            parts=(*key.nodes, *value.nodes),
            caches=(key.cache, value.cache),
            operands=(q, key.new, value.new, *masks, *places(key, value)),
            shapes={**told_shapes(key, found[0]), **told_shapes(value, found[0])},
        )
        return self._site(
            (key.new, value.new),
            (key.cache, value.cache),
            found,
            packed=False,
            element_type=key.element_type,
            replaced=region.replaced,
            factor=key.scale,
            shape_readers=region.shape_readers,
            form=_form(key, node),
        )

    def _site(
        self,
        new: tuple[gs.Tensor, gs.Tensor],
        caches: tuple[Cache, Cache],
        found: tuple[int, int, int, int],
        *,
        packed: bool,
        factor: float = 1.0,
        form: str = "Attention",
        **more: typing.Any,
    ) -> AttentionSite:
        m, node = self.m, self.node
        heads, kv_heads, size, value_size = found
        mask = m.maybe("mask")
        shape = self.linked.shape(m.scope, m.tensor("q"))
        rows = None if shape is None else rows_of([shape[0], shape[1 if packed else 2], None])
        right = self._int("right_window_size", -1)
        scale = node.attrs.get("scale")
        return AttentionSite(
            scope=m.scope,
            node=node,
            form=form,
            q=m.tensor("q"),
            k=new[0],
            v=new[1],
            y=node.outputs[0],
            key_cache=caches[0],
            value_cache=caches[1],
            heads=heads,
            kv_heads=kv_heads,
            head_size=size,
            value_head_size=value_size,
            scale=factor * (1 / sqrt(size) if scale is None else float(scale)),
            soft_cap=float(node.attrs.get("softcap", 0.0)),
            mask=mask,
            mask_rank=4 if mask is None else len(self.values.dims(mask) or ()),
            mask_is_bool=mask is not None and self.values.is_bool(mask),
            causal=bool(self._int("is_causal", 0)) or right == 0,
            window=self._int("left_window_size", -1) + 1,
            packed=packed,
            valid=m.maybe("valid"),
            rows=rows,
            **more,
        )


def own_cache(
    node: gs.Node, past_key: gs.Tensor | None, past_value: gs.Tensor | None, scope: Scope
) -> tuple[Cache, Cache]:
    """The caches of a node that takes them as inputs and returns them as its second and third output.

    Raises:
        Reject: they are no inputs and outputs of the model.
    """
    presents = [None if t.is_empty() else t for t in node.outputs[1:3]]
    presents += [None] * (2 - len(presents))
    made = []
    for past, present, what in ((past_key, presents[0], "keys"), (past_value, presents[1], "values")):
        if past is None or not is_input(past, scope) or scope.parent is not None:
            raise not_followed(f"the past {what} of {named(node)} are no input of the model")
        if present is None or not is_output(present, scope):
            raise not_followed(f"{named(node)} does not return its {what} as an output of the model")
        others = [n for t in (past, present) for n in t.outputs if n is not node and n.op != "Shape"]
        if others:
            raise not_followed(f"the cache {past.name!r} is read by {named(others[0])} as well")
        if element_type_of(past, scope) not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16):
            raise not_followed(f"the cache {past.name!r} is of a type that {named(node)} does not take")
        made.append(Cache(past, present, node))
    return made[0], made[1]


def _is_used(tensor: gs.Tensor, scope: Scope) -> bool:
    return not tensor.is_empty() and (bool(tensor.outputs) or is_output(tensor, scope))


def _form(key: Kept, node: gs.Node) -> str:
    return f"{key.cache.writer.op} -> {node.op}"
