r"""When two normalised answers are the same one: lists, tuples, intervals and matrices by their parts, numbers by their value.

Text and exact arithmetic only. What needs algebra is handed to a function of the caller, `symbolic(gold, answer) -> bool`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from .grading_numbers import CLOSERS, OPENERS, inside, number, same_number, tokens
from .grading_text import ROW
from .grading_units import SYMBOL_UNIT, UNITS, hedges, same_in_bases, split_unit, unit_power, word

Symbolic = Callable[[str, str], bool]
EQUAL, DIFFERENT, SEVERAL, DEEP = "equal", "different", "several answers", "too deeply nested"
DEEPEST, MOST_PARTS = 40, 60

# Structure


class Shape(NamedTuple):
    """kind: atom, set (also a list), union, or an ordered thing named by its brackets; parts: what it is made of."""

    kind: str
    parts: list[str]


MATRIX = re.compile(r"\\begin ?\{([pbBvV]?matrix|smallmatrix|array)\} ?(?:\{[lcr| ]*\})?(.*)\\end ?\{\1\}", re.DOTALL)
NAME = re.compile(
    r"(\\?[a-zA-Z]+(?: ?_ ?(?:\{[^{}]*\}|\w))?'*(?: ?\([a-zA-Z, ]{1,9}\))?|\([a-zA-Z](?: ?, ?[a-zA-Z])*\))"
    r" ?(?:=|\\in(?![a-zA-Z])) ?(.+)"
)
RELATION = re.compile(r"<=|>=|<|>|\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])")


def depth(text: str) -> int:
    """Largest number of brackets open at once."""
    return max((d for d, _ in tokens(text)), default=0)


def split(text: str, cup: bool = False) -> list[str]:
    r"""The parts of a list, separated by commas, semicolons, and, or (or by `\cup`); [text] for a single one."""
    pieces, start = [], 0
    for level, match in tokens(text):
        if level == 0 and bool(match["cup"]) == cup and match[0] not in OPENERS | CLOSERS and not re.fullmatch(r"\\.", match[0]):
            pieces.append(text[start : match.start()])
            start = match.end()
    return [piece.strip() for piece in (*pieces, text[start:]) if piece.strip()]


def shape(text: str) -> Shape:
    """How an answer is built (contract rule 4)."""
    text = text.strip()
    if match := MATRIX.fullmatch(text):
        rows = [[cell.strip() for cell in row.split("&")] for row in match[2].split(ROW) if row.strip()]
        kind = "determinant" if match[1][0] in "vV" else "matrix"
        return Shape(f"{kind} {[len(row) for row in rows]}", [cell for row in rows for cell in row])
    if number(text) is not None:
        return Shape("atom", [text])
    if len(pieces := split(text)) > 1:
        return Shape("set", _branches(pieces))
    if len(pieces := split(text, cup=True)) > 1:
        return Shape("union", pieces)
    if (inner := inside(text, r"\{", r"\}")) and not re.search(r"\\mid|\||:", inner):
        return Shape("set", _branches(split(inner)))
    if inner := inside(text, "{", "}"):
        return shape(inner)
    for left in ("(", "[", r"\langle"):
        for right in (")", "]", r"\rangle"):
            if inner := inside(text, left, right):
                parts = split(inner)
                ordered = len(parts) > 1 or left == "["
                return Shape((left + right).replace(r"\langle\rangle", "()"), parts) if ordered else shape(inner)
    branches = _branches([text])
    return Shape("set" if len(branches) > 1 else "atom", branches)


def _branches(texts: list[str]) -> list[str]:
    r"""`a \pm b` is the two answers a + b and a − b."""
    branches = []
    for text in texts:
        signs = ("+-", "-+") if text.count(r"\pm") == 1 else ("",)
        for sign in signs:
            branch = text.replace(r"\pm", sign[0]).replace(r"\mp", sign[1]) if sign else text
            branches.append(branch.removeprefix("+").strip())
    return branches


def compare(gold: str, answer: str, symbolic: Symbolic, level: int = 0) -> str:
    """EQUAL, or how the answer differs. Sets need the same members, ordered things the same brackets and parts in order."""
    if LAYOUT.sub("", gold) == LAYOUT.sub("", answer):
        return EQUAL
    if level > 8 or max(depth(gold), depth(answer)) > DEEPEST:
        return DEEP
    g, a = shape(gold), shape(answer)
    kinds = {g.kind, a.kind}
    if kinds == {"atom"}:
        if (g.parts[0], a.parts[0]) != (gold, answer):  # out of brackets
            return compare(g.parts[0], a.parts[0], symbolic, level + 1)
        return _compare_atoms(g.parts[0], a.parts[0], symbolic, level)
    if (named := _compare_named(gold, answer, symbolic, level)) is not None:
        return named
    if max(len(g.parts), len(a.parts)) > MOST_PARTS:
        return DIFFERENT
    if kinds == {"union"} or kinds <= {"set", "atom"}:
        return _compare_sets(g, a, symbolic, level)
    if len(kinds) == 1 and len(g.parts) == len(a.parts):
        pairs = zip(g.parts, a.parts, strict=True)
        return EQUAL if all(compare(x, y, symbolic, level + 1) == EQUAL for x, y in pairs) else DIFFERENT
    return _compare_intervals(gold, answer, symbolic, level)


def _compare_sets(g: Shape, a: Shape, symbolic: Symbolic, level: int) -> str:
    hits = [[compare(x, y, symbolic, level + 1) == EQUAL for y in a.parts] for x in g.parts]
    if all(map(any, hits)) and all(map(any, zip(*hits, strict=True))):
        return EQUAL
    return SEVERAL if len(a.parts) > len(g.parts) and any(map(any, hits)) else DIFFERENT


def _compare_named(gold: str, answer: str, symbolic: Symbolic, level: int) -> str | None:
    """`x = 5` and `x ∈ [1, 2]` against the thing alone, or against the same name; None where that does not decide."""
    named_gold, named_answer = (NAME.fullmatch(text) if len(split(text)) == 1 else None for text in (gold, answer))
    if named_gold and named_answer:
        same = named_gold[1].replace(" ", "") == named_answer[1].replace(" ", "")
        return compare(named_gold[2], named_answer[2], symbolic, level + 1) if same else None
    if named_answer and "=" not in gold:
        return compare(gold, named_answer[2], symbolic, level + 1)
    if named_gold and "=" not in answer and not re.fullmatch("[A-Za-z]{2,}", named_gold[2]):
        return compare(named_gold[2], answer, symbolic, level + 1)
    return None


def _compare_intervals(gold: str, answer: str, symbolic: Symbolic, level: int) -> str:
    """An inequality in one unknown says the same as an interval."""
    as_interval = [_interval(text) for text in (gold, answer)]
    if as_interval == [None, None]:
        return DIFFERENT
    return compare(as_interval[0] or gold, as_interval[1] or answer, symbolic, level + 1)


def _interval(text: str) -> str | None:
    """Inequalities in one unknown, written as an interval or, where one of several holds, as a union."""
    if len(pieces := split(text)) > 1:
        found = [_interval(piece) for piece in pieces]
        return None if None in found else r" \cup ".join(map(str, found))
    parts, signs = [p.strip() for p in RELATION.split(text)], [s.strip() for s in RELATION.findall(text)]
    variable = re.compile(r"\\?[a-zA-Z]+")
    if any(s in (">", ">=", r"\ge") for s in signs):
        parts, signs = parts[::-1], [s.replace(">", "<").replace("ge", "le") for s in signs[::-1]]
    if len(parts) == 2 and variable.fullmatch(parts[0]):
        parts, signs = [r"-\infty", *parts], ["<", *signs]
    elif len(parts) == 2 and variable.fullmatch(parts[1]):
        parts, signs = [*parts, r"\infty"], [*signs, "<"]
    if len(parts) != 3 or not variable.fullmatch(parts[1]) or any("<" not in s and "le" not in s for s in signs):
        return None
    return f"{'(' if signs[0] == '<' else '['}{parts[0]},{parts[2]}{')' if signs[1] == '<' else ']'}"


def _compare_atoms(gold: str, answer: str, symbolic: Symbolic, level: int) -> str:
    g, a = number(gold), number(answer)
    if g is not None and a is not None:
        return EQUAL if same_number(g, a) else DIFFERENT
    doubt = any(mark.search(answer) and not mark.search(gold) for mark in (DIGITS_APART, QUESTION))
    if doubt or hedges(gold) != hedges(answer):
        return DIFFERENT
    if (named := _compare_named(gold, answer, symbolic, level)) is not None:
        return named
    if g is not None and (unit := SYMBOL_UNIT.fullmatch(answer)) and number(unit[1]) is not None:
        return compare(gold, unit[1], symbolic, level + 1)
    if LINK.search(answer) and not LINK.search(gold) and not RELATION.search(answer):
        return _compare_chain(gold, answer, symbolic, level)
    if (based := same_in_bases(gold, answer)) is not None:
        return EQUAL if based else DIFFERENT
    (gold_body, gold_unit), (answer_body, answer_unit) = split_unit(gold), split_unit(answer)
    if number(gold_body) is None or number(answer_body) is None:  # letters may be symbols
        (gold_body, gold_unit), (answer_body, answer_unit) = split_unit(gold, False), split_unit(answer, False)
    if gold_unit in UNITS.values() and answer_unit in UNITS.values() and gold_unit != answer_unit:
        return DIFFERENT
    if len({unit_power(gold[len(gold_body) :]), unit_power(answer[len(answer_body) :])} - {None}) > 1:
        return DIFFERENT
    if (gold_body, answer_body) != (gold, answer):
        return compare(gold_body, answer_body, symbolic, level + 1)
    said, meant = word(answer), word(gold)
    if choice := re.fullmatch(r"\\text\{ ?\(([A-Z])\) ?\}|\(([A-Z])\)", gold):
        said = (CHOSEN.fullmatch(answer) or ["", ""])[1] or said
        meant = choice[1] or choice[2]
    if meant is not None and said is not None:
        return EQUAL if meant.casefold() == said.casefold() else DIFFERENT
    if (g is not None and said is not None) or (a is not None and meant is not None and len(meant) > 1):
        return DIFFERENT
    if set(PRIMED.findall(gold)) != set(PRIMED.findall(answer)):  # math-verify drops them
        return DIFFERENT
    if r"\ln" in gold and r"\ln" not in answer:
        answer = NATURAL.sub(r"\\ln", answer)
    return EQUAL if symbolic(_exact(gold), _exact(answer)) else DIFFERENT


def _compare_chain(gold: str, answer: str, symbolic: Symbolic, level: int) -> str:
    r"""`2 + 3 = 5`, `\pi/2 \approx 1.57`: what it ends in before any `\approx` is the answer, and no number in it may differ.

    The rounding after `\approx` counts too where a name or an expression with letters stands before it.
    """
    exact, *rounded = (part.strip() for part in APPROXIMATELY.split(answer))
    *sides, last = (side.strip() for side in exact.split("="))
    if len(sides) == 1 and SYMBOL.fullmatch(last):  # 5 = x
        sides, last = [], sides[0]
    if any(compare(gold, side, symbolic, level + 1) != EQUAL for side in sides if not LETTERS.search(side)):
        return DIFFERENT
    ends = [last, *(rounded[-1:] if LETTERS.search(last) or r"\sqrt" in last else [])]
    return EQUAL if any(compare(gold, end, symbolic, level + 1) == EQUAL for end in ends) else DIFFERENT


def _exact(text: str) -> str:
    """A number in e-notation as a fraction of integers; algebra would read 2e33 as 2 · e · 33."""
    found = number(text)
    if found is None or not found.scientific:
        return re.sub(r"\\binom ?(\d) ?(\d)", r"\\binom{\1}{\2}", text)
    return rf"\frac{{{found.value.numerator}}}{{{found.value.denominator}}}"


LAYOUT = re.compile(r"(?<![\d,]) +| +(?!\d)")  # blanks, but for those between digits; `1, 234` is a list, `1,234` a number
QUESTION = re.compile(r"\?")
DIGITS_APART = re.compile(r"\d \d(?!\d{2}(?!\d))")  # "5 6" is no number; "1 000" may be one
# The letter of a choice, perhaps with the text of the choice, but no other choice.
CHOSEN = re.compile(r"(?:\\text\{ ?)?\(?([A-Z])\)?[.:]?(?: ?\})?(?:[ :.](?!.*\b(?:and|or)\b).*)?")
APPROXIMATELY = re.compile(r"\\approx(?![a-zA-Z])")
LINK = re.compile(rf"=|{APPROXIMATELY.pattern}")
SYMBOL = re.compile(r"\\?[a-zA-Z]+(?: ?_ ?\w)?")
LETTERS = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]|\\(?!frac|cdot|times|sqrt|binom|deg)[a-zA-Z]")
PRIMED = re.compile(r"(?:[a-zA-Z)}]|_\w)'+")
NATURAL = re.compile(r"\\log(?![a-zA-Z]| ?_)")  # without a base, where the gold is a natural logarithm
