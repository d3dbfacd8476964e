"""The collider in a policy's outputs: statistics against a slow version and known cases, sampling against the toy policy."""

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gcpo_repro import UserError, collider, toy
from gcpo_repro.contexts import ContextBuilder
from gcpo_repro.projection import calibration_slope, leave_one_out_mean
from gcpo_repro.scm import ReasoningSCM


def draws(questions, groups, n, seed=0):
    """Right answers of a vote whose law is known: (Q, G, n) and y_n (Q, G), p depending on the question."""
    scm, rng = ReasoningSCM(n), np.random.default_rng(seed)
    q = np.repeat(rng.normal(size=questions), groups)[:, None]
    y = scm.draw_candidates(q, n, rng)
    y_n = scm.integrate(q, y, rng)
    return y[:, :, 0].reshape(questions, groups, n), y_n.reshape(questions, groups)


def slow_r(right, strata):
    """Pooled within-stratum correlation, averaged over pairs with their norms as weights, in loops."""
    columns = []
    for i in range(right.shape[1]):
        column = [
            right[k, i] - np.mean([right[m, i] for m in range(len(right)) if strata[m] == strata[k]]) for k in range(len(right))
        ]
        columns.append(np.array(column))
    pairs = list(itertools.combinations(columns, 2))
    return sum(a @ b for a, b in pairs) / sum(np.linalg.norm(a) * np.linalg.norm(b) for a, b in pairs)


@pytest.mark.parametrize("n", [2, 4])
def test_r_against_loops(n):
    right, _ = draws(3, 20, n)
    strata = np.repeat([7, 1, 4], 20)
    found = collider.dependence(right.reshape(-1, n), strata, 20)
    assert found.r == pytest.approx(slow_r(right.reshape(-1, n), strata), abs=1e-12) and found.groups == 60


def test_fork_and_collider_of_a_known_vote():
    right, y_n = draws(20, 300, 2)
    q = np.repeat(np.arange(20), 300)
    kept = y_n.ravel() == 1
    given_q = collider.dependence(right.reshape(-1, 2), q, 200)
    given_y_n = collider.dependence(right.reshape(-1, 2)[kept], q[kept], 200)
    assert abs(given_q.z) < 4 and given_q.p_value > 0.001
    assert given_y_n.z < -10 and given_y_n.p_value == pytest.approx(1 / 201)
    ignoring_q = np.corrcoef(right.reshape(-1, 2).T)[0, 1]  # difficulty makes candidates alike: that is the fork, not blocked
    assert ignoring_q > 0.05


def test_null_is_calibrated():
    """Under independence z is standard normal, and the p-values are uniform."""
    found = [
        collider.dependence(draws(5, 40, 2, seed)[0].reshape(-1, 2), np.repeat(np.arange(5), 40), 99, seed) for seed in range(200)
    ]
    z = np.array([f.z for f in found])
    assert abs(z.mean()) < 0.3 and 0.8 < z.std() < 1.2
    assert 0.01 < np.mean([f.p_value < 0.05 for f in found]) < 0.11


def test_power_by_hand():
    # 80% power at 5% needs |z| = 1.960 + 0.842 = 2.802; z grows as the root of the groups
    found = collider.Dependence(-0.1, 0.02, -5.604, 0.01, 1000)
    assert found.groups_for_power() == pytest.approx(250, rel=1e-3)


@pytest.mark.parametrize(
    "right, strata, permutations",
    [
        (np.zeros((4, 2)), np.zeros(4, int), 100), (np.ones((4, 1)), np.zeros(4, int), 100),
        (np.ones((4, 2)), np.zeros(3, int), 100),
        (np.eye(4)[:, :2], np.zeros(4, int), 5), (np.eye(2), np.arange(2), 100),
    ],
)  # fmt: skip
def test_dependence_that_cannot_be_measured(right, strata, permutations):
    with pytest.raises(UserError, match="right"):
        collider.dependence(right, strata, permutations)


def test_slope_terms_are_those_of_the_calibration_slope():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(6, 3, 5, generator=generator).double()
    Z = torch.randn(6, 3, 4, 2, 5, generator=generator).double()
    found = collider.slope(collider._slope_terms(z, Z))
    groups, flat = np.repeat(np.arange(6), 3), z.reshape(18, 5).numpy()
    f, Phi = Z.mean(3)[:, :, 0].reshape(18, 5).numpy(), Z.mean((2, 3)).reshape(18, 5).numpy()
    expected = calibration_slope(flat, f, Phi, leave_one_out_mean(flat, groups), groups)
    assert found.value == pytest.approx(expected.value) and found.low < found.value < found.high and found.questions == 6


def test_slope_interval_covers():
    """The bootstrap over questions covers the known ratio about as often as it says."""
    rng, hits = np.random.default_rng(0), 0
    for k in range(200):
        bottom = rng.exponential(size=60)
        found = collider.slope((0.3 * bottom + rng.normal(size=60), bottom), draws=300, seed=k)
        hits += found.low <= 0.3 <= found.high
    assert 0.87 <= hits / 200 <= 0.99
    with pytest.raises(UserError, match="every residual is 0"):
        collider.slope((np.zeros(3), np.zeros(3)))


@pytest.fixture(scope="module")
def policy():
    tokenizer = AutoTokenizer.from_pretrained(toy.POLICY, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(toy.POLICY)
    return model, tokenizer, ContextBuilder(tokenizer, **toy.TEMPLATE, strip=[0, 1])


def test_groups_of_the_toy_policy(policy):
    rows = toy.questions("held_out", 4, 0)
    found = collider.sample_groups(
        policy[0], policy[1], rows, 4, 40, toy.exact_reward, policy[2], lambda text: text[-1:], 8, seed=0
    )
    assert found.right.shape == (4, 40, 4) and found.y_n_right.shape == found.y_n_answer.shape == (4, 40)
    assert 0.3 < found.right.mean() < 0.75 < found.y_n_right.mean() + 0.2  # integration helps
    for k, row in enumerate(rows):  # right where the answer is right: y_n's answer is its last digit
        assert ((found.y_n_answer[k] == row["answer"]) == found.y_n_right[k]).all()
    strata = found.question_and_answer
    for k in range(4):
        same = strata[k][:, None] == strata[k][None]
        assert (same == (found.y_n_answer[k][:, None] == found.y_n_answer[k][None])).all()
    assert not set(strata[0]) & set(strata[1])
    with pytest.raises(UserError, match="group_size: 1"):
        collider.sample_groups(policy[0], policy[1], rows, 1, 40, toy.exact_reward, policy[2], str, 8, seed=0)


def test_slope_of_a_policy_that_ignores_y_n(policy, monkeypatch):
    """Where all integrated outputs of a group are one, there is nothing to project; the two kinds differ in what is shown."""
    shown = []
    monkeypatch.setattr(
        ContextBuilder, "integration", lambda self, prompt, group: shown.append(len(group)) or self._tokens(prompt + "!")
    )
    rows = toy.questions("held_out", 3, 0)
    for kind in collider.KINDS:
        shown.clear()
        top, bottom = collider.projection_slope(*policy[:2], rows, policy[2], kind, 2, 3, 1, seed=1)
        assert shown == [2] * (3 + 12)  # 3 observed, 3·2·2 others
        assert top.shape == bottom.shape == (3,) and (bottom >= 0).all()
    for arguments in ({"kind": "magic"}, {"kind": "theorem", "group_size": 1}, {"kind": "theorem", "num_integrated": 1}):
        with pytest.raises(UserError):
            collider.projection_slope(*policy[:2], rows, policy[2], **arguments)
