"""Figure 3 (b)–(d) and the ablations of Table 2, measured: one training experiment per value, the rest as the paper chose it.

    python -m gcpo_repro.reporting.sweeps [--config FILE] [--out runs/sweeps] [--data figures/data/sweeps.json]

Finished arms are not trained again, so a stopped sweep goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from .. import provenance
from ..errors import UserError
from ..evaluation.published import load
from ..evaluation.stats import pass_at_1
from ..experiment import run_experiment
from ..settings import Settings, load_settings
from .paper_figures import SIMILARITIES

KAPPAS = (0.0, 0.02, 0.04, 0.05, 0.06, 0.07, 0.08)  # the paper's grid, its fine steps around the best, and κ = 0 (Table 2)
SWEPT = ("alpha", "kappa", "similarity")
ABLATIONS: dict[str, dict[str, Any]] = {
    "full": {}, "without upsilon": {"control": "constant", "alpha": 1.0}, "without kappa": {"kappa": 0.0},
}  # fmt: skip
NOT_SHAPING = ("methods", "seeds", "workers", "threads")
# The toy task, short: the sweep takes a quarter of an hour on 2 cores, two seeds at a time.
TOY = Settings(
    methods=("gcpo",), seeds=(0, 1), steps=20, eval_every=0, train_questions=1024, eval_questions=256, eval_samples=4,
)  # fmt: skip


def arms(base: Settings) -> dict[str, Settings]:
    """{name: settings} of all experiments: the paper's α and κ grids, the similarities, the ablations, none twice."""
    grid = load()
    alphas = grid[grid["column"] == "α grid"]["value"].tolist()
    values = {"alpha": alphas, "kappa": KAPPAS, "similarity": tuple(SIMILARITIES)}
    cells: list[dict[str, Any]] = [{name: value} for name in SWEPT for value in values[name]]
    cells += ABLATIONS.values()
    unique: dict[Settings, str] = {}
    for cell in cells:
        name = "_".join(f"{key}-{value}" for key, value in cell.items()) or "reference"
        unique.setdefault(replace(base, methods=("gcpo",), **cell), name)
    return {name: settings for settings, name in unique.items()}


def run_sweeps(
    base: Settings = TOY, out: str | Path = "runs/sweeps", echo: Callable[[str], Any] = print,
    run: Callable[[Settings, Path], dict[str, Any]] = run_experiment,
) -> dict[str, Any]:  # fmt: skip
    """Train every experiment of `arms`, one after the other, and put them into one table.

    Args:
        base: the settings that all share (default: `TOY`); its α, κ and similarity are the reference.
        out: a folder for each experiment; arms that are finished there are not trained again.
        run: trains one experiment and returns its results; for tests.

    Returns:
        `sweep_data`, with the provenance of the last experiment's machine and code.

    Raises:
        UserError: whatever an experiment gives cause for.
    """
    found, todo = [], arms(base)
    for k, (name, settings) in enumerate(todo.items(), start=1):
        echo(f"{k} of {len(todo)}: {name}")
        found.append(run(settings, Path(out) / name))
    reference = {name: getattr(base, name) for name in SWEPT}
    return sweep_data(found, reference)


def sweep_data(
    experiments: Sequence[dict[str, Any]], reference: dict[str, Any] | None = None, level: float = 0.95
) -> dict[str, Any]:
    """One table of experiments that differ in α, κ, the similarity, or by an ablation.

    An experiment is a point of a sweep if all its other settings are those of the reference experiment, and is left out if it
    belongs to none.

    Args:
        experiments: `results.json` of each, with GCPO among its methods.
        reference: α, κ and similarity of the reference, the first that has them (default: the paper's 2, .06, cosine).
        level: of the t intervals over questions, seeds averaged first.

    Returns:
        points, a list of {sweep, value, mean, low, high, seeds: [pass@1 of each]}; config (the reference's), seeds, questions,
        samples, level, and versions, commit, hardware of the reference.

    Raises:
        UserError: no reference among them, or several experiments for one point.
    """
    reference = reference or {"alpha": 2.0, "kappa": 0.06, "similarity": "cosine"}
    wanted = {**reference, "control": "none"}
    chosen = [e for e in experiments if all(e["config"][name] == value for name, value in wanted.items())]
    if not chosen:
        raise UserError(f"experiments: none of {len(experiments)} has {wanted}; train that one as well")
    middle = chosen[0]
    points: dict[tuple[str, Any], dict[str, Any]] = {}
    for experiment in experiments:
        for sweep, value in _places(experiment["config"], middle["config"]):
            if (sweep, value) in points:
                raise UserError(f"experiments: two of them have {sweep} = {value}; leave one out")
            points[sweep, value] = {"sweep": sweep, "value": value, **_score(experiment, level)}
    config = middle["config"]
    order = sorted(points, key=lambda key: ((*SWEPT, "ablation").index(key[0]), key[1] if isinstance(key[1], float) else 0))
    return {
        "points": [points[key] for key in order], "level": level, "config": config, "seeds": config["seeds"],
        "questions": config["eval_questions"], "samples": config["eval_samples"],
        **{key: middle[key] for key in ("versions", "commit", "hardware") if key in middle},
    }  # fmt: skip


def _places(config: dict[str, Any], reference: dict[str, Any]) -> list[tuple[str, Any]]:
    """The points that an experiment gives: (sweep, value), the reference one of each."""
    names = [item.name for item in fields(Settings) if item.name not in NOT_SHAPING]
    differs = {name for name in names if config.get(name) != reference.get(name)}
    if config["seeds"] != reference["seeds"]:
        return []
    found: list[tuple[str, Any]] = [(name, config[name]) for name in SWEPT if differs <= {name}]
    for ablation, changes in ABLATIONS.items():
        if differs <= set(changes) and all(config[name] == value for name, value in changes.items()):
            found.append(("ablation", ablation))
    return found


def _score(experiment: dict[str, Any], level: float) -> dict[str, Any]:
    config = experiment["config"]
    last = [arm["evaluations"][-1]["counts"]["correct"] for arm in experiment["arms"] if arm["method"] == "gcpo"]
    counts = np.array(last)  # (seeds, questions)
    found = pass_at_1(counts, config["eval_samples"], level)
    seeds = (counts.mean(1) / config["eval_samples"]).tolist()
    return {"mean": found.mean, "low": found.low, "high": found.high, "seeds": seeds}


@click.command()
@click.option("--config", type=click.Path(path_type=Path), help="YAML file of what all share [default: the toy task].")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/sweeps"), show_default=True)
@click.option("--data", type=click.Path(path_type=Path), help="Where the table goes [default: OUT/sweeps.json].")
def main(config: Path | None, out: Path, data: Path | None) -> None:
    """Train the α, κ and similarity sweeps and the ablations (toy task: a quarter of an hour on 2 cores); resumes."""
    try:
        found = run_sweeps(load_settings(config) if config else TOY, out, click.echo)
    except UserError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"table: {provenance.write_json(data or out / 'sweeps.json', found)}")


if __name__ == "__main__":
    main()
