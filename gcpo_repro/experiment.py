"""A training experiment: the same policy trained by several methods, over several seeds, on the same questions.

One file of settings serves `gcpo-repro train --config`, notebook 05 and papermill's `-f`. Each arm (method, seed) runs in a
process of its own and leaves `results.json`; `collect` puts the arms into one.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from . import provenance
from .errors import UserError

METHODS = ("grpo", "gcpo")
NOTEBOOK_ONLY = ("out_dir", "run_dir", "check_claims")


@dataclass(frozen=True)
class Settings:
    """Everything that shapes a training experiment; the keys of a configuration file, each int, float, str, bool or list.

    Raises UserError for a value of the wrong kind or outside its range.
    """

    methods: tuple[str, ...] = ("grpo", "gcpo")
    seeds: tuple[int, ...] = (0, 1, 2)
    model: str = "toy"  # "toy", a Hub id or a local folder
    model_revision: str = ""
    quantization: str = "nf4"
    lora_rank: int = 16  # 0: train every weight (quantization "none")
    dtype: str = "auto"
    device: str = "auto"
    data: str = "toy"  # "toy", a local file or a Hub id
    data_split: str = "train"
    data_config: str = ""
    eval_data: str = ""  # "" takes questions of `data` that are not trained on
    eval_split: str = "test"
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    prompt_template: str = "{prompt}"
    system_prompt: str = ""
    reward: str = "exact"
    estimator: str = "state"
    phi: str = "algorithm"
    control: str = "none"
    kl_context: str = "query"
    eq13_reduction: str = "mean"
    similarity: str = "cosine"
    upsilon_map: str = "raw"
    feature_token: str = "last"
    candidate_order: str = "sampled"
    alpha: float = 2.0  # paper, §experiments: best of its grid
    kappa: float = 0.06  # paper: best of its grid
    beta: float = 0.04  # not in the paper; the value of GRPO's first publication
    group_size: int = 4
    num_integrated: int = 0  # L; 0: the group size, as in the paper
    num_rollouts: int = 0  # M; 0: the group size, as in the paper
    context_max_tokens: int = 0
    integrated_max_tokens: int = 0
    steps: int = 40
    batch_size: int = 64  # answers per optimiser step
    device_batch_size: int = 64  # answers per forward pass; the rest is accumulated
    learning_rate: float = 1.0e-3
    weight_decay: float = 0.01  # paper
    temperature: float = 1.0
    max_completion_length: int = 24
    gradient_checkpointing: bool = False
    train_questions: int = 2048
    eval_questions: int = 256
    eval_samples: int = 4
    eval_every: int = 20  # optimiser steps; 0: only before and after
    eval_seed: int = 20260
    workers: int = 2  # arms trained at the same time, each with `threads` threads
    threads: int = 1

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, _coerced(item.name, getattr(self, item.name), item.default))
        for method in self.methods:
            if method not in METHODS:
                raise UserError(f"methods: {method!r} is unknown, choose from {', '.join(METHODS)}")
        for name, values in (("methods", self.methods), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise UserError(f"{name}: {list(values)} must name at least one, and none twice")
        if not all(0 <= seed < 2**32 for seed in self.seeds):
            raise UserError(f"seeds: {list(self.seeds)} must lie between 0 and 2**32 - 1")
        lowest = {"group_size": 2, "lora_rank": 0, "num_integrated": 0, "num_rollouts": 0, "context_max_tokens": 0}
        lowest |= {"integrated_max_tokens": 0, "eval_every": 0, "eval_seed": 0}
        lowest |= {"train_questions": 0}  # all there are
        for item in fields(self):
            value, least = getattr(self, item.name), lowest.get(item.name, 1)
            if type(value) is int and value < least:
                raise UserError(f"{item.name}: {value} must be at least {least}")
            if type(value) is float and not 0 <= value < float("inf"):
                raise UserError(f"{item.name}: {value} must be finite and not negative")
        if self.temperature == 0:
            raise UserError("temperature: 0 leaves nothing to sample, give a positive one (1 is the default)")
        if self.batch_size % self.device_batch_size or self.batch_size % self.group_size:
            raise UserError(
                f"batch_size: {self.batch_size} must be a multiple of group_size = {self.group_size} (whole groups) and of "
                f"device_batch_size = {self.device_batch_size}"
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and scalars, for YAML and JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def _coerced(name: str, value: Any, default: Any) -> Any:
    """The value in the default's type. YAML 1.1 reads 1e-6 as a string, so a string that is a number will do."""
    try:
        if isinstance(default, tuple):
            items = value if isinstance(value, (list, tuple)) else [value]
            return tuple(_coerced(name, item, default[0]) for item in items)
        if isinstance(default, bool) or isinstance(value, bool):
            if isinstance(default, bool) and isinstance(value, bool):
                return value
            raise ValueError
        if isinstance(default, float) and isinstance(value, (int, float, str)):
            return float(value)
        if isinstance(default, int) and int(value) == float(value):
            return int(value)
        if isinstance(default, str) and isinstance(value, str):
            return value
        raise ValueError
    except (TypeError, ValueError, OverflowError):
        kind = "list of " + type(default[0]).__name__ if isinstance(default, tuple) else type(default).__name__
        raise UserError(f"{name}: {value!r} is not a {kind}") from None


def load_settings(path: str | Path) -> Settings:
    """Settings from a YAML file (a parameter file of notebook 05). Raises UserError: unreadable, or an unknown key."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"config: {str(path)!r} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"config: {str(path)!r} must hold 'name: value' lines")
    return make_settings(content)


def make_settings(values: dict[str, Any]) -> Settings:
    """Settings from a mapping, such as a notebook's parameters.

    `more`, a list of "name=value", adds settings that notebook 05 has no parameter for; `out_dir` and `run_dir` say where
    a notebook writes and reads, `check_claims` what it asserts: no settings.

    Raises UserError: an unknown name, one that is given twice.
    """
    values = {key: value for key, value in values.items() if key not in NOTEBOOK_ONLY}
    more = values.pop("more", [])
    if not isinstance(more, (list, tuple)):
        raise UserError(f"more: {more!r} must be a list of 'name=value'")
    for entry in more:
        name, sign, value = str(entry).partition("=")
        if not sign or name in values:
            raise UserError(f"more: {entry!r} must be 'name=value', with a name that is not given elsewhere")
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"more: {entry!r} must be 'name=value', and its value is no YAML") from None
    known = [item.name for item in fields(Settings)]
    unknown = sorted(str(name) for name in set(values) - set(known))
    if unknown:
        raise UserError(f"config: unknown setting {', '.join(unknown)}; known are {', '.join(known)}")
    return Settings(**values)


def run_experiment(settings: Settings, out: str | Path, force: bool = False) -> dict[str, Any]:
    """Train every arm, `workers` at a time, each in its own process; arms that are done are not trained again.

    Args:
        settings: what to train.
        out: folder for `results.json` and one folder per arm, with its log.
        force: train finished arms again.

    Returns:
        What `collect` returns, also written to `out/results.json`.

    Raises:
        UserError: a folder that cannot be written, an arm that failed (its message and its log's path).
    """
    started, out = time.time(), Path(out)
    config = out / "config.yaml"
    arms = [(method, seed) for seed in settings.seeds for method in settings.methods]
    running = _Running()
    with _recorded(out, methods=settings.methods, seeds=settings.seeds), _writing(out):
        config.write_text(yaml.safe_dump(settings.as_dict(), sort_keys=False))
        with ThreadPoolExecutor(settings.workers) as pool:
            try:
                jobs = [pool.submit(_run_in_process, settings, config, out, *arm, force, running) for arm in arms]
                for job in as_completed(jobs):  # not in the order of the arms: the first failure ends the experiment
                    job.result()
            except BaseException:  # a failed arm or Ctrl-C: don't leave the others running behind the user's back
                running.stop()
                pool.shutdown(wait=False, cancel_futures=True)
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
    """The arms' processes; `stop` ends them, and any that is added later."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.stopped = threading.Event()

    def add(self, process: subprocess.Popen[bytes]) -> None:
        self.processes.append(process)
        if self.stopped.is_set():
            process.terminate()

    def stop(self) -> None:
        self.stopped.set()
        for process in self.processes:
            process.terminate()


def _run_in_process(
    settings: Settings, config: Path, out: Path, method: str, seed: int, force: bool, running: _Running
) -> None:
    folder = arm_folder(out, method, seed)
    if not force and finished(folder, arm_settings(settings, method, seed)):
        print(f"{folder.name}: already trained with these settings", flush=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "gcpo_repro.cli", "train", "--config", str(config), "--method", method]
    command += ["--seed", str(seed), "--out", str(folder)] + (["--force"] if force else [])
    environment = {**os.environ, "OMP_NUM_THREADS": str(settings.threads), "TOKENIZERS_PARALLELISM": "false"}
    print(f"{folder.name}: started", flush=True)
    began = time.time()
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        running.add(process)
        _wait(process, folder, began)
    if process.returncode:
        text = (folder / "log.txt").read_text(errors="replace").strip().splitlines() or ["no output"]
        raise UserError(f"{folder.name} failed: {text[-1].removeprefix('Error: ')} (log: {folder / 'log.txt'})")
    final = json.loads((folder / "results.json").read_text())["evaluations"]
    print(
        f"{folder.name}: pass@1 {_percent(final[0])} -> {_percent(final[-1])} after {time.time() - began:.0f} s", flush=True
    )


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


def arm_settings(settings: Settings, method: str, seed: int) -> Settings:
    """The settings of one arm alone; how many arms run beside it does not change its result."""
    return replace(settings, methods=(method,), seeds=(seed,), workers=1)


def fingerprint(settings: Settings) -> str:
    """A hash of the settings and of the code and policy that use them: an arm with the same one need not run again."""
    package = Path(__file__).parent
    digest = hashlib.sha256(json.dumps(settings.as_dict(), sort_keys=True).encode())
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
            arms.append({key: result[key] for key in ("method", "seed", "evaluations", "steps", "wall_time_seconds")})
    content = {**provenance.record(settings.as_dict(), list(settings.seeds), started), "kind": "experiment", "arms": arms}
    provenance.write_json(Path(out) / "results.json", content)
    return content


def run_arm(settings: Settings, out: str | Path) -> dict[str, Any]:
    """Train one method with one seed in this process; write adapters, `progress.jsonl` and, last, `results.json` to `out`.

    Raises:
        UserError: more than one method or seed, or whatever the model, the data or the reward function give cause for.
    """
    if len(settings.methods) != 1 or len(settings.seeds) != 1:
        raise UserError("run_arm trains one method with one seed; use run_experiment for several")
    training = importlib.import_module(".arm", __package__)  # torch and trl only where they are needed
    out = Path(out)
    with _recorded(out, method=settings.methods[0], seed=settings.seeds[0]):
        (out / "progress.jsonl").unlink(missing_ok=True)
        result = training.train(settings, out)
        provenance.write_json(out / "results.json", {**result, "fingerprint": fingerprint(settings)})
        return result


def select(settings: Settings, method: str | None, seeds: Sequence[int]) -> Settings:
    """Settings narrowed by the command line's --method and --seed."""
    return replace(settings, methods=(method,) if method else settings.methods, seeds=tuple(seeds) or settings.seeds)
