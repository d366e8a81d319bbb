"""DequantizeLinear -> [Cast | Identity | Reshape | Transpose]* -> MatMul | Gemm -> QuantizedLinear, weight on either side.

The codes are stored, or made of a float constant (`quantized_constant`).
"""

from __future__ import annotations

import typing

import numpy as np
import onnx_graphsurgeon as gs

from msd_compiler.constant_values import DEQUANTIZER_DOMAINS, DEQUANTIZERS
from msd_compiler.facts import QuantizedLinear, ReasonCode, Reject
from msd_compiler.linked import Linked
from msd_compiler.pattern import Any, Chain, Const, Match, Maybe, OneOf, Op
from msd_compiler.reader import Reader

from .activation import given_codes, rows_of, transposed
from .constants import row_vector
from .dequantized_weight import DequantizedWeight, read_dequantized
from .quantized_constant import CLIP, QUANTIZE
from .scales import SCALES

DEQUANTIZED = Chain(
    ("Cast", "Identity", "Reshape", "Transpose"),
    Op(
        DEQUANTIZERS,
        OneOf((Const("codes"), QUANTIZE, CLIP)),
        SCALES,
        Maybe(Const("zero_points")),
        domains=DEQUANTIZER_DOMAINS,
        name="dequantize",
    ),
    name="chain",
)


def _form(m: Match) -> str:
    before = [*m.chain("before"), m.op("quantize")] if "quantize" in m.bound else []
    clip = [m.op("clip")] if "clip" in m.bound else []
    nodes = [*before, *clip, m.op("dequantize"), *m.chain("chain"), m.op("product")]
    return " -> ".join(node.op for node in nodes)


def _known(weight: DequantizedWeight) -> dict[str, int | str]:
    return {"k": weight.k, "n": weight.n, "format": weight.format}


def _linear(m: Match, weights: tuple[DequantizedWeight, ...], element_type: int, **more: typing.Any) -> QuantizedLinear:
    """The fact for a matched product; ``more`` is what MatMul and Gemm do differently."""
    node = m.op("product")
    return QuantizedLinear(
        scope=m.scope,
        product=node,
        replaced=(node,),
        form=_form(m),
        x=m.tensor("x"),
        y=node.outputs[0],
        weights=weights,
        element_type=element_type,
        **more,
    )


class ReadDequantizedMatMul(Reader):
    """MatMul by a dequantized weight.

    A weight on the left is the same product transposed. A weight of rank 3 is one matrix per expert; x then
    has the experts as its third dimension from the right, or shares its rows among them.
    """

    patterns = (
        Op("MatMul", Any("x"), DEQUANTIZED, name="product"),
        Op("MatMul", DEQUANTIZED, Any("x"), name="product"),
    )

    def read(self, m: Match, linked: Linked) -> QuantizedLinear:
        """See `Reader`."""
        node, x = m.op("product"), m.tensor("x")
        on_the_left = node.inputs[0] is not x
        weights, element_type = read_dequantized(m, linked, transposed=on_the_left)
        weight = weights[0]
        codes = given_codes(x, weight, m.scope, linked)
        shape = linked.shape(m.scope, x)
        x_rank = None if shape is None else len(shape)
        batch = weight.view.shape[:-2]
        y_rank = None
        if x_rank is not None:
            y_rank = max(x_rank, len(weight.view.dims)) if x_rank > 1 else len(weight.view.dims) - 1
        if x_rank is None and (on_the_left or batch):
            why = "a weight on the left" if on_the_left else f"a weight of rank {len(weight.view.dims)}"
            raise Reject(
                ReasonCode.UNKNOWN_RANK,
                f"the rank of its activation {x.name!r} is unknown, which {why} needs",
                **_known(weight),
            )
        turned = on_the_left and x_rank != 1  # a vector is row and column alike
        if len(weights) > 1:
            self._check_experts(x, shape, batch, weight)
        return _linear(
            m,
            weights,
            element_type,
            codes=codes,
            swapped=(turned, turned),
            x_shape=None if shape is None else tuple(shape),
            y_rank=y_rank,
            rows=rows_of(transposed(shape) if turned else shape),
        )

    @staticmethod
    def _check_experts(
        x: gs.Tensor, shape: list[int | str | None] | None, batch: tuple[int, ...], weight: DequantizedWeight
    ) -> None:
        assert shape is not None
        per_expert = shape[-3] if len(shape) >= 3 else 1
        if len(batch) > 1 or len(shape) < 2 or per_expert not in (1, batch[0]):
            raise Reject(
                ReasonCode.SCALE_LAYOUT,
                f"its weight holds {list(batch)} matrices; the activation {x.name!r} of shape {shape} does not pair with them",
                **_known(weight),
            )


class ReadDequantizedGemm(Reader):
    """Gemm by a dequantized weight: alpha, beta, transA, transB, and a bias of any shape that broadcasts."""

    patterns = (
        Op("Gemm", Any("x"), DEQUANTIZED, Maybe(Any("c")), name="product"),
        Op("Gemm", DEQUANTIZED, Any("x"), Maybe(Any("c")), name="product"),
    )

    def read(self, m: Match, linked: Linked) -> QuantizedLinear:
        """See `Reader`."""
        node, x = m.op("product"), m.tensor("x")
        on_the_left = node.inputs[0] is not x
        trans_a, trans_b = (bool(node.attrs.get(a, 0)) for a in ("transA", "transB"))
        weight_transposed = trans_a if on_the_left else trans_b
        weights, element_type = read_dequantized(m, linked, transposed=weight_transposed != on_the_left)
        weight = weights[0]
        if len(weight.view.dims) != 2:
            raise Reject(ReasonCode.SCALE_LAYOUT, f"Gemm takes matrices, its weight has rank {len(weight.view.dims)}")
        codes = given_codes(x, weight, m.scope, linked)
        x_swapped = not trans_b if on_the_left else trans_a

        shape = linked.shape(m.scope, x)
        c, beta = m.maybe("c"), float(node.attrs.get("beta", 1.0))
        bias: np.ndarray | None = None
        if c is not None and not on_the_left:
            bias = row_vector(c, m.scope, linked, weight.n)
        return _linear(
            m,
            weights,
            element_type,
            codes=codes,
            alpha=float(node.attrs.get("alpha", 1.0)),
            bias=None if bias is None else (bias * np.float32(beta)),
            addend=c if bias is None else None,
            beta=beta,
            swapped=(x_swapped, on_the_left),
            x_shape=tuple(shape or (None, None)),
            y_rank=2,
            rows=rows_of(transposed(shape) if x_swapped else shape),
        )
