"""Which of a problem's answers are one vote in a majority: the same answer, however it is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import Any

from .. import provenance
from .grading import NeedsAlgebra
from .grading_compare import DIFFERENT, EQUAL, SEVERAL, compare
from .grading_pool import Pool
from .grading_text import normalise

ALGEBRA_LIMIT = 1.0  # seconds for one comparison; two that take longer are two votes
MOST_PAIRS = 100  # of a problem that are compared by algebra, the most frequent first
LONGEST = 200  # characters of a spelling that is compared at all
COMPARED = (EQUAL, DIFFERENT, SEVERAL, "")

Vote = Hashable | None


def votes(by_problem: Sequence[Sequence[dict[str, Any]]]) -> list[list[Vote]]:
    r"""For each problem the vote of each of its verdicts: equal votes are equal objects, no answer has none (None).

    Right answers are one vote. Wrong ones are compared as the grader compares an answer with a gold: by their normalised
    spelling, by value and structure, and by algebra (in child processes) only where neither decides. One that the grader could
    not compare (`reason`: timed out …) is the same only as its own spelling.
    """
    spelled = [[_spelling(verdict) for verdict in verdicts] for verdicts in by_problem]
    classes = []
    undecided: list[tuple[int, str, str]] = []
    for q, (verdicts, spellings) in enumerate(zip(by_problem, spelled, strict=True)):
        failed = {s for s, v in zip(spellings, verdicts, strict=True) if v["reason"] not in COMPARED}
        wrong = [s for s, _ in Counter(s for s in spellings if isinstance(s, str)).most_common()]
        wrong = [s for s in wrong if len(s) <= LONGEST and s not in failed]
        same, open_pairs = _by_text(wrong)
        classes.append(Classes(wrong, same))
        undecided += [(q, a, b) for a, b in open_pairs[:MOST_PAIRS]]
    for (q, a, b), equal in zip(undecided, _by_algebra(undecided), strict=True):
        if equal:
            classes[q].join(a, b)
    return [
        [("wrong", classes[q].of(s)) if isinstance(s, str) else s for s in spellings] for q, spellings in enumerate(spelled)
    ]


def _spelling(verdict: dict[str, Any]) -> str | bool | None:
    """True for a right answer, None for none."""
    if verdict["answer"] is None:
        return None
    return True if verdict["correct"] else normalise(verdict["answer"])


class Classes:
    """Spellings of the same answer, merged pair by pair."""

    def __init__(self, members: list[str], pairs: list[tuple[str, str]]) -> None:
        self.parent = {member: member for member in members}
        for a, b in pairs:
            self.join(a, b)

    def of(self, member: str) -> str:
        """The one that stands for all that are the same."""
        while (parent := self.parent.get(member, member)) != member:
            member = parent
        return member

    def join(self, a: str, b: str) -> None:
        self.parent[self.of(b)] = self.of(a)


def _by_text(members: list[str]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The pairs that are the same by text and exact arithmetic, and those that need algebra."""
    same, undecided = [], []
    for a, b in combinations(members, 2):
        found = [_same(a, b), _same(b, a)]
        if True in found:
            same.append((a, b))
        elif None in found:
            undecided.append((a, b))
    return same, undecided


def _same(gold: str, answer: str) -> bool | None:
    try:
        return compare(gold, answer, _unknown) == EQUAL
    except NeedsAlgebra:
        return None


def _unknown(gold: str, answer: str) -> bool:
    raise NeedsAlgebra


def _by_algebra(pairs: list[tuple[int, str, str]]) -> list[bool]:
    requests = [(answer, gold, True) for _, gold, answer in pairs]
    batches = [requests[k : k + 64] for k in range(0, len(requests), 64)]
    if not batches:
        return []
    with Pool(min(len(batches), provenance.usable_cores())) as pool:
        return [bool(v) for graded in [pool.submit(batch, ALGEBRA_LIMIT) for batch in batches] for v in graded.result()]
