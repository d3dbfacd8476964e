"""The paper's baselines under the same trainer interface: GRPO and Dr.GRPO are TRL's own, GVPO is a small subclass.

GVPO (arXiv 2504.19599) regresses the implicit rewards s_i = β log( π_θ(y_i | q) / π_old(y_i | q) ) of whole answers on the raw
rewards, both centred in their group. It has no importance ratio, no clip, and no division by std r or by T_i:

    L = mean over groups of  1/(n − 1) Σ_i ½ ( (s_i − s̄) − (r_i − r̄) )²

Its gradient weights, β/(n − 1) ((s_i − s̄) − (r_i − r̄)) on ∇ log π_θ(y_i | q), add up to zero in a group; so s̄ may be a constant.

ReST-MCTS*, the paper's fourth baseline, is not trained here: `evaluation/published.py` has its published numbers.

N rows (answers), whole groups of n one after another; B of them in one pass; T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .checked import CheckedGRPOTrainer
from .config import GCPOConfig
from .errors import UserError

# What a method changes in the configuration that all methods share. Dr.GRPO: arXiv 2503.20783, §3.2: no 1/T_i, no std, no KL.
OPTIONS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "gcpo": {},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0, "kappa": 0.0},
    "gvpo": {"scale_rewards": "none", "beta": 0.0, "kappa": 0.0},
}
NOT_GVPOS = {
    "beta": 0.0, "kappa": 0.0, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "delta": None,
    "importance_sampling_level": "token",
}  # fmt: skip


def centred_rewards(rewards: Tensor, keep: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """r_i − r̄ in each group, and the weight n/(m − 1) that turns a mean over rows into GVPO's mean over groups.

    rewards     (N,)  raw rewards
    keep        (N,)  True where an answer belongs to its group: not where it is unscorable or has no token to train
    group_size  n, a divisor of N; m ≤ n answers of a group are kept, and r̄ is their mean
    returns     (N,), (N,)  both 0 at rows that are not kept, and in groups with m < 2
    """
    kept = keep.view(-1, group_size)  # (G, n)
    r = rewards.view(-1, group_size).masked_fill(~kept, 0.0)
    m = kept.sum(1, keepdim=True)  # (G, 1)
    used = kept & (m > 1)
    centred = (r - r.sum(1, keepdim=True) / m.clamp(min=1)).masked_fill(~used, 0.0)
    weight = (group_size / (m - 1).clamp(min=1)).expand_as(centred).masked_fill(~used, 0.0)
    return centred.reshape(-1), weight.reshape(-1)


def group_means(x: Tensor, group: Tensor, weight: Tensor) -> Tensor:
    """Mean of x over the rows of each group whose weight is not 0, (number of groups,); x, group, weight (N,), any order."""
    used = (weight > 0).to(x)
    sums = x.new_zeros(2, int(group.max()) + 1).index_add_(1, group, torch.stack([x * used, used]))
    return sums[0] / sums[1].clamp(min=1)


def gvpo_loss(log_ratio: Tensor, mean_log_ratio: Tensor, centred: Tensor, weight: Tensor, beta: float = 0.1) -> Tensor:
    """GVPO's loss of B rows: the mean of weight_i · ½ ( β (log_ratio_i − mean_i) − (r_i − r̄) )².

    log_ratio        (B,)  Σ_j log π_θ(y_ij) − log π_old(y_ij); the only argument that gets a gradient
    mean_log_ratio   (B,)  its mean over the row's whole group (`group_means`), a constant
    centred, weight  (B,)  of `centred_rewards`
    beta             of the KL constraint; default: the authors' own runs (github.com/jszkc/GVPO)
    returns          scalar; over whole groups it is the L above
    """
    implicit = beta * (log_ratio - mean_log_ratio.detach())
    return (weight * (implicit - centred).square() / 2).mean()


@dataclass
class GVPOConfig(GCPOConfig):
    """`GCPOConfig`, whose `gvpo_beta` is GVPO's β; there is no other KL term.

    Raises:
        UserError: an option that GVPO's loss has no place for; answers that are used by several optimiser steps
            (num_iterations, steps_per_generation) while a generated batch is split: s̄ needs whole groups.
    """

    scale_rewards: str = field(default="none", metadata={"help": "GVPO takes raw rewards."})
    beta: float = field(default=0.0, metadata={"help": "Must be 0: GVPO's KL constraint is `gvpo_beta`."})
    kappa: float = field(default=0.0, metadata={"help": "Must be 0: GCPO's."})
    gvpo_beta: float = field(default=0.1, metadata={"help": "β of GVPO's KL constraint. 0.1: the authors' own runs."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.gvpo_beta < float("inf"):
            raise UserError(f"gvpo_beta: {self.gvpo_beta} must be finite and positive (the authors' runs: 0.1)")
        for name, neutral in NOT_GVPOS.items():
            if getattr(self, name) != neutral:
                raise UserError(f"{name}: {getattr(self, name)!r} has no place in GVPO's loss; leave it at {neutral!r}")
        if not self.on_policy and self.steps_per_generation > 1:
            raise UserError(
                f"steps_per_generation: {self.steps_per_generation} splits the groups of a generated batch, and with "
                f"num_iterations = {self.num_iterations} and gradient_accumulation_steps = {self.gradient_accumulation_steps} "
                "the policy changes in between; GVPO's mean over a group then needs it whole: set steps_per_generation=1, or "
                "num_iterations=1 and steps_per_generation=gradient_accumulation_steps"
            )

    @property
    def on_policy(self) -> bool:
        """Whether every gradient is taken at the policy that wrote the answers, so that s_i = 0 and no s̄ is needed."""
        return self.gradient_accumulation_steps % (self.steps_per_generation * self.num_iterations) == 0


class GVPOTrainer(CheckedGRPOTrainer):
    """Trains with Group Variance Policy Optimization; used exactly like `trl.GRPOTrainer`, with a `GVPOConfig`.

    Three methods of `trl.GRPOTrainer` are extended: rewards are kept raw; they are centred while the group is whole (TRL
    shuffles afterwards); the loss is `gvpo_loss`. Answers that are unscorable or masked out (mask_truncated_completions)
    are left out of their group.
    """

    _tag_names = ["trl", "gvpo"]
    _name = "GVPO"

    def __init__(self, model: Any, reward_funcs: Any = None, args: GVPOConfig | None = None, *rest: Any, **kwargs: Any) -> None:
        if not isinstance(args, GVPOConfig):
            raise UserError(f"args: got a {type(args).__name__}, pass a GVPOConfig (it takes every GRPOConfig option)")
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        self._rewards = torch.empty(0)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        weights = self.reward_weights.to(rewards.device)
        self._rewards = torch.where(rewards.isnan().all(1), torch.nan, (rewards * weights).nansum(1))  # (all rows,)
        return rewards

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        n = self.num_generations if self.model.training else self.num_generations_eval
        answered = self.accelerator.gather(output["completion_mask"].sum(1)) > 0  # (all rows,)
        centred, weight = centred_rewards(self._rewards, answered & ~self._rewards.isnan(), n)
        first = self.accelerator.process_index * len(inputs)
        rows = torch.arange(first, first + len(inputs), device=centred.device)
        output["advantages"], output["gvpo_weight"], output["gvpo_group"] = centred[rows], weight[rows], rows // n
        return output

    def _compute_loss(self, model, inputs):
        mask = inputs["completion_mask"].bool()  # (B, T)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        logps, entropies = self._get_per_token_logps_and_entropies(model, ids, seen, mask.shape[1], compute_entropy=True)[:2]
        training = self.model.training
        on_policy = self.args.on_policy or not training
        old = logps.detach() if on_policy else inputs["old_per_token_logps"]
        log_ratio = torch.where(mask, logps - old, 0.0).sum(1)  # (B,)
        mean = torch.zeros_like(log_ratio) if on_policy else self._group_mean(log_ratio.detach(), inputs)
        loss = gvpo_loss(log_ratio, mean, inputs["advantages"], inputs["gvpo_weight"], self.args.gvpo_beta)
        total = self.accelerator.reduce(torch.stack([torch.where(mask, entropies, 0.0).sum(), mask.sum().to(entropies)]), "sum")
        self._metrics["train" if training else "eval"]["entropy"].append((total[0] / total[1].clamp(min=1)).item())
        return loss / (self.current_gradient_accumulation_steps if training else 1)

    def _group_mean(self, log_ratio: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """Each row's group mean (B,); the group may lie on several processes, in any order."""
        parts = log_ratio, inputs["gvpo_group"], inputs["gvpo_weight"]
        means = group_means(*(self.accelerator.gather(part) for part in parts))
        return means[inputs["gvpo_group"]]
