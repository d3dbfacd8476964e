"""Tables: published numbers as printed, measured ones with what they were measured on, and LaTeX that compiles."""

import io
import re
import shutil
import subprocess

import pandas as pd
import pytest

from gcpo_repro import UserError
from gcpo_repro.evaluation.published import COLUMNS, load
from gcpo_repro.reporting import tables

PUBLISHED = load()
ENGINE = shutil.which("pdflatex") or shutil.which("tectonic")


def entry(title, problems, samples, mean, low, high):
    return {
        "title": title, "problems_asked": problems, "samples": samples, "pass_at_1": {"mean": mean, "low": low, "high": high},
    }  # fmt: skip


def evaluation(*entries, source="Qwen/Qwen2.5-0.5B-Instruct", adapter=None):
    config = {"model": {"source": source, "adapter": adapter}}
    return {"kind": "evaluation", "seed": 7, "config": config, "benchmarks": list(entries)}


AIME = entry("AIME 2024", 30, 8, 0.03125, 0.005, 0.09)
ALL = [entry(column, 100, 4, 0.1 * k, 0.1 * k - 0.03, 0.1 * k + 0.03) for k, column in enumerate((*COLUMNS, "GSM8K"), start=1)]
SWEEPS = {
    "seeds": [0, 1], "questions": 256, "samples": 4, "level": 0.95, "config": {"model": "toy"},
    "points": [
        {"sweep": "alpha", "value": 2.0, "mean": 0.8, "low": 0.7, "high": 0.9, "seeds": [0.75, 0.85]},
        {"sweep": "ablation", "value": "full", "mean": 0.8, "low": 0.7, "high": 0.9, "seeds": [0.75, 0.85]},
        {"sweep": "ablation", "value": "without upsilon", "mean": 0.5, "low": 0.4, "high": 0.6, "seeds": [0.45, 0.55]},
    ],
}  # fmt: skip


# Numbers


def test_table_1_holds_the_printed_numbers():
    table = tables.table_1(PUBLISHED)
    assert table.shape == (18, 9) and set(table["source"]) == {"published"}
    row = table[(table["model"] == "DeepSeek-R1-Distill-Qwen-7B") & (table["method"] == "Dr.GRPO")].iloc[0]
    assert row[[*COLUMNS, "average"]].tolist() == ["57.4", "52.3", "86.4", "88.2", "44.0", "65.7"]  # 44.0, not 44


def test_table_1_gets_a_row_for_each_model_that_was_measured():
    other = evaluation(entry("GSM8K", 1319, 1, 0.5, 0.4, 0.6))  # no column of this table
    tuned = evaluation(AIME, entry("MATH500", 500, 4, 0.5, 0.4, 0.6), source="toy/base", adapter="/runs/x/gcpo-seed0/policy")
    table = tables.table_1(PUBLISHED, [evaluation(AIME), other, tuned])
    first, second = table.iloc[18], table.iloc[19]
    assert len(table) == 20 and first["model"] == "Qwen2.5-0.5B-Instruct" and second["model"] == "base + policy"
    assert first["AIME 2024"] == "3.1 [0.5, 9.0]" and first["AIME 2025"] == first["average"] == "–"
    assert first["source"] == "measured: 30 × 8 answers, seed 7"
    assert second["source"] == "measured: 30 × 8, 500 × 4 answers, seed 7"
    assert table.iloc[:18].equals(tables.table_1(PUBLISHED)), "published rows stay as they are"


def test_a_single_problem_has_no_interval():
    table = tables.table_1(PUBLISHED, [evaluation(entry("AIME 2024", 1, 8, 0.5, None, None))])
    assert table.iloc[18]["AIME 2024"] == "50.0 [no interval]"


def test_table_2():
    printed = tables.table_2(PUBLISHED)
    assert printed["method"].tolist() == list(tables.METHODS) and printed["average"].tolist() == ["56.8", "55.4", "55.6"]
    assert "own task" not in printed
    table = tables.table_2(PUBLISHED, SWEEPS)
    assert table.iloc[:3][printed.columns].equals(printed)
    assert table.iloc[3:]["method"].tolist() == ["GCPO", "GCPO without Υ"], "κ = 0 was not trained"
    assert table.iloc[4]["own task"] == "50.0 [40.0, 60.0]" and set(table.iloc[4][[*COLUMNS]]) == {"–"}
    assert table.iloc[4]["source"] == "measured: 256 × 4 answers, seeds 0, 1"


def test_leaderboard():
    table = tables.leaderboard(PUBLISHED, [evaluation(AIME), evaluation(entry("AIME 2024", 30, 1, 0.5, 0.4, 0.6), source="b")])
    assert table["benchmark"].tolist() == ["AIME 2024", "AIME 2024", *tables.BOARD[1:]]
    assert table["published, %"].tolist() == ["58.3", "58.3", "53", "87.3", "45", "92.6", "70.9"]
    assert table["rank shown"].tolist() == ["86", "86", "96", "30", "82", "102", "44"]
    assert table["measured, %"].tolist()[:3] == ["3.1 [0.5, 9.0]", "50.0 [40.0, 60.0]", "not measured"]
    assert table["measured on"][1] == "b, 30 × 1 answers, seed 7"


def test_aggregate_is_the_mean_of_six_independent_columns():
    """Means .1 … .6: .35. Half widths .03 each: .03 √6 / 6 = .0122."""
    row = tables.leaderboard(PUBLISHED, [evaluation(*ALL), evaluation(*ALL[:5])]).iloc[-1]
    assert row["benchmark"] == "aggregate" and row["measured, %"] == "35.0 [33.8, 36.2]"
    assert row["measured on"] == "Qwen2.5-0.5B-Instruct, 600 × 4 answers, seed 7"


def test_sweep_table():
    row = tables.sweep_table(SWEEPS).iloc[0]
    assert row.tolist() == ["alpha", "2.0", "80.0 [70.0, 90.0]", "75.0", "85.0"]


def test_other_result_files_are_refused():
    with pytest.raises(UserError, match="kind 'experiment' is no result of `gcpo-repro evaluate`"):
        tables.table_1(PUBLISHED, [{"kind": "experiment"}])


# Files


EVERY = {
    "table_1": tables.table_1(PUBLISHED, [evaluation(*ALL)]), "table_2": tables.table_2(PUBLISHED, SWEEPS),
    "leaderboard": tables.leaderboard(PUBLISHED, [evaluation(*ALL)]), "sweeps": tables.sweep_table(SWEEPS),
    "averages": tables.averages(PUBLISHED),
    "odd": pd.DataFrame({"a_b & 50% #1": ["E‖z_i − z̄_{−i}‖² ≥ ½", "x < y | {z} ~ ^ $ \\"], "number": [1.5, -2.0]}),
}  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_files_hold_the_table(name, tmp_path):
    table = EVERY[name]
    files = tables.write(table, tmp_path / "new" / name, "All of it, in %.")
    assert [path.name for path in files] == [f"{name}.md", f"{name}.tex", f"{name}.csv"]
    back = pd.read_csv(io.StringIO(files[2].read_text()), dtype=str, keep_default_na=False)
    assert back.to_numpy().tolist() == table.map(str).to_numpy().tolist() and list(back) == list(table)
    lines = files[0].read_text().splitlines()
    assert len([line for line in lines if line.startswith("|")]) == len(table) + 2 and lines[-1] == "All of it, in %."
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")} == {table.shape[1] + 1}


@pytest.mark.parametrize("name", EVERY)
def test_latex_is_well_formed(name):
    """ASCII, booktabs rules in order, balanced braces and dollars, as many cells in every row as there are columns."""
    text = tables.latex(EVERY[name], "Caption with 100% and y_0.", name)
    assert text.isascii() and r"\caption{Caption with 100\% and $y_{0}$.}" in text
    assert re.findall(r"\\(begin|end){(\S+?)}", text) == [
        ("begin", "table*"), ("begin", "tabular"), ("end", "tabular"), ("end", "table*"),
    ]  # fmt: skip
    bare = re.sub(r"\\.", "", text)
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
    columns = len(re.search(r"begin{tabular}{@{}(\w+)@{}}", text)[1])
    rows = [line for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {columns}
    assert len(rows) == len(EVERY[name]) + 1
    order = [text.index(rf"\{rule}") for rule in ("toprule", "midrule", "bottomrule")]
    assert order == sorted(order)


def test_published_and_measured_stand_under_headings_of_their_own():
    text = tables.latex(EVERY["table_1"], "", "x")
    measured = text.index(r"\emph{measured: 100 $\times$ 4 answers, seed 7}")
    assert text.index(r"\emph{published}") < text.index("DeepScaleR") < measured < text.index("Qwen2.5-0.5B")
    assert text.count("DeepScaleR-1.5B-Preview") == 1, "named once"
    assert text.count("\\midrule") == 4, "below the heads, and between the four models"
    assert tables.latex(EVERY["odd"], "", "x").count("\\midrule") == 1, "every row is its own"


def test_an_unknown_character_is_named():
    with pytest.raises(ValueError, match="SNOWMAN"):
        tables.tex("☃")


@pytest.mark.skipif(not ENGINE, reason="no LaTeX engine (pdflatex, tectonic) is installed")
def test_latex_compiles_within_the_page(tmp_path):
    for name, table in EVERY.items():
        (tmp_path / f"{name}.tex").write_text(tables.latex(table, f"The table {name}.", name))
    inputs = "".join(f"\\input{{{name}.tex}}\\clearpage\n" for name in EVERY)
    (tmp_path / "all.tex").write_text(
        "\\documentclass[twocolumn]{article}\n\\usepackage[margin=0.75in]{geometry}\n\\usepackage{booktabs}\n"
        f"\\begin{{document}}\n{inputs}\\end{{document}}\n"
    )
    options = ["-interaction=nonstopmode", "-halt-on-error"] if "pdflatex" in ENGINE else ["--keep-logs"]
    done = subprocess.run([ENGINE, *options, "all.tex"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in (tmp_path / "all.log").read_text(errors="replace")


def test_agreement_shows_each_setting_with_its_interval():
    found = {"setting": "state, φ = mean", "approximates": "states", "rank": 0.7, "rank low": 0.55, "rank high": 0.8449}
    found |= {"projection": None, "projection low": None, "projection high": None}
    found |= {"order changed": 0.185, "log_rho correlation": -0.004, "generated": 28.4}
    table = tables.agreement({"settings": [{"setting": "literal"}, found]})
    assert table.to_numpy().tolist() == [["state, φ = mean", "states", "0.70 [0.55, 0.84]", "none", "18", "-0.00", "28"]]
    assert "$\\varphi$" in tables.latex(table, "c", "l")
