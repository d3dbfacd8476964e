"""Tables: numbers in, `DataFrame` out; and each as Markdown, LaTeX (booktabs) and CSV.

A published number stands as it was printed. A measured one has its 95% interval in brackets and a row or column that says what it
was measured on; they are never mixed in one cell.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..errors import UserError
from ..evaluation import audit
from ..evaluation.published import COLUMNS
from . import figures

MISSING = "–"  # this row has no such number
NOT_MEASURED = "not measured"
BOARD = ("AIME 2024", "AIME 2025", "AMC 2023", "MinervaMATH", "GSM8K", "aggregate")
METHODS = {"GCPO": "full", "GCPO without Υ": "without upsilon", "GCPO without the κ term": "without kappa"}


def measured(evaluations: Sequence[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    """What `results.json` files of `gcpo-repro evaluate` hold on one column of the paper; each with its model and seed.

    Raises:
        UserError: a file of another kind.
    """
    found = []
    for results in evaluations:
        if results.get("kind") != "evaluation":
            raise UserError(f"evaluations: kind {results.get('kind')!r} is no result of `gcpo-repro evaluate`; leave it out")
        entries = [entry for entry in results["benchmarks"] if entry["title"] == column]
        found += [{**entry, "model": _model(results), "seed": results["seed"]} for entry in entries]
    return found


def _model(results: dict[str, Any]) -> str:
    model = results["config"]["model"]
    return " + ".join(Path(part).name for part in (model["source"], model.get("adapter")) if part)


def cell(value: dict[str, Any], scale: float = 100.0) -> str:
    """"12.3 [10.0, 14.9]" of {"mean", "low", "high"}; without bounds (one problem, one seed) the mean alone."""
    mean, low, high = (value[key] for key in ("mean", "low", "high"))
    if low is None or high is None:
        return f"{scale * mean:.1f} [no interval]"
    return f"{scale * mean:.1f} [{scale * low:.1f}, {scale * high:.1f}]"


def table_1(published: pd.DataFrame, evaluations: Sequence[dict[str, Any]] = ()) -> pd.DataFrame:
    """Table 1: pass@1 in per cent of six methods on three base models; below, rows measured by `gcpo-repro evaluate`.

    Args:
        published: `evaluation.published.load`.
        evaluations: `results.json` files; each that holds a column of the table becomes a row.

    Returns:
        model, method, the columns of the paper, average (as printed), source.
    """
    rows = _printed(published, "Table 1")
    for results in evaluations:
        entries = {column: measured([results], column) for column in COLUMNS}
        if any(entries.values()):
            cells = {column: cell(found[0]["pass_at_1"]) if found else MISSING for column, found in entries.items()}
            source = "measured: " + _sizes([found[0] for found in entries.values() if found])
            rows.append({"model": _model(results), "method": MISSING, **cells, "average": MISSING, "source": source})
    return pd.DataFrame(rows)


def _printed(published: pd.DataFrame, table: str) -> list[dict[str, str]]:
    """A row for each method of a published table, its numbers as text."""
    chosen = published[(published["table"] == table) & (published["unit"] == "% pass@1")]
    return [
        {"model": base, "method": method, **dict(zip(rows["column"], rows["printed"], strict=True)), "source": "published"}
        for (base, method), rows in chosen.groupby(["base", "method"], sort=False)
    ]


def _sizes(entries: list[dict[str, Any]]) -> str:
    """Problems × samples of each benchmark, and the seed."""
    parts = [f"{entry['problems_asked']} × {entry['samples']}" for entry in entries]
    return f"{', '.join(dict.fromkeys(parts))} answers, seed {entries[0]['seed']}"


def table_2(published: pd.DataFrame, sweeps: dict[str, Any] | None = None) -> pd.DataFrame:
    """Table 2, the ablations: Υ removed (B = A) and κ = 0; below, the same measured by training (`sweeps.sweep_data`).

    Returns:
        model, method, the columns of the paper, average (as printed), own task (what the run was evaluated on), source.
    """
    toy = "own task"
    rows: list[dict[str, str]] = [{**row, toy: MISSING} for row in _printed(published, "ablation table")]
    points = {point["value"]: point for point in (sweeps or {}).get("points", []) if point["sweep"] == "ablation"}
    for method, name in METHODS.items():
        if name in points and sweeps is not None:
            source = f"measured: {sweeps['questions']} × {sweeps['samples']} answers, seeds {_list(sweeps['seeds'])}"
            blank = dict.fromkeys((*COLUMNS, "average"), MISSING)
            model = f"{sweeps['config']['model']} policy"
            rows.append({"model": model, "method": method, **blank, toy: cell(points[name]), "source": source})
    table = pd.DataFrame(rows)
    columns = ["model", "method", *COLUMNS, "average", toy, "source"]
    return table[columns] if points else table[[column for column in columns if column != toy]]


def _list(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def leaderboard(published: pd.DataFrame, evaluations: Sequence[dict[str, Any]] = ()) -> pd.DataFrame:
    """The leaderboard entry of the paper's first version, GCPO's best model, and what was measured on the same benchmarks.

    Returns:
        benchmark, published (pass@1, per cent), rank (shown there), measured (with interval), measured on.
    """
    board = published[published["table"] == "leaderboard"]
    scores, ranks = (board[board["unit"] == unit].set_index("column")["printed"] for unit in ("% pass@1", "rank"))
    rows = []
    for column in BOARD:
        row = {"benchmark": column, "published, %": scores[column], "rank shown": ranks[column]}
        entries = _aggregates(evaluations) if column == "aggregate" else measured(evaluations, column)
        found = [(cell(e["pass_at_1"]), f"{e['model']}, {_sizes([e])}") for e in entries]
        for score, model in found or [(NOT_MEASURED, MISSING)]:
            rows.append({**row, "measured, %": score, "measured on": model})
    return pd.DataFrame(rows)


def _aggregates(evaluations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean of the six columns of each evaluation that holds them all; half widths add as those of independent means."""
    found = []
    for results in evaluations:
        entries = [entry for column in (*COLUMNS, "GSM8K") for entry in measured([results], column)]
        scores = [entry["pass_at_1"] for entry in entries]
        if len(entries) == len(COLUMNS) + 1 and all(score["low"] is not None for score in scores):
            mean = sum(score["mean"] for score in scores) / len(scores)
            half = math.hypot(*((score["high"] - score["low"]) / 2 for score in scores)) / len(scores)
            problems = sum(entry["problems_asked"] for entry in entries)
            score = {"mean": mean, "low": mean - half, "high": mean + half}
            samples = "/".join(dict.fromkeys(str(entry["samples"]) for entry in entries))
            found.append({**entries[0], "problems_asked": problems, "samples": samples, "pass_at_1": score})
    return found


def pass_at_1(results: dict[str, Any]) -> pd.DataFrame:
    """Held-out pass@1 before, after and gained by each method of an experiment (`figures.pass_at_1_table`)."""
    return figures.pass_at_1_table(results).reset_index(names="method")


def sweep_table(sweeps: dict[str, Any]) -> pd.DataFrame:
    """Every arm of `sweeps.sweep_data`: held-out pass@1 in per cent with its interval over questions, and each seed's."""
    seeds = sweeps["seeds"]
    return pd.DataFrame([
        {"varied": point["sweep"], "value": f"{point['value']}", "pass@1, %": cell(point)}
        | {f"seed {seed}": f"{100 * value:.1f}" for seed, value in zip(seeds, point["seeds"], strict=True)}
        for point in sweeps["points"]
    ])  # fmt: skip


def formulas(data: pd.DataFrame) -> pd.DataFrame:
    """Every closed form of the analysis beside its simulation (`verification.formula_table`)."""
    simulated = [f"{x:.4f} ± {e:.4f}" for x, e in zip(data["simulated"], data["standard error"], strict=True)]
    return pd.DataFrame({
        "formula": data["formula"], "closed form": data["closed form"].map("{:.4f}".format),
        "simulated ± standard error": simulated,
    })  # fmt: skip


def agreement(study: dict[str, Any]) -> pd.DataFrame:
    """The cheap settings against the paper's steps (`gcpo_repro.agreement`), without the reference itself.

    Ranks with 95% bootstrap intervals over groups; "none" where nothing differs that could be ranked. Shares and the
    correlation have no interval.
    """
    rows = []
    for found in study["settings"][1:]:
        ranks = {
            title: "none" if found[name] is None
            else f"{found[name]:.2f} [{found[f'{name} low']:.2f}, {found[f'{name} high']:.2f}]"
            for title, name in (("rank of Υ", "rank"), ("rank of its projected part", "projection"))
        }  # fmt: skip
        rows.append({
            "setting": found["setting"], "what differs from the paper's steps": found["approximates"], **ranks,
            "order of B changed, %": f"{100 * found['order changed']:.0f}",
            "log ρ: correlation": f"{found['log_rho correlation']:.2f}", "tokens written": f"{found['generated']:.0f}",
        })  # fmt: skip
    return pd.DataFrame(rows)


def averages(published: pd.DataFrame) -> pd.DataFrame:
    """The audit's first question: printed averages against the mean of their own columns (`evaluation.checks.averages`)."""
    return audit.audit(published)["averages"]


# --- Files ------------------------------------------------------------------------------------------------------


def write(table: pd.DataFrame, path: str | Path, caption: str) -> list[Path]:
    """Save as `.md`, `.tex` and `.csv`. caption: what it shows, with its source; also LaTeX's caption.

    Raises:
        ValueError: a character that LaTeX would not print (`tex`).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = {".md": markdown(table, caption), ".tex": latex(table, caption, path.name), ".csv": csv(table)}
    for suffix, text in texts.items():
        path.with_suffix(suffix).write_text(text, encoding="utf-8")
    return [path.with_suffix(suffix) for suffix in texts]


def csv(table: pd.DataFrame) -> str:
    return table.to_csv(index=False, lineterminator="\n")


def markdown(table: pd.DataFrame, caption: str) -> str:
    escaped = table.map(lambda value: value.replace("|", "\\|") if isinstance(value, str) else value)
    return f"{audit.markdown(escaped)}\n\n{caption}\n"


def latex(table: pd.DataFrame, caption: str, label: str) -> str:
    """A float over both columns, for a document that loads booktabs. A rule where the first column changes, which is printed
    once; the column "source" becomes a line above the rows that share it.
    """
    sources = table["source"].tolist() if "source" in table else [""] * len(table)
    body = table.drop(columns="source", errors="ignore")
    rows = [[_number(value) for value in row] for row in body.itertuples(index=False)]
    numeric = ["r" if all(_is_number(row[k]) for row in rows) else "l" for k in range(body.shape[1])]
    return "\n".join([
        "\\begin{table*}", "\\centering", f"\\caption{{{tex(caption)}}}", f"\\label{{tab:{label}}}",
        "\\small" if body.shape[1] <= 5 else "\\scriptsize",
        f"\\setlength{{\\tabcolsep}}{{{4 if body.shape[1] < 8 else 2}pt}}",
        f"\\begin{{tabular}}{{@{{}}{''.join(numeric)}@{{}}}}", "\\toprule", _line(map(str, body)),
        *_body(rows, sources), "\\bottomrule", "\\end{tabular}", "\\end{table*}",
    ]) + "\n"  # fmt: skip


def _body(rows: list[list[str]], sources: list[str]) -> list[str]:
    lines, grouped = ["\\midrule"], len({row[0] for row in rows}) < len(rows)
    for k, (row, source) in enumerate(zip(rows, sources, strict=True)):
        named = source != (sources[k - 1] if k else "")
        new = named or k == 0 or row[0] != rows[k - 1][0]
        if k and grouped and new:
            lines.append("\\midrule")
        if named:
            lines.append(f"\\multicolumn{{{len(row)}}}{{@{{}}l}}{{\\emph{{{tex(source)}}}}} \\\\")
        lines.append(_line(row if new else ["", *row[1:]]))
    return lines


def _line(cells: Iterable[str]) -> str:
    return " & ".join(map(tex, cells)) + " \\\\"


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_number(text: str) -> bool:
    return text in ("", MISSING) or text.replace(".", "", 1).removeprefix("-").isdigit()


INDEXED = "\\b([A-Za-z]\u0304?)_([A-Za-z0-9]+|{[^{}]*})"
SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "|": "$|$", "–": "--", "—": "---",
    "“": "``", "”": "''", "’": "'", "…": r"\dots{}", "−": "$-$", "×": r"$\times$", "±": r"$\pm$", "≥": r"$\geq$",
    "≤": r"$\leq$", "→": r"$\to$", "½": r"$\frac12$", "²": "$^2$", "³": "$^3$", "′": "$'$", "‖": r"$\|$", "·": r"$\cdot$",
    "∞": r"$\infty$",
    "Υ": r"$\Upsilon$", "Φ": r"$\Phi$", "Ψ": r"$\Psi$", "Σ": r"$\Sigma$", "α": r"$\alpha$", "β": r"$\beta$", "κ": r"$\kappa$",
    "λ": r"$\lambda$", "μ": r"$\mu$", "π": r"$\pi$", "ρ": r"$\rho$", "σ": r"$\sigma$", "τ": r"$\tau$", "ε": r"$\varepsilon$",
    "φ": r"$\varphi$",
}  # fmt: skip


def tex(text: str) -> str:
    """Text as LaTeX that plain pdflatex prints; y_0 becomes a subscript. Raises ValueError: a character not known here."""
    parts = re.split(INDEXED, unicodedata.normalize("NFD", text))  # what lies between, then symbol and index, in turn
    indexed = [f"${_plain(a).strip('$')}_{{{_plain(b.strip('{}')).strip('$').replace('$', '')}}}$"
               for a, b in zip(parts[1::3], parts[2::3], strict=True)]  # fmt: skip
    return "".join(part for pair in zip(map(_plain, parts[::3]), [*indexed, ""], strict=True) for part in pair)


def _plain(text: str) -> str:
    found: list[str] = []
    for character in text:
        if character == "\u0304":  # a bar over the letter before
            found[-1] = rf"$\bar{{{found[-1]}}}$"
        elif character.isascii():
            found.append(SPECIAL.get(character, character))
        elif character in SPECIAL:
            found.append(SPECIAL[character])
        else:
            raise ValueError(f"text: {character!r} ({unicodedata.name(character, '?')}) has no LaTeX form yet; add it to SPECIAL")
    return "".join(found)
