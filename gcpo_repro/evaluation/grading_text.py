r"""Which part of a response is its answer, and that answer in one plain spelling. Text only: nothing here computes.

The rules are those of the grading contract: only what follows the last `</think>` counts; the last complete `\boxed{…}` is the
answer; without a box, an explicit statement is. The time is linear in the length of the response.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from typing import NamedTuple

BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")
BRACE = re.compile(r"\s*\{")
TOKEN = re.compile(r"[ \t]*([^\s{}$\\]+)")
STATEMENT = re.compile(
    r"####|\banswers?\b[*_ ]{0,4}(?:(?: to [^\n.:]{1,80}?)? (?:is|are|equals|should be)\b"
    r"(?: thus| therefore| simply)?[*_ ]{0,4}:?|:|=)",
    re.IGNORECASE,
)
LEAD = re.compile(
    rf"\s*(?:\\(?:text|mbox|textbf|mathrm|mathbf)\s*(?P<opened>\{{))?\s*(?:[a-zA-Z]+,?\s+){{0,4}}(?:{STATEMENT.pattern})",
    re.IGNORECASE,
)
TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
REVISED = re.compile(r"(?:^|[.!?;,]\s*)(?:actually|correction|or rather|or|wait)\b[^.\n]*\d", re.IGNORECASE)
# What may follow an answer in its sentence without being part of it.
AFTERTHOUGHT = re.compile(r",?\s\b(?:because|since|as required|I hope)\b|(?<!\\)[.!?](?:\s|$)")
FORMULA = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
DISPLAY = re.compile(rf"\s*(?:{FORMULA.pattern})", re.DOTALL)
COMMAND = re.compile(r"\\(?:text|mbox|mathrm|textbf)\s*\{[^{}]*\}|\\[a-zA-Z]+")
WORD = re.compile(r"(?<![a-zA-Z])[a-zA-Z]{3,}(?![a-zA-Z])")
LONGEST = 2000  # characters of an answer that is compared at all
LONGEST_TEXT = 20_000_000  # characters at the end of a response in which its answer is looked for


class Extracted(NamedTuple):
    """The answer as it was written, or None and the reason why there is none."""

    answer: str | None
    reason: str = ""


def extract(response: str) -> Extracted:
    """The final answer that a response gives (contract rules 1 and 2)."""
    if not response.strip():
        return Extracted(None, "empty response")
    text = response.rpartition("</think>")[2]
    if "<think>" in text:
        return Extracted(None, "unfinished thought")
    text = text[-LONGEST_TEXT:]
    boxes = _boxes(text)
    if boxes is None:
        answer = _stated_answer(text) or _bare_answer(text)
        return Extracted(answer) if answer.strip(" .:*$") else Extracted(None, "no answer")
    if not boxes:
        return Extracted(None, "unterminated box")
    answer = _boxed_answer(text, boxes)
    return Extracted(answer) if answer else Extracted(None, "empty box")


def _boxes(text: str) -> list[tuple[int, str]] | None:
    r"""The innermost complete boxes as (start, content), in order; None where none was even begun."""
    begun = list(BOX.finditer(text))
    if not begun:
        return None
    found: list[tuple[int, str]] = []
    starts = {}  # place of a box's brace -> start of its command
    for box in begun:
        if brace := BRACE.match(text, box.end()):
            starts[brace.end() - 1] = box.start()
        elif token := TOKEN.match(text, box.end()):  # \boxed 5
            found.append((box.start(), token[1]))
    opened: list[tuple[int, int]] = []  # place of an open brace; boxes that were complete before it
    for sign in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if sign[0] == "{":
            opened.append((sign.start(), len(found)))
        elif sign[0] == "}" and opened:
            place, before = opened.pop()
            if place in starts and len(found) == before:
                found.append((starts[place], text[place + 1 : sign.start()].strip()))
    return sorted(found)


def _boxed_answer(text: str, boxes: list[tuple[int, str]]) -> str:
    """The last box, together with the earlier ones on its line: they are one list of answers."""
    start, last = boxes[-1]
    line = text.rfind("\n", 0, start)
    beside = dict.fromkeys(content for begin, content in boxes if begin > line and content and not BOX.search(content))
    return " , ".join(map(_without_lead, beside)) if last else ""


def _without_lead(answer: str) -> str:
    r"""`\text{The answer is } 5` and `\text{The answer is 5}` say 5."""
    lead = LEAD.match(answer)
    if not lead:
        return answer
    said = answer[lead.end() :].lstrip(" \t*_")
    depth = 1 if lead["opened"] else 0
    for brace in re.finditer(r"(?<!\\)[{}]", said) if depth else ():
        depth += 1 if brace[0] == "{" else -1
        if not depth:  # that of \text
            return (said[: brace.start()] + said[brace.end() :]).strip()
    return said.strip()


def _stated_answer(text: str) -> str:
    """What the last explicit statement says, "" where there is none: a tag, `####`, "the answer is", "Answer:"."""
    tag = next(iter(deque(TAG.finditer(text), maxlen=1)), None)
    last = next(iter(deque(STATEMENT.finditer(text, tag.start() if tag else 0), maxlen=1)), None)
    if tag and (last is None or last.start() < tag.end()):
        return _stated_answer(tag[1]) or tag[1].strip()
    if last is None:
        return ""
    said = text[last.end() : last.end() + LONGEST].lstrip(" \t*_}")
    if (formula := DISPLAY.match(said)) and "\n" in formula[0]:
        return formula[0].strip()  # a displayed formula on its own lines
    said = said.lstrip().partition("\n")[0]
    if last[0] != "####" and (tail := AFTERTHOUGHT.search(said)) and not REVISED.search(said[tail.start() :]):
        said = said[: tail.start()]
    return said.strip().strip("*_ ")


def _bare_answer(text: str) -> str:
    """A response that is nothing but one answer: a single line, no prose."""
    line = text.strip()
    prose = "\n" in line or len(line) > LONGEST or len(WORD.findall(COMMAND.sub(" ", line))) > 2
    return "" if prose else line


def read_gold(gold: str) -> str:
    """The answer in a gold column: boxed, after `####`, the formula of a sentence, or all of it."""
    boxes = _boxes(gold)
    if boxes:
        return _boxed_answer(gold, boxes)
    gold = gold.rpartition("####")[2]
    formulas = FORMULA.findall(gold)
    if formulas and re.search("[a-zA-Z]{2}", COMMAND.sub(" ", FORMULA.sub(" ", gold))):  # prose around it
        return next(part for part in formulas[-1] if part)
    return gold


# One spelling

ROW = "\x01"  # stands for \\, the end of a row, which no other rule may take for \ and a blank
DELETED = dict.fromkeys(
    [*range(9), 0xB, 0xC, *range(0xE, 0x20), 0xAD, 0x61C, *range(0x200B, 0x2010), *range(0x202A, 0x202F),
     *range(0x2060, 0x2070), 0xFEFF]
)  # fmt: skip
SPELLED = {
    **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014\ufe63\uff0d", "-"), **dict.fromkeys("°º˚", r"^\circ "),
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/", "∕": "/", "⁄": "/", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ",
    "∓": r"\mp ", "∅": r"\emptyset ", "′": "'", "’": "'", "\u2009": r"\,", "\u202f": r"\,", "€": r"\$", "£": r"\$",
}  # fmt: skip
GREEK = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau phi chi psi omega".split()
SPELLED |= {unicodedata.lookup(f"GREEK SMALL LETTER {name.replace('lambda', 'lamda')}"): f"\\{name} " for name in GREEK}
SCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+|[₀₁₂₃₄₅₆₇₈₉]+")
VULGAR = re.compile("[¼½¾⅐-⅞]")
SEPARATOR = re.compile(r"(?<=\d)\s*(?:,\s*(?:\\[!,;:]\s*)+|\{\s*,\s*\}|(?:\\[!,;:]\s*)+)\s*(?=\d{3}(?!\d))")
END = "(?![a-zA-Z])"
REPLACED = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (rf"\\(?:left|right|middle|[bB]igg?[lrm]?){END}\s*\.?", ""),
        (rf"\\(?:displaystyle|textstyle|limits|nolimits|boldmath){END}", " "),
        (rf"\\(?:mathrm|mathbf|mathit|mathsf|textbf|textit|textrm|textnormal|mbox|boldsymbol|bm|emph){END}", r"\\text"),
        (rf"\\(?:bf|rm|it|sf|tt|underline){END}|\\(?:text)?color ?\{{[^{{}}]*\}}", " "),
        (r"\\text\s+(?=\{)", r"\\text"), (r"\\text\{ ?([ie]) ?\}", r"\1"),  # the numbers i and e in upright type
        (rf"\\[dtc]frac{END}", r"\\frac"),
        (rf"\\leq(?:slant)?{END}", r"\\le "), (rf"\\geq(?:slant)?{END}", r"\\ge "), (rf"\\neq{END}", r"\\ne "),
        (rf"\\bigcup{END}", r"\\cup "), (rf"\\varnothing{END}|\\\{{\s*\\\}}", r"\\emptyset "),
        (r"\\log\s*_\s*(?:e|\{e\})", r"\\ln "), (rf"\\prime{END}\s*", "'"),
        (r"\^\s*(?:\{\s*('+)\s*\}|('+))", r"\1\2"),
        (r"^\s*(?:\\(?:approx|therefore|implies|Rightarrow)(?![a-zA-Z])|=)", " "), (r"_\s*\{\s*(\w)\s*\}", r"_\1"),
        (rf"\\lt{END}", "<"), (rf"\\gt{END}", ">"),
        (rf"\\lbrace{END}", r"\\{"), (rf"\\rbrace{END}", r"\\}"), (rf"\\lbrack{END}", "["), (rf"\\rbrack{END}", "]"),
        (r"\\[()\[\]]", ""),
        (rf"\^\s*(?:\{{\s*\\(?:circ|degree){END}\s*\}}|\\(?:circ|degree){END})|\\degree{END}|\\textdegree{END}", r"\\deg "),
        (r"\\%", "%"), (r"\\\$|\$", ""),
        (rf"\\[,;:! ]|~|\\q?quad{END}", " "),
        (r"\\text\{\s*\}", " "), (r"\\text\{([^{}a-zA-Z]*\d[^{}a-zA-Z]*)\}|^\s*\\text\{([^{}]*\d[^{}]*)\}\s*$", r"\1\2"),
        (r"^\s*(?:\\text\{ ?(?:approximately|about|roughly) ?\}|(?:approximately|about|roughly)(?![a-zA-Z]))", " "),
        (r"(?<![a-zA-Z\\])(?:np|numpy|math|sympy)\.(?=[a-z])", ""),
        (r"(?<![a-zA-Z\\])(arcsin|arccos|arctan|sin|cos|tan|log|ln|exp)(?=[\s({\\])", r"\\\1 "),
        (rf"(?<![a-zA-Z\\])pi{END}", r"\\pi "), (rf"(?<![a-zA-Z\\])(?:infinity|inf|oo){END}", r"\\infty "),
        (r"√|(?<![a-zA-Z\\])sqrt(?=\s*[({\d])", r"\\sqrt√"),  # the sign and the word, unlike \sqrt, take whole numbers
        (r"\\sqrt√?\s*\(([^()]*)\)", r"\\sqrt{\1}"), (r"\\sqrt√\s*(\d+|[a-z])", r"\\sqrt{\1}"), ("√", ""),
        (r"\*\*(?=[\d({-])", "^"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"), (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"), (r"\\frac\s+\{", r"\\frac{"),
        (rf"\\sqrt\s*(\d|[a-z]{END})", r"\\sqrt{\1}"), (r"\\sqrt\s+\{", r"\\sqrt{"),
    )
]  # fmt: skip


def normalise(answer: str) -> str:
    r"""One spelling of an answer: ASCII LaTeX without layout, thousands separators, maths delimiters or a closing stop.

    Text is wrapped in `\text{…}`, degrees are `\deg`, the end of a matrix row is `ROW`.
    """
    text = answer.translate(DELETED)
    if not text.isascii():
        text = SCRIPTS.sub(_script, VULGAR.sub(_vulgar_fraction, text))
        text = "".join(SPELLED.get(c, c) for c in text)
        text = "".join(SPELLED.get(c, c) for c in unicodedata.normalize("NFKC", text))
    if r"\\" in text:
        text = re.sub(r"\\\\(?:\s*\[[^\]]*\])?", ROW, text) if r"\begin" in text else re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)
    while (joined := SEPARATOR.sub("", text)) != text:
        text = joined
    for pattern, replacement in REPLACED:
        text = pattern.sub(replacement, text)
    text = re.sub(r"\s+", " ", text).strip()
    while text:
        if text[-1] in ".,;:\\":
            text = text[:-1].strip()
        elif len(text) > 4 and text[:2] == text[-2:] == "**":
            text = text[2:-2].strip()
        elif len(text) > 2 and text[0] == text[-1] in '`"':
            text = text[1:-1].strip()
        else:
            break
    return text


def _script(match: re.Match[str]) -> str:
    plain = unicodedata.normalize("NFKC", match[0]).replace("\u2212", "-")
    return ("_" if match[0][0] in "₀₁₂₃₄₅₆₇₈₉" else "^") + "{" + plain + "}"


def _vulgar_fraction(match: re.Match[str]) -> str:
    over, under = unicodedata.normalize("NFKC", match[0]).split("\u2044")
    return rf"\frac{{{over}}}{{{under}}}"
