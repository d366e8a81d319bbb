"""Products of integer activations and fused ops that hold such a product: a row, no rewrite."""

from __future__ import annotations

from types import MappingProxyType

from onnx import TensorProto

from msd_compiler.facts import ReasonCode, Reject
from msd_compiler.linked import Linked
from msd_compiler.pattern import DEFAULT_DOMAINS, Any, Match, Maybe, Op
from msd_compiler.reader import Reader
from msd_compiler.source import type_name
from msd_compiler.unfuse import PRODUCTS, activation_type

_DOMAINS = (*DEFAULT_DOMAINS, "com.microsoft")

_WEIGHT_INPUT = MappingProxyType({**PRODUCTS, "MatMulInteger16": 1, "QAttention": 1})
"""Ops whose activation is integer codes, with the input that holds the weight."""

_FUSED = MappingProxyType(
    {
        "QMoE": "mixture-of-experts layers are not taken apart",
        "MatMulBnb4": "its codes (bitsandbytes FP4/NF4) are no small integers",
        "MatMulFpQ4": "its block format predates MatMulNBits; quantize the float model again",
        "DynamicQuantizeLSTM": "recurrent layers are not taken apart",
    }
)
"""Ops with low-bit weights that are recognised and left, with the reason."""


class ReportQuantizedActivation(Reader):
    """The model rounds the activation itself; dropping that rounding would change what it means."""

    patterns = (
        Op(tuple(_WEIGHT_INPUT), *[Maybe(Any(f"input_{i}")) for i in range(12)], domains=_DOMAINS, name="product"),
    )

    def read(self, m: Match, linked: Linked) -> None:
        """See `Reader`."""
        node = m.op("product")
        tensor = m.maybe(f"input_{_WEIGHT_INPUT[node.op]}")
        weight = None if tensor is None else m.scope.constant(tensor)
        if weight is None:
            return  # a product of two activations, as in attention
        known: dict[str, int | str] = {"format": type_name(weight.data_type)}
        if len(weight.dims) == 2:
            k, n = weight.dims[::-1] if node.attrs.get("transB", 0) else weight.dims
            known |= {"k": k, "n": n}
        if node.op in PRODUCTS and weight.data_type == activation_type(m.scope, node) == TensorProto.UINT8:
            raise Reject(
                ReasonCode.ALREADY_EXACT,
                "uint8 by uint8: onnxruntime multiplies these codes exactly, and as fast",
                **known,
            )
        raise Reject(
            ReasonCode.ACTIVATION_QUANTIZED,
            f"{node.op} takes its activation as integer codes, in a spelling that is not followed to its float result",
            **known,
        )


class ReportFusedOp(Reader):
    """Low-bit weights inside an op that does more than a product."""

    patterns = (Op(tuple(_FUSED), *[Maybe(Any()) for _ in range(24)], domains=_DOMAINS, name="product"),)

    def read(self, m: Match, linked: Linked) -> None:
        """See `Reader`."""
        node = m.op("product")
        raise Reject(ReasonCode.FUSED_OP, f"{node.op}: {_FUSED[node.op]}")
