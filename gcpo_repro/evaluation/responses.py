"""The responses of one evaluation on disk: appended as they come, read back after a kill, never asked for twice."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from .. import provenance
from ..errors import UserError

Key = tuple[str, str, int]  # benchmark, id, sample
FIELDS = {"benchmark": str, "id": str, "sample": int, "response": str, "tokens": int, "truncated": bool}


class Responses:
    """`responses.jsonl` and `config.json` in a folder; a context manager that holds the folder against a second process.

    A line is {"benchmark", "id", "sample", "response", "tokens", "truncated"}. A torn last line is cut off.

    Args:
        out: the folder, made if absent.
        config: what shapes the responses; a folder with responses to another one is refused.
        asked: every (benchmark, id, sample) of the evaluation.

    Raises:
        UserError: another configuration, a folder in use or not writable, a broken line (file and line), a response to
            something that is not asked, two for the same.
    """

    def __init__(self, out: Path, config: dict[str, Any], asked: set[Key]) -> None:
        self.path = out / "responses.jsonl"
        self.kept: dict[Key, dict[str, Any]] = {}
        config = json.loads(json.dumps(config))  # as it will be read back
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a+b")
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._check_config(out / "config.json", config)
                self._read(asked)
            except BaseException:
                self.file.close()
                raise
        except BlockingIOError:
            raise UserError(f"out: another evaluation is writing to {str(out)!r}; choose another folder or wait for it") from None
        except OSError as error:
            raise self._unwritable(error) from error

    def __enter__(self) -> Responses:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def append(self, lines: list[dict[str, Any]]) -> int:
        """Keep responses that are not there yet, and return how many; they are on disk then."""
        new = [line for line in lines if self.key(line) not in self.kept]
        try:
            self.file.write(b"".join(json.dumps(line).encode() + b"\n" for line in new))
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error
        self.kept |= {self.key(line): line for line in new}
        return len(new)

    @staticmethod
    def key(line: dict[str, Any]) -> Key:
        return line["benchmark"], line["id"], line["sample"]

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"out: cannot write to {str(self.path.parent)!r} ({error.strerror or error}); free some space or choose another "
            "folder; what was written is kept"
        )

    def _check_config(self, path: Path, config: dict[str, Any]) -> None:
        if not self.path.stat().st_size:  # nothing that could be mixed up
            provenance.write_json(path, config)
            return
        try:
            old = json.loads(path.read_bytes())
            changed = [key for key in sorted(old.keys() | config.keys()) if old.get(key) != config.get(key)]
        except (FileNotFoundError, ValueError, AttributeError) as error:
            raise UserError(f"out: {str(path)!r} is missing or broken ({error}); choose another folder") from None
        if changed:
            said = "; ".join(f"{key}: {old.get(key)!r:.80} there, {config.get(key)!r:.80} now" for key in changed)
            raise UserError(f"out: {str(path.parent)!r} holds another evaluation ({said}); choose another folder")

    def _read(self, asked: set[Key]) -> None:
        self.file.seek(0)
        content = self.file.read()
        whole = content.rfind(b"\n") + 1
        lines = content[:whole].splitlines(keepends=True)
        if lines and self._parsed(lines[-1]) is None:  # a block of zeros, say, after a power cut
            whole -= len(lines.pop())
        if whole < len(content):
            self.file.truncate(whole)
        for number, raw in enumerate(lines, 1):
            line, where = self._parsed(raw), f"{self.path}, line {number}"
            if line is None:
                raise UserError(f"out: {where} is broken; remove it (its response is asked again), or choose another folder")
            key = self.key(line)
            if key not in asked:
                raise UserError(f"out: {where} answers {key}, which this evaluation does not ask; choose another folder")
            if key in self.kept:
                raise UserError(f"out: {where} answers {key} a second time; remove the line or choose another folder")
            self.kept[key] = line

    @staticmethod
    def _parsed(raw: bytes) -> dict[str, Any] | None:
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            return None
        whole = isinstance(line, dict) and all(type(line.get(field)) is kind for field, kind in FIELDS.items())
        return line if whole else None
