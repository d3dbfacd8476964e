"""The console command: what it says, what it refuses in one message, and a small training from end to end."""

import json
import math
import re
import subprocess
import sys
import time

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import gcpo_repro
from gcpo_repro import UserError, cli, experiment, provenance
from gcpo_repro.data import load_rows
from gcpo_repro.reporting import runner as notebook_runner
from gcpo_repro.settings import arm_settings, load_settings, select


def call(*arguments):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments], prog_name="gcpo-repro")


def refused(*arguments):
    """The one message of a mistake: exit code 1 (2: click's own, for a wrong usage), no traceback."""
    result = call(*arguments)
    assert result.exit_code in (1, 2), result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    message = result.stderr
    assert message.count("Error: ") == 1
    if result.exit_code == 1:
        assert message.startswith("Error: ") and result.stdout == ""
    return message.split("Error: ")[1]


# Help


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_command_and_where_to_start(flag):
    result = call(flag)
    assert result.exit_code == 0
    for text in ("GCPO", "Start with", "reproduce --profile smoke", *cli.main.commands):
        assert text in result.output
    assert {"env", "pretrain", "train", "reproduce", "runs"} <= cli.main.commands.keys()


@pytest.mark.parametrize(
    "command, texts",
    [
        ("env", ["versions, hardware, threads and git commit"]),
        ("pretrain", ["--out", "--seed", "--threads", "8 minutes on 2", "runs/toy_policy"]),
        ("train", ["--config", "[required]", "--method", "grpo, gcpo", "--seed", "--out", "--force", "results.json"]),
        ("reproduce", ["--profile", "smoke, cpu, t4, gpu24, gpu80 or paper", "[default: cpu]", "--only", "--force", "clone"]),
        ("runs", ["[FOLDER]", "state, size and age"]),
    ],
)
def test_help_of_a_command(command, texts):
    result = call(command, "--help")
    assert result.exit_code == 0
    shown = " ".join(result.output.split())
    for text in texts:
        assert text in shown, text


def test_profiles_in_the_help_are_the_runners():
    shown = " ".join(call("reproduce", "--help").output.split())
    assert ", ".join(notebook_runner.PROFILES[:-1]) + " or " + notebook_runner.PROFILES[-1] in shown


def test_version():
    assert call("--version").output == f"gcpo-repro, version {gcpo_repro.__version__}\n"


def test_env_shows_what_results_record():
    result = call("env")
    assert result.exit_code == 0
    shown = dict(line.split(None, 1) for line in result.output.splitlines())
    assert shown["torch"] == torch.__version__ and shown["python"] == sys.version.split()[0]
    assert {"trl", "commit", "platform", "cpu", "cores", "memory_gib", "torch_threads", "gpus"} <= shown.keys()
    assert shown["torch_threads"] == str(torch.get_num_threads())
    assert re.fullmatch(r"unknown|[0-9a-f]{40}(-dirty)?", shown["commit"])


# Mistakes


def raising(error):
    def run(*arguments):
        raise error

    return run


def test_wrong_usage(tmp_path):
    assert "No such command 'trian'" in refused("trian")
    assert "Missing option '--config'" in refused("train")
    assert "--threads" in refused("pretrain", "--threads", "0")
    assert "'x' is not a valid integer" in refused("train", "--config", tmp_path / "a.yaml", "--seed", "x")


def test_unknown_profile_and_notebook(tmp_path):
    message = refused("reproduce", "--profile", "gpu1000", "--out", tmp_path / "out")
    assert message == "profile: 'gpu1000' is unknown; choose one of smoke, cpu, t4, gpu24, gpu80, paper.\n"
    assert "only: '99' is no notebook" in refused("reproduce", "--profile", "smoke", "--only", "05,99", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_failed_notebooks_make_the_command_fail(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(notebook_runner, "reproduce", lambda *arguments, echo: asked.append(arguments) or len(asked) > 1)
    arguments = ("reproduce", "--out", tmp_path, "--only", "00,05", "--only", "03", "--force")
    assert "some notebooks failed" in refused(*arguments)
    assert call(*arguments).exit_code == 0
    assert asked == [("cpu", tmp_path, ("00", "05", "03"), True)] * 2


@pytest.mark.parametrize(
    "content, arguments, message",
    [
        (None, (), "config: '.*run.yaml' cannot be read: .*No such file"),
        ("steps: [1\n", (), "config: '.*run.yaml' cannot be read: "),
        ("stepz: 3\n", (), "config: unknown setting stepz; known are methods, seeds"),
        ("steps: many\n", (), "steps: 'many' is not a int"),
        ("methods: [dpo]\n", (), "methods: 'dpo' is unknown, choose from grpo, gcpo"),
        ("steps: 3\n", ("--method", "dpo"), "methods: 'dpo' is unknown"),
        ("steps: 3\n", ("--seed", "-1"), r"seeds: \[-1\] must lie between"),
        ("batch_size: 6\n", (), "batch_size: 6 must be a multiple of group_size = 4"),
    ],
)
def test_configurations_that_train_refuses(tmp_path, monkeypatch, content, arguments, message):
    for function in ("run_arm", "run_experiment"):
        monkeypatch.setattr(experiment, function, raising(AssertionError("it trains")))
    config = tmp_path / "run.yaml"
    if content is not None:
        config.write_text(content)
    assert re.match(message, refused("train", "--config", config, "--out", tmp_path / "out", *arguments))
    assert not (tmp_path / "out").exists()


def test_pretrain_refuses_a_folder_that_holds_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    assert "thesis.tex" in refused("pretrain", "--out", tmp_path)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 3\nseeds: [0, 1]\n")
    return path


def test_a_users_mistake_is_one_message_and_a_bug_keeps_its_traceback(config, monkeypatch):
    one = ("train", "--config", config, "--method", "grpo", "--seed", "0")
    monkeypatch.setattr(experiment, "finished", lambda *_: False)
    monkeypatch.setattr(experiment, "run_arm", raising(UserError("model: 'x' could not be loaded")))
    assert refused(*one) == "model: 'x' could not be loaded\n"
    monkeypatch.setattr(experiment, "run_arm", raising(ValueError("a bug")))
    result = call(*one)
    assert result.exit_code == 1 and isinstance(result.exception, ValueError) and "Error:" not in result.output


@pytest.mark.parametrize("arguments, function", [((), "run_experiment"), (("--method", "gcpo", "--seed", "1"), "run_arm")])
def test_ctrl_c_exits_with_130(config, monkeypatch, arguments, function):
    monkeypatch.setattr(experiment, function, raising(KeyboardInterrupt()))
    result = call("train", "--config", config, *arguments)
    assert result.exit_code == 130
    assert "Interrupted. What was finished is kept; the same command goes on with the rest." in result.stderr


def test_train_chooses_arms_and_folder(config, monkeypatch):
    calls = []
    monkeypatch.setattr(experiment, "run_experiment", lambda *arguments: calls.append(("all", *arguments)))
    monkeypatch.setattr(experiment, "run_arm", lambda *arguments: calls.append(("one", *arguments)))
    settings = load_settings(config)
    assert call("train", "--config", config).stdout == "results: runs/run/results.json\n"
    call("train", "--config", config, "--method", "grpo", "--force", "--out", "x")
    call("train", "--config", config, "--method", "gcpo", "--seed", "7")
    call("train", "--config", config, "--seed", "7", "--seed", "8")
    assert [(kind, chosen.methods, chosen.seeds, str(out), *rest) for kind, chosen, out, *rest in calls] == [
        ("all", ("grpo", "gcpo"), (0, 1), "runs/run", False, "auto"),
        ("all", ("grpo",), (0, 1), "x", True, "never"),
        ("one", ("gcpo",), (7,), "runs/run", "auto"),
        ("all", ("grpo", "gcpo"), (7, 8), "runs/run", False, "auto"),
    ]
    assert calls[3][1] == select(settings, None, (7, 8))


def test_runs_are_listed_with_state_and_size(tmp_path):
    for name, state in (("done", "done"), ("broken", "failed"), ("stopped", "running")):
        provenance.write_json(tmp_path / name / "run.json", {"kind": "train", "state": state, "pid": 2**22 + 1})
    (tmp_path / "done" / "adapters").write_bytes(bytes(2_500_000))
    (tmp_path / "notes.txt").write_text("no run")
    result = call("runs", tmp_path)
    assert result.exit_code == 0
    lines = [line.split() for line in result.output.splitlines()]
    assert [line[:2] for line in lines] == [["broken", "failed"], ["done", "done"], ["stopped", "interrupted"]]
    assert lines[1][2:4] == ["2.5", "MB"]
    today = time.strftime("%Y-%m-%d")
    assert all(line[4] >= today for line in lines)
    assert call("runs", tmp_path / "nothing").output == f"no runs in {tmp_path / 'nothing'}\n"


# End to end: the toy policy, two steps

TINY = """\
seeds: [0]
steps: 2
eval_questions: 4
eval_samples: 2
learning_rate: 1e-3
more: ["eval_every=1", "batch_size=8", "device_batch_size=8", "train_questions=16", "device=cpu"]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The real command in a process of its own: what it printed, its folder, its configuration file."""
    folder = tmp_path_factory.mktemp("train")
    config = folder / "tiny.yaml"
    config.write_text(TINY)
    command = [sys.executable, "-m", "gcpo_repro.cli", "train", "--config", str(config), "--method", "gcpo", "--seed", "5"]
    done = subprocess.run([*command, "--out", str(folder / "out")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder / "out", config


def test_training_says_what_it_does(run):
    printed, out, _ = run
    lines = printed.splitlines()
    assert lines[0] == f"starts from the beginning: no checkpoint in {out}"
    assert re.match(r"policy: [\d,]+ trainable of [\d,]+ parameters \(.*%\), nf4, float32 on cpu; memory: ", lines[1])
    for start in ("step 0: pass_at_1 ", "step 1: reward ", "step 1: pass_at_1 ", "step 2: reward ", "step 2: pass_at_1 "):
        assert sum(line.startswith(start) for line in lines) == 1, start
    assert lines[-1] == f"results: {out / 'results.json'}"


def test_training_records_all_that_issue_2_asks_for(run):
    _, out, config = run
    result = json.loads((out / "results.json").read_text())
    settings = arm_settings(select(load_settings(config), "gcpo", (5,)), "gcpo", 5)
    assert result["config"] == settings.as_dict() and result["config"]["learning_rate"] == 1e-3
    assert (result["method"], result["seed"], result["kind"]) == ("gcpo", 5, "arm")
    assert result["versions"] == provenance.versions()
    assert re.fullmatch(r"unknown|[0-9a-f]{40}(-dirty)?", result["commit"])
    assert result["hardware"]["cores"] >= 1 and result["hardware"]["torch_threads"] == 1
    assert 0 < result["wall_time_seconds"] < 120
    assert json.loads((out / "run.json").read_text())["state"] == "done"


def test_training_records_every_step(run):
    _, out, _ = run
    steps = json.loads((out / "results.json").read_text())["steps"]
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert math.isfinite(step["loss"]) and math.isfinite(step["grad_norm"]) and 0 <= step["reward"] <= 1
        assert step["learning_rate"] == 1e-3
        assert step["gcpo/kl"] >= 0 and -2 <= step["gcpo/upsilon_mean"] <= 2 and step["gcpo/unscorable"] == 0
    assert any(step["grad_norm"] > 0 for step in steps)


def test_training_evaluates_before_during_and_after_with_counts(run):
    _, out, config = run
    evaluations = json.loads((out / "results.json").read_text())["evaluations"]
    assert [evaluation["step"] for evaluation in evaluations] == [0, 1, 2]
    for evaluation in evaluations:
        counts = evaluation["counts"]
        assert len(counts["correct"]) == 4 and counts["samples"] == 2 and counts["seed"] == load_settings(config).eval_seed
        assert all(0 <= c <= 2 for c in counts["correct"])
        assert counts["unscorable"] == [0] * 4 and len(counts["truncated"]) == 4
    # the same lines came out while it ran
    lines = [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines()]
    measured = [line["pass_at_1"] for line in lines if "pass_at_1" in line]
    assert measured == [sum(e["counts"]["correct"]) / 8 for e in evaluations]


def test_training_leaves_trained_adapters(run):
    _, out, _ = run
    adapters = load_file(out / "policy" / "adapter_model.safetensors")
    # B starts at zero: whatever it holds was learned
    learned = [weight for name, weight in adapters.items() if "lora_B" in name]
    assert learned and any(weight.abs().max() > 1e-4 for weight in learned)
    assert not list(out.glob(".*"))


def test_evaluated_questions_are_held_out(run):
    _, _, config = run
    settings = load_settings(config)
    train = load_rows("toy", settings.train_questions, settings.eval_seed, "train")
    held_out = load_rows("toy", settings.eval_questions, settings.eval_seed, "held_out")
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}


def test_a_second_call_knows_and_force_trains_again(run, monkeypatch):
    _, out, config = run
    trained = []
    monkeypatch.setattr(experiment, "run_arm", lambda settings, *_: trained.append(settings.seeds))
    arguments = ("train", "--config", config, "--method", "gcpo", "--seed", "5", "--out", out)
    result = call(*arguments)
    assert result.exit_code == 0 and trained == []
    assert result.stdout == f"already trained with these settings (--force trains again)\nresults: {out / 'results.json'}\n"
    call(*arguments, "--force")
    assert trained == [(5,)]
    call("train", "--config", config, "--method", "gcpo", "--seed", "6", "--out", out)
    assert trained == [(5,), (6,)], "another seed is not the same settings"
