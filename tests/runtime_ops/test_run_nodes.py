"""The native library without onnxruntime, bit for bit: on an emulated Arm processor, and here with tensors at any address."""

from __future__ import annotations

import os
import platform
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import attention_support
import ml_dtypes
import numpy as np
import pytest
from attention_support import make_case
from msd_compiler.runtime_ops import library_path
from msd_compiler.runtime_ops.attention.layout import LAYOUT as CACHE_LAYOUT
from msd_compiler.runtime_ops.attention.reference import Attended
from msd_compiler.runtime_ops.matmul.layout import LAYOUT as WEIGHT_LAYOUT
from msd_compiler.runtime_ops.matmul.layout import pack_codes, pack_columns
from msd_compiler.runtime_ops.matmul_integer_to_float.layout import LONGEST_GROUP, CodesPlan
from msd_compiler.runtime_ops.matmul_integer_to_float.reference import matmul_integer_to_float
from onnx.helper import np_dtype_to_tensor_dtype

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")  # of a reference

ROOT = Path(__file__).parents[2]
NO_SUCH_ISA = 3
"""What ``run_nodes`` exits with where the machine does not run the instruction set."""
ARM_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
PLACES = [0, 1, 2]
"""Of a tensor in memory: aligned; one element farther; ending at a page's end, behind which nothing may be read."""
FLOATS = [np.float32, np.float16, ml_dtypes.bfloat16]


@dataclass(frozen=True)
class Node:
    """One call of an op."""

    op: str
    attributes: dict[str, object]
    inputs: Sequence[np.ndarray]
    expected: Sequence[np.ndarray]

    def text(self, place: int) -> bytes:
        """As ``run_nodes`` reads it."""
        parts = [self.op.encode() + b"\0", _numbers(len(self.attributes))]
        parts += [f"{key}\0{value}\0".encode() for key, value in self.attributes.items()]
        parts.append(_numbers(len(self.inputs)))
        for tensor in self.inputs:
            dtype = np_dtype_to_tensor_dtype(tensor.dtype)
            parts += [_numbers(dtype, tensor.ndim, *tensor.shape, place, tensor.nbytes), tensor.tobytes()]
        return b"".join(parts)


def _numbers(*values: int) -> bytes:
    return struct.pack(f"={len(values)}q", *values)


class _Reader:
    def __init__(self, text: bytes) -> None:
        self._text, self._at = text, 0

    def number(self) -> int:
        return struct.unpack("=q", self._take(8))[0]

    def bytes(self) -> bytes:
        return self._take(self.number())

    def _take(self, count: int) -> bytes:
        self._at += count
        return self._text[self._at - count : self._at]


def compile_runner(compiler: str, folder: Path) -> Path:
    program = folder / "run_nodes"
    source = Path(__file__).parent / "native" / "run_nodes.cc"
    subprocess.run([compiler, "-std=c++20", "-O1", str(source), "-o", str(program), "-ldl"], check=True)
    return program


@pytest.fixture(scope="session")
def native_command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler 'c++' to build run_nodes")
    return [str(compile_runner(compiler, tmp_path_factory.mktemp("native"))), str(library_path())]


@pytest.fixture(scope="session")
def arm_command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Builds the library as a user would who compiles for another machine."""
    for tool in (ARM_COMPILER, EMULATOR, "cmake"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}, needed to build for Arm and emulate it")
    folder = tmp_path_factory.mktemp("arm")
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={ARM_COMPILER}"]
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-DCMAKE_CXX_FLAGS=-Werror", *target]
    for step in (configure, ["cmake", "--build", str(folder), "-j", "2"]):
        done = subprocess.run(step, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
    found = subprocess.run([ARM_COMPILER, "-print-file-name=libc.so.6"], stdout=subprocess.PIPE, text=True, check=True)
    emulated = [EMULATOR, "-cpu", "max", "-L", str(Path(found.stdout.strip()).resolve().parents[1])]
    return [*emulated, str(compile_runner(ARM_COMPILER, folder)), str(folder / "libmsd_ops.so")]


IS_ARM = platform.machine() in ("aarch64", "arm64", "ARM64")
NATIVE_ISAS = ["neon-dotprod", "scalar"] if IS_ARM else ["avx512-vnni", "avx-vnni", "avx2", "scalar"]
MACHINES = [
    *(pytest.param(("arm", isa), id=f"arm-{isa}", marks=pytest.mark.slow) for isa in ("neon-dotprod", "scalar")),
    *(pytest.param(("native", isa), id=f"native-{isa}") for isa in NATIVE_ISAS),
]


@pytest.fixture(params=MACHINES)
def check(request: pytest.FixtureRequest) -> Callable[[Iterable[Node]], None]:
    """``check(nodes)`` runs them in one process and asserts their results."""
    machine, isa = request.param
    command = [*request.getfixturevalue(f"{machine}_command"), isa]
    if (probe := subprocess.run(command, input=b"", stderr=subprocess.PIPE)).returncode == NO_SUCH_ISA:
        pytest.skip(probe.stderr.decode().strip())

    def check(nodes: Iterable[Node]) -> None:
        nodes = list(nodes)
        text = b"".join(node.text(place) for node in nodes for place in PLACES)
        done = subprocess.run(command, input=text, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        results = _Reader(done.stdout)
        for node in nodes:
            for _ in PLACES:
                assert results.bytes().decode() == ""
                assert results.number() == len(node.expected)
                for expected in node.expected:
                    shape = tuple(results.number() for _ in range(results.number()))
                    assert_same_bits(np.frombuffer(results.bytes(), expected.dtype).reshape(shape), expected)

    return check


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal with the sign of 0, and NaN where NaN is (of any sign and payload)."""
    assert found.shape == expected.shape
    if expected.dtype.kind not in "iu":
        found, expected = found.astype(np.float32), expected.astype(np.float32)
        is_number = ~np.isnan(expected)
        np.testing.assert_array_equal(np.signbit(found[is_number]), np.signbit(expected[is_number]))
    np.testing.assert_array_equal(found, expected)


def around(tile: int) -> list[int]:
    return [1, tile - 1, tile, tile + 1, 2 * tile + 3]


# ---- msd.MatMul ---------------------------------------------------------------------------------------------------


def activation(rows: int, k: int, dtype: type = np.float32, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, k)).astype(dtype)


def product(site: object, a: np.ndarray) -> Node:
    attributes = {"layout": WEIGHT_LAYOUT, "output_dtype": np_dtype_to_tensor_dtype(a.dtype)}
    return Node("MatMul", attributes, [a, *site.operands().values()], [site.reference(a)])


@pytest.mark.parametrize("rows", [*around(4), 8, 13])
def test_rows_and_columns(check, helpers, rows):
    a = activation(rows, 40)
    sites = (helpers.make_site(40, n, **coding, columns="group") for n in around(16) for coding in helpers.codings)
    check(product(site, a) for site in sites)


def test_k_and_groups(check, helpers, coding):
    nodes = []
    for block in (1, 2, 3, 5, 7, 8, 9, 16, 24, 31, 32, 33, 64, 100, 128, 255, 256):
        for k in sorted({1, 3, *around(16), block - 1, block, block + 1, 2 * block + 3} - {0}):
            terms, per_row, columns = 1 + k % 3, k % 2 == 0, ("one", "column", "group")[(k + block) % 3]
            site = helpers.make_site(
                k, 19, **coding, block_size=block, terms=terms, per_row=per_row, columns=columns, seed=k
            )
            nodes.append(product(site, activation(5 if per_row else 9, k)))
    check(nodes)


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_largest_sums(check, helpers, terms):
    """256 products of the largest codes: the edge of int32."""
    nodes = []
    int8, e2m1 = (helpers.make_site(512, 17, **coding, block_size=256, terms=terms) for coding in helpers.codings[2:])
    for site, code in ((int8, 0), (int8, 127), (int8, 128), (int8, 255), (e2m1, 0), (e2m1, 14)):
        for zero_point in (0, 255):
            codes = np.full_like(site.codes, code)
            extreme = site.but(
                codes=codes,
                B=pack_codes(codes, site.plan),
                zero_points=np.full((1, 1, 1), zero_point, np.uint8),
            )
            for sign in (1, -1):
                a = np.full((3, 512), sign * 3.5, np.float32)
                a[:, 1::2] *= np.float32(0.99)
                a[-1, 256:] = sign * 3.5
                nodes.append(product(extreme, a))
    check(nodes)


@pytest.mark.parametrize("dtype", FLOATS)
def test_float_types(check, helpers, dtype):
    sites = [helpers.make_site(k, 21, terms=terms, columns="column") for terms in (1, 2, 3) for k in (7, 64, 75)]
    nodes = [product(site, activation(6, site.plan.k, dtype)) for site in sites]
    finite = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = finite[np.isfinite(finite)].astype(dtype)
    nodes.append(product(helpers.make_site(64, 3, block_size=8), np.resize(finite, (-(-len(finite) // 64), 64))))
    check(nodes)


@pytest.mark.parametrize("n", [5, 16])
def test_narrow_results(check, helpers, n):
    """With a weight of 0 the output is the bias, rounded; also where a float16 node is run in float."""
    nodes = []
    edges = [65504, 65519.996, 65520, 1e30, -70000, 2.0**-14, 2.0**-24, 2.0**-25, 2.0**-25 * 1.0001, 2.0**-26]
    edges += [1 + 2.0**-11, 1 + 3 * 2.0**-11, 2.0**-24 * 1.5, 2.0**-24 * 2.5, 6.1e-5, 1023.4999 * 2.0**-24]
    for start in range(0, len(edges), n):
        bias = np.resize(np.array(edges[start:], np.float32), n)
        site = helpers.make_site(8, n).but(scales=np.zeros((1, 1, 16), np.float32), bias=bias)
        for dtype in FLOATS:
            nodes.append(product(site, activation(1, 8, dtype)))
            wide = product(site, activation(1, 8))
            narrowed = [wide.expected[0].astype(dtype).astype(np.float32)]
            stated = wide.attributes | {"output_dtype": np_dtype_to_tensor_dtype(np.dtype(dtype))}
            nodes.append(Node(wide.op, stated, wide.inputs, narrowed))
    check(nodes)


@pytest.mark.parametrize("dtype", FLOATS)
def test_guards(check, helpers, dtype):
    nodes = []
    for terms in (1, 2, 3):
        for per_row in (False, True):
            site = helpers.make_site(37, 18, block_size=8, terms=terms, per_row=per_row, columns="group")
            a = activation(12, 37, dtype)
            a[1, 3], a[2, 9], a[3, 36], a[4, 0] = np.nan, np.inf, -np.inf, np.nan
            a[5], a[6, 8:16] = 0, 0
            if dtype != np.float16:
                a[7], a[8, :8], a[9, 0], a[10, 16:] = 2.0**-101, 1e-40, 1e38, 2.0**-100
            nodes.append(product(site, a))
    check(nodes)


@pytest.mark.parametrize("dtype", FLOATS)
def test_mx_formats(check, helpers, mx_format, dtype):
    nodes = []
    for block_size in (1, 8, 9, 32, 100):
        for k in sorted({1, block_size, 2 * block_size + 1, 75}):
            coding = helpers.codings[k % 4]
            site = helpers.make_site(k, 18, **coding, block_size=block_size, activation=mx_format, columns="group")
            nodes += [product(site, helpers.uneven(13, k, dtype)), product(site, activation(1, k, dtype))]
    check(nodes)


@pytest.mark.parametrize("terms", [2, 3])
def test_what_columns_share(check, helpers, terms):
    nodes = []
    for columns in ("one", "column", "group"):
        site = helpers.make_site(96, 35, terms=terms, columns=columns)
        many_scales = np.random.default_rng(3).normal(size=(3, 35)).astype(np.float32)
        sites = [
            site,
            site.but(offsets=np.full((1, 1, 1), 0.25, np.float32)),
            site.but(zero_points=np.full((1, 1, 1), 200, np.uint8)),
            site.but(scales=pack_columns(many_scales)),
        ]
        nodes += [product(case, activation(7, 96)) for case in sites]
    check(nodes)


def test_many_rows_are_shared_out(check, helpers):
    site = helpers.make_site(500, 70, bits=4, block_size=64, columns="group")
    check([product(site, activation(300, 500))])


# ---- msd.MatMulIntegerToFloat -------------------------------------------------------------------------------------

CODES = [np.uint8, np.int8, np.uint16, np.int16]


def codes_product(
    a: np.ndarray, zero_point: int, w: np.ndarray, w_zero_points: np.ndarray, block: int, *, bits: int = 8
) -> Node:
    """``w``: codes [K, N]; ``w_zero_points``: [groups | 1, N], and so are the scales."""
    rng = np.random.default_rng(7)
    info = np.iinfo(a.dtype)
    plan = CodesPlan(len(w), bits, block, info.bits, info.min < 0)
    inputs = {
        "a": a,
        "a_scale": np.array(0.013, np.float32),
        "a_zero_point": np.array(zero_point, a.dtype),
        "b": pack_codes(w, plan),
        "scales": pack_columns(rng.uniform(0.01, 1, w_zero_points.shape).astype(np.float32)),
        "zero_points": pack_columns(w_zero_points.astype(np.uint8)),
        "bias": rng.normal(size=w.shape[1]).astype(np.float32),
        "plan": plan.tensor(),
    }
    attributes = {"layout": WEIGHT_LAYOUT}
    return Node("MatMulIntegerToFloat", attributes, list(inputs.values()), [matmul_integer_to_float(**inputs)])


@pytest.mark.parametrize("dtype", CODES)
def test_given_codes(check, dtype):
    nodes = []
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    rng = np.random.default_rng(2)
    sizes = [(1, 1, 1, 1), (3, 31, 15, 32), (4, 32, 16, 32), (5, 33, 17, 32), (11, 131, 35, 64), (9, 300, 19, 128)]
    for rows, k, n, block in [*sizes, (2, 40, 20, 7), (13, 100, 40, 100)]:
        for bits in (2, 4, 8):
            for groups in (1, -(-k // block)):
                a = rng.integers(low, high + 1, (rows, k)).astype(dtype)
                w = rng.integers(0, 2**bits, (k, n)).astype(np.uint8)
                w_zero_points = rng.integers(0, 256, (groups, n))
                zero_points = (low, (low + high + 1) // 2, high)
                nodes += [codes_product(a, z, w, w_zero_points, block, bits=bits) for z in zero_points]
    check(nodes)


@pytest.mark.parametrize("dtype", CODES)
def test_largest_sums_of_given_codes(check, dtype):
    """The farthest codes from the farthest zero points, in the longest group: just within int32."""
    nodes = []
    low, high, k = np.iinfo(dtype).min, np.iinfo(dtype).max, LONGEST_GROUP
    pairs = [(low, high), (high, low), (low, low), (low, 0), (high, 0), (high - 100, (high + low) // 2)]
    for code, zero_point in pairs:
        for weight in (0, 127, 128, 255):
            w, w_zero_points = np.full((k, 17), weight, np.uint8), np.full((1, 17), 255 - weight)
            nodes.append(codes_product(np.full((7, k), code, dtype), zero_point, w, w_zero_points, k))
    check(nodes)


# ---- msd.Attention ------------------------------------------------------------------------------------------------

SCALES = ["tensor", "channel", "dynamic"]


def attended(case: attention_support.Case) -> Node:
    attributes = {
        "layout": CACHE_LAYOUT,
        "cache": case.plan.kind,
        "output_dtype": np_dtype_to_tensor_dtype(case.dtype),
    }
    expected: Attended = case.reference()
    return Node("Attention", attributes, list(case.operands.values()), expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_head_sizes(check, bits):
    nodes = []
    for columns in (1, *around(16), 64, 80, 128, 512):
        for i, scales in enumerate(SCALES):
            sizes = {"columns": columns, "value_columns": (columns, 24, 33)[(columns + i) % 3], "bits": bits}
            nodes += [attended(make_case(scales=scales, group=group, **sizes)) for group in (1, 3, 6)]
    check(nodes)


@pytest.mark.parametrize("scales", SCALES)
def test_tokens(check, scales):
    nodes = []
    for past in (0, 1, 2, 3, 4, *around(16)[1:], 255, 256, 257, 515):
        for queries, new in [(1, 1), (1, 0), (3, 3), (5, 2)]:
            sizes = {"past": past, "queries": queries, "new": new, "heads": 2, "group": 2}
            nodes += [attended(make_case(scales=scales, causal=causal, **sizes)) for causal in (True, False)]
    check(nodes)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("queries", [1, 2, 3, 17])
def test_rows(check, scales, queries):
    sizes = {"queries": queries, "past": 270, "columns": 32}
    check(attended(make_case(group=group, scales=scales, **sizes)) for group in (*around(4)[:-1], 7, 8))


@pytest.mark.parametrize("dtype", FLOATS)
def test_attention_of_float_types(check, dtype):
    nodes = []
    for scales in SCALES:
        for queries, columns in [(1, 16), (4, 19), (9, 64)]:
            sizes = {"queries": queries, "columns": columns, "dtype": dtype}
            nodes += [attended(make_case(scales=scales, bits=bits, **sizes)) for bits in (8, 4)]
    check(nodes)


@pytest.mark.parametrize("kind", attention_support.MASK_KINDS)
def test_masks_caps_windows(check, kind):
    nodes = []
    for i, shape in enumerate(attention_support.MASK_SHAPES):
        mask = attention_support.mask_of(kind, shape)
        for scales in ("channel", "dynamic"):
            for cap in (0, 5, 50):
                case = make_case(
                    batch=2,
                    heads=2,
                    group=2,
                    queries=5,
                    past=300,
                    mask=mask,
                    cap=cap,
                    scales=scales,
                    causal=i % 2 == 0,
                    window=(0, 1, 100)[i % 3],
                    sinks=[-3, 0.5, 40, -np.inf],
                )
                nodes.append(attended(case))
    check(nodes)


@pytest.mark.parametrize("bits", [8, 4])
def test_caches(check, bits):
    nodes = []
    for scales in SCALES:
        for columns in (16, 20):
            for lengths in ([0, 255, 511], [250, 0, 500]):
                for kind in ({}, {"shared": True}, {"grow": True}):
                    case = make_case(
                        batch=3, queries=6, past=520, lengths=lengths, scales=scales, bits=bits, columns=columns, **kind
                    )
                    nodes.append(attended(case))
    for scales in ("tensor", "dynamic"):  # so long that the cache is shared out
        case = make_case(group=4, past=4500, lengths=[4400], shared=True, scales=scales, bits=bits)
        nodes.append(attended(case))
    check(nodes)


@pytest.mark.parametrize("scales", SCALES)
def test_largest_attention_sums(check, scales):
    """512 products of the largest codes, and a tile of probabilities 1: the edge of int32."""
    nodes = []
    case = make_case(past=300, columns=512, queries=3, scales=scales)
    for code in (-128, 127):
        for sign in (1, -1):
            extreme = case.but(
                query=np.full_like(case.operands["query"], sign * 3.5),
                past_key=np.full_like(case.operands["past_key"], code),
                past_value=np.full_like(case.operands["past_value"], code),
            )
            nodes.append(attended(extreme))
    check(nodes)


@pytest.mark.parametrize("scales", SCALES)
def test_attention_guards(check, scales):
    nodes = []
    for dtype in (np.float32, np.float16):
        case = make_case(past=300, queries=12, heads=2, scales=scales, dtype=dtype, columns=20)
        q, k, v = (case.operands[name] for name in attention_support.INPUTS[:3])
        q[0, 0, 1, 3], q[0, 0, 2, 9], q[0, 0, 3, 0] = np.nan, np.inf, -np.inf
        q[0, 0, 4] = 0
        q[0, 1, 0] = 6e4 if dtype == np.float16 else 1e30
        k[0, 0, 5, 2], v[0, 1, 6, 1], v[0, 1, 8, 0] = np.nan, np.inf, np.nan
        k[0, 1, 7], v[0, 0, 7] = 0, 0
        if dtype == np.float32:
            q[0, 1, 1], q[0, 1, 2, :4], k[0, 1, 3], v[0, 1, 3] = 2.0**-101, 1e-40, 1e-40, 2.0**-100
        nodes.append(attended(case))
    case = make_case(past=300, queries=3, scales=scales, columns=18)
    for value in (np.nan, np.inf, -np.inf, 0, -2.5, 1e-40):
        for name in ("key_scale", "value_scale"):
            changed = case.operands[name].copy()
            changed[0, 0, -1, -1] = value
            nodes.append(attended(case.but(**{name: changed})))
        mask = np.zeros((1, 1, 3, 303), np.float32)
        mask[0, 0, 1, 7] = value
        nodes.append(attended(case.but(mask=mask)))
        nodes.append(attended(case.but(sinks=np.array([value], np.float32))))
    check(nodes)


def test_far_logits(check):
    """Tiles whose maxima are far apart, in either order: exp reaches 0 on both sides."""
    nodes = []
    for scale in (3, -3, 0.1, 1e4):
        case = make_case(past=800, queries=2, scale=scale, columns=16)
        ramp = np.linspace(-128, 127, 800).astype(np.int8)[None, None, :, None]
        case = case.but(past_key=np.broadcast_to(ramp, case.operands["past_key"].shape).copy())
        nodes.append(attended(case.but(query=np.ones_like(case.operands["query"]))))
    check(nodes)
