"""The agreement study: its statistics on cases done by hand, its readings against the trainer's definitions read slowly."""

import random
from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats

from gcpo_repro import GCPOConfig, UserError, agreement, load_policy, toy
from gcpo_repro.contexts import ContextBuilder
from gcpo_repro.loss import group_advantages, projected_reference, projected_target, upsilon
from gcpo_repro.scoring import Reader, policy_forward, score

N, T = 4, 8
ROWS = toy.questions("held_out", 8, 0)
COMMON = {"num_generations": N, "max_completion_length": T, "seed": 0, **toy.TEMPLATE}


@pytest.fixture(scope="module")
def policy():
    model, tokenizer, _ = load_policy(toy.POLICY, quantization="none", lora=None)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def written(policy):
    return agreement.write(*policy, ROWS, toy.exact_reward, COMMON)


@pytest.fixture(scope="module")
def reading(policy, written):
    """By name, once each; the reference has 16 rollouts."""
    settings = {setting.name: setting for setting in agreement.settings(N, 16, T)}
    return cache(lambda name: agreement.read(*policy, ROWS, toy.exact_reward, settings[name], written, COMMON))


def test_equal_answers_count_once_in_a_rank():
    answers = np.array([[1, 1, 2, 3], [1, 2, 3, 4], [1, 1, 1, 1], [5, 6, 7, 8]])
    a = np.array([[1.0, 3.0, 2.5, 4.0], [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 2.0, 2.0]])
    b = np.array([[9.0, 1.0, 4.0, 6.0], [4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    # Group 0: the answers 1, 2, 3 have 2, 2.5, 4 and 5, 4, 6: ranks 1 2 3 and 2 1 3, so 1 - 6 * 2 / (3 * 8) = 1/2.
    # Group 2 has one answer only, and nothing varies in the last one's a.
    np.testing.assert_allclose(agreement.rank_correlations(a, b, answers), [0.5, -1.0])


def test_order_changes_between_different_answers_of_groups_with_different_rewards():
    answers = np.array([[1, 2, 3], [1, 1, 2], [1, 2, 3], [1, 2, 3]])
    a = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0]])
    b = np.array([[4.0, 5.0, 6.0], [2.0, 1.0, 3.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    assert agreement.order_changed(a, b, answers).tolist() == [False, False, True]


def test_interval_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(1).normal(size=40)
    found = agreement._interval("x", values, 20_000, 0)
    expected = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=5).confidence_interval
    assert found["x"] == pytest.approx(values.mean())
    assert (found["x low"], found["x high"]) == pytest.approx((expected.low, expected.high), abs=0.02)
    assert np.isnan(agreement._interval("x", values[:1], 10, 0)["x low"])


def test_a_reading_agrees_with_itself_and_a_shift_is_its_bias(reading, written):
    found, answers = reading("state, L = n"), written.answers(N)
    same = agreement.compare(found, found, answers)
    assert same["rank"] == pytest.approx(1) and same["projection"] == pytest.approx(1)
    assert same["bias"] == same["rms"] == same["order changed"] == same["log_rho rms"] == 0
    assert same["log_rho correlation"] == pytest.approx(1)
    assert same["rank groups"] >= 2 and same["projection groups"] >= 2
    moved = agreement.Reading(**{**vars(found), "upsilon": found.upsilon + 0.25, "weighted": -found.weighted})
    shifted = agreement.compare(moved, found, answers)
    assert shifted["bias"] == pytest.approx(0.25) and shifted["rms"] == pytest.approx(0.25)
    assert shifted["bias low"] == pytest.approx(0.25) and shifted["order changed"] == 1
    assert "rank" not in agreement.compare(found, None, answers), "nothing to compare the reference with"


@pytest.mark.parametrize("ragged", [False, True])
def test_state_and_pi_ref_against_slow_passes(policy, written, ragged):
    """Every context on its own, by the plain forward pass; Eq. 8, 11 and 13 from the pure functions."""
    model, tokenizer = policy
    if ragged:  # one answer broken off after three tokens; its state must be read again
        written = agreement.Written([written.candidates[0][:3], *written.candidates[1:]], None, written.y_n)
    state = agreement.Setting("", "", {})
    found = agreement.read(model, tokenizer, ROWS, toy.exact_reward, state, written, COMMON)
    reader = Reader(policy_forward(model), tokenizer.pad_token_id)
    builder = ContextBuilder(tokenizer, **toy.TEMPLATE, strip=[tokenizer.eos_token_id, tokenizer.pad_token_id])
    for g, row in enumerate(ROWS):
        y, y_n = (kept[N * g : N * (g + 1)] for kept in (written.candidates, written.y_n))
        q = [tokenizer(row["prompt"])["input_ids"]] * N
        with torch.no_grad():
            under_q = score(reader, q, y, T)
            under_x = [[score(reader, [builder.collider(row["prompt"], y, i, out)], [y[i]], T) for out in y_n] for i in range(N)]
        z = under_q.response_state
        Z = torch.stack([torch.stack([s.context_state for s in scores]) for scores in under_x])  # (n, L, 1, H)
        expected = upsilon(z, projected_target(z, Z))
        np.testing.assert_allclose(found.upsilon[g], expected, atol=2e-5)
        np.testing.assert_allclose(found.centroid[g], upsilon(z, z.mean(0, keepdim=True).expand_as(z)), atol=2e-5)
        rewards = toy.exact_reward(tokenizer.batch_decode(y, skip_special_tokens=True), [row["answer"]] * N)
        np.testing.assert_allclose(found.weighted[g], group_advantages(torch.tensor(rewards), N) * expected, atol=1e-4)
        logps_x = torch.stack([torch.cat([s.logps for s in scores]) for scores in under_x])
        log_rho = projected_reference(logps_x, under_q.logps, under_q.mask)[0] - under_q.logps
        log_rho[under_q.mask == 0] = torch.nan
        width = found.log_rho.shape[2]
        assert np.isnan(found.log_rho[g]).any() == (ragged and g == 0)
        np.testing.assert_allclose(found.log_rho[g], log_rho[:, :width], atol=1e-3)
        assert found.varied[g] == (len(set(map(tuple, y_n))) > 1)


def test_with_the_same_y_n_pi_ref_is_the_same_and_more_rollouts_come_closer(reading, written):
    names = ("literal", "literal, rollouts again", "rollout, M = n", "rollout, M = 1", "state, L = n")
    found = {name: reading(name) for name in names}
    for name in names[1:]:
        np.testing.assert_allclose(found[name].log_rho, found["literal"].log_rho, atol=1e-4)
    answers = written.answers(N)
    rms = [agreement.compare(found[name], found["literal"], answers)["rms"] for name in names[1:4]]
    assert 0 < rms[0] < rms[1] < rms[2]
    # Written: n integrated outputs and n · n · M rollouts, of 1 to T tokens.
    for name, M in (("literal", 16), ("rollout, M = 1", 1), ("state, L = n", 0)):
        assert N + N * N * M <= found[name].generated <= T * (N + N * N * M)
        assert found[name].forward > found[name].generated and found[name].seconds > 0


def test_own_y_n_moves_pi_ref_and_the_fast_preset_reads_and_writes_least(reading, written):
    literal, again, fast = (reading(name) for name in ("literal", "literal, y_n again", "fast"))
    assert np.nanmax(np.abs(again.log_rho - literal.log_rho)) > 0.01
    assert fast.generated == 2 * max(1, T // 8), "two y_n, an eighth of T each"
    assert fast.forward < reading("state, L = 2").forward < literal.forward
    shape = literal.log_rho.shape
    lengths = [len(ids) for ids in written.candidates]
    assert (~np.isnan(literal.log_rho)).sum() == sum(lengths) and shape == (len(ROWS), N, max(lengths))


def test_study_is_a_table_of_its_seed_and_leaves_nothing_behind(policy):
    model, tokenizer = policy
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5), np.random.seed(5), random.seed(5)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    only = ["rollout, M = 1", "centroid"]
    tables = [
        agreement.study(model, tokenizer, ROWS[:3], toy.exact_reward, N, 2, T, seed, only, 50, **toy.TEMPLATE)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()
    assert before[2] == random.getstate() and not model.training
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())
    first, again, other = (table.drop(columns="seconds") for table in tables)
    assert first.equals(again) and not first.equals(other)
    assert list(first.index) == ["literal", *only]
    assert np.isnan(first.loc["centroid", "projection"]) and first.loc["literal", ["rank", "bias"]].isna().all()
    assert first["log_rho size"].nunique() == 1, "none of the three differs in π'_ref"


def test_refusals_name_what_is_wrong(policy):
    with pytest.raises(UserError, match="rows: 1 must be at least 2"):
        agreement.study(*policy, ROWS[:1], toy.exact_reward)
    with pytest.raises(UserError, match="'stat'.*state, L = n"):
        agreement.study(*policy, ROWS, toy.exact_reward, only=["stat"])


def test_every_setting_is_labelled_and_one_of_a_kind():
    settings = agreement.settings(N, 16, T)
    assert len({setting.name for setting in settings}) == len(settings) and all(setting.approximates for setting in settings)
    keys = [(str(s.options), s.build, s.own_y_n, s.draw) for s in settings]
    assert len(set(keys)) == len(keys)
    (fast,) = (setting for setting in settings if setting.name == "fast")
    built = fast.build("unused", T, num_generations=N, per_device_train_batch_size=N, use_cpu=True, bf16=False)
    assert isinstance(built, GCPOConfig) and (built.num_integrated, built.context_max_tokens) == (2, 1)
