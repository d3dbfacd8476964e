"""The transcription: complete, exact, with its places; sums typed independently from the paper's rows."""

from fractions import Fraction

import pytest

from gcpo_repro import UserError
from gcpo_repro.evaluation.benchmarks import REGISTRY
from gcpo_repro.evaluation.published import COLUMNS, FILE, SIZES, exact, half_up, load


@pytest.fixture(scope="module")
def data():
    return load()


def test_every_number_has_its_place_and_none_is_there_twice(data):
    assert not data.isna().any().any()
    assert (data.drop(columns=["value", "unit"]) != "").all().all()
    grids = data["column"].isin(["α grid", "κ grid"])  # several values each
    assert not data[~grids].duplicated(["table", "base", "method", "column", "unit"]).any()
    assert data["source"].str.contains("2508.05428|leaderboard").all()


def test_tables_are_complete(data):
    scores = data[data["unit"] == "% pass@1"]
    main = scores[scores["table"] == "Table 1"]
    assert len(main) == 3 * 6 * 6 and set(main["column"]) == {*COLUMNS, "average"}
    assert main.groupby(["base", "method"]).size().eq(6).all()
    counts = data.groupby(["table", "unit"]).size()
    assert counts["Table 1", "points"] == 18 and counts["ablation table", "% pass@1"] == 18
    assert counts["leaderboard", "% pass@1"] == counts["leaderboard", "rank"] == 6
    assert counts["HumanEval", "% pass@1"] == counts["HumanEval", "points"] == 2


@pytest.mark.parametrize(
    "base, column, total",
    [  # sums of six methods, added by hand from the printed table
        ("DeepScaleR-1.5B-Preview", "AIME 2024", "271.4"),
        ("DeepScaleR-1.5B-Preview", "average", "333.4"),
        ("DeepSeek-R1-Distill-Qwen-1.5B", "MinervaMATH", "131.6"),
        ("DeepSeek-R1-Distill-Qwen-1.5B", "MATH500", "483.7"),
        ("DeepSeek-R1-Distill-Qwen-7B", "AMC 2023", "516.3"),
        ("DeepSeek-R1-Distill-Qwen-7B", "AIME 2025", "311.7"),
    ],
)
def test_column_sums(data, base, column, total):
    rows = data[(data["table"] == "Table 1") & (data["unit"] == "% pass@1") & (data["base"] == base) & (data["column"] == column)]
    assert sum(map(Fraction, rows["printed"])) == Fraction(total)


def test_settings_and_single_numbers(data):
    settings = data[data["table"] == "settings"]
    assert settings.loc[settings["column"] == "α grid", "value"].tolist() == [0, 0.5, 1, 1.4, 1.8, 2, 2.4, 2.8, 3, 3.4]
    single = settings[settings["base"] == "all"].set_index("column")["value"]
    assert (single["learning rate"], single["token budget"], single["κ"]) == (1e-6, 16384, 0.06)
    text = data[data["table"] == "text"].iloc[0]
    assert text["base"] == "DeepSeek-R1-Distill-Qwen-7B"
    assert (text["column"], text["value"], text["unit"]) == ("average", 2.2, "points")


def test_printed_decimals_are_kept(data):
    board = data[(data["table"] == "leaderboard") & (data["unit"] == "% pass@1")].set_index("column")["printed"]
    assert board["AIME 2025"] == "53" and board["MinervaMATH"] == "45"
    assert exact(data[data["table"] == "text"])["average"] == Fraction(11, 5)


def test_sizes_are_the_registrys(data):
    scored = data[(data["unit"] == "% pass@1") & ~data["column"].isin(["average", "aggregate"])]
    assert set(scored["column"]) <= set(SIZES)
    assert SIZES["MATH500"] == REGISTRY["math500"].size == 500


@pytest.mark.parametrize("x, rounded", [("0.05", "0.1"), ("0.25", "0.3"), ("56.66", "56.7"), ("-0.05", "0"), ("46.7499", "46.7")])
def test_halves_go_up(x, rounded):
    assert half_up(Fraction(x)) == Fraction(rounded)


def test_broken_files_are_told(tmp_path):
    text = FILE.read_text(encoding="utf-8")
    broken = tmp_path / "p.csv"
    broken.write_text(text.replace(",36.7,", ",36.7?,"), encoding="utf-8")
    with pytest.raises(UserError, match=r"p\.csv, line 3: '36\.7\?' is not a number"):
        load(broken)
    broken.write_text(text.replace("unit,source", "unit,origin", 1), encoding="utf-8")
    with pytest.raises(UserError, match="lacks the columns source"):
        load(broken)
