"""Grading in child processes: each answer gets its seconds and bytes, and a child that exceeds them is killed and replaced."""

from __future__ import annotations

import atexit
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ..errors import UserError
from .grading import LIMIT, TIMED_OUT, Verdict, check_benchmark, given
from .grading_files import Golds, Request, Tally, Verdicts, examine, requests

MEMORY = 2 << 30  # bytes of address space; sympy and math-verify take about 0.2 GB of it
START_LIMIT = 120.0  # seconds until a child is ready (two on an idle machine), or has read a batch
CRASHED = "out of memory or crashed"


class Worker:
    """One child process that grades; started when first asked, started again after it was killed. Not for two threads."""

    def __init__(self, memory: int = MEMORY) -> None:
        self.memory = memory
        self.child: subprocess.Popen[bytes] | None = None
        self.owner = os.getpid()
        self.buffer = b""
        self.retired = False

    def grade(self, requests: Sequence[Request], limit: float = LIMIT) -> list[Verdict]:
        """A verdict for each request, in order, each within `limit` seconds; one that fails costs no other its verdict."""
        verdicts: list[Verdict] = []
        while len(verdicts) < len(requests):
            batch = [limit, *requests[len(verdicts) :]]
            if self._send(batch) or self._send(batch):  # again, for the child may have been killed while it was idle
                while len(verdicts) < len(requests) and (line := self._line(limit)):
                    verdicts.append(Verdict(*json.loads(line)))
            if len(verdicts) < len(requests):
                text, _, extracted = requests[len(verdicts)]
                reason = TIMED_OUT if self.child is not None and self.child.poll() is None else CRASHED
                verdicts.append(Verdict(False, given(text, extracted), reason))
                self.close()
        return verdicts

    def start(self) -> None:
        """Start the child where none runs, and wait until it is ready."""
        if self.child is not None and self.child.poll() is None:
            return
        code = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            f"from gcpo_repro.evaluation.grading_algebra import serve\nserve({self.memory})"
        )
        # The text comes by a pipe, never as an argument; one thread, for several children share the machine.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        self.child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=environment, start_new_session=True,
        )  # fmt: skip
        self.owner, self.buffer = os.getpid(), b""
        if self.retired:  # asked after the child exists, so that `retire` in another thread misses none
            self.close()
            raise RuntimeError("this worker is closed")
        if self._line(START_LIMIT) != b"ready":
            self.close()
            raise RuntimeError(f"the grading process died or took {START_LIMIT:.0f} s to start; is math-verify installed?")

    def close(self) -> None:
        """Kill the child."""
        child, self.child = self.child, None
        if child is None or self.owner != os.getpid():  # after a fork the child belongs to the other process
            return
        child.kill()
        child.wait()
        for pipe in filter(None, (child.stdin, child.stdout)):
            with suppress(OSError):  # what was not sent any more
                pipe.close()

    def retire(self) -> None:
        """Kill the child for good, from another thread than the one that waits for it."""
        self.retired = True
        if self.child is not None:
            self.child.kill()

    def _send(self, batch: list[object]) -> bool:
        """Whether a child took the batch; one that did not is gone."""
        if self.owner != os.getpid():
            self.child = None
        self.start()
        assert self.child is not None and self.child.stdin is not None
        with suppress(BrokenPipeError):
            self.child.stdin.write(json.dumps(batch).encode() + b"\n")
            self.child.stdin.flush()
            if self._line(START_LIMIT) == b"read":
                return True
        self.close()
        return False

    def _line(self, seconds: float) -> bytes:
        """The child's next line, b"" when it ends or lets `seconds` pass."""
        assert self.child is not None and self.child.stdout is not None
        if b"\n" not in self.buffer and not self._fill(self.child, time.monotonic() + seconds):
            return b""
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line

    def _fill(self, child: subprocess.Popen[bytes], deadline: float) -> bool:
        """Read until there is a whole line; False when the child ends or the deadline passes before."""
        assert child.stdout is not None
        descriptor = child.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while b"\n" not in self.buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return False
                if not (data := os.read(descriptor, 1 << 16)):
                    child.wait()
                    return False
                self.buffer += data
        return True


class Pool:
    """`workers` children and a thread for each; a context manager, which leaves neither behind."""

    def __init__(self, workers: int, memory: int = MEMORY) -> None:
        if workers < 1:
            raise UserError(f"workers: {workers} must be at least 1")
        self.workers = [Worker(memory) for _ in range(workers)]
        self.free: SimpleQueue[Worker] = SimpleQueue()
        for worker in self.workers:
            self.free.put(worker)
        self.threads = ThreadPoolExecutor(workers)

    def submit(self, requests: Sequence[Request], limit: float = LIMIT) -> Future[list[Verdict]]:
        """The verdicts to come on a batch, graded as by `Worker.grade`."""
        return self.threads.submit(self._grade, requests, limit)

    def _grade(self, requests: Sequence[Request], limit: float) -> list[Verdict]:
        worker = self.free.get()
        try:
            return worker.grade(requests, limit)
        finally:
            self.free.put(worker)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.retire()
        self.threads.shutdown(cancel_futures=True)
        for worker in self.workers:
            worker.close()


# A file of responses

BATCH_ROWS, BATCH_CHARACTERS = 64, 1 << 22


def grade_file(
    benchmark: str, responses: str | Path, out: str | Path, data: str | Path | None = None, workers: int = 1,
    golds: Mapping[Any, str] | None = None, limit: float = LIMIT, memory: int = MEMORY,
) -> dict[str, Any]:  # fmt: skip
    """Grade a file of {id, response} or {id, gold, response}, with an optional `sample`; a killed grading goes on where it was.

    Args:
        benchmark: its name; its golds are loaded where a row has none and `golds` is not given.
        responses: the JSONL or Parquet file to read; several responses to an id are normal.
        out: the file to write: {id, sample, correct, answer, reason} for each row, in its order (`sample` where there was
            one). It appears when it is complete; until then the verdicts stand in `out`.<hash>.partial beside it, and the same
            call with the same rows, golds, limits and grader goes on there.
        data: where the benchmark's data lie, as in `benchmarks.load`.
        workers: child processes, one core each.
        golds: id -> right answer; ids are compared as text.
        limit, memory: seconds and bytes that one answer may take.

    Returns:
        {benchmark, rows, ids, correct, no_answer, timed_out, wrong: {reason: rows}}; `wrong` counts all that are not correct.

    Raises:
        UserError: a row that cannot be read, an unknown id, a missing gold: with file and line, before anything is graded; the
            same grading under way in another process.
    """
    check_benchmark(benchmark)
    source, target = Path(responses), Path(out)
    if not source.is_file():
        raise UserError(f"responses: no file {str(source)!r}; give a JSONL or Parquet file with rows {{id, response}}")
    if target.resolve() == source.resolve() or target.is_dir():
        raise UserError(
            f"out: {str(target)!r} is {'a folder' if target.is_dir() else 'the file of responses'}; name another file"
        )
    known = Golds(benchmark, data, golds)
    rows, digest = examine(source, known, [limit, memory])
    if not rows:
        raise UserError(f"responses: {str(source)!r} has no rows; give one {{id, response}} a line")
    partial = target.with_name(f"{target.name}.{digest[:16]}.partial")
    tally = Tally()
    with Pool(workers, memory) as pool, Verdicts(partial) as verdicts:
        for row in verdicts.kept:
            tally.add(row)
        for graded in _grade_rows(islice(requests(source, known), len(verdicts.kept), None), pool, limit, workers):
            verdicts.append(graded)
            for row in graded:
                tally.add(row)
        verdicts.finish(target)
    return {"benchmark": benchmark, **tally.summary()}


def _grade_rows(
    asked: Iterator[tuple[dict, Request]], pool: Pool, limit: float, workers: int
) -> Iterator[list[dict[str, Any]]]:  # fmt: skip
    """The rows with their verdicts, batch by batch in order; a few batches for each worker are on their way at a time."""
    waiting: deque[tuple[list[dict], Future[list[Verdict]]]] = deque()
    batches = _batches(asked)
    while True:
        while len(waiting) < 3 * workers and (batch := next(batches, None)):
            waiting.append(([row for row, _ in batch], pool.submit([request for _, request in batch], limit)))
        if not waiting:
            return
        rows, verdicts = waiting.popleft()
        yield [{**row, **vars(verdict)} for row, verdict in zip(rows, verdicts.result(), strict=True)]


def _batches(asked: Iterator[tuple[dict, Request]]) -> Iterator[list[tuple[dict, Request]]]:
    batch: list[tuple[dict, Request]] = []
    size = 0
    for row, request in asked:
        batch.append((row, request))
        size += len(request[0])
        if len(batch) == BATCH_ROWS or size > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# One answer at a time

_shared = Worker()
_lock = threading.Lock()
atexit.register(_shared.close)


def _after_fork() -> None:
    """The lock may have been held by a thread that the new process does not have."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def grade_in_child(answer: str, gold: str, limit: float = LIMIT) -> Verdict:
    """The verdict on an answer by the process that all callers share; it is started on first use and ends with this one."""
    with _lock:
        try:
            return _shared.grade([(answer, gold, True)], limit)[0]
        except BaseException:
            _shared.close()
            raise
