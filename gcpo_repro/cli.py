"""The console command `gcpo-repro`. Thin: each command calls one function of the package."""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from . import __version__, processes
from .errors import UserError


class Command(click.Group):
    """Turns the user's mistakes into one message and an exit code, without a traceback; bugs keep theirs."""

    def invoke(self, ctx: click.Context) -> Any:
        _silence_known_noise()
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt as stop:
            told = str(stop) or "Interrupted. What was finished is kept; the same command goes on with the rest."
            click.echo(told, err=True)
            sys.exit(130)


def _silence_known_noise() -> None:
    """Two messages that hide ours and are harmless: bitsandbytes misses an optional kernel and uses its own; transformers warns
    of a name that TRL still uses."""
    kernels = logging.getLogger("bitsandbytes.backends.cpu.ops")
    kernels.addFilter(lambda record: "Failed to load CPU gemm_4bit_forward" not in str(record.msg))
    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing` is deprecated", FutureWarning)


@click.group(cls=Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="gcpo-repro")
@click.pass_context
def main(context: click.Context) -> None:
    """Reproduce and use GCPO (Group Causal Policy Optimization).

    Start with `gcpo-repro reproduce --profile smoke` (a few minutes on a laptop, no network), or train on your own data
    with `gcpo-repro train --config FILE`.
    """
    if context.invoked_subcommand != "train" and processes.count() > 1:
        raise UserError(
            f"{context.invoked_subcommand}: started in {processes.count()} processes, which would write over each other; only "
            "train takes several, start this without torchrun"
        )


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
@click.option("--method", help="Train only this method (grpo, gcpo, dr_grpo, gvpo) instead of all in the file.")
@click.option("--seed", "seeds", type=int, multiple=True, help="Train only this seed; may be given several times.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the results [default: runs/<name of FILE>].")
@click.option("--force", is_flag=True, help="Train again what is already trained with the same settings.")
@click.option(
    "--resume", default="auto", show_default=True, type=click.Choice(["auto", "never"]),
    help="An interrupted training goes on from its newest checkpoint, or starts from the beginning.",
)  # fmt: skip
@click.option(
    "--check-overlap", "check_overlap", is_flag=True,
    help="Leave out training problems that stand in a benchmark: those in the file's check_overlap, else all.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Only show what would be done and the memory it needs; refuse what can't be held.")
@click.option("--device-gb", type=click.FloatRange(min=1), help="With --dry-run: on a CUDA device of so many GB, not here.")
@click.option("--processes", "planned", type=click.IntRange(min=1), help="With --dry-run: devices that train together.")
def train(
    config: Path, method: str | None, seeds: tuple[int, ...], out: Path | None, force: bool, resume: str, check_overlap: bool,
    dry_run: bool, device_gb: float | None, planned: int | None,
) -> None:  # fmt: skip
    """Train GCPO and its baselines with QLoRA, evaluate on held-out questions, write results.json.

    torchrun --nproc_per_node 2 -m gcpo_repro.cli train … trains one method and seed in two processes.
    """
    if dry_run:
        return _show_plan(config, method, seeds, out, device_gb, planned or 1)
    if device_gb or planned:
        raise UserError("--device-gb and --processes plan a training; add --dry-run")
    processes.refuse_lost()
    with processes.quiet_unless_main():
        _train(config, method, seeds, out, force, "never" if force else resume, check_overlap)


def _show_plan(
    config: Path, method: str | None, seeds: tuple[int, ...], out: Path | None, device_gb: float | None, planned: int
) -> None:  # fmt: skip
    from .plan import make_plan, text
    from .settings import load_settings, select

    settings = select(load_settings(config), method, seeds)
    plan = make_plan(settings, out or Path("runs") / config.stem, planned, device_gb)
    click.echo(text(plan))
    plan.refuse()


def _train(
    config: Path, method: str | None, seeds: tuple[int, ...], out: Path | None, force: bool, resume: str, check_overlap: bool
) -> None:  # fmt: skip
    from . import experiment
    from .settings import arm_settings, load_settings, select

    settings = select(load_settings(config), method, seeds)
    if check_overlap and not settings.check_overlap:
        settings = replace(settings, check_overlap=("all",))
    out = out or Path("runs") / config.stem
    if len(settings.methods) * len(settings.seeds) > 1:
        experiment.run_experiment(settings, out, force, resume)
    else:
        settings = arm_settings(settings, settings.methods[0], settings.seeds[0])
        if not force and experiment.finished(out, settings):
            click.echo("already trained with these settings (--force trains again)")
        else:
            experiment.run_arm(settings, out, resume)
    click.echo(f"results: {out / 'results.json'}")


@main.command()
@click.option("--run", required=True, type=click.Path(path_type=Path), help="Folder of a finished arm: runs/x/gcpo-seed0.")
@click.option("--to", required=True, type=click.Path(path_type=Path), help="Folder to write, absent or empty.")
@click.option("--merge", is_flag=True, help="Add the adapter to the weights: a whole model instead of an adapter.")
@click.option("--dtype", default="auto", show_default=True, help="Of a merged model: bfloat16, float16 or float32.")
@click.option("--push", "repository", metavar="OWNER/NAME", help="Upload to the Hub as well (needs a login and a network).")
@click.option("--public", is_flag=True, help="With --push: visible to all, instead of private.")
def export(run: Path, to: Path, merge: bool, dtype: str, repository: str | None, public: bool) -> None:
    """Write a trained policy with tokenizer, generation settings and model card; plain transformers loads it."""
    from . import export as exporting

    found = exporting.export(run, to, merge, dtype)
    click.echo(f"{found['kind']}: {to}")
    if found["difference"]:
        far = found["difference"]
        click.echo(f"from the trained policy: {far['largest']:.2g} in logits at most, KL {far['kl']:.2g} nats a token")
    if repository:
        click.echo(f"uploaded: {exporting.push(to, repository, private=not public)}")


@main.command()
@click.option("--repo", required=True, metavar="OWNER/NAME", help="The repository on GitHub.")
@click.option("--branch", default="main", show_default=True)
def colab(repo: str, branch: str) -> None:
    """Write the Colab badge, and where Colab installs from, into every notebook of the clone; again: changes nothing."""
    from .colab import stamp
    from .reporting.runner import notebooks_folder

    for path, changed in stamp(notebooks_folder(), repo, branch).items():
        click.echo(f"{path.name}: {'stamped' if changed else 'as it was'}")


@main.command()
@click.option(
    "--profile", default="cpu", show_default=True,
    help="smoke, cpu, t4, gpu24, gpu80 or paper; the GPU profiles differ in notebook 05 alone.",
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
@click.option("--responses", required=True, type=click.Path(path_type=Path), help="JSONL or Parquet: {id, response[, gold]}.")
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
@click.option("--data", type=click.Path(path_type=Path), help="Folder of the raw numbers, or a run [default: figures/data].")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for pictures, tables and the manifest [default: figures].")
@click.option("--only", multiple=True, help="Only this figure or table (alpha_sweep, table_1 …); may be given several times.")
def figures(data: Path | None, out: Path | None, only: tuple[str, ...]) -> None:
    """Draw every figure and table again from its raw numbers; writes manifest.json."""
    from .reporting.manifest import redraw

    redraw(data, out, only, click.echo)


@main.command()
@click.option("--run", "run", required=True, type=click.Path(path_type=Path), help="What reproduce, train or evaluate wrote.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the page [default: DIR/report].")
def report(run: Path, out: Path | None) -> None:
    """Make a web page of a run: what was claimed and measured, figures, notebooks, settings, failures. Works offline."""
    from .reporting.report import build

    click.echo(f"report: {build(run, out)}")


@main.command()
@click.argument("folders", nargs=-1, required=True, metavar="DIR...", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="CSV file to write [default: the table is printed].")
def collect(folders: tuple[Path, ...], out: Path | None) -> None:
    """Put the runs of a parameter sweep into one table (CSV), a row for each run and method; failed runs have one, too."""
    from .reporting.collect import collect as read
    from .reporting.collect import write_table

    table = read(folders)
    click.echo(write_table(table, out) if out else table.to_csv(index=False), nl=bool(out))


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
