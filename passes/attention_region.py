"""Which nodes attention consists of, and whether anybody else reads what goes away with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
import onnx_graphsurgeon as gs

from msd_compiler.attention import Cache, ShapeReader
from msd_compiler.linked import Scope

from .attention_cache import is_copy, is_output
from .attention_logits import named, not_followed


@dataclass(frozen=True)
class Region:
    """What attention consists of."""

    replaced: tuple[gs.Node, ...]
    """In graph order."""
    shape_readers: tuple[ShapeReader, ...]


Shapes = Mapping[int, tuple[int | str, ...]]
"""By ``id``, tensors whose shape can be told without them, as `ShapeReader.dims`."""


def region_of(
    scope: Scope,
    *,
    core: Sequence[gs.Node],
    parts: Iterable[gs.Node],
    caches: tuple[Cache, Cache],
    operands: Sequence[gs.Tensor],
    shapes: Shapes,
) -> Region:
    """The nodes that go away: between what writes the caches and what computes y, unless somebody else reads them.

    Args:
        core: what must go, the node that computes y last.
        parts: what turns new tokens into operands.
        operands: what stays and is read: q, new keys and values, masks.
        shapes: of tensors inside; others may read those shapes.

    Raises:
        Reject: one of ``core`` or a cache is read elsewhere, or an operand is computed from it.
    """
    flow = scope.flow
    last = core[-1]
    writers = [cache.writer for cache in caches]
    inside = (*core, *parts, *writers)
    positions = {p for node in inside if (p := scope.position(node)) is not None}
    needed_by_y = nx.descendants(flow, scope.position(last))
    from_cache = set().union(*(nx.ancestors(flow, scope.position(w)) for w in writers))
    between = positions | (needed_by_y & from_cache)

    told = {p for n in inside for r in _shape_readers(n, shapes) if (p := scope.position(r)) is not None}
    producers = [p for t in operands for n in t.inputs if (p := scope.position(n)) is not None]
    kept = _upstream(flow, producers, told)
    _refuse_needed(scope, kept, (*core, *writers))
    results = {id(last.outputs[0]), *(id(c.present) for c in caches), *(id(w.outputs[0]) for w in writers)}
    leaving = _unread(scope, between - kept, results, shapes)
    for node in reversed(core):  # the last one that stays has the reader; those before stay for its sake
        if scope.position(node) not in leaving:
            reader = _reader(scope, node, leaving)
            raise not_followed(f"what {named(node)} computes is read outside the attention too, by {reader}")
    for cache in caches:
        _refuse_readers(scope, cache, leaving)
    readers = (scope.graph.nodes[p] for p in sorted(told - leaving))
    return Region(
        tuple(scope.graph.nodes[p] for p in sorted(leaving)),
        tuple(ShapeReader(node, shapes[id(node.inputs[0])]) for node in readers),
    )


def _upstream(flow: nx.DiGraph[int], starts: Sequence[int], ends: set[int]) -> set[int]:
    """The nodes that some nodes need, and these themselves, looked for no further than ``ends``."""
    reached, pending = set(starts), list(starts)
    while pending:
        node = pending.pop()
        new = set() if node in ends else set(flow.successors(node)) - reached
        reached |= new
        pending.extend(new)
    return reached


def _shape_readers(node: gs.Node, shapes: Shapes) -> list[gs.Node]:
    """Who reads nothing but shapes that can be told otherwise."""
    return [reader for tensor in node.outputs for reader in tensor.outputs if _is_told(reader, shapes)]


def _is_told(node: gs.Node, shapes: Shapes) -> bool:
    """Whether the node reads nothing but a shape that can be told otherwise."""
    return node.op == "Shape" and bool(node.inputs) and id(node.inputs[0]) in shapes


def _refuse_needed(scope: Scope, kept: set[int], nodes: Iterable[gs.Node]) -> None:
    for node in nodes:
        if scope.position(node) in kept:
            raise not_followed(
                f"queries, new tokens or masks depend on {named(node)}, which is part of the attention; "
                "they must be computed from something else"
            )


def _unread(scope: Scope, candidates: set[int], results: set[int], shapes: Shapes) -> set[int]:
    """Those of the nodes that nobody but each other reads, save for what attention gives, and for shapes."""
    leaving = {p for p in candidates if not any(isinstance(v, gs.Graph) for v in scope.graph.nodes[p].attrs.values())}
    while True:
        read = {
            p
            for p in leaving
            if any(_is_read(scope, t, leaving, results, shapes) for t in scope.graph.nodes[p].outputs)
        }
        if not read:
            return leaving
        leaving -= read


def _is_read(scope: Scope, tensor: gs.Tensor, leaving: set[int], results: set[int], shapes: Shapes) -> bool:
    """Whether somebody else needs the tensor."""
    if id(tensor) in results:
        return False
    others = (node for node in tensor.outputs if scope.position(node) not in leaving)
    return is_output(tensor, scope) or any(
        scope.position(node) is None or not _is_told(node, shapes) for node in others
    )


def _reader(scope: Scope, node: gs.Node, leaving: set[int]) -> str:
    for tensor in node.outputs:
        for reader in tensor.outputs:
            if scope.position(reader) not in leaving:
                return named(reader)
    return "whoever takes the model's outputs"


def _refuse_readers(scope: Scope, cache: Cache, leaving: set[int]) -> None:
    """A cache may be low-bit afterwards: others may read its shape, but not its values."""
    for tensor in (cache.past, cache.present, cache.writer.outputs[0]):
        for reader in tensor.outputs:
            is_copy_of_past = tensor is cache.past and is_copy(reader)
            if scope.position(reader) not in leaving and reader.op != "Shape" and not is_copy_of_past:
                raise not_followed(f"the cache {tensor.name!r} is read by {named(reader)} as well")
