r"""Brackets, and numbers in all the forms in which answers give them: their exact values, and when two are the same."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

LARGEST_EXPONENT = 5000
SCIENTIFIC_TOLERANCE = Fraction(1, 10**4)  # relative; Qwen2.5-Math's
DECIMAL_TOLERANCE = Fraction(1, 10**6)  # relative, of a rounded answer; math-verify's six decimals
ROUNDED_GOLD_TOLERANCE = Fraction(1, 10**7)  # relative, of an exact answer to a decimal gold: only a longer one is a rounding

# Brackets

SPLITTER = re.compile(
    r"\\text\{\s*,?\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])|\\(?:lor|vee|land|wedge)(?![a-zA-Z])|[,;]"
    r"|(?P<cup>\\cup(?![a-zA-Z]))|\\langle|\\rangle|\\[{}]|\\.|[()\[\]{}]",
    re.DOTALL,
)
OPENERS, CLOSERS = {"(", "[", "{", r"\{", r"\langle"}, {")", "]", "}", r"\}", r"\rangle"}


def tokens(text: str) -> Iterator[tuple[int, re.Match[str]]]:
    """(depth, token): brackets and separators with how many brackets are open around them."""
    depth = 0
    for match in SPLITTER.finditer(text):
        if match[0] in CLOSERS:
            depth -= 1
        yield depth, match
        if match[0] in OPENERS:
            depth += 1


def inside(text: str, left: str, right: str) -> str:
    """What stands between brackets that enclose the whole text, else ""."""
    if not (text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right)):
        return ""
    closes = next((m.end() for level, m in tokens(text) if level == 0 and m[0] in CLOSERS), 0)
    return text[len(left) : -len(right)].strip() if closes == len(text) else ""


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
    while (inner := inside(body, "(", ")") or inside(body, "{", "}")) and "," not in inner:
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
    elif gold.value.denominator > 1 and (gold.decimal or answer.decimal):
        tolerance = DECIMAL_TOLERANCE if answer.decimal else ROUNDED_GOLD_TOLERANCE
    return any(abs(value - gold.value) <= tolerance * abs(gold.value) for value in values)
