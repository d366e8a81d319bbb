"""What is not ours survives byte for byte; what only the replaced nodes used goes."""

import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, parser
from support import activation, assert_same_numbers, compiled, model, ops, relative_l2, weight

import msd_compiler
from msd_compiler.edit import Edit
from msd_compiler.errors import ModelError
from msd_compiler.linked import Linked
from msd_compiler.save import WeightStore
from msd_compiler.source import Source

K, N = 40, 20
INT8 = weight("int8", (K, N), (N,), True)
X = {"x": activation((3, K))}


def rich():
    """A model with everything in it that an edit could lose."""
    proto = model(
        """(float[M,40] x, bool c) => (float[M,20] y, float[2] kept) {
            r = Relu(x)
            d = DequantizeLinear(w, s, z)  [mlp] p = MatMul(r, d)  a = Add(p, b)
            [call] f = f.Twice:first(a)  [call2] g = f.Twice:second(f)
            y = If(c) <then_branch = t () => (float[M,20] u) { u = Neg(g) }, else_branch = e () => (float[M,20] v) { v = Abs(g) }>
            kept = Identity(typed)
            unused = Neg(typed) }""",
        **INT8,
        b=activation((N,)),
        half=np.ones(3, np.float16),
    )
    proto.opset_import.add(domain="f", version=3)
    for overload, op in (("first", "Add"), ("second", "Mul")):
        function = parser.parse_function(
            f'<domain: "f", opset_import: ["" : 21]> Twice (i) => (o) {{ o = {op}(i, i) }}'
        )
        function.overload = overload
        function.doc_string = f"{overload} overload"
        function.metadata_props.add(key="function", value=overload)
        proto.functions.append(function)
    graph = proto.graph
    graph.initializer.append(helper.make_tensor("typed", TensorProto.FLOAT, [2], [1.5, 2.5]))
    graph.initializer.append(numpy_helper.from_array(np.arange(6, dtype=np.int8), "nobody reads it"))
    graph.initializer[-1].doc_string = "a tensor's"
    graph.sparse_initializer.append(
        helper.make_sparse_tensor(numpy_helper.from_array(np.ones(1, np.float32), "sparse"), numpy_helper.from_array(np.zeros(1, np.int64)), [4])
    )  # fmt: skip
    proto.doc_string, graph.doc_string, graph.name = "the model's", "the graph's", "main graph"
    proto.producer_name, proto.producer_version, proto.domain, proto.model_version = "pytest", "1.0", "org.example", 12
    for holder in (proto, graph, *graph.node, *graph.node[-3].attribute[0].g.node):
        holder.metadata_props.add(key="where", value=type(holder).__name__)
    for i, node in enumerate(graph.node):
        node.doc_string = f"node {i}"
    graph.value_info.extend(
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["M", size]) for n, size in (("r", K), ("a", N), ("g", N))
    )
    graph.value_info[0].doc_string = "a value's"
    graph.input[0].doc_string = "an input's"
    annotation = graph.quantization_annotation.add(tensor_name="r")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="half")
    return proto


def without_ours(proto):
    """The result less what we add."""
    proto = onnx.ModelProto.FromString(proto.SerializeToString())
    for field, ours in (
        (proto.graph.node, lambda n: n.domain == "msd"),
        (proto.graph.initializer, lambda t: "/msd." in t.name),
        (proto.functions, lambda f: f.domain == "msd"),
        (proto.opset_import, lambda o: o.domain == "msd"),
        (proto.metadata_props, lambda e: e.key == "msd.report"),
    ):
        keep(field, lambda m, ours=ours: not ours(m))
    return proto


def keep(field, wanted):
    kept = [type(m).FromString(m.SerializeToString()) for m in field if wanted(m)]
    del field[:]
    field.extend(kept)


def test_the_rest_survives_byte_for_byte():
    source = rich()
    done = compiled(source)
    assert done.report.summary.rewritten == 1
    found = without_ours(done.model)
    keep(source.graph.node, lambda n: n.op_type not in ("DequantizeLinear", "MatMul", "Add"))
    keep(source.graph.initializer, lambda t: t.name not in ("w", "s", "z", "b"))
    assert found.SerializeToString(deterministic=True) == source.SerializeToString(deterministic=True)


def test_the_rest_means_the_same():
    """Measured by the source in the same runtime: 1.20 takes the first overload for every one."""
    source = rich()
    del source.graph.sparse_initializer[:]  # onnxruntime wants their names among the inputs
    done = compiled(source)
    off = {"graph_optimization_level": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL, "log_severity_level": 4}
    for condition in (True, False):
        feed = X | {"c": np.array(condition)}
        oracle, found = (
            msd_compiler.session(m.SerializeToString(), **off).run(["y", "kept"], feed) for m in (source, done.model)
        )
        assert relative_l2(found[0], oracle[0]) <= 1e-4
        assert np.array_equal(found[1], oracle[1])


def test_new_nodes_say_where_they_come_from():
    (ours,) = [n for n in compiled(rich()).model.graph.node if n.domain == "msd"]
    assert (ours.name, ours.doc_string) == ("mlp", "node 2")
    assert [(e.key, e.value) for e in ours.metadata_props] == [("where", "NodeProto")]


def test_source_of_a_file_is_not_touched(tmp_path):
    file = tmp_path / "m.onnx"
    file.write_bytes(rich().SerializeToString())
    before = file.read_bytes()
    msd_compiler.compile(file, tmp_path / "out.onnx", verify=False)
    msd_compiler.inspect(file)
    assert file.read_bytes() == before


def test_what_was_unused_before_stays():
    source = model(
        "(float[3,40] x) => (float[3,20] y) { d = DequantizeLinear(w, s, z)  y = MatMul(x, d)  e = DequantizeLinear(w, s, z)  f = Relu(x) }",
        **INT8,
    )
    done = assert_same_numbers(source, X)
    assert ops(done.model) == ["msd.MatMul", "DequantizeLinear", "Relu"]
    assert {"w", "s", "z"} <= {t.name for t in done.model.graph.initializer}


def test_producers_of_what_became_unused_go():
    """The chain, Constant nodes and computed constants in front of it, and their value infos."""
    source = model(
        """(float[3,40] x) => (float[3,20] y) {
            i = Identity(w)  d = DequantizeLinear(w, s, z)  c = Cast<to=1>(d)  shape = Constant<value_ints = [40, 20]>()
            r = Reshape(c, shape)  p = MatMul(x, r)  b = Constant<value_float = 2.0>()  e = Identity(b)  y = Add(p, e)
            k = Relu(x) }""",
        **INT8,
    )
    source.graph.value_info.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, [K, N]) for n in ("d", "c", "r"))
    source.graph.value_info.append(helper.make_tensor_value_info("k", TensorProto.FLOAT, [3, K]))
    done = assert_same_numbers(source, X)
    assert ops(done.model) == ["Identity", "msd.MatMul", "Relu"]
    assert [v.name for v in done.model.graph.value_info if "/msd." not in v.name] == ["k"]
    assert [t.name for t in done.model.graph.initializer if "/msd." not in t.name] == ["w"]


def test_graph_order_stays_topological():
    """The result stands where the Add stood, behind what the Add waited for."""
    source = model(
        """(float[3,40] x) => (float[3,20] y, float[3,20] q) {
            d = DequantizeLinear(w, s, z)  p = MatMul(x, d)  q = Neg(t)  c = Identity(b)  y = Add(p, c) }""",
        **INT8, b=activation((N,)), t=activation((3, N)),
    )  # fmt: skip
    done = assert_same_numbers(source, X)
    assert ops(done.model) == ["Neg", "msd.MatMul"]
    onnx.checker.check_model(done.model)


def test_result_passes_the_checker():
    source = rich()
    del source.graph.sparse_initializer[:]
    onnx.checker.check_model(source)
    onnx.checker.check_model(compiled(source).model, full_check=True)


def test_same_bytes_twice():
    source = rich()
    once, twice = (msd_compiler.compile(source, verify=False).model for _ in range(2))
    assert once.SerializeToString(deterministic=True) == twice.SerializeToString(deterministic=True)


def test_compiling_a_result_changes_nothing():
    done = compiled(rich())
    again = msd_compiler.compile(done.model, verify=False)
    assert again.model.SerializeToString(deterministic=True) == done.model.SerializeToString(deterministic=True)
    assert again.report.sites == done.report.portable().sites


def test_a_result_with_a_new_layer():
    """Somebody adds a quantized layer behind ours: it is taken, function and report stand there once."""
    done = compiled(
        model("(float[3,40] x) => (float[3,20] y) { d = DequantizeLinear(w, s, z)  [first] y = MatMul(x, d) }", **INT8)
    ).model
    more = onnx.ModelProto()
    more.CopyFrom(done)
    for name, value in weight("int8", (N, 5), (5,)).items():
        more.graph.initializer.append(numpy_helper.from_array(value, name))
    more.graph.node.append(helper.make_node("DequantizeLinear", ["w", "s"], ["d"]))
    more.graph.node.append(helper.make_node("MatMul", ["y", "d"], ["last"], name="second"))
    more.graph.output.append(helper.make_tensor_value_info("last", TensorProto.FLOAT, [3, 5]))
    again = msd_compiler.compile(more, verify=False).model
    assert ops(again) == ["msd.MatMul", "msd.MatMul"]
    assert len(again.functions) == 1
    assert [e.key for e in again.metadata_props].count("msd.report") == 1
    onnx.checker.check_model(again)


def test_another_function_of_our_name():
    source = rich()
    source.functions.append(
        parser.parse_function('<domain: "msd", opset_import: ["" : 21]> MatMul (i) => (o) { o = Neg(i) }')
    )
    with pytest.raises(ModelError, match=re.escape("the model already defines msd.MatMul otherwise")):
        msd_compiler.compile(source, verify=False)


# --- Edit alone ----------------------------------------------------------------------------------------------------


def edit_of(proto):
    source = Source(proto, Path())
    return Edit(source, WeightStore(None).add), Linked.of(source)


def test_unique():
    edit, _ = edit_of(model("(float[2] x) => (float[2] y) { [n] y = Add(x, c) }", c=np.ones(2, np.float32)))
    assert [edit.unique(name) for name in ("x", "y", "c", "n", "new", "new", "new_2")] == [
        "x_2",
        "y_2",
        "c_2",
        "n_2",
        "new",
        "new_2",
        "new_2_2",
    ]


def test_unique_knows_nested_graphs():
    text = "(bool b) => (float y) { y = If(b) <then_branch = t () => (float u) { u = Neg(c) }, else_branch = e () => (float v) { v = Abs(c) }> }"
    edit, _ = edit_of(model(text, c=np.float32(1)))
    assert [edit.unique(name) for name in ("u", "v")] == ["u_2", "v_2"]


def test_constants_of_equal_content_are_one():
    edit, _ = edit_of(model("(float[2] x) => (float[2] y) { y = Relu(x) }"))
    one = np.ones(4, np.float32)
    assert edit.constant("a", one) == edit.constant("b", one.copy()) == "a"
    names = {
        edit.constant("c", v)
        for v in (one, one.reshape(2, 2), one.astype(np.float64), one.view(np.int32), np.ones((4, 0), np.float32))
    }
    assert len(names) == 5
    stored = {t.name: numpy_helper.to_array(t) for t in edit.proto.graph.initializer}
    assert np.array_equal(stored["a"], one)


@pytest.mark.parametrize(("name", "declared"), [("r", 1), ("y", 0), ("new", 1)])
def test_declare(name, declared):
    """Once, and not what the file declares already."""
    edit, linked = edit_of(model("(float[2] x) => (float[2] y) { r = Relu(x)  y = Neg(r) }"))
    for _ in range(2):
        edit.declare(linked.scopes[0], name, TensorProto.FLOAT, [2])
    assert len(edit.proto.graph.value_info) == declared


def test_a_node_that_goes_away_holds_no_graph():
    """Graphs are known by number, and one less would shift the rest."""
    proto = model("(float[M,40] x) => (float[M,20] y) { d = DequantizeLinear(w, s, z)  y = MatMul(x, d) }", **INT8)
    body = onnx.GraphProto()
    body.CopyFrom(proto.graph)
    proto.graph.node[0].attribute.append(helper.make_attribute("body", body))
    linked = Linked.of(Source(proto, Path()))
    scope = linked.scopes[0]
    node = next(n for n in scope.graph.nodes if n.op == "DequantizeLinear")
    edit = Edit(linked.source)
    with pytest.raises(ModelError, match="DequantizeLinear 'd' holds a graph"):
        edit.replace(scope, [node], [helper.make_node("Cast", ["w"], ["d"], to=TensorProto.FLOAT)])
    with pytest.raises(ModelError, match="DequantizeLinear 'd' holds a graph"):
        edit.bypass(scope, node, "w")
