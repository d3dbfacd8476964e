"""scm.py against Gaussian conditioning of a joint covariance, brute-force enumeration, and simulation.

The joint covariance is built here from the equations of the model, noise by noise; nothing of the closed forms is used.
Simulated means are compared in units of their standard error, with fixed seeds: |z| < 4.5.
"""

from __future__ import annotations

import itertools
import subprocess
import sys

import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
import pytest
from matplotlib.colors import to_hex

from gcpo_repro.errors import UserError
from gcpo_repro.scm import (
    AdditiveNoiseSCM,
    LinearGaussianSCM,
    ReasoningSCM,
    Sample,
    causal_graph,
    d_separated,
    draw,
    keep_mixed_groups,
    linear_predictor,
    nonlinear_fork,
    symmetric_collider,
    weak_collider,
)

NAN, RNG = np.nan, np.random.default_rng(0)


def vector_scm(seed: int = 0, rho: float = 0.0, n: int = 4, p: int = 2, d: int = 3, r: int = 2) -> LinearGaussianSCM:
    rng = np.random.default_rng(seed)
    S_e, S_h = (np.cov(rng.standard_normal((k, 4 * k))) + 0.1 * np.eye(k) for k in (p, r))
    A, B, C = (rng.standard_normal(shape) for shape in ((p, d), (r, d), (n, r, p)))
    return LinearGaussianSCM(A, B, C, S_e.reshape(p, p), S_h.reshape(r, r), rho)


def coefficients(scm: LinearGaussianSCM, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(shape) for shape in ((scm.p, scm.d), (scm.n - 1, scm.p, scm.p), (scm.p, scm.r)))


class Joint:
    """All variables as linear maps of independent standard normals (q, w, v_0 … v_{n−1}, noise of y_n)."""

    def __init__(self, scm: LinearGaussianSCM):
        n, p, d, r = scm.n, scm.p, scm.d, scm.r
        L_e, L_h = np.linalg.cholesky(scm.S_e), np.linalg.cholesky(scm.S_h)
        noises = np.eye(d + p + n * p + r)
        self.q, w = noises[:d], noises[d : d + p]
        v = noises[d + p : d + p + n * p].reshape(n, p, -1)
        self.y = [scm.A @ self.q + L_e @ (np.sqrt(scm.rho) * w + np.sqrt(1 - scm.rho) * v[i]) for i in range(n)]
        self.y_n = scm.B @ self.q + sum(scm.C[i] @ self.y[i] for i in range(n)) + L_h @ noises[-r:]
        self.G = np.vstack([self.q, *self.y[1:]])

    @staticmethod
    def regress(target: np.ndarray, on: np.ndarray) -> np.ndarray:
        """E[target | on], as a map of the noises."""
        return target @ on.T @ np.linalg.solve(on @ on.T, on)

    @staticmethod
    def left(target: np.ndarray, given: np.ndarray) -> np.ndarray:
        return target - Joint.regress(target, given)

    def predictor(self, F_q, F_y, F_n) -> np.ndarray:
        return F_q @ self.q + sum(F @ y for F, y in zip(F_y, self.y[1:], strict=True)) + F_n @ self.y_n

    def risk(self, f: np.ndarray) -> float:
        return float(np.sum((self.y[0] - f) ** 2))


def z_score(values: np.ndarray, expected: float | np.ndarray) -> np.ndarray:
    return (values.mean(0) - expected) / (values.std(0) / np.sqrt(len(values)))


MODELS = {"A2": vector_scm(), "shared latent": vector_scm(1, rho=0.4), "n = 2": vector_scm(2, 0.7, n=2, p=3, r=1)}
models = pytest.mark.parametrize("scm", MODELS.values(), ids=MODELS.keys())

# --- Linear-Gaussian: Gaussian conditioning ----------------------------------------------------------------------


@models
@pytest.mark.parametrize("given", ["q", "q,yn", "all"])
def test_conditional_covariances(scm: LinearGaussianSCM, given: str):
    joint = Joint(scm)
    for i, j in itertools.product(range(scm.n), repeat=2):
        others = [y for k, y in enumerate(joint.y) if k not in (i, j)]
        known = {"q": [joint.q], "q,yn": [joint.q, joint.y_n], "all": [joint.q, joint.y_n, *others]}[given]
        left = [joint.left(y, np.vstack(known)) for y in (joint.y[i], joint.y[j])]
        np.testing.assert_allclose(scm.conditional_covariance(i, j, given), left[0] @ left[1].T, atol=1e-12)


@models
def test_predictors_and_risks(scm: LinearGaussianSCM):
    joint = Joint(scm)
    m, mu = joint.regress(joint.y[0], joint.q), joint.regress(joint.y[0], np.vstack([joint.G, joint.y_n]))
    np.testing.assert_allclose(joint.predictor(*scm.bayes_coefficients()), mu, atol=1e-12)
    assert scm.risk_query() == pytest.approx(joint.risk(m), rel=1e-12)
    assert scm.risk_bayes() == pytest.approx(joint.risk(mu), rel=1e-12)
    noises = np.random.default_rng(0).standard_normal((50, joint.q.shape[1]))
    sample = Sample(noises @ joint.q.T, np.stack([noises @ y.T for y in joint.y], 1), noises @ joint.y_n.T)
    np.testing.assert_allclose(scm.query_predictor(sample.q), noises @ m.T, atol=1e-12)
    np.testing.assert_allclose(scm.bayes_predictor(sample), noises @ mu.T, atol=1e-12)


@models
@pytest.mark.parametrize("seed", range(5))
def test_gaps_of_any_linear_predictor(scm: LinearGaussianSCM, seed: int):
    joint, F = Joint(scm), coefficients(scm, seed)
    f, m = joint.predictor(*F), joint.regress(joint.y[0], joint.q)
    projected = joint.left(f, joint.G) + m
    assert scm.theorem1_gap(*F) == pytest.approx(joint.risk(f) - joint.risk(projected), rel=1e-10)
    assert scm.corollary2_gap(*F) == pytest.approx(joint.risk(m) - joint.risk(projected), rel=1e-10)


def test_the_paper_s_statements():
    scm = MODELS["A2"]
    mu = scm.bayes_coefficients()
    # At the Bayes predictor Theorem 1 says 0 = 0 and Corollary 2 gives what y_n explains.
    assert scm.theorem1_gap(*mu) == pytest.approx(0, abs=1e-12)
    explained = scm.risk_query() - scm.risk_bayes()
    assert scm.corollary2_gap(*mu) == pytest.approx(explained) and explained > 0
    for seed in range(50):
        F = coefficients(scm, seed)
        assert scm.theorem1_gap(*F) > 0
        assert scm.corollary2_gap(*F) < scm.corollary2_gap(*mu)
    # Nothing in y_n about y_0: no gain.
    blind = LinearGaussianSCM(scm.A, scm.B, scm.C * np.array([0, 1, 1, 1])[:, None, None], scm.S_e, scm.S_h)
    assert blind.corollary2_gap(*blind.bayes_coefficients()) == 0 and blind.risk_bayes() == pytest.approx(blind.risk_query())


@pytest.mark.parametrize("a", [0.5, 1.0, 1.5])
def test_corollary2_counter_example(a: float):
    # q constant, y_0, y_1 ~ N(0, 1), y_2 = y_0 + y_1 + N(0, 1), f = a (y_2 − y_1): Ψf = a (y_0 + η), and the gap
    # 1 − E(y_0 − a (y_0 + η))² = 1 − (1 − a)² − a² = 2a − 2a².
    scm = LinearGaussianSCM.scalar([1, 1], tau=1, a=0, b=0)
    assert scm.corollary2_gap([[0]], [[[-a]]], [[a]]) == pytest.approx(2 * a - 2 * a**2)


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.8])
def test_a_shared_latent_reverses_theorem1(rho: float):
    # y_2 = y_0 + y_1 + .5 η, f Bayes: E[f | G] = E[y_0 | G] = ρ y_1, which Π replaces by 0: the gap is −E(ρ y_1)².
    scm = LinearGaussianSCM.scalar([1, 1], tau=0.5, a=0, b=0, rho=rho)
    assert scm.theorem1_gap(*scm.bayes_coefficients()) == pytest.approx(-(rho**2), abs=1e-12)


@pytest.mark.parametrize("c", [(1, 1, 1), (2, -1, 0.5, 1), (0.3, 0.3)])
@pytest.mark.parametrize("tau", [0.1, 1.0, 3.0])
def test_scalar_partial_correlations(c: tuple[float, ...], tau: float):
    s = 0.7
    scm = LinearGaussianSCM.scalar(c, tau, s, a=2.0, b=-1.0)
    D = s**2 * np.sum(np.square(c)) + tau**2
    for i, j in itertools.permutations(range(len(c)), 2):
        # The precision of (y_i, y_j) given q, y_n and the others is 1/s² on the diagonal plus c c'/τ².
        a, b, both = s**2 * c[i] ** 2, s**2 * c[j] ** 2, s**2 * c[i] * c[j]
        rho = scm.partial_correlation(i, j, "q,yn")
        assert rho == pytest.approx(-both / np.sqrt((D - a) * (D - b)))
        assert scm.partial_correlation(i, j, "all") == pytest.approx(-both / np.sqrt((a + tau**2) * (b + tau**2)))
        assert scm.partial_correlation(i, j, "q") == 0
        assert np.sign(rho) == -np.sign(c[i] * c[j])  # equal signs compete, opposite ones cooperate


def test_partial_correlation_without_integration_noise():
    for n in (2, 3, 5):
        scm = LinearGaussianSCM.scalar([1.0] * n, tau=0.0)
        assert scm.partial_correlation(0, 1, "q,yn") == pytest.approx(-1 / (n - 1))
        assert scm.partial_correlation(0, 1, "all") == pytest.approx(-1)
    with pytest.raises(UserError, match="given: 'all' leaves y_0 or y_1 without variance"):
        LinearGaussianSCM.scalar([1, 0], tau=0.0).partial_correlation(0, 1, "all")


def test_integration_without_noise_determines_y_0():
    scm = LinearGaussianSCM(np.eye(2), np.eye(2), np.stack([np.eye(2)] * 3), np.eye(2), np.zeros((2, 2)))
    sample = scm.sample(20, 0)
    np.testing.assert_allclose(sample.y_n, sample.q + sample.y.sum(1))
    np.testing.assert_allclose(scm.bayes_predictor(sample), sample.y[:, 0], atol=1e-12)
    assert scm.risk_bayes() == pytest.approx(0, abs=1e-12)
    # S_u = C_0 S_e C_0ᵀ of rank 1: y_n's two columns tell the same, twice; the pseudo-inverse takes it once.
    C = np.ones((2, 2, 1))
    twice = LinearGaussianSCM([[1.0]], [[0.0], [0.0]], C, [[1.0]], np.zeros((2, 2)))
    np.testing.assert_allclose(twice.bayes_predictor(twice.sample(9, 1)), twice.sample(9, 1).y[:, 0], atol=1e-12)
    with pytest.raises(UserError, match="S_h: .* collinear"):
        twice.ols_gaps(100)


# --- Linear-Gaussian: simulation --------------------------------------------------------------------------------


@models
def test_samples_have_the_joint_covariance(scm: LinearGaussianSCM):
    joint, sample = Joint(scm), scm.sample(50_000, 3)
    X = np.hstack([sample.q, sample.y.reshape(len(sample.q), -1), sample.y_n])
    L = np.vstack([joint.q, *joint.y, joint.y_n])
    assert np.abs(z_score(X, 0)).max() < 4.5
    products = z_score((X[:, :, None] * X[:, None]).reshape(len(X), -1), (L @ L.T).ravel())
    assert np.abs(products).max() < 4.5


@models
def test_simulated_risks_and_gaps(scm: LinearGaussianSCM):
    sample, F = scm.sample(200_000, 4), coefficients(scm, 8)
    f, mu, m = linear_predictor(*F)(sample), scm.bayes_predictor(sample), scm.query_predictor(sample.q)
    G = np.hstack([sample.q, sample.y[:, 1:].reshape(len(f), -1)])
    projected = f - G @ np.linalg.lstsq(G, f, rcond=None)[0] + m  # Φ by least squares on 200,000 rows

    def loss(prediction: np.ndarray) -> np.ndarray:
        return np.sum((sample.y[:, 0] - prediction) ** 2, axis=1)

    checks = {
        scm.risk_query(): loss(m), scm.risk_bayes(): loss(mu), scm.theorem1_gap(*F): loss(f) - loss(projected),
        scm.corollary2_gap(*F): loss(m) - loss(projected),
    }  # fmt: skip
    assert max(abs(z_score(values, expected)) for expected, values in checks.items()) < 4.5


@pytest.mark.parametrize("rows", [12, 40])
@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_simulated_ols_gaps(rows: int, rho: float):
    scm = LinearGaussianSCM.scalar([0.5, 1, -1], tau=1, rho=rho)
    fits, gaps = 4000, []
    sample = scm.sample(fits * rows, 5)
    X = np.hstack([sample.q, sample.y[:, 1:, 0], sample.y_n]).reshape(fits, rows, 4)
    y_0 = sample.y[:, 0].reshape(fits, rows, 1)
    for F in np.linalg.solve(X.transpose(0, 2, 1) @ X, X.transpose(0, 2, 1) @ y_0)[:, :, 0]:
        coefs = F[None, :1], F[1:3, None, None], F[None, 3:]
        gaps.append((scm.theorem1_gap(*coefs), scm.corollary2_gap(*coefs)))
    assert np.abs(z_score(np.array(gaps), np.array(scm.ols_gaps(rows)))).max() < 4.5


def test_least_squares_loses_corollary2_on_few_rows_and_weak_colliders():
    # c = ½, τ = 1: of tr S_e = 1, y_n explains ¼ / (¼ + 1) = .2 and leaves .8; p_x = 4. N = 7: .2 − .8 / 2; N = 105:
    # .2 − .8 / 100. Theorem 1, p_G = 3: .8 · 3 / 2.
    scm = LinearGaussianSCM.scalar([0.5] * 3, tau=1)
    assert scm.ols_gaps(7) == pytest.approx((1.2, -0.2))
    assert scm.ols_gaps(105).corollary2 == pytest.approx(0.192)
    assert LinearGaussianSCM.scalar([0.05] * 3, tau=1).ols_gaps(105).corollary2 < 0


@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_fresh_candidates(rho: float):
    scm = LinearGaussianSCM.scalar([1, 1], tau=1, a=2, s=0.5, rho=rho)
    q = np.full((200_000, 1), 1.5)
    y = scm.draw_candidates(q, 3, np.random.default_rng(0))
    assert y.shape == (200_000, 3, 1)
    e = (y[:, :, 0] - 3.0) / 0.5
    assert np.abs(z_score(e, 0)).max() < 4.5
    assert np.abs(z_score(e[:, [0, 0, 1]] * e[:, [1, 2, 2]], rho)).max() < 4.5


@pytest.mark.parametrize("scm", [vector_scm(), vector_scm(rho=0.3), nonlinear_fork(), ReasoningSCM(4, fidelity=0.5)])
def test_every_draw_comes_from_the_seed(scm):
    state = np.random.get_state()[1].copy()
    first, again, other = scm.sample(7, 5), scm.sample(7, np.random.default_rng(5)), scm.sample(7, 6)
    for name in ("q", "y", "y_n"):
        assert np.array_equal(getattr(first, name), getattr(again, name)) and getattr(first, name).dtype == np.float64
    assert not np.array_equal(first.q, other.q)
    assert first.q.shape == (7, scm.d) and first.y.shape == (7, scm.n, scm.p) and first.y_n.shape == (7, scm.r)
    rng = np.random.default_rng(5)
    assert not np.array_equal(scm.sample(7, rng).q, scm.sample(7, rng).q)
    assert np.array_equal(np.random.get_state()[1], state)


@pytest.mark.parametrize("scm", [vector_scm(rho=0.3), ReasoningSCM(4, fidelity=0.5)])
def test_predictors_never_read_y_0(scm):
    sample = scm.sample(50, 0)
    y = sample.y.copy()
    y[:, 0] = 1 - y[:, 0]
    changed = Sample(sample.q, y, sample.y_n)
    assert np.array_equal(scm.bayes_predictor(sample), scm.bayes_predictor(changed))
    with pytest.raises(AttributeError):
        sample.q = sample.q


# --- Additive noise --------------------------------------------------------------------------------------------


def test_additive_noise_contains_the_linear_model():
    linear = LinearGaussianSCM.scalar([0.5, -1, 2], tau=0.3, s=0.7, a=2.0, b=-1.0)
    weights = np.array([0.5, -1, 2])[:, None]
    same = AdditiveNoiseSCM(lambda q: 2 * q, lambda q, y: -q + (weights * y).sum(1), 3, 0.7, 0.3)
    a, b = linear.sample(100, 3), same.sample(100, 3)
    np.testing.assert_allclose(a.y, b.y)
    np.testing.assert_allclose(a.y_n, b.y_n)
    np.testing.assert_allclose(linear.query_predictor(a.q), same.query_predictor(a.q))


def test_additive_noise_with_vectors():
    W = np.array([[1.0, -1.0], [0.5, 2.0]])
    scm = AdditiveNoiseSCM(lambda q: np.tanh(q @ W.T), lambda q, y: y.prod(1)[:, :1], 3, s=0.5, tau=0.1, d=2, p=2)
    sample = scm.sample(100_000, 0)
    e = (sample.y - np.tanh(sample.q @ W.T)[:, None]).reshape(-1, 6) / 0.5
    eta = (sample.y_n - sample.y.prod(1)[:, :1]) / 0.1
    noise = np.hstack([e, eta])
    assert np.abs(z_score((noise[:, :, None] * noise[:, None]).reshape(-1, 49), np.eye(7).ravel())).max() < 4.5


def test_named_models_are_what_they_say():
    for scm, fork, collider in (
        (nonlinear_fork(), lambda q: np.sin(2 * q), lambda q, y: q + y.sum(1)),
        (weak_collider(), lambda q: q, lambda q, y: q + 0.15 * y.sum(1)),
        (symmetric_collider(), lambda q: 0 * q, lambda q, y: q + abs(y[:, 0]) * abs(y[:, 1])),
    ):
        sample = scm.sample(100_000, 1)
        e, eta = sample.y - fork(sample.q)[:, None], sample.y_n - collider(sample.q, sample.y)
        assert np.abs(z_score(e[:, :, 0] ** 2, scm.s**2)).max() < 4.5 and abs(z_score(eta[:, 0] ** 2, scm.tau**2)) < 4.5
        assert np.abs(z_score(e[:, :, 0] * sample.q, 0)).max() < 4.5


# --- Answers right or wrong ---------------------------------------------------------------------------------------


def enumerated(n: int, P: float, weight: float, fidelity: float) -> dict[tuple[int, ...], float]:
    """P(y_0 … y_{n−1}, y_n | q) of all 2^{n+1} outcomes."""
    table = {}
    for votes in itertools.product((0, 1), repeat=n):
        k = sum(votes)
        vote = 1.0 if weight * k > n - k else 0.5 if weight * k == n - k else 0.0
        right = fidelity * vote + (1 - fidelity) * P
        for y_n in (0, 1):
            table[*votes, y_n] = P**k * (1 - P) ** (n - k) * (right if y_n else 1 - right)
    return table


REASONING = [(2, 1.0, 1.0), (2, 0.5, 0.8), (3, 1.0, 0.6), (4, 2.0, 1.0), (5, 1.0, 0.9)]


@pytest.mark.parametrize(("n", "weight", "fidelity"), REASONING)
def test_reasoning_by_enumeration(n: int, weight: float, fidelity: float):
    q = np.array([[-2.0], [0.0], [1.0]])
    scm = ReasoningSCM(n, weight, fidelity)
    for row, P in enumerate(1 / (1 + np.exp(q[:, 0]))):
        assert scm.query_predictor(q)[row, 0] == pytest.approx(P)
        table = enumerated(n, P, weight, fidelity)
        for y_n in (0, 1):
            kept = {votes: weight_ for votes, weight_ in table.items() if votes[-1] == y_n}
            total = sum(kept.values())
            mean = sum(w * votes[0] for votes, w in kept.items()) / total
            both = sum(w * votes[0] * votes[1] for votes, w in kept.items()) / total
            expected = (both - mean**2) / (mean * (1 - mean))
            assert scm.conditional_correlation(q, y_n)[row] == pytest.approx(expected, abs=1e-12)
        for votes, weight_ in table.items():
            partner = table[1 - votes[0], *votes[1:]]
            if weight_ + partner > 0:
                sample = Sample(q[[row]], np.array(votes[:-1])[None, :, None], [[votes[-1]]])
                right = weight_ if votes[0] else partner
                assert scm.bayes_predictor(sample)[0, 0] == pytest.approx(right / (weight_ + partner))


@pytest.mark.parametrize(("n", "weight", "fidelity"), REASONING)
def test_reasoning_by_simulation(n: int, weight: float, fidelity: float):
    scm = ReasoningSCM(n, weight, fidelity, right=lambda q: np.full(len(q), 0.4))
    sample = scm.sample(200_000, 2)
    a, b = sample.y[:, 0, 0] - 0.4, sample.y[:, 1, 0] - 0.4
    assert abs(z_score(a * b, 0)) < 4.5  # given q alone: none
    for y_n in (0, 1):
        x, y = sample.y[sample.y_n[:, 0] == y_n][:, :2, 0].T
        expected = scm.conditional_correlation(np.zeros((1, 1)), y_n)[0]
        # The correlation as the slope of y on x: its residual products have mean 0 at the right value.
        x, y = (x - x.mean()) / x.std(), (y - y.mean()) / y.std()
        assert abs(z_score(x * y - expected * (x**2 + y**2) / 2, 0)) < 4.5
    m, mu = scm.query_predictor(sample.q), scm.bayes_predictor(sample)
    gain = (sample.y[:, 0] - m) ** 2 - (sample.y[:, 0] - mu) ** 2
    assert abs(z_score(gain, np.mean((mu - m) ** 2))) < 4.5 and gain.mean() > 0  # Corollary 2 at the Bayes predictor


def test_explaining_away():
    # n = 3, p = ½, a right majority: 111, 110, 101, 011 are equally likely. E = ¾, E of both = ½: −1/16 over 3/16.
    even = {"right": lambda q: np.full(len(q), 0.5)}
    assert ReasoningSCM(3, **even).conditional_correlation([[0.0]], 1)[0] == pytest.approx(-1 / 3)
    q = np.linspace(-4, 4, 41)[:, None]
    for n, weight, y_n in itertools.product((2, 3, 4, 7), (0.3, 1.0, 6.0), (0, 1)):
        correlation = ReasoningSCM(n, weight).conditional_correlation(q, y_n)
        assert (np.isnan(correlation) | (correlation <= 1e-12)).all()
    for weight, fidelity in itertools.product((1.0, 6.0), (0.2, 0.9)):
        assert (ReasoningSCM(2, weight, fidelity).conditional_correlation(q, 1) < 0).all()
    # Both must be right: a right y_n speaks for both, a wrong one lets them compete.
    both = ReasoningSCM(2, 0.5, 0.8)
    assert (both.conditional_correlation(q, 1) > 0).all() and (both.conditional_correlation(q, 0) < 0).all()
    assert ReasoningSCM(3, 1.0, 0.5).conditional_correlation([[3.0]], 1)[0] > 0  # a hard question
    assert np.isnan(ReasoningSCM(2, 0.5).conditional_correlation(q, 1)).all()  # then both are right, always
    assert ReasoningSCM(4, fidelity=0).conditional_correlation(q, 1) == pytest.approx(0)  # no collider


@pytest.mark.parametrize("n", [2, 3, 4, 6])
def test_mixed_groups_of_fair_rewards(n: int):
    rewards = np.array(list(itertools.product((0.0, 1.0), repeat=n)))  # all equally likely
    kept = rewards[keep_mixed_groups(rewards)]
    assert len(kept) == 2**n - 2
    # Mean ½ and variance ¼, as before; of 2^n − 2 groups 2^{n−2} − 1 have r_0 = r_1 = 1. (that / … − ¼) / ¼:
    expected = 4 * (2 ** (n - 2) - 1) / (2**n - 2) - 1
    assert np.corrcoef(kept.T)[0, 1] == pytest.approx(expected)
    assert n != 4 or expected == pytest.approx(-1 / 7)


def test_mixed_groups_with_other_rewards():
    assert keep_mixed_groups([[0.2, 0.2], [0.2, 0.3], [-1, -1]]).tolist() == [False, True, False]


# --- The graph -----------------------------------------------------------------------------------------------------


def separated_by_moralisation(graph: nx.DiGraph, x: str, y: str, given: set[str]) -> bool:
    """Lauritzen's criterion: no path in the moral graph of the ancestors, once `given` is removed."""
    ancestors = set.union(*(nx.ancestors(graph, node) | {node} for node in {x, y} | given))
    moral = nx.moral_graph(graph.subgraph(ancestors))
    moral.remove_nodes_from(given)
    return not nx.has_path(moral, x, y)


def test_d_separation_on_every_subset():
    graph = causal_graph(2, descendant=True, reward_filter=True)
    assert set(graph) == {"q", "y0", "y1", "yn", "d", "r0", "r1", "filter"}
    verdicts = []
    for x, y in itertools.combinations(graph, 2):
        rest = [node for node in graph if node not in (x, y)]
        for given in itertools.chain.from_iterable(itertools.combinations(rest, k) for k in range(len(rest) + 1)):
            verdicts.append(d_separated(x, y, given, graph=graph))
            assert verdicts[-1] == separated_by_moralisation(graph, x, y, set(given))
    assert 0 < sum(verdicts) < len(verdicts)


def test_d_separation_of_the_paper():
    assert d_separated("y0", {"y1", "y2"}, "q", graph=3)  # the fork
    assert not d_separated("y0", "y1", graph=3)
    assert not d_separated("y0", "y1", ["q", "yn"], graph=3)  # the collider
    assert not d_separated("y0", "y1", {"q", "yn", "y2"}, graph=3)
    assert not d_separated("y0", "y1", {"q", "d"}, graph=causal_graph(3, descendant=True))  # a descendant of it
    filtered = causal_graph(3, reward_filter=True)
    assert not d_separated("y0", "y1", {"q", "filter"}, graph=filtered)  # groups kept by their rewards: A2 is gone
    assert d_separated("y0", "y1", "q", graph=filtered) and d_separated("y0", "y1", {"q", "r0", "r1"}, graph=filtered)


def test_linear_model_agrees_with_the_graph():
    scm = LinearGaussianSCM.scalar([1, -0.5, 2], tau=1)
    for given, nodes in {"q": {"q"}, "q,yn": {"q", "yn"}, "all": {"q", "yn", "y2"}}.items():
        assert (scm.partial_correlation(0, 1, given) == 0) == d_separated("y0", "y1", nodes, graph=3)


def test_drawing():
    graph = causal_graph(4, descendant=True, reward_filter=True)
    figure = draw(graph, given={"q", "filter"})
    axes = figure.axes[0]
    nodes = axes.collections[0]
    shaded = [to_hex(color) == "#c9c9c9" for color in nodes.get_facecolor()]
    assert {node for node, dark in zip(graph, shaded, strict=True) if dark} == {"q", "filter"}
    assert len({tuple(place) for place in nodes.get_offsets().round(6)}) == len(graph)
    assert {text.get_text() for text in axes.texts} >= {"$q_{}$", "$y_{0}$", "$y_{n}$", "$r_{3}$", "filter"}
    assert len(axes.patches) == graph.number_of_edges()
    left_to_right = dict(zip(graph, nodes.get_offsets()[:, 0], strict=True))
    assert left_to_right["q"] < min(left_to_right[f"y{i}"] for i in range(4)) < left_to_right["yn"] < left_to_right["d"]
    plt.close(figure)


# --- Errors ---------------------------------------------------------------------------------------------------------

SCALAR = LinearGaussianSCM.scalar([1, 1], tau=1)
GOOD = {"A": [[1.0]], "B": [[1.0]], "C": np.ones((2, 1, 1)), "S_e": [[1.0]], "S_h": [[1.0]]}


def additive(**changes):
    arguments = {"fork": lambda q: q, "collider": lambda q, y: y.sum(1), "n": 2, **changes}
    return AdditiveNoiseSCM(**arguments).sample(3, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LinearGaussianSCM(**{**GOOD, "A": [1.0]}), r"A: must have shape \(p, d\), .* got \(1,\)"),
        (lambda: LinearGaussianSCM(**{**GOOD, "A": [["a"]]}), r"A: not an array of numbers"),
        (lambda: LinearGaussianSCM(**{**GOOD, "A": [[NAN]]}), r"A: nan at \(0, 0\) is not finite"),
        (lambda: LinearGaussianSCM(**{**GOOD, "B": [[1.0, 2.0]]}), r"B: must have shape \(r = 1, d = 1\)"),
        (lambda: LinearGaussianSCM(**{**GOOD, "C": np.ones((2, 1, 2))}), r"C: must have shape \(n, r, p = 1\)"),
        (lambda: LinearGaussianSCM(**{**GOOD, "C": np.ones((1, 1, 1))}), r"n, the first axis of C,: 1 must be"),
        (lambda: LinearGaussianSCM(**{**GOOD, "S_e": [[0.0]]}), r"S_e: \[\[0.0\]\] is singular"),
        (lambda: LinearGaussianSCM(**{**GOOD, "S_h": [[-1.0]]}), r"S_h: \[\[-1.0\]\] has the negative eigenvalue -1"),
        (lambda: LinearGaussianSCM(**GOOD, rho=1.0), r"rho: 1.0 must lie in \[0, 1\)"),
        (lambda: LinearGaussianSCM(**GOOD, rho=NAN), r"rho: nan"),
        (
            lambda: LinearGaussianSCM(np.eye(2), np.eye(2), np.ones((2, 2, 2)), [[1, 0.5], [0, 1]], np.eye(2)),
            r"S_e: \[\[1.0, 0.5\], \[0.0, 1.0\]\] is not symmetric",
        ),
        (lambda: SCALAR.sample(0, 0), r"size: 0 must be an integer of at least 1"),
        (lambda: SCALAR.sample(2.5, 0), r"size: 2.5"),
        (lambda: SCALAR.sample(2, None), r"seed: None must be an integer"),
        (lambda: SCALAR.sample(2, -1), r"seed: -1 must be"),
        (lambda: SCALAR.query_predictor(np.ones(3)), r"q: must have shape \(N, d = 1\), .* got \(3,\)"),
        (lambda: SCALAR.integrate(np.ones((3, 1)), np.ones((2, 2, 1)), None), r"y: must have shape \(N = 3, n = 2"),
        (lambda: SCALAR.conditional_covariance(0, 2, "q"), r"j: there is no candidate 2; they are 0 … 1"),
        (lambda: SCALAR.conditional_covariance(-1, 0, "q"), r"i: there is no candidate -1"),
        (lambda: SCALAR.partial_correlation(0, 1, "yn"), r"given: 'yn' is not known; choose \"q\""),
        (lambda: SCALAR.partial_correlation(1, 1, "q"), r"i, j: both are 1"),
        (lambda: vector_scm().partial_correlation(0, 1, "q"), r"partial_correlation: p = 2"),
        (lambda: SCALAR.theorem1_gap([[1, 2]], [[[1]]], [[1]]), r"F_q: must have shape \(p = 1, d = 1\)"),
        (lambda: SCALAR.corollary2_gap([[1]], [[[1]], [[1]]], [[1]]), r"F_y: .*\(n−1 = 1, p = 1, p = 1\)"),
        (lambda: SCALAR.ols_gaps(4), r"rows: 4 are too few for p_x = 3 regressors; pass at least 5"),
        (lambda: Sample(np.ones((3, 1)), np.ones((2, 2, 1)), np.ones((3, 1))), r"y: must have shape \(N = 3, n, p\)"),
        (lambda: Sample(1.0, np.ones((2, 2, 1)), np.ones((3, 1))), r"q: must have shape \(N, d\)"),
        (lambda: additive(n=1), r"n: 1 must be an integer of at least 2"),
        (lambda: additive(s=0.0), r"s, tau: got 0.0 and 1.0"),
        (lambda: additive(tau=NAN), r"s, tau: got 1.0 and nan"),
        (lambda: additive(fork=lambda q: q[:, 0]), r"fork\(q\): must have shape \(N = 3, p = 1\), .* got \(3,\)"),
        (lambda: additive(collider=lambda q, y: y), r"collider\(q, y\): must have shape \(N = 3, r = 1\)"),
        (lambda: additive(collider=lambda q, y: q / 0), r"collider\(q, y\): .* is not finite"),
        (lambda: ReasoningSCM(1), r"n: 1 must be"),
        (lambda: ReasoningSCM(2, weight=0), r"weight, fidelity: got 0 and 1.0"),
        (lambda: ReasoningSCM(2, fidelity=1.5), r"weight, fidelity: got 1.0 and 1.5"),
        (lambda: ReasoningSCM(2, right=lambda q: q[:, 0] + 9).sample(3, 0), r"right: gave values from .* lie in \[0, 1\]"),
        (lambda: ReasoningSCM(2).integrate(np.ones((1, 1)), np.full((1, 2, 1), 0.5), RNG), r"y: answers .* 0 \(wrong\)"),
        (lambda: ReasoningSCM(2).conditional_correlation([[0.0]], 2), r"y_n: 2 must be 1"),
        (lambda: keep_mixed_groups([[1.0, NAN]]), r"rewards: nan at \(0, 1\)"),
        (lambda: keep_mixed_groups([1.0, 0.0]), r"rewards: must have shape \(N, n\)"),
        (lambda: causal_graph(1), r"n: 1 must be"),
        (lambda: d_separated("y0", "y2", "q", graph=2), r"y: \['y2'\] not in the graph, whose nodes are q, y0, y1, yn"),
        (lambda: d_separated("y0", "y1", "q,yn", graph=2), r"given: \['q,yn'\] not in the graph"),
        (lambda: d_separated("y0", "y0", graph=2), r"x, y, given: \['y0'\] occur in two of them"),
        (lambda: d_separated("a", "b", graph=nx.DiGraph([("a", "b"), ("b", "a")])), r"graph: it is not a directed acyclic"),
        (lambda: draw(2, given="x"), r"given: \['x'\] not in the graph"),
        (lambda: draw(nx.DiGraph([("q", "y0"), ("q", "y1"), ("y1", "yn"), ("yn", "z")])), r"graph: no place .* \['z'\]"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_bad_input_is_told_by_name(call, message: str):
    with pytest.raises(UserError, match=message):
        call()


def test_importing_needs_neither_torch_nor_a_plotting_library():
    code = "import gcpo_repro.scm, sys; assert not {'torch', 'matplotlib', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
