"""The settings of `GCPOTrainer`: TRL's, with the paper's form as defaults, and GCPO's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from .contexts import CANDIDATE_PREFIX, INTEGRATION_SUFFIX
from .errors import UserError
from .qlora import hardware_has_bf16
from .scoring import BACKENDS, FEATURE_TOKENS

CHOICES = {
    "estimator": ("state", "rollout"),
    "phi": ("algorithm", "theorem"),
    "control": ("none", "constant", "permuted", "centroid", "centroid_loo", "foreign"),
    "similarity": ("cosine", "euclidean", "gaussian"),
    "upsilon_map": ("raw", "one_plus", "clamp"),
    "feature_token": FEATURE_TOKENS,
    "eq13_reduction": ("mean", "sum"),
    "kl_context": ("query", "collider"),
    "candidate_order": ("sampled", "shuffled"),
    "scoring": BACKENDS,
}


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
    similarity: str = field(default="cosine", metadata={"help": "Similarity in Υ: cosine (paper), euclidean or gaussian."})
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
    phi: str = field(
        default="algorithm",
        metadata={
            "help": "Φ in Υ and in π'_ref. 'algorithm': all y_{n,l} are decoded from the same group, as the paper writes it. "
            "'theorem': those with l >= 1 from the group with a fresh y_i' in y_i's place, as Eq. 2 and Theorem 1 have it."
        },
    )
    control: str = field(
        default="none",
        metadata={
            "help": "What a claim about Υ is compared with. 'none': Υ of Eq. 11. 'constant': Υ = α (α = 1: the paper's 'without "
            "Υ'). 'permuted': Υ shuffled within the group. 'centroid': the target is z̄, without the projection; 'centroid_loo': "
            "z̄ without z_i. 'foreign': y_n of another question."
        },
    )
    kl_context: str = field(
        default="query",
        metadata={
            "help": "The policy in the κ term. 'query': π_θ(.|q), Eq. 10 and the prose. 'collider': π_θ(.|x_i), Eq. 12 as "
            "printed, with a gradient through the long context."
        },
    )
    eq13_reduction: str = field(
        default="mean", metadata={"help": "Over l in Eq. 13: 'mean' (Φ is an expectation), or 'sum' as printed, with L = n only."}
    )
    feature_token: str = field(
        default="last",
        metadata={"help": "φ(q, y): state at the 'last' token (paper), 'last_content' (before EOS), or the 'mean' (extensions)."},
    )
    upsilon_map: str = field(
        default="raw", metadata={"help": "'raw' (paper), or extensions that keep signs: 'one_plus' (1 + s)/2, 'clamp' max(s, 0)."}
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

    candidate_order: str = field(
        default="sampled", metadata={"help": "Order of the candidates in contexts: 'sampled', or 'shuffled' per group, seeded."}
    )
    integrated_max_tokens: int = field(
        default=0, metadata={"help": "Longest integrated output, in tokens; 0: max_completion_length."}
    )
    scoring: str = field(
        default="prefix",
        metadata={
            "help": "'prefix': keys and values of what the contexts of a candidate share are computed once. 'batched': every "
            "context whole. 'naive': one sequence at a time, for checks. They agree to rounding."
        },
    )
    scoring_tokens: int = field(
        default=4096, metadata={"help": "Tokens of one scoring pass, padding included: its memory. A longer row is read alone."}
    )

    @classmethod
    def paper(cls, output_dir: str, **options: Any) -> GCPOConfig:
        """The paper's steps to the letter: n integrated outputs, n rollouts from each of n contexts. n³ generations."""
        return cls(output_dir, **{"estimator": "rollout", **options})

    @classmethod
    def fast(cls, output_dir: str, max_completion_length: int = 256, **options: Any) -> GCPOConfig:
        """An approximation: states for rollouts, L = 2, of each answer its last eighth. Cost: tests/benchmarks/step_cost.py."""
        shown = max(1, max_completion_length // 8)
        fast = {"estimator": "state", "num_integrated": 2, "context_max_tokens": shown, "integrated_max_tokens": shown}
        return cls(output_dir, **{"max_completion_length": max_completion_length, **fast, **options})

    def __post_init__(self) -> None:
        if self.bf16 is None and not self.fp16:
            self.bf16 = hardware_has_bf16()  # TRL would switch it on everywhere, also on a CPU or a T4
        super().__post_init__()
        n = self.num_generations
        self.num_integrated = n if self.num_integrated is None else self.num_integrated
        self.num_rollouts = n if self.num_rollouts is None else self.num_rollouts
        self._check(n, self.num_integrated)

    def _check(self, n: int, L: int) -> None:
        for name, allowed in CHOICES.items():
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
        lowest = {"num_rollouts": 1, "context_max_tokens": 0, "integrated_max_tokens": 0, "scoring_tokens": 1}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise UserError(f"{name}: {getattr(self, name)} must be at least {least}")
        if self.eq13_reduction == "sum" and L != n:
            raise UserError(f"eq13_reduction: 'sum', as printed, runs over l < n; set num_integrated to {n}, not {L}")
        if self.kappa > 0 and self.loss_type != "grpo":
            raise UserError(
                f"loss_type: {self.loss_type!r} cannot be combined with kappa = {self.kappa}: Eq. 10 averages the κ term "
                "as loss_type 'grpo' does; set loss_type='grpo' or kappa=0"
            )
