"""Folders of results: held by one process, marked when done, listed with their state."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from gcpo_repro.errors import UserError

MARKER = "success.json"
FAILURE = "failure.json"  # why a notebook failed; neither file: it never ran, or was killed
REPORT = "report.json"  # what every web page of a run has in its folder, which is no part of the run


def check_writable(out: Path) -> None:
    """Make the folder and write to it. Raises UserError: it cannot be written, or its disk is full."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as probe:
            probe.write(bytes(2**20))
            probe.flush()
            os.fsync(probe.fileno())  # some file systems notice a full disk only here
    except OSError as error:
        raise UserError(
            f"out: cannot write into {out} ({error}); free some space, make it writable or give another."
        ) from None


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold `out` for this process. The system frees the lock of a dead process: it can't go stale."""
    with (out / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"out: {out} is being written by process {file.read()}; wait for it or give another folder."
            ) from None
        except OSError:
            pass  # some network folders know no locks
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def marker(folder: Path) -> dict[str, Any]:
    """A notebook's success marker; empty without one, or without the executed notebook beside it."""
    return read_json(folder / MARKER) if (folder / f"{folder.name}.ipynb").exists() else {}


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty for a missing file, a broken one or another kind of content."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def in_report(path: Path) -> bool:
    """Whether the path lies in the web page of a run, which has copies of the run's files."""
    return any((parent / REPORT).exists() for parent in path.parents)


def list_runs(root: str | Path) -> list[dict[str, Any]]:
    """Each run below the folder `root` (usually `runs/`), by name; none if the folder is absent.

    A run is a folder with `run.json`, `results.json` or `config.json` (training) or with notebooks' folders
    (`reproduce`). The keys: name (path below root), kind ("reproduce" or "train"), state ("done", "failed",
    "running", "interrupted", "incomplete"), size (bytes), modified (local time, as "2026-11-24 09:30").
    """
    runs = []
    for path, folders, files in os.walk(root):
        if REPORT in files:
            folders.clear()
            continue
        notebooks = [f for f in folders if (Path(path) / f / "log.txt").exists()]
        notebooks += [f for f in folders if (Path(path) / f / MARKER).exists()]
        if path != str(root) and (notebooks or {"run.json", "results.json", "config.json"} & set(files)):
            folders.clear()  # what lies deeper belongs to this run
            runs.append(_describe(Path(path), Path(root), "reproduce" if notebooks else "train"))
    return sorted(runs, key=lambda run: run["name"])


def _describe(folder: Path, root: Path, kind: str) -> dict[str, Any]:
    stats = [folder.stat()]
    for path in folder.rglob("*"):
        with suppress(OSError):  # a running run removes files
            stats.append(path.lstat())
    run = read_json(folder / "run.json")
    state = run.get("state") or ("done" if (folder / "results.json").exists() else "incomplete")
    if state == "running" and not alive(run.get("pid"), (folder / "run.json").stat().st_mtime):
        state = "interrupted"
    return {
        "name": str(folder.relative_to(root)),
        "kind": run.get("kind", kind),
        "state": state,
        "size": sum(s.st_size for s in stats if not stat.S_ISDIR(s.st_mode)),
        "modified": time.strftime("%Y-%m-%d %H:%M", time.localtime(max(s.st_mtime for s in stats))),
    }


def alive(pid: Any, wrote: float) -> bool:
    """Whether the process that wrote at that time still runs; a younger one has only inherited its number."""
    if not isinstance(pid, int):
        return False
    try:
        process = psutil.Process(pid)
        return bool(process.status() != psutil.STATUS_ZOMBIE and process.create_time() < wrote + 1)
    except (psutil.Error, ValueError):
        return False
