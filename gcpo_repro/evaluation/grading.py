r"""Whether a response answers a question: extraction, one spelling, comparison, on top of math-verify.

`grade` is the whole of it for one response, `accuracy_reward` for a trainer, `grading_pool.grade_file` for a file. The contract:

1. Only the text after the last `</think>` counts; an unfinished thought is no answer.
2. The answer is the last complete `\boxed{…}` or `\fbox{…}` (nested: the innermost), with the earlier boxes of its line. Without
   a box: "the answer is …", `Answer: …`, `#### …`, `<answer>…</answer>`, or a response that is nothing but one answer.
3. Numbers are equal up to form (zeros, separators, fractions, decimals, percent, degrees, units that the gold leaves out).
4. Sets are unordered; tuples, intervals and matrices are exact; scientific notation has a relative tolerance of 1e-4.
5. Several answers where one is asked are wrong. Every text gets a verdict within the time limit, and nothing in it is executed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..errors import UserError
from .grading_compare import EQUAL, Symbolic, compare
from .grading_text import LONGEST, extract, normalise, read_gold

LIMIT = 5.0  # seconds for one answer
NO_GOLD, TIMED_OUT = "no gold answer", "timed out"
NO_ANSWER = ("no answer", "empty response", "unfinished thought", "unterminated box", "empty box")


@dataclass(frozen=True)
class Verdict:
    """`correct`; the `answer` as it was written, None where there is none; and the `reason`, a few words."""

    correct: bool
    answer: str | None
    reason: str

    def __bool__(self) -> bool:
        return self.correct


class NeedsAlgebra(Exception):
    """Text alone does not decide about this answer."""

    answer = ""


def _ask_for_algebra(gold: str, answer: str) -> bool:
    raise NeedsAlgebra


@lru_cache(maxsize=4096)
def spelled_gold(gold: str) -> str:
    """A gold column's answer in our spelling, "" where it holds none."""
    return normalise(read_gold(gold))


def judge(response: str, gold: str, symbolic: Symbolic, extracted: bool = False) -> Verdict:
    """The verdict, computed in this process but for `symbolic(gold, answer)`.

    Args:
        response, gold: as in `grade`. extracted: the response is nothing but the answer already.
        symbolic: says whether two normalised answers are algebraically equal; what it raises is passed on.
    """
    expected = spelled_gold(gold)
    if not expected:
        return Verdict(False, None, NO_GOLD)
    answer, reason = (response, "") if extracted else extract(response)
    if answer is None:
        return Verdict(False, None, reason)
    if len(answer) > LONGEST:
        return Verdict(False, answer[:LONGEST], "answer too long")
    spelled = normalise(answer)
    if not spelled:
        return Verdict(False, None, "no answer")
    try:
        reason = compare(expected, spelled, symbolic)
    except NeedsAlgebra as needed:
        needed.answer = answer
        raise
    return Verdict(reason == EQUAL, answer, reason)


def given(response: str, extracted: bool = False) -> str | None:
    """The answer that a verdict shows."""
    answer = response if extracted else extract(response).answer
    return None if answer is None else answer[:LONGEST]


def grade(response: str, gold: str, benchmark: str = "math", limit: float = LIMIT) -> Verdict:
    """Whether `response` gives the answer `gold`.

    Args:
        response: what the model wrote, of any length; nothing in it is executed.
        gold: the right answer: a number, LaTeX, text; boxed, in a sentence with `$…$` or after `####` too.
        benchmark: its name; all mathematical ones are graded alike.
        limit: seconds that the algebra may take, in a child process that is then killed.

    Raises:
        UserError: texts that are no strings, or a benchmark that is graded by running code. Never because of what a text says.
    """
    _check(response, gold, benchmark)
    try:
        return judge(response, gold, _ask_for_algebra)
    except NeedsAlgebra as needed:
        from .grading_pool import grade_in_child

        return grade_in_child(needed.answer, gold, limit)


def accuracy_reward(
    completions: Sequence[Any], answer: Sequence[str], benchmark: str = "math", **kwargs: Any
) -> list[float | None]:  # fmt: skip
    """`grade` in TRL's form: 1.0 or 0.0 for each completion, None where the gold answer is empty.

    Args:
        completions: plain texts, or lists of messages, of which the last one's content counts.
        answer: the gold answers, one for each.
    """
    if len(completions) != len(answer):
        raise UserError(f"answer: {len(answer)} golds for {len(completions)} completions; give one for each")
    texts = [c if isinstance(c, str) else c[-1]["content"] if c else "" for c in completions]
    return [
        float(grade(text or "", str(gold), benchmark).correct) if gold is not None and spelled_gold(str(gold)) else None
        for text, gold in zip(texts, answer, strict=True)
    ]


def _check(response: Any, gold: Any, benchmark: str) -> None:
    for name, text in (("response", response), ("gold", gold)):
        if not isinstance(text, str):
            raise UserError(f"{name}: {text!r:.80} is a {type(text).__name__}; give a string")
    check_benchmark(benchmark)


def check_benchmark(benchmark: str) -> None:
    """Raise UserError for a benchmark whose answers are no mathematics: programs, or the toy task's chains."""
    if benchmark.lower().startswith(("humaneval", "toy")):
        how = "its own check" if benchmark.lower().startswith("toy") else "running its tests"
        raise UserError(f"benchmark: {benchmark!r} is graded by {how}; use `gcpo-repro evaluate --benchmark {benchmark}`")
    if benchmark != "math":
        from .benchmarks import find

        find(benchmark)
