"""What goes wrong while a model trains: what was done is kept, one message says what happened, and the same command goes on."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import safetensors
import yaml
from click.testing import CliRunner

from gcpo_repro import UserError
from gcpo_repro.checkpoints import checkpoint_folder, checkpoints, damage, newest, step_of
from gcpo_repro.cli import main
from gcpo_repro.experiment import _reason, run_arm

from . import trainings
from .trainings import at_event, die, killed_at, outcome, through

TINY = dataclasses.replace(trainings.TINY, methods=("grpo",))  # faster, and all methods share what is tested here


def state(out):
    return json.loads((out / "run.json").read_text())["state"]


def steps_shown(out):
    lines = [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


# Checkpoints


def test_torn_and_corrupted_checkpoints(tmp_path, capsys):
    """Killed while checkpoint 4 is written, and then one bit of checkpoint 6 turns over: the one before is used each time."""
    from gcpo_repro import resuming

    def torn(checkpoint):
        if step_of(checkpoint) == 4:
            die()
        return seal(checkpoint)

    seal = resuming.seal
    with mock.patch.object(resuming, "seal", torn), pytest.raises(BaseException, match="^$"):
        run_arm(TINY, tmp_path)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [4, 2] and step_of(newest(tmp_path)) == 2
    capsys.readouterr()
    killed_at(TINY, tmp_path, "on_step_begin", 6)
    told = capsys.readouterr().out
    assert "checkpoint-4: it was not written to its end; it is removed and the one before it is used" in told
    assert "goes on from step 2" in told
    optimizer = checkpoint_folder(tmp_path, 6) / "optimizer.pt"
    content = bytearray(optimizer.read_bytes())
    content[len(content) // 2] ^= 1
    optimizer.write_bytes(content)
    run_arm(TINY, tmp_path)
    told = capsys.readouterr().out
    assert "checkpoint-6: optimizer.pt is not what was written" in told and "goes on from step 4" in told
    assert outcome(tmp_path) == through(TINY)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB, where this may be made (root in a container that allows it)."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder, free):
    """Leave so many bytes."""
    left = os.statvfs(folder)
    with open(folder / "ballast", "wb") as file:
        file.write(bytes(left.f_bavail * left.f_frsize - free))


@pytest.mark.parametrize("free", [150_000, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 60_000, 250_000, 400_000))])
def test_a_real_full_disk(small_disk, free):
    """However far the second checkpoint gets, the first survives, the message says so, and the training can go on."""
    arm = small_disk / "arm"
    with at_event("on_step_begin", 3, lambda: fill(small_disk, free)), pytest.raises(UserError) as caught:
        run_arm(TINY, arm)
    told = "is on a full disk; free some space. The checkpoint of step 2 is kept; the same command goes on from it."
    assert str(caught.value) == f"out: {str(arm)!r} {told}"
    assert [step_of(path) for path in checkpoints(arm)] == [2] and not damage(checkpoint_folder(arm, 2))
    (small_disk / "ballast").unlink()
    run_arm(TINY, arm)
    assert outcome(arm) == through(TINY)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_in_the_first_checkpoint(tmp_path, error):
    """Where no disk can be filled: what is raised then. Nothing torn stays, and nothing is promised."""

    def full(self, folder):
        raise error

    arm = tmp_path / "arm"
    with mock.patch("gcpo_repro.trainer.CheckedGRPOTrainer._save_optimizer_and_scheduler", full):
        with pytest.raises(UserError, match="on a full disk; free some space. There is no checkpoint yet; the same command"):
            run_arm(dataclasses.replace(TINY, steps=3), arm)
    assert checkpoints(arm) == [] and state(arm) == "failed" and not (arm / "results.json").exists()


# Signals


def send(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_answers_are_used_up(tmp_path, number):
    """It comes before step 3; with two updates per batch the checkpoint is that of step 4. The command ends with 130."""
    settings = dataclasses.replace(TINY, num_iterations=2, save_every=0)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings.as_dict()))
    command = ["train", "--config", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "arm")]
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with at_event("on_step_begin", 2, send(number)):
        found = CliRunner().invoke(main, command)
    assert found.exit_code == 130
    assert "Interrupted. The checkpoint of step 4 is kept; the same command goes on from it." in found.output
    assert state(tmp_path / "arm") == "interrupted" and steps_shown(tmp_path / "arm") == [1, 2, 3, 4]
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    if number == signal.SIGTERM:
        assert CliRunner().invoke(main, command).exit_code == 0
        assert outcome(tmp_path / "arm") == through(dataclasses.replace(settings, save_every=1))


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    with at_event("on_step_begin", 2, send(signal.SIGINT)), at_event("on_pre_optimizer_step", 2, send(signal.SIGINT)):
        with pytest.raises(KeyboardInterrupt, match="^$"):
            run_arm(TINY, tmp_path)
    assert steps_shown(tmp_path) == [1, 2] and [step_of(path) for path in checkpoints(tmp_path)] == [2]
    assert state(tmp_path) == "interrupted"


# Rewards, data, numbers

REWARD = """\
calls = 0
failing = True

def last_digit(completions, **columns):
    global calls
    calls += 1
    if failing and calls == 5:
        raise KeyError("unit")
    return [float(len(text) % 2) for text in completions]
"""


def test_a_reward_that_fails_and_data_that_change(tmp_path, monkeypatch, capsys):
    """What was done is kept; a mended reward function goes on from there; other questions are refused."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "my_reward_of_step_k.py").write_text(REWARD)
    rows, arm = tmp_path / "rows.jsonl", tmp_path / "arm"
    text = "".join(json.dumps({"prompt": f"{k}a+1b-9c+9?", "answer": str(k)}) + "\n" for k in range(10))
    rows.write_text(text)
    settings = dataclasses.replace(TINY, data=str(rows), reward="my_reward_of_step_k:last_digit", eval_every=0)
    with pytest.raises(UserError, match="last_digit failed with KeyError: 'unit'"):
        run_arm(settings, arm)
    assert "The checkpoint of step 2 is kept; the same command goes on from it." in capsys.readouterr().err
    assert steps_shown(arm) == [1, 2, 3] and state(arm) == "failed"

    sys.modules["my_reward_of_step_k"].failing = False
    rows.write_text(text.replace("9c", "8c"))
    with pytest.raises(UserError, match="data: the questions are not those of .*checkpoint-2; bring those back"):
        run_arm(settings, arm)
    rows.write_text(text)
    run_arm(settings, arm)
    assert outcome(arm) == through(settings)


def test_a_loss_that_is_no_number_is_not_gone_on_from(tmp_path):
    """The guard stops; the newest checkpoint is from before, and a training without the fault goes on from it."""
    from gcpo_repro.checked import CheckedGRPOTrainer

    def broken(self, model, inputs):
        return whole(self, model, inputs) * (float("nan") if self.state.global_step == 5 else 1.0)

    whole = CheckedGRPOTrainer._compute_loss
    with mock.patch.object(CheckedGRPOTrainer, "_compute_loss", broken), pytest.raises(UserError, match="nan"):
        run_arm(TINY, tmp_path)
    assert step_of(newest(tmp_path)) == 4
    run_arm(TINY, tmp_path)
    assert outcome(tmp_path) == through(TINY)


# Experiments


@pytest.mark.parametrize(
    "code, log, reason",
    [
        (1, "step 1\nError: resume: made with\nother settings\nbeta\n", "resume: made with\nother settings\nbeta"),
        (1, "Error: old\nstep 2\nError: new, as told\n", "new, as told"),
        (1, "a\nTraceback (most recent call last):\n  File x\n    y()\nValueError: one\n two\n", "ValueError: one\n two"),
        (130, "step 4\nInterrupted. The checkpoint of step 4 is kept.\n", "Interrupted. The checkpoint of step 4 is kept."),
        (1, "Traceback (most recent call last):\n  File x\n", "  File x"),
        (1, "", "no output"),
        (-9, "step 3\n", "killed by SIGKILL, often for lack of memory"),
        (-11, "step 3\n", "killed by SIGSEGV"),
    ],
)  # fmt: skip
def test_why_an_arm_ended(code, log, reason):
    assert _reason(code, log) == reason


@pytest.mark.slow
def test_an_interrupted_experiment_goes_on(tmp_path):
    """Ctrl-C while two real arms train: both leave a checkpoint, and the same command finishes them to the same bits."""
    settings = dataclasses.replace(TINY, methods=("grpo", "gcpo"), steps=60, eval_every=0, workers=2, save_every=0)
    config, out = tmp_path / "two.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump(settings.as_dict()))
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from gcpo_repro.cli import main; main()"
    command = [sys.executable, "-c", code, "train", "--config", str(config), "--out"]
    child = subprocess.Popen([*command, str(out)], stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    arms, deadline = [out / "grpo-seed5", out / "gcpo-seed5"], time.time() + 200
    while not all((arm / "progress.jsonl").exists() and len(steps_shown(arm)) > 2 for arm in arms) and time.time() < deadline:
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    error = child.communicate(timeout=120)[1]
    assert child.returncode == 130 and "the same command goes on with the rest" in error
    at = [step_of(newest(arm)) for arm in arms]
    assert all(2 < step < 60 for step in at) and {state(arm) for arm in arms} == {"interrupted"}
    subprocess.run([*command, str(out)], check=True)
    subprocess.run([*command, str(tmp_path / "through")], check=True)
    for arm, step in zip(arms, at, strict=True):
        assert json.loads((arm / "results.json").read_text())["resumed_at"] == [step]
        assert outcome(arm) == outcome(tmp_path / "through" / arm.name)
