"""Rows by name and from files of every kind, and what is wrong with them."""

import csv
import json
import os
import random
from pathlib import Path

import datasets
import pandas as pd
import pytest
from transformers import AutoTokenizer

from gcpo_repro import UserError, toy
from gcpo_repro.data import (
    SETS,
    TEMPLATES,
    as_conversations,
    check_prompt_lengths,
    final_answer,
    load_rows,
    load_with_source,
)
from gcpo_repro.evaluation import benchmarks

ROWS = [{"question": f"What is {k} + {k}?", "answer": str(2 * k)} for k in range(1, 13)]
COLUMNS = {"prompt_column": "question"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, rows):
    """The same rows as a file of the kind that the suffix says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def ordered(rows):
    return sorted(rows, key=lambda row: int(row["answer"]))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_local_files_of_every_kind_give_the_same_rows(tmp_path, suffix):
    found = load_rows(write(tmp_path / f"data{suffix}", ROWS), 0, 0, **COLUMNS)
    assert ordered(found) == [{"prompt": row["question"], "answer": row["answer"]} for row in ROWS]


def test_seed_sets_the_order_and_size_how_many(tmp_path):
    name = write(tmp_path / "data.jsonl", ROWS)
    whole = load_rows(name, 0, 3, **COLUMNS)
    assert whole == load_rows(name, 0, 3, **COLUMNS) != load_rows(name, 0, 4, **COLUMNS)
    assert load_rows(name, 5, 3, **COLUMNS) == whole[:5]
    assert len({row["prompt"] for row in whole}) == len(ROWS)


def test_a_worked_solution_is_cut_to_its_answer(tmp_path):
    rows = [
        {"question": "a", "answer": "3 and 4 make 7.\n#### 7"}, {"question": "b", "answer": "####  1,234 "},
        {"question": "c", "answer": " \\frac{1}{2}\n"}, {"question": "d", "answer": "first #### 1, then #### 2"},
        {"question": "e", "answer": "As \\boxed{1} fails,\nit is $\\boxed{\\frac{3}{4}}$."},
    ]  # fmt: skip
    found = load_rows(write(tmp_path / "gsm.jsonl", rows), 0, 0, **COLUMNS)
    answers = {"a": "7", "b": "1,234", "c": "\\frac{1}{2}", "d": "2", "e": r"\frac{3}{4}"}
    assert {row["prompt"]: row["answer"] for row in found} == answers


@pytest.mark.parametrize(
    "solution, answer, worked",
    [
        ("48/2 = <<48/2=24>>24, so 48+24 = 72\n#### 72", "72", "72"),
        (r"Hence $x = \boxed{\left(3, \frac{\pi}{2}\right)}$.", r"\left(3, \frac{\pi}{2}\right)", "the same"),
        (r"First \boxed{5}.\nNo: \fbox{6}", "6", "the same"),
        (r"\boxed{\text{if } x \in \{1, 2\}}", r"\text{if } x \in \{1, 2\}", "the same"),
        (r"It is \boxed{12", "", ""),  # torn
        ("Thus the triangles are congruent, as was to be shown.", "Thus the triangles are congruent, as was to be shown.", ""),
        (" 42 ", "42", ""),
    ],
)
def test_final_answer(solution, answer, worked):
    solution = solution.replace(r"\n", "\n")
    assert final_answer(solution) == answer
    assert final_answer(solution, worked=True) == (answer if worked == "the same" else worked)


def test_numbers_become_text(tmp_path):
    name = write(tmp_path / "data.parquet", [{"prompt": 12, "answer": 3}, {"prompt": 13, "answer": 4}])
    assert ordered(load_rows(name, 0, 0)) == [{"prompt": "12", "answer": "3"}, {"prompt": "13", "answer": "4"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_empty_rows_are_left_out_counted_and_told(tmp_path, suffix, capsys):
    broken = [{"question": "  ", "answer": "1"}, {"question": "q", "answer": None}, {"question": "q", "answer": ""}]
    broken += [{"question": None, "answer": "1"}] + [{"question": "q", "answer": "no number ####"}] * (suffix != ".csv")
    name = write(tmp_path / f"data{suffix}", ROWS + broken)
    assert len(load_rows(name, 0, 0, **COLUMNS)) == len(ROWS)
    said = capsys.readouterr().out
    assert f"{len(broken)} of {len(ROWS) + len(broken)} rows of {name!r} left out: " in said
    assert f"{len(broken) - 2} without an answer" in said and "2 with an empty prompt" in said
    with pytest.raises(UserError, match="12 usable rows, 13 are needed; ask for fewer"):
        load_rows(name, 13, 0, **COLUMNS)


def test_whole_data_say_nothing(tmp_path, capsys):
    load_rows(write(tmp_path / "data.jsonl", ROWS), 4, 0, **COLUMNS)
    assert "left out" not in capsys.readouterr().out


def test_nothing_usable(tmp_path, capsys):
    name = write(tmp_path / "data.jsonl", [{"prompt": "", "answer": "1"}] * 3)
    with pytest.raises(UserError, match="0 usable rows, some are needed"):
        load_rows(name, 0, 0)
    assert "3 of 3 rows" in capsys.readouterr().out


def test_the_template_surrounds_the_question(tmp_path):
    rows = [{"prompt": "1 {x} {prompt}?", "answer": "2"}]  # braces in the question are the question's
    name = write(tmp_path / "data.jsonl", rows)
    (found,) = load_rows(name, 1, 0, template="Q: {prompt} {y}\nA:")
    assert found["prompt"] == "Q: 1 {x} {prompt}? {y}\nA:"
    with pytest.raises(UserError, match=r"prompt_template: 'Question:' does not contain \{prompt\}"):
        load_rows(name, 1, 0, template="Question:")
    with pytest.raises(UserError, match="prompt_template: '' does not contain .*nor is it one of boxed, answer_tags"):
        load_rows("toy", 1, 0, template="")


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_by_name(name):
    (plain,), (found,) = load_rows("toy", 1, 5), load_rows("toy", 1, 5, template=name)
    assert found["prompt"].startswith(plain["prompt"] + "\n\n") and len(found["prompt"]) > len(plain["prompt"]) + 40
    assert {"boxed": r"\boxed{}", "answer_tags": "<answer> </answer>"}[name] in found["prompt"]


def test_a_missing_column_is_told_beside_those_there(tmp_path):
    name = write(tmp_path / "data.jsonl", ROWS)
    with pytest.raises(UserError, match="has no column 'prompt', it has question, answer; set prompt_column"):
        load_rows(name, 1, 0)
    with pytest.raises(UserError, match="has no column 'solution'"):
        load_rows(name, 1, 0, prompt_column="question", answer_column="solution")


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "answer": "1"}\n{"prompt": "b", "ans')
    (tmp_path / "broken.parquet").write_text("PAR1 not really")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (tmp_path / "header.csv").write_text("prompt,answer\n")
    pd.DataFrame({"prompt": [], "answer": []}).to_parquet(tmp_path / "norows.parquet")
    for name, message in (
        ("absent.jsonl", "no file .*absent.jsonl'; give one of .jsonl, .json, .parquet, .csv or a Hub id"),
        ("folder", "no file .*folder'; give one of"),
        ("notes.txt", "'notes.txt' is of no known kind; convert it"),
        ("broken.jsonl", "broken.jsonl' could not be read: .*; is it whole and a .jsonl file"),
        ("broken.parquet", "broken.parquet' could not be read: "),
        ("empty.csv", "empty.csv' is empty; write the questions and answers"),
        ("empty.jsonl", "empty.jsonl' is empty"),
        ("header.csv", "header.csv' holds no rows; is it the right file?"),
        ("norows.parquet", "norows.parquet' holds no rows"),
    ):
        with pytest.raises(UserError, match=f"data: .*{message}") as caught:
            load_rows(str(tmp_path / name), 1, 0)
        assert "network" not in str(caught.value), "a local file needs none"


def test_a_hub_id_that_cannot_be_reached():
    """The tests are offline: conftest sets HF_HUB_OFFLINE."""
    with pytest.raises(UserError, match="data: 'nobody/no-such-set' .split 'test'. could not be read: .*check the name"):
        load_rows("nobody/no-such-set", 1, 0, "test")


def test_a_path_in_the_home_folder(tmp_path, monkeypatch):
    write(tmp_path / "data.csv", ROWS)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_rows("~/data.csv", 0, 0, **COLUMNS)) == 12


def test_toy_rows_and_splits():
    train, held_out = (load_rows("toy", 200, 5, split, template="{prompt}") for split in ("train", "held_out"))
    assert train == load_rows("toy", 200, 5, "train") != load_rows("toy", 200, 6, "train")
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert {row["prompt"] for row in train} <= set(toy.pool("train"))
    assert {row["prompt"] for row in held_out} <= set(toy.pool("held_out"))
    for row in held_out:
        assert toy.solve(row["prompt"])[-1] == row["answer"]
    assert load_rows("toy", 1, 5, template="<{prompt}>")[0]["prompt"] == "<" + train[0]["prompt"] + ">"
    with pytest.raises(UserError, match="unknown split 'test'"):
        load_rows("toy", 1, 0, "test")


# Sets and benchmarks by name

GSM8K = [{"question": f"{k} and {k}?", "answer": f"{k}+{k}=<<{k}+{k}={2 * k}>>{2 * k}\n#### {2 * k}"} for k in range(1, 6)]
NUMINA = [
    {"source": "olympiads", "problem": "Find x.", "solution": r"Clearly $\boxed{3}$.", "messages": []},
    {"source": "olympiads", "problem": "Prove it.", "solution": "Trivial.", "messages": []},
    {"source": "amc_aime", "problem": "Find y.", "solution": r"So \boxed{\frac{1}{2}}", "messages": []},
]
AIME = [
    {"ID": f"{year}-{k}", "Year": year, "Problem Number": k, "Question": f"Problem {k} of {year}", "Answer": answer, "Part": None}
    for year, k, answer in (
        (1983, 1, "060"), (1983, 2, "015 or 016"), (1988, 1, "770"), (1989, 1, "869"), (2000, 3, "758"), (2023, 15, "961"),
        (2024, 1, "204"), (2024, 2, "25"), (2025, 1, "70"),
    )
]  # fmt: skip


@pytest.fixture
def local(tmp_path, monkeypatch):
    """The folder GCPO_DATA, with copies of the sets."""
    folder = tmp_path / "copies"
    folder.mkdir()
    monkeypatch.setenv("GCPO_DATA", str(folder))
    write(folder / "gsm8k_train.jsonl", GSM8K)
    write(folder / "numinamath_train.parquet", NUMINA)
    write(folder / "aime_1983_2024.csv", AIME)
    return folder


def test_gsm8k_by_name(local):
    rows, source = load_with_source("gsm8k", 0, 0)
    assert ordered(rows) == [{"prompt": f"{k} and {k}?", "answer": str(2 * k)} for k in range(1, 6)]
    assert source["path"] == str(local / "gsm8k_train.jsonl") and source["rows"] == 5 and source["left_out"] == {}
    assert load_with_source("gsm8k", 0, 1)[1]["sha256"] != source["sha256"] == load_with_source("gsm8k", 0, 0)[1]["sha256"]


def test_proofs_of_numinamath_are_left_out(local, capsys):
    rows, source = load_with_source("numinamath", 0, 0)
    assert {row["prompt"]: row["answer"] for row in rows} == {"Find x.": "3", "Find y.": r"\frac{1}{2}"}
    assert source["left_out"] == {"without an answer": 1}
    assert "1 of 3 rows of 'numinamath' left out: 1 without an answer" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, years, left_out",
    [
        ("aime-1983-2023", {1983, 1988, 1989, 2000, 2023}, {}),
        ("aime-1989-2023", {1989, 2000, 2023}, {"outside 1989-2023": 3}),
    ],
)
def test_aime_of_2024_and_later_is_never_trained_on(local, name, years, left_out):
    rows, source = load_with_source(name, 0, 0)
    assert {int(row["prompt"][-4:]) for row in rows} == years and len(rows) == len(years)
    ambiguous = {} if left_out else {"without one whole number as the answer": 1}
    assert source["left_out"] == {"of 2024 or later": 3, **left_out, **ambiguous}


def test_a_copy_with_other_column_names(local):
    (local / "gsm8k_train.jsonl").unlink()
    write(local / "gsm8k_train.csv", [{"q": "1?", "a": "#### 1"}, {"q": "2?", "a": "#### 2"}])
    assert len(load_rows("gsm8k", 0, 0, prompt_column="q", answer_column="a")) == 2
    with pytest.raises(UserError, match="'gsm8k' has no column 'question', it has q, a"):
        load_rows("gsm8k", 0, 0)


def test_a_set_that_is_nowhere(local, capsys):
    with pytest.raises(UserError, match="MATH-lighteval.*On a machine with a network run\n.*to_json.'math_train.jsonl'"):
        load_rows("math", 1, 0)
    assert f"{str(local)!r} holds no math_train.jsonl, so math comes from the Hub" in capsys.readouterr().out


@pytest.mark.parametrize("name", SETS)
def test_what_is_asked_of_the_hub(name, monkeypatch, tmp_path):
    """And the commit that the Hub gave, which `datasets` keeps as the name of a folder."""
    monkeypatch.delenv("GCPO_DATA", raising=False)
    commit = "0123456789abcdef" * 2 + "01234567"
    (tmp_path / commit).mkdir()
    asked = []

    def load_dataset(hub_id, config, split, revision):
        asked.append((hub_id, config, split, revision))
        rows = {"gsm8k": GSM8K, "math": NUMINA, "numinamath": NUMINA}.get(name, AIME)
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / commit)
        return datasets.load_from_disk(tmp_path / commit)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = load_with_source(name, 0, 0)[1]
    assert asked == [(SETS[name].hub_id, SETS[name].config or None, "train", None)]
    assert source["resolved_revision"] == commit and source["hub_id"] == SETS[name].hub_id
    load_rows(name, 0, 0, revision="abc")
    assert asked[-1][-1] == "abc"


def test_a_benchmark_is_for_evaluation_only(monkeypatch):
    problems = [{"id": str(k), "problem": f"p{k}", "answer": str(k)} for k in range(30)]
    monkeypatch.setattr(benchmarks, "load_with_source", lambda name: (problems, {"hub_id": name}))
    rows, source = load_with_source("AIME 2024", 10, 3, "test", prompt_column="anything")
    assert source["hub_id"] == "aime24" and source["rows"] == 10
    order = list(range(30))
    random.Random(3).shuffle(order)
    assert rows == [{"prompt": f"p{k}", "answer": str(k)} for k in order[:10]]
    with pytest.raises(UserError, match="AIME 2024 has 30 problems, 31 are asked for; lower eval_questions"):
        load_rows("aime24", 31, 0, "test")
    with pytest.raises(UserError, match="MATH500 is a benchmark, not to be trained on; name it in eval_data, and one of gsm8k"):
        load_rows("math500", 10, 0)
    with pytest.raises(UserError, match="HumanEval is graded by running code"):
        load_rows("humaneval", 10, 0, "test")


@pytest.mark.skipif(not os.environ.get("GCPO_DATA"), reason="needs the benchmarks in GCPO_DATA")
def test_gsm8k_is_two_sets(monkeypatch):
    rows, source = load_with_source("gsm8k", 5, 0, "test")
    assert len(rows) == 5 and source["problems"] == 1319 and Path(source["path"]).stem == "gsm8k"


def test_refused_questions_are_replaced_and_counted(tmp_path, capsys):
    name = write(tmp_path / "data.jsonl", ROWS)
    rows, source = load_with_source(name, 9, 3, refuse=lambda q: "too easy" if " 1 " in q or " 2 " in q else "", **COLUMNS)
    assert len(rows) == 9 and not {"2", "4"} & {row["answer"] for row in rows}
    assert 0 < source["left_out"]["too easy"] <= 2 and "too easy" in capsys.readouterr().out
    with pytest.raises(UserError, match="0 usable rows"):
        load_rows(name, 0, 0, refuse=lambda q: "no", **COLUMNS)


# Conversations and lengths


@pytest.fixture
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


def test_conversations_where_there_is_a_chat_template(tokenizer):
    rows = [{"prompt": "1+1", "answer": "2"}]
    user = {"role": "user", "content": "1+1"}
    assert as_conversations(rows, tokenizer) == [{"prompt": [user], "answer": "2"}]
    system = {"role": "system", "content": "be brief"}
    assert as_conversations(rows, tokenizer, "be brief") == [{"prompt": [system, user], "answer": "2"}]
    assert rows == [{"prompt": "1+1", "answer": "2"}]


def test_plain_text_where_there_is_none(tokenizer):
    tokenizer.chat_template = None
    rows = [{"prompt": "1+1", "answer": "2"}]
    assert as_conversations(rows, tokenizer) == rows
    with pytest.raises(UserError, match="system_prompt: .* no chat template; put the text in prompt_template"):
        as_conversations(rows, tokenizer, "be brief")


def test_prompts_must_fit_with_an_answer(tokenizer):
    rows = [{"prompt": "1" * length} for length in (3, 10, 8)]
    check_prompt_lengths(rows, tokenizer, window=15, completion=5)
    check_prompt_lengths(rows, tokenizer, window=None, completion=10**6)
    message = "data: 1 of 3 prompts .the longest: 10 tokens. do not fit with max_completion_length = 5 .* 14 tokens"
    with pytest.raises(UserError, match=message):
        check_prompt_lengths(rows, tokenizer, window=14, completion=5)
    with pytest.raises(UserError, match="2 of 3 prompts"):
        check_prompt_lengths(rows, tokenizer, window=12, completion=5)


def test_the_chat_template_counts(tokenizer):
    chat = as_conversations([{"prompt": "1" * 10, "answer": "1"}], tokenizer)
    written = len("<user>") + 10 + len("</user><assistant>")
    check_prompt_lengths(chat, tokenizer, window=written + 5, completion=5)
    with pytest.raises(UserError, match=f"longest: {written} tokens"):
        check_prompt_lengths(chat, tokenizer, window=written + 4, completion=5)
