"""independence.py against inverse covariances, residuals by scipy, kernels written out, and its size over repetitions."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from scipy import stats

from gcpo_repro.errors import UserError
from gcpo_repro.independence import CITest, fisher_z, gcm, kci, partial_correlation, streamed_covariance
from gcpo_repro.scm import (
    AdditiveNoiseSCM,
    LinearGaussianSCM,
    ReasoningSCM,
    nonlinear_fork,
    symmetric_collider,
    weak_collider,
)

TESTS = {"fisher_z": fisher_z, "gcm": gcm, "kci": kci}
LINEAR = LinearGaussianSCM.scalar([1, 1, 1], tau=1)


def rows(N: int = 60, k: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, y, given with all kinds of correlation."""
    Z = np.random.default_rng(seed).standard_normal((N, k + 2)) @ np.random.default_rng(seed + 1).standard_normal((k + 2, k + 2))
    return Z[:, 0], Z[:, 1], Z[:, 2:]


def p_values(test, scm, given: str, repetitions: int, N: int = 200, seed: int = 0) -> np.ndarray:
    """Of y_0 ⊥ y_1 given "q" or "q,yn", on independent samples of N rows."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(repetitions):
        sample = scm.sample(N, rng)
        known = sample.q if given == "q" else np.hstack([sample.q, sample.y_n])
        found.append(test(sample.y[:, 0, 0], sample.y[:, 1, 0], known).p_value)
    return np.array(found)


def size_interval(p: np.ndarray) -> tuple[float, float]:
    """99.9% interval of the rejection rate at 5%."""
    return stats.binomtest(int((p < 0.05).sum()), len(p)).proportion_ci(0.999)


def assert_calibrated(p: np.ndarray) -> None:
    low, high = size_interval(p)
    assert low <= 0.08 and high >= 0.03, (np.mean(p < 0.05), low, high)


# --- One test at a time: independent computations --------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 3])
def test_fisher_z_is_the_inverse_covariance(k: int):
    x, y, Z = rows(k=k)
    N = len(x)
    P = np.linalg.inv(np.cov(np.column_stack([x, y, Z]).T))
    rho = -P[0, 1] / np.sqrt(P[0, 0] * P[1, 1])
    result = fisher_z(x, y, Z if k else None)
    assert result.statistic == pytest.approx(np.sqrt(N - k - 3) * np.log((1 + rho) / (1 - rho)) / 2)
    assert result.p_value == pytest.approx(2 * (1 - stats.norm.cdf(abs(result.statistic))), rel=1e-6)
    assert result.n == N
    design = np.column_stack([np.ones(N), Z])
    residuals = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (x, y)]
    assert np.tanh(result.statistic / np.sqrt(N - k - 3)) == pytest.approx(stats.pearsonr(*residuals).statistic)


def test_fisher_z_counts_dependent_columns_once():
    x, y, Z = rows()
    assert fisher_z(x, y, np.hstack([Z, Z @ [[1.0], [2.0]]])).statistic == pytest.approx(fisher_z(x, y, Z).statistic)


def test_fisher_z_of_equal_variables():
    x, y, Z = rows()
    assert fisher_z(x, 2 * x, Z).p_value == pytest.approx(0, abs=1e-30)
    assert fisher_z(x, -x).statistic == -fisher_z(x, x).statistic < -30


@pytest.mark.parametrize("settings", [{}, {"length_scale": 0.5, "alpha": 1.0}])
def test_gcm_with_the_kernel_written_out(settings: dict[str, float]):
    x, y, Z = rows(k=3)
    ell, lam = settings.get("length_scale", 1.0) * np.sqrt(3), settings.get("alpha", 0.01)
    x_, y_, Z_ = ((v - v.mean(0)) / v.std(0) for v in (x, y, Z))
    K = np.exp(-np.sum((Z_[:, None] - Z_) ** 2, -1) / (2 * ell**2))
    left = np.eye(len(x)) - K @ np.linalg.inv(K + lam * np.eye(len(x)))
    R = (left @ x_) * (left @ y_)
    result = gcm(x, y, Z, **settings)
    assert result.statistic == pytest.approx(np.sqrt(len(x)) * R.mean() / R.std())
    assert result.p_value == pytest.approx(2 * (1 - stats.norm.cdf(abs(result.statistic))), rel=1e-6)


def test_gcm_of_several_columns():
    x, y, Z = rows(N=80, k=3)
    one = gcm(x, y, Z)
    # The same pair several times over is one pair: T² ~ χ² with one degree of freedom, the same p-value.
    same = gcm(np.column_stack([x, 3 * x]), np.column_stack([y, -y]), Z)
    assert same.statistic == pytest.approx(one.statistic**2) and same.p_value == pytest.approx(one.p_value)
    # Two pairs by hand, nothing given: products of standardised columns, Hotelling's form.
    X = np.column_stack([x, Z[:, 0]])
    R = (X - X.mean(0)) / X.std(0) * ((y - y.mean()) / y.std())[:, None]
    T = len(y) * R.mean(0) @ np.linalg.inv(np.cov(R.T, bias=True)) @ R.mean(0)
    result = gcm(X, y)
    assert result.statistic == pytest.approx(T) and result.p_value == pytest.approx(1 - stats.chi2.cdf(T, 2))


@pytest.mark.parametrize("test", [fisher_z, gcm])
@pytest.mark.parametrize("k", [0, 2])
def test_invariances(test, k: int):
    x, y, Z = rows(N=100)
    given = Z if k else None
    result = test(x, y, given)
    assert test(y, x, given).statistic == pytest.approx(result.statistic)
    assert test(5 - 3 * x, 1e-3 * y, given).statistic == pytest.approx(-result.statistic)
    assert test(x, y, Z * [7, -0.1] + [5, -100] if k else None).statistic == pytest.approx(result.statistic)
    order = np.random.default_rng(0).permutation(len(x))
    assert test(x[order], y[order], Z[order] if k else None).statistic == pytest.approx(result.statistic)
    assert test(x[:, None], y[:, None], given) == result == CITest(result.statistic, result.p_value, 100)
    assert test(x, y, Z[:, 0]) == test(x, y, Z[:, :1])


def test_nothing_given_changes_nothing_it_is_given():
    x, y, Z = rows()
    copies = [v.copy() for v in (x, y, Z)]
    for test in (fisher_z, gcm):
        test(x, y, Z)
    assert all(np.array_equal(a, b) for a, b in zip(copies, (x, y, Z), strict=True))


# --- Size and power ---------------------------------------------------------------------------------------------


def test_size_of_fisher_z():
    assert_calibrated(p_values(fisher_z, LINEAR, "q", 500))


def test_size_of_gcm():
    assert_calibrated(p_values(gcm, LINEAR, "q", 500))


def test_a_nonlinear_fork_fools_fisher_z_but_not_gcm():
    assert np.mean(p_values(fisher_z, nonlinear_fork(), "q", 500) < 0.05) > 0.99
    assert_calibrated(p_values(gcm, nonlinear_fork(), "q", 500))


def test_power_given_the_collider():
    for test in (fisher_z, gcm):
        assert size_interval(p_values(test, LINEAR, "q,yn", 100)).low > 0.85
    assert size_interval(p_values(gcm, nonlinear_fork(), "q,yn", 100)).low > 0.75
    # The analytic power of Fisher's z at the weak collider's ρ = −.02153, z = ρ √195 = −.30: P(|Z − .3| > 1.96) = .060.
    weak = p_values(fisher_z, weak_collider(), "q,yn", 500)
    assert size_interval(weak).low < 0.060 < size_interval(weak).high


def test_dependence_without_correlation_is_not_seen():
    for test in (fisher_z, gcm):
        assert_calibrated(p_values(test, symmetric_collider(), "q,yn", 200))


@pytest.mark.slow
@pytest.mark.parametrize("scm", [weak_collider(), symmetric_collider()], ids=["weak", "symmetric"])
def test_size_of_gcm_in_the_other_models(scm):
    assert_calibrated(p_values(gcm, scm, "q", 500))


# --- KCI ----------------------------------------------------------------------------------------------------------


def test_kci_is_named_when_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "causallearn", None)
    for name in [name for name in sys.modules if name.startswith("causallearn.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r'pip install "gcpo-repro\[kci\]"'):
        kci(*rows())


def test_kci_sees_what_the_others_miss():
    pytest.importorskip("causallearn")
    assert (p_values(kci, symmetric_collider(), "q,yn", 10) < 0.05).all()
    assert (p_values(kci, symmetric_collider(), "q", 10) < 0.05).sum() <= 3  # P(more | size .08) < .001
    x, y, Z = rows()
    assert kci(x, x**2).p_value < 1e-6 and kci(Z[::-1, :1], y[:, None]).n == 60  # and without `given`
    assert kci(x, y, Z) == kci(x, y, Z)  # no random draws


@pytest.mark.slow
def test_size_of_kci():
    pytest.importorskip("causallearn")
    assert_calibrated(p_values(kci, LINEAR, "q", 500))


# --- Streamed partial correlations -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scm", [LinearGaussianSCM.scalar([1, -1, 0.5], tau=0.5), ReasoningSCM(3, fidelity=0.9)], ids=["linear", "reasoning"]
)
@pytest.mark.parametrize("block", [64, 700, 5000])
def test_streaming_is_the_direct_computation(scm, block: int):
    streamed = streamed_covariance(scm, 1500, 3, block=block)
    rng = np.random.default_rng(3)
    samples = [scm.sample(min(block, 1500 - start), rng) for start in range(0, 1500, block)]
    X = np.vstack([np.hstack([s.q, s.y[:, :, 0], s.y_n]) for s in samples])
    assert len(X) == streamed.rows == 1500
    np.testing.assert_allclose(streamed.mean, X.mean(0), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(streamed.covariance, np.cov(X.T), rtol=1e-10, atol=1e-13)
    for given, columns in {"q": [0], "q,yn": [0, 4], "all": [0, 4, 3]}.items():
        P = np.linalg.inv(np.cov(X[:, [1, 2, *columns]].T))
        expected = -P[0, 1] / np.sqrt(P[0, 0] * P[1, 1])
        assert streamed.partial_correlation(0, 1, given) == pytest.approx(expected)
        z = fisher_z(X[:, 1], X[:, 2], X[:, columns]).statistic
        assert np.tanh(z / np.sqrt(1500 - len(columns) - 3)) == pytest.approx(expected)
        assert partial_correlation(np.cov(X.T), 1, 2, columns) == pytest.approx(expected)


def test_streaming_keeps_its_digits_far_from_zero():
    near, far = (
        AdditiveNoiseSCM(lambda q, a=a: q + a, lambda q, y: y.sum(1), 3, s=1e-2, tau=1e-2) for a in (0.0, 2.0**26)
    )  # fmt: skip
    a, b = (streamed_covariance(scm, 20_000, 0, block=1000) for scm in (near, far))
    np.testing.assert_allclose(a.covariance, b.covariance, rtol=1e-4, atol=1e-8)  # E y² = 4.5e15 would leave no digit of 1e-4


@pytest.mark.parametrize("c", [(1, 1, 1, 1), (1, -1, 2, 0.5), (1, 1)])
@pytest.mark.parametrize("tau", [0.3, 2.0])
@pytest.mark.parametrize("rho", [0.0, 0.4])
def test_simulated_partial_correlations(c: tuple[float, ...], tau: float, rho: float):
    scm, N = LinearGaussianSCM.scalar(c, tau, s=0.7, rho=rho), 100_000
    streamed = streamed_covariance(scm, N, 1)
    for given in ("q", "q,yn", "all"):
        for i, j in ((0, 1), (len(c) - 1, 0)):
            simulated, exact = streamed.partial_correlation(i, j, given), scm.partial_correlation(i, j, given)
            assert abs(np.arctanh(simulated) - np.arctanh(exact)) * np.sqrt(N) < 4.5


# --- Errors ---------------------------------------------------------------------------------------------------------

X, Y, Z = rows()


@pytest.mark.parametrize("name", TESTS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.where(np.arange(60) == 7, np.nan, X), Y, Z), r"x: nan at \(7, 0\) is not finite"),
        ((X, Y, np.where(np.arange(60)[:, None] == 7, np.inf, Z)), r"given: inf at \(7, 0\) is not finite"),
        ((X, np.full(60, 0.1), Z), r"y: column 0 is constant \(0.1\)"),
        ((X, Y, np.column_stack([X, np.ones(60)])), r"given: column 1 is constant"),
        ((X, Y[1:], Z), r"y: 59 rows, but x has 60"),
        ((X, Y, Z[1:]), r"given: 59 rows, but x has 60"),
        ((X[:3], Y[:3], Z[:3]), r"x: 3 rows are too few"),
        ((X[:0], Y[:0], Z[:0]), r"x: must have shape \(N, k\)"),
        ((X[:, None, None], Y, Z), r"x: must have shape \(N, k\), .* got \(60, 1, 1\)"),
        ((["a"] * 60, Y, Z), r"x: not an array of numbers"),
    ],
)
def test_bad_data_is_told_by_name(name: str, arguments, message: str):
    with pytest.raises(UserError, match=message):
        TESTS[name](*arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fisher_z(Z, Y), r"x, y: 2 and 1 columns; fisher_z takes one each"),
        (lambda: fisher_z(Z @ [1, 2], Y, Z), r"x: is a linear function of given"),
        (lambda: fisher_z(X, 3 - Z[:, 1], Z), r"y: is a linear function of given"),
        (lambda: fisher_z(X[:5], Y[:5], Z[:5]), r"x: 5 rows are too few for 2 conditioning columns; pass at least 6"),
        (lambda: gcm(X, Y, Z, length_scale=0), r"length_scale, alpha: got 0 and 0.01"),
        (lambda: gcm(X, Y, Z, alpha=np.nan), r"length_scale, alpha: got 1.0 and nan"),
        (lambda: gcm(X[:9], Y[:9]), r"x: 9 rows are too few for 1 pairs of columns; pass at least 10"),
        (lambda: streamed_covariance(LINEAR, 1, 0), r"rows: 1 must be an integer of at least 2"),
        (lambda: streamed_covariance(LINEAR, 10, 0, block=0), r"block: 0 must be"),
        (lambda: streamed_covariance(LINEAR, 10, None), r"seed: None"),
        (lambda: streamed_covariance(LINEAR, 99, 0).partial_correlation(0, 3, "q"), r"i, j: got 0 and 3"),
        (lambda: streamed_covariance(LINEAR, 99, 0).partial_correlation(0, 0, "q"), r"i, j: got 0 and 0"),
        (lambda: streamed_covariance(LINEAR, 99, 0).partial_correlation(0, 1, "none"), r"given: 'none' is not known"),
        (
            lambda: streamed_covariance(
                AdditiveNoiseSCM(lambda q: np.hstack([q, q]), lambda q, y: y.sum(1), 2, p=2, r=2), 99, 0
            ).partial_correlation(0, 1, "q"),
            r"partial_correlation: p = 2",
        ),
    ],
)
def test_bad_settings_are_told_by_name(call, message: str):
    with pytest.raises(UserError, match=message):
        call()
