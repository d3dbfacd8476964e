"""Intervals against scipy's own, against numbers by hand, and against their promise: coverage."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from gcpo_repro import UserError
from gcpo_repro.evaluation.stats import mean_interval, paired_gain, pass_at_1


@pytest.mark.parametrize("n", [2, 3, 10, 500])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_interval_is_scipys(n, level):
    x = np.random.default_rng(n).normal(3, 2, n)
    found = mean_interval(x, level)
    low, high = scipy_stats.t.interval(level, n - 1, loc=x.mean(), scale=scipy_stats.sem(x))
    assert (found.mean, found.low, found.high) == pytest.approx((x.mean(), low, high), rel=1e-12)
    assert (found.n, found.level) == (n, level)


def test_interval_by_hand():
    """1, 2, 6: mean 3, variance (4 + 1 + 9)/2 = 7, standard error sqrt(7/3); t(2 d.f., .975) = 4.302653."""
    found = mean_interval([1, 2, 6])
    half = 4.302653 * math.sqrt(7 / 3)
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half), rel=1e-6)


@pytest.mark.parametrize("n, level", [(3, 0.9), (3, 0.5), (12, 0.95)])
def test_interval_covers_as_often_as_it_says(n, level):
    rng, trials = np.random.default_rng(7), 2000
    covered = 0
    for _ in range(trials):
        interval = mean_interval(rng.normal(1.0, 0.3, n), level)
        covered += interval.low <= 1.0 <= interval.high
    standard_error = math.sqrt(level * (1 - level) / trials)
    assert abs(covered / trials - level) < 3.5 * standard_error


def test_a_single_value_has_no_interval_and_equal_values_an_empty_one():
    one = mean_interval([0.4])
    assert (one.mean, one.low, one.high, one.n) == (0.4, -math.inf, math.inf, 1)
    same = mean_interval([0.4, 0.4, 0.4])
    assert (same.low, same.high) == pytest.approx((0.4, 0.4), abs=1e-12)


@pytest.mark.parametrize(
    "values, level, message",
    [
        ([], 0.95, r"values: .* got shape \(0,\)"),
        ([1.0, float("nan")], 0.95, "values: .* with 1 that are not"),
        ([1.0, float("inf"), -float("inf")], 0.95, "with 2 that are not"),
        ([[1.0, 2.0]], 0.95, r"flat list .* shape \(1, 2\)"),
        ([1.0, 2.0], 1.0, "level: 1.0"),
        ([1.0, 2.0], 0.0, "level: 0.0"),
        ([1.0, 2.0], 95, "level: 95"),
        ([1.0, 2.0], float("nan"), "level: nan"),
    ],
)
def test_interval_refuses(values, level, message):
    with pytest.raises(UserError, match=message):
        mean_interval(values, level)


def test_pass_at_1_is_the_mean_over_questions():
    found = pass_at_1([0, 1, 4, 3], samples=4)
    expected = mean_interval([0, 0.25, 1, 0.75])
    assert (found.mean, found.low, found.high, found.n) == (0.5, expected.low, expected.high, 4)


def test_pass_at_1_averages_seeds_first():
    """Two seeds share their questions: three values, not six. (0 + 4)/8, (1 + 1)/8, (4 + 2)/8."""
    found = pass_at_1([[0, 1, 4], [4, 1, 2]], samples=4)
    expected = mean_interval([0.5, 0.25, 0.75])
    assert found == expected and found.n == 3


def test_paired_gain_by_hand():
    """Differences of 4 answers each: 1, 0, 1, 1 -> .25, 0, .25, .25: mean .1875, variance .046875/3 = .015625,
    standard error .125/2 = .0625; t(3 d.f., .975) = 3.1824463.
    """
    found = paired_gain(np.array([1, 2, 3, 0]), np.array([2, 2, 4, 1]), samples=4)
    assert (found.mean, found.n) == (0.1875, 4)
    assert (found.low, found.high) == pytest.approx((0.1875 - 3.1824463 * 0.0625, 0.1875 + 3.1824463 * 0.0625), abs=1e-7)


def test_paired_gain_of_seeds_is_that_of_their_means_and_has_a_sign():
    rng = np.random.default_rng(0)
    before, after = rng.integers(0, 5, (3, 20)), rng.integers(0, 5, (3, 20))
    gain = paired_gain(before, after, 4, level=0.9)
    expected = mean_interval((after - before).mean(0) / 4, 0.9)
    assert (gain.mean, gain.low, gain.high) == pytest.approx((expected.mean, expected.low, expected.high), abs=1e-12)
    back = paired_gain(after, before, 4, level=0.9)
    assert (back.mean, back.low, back.high) == pytest.approx((-gain.mean, -gain.high, -gain.low))


def test_pairing_is_narrower_where_questions_differ_in_difficulty():
    """The same difficulty before and after cancels: that is why the gain is paired."""
    rng = np.random.default_rng(1)
    difficulty = rng.uniform(0, 0.8, 200)
    before, after = rng.binomial(8, difficulty), rng.binomial(8, difficulty + 0.1)
    paired = paired_gain(before, after, 8)
    alone = [pass_at_1(counts, 8) for counts in (before, after)]
    unpaired = math.hypot(*(interval.high - interval.mean for interval in alone))
    assert paired.high - paired.mean < 0.7 * unpaired


def test_paired_gain_needs_the_same_questions():
    with pytest.raises(UserError, match="before, after: 3 and 2 questions"):
        paired_gain(np.array([1, 2, 3]), np.array([1, 2]), 4)
