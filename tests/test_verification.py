"""The table of formulas: complete, seeded, right; and wrong where the model is changed behind its back."""

import numpy as np
import pytest

from gcpo_repro import verification


@pytest.fixture(scope="module")
def table():
    return verification.formula_table(rows=20_000, seed=0)


def test_every_formula_agrees_with_its_simulation(table):
    assert len(table) >= 20 and set(table["section"]) == {"1", "2", "3"}
    assert table["z"].abs().max() < 4.5 and np.sqrt(np.mean(table["z"] ** 2)) < 1.6
    assert (table["standard error"] > 0).all() and np.isfinite(table[["closed form", "simulated"]]).all(axis=None)


def test_same_seed_same_table(table):
    assert verification.formula_table(rows=20_000, seed=0).equals(table)
    assert not verification.formula_table(rows=20_000, seed=1)["simulated"].equals(table["simulated"])


@pytest.mark.parametrize("formula", ["risk_bayes", "theorem1_gap", "corollary2_gap", "ols_gaps"])
def test_a_wrong_formula_is_noticed(monkeypatch, formula):
    """5% off is seen: the simulation does not use the formula that it checks."""
    right = getattr(verification.LinearGaussianSCM, formula)

    def wrong(self, *arguments):
        value = right(self, *arguments)
        return type(value)(*(1.05 * v for v in value)) if isinstance(value, tuple) else 1.05 * value

    monkeypatch.setattr(verification.LinearGaussianSCM, formula, wrong)
    rows = {"risk_bayes": verification._risks, "ols_gaps": verification._least_squares}.get(formula, verification._gaps)
    found = list(rows(100_000, np.random.default_rng(0)))
    worst = max(abs((estimate.value - closed) / estimate.standard_error) for _, _, closed, estimate in found)
    # ols_gaps is averaged over fits whose gaps come from the (tested) closed forms of one fit
    assert worst > 5


def test_counter_example_fails_only_beyond_one():
    for a, sign in ((0.5, 1), (1.0, 0), (2.0, -1)):
        scm, F = verification.counter_example(a)
        assert scm.corollary2_gap(*F) == pytest.approx(2 * a - 2 * a**2) and np.sign(2 * a - 2 * a**2) == sign


def test_phi_is_the_conditional_mean():
    """phi_coefficients against averaging over fresh y_0 and y_n."""
    from gcpo_repro.projection import conditional_mean
    from gcpo_repro.scm import linear_predictor

    scm = verification.example_scm()
    F = verification.random_predictor(scm, np.random.default_rng(3))
    sample = scm.sample(200, 0)
    drawn = conditional_mean(scm, sample, linear_predictor(*F), "theorem", 4000, seed=1)
    exact = linear_predictor(*verification.phi_coefficients(scm, *F))(sample)
    assert np.abs(drawn - exact).max() < 6 * np.sqrt(np.trace(F[2] @ scm.S_u @ F[2].T) / 4000)
