"""Every spelling of a product by a dequantized weight becomes msd.MatMul and means the same."""

import re
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime
import pytest
from support import (
    HALF_TOLERANCE,
    PARSER_TYPES,
    TOLERANCE,
    activation,
    assert_same_numbers,
    compiled,
    declare_outputs,
    meaning,
    model,
    needs_opset,
    ops,
    relative_l2,
    run,
    weight,
)

from msd_compiler.errors import ModelError
from msd_compiler.report import Outcome
from msd_compiler.runtime import RuntimeRefused, session

K, N = 40, 20
OURS = ["msd.MatMul"]
ANY = None


@dataclass(frozen=True)
class Spelling:
    """A row: the graph from the activation ``x`` to ``y``, and what the report says of it.

    ``DQ`` in ``nodes`` stands for the DequantizeLinear of the weight ``w``, scales ``s`` and, if there are any, zero points ``z``.
    """

    name: str
    nodes: str
    tensors: dict[str, np.ndarray]
    format: str
    form: str = "DQ -> MatMul"
    result: list[str] | None = field(default_factory=lambda: OURS)
    """Op types of the result."""
    x: tuple[int, ...] = (3, K)
    dims: str = ""
    """Dimensions of x as the file states them, where they are not the numbers."""
    m: int | str = 3
    k: int = K
    n: int = N
    opset: int = 21
    floats: str = "float32"

    def feed(self):
        return {"x": activation(self.x, self.floats)}

    def model(self):
        inputs = "(w, s, z)" if "z" in self.tensors else "(w, s)"
        nodes = re.sub(r"DQ(<[^>]*>)?", rf"DequantizeLinear\1{inputs}", self.nodes)
        scalar = PARSER_TYPES[self.floats]
        graph = f"({scalar}[{self.dims or ', '.join(map(str, self.x))}] x) => ({scalar}[] y) {{ {nodes} }}"
        return declare_outputs(model(graph, opset=self.opset, **self.tensors), self.feed())


def code_types():
    for kind in ("int2", "uint2", "int4", "uint4", "int8", "uint8"):
        for attributes, scales, words in (
            ("", (), "per tensor"),
            ("", (1,), "per tensor"),
            ("<axis=1>", (N,), "per channel"),
            ("<axis=-1>", (N,), "per channel"),
            ("<axis=0, block_size=16>", (3, N), "block 16"),
            ("<axis=-2, block_size=16>", (3, N), "block 16"),
        ):
            for zeros in ("", ", zero points"):
                yield Spelling(
                    f"{kind}{attributes or list(scales)}{zeros}",
                    f"d = DQ{attributes}  y = MatMul(x, d)",
                    weight(kind, (K, N), scales, bool(zeros)),
                    f"{kind} {words}{zeros}",
                    opset=25 if "2" in kind else 21,
                )


def blocks():
    for block, k in (
        *((4, 40), (8, 40), (8, 36), (12, 40), (16, 16), (16, 40), (32, 64), (48, 100), (100, 250), (128, 200)),
        *((256, 600), (257, 300), (384, 800), (512, 1100), (1000, 1300), (512, 40), (48, 40), (40, 40)),
    ):
        words = f"block {block}" if block < k else "per channel"
        groups = -(-k // block)
        for zeros in ("", ", zero points"):
            yield Spelling(
                f"blocks of {block} in {k}{zeros}",
                f"d = DQ<axis=0, block_size={block}>  y = MatMul(x, d)",
                weight("int4", (k, N), (groups, N), bool(zeros)),
                f"int4 {words}{zeros}",
                x=(3, k),
                k=k,
            )
        yield Spelling(
            f"blocks of {block} in {k} on axis 1",
            f"d = DQ<axis=1, block_size={block}>  t = Transpose<perm=[1,0]>(d)  y = MatMul(x, t)",
            weight("uint4", (N, k), (N, groups), True),
            f"uint4 {words}, zero points",
            "DQ -> Transpose -> MatMul",
            x=(3, k),
            k=k,
        )


INT8 = weight("int8", (K, N), (N,))
INT8_Z = weight("int8", (K, N), (N,), True)
UINT8_T = weight("uint8", (N, K), (N,), True)
INT4_T = weight("int4", (N, K), (N, 3), True)
HALF = weight("int8", (K, N), (N,), floats="float16")
HALF_T = weight("int8", (N, K), (N,), floats="float16")
EXPERTS = weight("int4", (4, K, N), (4, 3, N), True)
EXPERTS_T = weight("uint4", (4, N, K), (4, N, 5), True)
ONE = weight("int8", (1, K, N), (N,), True)
C = activation((N,), seed=3)


def shape(*dims):
    return {"shape": np.array(dims)}


# fmt: off
CHAINS = [
    Spelling("com.microsoft", "d = com.microsoft.DQ<axis=1>  y = MatMul(x, d)", weight("uint8", (K, N), (N,), True), "uint8 per channel, zero points", opset=17),
    Spelling("com.microsoft, blocks", "d = com.microsoft.DQ<axis=0, block_size=16>  y = MatMul(x, d)", weight("int8", (K, N), (3, N)), "int8 block 16", opset=17),
    Spelling("Cast", "d = DQ  c = Cast<to=1>(d)  y = MatMul(x, c)", HALF, "int8 per channel", "DQ -> Cast -> MatMul"),
    Spelling("output_dtype", "d = DQ<axis=1, output_dtype=1>  y = MatMul(x, d)", HALF, "int8 per channel", opset=23),
    Spelling("Identity", "d = DQ  i = Identity(d)  y = MatMul(x, i)", INT8, "int8 per channel", "DQ -> Identity -> MatMul"),
    Spelling("Transpose without perm", "d = DQ<axis=0>  t = Transpose(d)  y = MatMul(x, t)", UINT8_T, "uint8 per channel, zero points", "DQ -> Transpose -> MatMul"),
    Spelling("Reshape, Cast, Transpose",
             "d = DQ<axis=1, block_size=8>  r = Reshape(d, shape)  c = Cast<to=1>(r)  t = Transpose<perm=[1,0]>(c)  y = MatMul(x, t)",
             weight("int4", (N * 5, 8), (N * 5, 1), True) | shape(N, K), "int4 block 8, zero points", "DQ -> Reshape -> Cast -> Transpose -> MatMul"),
    Spelling("Reshape, one row per block", "d = DQ<axis=0>  r = Reshape(d, shape)  t = Transpose(r)  y = MatMul(x, t)",
             weight("int4", (N * 5, 8), (N * 5,), True) | shape(N, K), "int4 block 8, zero points", "DQ -> Reshape -> Transpose -> MatMul"),
    Spelling("Reshape to -1", "d = DQ<axis=0>  r = Reshape(d, shape)  t = Transpose(r)  y = MatMul(x, t)",
             weight("int8", (N, 5, 8), (N,)) | shape(-1, K), "int8 per channel", "DQ -> Reshape -> Transpose -> MatMul"),
    Spelling("Reshape to 0", "d = DQ<axis=0>  r = Reshape(d, shape)  t = Transpose(r)  y = MatMul(x, t)",
             weight("int8", (N, 5, 8), (N,)) | shape(0, -1), "int8 per channel", "DQ -> Reshape -> Transpose -> MatMul"),
    Spelling("Reshape after Transpose", "d = DQ<axis=2>  t = Transpose<perm=[1,0,2]>(d)  r = Reshape(t, shape)  y = MatMul(x, r)",
             weight("int8", (8, 5, N), (N,), True) | shape(K, N), "int8 per channel, zero points", "DQ -> Transpose -> Reshape -> MatMul"),
    Spelling("Reshape that changes nothing, last block incomplete", "d = DQ<axis=0, block_size=16>  r = Reshape(d, shape)  y = MatMul(x, r)",
             weight("int4", (K, N), (3, N)) | shape(0, N), "int4 block 16", "DQ -> Reshape -> MatMul"),
]

LEFT = ["Transpose", "msd.MatMul", "Transpose"]
SIDES = [
    Spelling("on the left", "d = DQ<axis=0>  y = MatMul(d, x)", UINT8_T, "uint8 per channel, zero points", result=LEFT, x=(K, 5), m=5),
    Spelling("on the left, rank 3", "d = DQ<axis=0>  y = MatMul(d, x)", UINT8_T, "uint8 per channel, zero points", result=LEFT, x=(2, K, 5), m=10),
    Spelling("on the left, symbols", "d = DQ<axis=0>  y = MatMul(d, x)", UINT8_T, "uint8 per channel, zero points", result=LEFT, x=(2, K, 5), dims="B, 40, S", m="B*S"),
    Spelling("on the left, blocks", "d = DQ<axis=1, block_size=16>  y = MatMul(d, x)", INT4_T, "int4 block 16, zero points", result=LEFT, x=(K, 5), m=5),
    Spelling("on the left, Transpose", "d = DQ<axis=1>  t = Transpose(d)  y = MatMul(t, x)", INT8_Z, "int8 per channel, zero points", "DQ -> Transpose -> MatMul", LEFT, x=(K, 5), m=5),
    Spelling("on the left of a vector", "d = DQ<axis=0>  y = MatMul(d, x)", UINT8_T, "uint8 per channel, zero points", x=(K,), m=1),
    Spelling("[1,N,K] on the left of a vector", "d = DQ<axis=1>  y = MatMul(d, x)", weight("int8", (1, N, K), (N,)), "int8 per channel", result=["Unsqueeze", "msd.MatMul"], x=(K,), m=1),
    Spelling("vector", "d = DQ  y = MatMul(x, d)", INT8, "int8 per channel", x=(K,), m=1),
    Spelling("rank 4", "d = DQ  y = MatMul(x, d)", INT8, "int8 per channel", x=(2, 3, 4, K), m=24),
    Spelling("symbols", "d = DQ  y = MatMul(x, d)", INT8, "int8 per channel", x=(2, 3, K), dims="B, S, 40", m="B*S"),
    Spelling("number and symbol", "d = DQ  y = MatMul(x, d)", INT8, "int8 per channel", x=(2, 3, K), dims="2, S, 40", m="2*S"),
    Spelling("no rows", "d = DQ  y = MatMul(x, d)", INT8, "int8 per channel", x=(0, K), m=0),
    Spelling("one column", "d = DQ  y = MatMul(x, d)", weight("int8", (K, 1), (1,)), "int8 per channel", n=1),
    Spelling("K = 1", "d = DQ  y = MatMul(x, d)", weight("int8", (1, N), (N,)), "int8 per channel", x=(3, 1), k=1),
    Spelling("all one code", "d = DQ  y = MatMul(x, d)", INT8 | {"w": np.full((K, N), -128, np.int8)}, "int8 per channel"),
]

EXPERTS_OF = "d = DQ<axis=1, block_size=16>  y = MatMul(x, d)"
RANK_3 = [
    Spelling("[1,K,N] by rank 1", "d = DQ<axis=2>  y = MatMul(x, d)", ONE, "int8 per channel, zero points", result=["Unsqueeze", "msd.MatMul"], x=(K,), m=1),
    Spelling("[1,K,N] by rank 2", "d = DQ<axis=2>  y = MatMul(x, d)", ONE, "int8 per channel, zero points", result=["Unsqueeze", "msd.MatMul"]),
    Spelling("[1,K,N] by rank 3", "d = DQ<axis=2>  y = MatMul(x, d)", ONE, "int8 per channel, zero points", x=(2, 3, K), m=6),
    Spelling("[1,K,N] by rank 4", "d = DQ<axis=-1>  y = MatMul(x, d)", ONE, "int8 per channel, zero points", x=(2, 2, 3, K), m=12),
    Spelling("[1,K,N], blocks", EXPERTS_OF, weight("int4", (1, K, N), (1, 3, N)), "int4 block 16", x=(2, 3, K), m=6),
    Spelling("[1,1,K,N]", "d = DQ<axis=3>  y = MatMul(x, d)", weight("int8", (1, 1, K, N), (N,)), "int8 per channel", result=["Unsqueeze", "msd.MatMul"]),
    Spelling("[E,K,N] by rank 2", EXPERTS_OF, EXPERTS, "int4 block 16, zero points", result=ANY),
    Spelling("[E,K,N] by one", EXPERTS_OF, EXPERTS, "int4 block 16, zero points", result=ANY, x=(1, 3, K)),
    Spelling("[E,K,N] by rank 3", EXPERTS_OF, EXPERTS, "int4 block 16, zero points", result=ANY, x=(4, 3, K), m=12),
    Spelling("[E,K,N] by rank 4", EXPERTS_OF, EXPERTS, "int4 block 16, zero points", result=ANY, x=(2, 4, 3, K), m=24),
    Spelling("[E,K,N] by rank 4 of one", EXPERTS_OF, EXPERTS, "int4 block 16, zero points", result=ANY, x=(2, 1, 3, K), m=6),
    Spelling("[E,K,N] by symbols", EXPERTS_OF, EXPERTS, "int4 block 16, zero points", result=ANY, x=(2, 4, 3, K), dims="B, 4, S, 40", m="4*B*S"),
    Spelling("[E,K,N], opset 11", "d = com.microsoft.DQ<axis=2>  y = MatMul(x, d)", weight("uint8", (4, K, N), (N,), True), "uint8 per channel, zero points", result=ANY, opset=11),
    Spelling("[E,K,N], one scale per matrix", "d = DQ<axis=0>  y = MatMul(x, d)", weight("uint8", (4, K, N), (4,), True), "uint8 per tensor, zero points", result=ANY, x=(4, 3, K), m=12),
    Spelling("[E,K,N] + b", "d = DQ<axis=0>  p = MatMul(x, d)  y = Add(p, b)", weight("uint8", (4, K, N), (4,), True) | {"b": C}, "uint8 per tensor, zero points", result=ANY, x=(4, 3, K), m=12),
    Spelling("[E,N,K], Transpose", "d = DQ<axis=2, block_size=8>  t = Transpose<perm=[0,2,1]>(d)  y = MatMul(x, t)", EXPERTS_T, "uint4 block 8, zero points", "DQ -> Transpose -> MatMul", ANY),
    Spelling("[E,N,K] on the left", "d = DQ<axis=2, block_size=8>  y = MatMul(d, x)", EXPERTS_T, "uint4 block 8, zero points", result=ANY, x=(4, K, 5), m=20),
    Spelling("[E,N,K] on the left of a matrix", "d = DQ<axis=2, block_size=8>  y = MatMul(d, x)", EXPERTS_T, "uint4 block 8, zero points", result=ANY, x=(K, 5), m=5),
    Spelling("[1,N,K] on the left of a matrix", "d = DQ<axis=1>  y = MatMul(d, x)", weight("int8", (1, N, K), (N,)), "int8 per channel", result=ANY, x=(K, 5), m=5),
]

GEMMS = [
    Spelling("Gemm", "d = DQ  y = Gemm(x, d)", INT8_Z, "int8 per channel, zero points", "DQ -> Gemm"),
    Spelling("transB", "d = DQ<axis=0>  y = Gemm<transB=1>(x, d)", UINT8_T, "uint8 per channel, zero points", "DQ -> Gemm"),
    Spelling("transB, blocks", "d = DQ<axis=1, block_size=16>  y = Gemm<transB=1, alpha=-0.5>(x, d)", INT4_T, "int4 block 16, zero points", "DQ -> Gemm"),
    Spelling("Transpose, transB", "d = DQ  t = Transpose(d)  y = Gemm<transB=1>(x, t)", INT8, "int8 per channel", "DQ -> Transpose -> Gemm"),
    Spelling("transA", "d = DQ  y = Gemm<transA=1>(x, d)", INT8, "int8 per channel", "DQ -> Gemm", ["Transpose", "msd.MatMul"], x=(K, 3)),
    Spelling("transA, transB, C", "d = DQ<axis=0>  y = Gemm<transA=1, transB=1>(x, d, c)", UINT8_T | {"c": C}, "uint8 per channel, zero points", "DQ -> Gemm", ["Transpose", "msd.MatMul"], x=(K, 3)),
    *(Spelling(f"C {list(c.shape)}", "d = DQ<axis=0>  y = Gemm<transB=1, alpha=0.5, beta=3.0>(x, d, c)", UINT8_T | {"c": c}, "uint8 per channel, zero points", "DQ -> Gemm")
      for c in (C, C[None], C[0], C[:1], C[None, :1])),
    *(Spelling(f"C {list(c)}", "d = DQ  y = Gemm<alpha=2.0>(x, d, c)", INT8 | {"c": activation(c)}, "int8 per channel", "DQ -> Gemm", ["msd.MatMul", "Add"])
      for c in ((3, N), (3, 1))),
    Spelling("C [M,N], beta", "d = DQ  y = Gemm<beta=0.25>(x, d, c)", INT8 | {"c": activation((3, N))}, "int8 per channel", "DQ -> Gemm", ["msd.MatMul", "Mul", "Add"]),
    Spelling("C computed", "r = Neg(c)  d = DQ  y = Gemm<beta=0.25>(x, d, r)", INT8 | {"c": C}, "int8 per channel", "DQ -> Gemm", ["Neg", "msd.MatMul", "Mul", "Add"]),
    Spelling("C computed [1,1], N = 1", "r = Neg(c)  d = DQ  y = Gemm(x, d, r)", weight("int8", (K, 1), (1,)) | {"c": C[:1, None]}, "int8 per channel", "DQ -> Gemm", ["Neg", "msd.MatMul", "Add"], n=1),
    Spelling("C [M,1], N = 1", "d = DQ  y = Gemm(x, d, c)", weight("int8", (K, 1), (1,)) | {"c": activation((3, 1))}, "int8 per channel", "DQ -> Gemm", ["msd.MatMul", "Add"], n=1),
    Spelling("C dequantized", "r = DequantizeLinear(b, bs)  d = DQ  y = Gemm(x, d, r)",
             INT8 | {"b": np.arange(-10, 10, dtype=np.int32) * 1000, "bs": np.float32(1e-3)}, "int8 per channel", "DQ -> Gemm"),
    Spelling("C dequantized per channel", "r = DequantizeLinear<axis=0>(b, bs, bz)  d = DQ  y = Gemm(x, d, r)",
             INT8 | {"b": np.arange(-10, 10, dtype=np.int32), "bs": np.abs(C), "bz": np.zeros(N, np.int32)}, "int8 per channel", "DQ -> Gemm"),
    *(Spelling(f"on the left, transA={a}, transB={b}, C {list(c)}",
               f"d = DQ<axis={a}>  y = Gemm<transA={a}, transB={b}, alpha=0.5, beta=2.0>(d, x, c)",
               weight("uint8", (K, N) if a else (N, K), (N,), True) | {"c": activation(c, seed=3)},
               "uint8 per channel, zero points", "DQ -> Gemm", ANY, x=(7, K) if b else (K, 7), m=7)
      for a in (0, 1) for b in (0, 1) for c in ((), (7,), (N, 1), (N, 7))),
]

INPUTS = ["Mul", "msd.MatMul"]
ALONG_K = [
    *(Spelling(f"{kind}", "d = DQ<axis=0>  y = MatMul(x, d)", weight(kind, (K, N), (K,)), f"{kind} per input", result=INPUTS)
      for kind in ("int4", "uint4", "int8", "uint8")),
    *(Spelling(f"{kind}, zero points", "d = DQ<axis=0>  y = MatMul(x, d)", weight(kind, (K, N), (K,), True), f"{kind} per input, zero points", result=INPUTS)
      for kind in ("int4", "uint4")),
    *(Spelling(f"{kind}, one zero point", "d = DQ<axis=0>  y = MatMul(x, d)", weight(kind, (K, N), (K,)) | {"z": np.full(K, 100, kind)}, f"{kind} per input, zero points", result=INPUTS)
      for kind in ("int8", "uint8")),
    Spelling("transB, alpha", "d = DQ<axis=1>  y = Gemm<transB=1, alpha=0.5>(x, d)", weight("int8", (N, K), (K,)), "int8 per input", "DQ -> Gemm", INPUTS),
    Spelling("bias", "d = DQ<axis=0>  p = MatMul(x, d)  y = Add(p, b)", weight("int4", (K, N), (K,)) | {"b": C}, "int4 per input", result=INPUTS),
    Spelling("on the left", "d = DQ<axis=1>  y = MatMul(d, x)", weight("int8", (N, K), (K,)), "int8 per input", result=["Transpose", "Mul", "msd.MatMul", "Transpose"], x=(2, K, 5), m=10),
    Spelling("[1,K,N]", "d = DQ<axis=1>  y = MatMul(x, d)", weight("int8", (1, K, N), (K,)), "int8 per input", result=["Unsqueeze", "Mul", "msd.MatMul"]),
    Spelling("[E,K,N]", "d = DQ<axis=1>  y = MatMul(x, d)", weight("int8", (4, K, N), (K,)), "int8 per input", result=ANY, x=(4, 3, K), m=12),
    Spelling("float16", "d = DQ<axis=0>  y = MatMul(x, d)", weight("int8", (K, N), (K,), floats="float16"), "int8 per input", result=["Cast", "Mul", "msd.MatMul", "Cast"], floats="float16"),
]

SMOOTHED = [
    Spelling("SmoothQuant", "m = Mul(x, f)  d = DQ  y = MatMul(m, d)", INT8 | {"f": weight("int8", (1,), (K,))["s"]}, "int8 per channel", result=INPUTS),
    Spelling("AWQ", "m = Mul(x, f)  d = DQ<axis=0, block_size=8>  y = MatMul(m, d)", weight("int4", (K, N), (5, N), True) | {"f": weight("int8", (1,), (K,))["s"]}, "int4 block 8, zero points", result=INPUTS),
]

HALVES = [
    Spelling("float16", "d = DQ  y = MatMul(x, d)", HALF, "int8 per channel", floats="float16"),
    Spelling("float16 per tensor", "d = DQ  y = MatMul(x, d)", weight("int8", (K, N), (1,), True, floats="float16"), "int8 per tensor, zero points", floats="float16"),
    Spelling("float16 blocks", "d = DQ<axis=0, block_size=16>  y = MatMul(x, d)", weight("uint4", (K, N), (3, N), True, floats="float16"), "uint4 block 16, zero points", floats="float16"),
    Spelling("float16 bias", "d = DQ  p = MatMul(x, d)  y = Add(b, p)", HALF | {"b": activation((N,), "float16")}, "int8 per channel", floats="float16"),
    Spelling("float16 experts", "d = DQ<axis=2>  y = MatMul(x, d)", weight("int8", (2, K, N), (N,), floats="float16"), "int8 per channel", result=ANY, floats="float16"),
    Spelling("float16 Gemm", "d = DQ<axis=0>  y = Gemm<transB=1, alpha=0.5>(x, d, c)", HALF_T | {"c": activation((N,), "float16")}, "int8 per channel", "DQ -> Gemm", floats="float16"),
    Spelling("float16 Gemm C [M,N]", "d = DQ<axis=0>  y = Gemm<transB=1, beta=0.5>(x, d, c)", HALF_T | {"c": activation((3, N), "float16")},
             "int8 per channel", "DQ -> Gemm", ["msd.MatMul", "Mul", "Add"], floats="float16"),
    Spelling("float32 scales, float16 x", "d = DQ  c = Cast<to=10>(d)  y = MatMul(x, c)", INT8, "int8 per channel", "DQ -> Cast -> MatMul", floats="float16"),
]
# fmt: on

SPELLINGS = {
    "codes": [*code_types()],
    "blocks": [*blocks()],
    "chain": CHAINS,
    "side": SIDES,
    "rank 3": RANK_3,
    "Gemm": GEMMS,
    "along K": ALONG_K,
    "scaled activation": SMOOTHED,
    "half": HALVES,
}


@pytest.mark.parametrize(
    "spelling", [pytest.param(row, id=f"{group}: {row.name}") for group, table in SPELLINGS.items() for row in table]
)
def test_same_numbers(spelling):
    needs_opset(spelling.opset)
    done = assert_same_numbers(spelling.model(), spelling.feed(), tolerance=HALF_TOLERANCE[spelling.floats])
    row = done.report.sites[0]
    form = re.sub(r"^DQ", "DequantizeLinear", spelling.form)
    assert (row.form, row.format) == (form, spelling.format)
    assert (row.m, row.k, row.n) == (spelling.m, spelling.k, spelling.n)
    if spelling.result is not ANY:
        assert ops(done.model) == spelling.result


def test_shared_by_two_products():
    text = "(float[3,40] x) => (float[3,20] y) { d = DequantizeLinear(w, s)  a = MatMul(x, d)  b = Neg(x)  c = MatMul(b, d)  e = Relu(c)  y = Add(a, e) }"
    feed = {"x": activation((3, K))}
    done = assert_same_numbers(model(text, **INT8), feed, rewritten=2)
    assert ops(done.model) == ["msd.MatMul", "Neg", "msd.MatMul", "Relu", "Add"]
    packed = [t for t in done.model.graph.initializer if t.name.endswith("msd.B")]
    assert len(packed) == 1  # equal contents are stored once
    assert {t.name for t in done.model.graph.initializer}.isdisjoint({"w", "s"})


def test_shared_with_something_else():
    text = """(float[3,40] x) => (float[3,20] y, float[40,20] table) {
        d = DequantizeLinear(w, s)  y = MatMul(x, d)  table = Relu(d) }"""
    source, feed = model(text, **INT8), {"x": activation((3, K))}
    done = assert_same_numbers(source, feed, tolerance=1e-4)
    assert ops(done.model) == ["DequantizeLinear", "msd.MatMul", "Relu"]
    kept = {t.name: t for t in done.model.graph.initializer}
    for stored in source.graph.initializer:
        assert kept[stored.name] == stored


def test_a_tied_head():
    """The table stays for the lookup, and the head gets its own packing."""
    source = model(
        """(int64[3] ids) => (float[3,20] logits) {
            d = DequantizeLinear<axis=0>(w, s)  x = Gather(d, ids)  h = Relu(x)  t = Transpose(d)  logits = MatMul(h, t) }""",
        **weight("int8", (N, K), (N,)),
    )
    done = compiled(source)
    found = {row.kind: (row.outcome, row.format) for row in done.report.sites}
    assert found == {
        "linear": (Outcome.REWRITTEN, "int8 per channel"),
        "embedding": (Outcome.KEPT, "int8 per channel"),
    }
    assert ops(done.model) == ["DequantizeLinear", "Gather", "Relu", "msd.MatMul"]
    feed = {"ids": np.array([3, 0, 19])}
    for portable in (False, True):
        found = run(done.model, feed, portable=portable)["logits"]
        assert relative_l2(found, meaning(source, feed)["logits"]) <= TOLERANCE


def test_tensorrt_s_name():
    """onnxruntime does not know the op; the result is that of the same model in ONNX's words."""
    known = model(
        "(float[3,40] x) => (float[3,20] y) { d = DequantizeLinear<axis=0, block_size=20>(w, s)  y = MatMul(x, d) }",
        **weight("int4", (K, N), (2, N)),
    )
    other = onnx.ModelProto()
    other.CopyFrom(known)
    other.graph.node[0].op_type, other.graph.node[0].domain = "TRT_INT4DequantizeLinear", "trt"
    other.opset_import.add(domain="trt", version=1)
    done = compiled(other)
    assert done.report.sites[0].form == "TRT_INT4DequantizeLinear -> MatMul"
    assert done.model.graph == compiled(known).model.graph
    assert run(done.model, {"x": activation((3, K))})["y"].shape == (3, N)


def test_bfloat16():
    """The CPU runs no bfloat16 MatMul: x and y pass through a Cast, and float64 is the measure."""
    tensors = weight("int8", (K, N), (N,), True, floats="bfloat16")
    text = """(float[3,40] x) => (float[3,20] y) {
        h = Cast<to=16>(x)  d = DequantizeLinear<axis=1>(w, s, z)  p = MatMul(h, d)  y = Cast<to=1>(p) }"""
    source = model(text, **tensors)
    feed = {"x": activation((3, K), "bfloat16").astype(np.float32)}
    done = assert_same_numbers(source, feed, tolerance=HALF_TOLERANCE["bfloat16"])
    assert ops(done.model) == ["Cast", "msd.MatMul", "Cast"]


def test_rank_of_x_unknown():
    source = model("(float[] x) => (float[] y) { d = DequantizeLinear(w, s)  y = MatMul(x, d) }", **INT8)
    done = compiled(source)
    assert (done.report.sites[0].m, done.report.summary.rewritten) == (None, 1)
    for shape in ((K,), (3, K), (2, 3, K)):
        feed = {"x": activation(shape)}
        for portable in (False, True):
            found = run(done.model, feed, portable=portable)["y"]
            assert relative_l2(found, meaning(source, feed)["y"]) <= TOLERANCE


def test_meaning_is_that_of_the_runtime():
    """The float64 meaning that all is measured by, against onnxruntime with its optimizations off, wherever that runs."""
    off = {"graph_optimization_level": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL, "log_severity_level": 4}
    compared = 0
    for spelling in [s for table in SPELLINGS.values() for s in table if s.floats == "float32"]:
        source, feed = spelling.model(), spelling.feed()
        try:
            found = session(source.SerializeToString(), portable=True, **off).run(None, feed)[0]
        except (RuntimeRefused, onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException):
            continue
        rounding = 1e-3 if spelling.tensors["s"].dtype == np.float16 else 1e-5  # the runtime's weight is float16
        assert relative_l2(found, meaning(source, feed)["y"]) < rounding, spelling.name
        compared += 1
    assert compared > 150


NOT_TAKEN_AS_WRITTEN = [
    ("scales [N+1]", "d = DequantizeLinear(w, s)", {"s": np.ones(N + 1, np.float32)}, "scales 's' have shape [21], expected [20]"),
    ("scales along the wrong axis", "d = DequantizeLinear<axis=0>(w, s)", {}, "scales 's' have shape [20], expected [40]"),
    ("scales [1,1]", "d = DequantizeLinear(w, s)", {"s": np.ones((1, 1), np.float32)}, "scales 's' have shape [1, 1], expected a scalar or one dimension"),
    ("scales [1,N]", "d = DequantizeLinear(w, s)", {"s": np.ones((1, N), np.float32)}, "scales 's' have shape [1, 20], expected [20]"),
    ("too few blocks", "d = DequantizeLinear<axis=0, block_size=16>(w, s)", {"s": np.ones((2, N), np.float32)}, "scales 's' have shape [2, 20], expected [3, 20] (blocks of 16 on axis 0)"),
    ("block_size and one scale", "d = DequantizeLinear<axis=0, block_size=16>(w, s)", {"s": np.float32(1)}, "scales 's' have shape [], expected [3, 20]"),
    ("axis", "d = DequantizeLinear<axis=2>(w, s)", {}, "has axis 2, but its weight 'w' has rank 2"),
    ("negative axis", "d = DequantizeLinear<axis=-3>(w, s)", {}, "has axis -3, but its weight 'w' has rank 2"),
    ("zero points [N-1]", "d = DequantizeLinear(w, s, z)", {"z": np.zeros(N - 1, np.int8)}, "zero points 'z' have shape [19], expected that of the scales, [20]"),
    ("zero point for scales", "d = DequantizeLinear(w, s, z)", {"z": np.int8(0)}, "zero points 'z' have shape [], expected that of the scales, [20]"),
    ("type of zero points", "d = DequantizeLinear(w, s, z)", {"z": np.zeros(N, np.uint8)}, "zero points 'z' are uint8, expected the codes' type int8"),
    ("NaN", "d = DequantizeLinear(w, s)", {"s": np.where(np.arange(N) == 3, np.nan, 1).astype(np.float32)}, "1 of 20 scales are NaN or Inf"),
    ("Inf", "d = DequantizeLinear(w, s)", {"s": np.where(np.arange(N) < 2, np.inf, 1).astype(np.float16)}, "2 of 20 scales are NaN or Inf"),
    ("NaN along K", "d = DequantizeLinear<axis=0>(w, s)", {"s": np.full(K, np.nan, np.float32)}, "40 of 40 scales along K are NaN or Inf"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "tensors", "words"), [pytest.param(*row[1:], id=row[0]) for row in NOT_TAKEN_AS_WRITTEN]
)
def test_model_error(nodes, tensors, words):
    text = f"(float[3,40] x) => (float[3,20] y) {{ [layer] {nodes}  y = MatMul(x, d) }}"
    with pytest.raises(ModelError) as error:
        compiled(model(text, **INT8 | tensors))
    assert words in str(error.value)
    assert "DequantizeLinear 'layer'" in str(error.value)
