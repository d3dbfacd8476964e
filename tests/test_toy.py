"""The toy task by hand, and the shipped policy against what the issue requires of it."""

import json
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gcpo_repro import demonstrator, pretraining, toy, toy_card
from gcpo_repro.errors import UserError

QUESTION, RIGHT = "8a+1b-9c+9?", "a9b0c9"  # 8 + 1 = 9, 9 - 9 = 0, 0 + 9 = 9


# The task


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (RIGHT, 1.0),
        ("a1b1c9", 1.0),  # only the last value is compared
        ("a9b0c8", 0.0),  # wrong digit
        ("a9c9", 0.0),  # a missing step
        ("a9b0", 0.0),
        ("9", 0.0),
        ("a9b0c9c9", 0.0),  # a step too many
        ("a9b0c9!", 0.0),  # trailing junk
        ("a9b0c9\n", 0.0),
        (" a9b0c9", 0.0),
        ("b9a0c9", 0.0),  # steps out of order
        ("a9b0c٩", 0.0),  # a digit of another script
        ("", 0.0),
    ],
)
def test_reward_by_hand(completion, reward):
    assert toy.exact_reward([completion], ["9"], prompts=[QUESTION]) == [reward]


def test_reward_keeps_order_and_refuses_other_lengths():
    assert toy.exact_reward([RIGHT, RIGHT, ""], answer=["9", "8", "9"]) == [1.0, 0.0, 0.0]
    with pytest.raises(UserError, match="2 completions but 1 answers"):
        toy.exact_reward(["", ""], ["9"])


def test_solve_by_hand():
    assert toy.solve(QUESTION) == RIGHT
    assert toy.solve("0a-1b+0c-9?") == "a9b9c0"
    for text in ("", "8a+1b-9?", QUESTION + "?", "8a*1b-9c+9?"):
        with pytest.raises(UserError, match="not a question"):
            toy.solve(text)


def test_splits_are_disjoint_complete_and_the_same_everywhere():
    train, held_out = set(toy.pool("train")), set(toy.pool("held_out"))
    assert not train & held_out
    assert len(train) + len(held_out) == 10 * 20**3
    assert (len(train), len(held_out)) == (64113, 15887)  # would differ if the hash were salted


def test_questions_are_seeded_distinct_and_leave_the_global_state_alone():
    states = random.getstate(), torch.get_rng_state()
    rows = toy.questions("held_out", 300, seed=3)
    assert rows == toy.questions("held_out", 300, seed=3) != toy.questions("held_out", 300, seed=4)
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert len({row["prompt"] for row in rows}) == 300
    assert set(rows[0]) == {"prompt", "answer"}
    assert all(row["prompt"] in toy.pool("held_out") and row["answer"] == toy.solve(row["prompt"])[-1] for row in rows)


@pytest.mark.parametrize(("split", "size"), [("test", 4), ("train", 0), ("train", -1), ("held_out", 15888)])
def test_impossible_questions(split, size):
    with pytest.raises(UserError, match="unknown split 'test'; choose one of train, held_out|size .* is impossible"):
        toy.questions(split, size, 0)


def test_integration_prompt():
    assert toy.integration_prompt(QUESTION, [RIGHT, "a9"]) == "8a+1b-9c+9?|a9b0c9|a9!"
    with pytest.raises(UserError, match="at least one candidate"):
        toy.integration_prompt(QUESTION, [])


# The tokenizer


def test_tokens_are_characters():
    tokenizer = AutoTokenizer.from_pretrained(toy.POLICY)
    text = toy.integration_prompt(QUESTION, [RIGHT] * 8)
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert ids == [k for part in text for k in tokenizer(part).input_ids]  # parts can be concatenated
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    # transformers loads it with the model type's own tokenizer class, which drops unknown characters instead of marking them
    assert set(tokenizer("8=\n").input_ids[1:]) <= {tokenizer.unk_token_id}
    assert toy.build_tokenizer()("8=\n").input_ids[1:] == [tokenizer.unk_token_id] * 2
    assert tokenizer.get_vocab() == toy.build_tokenizer().get_vocab()


# The demonstrator and the rounding


def test_demonstrator_votes_by_hand():
    """8a+1…: candidates a9 (right), a9, a7, so a9 weighs 12 of 13; then from 9 only the first two vote, on b."""
    teacher = demonstrator.Demonstrator(demonstrator.Recipe(), torch.Generator().manual_seed(0))
    facts = torch.tensor([[[0, 1], [1, 9], [0, 9]]])
    digits = torch.tensor([[[9, 0, 9], [9, 5, 9], [7, 3, 3]]])
    response, law = teacher.integrate(facts, torch.tensor([8]), digits)
    assert law[0, 0, 9] == pytest.approx(12 / 13) and law[0, 0, 7] == pytest.approx(1 / 13)
    if response[0, 0] == 9:
        assert law[0, 1, 0] == pytest.approx(6 / 7) and law[0, 1, 5] == pytest.approx(1 / 7)
    else:
        assert law[0, 1, 3] == 1


def test_demonstrator_law():
    """30% of the facts right with .5, the rest with .94: (.3·.5 + .7·.94)^3 = .53 for independent steps."""
    teacher = demonstrator.Demonstrator(demonstrator.Recipe(), torch.Generator().manual_seed(5))
    assert torch.allclose(teacher.law.sum(-1), torch.ones(2, 10, 10))
    right = teacher.law.gather(-1, teacher.right[..., None])[..., 0]
    assert right.mean().item() == pytest.approx(0.3 * 0.5 + 0.7 * 0.94)
    assert teacher.right[0, 8, 1] == 9 and teacher.right[1, 0, 1] == 9


def test_examples_are_train_questions_in_the_shown_format():
    examples = demonstrator.Examples(demonstrator.Recipe(), torch.Generator().manual_seed(0))
    tokenizer = toy.build_tokenizer()
    for n in (0, 1, 8):
        ids, law, candidate_laws = examples.batch(n, 5, random_share=1.0)
        assert law.shape == (5, 3, 10) and (n == 0 or candidate_laws.shape == (5, n, 3, 10))
        for text in tokenizer.batch_decode(ids):
            question, rest = text[:11], text[11:]
            assert question in toy.pool("train")
            form = r"a\db\dc\d"
            assert re.fullmatch(form if n == 0 else rf"(\|{form}){{{n}}}!{form}", rest)


def test_rounding_agrees_with_bitsandbytes():
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    rounded = pretraining.round_to_nf4(weight)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.allclose(rounded, dequantize_4bit(packed, state), atol=1e-6)
    assert torch.allclose(pretraining.round_to_nf4(rounded), rounded, atol=1e-6)


def test_heads_that_look_back():
    """At the start, heads 0, 1, 2 of the first layer put most of their attention 1, 2, 3 tokens back."""
    torch.manual_seed(0)
    model = pretraining.build_model(demonstrator.Recipe())
    model.set_attn_implementation("eager")
    ids = toy.build_tokenizer()(QUESTION, return_tensors="pt").input_ids
    attention = model(ids, output_attentions=True).attentions[0][0]
    for head in range(3):
        assert attention[head].diagonal(-head - 1)[4:].min() > 0.5


# The shipped policy


@pytest.fixture(scope="module", params=["fp32", "nf4"])
def small_scores(request):
    model = pretraining.load(toy.POLICY, nf4=request.param == "nf4")
    return toy.policy_scores(model, AutoTokenizer.from_pretrained(toy.POLICY), n_questions=96, seed=2)


def test_requirements_on_a_small_sample(small_scores):
    """96 questions × 8: the standard error is about 2.5 points (questions differ), so 3 of them are allowed."""
    slack = 0.075
    plain = small_scores["pass@1"]
    assert plain["total"] == 96 * 8 and plain["rate"] == round(plain["correct"] / plain["total"], 4)
    assert 0.40 - slack < plain["rate"] < 0.65 + slack
    for n in ("2", "4", "8"):
        # On the same questions and candidates the gain varies less than either score.
        assert small_scores["integration"][n]["rate"] > plain["rate"] + 0.05 - 0.03
        assert small_scores["foreign"][n]["rate"] < 0.2


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_requirements_on_the_recorded_counts(kind):
    scores = json.loads((toy.POLICY / "scores.json").read_text())[kind]
    plain = scores["pass@1"]["rate"]
    assert scores["pass@1"]["total"] == 512 * 8 and 0.45 <= plain <= 0.60
    for n in ("2", "4", "8"):
        assert scores["integration"][n]["rate"] >= plain + 0.08
        assert scores["foreign"][n]["rate"] < 0.2


@pytest.mark.parametrize("n", range(1, toy.MAX_CANDIDATES + 1))
def test_every_number_of_candidates_is_understood(n):
    """Shown n right candidates, the policy repeats them."""
    model, tokenizer = pretraining.load(toy.POLICY, nf4=False), toy.build_tokenizer()
    rows = toy.questions("held_out", 64, seed=9)
    prompts = [toy.integration_prompt(row["prompt"], [toy.solve(row["prompt"])] * n) for row in rows]
    texts = toy.sample(model, tokenizer, prompts, torch.Generator().manual_seed(0))
    assert sum(toy.exact_reward(texts, [row["answer"] for row in rows])) >= 58


def test_it_loads_like_any_model_and_is_small():
    model = AutoModelForCausalLM.from_pretrained(toy.POLICY)
    tokenizer = AutoTokenizer.from_pretrained(toy.POLICY, padding_side="left")
    assert model.dtype == torch.float32
    assert (toy.POLICY / "model.safetensors").stat().st_size <= 3e6
    assert {path.name for path in toy.POLICY.iterdir()} <= pretraining.FILES
    prompts = tokenizer([QUESTION, toy.integration_prompt(QUESTION, [RIGHT] * 2)], return_tensors="pt", padding=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ids = model.generate(**prompts, max_new_tokens=16)
    texts = tokenizer.batch_decode(ids[:, prompts.input_ids.shape[1] :], skip_special_tokens=True)
    assert all(toy.RESPONSE_FORM.fullmatch(text) for text in texts)


def test_card_states_the_recorded_scores():
    recorded = json.loads((toy.POLICY / "scores.json").read_text())
    card = (toy.POLICY / "README.md").read_text()
    assert toy_card.table(recorded) in card
    origin = recorded["provenance"]
    assert f"seed {origin['seed']}: {origin['wall_time_seconds']:.0f} s" in card
    assert origin["config"]["steps"] == demonstrator.Recipe().steps


def test_sampling_is_seeded_stops_and_agrees_with_the_model(capsys):
    model, tokenizer = pretraining.load(toy.POLICY, nf4=False), toy.build_tokenizer()
    prompts = [QUESTION, toy.integration_prompt(QUESTION, [RIGHT] * 3)] * 40
    state = torch.get_rng_state()
    draw = lambda seed: toy.sample(model, tokenizer, prompts, torch.Generator().manual_seed(seed))  # noqa: E731
    texts = draw(0)
    assert texts == draw(0) != draw(1) and torch.equal(torch.get_rng_state(), state)
    assert all(toy.RESPONSE_FORM.fullmatch(text) for text in texts)
    # The cached, padded path gives the same probabilities as one plain forward pass.
    first = model(tokenizer(QUESTION + "a", return_tensors="pt").input_ids).logits[0, -1].softmax(-1)
    share = sum(text.startswith("a9") for text in texts[::2]) / 40
    assert abs(share - first[tokenizer.convert_tokens_to_ids("9")].item()) < 0.3  # 0.3: 4 standard errors


def test_scores_need_enough_questions_and_samples():
    for n_questions, n_samples in ((1, 8), (4, 7)):
        with pytest.raises(UserError, match="n_questions . must be 2 or more and n_samples . at least"):
            toy.policy_scores(None, None, n_questions, n_samples)


# Making the folder


def test_miniature_pretraining_writes_a_loadable_folder(tmp_path, capsys):
    out, state = tmp_path / "policy", torch.get_rng_state()
    scores = toy.pretrain(out, seed=1, threads=1, steps=4, n_questions=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() > 4e5
    assert json.loads((out / "scores.json").read_text())["nf4"] == scores["nf4"]
    assert "pass@1" in capsys.readouterr().out
    first = (out / "model.safetensors").read_bytes()
    toy.pretrain(out, seed=1, threads=1, steps=4, n_questions=2, progress=False)  # an earlier policy is replaced
    assert (out / "model.safetensors").read_bytes() == first  # same seed, same threads: same bytes
    assert capsys.readouterr().err.count("pretraining") == 0


def test_a_failing_pretraining_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretraining, "score", stop)
    with pytest.raises(KeyboardInterrupt):
        toy.pretrain(tmp_path / "policy", threads=1, steps=1, progress=False)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_nothing(tmp_path):
    code = f"from gcpo_repro import toy; toy.pretrain({str(tmp_path / 'policy')!r}, threads=1)"
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    deadline = time.time() + 60
    while not list(tmp_path.iterdir()) and time.time() < deadline:
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    error = child.communicate(timeout=60)[1]
    assert child.returncode != 0 and b"KeyboardInterrupt" in error
    assert not list(tmp_path.iterdir())


def test_out_folders_that_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for name, message in (("file", "is a file"), ("thesis", "chapter.tex"), ("model", "other than a toy policy")):
        with pytest.raises(UserError, match=message):
            toy.pretrain(tmp_path / name, steps=1)
    with pytest.raises(UserError, match="cannot write"):
        toy.pretrain(tmp_path / "file" / "below", steps=1)
    for wrong in ({"steps": 0}, {"threads": 0}):
        with pytest.raises(UserError, match="must be at least 1"):
            toy.pretrain(tmp_path / "new", **wrong)


@pytest.mark.slow
def test_pretraining_again_scores_the_same(tmp_path):
    shipped = json.loads((toy.POLICY / "scores.json").read_text())
    again = toy.pretrain(tmp_path / "policy", seed=shipped["provenance"]["seed"], threads=2)
    # its time is recorded: 231 s on one core; on a busy machine two threads take several times that
    for kind in ("fp32", "nf4"):
        assert abs(again[kind]["pass@1"]["rate"] - shipped[kind]["pass@1"]["rate"]) <= 0.03
        for group in ("integration", "foreign"):
            for n, score in again[kind][group].items():
                assert abs(score["rate"] - shipped[kind][group][n]["rate"]) <= 0.03, (kind, group, n)
