r"""The algebra of grading, by math-verify, and the process that does it: `serve` runs in a child that can be killed.

Nothing in a model's text is executed. It reaches only math-verify's LaTeX grammar, which builds an expression from tokens, but
hands the text of each number to sympy's `parse_expr`, and that evaluates Python: in the child, a reader of number literals takes
its place. That nothing else slips through is enforced: an audit hook refuses to execute code compiled from a string, to start
processes, to open sockets and to write files.
"""

from __future__ import annotations

import json
import logging
import math
import re
import resource
import signal
import sys
from dataclasses import replace
from functools import lru_cache
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, parse, verify

from .grading import given, judge
from .grading_compare import DECIMAL_TOLERANCE
from .grading_text import ROW

REFUSED = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.", "os.remove", "shutil.")
GENERATORS = ("sympy.polys.monomials", "collections", "dataclasses")  # these write code from counts and from their own names
LITERAL = re.compile(r"\d{1,1000}(?:\.\d{0,1000})?(?:[eE][+-]?\d{1,4})?|\.\d{1,1000}", re.ASCII)
ZERO = 1e-25  # of numbers computed to 30 digits


@lru_cache(maxsize=4096)
def _parse(latex: str) -> Any:
    ours = replace(LatexExtractionConfig().normalization_config, units=False, boxed="none")  # both are done already
    config = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=ours)
    found = parse(f"${latex}$", [config], fallback_mode="no_fallback", parsing_timeout=None)
    if not found or not isinstance(found[0], sympy.Basic | sympy.MatrixBase):
        return None
    expression = found[0]
    imaginary = [s for s in getattr(expression, "free_symbols", ()) if str(s) == "i"]
    return expression.subs(dict.fromkeys(imaginary, sympy.I)) if imaginary else expression


def algebraically_equal(gold: str, answer: str) -> bool:
    """Whether two normalised answers are equal as expressions, numbers, equations or inequalities. May take forever."""
    a, b = (_parse(text.replace(ROW, r" \\ ").replace(r"\deg", "")) for text in (gold, answer))
    if a is None or b is None:
        return False
    if isinstance(a, sympy.Rel) or isinstance(b, sympy.Rel):
        return type(a) is type(b) and _same_equation(a, b) if "=" in gold else bool(verify(a, b, timeout_seconds=None))
    if getattr(a, "is_number", False) and getattr(b, "is_number", False):
        return _same_value(a, b, DECIMAL_TOLERANCE if "." in gold + answer else 0)
    if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr) and not (a.is_Symbol or b.is_Symbol) and _apart(a - b, a):
        return False
    return bool(verify(a, b, timeout_seconds=None))


def _apart(difference: Any, scale: Any) -> bool:
    """Whether the difference of two expressions is not 0 where their symbols are fixed numbers in (1, 2): far cheaper than to
    simplify what cannot be. False too where that cannot be computed.
    """
    symbols = sorted(difference.free_symbols | scale.free_symbols, key=str)
    point = {s: sympy.Float(1 + (0.6180339887498949 * (k + 1)) % 1) for k, s in enumerate(symbols)}
    try:
        d, size = (complex(e.subs(point).evalf(20)) for e in (difference, scale))
    except (TypeError, ValueError, ArithmeticError):
        return False
    return math.isfinite(abs(d)) and abs(d) > 1e-9 * (1e-6 + abs(size))


def _same_value(a: Any, b: Any, tolerance: Any) -> bool:
    """Numbers by their digits, relative to the gold: math-verify's six decimals would make all small numbers equal."""
    a, b = a.doit().evalf(30), b.doit().evalf(30)
    difference, size = abs(complex(a - b)), abs(complex(a))
    return math.isfinite(size) and difference <= max(float(tolerance), ZERO) * size if a != b else True


def _same_equation(a: Any, b: Any) -> bool:
    """left − right agree up to a constant factor. (Solving both would call two equations without solutions equal.)"""
    over, under = a.lhs - a.rhs, b.lhs - b.rhs
    symbols = sorted(over.free_symbols | under.free_symbols, key=str)
    if symbols and _apart(over.diff(symbols[0]) * under - over * under.diff(symbols[0]), over * under):
        return False
    over, under = sympy.simplify(over), sympy.simplify(under)
    if over == 0 or under == 0:
        return bool(over == under)
    ratio = sympy.simplify(over / under)
    return bool(ratio.is_number and ratio.is_finite and ratio != 0)


# The child process


def _number_literal(text: str, **_: Any) -> Any:
    """Stands in for sympy's parse_expr."""
    if not LITERAL.fullmatch(text):
        raise SyntaxError("not a number literal")
    return sympy.Integer(text) if text.isdigit() else sympy.Float(text)


def _refuse(event: str, args: tuple[Any, ...]) -> None:
    from_text = (
        event == "exec" and args[0].co_filename.startswith("<") and not args[0].co_filename.startswith("<frozen")
        and sys._getframe(1).f_globals.get("__name__") not in GENERATORS
    )  # fmt: skip
    writes = event == "open" and isinstance(args[1], str) and not set(args[1]).isdisjoint("wax+")
    if from_text or writes or event.startswith(REFUSED):
        raise RuntimeError(f"refused while grading: {event}")


def serve(memory: int) -> None:
    """Answer requests on stdin: a line [limit, [text, gold, extracted], …] per batch; "read" comes back, then a line
    [correct, answer, reason] for each request. One that takes a second more than `limit` seconds ends the process by SIGALRM
    (the parent kills it earlier, but may be gone); one that needs more than `memory` bytes gets a verdict that says so.
    """
    logging.disable(logging.CRITICAL)
    sys.setrecursionlimit(3000)
    for warm in ((r"\frac{\sqrt{2}}{2} x", r"\frac{x}{\sqrt{2}}"), ("x=y+1", "y=x-1"), (r"\pi", "3.14")):
        algebraically_equal(*warm)
    sympy.parsing.sympy_parser.parse_expr = _number_literal
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    sys.addaudithook(_refuse)
    out, sys.stdout = sys.stdout.buffer, sys.stderr  # what a library prints is no verdict
    out.write(b"ready\n")
    out.flush()
    for line in sys.stdin.buffer:
        limit, *requests = json.loads(line)
        out.write(b"read\n")
        out.flush()
        for text, gold, extracted in requests:
            signal.setitimer(signal.ITIMER_REAL, limit + 1)
            try:
                verdict = judge(text, gold, algebraically_equal, extracted)
                row: list[Any] = [verdict.correct, verdict.answer, verdict.reason]
            except MemoryError:
                row = [False, given(text, extracted), "out of memory"]
            except Exception as error:  # whatever the libraries raise, the answer was not shown to be right
                row = [False, given(text, extracted), f"not comparable ({type(error).__name__})"]
            signal.setitimer(signal.ITIMER_REAL, 0)
            out.write(json.dumps(row).encode() + b"\n")
            out.flush()
