"""The audit against what was found beforehand, by hand or by other code; and against changed tables: verdicts must follow."""

import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest

from gcpo_repro import UserError
from gcpo_repro.evaluation import checks
from gcpo_repro.evaluation.audit import audit, findings, main_text, markdown, write_audit
from gcpo_repro.evaluation.checks import AGREES, INCONSISTENT, UNROUNDED
from gcpo_repro.evaluation.published import half_up, load

R1, R7, DEEP = "DeepSeek-R1-Distill-Qwen-1.5B", "DeepSeek-R1-Distill-Qwen-7B", "DeepScaleR-1.5B-Preview"


@pytest.fixture(scope="module")
def tables():
    return audit()


def changed(printed, **where):
    """The published numbers with one cell replaced."""
    data = load()
    chosen = (data["unit"] == "% pass@1") & (data[list(where)] == pd.Series(where)).all(axis=1)
    assert chosen.sum() == 1
    data.loc[chosen, ["printed", "value"]] = [printed, float(printed)]
    return data


def test_averages(tables):
    rows = tables["averages"].set_index(["table", "base", "method"])
    bad = rows[rows["verdict"] != AGREES]
    assert {place: (row["printed"], round(row["recomputed"], 4), row["verdict"]) for place, row in bad.iterrows()} == {
        ("Table 1", DEEP, "GCPO"): (56.8, 56.66, INCONSISTENT),
        ("ablation table", DEEP, "GCPO"): (56.8, 56.66, INCONSISTENT),
        ("Table 1", R1, "ReST-MCTS"): (46.4, 46.18, INCONSISTENT),
        ("Table 1", R1, "Dr.GRPO"): (46.9, 46.76, INCONSISTENT),
        ("Table 1", R1, "GVPO"): (46.7, 46.78, UNROUNDED),
    }
    assert (rows.loc["Table 1"]["verdict"] == AGREES).sum() == 14
    board = rows.loc[("leaderboard", R7, "GCPO")]
    assert (board["printed"], board["rounded"]) == (70.9, 70.9) and board["recomputed"] == pytest.approx(70.88, abs=0.005)


def test_averages_of_unrounded_numbers_are_never_called_inconsistent_and_the_bound_is_tight():
    """Whole thousandths, rounded after the mean was taken: what an honest table would print."""
    rng, seen = np.random.default_rng(0), set()
    for inputs in rng.integers(0, 100_000, (3000, 5)):
        printed = [half_up(Fraction(int(x), 1000)) for x in inputs]
        mean = half_up(Fraction(int(inputs.sum()), 5000))
        recomputed = sum(printed) / Fraction(5)
        seen.add(found := checks.verdict(mean, recomputed, checks.HALF))
        assert found != INCONSISTENT and (found == AGREES) == (half_up(recomputed) == mean)
    assert seen == {AGREES, UNROUNDED}
    # inputs give means within 46.79 ± .05, some below 46.75; those of 46.80 are all at least that
    assert checks.verdict(Fraction("46.7"), Fraction("46.79"), checks.HALF) == UNROUNDED
    assert checks.verdict(Fraction("46.7"), Fraction("46.80"), checks.HALF) == INCONSISTENT


def test_deltas(tables):
    rows = tables["deltas"].set_index(["table", "base", "column"])
    verdicts = rows["verdict"].sort_index()
    assert verdicts["Table 1", DEEP, "MinervaMATH"] != AGREES and rows.loc[("Table 1", DEEP, "MinervaMATH"), "recomputed"] == 1.3
    assert (verdicts["Table 1", DEEP].drop("MinervaMATH") == AGREES).all() and (verdicts["Table 1", R1] == AGREES).all()
    average = rows.loc[("Table 1", DEEP, "average")]
    assert (average["printed"], average["recomputed"], average["from columns"]) == (2.3, 2.3, 2.2)
    assert verdicts["text", R7, "average"] == INCONSISTENT
    assert rows.loc[("HumanEval", "Qwen2-7B-Instruct", "HumanEval"), "implied base"] == pytest.approx(62.2)


def test_repeats(tables):
    rows = tables["repeats"]
    differ = rows[rows["verdict"] == INCONSISTENT]
    assert len(rows) == 6 + 4 + 1 and list(differ["printed"]) == ["Table 1 2.4, text 2.2"]


def test_ranks(tables):
    rows = tables["ranks"]
    moved = rows[rows["passes"] != ""]
    assert moved[["base", "method", "passes"]].values.tolist() == [[R1, "GVPO", "Dr.GRPO"]]
    r1 = rows[rows["base"] == R1].set_index("method")
    assert r1["rank printed"].to_dict() == {"base": 6, "GRPO": 5, "ReST-MCTS": 4, "GVPO": 3, "Dr.GRPO": 2, "GCPO": 1}
    assert r1["rank recomputed"].to_dict() == {"base": 6, "GRPO": 5, "ReST-MCTS": 4, "GVPO": 2, "Dr.GRPO": 3, "GCPO": 1}


def test_cells(tables):
    cells = tables["cells"].set_index(["table", "column"])
    main = cells.loc["Table 1"]
    assert len(main) == 90 and (~main["k=1"]).sum() == 78 and (~main["k=16"]).sum() == 24
    assert not cells.loc[("HumanEval", "HumanEval"), "k=1"].item()
    assert cells.loc[("HumanEval", "HumanEval, 5-shot"), "k=1"].item()


@pytest.mark.parametrize("answers", [1, 30, 40, 164, 480])
def test_possible_cells_are_those_of_all_counts(answers):
    given = {(2 * 1000 * c + answers) // (2 * answers) for c in range(answers + 1)}  # tenths, halves up
    assert {x for x in range(1001) if checks.can_come_from(Fraction(x, 10), answers)} == given


def test_single_entries(tables):
    """benchmarks.md §5: AIME 9, AMC 5.8, MATH500 1.5, Minerva 2.7, HumanEval 3.6, GSM8K 0.7–1.1."""
    spans = tables["entries"].groupby("column")["SE, resampled"].agg(["min", "max"])
    published = {"AIME 2024": 9, "AIME 2025": 9, "AMC 2023": 5.8, "MATH500": 1.5, "MinervaMATH": 2.7, "GSM8K": 0.7}
    for column, stated in published.items():
        assert spans.loc[column, "min"] - 0.05 < stated < spans.loc[column, "max"] + 0.05
    assert spans.loc["HumanEval, 5-shot", "min"] < 3.6 < spans.loc["HumanEval", "max"]


def test_gains(tables):
    gains = tables["gains"]
    pairs = gains.drop_duplicates(["base", "column"])
    assert len(pairs) == 18 and not gains.loc[gains["k"] == 1, "exceeds"].any()
    assert not gains.loc[gains["problems"] == "resampled", "exceeds"].any()
    same = gains[(gains["problems"] == "same") & (gains["rho"] == 0.6)]
    first = same[same["exceeds"]].groupby(["column", "base"])["k"].min()
    assert first["MATH500"].to_dict() == {DEEP: 32, R1: 16, R7: 32}
    assert first["MinervaMATH"].to_dict() == {DEEP: 64, R7: 64}
    aime = same[same["column"].str.startswith("AIME")]
    assert not aime["exceeds"].any() and (aime["needed"].min(), aime["needed"].max()) == (407, 1421)
    aime_any = gains[gains["column"].str.startswith("AIME")]
    assert not aime_any["exceeds"].any()


def test_a_gain_by_hand(tables):
    """MATH500 on R1-1.5B: 81.6 − 80.8 (Dr.GRPO); the same problems, k = 16:
    p(1 − p) = .150144 + .155136 = .30528; · .4/(500 · 16) = 1.5264e-5; 2 · sqrt = .0078138.
    """
    gains = tables["gains"].set_index(["base", "column", "problems", "rho", "k"])
    row = gains.loc[(R1, "MATH500", "same", 0.6, 16)]
    assert row["next best"] == "Dr.GRPO" and row["gain"] == pytest.approx(0.8)
    assert row["bound"] == pytest.approx(0.78138, abs=1e-5) and row["exceeds"]


def test_noise_of_an_average_is_that_of_its_columns(tables):
    """On DeepScaleR all columns have the same next best method, so the five squared errors add up to 25 of the average's."""
    rows = tables["gains"].query("base == @DEEP and problems == 'same' and rho == .6 and k == 64").set_index("column")
    assert rows["next best"].nunique() == 1
    assert (rows["bound"].drop("average") ** 2).sum() == pytest.approx(25 * rows["bound"]["average"] ** 2)
    assert rows["gain"].drop("average").mean() == pytest.approx(rows["gain"]["average"])


def test_verdicts_follow_the_numbers():
    mended = audit(changed("56.7", table="Table 1", base=DEEP, method="GCPO", column="average"))
    found = mended["averages"].set_index(["table", "base", "method"])["verdict"]
    assert found["Table 1", DEEP, "GCPO"] == AGREES and found["ablation table", DEEP, "GCPO"] == INCONSISTENT
    assert (mended["repeats"]["verdict"] == INCONSISTENT).sum() == 2
    better = audit(changed("58.0", table="Table 1", base=R1, method="GCPO", column="AIME 2024"), samples=(1, 64))["gains"]
    aime = better[(better["base"] == R1) & (better["column"] == "AIME 2024")].set_index(["problems", "rho", "k"])["exceeds"]
    assert aime["resampled", 0.6, 64] and aime["same", 0.6, 1]
    worse = audit(changed("80.0", table="Table 1", base=R7, method="base", column="AIME 2024"), samples=(1,))
    assert worse["ranks"].set_index(["base", "method"])["passes"][R7, "base"] == "GRPO, ReST-MCTS, GVPO, Dr.GRPO, GCPO"
    assert any("passes GRPO" in line for line in findings(worse))
    assert worse["gains"].query("base == @R7 and column == 'AIME 2024'")["gain"].unique() == pytest.approx([-21.7])


def test_a_gain_that_is_a_loss_beyond_noise_is_no_gain():
    gains = checks.gains(changed("99.9", table="Table 1", base=R7, method="base", column="AIME 2024"), (64,))
    assert not gains.query("base == @R7 and column == 'AIME 2024'")["exceeds"].any()


def test_findings_say_what_the_tables_say(tables):
    text = "\n".join(findings(tables))
    for expected in ("78 at k=1", "24 at k=16", "407–1,421", "GVPO (46.78) passes Dr.GRPO", "HumanEval 65.1 is not c/164",
                     "resampled, of 18: none at any k from 1 to 64", "average gain of +2.2, Table 1 has +2.3"):  # fmt: skip
        assert expected in text


def test_files_hold_the_tables(tables, tmp_path):
    files = write_audit(tmp_path / "new" / "audit", tables)
    assert sorted(f.name for f in files) == sorted(["audit.md", *(f"{name}.csv" for name in tables)])
    assert files[0].read_text(encoding="utf-8") == main_text(tables)
    for name, table in tables.items():
        again = pd.read_csv(tmp_path / "new" / "audit" / f"{name}.csv", keep_default_na=True)
        pd.testing.assert_frame_equal(again.fillna(""), table.fillna(""), check_dtype=False)
    assert [f.read_bytes() for f in write_audit(tmp_path / "second")] == [f.read_bytes() for f in files]


def test_markdown_table():
    table = pd.DataFrame({"a": [1.0, 46.78, math.inf, math.nan], "b": [True, False, True, False], "c": [1, 2, 3, 4]})
    assert markdown(table).splitlines() == [
        "| a | b | c |", "| --- | --- | --- |", "| 1.0 | yes | 1 |", "| 46.78 | no | 2 |", "| inf | yes | 3 |", "|  | no | 4 |",
    ]  # fmt: skip


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match=r"samples: \(0, 1\)"):
        audit(samples=(0, 1))
    with pytest.raises(UserError, match="rho 1.5"):
        audit(rho=1.5)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="out: .*file is a file; name a folder"):
        write_audit(tmp_path / "file")
