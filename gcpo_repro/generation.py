"""Sampling from the policy where several responses follow the same context."""

from __future__ import annotations

from collections.abc import Collection
from itertools import groupby
from typing import Any

import torch
from transformers import DynamicCache

from .scoring import Ids, padded


def generate_behind_prefixes(
    model: Any, contexts: list[Ids], limit: int, config: Any, pad_id: int, end_ids: Collection[int]
) -> list[Ids]:
    """One response to each context, of at most `limit` tokens, up to and with the first of `end_ids`.

    Equal neighbours among the contexts are read once, and their keys and values repeated; so L integrated outputs cost one
    reading of the group. Needs a cache that can be repeated (`scoring.has_standard_cache`).

    Args:
        model: a causal language model in evaluation mode, under no_grad.
        config: its generation settings (temperature, top_p …), whose max_new_tokens is `limit` for this call.
        pad_id: fills up contexts of different length; it is masked.
    """
    runs = [(list(ids), sum(1 for _ in run)) for ids, run in groupby(map(tuple, contexts))]
    ids, seen = (tensor.to(model.device) for tensor in padded([ids for ids, _ in runs], pad_id, "left"))
    repeats = torch.tensor([count for _, count in runs], device=ids.device)
    rows = torch.repeat_interleave(torch.arange(len(runs), device=ids.device), repeats)
    cache = DynamicCache(config=model.config)
    if ids.shape[1] > 1 and len(runs) < len(contexts):
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        model(  # all but the last token, which `generate` reads itself
            input_ids=ids[:, :-1], attention_mask=seen[:, :-1], position_ids=positions[:, :-1], past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        cache.batch_select_indices(rows)
    longest, config.max_new_tokens = config.max_new_tokens, limit
    try:
        output = model.generate(
            input_ids=ids[rows], attention_mask=seen[rows], past_key_values=cache, generation_config=config
        )
    finally:
        config.max_new_tokens = longest
    responses = []
    for row in output[:, ids.shape[1] :].tolist():
        end = next((j for j, token in enumerate(row) if token in end_ids), len(row) - 1)
        responses.append(row[: end + 1])
    return responses
