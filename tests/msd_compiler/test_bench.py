"""What `msd bench` measures, on sizes that take no time."""

from __future__ import annotations

import ctypes
import errno
import io
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from msd_compiler.models import TINY_LLAMA
from onnx import numpy_helper
from rich.console import Console
from support import model, nbits_weight, runs_opset

import msd_compiler
from msd_compiler import MsdError, OptionError, OutputError, cli
from msd_compiler.bench import (
    AttentionGrid,
    AttentionReport,
    DecodeReport,
    DecodersGrid,
    Effort,
    LinearGrid,
    LinearReport,
    ModelsReport,
    Report,
    bench_attention,
    bench_decode,
    bench_linear,
    bench_models,
    plot,
    view,
)
from msd_compiler.bench import linear as linear_module
from msd_compiler.bench.attention import WAYS as ATTENTION_WAYS
from msd_compiler.bench.decode import UNITS
from msd_compiler.bench.decode import _open as open_decoder
from msd_compiler.bench.decoding import DecodeGrid, time_decoding
from msd_compiler.bench.linear import AS_INT8, INT4, OPENVINO, OURS, PORTABLE, WAYS, Layer, Weight
from msd_compiler.bench.llama import DEQUANTIZE, LEVEL_0, LEVEL_4, Llama, write
from msd_compiler.bench.machine import Limits, measure_limits
from msd_compiler.bench.openvino import is_installed
from msd_compiler.bench.profile import site_times
from msd_compiler.bench.timing import LEAST_RUNS, Time, in_turns
from msd_compiler.doctor import isa_names
from msd_compiler.runtime import RuntimeRefused, library_path, runtime_version, session

GRAPH = """(float[M, 64] x) => (float[M, 48] y) {
    y = com.microsoft.MatMulNBits <K = 64, N = 48, bits = 4, block_size = 32, accuracy_level = 4> (x, b, s)
}"""
QUICK = Effort(runs=3, seconds=0, grid=DecodeGrid(prompt=16, cached=(8, 16)), starts=1)
GRID = LinearGrid(
    rows=(1, 3),
    shapes=((256, 96),),
    ramp=((256, 48), (128, 96)),
    ramp_rows=(1, 2),
    read_bytes=2**16,
)
(MXFP4,) = (weight for weight in GRID.weights if weight.is_float)
BESIDE_FLOAT4 = [
    "MatMul float32",
    "DequantizeLinear -> MatMul as int8",
    "MatMulNBits level 0 as int8",
    "MatMulNBits level 4 as int8",
    OURS.name,
    PORTABLE.name,
]
LLAMA = Llama(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=96, vocabulary=128, block=32, positions=64, seed=1)
RUNTIME = runtime_version()


@pytest.fixture(scope="module")
def layer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "layer.onnx"
    onnx.save_model(model(GRAPH, **nbits_weight(64, 48, 32)), path)
    return path


@pytest.fixture(scope="module")
def decoders() -> ModelsReport:
    return bench_models(TINY_LLAMA, threads=1, effort=QUICK)


@pytest.fixture(scope="module")
def products() -> LinearReport:
    return bench_linear(runs=3, seconds=0, portable=True, grid=GRID)


def shown(report: Report) -> str:
    console = Console(width=80, file=io.StringIO())
    console.print(view(report))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    return text


# --- time ----------------------------------------------------------------------------------------------------------


def test_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = in_turns(calls, runs=4, seconds=60, warm_ups=1)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert [t.runs for t in times.values()] == [4] * 3


def test_no_turn_begins_when_the_time_is_over():
    times = in_turns({"a": lambda: time.sleep(1e-3)}, runs=1000, seconds=0)
    assert times["a"].runs == LEAST_RUNS


def test_quartiles():
    found = Time.of([0.004, 0.001, 0.002, 0.005, 0.003])
    assert (found.first_quartile_ms, found.median_ms, found.third_quartile_ms) == pytest.approx((2, 3, 4))
    assert Time.of([0.001]).third_quartile_ms == 1


# --- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_limits(threads):
    found = measure_limits(threads, 2**22)
    assert 1e8 < found.read_bytes_per_second < 1e13
    assert all(1e8 < rate < 1e14 for rate in found.operations_per_second.values())


def test_loops_of_every_instruction_set():
    library = ctypes.CDLL(str(library_path()))
    try:
        for name in isa_names(library_path()):
            assert library.msd_select_isa(name.encode()) == 1
            found = measure_limits(1, 2**16).operations_per_second
            assert found.keys() == (set() if name == "scalar" else {"float32", "int16", "int8"})
    finally:
        library.msd_select_isa(b"")


def test_limits_need_the_library(monkeypatch, tmp_path):
    old = tmp_path / "old.so"
    monkeypatch.setattr("msd_compiler.bench.machine.library_path", lambda: old)
    with pytest.raises(RuntimeRefused, match=r"old\.so"):
        measure_limits()
    monkeypatch.setattr("ctypes.CDLL", lambda path: object())
    with pytest.raises(RuntimeRefused, match=r"old.so' is an old one: it has no msd_multiply_add and msd_read; build"):
        measure_limits()


def test_share_of_the_limit():
    limits = Limits(operations_per_second={"int16": 100.0}, read_bytes_per_second=10.0, last_cache_bytes=0)
    computes = limits.reached(2.0, "int16", operations=120, size=5)
    assert (computes.share, computes.by, computes.compute_share, computes.memory_share) == (0.6, "int16", 0.6, 0.25)
    reads = limits.reached(2.0, "int16", operations=10, size=15)
    assert (reads.share, reads.by) == (0.75, "memory")
    unknown = limits.reached(2.0, "int8", operations=10, size=15)
    assert (unknown.share, unknown.by, unknown.compute_share) == (0.75, "memory", None)
    assert limits.least_seconds("int16", 120, 5) == 1.2
    assert limits.least_seconds("int8", 120, 5) == 0.5
    assert limits.best(limits.model_copy(update={"read_bytes_per_second": 20.0})).read_bytes_per_second == 20


# --- models --------------------------------------------------------------------------------------------------------


def test_source_and_result(decoders):
    assert decoders.models == {"tiny_llama.onnx": str(TINY_LLAMA), "compiled": None}
    assert decoders.setting.threads == 1
    assert not decoders.notes
    assert [(r.inputs, r.model) for r in decoders.runs] == [
        (inputs, label) for inputs in ("prefill", "decode") for label in decoders.models
    ]
    for row in decoders.runs:
        assert row.ratio > 0
        assert row.time.first_quartile_ms <= row.time.median_ms <= row.time.third_quartile_ms
        assert set(row.relative_l2) >= {"logits"}
        if row.model == "compiled":
            assert max(row.relative_l2.values()) < 1e-3
        else:
            assert row.ratio == 1


def test_decoding(decoders):
    cells = [(r.tokens, r.cached) for r in decoders.decoding if r.model == "compiled"]
    assert cells == [(16, 0), (1, 8), (1, 16)]
    for row in decoders.decoding:
        assert row.tokens_per_second == pytest.approx(1e3 * row.tokens / row.time.median_ms)
        assert row.ratio > 0


def test_fresh_processes(decoders):
    assert [row.model for row in decoders.fresh] == list(decoders.models)
    for row in decoders.fresh:
        assert row.open_ms > 0
        assert row.first_run_ms > 0
        if sys.platform == "linux":
            assert 2**20 < row.before_bytes < row.peak_bytes


def test_profiles(decoders):
    for row in decoders.profiles:
        assert len(row.top) == QUICK.top
        assert row.top == sorted(row.top, key=lambda site: -site.ms)
        assert 0 < sum(site.ms for site in row.top) <= row.nodes_ms
        assert 0 < sum(site.share for site in row.top) <= 1


def test_profile_leaves_the_first_run_out():
    def event(cat, name, ts, dur, **args):
        return {"cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}

    runs = [event("Session", "model_run", start, 90) for start in (0, 100, 200)]
    nodes = [
        event("Node", "a_kernel_time", ts, dur, op_name="A", node_index="1")
        for ts, dur in ((5, 80), (105, 10), (205, 30))
    ]
    nodes += [event("Node", "b_kernel_time", ts, 2, op_name="B", node_index="2") for ts in (101, 102, 201, 202)]
    found = site_times(runs + nodes)
    assert [(s.node, s.op, round(s.ms, 9)) for s in found] == [("a", "A", 0.02), ("b", "B", 0.004)]
    assert sum(s.share for s in found) == pytest.approx(1)


def test_screen(decoders):
    text = shown(decoders)
    for words in ("tiny_llama.onnx", "compiled", "16 after 0", "1 after 8", "in a fresh process", "longest nodes"):
        assert words in text


def test_json(decoders, products, steps, llamas):
    endless = steps.model_copy(update={"rows": [steps.rows[0].model_copy(update={"relative_l2": float("inf")})]})
    for report in (decoders, products, steps, llamas, endless):
        assert type(report).model_validate_json(report.model_dump_json()) == report


def test_given_models_and_inputs(layer, tmp_path):
    result = tmp_path / "layer.onnx"  # named like the source
    msd_compiler.compile(layer, result)
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    found = bench_models(layer, [result, result], inputs=msd_compiler.Feed("given", {"x": x}), effort=QUICK)
    assert list(found.models.values()) == [str(layer), str(result), str(result)]
    assert [row.inputs for row in found.runs] == ["given"] * 3
    assert found.runs[1].relative_l2["y"] == found.runs[2].relative_l2["y"] < 1e-4 < found.runs[0].relative_l2["y"]
    assert not found.decoding
    assert shown(found)


def test_other_inputs_are_timed_and_not_compared(layer, tmp_path):
    other = tmp_path / "other.onnx"
    onnx.save_model(model("(float[M, 8] z) => (float[M, 8] y) { y = Relu(z) }"), other)
    found = bench_models(layer, [other], effort=QUICK)
    assert found.runs[1].relative_l2 == {}
    assert found.notes == ["other.onnx has other inputs than layer.onnx: timed on its own, not compared"]


def test_given_inputs_are_checked(layer):
    with pytest.raises(OptionError, match=r"the inputs given are 'z'; layer.onnx takes 'x'"):
        bench_models(layer, inputs=msd_compiler.Feed("given", {"z": np.zeros((1, 64), np.float32)}), effort=QUICK)


@pytest.mark.parametrize("done", [True, False])
def test_alone(layer, tmp_path, done):
    path = tmp_path / "m.onnx"
    if done:
        msd_compiler.compile(layer, path)
    else:
        onnx.save_model(model("(float[M, 8] x) => (float[M, 8] y) { y = Relu(x) }"), path)
    found = bench_models(path, effort=QUICK)
    assert list(found.models) == ["m.onnx"]
    assert "timed alone" in found.notes[0]


def test_too_many_tokens_end_decoding(monkeypatch):
    def refuse(self, tokens, **_):
        raise MsdError("no more")

    monkeypatch.setattr("msd_compiler.Decoder.step", refuse)
    found = bench_models(TINY_LLAMA, threads=1, effort=QUICK)
    assert not found.decoding
    assert found.notes == ["decoding stops at 16 tokens: no more"]
    assert found.runs


# --- products ------------------------------------------------------------------------------------------------------


def test_products(products):
    ways = [way.name for way in (*WAYS, PORTABLE, *(OPENVINO if is_installed() else []))]
    for weight in GRID.weights:
        found = [r.way for r in products.rows if (r.k, r.n, r.m, r.weight) == (256, 96, 1, weight.name)]
        expected = [*BESIDE_FLOAT4, *(way.name + AS_INT8 for way in OPENVINO if is_installed()), "msd.MatMul int4"]
        if not weight.is_float:
            expected = ways
        elif not runs_opset(24):
            expected = [way for way in expected if way not in (OURS.name, PORTABLE.name)]
            assert any(note.startswith(f"{OURS.name}, {weight.name}: ") for note in products.notes)
        if weight is not INT4 and RUNTIME < (1, 22):  # no MatMulNBits of 8 bits
            expected = [way for way in expected if "NBits" not in way]
            assert any("MatMulNBits level 0" in note and weight.name in note for note in products.notes)
        assert found == expected
    for row in products.rows:
        assert row.ratio > 0
        limits, seconds = products.limits, row.time.median_ms / 1e3
        assert row.limit == limits.reached(seconds, row.unit, row.operations, row.stored_bytes)
        assert row.limit.share == pytest.approx(
            limits.least_seconds(row.unit, row.operations, row.stored_bytes) / seconds
        )
        assert row.relative_l2 < 0.05
        if row.way.startswith(OURS.name):
            assert row.relative_l2 < 1e-4
        if row.way == WAYS[0].name:
            assert row.ratio == 1
            assert row.relative_l2 < 1e-6
    assert {(r.k, r.n, r.m) for r in products.rows} == {
        *((256, 96, m) for m in GRID.rows),
        *((*shape, m) for shape in GRID.ramp for m in GRID.ramp_rows),
    }
    assert {r.m for r in products.rows if r.weight == MXFP4.name} == {1}  # of those that it is timed for
    text = shown(products)
    for words in ("256 x 96, int4 block 32", "256 x 96, mxfp4 block 32", "DequantizeLinear -> MatMul as int8"):
        assert words in text
    assert "256 x 48" not in text  # for the plot
    assert "% of limit at M =" in text


def test_float4_is_what_the_format_says():
    """The weight that we multiply, those that the others get, and the floats that say what is right."""
    layer = Layer.random(256, 32, MXFP4)
    spelled = linear_module._mxfp4(layer)
    codes, scales = (numpy_helper.to_array(t) for t in spelled.graph.initializer)
    assert (codes.dtype.name, scales.dtype.name) == ("float4_e2m1fn", "float8_e8m0fnu")
    assert len(np.unique(codes.astype(np.float32))) == 15
    means = codes.astype(np.float32) * scales.astype(np.float32).repeat(32, axis=0)
    np.testing.assert_array_equal(means, layer.floats)
    others = layer.as_int8()
    np.testing.assert_array_equal(others.codes * others.scales.repeat(32, axis=0), layer.floats)
    assert layer.stored_bytes == Layer.random(256, 32, INT4).stored_bytes == 256 * 32 // 2 + 4 * 8 * 32
    assert others.stored_bytes == 256 * 32 + 4 * 8 * 32
    model = linear_module._dequantized(others)
    assert [t.data_type for t in model.graph.initializer] == [onnx.TensorProto.INT8, onnx.TensorProto.FLOAT]


def test_a_runtime_without_opset_24_is_noted(monkeypatch):
    build = OURS.build

    def refuse(layer):
        if layer.weight.is_float:
            raise RuntimeRefused("no opset 24")
        return build(layer)

    ours = replace(OURS, build=refuse)
    monkeypatch.setattr(linear_module, "OURS", ours)
    monkeypatch.setattr(linear_module, "WAYS", (*WAYS[:-1], ours))
    monkeypatch.setattr(linear_module, "is_installed", lambda: False)
    grid = LinearGrid(rows=(1,), shapes=((128, 32),), weights=(MXFP4,), ramp=(), read_bytes=2**16)
    found = bench_linear(runs=3, seconds=0, grid=grid)
    assert "msd.MatMul, mxfp4 block 32: no opset 24" in found.notes
    assert found.rows[0].way == WAYS[0].name
    assert found.rows[-1].way == "msd.MatMul int4"
    assert OURS.name not in {row.way for row in found.rows}
    assert shown(found)


def test_openvino_that_does_not_load_is_noted(monkeypatch):
    monkeypatch.setattr(linear_module, "is_installed", lambda: True)
    monkeypatch.setitem(sys.modules, "openvino", None)
    grid = LinearGrid(rows=(1,), shapes=((128, 32),), weights=(Weight("int8", 8, None),), ramp=(), read_bytes=2**16)
    found = bench_linear(runs=3, seconds=0, grid=grid)
    assert not any(row.way.startswith("OpenVINO") for row in found.rows)
    notes = [note for note in found.notes if note.startswith("OpenVINO")]
    assert len(notes) == len(OPENVINO)
    assert notes[0].startswith("OpenVINO, int8: OpenVINO does not take it: import of openvino halted")


# --- decoders ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llamas() -> DecodeReport:
    grid = DecodersGrid(LLAMA, steps=DecodeGrid(16, (16,), buffers=True), starts=1, read_bytes=2**16)
    return bench_decode(runs=3, seconds=0, grid=grid)


def test_llamas(llamas):
    ways = [DEQUANTIZE, LEVEL_0, LEVEL_4, "compiled"]
    assert list(UNITS) == ways
    assert [d.weight for d in llamas.decoders] == ["int8 block 32", "int4 block 32"]
    assert llamas.shape["hidden"] == 64
    for decoder in llamas.decoders:
        known = ways
        if decoder.weight.startswith("int8") and RUNTIME < (1, 22):  # no MatMulNBits of 8 bits
            known = [DEQUANTIZE, "compiled"]
            assert any(note.startswith(f"{LEVEL_0}, int8 block 32: ") for note in llamas.notes)
        assert [(r.tokens, r.cached, r.model) for r in decoder.decoding] == [
            (*step, way) for step in ((16, 0), (1, 16)) for way in known
        ]
        assert [row.model for row in decoder.fresh] == known
        for row in decoder.decoding:
            assert row.tokens_per_second == pytest.approx(1e3 * row.tokens / row.time.median_ms)
            operations = 2 * llamas.weights * row.tokens
            seconds = row.time.median_ms / 1e3
            assert row.limit == llamas.limits.reached(seconds, UNITS[row.model], operations, decoder.stored_bytes)
            if LEVEL_0 not in known:
                assert row.relative_l2 is None
            elif row.model == "compiled":
                assert row.relative_l2 < 2e-4
            else:
                assert (row.relative_l2 == 0) == (row.model == LEVEL_0)
    text = shown(llamas)
    for words in ("int4 block 32, a prompt of 16 tokens", "int8 block 32, 1 token after 16", "limit %"):
        assert words in text


def test_a_disk_that_is_full(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("msd_compiler.bench.decode.write", full)
    with pytest.raises(OutputError, match=r"the decoder cannot be written to '.*': No space left on device"):
        bench_decode(grid=DecodersGrid(LLAMA, read_bytes=2**16))


def test_a_decoder_without_its_exact_spelling(monkeypatch):
    """As onnxruntime 1.20 has none of 8 bits."""

    def refuse(label, path, threads):
        if label == LEVEL_0:
            raise RuntimeRefused("no")
        return open_decoder(label, path, threads)

    monkeypatch.setattr("msd_compiler.bench.decode._open", refuse)
    grid = DecodersGrid(LLAMA, bits=(4,), steps=DecodeGrid(4, (4,)), starts=1, read_bytes=2**16)
    found = bench_decode(runs=3, seconds=0, grid=grid)
    assert found.notes == [f"{LEVEL_0}, int4 block 32: no"]
    assert {row.relative_l2 for row in found.decoders[0].decoding} == {None}
    assert shown(found)


def test_llama_is_what_it_says(tmp_path):
    assert round(Llama().parameters / 1e6) == 336
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
        files = write(folder, LLAMA, 4)
    a, b = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders)
    assert a == b  # the same seed, the same bytes
    proto = onnx.load(files[DEQUANTIZE])
    stored = {t.name: np.prod(t.dims) for t in proto.graph.initializer}
    weights, scales = (sum(n for name, n in stored.items() if name.endswith(end)) for end in (".weight", ".scales"))
    assert weights == LLAMA.parameters
    assert 4 * scales + LLAMA.weights // 2 == LLAMA.stored_bytes(4)


@pytest.mark.parametrize("bits", [4] if RUNTIME < (1, 22) else [4, 8])
def test_spellings_mean_the_same(bits, tmp_path):
    """A default session of DequantizeLinear is MatMulNBits at level 4, so the meaning shows without optimizations."""
    files = write(tmp_path, LLAMA, bits)
    level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    logits = []
    for name in (DEQUANTIZE, LEVEL_0):
        opened = session(files[name], portable=True, graph_optimization_level=level)
        logits.append(msd_compiler.Decoder(opened, model=onnx.load(files[name])).step(np.arange(12)[None]))
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)
    assert 0.5 < logits[0].std() < 2


def test_decoding_without_buffers_goes_on_from_what_is_cached(tmp_path):
    files = write(tmp_path, LLAMA, 4)
    opened = (session(files[LEVEL_0], portable=True), onnx.load(files[LEVEL_0], load_external_data=False))
    rows = time_decoding({"a": opened, "b": opened}, DecodeGrid(8, (4, 8)), runs=3, seconds=0, notes=[], exact="b")
    assert [(r.tokens, r.cached, r.relative_l2) for r in rows] == [
        (*step, 0.0) for step in ((8, 0), (1, 4), (1, 8)) for _ in "ab"
    ]


@pytest.fixture(scope="module")
def steps() -> AttentionReport:
    grid = AttentionGrid(batches=(1, 2), steps=((1, 40), (7, 0)), heads=4, kv_heads=2, size=16)
    return bench_attention(runs=3, seconds=0, grid=grid)


def test_steps(steps):
    ways = [way.name for way in ATTENTION_WAYS if way.since <= RUNTIME]
    cells = [(1, 1, 40), (1, 7, 0), (2, 1, 40), (2, 7, 0)]
    assert [(r.batch, r.tokens, r.cached, r.way) for r in steps.rows] == [(*c, way) for c in cells for way in ways]
    for row in steps.rows:
        assert row.ratio > 0
        assert row.relative_l2 < (2e-4 if row.way.startswith("msd") else 1e-5)
    if RUNTIME < (1, 27):
        assert steps.notes == [
            f"GroupQueryAttention int8 needs onnxruntime 1.27 or later; {onnxruntime.__version__} is installed"
        ]
    assert "0 + 7" in shown(steps)


# --- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".svg", ".png"])
@pytest.mark.parametrize("kind", ["decoders", "products", "steps", "llamas"])
def test_plot(kind, suffix, tmp_path, request):
    path = tmp_path / f"plot{suffix}"
    plot(request.getfixturevalue(kind), path)
    assert path.stat().st_size > 1000


# --- command -------------------------------------------------------------------------------------------------------


def msd(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["msd", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "80")
    try:
        cli.main()
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_command(layer, monkeypatch, capsys):
    status, out, _ = msd(monkeypatch, capsys, "bench", layer, "--threads", 1, "--json")
    assert status == 0
    found = ModelsReport.model_validate_json(out)
    assert [row.time.runs for row in found.runs] == [15, 15]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of MODEL and --suite is needed: what to time"),
        (["{layer}", "--suite", "linear"], "one of MODEL and --suite is needed: what to time"),
        (["--suite", "linear", "--inputs", "x.npz"], "--inputs are for a MODEL; a suite makes its own"),
        (["--suite", "attention", "--portable"], "--portable is for --suite linear"),
        (["--suite", "decode", "--portable"], "--portable is for --suite linear"),
        (["{layer}", "--suite", "decode"], "one of MODEL and --suite is needed: what to time"),
        (["{layer}", "--portable"], "--portable is for --suite linear"),
        (["{layer}", "--plot", "x.pdf"], "plot 'x.pdf' must end with .svg or .png"),
    ],
)
def test_mistakes(layer, monkeypatch, capsys, arguments, message):
    status, _, err = msd(monkeypatch, capsys, "bench", *(a.format(layer=layer) for a in arguments))
    assert status == 2
    assert err == f"msd: {message}\n"
