"""The normal form of attention with a cache, whichever exporter wrote it; one lowering turns it into ``msd.Attention``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from .linked import Scope
from .runtime_ops.attention.layout import LONGEST_HEAD


@dataclass(frozen=True)
class CacheCodes:
    """How a cache that is low-bit already keeps its values: ``value = scale * code``, symmetric."""

    bits: int
    """8, int8 codes; or 4, two to a byte of uint8."""
    scale: gs.Tensor
    """Stored: one value, or one per head and column ``[Hkv * D]`` in any shape, or one per index of ``axis``."""
    axis: int | None = None
    """1 or 3: the dimension of ``[B, Hkv, T, D]`` that several values belong to; None: all of ``[Hkv * D]``, or one value."""


@dataclass(frozen=True)
class Cache:
    """Keys or values of earlier tokens, as the model takes and returns them."""

    past: gs.Tensor
    """``[B, Hkv, P, D]``, an input of the graph."""
    present: gs.Tensor
    """The same with the new tokens, an output of the graph."""
    writer: gs.Node
    """The node that puts the new tokens there: ``Concat``, ``TensorScatter``, or the attention op itself."""
    codes: CacheCodes | None = None
    """None: the cache is float."""
    at: gs.Tensor | None = None
    """Integers ``[B]`` or ``[1]``: where the first new token goes, in a cache with room for more; None: behind the last one."""


@dataclass(frozen=True)
class Mask:
    """One more mask of the logits, where there are several, or one that says what is hidden."""

    tensor: gs.Tensor
    rank: int
    is_bool: bool
    hides: bool = False
    """A bool mask with True for hidden."""


DIMS = ("batch", "queries", "tokens")
"""Dimensions that vary from call to call."""


@dataclass(frozen=True)
class ShapeReader:
    """A ``Shape`` outside attention that reads a tensor inside it, or the cache."""

    node: gs.Node
    dims: tuple[int | str, ...]
    """What the shape is: numbers, ``"batch"``, ``"queries"`` (S) and ``"tokens"`` (T: past and new together)."""


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding that the attention op itself gives q and k."""

    cos: gs.Tensor
    """``[positions, D / 2]`` or narrower."""
    sin: gs.Tensor
    positions: gs.Tensor | None
    """``[B, S]``; None: from the cache's length on."""
    interleaved: bool


@dataclass(frozen=True)
class AttentionSite:
    """``y = softmax(scale * q @ k' + mask) @ v``, k and v being a cache with this call's new tokens."""

    scope: Scope
    node: gs.Node
    """What rows of the report are named after: the ``Softmax``, or the op that is all of it."""
    replaced: tuple[gs.Node, ...]
    """The nodes that compute ``y`` and the new cache and go away, in graph order; shared ones are not among them."""
    form: str
    """The spelling in the source: ``MatMul -> Add -> Softmax -> MatMul``."""
    q: gs.Tensor
    """``[B, Hq, S, D]``, or packed ``[B, S, Hq * D]``; any factor of it is already in."""
    k: gs.Tensor | None
    """New tokens, ``[B, Hkv, L, D]``, or packed ``[B, L, Hkv * D]``. None, as v: in q behind the queries, heads of all side by side."""
    v: gs.Tensor | None
    y: gs.Tensor
    """``[B, Hq, S, Dv]``, or packed."""
    key_cache: Cache
    value_cache: Cache
    heads: int
    kv_heads: int
    head_size: int
    value_head_size: int
    element_type: int
    """TensorProto type of q, k, v and y."""
    scale: float
    """Factor of the logits beyond what is in q."""
    soft_cap: float = 0.0
    """``cap * tanh(logits / cap)`` before the mask; 0 for none."""
    mask: gs.Tensor | None = None
    """Added to the logits: float, or bool with False for hidden; broadcasts to ``[B, Hq, S, T]``."""
    mask_rank: int = 4
    mask_is_bool: bool = False
    more_masks: tuple[Mask, ...] = ()
    """Further masks: all are added. ``mask`` is None where the only one has True for hidden."""
    causal: bool = False
    window: int = 0
    """Tokens up to its own that a query sees; 0 for all."""
    sinks: gs.Tensor | None = None
    """``[Hq]``, a logit without value."""
    smooth: bool = False
    """Whether such a logit of 0 is there for every head."""
    rotary: Rotary | None = None
    packed: bool = False
    """Whether q, k, v and y have their heads side by side in the last of three dimensions."""
    lengths: gs.Tensor | None = None
    """int32 ``[B]`` or ``[B, 1]``: valid tokens *after* this call, less one, of a cache with room for more (``seqlens_k``)."""
    valid: gs.Tensor | None = None
    """Integers ``[B]``: valid tokens after this call, of a cache that new ones are written into (``nonpad_kv_seqlen``)."""
    shape_readers: tuple[ShapeReader, ...] = ()
    """Not among ``replaced``, yet what they read goes away, or changes its last dimension with its type."""
    rows: int | str | None = None
    """Rows of q: a number or a product of dimension names; None if unknown."""


@dataclass(frozen=True)
class Scales:
    """Inputs and outputs of a cache whose scales travel with it, by name; or one static scale."""

    past: str
    present: str


@dataclass(frozen=True)
class CachePlan:
    """How a site's cache is kept: as it is if it is low-bit, or as ``--kv-cache`` asks."""

    bits: int
    key_scale: np.ndarray | None
    """Static: ``[1, 1, 1, 1]`` or ``[1, Hkv, 1, D]`` float32; None: dynamic, one per token and head."""
    value_scale: np.ndarray | None
    key_scales: Scales | None = None
    """Dynamic: where they come from and go to."""
    value_scales: Scales | None = None
    key_shift: np.ndarray | None = None
    """``[1, Hkv, 1, D]`` float32, taken off every key before it is rounded: the softmax does not see it. None: nothing."""
    key_balance: np.ndarray | None = None
    """``[1, Hkv, 1, D]`` float32, powers of two: keys are divided by it, and queries multiplied. None: by 1."""

    @property
    def dynamic(self) -> bool:
        """Whether every token has its own scales."""
        return self.key_scale is None


def bytes_per_token(site: AttentionSite, bits: int | None, *, dynamic: bool = False) -> int:
    """Bytes that a token's key and value take in the cache; ``bits`` None: those of the model's float type."""
    width = bits or (32 if site.element_type == TensorProto.FLOAT else 16)
    columns = [site.head_size, site.value_head_size]
    return site.kv_heads * sum(-(-c * width // 8) + 4 * dynamic for c in columns)


def caches(site: AttentionSite) -> tuple[Cache, Cache]:
    """Key and value cache."""
    return site.key_cache, site.value_cache


def handing_on(site: AttentionSite) -> list[gs.Node]:
    """Nodes that do no more than name a new cache as the model's output."""
    return [node for cache in caches(site) for node in cache.present.inputs if node is not cache.writer]


def not_lowered(site: AttentionSite) -> str | None:
    """Why ``msd.Attention`` cannot stand for a site whose cache is, or becomes, codes; None if it can."""
    longest = max(site.head_size, site.value_head_size)
    if longest > LONGEST_HEAD:
        return f"its heads have {longest} columns, and msd.Attention takes {LONGEST_HEAD} at most"
    if site.valid is not None or any(cache.at is not None for cache in caches(site)):
        return "its cache is written into at a place that is an input: only caches that are appended to are followed"
    if any(node.op != "Identity" for node in handing_on(site)):
        return f"its new cache passes {handing_on(site)[0].op} before it leaves the model"
    if any(isinstance(d, str) and d not in DIMS for reader in site.shape_readers for d in reader.dims):
        return "the shape of something inside it is asked for"
    return None
