"""The set-up cell and the badge: the same in every notebook, stamped without side effects, and doing what they promise."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from gcpo_repro import UserError, cli, colab
from gcpo_repro.reporting import runner

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(path):
    return json.loads(path.read_text())["cells"]


def setups(path):
    return ["".join(cell["source"]) for cell in cells(path) if colab.TAG in cell["metadata"].get("tags", [])]


@pytest.fixture
def copies(tmp_path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for path in NOTEBOOKS:
        shutil.copy(path, folder)
    return folder


def test_every_notebook_has_the_same_set_up_cell_before_its_first_import():
    (source,) = {source for path in NOTEBOOKS for source in setups(path)}
    assert colab._STAMP.sub("", source) == colab._STAMP.sub("", colab.setup_cell())
    for path in NOTEBOOKS:
        assert len(setups(path)) == 1
        code = ["".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "code"]
        before = code[: code.index(setups(path)[0])]
        assert not [source for source in before if "import " in source], path.name


def test_stamping_twice_changes_nothing_and_taking_it_away_restores_the_files(copies):
    colab.stamp(copies, "")
    plain = {path.name: path.read_bytes() for path in copies.iterdir()}
    assert all(colab.stamp(copies, "me/gcpo", "dev").values())
    stamped = {path.name: path.read_bytes() for path in copies.iterdir()}
    assert not any(colab.stamp(copies, "me/gcpo", "dev").values())
    assert {path.name: path.read_bytes() for path in copies.iterdir()} == stamped != plain
    for path in copies.iterdir():
        title, _, badge = "".join(cells(path)[0]["source"]).split("\n")[:3]
        assert title.startswith("# ")
        address = f"https://colab.research.google.com/github/me/gcpo/blob/dev/notebooks/{path.name}"
        assert badge == f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({address})"
        assert setups(path) == [colab.setup_cell("me/gcpo", "dev")]
    colab.stamp(copies, "you/fork")
    assert b"me/gcpo" not in (copies / NOTEBOOKS[0].name).read_bytes()
    colab.stamp(copies, "")
    assert {path.name: path.read_bytes() for path in copies.iterdir()} == plain


def test_the_command_stamps_and_refuses_names_that_are_none(copies, monkeypatch):
    monkeypatch.setattr(runner, "notebooks_folder", lambda: copies)
    call = lambda *arguments: CliRunner().invoke(cli.main, ["colab", *arguments])  # noqa: E731
    assert f"{NOTEBOOKS[0].name}: stamped" in call("--repo", "me/gcpo").stdout
    assert f"{NOTEBOOKS[0].name}: as it was" in call("--repo", "me/gcpo").stdout
    for name in ("gcpo", "https://github.com/me/gcpo", 'me/gcpo"; import os', "me/gcpo/x"):
        assert "is not owner/name" in call("--repo", name).stderr
    assert "is not the name of a branch" in call("--repo", "me/gcpo", "--branch", 'a" b').stderr


def test_a_notebook_without_a_title_is_refused(copies):
    path = copies / NOTEBOOKS[0].name
    notebook = json.loads(path.read_text())
    notebook["cells"] = notebook["cells"][1:]
    path.write_text(json.dumps(notebook))
    with pytest.raises(UserError, match="the first cell must be text"):
        colab.stamp(copies, "me/gcpo")


def test_the_cell_does_nothing_where_the_package_is(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("installs"))
    exec(colab.setup_cell("me/gcpo"), {})
    assert list(tmp_path.iterdir()) == []


def test_the_cell_installs_the_clone_and_leaves_torch_alone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(list(map(str, command))))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="set REPOSITORY to owner/name"):
        exec(colab.setup_cell(), {})
    exec(colab.setup_cell("me/gcpo", "dev"), {})
    clone = str(tmp_path / "gcpo")
    assert ran[0] == ["git", "clone", "--depth", "1", "--branch", "dev", "https://github.com/me/gcpo", clone]
    assert ran[1][:4] == [sys.executable, "-m", "pip", "install"] and ran[1][-2:] == ["-e", clone] and sys.path[0] == clone
    constraints = Path(ran[1][ran[1].index("-c") + 1]).read_text().splitlines()
    import numpy
    import torch

    assert f"torch=={torch.__version__}" in constraints and f"numpy=={numpy.__version__}" in constraints
    assert not [line for line in constraints if line.startswith(("transformers", "trl"))]
