"""The function body of ``msd.Attention``, run by onnxruntime without the library, against reference.py and float64.

What is stored is equal to the last bit. Y is not: the body's probabilities are float32, the reference's have 16 bits.
"""

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from attention_support import (
    ACTIVATIONS,
    INPUTS,
    MASK_KINDS,
    MASK_SHAPES,
    OUTPUTS,
    assert_same_bits,
    make_case,
    mask_of,
    open_model,
)
from msd_compiler.runtime_ops.attention.body import attention_body
from msd_compiler.runtime_ops.attention.layout import LAYOUT
from msd_compiler.runtime_ops.attention.reference import Attended
from msd_compiler.runtime_ops.matmul.layout import Plan as RowPlan
from msd_compiler.runtime_ops.matmul.reference import decompose
from msd_compiler.runtime_ops.spelling import OLDEST_OPSET
from onnx import TensorProto, helper, numpy_helper

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # of reference.py, where a test asks for it

SCALES = ["tensor", "channel", "dynamic"]
TOLERANCE = {np.float32: 5e-4, np.float16: 1e-3, ml_dtypes.bfloat16: 4e-3}
"""Relative L2 distance of the body's Y from the reference's: rounding the probabilities, then both Y to their type."""


def model_of(case, opset, constant=()):
    """One node with its body.

    The inputs in ``constant`` are initializers, as a compiled model has plan, factors and given scales; the others then have known shapes.
    """
    model = open_model(case.dtype, case.plan.bits)
    model.opset_import[0].version = opset
    model.functions.append(attention_body(opset))
    for name in constant:
        model.graph.input.remove(next(i for i in model.graph.input if i.name == name))
        model.graph.initializer.append(numpy_helper.from_array(case.operands[name], name))
    for i in model.graph.input if constant else []:
        shape = case.operands[i.name].shape
        i.CopyFrom(helper.make_tensor_value_info(i.name, i.type.tensor_type.elem_type, shape))
    return model


@pytest.fixture(scope="module")
def run(helpers):
    """``run(case, opset=17, optimize=True, constant=())``."""
    sessions = {}

    def run_case(case, opset=17, optimize=True, constant=()):
        key = (case.dtype, case.plan.bits, opset, optimize)
        session = sessions.get(key)
        if session is None or constant:
            model = model_of(case, opset, constant)
            session = ort.InferenceSession(model.SerializeToString(), helpers.options(native=False, optimize=optimize))
            if not constant:
                sessions[key] = session
        widened = ACTIVATIONS if case.dtype == ml_dtypes.bfloat16 else []
        fed = {k: v.astype(np.float32) if k in widened else v for k, v in case.operands.items() if k not in constant}
        y, *others = session.run(None, fed)
        return Attended(y.astype(case.dtype), *others)

    return run_case


def relative_l2(y, exact):
    return np.linalg.norm(y - exact) / max(np.linalg.norm(exact), 1e-30)


def assert_agrees(found, expected):
    """All but Y to the bit; Y within its tolerance, and NaN, infinite and 0 rows where they belong."""
    assert_same_bits(found._replace(y=expected.y), expected)
    assert found.y.dtype == expected.y.dtype
    assert found.y.shape == expected.y.shape
    tolerance = TOLERANCE[expected.y.dtype.type]
    y, y_expected = (np.asarray(v.y, np.float64) for v in (found, expected))
    number = np.isfinite(y_expected)
    np.testing.assert_array_equal(y[~number], y_expected[~number])
    assert relative_l2(y[number], y_expected[number]) <= tolerance  # not if one of Y is not finite
    nothing = (y_expected == 0).all(axis=-1)
    assert (y[nothing] == 0).all()


VARIANTS = {
    "plain": {},
    "shared": {"shared": True, "lengths": [25, 0]},
    "shared, one length": {"shared": True, "lengths": [7]},
    "ragged": {"lengths": [3, 30]},
    "odd columns": {"columns": 15, "value_columns": 9},
    "capped": {"cap": 5},
    "window": {"window": 4},
    "not causal": {"causal": False},
    "sinks": {"sinks": [1, -2, 30, 0, -np.inf, 3]},
    "float16": {"dtype": np.float16},
    "one query": {"queries": 1},
    "nothing new": {"new": 0},
    "no past": {"past": 0},
    "nothing seen": {"past": 0, "new": 2},
    "no query": {"queries": 0, "new": 3},
    "no batch": {"batch": 0, "lengths": [0]},
}


def variant_of(name, scales, bits):
    changes = {"batch": 2, "heads": 2, "group": 3, "queries": 5, "past": 30} | VARIANTS[name]
    return make_case(scales=scales, bits=bits, **changes)


@pytest.mark.parametrize("optimize", [False, True], ids=["plain", "optimized"])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(run, opset, optimize, name):
    for scales in SCALES:
        for bits in (8, 4):
            case = variant_of(name, scales, bits)
            assert_agrees(run(case, opset, optimize), case.reference())


@pytest.mark.parametrize("optimize", [False, True], ids=["plain", "optimized"])
def test_what_a_compiled_model_holds_is_constant(run, opset, optimize):
    """The branches of the plan are chosen when the session starts."""
    for scales in SCALES:
        for bits in (8, 4):
            for changes in ({}, {"shared": True, "lengths": [5, 20], "cap": 5}):
                case = make_case(batch=2, heads=2, group=2, queries=3, past=30, scales=scales, bits=bits, **changes)
                given = [] if scales == "dynamic" else ["key_scale", "value_scale"]
                constant = ["plan", "factors", "mask", "sinks", *given]
                assert_agrees(run(case, opset, optimize, constant), case.reference())


@pytest.mark.parametrize("lengths", [[0, 20, 13], [20, 1, 3], [20], [0]])
def test_a_cache_that_grows(run, opset, lengths):
    """It gets as many tokens as the longest sequence needs, and never fewer than it had."""
    for scales in SCALES:
        for bits in (8, 4):
            for past, new in [(20, 3), (20, 0), (40, 3)]:
                case = make_case(
                    batch=3, heads=2, group=2, queries=3, new=new, past=past, lengths=lengths, grow=True, scales=scales,
                    bits=bits, columns=9,
                )  # fmt: skip
                assert_agrees(run(case, opset), case.reference())
    case = make_case(past=0, queries=3, grow=True, lengths=[0])
    assert_agrees(run(case, opset), case.reference())


def test_bfloat16(run, opset):
    if opset < 13:
        pytest.skip("bfloat16 begins with opset 13")
    for scales in ("tensor", "dynamic"):
        case = make_case(queries=4, columns=20, group=2, scales=scales, dtype=ml_dtypes.bfloat16)
        assert_agrees(run(case, opset), case.reference())


@pytest.mark.parametrize("cap", [0, 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_guards(run, opset, dtype, cap):
    for scales in SCALES:
        for bits in (8, 4):
            case = make_case(past=300, queries=12, heads=2, scales=scales, bits=bits, dtype=dtype, columns=20, cap=cap)
            q, k, v = (case.operands[name] for name in ACTIVATIONS)
            q[0, 0, 1, 3], q[0, 0, 2, 9], q[0, 0, 3, 0] = np.nan, np.inf, -np.inf
            q[0, 0, 4] = 0
            q[0, 1, 0] = 6e4 if dtype == np.float16 else 1e30
            k[0, 0, 5, 2], v[0, 1, 6, 1], v[0, 1, 8, 0] = np.nan, np.inf, np.nan
            k[0, 1, 7], v[0, 0, 7] = 0, -0.0
            if dtype == np.float32:
                q[0, 1, 1], q[0, 1, 2, :4], k[0, 1, 3], v[0, 1, 3] = 2.0**-101, 1e-40, 1e-40, 2.0**-100
            assert_agrees(run(case, opset), case.reference())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scales", SCALES)
def test_scales_and_masks_that_are_not_finite(run, value, scales):
    case = make_case(past=300, queries=3, scales=scales)
    for name in ("key_scale", "value_scale"):
        changed = case.operands[name].copy()
        changed[0, 0, -1, -1] = value
        assert_agrees(run(case.but(**{name: changed})), case.but(**{name: changed}).reference())
    mask = np.zeros((1, 1, 3, 303), np.float32)
    mask[0, 0, 1, 7] = value
    sink = np.array([value], np.float32)
    for changed in (case.but(mask=mask), case.but(sinks=sink)):
        assert_agrees(run(changed), changed.reference())


@pytest.mark.parametrize("lengths", [[0, 600, 255], [300, 599, 20], [600], [1]])
@pytest.mark.parametrize("shared", [False, True])
def test_what_lies_behind_the_valid_past_is_not_read(run, lengths, shared):
    """Codes and scales there may be anything; so may the mask's columns of an appended past."""
    for bits in (8, 4):
        case = make_case(
            batch=3, heads=2, queries=7, past=620 if shared else 600, lengths=lengths, shared=shared, scales="dynamic", bits=bits
        )  # fmt: skip
        expected = case.reference()
        for name in ("key_scale", "value_scale"):
            for b, length in enumerate(np.broadcast_to(lengths, 3)):
                case.operands[name][b, :, length:] = [np.nan, np.inf, 3e38][b]
        assert_agrees(Attended(run(case).y, *case.reference()[1:]), Attended(expected.y, *case.reference()[1:]))


@pytest.mark.parametrize("shape", MASK_SHAPES)
@pytest.mark.parametrize("kind", MASK_KINDS)
def test_mask(run, shape, kind):
    mask = mask_of(kind, shape)
    for changes in ({"lengths": [300, 2]}, {"lengths": [300, 299], "shared": True, "past": 310}):
        for scales in ("channel", "dynamic"):
            for cap in (0, 5):
                case = make_case(
                    **{"batch": 2, "heads": 2, "group": 2, "queries": 5, "past": 300, "mask": mask, "cap": cap}
                    | changes,
                    scales=scales,
                    causal=kind == "finite",
                )
                assert_agrees(run(case), case.reference())


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("optimize", [False, True], ids=["plain", "optimized"])
def test_accuracy(run, scales, bits, optimize):
    """Against float64: only the query is rounded here, so it is better than the reference."""
    mask = np.random.default_rng(9).normal(size=(2, 1, 9, 700))
    base = {"batch": 2, "heads": 2, "group": 2, "queries": 9, "past": 650, "columns": 64}
    for changes in [{}, {"causal": False}, {"cap": 20}, {"window": 100}, {"mask": mask}, {"sinks": [1, 2, 0, -1]},
                    {"lengths": [600, 3]}, {"shared": True, "lengths": [255, 512]}]:  # fmt: skip
        case = make_case(**base | changes, scales=scales, bits=bits)
        assert relative_l2(run(case, optimize=optimize).y, case.exact()) <= 1e-4, changes


@pytest.mark.parametrize("bits", [8, 4])
def test_products_are_exact(helpers, bits):
    """The integer products of query and key, up to the edge of int32: the last of the values that the reference's bits hang on."""
    case = make_case(columns=512, queries=3, past=300, scales="dynamic", bits=bits)
    case.operands["past_key"][0, 0, 0] = -128 if bits == 8 else 0  # every code the lowest
    case.operands["query"][0, 0, 1] = 3
    function = attention_body(17)
    for node in function.node:
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                attribute.CopyFrom(helper.make_attribute(attribute.name, TensorProto.FLOAT))
    model = model_of(case, 17)
    wanted = helper.make_tensor_value_info("exact", TensorProto.INT32, None)
    graph = helper.make_graph(function.node, "products", model.graph.input, [wanted])
    opened = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = ort.InferenceSession(opened.SerializeToString(), helpers.options(native=False))
    (exact,) = session.run(None, case.operands)

    codes = decompose(case.operands["query"][0, 0], RowPlan(512, 8, 512, 2, True)).codes[:, 0].astype(np.int64)
    keys = case.reference().present_key[0, 0]
    if bits == 4:
        keys = np.stack([keys & 15, keys >> 4], axis=-1).reshape(len(keys), -1).astype(np.int64) - 8
    products = codes @ keys.astype(np.int64).T
    assert np.abs(products).max() == 512 * 32258 * 2 ** (bits - 1)
    np.testing.assert_array_equal(exact[0, 0], products)


def test_two_sites_in_one_file(helpers, opset):
    """They differ in everything the plan says, and one has outputs that nobody reads. All shapes are known. The same file runs with the kernels."""
    first = make_case(batch=2, heads=2, group=2, queries=3, past=10)
    second = make_case(
        batch=2, heads=4, queries=3, past=12, bits=4, scales="dynamic", shared=True, lengths=[4, 9], window=5, seed=1
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("msd", 1)]
    nodes, inputs = [], []
    for prefix, case in (("f_", first), ("s_", second)):
        model = open_model(bits=case.plan.bits)
        shapes = {k: v.shape for k, v in case.operands.items()}
        inputs += [
            helper.make_tensor_value_info(prefix + i.name, i.type.tensor_type.elem_type, shapes[i.name])
            for i in model.graph.input
        ]
        node = helper.make_node(
            "Attention", [prefix + name for name in INPUTS], [prefix + name for name in OUTPUTS], prefix, domain="msd",
            layout=LAYOUT, cache=case.plan.kind, output_dtype=TensorProto.FLOAT,
        )  # fmt: skip
        nodes.append(node)
    types = [TensorProto.FLOAT, TensorProto.UINT8, TensorProto.UINT8, TensorProto.FLOAT, TensorProto.FLOAT]
    results = [
        helper.make_tensor_value_info("f_Y", TensorProto.FLOAT, [2, 4, 3, 16]),
        helper.make_tensor_value_info("f_present_value", TensorProto.INT8, [2, 2, 13, 16]),
        *(
            helper.make_tensor_value_info("s_" + name, t, ["b", "h", "t", "w"])
            for name, t in zip(OUTPUTS, types, strict=True)
        ),
    ]
    graph = helper.make_graph(nodes, "two", inputs, results)
    file = helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=[attention_body(opset)])
    onnx.checker.check_model(file, full_check=True)
    fed = {"f_" + k: v for k, v in first.operands.items()} | {"s_" + k: v for k, v in second.operands.items()}
    expected, expected_second = first.reference(), second.reference()
    for native in (False, True):
        session = ort.InferenceSession(file.SerializeToString(), helpers.options(native=native))
        y, value, *others = session.run(None, fed)
        assert_agrees(expected._replace(y=y, present_value=value), expected)
        assert_agrees(Attended(*others), expected_second)


def test_within_an_if(helpers, opset):
    """The other branch is another site, that reads the same cache."""
    cases = {"then": make_case(queries=3, past=10, group=2), "else": make_case(queries=3, past=10, group=2, window=2)}
    branches = {
        f"{name}_branch": helper.make_graph(
            [
                helper.make_node(
                    "Attention", [*INPUTS[:10], f"plan_{name}", "factors"], [f"{o}_{name}" for o in OUTPUTS], name,
                    domain="msd", layout=LAYOUT, cache="append", output_dtype=TensorProto.FLOAT,
                )
            ],
            name,
            [],
            [
                helper.make_tensor_value_info(f"Y_{name}", TensorProto.FLOAT, None),
                helper.make_tensor_value_info(f"present_key_{name}", TensorProto.INT8, None),
            ],
            [numpy_helper.from_array(case.operands["plan"], f"plan_{name}")],
        )
        for name, case in cases.items()
    }  # fmt: skip
    values = [i for i in open_model().graph.input if i.name != "plan"]
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], OUTPUTS[:2], **branches)],
        "choice",
        [*values, helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        open_model().graph.output[:2],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("msd", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=[attention_body(opset)])
    for optimize in (False, True):
        session = ort.InferenceSession(model.SerializeToString(), helpers.options(native=False, optimize=optimize))
        for name, case in cases.items():
            fed = {k: v for k, v in case.operands.items() if k != "plan"}
            y, present_key = session.run(None, {**fed, "c": np.array(name == "then")})
            expected = case.reference()
            assert_agrees(expected._replace(y=y, present_key=present_key), expected)


def test_refuses_an_older_opset():
    with pytest.raises(ValueError, match=f"from opset {OLDEST_OPSET} on, got 10"):
        attention_body(10)
