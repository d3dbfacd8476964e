"""The audit of the published numbers, as tables, as text, as files. Every verdict is computed (`checks`), none is typed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import UserError
from . import checks
from .checks import AGREES, INCONSISTENT, UNROUNDED
from .power import RHO, SAMPLES
from .published import load

Tables = dict[str, pd.DataFrame]
TITLES = {
    "averages": "Printed averages against their columns",
    "deltas": "Printed gains over the base against the printed cells",
    "repeats": "Numbers printed in several places",
    "ranks": "Ranks by printed and by recomputed average",
    "cells": "Cells that k samples per problem cannot give",
    "entries": "Standard error of GCPO's entries at one sample per problem, points",
    "gains": "GCPO minus the next best method against 2 standard errors, points",
}
ASSUMED = (
    "Assumed: the public test sets, of these sizes: {sizes}; a printed pass@1 is the mean over k samples per problem; problem i "
    "is solved with probability t_i ~ Beta, a share ρ = {rho} of the variance p(1 − p) of one answer lying between problems "
    "(ρ = {kinder} as the kinder case); the answers of two methods are independent; one training seed, whose spread would "
    "come on top; rounding to one decimal, halves up. Averages in the comparison of gains are recomputed from the columns. "
    "“Problems resampled” asks about other problems of the same kind, “same problems” about other answers to the same ones."
)


def audit(published: pd.DataFrame | None = None, samples: Sequence[int] = SAMPLES, rho: float = RHO) -> Tables:
    """All tables of the audit.

    Args:
        published: as `published.load` returns it (default: that).
        samples: values of k, samples per problem (default: 1, 2, 4 … 64).
        rho: share of the variance of one answer that lies between problems, see `power` (default .6).

    Returns:
        averages, deltas, repeats, ranks, cells, entries, gains: see the functions of these names in `checks`.

    Raises:
        UserError: no k, or one below 1; rho outside [0, 1].
    """
    data = load() if published is None else published
    if not len(samples) or min(samples) < 1:
        raise UserError(f"samples: {samples}; give values of k of at least 1")
    return {
        "averages": checks.averages(data), "deltas": checks.deltas(data), "repeats": checks.repeats(data),
        "ranks": checks.ranks(data), "cells": checks.cells(data, samples), "entries": checks.entries(data, rho),
        "gains": checks.gains(data, samples, rho),
    }  # fmt: skip


def findings(tables: Tables) -> list[str]:
    """The verdicts in sentences, counted from the tables."""
    return [
        *_arithmetic(tables["averages"], "averages", ["table", "base", "method"]),
        *_arithmetic(tables["deltas"].dropna(subset="recomputed"), "gains over the base", ["table", "base", "column"]),
        *_average_gains(tables["deltas"]), *_repeats(tables["repeats"]), *_ranks(tables["ranks"]), *_cells(tables["cells"]),
        *_entries(tables["entries"]), *_gains(tables["gains"]),
    ]  # fmt: skip


def _arithmetic(table: pd.DataFrame, what: str, place: list[str]) -> Iterable[str]:
    counts = table["verdict"].value_counts()
    yield f"Printed {what}: {counts.get(AGREES, 0)} of {len(table)} agree with their cells."
    for kind in (INCONSISTENT, UNROUNDED):
        rows = table[table["verdict"] == kind]
        cells = [
            f"{' / '.join(row[place])} {row['printed']:.1f} (recomputed {row['recomputed']:.4g})" for _, row in rows.iterrows()
        ]
        if cells:
            yield f"Printed {what}, {kind}: {'; '.join(cells)}."


def _average_gains(deltas: pd.DataFrame) -> Iterable[str]:
    rows = deltas[(deltas["column"] == "average") & (deltas["from columns"] != deltas["printed"])]
    for table, base, printed, columns in rows[["table", "base", "printed", "from columns"]].itertuples(index=False):
        yield f"The columns of {base} give an average gain of {columns:+.1f}, {table} has {printed:+.1f}."


def _repeats(repeats: pd.DataFrame) -> Iterable[str]:
    differ = repeats[repeats["verdict"] == INCONSISTENT]
    places = [f"{row['base']} {row['method']}, {row['column']}: {row['printed']}" for _, row in differ.iterrows()]
    yield f"Numbers printed in several places: {len(repeats)}. Not the same everywhere: {'; '.join(places) or 'none'}."


def _ranks(ranks: pd.DataFrame) -> Iterable[str]:
    changed = ranks[ranks["passes"] != ""]
    for base, method, mean, passed in changed[["base", "method", "recomputed", "passes"]].itertuples(index=False):
        yield f"With recomputed averages {method} ({mean:.2f}) passes {passed} on {base}."
    if changed.empty:
        yield "No method passes another with recomputed averages."


def _cells(cells: pd.DataFrame) -> Iterable[str]:
    main = cells[cells["table"] == "Table 1"]
    ks = [name for name in cells if name.startswith("k=")]
    counts = ", ".join(f"{int((~main[k]).sum())} at {k}" for k in ks)
    yield f"Of the {len(main)} printed cells of Table 1 these cannot come from k samples per problem: {counts}."
    for column, n, printed, least in cells[cells["table"] == "HumanEval"][["column", "n", "printed", "smallest k"]].itertuples(
        index=False
    ):
        verdict = (
            f"is possible as c/{n}" if least == 1 else f"is not c/{n}; {least} samples per problem is the first k that gives it"
        )
        yield f"{column} {printed:.1f} {verdict}."


def _entries(entries: pd.DataFrame) -> Iterable[str]:
    spans = entries.groupby("column", sort=False)["SE, resampled"].agg(["min", "max"])
    texts = [f"{column} {_span(low, high, '.1f')}" for column, low, high in spans.itertuples()]
    yield f"Standard error of one entry at k = 1, problems resampled, points: {', '.join(texts)}."


def _gains(gains: pd.DataFrame) -> Iterable[str]:
    ks = sorted(gains["k"].unique())
    for (rho, kind), rows in gains.groupby(["rho", "problems"], sort=False):
        counts = rows.groupby("k")["exceeds"].sum()
        pairs = len(rows) // len(ks)
        said = ", ".join(f"{counts[k]} at k = {k}" for k in ks) if counts.any() else f"none at any k from {ks[0]} to {ks[-1]}"
        yield f"Gains beyond 2 standard errors, ρ = {rho:g}, {_kind(kind)}, of {pairs}: {said}."
        first = rows[rows["exceeds"]].groupby(["column", "base"], sort=False)["k"].min()
        if len(first):
            found = "; ".join(f"{column} on {base} from k = {k}" for (column, base), k in first.items())
            yield f"These are (ρ = {rho:g}, {_kind(kind)}): {found}."
        aime = rows[rows["column"].str.startswith("AIME")]
        if np.isfinite(aime["needed"]).all():
            needed = _span(aime["needed"].min(), aime["needed"].max(), ",.0f")
            yield f"The AIME pairs need {needed} samples per problem (ρ = {rho:g}, {_kind(kind)})."


def _span(low: float, high: float, form: str) -> str:
    ends = [format(x, form) for x in (low, high)]
    return "–".join(dict.fromkeys(ends))


def _kind(problems: str) -> str:
    return {"resampled": "problems resampled", "same": "same problems"}[problems]


def main_text(tables: Tables | None = None) -> str:
    """The audit in Markdown: assumptions, findings, tables. What `gcpo-repro audit` prints."""
    tables = audit() if tables is None else tables
    used = tables["cells"].drop_duplicates("column")
    sizes = ", ".join(f"{n} ({column})" for column, n in used[["column", "n"]].itertuples(index=False))
    assumed = ASSUMED.format(sizes=sizes, rho=f"{tables['gains']['rho'].iloc[0]:g}", kinder=checks.KINDER_RHO)
    parts = ["# The published numbers, audited", assumed, "## Findings", "\n".join(f"* {line}" for line in findings(tables))]
    for name, title in TITLES.items():
        parts += [f"## {title}", markdown(_shown(name, tables[name]))]
    return "\n\n".join(parts) + "\n"


def _shown(name: str, table: pd.DataFrame) -> pd.DataFrame:
    """What the text shows of a table; the files hold all of it."""
    if name == "cells":
        return table[~table[[c for c in table if c.startswith("k=")]].all(axis=1)]
    if name != "gains":
        return table
    main = table[table["rho"] == table["rho"].iloc[0]]
    ends = main["k"].isin([main["k"].min(), main["k"].max()])
    keys = ["base", "column", "next best", "gain"]
    bounds = main[ends].assign(name="2 SE " + main["problems"] + ", k=" + main["k"].astype(str))
    needed = main[main["problems"] == "same"].groupby(keys)["needed"].first().map("{:.0f}".format).rename("needed, same")
    wide = bounds.pivot(index=keys, columns="name", values="bound")[list(dict.fromkeys(bounds["name"]))]
    order = pd.MultiIndex.from_frame(main[keys].drop_duplicates())
    return wide.join(needed).loc[order].reset_index()


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table; numbers with one or two decimals, truths as yes and no, what is missing empty."""
    lines = [[str(name) for name in table], ["---"] * table.shape[1]]
    lines += [[_cell(value) for value in row] for row in table.itertuples(index=False)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.1f}" if value == round(value, 1) else f"{value:.2f}"
    return str(value)


def write_audit(out: str | Path, tables: Tables | None = None) -> list[Path]:
    """Save the audit in a folder: `audit.md`, and each table whole as `<name>.csv`.

    Args:
        out: folder, made if it is not there. tables: from `audit` (default: that).

    Returns:
        The files.

    Raises:
        UserError: `out` is a file.
    """
    out, tables = Path(out), audit() if tables is None else tables
    if out.exists() and not out.is_dir():
        raise UserError(f"out: {out} is a file; name a folder")
    out.mkdir(parents=True, exist_ok=True)
    files = [out / "audit.md"]
    files[0].write_text(main_text(tables), encoding="utf-8")
    for name, table in tables.items():
        files.append(out / f"{name}.csv")
        table.to_csv(files[-1], index=False, lineterminator="\n")
    return files
