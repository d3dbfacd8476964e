"""Uncertainty of measured numbers: intervals over seeds and over questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats as scipy_stats

from ..errors import UserError


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided interval. `n` counts what was averaged (seeds, questions …)."""

    mean: float
    low: float
    high: float
    n: int
    level: float


def mean_interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Interval:
    """Student's t interval for the mean of independent values.

    Args:
        values: at least one finite number; with a single one the interval is infinite, not empty.
        level: coverage, in (0, 1).

    Raises:
        UserError: no values, a non-finite one, a level outside (0, 1).
    """
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        bad = int(np.sum(~np.isfinite(x)))
        raise UserError(f"values: need a flat list of finite numbers, got shape {x.shape} with {bad} that are not")
    if not 0 < level < 1:
        raise UserError(f"level: {level} must lie between 0 and 1")
    mean = float(x.mean())
    if len(x) == 1:
        return Interval(mean, -np.inf, np.inf, 1, level)
    half = float(scipy_stats.t.ppf((1 + level) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return Interval(mean, mean - half, mean + half, len(x), level)


def pass_at_1(correct: Sequence[Sequence[int]] | np.ndarray, samples: int, level: float = 0.95) -> Interval:
    """pass@1 as avg@k over questions, the questions being the sample: resampling noise and difficulty both count.

    Args:
        correct: (questions,) right answers among `samples`, or (seeds, questions), averaged over seeds first because the
            seeds share their questions.
        samples: answers drawn per question.
        level: coverage.
    """
    counts = np.atleast_2d(np.asarray(correct, dtype=float))
    return mean_interval(counts.mean(0) / samples, level)


def paired_gain(before: np.ndarray, after: np.ndarray, samples: int, level: float = 0.95) -> Interval:
    """Difference of pass@1 on the same questions, (seeds, questions) or (questions,) counts each; after − before."""
    first, second = (np.atleast_2d(np.asarray(c, dtype=float)).mean(0) for c in (before, after))
    if first.shape != second.shape:
        raise UserError(f"before, after: {len(first)} and {len(second)} questions; a paired difference needs the same ones")
    return mean_interval((second - first) / samples, level)
