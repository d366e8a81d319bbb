"""Evaluation of language models: its figures against plain float64, and what it says of mistakes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from msd_compiler.models import TINY_LLAMA as TINY
from support import model, nbits_weight
from typer import Typer
from typer.testing import CliRunner

import msd_compiler
from msd_compiler import Decoder, ModelError, MsdError, OptionError, OutputError
from msd_compiler.evaluate import run, score
from msd_compiler.evaluate.command import evaluate as command
from msd_compiler.evaluate.measure import evaluate
from msd_compiler.evaluate.tokens import read_text, read_tokens, tokens_of
from msd_compiler.evaluate.windows import Windows, batches
from msd_compiler.oracle_session import open_oracle
from msd_compiler.report import Report, embedded_report
from msd_compiler.source import load

SHARED = Path(__file__).parents[3] / "shared" / "models" / "lm_stories260k"

DOCUMENTS = [np.random.default_rng(i).integers(0, 512, n) for i, n in enumerate((23, 9, 16))]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("evaluate") / "out.onnx"
    msd_compiler.compile(TINY, path, verify=False)
    return path


def toy(vocabulary: int = 8, *, seed: int = 0, last_only: bool = False):
    """A model without a cache: logits of a token depend on it alone."""
    rng = np.random.default_rng(seed)
    ending = (
        "last = Constant<value_ints = [-1]>() logits = Gather<axis = 1>(h, last)"
        if last_only
        else "logits = Identity(h)"
    )
    sizes = f"K = 32, N = {vocabulary}, bits = 4, block_size = 32, accuracy_level = 4"
    return model(
        "(int64[B, T] input_ids) => (float[B, N, V] logits) {"
        f"e = Gather(table, input_ids) h = com.microsoft.MatMulNBits<{sizes}>(e, b, s) {ending} }}",
        table=rng.standard_normal((vocabulary, 32)).astype(np.float32),
        **nbits_weight(32, vocabulary, 32, seed=seed),
    )


# --- figures -------------------------------------------------------------------------------------------------------


def plain(path: Path, *, is_oracle: bool) -> np.ndarray:
    """``[predictions, V]`` float64 of every document in one piece, one step each."""
    source = load(path)
    session = open_oracle(source)[0] if is_oracle else msd_compiler.session(path)
    decoder = Decoder(session, model=source.proto)
    rows = []
    for document in DOCUMENTS:
        decoder.reset()
        rows.append(decoder.step(document[None, :-1])[0].astype(np.float64))
    return np.concatenate(rows)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def test_figures_are_those_of_plain_float64(compiled):
    found = evaluate(TINY, [compiled], tokens=DOCUMENTS, windows=Windows(64))
    targets = np.concatenate([d[1:] for d in DOCUMENTS])
    places = np.concatenate([np.arange(1, len(d)) + s for d, s in zip(DOCUMENTS, (0, 23, 32), strict=True)])
    exact = plain(TINY, is_oracle=True)
    p, rows = softmax(exact), np.arange(len(targets))
    assert found.tokens.predictions == len(targets) == 45
    assert found.oracle.perplexity == pytest.approx(np.exp(-np.log(p[rows, targets]).mean()), rel=1e-12)
    assert [r.name for r in found.runs] == [run.DEFAULT, run.LEVEL_ZERO, "out.onnx"]
    for row, path in ((found.runs[0], TINY), (found.runs[2], compiled)):
        logits = plain(path, is_oracle=False)
        q = softmax(logits)
        kl = (p * np.log(p / q)).sum(axis=1)
        assert row.perplexity == pytest.approx(np.exp(-np.log(q[rows, targets]).mean()), rel=1e-9)
        assert row.kl_mean == pytest.approx(kl.mean(), rel=1e-5, abs=1e-15)
        assert row.kl_max == pytest.approx(kl.max(), rel=1e-5, abs=1e-15)
        best, top = exact.argmax(axis=1), logits.argmax(axis=1)
        wrong = np.flatnonzero(best != top)
        assert row.same_top == 1 - len(wrong) / 45
        expected = {(places[i], exact[i, best[i]] - exact[i, top[i]], best[i], top[i], targets[i]) for i in wrong}
        assert {(f.position, f.margin, f.oracle, f.found, f.target) for f in row.flips} == expected
        assert sum(row.kl_histogram) == 45
    default, level_zero, ours = found.runs
    assert ours.kl_mean < default.kl_mean / 100
    assert level_zero.kl_mean < ours.kl_mean
    assert default.kl_mean > 1e-6


@pytest.mark.parametrize("windows", [Windows(4), Windows(8, 3), Windows(5, 5, 3), Windows(64, 1), Windows(1)])
def test_every_token_but_a_documents_first_counts_once(windows):
    tokens = tokens_of(DOCUMENTS)
    positions = []
    for batch in batches(tokens, windows):
        assert batch.tokens.shape[0] <= windows.batch
        assert batch.tokens.shape[1] <= windows.size
        positions += batch.positions[:, -batch.counted :].ravel().tolist()
        everything = np.concatenate(DOCUMENTS)
        np.testing.assert_array_equal(everything[batch.positions], batch.targets)
        np.testing.assert_array_equal(everything[batch.positions - 1], batch.tokens)
    starts = set(tokens.starts)
    assert sorted(positions) == [i for i in range(tokens.count) if i not in starts]


def test_batches_do_not_change_figures():
    documents = [DOCUMENTS[0][:10], DOCUMENTS[0][10:20], DOCUMENTS[2][:10]]
    one = evaluate(TINY, tokens=documents, windows=Windows(9, 5))
    three = evaluate(TINY, tokens=documents, windows=Windows(9, 5, 3))
    assert one.oracle.perplexity == pytest.approx(three.oracle.perplexity, rel=1e-6)
    assert one.tokens.predictions == three.tokens.predictions == 27


def test_kl_of_divergences_below_the_rounding_of_logarithms():
    logits = np.random.default_rng(0).standard_normal((3, 50))
    moved = logits + 1e-7 * np.random.default_rng(1).standard_normal(logits.shape)
    p = softmax(logits)
    change = moved - logits
    change -= (p * change).sum(axis=1, keepdims=True)
    expected = (p * change**2).sum(axis=1) / 2  # to second order
    np.testing.assert_allclose(score.kl_divergence(*map(score.log_softmax, (logits, moved))), expected, rtol=0.05)


def test_kl_of_impossible_tokens():
    logits = np.array([[1.0, 2.0, -np.inf]])
    p, q = map(score.log_softmax, (logits, np.array([[2.0, 1.0, -np.inf]])))
    assert score.kl_divergence(p, p) == 0
    assert score.kl_divergence(p, q) == pytest.approx(np.sum(np.exp(p[0, :2]) * (p[0, :2] - q[0, :2])))


def test_a_model_without_a_cache_and_a_parsed_one():
    found = evaluate(toy(), tokens=[[1, 2, 3, 4, 5, 6, 7, 0]])
    assert found.runs[0].kl_mean > 1e3 * found.runs[1].kl_mean


# --- per site ------------------------------------------------------------------------------------------------------


def test_layers_alone():
    found = evaluate(TINY, tokens=DOCUMENTS, per_site=True)
    assert found.sites is not None
    assert len(found.sites) == 29
    assert [s.int8_ratio for s in found.sites] == sorted((s.int8_ratio for s in found.sites), reverse=True)
    for site in found.sites:
        assert site.crest >= 1
        assert 50 < site.int8_error / site.msd_error < 600  # 8 bits more, but for small values beside a loud channel


def test_a_layers_errors_are_those_of_plain_float64():
    proto, ids = toy(), np.array([[1, 2, 3, 4, 5, 6, 7]])
    found = evaluate(proto, tokens=[[*ids[0], 0]], per_site=True).sites
    assert found is not None
    stored = {t.name: load(proto).array(t) for t in proto.graph.initializer}
    x = stored["table"][ids[0]].astype(np.float64)
    bits = np.stack([stored["b"] & 15, stored["b"] >> 4], axis=-1).reshape(8, 32).astype(np.float64) - 8
    w = (bits * stored["s"]).T
    step = np.abs(x).max(axis=1, keepdims=True) / 127
    off = np.linalg.norm((np.rint(x / step) * step - x) @ w, axis=1) / np.linalg.norm(x @ w, axis=1)
    noise = np.sqrt((x**2).sum(axis=1) * (stored["s"].astype(np.float64) ** 2).sum() / 12) / np.linalg.norm(
        x @ w, axis=1
    )
    assert found[0].int8_error == pytest.approx(np.sqrt(np.mean(off**2)), rel=1e-4)
    assert found[0].weight_error == pytest.approx(np.sqrt(np.mean(noise**2)), rel=1e-5)
    crest = np.abs(x).max(axis=1) / np.sqrt(np.mean(x**2, axis=1))
    assert found[0].crest == pytest.approx(np.sqrt(np.mean(crest**2)), rel=1e-5)


# --- resuming ------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import numpy as np
from msd_compiler.evaluate import measure
from msd_compiler.evaluate.measure import evaluate
from msd_compiler.evaluate.windows import Windows
measure.SAVE_EVERY = 0

def progress(what, done, total):
    if done == 3:
        os.kill(os.getpid(), signal.SIGKILL)

documents = [np.random.default_rng(i).integers(0, 512, n) for i, n in enumerate((23, 9, 16))]
evaluate(sys.argv[1], tokens=documents, windows=Windows(8), resume=sys.argv[2], threads=1, progress=progress)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL on Windows")
def test_goes_on_after_a_kill(tmp_path):
    state = tmp_path / "state.json"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(TINY), str(state)], check=False)
    assert ended.returncode == -9
    assert json.loads(state.read_text())["done"] == 3
    steps = []
    found = evaluate(
        TINY,
        tokens=DOCUMENTS,
        windows=Windows(8),
        resume=state,
        threads=1,
        progress=lambda what, done, total: steps.append(done),
    )
    assert steps[0] == 3
    assert found == evaluate(TINY, tokens=DOCUMENTS, windows=Windows(8), threads=1)
    again = evaluate(TINY, tokens=DOCUMENTS, windows=Windows(8), resume=state, threads=1)
    assert again == found
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"tokens": DOCUMENTS[:2]}, "its tokens is"),
        ({"windows": Windows(9)}, "its window is 8 by 8, batch 1, and here it is 9 by 9"),
        ({"source": toy(512)}, "its source is"),
        ({"results": [TINY]}, "its result 1 is absent"),
    ],
    ids=["tokens", "window", "source", "result"],
)
def test_refuses_the_state_of_another_evaluation(tmp_path, change, what):
    options = {"source": TINY, "tokens": DOCUMENTS, "windows": Windows(8), "resume": tmp_path / "state"}
    evaluate(**options)
    with pytest.raises(MsdError, match=what):
        evaluate(**(options | change))


def test_refuses_a_file_that_is_no_state(tmp_path):
    (tmp_path / "state").write_text("{}")
    with pytest.raises(MsdError, match=r"state '.*state' cannot be read"):
        evaluate(TINY, tokens=DOCUMENTS, resume=tmp_path / "state")
    with pytest.raises(OutputError, match="file in an existing folder"):
        evaluate(TINY, tokens=DOCUMENTS, resume=tmp_path / "no" / "state")


# --- what does not fit ---------------------------------------------------------------------------------------------


def test_a_token_outside_the_vocabulary():
    with pytest.raises(OptionError, match=r"the given tokens: token id 512, and the model's vocabulary is 0 to 511"):
        evaluate(TINY, tokens=[1, 512])


def test_a_result_of_another_vocabulary():
    with pytest.raises(ModelError, match=r"result: its vocabulary has 16 tokens, the source's has 8"):
        evaluate(toy(8), [toy(16)], tokens=[1, 2])


def test_a_model_that_is_no_decoder(tmp_path):
    proto = model("(float[M, 4] x) => (float[M, 4] y) { y = Relu(x) }")
    (tmp_path / "relu.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=r"relu.onnx: the model is no decoder .* none of its inputs takes token ids"):
        evaluate(tmp_path / "relu.onnx", tokens=[1, 2])


def test_a_model_that_gives_the_last_logits_only():
    with pytest.raises(ModelError, match="the oracle: it gives the logits of the last token only"):
        evaluate(toy(last_only=True), tokens=[1, 2, 3, 4])


def test_logits_that_are_no_numbers():
    proto = toy()
    table = next(t for t in proto.graph.initializer if t.name == "table")
    values = load(proto).array(table).copy()
    values[3] = np.nan
    table.raw_data = values.tobytes()
    with pytest.raises(ModelError, match="the oracle: the logits that predict token 2 are NaN"):
        evaluate(proto, tokens=[1, 3, 2])


@pytest.mark.parametrize(
    ("windows", "what"), [((0,), "window"), ((8, 9), "stride is 9; it must be 1 to 8"), ((8, None, 0), "batch")]
)
def test_windows_out_of_range(windows, what):
    with pytest.raises(OptionError, match=what):
        Windows(*windows)


# --- tokens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"tokens": [1, 2, 3], "other": [9]}, [[1, 2, 3]]),
        ({"anything": [1, 2, 3]}, [[1, 2, 3]]),
        ({"tokens": [[1, 2, -1], [3, 4, 5]]}, [[1, 2], [3, 4, 5]]),
        ({"ids": [1, 2, 3, 4, 5], "offsets": [0, 2, 5]}, [[1, 2], [3, 4, 5]]),
        ({"ids": [1, 2, 3, 4, 5], "offsets": [0, 2]}, [[1, 2], [3, 4, 5]]),
    ],
)
def test_token_files(tmp_path, arrays, expected):
    np.savez(tmp_path / "t.npz", **arrays)
    assert [d.tolist() for d in read_tokens(tmp_path / "t.npz").documents] == expected


@pytest.mark.parametrize(
    ("arrays", "what"),
    [
        ({"a": [1, 2], "b": [3, 4]}, "has arrays 'a', 'b'; an array 'tokens' is needed"),
        ({"tokens": [1.0, 2.0]}, r"are float64\[2\]; integers"),
        ({"tokens": [1]}, "no two tokens in a row"),
        ({"tokens": [[1, -1, 2]]}, "negative token ids within a document"),
        ({"tokens": [1, 2, 3], "offsets": [1, 2]}, "offsets must ascend from 0 to 3"),
    ],
)
def test_refused_token_files(tmp_path, arrays, what):
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(OptionError, match=what):
        read_tokens(tmp_path / "t.npz")


def test_missing_token_file(tmp_path):
    with pytest.raises(MsdError, match=r"cannot be read as an .npz"):
        read_tokens(tmp_path / "no.npz")


def write_tokenizer(folder: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 1, "b": 2, "?": 0}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_text(tmp_path):
    (tmp_path / "text").write_text("a b c a")
    found = read_text(tmp_path / "text", write_tokenizer(tmp_path))
    assert found.documents[0].tolist() == [1, 2, 0, 1]
    with pytest.raises(MsdError, match=r"text '.*no' cannot be read"):
        read_text(tmp_path / "no", tmp_path / "tokenizer.json")
    with pytest.raises(MsdError, match=r"tokenizer '.*no' cannot be read"):
        read_text(tmp_path / "text", tmp_path / "no")


# --- the command ---------------------------------------------------------------------------------------------------

app = Typer()
app.command()(command)


def told(*arguments: object):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "80"})


def test_command(tmp_path, compiled):
    np.savez(tmp_path / "t.npz", tokens=np.concatenate(DOCUMENTS))
    given = (TINY, compiled, "--tokens", tmp_path / "t.npz", "--window", 16)
    shown = told(*given, "--per-site")
    assert shown.exit_code == 0
    assert all(len(line) <= 80 for line in shown.output.splitlines())
    for word in ("oracle", "default session", "accuracy level 0", "out.onnx", "same top", "two terms"):
        assert word in shown.output
    printed = json.loads(told(*given, "--json").output)
    assert {"perplexity"} <= printed["oracle"].keys()
    assert all(
        {"name", "perplexity", "kl_mean", "kl_max", "same_top", "flips"} <= row.keys() for row in printed["runs"]
    )


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_plot(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    np.savez(tmp_path / "t.npz", tokens=DOCUMENTS[0])
    shown = told(TINY, "--tokens", tmp_path / "t.npz", "--plot", tmp_path / f"p.{suffix}")
    assert shown.exit_code == 0
    assert (tmp_path / f"p.{suffix}").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((), "one of --text and --tokens is needed"),
        (("--tokens", "t.npz", "--text", "t"), "one of --text and --tokens is needed"),
        (("--tokens", "t.npz", "--tokenizer", "t"), "--tokenizer is for --text"),
        (("--text", __file__), "no tokenizer.json in '.*models': name one with --tokenizer"),
        (("--tokens", "t.npz", "--plot", "p.pdf"), "must end with .svg or .png"),
        (("--tokens", "t.npz", "--report", "r.pdf"), "must end with .json or .html"),
        (("--tokens", "t.npz", "--report", "no/r.html"), "must be a file in an existing folder"),
        (("--tokens", "t.npz", "--report", "r.html"), r"about a RESULT that msd compile wrote.* \(none was given\)"),
        ((TINY, "--tokens", "t.npz", "--report", "r.html"), r"about a RESULT .*tiny_llama.onnx'\)"),
    ],
)
def test_command_refuses(arguments, what):
    error = told(TINY, *arguments).exception
    assert isinstance(error, MsdError)
    assert re.search(what, str(error))


def test_report(tmp_path, compiled):
    np.savez(tmp_path / "t.npz", tokens=np.concatenate(DOCUMENTS))
    given = (TINY, TINY, compiled, "--tokens", tmp_path / "t.npz", "--per-site", "--json")
    printed = told(*given, "--report", tmp_path / "r.json").output
    assert told(*given, "--report", tmp_path / "r.html").exit_code == 0
    report = Report.model_validate_json((tmp_path / "r.json").read_text())
    assert json.loads(printed) == report.evaluation.model_dump(exclude_none=True)  # and nothing else was printed
    carried = embedded_report(load(compiled).proto)
    assert report.sites == carried.sites
    assert (report.source, report.result) == (str(TINY), str(compiled))
    assert {row.node for row in report.evaluation.sites} <= {site.node for site in report.sites}
    page = (tmp_path / "r.html").read_text()
    assert "Is it still right, on a text" in page
    assert '<tr class="ours">\n<th scope="row">out.onnx</th>' in page


# --- a trained model -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not here")
@pytest.mark.parametrize(
    ("name", "rounds"), [("q8_nbits_b32_sym", False), ("q4_qdq_b32_sym", True), ("q4_nbits_b32_sym_acc4", True)]
)
def test_trained_model(name, rounds, tmp_path):
    source = SHARED / f"stories260k_{name}.onnx"
    msd_compiler.compile(source, tmp_path / "out.onnx")
    found = evaluate(source, [tmp_path / "out.onnx"], tokens=SHARED / "eval_tokens.npz")
    default, level_zero, ours = found.runs
    assert found.tokens.predictions == 9869
    assert level_zero.kl_mean < 1e-10
    assert f"{ours.perplexity:.4g}" == f"{found.oracle.perplexity:.4g}"
    assert ours.same_top >= 0.999
    assert all(flip.margin <= 0.02 for flip in ours.flips)
    if rounds:
        assert default.kl_mean >= 100 * ours.kl_mean
        assert len(default.flips) > 10 * len(ours.flips)
