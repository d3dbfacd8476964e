"""What is kept and shown of a training: one real arm of a few steps, and the parts by themselves."""

import json
import math
import sys
import types
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerControl, TrainerState

from gcpo_repro import UserError, arm, watching
from gcpo_repro.completions import completions_table, load_completions
from gcpo_repro.settings import Settings
from gcpo_repro.watching import Watch, check_reporters

SETTINGS = Settings(
    methods="gcpo", seeds=0, steps=3, batch_size=16, device_batch_size=16, eval_questions=8, eval_samples=2, train_questions=32,
    eval_every=2, completions_every=2, save_every=0, reward=["exact", "format"], reward_weights=[1.0, 0.25],
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A GCPO arm of 3 steps: its folder and its record."""
    out = tmp_path_factory.mktemp("arm")
    return out, arm.train(SETTINGS, out)


def test_completions_agree_with_the_metrics(trained):
    """The rewards' weighted means and Υ in the tables are those that were logged."""
    out, result = trained
    table = load_completions(out)
    assert sorted(set(table["step"])) == [1, 2] and len(table) == 2 * 16
    for step, rows in table.groupby("step"):
        logged = result["steps"][step - 1]
        assert rows["reward"].mean() == pytest.approx(logged["reward"], abs=1e-5)
        assert rows["reward_exact_reward"].mean() == pytest.approx(logged["rewards/exact_reward/mean"], abs=1e-5)
        summed = rows["reward_exact_reward"] + 0.25 * rows["reward_toy_format_reward"]
        assert summed.tolist() == pytest.approx(rows["reward"].tolist())
        assert rows["upsilon"].mean() == pytest.approx(logged["gcpo/upsilon_mean"], abs=1e-5)
        assert rows["tokens"].mean() == pytest.approx(logged["completions/mean_length"], abs=1e-5)
        assert rows["truncated"].mean() == pytest.approx(logged["completions/clipped_ratio"], abs=1e-5)


def test_a_group_is_one_question_with_its_integrated_outputs(trained):
    table = load_completions(trained[0])
    for _, group in table.groupby(["step", "group"]):
        assert len(group) == SETTINGS.group_size == len(group["y_n"].iloc[0])
        assert group["prompt"].nunique() == 1
        assert len({tuple(y_n) for y_n in group["y_n"]}) == 1, "phi 'algorithm': y_n is the group's"
        assert not any("<eos>" in text for text in [*group["candidate"], *group["y_n"].iloc[0]])


def test_tensorboard_holds_metrics_and_evaluations(trained):
    out, result = trained
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    read = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert read["train/reward"] == [(step["step"], pytest.approx(step["reward"])) for step in result["steps"]]
    assert [step for step, _ in read["train/gcpo/upsilon_mean"]] == [1, 2, 3]
    counts = [(e["step"], sum(e["counts"]["correct"]) / 16) for e in result["evaluations"]]
    assert read["eval/pass_at_1"] == [(step, pytest.approx(value)) for step, value in counts]
    assert [step for step, _ in counts] == [0, 2, 3]


def test_results_say_where_the_data_are_from(trained):
    data = trained[1]["data"]
    assert (data["train"]["rows"], data["eval"]["rows"]) == (32, 8) and data["train"]["sha256"] != data["eval"]["sha256"]
    assert trained[1]["warnings"] == []


def test_grpo_has_no_upsilon(tmp_path):
    settings = replace(SETTINGS, methods=("grpo",), steps=1, completions_every=1, report_to=(), eval_every=0)
    arm.train(settings, tmp_path)
    table = load_completions(tmp_path)
    assert table["upsilon"].isna().all() and all(len(y_n) == 0 for y_n in table["y_n"]) and len(table) == 16
    assert not (tmp_path / "tensorboard").exists()


def test_no_tables_of_completions(tmp_path):
    with pytest.raises(UserError, match="completions: .* holds none; train with completions_every above 0"):
        load_completions(tmp_path)


def test_a_missing_reporter_is_told_before_the_training(monkeypatch, tmp_path):
    check_reporters(["tensorboard"])
    monkeypatch.setattr(watching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="report_to: wandb is not installed; run `pip install wandb`"):
        check_reporters(["wandb"])
    monkeypatch.setattr(arm, "load_policy", lambda *_: pytest.fail("nothing may be loaded"))
    with pytest.raises(UserError, match="report_to: trackio is not installed"):
        arm.train(replace(SETTINGS, report_to=("trackio",)), tmp_path)


# The parts by themselves

IDS = {"a": 5, "b": 6, "?": 7}


class Tokenizer:
    pad_token_id = 0

    def batch_decode(self, rows, skip_special_tokens):
        return ["".join(letter for i in ids for letter, number in IDS.items() if i == number) for ids in rows]


def trainer(**last):
    """Stands for a trainer after a batch of two groups of two, on the second of two processes."""
    default = {
        "prompts": ["p", "p", [{"role": "user", "content": "q"}], [{"role": "user", "content": "q"}]],
        "completions": ["a", "", [{"role": "assistant", "content": "ab"}], [{"role": "assistant", "content": "ba"}]],
        "ids": [[5, 1], [1], [5, 6], [6, 5]],
        "rewards": torch.tensor([[9.0, 9.0]] * 4 + [[1.0, 2.0], [0.0, math.nan], [math.nan, math.nan], [0.5, 0.0]]),
    }
    return types.SimpleNamespace(
        last_group={**default, **last}, num_generations=2, accelerator=types.SimpleNamespace(process_index=1), eos_token_ids=[1],
        _tokenizer=Tokenizer(), reward_func_names=["right", "short"], reward_weights=torch.tensor([1.0, 0.1]),
        callback_handler=types.SimpleNamespace(on_log=lambda *_: None),
    )  # fmt: skip


def test_completions_table_by_hand():
    y_n = [[[5, 1], [6, 1]], [[5, 1], [6, 1]], [[6, 5], [7]], [[6, 6], []]]
    last = trainer(upsilon=torch.tensor([9.0] * 4 + [1.0, 2.0, 3.0, 4.0]), y_n=y_n)
    table = completions_table(last)
    assert table["group"].tolist() == [2, 2, 3, 3]
    assert table["prompt"].tolist() == ["p", "p", "q", "q"] and table["candidate"].tolist() == ["a", "", "ab", "ba"]
    assert table["tokens"].tolist() == [2, 1, 2, 2] and table["truncated"].tolist() == [False, False, True, True]
    assert table["reward"].tolist() == pytest.approx([1.2, 0.0, math.nan, 0.5], nan_ok=True)
    assert table["reward_short"].tolist() == pytest.approx([2.0, math.nan, math.nan, 0.0], nan_ok=True)
    assert table["upsilon"].tolist() == [1, 2, 3, 4] and table["y_n"].tolist() == [
        ["a", "b"], ["a", "b"], ["ba", "?"], ["bb", ""],
    ]  # fmt: skip
    assert completions_table(last, integrated=False)["y_n"].tolist() == [[]] * 4


def watch_in(folder, **settings):
    return Watch(replace(SETTINGS, **settings), trainer(), [], None, folder / "progress.jsonl")


def logged(watch, step, **logs):
    """One step of a training of 10."""
    state = TrainerState(global_step=step - 1, max_steps=10)
    watch.on_step_begin(None, state, TrainerControl())
    state.global_step = step
    watch.on_step_end(None, state, TrainerControl())
    watch.on_log(None, state, TrainerControl(), logs=logs)


def test_a_line_for_each_step(tmp_path, capsys, monkeypatch):
    """100 tokens more in 2 seconds: 50 a second; 9 steps are left, of 2 seconds each."""
    now = iter(np.arange(0, 100, 2.0))
    monkeypatch.setattr(watching.time, "perf_counter", lambda: next(now))
    watch = watch_in(tmp_path, eval_every=0, completions_every=0)
    watch.on_train_begin(None, TrainerState(max_steps=10, num_input_tokens_seen=1000), TrainerControl())
    logged(watch, 1, reward=0.5, kl=0.01, num_tokens=1100.0, loss=math.nan, **{"gcpo/upsilon_mean": 1.9})
    logged(watch, 1, train_runtime=0.1)  # not a step's metrics
    said = capsys.readouterr().out
    assert said == "step 1: reward 0.500, kl 0.010, upsilon 1.900, 50 tokens/s, 0:00:18 left\n"
    (line,) = [json.loads(text) for text in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert line["loss"] is None and line["step"] == 1 and watch.steps == [line]


def test_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    watch = watch_in(tmp_path, eval_every=0, completions_every=0)
    watch.on_train_begin(None, TrainerState(max_steps=10, num_input_tokens_seen=0), TrainerControl())
    for step in range(1, 11):
        logged(watch, step, reward=0.25, loss=0.1, num_tokens=100.0 * step) if step < 10 else None
    watch.say("a warning")
    bar = watch.bar
    assert bar.n == 9 and bar.total == 10 and "reward 0.250" in bar.postfix and "tokens/s" in bar.postfix
    watch.on_train_end(None, TrainerState(), TrainerControl())
    captured = capsys.readouterr()
    assert watch.bar is None and "9/10" in captured.err and captured.out == "a warning\n"


def test_completions_at_the_first_and_every_kth_step(tmp_path):
    watch = watch_in(tmp_path, eval_every=0, completions_every=4)
    for step in range(1, 10):
        logged(watch, step)
    kept = sorted(path.name for path in (tmp_path / "completions").iterdir())
    assert kept == [f"step-{step:06d}.parquet" for step in (1, 4, 8)]
    assert pd.read_parquet(tmp_path / "completions" / kept[-1])["step"].unique() == [8]


def test_no_step_is_evaluated_twice(tmp_path, monkeypatch):
    counts = watching.Counts([1, 0], [0, 0], [0, 0], 2, 0)
    calls = []
    monkeypatch.setattr(watching, "evaluate", lambda *_: calls.append(1) or counts)
    watch = watch_in(tmp_path, eval_every=5, completions_every=0)
    watch.trainer.model = watch.trainer.processing_class = None
    for step in (5, 10):
        logged(watch, step)
    assert watch.evaluate(10) == counts and len(calls) == 2
    again = watch_in(tmp_path / "..", eval_every=5)
    again.path = tmp_path / "again.jsonl"
    again.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert again.evaluate(10) == counts and len(calls) == 2 and again.path.read_text() == watch.path.read_text()
