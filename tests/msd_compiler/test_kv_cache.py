"""``--kv-cache``: the signature that changes, what stays, the rounding, long decoding in place, and what is refused."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import onnx
import pytest
from msd_compiler.models import TINY_LLAMA
from onnx import TensorProto, numpy_helper
from support import model

import msd_compiler
from msd_compiler import Decoder, Feed, KvCache
from msd_compiler.compare import relative_l2
from msd_compiler.facts import ReasonCode
from msd_compiler.runtime import RuntimeRefused, session

GENAI = Path(__file__).parents[1] / "data" / "exported" / "qwen2_genai_q8_nbits_b32.onnx"
LAYERS, KV_HEADS, SIZE = 4, 2, 32
PROMPT = np.array([[1, 5, 9, 2, 7, 30, 12, 4]])


def signature(model: onnx.ModelProto) -> dict[str, tuple[int, list[object]]]:
    """Type and shape of inputs and outputs."""
    return {
        v.name: (v.type.tensor_type.elem_type, [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim])
        for v in (*model.graph.input, *model.graph.output)
    }


def samples() -> list[Feed]:
    source = onnx.load(TINY_LLAMA)
    past = next(v for v in source.graph.input if v.name.startswith("past"))
    dims = [d.dim_value for d in past.type.tensor_type.shape.dim]
    caches = {v.name: np.zeros((1, dims[1], 0, dims[3]), np.float32) for v in source.graph.input if "past" in v.name}
    ones = np.ones_like(PROMPT)
    arrays = {"input_ids": PROMPT, "attention_mask": ones, "position_ids": np.arange(PROMPT.shape[1])[None]} | caches
    return [Feed("prompt", {name: value for name, value in arrays.items() if name in signature(source)})]


def logits(model: object, **options: object) -> np.ndarray:
    """Of a prompt in one piece and a few tokens after it."""
    decoder = Decoder(session(model, intra_op_num_threads=1, log_severity_level=4, **options))
    parts = [decoder.step(PROMPT)]
    parts += [decoder.step(np.array([[token]])) for token in (3, 8, 1)]
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("with_samples", [False, True], ids=["dynamic", "samples"])
def test_signature_and_rounding(bits, with_samples, tmp_path):
    out = tmp_path / "out.onnx"
    done = msd_compiler.compile(TINY_LLAMA, out, kv_cache=KvCache(bits, samples() if with_samples else None))
    before, after = signature(onnx.load(TINY_LLAMA)), signature(done.model)
    scales = {name for name in after if name.endswith("_scale")}
    assert scales == (
        set() if with_samples else {f"{name}_scale" for name in before if "past" in name or "present" in name}
    )
    for name, (kind, shape) in before.items():
        if "past" in name or "present" in name:
            assert after[name][0] == (TensorProto.INT8 if bits == 8 else TensorProto.UINT8)
            assert after[name][1] == [*shape[:3], shape[3] * bits // 8]
            if not with_samples:
                assert after[f"{name}_scale"] == (TensorProto.FLOAT, [*shape[:3], 1])
        else:
            assert after[name] == (kind, shape)
    rows = [row for row in done.report.sites if row.kind == "attention"]
    assert {row.reason_code for row in rows} == {ReasonCode.CACHE_ROUNDED}
    for row in rows:
        columns = 2 * row.kv_heads * row.head_size
        assert row.source_cache_bytes == 4 * columns
        assert row.cache_bytes == columns * bits // 8 + (0 if with_samples else 8 * row.kv_heads)
    exact = logits(str(TINY_LLAMA), portable=True)
    for portable in (False, True):
        # eight tokens are few samples, and the scales of columns hold for all tokens
        most = {8: 0.2 if with_samples else 0.05, 4: 0.6}[bits]
        assert relative_l2(logits(str(out), portable=portable), exact) < most


def test_verify_knows_what_a_result_was_asked_to_be(tmp_path):
    msd_compiler.compile(TINY_LLAMA, tmp_path / "own.onnx", kv_cache=KvCache(8), verify=False)
    verification = msd_compiler.verify(TINY_LLAMA, tmp_path / "own.onnx", runs=1)
    assert verification.passed
    assert {row.name for row in verification.outputs} >= {"logits", "present.0.key", "present.0.key_scale"}
    msd_compiler.compile(TINY_LLAMA, tmp_path / "samples.onnx", kv_cache=KvCache(8, samples()), verify=False)
    with pytest.raises(msd_compiler.OptionError, match="scaled by samples"):
        msd_compiler.verify(TINY_LLAMA, tmp_path / "samples.onnx")


def test_without_the_flag_nothing_changes():
    done = msd_compiler.compile(TINY_LLAMA, verify=False)
    assert signature(done.model) == signature(onnx.load(TINY_LLAMA))
    kept = [row for row in done.report.sites if row.kind == "attention"]
    assert {row.reason_code for row in kept} == {ReasonCode.FLOAT_CACHE}
    assert "--kv-cache int8 or int4 makes it low-bit" in kept[0].reason


def test_a_cache_that_others_read_stays():
    source = onnx.load(TINY_LLAMA)
    past = next(v.name for v in source.graph.input if "past" in v.name)
    source.graph.node.add(op_type="Abs", name="nosy", input=[past], output=["seen"])
    source.graph.output.append(onnx.helper.make_tensor_value_info("seen", TensorProto.FLOAT, None))
    rows = [row for row in msd_compiler.inspect(source, kv_cache=KvCache(8)).sites if row.kind == "attention"]
    assert [row.reason_code for row in rows].count(ReasonCode.CACHE_ROUNDED) == LAYERS - 1
    assert rows[0].reason_code is ReasonCode.ATTENTION_FORM
    assert past in rows[0].reason
    assert "nosy" in rows[0].reason


@pytest.mark.parametrize(("columns", "reason"), [(512, ReasonCode.CACHE_ROUNDED), (516, ReasonCode.FLOAT_CACHE)])
def test_heads_longer_than_the_kernels_take_stay(columns, reason):
    new, past, present = (
        ", ".join(f"float[N,2,{tokens},{columns}] {name}" for name in names)
        for tokens, names in (("S", ("q", "k", "v")), ("P", ("past_k", "past_v")), ("T", ("K", "V")))
    )
    step = "y, K, V = Attention (q, k, v, , past_k, past_v)"
    proto = model(f"({new}, {past}) => (float[N,2,S,{columns}] y, {present}) {{ {step} }}", opset=24)
    (row,) = msd_compiler.inspect(proto, kv_cache=KvCache(8)).sites
    assert row.reason_code is reason
    assert columns == 512 or "516 columns, and msd.Attention takes 512 at most" in row.reason


def test_two_columns_to_a_byte_of_values_that_are_narrower_than_keys():
    new, past, present = (
        ", ".join(f"float[N,2,{tokens},{d}] {name}" for name, d in zip(names, columns, strict=True))
        for tokens, names, columns in (
            ("S", ("q", "k", "v"), (16, 16, 8)),
            ("P", ("past_k", "past_v"), (16, 8)),
            ("T", ("K", "V"), (16, 8)),
        )
    )
    step = "y, K, V = Attention (q, k, v, , past_k, past_v)"
    proto = model(f"({new}, {past}) => (float[N,2,S,8] y, {present}) {{ {step} }}", opset=24)
    stated = signature(msd_compiler.compile(proto, kv_cache=KvCache(4), verify=False).model)
    assert {name: stated[name][1][3] for name in ("past_k", "K", "past_v", "V")} == {
        "past_k": 8,
        "K": 8,
        "past_v": 4,
        "V": 4,
    }


def test_samples_that_the_model_refuses():
    with pytest.raises(RuntimeRefused):
        msd_compiler.compile(TINY_LLAMA, kv_cache=KvCache(8, [Feed("short", {"input_ids": PROMPT})]))


@pytest.mark.slow
def test_two_thousand_tokens_in_place(tmp_path):
    """GroupQueryAttention's buffers, int8: what a token costs is its own, not the buffer's."""
    source = onnx.load(GENAI)
    for tensor in source.graph.initializer:
        if tensor.name in ("cos_cache", "sin_cache"):
            table = np.resize(numpy_helper.to_array(tensor), (2200, tensor.dims[1]))
            tensor.CopyFrom(numpy_helper.from_array(table, tensor.name))
    feed = Feed("prompt", {"input_ids": PROMPT, "attention_mask": np.ones_like(PROMPT)})
    for value in source.graph.input:
        if "past" in value.name:
            shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
            feed.arrays[value.name] = np.zeros((1, shape[1], 0, shape[3] or SIZE), np.float32)
    out = tmp_path / "out.onnx"
    try:
        msd_compiler.compile(source, out, kv_cache=KvCache(8, [feed]))
    except RuntimeRefused as error:
        pytest.skip(str(error)[:200])
    decoder = Decoder(session(out, intra_op_num_threads=1), model=onnx.load(out), capacity=2100)
    token = decoder.step(PROMPT)[:, -1:].argmax(-1)
    peaks = []
    for _ in range(2000):
        token = decoder.step(token)[:, -1:].argmax(-1)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert decoder.length == 2008
    assert peaks[-1] - peaks[100] < 8 * 1024
