"""Figures: data in, `Figure` out. Every one says what was measured, on how much, and with which interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from ..evaluation.stats import mean_interval
from ..provenance import write_json

STYLE = str(Path(__file__).with_name("gcpo.mplstyle"))
# One look per method in every figure: colour, line and marker differ, so that grey copies stay readable.
LOOKS = {
    "grpo": {"color": "#0072B2", "linestyle": "--", "marker": "o", "label": "GRPO"},
    "gcpo": {"color": "#D55E00", "linestyle": "-", "marker": "s", "label": "GCPO"},
}


def save(figure: Figure, data: Any, path: str | Path) -> None:
    """Save as PNG and SVG, and beside them, as JSON, the numbers that the figure shows."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".png"))
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})  # the same data, the same bytes
    write_json(path.with_suffix(".json"), data)


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
            "reward": _bands([step["step"] for step in arms[0]["steps"]], reward, level),
            "pass_at_1": _bands([e["step"] for e in arms[0]["evaluations"]], held_out, level),
        }
    config = results["config"]
    return {
        "curves": curves, "level": level, "seeds": len(config["seeds"]), "questions": config["eval_questions"],
        "samples": config["eval_samples"], "model": config["model"], "quantization": config["quantization"],
        "group_size": config["group_size"], "batch_size": config["batch_size"],
    }  # fmt: skip


def _bands(steps: list[int], values: np.ndarray, level: float) -> dict[str, list]:
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
    band = f"{level} t interval over {seeds} seeds" if seeds > 1 else "one seed, no interval"
    with plt.style.context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(7.0, 2.7))
        for method, curve in data["curves"].items():
            look = LOOKS[method]
            _draw(left, curve["reward"], {**look, "marker": "none"}, bars=False)
            _draw(right, curve["pass_at_1"], look, bars=True)
        left.set(xlabel="optimiser step", ylabel="mean reward of a batch", ylim=(0, 1.02))
        left.set_title(f"Training ({data['batch_size']} answers a step; band: {band})", loc="left")
        right.set(xlabel="optimiser step", ylabel="held-out pass@1", ylim=(0, 1.02))
        right.set_title(f"{data['questions']} questions × {data['samples']} answers (bars: {level} t)", loc="left")
        right.legend(loc="lower right")
        figure.suptitle(
            f"GRPO and GCPO, measured: {data['model']} policy, {data['quantization']}, n = {data['group_size']}",
            fontsize=9, x=0.01, ha="left",
        )  # fmt: skip
    return figure


def _draw(axes: Any, curve: dict[str, list], look: dict[str, Any], bars: bool) -> None:
    step, mean = np.array(curve["step"]), np.array(curve["mean"])
    axes.plot(step, mean, **look)
    if curve["low"][0] is None:
        return
    low, high = np.clip(curve["low"], 0, 1), np.clip(curve["high"], 0, 1)
    if bars:
        shift = 0.006 * max(step[-1], 1) * (1 if look["marker"] == "s" else -1)  # side by side, not on top
        axes.errorbar(step + shift, mean, yerr=[mean - low, high - mean], fmt="none", ecolor=look["color"], capsize=2)
    else:
        axes.fill_between(step, low, high, color=look["color"], alpha=0.18, linewidth=0)


def collider(n: int = 3) -> Figure:
    """Figure 2 of the paper, as a graph: the query q, n candidates, the integrated output y_n."""
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(3.4, 2.2))
        places = {"q": (0.0, 0.5), "y_n": (2.0, 0.5)} | {f"y_{i}": (1.0, 1 - i / (n - 1)) for i in range(n)}
        names = {"q": "$q$", "y_n": "$y_n$"} | {f"y_{i}": f"$y_{i}$" for i in range(n)}
        edges = [("q", f"y_{i}") for i in range(n)] + [(f"y_{i}", "y_n") for i in range(n)]
        for start, end in edges:
            _arrow(axes, places[start], places[end], 0.0)
        _arrow(axes, places["q"], places["y_n"], 0.75)  # around the candidates
        for node, (x, y) in places.items():
            fill = {"q": "#cfe3f1", "y_n": "#f6d3bf"}.get(node, "white")
            axes.scatter([x], [y], s=620, color=fill, edgecolor="#333333", linewidth=1.0, zorder=3)
            axes.text(x, y, names[node], ha="center", va="center", fontsize=10, zorder=4)
        axes.set(xlim=(-0.35, 2.35), ylim=(-0.62, 1.25))
        axes.axis("off")
    return figure


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], bend: float) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start, end, connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>", mutation_scale=9, shrinkA=13, shrinkB=13,
            color="#333333", linewidth=1.0,
        )  # fmt: skip
    )
