"""The roomy cache against transformers' own, through everything that is done with it."""

import torch
from transformers import AutoModelForCausalLM, DynamicCache, MistralConfig

from gcpo_repro.caches import has_standard_cache, roomy_cache


def grown(cache, steps):
    """The keys that `update` returned, for states that differ in every place."""
    found = []
    for k, (rows, new) in enumerate(steps):
        if new < 0:
            cache.crop(new)
            continue
        states = torch.randn(rows, 2, new, 4, generator=torch.Generator().manual_seed(k))
        found.append(tuple(part.clone() for part in cache.update(states, -states, 0)))
    return found


def test_it_holds_what_transformers_own_holds(tiny_folder):
    """Past its room, cropped and gone on from several times."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    steps = [(3, 5), (3, 1), (3, 2), (3, 9), (3, -10), (3, 4), (3, -1), (3, 1), (3, 40)]
    for room in (0, 3, 100):
        for ours, theirs in zip(
            grown(roomy_cache(model, room), steps), grown(DynamicCache(config=model.config), steps), strict=True
        ):
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_rows_can_be_repeated_and_selected(tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    caches = [roomy_cache(model, 50), DynamicCache(config=model.config)]
    found = []
    for cache in caches:
        grown(cache, [(2, 5)])
        cache.batch_repeat_interleave(2)
        grown(cache, [(4, 1)])
        cache.batch_select_indices(torch.tensor([3, 0]))
        found.append(grown(cache, [(2, 2)])[-1])
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_nothing_is_copied_while_there_is_room(tiny_folder):
    cache = roomy_cache(AutoModelForCausalLM.from_pretrained(tiny_folder), 10)
    places = []
    for new in (5, 1, 9, 1):
        states = torch.ones(1, 2, new, 4)
        cache.update(states, states, 0)
        places.append(cache.layers[0].keys.data_ptr())
    assert places[0] == places[1] == places[2] != places[3]


def test_which_models_have_a_standard_cache(tiny_folder):
    assert has_standard_cache(AutoModelForCausalLM.from_pretrained(tiny_folder))
    config = MistralConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        sliding_window=4,
    )  # fmt: skip
    assert not has_standard_cache(AutoModelForCausalLM.from_config(config))
