r"""When two normalised answers are the same one: lists, tuples, intervals and matrices by their parts, numbers by their value.

Text and exact arithmetic only. What needs algebra is handed to a function of the caller, `symbolic(gold, answer) -> bool`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple

from .grading_text import ROW

Symbolic = Callable[[str, str], bool]
EQUAL, DIFFERENT, SEVERAL, DEEP = "equal", "different", "several answers", "too deeply nested"
DEEPEST, MOST_PARTS, LARGEST_EXPONENT = 40, 60, 5000
SCIENTIFIC_TOLERANCE = Fraction(1, 10**4)  # relative; Qwen2.5-Math's
DECIMAL_TOLERANCE = Fraction(1, 10**6)  # relative; math-verify's six decimals

# Numbers


class Number(NamedTuple):
    """An exact value, and how it was written. A percentage has its value divided by 100."""

    value: Fraction
    scientific: bool = False
    decimal: bool = False
    percent: bool = False


DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+\.?\d*|\.\d+)"
EXPONENT = r"(?:\{ ?([+-]?\d{1,5}) ?\}|\( ?([+-]?\d{1,5}) ?\)|([+-]?\d{1,5}))"
PLAIN = re.compile(rf"({DIGITS})(?: ?[eE] ?([+-]?\d{{1,5}})| ?(?:\\times|\\cdot|\*|x) ?10 ?\^ ?{EXPONENT})?", re.ASCII)
REPEATING = re.compile(r"(\d*)\.(\d*) ?\\overline ?\{(\d+)\}", re.ASCII)
POWER = re.compile(rf"10 ?\^ ?{EXPONENT}", re.ASCII)
QUOTIENT = re.compile(r"(?:(\d+) ?)?\\frac ?\{([^{}]+)\} ?\{([^{}]+)\}|(?:(\d+) )?([^/{}\\ ]+) ?/ ?([^/{}\\ ]+)", re.ASCII)
PERCENT = re.compile(r" ?(?:%|\\text\{ ?(?:%|percent) ?\}|percent)$", re.IGNORECASE)


def number(text: str) -> Number | None:
    """The value of a number in any of its forms (contract rule 3), None for anything else."""
    percent = PERCENT.search(text)
    body, sign = (text[: percent.start()] if percent else text).strip(), 1
    while (inner := _inside(body, "(", ")") or _inside(body, "{", "}")) and "," not in inner:
        body = inner.strip()
    if body[:1] in ("+", "-"):
        sign, body = (-1 if body[0] == "-" else 1), body[1:].strip()
    found = _unsigned(body)
    if found is None:
        return None
    return found._replace(value=sign * found.value / (100 if percent else 1), percent=bool(percent))


def _unsigned(body: str) -> Number | None:
    if match := PLAIN.fullmatch(body):
        exponent = next((int(e) for e in match.groups()[1:] if e), None)
        if abs(exponent or 0) > LARGEST_EXPONENT:
            return None
        value = Fraction(match[1].replace(",", "").rstrip(".")) * Fraction(10) ** (exponent or 0)
        return Number(value, exponent is not None, "." in match[1])
    if match := POWER.fullmatch(body):
        exponent = next(int(e) for e in match.groups() if e)
        return Number(Fraction(10) ** exponent, True) if abs(exponent) <= LARGEST_EXPONENT else None
    if match := REPEATING.fullmatch(body):  # 0.1\overline{6}: 1/10 and 6/9 of it
        start, period = match[1] + match[2], match[3]
        return Number((int(start or 0) + Fraction(int(period), 10 ** len(period) - 1)) / 10 ** len(match[2]))
    if match := QUOTIENT.fullmatch(body):
        return _quotient(match[1] or match[4], match[2] or match[5], match[3] or match[6])
    return None


def _quotient(whole: str | None, over: str, under: str) -> Number | None:
    if any(r"\frac" in part or "/" in part or "%" in part for part in (over, under)):
        return None
    a, b = number(over), number(under)
    if a is None or b is None or not b.value or (whole and (a.value < 0 or b.value < 0)):
        return None
    return Number(int(whole or 0) + a.value / b.value, a.scientific or b.scientific, False)


def same_number(gold: Number, answer: Number) -> bool:
    """Equal values; within a relative tolerance where the gold is not an integer and one of the two is rounded."""
    values = [answer.value]
    if answer.percent and not gold.percent:
        values.append(answer.value * 100)  # 50% where the gold leaves the sign out
    elif gold.percent and not answer.percent:
        values.append(answer.value / 100)
    tolerance = Fraction(0)
    if gold.scientific or (answer.scientific and gold.value.denominator > 1):
        tolerance = SCIENTIFIC_TOLERANCE
    elif (gold.decimal or answer.decimal) and gold.value.denominator > 1:
        tolerance = DECIMAL_TOLERANCE
    return any(abs(value - gold.value) <= tolerance * abs(gold.value) for value in values)


# Units, bases and words

TEXT = r"\\text\{(?:[^{}]|\{[^{}]*\})*\}"
UNIT_TAIL = re.compile(rf"(.*?[^\s(\[{{,=+*/^-])\s*((?:{TEXT}|\\deg)(?:{TEXT}|\\deg|\\cdot|\^ ?\{{?-?\d\}}?|[/ CF])*)")
UNIT_WORDS = re.compile(r"(.*[\d})%])( ?)([a-zA-Z]+)\.?((?:[ /^*.{}()-]|[a-zA-Z]|\d)*)")
NO_UNITS = frozenset("pi sqrt sin cos tan cot sec log ln exp mod oo inf million billion trillion thousand hundred dozen".split())
# Beside a number these change it or take it back; they are no units.
HEDGES = frozenset(
    "million millions billion billions trillion thousand thousands hundred hundreds dozen half halves third thirds fourth "
    "fourths fifths sixths eighths tenth tenths hundredths thousandths billionths plus minus times squared cubed factorial "
    "versus vs or else not maybe perhaps possibly probably either wrong but could might actually instead more less is "
    "two three four five six seven eight nine ten".split()
)
_SYMBOL = r"(?:m|s|h|g|kg|cm|mm|km|N|J|K|W|V|A|C|mol|Hz|Pa|eV)(?: ?\^ ?\{? ?\d ?\}?)?"
# Units that are no words; taken for such only where the gold is a bare number.
SYMBOL_UNIT = re.compile(
    rf"(.*[\d)}}]) *(?:\\(?:Omega|AA)|\\mu ?(?:{_SYMBOL})|\\[dt]?frac ?\{{ ?{_SYMBOL} ?\}} ?\{{ ?{_SYMBOL} ?\}}) *"
)
LETTER_UNITS = frozenset("m s g h K N J W V A C F L l T Hz Pa eV".split())
UNIT_NAMES = (
    "m meter metre|cm centimeter centimetre|mm millimeter millimetre|km kilometer kilometre|in inch inche|ft foot feet|yd yard|"
    "mi mile|s sec second|min minute|h hr hour|day|week|month|yr year|g gram|kg kilogram|mg milligram|lb pound|oz ounce|cent|"
    "dollar|degree deg|rad radian|l liter litre|ml milliliter millilitre"
)
UNITS = {name: row.split()[0] for row in UNIT_NAMES.split("|") for name in row.split()}
BASE = re.compile(r"([0-9A-Za-z]+) ?_ ?\{? ?(?:\\text\{ ?)?(\d{1,2}|two|three|five|six|eight|ten)(?: ?\})? ?\}?")
BASES = {"two": "2", "three": "3", "five": "5", "six": "6", "eight": "8", "ten": "10"}
WORDS = re.compile(r"[a-zA-Z][a-zA-Z' -]+")
CHOICE = re.compile(r"\(([A-Za-z])\)")


def split_unit(text: str, plain: bool = True) -> tuple[str, str]:
    r"""(quantity, its unit as known in UNITS, or as written, or ""); `plain` units are words without `\text` after a number."""
    if match := UNIT_TAIL.fullmatch(text):
        words = re.findall("[a-zA-Z]+", match[2].replace(r"\text", " ").replace(r"\deg", "degree "))
        return match[1], _known_unit(words)
    match = UNIT_WORDS.fullmatch(text) if plain else None
    if match and number(match[1]) is not None and match[3] not in NO_UNITS:
        word, blank = match[3], bool(match[2])
        if word in LETTER_UNITS and blank or _known_unit([word]) in UNITS and len(word) > 1 or blank and len(word) > 2:
            return match[1], _known_unit([word, *re.findall("[a-zA-Z]+", match[4])])
    return text, ""


def _known_unit(words: list[str]) -> str:
    words = [w for w in words if w.lower() not in ("square", "sq", "cubic", "cu", "per", "of", "the")]
    first = (words or [""])[0].lower()
    return UNITS.get(first, UNITS.get(first.removesuffix("s"), first))


def _word(text: str) -> str | None:
    r"""Words as such, without `\text`, case or blanks; None for anything else."""
    if re.fullmatch(rf"(?:{TEXT} ?)+", text):
        text = re.sub(r"\\text\{((?:[^{}]|\{[^{}]*\})*)\}", r"\1", text).strip()
        text = CHOICE.sub(r"\1", text) if CHOICE.fullmatch(text) else text
    elif not WORDS.fullmatch(text):
        return None
    return re.sub(r"[\s.]+", "", text).casefold()


# Structure


class Shape(NamedTuple):
    """kind: atom, set (also a list), union, or an ordered thing named by its brackets; parts: what it is made of."""

    kind: str
    parts: list[str]


SPLITTER = re.compile(
    r"\\text\{\s*,?\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])|\\(?:lor|vee|land|wedge)(?![a-zA-Z])|[,;]"
    r"|(?P<cup>\\cup(?![a-zA-Z]))|\\langle|\\rangle|\\[{}]|\\.|[()\[\]{}]",
    re.DOTALL,
)
OPENERS, CLOSERS = {"(", "[", "{", r"\{", r"\langle"}, {")", "]", "}", r"\}", r"\rangle"}
MATRIX = re.compile(r"\\begin ?\{([pbBvV]?matrix|smallmatrix|array)\} ?(?:\{[lcr| ]*\})?(.*)\\end ?\{\1\}", re.DOTALL)
NAME = re.compile(
    r"(\\?[a-zA-Z]+(?: ?_ ?(?:\{[^{}]*\}|\w))?'*(?: ?\([a-zA-Z, ]{1,9}\))?|\([a-zA-Z](?: ?, ?[a-zA-Z])*\))"
    r" ?(?:=|\\in(?![a-zA-Z])) ?(.+)"
)
RELATION = re.compile(r"<=|>=|<|>|\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])")


def _tokens(text: str) -> Iterator[tuple[int, re.Match[str]]]:
    """(depth, token): brackets and separators with how many brackets are open around them."""
    depth = 0
    for match in SPLITTER.finditer(text):
        if match[0] in CLOSERS:
            depth -= 1
        yield depth, match
        if match[0] in OPENERS:
            depth += 1


def depth(text: str) -> int:
    """Largest number of brackets open at once."""
    return max((d for d, _ in _tokens(text)), default=0)


def split(text: str, cup: bool = False) -> list[str]:
    r"""The parts of a list, separated by commas, semicolons, and, or (or by `\cup`); [text] for a single one."""
    pieces, start = [], 0
    for level, match in _tokens(text):
        if level == 0 and bool(match["cup"]) == cup and match[0] not in OPENERS | CLOSERS and not re.fullmatch(r"\\.", match[0]):
            pieces.append(text[start : match.start()])
            start = match.end()
    return [piece.strip() for piece in (*pieces, text[start:]) if piece.strip()]


def _inside(text: str, left: str, right: str) -> str:
    """What stands between brackets that enclose the whole text, else ""."""
    if not (text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right)):
        return ""
    closes = next((m.end() for level, m in _tokens(text) if level == 0 and m[0] in CLOSERS), 0)
    return text[len(left) : -len(right)].strip() if closes == len(text) else ""


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
    if (inner := _inside(text, r"\{", r"\}")) and not re.search(r"\\mid|\||:", inner):
        return Shape("set", _branches(split(inner)))
    if inner := _inside(text, "{", "}"):
        return shape(inner)
    for left in ("(", "[", r"\langle"):
        for right in (")", "]", r"\rangle"):
            if inner := _inside(text, left, right):
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
    if _hedges(gold) != _hedges(answer) or (DIGITS_APART.search(answer) and not DIGITS_APART.search(gold)):
        return DIFFERENT
    if (named := _compare_named(gold, answer, symbolic, level)) is not None:
        return named
    if g is not None and (unit := SYMBOL_UNIT.fullmatch(answer)) and number(unit[1]) is not None:
        return compare(gold, unit[1], symbolic, level + 1)
    if "=" in answer and "=" not in gold and not RELATION.search(answer):
        return compare(gold, answer.rpartition("=")[2].strip(), symbolic, level + 1)
    if (based := _compare_bases(gold, answer)) is not None:
        return based
    (gold_body, gold_unit), (answer_body, answer_unit) = split_unit(gold), split_unit(answer)
    if number(gold_body) is None or number(answer_body) is None:  # letters may be symbols
        (gold_body, gold_unit), (answer_body, answer_unit) = split_unit(gold, False), split_unit(answer, False)
    if gold_unit in UNITS.values() and answer_unit in UNITS.values() and gold_unit != answer_unit:
        return DIFFERENT
    if (gold_body, answer_body) != (gold, answer):
        return compare(gold_body, answer_body, symbolic, level + 1)
    said, meant = _word(answer), _word(gold)
    if choice := re.fullmatch(r"\\text\{ ?\(([A-Z])\) ?\}|\(([A-Z])\)", gold):
        said = (re.match(r"(?:\\text\{ ?)?\(?([A-Z])(?![a-zA-Z])", answer) or ["", ""])[1] or said
        meant = choice[1] or choice[2]
    if meant is not None and said is not None:
        return EQUAL if meant.casefold() == said.casefold() else DIFFERENT
    if (g is not None and said is not None) or (a is not None and meant is not None and len(meant) > 1):
        return DIFFERENT
    return EQUAL if symbolic(_exact(gold), _exact(answer)) else DIFFERENT


def _exact(text: str) -> str:
    """A number in e-notation as a fraction of integers; algebra would read 2e33 as 2 · e · 33."""
    found = number(text)
    if found is None or not found.scientific:
        return re.sub(r"\\binom ?(\d) ?(\d)", r"\\binom{\1}{\2}", text)
    return rf"\frac{{{found.value.numerator}}}{{{found.value.denominator}}}"


LAYOUT = re.compile(r"(?<!\d) +| +(?!\d)")  # blanks, but for those between digits
DIGITS_APART = re.compile(r"\d \d(?!\d{2}(?!\d))")  # "5 6" is no number; "1 000" may be one


def _hedges(text: str) -> frozenset[str]:
    """Words beside a digit that change the number or take it back."""
    if not re.search(r"\d", text):
        return frozenset()
    words = re.findall("[a-zA-Z]+", re.sub(r"\\(?!text)[a-zA-Z]+", " ", text).replace(r"\text", " "))
    return HEDGES.intersection(word.lower() for word in words)


def _compare_bases(gold: str, answer: str) -> str | None:
    """Numerals with their base: the base may be left out by one of the two."""
    g, a = BASE.fullmatch(gold), BASE.fullmatch(answer)
    if not (g or a) or any(text[:1].isalpha() for text in (gold, answer)):
        return None
    numerals = [(m[1], BASES.get(m[2], m[2])) if m else (text, "") for m, text in ((g, gold), (a, answer))]
    (x, base), (y, other) = numerals
    return EQUAL if x.lstrip("0").upper() == y.lstrip("0").upper() and (base == other or not (base and other)) else DIFFERENT
