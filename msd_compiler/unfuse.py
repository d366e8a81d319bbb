"""Integer products and their like, spelled as quantize/dequantize pairs around float ops: the one form that readers know.

What onnxruntime's tools write in one op (``QLinearMatMul``, ``DynamicQuantizeMatMul``, ...) or as a chain (``MatMulInteger ->
Cast -> Mul``) means ``DequantizeLinear -> op -> QuantizeLinear``. Spelled so, their layers
are read as any other, and their activations' rounding can be taken out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from .build import NodeBuilder
from .edit import Edit
from .linked import Linked, Scope, optional_input, stated_type
from .source import Source

_MOST_MULS = 3
"""Muls that a chain's scales may be spread over, one inside another."""


@dataclass(frozen=True)
class Place:
    """A node to be unfused, and the tensor that it computes."""

    scope: Scope
    node: gs.Node
    """The product itself."""
    last: gs.Node
    """The node whose output is taken over: ``node``, or the Mul at the end of a chain."""
    form: str
    """The spelling in the source."""
    a_scale: gs.Tensor | None = None
    """Of a chain: what multiplies the activation's codes; None for 1."""
    b_scale: np.ndarray | None = None
    """Of a chain: what multiplies the weight's codes."""
    is_complete: bool = True
    """Of a chain: both scales are in it, and a Mul further on is none of its business."""


Wanted = Callable[[Place, Linked], bool]


def everything(place: Place, linked: Linked) -> bool:
    """All that can be unfused, in a form that runs: below opset 13 that is what has no scale per channel."""
    stored = (
        linked.array(place.scope, t) for i in _SCALES.get(place.node.op, ()) if (t := optional_input(place.node, i))
    )
    scales = [place.b_scale, *stored]
    return linked.source.opset >= 13 or all(s is None or s.size == 1 for s in scales)


def gaining_products(place: Place, linked: Linked) -> bool:
    """Products by a stored weight that onnxruntime saturates or is slow at: all but uint8 by uint8."""
    if place.node.op not in PRODUCTS:
        return False
    weight = place.scope.constant(place.node.inputs[PRODUCTS[place.node.op]])
    if weight is None:
        return False
    return not (weight.data_type == TensorProto.UINT8 and activation_type(place.scope, place.node) == TensorProto.UINT8)


PRODUCTS = MappingProxyType(
    {"MatMulInteger": 1, "QLinearMatMul": 3, "QGemm": 3, "DynamicQuantizeMatMul": 1, "MatMulIntegerToFloat": 1}
)
"""Products of integer codes, with the input that holds the right operand."""

_ZERO_POINT_OF_A = MappingProxyType({"MatMulInteger": 2, "QLinearMatMul": 2, "QGemm": 2, "MatMulIntegerToFloat": 4})


def activation_type(scope: Scope, product: gs.Node) -> int | None:
    """TensorProto type of a product's activation codes, None if the file does not tell."""
    if product.op == "DynamicQuantizeMatMul":
        return int(TensorProto.UINT8)
    codes = product.inputs[0]
    if codes.inputs and codes.inputs[0].op == "DynamicQuantizeLinear":
        return int(TensorProto.UINT8)
    zero_point = optional_input(product, _ZERO_POINT_OF_A[product.op])
    stored = scope.constant(zero_point) if zero_point is not None else None
    if stored is not None:
        return int(stored.data_type)
    return stated_type(codes)


def unfused(linked: Linked, wanted: Wanted) -> tuple[Source, dict[str, str]]:
    """The model with the wanted integer ops spelled out, itself if there are none, and by name of a product its spelling before.

    Below opset 13, where no ``DequantizeLinear`` has a scale per channel, the result may hold such: readers take it, a
    runtime does not.
    """
    source = linked.source
    places = [place for place in _places(linked) if wanted(place, linked)]
    if not places:
        return source, {}
    edit = Edit(source)
    forms = {}
    for place in places:
        name = str(place.node.name or place.node.outputs[0].name)
        build = NodeBuilder(edit, name)
        spell = _Spelling(place, linked, build)
        y = _SPELLINGS[place.node.op](spell)
        assert y == build.nodes[-1].output[0]
        edit.replace(place.scope, [place.last], build.finish(place.last.outputs[0].name))
        forms[name] = place.form
    return replace(source, proto=edit.finish()), forms


def _places(linked: Linked) -> Iterator[Place]:
    chains: dict[int, Place] = {}
    for scope, _, node in linked.nodes():
        if not node.outputs:
            continue
        if node.op in _SCALES and _is_spellable(scope, node, linked):
            form = f"DynamicQuantizeLinear -> {node.op}" if _is_dynamic(node) else node.op
            yield Place(scope, node, node, form)
        elif node.op == "Mul":
            chain = _chain(scope, node, linked)
            known = chains.get(id(chain.node)) if chain else None
            if chain and not (known and known.is_complete):
                chains[id(chain.node)] = chain
    yield from chains.values()


def _is_dynamic(product: gs.Node) -> bool:
    codes = product.inputs[0]
    return bool(codes.inputs) and codes.inputs[0].op == "DynamicQuantizeLinear"


def _chain(scope: Scope, last: gs.Node, linked: Linked) -> Place | None:
    """``MatMulInteger -> Cast`` times scales, that of the activation and that of the weight, in one ``Mul`` or several."""
    factors = _factors(last, _MOST_MULS)
    casts = [t.inputs[0] for t in factors if t.inputs and t.inputs[0].op == "Cast"]
    casts = [c for c in casts if c.inputs[0].inputs and c.inputs[0].inputs[0].op == "MatMulInteger"]
    if len(casts) != 1 or casts[0].attrs.get("to") != TensorProto.FLOAT:
        return None
    product = casts[0].inputs[0].inputs[0]
    others = [t for t in factors if t is not casts[0].outputs[0]]
    stored = [value for t in others if (value := linked.array(scope, t)) is not None]
    computed = [t for t in others if scope.constant(t) is None]
    if len(computed) > 1 or any(value.dtype != np.float32 for value in stored):
        return None
    if computed and not _is_scale_of(scope, product, computed[0], linked):
        return None
    b_scale: np.ndarray = np.ones((), np.float32)
    for value in stored:
        b_scale = np.asarray(b_scale * value)
    weight = scope.constant(product.inputs[1])
    if b_scale.size == 1:
        b_scale = b_scale.reshape(())
    elif weight is None or len(weight.dims) < 2 or b_scale.size != weight.dims[-1] or b_scale.shape[-1] != b_scale.size:
        return None
    if not (
        _stands_beside(scope, optional_input(product, 2), 1)
        and _stands_beside(scope, optional_input(product, 3), b_scale.size)
    ):
        return None
    form = "MatMulInteger -> Cast -> Mul"
    return Place(
        scope,
        product,
        last,
        f"DynamicQuantizeLinear -> {form}" if _is_dynamic(product) else form,
        computed[0] if computed else None,
        b_scale.reshape(-1) if b_scale.ndim else b_scale,
        bool(stored) and (bool(computed) or not _is_dynamic(product)),
    )


def _factors(mul: gs.Node, depth: int) -> list[gs.Tensor]:
    found: list[gs.Tensor] = []
    for tensor in mul.inputs:
        producer = tensor.inputs[0] if tensor.inputs else None
        if producer is not None and producer.op == "Mul" and depth > 1:
            found += _factors(producer, depth - 1)
        else:
            found.append(tensor)
    return found


def _is_scale_of(scope: Scope, product: gs.Node, tensor: gs.Tensor, linked: Linked) -> bool:
    """Whether a computed factor is the scale of the product's activation."""
    if _is_dynamic(product):
        return bool(tensor is product.inputs[0].inputs[0].outputs[1])
    return linked.is_single(scope, tensor)


def _stands_beside(scope: Scope, zero_point: gs.Tensor | None, scales: int) -> bool:
    """Whether a zero point is one value, or as many as there are scales."""
    if zero_point is None or (zero_point.inputs and zero_point.inputs[0].op == "DynamicQuantizeLinear"):
        return True
    stored = scope.constant(zero_point)
    return stored is not None and prod(stored.dims) in (1, scales)


def _is_spellable(scope: Scope, node: gs.Node, linked: Linked) -> bool:
    """Whether the scales' granularity is known (they are stored, or single), and a Softmax is that of the model's opset."""
    scales = (optional_input(node, index) for index in _SCALES[node.op] if index < len(node.inputs))
    if node.op == "QLinearSoftmax" and (int(node.attrs.get("opset", 13)) >= 13) != (linked.source.opset >= 13):
        return False
    return all(t is None or scope.constant(t) is not None or linked.is_single(scope, t) for t in scales)


class _Spelling:
    """Writes what a place means."""

    def __init__(self, place: Place, linked: Linked, build: NodeBuilder):
        self.place, self.build = place, build
        self.node = place.node
        self._linked = linked

    def name(self, index: int) -> str:
        """The name of an input, empty if it is absent."""
        tensor = optional_input(self.node, index)
        return "" if tensor is None else str(tensor.name)

    def dequantized(self, codes: int, scale: int, zero_point: int, axis: int | None = None) -> str:
        """An operand as float; ``axis`` counts from the front of its matrix (0 or 1), and only matters per channel."""
        stored = self._stored(scale)
        return self._dequantize(codes, self.name(scale), zero_point, 1 if stored is None else stored.size, axis)

    def weight_of_chain(self) -> str:
        """The right operand of a ``MatMulInteger`` whose scales multiply its result."""
        scale = self.place.b_scale
        assert scale is not None
        return self._dequantize(1, self.build.constant("b_scale", scale), 3, scale.size, 1)

    def activation_of_chain(self) -> str:
        """The left operand of such a product."""
        scale = self.place.a_scale
        name = self.build.constant("one", np.ones((), np.float32)) if scale is None else str(scale.name)
        return self._dequantize(0, name, 2, 1, None)

    def product(self, x: str, w: str, op: str = "MatMul", *more: str, **attributes: Any) -> str:
        """The float product, named as the integer one was."""
        name = str(self.node.name or self.node.outputs[0].name)
        return self.build.node(op, x, w, *more, name=name, **attributes)

    def quantized(self, y: str, scale: int, zero_point: int) -> str:
        """Codes of a result."""
        return self.build.node("QuantizeLinear", y, *(n for n in (self.name(scale), self.name(zero_point)) if n))

    def bias_of_gemm(self, alpha: float) -> str:
        """int32 codes whose scale is the product of both operands' scales."""
        a, b = self._stored(1), self._stored(4)
        assert a is not None
        assert b is not None
        scale = (np.float32(alpha) * a.reshape(-1) * b.reshape(-1)).astype(np.float32)
        codes = self.build.node("Cast", self.name(6), to=TensorProto.FLOAT)
        return self.build.node("Mul", codes, self.build.constant("c_scale", scale))

    def _dequantize(self, codes: int, scale: str, zero_point: int, channels: int, axis: int | None) -> str:
        tensor = optional_input(self.node, codes)
        assert tensor is not None
        zero, stored = self.name(zero_point), self._stored(zero_point)
        if stored is not None and stored.size != channels:
            repeated = np.broadcast_to(stored.reshape(-1)[:1], (channels,))
            zero = self.build.constant("zero_point", repeated.reshape(() if channels == 1 else (channels,)).copy())
        inputs = [str(tensor.name), scale] + [zero] * bool(zero)
        if channels == 1 or axis is None:
            return self.build.node("DequantizeLinear", *inputs)
        shape = self._linked.shape(self.place.scope, tensor)
        rank = 2 if shape is None else len(shape)
        return self.build.node("DequantizeLinear", *inputs, axis=rank - 2 + axis)

    def _stored(self, index: int) -> np.ndarray | None:
        tensor = optional_input(self.node, index)
        return None if tensor is None else self._linked.array(self.place.scope, tensor)


def _matmul_integer(s: _Spelling) -> str:
    return s.product(s.activation_of_chain(), s.weight_of_chain())


def _qlinear_matmul(s: _Spelling) -> str:
    return s.quantized(s.product(s.dequantized(0, 1, 2), s.dequantized(3, 4, 5, axis=1)), 6, 7)


def _matmul_integer_to_float(s: _Spelling) -> str:
    y = s.product(s.dequantized(0, 2, 4), s.dequantized(1, 3, 5, axis=1))
    return s.build.node("Add", y, s.name(6)) if s.name(6) else y


def _dynamic_quantize_matmul(s: _Spelling) -> str:
    codes, scale, zero = s.build.node_of(3, "DynamicQuantizeLinear", s.name(0))
    x = s.build.node("DequantizeLinear", codes, scale, zero)
    y = s.product(x, s.dequantized(1, 2, 3, axis=1))
    return s.build.node("Add", y, s.name(4)) if s.name(4) else y


def _qgemm(s: _Spelling) -> str:
    trans_a, trans_b = (int(s.node.attrs.get(name, 0)) for name in ("transA", "transB"))
    alpha = float(s.node.attrs.get("alpha", 1.0))
    c = [s.bias_of_gemm(alpha)] if s.name(6) else []
    x, w = s.dequantized(0, 1, 2), s.dequantized(3, 4, 5, axis=0 if trans_b else 1)
    y = s.product(x, w, "Gemm", *c, alpha=alpha, transA=trans_a, transB=trans_b)
    return s.quantized(y, 7, 8) if s.name(7) else y


def _binary(op: str) -> Callable[[_Spelling], str]:
    return lambda s: s.quantized(s.build.node(op, s.dequantized(0, 1, 2), s.dequantized(3, 4, 5)), 6, 7)


def _unary(op: str, *attributes: str) -> Callable[[_Spelling], str]:
    def spell(s: _Spelling) -> str:
        kept: dict[str, Any] = {name: s.node.attrs[name] for name in attributes if name in s.node.attrs}
        return s.quantized(s.build.node(op, s.dequantized(0, 1, 2), **kept), 3, 4)

    return spell


def _concat(s: _Spelling) -> str:
    parts = [s.dequantized(i, i + 1, i + 2) for i in range(2, len(s.node.inputs), 3)]
    return s.quantized(s.build.node("Concat", *parts, axis=s.node.attrs["axis"]), 0, 1)


def _where(s: _Spelling) -> str:
    return s.quantized(s.build.node("Where", s.name(0), s.dequantized(1, 2, 3), s.dequantized(4, 5, 6)), 7, 8)


_SPELLINGS: MappingProxyType[str, Callable[[_Spelling], str]] = MappingProxyType(
    {
        "MatMulInteger": _matmul_integer,
        "QLinearMatMul": _qlinear_matmul,
        "MatMulIntegerToFloat": _matmul_integer_to_float,
        "DynamicQuantizeMatMul": _dynamic_quantize_matmul,
        "QGemm": _qgemm,
        "QLinearAdd": _binary("Add"),
        "QLinearMul": _binary("Mul"),
        "QLinearSigmoid": _unary("Sigmoid"),
        "QLinearLeakyRelu": _unary("LeakyRelu", "alpha"),
        "QLinearSoftmax": _unary("Softmax", "axis"),
        "QLinearConcat": _concat,
        "QLinearWhere": _where,
    }
)
"""By op, its meaning in the default domain (onnxruntime, ContribOperators; ONNX, QLinearMatMul)."""

_SCALES: MappingProxyType[str, tuple[int, ...]] = MappingProxyType(
    {
        "QLinearMatMul": (1, 4),
        "MatMulIntegerToFloat": (2, 3),
        "DynamicQuantizeMatMul": (2,),
        "QGemm": (1, 4),
        "QLinearAdd": (1, 4),
        "QLinearMul": (1, 4),
        "QLinearSigmoid": (1,),
        "QLinearLeakyRelu": (1,),
        "QLinearSoftmax": (1,),
        "QLinearConcat": tuple(range(3, 3000, 3)),
        "QLinearWhere": (2, 5),
    }
)
"""By op, the inputs that are scales of operands: one value, or for a weight one per column."""
