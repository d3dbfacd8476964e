"""Trainings that are killed with SIGKILL and gone on with: are their results, to the bit, those of one that ran through?

    python tests/benchmarks/resume.py [--random 4] [--seed 0] [--out figures/data/resume.json]

Each training is a process of its own (forked, so that torch is imported once) that kills itself at the named place, or is
killed by its parent after a random time; then it is started again. Compared are loss, gradient norm and every other metric
of each step but times, all evaluations, the lines of progress.jsonl, and the bytes of the trained adapters.
"""

import argparse
import dataclasses
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from gcpo_repro import arm, checkpoints, experiment, provenance, resuming
from gcpo_repro.settings import Settings

TIMES = ("step_time", "extra_seconds")
# 32 questions, 8 to a batch: the data are permuted anew every 4 batches of answers
SMALL = Settings(
    methods=("gcpo",), seeds=(1,), quantization="nf4", group_size=4, steps=12, batch_size=32, device_batch_size=16,
    train_questions=32, eval_questions=16, eval_samples=1, eval_every=4, save_every=3, workers=1, device="cpu",
)  # fmt: skip


def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)


def at_event(event, step):
    """Die at an event of the training loop when so many steps are done."""

    def end(self, args, state, control, **options):
        if state.global_step == step:
            die()

    setattr(resuming.Saver, event, end)


def in_checkpoint(owner, name, step, before=True):
    """Die when a function is called (or has returned) while the checkpoint of this step is written."""
    whole = getattr(owner, name)

    def called(*arguments, **options):
        reached = any(f"checkpoint-{step}" in str(argument) for argument in arguments)
        if reached and before:
            die()
        result = whole(*arguments, **options)
        if reached:
            die()
        return result

    setattr(owner, name, called)


def places(settings):
    """Name and arming of each place; checkpoints of SMALL are those of steps 3 (or 4), 6, 9 (or 10) and 12."""
    trainer, second, steps = arm.GCPOTrainer, 6, settings.steps
    first = 3 if settings.num_iterations == 1 else 4  # with 2, answers are used up after even steps
    return {
        "before the first checkpoint": lambda: at_event("on_step_begin", 1),
        "between generation and update": lambda: at_event("on_pre_optimizer_step", 4),
        "after the update, before the log": lambda: at_event("on_optimizer_step", 7),
        "while step 8 is logged": lambda: at_event("on_log", 8),
        "in the last step": lambda: at_event("on_pre_optimizer_step", steps - 1),
        "checkpoint: before its weights": lambda: in_checkpoint(trainer, "save_model", second),
        "checkpoint: weights are written": lambda: in_checkpoint(trainer, "save_model", second, before=False),
        "checkpoint: optimiser is written": lambda: in_checkpoint(trainer, "_save_optimizer_and_scheduler", second, before=False),
        "checkpoint: all but the manifest": lambda: in_checkpoint(resuming, "seal", second),
        "checkpoint: manifest half written": lambda: in_checkpoint(checkpoints, "write_json", second),
        "checkpoint: whole, old ones not removed": lambda: in_checkpoint(resuming, "seal", second, before=False),
        "while the oldest checkpoint is removed": lambda: in_checkpoint(checkpoints.shutil, "rmtree", first),
        "after the last step": lambda: at_event("on_train_end", steps),
    }


def start(settings, out, arming=None):
    """The training in a process of its own; its number."""
    child = os.fork()
    if child:
        return child
    out.mkdir(parents=True, exist_ok=True)
    log = os.open(out / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        if arming:
            arming()
        experiment.run_arm(settings, out)
        code = 0
    finally:
        os._exit(code)


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kept(out):
    """All that two runs should share."""
    result = json.loads((out / "results.json").read_text())
    progress = [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines()]
    plain = [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in [*result["steps"], *progress]]
    return plain, result["evaluations"], (out / "policy" / "adapter_model.safetensors").read_bytes()


def killed_and_resumed(settings, out, reference, name, arming=None, seconds=0.0):
    """One row of the table. Raises RuntimeError: the process was not killed, or did not finish afterwards."""
    child = start(settings, out, arming)
    if not arming:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    if ended(child) != -signal.SIGKILL:
        raise RuntimeError(f"{name}: was not killed, see {out}/log.txt")
    if ended(start(settings, out)):
        raise RuntimeError(f"{name}: could not be gone on with, see {out}/log.txt")
    found, result = kept(out), json.loads((out / "results.json").read_text())
    same = [a == b for a, b in zip(reference, found, strict=True)]
    losses = [[line.get("loss") for line in side[0]] for side in (reference, found)]
    return {
        "num_iterations": settings.num_iterations, "killed": name, "resumed_at": (result["resumed_at"] or [0])[-1],
        "torn_checkpoint_found": "it is removed and the one before it is used" in (out / "log.txt").read_text(),
        "identical_losses": losses[0] == losses[1], "identical": all(same), "steps": len(result["steps"]),
    }  # fmt: skip


def table(settings, folder, randomly, seed):
    """All kill points for one setting."""
    reference, began = folder / "through", time.time()
    if ended(start(settings, reference)):
        raise RuntimeError(f"the uninterrupted training failed, see {reference}/log.txt")
    seconds, expected, rows = time.time() - began, kept(reference), []
    for k, (name, arming) in enumerate(places(settings).items()):
        rows.append(killed_and_resumed(settings, folder / f"place{k}", expected, name, arming))
        show(rows[-1])
    draw = random.Random(f"{seed} {settings.num_iterations}")
    for k in range(randomly):
        after = draw.uniform(0.2, 0.9) * seconds
        name = f"at a random time ({after:.1f} s of {seconds:.1f} s)"
        rows.append(killed_and_resumed(settings, folder / f"random{k}", expected, name, seconds=after))
        show(rows[-1])
    return rows


def show(row):
    print(
        f"| {row['num_iterations']} | {row['killed']} | {row['resumed_at']} | "
        f"{'yes' if row['torn_checkpoint_found'] else ''} | {'yes' if row['identical'] else 'NO'} |", flush=True,
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=4, help="kills at random times, for each num_iterations")
    parser.add_argument("--seed", type=int, default=0, help="of the random times")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started, rows = time.time(), []
    print("| num_iterations | killed | goes on from step | torn checkpoint found | identical |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for iterations in (1, 2):
            settings = dataclasses.replace(SMALL, num_iterations=iterations)
            rows += table(settings, Path(folder) / str(iterations), options.random, options.seed)
    if options.out:
        record = provenance.record(SMALL.as_dict(), options.seed, started)
        provenance.write_json(options.out, {**record, "kind": "resume", "rows": rows})
    print(f"{sum(row['identical'] for row in rows)} of {len(rows)} identical, {time.time() - started:.0f} s")
    sys.exit(not all(row["identical"] for row in rows))


if __name__ == "__main__":
    main()
