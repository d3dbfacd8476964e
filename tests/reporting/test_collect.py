"""Sweeps in one table: what was varied, pass@1 against hand-made counts, and a row for every run that has no result."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from click.testing import CliRunner
from nbformat.v4 import new_output

from gcpo_repro import cli
from gcpo_repro.errors import UserError
from gcpo_repro.evaluation.stats import pass_at_1
from gcpo_repro.reporting.collect import collect
from tests.reporting.fake_runs import PROVENANCE, experiment, notebook, ran, write

GRPO, GCPO = [[2, 2, 2, 2], [3, 3, 3, 3]], [[4, 3, 2, 1], [4, 4, 2, 2]]


def trained(folder: Path, **settings: Any) -> Path:
    write(folder / "run.json", {"kind": "train", "state": "done"})
    write(folder / "config.yaml", yaml.safe_dump(settings))
    write(folder / "results.json", experiment({"grpo": GRPO, "gcpo": GCPO}, **settings))
    for arm in ("grpo-seed0", "gcpo-seed0"):  # what it also leaves, and no run of its own
        write(folder / arm / "run.json", {"kind": "train", "state": "done"})
        write(folder / arm / "results.json", {**experiment({"gcpo": GCPO})["arms"][0], "kind": "arm"})
    return folder


def executed(path: Path, error: str = "", **parameters: Any) -> None:
    outputs = [new_output("error", ename="ValueError", evalue=error, traceback=[])] if error else []
    notebook(path, ran("1", *outputs), parameters=parameters, failed=bool(error))


@pytest.fixture
def sweep(tmp_path: Path) -> list[Path]:
    """Two cells that ran, and one of each way to have no result."""
    folders = [tmp_path / f"alpha-{alpha}" for alpha in (0.5, 2, 3, 4, 5, 6)]
    for folder, alpha in zip(folders[:2], (0.5, 2), strict=True):
        trained(folder, alpha=alpha, workers=int(alpha) + 1)  # how many work at a time is nothing that is studied
        executed(folder / "05_train_qlora.ipynb", alpha=alpha, out_dir=str(folder))
    write(folders[2] / "run.json", {"kind": "train", "state": "failed", "pid": 0})
    write(folders[2] / "config.yaml", yaml.safe_dump({"alpha": 3.0, "model": "toy"}))
    write(folders[2] / "grpo-seed0/run.json", {"kind": "train", "state": "done"})
    write(folders[2] / "grpo-seed0/log.txt", "fine")
    write(folders[2] / "gcpo-seed1/run.json", {"kind": "train", "state": "failed"})
    write(folders[2] / "gcpo-seed1/log.txt", "step 1\nError: no memory left\n")
    executed(folders[3] / "05_train_qlora.ipynb", "alpha must not be 4\nsecond line", alpha=4.0, out_dir=str(folders[3]))
    write(folders[4] / "run.json", {"kind": "train", "state": "running", "pid": 0})
    write(folders[4] / "config.yaml", yaml.safe_dump({"alpha": 5.0}))
    return folders


def test_rows_columns_and_numbers(sweep: list[Path]) -> None:
    table = collect(sweep)
    assert list(table.columns[:4]) == ["run", "state", "alpha", "method"]
    done = table[table["state"] == "done"]
    assert list(zip(done["alpha"], done["method"], strict=True)) == [(0.5, "grpo"), (0.5, "gcpo"), (2, "grpo"), (2, "gcpo")]
    row = done.iloc[1]
    assert row["pass_at_1"] == 22 / 32 and row["pass_at_1_before"] == 0.25
    interval = pass_at_1(GCPO, 4)
    assert (row["low"], row["high"], row["level"]) == (interval.low, interval.high, 0.95)
    assert (row["seeds"], row["questions"], row["samples"], row["model"]) == ("0 1", 4, 4, "toy")
    told = row[["commit", "torch", "cpu", "gpus", "wall_time_seconds"]]
    assert told.tolist() == ["0123456789abcdef-dirty", "2.13.0", "Test CPU", "", 130.0]


def test_each_run_without_a_result_has_a_row_that_says_so(sweep: list[Path]) -> None:
    table = collect(sweep).set_index("run")
    rows = table[table["state"] != "done"]
    assert rows["pass_at_1"].isna().all()
    assert rows["state"].to_dict() == {
        str(sweep[2]): "failed", str(sweep[3] / "05_train_qlora.ipynb"): "failed", str(sweep[4]): "interrupted",
        str(sweep[5]): "missing",
    }  # fmt: skip
    assert rows["alpha"].tolist()[:3] == [3.0, 4.0, 5.0]
    assert rows["reason"].tolist()[:2] == ["no memory left", "ValueError: alpha must not be 4"]


def test_the_folder_above_and_a_folder_twice(sweep: list[Path]) -> None:
    above = collect([sweep[0].parent])
    assert len(above) == len(collect(sweep)) - 1, "only what never started cannot be known"
    assert len(collect([sweep[0].parent, sweep[0], sweep[1]])) == len(above)


def test_the_copies_in_a_report_are_no_runs(sweep: list[Path]) -> None:
    write(sweep[0] / "page/report.json", {})
    write(sweep[0] / "page/_downloads/1/results.json", experiment({"gcpo": GCPO}))
    executed(sweep[1] / "report/copy.ipynb")
    write(sweep[1] / "report/report.json", {})
    assert len(collect([sweep[0].parent])) == len(collect(sweep)) - 1


def test_a_running_run_is_no_failure(tmp_path: Path) -> None:
    write(tmp_path / "run.json", {"kind": "train", "state": "running", "pid": os.getpid()})
    assert collect([tmp_path])["state"].tolist() == ["running"]


def test_an_arm_alone_a_torn_result_and_notebooks_beside_their_folders(tmp_path: Path) -> None:
    whole = experiment({"gcpo": GCPO}, kappa=0.5)
    write(tmp_path / "a/results.json", {**whole, **whole["arms"][0], "kind": "arm"})
    executed(tmp_path / "a.ipynb", kappa=0.5, out_dir="/moved/elsewhere")
    write(tmp_path / "b/run.json", {"kind": "train", "state": "done"})
    write(tmp_path / "b/results.json", '{"kind": "exper')
    executed(tmp_path / "c.ipynb", kappa=0.7, out_dir=str(tmp_path / "c"))
    table = collect([tmp_path])
    assert [Path(run).name for run in table["run"]] == ["a", "b", "c.ipynb"]
    assert table["state"].tolist() == ["done", "incomplete", "incomplete"]
    assert table["pass_at_1"][0] == 10 / 16 and table["seeds"][0] == "0"
    assert table["kappa"].tolist()[::2] == [0.5, 0.7]
    assert table["reason"].tolist()[1:] == ["results.json is missing or cannot be read", "the notebook left no results.json"]


def test_evaluations(tmp_path: Path) -> None:
    for name, adapter in (("base", None), ("tuned", "my/adapter")):
        found = {
            "benchmark": "gsm8k", "problems_asked": 30, "samples": 2,
            "pass_at_1": {"mean": 0.5, "low": None, "high": None, "level": 0.95, "n": 1, "se": None},
        }  # fmt: skip
        config = {"model": {"source": "Qwen/Qwen", "adapter": adapter}, "samples": 2, "temperature": 0.6}
        content = {**PROVENANCE, "seed": 7, "kind": "evaluation", "config": config, "benchmarks": [found]}
        write(tmp_path / name / "results.json", content)
    table = collect([tmp_path])
    assert table["model"].tolist() == ["Qwen/Qwen", "Qwen/Qwen + my/adapter"]
    assert table.attrs["varied"] == ["model"]
    assert table["benchmark"].tolist() == ["gsm8k"] * 2 and table["low"].isna().all() and table["seeds"].tolist() == ["7", "7"]


def test_one_number_written_in_two_ways_is_not_varied(tmp_path: Path) -> None:
    for name, alpha in (("a", 2), ("b", 2.0)):
        trained(tmp_path / name, alpha=alpha)
    assert collect([tmp_path]).attrs["varied"] == []


def test_command(sweep: list[Path], tmp_path: Path) -> None:
    out, names = tmp_path / "tables/sweep.csv", list(map(str, sweep))
    done = CliRunner().invoke(cli.main, ["collect", *names, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert done.output == f"8 rows of 6 runs (2 done, 2 failed, 1 interrupted, 1 missing); varied: alpha; {out}\n"
    printed = CliRunner().invoke(cli.main, ["collect", *names]).output
    assert printed == out.read_text()
    assert pd.read_csv(out)["alpha"].tolist()[:4] == [0.5, 0.5, 2.0, 2.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["empty"], "no run in empty; `gcpo-repro runs FOLDER`"),
        (["run", "--out", "table.xlsx"], "'table.xlsx' does not end in .csv"),
        (["run", "--out", "file/table.csv"], "cannot be written"),
        ([], "Missing argument 'DIR...'"),
    ],
)
def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    trained(tmp_path / "run")
    write(tmp_path / "file", "")
    done = CliRunner().invoke(cli.main, ["collect", *arguments])
    assert done.exit_code != 0 and message in done.output, done.output


def test_no_folders() -> None:
    with pytest.raises(UserError, match="none given"):
        collect([])
