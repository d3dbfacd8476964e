"""Intervals against scipy's own, against numbers by hand, and against their promise: coverage."""

import collections
import itertools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats
from scipy.special import betaln

from gcpo_repro import UserError
from gcpo_repro.evaluation.stats import maj_at_k, mean_interval, paired_gain, pass_at_1, pass_at_k, pass_at_k_values


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


def test_standard_errors_by_hand():
    """2 of 4, 4 of 4, 1 of 4. Other problems: sd of .5, 1, .25 over √3. The same: p̂(1 − p̂)/3 is 1/12, 0, 1/16; √sum / 3."""
    resampled, same = (pass_at_1([2, 4, 1], 4, problems=kind) for kind in ("resampled", "same"))
    assert resampled.se == pytest.approx(np.std([0.5, 1, 0.25], ddof=1) / math.sqrt(3), rel=1e-12)
    assert same.se == pytest.approx(math.sqrt(1 / 12 + 1 / 16) / 3, rel=1e-12)
    assert resampled.mean == same.mean == pytest.approx(1.75 / 3)


def test_sampling_noise_is_that_of_drawing_again():
    """The squared standard error on the same problems is unbiased for the variance of avg@k, problem by problem."""
    rng, t, k = np.random.default_rng(3), np.random.default_rng(2).beta(0.3, 0.4, 25), 6
    counts = rng.binomial(k, t, (4000, 25))
    found = np.mean([pass_at_1(c, k, problems="same").se ** 2 for c in counts[:1000]])
    truth = (t * (1 - t)).sum() / k / 25**2
    assert found == pytest.approx(truth, rel=0.02)
    assert (counts.mean(1) / k).var() == pytest.approx(truth, rel=0.08)


def test_several_seeds_on_the_same_problems_are_each_their_own_answers():
    rng = np.random.default_rng(4)
    counts = rng.integers(0, 9, (3, 10))
    parts = [pass_at_1(c, 8, problems="same").se ** 2 for c in counts]
    assert pass_at_1(counts, 8, problems="same").se ** 2 == pytest.approx(sum(parts) / 9)


@pytest.mark.parametrize("c, n", [(0, 30), (1, 30), (13, 40), (164, 164), (300, 1319)])
def test_one_answer_each_is_the_mid_p_interval(c, n):
    """By the Clopper–Pearson interval's own definition as beta quantiles: mid-P lies between that of c and those of c ± 1."""
    found = pass_at_1([1] * c + [0] * (n - c), 1, method="wilson")
    exact = scipy_stats.binomtest(c, n).proportion_ci(method="exact")
    assert exact.low <= found.low <= found.mean <= found.high <= exact.high
    if c > 0:
        upper = [scipy_stats.binom.sf(k, n, found.low) for k in (c - 1, c)]  # P(X ≥ c), P(X > c)
        assert sum(upper) / 2 == pytest.approx(0.025, abs=1e-9)
    if c < n:
        lower = [scipy_stats.binom.cdf(k, n, found.high) for k in (c, c - 1)]
        assert sum(lower) / 2 == pytest.approx(0.025, abs=1e-9)


def test_pass_at_all_samples_is_binomial_too():
    counts = [0, 4, 1, 0, 2, 0, 0, 3]
    found, single = pass_at_k(counts, 4, 4, method="wilson"), pass_at_1([int(c > 0) for c in counts], 1, method="wilson")
    assert (found.mean, found.low, found.high) == pytest.approx((single.mean, single.low, single.high))


@pytest.mark.parametrize("problems, freedom", [("resampled", 3), ("same", None)])
def test_wilson_solves_its_equation(problems, freedom):
    """(p̂ − p)² = t² se² · p(1 − p)/(p̂(1 − p̂)) at both ends; Satterthwaite's degrees of freedom by their formula."""
    counts, k = np.array([1, 3, 8, 7]), 8
    found = pass_at_1(counts, k, problems=problems, method="wilson")
    v = counts / k * (1 - counts / k) / (k - 1)
    t = scipy_stats.t.ppf(0.975, freedom or v.sum() ** 2 / (v**2 / (k - 1)).sum())
    for p in (found.low, found.high):
        assert (found.mean - p) ** 2 == pytest.approx(t**2 * found.se**2 * p * (1 - p) / (found.mean * (1 - found.mean)))
    assert found.low < found.mean < found.high


def test_all_right_still_leaves_an_interval():
    """Nothing varies: as many independent answers as problems (others), or as answers (the same problems)."""
    others, same = (pass_at_1([4] * 20, 4, problems=kind, method="wilson") for kind in ("resampled", "same"))
    t = scipy_stats.t.ppf(0.975, [19, 3])
    assert (others.low, same.low) == pytest.approx((20 / (20 + t[0] ** 2), 80 / (80 + t[1] ** 2)))
    assert others.high == same.high == 1


def binomial_coverage(n, probabilities):
    """Exact: for each p the sum over all counts of their probability, where the interval holds p."""
    found = [pass_at_1([1] * c + [0] * (n - c), 1, method="wilson") for c in range(n + 1)]
    low, high = np.array([(i.low, i.high) for i in found]).T
    return [scipy_stats.binom.pmf(np.arange(n + 1), n, p)[(low <= p) & (p <= high)].sum() for p in probabilities]


@pytest.mark.parametrize("n", [30, 40, 164, 272])
def test_exact_coverage_of_binomial_counts(n):
    cells = binomial_coverage(n, np.arange(2, 19) / 20)
    assert 0.93 <= min(cells) and max(cells) <= 0.97
    everywhere = np.array(binomial_coverage(n, np.linspace(0.1, 0.9, 801)))
    assert 0.924 <= everywhere.min() and everywhere.max() <= 0.98 and np.mean(everywhere < 0.93) < 0.01


def covered(n, k, p, problems, trials, seed, rho=0.6):
    """Share of Wilson intervals that hold the truth: the Beta model's p, or the mean of these problems' own rates."""
    rng, s = np.random.default_rng(seed), 1 / rho - 1
    rates = rng.beta(p * s, (1 - p) * s, (trials, n))
    counts = rng.binomial(k, rates)
    truth = rates.mean(1) if problems == "same" else np.full(trials, p)
    found = [pass_at_1(c, k, problems=problems, method="wilson") for c in counts]
    return np.mean([i.low <= t <= i.high for i, t in zip(found, truth, strict=True)])


@pytest.mark.parametrize("n, k, p, problems", [(30, 1, 0.5, "resampled"), (30, 16, 0.3, "resampled"), (40, 4, 0.85, "same")])
def test_benchmarks_intervals_cover(n, k, p, problems):
    assert abs(covered(n, k, p, problems, 1500, 0) - 0.95) < 0.02


RATES = {
    30: (0.15, 0.3, 0.45, 0.5, 0.6, 0.85), 40: (0.3, 0.7, 0.85), 164: (0.65, 0.9),
    272: (0.25, 0.45), 500: (0.8, 0.9), 1319: (0.926,),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("problems, ks", [("resampled", (1, 4, 16, 64)), ("same", (4, 16, 64))])
@pytest.mark.parametrize("n", RATES)
def test_intervals_cover_93_to_97_per_cent(n, problems, ks):
    cells = {(k, p): covered(n, k, p, problems, 4000, 11) for k in ks for p in RATES[n]}
    assert all(0.93 <= found <= 0.97 for found in cells.values()), cells


def test_a_percentile_bootstrap_would_not_do():
    """Why not the usual bootstrap: at 30 problems, 10% and 16 samples it covers about 89%."""
    rng, hits = np.random.default_rng(5), 0
    for counts in rng.binomial(16, rng.beta(0.1 * 2 / 3, 0.9 * 2 / 3, (1000, 30))):
        low, high = np.quantile(rng.choice(counts / 16, (300, 30)).mean(1), [0.025, 0.975])
        hits += low <= 0.1 <= high
    assert hits / 1000 < 0.92


@pytest.mark.parametrize("n, k", [(1, 1), (5, 1), (5, 3), (5, 5), (6, 2)])
def test_pass_at_k_is_the_share_of_choices_with_a_right_answer(n, k):
    for c in range(n + 1):
        answers = [True] * c + [False] * (n - c)
        choices = [any(choice) for choice in itertools.combinations(answers, k)]
        assert pass_at_k([c, c], n, k).mean == pytest.approx(np.mean(choices), abs=1e-12)


def test_pass_at_k_contains_pass_at_1_and_is_stable_for_many_samples():
    counts = np.random.default_rng(6).integers(0, 9, 12)
    for problems in ("resampled", "same"):
        one, other = pass_at_k(counts, 8, 1, problems=problems), pass_at_1(counts, 8, problems=problems)
        assert (one.mean, one.se, one.low) == pytest.approx((other.mean, other.se, other.low))
    expected = 1 - math.comb(990, 100) / math.comb(1000, 100)
    assert pass_at_k_values(np.array([10]), 1000, 100)[0] == pytest.approx(expected, rel=1e-12)


def test_jackknife_of_pass_at_k_leaves_each_sample_out():
    n, k, counts = 7, 3, [0, 2, 5, 7]
    spread = []
    for c in counts:
        answers = np.array([1] * c + [0] * (n - c))
        left = [pass_at_k([np.delete(answers, i).sum()] * 2, n - 1, k).mean for i in range(n)]
        spread.append((n - 1) / n * ((left - np.mean(left)) ** 2).sum())
    assert pass_at_k(counts, n, k, problems="same").se == pytest.approx(math.sqrt(sum(spread)) / 4, rel=1e-9)


def test_pass_at_k_estimates_the_beta_models():
    """1 − E[(1 − t)^k] = 1 − B(a, b + k)/B(a, b); at 30 problems Wilson holds it, t too rarely."""
    rng, a, b, k = np.random.default_rng(8), 0.35, 0.25, 4
    truth = 1 - math.exp(betaln(a, b + k) - betaln(a, b))
    counts = rng.binomial(16, rng.beta(a, b, (1500, 30)))
    found = {m: [pass_at_k(c, 16, k, method=m) for c in counts] for m in ("t", "wilson")}
    assert np.mean([i.mean for i in found["t"]]) == pytest.approx(truth, abs=0.006)
    cover = {m: np.mean([i.low <= truth <= i.high for i in intervals]) for m, intervals in found.items()}
    assert cover["t"] < cover["wilson"] and cover["wilson"] == pytest.approx(0.95, abs=0.02)


def test_pass_at_k_covers_on_the_same_problems():
    rng = np.random.default_rng(10)
    rates = rng.beta(0.2, 0.4667, 40)
    truth = (1 - (1 - rates) ** 4).mean()
    found = [pass_at_k(c, 16, 4, problems="same", method="wilson") for c in rng.binomial(16, rates, (1500, 40))]
    assert np.mean([i.low <= truth <= i.high for i in found]) == pytest.approx(0.95, abs=0.02)


def brute_majority(answers, correct, k):
    credits = []
    for choice in itertools.combinations(range(len(answers)), k):
        votes = collections.Counter(answers[i] for i in choice if answers[i] is not None)
        top = [a for a in votes if votes[a] == max(votes.values())]
        shares = [np.mean([correct[i] for i in range(len(answers)) if answers[i] == a]) for a in top]
        credits.append(np.mean(shares) if top else 0.0)
    return np.mean(credits)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 8])
def test_majority_is_that_of_all_choices(k):
    rng = np.random.default_rng(k)
    answers = [[rng.choice(["a", "b", "c", None], p=[0.4, 0.3, 0.2, 0.1]) for _ in range(8)] for _ in range(5)]
    answers.append([None] * 8)
    correct = [[a == "b" for a in row] for row in answers]
    expected = mean_interval([brute_majority(a, c, k) for a, c in zip(answers, correct, strict=True)])
    found = maj_at_k(answers, correct, k)
    assert (found.mean, found.low, found.se) == pytest.approx((expected.mean, expected.low, expected.se), abs=1e-12)
    wilson = maj_at_k(answers, correct, k, method="wilson")
    assert 0 <= wilson.low <= wilson.mean <= wilson.high <= 1 and wilson.se == found.se


def test_majority_of_one_is_pass_at_1_and_ties_are_shared():
    answers, correct = [["1", "1", "2", None], ["3", "4", "4", "5"]], [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert maj_at_k(answers, correct, 1).mean == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert maj_at_k([["a", "b"]] * 2, [[1, 0]] * 2, 2).mean == 0.5


def test_an_answer_with_two_verdicts_counts_by_its_share():
    assert maj_at_k([["a", "a", "b"]] * 2, [[1, 0, 0]] * 2, 3).mean == 0.5


def test_majority_of_many_answers_is_fast_and_agrees_with_drawing():
    rng = np.random.default_rng(9)
    answers = [int(a) for a in rng.integers(0, 12, 64) ** 2 // 12]
    correct = [a == 0 for a in answers]
    found = maj_at_k([answers] * 2, [correct] * 2, 16).mean
    hits = []
    for _ in range(20_000):
        votes = np.bincount(rng.choice(answers, 16, replace=False))
        hits.append((votes[0] == votes.max()) / (votes == votes.max()).sum())
    assert found == pytest.approx(np.mean(hits), abs=4 * np.std(hits) / math.sqrt(20_000))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: pass_at_1([1, 5], 4), "correct: counts from 1 to 5 of 4 samples"),
        (lambda: pass_at_1([-1, 2], 4), "correct: counts from -1"),
        (lambda: pass_at_1([float("nan"), 2], 4), "correct: counts"),
        (lambda: pass_at_1([], 4), r"correct: shape \(1, 0\)"),
        (lambda: pass_at_1([1, 0], 1, problems="same"), "samples: 1 per problem; .* at least 2"),
        (lambda: pass_at_1([1, 0], 1, problems="other"), "'other'.*choose resampled or same"),
        (lambda: pass_at_1([1, 0], 1, method="z"), "'z'; choose"),
        (lambda: pass_at_k([1, 0], 4, 5), "k: 5 of 4 samples"),
        (lambda: pass_at_k([1, 0], 4, 4, problems="same"), "pass@4 needs at least 5"),
        (lambda: pass_at_k([1, 0], 4, 2, problems="both"), "problems, method: 'both'"),
        (lambda: pass_at_k([0.5, 0], 4, 2), "whole numbers"),
        (lambda: maj_at_k([["a"]], [], 1), "1 and 0 problems"),
        (lambda: maj_at_k([["a", "b"]], [[True]], 1), "problem 0: 2 answers, 1 verdicts"),
        (lambda: maj_at_k([["a", "b"]], [[True, False]], 3), "k = 3"),
        (lambda: paired_gain(np.array([5]), np.array([1]), 4), "before: counts from 5"),
    ],
)
def test_measures_refuse(call, message):
    with pytest.raises(UserError, match=message):
        call()
