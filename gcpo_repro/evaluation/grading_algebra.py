r"""The algebra of grading, by math-verify, and the process that does it: `serve` runs in a child that can be killed.

Nothing in a model's text is executed. It reaches only math-verify's LaTeX grammar, which builds an expression from tokens, but
hands the text of each number to sympy's `parse_expr`, and that evaluates Python: in the child, a reader of number literals takes
its place. That nothing else slips through is enforced: an audit hook refuses to execute code compiled from a string, to start
processes, to open sockets and to write files.
"""

from __future__ import annotations

import importlib
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
from math_verify import LatexExtractionConfig, verify
from math_verify.grader import should_treat_as_complex

from .grading import given, judge
from .grading_numbers import DECIMAL_TOLERANCE, ROUNDED_GOLD_TOLERANCE
from .grading_text import ROW

grammar: Any = importlib.import_module("latex2sympy2_extended.latex2sympy2")  # math-verify's; untyped

REFUSED = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.", "os.remove", "shutil.")
GENERATORS = ("sympy.polys.monomials", "collections", "dataclasses")  # these write code from counts and from their own names
LITERAL = re.compile(r"\d{1,1000}(?:\.\d{0,1000})?(?:[eE][+-]?\d{1,4})?|\.\d{1,1000}", re.ASCII)
ZERO = 1e-25  # of numbers computed to 30 digits
CLEANING = replace(LatexExtractionConfig().normalization_config, units=False, boxed="none")  # both are done already
CONVERSION = grammar.ConversionConfig(lowercase_symbols=False)  # T is not t
SYMBOL_END = r"(?![a-zA-Z]| ?\()"


def _primed(match: re.Match[str]) -> str:
    return f"{match[1]}_{{{match[2] or match[3] or ''}prime{len(match[4])}}}"


# Names that the grammar would take for constants, refuse, or lose: Euler's gamma, E_1, a current I, M_\odot, y'.
RENAMED: list[tuple[re.Pattern[str], Any]] = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"_ ?(?:\{ ?\\odot ?\}|\\odot(?![a-zA-Z]))", "_{sun}"),
        (r"\\(g|G)amma(?![a-zA-Z])(?: ?_ ?\{? ?(\w+) ?\}?)?", r"g_{\1amma\2}"),
        (r"(?<![a-zA-Z\\])E ?_ ?(?:\{ ?(\w+) ?\}|(\w))", r"X_{E\1\2}"),
        (rf"(?<![a-zA-Z\\{{])I{SYMBOL_END}(?! ?_)", "X_{I}"),
        (rf"([a-zA-Z])(?: ?_ ?(?:\{{ ?(\w+) ?\}}|(\w)))?('+){SYMBOL_END}", _primed),
    )
]


@lru_cache(maxsize=4096)
def _parse(latex: str, real: bool) -> Any:
    latex = latex.replace(ROW, r" \\ ").replace(r"\deg", "")
    for pattern, name in RENAMED:
        latex = pattern.sub(name, latex)
    try:
        cleaned = grammar.normalize_latex(latex, CLEANING)
        found = grammar.latex2sympy(cleaned, is_real=real, normalization_config=None, conversion_config=CONVERSION)
    except MemoryError:
        raise
    except Exception:  # the grammar has many kinds
        return None
    if not isinstance(found, sympy.Basic | sympy.MatrixBase):
        return None
    imaginary = [s for s in getattr(found, "free_symbols", ()) if str(s) == "i"]
    return found.subs(dict.fromkeys(imaginary, sympy.I)).replace(_is_rate, _rate) if hasattr(found, "replace") else found


def _is_rate(e: Any) -> bool:
    return isinstance(e, sympy.Derivative) and e.expr.is_Symbol and e.expr not in e.variables


def _rate(e: Any) -> Any:
    """dx/dt as a symbol: sympy takes the derivative of one symbol by another for 0."""
    return sympy.Symbol(f"d{e.expr}/d{e.variables}", real=e.expr.is_real)


def algebraically_equal(gold: str, answer: str) -> bool:
    """Whether two normalised answers are equal as expressions, numbers, equations or inequalities. May take forever."""
    real = not (should_treat_as_complex(gold) or should_treat_as_complex(answer))
    a, b = _parse(gold, real), _parse(answer, real)
    if a is None or b is None:
        return False
    if isinstance(a, sympy.Rel) or isinstance(b, sympy.Rel):
        return type(a) is type(b) and _same_equation(a, b) if "=" in gold else bool(verify(a, b, timeout_seconds=None))
    if getattr(a, "is_number", False) and getattr(b, "is_number", False):
        return _same_value(a, b, DECIMAL_TOLERANCE if "." in answer else ROUNDED_GOLD_TOLERANCE if "." in gold else 0)
    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)):
        return bool(verify(a, b, timeout_seconds=None))
    if a.is_Symbol and b.is_Symbol:
        return bool(a == b)  # math-verify would not mind the case
    if not (a.is_Symbol or b.is_Symbol) and _apart(a - b, a):
        return False
    return bool(verify(a, b, timeout_seconds=None)) or (a.has(sympy.log) and _same_logarithms(a, b))


def _same_logarithms(a: Any, b: Any) -> bool:
    """ln(1/x) = −ln x and the like, for what a logarithm is taken of is positive."""
    return bool(sympy.simplify(sympy.expand_log((a - b).doit(), force=True)) == 0)


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
