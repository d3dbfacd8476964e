"""Executed notebooks as pages of the report: a title, words for each figure, and only links that lead somewhere."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import nbformat

from .run_contents import alternative, explained

LINK = re.compile(r"(!?)\[([^\]\[]*)\]\(<?([^)>\s]+)>?[^)]*\)")
URL = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def write_page(notebook: Path, folder: Path, names: set[str]) -> None:
    """Write the notebook into the pages' folder, changed as a page needs it.

    Args:
        notebook: executed by papermill. folder: gets the page and the images to which its text refers.
        names: of the notebooks that have pages.

    Raises:
        ValueError: not a notebook.
    """
    nb = nbformat.read(notebook, as_version=4)
    folder.mkdir(parents=True, exist_ok=True)
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = LINK.sub(lambda found: _link(found, notebook.parent, folder, names), cell.source)
    for cell, words in explained(nb.cells):
        cell.metadata["mystnb"] = {"image": {"alt": alternative(*words)}}
    if not any(cell.cell_type == "markdown" and re.search(r"^# ", cell.source, re.MULTILINE) for cell in nb.cells):
        nb.cells.insert(0, nbformat.v4.new_markdown_cell(f"# {notebook.stem}"))
    nbformat.write(nb, folder / notebook.name)


def _link(found: re.Match[str], near: Path, folder: Path, names: set[str]) -> str:
    """The link itself if it leads to a page or elsewhere; an image is copied; of any other file only the words stay."""
    image, words, target = found.groups()
    path = Path(unquote(target.split("#")[0]))
    if URL.match(target):
        return found.group()
    if target.startswith("#") or (path.suffix == ".ipynb" and path.parent == Path() and path.stem in names):
        file, mark, place = target.partition("#")
        return f"{image}[{words}]({file}{mark}{place.lower()})"  # Jupyter keeps a heading's case in its anchor, Sphinx does not
    if image and (near / path).is_file():
        shutil.copy(near / path, folder / path.name)
        return f"![{words}](<{path.name}>)"
    return words or path.name
