"""Figures of the benchmarks, notebook 06: what noise the published gains meet, and how many samples a difference takes."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
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
                axes.plot(x, gain, "D", color=COLORS[1], markersize=4, markeredgecolor="white", label="published gain")
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
                    label = f"{100 * difference:g} points" if kind == "same" else None
                    mark = marker if kind == "same" else ""
                    axes.plot(rows["k"], rows["power"], line, color=color, marker=mark, markersize=3, label=label)
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
