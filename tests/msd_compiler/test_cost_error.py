"""The law that predicts a layer's error, against METHOD sections 2, 5 and 9 and against decompositions of random values."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msd_compiler.runtime_ops.matmul.layout import Plan
from msd_compiler.runtime_ops.matmul.reference import decompose

from msd_compiler.cost import error as law
from msd_compiler.cost.error import Activation, crest, relative_l2

PLAIN = Activation(outlier=1)


@pytest.mark.parametrize(("terms", "expected"), [(1, 0.0088), (2, 3.5e-5)])
def test_gaussian_rows(terms, expected):
    assert relative_l2(terms, 4096, 4096, PLAIN) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("terms", "expected"), [(1, 0.0089), (2, 3.5e-5)])
def test_by_crest(terms, expected):
    measured = Activation(crest_of_group={4096: 3.9})
    assert relative_l2(terms, 4096, 4096, measured) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("outlier", "group", "expected"),
    [
        (1000, 32, 5.2e-5),
        (1000, 128, 1.03e-4),
        (1000, 512, 2.1e-4),
        (1000, 4096, 5.7e-4),
        (60, 32, 3.6e-5),
        (60, 128, 6.9e-5),
        (60, 512, 1.4e-4),
        (60, 4096, 3.8e-4),
    ],
)
def test_one_channel_larger_than_the_rest(outlier, group, expected):
    assert relative_l2(2, 4096, group, Activation(outlier=outlier)) == pytest.approx(expected, rel=0.06)


def relative_error_of_product(x: np.ndarray, rounded: np.ndarray, rng: np.random.Generator) -> float:
    w = rng.integers(-127, 128, (x.shape[1], 64)).astype(np.float64)
    return float(np.linalg.norm((rounded - x) @ w) / np.linalg.norm(x.astype(np.float64) @ w))


@pytest.mark.parametrize("terms", [1, 2, 3])
@pytest.mark.parametrize(("group", "per_row"), [(32, False), (128, False), (128, True)])
@pytest.mark.parametrize("outlier", [1, 30, 1000])
def test_decomposed_products_are_as_far_off_as_predicted(terms, group, per_row, outlier):
    """64 rows average the luck of each. An outlier is as large in each row, or its own spread would be what is seen."""
    rng = np.random.default_rng(terms * group)
    x = rng.standard_normal((64, 1024)).astype(np.float32)
    if outlier > 1:
        x[:, 17] = outlier * rng.choice([-1, 1], 64)
    parts = decompose(x, Plan(1024, 8, group, terms, per_row))
    actual = relative_error_of_product(x, parts.values(1024), rng)
    predicted = relative_l2(terms, 1024, 1024 if per_row else group, Activation(outlier=outlier))
    if terms == 1 and outlier == 1000:  # a step is 7.9: what is beside the outlier becomes 0, and is off by itself only
        assert actual < predicted
    else:
        assert actual == pytest.approx(predicted, rel=0.1)


def test_a_weight_dequantized_to_bf16():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((32, 512))
    w = rng.integers(-127, 128, (512, 512)) * rng.uniform(0.01, 1, 512)
    rounded = w.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
    actual = np.linalg.norm(x @ (rounded - w)) / np.linalg.norm(x @ w)
    assert actual == pytest.approx(law.BF16_ERROR, rel=0.1)


def test_two_terms_beat_bf16_up_to_a_crest_of_183():
    for factor, is_better in ((180, True), (186, False)):
        two_terms = relative_l2(2, 4096, 4096, Activation(crest_of_group={4096: factor}))
        assert (two_terms < law.BF16_ERROR) == is_better


@given(group=st.integers(1, 2**20))
def test_largest_of_gaussian_has_its_median(group):
    """The chance that all of them lie within is a half."""
    within = math.erf(law.largest_of_gaussian(group) / math.sqrt(2))
    assert within**group == pytest.approx(0.5, abs=1e-3)


@given(k=st.integers(2, 16384), outlier=st.floats(1, 1e4), data=st.data())
def test_finer_groups_are_never_worse(k, outlier, data):
    fine = data.draw(st.integers(1, k))
    coarse = data.draw(st.integers(fine, k))
    activation = Activation(outlier=outlier)
    assert crest(k, fine, activation) <= crest(k, coarse, activation) * (1 + 1e-9)


@given(k=st.integers(1, 16384), group=st.integers(1, 16384))
def test_a_term_more_is_254_times_as_accurate(k, group):
    one, two, three = (relative_l2(terms, k, group) for terms in (1, 2, 3))
    assert one / two == pytest.approx(254)
    assert two / three == pytest.approx(254)


def test_measured_groups_win_and_others_are_guessed():
    measured = Activation(crest_of_group={128: 9.0})
    assert crest(4096, 128, measured) == 9.0
    assert crest(4096, 64, measured) == crest(4096, 64)
