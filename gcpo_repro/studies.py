"""The simulations behind notebooks 01 and 02, as tables: closed form ("theory") beside what was simulated, with its error.

Each function takes the size of the simulation and a seed, and returns a tidy `pandas.DataFrame`; figures are drawn from
these tables alone (reporting/causal_figures.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from scipy import stats
from threadpoolctl import threadpool_limits

from . import independence, verification
from .projection import (
    calibration_slope,
    conditional_mean,
    kernel_experiment,
    projected_risk,
    projected_slope,
    risk_gap_corollary2,
    risk_gap_theorem1,
)
from .scm import (
    SCM,
    AdditiveNoiseSCM,
    LinearGaussianSCM,
    ReasoningSCM,
    d_separated,
    linear_predictor,
    nonlinear_fork,
    symmetric_collider,
    weak_collider,
)
from .scm import causal_graph as graph_of

NORMAL_95 = float(stats.norm.ppf(0.975))
# Matrices of a few hundred rows: a second thread costs more than it does, several times over on a busy machine.
one_thread = threadpool_limits.wrap(limits=1)


# --- Notebook 01: the collider ---------------------------------------------------------------------------------


def separation_table(n: int = 3) -> pd.DataFrame:
    """What the graph says about y0 and y1: independent (d-separated) or not, given various nodes, and why."""
    graph = graph_of(n, descendant=True, reward_filter=True)
    cases = {
        "": "q is a common cause", "q": "the fork is blocked: Eq. 1 rests on this", "q yn": "the collider is opened",
        "q d": "a descendant of yn opens it as well", "q filter": "keeping groups with mixed rewards opens another one",
        "yn": "fork and collider both open",
    }  # fmt: skip
    if n > 2:
        others = " ".join(f"y{i}" for i in range(2, n))
        cases |= {f"q {others}": "the other candidates change nothing", f"q yn {others}": "nor do they close the collider"}
    rows = [
        {"given": ", ".join(given.split()) or "nothing", "y0 and y1": word, "why": why}
        for given, why in cases.items()
        for word in ["independent" if d_separated("y0", "y1", given.split(), graph) else "dependent"]
    ]
    return pd.DataFrame(rows).set_index("given")


def residuals(scm: LinearGaussianSCM, rows: int, seed: int, share: float = 0.1) -> pd.DataFrame:
    """Residuals of y_0 and y_1 given q (p = 1), and whether y_n lies in the middle `share` of its values given q."""
    sample = scm.sample(rows, seed)
    e = sample.y[:, :2, 0] - scm.query_predictor(sample.q)
    u = (sample.y_n - sample.q @ (scm.B + scm.C.sum(0) @ scm.A).T)[:, 0]
    return pd.DataFrame({"e_0": e[:, 0], "e_1": e[:, 1], "in slice": np.abs(u) <= np.quantile(np.abs(u), share)})


def partial_correlation_sweep(rows: int, seed: int) -> pd.DataFrame:
    """ρ(y_0, y_1 | ·) of scalar models against the noise τ of y_n, the group size n, and the weight c_1 (its sign).

    Columns: panel ("tau", "n", "c_1"), x, given, theory, simulated, error (95%), on `rows` rows a point.
    """
    taus = (0.05, 0.2, 0.35, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
    weights = (-2.0, -1.5, -1.0, -0.7, -0.4, -0.2, 0.0, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0)
    models: dict[str, dict[float, LinearGaussianSCM]] = {
        "tau": {tau: LinearGaussianSCM.scalar([1.0] * 3, tau) for tau in taus},
        "n": {n: LinearGaussianSCM.scalar([1.0] * n, 0.5) for n in (2, 3, 4, 6, 8, 12)},
        "c_1": {c: LinearGaussianSCM.scalar([1.0, c, 0.5], 0.5) for c in weights},
    }
    cells = [(panel, x, scm) for panel, group in models.items() for x, scm in group.items()]
    table = []
    for (panel, x, scm), source in zip(cells, np.random.SeedSequence(seed).spawn(len(cells)), strict=True):
        moments = independence.streamed_covariance(scm, rows, source)
        for given in ("q", "q,yn", "all"):
            found = moments.partial_correlation(0, 1, given)
            error = NORMAL_95 * (1 - found**2) / np.sqrt(rows)
            table.append((panel, x, given, scm.partial_correlation(0, 1, given), found, error))
    return pd.DataFrame(table, columns=["panel", "x", "given", "theory", "simulated", "error"])


CASES: dict[str, Callable[[], SCM]] = {
    "linear, c = 1": lambda: LinearGaussianSCM.scalar([1.0, 1.0], tau=1.0),
    "nonlinear fork": lambda: nonlinear_fork(n=2),
    "weak collider": lambda: weak_collider(n=2),
    "symmetric": symmetric_collider,
}


def available_tests() -> dict[str, Callable[..., independence.CITest]]:
    """Fisher z and GCM, and KCI where causal-learn is installed."""
    tests: dict[str, Callable[..., independence.CITest]] = {"Fisher z": independence.fisher_z, "GCM": independence.gcm}
    if independence.has_kci():
        tests["KCI"] = independence.kci
    return tests


@one_thread
def rejection_rates(repetitions: int, rows: int, seed: int, level: float = 0.05, kci_repetitions: int = 0) -> pd.DataFrame:
    """How often each test rejects y_0 ⊥ y_1 given q (true: size) and given (q, y_n) (false: power).

    Columns: model, test, given, rate, low, high (95% Wilson interval), repetitions. All tests see the same data; KCI, which
    costs ten times the others, sees the first `kci_repetitions` samples (none where causal-learn is missing).
    """
    tests, table = available_tests(), []
    repeats = {test: min(kci_repetitions, repetitions) if test == "KCI" else repetitions for test in tests}
    for (name, build), source in zip(CASES.items(), np.random.SeedSequence(seed).spawn(len(CASES)), strict=True):
        scm, rng = build(), np.random.default_rng(source)
        hits = {(test, given): 0 for test in tests for given in ("q", "q,yn") if repeats[test]}
        for k in range(repetitions):
            sample = scm.sample(rows, rng)
            conditions = {"q": sample.q, "q,yn": np.hstack([sample.q, sample.y_n])}
            for test, given in hits:
                if k < repeats[test]:
                    hits[test, given] += tests[test](sample.y[:, 0], sample.y[:, 1], conditions[given]).p_value < level
        for (test, given), count in hits.items():
            interval = stats.binomtest(count, repeats[test]).proportion_ci(method="wilson")
            table.append((name, test, given, count / repeats[test], interval.low, interval.high, repeats[test]))
    return pd.DataFrame(table, columns=["model", "test", "given", "rate", "low", "high", "repetitions"])


def reasoning_correlations(rows: int, seed: int) -> pd.DataFrame:
    """Right and wrong answers: correlation of two candidates given the question and y_n, against the question's p.

    Columns: n, y_n, p, theory, simulated, error (95%); NaN where fewer than 100 rows are left.
    """
    table = []
    for n, source in zip((2, 4, 8), np.random.SeedSequence(seed).spawn(3), strict=True):
        rng = np.random.default_rng(source)
        for p in np.linspace(0.1, 0.9, 9):
            scm = ReasoningSCM(n, weight=1.0, right=lambda q, p=p: np.full(len(q), p))
            sample = scm.sample(rows, rng)
            for y_n in (1, 0):
                kept = sample.y[sample.y_n[:, 0] == y_n, :, 0]
                found = np.corrcoef(kept[:, 0], kept[:, 1])[0, 1] if len(kept) >= 100 else np.nan
                error = NORMAL_95 * (1 - found**2) / np.sqrt(max(len(kept), 1))
                theory = float(scm.conditional_correlation(np.zeros((1, 1)), y_n)[0])
                table.append((n, y_n, p, theory, found, error))
    return pd.DataFrame(table, columns=["n", "y_n", "p", "theory", "simulated", "error"])


# --- Notebook 02: the theorems ---------------------------------------------------------------------------------


def predictor_gaps(count: int, rows: int, seed: int) -> pd.DataFrame:
    """Both gaps and the slope b of `count` random linear predictors around the Bayes predictor, and of that one, last.

    Columns: theorem 1, measured 1, error 1, corollary 2, measured 2, error 2, square (E‖Ψf‖²), slope; errors are 95%.
    """
    scm, rng = verification.example_scm(), np.random.default_rng(seed)
    sample, table = scm.sample(rows, rng), []
    spreads = [*rng.uniform(0.02, 0.35, count), 0.0]
    for spread in spreads:
        F = verification.random_predictor(scm, rng, spread)
        f, Phi_f = linear_predictor(*F), linear_predictor(*verification.phi_coefficients(scm, *F))
        first = risk_gap_theorem1(sample, f, Phi_f, scm.query_predictor)
        second = risk_gap_corollary2(sample, f, Phi_f, scm.query_predictor)
        gap, square = scm.corollary2_gap(*F), float(np.trace(F[2] @ scm.S_u @ F[2].T))
        errors = (NORMAL_95 * first.standard_error, NORMAL_95 * second.standard_error)
        slope = (gap + square) / (2 * square)
        table.append((scm.theorem1_gap(*F), first.value, errors[0], gap, second.value, errors[1], square, slope))
    columns = ["theorem 1", "measured 1", "error 1", "corollary 2", "measured 2", "error 2", "square", "slope"]
    return pd.DataFrame(table, columns=columns)


def counter_example_gaps(rows: int, seed: int) -> pd.DataFrame:
    """theory.md's counter-example to Corollary 2, f = a (y_2 − y_1): columns a, slope b, theory, simulated, error (95%)."""
    table = []
    for a, source in zip((0.25, 0.4, 0.5, 0.75, 1.0, 1.25, 1.5), np.random.SeedSequence(seed).spawn(7), strict=True):
        scm, F = verification.counter_example(a)
        sample = scm.sample(rows, source)
        f, Phi_f = linear_predictor(*F), linear_predictor(*verification.phi_coefficients(scm, *F))
        found = risk_gap_corollary2(sample, f, Phi_f, scm.query_predictor)
        table.append((a, 1 / (2 * a), scm.corollary2_gap(*F), found.value, NORMAL_95 * found.standard_error))
    return pd.DataFrame(table, columns=["a", "slope", "theory", "simulated", "error"])


def least_squares_curve(repetitions: int, seed: int, tau: float = 3.0) -> pd.DataFrame:
    """Expected gaps of least squares against its training rows: columns N, gap (1 or 2), theory, simulated, error (95%)."""
    scm, table = LinearGaussianSCM.scalar([1.0, 1.0, 1.0], tau=tau), []
    for N, source in zip((8, 10, 13, 17, 25, 40, 80, 160), np.random.SeedSequence(seed).spawn(8), strict=True):
        rng = np.random.default_rng(source)
        gaps = np.array([verification.least_squares_gaps(scm, N, rng) for _ in range(repetitions)])
        errors = NORMAL_95 * gaps.std(0, ddof=1) / np.sqrt(repetitions)
        for k, theory in enumerate(scm.ols_gaps(N)):
            table.append((N, k + 1, theory, gaps[:, k].mean(), errors[k]))
    return pd.DataFrame(table, columns=["N", "gap", "theory", "simulated", "error"])


def kernel_scm() -> AdditiveNoiseSCM:
    """y_i = q + ε_i, y_n = y_0 + sin(2 y_1) + .3 η, n = 2: a collider that plain ridge learns well from 200 rows."""
    return AdditiveNoiseSCM(lambda q: q, lambda q, y: y[:, 0] + np.sin(2 * y[:, 1]), n=2, tau=0.3)


@one_thread
def kernel_gains(
    scm: SCM, sizes: Sequence[int], seeds: Sequence[int], unlabelled: Sequence[int], test_rows: int = 500
) -> pd.DataFrame:
    """Paired gains in mean squared error of the projected kernel estimators over plain kernel ridge.

    Columns: rows, unlabelled, estimator ("before", "after"), plain (its error), gain, error (95% t over seeds).
    """
    table = []
    for extra in unlabelled:
        for size in sizes:
            found = kernel_experiment(scm, size, seeds, extra, test_rows)
            for estimator in ("before", "after"):
                gain = found["none"] - found[estimator]
                error = stats.t.ppf(0.975, len(gain) - 1) * gain.std(ddof=1) / np.sqrt(len(gain))
                table.append((size, extra, estimator, found["none"].mean(), gain.mean(), error))
    return pd.DataFrame(table, columns=["rows", "unlabelled", "estimator", "plain", "gain", "error"])


def phi_curve(rows: int, seed: int, draws: Sequence[int] = (2, 3, 4, 6, 8)) -> pd.DataFrame:
    """The target m + f − Φ̂f of both kinds of Φ, f the Bayes predictor, Φ̂ a mean over L outputs, the observed one among them.

    Columns: kind, L, risk, risk theory, risk error, slope, slope theory, slope error, cosine (mean with y_0); 95% errors.
    Besides, at L = 0, kind "query": m alone, and kind "bayes": f alone.
    """
    scm = verification.example_scm()
    sample, source = scm.sample(rows, seed), np.random.default_rng(seed + 1)
    y_0, m, f = sample.y[:, 0], scm.query_predictor(sample.q), scm.bayes_predictor(sample)
    table = []

    def add(kind: str, L: int, target: np.ndarray, theory: float, slope: tuple[float, float, float]) -> None:
        loss = np.square(y_0 - target).sum(1)
        cosine = np.mean((y_0 * target).sum(1) / np.linalg.norm(y_0, axis=1) / np.linalg.norm(target, axis=1))
        table.append((kind, L, loss.mean(), theory, NORMAL_95 * loss.std() / np.sqrt(rows), *slope, float(cosine)))

    nothing = (np.nan, np.nan, np.nan)
    add("query", 0, m, scm.risk_query(), nothing)
    add("bayes", 0, f, scm.risk_bayes(), nothing)
    for kind in ("algorithm", "theorem"):
        for L in draws:
            Phi = conditional_mean(scm, sample, scm.bayes_predictor, kind, L, int(source.integers(2**31)), observed=True)
            b = calibration_slope(y_0, f, Phi, m)
            slope = (b.value, projected_slope(scm, kind, L), NORMAL_95 * b.standard_error)
            add(kind, L, m + f - Phi, projected_risk(scm, kind, L), slope)
    columns = ["kind", "L", "risk", "risk theory", "risk error", "slope", "slope theory", "slope error", "cosine"]
    return pd.DataFrame(table, columns=columns)


def signed_reference(contexts: int, seed: int, vocabulary: int = 50, spread: float = 0.5) -> pd.DataFrame:
    """Eq. 13 in a synthetic softmax model: shares of sampled tokens with π'_ref ≤ 0 and > 1, and its total mass.

    Logits of π(·|q) are standard normal times 2; each of the L contexts adds its own normal change of this spread. Columns:
    reduction ("mean", "sum"), L, negative, above one, mass (its mean over contexts), mass theory (1, or 2 − L).
    """
    rng, table = np.random.default_rng(seed), []
    softmax = lambda v: np.exp(v - v.max(-1, keepdims=True)) / np.exp(v - v.max(-1, keepdims=True)).sum(-1, keepdims=True)  # noqa: E731
    base = 2 * rng.standard_normal((contexts, 1, vocabulary))
    p_q = softmax(base)[:, 0]
    tokens = np.array([rng.choice(vocabulary, p=p) for p in p_q])
    for L in (2, 4, 8):
        p_x = softmax(base + spread * rng.standard_normal((contexts, L, vocabulary)))
        for reduction, theory in (("mean", 1.0), ("sum", 2.0 - L)):
            reference = p_x[:, 0] - getattr(p_x, reduction)(1) + p_q
            sampled = reference[np.arange(contexts), tokens]
            table.append((reduction, L, np.mean(sampled <= 0), np.mean(sampled > 1), reference.sum(1).mean(), theory))
    return pd.DataFrame(table, columns=["reduction", "L", "negative", "above one", "mass", "mass theory"])
