"""From a Softmax up to the product of queries and keys: factor, soft cap and masks on the way."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from msd_compiler.attention import Mask
from msd_compiler.facts import ReasonCode, Reject
from msd_compiler.linked import Linked, Scope
from msd_compiler.pattern import DEFAULT_DOMAINS

from .shape_values import ShapeValues

PRODUCTS = frozenset({"MatMul", "FusedMatMul", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "Einsum"})
"""Ops that multiply two activations."""

COPIES = frozenset({"Identity", "Dropout"})
"""Ops whose first output is their first input, where nothing is trained."""

_PASSED = COPIES | {
    *("Add", "Sub", "Mul", "Div", "Where", "Tanh", "Cast", "Clip", "Min", "Max"),
    *("Reshape", "Squeeze", "Unsqueeze", "Transpose", "QuantizeLinear", "DequantizeLinear"),
}
"""Ops that the logits of some attention may come through, followed or not."""

HIDDEN = -1e4
"""A fill at or below it hides: exp of the distance to any seen logit is 0."""

_DEEPEST = 24


def named(node: gs.Node) -> str:
    """``Mul 'name'``, for people."""
    return f"{node.op} {(node.name or (node.outputs[0].name if node.outputs else ''))!r}"


def maker(tensor: gs.Tensor, scope: Scope) -> gs.Node | None:
    """The node that computes the tensor; None for an input or a constant."""
    return tensor.inputs[0] if tensor.inputs and scope.constant(tensor) is None else None


NO_CACHE = "attention without a cache: both products are of activations"
"""The sentence of `ReasonCode.NO_CACHE`."""


def not_followed(reason: str) -> Reject:
    """Attention with something in it that is not followed."""
    return Reject(ReasonCode.ATTENTION_FORM, reason)


@dataclass
class Logits:
    """``softmax(cap * tanh(scale * product / cap) + masks)``."""

    product: gs.Node
    scale: float = 1.0
    soft_cap: float = 0.0
    masks: list[Mask] = field(default_factory=list)
    path: list[gs.Node] = field(default_factory=list)
    """The nodes after the product and before the softmax, in the order of data flow."""


class LogitsReader:
    """Reads the logits of one graph."""

    def __init__(self, scope: Scope, linked: Linked, values: ShapeValues):
        self._scope = scope
        self._linked = linked
        self._values = values
        self._found: dict[int, gs.Node | None] = {}

    def product(self, tensor: gs.Tensor, depth: int = 0) -> gs.Node | None:
        """The product of two activations that a tensor comes from, through whatever logits may come through."""
        if id(tensor) not in self._found:
            self._found[id(tensor)] = None
            self._found[id(tensor)] = self._find(tensor, depth)
        return self._found[id(tensor)]

    def _find(self, tensor: gs.Tensor, depth: int) -> gs.Node | None:
        node = maker(tensor, self._scope)
        if node is None or depth == _DEEPEST:
            return None
        if node.op in PRODUCTS:
            return node if self._is_of_activations(node) else None
        if node.op not in _PASSED or (node.domain or "") not in DEFAULT_DOMAINS:
            return None
        data = node.inputs[1:] if node.op == "Where" else node.inputs
        found = (self.product(t, depth + 1) for t in data if not t.is_empty())
        return next((product for product in found if product is not None), None)

    def _is_of_activations(self, node: gs.Node) -> bool:
        second = node.inputs[3 if node.op == "QLinearMatMul" else 1] if len(node.inputs) > 1 else None
        while second is not None:
            if self._scope.constant(second) is not None:
                return False
            before = maker(second, self._scope)
            moves = before is not None and before.op in ("DequantizeLinear", "QuantizeLinear", "Cast", "Transpose")
            second = before.inputs[0] if before is not None and moves else None
        return len(node.inputs) > 1

    def read(self, softmax: gs.Node) -> Logits:
        """What happens to the product before the softmax.

        Raises:
            Reject: something that is not followed.
        """
        logits = Logits(softmax)
        tensor = softmax.inputs[0]
        product = self.product(tensor)
        assert product is not None
        logits.product = product
        while (node := maker(tensor, self._scope)) is not product:
            assert node is not None
            logits.path.insert(0, node)
            tensor = self._step(node, logits)
        return logits

    def _step(self, node: gs.Node, logits: Logits) -> gs.Tensor:
        """Take one node into account; the tensor that it gets the logits from."""
        if node.op in COPIES or node.op == "Cast":
            return node.inputs[0]
        if node.op == "Add":
            tensor, other = self._apart(node, node.inputs[0], node.inputs[1])
            self._mask(node, logits, other, is_bool=False)
            return tensor
        if node.op == "Where":
            tensor, fill = self._apart(node, node.inputs[1], node.inputs[2])
            value = self._values.scalar(fill)
            if value is None or value > HIDDEN:
                raise not_followed(f"{named(node)} puts {fill.name!r} in place of logits; -inf or {HIDDEN:g} is needed")
            self._mask(node, logits, node.inputs[0], is_bool=True, hides=tensor is node.inputs[2])
            return tensor
        if node.op in ("Mul", "Div"):
            tensor, other = self._apart(node, node.inputs[0], node.inputs[1])
            logits.scale *= self.factor(node, tensor, other)
            return tensor
        if node.op == "Tanh" and not logits.soft_cap and logits.scale > 0:
            logits.soft_cap = logits.scale  # cap * tanh(x / cap), where 1 / cap is met next
            return node.inputs[0]
        if node.op in ("QuantizeLinear", "DequantizeLinear"):
            raise not_followed(f"{named(node)}: the model rounds its logits to integers")
        raise not_followed(f"{named(node)} between its first product and its softmax is not followed")

    def _apart(self, node: gs.Node, a: gs.Tensor, b: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor]:
        """The logits, and what they are combined with."""
        if self.product(a) is not None and self.product(b) is not None:
            raise not_followed(f"{named(node)} combines two products before its softmax")
        return (a, b) if self.product(a) is not None else (b, a)

    def _mask(self, node: gs.Node, logits: Logits, mask: gs.Tensor, *, is_bool: bool, hides: bool = False) -> None:
        if logits.soft_cap or logits.scale != 1.0:
            raise not_followed(f"the mask that {named(node)} applies is scaled or capped after it; it must come last")
        dims = self._values.dims(mask)
        if dims is None or len(dims) > 4:
            raise not_followed(f"the mask {mask.name!r} of {named(node)} has an unknown shape; 4 dimensions are needed")
        logits.masks.append(Mask(mask, len(dims), is_bool, hides))

    def factor(self, node: gs.Node, tensor: gs.Tensor, other: gs.Tensor) -> float:
        """What a Mul or Div multiplies ``tensor`` by.

        Raises:
            Reject: it is no single number that the file tells.
        """
        value = self._values.scalar(other)
        if value is None:
            raise not_followed(f"the factor {other.name!r} of {named(node)} is no single number that the file tells")
        if node.op == "Mul":
            return value
        if tensor is not node.inputs[0] or value == 0:
            raise not_followed(f"{named(node)} divides by its logits, or by 0")
        return 1.0 / value
