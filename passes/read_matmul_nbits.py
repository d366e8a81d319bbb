"""com.microsoft.MatMulNBits(x, B, scales, [zero points], [g_idx], [bias]) -> QuantizedLinear, whatever its accuracy_level."""

from __future__ import annotations

import numpy as np

from msd_compiler.errors import ModelError
from msd_compiler.facts import QuantizedLinear, ReasonCode, Reject
from msd_compiler.linked import Linked
from msd_compiler.pattern import Any, Match, Maybe, Op
from msd_compiler.reader import Reader

from .activation import given_codes, rows_of
from .nbits_weight import nbits_weight


class ReadMatMulNBits(Reader):
    """The op of onnxruntime's quantizer and of the GenAI builder."""

    patterns = (
        Op(
            "MatMulNBits",
            Any("x"),
            Any("B"),
            Any("scales"),
            Maybe(Any("zero_points")),
            Maybe(Any("g_idx")),
            Maybe(Any("bias")),
            domains=("com.microsoft",),
            name="product",
        ),
    )

    def read(self, m: Match, linked: Linked) -> QuantizedLinear:
        """See `Reader`."""
        node, x = m.op("product"), m.tensor("x")
        weight = nbits_weight(m.scope, linked, node)
        codes = given_codes(x, weight, m.scope, linked)
        bias = None
        if m.maybe("bias") is not None:
            value = linked.array(m.scope, m.tensor("bias"))
            if value is None:
                raise Reject(
                    ReasonCode.RUNTIME_WEIGHT,
                    f"its bias {m.tensor('bias').name!r} is not stored in the file",
                    k=weight.k,
                    n=weight.n,
                    format=weight.format,
                )
            if value.size not in (1, weight.n):
                raise ModelError(
                    f"{linked.source.name}: {weight.where}: bias {m.tensor('bias').name!r} has shape {list(value.shape)}, "
                    f"expected [{weight.n}]"
                )
            bias = np.broadcast_to(value.astype(np.float32).reshape(-1), (weight.n,))
        shape = linked.shape(m.scope, x)
        return QuantizedLinear(
            scope=m.scope,
            product=node,
            replaced=(node,),
            form="MatMulNBits",
            x=x,
            y=node.outputs[0],
            weights=(weight,),
            element_type=weight.scales.data_type,
            bias=bias,
            codes=codes,
            x_shape=None if shape is None else tuple(shape),
            y_rank=None if shape is None else len(shape),
            rows=rows_of(shape),
        )
