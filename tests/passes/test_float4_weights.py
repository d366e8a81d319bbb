"""Weights of FLOAT4E2M1, in every spelling, against what the bit patterns mean by the formats' definitions."""

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msd_compiler.passes import READERS
from msd_compiler.runtime_ops.matmul.layout import CODEBOOKS, Codebook, Plan
from onnx import TensorProto, helper, numpy_helper
from support import HALF_TOLERANCE, TOLERANCE, activation, model, needs_opset, ops, relative_l2, run

import msd_compiler
from msd_compiler.errors import ModelError
from msd_compiler.facts import QuantizedLinear, ReasonCode
from msd_compiler.linked import Linked
from msd_compiler.reader import find_sites
from msd_compiler.report import Method, Outcome
from msd_compiler.runtime import RuntimeRefused, session
from msd_compiler.source import Source

K, N = 100, 20

# --- the formats, by their definitions -------------------------------------------------------------------------------

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""By bit pattern."""


def e8m0_values(bits):
    return 2.0 ** (bits.astype(np.float64) - 127)


def e4m3_values(bits):
    exponent, mantissa = (bits >> 3) & 15, (bits & 7) / 8.0
    sign = np.where(bits & 128, -1.0, 1.0)
    return sign * np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent.astype(np.float64) - 7))


def float4(bits):
    """Two to a byte, the first in the low bits."""
    flat = np.append(bits.reshape(-1), np.zeros(bits.size % 2, np.uint8))
    return helper.make_tensor(
        "w", TensorProto.FLOAT4E2M1, bits.shape, (flat[::2] | flat[1::2] << 4).tobytes(), raw=True
    )


def of_bytes(data_type, bits):
    return helper.make_tensor("s", data_type, bits.shape, bits.tobytes(), raw=True)


def scale_of(kind, shape, seed=0):
    """Initializers of the scales, and their values."""
    rng = np.random.default_rng(seed)
    if kind == "e8m0":
        bits = rng.integers(118, 126, shape).astype(np.uint8)
        return {"s": of_bytes(TensorProto.FLOAT8E8M0, bits)}, e8m0_values(bits)
    if kind == "e4m3":
        bits = rng.integers(40, 126, shape).astype(np.uint8)
        whole = np.float32(0.0037)
        return {"s8": of_bytes(TensorProto.FLOAT8E4M3FN, bits), "g": whole}, e4m3_values(bits) * np.float64(whole)
    floats = np.asarray(rng.uniform(0.01, 0.1, shape)).astype(getattr(ml_dtypes, kind, None) or kind)
    return {"s": floats}, floats.astype(np.float64)


def spread(values, axis, block, shape):
    if block:
        return values.repeat(block, axis).take(np.arange(shape[axis]), axis)
    return (
        values.reshape([-1 if d == axis else 1 for d in range(len(shape))]) if values.size > 1 else values.reshape(())
    )


def patterns(shape, seed=1):
    return np.random.default_rng(seed).integers(0, 16, shape).astype(np.uint8)


# --- what is read ----------------------------------------------------------------------------------------------------


def fact_of(proto, folder=Path()):
    (site,) = find_sites(Linked.of(Source(proto, folder)), READERS, ())
    assert isinstance(site.found, QuantizedLinear), site.found
    return site.found


def values_of(weight):
    """``W[k, n]`` as `WeightData` says it, float64."""
    data = weight.load()
    block = weight.block_size or weight.k
    numbers = CODEBOOKS[weight.codebook][data.codes] if weight.codebook else data.codes
    assert data.codes.max(initial=0) < (15 if weight.codebook else 2**weight.bits)

    def by_step(values):
        return np.repeat(values.astype(np.float64), block if len(values) > 1 else weight.k, axis=0)[: weight.k]

    found = by_step(data.scales) * (numbers.astype(np.float64) - by_step(data.zero_points))
    return found if data.input_scales is None else found * data.input_scales.astype(np.float64)[:, None]


def assert_runs(proto, feed, expected, tolerance=TOLERANCE, **options):
    """onnxruntime refuses the model; its result runs with the library and without, within the tolerance; the rest is verified."""
    needs_opset(proto.opset_import[0].version)
    with pytest.raises(RuntimeRefused):
        session(proto.SerializeToString(), portable=True, log_severity_level=4)
    done = msd_compiler.compile(proto, terms=2, **options)
    assert done.report.verification.passed
    assert done.report.verification.method is Method.WHOLE
    for portable in (False, True):
        assert relative_l2(run(done.model, feed, portable=portable)["y"], expected) <= tolerance
    return done


SCALES = ("float32", "float16", "bfloat16", "e8m0", "e4m3")
FORMATS = {"e8m0": "mxfp4", "e4m3": "nvfp4"}


@pytest.mark.parametrize("transposed", [False, True], ids=["K x N", "N x K"])
@pytest.mark.parametrize("layout", ["()", "[1]", "N", "K", "16", "32", "48", "128", "-32"])
@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("opset", [23, 24, 25])
def test_spelling(opset, kind, layout, transposed):
    if kind == "e8m0" and opset == 23:
        pytest.skip("float8e8m0 scales came with opset 24")
    needs_opset(opset)
    shape = (N, K) if transposed else (K, N)
    along_k = 1 if transposed else 0
    block = abs(int(layout)) if layout.lstrip("-").isdigit() else 0
    axis = {"N": 1 - along_k}.get(layout, along_k)
    scales = {"()": (), "[1]": (1,), "N": (N,), "K": (K,)}.get(
        layout, tuple(-(-size // block) if block and d == axis else size for d, size in enumerate(shape))
    )
    bits = patterns(shape)
    stored, values = scale_of(kind, scales)
    weight = E2M1[bits] * spread(values, axis, block, shape)
    weight = weight.T if transposed else weight

    attributes = [f"axis={axis - 2 if layout.startswith('-') else axis}", *([f"block_size={block}"] if block else [])]
    attributes += ["output_dtype=1"] if kind not in ("float32", "e4m3") else []
    first = "s = DequantizeLinear(s8, g)  " if kind == "e4m3" else ""
    product = "t = Transpose<perm=[1,0]>(d)  y = MatMul(x, t)" if transposed else "y = MatMul(x, d)"
    proto = model(
        f"(float[3,{K}] x) => (float[3,{N}] y) {{ {first}d = DequantizeLinear<{', '.join(attributes)}>(w, s)  {product} }}",
        opset=opset,
        w=float4(bits),
        **stored,
    )
    fact = fact_of(proto)
    assert (fact.weight.bits, fact.weight.codebook) == (4, Codebook.E2M1)
    np.testing.assert_allclose(values_of(fact.weight), weight, rtol=1e-6)

    (row,) = msd_compiler.inspect(proto, terms=2).sites
    where = {"()": "per tensor", "[1]": "per tensor", "N": "per channel", "K": "per input", "128": "per channel"}
    assert row.format == f"{FORMATS.get(kind, 'fp4')} {where.get(layout, f'block {block}')}"
    assert row.form == f"DequantizeLinear{' -> Transpose' if transposed else ''} -> MatMul"
    assert (row.outcome, row.k, row.n) == (Outcome.REWRITTEN, K, N)
    if opset != 24 and layout != "32":
        return  # they differ in nothing that comes after
    x = activation((3, K))
    done = assert_runs(proto, {"x": x}, x.astype(np.float64) @ weight)
    assert not [
        t for t in done.model.graph.initializer if t.data_type in (TensorProto.FLOAT4E2M1, TensorProto.FLOAT8E8M0)
    ]


def block_scaled(kind="e8m0", nodes="d = DequantizeLinear<axis=0, block_size=32, output_dtype=1>(w, s)  y = MatMul(x, d)", *,
                 x="float[3,100] x", y="float[3,20] y", opset=24, shape=(K, N), **more):  # fmt: skip
    """A model with a weight ``[K, N]`` in blocks of 32, and that weight."""
    bits = patterns(shape)
    axis = 0 if shape == (K, N) else 1
    stored, values = scale_of(kind, tuple(-(-d // 32) if i == axis else d for i, d in enumerate(shape)))
    proto = model(f"({x}) => ({y}) {{ {nodes} }}", opset=opset, w=float4(bits), **stored, **more)
    return proto, E2M1[bits] * spread(values, axis, 32, shape)


DQ = "d = DequantizeLinear<axis=0, block_size=32, output_dtype=1>(w, s)"
DQ_T = "d = DequantizeLinear<axis=1, block_size=32, output_dtype=1>(w, s)"
CHAINS = {
    # nodes, whether the weight is stored as [N, K], ops of the result
    "Identity": (f"{DQ}  i = Identity(d)  y = MatMul(x, i)", False, ["msd.MatMul"]),
    "Reshape": (f"{DQ}  i = Reshape(d, to)  y = MatMul(x, i)", False, ["msd.MatMul"]),
    "Gemm": (f"{DQ}  y = Gemm<alpha=0.5>(x, d, b)", False, ["msd.MatMul"]),
    "Gemm, transB": (f"{DQ_T}  y = Gemm<transB=1>(x, d, b)", True, ["msd.MatMul"]),
    "MatMul, Add": (f"{DQ}  p = MatMul(x, d)  y = Add(p, b)", False, ["msd.MatMul"]),
    "trt": (DQ.replace("Deq", "trt.Deq") + "  y = MatMul(x, d)", False, ["msd.MatMul"]),
    "TRT_INT4": (DQ.replace("Deq", "trt.TRT_INT4Deq") + "  y = MatMul(x, d)", False, ["msd.MatMul"]),
    "scales cast": (f"c = Cast<to=1>(s)  {DQ.replace('(w, s)', '(w, c)')}  y = MatMul(x, d)", False, ["msd.MatMul"]),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chain(name):
    nodes, transposed, result = CHAINS[name]
    b = activation((N,), seed=5)
    more = {key: value for key, value in (("b", b), ("to", np.array([0, -1]))) if re.search(rf"\b{key}\)", nodes)}
    proto, weight = block_scaled(nodes=nodes, shape=(N, K) if transposed else (K, N), **more)
    if "trt." in nodes:
        proto.opset_import.add(domain="trt", version=1)
    x = activation((3, K))
    expected = (0.5 if "alpha" in nodes else 1) * (x @ (weight.T if transposed else weight)) + (b if "b" in more else 0)
    done = assert_runs(proto, {"x": x}, expected)
    assert ops(done.model) == result
    assert done.report.sites[0].format == "mxfp4 block 32"


@pytest.mark.parametrize("floats", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["e8m0", "e4m3"])
def test_casts_on_both_sides(kind, floats):
    """As modelopt writes NVFP4; its exporter also lists initializers as inputs."""
    to = helper.np_dtype_to_tensor_dtype(np.dtype(getattr(ml_dtypes, floats, None) or floats))
    first = "s = DequantizeLinear(s8, g)  " if kind == "e4m3" else ""
    nodes = f"{first}{DQ_T}  c = Cast<to={to}>(d)  t = Transpose<perm=[1,0]>(c)  h = Cast<to={to}>(x)  p = MatMul(h, t)  y = Cast<to=1>(p)"
    proto, weight = block_scaled(kind, nodes, shape=(N, K))
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    x = activation((3, K)).astype(getattr(ml_dtypes, floats, None) or floats).astype(np.float32)
    done = assert_runs(proto, {"x": x}, x @ weight.T, HALF_TOLERANCE[floats])
    assert ops(done.model) == ["Cast", "msd.MatMul", "Cast"]
    assert [i.name for i in done.model.graph.input] == ["x"]


def test_experts():
    bits, (stored, scales) = patterns((4, K, N)), scale_of("e8m0", (4, 4, N))
    proto = model(
        f"(float[4,3,{K}] x) => (float[4,3,{N}] y) {{ d = DequantizeLinear<axis=1, block_size=32, output_dtype=1>(w, s)  y = MatMul(x, d) }}",
        opset=24,
        w=float4(bits),
        **stored,
    )
    x = activation((4, 3, K))
    assert_runs(proto, {"x": x}, x @ (E2M1[bits] * spread(scales, 1, 32, (4, K, N))))


@pytest.mark.parametrize("layout", ["blocks", "N", "K"])
def test_zero_points(layout):
    """ONNX allows them: values of FLOAT4E2M1, taken from the codes before the scale."""
    bits, axis, block = patterns((K, N)), {"N": 1}.get(layout, 0), 32 if layout == "blocks" else 0
    shape = {"blocks": (4, N), "N": (N,), "K": (K,)}[layout]
    stored, scales = scale_of("float32", shape)
    zeros = patterns(shape, seed=7)
    size = ", block_size=32" if block else ""
    proto = model(
        f"(float[3,{K}] x) => (float[3,{N}] y) {{ d = DequantizeLinear<axis={axis}{size}>(w, s, z)  y = MatMul(x, d) }}",
        opset=23,
        w=float4(bits),
        z=float4(zeros),
        **stored,
    )
    weight = (E2M1[bits] - spread(E2M1[zeros], axis, block, (K, N))) * spread(scales, axis, block, (K, N))
    np.testing.assert_allclose(values_of(fact_of(proto).weight), weight, rtol=1e-6, atol=1e-9)
    x = activation((3, K))
    assert_runs(proto, {"x": x}, x @ weight)


@pytest.mark.parametrize("how", ["raw_data", "int32_data", "external"])
@pytest.mark.parametrize("k", [32, 33])
def test_storage(how, k, tmp_path):
    """An odd number of codes ends in half a byte."""
    bits, (stored, scales) = patterns((k, 1)), scale_of("e8m0", (-(-k // 32), 1))
    proto = model(
        f"(float[3,{k}] x) => (float[3,1] y) {{ {DQ}  y = MatMul(x, d) }}", opset=24, w=float4(bits), **stored
    )
    w = next(t for t in proto.graph.initializer if t.name == "w")
    packed = w.raw_data
    if how != "raw_data":
        w.ClearField("raw_data")
    if how == "int32_data":
        w.int32_data.extend(packed)
    elif how == "external":
        (tmp_path / "w.bin").write_bytes(b"\xff" * 64 + packed)
        w.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "w.bin"), ("offset", 64), ("length", len(packed))):
            w.external_data.add(key=key, value=str(value))
    onnx.save(proto, tmp_path / "model.onnx")
    fact = fact_of(proto, tmp_path)
    np.testing.assert_array_equal(values_of(fact.weight), E2M1[bits] * spread(scales, 0, 32, (k, 1)))
    needs_opset(24)
    done = msd_compiler.compile(tmp_path / "model.onnx", tmp_path / "out.onnx", terms=2)
    assert done.report.verification.method is Method.WHOLE


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 9),
    st.integers(4, 40),
    st.sampled_from(SCALES),
    st.booleans(),
    st.integers(0, 99),
)
def test_means(k, n, block, kind, turned, seed):
    shape, axis = ((n, k), 1) if turned else ((k, n), 0)
    bits = patterns(shape, seed)
    stored, scales = scale_of(kind, tuple(-(-d // block) if i == axis else d for i, d in enumerate(shape)), seed)
    first = "s = DequantizeLinear(s8, g)  " if kind == "e4m3" else ""
    gemm = f"y = Gemm<transB={int(turned)}>(x, d)"
    proto = model(
        f"(float[3,{k}] x) => (float[3,{n}] y) {{ {first}d = DequantizeLinear<axis={axis}, block_size={block}, output_dtype=1>(w, s)  {gemm} }}",
        opset=24,
        w=float4(bits),
        **stored,
    )
    weight = E2M1[bits] * spread(scales, axis, block, shape)
    np.testing.assert_allclose(values_of(fact_of(proto).weight), weight.T if turned else weight, rtol=1e-6)


def test_two_level_scales_of_integers():
    """Scales that are codes themselves serve codes of any type."""
    rng = np.random.default_rng(0)
    w, s8 = rng.integers(-8, 8, (K, N)).astype(ml_dtypes.int4), rng.integers(1, 100, (4, N)).astype(np.uint8)
    proto = model(
        f"(float[3,{K}] x) => (float[3,{N}] y) {{ s = DequantizeLinear(s8, g)  d = DequantizeLinear<axis=0, block_size=32>(w, s)  y = MatMul(x, d) }}",
        w=w,
        s8=s8,
        g=np.float32(0.003),
    )
    weight = w.astype(np.float64) * (s8 * np.float64(np.float32(0.003))).repeat(32, 0)[:K]
    np.testing.assert_allclose(values_of(fact_of(proto).weight), weight, rtol=1e-6)
    done = msd_compiler.compile(proto, terms=2)
    assert (done.report.sites[0].format, ops(done.model)) == ("int4 block 32", ["msd.MatMul"])


def test_e1m2():
    """int4 codes whose node says what they are: a name in the report, and nothing else."""
    rng = np.random.default_rng(0)
    tensors = {
        "w": rng.integers(-7, 8, (K, N)).astype(ml_dtypes.int4),
        "s": rng.uniform(0.01, 0.1, (4, N)).astype(np.float32) / 4,
    }
    proto = model(
        f"(float[3,{K}] x) => (float[3,{N}] y) {{ d = DequantizeLinear<axis=0, block_size=32>(w, s)  y = MatMul(x, d) }}",
        **tensors,
    )
    plain = msd_compiler.compile(proto, terms=2, verify=False)
    proto.graph.node[0].metadata_props.add(key="msd.format", value="e1m2")
    named = msd_compiler.compile(proto, terms=2, verify=False)
    assert (plain.report.sites[0].format, named.report.sites[0].format) == ("int4 block 32", "e1m2 block 32")
    x = activation((3, K))
    assert run(plain.model, {"x": x})["y"].tobytes() == run(named.model, {"x": x})["y"].tobytes()
    proto.graph.node[0].metadata_props[0].value = "e9m9"
    assert msd_compiler.inspect(proto).sites[0].format == "int4 block 32"


# --- scales at the ends of their range -------------------------------------------------------------------------------


def with_scale_bits(bits):
    proto, _ = block_scaled()
    s = next(t for t in proto.graph.initializer if t.name == "s")
    s.raw_data = bits.astype(np.uint8).tobytes()
    return proto


@pytest.mark.parametrize("code", [0, 1, 2, 127, 254])
def test_every_exponent(code):
    """2^-127 and 2^-126, halved, are below float32's normal numbers: such a block counts as zero, flushed or not."""
    bits = np.full((4, N), 120, np.uint8)
    bits[1] = code
    data = fact_of(with_scale_bits(bits)).weight.load()
    expected = np.where(bits < 2, 0, 2.0 ** (bits.astype(np.float64) - 128))
    np.testing.assert_array_equal(data.scales, expected)


def test_zero_block_of_smallest_scale():
    """What quantizers write for a block of zeros."""
    bits = np.full((4, N), 120, np.uint8)
    bits[2] = 0
    proto = with_scale_bits(bits)
    w = next(t for t in proto.graph.initializer if t.name == "w")
    patterns_ = patterns((K, N))
    patterns_[64:96] = 0
    w.CopyFrom(float4(patterns_))
    x = activation((3, K))
    assert_runs(proto, {"x": x}, x @ (E2M1[patterns_] * spread(e8m0_values(bits), 0, 32, (K, N))))


# --- bad input -------------------------------------------------------------------------------------------------------


def test_nan_scale():
    bits = np.full((4, N), 120, np.uint8)
    bits[3, 7] = 255
    with pytest.raises(ModelError, match=r"scales 's': 1 of 80 scales are NaN or Inf"):
        msd_compiler.compile(with_scale_bits(bits))


def test_nan_scale_of_two_levels():
    first = "s = DequantizeLinear(s8, g)  "
    proto, _ = block_scaled("e4m3", first + DQ + "  y = MatMul(x, d)")
    s8 = next(t for t in proto.graph.initializer if t.name == "s8")
    s8.raw_data = b"\x7f" + s8.raw_data[1:]
    with pytest.raises(ModelError, match=r"scales 's8': 1 of 80 scales are NaN or Inf"):
        msd_compiler.compile(proto)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((3, N), r"scales 's' have shape \[3, 20\], expected \[4, 20\] \(blocks of 32 on axis 0\)"),
        ((4, N + 1), r"expected \[4, 20\]"),
        ((4 * N,), r"expected \[4, 20\]"),
        ((), r"expected \[4, 20\]"),
    ],
)
def test_scales_of_wrong_shape(shape, words):
    proto, _ = block_scaled()
    s = next(t for t in proto.graph.initializer if t.name == "s")
    s.CopyFrom(of_bytes(TensorProto.FLOAT8E8M0, np.full(shape, 120, np.uint8)))
    with pytest.raises(ModelError, match=words):
        msd_compiler.compile(proto)


def test_scales_of_scales_of_wrong_shape():
    nodes = f"s = DequantizeLinear(s8, g)  {DQ}  y = MatMul(x, d)"
    proto, _ = block_scaled("e4m3", nodes)
    g = next(t for t in proto.graph.initializer if t.name == "g")
    g.CopyFrom(numpy_helper.from_array(np.ones(7, np.float32), "g"))
    with pytest.raises(ModelError, match=r"scales 's8' have shape .* do not fit"):
        msd_compiler.compile(proto)


def test_no_output_type():
    proto, _ = block_scaled(nodes="d = DequantizeLinear<axis=0, block_size=32>(w, s)  y = MatMul(x, d)")
    with pytest.raises(ModelError, match="scales 's' are float8e8m0, and it has no output_dtype"):
        msd_compiler.compile(proto)


def test_too_few_bytes():
    proto, _ = block_scaled()
    w = next(t for t in proto.graph.initializer if t.name == "w")
    w.raw_data = w.raw_data[:-1]
    with pytest.raises(ModelError, match=r"tensor 'w' .float4e2m1"):
        msd_compiler.compile(proto)


# --- what is left ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["e8m0", "e4m3", "float16"])
@pytest.mark.parametrize("opset", [24, 25])
def test_what_no_rewrite_takes_runs(kind, opset):
    """A table that is looked up, and a layer that is kept, become int8 codes in the result."""
    needs_opset(opset)
    first = "s = DequantizeLinear(s8, g)  " if kind == "e4m3" else ""
    nodes = f"{first}{DQ}  e = Gather(d, i)  y = Add(e, p)  z = MatMul(x, d)"
    proto, weight = block_scaled(
        kind, nodes, x="float[3,100] x, int64[3] i, float[20] p", y="float[3,20] y, float[3,20] z", opset=opset
    )
    proto.graph.node[-1].name = "layer"
    x, p = activation((3, K)), activation((N,))
    feed = {"x": x, "i": np.array([3, 0, 99]), "p": p}
    for overrides in ((), ("layer=keep",)):
        done = msd_compiler.compile(proto, terms=2, overrides=overrides)
        if overrides:  # nothing is rewritten: a copy
            assert not done.changed
            continue
        assert [s.outcome for s in done.report.sites] == [Outcome.KEPT, Outcome.REWRITTEN]
        assert done.report.sites[0].reason_code is ReasonCode.EMBEDDING
        for portable in (False, True):
            found = run(done.model, feed, portable=portable)
            assert relative_l2(found["y"], weight[[3, 0, 99]] + p) < 1e-6
            assert relative_l2(found["z"], x @ weight) <= TOLERANCE


def test_kept_layer_runs():
    needs_opset(24)
    nodes = f"{DQ}  y = MatMul(x, d)  z = MatMul(x, d)"
    proto, weight = block_scaled(nodes=nodes, y="float[3,20] y, float[3,20] z")
    proto.graph.node[1].name, proto.graph.node[2].name = "one", "other"
    done = msd_compiler.compile(proto, terms=2, overrides=("one=keep", "other=2"))
    x = activation((3, K))
    assert ops(done.model) == ["DequantizeLinear", "MatMul", "msd.MatMul"]
    found = run(done.model, {"x": x})
    assert relative_l2(found["z"], x @ weight) <= TOLERANCE
    assert relative_l2(found["y"], x @ weight) <= 1e-6  # and no session rounds its activations


def test_report_says_that_today_refuses():
    needs_opset(24)
    proto, _ = block_scaled()
    done = msd_compiler.compile(proto)
    verification = done.report.verification
    assert "refuses the source as it is" in verification.note
    assert "DequantizeLinear" in verification.note
    assert verification.outputs[0].baseline_relative_l2 is None
    again = msd_compiler.verify(proto, done.model)
    assert again.passed
    assert again.outputs[0].relative_l2 == verification.outputs[0].relative_l2


# --- activations that are codes --------------------------------------------------------------------------------------


def test_activation_given_as_codes():
    """msd.MatMulIntegerToFloat knows no codebook: the numbers go there as 8-bit codes."""
    nodes = f"q = QuantizeLinear(x, xs, xz)  f = DequantizeLinear(q, xs, xz)  {DQ}  y = MatMul(f, d)"
    xs, xz = np.float32(0.03), np.uint8(120)
    proto, weight = block_scaled(nodes=nodes, xs=xs, xz=xz)
    x = activation((3, K))
    codes = np.clip(np.rint(x / xs) + 120, 0, 255) - 120
    done = assert_runs(proto, {"x": x}, (codes * np.float64(xs)) @ weight, 1e-6)
    assert "msd.MatMulIntegerToFloat" in ops(done.model)


NVFP4_ROUNDING = """q, t = trt.TRT_FP4DynamicQuantize<axis=-1, block_size=16, scale_type=17>(x, xg)
    u = DequantizeLinear(t, xg)  f = DequantizeLinear<axis=-1, block_size=16>(q, u)"""
MXFP8_ROUNDING = (
    "q, t = trt.TRT_MXFP8DynamicQuantize<axis=-1, block_size=32>(x)  f = trt.TRT_MXFP8DequantizeLinear(q, t)"
)


FP8_ROUNDING = "q = trt.TRT_FP8QuantizeLinear(x, xg)  f = trt.TRT_FP8DequantizeLinear(q, xg)"


@pytest.mark.parametrize(
    ("rounding", "kind"),
    [(NVFP4_ROUNDING, "float4e2m1"), (MXFP8_ROUNDING, "float8e4m3fn"), (FP8_ROUNDING, "float8e4m3fn")],
    ids=["NVFP4", "MXFP8", "FP8"],
)
def test_activation_rounded_by_tensorrt(rounding, kind):
    more = {"xg": np.float32(0.01)} if "xg" in rounding else {}
    proto, weight = block_scaled(nodes=f"{rounding}  {DQ}  y = MatMul(f, d)", **more)
    proto.opset_import.add(domain="trt", version=1)
    (row,) = msd_compiler.inspect(proto).sites
    assert row.reason_code is ReasonCode.ACTIVATION_QUANTIZED
    assert f"of type {kind}; 8 or 16 bits are needed, or --activations upgrade" in row.reason

    needs_opset(24)
    done = msd_compiler.compile(proto, terms=2, activations="upgrade")
    assert done.report.sites[0].reason_code is ReasonCode.ACTIVATION_UPGRADED
    assert done.report.verification.method is Method.WHOLE
    assert ops(done.model) == ["msd.MatMul"]
    x = activation((3, K))
    for portable in (False, True):
        assert relative_l2(run(done.model, {"x": x}, portable=portable)["y"], x @ weight) <= TOLERANCE


def test_plan_says_the_codebook():
    proto, _ = block_scaled()
    done = msd_compiler.compile(proto, terms=2, verify=False)
    (node,) = done.model.graph.node
    plan = next(t for t in done.model.graph.initializer if t.name == node.input[-1])
    assert Plan.of(numpy_helper.to_array(plan)) == Plan(K, 4, 32, 2, False, codebook=Codebook.E2M1)
