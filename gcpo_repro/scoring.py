"""Reading responses under contexts: token log-probabilities and the hidden states that GCPO compares.

φ(q, y), the paper's feature, is the last layer's state (after the final norm) at the last token of y, end-of-sequence
included, when the policy reads q followed by y. One map for candidates and rollouts alike (paper.md §3, step 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# (input_ids, attention_mask, tokens of the response) -> log-probs (N, T), hidden states (N, S, H)
Forward = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Scores:
    """What one pass over N pairs (context, response) gives; T is the longest response, H the hidden size."""

    logps: Tensor  # (N, T) log π(y_ij | context, y_i,<j); 0 after the response's end
    mask: Tensor  # (N, T) 1 where the response has a token
    context_state: Tensor  # (N, H) state at the last token of the context
    response_state: Tensor  # (N, H) state at the last token of the response: φ(context, response)


def score(
    forward: Forward, contexts: Sequence[list[int]], responses: Sequence[list[int]], pad_id: int, rows: int,
    device: torch.device | str = "cpu",
) -> Scores:  # fmt: skip
    """Score N pairs, `rows` at a time. Contexts are padded on the left, responses on the right, as TRL does.

    Raises:
        ValueError: a context or a response without tokens, or lists of different lengths.
    """
    if len(contexts) != len(responses):
        raise ValueError(f"contexts and responses: {len(contexts)} and {len(responses)} rows; give as many of each")
    if not contexts or not all(contexts) or not all(responses):
        raise ValueError("contexts, responses: every row needs at least one token")
    width = max(map(len, responses))
    parts = [
        _score_chunk(forward, contexts[k : k + rows], responses[k : k + rows], width, pad_id, device)
        for k in range(0, len(contexts), rows)
    ]
    return Scores(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _score_chunk(forward, contexts, responses, width, pad_id, device):
    start = max(map(len, contexts))  # column of the first response token
    ids = torch.full((len(contexts), start + width), pad_id, dtype=torch.long)
    seen = torch.zeros_like(ids)
    for row, (context, response) in enumerate(zip(contexts, responses, strict=True)):
        left, right = start - len(context), start + len(response)
        ids[row, left:right] = torch.tensor(context + response)
        seen[row, left:right] = 1
    ids, seen = ids.to(device), seen.to(device)
    logps, states = forward(ids, seen, width)  # (N, T), (N, S, H)
    mask = seen[:, start:]
    ends = start + mask.sum(1) - 1
    row_index = torch.arange(len(ids), device=states.device)
    return (
        torch.where(mask.bool(), logps.float(), 0.0), mask,
        states[:, start - 1].float(), states[row_index, ends.to(states.device)].float(),
    )  # fmt: skip


def policy_forward(model: nn.Module, temperature: float = 1.0) -> Forward:
    """A forward pass for `score` with any causal language model of transformers, outside a trainer; call it under no_grad."""
    policy: Any = model

    def forward(ids: Tensor, seen: Tensor, width: int) -> tuple[Tensor, Tensor]:
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        with eval_mode(model), StateCapture(model) as capture:
            logits = policy(input_ids=ids, attention_mask=seen, position_ids=positions, logits_to_keep=width + 1).logits
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
