"""Models that no exporter writes: an error in one sentence, never a hang, a crash or a traceback."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
from support import model, weight

import msd_compiler

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


def anywhere(rng: random.Random, items) -> int:
    return rng.randrange(len(items))


def rewire(proto: onnx.ModelProto, rng: random.Random) -> None:
    node = rng.choice(proto.graph.node)
    node.input[anywhere(rng, node.input)] = rng.choice(["", "nothing", rng.choice(proto.graph.node).output[0]])


def resize(proto: onnx.ModelProto, rng: random.Random) -> None:
    tensor = rng.choice(proto.graph.initializer)
    tensor.dims[anywhere(rng, tensor.dims)] = rng.choice([0, 1, -1, 2**31, 7])


def retype(proto: onnx.ModelProto, rng: random.Random) -> None:
    rng.choice(proto.graph.initializer).data_type = rng.randrange(27)


def reattribute(proto: onnx.ModelProto, rng: random.Random) -> None:
    attribute = rng.choice(rng.choice(proto.graph.node).attribute)
    attribute.i, attribute.type = rng.choice([0, -1, 2**40]), rng.choice([attribute.type, 1, 2, 3, 7])


def rename_op(proto: onnx.ModelProto, rng: random.Random) -> None:
    ops = ["MatMul", "Gemm", "DequantizeLinear", "MatMulNBits", "Reshape", "Transpose", "Cast", "Add"]
    rng.choice(proto.graph.node).op_type = rng.choice(ops)


def cut(proto: onnx.ModelProto, rng: random.Random) -> None:
    tensor = rng.choice(proto.graph.initializer)
    tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]


def redirect(proto: onnx.ModelProto, rng: random.Random) -> None:
    rng.choice(proto.graph.node).output[0] = rng.choice(["x", "", rng.choice(proto.graph.node).output[0]])


def forget(proto: onnx.ModelProto, rng: random.Random) -> None:
    del proto.graph.node[anywhere(rng, proto.graph.node)]


MUTATIONS: list[Callable[[onnx.ModelProto, random.Random], None]] = [
    rewire, resize, retype, reattribute, rename_op, cut, redirect, forget,
]  # fmt: skip


@pytest.mark.parametrize("path", EXPORTED, ids=lambda p: p.stem)
def test_mutated_exports_give_a_result_or_one_sentence(path):
    rng = random.Random(path.stem)
    source = onnx.load(path)
    for _ in range(25):
        proto = onnx.ModelProto()
        proto.CopyFrom(source)
        for mutate in rng.choices(MUTATIONS, k=rng.choice([1, 1, 2, 4])):
            with suppress(IndexError, ValueError):  # nothing there to mutate
                mutate(proto, rng)
        with suppress(msd_compiler.MsdError):
            msd_compiler.compile(proto, verify=False)
