"""The verdict on one answer: the contract's table, the golds of the benchmarks, numbers against exact fractions, hostile text."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest

from gcpo_repro import UserError
from gcpo_repro.evaluation.grading import NO_ANSWER, Verdict, accuracy_reward, grade
from gcpo_repro.evaluation.grading_algebra import _number_literal
from gcpo_repro.evaluation.grading_compare import number, shape
from gcpo_repro.evaluation.grading_text import extract, normalise
from tests.evaluation.grading_cases import CASES, boxed

FILES = ("aime24", "aime25", "amc23", "math500", "minerva_math", "gsm8k")
needs_data = pytest.mark.skipif(not os.environ.get("GCPO_DATA"), reason="GCPO_DATA names no folder with the benchmark files")


def golds(name: str) -> list[str]:
    with open(Path(os.environ["GCPO_DATA"]) / f"{name}.jsonl", encoding="utf-8") as file:
        return [json.loads(line)["answer"] for line in file]


# The contract


@pytest.mark.parametrize("rule", CASES)
def test_the_contract(rule):
    verdicts = [(gold, response, right, grade(response, gold)) for gold, response, right in CASES[rule]]
    assert [row for row in verdicts if row[3].correct != row[2]] == []


def test_the_table_is_large_and_has_both_verdicts():
    everything = [case for rows in CASES.values() for case in rows]
    assert len({(gold, response) for gold, response, _ in everything}) > 250
    for rule, rows in CASES.items():
        assert {right for _, _, right in rows} == {True, False}, rule


@pytest.mark.parametrize(
    ("response", "answer", "reason"),
    [
        ("", None, "empty response"),
        ("<think>so 5", None, "unfinished thought"),
        ("I cannot solve this problem.", None, "no answer"),
        (r"\boxed{5", None, "unterminated box"),
        (r"\boxed{}", None, "empty box"),
        (r"\boxed{4}", "4", "different"),
        (r"\boxed{5 \text{ or } 6}", r"5 \text{ or } 6", "several answers"),
        (r"\boxed{05}", "05", "equal"),
        (r"\boxed{" + "(" * 60 + "5" + ")" * 60 + "}", "(" * 60 + "5" + ")" * 60, "too deeply nested"),
        (r"\boxed{" + "7" * 3000 + "}", "7" * 2000, "answer too long"),
    ],
)
def test_answer_and_reason(response, answer, reason):
    verdict = grade(response, "5")
    assert verdict == Verdict(reason == "equal", answer, reason)
    assert bool(verdict) == verdict.correct
    assert (verdict.answer is None) == (reason in NO_ANSWER)


def test_a_gold_may_come_in_a_box_a_sentence_or_a_worked_solution():
    for gold in ("1,234", r"\boxed{1234}", "so it is $1234$", r"\(1234\)", "a worked solution\n#### 1,234"):
        assert grade(r"\boxed{1234}", gold), gold
        assert not grade(r"\boxed{1235}", gold), gold
    assert grade(r"\boxed{1234}", "$$") == Verdict(False, None, "no gold answer")


# The benchmarks' own golds


@needs_data
@pytest.mark.parametrize("name", FILES)
def test_every_gold_equals_itself(name):
    for gold in golds(name):
        sentence = rf"<think>perhaps \boxed{{0}}</think> Hence, as was asked for, the result is $\boxed{{{gold}}}$."
        for response in (gold, rf"\boxed{{{gold}}}", sentence, f"The answer is ${gold}$."):
            assert grade(response, gold), (gold, response)


@needs_data
@pytest.mark.parametrize("name", ["amc23", "math500"])
def test_golds_of_different_problems_differ(name):
    """The check above has power: the golds that are taken for another one are those that say the same."""
    different = list(dict.fromkeys(golds(name)))
    pairs = list(zip(different, different[1:] + different[:1], strict=True))
    matches = [(a, b) for a, b in pairs if grade(boxed(b), a)]
    same = [(a, b) for a, b in pairs if normalise(a).replace(" ", "") == normalise(b).replace(" ", "")]
    assert matches == same and len(pairs) > 20


@needs_data
@pytest.mark.slow
def test_golds_of_different_minerva_problems_differ():
    different = list(dict.fromkeys(golds("minerva_math")))
    assert [(a, b) for a, b in zip(different, different[1:], strict=False) if grade(boxed(b), a)] == []


# Numbers and structures against something independent


def spellings(value: Fraction) -> list[str]:
    p, q = value.numerator, value.denominator
    sign, size = "-" if p < 0 else "", abs(p)
    forms = [rf"\frac{{{p}}}{{{q}}}", f"{p}/{q}", rf"{sign}\dfrac{{{size}}}{{{q}}}", rf"{sign}\frac{{{3 * size}}}{{{3 * q}}}"]
    if q > 1 and size > q:
        forms.append(rf"{sign}{size // q}\frac{{{size % q}}}{{{q}}}")
    if q == 1:
        forms += [f"{sign}00{size}", f"{p:,}", f"{p}.0", f"{p}.", f"{p}e0"]
        forms += [f"{p:,}".replace(",", separator) for separator in ("{,}", r"\,", r",\!")]
    else:
        forms += [rf"\frac{{{size / 2}}}{{{sign}{q / 2}}}", f"{100 * value.numerator}/{q}" + r"\%"]
    return forms


def test_numbers_in_all_their_forms_have_their_exact_value():
    draw = random.Random(0)
    for _ in range(200):
        size = 10 ** draw.randint(1, 7)
        value = Fraction(draw.randint(-size, size), draw.choice((1, 1, 2, 3, 7, 40, 999)))
        for form in spellings(value):
            found = number(normalise(form))
            if form.endswith(r"\%"):
                assert found is None or found.value in (value, 100 * value), form
            else:
                assert found is not None and found.value == value, (form, value)


def test_scientific_notation_has_a_relative_tolerance():
    for exponent in (-300, -12, -1, 0, 5, 33, 300):
        gold = f"4.5e{exponent}"
        assert grade(boxed(rf"4.5002 \times 10^{{{exponent}}}"), gold), exponent
        assert not grade(boxed(rf"4.51 \times 10^{{{exponent}}}"), gold), exponent
        assert not grade(boxed(rf"4.5 \times 10^{{{exponent + 1}}}"), gold), exponent
    assert number("1e999999") is None and number("10^{99999}") is None  # of no use, and too long to write out


def test_shapes():
    assert shape("1, 2").kind == shape(r"\{1, 2\}").kind == "set"
    assert shape("(1, 2]") == ("(]", ["1", "2"])
    assert shape(r"(0,1) \cup (2,3)") == ("union", ["(0,1)", "(2,3)"])
    assert shape("(1)(2)").kind == shape("f(1, 2)").kind == shape("1,234").kind == "atom"
    assert shape(r"1 \pm x").parts == ["1 + x", "1 - x"]
    assert shape(normalise(r"\begin{pmatrix}1&2\\3&4\end{pmatrix}")) == ("matrix [2, 2]", ["1", "2", "3", "4"])


def test_sets_in_any_order_tuples_in_one():
    draw = random.Random(1)
    for _ in range(50):
        members = draw.sample([r"\frac{1}{2}", "3", "-7", "0.25", r"\sqrt{2}", r"\pi", "10"], draw.randint(2, 5))
        other = members[:]
        draw.shuffle(other)
        assert grade(boxed(", ".join(other)), r"\{" + ",".join(members) + r"\}")
        assert bool(grade(boxed(f"({', '.join(other)})"), f"({','.join(members)})")) == (members == other)
        assert not grade(boxed(", ".join(other[1:])), ",".join(members))


# Any text gets a verdict, in time, and none is executed

HOSTILE = {
    "tower": r"\boxed{9^{9^{9^9}}}", "factorial": r"\boxed{(10^9)!}", "letters": r"\boxed{5 " + "a " * 900 + "!}",
    "parentheses": r"\boxed{" + "(" * 900 + "5" + ")" * 900 + "}", "braces": r"\boxed{" + "{" * 99_999 + "5" + "}" * 99_999 + "}",
    "fractions": r"\boxed{" + r"\frac{1}{" * 150 + "5" + "}" * 150 + "}", "10 MB": "x" * 10**7,
    "10 MB box": r"\boxed{" + "9" * 10**7 + "}", "boxes": r"\boxed{6}" * 10**5, "open boxes": r"\boxed{" * 10**5,
    "nested boxes": r"\boxed{" * 10**5 + "6" + "}" * 10**5, "tags": "<answer>" * 10**5, "thoughts": "<think>" * 10**5,
    "blanks": "answer" + " " * 10**6, "statements": "the answer is " * 10**5, "answers to": "answer to " * 10**5,
    "dollars": "$" * 10**6, "zero byte": "\\boxed{6\x00}", "surrogate": "\\boxed{\ud800}", "direction": "\\boxed{\u202e6}",
    "commas": r"\boxed{" + "5," * 700 + "6}", "large exponent": r"\boxed{1e999999999}", "digits": r"\boxed{" + "9" * 1900 + "}",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text(name):
    start = time.monotonic()
    verdict = grade(HOSTILE[name], "5", limit=0.5)
    assert not verdict and verdict.reason
    assert time.monotonic() - start < 6  # a child that was killed by the case before starts anew, which is not of the limit
    assert grade(r"\boxed{5}", "5")


def test_garbage_never_raises():
    draw = random.Random(2)
    words = r"\frac \sqrt \boxed \text \begin{pmatrix} \end{pmatrix} \left \pm \cup \in { } ( ) [ ] \{ \} , ; = < ^ _ &".split()
    words += ["\\\\", "$", "%", "1", "2.5", "x", "e", "or", "!", "\n"]
    for _ in range(300):
        text = " ".join(draw.choices(words, k=draw.randint(1, 25)))
        verdict = grade(draw.choice((text, rf"\boxed{{{text}}}")), draw.choice(("5", r"\frac{x}{2}", "(1,2)", text)), limit=1)
        assert isinstance(verdict, Verdict) and verdict.reason


def test_nothing_is_executed(tmp_path):
    marker = tmp_path / "executed"
    attack = f"__import__('os').system('touch {marker}')"
    forms = [attack, rf"\text{{{attack}}}", f"f({attack})", rf"\operatorname{{{attack}}}(1)", f"1+{attack}", rf"x_{{{attack}}}"]
    for form in forms:
        for gold in ("5", "x+1", form, "f(x)"):
            grade(rf"\boxed{{{form}}}", gold)
    assert not marker.exists()


def test_strings_are_not_evaluated_in_the_child(tmp_path):
    for text in ("os.getpid()", "1+1", "x", "1e99999", "٣", ""):
        with pytest.raises(SyntaxError):
            _number_literal(text)
    assert _number_literal("25") == 25 and str(_number_literal("2.5")).startswith("2.5")
    acts = ["exec('1')", "eval('1+1')", "os.system('true')", "open('file', 'w')", "os.fork()", "subprocess.run(['true'])"]
    code = (
        "import os, subprocess, sys\nfrom gcpo_repro.evaluation.grading_algebra import _refuse\n"
        f"acts = [compile(act, 'file', 'exec') for act in {acts!r}]\nsys.addaudithook(_refuse)\n"
        "for act in acts:\n    try:\n        exec(act)\n    except RuntimeError:\n        print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.count("refused") == len(acts), done
    assert list(tmp_path.iterdir()) == []


def test_many_threads_share_the_child():
    found: dict[int, bool] = {}
    pairs = [(rf"\boxed{{x^{{{k}}}+1}}", f"1+x^{{{k + k % 2}}}") for k in range(2, 14)]
    threads = [threading.Thread(target=lambda k=k: found.update({k: bool(grade(*pairs[k]))})) for k in range(len(pairs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {k: k % 2 == 0 for k in range(len(pairs))}


# The reward, and wrong arguments


def test_accuracy_reward_takes_texts_and_messages():
    texts = [r"\boxed{1}", r"\boxed{2}", "", r"\boxed{1}"]
    answer = ["1", "1", "1", "$$"]
    assert accuracy_reward(texts, answer, benchmark="aime24", prompts=["q"] * 4) == [1.0, 0.0, 0.0, None]
    chats = [[{"role": "user", "content": r"\boxed{9}"}, {"role": "assistant", "content": text}] for text in texts]
    assert accuracy_reward(completions=chats, answer=answer) == [1.0, 0.0, 0.0, None]


def test_wrong_arguments():
    with pytest.raises(UserError, match="answer: 1 golds for 2 completions"):
        accuracy_reward(["1", "2"], ["1"])
    with pytest.raises(UserError, match="response: None is a NoneType; give a string"):
        grade(None, "5")
    with pytest.raises(UserError, match="gold: 5 is a int; give a string"):
        grade("5", 5)
    with pytest.raises(UserError, match="'HumanEval' is graded by running its tests"):
        grade("5", "5", "HumanEval")
    with pytest.raises(UserError, match="'toy' is graded by its own check"):
        grade("5", "5", "toy")


def test_extraction_reads_the_end_of_a_very_long_response():
    assert extract(r"\boxed{4}" + "\n" * 5_000_000 + r"\boxed{5}").answer == "5"
    assert extract("<think>" + "x" * 5_000_000).reason == "unfinished thought"


@pytest.mark.parametrize(
    "gold, answer, right",
    [
        ("2e33", "66e", False), ("4.5e33", r"\frac{9}{2}\times10^{33}", True), ("1e-10", r"\frac{1}{10^{10}}", True),
        ("7.5e-7", r"\frac34\times10^{-6}", True), ("1e8", "8e", False), ("5", r"5\text{ million}", False),
        ("5", r"5\text{ or six}", False), ("5", "5 minus 2", False), ("5", "5 halves", False), ("5", r"5\text{ cm}", True),
        ("12", "1 2", False), ("56", "5 6", False), ("5 million", "5 million", True),
        ("50", r"50 \Omega", True), ("50", r"50 \mu m", True), ("5", r"5\ \frac{m}{s}", True), ("50", "50 eV", True),
        (r"5\frac{a}{b}", "5", False), (r"2\mu", "2", False), ("10", r"\binom52", True),
    ],
)  # fmt: skip
def test_cases_of_a_later_review(gold, answer, right):
    assert bool(grade(rf"So it is $\boxed{{{answer}}}$.", gold)) == right


def test_hedged_statements_and_far_boxes():
    assert not grade("The answer is 5 but could be 6.", "5") and not grade("The answer is 9 which is wrong, it is 10", "9")
    assert not grade("The answer is 9. Actually it is 10.", "9") and not grade("The answer is 5. Or 6.", "5")
    assert grade("The answer is 9. That is all.", "9") and grade("<ANSWER>5</ANSWER>", "5")
    assert grade("So the answer should be 5.", "5")
    assert grade(r"\boxed{204}" + 2_500_000 * "y", "204")


def test_rewards_of_missing_golds_and_completions():
    assert accuracy_reward(["x", [], None], [None, "5", "5"]) == [None, 0.0, 0.0]
    with pytest.raises(UserError, match="no such benchmark"):
        grade("5", "5", "no such benchmark")

