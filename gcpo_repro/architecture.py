"""The sizes of a model, known before any of its weights is downloaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .errors import UserError

KNOWN_SOURCE = "the models' own config.json on the Hub"
# hidden, layers, heads, key/value heads, MLP width, vocabulary, window, tied head. All are Qwen2: SwiGLU, biased q, k, v.
_KNOWN = {
    "Qwen/Qwen2.5-0.5B-Instruct": (896, 24, 14, 2, 4864, 151_936, 32_768, True),
    "Qwen/Qwen2.5-1.5B-Instruct": (1536, 28, 12, 2, 8960, 151_936, 32_768, True),
    "Qwen/Qwen2.5-Math-1.5B-Instruct": (1536, 28, 12, 2, 8960, 151_936, 4096, True),
    "Qwen/Qwen2.5-7B-Instruct": (3584, 28, 28, 4, 18_944, 152_064, 32_768, False),
    "Qwen/Qwen2-7B-Instruct": (3584, 28, 28, 4, 18_944, 152_064, 32_768, False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (1536, 28, 12, 2, 8960, 151_936, 131_072, False),
    "agentica-org/DeepScaleR-1.5B-Preview": (1536, 28, 12, 2, 8960, 151_936, 131_072, False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": (3584, 28, 28, 4, 18_944, 152_064, 131_072, False),
}


@dataclass(frozen=True)
class Architecture:
    """What memory depends on.

    Args:
        hidden, layers, heads, kv_heads, head_dim, mlp, vocab: the usual widths and counts.
        window: tokens that the model reads; 0 where its configuration doesn't say.
        parameters: all of them, a tied head counted once.
        linear: those in linear layers other than the head, which is what bitsandbytes quantises.
        lora_per_rank: what each rank of LoRA on all those layers adds.
        source: where the numbers come from, for the reader.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    window: int
    parameters: int
    linear: int
    lora_per_rank: int
    source: str


def architecture(model: str, revision: str | None = None) -> Architecture:
    """The sizes of "toy", a local folder, a known Hub id, or any other one, of which config.json alone is fetched.

    Raises UserError: no such folder, no readable configuration, or one without the usual sizes.
    """
    if model == "toy":
        from .toy import POLICY

        return _of_config(str(POLICY), "config.json of the toy policy")
    if Path(model).expanduser().is_dir():
        return _of_config(str(Path(model).expanduser()), "its config.json")
    if model in _KNOWN:
        return known(model)
    refuse_what_is_neither_folder_nor_id(model)
    return _of_config(model, "its config.json on the Hub", revision)


def known(model: str) -> Architecture:
    """A model of the table, by arithmetic alone."""
    d, layers, heads, kv_heads, f, vocab, window, tied = _KNOWN[model]
    return qwen2(d, layers, heads, kv_heads, f, vocab, window, tied, KNOWN_SOURCE)


def qwen2(
    hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, vocab: int, window: int, tied: bool, source: str
) -> Architecture:  # fmt: skip
    """The counts of a Qwen2 model: per layer q, k, v with bias, o, a gated MLP of three matrices, two norms."""
    kv = hidden // heads * kv_heads
    shapes = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden), (hidden, mlp), (hidden, mlp), (mlp, hidden)]
    linear = layers * sum(rows * columns for rows, columns in shapes)
    head = 0 if tied else vocab * hidden
    small = layers * (hidden + 2 * kv + 2 * hidden) + hidden  # biases, norms
    return Architecture(
        hidden, layers, heads, kv_heads, hidden // heads, mlp, vocab, window, linear + small + vocab * hidden + head,
        linear, layers * sum(map(sum, shapes)), source,
    )  # fmt: skip


def refuse_what_is_neither_folder_nor_id(model: str) -> None:
    """Raise UserError for a path without a folder, before the Hub's library explains the grammar of its ids."""
    path = Path(model).expanduser()
    if path.exists():
        return
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1 or model.endswith("/"):
        raise UserError(f"model: {model!r}: no such folder: check the path (the current folder is {Path.cwd()})")


@cache
def _of_config(source: str, told: str, revision: str | None = None) -> Architecture:
    """By the model's own code, built without memory ("meta"): exact for every architecture that transformers knows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source, **({"revision": revision} if revision else {}))
        with torch.device("meta"):
            shape: Any = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # OSError, ValueError, JSON and Hub errors …
        cause = " ".join(str(error).split())[:200]
        raise UserError(
            f"model: the configuration of {source!r} cannot be read ({cause}); check the name or the folder"
        ) from error
    text, head = config.get_text_config(), shape.get_output_embeddings()
    linear = [m for m in shape.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    try:
        heads = text.num_attention_heads
        return Architecture(
            text.hidden_size, text.num_hidden_layers, heads, getattr(text, "num_key_value_heads", None) or heads,
            getattr(text, "head_dim", None) or text.hidden_size // heads,
            getattr(text, "intermediate_size", None) or 4 * text.hidden_size, text.vocab_size,
            getattr(text, "max_position_embeddings", None) or 0, shape.num_parameters(),
            sum(m.weight.numel() for m in linear), sum(m.in_features + m.out_features for m in linear),
            told,
        )  # fmt: skip
    except AttributeError as error:
        raise UserError(
            f"model: the configuration of {source!r} lacks a usual size ({error}); its memory can't be estimated"
        ) from error


def stored_bytes(model: str) -> int:
    """Bytes of the weights in a local folder, or in the Hub's cache; 0 where they would have to be downloaded."""
    folder = Path(model).expanduser()
    if model == "toy":
        from .toy import POLICY

        folder = POLICY
    elif not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, "config.json")
        if not isinstance(found, str):
            return 0
        folder = Path(found).parent
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    files = [folder / name for name in names]
    return sum(file.stat().st_size for file in files) if all(file.is_file() for file in files) else 0
