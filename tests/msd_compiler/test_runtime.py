import os
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.parser import parse_model

from msd_compiler import runtime as module
from msd_compiler.errors import ModelError, MsdError, OptionError
from msd_compiler.runtime import RuntimeRefused, TimedOut, library_path, open_model, register, run, session

HEAD = '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>\n'
RELU = parse_model(HEAD + "g (float[2] x) => (float[2] y) { y = Relu(x) }").SerializeToString()
QUIET = {"portable": True, "log_severity_level": 4}

ENDLESS = {  # n iterations, or n elements, or n nodes: hours if nobody stops them
    "Loop": """g (int64 n, float[N,N] x) => (float[N,N] y) {
        c = Constant<value = bool {1}>()
        y = Loop<body: graph = b (int64 i, bool c1, float[N,N] a) => (bool c2, float[N,N] p) {
            c2 = Identity(c1)  p = MatMul(a, x) }>(n, c, x) }""",
    "Loop in If in Loop": """g (int64 n, float[N,N] x) => (float[N,N] y) {
        c = Constant<value = bool {1}>()
        two = Constant<value = int64 {2}>()
        y = Loop<body: graph = outer (int64 i, bool c1, float[N,N] a) => (bool c2, float[N,N] p) {
            c2 = Identity(c1)
            p = If<then_branch: graph = t () => (float[N,N] q) {
                    q = Loop<body: graph = b (int64 j, bool d1, float[N,N] u) => (bool d2, float[N,N] v) {
                        d2 = Identity(d1)  v = MatMul(u, x) }>(n, c, a) },
                else_branch: graph = e () => (float[N,N] r) { r = Identity(a) }>(c1) }>(two, c, x) }""",
    "Scan": """g (int64 n, float[N,N] x) => (float[N,N] y) {
        row = Unsqueeze(n, zero)  zeros = Expand(z, row)
        y, rest = Scan<num_scan_inputs = 1, body: graph = b (float[N,N] a, float s) => (float[N,N] p, float o) {
            p = MatMul(a, x)  o = Identity(s) }>(x, zeros) }""",
}


def endless(kind):
    model = parse_model(HEAD + ENDLESS[kind])
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.zeros(1, np.int64), "zero"),
            numpy_helper.from_array(np.float32(0), "z"),
        ]
    )
    return model


def feed(n, size=32):
    return {"n": np.array(n, np.int64), "x": np.eye(size, dtype=np.float32)}


def test_opens_path_and_bytes(tmp_path):
    file = tmp_path / "m.onnx"
    file.write_bytes(RELU)
    for model in (file, str(file), RELU):
        (y,) = session(model, **QUIET).run(None, {"x": np.array([-1, 2], np.float32)})
        assert y.tolist() == [0, 2]


def test_passes_options_on():
    opened = session(
        RELU,
        portable=True,
        intra_op_num_threads=1,
        graph_optimization_level=onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
        config={"session.disable_prepacking": "1"},
        providers=["CPUExecutionProvider"],
    )
    options = opened.get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert options.get_session_config_entry("session.disable_prepacking") == "1"
    assert opened.get_providers() == ["CPUExecutionProvider"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"intra_op_threads": 1}, "unknown session option 'intra_op_threads'; did you mean intra_op_num_threads"),
        ({"provider": []}, "unknown session option 'provider'; did you mean providers"),
        (
            {"register_custom_ops_library": "x"},
            "unknown session option 'register_custom_ops_library'; there are config, ",
        ),
        ({"zzz": 1}, "unknown session option 'zzz'; there are config, enable_cpu_mem_arena, "),
        ({"intra_op_num_threads": "2"}, "session option intra_op_num_threads is '2'; it must be int"),
        ({"graph_optimization_level": 0}, "graph_optimization_level is 0; it must be GraphOptimizationLevel"),
        (
            {"config": {"session.disable_prepacking": 1}},
            "config entry 'session.disable_prepacking': 1 must be two strings",
        ),
        ({"config": {"": "1"}}, "config entry '': '1': Config key is empty or longer than maximum length"),
        ({"providers": ["CpuProvider"]}, "provider 'CpuProvider' is not in this onnxruntime, which has "),
        ({"providers": [("CpuProvider", {})]}, "provider 'CpuProvider' is not in this onnxruntime, which has "),
    ],
)
def test_refuses_options(options, message, capfd):
    for opening in (
        lambda: session(RELU, portable=True, **options),
        lambda: open_model(onnx.ModelProto(), Path(), **options),
    ):
        with pytest.raises(OptionError) as refusal:
            opening()
        assert message in str(refusal.value)
        assert "\n" not in str(refusal.value)
    assert capfd.readouterr() == ("", "")


def test_refuses_a_proto():
    with pytest.raises(OptionError, match="needs a path or bytes, found ModelProto; `open_model` takes a ModelProto"):
        session(onnx.ModelProto(), portable=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("g (float[2] x) => (float[2] y) { y = Relu(z) }", "Node input 'z' is not a graph input, initializer"),
        ("g (float[2] x) => (int64[2] y) { y = Relu(x) }", "Type (tensor(int64)) of output arg (y) of node"),
        (
            "g (bfloat16[2,2] x) => (bfloat16[2,2] y) { y = MatMul(x, x) }",
            "Could not find an implementation for MatMul(13)",
        ),
    ],
)
def test_refused_by_the_runtime(text, message, capfd):
    with pytest.raises(RuntimeRefused) as refusal:
        open_model(parse_model(HEAD + text), Path(), name="'m.onnx'", **QUIET)
    assert str(refusal.value).startswith(f"onnxruntime {onnxruntime.__version__} refuses 'm.onnx': ")
    assert message in str(refusal.value)
    assert isinstance(refusal.value, MsdError)
    assert capfd.readouterr() == ("", "")


def test_refused_file_is_named(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    with pytest.raises(RuntimeRefused, match=r"m.onnx': .*[Pp]rotobuf parsing failed"):
        session(tmp_path / "m.onnx", **QUIET)
    with pytest.raises(RuntimeRefused, match=r"absent.onnx': .* failed. File doesn't exist"):
        session(tmp_path / "absent.onnx", **QUIET)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (
            "[ONNXRuntimeError] : 1 : FAIL : /onnxruntime_src/onnxruntime/core/graph/model.cc:256 onnxruntime::Model::"
            "Model(onnx::ModelProto&&, const PathString&, const ModelOptions&) Unsupported model IR version: 99\n",
            "Unsupported model IR version: 99",
        ),
        (
            "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Exception during initialization: /onnxruntime_src/onnxruntime/"
            "contrib_ops/cpu/q.cc:92 onnxruntime::Q<T1>::Q(const OpKernelInfo&) [with T1 = float] nbits_ == 4 was false. ",
            "Exception during initialization: nbits_ == 4 was false.",
        ),
        ("\x1b[1;31mbad\x1b[m graph\nStacktrace:\n#0 main", "bad graph"),
        ("a\n  b (c) d", "a b (c) d"),
    ],
)
def test_messages_are_one_line(raw, clean):
    assert module._one_line(Exception(raw)) == clean


# external data


def external(name, location, values):
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=values.shape, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": "64", "length": str(values.nbytes)}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


@pytest.fixture
def spread(tmp_path):
    """A model with external data in two files, in a nested graph too, and a small and a large embedded initializer."""
    text = """g (float[512] x, bool c) => (float[512] y) {
        t = Add(x, w)  u = Add(t, e)  v = Mul(u, two)
        y = If<then_branch: graph = t () => (float[512] a) { a = Add(v, n) },
               else_branch: graph = f () => (float[512] b) { b = Identity(v) }>(c) }"""
    model = parse_model(HEAD + text)
    w, n, e = (np.arange(512, dtype=np.float32) * k for k in (1, 10, 100))
    (tmp_path / "sub").mkdir()
    for location, values in (("w.data", w), ("sub/model.onnx", n)):
        (tmp_path / location).write_bytes(bytes(64) + values.tobytes())
    model.graph.initializer.extend(
        [external("w", "w.data", w), numpy_helper.from_array(e, "e"), numpy_helper.from_array(np.float32(2), "two")]
    )
    branch = next(a.g for a in model.graph.node[-1].attribute if a.name == "then_branch")
    branch.initializer.append(external("n", "sub/model.onnx", n))
    return model, tmp_path, (w + e) * 2 + n


@pytest.mark.parametrize("limit", [1 << 28, 0])
@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
def test_open_model_with_external_data(spread, limit, level, monkeypatch):
    model, folder, expected = spread
    monkeypatch.setattr(module, "_EMBEDDED_LIMIT", limit)
    monkeypatch.chdir("/")
    before = model.SerializeToString(deterministic=True)
    files = sorted(folder.rglob("*"))
    opened = open_model(
        model, folder, graph_optimization_level=getattr(onnxruntime.GraphOptimizationLevel, level), **QUIET
    )
    (y,) = opened.run(None, {"x": np.zeros(512, np.float32), "c": np.array(True)})
    assert np.array_equal(y, expected)
    assert model.SerializeToString(deterministic=True) == before
    assert sorted(folder.rglob("*")) == files


def test_open_model_in_a_relative_folder(spread, monkeypatch):
    model, folder, expected = spread
    monkeypatch.chdir(folder.parent)
    (y,) = open_model(model, Path(folder.name), **QUIET).run(
        None, {"x": np.zeros(512, np.float32), "c": np.array(True)}
    )
    assert np.array_equal(y, expected)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("gone.data", "external data of 'w' is in 'gone.data', which does not exist"),
        ("../w.data", "it must be a relative path without '..'"),
        ("/w.data", "it must be a relative path without '..'"),
    ],
)
def test_open_model_with_bad_external_data(spread, location, message):
    model, folder, _ = spread
    model.graph.initializer[0].external_data[0].value = location
    with pytest.raises(ModelError, match=message):
        open_model(model, folder, **QUIET)


TYPES = [
    TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BOOL, TensorProto.INT8, TensorProto.INT32,
    TensorProto.INT64, TensorProto.UINT8, TensorProto.UINT64, TensorProto.INT4, TensorProto.UINT4, TensorProto.STRING,
]  # fmt: skip


@pytest.mark.parametrize("data_type", TYPES, ids=TensorProto.DataType.Name)
def test_large_initializers_of_every_type(data_type, monkeypatch):
    monkeypatch.setattr(module, "_EMBEDDED_LIMIT", 0)
    values = np.arange(3000) % (2 if data_type == TensorProto.BOOL else 7)
    model = parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g () => (float[3000] y) { t = DequantizeLinear(w, one)  y = Identity(t) }'
    )
    if data_type not in (TensorProto.INT4, TensorProto.UINT4):
        model.graph.node[0].CopyFrom(helper.make_node("Cast", ["w"], ["t"], to=TensorProto.FLOAT))
    typed = values.astype(helper.tensor_dtype_to_np_dtype(data_type))
    if data_type == TensorProto.STRING:
        typed = values.astype(str).astype(object)
    model.graph.initializer.extend([numpy_helper.from_array(np.float32(1), "one"), numpy_helper.from_array(typed, "w")])
    # onnxruntime 1.24 cannot fold constants from large string initializers
    off = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    (y,) = open_model(model, Path(), graph_optimization_level=off, **QUIET).run(None, {})
    assert np.array_equal(y, values)


def test_large_initializers_outlive_the_model(monkeypatch):
    monkeypatch.setattr(module, "_EMBEDDED_LIMIT", 0)
    model = parse_model(HEAD + "g (float[1000,1000] x) => (float[1000,1000] y) { y = Add(x, w) }")
    model.graph.initializer.append(numpy_helper.from_array(np.full((1000, 1000), 7, np.float32), "w"))
    opened = open_model(model, Path(), **QUIET)
    del model
    _ = [np.zeros((1000, 1000), np.float32) for _ in range(20)]
    (y,) = opened.run(None, {"x": np.zeros((1000, 1000), np.float32)})
    assert (y == 7).all()


# the native library

needs_library = pytest.mark.skipif(not os.path.isfile(library_path()), reason="the native library is not built")


@needs_library
def test_registers_once():
    options = onnxruntime.SessionOptions()
    register(options)
    register(options)
    onnxruntime.InferenceSession(RELU, options, providers=["CPUExecutionProvider"])


@needs_library
def test_sessions_have_the_native_kernels():
    session(RELU)
    open_model(onnx.ModelProto.FromString(RELU), Path())


def test_library_that_does_not_load(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "library_path", lambda: tmp_path / "absent.so")
    with pytest.raises(RuntimeRefused, match=r"native library '.*absent.so' does not load: Failed to load library"):
        session(RELU)
    session(RELU, portable=True)


# deadlines


@pytest.mark.parametrize("kind", ENDLESS)
@pytest.mark.parametrize("mode", ["ORT_SEQUENTIAL", "ORT_PARALLEL"])
def test_deadline(kind, mode, capfd):
    opened = open_model(endless(kind), Path(), execution_mode=getattr(onnxruntime.ExecutionMode, mode), portable=True)
    began = time.monotonic()
    with pytest.raises(TimedOut, match=r"the run was stopped after 0\.\d s; 0.1 s were allowed"):
        run(opened, None, feed(10**7), 0.1)
    assert time.monotonic() - began < 1  # one 32 x 32 product may be finished first
    (y,) = run(opened, ["y"], feed(3), 60)
    assert np.array_equal(y, np.eye(32))
    assert "terminate" not in capfd.readouterr().err


def test_deadline_between_nodes():
    nodes = "".join(f" t{i + 1} = MatMul(t{i}, x) " for i in range(3000))
    model = parse_model(HEAD + f"g (float[N,N] x) => (float[N,N] y) {{ t0 = Identity(x) {nodes} y = Identity(t3000) }}")
    opened = open_model(model, Path(), **QUIET)
    with pytest.raises(TimedOut):
        run(opened, None, {"x": np.eye(256, dtype=np.float32)}, 0.1)
    assert run(opened, None, {"x": np.eye(2, dtype=np.float32)}, 60)[0].tolist() == [[1, 0], [0, 1]]


def test_no_deadline():
    opened = session(RELU, **QUIET)
    threads = threading.active_count()
    for seconds in (None, 1e9):
        assert run(opened, None, {"x": np.array([-1, 2], np.float32)}, seconds)[0].tolist() == [0, 2]
    assert threading.active_count() == threads


def test_deadline_that_is_over():
    with pytest.raises(TimedOut, match="no time was left"):
        run(session(RELU, **QUIET), None, {}, 0)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "cannot run it: Required inputs (['x']) are missing"),
        ({"x": np.zeros(2)}, "cannot run it: Unexpected input data type"),
        ({"x": np.zeros(3, np.float32)}, "cannot run it: Got invalid dimensions for input: x"),
    ],
)
@pytest.mark.parametrize("seconds", [None, 60])
def test_run_refused(inputs, message, seconds):
    with pytest.raises(RuntimeRefused) as refusal:
        run(session(RELU, **QUIET), None, inputs, seconds)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
