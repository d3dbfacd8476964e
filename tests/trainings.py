"""Small real trainings that die, and what must be the same in two of them."""

import functools
import json
import tempfile
from pathlib import Path
from unittest import mock

import pytest

from gcpo_repro.experiment import run_arm
from gcpo_repro.settings import Settings

# 8 questions, 4 to a batch of answers: the data are permuted anew after every other batch
TINY = Settings(
    methods=("gcpo",), seeds=(5,), quantization="none", lora_rank=4, device="cpu", group_size=2, steps=7, batch_size=8,
    device_batch_size=4, max_completion_length=8, train_questions=8, eval_questions=2, eval_samples=1, eval_every=2, save_every=2,
    workers=1, report_to=(),
)  # fmt: skip
TIMES = ("step_time", "extra_seconds")  # all other metrics are the same in two runs


class Killed(BaseException):
    """Like SIGKILL: nothing in the package catches it."""


def at_event(event, step, action):
    """A patch: `action` is done at an event of the training loop, when so many steps are done."""
    from gcpo_repro.resuming import Saver

    whole = getattr(Saver, event)

    def called(self, args, state, control, **kwargs):
        if state.global_step == step:
            action()
        return whole(self, args, state, control, **kwargs)

    return mock.patch.object(Saver, event, called)


def die():
    raise Killed


def killed_at(settings, out, event, step):
    """Train until the process "dies"."""
    with at_event(event, step, die), pytest.raises(Killed):
        run_arm(settings, out)


def outcome(out):
    """All that two runs must share: metrics of each step and evaluations, as in the result and in the log; the weights."""
    result = json.loads((out / "results.json").read_text())
    progress = [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines()]
    plain = [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in [*result["steps"], *progress]]
    return plain, result["evaluations"], next((out / "policy").glob("*model.safetensors")).read_bytes()


@functools.cache
def through(settings):
    """The outcome of an uninterrupted training."""
    with tempfile.TemporaryDirectory() as folder:
        run_arm(settings, folder)
        return outcome(Path(folder))
