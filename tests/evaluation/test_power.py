"""The Beta model's variances against drawing from it, and the numbers of samples against the equations they solve."""

import math

import matplotlib
import numpy as np
import pytest
from scipy.stats import norm

matplotlib.use("Agg")
from gcpo_repro import UserError
from gcpo_repro.evaluation import power
from gcpo_repro.evaluation.audit import audit
from gcpo_repro.evaluation.checks import gains
from gcpo_repro.evaluation.published import load
from gcpo_repro.reporting import benchmark_figures
from tests.texts import assert_readable, shown_texts


def drawn(rng, p, n, k, rho, trials):
    s = 1 / rho - 1
    rates = rng.beta(p * s, (1 - p) * s, (trials, n))
    return rates, rng.binomial(k, rates).mean(1) / k


@pytest.mark.parametrize("p, n, k, rho", [(0.45, 30, 1, 0.6), (0.86, 40, 8, 0.6), (0.25, 60, 4, 0.8)])
def test_variance_is_that_of_drawing(p, n, k, rho):
    rates, found = drawn(np.random.default_rng(0), p, n, k, rho, 20_000)
    assert found.var() == pytest.approx(power.variance(p, n, k, "resampled", rho), rel=0.05)
    assert (found - rates.mean(1)).var() == pytest.approx(power.variance(p, n, k, "same", rho), rel=0.05)


def test_variance_at_its_limits():
    assert power.variance(0.3, 50, 1, rho=0.37) == pytest.approx(0.21 / 50)  # one answer: binomial, whatever ρ
    assert power.variance(0.3, 50, 4, "same", rho=0) == pytest.approx(0.21 / 200)
    assert power.variance(0.3, 50, 9, "same", rho=1) == 0 and power.variance(0.3, 50, math.inf) == pytest.approx(0.6 * 0.21 / 50)


def test_power_is_that_of_drawing():
    rng, n, k, first, second = np.random.default_rng(1), 60, 8, 0.4, 0.47
    s = 1 / 0.6 - 1
    a, b = (rng.binomial(k, rng.beta(p * s, (1 - p) * s, (20_000, n))).mean(1) / k for p in (first, second))
    se = power.difference_se(first, second, n, k, "resampled")
    hits = np.mean(b - a > norm.ppf(0.975) * se)
    assert power.power(first, second, n, k, "resampled") == pytest.approx(hits, abs=0.015)


@pytest.mark.parametrize("first, second, n", [(0.461, 0.467, 30), (0.857, 0.863, 500), (0.3, 0.9, 2), (0.442, 0.45, 272)])
@pytest.mark.parametrize("problems", ["same", "resampled"])
def test_samples_needed_is_the_first_that_suffices(first, second, n, problems):
    k = power.samples_needed(first, second, n, problems)
    if math.isinf(k):
        assert second - first <= 2 * power.difference_se(first, second, n, 1e12, problems)
        return
    assert second - first >= 2 * power.difference_se(first, second, n, k, problems) * (1 - 1e-9)
    assert k == 1 or second - first < 2 * power.difference_se(first, second, n, k - 1, problems)


def test_samples_needed_does_not_lose_one_to_rounding():
    """.1 and .2 away from ½ with ρ = 0: (p₁q₁ + p₂q₂)/n · 4/d² is whole: (.24 + .21)/1 · 4/.01 = 180."""
    assert power.samples_needed(0.6, 0.7, 1, rho=0) == 180


def test_samples_needed_for_a_wanted_power():
    multiple = power.multiple_for(0.8)
    assert multiple == pytest.approx(1.959964 + 0.841621, abs=1e-5)
    k = power.samples_needed(0.4, 0.45, 100, multiple=multiple)
    assert power.power(0.4, 0.45, 100, k) >= 0.8 > power.power(0.4, 0.45, 100, k - 1)


def test_curves_are_the_functions():
    table = power.power_curves({"AIME 2024": (30, 0.46), "MATH500": (500, 0.85)}, (0.01, 0.05), (1, 64))
    assert len(table) == 2 * 2 * 2 * 2
    row = table[(table["benchmark"] == "AIME 2024") & (table["difference"] == 0.05) & (table["problems"] == "same")].iloc[1]
    assert (row["k"], row["power"]) == (64, power.power(0.46, 0.51, 30, 64))
    assert row["needed"] == power.samples_needed(0.46, 0.51, 30, multiple=power.multiple_for(0.8))
    by_k = table.pivot_table("power", ["benchmark", "difference", "problems"], "k")
    assert (by_k[64] > by_k[1]).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: power.variance(46.1, 30, 1), "p 46.1"),
        (lambda: power.variance(0.5, 30, 0), "k 0"),
        (lambda: power.variance(0.5, 30, 1, "all"), "problems 'all'"),
        (lambda: power.multiple_for(1), "power 1"),
        (lambda: power.power_curves({"AMC 2023": (40, 0.97)}), "differences: 0.05 on AMC 2023's 0.97"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(UserError, match=message):
        call()


@pytest.fixture(scope="module")
def published_gains():
    return audit()["gains"]


def test_gains_figure_can_be_read_and_shows_the_table(published_gains):
    figure = benchmark_figures.gains_and_noise(published_gains)
    assert_readable(figure)
    panel = figure.axes[3]  # the same problems, first model
    rows = published_gains.query("problems == 'same' and rho == .6 and base == 'DeepScaleR-1.5B-Preview'")
    assert list(panel.lines[0].get_ydata()) == rows.drop_duplicates("column")["gain"].tolist()
    tops = [[bar.get_y() + bar.get_height() for bar in bars] for bars in panel.containers]
    np.testing.assert_allclose(tops, [rows[rows["k"] == k]["bound"].tolist() for k in (1, 16, 64)])


def test_gains_figure_shows_losses(published_gains):
    figure = benchmark_figures.gains_and_noise(published_gains.assign(gain=-published_gains["gain"]))
    assert figure.axes[0].get_ylim()[0] < -published_gains["gain"].max()


def test_power_figure_can_be_read_and_shows_the_table():
    sizes = {"AIME 2024": (30, 0.46), "MATH500": (500, 0.85), "MinervaMATH": (272, 0.26)}
    table = power.power_curves(sizes)
    figure = benchmark_figures.power_curves(table)
    assert_readable(figure)
    words = " ".join(text.get_text() for text, _ in shown_texts(figure))
    assert "30 problems, 46%" in words and "0.5 points" in words
    drawn_curve = figure.axes[0].lines[0].get_ydata()
    expected = table.query("benchmark == 'AIME 2024' and difference == .005 and problems == 'same'")["power"]
    assert list(drawn_curve) == expected.tolist()


def test_gains_at_other_samples_and_rho():
    table = gains(load(), samples=(3,), rho=0.7)
    assert set(table["k"]) == {3} and set(table["rho"]) == {0.7, 0.8}
