"""Draws the gallery again from its raw numbers and records what was made of what: `figures/manifest.json`.

The same data give the same bytes under the same versions; the manifest holds their hashes, and of each entry also a hash of what
it shows (`shown_numbers`), which other versions of matplotlib leave as it is.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .. import provenance
from ..errors import UserError
from ..evaluation import published
from . import figures, tables
from .gallery import ENTRIES, SOURCES

ROOT = Path(__file__).resolve().parents[2]
DRAWN_WITH = ("matplotlib", "numpy", "pandas", "pillow", "networkx", "scipy", "contourpy", "kiwisolver")


def figures_folder() -> Path:
    """`figures/` of the clone; outside a clone, of the current folder."""
    return (ROOT if (ROOT / "figures").is_dir() else Path.cwd()) / "figures"


def redraw(
    data: str | Path | None = None, out: str | Path | None = None, only: Sequence[str] = (), echo: Callable[[str], Any] = print
) -> dict[str, Any]:
    """Make the files of every entry, or of those in `only`, and `manifest.json`.

    Args:
        data: folder of the raw numbers, `figures/data` (default: the clone's) or a run of `reproduce`. Entries whose numbers are
            not there are left out, and said.
        out: folder for `NAME.png`, `NAME.svg`, `tables/NAME.md`, `.tex`, `.csv` and the manifest (default: the clone's
            `figures`).
        only: names of `ENTRIES`; the manifest keeps the others as they were.

    Returns:
        The manifest: {name: caption, kind, function, command, data, files, shown, versions, commit, seconds}.

    Raises:
        UserError: no such folder or name; no numbers for a name of `only`; a file that cannot be read.
    """
    data = Path(data) if data else figures_folder() / "data"
    out = Path(out) if out else figures_folder()
    if not data.is_dir():
        raise UserError(f"data: {str(data)!r} is no folder; name one with raw numbers, such as figures/data or runs/cpu")
    if unknown := sorted(set(only) - set(ENTRIES)):
        raise UserError(f"only: {', '.join(unknown)} unknown; choose from {', '.join(ENTRIES)}")
    manifest = read_manifest(out)
    versions, commit = drawing_versions(), provenance.git_commit()
    for name in only or ENTRIES:
        try:
            found = find(name, data)
        except FileNotFoundError as error:
            if only:
                raise UserError(f"only: {name} needs {error}") from error
            echo(f"{name}: left out, needs {error}")
            continue
        entry = {**make(name, found, out), "versions": versions, "commit": commit}
        manifest[name] = _kept(manifest.get(name, {}), entry)
        echo(f"{name}: {', '.join(entry['files'])} ({entry['seconds']:.1f} s)")
    manifest = {name: manifest[name] for name in ENTRIES if name in manifest}
    provenance.write_json(out / "manifest.json", manifest)
    return manifest


def build(name: str, found: dict[str, list[Path]]) -> Figure | pd.DataFrame:
    """The figure or table of an entry from its files (`find`). Raises UserError: one cannot be read, or lacks something."""
    entry = ENTRIES[name]
    try:
        return entry.make(*entry.arguments(*(_content(source, files) for source, files in found.items())))
    except KeyError as error:
        names = ", ".join(str(file) for paths in found.values() for file in paths)
        raise UserError(f"data: {error} is missing in {names}; measure it again") from error


def make(name: str, found: dict[str, list[Path]], out: Path) -> dict[str, Any]:
    """Make the files of one entry in `out`; its record for the manifest."""
    started, entry, made = time.perf_counter(), ENTRIES[name], build(name, found)
    if isinstance(made, Figure):
        files, shown = figures.save_pictures(made, out / name), shown_numbers(made)
        plt.close(made)
    else:
        files, shown = tables.write(made, out / "tables" / name, entry.caption), tables.csv(made)
    return {
        "caption": entry.caption, "kind": "figure" if isinstance(made, Figure) else "table",
        "function": f"{entry.make.__module__}.{entry.make.__name__}", "command": f"gcpo-repro figures --only {name}",
        "data": {file.name: _origin(source, file) for source, paths in found.items() for file in paths},
        "files": {file.relative_to(out).as_posix(): sha256(file.read_bytes()) for file in files},
        "shown": sha256(shown.encode()), "seconds": round(time.perf_counter() - started, 2),
    }  # fmt: skip


def _kept(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The old record where nothing but the time and the commit would change, unless its commit was not a clean one."""
    passing = ("commit", "seconds")
    if old.get("commit", "").endswith("-dirty") and not new["commit"].endswith("-dirty"):
        return new
    same = {k: v for k, v in old.items() if k not in passing} == {k: v for k, v in new.items() if k not in passing}
    return old if same else new


def read_manifest(out: Path) -> dict[str, Any]:
    """`manifest.json` of a folder, empty where there is none. Raises UserError: one that cannot be read."""
    path = out / "manifest.json"
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"out: {path} cannot be read ({error}); remove it") from error


def drawing_versions() -> dict[str, str]:
    """Of Python and of what decides how a figure's bytes look."""
    return {"python": provenance.versions()["python"], **{name: metadata.version(name) for name in DRAWN_WITH}}


# --- Raw numbers ------------------------------------------------------------------------------------------------


def find(name: str, *folders: Path) -> dict[str, list[Path]]:
    """{source: its files} of an entry; no files for an optional source. Raises FileNotFoundError, which says what makes them."""
    found = {source: files_of(source, *folders) for source in ENTRIES[name].sources}
    for source, files in found.items():
        if not files and source not in ENTRIES[name].optional:
            raise FileNotFoundError(f"{SOURCES[source].patterns[0]} ({SOURCES[source].made})")
    return found


def folders(run: str | Path = "", beside: str | Path = "", committed: bool = True) -> list[Path]:
    """Where to look for raw numbers, the first that has them counts: a run, then `figures_folder() / "data"`.

    Args:
        run: folder of a run of `reproduce`, `train` or `evaluate`; "" takes the one that `beside`, a notebook's folder, lies in.
        committed: whether `figures/data` follows.

    Raises:
        UserError: `run` is no folder or holds no results; no place is left.
    """
    known = [source for source in SOURCES if SOURCES[source].patterns]
    if run and not any(files_of(source, Path(run)) for source in known):
        what = "holds no results that a figure shows" if Path(run).is_dir() else "is no folder"
        raise UserError(f"run_dir: {str(run)!r} {what}; name a folder that reproduce, train or evaluate wrote, such as runs/cpu")
    near = [Path(beside).parent] if beside and any(Path(beside).parent.glob("[0-9][0-9]_*/*.json")) else []
    found = [Path(run)] if run else near
    found += [figures_folder() / "data"] if committed else []
    if not found:
        raise UserError("run_dir: no results beside this notebook's; run the others first, or take figures/data (committed)")
    return found


def files_of(source: str, *folders: Path) -> list[Path]:
    """The files of one of `SOURCES` in the first folder that has some; none if no folder has."""
    if source == "published":
        return [published.FILE]
    matches = (sorted(folder.glob(pattern)) for folder in folders for pattern in SOURCES[source].patterns)
    first = next((files for files in matches if files), [])
    return first if SOURCES[source].many else first[:1]


def read(source: str, *folders: Path) -> Any:
    """What the files of a source hold; None where there are none, or an empty list where there may be many."""
    return _content(source, files_of(source, *folders))


def _content(source: str, files: list[Path]) -> Any:
    if source == "published":
        return published.load(files[0])
    try:
        contents = [pd.read_csv(file) if file.suffix == ".csv" else json.loads(file.read_text()) for file in files]
    except (OSError, ValueError) as error:
        raise UserError(f"data: {', '.join(map(str, files))} cannot be read ({error})") from error
    return contents if SOURCES[source].many else contents[0] if contents else None


def _origin(source: str, file: Path) -> dict[str, Any]:
    """Hash of a data file, the command that makes it and the seeds: the file's own, or those of its command."""
    content = json.loads(file.read_text()) if file.suffix == ".json" else {}
    seed = content.get("seeds", content.get("seed")) if isinstance(content, dict) else None
    seeds = list(SOURCES[source].seeds) if seed is None else seed if isinstance(seed, list) else [seed]
    return {"sha256": sha256(file.read_bytes()), "made by": SOURCES[source].made, "seeds": seeds}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def shown_numbers(figure: Figure) -> str:
    """The numbers and words that a figure shows, in data coordinates, to six digits: the same whatever draws it."""
    lines: list[str] = []
    for axes in figure.axes:
        arrays = [line.get_xydata() for line in axes.lines]
        arrays += [patch.get_patch_transform().transform(patch.get_path().vertices) for patch in axes.patches if _plain(patch)]
        for collection in axes.collections:
            arrays += [np.asarray(collection.get_offsets()), *(path.vertices for path in collection.get_paths())]
        lines += [" ".join(f"{x:.6g}" for x in np.asarray(array, dtype=float).ravel()) for array in arrays]
        lines += [axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel(), *(text.get_text() for text in axes.texts)]
    return "\n".join([figure.get_suptitle(), *lines])


def _plain(patch: Any) -> bool:
    return hasattr(patch, "get_bbox")  # bars; an arrow's path is made of pixels
