"""Figures: data in, `Figure` out. Every one says what was measured, on how much, and with which interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import norm

from ..evaluation.stats import Interval, mean_interval, paired_gain, pass_at_1
from ..provenance import write_json

# Outside any style.context, which would undo the inline backend's interactive mode: notebooks then show only a first figure.
plt.switch_backend(plt.get_backend())
STYLE = str(Path(__file__).with_name("gcpo.mplstyle"))
# One look per method in every figure: colour, line and marker differ, so that grey copies stay readable.
LOOKS = {
    "grpo": {"color": "#0072B2", "linestyle": "--", "marker": "o", "label": "GRPO"},
    "gcpo": {"color": "#D55E00", "linestyle": "-", "marker": "s", "label": "GCPO"},
    "dr_grpo": {"color": "#009E73", "linestyle": "-.", "marker": "^", "label": "Dr.GRPO"},
    "gvpo": {"color": "#CC79A7", "linestyle": ":", "marker": "D", "label": "GVPO"},
}


def save(figure: Figure, data: Any, path: str | Path) -> None:
    """Save as PNG and SVG, and beside them, as JSON, the numbers that the figure shows.

    data: JSON's types, in which NaN is refused; tables (`pandas.DataFrame`) may stand in it, their NaN and ±inf become null.
    """
    save_pictures(figure, path)
    write_json(Path(path).with_suffix(".json"), _plain(data))


def save_pictures(figure: Figure, path: str | Path) -> list[Path]:
    """Save as PNG and SVG alone; the files."""
    files = [Path(path).with_suffix(suffix) for suffix in (".png", ".svg")]
    files[0].parent.mkdir(parents=True, exist_ok=True)
    with plt.style.context(STYLE):  # its resolution and its svg.hashsalt count only while a file is written
        figure.savefig(files[0])
        figure.savefig(files[1], metadata={"Date": None})  # the same data, the same bytes
    return files


def _plain(data: Any) -> Any:
    if isinstance(data, pd.DataFrame):
        finite = data.replace([np.inf, -np.inf], np.nan)
        return {str(name): [None if pd.isna(value) else value for value in column.tolist()] for name, column in finite.items()}
    return {str(key): _plain(value) for key, value in data.items()} if isinstance(data, dict) else data


def learning_curve_data(results: dict[str, Any], level: float = 0.95) -> dict[str, Any]:
    """Per method: mean and t interval over seeds of the training reward at every step and of held-out pass@1.

    Args:
        results: `results.json` of an experiment.
        level: of the intervals; with a single seed there is none and its bounds are null.
    """
    curves: dict[str, Any] = {}
    for method in results["config"]["methods"]:
        arms = [arm for arm in results["arms"] if arm["method"] == method]
        reward = np.array([[step["reward"] for step in arm["steps"]] for arm in arms], dtype=float)  # (seeds, steps)
        counts = [[e["counts"] for e in arm["evaluations"]] for arm in arms]
        held_out = np.array([[np.sum(c["correct"]) / (c["samples"] * len(c["correct"])) for c in row] for row in counts])
        curves[method] = {
            "reward": bands([step["step"] for step in arms[0]["steps"]], reward, level),
            "pass_at_1": bands([e["step"] for e in arms[0]["evaluations"]], held_out, level),
        }
    config = results["config"]
    return {
        "curves": curves, "level": level, "seeds": len(config["seeds"]), "questions": config["eval_questions"],
        "samples": config["eval_samples"], "model": config["model"], "quantization": config["quantization"],
        "group_size": config["group_size"], "batch_size": config["batch_size"],
    }  # fmt: skip


def bands(steps: list[int], values: np.ndarray, level: float) -> dict[str, list]:
    """Mean and interval at each step; (seeds, steps) in."""
    intervals = [mean_interval(column, level) for column in values.T]
    single = len(values) == 1
    return {
        "step": steps,
        "mean": [interval.mean for interval in intervals],
        "low": [None if single else interval.low for interval in intervals],
        "high": [None if single else interval.high for interval in intervals],
    }


def learning_curves(data: dict[str, Any]) -> Figure:
    """Training reward and held-out pass@1 of each method, from `learning_curve_data`."""
    seeds, level = data["seeds"], f"{data['level']:.0%}"
    uncertainty = f"bands, bars: {level} t intervals over {seeds} seeds" if seeds > 1 else "one seed, no interval"
    with plt.style.context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(7.0, 2.8))
        shifts = {method: 0.008 * k - 0.004 for k, method in enumerate(data["curves"])}  # side by side, not on top
        for method, curve in data["curves"].items():
            look = LOOKS[method]
            _draw(left, curve["reward"], {**look, "marker": "none"})
            _draw(right, curve["pass_at_1"], look, bars=True, shift=shifts[method] * curve["reward"]["step"][-1])
        left.set(xlabel="optimiser step", ylabel="mean reward of a batch", ylim=(0, 1.02))
        left.set_title(f"Training, {data['batch_size']} answers a step", loc="left")
        right.set(xlabel="optimiser step", ylabel="pass@1", ylim=(None, 1.02))
        right.set_title(f"Held out, {data['questions']} questions × {data['samples']} answers", loc="left")
        right.legend(loc="lower right")
        figure.suptitle(
            f"Measured: {data['model']} policy, {data['quantization']}, n = {data['group_size']}; {uncertainty}",
            fontsize=8.5, x=0.01, ha="left",
        )  # fmt: skip
    return figure


def pass_at_1_table(results: dict[str, Any], level: float = 0.95) -> pd.DataFrame:
    """Held-out pass@1 in per cent: before, after and gained by each method, then the difference between two methods.

    Args:
        results: `results.json` of an experiment.
        level: of the t intervals, "[low, high]". Rows of one method take them over questions (the seeds share them); the
            last row over seeds, paired: both methods saw the same questions in the same order.
    """
    samples, methods = results["config"]["eval_samples"], results["config"]["methods"]
    before, after = (_correct(results, at) for at in (0, -1))
    rows = [
        {
            "": LOOKS[method]["label"], "before": _percent(pass_at_1(before[method], samples, level)),
            "after": _percent(pass_at_1(after[method], samples, level)),
            "gain": _percent(paired_gain(before[method], after[method], samples, level), "+"),
        }
        for method in methods
    ]  # fmt: skip
    if len(methods) == 2:
        first, second = (after[method].mean(1) / samples for method in methods)  # (seeds,)
        names = " − ".join(LOOKS[method]["label"] for method in reversed(methods))
        rows.append({"": names, "before": "", "after": _percent(mean_interval(second - first, level), "+"), "gain": ""})
    return pd.DataFrame(rows).set_index("")


def _correct(results: dict[str, Any], at: int) -> dict[str, np.ndarray]:
    """Right answers per question at evaluation number `at`, (seeds, questions) for each method."""
    return {
        method: np.array([a["evaluations"][at]["counts"]["correct"] for a in results["arms"] if a["method"] == method])
        for method in results["config"]["methods"]
    }


def _percent(value: Interval, sign: str = "") -> str:
    if not np.isfinite(value.low):
        return f"{100 * value.mean:{sign}.1f} [one seed, no interval]"
    return f"{100 * value.mean:{sign}.1f} [{100 * value.low:{sign}.1f}, {100 * value.high:{sign}.1f}]"


UPSILON_PANELS = {
    "gcpo/upsilon_mean": "mean Υ of a batch",
    "gcpo/upsilon_reward_corr": "correlation of Υ and reward\nwithin groups",
    "gcpo/slope": "slope b̂ of the projection",
}


def upsilon_curve_data(results: dict[str, Any]) -> dict[str, Any]:
    """What Υ did in GCPO's training: per seed the logged values at each step, null where nothing could be measured."""
    arms = [arm for arm in results["arms"] if arm["method"] == "gcpo"]
    metrics = {name: [[step.get(name) for step in arm["steps"]] for arm in arms] for name in UPSILON_PANELS}
    steps = [step["step"] for step in arms[0]["steps"]] if arms else []
    return {"step": steps, "metrics": metrics, "alpha": results["config"]["alpha"]}


def upsilon_curves(data: dict[str, Any]) -> Figure:
    """Three of GCPO's metrics against the step, one thin line per seed and their mean, from `upsilon_curve_data`."""
    with plt.style.context(STYLE):
        figure, panels = plt.subplots(1, 3, figsize=(7.0, 2.2))
        for axes, (name, label) in zip(panels, UPSILON_PANELS.items(), strict=True):
            values = np.array(data["metrics"][name], dtype=float)  # (seeds, steps); null becomes NaN
            axes.plot(data["step"], values.T, color=LOOKS["gcpo"]["color"], alpha=0.35, linewidth=0.7)
            mean = np.ma.masked_invalid(values).mean(0).filled(np.nan)
            axes.plot(data["step"], mean, color=LOOKS["gcpo"]["color"])
            axes.set(xlabel="optimiser step", ylabel=label)
        panels[1].set_title(f"thin: {len(values)} seeds, thick: mean", loc="left")
        panels[0].axhline(data["alpha"], color="#333333", linestyle=":", linewidth=0.9)
        panels[0].set_title(f"dotted: α = {data['alpha']:g}, the maximum", loc="left")
        panels[2].axhline(0.5, color="#333333", linestyle=":", linewidth=0.9)
        panels[2].set_title("dotted: ½, needed to help", loc="left")
    return figure


def _draw(axes: Any, curve: dict[str, list], look: dict[str, Any], bars: bool = False, shift: float = 0.0) -> None:
    step, mean = np.array(curve["step"]) + shift, np.array(curve["mean"])
    axes.plot(step, mean, **look)
    if curve["low"][0] is None:
        return
    low, high = np.clip(curve["low"], 0, 1), np.clip(curve["high"], 0, 1)
    if bars:
        axes.errorbar(step, mean, yerr=[mean - low, high - mean], fmt="none", ecolor=look["color"], capsize=2)
    else:
        axes.fill_between(step, low, high, color=look["color"], alpha=0.18, linewidth=0)


CONDITIONS = {"q": "given q", "q_right": "given q, y$_n$ right", "q_answer": "given q, y$_n$'s answer"}


def dependence_and_slope(data: dict[str, Any]) -> Figure:
    """Notebook 03: correlation of two candidates' correctness, and the slope b̂ of the two kinds of Φ.

    Args:
        data: {"dependence": {n: {condition: {"r", "null_sd", "groups"}}}, "slope": {kind: {"value", "low", "high", "questions"}},
            "level", "model"}; conditions as in `CONDITIONS`.
    """
    half = norm.ppf((1 + data["level"]) / 2)
    with plt.style.context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(7.0, 2.6), width_ratios=(3, 2))
        for k, (n, found) in enumerate(data["dependence"].items()):
            x = np.arange(len(CONDITIONS)) + 0.16 * (2 * k - 1)
            r = np.array([found[condition]["r"] for condition in CONDITIONS])
            error = half * np.array([found[condition]["null_sd"] for condition in CONDITIONS])
            left.errorbar(x, r, error, fmt="os"[k % 2], capsize=3,
                          label=f"n = {n}, {found['q']['groups']:,} groups")  # fmt: skip
            for place, value, top in zip(x, r, r + error, strict=True):
                left.annotate(f"{value:+.2f}", (place, top), (0, 2), textcoords="offset points", ha="center", fontsize=7)
        left.axhline(0, color="#333333", linewidth=0.9)
        left.set_xticks(range(len(CONDITIONS)), list(CONDITIONS.values()))
        left.set(ylabel="correlation of correctness", xlim=(-0.5, len(CONDITIONS) - 0.5))
        left.margins(y=0.12)
        left.set_title(f"Two candidates, {data['model']} policy (bars: {data['level']:.0%})", loc="left")
        left.legend(loc="center left")
        for place, found in enumerate(data["slope"].values()):
            error = [[found["value"] - found["low"]], [found["high"] - found["value"]]]
            right.errorbar([place], [found["value"]], error, fmt="D", capsize=3, color="#009E73")
        right.axhline(0, color="#333333", linewidth=0.9)
        right.axhline(0.5, color="#333333", linestyle=":", linewidth=0.9)
        right.annotate("½: helps above", (0.5, 0.5), (0, 3), textcoords="offset points", ha="center", fontsize=7)
        right.set_xticks(range(len(data["slope"])), [f"Φ of the {kind}" for kind in data["slope"]])
        right.set(ylabel="slope b̂", xlim=(-0.5, len(data["slope"]) - 0.5))
        questions = next(iter(data["slope"].values()))["questions"]
        right.set_title(f"Does it predict? {questions} questions ({data['level']:.0%})", loc="left")
    return figure
