"""Every committed notebook keeps the house rules, and every parameter file fits its notebook."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from gcpo_repro.reporting.runner import PROFILES, declared_parameters, read_parameters, reproduce

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
FILES = sorted((FOLDER / "profiles").glob("*/*"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> Path:
    path = request.param
    assert isinstance(path, Path)
    return path


def _cells(notebook: Path, kind: str = "code") -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == kind]


def test_name_gives_the_order(notebook: Path) -> None:
    assert re.fullmatch(r"\d\d_[a-z0-9_]+", notebook.stem)


def test_is_stripped(notebook: Path) -> None:
    for cell in _cells(notebook):
        assert cell.outputs == []
        assert cell.execution_count is None
    assert "papermill" not in nbformat.read(notebook, as_version=4).metadata


def test_kernel_is_python3(notebook: Path) -> None:
    assert nbformat.read(notebook, as_version=4).metadata.kernelspec.name == "python3"


def test_size(notebook: Path) -> None:
    assert len(nbformat.read(notebook, as_version=4).cells) <= 30
    long = [cell.source for cell in _cells(notebook) if len(cell.source.splitlines()) > 25]
    assert not long, f"more than 25 lines:\n{long[0]}"


def test_starts_with_prose_and_ends_with_assertions(notebook: Path) -> None:
    assert nbformat.read(notebook, as_version=4).cells[0].cell_type == "markdown"
    assert re.search(r"^\s*assert\b", _cells(notebook)[-1].source, re.MULTILINE)


def test_every_parameter_has_a_meaning(notebook: Path) -> None:
    assert declared_parameters(notebook), "raises for anything but plain literals"
    (cell,) = (c for c in _cells(notebook) if "parameters" in c.metadata.get("tags", []))
    for line in cell.source.splitlines():
        assert not line.strip() or re.search(r"#\s*\w", line), f"no comment: {line}"


@pytest.mark.parametrize("file", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_parameter_file(file: Path) -> None:
    assert file.parent.name in PROFILES
    assert file.suffix == ".yaml"
    declared = declared_parameters(FOLDER / f"{file.stem}.ipynb")
    read_parameters(file, declared)  # as `papermill -f` reads it; raises for a wrong name or type
    keys = re.findall(r"^(\w+):", file.read_text(), re.MULTILINE)
    assert len(keys) == len(set(keys)), "YAML silently takes the last of two values"
    assert isinstance(yaml.safe_load(file.read_text()) or {}, dict)


@pytest.mark.notebooks
def test_smoke_profile_runs_from_the_root(tmp_path: Path) -> None:
    assert sorted(path.stem for path in (FOLDER / "profiles/smoke").glob("*.yaml")) == [path.stem for path in NOTEBOOKS]
    said: list[str] = []
    assert reproduce("smoke", out=tmp_path, echo=said.append), "\n".join(said)
    for notebook in NOTEBOOKS:
        assert (tmp_path / notebook.stem / "success.json").exists()


@pytest.mark.notebooks
def test_plain_papermill_runs_from_the_notebooks_folder(tmp_path: Path) -> None:
    papermill = [sys.executable, "-m", "papermill", "00_start_here.ipynb", str(tmp_path / "00.ipynb")]
    arguments = ["-f", "profiles/smoke/00_start_here.yaml", "-p", "out_dir", str(tmp_path)]
    done = subprocess.run([*papermill, *arguments], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "collider.png").exists()
