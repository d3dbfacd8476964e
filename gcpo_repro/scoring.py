"""Reading candidates under contexts: token log-probabilities and the hidden states that GCPO compares.

φ(q, y), the paper's feature, is the last layer's state (after the final norm) when the policy reads q followed by y, at the
last token of y, end-of-sequence included. One map for candidates and rollouts alike (paper.md §3, step 3).

`score_colliders` has three backends that agree to rounding. "naive" reads every context whole, one sequence at a time and
without padding: the oracle. "batched" does so with many at once. "prefix" computes no keys and values twice: the contexts
x_{i,l} of candidate i share all but y_{n,l}, and what stands before y_i's place they share with the group's integration
prompt, the `Trunks`. So n (n − 1) / 2 candidates are read again for the contexts of a group, not n (n − 1) or L n (n − 1).

B rows (candidates), L integrated outputs, T tokens of the longest candidate, H features.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .caches import has_standard_cache, roomy_cache

BACKENDS = ("prefix", "batched", "naive")
FEATURE_TOKENS = ("last", "last_content", "mean")

Ids = list[int]
# (ids, attention mask, positions, cache or None, tokens of the response) -> log-probs (N, T), hidden states (N, S, H)
Forward = Callable[[Tensor, Tensor, Tensor, Any, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Scores:
    """What one pass over N pairs (context, response) gives; T is the longest response."""

    logps: Tensor  # (N, T) log π(y_ij | context, y_i,<j); 0 after the response's end
    mask: Tensor  # (N, T) 1 where the response has a token
    context_state: Tensor  # (N, H) state at the last token of the context
    response_state: Tensor  # (N, H) φ(context, response)


@dataclass(frozen=True)
class Reader:
    """How the policy is read.

    Args:
        forward: `policy_forward(model)`, or a trainer's own.
        pad_id: fills up rows of different length; it is masked, so any id will do.
        tokens: of one forward pass, padding included: the memory budget. A longer row is read alone.
        device: where the ids go.
        feature_token: which state is φ: "last" (the paper's), "last_content" (the last before the end-of-sequence tokens),
            or "mean" (over the response's tokens). The latter two are extensions.
        end_ids: end-of-sequence tokens, for "last_content".
        agree: the greatest of a number over all processes, so that all of them make equally many passes.
    """

    forward: Forward
    pad_id: int
    tokens: int = 4096
    device: torch.device | str = "cpu"
    feature_token: str = "last"
    end_ids: tuple[int, ...] = ()
    agree: Callable[[int], int] = int

    def chunks(self, count: int, width: int) -> Iterator[slice]:
        """Slices of `count` rows of `width` tokens each, within the budget."""
        rows = max(1, self.tokens // max(1, self.agree(width)))
        for start in range(0, count, rows):
            yield slice(start, min(start + rows, count))

    def feature(self, states: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """States (N, T, H) of the response's tokens, its ids and mask (N, T) -> φ (N, H)."""
        mask = mask.to(states.device)
        if self.feature_token == "mean":
            return (states.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        last = mask.sum(1) - 1
        if self.feature_token == "last_content":
            content = mask.bool() & ~torch.isin(ids, torch.tensor(self.end_ids, device=ids.device)).to(mask.device)
            positions = torch.arange(mask.shape[1], device=mask.device)
            last = torch.where(content.any(1), (content * positions).amax(1), last)
        return states[torch.arange(len(states), device=states.device), last].float()


def score(reader: Reader, contexts: Sequence[Ids], responses: Sequence[Ids], width: int = 0) -> Scores:
    """Score N pairs. Contexts are padded on the left, responses on the right, as TRL does.

    Args:
        reader: how.
        contexts, responses: N each, at least one token in every row.
        width: pad responses to this T instead of to the longest.

    Raises:
        ValueError: a context or a response without tokens, or lists of different lengths.
    """
    if len(contexts) != len(responses):
        raise ValueError(f"contexts and responses: {len(contexts)} and {len(responses)} rows; give as many of each")
    if not contexts or not all(contexts) or not all(responses):
        raise ValueError("contexts, responses: every row needs at least one token")
    width = max(width, *map(len, responses))
    longest = max(map(len, contexts)) + width
    parts = [
        _score_chunk(reader, contexts[part], responses[part], width) for part in reader.chunks(len(contexts), longest)
    ]
    return Scores(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _score_chunk(
    reader: Reader, contexts: Sequence[Ids], responses: Sequence[Ids], width: int, cache: Any = None, seen: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Rows [cached | context | response], with the cached part's mask `seen` (N, P) where there is one."""
    left, left_mask = padded(contexts, reader.pad_id, "left")
    right, mask = padded(responses, reader.pad_id, "right", width)
    ids, own = torch.cat([left, right], 1), torch.cat([left_mask, mask], 1)
    attention = own if seen is None else torch.cat([seen.cpu(), own], 1)
    positions = (attention.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    ids, attention, positions, mask = (tensor.to(reader.device) for tensor in (ids, attention, positions, mask))
    logps, states = reader.forward(ids, attention, positions, cache, width)  # (N, T), (N, S, H)
    start = left.shape[1]
    return (
        torch.where(mask.bool(), logps.float(), 0.0), mask, states[:, start - 1].float(),
        reader.feature(states[:, start:], ids[:, start:], mask),
    )  # fmt: skip


def padded(rows: Sequence[Ids], pad_id: int, side: str, width: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and mask, (N, longest row or `width`) each, filled up on the "left" or on the "right"."""
    width = max(width, max(map(len, rows)))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for k, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[k, place] = torch.tensor(row, dtype=torch.long)
        mask[k, place] = 1
    return ids, mask


class Trunks:
    """The keys and values of G token sequences; other sequences that begin like one of them can go on from there.

    Reading them all takes the memory of G rows for as long as this lives. `model` must have a standard cache.
    """

    def __init__(self, reader: Reader, model: Any, sequences: Sequence[Ids]) -> None:
        self.sequences = [list(ids) for ids in sequences]
        self.model = model
        # Every process makes as many passes: the first sequence stands in for those that this one lacks.
        count, width = reader.agree(len(sequences)), max(map(len, sequences))
        rows = [*self.sequences, *[self.sequences[0]] * (count - len(sequences))]
        caches = []
        for part in reader.chunks(count, width):
            ids, seen = padded(rows[part], reader.pad_id, "left", width)
            caches.append(DynamicCache(config=model.config))
            _fill(reader, model, caches[-1], ids, seen)
        self.seen = padded(self.sequences, reader.pad_id, "left")[1]  # (G, P)
        self.layers = [
            (torch.cat([layer.keys for layer in layers]), torch.cat([layer.values for layer in layers]))
            for layers in zip(*(cache.layers for cache in caches), strict=True)
        ]  # (G, heads, P, features of a head)

    def shared(self, trunk: int, ids: Ids) -> int:
        """How many tokens `ids` has in common with the beginning of that trunk."""
        pairs = zip(self.sequences[trunk], ids, strict=False)
        return next((k for k, (one, other) in enumerate(pairs) if one != other), min(len(self.sequences[trunk]), len(ids)))

    def behind(self, trunks: Sequence[int], lengths: Sequence[int], room: int) -> tuple[DynamicCache, Tensor]:
        """A cache of N rows that have read the first `lengths` tokens of `trunks`, and the mask (N, P') of what they see.

        With room for so many tokens more.
        """
        rows = torch.tensor(trunks)
        ends = self.seen.shape[1] - self.seen.sum(1)[rows] + torch.tensor(lengths)  # columns; padding is on the left
        width = int(ends.max())
        seen = self.seen[rows, :width] * (torch.arange(width) < ends[:, None])
        cache = roomy_cache(self.model, room)
        for k, (keys, values) in enumerate(self.layers):
            here = rows.to(keys.device)
            cache.update(keys[here, :, :width], values[here, :, :width], k)
        return cache, seen


def _fill(reader: Reader, model: Any, cache: Any, ids: Tensor, seen: Tensor) -> None:
    """Read `ids` (N, S) into the cache; `seen` (N, P + S) covers what it holds already."""
    positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    ids, seen, positions = (tensor.to(reader.device) for tensor in (ids, seen, positions))
    # One logit only: what is wanted are the keys and values.
    model(
        input_ids=ids, attention_mask=attention_mask(model, seen, ids.shape[1]), position_ids=positions, past_key_values=cache,
        use_cache=True, logits_to_keep=1,
    )  # fmt: skip


def attention_mask(model: Any, seen: Tensor, S: int) -> Tensor:
    """What `model` takes for `seen` (N, K), the mask of all keys, where the last S of them are the queries.

    On a CPU, a quarter of the time of reading went into masks: transformers builds one from `seen`, and torch turns it into
    numbers again in every layer. Here it is made once, (N, 1, S, K), 0 where a query sees a key.
    """
    if model.config._attn_implementation != "sdpa" or seen.device.type != "cpu" or model.dtype != torch.float32:
        return seen
    causal = torch.ones(S, seen.shape[1], dtype=torch.bool).tril(seen.shape[1] - S)
    return torch.where(causal & seen.bool()[:, None, None], 0.0, torch.finfo(torch.float32).min)


def score_colliders(
    reader: Reader, prefixes: Sequence[Ids], ends: Sequence[Sequence[Ids]], responses: Sequence[Ids], backend: str = "prefix",
    model: Any = None, trunks: Trunks | None = None, trunk_of: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Read each candidate y_i behind its L contexts x_{i,l} = prefix_i + end_{i,l}.

    Args:
        reader: how.
        prefixes: B token lists, what all contexts of a row share; ends: (B, L) token lists, none empty; responses: the B y_i.
        backend: one of `BACKENDS`. model: the policy, which "prefix" fills its cache with.
        trunks, trunk_of: for "prefix": what has been read already, and with which of them each prefix begins. Whatever
            they are, the result is the same. None: the prefixes themselves.

    Returns:
        log π(y_ij | x_{i,l}, y_i,<j) (B, L, T), 0 after the candidate's end, and the states at the contexts' ends (B, L, H).

    Raises:
        ValueError: an unknown backend, "prefix" without a model, lists of different lengths.
    """
    B, L = len(prefixes), len(ends[0])
    if backend not in BACKENDS or (backend == "prefix" and model is None):
        raise ValueError(f"backend: {backend!r} must be one of {BACKENDS}, and 'prefix' needs the model")
    if not len(ends) == len(responses) == B or any(len(row) != L for row in ends):
        raise ValueError(f"prefixes, ends, responses: {B}, {len(ends)}, {len(responses)} rows; give as many, L ends in each")
    if backend == "prefix" and not has_standard_cache(model):
        warnings.warn("scoring: this model's cache can't be cropped, so every context is read whole (slower)", stacklevel=2)
        backend = "batched"
    if backend == "prefix":
        trunks = trunks or Trunks(reader, model, prefixes)
        return _score_behind_prefixes(reader, prefixes, ends, responses, model, trunks, trunk_of or range(B))
    width = max(map(len, responses))
    contexts = [[*prefix, *end] for prefix, row in zip(prefixes, ends, strict=True) for end in row]
    repeated = [y for y in responses for _ in range(L)]
    if backend == "batched":
        scores = score(reader, contexts, repeated, width)
        return scores.logps.view(B, L, -1), scores.context_state.view(B, L, -1)
    single = [score(reader, [context], [y], len(y)) for context, y in zip(contexts, repeated, strict=True)]
    logps = torch.stack([nn.functional.pad(s.logps[0], (0, width - s.logps.shape[1])) for s in single])
    return logps.view(B, L, -1), torch.cat([s.context_state for s in single]).view(B, L, -1)


def _score_behind_prefixes(reader, prefixes, ends, responses, model, trunks, trunk_of):
    B, L, width = len(prefixes), len(ends[0]), max(map(len, responses))
    shared = [trunks.shared(g, prefix) for g, prefix in zip(trunk_of, prefixes, strict=True)]
    # Rows with as much left to read side by side: they are padded to the longest of a pass.
    order = sorted(range(B), key=lambda k: len(prefixes[k]) - shared[k], reverse=True)
    longest = max(map(len, prefixes)) + max(len(end) for row in ends for end in row) + width
    logps, states = [], []
    for part in reader.chunks(B, longest):
        rows = order[part]
        left = [prefixes[k][shared[k] :] for k in rows]
        remaining, end = reader.agree(max(map(len, left))), max(len(end) for k in rows for end in ends[k])
        cache, seen = trunks.behind([trunk_of[k] for k in rows], [shared[k] for k in rows], remaining + end + width)
        if remaining:
            ids, more = padded(left, reader.pad_id, "left", remaining)
            seen = torch.cat([seen, more], 1)
            _fill(reader, model, cache, ids, seen)
        columns = []
        for l in range(L):
            here = [ends[k][l] for k in rows]
            columns.append(_score_chunk(reader, here, [responses[k] for k in rows], width, cache, seen))
            cache.crop(-(max(map(len, here)) + width))  # back to the prefix
        logps.append(torch.stack([column[0] for column in columns], 1))
        states.append(torch.stack([column[2] for column in columns], 1))
    back = torch.tensor(order).argsort().to(reader.device)
    return torch.cat(logps)[back], torch.cat(states)[back]


def policy_forward(model: nn.Module, temperature: float = 1.0) -> Forward:
    """The `Reader.forward` of any causal language model of transformers, outside a trainer; call it under no_grad."""
    policy: Any = model

    def forward(ids: Tensor, seen: Tensor, positions: Tensor, cache: Any, width: int) -> tuple[Tensor, Tensor]:
        with eval_mode(model), StateCapture(model) as capture:
            logits = policy(
                input_ids=ids, attention_mask=attention_mask(model, seen, ids.shape[1]), position_ids=positions,
                past_key_values=cache, use_cache=cache is not None, logits_to_keep=width + 1,
            ).logits  # fmt: skip
            assert capture.states is not None
            states = capture.states
        logps = (logits[:, :-1].float() / temperature).log_softmax(-1)
        return logps.gather(2, ids[:, -width:, None])[..., 0], states

    return forward


class StateCapture:
    """Context manager: keeps the output of the backbone's latest forward pass, (N, S, H), in `.states`.

    The hook sits on the backbone, below the language-model head, so it works with TRL's fused head, with LoRA and
    with quantised weights alike, and its states are those after the final norm.
    """

    def __init__(self, model: nn.Module) -> None:
        wrapped: Any = model
        causal_lm = wrapped.get_base_model() if hasattr(model, "peft_config") else wrapped
        self.backbone: nn.Module = causal_lm.base_model
        self.states: Tensor | None = None

    def __enter__(self) -> StateCapture:
        self.handle = self.backbone.register_forward_hook(self._keep)
        return self

    def __exit__(self, *exception: object) -> None:
        self.handle.remove()
        self.states = None

    def _keep(self, module: nn.Module, arguments: object, output: Any) -> None:
        self.states = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout and without gradient checkpointing: the small residuals must not drown in noise."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def has_dropout(model: Any) -> bool:
    """Whether a pass in training mode differs from one in evaluation mode."""
    layers = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    return layers or getattr(model.config.get_text_config(), "attention_dropout", 0) > 0
