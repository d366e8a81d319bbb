"""Models of any size: how much memory they take, and external data as odd as the format allows."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support import activation, model, weight

import msd_compiler
from msd_compiler import api
from msd_compiler.errors import ModelError
from msd_compiler.report import Outcome
from msd_compiler.source import load, nbytes, release

RECIPE = Path(__file__).parents[2] / "models/large.py"
MB = 10**6


def _load_recipe():
    spec = importlib.util.spec_from_file_location("large", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses looks for it
    spec.loader.exec_module(module)
    return module


recipe = _load_recipe()
FORMATS = ["int8", "int4"]


def small(format, **more):
    return recipe.Parameters(**{"gigabytes": 0.02, "format": format, "hidden": 512, "intermediate": 1376, **more})


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# --- the recipe ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_recipe(tmp_path, format):
    parameters = small(format)
    for folder in ("a", "b"):
        recipe.write(tmp_path / folder, parameters)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert recipe.write(tmp_path / "c", small(format, seed=1)).read_bytes() == (tmp_path / "a/large.onnx").read_bytes()
    assert (tmp_path / "c/large.data").read_bytes() != (tmp_path / "a/large.data").read_bytes()
    source = load(tmp_path / "a")
    codes = sum(nbytes(t) for t in source.proto.graph.initializer if t.name.endswith("weight"))
    assert 0.02e9 <= codes < 0.022e9
    assert (tmp_path / "a/large.onnx").stat().st_size < 64 * 1024


@pytest.mark.parametrize("format", FORMATS)
def test_recipe_compiles_and_stays_finite(tmp_path, format):
    source = recipe.write(tmp_path, small(format))
    done = msd_compiler.compile(source, tmp_path / "out.onnx")
    assert done.report.summary.rewritten == len(list(recipe.layer_sizes(small(format))))
    assert done.report.verification.passed
    x = activation((4, 512))
    y = msd_compiler.session(done.path).run(None, {"x": x})[0]
    assert 0.3 < y.std() / x.std() < 3


# --- memory --------------------------------------------------------------------------------------------------------


def peak_mb(*arguments):
    """Largest resident memory of a run of the command."""
    command = [sys.executable, "-m", "msd_compiler", *map(str, arguments)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    return usage.ru_maxrss * 1024 / MB


@pytest.fixture(scope="module")
def start_mb(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return peak_mb(
        "compile", recipe.write(folder, small("int8", gigabytes=0, hidden=64, intermediate=64)), "--no-verify"
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize(("format", "tensors"), [("int8", 2.0), ("int4", 3.0)])
def test_peak_memory_is_a_matter_of_the_largest_tensor(tmp_path, monkeypatch, start_mb, format, tensors):
    """int8: codes and packed codes; int4: codes one to a byte, and packed."""
    parameters = small(format, gigabytes=0.3, hidden=4096, intermediate=36608 * (1 if format == "int8" else 2))
    source = recipe.write(tmp_path / "source", parameters)
    proto = load(source).proto
    largest = max(nbytes(t) for t in proto.graph.initializer) / MB
    assert largest > 140
    out = tmp_path / "out.onnx"
    peak = peak_mb("compile", source, "-o", out, "--no-verify")
    print(peak, start_mb, largest)
    assert peak < start_mb + tensors * largest + 80
    one = {p.name: p.stat().st_size for p in tmp_path.glob("out.*")}
    assert sum(one.values()) < 1.3 * (tmp_path / "source/large.data").stat().st_size
    monkeypatch.setattr(api, "WHOLE_UP_TO", 0)
    msd_compiler.compile(source, out)
    assert {p.name: p.stat().st_size for p in tmp_path.glob("out.*")} == one  # a digest of the content is in the name


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize("format", FORMATS)
def test_peak_memory_does_not_grow_with_the_number_of_layers(tmp_path, format):
    peaks = []
    for name, gigabytes in (("a", 0.05), ("b", 0.4)):
        source = recipe.write(tmp_path / name, small(format, gigabytes=gigabytes, hidden=2048, intermediate=5504))
        peaks.append(peak_mb("compile", source, "--no-verify"))
    assert peaks[1] < peaks[0] + 30


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
@pytest.mark.parametrize("format", FORMATS)
def test_a_session_holds_no_second_copy(tmp_path, format):
    source = recipe.write(tmp_path, small(format, gigabytes=0.3, hidden=2048, intermediate=5504))
    done = msd_compiler.compile(source, tmp_path / "out.onnx", verify=False)
    script = """
import sys, numpy as np, msd_compiler
def private():
    return sum(int(l.split()[1]) for l in open("/proc/self/smaps_rollup") if l.startswith("Private_Dirty")) / 1000
before = private()
session = msd_compiler.session(sys.argv[1])
session.run(None, {"x": np.ones((2, 2048), np.float32)})
print(private() - before)
"""
    said = subprocess.run([sys.executable, "-c", script, done.path], capture_output=True, text=True, check=True)
    assert float(said.stdout) < 30


def test_layer_by_layer(tmp_path, monkeypatch):
    monkeypatch.setattr(api, "WHOLE_UP_TO", 0)
    for format in FORMATS:
        source = recipe.write(tmp_path / format, small(format))
        done = msd_compiler.compile(source, tmp_path / f"{format}.onnx")
        assert len(done.report.verification.sites) == done.report.summary.rewritten
        assert done.report.verification.passed


def test_released_pages_are_read_again(tmp_path):
    source = load(recipe.write(tmp_path, small("int8")))
    array = source.array(source.proto.graph.initializer[0])
    before = array.copy()
    release(array)
    release(array[1:, ::2].T)
    release(before)
    assert np.array_equal(array, before)


# --- external data -------------------------------------------------------------------------------------------------

K, N = 48, 40


def placed(folder: Path, data: bytes, places: dict, text: str, name="model.onnx", **tensors) -> Path:
    """A model whose initializers lie in ``data`` at the offsets given: name -> (type, shape, offset)."""
    (folder / "data").write_bytes(data)
    proto = model(text, **tensors)
    for tensor_name, (data_type, shape, offset) in places.items():
        tensor = TensorProto(name=tensor_name, data_type=data_type, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", "data"), ("offset", offset), ("length", nbytes(tensor))):
            tensor.external_data.add(key=key, value=str(value))
        proto.graph.initializer.append(tensor)
    (folder / name).write_bytes(proto.SerializeToString())
    return folder / name


TWO = """(float[3,48] x) => (float[3,40] y, float[3,40] z)
         { d = DequantizeLinear(w, s)  y = MatMul(x, d)  e = DequantizeLinear(v, t)  z = MatMul(x, e) }"""


def embedded(file: Path) -> onnx.ModelProto:
    proto = onnx.load(file)
    for tensor in proto.graph.initializer:
        tensor.ClearField("data_location")
        del tensor.external_data[:]
    return proto


@pytest.mark.parametrize(
    ("w", "v", "s", "t"),
    [
        (0, 0, 4096, 4096),
        (0, 700, 4096, 4160),
        (3, 1001, 4097, 4099),
        (4101, 1, 4000, 4242),
        (6, 5, 4, 4),
    ],
    ids=["shared", "overlapping", "unaligned", "across", "codes are scales"],
)
@pytest.mark.parametrize("beside", [False, True])
def test_any_ranges(tmp_path, monkeypatch, w, v, s, t, beside):
    """Ranges shared, overlapping, at any byte: as if each tensor had its own."""
    if beside:
        monkeypatch.setattr(api, "EMBED_UP_TO", 0)
    data = np.random.default_rng(0).uniform(0.01, 0.1, 2000).astype(np.float32).tobytes()
    if (s % 4, t % 4) != (0, 0):  # the same finite numbers, each at its own odd place
        buffer = bytearray(data)
        for offset in (s, t):
            buffer[offset : offset + 4 * N] = np.full(N, 0.05, np.float32).tobytes()
        data = bytes(buffer)
        if not np.isfinite(np.frombuffer(data[s : s + 4 * N], np.float32)).all():
            data = data[:s] + data[t : t + 4 * N] + data[s + 4 * N :]
    places = {
        "w": (TensorProto.INT8, (K, N), w),
        "v": (TensorProto.INT8, (K, N), v),
        "s": (TensorProto.FLOAT, (N,), s),
        "t": (TensorProto.FLOAT, (N,), t),
    }
    (tmp_path / "source").mkdir()
    file = placed(tmp_path / "source", data, places, TWO)
    out = tmp_path / "out.onnx"
    done = msd_compiler.compile(file, out, tolerance=1e-3)
    assert done.report.summary.rewritten == 2
    again = tmp_path / "again.onnx"
    msd_compiler.compile(embedded(file), again)
    x = {"x": activation((3, K))}
    for found, expected in zip(
        msd_compiler.session(out).run(None, x), msd_compiler.session(again).run(None, x), strict=True
    ):
        assert np.array_equal(found, expected)
    packed = [i for i in onnx.load(out).graph.initializer if i.name.endswith("msd.B")]
    assert len(packed) == (1 if w == v else 2)  # equal contents are stored once


@pytest.mark.parametrize("offset", [0, 1, 7])
def test_unaligned_int4(tmp_path, offset):
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.01, 0.1, N).astype(np.float32)
    data = rng.bytes(offset) + rng.bytes(K * N // 2) + scales.tobytes()
    places = {
        "w": (TensorProto.INT4, (K, N), offset),
        "s": (TensorProto.FLOAT, (N,), offset + K * N // 2),
    }
    text = "(float[3,48] x) => (float[3,40] y) { d = DequantizeLinear(w, s)  y = MatMul(x, d) }"
    file = placed(tmp_path, data, places, text)
    found = msd_compiler.compile(file).model
    assert found.graph.initializer == msd_compiler.compile(embedded(file)).model.graph.initializer


@pytest.mark.parametrize("shape", [(0, N), (K, 0), (0, 0)])
def test_dims_of_0(tmp_path, shape):
    data = np.full(N, 0.05, np.float32).tobytes()
    places = {
        "w": (TensorProto.INT8, shape, len(data)),  # nothing, at the file's end
        "s": (TensorProto.FLOAT, shape[1:], 0),
    }
    text = f"(float[3,{shape[0]}] x) => (float[3,{shape[1]}] y) {{ d = DequantizeLinear(w, s)  y = MatMul(x, d) }}"
    file = placed(tmp_path, data, places, text)
    done = msd_compiler.compile(file, tmp_path / "out.onnx", verify=False)
    (row,) = done.report.sites
    assert (row.outcome, row.reason) == (Outcome.KEPT, "weight 'w' is empty") or row.outcome == Outcome.UNSUPPORTED


MORE = 2**31


def limited(script: str, *arguments, megabytes=1024):
    """Run a script that may take so much memory and no more; its output."""
    header = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({megabytes * 2**20},) * 2)\n"
    command = [sys.executable, "-c", header + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


REFUSED = """
import sys, msd_compiler
try:
    msd_compiler.compile(sys.argv[1], sys.argv[1] + ".out", verify=False)
except msd_compiler.errors.MsdError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits")
@pytest.mark.parametrize("shape", [(MORE, 4), (4, MORE), (MORE, MORE)])
@pytest.mark.parametrize("data_type", [TensorProto.INT8, TensorProto.INT4])
def test_dims_of_2_to_the_31_that_the_file_does_not_hold(tmp_path, shape, data_type):
    places = {"w": (data_type, shape, 0)}
    text = "(float[3,K] x) => (float[3,M] y) { d = DequantizeLinear(w, s)  y = MatMul(x, d) }"
    file = placed(tmp_path, bytes(100), places, text, s=np.float32(0.1))
    assert f"external data of 'w' needs {nbytes_of(data_type, shape)} bytes" in limited(REFUSED, file)
    proto = onnx.load(file, load_external_data=False)
    (tensor,) = [t for t in proto.graph.initializer if t.name == "w"]
    tensor.CopyFrom(TensorProto(name="w", data_type=data_type, dims=shape, raw_data=bytes(100)))
    file.write_bytes(proto.SerializeToString())
    assert "cannot be read: 100 bytes are stored" in limited(REFUSED, file)


def nbytes_of(data_type, shape):
    return nbytes(TensorProto(data_type=data_type, dims=shape))


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits")
def test_sizes_of_2_to_the_31_in_attributes_and_signature(tmp_path):
    """Blocks, inputs and unread tensors of any length cost nothing."""
    node = helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0, block_size=MORE)
    proto = model(
        f"(float[3,48] x, float[{MORE},{MORE}] u) => (float[3,40] y) {{ y = MatMul(x, d) }}",
        **weight("int8", (K, N), (1, N)),
    )
    proto.graph.node.insert(0, node)
    proto.graph.value_info.append(helper.make_tensor_value_info("d", TensorProto.FLOAT, [K, N]))
    file = tmp_path / "m.onnx"
    file.write_bytes(proto.SerializeToString())
    assert limited(REFUSED, file) == ""
    found = msd_compiler.inspect(f"{file}.out")
    assert (found.summary.rewritten, found.sites[0].k, found.sites[0].n) == (1, K, N)


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits")
def test_inspecting_a_sparse_file_of_2_to_the_31(tmp_path):
    places = {"w": (TensorProto.INT8, (MORE, 16), 0)}
    text = f"(float[1,{MORE}] x) => (float[1,16] y) {{ d = DequantizeLinear(w, s)  y = MatMul(x, d) }}"
    file = placed(tmp_path, b"", places, text, s=np.float32(0.1))
    with (tmp_path / "data").open("wb") as data:
        data.truncate(MORE * 16)
    said = json.loads(
        limited("import sys, msd_compiler; print(msd_compiler.inspect(sys.argv[1]).model_dump_json())", file)
    )
    assert (said["sites"][0]["outcome"], said["sites"][0]["k"]) == ("rewritten", MORE)


def test_an_offset_beyond_the_file(tmp_path):
    places = {"w": (TensorProto.INT8, (K, N), MORE * 2**20)}
    text = "(float[3,48] x) => (float[3,40] y) { d = DequantizeLinear(w, s)  y = MatMul(x, d) }"
    with pytest.raises(ModelError, match="needs 1920 bytes at offset"):
        load(placed(tmp_path, bytes(10), places, text, s=np.float32(0.1)))


@pytest.mark.parametrize("format", FORMATS)
def test_same_result_from_external_and_embedded(tmp_path, format):
    file = recipe.write(tmp_path, small(format, gigabytes=0.001, hidden=256, intermediate=96))
    a = msd_compiler.compile(file, verify=False).model
    b = msd_compiler.compile(embedded(file), verify=False).model
    assert a.SerializeToString(deterministic=True) == b.SerializeToString(deterministic=True)
