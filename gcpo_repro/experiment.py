"""A training experiment: the same policy trained by several methods, over several seeds, on the same questions.

Each arm (method, seed) runs in a process of its own and leaves `results.json`; `collect` puts the arms into one.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from . import processes, provenance
from .checkpoints import held, prepare
from .errors import UserError
from .settings import Settings, arm_settings, shaping


def run_experiment(settings: Settings, out: str | Path, force: bool = False, resume: str = "auto") -> dict[str, Any]:
    """Train every arm, `workers` at a time, each in its own process; arms that are done are not trained again.

    Args:
        settings: what to train.
        out: folder for `results.json` and one folder per arm, with its log.
        force: train finished arms again, and every arm from the beginning.
        resume: "auto": an interrupted arm goes on from its newest checkpoint; "never": it starts from the beginning.

    Returns:
        What `collect` returns, also written to `out/results.json`.

    Raises:
        UserError: a folder that cannot be written, an arm that failed (its message and its log's path), several processes.
    """
    started, out = time.time(), Path(out)
    config = out / "config.yaml"
    if processes.count() > 1:
        raise UserError(
            f"train: {len(settings.methods) * len(settings.seeds)} arms in {processes.count()} processes; an experiment starts a "
            "process for each arm itself. Name one arm with --method and --seed, or start without torchrun"
        )
    arms = [(method, seed) for seed in settings.seeds for method in settings.methods]
    running = _Running()
    with _recorded(out, methods=settings.methods, seeds=settings.seeds), _writing(out):
        config.write_text(yaml.safe_dump(settings.as_dict(), sort_keys=False))
        with ThreadPoolExecutor(settings.workers) as pool:
            try:
                jobs = [pool.submit(_run_in_process, settings, config, out, *arm, force, resume, running) for arm in arms]
                for job in as_completed(jobs):  # not in the order of the arms: the first failure ends the experiment
                    job.result()
            except BaseException:  # a failed arm or Ctrl-C: don't leave the others running behind the user's back
                pool.shutdown(wait=False, cancel_futures=True)
                running.stop()
                raise
        return collect(settings, out, started)


@contextmanager
def _recorded(out: Path, **what: Any) -> Iterator[None]:
    """A training run in `out`, whose state is told there. An older result goes first."""
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").unlink(missing_ok=True)
        provenance.write_json(out / "run.json", {"kind": "train", "state": "running"})  # fails here if it must
    with provenance.run_state(out, kind="train", **what):
        yield


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Turns a folder that cannot be written, or a full disk, into one message."""
    try:
        yield
    except OSError as error:
        remedy = "free some space and run again" if error.errno in provenance.DISK_FULL else "choose another folder"
        raise UserError(f"out: cannot write to {str(out)!r} ({error.strerror or error}); {remedy}") from error


class _Running:
    """The arms' processes; `stop` ends them after a checkpoint, and any that is added later."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.stopped = threading.Event()

    def add(self, process: subprocess.Popen[bytes]) -> None:
        self.processes.append(process)
        if self.stopped.is_set():
            process.terminate()

    def stop(self) -> None:
        """Returns when none is left: whoever runs again at once must find their folders at rest. Ctrl-C stops the waiting."""
        self.stopped.set()
        for process in self.processes:
            process.terminate()
        try:
            for process in self.processes:
                process.wait()
        except KeyboardInterrupt:
            for process in self.processes:
                process.kill()


def _run_in_process(
    settings: Settings, config: Path, out: Path, method: str, seed: int, force: bool, resume: str, running: _Running
) -> None:
    folder = arm_folder(out, method, seed)
    if not force and finished(folder, arm_settings(settings, method, seed)):
        print(f"{folder.name}: already trained with these settings", flush=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "gcpo_repro.cli", "train", "--config", str(config), "--method", method]
    command += ["--seed", str(seed), "--out", str(folder), "--resume", resume] + (["--force"] if force else [])
    environment = {**os.environ, "OMP_NUM_THREADS": str(settings.threads), "TOKENIZERS_PARALLELISM": "false"}
    print(f"{folder.name}: started", flush=True)
    began = time.time()
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        running.add(process)
        _wait(process, folder, began)
    if process.returncode:
        reason = _reason(process.returncode, (folder / "log.txt").read_text(errors="replace"))
        raise UserError(f"{folder.name} failed: {reason} (log: {folder / 'log.txt'})")
    final = json.loads((folder / "results.json").read_text())["evaluations"]
    print(
        f"{folder.name}: pass@1 {_percent(final[0])} -> {_percent(final[-1])} after {time.time() - began:.0f} s", flush=True
    )


def _reason(code: int, log: str) -> str:
    """Why an arm ended: the whole message after "Error: ", or of the exception below the last traceback."""
    if code < 0:
        hint = ", often for lack of memory" if code == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}"
    lines = log.strip().splitlines() or ["no output"]
    for start in range(len(lines) - 1, -1, -1):
        if lines[start].startswith("Error: "):
            return "\n".join(lines[start:]).removeprefix("Error: ")
        if lines[start].startswith("Traceback (most recent call last)"):
            message = next(k for k in range(start + 1, len(lines) + 1) if k == len(lines) or not lines[k].startswith(" "))
            return "\n".join(lines[message:]) or lines[-1]
    return lines[-1]


def _wait(process: subprocess.Popen[bytes], folder: Path, began: float, every: float = 30.0) -> None:
    while True:
        try:
            process.wait(timeout=every)
            return
        except subprocess.TimeoutExpired:
            lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines() or ["loading"]
            print(f"{folder.name}: {time.time() - began:.0f} s, {lines[-1][:100]}", flush=True)


def _percent(evaluation: dict[str, Any]) -> str:
    counts = evaluation["counts"]
    return f"{100 * sum(counts['correct']) / (counts['samples'] * len(counts['correct'])):.1f}%"


def load_results(folder: str | Path) -> dict[str, Any]:
    """The `results.json` of an experiment. Raises UserError: none there, or one of another kind."""
    path = Path(folder) / "results.json"
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"run_dir: {str(path)!r} cannot be read ({error}); did the run finish?") from error
    if not isinstance(results, dict) or results.get("kind") != "experiment":
        raise UserError(f"run_dir: {str(path)!r} is not an experiment's result; name the folder that `train` wrote to")
    return results


def arm_folder(out: str | Path, method: str, seed: int) -> Path:
    return Path(out) / f"{method}-seed{seed}"


def fingerprint(settings: Settings) -> str:
    """A hash of the settings and of the code and policy that use them: an arm with the same one need not run again."""
    package = Path(__file__).parent
    digest = hashlib.sha256(json.dumps(shaping(settings), sort_keys=True).encode())
    for path in sorted(p for p in package.rglob("*") if p.suffix in {".py", ".safetensors"}):
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def finished(folder: Path, settings: Settings) -> bool:
    """Whether `folder` holds the result of exactly these settings, made by this code."""
    try:
        return json.loads((folder / "results.json").read_text())["fingerprint"] == fingerprint(settings)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def collect(settings: Settings, out: str | Path, started: float) -> dict[str, Any]:
    """One record of all arms: provenance, and per arm its evaluations (with counts) and its metrics at every step."""
    arms = []
    for method in settings.methods:
        for seed in settings.seeds:
            result = json.loads((arm_folder(out, method, seed) / "results.json").read_text())
            arm = {key: result[key] for key in ("method", "seed", "evaluations", "steps", "wall_time_seconds")}
            arms.append({**arm, **{key: result[key] for key in ("data", "warnings") if key in result}})
    content = {**provenance.record(settings.as_dict(), list(settings.seeds), started), "kind": "experiment", "arms": arms}
    provenance.write_json(Path(out) / "results.json", content)
    return content


def run_arm(settings: Settings, out: str | Path, resume: str = "auto") -> dict[str, Any]:
    """Train one method with one seed in this process; write adapters, `progress.jsonl` and, last, `results.json` to `out`.

    Args:
        settings: one method and one seed.
        out: the arm's folder. One that holds a result is trained again, from the beginning.
        resume: "auto": an interrupted training goes on from its newest checkpoint; "never": from the beginning.

    Raises:
        UserError: more than one method or seed, a checkpoint of other settings, a folder in which another process trains,
            or whatever the model, the data or the reward function give cause for.
    """
    if len(settings.methods) != 1 or len(settings.seeds) != 1:
        raise UserError("run_arm trains one method with one seed; use run_experiment for several")
    training = importlib.import_module(".arm", __package__)  # torch and trl only where they are needed
    out = Path(out)
    if not processes.is_main():  # it trains along; the main process tells of it
        return training.train(settings, out)
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with held(out):
        with _writing(out):
            checkpoint = prepare(out, shaping(settings), "never" if (out / "results.json").exists() else resume)
        with _recorded(out, method=settings.methods[0], seed=settings.seeds[0]):
            if checkpoint is None:
                (out / "progress.jsonl").unlink(missing_ok=True)
            result = training.train(settings, out)
            provenance.write_json(out / "results.json", {**result, "fingerprint": fingerprint(settings)})
            return result
