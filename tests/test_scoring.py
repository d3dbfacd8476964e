"""Scores against one unpadded sequence at a time, read with transformers' plain logits and hidden states."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from gcpo_repro.scoring import StateCapture, eval_mode, policy_forward, score

EOS = 1


@pytest.fixture(scope="module")
def model(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder).eval()


@pytest.fixture(scope="module")
def pairs(tiny_folder):
    """Ragged contexts and responses; some end with EOS, one is EOS alone."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    texts = [("1+1=?", "a2"), ("a far longer question, 22+333=?", "355 or so"), ("7", "b"), ("5-4=?|1|2!", ""), ("x", "yz12")]
    contexts, responses = ([list(tokenizer(text)["input_ids"]) for text in side] for side in zip(*texts, strict=True))
    return contexts, [ids + [EOS] * (k % 2 == 1) for k, ids in enumerate(responses)]


def read(model, context, response, temperature=1.0):
    with torch.no_grad():
        out = model(input_ids=torch.tensor([context + response]), output_hidden_states=True)
    law, states = (out.logits[0] / temperature).log_softmax(-1), out.hidden_states[-1][0]
    start = len(context)
    logps = [law[start + j - 1, token] for j, token in enumerate(response)]
    return torch.stack(logps), states[start - 1], states[start + len(response) - 1]


def check(model, scores, contexts, responses, temperature=1.0):
    width = max(map(len, responses))
    assert scores.logps.shape == scores.mask.shape == (len(contexts), width)
    assert scores.mask.sum(1).tolist() == [len(ids) for ids in responses]
    for row, (context, response) in enumerate(zip(contexts, responses, strict=True)):
        logps, at_context, at_response = read(model, context, response, temperature)
        torch.testing.assert_close(scores.logps[row, : len(response)], logps, rtol=1e-4, atol=2e-5)
        assert (scores.logps[row, len(response) :] == 0).all()
        assert scores.mask[row, : len(response)].all()
        torch.testing.assert_close(scores.context_state[row], at_context, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(scores.response_state[row], at_response, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_are_those_of_single_sequences(model, pairs, rows, temperature):
    """Whatever the chunks. Padding is EOS here, as with models that have no padding token: only the mask tells."""
    with torch.no_grad():
        found = score(policy_forward(model, temperature), *pairs, pad_id=EOS, rows=rows)
    check(model, found, *pairs, temperature)


def test_scores_of_a_model_with_absolute_positions(pairs):
    """Left padding must not shift them; rotary positions, which are relative, would not show it."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=81, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        found = score(policy_forward(model), *pairs, pad_id=EOS, rows=3)
    check(model, found, *pairs)


def test_the_padding_token_does_not_matter(model, pairs):
    with torch.no_grad():
        found = [score(policy_forward(model), *pairs, pad_id=pad, rows=5) for pad in (0, EOS, 20)]
    for other in found[1:]:
        for name in ("logps", "mask", "context_state", "response_state"):
            torch.testing.assert_close(getattr(other, name), getattr(found[0], name), rtol=0, atol=1e-6)


def test_the_check_has_power(model, pairs):
    """Another context moves log-probabilities and states far beyond the tolerance."""
    contexts, responses = pairs
    moved = read(model, contexts[1], responses[0]), read(model, contexts[0], responses[0])
    for one, other in zip(*moved, strict=True):
        assert (one - other).abs().max() > 0.1


def test_scores_in_training_mode_are_without_dropout_and_the_mode_stays(tiny_folder, pairs):
    """Also through adapters: LoRA dropout is off, and the states come from below the wrapped head."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, attention_dropout=0.5)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5, task_type="CAUSAL_LM")
    adapted = get_peft_model(base, lora)
    adapted.train()
    with torch.no_grad():
        found = score(policy_forward(adapted), *pairs, pad_id=0, rows=2)
    assert adapted.training
    check(adapted.eval(), found, *pairs)
    with adapted.disable_adapter():
        without = read(adapted, pairs[0][0], pairs[1][0])
    assert (without[2] - found.response_state[0]).abs().max() > 0.1  # the adapters do something


def test_the_order_of_pairs_does_not_matter(model, pairs):
    contexts, responses = pairs
    with torch.no_grad():
        found = score(policy_forward(model), contexts, responses, 0, 2)
        back = score(policy_forward(model), contexts[::-1], responses[::-1], 0, 2)
    for name in ("logps", "context_state", "response_state"):
        torch.testing.assert_close(getattr(back, name).flip(0), getattr(found, name), rtol=0, atol=1e-5)


def test_scores_are_float32_whatever_the_model(tiny_folder, pairs):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    with torch.no_grad():
        found = score(policy_forward(model), *pairs, pad_id=0, rows=5)
    assert found.logps.dtype == found.context_state.dtype == found.response_state.dtype == torch.float32


@pytest.mark.parametrize(
    "contexts, responses, message",
    [
        ([[3]], [[3], [4]], "contexts and responses: 1 and 2 rows"),
        ([], [], "every row needs at least one token"),
        ([[3], []], [[3], [4]], "every row needs at least one token"),
        ([[3], [4]], [[], [4]], "every row needs at least one token"),
    ],
)
def test_errors(model, contexts, responses, message):
    with pytest.raises(ValueError, match=message):
        score(policy_forward(model), contexts, responses, 0, 2)


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_state_capture_keeps_the_latest_states_and_leaves_no_hook(model):
    before = hooks(model)
    first, second = torch.tensor([[3, 4, 5]]), torch.tensor([[6, 7]])
    with torch.no_grad(), StateCapture(model) as capture:
        for ids in (first, second):
            expected = model(ids, output_hidden_states=True).hidden_states[-1]
            assert torch.equal(capture.states, expected)
    assert capture.states is None and hooks(model) == before
    with pytest.raises(RuntimeError, match="stop"), StateCapture(model):
        raise RuntimeError("stop")
    assert hooks(model) == before


@pytest.mark.parametrize("training", [True, False])
def test_eval_mode_puts_the_mode_back_also_after_an_error(training):
    module = torch.nn.Dropout(0.5).train(training)
    with eval_mode(module):
        assert not module.training
    assert module.training == training
    with pytest.raises(RuntimeError, match="stop"), eval_mode(module):
        raise RuntimeError("stop")
    assert module.training == training
