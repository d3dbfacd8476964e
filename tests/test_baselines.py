"""GRPO, Dr.GRPO and GVPO: GVPO's loss by hand and against its definition; the same questions for every method."""

import dataclasses

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOTrainer

from gcpo_repro import UserError, arm, toy
from gcpo_repro.baselines import GVPOConfig, GVPOTrainer, centred_rewards, group_means, gvpo_loss
from gcpo_repro.checked import CheckedGRPOTrainer
from gcpo_repro.settings import METHODS, Settings, make_settings
from tests.test_trainer import PROMPTS, digits, loss_and_gradient, make, one_batch

NAN = float("nan")


def by_definition(log_ratio, rewards, n, beta):
    """L with s̄ as it stands, gradient and all; whole groups without gaps."""
    s, r = beta * log_ratio.view(-1, n), rewards.view(-1, n)
    difference = (s - s.mean(1, keepdim=True)) - (r - r.mean(1, keepdim=True))
    return (difference.square().sum(1) / 2 / (n - 1)).mean()


def ours(log_ratio, rewards, n, beta):
    centred, weight = centred_rewards(rewards, ~rewards.isnan(), n)
    group = torch.arange(len(rewards)) // n
    return gvpo_loss(log_ratio, group_means(log_ratio.detach(), group, weight)[group], centred, weight, beta)


# GVPO by hand


def test_gvpo_loss_by_hand():
    # n = 2, β = ½. s = (0.1, −0.2), s̄ = −0.05, s − s̄ = ±0.15; r − r̄ = ±0.5; differences ∓0.35
    # L = 1/(2 − 1) · ½ (0.35² + 0.35²) = 0.1225; gradient by log_ratio: β/(n − 1) · difference = ∓0.175
    log_ratio = torch.tensor([0.2, -0.4], requires_grad=True)
    loss = ours(log_ratio, torch.tensor([1.0, 0.0]), 2, 0.5)
    loss.backward()
    assert loss.item() == pytest.approx(0.1225)
    assert log_ratio.grad.tolist() == pytest.approx([-0.175, 0.175])


def test_gvpo_loss_of_two_groups_by_hand():
    # on-policy: s = 0. Group (3, 0, 0): r̄ = 1, ½ (4 + 1 + 1) / 2 = 1.5. Group (1, 1, 1): 0. Mean over groups 0.75.
    # gradient: 1/2 groups · β/2 · −(2, −1, −1) = (−0.05, 0.025, 0.025) at β = 0.1
    log_ratio = torch.zeros(6, requires_grad=True)
    loss = ours(log_ratio, torch.tensor([3.0, 0, 0, 1, 1, 1]), 3, 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(0.75)
    assert log_ratio.grad.tolist() == pytest.approx([-0.05, 0.025, 0.025, 0, 0, 0])


def test_centred_rewards_by_hand():
    rewards = torch.tensor([1.0, NAN, 0.0, 5.0, NAN, NAN])
    centred, weight = centred_rewards(rewards, ~rewards.isnan(), 3)
    assert centred.tolist() == [0.5, 0, -0.5, 0, 0, 0]  # a single answer has nothing to be compared with
    assert weight.tolist() == [3, 0, 3, 0, 0, 0]  # n / (m − 1)


def test_group_means_by_hand_in_any_order():
    x, group = torch.tensor([1.0, 10.0, 3.0, 7.0]), torch.tensor([1, 0, 1, 1])
    assert group_means(x, group, torch.tensor([2.0, 2.0, 2.0, 0.0])).tolist() == [10, 2]


def test_a_constant_group_mean_gives_the_definitions_gradient():
    generator = torch.Generator().manual_seed(1)
    log_ratio, rewards = (torch.randn(12, generator=generator) for _ in range(2))
    found = {}
    for function in (by_definition, ours):
        x = log_ratio.clone().requires_grad_()
        loss = function(x, rewards, 4, 0.3)
        loss.backward()
        found[function] = loss.detach(), x.grad
        torch.testing.assert_close(x.grad.view(3, 4).sum(1), torch.zeros(3), rtol=0, atol=1e-6)  # the weights sum to zero
    for mine, theirs in zip(found[ours], found[by_definition], strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_optimum_is_the_policy_of_kl_constrained_reward_maximisation():
    """π* ∝ π_old e^{r/β}: log ratio = r/β + a constant of the question, whatever it is (the partition function)."""
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0, 2.0, 7.0])
    constant = torch.tensor([3.0] * 3 + [-8.0] * 3)
    log_ratio = (rewards / 0.2 + constant).requires_grad_()
    loss = ours(log_ratio, rewards, 3, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-9) and log_ratio.grad.abs().max() < 1e-5


# GVPO in the trainer


def make_gvpo(folder, tmp_path, reward=digits, **options):
    settings = dict(
        per_device_train_batch_size=8, num_generations=4, max_completion_length=6, max_steps=2, logging_steps=1, report_to=[],
        learning_rate=1e-2, use_cpu=True, gradient_checkpointing=False, save_strategy="no", seed=3, disable_tqdm=True,
    )  # fmt: skip
    config = GVPOConfig(str(tmp_path), **{**settings, **options})
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    peft_config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    prompts = Dataset.from_dict({"prompt": PROMPTS})
    return GVPOTrainer(model, reward, config, prompts, processing_class=tokenizer, peft_config=peft_config)


def moved(trainer):
    """Away from the sampling policy, so that s_i is not 0."""
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    return trainer


def whole_logps(trainer, batch):
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    seen = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logits = trainer.model(input_ids=ids, attention_mask=seen).logits[:, :-1].log_softmax(-1)
    return logits.gather(2, ids[:, 1:, None])[:, -batch["completion_ids"].size(1) :, 0]


@pytest.mark.parametrize("iterations", [1, 2])
def test_the_trainers_loss_is_the_definition(tiny_folder, tmp_path, iterations):
    trainer = make_gvpo(tiny_folder, tmp_path, num_iterations=iterations, gvpo_beta=0.4)
    _, batch = one_batch(trainer)
    old = whole_logps(trainer, batch).detach()
    if iterations == 2:
        moved(trainer)
    order = torch.tensor([6, 1, 4, 3, 0, 7, 2, 5])  # TRL shuffles
    shuffled = {key: value[order] if torch.is_tensor(value) and value.dim() else value for key, value in batch.items()}
    loss, gradient = loss_and_gradient(trainer, shuffled)
    trainer.model.zero_grad()
    log_ratio = ((whole_logps(trainer, batch) - old) * batch["completion_mask"]).sum(1)
    assert (log_ratio.abs().max() > 0.05) == (iterations == 2)
    expected = by_definition(log_ratio, torch.tensor(trainer._rewards.tolist()), 4, 0.4)
    expected.backward()
    wanted = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-5)
    assert wanted.abs().max() > 1e-3


def test_masked_and_unscorable_answers_leave_their_group(tiny_folder, tmp_path):
    def reward(completions, **kwargs):
        return [None, *digits(completions)[1:]]

    trainer = make_gvpo(tiny_folder, tmp_path, reward=reward, mask_truncated_completions=True)
    _, batch = one_batch(trainer)
    gone = batch["completion_mask"].sum(1) == 0
    assert gone.any() and not gone.all()
    gone[0] = True
    assert (batch["gvpo_weight"][gone] == 0).all() and (batch["advantages"][gone] == 0).all()
    for start in (0, 4):
        kept = [k for k in range(start, start + 4) if not gone[k]]
        rewards = trainer._rewards[kept]
        expected = rewards - rewards.mean() if len(kept) > 1 else torch.zeros(len(kept))
        torch.testing.assert_close(batch["advantages"][kept], expected)
    loss, gradient = loss_and_gradient(trainer, batch)
    assert loss > 0 and gradient.isfinite().all()


def test_gvpo_trains_accumulates_and_evaluates(tiny_folder, tmp_path):
    trainer = make_gvpo(tiny_folder, tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    trainer.eval_dataset = trainer.train_dataset
    before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    assert any((p != b).any() for p, b in zip((p for p in trainer.model.parameters() if p.requires_grad), before, strict=True))
    logged = trainer.state.log_history[0]
    assert logged["loss"] > 0 and logged["grad_norm"] > 0 and logged["entropy"] > 0
    assert not [name for name in logged if name.startswith("clip_ratio")]  # there is no clip
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gvpo_beta": 0.0}, "gvpo_beta: 0.0 must be finite and positive"),
        ({"beta": 0.04}, "beta: 0.04 has no place in GVPO's loss; leave it at 0.0"),
        ({"kappa": 0.06}, "kappa: 0.06 has no place"),
        ({"num_iterations": 2, "gradient_accumulation_steps": 2}, "steps_per_generation: 2 splits .* num_iterations = 2"),
        ({"steps_per_generation": 4, "gradient_accumulation_steps": 2}, "steps_per_generation: 4 splits the groups"),
    ],
)  # fmt: skip
def test_what_gvpo_refuses(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        GVPOConfig(str(tmp_path), use_cpu=True, per_device_train_batch_size=8, num_generations=4, **options)


def test_gvpo_needs_its_own_configuration(tiny_folder, tmp_path):
    with pytest.raises(UserError, match="pass a GVPOConfig"):
        make(tiny_folder, tmp_path, cls=GVPOTrainer)


# Dr.GRPO


def test_dr_grpo_divides_by_neither_std_nor_length(tiny_folder, tmp_path):
    """At R = 1 the gradient is that of −Σ_i Σ_j (r_i − r̄) log π(y_ij) / (N · longest answer)."""
    config = arm.trainer_config(Settings(methods="dr_grpo", device_batch_size=8, batch_size=8), tmp_path, Model())
    assert (config.loss_type, config.scale_rewards, config.beta, config.kappa) == ("dr_grpo", "none", 0, 0)
    options = {name: getattr(config, name) for name in ("loss_type", "scale_rewards", "beta", "kappa")}
    trainer = make(tiny_folder, tmp_path, cls=CheckedGRPOTrainer, **options)
    _, batch = one_batch(trainer)
    _, gradient = loss_and_gradient(trainer, batch)
    trainer.model.zero_grad()
    texts = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    rewards = torch.tensor(digits(texts)).view(2, 4)
    centred = (rewards - rewards.mean(1, keepdim=True)).view(8, 1)
    (-(whole_logps(trainer, batch) * batch["completion_mask"] * centred).sum() / (8 * 6)).backward()
    wanted = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-5)
    assert wanted.abs().max() > 1e-3


class Model:
    device, dtype = torch.device("cpu"), torch.float32


# Methods in an experiment


def test_rest_mcts_has_published_numbers_only():
    with pytest.raises(UserError, match="methods: 'rest_mcts' cannot be trained here, only its published numbers are known"):
        make_settings({"methods": ["grpo", "rest_mcts"]})


def test_every_method_has_a_trainer_and_options():
    assert set(METHODS) == set(arm.TRAINERS) == set(arm.OPTIONS)
    assert all(issubclass(trainer, GRPOTrainer) for trainer in arm.TRAINERS.values())


ASKED = []


def recording(completions, answer, prompts, trainer_state=None, **kwargs):
    """The toy task's reward, as a user's own function; TRL's trainer passes its state, an evaluation has none."""
    ASKED.append((None if trainer_state is None else trainer_state.global_step, list(prompts)))
    return toy.exact_reward(completions, answer)


def test_every_method_sees_the_same_questions_in_the_same_order_and_is_evaluated_alike(tmp_path):
    seen = {}
    settings = Settings(
        reward="tests.test_baselines:recording",
        seeds=5, quantization="none", steps=2, batch_size=16, device_batch_size=8, train_questions=32, eval_questions=4,
        eval_samples=2, eval_every=1, device="cpu", max_completion_length=8, num_integrated=2,
    )  # fmt: skip
    results = {}
    for method in METHODS:
        ASKED.clear()
        results[method] = arm.train(dataclasses.replace(settings, methods=(method,)), tmp_path / method)
        seen[method] = list(ASKED)
    trained = [prompts for step, prompts in seen["grpo"] if step is not None]
    assert len(trained) == 2 and len(trained[0]) == 16 and trained[0] != trained[1]
    for method in METHODS:
        assert seen[method] == seen["grpo"], method
        first, theirs = (results[name]["evaluations"] for name in (method, "grpo"))
        assert first[0] == theirs[0]  # the same policy, questions and draws before training
        assert {e["counts"]["seed"] for e in first} == {settings.eval_seed}
    assert len({results[method]["steps"][1]["grad_norm"] for method in METHODS}) == len(METHODS)  # and yet four methods
