"""MatMulNBits -> MatMulNBits with accuracy_level 0: weights are dequantized, activations stay float."""

from __future__ import annotations

import onnx

from msd_compiler.facts import QuantizedLinear


def lower_to_float(fact: QuantizedLinear) -> onnx.NodeProto:
    """The product's node, saying so."""
    position = fact.scope.position(fact.product)
    assert position is not None
    node = onnx.NodeProto()
    node.CopyFrom(fact.scope.proto.node[position])
    others = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
    del node.attribute[:]
    node.attribute.extend([*others, onnx.helper.make_attribute("accuracy_level", 0)])
    return node
