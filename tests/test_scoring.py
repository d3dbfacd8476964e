"""Scores against one unpadded sequence at a time, read with transformers' plain logits and hidden states."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from gcpo_repro.scoring import Reader, StateCapture, Trunks, eval_mode, policy_forward, score, score_colliders

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


@pytest.mark.parametrize("tokens", [1, 100, 200, 10_000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_are_those_of_single_sequences(model, pairs, tokens, temperature):
    """Whatever the chunks. Padding is EOS here, as with models that have no padding token: only the mask tells."""
    with torch.no_grad():
        found = score(Reader(policy_forward(model, temperature), EOS, tokens), *pairs)
    check(model, found, *pairs, temperature)


def test_scores_of_a_model_with_absolute_positions(pairs):
    """Left padding must not shift them; rotary positions, which are relative, would not show it."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=81, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        found = score(Reader(policy_forward(model), EOS, 120), *pairs)
    check(model, found, *pairs)


def test_the_padding_token_does_not_matter(model, pairs):
    with torch.no_grad():
        found = [score(Reader(policy_forward(model), pad), *pairs) for pad in (0, EOS, 20)]
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
        found = score(Reader(policy_forward(adapted), 0, 100), *pairs)
    assert adapted.training
    check(adapted.eval(), found, *pairs)
    with adapted.disable_adapter():
        without = read(adapted, pairs[0][0], pairs[1][0])
    assert (without[2] - found.response_state[0]).abs().max() > 0.1  # the adapters do something


def test_the_order_of_pairs_does_not_matter(model, pairs):
    contexts, responses = pairs
    with torch.no_grad():
        found = score(Reader(policy_forward(model), 0, 100), contexts, responses)
        back = score(Reader(policy_forward(model), 0, 100), contexts[::-1], responses[::-1])
    for name in ("logps", "context_state", "response_state"):
        torch.testing.assert_close(getattr(back, name).flip(0), getattr(found, name), rtol=0, atol=1e-5)


def test_scores_are_float32_whatever_the_model(tiny_folder, pairs):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    with torch.no_grad():
        found = score(Reader(policy_forward(model), 0), *pairs)
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
        score(Reader(policy_forward(model), 0, 100), contexts, responses)


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


# The contexts of a candidate, which begin alike


@pytest.fixture(scope="module")
def colliders(tiny_folder):
    """4 candidates with 3 contexts each; everything ragged, one candidate truncated, one end a single token."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    read_ids = lambda text: list(tokenizer(text)["input_ids"])  # noqa: E731
    prefixes = [read_ids(text) for text in ("1+1=?|a2|", "22+333=?|longer one here|7|", "x|y|", "5-4=?|1|another|")]
    words = ("a", "bcd", "5"), ("", "z", "zz"), ("q", "r", ""), ("9", "1", "12")
    ends = [[read_ids(f"{word}!") for word in row] for row in words]
    return prefixes, ends, [*(read_ids(text) + [EOS] for text in ("a2", "355 or", "b")), read_ids("cut off here")]


def adapted(folder, quantised):
    from gcpo_repro import LoraSettings, load_policy

    model, _, config = load_policy(folder, "nf4" if quantised else "none", LoraSettings(r=4))
    config.init_lora_weights = False
    torch.manual_seed(0)
    model = get_peft_model(model, config)
    with torch.no_grad():  # adapters of a trained policy's size; larger logits would only show float32's rounding
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter *= 0.1
    return model


def read_with(backend, model, colliders, tokens=16384, pad=EOS, temperature=1.0):
    with torch.no_grad():
        return score_colliders(Reader(policy_forward(model, temperature), pad, tokens), *colliders, backend, model)


@pytest.mark.parametrize("kind", ["full", "lora", "nf4"])
@pytest.mark.parametrize("tokens", [1, 90, 16384])
def test_backends_agree(tiny_folder, colliders, kind, tokens):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder) if kind == "full" else adapted(tiny_folder, kind == "nf4")
    logps, states = read_with("naive", model, colliders, temperature=0.8)
    assert logps.shape[:2] == states.shape[:2] == (4, 3)
    for backend in ("batched", "prefix"):
        found = read_with(backend, model, colliders, tokens, temperature=0.8)
        torch.testing.assert_close(found[0], logps, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(found[1], states, rtol=1e-4, atol=1e-4)
    prefixes, ends, responses = colliders
    for i, l in ((0, 1), (3, 2)):  # and all with one plain forward pass
        alone = read(model.eval(), prefixes[i] + ends[i][l], responses[i], 0.8)
        torch.testing.assert_close(logps[i, l, : len(responses[i])], alone[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(states[i, l], alone[1], rtol=1e-4, atol=1e-4)
        assert (logps[i, l, len(responses[i]) :] == 0).all()


def test_exchanging_two_contexts_moves_the_numbers(model, colliders):
    """So that agreement means something."""
    prefixes, ends, responses = colliders
    right, _ = read_with("prefix", model, colliders)
    swapped, _ = read_with("prefix", model, (prefixes, [[row[1], row[0], row[2]] for row in ends], responses))
    assert (right - swapped)[:, :2].abs().max() > 0.05 and (right - swapped)[:, 2].abs().max() < 1e-5
    torch.testing.assert_close(swapped[:, 0], right[:, 1], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def leave_one_out(tiny_folder):
    """Two groups of 3 candidates: integration prompts, leave-one-out prefixes and their ends; ragged, one candidate empty."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    read_ids = lambda text: list(tokenizer(text)["input_ids"])  # noqa: E731
    groups = [("1+1=?", ("a2", "355 or", "")), ("a longer question?", ("b", "b", "cut off"))]
    whole = [read_ids("|".join([q, *y]) + "!") for q, y in groups]
    rows = [(g, i) for g in (0, 1) for i in range(3)]
    prefixes = [read_ids("|".join([groups[g][0], *(y for j, y in enumerate(groups[g][1]) if j != i)]) + "|") for g, i in rows]
    ends = [[read_ids("z!"), read_ids("zz12!")]] * 6
    return whole, [g for g, _ in rows], (prefixes, ends, [read_ids(groups[g][1][i]) + [EOS] for g, i in rows])


@pytest.mark.parametrize("tokens", [1, 120, 4096])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_going_on_from_what_the_group_shares_changes_nothing(tiny_folder, leave_one_out, tokens, attention):
    """Trunks: each leave-one-out prefix goes on from its group's integration prompt, or from anything else."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation=attention).eval()
    whole, trunk_of, colliders = leave_one_out
    reader = Reader(policy_forward(model), EOS, tokens)
    naive = read_with("naive", model, colliders)
    with torch.no_grad():
        trunks = Trunks(reader, model, whole)
        shared = [trunks.shared(g, prefix) for g, prefix in zip(trunk_of, colliders[0], strict=True)]
        assert max(shared) > 20 > 10 > min(shared) > 0  # some share nearly all, others the question only
        for sequences in (whole, whole[::-1], [whole[0][:1], whole[1][:1]]):
            trunks = Trunks(reader, model, sequences)
            found = score_colliders(reader, *colliders, "prefix", model, trunks, trunk_of)
            torch.testing.assert_close(found[0], naive[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(found[1], naive[1], rtol=1e-4, atol=1e-4)


def test_processes_make_equally_many_passes(model, leave_one_out):
    """A process with fewer groups, or with less left to read, goes along with the others: sharded models wait for each other."""
    whole, trunk_of, colliders = leave_one_out
    first = [part[:3] for part in colliders]
    counts = []
    for agree in (int, lambda count: max(count, 2)):  # the other process has two groups
        passes = []
        handle = model.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        reader = Reader(policy_forward(model), EOS, 1, agree=agree)
        with torch.no_grad():
            found = score_colliders(reader, *first, "prefix", model, Trunks(reader, model, whole[:1]), [0] * 3)
        handle.remove()
        counts.append(len(passes))
        torch.testing.assert_close(found[0], read_with("naive", model, first)[0], rtol=0, atol=1e-5)
    assert counts[1] > counts[0]


CONFIGS = {
    "llama": LlamaConfig, "mistral": lambda **options: MistralConfig(sliding_window=None, **options), "gemma": GemmaConfig,
    "qwen2": Qwen2Config,
}  # fmt: skip


def tiny(build, **options):
    torch.manual_seed(0)
    config = build(
        vocab_size=81, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, max_position_embeddings=128, initializer_range=0.3, **options,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_backends_agree_on_other_decoders(name, colliders, recwarn):
    model = tiny(CONFIGS[name])
    expected = read_with("naive", model, colliders, pad=0)
    found = read_with("prefix", model, colliders, pad=0)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=2e-5)
    assert not [w for w in recwarn if "cropped" in str(w.message)]


def test_sliding_windows_are_read_whole_and_said_to_be(colliders):
    model = tiny(MistralConfig, sliding_window=4)
    with pytest.warns(UserWarning, match="can't be cropped"):
        found = read_with("prefix", model, colliders)
    torch.testing.assert_close(found[0], read_with("naive", model, colliders)[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("token, at", [("last", -1), ("last_content", -2), ("mean", None)])
def test_feature_token(model, pairs, token, at):
    contexts, responses = pairs
    with torch.no_grad():
        found = score(Reader(policy_forward(model), 0, feature_token=token, end_ids=(EOS,)), contexts, responses)
        for row, (context, response) in enumerate(zip(contexts, responses, strict=True)):
            states = model(torch.tensor([context + response]), output_hidden_states=True).hidden_states[-1][0, len(context) :]
            if at is None:
                expected = states.mean(0)
            else:  # EOS alone has no content: its own state stands for it
                expected = states[at if response[-1] == EOS and len(response) > 1 and at == -2 else -1]
            torch.testing.assert_close(found.response_state[row], expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"backend": "magic"}, "backend: 'magic' must be one of"), ({"model": None}, "'prefix' needs the model"),
        ({"responses": [[3]]}, "4, 4, 1 rows"), ({"ends": [[[3]], [[3], [4]], [[3]], [[3]]]}, "L ends in each"),
    ],
)  # fmt: skip
def test_collider_errors(model, colliders, change, message):
    arguments = dict(zip(("prefixes", "ends", "responses"), colliders, strict=True))
    arguments |= {"backend": "prefix", "model": model} | change
    with pytest.raises(ValueError, match=message):
        score_colliders(Reader(policy_forward(model), 0), **arguments)
