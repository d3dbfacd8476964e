"""Faults put into a training, and what the guards make of them."""

import json
import math
import types
from dataclasses import replace

import pandas as pd
import pytest
import torch
from transformers import TrainerControl, TrainerState

from gcpo_repro import UserError, arm, guards
from gcpo_repro.checked import CheckedGRPOTrainer
from gcpo_repro.guards import SCALER_STEPS, Guards
from gcpo_repro.settings import Settings

SETTINGS = Settings(
    methods="grpo", seeds=0, steps=3, batch_size=16, device_batch_size=8, eval_questions=4, eval_samples=1, train_questions=32,
    eval_every=0, save_every=0, completions_every=0, report_to=[],
)  # fmt: skip


def saved(out):
    return [json.loads(path.read_text()) for path in sorted((out / "guards").iterdir())]


# In real trainings


@pytest.fixture
def fault(monkeypatch):
    """Puts `change(loss)` in the place of the loss of the k-th forward pass; two make a step. Remembers the trainer."""
    held = types.SimpleNamespace(trainer=None, passes=0)

    def put(at, change):
        compute = CheckedGRPOTrainer._compute_loss

        def faulty(self, model, inputs):
            held.trainer, held.passes = self, held.passes + 1
            loss = compute(self, model, inputs)
            return change(loss) if held.passes == at else loss

        monkeypatch.setattr(CheckedGRPOTrainer, "_compute_loss", faulty)
        return held

    return put


@pytest.mark.parametrize("factor, shown", [(math.nan, "nan"), (math.inf, "nan")])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path, fault, factor, shown):
    held = fault(4, lambda loss: loss * factor)  # in the second step
    with pytest.raises(UserError, match=f"step 2: the gradient is {shown}, so the weights would be lost; lower learning_rate"):
        arm.train(SETTINGS, tmp_path)
    assert held.trainer.state.global_step == 1
    assert all(torch.isfinite(p).all() for p in held.trainer.model.parameters())
    (batch,) = saved(tmp_path)
    assert batch["kind"] == "gradient" and len(batch["batch"]) == 16
    assert {"prompt", "candidate", "reward", "ids", "upsilon"} <= batch["batch"][0].keys()
    assert batch["batch"][0]["upsilon"] == "nan", "JSON has no NaN"


def test_a_loss_that_is_not_finite_but_has_a_gradient(tmp_path, fault):
    fault(2, lambda loss: loss + math.inf)
    with pytest.raises(UserError, match="step 1: the loss is inf; lower learning_rate .* The batch is in .*000001-loss.json"):
        arm.train(SETTINGS, tmp_path)


def test_warnings_let_the_training_go_on_and_are_kept(tmp_path, fault, capsys):
    fault(2, lambda loss: loss + math.inf)
    result = arm.train(replace(SETTINGS, on_divergence="warn"), tmp_path)
    assert [(warning["step"], warning["kind"]) for warning in result["warnings"]] == [(1, "loss")]
    assert len(result["steps"]) == 3 and "step 1: warning: the loss is inf" in capsys.readouterr().out


def test_answers_that_are_all_cut_off_are_told_with_share_and_remedy(tmp_path, capsys):
    """The toy task needs 7 tokens; within 3 none can end, and every reward is 0 (trl#5697)."""
    result = arm.train(replace(SETTINGS, max_completion_length=3, steps=2), tmp_path)
    first, last = result["warnings"]
    share = "4 of 4 prompts (100%): every answer was cut off at max_completion_length = 3 and earned nothing; raise max_comp"
    assert first["step"] == 1 and first["message"].startswith(share)
    assert last["step"] == 2 and last["message"].startswith("all in all 8 of 8 prompts (100%)")
    assert capsys.readouterr().out.count("warning: ") == 2


def test_rewards_that_never_differ_stop_a_training(tmp_path, monkeypatch):
    (tmp_path / "constant_reward.py").write_text("def one(completions, **_):\n    return [1.0] * len(completions)\n")
    monkeypatch.syspath_prepend(tmp_path)
    settings = replace(SETTINGS, reward=("constant_reward:one",), on_collapse="stop", equal_reward_steps=2)
    with pytest.raises(UserError, match="step 2: in 2 steps no group's rewards differed .the last mean: 1.*a larger group_size"):
        arm.train(settings, tmp_path / "a")
    assert saved(tmp_path / "a")[0]["metrics"]["frac_reward_zero_std"] == 1.0


# By themselves


def table(candidates=("a", "b", "c", "d"), truncated=(False,) * 4, reward=(1.0, 0.0, 1.0, 0.0)):
    return pd.DataFrame({"group": [0, 0, 1, 1], "candidate": candidates, "truncated": truncated, "reward": reward})


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """Makes guards over a stand-in for a trainer, and steps with given metrics and answers."""

    def make(**options):
        args = types.SimpleNamespace(fp16=False, learning_rate=0.1, max_completion_length=9)
        accelerator = types.SimpleNamespace(device="cpu", gather=lambda rows: rows)
        last = {"ids": [[1], [2], [3], [4]]}
        trainer = types.SimpleNamespace(last_group=last, args=args, lr_scheduler=None, accelerator=accelerator)
        lines = []
        guard = Guards(trainer, tmp_path, say=lines.append, **options)
        state = TrainerState(global_step=0)

        def step(answers=None, **logs):
            state.global_step += 1
            monkeypatch.setattr(guards, "completions_table", lambda *_, **__: table(**(answers or {})))
            guard.on_log(args, state, TrainerControl(), logs={"reward": 0.5, "loss": 0.1, "frac_reward_zero_std": 0.0, **logs})

        return types.SimpleNamespace(guard=guard, step=step, lines=lines, args=args, state=state)

    return make


def test_nothing_is_said_where_all_is_well(watched, tmp_path):
    one = watched(on_collapse="stop")
    for _ in range(30):
        one.step(kl=0.5, **{"gcpo/kl": 0.2})
    one.guard.on_train_end(one.args, one.state, TrainerControl())
    assert one.lines == one.guard.warnings == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name, remedy", [("kl", "raise beta"), ("gcpo/kl", "raise kappa")])
def test_a_kl_above_the_bound(watched, name, remedy, tmp_path):
    one = watched(max_kl=2.0)
    one.step(**{name: 2.0})
    with pytest.raises(UserError, match=f"step 2: {name} is 2.1 nats per token, above max_kl = 2: .*{remedy}"):
        one.step(**{name: 2.1})
    assert saved(tmp_path)[0]["metrics"][name] == 2.1
    watched().step(kl=None, reward=None)  # what TRL logs for a metric that was never a number
    free = watched(max_kl=0.0)
    free.step(**{name: 1e9})


def test_equal_rewards_count_in_a_row(watched):
    one = watched(equal_reward_steps=3)
    for share in (1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0):
        one.step(frac_reward_zero_std=share)
    assert [warning["step"] for warning in one.guard.warnings] == [6, 11], "once in a row"
    never = watched(equal_reward_steps=0, on_collapse="stop")
    for _ in range(5):
        never.step(frac_reward_zero_std=1.0)


def test_empty_answers(watched):
    one = watched(on_collapse="stop", max_empty=0.5)
    one.step({"candidates": ["a", " ", "", "b"]})
    with pytest.raises(UserError, match="step 2: 75% of the answers are empty, above max_empty = 0.5; check the prompt template"):
        one.step({"candidates": ["a", " ", "", "\n"]})


def test_only_whole_groups_that_earn_nothing_count_as_cut_off(watched):
    one = watched()
    one.step({"truncated": [True] * 4, "reward": [0.0, 1.0, 0.0, math.nan]})  # the first group earns something
    one.step({"truncated": [True, False, True, False], "reward": [0.0] * 4})
    one.guard.on_train_end(one.args, one.state, TrainerControl())
    assert [warning["message"][:22] for warning in one.guard.warnings] == ["1 of 2 prompts (50%): ", "all in all 1 of 4 prom"]
    assert "max_completion_length = 9" in one.lines[0]


def test_fp16_may_skip_some_steps(watched):
    """Its loss scaling finds its scale by gradients that overflow."""
    one = watched()
    one.args.fp16, one.guard.trainer.last_group = True, {}
    model = torch.nn.Linear(1, 1)
    model(torch.ones(1)).backward()

    def gradient(value):
        model.weight.grad.fill_(value)
        one.guard.on_pre_optimizer_step(one.args, one.state, TrainerControl(), model=model)

    for value in [*[math.inf] * (SCALER_STEPS - 1), 1.0, *[math.inf] * (SCALER_STEPS - 1)]:
        gradient(value)
    with pytest.raises(UserError, match="the gradient is inf, so the weights would be lost; lower learning_rate .now 0.1"):
        gradient(math.inf)


def test_off_is_off_and_metrics_of_an_evaluation_are_none(watched, tmp_path):
    one = watched(on_divergence="off", on_collapse="off", equal_reward_steps=1)
    answers = {"candidates": [""] * 4, "truncated": [True] * 4, "reward": [0.0] * 4}
    one.step(answers, loss=math.nan, kl=1e9, frac_reward_zero_std=1.0)
    one.guard.on_train_end(one.args, one.state, TrainerControl())
    watched().guard.on_log(one.args, one.state, TrainerControl(), logs={"eval_pass_at_1": math.nan})
    with pytest.raises(UserError, match="the loss is nan"):  # a step that reuses answers has no reward
        watched().guard.on_log(one.args, one.state, TrainerControl(), logs={"loss": math.nan})
    assert one.lines == []


def test_a_resumed_training_goes_on_counting(watched):
    one, two = watched(equal_reward_steps=3), watched(equal_reward_steps=3)
    for _ in range(2):
        one.step(frac_reward_zero_std=1.0)
    two.guard.load_state_dict(json.loads(json.dumps(one.guard.state_dict())))
    two.step(frac_reward_zero_std=1.0)
    assert [warning["kind"] for warning in two.guard.warnings] == ["equal rewards"]
