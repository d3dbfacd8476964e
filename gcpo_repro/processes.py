"""One training in several processes, as `torchrun` and `accelerate launch` start them; no torch is needed to ask.

The first process writes files and prints; the others take part in everything else, so that none waits for another.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from .errors import UserError


def count() -> int:
    """Number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this process is the one that writes files and prints."""
    return int(os.environ.get("RANK", 0)) == 0


def local_rank() -> int:
    """Number of this process on its machine: which CUDA device is its own."""
    return int(os.environ.get("LOCAL_RANK", 0))


def refuse_lost() -> None:
    """Raise UserError where `accelerate launch` was asked for several processes and has started one.

    `accelerate launch --cpu --num_processes 2` sets MASTER_ADDR and starts the script once, without WORLD_SIZE.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if launched and "WORLD_SIZE" not in os.environ:
        script = " ".join(sys.orig_argv[1:])  # with its -m, if it is a module
        raise UserError(
            "accelerate launch: several processes were asked for, but with --cpu it starts a single one; use "
            f"`torchrun --nproc_per_node N {script}` instead, or `accelerate launch --multi_gpu --num_processes N {script}`, "
            "which works on a CPU too; or ask for one with --num_processes 1"
        )


@contextmanager
def quiet_unless_main() -> Iterator[None]:
    """Only the main process prints to standard output; errors are printed by every process."""
    if is_main():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield
