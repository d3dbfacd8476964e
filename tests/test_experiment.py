"""Settings, and experiments whose training is a stand-in: the arms' processes, faults and files are real."""

import dataclasses
import errno
import json
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import psutil
import pytest
import safetensors
import yaml

from gcpo_repro import UserError, provenance
from gcpo_repro.experiment import (
    arm_folder,
    collect,
    fingerprint,
    finished,
    load_results,
    run_arm,
    run_experiment,
)
from gcpo_repro.reporting.runner import declared_parameters, list_runs
from gcpo_repro.settings import NOT_SHAPING, NOTEBOOK_ONLY, Settings, arm_settings, load_settings, make_settings, select

PYTHON = sys.executable  # some tests put a stand-in there
NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
PROFILES = sorted(NOTEBOOKS.glob("profiles/*/05_train_qlora.yaml"))


# Settings


def test_values_take_the_type_of_their_default():
    """YAML 1.1 reads 1e-6 as text; a single value serves as a list of one."""
    settings = Settings(learning_rate="1e-6", alpha=1, steps=3.0, group_size="4", methods="gcpo", seeds=7, kappa="0")
    found = settings.as_dict()
    expected = {"learning_rate": 1e-6, "alpha": 1.0, "steps": 3, "group_size": 4, "methods": ["gcpo"], "seeds": [7], "kappa": 0.0}
    for name, value in expected.items():
        assert found[name] == value and type(found[name]) is type(value), name
    assert Settings(seeds=["3", 4.0]).seeds == (3, 4)
    assert Settings(reward=["exact", "format"]).reward_weights == (1.0, 1.0) and Settings(report_to=[]).report_to == ()
    assert Settings(reward="a:b", reward_weights="-2").reward_weights == (-2.0,)
    assert Settings(**found) == settings


@pytest.mark.parametrize(
    "values, message",
    [
        ({"steps": "many"}, "steps: 'many' is not a int"),
        ({"steps": 2.5}, "steps: 2.5 is not a int"),
        ({"steps": True}, "steps: True is not a int"),
        ({"steps": float("inf")}, "steps: inf is not a int"),
        ({"steps": None}, "steps: None is not a int"),
        ({"steps": [3]}, r"steps: \[3\] is not a int"),
        ({"alpha": "two"}, "alpha: 'two' is not a float"),
        ({"alpha": True}, "alpha: True is not a float"),
        ({"model": 7}, "model: 7 is not a str"),
        ({"gradient_checkpointing": "yes"}, "gradient_checkpointing: 'yes' is not a bool"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing: 1 is not a bool"),
        ({"seeds": [0, "x"]}, r"seeds: \[0, 'x'\] is not a list of int"),
        ({"seeds": [0, None]}, r"seeds: \[0, None\] is not a list of int"),
        ({"methods": [1]}, r"methods: \[1\] is not a list of str"),
        ({"methods": {"grpo": 1}}, "methods: .* is not a list of str"),
        ({"methods": ["grpo", "dpo"]}, "methods: 'dpo' is unknown, choose from grpo, gcpo"),
        ({"methods": []}, r"methods: \[\] must name at least one"),
        ({"seeds": []}, r"seeds: \[\] must name at least one"),
        ({"methods": ["gcpo", "gcpo"]}, "methods: .*none twice"),
        ({"seeds": [1, 0, 1]}, r"seeds: \[1, 0, 1\] must name at least one, and none twice"),
        ({"seeds": [-1]}, r"seeds: \[-1\] must lie between 0 and"),
        ({"seeds": [2**32]}, "must lie between 0 and"),
        ({"steps": 0}, "steps: 0 must be at least 1"),
        ({"group_size": 1}, "group_size: 1 must be at least 2"),
        ({"workers": 0}, "workers: 0 must be at least 1"),
        ({"threads": -1}, "threads: -1 must be at least 1"),
        ({"eval_every": -1}, "eval_every: -1 must be at least 0"),
        ({"eval_seed": -5}, "eval_seed: -5 must be at least 0"),
        ({"eval_questions": 0}, "eval_questions: 0 must be at least 1"),
        ({"lora_rank": -1}, "lora_rank: -1 must be at least 0"),
        ({"learning_rate": -1e-3}, "learning_rate: -0.001 must be finite and not negative"),
        ({"learning_rate": float("nan")}, "learning_rate: nan must be finite"),
        ({"beta": "inf"}, "beta: inf must be finite"),
        ({"reward": []}, r"reward_weights: .* must be one number for each of reward = \[\]"),
        ({"reward": ["exact", "exact"]}, "must be one number for each of reward = .*, which names none twice"),
        ({"reward": ["exact", "format"], "reward_weights": [1, 2, 3]}, r"reward_weights: \[1.0, 2.0, 3.0\] must be one number"),
        ({"reward_weights": [float("nan")]}, "reward_weights: .* must be finite"),
        ({"reward": ["exact", "format"], "reward_weights": 0}, "reward_weights: .* and not all 0"),
        ({"check_overlap": [3]}, r"check_overlap: \[3\] is not a list of str"),
        ({"report_to": ["tensorboard", "mlflow"]}, "report_to: mlflow unknown, choose from tensorboard, trackio, wandb"),
        ({"on_divergence": "panic"}, "on_divergence: 'panic' is unknown, choose from stop, warn, off"),
        ({"on_collapse": ""}, "on_collapse: '' is unknown"),
        ({"completions_every": -1}, "completions_every: -1 must be at least 0"),
        ({"kappa": -0.1}, "kappa: -0.1 must be finite and not negative"),
        ({"temperature": 0}, "temperature: 0 leaves nothing to sample"),
        ({"batch_size": 64, "group_size": 5}, "batch_size: 64 must be a multiple of group_size = 5"),
        ({"batch_size": 64, "device_batch_size": 48}, "and of device_batch_size = 48"),
        ({"batch_size": 32}, "batch_size: 32 .* device_batch_size = 64"),
    ],
)
def test_what_settings_refuse(values, message):
    with pytest.raises(UserError, match=message):
        Settings(**values)


def test_zeros_that_mean_something_are_allowed():
    zeros = dict.fromkeys(
        ("alpha", "kappa", "beta", "weight_decay", "lora_rank", "num_integrated", "num_rollouts", "context_max_tokens",
         "eval_every", "train_questions", "eval_seed"), 0,
    )  # fmt: skip
    assert all(getattr(Settings(**zeros), name) == 0 for name in zeros)


def test_load_settings_reads_a_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("seeds: [3]\nlearning_rate: 1e-5\nmore: ['eval_every=2']\nout_dir: somewhere\n")
    assert load_settings(file) == load_settings(str(file)) == Settings(seeds=(3,), learning_rate=1e-5, eval_every=2)


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "must hold 'name: value' lines"),
        ("- a\n- b\n", "must hold 'name: value' lines"),
        ("just words", "must hold 'name: value' lines"),
        ("steps: [1, 2\n", "config: .*run.yaml' cannot be read: "),
        ("steps: 3\n\tseeds: 4\n", "cannot be read"),
        ("stepz: 3\nlr: 1\n", "config: unknown setting lr, stepz; known are methods, seeds, model"),
        ("1: 2\nno: 3\n", "config: unknown setting 1, False; known are"),
        ("steps: x\n", "steps: 'x' is not a int"),
        ("more:\n", "more: None must be a list of 'name=value'"),
        ("more: eval_every=2\n", "more: 'eval_every=2' must be a list"),
    ],
)
def test_files_that_load_settings_refuses(tmp_path, content, message):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        load_settings(file)


def test_files_that_are_none(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent.yaml", tmp_path, tmp_path / "bytes.yaml"):
        with pytest.raises(UserError, match="config: .* cannot be read: "):
            load_settings(path)


def test_more_adds_settings_in_their_types():
    values = {"steps": 3, "more": ["eval_every=2", "learning_rate=1e-6", "data=a=b.jsonl", "gradient_checkpointing=true"]}
    expected = Settings(steps=3, eval_every=2, learning_rate=1e-6, data="a=b.jsonl", gradient_checkpointing=True)
    assert make_settings(values) == expected
    assert len(values["more"]) == 4, "the caller's mapping is not changed"
    assert make_settings({"more": ["seeds=[4, 5]"]}).seeds == (4, 5)


@pytest.mark.parametrize(
    "more, message",
    [
        (["steps=4"], "more: 'steps=4' must be 'name=value', with a name that is not given elsewhere"),
        (["eval_every=1", "eval_every=2"], "more: 'eval_every=2'"),
        (["eval_every"], "more: 'eval_every' must be 'name=value'"),
        ([3], "more: '?3'? must be"),
        (["seeds=[1"], r"more: 'seeds=\[1' .*no YAML"),
        (["nothing=1"], "unknown setting nothing"),
        (["eval_every=soon"], "eval_every: 'soon' is not a int"),
    ],
)
def test_more_that_is_refused(more, message):
    with pytest.raises(UserError, match=message):
        make_settings({"steps": 3, "more": more})


def test_notebook_05_and_settings_have_the_same_defaults():
    """Whoever leaves a parameter out gets the same from the notebook and from `gcpo-repro train`."""
    defaults = Settings().as_dict()
    declared = declared_parameters(NOTEBOOKS / "05_train_qlora.ipynb")
    shared = {name: value for name, value in declared.items() if name not in (*NOTEBOOK_ONLY, "more")}
    assert len(shared) >= 15
    for name, value in shared.items():
        assert (value, type(value)) == (defaults[name], type(defaults[name])), name
    make_settings(declared)


@pytest.mark.parametrize("file", PROFILES, ids=lambda file: file.parent.name)
def test_profiles_of_notebook_05_are_settings(file):
    given = yaml.safe_load(file.read_text())
    settings = load_settings(file).as_dict()
    for name in given.keys() & settings.keys():
        assert settings[name] == given[name], name


def test_smoke_and_cpu_profiles_are_there():
    assert {"smoke", "cpu"} <= {file.parent.name for file in PROFILES}
    cpu = load_settings(NOTEBOOKS / "profiles" / "cpu" / "05_train_qlora.yaml")
    assert (len(cpu.seeds), cpu.methods, cpu.group_size, cpu.quantization) == (3, ("grpo", "gcpo"), 4, "nf4")


def test_select_narrows():
    settings = Settings(seeds=(0, 1, 2))
    assert select(settings, None, ()) == settings
    assert select(settings, "gcpo", (5, 6)) == Settings(methods=("gcpo",), seeds=(5, 6))
    with pytest.raises(UserError, match="methods: 'ppo'"):
        select(settings, "ppo", ())
    with pytest.raises(UserError, match="none twice"):
        select(settings, None, (1, 1))


# What makes a result stale


# Settings that mean something, and may be changed, only beside these.
COLOCATED = {"use_vllm": True, "quantization": "none"}
WITH_VLLM = {name: COLOCATED for name in ("vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "vllm_max_model_length")}
WITH_VLLM |= {"vllm_server_base_url": {**COLOCATED, "vllm_mode": "server", "vllm_server_base_url": "http://localhost:8000"}}
WITH_VLLM |= {"use_vllm": {"quantization": "none"}}


def changed(name, value):
    match value:
        case 64 if name == "device_batch_size":
            return 32  # it must divide batch_size
        case bool():
            return not value
        case int() | float():
            return value * 2 if value else 2
        case ():
            return ("aime24",)
        case (1.0,):
            return (2.0,)
        case (str(one),):
            return (one + "x",)
        case tuple():
            return value[:1]
        case _:
            return value + "x"


SHAPING = [item.name for item in dataclasses.fields(Settings) if item.name not in {*NOT_SHAPING, "vllm_mode"}]


@pytest.mark.parametrize("name", SHAPING)
def test_every_setting_is_in_the_fingerprint(name):
    start = WITH_VLLM.get(name, {})
    settings = Settings(**start)
    other = dataclasses.replace(settings, **{name: changed(name, getattr(settings, name))})
    assert fingerprint(other) != fingerprint(settings) == fingerprint(Settings(**start))
    if name == "vllm_server_base_url":  # the mode changes only together with the address
        assert fingerprint(Settings(**COLOCATED)) != fingerprint(settings)


def test_the_number_of_workers_and_other_arms_does_not_make_an_arm_stale():
    one, two = Settings(seeds=(0, 1), workers=1), Settings(seeds=(0, 7), workers=2)
    assert fingerprint(arm_settings(one, "gcpo", 0)) == fingerprint(arm_settings(two, "gcpo", 0))
    assert fingerprint(arm_settings(one, "gcpo", 0)) != fingerprint(arm_settings(one, "gcpo", 1))
    assert fingerprint(arm_settings(one, "gcpo", 0)) != fingerprint(arm_settings(one, "grpo", 0))


def test_code_and_policy_are_in_the_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setattr("gcpo_repro.experiment.__file__", str(tmp_path / "experiment.py"))
    (tmp_path / "toy_policy").mkdir()
    seen = set()
    for name, content in (("loss.py", "1"), ("loss.py", "2"), ("toy_policy/model.safetensors", "3"), ("toy.py", "")):
        (tmp_path / name).write_text(content)
        seen.add(fingerprint(Settings()))
    assert len(seen) == 4
    (tmp_path / "README.md").write_text("prose")
    assert fingerprint(Settings()) in seen


# One arm, its training a stand-in

ONE = Settings(methods=("gcpo",), seeds=(3,))
EVALUATION = {"step": 0, "counts": {"correct": [1, 0], "samples": 2}}


def result_of(settings):
    arm = {"method": settings.methods[0], "seed": settings.seeds[0], "evaluations": [EVALUATION], "steps": []}
    return {"config": settings.as_dict(), "kind": "arm", "wall_time_seconds": 1.0, **arm}


@pytest.fixture
def training(monkeypatch):
    """Puts a function in the place of `arm.train`."""

    def put(function):
        monkeypatch.setitem(sys.modules, "gcpo_repro.arm", types.SimpleNamespace(train=function))

    return put


def state(folder):
    return json.loads((folder / "run.json").read_text())["state"]


def test_an_arm_leaves_its_result_last(tmp_path, training):
    def train(settings, out):
        assert state(out) == "running" and not (out / "results.json").exists()
        (out / "progress.jsonl").write_text("{}\n")
        return result_of(settings)

    training(train)
    assert not finished(tmp_path, ONE)
    run_arm(ONE, tmp_path / "a")
    assert state(tmp_path / "a") == "done" and finished(tmp_path / "a", ONE)
    assert not finished(tmp_path / "a", dataclasses.replace(ONE, steps=41))
    assert [(run["name"], run["state"]) for run in list_runs(tmp_path)] == [("a", "done")]


def fails(error):
    def train(settings, out):
        raise error

    return train


FULL = "out: .*a' is on a full disk; free some space and run again"


@pytest.mark.parametrize(
    "error, raised, message, ended",
    [
        (OSError(errno.ENOSPC, "No space left on device"), UserError, FULL, "failed"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), UserError, FULL, "failed"),
        # what safetensors raises there, when the adapters are saved
        (
            safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            UserError, FULL, "failed",
        ),
        (safetensors.SafetensorError("invalid header"), safetensors.SafetensorError, "invalid header", "failed"),
        (UserError("model: 'x' could not be loaded"), UserError, "model: 'x' could not be loaded", "failed"),
        (ZeroDivisionError("a bug"), ZeroDivisionError, "a bug", "failed"),
        (KeyboardInterrupt(), KeyboardInterrupt, None, "interrupted"),
    ],
)  # fmt: skip
def test_a_failing_arm_leaves_its_state_and_no_result(tmp_path, training, error, raised, message, ended):
    training(lambda settings, out: result_of(settings))
    run_arm(ONE, tmp_path / "a")  # an older result must not look like this run's
    training(fails(error))
    with pytest.raises(raised, match=message):
        run_arm(ONE, tmp_path / "a")
    assert state(tmp_path / "a") == ended
    assert not (tmp_path / "a" / "results.json").exists() and not finished(tmp_path / "a", ONE)
    assert not list((tmp_path / "a").glob(".*")), "no drafts left behind"


@pytest.mark.parametrize("full", [("results.json",), ("results.json", "run.json")])
def test_a_disk_that_fills_up_at_the_end(tmp_path, training, monkeypatch, capsys, full):
    """Also where not even the state can be written any more: the first error is the one that is told."""
    write_text = Path.write_text

    def write(self, text, *arguments, **options):
        if any(name in self.name for name in full) and "running" not in text:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(self, text, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", write)
    training(lambda settings, out: result_of(settings))
    with pytest.raises(UserError, match=FULL):
        run_arm(ONE, tmp_path / "a")
    assert not (tmp_path / "a" / "results.json").exists()
    assert state(tmp_path / "a") == ("running" if "run.json" in full else "failed")
    assert ("run.json could not be written" in capsys.readouterr().err) == ("run.json" in full)


@pytest.mark.parametrize("run", [run_arm, run_experiment])
def test_folders_that_cannot_be_written(tmp_path, training, monkeypatch, run):
    training(fails(AssertionError("nothing may start")))
    (tmp_path / "file").write_text("keep me")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/new")):  # /proc is closed to root as well
        with pytest.raises(UserError, match=f"out: cannot write to '{out}' .*; choose another folder"):
            run(ONE, out)
    assert (tmp_path / "file").read_text() == "keep me"

    def read_only(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", read_only)
    with pytest.raises(UserError, match="cannot write to .*new'.*Read-only file system.; choose another folder"):
        run(ONE, tmp_path / "new")


def test_run_arm_takes_one_arm(tmp_path):
    for several in (Settings(methods=("grpo",), seeds=(0, 1)), Settings(seeds=(0,))):
        with pytest.raises(UserError, match="run_arm trains one method with one seed; use run_experiment"):
            run_arm(several, tmp_path)


def test_a_missing_or_corrupt_model_folder(tmp_path):
    """The real arm: it fails before any training."""
    (tmp_path / "corrupt").mkdir()
    (tmp_path / "corrupt" / "config.json").write_text("{")
    for name, remedy in (("absent", "no such folder"), ("corrupt", "cannot be read .*config.json")):
        settings = dataclasses.replace(ONE, model=str(tmp_path / name))
        with pytest.raises(UserError, match=f"model: .*{name}'.* {remedy}"):
            run_arm(settings, tmp_path / "out")
        assert state(tmp_path / "out") == "failed" and not (tmp_path / "out" / "results.json").exists()


REWARDS = """\
def short(completions, **kwargs):
    return [1.0]

def failing(completions, **kwargs):
    raise KeyError("unit")
"""


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data": "rows.jsonl", "answer_column": "solution"}, "data: 'rows.jsonl' has no column 'solution'"),
        ({"data": "rows.jsonl", "train_questions": 0}, "eval_questions: 256 leaves none of the 5 rows of 'rows.jsonl'"),
        ({"data": "rows.jsonl", "train_questions": 4}, "5 usable rows, 260 are needed"),
        ({"prompt_template": "{prompt}" + "1" * 300}, "data: 2048 of 2048 prompts .* do not fit"),
        ({"reward": "my_faulty_rewards:short"}, "reward: short returned 1 values for 8 completions"),
        ({"reward": "my_faulty_rewards:failing", "methods": "grpo"}, "reward: failing failed with KeyError: 'unit'"),
        ({"quantization": "nf3"}, "quantization: 'nf3' is unknown"),
        ({"estimator": "magic", "eval_questions": 2}, "estimator: 'magic' is unknown"),
        ({"num_integrated": 9}, "num_integrated: 9 must lie between 2 and num_generations = 4"),
        ({"system_prompt": "be brief"}, "system_prompt: this model's tokenizer has no chat template"),
    ],
)
def test_faults_of_data_and_reward_end_a_real_arm_with_one_message(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "my_faulty_rewards.py").write_text(REWARDS)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1", "answer": "2"}\n' * 5)
    few = {} if "data" in changes else {"eval_questions": 2}
    with pytest.raises(UserError, match=message):
        run_arm(dataclasses.replace(ONE, device="cpu", **{**few, **changes}), tmp_path / "out")
    assert state(tmp_path / "out") == "failed" and not (tmp_path / "out" / "results.json").exists()


def test_a_package_without_its_policy(tmp_path, monkeypatch):
    monkeypatch.setattr("gcpo_repro.toy.POLICY", tmp_path / "none")
    with pytest.raises(UserError, match="model: no policy at .*none; make it with `gcpo-repro pretrain --out .*none`"):
        run_arm(ONE, tmp_path / "out")


# Whole experiments: real processes and the real command, in which training is a stand-in

STAND_IN = """\
import os, sys, time, types
from gcpo_repro.errors import UserError

def train(settings, out):
    method, seed = settings.methods[0], settings.seeds[0]
    with open(out.parent / "trained.txt", "a") as file:
        file.write(f"{method}-seed{seed} {os.environ['OMP_NUM_THREADS']}\\n")
    print("policy: loaded", flush=True)
    while seed == 12 and "gcpo-seed60" not in (out.parent / "trained.txt").read_text():
        time.sleep(0.05)
    if seed in (12, 13):
        raise UserError("model: 'x' is missing")
    if seed == 14:
        raise ZeroDivisionError("a bug")
    if seed == 60:
        time.sleep(60)
    evaluations = [{"step": k, "counts": {"correct": [k, seed % 2], "samples": 4}} for k in (0, 4)]
    return {"config": settings.as_dict(), "kind": "arm", "method": method, "seed": seed, "steps": [{"step": 1, "reward": 0.5}],
            "evaluations": evaluations, "wall_time_seconds": 1.0}

sys.modules["gcpo_repro.arm"] = types.SimpleNamespace(train=train)
assert sys.argv[1:3] == ["-m", "gcpo_repro.cli"]
sys.argv = ["gcpo-repro", *sys.argv[3:]]
from gcpo_repro.cli import main
main()
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """In the place of Python: the arms' processes run this script, and `trained.txt` tells which ran."""
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\n{STAND_IN}")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return tmp_path / "out"


def trained(out):
    lines = (out / "trained.txt").read_text().splitlines() if (out / "trained.txt").exists() else []
    (out / "trained.txt").unlink(missing_ok=True)
    return sorted(line.split()[0] for line in lines)


def test_an_experiment_trains_every_arm_once_and_resumes(stand_in, capsys):
    out, settings = stand_in, Settings(seeds=(0, 1), threads=3, steps=1)
    results = run_experiment(settings, out)
    assert {line.split()[1] for line in (out / "trained.txt").read_text().splitlines()} == {"3"}
    assert trained(out) == ["gcpo-seed0", "gcpo-seed1", "grpo-seed0", "grpo-seed1"]
    assert [(run["name"], run["state"]) for run in list_runs(out.parent)] == [("out", "done")]
    assert [(arm["method"], arm["seed"]) for arm in results["arms"]] == [("grpo", 0), ("grpo", 1), ("gcpo", 0), ("gcpo", 1)]
    assert results == load_results(out) and results["config"] == settings.as_dict() and results["seed"] == [0, 1]
    assert results.keys() >= {"versions", "commit", "hardware", "wall_time_seconds", "command"}
    assert results["arms"][1]["evaluations"][1]["counts"] == {"correct": [4, 1], "samples": 4}
    assert "gcpo-seed1: pass@1 12.5% -> 62.5% after" in capsys.readouterr().out  # (0 + 1)/8, (4 + 1)/8

    (arm_folder(out, "gcpo", 1) / "results.json").unlink()  # as after an interruption
    again = run_experiment(settings, out)
    assert trained(out) == ["gcpo-seed1"] and again["arms"] == results["arms"]
    assert "grpo-seed0: already trained with these settings" in capsys.readouterr().out

    run_experiment(dataclasses.replace(settings, seeds=(1,), workers=1), out)
    assert trained(out) == [], "neither the other seeds nor the workers change an arm"
    run_experiment(dataclasses.replace(settings, seeds=(1,), methods=("grpo",), beta=0.1), out)
    assert trained(out) == ["grpo-seed1"]
    run_experiment(dataclasses.replace(settings, seeds=(0,), methods=("gcpo",)), out, force=True)
    assert trained(out) == ["gcpo-seed0"]


def test_broken_results_of_an_arm_are_trained_again(stand_in):
    out, settings = stand_in, Settings(seeds=(0,), methods=("grpo",))
    folder = arm_folder(out, "grpo", 0)
    folder.mkdir(parents=True)
    for content in ("", "{", "[]", "null", '{"fingerprint": "old"}', "{}"):
        (folder / "results.json").write_text(content)
        assert not finished(folder, arm_settings(settings, "grpo", 0)), content
    run_experiment(settings, out)
    assert trained(out) == ["grpo-seed0"] and finished(folder, arm_settings(settings, "grpo", 0))


@pytest.mark.parametrize("seeds, workers, started", [((60, 12), 2, 2), ((13, 60, 61), 1, 1)])
def test_a_failing_arm_ends_the_experiment_at_once(stand_in, seeds, workers, started):
    """Whichever place it has: no other arm goes on behind the user's back, and no new one starts."""
    out, began = stand_in, time.time()
    settings = Settings(seeds=seeds, methods=("gcpo",), workers=workers)
    with pytest.raises(UserError) as caught:
        run_experiment(settings, out)
    assert time.time() - began < 30
    failed = out / ("gcpo-seed12" if started == 2 else "gcpo-seed13")
    log = failed / "log.txt"
    assert str(caught.value) == f"{failed.name} failed: model: 'x' is missing (log: {log})"
    assert "policy: loaded" in log.read_text()
    assert len(trained(out)) == started and not (out / "results.json").exists()
    assert state(out) == "failed" and not [run for run in list_runs(out) if run["state"] in ("running", "done")]
    if started == 2:
        assert not psutil.pid_exists(json.loads((out / "gcpo-seed60" / "run.json").read_text())["pid"])


def test_a_bug_in_an_arm_keeps_its_traceback_in_the_log(stand_in):
    with pytest.raises(UserError, match="grpo-seed14 failed: ZeroDivisionError: a bug .log: .*log.txt"):
        run_experiment(Settings(seeds=(14,), methods=("grpo",)), stand_in)
    assert "Traceback" in (stand_in / "grpo-seed14" / "log.txt").read_text()


def test_ctrl_c_stops_every_arm(stand_in):
    """The command itself, interrupted while two arms train: exit 130, no process left, nothing that looks finished."""
    config = stand_in.parent / "run.yaml"
    config.write_text("methods: [grpo, gcpo]\nseeds: [60]\n")
    # a test run in the background may have inherited an ignored SIGINT
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += f"sys.executable = {sys.executable!r}; from gcpo_repro.cli import main; main()"
    command = [PYTHON, "-c", code, "train", "--config", str(config), "--out", str(stand_in)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    states = [stand_in / f"{method}-seed60" / "run.json" for method in ("grpo", "gcpo")]
    while not all(path.exists() for path in states) and time.time() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    error = child.communicate(timeout=30)[1]
    assert child.returncode == 130
    assert "Interrupted. What was finished is kept" in error and "Traceback" not in error
    for path in states:
        assert not psutil.pid_exists(json.loads(path.read_text())["pid"])
    assert not list(stand_in.rglob("results.json"))
    assert state(stand_in) == "interrupted" and {run["state"] for run in list_runs(stand_in)} == {"interrupted"}


@pytest.mark.parametrize("blocked", ["results", "arm folder"])
def test_a_disk_that_fills_up_between_the_arms(stand_in, monkeypatch, blocked):
    out = stand_in
    if blocked == "arm folder":
        out.mkdir()
        (out / "grpo-seed0").write_text("a file in the way")
        message = "out: cannot write to .*out' .File exists.; choose another folder"
    else:
        message = "out: cannot write to .*out' .No space left on device.; free some space and run again"

        write_json = provenance.write_json

        def full(path, content):
            if path == out / "results.json":
                raise OSError(errno.ENOSPC, "No space left on device")
            return write_json(path, content)

        monkeypatch.setattr(provenance, "write_json", full)
    with pytest.raises(UserError, match=message):
        run_experiment(Settings(seeds=(0,), methods=("grpo",)), out)
    assert not (out / "results.json").exists() and state(out) == "failed"


def test_collect_takes_the_arms_in_order(tmp_path):
    settings = Settings(seeds=(2, 1))
    for method in settings.methods:
        for seed in settings.seeds:
            one = arm_settings(settings, method, seed)
            provenance.write_json(arm_folder(tmp_path, method, seed) / "results.json", result_of(one))
    found = collect(settings, tmp_path, time.time())
    assert [(arm["method"], arm["seed"]) for arm in found["arms"]] == [("grpo", 2), ("grpo", 1), ("gcpo", 2), ("gcpo", 1)]
    assert found["kind"] == "experiment" and load_results(tmp_path) == found


@pytest.mark.parametrize("content", [None, "", "{", "[]", "null", '{"kind": "arm"}', "{}", b"\xff\xfe"])
def test_results_that_are_none(tmp_path, content):
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "results.json").write_bytes(data)
    with pytest.raises(UserError, match="run_dir: .*results.json' (cannot be read .*did the run finish|is not an experiment)"):
        load_results(tmp_path)
