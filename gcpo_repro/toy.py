"""The tiny task and its policy: an arithmetic that anyone can train on a laptop.

A question is a chain of three named steps modulo 10, `8a+1b-9c+9?`: start at 8, a adds 1, b takes 9, c adds 9.
A response names each step and the value it reaches, `a9b0c9`, then ends (EOS). It is right when it has that
form and its last digit is the chain's value.

Plain format: question -> response. Integration format: question, `|` + candidate for each of n candidates
(n = 1 ... 8), `!` -> response. A token is one character, so ids can be concatenated without re-tokenising.

The shipped policy (`POLICY`) was trained on both formats by `gcpo_repro.pretraining`; its card says how.
"""

from __future__ import annotations

import itertools
import random
import re
import zlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gcpo_repro.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

POLICY = Path(__file__).resolve().parent / "toy_policy"

STEPS = "abc"
OPERATIONS = "+-"
CANDIDATE_SEPARATOR = "|"
INTEGRATION_SUFFIX = "!"
TEMPLATE = {"candidate_prefix": CANDIDATE_SEPARATOR, "integration_suffix": INTEGRATION_SUFFIX}  # for GCPOConfig, ContextBuilder
MAX_CANDIDATES = 8
RESPONSE_LENGTH = 2 * len(STEPS) + 1  # a name and a digit for each step, then EOS

SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")
ALPHABET = "0123456789" + STEPS + OPERATIONS + "?" + CANDIDATE_SEPARATOR + INTEGRATION_SUFFIX
RESPONSE_FORM = re.compile("".join(f"{name}[0-9]" for name in STEPS))

SPLITS = ("train", "held_out")
_HELD_OUT_EVERY = 5  # one question in five is held out


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of `ALPHABET`, after `<pad>`, `<eos>`, `<unk>`; no token is added to a text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate((*SPECIAL_TOKENS, *ALPHABET))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left", model_max_length=256, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def solve(question: str) -> str:
    """The right response to a question: `solve("8a+1b-9c+9?")` is `"a9b0c9"`. UserError if it is not a question."""
    pattern = "([0-9])" + "".join(f"{name}([{OPERATIONS}])([0-9])" for name in STEPS) + r"\?"
    match = re.fullmatch(pattern, question)
    if match is None:
        raise UserError(f"not a question of the toy task: {question!r}; it looks like '8a+1b-9c+9?'")
    start, *steps = match.groups()
    value, response = int(start), ""
    for name, operation, digit in zip(STEPS, steps[::2], steps[1::2], strict=True):
        value = (value + int(operation + digit)) % 10
        response += f"{name}{value}"
    return response


@cache
def pool(split: str) -> tuple[str, ...]:
    """Every question of a split, in a fixed order: 80,000 questions in all, about one in five held out.

    A question belongs to the split that its CRC-32 says, so the two are disjoint on every machine.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    step = [operation + str(digit) for operation in OPERATIONS for digit in range(10)]
    every = (
        f"{start}" + "".join(map("".join, zip(STEPS, chosen, strict=True))) + "?"
        for start, chosen in itertools.product(range(10), itertools.product(step, repeat=len(STEPS)))
    )
    wanted = split == "held_out"
    return tuple(q for q in every if (zlib.crc32(q.encode()) % _HELD_OUT_EVERY == 0) == wanted)


def questions(split: str, size: int, seed: int) -> list[dict[str, str]]:
    """`size` distinct questions, rows {"prompt": question, "answer": last digit}.

    Args:
        split: "train" or "held_out"; they share no question, and pretraining uses "train" only.
        size: how many, from 1 to all of the split (about 64,000 and 16,000).
        seed: of the generator that draws them; the same seed gives the same rows in the same order.

    Raises:
        UserError: unknown split, or a size that the split cannot give.
    """
    found = pool(split)
    if not 1 <= size <= len(found):
        raise UserError(f"size {size} is impossible: split {split!r} holds {len(found)} questions; choose 1 to that")
    return [{"prompt": q, "answer": solve(q)[-1]} for q in random.Random(seed).sample(found, size)]


def exact_reward(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """1.0 for a right response, else 0.0; the form of a TRL reward function.

    Right means both: the text is, from first to last character, `a` digit `b` digit `c` digit (each step
    once, in order, nothing before, between or after; the empty text is wrong), and the last digit is the answer.
    Values of earlier steps are not compared: the question's value is.

    Args:
        completions: texts without special tokens.
        answer: the right last digit of each, same length (UserError otherwise).
        kwargs: whatever else TRL passes; ignored.
    """
    if len(completions) != len(answer):
        raise UserError(f"{len(completions)} completions but {len(answer)} answers; give one answer for each")
    return [
        float(RESPONSE_FORM.fullmatch(text) is not None and text[-1] == right)
        for text, right in zip(completions, answer, strict=True)
    ]


def integration_prompt(question: str, candidates: list[str]) -> str:
    """The prompt that shows a question's candidates: `question|candidate|candidate!`. Needs one or more."""
    if not candidates:
        raise UserError("an integration prompt needs at least one candidate; got none")
    return question + "".join(CANDIDATE_SEPARATOR + text for text in candidates) + INTEGRATION_SUFFIX


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    generator: torch.Generator,
    max_new_tokens: int = RESPONSE_LENGTH,
    batch_size: int = 512,
) -> list[str]:
    """One completion of each prompt at temperature 1, as text without special tokens.

    Every draw comes from `generator` (on the CPU), so the global random state stays as it was.
    """
    was_training = model.training
    model.eval()
    try:
        texts: list[str] = []
        for first in range(0, len(prompts), batch_size):
            batch = tokenizer(
                prompts[first : first + batch_size], return_tensors="pt", padding=True, padding_side="left"
            ).to(model.device)
            ids = _sample_ids(model, batch.input_ids, batch.attention_mask, generator, max_new_tokens)
            texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts
    finally:
        model.train(was_training)


def _sample_ids(model, ids, mask, generator, max_new_tokens):
    """(B, P) prompts, padded on the left, and their mask -> (B, new) sampled ids, padding after EOS."""
    config = model.config
    drawn, past = [], None
    done = torch.zeros(len(ids), dtype=torch.bool)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for _ in range(max_new_tokens):
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=past,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        past = output.past_key_values
        probabilities = output.logits[:, -1].float().softmax(-1).cpu()
        token = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        token[done] = config.pad_token_id
        drawn.append(token)
        done |= token == config.eos_token_id
        if done.all():
            break
        ids = token[:, None].to(mask.device)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        positions = positions[:, -1:] + 1
    return torch.stack(drawn, 1)


def policy_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    n_questions: int = 512,
    n_samples: int = 8,
    group_sizes: tuple[int, ...] = (2, 4, 8),
    seed: int = 1,
) -> dict[str, dict[str, Any]]:
    """How often a policy is right on held-out questions at temperature 1, with counts.

    Each question gets `n_samples` plain samples; for each n, `n_samples` integrated outputs, the j-th from the
    candidates j, j+1, ... j+n-1 (cyclic); and as many from the next question's candidates ("foreign").

    Args:
        model, tokenizer: any causal model that speaks the task's characters.
        n_questions: held-out questions, at least 2. n_samples: at least the largest group size.
        group_sizes: numbers n of candidates. seed: of the questions and of every draw.

    Returns:
        {"pass@1": score, "integration": {"2": score, ...}, "foreign": {"2": score, ...}},
        a score being {"correct": int, "total": int, "rate": float}.

    Raises:
        UserError: too few questions or samples.
    """
    if n_questions < 2 or n_samples < max(group_sizes, default=1):
        raise UserError(
            f"n_questions {n_questions} must be 2 or more and n_samples {n_samples} at least the largest "
            f"of the group sizes {tuple(group_sizes)}"
        )
    rows = questions("held_out", n_questions, seed)
    generator = torch.Generator().manual_seed(seed)
    repeated = [row for row in rows for _ in range(n_samples)]

    def score(prompts: list[str]) -> tuple[list[str], dict[str, Any]]:
        texts = sample(model, tokenizer, prompts, generator)
        correct = int(sum(exact_reward(texts, [row["answer"] for row in repeated])))
        return texts, {"correct": correct, "total": len(texts), "rate": round(correct / len(texts), 4)}

    texts, plain = score([row["prompt"] for row in repeated])
    result: dict[str, dict[str, Any]] = {"pass@1": plain, "integration": {}, "foreign": {}}
    for n in group_sizes:
        for name, shift in (("integration", 0), ("foreign", 1)):
            prompts = [
                integration_prompt(
                    row["prompt"],
                    [texts[(k + shift) % n_questions * n_samples + (j + m) % n_samples] for m in range(n)],
                )
                for k, row in enumerate(rows)
                for j in range(n_samples)
            ]
            result[name][str(n)] = score(prompts)[1]
    return result


def pretrain(out: str | Path = POLICY, seed: int = 0, threads: int | None = None, **options: Any) -> dict[str, Any]:
    """Make the policy folder again from nothing: `gcpo_repro.pretraining.pretrain`, which see."""
    from gcpo_repro import pretraining

    return pretraining.pretrain(out, seed=seed, threads=threads, **options)
