"""Verdicts, extraction, misbehaviour: an answer harms its own verdict only, and nothing is left behind."""

import json
import math
import os
import re
import subprocess
import textwrap
import time
from pathlib import Path

import pytest

from gcpo_repro.errors import UserError
from gcpo_repro.evaluation import code_execution
from gcpo_repro.evaluation.code_execution import extract_code, require_permission, run_many, run_problem
from gcpo_repro.evaluation.code_worker import compile_without_tail
from tests.evaluation.code_cases import PROBLEM, PROMPT, fenced, need, nothing_left, run  # noqa: F401


@pytest.mark.skipif(not os.environ.get("GCPO_DATA"), reason="needs the data sets")
def test_canonical_solutions_pass_and_empty_ones_fail():
    rows = [json.loads(line) for line in (Path(os.environ["GCPO_DATA"]) / "humaneval.jsonl").open()]
    start = time.monotonic()
    verdicts = run_many([(row, row["canonical_solution"]) for row in rows], workers=2)
    assert [(row["task_id"], v.reason) for row, v in zip(rows, verdicts, strict=True) if not v] == []
    assert len(rows) == 164 and time.monotonic() - start < 60
    assert not any(run_many([(row, "    return 'no'\n") for row in rows[::20]], workers=2))


def test_passes_wrong_and_raised():
    assert run_problem(PROBLEM, "    return x * x\n").reason == "passed"
    assert run_problem(PROBLEM, fenced("def f(x):\n    return math.prod([twice(x), x]) // 2")).reason == "passed"
    wrong = run_problem(PROBLEM, "    return 4\n")
    assert not wrong and wrong.reason == "wrong: AssertionError: three; the last call: f(3) = 4"
    assert run_problem(PROBLEM, "    return 1 / 0\n").reason == "raised: ZeroDivisionError: division by zero"
    assert run_problem(PROBLEM, "    assert x > 2, 'mine'\n").reason == "raised: AssertionError: mine"
    assert run_problem(PROBLEM, "    retrun x\n").reason.startswith("raised: while loading, SyntaxError")
    assert run_problem(PROBLEM, "").reason.startswith("wrong")
    assert run_problem(PROBLEM, fenced("g = 3")).reason.startswith("wrong")  # a continuation of the prompt, empty of a body
    assert run_problem(PROBLEM, fenced("f = 3")).reason == "raised: while loading, TypeError: f is not callable"


def test_many_in_order_with_progress(capsys):
    bodies = [f"    return {n} * x\n" if n else "    return x * x\n" for n in (1, 0, 2, 0, 3)]
    assert [bool(v) for v in run_many([(PROBLEM, b) for b in bodies], workers=2, progress=True)] == [0, 1, 0, 1, 0]
    assert "running code" in capsys.readouterr().err


def test_tests_may_use_helpers_tolerances_and_expected_errors():
    test = """
        import random
        def check(candidate):
            mine = [3, 1, 2]
            assert candidate(mine) == [1, 2, 3] and mine == [3, 1, 2]
            assert abs(candidate([0.1, 0.2])[1] - 0.2) < 1e-9
            assert twice(candidate([1])[0]) == 2
            assert candidate(x=[2, 1]) == f([1, 2])
            try:
                candidate(None)
            except TypeError:
                pass
            else:
                assert False
    """
    problem = PROBLEM | {"test": textwrap.dedent(test)}
    assert run_problem(problem, "    x.sort() if x else None\n    return x[:]\n").reason == "passed"


def test_drawn_cases_are_the_same_each_time():
    test = "import random\ndef check(candidate):\n    raise AssertionError(random.random())\n"
    first, second = (run_problem(PROBLEM | {"test": test}, "    return x\n").reason for _ in range(2))
    assert first == second


def test_a_helpers_redefinition_does_not_reach_the_test():
    test = "def check(candidate):\n    assert twice(candidate(3)) == 18\n"
    cheat = "def twice(x):\n    return 18\ndef f(x):\n    return 0\n"
    assert run(cheat, problem=PROBLEM | {"test": test}).reason.startswith("wrong")


def test_libraries_threads_and_the_scratch_folder_work():
    source = """
        import numpy as np, threading, tempfile, asyncio, dataclasses
        @dataclasses.dataclass
        class Box:
            value: 'int'
        async def later(x):
            await asyncio.sleep(0)
            return x
        def f(x):
            found = []
            thread = threading.Thread(target=lambda: found.append(np.int64(x) ** 2))
            thread.start()
            thread.join()
            with tempfile.TemporaryFile() as file:
                file.write(b'x')
            return Box(asyncio.run(later(found[0]))).value
    """
    assert run(source).reason == "passed"


GOOD = "def f(x):\n    return x * x\n"


@pytest.mark.parametrize(
    "response",
    [
        "    return x * x\n",
        f"Sure!\n```python\n{GOOD}```\nThat is it.",
        f"```\n{GOOD}```\n```python\nprint(f(2))\n```",
        f"```python\ndef f(x):\n    return 0\n```\nNo, better:\n```py\n{GOOD}```",
        f"~~~\n{GOOD}~~~",
        f"````\n{GOOD}````",
        f"1. so:\n   ```python\n{textwrap.indent(GOOD, '   ')}   ```",
        f"```python\n{GOOD}",
        f"```python\n{GOOD}\ndef g(x):\n    return (x",
        "```python\r\ndef f(x):\r\n    return x * x\r\n```",
        "```python\nfrom __future__ import annotations\ndef f(x: Undefined):\n    return twice(x) * x // 2\n```",
        "```python\n    return x * x\n```",
        "```python\nf = lambda x: x * x\n```",
        "use ```f``` so:\n```python\ndef f(x):\n    return math.prod([x, x])\n```",
        "    return x * x\n\nThis returns the square, as was asked.\n",
        "    return x * x\n\n\ndef g(x):\n    for i in",
        f"\n{GOOD}",
    ],
)
def test_good_answers_in_all_forms(response):
    assert run_problem(PROBLEM, response).reason == "passed"


def test_extraction_to_the_letter():
    assert extract_code("    return 1\n", "f", PROMPT) == PROMPT + "    return 1\n"
    helpers = "import math\n\n\ndef twice(x):\n    return 2 * x"
    assert extract_code(f"a\n```python\n{GOOD}```\nb", "f", PROMPT) == f"{helpers}\n\n\n{GOOD}"
    assert extract_code(f"```\ndef ff(x): 0\n```\n```\n{GOOD}```\n```\nf(1)\n```", "f", "def f(x):\n") == GOOD
    hostile = "```\n" * 200_000 + "x" * 10_000_000
    start = time.monotonic()
    extract_code(hostile, "f", PROMPT)
    assert time.monotonic() - start < 5


def test_only_a_tail_is_left_out():
    code, error = compile_without_tail("a = 1\nb = 2\nthis is plain prose\nc = 3\n")
    names = {}
    exec(code, names)
    assert (names["a"], names["b"]) == (1, 2) and "c" not in names and error.lineno == 3
    assert compile_without_tail("a = 1\n")[1] is None


ENDS = {
    "import sys\ndef f(x): sys.exit(0)": "raised: RuntimeError: SystemExit: 0",
    "import sys\nsys.exit(0)": "raised: while loading, RuntimeError: SystemExit: 0",
    "import os\ndef f(x): os._exit(0)": "died: exit code 0",
    "import os\nos._exit(0)": "died: exit code 0",
    "def f(x): return f(x)": "raised: RecursionError",
    "import ctypes\ndef f(x): return ctypes.string_at(1)": "died: SIGSEGV",
    "def f(x): return [0] * 10**12": "raised: MemoryError",
    "def f(x):\n    y = [0]\n    while True: y += y": "raised: MemoryError",
    "def f(x): return 'x' * 20_000_000": "flood: an answer of",
    "import os\ndef f(x): os.close(3); os.closerange(3, 60); return 4": "died",
    "def f(x): return input()": "raised: EOFError",
    "raise BaseException('no')": "raised: while loading, RuntimeError: BaseException: no",
    "class Bad(Exception):\n    def __str__(self): raise self\ndef f(x): raise Bad": "raised: RuntimeError: Bad",
    "def f(x): return 1 << 10**7": "wrong: AssertionError; the last call: f(2) = …",
    "def f(x): raise ValueError('\\ud800')": "raised: ValueError: \\ud800",
    "\0": "raised: while loading, ",
    "x = '\ud800'\ndef f(x): pass": "raised: while loading, UnicodeEncodeError".replace("Unicode", "RuntimeError: Unicode"),
}


@pytest.mark.parametrize("source", ENDS)
def test_ends(source):
    verdict = run(source)
    assert not verdict and verdict.reason.startswith(ENDS[source]), verdict


@pytest.mark.parametrize(
    "source, kind",
    [
        ("def f(x):\n    while True: pass", "timeout"),
        ("while True: pass", "timeout"),
        ("import time\ndef f(x): time.sleep(99)", "timeout"),
        ("def f(x): return 7 ** 7 ** 9", "timeout"),
        ("import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)", ("timeout", "died", "raised: MemoryError")),
        ("import os\ndef f(x):\n    while True: os.write(3, b'x' * 10**6)", ("forged", "flood", "timeout")),
        (
            "import threading\ndef f(x):\n    threading.Thread(target=f, args=(x,)).start()\n    while True: pass",
            ("timeout", "died"),
        ),
    ],
)
def test_ends_in_time(source, kind):
    start = time.monotonic()
    verdict = run(source, timeout=0.7)
    assert not verdict and verdict.reason.startswith(kind), verdict
    assert time.monotonic() - start < 5


def test_a_hanging_test_harms_only_its_own_verdict(monkeypatch):
    assert run("def f(x): return 4", 0.5, problem=PROBLEM | {"test": "def check(c):\n    while True: pass\n"}).reason == (
        "timeout: no verdict within 0.5 s"
    )
    monkeypatch.setattr(code_execution, "START_SECONDS", 0.5)
    monkeypatch.setattr(code_execution, "GRACE_SECONDS", 0.5)
    blocked = (
        "import signal, time\ndef check(c):\n    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])\n    time.sleep(99)\n"
    )
    assert run("def f(x): return 4", 0.5, problem=PROBLEM | {"test": blocked}).reason == "timeout: the test itself hung"


def test_floods_of_output_go_nowhere():
    source = """
        import sys, os
        os.write(1, bytes(range(256)) * 10**5)
        def f(x):
            print('\\udcff' if False else 'x' * 10**7)
            sys.stderr.buffer.write(b'\\xff\\xfe' * 10**6)
            return x * x
    """
    assert run(source).reason == "passed"


def test_a_deleted_or_deeply_nested_folder():
    source = """
        import os, shutil
        here = os.getcwd()
        def f(x):
            shutil.rmtree(here, ignore_errors=True)
            return x * x
    """
    assert run(source).reason == "passed"
    assert run(source, walls=()).reason == "passed"
    nested = "import os\nfor i in range(30):\n    os.mkdir('d' * 200)\n    os.chdir('d' * 200)\nopen('end', 'w').close()\n"
    assert run(nested + "import time\ndef f(x): time.sleep(9)").reason == "flood: folders nested without end"


def test_folders_are_removed_whatever_is_in_them(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("kept")
    folder = tmp_path / "scratch" / "gcpo-code-x"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b").chmod(0)
    (folder / "a").chmod(0)
    code_execution._remove(str(folder))
    folder.symlink_to(tmp_path)
    code_execution._remove(str(folder))
    assert kept.read_text() == "kept"


@pytest.mark.parametrize("source", ["open(str(i), 'w').write('x' * 10**6)", "open(str(i), 'w').close()"])
def test_floods_of_files(source):
    verdict = run(f"import os\ni = 0\nwhile True:\n    {source}\n    i += 1", timeout=10)
    assert verdict.reason == "flood: more than 500 files or 64 MiB in its folder"
    too_long = "def f(x):\n    try:\n        open('a', 'wb').write(bytes(5 << 20))\n    except OSError:\n        return x * x"
    assert run(too_long).reason == "passed"  # that is, the write failed


CHILDREN = """
    import os, time
    def f(x):
        for i in range({count}):
            if not os.fork():
                os.setsid()
                if not os.fork():
                    os.environ.clear()
                    time.sleep(60)
                os._exit(0)
        {then}
        return x * x
"""


def test_no_process_is_started():
    need("seccomp")
    assert run(CHILDREN.format(count=20, then="pass")).reason == "raised: PermissionError: [Errno 1] Operation not permitted"
    for call in (
        "subprocess.run(['/bin/true'])",
        "os.system('true') and 1/0",
        "os.execv('/bin/true', ['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
    ):
        reason = run_problem(PROBLEM, f"    import subprocess, os\n    {call}\n    return x * x\n").reason
        assert reason.startswith(("raised: PermissionError", "raised: ZeroDivisionError")), (call, reason)


def test_without_walls_double_forks_are_found_and_killed():
    start = time.monotonic()
    assert run(CHILDREN.format(count=2, then="pass"), walls=()).reason == "passed"  # so the attack works, and `nothing_left` sees
    assert run(CHILDREN.format(count=20, then="time.sleep(9)"), walls=()).reason == "flood: more than 16 processes"
    assert time.monotonic() - start < 10


def test_without_walls_the_judge_can_be_killed_but_not_fooled():
    verdict = run(CHILDREN.format(count=2, then="os.kill(os.getppid(), 9); time.sleep(9)"), walls=())
    assert not verdict and verdict.reason == "died: the judge was killed"


def test_permission(monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(UserError, match="HF_ALLOW_CODE_EVAL=1"):
        require_permission(False)
    require_permission(True)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    with pytest.raises(UserError, match="allow-code-execution"):
        require_permission()
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    require_permission()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"test": None}, "no text in test"),
        ({"entry_point": "f(x)"}, "no function's name"),
        ({"test": "def check(candidate) assert"}, "prompt or test cannot be loaded: SyntaxError"),
        ({"test": "def chck(candidate): pass"}, "prompt or test cannot be loaded: KeyError: 'check'"),
        ({"test": "def check(candidate):\n    candidate(print)"}, "the test passes builtin_function_or_method"),
    ],
)
def test_rows_that_cannot_be_judged(change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run_many([(PROBLEM | change, "    return x\n")])


@pytest.mark.parametrize("bad", [{"timeout": 0}, {"timeout": math.nan}, {"memory_mb": 10}, {"workers": 0}, {"workers": 1.5}])
def test_bad_arguments(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        run_many([(PROBLEM, "")], **bad)
    with pytest.raises(UserError, match="completion"):
        run_problem(PROBLEM, None)


def test_a_worker_that_cannot_start_is_no_verdict(monkeypatch):
    monkeypatch.setattr(code_execution, "command", lambda module: ["/bin/sh", "-c", "echo broken >&2; exit 3"])
    with pytest.raises(OSError, match="broken"):
        run_problem(PROBLEM, "    return x\n")


def test_an_interrupted_evaluation_leaves_nothing(monkeypatch):
    def interrupted(*_):
        time.sleep(0.5)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("while True: pass", timeout=60)
