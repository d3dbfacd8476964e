"""What a policy wrote while it was trained, as tables: prompt, candidates, rewards, Υ and y_n. No torch is imported here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd

from .errors import UserError


def completions_table(trainer: Any, integrated: bool = True) -> pd.DataFrame:
    """The last batch of this process, a row for each candidate. integrated: with the texts of y_n.

    Columns: group (number of the question in the batch), prompt, candidate, tokens, truncated (it does not end), reward
    (weighted sum, NaN where unscorable), one `reward_<function>` each, upsilon (Υ_i; NaN without GCPO), y_n (the integrated
    outputs that were read with this candidate; [] without).
    """
    last = trainer.last_group
    count, n = len(last["completions"]), trainer.num_generations
    first = trainer.accelerator.process_index * count
    rewards = last["rewards"][first : first + count].float().cpu()  # (count, functions)
    total = (rewards * trainer.reward_weights.cpu()).nansum(1).masked_fill(rewards.isnan().all(1), math.nan)
    upsilon = last["upsilon"][first : first + count].float().cpu().tolist() if "upsilon" in last else [math.nan] * count
    ends = {*trainer.eos_token_ids, trainer._tokenizer.pad_token_id}
    names = {f"reward_{name}": rewards[:, k].tolist() for k, name in enumerate(trainer.reward_func_names)}
    return pd.DataFrame(
        {
            "group": [(first + k) // n for k in range(count)],
            "prompt": [shown(prompt) for prompt in last["prompts"]],
            "candidate": [shown(completion) for completion in last["completions"]],
            "tokens": [len(ids) for ids in last["ids"]],
            "truncated": [not ids or ids[-1] not in ends for ids in last["ids"]],
            "reward": total.tolist(), **names, "upsilon": upsilon,
            "y_n": _decoded(last["y_n"], trainer._tokenizer) if integrated and "y_n" in last else [[] for _ in range(count)],
        }
    )  # fmt: skip


def _decoded(rows: list[list[list[int]]], tokenizer: Any) -> list[list[str]]:
    """The texts of lists of token ids; a text that many rows share is decoded once."""
    different = list({tuple(ids) for row in rows for ids in row})
    texts = dict(zip(different, tokenizer.batch_decode([list(ids) for ids in different], skip_special_tokens=True), strict=True))
    return [[texts[tuple(ids)] for ids in row] for row in rows]


def shown(text: Any) -> str:
    """A plain text, or the last message of a conversation."""
    if isinstance(text, str):
        return text
    return str(text[-1]["content"] or "") if text else ""


def load_completions(folder: str | Path) -> pd.DataFrame:
    """All tables of completions of an arm, in the order of the steps. Raises UserError: there are none."""
    files = sorted((Path(folder) / "completions").glob("step-*.parquet"))
    if not files:
        raise UserError(f"completions: {str(folder)!r} holds none; train with completions_every above 0")
    return pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)
