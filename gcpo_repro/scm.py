"""The paper's structural causal model, q → y_i, q → y_n, y_i → y_n (section 1), in three versions, and its graph.

* `LinearGaussianSCM`: every quantity of Theorem 1 and Corollary 2 in closed form (linear_gaussian.py);
* `AdditiveNoiseSCM`: your own functions, and three cases on which tests of conditional independence differ;
* `ReasoningSCM`: answers right or wrong and an integrating vote, by enumeration;
* `causal_graph`, `d_separated`, `draw`: what the graph alone says (graph.py).

All share `sample` and the three mechanisms of mechanisms.py, whose symbols are used here: N rows, n candidates,
d, p, r the widths of q, y_i, y_n. Bad input raises UserError: which argument, which value, what to do.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import expit
from scipy.stats import binom

from .arrays import Array, as_array, as_count
from .errors import UserError
from .graph import causal_graph, d_separated, draw
from .linear_gaussian import Gaps, LinearGaussianSCM, linear_predictor
from .mechanisms import SCM, Sample

__all__ = [
    "SCM", "AdditiveNoiseSCM", "Gaps", "LinearGaussianSCM", "ReasoningSCM", "Sample", "causal_graph", "d_separated",
    "draw", "keep_mixed_groups", "linear_predictor", "nonlinear_fork", "symmetric_collider", "weak_collider",
]  # fmt: skip

Function = Callable[..., Array]


class AdditiveNoiseSCM(SCM):
    """y_i = fork(q) + s ε_i, y_n = collider(q, y) + τ ε, with your functions and standard normal ε; q ~ N(0, I_d).

    fork      q (N, d) → (N, p), the mean of every candidate
    collider  q (N, d), y (N, n, p) → (N, r), the mean of y_n
    n         group size, at least 2
    s, tau    standard deviations, s > 0, tau ≥ 0
    d, p, r   widths of q, y_i and y_n
    """

    def __init__(
        self, fork: Function, collider: Function, n: int, s: float = 1.0, tau: float = 1.0, d: int = 1, p: int = 1, r: int = 1
    ) -> None:
        self.fork, self.collider = fork, collider
        self.n, self.d, self.p, self.r = as_count("n", n, 2), as_count("d", d), as_count("p", p), as_count("r", r)
        if not (0 < s < np.inf and 0 <= tau < np.inf):
            raise UserError(f"s, tau: got {s} and {tau}; they are standard deviations, s > 0 and tau ≥ 0, both finite")
        self.s, self.tau = float(s), float(tau)

    def draw_candidates(self, q: Array, count: int, rng: np.random.Generator) -> Array:
        m = self.query_predictor(q)
        return m[:, None] + self.s * rng.standard_normal((len(m), as_count("count", count), self.p))

    def integrate(self, q: Array, y: Array, rng: np.random.Generator) -> Array:
        q, y = self._group(q, y)
        mean = as_array("collider(q, y)", self.collider(q, y), "N r", N=len(q), r=self.r)
        return mean + self.tau * rng.standard_normal(mean.shape)

    def query_predictor(self, q: Array) -> Array:
        """m = fork(q), (N, p): the noise has mean 0."""
        q = as_array("q", q, "N d", d=self.d)
        return as_array("fork(q)", self.fork(q), "N p", N=len(q), p=self.p)


def nonlinear_fork(n: int = 3, s: float = 0.75, tau: float = 1.0) -> AdditiveNoiseSCM:
    """y_i = sin(2q) + s ε, y_n = q + Σ y_i + τ ε: a linear test finds a dependence given q that is not there."""
    return AdditiveNoiseSCM(lambda q: np.sin(2 * q), lambda q, y: q + y.sum(1), n, s, tau)


def weak_collider(n: int = 3, c: float = 0.15, s: float = 1.0, tau: float = 1.0) -> AdditiveNoiseSCM:
    """y_i = q + s ε, y_n = q + c Σ y_i + τ ε: at N = 200 hardly any test finds the dependence given (q, y_n)."""
    return AdditiveNoiseSCM(lambda q: q, lambda q, y: q + c * y.sum(1), n, s, tau)


def symmetric_collider(n: int = 2, s: float = 1.0, tau: float = 0.2) -> AdditiveNoiseSCM:
    """y_i = s ε, y_n = q + |y_0| |y_1| + τ ε: given (q, y_n) dependent but uncorrelated, so only KCI sees it.

    The candidates have mean 0 at every q: any other fork breaks the symmetry of the signs, and GCM then sees it too.
    At N = 200 KCI needs a small tau: it rejected in .21 of the samples at τ = 1, in .95 at .3, in all at .2.
    """
    return AdditiveNoiseSCM(np.zeros_like, lambda q, y: q + np.abs(y[:, 0] * y[:, 1]), n, s, tau)


class ReasoningSCM(SCM):
    """Answers right (1) or wrong (0): y_i ~ Bernoulli(p(q)) given the difficulty q, and y_n a vote over them.

        P(y_n right | q, k of n right) = φ vote_k + (1 − φ) p(q),   vote_k = 1, ½, 0 as w k >, =, < n − k

    n         group size, at least 2
    weight    w > 0, what a right answer weighs against a wrong one; 1 is the majority, ties broken by a coin
    fidelity  φ in [0, 1]: else the vote is ignored and y_n solves the question anew; at 0 there is no collider
    right     p: difficulty q (N, 1) → (N,) probabilities; default 1 / (1 + e^q), with q ~ N(0, 1)

    Widths d = p = r = 1; values are the floats 0 and 1.
    """

    d = p = r = 1

    def __init__(self, n: int, weight: float = 1.0, fidelity: float = 1.0, right: Function | None = None) -> None:
        self.n = as_count("n", n, 2)
        if not (0 < weight < np.inf and 0 <= fidelity <= 1):
            raise UserError(f"weight, fidelity: got {weight} and {fidelity}; need a finite weight > 0 and 0 ≤ fidelity ≤ 1")
        self.fidelity, self.right = float(fidelity), right or (lambda q: expit(-q[:, 0]))
        k = np.arange(n + 1)
        self.vote = (1 + np.sign(weight * k - (n - k))) / 2  # (n + 1,)

    def draw_candidates(self, q: Array, count: int, rng: np.random.Generator) -> Array:
        P = self.query_predictor(q)[:, None]  # (N, 1, 1)
        return (rng.random((len(P), as_count("count", count), 1)) < P).astype(float)

    def integrate(self, q: Array, y: Array, rng: np.random.Generator) -> Array:
        q, y = self._group(q, y)
        P = self.query_predictor(q)[:, 0]
        return (rng.random(len(P)) < self._integrated(P, self._counts(y), 1))[:, None].astype(float)

    def query_predictor(self, q: Array) -> Array:
        """m = P(y_0 right | q), (N, 1)."""
        q = as_array("q", q, "N d", d=1)
        P = as_array("right(q)", self.right(q), "N", N=len(q))
        if P.min() < 0 or P.max() > 1:
            raise UserError(f"right: gave values from {P.min()} to {P.max()}; probabilities lie in [0, 1]")
        return P[:, None]

    def bayes_predictor(self, sample: Sample) -> Array:
        """μ = P(y_0 right | x), (N, 1), by Bayes' rule; a predictor of y_0."""
        P, k = self.query_predictor(sample.q)[:, 0], self._counts(sample.y[:, 1:])
        is_right = P * self._integrated(P, k + 1, sample.y_n[:, 0])
        is_wrong = (1 - P) * self._integrated(P, k, sample.y_n[:, 0])
        return (is_right / (is_right + is_wrong))[:, None]

    def conditional_correlation(self, q: Array, y_n: int) -> Array:
        """Correlation (N,) of the correctness of two candidates given q (N, 1) and y_n = 0 or 1; given q alone it is 0.

        With W_ab = P(y_0 = a, y_1 = b, y_n | q), summed over the votes of the others, it is
        (W_11 W_00 − W_10²) / ((W_11 + W_10)(W_10 + W_00)), NaN where y_n leaves no variance.
        Never positive (explaining away: one right answer accounts for a right y_n) where P(y_n | q, k) is log-concave
        in k, as it is for every vote at φ = 1 and, given a right y_n, for n = 2 with w ≥ 1 at every φ. It turns positive
        where φ < 1 and the vote needs several right answers to win (w < 1, or n ≥ 3 on hard questions): a right y_n
        then says "enough of them together, or none".
        """
        if y_n not in (0, 1):
            raise UserError(f"y_n: {y_n!r} must be 1 (right) or 0 (wrong)")
        P = self.query_predictor(q)[:, 0]
        k = np.arange(self.n - 1)[:, None]  # right ones among the n − 2 others
        others = binom.pmf(k, self.n - 2, P)  # (n − 1, N)
        W = [P**a * (1 - P) ** (2 - a) * (others * self._integrated(P, k + a, y_n)).sum(0) for a in (0, 1, 2)]
        W_00, W_10, W_11 = W
        variance = (W_11 + W_10) * (W_10 + W_00)
        return np.divide(W_11 * W_00 - W_10**2, variance, out=np.full(len(P), np.nan), where=variance > 0)

    def _integrated(self, P: Array, k: Array, y_n: Array | int) -> Array:
        """P(y_n | q, k right)."""
        is_right = self.fidelity * self.vote[k] + (1 - self.fidelity) * P
        return np.where(y_n, is_right, 1 - is_right)

    def _counts(self, y: Array) -> Array:
        if not np.isin(y, (0, 1)).all():
            raise UserError("y: answers of a ReasoningSCM are 0 (wrong) or 1 (right)")
        return y[:, :, 0].sum(1).astype(int)


def keep_mixed_groups(rewards: Array) -> Array:
    """Mask (N,) of the groups in rewards (N, n) whose rewards are not all equal: those that GRPO can learn from.

    Conditioning on a descendant of every y_i, it breaks A2: of n = 4 fair binary rewards, two of a kept group
    correlate by −1/7.
    """
    rewards = as_array("rewards", rewards, "N n")
    return rewards.max(1) > rewards.min(1)
