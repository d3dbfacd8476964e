"""The paper's Figure 3 and its gradient norms: what is printed there, and in another look what was measured here.

Published numbers are hollow and grey (bars hatched), measured ones filled and coloured, with intervals. Numbers that the paper
only draws are not guessed: their place says "not printed in the paper". Figure 2 is `gcpo_repro.graph.draw`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..errors import UserError
from .causal_figures import REFERENCE
from .figures import LOOKS, STYLE, bands
from .tables import measured

HOLLOW: dict[str, Any] = {"color": "#444444", "markerfacecolor": "white", "linestyle": "none", "markersize": 6}
HATCHED: dict[str, Any] = {"facecolor": "white", "edgecolor": "#444444", "hatch": "////", "linewidth": 0.9}
MEASURED: dict[str, Any] = {"color": LOOKS["gcpo"]["color"], "marker": "s", "markersize": 4.5, "capsize": 3}
NOT_PRINTED = "not printed in the paper"
SHOTS = {"HumanEval": "0-shot", "HumanEval, 5-shot": "5-shot"}
BARS = ("base", "GRPO", "ReST-MCTS", "GVPO", "Dr.GRPO", "GCPO")
SIMILARITIES = {"cosine": "cosine", "euclidean": "Euclidean", "gaussian": "Gaussian"}


def code_tasks(published: pd.DataFrame, evaluations: Sequence[dict[str, Any]] = ()) -> Figure:
    """Figure 3 (a): pass@1 on HumanEval, 0-shot and 5-shot.

    Args:
        published: `evaluation.published.load`.
        evaluations: `results.json` of `gcpo-repro evaluate`; those with HumanEval are drawn beside the published bars.
    """
    base = str(published[published["table"] == "HumanEval"]["base"].iloc[0])
    found = {column: measured(evaluations, column) for column in SHOTS}
    most = max(map(len, found.values()))
    with plt.style.context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(7.0, 3.2), sharey=True)
        for axes, (column, shots) in zip(panels, SHOTS.items(), strict=True):
            _published_bars(axes, published, column)
            _measured_bars(axes, found[column])
            names = [*BARS, *(_measured_name(entry["model"], found) for entry in found[column])]
            axes.set_xticks(range(len(names)), names, rotation=90)
            axes.set(ylim=(0, 100), xlim=(-0.6, len(BARS) + most - 0.4))
            axes.grid(visible=False)  # the values stand above the bars
            axes.set_title(f"HumanEval, {shots}", loc="left")
        panels[0].set_ylabel("pass@1, per cent")
        handles = [plt.Rectangle((0, 0), 1, 1, **HATCHED), plt.Rectangle((0, 0), 1, 1, **{**HATCHED, "hatch": "", "ls": ":"})]
        labels = ["published: printed", "published: implied by the printed gain of GCPO"]
        figure.legend(handles, labels, loc="outside upper left", ncols=2, alignment="left", title=_code_caption(base, found),
                      title_fontsize=7.5)  # fmt: skip
    return figure


def _published_bars(axes: Axes, published: pd.DataFrame, column: str) -> None:
    rows = published[(published["table"] == "HumanEval") & (published["column"] == column)].set_index("method")["value"]
    values = {"GCPO": rows["GCPO"], "base": rows["GCPO"] - rows["GCPO − base"]}
    for place, method in enumerate(BARS):
        if method not in values:
            axes.text(place, 3, NOT_PRINTED, rotation=90, ha="center", va="bottom", fontsize=7, color="#444444")
            continue
        implied = {"hatch": "", "linestyle": ":"} if method == "base" else {}
        axes.bar(place, values[method], 0.7, **{**HATCHED, **implied})
        _above(axes, place, values[method], values[method])


def _measured_bars(axes: Axes, found: list[dict[str, Any]]) -> None:
    for place, entry in enumerate(found, start=len(BARS)):
        mean, low, high = (100 * entry["pass_at_1"][key] for key in ("mean", "low", "high"))
        axes.bar(place, mean, 0.7, color=MEASURED["color"])
        axes.errorbar(place, mean, [[mean - low], [high - mean]], ecolor="black", capsize=3)
        _above(axes, place, high, mean)


def _above(axes: Axes, x: float, y: float, value: float) -> None:
    axes.annotate(f"{value:.1f}", (x, y), (0, 2), textcoords="offset points", ha="center", fontsize=7)


def _measured_name(model: str, found: dict[str, list[dict[str, Any]]]) -> str:
    """"measured", with a number where there are several models."""
    models = list(dict.fromkeys(entry["model"] for entries in found.values() for entry in entries))
    return "measured" if len(models) == 1 else f"measured {models.index(model) + 1}"


def _code_caption(base: str, found: dict[str, list[dict[str, Any]]]) -> str:
    lines = [f"published: {base}; samples per problem, seeds and intervals are {NOT_PRINTED}"]
    for entries in found.values():
        for e in entries:
            asked = f"{e['problems_asked']} problems × {e['samples']} answers, seed {e['seed']}"
            lines.append(f"{_measured_name(e['model'], found)}: {e['model']}, {asked}; bars: 95%, problems resampled")
    return "\n".join(dict.fromkeys(lines if any(found.values()) else [*lines, "measured: nothing yet"]))


# --- Sweeps -----------------------------------------------------------------------------------------------------


def alpha_sweep(published: pd.DataFrame, sweeps: dict[str, Any] | None = None) -> Figure:
    """Figure 3 (b): the scale α of Υ. published: `published.load`; sweeps: `sweeps.sweep_data`, None where there is none."""
    return _sweep("alpha", "scale α of Υ (Eq. 11)", _grid(published, "α"), sweeps, note=f"pass@1: {NOT_PRINTED}")


def kappa_sweep(published: pd.DataFrame, sweeps: dict[str, Any] | None = None) -> Figure:
    """Figure 3 (c): the weight κ of the causal KL term. Arguments as in `alpha_sweep`."""
    step = published[published["column"] == "κ grid, fine step"]["printed"].iloc[0]
    note = f"pass@1: {NOT_PRINTED}\n(then steps of {step} in an interval that is not named)"
    return _sweep("kappa", "weight κ of the causal KL term (Eq. 12)", _grid(published, "κ"), sweeps, note)


def similarities(published: pd.DataFrame, sweeps: dict[str, Any] | None = None) -> Figure:
    """Figure 3 (d): the similarity in Υ. Arguments as in `alpha_sweep`; the paper calls the differences negligible."""
    grid: tuple[list[Any], Any] = (list(SIMILARITIES), "cosine")
    note = f"pass@1: {NOT_PRINTED}\n(the differences are said to be negligible)"
    return _sweep("similarity", "similarity in Υ (Eq. 11)", grid, sweeps, note)


def _grid(published: pd.DataFrame, symbol: str) -> tuple[list[float], float]:
    """The values that the paper tried, and the one that it took."""
    rows = published[(published["table"] == "settings") & (published["method"] == "GCPO")]
    return rows[rows["column"] == f"{symbol} grid"]["value"].tolist(), float(rows[rows["column"] == symbol]["value"].iloc[0])


def _sweep(name: str, label: str, grid: tuple[list[Any], Any], sweeps: dict[str, Any] | None, note: str) -> Figure:
    tried, best = grid
    points = [point for point in (sweeps or {}).get("points", []) if point["sweep"] == name]
    place = {value: k for k, value in enumerate(tried)} if name == "similarity" else {value: value for value in tried}
    with plt.style.context(STYLE):
        figure, (above, below) = plt.subplots(2, 1, figsize=(7.0, 3.0), sharex=True, height_ratios=(1, 5))
        others = [place[value] for value in tried if value != best]
        above.plot(others, np.zeros(len(others)), "o", **HOLLOW)
        above.plot(place[best], 0, "*", **{**HOLLOW, "markersize": 11})
        above.set(yticks=[], ylim=(-1, 1))
        above.set_title(f"Published: what was tried, the star was chosen; {note}", loc="left")
        above.tick_params(bottom=False)
        for side in ("left", "bottom"):
            above.spines[side].set_visible(False)
        if points:
            assert sweeps is not None
            _measured_points(below, points, place, joined=name != "similarity")
            below.set_title(_sweep_caption(sweeps), loc="left")
        else:
            below.set_yticks([])
            below.text(0.5, 0.5, "no measured values", transform=below.transAxes, ha="center", va="center", fontsize=8)
            below.set_title("Measured: nothing yet (python -m gcpo_repro.reporting.sweeps)", loc="left")
        below.set(xlabel=label, ylabel="held-out pass@1,\nper cent")
        if name == "similarity":
            below.set_xticks(range(len(tried)), [SIMILARITIES[value] for value in tried])
            below.set_xlim(-0.5, len(tried) - 0.5)
    return figure


def _measured_points(axes: Axes, points: list[dict[str, Any]], place: dict[Any, Any], joined: bool) -> None:
    at = np.array([place.get(point["value"], point["value"]) for point in points], dtype=float)
    order = np.argsort(at)
    mean, low, high = (100 * np.array([point[key] for point in points])[order] for key in ("mean", "low", "high"))
    axes.errorbar(at[order], mean, [mean - low, high - mean], fmt="-" if joined else "none", **MEASURED, label="mean")
    if not joined:
        axes.plot(at[order], mean, **{key: MEASURED[key] for key in ("color", "marker", "markersize")}, linestyle="none")
    for x, k in zip(at[order], order, strict=True):
        seeds = 100 * np.array(points[k]["seeds"])
        axes.plot(np.full(len(seeds), x), seeds, "x", color="black", markersize=4, markeredgewidth=0.9, zorder=3)
    axes.margins(y=0.12)


def _sweep_caption(sweeps: dict[str, Any]) -> str:
    config, seeds = sweeps["config"], len(sweeps["seeds"])
    crosses = f"{seeds} seeds (crosses)" if seeds > 1 else "one seed"
    return (
        f"Measured: {config['model']} policy, {config['quantization']}, n = {config['group_size']}, {config['steps']} steps, "
        f"{crosses};\n{sweeps['questions']} questions × {sweeps['samples']} answers; "
        f"bars: {sweeps['level']:.0%} t intervals over questions, seeds averaged"
    )


# --- Gradient norms ---------------------------------------------------------------------------------------------


def gradient_norm_data(results: dict[str, Any], level: float = 0.95) -> dict[str, Any]:
    """Per method the gradient norm at every step, mean and t interval over seeds.

    Args:
        results: `results.json` of an experiment. level: of the intervals.

    Raises:
        UserError: an arm that logged no gradient norm at some step.
    """
    curves, config = {}, results["config"]
    for method in config["methods"]:
        arms = [arm for arm in results["arms"] if arm["method"] == method]
        for arm in arms:
            if missing := [step["step"] for step in arm["steps"] if step.get("grad_norm") is None]:
                raise UserError(f"results: {method}, seed {arm['seed']}: no finite grad_norm at steps {missing[:5]}; train again")
        norms = np.array([[step["grad_norm"] for step in arm["steps"]] for arm in arms], dtype=float)  # (seeds, steps)
        curves[method] = bands([step["step"] for step in arms[0]["steps"]], norms, level)
    kept = {key: config[key] for key in ("model", "quantization", "group_size", "batch_size", "alpha", "learning_rate")}
    return {"curves": curves, "level": level, "seeds": len(config["seeds"]), **kept}


def gradient_norm(data: dict[str, Any]) -> Figure:
    """The appendix's plot of stability: gradient norms over training, measured, from `gradient_norm_data`; and their ratio.

    Advantages that are α times as large give gradients about α times as large: the right panel shows GCPO's over GRPO's.
    """
    curves, seeds = data["curves"], data["seeds"]
    both = {"grpo", "gcpo"} <= set(curves)
    with plt.style.context(STYLE):
        figure, panels = plt.subplots(1, 1 + both, figsize=(7.0, 2.8), width_ratios=(3, 2)[: 1 + both], squeeze=False)
        left = panels[0, 0]
        for method, curve in curves.items():
            left.plot(curve["step"], curve["mean"], **{**LOOKS[method], "marker": "none"})
            if seeds > 1:
                low = np.maximum(np.array(curve["low"], dtype=float), 0)
                left.fill_between(curve["step"], low, curve["high"], color=LOOKS[method]["color"], alpha=0.18, linewidth=0)
        left.set(xlabel="optimiser step", ylabel="gradient norm", ylim=(0, None))
        uncertainty = f"{data['level']:.0%} t bands over {seeds} seeds" if seeds > 1 else "one seed, no interval"
        left.set_title(f"{data['batch_size']} answers a step; {uncertainty}", loc="left")
        left.legend(loc="upper right")
        if both:
            right, ratio = panels[0, 1], np.array(curves["gcpo"]["mean"]) / np.array(curves["grpo"]["mean"])
            right.plot(curves["grpo"]["step"], ratio, color="#333333", linewidth=1)
            right.axhline(data["alpha"], linestyle=":", **REFERENCE)
            right.set(xlabel="optimiser step", ylabel="norm of GCPO / norm of GRPO", ylim=(0, None))
            right.set_title(f"dotted: α = {data['alpha']:g}", loc="left")
        figure.suptitle(
            f"Measured: {data['model']} policy, {data['quantization']}, n = {data['group_size']}, learning rate "
            f"{data['learning_rate']:g}.  Published: drawn only, no norm is printed in the paper",
            fontsize=8.5, x=0.01, ha="left",
        )  # fmt: skip
    return figure
