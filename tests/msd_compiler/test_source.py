"""Reading a model: what cannot be right is named, what lies outside the model's folder is not read."""

import os
from contextlib import suppress
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from support import model, weight

import msd_compiler
from msd_compiler.errors import ModelError, MsdError
from msd_compiler.source import Source, graphs, load, nbytes, stored_tensors, type_name

K, N = 40, 20
TENSORS = weight("int8", (K, N), (N,), True)


def proto():
    return model("(float[3,40] x) => (float[3,20] y) { d = DequantizeLinear(w, s, z)  y = MatMul(x, d) }", **TENSORS)


def write(folder: Path, name="model.onnx", data=None) -> Path:
    file = folder / name
    file.write_bytes(proto().SerializeToString() if data is None else data)
    return file


def external(folder: Path, location="model.data", **entries) -> Path:
    """A model whose codes lie in a file, with the entries given changed, or dropped where None."""
    source = proto()
    codes = source.graph.initializer[0]
    place = {"location": location, "offset": 0, "length": K * N} | entries
    codes.ClearField("raw_data")
    codes.data_location = TensorProto.EXTERNAL
    for key, value in place.items():
        if value is not None:
            codes.external_data.add(key=key, value=str(value))
    (folder / "model.data").write_bytes(TENSORS["w"].tobytes())
    return write(folder, data=source.SerializeToString())


def refused(path) -> str:
    """What is said, by all who read models."""
    said = set()
    for read in (load, msd_compiler.inspect, lambda p: msd_compiler.compile(p, verify=False)):
        with pytest.raises(ModelError) as error:
            read(path)
        said.add(str(error.value))
    (one,) = said
    return one


# --- files ---------------------------------------------------------------------------------------------------------


def test_file(tmp_path):
    source = load(write(tmp_path))
    assert (source.proto, source.folder, source.path) == (proto(), tmp_path.resolve(), tmp_path / "model.onnx")


def test_parsed():
    given_model = proto()
    assert load(given_model).proto is given_model


def test_missing_file(tmp_path):
    assert refused(tmp_path / "m.onnx") == f"model '{tmp_path}/m.onnx' does not exist"


def test_missing_folder(tmp_path):
    assert "does not exist" in refused(tmp_path / "nowhere" / "m.onnx")


def test_empty_file(tmp_path):
    assert refused(write(tmp_path, data=b"")) == f"model '{tmp_path}/model.onnx' is empty"


@pytest.mark.parametrize(
    "data",
    [
        b"hello",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b'{"graph": {}}',
        b"PK\x03\x04",
        bytes(64),
        b"\xff" * 64,
        "ä".encode() * 50,
    ],
)
def test_no_onnx(tmp_path, data):
    assert f"'{tmp_path}/model.onnx'" in refused(write(tmp_path, data=data)).replace(
        str(tmp_path / "model.onnx") + " is", f"'{tmp_path}/model.onnx'"
    )


def test_truncated_anywhere(tmp_path):
    """The operator sets stand last, so that no beginning of the file is a model."""
    source = proto()
    del source.opset_import[1:]
    whole = source.SerializeToString()
    for length in range(1, len(whole)):
        with pytest.raises(ModelError, match=r"model\.onnx"):
            load(write(tmp_path, data=whole[:length]))


def test_no_outputs(tmp_path):
    source = proto()
    del source.graph.output[:]
    assert "has no outputs" in refused(write(tmp_path, data=source.SerializeToString()))


def test_folder_with_one_model(tmp_path):
    write(tmp_path, "some.onnx")
    (tmp_path / "notes.txt").write_text("")
    assert load(tmp_path).path == tmp_path / "some.onnx"


def test_folder_with_a_model_by_its_usual_name(tmp_path):
    for name in ("model.onnx", "decoder.onnx"):
        write(tmp_path, name)
    assert load(tmp_path).path == tmp_path / "model.onnx"


def test_folder_without_a_model(tmp_path):
    assert refused(tmp_path) == f"folder '{tmp_path}' has no .onnx files; name the one you mean"


def test_folder_with_several_models(tmp_path):
    for name in ("a.onnx", "b.onnx"):
        write(tmp_path, name)
    assert refused(tmp_path) == f"folder '{tmp_path}' has 2 .onnx files; name the one you mean"


def test_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.onnx")
    assert refused(tmp_path / "pipe.onnx") == f"model '{tmp_path}/pipe.onnx' is not a file"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_damaged_model(data):
    """A few bytes changed: it is read, or refused by an error of ours."""
    whole = bytearray(proto().SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    damaged = onnx.ModelProto()
    try:
        damaged.ParseFromString(bytes(whole))
    except Exception:
        return
    with suppress(MsdError):
        msd_compiler.compile(damaged, verify=False)


@pytest.mark.parametrize(
    ("node", "attribute"),
    [
        (0, helper.make_attribute("axis", [1, 0])),
        (0, helper.make_attribute("axis", "one")),
        (0, helper.make_attribute("axis", 10**18)),
        (0, helper.make_attribute("block_size", [16])),
        (0, helper.make_attribute("block_size", -16)),
        (0, helper.make_attribute("output_dtype", 77)),
        (1, helper.make_attribute("perm", 1)),
        (2, helper.make_attribute("alpha", "much")),
        (1, onnx.AttributeProto(name="perm", ints=[1, 0])),  # of no type
        (1, onnx.AttributeProto(name="perm", ref_attr_name="p", type=onnx.AttributeProto.INTS)),  # outside a function
    ],
)
def test_attribute_that_cannot_be_right(node, attribute, capfd):
    """It is taken as a row that says why, or refused by an error of ours; nothing is printed."""
    source = model(
        "(float[3,20] x) => (float[3,20] y) { d = DequantizeLinear(w, s)  t = Transpose(d)  y = Gemm(x, t) }",
        **weight("int8", (N, N), (N,)),
    )
    source.graph.node[node].attribute.append(attribute)
    reason = ""
    try:
        reason = msd_compiler.compile(source, verify=False).report.sites[0].reason
    except MsdError as error:
        reason = str(error)
    assert attribute.name == "perm" or len(reason) > 20
    assert capfd.readouterr() == ("", "")


# --- external data -------------------------------------------------------------------------------------------------


def test_external_data(tmp_path):
    source = load(external(tmp_path))
    assert np.array_equal(source.array(source.proto.graph.initializer[0]), TENSORS["w"])
    assert source.files() == [tmp_path / "model.onnx", tmp_path / "model.data"]
    embedded = msd_compiler.compile(proto(), verify=False).model
    assert msd_compiler.compile(source.path, verify=False).model == embedded


@pytest.mark.parametrize(("offset", "length"), [(None, None), (0, None), (None, K * N)])
def test_external_data_without_offset_or_length(tmp_path, offset, length):
    source = load(external(tmp_path, offset=offset, length=length))
    assert np.array_equal(source.array(source.proto.graph.initializer[0]), TENSORS["w"])


@pytest.mark.parametrize("kind", ["int4", "uint4", "int2", "float16", "bfloat16", "int64", "bool", "float8_e4m3fn"])
def test_external_data_of_every_width(tmp_path, kind):
    values = np.arange(7).astype(getattr(ml_dtypes, kind, None) or kind)
    tensor = numpy_helper.from_array(values, "t")
    (tmp_path / "data").write_bytes(bytes(5) + tensor.raw_data)
    outside = TensorProto(name="t", dims=[7], data_type=tensor.data_type, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "data"), ("offset", 5)):
        outside.external_data.add(key=key, value=str(value))
    found = Source(onnx.ModelProto(), tmp_path).array(outside)
    assert found.dtype == values.dtype
    assert np.array_equal(found, values)


def test_external_data_of_no_size(tmp_path):
    (tmp_path / "data").write_bytes(b"")
    tensor = TensorProto(name="t", dims=[0, 4], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="data")
    assert Source(onnx.ModelProto(), tmp_path).array(tensor).shape == (0, 4)


def test_external_data_in_a_folder_beside(tmp_path):
    file = external(tmp_path, "sub/model.data")
    (tmp_path / "sub").mkdir()
    (tmp_path / "model.data").rename(tmp_path / "sub" / "model.data")
    assert load(file)


def test_missing_data(tmp_path):
    file = external(tmp_path)
    (tmp_path / "model.data").unlink()
    said = refused(file)
    assert said == f"{file}: external data of 'w' is in 'model.data', which does not exist in '{tmp_path}'"


@pytest.mark.parametrize(
    "place",
    [
        {"length": K * N + 1}, {"length": K * N - 1}, {"offset": 1}, {"offset": -1}, {"offset": 10**12}, {"length": 0},
        {"offset": "x"}, {"length": "1.5"}, {"offset": "9" * 40},
    ],
)  # fmt: skip
def test_data_of_the_wrong_size(tmp_path, place):
    file = external(tmp_path, **place)
    said = refused(file)
    assert str(file) in said
    assert "'w'" in said


def test_data_cut_short(tmp_path):
    file = external(tmp_path)
    (tmp_path / "model.data").write_bytes(bytes(K * N - 1))
    assert refused(file) == (
        f"{file}: external data of 'w' needs 800 bytes at offset 0 of 'model.data'; the model says 800 and the file has 799"
    )


@pytest.mark.parametrize(
    "location", ["/etc/passwd", "../model.data", "sub/../../model.data", "", "sub/..", "a\0b", "./../model.data"]
)
def test_data_outside_the_folder(tmp_path, location):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "model.data").write_bytes(bytes(K * N))
    said = refused(external(inside, location))
    assert "external data of 'w'" in said
    assert "it must be a relative path without '..'" in said


def test_data_behind_a_link(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret").write_bytes(bytes(K * N))
    (inside / "link.data").symlink_to(tmp_path / "secret")
    assert "is or passes a symbolic link" in refused(external(inside, "link.data"))
    (inside / "folder").symlink_to(tmp_path)
    assert "is or passes a symbolic link" in refused(external(inside, "folder/secret"))


def test_data_that_is_a_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    assert "does not exist" in refused(external(tmp_path, "sub"))


def test_model_behind_a_link(tmp_path):
    """Model caches link whole models: the data lies beside what the link means."""
    there = tmp_path / "blobs"
    there.mkdir()
    file = external(there)
    (tmp_path / "snapshot.onnx").symlink_to(file)
    assert load(tmp_path / "snapshot.onnx").folder == there


def test_data_of_a_model_in_memory(tmp_path, monkeypatch):
    parsed = onnx.load(external(tmp_path), load_external_data=False)
    with pytest.raises(ModelError, match="the given model: external data of 'w'"):
        load(parsed)
    monkeypatch.chdir(tmp_path)
    assert load(parsed)


# --- tensors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (TensorProto(name="w", dims=[K, N], data_type=TensorProto.INT8, raw_data=bytes(10)), "tensor 'w' (int8[40, 20]) cannot be read"),
        (TensorProto(name="w", dims=[K, N], data_type=TensorProto.INT4, raw_data=bytes(10)), "tensor 'w' (int4[40, 20]) cannot be read"),
        (TensorProto(name="w", dims=[K, N], data_type=TensorProto.INT8), "tensor 'w' (int8[40, 20]) cannot be read"),
        (TensorProto(name="w", dims=[K, N], data_type=TensorProto.INT8, int32_data=[1, 2]), "tensor 'w' (int8[40, 20]) cannot be read"),
    ],
)  # fmt: skip
def test_data_that_does_not_fill_its_shape(tensor, words):
    with pytest.raises(ModelError) as error:
        Source(proto(), Path()).array(tensor)
    assert words in str(error.value)
    if tensor.data_type == TensorProto.INT8:
        source = proto()
        source.graph.initializer[0].CopyFrom(tensor)
        with pytest.raises(ModelError) as error:
            msd_compiler.compile(source, verify=False)
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("data_type", "dims", "size"),
    [
        (TensorProto.FLOAT, [3, 5], 60),
        (TensorProto.FLOAT16, [], 2),
        (TensorProto.INT4, [3, 5], 8),
        (TensorProto.UINT2, [5], 2),
        (TensorProto.FLOAT4E2M1, [3], 2),
        (TensorProto.BOOL, [9], 9),
        (TensorProto.FLOAT8E4M3FN, [9], 9),
        (TensorProto.DOUBLE, [0, 9], 0),
    ],
)
def test_nbytes(data_type, dims, size):
    assert nbytes(TensorProto(data_type=data_type, dims=dims)) == size


@pytest.mark.parametrize(
    ("data_type", "name"),
    [(TensorProto.INT4, "int4"), (TensorProto.FLOAT, "float32"), (TensorProto.DOUBLE, "float64"), (99, "type 99")],
)
def test_type_name(data_type, name):
    assert type_name(data_type) == name


def test_every_graph_and_every_tensor():
    text = """(bool b) => (float y) {
        c = Constant <value = float[1] {1}> ()
        y = If(b) <then_branch = t () => (float u) { a = Constant <value = float[1] {2}> ()
                z = If(b) <then_branch = tt () => (float p) { p = Neg(a) }, else_branch = te () => (float q) { q = Abs(c) }> u = Identity(z) },
            else_branch = e () => (float v) { v = Abs(c) }> }"""
    source = model(text, w=np.float32(3))
    function = onnx.parser.parse_function(
        '<domain: "f", opset_import: ["" : 21]> F (i) => (o) { k = Constant <value = float[1] {4}> ()  o = Add(i, k) }'
    )
    source.functions.append(function)
    source.graph.sparse_initializer.append(
        helper.make_sparse_tensor(
            numpy_helper.from_array(np.float32([5]), "sp"), numpy_helper.from_array(np.array([0])), [4]
        )
    )
    assert [g.name for g in graphs(source)] == ["g", "t", "tt", "te", "e"]
    assert sorted(float(numpy_helper.to_array(t).sum()) for t in stored_tensors(source)) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("domain", "version", "opset"), [("", 17, 17), ("ai.onnx", 13, 13), ("com.microsoft", 1, 0)])
def test_opset(domain, version, opset):
    source = onnx.ModelProto(opset_import=[helper.make_opsetid(domain, version)])
    assert Source(source, Path()).opset == opset
