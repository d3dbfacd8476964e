r"""What stands beside a number or in place of one: units, words that hedge, bases, plain words."""

from __future__ import annotations

import re

from .grading_numbers import number

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
# Units that are no words, and the endings of 1st, 5^{th}; taken for such only where the gold is a bare number.
SYMBOL_UNIT = re.compile(
    rf"(.*[\d)}}]) *(?:\\(?:Omega|AA)|\\mu ?(?:{_SYMBOL})|\\[dt]?frac ?\{{ ?{_SYMBOL} ?\}} ?\{{ ?{_SYMBOL} ?\}}"
    r"|'{1,2}|(?:\^ ?)?(?:\{ ?)?(?:\\text\{ ?)?(?:st|nd|rd|th)[ }]*) *"
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
    if match and number(match[1]) is not None and match[3] not in NO_UNITS and not re.search(r"[/ ] ?\d", match[4]):
        word, blank = match[3], bool(match[2])
        if word in LETTER_UNITS and blank or _known_unit([word]) in UNITS and len(word) > 1 or blank and len(word) > 2:
            return match[1], _known_unit([word, *re.findall("[a-zA-Z]+", match[4])])
    return text, ""


def _known_unit(words: list[str]) -> str:
    words = [w for w in words if w.lower() not in ("square", "sq", "cubic", "cu", "per", "of", "the")]
    first = (words or [""])[0].lower()
    return UNITS.get(first, UNITS.get(first.removesuffix("s"), first))


def unit_power(unit: str) -> int | None:
    """The power of a unit as it was written, None where none was."""
    if found := re.search(r"\^ ?\{? ?(\d)", unit):
        return int(found[1])
    return next((power for word, power in (("sq", 2), ("cu", 3)) if re.search(rf"(?<![a-zA-Z]){word}", unit)), None)


def word(text: str) -> str | None:
    r"""Words as such, without `\text`, case or blanks; None for anything else."""
    if re.fullmatch(rf"(?:{TEXT} ?)+", text):
        text = re.sub(r"\\text\{((?:[^{}]|\{[^{}]*\})*)\}", r"\1", text).strip()
        text = CHOICE.sub(r"\1", text) if CHOICE.fullmatch(text) else text
    elif not WORDS.fullmatch(text):
        return None
    return re.sub(r"[\s.]+", "", text).casefold()


def hedges(text: str) -> frozenset[str]:
    """Words that change a number, or take back what they stand beside."""
    words = re.findall("[a-zA-Z]+", re.sub(r"\\(?!text)[a-zA-Z]+", " ", text).replace(r"\text", " "))
    return HEDGES.intersection(word.lower() for word in words)


def same_in_bases(gold: str, answer: str) -> bool | None:
    """Numerals with their base: the base may be left out by one of the two."""
    g, a = BASE.fullmatch(gold), BASE.fullmatch(answer)
    if not (g or a) or any(text[:1].isalpha() for text in (gold, answer)):
        return None
    numerals = [(m[1], BASES.get(m[2], m[2])) if m else (text, "") for m, text in ((g, gold), (a, answer))]
    (x, base), (y, other) = numerals
    return x.lstrip("0").upper() == y.lstrip("0").upper() and (base == other or not (base and other))
