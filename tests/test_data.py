"""Rows from files of every kind, what is wrong with them, and the rewards that go with them."""

import csv
import json
import math

import datasets
import pandas as pd
import pytest
from transformers import AutoTokenizer

from gcpo_repro import UserError, toy
from gcpo_repro.data import as_conversations, check_prompt_lengths, load_reward, load_rows, math_reward

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
    ]  # fmt: skip
    found = load_rows(write(tmp_path / "gsm.jsonl", rows), 0, 0, **COLUMNS)
    assert {row["prompt"]: row["answer"] for row in found} == {"a": "7", "b": "1,234", "c": "\\frac{1}{2}", "d": "2"}


def test_numbers_become_text(tmp_path):
    name = write(tmp_path / "data.parquet", [{"prompt": 12, "answer": 3}, {"prompt": 13, "answer": 4}])
    assert ordered(load_rows(name, 0, 0)) == [{"prompt": "12", "answer": "3"}, {"prompt": "13", "answer": "4"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_empty_rows_are_left_out_counted_and_told(tmp_path, suffix, capsys):
    broken = [{"question": "  ", "answer": "1"}, {"question": "q", "answer": None}, {"question": "q", "answer": ""}]
    broken += [{"question": None, "answer": "1"}] + [{"question": "q", "answer": "no number ####"}] * (suffix != ".csv")
    name = write(tmp_path / f"data{suffix}", ROWS + broken)
    assert len(load_rows(name, 0, 0, **COLUMNS)) == len(ROWS)
    assert f"{len(broken)} rows of {name!r} left out: empty prompt or answer" in capsys.readouterr().out
    with pytest.raises(UserError, match="12 usable rows, 13 are needed; ask for fewer"):
        load_rows(name, 13, 0, **COLUMNS)


def test_whole_data_say_nothing(tmp_path, capsys):
    load_rows(write(tmp_path / "data.jsonl", ROWS), 4, 0, **COLUMNS)
    assert "left out" not in capsys.readouterr().out


def test_nothing_usable(tmp_path, capsys):
    name = write(tmp_path / "data.jsonl", [{"prompt": "", "answer": "1"}] * 3)
    with pytest.raises(UserError, match="0 usable rows, some are needed"):
        load_rows(name, 0, 0)
    assert "3 rows" in capsys.readouterr().out


def test_the_template_surrounds_the_question(tmp_path):
    rows = [{"prompt": "1 {x} {prompt}?", "answer": "2"}]  # braces in the question are the question's
    name = write(tmp_path / "data.jsonl", rows)
    (found,) = load_rows(name, 1, 0, template="Q: {prompt} {y}\nA:")
    assert found["prompt"] == "Q: 1 {x} {prompt}? {y}\nA:"
    with pytest.raises(UserError, match=r"prompt_template: 'Question:' does not contain \{prompt\}"):
        load_rows(name, 1, 0, template="Question:")
    with pytest.raises(UserError, match="prompt_template"):
        load_rows("toy", 1, 0, template="")


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
    for name, message in (
        ("absent.jsonl", "no file .*absent.jsonl'; give one of .jsonl, .json, .parquet, .csv or a Hub id"),
        ("folder", "no file .*folder'; give one of"),
        ("notes.txt", "'notes.txt' is of no known kind; convert it"),
        ("broken.jsonl", "broken.jsonl' .* could not be read: "),
        ("broken.parquet", "broken.parquet' .* could not be read: "),
        ("empty.csv", "empty.csv' .* could not be read: "),
    ):
        with pytest.raises(UserError, match=f"data: .*{message}"):
            load_rows(str(tmp_path / name), 1, 0)


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


# Rewards


@pytest.mark.parametrize(
    "completion, answer, expected",
    [
        (r"so it is \boxed{42}", "42", 1.0),
        (r"so it is \boxed{41}", "42", 0.0),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"\boxed{\frac{2}{4}}", "0.5", 1.0),
        (r"\boxed{1+x^2}", "x^2+1", 1.0),
        (r"\boxed{1-x^2}", "x^2+1", 0.0),
        (r"\boxed{1000}", "1,000", 1.0),
        (r"\boxed{(1,2)}", "(1, 2)", 1.0),
        (r"\boxed{(2,1)}", "(1, 2)", 0.0),
        (r"The answer is $-3$.", "-3", 1.0),
        (r"\boxed{7}", r"\boxed{7}", 1.0),
        (r"\boxed{7}", r"Seven, that is $7$", 1.0),
        (r"\boxed{7}", r"\(7\)", 1.0),
        (r"\boxed{7}", r"\[7\]", 1.0),
        ("no answer at all", "42", 0.0),
        ("", "42", 0.0),
        (r"\boxed{7}", "$$", None),
    ],
)
def test_math_reward(completion, answer, expected):
    assert math_reward([completion], [answer]) == [expected]
    assert math_reward([[{"role": "assistant", "content": completion}]], [answer]) == [expected]


def test_math_reward_of_a_batch_keeps_its_order():
    found = math_reward(prompts=["a", "b", "c"], completions=[r"\boxed{1}"] * 3, answer=["1", "2", "$$"], level=[1, 2, 3])
    assert found == [1.0, 0.0, None]


def test_exact_is_the_tasks_own_check():
    assert load_reward("exact", "toy") is toy.exact_reward
    assert load_reward("exact", "toy")(completions=["a9b0c9", "a9b0c8"], answer=["9", "9"]) == [1.0, 0.0]
    assert load_reward("exact", "openai/gsm8k") is math_reward


def test_a_reward_of_yours(tmp_path, monkeypatch):
    code = "def length(completions, **_):\n    return [len(c) for c in completions]\nlimit = 3\n"
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_reward("my_rewards:length", "toy")(completions=["ab", ""]) == [2, 0]
    assert load_reward("math:isfinite", "x") is math.isfinite
    for name, message in (
        ("my_rewards:width", "reward: 'my_rewards:width' could not be imported .*width.*PYTHONPATH"),
        ("your_rewards:length", "'your_rewards:length' could not be imported .*No module named 'your_rewards'"),
        ("my_rewards:limit", "reward: 'my_rewards:limit' is a int, not a function"),
        ("accuracy", "reward: 'accuracy' is neither 'exact' nor 'module:function'"),
        ("my_rewards:", "neither 'exact' nor"),
    ):
        with pytest.raises(UserError, match=message):
            load_reward(name, "toy")


def test_a_reward_module_that_does_not_load(tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("broken_rewards:f", ":f", "..rewards:f"):
        with pytest.raises(UserError, match="reward: .* could not be imported"):
            load_reward(name, "toy")
