"""`compile` as a library: in memory, on disk, and with what stands around the sites left as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from support import activation, model, nbits_weight

import msd_compiler
from msd_compiler.source import stored_tensors

EXPORTED = sorted((Path(__file__).parents[1] / "data" / "exported").glob("*.onnx"))
GRAPH = """(float[M, 64] x) => (float[M, 48] y) {
    y = com.microsoft.MatMulNBits <K = 64, N = 48, bits = 4, block_size = 32> (x, b, s)
}"""


def test_without_output_the_result_is_in_memory_and_whole():
    done = msd_compiler.compile(model(GRAPH, **nbits_weight(64, 48, 32)))
    assert done.path is None
    assert done.changed
    assert not any(t.external_data for t in stored_tensors(done.model))
    assert done.report.verification.passed


def test_a_session_of_one_s_own_registers_the_library(tmp_path):
    path = tmp_path / "m.onnx"
    msd_compiler.compile(model(GRAPH, **nbits_weight(64, 48, 32)), path)
    feed = {"x": activation((3, 64))}
    expected = msd_compiler.run(path, feed)["y"]
    for register in (
        msd_compiler.register,
        lambda options: options.register_custom_ops_library(str(msd_compiler.library_path())),
    ):
        options = onnxruntime.SessionOptions()
        register(options)
        found = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, feed)
        assert found[0].tobytes() == expected.tobytes()


@pytest.mark.parametrize("terms", [0, 4, -1])
def test_terms_are_one_to_three(terms):
    with pytest.raises(msd_compiler.OptionError, match=f"terms is {terms}; it must be 1, 2 or 3"):
        msd_compiler.compile(model(GRAPH, **nbits_weight(64, 48, 32)), terms=terms)


@pytest.mark.parametrize("path", EXPORTED, ids=lambda p: p.stem)
def test_a_valid_source_gives_a_valid_result(path):
    """What onnx's checker and shape inference accept before, they accept after; GenAI's files they never do."""
    try:
        onnx.checker.check_model(onnx.load(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        pytest.skip("onnx's checker does not accept the source")
    onnx.checker.check_model(msd_compiler.compile(path, verify=False).model, full_check=True)


@pytest.mark.parametrize("path", EXPORTED, ids=lambda p: p.stem)
def test_what_is_no_site_stays_as_it_was(path):
    source, result = onnx.load(path, load_external_data=False), msd_compiler.compile(path, verify=False).model
    assert list(result.graph.input) == list(source.graph.input)
    assert list(result.graph.output) == list(source.graph.output)
    assert [o for o in result.opset_import if o.domain != "msd"] == list(source.opset_import)
    before = {n.output[0]: n for n in source.graph.node}
    ours = [n for n in result.graph.node if n.domain == "msd"]
    others = [n for n in result.graph.node if n.domain != "msd"]
    assert all(n == before[n.output[0]] for n in others)
    for node in ours:
        assert "msd." not in node.output[0]  # the source's own tensor, which everything behind it reads
    metadata = {p.key for n in source.graph.node for p in n.metadata_props}
    assert {p.key for n in ours for p in n.metadata_props} <= metadata


def test_weights_that_are_equal_are_stored_once():
    graph = """(float[M, 64] x) => (float[M, 64] y) {
        a = com.microsoft.MatMulNBits <K = 64, N = 64, bits = 4, block_size = 32> (x, b, s)
        y = com.microsoft.MatMulNBits <K = 64, N = 64, bits = 4, block_size = 32> (a, b, s)
    }"""
    result = msd_compiler.compile(model(graph, **nbits_weight(64, 64, 32)), verify=False).model
    assert [t.name for t in result.graph.initializer if t.name.endswith("msd.B")] == ["a/msd.B"]
    assert [n.input[1] for n in result.graph.node] == ["a/msd.B", "a/msd.B"]


def test_the_data_file_of_a_large_result_is_mapped(tmp_path):
    """Above 16 MB weights lie beside the model, aligned, under a name that tells their content."""
    source = model(
        "(float[M, 4096] x) => (float[M, 4352] y) { d = DequantizeLinear <axis = 1> (w, s)  y = MatMul(x, d) }",
        w=np.random.default_rng(0).integers(-127, 128, (4096, 4352), np.int8),
        s=np.full(4352, 0.01, np.float32),
    )
    other = onnx.ModelProto.FromString(source.SerializeToString())
    other.graph.initializer[0].raw_data = bytes(4096 * 4352)
    msd_compiler.compile(other, tmp_path / "big.onnx", verify=False)
    (old,) = tmp_path.glob("big.*.data")
    done = msd_compiler.compile(source, tmp_path / "big.onnx", verify=False)
    (data,) = tmp_path.glob("big.*.data")
    assert not old.exists()
    placed = {
        t.name: {e.key: e.value for e in t.external_data} for t in done.model.graph.initializer if t.external_data
    }
    assert {p["location"] for p in placed.values()} == {data.name}
    assert all(int(p["offset"]) % 64 == 0 for p in placed.values())
    assert (tmp_path / "big.onnx").stat().st_size < 100_000
    x = activation((2, 4096))
    native, portable = (msd_compiler.run(tmp_path / "big.onnx", {"x": x}, portable=p)["y"] for p in (False, True))
    assert native.tobytes() == portable.tobytes()
    again = msd_compiler.compile(source, tmp_path / "big.onnx", verify=False)
    assert again.model == done.model
    assert [p.name for p in sorted(tmp_path.iterdir())] == sorted([data.name, "big.onnx"])
