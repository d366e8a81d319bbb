"""A result appears whole or not at all, with nothing beside it but its own data file."""

import errno
import os
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from support import activation, meaning, model, relative_l2, weight

import msd_compiler
from msd_compiler import api, save
from msd_compiler.errors import ModelError, MsdError, OutputError
from msd_compiler.save import Output, WeightStore, weight_bytes
from msd_compiler.source import load

K, N = 80, 64
X = {"x": activation((3, K))}
DATA = re.compile(r"out\.[0-9a-f]{12}\.data")


def proto(seed=0, **more):
    text = "(float[3,80] x) => (float[3,64] y) { d = DequantizeLinear(w, s, z)  y = MatMul(x, d) }"
    return model(text, **weight("int8", (K, N), (N,), True, seed=seed), **more)


def no_sites():
    return model("(float[3,80] x) => (float[3,64] y) { y = MatMul(x, w) }", w=activation((K, N)))


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    file = folder / "model.onnx"
    file.write_bytes(proto().SerializeToString())
    return file


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    return folder / "out.onnx"


@pytest.fixture
def beside(monkeypatch):
    """Weights of any size go to a data file."""
    monkeypatch.setattr(api, "EMBED_UP_TO", 0)


def with_data(folder: Path, source=None, data="weights.bin") -> Path:
    """A model whose initializers lie in a file beside it."""
    source = source or proto()
    file = folder / "model.onnx"
    onnx.save(source, file, save_as_external_data=True, location=data, size_threshold=0)
    return file


def compile(source, out, **options):
    return msd_compiler.compile(source, out, verify=False, **options)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def assert_runs(path, seed=0):
    for portable in (False, True):
        found = msd_compiler.session(path, portable=portable, log_severity_level=4).run(None, X)[0]
        assert relative_l2(found, meaning(proto(seed), X)["y"]) <= 1e-4


# --- what is written -----------------------------------------------------------------------------------------------


def test_one_file(source, out):
    done = compile(source, out)
    assert names(out.parent) == ["out.onnx"]
    assert (done.path, done.report.result) == (out, str(out))
    assert onnx.load(out) == done.model
    assert_runs(out)


def test_data_file(source, out, beside):
    compile(source, out)
    data, file = sorted(names(out.parent), key=len, reverse=True)
    assert (bool(DATA.fullmatch(data)), file) == (True, "out.onnx")
    stored = [
        t for t in onnx.load(out, load_external_data=False).graph.initializer if t.data_location == TensorProto.EXTERNAL
    ]
    places = [{e.key: e.value for e in t.external_data} for t in stored]
    assert {p["location"] for p in places} == {data}
    assert all(int(p["offset"]) % 64 == 0 for p in places)
    assert (out.parent / data).stat().st_size == max(int(p["offset"]) + int(p["length"]) for p in places)
    assert_runs(out)
    moved = out.parent.rename(out.parent.with_name("moved"))
    assert_runs(moved / "out.onnx")


def test_small_tensors_stay_in_the_model(source, out, beside):
    compile(source, out)
    for tensor in onnx.load(out, load_external_data=False).graph.initializer:
        assert (tensor.data_location == TensorProto.EXTERNAL) == (
            np.prod(tensor.dims) * (1 if tensor.data_type == 2 else 4) >= 1024
        )


def test_data_file_only_above_16_mib():
    assert save.EMBED_UP_TO == 16 * 2**20


def test_same_bytes_twice(source, tmp_path, beside):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        compile(source, tmp_path / folder / "out.onnx")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_over_itself(source, out, beside):
    compile(source, out)
    before = contents(out.parent)
    compile(source, out)
    assert contents(out.parent) == before


def test_old_data_file_goes(source, out, beside):
    compile(source, out)
    (old,) = [n for n in names(out.parent) if DATA.fullmatch(n)]
    source.write_bytes(proto(seed=7).SerializeToString())
    compile(source, out)
    (new,) = [n for n in names(out.parent) if DATA.fullmatch(n)]
    assert new != old
    assert_runs(out, seed=7)


def test_old_data_file_goes_when_weights_are_embedded(source, out, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(api, "EMBED_UP_TO", 0)
        compile(source, out)
    assert len(names(out.parent)) == 2
    compile(source, out)
    assert names(out.parent) == ["out.onnx"]


def test_other_files_stay(source, out, beside):
    others = (
        "out.data",
        "out.onnx.data",
        "out.0123456789abc.data",
        "other.0123456789ab.data",
        "out.0123456789AB.data",
        ".out.x.partial",
    )
    for name in others:
        (out.parent / name).write_bytes(b"mine")
    compile(source, out)
    assert {n: b for n, b in contents(out.parent).items() if n in others} == dict.fromkeys(others, b"mine")


def test_data_of_the_source_stays(out, beside):
    """A result that was renamed still reads the data file of its old name; compiling it to that name must not remove it."""
    first = proto()
    first.graph.node.append(onnx.helper.make_node("Relu", ["y"], ["unused"]))
    compile(first, out)
    renamed = out.with_name("renamed.onnx")
    out.rename(renamed)
    assert_runs(renamed)
    compile(proto(seed=7), out)
    assert_runs(out, seed=7)
    assert_runs(renamed)


@pytest.mark.parametrize("name", ["out", "out.bin", "out.v2.onnx", "o u t.onnx", "ö.onnx", "[a].onnx"])
def test_any_name(source, out, beside, name):
    target = out.with_name(name)
    for _ in range(2):
        compile(source, target)
    stem = re.escape(name.removesuffix(".onnx"))
    (data,) = [n for n in names(out.parent) if n != name]
    assert re.fullmatch(stem + r"\.[0-9a-f]{12}\.data", data)
    assert_runs(target)


def test_relative_path(source, out, monkeypatch):
    monkeypatch.chdir(out.parent)
    assert compile(source, "out.onnx").path == Path("out.onnx")
    assert names(out.parent) == ["out.onnx"]


def test_file_modes(source, out, beside):
    """Readable by whom the user's umask lets read."""
    old = os.umask(0o022)
    try:
        compile(source, out)
    finally:
        os.umask(old)
    assert {p.name: oct(p.stat().st_mode & 0o777) for p in out.parent.iterdir()} == dict.fromkeys(
        names(out.parent), "0o644"
    )


# --- external sources ----------------------------------------------------------------------------------------------


def test_external_source_becomes_one_file(out, tmp_path):
    file = with_data(tmp_path)
    before = (file.read_bytes(), (tmp_path / "weights.bin").read_bytes())
    compile(file, out)
    assert names(out.parent) == ["out.onnx"]
    assert (file.read_bytes(), (tmp_path / "weights.bin").read_bytes()) == before
    assert_runs(out)
    embedded = out.with_name("embedded.onnx")
    compile(proto(), embedded)
    assert out.read_bytes() == embedded.read_bytes()


def test_external_source_to_data_file(out, tmp_path, beside):
    """What is not rewritten comes along."""
    source = proto(table=activation((50, 20)))
    source.graph.node.append(onnx.helper.make_node("Neg", ["table"], ["t"]))
    source.graph.output.append(onnx.helper.make_tensor_value_info("t", TensorProto.FLOAT, [50, 20]))
    compile(with_data(tmp_path, source), out)
    assert len(names(out.parent)) == 2
    found = msd_compiler.session(out, log_severity_level=4).run(["y", "t"], X)
    assert relative_l2(found[0], meaning(proto(), X)["y"]) <= 1e-4
    assert np.array_equal(found[1], -activation((50, 20)))


def test_external_source_in_memory(tmp_path):
    done = compile(with_data(tmp_path), None)
    assert not any(t.data_location == TensorProto.EXTERNAL for t in done.model.graph.initializer)


def test_beside_the_source(tmp_path, beside):
    file = with_data(tmp_path)
    before = contents(tmp_path)
    out = tmp_path / "out.onnx"
    compile(file, out)
    after = contents(tmp_path)
    assert len(after) == 4
    assert after.items() >= before.items()
    assert_runs(out)


# --- nothing to rewrite --------------------------------------------------------------------------------------------


def test_copy_of_a_model_without_sites(out, tmp_path):
    file = tmp_path / "m.onnx"
    file.write_bytes(no_sites().SerializeToString())
    done = compile(file, out)
    assert out.read_bytes() == file.read_bytes()
    assert (done.path, done.report.summary.rewritten, done.report.summary.kept) == (out, 0, 1)


def test_copy_of_a_result(source, out):
    compile(source, out)
    again = out.with_name("again.onnx")
    done = compile(out, again)
    assert again.read_bytes() == out.read_bytes()
    assert done.report.summary.rewritten == 1  # what it says of itself


def test_copy_of_a_result_with_data(source, out, tmp_path, beside):
    compile(source, out)
    folder = tmp_path / "again"
    folder.mkdir()
    compile(out, folder / "out.onnx")
    assert contents(folder) == contents(out.parent)
    compile(out, folder / "other.onnx")
    assert_runs(folder / "other.onnx")


def test_copy_with_external_data(out, tmp_path):
    compile(with_data(tmp_path, no_sites()), out)
    assert names(out.parent) == ["out.onnx"]
    found = msd_compiler.session(out, log_severity_level=4).run(None, X)[0]
    assert relative_l2(found, meaning(no_sites(), X)["y"]) < 1e-6


# --- refusals ------------------------------------------------------------------------------------------------------


def refused(source, out, folder):
    """What is said; nothing has changed in the folder."""
    before = contents(folder) if folder.is_dir() else None
    with pytest.raises(OutputError) as error:
        compile(source, out)
    assert (contents(folder) if folder.is_dir() else None) == before
    assert str(out) in str(error.value) or str(Path(out).parent) in str(error.value)
    return str(error.value)


def test_missing_folder(source, out):
    nowhere = out.parent / "nowhere" / "out.onnx"
    assert refused(source, nowhere, out.parent) == f"output folder '{nowhere.parent}' does not exist"


def test_folder_that_is_a_file(source, out):
    assert "does not exist" in refused(source, source / "out.onnx", source.parent)


def test_output_that_is_a_folder(source, out):
    before = out.parent
    assert refused(source, before, before.parent / "source") == f"output '{before}' is a folder; name a file"


def test_folder_that_cannot_be_written(source, out):
    """Permission bits do not bind root: a file system that takes no files."""
    if not Path("/proc/self").is_dir():
        pytest.skip("no /proc here")
    with pytest.raises(OutputError, match="output folder '/proc/self' cannot be written to"):
        compile(source, "/proc/self/out.onnx")


def test_folder_that_may_not_be_written(source, out):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    out.parent.chmod(0o555)
    assert "cannot be written to: Permission denied" in refused(source, out, out.parent)


def test_output_is_the_model(source):
    before = source.read_bytes()
    for same in (source, source.parent / "." / source.name, source.parent / ".." / source.parent.name / source.name):
        assert "is the model itself" in refused(source, same, source.parent)
    assert source.read_bytes() == before


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_output_is_the_model_by_another_name(source, out, link):
    link(out, source)
    assert "is the model itself" in refused(source, out, out.parent)


def test_output_is_the_model_in_a_folder(source):
    assert "is the model itself" in refused(source.parent, source, source.parent)


def test_output_is_the_models_data(tmp_path):
    file = with_data(tmp_path)
    assert "holds its data" in refused(file, tmp_path / "weights.bin", tmp_path)


# --- failures ------------------------------------------------------------------------------------------------------


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def stop(*_, **__):
    raise KeyboardInterrupt


@pytest.fixture(params=["embedded", "data file"])
def old_result(request, out, monkeypatch):
    """An older result where the new one goes."""
    if request.param == "data file":
        monkeypatch.setattr(api, "EMBED_UP_TO", 0)
    compile(proto(seed=7), out)
    return contents(out.parent)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_disk_full(source, out, old_result, monkeypatch, step):
    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync", full) if step == "fsync" else (Path, "replace", full)))
        with pytest.raises(OutputError, match="No space left on device"):
            compile(source, out)
    assert contents(out.parent) == old_result
    assert_runs(out, seed=7)


def test_disk_full_in_the_middle_of_the_data(source, out, beside, monkeypatch):
    monkeypatch.setattr(WeightStore, "_write", full)
    with pytest.raises(OutputError, match="No space left on device"):
        compile(source, out)
    assert names(out.parent) == []


def test_disk_full_while_copying(out, tmp_path, monkeypatch):
    file = tmp_path / "m.onnx"
    file.write_bytes(no_sites().SerializeToString())
    monkeypatch.setattr(save.shutil, "copyfile", full)
    with pytest.raises(OutputError, match="No space left on device"):
        compile(file, out)
    assert names(out.parent) == []


def test_renaming_fails_after_the_data_file(source, out, old_result, monkeypatch):
    """The model's own rename is the last: without it the old result stands, and nothing new."""
    real = Path.replace

    def replace(self, target):
        return full() if Path(target) == out else real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(OutputError, match="cannot be put in place"):
            compile(source, out)
    assert contents(out.parent) == old_result


def test_interrupted(source, out, old_result):
    with pytest.raises(KeyboardInterrupt):
        compile(source, out, progress=stop)
    assert contents(out.parent) == old_result


def test_model_error_while_packing(out, old_result):
    """Scales are read when their layer is packed, after the output was begun."""
    broken = proto()
    scales = next(t for t in broken.graph.initializer if t.name == "s")
    scales.raw_data = np.full(N, np.nan, np.float32).tobytes()
    with pytest.raises(ModelError, match="64 of 64 scales are NaN or Inf"):
        compile(broken, out)
    assert contents(out.parent) == old_result


def test_not_verified(source, out, old_result):
    with pytest.raises((MsdError, msd_compiler.VerificationFailed)) as error:
        msd_compiler.compile(source, out, terms=1, tolerance=1e-9)
    assert isinstance(error.value, msd_compiler.VerificationFailed)
    assert contents(out.parent) == old_result


def test_verified(source, out, beside):
    done = msd_compiler.compile(source, out)
    assert done.report.verification.passed
    assert len(names(out.parent)) == 2


# --- alone ---------------------------------------------------------------------------------------------------------


def test_output_left_without_commit(out):
    with Output(out, load(proto()), external=True) as place:
        place.store.add("t", np.ones(1000, np.float32))
        assert len(names(out.parent)) == 1
    assert names(out.parent) == []


def test_store_keeps_small_arrays_in_the_tensor(tmp_path):
    store = WeightStore(tmp_path / "data")
    small, large = store.add("small", np.ones(255, np.float32)), store.add("large", np.ones(256, np.float32))
    assert (small.data_location, large.data_location) == (TensorProto.DEFAULT, TensorProto.EXTERNAL)
    assert len(small.raw_data) == 1020
    store.abandon()
    assert names(tmp_path) == []


def test_store_without_a_file():
    tensor = WeightStore(None).add("t", np.arange(6, dtype=np.int64).reshape(2, 3)[:, ::2])
    assert np.array_equal(onnx.numpy_helper.to_array(tensor), [[0, 2], [3, 5]])


def test_weight_bytes():
    assert weight_bytes(proto()) == K * N + N * 4 + N


def test_loadable_while_aside(source, out, beside):
    """Verification runs what will be renamed."""
    parsed = load(source)
    with Output(out, parsed, external=True) as place:
        edited = onnx.ModelProto()
        edited.CopyFrom(parsed.proto)
        aside = place.write(edited)
        assert load(aside).proto == edited
        found = msd_compiler.session(aside, portable=True, log_severity_level=4).run(None, X)[0]
        assert found.shape == (3, N)
