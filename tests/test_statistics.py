"""Laws of estimates."""

import math

import numpy as np
import pytest

from afa import stats as statistics
from afa.significance import holm, set_test, sign_flip_tests
from afa.stats import (
    QUANTILES,
    RESAMPLES,
    Estimate,
    difference,
    estimate,
    estimates,
    kept_share,
    prompt_means,
    set_estimate,
    win_rates,
    wins,
)


def test_interval_of_normal_values_is_the_textbook_one():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = estimate(values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean()) and found.n == 400
    assert found.low == pytest.approx(values.mean() - half, abs=0.02) and found.high == pytest.approx(
        values.mean() + half, abs=0.02
    )


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


def test_one_run_is_the_plain_bootstrap_to_the_bit():
    one, other = np.random.default_rng(4).normal(size=(2, 67))
    direct = (one - other)[np.random.default_rng(0).integers(67, size=(RESAMPLES, 67))].mean(1)
    assert [estimate(one - other)] == estimates([(one - other)[None]]) == [difference(one, other)]
    assert (difference(one, other).low, difference(one, other).high) == pytest.approx(np.quantile(direct, QUANTILES), abs=1e-12)


def test_resamples_are_the_same_in_blocks(monkeypatch):
    values = np.random.default_rng(5).normal(size=(1, 61))
    whole = estimates([values])
    monkeypatch.setattr(statistics, "BLOCK", 61 * 7)
    statistics._kept_counts.cache_clear()
    assert estimates([values])[0].low == pytest.approx(whole[0].low, abs=1e-12)
    statistics._kept_counts.cache_clear()


def test_images_of_a_prompt_stay_together():
    values, prompts = np.random.default_rng(6).normal(size=40), np.arange(40)
    copied = prompt_means(np.repeat(values, 4), np.repeat(prompts, 4))
    assert estimate(copied) == estimate(values)  # four equal images of a prompt are no more prompts
    assert prompt_means([1.0, 5.0, 3.0], [7, 2, 7]) == pytest.approx([5.0, 2.0])  # in the order of the prompts' numbers


@pytest.mark.parametrize("apart", [0.0, 0.03, 0.1])
def test_intervals_of_three_runs_cover_the_truth_about_as_often_as_they_say(apart):
    rng = np.random.default_rng(7)
    samples = [
        apart * rng.normal(size=(3, 1)) + 0.2 * rng.normal(size=(1, 40)) + 0.15 * rng.normal(size=(3, 40)) for _ in range(300)
    ]
    hits = sum(found.low <= 0 <= found.high for found in estimates(samples))
    assert 0.90 * 300 <= hits <= 0.99 * 300


def test_runs_that_lie_apart_widen_the_interval_and_equal_runs_do_not():
    prompts = np.random.default_rng(8).normal(size=(1, 50))
    alone, equal, apart = estimates([prompts, np.repeat(prompts, 3, axis=0), prompts + np.array([[-0.3], [0.0], [0.3]])])
    assert (equal.low, equal.high) == pytest.approx((alone.low, alone.high))
    assert apart.high - apart.low > 2 * (alone.high - alone.low) and apart.value == pytest.approx(alone.value)


def test_a_shared_prompt_effect_cancels_in_differences():
    rng = np.random.default_rng(9)
    one, other, hard = rng.normal(size=(3, 30)), rng.normal(size=(3, 30)), 100 * rng.normal(size=(1, 30))
    plain, shared = estimates([one - other, (one + hard) - (other + hard)])
    assert (shared.low, shared.high) == pytest.approx((plain.low, plain.high))


def test_identical_methods_differ_by_exactly_nothing():
    runs = np.random.default_rng(10).normal(size=(3, 30))
    one, other = runs, runs.copy()
    assert estimates([one - other]) == [Estimate(0.0, 0.0, 0.0, 30)]
    assert sign_flip_tests([one - other]) == [1.0] and set_test(np.zeros(3), np.zeros((3, 50))) == 1.0
    assert win_rates([wins(one, other)])[0].value == 0.5


def test_the_order_of_methods_changes_nothing():
    samples = list(np.random.default_rng(11).normal(0.1, 1, size=(5, 3, 20)))
    for compute in (estimates, win_rates):
        forward, backward = compute(samples), compute(samples[::-1])[::-1]
        assert [vars(one) for one in forward] == [pytest.approx(vars(one)) for one in backward]
    assert sign_flip_tests(samples) == pytest.approx(sign_flip_tests(samples[::-1])[::-1])


def test_few_prompts_have_the_sign_flip_p_of_counting():
    assert sign_flip_tests([np.array([[1.0, 2.0, 3.0]])])[0] == 2 / 8  # two of eight sign patterns
    assert sign_flip_tests([np.array([[5.0]])]) == [1.0]  # one prompt decides nothing


def test_five_wins_and_else_ties_are_less_certain_than_the_bootstrap_believes():
    sample = np.zeros((1, 30))
    sample[0, :5] = 1
    assert estimates([sample])[0].excludes_zero
    assert sign_flip_tests([sample])[0] == pytest.approx(2 / 2**5, abs=0.005)


def test_without_a_difference_one_p_in_twenty_is_below_five_per_cent():
    nothing = list(np.random.default_rng(12).standard_t(3, size=(400, 1, 25)))
    assert 0.025 <= np.mean(np.array(sign_flip_tests(nothing)) < 0.05) <= 0.08


def test_set_scores_use_only_the_spread_of_their_replicates():
    shape = np.random.default_rng(13).normal(0, 2, 4000)
    low, high = np.quantile(shape, QUANTILES) - shape.mean()
    found = set_estimate(np.array([30.0]), 37.0 + shape[None], 500)  # resampling makes the distance larger by 7
    assert (found.value, found.n) == (30.0, 500)
    assert (found.low, found.high) == pytest.approx((30 + low, 30 + high))


def test_what_resamples_do_to_two_sets_alike_cancels():
    rng = np.random.default_rng(14)
    shared, own = rng.normal(0, 5, 1000), rng.normal(0, 0.1, 1000)
    values, replicates = np.array([40.0 - 38.0]), (40 + shared + own - (38 + shared))[None]
    assert set_estimate(values, replicates, 100).low > 1.7
    assert set_test(values, replicates) < 1e-4


def test_the_p_of_sets_is_that_of_the_normal_distribution():
    replicates = np.random.default_rng(15).normal(0, 1, (1, 3000))
    assert set_test(np.array([1.96 * replicates.std()]), replicates) == pytest.approx(0.05, abs=0.005)


def test_set_scores_of_runs_that_lie_apart_have_wider_intervals():
    replicates = np.random.default_rng(16).normal(0, 1, 1000)
    alone = set_estimate(np.array([20.0]), 20 + replicates[None], 10)
    apart = set_estimate(np.array([17.0, 20.0, 23.0]), np.array([[17.0], [20.0], [23.0]]) + replicates, 10)
    assert apart.value == alone.value and apart.high - apart.low > 3 * (alone.high - alone.low)


def test_wins_count_ties_as_halves():
    assert wins(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])).tolist() == [0.5, 0.0, 1.0]


@pytest.mark.parametrize("won", [0.0, 1.0])
def test_who_won_no_prompt_or_all_may_still_win_or_lose_the_next(won):
    found = win_rates([np.full((1, 20), won)])[0]
    assert found.value == won and (found.low, found.high)[won == 0] != won and 0 <= found.low <= found.high <= 1


def test_holm_agrees_with_a_case_by_hand():
    # ranked .005 × 4, .01 × 3, .03 × 2, .04 × 1, and none below the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.6]) == [1.0, 1.0] and holm([0.2]) == [0.2] and holm([]) == []


def test_holm_keeps_the_order_and_is_never_below_the_raw_p():
    raw = np.random.default_rng(17).uniform(size=60) ** 3
    corrected = np.array(holm(list(raw)))
    assert (corrected >= raw).all() and (corrected <= 1).all()
    assert (np.diff(corrected[np.argsort(raw)]) >= 0).all()


def test_a_reversed_estimate_is_of_the_reversed_difference():
    one, other = np.random.default_rng(18).normal(size=(2, 30))
    assert vars(difference(one, other).reversed) == pytest.approx(vars(difference(other, one)))


def test_a_share_is_of_a_gain_only():
    """Half of a gain is .5 with an interval; where the whole method gains nothing for certain, there is none."""
    rng = np.random.default_rng(0)
    base, noise = rng.normal(size=(1, 200)), 0.01 * rng.normal(size=(1, 200))
    half = kept_share(base + 0.5 + noise, base, base + 1)
    assert half.value == pytest.approx(0.5, abs=0.01) and half.low < 0.5 < half.high < 0.6
    for lost in (base - 1, base, base + rng.normal(size=(1, 200))):
        assert not np.isfinite(kept_share(base + 0.5, base, lost).low)
