"""Every native kernel of ``msd.Attention`` against reference.py, bit for bit, through onnxruntime."""

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from attention_support import (
    INPUTS,
    MASK_KINDS,
    MASK_SHAPES,
    Native,
    assert_same_bits,
    make_case,
    mask_of,
    open_model,
    options,
)
from msd_compiler.runtime_ops.attention import reference

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # of reference.py, where a test asks for it

TILE = 256
SCALES = ["tensor", "channel", "dynamic"]


@pytest.fixture(scope="module")
def native():
    return Native()


@pytest.mark.parametrize("columns", [1, 7, 8, 16, 20, 64, 80, 128, 256, 512])
@pytest.mark.parametrize("bits", [8, 4])
def test_columns(variant, native, columns, bits):
    for i, scales in enumerate(SCALES):
        for value_columns in {columns, 24, 33}:
            for queries in (1, 3):
                case = make_case(
                    columns=columns,
                    value_columns=value_columns,
                    bits=bits,
                    scales=scales,
                    queries=queries,
                    group=3,
                    seed=i,
                )
                assert_same_bits(native(case), case.reference())


@pytest.mark.parametrize("past", [0, 1, 2, 15, 16, 17, 255, 256, 257, 511, 600])
@pytest.mark.parametrize("scales", SCALES)
def test_tokens(variant, native, past, scales):
    for queries, new in [(1, 1), (1, 0), (3, 3), (5, 2), (2, 5)]:
        for causal in (True, False):
            case = make_case(past=past, queries=queries, new=new, scales=scales, causal=causal, heads=2, group=2)
            assert_same_bits(native(case), case.reference())


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8, 12])
@pytest.mark.parametrize("queries", [1, 2, 3, 17])
def test_rows(variant, native, group, queries):
    for scales in SCALES:
        case = make_case(batch=2, heads=2, group=group, queries=queries, past=270, columns=32, scales=scales)
        assert_same_bits(native(case), case.reference())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("scales", SCALES)
def test_narrow_floats(variant, native, dtype, scales):
    for queries, columns in [(1, 16), (4, 20), (9, 64)]:
        for bits in (8, 4):
            case = make_case(queries=queries, columns=columns, scales=scales, bits=bits, group=2, dtype=dtype)
            assert_same_bits(native(case), case.reference())


@pytest.mark.parametrize("by", [1, 2, 4, 12])
@pytest.mark.parametrize("scales", SCALES)
def test_any_address(variant, native, helpers, scales, by):
    """onnxruntime hands arrays on as they are, wherever they begin."""
    mask = np.random.default_rng(0).normal(size=(1, 1, 4, 304))
    for bits in (8, 4):
        for dtype in (np.float32, np.float16):
            case = make_case(queries=4, past=300, columns=20, group=2, bits=bits, scales=scales, dtype=dtype, mask=mask)
            moved = case.but(**{k: helpers.displaced(v, by) for k, v in case.operands.items()})
            assert_same_bits(native(moved), case.reference())


@pytest.mark.parametrize("window", [1, 2, 16, 100, 256, 257, 10**6])
@pytest.mark.parametrize("causal", [True, False])
def test_window(variant, native, window, causal):
    for scales in ("tensor", "dynamic"):
        for queries in (1, 40):
            case = make_case(past=580, queries=queries, window=window, causal=causal, scales=scales, group=2)
            assert_same_bits(native(case), case.reference())


@pytest.mark.parametrize("shape", MASK_SHAPES)
@pytest.mark.parametrize("kind", MASK_KINDS)
def test_mask(variant, native, shape, kind):
    mask = mask_of(kind, shape)
    for scales in ("channel", "dynamic"):
        for cap in (0, 5):
            case = make_case(
                batch=2,
                heads=2,
                group=2,
                queries=5,
                past=300,
                mask=mask,
                cap=cap,
                scales=scales,
                causal=kind == "finite",
            )
            assert_same_bits(native(case), case.reference())


@pytest.mark.parametrize("cap", [0.5, 30, 50])
@pytest.mark.parametrize("sigma", [0, 0.1, 1, 100])
def test_soft_cap(variant, native, cap, sigma):
    for scales in ("tensor", "dynamic"):
        case = make_case(past=300, queries=3, cap=cap, sigma=sigma, scales=scales)
        assert_same_bits(native(case), case.reference())


@pytest.mark.parametrize("scales", SCALES)
def test_sinks(variant, native, scales):
    for queries in (1, 5):
        for past in (0, 300):
            sinks = [-3, 0.5, 40, -np.inf]
            case = make_case(heads=2, group=2, queries=queries, past=past, sinks=sinks, scales=scales)
            assert_same_bits(native(case), case.reference())


LENGTHS = [[0, 600, 255], [256, 1, 257], [300, 599, 20], [600], [0], [1]]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("bits", [8, 4])
def test_ragged_past(variant, native, lengths, scales, bits):
    """What lies between the valid past and the new tokens is never read, also where a tile has tokens of both."""
    rng = np.random.default_rng(5)
    for queries in (1, 7):
        mask = rng.normal(size=(3, 1, queries, 600 + queries))
        case = make_case(
            batch=3, queries=queries, past=600, lengths=lengths, scales=scales, bits=bits, mask=mask, group=2
        )
        expected = case.reference()
        assert_same_bits(native(case), expected)
        if scales == "dynamic":
            case.operands["key_scale"][...] = _garbage_behind(case.operands["key_scale"], lengths)
            case.operands["value_scale"][...] = _garbage_behind(case.operands["value_scale"], lengths)
            np.testing.assert_array_equal(native(case).y, expected.y)


def _garbage_behind(scale, lengths):
    scale = scale.copy()
    for b, length in enumerate(np.broadcast_to(lengths, len(scale))):
        scale[b, :, length:] = np.nan
    return scale


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("threads", [1, 2])
def test_shared(variant, native, scales, bits, threads):
    for queries, new, lengths in [(1, 1, [0, 255, 511]), (1, 1, [256]), (1, 0, [512, 3, 0]), (6, 6, [250, 0, 506])]:
        for columns in (16, 20):
            case = make_case(
                batch=3, heads=2, group=2, queries=queries, new=new, past=512, lengths=lengths, shared=True, scales=scales,
                bits=bits, columns=columns,
            )  # fmt: skip
            expected = case.reference()
            assert_same_bits(native(case, threads), expected)
            assert_same_bits(native.in_place(case, threads), expected)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("bits", [8, 4])
def test_grow(variant, native, scales, bits):
    """Room enough: as shared. Too little: as much as the longest sequence needs, zeros behind the others."""
    for past, lengths in [(40, [40, 3, 0]), (40, [39, 39, 39]), (0, [0]), (300, [250, 299, 10]), (50, [20, 48, 0])]:
        for new in (1, 3):
            case = make_case(
                batch=3, queries=new, new=new, past=past, lengths=lengths, grow=True, scales=scales, bits=bits
            )
            expected = case.reference()
            assert expected.present_key.shape[2] == max(past, max(lengths) + new)
            assert_same_bits(native(case), expected)


def test_in_place_append_of_nothing(native):
    case = make_case(past=40, queries=2, new=0)
    assert_same_bits(native.in_place(case), case.reference())


def row_of(case, b):
    whole = case.operands
    one = {k: whole[k][b : b + 1] for k in INPUTS[:5]}
    if case.plan.dynamic:
        one |= {k: whole[k][b : b + 1] for k in ("key_scale", "value_scale")}
    if len(whole["lengths"]) > 1:
        one["lengths"] = whole["lengths"][b : b + 1]
    return case.but(**one)


@pytest.mark.parametrize("scales", ["channel", "dynamic"])
def test_the_same_row_has_the_same_bits(native, library, scales):
    """In every batch, at every capacity and number of threads, one token at a time or many, and with every kernel."""
    lengths = [700, 1500, 3]
    case = make_case(
        batch=3,
        heads=2,
        group=4,
        queries=20,
        past=1600,
        lengths=lengths,
        shared=True,
        scales=scales,
        columns=32,
        window=900,
    )
    expected = case.reference()
    for name in library.msd_isa_names().decode().split():
        library.msd_select_isa(name.encode())
        for threads in (1, 2):
            assert_same_bits(native(case, threads), expected)
            for b in range(3):
                np.testing.assert_array_equal(native(row_of(case, b), threads).y[0], expected.y[b])
        wider = {k: np.pad(case.operands[k], ((0, 0), (0, 0), (0, 77), (0, 0))) for k in ("past_key", "past_value")}
        if scales == "dynamic":
            pads = ((0, 0), (0, 0), (0, 77), (0, 0))
            wider |= {k: np.pad(case.operands[k], pads) for k in ("key_scale", "value_scale")}
        np.testing.assert_array_equal(native(case.but(**wider)).y, expected.y)
        step = case
        for i in range(20):  # decoding: the cache goes in as it came out
            fresh = {k: case.operands[k][:, :, i : i + 1] for k in INPUTS[:3]}
            out = native(step.but(**fresh, lengths=np.array(lengths) + i))
            np.testing.assert_array_equal(out.y[:, :, 0], expected.y[:, :, i])
            step = step.but(past_key=out.present_key, past_value=out.present_value)
            if scales == "dynamic":
                step = step.but(key_scale=out.present_key_scale, value_scale=out.present_value_scale)
    library.msd_select_isa(b"")


def test_long_decode_is_shared_out_along_the_cache(variant, native):
    for heads, group in [(1, 1), (2, 4), (1, 8)]:
        for scales in ("tensor", "dynamic"):
            case = make_case(batch=1, heads=heads, group=group, past=4500, lengths=[4400], shared=True, scales=scales)
            expected = case.reference()
            for threads in (1, 2):
                assert_same_bits(native(case, threads), expected)


def test_nothing_to_do(variant, native):
    for changes in [
        {"batch": 0},
        {"queries": 0, "new": 3},
        {"queries": 0, "new": 0},
        {"past": 0, "new": 0, "queries": 2},
    ]:
        for scales in ("tensor", "dynamic"):
            case = make_case(**changes, scales=scales, lengths=[0] if changes.get("batch") == 0 else None)
            assert_same_bits(native(case), case.reference())


def test_what_sees_nothing_is_zero(variant, native):
    case = make_case(past=0, queries=5, new=2, group=2)  # the first three queries stand before the first token
    y = native(case).y
    assert (y[:, :, :3] == 0).all()
    assert (y[:, :, 3:] != 0).all()
    masked = make_case(past=300, queries=3, mask=np.full((1, 1, 1, 1), -np.inf))
    assert (native(masked).y == 0).all()
    assert (native(masked.but(sinks=np.array([1], np.float32))).y == 0).all()


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_guards(variant, native, scales, dtype):
    case = make_case(past=300, queries=12, heads=2, group=1, scales=scales, dtype=dtype, columns=20)
    q, k, v = (case.operands[name] for name in INPUTS[:3])
    q[0, 0, 1, 3], q[0, 0, 2, 9], q[0, 0, 3, 0] = np.nan, np.inf, -np.inf
    q[0, 0, 4] = 0
    q[0, 1, 0] = 6e4 if dtype == np.float16 else 1e30
    k[0, 0, 5, 2], v[0, 1, 6, 1], v[0, 1, 8, 0] = np.nan, np.inf, np.nan
    k[0, 1, 7], v[0, 0, 7] = 0, 0
    if dtype == np.float32:
        q[0, 1, 1], q[0, 1, 2, :4], k[0, 1, 3], v[0, 1, 3] = 2.0**-101, 1e-40, 1e-40, 2.0**-100
    out, expected = native(case), case.reference()
    assert_same_bits(out, expected)
    bad = np.isnan(out.y).all(axis=3)
    assert bad[0, 0].tolist() == [False, True, True, True] + [False] + [scales == "dynamic"] * 7
    if scales == "dynamic":
        assert bad[0, 1].tolist() == [False] * 6 + [True] * 6


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scales", SCALES)
def test_scales_and_masks_that_are_not_finite(variant, native, value, scales):
    case = make_case(past=300, queries=3, scales=scales)
    for name in ("key_scale", "value_scale"):
        changed = case.operands[name].copy()
        changed[0, 0, -1, -1] = value
        new = case.but(**{name: changed})
        assert_same_bits(native(new), new.reference())
    mask = np.zeros((1, 1, 3, 303), np.float32)
    mask[0, 0, 1, 7] = value
    assert_same_bits(native(case.but(mask=mask)), case.but(mask=mask).reference())
    sink = case.but(sinks=np.array([value], np.float32))
    assert_same_bits(native(sink), sink.reference())


@pytest.mark.parametrize("scales", ["tensor", "dynamic"])
def test_largest_sums(variant, native, scales):
    """512 products of the largest codes, and a tile of probabilities 1: the edge of int32."""
    case = make_case(past=300, columns=512, queries=9, scales=scales)
    for code in (-128, 127):
        for sign in (1, -1):
            extreme = case.but(
                query=np.full_like(case.operands["query"], sign * 3.5),
                past_key=np.full_like(case.operands["past_key"], code),
                past_value=np.full_like(case.operands["past_value"], code),
            )
            assert_same_bits(native(extreme), extreme.reference())


def test_far_logits(variant, native):
    """Tiles whose maxima are far apart, in either order: exp reaches 0 on both sides."""
    for scale in (3, -3, 1e4):
        case = make_case(past=800, queries=2, scale=scale, columns=16)
        ramp = np.linspace(-128, 127, 800).astype(np.int8)[None, None, :, None]
        case = case.but(past_key=np.broadcast_to(ramp, case.operands["past_key"].shape).copy())
        case = case.but(query=np.ones_like(case.operands["query"]))
        assert_same_bits(native(case), case.reference())


def test_flush_to_zero_changes_nothing(variant):
    """The session option sets the processor's flags; the guards keep every step clear of subnormals."""
    case = make_case(past=300, queries=4, scales="dynamic", new=4)
    for name in INPUTS[:3]:
        case.operands[name][...] *= np.float32(2.0) ** np.array([0, -95, -100, -126], np.float32)[:, None]
    chosen = options()
    chosen.add_session_config_entry("session.set_denormal_as_zero", "1")
    session = ort.InferenceSession(open_model().SerializeToString(), chosen)
    assert_same_bits(reference.Attended(*session.run(None, dict(case.operands))), case.reference())
