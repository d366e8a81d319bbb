"""MatMul -> [factor | soft cap | masks]* -> Softmax -> [guard]* -> MatMul over a cache -> AttentionSite."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from msd_compiler.attention import AttentionSite, Mask
from msd_compiler.facts import ReasonCode, Reject
from msd_compiler.linked import Linked, Scope
from msd_compiler.pattern import Any, Match, Op
from msd_compiler.reader import Reader

from .activation import rows_of
from .attention_cache import Operand, read_kept, trace
from .attention_layout import CACHE, TRANSPOSED, Axis
from .attention_logits import COPIES, NO_CACHE, PRODUCTS, Logits, LogitsReader, maker, named, not_followed
from .attention_operands import places, sizes, told_shapes
from .attention_region import region_of
from .shape_values import ShapeValues

_PASSED = COPIES | {"Cast", "Where", "Mul", "Div", "Reshape", "Transpose", "QuantizeLinear", "DequantizeLinear"}
"""Ops through which probabilities may reach their product, followed or not."""

_FURTHEST = 12
_SOFTMAX_OF_LAST_AXIS = 13
"""The opset since which Softmax is by default over the last dimension, and not over all from the second on."""


@dataclass(frozen=True)
class Weighted:
    """The product of probabilities and values."""

    product: gs.Node
    path: tuple[gs.Node, ...]
    """The nodes between it and the softmax, in the order of data flow."""


class ReadDecomposedAttention(Reader):
    """What torch, optimum and others write: two products and a softmax between them."""

    patterns = (Op("Softmax", Any("logits"), name="softmax"),)

    def read(self, m: Match, linked: Linked) -> AttentionSite | None:
        """See `Reader`."""
        scope, softmax = m.scope, m.op("softmax")
        values = ShapeValues(scope, linked)
        reader = LogitsReader(scope, linked, values)
        first, second = reader.product(m.tensor("logits")), _weighted(softmax)
        if first is None or second is None:
            return None
        keys, cached = (trace(_second(product), scope, values) for product in (first, second.product))
        known = _known(first, values)
        if keys.writer is None and cached.writer is None:
            raise Reject(ReasonCode.NO_CACHE, NO_CACHE, **known)
        try:
            return _site(softmax, reader.read(softmax), second, (keys, cached), scope, linked, values)
        except Reject as reject:
            raise Reject(reject.code, reject.reason, **known) from None


def _second(product: gs.Node) -> gs.Tensor:
    return product.inputs[3 if product.op == "QLinearMatMul" else 1]


def _known(product: gs.Node, values: ShapeValues) -> dict[str, int | str]:
    """Heads and head size, as far as the shape of the queries tells."""
    dims = values.dims(product.inputs[0]) or ()
    named_dims = {"heads": dims[1], "head_size": dims[3]} if len(dims) == 4 else {}
    return {name: d for name, d in named_dims.items() if d is not None}


def _weighted(softmax: gs.Node) -> Weighted | None:
    """The nearest product that takes the probabilities as its first operand."""
    paths: list[tuple[gs.Tensor, tuple[gs.Node, ...]]] = [(softmax.outputs[0], ())]
    for tensor, path in paths:
        for node in tensor.outputs:
            if node.op in PRODUCTS and node.inputs[0] is tensor and len(node.inputs) > 1:
                return Weighted(node, path)
            if node.op in _PASSED and len(path) < _FURTHEST and len(paths) < 2 * _FURTHEST and node.outputs:
                paths.append((node.outputs[0], (*path, node)))
    return None


def _site(
    softmax: gs.Node,
    logits: Logits,
    weighted: Weighted,
    operands: tuple[Operand, Operand],
    scope: Scope,
    linked: Linked,
    values: ShapeValues,
) -> AttentionSite:
    """The facts, once it is known that there is a cache.

    Raises:
        Reject: something is not followed.
    """
    _check_axis(softmax, linked, values)
    tensor = softmax.outputs[0]
    for node in weighted.path:
        _check_guard(node, tensor, logits, scope, values)
        tensor = node.outputs[0]
    alpha, key_order = _product(logits.product, transposed=True)
    beta, value_order = _product(weighted.product, transposed=False)
    for operand, what in zip(operands, ("keys", "values"), strict=True):
        if operand.writer is None:
            raise not_followed(f"its {what} {operand.source.name!r} come from no cache, unlike the other ones")
    key = read_kept(operands[0], key_order, scope, linked, values)
    value = read_kept(operands[1], value_order, scope, linked, values)
    if beta * value.scale != 1.0:
        raise not_followed(f"{named(weighted.product)} scales its values by {beta * value.scale:g}; 1 is needed")
    q = logits.product.inputs[0]
    heads, kv_heads, size, value_size = sizes(q, key, value, values)
    core = (logits.product, *logits.path, softmax, *weighted.path, weighted.product)
    mask, more = _masks(logits.masks)
    probabilities = (logits.product, *logits.path, softmax, *weighted.path)
    region = region_of(
        scope,
        core=core,
        parts=(*key.nodes, *value.nodes),
        caches=(key.cache, value.cache),
        operands=(q, key.new, value.new, *(m.tensor for m in logits.masks), *places(key, value)),
        shapes={
            **{id(n.outputs[0]): ("batch", heads, "queries", "tokens") for n in probabilities},
            **told_shapes(key, heads),
            **told_shapes(value, heads),
        },
    )
    shape = linked.shape(scope, q)
    return AttentionSite(
        scope=scope,
        node=softmax,
        replaced=region.replaced,
        shape_readers=region.shape_readers,
        form=" -> ".join(n.op for n in core if n.op not in COPIES and n.op != "Cast"),
        q=q,
        k=key.new,
        v=value.new,
        y=weighted.product.outputs[0],
        key_cache=key.cache,
        value_cache=value.cache,
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        value_head_size=value_size,
        element_type=key.element_type,
        scale=alpha * logits.scale * key.scale,
        soft_cap=logits.soft_cap,
        mask=None if mask is None else mask.tensor,
        mask_rank=4 if mask is None else mask.rank,
        mask_is_bool=mask is not None and mask.is_bool,
        more_masks=more,
        rows=None if shape is None or len(shape) != 4 else rows_of([shape[0], shape[2], shape[3]]),
    )


def _check_axis(softmax: gs.Node, linked: Linked, values: ShapeValues) -> None:
    default = -1 if linked.source.opset >= _SOFTMAX_OF_LAST_AXIS else 1
    axis = int(softmax.attrs.get("axis", default))
    dims = values.dims(softmax.inputs[0])
    rank = 4 if dims is None else len(dims)
    if axis not in (-1, rank - 1):
        raise not_followed(f"{named(softmax)} is over dimension {axis} of {rank}; the last one is needed")


def _check_guard(node: gs.Node, probabilities: gs.Tensor, logits: Logits, scope: Scope, values: ShapeValues) -> None:
    """Between softmax and product there may be copies, casts, and zeros in place of rows that see nothing."""
    if node.op in COPIES or node.op == "Cast":
        return
    if node.op == "Where" and node.inputs[2] is probabilities and values.scalar(node.inputs[1]) == 0:
        condition = maker(node.inputs[0], scope)
        if condition is not None and condition.op == "IsNaN" and condition.inputs[0] is probabilities:
            return
        if condition is not None and _sees_nothing(condition, logits, scope, values):
            return
    raise not_followed(f"{named(node)} between its softmax and its second product is not followed")


def _sees_nothing(equal: gs.Node, logits: Logits, scope: Scope, values: ShapeValues) -> bool:
    """Whether a node says which rows of a mask are -inf throughout."""
    if equal.op != "Equal" or values.scalar(equal.inputs[1]) != float("-inf"):
        return False
    highest = maker(equal.inputs[0], scope)
    return (
        highest is not None and highest.op == "ReduceMax" and any(highest.inputs[0] is m.tensor for m in logits.masks)
    )


def _product(node: gs.Node, *, transposed: bool) -> tuple[float, tuple[Axis, ...]]:
    """The factor of a product, and the dimensions that its second operand has for attention."""
    if node.op not in ("MatMul", "FusedMatMul"):
        raise not_followed(f"{named(node)} is a product that is not followed; MatMul is needed")
    attributes = node.attrs if node.op == "FusedMatMul" else {}
    if any(int(attributes.get(name, 0)) for name in ("transA", "transBatchA", "transBatchB")):
        raise not_followed(f"{named(node)} transposes its first operand, or batches")
    exchanged = transposed != bool(int(attributes.get("transB", 0)))
    return float(attributes.get("alpha", 1.0)), TRANSPOSED if exchanged else CACHE


def _masks(masks: list[Mask]) -> tuple[Mask | None, tuple[Mask, ...]]:
    """The mask, and further ones."""
    plain = next((m for m in masks if not m.hides), None)
    return plain, tuple(m for m in masks if m is not plain)
