"""``msd.MatMulIntegerToFloat``: kernels and function body against reference.py bit for bit, that against float64, refusals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msd_compiler.runtime_ops.matmul.body import matmul_body
from msd_compiler.runtime_ops.matmul.layout import LAYOUT, pack_codes, pack_columns, unpack_columns
from msd_compiler.runtime_ops.matmul_integer_to_float.body import matmul_integer_to_float_body
from msd_compiler.runtime_ops.matmul_integer_to_float.layout import LONGEST_GROUP, CodesPlan
from msd_compiler.runtime_ops.matmul_integer_to_float.reference import matmul_integer_to_float
from msd_compiler.runtime_ops.matmul_integer_to_float.schema import SCHEMA
from onnx import helper
from support import needs_opset

TYPES = [np.uint8, np.int8, np.uint16, np.int16]
WEIGHT = ["B", "scales", "zero_points", "bias", "plan"]
OPERANDS = ["A", "a_scale", "a_zero_point", *WEIGHT]


@dataclass(frozen=True)
class Case:
    """One product; ``codes`` are the weight's."""

    operands: dict[str, np.ndarray]
    codes: np.ndarray

    def reference(self) -> np.ndarray:
        named = {key.lower(): value for key, value in self.operands.items()}
        return matmul_integer_to_float(**named)

    def but(self, **changes: np.ndarray) -> Case:
        return Case(self.operands | changes, self.codes)

    def exact(self) -> np.ndarray:
        """The product in float64, from the definition of a quantized value."""
        o, n = self.operands, len(self.operands["bias"])
        plan = CodesPlan.of(o["plan"])
        of = np.arange(plan.k) // plan.block_size
        zeros, scales = (
            unpack_columns(o[name], n, plan.groups).astype(np.float64)[of] for name in ("zero_points", "scales")
        )
        x = (o["A"].astype(np.float64) - float(o["a_zero_point"])) * float(o["a_scale"])
        return x @ ((self.codes - zeros) * scales) + o["bias"]


def case(
    dtype: type,
    rows: int,
    k: int,
    n: int,
    *,
    bits: int = 8,
    block: int = 32,
    zero: int | None = None,
    one: bool = False,
    seed: int = 0,
) -> Case:
    """Random operands over the whole range of every type; ``one``: a single zero point, and a column's one scale."""
    rng = np.random.default_rng(seed)
    info = np.iinfo(dtype)
    plan = CodesPlan(k, bits, block, info.bits, info.min < 0)
    codes = rng.integers(0, 2**bits, (k, n)).astype(np.uint8)
    shape = (1 if one else plan.groups, n)
    zero_points = pack_columns(rng.integers(0, 256, shape).astype(np.uint8))
    operands = {
        "A": rng.integers(info.min, info.max + 1, (rows, k)).astype(dtype),
        "a_scale": np.array(0.013, np.float32),
        "a_zero_point": np.array(rng.integers(info.min, info.max + 1) if zero is None else zero, dtype),
        "B": pack_codes(codes, plan),
        "scales": pack_columns(rng.uniform(0.01, 1, shape).astype(np.float32)),
        "zero_points": np.full((1, 1, 1), 2 ** (bits - 1), np.uint8) if one and seed % 2 else zero_points,
        "bias": rng.normal(size=n).astype(np.float32),
        "plan": plan.tensor(),
    }
    return Case(operands, codes)


def model(dtype: type, opset: int = 17, **attributes: object) -> bytes:
    value, onnx_type = helper.make_tensor_value_info, helper.np_dtype_to_tensor_dtype
    types = {"A": dtype, "a_scale": np.float32, "a_zero_point": dtype, "B": np.uint8, "zero_points": np.uint8}
    types |= {"scales": np.float32, "bias": np.float32, "plan": np.int64}
    node = helper.make_node(
        "MatMulIntegerToFloat", OPERANDS, ["Y"], "site", domain="msd", **({"layout": LAYOUT} | attributes)
    )
    inputs = [value(name, onnx_type(np.dtype(types[name])), None) for name in OPERANDS]
    graph = helper.make_graph([node], "open", inputs, [value("Y", onnx.TensorProto.FLOAT, None)])
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("msd", 1)]
    functions = [matmul_integer_to_float_body(opset), matmul_body(opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=functions).SerializeToString()


@pytest.fixture(scope="module")
def run(helpers):
    sessions: dict[object, ort.InferenceSession] = {}

    def run(one: Case, *, native: bool = True, opset: int = 17, threads: int = 1) -> np.ndarray:
        key = one.operands["A"].dtype, native, opset, threads
        if key not in sessions:
            text = model(one.operands["A"].dtype.type, opset)
            sessions[key] = ort.InferenceSession(text, helpers.options(threads, native=native))
        return sessions[key].run(None, one.operands)[0]

    return run


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert found.tobytes() == expected.astype(np.float32).tobytes()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_kernels(variant, run, dtype, bits):
    """At the edges of rows, columns, lines and groups."""
    sizes = [(1, 1, 1, 1), (3, 31, 15, 32), (4, 32, 16, 32), (5, 33, 17, 32), (11, 131, 35, 64), (9, 300, 19, 128)]
    for rows, k, n, block in [*sizes, (2, 40, 20, 7), (13, 100, 40, 100)]:
        for one in (False, True):
            product = case(dtype, rows, k, n, bits=bits, block=block, one=one, seed=rows)
            assert_same_bits(run(product), product.reference())


@pytest.mark.parametrize("opset", [11, 12, 13, 17, 18, 21, 23, 25])
@pytest.mark.parametrize("dtype", TYPES)
def test_body(run, dtype, opset):
    needs_opset(opset)
    for rows, k, n, bits, block in [(1, 1, 1, 8, 4), (3, 40, 20, 4, 16), (7, 300, 33, 8, 128), (2, 20, 18, 2, 128)]:
        for one in (False, True):
            product = case(dtype, rows, k, n, bits=bits, block=block, one=one, seed=k)
            assert_same_bits(run(product, native=False, opset=opset), product.reference())


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("weight", [0, 255])
@pytest.mark.parametrize("dtype", TYPES)
def test_largest_sums(variant, run, dtype, weight, rows):
    """The farthest codes from the farthest zero points, in the longest group: just within int32."""
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    for code, zero in [(low, high), (high, low), (low, low), (low, 0), (high, 0)]:
        product = case(dtype, rows, LONGEST_GROUP, 17, block=LONGEST_GROUP, zero=zero, one=True)
        packed = np.full_like(product.operands["B"], weight)
        product = product.but(
            A=np.full_like(product.operands["A"], code),
            B=packed,
            zero_points=np.full((1, 1, 1), 255 - weight, np.uint8),
        )
        expected = product.reference()
        assert_same_bits(run(product), expected)
        assert_same_bits(run(product, native=False), expected)


@pytest.mark.parametrize("by", [1, 2, 4, 12])
@pytest.mark.parametrize("dtype", TYPES)
def test_any_address(variant, run, helpers, dtype, by):
    """onnxruntime hands arrays on as they are, wherever they begin."""
    for bits in (2, 4, 8):
        for rows in (1, 9):
            product = case(dtype, rows, 75, 37, bits=bits, one=bits == 4)
            moved = product.but(**{k: helpers.displaced(v, by) for k, v in product.operands.items()})
            assert_same_bits(run(moved), product.reference())


@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from(TYPES),
    rows=st.integers(1, 12),
    k=st.integers(1, 300),
    n=st.integers(1, 40),
    bits=st.sampled_from([2, 4, 8]),
    block=st.integers(1, 128),
    one=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_sizes(run, dtype, rows, k, n, bits, block, one, seed):
    product = case(dtype, rows, k, n, bits=bits, block=block, one=one, seed=seed)
    expected = product.reference()
    assert_same_bits(run(product), expected)
    exact = product.exact()
    assert np.linalg.norm(expected - exact) <= 1e-6 * max(np.linalg.norm(exact), np.abs(exact).max() * 10)


@pytest.mark.parametrize("one", [False, True])
def test_threads_and_rows_change_nothing(run, one):
    product = case(np.uint16, 300, 1000, 200, bits=4, block=64, one=one)
    expected = product.reference()
    for threads in (1, 2):
        for rows in (1, 7, 128, 300):
            part = product.but(A=product.operands["A"][:rows])
            assert_same_bits(run(part, threads=threads), expected[:rows])


@pytest.mark.parametrize("shape", [(24,), (2, 3, 24), (0, 24), (3, 0, 24)])
@pytest.mark.parametrize("native", [True, False])
def test_rank(run, shape, native):
    product = case(np.int8, 6, 24, 18)
    product = product.but(A=np.resize(product.operands["A"], shape))
    assert_same_bits(run(product, native=native), product.reference())


def test_one_scale_has_the_bits_of_the_chain(run, helpers):
    """MatMulInteger -> Cast -> Mul(., Mul(s_a, s_w)) -> Add, as onnxruntime's quantizer writes it."""
    product = case(np.uint8, 5, 700, 40, block=128, one=True)
    o = product.operands
    zeros = np.broadcast_to(unpack_columns(o["zero_points"], 40, 1)[0], 40).copy()
    text = """
    <ir_version: 8, opset_import: ["" : 17]> chain (uint8[m, 700] a, float s, uint8 z) => (float[m, 40] y) {
        c = MatMulInteger(a, w, z, wz)  f = Cast <to = 1> (c)  p = Mul(s, sw)  v = Mul(f, p)  y = Add(v, b)
    }"""
    chain = onnx.parser.parse_model(text)
    stored = {"w": product.codes, "wz": zeros, "sw": unpack_columns(o["scales"], 40, 1)[0], "b": o["bias"]}
    chain.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in stored.items())
    session = ort.InferenceSession(chain.SerializeToString(), helpers.options(native=False, optimize=False))
    expected = session.run(None, {"a": o["A"], "s": o["a_scale"], "z": o["a_zero_point"]})[0]
    assert_same_bits(run(product), expected)


REFUSED = {
    "scale of two values": ({"a_scale": np.ones(2, np.float32)}, r"a_scale has shape \[2\], needed one value"),
    "zero point empty": ({"a_zero_point": np.ones(0, np.uint8)}, r"a_zero_point has shape \[0\], needed one value"),
    "A with another K": ({"A": np.ones((2, 41), np.uint8)}, r"A has shape \[2, 41\], needed \[\.\.\., 40\]"),
    "block 129": ({"plan": np.array([40, 8, 129, 8, 0])}, "plan has block_size = 129, needed 1 to 128"),
    "16 bits": ({"plan": np.array([40, 8, 16, 16, 0])}, "plan has code_bits = 16, needed 8, A's width"),
    "signed": ({"plan": np.array([40, 8, 16, 8, 1])}, "plan has signed = 1, needed 0, as A is"),
    "zero points per group, one scale": (
        {"scales": np.ones((3, 1, 16), np.float32)},
        "zero_points differ between groups where scales do not, needed one group of both",
    ),
    "one scale for a long K": (
        {
            "A": np.ones((1, 32800), np.uint8),
            "plan": np.array([32800, 8, 16, 8, 0]),
            "B": np.zeros((3, 2050, 4, 64), np.uint8),
            "scales": np.ones((3, 1, 16), np.float32),
            "zero_points": np.ones((1, 1, 1), np.uint8),
        },
        "scales has one group for K = 32800, needed K up to 32768 or a scale per group",
    ),
    "B of another weight": ({"B": np.zeros((3, 3, 4, 63), np.uint8)}, r"B has shape \[3, 3, 4, 63\], needed"),
}


@pytest.mark.parametrize(("changes", "refusal"), REFUSED.values(), ids=REFUSED)
def test_refused(run, changes, refusal):
    product = case(np.uint8, 2, 40, 35, block=16)
    with pytest.raises(Exception, match=rf"msd\.MatMulIntegerToFloat \(node 'site'\): {refusal}"):
        run(product.but(**changes))


def test_another_layout_is_refused(helpers):
    with pytest.raises(Exception, match="the weight has layout 'n16k4/2', this library reads 'n16k4/1'"):
        ort.InferenceSession(model(np.uint8, layout="n16k4/2"), helpers.options())


def test_schema_body_and_reference_agree():
    body = matmul_integer_to_float_body(17)
    assert list(body.input) == [i.name for i in SCHEMA.inputs] == OPERANDS
    assert list(body.output) == [o.name for o in SCHEMA.outputs]
    assert set(body.attribute) == set(SCHEMA.attributes)
