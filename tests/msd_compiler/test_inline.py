from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper, parser
from support import activation, weight

from msd_compiler.inline import inlined
from msd_compiler.source import Source

TEXT = """<ir_version: 10, opset_import: ["" : 21, "torch" : 1]>
g (float[M, 40] x) => (float[M, 20] z) {
    y = torch.Block <axis = 1> (x, w, s)
    z = torch.Norm(y)
}
<domain: "torch", opset_import: ["" : 21, "torch" : 1]>
Block <axis> (x, w, s) => (y) { y = torch.Linear <axis: int = @axis> (x, w, s) }
<domain: "torch", opset_import: ["" : 21]>
Linear <axis> (x, w, s) => (y) {
    d = DequantizeLinear <axis: int = @axis> (w, s)
    y = MatMul(x, d)
}
<domain: "torch", opset_import: ["" : 21]>
Norm (x) => (y) { y = Relu(x) }
"""


def model_with_functions() -> onnx.ModelProto:
    proto = parser.parse_model(TEXT)
    for name, value in weight("int8", (40, 20), (20,)).items():
        proto.graph.initializer.append(numpy_helper.from_array(value, name))
    return proto


def test_functions_with_layers_are_inlined_and_others_stay():
    source = Source(model_with_functions(), None)
    before = source.proto.SerializeToString(deterministic=True)
    found = inlined(source).proto
    assert [n.op_type for n in found.graph.node] == ["DequantizeLinear", "MatMul", "Norm"]
    assert [f.name for f in found.functions] == ["Norm"]
    assert source.proto.SerializeToString(deterministic=True) == before


def test_a_model_without_such_functions_is_itself():
    proto = model_with_functions()
    del proto.graph.node[0]
    proto.graph.node[0].input[0] = "x"
    del proto.functions[:2]
    source = Source(proto, None)
    assert inlined(source) is source


def test_layers_in_functions_are_rewritten():
    import msd_compiler

    proto = model_with_functions()
    done = msd_compiler.compile(proto, terms=2)
    assert done.report.summary.rewritten == 1
    assert done.report.verification.passed
    tensors = weight("int8", (40, 20), (20,))
    x = activation((3, 40))
    expected = np.maximum(x.astype(np.float64) @ (tensors["w"] * tensors["s"].astype(np.float64)), 0)
    found = msd_compiler.session(done.model.SerializeToString()).run(None, {"x": x})[0]
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)
