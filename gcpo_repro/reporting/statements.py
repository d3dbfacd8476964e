"""What was claimed and what a run measured, sentence by sentence. Every number comes from a file of the run or of the paper."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..evaluation import published
from ..evaluation.stats import Interval, mean_interval, paired_gain, pass_at_1
from .figures import LOOKS
from .run_contents import Contents

UNUSABLE = (OSError, LookupError, TypeError, ValueError, AttributeError)  # what a file of another form can give cause for
Z_95 = 1.96  # two-sided 5% of the standard normal


@dataclass(frozen=True)
class Statement:
    """One claim beside its measurement. title: the verdict; sure: how much was seen, and how uncertain it is."""

    title: str
    claimed: str
    measured: list[str]
    sure: str
    file: Path | None = None


def statements(run: Contents) -> list[Statement]:
    """All that the run's files allow to say. A file that doesn't have the expected form is noted in `run.broken`."""
    files: dict[Path, Any] = {path: path.name for path in [*run.tables, *(p for picture in run.pictures for p in picture.files)]}
    files |= {path: content.get("kind") for path, content in run.results.items()}
    found = []
    for path, read in ((path, read) for kind, read in READERS.items() for path in files if files[path] == kind):
        try:
            content = pd.read_csv(path) if path.suffix == ".csv" else json.loads(path.read_text())
            found += [replace(statement, file=path) for statement in read(content)]
        except UNUSABLE as error:
            run.broken[path] = f"has not the expected form ({type(error).__name__}: {error})"
    return found


# --- training ----------------------------------------------------------------------------------------------


def training(results: dict[str, Any]) -> Iterator[Statement]:
    """An experiment: each method against GRPO (else the first one), paired over seeds; then what Υ cost in time."""
    config, arms = results["config"], results["arms"]
    methods, samples = config["methods"], config["eval_samples"]
    counts = {
        (method, at): np.array([arm["evaluations"][at]["counts"]["correct"] for arm in arms if arm["method"] == method])
        for method in methods for at in (0, -1)
    }  # {(method, first or last evaluation): (seeds, questions)}  # fmt: skip
    seconds = {method: np.mean([arm["wall_time_seconds"] for arm in arms if arm["method"] == method]) for method in methods}
    before_after = [
        f"{label(method)}: pass@1 {percent(pass_at_1(counts[method, 0], samples))} before, "
        f"{percent(pass_at_1(counts[method, -1], samples))} after {config['steps']} steps, "
        f"gain {percent(paired_gain(counts[method, 0], counts[method, -1], samples), '+')}."
        for method in methods
    ]
    sure = (
        f"{config['model']} policy, {config['quantization']}, n = {config['group_size']}; {count(len(config['seeds']), 'seed')}, "
        f"{config['eval_questions']} held-out questions × {samples} answers; 95% t intervals, over questions for a method, "
        "over paired seeds for a difference."
    )
    base = "grpo" if "grpo" in methods else methods[0]
    if len(methods) == 1:
        yield Statement(f"{label(base)} alone was trained", "", before_after, sure)
    for method in [method for method in methods if method != base]:
        first, second = (counts[m, -1].mean(1) / samples for m in (base, method))  # (seeds,)
        found = mean_interval(second - first)
        cost = f"Training with {label(method)} took {seconds[method] / seconds[base]:.1f} times as long as with {label(base)}."
        difference = f"{label(method)} − {label(base)}: {percent(found, '+')} points of pass@1."
        title = compared(found, label(method), label(base))
        yield Statement(title, printed_gain(method, base), [difference, *before_after, cost], sure)


def label(method: str) -> str:
    return str(LOOKS.get(method, {}).get("label", method))


def compared(difference: Interval, first: str, second: str) -> str:
    """The verdict on first − second."""
    if not np.isfinite(difference.low):
        return f"{first} against {second}: one seed, so no interval and no verdict"
    if difference.low > 0:
        return f"{first} did better than {second}"
    if difference.high < 0:
        return f"{first} did worse than {second}"
    return f"{first} against {second}: no difference shown"


def printed_gain(method: str, base: str) -> str:
    """What Table 1 prints of two methods' averages; empty if it doesn't have both."""
    table = published.load()
    table = table[(table["table"] == "Table 1") & (table["column"] == "average") & (table["unit"] == "% pass@1")]
    values = table.pivot(index="base", columns="method", values="value")
    if not {label(method), label(base)} <= set(values):
        return ""
    gain = (values[label(method)] - values[label(base)]).round(1)
    return (
        f"{label(method)}'s printed averages over the paper's benchmarks differ from {label(base)}'s by {gain.min():+.1f} to "
        f"{gain.max():+.1f} points, for {count(len(gain), 'base model')} (Table 1)."
    )


def upsilon(data: dict[str, Any]) -> Iterator[Statement]:
    """How far Υ is from its maximum α, averaged over steps and seeds."""
    values = np.array(data["metrics"]["gcpo/upsilon_mean"], dtype=float)  # (seeds, steps)
    if not np.isfinite(values).any():
        return
    share, alpha = np.nanmean(values) / data["alpha"], data["alpha"]
    yield Statement(
        f"Υ is {share:.0%} of its maximum on average",
        "Υ_i = α cos(z_i, target_i) weights each advantage by how well the answer agrees with the projected target (Eq. 11).",
        [f"Mean Υ {np.nanmean(values):.3f} at α = {alpha:g}; at α everywhere GCPO is GRPO with its advantages times α."],
        f"{count(values.shape[1], 'step')} × {count(values.shape[0], 'seed')}; means of batches from {np.nanmin(values):.3f} to "
        f"{np.nanmax(values):.3f}.",
    )


# --- the causal claims -------------------------------------------------------------------------------------


def collider(data: dict[str, Any]) -> Iterator[Statement]:
    """The fork and the collider in a policy's outputs, then the slope of the two kinds of Φ."""
    rows = [(n, found["q"], found["q_right"]) for n, found in data["dependence"].items()]
    fork = [n for n, q, _ in rows if abs(q["z"]) > Z_95]
    seen = [n for n, _, right in rows if right["z"] < -Z_95]
    given_q = f"dependence at n = {', '.join(fork)}" if fork else "no dependence found"
    given_y = f"competition at n = {', '.join(seen)}" if seen else "none found"
    yield Statement(
        f"The collider: given the question {given_q}; given a right integrated answer {given_y}",
        "Given the question the candidates are independent (fork); given the integrated answer as well they are not (collider).",
        [f"n = {n}: correlation {q['r']:+.3f} (z = {q['z']:+.1f}) given the question, {right['r']:+.3f} (z = {right['z']:+.1f}) "
         "given a right integrated answer as well." for n, q, right in rows],
        f"{data['model']} policy; {data['questions']} questions; "
        + ", ".join(f"{q['groups']:,} groups of {n}, {right['groups']:,} of them with a right answer" for n, q, right in rows)
        + f"; z against permutations, significant beyond ±{Z_95}.",
    )  # fmt: skip
    yield from _slopes(data)


def _slopes(data: dict[str, Any]) -> Iterator[Statement]:
    found = data["slope"]
    if not found:
        return
    parts = [f"Φ of the {kind} {_half(x['low'], x['high'])}" for kind, x in found.items()]
    yield Statement(
        "Corollary 2's condition: " + "; ".join(parts),
        "The projected target predicts better than the group's mean (Corollary 2); true exactly where the slope b is at least ½.",
        [f"Φ of the {kind}: b̂ = {x['value']:.2f} [{x['low']:.2f}, {x['high']:.2f}]." for kind, x in found.items()],
        f"{data['model']} policy; {data['slope_questions']} questions, one group each, {data['rollouts']} outputs from each "
        f"context; {data['level']:.0%} bootstrap intervals.",
    )


def _half(low: float, high: float) -> str:
    return "meets it" if low >= 0.5 else "misses it" if high < 0.5 else "is undecided"


def formulas(table: pd.DataFrame) -> Iterator[Statement]:
    """Closed forms against simulation, by z."""
    z = table["z"].abs()
    beyond, expected = int((z > Z_95).sum()), 0.05 * len(z)
    yield Statement(
        f"{len(z) - beyond} of {len(z)} closed forms agree with their simulation",
        "Theorem 1, Corollary 2 and the partial correlations of the collider, in the linear-Gaussian model.",
        [f"{beyond} of {len(z)} deviate by more than {Z_95} standard errors, where chance alone gives {expected:.1f}; "
         f"the largest deviation is {z.max():.1f} standard errors."],
        "Standard errors of the simulation, one row per formula.",
    )  # fmt: skip


# --- benchmarks --------------------------------------------------------------------------------------------


def benchmarks(results: dict[str, Any]) -> Iterator[Statement]:
    """An evaluation: pass@1 of each benchmark with its interval, and the paper's range beside it."""
    asked = results["config"]["model"]
    model = Path(asked["source"]).name if Path(asked["source"]).is_absolute() else asked["source"]
    model += f" with {asked['adapter']}" if asked["adapter"] else ""
    printed = published.beside(results).iloc[:, -1]
    for found in results["benchmarks"]:
        p, beside = found["pass_at_1"], printed[found["title"]]
        claimed = "GCPO, lowest to highest base model: " if beside[0].isdigit() else "Pass@1: "
        interval = "" if p["low"] is None else f" [{100 * p['low']:.1f}, {100 * p['high']:.1f}]"
        yield Statement(
            f"{found['title']}: {model} reaches {100 * p['mean']:.1f}% pass@1",
            f"{claimed}{beside}.",
            [f"pass@1 {100 * p['mean']:.1f}{interval} per cent; {100 * found['truncated']:.1f}% of the answers cut off, "
             f"{100 * found['without_answer']:.1f}% without an answer."],
            f"{found['problems_asked']} problems × {found['samples']} samples; 95% interval, problems resampled. Model and "
            "settings are not the paper's: like is not compared with like.",
        )  # fmt: skip


def gains(table: pd.DataFrame) -> Iterator[Statement]:
    """The audit of the published gains against the noise of their benchmarks."""
    first, last = table["k"].min(), table["k"].max()
    pairs = len(table.drop_duplicates(["base", "column"]))
    kinds = {"resampled": "Problems resampled", "same": "Same problems"}
    lines = []
    for (rho, kind), rows in table.groupby(["rho", "problems"], sort=False):
        few, many = (rows[rows["k"] == k]["exceeds"].sum() for k in (first, last))
        lines.append(f"{kinds[kind]}, ρ = {rho:g}: {few} at k = {first}, {many} at k = {last}.")
    most = max(rows["exceeds"].sum() for _, rows in table[table["k"] == first].groupby(["rho", "problems"]))
    yield Statement(
        f"Of {pairs} published gains {'none' if not most else f'at most {most}'} exceeds two standard errors at k = {first}",
        f"GCPO's printed gains over the next best method are {table['gain'].min():+.1f} to {table['gain'].max():+.1f} points.",
        [f"Gains beyond two standard errors, of {pairs}, with k samples per problem:", *lines],
        "A computation from the printed numbers and the benchmarks' sizes; ρ is the assumed share of the variance that lies "
        "between problems. Unproven is not false.",
    )


def count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def percent(value: Interval, sign: str = "") -> str:
    """Per cent with one decimal and the interval, if there is one."""
    if not np.isfinite(value.low):
        return f"{100 * value.mean:{sign}.1f} (one seed, no interval)"
    return f"{100 * value.mean:{sign}.1f} [{100 * value.low:{sign}.1f}, {100 * value.high:{sign}.1f}]"


# The kind of a results.json, or the name of another file -> who reads it; in the report's order.
READERS: dict[str, Callable[[Any], Iterator[Statement]]] = {
    "experiment": training,
    "collider_in_a_model.json": collider,
    "formulas.csv": formulas,
    "upsilon.json": upsilon,
    "gains.csv": gains,
    "evaluation": benchmarks,
}
