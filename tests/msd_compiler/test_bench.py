"""What `msd bench` measures, on sizes that take no time."""

from __future__ import annotations

import importlib.util
import io
import sys
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from rich.console import Console
from support import model, nbits_weight

import msd_compiler
from msd_compiler import MsdError, OptionError, cli
from msd_compiler.bench import (
    AttentionGrid,
    AttentionReport,
    Effort,
    LinearGrid,
    LinearReport,
    ModelsReport,
    Report,
    bench_attention,
    bench_linear,
    bench_models,
    plot,
    view,
)
from msd_compiler.bench.attention import WAYS as ATTENTION_WAYS
from msd_compiler.bench.decoding import DecodeGrid
from msd_compiler.bench.linear import OURS, PORTABLE, WAYS, Weight
from msd_compiler.bench.machine import read_bytes_per_second
from msd_compiler.bench.profile import site_times
from msd_compiler.bench.timing import LEAST_RUNS, Time, in_turns
from msd_compiler.runtime import runtime_version

TINY_LLAMA = Path(str(files("msd_compiler") / "data" / "tiny_llama.onnx"))
GRAPH = """(float[M, 64] x) => (float[M, 48] y) {
    y = com.microsoft.MatMulNBits <K = 64, N = 48, bits = 4, block_size = 32, accuracy_level = 4> (x, b, s)
}"""
QUICK = Effort(runs=3, seconds=0, grid=DecodeGrid(prompt=16, cached=(8, 16)), starts=1)
GRID = LinearGrid(
    rows=(1, 3),
    shapes=((256, 96),),
    weights=(Weight("int8 per channel", 8, None), Weight("int8 block 128", 8, 128), Weight("int4 block 32", 4, 32)),
    read_bytes=2**16,
)
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


def test_read_bandwidth():
    assert 1e8 < read_bytes_per_second(2**22) < 1e13


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


def test_json(decoders, products, steps):
    endless = steps.model_copy(update={"rows": [steps.rows[0].model_copy(update={"relative_l2": float("inf")})]})
    for report in (decoders, products, steps, endless):
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
    ways = [way.name for way in (*WAYS, PORTABLE)]
    for weight in GRID.weights:
        found = [r.way for r in products.rows if r.weight == weight.name and r.m == 1]
        if weight.bits == 4 or RUNTIME >= (1, 22):
            assert found == ways
        else:  # no MatMulNBits of 8 bits
            assert found == [way for way in ways if "NBits" not in way]
            assert any("MatMulNBits level 0" in note and weight.name in note for note in products.notes)
    for row in products.rows:
        assert row.ratio > 0
        assert (row.bandwidth_share is None) == (row.m != 1)
        assert row.relative_l2 < 0.05
        if row.way in (OURS.name, PORTABLE.name):
            assert row.relative_l2 < 1e-4
        if row.way == WAYS[0].name:
            assert row.ratio == 1
            assert row.relative_l2 < 1e-6
    assert "256 x 96, int4 block 32" in shown(products)


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

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="matplotlib is not installed")
@pytest.mark.parametrize("suffix", [".svg", ".png"])
@pytest.mark.parametrize("kind", ["decoders", "products", "steps"])
def test_plot(kind, suffix, tmp_path, request):
    path = tmp_path / f"plot{suffix}"
    plot(request.getfixturevalue(kind), path)
    assert path.stat().st_size > 1000


def test_plot_without_matplotlib(products, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OptionError, match=r"--plot needs matplotlib: pip install 'msd-compiler\[bench\]'"):
        plot(products, tmp_path / "plot.svg")


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
        (["{layer}", "--portable"], "--portable is for --suite linear"),
        (["{layer}", "--plot", "x.pdf"], "plot 'x.pdf' must end with .svg or .png"),
    ],
)
def test_mistakes(layer, monkeypatch, capsys, arguments, message):
    status, _, err = msd(monkeypatch, capsys, "bench", *(a.format(layer=layer) for a in arguments))
    assert status == 2
    assert err == f"msd: {message}\n"
