"""Patterns over a linked graph, as values: built once, read like the formula, holding no code and no state.

    DEQUANTIZED = Op("DequantizeLinear", Const("codes"), Const("scales"), Maybe(Const("zero_points")), name="dequantize")
    pattern = Op("MatMul", Any("x"), Chain(("Cast", "Transpose"), DEQUANTIZED, name="chain"), name="product")

A pattern is matched from the node that it ends in, against the flow of data. Two uses of one name must meet the same tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import onnx_graphsurgeon as gs

from .linked import Scope

DEFAULT_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class Match:
    """What the names of a pattern stand for at one place of a graph."""

    scope: Scope
    node: gs.Node
    bound: MappingProxyType[str, gs.Tensor | gs.Node | tuple[gs.Node, ...] | None]

    def tensor(self, name: str) -> gs.Tensor:
        """The tensor bound to ``name``."""
        value = self.bound[name]
        assert isinstance(value, gs.Tensor), name
        return value

    def maybe(self, name: str) -> gs.Tensor | None:
        """The tensor bound to ``name``, None where an optional input is absent."""
        value = self.bound.get(name)
        assert value is None or isinstance(value, gs.Tensor), name
        return value

    def op(self, name: str) -> gs.Node:
        """The node bound to ``name``."""
        value = self.bound[name]
        assert isinstance(value, gs.Node), name
        return value

    def chain(self, name: str) -> tuple[gs.Node, ...]:
        """The nodes that a `Chain` passed through, in the order of data flow."""
        value = self.bound[name]
        assert isinstance(value, tuple), name
        return value


_Bound = dict[str, gs.Tensor | gs.Node | tuple[gs.Node, ...] | None]


class Pattern(Protocol):
    """Anything that can be asked whether a tensor fits."""

    def fits(self, tensor: gs.Tensor | None, scope: Scope, bound: _Bound) -> Iterator[_Bound]:
        """Every way to fit ``tensor`` (None: an absent input), each with the names bound so far."""
        ...


def _bind(bound: _Bound, name: str | None, value: gs.Tensor | gs.Node | tuple[gs.Node, ...] | None) -> Iterator[_Bound]:
    if name is None:
        yield bound
    elif name not in bound:
        yield {**bound, name: value}
    elif bound[name] is value:
        yield bound


@dataclass(frozen=True)
class Any:
    """Any tensor that is there."""

    name: str | None = None

    def fits(self, tensor: gs.Tensor | None, scope: Scope, bound: _Bound) -> Iterator[_Bound]:
        """See `Pattern`."""
        if tensor is not None:
            yield from _bind(bound, self.name, tensor)


@dataclass(frozen=True)
class Const:
    """A tensor whose value the file holds."""

    name: str | None = None

    def fits(self, tensor: gs.Tensor | None, scope: Scope, bound: _Bound) -> Iterator[_Bound]:
        """See `Pattern`."""
        if tensor is not None and scope.constant(tensor) is not None:
            yield from _bind(bound, self.name, tensor)


@dataclass(frozen=True)
class Maybe:
    """An optional input: what is inside it, or nothing."""

    inside: Any | Const

    def fits(self, tensor: gs.Tensor | None, scope: Scope, bound: _Bound) -> Iterator[_Bound]:
        """See `Pattern`."""
        if tensor is None:
            yield from _bind(bound, self.inside.name, None)
        else:
            yield from self.inside.fits(tensor, scope, bound)


@dataclass(frozen=True)
class OneOf:
    """Several spellings of the same thing; the first that fits wins."""

    spellings: tuple[Pattern, ...]

    def fits(self, tensor: gs.Tensor | None, scope: Scope, bound: _Bound) -> Iterator[_Bound]:
        """See `Pattern`."""
        for spelling in self.spellings:
            yield from spelling.fits(tensor, scope, bound)


@dataclass(frozen=True)
class Op:
    """The first output of a node.

    ``ops`` is one op type or several; trailing inputs that are not named must be absent. ``commutes`` also tries a
    two-input node with its inputs swapped.
    """

    ops: str | tuple[str, ...]
    inputs: tuple[Pattern, ...]
    domains: tuple[str, ...] = DEFAULT_DOMAINS
    name: str | None = None
    commutes: bool = False

    def __init__(
        self,
        ops: str | tuple[str, ...],
        *inputs: Pattern,
        domains: tuple[str, ...] = DEFAULT_DOMAINS,
        name: str | None = None,
        commutes: bool = False,
    ):
        for attribute, value in zip(
            ("ops", "inputs", "domains", "name", "commutes"), (ops, inputs, domains, name, commutes), strict=True
        ):
            object.__setattr__(self, attribute, value)

    def fits(self, tensor: gs.Tensor | None, scope: Scope, bound: _Bound) -> Iterator[_Bound]:
        """See `Pattern`."""
        if tensor is not None and tensor.inputs and tensor.inputs[0].outputs[0] is tensor:
            yield from self.fits_node(tensor.inputs[0], scope, bound)

    def fits_node(self, node: gs.Node, scope: Scope, bound: _Bound) -> Iterator[_Bound]:
        """Every way to fit ``node`` itself."""
        ops = (self.ops,) if isinstance(self.ops, str) else self.ops
        if node.op not in ops or (node.domain or "") not in self.domains or not node.outputs:
            return
        present: list[gs.Tensor | None] = [None if t.is_empty() else t for t in node.inputs]
        while present and present[-1] is None:
            present.pop()
        if len(present) > len(self.inputs):
            return
        present += [None] * (len(self.inputs) - len(present))
        orders = [present, present[::-1]] if self.commutes else [present]
        for named in _bind(bound, self.name, node):
            for order in orders:
                yield from _fit_all(self.inputs, order, scope, named)


def _fit_all(
    patterns: tuple[Pattern, ...], tensors: list[gs.Tensor | None], scope: Scope, bound: _Bound
) -> Iterator[_Bound]:
    if not patterns:
        yield bound
        return
    for first in patterns[0].fits(tensors[0], scope, bound):
        yield from _fit_all(patterns[1:], tensors[1:], scope, first)


@dataclass(frozen=True)
class Chain:
    """A tensor that comes from ``inside`` through any number of the named ops, along their first inputs.

    The ops' other inputs must be constants (a Reshape's shape).
    """

    ops: tuple[str, ...]
    inside: Pattern
    name: str | None = None
    longest: int = field(default=16)

    def fits(self, tensor: gs.Tensor | None, scope: Scope, bound: _Bound) -> Iterator[_Bound]:
        """See `Pattern`."""
        passed: tuple[gs.Node, ...] = ()
        while tensor is not None:
            for inner in self.inside.fits(tensor, scope, bound):
                yield from _bind(inner, self.name, passed)
            if len(passed) == self.longest or not tensor.inputs:
                return
            node = tensor.inputs[0]
            if node.op not in self.ops or (node.domain or "") not in DEFAULT_DOMAINS:
                return
            if any(not t.is_empty() and scope.constant(t) is None for t in node.inputs[1:]):
                return
            passed = (node, *passed)
            tensor = node.inputs[0] if node.inputs else None


def match(pattern: Op, node: gs.Node, scope: Scope) -> Match | None:
    """The first way in which ``node`` fits ``pattern``."""
    for bound in pattern.fits_node(node, scope, {}):
        return Match(scope, node, MappingProxyType(bound))
    return None
