"""The published tables against themselves and against the noise of their benchmarks: one table of verdicts per question.

Assumptions: the benchmarks are the public sets; a printed pass@1 is avg@k over their problems, k unknown; problems follow the
Beta model of `power` with between-problem share ρ; numbers are rounded to one decimal, halves up.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import permutations
from math import ceil, inf, sqrt

import pandas as pd

from .power import RHO, SAMPLES, fewest_samples, variance
from .published import COLUMNS, SIZES, exact, half_up
from .stats import PROBLEMS

AGREES, UNROUNDED, INCONSISTENT = "agrees", "only from unrounded inputs", "inconsistent"
KINDER_RHO = 0.8  # less sampling noise on the same problems
HALF = Fraction(1, 20)  # a printed number stands for anything within half a tenth


def verdict(printed: Fraction, recomputed: Fraction, slack: Fraction) -> str:
    """Can `printed` be `recomputed`, whose unrounded inputs may move it by less than `slack`?"""
    if half_up(recomputed) == printed:
        return AGREES
    return UNROUNDED if abs(recomputed - printed) < slack + HALF else INCONSISTENT


def averages(data: pd.DataFrame) -> pd.DataFrame:
    """Printed averages against the mean of their own columns: Table 1, the ablation table, the leaderboard's aggregate."""
    rows = [
        (table, base, method, printed["average"], _mean(printed))
        for table in ("Table 1", "ablation table")
        for base, methods in _by_base(data, table).items()
        for method, printed in methods.items()
    ]
    for base, methods in _by_base(data, "leaderboard").items():
        for method, board in methods.items():  # its aggregate is of six columns, of which MATH500 stands in Table 1 only
            six = {**_by_base(data, "Table 1")[base][method], **board}
            columns = (*COLUMNS, "GSM8K")
            rows.append(("leaderboard", base, method, board["aggregate"], sum(six[c] for c in columns) / Fraction(len(columns))))
    return pd.DataFrame(
        [
            {
                "table": table, "base": base, "method": method, "printed": float(printed), "recomputed": float(mean),
                "rounded": float(half_up(mean)), "verdict": verdict(printed, mean, HALF),
            }
            for table, base, method, printed, mean in rows
        ]
    )  # fmt: skip


def deltas(data: pd.DataFrame) -> pd.DataFrame:
    """Printed gains over the base against the difference of the printed cells; those of averages also against the columns.

    `recomputed` and `verdict` use the cells as printed, `from columns` the averages as they should be. Where the base is not
    printed (HumanEval), `implied base` is what cell and gain leave for it.
    """
    rows = []
    for (table, base), group in data[data["method"] == "GCPO − base"].groupby(["table", "base"], sort=False):
        methods = _by_base(data, "Table 1" if table == "text" else table)[base]
        gcpo, start = methods["GCPO"], methods.get("base", {})
        for column, printed in exact(group).items():
            row = {"table": table, "base": base, "column": column, "printed": float(printed)}
            if column not in start:
                rows.append({**row, "implied base": float(gcpo[column] - printed), "verdict": "base not printed"})
                continue
            difference = gcpo[column] - start[column]
            columns = _mean(gcpo) - _mean(start) if column == "average" else difference
            row |= {"recomputed": float(difference), "from columns": float(half_up(columns))}
            rows.append({**row, "verdict": verdict(printed, difference, 2 * HALF)})
    return pd.DataFrame(rows)


def repeats(data: pd.DataFrame) -> pd.DataFrame:
    """Numbers that are printed in several places, and whether they are the same."""
    rows = []
    keys = ["base", "method", "column", "unit"]
    for key, group in data[data["table"] != "settings"].groupby(keys, sort=False):
        if len(group) > 1:
            places = ", ".join(f"{table} {printed}" for table, printed in zip(group["table"], group["printed"], strict=True))
            same = AGREES if group["value"].nunique() == 1 else INCONSISTENT
            rows.append({**dict(zip(keys, key, strict=True)), "printed": places, "verdict": same})
    return pd.DataFrame(rows)


def ranks(data: pd.DataFrame) -> pd.DataFrame:
    """Rank by printed and by recomputed average within each base model; `passes`: methods printed above, recomputed below."""
    rows = []
    for base, table in _by_base(data, "Table 1").items():
        printed = {method: numbers["average"] for method, numbers in table.items()}
        mean = {method: _mean(numbers) for method, numbers in table.items()}
        passes: dict[str, list[str]] = {method: [] for method in table}
        for method, other in permutations(table, 2):
            if printed[method] < printed[other] and mean[method] > mean[other]:
                passes[method].append(other)
        for method in table:
            rows.append({
                "base": base, "method": method, "printed": float(printed[method]), "recomputed": float(mean[method]),
                "rank printed": _rank(printed, method), "rank recomputed": _rank(mean, method),
                "passes": ", ".join(passes[method]),
            })  # fmt: skip
    return pd.DataFrame(rows)


def can_come_from(printed: Fraction, answers: int) -> bool:
    """Is some c/answers, in per cent and rounded halves up to one decimal, the printed number?"""
    least = ceil((printed - HALF) * answers / 100)
    return 0 <= least <= answers and half_up(Fraction(100 * least, answers)) == printed


def cells(data: pd.DataFrame, samples: Sequence[int] = SAMPLES) -> pd.DataFrame:
    """For each printed pass@1 of a benchmark: can k samples per problem give it?

    Columns "k=…" are true where they can; `smallest k` is the first that can.
    """
    scores = data[(data["unit"] == "% pass@1") & data["column"].isin(list(SIZES))]
    rows = []
    for table, base, method, column, text in scores[["table", "base", "method", "column", "printed"]].itertuples(index=False):
        n, printed = SIZES[column], Fraction(text)
        row = {"table": table, "base": base, "method": method, "column": column, "n": n, "printed": float(printed)}
        row |= {f"k={k}": can_come_from(printed, n * k) for k in samples}
        rows.append({**row, "smallest k": next(k for k in range(1, 1001) if can_come_from(printed, n * k))})
    return pd.DataFrame(rows)


def entries(data: pd.DataFrame, rho: float = RHO) -> pd.DataFrame:
    """Standard error (points) of GCPO's printed entries at one sample per problem, problems resampled and the same ones."""
    scores = data[(data["unit"] == "% pass@1") & data["column"].isin(list(SIZES)) & (data["method"] == "GCPO")]
    scores = scores.drop_duplicates(["base", "column"])
    rows = [
        {"base": base, "column": column, "n": SIZES[column], "pass@1": value}
        | {f"SE, {kind}": 100 * sqrt(variance(value / 100, SIZES[column], 1, kind, rho)) for kind in PROBLEMS}
        for base, column, value in scores[["base", "column", "value"]].itertuples(index=False)
    ]
    return pd.DataFrame(rows)


def gains(data: pd.DataFrame, samples: Sequence[int] = SAMPLES, rho: float = RHO, multiple: float = 2.0) -> pd.DataFrame:
    """GCPO minus the best other method of each column, and its noise: a row for each pair, ρ (also .8), kind and k.

    Averages are those of the columns, not the printed ones. The two methods' answers are independent; that the other method
    is the best of five, and the spread of training seeds, would add to the noise.

    Returns:
        base, column, next best, gcpo, other, gain (points), problems, rho, k, bound (`multiple` standard errors, points),
        exceeds, needed (samples per problem for which it would; infinite if none).
    """
    rows = []
    for base, table in _by_base(data, "Table 1").items():
        for column in (*COLUMNS, "average"):
            columns = COLUMNS if column == "average" else (column,)
            score = {method: sum(printed[c] for c in columns) / Fraction(len(columns)) for method, printed in table.items()}
            other = max((method for method in score if method != "GCPO"), key=score.__getitem__)
            pair = [[float(table[method][c]) / 100 for method in ("GCPO", other)] for c in columns]
            gain = score["GCPO"] - score[other]
            fixed = {
                "base": base, "column": column, "next best": other, "gcpo": float(score["GCPO"]), "other": float(score[other]),
                "gain": float(gain),
            }  # fmt: skip
            for share in dict.fromkeys((rho, KINDER_RHO)):
                for kind in PROBLEMS:
                    noise = {k: _gain_variance(pair, columns, k, kind, share) for k in (1, inf, *samples)}
                    needed = fewest_samples(float(gain) / 100, noise[inf], noise[1], multiple) if gain > 0 else inf
                    for k in samples:
                        bound = 100 * multiple * sqrt(noise[k])
                        rows.append({
                            **fixed, "problems": kind, "rho": share, "k": k, "bound": bound, "exceeds": k >= needed,
                            "needed": needed,
                        })  # fmt: skip
    return pd.DataFrame(rows)


def _gain_variance(pair: list[list[float]], columns: Sequence[str], k: float, kind: str, rho: float) -> float:
    """Variance of the mean over columns of GCPO's score minus the other's."""
    each = [variance(p, SIZES[c], k, kind, rho) for c, scores in zip(columns, pair, strict=True) for p in scores]
    return sum(each) / len(columns) ** 2


def _by_base(data: pd.DataFrame, table: str) -> dict[str, dict[str, dict[str, Fraction]]]:
    """{base: {method: {column: printed score}}} of a table, in its order."""
    found: dict[str, dict[str, dict[str, Fraction]]] = {}
    scores = data[(data["table"] == table) & (data["unit"] == "% pass@1")]
    for (base, method), rows in scores.groupby(["base", "method"], sort=False):
        found.setdefault(base, {})[method] = exact(rows)
    return found


def _mean(printed: dict[str, Fraction]) -> Fraction:
    return sum(printed[column] for column in COLUMNS) / Fraction(len(COLUMNS))


def _rank(values: dict[str, Fraction], method: str) -> int:
    return 1 + sum(value > values[method] for value in values.values())
