"""The trainer against TRL's own GRPO, against the readable loss, and against one-sequence-at-a-time forward passes."""

import inspect
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOTrainer

from gcpo_repro import GCPOConfig, GCPOTrainer, UserError
from gcpo_repro.checked import CheckedGRPOTrainer
from gcpo_repro.loss import gcpo_loss, projected_reference
from gcpo_repro.metrics import upsilon_metrics, within_group_correlation

PROMPTS = [f"{a}+{b}=?" for a in (1, 22, 333) for b in (4, 5)]


def digits(completions, **kwargs):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(sum(character in "0123456789" for character in text)) for text in texts]


def make(folder, tmp_path, reward=digits, chat=False, cls=GCPOTrainer, lora=True, dataset=None, kwargs=None, dropout=0.0, **more):
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompts = [[{"role": "user", "content": p}] for p in PROMPTS] if chat else PROMPTS
    settings = dict(
        per_device_train_batch_size=8, num_generations=4, max_completion_length=6, max_steps=2, logging_steps=1,
        report_to=[], learning_rate=1e-2, use_cpu=True, gradient_checkpointing=False, save_strategy="no", seed=3,
        disable_tqdm=True, candidate_prefix="|", integration_suffix="!",
    )  # fmt: skip
    config = GCPOConfig(str(tmp_path), **{**settings, **more})
    return cls(
        model, reward, config, dataset or Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=dropout) if lora else None,
        **(kwargs or {}),
    )  # fmt: skip


def one_batch(trainer):
    """The first generated batch, unshuffled, and its rows."""
    rows = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    torch.manual_seed(11)
    return rows, trainer._generate_and_score_completions(rows)


def loss_and_gradient(trainer, batch):
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("lora", [True, False])
def test_without_upsilon_and_kappa_it_is_trls_grpo(tiny_folder, tmp_path, lora):
    grpo = make(tiny_folder, tmp_path, cls=GRPOTrainer, lora=lora)
    gcpo = make(tiny_folder, tmp_path, lora=lora, control="constant", alpha=1.0, kappa=0.0)
    _, theirs = one_batch(grpo)
    _, ours = one_batch(gcpo)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)
    expected, gradient = loss_and_gradient(grpo, theirs)
    loss, got = loss_and_gradient(gcpo, ours)
    assert loss == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(got, gradient, rtol=0, atol=1e-6)
    assert gradient.abs().max() > 1e-4  # the comparison has something to compare


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("options", [{}, {"mask_truncated_completions": True}, {"loss_type": "grpo", "epsilon": 0.1}])
def test_loss_and_gradient_are_those_of_the_readable_loss(tiny_folder, tmp_path, options, iterations):
    trainer = make(tiny_folder, tmp_path, beta=0.1, kappa=0.3, num_iterations=iterations, **options)
    _, batch = one_batch(trainer)
    if iterations == 2:
        with torch.no_grad():  # move away from the sampling policy: ratios differ from 1 and some are clipped
            for name, parameter in trainer.model.named_parameters():
                if parameter.requires_grad:
                    parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    loss, gradient = loss_and_gradient(trainer, batch)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    seen = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    lengths = batch["completion_mask"].sum(1)
    assert len(set(lengths.tolist())) > 2  # ragged; a row without tokens where truncated answers are masked
    assert (lengths == 0).any() == ("mask_truncated_completions" in options)
    trainer.model.zero_grad()
    logits = trainer.model(input_ids=ids, attention_mask=seen).logits[:, :-1].log_softmax(-1)
    width = batch["completion_ids"].size(1)
    logps = logits.gather(2, ids[:, 1:, None])[:, -width:, 0]
    mask = batch["completion_mask"]
    assert ("old_per_token_logps" in batch) == (iterations == 2)
    old = batch.get("old_per_token_logps", logps.detach())
    ratio = (logps - old).exp()[mask.bool()]
    assert ((ratio < 0.9) | (ratio > 1.1)).any() == (iterations == 2)
    expected = gcpo_loss(
        logps, old, batch["ref_per_token_logps"], projected_reference(batch["collider_logps"], old, mask)[0],
        batch["advantages"], mask, epsilon=options.get("epsilon", 0.2), beta=0.1, kappa=0.3,
    )  # fmt: skip
    expected.backward()
    wanted = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def read(trainer, context, response, temperature=1.0):
    """Slow and plain: one unpadded sequence, the model's full logits and hidden states."""
    ids = torch.tensor([context + response])
    with torch.no_grad():
        out = trainer.model(input_ids=ids, output_hidden_states=True)
    logps = (out.logits[0] / temperature).log_softmax(-1)
    start = len(context)
    token_logps = torch.stack([logps[start + j - 1, token] for j, token in enumerate(response)])
    return token_logps, out.hidden_states[-1][0, start - 1], out.hidden_states[-1][0, -1]


def hand_context(trainer, prompt, chat, candidates):
    """The context written out by hand for the tests' template: question|c|c|…! with end-of-sequence taken off."""
    tokenizer = trainer.processing_class
    shown = [[t for t in c if t not in trainer.eos_token_ids] for c in candidates]
    bar, end = tokenizer("|")["input_ids"], tokenizer("!")["input_ids"]
    body = sum((bar + c for c in shown), []) + end
    if not chat:
        return tokenizer(prompt)["input_ids"] + body
    head, tail = tokenizer("<user>" + prompt[0]["content"])["input_ids"], tokenizer("</user><assistant>")["input_ids"]
    return head + body + tail


@pytest.mark.parametrize("estimator", ["state", "rollout"])
@pytest.mark.parametrize("chat, L, temperature", [(False, 4, 1.0), (True, 2, 0.7)])
def test_upsilon_and_reference_against_one_sequence_at_a_time(tiny_folder, tmp_path, estimator, chat, L, temperature):
    trainer = make(
        tiny_folder, tmp_path, chat=chat, estimator=estimator, num_integrated=L, num_rollouts=3,
        temperature=temperature, alpha=1.7,
    )  # fmt: skip
    sampled = []
    sample = trainer._sample
    trainer._sample = lambda contexts, *limit: sampled.append((contexts, sample(contexts, *limit))) or sampled[-1][1]
    grpo = make(tiny_folder, tmp_path, chat=chat, cls=GRPOTrainer, temperature=temperature)
    _, plain = one_batch(grpo)  # the same seed: the same candidates, A before Υ
    rows, batch = one_batch(trainer)
    n, y = 4, trainer._candidates
    integrated_rows = [k for k in range(8) if k % n < L]
    assert sampled[0][0] == [
        hand_context(trainer, rows[k]["prompt"], chat, y[k // n * n : k // n * n + n]) for k in integrated_rows
    ]
    y_n = dict(zip(integrated_rows, sampled[0][1], strict=True))
    prompts = [batch["prompt_ids"][k][batch["prompt_mask"][k].bool()].tolist() for k in range(8)]
    trainer.model.eval()
    for start in (0, n):
        group = y[start : start + n]
        z = [read(trainer, prompts[start + i], group[i], temperature)[2] for i in range(n)]
        z_bar = torch.stack(z).mean(0)
        for i in range(n):
            row, others = start + i, group[:i] + group[i + 1 :]
            under_x, Z_bars = [], []
            for l in range(L):
                x = hand_context(trainer, rows[row]["prompt"], chat, [*others, y_n[start + l]])
                logps, context_state, _ = read(trainer, x, group[i], temperature)
                under_x.append(logps)
                if estimator == "state":
                    Z_bars.append(context_state)
                else:
                    contexts, rollouts = sampled[1]
                    at = (row * L + l) * 3
                    assert contexts[at : at + 3] == [x] * 3
                    Z_bars.append(
                        torch.stack([read(trainer, prompts[row], rollouts[at + m])[2] for m in range(3)]).mean(0)
                    )
            target = Z_bars[0] - torch.stack(Z_bars).mean(0) + z_bar
            upsilon = 1.7 * torch.nn.functional.cosine_similarity(z[i], target, dim=0)
            assert batch["advantages"][row] == pytest.approx((plain["advantages"][row] * upsilon).item(), abs=1e-5)
            stored = batch["collider_logps"][row, :, : len(group[i])]
            torch.testing.assert_close(stored, torch.stack(under_x), rtol=1e-4, atol=1e-4)
    assert plain["advantages"].abs().max() > 0.1


@pytest.mark.parametrize("options", [{"control": "constant", "alpha": 3.0, "kappa": 0.0}, {"control": "constant", "alpha": 3.0}])
def test_constant_control_multiplies_the_advantages(tiny_folder, tmp_path, options):
    _, plain = one_batch(make(tiny_folder, tmp_path, cls=GRPOTrainer))
    _, batch = one_batch(make(tiny_folder, tmp_path, **options))
    torch.testing.assert_close(batch["advantages"], 3 * plain["advantages"], rtol=0, atol=0)
    assert ("collider_logps" in batch) == ("kappa" not in options)


@pytest.mark.parametrize("feature", ["last", "mean"])
def test_features_of_the_candidates_are_those_of_plain_reading(tiny_folder, tmp_path, feature):
    """Taken from the sampling's own keys and values, or read again: the same z_i, also where y_i ended early."""
    trainer = make(tiny_folder, tmp_path, feature_token=feature)
    _, batch = one_batch(trainer)
    assert (trainer._sampled_states is None) == (feature == "mean")
    prompts = [batch["prompt_ids"][k][batch["prompt_mask"][k].bool()].tolist() for k in range(8)]
    ended = [ids[-1] in trainer.eos_token_ids for ids in trainer._candidates]
    assert any(ended) and not all(ended)
    trainer.model.eval()
    z = [read(trainer, prompts[k], trainer._candidates[k])[2] for k in range(8)]
    if feature == "last":
        torch.testing.assert_close(trainer._sampled_states, torch.stack(z), rtol=1e-4, atol=1e-5)


def test_with_dropout_both_sides_of_the_ratio_are_read_without_it(tiny_folder, tmp_path):
    trainer = make(tiny_folder, tmp_path, dropout=0.5)
    _, batch = one_batch(trainer)
    assert "query_logps" not in one_batch(make(tiny_folder, tmp_path))[1]
    prompts = [batch["prompt_ids"][k][batch["prompt_mask"][k].bool()].tolist() for k in range(8)]
    trainer.model.eval()
    for k, y in enumerate(trainer._candidates):
        torch.testing.assert_close(
            batch["query_logps"][k, : len(y)], read(trainer, prompts[k], y)[0], rtol=1e-4, atol=1e-5
        )


def test_nothing_is_integrated_in_evaluation(tiny_folder, tmp_path):
    trainer = make(tiny_folder, tmp_path)
    trainer._sample = None  # would fail if it were called
    rows = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    batch = trainer._generate_and_score_completions(rows)
    assert "collider_logps" not in batch and not trainer.model.training


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("options", [{}, {"estimator": "rollout", "num_rollouts": 1, "num_integrated": 2}])
def test_trains_and_logs_every_metric(tiny_folder, tmp_path, chat, options, capsys):
    trainer = make(tiny_folder, tmp_path, chat=chat, gradient_accumulation_steps=2, **options)
    before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    after = [p.detach() for p in trainer.model.parameters() if p.requires_grad]
    assert any((a != b).any() for a, b in zip(after, before, strict=True))
    logged = trainer.state.log_history[0]
    for name in (
        "upsilon_mean upsilon_std upsilon_min upsilon_negative upsilon_reward_corr upsilon_length_corr residual_norm slope "
        "clamped_low clamped_high kl unscorable integrated_length integrated_truncated extra_seconds extra_generated_tokens"
    ).split():
        assert f"gcpo/{name}" in logged, name
    assert math.isfinite(logged["loss"]) and logged["gcpo/kl"] > 0
    printed = capsys.readouterr().out
    assert ("14 generations" in printed) == bool(options)  # 4 answers + 2 integrated + 4·2·1 rollouts


def test_metrics_by_hand():
    # one group of two, H = 1: z = (1, 3), Z̄_i,l = ((2, 0), (5, 1)): residuals Z̄_i0 − mean_l = 1 and 2
    z, Z = torch.tensor([[1.0], [3.0]]), torch.tensor([[[[2.0]], [[0.0]]], [[[5.0]], [[1.0]]]])
    found = upsilon_metrics(torch.tensor([2.0, -1.0]), z, Z, torch.tensor([1.0, 0.0]), torch.tensor([4.0, 9.0]), 2)
    assert found["upsilon_mean"] == 0.5 and found["upsilon_min"] == -1 and found["upsilon_negative"] == 0.5
    assert found["upsilon_std"] == pytest.approx(3 / math.sqrt(2))
    assert found["upsilon_reward_corr"] == pytest.approx(1) and found["upsilon_length_corr"] == pytest.approx(-1)
    assert found["residual_norm"] == pytest.approx(1.5 / 2)  # mean |residual| over |z̄|
    # slope: z_i − z̄_{−i} = (−2, 2); (−2·1 + 2·2) / (1 + 4)
    assert found["slope"] == pytest.approx(2 / 5)


def test_correlation_is_within_groups_and_leaves_unscorable_groups_out():
    a = torch.tensor([0.0, 1.0, 10.0, 11.0, 5.0, 6.0])
    b = torch.tensor([1.0, 0.0, 21.0, 20.0, float("nan"), 3.0])
    assert within_group_correlation(a, b, 2) == pytest.approx(-1.0)  # pooled over groups it would be positive
    assert math.isnan(within_group_correlation(a[:2], torch.ones(2), 2))


def failing(completions, **kwargs):
    raise RuntimeError("no grader here")


def one_inf(completions, **kwargs):
    return [float("inf")] + [0.0] * (len(completions) - 1)


@pytest.mark.parametrize(
    "reward, message",
    [
        (failing, "failing failed with RuntimeError: no grader here"),
        (one_inf, "one_inf returned an infinite reward"),
        (lambda completions, **kwargs: [1.0], "returned 1 rewards, but 8"),
        (lambda completions, **kwargs: [None] * len(completions), "scored none of 8 answers"),
        (lambda completions, **kwargs: "a" * len(completions), "failed with"),
    ],
)
@pytest.mark.parametrize("cls", [GCPOTrainer, CheckedGRPOTrainer])
def test_faulty_rewards(tiny_folder, tmp_path, reward, message, cls):
    with pytest.raises(UserError, match=message):
        make(tiny_folder, tmp_path, reward=reward, cls=cls).train()


def test_single_unscorable_answers_get_no_advantage_and_are_counted(tiny_folder, tmp_path):
    def reward(completions, **kwargs):
        return [None, float("nan"), *digits(completions)[2:]]

    trainer = make(tiny_folder, tmp_path, reward=reward)
    _, batch = one_batch(trainer)
    assert batch["advantages"][:2].tolist() == [0, 0] and batch["advantages"][2:].abs().max() > 0
    assert trainer._metrics["train"]["gcpo/unscorable"] == [0.25]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_integrated": 1}, "num_integrated: 1 must lie between 2 and num_generations = 4"),
        ({"num_integrated": 5}, "num_integrated: 5"),
        ({"estimator": "magic"}, "estimator: 'magic' is unknown, choose one of state, rollout"),
        ({"control": "x"}, "control"),
        ({"similarity": "x"}, "similarity"),
        ({"kappa": -1.0}, "kappa: -1.0"),
        ({"alpha": float("nan")}, "alpha: nan"),
        ({"num_rollouts": 0}, "num_rollouts: 0"),
        ({"loss_type": "dapo"}, "loss_type: 'dapo' cannot be combined with kappa = 0.06"),
        ({"max_completion_length": 200}, "4 candidates x 200 tokens .* 1000 tokens, and the model reads 512"),
    ],
)
def test_bad_settings_are_refused_before_any_work(tiny_folder, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        make(tiny_folder, tmp_path, **options)


def test_another_loss_type_is_fine_without_kappa(tiny_folder, tmp_path):
    assert make(tiny_folder, tmp_path, loss_type="dapo", kappa=0.0).args.loss_type == "dapo"


def test_group_size_that_does_not_fit_the_batch(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="must be divisible by num_generations"):
        make(tiny_folder, tmp_path, num_generations=3)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kwargs": {"tools": [digits]}}, "tools"),
        ({"kwargs": {"rollout_func": digits}}, "rollout_func"),
        ({"dataset": Dataset.from_dict({"prompt": ["a"], "image": ["b"]})}, "'image' found"),
        ({"dataset": Dataset.from_dict({"question": ["a"]})}, "no column 'prompt'"),
    ],
)
def test_what_is_not_supported_is_refused(tiny_folder, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        make(tiny_folder, tmp_path, **changes)


def test_a_prompt_that_does_not_fit_is_named_with_numbers(tiny_folder, tmp_path):
    long = Dataset.from_dict({"prompt": ["1" * 500] * 4})
    with pytest.raises(UserError, match="exceeds the model's window of 512"):
        make(tiny_folder, tmp_path, dataset=long).train()


def test_the_parts_of_trl_that_are_extended_are_still_there():
    """A contract: when TRL moves these, the trainer must follow (pyproject.toml bounds trl for that reason)."""
    parameters = {
        "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
        "_generate_and_score_completions": ["self", "inputs"],
        "_compute_loss": ["self", "model", "inputs"],
        "_generate_single_turn": ["self", "prompt_ids", "images", "multimodal_fields", "num_generations"],
        "_get_per_token_logps_and_entropies": ["self", "model", "input_ids", "attention_mask", "logits_to_keep"],
    }
    for name, expected in parameters.items():
        assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters)[: len(expected)] == expected, name
