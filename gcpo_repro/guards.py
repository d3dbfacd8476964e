"""Guards over a training: what has diverged or collapsed stops it, or is told, before more time is lost.

Divergence: a loss or gradient that is not finite (before the optimiser takes it), a KL above a bound. Collapse: rewards that are
equal in every group for many steps, empty answers, prompts whose answers are all cut off and earn nothing (trl#5697).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import TrainerCallback

from .completions import completions_table
from .errors import UserError
from .provenance import write_json

DIVERGED = ("loss", "gradient", "kl")
SCALER_STEPS = 10  # fp16's loss scaling skips steps until its scale fits; so many in a row are no accident


class Guards(TrainerCallback):
    """Stops a training (UserError), or warns once each time it starts to go wrong; the batch is saved in `out/guards`.

    Args:
        trainer: with `last_group`, see `CheckedGRPOTrainer`; logs every step.
        out: folder for the batches.
        on_divergence, on_collapse: "stop", "warn" or "off".
        max_kl: bound on the mean KL per token to the reference and to π'_ref, in nats; 0: none.
        equal_reward_steps: steps in a row in which no group's rewards differ, so that nothing is learned; 0: any number.
        max_empty: bound on the share of empty answers.
        say: prints a line.

    `warnings` collects {"step", "kind", "message"}.
    """

    def __init__(
        self, trainer: Any, out: Path, on_divergence: str = "stop", on_collapse: str = "warn", max_kl: float = 10.0,
        equal_reward_steps: int = 20, max_empty: float = 0.5, say: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        self.trainer, self.out, self.say = trainer, out, say
        self.on_divergence, self.on_collapse = on_divergence, on_collapse
        self.max_kl, self.equal_reward_steps, self.max_empty = max_kl, equal_reward_steps, max_empty
        self.warnings: list[dict[str, Any]] = []
        self.streaks: dict[str, int] = {}  # steps in a row in which something was wrong
        self.prompts = self.cut_off = 0  # prompts so far, and those whose answers were all cut off and earned nothing

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        steps = SCALER_STEPS if args.fp16 else 1
        learning_rate = self.trainer.lr_scheduler.get_last_lr()[0] if self.trainer.lr_scheduler else args.learning_rate
        self._check(
            "gradient", not math.isfinite(norm), state, steps,
            f"the gradient is {norm}, so the weights would be lost; lower learning_rate (now {learning_rate:g}), use dtype "
            "bfloat16 or float32 where it is float16, or set kappa to 0 to see whether π'_ref is the cause",
            step=state.global_step + 1,
        )  # fmt: skip

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        loss = _number(logs["loss"])
        self._check(
            "loss", not math.isfinite(loss), state, SCALER_STEPS if args.fp16 else 1,
            f"the loss is {loss}; lower learning_rate (now {args.learning_rate:g}) and check the rewards in the saved batch",
            logs,
        )  # fmt: skip
        if "reward" not in logs:
            return  # a step that reuses answers
        for name in ("kl", "gcpo/kl"):
            kl = _number(logs.get(name))
            self._check(
                name, bool(self.max_kl) and kl > self.max_kl, state, 1,
                f"{name} is {kl:.1f} nats per token, above max_kl = {self.max_kl:g}: the policy has left its reference; lower "
                "learning_rate or raise " + ("beta" if name == "kl" else "kappa"),
                logs,
            )  # fmt: skip
        self._check(
            "equal rewards", logs.get("frac_reward_zero_std") == 1.0, state, self.equal_reward_steps,
            f"in {self.equal_reward_steps} steps no group's rewards differed (the last mean: {_number(logs['reward']):.3g}), so "
            "nothing is learned; take easier or harder questions, a larger group_size or a higher temperature; check the answers",
            logs,
        )  # fmt: skip
        self._check_answers(state, logs)

    def on_train_end(self, args, state, control, **kwargs):
        if self.cut_off and self.on_collapse != "off":
            self._warn("cut off", state, state.global_step, f"all in all {self._share(self.cut_off, self.prompts, args)}")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"warnings": self.warnings, "streaks": self.streaks, "prompts": self.prompts, "cut_off": self.cut_off}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.warnings, self.streaks = state["warnings"], state["streaks"]
        self.prompts, self.cut_off = state["prompts"], state["cut_off"]

    def _check_answers(self, state: Any, logs: dict[str, float]) -> None:
        if not self.trainer.last_group:
            return
        table = self._answers()
        empty = table["empty"].mean()
        self._check(
            "empty answers", empty > self.max_empty, state, 1,
            f"{empty:.0%} of the answers are empty, above max_empty = {self.max_empty:g}; check the prompt template and the "
            "model's end-of-sequence tokens, lower learning_rate, or raise beta",
            logs,
        )  # fmt: skip
        groups = table.groupby("group").agg(cut=("truncated", "all"), best=("reward", "max"))
        cut = int((groups["cut"].astype(bool) & ~(groups["best"] > 0)).sum())
        self.prompts, self.cut_off = self.prompts + len(groups), self.cut_off + cut
        self._check("cut off", cut > 0, state, 1, self._share(cut, len(groups), self.trainer.args), logs)

    def _answers(self) -> pd.DataFrame:
        """group, empty, truncated and reward of the answers of all processes, so that all come to the same."""
        table, accelerator = completions_table(self.trainer, integrated=False), self.trainer.accelerator
        table["empty"] = table["candidate"].str.strip() == ""
        names = ["group", "empty", "truncated", "reward"]
        numbers = torch.tensor(table[names].astype(float).to_numpy(), device=accelerator.device, dtype=torch.float32)
        return pd.DataFrame(accelerator.gather(numbers).cpu().numpy(), columns=names)

    @staticmethod
    def _share(cut: int, prompts: int, args: Any) -> str:
        return (
            f"{cut} of {prompts} prompts ({cut / prompts:.0%}): every answer was cut off at max_completion_length = "
            f"{args.max_completion_length} and earned nothing; raise max_completion_length, ask for shorter answers in the "
            "prompt, or take easier questions"
        )

    def _check(
        self, kind: str, wrong: bool, state: Any, steps: int, message: str, logs: dict[str, float] | None = None, step: int = 0
    ) -> None:  # fmt: skip
        """Act when `kind` has been wrong in `steps` steps in a row; a warning comes once in a row."""
        step = step or state.global_step
        action = self.on_divergence if kind.removeprefix("gcpo/") in DIVERGED else self.on_collapse
        self.streaks[kind] = self.streaks.get(kind, 0) + 1 if wrong else 0
        if action == "off" or not steps or self.streaks[kind] != steps:
            return
        path = self.out / "guards" / f"step-{step:06d}-{kind.replace('/', '-').replace(' ', '-')}.json"
        message = f"{message}. The batch is in {str(path)!r}"
        if state.is_world_process_zero:
            self._save(path, {"step": step, "kind": kind, "message": message, "metrics": logs or {}})
        if action == "stop":
            raise UserError(f"step {step}: {message}")
        self._warn(kind, state, step, message)

    def _warn(self, kind: str, state: Any, step: int, message: str) -> None:
        self.warnings.append({"step": step, "kind": kind, "message": message})
        if state.is_world_process_zero:
            self.say(f"step {step}: warning: {message}")

    def _save(self, path: Path, found: dict[str, Any]) -> None:
        """The last batch with what was found, for inspection."""
        rows = completions_table(self.trainer).to_dict("records") if self.trainer.last_group else []
        for row, ids in zip(rows, self.trainer.last_group.get("ids", []), strict=True):
            row["ids"] = list(ids)
        write_json(path, _finite({**found, "batch": rows}))


def _number(value: float | None) -> float:
    """A logged value; TRL gives None for what was never a number."""
    return math.nan if value is None else float(value)


def _finite(value: Any) -> Any:
    """JSON has no NaN: as text, which tells it from what is missing."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
