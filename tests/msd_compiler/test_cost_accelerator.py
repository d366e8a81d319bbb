"""Prices on accelerators, and how they compare with the rules of the device's own kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msd_compiler.cost import paper
from msd_compiler.cost.accelerator import (
    dequantized_attention,
    dequantized_linear,
    msd_attention,
    msd_fp4_linear,
    msd_linear,
)
from msd_compiler.cost.price import NoFigure
from msd_compiler.cost.profile import AcceleratorProfile, Figure, load_target
from msd_compiler.cost.rules import explain, refusal, rows_of_tie
from msd_compiler.cost.work import AttentionWork, LinearWork


def figure(value: float) -> Figure:
    return Figure(value=value, source="made up")


def device(dequantized: str = "memory", **matrix: float) -> AcceleratorProfile:
    """Rates like powers of ten, so that times can be told by eye."""
    return AcceleratorProfile(
        family="accelerator",
        name="toy",
        description="",
        matrix={n: figure(v) for n, v in (matrix or {"bf16": 1e14, "int8": 2e14}).items()},
        vector=figure(1e13),
        read=figure(1e12),
        on_chip_bytes=figure(1e8),
        node=figure(1e-6),
        dequantized=dequantized,
        dequantized_source="made up",
    )


INT8 = LinearWork(4096, 4096, 8, 128, per_channel=True)
INT4 = LinearWork(4096, 4096, 4, 32)
CACHE = AttentionWork(32, 8, 128, 8)
ASCEND = load_target("ascend-910b")
assert isinstance(ASCEND, AcceleratorProfile)


# ---- Prices ------------------------------------------------------------------------------------------------------------


def test_a_row_waits_for_memory():
    values, scales, ends = 4096 * 4096, 4 * 4096, 2 * (4096 + 4096)
    kept, decomposed = dequantized_linear(device(), INT8, 1), msd_linear(device(), INT8, 1, 2, per_row=True)
    assert kept.bytes == 5 * values + scales + ends
    assert decomposed.bytes == values + scales + ends + 2 * 4096
    assert kept.seconds == pytest.approx(1e-6 + kept.bytes / 1e12)
    assert decomposed.seconds == pytest.approx(1e-6 + decomposed.bytes / 1e12)


def test_registers_save_the_way_through_memory():
    kept = dequantized_linear(device("registers"), INT8, 1)
    assert kept.bytes == 4096 * 4096 + 4 * 4096 + 2 * (4096 + 4096)


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_many_rows_wait_for_the_matrix_unit(terms):
    rows = 4096
    ops = 2 * terms * rows * 4096 * 4096
    price = msd_linear(device(), INT8, rows, terms, per_row=True)
    assert price.ops["matrix int8"] == ops
    assert price.seconds == pytest.approx(1e-6 + ops / 2e14)


def test_partial_sums_of_groups_meet_in_memory():
    """Two terms of int32, written and read, for each output and group but the last."""
    price, in_registers = (msd_linear(device(kind), INT4, 8, 2) for kind in ("memory", "registers"))
    assert price.bytes - in_registers.bytes == 2 * 2 * 4 * 8 * 4096 * (128 - 1)


def test_one_scale_per_row_needs_no_groups():
    assert msd_linear(device(), INT8, 8, 2, per_row=True).bytes < msd_linear(device(), INT8, 8, 2).bytes
    assert msd_linear(device(), INT4, 8, 2, per_row=True) == msd_linear(device(), INT4, 8, 2)


def test_an_activation_too_large_for_the_chip_reads_the_weight_for_each_term():
    fits, does_not = (msd_linear(device(), INT8, rows, 2, per_row=True) for rows in (12207, 12208))
    a_row_more = paper.msd_bytes(1, 4096, 4096, 0)
    assert does_not.bytes - fits.bytes == INT8.weight_bytes + a_row_more


def test_experts_are_launched_once():
    eight = msd_linear(device(), replace(INT8, copies=8), 1, 2)
    one = msd_linear(device(), INT8, 1, 2)
    assert eight.seconds - 1e-6 == pytest.approx(8 * (one.seconds - 1e-6))


def test_fp4_halves_the_matrix_units_time():
    profile, work = load_target("ascend-950"), LinearWork(4096, 4096, 4, 32, is_fp4=True)
    assert isinstance(profile, AcceleratorProfile)
    in_int8, in_fp4 = msd_linear(profile, work, 4096, 2), msd_fp4_linear(profile, work, 4096)
    assert in_fp4.ops["matrix fp4"] == in_int8.ops["matrix int8"]
    assert in_fp4.seconds < 0.51 * in_int8.seconds


def test_floats_are_not_dequantized():
    floats = replace(CACHE, bits=16)
    kept = dequantized_attention(device(), floats, 1, 1, 4096)
    assert kept.bytes == 8 * 2 * 2 * 4096 * 128
    assert kept.ops["vector"] == 8 * paper.softmax_flops(4, 4096, 128)
    weight = LinearWork(4096, 4096, 16, 4096, per_channel=True)
    assert dequantized_linear(device(), weight, 1).ops["vector"] == 0


def test_attention():
    kept, decomposed = (price(device(), CACHE, 2, 1, 4096) for price in (dequantized_attention, msd_attention))
    heads = 2 * 8
    assert kept.bytes == heads * 2 * 5 * 4096 * 128
    assert decomposed.bytes == heads * 2 * 4096 * 128
    assert kept.ops["vector"] == heads * paper.dequantized_attention_flops(4, 4096, 128)
    assert decomposed.ops["vector"] == heads * paper.msd_attention_flops(4, 4096, 128)
    assert decomposed.ops["matrix int8"] == 2 * kept.ops["matrix bf16"] == heads * 8 * 4 * 4096 * 128


def test_new_tokens_see_half_of_each_other():
    whole, causal = (msd_attention(device(), CACHE, 1, tokens, 512) for tokens in (1, 512))
    assert causal.ops["matrix int8"] / whole.ops["matrix int8"] == pytest.approx(512 * 256.5 / 512)


@pytest.mark.parametrize(
    ("price", "matrix", "message"),
    [
        (lambda p: msd_linear(p, INT8, 1, 2), {"bf16": 1.0}, "toy has no figure for a matrix unit in int8"),
        (lambda p: msd_attention(p, CACHE, 1, 1, 8), {"bf16": 1.0}, "toy has no figure for a matrix unit in int8"),
        (lambda p: dequantized_linear(p, INT8, 1), {"int8": 1.0}, "toy has no figure for a matrix unit in bf16"),
        (
            lambda p: dequantized_attention(p, CACHE, 1, 1, 8),
            {"int8": 1.0},
            "toy has no figure for a matrix unit in bf16",
        ),
        (
            lambda p: msd_fp4_linear(p, replace(INT4, is_fp4=True), 1),
            {"int8": 1.0},
            "no figure for a matrix unit in fp4",
        ),
        (lambda p: msd_fp4_linear(p, INT4, 1), {"fp4": 1.0}, "the weight is not MXFP4"),
    ],
)
def test_no_figure(price, matrix, message):
    with pytest.raises(NoFigure, match=message):
        price(device(**matrix))


# ---- The device's rules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "rows", "reason"),
    [
        (INT8, 1, None),
        (INT8, 64, None),
        (INT8, 65, "65 rows; they decompose up to 64"),
        (replace(INT8, k=4100), 1, "K = 4100 and N = 4096; they decompose where both are multiples of 32"),
        (replace(INT8, n=4100), 1, "K = 4096 and N = 4100; they decompose where both are multiples of 32"),
        (INT4, 4, None),
        (INT4, 5, "5 rows with groups of 32; they decompose up to 4"),
        (replace(INT4, group=128), 16, None),
        (replace(INT4, group=128), 17, "17 rows with groups of 128; they decompose up to 16"),
        (replace(INT8, bits=16), 1, "the weight holds floats"),
        (CACHE, 16, None),
        (CACHE, 17, "17 query rows of a KV head; they decompose up to 16"),
        (replace(CACHE, bits=16), 1, "the cache holds floats"),
    ],
)
def test_rules_of_ascend_910b(work, rows, reason):
    assert refusal(ASCEND.rules, work, rows) == reason


def test_agreement_needs_no_explanation():
    assert explain(ASCEND, INT8, 64, rewritten=True) is None
    assert explain(ASCEND, INT8, 65, rewritten=False) is None


@pytest.mark.parametrize("name", ["h200", "b200", "ascend-950", "cpu-arm-dotprod"])
def test_targets_without_rules_have_no_explanation(name):
    assert explain(load_target(name), INT8, 65, rewritten=True) is None


def test_more_rows_than_the_devices_kernels_take():
    said = explain(ASCEND, INT8, 128, rewritten=True)
    assert said is not None
    assert said.startswith("public kernels for ascend-910b would dequantize (128 rows; they decompose up to 64); ")
    tie = rows_of_tie(ASCEND, INT8)
    assert said.endswith(f"memory, until from {tie} rows on it waits as long for the matrix unit")


def test_attention_names_the_papers_break_even():
    said = explain(ASCEND, CACHE, 20, rewritten=True, context=8192)
    assert said is not None
    assert said.endswith("(by vector work alone up to 32 rows, the paper's N*)")


def test_fewer_rows_than_the_devices_kernels_take():
    said = explain(ASCEND, INT8, 8, rewritten=False)
    assert said is not None
    assert said.startswith("public kernels for ascend-910b would decompose; the closed forms give ")


def test_groups_are_left_for_dequantization_near_the_devices_own_limit():
    """Partial sums of group/4 rows cross memory as often as dequantized values do; the device stops at group/8."""
    for group in (32, 64, 128):
        tie = rows_of_tie(ASCEND, replace(INT4, group=group))
        assert tie is not None
        assert group / 8 <= tie <= group / 4
    said = explain(ASCEND, replace(INT4, group=128), 20, rewritten=True)
    assert said is not None
    assert said.endswith("rows on it waits as long for its groups' partial sums in memory")


def test_at_a_tie_dequantizing_is_no_slower():
    said = explain(ASCEND, INT8, 700, rewritten=True)
    assert said is not None
    assert said.endswith("from 585 rows on dequantizing is no slower")


def test_a_missing_figure_is_said():
    profile = ASCEND.model_copy(update={"matrix": {"bf16": figure(1e14)}})
    said = explain(profile, INT8, 65, rewritten=True)
    assert said is not None
    assert said.endswith("; ascend-910b has no figure for a matrix unit in int8")


@given(
    bits=st.sampled_from([4, 8]),
    k=st.integers(32, 16384),
    n=st.integers(32, 16384),
    group=st.sampled_from([32, 64, 128]),
    rows=st.integers(1, 4096),
    rewritten=st.booleans(),
)
def test_every_difference_is_explained(bits, k, n, group, rows, rewritten):
    work = LinearWork(k, n, bits, group, per_channel=bits == 8)
    differs = rewritten != (refusal(ASCEND.rules, work, rows) is None)
    assert (explain(ASCEND, work, rows, rewritten) is not None) == differs
