"""Contexts against ids written out by hand: the tests' tokenizer has one token per character."""

import pytest
from transformers import AutoTokenizer

from gcpo_repro import UserError, toy
from gcpo_repro.contexts import CANDIDATE_PREFIX, INTEGRATION_SUFFIX, ContextBuilder

PAD, EOS, UNK = 0, 1, 2


@pytest.fixture
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)  # fresh: some tests change its chat template


def builder_for(tokenizer, prefix="|", suffix="!", **options):
    return ContextBuilder(tokenizer, prefix, suffix, **{"strip": (EOS, PAD), **options})


@pytest.fixture
def ids(tokenizer):
    return lambda text: list(tokenizer(text)["input_ids"])


def test_the_tokenizer_is_the_simple_one_these_tests_need(tokenizer, ids):
    assert len(ids("1+1=?|ab!")) == 9 and tokenizer.eos_token_id == EOS and tokenizer.pad_token_id == PAD


def test_plain_integration_prompt(tokenizer, ids):
    found = builder_for(tokenizer).integration("1+1=?", [[*ids("a1"), EOS], ids("bb2"), [*ids("c"), EOS]])
    assert found == ids("1+1=?|a1|bb2|c!")


def test_plain_collider_contexts(tokenizer, ids):
    """x_{i,l}: without y_i, and y_{n,l} in the last place; the gap is closed up."""
    builder = builder_for(tokenizer)
    y, y_n = [[*ids(text), EOS] for text in ("a1", "bb2", "c3")], [*ids("d4"), EOS]
    assert builder.collider("1+1=?", y, 0, y_n) == ids("1+1=?|bb2|c3|d4!")
    assert builder.collider("1+1=?", y, 1, y_n) == ids("1+1=?|a1|c3|d4!")
    assert builder.collider("1+1=?", y, 2, y_n) == ids("1+1=?|a1|bb2|d4!")
    assert y == [[*ids(text), EOS] for text in ("a1", "bb2", "c3")], "the candidates are not changed"


def test_contexts_of_one_candidate_share_their_prefix(tokenizer, ids):
    builder = builder_for(tokenizer)
    y = [ids("a1"), ids("b2"), ids("c3")]
    first, second = (builder.collider("q", y, 1, ids(text)) for text in ("xx", "yyy"))
    shared = ids("q|a1|c3|")
    assert first[: len(shared)] == second[: len(shared)] == shared


def test_numbers_count_what_is_shown(tokenizer, ids):
    builder = builder_for(tokenizer, "/{k}:", "!")
    y = [ids("a"), ids("b"), ids("c")]
    assert builder.integration("q", y) == ids("q/1:a/2:b/3:c!")
    assert builder.collider("q", y, 0, ids("d")) == ids("q/1:b/2:c/3:d!")
    many = builder.integration("q", [ids("a")] * 11)
    assert many[-len(ids("/11:a!")) :] == ids("/11:a!")


def test_chat_places_the_candidates_in_the_last_user_message(tokenizer, ids):
    prompt = [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"}, {"role": "user", "content": "1+1=?"},
    ]  # fmt: skip
    before = [dict(message) for message in prompt]
    builder = builder_for(tokenizer)
    head = "<system>be brief</system><user>hi</user><assistant>yes?</assistant><user>1+1=?"
    tail = "!</user><assistant>"
    y = [[*ids("a1"), EOS], [*ids("b2"), EOS]]
    assert builder.integration(prompt, y) == ids(head + "|a1|b2" + tail)
    assert builder.collider(prompt, y, 0, [*ids("c3"), EOS]) == ids(head + "|b2|c3" + tail)
    assert prompt == before, "the prompt is not changed"


def test_chat_and_plain_without_candidates_or_texts(tokenizer, ids):
    builder = builder_for(tokenizer, "", "")
    assert builder.integration("1+1=?", [ids("a"), ids("b")]) == ids("1+1=?ab")
    chat = [{"role": "user", "content": "1+1=?"}]
    assert builder.integration(chat, []) == ids("<user>1+1=?</user><assistant>")


def test_further_arguments_reach_the_chat_template(tokenizer, ids):
    tokenizer.chat_template = "{{ mode }}:{{ messages[0]['content'] }}{% if add_generation_prompt %}>{% endif %}"
    builder = builder_for(tokenizer, chat={"mode": "slow"})
    assert builder.integration([{"role": "user", "content": "q"}], [ids("a")]) == ids("slow:q|a!>")


def test_truncation_keeps_the_conclusion(tokenizer, ids):
    """The last tokens of each candidate, counted after the end-of-sequence is taken off."""
    builder = builder_for(tokenizer, max_tokens=3)
    y = [[*ids("abcdef"), EOS], ids("xy"), [*ids("12345"), EOS, PAD, PAD]]
    assert builder.integration("q", y) == ids("q|def|xy|345!")
    assert builder.collider("q", y, 0, [*ids("uvwxyz"), EOS]) == ids("q|xy|345|xyz!")
    assert builder_for(tokenizer).integration("q", y) == ids("q|abcdef|xy|12345!")


def test_ends_are_taken_off_the_end_only(tokenizer, ids):
    """Ids are shown as they were written, also where no text would give them back."""
    builder = builder_for(tokenizer, strip=(EOS, PAD, *ids("z")))
    inside = [*ids("a"), EOS, *ids("z1"), UNK]
    assert builder.integration("q", [[*inside, *ids("zz"), EOS, PAD]]) == [*ids("q|"), *inside, *ids("!")]
    assert builder.integration("q", [[EOS], [*ids("zz"), EOS]]) == ids("q||!")
    assert builder_for(tokenizer, strip=()).integration("q", [[*ids("a"), EOS]]) == [*ids("q|a"), EOS, *ids("!")]


@pytest.mark.parametrize("texts", [("~", "!"), ("|", "the answer~"), ("|{k}~", "!")])
def test_a_template_that_the_tokenizer_cannot_write_is_refused(tokenizer, texts):
    name, bad = ("integration_suffix", texts[1]) if "~" in texts[1] else ("candidate_prefix", texts[0])
    with pytest.raises(UserError, match=f"{name}: the tokenizer reads .* as .*; use text that it knows") as caught:
        builder_for(tokenizer, *texts)
    assert repr(bad.replace("{k}", "1")) in str(caught.value)


def test_the_default_words_are_refused_for_the_toy_policy_and_its_own_are_not():
    tokenizer = toy.build_tokenizer()
    with pytest.raises(UserError, match="candidate_prefix"):
        ContextBuilder(tokenizer)
    builder = ContextBuilder(tokenizer, strip=(EOS,), **toy.TEMPLATE)
    expected = toy.integration_prompt("8a+1b-9c+9?", ["a9b0c9", "a9b0c8"])
    y = [[*tokenizer(text)["input_ids"], EOS] for text in ("a9b0c9", "a9b0c8")]
    assert builder.integration("8a+1b-9c+9?", y) == tokenizer(expected)["input_ids"]
    ContextBuilder(tokenizer, "|{k}", "!")  # `{k}` itself is never written: its number is


def test_the_defaults_are_words_for_any_other_tokenizer(tokenizer, ids):
    found = ContextBuilder(tokenizer, strip=(EOS,)).integration("q", [ids("a"), ids("b")])
    first, second = (CANDIDATE_PREFIX.replace("{k}", number) for number in "12")
    assert found == ids("q" + first + "a" + second + "b" + INTEGRATION_SUFFIX)


@pytest.mark.parametrize(
    "template, times",
    [("{{ messages[0]['content'] }}/{{ messages[0]['content'] }}", 2), ("{{ messages[0]['role'] }}", 0)],
)
def test_a_chat_template_that_does_not_show_the_question_once(tokenizer, ids, template, times):
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=f"shows the last user message {times} times; GCPO needs it exactly once"):
        builder_for(tokenizer).integration([{"role": "user", "content": "q"}], [ids("a")])


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([{"role": "system", "content": "s"}], r"prompt: no message has the role 'user', got \['system'\]"),
        ([], "no message has the role 'user'"),
        ([{"role": "user", "content": [{"type": "text", "text": "q"}]}], "content must be text"),
    ],
)
def test_prompts_that_cannot_be_used(tokenizer, ids, prompt, message):
    with pytest.raises(UserError, match=message):
        builder_for(tokenizer).integration(prompt, [ids("a")])
