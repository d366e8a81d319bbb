"""The command line as a user meets it: words, files, exit statuses."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from support import activation, model, nbits_weight, weight

from msd_compiler import cli
from msd_compiler.report import Report

GRAPH = """(float[M, 64] x) => (float[M, 48] y) {
    y = com.microsoft.MatMulNBits <K = 64, N = 48, bits = 4, block_size = 32, accuracy_level = 4> (x, b, s)
}"""
FLOAT_GRAPH = "(float[M, 8] x) => (float[M, 4] y) { y = MatMul(x, w) }"


def quantized() -> onnx.ModelProto:
    return model(GRAPH, **nbits_weight(64, 48, 32))


@dataclass(frozen=True)
class Ran:
    status: int
    out: str
    err: str


@pytest.fixture
def msd(capsys, monkeypatch, tmp_path):
    """Runs ``msd`` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str | Path) -> Ran:
        monkeypatch.setattr(sys, "argv", ["msd", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = capsys.readouterr()
        return Ran(status, captured.out, captured.err)

    return run


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "m.onnx"
    onnx.save_model(quantized(), path)
    return path


def test_compile_writes_a_verified_model_beside_the_source(msd, source):
    ran = msd("compile", "m.onnx", "--report", "r.json")
    assert ran.status == 0, ran.err
    assert "1 linear layer: 1 rewritten, 0 kept, 0 unsupported" in ran.out
    assert "verified: within tolerance" in ran.out
    assert "wrote m.msd.onnx" in ran.out
    assert max(len(line) for line in ran.out.splitlines()) <= 80
    report = Report.model_validate_json(Path("r.json").read_text())
    assert report.sites[0].form == "MatMulNBits"
    assert report.verification is not None
    assert report.verification.outputs[0].relative_l2 < 1e-4 < report.verification.outputs[0].baseline_relative_l2
    assert sorted(p.name for p in Path().iterdir()) == ["m.msd.onnx", "m.onnx", "r.json"]


@pytest.mark.parametrize("command", [("compile", "m.onnx"), ("inspect", "m.onnx")])
def test_json_is_one_document_and_nothing_else(msd, source, command):
    ran = msd(*command, "--json")
    assert ran.status == 0, ran.err
    assert ran.err == ""
    Report.model_validate(json.loads(ran.out))


def test_inspect_of_a_result_shows_what_was_done(msd, source):
    msd("compile", "m.onnx")
    ran = msd("inspect", "m.msd.onnx")
    assert "1 rewritten" in ran.out


def test_verify_and_run_take_inputs(msd, source):
    msd("compile", "m.onnx")
    np.savez("x.npz", x=activation((3, 64)))
    assert "verified" in msd("verify", "m.onnx", "m.msd.onnx", "--inputs", "x.npz", "--runs", "2").out
    for extra in ([], ["--portable"]):
        ran = msd("run", "m.msd.onnx", "--inputs", "x.npz", "-o", f"y{len(extra)}.npz", *extra)
        assert ran.status == 0, ran.err
        assert "y [3, 48]" in ran.out
    with np.load("y0.npz") as native, np.load("y1.npz") as portable:
        assert native["y"].tobytes() == portable["y"].tobytes()


def test_verify_fails_for_another_model(msd, source):
    onnx.save_model(model(GRAPH, **nbits_weight(64, 48, 32, seed=5)), "other.onnx")
    ran = msd("verify", "m.onnx", "other.onnx")
    assert ran.status == 1
    assert "FAILED" in ran.out


def test_over_the_tolerance_nothing_is_written_and_the_worst_layers_are_named(msd, source):
    ran = msd("compile", "m.onnx", "--terms", "1")
    assert ran.status == 1
    assert "not written: output 'y'" in ran.err
    assert "worst layers alone: 'y'" in ran.err
    assert [p.name for p in Path().iterdir()] == ["m.onnx"]


def test_an_old_result_survives_a_failure(msd, source):
    Path("m.msd.onnx").write_text("old")
    assert msd("compile", "m.onnx", "--tolerance", "1e-9").status == 1
    assert Path("m.msd.onnx").read_text() == "old"


def test_without_sites_the_result_is_a_copy(msd, tmp_path):
    onnx.save_model(model(FLOAT_GRAPH, w=np.ones((8, 4), np.float32)), "f.onnx")
    ran = msd("compile", "f.onnx")
    assert ran.status == 0
    assert "float_weight" in ran.out
    assert "nothing to rewrite: f.msd.onnx is a copy" in ran.out
    assert Path("f.msd.onnx").read_bytes() == Path("f.onnx").read_bytes()


def test_a_result_compiled_again_is_a_copy(msd, source):
    msd("compile", "m.onnx")
    ran = msd("compile", "m.msd.onnx", "-o", "again.onnx")
    assert ran.status == 0
    assert "already rewritten: again.onnx is a copy" in ran.out
    assert Path("again.onnx").read_bytes() == Path("m.msd.onnx").read_bytes()


def test_same_input_same_bytes(msd, source):
    msd("compile", "m.onnx", "-o", "a.onnx")
    msd("compile", "m.onnx", "-o", "b.onnx", "--no-verify")
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()


def external(location: str, *, length: int = 4096, offset: int = 0) -> onnx.ModelProto:
    tensor = TensorProto(name="w", dims=[64, 64], data_type=TensorProto.INT8, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    graph = "(float[M, 64] x) => (float[M, 64] y) { d = DequantizeLinear(w, s)  y = MatMul(x, d) }"
    return model(graph, w=tensor, s=np.float32(0.1))


def dequantized(**changed: np.ndarray) -> onnx.ModelProto:
    inputs = "w, s, z" if "z" in changed else "w, s"
    graph = f"(float[M, 64] x) => (float[M, 32] y) {{ d = DequantizeLinear({inputs})  y = MatMul(x, d) }}"
    return model(graph, **{**weight("int8", (64, 32), (32,)), **changed})


BAD_MODELS = {
    "scale NaN": (lambda: dequantized(s=np.full(32, np.nan, np.float32)), "32 of 32 scales are NaN or Inf"),
    "scale Inf": (lambda: dequantized(s=np.full(32, np.inf, np.float32)), "NaN or Inf"),
    "scale shape": (lambda: dequantized(s=np.ones(31, np.float32)), "shape [31], expected [32]"),
    "zero point shape": (lambda: dequantized(z=np.zeros(31, np.int8)), "shape [31], expected that of the scales"),
    "zero point type": (lambda: dequantized(z=np.zeros(32, np.uint8)), "expected the codes' type int8"),
    "data missing": (lambda: external("no.bin"), "'no.bin', which does not exist"),
    "data short": (lambda: external("short.bin"), "needs 4096 bytes at offset 0"),
    "data beyond": (lambda: external("whole.bin", offset=64), "needs 4096 bytes at offset 64"),
    "data length": (lambda: external("whole.bin", length=64), "the model says 64"),
    "data absolute": (lambda: external("/etc/passwd"), "must be a relative path without '..'"),
    "data above": (lambda: external("../x.bin"), "must be a relative path without '..'"),
    "data link": (lambda: external("link.bin"), "symbolic link"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models_are_refused(msd, tmp_path, case):
    make, message = BAD_MODELS[case]
    Path("short.bin").write_bytes(bytes(100))
    Path("whole.bin").write_bytes(bytes(4096))
    Path("link.bin").symlink_to("whole.bin")
    onnx.save_model(make(), "bad.onnx")
    before = sorted(p.name for p in Path().iterdir())
    ran = msd("compile", "bad.onnx")
    assert ran.status == 2
    assert message in ran.err
    assert "'w'" in ran.err or "'s'" in ran.err or "'z'" in ran.err or "DequantizeLinear 'd'" in ran.err
    assert ran.err.count("\n") == 1
    assert sorted(p.name for p in Path().iterdir()) == before


BAD_FILES = {
    "missing": (None, "does not exist"),
    "empty": (b"", "is empty"),
    "text": (b"hello, this is no model", "is not ONNX, or cut short"),
    "truncated": ("cut", "is not ONNX, or cut short"),
    "no graph": (onnx.ModelProto(ir_version=8).SerializeToString(), "is not an ONNX model"),
}


@pytest.mark.parametrize("command", ["compile", "inspect"])
@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused(msd, command, case):
    content, message = BAD_FILES[case]
    if content is not None:
        whole = quantized().SerializeToString()
        Path("bad.onnx").write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    ran = msd(command, "bad.onnx")
    assert ran.status == 2
    assert "'bad.onnx'" in ran.err or "bad.onnx is not" in ran.err
    assert message in ran.err


def test_a_folder_means_the_model_in_it(msd, source, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "has no .onnx files" in msd("compile", "folder").err
    source.rename(folder / "decoder.onnx")
    assert msd("compile", "folder").status == 0
    assert (folder / "decoder.msd.onnx").is_file()
    ran = msd("compile", "folder")
    assert ran.status == 2
    assert "has 2 .onnx files" in ran.err


BAD_OUTPUTS = {
    "the model": (("-o", "m.onnx"), "is the model itself"),
    "missing folder": (("-o", "no/where.onnx"), "folder 'no' does not exist"),
    "a folder": (("-o", "folder"), "is a folder"),
    "report over the output": (("-o", "x.json", "--report", "x.json"), "named twice"),
    "report of another type": (("--report", "r.txt"), "must end with .json or .html"),
    "report in a missing folder": (("--report", "no/r.json"), "must be a file in an existing folder"),
}


@pytest.mark.parametrize("case", BAD_OUTPUTS)
def test_bad_outputs_are_refused_before_the_work(msd, source, case):
    arguments, message = BAD_OUTPUTS[case]
    Path("folder").mkdir()
    content = source.read_bytes()
    ran = msd("compile", "m.onnx", *arguments)
    assert ran.status == 2
    assert message in ran.err
    assert source.read_bytes() == content
    assert sorted(p.name for p in Path().iterdir()) == ["folder", "m.onnx"]


def test_inputs_that_do_not_fit_are_refused(msd, source):
    np.savez("wrong.npz", z=np.zeros(3, np.float32))
    ran = msd("run", "m.onnx", "--inputs", "wrong.npz", "-o", "y.npz")
    assert ran.status == 2
    assert "x" in ran.err
    Path("broken.npz").write_text("no zip")
    assert "cannot be read as an .npz" in msd("verify", "m.onnx", "m.onnx", "--inputs", "broken.npz").err


@pytest.mark.parametrize("command", ["compile", "inspect", "verify", "run", "demo"])
def test_help_has_an_example(msd, command):
    ran = msd(command, "--help")
    assert ran.status == 0
    assert f"Example: msd {command}" in ran.out
