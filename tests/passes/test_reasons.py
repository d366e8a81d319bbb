"""What is seen and not taken gets a row: a stable code and a reason in words, and the model stays as it is."""

from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import pytest
from support import model, nbits_weight, only_row, rows, weight

from msd_compiler.facts import ReasonCode
from msd_compiler.report import Outcome

K, N = 40, 20
INT8 = weight("int8", (K, N), (N,))
NBITS = nbits_weight(K, N, 16)
FLOAT = {"w": np.ones((K, N), np.float32)}


@dataclass(frozen=True)
class Kept:
    """A row: the graph from ``x`` to ``y``, the code, part of the reason, and what is known of the layer."""

    name: str
    code: ReasonCode
    words: str
    nodes: str
    tensors: dict = field(default_factory=dict)
    known: dict = field(default_factory=lambda: {"k": K, "n": N})
    inputs: str = "float[3,40] x"
    opset: int = 21


def nbits(inputs="x, b, s", bits=4, k=K):
    return f"y = com.microsoft.MatMulNBits<K={k}, N={N}, bits={bits}, block_size=16>({inputs})"


FLOAT_T = {"w": np.ones((N, K), np.float32)}
LOOKUP = "y = com.microsoft.GatherBlockQuantized<block_size=16, gather_axis=0, quantize_axis=1>(w, x, s)"
DQ = "d = DequantizeLinear(w, s)  y = MatMul(x, d)"
EXPERTS = weight("int8", (4, K, N), (N,))
IN_UINT8 = "q = QuantizeLinear(x, xs, xz)  "
Q = {"xs": np.float32(0.02), "xz": np.uint8(128)}
A, E, F, L, R, U, W, X = (
    ReasonCode.ACTIVATION_QUANTIZED, ReasonCode.EMBEDDING, ReasonCode.FLOAT_WEIGHT, ReasonCode.SCALE_LAYOUT,
    ReasonCode.RUNTIME_WEIGHT, ReasonCode.UNKNOWN_RANK, ReasonCode.WEIGHT_TYPE, ReasonCode.ALREADY_EXACT,
)  # fmt: skip

# fmt: off
TABLE = [
    Kept("MatMul", F, "its weight 'w' is float32, not quantized", "y = MatMul(x, w)", FLOAT),
    Kept("MatMul of rank 3", F, "its weight 'w' is float32, not quantized", "y = MatMul(x, w)", {"w": np.ones((4, K, N), np.float32)}),
    Kept("MatMul, Transpose", F, "its weight 'w' is float32, not quantized", "t = Transpose(w)  y = MatMul(x, t)", {"w": np.ones((N, K), np.float32)}),
    Kept("MatMul, Cast from float16", F, "its weight 'w' is float16, not quantized", "t = Cast<to=1>(w)  y = MatMul(x, t)", {"w": np.ones((K, N), np.float16)}, {"k": K, "n": N, "format": "float16"}),
    Kept("Gemm", F, "its weight 'w' is float32, not quantized", "y = Gemm(x, w)", FLOAT),
    Kept("Gemm transB, bias", F, "its weight 'w' is float32, not quantized", "y = Gemm<transB=1>(x, w, b)", {"w": np.ones((N, K), np.float32), "b": np.ones(N, np.float32)}),
    Kept("FusedMatMul", F, "its weight 'w' is float32, not quantized", "y = com.microsoft.FusedMatMul<alpha=0.5, transB=1>(x, w)", {"w": np.ones((N, K), np.float32)}),
    Kept("float on the left", F, "its weight 'w' is float32, not quantized", "y = MatMul(w, x)", {"w": np.ones((N, K), np.float32)}, inputs="float[40,3] x"),
    Kept("Gemm, float on the left", F, "its weight 'w' is float32, not quantized", "y = Gemm<transA=1>(w, x)", FLOAT, inputs="float[40,3] x"),
    Kept("double", F, "its weight 'w' is float64, not quantized", "y = MatMul(x, w)", {"w": np.ones((K, N))}, inputs="double[3,40] x"),

    Kept("input", R, "its weight 'w' is an input of the model, not stored in the file", "y = MatMul(x, w)", known={}, inputs="float[3,40] x, float[40,20] w"),
    Kept("dequantized input", R, "its weight 'w' is an input of the model", "d = DequantizeLinear(w, s)  y = MatMul(x, d)", {"s": INT8["s"]}, {}, "float[3,40] x, int8[40,20] w"),
    Kept("scales are an input", R, "its scales 's' are not stored in the file", DQ, {"w": INT8["w"]}, {}, "float[3,40] x, float[20] s"),
    Kept("scales are computed", R, "its scales 't' are not stored in the file", "t = Neg(s)  d = DequantizeLinear(w, t)  c = Transpose(d)  y = Gemm<transB=1>(x, c)", INT8, {}),
    Kept("zero points are an input", R, "its zero points 'z' are not stored in the file", "d = DequantizeLinear(w, s, z)  y = MatMul(x, d)", INT8, {}, "float[3,40] x, int8[20] z"),
    Kept("MatMulInteger by an input", R, "its weight 'w' is an input of the model", "q, qs, qz = DynamicQuantizeLinear(x)  i = MatMulInteger(q, w, qz)  y = Cast<to=1>(i)", known={}, inputs="float[3,40] x, int8[40,20] w"),
    *(Kept(f"MatMulNBits, {what} are an input", R, f"its {what} '{name}' are not stored in the file",
           nbits("x, b, s, z"), {k: v for k, v in nbits_weight(K, N, 16, zeros="packed").items() if k != name}, inputs=f"float[3,40] x, {shape} {name}")
      for what, name, shape in (("weight", "b", "uint8[20,3,8]"), ("scales", "s", "float[20,3]"), ("zero points", "z", "uint8[20,2]"))),
    Kept("MatMulNBits, bias is an input", R, "its bias 'c' is not stored in the file", nbits("x, b, s, , , c"), NBITS, inputs="float[3,40] x, float[20] c"),

    Kept("int32 codes", A, "gives its activation as codes (Cast 'q') of type int32; 8 or 16 bits are needed",
         "q = Cast<to=6>(x)  f = DequantizeLinear(q, xs)  " + DQ.replace("(x", "(f"), INT8 | Q, {"k": K, "n": N, "format": "int8 per channel"}),
    Kept("scale per channel", A, "whose scale 'xs' is not one value", "f = DequantizeLinear<axis=1>(x, xs)  " + DQ.replace("(x", "(f"),
         INT8 | {"xs": np.ones(K, np.float32)}, inputs="int8[3,40] x"),
    Kept("scale computed", A, "whose scale 'zs' is not one value", "zs = Abs(t)  q = QuantizeLinear(x, zs, xz)  f = DequantizeLinear(q, zs, xz)  " + DQ.replace("(x", "(f"),
         INT8 | Q, inputs="float[3,40] x, float[M] t"),
    Kept("codes, scales along K", A, "its weight has scales along K, or zero points that are no integers", IN_UINT8 + "f = DequantizeLinear(q, xs, xz)  d = DequantizeLinear<axis=0>(w, s)  y = MatMul(f, d)", weight("int8", (K, N), (K,)) | Q),
    Kept("codes, float zero points", A, "or zero points that are no integers", IN_UINT8 + "f = DequantizeLinear(q, xs, xz)  " + nbits("f, b, s, z"), nbits_weight(K, N, 16, zeros="float32") | Q),
    Kept("MatMulInteger to int32", A, "MatMulInteger takes its activation as integer codes, in a spelling that is not followed", "q, qs, qz = DynamicQuantizeLinear(x)  i = MatMulInteger(q, w, qz)  y = Cast<to=1>(i)", {"w": INT8["w"]}, {"k": K, "n": N, "format": "int8"}),
    Kept("MatMulInteger, uint8 by uint8", X, "uint8 by uint8: onnxruntime multiplies these codes exactly", "q, qs, qz = DynamicQuantizeLinear(x)  i = MatMulInteger(q, w, qz)  c = Cast<to=1>(i)  t = Mul(qs, s)  y = Mul(c, t)", weight("uint8", (K, N), (N,)), {"k": K, "n": N, "format": "uint8"}),
    Kept("DynamicQuantizeMatMul, uint8", X, "uint8 by uint8", "y = com.microsoft.DynamicQuantizeMatMul(x, w, s)", weight("uint8", (K, N), (N,))),
    Kept("QDQ, uint8 by uint8", X, "uint8 by uint8", IN_UINT8 + "f = DequantizeLinear(q, xs, xz)  " + DQ.replace("(x", "(f"), weight("uint8", (K, N), (N,)) | Q),

    *(Kept(f"opset {opset}, {name}", ReasonCode.OPSET_TOO_OLD, f"the model imports opset {opset}; msd.MatMul needs 11 or later", nodes, tensors, opset=opset)
      for opset in (9, 10) for name, nodes, tensors in (("MatMulNBits", nbits(), NBITS), ("com.microsoft", DQ.replace("Deq", "com.microsoft.Deq"), INT8))),
    Kept("opset 10, DequantizeLinear", ReasonCode.OPSET_TOO_OLD, "onnx.version_converter", DQ, weight("uint8", (K, N), ()), opset=10),

    Kept("int16", W, "weight 'w' is int16; int2, int4, int8, their unsigned forms and float4e2m1 are multiplied directly", DQ, {"w": np.ones((K, N), np.int16), "s": np.ones(N, np.float32)}, {}),
    Kept("int32", W, "weight 'w' is int32", DQ, {"w": np.ones((K, N), np.int32), "s": np.ones(N, np.float32)}, {}),
    Kept("float8", W, "weight 'w' is float8e4m3fn, which has no small-integer form; int2, int4", DQ, {"w": np.ones((K, N), ml_dtypes.float8_e4m3fn), "s": np.ones(N, np.float32)}, {}),
    *(Kept(f"{domain}.{op}", W, f"its weight comes from {domain}.{op} 'd': {why}; stored integers of 2, 4 or 8 bits and float4", f"{before}  d = {domain}.{op}(q, s)  t = Transpose(d)  y = MatMul(x, t)",
           FLOAT_T | {"s": np.ones(N, np.float32)}, {})
      for domain, op, why, before in (
          ("trt", "TRT_FP8DequantizeLinear", "its codes are float8, which has no small-integer form", "q = trt.TRT_FP8QuantizeLinear(w, s)"),
          ("trt", "TRT_MXFP8DequantizeLinear", "its codes are float8, which has no small-integer form", "q = trt.TRT_MXFP8DynamicQuantize(w)"),
          ("trt", "TRT_FP4DynamicQuantize", "it rounds to float4 as the model runs", "q = Identity(w)"),
          ("trt", "TRT_FP4QDQ", "it rounds to float4 as the model runs", "q = Identity(w)"),
          ("com.amd.quark", "ExtendedDequantizeLinear", "its codes may be of types that ONNX's own op does not have", "q = com.amd.quark.ExtendedQuantizeLinear(w, s)"),
          ("com.amd.quark", "BFPQuantizeDequantize", "it rounds to block floating point", "q = Identity(w)"),
          ("com.amd.quark", "MXQuantizeDequantize", "it rounds to a microscaling format", "q = Cast<to=1>(w)"),
      )),
    Kept("vendor's op on the left", W, "its weight comes from trt.TRT_FP8DequantizeLinear 'd'", "d = trt.TRT_FP8DequantizeLinear(w, s)  y = MatMul(d, x)", FLOAT_T | {"s": np.float32(1)}, {}, "float[40,3] x"),
    Kept("float4 that the model makes", W, "its weight is quantized to float4e2m1", "q = QuantizeLinear<axis=1, output_dtype=23>(w, s)  d = DequantizeLinear<axis=1>(q, s)  y = MatMul(x, d)", FLOAT | {"s": np.ones(N, np.float32)}, {}, opset=23),
    Kept("scales of float8", W, "scales 's' are float8e4m3fn; a float type or float8e8m0 is needed", "d = DequantizeLinear<axis=0, block_size=20, output_dtype=1>(w, s)  y = MatMul(x, d)",
         {"w": INT8["w"], "s": np.ones((2, N), ml_dtypes.float8_e4m3fn)}, {}, opset=23),
    Kept("scales that become integers", W, "scales 's' are int32; a float type or float8e8m0 is needed", "c = Cast<to=6>(s)  d = DequantizeLinear(w, c)  y = MatMul(x, d)", INT8, {}),
    Kept("float8, scales dequantized", W, "weight 'w' is float8e4m3fn, which has no small-integer form", "t = DequantizeLinear(s8, g)  d = DequantizeLinear<axis=0, block_size=20>(w, t)  y = MatMul(x, d)",
         {"w": np.ones((K, N), ml_dtypes.float8_e4m3fn), "s8": np.ones((2, N), ml_dtypes.float8_e4m3fn), "g": np.float32(1)}, {}, opset=23),
    Kept("MatMulNBits, 3 bits", W, "its weight has 3 bits; 2, 4 or 8 are multiplied directly", nbits(bits=3), NBITS),
    Kept("MatMulNBits, int32 codes", W, "its weight 'b' are int32; what is read is uint8", nbits(), NBITS | {"b": np.ones((N, 3, 2), np.int32)}),
    Kept("MatMulNBits, double scales", W, "its scales 's' are float64; what is read is bfloat16, float16, float32", nbits(), NBITS | {"s": np.ones((N, 3))}),
    Kept("MatMulNBits, int32 zero points", W, "its zero points 'z' are int32; what is read is bfloat16, float16, float32, uint8", nbits("x, b, s, z"), NBITS | {"z": np.ones((N, 2), np.int32)}),

    Kept("double", ReasonCode.ACTIVATION_TYPE, "the product is in float64; float32, float16 or bfloat16 is needed", "d = DequantizeLinear(w, s)  c = Cast<to=11>(d)  y = MatMul(x, c)", INT8, {}, "double[3,40] x"),

    Kept("blocks along N", L, "weight 'w' has blocks of 1 along K that differ between columns; 4 or more are needed",
         "d = DequantizeLinear<axis=1, block_size=5>(w, s)  y = MatMul(x, d)", weight("int4", (K, N), (K, 4)), {"k": K, "n": N, "format": "int4 block 1"}),
    Kept("blocks of 2", L, "weight 'w' has blocks of 2 along K", "d = DequantizeLinear<axis=0, block_size=2>(w, s)  y = MatMul(x, d)", weight("int4", (K, N), (20, N))),
    Kept("8-bit zero points along K", L, "weight 'w' has 8-bit codes with zero points that differ along K; they share no 8-bit range",
         "d = DequantizeLinear<axis=0>(w, s, z)  y = MatMul(x, d)", weight("int8", (K, N), (K,), True)),
    Kept("Reshape across a block", L, "its scales cannot be followed through Reshape 'flat': [20, 40] to [25, 32] cuts through a run of 20 that shares a scale",
         "d = DequantizeLinear(w, s)  t = Transpose(d)  [flat] r = Reshape(t, shape)  y = MatMul(x, r)", INT8 | {"shape": np.array([25, 32])}, {}, "float[3,25] x"),
    Kept("Reshape, last block incomplete", L, "its scales cannot be followed through Reshape 'r': its last block is incomplete",
         "d = DequantizeLinear<axis=0, block_size=16>(w, s)  r = Reshape(d, shape)  y = MatMul(x, r)", weight("int8", (K, N), (3, N)) | {"shape": np.array([1, K, N])}, {}),
    Kept("Reshape, too few elements", L, "[40, 20] has too few elements for [40, 20, 2]", "d = DequantizeLinear(w, s)  r = Reshape(d, shape)  y = MatMul(x, r)", INT8 | {"shape": np.array([K, N, 2])}, {}),
    Kept("Reshape, too many elements", L, "[40, 20] has too many elements for [40, 10]", "d = DequantizeLinear(w, s)  r = Reshape(d, shape)  y = MatMul(x, r)", INT8 | {"shape": np.array([K, 10])}, {}),
    Kept("Transpose that repeats", L, "Transpose 'r': [0, 0] is no permutation of 2 dimensions", "d = DequantizeLinear(w, s)  r = Transpose<perm=[0,0]>(d)  y = MatMul(x, r)", INT8, {}),
    Kept("Transpose of another rank", L, "Transpose 'r': [0, 2, 1] is no permutation of 2 dimensions", "d = DequantizeLinear(w, s)  r = Transpose<perm=[0,2,1]>(d)  y = MatMul(x, r)", INT8, {}),
    Kept("vector", L, "weight 'w' has rank 1, expected 2 or more", "d = DequantizeLinear(w, s)  y = MatMul(x, d)", weight("int8", (K,), ()), {}),
    Kept("empty", L, "weight 'w' is empty", "d = DequantizeLinear(w, s)  y = MatMul(x, d)", weight("int8", (K, 0), ()), {}),
    Kept("Gemm of rank 3", L, "Gemm takes matrices, its weight has rank 3", "d = DequantizeLinear<axis=2>(w, s)  y = Gemm(x, d)", EXPERTS, {}),
    Kept("other experts", L, "its weight holds [4] matrices; the activation 'x' of shape [3, 2, 40] does not pair with them",
         "d = DequantizeLinear<axis=2>(w, s)  y = MatMul(x, d)", EXPERTS, inputs="float[3,2,40] x"),
    Kept("experts by a symbol", L, "the activation 'x' of shape ['E', 2, 40] does not pair with them", "d = DequantizeLinear<axis=2>(w, s)  y = MatMul(x, d)", EXPERTS, inputs="float[E,2,40] x"),
    Kept("experts by a vector", L, "the activation 'x' of shape [40] does not pair with them", "d = DequantizeLinear<axis=2>(w, s)  y = MatMul(x, d)", EXPERTS, inputs="float[40] x"),
    Kept("blocks of experts", L, "weight 'w' has blocks across its 20 matrices, the last one incomplete",
         "d = DequantizeLinear<axis=0, block_size=16>(w, s)  y = MatMul(x, d)", weight("int8", (20, 1, N), (2, 1, N)), {}, "float[3,1] x"),
    Kept("rank 4", L, "its weight holds [2, 4] matrices", "d = DequantizeLinear<axis=3>(w, s)  y = MatMul(x, d)", weight("int8", (2, 4, K, N), (N,)), inputs="float[2,4,3,40] x"),

    Kept("on the left", U, "the rank of its activation 'x' is unknown, which a weight on the left needs", "d = DequantizeLinear<axis=0>(w, s)  y = MatMul(d, x)", weight("int8", (N, K), (N,)), inputs="float[] x"),
    Kept("rank 3", U, "the rank of its activation 'x' is unknown, which a weight of rank 3 needs", "d = DequantizeLinear<axis=2>(w, s)  y = MatMul(x, d)", EXPERTS, inputs="float[] x"),

    Kept("g_idx", ReasonCode.COLUMN_ORDER, "its columns are assigned to groups by 'g'", nbits("x, b, s, , g"), NBITS | {"g": np.arange(K, dtype=np.int32)[::-1] // 16}),
    Kept("g_idx is an input", ReasonCode.COLUMN_ORDER, "its columns are assigned to groups by 'g'", nbits("x, b, s, , g"), NBITS, inputs="float[3,40] x, int32[40] g"),

    *(Kept(f"{name}, {words}", E, "a lookup multiplies nothing: it reads the rows that it needs", nodes, tensors, {"kind": "embedding", "form": form, "k": None, "format": words}, inputs="int64[3] x")
      for name, form, nodes, tensors, words in (
          ("GatherBlockQuantized", "GatherBlockQuantized", LOOKUP, weight("int4", (K, 32), (K, 2)), "int4 block 16"),
          ("GatherBlockQuantized, zero points", "GatherBlockQuantized", LOOKUP.replace("s)", "s, z)"), weight("uint4", (K, 32), (K, 2), True), "uint4 block 16, zero points"),
          ("GatherBlockQuantized, bytes", "GatherBlockQuantized", LOOKUP.replace("<", "<bits=8,"), weight("uint8", (K, 32), (K, 2)), "int8 block 16"),
          ("GatherBlockQuantized, Reshape", "GatherBlockQuantized", "r = Reshape(w, shape)  " + LOOKUP.replace("(w", "(r"), weight("uint8", (K, 2, 8), (K, 2)) | {"shape": np.array([K, 16])}, "int4 block 16"),
          ("Gather", "Gather", "d = DequantizeLinear(w, s)  y = Gather(d, x)", INT8, "int8 per channel"),
          ("Gather, Cast", "Gather", "d = DequantizeLinear(w, s, z)  c = Cast<to=10>(d)  y = Gather(c, x)", weight("uint8", (K, N), (), True), "uint8 per tensor, zero points"),
          ("Gather of codes", "DequantizeLinear", "g = Gather(w, x)  y = DequantizeLinear(g, s)", weight("int8", (K, N), ()), "int8 per tensor"),
          ("Gather of codes and scales", "DequantizeLinear", "g = Gather(w, x)  t = Gather(s, x)  y = DequantizeLinear<axis=0>(g, t)", weight("int8", (K, N), (K,)), "int8 per channel"),
      )),
    Kept("MatMulBnb4", ReasonCode.FUSED_OP, "MatMulBnb4: its codes (bitsandbytes FP4/NF4) are no small integers", "y = com.microsoft.MatMulBnb4<K=40, N=20, block_size=16, quant_type=1>(x, b, s)", {"b": np.ones(400, np.uint8), "s": np.ones(50, np.float32)}, {}),
    Kept("QMoE", ReasonCode.FUSED_OP, "QMoE: mixture-of-experts layers are not taken apart", "y = com.microsoft.QMoE(x, r, b, s, , b, s)", {"r": np.ones((3, 4), np.float32), "b": np.ones((4, 20, 20), np.uint8), "s": np.ones((4, 40), np.float32)}, {}),
    Kept("MatMulFpQ4", ReasonCode.FUSED_OP, "MatMulFpQ4: its block format predates MatMulNBits", "y = com.microsoft.MatMulFpQ4(x, b, s)", {"b": np.ones(400, np.uint8), "s": np.array([K, N])}, {}),
    Kept("FusedMatMul", ReasonCode.FUSED_OP, "FusedMatMul: its own transpositions and factor are not read", "d = DequantizeLinear(w, s)  y = com.microsoft.FusedMatMul<alpha=0.5>(x, d)", INT8, {}),
    Kept("DynamicQuantizeLSTM", ReasonCode.FUSED_OP, "DynamicQuantizeLSTM: recurrent layers are not taken apart", "y = com.microsoft.DynamicQuantizeLSTM<hidden_size=5>(x, w, w, , , , , , s, s, s, s)", INT8, {}),
]

NO_SITE = {
    "two activations": ("y = MatMul(x, x)", {}, "float[4,4] x"),
    "two dequantized activations": ("q = QuantizeLinear(x, xs, xz)  f = DequantizeLinear(q, xs, xz)  t = Transpose(f)  y = MatMul(f, t)", Q, "float[4,4] x"),
    "MatMulInteger of two activations": ("q = QuantizeLinear(x, xs, xz)  t = Transpose(q)  i = MatMulInteger(q, t)  y = Cast<to=1>(i)", Q, "float[4,4] x"),
    "a table of positions": ("t = Reshape(w, shape)  y = MatMul(x, t)", FLOAT | {"shape": np.array([1, K, N])}, "float[3,40] x"),
    "a vector": ("y = MatMul(x, w)", {"w": np.ones(K, np.float32)}, "float[3,40] x"),
    "a column": ("y = MatMul(x, w)", {"w": np.ones((K, 1), np.float32)}, "float[3,40] x"),
    "integers": ("y = MatMul(x, w)", {"w": np.ones((K, N), np.int32)}, "int32[3,40] x"),
    "two constants": ("c = MatMul(w, v)  y = Add(x, c)", {"v": np.ones((3, K), np.float32), "w": np.ones((K, N), np.float32)}, "float[3,20] x"),
    "float embedding": ("y = Gather(w, x)", FLOAT, "int64[3] x"),
    "a lookup of one number each": ("d = DequantizeLinear(w, s)  y = Gather(d, x)", weight("int8", (K,), ()), "int64[3] x"),
    "two activations that an op of a vendor codes": ("f = trt.TRT_FP8DequantizeLinear(x, s)  y = MatMul(f, f)", {"s": np.float32(1)}, "float[4,4] x"),
    "convolution": ("d = DequantizeLinear<axis=0>(w, s)  y = Conv(x, d)", weight("int8", (4, 3, 2, 2), (4,)), "float[1,3,8,8] x"),
    "another op of that name": ("y = my.MatMulNBits<K=40, N=20, bits=4, block_size=16>(x, b, s)", NBITS, "float[3,40] x"),
    "another MatMul": ("d = DequantizeLinear(w, s)  y = my.MatMul(x, d)", INT8, "float[3,40] x"),
}
# fmt: on


def source(row):
    scalar = "double" if "double" in row.inputs else "float"
    proto = model(f"({row.inputs}) => ({scalar}[] y) {{ {row.nodes} }}", opset=row.opset, **row.tensors)
    for domain in ("trt", "com.amd.quark"):
        if f"{domain}." in row.nodes:
            proto.opset_import.add(domain=domain, version=1)
    return proto


@pytest.mark.parametrize("row", [pytest.param(row, id=f"{row.code}: {row.name}") for row in TABLE])
def test_reason(row):
    found = only_row(source(row))
    assert (found.reason_code, row.words in found.reason) == (row.code, True), found.reason
    assert {name: getattr(found, name) for name in row.known} == row.known
    kept = {A, E, F, R, X, ReasonCode.OPSET_TOO_OLD}
    assert found.outcome is (Outcome.KEPT if row.code in kept else Outcome.UNSUPPORTED)
    assert found.terms is None


def test_every_code_has_a_row():
    rewritten = {
        ReasonCode.ROUNDED_DOWNSTREAM,
        ReasonCode.WEIGHT_ROUNDED,
        ReasonCode.ACTIVATION_CODES,
        ReasonCode.ACTIVATION_UPGRADED,
        ReasonCode.FLOAT_ACTIVATIONS,
    }
    priced = {ReasonCode.DOES_NOT_PAY, ReasonCode.AS_ASKED}
    attention = {ReasonCode.NO_CACHE, ReasonCode.FLOAT_CACHE, ReasonCode.CACHE_ROUNDED, ReasonCode.ATTENTION_FORM}
    assert {row.code for row in TABLE} == set(ReasonCode) - rewritten - priced - attention  # which has tests of its own


@pytest.mark.parametrize(("nodes", "tensors", "inputs"), NO_SITE.values(), ids=NO_SITE)
def test_no_site(nodes, tensors, inputs):
    proto = model(f"({inputs}) => (float[] y) {{ {nodes} }}", **tensors)
    for domain in ("my", "trt"):
        proto.opset_import.add(domain=domain, version=1)
    assert rows(proto) == []
