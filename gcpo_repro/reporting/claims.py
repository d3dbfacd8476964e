"""The paper's claims, line by line, beside what was found here. No verdict is typed.

Each follows from an interval and from what the claim allows (`verdicts`), or, for printed numbers against themselves, from the
audit (`printed_claims`, `evaluation.checks`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm

from ..evaluation.stats import Interval, mean_interval
from .paper_figures import gradient_norm_data
from .printed_claims import arithmetic_lines, base_lines, cells, gain_lines
from .statements import count
from .verdicts import (
    AGREES,
    DISAGREES,
    UNDECIDED,
    Z_95,
    Line,
    Row,
    differs,
    equals,
    every,
    inside,
    plus_minus,
    positive,
    shown,
    unmeasured,
)

OTHER_TASK = "another model and task than the paper's: only the direction is compared"


def claims(data: Mapping[str, Any]) -> pd.DataFrame:
    """Every claim with its verdict.

    Args:
        data: contents of `gallery.SOURCES` by name; published is needed, the others may be missing or None: "not measured".

    Returns:
        part, claim, source, published, found, sample, verdict (one of `VERDICTS`), reason; a row for each claim.
    """
    lines: list[Line] = []
    for part, reader in READERS.items():
        lines += [Line(part, *row) for row in reader(data)]
    return pd.DataFrame([asdict(line) for line in lines])


# --- The causal analysis ----------------------------------------------------------------------------------------


def causal_lines(data: Mapping[str, Any]) -> Iterator[Row]:
    """Fork and collider, in the outputs of a policy: r ± 1.96 standard deviations of the permutation null."""
    fork = ("given q, two candidates are independent (fork)", "Figure 2, Eq. 1", "independent: r = 0")
    collider = ("given q and y_n they are dependent (collider)", "Figure 2", "dependent: r ≠ 0")
    found = data.get("collider_in_a_model")
    if found is None:
        yield from (unmeasured(*claim, "collider_in_a_model") for claim in (fork, collider))
        return
    for n, seen in found["dependence"].items():
        given_q, given_y = (plus_minus(seen[key]["r"], Z_95 * seen[key]["null_sd"]) for key in ("q", "q_right"))
        groups = [f"n = {n}, {seen[key]['groups']:,} groups, {found['model']} policy; null by permutation, 95%"
                  for key in ("q", "q_right")]  # fmt: skip
        wide = f"the test would have seen the collider's own strength, {abs(given_y.mean):.3f}"
        verdict = equals(given_q, 0, abs(given_y.mean))
        reason = {AGREES: f"0 lies inside, and {wide}", DISAGREES: "0 lies outside"}.get(verdict, "too few groups")
        yield *fork, f"r = {shown(given_q)}", groups[0], verdict, reason
        verdict = differs(given_y, 0)
        reason = "0 lies outside" if verdict == AGREES else "0 lies inside"
        yield *collider, f"r = {shown(given_y)}, y_n right", groups[1], verdict, reason


def theorem_lines(data: Mapping[str, Any]) -> Iterator[Row]:
    """Theorem 1 and Corollary 2 in the linear-Gaussian model, then the targets that the algorithm makes of them."""
    theorem = ("projecting does not raise the risk of any predictor", "Theorem 1", "Δ ≥ 0 for every f")
    corollary = ("the projected predictor is no worse than π*(q), for every f", "Corollary 2", "Δ ≥ 0")
    found = data.get("theorems")
    if found is None:
        yield from (unmeasured(*claim, "theorems") for claim in (theorem, corollary))
    else:
        yield *theorem, *_lowest_gap(pd.DataFrame(found["predictors"]))
        yield *corollary, *_counter_example(pd.DataFrame(found["counter_example"]))
    yield _bayes(data.get("formulas"))
    yield _linear_target(data.get("two_phis"))
    yield from _slopes(data.get("collider_in_a_model"))
    yield _mass()


def _lowest_gap(table: pd.DataFrame) -> tuple[str, str, str, str]:
    wider = norm.ppf(1 - 0.025 / len(table)) / Z_95  # all predictors together at 95%
    lows = table["measured 1"] - wider * table["error 1"]
    worst = table.loc[lows.idxmin()]
    gap = plus_minus(worst["measured 1"], wider * worst["error 1"])
    verdict = inside(gap, -1e-9)  # at the Bayes predictor it is 0 up to rounding
    reason = {AGREES: "no interval reaches below 0; it is an identity", DISAGREES: "a gap below 0"}.get(verdict, "a gap about 0")
    sample = f"{len(table)} predictors, the Bayes one among them, linear-Gaussian model; 95% for all together"
    return f"lowest gap {shown(gap)}; above 0 for {(lows > 0).sum()} of {len(table)}", sample, verdict, reason


def _counter_example(table: pd.DataFrame) -> tuple[str, str, str, str]:
    worst = table.loc[(table["simulated"] + table["error"]).idxmin()]
    gap = plus_minus(worst["simulated"], worst["error"])
    verdict = inside(gap, 0)
    reason = "f = a(y_2 − y_1) refutes it; true where the slope b ≥ ½" if verdict == DISAGREES else "no counter-example seen"
    return f"a = {worst['a']:g}: {shown(gap)}", f"one of {len(table)} predictors a(y_2 − y_1); 95%", verdict, reason


def _bayes(table: pd.DataFrame | None) -> Row:
    claim = ("the same for the Bayes predictor", "Corollary 2", "Δ ≥ 0")
    if table is None:
        return unmeasured(*claim, "formulas")
    row = table.set_index("formula").loc["R(m) − R(μ) = tr(K C_0 S_e)"]
    gap = plus_minus(row["simulated"], Z_95 * row["standard error"])
    reason = f"closed form {row['closed form']:.4f}: the variance that y_n explains"
    return *claim, shown(gap), "linear-Gaussian model, simulated; 95%", inside(gap, 0), reason


def _linear_target(found: dict[str, Any] | None) -> Row:
    claim = ("the target of steps 1–4 predicts better than π*(q)", "steps 1–4, Eq. 11", "not printed; stands on Corollary 2")
    if found is None:
        return unmeasured(*claim, "two_phis")
    table = pd.DataFrame(found)
    base = table[table["kind"] == "query"]["risk theory"].iloc[0]
    row = table[table["kind"] == "algorithm"].sort_values("L").iloc[-1]
    gain = plus_minus(base - row["risk"], row["risk error"])
    reason = "every y_{n,l} is decoded from the same group: the residual is noise"
    verdict = inside(gain, 0)
    return (*claim, f"R(m) − R(target) = {shown(gain)}", f"linear-Gaussian model, L = {row['L']:.0f}; 95%", verdict,
            reason if verdict == DISAGREES else "")  # fmt: skip


def _slopes(found: dict[str, Any] | None) -> Iterator[Row]:
    for kind, printed in (("algorithm", "steps 1–4, Eq. 11"), ("theorem", "Eq. 2, not what the steps do")):
        claim = (f"Corollary 2's condition in a policy, Φ of the {kind}", printed, "not printed; needs a slope b ≥ ½")
        if not found or kind not in found["slope"]:
            yield unmeasured(*claim, "collider_in_a_model")
            continue
        x = found["slope"][kind]
        b = Interval(x["value"], x["low"], x["high"], x["questions"], x["level"], np.nan)
        sample = f"{x['questions']} questions, {found['model']} policy; {x['level']:.0%} bootstrap"
        verdict = inside(b, 0.5)
        reason = {AGREES: "at least ½", DISAGREES: "below ½: more noise than signal"}.get(verdict, "½ lies inside")
        yield *claim, f"b̂ = {shown(b, '.2f')}", sample, verdict, reason


def _mass(contexts: int = 4) -> Row:
    """Each of the probabilities in Eq. 13 sums to 1 over the vocabulary: one, less `contexts` of them, plus one."""
    mass = 1 - contexts + 1
    verdict = AGREES if mass == 1 else DISAGREES
    claim = ("π′_ref is a reference distribution", "Eq. 13, with its sum over l", "total mass 1")
    return *claim, f"2 − L = {mass} at L = {contexts}", "exact", verdict, "a mean over l gives 1: the sum is a slip"


# --- Training ---------------------------------------------------------------------------------------------------


def training_lines(data: Mapping[str, Any]) -> Iterator[Row]:
    """GCPO against each other method; ablations; sweeps; gradient norms."""
    published, results, sweeps = data["published"], data.get("training"), data.get("sweeps")
    averages = cells(published, "Table 1", "average")
    for method in [name for name in averages.columns if name not in ("base", "GCPO")]:
        yield _better(averages, method, results)
    ablated = cells(published, "ablation table", "average").iloc[0]
    for method, name in (("GCPO without Υ", "without upsilon"), ("GCPO without the κ term", "without kappa")):
        yield _ablation(method, ablated["GCPO"] - ablated[method], sweeps, name)
    for name, symbol, place in (("alpha", "α", "Figure 3 (b)"), ("kappa", "κ", "Figure 3 (c)")):
        chosen = published[(published["column"] == symbol) & (published["method"] == "GCPO")]["value"].iloc[0]
        yield _best(name, symbol, place, float(chosen), sweeps)
    yield _negligible(_least_gain(averages), sweeps)
    yield _norms(results)


def _least_gain(averages: pd.DataFrame) -> float:
    """The smallest difference that the paper counts as one: GCPO's printed average over the next best method's, points."""
    return float((averages["GCPO"] - averages.drop(columns="GCPO").max(axis=1)).min())


def _better(averages: pd.DataFrame, method: str, results: dict[str, Any] | None) -> Row:
    printed = averages["GCPO"] - averages[method]
    claim = (f"GCPO does better than {method}", "Table 1, averages",
             f"{printed.min():+.1f} to {printed.max():+.1f} points, {len(printed)} base models")  # fmt: skip
    name = method.lower().replace(".", "_").replace("-", "_")
    if not results or not {"gcpo", name} <= set(results["config"]["methods"]):
        return unmeasured(*claim, "training", f"no results of {method} beside GCPO (gcpo-repro train)")
    first, second = (_final(results, each) for each in (name, "gcpo"))
    config, difference = results["config"], mean_interval(100 * (second - first))
    sample = (f"{config['model']} policy, {count(difference.n, 'seed')} × {config['eval_questions']} questions × "
              f"{config['eval_samples']} answers; 95% t over paired seeds")  # fmt: skip
    return *claim, f"{shown(difference, '+.1f')} points", sample, positive(difference), OTHER_TASK


def _final(results: dict[str, Any], method: str) -> np.ndarray:
    """Held-out pass@1 after training, (seeds,)."""
    last = [arm["evaluations"][-1]["counts"]["correct"] for arm in results["arms"] if arm["method"] == method]
    return np.mean(last, axis=1) / results["config"]["eval_samples"]


def _points(sweeps: dict[str, Any] | None, sweep: str) -> dict[Any, np.ndarray]:
    """{value: pass@1 in per cent of each seed} of one sweep."""
    return {p["value"]: 100 * np.array(p["seeds"]) for p in (sweeps or {}).get("points", []) if p["sweep"] == sweep}


def _sweep_sample(sweeps: dict[str, Any], compared: int) -> str:
    together = f", {compared} comparisons together" if compared > 1 else ""
    return (f"{sweeps['config']['model']} policy, {count(len(sweeps['seeds']), 'seed')} × {sweeps['questions']} questions × "
            f"{sweeps['samples']} answers; 95% t over paired seeds{together}")  # fmt: skip


def _ablation(method: str, printed: float, sweeps: dict[str, Any] | None, name: str) -> Row:
    claim = (f"{method} is worse than GCPO", "Table 2, average", f"{-printed:+.1f} points")
    points = _points(sweeps, "ablation")
    if not sweeps or not {"full", name} <= set(points):
        return unmeasured(*claim, "sweeps")
    worth = mean_interval(points["full"] - points[name])
    return *claim, f"GCPO − it: {shown(worth, '+.1f')} points", _sweep_sample(sweeps, 1), positive(worth), OTHER_TASK


def _differences(points: dict[Any, np.ndarray], best: Any) -> dict[Any, Interval]:
    """`best` minus each other value, over paired seeds, at 95% for all together; in points."""
    others = [value for value in points if value != best]
    return {value: mean_interval(points[best] - points[value], 1 - 0.05 / len(others)) for value in others}


def _best(name: str, symbol: str, place: str, chosen: float, sweeps: dict[str, Any] | None) -> Row:
    claim = (f"{symbol} = {chosen:g} is the best of its grid", place, "drawn only, no value printed")
    points = _points(sweeps, name)
    if not sweeps or chosen not in points or len(points) < 2:
        return unmeasured(*claim, "sweeps")
    found = _differences(points, chosen)
    rival = min(found, key=lambda value: found[value].mean)
    text = (f"{points[chosen].mean():.1f}%; best of the others {symbol} = {rival:g}: {points[rival].mean():.1f}%, "
            f"difference {shown(found[rival], '+.1f')} points")  # fmt: skip
    return *claim, text, _sweep_sample(sweeps, len(found)), every(map(positive, found.values())), OTHER_TASK


def _negligible(margin: float, sweeps: dict[str, Any] | None) -> Row:
    claim = ("the similarity in Υ hardly matters", "Figure 3 (d)", "differences negligible; no value printed")
    points = _points(sweeps, "similarity")
    if not sweeps or "cosine" not in points or len(points) < 2:
        return unmeasured(*claim, "sweeps")
    found = _differences(points, "cosine")
    text = "; ".join(f"cosine − {value}: {shown(x, '+.1f')}" for value, x in found.items())
    reason = f"negligible: below {margin:.1f} points, the least average gain that the paper counts"
    return *claim, text, _sweep_sample(sweeps, len(found)), every(inside(x, -margin, margin) for x in found.values()), reason


def _norms(results: dict[str, Any] | None) -> Row:
    claim = ("gradient norms over training", "appendix, figure 1", "drawn only, no norm printed")
    if not results or not {"grpo", "gcpo"} <= set(results["config"]["methods"]):
        return unmeasured(*claim, "training")
    curves = gradient_norm_data(results)["curves"]
    ratio = float(np.median(np.array(curves["gcpo"]["mean"]) / np.array(curves["grpo"]["mean"])))
    text = f"norm of GCPO / norm of GRPO, median step: {ratio:.2f}; α = {results['config']['alpha']:g}"
    sample = f"{count(len(curves['gcpo']['step']), 'step')} × {count(len(results['config']['seeds']), 'seed')}; no interval"
    return *claim, text, sample, UNDECIDED, "nothing is printed to compare with; a norm α times as large is what B = A·α gives"


READERS: dict[str, Callable[[Mapping[str, Any]], Iterator[Row]]] = {
    "The causal model": causal_lines,
    "Theorem, corollary, algorithm": theorem_lines,
    "Training": training_lines,
    "Printed gains against their noise": gain_lines,
    "Scores of the base models": base_lines,
    "Printed numbers against each other": arithmetic_lines,
}
