"""A problem, ways to run an answer to it, and the promise that every test holds to: nothing is left behind."""

import functools
import os
import tempfile
import textwrap
from pathlib import Path

import pytest

from gcpo_repro.evaluation import code_execution, code_walls
from gcpo_repro.evaluation.code_execution import isolation

PROMPT = 'import math\n\n\ndef twice(x):\n    return 2 * x\n\n\ndef f(x):\n    """The square of x."""\n'
TEST = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9, 'three'\n"
PROBLEM = {"task_id": "T/0", "prompt": PROMPT, "test": TEST, "entry_point": "f"}
WALLS = code_walls.WALLS


@pytest.fixture(autouse=True)
def nothing_left(tmp_path, monkeypatch):
    """After each test: no process of ours, no file, no descriptor that was not there before."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert list(folder.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) <= len(before)
    assert marked(folder) == []


def marked(folder):
    """Processes whose environment names the folder (a worker's HOME lies in it)."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.fsencode(folder) in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes())
        except OSError:
            continue
    return found


def fenced(source):
    return f"```python\n{textwrap.dedent(source)}\n```"


def run(source, timeout=5.0, walls=WALLS, problem=PROBLEM):
    return code_execution._run(problem, textwrap.dedent(source), timeout, 1024, walls)[0]


def probe(source, walls=WALLS):
    """What `f()` returns, read through the reason of a test that fails with it."""
    test = "def check(candidate):\n    raise AssertionError(candidate())\n"
    verdict = run(source, walls=walls, problem=PROBLEM | {"test": test})
    assert not verdict and verdict.reason.startswith("wrong: AssertionError: "), verdict
    return verdict.reason.removeprefix("wrong: AssertionError: ").split(";")[0]


def tried(expression):
    return f"def f():\n    try:\n        return {expression}\n    except OSError as error:\n        return error.strerror"


states = functools.cache(isolation)


def need(*walls):
    missing = [wall for wall in walls if states()[wall] != "in force"]
    if missing:
        pytest.skip(f"this machine lacks {', '.join(missing)}")
