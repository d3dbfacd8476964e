"""The linear-Gaussian model of the collider, everything in closed form: what Theorem 1 and Corollary 2 say of linear f.

Symbols: n candidates y_0 … y_{n−1}; d, p, r the widths of q, y_i, y_n; G = (q, y_1 … y_{n−1}); x = (G, y_n);
m = π*(q) = E[y_0 | q]; μ = π*(x) = E[y_0 | x], the Bayes predictor; Φf = E[f | G], Ψf = f − Φf (Eq. 2);
Πf = Ψf + m, the projected predictor of the two statements. Risk: R(f) = E‖y_0 − f(x)‖².
A2, which both statements need: E[y_0 | G] = m. The fork gives it; a latent that the candidates share breaks it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .arrays import TINY, Array, as_array, as_count, as_covariance, inverse, root
from .errors import UserError
from .mechanisms import SCM, Sample

__all__ = ["Gaps", "LinearGaussianSCM", "linear_predictor"]


class Gaps(NamedTuple):
    """Expected gains: R(f) − R(Πf) of Theorem 1 and R(m) − R(Πf) of Corollary 2."""

    theorem1: float
    corollary2: float


class LinearGaussianSCM(SCM):
    """q ~ N(0, I_d), y_i = A q + e_i, e_i ~ N(0, S_e), y_n = B q + Σ_i C_i y_i + η, η ~ N(0, S_h); all in closed form.

    A    (p, d)
    B    (r, d)
    C    (n, r, p), n ≥ 2
    S_e  (p, p), symmetric and positive definite
    S_h  (r, r), symmetric and positive semidefinite: 0 is an integration without noise
    rho  correlation of any two candidates given q, in [0, 1): e_i = √ρ w + √(1 − ρ) v_i, w shared. 0, the paper's
         fork, is A2; above 0 breaks it, and every formula below stays exact

    Source of the formulas: the model of the paper's section 1 made linear, derived by Gaussian conditioning.
    """

    def __init__(self, A: Array, B: Array, C: Array, S_e: Array, S_h: Array, rho: float = 0.0) -> None:
        self.A, self.C = as_array("A", A, "p d"), as_array("C", C, "n r p")
        self.p, self.d = self.A.shape
        self.n, self.r = self.C.shape[:2]
        as_array("C", C, "n r p", p=self.p)
        self.B = as_array("B", B, "r d", r=self.r, d=self.d)
        self.S_e, self.S_h = as_covariance("S_e", S_e, self.p), as_covariance("S_h", S_h, self.r)
        if _singular(self.S_e):
            raise UserError(f"S_e: {self.S_e.tolist()} is singular: give every direction of y_i some noise")
        as_count("n, the first axis of C,", self.n, 2)
        if not 0 <= rho < 1:
            raise UserError(f"rho: {rho} must lie in [0, 1): it is the share of a common latent in the noise of y_i")
        self.rho = float(rho)
        # G tells of y_0: g = E[y_0 | G] = m + w Σ_{i≥1} e_i, and S_0 = Cov(y_0 | G) is left. A2: g = m, S_0 = S_e.
        self.w = rho / (1 + (self.n - 2) * rho)
        self.S_0 = self._correlation(1)[0, 0] * self.S_e
        # y_n tells more: u = y_n − E[y_n | G] with S_u = Cov(u), and μ = g + K u.
        C_0 = self.C[0]
        self.S_u = C_0 @ self.S_0 @ C_0.T + self.S_h
        self.K = self.S_0 @ C_0.T @ inverse(self.S_u)  # (p, r)

    @classmethod
    def scalar(
        cls, c: ArrayLike, tau: float, s: float = 1.0, a: float = 1.0, b: float = 1.0, rho: float = 0.0
    ) -> LinearGaussianSCM:
        """y_i = a q + s ε_i, y_n = b q + Σ_i c_i y_i + τ ε: d = p = r = 1, n = len(c). Opposite signs in c are allowed."""
        weights = as_array("c", c, "n")
        return cls(np.array([[a]]), np.array([[b]]), weights[:, None, None], np.array([[s**2]]), np.array([[tau**2]]), rho)

    def draw_candidates(self, q: Array, count: int, rng: np.random.Generator) -> Array:
        """`count` fresh candidates (N, count, p): independent given q at rho = 0; otherwise one w for those of this call."""
        q = as_array("q", q, "N d", d=self.d)
        v = rng.standard_normal((len(q), as_count("count", count), self.p))
        if self.rho > 0:
            w = rng.standard_normal((len(q), 1, self.p))
            v = np.sqrt(self.rho) * w + np.sqrt(1 - self.rho) * v
        return (q @ self.A.T)[:, None] + v @ root(self.S_e).T

    def integrate(self, q: Array, y: Array, rng: np.random.Generator) -> Array:
        q, y = self._group(q, y)
        C = self.C.transpose(0, 2, 1).reshape(self.n * self.p, self.r)
        eta = rng.standard_normal((len(q), self.r)) @ root(self.S_h).T
        return q @ self.B.T + y.reshape(len(q), -1) @ C + eta

    def query_predictor(self, q: Array) -> Array:
        """m = A q, (N, p)."""
        return as_array("q", q, "N d", d=self.d) @ self.A.T

    def bayes_coefficients(self) -> tuple[Array, Array, Array]:
        """(F_q, F_y, F_n) of μ: g + K (y_n − B q − Σ_{i≥1} C_i y_i − C_0 g), with g = E[y_0 | G] (A2: g = A q)."""
        keep = np.eye(self.p) - self.K @ self.C[0]  # what K u leaves of g
        F_q = (1 - (self.n - 1) * self.w) * keep @ self.A - self.K @ self.B
        return F_q, self.w * keep - self.K @ self.C[1:], self.K.copy()

    def bayes_predictor(self, sample: Sample) -> Array:
        """μ = E[y_0 | x], (N, p); a predictor of y_0."""
        return linear_predictor(*self.bayes_coefficients())(sample)

    def risk_query(self) -> float:
        """R(m) = tr S_e."""
        return float(np.trace(self.S_e))

    def risk_bayes(self) -> float:
        """R(μ) = tr(S_0 − K C_0 S_0)."""
        return float(np.trace(self.S_0 - self.K @ self.C[0] @ self.S_0))

    def conditional_covariance(self, i: int, j: int, given: str) -> Array:
        """Cov(y_i, y_j | given), (p, p).

        given: "q", "q,yn", or "all": q, y_n and every candidate but i and j. With A2 the second is, for i ≠ j,
        −S_e C_iᵀ S⁻¹ C_j S_e with S = Σ_k C_k S_e C_kᵀ + S_h; for "all" the sum runs over i and j alone.
        """
        pair = sorted({self._candidate("i", i), self._candidate("j", j)})
        return self._pair_covariance(pair, given)[pair.index(i), pair.index(j)]

    def partial_correlation(self, i: int, j: int, given: str) -> float:
        """Correlation of y_i and y_j (i ≠ j, p = 1) given "q", "q,yn" or "all", as in `conditional_covariance`.

        Raises UserError, besides bad arguments, where y_i or y_j has no variance left (C_j = 0 and S_h = 0).
        """
        if self.p != 1:
            raise UserError(f"partial_correlation: p = {self.p}; a single number needs p = 1, use conditional_covariance")
        pair = sorted({self._candidate("i", i), self._candidate("j", j)})
        if len(pair) == 1:
            raise UserError(f"i, j: both are {i}; a correlation needs two different candidates")
        cov = self._pair_covariance(pair, given)[:, :, 0, 0]
        if min(cov[0, 0], cov[1, 1]) <= TINY * self.S_e[0, 0]:
            raise UserError(f"given: {given!r} leaves y_{i} or y_{j} without variance, so no correlation: take S_h > 0")
        return float(cov[0, 1] / np.sqrt(cov[0, 0] * cov[1, 1]))

    def theorem1_gap(self, F_q: Array, F_y: Array, F_n: Array) -> float:
        """R(f) − R(Πf) for f = F_q q + Σ_{i≥1} F_i y_i + F_n y_n; F_q (p, d), F_y (n − 1, p, p), F_n (p, r).

        E[f | G] − m = D_q q + Σ_{i≥1} D_i e_i. With A2 the gap is its mean square and never negative; with rho > 0,
        2 E⟨E[f | G] − m, g − m⟩ is subtracted: at f = μ and n = 2, p = 1 the gap is −ρ² S_e.
        """
        F_q, F_y, F_n = self._coefficients(F_q, F_y, F_n)
        A, C = self.A, self.C
        D_q = F_q + F_n @ (self.B + C[0] @ A) + (F_y + F_n @ C[1:]).sum(0) @ A - A
        D = F_y + F_n @ (C[1:] + self.w * C[0])  # (n − 1, p, p)
        R = self._correlation(self.n)[1:, 1:]
        square = np.sum(D_q**2) + np.einsum("ij,ipt,ts,jps->", R, D, self.S_e, D)
        return float(square - 2 * self.rho * np.einsum("ipt,tp->", D, self.S_e))

    def corollary2_gap(self, F_q: Array, F_y: Array, F_n: Array) -> float:
        """R(m) − R(Πf) = 2 tr(F_n C_0 S_0) − tr(F_n S_u F_nᵀ), since Ψf = F_n u; arguments as in `theorem1_gap`."""
        F_q, F_y, F_n = self._coefficients(F_q, F_y, F_n)
        return float(2 * np.trace(F_n @ self.C[0] @ self.S_0) - np.trace(F_n @ self.S_u @ F_n.T))

    def ols_gaps(self, rows: int) -> Gaps:
        """Both gaps, in expectation over the training sample, of least squares of y_0 on x without intercept.

        rows: training rows N > p_x + 1, with p_G = d + (n − 1) p and p_x = p_G + r regressors.
        With S_res = S_0 − K C_0 S_0:  tr(S_res) p_G / (N − p_x − 1) − tr(S_e − S_0), the last term 0 with A2, and
        tr(K C_0 S_0) − tr(S_res) r / (N − p_x − 1), negative for few rows or a weak collider.
        """
        p_G = self.d + (self.n - 1) * self.p
        spare = as_count("rows", rows) - (p_G + self.r) - 1
        if spare < 1:
            raise UserError(f"rows: {rows} are too few for p_x = {p_G + self.r} regressors; pass at least {p_G + self.r + 2}")
        if _singular(self.S_u):
            raise UserError(f"S_h: with {self.S_h.tolist()} the columns of y_n are collinear given G: give each some noise")
        S_res = self.risk_bayes()
        gain = float(np.trace(self.K @ self.C[0] @ self.S_0))
        return Gaps(S_res * p_G / spare - float(np.trace(self.S_e - self.S_0)), gain - S_res * self.r / spare)

    def _correlation(self, free: int) -> Array:
        """Correlation (free, free) of `free` candidates given q and all the others, in units of S_e."""
        known = self.n - free
        return (1 - self.rho) * (np.eye(free) + self.rho / (1 + (known - 1) * self.rho))

    def _pair_covariance(self, pair: list[int], given: str) -> Array:
        """Cov(y_k, y_l | given) for k, l in pair: (pair, pair, p, p)."""
        if given not in ("q", "q,yn", "all"):
            raise UserError(f'given: {given!r} is not known; choose "q", "q,yn" or "all"')
        free = pair if given == "all" else list(range(self.n))
        at = [free.index(k) for k in pair]
        Sigma = np.einsum("kl,pt->klpt", self._correlation(len(free)), self.S_e)
        if given != "q":
            with_y_n = np.einsum("klpt,lrt->kpr", Sigma, self.C[free])  # Cov(y_k, y_n)
            S = np.einsum("krp,kps->rs", self.C[free], with_y_n) + self.S_h  # Cov(y_n)
            Sigma = Sigma - np.einsum("kpr,rs,lts->klpt", with_y_n, inverse(S), with_y_n)
        return Sigma[np.ix_(at, at)]

    def _candidate(self, name: str, k: int) -> int:
        if not isinstance(k, int | np.integer) or not 0 <= k < self.n:
            raise UserError(f"{name}: there is no candidate {k!r}; they are 0 … {self.n - 1}")
        return int(k)

    def _coefficients(self, F_q: Array, F_y: Array, F_n: Array) -> tuple[Array, Array, Array]:
        return (
            as_array("F_q", F_q, "p d", p=self.p, d=self.d),
            as_array("F_y", F_y, "n−1 p p", **{"n−1": self.n - 1, "p": self.p}),
            as_array("F_n", F_n, "p r", p=self.p, r=self.r),
        )


def _singular(S: Array) -> bool:
    return np.linalg.eigvalsh(S)[0] <= TINY * S.max()


def linear_predictor(F_q: Array, F_y: Array, F_n: Array) -> Callable[[Sample], Array]:
    """The predictor f = F_q q + Σ_{i≥1} F_i y_i + F_n y_n; F_q (p, d), F_y (n − 1, p, p), F_n (p, r)."""
    F_q, F_y, F_n = as_array("F_q", F_q, "p d"), as_array("F_y", F_y, "n−1 p p"), as_array("F_n", F_n, "p r")

    def f(sample: Sample) -> Array:
        return sample.q @ F_q.T + np.einsum("ipt,Nit->Np", F_y, sample.y[:, 1:]) + sample.y_n @ F_n.T

    return f
