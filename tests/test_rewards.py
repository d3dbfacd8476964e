"""Rewards by name, and a user's own."""

import math

import pytest

from gcpo_repro import UserError, toy
from gcpo_repro.data import TEMPLATES
from gcpo_repro.rewards import (
    LENGTH_MARGIN,
    format_reward,
    load_answer_reader,
    load_judge,
    load_reward,
    load_rewards,
    math_reward,
    toy_format_reward,
)


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
        ("accuracy", "reward: 'accuracy' is neither 'exact', 'format', 'length' nor 'module:function'"),
        ("my_rewards:", "neither 'exact', 'format', 'length' nor"),
    ):
        with pytest.raises(UserError, match=message):
            load_reward(name, "toy")


def test_a_reward_module_that_does_not_load(tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("broken_rewards:f", ":f", "..rewards:f"):
        with pytest.raises(UserError, match="reward: .* could not be imported"):
            load_reward(name, "toy")


# Format

ONE = r"so \boxed{7}"


@pytest.mark.parametrize(
    "text, marked",
    [
        (ONE, 1), (r"\fbox{7}", 1), ("<answer>7</answer>", 1), (r"<answer>$\boxed{7}$</answer>", 1), ("<ANSWER>7</ANSWER>", 1),
        ("<think>so</think> " + ONE, 1), ("so</think> " + ONE, 1),  # the prompt may open the thought
        (r"<think>\boxed{6}?</think> \boxed{7}", 1),  # what stands in the thought is no answer
        ("", 0), ("7", 0), ("The answer is 7.", 0), (r"\boxed{6} or \boxed{7}", 0), (r"\boxed{}", 0), (r"\boxed{7", 0),
        ("<answer>7", 0), ("7</answer>", 0), ("<answer> </answer>", 0), ("<answer>6</answer><answer>7</answer>", 0),
        (r"<answer>\boxed{6} \boxed{7}</answer>", 0),
        ("<think>" + ONE, 0), ("<think>" + ONE + "</think>", 0), ("a</think>b</think>" + ONE, 0),
        ("<think><think>a</think>" + ONE, 0), ("a</think> <think>" + ONE, 0),
    ],
)  # fmt: skip
def test_format_reward(text, marked):
    assert format_reward([text]) == [marked]
    assert format_reward(completions=[[{"role": "assistant", "content": text}]], answer=["1"]) == [marked]


def test_format_reward_of_no_message():
    assert format_reward([[], [{"role": "assistant", "content": None}]]) == [0, 0]


@pytest.mark.parametrize("name, reply", [("boxed", ONE), ("answer_tags", "<think>a</think><answer>7</answer>")])
def test_who_follows_a_template_is_right_and_well_formed(name, reply):
    assert name in TEMPLATES
    assert format_reward([reply]) == math_reward([reply], ["7"]) == [1.0]


def test_toy_format():
    assert load_reward("format", "toy") is toy_format_reward
    assert toy_format_reward(completions=["a9b0c9", "a9b0", "b9a0c9", "", "a9b0c9c9"], answer=["1"] * 5) == [1, 0, 0, 0, 0]


# Length


def test_length_is_dapos_penalty():
    """Eq. 13 by hand: 20 allowed, the last 4 of them punished: |y| = 16 -> 0, 17 -> -1/4, 20 -> -1."""
    reward = load_reward("length", "x", longest=20)
    assert 20 * LENGTH_MARGIN == 4
    assert reward(completion_ids=[[1] * k for k in (0, 16, 17, 18, 20)], answer=["1"] * 5) == [0, 0, -0.25, -0.5, -1]
    assert load_reward("length", "x", longest=20, margin=10)(completion_ids=[[1] * 10, [1] * 15]) == [0, -0.5]
    assert load_reward("length", "toy", longest=1)(completion_ids=[[1]]) == [-1]
    with pytest.raises(UserError, match="length_margin: 21 tokens do not fit into max_completion_length = 20"):
        load_reward("length", "x", longest=20, margin=21)


def test_several_rewards_in_their_order():
    first, second, third = load_rewards(["format", "exact", "length"], "gsm8k", 10)
    assert (first, second) == (format_reward, math_reward) and third(completion_ids=[[1] * 10]) == [-1]


def test_held_out_answers_are_judged_by_right_or_wrong(tmp_path, monkeypatch):
    (tmp_path / "judging.py").write_text("def taste(completions, **_):\n    return [1.0] * len(completions)\n")
    monkeypatch.syspath_prepend(tmp_path)
    for names in (["exact"], ["format", "exact"], ["format", "length"], ["judging:taste", "exact"]):
        assert load_judge(names, "toy") is toy.exact_reward
        assert load_judge(names, "gsm8k") is math_reward
    assert load_judge(["format", "judging:taste"], "toy").__name__ == "taste"


def test_answers_in_one_spelling():
    assert load_answer_reader("toy")("a9b0c9") == "9"
    read = load_answer_reader("gsm8k")
    assert read(r"so \boxed{\dfrac12}") == read(r"The answer is $\frac{1}{2}$.") and read("It has none, sad to say.") == ""
