"""Notebooks on Colab: the cell that installs the package there, and the badge that opens a notebook there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .errors import UserError

SETUP = """\
# Set-up: does nothing where the package is installed; on Colab it installs it, once, and leaves torch as it is.
import importlib.util
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

REPOSITORY, BRANCH = "", "main"  # owner/name on GitHub: `gcpo-repro colab --repo` writes them
if importlib.util.find_spec("gcpo_repro") is None:
    if not REPOSITORY:
        raise RuntimeError("gcpo_repro is not installed: run `make install`, or set REPOSITORY to owner/name")
    family = ("torch", "torchvision", "torchaudio", "triton", "numpy", "nvidia-")  # preinstalled, and fit each other
    pins = {f"{d.name}=={d.version}" for d in distributions() if (d.name or "").lower().startswith(family)}
    constraints = Path("colab-constraints.txt").resolve()
    constraints.write_text("\\n".join(sorted(pins)))
    clone, address = Path(REPOSITORY.split("/")[-1]).resolve(), f"https://github.com/{REPOSITORY}"
    subprocess.run(["git", "clone", "--depth", "1", "--branch", BRANCH, address, clone], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "-c", constraints, "-e", clone], check=True)
    sys.path.insert(0, str(clone))  # this kernel started before the installation
"""
TAG = "setup"
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({address})"
_STAMP = re.compile(r'^REPOSITORY, BRANCH = "[^"]*", "[^"]*"', re.MULTILINE)
_BADGE_LINE = re.compile(r"^\[!\[Open in Colab\]\(.*\n?", re.MULTILINE)


def setup_cell(repo: str = "", branch: str = "main") -> str:
    """The source of the set-up cell, installing from github.com/<repo>."""
    return _STAMP.sub(f'REPOSITORY, BRANCH = "{repo}", "{branch}"', SETUP).rstrip("\n")


def badge(repo: str, branch: str, notebook: str) -> str:
    """The badge in Markdown, which opens the notebook of that file name on Colab."""
    return BADGE.format(address=f"https://colab.research.google.com/github/{repo}/blob/{branch}/notebooks/{notebook}")


def stamp(folder: Path, repo: str, branch: str = "main") -> dict[Path, bool]:
    """Put badge and set-up cell into every notebook of a folder, in place of those that are there.

    Args:
        folder: of the notebooks; the badge assumes that it is `notebooks/` of the repository.
        repo: "owner/name" on GitHub; "" takes the badge away and leaves a set-up cell for an installed package.
        branch: that Colab reads.

    Returns:
        For each notebook whether it changed.

    Raises:
        UserError: a name that is none, a notebook without a first cell of text or with several set-up cells.
    """
    if repo and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", repo):
        raise UserError(f"repo: {repo!r} is not owner/name, as in github.com/owner/name")
    if not re.fullmatch(r"[\w./-]+", branch):
        raise UserError(f"branch: {branch!r} is not the name of a branch")
    changed = {}
    for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")):
        before = path.read_text()
        after = _dump(stamped(json.loads(before), path.name, repo, branch))
        changed[path] = after != before
        if changed[path]:
            path.write_text(after)
    return changed


def stamped(notebook: dict[str, Any], name: str, repo: str, branch: str) -> dict[str, Any]:
    """The notebook with badge and set-up cell; the given one is changed."""
    cells = notebook["cells"]
    if not cells or cells[0]["cell_type"] != "markdown":
        raise UserError(f"{name}: the first cell must be text, for the badge below its title")
    title, _, rest = _BADGE_LINE.sub("", "".join(cells[0]["source"])).partition("\n")
    rest = rest.lstrip("\n")
    parts = [title, badge(repo, branch, name), rest] if repo else [title, rest]
    cells[0]["source"] = "\n\n".join(part for part in parts if part).splitlines(keepends=True)
    setups = [cell for cell in cells if TAG in cell["metadata"].get("tags", [])]
    if len(setups) > 1:
        raise UserError(f"{name}: {len(setups)} cells are tagged {TAG!r}; keep one")
    if not setups:
        setups = [
            {"cell_type": "code", "execution_count": None, "id": TAG, "metadata": {"tags": [TAG]}, "outputs": [], "source": []}
        ]
        after = [k for k, cell in enumerate(cells) if "parameters" in cell["metadata"].get("tags", [])] or [0]
        cells.insert(after[0] + 1, setups[0])
    setups[0]["source"] = setup_cell(repo, branch).splitlines(keepends=True)
    return notebook


def _dump(notebook: dict[str, Any]) -> str:
    """As Jupyter writes it: so that stamping twice, or none at all, changes no byte."""
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
