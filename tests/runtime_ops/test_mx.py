"""mx.py: effective bits and bounds of METHOD section 6, the grids themselves, exactness and guards."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from msd_compiler.runtime_ops.matmul import mx
from msd_compiler.runtime_ops.matmul.layout import ActivationFormat, Plan
from msd_compiler.runtime_ops.matmul.mx import (
    E2M1,
    E4M3,
    MX_FORMATS,
    decompose_as,
    round_to_grid,
    unit_exponent,
)
from msd_compiler.runtime_ops.matmul.reference import SMALLEST_PEAK, decompose

E1M2_X2, E2M1_X2 = ActivationFormat.MXFP4_E1M2_X2, ActivationFormat.MXFP4_E2M1_X2
MX = list(MX_FORMATS)
TWO_PASSES = [E1M2_X2, E2M1_X2]

DRAWS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "uniform 1": lambda rng, shape: rng.uniform(-1, 1, shape),
    "uniform 3": lambda rng, shape: rng.uniform(-3, 3, shape),
    "laplace": lambda rng, shape: rng.laplace(size=shape),
    "t3": lambda rng, shape: rng.standard_t(3, shape),
}
BITS = {
    E1M2_X2: [6.62, 6.83, 7.36, 6.32, 6.01],
    E2M1_X2: [5.85, 6.60, 6.29, 5.59, 5.28],
    ActivationFormat.MXFP8: [5.24, 5.40, 5.20, 5.24, 5.24],
}

ROWS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 90)),
    elements=st.floats(allow_nan=False, allow_infinity=False, width=32) | st.floats(-4, 4, width=32),
)


def plan_of(x: np.ndarray, block_size: int = 32) -> Plan:
    return Plan(x.shape[1], 8, block_size, 2, False)


def relative_l2(x: np.ndarray, activation: ActivationFormat, **options) -> float:
    exact = x.astype(np.float64)
    return float(np.linalg.norm(exact - decompose_as(x, plan_of(x), activation, **options).values(x.shape[1]))) / float(
        np.linalg.norm(exact)
    )


@pytest.mark.parametrize(
    ("activation", "draw", "bits"),
    [(activation, *pair) for activation, row in BITS.items() for pair in zip(DRAWS, row, strict=True)],
)
def test_effective_bits(activation, draw, bits):
    x = DRAWS[draw](np.random.default_rng(0), (1000, 2048)).astype(np.float32)
    assert -np.log2(relative_l2(x, activation)) == pytest.approx(bits, abs=0.05)


def largest_error_over_bound(activation: ActivationFormat, blocks: int, seed: int) -> float:
    """Of blocks of every shape of METHOD section 6 in turn; the scale of two passes is the bound, alpha / 64."""
    rng = np.random.default_rng(seed)
    found = []
    for draw in DRAWS.values():
        x = draw(rng, (blocks // len(DRAWS), 32)).astype(np.float32)
        x *= np.exp2(rng.uniform(-30, 30, (len(x), 1))).astype(np.float32)  # so that Mb is anywhere between two powers
        parts = decompose_as(x, plan_of(x), activation)
        found.append((np.abs(x - parts.values(32)) / parts.scales).max())
    return max(found)


@pytest.mark.parametrize("activation", TWO_PASSES)
def test_bound_in_a_million_blocks(activation):
    found = [largest_error_over_bound(activation, 100_000, seed) for seed in range(10)]
    assert 0.99 <= max(found) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("activation", TWO_PASSES)
def test_bound_in_ten_million_blocks(activation):
    found = [largest_error_over_bound(activation, 100_000, 100 + seed) for seed in range(100)]
    assert 0.99 <= max(found) <= 1


@pytest.mark.parametrize("activation", TWO_PASSES)
@settings(max_examples=60, deadline=None)
@given(x=ROWS, block_size=st.integers(1, 40))
def test_bound_of_any_float32(activation, x, block_size):
    parts = decompose_as(x, plan_of(x, block_size), activation)
    bound = np.repeat(parts.scales, block_size, axis=1)[:, : x.shape[1]].astype(np.float64)
    counts = bound > 0
    assert (np.abs(x.astype(np.float64) - parts.values(x.shape[1]))[counts] <= bound[counts]).all()


def exact_codes(block: list[Fraction], activation: ActivationFormat) -> tuple[list[int], Fraction]:
    """Codes and scale as METHOD section 6 writes them: by search over alpha and over the grid's values, in fractions."""
    form = MX_FORMATS[activation]
    e1m2 = [Fraction(n, 4) for n in range(8)]
    e2m1 = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)]
    values, limit, first = (e1m2, Fraction(119, 64), 1) if form.grid.mantissa_bits == 2 else (e2m1, Fraction(1), 4)
    largest = max(map(abs, block))
    alpha = Fraction(2) ** -200
    while limit * alpha < largest:
        alpha *= 2

    def nearest(v: Fraction) -> Fraction:
        # A tie goes to the even code: codes of one sign are in order of value, in both grids.
        best = min(range(len(values)), key=lambda i: (abs(abs(v) - values[i]), i % 2))
        return values[best] if v >= 0 else -values[best]

    scale = alpha / first
    coarse = [nearest(v / scale) * scale for v in block]
    if form.passes == 1:
        unit = scale * values[1]
        return [int(c / unit) for c in coarse], unit
    fine_scale = alpha / (16 if first == 1 else 32)
    fine = [nearest((v - c) / fine_scale) * fine_scale for v, c in zip(block, coarse, strict=True)]
    unit = fine_scale * values[1]
    return [int((c + f) / unit) for c, f in zip(coarse, fine, strict=True)], unit


@pytest.mark.parametrize("activation", [a for a in MX if a is not ActivationFormat.MXFP8])
@settings(max_examples=60, deadline=None)
@given(
    x=hnp.arrays(
        np.float32,
        st.tuples(st.just(1), st.integers(1, 12)),
        elements=st.floats(-(2.0**100), 2.0**100, width=32)
        | st.integers(-600, 600).map(lambda n: n / 64)  # ties in both passes
        | st.floats(-4, 4, width=32),
    )
)
def test_is_the_formula_in_exact_arithmetic(activation, x):
    parts = decompose_as(x, plan_of(x), activation)
    if np.abs(x).max() < SMALLEST_PEAK:
        assert parts.scales[0, 0] == 0
        return
    codes, unit = exact_codes([Fraction(float(v)) for v in x[0]], activation)
    assert parts.codes[0, 0, : x.shape[1]].tolist() == codes
    assert Fraction(float(parts.scales[0, 0])) == unit


@settings(max_examples=60, deadline=None)
@given(x=ROWS)
def test_mxfp8_is_the_float8_type(x):
    """ml_dtypes converts to the same E4M3 with the same rounding."""
    parts = decompose_as(x, plan_of(x), ActivationFormat.MXFP8)
    scale = np.repeat(parts.scales.astype(np.float64), 32, axis=1)[:, : x.shape[1]] * 512
    live = scale > 0
    elements = (x.astype(np.float64)[live] / scale[live]).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    np.testing.assert_array_equal(elements * scale[live], parts.values(x.shape[1])[live])


@pytest.mark.parametrize(("grid", "dtype", "unit"), [(E2M1, ml_dtypes.float4_e2m1fn, 2), (E4M3, ml_dtypes.float8_e4m3fn, 512)])  # fmt: skip
def test_grid_is_the_type_of_its_name(grid, dtype, unit):
    top = grid.largest / unit
    v = np.concatenate([np.linspace(-top, top, 400_001), np.arange(-(2**12), 2**12) / 2**10]).astype(np.float32)
    np.testing.assert_array_equal(round_to_grid(v * unit, grid), v.astype(dtype).astype(np.float32) * unit)
    assert round_to_grid(np.float32([2 * grid.largest]), grid) == grid.largest


@pytest.mark.parametrize(("activation", "reached"), [(E1M2_X2, 119), (E2M1_X2, 64), (ActivationFormat.MXFP8, 229376)])
def test_codes_stay_in_range(activation, reached):
    tops = np.float32([MX_FORMATS[activation].grid.peak, 1, 0])
    x = tops * np.linspace(0.5, 1, 10_001, dtype=np.float32)[:, None]
    largest = np.abs(decompose_as(x, plan_of(x), activation).codes).max()
    assert largest == reached <= MX_FORMATS[activation].limit


@pytest.mark.parametrize("peak", [7.4375, 8, 229376])
def test_scale_at_the_powers_of_two(peak):
    """One step of float32 beside the limit is on the right side, where a logarithm in floating point is not."""
    limits = np.float32(peak) * np.exp2(np.arange(-100, 100)).astype(np.float32)
    np.testing.assert_array_equal(unit_exponent(limits, peak), np.arange(-100, 100))
    np.testing.assert_array_equal(unit_exponent(np.nextafter(limits, np.float32(np.inf)), peak), np.arange(-99, 101))


@pytest.mark.parametrize("activation", MX)
@settings(max_examples=60, deadline=None)
@given(x=ROWS, block_size=st.integers(1, 40))
def test_blocks_do_not_touch_each_other(activation, x, block_size):
    parts = decompose_as(x, plan_of(x, block_size), activation)
    for g in range(parts.codes.shape[1]):
        block = x[:, g * block_size : (g + 1) * block_size]
        alone = decompose_as(block, plan_of(block, block_size), activation)
        np.testing.assert_array_equal(parts.codes[:, g], alone.codes[:, 0])
        np.testing.assert_array_equal(parts.scales[:, g], alone.scales[:, 0])


@pytest.mark.parametrize("activation", MX)
@settings(max_examples=60, deadline=None)
@given(x=ROWS, power=st.integers(-20, 20))
def test_powers_of_two_move_only_the_scale(activation, x, power):
    x = np.clip(x, -(2.0**100), 2.0**100)
    x[np.abs(x) < 2.0**-60] = 0
    parts, moved = (decompose_as(v, plan_of(x), activation) for v in (x, np.ldexp(x, power)))
    np.testing.assert_array_equal(parts.codes, moved.codes)
    np.testing.assert_array_equal(np.ldexp(parts.scales, power), moved.scales)


@pytest.mark.parametrize("activation", MX)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_poisons_its_block(activation, value):
    x = np.ones((1, 8), np.float32)
    x[0, 5] = value
    parts = decompose_as(x, plan_of(x, 4), activation)
    assert np.isnan(parts.scales).tolist() == [[False, True]]
    assert (parts.codes[0, 1] == 0).all()


@pytest.mark.parametrize("activation", MX)
def test_tiny_counts_as_zero(activation):
    smallest = float(SMALLEST_PEAK)
    x = np.array([[0, 0, np.nextafter(np.float32(smallest), np.float32(0)), 1e-44, smallest, 0]], np.float32)
    parts = decompose_as(x, plan_of(x, 2), activation)
    assert parts.scales[0, :2].tolist() == [0, 0]
    assert (parts.codes[0, :2] == 0).all()
    np.testing.assert_array_equal(parts.values(6)[0, 4:], [smallest, 0])


@pytest.mark.parametrize("activation", MX)
def test_subnormals_beside_large_values(activation):
    x = np.array([[3e38, 1e-44, -1e-39, -np.finfo(np.float32).max]], np.float32)
    parts = decompose_as(x, plan_of(x), activation)
    assert parts.codes[0, 0, 1:3].tolist() == [0, 0]
    assert np.isfinite(parts.scales).all()
    assert np.abs(parts.values(4) / x - 1)[0, [0, 3]].max() <= 1 / 7  # one pass: half a step of 3 or 4


@pytest.mark.parametrize("activation", MX)
@pytest.mark.parametrize("draw", DRAWS)
def test_the_scale_of_least_error_is_no_worse(activation, draw):
    x = DRAWS[draw](np.random.default_rng(0), (200, 2048)).astype(np.float32)
    assert relative_l2(x, activation, scale_rule="least_error") <= relative_l2(x, activation)


def test_int8_is_the_reference():
    x = np.random.default_rng(0).standard_normal((3, 70)).astype(np.float32)
    ours, theirs = decompose_as(x, plan_of(x), ActivationFormat.INT8), decompose(x, plan_of(x))
    np.testing.assert_array_equal(ours.codes, theirs.codes)
    np.testing.assert_array_equal(ours.scales, theirs.scales)


def test_labels():
    assert [a.label for a in ActivationFormat] == ["int8", "mxfp4x2", "mxfp4", "mxfp4x2-e2m1", "mxfp4-e2m1", "mxfp8"]
    assert [ActivationFormat.named(a.label) for a in ActivationFormat] == list(ActivationFormat)


@pytest.mark.parametrize("form", MX_FORMATS.values(), ids=[f.label for f in MX_FORMATS])
def test_error_bound_holds_and_is_nearly_reached(form):
    x = np.random.default_rng(5).standard_normal((2**14, 32)).astype(np.float32)
    decomposed = mx.decompose_mx(x, Plan(32, 4, 32, 1, False), form)
    error = np.abs(decomposed.values(32) - x).max(axis=1) / np.abs(x).max(axis=1)
    assert 0.6 * form.error_bound < error.max() <= form.error_bound
