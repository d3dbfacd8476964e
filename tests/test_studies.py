"""The tables behind notebooks 01 and 02: simulation agrees with theory, and their figures can be read."""

import numpy as np
import pytest

from gcpo_repro import studies
from gcpo_repro.reporting import causal_figures
from gcpo_repro.scm import LinearGaussianSCM
from tests.texts import assert_readable


def z_scores(table, theory="theory", simulated="simulated", error="error"):
    found = table.dropna(subset=[simulated])
    return ((found[simulated] - found[theory]) / found[error]).to_numpy() * studies.NORMAL_95


@pytest.fixture(scope="module")
def tables():
    return {
        "residuals": studies.residuals(LinearGaussianSCM.scalar([1.0, 1.0], 0.3), 4000, 0),
        "sweep": studies.partial_correlation_sweep(20_000, 0),
        "rates": studies.rejection_rates(20, 100, 0, kci_repetitions=2),
        "reasoning": studies.reasoning_correlations(20_000, 0),
        "gaps": studies.predictor_gaps(40, 4000, 0),
        "counter": studies.counter_example_gaps(20_000, 0),
        "least_squares": studies.least_squares_curve(300, 0),
        "kernel": studies.kernel_gains(studies.kernel_scm(), (25, 50), range(3), (0, 20), 100),
        "phis": studies.phi_curve(20_000, 0),
    }


@pytest.mark.parametrize("name", ["sweep", "reasoning", "counter", "least_squares"])
def test_simulation_agrees_with_theory(tables, name):
    z = z_scores(tables[name])
    assert len(z) >= 7 and abs(z).max() < 4.5 and np.sqrt(np.mean(z**2)) < 1.8


def test_gaps_of_random_predictors(tables):
    gaps = tables["gaps"]
    random, bayes = gaps.iloc[:-1], gaps.iloc[-1]
    for k in ("1", "2"):
        z = z_scores(random, {"1": "theorem 1", "2": "corollary 2"}[k], f"measured {k}", f"error {k}")
        assert abs(z).max() < 6  # one sample for all of them: they are not independent
    assert (
        (gaps["theorem 1"] >= 0).all()
        and bayes["theorem 1"] == pytest.approx(0, abs=1e-12)
        and bayes["slope"] == pytest.approx(1)
    )
    np.testing.assert_allclose(gaps["corollary 2"], gaps["square"] * (2 * gaps["slope"] - 1), rtol=1e-9)


def test_two_phis(tables):
    phis = tables["phis"]
    assert abs(z_scores(phis, "risk theory", "risk", "risk error")).max() < 4.5
    assert abs(z_scores(phis.dropna(), "slope theory", "slope", "slope error")).max() < 4.5
    m = phis.set_index("kind").loc["query", "risk theory"]
    assert (phis[phis["kind"] == "algorithm"]["risk theory"] > m).all() and (
        phis[phis["kind"] == "theorem"]["risk theory"] < m
    ).all()


def test_separation_table():
    table = studies.separation_table(3)["y0 and y1"]
    assert table["q"] == "independent" and table["q, y2"] == "independent"
    assert set(table.drop(["q", "q, y2"])) == {"dependent"}


def test_kernel_gains_are_paired_differences(tables):
    from gcpo_repro.projection import kernel_experiment

    found = kernel_experiment(studies.kernel_scm(), 25, range(3), 0, 100)
    row = tables["kernel"].set_index(["rows", "unlabelled", "estimator"]).loc[(25, 0, "before")]
    assert row["gain"] == pytest.approx(np.mean(found["none"] - found["before"]))


def test_signed_reference():
    table = studies.signed_reference(500, 0).set_index(["reduction", "L"])
    np.testing.assert_allclose(table["mass"], table["mass theory"], atol=1e-12)
    assert table.loc[("mean", 4), "negative"] < 0.1 < 0.9 < table.loc[("sum", 4), "negative"]


def test_same_seed_same_table():
    assert studies.reasoning_correlations(2000, 3).equals(studies.reasoning_correlations(2000, 3))


FIGURES = {
    "residuals": lambda t: causal_figures.residual_scatter(t["residuals"], 0.3),
    "partial correlations": lambda t: causal_figures.partial_correlations(t["sweep"]),
    "rejection rates": lambda t: causal_figures.rejection_rates(t["rates"]),
    "reasoning": lambda t: causal_figures.reasoning(t["reasoning"]),
    "theorems": lambda t: causal_figures.theorem_1_and_corollary_2(t["gaps"], t["counter"]),
    "estimated": lambda t: causal_figures.estimated_predictors(t["least_squares"], t["kernel"]),
    "two phis": lambda t: causal_figures.two_phis(t["phis"]),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_label_can_be_read(tables, name):
    assert_readable(FIGURES[name](tables))
