"""The trained model in ``models/bundled``: what is committed runs, says what its record says, and names no machine."""

from __future__ import annotations

import json
import math
import re
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "models" / "python_docs"))
import corpus

FOLDER = Path(__file__).parents[2] / "models" / "bundled"
CONTEXT = 512


@pytest.fixture(scope="module")
def session() -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(FOLDER / "model.onnx", options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def record() -> dict:
    return read("training.json")


def read(name: str):
    return json.loads((FOLDER / name).read_text("utf-8"))


def documents(name: str) -> list[np.ndarray]:
    with np.load(FOLDER / name, allow_pickle=False) as data:
        return [data["ids"][a:b].astype(np.int64) for a, b in pairwise(data["offsets"])]


def run(session: onnxruntime.InferenceSession, ids: np.ndarray, cache: list[np.ndarray] | None = None):
    """Logits ``[T, V]`` of a row of ids behind a cache, and the cache behind them."""
    names = [i.name for i in session.get_inputs()]
    cache = cache or [np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in session.get_inputs()[3:]]
    past = cache[0].shape[2]
    given = [ids[None], np.ones((1, past + len(ids)), np.int64), np.arange(past, past + len(ids))[None], *cache]
    logits, *present = session.run(None, dict(zip(names, given, strict=True)))
    return logits[0], present


def perplexity(session: onnxruntime.InferenceSession, texts: list[np.ndarray]) -> float:
    losses = []
    for text in texts:
        for start in range(0, len(text) - 1, CONTEXT):
            window = text[start : start + CONTEXT + 1]
            logits = run(session, window[:-1])[0].astype(np.float64)
            losses.append(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), window[1:]])
    return float(np.exp(np.concatenate(losses).mean()))


def first(texts: list[np.ndarray], tokens: int) -> list[np.ndarray]:
    starts = np.cumsum([0, *map(len, texts)])
    return [text[: tokens - start] for text, start in zip(texts, starts, strict=False) if start < tokens]


def test_small_enough_to_commit():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 6e6


def test_a_decoder_as_exporters_write_it(session, record):
    onnx.checker.check_model(str(FOLDER / "model.onnx"), full_check=True)
    settings = record["settings"]
    kinds = [f"{layer}.{kind}" for layer in range(settings["num_hidden_layers"]) for kind in ("key", "value")]
    assert [i.name for i in session.get_inputs()] == [
        *("input_ids", "attention_mask", "position_ids"),
        *(f"past_key_values.{kind}" for kind in kinds),
    ]
    assert [o.name for o in session.get_outputs()] == ["logits", *(f"present.{kind}" for kind in kinds)]
    cache = ["batch_size", settings["num_key_value_heads"], "past_sequence_length", settings["head_dim"]]
    assert all(i.shape == cache for i in session.get_inputs()[3:])
    assert settings["num_key_value_heads"] < settings["num_attention_heads"]
    assert session.get_outputs()[0].shape[2] == settings["vocab_size"] == 1024


def test_perplexity_is_the_recorded_one(session, record):
    wanted = record["evaluation_first"]
    texts = first(documents("evaluation.npz"), wanted["tokens"])
    assert wanted["tokens"] == sum(map(len, texts)) == 2000
    # float32 sums differ between processors; the same tokens, so the mean moves by far less than a logit does
    assert perplexity(session, texts) == pytest.approx(wanted["perplexity"], rel=1e-3)


def test_a_token_through_the_cache_is_one_of_all_at_once(session):
    ids = documents("evaluation.npz")[0][:5]
    whole, _ = run(session, ids)
    _, cache = run(session, ids[:4])
    last, _ = run(session, ids[4:], cache)
    np.testing.assert_allclose(last, whole[4:], rtol=0, atol=1e-4)  # float32 sums in another order


def test_batches(session):
    names = [i.name for i in session.get_inputs()]
    ids = np.stack([documents("evaluation.npz")[i][:7] for i in range(2)])
    empty = [np.zeros((2, i.shape[1], 0, i.shape[3]), np.float32) for i in session.get_inputs()[3:]]
    given = [ids, np.ones_like(ids), np.tile(np.arange(7), (2, 1)), *empty]
    logits = session.run(["logits"], dict(zip(names, given, strict=True)))[0]
    for row, one in zip(logits, ids, strict=True):
        np.testing.assert_allclose(row, run(session, one)[0], rtol=0, atol=1e-4)  # as above


@pytest.mark.parametrize(("name", "least"), [("evaluation.npz", 10_000), ("calibration.npz", 2_000)])
def test_documents_begin(name, least):
    texts = documents(name)
    assert sum(map(len, texts)) >= least
    assert all(text[0] == 0 and text[1:].min() > 0 for text in texts)


def test_ids_are_the_text():
    pieces = read("pieces.json")
    assert len(pieces) == 1024
    assert pieces[0] == ""
    texts = [b"".join(pieces[i].encode("latin-1") for i in ids).decode() for ids in documents("evaluation.npz")]
    assert "\n\n\n".join(texts) + "\n" == (FOLDER / "evaluation.txt").read_text("utf-8")
    for prompt in read("prompts.json"):
        assert b"".join(pieces[i].encode("latin-1") for i in prompt["ids"]).decode() == prompt["text"]
        assert prompt["ids"][0] == 0


def test_pieces_are_the_tokenizers():
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    text = (FOLDER / "evaluation.txt").read_text("utf-8")[:-1]
    ids = [tokenizer.encode(part).ids for part in text.split("\n\n\n")]
    assert ids == [list(d) for d in documents("evaluation.npz")]


def test_nothing_for_calibration_is_evaluated():
    evaluated = {tuple(text) for text in documents("evaluation.npz")}
    assert evaluated.isdisjoint(tuple(text) for text in documents("calibration.npz"))


def test_the_training_is_written_down(record):
    curve = record["curve"]
    assert len(curve["step"]) == len(curve["train_loss"]) == len(curve["validation_loss"]) >= 20
    best = min(curve["validation_loss"])
    assert curve["validation_loss"][curve["step"].index(curve["kept_step"])] == best
    assert curve["validation_loss"][-1] <= best + 0.02  # it ended where it was good
    assert math.log(record["held_out"]["perplexity"]) == pytest.approx(best, abs=1e-3)  # onnxruntime's, and torch's
    assert record["onnx_difference"] <= 1e-4
    assert all(re.fullmatch("[0-9a-f]{64}", source["sha256"]) for source in record["sources"])


@pytest.mark.parametrize("path", sorted(p.name for p in FOLDER.iterdir()))
def test_no_machine_is_named(path):
    strings = b"\n".join(re.findall(rb"[\x20-\x7e]{5,}", (FOLDER / path).read_bytes()))
    for part in (b"/work/", b"/tmp/", b"/root/", b"/home/", b"site-packages"):
        assert part not in strings, part


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("All\n***\n\nOne.\n\nPart\n====\n\n   Two.\n", ["All\n\nOne.\n", "Part\n\n   Two.\n"]),
        ("Title\n*****\n\nInner\n=====\n\nText.", ["Inner\n\nText."]),
        ("No title.\n", ["No title.\n"]),
        ("Before.\n\nTitle\n-----\n\nText.", ["Before.\n\n", "Title\n\nText."]),
    ],
)
def test_topics_are_cut_at_titles(text, wanted):
    assert [part.rstrip("\n") for part in corpus.sections(text)] == [part.rstrip("\n") for part in wanted]


def test_text_is_made_plain():
    assert corpus.normalised("\n“a”\tb \n\n\n\nc’s\n") == '"a" b\n\nc\'s'


def test_what_was_mostly_said_is_left_out():
    line = "a line of more than forty characters that stands in two texts\n"
    texts = [corpus.Document("a", line * 2), corpus.Document("b", line), corpus.Document("c", "something else\n")]
    assert [d.source for d in corpus._without_repeats(iter(texts))] == ["a", "c"]
