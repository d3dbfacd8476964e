"""What every result file records: config, seed, versions, git commit, hardware, wall time."""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
PACKAGES = (
    "gcpo-repro", "torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets",
    "numpy", "matplotlib", "seaborn", "papermill",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Installed version of Python and of each package the results depend on ("not installed" if absent)."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit() -> str:
    """Commit of the checkout that holds this package, "-dirty" appended if changed; "unknown" without git."""
    here = Path(__file__).resolve().parent
    try:
        # A package installed inside somebody else's repository must not report that repository's commit.
        top = _git(here, "rev-parse", "--show-toplevel")
        if Path(top).resolve() != here.parent:
            return "unknown"
        dirty = _git(here, "status", "--porcelain", "--untracked-files=no")
        return _git(here, "rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()


def hardware() -> dict[str, Any]:
    """Machine, CPU model, usable cores, memory in GiB, and each CUDA device with its memory in GiB."""
    import psutil
    import torch

    gpus = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "torch_threads": torch.get_num_threads(),
        "gpus": [{"name": g.name, "memory_gib": round(g.total_memory / 2**30, 1)} for g in gpus],
    }


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def record(config: dict[str, Any], seed: int | list[int], started: float) -> dict[str, Any]:
    """The provenance block of a result file.

    Args:
        config: every setting that shaped the result.
        seed: the seed, or all seeds, from which every random draw came.
        started: `time.time()` at the start of the work; the wall time is counted from here.
    """
    return {
        "config": config,
        "seed": seed,
        "versions": versions(),
        "commit": git_commit(),
        "hardware": hardware(),
        "command": sys.argv,
        "started_unix": round(started, 1),
        "wall_time_seconds": round(time.time() - started, 2),
    }


def write_json(path: str | Path, content: Any) -> Path:
    """Write JSON so that the file is either whole or absent: to a neighbour first, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


@contextmanager
def run_state(out: Path, kept: str = "", **what: Any) -> Iterator[None]:
    """`run.json` in `out` tells how a run stands, with what is given: running, then done, failed or interrupted.

    kept: what a full disk, told in one message (UserError), does not lose.
    """
    state = {**what, "pid": os.getpid()}
    write_json(out / "run.json", {**state, "state": "running"})
    ended = "failed"
    try:
        yield
        ended = "done"
    except KeyboardInterrupt:
        ended = "interrupted"
        raise
    except Exception as error:
        if _disk_full(error):
            raise UserError(f"out: {str(out)!r} is on a full disk; free some space and run again{kept}") from error
        raise
    finally:
        try:
            write_json(out / "run.json", {**state, "state": ended})
        except OSError as error:  # a full disk must not hide the error that came first
            print(f"run.json could not be written: {error}", file=sys.stderr)


def _disk_full(error: Exception) -> bool:
    """safetensors, which writes the adapters, tells a full disk in its text alone."""
    return getattr(error, "errno", None) in DISK_FULL or any(f"(os error {number})" in str(error) for number in DISK_FULL)
