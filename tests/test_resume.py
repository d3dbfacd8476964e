"""A training that was interrupted and gone on with is, to the bit, the one that ran through."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import psutil
import pytest
import yaml
from click.testing import CliRunner

from gcpo_repro import UserError
from gcpo_repro.checkpoints import (
    MANIFEST,
    STATE,
    checkpoint_folder,
    checkpoints,
    damage,
    held,
    newest,
    prepare,
    read_state,
    rotate,
    seal,
    step_of,
)
from gcpo_repro.cli import main
from gcpo_repro.experiment import fingerprint, run_arm, run_experiment
from gcpo_repro.settings import NOT_SHAPING, Settings, shaping

from .trainings import TINY, killed_at, outcome, through


@pytest.fixture
def written(tmp_path):
    """Makes a whole checkpoint of a step, with these settings, in the arm's folder `tmp_path`."""

    def write(step, settings=None):
        folder = checkpoint_folder(tmp_path, step)
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter" / "weights.bin").write_bytes(bytes(range(200)))
        (folder / STATE).write_text(json.dumps({"settings": settings or {}}))
        seal(folder)
        return folder

    return write


def history(out):
    return json.loads((out / "results.json").read_text())["resumed_at"]


@pytest.mark.parametrize(
    "changes, deaths, resumed",
    [
        (  # before the first checkpoint, inside a step, between a step and its log, at the start of a pass over the data
            {}, [("on_step_begin", 1), ("on_pre_optimizer_step", 3), ("on_step_begin", 4), ("on_log", 5)], [2, 4],
        ),
        (  # checkpoints only after even steps, where the answers are used up; the last one is whole, its end is missing
            {"num_iterations": 2, "save_every": 1, "quantization": "nf4"},
            [("on_pre_optimizer_step", 1), ("on_step_begin", 3), ("on_step_end", 5), ("on_train_end", 7)], [2, 4, 7],
        ),
        pytest.param({"methods": "grpo", "quantization": "int8"}, [("on_optimizer_step", 5)], [4], marks=pytest.mark.slow),
        pytest.param({"methods": "gvpo"}, [("on_optimizer_step", 5)], [4], marks=pytest.mark.slow),
        pytest.param({"lora_rank": 0}, [("on_optimizer_step", 5)], [4], marks=pytest.mark.slow),
    ],
    ids=["fp32", "nf4, num_iterations=2", "grpo, int8", "gvpo", "all weights"],
)  # fmt: skip
def test_a_killed_training_goes_on_to_the_same_bits(tmp_path, changes, deaths, resumed):
    """Losses, gradient norms, metrics, evaluations, log lines, weights; however often it dies."""
    settings = dataclasses.replace(TINY, **changes)
    expected = through(settings)
    for event, step in deaths:
        killed_at(settings, tmp_path / "arm", event, step)
    run_arm(settings, tmp_path / "arm")
    assert outcome(tmp_path / "arm") == expected
    assert history(tmp_path / "arm") == resumed
    lines = [json.loads(line) for line in (tmp_path / "arm" / "progress.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 8)), "no gap, nothing twice"
    assert [step_of(path) for path in checkpoints(tmp_path / "arm")] == [7, 6]


def test_the_comparison_can_fail():
    """Other settings give other losses: identity is not trivial here, and the losses are not all zero."""
    one, other = through(TINY), through(dataclasses.replace(TINY, num_iterations=2, save_every=1, quantization="nf4"))
    losses = [[line["loss"] for line in run[0] if "loss" in line] for run in (one, other)]
    assert losses[0] != losses[1] and len(set(losses[0])) > 5


def test_a_checkpoint_holds_what_trl_loses(tmp_path):
    """With 2 updates per batch of 4 questions, 4 steps are one pass over the 8 questions."""
    settings = dataclasses.replace(TINY, num_iterations=2)
    killed_at(settings, tmp_path, "on_step_begin", 5)
    state = read_state(checkpoint_folder(tmp_path, 4))
    assert (state["step"], state["epochs"]) == (4, 1)
    assert state["settings"] == shaping(settings) and state["resumed_at"] == [] and state["seconds"] > 0
    assert [line["step"] for line in state["callbacks"]["Watch"]["steps"]] == [1, 2, 3, 4]
    assert [evaluation["step"] for evaluation in state["callbacks"]["Watch"]["evaluations"]] == [0, 2, 4]
    names = {path.name for path in checkpoint_folder(tmp_path, 4).iterdir()}
    assert names >= {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


def test_a_result_tells_of_its_interruptions(tmp_path, capsys):
    """TensorBoard shows no step twice, the wall time counts from the first start, and what else changed is told."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = dataclasses.replace(TINY, report_to="tensorboard", methods="grpo")
    killed_at(settings, tmp_path, "on_step_begin", 5)
    checkpoint = checkpoint_folder(tmp_path, 4)
    (checkpoint / STATE).write_text(json.dumps({**read_state(checkpoint), "seconds": 5000.0, "processes": 2, "code": "old"}))
    seal(checkpoint)
    run_arm(settings, tmp_path)
    assert history(tmp_path) == [4]
    assert "note: code, processes changed since checkpoint-4" in capsys.readouterr().out
    assert 5000 < json.loads((tmp_path / "results.json").read_text())["wall_time_seconds"] < 5600
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in shown.Scalars("train/loss")] == list(range(1, 8))


# The command and the arms of an experiment


@pytest.mark.parametrize(
    "options, expected",
    [
        ([], "goes on from step 2"),
        (["--resume", "auto"], "goes on from step 2"),
        (["--resume", "never"], None),
        (["--force"], None),
        (["--resume", "auto", "--force"], None),
    ],
)
def test_the_command_goes_on_or_starts_anew(tmp_path, monkeypatch, written, options, expected):
    """`--resume auto` is the default; a result, even of other settings, means that nothing is left to go on with."""
    arm = dataclasses.replace(TINY, steps=3)
    found = []

    def train(settings, out):
        found.append(newest(out))
        return {"kind": "arm", "method": "gcpo", "seed": 5, "evaluations": [], "steps": []}

    monkeypatch.setitem(sys.modules, "gcpo_repro.arm", types.SimpleNamespace(train=train))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(arm.as_dict()))
    command = ["train", "--config", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path), *options]
    kept = written(2, shaping(arm))
    output = CliRunner().invoke(main, command).output
    assert (f"{expected} ({kept})" in output) if expected else "goes on" not in output
    assert found == [kept if expected else None]

    again = CliRunner().invoke(main, command).output
    assert ("already trained with these settings" in again) == ("--force" not in options)
    written(6, {"other": "settings"})
    (tmp_path / "results.json").write_text("{}")
    assert CliRunner().invoke(main, command).exit_code == 0 and found[-1] is None


STAND_IN = """\
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
with open(out.parent / "commands.txt", "a") as file:
    file.write(" ".join(sys.argv[sys.argv.index("--out") + 2 :]) + "\\n")
evaluation = {"step": 0, "counts": {"correct": [1], "samples": 1}}
result = {"method": "gcpo", "seed": 1, "evaluations": [evaluation], "steps": [], "wall_time_seconds": 1.0}
(out / "results.json").write_text(json.dumps(result))
"""


@pytest.mark.parametrize(
    "options, passed",
    [({}, "--resume auto"), ({"resume": "never"}, "--resume never"), ({"force": True}, "--resume auto --force")],
)
def test_an_experiment_tells_its_arms_whether_to_resume(tmp_path, monkeypatch, options, passed):
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\n{STAND_IN}")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    run_experiment(Settings(methods="gcpo", seeds=1), tmp_path / "out", **options)
    assert (tmp_path / "out" / "commands.txt").read_text() == passed + "\n"


# Checkpoints as folders


def test_checkpoints_are_ordered_by_step(tmp_path, written):
    for step in (9, 100, 20):
        written(step)
    checkpoint_folder(tmp_path, 300).mkdir()  # torn
    (tmp_path / "trainer" / "checkpoint-old").mkdir()  # somebody's own
    assert [step_of(path) for path in checkpoints(tmp_path)] == [300, 100, 20, 9]
    assert newest(tmp_path) == checkpoint_folder(tmp_path, 100)
    rotate(tmp_path)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [100, 20]
    assert (tmp_path / "trainer" / "checkpoint-old").exists()
    assert newest(tmp_path / "absent") is None and checkpoints(tmp_path / "absent") == []


def truncate(folder):
    (folder / "adapter" / "weights.bin").write_bytes(bytes(range(199)))


def flip(folder):
    (folder / "adapter" / "weights.bin").write_bytes(bytes(range(199)) + b"\x00")


@pytest.mark.parametrize(
    "harm, told",
    [
        (lambda folder: (folder / MANIFEST).unlink(), "it was not written to its end"),
        (lambda folder: (folder / MANIFEST).write_text('{"files": {"adapt'), "it cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "it cannot be read"),
        (lambda folder: (folder / "adapter" / "weights.bin").unlink(), "adapter/weights.bin is missing"),
        (truncate, "adapter/weights.bin has 199 bytes instead of 200"),
        (flip, "adapter/weights.bin is not what was written"),
    ],
)
def test_damage_is_seen_told_and_left_out(tmp_path, written, harm, told):
    older, newer, lines = written(10), written(20), []
    assert damage(newer) == ""
    harm(newer)
    assert damage(newer).startswith(told)
    assert prepare(tmp_path, {}, say=lines.append) == older
    assert lines[0].startswith(f"checkpoint-20: {told}") and lines[1] == f"goes on from step 10 ({older})"
    assert not newer.exists()
    harm(older)
    assert prepare(tmp_path, {}, say=lines.append) is None
    assert lines[-1] == f"starts from the beginning: no checkpoint in {tmp_path}"


def test_other_settings_are_refused_by_name(tmp_path, written):
    older, newer = written(10, {"beta": 0.04, "steps": 40}), written(20, {"beta": 0.04, "steps": 40})
    assert prepare(tmp_path, {"beta": 0.04, "steps": 40}) == newer
    told = r"checkpoint-20 was made with other settings: beta \(0.04, now 0.1\), kappa \(None, now 1"
    with pytest.raises(UserError, match=told):
        prepare(tmp_path, {"beta": 0.1, "steps": 40, "kappa": 1})
    assert older.exists() and newer.exists(), "a refusal costs nothing"
    assert prepare(tmp_path, {"beta": 0.1}, "never") is None and not checkpoints(tmp_path)
    with pytest.raises(UserError, match="resume: 'maybe' is unknown, choose from auto, never"):
        prepare(tmp_path, {}, "maybe")


def test_what_does_not_shape_a_result_may_change():
    other = dataclasses.replace(TINY, workers=3, save_every=5)
    assert shaping(other) == shaping(TINY) and fingerprint(other) == fingerprint(TINY)
    assert set(TINY.as_dict()) - set(shaping(TINY)) == set(NOT_SHAPING)


def test_a_folder_is_held_by_one_process(tmp_path):
    code = f"from gcpo_repro.checkpoints import held; from pathlib import Path; held(Path({str(tmp_path)!r})).__enter__()"
    with held(tmp_path):
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "trains in" in found.stderr and "wait for it or choose another folder" in found.stderr
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    with held(tmp_path):  # a process that ended, however, holds nothing
        pass


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_two_processes_stop_together_and_go_on(tmp_path, number):
    """Each has its own random state. SIGTERM to torchrun reaches both, perhaps in different steps: they stop after the same."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(dataclasses.replace(TINY, steps=40, eval_every=0).as_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "gcpo_repro.cli"]
    command += ["train", "--config", str(tmp_path / "tiny.yaml"), "--out"]
    where = {"cwd": Path(__file__).parents[1], "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    out = tmp_path / "arm"
    run = subprocess.Popen([*command, str(out)], **where)
    progress, deadline = out / "progress.jsonl", time.time() + 240
    while not (progress.exists() and progress.read_text().count('"loss"') > 5) and time.time() < deadline:
        time.sleep(0.05)
    if number == signal.SIGKILL:  # the workers first: they would outlive torchrun
        for process in psutil.Process(run.pid).children(recursive=True):
            process.kill()
        run.kill()
    run.send_signal(number)
    run.wait(timeout=120)
    at = step_of(newest(out))
    assert 4 <= at < 40 and not (out / "results.json").exists()
    if number == signal.SIGTERM:
        assert json.loads((out / "run.json").read_text())["state"] == "interrupted"
    for folder in (out, tmp_path / "through"):
        subprocess.run([*command, str(folder)], **where, check=True, timeout=240)
    assert history(out) == [at] and outcome(out) == outcome(tmp_path / "through")


@pytest.mark.slow
def test_real_kills_at_every_place(tmp_path):
    """SIGKILL, also while a checkpoint is written; the script exits with 1 if any outcome differs."""
    script = Path(__file__).parent / "benchmarks" / "resume.py"
    found = subprocess.run([sys.executable, str(script), "--random", "1", "--out", str(tmp_path / "rows.json")], timeout=900)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert found.returncode == 0 and len(rows) == 28 and all(row["identical"] for row in rows)
    assert sum(row["torn_checkpoint_found"] for row in rows) >= 6
