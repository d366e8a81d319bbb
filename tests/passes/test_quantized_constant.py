"""Weights that a model quantizes from float constants each time it runs, as modelopt and Brevitas write them."""

import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msd_compiler.passes import READERS
from support import activation, assert_same_numbers, compiled, dtype, model, only_row, run

import msd_compiler
from msd_compiler.facts import ReasonCode
from msd_compiler.linked import Linked
from msd_compiler.reader import find_sites
from msd_compiler.runtime import runtime_version
from msd_compiler.source import Source, load

K, N = 40, 20
RUNTIME = runtime_version()


def floats(*shape, floats="float32"):
    return np.random.default_rng(4).standard_normal(shape).astype(dtype(floats))


def scales(*shape, floats="float32"):
    return np.asarray(np.random.default_rng(5).uniform(0.01, 0.03, shape)).astype(dtype(floats))


def zeros(kind, *shape):
    return np.asarray(np.random.default_rng(6).integers(0, 4, shape)).astype(dtype(kind))


def bounds(low, high):
    return {"low": np.int8(low), "high": np.int8(high)}


@dataclass(frozen=True)
class Spelling:
    """A row: the graph from ``x`` to ``y``, its tensors, and what the report says of it."""

    name: str
    nodes: str
    tensors: dict = field(default_factory=dict)
    format: str = "int8 per channel, zero points"
    form: str = "QuantizeLinear -> DequantizeLinear -> MatMul"
    result: tuple = ("msd.MatMul",)
    opset: int = 21
    shape: tuple = (3, K)


W, W_T = {"w": floats(K, N)}, {"w": floats(N, K)}
S = {"s": scales(N), "z": zeros("int8", N)}
ONE = {"s": scales(), "z": np.int8(0)}
Q_DQ = "q = QuantizeLinear(w, s, z)  d = DequantizeLinear(q, s, z)"
CLIPPED = "q = QuantizeLinear<axis=0>(w, s, z)  c = Clip(q, low, high)  d = DequantizeLinear<axis=0>(c, s, z)  t = Transpose(d)  y = MatMul(x, t)"
CLIP_FORM = "QuantizeLinear -> Clip -> DequantizeLinear -> Transpose -> MatMul"
SYMMETRIC = {"s": scales(N), "z": np.zeros(N, np.int8)}

# fmt: off
TABLE = [
    Spelling("per tensor", f"{Q_DQ}  y = MatMul(x, d)", W | ONE, "int8 per tensor, zero points"),
    Spelling("no zero point", "q = QuantizeLinear(w, s)  d = DequantizeLinear(q, s)  y = MatMul(x, d)", W | {"s": scales()}, "uint8 per tensor"),
    Spelling("output_dtype", "q = QuantizeLinear<output_dtype=3>(w, s)  d = DequantizeLinear(q, s)  y = MatMul(x, d)", W | {"s": scales(N)}, "int8 per channel"),
    Spelling("per channel", f"{Q_DQ}  y = MatMul(x, d)", W | S),
    Spelling("axis -1, opset 13", "q = QuantizeLinear<axis=-1>(w, s, z)  d = DequantizeLinear<axis=-1>(q, s, z)  y = MatMul(x, d)", W | S, opset=13),
    Spelling("opset 11", f"{Q_DQ}  y = MatMul(x, d)", W | ONE, "int8 per tensor, zero points", opset=11),
    Spelling("uint8", f"{Q_DQ}  y = MatMul(x, d)", W | {"s": scales(N), "z": zeros("uint8", N) + np.uint8(100)}, "uint8 per channel, zero points"),
    Spelling("int4", f"{Q_DQ}  y = MatMul(x, d)", W | {"s": scales(N), "z": zeros("int4", N)}, "int4 per channel, zero points"),
    Spelling("uint4", f"{Q_DQ}  y = MatMul(x, d)", W | {"s": scales(N), "z": zeros("uint4", N)}, "uint4 per channel, zero points"),
    Spelling("scales of their own", "q = QuantizeLinear(w, s, z)  d = DequantizeLinear(q, t, z)  y = MatMul(x, d)", W | S | {"t": S["s"].copy()}),
    Spelling("blocks", "q = QuantizeLinear<axis=0, block_size=16>(w, s, z)  d = DequantizeLinear<axis=0, block_size=16>(q, s, z)  y = MatMul(x, d)",
             W | {"s": scales(3, N), "z": zeros("int4", 3, N)}, "int4 block 16, zero points"),
    Spelling("blocks on axis 1", "q = QuantizeLinear<axis=1, block_size=8>(w, s, z)  d = DequantizeLinear<axis=1, block_size=8>(q, s, z)  t = Transpose(d)  y = MatMul(x, t)",
             W_T | {"s": scales(N, 5), "z": zeros("int8", N, 5)}, "int8 block 8, zero points", "QuantizeLinear -> DequantizeLinear -> Transpose -> MatMul"),
    Spelling("Transpose after", "q = QuantizeLinear<axis=0>(w, s, z)  d = DequantizeLinear<axis=0>(q, s, z)  t = Transpose(d)  y = MatMul(x, t)", W_T | S,
             form="QuantizeLinear -> DequantizeLinear -> Transpose -> MatMul"),
    Spelling("Transpose before", f"t = Transpose<perm=[1,0]>(w)  {Q_DQ.replace('(w', '(t')}  y = MatMul(x, d)", W_T | S,
             form="Transpose -> QuantizeLinear -> DequantizeLinear -> MatMul"),
    Spelling("constant node", f"w = Constant<value=float[4,2] {{1, -2, 3, -4, 0.5, 0.25, 0.75, 8}}>()  {Q_DQ}  y = MatMul(x, d)", {"s": scales(), "z": np.int8(0)},
             "int8 per tensor, zero points", shape=(3, 4)),
    Spelling("on the left", "q = QuantizeLinear<axis=0>(w, s, z)  d = DequantizeLinear<axis=0>(q, s, z)  y = MatMul(d, x)", W_T | S, result=("Transpose", "msd.MatMul", "Transpose"), shape=(K, 3)),
    Spelling("Gemm", "q = QuantizeLinear<axis=0>(w, s, z)  d = DequantizeLinear<axis=0>(q, s, z)  y = Gemm<transB=1>(x, d, b)", W_T | S | {"b": floats(N)},
             form="QuantizeLinear -> DequantizeLinear -> Gemm"),
    Spelling("Clip", CLIPPED, W_T | SYMMETRIC | bounds(-127, 127), form=CLIP_FORM),
    Spelling("Clip to 4 bits", CLIPPED, W_T | SYMMETRIC | bounds(-7, 7), "int4 per channel, zero points", CLIP_FORM),
    Spelling("Clip to 3 bits", CLIPPED, W_T | SYMMETRIC | bounds(-4, 3), "int4 per channel, zero points", CLIP_FORM),
    Spelling("Clip to 2 bits", CLIPPED, W_T | SYMMETRIC | bounds(-2, 1), "int2 per channel, zero points", CLIP_FORM),
    Spelling("Clip, zero points beyond", CLIPPED, W_T | SYMMETRIC | bounds(-7, 7) | {"z": np.full(N, 9, np.int8)}, form=CLIP_FORM),
    Spelling("Clip, no lower bound", CLIPPED.replace("low", ""), W_T | SYMMETRIC | {"high": np.int8(60)}, form=CLIP_FORM),
    Spelling("Clip without bounds", CLIPPED.replace("low, high", ""), W_T | SYMMETRIC, form=CLIP_FORM),
    Spelling("experts", "q = QuantizeLinear<axis=2>(w, s, z)  d = DequantizeLinear<axis=2>(q, s, z)  y = MatMul(x, d)", {"w": floats(3, K, N)} | S, result=()),
    Spelling("experts, axes exchanged", "q = QuantizeLinear<axis=2>(w, s, z)  d = DequantizeLinear<axis=2>(q, s, z)  t = Transpose<perm=[1,0,2]>(d)  y = MatMul(x, t)", {"w": floats(K, 3, N)} | S,
             form="QuantizeLinear -> DequantizeLinear -> Transpose -> MatMul", result=()),
]
# fmt: on


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in TABLE])
def test_spelling(row):
    x = activation(row.shape)
    done = assert_same_numbers(
        model(
            f"(float[{', '.join(map(str, row.shape))}] x) => (float[] y) {{ {row.nodes} }}",
            opset=row.opset,
            **row.tensors,
        ),
        {"x": x},
    )
    (site,) = done.report.sites
    assert (site.format, site.form) == (row.format, row.form)
    if row.result:
        assert tuple(n.op_type if n.domain != "msd" else "msd.MatMul" for n in done.model.graph.node) == row.result
    assert not {"w", "s", "z", "low", "high"} & {t.name for t in done.model.graph.initializer}


def test_half_precision():
    """Divided in float32; by channel onnxruntime 1.20 itself does not, so the specification alone is asked."""
    proto = model(
        f"(float16[3,40] x) => (float16[3,20] y) {{ {Q_DQ}  y = MatMul(x, d) }}",
        w=floats(K, N, floats="float16"),
        s=scales(N, floats="float16"),
        z=np.zeros(N, np.int8),
    )
    assert_same_numbers(proto, {"x": activation((3, K), "float16")}, tolerance=4e-4)


def test_a_constant_that_others_read_stays():
    proto = model(
        f"(float[3,40] x) => (float[3,20] y, float[40,20] v) {{ {Q_DQ}  y = MatMul(x, d)  v = Identity(w) }}", **W, **S
    )
    done = assert_same_numbers(proto, {"x": activation((3, K))})
    assert "w" in {t.name for t in done.model.graph.initializer}
    assert [n.op_type for n in done.model.graph.node] == ["MatMul", "Identity"]


def codes_of(proto):
    (site,) = find_sites(Linked.of(Source(proto, Path())), READERS, ())
    return site.found.weight.load().codes


SHAPES = {"": (), "axis=1": (N,), "axis=0": (K,), "axis=0, block_size=16": (3, N), "axis=1, block_size=8": (K, 3)}


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(("int8", "uint8")), st.sampled_from(tuple(SHAPES)), st.integers(0, 999), st.sampled_from((0, 1e-30, 0.01, 3e38)),
)  # fmt: skip
def test_the_codes_are_those_of_onnxruntime(kind, where, seed, size):
    """Bit for bit: halves between two codes, codes beyond the range, infinities, NaN, scales of zero and below it."""
    assume("block" not in where or RUNTIME >= (1, 22))  # earlier ones cast what is beyond the range of int32
    rng = np.random.default_rng(seed)
    s = np.asarray(rng.choice([0.25, 0.1, -0.3, 0, size], SHAPES[where])).astype(np.float32)
    z = np.asarray(rng.integers(0, 100, s.shape)).astype(kind)
    with np.errstate(over="ignore"):
        w = (rng.integers(-300, 300, (K, N)) * rng.choice([0.125, 0.05, size], (K, N))).astype(np.float32)
    w.flat[rng.integers(0, w.size, 8)] = rng.choice([np.inf, -np.inf, np.nan, -0.0], 8)
    attributes = f"<{where}>" if where else ""
    proto = model(
        f"(float[3,40] x) => (float[3,20] y, {kind}[40,20] q) {{ q = QuantizeLinear{attributes}(w, s, z) "
        f"d = DequantizeLinear(q, one, zero)  y = MatMul(x, d) }}",
        w=w, s=s, z=z, one=np.float32(1), zero=np.zeros((), kind),
    )  # fmt: skip
    expected = run(proto, {"x": activation((3, K))})["q"]
    found = codes_of(proto).astype(np.int16) - (128 if kind == "int8" else 0)
    np.testing.assert_array_equal(found, expected)


def test_a_large_constant_is_divided_in_parts(monkeypatch):
    import msd_compiler.passes.quantized_constant as module

    proto = model(f"(float[3,40] x) => (float[3,20] y) {{ {Q_DQ}  y = MatMul(x, d) }}", **W, **S)
    whole = codes_of(proto)
    monkeypatch.setattr(module, "_AT_ONCE", 70)
    np.testing.assert_array_equal(codes_of(proto), whole)


def test_the_codes_take_less_memory_than_the_floats(tmp_path):
    large = np.ones((2048, 4096), np.float32)
    proto = model(f"(float[3,2048] x) => (float[3,4096] y) {{ {Q_DQ}  y = MatMul(x, d) }}", w=large, **ONE)
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True)
    (site,) = find_sites(Linked.of(load(tmp_path / "m.onnx")), READERS, ())
    codes = site.found.weight.codes
    tracemalloc.start()
    codes.array()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert large.size < peak < large.nbytes


W8 = ReasonCode.WEIGHT_TYPE


@pytest.mark.parametrize(
    ("nodes", "tensors", "code", "words"),
    [
        (f"{Q_DQ}  y = MatMul(x, d)", W | {"s": scales(), "z": np.int16(0)}, W8, "its weight is quantized to int16"),
        (f"{Q_DQ}  y = MatMul(x, d)", W | {"s": scales(), "z": np.zeros((), ml_dtypes.float8_e4m3fn)}, W8, "its weight is quantized to float8e4m3fn"),
        (f"{Q_DQ}  y = MatMul(x, d)", {"w": np.ones((K, N), np.int32)} | ONE, W8, "weight 'w' of QuantizeLinear are int32"),
    ],
)  # fmt: skip
def test_reason(nodes, tensors, code, words):
    row = only_row(model(f"(float[3,40] x) => (float[3,20] y) {{ {nodes} }}", **tensors))
    assert (row.reason_code, words in row.reason) == (code, True), row.reason


@pytest.mark.parametrize(
    ("nodes", "tensors", "words"),
    [
        (Q_DQ, W | {"s": scales(7), "z": zeros("int8", 7)}, r"QuantizeLinear 'q': scales or zero points have shape \[7\], expected \[20\]"),
        (Q_DQ.replace("Linear(w", "Linear<axis=5>(w"), W | S, r"QuantizeLinear 'q' has axis 5 and blocks of 0"),
        (Q_DQ.replace("Linear(w", "Linear<output_dtype=2>(w"), W | S, r"zero points 'z' are int8, expected the output's type uint8"),
        ("q = QuantizeLinear(w, s, z)  c = Clip(q, low)  d = DequantizeLinear(c, s, z)", W | S | {"low": np.float32(0)}, r"Clip 'c': bound 'low' is float32\[\], expected one int8"),
        ("t = Transpose<perm=[0,0]>(w)  q = QuantizeLinear(t, s, z)  d = DequantizeLinear(q, s, z)", W | S, r"QuantizeLinear 'q': \[0, 0\] is no permutation of 2 dimensions"),
    ],
)  # fmt: skip
def test_malformed(nodes, tensors, words):
    with pytest.raises(msd_compiler.ModelError, match=words):
        msd_compiler.inspect(model(f"(float[3,40] x) => (float[3,20] y) {{ {nodes}  y = MatMul(x, d) }}", **tensors))


def test_constants_beside_the_model(tmp_path):
    proto = model(f"(float[3,40] x) => (float[3,20] y) {{ {Q_DQ}  y = MatMul(x, d) }}", **W, **S)
    expected = compiled(proto).model
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0)
    done = msd_compiler.compile(tmp_path / "m.onnx", tmp_path / "out.onnx")
    assert done.report.verification.passed
    tensors = [{t.name: t.raw_data for t in m.graph.initializer} for m in (done.model, expected)]
    assert tensors[0] == tensors[1]
