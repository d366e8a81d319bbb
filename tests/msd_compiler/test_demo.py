"""``msd demo``: what a newcomer sees first."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from real_models import SHARED

from msd_compiler import ModelError, OptionError, cli
from msd_compiler.demo import material, measure
from msd_compiler.demo.report import Demo
from msd_compiler.quantize import widths
from msd_compiler.report import Report

CODES = [f"int{bits}" for bits in sorted(widths(), reverse=True)]
STORIES = SHARED / "lm_stories260k"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer tokens: the same way in seconds."""
    for name, value in (("PREDICTIONS", 300), ("NEW_TOKENS", 8), ("ROUNDS", 1)):
        monkeypatch.setattr(measure, name, value)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    cli.app(["demo", *map(str, arguments)], standalone_mode=False)
    return capsys.readouterr().out


def check(demo: Demo) -> None:
    """What the demo is there to show."""
    low_bit = [(weights, run) for weights in CODES for run in ("default session", "compiled")]
    assert [(row.weights, row.run) for row in demo.rows] == [("float32", "default session"), *low_bit]
    assert [row.run for row in demo.massive] == ["default session", "compiled"]
    for row in (*demo.rows, *demo.massive):
        if row.run == "compiled":
            assert row.perplexity == pytest.approx(row.exact_perplexity, rel=5e-5)
            assert row.changed <= 0.001 * demo.predictions
    of_sources = [row.bytes for row in demo.rows if row.run == "default session"]
    assert of_sources == sorted(of_sources, reverse=True)
    assert all(row.tokens_per_second > 0 for row in demo.rows)
    today, ours = demo.massive
    assert today.perplexity > 1.5 * today.exact_perplexity
    assert today.changed > 100 * max(1, ours.changed)


def test_json_models_and_report(short, capsys, tmp_path):
    folder, report = tmp_path / "models", tmp_path / "report.json"
    demo = Demo.model_validate_json(run(capsys, "--json", "-o", folder, "--report", report))
    assert demo.predictions == 300
    made = {f"{codes}.msd.onnx" for codes in (*CODES, f"{CODES[0]}-massive")}
    assert {p.name for p in folder.glob("*.msd.onnx")} == made
    written = Report.model_validate_json(report.read_text())
    assert written.evaluation is not None
    assert written.evaluation.tokens.predictions == 300
    assert demo.rows[-1].perplexity == written.evaluation.runs[-1].perplexity


@pytest.mark.slow
def test_screen_and_page(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    page = tmp_path / "page.html"
    shown = run(capsys, "--report", page)
    assert all(len(line.rstrip()) <= 80 for line in shown.splitlines() if str(page) not in line)
    for words in ("perplexity", "tokens/s", "issue 29849", "int4", "compiled", "with massive activations"):
        assert words in shown
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.slow
def test_all_of_it(capsys, tmp_path):
    check(Demo.model_validate_json(run(capsys, "--json", "--report", tmp_path / "page.html")))


@pytest.mark.slow
@pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is not here")
@pytest.mark.parametrize("exporter", ["dynamo18", "ts17"])
def test_another_trained_model(exporter, capsys, tmp_path):
    model = STORIES / f"stories260k_fp32_{exporter}.onnx"
    shown = run(capsys, model, "--tokens", STORIES / "eval_tokens.npz", "--json", "--report", tmp_path / "page.html")
    check(Demo.model_validate_json(shown))


def test_a_model_needs_tokens(tmp_path):
    with pytest.raises(OptionError, match="MODEL and --tokens belong together"):
        cli.app(["demo", "model.onnx"], standalone_mode=False)


def test_a_model_without_float_layers(short, tmp_path):
    tokens = tmp_path / "tokens.npz"
    np.savez(tokens, tokens=np.arange(40))
    of_int8 = Path(__file__).parents[1] / "data" / "exported" / "qwen2_genai_q8_nbits_b32.onnx"
    with pytest.raises(ModelError, match="no linear layers with float weights"):
        measure.show(material.of_files(of_int8, tokens), tmp_path)


def test_ids_without_pieces_are_numbers():
    read = material.bundled()
    assert (
        read.text(read.prompt).strip() == json.loads((material.BUNDLED / "prompts.json").read_text())[0]["text"].strip()
    )
    assert material.Material(read.model, "", read.tokens, read.prompt, None).text([3, 4]) == "3 4"


def test_the_first_tokens_are_whole_predictions():
    some = measure._first(material.bundled().tokens, 100)
    assert sum(len(document) - 1 for document in some.documents) == 100
    assert onnx.load(material.bundled().model, load_external_data=False).graph.input
