"""Integer products that no CPU saturates: what an oracle is made of.

onnxruntime multiplies uint8 by int8 through an instruction that saturates at 16 bits where there is no VNNI, and says
nothing. uint8 by uint8 is exact everywhere: so the int8 operand moves there, 128 up, and its zero point with it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from .build import NodeBuilder
from .edit import Edit
from .linked import Linked, Scope, optional_input, stated_type
from .source import Source
from .unfuse import PRODUCTS, activation_type

_ZERO_POINT_OF_B = {
    "MatMulInteger": 3,
    "QLinearMatMul": 5,
    "QGemm": 5,
    "DynamicQuantizeMatMul": 3,
    "MatMulIntegerToFloat": 5,
}


def exact_products(linked: Linked) -> Source:
    """The model, its products of uint8 by int8 as products of uint8 by uint8; itself if it has none."""
    source = linked.source
    edit: Edit | None = None
    for scope, position, node in linked.nodes():
        if node.op not in PRODUCTS or activation_type(scope, node) != TensorProto.UINT8:
            continue
        if _type_of(scope, node.inputs[PRODUCTS[node.op]]) != TensorProto.INT8:
            continue
        edit = edit or Edit(source)
        build = NodeBuilder(edit, str(node.name or node.outputs[0].name))
        b, z = PRODUCTS[node.op], _ZERO_POINT_OF_B[node.op]
        moved = {index: _moved(build, linked, scope, node, index) for index in (b, z)}
        copy = type(scope.proto.node[position])()
        copy.CopyFrom(scope.proto.node[position])
        copy.input.extend([""] * (z + 1 - len(copy.input)))
        for index, name in moved.items():
            copy.input[index] = name
        edit.replace(scope, [node], [*build.nodes, copy])
    return source if edit is None else replace(source, proto=edit.finish())


def _type_of(scope: Scope, tensor: gs.Tensor) -> int | None:
    stored = scope.constant(tensor)
    if stored is not None:
        return int(stored.data_type)
    return stated_type(tensor)


def _moved(build: NodeBuilder, linked: Linked, scope: Scope, node: gs.Node, index: int) -> str:
    """An int8 input 128 up as uint8; an absent zero point is 0."""
    tensor = optional_input(node, index)
    if tensor is None:
        return build.constant("b_zero_point", np.array(128, np.uint8))
    value = linked.array(scope, tensor)
    if value is not None:
        return build.constant("b", (value.astype(np.int16) + 128).astype(np.uint8))
    wide = build.node("Cast", str(tensor.name), to=TensorProto.INT32)
    up = build.node("Add", wide, build.constant("128", np.array(128, np.int32)))
    return build.node("Cast", up, to=TensorProto.UINT8)
