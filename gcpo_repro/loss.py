"""The equations of Group Causal Policy Optimization (arXiv 2508.05428), one pure function each.

Symbols, the same everywhere: groups of n candidates y_0 … y_{n-1} of one query q; N rows, whole groups one
after another; T tokens, padded; H features of a hidden state; L integrated outputs y_{n,0} … y_{n,L-1};
M rollouts per context; x_{i,l} = (q, every candidate but y_i, y_{n,l}), the l-th context of candidate i.

Only torch is needed. Everything is computed and returned in float32 or wider. Only `logps`, the policy in
training, carries a gradient: Υ, the advantages and every reference are constants, as in the paper. Every
function raises ValueError for a wrong shape, a value that is not finite (where it counts) or a setting out of
range; the message names the argument, what it holds and what to do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["gcpo_loss", "group_advantages", "k3", "projected_reference", "projected_target", "upsilon"]

# e^80 = 5.5e34: float32 can still sum and multiply it, and every clamp and clip has acted long before.
MAX_EXPONENT = 80.0


def group_advantages(rewards: Tensor, group_size: int, eps: float = 1e-4) -> Tensor:
    """Eq. 8: A_i = (r_i − mean r) / (std r + eps), mean and std over the group of answer i.

    rewards     (N,), or (…, N): the members of a group side by side; NaN marks an unscorable answer
    group_size  n, at least 2, a divisor of N
    returns     A, shaped like rewards; 0 at an unscorable answer, and in a group with fewer than 2 scorable

    Mean and std leave NaN out; the std divides by (number of scorable answers − 1).
    Default of eps, and n − 1: TRL's GRPOTrainer; the paper gives neither.
    Raises ValueError: ±inf or a reward beyond ±1e15; a group size below 2 or not dividing N; eps ≤ 0 (a
    constant group would give 0/0).
    """
    n, shape = group_size, tuple(rewards.shape)
    _require(n >= 2, f"group_size must be at least 2, got {n}: one answer has nothing to be compared with")
    fits = rewards.numel() > 0 and len(shape) > 0 and shape[-1] % n == 0
    _require(fits, f"rewards of shape {shape} don't split into groups of group_size = {n}: pass n per query")
    _require(0 < eps < math.inf, f"eps must be positive and finite, got {eps}")
    r = _widen(rewards).detach().reshape(*shape[:-1], shape[-1] // n, n)  # (…, G, n)
    bad = int((r.abs() > 1e15).sum())
    _require(bad == 0, f"rewards of shape {shape} hold {bad} values beyond ±1e15: NaN marks unscorable ones")

    scorable = ~r.isnan()
    count = scorable.sum(-1, keepdim=True)  # (…, G, 1)
    # A doesn't change when all r shift. Counted from the lowest, a constant group is 0 exactly.
    r = r - r.masked_fill(~scorable, math.inf).amin(-1, keepdim=True)
    mean = r.nansum(-1, keepdim=True) / count
    std = ((r - mean).square().nansum(-1, keepdim=True) / (count - 1)).sqrt()
    return ((r - mean) / (std + eps)).masked_fill(~scorable | (count < 2), 0.0).reshape(shape)


def projected_target(z: Tensor, Z: Tensor) -> Tensor:
    """Inside of Eq. 11: t_i = Z̄_i − Z̄'_i + z̄, the estimate of (Ψπ*)(x_i) + π*(q).

    z        (n, H)        features of the candidates; z̄ = mean_i z_i stands for π*(q) = E[y_0 | q]
    Z        (n, L, M, H)  features of the rollouts from x_{i,l}; Z̄_{i,l} is their mean over M
    returns  t (n, H)      with Z̄_i = Z̄_{i,0}, for π*(x_i), and Z̄'_i = mean_l Z̄_{i,l}, for Φπ*(x_i)

    Source: Eq. 2 and steps 1 to 4 of the algorithm. With L = 1 the first two terms cancel: t_i = z̄.
    Raises ValueError: shapes that don't agree; values that are not finite.
    """
    n, H = _sizes("z", z, "n H")
    _sizes("Z", Z, "n L M H", n=n, H=H)
    z, Z = _finite("z", _widen(z)).detach(), _finite("Z", _widen(Z)).detach()

    Z_bar = Z.mean(2)  # (n, L, H)
    return Z_bar[:, 0] - Z_bar.mean(1) + z.mean(0)  # (n, H)


def upsilon(
    z: Tensor, target: Tensor, alpha: float = 2.0, similarity: str = "cosine", mapping: str = "raw"
) -> Tensor:
    """Eq. 11: Υ_i = α · sim(z_i, t_i), the factor that makes the advantage B_i = A_i · Υ_i.

    z, target   (n, H)  features of the candidates, and their `projected_target` t
    alpha       α ≥ 0
    similarity  "cosine": cos(z, t). With the unit vectors ẑ = z/‖z‖ and t̂ = t/‖t‖,
                "euclidean": 1 − ‖ẑ − t̂‖/2, "gaussian": exp(−‖ẑ − t̂‖²/2)
    mapping     of the similarity: "raw" (the paper's), or, so that no advantage changes its sign, the extensions
                "one_plus": (1 + sim)/2, "clamp": max(sim, 0)
    returns     Υ (n,)  0 where z_i or t_i is the zero vector

    Defaults: the paper's experiments (α = 2 is the best of its grid; cosine). It names the other two
    similarities without a formula; on raw hidden states both would vanish, hence the unit vectors.
    Raises ValueError: shapes that don't agree; values that are not finite; α < 0, which would reverse every
    advantage; an unknown similarity or mapping.
    """
    n, H = _sizes("z", z, "n H")
    _sizes("target", target, "n H", n=n, H=H)
    _require(0 <= alpha < math.inf, f"alpha must be finite and at least 0, got {alpha}")
    z, t = _unit(_finite("z", _widen(z)).detach()), _unit(_finite("target", _widen(target)).detach())

    distance = (z - t).square().sum(-1).sqrt()  # (n,)
    if similarity == "cosine":
        sim = (z * t).sum(-1).clamp(-1, 1)
    elif similarity == "euclidean":
        sim = 1 - distance / 2
    elif similarity == "gaussian":
        sim = torch.exp(-distance.square() / 2)
    else:
        raise ValueError(f'similarity must be "cosine", "euclidean" or "gaussian", got {similarity!r}')
    if mapping == "one_plus":
        sim = (1 + sim) / 2
    elif mapping == "clamp":
        sim = sim.clamp(min=0)
    elif mapping != "raw":
        raise ValueError(f'mapping must be "raw", "one_plus" or "clamp", got {mapping!r}')
    return alpha * sim.masked_fill(~(z.any(-1) & t.any(-1)), 0.0)


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Eq. 7, and Eq. 12 with π'_ref for π_ref: ρ − log ρ − 1 with ρ = π_ref / π_θ, elementwise.

    logps      any shape   log π_θ(y_ij); the gradient by it is 1 − ρ
    ref_logps  that shape  log π_ref(y_ij), a constant
    returns    that shape  at least 0; its mean over tokens drawn from π_θ estimates KL(π_θ ‖ π_ref)

    Source: Eq. 7 (GRPO's estimator). In float32 it is inf where log ρ exceeds 88 nats, as TRL's is.
    Raises ValueError: shapes that don't agree; values that are not finite.
    """
    shape, ref_shape = tuple(logps.shape), tuple(ref_logps.shape)
    same = shape == ref_shape
    _require(same, f"ref_logps must have the shape of logps, {shape}, got {ref_shape}: pad or slice it")

    log_rho = _finite("ref_logps", _widen(ref_logps)).detach() - _finite("logps", _widen(logps))
    return torch.expm1(log_rho) - log_rho


def projected_reference(
    logps_x: Tensor,
    logps_q: Tensor,
    mask: Tensor,
    reduction: str = "mean",
    clamp: tuple[float, float] = (1e-3, 10.0),
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 13: π'_ref(y_ij) = π(y_ij | x_{i,0}) − mean_l π(y_ij | x_{i,l}) + π(y_ij | q), y_i,<j given.

    Computed as the ratio to π(y_ij | q): with a_l = logps_x[:, l] − logps_q,

        ρ = 1 + e^{a_0} − mean_l e^{a_l}        log π'_ref = logps_q + log clamp(ρ)

    logps_x    (n, L, T)  log π(y_ij | x_{i,l}, y_i,<j)
    logps_q    (n, T)     log π(y_ij | q, y_i,<j)
    mask       (n, T)     1 at the tokens of y_i, 0 at padding, which may hold anything
    reduction  "mean", since Φ is a conditional expectation; "sum" as Eq. 13 prints it: the probabilities then
               add up to 2 − L over the vocabulary, and nearly every token is clamped
    clamp      bounds of ρ, within [1e-15, 1e15]. The paper does not say what a probability ≤ 0 or > 1 means.
               k3's gradient, 1 − ρ, is bounded as ρ → 0 but not as ρ → ∞, so both sides are needed; the
               default touches little: on a toy model 98% of ρ lay in [0.48, 1.6], none above 2.9, 0.8% ≤ 0
    returns    log π'_ref (n, T), 0 at padding; the shares of the tokens with ρ below and above the bounds

    Always finite. With the mean and L = 1, ρ = 1.
    Raises ValueError: shapes that don't agree; values that are not finite at mask = 1; an unknown reduction;
    bounds that don't enclose ρ = 1, where the contexts change nothing.
    """
    n, L, T = _sizes("logps_x", logps_x, "n L T")
    _sizes("logps_q", logps_q, "n T", n=n, T=T)
    keep = _keep(mask, "n T", n=n, T=T)
    low, high = clamp
    _require(1e-15 <= low <= 1 <= high <= 1e15, f"clamp must be (1e-15 … 1, 1 … 1e15), got {clamp}")
    _require(reduction in ("mean", "sum"), f'reduction must be "mean" or "sum", got {reduction!r}')
    logps_q = _tokens("logps_q", logps_q, keep).detach()
    a = _tokens("logps_x", logps_x, keep[:, None]).detach() - logps_q[:, None]  # (n, L, T)

    if reduction == "mean":
        # The common factor e^{max a} is taken out of the differences, not of the 1: equal a_l then cancel
        # exactly, at any size. Capped at e^80 it leaves every difference but 0 far beyond the clamp.
        top = a.amax(1, keepdim=True)  # (n, 1, T)
        p = torch.exp(a - top + top.clamp(max=MAX_EXPONENT))  # (n, L, T)
        rho = 1 + (p[:, :1] - p).mean(1)  # (n, T)
    else:  # e^{a_0} is added once and subtracted once: nothing is left to cancel
        rho = 1 - torch.exp(a[:, 1:]).sum(1)  # (n, T); -inf is clamped too
    log_ref = (logps_q + torch.log(rho.clamp(low, high))).masked_fill(~keep, 0.0)
    tokens = keep.sum().clamp(min=1)
    return log_ref, (keep & (rho < low)).sum() / tokens, (keep & (rho > high)).sum() / tokens


def gcpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor | None,
    projected_ref_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    epsilon: float = 0.2,
    beta: float = 0.04,
    kappa: float = 0.06,
) -> Tensor:
    """Eq. 10 with its sign turned, to be minimised: the mean over the rows i of 1/T_i Σ_j of

        −min(R_ij B_i, clip(R_ij, 1 − ε, 1 + ε) B_i) + β k3(π_θ, π_ref)_ij + κ k3(π_θ, π'_ref)_ij

    logps                (N, T)  log π_θ(y_ij | q, y_i,<j), the only argument that gets a gradient
    old_logps            (N, T)  log π_old, of the policy that sampled the rows; R_ij = π_θ / π_old (Eq. 9)
    ref_logps            (N, T)  log π_ref; not needed (None) at β = 0
    projected_ref_logps  (N, T)  log π'_ref from `projected_reference`; not needed (None) at κ = 0
    advantages           (N,)    B_i = A_i · Υ_i (Eq. 11); with B = A and κ = 0 the loss is GRPO's (Eq. 6)
    mask                 (N, T)  1 at the T_i tokens of row i, 0 at padding, which may hold anything
    returns              scalar

    A row without tokens adds 0 and counts in the mean, as in TRL. Eq. 12 prints the policy under the collider
    context; this takes π_θ given q, as Eq. 10 and the prose do.
    Defaults: κ is the paper's best. It gives no ε and no β: ε from TRL and PPO, β from DeepSeekMath's GRPO.
    Raises ValueError: shapes that don't agree; values that are not finite at mask = 1; no token in any row; a
    missing reference; a negative ε, β or κ.
    """
    N, T = _sizes("logps", logps, "N T")
    _sizes("old_logps", old_logps, "N T", N=N, T=T)
    _sizes("advantages", advantages, "N", N=N)
    keep = _keep(mask, "N T", N=N, T=T)
    _require(bool(keep.any()), f"mask of shape {(N, T)} marks no token in any row: skip this batch")
    for name, value in {"epsilon": epsilon, "beta": beta, "kappa": kappa}.items():
        _require(0 <= value < math.inf, f"{name} must be finite and at least 0, got {value}")
    logps = _tokens("logps", logps, keep)
    log_R = logps - _tokens("old_logps", old_logps, keep).detach()  # (N, T)
    B = _finite("advantages", _widen(advantages)).detach()[:, None]  # (N, 1)

    # Capped far beyond the clip: an infinite R would make NaN of B = 0 and of a clipped gradient.
    R = torch.exp(log_R.clamp(max=MAX_EXPONENT))  # (N, T)
    objective = torch.minimum(R * B, R.clamp(1 - epsilon, 1 + epsilon) * B)  # (N, T)
    if beta > 0:
        objective = objective - beta * k3(logps, _reference("ref_logps", ref_logps, keep, "beta"))
    if kappa > 0:
        projected = _reference("projected_ref_logps", projected_ref_logps, keep, "kappa")
        objective = objective - kappa * k3(logps, projected)
    T_i = keep.sum(1).clamp(min=1)  # (N,)
    return -(objective.masked_fill(~keep, 0.0).sum(1) / T_i).mean()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _widen(x: Tensor) -> Tensor:
    """x in float32 or wider: half precision would round ρ − 1 and small differences of features away."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _unit(v: Tensor) -> Tensor:
    """v / ‖v‖ along the last axis; a zero vector stays zero."""
    # The largest entry goes first, for squares over- and underflow. Then ‖v‖ is 0 or at least 1.
    largest = v.abs().amax(-1, keepdim=True)
    v = v / largest.masked_fill(largest == 0, 1.0)
    return v / v.square().sum(-1, keepdim=True).sqrt().clamp(min=1)


def _sizes(name: str, x: Tensor, axes: str, **known: int) -> tuple[int, ...]:
    """The sizes of x along the named axes ("n L T"): none may be 0, and those already known must agree."""
    names, shape = axes.split(), tuple(x.shape)
    fits = len(shape) == len(names) and all(
        size == known.get(axis, size) and size > 0 for axis, size in zip(names, shape, strict=True)
    )
    wanted = ", ".join(f"{axis} = {known[axis]}" if axis in known else axis for axis in names)
    _require(fits, f"{name} must have shape ({wanted}), no axis empty, got {shape}: reshape, pad or slice it")
    return shape


def _keep(mask: Tensor, axes: str, **known: int) -> Tensor:
    """mask as bool, once its shape and values are checked."""
    shape = _sizes("mask", mask, axes, **known)
    binary = bool(((mask == 0) | (mask == 1)).all())
    _require(binary, f"mask of shape {shape} holds values other than 0 and 1: pass 1 where a token counts")
    return mask.bool()


def _finite(name: str, x: Tensor) -> Tensor:
    bad = (~x.isfinite()).nonzero()
    if len(bad):
        at = tuple(bad[0].tolist())
        what = f"{len(bad)} values that are not finite, the first at {at}: {x[at].item()}"
        raise ValueError(f"{name} of shape {tuple(x.shape)} holds {what}. Mask or mend them before the call")
    return x


def _tokens(name: str, x: Tensor, keep: Tensor) -> Tensor:
    """x, finite where it counts, 0 at padding: what stood there reaches neither value nor gradient."""
    return _finite(name, _widen(x).masked_fill(~keep, 0.0))


def _reference(name: str, x: Tensor | None, keep: Tensor, weight: str) -> Tensor:
    N, T = keep.shape
    if x is None:
        raise ValueError(f"{name} is None: pass a tensor of shape (N = {N}, T = {T}), or set {weight} = 0")
    _sizes(name, x, "N T", N=N, T=T)
    return _tokens(name, x, keep)
