"""Rewards by name: right answer, marked answer, length; or a function of the user's. All in TRL's form.

A reward is `f(completions, answer, **kwargs) -> list of floats`, one for each completion, None where it cannot score one.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from .errors import UserError

Reward = Callable[..., Sequence[float | None]]
NAMES = ("exact", "format", "length")
LENGTH_MARGIN = 0.2  # DAPO, §4.1: the last 4,096 of 20,480 tokens


def load_rewards(names: Sequence[str], data: str, longest: int, margin: int = 0) -> list[Reward]:
    """The reward functions of these names; TRL adds them up with weights. See `load_reward`."""
    return [load_reward(name, data, longest, margin) for name in names]


def load_reward(name: str, data: str, longest: int = 0, margin: int = 0) -> Reward:
    """One reward function.

    Args:
        name: one of
            "exact": 1 for a right final answer, else 0 (the toy task's own check for "toy" data, the benchmarks' grading
            otherwise);
            "format": 1 where exactly one final answer is marked, see `format_reward` (for "toy": the response has its form);
            "length": DAPO's soft penalty (arXiv 2503.14476, Eq. 13), 0 up to `longest - margin` tokens, then falling in a line to
            -1 at `longest`;
            "module:function": yours.
        data: the data set's name.
        longest: longest answer in tokens (max_completion_length), for "length".
        margin: tokens before it where the penalty sets in; 0: a fifth of `longest`, DAPO's share.

    Raises:
        UserError: an unknown name, a margin beyond the longest answer, a function that cannot be imported or called.
    """
    if name == "length":
        return _length_reward(longest, margin)
    if name in NAMES:
        if data == "toy":
            from . import toy

            return toy.exact_reward if name == "exact" else toy_format_reward
        return math_reward if name == "exact" else format_reward
    return _imported(name)


def load_judge(names: Sequence[str], data: str) -> Reward:
    """What held-out answers are judged by (right: at least 1): "exact", or the user's own function where "exact" is not used."""
    own = [name for name in names if name not in NAMES]
    return load_reward(own[0] if own and "exact" not in names else "exact", data)


def _imported(name: str) -> Reward:
    module, _, function = name.partition(":")
    if not function:
        raise UserError(f"reward: {name!r} is neither {', '.join(map(repr, NAMES))} nor 'module:function'")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # the user's module may fail in any way
        cause = f"{type(error).__name__}: {error}"
        raise UserError(f"reward: {name!r} could not be imported ({cause}); is its folder on PYTHONPATH?") from error
    if not callable(found):
        raise UserError(f"reward: {name!r} is a {type(found).__name__}, not a function")
    return found


def math_reward(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float | None]:
    """1.0 where the completion's final answer is the gold one, by the grading of the benchmarks; None if the gold is empty."""
    from .evaluation.grading import accuracy_reward

    return accuracy_reward(completions, answer)


def format_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    r"""1.0 where a completion marks exactly one final answer, else 0.0.

    After the thought, that is one complete `\boxed{…}` or `\fbox{…}`, or one `<answer>…</answer>` (a box may stand in it). The
    thought, where there is one, is closed once by `</think>`; what opens it may stand in the prompt.
    """
    return [float(_marks_one(_content(completion))) for completion in completions]


def _marks_one(text: str) -> bool:
    from .evaluation.grading_text import BOX, TAG, extract

    thought, closed, rest = text.rpartition("</think>")
    if "</think>" in thought or "<think>" in rest or thought.count("<think>") > 1:
        return False
    tags = [len(re.findall(tag, rest, re.IGNORECASE)) for tag in ("<answer>", "</answer>")]
    boxes = len(BOX.findall(rest))
    if tags != [0, 0]:
        found = TAG.search(rest)
        return tags == [1, 1] and found is not None and bool(found[1].strip()) and boxes <= 1
    return boxes == 1 and bool(extract(rest).answer)


def toy_format_reward(completions: list[str], **kwargs: Any) -> list[float]:
    """1.0 where a response has the toy task's form: each step once, in order, nothing else."""
    from .toy import RESPONSE_FORM

    return [float(RESPONSE_FORM.fullmatch(text) is not None) for text in completions]


def _length_reward(longest: int, margin: int) -> Reward:
    from trl.rewards import get_soft_overlong_punishment

    margin = margin or max(1, round(LENGTH_MARGIN * longest))
    if not 0 < margin <= longest:
        raise UserError(
            f"length_margin: {margin} tokens do not fit into max_completion_length = {longest}; choose 1 to {longest}, or 0 for "
            "a fifth"
        )
    return get_soft_overlong_punishment(longest, margin)


def _content(completion: Any) -> str:
    """The text of a plain or conversational completion."""
    if isinstance(completion, str):
        return completion
    return (completion[-1]["content"] or "") if completion else ""


def load_answer_reader(data: str) -> Callable[[str], str]:
    """A response's text -> its final answer in one spelling, to compare what responses say ("" where there is none).

    The last digit for the toy task, what the project's grader reads otherwise.
    """
    if data == "toy":
        return lambda text: text[-1:]
    from .evaluation.grading_text import extract, normalise

    return lambda text: normalise(extract(text).answer or "")
