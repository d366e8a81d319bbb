import importlib.util
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from msd_compiler import compile, inspect
from msd_compiler.compare import relative_l2
from msd_compiler.oracle import oracle_model
from msd_compiler.report import Outcome
from msd_compiler.runtime import session

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "models/tiny_llama.py"
PACKAGED = ROOT / "models/tiny_llama.onnx"


def _load_recipe():
    spec = importlib.util.spec_from_file_location("tiny_llama", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses looks for it
    spec.loader.exec_module(module)
    return module


recipe = _load_recipe()


@pytest.fixture(scope="module")
def exact():
    """The model as its file says: accuracy level 0, no optimizations."""
    level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = oracle_model(onnx.load(PACKAGED)).SerializeToString()
    return session(model, portable=True, graph_optimization_level=level)


def decode(opened, ids, positions, mask, past=None):
    """Logits and cache; ``past`` None: an empty cache."""
    p = recipe.Parameters()
    empty = np.zeros((len(ids), p.kv_heads, 0, p.head_size), np.float32)
    past = past or [empty, empty] * len(p.formats)
    names = [f"past_key_values.{i}.{kind}" for i in range(len(p.formats)) for kind in ("key", "value")]
    feed = {"input_ids": ids, "position_ids": positions, "attention_mask": mask, **dict(zip(names, past, strict=True))}
    wanted = ["logits", *(name.replace("past_key_values", "present") for name in names)]
    logits, *cache = opened.run(wanted, feed)
    return logits, cache


@pytest.fixture
def tokens():
    ids = np.random.default_rng(0).integers(0, recipe.Parameters().vocabulary, (2, 5))
    return ids, np.tile(np.arange(5), (2, 1)), np.ones((2, 5), np.int64)


def assert_close(found, expected):
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_recipe_gives_the_packaged_file(tmp_path, capsys):
    recipe.main(["-o", str(tmp_path / "new folder")])
    made = tmp_path / "new folder" / PACKAGED.name
    assert str(made) in capsys.readouterr().out
    # not the bytes: protobuf may serialize differently in another version
    assert onnx.load(made) == onnx.load(PACKAGED)
    assert PACKAGED.stat().st_size <= 1_500_000


def test_another_seed_gives_other_weights():
    assert recipe.build(recipe.Parameters(seed=1)) != onnx.load(PACKAGED)


def test_cache_equals_whole(exact, tokens):
    ids, positions, mask = tokens
    whole, whole_cache = decode(exact, ids, positions, mask)
    first, cache = decode(exact, ids[:, :4], positions[:, :4], mask[:, :4])
    last, cache = decode(exact, ids[:, 4:], positions[:, 4:], mask, cache)
    assert_close(np.concatenate([first, last], axis=1), whole)
    for found, expected in zip(cache, whole_cache, strict=True):
        assert_close(found, expected)


def test_padding_on_the_left_changes_nothing(exact, tokens):
    ids, positions, mask = tokens
    whole, _ = decode(exact, ids, positions, mask)
    padded = [np.pad(a, ((0, 0), (3, 0))) for a in tokens]
    logits, _ = decode(exact, *padded)
    assert np.isfinite(logits).all()
    assert_close(logits[:, 3:], whole)


def test_later_tokens_change_nothing_before(exact, tokens):
    ids, positions, mask = tokens
    whole, _ = decode(exact, ids, positions, mask)
    other = ids.copy()
    other[:, 4] = (other[:, 4] + 1) % recipe.Parameters().vocabulary
    changed, _ = decode(exact, other, positions, mask)
    assert_close(changed[:, :4], whole[:, :4])
    assert np.abs(changed[:, 4] - whole[:, 4]).max() > 0.01 * np.abs(whole).max()


def numpy_llama(model, ids):
    """Logits in float64 without a cache, from the stored codes alone."""
    p = recipe.Parameters()
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}

    def weight(name):
        if f"{name}.weight_Q4" in stored:
            packed, scales = stored[f"{name}.weight_Q4"], stored[f"{name}.weight_scales"]
            codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*scales.shape, 32)
            blocks = (codes - 8.0) * scales[..., None]
            return blocks.reshape(len(blocks), -1).T
        return stored[f"{name}.weight_int8"] * stored[f"{name}.weight_scale"].astype(np.float64)

    def norm(name, x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + p.epsilon) * stored[f"{name}.weight"]

    def heads(x, count):
        return x.reshape(*x.shape[:2], count, p.head_size).transpose(0, 2, 1, 3)

    def rotate(x):
        turn = np.exp(1j * angles)
        half = p.head_size // 2
        turned = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1)

    length = ids.shape[1]
    angles = np.arange(length)[:, None] * p.rope_theta ** -(np.arange(0, p.head_size, 2) / p.head_size)
    later = np.triu(np.ones((length, length), bool), 1)
    table = stored["model.embed_tokens.weight_int8"] * stored["model.embed_tokens.weight_scale"][:, None].astype(float)
    x = table[ids]
    for i in range(len(p.formats)):
        at = f"model.layers.{i}"
        y = norm(f"{at}.input_layernorm", x)
        q, k, v = (y @ weight(f"{at}.self_attn.{part}_proj")[: p.hidden] for part in "qkv")
        q, k, v = rotate(heads(q, p.heads)), rotate(heads(k, p.kv_heads)), heads(v, p.kv_heads)
        k, v = (np.repeat(t, p.heads // p.kv_heads, axis=1) for t in (k, v))
        scores = np.where(later, -np.inf, q @ k.transpose(0, 1, 3, 2) / p.head_size**0.5)
        mixing = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (mixing / mixing.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(*ids.shape, -1)
        x = x + mixed @ weight(f"{at}.self_attn.o_proj")
        y = norm(f"{at}.post_attention_layernorm", x)
        gate, up = y @ weight(f"{at}.mlp.gate_proj"), y @ weight(f"{at}.mlp.up_proj")
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weight(f"{at}.mlp.down_proj")[: p.intermediate]
    return norm("model.norm", x) @ table.T


def test_is_a_llama(exact, tokens):
    ids, positions, mask = tokens
    logits, _ = decode(exact, ids, positions, mask)
    assert_close(logits, numpy_llama(onnx.load(PACKAGED), ids))


def test_compiling_helps(tokens, tmp_path):
    """Against NumPy, not against the compiler's own oracle."""
    compiled = tmp_path / "compiled.onnx"
    compile(PACKAGED, compiled)
    meant = numpy_llama(onnx.load(PACKAGED), tokens[0])
    native, portable, today = (
        relative_l2(decode(opened, *tokens)[0], meant)
        for opened in (session(compiled), session(compiled, portable=True), session(PACKAGED))
    )
    assert native <= 5e-4
    assert portable <= 5e-4
    assert today >= 20 * native


def test_holds_both_forms_and_a_short_block():
    report = inspect(PACKAGED)
    assert [(site.form, site.kind) for site in report.sites if site.kind == "embedding"] == [("Gather", "embedding")]
    layers = [site for site in report.sites if site.kind == "linear"]
    assert all(site.outcome is Outcome.REWRITTEN for site in layers)
    assert {site.form for site in layers} == {
        "MatMulNBits",
        "DequantizeLinear -> MatMul",
        "DequantizeLinear -> Transpose -> MatMul",
    }
    assert any(site.form == "MatMulNBits" and site.k % 32 for site in layers)
    assert {site.m for site in layers} == {"batch*sequence"}
