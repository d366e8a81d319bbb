"""``msd.MatMul`` as onnxruntime sees it: what it refuses and how it says so, shapes, subgraphs, float16 graphs."""

import os
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from msd_compiler.runtime_ops import library_path
from onnx import TensorProto, helper, numpy_helper


def value(name, dtype=TensorProto.FLOAT, shape=None):
    return helper.make_tensor_value_info(name, dtype, shape)


def model_of(graph, opset=17):
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("msd", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def constants(site, prefix=""):
    return [numpy_helper.from_array(v, prefix + k) for k, v in site.operands().items()]


def changed(array, **at):
    """A copy of ``plan`` with fields replaced."""
    fields = {"k": 0, "bits": 1, "block_size": 2, "terms": 3, "per_row": 4, "codebook": 5, "activation": 6}
    array = array.copy()
    for name, new in at.items():
        array[fields[name]] = new
    return array


@pytest.fixture(scope="module")
def session(helpers):
    return ort.InferenceSession(helpers.open_model(np.float32).SerializeToString(), helpers.options())


K, N = 40, 35  # tiles 3, groups 3 of 16, lines 4

REFUSED = {
    "A of rank 0": ({"A": np.float32(1)}, r"A has shape \[\], needed \[\.\.\., 40\]"),
    "A with another K": ({"A": np.ones((2, 41), np.float32)}, r"A has shape \[2, 41\], needed \[\.\.\., 40\]"),
    "A with K 0": ({"A": np.ones((2, 0), np.float32)}, r"A has shape \[2, 0\], needed"),
    "plan too short": ({"plan": np.array([40, 8, 16, 2], np.int64)}, r"plan has shape \[4\], needed \[7\]"),
    "plan of rank 2": ({"plan": np.array([[40, 8, 16, 2, 0, 0, 0]], np.int64)}, r"plan has shape \[1, 7\], needed \[7\]"),
    "plan empty": ({"plan": np.zeros(0, np.int64)}, r"plan has shape \[0\], needed \[7\]"),
    "k 0": ({"k": 0}, "plan has k = 0, needed 1 to 2147483647"),
    "k negative": ({"k": -40}, "plan has k = -40"),
    "k huge": ({"k": 2**63 - 1}, "plan has k = 9223372036854775807"),
    "bits 3": ({"bits": 3}, "plan has bits = 3, needed 2, 4 or 8"),
    "bits 0": ({"bits": 0}, "plan has bits = 0"),
    "bits 2**32 + 8": ({"bits": 2**32 + 8}, "plan has bits = 4294967304"),
    "block 0": ({"block_size": 0}, "plan has block_size = 0, needed 1 to 256"),
    "block 257": ({"block_size": 257}, "plan has block_size = 257"),
    "terms 0": ({"terms": 0}, "plan has terms = 0, needed 1, 2 or 3"),
    "terms 4": ({"terms": 4}, "plan has terms = 4"),
    "per_row 2": ({"per_row": 2}, "plan has per_row = 2, needed 0 or 1"),
    "codebook 2": ({"codebook": 2}, "plan has codebook = 2, needed 0 or 1"),
    "codebook of 8 bits": ({"codebook": 1}, "plan has codebook = 1 with 8 bits, needed 4"),
    "activation 6": ({"activation": 6}, "plan has activation = 6, needed 0 to 5"),
    "MXFP4 in 2 terms": ({"activation": 1}, "plan has activation = 1 with terms = 2, needed 1"),
    "MXFP8 in 1 term": ({"activation": 5, "terms": 1}, "plan has activation = 5 with terms = 1, needed 3"),
    "MXFP4 per row": (
        {"activation": 4, "terms": 1, "per_row": 1}, "plan has activation = 4 with per_row = 1, needed 0"
    ),
    "k of another weight": ({"k": 64, "A": np.ones((2, 64), np.float32)}, r"B has shape .*needed \[3, 4, 4, 64\]"),
    "bits of another weight": ({"bits": 4}, r"B has shape \[3, 3, 4, 64\], needed \[3, 3, 2, 64\] for K = 40, N = 35"),
    "B of rank 3": ({"B": np.zeros((3, 3, 256), np.uint8)}, r"B has shape \[3, 3, 256\], needed \[3, 3, 4, 64\]"),
    "B with a tile less": ({"B": np.zeros((2, 3, 4, 64), np.uint8)}, r"B has shape \[2, 3, 4, 64\]"),
    "B empty": ({"B": np.zeros((0, 3, 4, 64), np.uint8)}, r"B has shape \[0, 3, 4, 64\]"),
    "B with short lines": ({"B": np.zeros((3, 3, 4, 63), np.uint8)}, r"B has shape \[3, 3, 4, 63\]"),
    "bias of rank 2": ({"bias": np.zeros((1, N), np.float32)}, r"bias has shape \[1, 35\], needed \[N\]"),
    "bias of rank 0": ({"bias": np.float32(0)}, r"bias has shape \[\], needed \[N\]"),
    "bias of other tiles": ({"bias": np.zeros(49, np.float32)}, r"B has shape .*needed \[4, 3, 4, 64\]"),
    "scales of rank 2": ({"scales": np.ones((3, 16), np.float32)}, r"scales has shape \[3, 16\], needed \[3, 3, 16\]"),
    "scales of 2 groups": ({"scales": np.ones((3, 2, 16), np.float32)}, r"scales has shape \[3, 2, 16\]"),
    "scales of 2 tiles": ({"scales": np.ones((2, 3, 16), np.float32)}, r"scales has shape \[2, 3, 16\]"),
    "scales as one number": ({"scales": np.ones((1, 1, 1), np.float32)}, r"scales has shape \[1, 1, 1\]"),
    "zero points short": ({"zero_points": np.ones((3, 3, 1), np.uint8)}, r"zero_points has shape \[3, 3, 1\].*or \[1, 1, 1\]"),
    "zero points empty": ({"zero_points": np.ones((1, 1, 0), np.uint8)}, r"zero_points has shape \[1, 1, 0\]"),
    "zero points 0-D": ({"zero_points": np.uint8(1)}, r"zero_points has shape \[\]"),
    "offsets of 4 groups": ({"offsets": np.ones((3, 4, 16), np.float32)}, r"offsets has shape \[3, 4, 16\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(session, helpers, case):
    changes, message = REFUSED[case]
    site = helpers.make_site(K, N, block_size=16, columns="group")
    feed = {"A": np.ones((2, K), np.float32), **site.operands()}
    feed |= {key: np.asarray(new) for key, new in changes.items() if key in feed}
    fields = {key: new for key, new in changes.items() if key not in feed}
    feed["plan"] = changed(feed["plan"], **fields)
    with pytest.raises(Exception, match=r"msd\.MatMul \(node 'site'\): " + message):
        session.run(None, feed)


def test_survives_what_it_refused(session, helpers):
    site = helpers.make_site(K, N, block_size=16)
    a = np.ones((2, K), np.float32)
    with pytest.raises(Exception, match="needed"):
        session.run(None, {"A": a[:, 1:], **site.operands()})
    np.testing.assert_array_equal(session.run(None, {"A": a, **site.operands()})[0], site.reference(a))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"layout": "n16k4/2"}, "the weight has layout 'n16k4/2', this library reads 'n16k4/1'"),
        ({"layout": ""}, "the weight has layout '', this library reads 'n16k4/1'"),
        ({"layout": None}, "attribute layout is absent, needed 'n16k4/1'"),
        ({"layout": 1}, "attribute layout is absent, needed 'n16k4/1'"),
        ({"output_dtype": None}, "attribute output_dtype is absent"),
        ({"output_dtype": 11}, "output_dtype is 11, needed A's element type, 1"),
    ],
)
def test_refuses_at_load(helpers, attributes, message):
    model = helpers.open_model(np.float32, **attributes)
    with pytest.raises(Exception, match=r"msd\.MatMul \(node 'site'\): " + message):
        ort.InferenceSession(model.SerializeToString(), helpers.options())


def test_float16_node_states_its_type(helpers):
    model = helpers.open_model(np.float16, output_dtype=TensorProto.FLOAT)
    with pytest.raises(Exception, match="output_dtype is 1, needed A's element type, 10"):
        ort.InferenceSession(model.SerializeToString(), helpers.options())


@pytest.mark.parametrize(
    ("name", "dtype"), [("A", TensorProto.DOUBLE), ("B", TensorProto.INT8), ("bias", TensorProto.FLOAT16)]
)
def test_refuses_types_at_load(helpers, name, dtype):
    model = helpers.open_model(np.float32)
    next(i for i in model.graph.input if i.name == name).type.tensor_type.elem_type = dtype
    with pytest.raises(Exception, match="MatMul"):
        ort.InferenceSession(model.SerializeToString(), helpers.options())


def test_refuses_a_missing_input(helpers):
    model = helpers.open_model(np.float32)
    del model.graph.node[0].input[-1]
    with pytest.raises(Exception, match="MatMul"):
        ort.InferenceSession(model.SerializeToString(), helpers.options())


@pytest.mark.parametrize(("isa", "refusal"), [("scalar", ""), ("avx512", "MSD_ISA is 'avx512', this machine runs: ")])
def test_environment_forces_a_kernel(helpers, tmp_path, isa, refusal):
    path = tmp_path / "model.onnx"
    onnx.save(helpers.open_model(np.float32), path)
    code = (
        "import sys, onnxruntime as ort\n"
        "options = ort.SessionOptions()\n"
        "options.register_custom_ops_library(sys.argv[1])\n"
        "ort.InferenceSession(sys.argv[2], options)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(library_path()), str(path)],
        env={**os.environ, "MSD_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode != 0) == bool(refusal), done.stderr
    assert refusal in done.stderr


def test_sessions_share_the_library(helpers):
    """Options made and dropped, sessions side by side: the ops outlive them all."""
    site = helpers.make_site(K, N)
    a = np.ones((2, K), np.float32)
    model = helpers.open_model(np.float32).SerializeToString()
    sessions = [ort.InferenceSession(model, helpers.options()) for _ in range(3)]
    del sessions[0]
    for each in sessions:
        np.testing.assert_array_equal(each.run(None, {"A": a, **site.operands()})[0], site.reference(a))


def test_many_callers_at_once(helpers):
    from concurrent.futures import ThreadPoolExecutor

    site = helpers.make_site(200, 70, block_size=32, columns="group")
    model = helpers.open_model(np.float32).SerializeToString()
    shared = ort.InferenceSession(model, helpers.options(threads=2))
    inputs = [np.random.default_rng(i).normal(size=(1 + 13 * i, 200)).astype(np.float32) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda a: shared.run(None, {"A": a, **site.operands()})[0], inputs * 4))
    for a, y in zip(inputs * 4, outputs, strict=True):
        np.testing.assert_array_equal(y, site.reference(a))


@pytest.mark.parametrize(
    ("a_shape", "y_shape"),
    [
        (["batch", 3, K], ["batch", 3, N]),
        ([2, K], [2, N]),
        ([K], [N]),
        (["batch", "k"], ["batch", N]),
        ([None, K], None),  # an unnamed dimension cannot be passed on: nothing is said rather than something wrong
        (None, None),
    ],
)
def test_inferred_shape(helpers, tmp_path, a_shape, y_shape):
    site = helpers.make_site(K, N)
    graph = helper.make_graph(
        [
            helpers.matmul_node("site", TensorProto.FLOAT, ["A", *site.operands()], "h"),
            helper.make_node("Neg", ["h"], ["Y"]),
        ],
        "shapes",
        [value("A", shape=a_shape)],
        [value("Y")],
        constants(site),
    )
    chosen = helpers.options(optimize=False)
    session = ort.InferenceSession(model_of(graph).SerializeToString(), chosen)
    (output,) = session.get_outputs()
    assert output.type == "tensor(float)"
    if y_shape is not None:
        assert output.shape == y_shape
    else:
        assert all(not isinstance(dim, int) for dim in output.shape or [])
    a = np.ones([dim if isinstance(dim, int) else 2 for dim in (a_shape or [2, K])], np.float32)
    if a.shape[-1] == K:
        np.testing.assert_array_equal(session.run(None, {"A": a})[0], -site.reference(a))


def test_within_an_if(helpers):
    """Operands of an outer graph and of the branch itself; neither is a constant when the kernel is created."""
    outer, inner = helpers.make_site(K, N, seed=1), helpers.make_site(K, N, bits=4, seed=2)
    then_branch = helper.make_graph(
        [helpers.matmul_node("outer", TensorProto.FLOAT, ["A", *(f"o_{k}" for k in outer.operands())], "y_then")],
        "then",
        [],
        [value("y_then")],
    )
    else_branch = helper.make_graph(
        [helpers.matmul_node("inner", TensorProto.FLOAT, ["A", *(f"i_{k}" for k in inner.operands())], "y_else")],
        "else",
        [],
        [value("y_else")],
        constants(inner, "i_"),
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["Y"], then_branch=then_branch, else_branch=else_branch)],
        "branches",
        [value("A", shape=["m", K]), value("c", TensorProto.BOOL, [])],
        [value("Y")],
        constants(outer, "o_"),
    )
    session = ort.InferenceSession(model_of(graph).SerializeToString(), helpers.options())
    a = np.random.default_rng(0).normal(size=(3, K)).astype(np.float32)
    for flag, site in ((True, outer), (False, inner)):
        np.testing.assert_array_equal(session.run(None, {"A": a, "c": np.array(flag)})[0], site.reference(a))


def test_float16_node_between_float_nodes(helpers, variant):
    """onnxruntime runs a float16 node in float where its neighbours have no float16 kernel, and drops the casts.

    The neighbours double, which is exact, so the node's own rounding shows.
    """
    site = helpers.make_site(K, N)
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["x", "x"], ["a"]),
            helpers.matmul_node("site", TensorProto.FLOAT16, ["a", *site.operands()], "h"),
            helper.make_node("Add", ["h", "h"], ["y"]),
        ],
        "lone",
        [value("x", TensorProto.FLOAT16, ["m", K])],
        [value("y", TensorProto.FLOAT16)],
        constants(site),
    )
    session = ort.InferenceSession(model_of(graph).SerializeToString(), helpers.options())
    x = np.random.default_rng(0).normal(size=(3, K)).astype(np.float16)
    (y,) = session.run(None, {"x": x})
    np.testing.assert_array_equal(y, 2 * site.reference(2 * x))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_type_of_an_undeclared_value(helpers, dtype):
    """Between nodes no type is stated: it comes from shape inference."""
    site = helpers.make_site(K, N)
    onnx_type = helpers.onnx_type(dtype)
    graph = helper.make_graph(
        [helpers.matmul_node("site", onnx_type, ["x", *site.operands()], "h"), helper.make_node("Neg", ["h"], ["y"])],
        "undeclared",
        [value("x", onnx_type, ["m", K])],
        [value("y", onnx_type)],
        constants(site),
    )
    session = ort.InferenceSession(model_of(graph).SerializeToString(), helpers.options())
    x = np.ones((2, K), dtype)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], -site.reference(x))
