"""The lines of `claims` on printed numbers: gains against their noise, scores of the base models, arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import inf, sqrt
from typing import Any

import numpy as np
import pandas as pd

from ..evaluation import checks
from ..evaluation.power import RHO, variance
from ..evaluation.published import COLUMNS, SIZES
from ..evaluation.stats import Interval
from .tables import measured
from .verdicts import AGREES, DISAGREES, UNDECIDED, Row, equals, plus_minus, positive, shown, unmeasured


def cells(published: pd.DataFrame, table: str, column: str) -> pd.DataFrame:
    """A column of a published table: (base models, methods), in its order."""
    rows = published[(published["table"] == table) & (published["column"] == column) & (published["unit"] == "% pass@1")]
    return rows.pivot(index="base", columns="method", values="value")[list(dict.fromkeys(rows["method"]))]


def gain_lines(data: Mapping[str, Any]) -> Iterator[Row]:
    """GCPO against the next best method, cell by cell, and the noise of such a difference at one sample per problem."""
    table = checks.gains(data["published"], (1,), RHO)
    for _, row in table[(table["problems"] == "resampled") & (table["rho"] == RHO)].iterrows():
        x = plus_minus(row["gain"], row["bound"])
        claim = f"{row['base']}, {row['column']}: GCPO does better than {row['next best']}, the next best"
        yield claim, "Table 1", f"{row['gain']:+.1f} points", *_noise(row["bound"], x)
    code = data["published"][data["published"]["table"] == "HumanEval"].pivot(index="column", columns="method", values="value")
    for column, row in code.iterrows():
        gcpo, gain = row["GCPO"] / 100, row["GCPO − base"]
        pair = (variance(p, SIZES[column], 1, "resampled", RHO) for p in (gcpo, gcpo - gain / 100))
        bound = 200 * sqrt(sum(pair))
        claim = f"Qwen2-7B-Instruct, {column}: GCPO does better than the base"
        yield claim, "Figure 3 (a), text", f"{gain:+.1f} points", *_noise(bound, plus_minus(gain, bound))


def _noise(bound: float, x: Interval) -> tuple[str, str, str, str]:
    verdict = positive(x)
    reason = "beyond the noise" if verdict == AGREES else "within the noise that one sample per problem has; unproven, not false"
    return f"noise ±{bound:.1f} points", f"computed: 2 standard errors, problems resampled, ρ = {RHO:g}", verdict, reason


def base_lines(data: Mapping[str, Any]) -> Iterator[Row]:
    """The base models' printed scores, for which no training is needed: measured where `gcpo-repro evaluate` was run on them."""
    published, evaluations = data["published"], data.get("evaluations") or []
    gcpo = {column: cells(published, "Table 1", column) for column in COLUMNS}
    for base in gcpo[COLUMNS[0]].index:
        for column in COLUMNS:
            score, gain = gcpo[column].loc[base, "base"], gcpo[column].loc[base, "GCPO"] - gcpo[column].loc[base, "base"]
            yield _score(base, column, "Table 1", score, f"{score:.1f}%", gain, evaluations)
    deltas = checks.deltas(published).dropna(subset="implied base")
    for base, column, score, gain in deltas[["base", "column", "implied base", "printed"]].itertuples(index=False):
        printed = f"{score:.1f}%, implied by GCPO's score and gain"
        yield _score(base, column, "Figure 3 (a), text", score, printed, gain, evaluations)


def _score(base: str, column: str, source: str, score: float, printed: str, gain: float, evaluations: Sequence[Any]) -> Row:
    claim = (f"{base} reaches this on {column}", source, printed)
    found = [entry for entry in measured(evaluations, column) if entry["model"] == base]
    if not found:
        return unmeasured(*claim, "evaluations", "this model was not evaluated here (gcpo-repro evaluate --model …)")
    p = found[0]["pass_at_1"]
    low, high = (100 * p[key] if p[key] is not None else sign * inf for key, sign in (("low", -1), ("high", 1)))
    x = Interval(100 * p["mean"], low, high, found[0]["problems_asked"], 0.95, np.nan)
    sample = f"{x.n} problems × {found[0]['samples']} answers, seed {found[0]['seed']}; 95%, problems resampled"
    verdict = equals(x, score, gain)
    reason = f"an interval wider than GCPO's gain of {gain:.1f} points decides nothing" if verdict == UNDECIDED else ""
    return *claim, f"{shown(x, '.1f')} per cent", sample, verdict, reason


def arithmetic_lines(data: Mapping[str, Any]) -> Iterator[Row]:
    """Printed numbers against each other; exact, so there is no interval."""
    published = data["published"]
    averages, deltas = checks.averages(published), checks.deltas(published).dropna(subset="recomputed")
    yield from _recomputed(averages, "averages", "averages are the means of their columns", "method")
    yield from _recomputed(deltas, "gains", "gains over the base are differences of their cells", "column")
    again = checks.repeats(published)
    wrong = again[again["verdict"] == checks.INCONSISTENT]
    places = "; ".join(f"{row['base']}, {row['column']}: {row['printed']}" for _, row in wrong.iterrows())
    claim = ("numbers printed in several places are the same", "all tables, text", f"{len(again)} numbers")
    reason = f"{len(wrong)} of {len(again)} differ" if places else ""
    yield *claim, places or "all the same", "all compared exactly", DISAGREES if places else AGREES, reason


def _recomputed(table: pd.DataFrame, name: str, what: str, label: str) -> Iterator[Row]:
    for (place, base), rows in table.groupby(["table", "base"], sort=False):
        wrong = rows[rows["verdict"] == checks.INCONSISTENT]
        places = "; ".join(f"{row[label]} {row['recomputed']:.4g}, printed {row['printed']:.1f}" for _, row in wrong.iterrows())
        claim = (f"{base}: {what}", place, f"{len(rows)} {name}")
        reason = f"{len(wrong)} of {len(rows)} cannot come from rounding" if places else ""
        yield *claim, places or "all fit", "all recomputed exactly", DISAGREES if places else AGREES, reason
