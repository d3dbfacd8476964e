"""GCPO's options in the trainer: Φ of the theorem, the controls, the κ term as printed; each against its definition."""

import itertools

import pytest
import torch

from gcpo_repro import GCPOConfig, UserError
from gcpo_repro.loss import k3, projected_reference, projected_target, upsilon
from gcpo_repro.scoring import Reader, policy_forward, score, score_colliders
from tests.test_trainer import digits, loss_and_gradient, make, one_batch

N = 4


def spied(trainer):
    """The trainer, with what it samples and what it reads under contexts kept aside."""
    kept = {"sampled": [], "colliders": None}
    sample, contexts = trainer._sample, trainer._collider_contexts

    def keep_sample(asked, *limit):
        kept["sampled"].append((asked, sample(asked, *limit)))
        return kept["sampled"][-1][1]

    def keep_contexts(*arguments):
        kept["colliders"] = contexts(*arguments)
        return kept["colliders"]

    trainer._sample, trainer._collider_contexts = keep_sample, keep_contexts
    return kept


def measure(trainer, kept, batch):
    """z, Z and the log-probabilities, read again from the kept contexts by the plain forward pass."""
    reader = Reader(policy_forward(trainer.model, trainer.temperature), 0)
    q = [ids[m.bool()].tolist() for ids, m in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
    with torch.no_grad():
        under_q = score(reader, q, trainer._candidates)
        logps_x, states = score_colliders(reader, *kept["colliders"][:2], trainer._candidates, "batched")
    return under_q, logps_x, states


@pytest.fixture(scope="module")
def plain(tiny_folder, tmp_path_factory):
    """TRL's advantages on the same candidates (same seed, same candidates)."""
    return one_batch(make(tiny_folder, tmp_path_factory.mktemp("plain"), control="constant", alpha=1.0, kappa=0.0))[1]


def test_theorem_decodes_from_groups_with_a_fresh_candidate(tiny_folder, tmp_path, plain):
    trainer = make(tiny_folder, tmp_path, phi="theorem", num_integrated=3)
    kept = spied(trainer)
    rows, batch = one_batch(trainer)
    torch.testing.assert_close(batch["completion_ids"], plain["completion_ids"])
    (observed, _), (asked, fresh), (replaced, others) = kept["sampled"]
    y, builder = trainer._candidates, trainer._contexts
    assert len(observed) == 2 and len(asked) == 8 and len(replaced) == 8 * 2
    for row in range(8):
        start, i = row // N * N, row % N
        group = y[start : start + N]
        shown = [fresh[row] if j == i else group[j] for j in range(N)]
        assert replaced[2 * row] == replaced[2 * row + 1] == builder.integration(rows[row]["prompt"], shown)
        prefix, end = kept["colliders"][0][row], kept["colliders"][1][row]
        y_n = [kept["sampled"][0][1][row // N], *others[2 * row : 2 * row + 2]]
        assert [prefix + e for e in end] == [builder.collider(rows[row]["prompt"], group, i, out) for out in y_n]
    under_q, logps_x, states = measure(trainer, kept, batch)
    for start in (0, N):
        part = slice(start, start + N)
        target = projected_target(under_q.response_state[part], states[part, :, None])
        expected = upsilon(under_q.response_state[part], target)
        torch.testing.assert_close(batch["advantages"][part], plain["advantages"][part] * expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch["collider_logps"], logps_x, rtol=1e-4, atol=1e-4)


def test_the_theorems_residual_has_the_right_expectation_and_the_algorithms_has_not():
    """A discrete policy, everything enumerated. y_0, y_1 in {0, 1, 2}, y_n depends on both, f(x) = E[y_0 | x].

    Given (q, y_0, y_1): E[f − Φf] over the decoding of y_n must be what Eq. 2 says. With L outputs in the mean, the observed
    one among them, L/(L − 1) times the residual is unbiased for "theorem"; for "algorithm" it is 0, whatever y_0.
    """
    generator = torch.Generator().manual_seed(0)
    p = torch.softmax(torch.randn(3, generator=generator), 0)  # P(y | q)
    law = torch.softmax(torch.randn(3, 3, 4, generator=generator), -1)  # P(y_n | y_0, y_1)
    joint = p[:, None, None] * law  # P(y_0, y_n | q, y_1), (y_0, y_1, y_n)
    f = (torch.arange(3.0)[:, None, None] * joint).sum(0) / joint.sum(0)  # E[y_0 | y_1, y_n], (y_1, y_n)
    Phi = (joint.sum(0) * f).sum(-1)  # E[f | y_1], the theorem's Φ, (3,)
    L = 3
    for y_1 in range(3):
        theorem, algorithm, right = {}, {}, {}
        for y_0, y_n in itertools.product(range(3), range(4)):
            observed = f[y_1, y_n]
            fresh = Phi[y_1]  # E of f at y_n' decoded with a fresh y_0'
            same = (law[y_0, y_1] * f[y_1]).sum()  # E of f at y_n' decoded from the same group
            theorem[y_0, y_n] = L / (L - 1) * (observed - (observed + (L - 1) * fresh) / L)
            algorithm[y_0, y_n] = L / (L - 1) * (observed - (observed + (L - 1) * same) / L)
            right[y_0, y_n] = observed - Phi[y_1]
        weight = {key: float(joint[key[0], y_1, key[1]]) for key in right}
        of = lambda values, y_0, y_1=y_1: sum(float(values[y_0, k] * law[y_0, y_1, k]) for k in range(4))  # noqa: E731
        for y_0 in range(3):  # given the candidate as well: what the residual says about y_0
            assert of(theorem, y_0) == pytest.approx(of(right, y_0), abs=1e-6)
            assert of(algorithm, y_0) == pytest.approx(0, abs=1e-6)
        assert max(abs(of(right, y_0)) for y_0 in range(3)) > 0.01
        assert sum(weight[k] * float(theorem[k]) for k in weight) == pytest.approx(0, abs=1e-6)


def test_centroids_need_no_contexts(tiny_folder, tmp_path, plain):
    for control in ("centroid", "centroid_loo"):
        trainer = make(tiny_folder, tmp_path, control=control, kappa=0.0)
        kept = spied(trainer)
        _, batch = one_batch(trainer)
        assert kept["sampled"] == [] and kept["colliders"] is None
        z = measure_z(trainer, batch)
        for start in (0, N):
            group = z[start : start + N]
            target = group.mean(0, keepdim=True).expand_as(group) if control == "centroid" else (group.sum(0) - group) / (N - 1)
            found, A = (b["advantages"][start : start + N] for b in (batch, plain))
            torch.testing.assert_close(found, A * upsilon(group, target), rtol=1e-4, atol=1e-4)
        assert "gcpo/slope" not in trainer._metrics["train"]


def measure_z(trainer, batch):
    q = [ids[m.bool()].tolist() for ids, m in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
    with torch.no_grad():
        return score(Reader(policy_forward(trainer.model), 0), q, trainer._candidates).response_state


def test_permuted_keeps_the_values_of_each_group(tiny_folder, tmp_path, plain):
    true, permuted = make(tiny_folder, tmp_path), make(tiny_folder, tmp_path, control="permuted")
    found = {}
    for name, trainer in (("true", true), ("permuted", permuted)):
        of, found[name] = trainer._group_upsilon, []
        trainer._group_upsilon = lambda *arguments, of=of, kept=found[name]: kept.append(of(*arguments)) or kept[-1]
        _, batch = one_batch(trainer)
        torch.testing.assert_close(batch["advantages"], plain["advantages"] * torch.cat(found[name]))
    for one, other in zip(found["true"], found["permuted"], strict=True):
        torch.testing.assert_close(one.sort()[0], other.sort()[0], rtol=1e-4, atol=1e-5)
    assert (torch.cat(found["true"]) - torch.cat(found["permuted"])).abs().max() > 1e-3


def test_foreign_shows_the_next_groups_output(tiny_folder, tmp_path):
    trainer = make(tiny_folder, tmp_path, control="foreign", num_integrated=2)
    kept = spied(trainer)
    rows, _ = one_batch(trainer)
    written = kept["sampled"][0][1]  # two outputs of each of the two groups
    prefixes, ends = kept["colliders"][:2]
    for row in range(8):
        other = written[2:] if row < N else written[:2]
        group = trainer._candidates[row // N * N : row // N * N + N]
        expected = [trainer._contexts.collider(rows[row]["prompt"], group, row % N, out) for out in other]
        assert [prefixes[row] + end for end in ends[row]] == expected
    with pytest.raises(UserError, match="control: 'foreign' takes y_n of another question, but a generation batch of 4"):
        make(tiny_folder, tmp_path, control="foreign", per_device_train_batch_size=4)


def test_kl_under_the_collider_context(tiny_folder, tmp_path):
    """Eq. 12 as printed: the loss holds k3 of π_θ(y_i | x_i), and its gradient goes through the long context."""
    trainer = make(tiny_folder, tmp_path, kl_context="collider", kappa=0.7, num_integrated=2)
    kept = spied(trainer)
    _, batch = one_batch(trainer)
    contexts = [prefix + row[0] for prefix, row in zip(*kept["colliders"][:2], strict=True)]
    loss, gradient = loss_and_gradient(trainer, batch)
    added = ("collider_ids", "collider_mask", "collider_logps")
    without = {key: value for key, value in batch.items() if key not in added}
    base, base_gradient = loss_and_gradient(trainer, without)
    trainer.model.zero_grad()
    under_q, logps_x, _ = measure(trainer, kept, batch)
    log_ref = projected_reference(logps_x, under_q.logps, under_q.mask)[0]
    terms = []
    for row, (context, y) in enumerate(zip(contexts, trainer._candidates, strict=True)):
        ids = torch.tensor([context + y])
        law = trainer.model(ids).logits[0].log_softmax(-1)
        logps = torch.stack([law[len(context) + j - 1, token] for j, token in enumerate(y)])
        log_rho = log_ref[row, : len(y)] - logps
        terms.append((log_rho.exp() - log_rho - 1).mean())
    expected = 0.7 * torch.stack(terms).mean()
    expected.backward()
    grown = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    assert loss - base == pytest.approx(expected.item(), rel=1e-4)
    assert (gradient - base_gradient - grown).norm() < 1e-3 * grown.norm()
    assert grown.abs().max() > 1e-3


def test_sum_as_printed(tiny_folder, tmp_path):
    trainer = make(tiny_folder, tmp_path, eq13_reduction="sum")
    kept = spied(trainer)
    _, batch = one_batch(trainer)
    under_q, logps_x, _ = measure(trainer, kept, batch)
    log_ref, low, _ = projected_reference(logps_x, under_q.logps, under_q.mask, "sum")
    base, _ = loss_and_gradient(trainer, {key: value for key, value in batch.items() if key != "collider_logps"})
    loss, _ = loss_and_gradient(trainer, batch)
    kl = k3(under_q.logps, log_ref).masked_fill(~under_q.mask.bool(), 0.0).sum(1) / under_q.mask.sum(1)
    assert loss - base == pytest.approx(trainer.args.kappa * kl.mean().item(), rel=1e-3)
    assert trainer._metrics["train"]["gcpo/clamped_low"] == pytest.approx([low.item()])
    assert low > projected_reference(logps_x, under_q.logps, under_q.mask, "mean")[1]
    with pytest.raises(UserError, match="eq13_reduction: 'sum', as printed, runs over l < n; set num_integrated to 4, not 2"):
        make(tiny_folder, tmp_path, eq13_reduction="sum", num_integrated=2)


@pytest.mark.parametrize("options", [{"scoring": "batched"}, {"scoring": "naive"}, {"scoring_tokens": 1}, {"scoring_tokens": 64}])
def test_scoring_does_not_change_the_batch(tiny_folder, tmp_path, options):
    _, one = one_batch(make(tiny_folder, tmp_path))
    _, other = one_batch(make(tiny_folder, tmp_path, **options))
    for key in ("advantages", "collider_logps"):
        torch.testing.assert_close(other[key], one[key], rtol=1e-4, atol=1e-5)


def test_integrated_outputs_can_be_short_and_others_stay_long(tiny_folder, tmp_path):
    trainer = make(tiny_folder, tmp_path, integrated_max_tokens=2, estimator="rollout", num_rollouts=1)
    kept = spied(trainer)
    one_batch(trainer)
    (_, integrated), (_, rollouts) = kept["sampled"]
    assert max(map(len, integrated)) == 2 and max(map(len, rollouts)) > 2
    assert trainer.generation_config.max_new_tokens == 6


def test_generation_behind_a_repeated_prefix_is_the_policys(tiny_folder, tmp_path):
    """The cached path draws from the same law as the plain one: greedy decoding gives the same answers."""
    trainer = make(tiny_folder, tmp_path)
    trainer.generation_config.do_sample = False
    contexts = [[5, 6, 7]] * 3 + [[9, 10, 11, 12, 13]] + [[20, 21]] * 2
    assert trainer._generate_behind_prefixes(contexts, 6)[0] == trainer._plain_generate(contexts, 6)


def test_shuffled_order_is_seeded_and_a_permutation(tiny_folder, tmp_path):
    trainer = make(tiny_folder, tmp_path, candidate_order="shuffled")
    kept = spied(trainer)
    rows, _ = one_batch(trainer)
    orders = [trainer._order(group) for group in (0, 1)]
    assert all(sorted(order) == list(range(N)) for order in orders) and orders != [list(range(N))] * 2
    for row in range(8):
        group = trainer._candidates[row // N * N : row // N * N + N]
        others = [group[j] for j in orders[row // N] if j != row % N]
        prefix, _ = trainer._contexts.parts(rows[row]["prompt"], others, [5])
        assert kept["colliders"][0][row] == prefix


@pytest.mark.parametrize("mapping", ["one_plus", "clamp"])
def test_maps_keep_the_sign_of_advantages(mapping):
    z, target = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[-1.0, 0.0], [0.6, 0.8]])
    expected = {"one_plus": [0.0, 1.6], "clamp": [0.0, 1.2]}[mapping]  # α = 2; cosines −1 and .6
    assert upsilon(z, target, 2.0, "cosine", mapping).tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="mapping must be"):
        upsilon(z, target, mapping="square")


def test_presets(tmp_path):
    fast = GCPOConfig.fast(str(tmp_path), max_completion_length=128, num_generations=8, use_cpu=True)
    assert (fast.estimator, fast.num_integrated, fast.context_max_tokens, fast.integrated_max_tokens) == ("state", 2, 16, 16)
    paper = GCPOConfig.paper(str(tmp_path), num_generations=4, per_device_train_batch_size=4, use_cpu=True, kappa=0.02)
    assert (paper.estimator, paper.num_integrated, paper.num_rollouts, paper.kappa) == ("rollout", 4, 4, 0.02)


@pytest.mark.parametrize(
    "options",
    [{"phi": "theorem"}, {"control": "foreign"}, {"control": "centroid"}, {"kl_context": "collider"}, {"control": "permuted"}],
)
def test_options_train(tiny_folder, tmp_path, options):
    trainer = make(tiny_folder, tmp_path, reward=digits, gradient_accumulation_steps=2, num_iterations=2, **options)
    trainer.train()
    assert trainer.state.global_step == 2 and all(torch.isfinite(p).all() for p in trainer.model.parameters())
