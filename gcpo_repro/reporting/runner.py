"""Runs the notebooks through papermill, and believes only what it has seen.

papermill 2.7 warns about a misspelt parameter and goes on, calls a killed kernel's notebook complete, and
calls `sys.exit(0)` a success. Here parameters are checked before anything starts, every code cell must have
run, and `success.json` is written last: a notebook's folder without that file is not a result.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import io
import json
import logging
import math
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import nbformat
import papermill
import psutil
import yaml
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError, strip_color
from papermill.iorw import load_notebook_node, read_yaml_file
from papermill.translators import PythonTranslator
from traitlets import default

from gcpo_repro.errors import UserError
from gcpo_repro.provenance import DISK_FULL, record, versions, write_json

PROFILES = ("smoke", "cpu", "t4", "gpu24", "gpu80", "paper")
PACKAGE = Path(__file__).resolve().parents[1]
MARKER = "success.json"
SCALARS = (bool, int, float, str)
SECONDS_BETWEEN_LINES = 10.0  # of progress inside one notebook

Echo = Callable[[str], object]


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
) -> bool:
    """Run the notebooks of one profile in order; True if each of them succeeded, now or before.

    Each notebook gets a folder `out/<stem>/` with the executed notebook, `log.txt`, what the notebook writes
    into its parameter `out_dir` (if it declares one) and, last of all, `success.json`. `out/run.json` tells
    the state of the whole. A failure doesn't stop the notebooks after it.

    Args:
        profile: one of `PROFILES`; the parameters are `notebooks/profiles/<profile>/<stem>.yaml`, and a
            notebook without such a file is not part of the profile.
        out: folder of the results (default: `runs/<profile>` in the clone).
        only: run these alone, named like "05" or "05_train_qlora" (default: all).
        force: run again what already succeeded with the same inputs.
        notebooks: folder of the notebooks (default: the clone's); they run in its parent folder.
        echo: receives one plain line at a time.

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
    _check_writable(out)
    with _locked(out):
        run = _Run(profile, out, {name: "done" if _marker(out / name) else "pending" for name in files})
        return _execute_all(jobs, run, force, echo)


# --- what is to be run -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """One notebook with its checked parameters, and the hash of all that shapes its results."""

    notebook: Path
    folder: Path
    parameters: dict[str, Any]  # what papermill injects
    effective: dict[str, Any]  # those and the notebook's defaults
    inputs: str

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
    cells = [(cell.cell_type, cell.source) for cell in _read_notebook(notebook).cells]
    inputs = hashlib.sha256(json.dumps([cells, parameters, package]).encode()).hexdigest()
    # The output folder is no input: moving the results must not make them stale.
    place = {"out_dir": str(folder)} if "out_dir" in defaults else {}
    return _Job(notebook, folder, parameters | place, defaults | parameters | place, inputs)


def _package_hash() -> str:
    """Hash of the package's files (source and data) and of the versions that it runs with."""
    digest = hashlib.sha256(json.dumps(versions()).encode())
    for path in sorted(PACKAGE.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(PACKAGE)} ".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


# --- parameters --------------------------------------------------------------------------------------------


def declared_parameters(notebook: Path) -> dict[str, Any]:
    """Name and default of each parameter in the notebook's cell tagged `parameters`.

    Raises:
        UserError: no such cell or several, anything in it but `name = literal` of int, float, str, bool or a
            flat list, or a line that papermill itself cannot read.
    """
    nb = _read_notebook(notebook)
    cells = [c for c in nb.cells if c.cell_type == "code" and "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise UserError(f"{notebook}: {len(cells)} code cells are tagged 'parameters'; tag exactly one.")
    try:
        defaults = dict(_assignment(statement) for statement in ast.parse(cells[0].source).body)
    except (SyntaxError, ValueError) as error:
        raise UserError(
            f"{notebook}: the parameters cell may hold only lines `name = value  # meaning` with an int, "
            f"float, str, bool or flat list: {error}."
        ) from None
    with _papermill_logs_to(io.StringIO()):
        seen = {parameter.name for parameter in PythonTranslator.inspect(cells[0])}
    for name in defaults.keys() - seen:
        raise UserError(
            f"{notebook}: papermill does not see the parameter {name!r}: remove annotations other than int, "
            "float, str, bool and list, and any second '=' on its line (in the comment, too)."
        )
    return defaults


def _assignment(statement: ast.stmt) -> tuple[str, Any]:
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)], value=node):
            value = ast.literal_eval(node)
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as node, annotation=annotation):
            value = ast.literal_eval(node)
            if ast.unparse(annotation) == "float" and type(value) is int:
                value = float(value)
        case _:
            raise ValueError(f"not a plain assignment: {ast.unparse(statement)}")
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, SCALARS):
            raise ValueError(f"not a plain value: {ast.unparse(statement)}")
    return name, value


def read_parameters(file: Path, defaults: dict[str, Any]) -> dict[str, Any]:
    """The parameters in a YAML file, read as `papermill -f` reads them and checked against the defaults.

    Raises:
        UserError: unreadable file, not a mapping, an unknown name, or a value of another type than the
            default (an int serves as a float; True is not an int; the items of a list are compared likewise).
    """
    try:
        content = read_yaml_file(str(file)) or {}
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read as YAML: {_one_line(str(error))}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds a {type(content).__name__}; write lines of `name: value`.")
    for name in content:
        if name not in defaults:
            known = ", ".join(sorted(defaults)) or "no parameters"
            raise UserError(f"{file}: unknown parameter {name!r}; the notebook {file.stem} has {known}.")
        if name == "out_dir":
            raise UserError(f"{file}: out_dir is set by the runner; remove the line.")
    return {name: _checked(f"{file}: {name}", value, defaults[name]) for name, value in content.items()}


def _checked(label: str, value: Any, default: Any) -> Any:
    """The value in the default's type."""
    items = value if isinstance(value, list) else [value]
    kinds = {type(x) for x in default} or set(SCALARS) if isinstance(default, list) else {type(default)}
    if float in kinds and int not in kinds:
        items = [float(x) if type(x) is int else x for x in items]
    allowed = kinds | {int} if float in kinds else kinds
    if isinstance(value, list) != isinstance(default, list) or any(type(x) not in allowed for x in items):
        number_as_text = any(isinstance(x, str) for x in items) and float in kinds
        hint = " YAML 1.1 takes 1e-6 for text: write 1.0e-6." if number_as_text else ""
        raise UserError(f"{label}: {value!r} is not of the same type as the default {default!r}.{hint}")
    if any(isinstance(x, float) and not math.isfinite(x) for x in items):
        raise UserError(f"{label}: {value!r} is not a finite number; give one.")
    return items if isinstance(value, list) else items[0]


def _read_notebook(path: Path) -> Any:
    try:
        return load_notebook_node(str(path))
    except (OSError, ValueError, KeyError, AttributeError, nbformat.ValidationError) as error:
        raise UserError(f"{path}: not a readable notebook ({_one_line(str(error))}); restore it.") from None


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
            label = f"[{number}/{len(jobs)}] {job.name}"
            if not force and _marker(job.folder).get("inputs") == job.inputs:
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
    unfinished = set(run.notebooks.values()) - {"done"}
    run.close("failed" if failed else "incomplete" if unfinished else "done")
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
    (job.folder / MARKER).unlink(missing_ok=True)
    with job.log.open("w") as file:
        log = _Log(file, label, echo)
        try:
            reason = _unfinished(_through_papermill(job, log))
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise
            log.write(strip_color(f"\n{type(error).__name__}: {error}\n"))
            reason = _why(error)
    if not reason:
        seed = job.effective.get("seed", job.effective.get("seeds", []))
        done = {"notebook": job.name, "profile": profile, "inputs": job.inputs}
        write_json(job.folder / MARKER, done | record(job.effective, seed, started))
    echo(f"{label}: {'FAILED' if reason else 'done'} after {time.time() - started:.0f} s {reason}".rstrip())
    return reason


def _through_papermill(job: _Job, log: _Log) -> Any:
    """The executed notebook. papermill raises for failed cells; `_unfinished` looks for what it overlooks."""
    with _papermill_logs_to(log):
        return papermill.execute_notebook(
            _verbatim(job.notebook),
            _verbatim(job.folder / job.notebook.name),
            job.parameters,
            kernel_name="python3",
            language="python",
            progress_bar=False,
            cwd=job.notebook.parents[1],
            stdout_file=log,
            stderr_file=log,
            start_timeout=180,
            iopub_timeout=120,  # nbclient's 4 s fail a notebook that prints a lot on a busy machine
            kernel_manager_class=_ThisInterpreter,
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # no tracebacks of the kernel's on Ctrl-C
            on_cell_start=log.cell_started,
        )


def _verbatim(path: Path) -> str:
    return str(path).replace("{", "{{").replace("}", "}}")  # papermill formats its paths with the parameters


class _ThisInterpreter(AsyncKernelManager):
    """The kernel of the running interpreter, even if a kernel of the user is called python3, too."""

    @default("kernel_spec_manager")
    def _no_installed_kernels(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])


def _unfinished(nb: Any) -> str:
    """Why an executed notebook isn't a success although papermill raised nothing; empty if it is one."""
    cells = [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]
    skipped = [cell for cell in cells if cell.execution_count is None]
    if not skipped and not nb.metadata.papermill.exception:
        return ""
    return f"left early, {len(skipped)} of {len(cells)} code cells never ran (sys.exit in a cell does this)"


def _why(error: Exception) -> str:
    if isinstance(error, DeadKernelError):
        return "the kernel died (killed, often for lack of memory, or crashed)"
    if not isinstance(error, PapermillExecutionError):
        return _one_line(f"{type(error).__name__}: {error}")
    detail = error.evalue
    if not detail:  # a bare assert says nothing: show its line
        lines = strip_color("\n".join(error.traceback)).splitlines()
        detail = next((line for line in reversed(lines) if line.startswith("-")), "").lstrip("-> 0123456789")
    return _one_line(f"In [{error.exec_count}]: {error.ename}: {detail}")


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:200]}…"


class _Log:
    """A notebook's `log.txt`; now and then its last line is shown, with the number of the running cell."""

    def __init__(self, file: TextIO, label: str, echo: Echo) -> None:
        self.file, self.label, self.echo = file, label, echo
        self.cell, self.line = 0, ""
        self.started = self.shown = time.monotonic()

    def cell_started(self, cell: Any, cell_index: int) -> None:
        self.cell = cell_index + 1
        self._show()

    def write(self, text: str) -> None:
        self.file.write(text)
        self.line = text.strip().replace("\r", "\n").split("\n")[-1] or self.line
        self._show()

    def flush(self) -> None:
        self.file.flush()

    def _show(self) -> None:
        now = time.monotonic()
        if now - self.shown >= SECONDS_BETWEEN_LINES:
            self.shown = now
            where = f"{self.label}: cell {self.cell}, {now - self.started:.0f} s"
            self.echo(f"{where}: {_one_line(self.line)}" if self.line else where)


@contextmanager
def _papermill_logs_to(stream: Any) -> Iterator[None]:
    """Keep papermill's own messages off the screen."""
    logger, handler = logging.getLogger("papermill"), logging.StreamHandler(stream)
    before, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


# --- the output folder -------------------------------------------------------------------------------------


def _check_writable(out: Path) -> None:
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
def _locked(out: Path) -> Iterator[None]:
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


def _marker(folder: Path) -> dict[str, Any]:
    """A notebook's success marker; empty without one, or without the executed notebook beside it."""
    return _read_json(folder / MARKER) if (folder / f"{folder.name}.ipynb").exists() else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def list_runs(root: str | Path) -> list[dict[str, Any]]:
    """Each run below the folder `root` (usually `runs/`), by name; none if the folder is absent.

    A run is a folder with `run.json`, `results.json` or `config.json` (training) or with notebooks' folders
    (`reproduce`). The keys: name (path below root), kind ("reproduce" or "train"), state ("done", "failed",
    "running", "interrupted", "incomplete"), size (bytes), modified (local time, as "2026-11-24 09:30").
    """
    runs = []
    for path, folders, files in os.walk(root):
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
    run = _read_json(folder / "run.json")
    state = run.get("state") or ("done" if (folder / "results.json").exists() else "incomplete")
    if state == "running" and not _alive(run.get("pid"), (folder / "run.json").stat().st_mtime):
        state = "interrupted"
    return {
        "name": str(folder.relative_to(root)),
        "kind": run.get("kind", kind),
        "state": state,
        "size": sum(s.st_size for s in stats if not stat.S_ISDIR(s.st_mode)),
        "modified": time.strftime("%Y-%m-%d %H:%M", time.localtime(max(s.st_mtime for s in stats))),
    }


def _alive(pid: Any, wrote: float) -> bool:
    """Whether the process that wrote at that time still runs; a younger one has only inherited its number."""
    if not isinstance(pid, int):
        return False
    try:
        process = psutil.Process(pid)
        return bool(process.status() != psutil.STATUS_ZOMBIE and process.create_time() < wrote + 1)
    except (psutil.Error, ValueError):
        return False
