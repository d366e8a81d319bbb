"""Layout n16k4: what is packed comes back, and lies where the docstring says."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msd_compiler.runtime_ops.matmul import layout

PLANS = st.builds(
    layout.Plan,
    k=st.integers(1, 300),
    bits=st.sampled_from([2, 4, 8]),
    block_size=st.integers(1, layout.LONGEST_GROUP),
    terms=st.integers(1, 3),
    per_row=st.booleans(),
    codebook=st.sampled_from(layout.Codebook),
    activation=st.sampled_from(layout.ActivationFormat),
)


@given(PLANS, st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_codes_round_trip(plan, n, seed):
    codes = np.random.default_rng(seed).integers(0, 2**plan.bits, (plan.k, n)).astype(np.uint8)
    packed = layout.pack_codes(codes, plan)
    assert packed.shape == plan.packed_shape(n)
    np.testing.assert_array_equal(layout.unpack_codes(packed, n, plan), codes)


@given(st.integers(1, 6), st.integers(1, 50))
def test_columns_round_trip(groups, n):
    values = np.arange(groups * n, dtype=np.float32).reshape(groups, n)
    packed = layout.pack_columns(values)
    assert packed.shape == (-(-n // layout.TILE), groups, layout.TILE)
    np.testing.assert_array_equal(layout.unpack_columns(packed, n, groups), values)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 16)])
def test_shared_columns_repeat(shape):
    values = np.full(shape, 7, np.uint8)
    np.testing.assert_array_equal(layout.unpack_columns(values, 20, 3), np.full((3, 20), 7))


@given(PLANS)
def test_plan_is_its_tensor(plan):
    assert layout.Plan.of(plan.tensor()) == plan


def test_codes_of_e2m1_stand_for_its_values():
    values = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    numbers = layout.decode(np.arange(15, dtype=np.uint8), layout.Codebook.E2M1)
    np.testing.assert_array_equal((numbers.astype(np.float64) - layout.E2M1_ZERO) / 2, np.unique(values))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_place_of_a_code(bits):
    plan = layout.Plan(k=70, bits=bits, block_size=40, terms=2, per_row=False)
    k, column = 40 + 27, 16 + 5  # group 1, tile 1
    codes = np.zeros((plan.k, 32), np.uint8)
    codes[k, column] = 3
    packed = layout.pack_codes(codes, plan)
    line, rest = divmod(27, 4 * plan.codes_per_byte)
    u, i = divmod(rest, 4)
    assert packed[1, 1, line, 4 * 5 + i] == 3 << (u * bits)
    assert np.count_nonzero(packed) == 1
