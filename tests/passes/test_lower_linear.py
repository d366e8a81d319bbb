"""What the lowering writes, and where: opsets, nested graphs, constants of every kind, names that clash."""

import numpy as np
import onnx
import pytest
from msd_compiler.runtime_ops.matmul.layout import Plan
from onnx import TensorProto, helper, numpy_helper
from support import (
    activation,
    assert_same_numbers,
    compiled,
    meaning,
    model,
    nbits_weight,
    needs_opset,
    ops,
    run,
    weight,
)

from msd_compiler.compare import relative_l2

K, N = 40, 20
X = {"x": activation((3, K))}
INT8 = weight("int8", (K, N), (N,), True)
UINT8 = weight("uint8", (K, N), (), True)
NBITS = nbits_weight(K, N, 16)
NODE = f"com.microsoft.MatMulNBits<K={K}, N={N}, bits=4, block_size=16>"
DQ = "d = DequantizeLinear(w, s, z)  y = MatMul(x, d)"


def plan_of(proto):
    """The plan of the only msd.MatMul."""
    (node,) = [n for n in proto.graph.node if n.domain == "msd"]
    stored = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    return Plan.of(stored[node.input[6]])


# --- plan ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "block", "group"),
    [
        (40, None, 40),
        (128, None, 128),
        (300, None, 128),
        (300, 300, 128),
        (300, 512, 128),
        *((600, block, block) for block in (4, 8, 16, 32, 48, 100, 128, 256)),
        *((1100, block, 128) for block in (384, 512, 1024)),
        (1100, 288, 32),
        (1100, 1000, 250),
    ],
)
def test_group(k, block, group):
    """A group is the weight's block, or a part of one that is longer than 256; 128 where there are no blocks."""
    scales = (N,) if block is None else (-(-k // block), N)
    attributes = "<axis=1>" if block is None else f"<axis=0, block_size={block}>"
    text = f"(float[3,{k}] x) => (float[3,20] y) {{ d = DequantizeLinear{attributes}(w, s)  y = MatMul(x, d) }}"
    done = compiled(model(text, **weight("int4", (k, N), scales)))
    assert plan_of(done.model) == Plan(k, 4, group, terms=2, per_row=False)
    assert done.report.sites[0].group == group


@pytest.mark.parametrize(("terms", "tolerance"), [(1, 2e-2), (2, 1e-4), (3, 1e-6)])
def test_terms(terms, tolerance):
    text = f"(float[3,40] x) => (float[3,20] y) {{ {DQ} }}"
    done = assert_same_numbers(model(text, **INT8), X, terms=terms, tolerance=tolerance)
    assert plan_of(done.model).terms == done.report.sites[0].terms == terms


def test_scales_with_the_largest_alpha():
    text = "(float[3,40] x) => (float[3,20] y) { d = DequantizeLinear(w, s)  y = Gemm<alpha=1e30>(x, d) }"
    assert_same_numbers(model(text, **weight("int8", (K, N), (N,))), X)


# --- opsets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25])
def test_opset(opset):
    """The body is spelled for the model's opset, 11 and later."""
    needs_opset(opset)
    text = f"(float[3,40] x) => (float[3,20] y) {{ y = {NODE}(x, b, s) }}"
    done = assert_same_numbers(model(text, opset=opset, **NBITS), X)
    (function,) = done.model.functions
    assert {o.domain: o.version for o in function.opset_import} == {"": opset}
    assert {o.domain: o.version for o in done.model.opset_import} == {"": opset, "com.microsoft": 1, "msd": 1}
    onnx.checker.check_model(done.model)


@pytest.mark.parametrize("opset", [11, 13, 17, 21, 23, 25])
def test_opset_of_every_node_around(opset):
    """Unsqueeze for [E,K,N], Gather, Concat, Transpose, Mul, Cast: all in the model's opset."""
    needs_opset(opset)
    for scales, axis in (((K,), 1), ((N,), 2)):
        domain = "" if opset >= 13 else "com.microsoft."
        nodes = f"d = {domain}DequantizeLinear<axis={axis}>(w, s)  y = MatMul(x, d)"
        proto = model(
            f"(float[3,40] x) => (float[2,3,20] y) {{ {nodes} }}", opset=opset, **weight("int8", (2, K, N), scales)
        )
        assert_same_numbers(proto, X)


def test_opset_of_other_domains_alone():
    """A model that imports no default-domain opset gets one for our function."""
    proto = model(f"(float[3,40] x) => (float[3,20] y) {{ y = {NODE}(x, b, s) }}", **NBITS)
    del proto.opset_import[:]
    proto.opset_import.add(domain="com.microsoft", version=1)
    done = assert_same_numbers(proto, X)
    assert "" in {o.domain for o in done.model.opset_import}


def test_default_domain_by_its_long_name():
    proto = model(f"(float[3,40] x) => (float[3,20] y) {{ {DQ} }}", **INT8)
    proto.opset_import[0].domain = "ai.onnx"
    for node in proto.graph.node:
        node.domain = "ai.onnx"
    done = assert_same_numbers(proto, X)
    assert [o.domain for o in done.model.opset_import].count("") == 0


@pytest.mark.parametrize("ir", [3, 4, 7, 8, 9, 10])
def test_ir_version(ir):
    proto = model(
        f"(float[3,40] x) => (float[3,20] y) {{ {DQ.replace(', z', '')} }}",
        opset=13,
        ir=ir,
        **weight("int8", (K, N), (N,)),
    )
    if ir == 3:
        proto.graph.input.extend(
            helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in proto.graph.initializer
        )
    done = assert_same_numbers(proto, X)
    assert done.model.ir_version == max(ir, 8)
    assert [i.name for i in done.model.graph.input] == ["x"]


# --- constants -----------------------------------------------------------------------------------------------------


def as_constant_nodes(proto):
    stored = list(proto.graph.initializer)
    del proto.graph.initializer[:]
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in stored]
    nodes += list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def as_inputs_too(proto):
    """An initializer that is also a graph input: a default value, that a caller might replace."""
    proto.graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in proto.graph.initializer
    )


def as_typed_fields(proto):
    for tensor in proto.graph.initializer:
        values = numpy_helper.to_array(tensor).reshape(-1).tolist()
        tensor.CopyFrom(helper.make_tensor(tensor.name, tensor.data_type, tensor.dims, values))


WHERE = [as_constant_nodes, as_inputs_too, as_typed_fields]


@pytest.mark.parametrize("move", WHERE)
@pytest.mark.parametrize("kind", ["int4", "uint8"])
def test_constants(move, kind):
    tensors = weight(kind, (K, N), (3, N), True) | {"c": activation((N,))}
    text = """(float[3,40] x) => (float[3,20] y) {
        d = DequantizeLinear<axis=0, block_size=16>(w, s, z)  y = Gemm(x, d, c) }"""
    proto = model(text, **tensors)
    move(proto)
    done = assert_same_numbers(proto, X)
    assert ops(done.model) == ["msd.MatMul"]
    assert {t.name for t in done.model.graph.initializer}.isdisjoint(tensors)


@pytest.mark.parametrize("move", WHERE)
def test_constants_of_matmul_nbits(move):
    tensors = nbits_weight(K, N, 16, zeros="packed") | {"c": activation((N,))}
    proto = model(f"(float[3,40] x) => (float[3,20] y) {{ y = {NODE}(x, b, s, z, , c) }}", **tensors)
    move(proto)
    assert ops(assert_same_numbers(proto, X).model) == ["msd.MatMul"]


def test_constant_shared_with_another_op_stays():
    proto = model(f"(float[3,40] x) => (float[3,20] y, float[20] t) {{ {DQ}  t = Neg(s) }}", **INT8)
    done = assert_same_numbers(proto, X)
    assert ops(done.model) == ["msd.MatMul", "Neg"]
    assert next(t for t in proto.graph.initializer if t.name == "s") in done.model.graph.initializer
    assert {"w", "z"}.isdisjoint(t.name for t in done.model.graph.initializer)


def test_constant_that_is_an_output_stays():
    proto = model(f"(float[3,40] x) => (float[3,20] y, float[20] s) {{ {DQ} }}", **INT8)
    done = assert_same_numbers(proto, X)
    assert [t.name for t in done.model.graph.initializer if t.name in INT8] == ["s"]


def test_equal_zero_points_share_an_initializer():
    """Exporters merge equal tensors: one bias, one scale vector, for several layers."""
    text = """(float[3,40] x) => (float[3,40] y) {
        d = DequantizeLinear(w, s, z)  p = MatMul(x, d)  a = Add(p, c)
        e = DequantizeLinear(v, s, z)  q = MatMul(a, e)  y = Add(q, c) }"""
    square = weight("int8", (K, K), (K,), True) | {"v": weight("int8", (K, K), seed=5)["w"], "c": activation((K,))}
    done = assert_same_numbers(model(text, **square), X, rewritten=2)
    assert ops(done.model) == ["msd.MatMul", "msd.MatMul"]
    first, second = done.model.graph.node
    assert first.input[1] != second.input[1]
    assert first.input[2:] == second.input[2:]


# --- nested graphs -------------------------------------------------------------------------------------------------

IF = """(float[3,40] x, bool c) => (float[3,20] y) {{
    {before}
    y = If(c) <then_branch = t () => (float[3,20] u) {{ {then} }}, else_branch = e () => (float[3,20] v) {{ {other} }}> }}"""


@pytest.mark.parametrize(
    ("before", "then", "other", "rewritten"),
    [
        ("", "d = DequantizeLinear(w, s, z)  u = MatMul(x, d)", "e = DequantizeLinear(w, s, z)  v = MatMul(x, e)", 2),
        ("", "d = DequantizeLinear(w, s, z)  u = MatMul(x, d)", "d = DequantizeLinear(w, s, z)  v = MatMul(x, d)", 2),
        ("d = DequantizeLinear(w, s, z)", "u = MatMul(x, d)", "p = MatMul(x, d)  v = Add(p, s)", 2),
        ("d = DequantizeLinear(w, s, z)", "u = MatMul(x, d)", "p = Relu(d)  v = MatMul(x, p)", 1),
        ("r = Relu(x)", "d = DequantizeLinear(w, s, z)  u = MatMul(r, d)", "v = Identity(nothing)", 1),
    ],
)
def test_branches(before, then, other, rewritten):
    proto = model(IF.format(before=before, then=then, other=other), **INT8, nothing=np.zeros((3, N), np.float32))
    for condition in (True, False):
        done = assert_same_numbers(proto, X | {"c": np.array(condition)}, rewritten=rewritten)
    inside = [a.g for n in done.model.graph.node if n.op_type == "If" for a in n.attribute]
    assert sum(n.domain == "msd" for g in inside for n in g.node) == rewritten
    if rewritten == 2:
        left = [n.op_type for g in (done.model.graph, *inside) for n in g.node]
        assert "DequantizeLinear" not in left
        assert {"w", "z"}.isdisjoint(t.name for t in done.model.graph.initializer)


def test_branch_with_its_own_weight():
    """Names of one branch mean nothing in the other."""
    proto = model(
        IF.format(
            before="",
            then="d = DequantizeLinear(w, s)  u = MatMul(x, d)",
            other="d = DequantizeLinear(w, s)  v = MatMul(x, d)",
        )
    )
    for seed, attribute in enumerate(proto.graph.node[0].attribute):
        tensors = weight(("int4", "uint8")[seed], (K, N), (N,), seed=seed)
        attribute.g.initializer.extend(numpy_helper.from_array(v, name) for name, v in tensors.items())
    for condition in (True, False):
        assert_same_numbers(proto, X | {"c": np.array(condition)}, rewritten=2)


def test_branch_hides_an_outer_weight():
    """A name inside a body means what the body says, not what the graph around it says."""
    proto = model(
        IF.format(before="", then="w = Neg(v)  u = MatMul(x, w)", other="d = DequantizeLinear(q, s)  v = MatMul(x, d)"),
        **INT8,
    )
    proto.graph.initializer[0].name = "q"
    proto.graph.initializer.append(numpy_helper.from_array(activation((K, N)), "v0"))
    proto.graph.node[0].attribute[0].g.node[0].input[0] = "v0"
    for condition in (True, False):
        assert_same_numbers(proto, X | {"c": np.array(condition)})


def test_branches_nested_in_branches():
    inner = "i = If(c) <then_branch = tt () => (float[3,20] a) { a = MatMul(x, d) }, else_branch = ee () => (float[3,20] b) { b = Identity(nothing) }>  u = Relu(i)"
    text = IF.format(before="d = DequantizeLinear(w, s, z)", then=inner, other="v = Identity(nothing)")
    for condition in (True, False):
        done = assert_same_numbers(
            model(text, **INT8, nothing=np.zeros((3, N), np.float32)), X | {"c": np.array(condition)}
        )
    assert ops(done.model) == ["If"]


def test_loop():
    text = """(float[3,40] x, int64 n) => (float[3,40] y) {
        c = Constant <value = bool {1}> ()
        y = Loop(n, c, x) <body = b (int64 i, bool c0, float[3,40] h) => (bool c1, float[3,40] r) {
            c1 = Identity(c0)  d = DequantizeLinear(w, s)  p = MatMul(h, d)  r = Add(p, bias) }> }"""
    tensors = weight("int8", (K, K), (K,)) | {"bias": activation((K,))}
    tensors["s"] *= 1e-1
    done = assert_same_numbers(model(text, **tensors), X | {"n": np.array(3)}, tolerance=3e-4)
    body = next(a.g for n in done.model.graph.node for a in n.attribute if a.HasField("g"))
    assert ops(onnx.ModelProto(graph=body)) == ["Identity", "msd.MatMul"]
    assert {"w", "s", "bias"}.isdisjoint(t.name for t in done.model.graph.initializer)


def test_rank_inside_branches_of_equal_names():
    """A weight on the left needs x's rank, and ``t`` has another in each branch."""
    then = "t = Identity(x)  d = DequantizeLinear<axis=0>(w, s)  p = MatMul(d, t)  u = Transpose<perm=[1,0]>(p)"
    other = "t = Unsqueeze(x, axis)  d = DequantizeLinear<axis=0>(w, s)  p = MatMul(d, t)  q = Squeeze(p, axis)  v = Transpose<perm=[1,0]>(q)"
    text = IF.format(before="", then=then, other=other).replace("float[3,40] x", "float[40,3] x")
    tensors = weight("int8", (N, K), (N,)) | {"axis": np.array([0])}
    proto = model(text, **tensors)
    x = activation((K, 3))
    w = (tensors["w"] * tensors["s"][:, None].astype(np.float64)) @ x.astype(np.float64)
    done = compiled(proto)
    for condition in (True, False):
        found = run(done.model, {"x": x, "c": np.array(condition)})["y"]
        assert relative_l2(found, w.T) < 1e-4


# --- names ---------------------------------------------------------------------------------------------------------


def test_names_that_clash_with_ours():
    """Tensors and nodes that are called what ours would be called."""
    text = """(float[3,40] x, float[3,20] "layer/msd.MatMul") => (float[3,20] y) {
        d = DequantizeLinear(w, s)  [layer] p = MatMul(x, d)  q = Add(p, t)  y = Relu(q) }"""
    text = text.replace('"layer/msd.MatMul"', "t")
    proto = model(text, **weight("int8", (K, N), (K,)[:0]))
    taken = [f"layer/msd.{what}" for what in ("B", "scales", "zero_points", "offsets", "bias", "plan", "MatMul")]
    for name in taken:
        proto.graph.initializer.append(numpy_helper.from_array(np.ones((3, N), np.float32), name))
        proto.graph.node.append(helper.make_node("Relu", [name], [name + ".used"], name=name + ".used"))
        proto.graph.output.append(helper.make_tensor_value_info(name + ".used", TensorProto.FLOAT, [3, N]))
    done = assert_same_numbers(proto, X | {"t": activation((3, N))})
    names = [t.name for t in done.model.graph.initializer]
    assert len(names) == len(set(names))
    (ours,) = [n for n in done.model.graph.node if n.domain == "msd"]
    assert set(ours.input[1:]).isdisjoint(taken)


def test_named_experts():
    """Node names differ, those of the nodes that one named node becomes too."""
    text = "(float[3,40] x) => (float[4,3,20] y) { d = DequantizeLinear(w, s)  [experts] y = MatMul(x, d) }"
    done = assert_same_numbers(model(text, **weight("int8", (4, K, N), ())), X)
    names = [n.name for n in done.model.graph.node]
    assert len(set(names)) == len(names)


def test_node_keeps_its_name_and_output():
    text = "(float[3,40] x) => (float[3,20] y) { d = DequantizeLinear(w, s)  [mlp] p = MatMul(x, d)  y = Relu(p) }"
    done = assert_same_numbers(model(text, **weight("int8", (K, N), (N,))), X)
    assert (done.model.graph.node[0].name, list(done.model.graph.node[0].output)) == ("mlp", ["p"])
    assert done.report.sites[0].node == "mlp"


# --- other ops -----------------------------------------------------------------------------------------------------


def test_unknown_ops_are_no_reason_to_refuse():
    """com.microsoft ops, GenAI's default-domain ops, and ops of domains nobody knows."""
    text = f"""(float[3,40] x) => (float[3,20] y) {{
        r = SimplifiedLayerNormalization<axis=-1, epsilon=1e-5, stash_type=1>(x, g)
        y = {NODE}(r, b, s) }}"""
    proto = model(text, **NBITS, g=np.ones(K, np.float32))
    done = compiled(proto)
    assert done.report.summary.rewritten == 1
    native, portable = run(done.model, X)["y"], run(done.model, X, portable=True)["y"]
    x = X["x"].astype(np.float64)
    normed = (x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)).astype(np.float32)
    plain = model(f"(float[3,40] x) => (float[3,20] y) {{ y = {NODE}(x, b, s) }}", **NBITS)
    assert relative_l2(native, meaning(plain, {"x": normed})["y"]) < 1e-4
    assert np.array_equal(native, portable)

    proto.graph.node[0].op_type, proto.graph.node[0].domain = "Whatever", "somebody"
    proto.opset_import.add(domain="somebody", version=7)
    assert compiled(proto).report.summary.rewritten == 1


def test_attribute_that_is_no_text():
    """Compiled blobs in string attributes are left as they are."""
    blob = bytes(range(256))
    proto = model(f"(float[3,40] x) => (float[3,20] y) {{ r = somebody.Blob(x)  y = {NODE}(r, b, s) }}", **NBITS)
    proto.opset_import.add(domain="somebody", version=1)
    proto.graph.node[0].attribute.append(helper.make_attribute("blob", blob))
    done = compiled(proto)
    assert done.report.summary.rewritten == 1
    assert done.model.graph.node[0] == proto.graph.node[0]
