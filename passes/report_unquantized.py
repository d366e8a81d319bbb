"""Products by a weight that is no codes in the file (float, or known at run time only): a row, no rewrite."""

from __future__ import annotations

import onnx_graphsurgeon as gs
from onnx import TensorProto

from msd_compiler.facts import ReasonCode, Reject
from msd_compiler.linked import Linked
from msd_compiler.pattern import DEFAULT_DOMAINS, Any, Chain, Const, Match, Maybe, Op
from msd_compiler.reader import Reader
from msd_compiler.source import type_name

from .activation import origin
from .codes import FLOAT_TYPES, refuse_type

_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul")
_DOMAINS = (*DEFAULT_DOMAINS, "com.microsoft")
_MOVES = ("Cast", "Identity", "Reshape", "Transpose")

_STORED = Chain(_MOVES, Const("weight"), name="chain")
_DEQUANTIZED = Chain(
    _MOVES,
    Op("DequantizeLinear", Any("codes"), Any("scales"), Maybe(Any("zero_points")), domains=_DOMAINS),
)


def _product(first: Any | Chain, second: Any | Chain) -> Op:
    return Op(_PRODUCTS, first, second, Maybe(Any()), domains=_DOMAINS, name="product")


class ReportFloatWeight(Reader):
    """Nothing to multiply directly: the weight is stored as float."""

    patterns = (_product(Any("x"), _STORED), _product(_STORED, Any("x")))

    def read(self, m: Match, linked: Linked) -> None:
        """See `Reader`."""
        weight = m.scope.constant(m.tensor("weight"))
        assert weight is not None
        dims = list(weight.dims)
        if weight.data_type not in (*FLOAT_TYPES, TensorProto.DOUBLE) or len(dims) < 2 or min(dims[-2:]) < 2:
            return
        if m.scope.constant(m.tensor("x")) is not None:
            return
        for node in m.chain("chain"):
            if node.op == "Transpose":
                dims = [dims[p] for p in node.attrs.get("perm", range(len(dims))[::-1])]
            elif node.op == "Reshape":
                return  # a table of positions or masks, not a layer
        node = m.op("product")
        on_the_left = node.inputs[0] is not m.tensor("x")
        if bool(node.attrs.get("transA" if on_the_left else "transB", 0)) != on_the_left:
            dims[-2:] = dims[:-3:-1]
        raise Reject(
            ReasonCode.FLOAT_WEIGHT,
            f"its weight {weight.name!r} is {type_name(weight.data_type)}, not quantized",
            k=int(dims[-2]),
            n=int(dims[-1]),
            format=type_name(weight.data_type),
        )


class ReportDequantizedWeight(Reader):
    """The weight is dequantized, but not from codes and scales that a reader takes."""

    patterns = (_product(Any("x"), _DEQUANTIZED), _product(_DEQUANTIZED, Any("x")))

    def read(self, m: Match, linked: Linked) -> None:
        """See `Reader`."""
        codes = m.scope.constant(m.tensor("codes"))
        if codes is None:
            _refuse_input(m.tensor("codes"), m)
            return  # an activation that the model rounds
        refuse_type(f"weight {codes.name!r} is", codes.data_type)
        for name, what in (("scales", "scales"), ("zero_points", "zero points")):
            tensor = m.maybe(name)
            if tensor is not None and m.scope.constant(tensor) is None:
                raise Reject(ReasonCode.RUNTIME_WEIGHT, f"its {what} {tensor.name!r} are not stored in the file")
        product = m.op("product")
        if product.op == "FusedMatMul":
            raise Reject(ReasonCode.FUSED_OP, "FusedMatMul: its own transpositions and factor are not read")


class ReportRuntimeWeight(Reader):
    """The weight arrives at run time, so it cannot be packed."""

    patterns = (
        _product(Any("x"), Any("weight")),
        Op("MatMulInteger", Any("x"), Any("weight"), Maybe(Any()), Maybe(Any()), name="product"),
    )

    def read(self, m: Match, linked: Linked) -> None:
        """See `Reader`."""
        x, weight = origin(m.tensor("x")), origin(m.tensor("weight"))
        if x is not weight and m.scope.constant(x) is None:
            _refuse_input(weight, m)


def _refuse_input(weight: gs.Tensor, m: Match) -> None:
    """A matrix that is an input of the model is a weight that is given at run time."""
    is_input = m.scope.parent is None and any(weight is t for t in m.scope.graph.inputs)
    if is_input and weight.shape is not None and len(weight.shape) == 2:
        raise Reject(
            ReasonCode.RUNTIME_WEIGHT, f"its weight {weight.name!r} is an input of the model, not stored in the file"
        )
