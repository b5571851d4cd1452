"""Laws of estimates."""

import math

import numpy as np
import pytest

from afa.evaluation.statistics import difference, estimate


def test_interval_of_normal_values_is_the_textbook_one():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = estimate(values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean()) and found.n == 400
    assert found.low == pytest.approx(values.mean() - half, abs=0.02) and found.high == pytest.approx(values.mean() + half, abs=0.02)


def test_a_constant_shift_is_certain_when_paired():
    values = np.random.default_rng(1).normal(size=50)
    found = difference(values + 0.25, values)
    assert (found.low, found.high) == pytest.approx((0.25, 0.25)) and found.excludes_zero


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(2)
    hard = rng.normal(size=200)
    one, other = hard + rng.normal(0.1, 0.05, 200), hard
    paired, unpaired = difference(one, other), estimate(one)
    assert paired.high - paired.low < 0.2 * (unpaired.high - unpaired.low)


def test_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        found = estimate(rng.exponential(1, 60))
        hits += found.low <= 1 <= found.high
    assert 170 <= hits <= 199


@pytest.mark.parametrize("values", [np.zeros(0), np.zeros((2, 2))])
def test_what_is_no_value_per_item_is_refused(values):
    with pytest.raises(ValueError, match="one value per item"):
        estimate(values)


def test_values_of_different_items_do_not_pair():
    with pytest.raises(ValueError, match=r"\(3,\) and \(4,\)"):
        difference(np.zeros(3), np.zeros(4))
