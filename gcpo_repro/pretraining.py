"""How the toy policy is made: three minutes of supervised learning from a demonstrator that errs on purpose.

The demonstrator's law is known, so the targets are its probabilities and not its samples: the policy ends within
about 0.01 nats of the law whatever the order of the floating-point sums, and a rerun scores the same.

What made it work: heads of the first layer start by looking 1, 2 and 3 tokens back;
many integration examples show candidates that are mostly random, so that a response must follow candidates in
its own state; every candidate's digits are predicted too. In the last tenth the weights of the linear layers are
rounded to NF4 in each forward pass, and the policy ships rounded: loading it as NF4 changes next to nothing.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

from . import provenance, toy, toy_card
from .demonstrator import Examples, Recipe
from .errors import UserError

FILES = {
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja", "scores.json", "README.md",
}  # fmt: skip


def build_model(recipe: Recipe) -> Qwen2ForCausalLM:
    """A small Qwen2 with random weights (from torch's global generator) and three heads that look back."""
    tokenizer = toy.build_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=recipe.hidden, intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    model.generation_config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    _look_back(model.model.layers[0].self_attn, recipe.hidden // recipe.heads)
    return model


def _look_back(attention: Any, width: int, peak: float = 12.0, pairs: int = 4) -> None:
    """Set biases so that heads 0, 1, 2 attend to 1, 2, 3 tokens back.

    Under rotary positions two biases r·(1, 0) and r·(cos ωd, −sin ωd) score r² cos ω(Δ − d) at distance Δ, which
    is greatest at Δ = d; r² makes `peak` nats of the pair with the highest frequency ω.
    """
    frequency = 10000.0 ** (-torch.arange(pairs) * 2 / width)
    radius = math.sqrt(peak * math.sqrt(width))
    keys = attention.k_proj.bias.data.zero_().view(-1, width)
    queries = attention.q_proj.bias.data.zero_().view(-1, width)
    keys[:, :pairs] = radius
    for head in range(3):
        queries[head, :pairs] = radius * torch.cos(frequency * (head + 1))
        queries[head, width // 2 : width // 2 + pairs] = -radius * torch.sin(frequency * (head + 1))


NF4_LEVELS = torch.tensor([
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
])  # fmt: skip  # QLoRA (arXiv 2305.14314), appendix E


def round_to_nf4(weight: Tensor, block: int = 64) -> Tensor:
    """The nearest weights that NF4 can hold (blocks of 64, exact block maxima), same shape. Rounding twice is once."""
    blocks = weight.reshape(-1, block)
    largest = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12)
    nearest = torch.bucketize(blocks / largest, (NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2)
    return (NF4_LEVELS[nearest] * largest).view_as(weight)


def train(recipe: Recipe, seed: int, progress: bool = True) -> Qwen2ForCausalLM:
    """Pretrain from nothing; the global random state is left as it was. The weights come back rounded to NF4.

    Whether a policy learns to follow candidates in its own state is settled within 100 steps, and one start in about
    eight does not; it would need far more steps, so it is given up for a new one (`Recipe.check_share`).
    """
    generator = torch.Generator().manual_seed(seed)
    examples = Examples(recipe, generator)
    quiet = 0.5 if sys.stderr.isatty() else 30.0
    with tqdm(desc="pretraining", disable=not progress, mininterval=quiet, maxinterval=2 * quiet) as bar:
        for attempt in range(recipe.attempts):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + 1_000_003 * attempt)  # transformers initialises from the global generator
                model = build_model(recipe).train()
            bar.reset(total=recipe.steps)
            if _run(model, examples, recipe, bar, may_give_up=attempt + 1 < recipe.attempts):
                break
            bar.set_description(f"pretraining, start {attempt + 2}")  # the first did not learn to follow candidates
    return model.eval()


def _run(model: Qwen2ForCausalLM, examples: Examples, recipe: Recipe, bar: tqdm, may_give_up: bool) -> bool:
    """All steps, in place; False if given up."""
    linear: list[Tensor] = [m.weight for m in model.model.modules() if isinstance(m, nn.Linear)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / 40) * max(0.01, (1 + math.cos(math.pi * step / recipe.steps)) / 2),
    )
    for step in range(recipe.steps):
        if may_give_up and step == round(recipe.check_share * recipe.steps) and examples.lost(model) > 0.7:
            return False
        exact = [weight.data for weight in linear]
        if step >= recipe.steps * (1 - recipe.nf4_share):
            _round_all(linear)  # the gradient at the rounded weights moves the exact ones
        optimizer.zero_grad()
        loss = _backward(model, examples, recipe, step / recipe.steps)
        for weight, data in zip(linear, exact, strict=True):
            weight.data = data
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update()
    _round_all(linear)
    return True


def _round_all(weights: list[Tensor]) -> None:
    for weight in weights:
        weight.data = round_to_nf4(weight.data)


def _backward(model: nn.Module, examples: Examples, recipe: Recipe, done: float) -> float:
    """Gradients of one step when a share `done` of them is behind; returns the plain format's loss."""
    plain = examples.loss(model, 0, 48, 0.0)
    plain.backward()
    largest = 3 + (toy.MAX_CANDIDATES - 3) * min(1.0, done / recipe.grow_share)
    n = 1 + int(largest * torch.rand(1, generator=examples.generator).item())
    random_share = min(1.0, max(0.0, 2.2 * (1 - done / recipe.random_until)))
    length = examples.questions.shape[1] + (n + 1) * toy.RESPONSE_LENGTH + 1
    examples.loss(model, min(n, toy.MAX_CANDIDATES), max(16, recipe.tokens // length), random_share).backward()
    return plain.item()


def pretrain(
    out: str | Path,
    seed: int = 0,
    threads: int | None = None,
    progress: bool = True,
    steps: int = Recipe.steps,
    n_questions: int = 512,
) -> dict[str, Any]:
    """Make a policy folder from nothing: weights, tokenizer, scores.json, card. About 4 minutes on one core.

    The folder appears whole or not at all: all is written to a neighbour, which takes the place of `out` at the end.

    Args:
        out: the folder to make. It may be missing, empty, or an earlier policy, which is replaced.
        seed: of the demonstrator, the weights and the batches. threads: CPU threads; None leaves torch's choice.
        progress: show a progress bar (a line every half a minute where the output is no terminal).
        steps, n_questions: smaller ones make a smaller job, and a worse policy or rougher scores.

    Returns:
        {"fp32": scores, "nf4": scores}, each as `toy.policy_scores` gives them; also printed.

    Raises:
        UserError: steps or threads below 1; `out` is a file, a folder of something else, or cannot be written.
    """
    started, out = time.time(), Path(out).resolve()
    if steps < 1 or (threads is not None and threads < 1):
        raise UserError(f"steps {steps} and threads {threads} must be at least 1")
    _check_replaceable(out)
    draft = out.with_name(f".{out.name}.{os.getpid()}.draft")
    before = torch.get_num_threads()
    try:
        _make_folder(draft)
        torch.set_num_threads(threads or before)
        recipe = Recipe(steps=steps)
        _save(train(recipe, seed, progress), draft)
        scores = score(draft, n_questions)
        toy_card.describe(draft, scores, provenance.record(asdict(recipe), seed, started))
        _publish(draft, out)
    finally:  # also on Ctrl-C
        torch.set_num_threads(before)
        shutil.rmtree(draft, ignore_errors=True)
    print(toy_card.table(scores), flush=True)
    return scores


def _check_replaceable(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"out: {out} is a file; name a folder")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if names and not ("scores.json" in names and names <= FILES):
        strange = sorted(names - FILES) or sorted(names)
        raise UserError(f"out: {out} holds something other than a toy policy ({strange[0]}); name a new folder")


def _make_folder(draft: Path) -> None:
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"out: cannot write in {draft.parent} ({error.strerror}); name another folder") from error


def _publish(draft: Path, out: Path) -> None:
    """Put the finished draft in the place of `out`, which is missing, empty, or an earlier policy."""
    _check_replaceable(out)  # four minutes have passed
    old = draft.with_suffix(".old")
    if out.exists():
        out.replace(old)
    draft.replace(out)
    shutil.rmtree(old, ignore_errors=True)


def _save(model: Qwen2ForCausalLM, folder: Path) -> None:
    with _no_bars():
        model.save_pretrained(folder)
    toy.build_tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes 0600, which nobody else could load


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' own progress bars, which have nothing to say about 2 MB."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def load(folder: str | Path, nf4: bool) -> Any:
    """A policy folder as a float32 model on the CPU, its linear layers in NF4 (double quantisation) or not."""
    from .qlora import prepare_quantized

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    with _no_bars():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=quantization if nf4 else None
        )
    prepare_quantized(model, adapters=False)
    return model.eval()


def score(folder: str | Path, n_questions: int = 512) -> dict[str, Any]:
    """`toy.policy_scores` of a policy folder, {"fp32": scores, "nf4": scores}."""
    tokenizer = toy.build_tokenizer()
    return {
        name: toy.policy_scores(load(folder, nf4), tokenizer, n_questions) for name, nf4 in (("fp32", False), ("nf4", True))
    }
