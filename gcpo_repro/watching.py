"""What is kept and shown while an arm trains: metrics at every step, evaluations at the chosen ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from trl import GRPOTrainer

from .evaluation.sampling import Counts, evaluate
from .settings import Settings


class Watch(TrainerCallback):
    """Keeps every step's metrics, evaluates at the chosen steps, and writes both as they come, a line each."""

    def __init__(self, settings: Settings, trainer: GRPOTrainer, rows: list, reward: Any, path: Path) -> None:
        self.settings, self.trainer, self.rows, self.reward, self.path = settings, trainer, rows, reward, path
        self.steps: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "reward" in logs:
            # JSON has no NaN: what could not be measured is null
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in logs.items()}
            self.steps.append({"step": state.global_step, **finite})
            self._write(self.steps[-1])

    def on_step_end(self, args, state, control, **kwargs):
        every = self.settings.eval_every
        if every and state.global_step % every == 0 and state.global_step < state.max_steps:
            self.evaluate(state.global_step)

    def evaluate(self, step: int) -> Counts:
        """Held-out pass@1 now: the same questions and the same sampling seed at every step and in every arm."""
        s = self.settings
        counts = evaluate(
            self.trainer.model, self.trainer.processing_class, self.rows, self.reward, s.eval_samples,
            s.max_completion_length, s.eval_seed, s.temperature,
        )  # fmt: skip
        self.evaluations.append({"step": step, "counts": counts.as_dict()})
        self._write({"step": step, "pass_at_1": counts.pass_at_1})
        return counts

    def _write(self, line: dict[str, Any]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        shown = {key: line[key] for key in ("reward", "kl", "gcpo/upsilon_mean", "pass_at_1") if line.get(key) is not None}
        print(f"step {line['step']}: " + ", ".join(f"{key} {value:.3f}" for key, value in shown.items()), flush=True)
