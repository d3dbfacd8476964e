"""Paired comparisons against t intervals, scipy, statsmodels, brute force, and by simulation."""

import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats

from gcpo_repro import UserError
from gcpo_repro.evaluation.paired import holm, paired_bootstrap, permutation_test
from gcpo_repro.evaluation.stats import paired_gain


def world(rng, n, seeds, k, gain=0.0, spread=0.0, p=0.45, rho=0.6):
    """Counts of two methods on the same problems; seeds shift a problem's rate by about `spread`, in proportion to t(1 − t)."""
    s = 1 / rho - 1
    t = rng.beta(p * s, (1 - p) * s, n)
    rates = [t + 4 * t * (1 - t) * (g + rng.normal(0, spread, (seeds, 1))) for g in (0, gain)]
    return [rng.binomial(k, np.clip(rate, 0, 1)) for rate in rates]


def true_gain(gain, p=0.45, rho=0.6):
    return 4 * gain * p * (1 - p) * (1 - rho)  # E[t(1 − t)] of the Beta


def test_bootstrap_over_many_problems_is_the_t_interval():
    before, after = world(np.random.default_rng(0), 400, 1, 8, gain=0.1)
    found, expected = paired_bootstrap(before, after, 8, draws=20_000), paired_gain(before, after, 8)
    assert found.mean == pytest.approx(expected.mean) and found.se == pytest.approx(expected.se, rel=0.02)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.1 * expected.se)


def test_bootstrap_over_seeds_is_welchs_interval():
    """Three against five trainings on two problems: scipy's unpaired interval with Welch's degrees of freedom."""
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 1001, (3, 2)), rng.integers(0, 1001, (5, 2))
    found = paired_bootstrap(a, b, 1000, over="seeds", draws=40_000)
    expected = scipy_stats.ttest_ind(b.mean(1) / 1000, a.mean(1) / 1000, equal_var=False)
    assert found.mean == pytest.approx((b.mean() - a.mean()) / 1000)
    assert found.se == pytest.approx(found.mean / expected.statistic, rel=0.02)
    interval = expected.confidence_interval()
    assert found.high - found.low == pytest.approx(interval.high - interval.low, rel=0.12)  # the draws are lumpy, not normal


def test_bootstrap_draws_from_its_seed_alone():
    before, after = world(np.random.default_rng(2), 30, 3, 4, 0.1, 0.05)
    state = np.random.get_state()[1].copy()
    one, two = (paired_bootstrap(before, after, 4, over="both", seed=5) for _ in range(2))
    assert one == two != paired_bootstrap(before, after, 4, over="both", seed=6)
    assert (np.random.get_state()[1] == state).all()


def test_bootstrap_changes_sign_with_the_order():
    before, after = world(np.random.default_rng(3), 40, 2, 4, 0.1, 0.05)
    forth, back = paired_bootstrap(before, after, 4, over="both"), paired_bootstrap(after, before, 4, over="both")
    assert (back.mean, back.low, back.high) == pytest.approx((-forth.mean, -forth.high, -forth.low), abs=0.2 * forth.se)


@pytest.mark.parametrize("over, seeds, spread", [("problems", 1, 0.0), ("both", 3, 0.0), ("both", 5, 0.1)])
def test_bootstrap_covers(over, seeds, spread, trials=400):
    rng, hits = np.random.default_rng(4), 0
    for trial in range(trials):
        before, after = world(rng, 30, seeds, 4, 0.1, spread)
        found = paired_bootstrap(before, after, 4, over=over, draws=300, seed=trial)
        hits += found.low <= true_gain(0.1) <= found.high
    assert abs(hits / trials - 0.95) < 3.5 * np.sqrt(0.95 * 0.05 / trials)


@pytest.mark.slow
@pytest.mark.parametrize("n, k", [(30, 1), (30, 8), (40, 4), (272, 4), (500, 1)])
def test_bootstrap_over_problems_covers_93_to_97_per_cent(n, k):
    rng, hits = np.random.default_rng(n + k), 0
    for trial in range(4000):
        before, after = world(rng, n, 1, k, 0.1)
        found = paired_bootstrap(before, after, k, draws=400, seed=trial)
        hits += found.low <= true_gain(0.1) <= found.high
    assert 0.93 <= hits / 4000 <= 0.97


def test_seed_spread_counts_only_where_it_is_asked_for():
    before, after = world(np.random.default_rng(5), 200, 4, 16, 0.0, 0.15)
    problems, both, seeds = (paired_bootstrap(before, after, 16, over=over) for over in ("problems", "both", "seeds"))
    assert both.se > 1.5 * problems.se and both.se == pytest.approx(np.hypot(problems.se, seeds.se), rel=0.1)


def test_sampling_noise_is_not_counted_twice():
    """Trainings that differ by nothing: drawing them too widens little (noise in both would be a factor of about √2)."""
    rng = np.random.default_rng(8)
    worlds = [world(rng, 60, 3, 1, rho=0.2) for _ in range(100)]
    ratios = [paired_bootstrap(*w, 1, over="both", draws=500).se / paired_bootstrap(*w, 1, draws=500).se for w in worlds]
    assert 1 <= np.mean(ratios) < 1.2


def test_permutation_over_problems_is_brute_force():
    before, after = np.array([0, 1, 2, 2, 0, 3, 1]), np.array([2, 1, 4, 1, 3, 4, 4])
    difference = after - before
    sums = [sum(s * d for s, d in zip(signs, difference, strict=True)) for signs in itertools.product((-1, 1), repeat=7)]
    expected = np.mean([abs(total) >= difference.sum() for total in sums])
    assert permutation_test(before, after, 4) == pytest.approx(expected)


def test_permutation_over_seeds_is_brute_force():
    a, b = np.array([[3, 4], [5, 4], [2, 2]]), np.array([[7, 7], [6, 8], [9, 5]])
    rows = np.r_[a, b].sum(1)
    gaps = [2 * rows[list(chosen)].sum() - rows.sum() for chosen in itertools.combinations(range(6), 3)]
    expected = np.mean([abs(gap) >= abs(b.sum() - a.sum()) for gap in gaps])
    assert permutation_test(a, b, 10, over="seeds") == pytest.approx(expected) == 0.1


def test_permutation_keeps_its_level_and_finds_what_is_there():
    rng = np.random.default_rng(6)
    null = [permutation_test(*world(rng, 30, 1, 64), 64, permutations=199, seed=i) for i in range(400)]
    assert np.mean(np.array(null) <= 0.05) == pytest.approx(0.05, abs=3.5 * np.sqrt(0.05 * 0.95 / 400))
    assert np.mean(null) == pytest.approx(0.5, abs=0.06)  # few ties among counts of 64: p is uniform
    assert permutation_test(*world(rng, 300, 1, 8, gain=0.2), 8) <= 1e-3


def test_permutation_of_equal_counts_and_of_unequal_numbers_of_seeds():
    assert permutation_test(np.array([1, 2, 3]), np.array([1, 2, 3]), 4) == 1
    assert permutation_test(np.array([[1, 2, 3]] * 2), np.array([[1, 2, 3]] * 3), 4) == 1


def test_holm_by_hand():
    """.01 · 4, .02 · 3 = .06, .03 · 2 = .06, .5: in order .04, .06, .06, .5."""
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1, 1]) and len(holm([])) == 0


def test_holm_is_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = np.random.default_rng(7).beta(0.3, 2, 18)
    assert holm(p) == pytest.approx(multitest.multipletests(p, method="holm")[1])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: paired_bootstrap([1, 2], [1, 2, 3], 4), "first, second: 2 and 3 questions"),
        (lambda: paired_bootstrap([1, 2], [1, 5], 4), "second: counts from 1 to 5 of 4"),
        (lambda: paired_bootstrap([1, 2], [1, 2], 4, over="seeds"), "over: 'seeds' draws from 1"),
        (lambda: paired_bootstrap([1], [2], 4), "over: 'problems' draws from 1"),
        (lambda: paired_bootstrap([1, 2], [1, 2], 4, over="all"), "over: 'all'; choose"),
        (lambda: paired_bootstrap([1, 2], [1, 2], 4, level=95), "level: 95"),
        (lambda: permutation_test([1, 2], [1, 2], 4, over="both"), "over: 'both'; choose"),
        (lambda: permutation_test([1, 2], [1, 2], 4, over="seeds"), "with 1 and 1"),
        (lambda: holm([0.1, 1.2]), "p_values: .*1.2"),
        (lambda: holm([0.1, float("nan")]), "p_values"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(UserError, match=message):
        call()
