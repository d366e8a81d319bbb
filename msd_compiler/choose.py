"""How each layer is computed: so far by rule, with the cost model's place kept here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx

from .linked import Linked, Scope
from .reader import Site

DEFAULT_TERMS = 2
"""16 bits of the activation."""

TERMS_BEFORE_ROUNDING = 3
"""Where the model itself rounds a value that a layer has a part in: there an error of 2e-5 moves a code now and then, and
that jump, not the error, is what comes out. With three terms (24 bits, as much as float32 holds) the codes stay."""

_ROUNDING_OPS = frozenset(
    {
        "QuantizeLinear",
        "DynamicQuantizeLinear",
        "DynamicQuantizeMatMul",
        "QAttention",
        "QLinearMatMul",
        "ExtendedQuantizeLinear",
    }
)
_CACHE_ROUNDING = ("k_quant_type", "v_quant_type")
"""Attributes of an attention op that keeps its cache in integers."""


@dataclass(frozen=True)
class Choice:
    """How a layer is computed."""

    terms: int = DEFAULT_TERMS
    per_row: bool = False
    """One activation scale for the row instead of one per group."""
    rounded_by: str | None = None
    """The node downstream that made it three terms."""


def choose(linked: Linked, sites: Sequence[Site], terms: int | None) -> list[Choice]:
    """A choice per site.

    Args:
        terms: for all sites; None: two, or three for a layer whose result the model rounds to integers further on.
    """
    if terms is not None:
        return [Choice(terms)] * len(sites)
    rounded = {scope.index: _rounded_downstream(scope) for scope in {id(s.scope): s.scope for s in sites}.values()}
    choices = []
    for site in sites:
        by = rounded[site.scope.index].get(site.scope.position(site.node))
        choices.append(Choice() if by is None else Choice(TERMS_BEFORE_ROUNDING, rounded_by=by))
    return choices


def _rounded_downstream(scope: Scope) -> dict[int | None, str]:
    """For every node that a rounding depends on, the name of such a rounding."""
    rounding = {i: node for i, node in enumerate(scope.graph.nodes) if _rounds(node.op, node.attrs)}
    if not rounding:
        return {}
    flow = scope.flow
    found: dict[int | None, str] = {}
    for i, node in rounding.items():
        if i in found:
            continue  # what it depends on is known already
        reached = nx.descendants(flow, i)
        found.update((r, str(node.name or node.op)) for r in reached if r not in found)
    return found


def _rounds(op: str, attributes: dict[str, object]) -> bool:
    return op in _ROUNDING_OPS or any(attributes.get(a, "NONE") not in ("NONE", b"NONE", "") for a in _CACHE_ROUNDING)
