"""Verdicts on claims, each from an interval and from what the claim allows; and the line that holds a claim with its verdict."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

import numpy as np
from scipy.stats import norm

from ..evaluation.stats import Interval
from .gallery import SOURCES

AGREES, DISAGREES, UNDECIDED, NOT_MEASURED = "agrees", "disagrees", "cannot be told apart", "not measured"
VERDICTS = (AGREES, DISAGREES, UNDECIDED, NOT_MEASURED)
NOTHING = "–"
Z_95 = float(norm.ppf(0.975))
Row = tuple[str, str, str, str, str, str, str]  # a Line but for its part


@dataclass(frozen=True)
class Line:
    """One claim. published: what the paper prints; found: measured or computed here; sample: on how much, which interval."""

    part: str
    claim: str
    source: str
    published: str
    found: str
    sample: str
    verdict: str
    reason: str


def inside(x: Interval, low: float, high: float = inf) -> str:
    """The claim: the quantity lies in [low, high]. Undecided where its interval reaches across a bound."""
    if low <= x.low and x.high <= high:
        return AGREES
    return DISAGREES if x.high < low or x.low > high else UNDECIDED


def positive(x: Interval) -> str:
    """The claim: the quantity is above 0, such as a gain. A tie decides nothing."""
    return AGREES if x.low > 0 else DISAGREES if x.high < 0 else UNDECIDED


def equals(x: Interval, value: float, tolerance: float) -> str:
    """The claim: the quantity is `value`. Agrees only if the interval is narrow enough to see a deviation of `tolerance`."""
    if not x.low <= value <= x.high:
        return DISAGREES
    return AGREES if (x.high - x.low) / 2 <= tolerance else UNDECIDED


def differs(x: Interval, value: float) -> str:
    """The claim: the quantity is anything but `value`. No interval can refute that."""
    return UNDECIDED if x.low <= value <= x.high else AGREES


def every(verdicts: Iterable[str]) -> str:
    """The verdict on all of several claims at once."""
    found = set(verdicts)
    return DISAGREES if DISAGREES in found else AGREES if found == {AGREES} else UNDECIDED


def plus_minus(mean: float, half: float, n: int = 0, level: float = 0.95) -> Interval:
    """The interval of a normal estimate from its half width."""
    return Interval(mean, mean - half, mean + half, n, level, half / Z_95)


def shown(x: Interval, form: str = "+.3f") -> str:
    """The mean with its bounds, or that there are none."""
    mean, low, high = (f"{round(value, 6) + 0.0:{form}}" for value in (x.mean, x.low, x.high))  # + 0.0: no -0.000
    return f"{mean} [{low}, {high}]" if np.isfinite(x.low) else f"{mean} (no interval)"


def unmeasured(claim: str, source: str, published: str, name: str, reason: str = "") -> Row:
    """The row of a claim on which there are no numbers. name: of the source that would have them."""
    return claim, source, published, NOTHING, NOTHING, NOT_MEASURED, reason or f"made by: {SOURCES[name].made}"
