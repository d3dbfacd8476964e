"""Parameter sweeps into one table: a row for each run and method, with what was varied, pass@1 and provenance.

A sweep is a loop of plain papermill, each run with a folder of its own:

    for alpha in 0.5 1.0 2.0; do
      mkdir -p runs/sweep/alpha-$alpha
      papermill notebooks/05_train_qlora.ipynb runs/sweep/alpha-$alpha/05_train_qlora.ipynb \\
        -p alpha $alpha -p out_dir runs/sweep/alpha-$alpha
    done
    gcpo-repro collect runs/sweep/alpha-{0.5,1.0,2.0} --out sweep.csv

or a job array, here of SLURM (`sbatch --array=0-5 sweep.sh`), each task one cell of a grid:

    alphas=(0.5 1.0 2.0); kappas=(0.0 0.06)
    alpha=${alphas[SLURM_ARRAY_TASK_ID % 3]}; kappa=${kappas[SLURM_ARRAY_TASK_ID / 3]}
    out=runs/sweep/alpha-$alpha-kappa-$kappa
    mkdir -p $out
    papermill notebooks/05_train_qlora.ipynb $out/05_train_qlora.ipynb -p alpha $alpha -p kappa $kappa -p out_dir $out

`gcpo-repro train --out DIR` and `gcpo-repro evaluate --out DIR` leave folders that are read alike. Naming every folder, rather
than the one above them, makes a run that never started show as missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from ..errors import UserError
from ..evaluation.stats import Interval, pass_at_1
from .run_folders import FAILURE, alive, in_report, marker, read_json

# Not what a sweep varies: they have columns of their own, or say where and how fast a run ran, not what it computed.
OWN_COLUMNS = {"methods", "seeds", "seed", "benchmarks", "out_dir", "run_dir", "workers", "threads"}
BEFORE = ("run", "state")
AFTER = (
    "method", "benchmark", "seeds", "questions", "samples", "pass_at_1", "low", "high", "level", "pass_at_1_before", "reason",
    "model", "commit", "torch", "cpu", "gpus", "started_unix", "wall_time_seconds",
)  # fmt: skip


def collect(folders: Sequence[str | Path]) -> pd.DataFrame:
    """The runs in some folders as one table, in the order of the folders, then of their names.

    A run is an experiment (`train`, notebook 05), one arm of it that was trained alone, an evaluation (`evaluate`, notebook
    06), or a papermill notebook that came to no such result; each is looked for at any depth. Notebooks of `reproduce` that
    succeeded without measuring pass@1 are left out.

    Args:
        folders: of runs, or folders above runs; one that does not exist gives a row that says "missing".

    Returns:
        run (path), state ("done", "running", "interrupted", "failed", "incomplete", "missing"); a column for each setting that
        differs between runs; method or benchmark; seeds; questions and samples, answers to each; pass_at_1 with low and high, a
        95% interval over questions (seeds averaged first; none for a single question), and before training; reason of a
        failure; model, commit, torch, cpu, gpus, started_unix and wall_time_seconds. What a run doesn't tell is empty.

    Raises:
        UserError: no folders, or existing ones without any run.
    """
    if not folders:
        raise UserError("folders: none given; name the folders of the sweep's runs")
    rows: list[dict[str, Any]] = []
    configs: list[dict[str, Any]] = []
    seen: set[Path] = set()
    for folder in map(Path, folders):
        found = list(_runs(folder, seen)) if folder.is_dir() else [({"run": str(folder), "state": "missing"}, {})]
        if folder.is_dir() and not found and folder.resolve() not in seen:
            found = [({"run": str(folder), "state": "missing", "reason": "the folder holds no run"}, {})]
        rows += [row for row, _ in found]
        configs += [config for _, config in found]
    if all(row["state"] == "missing" for row in rows) and any(Path(folder).is_dir() for folder in folders):
        raise UserError(f"folders: no run in {', '.join(map(str, folders))}; `gcpo-repro runs FOLDER` lists the runs of a folder")
    evaluated = ["benchmark" in row for row in rows]  # trainings and evaluations have other settings of the same names
    groups = ([c for c, e in zip(configs, evaluated, strict=True) if e is kind] for kind in (False, True))
    varied = list(dict.fromkeys(name for group in groups for name in _varied(group)))
    for row, config in zip(rows, configs, strict=True):
        row.update({name: _cell(config[name]) for name in varied if name in config})
    table = pd.DataFrame(rows, columns=[*BEFORE, *varied, *(name for name in AFTER if name not in varied)], dtype=object)
    table.attrs["varied"] = varied
    return table


def write_table(table: pd.DataFrame, out: str | Path) -> str:
    """Write the table as CSV; what it holds, in one line.

    Raises:
        UserError: another ending than .csv, or a file that cannot be written.
    """
    out = Path(out)
    if out.suffix != ".csv":
        raise UserError(f"out: {str(out)!r} does not end in .csv; only CSV is written")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(out, index=False, lineterminator="\n")
    except OSError as error:
        raise UserError(f"out: {str(out)!r} cannot be written ({error}); name another file") from None
    states = ", ".join(f"{number} {state}" for state, number in table.drop_duplicates("run")["state"].value_counts().items())
    varied = ", ".join(table.attrs["varied"]) or "nothing"
    return f"{len(table)} rows of {table['run'].nunique()} runs ({states}); varied: {varied}; {out}"


def _varied(configs: list[dict[str, Any]]) -> list[str]:
    """The settings with several values among the runs that have them."""
    values: dict[str, set[str]] = {}
    for config in configs:
        for name in config.keys() - OWN_COLUMNS:
            value = _cell(config[name])
            values.setdefault(name, set()).add(str(float(value) if type(value) is int else value))
    order = dict.fromkeys(name for config in configs for name in config)
    return [name for name in order if len(values.get(name, ())) > 1]


def _cell(value: Any) -> Any:
    """A setting as one cell: a model is where it and its adapter come from, other containers are text."""
    if isinstance(value, dict) and "source" in value:
        return f"{value['source']} + {value['adapter']}" if value.get("adapter") else value["source"]
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else value


# --- finding runs ------------------------------------------------------------------------------------------


def _runs(folder: Path, seen: set[Path]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(row, settings) of every run at or below the folder that was not seen before."""
    experiments: set[Path] = set()
    for path in sorted({p.parent for name in ("results.json", "run.json", "config.yaml") for p in folder.rglob(name)}):
        inside = any(parent in experiments for parent in path.parents)
        content = read_json(path / "results.json")
        if inside or read_json(path / "run.json").get("kind") == "reproduce" or in_report(path / "results.json"):
            continue  # the arms of an experiment; the folder above the notebooks
        experiments.add(path)
        if path.resolve() not in seen:
            seen.add(path.resolve())
            yield from _rows(path, content)
    for notebook in sorted(folder.rglob("*.ipynb")):
        metadata = read_json(notebook).get("metadata", {}).get("papermill", {})
        parameters = metadata.get("parameters", {})
        told = bool(marker(notebook.parent)) or in_report(notebook) or _results_of(notebook, parameters) & seen
        if metadata and not told:
            yield _unfinished_notebook(notebook, metadata), parameters


def _results_of(notebook: Path, parameters: dict[str, Any]) -> set[Path]:
    """Where the notebook's results would be: in its out_dir, or, if that was moved, in its own folder or the one of its name."""
    out = Path(parameters.get("out_dir") or notebook.parent)
    places = [out] if out.is_dir() else [notebook.parent, notebook.with_suffix("")]
    return {path.resolve() for place in places for path in (place, place / "evaluation")}


def _unfinished_notebook(notebook: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    """A row for a notebook without results: papermill saw an exception, or it was killed, or it measures no pass@1."""
    why = read_json(notebook.parent / FAILURE).get("reason", "")
    errors = [o for c in read_json(notebook).get("cells", []) for o in c.get("outputs", []) if o.get("output_type") == "error"]
    if errors and not why:
        why = f"{errors[0].get('ename')}: {errors[0].get('evalue')}".splitlines()[0]
    state = "failed" if errors or metadata.get("exception") else "incomplete"
    return {"run": str(notebook), "state": state, "reason": why or "the notebook left no results.json"}


def _rows(path: Path, content: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    kind, config = content.get("kind"), content.get("config", {})
    head = {"run": str(path), "state": "done", **_provenance(content)}
    if kind == "experiment":
        for method in config["methods"]:
            yield head | _trained([arm for arm in content["arms"] if arm["method"] == method], config), config
    elif kind == "arm":
        yield head | _trained([content], config), config
    elif kind == "evaluation":
        for found in content["benchmarks"]:
            p = found["pass_at_1"]
            measured = {"pass_at_1": p["mean"], "low": p["low"], "high": p["high"], "level": p["level"]}
            place = {"benchmark": found["benchmark"], "seeds": str(content["seed"]), "model": _cell(config["model"])}
            yield head | place | measured | {"questions": found["problems_asked"], "samples": found["samples"]}, config
    else:
        state, why = _state(path)
        settings = _settings(path)
        model = {"model": settings["model"]} if "model" in settings else {}
        yield {"run": str(path), "state": state, "reason": why, **model}, settings


def _trained(arms: list[dict[str, Any]], config: dict[str, Any]) -> dict[str, Any]:
    """The row of one method: pass@1 before and after training, over its seeds."""
    before, after = (_pass_at_1(arms, at) for at in (0, -1))
    finite = np.isfinite(after.low)
    return {
        "method": arms[0]["method"], "seeds": " ".join(str(arm["seed"]) for arm in arms), "model": config["model"],
        "questions": len(arms[0]["evaluations"][-1]["counts"]["correct"]),
        "samples": arms[0]["evaluations"][-1]["counts"]["samples"], "pass_at_1": after.mean,
        "low": after.low if finite else None, "high": after.high if finite else None, "level": after.level,
        "pass_at_1_before": before.mean,
    }  # fmt: skip


def _pass_at_1(arms: list[dict[str, Any]], at: int) -> Interval:
    counts = [arm["evaluations"][at]["counts"] for arm in arms]
    return pass_at_1(np.array([c["correct"] for c in counts]), counts[0]["samples"])


def _provenance(content: dict[str, Any]) -> dict[str, Any]:
    hardware = content.get("hardware", {})
    gpus = " ".join(gpu["name"] for gpu in hardware.get("gpus", []))
    return {
        "commit": content.get("commit"), "torch": content.get("versions", {}).get("torch"), "cpu": hardware.get("cpu"),
        "gpus": gpus, "started_unix": content.get("started_unix"), "wall_time_seconds": content.get("wall_time_seconds"),
    }  # fmt: skip


def _state(path: Path) -> tuple[str, str]:
    """State and reason of a run without results."""
    run = read_json(path / "run.json")
    state = str(run.get("state", "incomplete"))
    if state == "running" and not alive(run.get("pid"), (path / "run.json").stat().st_mtime):
        state = "interrupted"
    if state == "done":
        return "incomplete", "results.json is missing or cannot be read"
    logs = sorted(path.glob("*/log.txt"), key=lambda log: log.stat().st_mtime)
    logs = [log for log in logs if read_json(log.parent / "run.json").get("state") not in ("done", "running")] or logs
    last = logs[-1].read_text(errors="replace").strip().splitlines()[-1:] if state == "failed" and logs else []
    return state, last[0].removeprefix("Error: ")[:200] if last else "no results.json"


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load((path / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        settings = read_json(path / "config.json")
    return settings if isinstance(settings, dict) else {}
