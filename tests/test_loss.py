"""loss.py against numbers by hand, a slow loop per equation, finite differences and invariances."""

from __future__ import annotations

import ast
import itertools
import math
from decimal import Decimal, localcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.testing import assert_close

from gcpo_repro import loss as loss_module
from gcpo_repro.loss import gcpo_loss, group_advantages, k3, projected_reference, projected_target, upsilon

NAN, INF = math.nan, math.inf
SIMILARITIES = ("cosine", "euclidean", "gaussian")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(N: int = 4, T: int = 5, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """A batch whose ratios lie on both sides of the clip; rows of 5, 3, 0 and 1 tokens."""
    logps = (-1.5 + 0.4 * randn(N, T)).to(dtype)
    near = {
        name: logps + (0.4 * randn(N, T, seed=seed)).to(dtype)
        for seed, name in enumerate(("old_logps", "ref_logps", "projected_ref_logps"), 1)
    }
    mask = (torch.arange(T) < torch.tensor([5, 3, 0, 1])[:, None]).long()
    return {"logps": logps, **near, "advantages": randn(N, seed=9).to(dtype), "mask": mask}


# --- Numbers by hand ----------------------------------------------------------------------------------------


def test_group_advantages_by_hand():
    # (1, 0, 0, 1): mean 1/2, squared deviations 4 · 1/4 = 1, over n − 1 = 3: std = 1/√3.
    # (3, 1, NaN, 2): of three, mean 2, squared deviations 1 + 1 + 0 = 2, over 3 − 1: std = 1.
    A = group_advantages(torch.tensor([1, 0, 0, 1, 3, 1, NAN, 2], dtype=torch.float64), 4)
    a, b = 0.5 / (1 / math.sqrt(3) + 1e-4), 1 / 1.0001
    assert_close(A, torch.tensor([a, -a, -a, a, b, -b, 0, 0], dtype=torch.float64))


def test_projected_target_by_hand():
    # z = 1, 3: z̄ = 2.  i = 0: Z̄ = mean(1, 3), mean(4, 8) = 2, 6; Z̄' = 4; t = 2 − 4 + 2 = 0.
    #                   i = 1: Z̄ = mean(5, 5), mean(1, 3) = 5, 2; Z̄' = 3.5; t = 5 − 3.5 + 2 = 3.5.
    z = torch.tensor([[1.0], [3.0]])
    Z = torch.tensor([[[1.0, 3.0], [4.0, 8.0]], [[5.0, 5.0], [1.0, 3.0]]])
    assert_close(projected_target(z, Z[..., None]), torch.tensor([[0.0], [3.5]]))


@pytest.mark.parametrize(
    ("similarity", "expected"),
    [("cosine", 0.96), ("euclidean", 1 - math.sqrt(0.08) / 2), ("gaussian", math.exp(-0.04))],
)
def test_upsilon_by_hand(similarity: str, expected: float):
    # z = (3, 4), t = (8, 6): ẑ = (.6, .8), t̂ = (.8, .6). cos = .48 + .48 = .96; ‖ẑ − t̂‖² = .04 + .04 = .08.
    # Rows 1 and 2: a zero norm. The default α is 2.
    z = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    t = torch.tensor([[8.0, 6.0], [1.0, 0.0], [0.0, 0.0]])
    assert_close(upsilon(z, t, similarity=similarity), torch.tensor([2 * expected, 0, 0]))
    assert_close(upsilon(z, t, 1.4, similarity), torch.tensor([1.4 * expected, 0, 0]))


def test_upsilon_of_opposite_and_equal_directions():
    # t = z: cos 1, distance 0.  t = −z: cos −1, distance 2: 1 − 2/2 = 0 and exp(−4/2).
    z = torch.tensor([[0.3, -0.4], [0.3, -0.4]])
    t = z * torch.tensor([[7.0], [-0.1]])
    for similarity, opposite in zip(SIMILARITIES, (-1.0, 0.0, math.exp(-2)), strict=True):
        assert_close(upsilon(z, t, 1.0, similarity), torch.tensor([1.0, opposite]))


def test_k3_by_hand():
    # ρ = ref / policy. ρ = 2: 2 − ln 2 − 1 = 1 − ln 2.  ρ = 1/2: 1/2 + ln 2 − 1 = ln 2 − 1/2.  ρ = 1: 0.
    logps, ref = torch.tensor([0.25, 0.5, 0.3]).log(), torch.tensor([0.5, 0.25, 0.3]).log()
    assert_close(k3(logps, ref), torch.tensor([1 - math.log(2), math.log(2) - 0.5, 0.0]))


def test_projected_reference_by_hand():
    # token 0: π(q) = .4, π(x) = .5, .3: .5 − .4 + .4 = .5.
    # token 1: π(q) = .4, π(x) = .1, .9: .1 − .5 + .4 = 0, ρ = 0, clamped to ρ = 1e-3: .0004.
    # token 2: π(q) = .01, π(x) = .9, .1: .9 − .5 + .01 = .41, ρ = 41, clamped to ρ = 10: .1.
    # token 3: padding.
    logps_q = torch.tensor([[0.4, 0.4, 0.01, 1.0]]).log()
    logps_x = torch.tensor([[[0.5, 0.1, 0.9, 1.0], [0.3, 0.9, 0.1, 1.0]]]).log()
    mask = torch.tensor([[1, 1, 1, 0]])
    log_ref, low, high = projected_reference(logps_x, logps_q, mask)
    assert_close(log_ref, torch.tensor([[0.5, 0.0004, 0.1, 1.0]]).log())
    assert low.item() == high.item() == pytest.approx(1 / 3)
    # The printed sum: .5 − .8 + .4 = .1;  .1 − 1 + .4 = −.5, low;  .9 − 1 + .01 = −.09, low: .00001.
    log_ref, low, high = projected_reference(logps_x, logps_q, mask, reduction="sum")
    assert_close(log_ref, torch.tensor([[0.1, 0.0004, 0.00001, 1.0]]).log())
    assert (low.item(), high.item()) == (pytest.approx(2 / 3), 0)
    # Other bounds: ρ = 1.25 is above 1.2, ρ = 0 below .5, ρ = 41 above 1.2.
    log_ref, low, high = projected_reference(logps_x, logps_q, mask, clamp=(0.5, 1.2))
    assert_close(log_ref, torch.tensor([[0.48, 0.2, 0.012, 1.0]]).log())
    assert (low.item(), high.item()) == (pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_gcpo_loss_by_hand():
    # ε = .2. Row 0: R = 1.5 and 1, B = 1: min(1.5, 1.2) = 1.2 and 1, mean over its 2 tokens 1.1.
    # Row 1, one token: R = 1/2, B = −2: min(−1, .8 · −2) = −1.6. The mean (1.1 − 1.6)/2 = −.25, loss .25.
    # π_ref: ρ = 2 at row 0, token 0: k3 = 1 − ln 2, over 2 tokens, over 2 rows: (1 − ln 2)/4.
    # π'_ref: ρ = 1/2 at row 1: k3 = ln 2 − 1/2, over 1 token, over 2 rows: (ln 2 − 1/2)/2.
    logps = torch.tensor([[0.3, 0.4], [0.2, 0.9]], dtype=torch.float64).log()
    old = torch.tensor([[0.2, 0.4], [0.4, 0.9]], dtype=torch.float64).log()
    ref = torch.tensor([[0.6, 0.4], [0.2, 0.9]], dtype=torch.float64).log()
    projected = torch.tensor([[0.3, 0.4], [0.1, 0.1]], dtype=torch.float64).log()
    B, mask = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([[True, True], [True, False]])
    k_ref, k_projected = (1 - math.log(2)) / 4, (math.log(2) - 0.5) / 2
    args = (logps, old, ref, projected, B, mask)
    assert gcpo_loss(*args, beta=0, kappa=0).item() == pytest.approx(0.25)
    assert gcpo_loss(*args, beta=0.5, kappa=0).item() == pytest.approx(0.25 + 0.5 * k_ref)
    assert gcpo_loss(*args, beta=0, kappa=0.5).item() == pytest.approx(0.25 + 0.5 * k_projected)
    assert gcpo_loss(*args).item() == pytest.approx(0.25 + 0.04 * k_ref + 0.06 * k_projected)  # the defaults
    # ε = .6 clips neither: row 0 (1.5 + 1)/2 = 1.25, row 1 −1: loss −.125.
    assert gcpo_loss(*args, epsilon=0.6, beta=0, kappa=0).item() == pytest.approx(-0.125)


@pytest.mark.parametrize(
    ("R", "B", "value", "gradient"),
    [
        (1.5, 1.0, 1.2, 0.0),  # a good token, already likelier by half: clipped
        (0.5, 1.0, 0.5, 0.5),  # a good token, less likely: free, d(R B)/d log π = R B
        (1.5, -1.0, -1.5, -1.5),  # a bad token, likelier: free
        (0.5, -1.0, -0.8, 0.0),  # a bad token, already less likely by half: clipped
        (1.1, -1.0, -1.1, -1.1),  # inside the clip both branches agree
    ],
)
def test_clip_in_both_directions(R: float, B: float, value: float, gradient: float):
    logps = torch.tensor([[math.log(0.4 * R)]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[math.log(0.4)]], dtype=torch.float64)
    out = gcpo_loss(logps, old, None, None, torch.tensor([B]), torch.ones(1, 1), beta=0, kappa=0)
    assert out.item() == pytest.approx(-value)
    assert torch.autograd.grad(out, logps)[0].item() == pytest.approx(-gradient)


# --- A slow loop for every equation -------------------------------------------------------------------------


def slow_advantages(rewards: list[float], n: int, eps: float) -> list[float]:
    out = []
    for i, r in enumerate(rewards):
        group = [x for x in rewards[i // n * n : i // n * n + n] if not math.isnan(x)]
        if math.isnan(r) or len(group) < 2:
            out.append(0.0)
            continue
        mean = math.fsum(group) / len(group)
        std = math.sqrt(math.fsum((x - mean) ** 2 for x in group) / (len(group) - 1))
        out.append((r - mean) / (std + eps))
    return out


def slow_target(z: list, Z: list) -> list[list[float]]:
    n, L, M, H = len(z), len(Z[0]), len(Z[0][0]), len(z[0])
    return [
        [
            sum(Z[i][0][m][h] for m in range(M)) / M
            - sum(Z[i][k][m][h] for k in range(L) for m in range(M)) / (L * M)
            + sum(z[j][h] for j in range(n)) / n
            for h in range(H)
        ]
        for i in range(n)
    ]


def slow_upsilon(z: list, target: list, alpha: float, similarity: str) -> list[float]:
    out = []
    for v, t in zip(z, target, strict=True):
        v_norm, t_norm = math.hypot(*v), math.hypot(*t)
        cos = math.fsum(a * b for a, b in zip(v, t, strict=True)) / (v_norm * t_norm)
        distance = math.dist([a / v_norm for a in v], [b / t_norm for b in t])
        sims = {"cosine": cos, "euclidean": 1 - distance / 2, "gaussian": math.exp(-(distance**2) / 2)}
        out.append(alpha * sims[similarity])
    return out


def slow_k3(logp: float, ref: float) -> float:
    return math.exp(ref - logp) - (ref - logp) - 1


def slow_reference(x: list[float], q: float, reduction: str, clamp: tuple[float, float]) -> tuple[float, int]:
    """Eq. 13 as printed, on probabilities with 150 digits; and −1, 0, 1 for clamped low, not at all, high."""
    with localcontext() as context:
        context.prec = 150
        p = [Decimal(v).exp() for v in x]
        value = p[0] - sum(p) / (len(p) if reduction == "mean" else 1) + Decimal(q).exp()
        rho = value / Decimal(q).exp()
        low, high = map(Decimal, clamp)
        side = -1 if rho < low else 1 if rho > high else 0
        return float(Decimal(q) + min(max(rho, low), high).ln()), side


def slow_loss(b: dict[str, Tensor], epsilon: float, beta: float, kappa: float) -> float:
    v = {name: x.tolist() for name, x in b.items()}
    rows = []
    for i, B in enumerate(v["advantages"]):
        tokens = [j for j, m in enumerate(v["mask"][i]) if m]
        total = 0.0
        for j in tokens:
            logp, R = v["logps"][i][j], math.exp(v["logps"][i][j] - v["old_logps"][i][j])
            total += min(R * B, min(max(R, 1 - epsilon), 1 + epsilon) * B)
            total -= beta * slow_k3(logp, v["ref_logps"][i][j])
            total -= kappa * slow_k3(logp, v["projected_ref_logps"][i][j])
        rows.append(total / len(tokens) if tokens else 0.0)
    return -sum(rows) / len(rows)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_group_advantages_against_loop(n: int):
    rewards = randn(24)
    rewards[[0, 1, 5, 9, 10, 11, 12]] = NAN
    for eps in (1e-4, 0.3):
        expected = torch.tensor(slow_advantages(rewards.tolist(), n, eps), dtype=torch.float64)
        assert_close(group_advantages(rewards, n, eps), expected)
        assert_close(group_advantages(rewards.reshape(-1, n), n, eps), expected.reshape(-1, n))


@pytest.mark.parametrize(("n", "L", "M", "H"), [(4, 3, 2, 5), (2, 2, 1, 1), (3, 1, 4, 2)])
def test_target_and_upsilon_against_loop(n: int, L: int, M: int, H: int):
    z, Z = randn(n, H), randn(n, L, M, H, seed=1)
    target = projected_target(z, Z)
    assert_close(target, torch.tensor(slow_target(z.tolist(), Z.tolist()), dtype=torch.float64))
    for similarity in SIMILARITIES:
        expected = slow_upsilon(z.tolist(), target.tolist(), 1.7, similarity)
        assert_close(upsilon(z, target, 1.7, similarity), torch.tensor(expected, dtype=torch.float64))


def test_k3_against_loop():
    logps, ref = randn(50), randn(50, seed=1)
    expected = [slow_k3(p, r) for p, r in zip(logps.tolist(), ref.tolist(), strict=True)]
    assert_close(k3(logps, ref), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projected_reference_against_loop(reduction: str, dtype: torch.dtype):
    """Random log-probabilities, and every combination of very small, equal and very large ratios."""
    sizes = (-120.0, -20.0, -1.0, 0.0, 0.5, 20.0, 79.0, 81.0, 100.0, 120.0)
    extreme = torch.tensor(list(itertools.product(sizes, repeat=3)))  # a_0, a_1, a_2
    a = torch.cat([extreme, 0.8 * randn(300, 3)]).to(dtype)
    q = torch.full((len(a), 1), -120.0, dtype=dtype)
    q[-300:] = -1.0
    x, q = (a + q).to(dtype)[..., None], q
    clamp = (1e-3, 10.0)
    log_ref, low, high = projected_reference(x, q, torch.ones(len(a), 1), reduction, clamp)
    pairs = zip(x[..., 0].tolist(), q[:, 0].tolist(), strict=True)
    expected, sides = zip(*(slow_reference(xs, qs, reduction, clamp) for xs, qs in pairs), strict=True)
    expected = torch.tensor(expected, dtype=dtype)
    assert log_ref.isfinite().all()
    tolerance = 2e-5 if dtype == torch.float32 else 1e-9
    assert_close(log_ref[:, 0], expected, rtol=0, atol=tolerance)
    assert low.item() == pytest.approx(sides.count(-1) / len(a))
    assert high.item() == pytest.approx(sides.count(1) / len(a))
    assert (reduction == "sum" or high > 0) and low > 0


@pytest.mark.parametrize(
    ("epsilon", "beta", "kappa"), [(0.2, 0.04, 0.06), (0.1, 0, 0.7), (0.4, 0.5, 0), (0, 1, 1)]
)
def test_gcpo_loss_against_loop(epsilon: float, beta: float, kappa: float):
    b = batch()
    out = gcpo_loss(**b, epsilon=epsilon, beta=beta, kappa=kappa)
    assert out.shape == () and out.item() == pytest.approx(slow_loss(b, epsilon, beta, kappa))


# --- Gradients ----------------------------------------------------------------------------------------------


def test_k3_gradient():
    logps, ref = randn(6).requires_grad_(), randn(6, seed=1)
    assert torch.autograd.gradcheck(lambda p: k3(p, ref), logps)
    (gradient,) = torch.autograd.grad(k3(logps, ref).sum(), logps)
    assert_close(gradient, 1 - (ref - logps.detach()).exp())  # 1 − ρ


def test_gcpo_loss_gradient():
    b = batch()
    logps = b.pop("logps").requires_grad_()
    assert torch.autograd.gradcheck(lambda p: gcpo_loss(p, **b, beta=0.3, kappa=0.7), logps)
    (gradient,) = torch.autograd.grad(gcpo_loss(logps, **b), logps)
    assert (gradient[b["mask"] == 0] == 0).all() and (gradient[b["mask"] == 1] != 0).any()


def test_only_the_policy_gets_a_gradient():
    b = {name: x.requires_grad_() if x.is_floating_point() else x for name, x in batch().items()}
    gcpo_loss(**b).backward()
    assert [name for name, x in b.items() if x.grad is not None] == ["logps"]
    z, Z, p = (randn(*shape).requires_grad_() for shape in ((3, 4), (3, 2, 2, 4), (3, 2, 4)))
    outputs = [projected_target(z, Z), upsilon(z, z), group_advantages(z[:, 0], 3)]
    outputs += projected_reference(p, z, torch.ones(3, 4))
    assert not any(out.requires_grad for out in outputs)


# --- Reductions and invariances -----------------------------------------------------------------------------


def test_without_upsilon_and_kappa_it_is_grpo():
    """GRPO (Eq. 6) once more, on probabilities, as DeepSeekMath writes it; loss and gradient."""
    b, rewards = batch(), torch.tensor([1.0, 0.0, 0.25, 0.5], dtype=torch.float64)
    lengths, epsilon, beta = [5, 3, 2, 1], 0.2, 0.04
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    pi = b["logps"].exp().requires_grad_()
    old, ref = b["old_logps"].exp(), b["ref_logps"].exp()
    A = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    total = torch.zeros((), dtype=torch.float64)
    for i, T_i in enumerate(lengths):
        for j in range(T_i):
            R = pi[i, j] / old[i, j]
            clipped = 1 - epsilon if R < 1 - epsilon else 1 + epsilon if R > 1 + epsilon else R
            kl = ref[i, j] / pi[i, j] - torch.log(ref[i, j] / pi[i, j]) - 1
            surrogate = R * A[i] if R * A[i] < clipped * A[i] else clipped * A[i]
            total = total + (surrogate - beta * kl) / T_i / len(lengths)

    z = randn(4, 3)
    B = group_advantages(rewards, 4) * upsilon(z, 3 * z, alpha=1.0)
    out = gcpo_loss(pi.log(), b["old_logps"], b["ref_logps"], None, B, mask, epsilon, beta, kappa=0)
    assert_close(out, -total)
    assert_close(torch.autograd.grad(out, pi)[0], torch.autograd.grad(-total, pi)[0])


def test_projection_vanishes_where_contexts_agree():
    z, Z = randn(3, 4), randn(3, 1, 2, 4, seed=1).expand(3, 5, 2, 4)
    assert_close(projected_target(z, Z), z.mean(0).expand(3, 4))
    q = -randn(3, 6).abs()
    for L in (1, 3, 7):
        log_ref, low, high = projected_reference(
            (q + randn(3, 6, seed=1))[:, None].expand(3, L, 6), q, torch.ones(3, 6)
        )
        assert torch.equal(log_ref, q) and low == high == 0  # ρ is exactly 1


@pytest.mark.parametrize("rubbish", [0.0, 7.0, 1e30, NAN, INF, -INF])
def test_padding_changes_nothing(rubbish: float):
    b = batch()
    wide = {name: pad(x, (0, 3)) if x.ndim == 2 else x for name, x in b.items()}
    for name in ("logps", "old_logps", "ref_logps", "projected_ref_logps"):
        wide[name] = wide[name].masked_fill(wide["mask"] == 0, rubbish)
    results = []
    for c in (b, wide):
        logps = c["logps"].clone().requires_grad_()
        out = gcpo_loss(**{**c, "logps": logps}, beta=0.3, kappa=0.7)
        results.append((out.detach(), torch.autograd.grad(out, logps)[0]))
    assert_close(results[0][0], results[1][0])
    assert_close(results[0][1], results[1][1][:, :5])
    assert (results[1][1][:, 5:] == 0).all()

    x = b["logps"][:, None] + randn(4, 3, 5, seed=5)
    wide_x = pad(x, (0, 3)).masked_fill(wide["mask"][:, None] == 0, rubbish)
    narrow = projected_reference(x, b["logps"], b["mask"])
    padded = projected_reference(wide_x, wide["logps"], wide["mask"])
    assert_close(padded[0][:, :5], narrow[0])
    assert (padded[0][wide["mask"] == 0] == 0).all()
    assert padded[1:] == narrow[1:] and narrow[1] > 0


def test_order_of_the_group_does_not_matter():
    order = torch.tensor([2, 0, 3, 1])
    rewards, z, Z = torch.tensor([1.0, NAN, 0.0, 0.5]), randn(4, 6), randn(4, 3, 2, 6, seed=1)
    assert_close(group_advantages(rewards[order], 4), group_advantages(rewards, 4)[order])
    target = projected_target(z, Z)
    assert_close(projected_target(z[order], Z[order]), target[order])
    assert_close(projected_target(z, Z[:, [0, 2, 1]].flip(2)), target)  # only y_{n,0} is special
    assert not torch.allclose(projected_target(z, Z[:, [1, 0, 2]]), target)
    for similarity in SIMILARITIES:
        permuted = upsilon(z[order], target[order], similarity=similarity)
        assert_close(permuted, upsilon(z, target, similarity=similarity)[order])

    b = batch()
    assert_close(gcpo_loss(**{name: x[order] for name, x in b.items()}), gcpo_loss(**b))
    x, q, mask = randn(4, 3, 5), b["logps"], b["mask"]
    log_ref, low, high = projected_reference(x, q, mask)
    permuted = projected_reference(x[order][:, [0, 2, 1]], q[order], mask[order])
    assert_close(permuted, (log_ref[order], low, high))


def test_groups_do_not_mix():
    r = randn(4)
    assert_close(group_advantages(torch.cat([r, 100 + 5 * r]), 4)[:4], group_advantages(r, 4))


# --- Extreme inputs, dtypes, devices ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_dtype_is_computed_in_float32_at_least(dtype: torch.dtype):
    wide = torch.promote_types(dtype, torch.float32)
    b = batch(dtype=dtype)
    rewards, z, Z = randn(8).to(dtype), randn(4, 3).to(dtype), randn(4, 2, 2, 3).to(dtype)
    x = randn(4, 2, 5).to(dtype)

    def everything(as_dtype: torch.dtype) -> list[Tensor]:
        c = {name: v.to(as_dtype) if v.is_floating_point() else v for name, v in b.items()}
        target = projected_target(z.to(as_dtype), Z.to(as_dtype))
        out = [group_advantages(rewards.to(as_dtype), 4), target, upsilon(z.to(as_dtype), target)]
        out += [k3(c["logps"], c["ref_logps"]), gcpo_loss(**c)]
        return [*out, *projected_reference(x.to(as_dtype), c["logps"], c["mask"])]

    given, upcast = everything(dtype), everything(wide)
    assert all(torch.equal(a, b) for a, b in zip(given, upcast, strict=True))
    assert all(a.dtype == wide for a in given[:6])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_same_on_a_gpu():
    b = batch(dtype=torch.float32)
    z, Z, x = (randn(*shape).float() for shape in ((4, 3), (4, 2, 2, 3), (4, 2, 5)))
    rewards = torch.tensor([1.0, NAN, 0.0, 0.5])
    results = []
    for device in ("cpu", "cuda"):
        c, zd, Zd = {name: v.to(device) for name, v in b.items()}, z.to(device), Z.to(device)
        target = projected_target(zd, Zd)
        out = [group_advantages(rewards.to(device), 4), target, gcpo_loss(**c)]
        out += [upsilon(zd, target, similarity=similarity) for similarity in SIMILARITIES]
        out += projected_reference(x.to(device), c["logps"], c["mask"])
        assert all(v.device.type == device for v in out)
        results.append([v.cpu() for v in out])
    assert_close(*results)


def test_constant_groups_and_lone_answers_have_no_advantage():
    rewards = torch.tensor([0.1] * 3 + [NAN, NAN, 5.0] + [NAN] * 3 + [NAN, 2.0, 2.0])
    assert torch.equal(group_advantages(rewards, 3), torch.zeros(12))
    assert torch.equal(group_advantages(torch.full((7,), 0.1), 7), torch.zeros(7))


def test_advantages_survive_an_offset():
    r = torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert_close(group_advantages(r + 2**20, 4), group_advantages(r, 4))


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1.0, 1e10, 1e30])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_upsilon_ignores_lengths(size: float, similarity: str):
    z, t = randn(5, 8).float(), randn(5, 8, seed=1).float()
    assert_close(upsilon(z * size, t, similarity=similarity), upsilon(z, t, similarity=similarity))
    assert_close(upsilon(z, t * size, similarity=similarity), upsilon(z, t, similarity=similarity))


def test_projected_reference_of_the_smallest_probabilities():
    # Every π = e^-120, which float32 cannot hold: π − mean π + π = π.
    x, q, ones = torch.full((1, 2, 3), -120.0), torch.full((1, 3), -120.0), torch.ones(1, 3)
    assert torch.equal(projected_reference(x, q, ones)[0], q)
    # Both a_l = 100 (and 1e30): they cancel, ρ = 1, nothing is clamped.
    for a in (100.0, 1e30):
        log_ref, low, high = projected_reference(torch.zeros(1, 2, 3), torch.full((1, 3), -a), ones)
        assert torch.equal(log_ref, torch.full((1, 3), -a)) and low == high == 0
    # a = (1e30, 0): ρ = 1 + (e^1e30 − 1)/2, high; a = (0, 1e30): low.
    for x0, x1, share_low in ((0.0, -1e30, 0), (-1e30, 0.0, 1)):
        x = torch.tensor([x0, x1])[None, :, None]
        log_ref, low, high = projected_reference(x, torch.full((1, 1), -1e30), torch.ones(1, 1))
        assert log_ref.isfinite().all() and (low, high) == (share_low, 1 - share_low)


def test_projected_reference_without_tokens():
    log_ref, low, high = projected_reference(torch.zeros(2, 2, 3), torch.zeros(2, 3), torch.zeros(2, 3))
    assert torch.equal(log_ref, torch.zeros(2, 3)) and low == high == 0


def test_an_infinite_ratio_poisons_nothing():
    # Row 0: R = e^119 overflows float32, B = 1: the clip holds, value 1.2, gradient 0. Row 1: B = 0, value 0.
    logps = torch.tensor([[-1.0], [-1.0], [-1.0]], requires_grad=True)
    old = torch.tensor([[-120.0], [-120.0], [-1.0]])
    out = gcpo_loss(logps, old, None, None, torch.tensor([1.0, 0.0, 1.0]), torch.ones(3, 1), beta=0, kappa=0)
    assert out.item() == pytest.approx(-(1.2 + 0 + 1) / 3)
    assert_close(torch.autograd.grad(out, logps)[0], torch.tensor([[0.0], [0.0], [-1 / 3]]))


def test_k3_is_never_negative_and_precise_near_zero():
    d = torch.logspace(-8, 0, 200)
    for sign in (1, -1):
        assert (k3(torch.zeros(200), sign * d) >= 0).all()
    # ρ − log ρ − 1 = d²/2 + d³/6 + …; exp(d) − d − 1 in float32 would give 0 or 1.2e-7 here.
    assert k3(torch.zeros(1), torch.tensor([1e-3])).item() == pytest.approx(5.0017e-7, rel=2e-3)


def test_rows_without_tokens_count_in_the_mean():
    b = batch()
    rows = [0, 1, 3]
    assert_close(gcpo_loss(**b) * 4, gcpo_loss(**{name: x[rows] for name, x in b.items()}) * 3)


# --- Errors -------------------------------------------------------------------------------------------------

Z22, ONES = torch.zeros(2, 2), torch.ones(2, 2)
BAD = torch.tensor([[0.0, NAN], [0.0, 0.0]])
X222 = torch.zeros(2, 2, 2)


def lose(**changes):
    good = {name: Z22 for name in ("logps", "old_logps", "ref_logps", "projected_ref_logps")}
    return gcpo_loss(**{**good, "advantages": torch.zeros(2), "mask": ONES, **changes})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_advantages(torch.zeros(4), 1), r"group_size must be at least 2, got 1"),
        (lambda: group_advantages(torch.zeros(4), 0), r"group_size must be at least 2, got 0"),
        (lambda: group_advantages(torch.zeros(4), 3), r"rewards of shape \(4,\) .* group_size = 3"),
        (lambda: group_advantages(torch.zeros(4, 2), 4), r"rewards of shape \(4, 2\) .* group_size = 4"),
        (lambda: group_advantages(torch.zeros(0), 2), r"rewards of shape \(0,\)"),
        (lambda: group_advantages(torch.tensor(1.0), 2), r"rewards of shape \(\)"),
        (lambda: group_advantages(torch.tensor([1.0, INF]), 2), r"rewards of shape \(2,\) hold 1 .* NaN"),
        (lambda: group_advantages(torch.tensor([1.0, -INF], dtype=torch.float16), 2), r"rewards .* hold 1 "),
        (lambda: group_advantages(torch.tensor([1.0, 1e16]), 2), r"rewards .* hold 1 values beyond"),
        (lambda: group_advantages(torch.zeros(4), 2, eps=0), r"eps must be positive and finite, got 0"),
        (lambda: group_advantages(torch.zeros(4), 2, eps=NAN), r"eps must be .* got nan"),
        (lambda: projected_target(torch.zeros(3), X222[None]), r"z must have shape \(n, H\), .* got \(3,\)"),
        (lambda: projected_target(Z22, X222), r"Z must .* \(n = 2, L, M, H = 2\), .* \(2, 2, 2\)"),
        (lambda: projected_target(Z22, torch.zeros(3, 2, 2, 2)), r"Z must .* got \(3, 2, 2, 2\)"),
        (lambda: projected_target(Z22, torch.zeros(2, 2, 2, 3)), r"Z must .* got \(2, 2, 2, 3\)"),
        (lambda: projected_target(Z22, torch.zeros(2, 0, 2, 2)), r"Z must .* got \(2, 0, 2, 2\)"),
        (lambda: projected_target(BAD, torch.zeros(2, 1, 1, 2)), r"z of shape \(2, 2\) .* \(0, 1\): nan"),
        (lambda: projected_target(Z22, BAD.reshape(2, 1, 1, 2)), r"Z of shape \(2, 1, 1, 2\) holds 1 values"),
        (lambda: upsilon(X222, Z22), r"z must have shape \(n, H\), .* got \(2, 2, 2\)"),
        (lambda: upsilon(Z22, Z22[:1]), r"target must have shape \(n = 2, H = 2\), .* got \(1, 2\)"),
        (lambda: upsilon(BAD, Z22), r"z of shape \(2, 2\) .* nan"),
        (lambda: upsilon(Z22, BAD), r"target of shape \(2, 2\) .* nan"),
        (lambda: upsilon(Z22, Z22, alpha=-1.0), r"alpha must be finite and at least 0, got -1.0"),
        (lambda: upsilon(Z22, Z22, alpha=INF), r"alpha must .* got inf"),
        (lambda: upsilon(Z22, Z22, similarity="dot"), r'similarity must be "cosine", .* got \'dot\''),
        (lambda: k3(Z22, Z22[0]), r"ref_logps must .* \(2, 2\), got \(2,\)"),
        (lambda: k3(BAD, Z22), r"logps of shape \(2, 2\)"),
        (lambda: k3(Z22, -BAD), r"ref_logps of shape \(2, 2\)"),
        (lambda: projected_reference(Z22, Z22, ONES), r"logps_x must .* \(n, L, T\), .* got \(2, 2\)"),
        (lambda: projected_reference(X222, Z22[:, :1], ONES), r"logps_q must .* T = 2.* got \(2, 1\)"),
        (lambda: projected_reference(X222, Z22, ONES[:1]), r"mask must .*\(n = 2, .* got \(1, 2\)"),
        (lambda: projected_reference(X222, Z22, ONES / 2), r"mask of shape \(2, 2\) holds values other than"),
        (lambda: projected_reference(X222 / 0, Z22, ONES), r"logps_x of shape \(2, 2, 2\) holds 8 values"),
        (lambda: projected_reference(X222, BAD, ONES), r"logps_q of shape \(2, 2\) .* \(0, 1\): nan"),
        (lambda: projected_reference(X222, Z22, ONES, "max"), r"reduction must be .* got \'max\'"),
        (lambda: projected_reference(X222, Z22, ONES, clamp=(0.0, 10.0)), r"clamp must .* got \(0.0, 10.0\)"),
        (lambda: projected_reference(X222, Z22, ONES, clamp=(2.0, 10.0)), r"clamp must .* got \(2.0, 10.0\)"),
        (lambda: projected_reference(X222, Z22, ONES, clamp=(0.1, 0.5)), r"clamp must .* got \(0.1, 0.5\)"),
        (lambda: projected_reference(X222, Z22, ONES, clamp=(0.1, INF)), r"clamp must .* got \(0.1, inf\)"),
        (lambda: lose(logps=Z22[0]), r"logps must have shape \(N, T\), .* got \(2,\)"),
        (lambda: lose(old_logps=Z22[:, :1]), r"old_logps must .* got \(2, 1\)"),
        (lambda: lose(ref_logps=Z22[:, :1]), r"ref_logps must .* got \(2, 1\)"),
        (lambda: lose(projected_ref_logps=X222), r"projected_ref_logps must .* got \(2, 2, 2\)"),
        (lambda: lose(advantages=torch.zeros(2, 1)), r"advantages must .* \(N = 2\), .* got \(2, 1\)"),
        (lambda: lose(mask=torch.ones(2, 3)), r"mask must .* got \(2, 3\)"),
        (lambda: lose(mask=ONES * 2), r"mask of shape \(2, 2\) holds values other than 0 and 1"),
        (lambda: lose(mask=Z22), r"mask of shape \(2, 2\) marks no token"),
        (lambda: lose(logps=BAD), r"^logps of shape \(2, 2\) .* \(0, 1\): nan"),
        (lambda: lose(old_logps=BAD), r"old_logps of shape \(2, 2\)"),
        (lambda: lose(ref_logps=BAD), r"^ref_logps of shape \(2, 2\)"),
        (lambda: lose(projected_ref_logps=BAD), r"projected_ref_logps of shape \(2, 2\)"),
        (lambda: lose(advantages=torch.tensor([0.0, -INF])), r"advantages of shape \(2,\) .* \(1,\): -inf"),
        (lambda: lose(ref_logps=None), r"^ref_logps is None: .* beta = 0"),
        (lambda: lose(projected_ref_logps=None), r"projected_ref_logps is None: .* kappa = 0"),
        (lambda: lose(epsilon=-0.1), r"epsilon must be finite and at least 0, got -0.1"),
        (lambda: lose(beta=NAN), r"beta must .* got nan"),
        (lambda: lose(kappa=-1), r"kappa must .* got -1"),
    ],
)
def test_bad_input_is_told_by_name(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


def test_references_are_needed_only_with_their_weight():
    assert lose(ref_logps=None, beta=0) == lose(projected_ref_logps=None, kappa=0) == 0


def test_the_module_imports_torch_and_nothing_of_ours():
    tree = ast.parse(Path(loss_module.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert names == {"__future__", "math", "torch"}
