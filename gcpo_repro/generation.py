"""Sampling from the policy: behind contexts that it has read before, and with the states that sampling leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .caches import roomy_cache
from .scoring import Ids, Reader, StateCapture, Trunks, padded


def generate_behind_prefixes(
    reader: Reader, model: Any, contexts: list[Ids], limit: int, config: Any, trunks: Trunks | None = None,
    trunk_of: Sequence[int] = (), states: bool = False,
) -> tuple[list[Ids], Tensor | None]:  # fmt: skip
    """One response to each of N contexts, of at most `limit` tokens, up to and with the first of `reader.end_ids`.

    Needs a cache that can be repeated (`caches.has_standard_cache`).

    Args:
        model: a causal language model in evaluation mode, under no_grad.
        config: its generation settings (temperature, top_p …), whose max_new_tokens is `limit` for this call.
        trunks, trunk_of: what has been read already, and with which of them each context begins; so L integrated outputs
            cost no reading of the group. None: equal neighbours among the contexts are read once.
        states: return the last layer's states (N, H) at the responses' last tokens as well, in float32. They cost one more
            decoding step: the keys and values of everything before are there.
    """
    runs = [(list(ids), sum(1 for _ in run)) for ids, run in groupby(map(tuple, contexts))]
    if trunks is None and reader.agree(len(contexts) - len(runs)):
        trunks = Trunks(reader, model, [ids for ids, _ in runs])
        trunk_of = [k for k, (_, count) in enumerate(runs) for _ in range(count)]
    ids, seen = padded(contexts, reader.pad_id, "left")
    cache: Any = roomy_cache(model, limit)
    if trunks is not None:
        # `generate` reads what the cache lacks: at least one token.
        known = [min(trunks.shared(g, row), len(row) - 1) for g, row in zip(trunk_of, contexts, strict=True)]
        cache, seen = trunks.behind(trunk_of, known, limit)
        first = torch.full_like(seen, reader.pad_id)
        first[seen.bool()] = torch.tensor([token for k, row in zip(known, contexts, strict=True) for token in row[:k]])
        rest, more = padded([row[k:] for k, row in zip(known, contexts, strict=True)], reader.pad_id, "left")
        ids, seen = torch.cat([first, rest], 1), torch.cat([seen, more], 1)
    ids, seen = ids.to(reader.device), seen.to(reader.device)
    longest, config.max_new_tokens = config.max_new_tokens, limit
    try:
        output = model.generate(input_ids=ids, attention_mask=seen, past_key_values=cache, generation_config=config)
    finally:
        config.max_new_tokens = longest
    responses = []
    for row in output[:, ids.shape[1] :].tolist():
        end = next((j for j, token in enumerate(row) if token in reader.end_ids), len(row) - 1)
        responses.append(row[: end + 1])
    return responses, _last_states(model, cache, seen, responses) if states else None


def _last_states(model: Any, cache: Any, seen: Tensor, responses: list[Ids]) -> Tensor:
    """Reads each response's last token once more, at its place, behind the keys and values of what stands before it."""
    lengths = torch.tensor([len(response) for response in responses], device=seen.device)
    columns = torch.arange(cache.get_seq_length() - seen.shape[1], device=seen.device)
    earlier = (columns < lengths[:, None] - 1).to(seen)
    mask = torch.cat([seen, earlier, torch.ones_like(seen[:, :1])], 1)
    with StateCapture(model) as capture:
        model(
            input_ids=torch.tensor([response[-1:] for response in responses], device=seen.device), attention_mask=mask,
            position_ids=(seen.sum(1) + lengths - 1)[:, None], past_key_values=cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        assert capture.states is not None
        return capture.states[:, -1].float()
