"""Models as ONNX text and arrays, and what they mean in float64, written from the ONNX specification alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

import msd_compiler
from msd_compiler.compare import relative_l2
from msd_compiler.report import Outcome, SiteRow
from msd_compiler.runtime import RuntimeRefused, session

Arrays = Mapping[str, np.ndarray | TensorProto]

TOLERANCE = 1e-4
"""Two terms keep 16 bits of the activation: 4e-5 at a crest of 4, and every integer sum is exact."""

HALF_TOLERANCE = {"float32": TOLERANCE, "float16": 4e-4, "bfloat16": 3e-3}
"""The result's own rounding: 2^-12 and 2^-9 relative at most, once."""

PARSER_TYPES = {"float32": "float", "float16": "float16", "bfloat16": "bfloat16"}


# --- building ------------------------------------------------------------------------------------------------------


def model(graph: str, *, opset: int = 21, ir: int = 10, **tensors: np.ndarray | TensorProto) -> onnx.ModelProto:
    """A model from its graph's text, ``(float[M, 4] x) => (float[M, 4] y) { y = Relu(x) }``, and its initializers."""
    header = f'<ir_version: {ir}, opset_import: ["" : {opset}, "com.microsoft" : 1]> g '
    proto = parser.parse_model(header + graph)
    proto.graph.initializer.extend(initializer(name, value) for name, value in tensors.items())
    return proto


def initializer(name: str, value: np.ndarray | TensorProto) -> TensorProto:
    tensor = value if isinstance(value, TensorProto) else numpy_helper.from_array(np.asarray(value))
    named = TensorProto()
    named.CopyFrom(tensor)
    named.name = name
    return named


def dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def code_range(kind: str) -> tuple[int, int]:
    """``int4`` -> (-8, 7)."""
    bits = int(kind.lstrip("uint"))
    return (0, 2**bits - 1) if kind.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def weight(
    kind: str,
    shape: tuple[int, ...],
    scales: tuple[int, ...] = (),
    zeros: bool = False,
    *,
    floats: str = "float32",
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Codes ``w``, scales ``s`` and perhaps zero points ``z`` of a DequantizeLinear, random over their whole range."""
    rng = np.random.default_rng(seed)
    low, high = code_range(kind)
    made = {
        "w": rng.integers(low, high + 1, shape).astype(dtype(kind)),
        "s": np.asarray(rng.uniform(0.01, 0.1, scales)).astype(dtype(floats)),
    }
    if zeros:
        made["z"] = np.asarray(rng.integers(low, high + 1, scales)).astype(dtype(kind))
    return made


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of the last axis as bytes, the first code in the lowest bits, the last byte filled with zero bits."""
    planes = np.unpackbits(codes.astype(np.uint8)[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(planes.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def nbits_weight(
    k: int,
    n: int,
    block: int,
    bits: int = 4,
    zeros: str | None = None,
    *,
    floats: str = "float32",
    flat: bool = False,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Inputs ``b``, ``s`` and perhaps ``z`` of a MatMulNBits; ``zeros`` is None, ``packed`` or a float type."""
    rng = np.random.default_rng(seed)
    blocks = -(-k // block)
    made = {
        "b": pack_bits(rng.integers(0, 2**bits, (n, blocks, block)), bits),
        "s": rng.uniform(0.01, 0.1, (n, blocks)).astype(dtype(floats)),
    }
    if zeros == "packed":
        made["z"] = pack_bits(rng.integers(0, 2**bits, (n, blocks)), bits)
    elif zeros:
        made["z"] = rng.uniform(0, 2**bits - 1, (n, blocks)).astype(dtype(zeros))
    return {name: value.reshape(-1) if flat and name != "b" else value for name, value in made.items()}


def activation(shape: tuple[int, ...], floats: str = "float32", seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype(floats))


def declare_outputs(proto: onnx.ModelProto, feed: Arrays) -> onnx.ModelProto:
    """The model, its outputs of the shape that they have for ``feed``."""
    found = meaning(proto, feed)
    for output in proto.graph.output:
        output.CopyFrom(
            helper.make_tensor_value_info(output.name, output.type.tensor_type.elem_type, np.shape(found[output.name]))
        )
    return proto


# --- meaning -------------------------------------------------------------------------------------------------------


def meaning(proto: onnx.ModelProto, feed: Arrays) -> dict[str, np.ndarray]:
    """All tensors of the main graph in float64, nothing rounded on the way."""
    known = {name: _exact(value) for name, value in feed.items()}
    return _evaluate(proto.graph, known)


def _exact(value: np.ndarray | TensorProto) -> np.ndarray:
    array = numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)
    name = array.dtype.name
    if name == "bool":
        return array
    return array.astype(np.float64 if "float" in name else np.int64)


def _evaluate(graph: onnx.GraphProto, outer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    values = dict(outer)
    types = {t.name: t.data_type for t in graph.initializer}
    values.update((t.name, _exact(t)) for t in graph.initializer if t.name not in outer or t.name not in values)
    for node in graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "If":
            branch = attributes["then_branch" if values[node.input[0]] else "else_branch"]
            inside = _evaluate(branch, values)
            values.update(zip(node.output, [inside[o.name] for o in branch.output], strict=True))
        elif node.op_type == "Loop":
            body = attributes["body"]
            carried = [values[name] for name in node.input[2:]]
            for i in range(int(values[node.input[0]])):
                start = dict(zip([v.name for v in body.input], [np.array(i), np.array(True), *carried], strict=True))
                inside = _evaluate(body, values | start)
                carried = [inside[o.name] for o in body.output[1:]]
            values.update(zip(node.output, carried, strict=True))
        else:
            inputs = [values[name] if name else None for name in node.input]
            if node.op_type == "QuantizeLinear" and len(inputs) == 3:
                attributes["output_dtype"] = types[node.input[2]]
            if node.op_type == "QLinearMatMul":
                attributes["output_dtype"] = types[node.input[7]]
            made = _OPS[node.op_type](*inputs, **attributes)
            values.update(zip(node.output, made if isinstance(made, tuple) else (made,), strict=False))
    return values


def _constant(
    value: TensorProto | None = None, value_float: float = 0, value_ints: Any = None, value_floats: Any = None
):
    if value is not None:
        return _exact(value)
    return _exact(np.array(next(v for v in (value_ints, value_floats, value_float) if v is not None)))


def dequantize(w, s, z=None, *, axis=1, block_size=0, output_dtype=0):
    """ONNX DequantizeLinear: (w - z) * s, s and z per tensor, along an axis, or repeated over blocks of it."""

    def spread(v):
        if block_size:
            return np.repeat(v, block_size, axis).take(np.arange(w.shape[axis]), axis)
        if v.size == 1:
            return v.reshape(())
        return v.reshape([-1 if d == axis % w.ndim else 1 for d in range(w.ndim)])

    return (w - (0 if z is None else spread(z))) * spread(s)


def quantize(x, s, z=0, *, axis=1, block_size=0, output_dtype=TensorProto.UINT8):
    """ONNX QuantizeLinear: saturate(round(x / s) + z), divided in float32, ties to even."""
    low, high = code_range(TensorProto.DataType.Name(output_dtype).lower())
    scales = dequantize(np.ones_like(x), s, axis=axis, block_size=block_size)
    zeros = -dequantize(np.zeros_like(x), np.ones_like(s), np.asarray(z), axis=axis, block_size=block_size)
    return np.clip(np.rint(np.float32(x) / np.float32(scales)) + zeros, low, high).astype(np.int64)


def dynamic_quantize(x):
    """ONNX DynamicQuantizeLinear, in float32: codes, scale, zero point."""
    x = np.float32(x)
    low, high = np.minimum(x.min(), np.float32(0)), np.maximum(x.max(), np.float32(0))
    scale = (high - low) / np.float32(255)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.int64), np.float64(scale), np.int64(zero)


def matmul_integer(a, b, az=0, bz=0):
    """ONNX MatMulInteger: zero points of one value, or of b one per column."""
    return (a - az) @ (b - bz)


def _qgemm(a, a_s, az, b, b_s, bz, c=0, y_s=None, yz=None, *, alpha=1.0, transA=0, transB=0):
    b = b.T if transB else b
    product = matmul_integer(a.T if transA else a, b, az, bz)
    return alpha * a_s * b_s * (product + c)


def _qlinear_matmul(a, a_s, az, b, b_s, bz, y_s, yz, *, output_dtype):
    return quantize(matmul_integer(a, b, az, bz) * a_s * b_s, y_s, yz, output_dtype=output_dtype)


def _dynamic_quantize_matmul(x, b, b_s, bz=None, bias=None):
    codes, scale, zero = dynamic_quantize(x)
    return matmul_integer(codes, b, zero, 0 if bz is None else bz) * scale * b_s + (0 if bias is None else bias)


def _matmul_integer_to_float(a, b, a_s, b_s, az=None, bz=None, bias=None):
    product = matmul_integer(a, b, 0 if az is None else az, 0 if bz is None else bz)
    return product * a_s * b_s + (0 if bias is None else bias)


def _clip(x, low=None, high=None):
    x = x if low is None else np.maximum(x, low)
    return x if high is None else np.minimum(x, high)


def dequantize_nbits(b, s, z=None, *, K, N, bits=4, block_size, **_):
    """onnxruntime's MatMulNBits: the weight ``[K, N]``, one row of bytes per column and block."""
    blocks = -(-K // block_size)

    def codes(packed, count):
        planes = np.unpackbits(packed.astype(np.uint8).reshape(N, -1), axis=1, bitorder="little")
        return np.array([[sum(int(p) << i for i, p in enumerate(row[j * bits : (j + 1) * bits])) for j in range(count)]
                         for row in planes])  # fmt: skip

    if z is None:
        z = np.full((N, blocks), 2 ** (bits - 1))
    elif z.dtype.kind == "i":  # `meaning` widens integers to int64 and floats to float64
        z = codes(z, blocks)
    w = np.empty((K, N))
    q = codes(b, blocks * block_size)
    z, s = z.reshape(N, blocks), s.reshape(N, blocks)
    for n in range(N):
        for k in range(K):
            w[k, n] = (q[n, k] - z[n, k // block_size]) * s[n, k // block_size]
    return w


def _gemm(a, b, c=None, *, alpha=1.0, beta=1.0, transA=0, transB=0):
    y = alpha * ((a.T if transA else a) @ (b.T if transB else b))
    return y if c is None else y + beta * c


def _reshape(x, shape, allowzero=0):
    return x.reshape([x.shape[i] if d == 0 and not allowzero else d for i, d in enumerate(shape)])


def _matmul_nbits(x, b, s, z=None, g_idx=None, bias=None, **attributes):
    return x @ dequantize_nbits(b, s, z, **attributes) + (0 if bias is None else bias)


_OPS = {
    "Constant": _constant,
    "DequantizeLinear": dequantize,
    "QuantizeLinear": quantize,
    "DynamicQuantizeLinear": dynamic_quantize,
    "MatMulInteger": matmul_integer,
    "QLinearMatMul": _qlinear_matmul,
    "QGemm": _qgemm,
    "DynamicQuantizeMatMul": _dynamic_quantize_matmul,
    "MatMulIntegerToFloat": _matmul_integer_to_float,
    "Clip": _clip,
    "Cast": lambda x, to: x,  # activations are made so that none rounds
    "Identity": lambda x: x,
    "Reshape": _reshape,
    "Transpose": lambda x, perm=None: np.transpose(x, perm),
    "Gather": lambda x, indices, axis=0: np.take(x, indices, axis),
    "MatMul": np.matmul,
    "Gemm": _gemm,
    "MatMulNBits": _matmul_nbits,
    "Add": np.add,
    "Mul": np.multiply,
    "Neg": np.negative,
    "Relu": lambda x: np.maximum(x, 0),
    "Squeeze": lambda x, axes=None: np.squeeze(x, None if axes is None else tuple(axes)),
}


# --- running -------------------------------------------------------------------------------------------------------


@cache
def runs_opset(opset: int) -> bool:
    relu = model("(float[2] x) => (float[2] y) { y = Relu(x) }", opset=opset)
    try:
        session(relu.SerializeToString(), portable=True, log_severity_level=4)
    except RuntimeRefused:
        return False
    return True


def needs_opset(opset: int) -> None:
    """Skip the test where the runtime does not know the opset."""
    if not runs_opset(opset):
        pytest.skip(f"this onnxruntime does not run opset {opset}")


def run(proto: onnx.ModelProto, feed: Arrays, *, portable: bool = False) -> dict[str, np.ndarray]:
    """All outputs, in one thread and without a word."""
    opened = session(proto.SerializeToString(), portable=portable, log_severity_level=4, intra_op_num_threads=1)
    names = [o.name for o in opened.get_outputs()]
    return dict(zip(names, opened.run(names, dict(feed)), strict=True))


def compiled(proto: onnx.ModelProto, **options: Any) -> msd_compiler.Compiled:
    """The model compiled with two terms; the source stays as it was, and a second compilation changes nothing."""
    before = proto.SerializeToString(deterministic=True)
    done = msd_compiler.compile(proto, verify=False, **{"terms": 2, **options})
    assert proto.SerializeToString(deterministic=True) == before
    again = msd_compiler.compile(done.model, verify=False)
    assert again.model == done.model
    return done


def rows(proto: onnx.ModelProto) -> list[SiteRow]:
    return compiled(proto).report.sites


def only_row(proto: onnx.ModelProto) -> SiteRow:
    (row,) = rows(proto)
    return row


def ops(proto: onnx.ModelProto) -> list[str]:
    """Op types of the main graph in order, ours with their domain."""
    return [f"{n.domain}.{n.op_type}" if n.domain == "msd" else n.op_type for n in proto.graph.node]


def assert_same_numbers(
    proto: onnx.ModelProto, feed: Arrays, *, rewritten: int = 1, tolerance: float = TOLERANCE, **options: Any
) -> msd_compiler.Compiled:
    """Every site taken, and the result means what the source means: with our kernels and without, to the same bits."""
    done = compiled(proto, **options)
    assert [s.reason for s in done.report.sites if s.outcome is not Outcome.REWRITTEN] == []
    assert done.report.summary.rewritten == rewritten
    expected = meaning(proto, feed)
    native, portable = run(done.model, feed), run(done.model, feed, portable=True)
    for name, found in native.items():
        assert found.shape == np.shape(expected[name])
        assert found.tobytes() == portable[name].tobytes(), name
        assert relative_l2(found, expected[name]) <= tolerance, name
    return done
