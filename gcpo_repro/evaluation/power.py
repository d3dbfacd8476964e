"""How large a difference between two pass@1 a benchmark can show, under a Beta model of its problems.

Problem i is solved with probability t_i ~ Beta with mean p, and ρ is the share of the variance p(1 − p) of one answer that
lies between the problems: Var t = ρ p(1 − p), that is Beta(p s, (1 − p) s) with s = 1/ρ − 1. Then

    problems resampled    Var(avg@k) = p(1 − p)/n · (ρ + (1 − ρ)/k)
    the same problems     Var(avg@k) = p(1 − p)/n · (1 − ρ)/k

for n problems with k samples each. The spread of training seeds comes on top and is in neither.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
from scipy.stats import norm

from ..errors import UserError
from .stats import PROBLEMS

RHO = 0.6  # assumed; .8 is kinder to small benchmarks on the same problems
SAMPLES = (1, 2, 4, 8, 16, 32, 64)
CURVE = (*SAMPLES, 128, 256, 512, 1024, 2048, 4096)


def variance(p: float, n: int, k: float, problems: str = "resampled", rho: float = RHO) -> float:
    """Var(avg@k), see the module.

    Args:
        p: pass@1 in [0, 1]. n: problems. k: samples per problem, at least 1. rho: in [0, 1].
        problems: "resampled" or "same".

    Raises:
        UserError: a value outside its range.
    """
    if not (0 <= p <= 1 and 0 <= rho <= 1 and n >= 1 and k >= 1) or problems not in PROBLEMS:
        raise UserError(
            f"p {p}, rho {rho}, n {n}, k {k}, problems {problems!r}: need p and rho within 0 … 1, n and k of at least 1, "
            f"problems {' or '.join(PROBLEMS)}"
        )
    between = rho if problems == "resampled" else 0.0
    return p * (1 - p) / n * (between + (1 - rho) / k)


def difference_se(first: float, second: float, n: int, k: float, problems: str = "resampled", rho: float = RHO) -> float:
    """Standard error of second − first, two pass@1 from independent answers.

    With "resampled" each method met its own problems, or problems whose difficulties for the two are unrelated: the most
    pessimistic case. Methods that find the same problems hard come close to "same".
    """
    return math.sqrt(sum(variance(p, n, k, problems, rho) for p in (first, second)))


def samples_needed(first: float, second: float, n: int, problems: str = "same", rho: float = RHO, multiple: float = 2.0) -> float:
    """Fewest samples per problem for which |second − first| ≥ multiple · standard error; infinite if none suffice.

    Args:
        first, second: pass@1 of the two. n, problems, rho: see `variance`.
        multiple: standard errors to be reached. 2 is a bare detection, found half of the time; `multiple_for` gives the one
            for a wanted power.
    """
    shared = difference_se(first, second, n, math.inf, problems, rho) ** 2
    return fewest_samples(second - first, shared, difference_se(first, second, n, 1, problems, rho) ** 2, multiple)


def fewest_samples(gain: float, shared: float, single: float, multiple: float = 2.0) -> float:
    """Fewest k for which |gain| ≥ multiple · √(shared + (single − shared)/k); infinite if none suffice.

    Args:
        shared: variance of the gain that samples do not lessen. single: variance at k = 1.
    """
    room = (gain / multiple) ** 2 - shared
    if room <= 1e-12 * shared:  # equal but for rounding is not enough either
        return math.inf
    return max(1, math.ceil((single - shared) / room * (1 - 1e-12)))  # not one more for a rounding error


def multiple_for(power: float, level: float = 0.95) -> float:
    """Standard errors that a difference must measure to be significant at `level` (two-sided) with chance `power`."""
    if not (0 < power < 1 and 0 < level < 1):
        raise UserError(f"power {power}, level {level}: both must lie between 0 and 1")
    return float(norm.ppf((1 + level) / 2) + norm.ppf(power))


def power(first: float, second: float, n: int, k: float, problems: str = "same", rho: float = RHO, level: float = 0.95) -> float:
    """Chance that the difference comes out significant at `level`, two-sided, in the direction it has."""
    se = difference_se(first, second, n, k, problems, rho)
    z = norm.ppf((1 + level) / 2)
    return float(norm.cdf(abs(second - first) / se - z)) if se else float(first != second)


def power_curves(
    benchmarks: Mapping[str, tuple[int, float]], differences: Sequence[float] = (0.005, 0.01, 0.02, 0.05),
    samples: Sequence[int] = CURVE, problems: Sequence[str] = PROBLEMS,
    rho: float = RHO, level: float = 0.95, wanted: float = 0.8,
) -> pd.DataFrame:  # fmt: skip
    """How many samples would it take? Power against samples per problem, one row for each combination.

    Args:
        benchmarks: {name: (problems, pass@1 of the first method)}.
        differences: gains of the second method, in [0, 1].
        samples: k. problems, rho: see `variance`.
        level: of the test. wanted: power that the column "needed" stands for.

    Returns:
        benchmark, n, p, difference, problems, rho, k, se, power, and needed: samples per problem for the wanted power
        (infinite if no number suffices).
    """
    rows = []
    for name, (n, p) in benchmarks.items():
        for difference in differences:
            if not 0 <= p + difference <= 1:
                raise UserError(f"differences: {difference} on {name}'s {p} leaves 0 … 1; choose a smaller one")
            for kind in problems:
                needed = samples_needed(p, p + difference, n, kind, rho, multiple_for(wanted, level))
                fixed = {"benchmark": name, "n": n, "p": p, "difference": difference, "problems": kind, "rho": rho}
                for k in samples:
                    se = difference_se(p, p + difference, n, k, kind, rho)
                    chance = power(p, p + difference, n, k, kind, rho, level)
                    rows.append({**fixed, "k": k, "se": se, "power": chance, "needed": needed})
    return pd.DataFrame(rows)
