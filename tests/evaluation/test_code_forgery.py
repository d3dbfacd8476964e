"""No forged pass: only plain data come back, and they are rebuilt."""

import json
import math
import textwrap
from collections import Counter, namedtuple

import numpy as np
import pytest

from gcpo_repro.evaluation.code_execution import run_problem
from gcpo_repro.evaluation.code_worker import decode, encode
from tests.evaluation.code_cases import PROBLEM, TEST, nothing_left, run  # noqa: F401

EQUAL = """
    class Equal({base}):
        def __eq__(self, other): return True
        def __ne__(self, other): return False
        def __lt__(self, other): return True
        def __hash__(self): return 4
        def __sub__(self, other): return 0
    def f(x):
        return Equal()
"""
# Writes a message to every descriptor that it has, the socket being one of them; then returns.
BY_HAND = """
    import os
    def f(x):
        line = {line!r}
        for descriptor in range(20):
            try:
                os.write(descriptor, len(line).to_bytes(8, 'big') + line)
            except OSError:
                pass
        return {value}
"""
FORGED = {
    "patched builtins": """
        import builtins, json
        builtins.abs = lambda x: 0
        builtins.all = builtins.isinstance = builtins.issubclass = lambda *a: True
        builtins.AssertionError = ValueError
        def f(x): return 5
    """,
    "patched json": "import json\njson.dumps = lambda *a, **k: '{\"passed\": true}'\ndef f(x): return 5",
    "patched encode": """
        import sys
        sys.modules['sandbox.code_worker'].encode = lambda value: {'__class__': 'bool', 'value': True}
        def f(x): return 5
    """,
    "frames": """
        import sys, gc
        def f(x):
            frame = sys._getframe()
            while frame:
                for name in list(frame.f_locals) + list(frame.f_globals):
                    if name in ('reason', 'passed', 'halted', 'expected', 'check'):
                        frame.f_globals[name] = 'passed'
                frame = frame.f_back
            for thing in gc.get_objects():
                if isinstance(thing, dict) and 'passed' in thing:
                    thing['passed'] = True
            return 5
    """,
    "hand-written verdict": BY_HAND.format(line=b'{"passed": true, "reason": "passed", "clean": true}', value=5),
    "reply to a later call": BY_HAND.format(line=b'{"call": 9, "value": 4}', value=4),
    "unknown type in a reply": BY_HAND.format(line=b'{"call": 1, "value": {"object": "passed"}}', value=4),
    "number beyond floats": BY_HAND.format(line=b'{"call": 1, "value": {"complex": [1' + b"0" * 400 + b", 0]}}", value=4),
    "two answers in a reply": BY_HAND.format(line=b'{"call": 1, "value": 4, "raised": ["ValueError", ""]}', value=4),
    "not even an object": BY_HAND.format(line=b"[]", value=4),
    "endless nesting in a reply": BY_HAND.format(line=b'{"call": 1, "value": ' + b"[" * 10000 + b"]" * 10000 + b"}", value=4),
    "swallowed by a property": """
        class Liar:
            __class__ = int
            def __index__(self): return 4
            def __eq__(self, other): return True
        def f(x): return Liar()
    """,
}


@pytest.mark.parametrize("base", ["object", "int", "str", "list", "dict", "float", "tuple", "set"])
def test_an_object_equal_to_everything_passes_only_without_us(base):
    source = textwrap.dedent(EQUAL.format(base=base))
    names = {}
    exec(source, names)
    exec(TEST, names)
    names["check"](names["f"])  # the field's executor: passed
    verdict = run(source)
    assert not verdict and verdict.reason.startswith(("wrong", "not plain data")), verdict


@pytest.mark.parametrize("attack", FORGED)
def test_no_forged_pass(attack):
    verdict = run(FORGED[attack], timeout=3)
    assert not verdict and verdict.reason.split(":")[0] in ("wrong", "forged", "died", "not plain data", "timeout"), verdict


@pytest.mark.parametrize("value", ["(i for i in 'ab')", "math", "f", "type", "object()", "range(3)", "[[x, open]]", "{1: print}"])
def test_only_plain_data_come_back(value):
    assert run_problem(PROBLEM, f"    return {value}\n").reason.startswith("not plain data: returned ")


def test_a_value_inside_itself_is_refused():
    assert run_problem(PROBLEM, "    y = []\n    y.append(y)\n    return y\n").reason.startswith("not plain data")


def test_an_exception_cannot_end_the_cases_early():
    test = "def check(candidate):\n    assert all(map(lambda x: candidate(x) == x * x, [2, 3]))\n"
    source = "def f(x): raise StopIteration"
    names = {}
    exec(source, names)
    exec(test, names)
    names["check"](names["f"])  # the field's executor: passed
    assert run(source, problem=PROBLEM | {"test": test}).reason == "raised: RuntimeError: StopIteration:"


def test_a_test_that_swallows_everything_cannot_pass_the_dead():
    test = "def check(candidate):\n    try:\n        candidate(1)\n    except BaseException:\n        pass\n"
    assert run("import os\ndef f(x): os._exit(0)", problem=PROBLEM | {"test": test}).reason == "died: exit code 0"


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    "value",
    [
        *(
            None,
            True,
            0,
            -1,
            2**63 - 1,
            2**63,
            -(2**63),
            -(10**5000),
            1.5,
            -0.0,
            math.inf,
            -math.inf,
            1e-310,
            1j,
            complex(-0.0, math.inf),
        ),
        *("", "ü\n\0", "\ud800", b"\xff\0", [], [[]], (), ((), [()]), set(), {1, "a", (2,)}, frozenset({1.5}), {}),
        *({"a": [1], 2: {(3,): None}, None: True}, {"tuple": [1]}, [{"int": "0x1"}], [1, 1.0, True]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_plain_data_arrive_as_they_were(value):
    back = decode(json.loads(json.dumps(encode(value))))
    assert shape(back) == shape(value)


def shape(value):
    """A value with its types, to the last sign: what `==` alone does not see."""
    if isinstance(value, dict):
        return type(value), [(shape(k), shape(v)) for k, v in value.items()]
    if isinstance(value, (set, frozenset)):
        return type(value), value
    if isinstance(value, (list, tuple)):
        return type(value), [shape(item) for item in value]
    return type(value), hex(value) if type(value) is int else repr(value)


def test_subclasses_go_as_what_they_extend():
    for value, plain in [
        (Point(1, 2), (1, 2)), (Counter("aab"), {"a": 2, "b": 1}), (np.float64(1.5), 1.5), (np.int32(7), 7),
        (np.bool_(True), True), (bytearray(b"x"), b"x"),
    ]:  # fmt: skip
        assert shape(decode(encode(value))) == shape(plain)
    assert math.isnan(decode(json.loads(json.dumps(encode(math.nan)))))
    with pytest.raises(TypeError):
        encode(np.zeros(2))


@pytest.mark.parametrize("tree", [{}, {"object": 1}, {"int": 5}, {"set": [[1]]}, {"dict": [1]}, {"tuple": 3}, {"a": 1, "b": 2}])
def test_what_is_no_plain_data_is_not_decoded(tree):
    with pytest.raises((ValueError, TypeError)):
        decode(tree)
