"""One notebook through papermill, and whether it really succeeded."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import papermill
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError, strip_color
from traitlets import default

SECONDS_BETWEEN_LINES = 10.0  # of progress inside one notebook

Echo = Callable[[str], object]


def through_papermill(notebook: Path, folder: Path, parameters: dict[str, Any], log: Log) -> Any:
    """The executed notebook. papermill raises for failed cells; `unfinished` looks for what it overlooks."""
    with papermill_logs_to(log):
        return papermill.execute_notebook(
            _verbatim(notebook),
            _verbatim(folder / notebook.name),
            parameters,
            kernel_name="python3",
            language="python",
            progress_bar=False,
            cwd=notebook.parents[1],
            stdout_file=log,
            stderr_file=log,
            start_timeout=180,
            iopub_timeout=120,  # nbclient's 4 s fail a notebook that prints a lot on a busy machine
            kernel_manager_class=_ThisInterpreter,
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # no tracebacks of the kernel's on Ctrl-C
            on_cell_start=log.cell_started,
        )


def _verbatim(path: Path) -> str:
    return str(path).replace("{", "{{").replace("}", "}}")  # papermill formats its paths with the parameters


class _ThisInterpreter(AsyncKernelManager):
    """The kernel of the running interpreter, even if a kernel of the user is called python3, too."""

    @default("kernel_spec_manager")
    def _no_installed_kernels(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])


def unfinished(nb: Any) -> str:
    """Why an executed notebook isn't a success although papermill raised nothing; empty if it is one."""
    cells = [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]
    skipped = [cell for cell in cells if cell.execution_count is None]
    if not skipped and not nb.metadata.papermill.exception:
        return ""
    return f"left early, {len(skipped)} of {len(cells)} code cells never ran (sys.exit in a cell does this)"


def why(error: Exception) -> str:
    """The error in one line."""
    if isinstance(error, DeadKernelError):
        return "the kernel died (killed, often for lack of memory, or crashed)"
    if not isinstance(error, PapermillExecutionError):
        return one_line(f"{type(error).__name__}: {error}")
    detail = error.evalue
    if not detail:  # a bare assert says nothing: show its line
        lines = strip_color("\n".join(error.traceback)).splitlines()
        detail = next((line for line in reversed(lines) if line.startswith("-")), "").lstrip("-> 0123456789")
    return one_line(f"In [{error.exec_count}]: {error.ename}: {detail}")


def one_line(text: str) -> str:
    """The text on one line of at most 200 characters."""
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:200]}…"


class Log:
    """A notebook's `log.txt`; now and then its last line is shown, with the number of the running cell."""

    def __init__(self, file: TextIO, label: str, echo: Echo) -> None:
        self.file, self.label, self.echo = file, label, echo
        self.cell, self.line = 0, ""
        self.started = self.shown = time.monotonic()

    def cell_started(self, cell: Any, cell_index: int) -> None:
        self.cell = cell_index + 1
        self._show()

    def write(self, text: str) -> None:
        self.file.write(text)
        self.line = text.strip().replace("\r", "\n").split("\n")[-1] or self.line
        self._show()

    def flush(self) -> None:
        self.file.flush()

    def _show(self) -> None:
        now = time.monotonic()
        if now - self.shown >= SECONDS_BETWEEN_LINES:
            self.shown = now
            where = f"{self.label}: cell {self.cell}, {now - self.started:.0f} s"
            self.echo(f"{where}: {one_line(self.line)}" if self.line else where)


@contextmanager
def papermill_logs_to(stream: Any) -> Iterator[None]:
    """Keep papermill's own messages off the screen."""
    logger, handler = logging.getLogger("papermill"), logging.StreamHandler(stream)
    before, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
