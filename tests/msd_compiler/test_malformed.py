"""Models that no exporter writes: an error in one sentence, never a hang, a crash or a traceback."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
from mutations import mutate
from onnx import TensorProto, helper
from support import model, weight

import msd_compiler
from msd_compiler.report import Outcome

EXPORTED = sorted((Path(__file__).parents[1] / "data" / "exported").glob("*.onnx"))
GRAPH = "(float[M, 64] x) => (float[M, 32] y) { d = DequantizeLinear(w, s)  y = MatMul(x, d) }"


def layer() -> onnx.ModelProto:
    return model(GRAPH, **weight("int8", (64, 32), (32,)))


def test_a_cycle_is_named():
    """Whoever follows an activation upstream would never come back."""
    proto = model(
        "(float[M, 64] x) => (float[M, 32] y) { a = Cast <to = 1> (b)  b = Cast <to = 1> (a)  y = MatMul(a, w) }",
        w=np.ones((64, 32), np.float32),
    )
    with pytest.raises(msd_compiler.ModelError, match=r"node '[ab]' \(Cast\) depends on its own output"):
        msd_compiler.inspect(proto)


@pytest.mark.parametrize("version", [0, -1])
def test_an_opset_below_one(version):
    proto = layer()
    proto.opset_import[0].version = version
    with pytest.raises(msd_compiler.ModelError, match=f"imports opset {version} of domain 'ai.onnx'"):
        msd_compiler.compile(proto)


def test_text_that_is_not_utf8(tmp_path):
    data = layer().SerializeToString().replace(b"DequantizeLinear", b"Dequantize\x96inear")
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(msd_compiler.ModelError, match="is not UTF-8 text"):
        msd_compiler.inspect(tmp_path / "m.onnx")


def test_a_place_that_is_not_utf8(tmp_path):
    onnx.save(layer(), tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0, location="weights")
    data = (tmp_path / "m.onnx").read_bytes().replace(b"weights", b"weight\x96")
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(msd_compiler.ModelError, match="is not UTF-8 text"):
        msd_compiler.inspect(tmp_path / "m.onnx")


def test_a_layer_that_nobody_reads_is_rewritten_all_the_same():
    proto = layer()
    proto.graph.node.add(op_type="Identity", input=["x"], output=["z"])
    proto.graph.output[0].name = "z"
    done = msd_compiler.compile(proto, verify=False)
    assert [n.op_type for n in done.model.graph.node] == ["MatMul", "Identity"]


def test_a_block_longer_than_the_axis_takes_no_memory():
    proto = model(
        f"(float[M, 64] x) => (float[M, 32] y) {{ d = DequantizeLinear <axis = 0, block_size = {2**50}> (w, s) y = MatMul(x, d) }}",
        **weight("int8", (64, 32), (1, 32)),
    )
    assert msd_compiler.compile(proto, verify=False).report.summary.rewritten == 1


def test_thousands_of_experts_are_not_taken_apart():
    proto = model(
        "(float[M, 4] x) => (float[E, M, 4] y) { d = DequantizeLinear(w, s)  y = MatMul(x, d) }",
        **weight("int8", (2000, 4, 4)),
    )
    (site,) = msd_compiler.inspect(proto).sites
    assert site.reason == "weight 'w' holds 2000 matrices; up to 1024 are taken apart"


@pytest.mark.parametrize("name", ["w", "x", "d"])
def test_a_name_for_two_tensors(name):
    proto = layer()
    proto.graph.node.add(op_type="Relu", name="again", input=["y"], output=[name])
    with pytest.raises(
        msd_compiler.ModelError, match=f"Relu 'again' writes '{name}', which is the name of another tensor"
    ):
        msd_compiler.inspect(proto)


def test_a_tensor_of_no_type():
    proto = layer()
    proto.graph.initializer[0].data_type = 0
    with pytest.raises(msd_compiler.ModelError, match="tensor 'w' is of undefined, expected one of ONNX's types"):
        msd_compiler.compile(proto, verify=False)


@pytest.mark.parametrize("external", [False, True])
def test_a_size_below_zero(external):
    proto = layer()
    tensor = proto.graph.initializer[0]
    tensor.dims[0] = -64
    if external:
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="README.md")
    with pytest.raises(msd_compiler.ModelError, match=r"tensor 'w' has shape \[-64, 32\]; a size is at least 0"):
        msd_compiler.inspect(proto)


def test_external_data_of_a_name_that_no_file_can_have():
    proto = layer()
    tensor = proto.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="a" * 5000)
    with pytest.raises(msd_compiler.ModelError, match="which cannot be looked for: File name too long"):
        msd_compiler.inspect(proto)


def test_keys_of_external_data_that_onnx_does_not_know(tmp_path, recwarn):
    onnx.save(layer(), tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0)
    proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    proto.graph.initializer[0].external_data.add(key="other", value="x")
    onnx.save(proto, tmp_path / "m.onnx")
    assert msd_compiler.inspect(tmp_path / "m.onnx").summary.rewritten == 1
    assert not recwarn.list


def test_a_product_with_a_graph_inside():
    proto = layer()
    proto.graph.node[1].attribute.append(helper.make_attribute("body", onnx.GraphProto(name="g")))
    with pytest.raises(msd_compiler.ModelError, match="attribute 'body' of MatMul is a graph, which that op does not"):
        msd_compiler.compile(proto, verify=False)


@pytest.mark.parametrize("path", EXPORTED, ids=lambda p: p.stem)
def test_mutated_exports_give_a_result_or_one_sentence(path):
    rng = random.Random(path.stem)
    source = onnx.load(path)
    for _ in range(25):
        proto = onnx.ModelProto()
        proto.CopyFrom(source)
        mutate(proto, rng)
        with suppress(msd_compiler.MsdError):
            msd_compiler.compile(proto, verify=False)


@pytest.mark.parametrize("size", [-1, -5, -(2**63)])
def test_a_negative_size_is_an_unknown_one(size):
    """Some exporters write -1 for it; onnx's shape inference may abort the process on others."""
    proto = layer()
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = size
    (row,) = msd_compiler.compile(proto, verify=False).report.sites
    assert (row.outcome, row.m) == (Outcome.REWRITTEN, None)
