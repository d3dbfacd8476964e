"""Sampling answers in batches and counting the right ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..data import Reward, prompt_ids


@dataclass(frozen=True)
class Counts:
    """What an evaluation keeps: per question, how many of `samples` answers were right, unscorable, or cut off."""

    correct: list[int]
    unscorable: list[int]
    truncated: list[int]
    samples: int
    seed: int

    @property
    def pass_at_1(self) -> float:
        """Right answers over all answers (unscorable ones count as wrong)."""
        return sum(self.correct) / (self.samples * len(self.correct))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], reward: Reward, samples: int,
    max_new_tokens: int, seed: int, temperature: float = 1.0, batch_size: int = 256,
) -> Counts:  # fmt: skip
    """Draw `samples` answers to each row's prompt and count those whose reward is at least 1.

    Args:
        model, tokenizer: a causal language model, with adapters or not.
        rows: {"prompt", …}; all other columns go to the reward function.
        reward: TRL's form.
        seed: of the sampling alone; the global random state is put back, so training is not disturbed.
        temperature: of the sampling; the paper states none.
        batch_size: answers generated at a time.
    """
    device = next(model.parameters()).device
    texts = [prompt_ids(row["prompt"], tokenizer) for row in rows]
    order = sorted(range(len(rows) * samples), key=lambda k: len(texts[k // samples]))  # little padding
    correct, unscorable, truncated = ([0] * len(rows) for _ in range(3))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), _evaluating(model):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            chunk = [k // samples for k in order[start : start + batch_size]]
            responses = _generate(model, tokenizer, [texts[q] for q in chunk], max_new_tokens, temperature, device)
            values = _rewards(reward, tokenizer, rows, chunk, responses)
            complete = torch.isin(responses, torch.tensor(end_ids(model, tokenizer))).any(1).tolist()
            for q, value, ended in zip(chunk, values, complete, strict=True):
                correct[q] += value is not None and value >= 1
                unscorable[q] += value is None or value != value
                truncated[q] += not ended
    return Counts(correct, unscorable, truncated, samples, seed)


def _generate(model, tokenizer, contexts, max_new_tokens, temperature, device):
    width = max(map(len, contexts))
    ids = torch.full((len(contexts), width), tokenizer.pad_token_id)
    for row, context in enumerate(contexts):
        ids[row, width - len(context) :] = torch.tensor(context)
    seen = torch.zeros_like(ids)
    for row, context in enumerate(contexts):
        seen[row, width - len(context) :] = 1
    output = model.generate(
        input_ids=ids.to(device), attention_mask=seen.to(device), do_sample=True, temperature=temperature, top_k=0,
        top_p=1.0, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return output[:, width:].cpu()


def _rewards(reward, tokenizer, rows, chunk, responses):
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    chat = not isinstance(rows[chunk[0]]["prompt"], str)
    completions = [[{"role": "assistant", "content": t}] for t in texts] if chat else texts
    columns = {key: [rows[q][key] for q in chunk] for key in rows[chunk[0]] if key != "prompt"}
    return reward(prompts=[rows[q]["prompt"] for q in chunk], completions=completions, **columns)


def end_ids(model, tokenizer) -> list[int]:
    """Token ids that end an answer: the model's own (a chat model may have several) and the tokenizer's."""
    declared = model.generation_config.eos_token_id
    declared = [declared] if isinstance(declared, int) else declared or []
    return sorted({tokenizer.eos_token_id, *declared})


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
