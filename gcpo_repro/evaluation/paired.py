"""Differences between two methods on the same problems: bootstrap, permutation test, correction for many comparisons."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats as scipy_stats

from ..errors import UserError
from .stats import Interval, check_level, check_pair

OVER = ("problems", "seeds", "both")


def paired_bootstrap(
    first: np.ndarray, second: np.ndarray, samples: int, level: float = 0.95, over: str = "problems", draws: int = 10_000,
    seed: int = 0,
) -> Interval:  # fmt: skip
    """Bootstrap interval of the gain in pass@1, second − first, on the same problems.

    With x_sj the share right of training seed s on problem j, gain = mean x² − mean x¹. "problems" draws the columns of the
    difference of the seeds' means, "seeds" draws each method's rows, "both" draws both, as independent additive effects, with
    the noise that a seed's mean shares with the columns taken out (it would count twice). A plain percentile bootstrap is
    too narrow for few units: effects are scaled by √(m/(m − 1)), and the draws stretched by t/z with the degrees of freedom
    of Satterthwaite.

    Args:
        first, second: right answers among `samples`, (questions,) or (seeds, questions); the seeds need not be equally many.
        samples: answers per question and seed.
        level: coverage.
        over: what is drawn anew. "problems": these trainings, other problems; "seeds": other trainings, these problems.
        draws: of the bootstrap. seed: of its generator.

    Returns:
        The interval; `n` counts questions, `se` is the spread of the draws.

    Raises:
        UserError: other questions, counts outside 0 … samples, fewer than two problems or seeds to draw from.
    """
    a, b = (counts / samples for counts in check_pair("first, second", first, second, samples))
    check_level(level)
    if over not in OVER:
        raise UserError(f"over: {over!r}; choose {', '.join(OVER)}")
    effects = [b.mean(0) - a.mean(0)] if over != "seeds" else []
    if over != "problems":
        effects += [-_seed_effects(a, over == "both"), _seed_effects(b, over == "both")]
    if min(map(len, effects)) < 2:
        raise UserError(f"over: {over!r} draws from {min(map(len, effects))}; an interval needs at least two of each kind")
    rng = np.random.default_rng(seed)
    moved = np.zeros(draws)
    for effect in effects:
        m, centred = len(effect), effect - effect.mean()
        blocks = [min(1000, draws - done) for done in range(0, draws, 1000)]  # little memory for many problems
        moved += np.sqrt(m / (m - 1)) * np.concatenate([centred[rng.integers(m, size=(size, m))].mean(1) for size in blocks])
    variances = np.array([effect.var(ddof=1) / len(effect) for effect in effects])
    each = np.array([len(effect) - 1 for effect in effects])
    freedom = variances.sum() ** 2 / (variances**2 / each).sum() if variances.any() else np.inf
    top = (1 + level) / 2
    stretch = scipy_stats.t.ppf(top, freedom) / scipy_stats.norm.ppf(top)
    gain = float(b.mean() - a.mean())
    low, high = gain + stretch * np.quantile(moved, [1 - top, top])
    return Interval(gain, float(low), float(high), a.shape[1], level, float(moved.std()))


def _seed_effects(x: np.ndarray, both: bool) -> np.ndarray:
    """Means of the seeds; if problems are drawn too, shrunk to the variance that the noise within a mean leaves for seeds."""
    means = x.mean(1)
    if not both or len(x) < 2 or x.shape[1] < 2:
        return means
    residual = x - means[:, None] - x.mean(0) + x.mean()
    noise = (residual**2).sum() / (len(x) - 1) / (x.shape[1] - 1) / x.shape[1]
    variance = means.var(ddof=1)
    return (means - means.mean()) * np.sqrt(max(0.0, 1 - noise / variance) if variance else 0.0)


def permutation_test(
    first: np.ndarray, second: np.ndarray, samples: int, over: str = "problems", permutations: int = 9_999, seed: int = 0
) -> float:
    """Two-sided p value of "the methods are exchangeable", for the gain in pass@1 on the same problems.

    Args:
        first, second, samples: as in `paired_bootstrap`.
        over: "problems" changes the two methods' counts on each problem (sign flips); "seeds" changes whole trainings
            (3 against 3 seeds cannot go below .1).
        permutations: random ones, the observed one added; all are counted where there are no more than that.
        seed: of the generator.

    Raises:
        UserError: other questions, counts outside 0 … samples, an unknown choice.
    """
    a, b = check_pair("first, second", first, second, samples)
    rng = np.random.default_rng(seed)
    settings = {"n_resamples": permutations, "batch": 1000, "rng": rng, "axis": -1}
    if over == "seeds":
        if min(len(a), len(b)) < 2:
            raise UserError(f"over: 'seeds' with {len(a)} and {len(b)}; exchanging trainings needs at least two of each")
        return float(scipy_stats.permutation_test((a.sum(1), b.sum(1)), _difference, **settings).pvalue)
    if over != "problems":
        raise UserError(f"over: {over!r}; choose problems or seeds")
    difference = b.sum(0) * len(a) - a.sum(0) * len(b)  # whole numbers: equal sums are recognised as equal
    difference = difference[difference != 0]
    if not len(difference):
        return 1.0
    return float(scipy_stats.permutation_test((difference,), np.sum, permutation_type="samples", **settings).pvalue)


def _difference(first: np.ndarray, second: np.ndarray, axis: int) -> np.ndarray:
    return second.mean(axis) - first.mean(axis)


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Holm's adjusted p values: reject where they are at most α, and the chance of any false rejection is at most α.

    Args:
        p_values: (m,) of m tests, dependent or not.

    Raises:
        UserError: values outside [0, 1].
    """
    p = np.asarray(p_values, dtype=float)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise UserError(f"p_values: {p_values!r}; give a flat list of numbers within 0 … 1")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted
