"""Sampling answers in batches and counting the right ones."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..data import prompt_ids
from ..errors import UserError
from ..rewards import Reward
from ..scoring import eval_mode


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
    ids = [prompt_ids(row["prompt"], tokenizer) for row in rows]
    asked = [q for q in range(len(rows)) for _ in range(samples)]
    responses = respond(model, tokenizer, [ids[q] for q in asked], max_new_tokens, seed, temperature, batch_size)
    correct, unscorable, truncated = ([0] * len(rows) for _ in range(3))
    ends = end_ids(model, tokenizer)
    for q, value, response in zip(asked, rewards_of(reward, tokenizer, rows, asked, responses), responses, strict=True):
        correct[q] += value is not None and value >= 1
        unscorable[q] += value is None or value != value
        truncated[q] += response[-1] not in ends
    return Counts(correct, unscorable, truncated, samples, seed)


def respond(
    model: Any, tokenizer: Any, contexts: list[list[int]], max_new_tokens: int, seed: int, temperature: float = 1.0,
    batch_size: int = 256, top_p: float = 1.0,
) -> list[list[int]]:  # fmt: skip
    """One sampled response to each context (token ids), as token ids up to and with the first one that ends an answer.

    Args:
        model, tokenizer: a causal language model, with adapters or not.
        contexts: what the model reads, each at least one token; read in the order of their lengths, for little padding.
        max_new_tokens: longest response. temperature: of the sampling, 0 takes the likeliest token.
        batch_size: responses written at a time. top_p: share of the probability that is drawn from, the likeliest first.
        seed: of the sampling alone; the global random state is put back, so training is not disturbed.
    """
    device = next(model.parameters()).device
    ends = set(end_ids(model, tokenizer))
    order = sorted(range(len(contexts)), key=lambda k: len(contexts[k]))
    responses: list[list[int]] = [[] for _ in contexts]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad(), eval_mode(model):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            written = _generate(model, tokenizer, [contexts[k] for k in chunk], max_new_tokens, temperature, top_p, device)
            for k, ids in zip(chunk, written.tolist(), strict=True):
                end = next((j for j, token in enumerate(ids) if token in ends), len(ids) - 1)
                responses[k] = ids[: end + 1]
    return responses


def _generate(model, tokenizer, contexts, max_new_tokens, temperature, top_p, device):
    width = max(map(len, contexts))
    ids = torch.full((len(contexts), width), tokenizer.pad_token_id)
    seen = torch.zeros_like(ids)
    for row, context in enumerate(contexts):
        ids[row, width - len(context) :] = torch.tensor(context)
        seen[row, width - len(context) :] = 1
    draw = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": top_p} if temperature else {"do_sample": False}
    output = model.generate(
        input_ids=ids.to(device), attention_mask=seen.to(device), max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id, **draw,
    )  # fmt: skip
    return output[:, width:].cpu()


def rewards_of(
    reward: Reward, tokenizer: Any, rows: list[dict[str, Any]], asked: list[int], responses: list[list[int]]
) -> list[float | None]:
    """The reward of each response, `responses[k]` answering the question `rows[asked[k]]`; None or NaN is unscorable.

    Raises:
        UserError: a reward function that fails, or returns the wrong number of values, an infinite one, or none usable.
    """
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    chat = not isinstance(rows[asked[0]]["prompt"], str)
    completions = [[{"role": "assistant", "content": t}] for t in texts] if chat else texts
    columns = {key: [rows[q][key] for q in asked] for key in rows[asked[0]] if key != "prompt"}
    name = getattr(reward, "__name__", type(reward).__name__)
    try:
        values = reward(prompts=[rows[q]["prompt"] for q in asked], completions=completions, **columns)
        numbers = [None if value is None else float(value) for value in values]
    except Exception as error:
        raise UserError(
            f"reward: {name} failed with {type(error).__name__}: {error}; return one number per completion, None where an "
            "answer cannot be scored"
        ) from error
    if len(numbers) != len(asked):
        raise UserError(f"reward: {name} returned {len(numbers)} values for {len(asked)} completions; return one for each")
    if any(number is not None and math.isinf(number) for number in numbers):
        raise UserError(f"reward: {name} returned an infinite value; return finite numbers, or None")
    if all(number is None or math.isnan(number) for number in numbers):
        raise UserError(f"reward: {name} scored none of {len(asked)} answers (all None or NaN); check the answer column")
    return numbers


def end_ids(model, tokenizer) -> list[int]:
    """Token ids that end an answer: the model's own (a chat model may have several) and the tokenizer's."""
    declared = model.generation_config.eos_token_id
    declared = [declared] if isinstance(declared, int) else declared or []
    return sorted({tokenizer.eos_token_id, *declared})
