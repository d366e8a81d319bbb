"""The paper's own tables from its own formulas, and where the two differ.

Source of the expected figures: arXiv 2605.13915, sections 3.9, 4.4 and 5.2.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msd_compiler.cost import paper
from msd_compiler.cost.instructions import COUNTS, two_passes_over_fused

KEYS = 8192
SIZES = st.integers(1, 20_000)


@pytest.mark.parametrize(
    ("head_size", "rows", "printed"),
    [
        (128, 1, 20),
        (128, 4, 5.3),
        (128, 12, 2.0),
        (128, 24, 1.2),
        (128, 32, 1.0),
        (128, 48, 0.8),
        (576, 1, 31),
        (576, 12, 3.0),
        (576, 32, 1.4),
        (576, 48, 1.0),
    ],
)
def test_ratio_of_vector_work_in_attention(head_size, rows, printed):
    ratio = paper.dequantized_attention_flops(rows, KEYS, head_size) / paper.msd_attention_flops(rows, KEYS, head_size)
    digits = 0 if printed >= 10 else 1
    assert round(ratio, digits) == printed


@pytest.mark.parametrize(("head_size", "exact", "printed"), [(128, 32, 20), (576, 52, 31)])
def test_break_even(head_size, exact, printed):
    """The paper's short formula gives 40 % less than its own two sums, which its table of ratios is made of."""
    assert round(paper.break_even_rows(KEYS, head_size)) == exact
    assert round(paper.printed_break_even_rows(KEYS, head_size)) == printed


@given(keys=st.integers(1024, 2**20), head_size=st.sampled_from([64, 80, 128, 256, 576]))
def test_both_are_as_much_work_at_the_break_even(keys, head_size):
    def more_than_dequantized(rows):
        return paper.msd_attention_flops(rows, keys, head_size) - paper.dequantized_attention_flops(
            rows, keys, head_size
        )

    even = paper.break_even_rows(keys, head_size)
    assert more_than_dequantized(even * 0.999) < 0 < more_than_dequantized(even * 1.001)
    assert paper.printed_break_even_rows(keys, head_size) < even


@given(b=SIZES, k=SIZES, n=SIZES)
def test_bytes_of_layers(b, k, n):
    """The table of section 3.9: its m outputs are our n, its n inputs our k."""
    int8, mxfp4 = float(k * n), k * n / 2
    assert paper.bf16_bytes(b, k, n) == 2 * k * n + 2 * b * k + 2 * b * n
    assert paper.dequantized_bytes(b, k, n, int8) == 3 * k * n + 2 * b * k + 2 * b * n
    assert paper.dequantized_bytes(b, k, n, int8, trips=2) == 5 * k * n + 2 * b * k + 2 * b * n
    assert paper.msd_bytes(b, k, n, int8) == k * n + 4 * b * k + 2 * b * n
    assert paper.msd_bytes(b, k, n, int8, reads=2) == 2 * k * n + 4 * b * k + 2 * b * n
    assert paper.msd_bytes(b, k, n, mxfp4) == k * n / 2 + 4 * b * k + 2 * b * n


@given(b=SIZES, k=SIZES, n=SIZES)
def test_work_of_layers(b, k, n):
    """Vector work is the paper's times two: its operations are 2 FLOP, as it says of dequantization."""
    assert paper.dequantizing_flops(k * n) == 2 * (k * n)
    assert paper.msd_flops(b, k, n) == 2 * (3 * k + 2 * n) * b
    assert paper.matrix_ops(b, k, n) == 2 * b * k * n
    assert paper.matrix_ops(b, k, n, terms=2) == 4 * b * k * n


@given(b=SIZES, k=SIZES, n=SIZES, groups=st.integers(1, 400))
def test_groups_cost_a_scaling_and_an_addition_each(b, k, n, groups):
    assert paper.msd_flops(b, k, n, groups=groups) == paper.msd_flops(b, k, n) + 5 * b * n * (groups - 1)


def test_two_int8_passes_take_as_long_as_one_in_bf16():
    """Section 5.2: the matrix unit's time ties, with FP4 it halves; what MSD saves is vector work and bytes."""
    seconds = {number: paper.matrix_ops(8, 64, 64, terms=2) / rate for number, rate in paper.RATES.items()}
    in_bf16 = paper.matrix_ops(8, 64, 64) / paper.RATES["bf16"]
    assert seconds["int8"] == seconds["fp8"] == in_bf16
    assert seconds["fp4"] == in_bf16 / 2


def test_latency():
    assert paper.latency(3, 2, 1) == 4
    assert paper.latency(2, 3, 1) == 4


def test_bytes_of_attention():
    """The paper's "2.5 times" sets one tensor's way against two tensors; like for like it is 5, 3 or 1 times."""
    dequantized, decomposed = paper.printed_attention_bytes(KEYS, 128)
    assert (dequantized, decomposed) == (5 * KEYS * 128, 2 * KEYS * 128)
    assert dequantized / decomposed == 2.5
    values = 2 * KEYS * 128
    like_for_like = [paper.dequantized_values_bytes(values, values, trips) / decomposed for trips in (2, 1, 0)]
    assert like_for_like == [5, 3, 1]


@pytest.mark.parametrize(
    ("instruction_set", "rows", "ratio"),
    [("avx2", 1, 4 / 3), ("avx2", 1000, 2.0), ("avx512-vnni", 1, 0.5), ("avx512-vnni", 1000, 1.0)],
)
def test_two_passes_pay_for_one_row_with_vnni(instruction_set, rows, ratio):
    assert two_passes_over_fused(instruction_set, rows) == pytest.approx(ratio, rel=2e-3)


def test_where_dot_products_take_bytes_there_is_no_choice():
    assert two_passes_over_fused("neon-dotprod", 8) is None


def test_the_fused_code_beats_floats():
    """As many instructions for many rows on AVX2, of a faster kind; half with AVX-512 VNNI."""
    avx2, vnni = COUNTS["avx2"], COUNTS["avx512-vnni"]
    assert avx2.floats(512) / avx2.fused(512) == pytest.approx(1.0, rel=0.01)
    assert vnni.floats(512) / vnni.fused(512) == pytest.approx(2.0, rel=0.01)
