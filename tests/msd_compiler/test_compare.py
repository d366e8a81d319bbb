from __future__ import annotations

import numpy as np
import pytest

from msd_compiler.compare import argmax_agreement, max_abs, relative_l2

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("found", "oracle", "expected"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0),
        ([3.0, 4.5], [3.0, 4.0], 0.1),
        ([0.5, 0.0], [0.0, 0.0], 0.5),
        ([NAN, 4.0], [NAN, 4.0], 0),
        ([INF, 4.0], [INF, 4.0], 0),
        ([NAN, 4.0], [3.0, 4.0], INF),
        ([3.0, 4.0], [3.0, NAN], INF),
        ([-INF, 4.0], [INF, 4.0], INF),
        ([3.0], [3.0, 4.0], INF),
        ([], [], 0),
    ],
)
def test_relative_l2(found, oracle, expected):
    assert relative_l2(np.array(found), np.array(oracle)) == pytest.approx(expected)


def test_max_abs_of_codes_does_not_wrap():
    assert max_abs(np.array([-128], np.int8), np.array([127], np.int8)) == 255


def test_argmax_disagreements_come_with_their_margin_largest_first():
    oracle = np.array([[[1.0, 2.0, 0.0], [5.0, 1.0, 4.5]], [[0.0, 1.0, 3.0], [2.0, 1.0, 0.0]]])
    found = oracle.copy()
    found[0, 1] = [4.0, 1.0, 4.6]
    found[1, 0] = [0.0, 3.0, 2.0]
    agreement = argmax_agreement(found, oracle)
    assert agreement.equal == 0.5
    assert agreement.positions == 4
    assert [(d.index, d.oracle, d.found, d.margin) for d in agreement.disagreements] == [
        ([1, 0], 2, 1, 2.0),
        ([0, 1], 0, 2, 0.5),
    ]
