r"""Training problems that stand in a benchmark: the same text in another spelling, or nearly the same.

Spelling: case, spaces, punctuation, layout commands of LaTeX, drawings and variants such as \dfrac do not count. Nearly the
same: of the shingles (runs of `SHINGLE` words, numbers and signs) of the shorter text at least `NEAR` are in the other one too.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

SHINGLE = 5
NEAR = 0.65  # between any two problems of GSM8K, MATH500, AIME and AMC: at most .58
FEWEST = 12  # shingles of a text that is compared at all: a short one ("What is the value of x?") says too little
DRAWING = re.compile(r"\[asy\].*?\[/asy\]|\\begin\{asy\}.*?\\end\{asy\}|!\[[^\]]*\]\([^)]*\)|https?://\S+", re.DOTALL)
LAYOUT = re.compile(
    r"\\(?:left|right|middle|bigg?[lrm]?|displaystyle|textstyle|limits|q?quad|text|mathrm|mathbf|mathit|mathsf|textbf|textit|"
    r"textrm|emph|mbox|hbox|operatorname|boldsymbol|underline|overline|begin|end|item|centering|newline|noindent)(?![a-z])"
)
SPELLED = {
    "−": "-", "–": "-", "—": " ", "×": "*", "·": "*", "⋅": "*", "÷": "/", "≤": "<=", "≥": ">=", "≠": " ne ", "π": " pi ",
    "°": " deg ", "√": " sqrt ", "\\times": "*", "\\cdot": "*", "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\leq": "<=",
    "\\geq": ">=", "\\le": "<=", "\\ge": ">=", "\\neq": " ne ", "\\circ": " deg ", "\\degree": " deg ",
    "\\ldots": " ", "\\dots": " ", "\\cdots": " ", "\\lvert": "|", "\\rvert": "|", "\\%": "%",
}  # fmt: skip
SPELLING = re.compile(
    "|".join(re.escape(key) + ("(?![a-z])" if key[-1].isalpha() else "") for key in sorted(SPELLED, key=len, reverse=True))
)
TOKEN = re.compile(r"[^\W\d_]+|\d+|[-+*/=<>^!%|]")


class Found(NamedTuple):
    """The benchmark's problem, and the share of shingles in common: 1 for the same text."""

    benchmark: str
    id: str
    share: float


def tokens(problem: str) -> list[str]:
    """Words, numbers and signs of a problem in one spelling."""
    text = DRAWING.sub(" ", unicodedata.normalize("NFKC", problem).lower())
    text = SPELLING.sub(lambda match: SPELLED[match[0]], LAYOUT.sub(" ", text))
    return TOKEN.findall(text)


class Index:
    """The problems of benchmarks, to be asked for a text.

    Args:
        problems: (benchmark, id, text) each.
        near: share of shingles from which two problems are nearly the same.
    """

    def __init__(self, problems: Iterable[tuple[str, str, str]], near: float = NEAR) -> None:
        self.near = near
        self.names: list[tuple[str, str]] = []
        self.sizes: list[int] = []
        self.same: dict[str, int] = {}
        self.places: dict[tuple[str, ...], list[int]] = {}
        for number, (benchmark, key, text) in enumerate(problems):
            words = tokens(text)
            self.names.append((benchmark, key))
            self.same.setdefault("".join(words), number)
            found = _shingles(words)
            self.sizes.append(len(found))
            for shingle in found:
                self.places.setdefault(shingle, []).append(number)

    def find(self, text: str) -> Found | None:
        """The problem that `text` is or nearly is, None if it is none of them."""
        words = tokens(text)
        if (number := self.same.get("".join(words))) is not None:
            return Found(*self.names[number], 1.0)
        mine = _shingles(words)
        hits = Counter(number for shingle in mine for number in self.places.get(shingle, ()))
        shares = {
            number: hit / min(len(mine), self.sizes[number])
            for number, hit in hits.items()
            if min(len(mine), self.sizes[number]) >= FEWEST
        }
        best = max(shares, key=lambda number: (shares[number], -number), default=None)
        if best is None or shares[best] < self.near:
            return None
        return Found(*self.names[best], shares[best])


def _shingles(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[k : k + SHINGLE]) for k in range(len(words) - SHINGLE + 1)}


def benchmark_index(names: Sequence[str], data: str | Path | None = None) -> Index:
    """The mathematical benchmarks of these names ("all": each of them) as an index.

    Args:
        names: as in `evaluation.benchmarks.find`. data: where they lie, see `evaluation.benchmarks.load_with_source`.

    Raises:
        UserError: an unknown benchmark, or one that cannot be loaded.
    """
    from .evaluation import benchmarks

    if "all" in names:
        names = [name for name, benchmark in benchmarks.REGISTRY.items() if benchmark.kind == "math"]
    chosen = list(dict.fromkeys(benchmarks.find(name).name for name in names))
    return Index((name, row["id"], row["problem"]) for name in chosen for row in benchmarks.load(name, data))


def refuser(index: Index) -> Callable[[str], str]:
    """For `data.load_with_source`: why a question must not be trained on, "" if it may."""

    def refuse(question: str) -> str:
        found = index.find(question)
        if found is None:
            return ""
        return f"{'the same as' if found.share == 1 else 'nearly the same as'} a problem of {found.benchmark}"

    return refuse
