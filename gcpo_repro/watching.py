"""What is kept and shown while an arm trains: metrics at every step, evaluations and completions at the chosen ones."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from trl import GRPOTrainer

from .completions import completions_table
from .errors import UserError
from .evaluation.sampling import Counts, evaluate
from .settings import Settings

SHOWN = {"reward": "reward", "kl": "kl", "gcpo/kl": "gcpo/kl", "gcpo/upsilon_mean": "upsilon", "pass_at_1": "pass_at_1"}
PACE = 20  # steps over which the remaining time is estimated


class Watch(TrainerCallback):
    """Keeps every step's metrics, evaluates at the chosen steps, and writes both as they come, a line each.

    On a terminal a bar shows how far the training is; in a log it is a line for each step. Tables of completions go to
    `completions/` beside `path`.

    Args:
        settings: says when to evaluate and to keep completions.
        trainer: with `last_group`, see `CheckedGRPOTrainer`.
        rows, reward: the held-out questions, and what judges answers to them.
        path: the file of the lines.

    The trainer's other callbacks, TensorBoard's for one, are told the evaluations as `eval_pass_at_1`; add them before.
    """

    def __init__(self, settings: Settings, trainer: GRPOTrainer, rows: list, reward: Any, path: Path) -> None:
        self.settings, self.trainer, self.rows, self.reward, self.path = settings, trainer, rows, reward, path
        self.steps: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.bar: tqdm | None = None
        self._began, self._tokens = time.perf_counter(), 0.0
        self._seconds: deque[float] = deque(maxlen=PACE)

    def on_train_begin(self, args, state, control, **kwargs):
        self._tokens = float(state.num_input_tokens_seen)
        if state.is_world_process_zero and sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)
        if self.evaluations and state.global_step == 0:
            self._report(args, state, control)

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        step, every = state.global_step, self.settings.eval_every
        self._seconds.append(time.perf_counter() - self._began)
        self.keep_completions(step, state)
        if (every and step % every == 0) or step >= state.max_steps:
            self.evaluate(step)
            self._report(args, state, control)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:  # also the steps that reuse answers and have no reward
            # JSON has no NaN: what could not be measured is null
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in logs.items()}
            self.steps.append({"step": state.global_step, **finite})
            self._write(self.steps[-1], self._pace(finite, state))

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def evaluate(self, step: int) -> Counts:
        """Held-out pass@1 now, once a step: the same questions and sampling seed at every step and in every arm."""
        s = self.settings
        if self.evaluations and self.evaluations[-1]["step"] == step:
            return Counts(**self.evaluations[-1]["counts"])
        counts = evaluate(
            self.trainer.model, self.trainer.processing_class, self.rows, self.reward, s.eval_samples,
            s.max_completion_length, s.eval_seed, s.temperature, s.eval_batch_size,
        )  # fmt: skip
        self.evaluations.append({"step": step, "counts": counts.as_dict()})
        self._write({"step": step, "pass_at_1": counts.pass_at_1})
        return counts

    def keep_completions(self, step: int, state: Any) -> None:
        """The last batch as `completions/step-000010.parquet`, at the first step and at every k-th."""
        every = self.settings.completions_every
        if every and (step == 1 or step % every == 0) and state.is_world_process_zero and self.trainer.last_group:
            folder = self.path.parent / "completions"
            folder.mkdir(exist_ok=True)
            table = completions_table(self.trainer)
            table.insert(0, "step", step)
            table.to_parquet(folder / f"step-{step:06d}.parquet", index=False)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, `path` included: a resumed training shows neither gaps nor anything twice."""
        return {"steps": self.steps, "evaluations": self.evaluations, "progress": self.path.read_text()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.evaluations = state["steps"], state["evaluations"]
        self.path.write_text(state["progress"])

    def say(self, text: str) -> None:
        """A line, above the bar if there is one."""
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.write(text)

    def _report(self, args, state, control) -> None:
        """The newest evaluation to TensorBoard and the like, which hear what is logged."""
        value = Counts(**self.evaluations[-1]["counts"]).pass_at_1
        wanted = control.should_log  # `on_log` takes it back, and the step itself has not been logged yet
        self.trainer.callback_handler.on_log(args, state, control, {"eval_pass_at_1": value})
        control.should_log = wanted

    def _pace(self, logs: dict[str, Any], state: Any) -> str:
        """Tokens of prompts and answers per second, and the time that is left, without evaluations."""
        before, self._tokens = self._tokens, logs.get("num_tokens", self._tokens)
        if not self._seconds:
            return ""
        left = (state.max_steps - state.global_step) * sum(self._seconds) / len(self._seconds)
        return f"{(self._tokens - before) / self._seconds[-1]:.0f} tokens/s, {timedelta(seconds=round(left))} left"

    def _write(self, line: dict[str, Any], pace: str = "") -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        shown = [f"{name} {line[key]:.3f}" for key, name in SHOWN.items() if line.get(key) is not None]
        if self.bar is not None and pace:
            self.bar.set_postfix_str(", ".join([*shown, pace.split(",")[0]]), refresh=False)
            self.bar.update(line["step"] - self.bar.n)
        else:
            self.say(f"step {line['step']}: " + ", ".join([*shown, pace] if pace else shown))


def check_reporters(names: Sequence[str]) -> None:
    """Raise UserError where a reporter's package is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"report_to: {name} is not installed; run `pip install {name}`, or leave it out of report_to")


class TensorBoard(TensorBoardCallback):
    """TensorBoard's callback with its files in `folder`. What could not be measured (None) is left out without a warning."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        super().__init__(SummaryWriter(self.folder))

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:  # what a killed training wrote after its checkpoint is not shown
            self.tb_writer.close()
            self.tb_writer = SummaryWriter(self.folder, purge_step=state.global_step + 1)
        super().on_train_begin(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        measured = {name: value for name, value in (logs or {}).items() if value is not None}
        super().on_log(args, state, control, logs=measured, **kwargs)
