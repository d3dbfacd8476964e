"""Runs the notebooks through papermill, and believes only what it has seen.

papermill 2.7 warns about a misspelt parameter and goes on, calls a killed kernel's notebook complete, and
calls `sys.exit(0)` a success. Here parameters are checked before anything starts, every code cell must have
run, and `success.json` is written last: a notebook's folder without that file is not a result.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from papermill.exceptions import strip_color

from gcpo_repro.errors import UserError
from gcpo_repro.provenance import DISK_FULL, record, versions, write_json

from .execution import Echo, Log, through_papermill, unfinished, why
from .parameters import declared_parameters, read_notebook, read_parameters
from .run_folders import FAILURE, MARKER, check_writable, list_runs, locked, marker

__all__ = ["PROFILES", "declared_parameters", "list_runs", "notebooks_folder", "read_parameters", "reproduce", "runs_folder"]

PROFILES = ("smoke", "cpu", "t4", "gpu24", "gpu80", "paper")
PACKAGE = Path(__file__).resolve().parents[1]
READS_RUN = "reads-run"  # tag of a cell that reads what other notebooks of the run wrote


def notebooks_folder() -> Path:
    """The clone's `notebooks/`, beside the package folder.

    Raises:
        UserError: the package is installed without its repository.
    """
    folder = PACKAGE.parent / "notebooks"
    if not (folder / "profiles").is_dir():
        raise UserError(
            f"`reproduce` works from a clone of the repository, and {folder} is not there: the installed "
            "package holds no notebooks. `git clone` the repository (`pip show -v gcpo-repro` gives its "
            "address) and run `make reproduce` in it."
        )
    return folder


def runs_folder() -> Path:
    """Where results go unless the user says otherwise: `runs/` of the clone; outside a clone, of the current folder."""
    clone = PACKAGE.parent
    return (clone if (clone / "notebooks").is_dir() else Path.cwd()) / "runs"


def reproduce(
    profile: str = "cpu",
    out: str | Path | None = None,
    only: Sequence[str] = (),
    force: bool = False,
    notebooks: str | Path | None = None,
    echo: Echo = print,
    with_report: bool = True,
) -> bool:
    """Run the notebooks of one profile in order; True if each of them succeeded, now or before.

    Each notebook gets a folder `out/<stem>/` with the executed notebook, `log.txt`, what the notebook writes
    into its parameter `out_dir` (if it declares one) and, last of all, `success.json` or `failure.json`. `out/run.json` tells
    the state of the whole. A failure doesn't stop the notebooks after it. The last step, also after a failure, is
    the web page `out/report/index.html` (`report.build`).

    Args:
        profile: one of `PROFILES`; the parameters are `notebooks/profiles/<profile>/<stem>.yaml`, and a
            notebook without such a file is not part of the profile.
        out: folder of the results (default: `runs/<profile>` in the clone).
        only: run these alone, named like "05" or "05_train_qlora" (default: all).
        force: run again what already succeeded with the same inputs.
        notebooks: folder of the notebooks (default: the clone's); they run in its parent folder.
        echo: receives one plain line at a time.
        with_report: make the web page.

    Raises:
        UserError: bad arguments, parameters or output folder (before any work), or a full disk.
        KeyboardInterrupt: passed on, once the kernel is shut down and the state is written.
    """
    folder = Path(notebooks).absolute() if notebooks else notebooks_folder()
    out = Path(out).absolute() if out else folder.parent / "runs" / profile
    files = _profile_files(folder, profile, echo)
    chosen = _choose(folder, files, only)
    package = _package_hash()
    jobs = [_job(folder / f"{name}.ipynb", files[name], out / name, package) for name in chosen]
    check_writable(out)
    with locked(out):
        run = _Run(profile, out, {name: "done" if marker(out / name) else "pending" for name in files})
        succeeded = _execute_all(jobs, run, force, echo)
        if with_report:
            from . import report  # Sphinx only here: every notebook imports this module

            echo(f"report: {report.build(out)}")
    return succeeded


# --- what is to be run -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """One notebook with its checked parameters, and the hash of all that shapes its results."""

    notebook: Path
    folder: Path
    parameters: dict[str, Any]  # what papermill injects
    effective: dict[str, Any]  # those and the notebook's defaults
    inputs: str
    reads_run: bool  # what the other notebooks left in the run is an input, too

    @property
    def name(self) -> str:
        return self.notebook.stem

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"


def _profile_files(folder: Path, profile: str, echo: Echo) -> dict[str, Path]:
    """The parameter file of each notebook of the profile, in order."""
    if profile not in PROFILES:
        raise UserError(f"profile: {profile!r} is unknown; choose one of {', '.join(PROFILES)}.")
    files = {path.stem: path for path in sorted((folder / "profiles" / profile).glob("*.yaml"))}
    known = _notebooks(folder)
    for name in files.keys() - set(known):
        raise UserError(f"{files[name]}: no notebook {name}.ipynb in {folder}; rename or remove the file.")
    if not files:
        ready = ", ".join(sorted(path.parent.name for path in (folder / "profiles").glob("*/00_*.yaml"))) or "none"
        raise UserError(f"profile: {profile!r} has no files in {folder / 'profiles'} yet; those that have: {ready}.")
    for name in known:
        if name not in files:
            echo(f"{name}: not part of profile {profile} (no profiles/{profile}/{name}.yaml)")
    return files


def _notebooks(folder: Path) -> list[str]:
    return [path.stem for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))]


def _choose(folder: Path, files: dict[str, Path], only: Sequence[str]) -> list[str]:
    """The notebooks named by `only`, by number or whole name, in the profile's order; all if it is empty."""
    known = _notebooks(folder)
    wanted = set()
    for name in (name.removesuffix(".ipynb") for name in only):
        matches = [stem for stem in known if name in (stem, stem.split("_")[0])]
        if not matches:
            raise UserError(f"only: {name!r} is no notebook; the known ones are {', '.join(known)}.")
        if not files.keys() & set(matches):
            raise UserError(f"only: {name!r} is not part of this profile, which has {', '.join(files)}.")
        wanted.update(matches)
    return [stem for stem in files if not only or stem in wanted]


def _job(notebook: Path, file: Path, folder: Path, package: str) -> _Job:
    defaults = declared_parameters(notebook)
    parameters = read_parameters(file, defaults)
    cells = [(cell.cell_type, cell.source) for cell in read_notebook(notebook).cells]
    inputs = hashlib.sha256(json.dumps([cells, parameters, package]).encode()).hexdigest()
    # The output folder is no input: moving the results must not make them stale.
    place = {"out_dir": str(folder)} if "out_dir" in defaults else {}
    reads_run = any(READS_RUN in cell.metadata.get("tags", []) for cell in read_notebook(notebook).cells)
    return _Job(notebook, folder, parameters | place, defaults | parameters | place, inputs, reads_run)


def _with_results(job: _Job) -> _Job:
    """The job as it is now: its inputs change with the results of the others in the run, if it reads them."""
    if not job.reads_run:
        return job
    others = sorted(path for path in job.folder.parent.glob(f"[0-9][0-9]_*/{MARKER}") if path.parent != job.folder)
    told = [[path.parent.name, path.read_text()] for path in others]
    return replace(job, inputs=hashlib.sha256(json.dumps([job.inputs, told]).encode()).hexdigest())


def _package_hash() -> str:
    """Hash of the package's files (source and data) and of the versions that it runs with."""
    digest = hashlib.sha256(json.dumps(versions()).encode())
    for path in sorted(PACKAGE.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(PACKAGE)} ".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


# --- running -----------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """What `run.json` says, on disk after each change, so that a killed run can be recognised."""

    profile: str
    out: Path
    notebooks: dict[str, str]  # name -> pending, running, done, failed or interrupted

    def mark(self, name: str, state: str) -> None:
        self.notebooks[name] = state
        self.write("running")

    def close(self, state: str) -> None:
        """Write the final state, also of a running notebook. On a full disk the file stays as it is."""
        self.notebooks = {name: state if old == "running" else old for name, old in self.notebooks.items()}
        with suppress(OSError):
            self.write(state)

    def write(self, state: str) -> None:
        head = {"kind": "reproduce", "state": state, "pid": os.getpid(), "profile": self.profile}
        write_json(self.out / "run.json", head | {"notebooks": self.notebooks})


def _execute_all(jobs: list[_Job], run: _Run, force: bool, echo: Echo) -> bool:
    failed: dict[str, str] = {}
    try:
        for number, job in enumerate(jobs, 1):
            job = _with_results(job)
            label = f"[{number}/{len(jobs)}] {job.name}"
            if not force and marker(job.folder).get("inputs") == job.inputs:
                echo(f"{label}: skipped, it succeeded before with the same inputs (--force runs it again)")
                continue
            run.mark(job.name, "running")
            if reason := _execute(job, label, run.profile, echo):
                failed[job.name] = reason
            run.mark(job.name, "failed" if reason else "done")
    except KeyboardInterrupt:
        run.close("interrupted")
        echo(f"interrupted: what succeeded is kept in {run.out}; the same command goes on from there.")
        raise
    except OSError as error:
        run.close("failed")
        remedy = "free some space" if error.errno in DISK_FULL else "make the folder writable"
        raise UserError(
            f"out: stopped, {run.out} cannot be written ({error}): {remedy} and give the same command again; "
            "what succeeded is kept and will be skipped."
        ) from None
    except BaseException:
        run.close("failed")
        raise
    others = set(run.notebooks.values()) - {"done"}
    run.close("failed" if failed else "incomplete" if others else "done")
    _summarise(jobs, failed, run.out, echo)
    return not failed


def _summarise(jobs: list[_Job], failed: dict[str, str], out: Path, echo: Echo) -> None:
    if not failed:
        echo(f"all {len(jobs)} notebooks succeeded; results in {out}")
        return
    echo(f"{len(failed)} of {len(jobs)} notebooks failed:")
    for job in jobs:
        if job.name in failed:
            echo(f"  {job.name}: {failed[job.name]}")
            echo(f"    log: {job.log}")


def _execute(job: _Job, label: str, profile: str, echo: Echo) -> str:
    """Run one notebook; why it failed, in one line, or an empty string once its success marker stands."""
    started = time.time()
    echo(f"{label}: started")
    job.folder.mkdir(exist_ok=True)
    for name in (MARKER, FAILURE):
        (job.folder / name).unlink(missing_ok=True)
    with job.log.open("w") as file:
        log = Log(file, label, echo)
        try:
            reason = unfinished(through_papermill(job.notebook, job.folder, job.parameters, log))
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise
            log.write(strip_color(f"\n{type(error).__name__}: {error}\n"))
            reason = why(error)
    if reason:
        write_json(job.folder / FAILURE, {"notebook": job.name, "profile": profile, "reason": reason})
    else:
        seed = job.effective.get("seed", job.effective.get("seeds", []))
        done = {"notebook": job.name, "profile": profile, "inputs": job.inputs}
        write_json(job.folder / MARKER, done | record(job.effective, seed, started))
    echo(f"{label}: {'FAILED' if reason else 'done'} after {time.time() - started:.0f} s {reason}".rstrip())
    return reason
