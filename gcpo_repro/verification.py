"""Every closed form of the causal analysis beside its simulation: the table of notebook 02 and of the README.

Each row simulates from the model alone, without the formula that it checks; z = (simulated − closed form) / standard error.
Symbols: projection.py and linear_gaussian.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd

from .independence import streamed_covariance
from .projection import (
    Estimate,
    calibration_slope,
    conditional_mean,
    projected_risk,
    projected_slope,
    risk_gap_corollary2,
    risk_gap_theorem1,
)
from .scm import LinearGaussianSCM, Sample, keep_mixed_groups, linear_predictor

Row = tuple[str, str, float, Estimate]


def example_scm(seed: int = 4) -> LinearGaussianSCM:
    """A model without symmetries to hide an error: d = 2, p = 2, r = 3, n = 4, coefficients drawn from `seed`."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(2, 2, 2)) * 0.4
    S_e, S_h = np.eye(2) + noise[0] @ noise[0].T, 0.4 * np.eye(3)
    return LinearGaussianSCM(rng.normal(size=(2, 2)), rng.normal(size=(3, 2)), rng.normal(size=(4, 3, 2)), S_e, S_h)


def phi_coefficients(scm: LinearGaussianSCM, F_q, F_y, F_n) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Φf = E[f | G] of f = F_q q + Σ F_i y_i + F_n y_n, as coefficients of the same kind; A2 is assumed (rho = 0)."""
    return F_q + F_n @ (scm.B + scm.C[0] @ scm.A), F_y + F_n @ scm.C[1:], np.zeros_like(F_n)


def random_predictor(scm: LinearGaussianSCM, rng: np.random.Generator, spread: float = 0.3):
    """(F_q, F_y, F_n): the Bayes predictor's, each entry changed by a normal draw of this standard deviation."""
    return tuple(F + spread * rng.standard_normal(F.shape) for F in scm.bayes_coefficients())


def formula_table(rows: int = 200_000, seed: int = 0) -> pd.DataFrame:
    """Columns: formula, theory.md's section, closed form, simulated, standard error, z.

    Args:
        rows: of each simulation; the smaller ones inside (least squares) take rows / 50 repetitions.
        seed: of every draw.
    """
    parts = (_risks, _covariances, _partial_correlations, _gaps, _least_squares, _two_phis, _violations)
    sources = np.random.SeedSequence(seed).spawn(len(parts))
    table = [
        {
            "formula": name, "section": section, "closed form": closed, "simulated": found.value,
            "standard error": found.standard_error, "z": (found.value - closed) / found.standard_error,
        }
        for part, source in zip(parts, sources, strict=True)
        for name, section, closed, found in part(rows, np.random.default_rng(source))
    ]  # fmt: skip
    return pd.DataFrame(table).set_index("formula")


def _mean(values: np.ndarray) -> Estimate:
    return Estimate(float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))), len(values))


def _risk(scm: LinearGaussianSCM, sample: Sample, prediction: np.ndarray) -> Estimate:
    return _mean(np.square(sample.y[:, 0] - prediction).sum(1))


def _risks(rows: int, rng: np.random.Generator) -> Iterator[Row]:
    scm = example_scm()
    sample = scm.sample(rows, rng)
    m, mu = scm.query_predictor(sample.q), scm.bayes_predictor(sample)
    yield "R(m) = tr S_e", "2", scm.risk_query(), _risk(scm, sample, m)
    yield "R(μ) = tr(S_e − K C_0 S_e)", "2", scm.risk_bayes(), _risk(scm, sample, mu)
    y_0 = sample.y[:, 0]
    gap = _mean(np.square(y_0 - m).sum(1) - np.square(y_0 - mu).sum(1))
    yield "R(m) − R(μ) = tr(K C_0 S_e)", "2", scm.risk_query() - scm.risk_bayes(), gap


def _covariances(rows: int, rng: np.random.Generator) -> Iterator[Row]:
    scm = example_scm()
    sample = scm.sample(rows, rng)
    for given, Z in (("q", sample.q), ("q,yn", np.hstack([sample.q, sample.y_n]))):
        residuals = sample.y - np.einsum("Nk,knp->Nnp", Z, _regression(Z, sample.y))
        product = residuals[:, 0, 0] * residuals[:, 2, 1]
        yield f"Cov(y_0, y_2 | {given})[0, 1]", "2", float(scm.conditional_covariance(0, 2, given)[0, 1]), _mean(product)


def _regression(Z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least squares of y (N, n, p) on Z (N, k), (k, n, p)."""
    return np.linalg.lstsq(Z, y.reshape(len(Z), -1), rcond=None)[0].reshape(Z.shape[1], *y.shape[1:])


def _partial_correlations(rows: int, rng: np.random.Generator) -> Iterator[Row]:
    scm = LinearGaussianSCM.scalar([1.0, -0.7, 0.5, 1.2], tau=0.5)
    moments = streamed_covariance(scm, rows, rng)
    for given in ("q", "q,yn", "all"):
        closed, found = scm.partial_correlation(0, 1, given), moments.partial_correlation(0, 1, given)
        yield f"ρ(y_0, y_1 | {given})", "2", closed, Estimate(found, (1 - found**2) / math.sqrt(rows), rows)
    sharp = LinearGaussianSCM.scalar([1.0] * 4, tau=1e-3)
    found = streamed_covariance(sharp, rows, rng).partial_correlation(0, 1, "q,yn")
    yield "ρ → −1/(n − 1) as τ → 0, n = 4", "2", -1 / 3, Estimate(found, (1 - found**2) / math.sqrt(rows), rows)


def _gaps(rows: int, rng: np.random.Generator) -> Iterator[Row]:
    scm = example_scm()
    F = random_predictor(scm, rng)
    sample, f, Phi_f = scm.sample(rows, rng), linear_predictor(*F), linear_predictor(*phi_coefficients(scm, *F))
    measured = risk_gap_theorem1(sample, f, Phi_f, scm.query_predictor)
    yield "Theorem 1 gap, linear f", "2", scm.theorem1_gap(*F), measured
    measured = risk_gap_corollary2(sample, f, Phi_f, scm.query_predictor)
    yield "Corollary 2 gap, linear f", "2", scm.corollary2_gap(*F), measured
    scm, F = counter_example(1.5)
    sample = scm.sample(rows, rng)
    f, Phi_f = linear_predictor(*F), linear_predictor(*phi_coefficients(scm, *F))
    measured = risk_gap_corollary2(sample, f, Phi_f, scm.query_predictor)
    yield "counter-example, 2a − 2a² at a = 1.5", "1", 2 * 1.5 - 2 * 1.5**2, measured


def counter_example(a: float) -> tuple[LinearGaussianSCM, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """theory.md §1: y_2 = y_0 + y_1 + N(0, 1), q without influence, f = a (y_2 − y_1). Corollary 2 fails for a > 1."""
    scm = LinearGaussianSCM.scalar([1.0, 1.0], tau=1.0, a=0.0, b=0.0)
    return scm, (np.zeros((1, 1)), np.array([[[-a]]]), np.array([[a]]))


def _least_squares(rows: int, rng: np.random.Generator) -> Iterator[Row]:
    scm, N = LinearGaussianSCM.scalar([1.0, 1.0, 1.0], tau=1.0), 20
    gaps = np.array([least_squares_gaps(scm, N, rng) for _ in range(max(100, rows // 50))])
    expected = scm.ols_gaps(N)
    yield f"least squares, N = {N}: E Theorem 1 gap", "2", expected.theorem1, _mean(gaps[:, 0])
    yield f"least squares, N = {N}: E Corollary 2 gap", "2", expected.corollary2, _mean(gaps[:, 1])


def least_squares_gaps(scm: LinearGaussianSCM, rows: int, rng: np.random.Generator) -> tuple[float, float]:
    """Both gaps of one least-squares fit of y_0 on x, without intercept, on `rows` fresh rows."""
    sample = scm.sample(rows, rng)
    d, others = scm.d, (scm.n - 1) * scm.p
    X = np.hstack([sample.q, sample.y[:, 1:].reshape(rows, -1), sample.y_n])
    F = np.linalg.lstsq(X, sample.y[:, 0], rcond=None)[0].T  # (p, d + (n − 1) p + r)
    F_y = F[:, d : d + others].reshape(scm.p, scm.n - 1, scm.p).transpose(1, 0, 2)
    coefficients = F[:, :d], F_y, F[:, d + others :]
    return scm.theorem1_gap(*coefficients), scm.corollary2_gap(*coefficients)


def _two_phis(rows: int, rng: np.random.Generator) -> Iterator[Row]:
    scm, sample = example_scm(), example_scm().sample(rows, rng)
    mu, m, L = scm.bayes_predictor(sample), scm.query_predictor(sample.q), scm.n
    for kind in ("algorithm", "theorem"):
        Phi = conditional_mean(scm, sample, scm.bayes_predictor, kind, L, int(rng.integers(2**31)), observed=True)
        yield f"R(target), Φ of the {kind}, L = {L}", "3", projected_risk(scm, kind, L), _risk(scm, sample, m + mu - Phi)
        slope = calibration_slope(sample.y[:, 0], mu, Phi, m)
        yield f"slope b, Φ of the {kind}, L = {L}", "3", projected_slope(scm, kind, L), slope
    for fresh in (1, 3):
        Phi = conditional_mean(scm, sample, scm.bayes_predictor, "theorem", fresh, int(rng.integers(2**31)))
        b, gain = fresh / (fresh + 1), (scm.risk_query() - scm.risk_bayes()) * (1 - 1 / fresh)
        yield f"slope b = L'/(L' + 1), L' = {fresh} fresh outputs", "3", b, calibration_slope(sample.y[:, 0], mu, Phi, m)
        y_0 = sample.y[:, 0]
        found = _mean(np.square(y_0 - m).sum(1) - np.square(y_0 - (m + mu - Phi)).sum(1))
        yield f"gain V(1 − 1/L'), L' = {fresh} fresh outputs", "3", gain, found
    yield from _rollouts(scm, sample, rng)


def _rollouts(scm: LinearGaussianSCM, sample: Sample, rng: np.random.Generator, M: int = 2) -> Iterator[Row]:
    """Each f(x) a mean of M rollouts of y_0 from x, as in the algorithm: their variance comes on top."""
    L, rollouts = scm.n, []
    scale = np.linalg.cholesky(scm.S_0 - scm.K @ scm.C[0] @ scm.S_0)  # Cov(y_0 | x)
    for l in range(L):
        y_n = sample.y_n if l == 0 else scm.integrate(sample.q, sample.y, rng)
        mu = scm.bayes_predictor(Sample(sample.q, sample.y, y_n))
        rollouts.append(mu + (rng.standard_normal((M, *mu.shape)) @ scale.T).mean(0))
    target = scm.query_predictor(sample.q) + rollouts[0] - np.mean(rollouts, axis=0)
    closed = projected_risk(scm, "algorithm", L, rollout_variance=scm.risk_bayes() / M)
    yield f"R(target), Φ of the algorithm, L = {L}, M = {M} rollouts", "3", closed, _risk(scm, sample, target)


def _violations(rows: int, rng: np.random.Generator) -> Iterator[Row]:
    rho, scm = 0.5, LinearGaussianSCM.scalar([1.0, 1.0], tau=0.5, rho=0.5)
    sample = scm.sample(rows, rng)
    Phi = (1 - rho) * sample.q + rho * sample.y[:, 1]  # E[μ | G] = E[y_0 | G]: y_0 − q and y_1 − q correlate by ρ
    found = risk_gap_theorem1(sample.y[:, 0], scm.bayes_predictor(sample), Phi, scm.query_predictor(sample.q))
    yield "shared latent, ρ = ½: Theorem 1 gap at μ = −ρ²", "1", -(rho**2), found
    rewards = rng.integers(0, 2, size=(rows, 4))
    kept = rewards[keep_mixed_groups(rewards.astype(float))]
    r = float(np.corrcoef(kept[:, 0], kept[:, 1])[0, 1])
    found = Estimate(r, (1 - r**2) / math.sqrt(len(kept)), len(kept))
    yield "mixed groups only, n = 4: corr(r_0, r_1) = −1/7", "1", -1 / 7, found
    scm, n = example_scm(), 4
    y = scm.sample(rows, rng).y
    risk = _mean(np.square(y[:, 0] - y.mean(1)).sum(1))
    yield "z̄ with z_i inside: E‖z_i − z̄‖² = (1 − 1/n) R(m)", "3", (1 - 1 / n) * scm.risk_query(), risk
    risk = _mean(np.square(y[:, 0] - y[:, 1:].mean(1)).sum(1))
    yield "leave-one-out: E‖z_i − z̄_{−i}‖² = n/(n − 1) R(m)", "3", n / (n - 1) * scm.risk_query(), risk
