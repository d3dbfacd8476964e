"""Checkpoints as folders: written whole or not at all, the newest whole one found again, the two newest kept.

`trainer/checkpoint-<step>/` holds TRL's files, `gcpo_state.json` (what TRL loses, see `resuming.py`) and, written last,
`manifest.json` with the size and SHA-256 of each file. A folder that its manifest doesn't describe was torn or damaged:
it is told, removed, and the one before it used.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError
from .provenance import write_json

MANIFEST = "manifest.json"
STATE = "gcpo_state.json"
KEPT = 2
RESUME = ("auto", "never")


def checkpoint_folder(out: str | Path, step: int) -> Path:
    """Where the trainer of the arm in `out` writes the checkpoint of an optimiser step."""
    return Path(out) / "trainer" / f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(out: str | Path) -> list[Path]:
    """All checkpoints in the arm's folder `out`, whole or not, the newest first."""
    found = [path for path in (Path(out) / "trainer").glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=step_of, reverse=True)


def newest(out: str | Path) -> Path | None:
    """The newest checkpoint that was written to its end; its files are not read again (`prepare` does that)."""
    return next((path for path in checkpoints(out) if (path / MANIFEST).exists()), None)


def seal(checkpoint: Path) -> None:
    """Write the manifest, once every file of the checkpoint is on the disk."""
    files = {}
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST):
        _sync(file)
        files[file.relative_to(checkpoint).as_posix()] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    _sync(checkpoint)
    _sync(write_json(checkpoint / MANIFEST, {"files": files}))
    _sync(checkpoint)


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint's files; empty if they are what its manifest says."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"].items()
        for name, told in files:
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != told["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {told['bytes']}"
            if _sha256(file) != told["sha256"]:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return "it was not written to its end"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({error})"
    return ""


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / STATE).read_text())


def rotate(out: str | Path, kept: int = KEPT) -> None:
    """Remove all checkpoints but the newest `kept` whole ones."""
    whole = [path for path in checkpoints(out) if (path / MANIFEST).exists()]
    for path in checkpoints(out):
        if path not in whole[:kept]:
            remove(path)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint. Its manifest goes first: what is left of a deletion that was cut short looks torn."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def prepare(out: str | Path, settings: dict[str, Any], resume: str = "auto", say: Callable[[str], object] = print) -> Path | None:
    """The checkpoint with which a training in `out` goes on; None: it starts from the beginning. Says which.

    Args:
        out: folder of one arm.
        settings: those that shape the result (`settings.shaping`).
        resume: "auto" goes on from the newest whole checkpoint, "never" removes what there is.
        say: receives one line at a time.

    Raises:
        UserError: the checkpoint belongs to other settings, whose names and values are told; an unknown `resume`.
    """
    if resume not in RESUME:
        raise UserError(f"resume: {resume!r} is unknown, choose from {', '.join(RESUME)}")
    if resume == "never":
        rotate(out, kept=0)
        return None
    for path in checkpoints(out):
        reason = damage(path)
        if not reason:
            _refuse_other_settings(path, settings)
            say(f"goes on from step {step_of(path)} ({path})")
            return path
        say(f"{path.name}: {reason}; it is removed and the one before it is used")
        remove(path)
    say(f"starts from the beginning: no checkpoint in {out}")
    return None


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Hold `out` for this process: two that train in one folder would mix their files.

    The system frees the lock with the process, however that ends, and forked helpers don't inherit it.

    Raises:
        UserError: another process holds it.
    """
    path = out / "training.lock"
    with path.open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise UserError(f"out: process {file.read()} trains in {str(out)!r}; wait for it or choose another folder") from None
        except OSError:
            pass  # some network folders know no locks
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _refuse_other_settings(checkpoint: Path, settings: dict[str, Any]) -> None:
    stored = read_state(checkpoint)["settings"]
    changed = [name for name in {**stored, **settings} if stored.get(name) != settings.get(name)]
    if changed:
        told = ", ".join(f"{name} ({stored.get(name)!r}, now {settings.get(name)!r})" for name in changed)
        raise UserError(
            f"resume: {checkpoint} was made with other settings: {told}. Give those to go on; --resume never starts from the "
            "beginning and removes the checkpoint; or choose another --out"
        )


def _sha256(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """To the disk itself: a manifest must not survive a power cut that its files don't."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network folders cannot sync a folder
        if not path.is_dir():
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(handle)
