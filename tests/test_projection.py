"""projection.py and kernel_ridge.py against numbers by hand, a slow literal oracle, closed forms, peers and simulation.

The closed forms of the linear model are compared with an SCM written here, from the equations of theory.md §2 and nothing
else. Simulated means are compared in units of their standard error, with fixed seeds: |z| < 4.5.
"""

from __future__ import annotations

import copy
import math
import subprocess
import sys

import numpy as np
import pytest
import sklearn
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from gcpo_repro import kernel_ridge
from gcpo_repro.errors import UserError
from gcpo_repro.projection import (
    Estimate,
    ProjectedKernelRidge,
    calibration_slope,
    conditional_mean,
    kernel_experiment,
    kernel_features,
    leave_one_out_mean,
    projected_risk,
    projected_slope,
    risk_gap_corollary2,
    risk_gap_theorem1,
)
from gcpo_repro.scm import AdditiveNoiseSCM, LinearGaussianSCM, ReasoningSCM, Sample, linear_predictor

NAN = math.nan
PROJECTIONS = ("none", "after", "before")


def close_to(estimate: Estimate, truth: float, z: float = 4.5) -> bool:
    return abs(estimate.value - truth) < z * estimate.standard_error


def mean_of(values: np.ndarray) -> Estimate:
    return Estimate(values.mean(), values.std(ddof=1) / math.sqrt(len(values)), len(values))


class Vector:
    """theory.md §2 once more, with d = 2, p = 3, r = 2, n = 4."""

    n, d, p, r = 4, 2, 3, 2
    query_predictor = staticmethod(lambda q: q @ Vector.A.T)

    rng = np.random.default_rng(7)
    A, B, C = rng.standard_normal((3, 2)), rng.standard_normal((2, 2)), rng.standard_normal((4, 2, 3))
    L_e, L_h = np.tril(rng.standard_normal((3, 3))) * 0.6, np.tril(rng.standard_normal((2, 2)))
    S_e, S_h = L_e @ L_e.T, L_h @ L_h.T

    def draw_candidates(self, q, count, rng):
        return (q @ self.A.T)[:, None] + rng.standard_normal((len(q), count, 3)) @ self.L_e.T

    def integrate(self, q, y, rng):
        return q @ self.B.T + np.einsum("irp,Nip->Nr", self.C, y) + rng.standard_normal((len(q), 2)) @ self.L_h.T

    def sample(self, size, seed):
        rng = np.random.default_rng(seed)
        q = rng.standard_normal((size, 2))
        y = self.draw_candidates(q, 4, rng)
        return Sample(q, y, self.integrate(q, y, rng))


VECTOR = Vector()
LINEAR = LinearGaussianSCM(Vector.A, Vector.B, Vector.C, Vector.S_e, Vector.S_h)
# A nonlinear fork and a collider in which y_0 and y_1 interact.
CURVED = AdditiveNoiseSCM(lambda q: np.sin(2 * q), lambda q, y: np.tanh(y[:, 0]) * (1 + y[:, 1] ** 2) + q, n=3, s=0.8, tau=0.4)


def curved_predictor(sample: Sample) -> np.ndarray:
    return np.tanh(sample.y_n) + 0.3 * sample.y[:, 1] * sample.y_n + sample.q


# --- Gaps, slope and their standard errors ----------------------------------------------------------------------

Y_0, F, PHI_F, M = [1.0, 2.0, 3.0, 0.0], [2.0, 2.0, 1.0, 1.0], [1.0, 1.0, 2.0, 1.0], [0.0, 1.0, 1.0, 0.0]
# Ψf = 1, 1, −1, 0; Πf = Ψf + m = 1, 2, 0, 0. Squared errors: f 1, 0, 4, 1; m 1, 1, 4, 0; Πf 0, 0, 9, 0.


def test_gaps_by_hand():
    # Differences 1, 0, −5, 1: mean −3/4, squared deviations 49/16 + 9/16 + 289/16 + 49/16 = 99/4, over 3, over 4, root.
    assert risk_gap_theorem1(Y_0, F, PHI_F, M) == Estimate(-0.75, pytest.approx(math.sqrt(99 / 48)), 4)
    # Differences 1, 1, −5, 0: mean −3/4, squared deviations 49/16 + 49/16 + 289/16 + 9/16, the same.
    assert risk_gap_corollary2(Y_0, F, PHI_F, M) == Estimate(-0.75, pytest.approx(math.sqrt(99 / 48)), 4)
    # In groups (1, 0) and (−5, 1): sums of deviations 5/2, −5/2. √(2/1 · 2 · 25/4) / 4 = 5/4.
    grouped = risk_gap_theorem1(Y_0, F, PHI_F, M, groups=["a", "a", "b", "b"])
    assert grouped == Estimate(-0.75, pytest.approx(1.25), 2)


def test_slope_by_hand():
    # With m = 0, 1, 2, 0: (y_0 − m) Ψf = 1, 1, −1, 0 and (Ψf)² = 1, 1, 1, 0, so b = 1/3. Divided by 3/4, the deviations
    # 1 − b, 1 − b, −1 − b, 0 are 8/9, 8/9, −16/9, 0: their squares add up to 384/81; over 3, over 4, root.
    slope = calibration_slope(Y_0, F, PHI_F, [0.0, 1.0, 2.0, 0.0])
    assert slope == Estimate(pytest.approx(1 / 3), pytest.approx(math.sqrt(384 / 81 / 12)), 4)


def test_vectors_count_by_their_components():
    columns = [np.array(a)[:, None] for a in (Y_0, F, PHI_F, M)]
    padded = [np.hstack([a, np.ones((4, 1))]) for a in columns]
    twice = [np.hstack([a, a]) for a in columns]
    for measure in (risk_gap_theorem1, risk_gap_corollary2, calibration_slope):
        flat = measure(Y_0, F, PHI_F, M)
        assert measure(*columns) == flat
        assert measure(*padded) == flat  # the second component is right for all of f, m and Πf
        factor = 1 if measure is calibration_slope else 2
        assert measure(*twice).value == pytest.approx(factor * flat.value)


@pytest.mark.parametrize("measure", [risk_gap_theorem1, risk_gap_corollary2, calibration_slope])
@pytest.mark.parametrize("grouped", [False, True])
def test_the_standard_error_is_the_spread_over_repetitions(measure, grouped):
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(100), 4) if grouped else None
    found = []
    for _ in range(600):
        shared = np.repeat(rng.standard_normal((100, 3)), 4, axis=0) if grouped else 0
        m, noise, u = (rng.standard_normal((400, 3)) + shared).T
        y_0 = m + u + noise
        found.append(measure(y_0, m + 0.5 * u + 0.3 * noise**2, 0.1 * m, m, groups))
    spread = np.std([e.value for e in found], ddof=1)
    assert np.mean([e.standard_error for e in found]) == pytest.approx(spread, rel=0.12)


def test_theorem1_predicts_the_gain_of_any_linear_predictor():
    rng, sample = np.random.default_rng(2), VECTOR.sample(20_000, 3)
    A, C, B = Vector.A, Vector.C, Vector.B
    for _ in range(10):
        F_q, F_y, F_n = (rng.standard_normal(s) for s in ((3, 2), (3, 3, 3), (3, 2)))
        f = linear_predictor(F_q, F_y, F_n)

        def Phi_f(s, f=f, F_n=F_n):  # y_n with A q in place of y_0 and no noise
            y = np.concatenate([(s.q @ A.T)[:, None], s.y[:, 1:]], 1)
            return f(Sample(s.q, y, s.q @ B.T + np.einsum("irp,Nip->Nr", C, y)))

        measured = [g(sample, f, Phi_f, VECTOR.query_predictor) for g in (risk_gap_theorem1, risk_gap_corollary2)]
        assert close_to(measured[0], LINEAR.theorem1_gap(F_q, F_y, F_n)) and measured[0].value > 0
        assert close_to(measured[1], LINEAR.corollary2_gap(F_q, F_y, F_n))
        slope = calibration_slope(sample, f, Phi_f, VECTOR.query_predictor)
        assert close_to(slope, projected_slope(LINEAR, "theorem", math.inf, F_n))
        assert (slope.value >= 0.5) == (measured[1].value >= 0)


def test_at_the_bayes_predictor_the_gain_is_zero_and_the_slope_one():
    sample = VECTOR.sample(50_000, 4)
    arguments = sample, LINEAR.bayes_predictor, VECTOR.query_predictor(sample.q), VECTOR.query_predictor  # Φμ = m
    gap = risk_gap_theorem1(*arguments)
    assert gap.value == pytest.approx(0, abs=1e-12) and gap.standard_error < 1e-12
    assert close_to(risk_gap_corollary2(*arguments), LINEAR.risk_query() - LINEAR.risk_bayes())
    assert close_to(calibration_slope(*arguments), 1)


@pytest.mark.parametrize("a", [0.3, 1.0, 2.0])
def test_the_counter_example_to_corollary2(a):
    # q constant, y_0, y_1 ~ N(0, 1), y_2 = y_0 + y_1 + N(0, 1), f = a (y_2 − y_1): gap 2a − 2a², slope 1/(2a).
    y_0, noise = np.random.default_rng(5).standard_normal((2, 100_000))
    arguments = y_0, a * (y_0 + noise), 0 * y_0, 0 * y_0
    assert close_to(risk_gap_corollary2(*arguments), 2 * a - 2 * a**2)
    assert close_to(calibration_slope(*arguments), 1 / (2 * a))


def test_without_the_fork_theorem1_fails():
    # y_0 and y_1 correlate by ρ given q, f Bayes: then Φf = m + ρ (y_1 − m), and the gap is −ρ².
    scm = LinearGaussianSCM.scalar([1, 1], tau=0.5, rho=0.6)
    sample = scm.sample(100_000, 6)
    m = scm.query_predictor(sample.q)
    gap = risk_gap_theorem1(sample, scm.bayes_predictor, m + 0.6 * (sample.y[:, 1] - m), m)
    assert close_to(gap, -0.36)


def test_leave_one_out_mean_by_hand_and_its_slope():
    z = np.array([[1.0], [10.0], [2.0], [20.0], [6.0]])
    assert leave_one_out_mean(z, ["a", "b", "a", "b", "a"]).ravel().tolist() == [4.0, 20.0, 3.5, 10.0, 1.5]
    # b̂ as theory.md §3 prints it, by loops.
    rng = np.random.default_rng(7)
    z, Z, PHI_Z = rng.standard_normal((3, 24, 5))
    groups = np.arange(24) // 4
    top = bottom = 0.0
    for i in range(24):
        others = np.mean([z[j] for j in range(24) if groups[j] == groups[i] and j != i], axis=0)
        top += (z[i] - others) @ (Z[i] - PHI_Z[i])
        bottom += (Z[i] - PHI_Z[i]) @ (Z[i] - PHI_Z[i])
    slope = calibration_slope(z, Z, PHI_Z, leave_one_out_mean(z, groups), groups)
    assert slope.value == pytest.approx(top / bottom) and slope.n == 6


# --- Φ by simulation --------------------------------------------------------------------------------------------


def square(sample: Sample) -> np.ndarray:
    return np.hstack([sample.y_n**2, sample.y_n[:, :1] * sample.y[:, 1, :1]])


@pytest.mark.parametrize("kind", ["theorem", "algorithm"])
def test_conditional_mean_converges_to_the_mean_given_what_its_kind_keeps(kind):
    # y_n given G has mean b and covariance C_0 S_e C_0ᵀ + S_h; given the group only S_h, about a mean with y_0 in it.
    sample = VECTOR.sample(2_000, 8)
    y = sample.y.copy()
    S = Vector.S_h
    if kind == "theorem":
        y[:, 0], S = sample.q @ Vector.A.T, S + Vector.C[0] @ Vector.S_e @ Vector.C[0].T
    b = sample.q @ Vector.B.T + np.einsum("irp,Nip->Nr", Vector.C, y)
    exact = np.hstack([b**2 + np.diag(S), b[:, :1] * sample.y[:, 1, :1]])
    variance = np.hstack([2 * np.diag(S) ** 2 + 4 * b**2 * np.diag(S), S[0, 0] * sample.y[:, 1, :1] ** 2])
    error = (conditional_mean(VECTOR, sample, square, kind, 200, seed=9) - exact) / np.sqrt(variance / 200)
    assert abs(error.mean()) < 4.5 / math.sqrt(error.size / 2)
    assert np.square(error).mean() == pytest.approx(1, abs=0.1)


def test_the_observed_output_is_the_first_of_the_draws():
    sample = CURVED.sample(50, 10)
    f = curved_predictor(sample)
    fresh = conditional_mean(CURVED, sample, curved_predictor, "theorem", 3, seed=11)
    assert np.array_equal(conditional_mean(CURVED, sample, curved_predictor, "theorem", 1, seed=11, observed=True), f)
    with_observed = conditional_mean(CURVED, sample, curved_predictor, "theorem", 4, seed=11, observed=True)
    np.testing.assert_allclose(with_observed, (f + 3 * fresh) / 4, rtol=1e-13)


def test_conditional_mean_depends_on_its_seed_alone_and_changes_nothing():
    sample = CURVED.sample(50, 12)
    before, state = copy.deepcopy(sample), np.random.get_state()[1].copy()
    first, again, other = (conditional_mean(CURVED, sample, curved_predictor, "theorem", 2, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert all(np.array_equal(getattr(sample, k), getattr(before, k)) for k in ("q", "y", "y_n"))
    assert np.array_equal(np.random.get_state()[1], state)


def test_a_predictor_that_reads_its_target_is_caught():
    sample = CURVED.sample(20, 13)
    with pytest.raises(UserError, match=r"^predictor: returned 20 values .* NaN for y_0, .* not y\[:, 0\]"):
        conditional_mean(CURVED, sample, lambda s: s.y[:, 0] + s.y_n, "theorem", 2, seed=0)
    with pytest.raises(UserError, match="^f: returned 20 values"):
        risk_gap_theorem1(sample, lambda s: s.y.mean(1), CURVED.query_predictor(sample.q), CURVED.query_predictor)


# --- The literal and the faithful Φ -----------------------------------------------------------------------------


def test_the_numbers_of_theory_3():
    # Scalar, R(m) = 1: nothing is gained with one fresh output (simulated there: .999), .6 with the mean over both.
    scm = LinearGaussianSCM.scalar([1, 1], tau=0.5)
    assert projected_risk(scm, "theorem", 1, observed=False) == pytest.approx(1.0)
    assert projected_risk(scm, "theorem", 2) == pytest.approx(0.6)
    for L in (1, 2, 5):  # b = L'/(L' + 1), gain V (1 − 1/L') with V = 1/1.25
        assert projected_slope(scm, "theorem", L, observed=False) == pytest.approx(L / (L + 1))
        assert projected_risk(scm, "theorem", L, observed=False) == pytest.approx(1 - 0.8 * (1 - 1 / L))
        assert projected_slope(scm, "theorem", L + 1) == pytest.approx(1)
    assert projected_risk(scm, "theorem", math.inf) == pytest.approx(scm.risk_bayes())


@pytest.mark.parametrize("kind", ["theorem", "algorithm"])
@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize("bayes", [False, True])
def test_risk_and_slope_are_those_of_a_simulation(kind, observed, bayes):
    L, sample = 4, VECTOR.sample(60_000, 14)
    rng = np.random.default_rng(15)
    F_q, F_y, F_n = (rng.standard_normal(s) / 2 for s in ((3, 2), (3, 3, 3), (3, 2)))
    f = LINEAR.bayes_predictor if bayes else linear_predictor(F_q, F_y, F_n)
    F_n = None if bayes else F_n
    m, y_0 = VECTOR.query_predictor(sample.q), sample.y[:, 0]
    Phi_f = conditional_mean(VECTOR, sample, f, kind, L, seed=16, observed=observed)
    risk = mean_of(np.square(y_0 - (f(sample) - Phi_f + m)).sum(1))
    assert close_to(risk, projected_risk(LINEAR, kind, L, F_n, observed))
    assert close_to(calibration_slope(sample, f, Phi_f, m), projected_slope(LINEAR, kind, L, F_n, observed))
    if kind == "algorithm":
        assert risk_gap_corollary2(sample, f, Phi_f, m).value < 0


@pytest.mark.parametrize("kind", ["theorem", "algorithm"])
def test_rollouts_add_their_variance_over_M(kind):
    # As in the paper: L = n contexts, M rollouts y_0 ~ p(y_0 | x_l) each, Z̄_{l} their mean; Z̄_0 is in Z̄' as well.
    L, M, sample, rng = 4, 2, VECTOR.sample(60_000, 17), np.random.default_rng(18)
    root = np.linalg.cholesky(Vector.S_e - LINEAR.K @ Vector.C[0] @ Vector.S_e)

    def rollouts(s):
        return LINEAR.bayes_predictor(s) + (rng.standard_normal((len(s.q), M, 3)) @ root.T).mean(1)

    Z_0 = rollouts(sample)
    Z_bar = (Z_0 + (L - 1) * conditional_mean(VECTOR, sample, rollouts, kind, L - 1, seed=19)) / L
    m, y_0 = VECTOR.query_predictor(sample.q), sample.y[:, 0]
    risk = mean_of(np.square(y_0 - (Z_0 - Z_bar + m)).sum(1))
    assert close_to(risk, projected_risk(LINEAR, kind, L, rollout_variance=LINEAR.risk_bayes() / M))
    slope = projected_slope(LINEAR, kind, L, rollout_variance=LINEAR.risk_bayes() / M)
    assert close_to(calibration_slope(y_0, Z_0, Z_bar, m), slope)


def test_closed_forms_stay_exact_with_a_shared_latent():
    scm = LinearGaussianSCM.scalar([1, 0.7, -1], tau=0.5, rho=0.5)
    sample = scm.sample(100_000, 20)
    for kind in ("theorem", "algorithm"):
        Phi_f = conditional_mean(scm, sample, scm.bayes_predictor, kind, 3, seed=21, observed=True)
        h = scm.bayes_predictor(sample) - Phi_f
        risk = mean_of(np.square(sample.y[:, 0] - scm.query_predictor(sample.q) - h).sum(1))
        assert close_to(risk, projected_risk(scm, kind, 3))


@pytest.mark.parametrize("scm", [CURVED, ReasoningSCM(3, fidelity=0.7)], ids=["nonlinear", "discrete"])
def test_literal_sampling_never_beats_the_query_predictor_whatever_f(scm):
    # R(m + h) = R(m) + (1 − 1/L) E Var(f | whole group), and b = 0; the variance from a second, independent y_n.
    L, sample = 3, scm.sample(40_000, 22)
    m, y_0 = scm.query_predictor(sample.q), sample.y[:, 0]
    f = curved_predictor(sample)
    Phi_f = conditional_mean(scm, sample, curved_predictor, "algorithm", L, seed=23, observed=True)
    h, y_n = f - Phi_f, scm.integrate(sample.q, sample.y, np.random.default_rng(24))
    variance = np.square(f - curved_predictor(Sample(sample.q, sample.y, y_n))).sum(1) / 2
    excess = np.square(y_0 - m - h).sum(1) - np.square(y_0 - m).sum(1) - (1 - 1 / L) * variance
    assert close_to(mean_of(excess), 0)
    assert close_to(calibration_slope(y_0, f, Phi_f, m), 0)
    assert risk_gap_corollary2(y_0, f, Phi_f, m).value < 0


def test_the_cosine_orders_the_targets_as_in_theory_3():
    # Their values, literal < m < faithful < Bayes: .435, .468, .524, .541, on a vector SCM that is not given.
    sample = VECTOR.sample(20_000, 25)
    f, m, y_0 = LINEAR.bayes_predictor(sample), VECTOR.query_predictor(sample.q), sample.y[:, 0]

    def cosine(t):
        return np.mean((y_0 * t).sum(1) / np.linalg.norm(y_0, axis=1) / np.linalg.norm(t, axis=1))

    literal, faithful = (
        f - conditional_mean(VECTOR, sample, LINEAR.bayes_predictor, kind, 4, seed=26, observed=True) + m
        for kind in ("algorithm", "theorem")
    )
    assert cosine(literal) < cosine(m) - 0.01 < cosine(faithful) - 0.02 < cosine(f) - 0.03


# --- Projected kernel ridge regression ---------------------------------------------------------------------------


def oracle(X, y, extra, T, project, c, l_r, l_l, alpha, cme_alpha):
    """theory.md §5, entry by entry."""
    S = np.vstack([X, extra]) if extra is not None else X
    N = len(X)

    def rbf(a, b, length):
        return math.exp(-sum((u - v) ** 2 for u, v in zip(a, b, strict=True)) / (2 * length**2))

    def r(a, b):
        return rbf(a[:c], b[:c], l_r) + 1

    def context(a, b):
        return rbf(a[c:], b[c:], l_l)

    def table(k, A, B):
        return np.array([[k(a, b) for b in B] for a in A])

    inverse = np.linalg.inv(table(context, S, S) + cme_alpha * np.eye(len(S)))

    def W(x):
        return inverse @ np.array([context(s, x) for s in S])

    def k(a, b):
        return r(a, b) * context(a, b)

    R = table(r, S, S)
    weights = {tuple(x): W(x) for x in (*X, *T)}

    def k_P(a, b):
        W_a, W_b = weights[tuple(a)], weights[tuple(b)]
        r_Sb, r_aS = np.array([r(s, b) for s in S]), np.array([r(a, s) for s in S])
        return (r(a, b) - W_a @ r_Sb - r_aS @ W_b + W_a @ R @ W_b) * context(a, b)

    kernel = k_P if project == "before" else k
    a = np.linalg.solve(table(kernel, X, X) + N * alpha * np.eye(N), y)
    f = table(kernel, T, X) @ a
    if project == "after":
        for t, x in enumerate(T):
            f[t] -= sum(a[i] * context(x, X[i]) * (weights[tuple(x)] @ [r(s, X[i]) for s in S]) for i in range(N))
    return f


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(27)
    X, extra, T = (rng.standard_normal((k, 5)) * [4, 4, 1.5, 1.5, 1.5] + [100, 0, 0, 0, 0] for k in (30, 12, 9))
    return X, np.sin(X[:, 1:4]), extra, T


@pytest.mark.parametrize("project", PROJECTIONS)
@pytest.mark.parametrize("unlabelled", [False, True])
@pytest.mark.parametrize("settings", [(8.0, 2.0, 1e-3, 1.0), (2.0, 0.7, 0.05, 0.01)])
def test_agrees_with_the_literal_formulas_to_1e_9(rows, project, unlabelled, settings):
    X, y, extra, T = rows
    extra = extra if unlabelled else None
    for target in (y, y[:, 0]):
        model = ProjectedKernelRidge(2, *settings, project=project).fit(X, target, X_unlabelled=extra)
        expected = oracle(X, target, extra, T, project, 2, *settings)
        found = model.predict(T)
        assert found.shape == expected.shape and found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def test_defaults_are_those_of_the_original_experiment():
    assert ProjectedKernelRidge(1).get_params() == {
        "n_collider_features": 1, "collider_length_scale": 8.0, "context_length_scale": 2.0, "alpha": 1e-3,
        "cme_alpha": 1.0, "project": "before",
    }  # fmt: skip


def test_unprojected_it_is_sklearns_kernel_ridge_with_n_times_alpha(rows):
    X, y, _, T = rows

    def kernel(A, B):
        return (rbf_kernel(A[:, :2], B[:, :2], 1 / 128) + 1) * rbf_kernel(A[:, 2:], B[:, 2:], 1 / 8)

    peer = KernelRidge(alpha=30 * 1e-3, kernel="precomputed").fit(kernel(X, X), y)
    ours = ProjectedKernelRidge(2, project="none").fit(X, y)
    np.testing.assert_allclose(ours.predict(T), peer.predict(kernel(T, X)), atol=1e-9)


def test_with_a_ridge_that_learns_no_conditional_mean_nothing_is_projected(rows):
    X, y, extra, T = rows
    plain = ProjectedKernelRidge(2, project="none").fit(X, y).predict(T)
    for project in ("before", "after"):
        model = ProjectedKernelRidge(2, project=project, cme_alpha=1e12).fit(X, y, extra)
        np.testing.assert_allclose(model.predict(T), plain, atol=1e-6)


def test_after_subtracts_the_conditional_mean_that_the_scm_has():
    # Φ of the fitted function, drawn from the SCM, against what W learned of it from 1,500 rows.
    scm = LinearGaussianSCM.scalar([1, 1], tau=0.5)
    train, test = scm.sample(60, 28), scm.sample(200, 29)
    X, y = kernel_features(train), (train.y[:, 0] - scm.query_predictor(train.q))[:, 0]
    plain = ProjectedKernelRidge(1, project="none").fit(X, y)
    Phi_f = conditional_mean(scm, test, lambda s: plain.predict(kernel_features(s)), "theorem", 400, seed=30)[:, 0]
    error = {}
    for size in (10, 1500):
        extra = kernel_features(scm.sample(size, 31))
        after = ProjectedKernelRidge(1, project="after").fit(X, y, extra)
        T = kernel_features(test)
        error[size] = np.square(plain.predict(T) - after.predict(T) - Phi_f).mean() / np.square(Phi_f).mean()
    assert error[1500] < 0.2 < 0.4 < error[10]  # it falls as the rows grow: .12 here, .07 at 3,000


def test_features_leave_the_target_out():
    sample = VECTOR.sample(5, 32)
    X = kernel_features(sample)
    assert X.shape == (5, 2 + 2 + 9)
    np.testing.assert_array_equal(X[3], [*sample.y_n[3], *sample.q[3], *sample.y[3, 1], *sample.y[3, 2], *sample.y[3, 3]])


def test_many_rows_are_predicted_in_pieces(rows, monkeypatch):
    X, y, extra, T = rows
    model = ProjectedKernelRidge(2).fit(X, y, extra)
    whole = model.predict(T)
    monkeypatch.setattr(kernel_ridge, "PREDICT_ROWS", 4)
    np.testing.assert_allclose(model.predict(T), whole, atol=1e-12)


@pytest.mark.parametrize("project", PROJECTIONS)
def test_equal_rows_are_singular_without_a_ridge(project):
    rng = np.random.default_rng(33)
    for N in (2, 3, 6, 40):
        for scale in (0.5, 5.0):
            X = rng.standard_normal((N, 3)) * scale
            X[-1] = X[0]
            with pytest.raises(UserError, match=rf"alpha = 0: the kernel matrix of {N} rows is singular"):
                ProjectedKernelRidge(1, alpha=0, project=project).fit(X, X[:, 0])
            assert np.isfinite(ProjectedKernelRidge(1, alpha=1e-9, project=project).fit(X, X[:, 0]).predict(X)).all()


@parametrize_with_checks([ProjectedKernelRidge(1, project=project) for project in PROJECTIONS])
def test_scikit_learn_conventions(estimator, check):
    check(estimator)


def test_clone_search_and_pipeline(rows):
    X, y, extra, T = rows
    assert clone(ProjectedKernelRidge(2, alpha=0.5)).get_params()["alpha"] == 0.5
    search = GridSearchCV(ProjectedKernelRidge(2), {"alpha": [1e-3, 10.0]}, cv=3).fit(X, y)
    assert search.best_params_["alpha"] in (1e-3, 10.0)
    # Extra rows pass a pipeline by: unless scaled by hand they are read on the wrong scale.
    scale = ColumnTransformer([("all", StandardScaler(), slice(0, 5))])
    by_hand = clone(scale).fit(X)
    expected = ProjectedKernelRidge(2).fit(by_hand.transform(X), y, by_hand.transform(extra)).predict(by_hand.transform(T))
    pipeline = make_pipeline(scale, ProjectedKernelRidge(2))
    scaled = pipeline.fit(X, y, projectedkernelridge__X_unlabelled=by_hand.transform(extra))
    np.testing.assert_allclose(scaled.predict(T), expected, atol=1e-12)
    assert np.abs(pipeline.fit(X, y, projectedkernelridge__X_unlabelled=extra).predict(T) - expected).max() > 1e-3
    with sklearn.config_context(enable_metadata_routing=True):
        last = ProjectedKernelRidge(2).set_fit_request(X_unlabelled=True)
        routed = Pipeline([("scale", scale), ("ridge", last)], transform_input=["X_unlabelled"])
        np.testing.assert_allclose(routed.fit(X, y, X_unlabelled=extra).predict(T), expected, atol=1e-12)


def test_float32_rows_are_computed_in_float64(rows):
    X, y, extra, T = (a.astype(np.float32) for a in rows)
    found = ProjectedKernelRidge(2).fit(X, y, extra).predict(T)
    expected = ProjectedKernelRidge(2).fit(*(a.astype(np.float64) for a in (X, y, extra))).predict(T.astype(np.float64))
    assert found.dtype == np.float64 and np.array_equal(found, expected)


# --- The experiment ---------------------------------------------------------------------------------------------

SCALAR = LinearGaussianSCM.scalar([1, 1], tau=0.3)


def gain(errors: dict[str, np.ndarray], project: str) -> Estimate:
    return mean_of(errors["none"] - errors[project])


def test_kernel_experiment_is_paired_and_seeded():
    errors = kernel_experiment(SCALAR, 25, [3, 8], 20, 200)
    assert list(errors) == ["none", "after", "before"] and {e.shape for e in errors.values()} == {(2,)}
    alone = kernel_experiment(SCALAR, 25, [8], 20, 200)
    assert all(errors[project][1] == alone[project][0] for project in PROJECTIONS)
    # Extra rows reach the projections and leave the ridge as it is: the three see the same training and test rows.
    without = kernel_experiment(SCALAR, 25, [3, 8], 0, 200)
    assert np.array_equal(without["none"], errors["none"]) and not np.array_equal(without["after"], errors["after"])
    # Test rows are not training rows: with a ridge that interpolates, the error stays above the Bayes risk.
    sharp = kernel_experiment(SCALAR, 25, range(5), 0, 2_000, alpha=1e-6)
    assert sharp["none"].min() > SCALAR.risk_bayes()


def test_the_projection_gains_on_few_rows():
    errors = kernel_experiment(SCALAR, 25, range(20), 100, 300)
    for project in ("before", "after"):
        found = gain(errors, project)
        assert found.value > 4 * found.standard_error


def test_the_loss_on_many_rows_and_its_cure():
    # Where the collider is not linear, 100 extra rows are too few to learn E[r₊ | x₂], 1,000 are enough.
    scm = AdditiveNoiseSCM(lambda q: q, lambda q, y: y[:, 0] + np.sin(2 * y[:, 1]), n=2, tau=0.3)
    few, loss, cure = (kernel_experiment(scm, N, range(20), U, 500) for N, U in [(25, 100), (200, 100), (200, 1000)])
    for project in ("before", "after"):
        assert gain(few, project).value > 3 * gain(few, project).standard_error
        assert gain(loss, project).value < -4 * gain(loss, project).standard_error
        assert gain(cure, project).value > 3 * gain(cure, project).standard_error


# --- Errors -------------------------------------------------------------------------------------------------------

X4, Y4 = np.arange(12.0).reshape(4, 3) ** 1.5, np.arange(4.0)
TWIN = np.vstack([X4, X4[:1]])
S4 = SCALAR.sample(4, 0)


def fit(X=X4, y=Y4, extra=None, c=1, **settings):
    return ProjectedKernelRidge(c, **settings).fit(X, y, extra)


def with_nan(X):
    X = X.copy()
    X.flat[-1] = NAN
    return X


def Phi(kind="theorem", draws=1, predictor=SCALAR.bayes_predictor, seed=0):
    return conditional_mean(SCALAR, S4, predictor, kind, draws, seed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit(c=0), r"n_collider_features must be an integer from 1 to 2, got 0: X has n_features = 3"),
        (lambda: fit(c=3), r"n_collider_features .* got 3"),
        (lambda: fit(c=1.0), r"n_collider_features must be an integer .* got 1.0"),
        (lambda: fit(project="both"), r'project must be "none", "before" or "after", got \'both\''),
        (lambda: fit(collider_length_scale=0.0), r"collider_length_scale must be positive and finite, got 0.0"),
        (lambda: fit(context_length_scale=NAN), r"context_length_scale .* got nan"),
        (lambda: fit(alpha=-1.0), r"alpha must be finite and at least 0, got -1.0"),
        (lambda: fit(cme_alpha=math.inf), r"cme_alpha must be .* got inf"),
        (lambda: fit(X4[:0], Y4[:0]), r"0 sample\(s\) .* minimum of 1 .* ProjectedKernelRidge"),
        (lambda: fit(with_nan(X4)), r"Input X contains NaN"),
        (lambda: fit(y=with_nan(Y4)), r"Input y contains NaN"),
        (lambda: fit(y=Y4[:3]), r"inconsistent numbers of samples: \[4, 3\]"),
        (lambda: fit(extra=X4[:, :2]), r"X_unlabelled: X has 2 features, .* expecting 3"),
        (lambda: fit(extra=with_nan(X4)), r"X_unlabelled: Input X contains NaN"),
        (lambda: fit(extra=X4[:0]), r"X_unlabelled: .* 0 sample\(s\) .* Pass None"),
        (lambda: fit().predict(X4[:, :2]), r"X has 2 features, .* expecting 3"),
        (lambda: fit(TWIN, [*Y4, 0.0], alpha=0.0), r"alpha = 0.0: the kernel matrix of 5 rows is singular .* raise it"),
        (lambda: fit(TWIN, [*Y4, 0.0], alpha=0.0, project="none"), r"alpha = 0.0: .* 5 rows is singular"),
        (lambda: fit(extra=X4[:2], cme_alpha=0.0), r"cme_alpha = 0.0: the kernel matrix of 6 rows is singular"),
        (lambda: risk_gap_theorem1(Y_0, F[:3], PHI_F, M), r"f: must have shape \(N = 4, p = 1\), .* got \(3, 1\)"),
        (lambda: risk_gap_corollary2(Y_0, F, PHI_F, with_nan(np.array(M))), r"m: nan at \(3, 0\) is not finite"),
        (lambda: calibration_slope(Y_0, F, lambda s: s.q, M), r"Phi_f: a callable needs a Sample .* pass that as y_0"),
        (lambda: calibration_slope(Y_0, F, F, M), r"f and Phi_f are equal in every row"),
        (lambda: risk_gap_theorem1(Y_0, F, PHI_F, M, groups=[1, 2]), r"groups: .* 4 rows, got shape \(2,\)"),
        (lambda: risk_gap_theorem1(Y_0, F, PHI_F, M, groups=[1] * 4), r"groups: 4 rows in 1 group"),
        (lambda: risk_gap_theorem1([1.0], [1.0], [1.0], [1.0]), r"1 rows in 1 group; .* at least 2"),
        (lambda: leave_one_out_mean(np.eye(3), [0, 0, 1]), r"groups: 1 of 2 groups have a single row"),
        (lambda: leave_one_out_mean(np.eye(3), [0, 0]), r"groups: .* 3 rows, got shape \(2,\)"),
        (lambda: Phi(kind="paper"), r'kind: must be "theorem" or "algorithm", got \'paper\''),
        (lambda: Phi(draws=0), r"draws: 0 must be an integer of at least 1"),
        (lambda: Phi(predictor=lambda s: s.y), r"predictor: returned shape \(4, 2, 1\) instead of \(N, p\) = \(4, 1\)"),
        (lambda: projected_risk(SCALAR, "exact", 4), r'kind: must be .* got \'exact\''),
        (lambda: projected_risk(SCALAR, "theorem", 0), r"draws, rollout_variance: got 0 and 0.0"),
        (lambda: projected_risk(SCALAR, "theorem", 4, rollout_variance=-1), r"got 4 and -1"),
        (lambda: projected_risk(SCALAR, "theorem", 4, np.eye(2)), r"F_n: must have shape \(p = 1, r = 1\)"),
        (lambda: projected_slope(SCALAR, "theorem", 1), r"draws = 1: f − Φf is 0"),
    ],
)  # fmt: skip
def test_bad_input_is_told_by_name(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_module_leaves_torch_alone():
    code = "import sys, gcpo_repro.projection; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
