"""Sampling and counting against slow, plain versions: one unpadded sequence at a time, the model's own probabilities."""

import collections

import pytest
import torch
from scipy import stats as scipy_stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from gcpo_repro import UserError, toy
from gcpo_repro.data import prompt_ids
from gcpo_repro.evaluation.sampling import Counts, end_ids, evaluate, respond, rewards_of

COLD = 1e-4  # so low a temperature is greedy decoding
PROMPTS = ["1+1=?", "22+333=?", "7", "what is 5+5 then?"]


@pytest.fixture(scope="module")
def policy(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)


def greedy(model, ids, max_new_tokens, ends):
    """One sequence, no padding, no cache, the largest logit."""
    written = []
    with torch.no_grad():
        while len(written) < max_new_tokens and (not written or written[-1] not in ends):
            written.append(model(torch.tensor([ids + written])).logits[0, -1].argmax().item())
    return written


def first_letter(completions, answer, **kwargs):
    """1 where the answer stands first; None where nothing was written."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(text[0] == right) if text else None for text, right in zip(texts, answer, strict=True)]


@pytest.mark.parametrize("chat", [False, True])
def test_cold_evaluation_counts_what_greedy_decoding_writes(policy, chat):
    model, tokenizer = policy
    ends = {1, *(tokenizer.convert_tokens_to_ids(letter) for letter in "abcdefghij")}
    written = []
    for prompt in PROMPTS:
        question = [{"role": "user", "content": prompt}] if chat else prompt
        ids = tokenizer("<user>" + prompt + "</user><assistant>" if chat else prompt)["input_ids"]
        written.append((question, greedy(model, ids, 7, ends)))
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for _, ids in written]
    # Right for every second question, wrong for the others.
    rows = [
        {"prompt": question, "answer": text[:1] if k % 2 else "~"}
        for k, ((question, _), text) in enumerate(zip(written, texts, strict=True))
    ]
    found = evaluate(model, tokenizer, rows, first_letter, 3, 7, seed=0, temperature=COLD, batch_size=5)
    assert found.correct == [3 * (k % 2) if text else 0 for k, text in enumerate(texts)]
    assert found.unscorable == [0 if text else 3 for text in texts]
    assert found.truncated == [0 if ids[-1] in ends else 3 for _, ids in written]
    assert 0 < sum(found.truncated) < 12 and sum(found.correct) > 0  # both kinds occur
    assert found.pass_at_1 == sum(found.correct) / 12


def test_an_answer_that_ends_with_its_last_token_is_whole(policy):
    model, tokenizer = policy
    ends = set(end_ids(model, tokenizer))
    written = {prompt: greedy(model, tokenizer(prompt)["input_ids"], 30, ends) for prompt in PROMPTS}
    prompt, ids = next((prompt, ids) for prompt, ids in written.items() if 1 < len(ids) < 30)
    for length, truncated in ((len(ids), 0), (len(ids) - 1, 2)):
        rows = [{"prompt": prompt, "answer": "1"}]
        found = evaluate(model, tokenizer, rows, lambda **kwargs: [0.0, 0.0], 2, length, seed=0, temperature=COLD)
        assert found.truncated == [truncated]


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_responses_are_cut_at_the_end_and_come_back_in_order(policy, batch_size):
    model, tokenizer = policy
    contexts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    ends = set(end_ids(model, tokenizer))
    found = respond(model, tokenizer, contexts, 12, seed=0, temperature=COLD, batch_size=batch_size)
    assert found == [greedy(model, ids, 12, ends) for ids in contexts]
    assert len({len(ids) for ids in found}) > 1


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_draws_follow_the_models_own_probabilities(policy, temperature):
    """Whole softmax, no top-k, no top-p: a chi-square test on the first token, beside prompts that pad it."""
    model, tokenizer = policy
    ids, other = tokenizer("3+4=?")["input_ids"], tokenizer("a much longer question")["input_ids"]
    draws = respond(model, tokenizer, [ids, other] * 3000, 1, seed=1, temperature=temperature, batch_size=2000)
    drawn = collections.Counter(token for (token,) in draws[::2])
    with torch.no_grad():
        law = (model(torch.tensor([ids])).logits[0, -1].double() / temperature).softmax(-1)
    expected = 3000 * law
    common = expected >= 5
    observed = torch.tensor([drawn[token] for token in range(len(law))], dtype=torch.double)
    cells = [torch.cat([values[common], values[~common].sum()[None]]) for values in (observed, expected)]
    assert scipy_stats.chisquare(*(cell.numpy() for cell in cells)).pvalue > 1e-3
    beyond_50 = law.argsort(descending=True)[50:]  # generate's own default keeps 50
    assert observed[beyond_50].sum() > 0


def test_seed_makes_it_reproducible_and_leaves_the_global_state_alone(policy):
    model, tokenizer = policy
    rows = [{"prompt": prompt, "answer": "1"} for prompt in PROMPTS]
    seen = []

    def record(completions, **kwargs):
        seen.append(list(completions))
        return [0.0] * len(completions)

    torch.manual_seed(5)
    state = torch.get_rng_state()
    for seed in (0, 0, 1):
        evaluate(model, tokenizer, rows, record, 4, 6, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    evaluate(model, tokenizer, rows, record, 4, 6, seed=0)
    assert seen[0] == seen[1] == seen[3] != seen[2]


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_is_put_back(tiny_folder, training):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, attention_dropout=0.9)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    contexts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    ends = set(end_ids(model, tokenizer))
    model.eval()
    expected = [greedy(model, ids, 6, ends) for ids in contexts]
    model.train(training)
    assert respond(model, tokenizer, contexts, 6, seed=0, temperature=COLD) == expected
    assert model.training == training


def test_the_reward_sees_what_it_should(policy):
    model, tokenizer = policy
    rows = [{"prompt": p, "answer": str(k), "level": 10 * k} for k, p in enumerate(PROMPTS)]
    asked = [0, 0, 3, 1]
    responses = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in ("a1", "b2", "c3", "d4")]
    got = {}

    def reward(prompts, completions, answer, level):
        got.update(prompts=prompts, completions=completions, answer=answer, level=level)
        return [1, None, float("nan"), torch.tensor(0.5)]

    values = rewards_of(reward, tokenizer, rows, asked, responses)
    assert values[:2] == [1.0, None] and values[2] != values[2] and values[3] == 0.5
    assert got == {
        "prompts": [PROMPTS[k] for k in asked], "completions": ["a1", "b2", "c3", "d4"], "answer": ["0", "0", "3", "1"],
        "level": [0, 0, 30, 10],
    }  # fmt: skip
    chat = [{"prompt": [{"role": "user", "content": "hi"}], "answer": "1"}]
    rewards_of(lambda completions, **kwargs: got.update(chat=completions) or [1.0], tokenizer, chat, [0], responses[:1])
    assert got["chat"] == [[{"role": "assistant", "content": "a1"}]]


def test_half_right_is_not_right_and_unscorable_is_neither(policy):
    model, tokenizer = policy
    rows = [{"prompt": p, "answer": ""} for p in PROMPTS]
    values = [0.99, 1.0, 2.5, -1.0, None, float("nan"), 0.0, 1.0]
    found = evaluate(model, tokenizer, rows, lambda **kwargs: values, 2, 3, seed=0)
    assert found.correct == [1, 1, 0, 1] and found.unscorable == [0, 0, 2, 0]
    assert (found.samples, found.seed, found.pass_at_1) == (2, 0, 3 / 8)


def raises(**kwargs):
    raise KeyError("no column 'unit'")


@pytest.mark.parametrize(
    "reward, message",
    [
        (raises, "reward: raises failed with KeyError: .*no column 'unit'.*; return one number per completion"),
        (lambda **kwargs: [1.0], "reward: <lambda> returned 1 values for 4 completions"),
        (lambda **kwargs: [1.0, float("-inf"), 0.0, 0.0], "returned an infinite value"),
        (lambda **kwargs: [None, float("nan"), None, None], r"scored none of 4 answers \(all None or NaN\)"),
        (lambda **kwargs: ["right", "wrong", "wrong", "wrong"], "failed with ValueError"),
        (lambda **kwargs: None, "failed with TypeError"),
        (lambda completions: [1.0] * 4, "failed with TypeError: .*unexpected keyword argument"),
    ],
)
def test_faulty_rewards_are_told_in_one_message(policy, reward, message):
    model, tokenizer = policy
    rows = [{"prompt": p, "answer": "1"} for p in PROMPTS[:2]]
    with pytest.raises(UserError, match=message):
        evaluate(model, tokenizer, rows, reward, 2, 2, seed=0)


@pytest.mark.parametrize("declared, expected", [(7, [1, 7]), ([7, 3], [1, 3, 7]), (None, [1])])
def test_end_ids_are_the_models_and_the_tokenizers(policy, declared, expected):
    _, tokenizer = policy

    class Model:
        class generation_config:
            eos_token_id = declared

    assert end_ids(Model, tokenizer) == expected


def test_pass_at_1_of_the_toy_policy_is_that_of_its_own_sampler():
    """Two samplers, the same policy: 192 answers each differ by less than 4 standard errors of a difference (.2)."""
    model = AutoModelForCausalLM.from_pretrained(toy.POLICY)
    tokenizer = AutoTokenizer.from_pretrained(toy.POLICY)
    rows = toy.questions("held_out", 48, seed=4)
    found = evaluate(model, tokenizer, rows, toy.exact_reward, 4, toy.RESPONSE_LENGTH, seed=0)
    repeated = [row for row in rows for _ in range(4)]
    texts = toy.sample(model, tokenizer, [row["prompt"] for row in repeated], torch.Generator().manual_seed(0))
    right = toy.exact_reward(texts, [row["answer"] for row in repeated])
    assert abs(found.pass_at_1 - sum(right) / len(right)) < 0.2
    assert 0.2 < found.pass_at_1 < 0.8
    assert all(0 <= c <= 4 for c in found.correct) and len(found.correct) == 48
    assert sum(found.unscorable) == 0


def test_counts_go_into_json():
    counts = Counts([1, 0], [0, 1], [0, 0], samples=2, seed=3)
    assert counts.as_dict() == {"correct": [1, 0], "unscorable": [0, 1], "truncated": [0, 0], "samples": 2, "seed": 3}
    assert counts.pass_at_1 == 0.25


def test_prompts_are_read_as_the_trainer_reads_them(policy):
    _, tokenizer = policy
    assert prompt_ids("1+1", tokenizer) == tokenizer("1+1")["input_ids"]
    conversation = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1"}]
    written = "<system>be brief</system><user>1+1</user><assistant>"
    assert prompt_ids(conversation, tokenizer) == tokenizer(written)["input_ids"]
