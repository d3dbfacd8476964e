"""The collider in a language model's own outputs, measured.

Given the question q the candidates y_0 … y_{n-1} are independent samples, so whether one is right says nothing about another.
Once the integrated output y_n is seen they should compete: if y_n is right, one right candidate explains it (paper.md §1).
And the projection's slope b̂ tells whether Z̄_i − Z̄'_i predicts candidate i at all (theory.md §3), for two kinds of Φ:
"algorithm" decodes every y_{n,l} from the same group, as the paper's steps do; "theorem" puts a fresh y_i' in y_i's place.

Shapes: Q questions, G groups of n candidates each, L integrated outputs, M rollouts, H features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import norm

from .contexts import ContextBuilder
from .data import prompt_ids
from .errors import UserError
from .evaluation.sampling import respond, rewards_of
from .rewards import Reward
from .scoring import Reader, policy_forward, score

KINDS = ("algorithm", "theorem")


@dataclass(frozen=True)
class Groups:
    """What a policy wrote for Q questions, G groups each."""

    right: np.ndarray  # (Q, G, n) bool: candidate right
    y_n_right: np.ndarray  # (Q, G) bool: integrated output right
    y_n_answer: np.ndarray  # (Q, G) str: the integrated output's answer

    @property
    def question(self) -> np.ndarray:
        """(Q, G) number of the question: the stratum "given q"."""
        return np.broadcast_to(np.arange(len(self.right))[:, None], self.y_n_right.shape)

    @property
    def question_and_answer(self) -> np.ndarray:
        """(Q, G) number of the pair (question, answer of y_n): the stratum "given q and y_n's answer"."""
        _, codes = np.unique(self.y_n_answer, return_inverse=True)
        codes = codes.reshape(self.y_n_answer.shape)
        return self.question * (codes.max() + 1) + codes


def sample_groups(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], group_size: int, groups: int, reward: Reward,
    builder: ContextBuilder, answer_of: Callable[[str], str], max_new_tokens: int, seed: int, temperature: float = 1.0,
) -> Groups:  # fmt: skip
    """Let the policy answer each question `groups` times `group_size` and integrate each group once.

    Args:
        model, tokenizer: any causal language model that can integrate.
        rows: Q questions, {"prompt", …}; the other columns go to the reward function.
        group_size: n, at least 2. groups: G, at least 2.
        reward: TRL's form; 1 or more counts as right.
        builder: how the candidates are shown.
        answer_of: a response's text -> its answer, to condition on what y_n says.
        max_new_tokens, temperature, seed: of the sampling.
    """
    if group_size < 2 or groups < 2:
        raise UserError(f"group_size: {group_size} and groups: {groups} must be at least 2 to compare candidates")
    shape = (len(rows), groups, group_size)
    asked = np.repeat(np.arange(len(rows)), groups * group_size).tolist()
    q = [prompt_ids(row["prompt"], tokenizer) for row in rows]
    y = respond(model, tokenizer, [q[k] for k in asked], max_new_tokens, seed, temperature)
    values = rewards_of(reward, tokenizer, rows, asked, y)

    per_group = [y[k : k + group_size] for k in range(0, len(y), group_size)]
    integrated_of = np.repeat(np.arange(len(rows)), groups).tolist()
    shown = [builder.integration(rows[k]["prompt"], group) for k, group in zip(integrated_of, per_group, strict=True)]
    y_n = respond(model, tokenizer, shown, max_new_tokens, seed + 1, temperature)
    y_n_values = rewards_of(reward, tokenizer, rows, integrated_of, y_n)
    answers = [answer_of(text) for text in tokenizer.batch_decode(y_n, skip_special_tokens=True)]
    return Groups(
        _right(values).reshape(shape), _right(y_n_values).reshape(shape[:2]), np.array(answers).reshape(shape[:2])
    )


def _right(values: list[float | None]) -> np.ndarray:
    return np.array([value is not None and value >= 1 for value in values])


@dataclass(frozen=True)
class Dependence:
    """Correlation of two candidates' correctness within strata, and what it is under independence."""

    r: float  # pooled within-stratum correlation, averaged over the pairs of candidates
    null_sd: float  # its standard deviation under independence, by permutation
    z: float  # (r − mean under independence) / null_sd
    p_value: float  # two-sided, by permutation
    groups: int  # groups that entered

    def groups_for_power(self, power: float = 0.8, level: float = 0.05) -> float:
        """Groups that a two-sided test of this size needs to find an effect as large as the measured one."""
        wanted = norm.ppf(1 - level / 2) + norm.ppf(power)
        return float(self.groups * (wanted / self.z) ** 2)


def dependence(right: np.ndarray, strata: np.ndarray, permutations: int = 400, seed: int = 0) -> Dependence:
    """Whether the candidates of a group depend on each other once the stratum is known.

    Under independence within strata every candidate's column may be permuted within them, so the permutations give the
    null distribution exactly, whatever the questions' difficulties. Select groups (y_n right, say) before the call.

    Args:
        right: (N, n) 0 or 1, groups times candidates; strata: (N,) integers.
        permutations: at least 20. seed: of them.

    Raises:
        UserError: shapes that don't fit, too few permutations, nothing that varies within a stratum.
    """
    if right.ndim != 2 or right.shape[1] < 2 or strata.shape != right.shape[:1] or permutations < 20:
        raise UserError(
            f"right, strata: shapes {right.shape} and {strata.shape} must be (N, n ≥ 2) and (N,), and permutations "
            f"{permutations} at least 20"
        )
    order = np.argsort(strata, kind="stable")
    strata = strata[order]
    d = _centred(right[order].astype(float), strata)  # (N, n)
    norms = np.sqrt((d**2).sum(0))  # (n,)
    scale = (norms.sum() ** 2 - (norms**2).sum()) / 2  # Σ_{i<j} ‖d_i‖ ‖d_j‖
    if not scale > 0:
        raise UserError(f"right: nothing varies within a stratum in {len(right)} groups; sample more groups")
    rng = np.random.default_rng(seed)
    null = np.array([_pairs(_permuted(d, strata, rng)) for _ in range(permutations)]) / scale
    r, centre = _pairs(d) / scale, null.mean()
    beyond = int((np.abs(null - centre) >= abs(r - centre) - 1e-12).sum())
    sd = float(null.std(ddof=1))
    return Dependence(float(r), sd, float((r - centre) / sd), (1 + beyond) / (1 + permutations), len(right))


def _centred(values: np.ndarray, strata: np.ndarray) -> np.ndarray:
    _, codes, counts = np.unique(strata, return_inverse=True, return_counts=True)
    means = np.stack([np.bincount(codes, column) for column in values.T], 1) / counts[:, None]
    return values - means[codes]


def _pairs(d: np.ndarray) -> float:
    """Σ_{i<j} ⟨d_i, d_j⟩."""
    return float(((d.sum(1) ** 2).sum() - (d**2).sum()) / 2)


def _permuted(d: np.ndarray, strata: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each column shuffled within the strata, which are sorted."""
    return np.stack([column[np.lexsort((rng.random(len(column)), strata))] for column in d.T], 1)


@dataclass(frozen=True)
class Slope:
    """b̂ = Σ ⟨z_i − z̄_{−i}, Z̄_i − Z̄'_i⟩ / Σ ‖Z̄_i − Z̄'_i‖² with its bootstrap interval over questions."""

    value: float
    low: float
    high: float
    level: float
    questions: int


def projection_slope(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], builder: ContextBuilder, kind: str, group_size: int = 4,
    num_integrated: int = 4, num_rollouts: int = 4, max_new_tokens: int = 8, seed: int = 0, temperature: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Numerator and denominator of b̂ for each question, (Q,) each, on the policy's own features φ(q, y).

    Args:
        model, tokenizer, rows, builder, max_new_tokens, seed, temperature: as in `sample_groups`.
        kind: "algorithm" or "theorem" (see the module's docstring).
        group_size: n. num_integrated: L, of which the first is the observed y_n. num_rollouts: M.

    Raises:
        UserError: an unknown kind, n or L below 2, M below 1.
    """
    n, L, M = group_size, num_integrated, num_rollouts
    if kind not in KINDS:
        raise UserError(f"kind: {kind!r} is unknown, choose one of {', '.join(KINDS)}")
    if n < 2 or L < 2 or M < 1:
        raise UserError(f"group_size: {n} and num_integrated: {L} must be at least 2, num_rollouts: {M} at least 1")

    def sample(contexts: list[list[int]], draw: int) -> list[list[int]]:
        return respond(model, tokenizer, contexts, max_new_tokens, seed + draw, temperature)

    prompts, q = [row["prompt"] for row in rows], [prompt_ids(row["prompt"], tokenizer) for row in rows]
    y = _grouped(sample([ids for ids in q for _ in range(n)], 0), n)
    spare = _grouped(sample([ids for ids in q for _ in range(n)], 1), n)  # the fresh y_i'
    cells = [(k, i) for k in range(len(rows)) for i in range(n)]
    observed = sample([builder.integration(prompt, group) for prompt, group in zip(prompts, y, strict=True)], 2)
    shown = [y[k] if kind == "algorithm" else [*y[k][:i], spare[k][i], *y[k][i + 1 :]] for k, i in cells]
    others = sample(
        [builder.integration(prompts[k], group) for (k, _), group in zip(cells, shown, strict=True) for _ in range(L - 1)], 3
    )
    y_n = [[observed[k], *rest] for (k, _), rest in zip(cells, _grouped(others, L - 1), strict=True)]
    x = [builder.collider(prompts[k], y[k], i, out) for (k, i), outs in zip(cells, y_n, strict=True) for out in outs]
    rollouts = sample([context for context in x for _ in range(M)], 4)

    reader = Reader(policy_forward(model), tokenizer.pad_token_id, device=model.device)

    def phi(contexts: list[list[int]], responses: list[list[int]]) -> torch.Tensor:
        with torch.no_grad():
            return score(reader, contexts, responses).response_state

    z = phi([ids for ids in q for _ in range(n)], sum(y, [])).view(len(rows), n, -1).double().cpu()
    Z = phi([q[k] for k, _ in cells for _ in range(L * M)], rollouts).view(len(rows), n, L, M, -1).double().cpu()
    return _slope_terms(z, Z)


def _grouped(items: list[Any], size: int) -> list[list[Any]]:
    return [items[k : k + size] for k in range(0, len(items), size)]


def _slope_terms(z: torch.Tensor, Z: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """z (Q, n, H), Z (Q, n, L, M, H) -> Σ_i ⟨z_i − z̄_{−i}, Z̄_i − Z̄'_i⟩ and Σ_i ‖Z̄_i − Z̄'_i‖², (Q,) each."""
    n = z.shape[1]
    Z_bar = Z.mean(3)  # (Q, n, L, H)
    residual = Z_bar[:, :, 0] - Z_bar.mean(2)
    leave_one_out = (z.sum(1, keepdim=True) - z) / (n - 1)  # z̄_{−i}: z̄ contains z_i
    return ((z - leave_one_out) * residual).sum((1, 2)).numpy(), residual.square().sum((1, 2)).numpy()


def slope(terms: tuple[np.ndarray, np.ndarray], level: float = 0.95, draws: int = 2000, seed: int = 0) -> Slope:
    """b̂ from `projection_slope`'s terms, with a percentile bootstrap over questions. UserError if every residual is 0."""
    top, bottom = terms
    if not bottom.sum() > 0:
        raise UserError("terms: every residual is 0 (all integrated outputs alike); use more questions")
    picks = np.random.default_rng(seed).integers(len(top), size=(draws, len(top)))
    totals = bottom[picks].sum(1)
    values = top[picks].sum(1)[totals > 0] / totals[totals > 0]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Slope(float(top.sum() / bottom.sum()), float(low), float(high), level, len(top))
