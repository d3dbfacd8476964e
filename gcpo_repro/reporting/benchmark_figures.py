"""Figures of notebook 06, what noise the published gains meet and how many samples a difference takes; and of a step's cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .causal_figures import COLORS, MARKERS, REFERENCE
from .figures import STYLE

BLUES = ("#d3e4f1", "#8dbbdc", "#2b6ca3", "#123a5c")
KINDS = {"resampled": "problems resampled", "same": "same problems"}


def gains_and_noise(data: pd.DataFrame, samples: tuple[int, ...] = (1, 16, 64)) -> Figure:
    """GCPO minus the next best method, as published, over bands of ±2 standard errors at k samples per problem.

    Args:
        data: "gains" of `evaluation.audit.audit`, whose first ρ is drawn.
        samples: up to four k of its column "k".
    """
    data = data[data["rho"] == data["rho"].iloc[0]]
    bases, columns = list(dict.fromkeys(data["base"])), list(dict.fromkeys(data["column"]))
    x = np.arange(len(columns))
    with plt.style.context(STYLE):
        figure, grid = plt.subplots(2, len(bases), figsize=(7.0, 4.6), sharex=True, sharey=True, squeeze=False)
        for row, (kind, name) in zip(grid, KINDS.items(), strict=True):
            for axes, base in zip(row, bases, strict=True):
                rows = data[(data["problems"] == kind) & (data["base"] == base)]
                for k, color in zip(sorted(samples), BLUES, strict=False):
                    bound = rows[rows["k"] == k].set_index("column").loc[columns, "bound"]
                    axes.bar(x, 2 * bound, 0.72, bottom=-bound, color=color, label=f"2 SE at k = {k}")
                gain = rows.drop_duplicates("column").set_index("column").loc[columns, "gain"]
                axes.plot(x, gain, "D", color="white", markersize=4.5, markeredgecolor="#222222", label="published gain")
                axes.set_yscale("symlog", linthresh=0.2, linscale=0.4)
                axes.set_axisbelow(True)
            row[0].set_ylabel(f"points, {name}")
        ticks = [0, 0.2, 0.5, 1, 2, 5, 10, 20]
        grid[0, 0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        grid[0, 0].minorticks_off()
        if (data["gain"] >= 0).all():
            grid[0, 0].set_ylim(0, 1.2 * data["bound"].max())
        for axes, base in zip(grid[0], bases, strict=True):
            axes.set_title(base.removeprefix("DeepSeek-"), loc="left")
        for axes in grid[1]:
            axes.set_xticks(x, columns, rotation=90)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))
    return figure


def power_curves(data: pd.DataFrame) -> Figure:
    """Power against samples per problem: full lines on the same problems, dashed with the problems resampled.

    Args:
        data: `evaluation.power.power_curves`, a panel for each benchmark, at most five differences.
    """
    benchmarks, differences = data["benchmark"].unique(), data["difference"].unique()
    with plt.style.context(STYLE):
        figure, grid = plt.subplots(1, len(benchmarks), figsize=(7.0, 3.2), sharey=True, squeeze=False)
        for axes, benchmark in zip(grid[0], benchmarks, strict=True):
            panel = data[data["benchmark"] == benchmark]
            for difference, color, marker in zip(differences, COLORS, MARKERS, strict=False):
                for kind, line in {"same": "-", "resampled": "--"}.items():
                    rows = panel[(panel["difference"] == difference) & (panel["problems"] == kind)].sort_values("k")
                    label = f"{100 * difference:g} point{'' if difference == 0.01 else 's'}" if kind == "same" else None
                    fill = color if kind == "same" else "white"
                    axes.plot(rows["k"], rows["power"], line, color=color, marker=marker, markersize=3, markerfacecolor=fill,
                              label=label)  # fmt: skip
            axes.axhline(0.8, linestyle=":", **REFERENCE)
            axes.set_xscale("log", base=2)
            ticks = sorted(panel["k"].unique())[:: max(1, panel["k"].nunique() // 4)]
            axes.set_xticks(ticks, [f"{k:g}" for k in ticks])
            axes.minorticks_off()
            axes.set(xlabel="samples per problem k", ylim=(-0.03, 1.03))
            n, p = panel[["n", "p"]].iloc[0]
            axes.set_title(f"{benchmark}\n{n:.0f} problems, {100 * p:.0f}%", loc="left")
        grid[0, 0].set_ylabel("power at 5%, two-sided (dotted: 80%)")
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=len(differences),
                      title="true difference; full: same problems, dashed: problems resampled", alignment="left",
                      title_fontsize=7.5)  # fmt: skip
    return figure


COSTS = {
    "fast": ("GCPO fast (state, L = 2, last eighth)", "#56B4E9", ""), "full": ("GCPO (state, L = 2, whole)", "#D55E00", "//"),
    "literal": ("GCPO as printed (n³ rollouts)", "#333333", "xx"),
}  # fmt: skip


def step_cost(runs: Sequence[dict[str, Any]]) -> Figure:
    """Time and memory of a GCPO step over a GRPO step of the same run; the token floor of each beside it.

    Args:
        runs: files of `tests/benchmarks/step_cost.py --json`, a group of bars each.
    """
    with plt.style.context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(7.0, 3.2), width_ratios=(3, 2))
        for k, (method, (label, color, hatch)) in enumerate(COSTS.items()):
            look = {"color": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0, "label": label}
            _cost_bars(left, runs, f"{method}_ratio", 0.28 * (k - 1), look)
            _cost_bars(right, runs, f"{method}_memory_ratio", 0.28 * (k - 0.5), look)  # the literal one is not measured
            floors = [run.get(f"{method}_floor_ratio", np.nan) for run in runs]
            once = "token floor" if method == "fast" else None
            left.plot(np.arange(len(runs)) + 0.28 * (k - 1), floors, "_", color="black", markersize=14, label=once)
        names = [f"n = {run['config']['group_size']},\n{run['config']['tokens']} tokens" for run in runs]
        for axes, title in ((left, "Time"), (right, "Memory that steps add")):
            axes.axhline(1, linestyle=":", **REFERENCE)
            axes.set_xticks(range(len(runs)), names)
            axes.set_axisbelow(True)
            axes.grid(axis="x", visible=False)
            axes.set_title(title, loc="left")
        ticks = [1, 2, 3, 5, 10, 20, 50, 100, 200]
        left.set(yscale="log", ylabel="times GRPO (dotted: 1)", ylim=(0.7, 1.5 * left.get_ylim()[1]))
        left.set_yticks([tick for tick in ticks if tick < left.get_ylim()[1]], [f"{t}" for t in ticks if t < left.get_ylim()[1]])
        left.minorticks_off()
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=2, title=_cost_caption(runs),
                      alignment="left", title_fontsize=7.5)  # fmt: skip
    return figure


def _cost_bars(axes: Axes, runs: Sequence[dict[str, Any]], key: str, shift: float, look: dict[str, Any]) -> None:
    for place, run in enumerate(runs):
        if key in run:
            axes.bar(place + shift, run[key], 0.26, **{**look, "label": look["label"] if place == 0 else None})
            at = (place + shift, run[key])
            axes.annotate(f"{run[key]:.1f}", at, (0, 2), textcoords="offset points", ha="center", fontsize=7)


def _cost_caption(runs: Sequence[dict[str, Any]]) -> str:
    config, hardware = runs[0]["config"], runs[0]["hardware"]
    where = hardware["gpus"][0]["name"] if hardware["gpus"] else f"{hardware['cpu']}, threads: {config['threads']}"
    literal = next((f"; as printed: {run['literal_tokens']} tokens" for run in runs if "literal_tokens" in run), "")
    return (
        f"Measured: {config['model'] or 'random weights, size of the toy policy'}, {config['groups']} questions a step; {where}\n"
        f"medians of {config['repeats']} interleaved repeats, one seed, no interval{literal}"
    )
