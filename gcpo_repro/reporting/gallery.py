"""Every figure and table by name: where its numbers lie and which function makes it. `manifest.redraw` makes the files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from .. import graph
from ..evaluation.published import COLUMNS, SIZES
from . import benchmark_figures, causal_figures, figures, paper_figures, tables


@dataclass(frozen=True)
class Source:
    """Raw numbers: files of the data folder, the first pattern that some file matches.

    made: the command that measures them. seeds: of that command, unless the file names its own. many: all files that match, as
    a list.
    """

    patterns: tuple[str, ...]
    made: str
    seeds: tuple[int, ...] = ()
    many: bool = False


def _notebook(number: str, *names: str, seeds: tuple[int, ...] = (0,)) -> Source:
    patterns = tuple(pattern for name in names for pattern in (name, f"{number}_*/{name}"))
    return Source(patterns, f"gcpo-repro reproduce --profile cpu --only {number}", seeds)


SOURCES = {
    "published": Source((), "typed from the paper; held against itself by `gcpo-repro audit`"),
    "scm": Source(("scm.json",), "none: the paper's graph"),
    "partial_correlations": _notebook("01", "partial_correlations.json"),
    "rejection_rates": _notebook("01", "rejection_rates.json"),
    "reasoning": _notebook("01", "reasoning.json"),
    "formulas": _notebook("02", "formulas.csv"),
    "theorems": _notebook("02", "theorems.json"),
    "estimated": _notebook("02", "estimated.json", seeds=tuple(range(20))),
    "two_phis": _notebook("02", "two_phis.json"),
    "collider_in_a_model": _notebook("03", "collider_in_a_model.json"),
    "training": _notebook("05", "training_cpu.json", "results.json", seeds=(0, 1, 2)),
    "gains_and_noise": _notebook("06", "gains_and_noise.json", seeds=()),
    "power_curves": _notebook("06", "power_curves.json", seeds=()),
    "evaluations": Source(
        ("evaluation*.json", "06_*/evaluation/results.json"), "gcpo-repro evaluate --model … --benchmark …", many=True,
    ),
    "sweeps": Source(("sweeps.json",), "python -m gcpo_repro.reporting.sweeps"),
    "agreement": Source(("agreement.json",), "python tests/benchmarks/agreement.py --json figures/data/agreement.json", (0,)),
    "cost": Source(("cost*.json",), "python tests/benchmarks/step_cost.py --json cost_….json", (0,), many=True),
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A figure or a table. make: the public function; arguments: its arguments from the sources' contents.

    optional: sources that it can do without; then its argument is None, or an empty list where there may be many files.
    """

    caption: str
    make: Callable[..., Figure | pd.DataFrame]
    sources: tuple[str, ...]
    arguments: Callable[..., Sequence[Any]] = lambda *contents: contents
    optional: tuple[str, ...] = ()


def _frame(content: dict[str, list]) -> tuple[pd.DataFrame]:
    return (pd.DataFrame(content),)


FIGURES = {
    "scm": Entry(
        "Figure 2. The structural causal model: q causes every candidate, q and all candidates cause y_n. Grey: observed",
        graph.draw, ("scm",), lambda scm: (scm["n"], scm["given"]),
    ),
    "code_tasks": Entry(
        "Figure 3 (a). Code tasks: pass@1 on HumanEval", paper_figures.code_tasks, ("published", "evaluations"),
        optional=("evaluations",),
    ),
    "alpha_sweep": Entry(
        "Figure 3 (b). The scale α of Υ", paper_figures.alpha_sweep, ("published", "sweeps"), optional=("sweeps",),
    ),
    "kappa_sweep": Entry(
        "Figure 3 (c). The weight κ of the causal KL term", paper_figures.kappa_sweep, ("published", "sweeps"),
        optional=("sweeps",),
    ),
    "similarities": Entry(
        "Figure 3 (d). Similarity measures in Υ", paper_figures.similarities, ("published", "sweeps"), optional=("sweeps",),
    ),
    "gradient_norm": Entry(
        "Appendix, figure 1. Gradient norm over training", paper_figures.gradient_norm, ("training",),
        lambda results: (paper_figures.gradient_norm_data(results),),
    ),
    "learning_curves": Entry(
        "Learning curves of GRPO and GCPO", figures.learning_curves, ("training",),
        lambda results: (figures.learning_curve_data(results),),
    ),
    "upsilon": Entry(
        "What Υ does in training", figures.upsilon_curves, ("training",), lambda results: (figures.upsilon_curve_data(results),),
    ),
    "partial_correlations": Entry(
        "The collider in the linear model: correlation of two candidates, closed form (lines) and simulation (points)",
        causal_figures.partial_correlations, ("partial_correlations",), _frame,
    ),
    "rejection_rates": Entry(
        "Which tests notice the collider", causal_figures.rejection_rates, ("rejection_rates",), _frame,
    ),
    "reasoning": Entry("Right and wrong answers and a vote", causal_figures.reasoning, ("reasoning",), _frame),
    "collider_in_a_model": Entry(
        "The collider in a language model's own outputs", figures.dependence_and_slope, ("collider_in_a_model",),
    ),
    "theorems": Entry(
        "Theorem 1 is an identity, Corollary 2 needs a slope b of at least ½", causal_figures.theorem_1_and_corollary_2,
        ("theorems",), lambda found: (pd.DataFrame(found["predictors"]), pd.DataFrame(found["counter_example"])),
    ),
    "estimated": Entry(
        "What the projection gains for predictors that are learnt", causal_figures.estimated_predictors, ("estimated",),
        lambda found: (pd.DataFrame(found["least_squares"]), pd.DataFrame(found["kernel"])),
    ),
    "two_phis": Entry("The algorithm's Φ and the theorem's", causal_figures.two_phis, ("two_phis",), _frame),
    "cost": Entry("What a step of GCPO costs over one of GRPO", benchmark_figures.step_cost, ("cost",)),
    "gains_and_noise": Entry(
        "Audit: GCPO minus the next best method, as published, and two standard errors", benchmark_figures.gains_and_noise,
        ("gains_and_noise",), _frame,
    ),
    "power_curves": Entry(
        "Audit: power against samples per problem", benchmark_figures.power_curves, ("power_curves",), _frame,
    ),
}  # fmt: skip
PASS = "Pass@1, per cent."
PROBLEMS = ", ".join(f"{column} {SIZES[column]}" for column in COLUMNS)
TABLES = {
    "table_1": Entry(
        f"Table 1. {PASS} Published: arXiv 2508.05428, Table 1, as printed; samples, seeds and intervals are not. "
        f"Problems in the public sets that the columns most likely mean: {PROBLEMS}. "
        "Measured: 95% interval in brackets, problems resampled",
        tables.table_1, ("published", "evaluations"), optional=("evaluations",),
    ),
    "table_2": Entry(
        f"Table 2, ablations. {PASS} Published: arXiv 2508.05428, as printed. Measured: 95% t interval over questions, seeds "
        "averaged",
        tables.table_2, ("published", "sweeps"), optional=("sweeps",),
    ),
    "leaderboard": Entry(
        f"Leaderboard entry of the paper's first version. {PASS} Published: DeepSeek-R1-Distill-Qwen-7B trained by GCPO, as "
        "printed; the aggregate is the mean of these five and MATH500. Measured: 95% interval, problems resampled",
        tables.leaderboard, ("published", "evaluations"), optional=("evaluations",),
    ),
    "pass_at_1": Entry(
        "GRPO and GCPO on held-out questions, measured. Pass@1, per cent, with 95% t intervals: over questions for a method, "
        "over paired seeds for the difference",
        tables.pass_at_1, ("training",),
    ),
    "sweeps": Entry(
        "The sweeps on held-out questions, measured. Pass@1 with 95% t intervals over questions, seeds averaged",
        tables.sweep_table, ("sweeps",),
    ),
    "agreement": Entry(
        "How far the cheap settings agree with the paper's steps, measured on the toy policy. Spearman within groups, 95% "
        "bootstrap intervals over groups; the other columns have none",
        tables.agreement, ("agreement",),
    ),
    "formulas": Entry("Closed forms of the causal analysis and their simulation", tables.formulas, ("formulas",)),
    "averages": Entry("Audit: printed averages against the mean of their own columns", tables.averages, ("published",)),
}  # fmt: skip
ENTRIES = FIGURES | TABLES
