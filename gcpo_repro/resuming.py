"""An interrupted training goes on as if nothing had happened: to the same bits on a CPU.

TRL's checkpoints hold weights, optimiser, scheduler, loss scaler and random states. TRL loses a batch of answers that is
not used up and its count of forward passes; `Saver` writes where there is nothing to lose: the answers are used up, and the
count, which matters only as a remainder, may start at 0. It adds what else a training remembers: how many permutations of
the data have been drawn, and what the callbacks have recorded.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from . import provenance
from .checkpoints import STATE, checkpoint_folder, newest, read_state, remove, rotate, seal, step_of
from .errors import UserError
from .provenance import write_json


class Stopped(KeyboardInterrupt):
    """A signal ended the training after a step; the message says what is kept."""


class Saver(TrainerCallback):
    """Writes checkpoints and goes on from them; add it after the callbacks whose records it saves.

    A callback with `state_dict() -> dict` (JSON) and `load_state_dict(dict)` is saved and restored.

    Args:
        trainer: TRL's, with one process or several.
        out: the arm's folder; checkpoints are written to `checkpoints.checkpoint_folder(out, step)`.
        every: optimiser steps between checkpoints; 0: only when stopped and at the end. Written at the first step from
            then on at which a batch of answers is used up (with num_iterations = 1: every step).
        identity: what a checkpoint must share with the training that goes on from it: "settings" (checked by
            `checkpoints.prepare`), "data" (a digest; changed data are refused), and
            "code", "versions", "processes" (a change gives a note).
    """

    def __init__(self, trainer: GRPOTrainer, out: Path, every: int, identity: dict[str, Any]) -> None:
        self.trainer, self.out, self.every, self.identity = trainer, out, every, identity
        self.saved = 0  # step of the last checkpoint
        self.epochs = 0  # passes over the data
        self.started, self.earlier_seconds, self.resumed_at = time.time(), 0.0, list[int]()
        self.signals: list[int] = []

    def restore(self) -> Path | None:
        """Take over what the newest checkpoint in `out` remembers, and return it; None: there is none.

        Raises UserError: the data are no longer the same.
        """
        (found,) = broadcast_object_list([newest(self.out)])  # what the main process sees
        if found is None:
            return None
        checkpoint, state = found, read_state(found)
        if state["data"] != self.identity["data"]:
            raise UserError(
                f"data: the questions are not those of {checkpoint}; bring those back to go on, or start from the beginning "
                "with --resume never"
            )
        changed = [name for name in ("code", "versions", "processes") if state.get(name) != self.identity.get(name)]
        if changed:
            print(f"note: {', '.join(changed)} changed since {checkpoint.name}; the results may not be those of one run")
        self.saved, self.epochs = state["step"], state["epochs"]
        self.earlier_seconds, self.resumed_at = state["seconds"], [*state["resumed_at"], state["step"]]
        for callback in self._recorders():
            if type(callback).__name__ in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][type(callback).__name__])
        return checkpoint

    def history(self) -> dict[str, Any]:
        """For the result: how long it took in all, and from which steps the training was gone on with."""
        seconds = round(self.earlier_seconds + time.time() - self.started, 2)
        return {"wall_time_seconds": seconds, "resumed_at": self.resumed_at}

    def train(self, checkpoint: Path | None) -> None:
        """`trainer.train()`, from a restored checkpoint on if there is one.

        Raises:
            Stopped: SIGTERM or Ctrl-C, after the step and its checkpoint. A second Ctrl-C ends the training at once.
            UserError: the disk is full.
        """
        with self._catching_signals(), self._keeping():
            if checkpoint and step_of(checkpoint) >= self.trainer.args.max_steps:
                self.trainer._load_from_checkpoint(str(checkpoint))  # `train` would make one step too many
                self.trainer.state.global_step = step_of(checkpoint)
            else:
                self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if self.signals:
            raise Stopped(f"Interrupted. {self.kept()}")

    def kept(self) -> str:
        """What can be gone on with, in a sentence."""
        if checkpoint := newest(self.out):
            return f"The checkpoint of step {step_of(checkpoint)} is kept; the same command goes on from it."
        return "There is no checkpoint yet; the same command starts from the beginning."

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        sampler = _sampler(train_dataloader)
        for _ in range(self.epochs):  # each pass over the data draws its order
            torch.randperm(sampler.num_samples, generator=sampler.generator)

    def on_step_end(self, args, state, control, **kwargs):
        stop = self._signalled_anywhere()
        last = state.global_step >= state.max_steps
        if control.should_training_stop and not last:
            return  # another callback gave up: nothing to go on with
        if self.trainer._step % (args.steps_per_generation * args.num_iterations) and not last:
            return  # answers are left to be used
        due = self.every > 0 and state.global_step // self.every > self.saved // self.every
        control.should_save = due or stop or last
        control.should_training_stop |= stop

    def on_save(self, args, state, control, **kwargs):
        self.trainer.accelerator.wait_for_everyone()  # each process writes its random state
        if state.is_world_process_zero:
            checkpoint = checkpoint_folder(self.out, state.global_step)
            records = {type(callback).__name__: callback.state_dict() for callback in self._recorders()}
            remembered = {
                **self.identity, "step": state.global_step, "epochs": int(state.epoch), "callbacks": records,
                "seconds": self.history()["wall_time_seconds"], "resumed_at": self.resumed_at,
            }  # fmt: skip
            write_json(checkpoint / STATE, remembered)
            seal(checkpoint)
            rotate(self.out)
        self.saved = state.global_step
        self.trainer.accelerator.wait_for_everyone()

    def _recorders(self) -> list[Any]:
        return [callback for callback in self.trainer.callback_handler.callbacks if hasattr(callback, "load_state_dict")]

    def _signalled_anywhere(self) -> bool:
        """Whether a signal reached any process: all stop after the same step."""
        signalled, accelerator = bool(self.signals), self.trainer.accelerator
        if accelerator.num_processes == 1:
            return signalled
        anywhere = bool(accelerator.gather(torch.tensor([float(signalled)], device=accelerator.device)).max())
        if anywhere and not signalled:
            self.signals.append(signal.SIGTERM)
        return anywhere

    @contextmanager
    def _catching_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # Python gives signals to the main thread alone
            return
        heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._note) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and number in self.signals:
            raise KeyboardInterrupt
        if not self.signals:  # os.write: print is not safe in a signal handler
            os.write(2, b"Stopping after this step, with a checkpoint; Ctrl-C (again) stops at once.\n")
        self.signals.append(number)

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """Whatever ends the training: say what is left. A full disk becomes one message, and the torn checkpoint goes."""
        try:
            yield
        except Exception as error:
            torn = checkpoint_folder(self.out, self.trainer.state.global_step)
            writing = torn.exists() and torn != newest(self.out)
            if provenance._disk_full(error) or (writing and _is_full(self.out)):
                if writing:
                    remove(torn)  # also makes room for the state of the run
                raise UserError(f"out: {str(self.out)!r} is on a full disk; free some space. {self.kept()}") from error
            print(self.kept(), file=sys.stderr, flush=True)
            raise


def digest(*tables: list[dict[str, Any]]) -> str:
    """SHA-256 of rows of data, in their order."""
    found = hashlib.sha256()
    for rows in tables:
        for row in rows:
            found.update(repr(sorted(row.items())).encode())
        found.update(b"|")
    return found.hexdigest()


def _sampler(loader: Any) -> RepeatSampler:
    """TRL's sampler, which accelerate wraps once or twice."""
    inner = loader.batch_sampler
    while not isinstance(inner, RepeatSampler):
        inner = getattr(inner, "batch_sampler", None) or inner.sampler
    return inner


def _is_full(folder: Path) -> bool:
    """Whether nothing more can be written. torch.save only tells that a stream failed, in several ways."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(2**20))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return error.errno in provenance.DISK_FULL
    return False
