"""How well the cheap estimators of Υ and π'_ref agree with the paper's steps taken literally, and what each costs.

Everything is read by the trainer itself, on answers written before: every setting gets the same candidates y_i and the same
integrated outputs y_{n,l}, so that what differs is the estimator. The reference is the literal algorithm with so many
rollouts that its own noise is small; how small, a second draw of them says (the ceiling that no other setting can pass).

G groups (questions) of n candidates, L integrated outputs, M rollouts from each context, T tokens of the longest candidate.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from scipy import stats

from .config import GCPOConfig
from .errors import UserError
from .loss import projected_reference, upsilon
from .rewards import Reward
from .scoring import Ids, StateCapture, score
from .trainer import GCPOTrainer

ROUNDING = 1e-5  # of Υ in float32: differences below are none


@dataclass(frozen=True)
class Setting:
    """One way to estimate Υ and π'_ref.

    approximates: what differs from the paper's steps, in words. options: of `GCPOConfig`, or of the preset `build`.
    own_y_n: it writes its own y_{n,l}. draw: number of the random draw; settings of the same draw may share random numbers.
    """

    name: str
    approximates: str
    options: dict[str, Any] = field(default_factory=dict)
    build: Callable[..., GCPOConfig] = GCPOConfig
    own_y_n: bool = False
    draw: int = 0


def settings(group_size: int, rollouts: int, max_new_tokens: int) -> list[Setting]:
    """The reference first, then what is compared with it."""
    n, literal, half = group_size, {"estimator": "rollout", "num_rollouts": rollouts}, max(1, max_new_tokens // 2)
    return [
        Setting("literal", f"reference: the paper's steps, M = {rollouts} for n", literal),
        Setting("literal, rollouts again", "nothing: other rollouts, same y_n (the ceiling)", literal, draw=1),
        Setting("literal, y_n again", "nothing: other rollouts and other y_n", literal, own_y_n=True, draw=2),
        Setting("rollout, M = n", "nothing: the paper's number of rollouts", {**literal, "num_rollouts": n}, draw=3),
        Setting("rollout, M = 1", "one rollout for n", {**literal, "num_rollouts": 1}, draw=4),
        Setting("rollout, L = 2", "two y_n for n", {**literal, "num_integrated": 2}, draw=5),
        Setting("state, L = n", "the context's last state for its rollouts"),
        Setting("state, L = 2", "the same, and two y_n for n", {"num_integrated": 2}),
        Setting("state, L = 2, half", "the same, contexts show last halves", {"num_integrated": 2, "context_max_tokens": half}),
        Setting("fast, whole y_n", "the same, last eighths", {"integrated_max_tokens": 0}, GCPOConfig.fast),
        Setting("fast", "the same, and y_n is cut to an eighth as well", build=GCPOConfig.fast, own_y_n=True, draw=6),
        Setting("centroid", "no projection in Υ: target z̄ (control)", {"control": "centroid"}),
        Setting("theorem, rollouts", "Φ of the theorem, not of the algorithm", {**literal, "phi": "theorem"}, draw=7),
        Setting("theorem, state", "the same, states for rollouts", {"phi": "theorem"}, draw=8),
        *(
            Setting(f"{name}, φ = {token}", f"another feature{more}", {**options, "feature_token": token}, draw=draw)
            for draw, token in ((9, "last_content"), (10, "mean"))
            for name, more, options in (("literal", "", literal), ("state", ", states for rollouts", {}))
        ),
    ]  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """What one setting made of G groups; costs are per group, beyond the candidates themselves."""

    upsilon: np.ndarray  # (G, n) Υ_i
    centroid: np.ndarray  # (G, n) Υ_i with the target z̄: what is left of it without the projection
    weighted: np.ndarray  # (G, n) B_i
    varied: np.ndarray  # (G,) bool: its y_{n,l} differ; where they don't, the exact projection is 0
    log_rho: np.ndarray  # (G, n, T) log π'_ref − log π(y_i | q), NaN after the candidate's end
    generated: float  # tokens written: y_n and rollouts
    forward: float  # positions that passed through the policy, padding included, those of writing too
    seconds: float


@dataclass(frozen=True)
class Written:
    """Answers of the policy that all settings read."""

    candidates: list[Ids]  # G·n
    states: torch.Tensor | None  # (G·n, H) φ of each, as sampling leaves it
    y_n: list[Ids]  # G·n: y_{n,l} at place l of its group

    def answers(self, group_size: int) -> np.ndarray:
        """(G, n) equal numbers where the texts are equal."""
        numbers: dict[tuple[int, ...], int] = {}
        codes = [numbers.setdefault(tuple(ids), len(numbers)) for ids in self.candidates]
        return np.array(codes).reshape(-1, group_size)


class Replay(GCPOTrainer):
    """The trainer on answers that were written before; it writes y_n as always, pays for it, and takes the kept one.

    `written` None: it writes all of it.
    """

    def __init__(self, *arguments: Any, written: Written | None, own_y_n: bool, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.written, self.own_y_n, self.forward_tokens = written, own_y_n, 0
        self.y_n: list[Ids] = []

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if self.written is None:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if self.args.feature_token == "last":
            self._sampled_states = self.written.states
        return self.written.candidates, None

    def _one_each(self, contexts, wanted, *trunks):
        self.y_n = super()._one_each(contexts, wanted, *trunks)
        if self.written is not None and not self.own_y_n:
            self.y_n = [ids if want else [] for ids, want in zip(self.written.y_n, wanted, strict=True)]
        return self.y_n

    def _announce_cost(self):
        """Not here: the table tells."""

    def _fold_upsilon(self, output, z, Z):
        self.z = z
        super()._fold_upsilon(output, z, Z)

    def _integrate_and_project(self, inputs, output):
        def count(module, arguments, found):
            self.forward_tokens += found[0].shape[:2].numel()

        handle = StateCapture(self.model).backbone.register_forward_hook(count)
        try:
            super()._integrate_and_project(inputs, output)
        finally:
            handle.remove()


def study(
    model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], reward: Reward, group_size: int = 4, rollouts: int = 64,
    max_new_tokens: int = 8, seed: int = 0, only: Sequence[str] = (), draws: int = 2000, **options: Any,
) -> pd.DataFrame:  # fmt: skip
    """A line for each of `settings`; the columns are explained at `compare`.

    Args:
        model, tokenizer: a causal language model. rows: one question each, {"prompt", …}, at least two.
        reward: TRL's form; B_i needs it.
        group_size: n. rollouts: M of the reference; the more, the less noise of its own it has.
        max_new_tokens: longest answer. seed: of every draw; the global random state is put back.
        only: names of `settings`, besides the reference; empty takes all. draws: of the bootstrap over groups.
        options: of `GCPOConfig`, for all settings: the template, alpha …

    Raises:
        UserError: fewer than two questions, a name that no setting has.
    """
    chosen = settings(group_size, rollouts, max_new_tokens)
    unknown = set(only) - {setting.name for setting in chosen}
    if len(rows) < 2 or unknown:
        names = ", ".join(setting.name for setting in chosen)
        raise UserError(f"rows: {len(rows)} must be at least 2; only: {sorted(unknown)} must be among {names}")
    common = {"num_generations": group_size, "max_completion_length": max_new_tokens, "seed": seed, **options}
    written = write(model, tokenizer, rows, reward, common)
    chosen = [setting for k, setting in enumerate(chosen) if k == 0 or not only or setting.name in only]
    readings = [read(model, tokenizer, rows, reward, setting, written, common) for setting in chosen]
    answers, reference = written.answers(group_size), readings[0]
    return pd.DataFrame([
        {"setting": setting.name, "approximates": setting.approximates}
        | compare(reading, None if reading is reference else reference, answers, draws, seed)
        for setting, reading in zip(chosen, readings, strict=True)
    ]).set_index("setting")  # fmt: skip


def write(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], reward: Reward, common: dict[str, Any]) -> Written:
    """Candidates and n integrated outputs for each question, as the trainer writes them."""
    with _trainer(model, tokenizer, rows, reward, Setting("", ""), None, common) as (trainer, batch):
        trainer._generate_and_score_completions(batch)
        return Written(trainer._candidates, trainer._sampled_states, trainer.y_n)


def read(
    model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], reward: Reward, setting: Setting, written: Written,
    common: dict[str, Any],
) -> Reading:  # fmt: skip
    """What the trainer makes of `written` under this setting, and what it pays for it."""
    with _trainer(model, tokenizer, rows, reward, setting, written, common) as (trainer, batch), torch.no_grad():
        output = trainer._generate_and_score_completions(batch)
        G, n, args = len(rows), trainer.num_generations, trainer.args
        z = trainer.z.view(G, n, -1)
        centroid = [upsilon(group, group.mean(0, keepdim=True).expand_as(group), args.alpha) for group in z]
        q = [ids[seen.bool()].tolist() for ids, seen in zip(output["prompt_ids"], output["prompt_mask"], strict=True)]
        mask = output["completion_mask"]
        logps_q = score(trainer._reader, q, trainer._candidates, mask.shape[1]).logps
        log_ref = projected_reference(output["collider_logps"], logps_q, mask, args.eq13_reduction)[0]
        log_rho = (log_ref - logps_q).masked_fill(mask == 0, torch.nan)
        varied = [any(len(set(map(tuple, y_n))) > 1 for y_n in trainer.last_group["y_n"][s : s + n]) for s in range(0, G * n, n)]
        seconds = trainer._metrics["train"]["gcpo/extra_seconds"][-1]
        return Reading(
            trainer.last_group["upsilon"].view(G, n).cpu().numpy(), torch.stack(centroid).cpu().numpy(),
            output["advantages"].view(G, n).cpu().numpy(), np.array(varied), log_rho.view(G, n, -1).cpu().numpy(),
            trainer._extra_tokens / G, trainer.forward_tokens / G, seconds / G,
        )  # fmt: skip


@contextmanager
def _trainer(
    model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], reward: Reward, setting: Setting, written: Written | None,
    common: dict[str, Any],
) -> Iterator[tuple[Replay, list[dict[str, Any]]]]:  # fmt: skip
    """The trainer of a setting and the batch that holds every question n times; random states and the model's mode are kept."""
    n, seed, device, was_training = common["num_generations"], common["seed"], model.device, model.training
    states = random.getstate(), np.random.get_state()
    with (
        tempfile.TemporaryDirectory() as folder,
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        config = setting.build(
            folder, beta=0.0, bf16=False, use_cpu=device.type == "cpu", per_device_train_batch_size=n * len(rows), max_steps=1,
            gradient_checkpointing=False, report_to=[], **{**common, **setting.options},
        )  # fmt: skip
        trainer = Replay(
            model, reward, config, Dataset.from_list(list(rows)), processing_class=tokenizer, written=written,
            own_y_n=setting.own_y_n,
        )  # fmt: skip
        model.train()
        torch.manual_seed(1000 * (seed + 1) + setting.draw + (written is not None))
        try:
            yield trainer, [row for row in rows for _ in range(n)]
        finally:
            model.train(was_training)
            random.setstate(states[0])
            np.random.set_state(states[1])


def compare(found: Reading, reference: Reading | None, answers: np.ndarray, draws: int = 2000, seed: int = 0) -> dict[str, Any]:
    """One reading in numbers: its agreement with the reference (NaN where there is nothing to compare), sizes, costs.

    Equal answers of a group count once, with their mean Υ: nothing but chance tells them apart. Intervals (low, high) are 95%
    percentile bootstraps over groups.

    Returns:
        rank (low, high, groups): Spearman's correlation of Υ within a group, mean over the groups with different answers.
        projection (low, high, groups): the same for what the projection adds, Υ − α cos(z_i, z̄), where both readings'
            y_{n,l} differ. Elsewhere it is 0 but for noise.
        bias (low, high, groups): mean of Υ − Υ_reference. rms: its root mean square. spread: standard deviation of Υ in a group.
        order changed (groups): share of the groups with different rewards where two answers change places by B_i.
        log_rho correlation, log_rho rms: of log ρ = log(π'_ref / π(· | q)) and of its difference, over tokens.
        log_rho size: root mean square of log ρ itself. kl: mean k3, the κ term before κ.
        generated, forward, seconds: see `Reading`.

    Args:
        answers: (G, n) equal numbers for equal texts.
        draws, seed: of the bootstrap.
    """
    tokens = found.log_rho[~np.isnan(found.log_rho)]
    own = {
        "spread": float(found.upsilon.std(1, ddof=1).mean()), "log_rho size": float(np.sqrt(np.square(tokens).mean())),
        "kl": float(np.mean(np.expm1(tokens) - tokens)), "generated": found.generated, "forward": found.forward,
        "seconds": found.seconds,
    }  # fmt: skip
    if reference is None:
        return own
    difference = found.upsilon - reference.upsilon
    rank = rank_correlations(found.upsilon, reference.upsilon, answers)
    varied = found.varied & reference.varied
    ours, theirs = (one.upsilon[varied] - one.centroid[varied] for one in (found, reference))
    projection = rank_correlations(ours, theirs, answers[varied])
    changed = order_changed(found.weighted, reference.weighted, answers)
    known = reference.log_rho[~np.isnan(reference.log_rho)]
    return {
        **_interval("rank", rank, draws, seed), **_interval("projection", projection, draws, seed),
        **_interval("bias", difference.mean(1), draws, seed), "rms": float(np.sqrt(np.square(difference).mean())),
        "order changed": float(changed.mean()) if len(changed) else np.nan, "order changed groups": len(changed),
        "log_rho correlation": float(np.corrcoef(tokens, known)[0, 1]) if tokens.std() * known.std() > 0 else np.nan,
        "log_rho rms": float(np.sqrt(np.square(tokens - known).mean())), **own,
    }  # fmt: skip


def rank_correlations(a: np.ndarray, b: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Spearman's correlation of a and b (G, n) over the different answers of each group; only groups where both vary."""
    found = []
    for one, other, texts in zip(a, b, answers, strict=True):
        x, y = ([values[texts == text].mean() for text in set(texts)] for values in (one, other))
        if np.ptp(x) > ROUNDING and np.ptp(y) > ROUNDING:
            found.append(stats.spearmanr(x, y).statistic)
    return np.array(found)


def order_changed(a: np.ndarray, b: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Whether a and b (G, n) order two different answers of a group differently; only groups where b is not 0 throughout."""
    found = []
    for one, other, texts in zip(a, b, answers, strict=True):
        swapped = np.subtract.outer(one, one) * np.subtract.outer(other, other) < 0
        if other.any():
            found.append(bool((swapped & np.not_equal.outer(texts, texts)).any()))
    return np.array(found)


def _interval(name: str, values: np.ndarray, draws: int, seed: int) -> dict[str, float]:
    """Mean over groups, its interval, and their number; NaN where fewer than two are left."""
    found: dict[str, float] = {name: np.nan, f"{name} low": np.nan, f"{name} high": np.nan, f"{name} groups": len(values)}
    if len(values) > 1:
        picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
        low, high = np.quantile(values[picks].mean(1), [0.025, 0.975])
        found |= {name: float(values.mean()), f"{name} low": float(low), f"{name} high": float(high)}
    return found
