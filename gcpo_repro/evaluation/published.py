"""What the paper and its leaderboard entry print, number by number, from `published.csv`; nothing here was measured by us."""

from __future__ import annotations

from fractions import Fraction
from math import floor
from pathlib import Path

import pandas as pd

from ..errors import UserError
from .benchmarks import REGISTRY

FILE = Path(__file__).with_name("published.csv")
COLUMNS = ("AIME 2024", "AIME 2025", "AMC 2023", "MATH500", "MinervaMATH")  # of Table 1, in its order
# Problems in the public set that a column most likely means (the paper names no sizes).
SIZES = {benchmark.title: benchmark.size for benchmark in REGISTRY.values() if benchmark.hub_id}


def load(path: str | Path = FILE) -> pd.DataFrame:
    """Every printed number with its place.

    Returns:
        table ("Table 1", "text", "ablation table", "HumanEval", "leaderboard", "settings"), base (the model that was
        trained, "all" for settings of all), method, column, printed (as text, with the decimals that were printed), value,
        unit ("% pass@1", "points" for differences, "rank", …), source.

    Raises:
        UserError: a missing column, or a number that cannot be read, with its line.
    """
    data = pd.read_csv(path, dtype=str, keep_default_na=False)
    missing = {"table", "base", "method", "column", "printed", "unit", "source"} - set(data)
    if missing:
        raise UserError(f"{path}: lacks the columns {', '.join(sorted(missing))}")
    data["value"] = pd.to_numeric(data["printed"], errors="coerce")
    for line in data.index[data["value"].isna()]:
        raise UserError(f"{path}, line {line + 2}: {data.loc[line, 'printed']!r} is not a number")
    return data[["table", "base", "method", "column", "printed", "value", "unit", "source"]]


def exact(rows: pd.DataFrame) -> dict[str, Fraction]:
    """{column: printed number}, exactly, of the rows of one method in one table."""
    return {column: Fraction(printed) for column, printed in zip(rows["column"], rows["printed"], strict=True)}


def half_up(x: Fraction, places: int = 1) -> Fraction:
    """x rounded to `places` decimals, halves up: how people round; Python and numpy round halves to even."""
    scale = 10**places
    return Fraction(floor(x * scale + Fraction(1, 2)), scale)


def beside(results: dict) -> pd.DataFrame:
    """Measured numbers of an evaluation's `results.json`, and the paper's beside them, each in columns that say so.

    Measured pass@1 comes with its 95% interval (problems resampled); published are GCPO's lowest and highest entries over the
    paper's base models, or "not in the paper". They are of other models: no row compares like with like.
    """
    printed = load()
    printed = printed[(printed["method"] == "GCPO") & (printed["unit"] == "% pass@1")]
    rows = []
    for found in results["benchmarks"]:
        entry, values = found["pass_at_1"], printed[printed["column"] == found["title"]]["value"]
        spread = f"{values.min():g} – {values.max():g}" if len(values) else "not in the paper"
        interval = "one problem, none" if entry["low"] is None else f"[{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"
        rows.append({
            "benchmark": found["title"], "measured: pass@1, %": f"{100 * entry['mean']:.1f}", "measured: 95% interval": interval,
            "problems × samples": f"{found['problems_asked']} × {found['samples']}",
            "truncated, %": f"{100 * found['truncated']:.1f}", "published: GCPO, %, lowest – highest base model": spread,
        })  # fmt: skip
    return pd.DataFrame(rows).set_index("benchmark")
