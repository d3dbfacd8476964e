"""The toy policy's card: its scores as a table, and how it was made, all from the numbers that were recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import provenance
from .demonstrator import Recipe


def table(scores: dict[str, Any]) -> str:
    """The scores {"fp32": ..., "nf4": ...} as a Markdown table, in percent with counts."""
    rows = {"pass@1": [scores[kind]["pass@1"] for kind in ("fp32", "nf4")]}
    for group, name in (("integration", "integration"), ("foreign", "another question's candidates")):
        for n in scores["fp32"][group]:
            rows[f"{name}, n = {n}"] = [scores[kind][group][n] for kind in ("fp32", "nf4")]
    lines = ["| accuracy, % (right / all) | fp32 | NF4 |", "|---|---|---|"]
    for name, pair in rows.items():
        cells = [f"{100 * cell['rate']:.1f} ({cell['correct']} / {cell['total']})" for cell in pair]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def describe(folder: Path, scores: dict[str, Any], origin: dict[str, Any]) -> None:
    """Write scores.json (scores and provenance) and the card README.md, which states the same numbers."""
    provenance.write_json(folder / "scores.json", {**scores, "provenance": origin})
    recipe, machine = Recipe(**origin["config"]), origin["hardware"]
    card = CARD.format(
        r=recipe, table=table(scores), seed=origin["seed"], seconds=origin["wall_time_seconds"],
        size=(folder / "model.safetensors").stat().st_size / 1e6, cpu=machine["cpu"],
        threads=machine["torch_threads"], versions=origin["versions"],
        nf4=round(recipe.nf4_share * recipe.steps),
        random=round(recipe.random_until * recipe.steps),
    )  # fmt: skip
    (folder / "README.md").write_text(card)


CARD = """\
---
license: apache-2.0
pipeline_tag: text-generation
---
# The toy policy of gcpo_repro

A Qwen2 of {r.layers} layers, width {r.hidden}, {r.heads} heads ({r.kv_heads} for keys and values): {size:.1f} MB.
It answers `8a+1b-9c+9?` with `a9b0c9` (three named steps modulo 10), and `question?|candidate|candidate!`,
with 1 to 8 candidates, with one more response. It errs by design: there is something for RL to learn.

## Scores

Held-out questions, temperature 1 (`gcpo_repro.toy.policy_scores`; raw counts and versions in scores.json).

{table}

## Recipe

`gcpo-repro pretrain`, seed {seed}: {seconds:.0f} s with its scoring on {threads} thread(s) of {cpu},
torch {versions[torch]}, transformers {versions[transformers]}.

* Demonstrator: {r.hard_share:.0%} of the 200 facts (operation, value, digit) are hard and right with probability
  {r.right_hard}, the others with {r.right_easy}; {r.distractor:.0%} of a fact's errors are one digit of its own.
  Shown candidates, it votes step by step among those that stand at its own value; right ones weigh
  {r.right_weight:g}.
* {r.steps} steps of AdamW, learning rate {r.learning_rate:g} (40 steps of warm-up, then a cosine). The targets
  are the demonstrator's probabilities. Each step sees both formats.
* At first all integration examples show mostly random digits as candidates; from step {random} on none does.
  Without these the policy copies candidates whatever its own value.
* Three heads of the first layer start by looking 1, 2 and 3 tokens back. Without that start, integration came
  to 61% for n = 4 after 1000 steps, with it to 76% (seed 1; one run each, 128 questions × 8).
* In the last {nf4} steps the linear layers are rounded to NF4 in each forward pass. The weights ship rounded,
  so that loading as NF4 changes next to nothing.

All training questions come from the train split; the held-out ones were never seen. It knows nothing else.
"""
