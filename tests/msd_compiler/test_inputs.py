"""Models are ONNX text; only the last tests run onnxruntime, on the models of ../shared where they are there."""

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from msd_compiler.inputs import NoInputs, generate
from msd_compiler.inputs.dims import evaluate, meaning

HEADER = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>'
SHARED = Path(__file__).parents[2] / "../shared/models"
SHARED_MODELS = sorted(p for d in ("exported", "lm_stories260k", "minilm", "repo") for p in (SHARED / d).glob("*.onnx"))


def model(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f"{HEADER} {text}")


def accept(arrays):
    return []


def shapes(feed):
    return {name: array.shape for name, array in feed.arrays.items()}


def only(feeds):
    (feed,) = feeds
    return feed.arrays


# --- symbols -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("symbol", "quantity"),
    [
        ("batch_size", "batch"),
        ("max_seq_len_in_batch", "seq"),
        ("past_sequence_length", "past"),
        ("total_seq_len", "total"),
        ("encoder_sequence_length", "encoder"),
        ("max_sequence_length", "buffer"),
        ("num_beams", "one"),
        ("K", None),
    ],
)
def test_meaning_of_a_symbol(symbol, quantity):
    assert meaning(symbol) == quantity


@pytest.mark.parametrize(
    ("dim", "size"), [("p+s", 7), ("p + s", 7), ("2*p - 1", 9), ("(p + 1) // 2", 3), ("p / 2", 2), ("s - p", 0)]
)
def test_arithmetic_in_a_dim(dim, size):
    assert evaluate(dim, {"p": 5, "s": 2}) == size


@pytest.mark.parametrize("dim", ["p / 0", "__import__('os')", "p ** p", "a.b", "p if s else p", "(" * 5000, "1e400"])
def test_dims_that_are_no_arithmetic(dim):
    with pytest.raises((KeyError, ValueError)):
        evaluate(dim, {"p": 5, "s": 2})


# --- shapes --------------------------------------------------------------------------------------------------------

CACHED = """g (int64[batch, seq] input_ids, int64[batch, mask_len] attention_mask, int64[batch, seq] position_ids,
    {dtype}[batch, 2, {past}, 8] past_key_values_0_key) => (float[batch, seq, 4] y)
    <float[11, 4] table = {{{zeros}}}> {{ y = Gather(table, input_ids) }}"""


def cached(dtype="float", past="past_len", total="past_len+seq"):
    m = model(CACHED.format(dtype=dtype, past=past, zeros=", ".join(["0"] * 44)))
    m.graph.input[1].type.tensor_type.shape.dim[1].dim_param = total  # the text form has no expressions
    return m


@pytest.mark.parametrize("total", ["past_len+seq", "past_len + seq", "total_len", "anything"])
@pytest.mark.parametrize("past", ["past_len", "seq_len", "p7"])
def test_empty_then_filled_cache(past, total):
    prefill, decode = generate(cached(past=past, total=total.replace("past_len", past)), accept)
    assert (prefill.name, decode.name) == ("prefill", "decode")
    assert list(shapes(prefill).values()) == [(2, 6), (2, 6), (2, 6), (2, 2, 0, 8)]
    assert list(shapes(decode).values()) == [(2, 1), (2, 6), (2, 1), (2, 2, 5, 8)]
    assert decode.arrays["position_ids"].tolist() == [[5], [5]]
    assert decode.arrays["attention_mask"].min() == 1


@pytest.mark.parametrize("dtype", ["float", "float16", "int8", "uint8"])
def test_caches_of_every_type(dtype):
    cache = generate(cached(dtype), accept)[1].arrays["past_key_values_0_key"]
    assert cache.dtype == np.dtype("float32" if dtype == "float" else dtype)
    assert np.unique(cache).size > 10


def test_cache_of_rank_5():
    prefill, decode = generate(
        model("g (float[2, batch, 4, past_seq_len, 8] past_0) => (y) { y = Abs(past_0) }"), accept
    )
    assert (shapes(prefill)["past_0"], shapes(decode)["past_0"]) == ((2, 2, 4, 0, 8), (2, 2, 4, 5, 8))


def test_cache_of_fixed_length_is_decoding_only():
    (feed,) = generate(model("g (float[2, 2, 10, 5] past_key_self) => (y) { y = Abs(past_key_self) }"), accept)
    assert feed.name == "decode"


GQA = """g (float[batch, seq, 64] x, {dtype}[batch, 2, past_len, head] k, {dtype}[batch, 2, past_len, head] v,
    int32[batch] seqlens_k, int32 total) => (y, pk, pv) <float[64, 128] w> {{
    qkv = MatMul(x, w)
    y, pk, pv = com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2{more}>(qkv, , , k, v, seqlens_k, total) }}"""


def grouped(dtype="float", more="", width=128):
    m = model(GQA.format(dtype=dtype, more=more))
    m.graph.initializer.append(helper.make_tensor("w", 1, [64, width], bytes(4 * 64 * width), raw=True))
    return m


@pytest.mark.parametrize(
    ("m", "size"),
    [
        (grouped(), 16),
        (grouped(width=256), 32),
        (grouped("int8", ", kv_cache_bit_width = 8"), 16),
        (grouped("uint8", ", kv_cache_bit_width = 4"), 8),
    ],
    ids=["width", "wider", "8 bits", "4 bits"],
)
def test_head_size_from_the_graph(m, size):
    decode = generate(m, accept)[1]
    assert shapes(decode)["k"] == (2, 2, 5, size)
    assert decode.arrays["seqlens_k"].tolist() == [5, 5]
    assert decode.arrays["total"] == 6


def test_other_head_sizes_where_refused():
    def wants_64(arrays):
        assert arrays["k"].shape[-1] == 64
        return []

    assert [f.name for f in generate(grouped(), wants_64)] == ["prefill", "decode"]


def test_products_have_equal_inner_axes():
    arrays = only(generate(model("g (float[M, K] a, float[L, N] b) => (y) { y = MatMul(a, b) }"), accept))
    assert arrays["a"].shape[-1] == arrays["b"].shape[0]
    assert arrays["a"].shape[0] != arrays["b"].shape[1]


def test_operand_of_a_constant_matrix():
    m = model("g (float[batch, n, ?] x) => (y) <float[3, 2] w = {1, 2, 3, 4, 5, 6}> { y = MatMul(x, w) }")
    assert only(generate(m, accept))["x"].shape == (2, 6, 3)


def test_defaults_and_unusual_sizes_are_kept():
    m = model("g (float[0, 3] none, float scalar, float[2] w) => (y) <float[2] w = {1, 2}> { y = Abs(none) }")
    assert {n: a.shape for n, a in only(generate(m, accept)).items()} == {"none": (0, 3), "scalar": ()}


# --- fills ---------------------------------------------------------------------------------------------------------


def test_ids_within_a_tied_table():
    m = model("""g (int32[batch, seq] words) => (y) <int8[4, 7] head = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
        1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, float scale = {0.5}> {
        w = DequantizeLinear(head, scale) t = Transpose<perm = [1, 0]>(w) i = Cast<to = 7>(words) y = Gather(t, i) }""")
    ids = np.concatenate([only(generate(m, accept, seed=s))["words"].ravel() for s in range(20)])
    assert (ids.min(), ids.max()) == (0, 6)


def test_positions_within_their_table():
    m = model("g (int64[b, seq] position_ids) => (y) <float[3, 1] t = {1, 2, 3}> { y = Gather(t, position_ids) }")
    assert only(generate(m, accept))["position_ids"][0].tolist() == [0, 1, 2, 2, 2, 2]


def test_scales_and_zero_points():
    arrays = only(
        generate(
            model("""g (uint8[M, K] a, int8[K, N] b, float[1] s, float[C] t, uint8[1] p, int8[C] q) => (y) {
                y = com.microsoft.MatMulIntegerToFloat(a, b, s, t, p, q) }"""),
            accept,
        )
    )
    assert 0 < arrays["t"].min() <= arrays["t"].max() < 0.1
    assert arrays["t"].shape == arrays["q"].shape == arrays["b"].shape[1:]
    assert abs(int(arrays["p"][0]) - 128) <= 8


def test_a_scale_for_the_whole_matrix_where_columns_are_refused():
    def per_tensor(arrays):
        assert arrays["t"].size == 1
        return []

    m = model("g (uint8[M, K] a, float[C] t) => (y) { y = DequantizeLinear(a, t) }")
    assert only(generate(m, per_tensor))["t"].shape == (1,)


def test_numbers_of_a_search():
    decoder = helper.make_graph(
        [helper.make_node("Gather", ["table", "input_ids"], ["logits"])],
        "decoder",
        [helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT32, ["b", "s"])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["b", "s", 1])],
        [helper.make_tensor("table", 1, [9, 1], [0.0] * 9)],
    )
    names = ["prompt", "a", "b", "c", "d", "e", "f"]
    node = helper.make_node("BeamSearch", names, ["y"], domain="com.microsoft", decoder=decoder)
    types = [onnx.TensorProto.INT32] * 5 + [onnx.TensorProto.FLOAT] * 2
    inputs = [
        helper.make_tensor_value_info(n, t, ["batch", "seq"] if n == "prompt" else [1])
        for n, t in zip(names, types, strict=True)
    ]
    m = helper.make_model(helper.make_graph([node], "g", inputs, [onnx.ValueInfoProto(name="y")]))
    arrays = only(generate(m, accept))
    prompt, longest, shortest, beams, returned, *penalties = arrays.values()
    assert prompt.max() < 9
    assert prompt.shape[1] < shortest[0] < longest[0]
    assert returned[0] <= beams[0]
    assert penalties == [1, 1]


def test_masks():
    m = model("""g (bool[batch, seq] a_mask, float[batch, seq] b_mask, float[batch, 1, seq, seq] c_mask, int32[batch, seq] x)
        => (y) <float one = {1}> { f = Cast<to = 1>(x) y = Sub(one, f) }""")
    arrays = only(generate(m, accept))
    assert [float(a.max()) for a in arrays.values()] == [1, 1, 0, 1]


def test_the_same_seed_gives_the_same_feeds():
    first, again, other = (generate(cached(), accept, seed=s) for s in (1, 1, 2))
    for a, b in zip(first, again, strict=True):
        assert all(np.array_equal(a.arrays[n], b.arrays[n]) for n in a.arrays)
    assert not np.array_equal(first[0].arrays["input_ids"], other[0].arrays["input_ids"])


# --- refusals ------------------------------------------------------------------------------------------------------


def test_batch_1_where_2_is_refused():
    def single(arrays):
        if arrays["input_ids"].shape[0] != 1:
            raise RuntimeError("batch must be 1")
        return []

    assert [shapes(f)["input_ids"] for f in generate(cached(), single)] == [(1, 6), (1, 1)]


def test_no_past_where_it_is_refused():
    def stateless(arrays):
        assert not arrays["past_key_values_0_key"].size
        return []

    assert [f.name for f in generate(cached(), stateless)] == ["prefill"]


def test_numbers_that_are_not_finite_are_second_best():
    def nan_for_two(arrays):
        return [np.full(2, np.nan if arrays["x"].shape[0] == 2 else 0)]

    m = model("g (float[batch, seq] x) => (y) { y = Abs(x) }")
    assert only(generate(m, nan_for_two))["x"].shape[0] == 1
    assert only(generate(m, lambda arrays: [[np.array(np.inf)]]))["x"].shape[0] == 2


def test_what_a_failure_says():
    runs = []

    def refuse(arrays):
        runs.append(sum(a.nbytes for a in arrays.values()))
        raise RuntimeError("node 'Tile_3'\n  is out of order")

    with pytest.raises(NoInputs) as failure:
        generate(cached("int8"), refuse)
    assert str(failure.value) == (
        f"no inputs found on which the model runs ({len(runs)} tried); it wants 'input_ids' int64[batch, seq], "
        "'attention_mask' int64[batch, past_len+seq], 'position_ids' int64[batch, seq], "
        "'past_key_values_0_key' int8[batch, 2, past_len, 8]; the last refusal: node 'Tile_3' is out of order; "
        "give your own with --inputs FILE.npz"
    )
    assert 10 < len(runs) <= 40


@pytest.mark.parametrize(
    "dims", ["2147483648", "1000000, 1000000", "0, 9223372036854775807, 9223372036854775807", "n*9999999999"]
)
def test_absurd_sizes_take_no_memory(dims):
    info = helper.make_tensor_value_info(
        "x", onnx.TensorProto.INT64, [int(d) if d.isdigit() else d for d in dims.split(", ")]
    )
    m = helper.make_model(
        helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "g", [info], [onnx.ValueInfoProto(name="y")])
    )
    with pytest.raises(NoInputs, match=r"0 tried.*x"):
        generate(m, accept)


def test_a_negative_size_counts_as_unknown():
    m = helper.make_model(
        helper.make_graph(
            [helper.make_node("Abs", ["x"], ["y"])],
            "g",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [-1, 3])],
            [onnx.ValueInfoProto(name="y")],
        )
    )
    shape = only(generate(m, accept))["x"].shape
    assert shape[1] == 3
    assert 0 < math.prod(shape) < 100


def test_tables_found_through_many_sums_take_no_time():
    sums = " ".join(f"t{i + 1} = Add(t{i}, t{i})" for i in range(60))
    m = model(f"g (int64[n] i, float[a, b] t0) => (y) {{ {sums} y = Gather<axis = -2>(t60, i) }}")
    assert only(generate(m, accept))["i"].shape == (6,)


def test_strings_cannot_be_made():
    with pytest.raises(NoInputs, match=r"'words' is string; give your own with --inputs FILE.npz"):
        generate(model("g (string[n] words) => (y) { y = Identity(words) }"), accept)


# --- models from elsewhere -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED_MODELS, reason="../shared/models is absent")
@pytest.mark.parametrize("path", SHARED_MODELS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_shared_model_needs_no_help(path):
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        pytest.skip(f"onnxruntime {ort.__version__} does not load {path.name}: {str(error)[:80]}")
    feeds = generate(onnx.load(path, load_external_data=False), lambda arrays: session.run(None, arrays))
    for feed in feeds:
        assert all(np.isfinite(o).all() for o in session.run(None, feed.arrays) if o.dtype.kind == "f")
        assert sum(a.nbytes for a in feed.arrays.values()) <= 256 * 2**20
    dynamic_caches = [
        i for i in session.get_inputs() if len(i.shape) >= 4 and "past" in i.name and isinstance(i.shape[-2], str)
    ]
    assert len(feeds) == (2 if dynamic_caches else 1)
