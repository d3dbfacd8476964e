"""GCPO on top of TRL's GRPO. Four methods of `trl.GRPOTrainer` are extended, none is copied:

* `_calculate_rewards`: keeps the candidates' token ids; turns a faulty reward function into one clear message.
* `_generate_and_score_completions`: steps 2-4 of the paper, while the group is still whole (TRL shuffles afterwards):
  integrated outputs, collider contexts, features; Υ is folded into the advantages, log π'_ref is stored.
* `_get_per_token_logps_and_entropies`: remembers the live log-probabilities of the loss's own forward pass.
* `_compute_loss`: adds κ KL(π_θ ‖ π'_ref) to TRL's loss (Eq. 10).

The equations themselves are in `loss.py`; the readable whole of the objective is `loss.gcpo_loss`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import ProcessorMixin
from trl import GRPOConfig, GRPOTrainer

from .contexts import CANDIDATE_PREFIX, INTEGRATION_SUFFIX, ContextBuilder
from .errors import UserError
from .loss import k3, projected_reference, projected_target, upsilon
from .qlora import hardware_has_bf16, prepare_quantized
from .scoring import Scores, StateCapture, eval_mode, score

ESTIMATORS = ("state", "rollout")
CONTROLS = ("none", "constant")
SIMILARITIES = ("cosine", "euclidean", "gaussian")


@dataclass
class GCPOConfig(GRPOConfig):
    """`trl.GRPOConfig` with the paper's form as its defaults, and GCPO's own settings.

    Changed defaults: `loss_type="grpo"` (Eq. 6, 10: 1/T_i per answer), `scale_rewards="group"` (Eq. 8), `beta=0.04` (the
    paper gives no value; GRPO's original one), `use_bias_correction_kl=False` (Eq. 6, 7), `bf16` only where the hardware has it.

    Raises:
        UserError: a value outside its range, a loss type the κ term is not defined for.
    """

    loss_type: str = field(default="grpo", metadata={"help": "Eq. 6 and 10 divide by each answer's length T_i."})
    scale_rewards: str = field(default="group", metadata={"help": "Eq. 8: (r - mean) / std over the group."})
    beta: float = field(default=0.04, metadata={"help": "Weight of KL(π_θ ‖ π_ref), Eq. 6. No value in the paper."})
    use_bias_correction_kl: bool = field(
        default=False, metadata={"help": "Eq. 6 adds the KL estimate of Eq. 7 as it is; True weights it with the ratio R."}
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "None: only where the hardware has bf16 units (TRL: everywhere)."}
    )

    alpha: float = field(default=2.0, metadata={"help": "Scale α of Υ, Eq. 11. Paper: 2, the best of its grid."})
    kappa: float = field(default=0.06, metadata={"help": "Weight κ of KL(π_θ ‖ π'_ref), Eq. 12. Paper: 0.06."})
    similarity: str = field(default="cosine", metadata={"help": f"Similarity in Υ: one of {SIMILARITIES}. Paper: cosine."})
    estimator: str = field(
        default="state",
        metadata={
            "help": "'rollout': the paper's steps 1-4, num_rollouts outputs from each context. 'state': an approximation, "
            "the hidden state at each context's end stands for the rollouts; costs no generation."
        },
    )
    num_integrated: int | None = field(
        default=None, metadata={"help": "L, integrated outputs per group. None: n, as in the paper. 2 <= L <= n."}
    )
    num_rollouts: int | None = field(
        default=None, metadata={"help": "M, outputs sampled from each context ('rollout'). None: n, as in the paper."}
    )
    control: str = field(
        default="none", metadata={"help": "'none': Υ of Eq. 11. 'constant': Υ = α (α = 1: the paper's 'without Υ')."}
    )
    context_max_tokens: int = field(
        default=0, metadata={"help": "Show only the last so many tokens of each candidate in a context; 0 shows all."}
    )
    candidate_prefix: str = field(
        default=CANDIDATE_PREFIX, metadata={"help": "Text before each candidate in a context; {k} is its number."}
    )
    integration_suffix: str = field(
        default=INTEGRATION_SUFFIX, metadata={"help": "Text after the last candidate: asks for the integrated answer."}
    )

    def __post_init__(self) -> None:
        if self.bf16 is None and not self.fp16:
            self.bf16 = hardware_has_bf16()  # TRL would switch it on everywhere, also on a CPU or a T4
        super().__post_init__()
        n = self.num_generations
        self.num_integrated = n if self.num_integrated is None else self.num_integrated
        self.num_rollouts = n if self.num_rollouts is None else self.num_rollouts
        self._check(n, self.num_integrated, self.num_rollouts)

    def _check(self, n: int, L: int, M: int) -> None:
        for name, allowed in (("estimator", ESTIMATORS), ("control", CONTROLS), ("similarity", SIMILARITIES)):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}: {getattr(self, name)!r} is unknown, choose one of {', '.join(allowed)}")
        if not 0 <= self.kappa < float("inf"):
            raise UserError(f"kappa: {self.kappa} must be finite and not negative (paper: 0.06)")
        if not 0 <= self.alpha < float("inf"):
            raise UserError(f"alpha: {self.alpha} must be finite and not negative (paper: 2)")
        if not 2 <= L <= n:
            raise UserError(
                f"num_integrated: {L} must lie between 2 and num_generations = {n}; "
                "with one integrated output the residual of Eq. 11 and 13 is exactly zero"
            )
        if M < 1 or self.context_max_tokens < 0:
            raise UserError(
                f"num_rollouts: {M} must be at least 1, "
                f"and context_max_tokens: {self.context_max_tokens} at least 0"
            )
        if self.kappa > 0 and self.loss_type != "grpo":
            raise UserError(
                f"loss_type: {self.loss_type!r} cannot be combined with kappa = {self.kappa}: Eq. 10 averages the κ term "
                "as loss_type 'grpo' does; set loss_type='grpo' or kappa=0"
            )


class GCPOTrainer(GRPOTrainer):
    """Trains with Group Causal Policy Optimization; used exactly like `trl.GRPOTrainer`.

    Text-only prompts, plain or conversational. In evaluation nothing is integrated (Υ = 1, κ = 0). Metrics are logged
    under `gcpo/`; the README explains each.

    Raises:
        UserError: tools, images, environments or a `rollout_func`; a quantised model without trainable adapters; a
            model whose window cannot hold the contexts; a reward function that fails.
    """

    _tag_names = ["trl", "gcpo"]
    _name = "GCPO"

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: GCPOConfig | None = None, train_dataset: Any = None,
        eval_dataset: Any = None, processing_class: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if args is None:
            args = GCPOConfig(f"{model if isinstance(model, str) else 'model'}-GCPO".split("/")[-1])
        if not isinstance(args, GCPOConfig):
            raise UserError(f"args: got a {type(args).__name__}, pass a GCPOConfig (it takes every GRPOConfig option)")
        _refuse_unsupported(train_dataset, processing_class, kwargs)
        super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, processing_class, **kwargs)
        prepare_quantized(self.model)
        self._contexts = ContextBuilder(
            self.processing_class, args.candidate_prefix, args.integration_suffix, args.context_max_tokens,
            strip=(*self.eos_token_ids, self._tokenizer.pad_token_id), chat=self.chat_template_kwargs,
        )  # fmt: skip
        self._window = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self._candidates: list[list[int]] = []
        self._rewards = torch.empty(0)
        self._live_logps: Tensor | None = None
        self._extra_tokens = 0
        if self._integrates:
            self._check_window()
            self._announce_cost()

    @property
    def _integrates(self) -> bool:
        """Whether a step needs integrated outputs at all; without Υ and κ GCPO is GRPO and costs what GRPO costs."""
        return self.args.control == "none" or self.args.kappa > 0

    def _check_window(self) -> None:
        shown = self.max_completion_length
        if self.args.context_max_tokens:
            shown = min(shown, self.args.context_max_tokens)
        needed = self.num_generations * shown + self.max_completion_length
        if self._window is not None and needed > self._window:
            raise UserError(
                f"context_max_tokens: a context may take {self.num_generations} candidates x {shown} tokens + "
                f"{self.max_completion_length} of the answer = {needed} tokens, and the model reads {self._window}; "
                "lower context_max_tokens, num_generations or max_completion_length"
            )

    def _announce_cost(self) -> None:
        if self.args.estimator == "rollout" and self.accelerator.is_main_process:
            n, L, M = self.num_generations, self.args.num_integrated, self.args.num_rollouts
            print(
                f"estimator 'rollout': per question {n} answers + {L} integrated outputs + {n}·{L}·{M} rollouts = "
                f"{n + L + n * L * M} generations (GRPO: {n}); estimator 'state' needs {n + L}",
                flush=True,
            )

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self._candidates = [list(ids) for ids in completion_ids_list]  # y_i, raw and unpadded, end-of-sequence included
        try:
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        except Exception as error:
            raise UserError(
                f"reward_funcs: {', '.join(self.reward_func_names)} failed with {type(error).__name__}: {error}; return "
                "one number per completion, None where an answer cannot be scored"
            ) from error
        _refuse_unusable(rewards, self.reward_func_names)
        weights = self.reward_weights.to(rewards.device)
        self._rewards = torch.where(rewards.isnan().all(1), torch.nan, (rewards * weights).nansum(1))  # (all rows,)
        return rewards

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return output  # Υ = 1, κ = 0
        unscorable = self._rewards.isnan().float().mean().item()
        self._log_gcpo({"unscorable": unscorable})
        if self._integrates:
            started, self._extra_tokens = time.perf_counter(), 0
            with torch.no_grad(), eval_mode(self.model), StateCapture(self.model) as capture:
                self._integrate_and_project(inputs, output, capture)
            seconds = time.perf_counter() - started
            self._log_gcpo({"extra_seconds": seconds, "extra_generated_tokens": float(self._extra_tokens)})
        if self.args.control == "constant":
            output["advantages"] = output["advantages"] * self.args.alpha  # B_i = α A_i
        return output

    def _integrate_and_project(self, inputs, output, capture: StateCapture) -> None:
        """Steps 2-4 of the paper for the local rows. B rows, n to a group, L integrated outputs, M rollouts."""
        n, L = self.num_generations, self.args.num_integrated
        first = self.accelerator.process_index * len(inputs)  # a group may be split across processes
        rows = range(first, first + len(inputs))
        y = gather_object(self._candidates)
        groups = [y[row // n * n : row // n * n + n] for row in rows]
        prompts = [example["prompt"] for example in inputs]
        mask = output["prompt_mask"].bool()
        q = [ids[seen].tolist() for ids, seen in zip(output["prompt_ids"], mask, strict=True)]

        y_n = self._integrated_outputs(prompts, groups, rows)
        x = [
            self._contexts.collider(prompts[k], groups[k], row % n, y_n[row // n * n + l])
            for k, row in enumerate(rows)
            for l in range(L)
        ]  # (B · L) contexts x_{i,l}
        under_q = self._score(capture, q, self._candidates)  # z_i and log π(y_i | q)
        under_x = None
        if self.args.kappa > 0 or self.args.estimator == "state":
            under_x = self._score(capture, x, [ids for ids in self._candidates for _ in range(L)])
        if self.args.control == "none":
            Z = self._conditional_features(capture, q, x, under_x)  # (B, L, M, H)
            self._fold_upsilon(output, under_q.response_state, Z, rows)
        if under_x is not None and self.args.kappa > 0:
            self._store_projected_reference(output, under_q, under_x, L)

    def _integrated_outputs(self, prompts, groups, rows: range) -> list[list[int]]:
        """Step 2: y_{n,l} for l < L, at position (group start + l) of the returned list of all rows."""
        n, L = self.num_generations, self.args.num_integrated
        wanted = [k for k, row in enumerate(rows) if row % n < L]
        # A process whose rows are all beyond L still generates once: sharded models generate together or not at all.
        asked = wanted or [0]
        written = self._sample([self._contexts.integration(prompts[k], groups[k]) for k in asked])
        local: list[list[int]] = [[] for _ in rows]
        for k, ids in zip(wanted, written[: len(wanted)], strict=True):
            local[k] = ids
        if wanted:
            lengths = [float(len(ids)) for ids in written]
            self._log_gcpo({
                "integrated_length": sum(lengths) / len(lengths),
                "integrated_truncated": sum(ids[-1] not in self._contexts.strip for ids in written) / len(lengths),
            })  # fmt: skip
        return gather_object(local)

    def _conditional_features(self, capture: StateCapture, q, x, under_x: Scores | None) -> Tensor:
        """Step 3: Z_{i,l,m}, (B, L, M, H). 'state' has M = 1, the state at the end of the context."""
        L, M = self.args.num_integrated, self.args.num_rollouts
        if self.args.estimator == "state":
            assert under_x is not None
            return under_x.context_state.view(len(q), L, 1, -1)
        rollouts = self._sample([context for context in x for _ in range(M)])
        read = self._score(capture, [ids for ids in q for _ in range(L * M)], rollouts)
        return read.response_state.view(len(q), L, M, -1)

    def _fold_upsilon(self, output, z: Tensor, Z: Tensor, rows: range) -> None:
        """B_i = A_i · Υ_i (Eq. 11), for whole groups, then back to the local rows; and what Υ did, in numbers."""
        n = self.num_generations
        z = self.accelerator.gather(z)  # (all rows, H)
        Z = self.accelerator.gather(Z.mean(2, keepdim=True))  # only the mean over M enters; (all rows, L, 1, H)
        starts = range(0, len(z), n)
        target = torch.cat([projected_target(z[s : s + n], Z[s : s + n]) for s in starts])
        upsilons = upsilon(z, target, self.args.alpha, self.args.similarity)
        output["advantages"] = output["advantages"] * upsilons[rows.start : rows.stop].to(output["advantages"])
        lengths = torch.tensor([float(len(ids)) for ids in gather_object(self._candidates)], device=z.device)
        self._log_gcpo(upsilon_metrics(upsilons, z, Z, self._rewards.to(z.device), lengths, n))

    def _store_projected_reference(self, output, under_q: Scores, under_x: Scores, L: int) -> None:
        """Step 4: log π'_ref for the local rows, (B, C) beside TRL's own log-probabilities."""
        logps_x = under_x.logps.view(len(under_q.logps), L, -1)
        log_ref, low, high = projected_reference(logps_x, under_q.logps, under_q.mask)
        # TRL may pad the answers further (pad_to_multiple_of); the padding is masked out of the loss.
        width = output["completion_ids"].size(1)
        stored = log_ref.new_zeros(len(log_ref), width)
        stored[:, : log_ref.size(1)] = log_ref
        output["projected_ref_per_token_logps"] = stored
        shares = self.accelerator.gather(torch.stack([low, high]).to(log_ref)).view(-1, 2).mean(0)
        self._log_gcpo({"clamped_low": shares[0].item(), "clamped_high": shares[1].item()})

    def _sample(self, contexts: list[list[int]]) -> list[list[int]]:
        """One response from the policy to each context, at most a generation batch at a time."""
        longest = max(map(len, contexts))
        if self._window is not None and longest + self.max_completion_length > self._window:
            raise UserError(
                f"context_max_tokens: a context of {longest} tokens + max_completion_length "
                f"{self.max_completion_length} exceeds the model's window of {self._window}; show less of each "
                "candidate (context_max_tokens) or use shorter prompts"
            )
        size = self.args.per_device_train_batch_size * self.args.steps_per_generation
        written: list[list[int]] = []
        for start in range(0, len(contexts), size):
            written += self._generate_single_turn(contexts[start : start + size], None, {}, 1)[0]
        self._extra_tokens += sum(map(len, written))
        return written

    def _score(self, capture: StateCapture, contexts: list[list[int]], responses: list[list[int]]) -> Scores:
        def forward(ids: Tensor, seen: Tensor, width: int) -> tuple[Tensor, Tensor]:
            logps = GRPOTrainer._get_per_token_logps_and_entropies(self, self.model, ids, seen, width)[0]
            assert capture.states is not None
            return logps, capture.states

        rows = self.args.per_device_train_batch_size
        return score(forward, contexts, responses, self._tokenizer.pad_token_id, rows, self.accelerator.device)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._live_logps = result[0]
        return result

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        logps, self._live_logps = self._live_logps, None
        if "projected_ref_per_token_logps" not in inputs:
            return loss
        mask = inputs["completion_mask"].bool()
        reference = torch.where(mask, inputs["projected_ref_per_token_logps"], logps.detach())
        kl = torch.where(mask, k3(logps, reference), 0.0)  # Eq. 12, (B, C)
        term = (kl.sum(1) / mask.sum(1).clamp(min=1)).mean()
        self._log_gcpo({"kl": self.accelerator.gather(term.detach()).mean().item()})
        return loss + self.args.kappa * term / self.current_gradient_accumulation_steps

    def _log_gcpo(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._metrics["train"][f"gcpo/{name}"].append(value)


def upsilon_metrics(
    upsilons: Tensor, z: Tensor, Z: Tensor, rewards: Tensor, lengths: Tensor, group_size: int
) -> dict[str, float]:
    """What Υ did in one batch (formulas: README, "Metrics").

    Args:
        upsilons: (N,) Υ_i. z: (N, H). Z: (N, L, M, H). rewards, lengths: (N,), NaN for unscorable answers.
        group_size: n; N is a multiple of it.
    """
    residual = Z[:, 0].mean(1) - Z.mean((1, 2))  # Z̄_i − Z̄'_i, (N, H)
    groups = z.view(-1, group_size, z.size(-1))
    mean = groups.mean(1, keepdim=True)
    leave_one_out = ((group_size * mean - groups) / (group_size - 1)).reshape(z.shape)  # z̄_{−i}
    slope = ((z - leave_one_out) * residual).sum() / residual.square().sum()  # b̂, theory.md §3
    return {
        "upsilon_mean": upsilons.mean().item(),
        "upsilon_std": upsilons.view(-1, group_size).std(1).mean().item(),
        "upsilon_min": upsilons.min().item(),
        "upsilon_negative": (upsilons < 0).float().mean().item(),
        "upsilon_reward_corr": within_group_correlation(upsilons, rewards, group_size),
        "upsilon_length_corr": within_group_correlation(upsilons, lengths, group_size),
        "residual_norm": (residual.norm(dim=1).mean() / mean.norm(dim=2).mean()).item(),
        "slope": slope.item(),
    }


def within_group_correlation(a: Tensor, b: Tensor, group_size: int) -> float:
    """Pearson correlation of a and b, both (N,), after each group's mean is removed; NaN where nothing varies."""
    a, b = a.view(-1, group_size).double(), b.view(-1, group_size).double()
    kept = ~(a.isnan() | b.isnan()).any(1)
    a, b = (v[kept] - v[kept].mean(1, keepdim=True) for v in (a, b))
    return ((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()).item()


def _refuse_unsupported(train_dataset: Any, processing_class: Any, kwargs: dict[str, Any]) -> None:
    for name in ("tools", "rollout_func", "environment_factory"):
        if kwargs.get(name):
            raise UserError(f"{name}: GCPO re-reads whole answers as text and does not support it; leave it out")
    if isinstance(processing_class, ProcessorMixin):
        raise UserError(
            f"processing_class: {type(processing_class).__name__} handles images, GCPO is text-only; pass a tokenizer"
        )
    columns = set(getattr(train_dataset, "column_names", None) or [])
    if columns & {"image", "images"}:
        raise UserError(f"train_dataset: column {sorted(columns & {'image', 'images'})[0]!r} found; GCPO is text-only")
    if columns and "prompt" not in columns:
        raise UserError(f"train_dataset: no column 'prompt' among {sorted(columns)}; rename the question's column")


def _refuse_unusable(rewards: Tensor, names: list[str]) -> None:
    for k, name in enumerate(names):
        if rewards[:, k].isinf().any():
            raise UserError(f"reward_funcs: {name} returned an infinite reward; return finite numbers, or None")
    if rewards.isnan().all():
        raise UserError(
            f"reward_funcs: {', '.join(names)} scored none of {len(rewards)} answers (all None or NaN); "
            "check the data set's answer column"
        )
