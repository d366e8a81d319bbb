"""What a reader is, and how all sites of a model are found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import onnx_graphsurgeon as gs

from .attention import AttentionSite
from .errors import ModelError
from .facts import QuantizedLinear, Reject
from .linked import Linked, Scope
from .pattern import Match, Op, match

Fact: TypeAlias = QuantizedLinear | AttentionSite


class Reader(ABC):
    """Recognises one spelling of a linear layer or of attention: a pattern, and what else must hold."""

    patterns: tuple[Op, ...]

    @abstractmethod
    def read(self, m: Match, linked: Linked) -> Fact | None:
        """The site's facts; None if this is none after all.

        Raises:
            Reject: it is one, but is not taken.
            ModelError: what the file says of it cannot be right.
        """


class Refiner(ABC):
    """Takes more of the graph into a fact: an ``Add`` of a constant row becomes its bias."""

    @abstractmethod
    def refine(self, fact: QuantizedLinear, linked: Linked) -> QuantizedLinear:
        """The fact, extended where that is possible."""


@dataclass(frozen=True)
class Site:
    """A place where a linear layer or attention stands, taken or not."""

    scope: Scope
    node: gs.Node
    found: Fact | Reject

    @property
    def name(self) -> str:
        """The node's name, or that of its first output."""
        return str(self.node.name or self.node.outputs[0].name)


def find_sites(linked: Linked, readers: Sequence[Reader], refiners: Sequence[Refiner]) -> list[Site]:
    """Every linear layer and attention of the model, in graph order. The first reader that recognises a node speaks for it."""
    by_op: dict[str, list[tuple[Reader, Op]]] = {}
    for reader in readers:
        for pattern in reader.patterns:
            for op in (pattern.ops,) if isinstance(pattern.ops, str) else pattern.ops:
                by_op.setdefault(op, []).append((reader, pattern))

    sites = []
    for scope, _, node in linked.nodes():
        for reader, pattern in by_op.get(node.op, ()):
            m = match(pattern, node, scope)
            if m is None:
                continue
            found: Fact | Reject | None
            try:
                found = reader.read(m, linked)
                if isinstance(found, QuantizedLinear):
                    for refiner in refiners:
                        found = refiner.refine(found, linked)
                if found is not None:
                    _refuse_graphs(found)
            except Reject as reject:
                found = reject
            except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
                name = node.name or node.outputs[0].name
                raise ModelError(f"{linked.source.name}: {node.op} {name!r} cannot be read: {error}") from error
            if found is not None:
                sites.append(Site(scope, node, found))
                break
    return sites


def _refuse_graphs(fact: Fact) -> None:
    """See that no node that goes away has a graph inside: none of these ops takes one, and others count graphs.

    Raises:
        ValueError: one has.
    """
    for node in fact.replaced:
        for name, value in node.attrs.items():
            if isinstance(value, gs.Graph):
                raise ValueError(f"attribute {name!r} of {node.op} is a graph, which that op does not take")
