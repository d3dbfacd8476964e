"""Figures of the causal analysis, notebooks 01 and 02: tables of `gcpo_repro.studies` in, `Figure` out.

Lines are closed forms, points are simulations, bars are 95% intervals.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .figures import STYLE

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v")
GIVEN = {"q": "given q", "q,yn": "given q, y$_n$", "all": "and the other candidates"}
REFERENCE = {"color": "#333333", "linewidth": 0.9}
SIMULATED = "lines: closed form; points: simulation, bars: 95%"


def residual_scatter(data: pd.DataFrame, tau: float) -> Figure:
    """Residuals of two candidates given q: all rows, and those whose y_n lies in a narrow slice (`studies.residuals`)."""
    with plt.style.context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(5.6, 3.0), sharex=True, sharey=True)
        cases = {"given q": data, "given q and a slice of y$_n$": data[data["in slice"]]}
        for axes, (name, rows), color in zip(panels, cases.items(), COLORS, strict=False):
            r = np.corrcoef(rows["e_0"], rows["e_1"])[0, 1]
            shown = rows.iloc[:2000]
            axes.scatter(shown["e_0"], shown["e_1"], s=4, alpha=0.4, color=color, linewidths=0, rasterized=True)
            axes.set(xlabel="residual of y$_0$", aspect="equal", xlim=(-4, 4), ylim=(-4, 4))
            axes.set_title(f"{name}\nr = {r:+.3f}, {len(rows):,} rows", loc="left")
        panels[0].set_ylabel("residual of y$_1$")
        figure.suptitle(f"The fork and the collider, linear model, n = 2, τ = {tau:g}", fontsize=8.5, x=0.01, ha="left")
    return figure


def partial_correlations(data: pd.DataFrame) -> Figure:
    """`studies.partial_correlation_sweep`: theory as lines, simulation as points."""
    labels = {"tau": "noise τ of y$_n$ (n = 3)", "n": "group size n (τ = ½)", "c_1": "weight c$_1$ of y$_1$ (c$_0$ = 1)"}
    with plt.style.context(STYLE):
        figure, panels = plt.subplots(1, 3, figsize=(7.0, 2.7), sharey=True)
        for axes, (panel, label) in zip(panels, labels.items(), strict=True):
            for k, (given, name) in enumerate(GIVEN.items()):
                rows = data[(data["panel"] == panel) & (data["given"] == given)].sort_values("x")
                axes.plot(rows["x"], rows["theory"], color=COLORS[k])
                axes.errorbar(rows["x"], rows["simulated"], rows["error"], **_look(k), label=name)
            axes.axhline(0, **REFERENCE)
            axes.set_xlabel(label)
        n = np.array([2, 12])
        panels[1].plot(np.arange(*n), -1 / (np.arange(*n) - 1), ":", **REFERENCE)
        panels[1].annotate("−1/(n − 1)", (3.1, -0.6), fontsize=7)
        panels[0].set_ylabel("correlation of y$_0$ and y$_1$")
        _legend_above(figure, panels[0], SIMULATED)
    return figure


def rejection_rates(data: pd.DataFrame, level: float = 0.05) -> Figure:
    """`studies.rejection_rates`: size (given q) and power (given q, y_n) of the tests on each model."""
    models, tests = list(dict.fromkeys(data["model"])), list(dict.fromkeys(data["test"]))
    counts = [data.loc[data["test"] == test, "repetitions"].iloc[0] for test in tests]
    with plt.style.context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(7.0, 2.7), sharey=True)
        titles = {"q": "Independent: rejections are false", "q,yn": "Dependent: rejections are right"}
        for axes, (given, title) in zip(panels, titles.items(), strict=True):
            for k, (test, count) in enumerate(zip(tests, counts, strict=True)):
                rows = data[(data["test"] == test) & (data["given"] == given)].set_index("model").loc[models]
                x = np.arange(len(models)) + 0.2 * (k - (len(tests) - 1) / 2)
                bars = [rows["rate"] - rows["low"], rows["high"] - rows["rate"]]
                axes.errorbar(x, rows["rate"], np.clip(bars, 0, 1), fmt=MARKERS[k], color=COLORS[k], capsize=2,
                              label=f"{test}, {count} data sets")  # fmt: skip
            axes.axhline(level, linestyle=":", **REFERENCE)
            axes.set_xticks(range(len(models)), [model.replace(" ", "\n", 1) for model in models])
            axes.set_title(title, loc="left")
        panels[0].set(ylabel=f"rejection rate at {level:g} (dotted)", ylim=(-0.03, 1.03))
        _legend_above(figure, panels[0], "bars: 95% Wilson intervals over data sets")
    return figure


def reasoning(data: pd.DataFrame) -> Figure:
    """`studies.reasoning_correlations`: right and wrong answers and a majority vote."""
    with plt.style.context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(7.0, 2.5), sharey=True)
        for axes, (y_n, title) in zip(panels, {1: "y$_n$ right", 0: "y$_n$ wrong"}.items(), strict=True):
            for k, (n, rows) in enumerate(data[data["y_n"] == y_n].groupby("n")):
                axes.plot(rows["p"], rows["theory"], color=COLORS[k])
                axes.errorbar(rows["p"], rows["simulated"], rows["error"], **_look(k), label=f"n = {n}")
            axes.axhline(0, **REFERENCE)
            axes.set(xlabel="probability that an answer is right")
            axes.set_title(title, loc="left")
        panels[0].set_ylabel("correlation of two answers")
        _legend_above(figure, panels[0], SIMULATED)
    return figure


def theorem_1_and_corollary_2(gaps: pd.DataFrame, counter: pd.DataFrame) -> Figure:
    """Predicted against measured gain of Theorem 1, and Corollary 2 against the slope b."""
    random, bayes = gaps.iloc[:-1], gaps.iloc[-1]
    with plt.style.context(STYLE):
        figure, (first, second, third) = plt.subplots(1, 3, figsize=(7.0, 2.6))
        _points(first, random["theorem 1"], random["measured 1"], random["error 1"], 0)
        first.plot([0, random["theorem 1"].max()], [0, random["theorem 1"].max()], **REFERENCE)
        first.plot(bayes["theorem 1"], bayes["measured 1"], "*", color=COLORS[1], markersize=9)
        first.annotate("Bayes: 0 = 0", (0, 0), (9, -2), textcoords="offset points", fontsize=7, color=COLORS[1])
        first.set(xlabel="predicted gain ‖E[f | G] − m‖²", ylabel="measured gain", yscale="symlog", xscale="symlog")
        first.set_title("Theorem 1: any f gains", loc="left")

        ratio = random["measured 2"] / random["square"]
        _points(second, random["slope"], ratio, random["error 2"] / random["square"], 0)
        b = np.array([random["slope"].min(), random["slope"].max()])
        second.plot(b, 2 * b - 1, **REFERENCE)
        second.plot(bayes["slope"], bayes["measured 2"] / bayes["square"], "*", color=COLORS[1], markersize=9)
        _half(second)
        second.set(xlabel="slope b", ylabel="gain / E‖Ψf‖²")
        second.set_title("Corollary 2: needs b ≥ ½", loc="left")

        b = np.linspace(counter["slope"].min(), counter["slope"].max(), 200)
        third.plot(b, 1 / b - 1 / (2 * b**2), **REFERENCE)
        _points(third, counter["slope"], counter["simulated"], counter["error"], 2)
        _half(third)
        third.set(xlabel="slope b = 1/(2a)", ylabel="gain")
        third.set_title("f = a(y$_2$ − y$_1$): it can lose", loc="left")
        figure.suptitle(f"{len(random)} random predictors; {SIMULATED}", fontsize=7.5, x=0.01, ha="left")
    return figure


def _look(k: int) -> dict[str, Any]:
    return {"fmt": MARKERS[k], "color": COLORS[k], "markersize": 3.5}


def _legend_above(figure: Figure, axes: Any, title: str) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), title=title, alignment="left", title_fontsize=7.5)


def _points(axes: Any, x: pd.Series, y: pd.Series, error: pd.Series, k: int) -> None:
    axes.errorbar(x, y, error, fmt=MARKERS[k], color=COLORS[k], markersize=2.5, elinewidth=0.7, alpha=0.75)


def _half(axes: Any) -> None:
    axes.axhline(0, **REFERENCE)
    axes.axvline(0.5, linestyle=":", **REFERENCE)


def estimated_predictors(least_squares: pd.DataFrame, kernel: pd.DataFrame) -> Figure:
    """What the projection gains for predictors that are learnt: least squares, and the kernel estimators."""
    extras = sorted(kernel["unlabelled"].unique())
    with plt.style.context(STYLE):
        figure, panels = plt.subplots(1, 1 + len(extras), figsize=(7.0, 2.7))
        for k, (gap, name) in enumerate({1: "Theorem 1", 2: "Corollary 2"}.items()):
            rows = least_squares[least_squares["gap"] == gap]
            panels[0].plot(rows["N"], rows["theory"], color=COLORS[k])
            panels[0].errorbar(rows["N"], rows["simulated"], rows["error"], **_look(k), label=name)
        panels[0].axhline(0, **REFERENCE)
        panels[0].set(xscale="log", xlabel="training rows N", ylabel="expected gain")
        panels[0].set_title("Least squares", loc="left")
        panels[0].legend()
        for axes, extra in zip(panels[1:], extras, strict=True):
            for k, estimator in enumerate(("before", "after")):
                rows = kernel[(kernel["unlabelled"] == extra) & (kernel["estimator"] == estimator)]
                x = rows["rows"] * (1 + 0.04 * (2 * k - 1))
                axes.errorbar(x, rows["gain"], rows["error"], fmt=MARKERS[k] + "-", color=COLORS[k + 2], capsize=2,
                              label=f"projected {estimator}")  # fmt: skip
            axes.axhline(0, **REFERENCE)
            axes.set(xscale="log", xlabel="training rows n", ylabel="gain over plain ridge")
            axes.set_xticks(sorted(kernel["rows"].unique()), [str(n) for n in sorted(kernel["rows"].unique())], minor=False)
            axes.minorticks_off()
            axes.set_title(f"Kernel, {extra:,} extra rows", loc="left")
        panels[1].legend()
        said = "bars: 95%, of least squares over simulated fits, of kernel ridge over paired seeds (t)"
        figure.suptitle(f"{said}; lines of least squares: closed form", fontsize=7.5, x=0.01, ha="left")
    return figure


def two_phis(data: pd.DataFrame) -> Figure:
    """`studies.phi_curve`: risk, slope and cosine of the target with the algorithm's Φ and with the theorem's."""
    level = data[data["L"] == 0].set_index("kind")
    with plt.style.context(STYLE):
        figure, panels = plt.subplots(1, 3, figsize=(7.0, 2.7))
        for k, kind in enumerate(("algorithm", "theorem")):
            rows, look = data[data["kind"] == kind], _look(k)
            panels[0].plot(rows["L"], rows["risk theory"], color=COLORS[k])
            panels[0].errorbar(rows["L"], rows["risk"], rows["risk error"], **look, label=f"Φ of the {kind}")
            panels[1].plot(rows["L"], rows["slope theory"], color=COLORS[k])
            panels[1].errorbar(rows["L"], rows["slope"], rows["slope error"], **look)
            panels[2].plot(rows["L"], rows["cosine"], MARKERS[k] + "-", color=COLORS[k], markersize=3.5)
        for kind, name in {"query": "π*(q) alone", "bayes": "Bayes"}.items():
            for axes, column in ((panels[0], "risk theory"), (panels[2], "cosine")):
                axes.axhline(level.loc[kind, column], linestyle=":", **REFERENCE)
                axes.annotate(name, (8, level.loc[kind, column]), (0, 2), textcoords="offset points", fontsize=7, ha="right")
        panels[1].axhline(0.5, linestyle=":", **REFERENCE)
        panels[1].annotate("½: helps above", (8, 0.5), (0, 2), textcoords="offset points", fontsize=7, ha="right")
        for axes, name in zip(panels, ("risk of the target", "slope b", "mean cosine with y$_0$"), strict=True):
            axes.set(xlabel="integrated outputs L", ylabel=name)
        _legend_above(figure, panels[0], f"{SIMULATED} (cosine: simulated only)")
    return figure
