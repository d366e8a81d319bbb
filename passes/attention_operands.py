"""Queries, keys and values together: how many heads and columns, whether they fit, and the shapes that follow."""

from __future__ import annotations

import onnx_graphsurgeon as gs
from onnx import helper

from .attention_cache import Kept
from .attention_layout import BATCH, COLUMNS, GROUP, HEADS, TOKENS
from .attention_logits import not_followed
from .attention_region import Shapes
from .shape_values import ShapeValues


def sizes(
    q: gs.Tensor, key: Kept, value: Kept, values: ShapeValues, *, repeats: bool = False
) -> tuple[int, int, int, int]:
    """Query heads, key heads, columns of keys and of values, for q ``[B, Hq, S, D]``.

    Args:
        repeats: whether who takes the operands repeats heads for groups of queries.

    Raises:
        Reject: the file does not tell one, or they do not fit.
    """
    dims = values.dims(q)
    if dims is not None and len(dims) != 4:
        raise not_followed(f"its queries {q.name!r} have {len(dims)} dimensions; 4 are needed")
    heads = None if dims is None else dims[1]
    past = key.cache.past.name
    if key.heads is None or key.columns is None or value.columns is None or value.heads != key.heads:
        raise not_followed(
            f"the heads and columns of the cache {past!r} are not told by the file, or not those of its values"
        )
    if (
        heads is None
        and not repeats
        and (group := key.group or value.group) is not None
        and (group > 1 or key.heads > 1)
    ):
        heads = group * key.heads
    if heads is None:
        raise not_followed(f"the file does not tell how many heads its queries {q.name!r} have")
    if key.heads < 1 or heads % key.heads or key.columns < 1 or value.columns < 1:
        raise not_followed(f"{heads} query heads do not share {key.heads} key heads evenly")
    for kept in (key, value):
        _check_group(heads, key.heads, kept, repeats or key.heads == 1)
    _check_type(q, key, value)
    return heads, key.heads, key.columns, value.columns


def _check_group(heads: int, kv_heads: int, kept: Kept, repeats: bool) -> None:
    """See that each head is there once per query head; a single one serves all without that."""
    group, needed = kept.group, heads // kv_heads
    if group is not None and group != needed and not (repeats and group > 0 and needed % group == 0):
        raise not_followed(f"{kv_heads} heads, each {group} times, meet {heads} query heads")


def _check_type(q: gs.Tensor, key: Kept, value: Kept) -> None:
    """See that queries, keys and values are of one type."""
    known = key.element_type if q.dtype is None else int(helper.np_dtype_to_tensor_dtype(q.dtype))
    if not key.element_type == value.element_type == known or (key.cache.codes is None) != (value.cache.codes is None):
        raise not_followed(f"its queries {q.name!r}, keys and values are of different types; one is needed")


def told_shapes(kept: Kept, heads: int) -> Shapes:
    """The shapes of the tensors from cache to operand, as far as each dimension holds one thing, or repeated heads."""
    assert kept.heads is not None
    assert kept.columns is not None
    single: dict[tuple[str, ...], int | str] = {(): 1, (BATCH,): "batch", (TOKENS,): "tokens", (HEADS,): kept.heads}
    group = heads // kept.heads if kept.group is None else kept.group
    single |= {(GROUP,): group, (HEADS, GROUP): kept.heads * group, (COLUMNS,): kept.columns}
    return {i: tuple(single[a] for a in axes) for i, axes in kept.axes.items() if all(a in single for a in axes)}


def places(*kept: Kept) -> list[gs.Tensor]:
    """Where new tokens go, for caches with room for more."""
    return [k.cache.at for k in kept if k.cache.at is not None]
