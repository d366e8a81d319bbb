"""Generating tokens through the cache gives what feeding everything again gives."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from msd_compiler.models import TINY_LLAMA
from support import model

import msd_compiler
from msd_compiler import Decoder, ModelError, MsdError, OptionError, cli, generate
from msd_compiler.runtime import RuntimeRefused, session

COMMITTED = Path(__file__).parents[1] / "data/exported"
SHARED = Path(__file__).parents[3] / "shared/models"
GENAI = COMMITTED / "qwen2_genai_q8_nbits_b32.onnx"

CLOSE = 1e-4
"""Of the largest logit: float32 sums in another order."""

ROUNDS_ACTIVATIONS = {
    "tiny_llama": 0.05,  # accuracy level 4, as in the next two: another kernel for a single token
    "llama_gqa_q4_nbits_b32_asym_acc4": 0.05,
    "qwen2_genai_q4_nbits_b32_sym": 0.05,
    "w8_dynamic": 0.3,  # the activation's scale depends on all tokens of a run
    "w8a8": 0.1,  # a difference in the last place may become a whole code
    "kvint8": 0.02,
}
"""Parts of file names -> how far two ways to feed the same tokens may be apart, of the largest logit."""

RESULT_CLOSE = 5e-4
"""The same of a compiled model: such a difference may move an activation to the next of its 16-bit codes."""

PROMPT = [[1, 5, 9, 2, 7]]


def opened(path, **options):
    """A session, or a skip where this onnxruntime refuses the file."""
    try:
        return session(path, log_severity_level=4, **options)
    except RuntimeRefused as error:
        pytest.skip(str(error)[:200])


def graph_of(path):
    return onnx.load(path, load_external_data=False)


def distance(a, b):
    return float(np.abs(a - b).max() / np.abs(b).max())


def allowed(path):
    return next((limit for part, limit in ROUNDS_ACTIVATIONS.items() if part in path.stem), CLOSE)


def plain_logits(opened, ids, head_size=32):
    """Logits ``[B, S, V]`` of whole sequences from empty caches."""
    batch, length = ids.shape
    feed = {}
    for i in opened.get_inputs():
        if i.name == "input_ids":
            feed[i.name] = ids
        elif i.name == "attention_mask":
            feed[i.name] = np.ones((batch, length), np.int64)
        elif i.name == "position_ids":
            feed[i.name] = np.tile(np.arange(length), (batch, 1))
        else:
            columns = i.shape[3] if isinstance(i.shape[3], int) else head_size
            feed[i.name] = np.zeros((batch, i.shape[1], 0, columns), np.float32)
    return opened.run(["logits"], feed)[0]


def plain_loop(opened, ids, count):
    """Greedy tokens ``[B, count]``, and the logits they were chosen from, feeding everything again."""
    tokens, logits = ids, []
    for _ in range(count):
        logits.append(plain_logits(opened, tokens)[:, -1])
        tokens = np.concatenate([tokens, logits[-1].argmax(-1)[:, None]], axis=1)
    return tokens[:, ids.shape[1] :], np.stack(logits, axis=1)


DECODERS = [TINY_LLAMA, *sorted(p for p in COMMITTED.glob("*.onnx") if not p.name.startswith("bert"))]


@pytest.fixture(scope="module")
def result_of(tmp_path_factory):
    """Compiles a model, once: its activations keep 16 bits, however it is fed."""
    folder = tmp_path_factory.mktemp("results")

    def result(path):
        opened(path)
        out = folder / path.name
        if not out.exists():
            msd_compiler.compile(path, out, verify=False)
        return out

    return result


@pytest.mark.parametrize("path", DECODERS, ids=lambda p: p.stem)
@pytest.mark.parametrize("batch", [1, 3])
def test_result_equals_a_loop_without_a_cache(path, batch, result_of):
    result = result_of(path)
    ids = np.random.default_rng(batch).integers(0, 500, (batch, 6))
    generated = generate(result, ids, max_new_tokens=10, keep_logits=True)
    tokens, logits = plain_loop(session(result), ids, 10)
    np.testing.assert_array_equal(generated.tokens, tokens)
    assert distance(generated.logits, logits) <= RESULT_CLOSE
    assert generated.logits.dtype == np.float32
    assert len(generated.decode_ms) == 9
    assert generated.tokens_per_second > 0


@pytest.mark.parametrize("path", DECODERS, ids=lambda p: p.stem)
@pytest.mark.parametrize("batch", [1, 3])
def test_source_equals_a_run_without_a_cache(path, batch):
    plain = opened(path)
    ids = np.random.default_rng(batch).integers(0, 500, (batch, 6))
    generated = generate(path, ids, max_new_tokens=10, keep_logits=True)
    logits = plain_logits(plain, np.concatenate([ids, generated.tokens], axis=1))[:, 5:-1]
    assert distance(generated.logits, logits) <= allowed(path)
    if allowed(path) == CLOSE:
        np.testing.assert_array_equal(generated.tokens, plain_loop(plain, ids, 10)[0])


def test_native_and_portable_results_generate_the_same():
    compiled = msd_compiler.compile(TINY_LLAMA, verify=False).model
    native = generate(compiled, PROMPT, max_new_tokens=12, keep_logits=True)
    portable = generate(compiled, PROMPT, max_new_tokens=12, keep_logits=True, portable=True)
    assert native.rows == portable.rows
    assert distance(portable.logits, native.logits) <= 1e-5


@pytest.mark.parametrize("path", DECODERS, ids=lambda p: p.stem)
def test_pieces_through_the_cache_equal_one_prefill(path):
    decoder = Decoder(opened(path), model=graph_of(path))
    assert_pieces_equal_whole(decoder, allowed(path))


def assert_pieces_equal_whole(decoder, limit, vocabulary=500):
    ids = np.random.default_rng(0).integers(0, vocabulary, (1, 21))
    whole = decoder.step(ids)
    decoder.reset()
    pieces = []
    for start, end in ((0, 4), (4, 5), (5, 13), (13, 20), (20, 21)):
        pieces.append(decoder.step(ids[:, start:end]))
        assert decoder.length == end
    assert distance(np.concatenate(pieces, axis=1), whole) <= limit


@pytest.mark.parametrize("path", [p for p in DECODERS if "genai" not in p.name], ids=lambda p: p.stem)
def test_ragged_prompts_equal_each_alone(path, result_of):
    path = result_of(path)
    prompts = [[1, 5, 9, 2, 7], [3], [8, 8, 100]]
    together = generate(path, prompts, max_new_tokens=8, keep_logits=True)
    for row, prompt in enumerate(prompts):
        alone = generate(path, [prompt], max_new_tokens=8, keep_logits=True)
        assert together.rows[row] == alone.rows[0]
        assert distance(together.logits[row], alone.logits[0]) <= RESULT_CLOSE


@pytest.mark.parametrize("known", [True, False], ids=["file", "session"])
@pytest.mark.parametrize("batch", [1, 2])
def test_buffers_equal_growing_caches(known, batch):
    opened_model = opened(GENAI)
    given = GENAI if known else opened_model
    prompt = PROMPT * batch
    grown = generate(given, prompt, max_new_tokens=12, keep_logits=True)
    for capacity in (16, 64):
        buffered = generate(given, prompt, max_new_tokens=12, keep_logits=True, capacity=capacity)
        np.testing.assert_array_equal(buffered.tokens, grown.tokens)
        assert distance(buffered.logits, grown.logits) <= 1e-6


def test_buffers_stay_where_they_are():
    decoder = Decoder(opened(GENAI), model=graph_of(GENAI), capacity=32)
    decoder.step(np.array(PROMPT))
    places = [value.data_ptr() for value in decoder._caches]
    for _ in range(5):
        decoder.step(np.array([[3]]))
    assert [value.data_ptr() for value in decoder._caches] == places
    with pytest.raises(OptionError, match="capacity 32 is too small: 23 tokens come after 10"):
        decoder.step(np.ones((1, 23), np.int64))


def test_the_op_says_whether_caches_are_buffers():
    proto = summing_model({"past_0": ("present_0", "float")})
    opened_model = session(proto.SerializeToString())
    node = onnx.helper.make_node("Attention", ["x"], ["unused"], domain="msd", cache="shared")
    proto.graph.node.append(node)
    with pytest.raises(OptionError, match="give their capacity"):
        Decoder(opened_model, model=proto)
    assert Decoder(opened_model, model=proto, capacity=8).capacity == 8
    node.attribute[0].s = b"append"
    proto.graph.node[-1].CopyFrom(node)
    with pytest.raises(OptionError, match="caches grow; leave it out"):
        Decoder(opened_model, model=proto, capacity=8)


# --- caches of every spelling --------------------------------------------------------------------------------------

TABLE = np.random.default_rng(0).integers(-3, 4, (11, 4)).astype(np.float32)
HEAD = np.random.default_rng(1).integers(-3, 4, (4, 11)).astype(np.float32)


def summing_model(caches, *, extra="", added="", joint=False, ids="int64[B, N] input_ids", logits="float"):
    """Logits are the sum of the embeddings so far, once per cache, by a head; every cache holds embeddings.

    Args:
        caches: past name -> (present name, type), ``[B, 1, P, 4]``; joint: ``[2, B, 1, P, 4]``.
        extra: more inputs.
        added: a name of what is added to the logits.
    """
    shape = "2, B, 1, {}, 4" if joint else "B, 1, {}, 4"
    inputs = [
        ids,
        *(f"{t}[{shape.format('P')}] {past}" for past, (_, t) in caches.items()),
        *([extra] if extra else []),
    ]
    outputs = [f"{logits}[B, N, 11] logits", *(f"{t}[{shape.format('Q')}] {name}" for name, t in caches.values())]
    codes = {"float": 1, "float16": 10, "bfloat16": 16, "int8": 3, "uint8": 2}
    lines = ["x = Gather(table, input_ids)", "n = Shape<start = 1, end = 2>(input_ids)", "minus = Neg(n)"]
    lines.append("x4 = Unsqueeze(x, lifted)")
    terms = []
    for at, (past, (present, type_)) in enumerate(caches.items()):
        new = f"new{at}"
        lines.append(f"one{at} = Cast<to = {codes[type_]}>(x4)")
        lines.append(f"{new} = Concat<axis = 0>(one{at}, one{at})" if joint else f"{new} = Identity(one{at})")
        lines.append(f"{present} = Concat<axis = -2>({past}, {new})")
        lines.append(f"wide{at} = Cast<to = 1>({present})")
        lines.append(f"sums{at} = CumSum(wide{at}, axis)")
        lines.append(f"tail{at} = Slice(sums{at}, minus, end, axes)")
        lines.append(f"term{at} = ReduceSum<keepdims = 0>(tail{at}, lifted)")
        terms.append(f"term{at}")
    if not caches:
        lines.append("whole = CumSum(x, axis)")
        terms.append("whole")
    lines += [f"total = Sum({', '.join(terms)})", "product = MatMul(total, head)"]
    lines.append(f"sum = Add(product, {added})" if added else "sum = Identity(product)")
    lines.append(f"logits = Cast<to = {codes[logits]}>(sum)")
    text = "(" + ", ".join(inputs) + ") => (" + ", ".join(outputs) + ") {\n" + "\n".join(lines) + "\n}"
    return model(
        text.replace(".", "#"),
        table=TABLE,
        head=HEAD,
        lifted=np.array([0, 2] if joint else [1]),
        axis=np.array(-2),
        axes=np.array([-2]),
        end=np.array([2**40]),
    )


def with_dots(proto):
    """Names with the dots that the text format does not take."""
    for value in (*proto.graph.input, *proto.graph.output):
        value.name = value.name.replace("__", ".")
    for node in proto.graph.node:
        for names in (node.input, node.output):
            names[:] = [name.replace("__", ".") for name in names]
    return proto


SPELLINGS = {
    "keys and values": {
        "past_key_values__0__key": ("present__0__key", "float"),
        "past_key_values__0__value": ("present__0__value", "float"),
    },
    "decoder": {
        "past_key_values__10__decoder__key": ("present__10__decoder__key", "float"),
        "past_key_values__1__decoder__key": ("present__1__decoder__key", "float"),
    },
    "numbered": {"past_0_0": ("present_0_0", "float"), "past_0_1": ("present_0_1", "float")},
    "past_key_0": {"past_key_0": ("present_key_0", "float16"), "past_value_0": ("present_value_0", "float16")},
    "present_key_values": {"past_key_values__0": ("present_key_values__0", "float")},
    "bfloat16": {"past_0_key": ("present_0_key", "bfloat16")},
    "int8 and scales": {
        "past_key_values__0__key": ("present__0__key", "int8"),
        "past_key_values__0__key_scale": ("present__0__key_scale", "float"),
    },
    "in another order": {"past_1": ("present_1", "float16"), "past_0": ("present_0", "float")},
}


def expected_logits(ids, times):
    return np.cumsum(TABLE[ids], axis=1) @ HEAD * times


def check_sums(proto, times, added=None):
    opened_model = session(proto.SerializeToString())
    for decoder in (Decoder(opened_model), Decoder(opened_model, model=proto)):
        for batch in (2, 1):
            ids = np.random.default_rng(2).integers(0, 11, (batch, 9))
            found = [decoder.step(ids[:, a:b]) for a, b in ((0, 4), (4, 5), (5, 9))]
            expected = expected_logits(ids, times) + (0 if added is None else added(9))
            np.testing.assert_array_equal(np.concatenate(found, axis=1), expected)
            decoder.reset()


@pytest.mark.parametrize("caches", SPELLINGS.values(), ids=SPELLINGS)
def test_caches_are_paired(caches):
    check_sums(with_dots(summing_model(caches)), len(caches))


def test_joint_cache():
    check_sums(summing_model({"past_0": ("present_0", "float")}, joint=True), 2)


def test_model_without_a_cache():
    check_sums(summing_model({}), 1)


def test_bfloat16_logits():
    proto = summing_model({"past_0": ("present_0", "float")}, logits="bfloat16")
    logits = Decoder(session(proto.SerializeToString())).step(np.array([[1, 2]]))
    expected = expected_logits(np.array([[1, 2]]), 1).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(logits, expected.astype(np.float32))


def test_ids_of_fixed_length_go_in_one_by_one():
    proto = summing_model({"past_0": ("present_0", "float")}, ids="int32[B, 1] input_ids")
    check_sums(proto, 1)


def test_types_are_zero_and_lengths_are_those_of_the_step():
    caches = {"past_0": ("present_0", "float")}
    types = summing_model(caches, extra="int64[B, N] token_type_ids", added="typed")
    typed = model("(int64[B, N] token_type_ids) => (float[B, N, 1] typed) { typed = Gather(types, token_type_ids) }")
    types.graph.node.insert(len(types.graph.node) - 2, typed.graph.node[0])
    types.graph.initializer.append(onnx.numpy_helper.from_array(np.array([[5.0], [7.0]], np.float32), "types"))
    check_sums(types, 1, lambda _: 5)
    lengths = summing_model(caches, extra="int32[1] past_sequence_length", added="wide")
    lengths.graph.node.insert(
        len(lengths.graph.node) - 2, onnx.helper.make_node("Cast", ["past_sequence_length"], ["wide"], to=1)
    )
    check_sums(lengths, 1, lambda n: np.array([0] * 4 + [4] + [5] * (n - 5))[:, None])


# --- what ends a row, and how tokens are drawn -----------------------------------------------------------------------


def test_rows_end_at_a_stop_id():
    free = generate(TINY_LLAMA, [[1, 5], [9, 2]], max_new_tokens=12, temperature=50.0, seed=3)
    stop = [int(free.tokens[0, 3]), int(free.tokens[1, 6])]
    assert not {*stop} & {*free.rows[0][:3], *free.rows[1][:6]}
    stopped = generate(TINY_LLAMA, [[1, 5], [9, 2]], max_new_tokens=12, temperature=50.0, seed=3, stop=stop)
    assert stopped.tokens.shape == (2, 7)
    assert stopped.rows == [free.rows[0][:4], free.rows[1][:7]]
    assert (stopped.tokens[0, 4:] == -1).all()


def test_drawing_is_deterministic_and_within_top_k():
    options = {"max_new_tokens": 20, "temperature": 50.0, "keep_logits": True}
    first = generate(TINY_LLAMA, PROMPT, top_k=3, seed=1, **options)
    assert generate(TINY_LLAMA, PROMPT, top_k=3, seed=1, **options).rows == first.rows
    assert generate(TINY_LLAMA, PROMPT, top_k=3, seed=2, **options).rows != first.rows
    likeliest = np.argsort(-first.logits[0], axis=-1)[:, :3]
    assert all(token in three for token, three in zip(first.rows[0], likeliest, strict=True))
    assert len(set(first.rows[0])) > 1


def test_top_p_keeps_the_fewest_tokens():
    drawn = generate(TINY_LLAMA, PROMPT, max_new_tokens=30, temperature=50.0, top_p=0.3, seed=1, keep_logits=True)
    for token, logits in zip(drawn.rows[0], drawn.logits[0].astype(np.float64), strict=True):
        chances = np.exp((logits - logits.max()) / 50)
        chances /= chances.sum()
        assert chances[chances > chances[token]].sum() < 0.3
    greedy = generate(TINY_LLAMA, PROMPT, max_new_tokens=8)
    assert generate(TINY_LLAMA, PROMPT, max_new_tokens=8, temperature=1.0, top_p=1e-9).rows == greedy.rows
    assert generate(TINY_LLAMA, PROMPT, max_new_tokens=8, temperature=1e-320).rows == greedy.rows


def test_drawing_follows_the_softmax():
    from msd_compiler.generate.sampling import Sampling

    logits = np.tile(np.log(np.array([[0.5, 0.2, 0.3]], np.float32)), (20_000, 1))
    for sampling, expected in (
        (Sampling(1.0), [0.5, 0.2, 0.3]),
        (Sampling(0.5), np.array([25, 4, 9]) / 38),
        (Sampling(1.0, top_k=2), [0.625, 0, 0.375]),
        (Sampling(1.0, top_p=0.6), [0.625, 0, 0.375]),
        (Sampling(1.0, top_p=0.4), [1, 0, 0]),
    ):
        shares = np.bincount(sampling.choose(logits), minlength=3) / len(logits)
        np.testing.assert_allclose(shares, expected, atol=0.015)


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt has no rows"),
        ([[1], []], {}, "row 1 of the prompt is empty"),
        ([1, 2], {}, "row 0 of the prompt is int64"),
        ([[1.5]], {}, "row 0 of the prompt is float64"),
        (np.zeros((1, 2, 3), np.int64), {}, "row 0 of the prompt is int64"),
        (None, {}, "the prompt is NoneType"),
        ([[-1]], {}, "token id -1 is outside"),
        ([[10**6]], {}, "out of data bounds"),
        (PROMPT, {"max_new_tokens": 0}, "max_new_tokens is 0; it must be 1 or more"),
        (PROMPT, {"temperature": -1}, "temperature is -1; it must be 0 or more"),
        (PROMPT, {"temperature": "x"}, "temperature is 'x'; it must be a number"),
        (PROMPT, {"temperature": 1, "top_k": 0}, "top_k is 0"),
        (PROMPT, {"temperature": 1, "top_p": 1.5}, "top_p is 1.5"),
        (PROMPT, {"top_k": 5}, "give a temperature above 0"),
        (PROMPT, {"temperature": 1, "seed": -1}, "seed is -1"),
        (PROMPT, {"stop": "x"}, "stop is 'x'"),
        (PROMPT, {"capacity": 5, "max_new_tokens": 2}, "5 prompt tokens and 2 new ones need 6"),
        (PROMPT, {"capacity": 0}, "capacity is 0; it must be"),
        (PROMPT, {"capacity": 100}, "no op of the model writes into a buffer"),
        (PROMPT, {"inter_op": 1}, "unknown session option 'inter_op'"),
    ],
)
def test_bad_arguments_are_refused(prompt, options, message):
    with pytest.raises(MsdError, match=message):
        generate(TINY_LLAMA, prompt, **options)


@pytest.mark.parametrize(
    ("proto", "message"),
    [
        (model("(float[N] x) => (float[N] y) { y = Relu(x) }"), "none of its inputs takes token ids; they are 'x'"),
        (
            model(
                "(int64[B, N] input_ids) => (float[B, N, 4] hidden) { hidden = Gather(t, input_ids) }",
                t=np.ones((5, 4), np.float32),
            ),
            "needs one output 'logits'",
        ),
        (summing_model({"past_0": ("future_0", "float")}), "cache 'past_0' needs one output with the same layer"),
        (summing_model({"past_0": ("present_1", "float")}), "cache 'past_0' needs one output with the same layer"),
        (summing_model({"past_0": ("present_0", "float")}, extra="float[B, 3, 8, 8] pixels"), "'pixels'"),
    ],
)
def test_other_models_are_refused(proto, message):
    with pytest.raises(ModelError, match=message):
        generate(proto, PROMPT)


def test_an_encoder_is_refused():
    with pytest.raises(ModelError, match="'last_hidden_state'"):
        generate(COMMITTED / "bert_fp32_ts14.onnx", PROMPT)


def test_padding_is_refused_where_it_would_be_seen():
    opened_model = opened(GENAI)
    with pytest.raises(OptionError, match="no position_ids"):
        generate(GENAI, [[1, 2], [3]])
    with pytest.raises(OptionError, match="only the model's file tells"):
        generate(opened_model, [[1, 2], [3]])
    with pytest.raises(OptionError, match="portable cannot be set for a session that is open"):
        generate(opened_model, [[1, 2]], portable=True)


def test_padding_is_refused_where_rows_are_counted():
    proto = summing_model(
        {"past_0": ("present_0", "float")},
        extra="int64[B, T] attention_mask, int64[B, N] position_ids",
        added="counted",
    )
    nodes = [
        onnx.helper.make_node("ReduceSum", ["attention_mask"], ["count"], keepdims=0),
        onnx.helper.make_node("Cast", ["count"], ["counted"], to=1),
    ]
    for node in nodes:
        proto.graph.node.insert(len(proto.graph.node) - 2, node)
    with pytest.raises(OptionError, match="only counts the ones of 'attention_mask'"):
        generate(proto, [[1, 2], [3]])
    assert generate(proto, [[1, 2]], max_new_tokens=2).tokens.shape == (1, 2)


def test_steps_that_do_not_fit_are_refused():
    decoder = Decoder(opened(TINY_LLAMA), model=graph_of(TINY_LLAMA))
    decoder.step(np.ones((2, 3), np.int64))
    with pytest.raises(OptionError, match="3 rows of tokens follow 2"):
        decoder.step(np.ones((3, 1), np.int64))
    with pytest.raises(OptionError, match="padding is for the first step"):
        decoder.step(np.ones((2, 2), np.int64), padding=np.array([0, 1]))
    with pytest.raises(OptionError, match="integers \\[batch, tokens\\]"):
        decoder.step(np.ones((2, 0), np.int64))
    with pytest.raises(RuntimeRefused, match="out of data bounds"):
        decoder.step(np.full((2, 1), 10**6))
    assert decoder.length == 3
    decoder.reset()
    with pytest.raises(OptionError, match="padding must be 2 integers, 0 to 2"):
        decoder.step(np.ones((2, 3), np.int64), padding=np.array([0, 3]))


def test_logits_that_are_not_numbers_are_refused():
    proto = summing_model({})
    next(t for t in proto.graph.initializer if t.name == "head").CopyFrom(
        onnx.numpy_helper.from_array(HEAD * np.nan, "head")
    )
    with pytest.raises(ModelError, match="logits for new token 0 are not numbers"):
        generate(proto, [[1]])


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def msd(capfd, monkeypatch, tmp_path):
    """Runs ``msd run`` on the bundled model in a folder with prompts: status, output, errors."""
    monkeypatch.chdir(tmp_path)
    np.savez("prompt.npz", input_ids=np.array([[1, 5, 9], [0, 3, 4]]), attention_mask=np.array([[1, 1, 1], [0, 1, 1]]))
    np.savez("other.npz", input_ids=np.array([[1]]), position_ids=np.array([[0]]))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["msd", "run", str(TINY_LLAMA), *arguments])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            onnxruntime.set_default_logger_severity(2)
        return status, *capfd.readouterr()

    return run


def test_command_generates(msd):
    expected = generate(TINY_LLAMA, [[1, 5, 9], [3, 4]], max_new_tokens=5, temperature=1.0, top_k=9, seed=4)
    drawing = ("--max-new-tokens", "5", "--temperature", "1", "--top-k", "9", "--seed", "4")
    status, out, err = msd("--generate", "--inputs", "prompt.npz", "-o", "tokens.npz", *drawing)
    assert (status, err) == (0, "")
    assert " ".join(map(str, expected.rows[0])) in out
    assert "tokens per second" in out
    with np.load("tokens.npz") as saved:
        np.testing.assert_array_equal(saved["tokens"], expected.tokens)
    stop = str(expected.rows[0][0])
    status, out, err = msd("--generate", "--inputs", "prompt.npz", "--json", "--stop", stop, "--stop", "7", *drawing)
    assert (status, err) == (0, "")
    assert json.loads(out)["tokens"][0] == expected.rows[0][:1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--inputs", "prompt.npz"), "--output FILE.npz is needed"),
        (("--inputs", "prompt.npz", "-o", "y.npz", "--top-k", "3"), "--top-k says how to --generate"),
        (("--inputs", "prompt.npz", "--generate", "--top-k", "3"), "give a temperature above 0"),
        (("--inputs", "other.npz", "--generate"), "holds 'input_ids', 'position_ids'; input_ids"),
        (("--inputs", "prompt.npz", "--generate", "-o", "prompt.npz"), "is named twice"),
        (("--inputs", "missing.npz", "--generate"), "cannot be read as an .npz"),
    ],
)
def test_command_refuses(msd, arguments, message):
    status, out, err = msd(*arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert err.count("\n") == 1


# --- long runs and other people's models -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_memory_stays_flat():
    decoder = Decoder(opened(TINY_LLAMA), model=graph_of(TINY_LLAMA))

    def used():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def tokens(count):
        decoder.reset()
        decoder.step(np.array(PROMPT))
        for _ in range(count):
            decoder.step(np.array([[3]]))

    tokens(300)
    before = used()
    for _ in range(3):
        tokens(300)
    cache = sum(np.prod(value.shape()) * 4 for value in decoder._caches)
    assert used() - before < 4 * cache + 2**22  # kept caches of 300 steps would be 150 times one


def shared_decoders():
    paths = [p for folder in ("exported", "lm_stories260k") for p in sorted((SHARED / folder).glob("*.onnx"))]
    paths += sorted((SHARED / "repo").glob("genai_*.onnx"))
    if not paths:
        yield pytest.param(None, id="shared models", marks=pytest.mark.skip(reason=f"{SHARED} is not here"))
    for path in paths:
        if not path.name.startswith("bert"):
            yield pytest.param(path, id=path.stem)


@pytest.mark.slow
@pytest.mark.parametrize("path", list(shared_decoders()))
def test_shared_decoders(path):
    decoder = Decoder(opened(path), model=graph_of(path))
    assert_pieces_equal_whole(decoder, max(allowed(path), 1e-3))
    generated = generate(path, PROMPT, max_new_tokens=16, keep_logits=True)
    assert generated.tokens.shape == (1, 16)
    decoder.reset()
    whole = decoder.step(np.concatenate([PROMPT, generated.tokens[:, :-1]], axis=1))
    assert distance(generated.logits, whole[:, 4:]) <= max(allowed(path), 1e-3)
