"""The decomposition against the bounds of METHOD section 2, and its guards."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from msd_compiler.runtime_ops.matmul.layout import Plan
from msd_compiler.runtime_ops.matmul.reference import LIMITS, SMALLEST_PEAK, decompose

FLOAT32_ROUNDING = 4 * 2.0**-24  # of the two divisions, the product and the scale, relative to the peak
BOUNDS = {1: 1 / 254 + FLOAT32_ROUNDING, 2: 1 / 64516 + FLOAT32_ROUNDING, 3: 1 / (2 * 127 * 254**2) * (1 + 1e-6)}

ROWS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 90)),
    elements=st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-4, 4, width=32),
)


def peaks(x: np.ndarray, plan: Plan) -> np.ndarray:
    """Largest magnitude that each element's scale was made of."""
    if plan.per_row:
        return np.broadcast_to(np.abs(x).max(axis=1, keepdims=True), x.shape)
    starts = np.arange(0, plan.k, plan.block_size)
    by_group = np.maximum.reduceat(np.abs(x), starts, axis=1)
    return by_group[:, np.arange(plan.k) // plan.block_size]


@pytest.mark.parametrize("terms", [1, 2, 3])
@given(x=ROWS, block_size=st.integers(1, 64), per_row=st.booleans())
def test_bound(x, terms, block_size, per_row):
    plan = Plan(x.shape[1], 8, block_size, terms, per_row)
    parts = decompose(x, plan)
    peak = peaks(x, plan).astype(np.float64)
    error = np.abs(x.astype(np.float64) - parts.values(plan.k))
    is_zero = peak < SMALLEST_PEAK
    assert (error[~is_zero] <= peak[~is_zero] * BOUNDS[terms]).all()
    assert (parts.values(plan.k)[is_zero] == 0).all()
    assert np.abs(parts.codes).max() <= LIMITS[terms]


@given(ROWS)
def test_two_terms_are_one_fused_code(x):
    codes = decompose(x, Plan(x.shape[1], 8, 32, 2, False)).codes
    coarse = np.rint(codes / 254).astype(np.int64)
    fine = codes - 254 * coarse
    assert np.abs(coarse).max() <= 127
    assert np.abs(fine).max() <= 127


@given(ROWS)
def test_three_terms_are_three_digits(x):
    codes = decompose(x, Plan(x.shape[1], 8, 32, 3, False)).codes.astype(np.int64)
    first = np.rint(codes / 254**2).astype(np.int64)
    rest = codes - 254**2 * first
    second = np.rint(rest / 254).astype(np.int64)
    for digit in (first, second, rest - 254 * second):
        assert np.abs(digit).max() <= 127


@pytest.mark.parametrize("terms", [1, 2, 3])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_poisons_its_group(terms, value):
    x = np.ones((1, 8), np.float32)
    x[0, 5] = value
    parts = decompose(x, Plan(8, 8, 4, terms, False))
    assert np.isnan(parts.scales).tolist() == [[False, True]]
    assert (parts.codes[0, 1] == 0).all()
    assert np.isnan(decompose(x, Plan(8, 8, 4, terms, True)).scales).all()


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_tiny_counts_as_zero(terms):
    smallest = float(SMALLEST_PEAK)
    x = np.array([[0, 0, np.nextafter(np.float32(smallest), np.float32(0)), 1e-44, smallest, 0]], np.float32)
    parts = decompose(x, Plan(6, 8, 2, terms, False))
    assert parts.scales[0, :2].tolist() == [0, 0]
    assert (parts.codes[0, :2] == 0).all()
    assert parts.codes[0, 2].tolist() == [LIMITS[terms], 0]


def test_halves_round_to_even():
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5]], np.float32)
    assert decompose(x, Plan(6, 8, 6, 1, False)).codes[0, 0].tolist() == [127, 0, 2, 2, 0, -2]
