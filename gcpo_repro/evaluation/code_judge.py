"""The trusted side of one verdict: runs a problem's own test in a process of its own and calls the candidate in another.

Runs under `python -I`, started by `code_execution`, one process per verdict; standard library only, and no import of the
package. Standard input: one JSON job. Standard output: JSON lines, {"ready": walls}, then {"passed", "reason", "clean"}; or
{"error"} where the problem itself, not the candidate, is at fault.

The candidate can give nothing but return values of plain builtins, rebuilt here. So neither an object equal to everything, nor
a patched builtin, nor a walk through frames reaches the comparison; and a reply forged by hand on the socket is a return value.
"""

from __future__ import annotations

import builtins
import ctypes
import json
import os
import random
import reprlib
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .code_worker import TooLong, decode, encode, receive, send

REPLY_BYTES = 8 << 20
SCRATCH_BYTES, SCRATCH_ENTRIES, PROCESSES = 64 << 20, 500, 16
JUDGE_MB = 2048
TICK_SECONDS = 0.1
# A bare package around this folder: relative imports work, the real package's __init__ is never run.
BOOT = (
    "import sys, types; p = types.ModuleType('sandbox'); p.__path__ = [sys.argv[1]]; sys.modules['sandbox'] = p; "
    "from sandbox.{module} import main; main()"
)


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs `main` of a module of this folder in a bare, isolated interpreter."""
    return [sys.executable, "-I", "-c", BOOT.format(module=module), str(Path(__file__).parent), *arguments]


class Halt(BaseException):
    """The run is over, whatever the test makes of it (no `except Exception` in a test can swallow it)."""


class Problem(Exception):
    """The data set's row is at fault, not the candidate."""


class Candidate:
    """What the test calls: each call goes to the other process, by value. What it does to its arguments stays there.

    Args:
        wire: the socket to the worker.
        name: the function's.
        why_dead: says how the worker ended, asked once its socket is closed.
    """

    def __init__(self, wire: int, name: str, why_dead: Callable[[], str]):
        self.__name__ = name
        self.halted: Halt | None = None
        self.raised: BaseException | None = None
        self.last = ""
        self._wire, self._calls, self._why_dead = wire, 0, why_dead

    def halt(self, reason: str) -> Halt:
        self.halted = self.halted or Halt(reason)
        return self.halted

    def ask(self, message: Any) -> dict[str, Any]:
        try:
            send(self._wire, message)
            reply = receive(self._wire, REPLY_BYTES)
            if type(reply) is not dict:
                raise ValueError("not an object")
            return reply
        except (EOFError, ConnectionError):
            raise self.halt(self._why_dead()) from None
        except TooLong as error:
            raise self.halt(f"flood: {error}") from None
        except Exception as error:
            raise self.halt(f"forged: a reply that is none ({describe(error)})") from None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._calls += 1
        try:
            call = {"call": self._calls, "args": encode(args), "kwargs": encode(kwargs)}
        except TypeError as error:
            raise Problem(f"the test passes {error}, which is not plain data") from None
        reply = self.ask(call)
        if reply.pop("call", None) != self._calls or len(reply) != 1:
            raise self.halt("forged: a reply to another call")
        if "value" in reply:
            return self._value(reply["value"], args)
        if "not_plain" in reply:
            raise self.halt(f"not plain data: returned {clean(reply['not_plain'])}")
        self.raised = as_exception(reply.get("raised"))
        raise self.raised

    def _value(self, tree: Any, args: tuple[Any, ...]) -> Any:
        try:
            value = decode(tree)
        except Exception as error:
            raise self.halt(f"forged: a value that is none ({describe(error)})") from None
        self.last = f"; the last call: {self.__name__}({', '.join(map(short, args))}) = {short(value)}"
        return value


def as_exception(raised: Any) -> Exception:
    """The candidate's exception, if it is a built-in one, for tests that expect it; otherwise a RuntimeError with its name."""
    name, text = raised if type(raised) is list and len(raised) == 2 else ("unknown", "")
    kind = getattr(builtins, name, None) if type(name) is str else None
    # Not StopIteration: inside a test's all(map(...)) it would end the cases early and count as success.
    if isinstance(kind, type) and issubclass(kind, Exception) and kind not in (StopIteration, StopAsyncIteration):
        try:
            return kind(text)
        except TypeError:  # UnicodeDecodeError and the like want more
            pass
    return RuntimeError(f"{name}: {text}")


def short(value: Any) -> str:
    """A value's text of bounded length."""
    try:
        return reprlib.repr(value)
    except (ValueError, RecursionError):  # an integer of more than 4300 digits
        return "…"


def clean(text: Any) -> str:
    """One line that any file and terminal can hold: lone surrogates escaped, no control character, at most 300 characters."""
    line = " ".join(str(text)[:3000].encode("utf-8", "backslashreplace").decode().split())[:300]
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def describe(error: BaseException) -> str:
    return clean(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def children() -> dict[int, list[int]]:
    """Parent → its living processes, from /proc."""
    found: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_bytes().rpartition(b")")[2].split()
            except OSError:  # gone meanwhile
                continue
            if fields[0] != b"Z":
                found.setdefault(int(fields[1]), []).append(int(entry))
    return found


def descendants(process: int) -> list[int]:
    """Every process below one. Orphans come back to a judge (it is their subreaper), so a double fork hides nothing."""
    below, found = children(), [process]
    for pid in found:
        found += below.get(pid, [])
    return found[1:]


def kill(processes: list[int]) -> None:
    for process in processes:
        try:
            os.kill(process, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def end_all(seconds: float = 10.0) -> bool:
    """Kill and reap all descendants; True when the kernel says that none is left."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        kill(descendants(os.getpid()))
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return True
        time.sleep(0.001)
    return False


def too_much(scratch: str) -> str | None:
    """What the candidate has too much of: bytes or entries in its folder, processes."""
    if len(descendants(os.getpid())) > PROCESSES:
        return f"more than {PROCESSES} processes"
    folders, size, entries = [scratch], 0, 0
    while folders:
        try:
            for entry in os.scandir(folders.pop()):
                entries += 1
                size += bytes_of(entry)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                if entries > SCRATCH_ENTRIES or size > SCRATCH_BYTES:
                    return f"more than {SCRATCH_ENTRIES} files or {SCRATCH_BYTES >> 20} MiB in its folder"
        except PermissionError:
            return "a folder that hides what is in it"
        except OSError as error:  # gone meanwhile; or
            if len(error.filename or "") > 4000:  # nested so deeply that no path reaches it
                return "folders nested without end"
    return None


def bytes_of(entry: os.DirEntry[str]) -> int:
    """On the disk; 0 where it is gone meanwhile: a file that comes and goes must not end the count."""
    try:
        return entry.stat(follow_symlinks=False).st_blocks * 512
    except FileNotFoundError:
        return 0


def start_clock(candidate: Candidate, timeout: float, scratch: str) -> None:
    """Halt after `timeout` seconds, and on any flood met on the way."""
    until = time.monotonic() + timeout

    def tick(*_: Any) -> None:
        if time.monotonic() > until:
            raise candidate.halt(f"timeout: no verdict within {timeout:g} s")
        flood = too_much(scratch)
        if flood:
            raise candidate.halt(f"flood: {flood}")

    signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, min(TICK_SECONDS, timeout), TICK_SECONDS)


def stop_clock() -> None:
    while True:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            return
        except Halt:  # a last tick in between
            continue


def trusted_names(candidate: Candidate, job: dict[str, Any]) -> dict[str, Any]:
    """The names of the row's prompt (tests call its helpers) and test, with the candidate in the function's place."""
    names: dict[str, Any] = {"__name__": "test"}
    try:
        try:
            code = compile(job["prompt"], "<prompt>", "exec", dont_inherit=True)
        except SyntaxError:  # ends in a bare head
            code = compile(job["prompt"].rstrip() + "\n    pass\n", "<prompt>", "exec", dont_inherit=True)
        exec(code, names)
        names[job["entry_point"]] = candidate
        exec(compile(job["test"], "<test>", "exec", dont_inherit=True), names)
        names["check"]
    except (Exception, SystemExit) as error:
        raise Problem(f"prompt or test cannot be loaded: {describe(error)}") from None
    return names


def run_test(candidate: Candidate, job: dict[str, Any]) -> str:
    """Load the candidate, run the row's test; the reason of the verdict, "passed" only if the test came to its end."""
    names = trusted_names(candidate, job)
    reply = candidate.ask({"source": job["source"], "entry_point": job["entry_point"]})
    if "raised" in reply:
        return f"raised: while loading, {describe(as_exception(reply['raised']))}"
    random.seed(0)  # some tests draw their cases: the same ones for every answer
    try:
        names["check"](candidate)
    except Problem:
        raise
    except (Exception, SystemExit) as error:
        if error is candidate.raised:
            return f"raised: {describe(error)}"
        return f"{'wrong' if isinstance(error, AssertionError) else 'raised: in the test'}: {describe(error)}{candidate.last}"
    return "passed"


def examine(candidate: Candidate, job: dict[str, Any]) -> str:
    """`run_test` against the clock; a halt that the test swallowed counts all the same."""
    try:
        start_clock(candidate, job["timeout"], job["scratch"])
        reason = run_test(candidate, job)
    except Halt:
        reason = "halted"
    finally:
        stop_clock()
    return str(candidate.halted) if candidate.halted else reason


def why_dead(worker: subprocess.Popen[bytes]) -> str:
    try:
        code = worker.wait(1)
    except subprocess.TimeoutExpired:
        return "died: closed its socket"
    if code == -signal.SIGXCPU:
        return "timeout: all its CPU seconds used"
    return f"died: {signal.Signals(-code).name}" if code < 0 else f"died: exit code {code}"


def settle(job: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> str:
    """Start the worker, wait until its walls stand, run the test."""
    ours, theirs = socket.socketpair()
    os.set_inheritable(theirs.fileno(), True)
    worker = subprocess.Popen(
        command("code_worker", str(theirs.fileno())),
        stdin=subprocess.DEVNULL, cwd=job["scratch"], start_new_session=True, pass_fds=[theirs.fileno()],
    )  # fmt: skip
    theirs.close()
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: no same user may look into this process or its files
    candidate = Candidate(ours.fileno(), job["entry_point"], lambda: why_dead(worker))
    seconds = int(job["timeout"]) + 2
    try:
        ready = candidate.ask(
            {"wanted": job["walls"], "scratch": job["scratch"], "seconds": seconds, "memory_mb": job["memory_mb"]}
        )
    except Halt as halt:
        raise OSError(f"the worker did not start ({halt})") from None
    report({"ready": ready["walls"]})
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    return examine(candidate, job)


def main() -> None:
    """Read the job, print the verdict, leave no process behind."""
    libc = ctypes.CDLL(None)
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: end with the evaluator
    libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    job = json.load(sys.stdin)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = JUDGE_MB << 20
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def report(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=out, flush=True)

    try:
        reason = settle(job, report)
    except Problem as error:
        end_all()
        report({"error": str(error)})
        return
    report({"passed": reason == "passed", "reason": reason, "clean": end_all()})
