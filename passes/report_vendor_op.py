"""Products by a weight that an op of TensorRT or Quark makes: a row, no rewrite."""

from __future__ import annotations

from types import MappingProxyType

import onnx_graphsurgeon as gs

from msd_compiler.facts import ReasonCode, Reject
from msd_compiler.linked import Linked, Scope
from msd_compiler.pattern import Any, Match, Maybe, Op
from msd_compiler.reader import Reader

from .activation import origin

_NOT_INTEGERS = MappingProxyType(
    {
        ("trt", "TRT_FP8DequantizeLinear"): "its codes are float8, which has no small-integer form",
        ("trt", "TRT_MXFP8DequantizeLinear"): "its codes are float8, which has no small-integer form",
        ("trt", "TRT_FP4DynamicQuantize"): "it rounds to float4 as the model runs",
        ("trt", "TRT_FP4QDQ"): "it rounds to float4 as the model runs",
        ("com.amd.quark", "ExtendedDequantizeLinear"): "its codes may be of types that ONNX's own op does not have",
        ("com.amd.quark", "BFPQuantizeDequantize"): "it rounds to block floating point",
        ("com.amd.quark", "MXQuantizeDequantize"): "it rounds to a microscaling format",
    }
)
"""Ops by domain and name, with what keeps them from being read."""

_LONGEST_CHAIN = 16


class ReportVendorOp(Reader):
    """The op says how its result is coded, and that is no small integer times a scale."""

    patterns = (Op(("MatMul", "Gemm"), Any("first"), Any("second"), Maybe(Any()), name="product"),)

    def read(self, m: Match, linked: Linked) -> None:
        """See `Reader`."""
        for name in ("second", "first"):
            node = _maker(origin(m.tensor(name)))
            if node is not None and _is_stored(node, m.scope):
                why = _NOT_INTEGERS[node.domain, node.op]
                raise Reject(
                    ReasonCode.WEIGHT_TYPE,
                    f"its weight comes from {node.domain}.{node.op} {node.name or node.outputs[0].name!r}: {why}; "
                    "stored integers of 2, 4 or 8 bits and float4 are multiplied directly",
                )


def _maker(tensor: gs.Tensor) -> gs.Node | None:
    node = tensor.inputs[0] if tensor.inputs else None
    return node if node is not None and (node.domain, node.op) in _NOT_INTEGERS else None


def _is_stored(node: gs.Node, scope: Scope) -> bool:
    """Whether what the node reads first is a constant, perhaps quantized on the way."""
    for _ in range(_LONGEST_CHAIN):
        if not node.inputs:
            return False
        tensor = origin(node.inputs[0])
        if scope.constant(tensor) is not None:
            return True
        if not tensor.inputs or "Quantize" not in tensor.inputs[0].op:
            return False
        node = tensor.inputs[0]
    return False
