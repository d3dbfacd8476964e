"""How each kind of benchmark is asked, and the five worked examples of "5-shot HumanEval".

The paper states no prompt. Mathematics uses the system prompt that Qwen's models are evaluated with. "5-shot HumanEval" is not
a standard task: HumanEval has no training split to take shots from. The five here were written for this package, resemble the
benchmark's form (signature, docstring with examples, body) and are none of its problems.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
COMPLETE = (
    "Complete the following Python function. Reply with the whole function, imports included, in one ```python block.\n\n"
    "```python\n{problem}\n```"
)


@dataclass(frozen=True)
class Shot:
    """A worked example: the text of a problem and what completes it (for code: the body that follows the docstring)."""

    problem: str
    solution: str


@dataclass(frozen=True)
class Prompt:
    """What surrounds a problem. `{problem}` is replaced by it.

    Args:
        system: system message, "" for none.
        user: message of the user, for models with a chat template.
        plain: the text for models without one; base models continue it.
        shots: examples shown first, as earlier turns or as text. shot_reply: the assistant's turn, of `{problem}`, `{solution}`.
    """

    system: str
    user: str
    plain: str
    shots: tuple[Shot, ...] = ()
    shot_reply: str = "```python\n{problem}{solution}```"

    def build(self, problem: str, chat: bool) -> str | list[dict[str, str]]:
        """The prompt as the trainer takes it: messages for a chat model, else text."""
        if not chat:
            shown = "".join(f"{self.plain.replace('{problem}', s.problem)}{s.solution}\n\n" for s in self.shots)
            return shown + self.plain.replace("{problem}", problem)
        turns = [{"role": "system", "content": self.system}] if self.system else []
        for shot in self.shots:
            reply = self.shot_reply.replace("{problem}", shot.problem).replace("{solution}", shot.solution)
            turns.append({"role": "user", "content": self.user.replace("{problem}", shot.problem.rstrip())})
            turns.append({"role": "assistant", "content": reply})
        return [*turns, {"role": "user", "content": self.user.replace("{problem}", problem.rstrip())}]

    def fit(self, problem: str, tokenizer: Any) -> str | list[dict[str, str]]:
        """`build` for this tokenizer. Where its chat template knows no system role, the system text opens the first user turn."""
        if not getattr(tokenizer, "chat_template", None):
            return self.build(problem, chat=False)
        turns: Any = self.build(problem, chat=True)
        try:
            render(turns, tokenizer)
        except Exception:  # jinja2.TemplateError, as Gemma's template raises
            if not self.system:
                raise
            first = {"role": "user", "content": f"{self.system}\n\n{turns[1]['content']}"}
            return [first, *turns[2:]]
        return turns


def render(prompt: str | list[dict[str, str]], tokenizer: Any) -> str:
    """The text that the model reads, special tokens included."""
    if isinstance(prompt, str):
        return prompt
    return str(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))


FIVE_SHOTS = (
    Shot(
        '''\
def seconds_in(duration: str) -> int:
    """ Convert a duration such as "1h30m" or "45s" to seconds.
    Units are h, m and s, each at most once.
    >>> seconds_in("1h30m")
    5400
    >>> seconds_in("45s")
    45
    """
''',
        """\
    total, number = 0, ""
    for symbol in duration:
        if symbol.isdigit():
            number += symbol
        else:
            total += int(number) * {"h": 3600, "m": 60, "s": 1}[symbol]
            number = ""
    return total
""",
    ),
    Shot(
        '''\
from typing import List


def quarter_turn(grid: List[List[int]]) -> List[List[int]]:
    """ Turn a rectangular grid of numbers clockwise by a quarter.
    >>> quarter_turn([[1, 2, 3], [4, 5, 6]])
    [[4, 1], [5, 2], [6, 3]]
    >>> quarter_turn([[7]])
    [[7]]
    """
''',
        """\
    return [list(column) for column in zip(*grid[::-1])]
""",
    ),
    Shot(
        '''\
from typing import List, Tuple


def busy_spans(meetings: List[Tuple[int, int]]) -> List[Tuple[int, int]]:
    """ Join meetings, given as (start, end), that overlap or touch; earliest first.
    >>> busy_spans([(9, 10), (13, 15), (10, 12)])
    [(9, 12), (13, 15)]
    >>> busy_spans([])
    []
    """
''',
        """\
    spans: List[Tuple[int, int]] = []
    for start, end in sorted(meetings):
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], end))
        else:
            spans.append((start, end))
    return spans
""",
    ),
    Shot(
        '''\
from typing import Dict, List


def by_initial(names: List[str]) -> Dict[str, List[str]]:
    """ Group names by their first letter in upper case; names keep their order, empty ones are dropped.
    >>> by_initial(["ada", "Alan", "", "grace"])
    {'A': ['ada', 'Alan'], 'G': ['grace']}
    """
''',
        """\
    groups: Dict[str, List[str]] = {}
    for name in names:
        if name:
            groups.setdefault(name[0].upper(), []).append(name)
    return groups
""",
    ),
    Shot(
        '''\
def trailing_zeros(n: int) -> int:
    """ How many zeros the decimal form of n! ends with, for n >= 0.
    >>> trailing_zeros(10)
    2
    >>> trailing_zeros(4)
    0
    """
''',
        """\
    zeros = 0
    while n:
        n //= 5
        zeros += n
    return zeros
""",
    ),
)

MATH = Prompt(BOXED, "{problem}", "{problem}\n" + BOXED + "\n")
CODE = Prompt("", COMPLETE, "{problem}")
CODE_5_SHOT = Prompt("", COMPLETE, "{problem}", FIVE_SHOTS)
BARE = Prompt("", "{problem}", "{problem}")  # the toy policy reads the question alone
