"""The function body, run by onnxruntime without the library, against reference.py bit for bit."""

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from msd_compiler.runtime_ops.matmul.body import matmul_body
from msd_compiler.runtime_ops.matmul.layout import ActivationFormat
from msd_compiler.runtime_ops.spelling import OLDEST_OPSET
from onnx import TensorProto, helper, numpy_helper

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")  # of reference.py
MXFP4, MXFP8 = ActivationFormat.MXFP4_E2M1_X2, ActivationFormat.MXFP8


def model_of(opset, nodes, inputs, outputs, initializers, **body):
    graph = helper.make_graph(nodes, "body", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("msd", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=[matmul_body(opset, **body)])
    return model.SerializeToString()


def value(name, dtype=TensorProto.FLOAT, shape=None):
    return helper.make_tensor_value_info(name, dtype, shape)


def constants(site, prefix):
    return [numpy_helper.from_array(v, prefix + k) for k, v in site.operands().items()]


def names(site, prefix):
    return [prefix + k for k in site.operands()]


def same(y, expected):
    assert y.dtype == expected.dtype
    np.testing.assert_array_equal(y.astype(np.float32), expected.astype(np.float32))


def run_one(helpers, opset, site, a, *, optimize=True, native=False, **body):
    """One node with constant operands; ``body`` is what `matmul_body` is told."""
    dtype = helpers.onnx_type(a.dtype)
    node = helpers.matmul_node("site", dtype, ["A", *names(site, "")], "Y")
    model = model_of(opset, [node], [value("A", dtype, a.shape)], [value("Y", dtype)], constants(site, ""), **body)
    session = ort.InferenceSession(model, helpers.options(native=native, optimize=optimize))
    return session.run(None, {"A": a})[0]


def activation(shape, dtype=np.float32):
    return np.random.default_rng(1).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("optimize", [False, True], ids=["plain", "optimized"])
def test_two_sites_in_one_file(helpers, opset, optimize):
    """They differ in everything the plan says; the first's output is the second's input."""
    first = helpers.make_site(40, 33, bits=8, block_size=16, terms=2, columns="one", seed=1)
    second = helpers.make_site(33, 20, bits=4, block_size=24, terms=3, per_row=True, columns="group", seed=2)
    third = helpers.make_site(33, 20, **helpers.codings[-1], activation=ActivationFormat.MXFP8, columns="group", seed=3)
    check_two_sites(helpers, opset, optimize, first, second)
    check_two_sites(helpers, opset, optimize, first, third, codebooks=True, formats=True)


def check_two_sites(helpers, opset, optimize, first, second, **body):
    nodes = [
        helpers.matmul_node("first", TensorProto.FLOAT, ["A", *names(first, "f_")], "h"),
        helpers.matmul_node("second", TensorProto.FLOAT, ["h", *names(second, "s_")], "Y"),
    ]
    model = model_of(
        opset,
        nodes,
        [value("A", shape=["m", 40])],
        [value("Y", shape=["m", 20]), value("h", shape=["m", 33])],
        constants(first, "f_") + constants(second, "s_"),
        **body,
    )
    onnx.checker.check_model(model, full_check=True)
    a = activation((5, 40))
    h = first.reference(a)
    for native in (False, True):  # the same file, with the body and with the kernel
        session = ort.InferenceSession(model, helpers.options(native=native, optimize=optimize))
        y, h_run = session.run(None, {"A": a})
        same(h_run, h)
        same(y, second.reference(h))


@pytest.mark.parametrize("optimize", [False, True], ids=["plain", "optimized"])
def test_codebooks_and_formats(helpers, opset, optimize):
    """A body that knows them serves integers and INT8 terms too: the plan chooses."""
    for i, form in enumerate(ActivationFormat):
        for j, coding in enumerate(helpers.codings):
            k, block_size = ((75, 32), (64, 32), (21, 8))[(i + j) % 3]
            site = helpers.make_site(k, 18, **coding, block_size=block_size, activation=form, columns="group")
            a = helpers.uneven(13, k)
            same(run_one(helpers, opset, site, a, optimize=optimize, codebooks=True, formats=True), site.reference(a))
            body = {"codebooks": "codebook" in coding, "formats": form is not ActivationFormat.INT8}
            same(run_one(helpers, opset, site, a, optimize=optimize, **body), site.reference(a))


def test_mx_formats_of_narrow_floats(helpers, mx_format):
    site = helpers.make_site(75, 18, activation=mx_format, columns="group")
    a = helpers.uneven(13, 75, np.float16)
    same(run_one(helpers, 17, site, a, formats=True), site.reference(a))


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_terms(helpers, opset, terms):
    for bits, per_row, columns in ((8, False, "one"), (4, True, "column"), (2, False, "group")):
        site = helpers.make_site(75, 18, bits=bits, block_size=32, terms=terms, per_row=per_row, columns=columns)
        a = activation((4, 75))
        same(run_one(helpers, opset, site, a), site.reference(a))


@pytest.mark.parametrize("shape", [(24,), (2, 3, 24), (2, 1, 3, 24), (0, 24), (3, 0, 24)])
def test_rank(helpers, opset, shape):
    site = helpers.make_site(24, 18, bits=4, block_size=8)
    a = activation(shape)
    same(run_one(helpers, opset, site, a), site.reference(a))


def test_guards(helpers, opset):
    for terms in (2, 3):
        for per_row in (False, True):
            site = helpers.make_site(21, 18, block_size=8, terms=terms, per_row=per_row, columns="group")
            a = activation((7, 21))
            a[1, 3], a[2, 9], a[3, 20] = np.nan, np.inf, -np.inf
            a[4] = 0
            a[5, 8:16] = 2.0**-101
            a[6] = 2.0**-100
            same(run_one(helpers, opset, site, a), site.reference(a))


def test_float16(helpers, opset):
    site = helpers.make_site(40, 18, block_size=16, columns="column")
    a = activation((3, 40), np.float16)
    for optimize in (False, True):
        same(run_one(helpers, opset, site, a, optimize=optimize), site.reference(a))


def test_bfloat16(helpers, opset):
    if opset < 13:
        pytest.skip("bfloat16 begins with opset 13")
    site = helpers.make_site(40, 18, block_size=16)
    nodes = [
        helper.make_node("Cast", ["A"], ["a"], to=TensorProto.BFLOAT16),
        helpers.matmul_node("site", TensorProto.BFLOAT16, ["a", *names(site, "")], "h"),
        helper.make_node("Cast", ["h"], ["Y"], to=TensorProto.FLOAT),
    ]
    model = model_of(opset, nodes, [value("A", shape=[3, 40])], [value("Y")], constants(site, ""))
    session = ort.InferenceSession(model, helpers.options(native=False))
    a = activation((3, 40), ml_dtypes.bfloat16)
    same(session.run(None, {"A": a.astype(np.float32)})[0], site.reference(a).astype(np.float32))


def choice(condition, node, n):
    """An If: ``node``, or zeros."""
    zeros = helper.make_node("Constant", [], ["zeros"], value=numpy_helper.from_array(np.zeros((1, n), np.float32)))
    then_branch = helper.make_graph([node], "then", [], [value(node.output[0])])
    else_branch = helper.make_graph([zeros], "else", [], [value("zeros")])
    output = f"{node.output[0]}_or_0"
    return helper.make_node("If", [condition], [output], then_branch=then_branch, else_branch=else_branch)


def test_within_an_if(helpers, opset):
    site = helpers.make_site(40, 18, bits=4, block_size=16)
    node = helpers.matmul_node("site", TensorProto.FLOAT, ["A", *names(site, "")], "y")
    model = model_of(
        opset,
        [choice("c", node, 18)],
        [value("A", shape=["m", 40]), value("c", TensorProto.BOOL, [])],
        [value("y_or_0")],
        constants(site, ""),
    )
    session = ort.InferenceSession(model, helpers.options(native=False))
    a = activation((3, 40))
    same(session.run(None, {"A": a, "c": np.array(True)})[0], site.reference(a))


@pytest.mark.parametrize("how", [{"terms": 2}, {"terms": 3}, {"activation": MXFP4}, {"activation": MXFP8}], ids=str)
def test_within_constant_ifs(helpers, opset, how):
    """The runtime takes them away, and with two of them loses names within a Scan."""
    has_format = "activation" in how
    site = helpers.make_site(40, 18, **helpers.codings[-1 if has_format else 1], block_size=16, **how)
    node = helpers.matmul_node("site", TensorProto.FLOAT, ["A", *names(site, "")], "y")
    model = model_of(
        opset,
        [choice("c", choice("c", node, 18), 18)],
        [value("A", shape=["m", 40])],
        [value("y_or_0_or_0")],
        [*constants(site, ""), numpy_helper.from_array(np.array(True), "c")],
        codebooks=has_format,
        formats=has_format,
    )
    session = ort.InferenceSession(model, helpers.options(native=False))
    a = activation((3, 40))
    same(session.run(None, {"A": a})[0], site.reference(a))


@pytest.mark.parametrize("block_size", [1, 5, 8, 24, 48, 256])
def test_groups(helpers, block_size):
    for bits in (2, 4, 8):
        site = helpers.make_site(2 * block_size + 1, 5, bits=bits, block_size=block_size, columns="group")
        a = activation((3, site.plan.k))
        same(run_one(helpers, 17, site, a), site.reference(a))


def test_refuses_an_older_opset():
    with pytest.raises(ValueError, match=f"from opset {OLDEST_OPSET} on, got 10"):
        matmul_body(10)
