"""A folder for onnxruntime-genai becomes another: what is copied, what is edited, what is refused, what it generates."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support import model, nbits_weight

import msd_compiler
from msd_compiler import OutputError, VerificationFailed, api, cli
from msd_compiler.genai import FolderOutput, GenaiFolder, merged_report
from msd_compiler.report import Report

EXPORTED = Path(__file__).parents[1] / "data" / "exported"
QWEN = EXPORTED / "qwen2_genai_q4_nbits_b32_sym.onnx"
QWEN_CONFIG = EXPORTED / "qwen2_genai_q4_nbits_b32_sym.genai_config.json"
LIBRARY = msd_compiler.library_path().name
GRAPH = """(float[M, 64] x) => (float[M, 48] y) {
    y = com.microsoft.MatMulNBits <K = 64, N = 48, bits = 4, block_size = 32, accuracy_level = 4> (x, b, s)
}"""


def quantized(seed: int = 0) -> onnx.ModelProto:
    return model(GRAPH, **nbits_weight(64, 48, 32, seed=seed))


def config(**decoder: Any) -> dict[str, Any]:
    options = {"log_id": "é", "provider_options": []}
    return {"model": {"decoder": {"session_options": options, "filename": "model.onnx", **decoder}}, "search": {}}


def write(folder: Path, content: dict[str, Any] | str) -> Path:
    folder.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content, indent=4, ensure_ascii=False)
    (folder / "genai_config.json").write_text(text, encoding="utf-8")
    return folder


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """A folder as GenAI's builder leaves it, in the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "phi", config())
    onnx.save_model(quantized(), folder / "model.onnx", save_as_external_data=True, location="model.onnx.data",
                    size_threshold=0)  # fmt: skip
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat").mkdir()
    (folder / "chat" / "template.jinja").write_text("{{ messages }}")
    (folder / ".git").mkdir()
    (folder / ".git" / "objects").write_text("the same again")
    return folder


@pytest.fixture
def msd(source, monkeypatch, capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["msd", *arguments])
        capsys.readouterr()
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return run


def test_the_folder_is_complete(msd, source):
    before = contents(source)
    status, out, err = msd("compile", "phi", "--report", "r.json")
    assert status == 0, err
    assert "wrote phi-msd\nonnxruntime-genai 0.9.1 and later loads it" in out
    assert contents(source) == before
    result = Path("phi-msd")
    assert sorted(contents(result)) == [
        "chat/template.jinja",
        "genai_config.json",
        LIBRARY,
        "model.onnx",
        "tokenizer.json",
    ]
    assert (result / LIBRARY).read_bytes() == msd_compiler.library_path().read_bytes()
    assert msd_compiler.inspect(result).summary.rewritten == 1
    report = Report.model_validate_json(Path("r.json").read_text())
    assert (report.source, report.result) == (str(Path("phi/model.onnx")), str(Path("phi-msd/model.onnx")))
    assert report.verification is not None
    assert report.verification.passed
    assert sorted(p.name for p in Path().iterdir()) == ["phi", "phi-msd", "r.json"]


def test_of_the_configuration_only_the_library_changes(source):
    msd_compiler.compile(source, "out", verify=False)
    before = (source / "genai_config.json").read_text(encoding="utf-8")
    after = Path("out/genai_config.json").read_text(encoding="utf-8")
    start, end = before.split('"provider_options": []')
    named = f',\n                "custom_ops_library": "{LIBRARY}"'
    assert after == f'{start}"provider_options": []{named}{end}'


def test_json_is_one_document(msd):
    status, out, err = msd("compile", "phi", "--json", "--no-verify", "--terms", "3")
    assert (status, err) == (0, "")
    assert Report.model_validate_json(out).sites[0].terms == 3


def test_api_names_the_folder(source):
    compiled = msd_compiler.compile(source, "out", verify=False)
    assert compiled.path == Path("out")
    assert compiled.changed
    assert compiled.report.summary.rewritten == 1


def test_an_onnx_file_can_still_be_asked_for(source):
    msd_compiler.compile(source, "out.onnx", verify=False)
    assert Path("out.onnx").is_file()


def test_same_input_same_bytes_and_a_result_again_is_a_copy(msd):
    for arguments in (("phi",), ("phi", "-o", "b"), ("phi-msd", "-o", "c"), ("phi",)):
        status, out, err = msd("compile", *arguments, "--no-verify")
        assert status == 0, err
        assert ("already rewritten: c is a copy" in out) == ("c" in arguments)
        assert "0.9.1 and later" in out
    assert contents(Path("phi-msd")) == contents(Path("b")) == contents(Path("c"))


def test_weights_in_data_files(source, monkeypatch):
    monkeypatch.setattr(api, "EMBED_UP_TO", 0)
    msd_compiler.compile(source, "out", verify=False)
    names = {p.name for p in Path("out").iterdir() if p.name.startswith("model")}
    assert len(names) == 2
    onnx.save_model(quantized(seed=3), source / "model.onnx")
    msd_compiler.compile(source, "out")
    assert {p.name for p in Path("out").iterdir() if p.name.startswith("model")}.isdisjoint(names - {"model.onnx"})


def test_data_that_another_model_needs_is_copied(source):
    shutil.copy(source / "model.onnx", source / "other.onnx")
    msd_compiler.compile(source, "out", verify=False)
    assert Path("out/other.onnx").read_bytes() == (source / "other.onnx").read_bytes()
    assert Path("out/model.onnx.data").is_file()


def test_every_named_model_is_compiled_and_every_session_loads_the_library(msd, source):
    content = config()
    content["model"] |= {
        "vision": {"filename": "sub/vision.onnx", "session_options": {}},
        "embedding": {"filename": "model.onnx"},
        "pipeline_like": [{"head": {"filename": "head.onnx", "session_options": {}, "inherit_session_options": True}}],
    }
    write(source, content)
    (source / "sub").mkdir()
    onnx.save_model(quantized(1), source / "sub" / "vision.onnx")
    onnx.save_model(quantized(2), source / "head.onnx")
    status, out, err = msd("compile", "phi", "--report", "r.json")
    assert status == 0, err
    assert "3 linear layers: 3 rewritten" in out
    report = Report.model_validate_json(Path("r.json").read_text())
    assert [site.node for site in report.sites] == ["model.onnx: y", "sub/vision.onnx: y", "head.onnx: y"]
    assert report.verification is not None
    assert {o.name for o in report.verification.outputs} == {site.node for site in report.sites}
    assert (report.source, report.result) == ("phi", "phi-msd")
    found = read(Path("phi-msd"))["model"]
    assert found["decoder"]["session_options"]["custom_ops_library"] == LIBRARY
    assert found["vision"]["session_options"] == {"custom_ops_library": LIBRARY}
    assert "session_options" not in found["embedding"]  # takes the decoder's
    assert found["pipeline_like"][0]["head"]["session_options"] == {}  # inherits the decoder's
    for name in ("sub/vision.onnx", "head.onnx"):
        assert msd_compiler.inspect(Path("phi-msd") / name).summary.rewritten == 1


def test_a_pipeline_needs_no_decoder_file(source):
    content = config(pipeline=[{"first": {"filename": "model.onnx"}}])
    del content["model"]["decoder"]["filename"], content["model"]["decoder"]["session_options"]
    write(source, content)
    msd_compiler.compile(source, "out", verify=False)
    assert read(Path("out"))["model"]["decoder"]["session_options"] == {"custom_ops_library": LIBRARY}


def test_the_report_of_several_layer_by_layer():
    one = msd_compiler.compile(quantized()).report
    assert merged_report(Path("in"), Path("out"), {"a": one}) is one
    two = merged_report(Path("in"), Path("out"), {"a": one, "b": one.model_copy(update={"verification": None})})
    assert (two.source, two.result) == ("in", "out")
    assert two.summary.sites == 2
    assert two.verification is not None
    assert [o.name for o in two.verification.outputs] == ["a: y"]


def test_with_nothing_to_rewrite_the_folder_is_a_copy_without_the_library(msd, source):
    graph = "(float[M, 8] x) => (float[M, 4] y) { y = MatMul(x, w) }"
    onnx.save_model(model(graph, w=np.ones((8, 4), np.float32)), source / "model.onnx")
    status, out, _ = msd("compile", "phi")
    assert status == 0
    assert out.endswith("nothing to rewrite: phi-msd is a copy\n")
    assert read(Path("phi-msd")) == read(source)
    assert LIBRARY not in contents(Path("phi-msd"))


def test_over_the_tolerance_nothing_is_written(msd, source):
    status, _, err = msd("compile", "phi", "--terms", "1")
    assert status == 1
    assert "not written: model.onnx: output 'y'" in err
    assert [p.name for p in Path().iterdir()] == ["phi"]
    with pytest.raises(VerificationFailed) as failure:
        msd_compiler.compile(source, "out", tolerance=1e-9)
    assert failure.value.report.result == str(Path("out/model.onnx"))


BAD_CONFIGS = {
    "no JSON": ("{", "is not JSON"),
    "deep": ("[" * 100_000, "is not JSON"),
    "surrogate": ('{"model": {"decoder": {"filename": "\\ud800"}}}', "is not JSON"),
    "array": ("[]", "has no object 'decoder' in an object 'model'"),
    "no model": ("{}", "has no object 'decoder'"),
    "no decoder": ('{"model": {"encoder": {"filename": "model.onnx"}}}', "has no object 'decoder'"),
    "no filename": ('{"model": {"decoder": {}}}', "the decoder has no filename"),
    "filename of another type": (config(filename=3), "filename is 3"),
    "absolute": (config(filename="/etc/model.onnx"), "must be a relative path without '..'"),
    "above": (config(filename="../phi/model.onnx"), "must be a relative path without '..'"),
    "missing": (config(filename="none.onnx"), "'none.onnx', which is not in 'phi'"),
    "no model file": (config(filename="tokenizer.json"), "is not ONNX"),
    "session options": (config(session_options=[]), "session_options that are no object"),
    "another library": (
        config(session_options={"custom_ops_library": "x.so"}),
        "has a custom_ops_library already, 'x.so'",
    ),
    "shared weights": (config(shared_initializers=[{"name": "w"}]), "has shared_initializers"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configurations_are_refused(msd, source, case):
    content, message = BAD_CONFIGS[case]
    write(source, content)
    status, _, err = msd("compile", "phi")
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert [p.name for p in Path().iterdir()] == ["phi"]


@pytest.mark.parametrize("name", ["tokenizer.model", "chat", "model.onnx"])
def test_symbolic_links_are_refused(msd, source, name):
    Path("elsewhere").mkdir()
    if (source / name).is_file():
        (source / name).unlink()
    elif (source / name).is_dir():
        shutil.rmtree(source / name)
    (source / name).symlink_to(Path("elsewhere").resolve())
    status, _, err = msd("compile", "phi")
    assert status == 2
    assert "is a symbolic link" in err
    assert sorted(p.name for p in Path().iterdir()) == ["elsewhere", "phi"]


BAD_OUTPUTS = {
    "itself": (("-o", "phi"), "is the model's folder"),
    "inside": (("-o", "phi/chat/out"), "one lies in the other"),
    "around": (("-o", "."), "one lies in the other"),
    "missing parent": (("-o", "no/out"), "lies in 'no', which does not exist"),
    "a file": (("-o", "file"), "is no result of an earlier run"),
    "a foreign folder": (("-o", "folder"), "is no result of an earlier run"),
    "report inside the source": (("--report", "phi/tokenizer.json"), "lies in 'phi'"),
    "report inside the result": (("-o", "folder", "--report", "folder/r.json"), "lies in 'folder'"),
    "report nowhere": (("--report", "no/r.json"), "must be a file in an existing folder"),
}


@pytest.mark.parametrize("case", BAD_OUTPUTS)
def test_bad_outputs_are_refused(msd, source, case):
    arguments, message = BAD_OUTPUTS[case]
    Path("file").write_text("")
    write(Path("folder"), config())
    before = contents(Path())
    status, _, err = msd("compile", "phi", *arguments)
    assert status == 2
    assert message in err
    assert contents(Path()) == before


def test_when_the_folder_cannot_be_put_in_place_the_old_one_is_back(source, monkeypatch):
    msd_compiler.compile(source, "out", verify=False)
    before = contents(Path("out"))
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.parent.name.endswith(".partial"):
            raise OSError(28, "No space left on device")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OutputError, match="No space left"):
        msd_compiler.compile(source, "out", terms=3, verify=False)
    assert contents(Path("out")) == before
    assert sorted(p.name for p in Path().iterdir()) == ["out", "phi"]


def test_results_of_one_name_at_once_leave_each_other_alone(source):
    """A folder ``out`` and a file ``out.onnx`` have the same name aside."""
    with FolderOutput(Path("out"), GenaiFolder.read(source)) as output:
        place = output.model("model.onnx")
        msd_compiler.compile(source / "model.onnx", "out.onnx", verify=False)
        assert place.parent.is_dir()
    assert sorted(p.name for p in Path().iterdir() if p.name.startswith((".", "out"))) == ["out.onnx"]


def test_what_a_killed_process_left_goes(source):
    left = Path(".out.abcdefgh.partial")
    left.mkdir()
    (left / "model.onnx").write_bytes(b"half")
    msd_compiler.compile(source, "out", verify=False)
    assert not left.exists()
    assert Path("out").stat().st_mode == source.stat().st_mode  # not that of what lies aside


# --- with onnxruntime-genai ----------------------------------------------------------------------------------------


@pytest.fixture
def qwen(tmp_path) -> Path:
    """What onnxruntime-genai's builder wrote: a tiny Qwen2 at accuracy level 4."""
    folder = tmp_path / "qwen"
    folder.mkdir()
    shutil.copy(QWEN, folder / "model.onnx")
    shutil.copy(QWEN_CONFIG, folder / "genai_config.json")
    return folder


def test_a_real_folder_compiles(qwen, tmp_path):
    compiled = msd_compiler.compile(qwen, tmp_path / "out", verify=False)
    assert compiled.report.summary.rewritten == 11
    assert read(tmp_path / "out")["model"]["decoder"]["session_options"]["custom_ops_library"] == LIBRARY


def at_level_0(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    proto = onnx.load(folder / "model.onnx")
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    onnx.save_model(proto, target / "model.onnx")
    return target


def generate(genai: Any, folder: Path, prompt: list[int], count: int) -> tuple[list[int], list[np.ndarray]]:
    """Greedy tokens, and the logits that each was taken from."""
    opened = genai.Model(str(folder))
    parameters = genai.GeneratorParams(opened)
    parameters.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = genai.Generator(opened, parameters)
    generator.append_tokens(prompt)
    tokens, logits = [], []
    while not generator.is_done():
        logits.append(np.array(generator.get_logits()).reshape(-1, 640)[-1])
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens, logits


def test_a_low_bit_cache_needs_samples(qwen, tmp_path):
    with pytest.raises(msd_compiler.OptionError, match="carries no scales beside its caches; give --samples"):
        msd_compiler.compile(qwen, tmp_path / "out", kv_cache=msd_compiler.KvCache(8))
    assert not (tmp_path / "out").exists()


def test_genai_generates_with_a_low_bit_cache(qwen, tmp_path):
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    prompt = [int(token) for token in np.random.default_rng(0).integers(3, 640, 16)]
    ids = np.array([prompt])
    caches = {f"past_key_values.{i}.{k}": np.zeros((1, 2, 0, 32), np.float32) for i in (0, 1) for k in ("key", "value")}
    sample = msd_compiler.Feed("prompt", {"input_ids": ids, "attention_mask": np.ones_like(ids)} | caches)
    msd_compiler.compile(qwen, tmp_path / "out", kv_cache=msd_compiler.KvCache(8, [sample]))
    exact = generate(genai, at_level_0(qwen, tmp_path / "oracle"), prompt, 32)[1]
    tokens, logits = generate(genai, tmp_path / "out", prompt, 32)
    assert len(tokens) == 32
    assert np.abs(exact[0] - logits[0]).max() < 0.05 * np.abs(exact[0]).max()


MARGIN = 0.02
"""Logits of the oracle closer than this may swap: ten times what the result is away from it."""


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("external", [True, False])
def test_genai_generates_the_oracles_tokens(qwen, tmp_path, monkeypatch, library, external):
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    if external:
        monkeypatch.setattr(api, "EMBED_UP_TO", 0)
    msd_compiler.compile(qwen, tmp_path / "built", verify=False)
    result = (tmp_path / "built").rename(tmp_path / "moved")
    if not library:
        (result / LIBRARY).unlink()
        shutil.copy(qwen / "genai_config.json", result)
    oracle = at_level_0(qwen, tmp_path / "oracle")
    for seed in range(2):
        prompt = [int(token) for token in np.random.default_rng(seed).integers(3, 640, 16)]
        expected, exact = generate(genai, oracle, prompt, 64)
        found, logits = generate(genai, result, prompt, 64)
        assert len(expected) == 64
        margins = [float(best - second) for second, best in (np.sort(row)[-2:] for row in exact)]
        same = next((i for i, pair in enumerate(zip(expected, found, strict=True)) if pair[0] != pair[1]), 64)
        assert same == 64 or margins[same] < MARGIN
        for one, other in zip(exact[: same + 1], logits, strict=False):
            assert np.abs(one - other).max() < MARGIN / 10


def test_genai_loads_the_library_in_the_folder(qwen, tmp_path):
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    msd_compiler.compile(qwen, tmp_path / "out", verify=False)

    def load() -> subprocess.CompletedProcess[str]:  # in a process of its own: this one has the library already
        script = "import onnxruntime_genai, sys; onnxruntime_genai.Model(sys.argv[1])"
        return subprocess.run(
            [sys.executable, "-c", script, tmp_path / "out"], cwd=tmp_path, capture_output=True, text=True, check=False
        )

    assert load().returncode == 0
    (tmp_path / "out" / LIBRARY).unlink()
    without = load()
    assert without.returncode != 0
    assert LIBRARY in without.stderr
