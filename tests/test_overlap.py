"""Which texts count as the same problem: against hand-made variants, and against real benchmarks where they are at hand."""

import os
import random

import pandas as pd
import pytest
import yaml
from click.testing import CliRunner

from gcpo_repro import UserError, experiment, overlap
from gcpo_repro.cli import main
from gcpo_repro.data import load_with_source
from gcpo_repro.evaluation import benchmarks
from gcpo_repro.overlap import Index, benchmark_index, refuser, tokens
from gcpo_repro.settings import Settings

needs_data = pytest.mark.skipif(not os.environ.get("GCPO_DATA"), reason="needs the benchmarks in GCPO_DATA")
ROAD = (
    r"Two hikers start at the points $A$ and $B$ of a straight road, $12\dfrac{1}{2}$ km apart, and walk towards each other. "
    r"One of them covers $4$ km per hour, the other one $\sqrt{36}$ km per hour. After how many hours do they meet, if "
    r"$0 \leq t \le 5$?"
)
SUM = r"Find $x+y$ if $x^2 = 9$."
INDEX = Index([("road", "r1", ROAD), ("sums", "s1", SUM)])


@pytest.mark.parametrize(
    "variant",
    [
        ROAD.replace("Two hikers start", "TWO Hikers Start").replace("$A$", "$a$"),
        ROAD.replace("$", ""),
        ROAD.replace("$", r"\(", 1).replace("$", r"\)", 1),
        ROAD.replace(r"\dfrac", r"\frac").replace(r"\leq", "≤"),
        ROAD.replace(r"\dfrac{1}{2}", r"\tfrac12"),
        ROAD.replace(" km", r"\,\text{km}").replace("$4$", r"$\left. 4 \right.$"),
        ROAD.replace(",", "").replace(".", " ").replace("?", ""),
        "  " + ROAD.replace(" ", "\n\n  ") + "\n[asy]\ndraw((0,0)--(12.5,0));\n[/asy]\n![](https://cdn.mathpix.com/x.jpg)",
    ],
)
def test_the_same_text_in_another_spelling(variant):
    assert variant != ROAD
    assert INDEX.find(variant) == ("road", "r1", 1.0)


def test_signs_and_numbers_are_part_of_the_text():
    assert INDEX.find(SUM) == ("sums", "s1", 1.0)
    for other in (SUM.replace("+", "-"), SUM.replace("9", "16"), SUM.replace("^2", ""), SUM + " Then double it."):
        assert INDEX.find(other) is None, "too short for anything but the same text"


@pytest.mark.parametrize(
    "variant, whole",
    [
        ("Problem 7 (AIME 1999). " + ROAD + " Enter your answer as a whole number.", True),
        (ROAD.split("After")[0], True),  # its beginning
        (ROAD.replace("hikers", "walkers"), False),
        (ROAD.replace("$4$", "$5$"), False),
    ],
)
def test_nearly_the_same(variant, whole):
    found = INDEX.find(variant)
    assert found is not None and found[:2] == ("road", "r1")
    assert found.share == 1 if whole else overlap.NEAR <= found.share < 1


def test_the_share_by_hand():
    """20 words, 16 shingles of 5. The first word is in one of them, the tenth in 5; the fifth and the tenth together in 10."""
    words = [f"w{chr(97 + k)}" for k in range(20)]
    index = Index([("b", "1", " ".join(words))])
    for changed, share in (([0], 15 / 16), ([9], 11 / 16), ([4, 9], 6 / 16)):
        text = " ".join("new" if k in changed else word for k, word in enumerate(words))
        assert index.find(text) == (("b", "1", share) if share >= overlap.NEAR else None)
        assert Index([("b", "1", " ".join(words))], near=share).find(text) == ("b", "1", share)


def test_other_problems_and_no_text():
    ship = "Two ships leave the ports A and B of a lake, 40 km apart, and sail towards each other. After how long do they meet?"
    for text in (ship, "", "?", "After how many hours do they meet?"):
        assert INDEX.find(text) is None
    assert Index([]).find(ROAD) is None


def test_unicode():
    assert tokens("ﬁnd √2 · π − 3°") == tokens(r"find \sqrt 2 \cdot \pi - 3^\circ".replace("^", "")) == [
        "find", "sqrt", "2", "*", "pi", "-", "3", "deg",
    ]  # fmt: skip
    assert tokens("Zażółć 12") == ["zażółć", "12"]


def test_refuser_says_where_a_problem_stands():
    refuse = refuser(INDEX)
    assert refuse(ROAD.lower()) == "the same as a problem of road"
    assert refuse(ROAD.replace("hikers", "walkers")) == "nearly the same as a problem of road"
    assert refuse("What is 1+1?") == ""


def test_benchmarks_are_chosen_by_name(monkeypatch):
    loaded = []

    def load(name, data):
        loaded.append(name)
        return [{"id": f"{name}-1", "problem": f"{name} {ROAD}"}]

    monkeypatch.setattr(benchmarks, "load", load)
    assert benchmark_index(["AIME 2024", "aime24", "math500"]).names == [("aime24", "aime24-1"), ("math500", "math500-1")]
    loaded.clear()
    benchmark_index(["all"])
    assert loaded == ["aime24", "aime25", "amc23", "math500", "minerva_math", "gsm8k"]
    with pytest.raises(UserError, match="benchmark: 'aime99' is unknown"):
        benchmark_index(["aime99"])


# Real problems


@pytest.fixture(scope="module")
def real():
    return benchmark_index(["aime24", "aime25", "amc23", "math500", "gsm8k"])


def problems(*names):
    return [(name, row["id"], row["problem"]) for name in names for row in benchmarks.load(name)]


@needs_data
def test_every_problem_is_found_in_another_spelling_and_slightly_changed(real):
    """1 word in 40 is replaced, at random; of longer problems 90% must still be found, and never as another one."""
    draw, found, asked = random.Random(0), 0, 0
    for name, key, text in problems("aime24", "aime25", "amc23", "math500"):
        respelled = real.find(text.replace("$", " $ ").replace(r"\frac", r"\dfrac").upper().lower())
        assert respelled is not None and respelled.share == 1.0, key
        words = text.split()
        if len(words) >= 30:
            asked += 1
            changed = " ".join("zebra" if draw.random() < 0.025 else word for word in words)
            match = real.find("Problem 12: " + changed)
            assert match is None or match[:2] == (name, key)
            found += match is not None
    assert asked > 200 and found >= 0.9 * asked


@needs_data
def test_no_two_different_problems_are_confused(real):
    """None of MATH500's, AMC's, AIME's and GSM8K's 1919 problems is found in the others."""
    sets = problems("aime24", "aime25", "amc23", "math500", "gsm8k")
    index = Index(sets[::2])
    assert [key for _, key, text in sets[1::2] if index.find(text)] == []


@needs_data
def test_training_data_without_the_benchmarks(tmp_path, capsys, real):
    """A file with 5 problems of its own, and 3 of MATH500 and 2 of AIME in another spelling."""
    rows = [{"prompt": f"What is {k} times {k}?", "answer": str(k * k)} for k in range(5)]
    taken = [*problems("math500")[:3], *problems("aime24")[:2]]
    rows += [{"prompt": text.replace("$", " $ "), "answer": "1"} for _, _, text in taken]
    pd.DataFrame(rows).to_parquet(tmp_path / "mixed.parquet")
    found, source = load_with_source(str(tmp_path / "mixed.parquet"), 0, 0, refuse=refuser(real))
    assert sorted(row["answer"] for row in found) == ["0", "1", "16", "4", "9"]
    assert source["left_out"] == {"the same as a problem of math500": 3, "the same as a problem of aime24": 2}
    assert "5 of 10 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, given, expected",
    [
        (["--check-overlap"], [], ("all",)), (["--check-overlap"], ["aime24"], ("aime24",)),
        ([], ["aime24"], ("aime24",)), ([], [], ()),
    ],
)  # fmt: skip
def test_the_command_line_asks_for_the_check(tmp_path, monkeypatch, flags, given, expected):
    asked = []
    monkeypatch.setattr(experiment, "run_arm", lambda settings, *_: asked.append(settings.check_overlap))
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"methods": ["grpo"], "seeds": [0], "data": "mine.jsonl", "check_overlap": given}))
    done = CliRunner().invoke(main, ["train", "--config", str(config), "--out", str(tmp_path / "out"), *flags])
    assert done.exit_code == 0 and asked == [expected], done.output


@needs_data
def test_an_arm_trains_without_the_benchmarks_problems(tmp_path):
    """Also where its held-out questions come from the same file; the toy task's questions stand nowhere."""
    from gcpo_repro.arm import _questions

    rows = [{"prompt": f"What is {k} times {k}?", "answer": str(k * k)} for k in range(8)]
    rows += [{"prompt": text.upper(), "answer": "1000"} for _, _, text in problems("aime25")[:4]]
    pd.DataFrame(rows).to_parquet(tmp_path / "mixed.parquet")
    settings = Settings(data=str(tmp_path / "mixed.parquet"), eval_questions=3, train_questions=0, check_overlap="aime25")
    train, held_out, sources = _questions(settings)
    assert (len(train), len(held_out)) == (5, 3) and "1000" not in {row["answer"] for row in [*train, *held_out]}
    assert sources["train"]["left_out"] == {"the same as a problem of aime25": 4}
    with pytest.raises(UserError, match="check_overlap: the toy task's questions stand in no benchmark"):
        _questions(Settings(check_overlap="aime25"))
