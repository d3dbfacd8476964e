"""The console command `gcpo-repro`. Thin: each command calls one function of the package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from . import __version__
from .errors import UserError


class Command(click.Group):
    """Turns the user's mistakes into one message and an exit code, without a traceback; bugs keep theirs."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            click.echo("Interrupted. What was finished is kept; the same command starts the rest again.", err=True)
            sys.exit(130)


@click.group(cls=Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="gcpo-repro")
def main() -> None:
    """Reproduce and use GCPO (Group Causal Policy Optimization).

    Start with `gcpo-repro reproduce --profile smoke` (a few minutes on a laptop, no network), or train on your own data
    with `gcpo-repro train --config FILE`.
    """


@main.command()
def env() -> None:
    """Show versions, hardware, threads and git commit: what every result file records."""
    from . import provenance

    for name, version in provenance.versions().items():
        click.echo(f"{name:14} {version}")
    click.echo(f"{'commit':14} {provenance.git_commit()}")
    for name, value in provenance.hardware().items():
        click.echo(f"{name:14} {value}")


@main.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/toy_policy"), show_default=True)
@click.option("--seed", default=0, show_default=True, help="Sets every random draw.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads [default: torch's choice].")
def pretrain(out: Path, seed: int, threads: int | None) -> None:
    """Make the package's tiny policy again, from nothing (at most 8 minutes on 2 cores)."""
    from .toy import pretrain as make

    make(out, seed=seed, threads=threads)
    click.echo(f"policy written to {out}")


@main.command()
@click.option(
    "--config", "config", required=True, type=click.Path(path_type=Path),
    help="YAML file of settings, such as notebooks/profiles/cpu/05_train_qlora.yaml.",
)  # fmt: skip
@click.option("--method", help="Train only this method (grpo, gcpo) instead of all in the file.")
@click.option("--seed", "seeds", type=int, multiple=True, help="Train only this seed; may be given several times.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the results [default: runs/<name of FILE>].")
@click.option("--force", is_flag=True, help="Train again what is already trained with the same settings.")
def train(config: Path, method: str | None, seeds: tuple[int, ...], out: Path | None, force: bool) -> None:
    """Train GRPO and GCPO with QLoRA, evaluate on held-out questions, write results.json."""
    from . import experiment
    from .settings import arm_settings, load_settings, select

    settings = select(load_settings(config), method, seeds)
    out = out or Path("runs") / config.stem
    if len(settings.methods) * len(settings.seeds) > 1:
        experiment.run_experiment(settings, out, force)
    else:
        settings = arm_settings(settings, settings.methods[0], settings.seeds[0])
        if not force and experiment.finished(out, settings):
            click.echo("already trained with these settings (--force trains again)")
        else:
            experiment.run_arm(settings, out)
    click.echo(f"results: {out / 'results.json'}")


@main.command()
@click.option(
    "--profile", default="cpu", show_default=True,
    help="smoke, cpu, t4, gpu24, gpu80 or paper (only smoke and cpu have files yet).",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the results [default: runs/<profile>].")
@click.option("--only", multiple=True, help="Run only this notebook (05 or 05_train_qlora); may be given several times.")
@click.option("--force", is_flag=True, help="Run again what already succeeded with the same inputs.")
def reproduce(profile: str, out: Path | None, only: tuple[str, ...], force: bool) -> None:
    """Run the notebooks in order with a profile's parameters; needs a clone of the repository."""
    from .reporting import runner

    names = tuple(name for entry in only for name in entry.split(",") if name)
    if not runner.reproduce(profile, out, names, force, echo=click.echo):
        raise click.ClickException("some notebooks failed, see the lines above")


@main.command()
@click.option("--model", required=True, help="toy, a Hub id or a local folder.")
@click.option("--adapter", help="Folder or Hub id of a PEFT adapter.")
@click.option("--benchmark", "benchmarks", multiple=True, required=True, help="gsm8k, aime24, toy …; several allowed.")
@click.option("--data", type=click.Path(path_type=Path), help="File or folder of the problems [default: GCPO_DATA, or the Hub].")
@click.option("--samples", default=4, show_default=True, type=click.IntRange(min=1), help="Answers per problem.")
@click.option("--temperature", default=0.6, show_default=True, type=click.FloatRange(min=0), help="0 is greedy.")
@click.option("--top-p", default=0.95, show_default=True, type=click.FloatRange(min=0, min_open=True, max=1))
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer [default: the benchmark's].")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first problems of each benchmark, for trials.")
@click.option("--seed", default=0, show_default=True, help="Sets every random draw.")
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(min=1))
@click.option("--backend", default="transformers", show_default=True, type=click.Choice(["transformers", "vllm"]))
@click.option("--allow-code-execution", is_flag=True, help="HumanEval runs what the model wrote; refused without this.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/evaluation"), show_default=True)
def evaluate(**options: Any) -> None:
    """Sample answers to benchmarks, grade and count them; a stopped evaluation goes on where it was."""
    from .evaluation.evaluate import evaluate_model, summary

    results = evaluate_model(**options)
    click.echo(summary(results))
    click.echo(f"results: {options['out'] / 'results.json'}")


@main.command()
@click.option("--benchmark", required=True, help="Whose answers these are (math500, minerva, gsm8k …).")
@click.option("--responses", required=True, type=click.Path(path_type=Path), help="JSONL: {id, response}, or with a gold.")
@click.option("--data", type=click.Path(path_type=Path), help="Where the right answers are [default: GCPO_DATA, or the Hub].")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSONL to write, a verdict per row.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(min=1), help="Processes, one core each.")
def grade(benchmark: str, responses: Path, data: Path | None, out: Path, workers: int) -> None:
    """Grade a file of answers, one verdict per row, in its order."""
    from .evaluation.grading_pool import grade_file

    found = grade_file(benchmark, responses, out, data, workers)
    click.echo(f"{found['correct']} of {found['rows']} right ({found['ids']} problems); {found['no_answer']} without an answer")
    for reason, rows in sorted(found["wrong"].items(), key=lambda item: -item[1]):
        click.echo(f"  {rows:6} wrong: {reason}")
    click.echo(f"verdicts: {out}")


@main.command()
@click.option("--out", type=click.Path(path_type=Path), help="Folder for Markdown and CSV files as well.")
def audit(out: Path | None) -> None:
    """Check the published tables: arithmetic, possible values, and which gains exceed the noise."""
    from .evaluation.audit import main_text, write_audit

    click.echo(main_text())
    if out:
        for path in write_audit(out):
            click.echo(f"written: {path}")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("runs"))
def runs(folder: Path) -> None:
    """List the runs in FOLDER (default: runs) with state, size and age."""
    from .reporting import runner

    found = runner.list_runs(folder)
    for run in found:
        click.echo(f"{run['name']:32} {run['state']:12} {run['size'] / 1e6:9.1f} MB  {run['modified']}")
    if not found:
        click.echo(f"no runs in {folder}")


if __name__ == "__main__":
    main()
