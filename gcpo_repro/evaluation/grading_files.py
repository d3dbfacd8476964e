"""Files of responses and of verdicts: rows in, checked before anything is graded, and verdicts out, kept through a kill."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import UserError
from .grading import NO_ANSWER, TIMED_OUT, spelled_gold
from .rows import read_rows

Request = tuple[str, str, bool]  # text, gold, whether the text is nothing but the answer
FIELDS = {"correct": bool, "answer": str | None, "reason": str}

# Responses


def requests(path: Path, golds: Golds) -> Iterator[tuple[dict, Request]]:
    """({id, sample}, request) for each row of the file; UserError with the line of what is wrong."""
    for where, row in read_rows(path, "responses"):
        _check_row(row, f"responses: {where}")
        gold = row.get("gold")
        gold = golds.of(row["id"], f"responses: {where}") if gold is None else str(gold)
        if not spelled_gold(gold):
            raise UserError(f"responses: {where}: the gold answer of id {row['id']!r} is empty; mend or leave out this row")
        yield {key: row[key] for key in ("id", "sample") if key in row}, (row["response"] or "", gold, False)


def _check_row(row: dict[str, Any], where: str) -> None:
    for column in ("id", "response"):
        if column not in row:
            raise UserError(f"{where}: no {column!r} among {', '.join(map(repr, list(row)[:10])) or 'no columns'}; add it")
    if not isinstance(row["id"], str | int) or isinstance(row["id"], bool):
        raise UserError(f"{where}: id {row['id']!r:.50} is a {type(row['id']).__name__}; give a string or a whole number")
    if not isinstance(row["response"], str | None):
        raise UserError(f"{where}: the response is a {type(row['response']).__name__}; give one string a row")
    for column in ("gold", "sample"):
        value = row.get(column)
        plain = isinstance(value, str | int | float | None) and not isinstance(value, bool)
        if not plain or (isinstance(value, float) and not math.isfinite(value)):
            raise UserError(f"{where}: the {column} {value!r:.50} is a {type(value).__name__}; give one string or finite number")


def examine(path: Path, golds: Golds, settings: list[Any]) -> tuple[int, str]:
    """The number of rows, all of which can be graded, and a hash of them, their golds, the settings and the grader."""
    digest = hashlib.sha256(json.dumps([settings, _grader()]).encode())
    rows = 0
    for row in requests(path, golds):
        digest.update(json.dumps(row).encode())
        rows += 1
    return rows, digest.hexdigest()


@cache
def _grader() -> list[str]:
    """What a verdict depends on besides the row: this code, and the libraries'."""
    code = b"".join(source.read_bytes() for source in sorted(Path(__file__).parent.glob("grading*.py")))
    return [hashlib.sha256(code).hexdigest(), *(metadata.version(name) for name in ("math-verify", "sympy"))]


class Golds:
    """The golds by id, loaded when the first row needs one."""

    def __init__(self, benchmark: str, data: str | Path | None, golds: Mapping[Any, str] | None) -> None:
        self.benchmark, self.data = benchmark, data
        self.golds = None if golds is None else {str(key): str(gold) for key, gold in golds.items()}

    def of(self, key: Any, where: str) -> str:
        if self.golds is None:
            from .benchmarks import load

            self.golds = {str(row["id"]): str(row["answer"]) for row in load(self.benchmark, self.data)}
        if str(key) not in self.golds:
            some = ", ".join(map(repr, list(self.golds)[:3]))
            raise UserError(
                f"{where}: id {key!r:.80} is not among the {len(self.golds)} of {self.benchmark} (such as {some}); are these the "
                "responses to another benchmark? Or add a column 'gold'"
            )
        return self.golds[str(key)]


# Verdicts


class Verdicts:
    """A file of verdicts in the making, held against a second process; `kept` are those of a grading that was stopped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "a+b")
        except OSError as error:
            raise UserError(f"out: cannot write {str(path)!r} ({error.strerror or error}); name another file") from error
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise UserError(f"out: another process is writing {str(path)!r}; wait for it, or name another file") from None
        self.kept = self._read()

    def _read(self) -> list[dict[str, Any]]:
        """The whole lines from the beginning; what follows a torn one is cut off."""
        kept, whole = [], 0
        self.file.seek(0)
        for line in self.file:
            try:
                row = json.loads(line)
                sound = line.endswith(b"\n") and all(isinstance(row[field], kind) for field, kind in FIELDS.items())
            except (ValueError, KeyError, TypeError):
                sound = False
            if not sound:
                break
            kept.append(row)
            whole += len(line)
        self.file.truncate(whole)
        return kept

    def append(self, rows: list[dict[str, Any]]) -> None:
        try:
            self.file.write("".join(f"{json.dumps(row)}\n" for row in rows).encode())
            self.file.flush()
        except OSError as error:
            raise self._unwritable(error) from error

    def finish(self, target: Path) -> None:
        """Give the complete file its name."""
        try:
            os.fsync(self.file.fileno())
            os.replace(self.path, target)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"out: cannot write {str(self.path)!r} ({error.strerror or error}); what was graded is kept: the same "
                         "command goes on once there is space, or name another file")  # fmt: skip

    def __enter__(self) -> Verdicts:
        return self

    def __exit__(self, *_: object) -> None:
        if self.path.exists() and not self.path.stat().st_size:
            self.path.unlink()
        with suppress(OSError):  # told already
            self.file.close()


class Tally:
    """Counts of verdicts."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.ids: set[str] = set()
        self.correct = 0

    def add(self, row: dict[str, Any]) -> None:
        self.ids.add(str(row["id"]))
        self.correct += row["correct"]
        if not row["correct"]:
            self.reasons[row["reason"]] += 1

    def summary(self) -> dict[str, Any]:
        """{rows, ids, correct, no_answer, timed_out, wrong: {reason: rows}}."""
        return {
            "rows": self.correct + self.reasons.total(), "ids": len(self.ids), "correct": self.correct,
            "no_answer": sum(self.reasons[reason] for reason in NO_ANSWER), "timed_out": self.reasons[TIMED_OUT],
            "wrong": dict(self.reasons.most_common()),
        }  # fmt: skip
