"""What Υ did in a batch, in numbers: the trainer logs them under `gcpo/` (formulas and expected ranges: README, "Metrics")."""

from __future__ import annotations

from torch import Tensor


def upsilon_metrics(
    upsilons: Tensor, z: Tensor, Z: Tensor | None, rewards: Tensor, lengths: Tensor, group_size: int
) -> dict[str, float]:
    """The Υ of one batch.

    Args:
        upsilons: (N,) Υ_i. z: (N, H). Z: (N, L, M, H), None where the control needs none.
        rewards, lengths: (N,), NaN for unscorable answers.
        group_size: n; N is a multiple of it.
    """
    found = {
        "upsilon_mean": upsilons.mean().item(),
        "upsilon_std": upsilons.view(-1, group_size).std(1).mean().item(),
        "upsilon_min": upsilons.min().item(),
        "upsilon_negative": (upsilons < 0).float().mean().item(),
        "upsilon_reward_corr": within_group_correlation(upsilons, rewards, group_size),
        "upsilon_length_corr": within_group_correlation(upsilons, lengths, group_size),
    }
    if Z is None:
        return found
    residual = Z[:, 0].mean(1) - Z.mean((1, 2))  # Z̄_i − Z̄'_i, (N, H)
    groups = z.view(-1, group_size, z.size(-1))
    mean = groups.mean(1, keepdim=True)
    leave_one_out = ((group_size * mean - groups) / (group_size - 1)).reshape(z.shape)  # z̄_{−i}
    slope = ((z - leave_one_out) * residual).sum() / residual.square().sum()  # b̂, theory.md §3
    found["residual_norm"] = (residual.norm(dim=1).mean() / mean.norm(dim=2).mean()).item()
    found["slope"] = slope.item()
    return found


def within_group_correlation(a: Tensor, b: Tensor, group_size: int) -> float:
    """Pearson correlation of a and b, both (N,), after each group's mean is removed; NaN where nothing varies."""
    a, b = a.view(-1, group_size).double(), b.view(-1, group_size).double()
    kept = ~(a.isnan() | b.isnan()).any(1)
    a, b = (v[kept] - v[kept].mean(1, keepdim=True) for v in (a, b))
    return ((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()).item()
