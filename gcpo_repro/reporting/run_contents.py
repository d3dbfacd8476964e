"""What a run's folder holds, for its report: notebooks with their state, figures, tables, results, and what is broken."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from .run_folders import FAILURE, MARKER, alive, in_report, marker, read_json

SKIPPED = {"policy", "trainer", "checkpoints", ".ipynb_checkpoints"}
STATES = {
    "done": "succeeded",
    "failed": "failed",
    "interrupted": "stopped before its end",
    "running": "still running",
    "lost": "its executed notebook is missing",
    "pending": "never ran",
}


@dataclass(frozen=True)
class Notebook:
    """One notebook of a run. `state` is a key of `STATES`; `record` is its success marker, empty without one."""

    name: str
    folder: Path
    state: str
    reason: str
    record: dict[str, Any]

    @property
    def executed(self) -> Path | None:
        file = self.folder / f"{self.name}.ipynb"
        return file if file.exists() else None

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"


@dataclass(frozen=True)
class Picture:
    """A figure's image with what the notebook says before the cell that saved it, and the files of its numbers.

    owner: the notebook's name, empty for none. image: PNG or SVG, whichever is smaller.
    """

    owner: str
    image: Path
    heading: str
    text: str
    files: list[Path]


@dataclass(frozen=True)
class Contents:
    """All that a report shows. `results` are the readable `results.json`; `broken` are files that can't be used, and why."""

    folder: Path
    profile: str
    state: str
    notebooks: list[Notebook]
    pictures: list[Picture]
    tables: list[Path]
    results: dict[Path, dict[str, Any]]
    broken: dict[Path, str] = field(default_factory=dict)

    def name(self, path: Path) -> str:
        """The path from the run's folder; of a file elsewhere, its last two parts."""
        return path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else "/".join(path.parts[-2:])


def read_run(folder: str | Path) -> Contents:
    """The contents of a folder that `reproduce`, `train` or `evaluate` wrote to, finished or not.

    Raises:
        UserError: no such folder, or one without notebooks, run.json and results.json.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise UserError(f"run: {str(folder)!r} is no folder; `gcpo-repro runs` lists the runs")
    run, broken = read_json(folder / "run.json"), dict[Path, str]()
    notebooks = _notebooks(folder, run)
    results = _results(folder, broken)
    if not (notebooks or results or run):
        raise UserError(f"run: {str(folder)!r} holds no notebooks, no run.json and no results.json; name a run's folder")
    captions = {nb.folder: _captions(nb, broken) for nb in notebooks}
    pictures = [_picture(path, captions, folder) for path in _once(_files(folder, "*.png"))]
    state = run.get("state", "")
    if state == "running" and not alive(run.get("pid"), (folder / "run.json").stat().st_mtime):
        state = "interrupted"
    profile = run.get("profile", "")
    return Contents(folder, profile, state, notebooks, pictures, list(_files(folder, "*.csv")), results, broken)


def _files(folder: Path, pattern: str) -> Iterator[Path]:
    for path in sorted(folder.rglob(pattern)):
        if not in_report(path) and not any(p in SKIPPED or p.startswith(".") for p in path.relative_to(folder).parts):
            yield path


def _once(paths: Iterable[Path]) -> Iterator[Path]:
    """Each picture at its first place: notebook 07 draws those of the others again."""
    seen: set[tuple[str, bytes]] = set()
    for path in paths:
        key = path.name, path.read_bytes()
        if key not in seen:
            seen.add(key)
            yield path


def _notebooks(folder: Path, run: dict[str, Any]) -> list[Notebook]:
    told: dict[str, Any] = run["notebooks"] if isinstance(run.get("notebooks"), dict) else {}
    seen = {p.parent.name for name in (MARKER, FAILURE, "log.txt") for p in folder.glob(f"[0-9][0-9]_*/{name}")}
    return [_notebook(folder / name, str(told.get(name, ""))) for name in sorted(told.keys() | seen)]


def _notebook(folder: Path, told: str) -> Notebook:
    failure = read_json(folder / FAILURE)
    if record := marker(folder):
        state = "done"
    elif failure:
        state = "failed"
    elif (folder / MARKER).exists():
        state = "lost"
    elif told == "running":
        run = folder.parent / "run.json"
        state = "running" if alive(read_json(run).get("pid"), run.stat().st_mtime) else "interrupted"
    else:
        state = told if told in ("failed", "interrupted") else "interrupted" if (folder / "log.txt").exists() else "pending"
    return Notebook(folder.name, folder, state, str(failure.get("reason", "")), record)


def _results(folder: Path, broken: dict[Path, str]) -> dict[Path, dict[str, Any]]:
    """Every `results.json` but those of an experiment's arms, which the experiment's own contains."""
    found = {}
    for path in _files(folder, "results.json"):
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            broken[path] = f"cannot be read: {error}"
            continue
        if not isinstance(content, dict):
            broken[path] = f"holds a {type(content).__name__}, not a result"
        elif content.get("kind") != "arm" or not (path.parents[1] / "results.json").exists():
            found[path] = content
    return found


def _captions(notebook: Notebook, broken: dict[Path, str]) -> dict[str, tuple[str, str]]:
    """{figure: (heading, paragraph)} from the cells that save it as `out / "figure"`."""
    if not notebook.executed:
        return {}
    try:
        cells = json.loads(notebook.executed.read_text())["cells"]
        return {name: where for cell, where in explained(cells) for name in re.findall(r'out\s*/\s*"([^"]+)"', source(cell))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        broken[notebook.executed] = f"is no notebook ({error})"
        return {}


def source(cell: dict[str, Any]) -> str:
    """A cell's text, which the file format keeps as text or as lines."""
    return "".join(cell["source"])


def explained(cells: list[Any]) -> Iterator[tuple[Any, tuple[str, str]]]:
    """Each code cell with the last heading and the last paragraph before it, in plain text."""
    heading = text = ""
    for cell in cells:
        if cell["cell_type"] == "code":
            yield cell, (heading, text)
        elif cell["cell_type"] == "markdown":
            for block in re.split(r"\n\s*\n|\n(?=#)", source(cell).strip()):
                first, _, rest = block.strip().partition("\n")
                if first.startswith("#"):
                    heading, text, block = plain(first.lstrip("#")), "", rest
                if block.strip() and not block.lstrip().startswith(("|", "```", "* ", "- ")):
                    text = plain(block)


def plain(markdown: str) -> str:
    """Markdown without its marks, on one line."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
    return " ".join(re.sub(r"[*`]|(?<!\S)_(?=\S[^_]*_(?!\S))|(?<=\S)_(?=[\s.,;:]|$)", "", text).split())


def alternative(heading: str, text: str) -> str:
    """A figure for those who can't see it, from the words about it."""
    words = f"{heading}. {text}".strip()
    return words if len(words) <= 300 else f"{words[:300].rsplit(' ', 1)[0]} …"


def smaller(image: Path) -> Path:
    """The PNG image or the SVG one beside it, whichever has fewer bytes."""
    return min((path for path in (image, image.with_suffix(".svg")) if path.exists()), key=lambda path: path.stat().st_size)


def _picture(image: Path, captions: dict[Path, dict[str, tuple[str, str]]], folder: Path) -> Picture:
    owner = next((parent for parent in image.parents if parent in captions), None)
    name = image.relative_to(owner).with_suffix("").as_posix() if owner else image.stem
    heading, text = captions.get(owner, {}).get(name, ("", "")) if owner else ("", "")
    places = [image.parent, image.parent / "data", image.parent.parent / "data"]
    files = [p for kind in (".json", ".csv") for p in (place / f"{image.stem}{kind}" for place in places) if p.exists()]
    return Picture(owner.name if owner else "", smaller(image), heading or image.stem.replace("_", " "), text, files)
