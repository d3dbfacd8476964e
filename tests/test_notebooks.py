"""Every committed notebook keeps the house rules, and every parameter file fits its notebook."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml
from papermill.exceptions import PapermillExecutionError

from gcpo_repro.reporting.gallery import ENTRIES
from gcpo_repro.reporting.runner import PROFILES, declared_parameters, read_parameters, reproduce

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
FILES = [path for path in sorted((FOLDER / "profiles").glob("*/*")) if path.parent.name != "accelerate"]  # not papermill's


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


# --- the notebooks as a set ---


def _text(notebook: Path) -> str:
    return "\n\n".join(cell.source for cell in _cells(notebook, "markdown"))


def _links(text: str) -> list[str]:
    """Targets of links and images that lie in the repository."""
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:", target)]


def _anchors(notebook: Path) -> set[str]:
    """As JupyterLab makes them: a heading with hyphens for spaces."""
    return {heading.strip().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", _text(notebook), re.MULTILINE)}


def test_opens_with_the_question_and_ends_with_what_it_shows(notebook: Path) -> None:
    first, last = (_cells(notebook, "markdown")[k].source for k in (0, -1))
    assert first.startswith(f"# {notebook.stem[:2]} · ") and "\n\n**Question.** " in first
    assert re.findall(r"^## (.+)$", last, re.MULTILINE)[-1] == "What this shows, and what it does not"


def test_first_cell_gives_time_and_memory_of_each_profile(notebook: Path) -> None:
    first = _cells(notebook, "markdown")[0].source
    for profile in ("smoke", "cpu"):
        assert re.search(rf"^\| {profile} \|(.*\|)? \d+ s \| \d\.\d GB \|", first, re.MULTILINE), profile


def test_leads_to_the_one_before_and_the_one_after(notebook: Path) -> None:
    place, line = NOTEBOOKS.index(notebook), _cells(notebook, "markdown")[0].source.splitlines()[-1]
    neighbours = [path.name for path in NOTEBOOKS[max(0, place - 1) : place + 2] if path != notebook]
    assert [link for link in _links(line) if "#" not in link] == neighbours
    for words, target in re.findall(r"\[(?:← )?(\d\d · [^\]]+?)(?: →)?\]\(([^)#]+)\)", line):
        assert _text(FOLDER / target).startswith(f"# {words}"), "the link has the title's words"


def test_links_lead_somewhere(notebook: Path) -> None:
    assert _links(_text(notebook))
    for link in _links(_text(notebook)):
        file, _, anchor = link.partition("#")
        target = (FOLDER / file) if file else notebook
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def test_start_page_lists_the_others_in_order() -> None:
    text = _text(NOTEBOOKS[0]).split("## Where to go")[1]
    assert list(dict.fromkeys(_links(text))) == [path.name for path in NOTEBOOKS[1:]]


def _glossary() -> list[list[str]]:
    """Rows of the table of names: symbol, in the paper, meaning, code, equation."""
    table = _text(NOTEBOOKS[0]).split("## Names")[1].split("## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines() if line.startswith("| ")]
    return rows[1:]


def test_glossary_names_what_the_package_has() -> None:
    rows = _glossary()
    assert len(rows) > 15 and len({row[0] for row in rows}) == len(rows), "one name per symbol"
    for symbol, paper, _, code, equations in rows:
        module, *names = code.strip("`").split(".")
        thing = importlib.import_module(f"gcpo_repro.{module}")
        for name in names:
            known = {item.name: item for item in fields(thing)} if is_dataclass(thing) else {}
            thing = known[name] if name in known else getattr(thing, name)
        said = thing.metadata["help"] if hasattr(thing, "metadata") else thing.__doc__ or ""
        for number in re.findall(r"\d+", equations):
            assert 1 <= int(number) <= 13, symbol
            if module in ("loss", "config"):
                assert re.search(rf"Eq\. (\d+(,| and) )*{number}\b", said), f"{code} says that it is Eq. {number}"
        assert paper == "–" or re.fullmatch(r"\$[^$]+\$(, \$[^$]+\$)?", paper), symbol


# --- figures ---


def _drawn_in_07() -> set[str]:
    """Names that notebook 07 gives to its function `show`."""
    calls = [node for cell in _cells(FOLDER / "07_paper_figures.ipynb") for node in ast.walk(ast.parse(cell.source))
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "show"]  # fmt: skip
    return {ast.literal_eval(argument) for call in calls for argument in call.args}


def test_every_figure_of_the_manifest_exists_and_is_used() -> None:
    """Used is what notebook 07 draws; and all of the gallery is drawn there."""
    manifest = json.loads((ROOT / "figures/manifest.json").read_text())
    assert set(manifest) <= set(ENTRIES) == _drawn_in_07()
    for name, entry in manifest.items():
        assert entry["files"] and all((ROOT / "figures" / file).stat().st_size for file in entry["files"]), name


def test_every_file_beside_the_manifest_is_in_it() -> None:
    manifest = json.loads((ROOT / "figures/manifest.json").read_text())
    made = {file for entry in manifest.values() for file in entry["files"]}
    there = {path.relative_to(ROOT / "figures").as_posix() for kind in ("*", "tables/*") for path in (ROOT / "figures").glob(kind)
             if path.is_file() and path.name != "manifest.json"}  # fmt: skip
    assert there == made


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


def _run(notebook: Path, folder: Path, **parameters: object) -> nbformat.NotebookNode:
    return papermill.execute_notebook(
        str(notebook), str(folder / notebook.name), parameters, kernel_name="python3", progress_bar=False, cwd=str(folder)
    )


@pytest.mark.notebooks
def test_run_all_restart_and_run_all_then_another_parameter(tmp_path: Path) -> None:
    """Each run has a kernel of its own, and finds the files of the one before."""
    notebook, out = FOLDER / "07_paper_figures.ipynb", tmp_path / "07_paper_figures"
    small, larger = (_a_run(tmp_path / name, *files) for name, files in RUNS.items())
    for run, tables in ((small, 0), (small, 0), (larger, 1)):
        done = _run(notebook, tmp_path, out_dir=str(out), run_dir=str(run), committed=False)
        assert all(cell.execution_count for cell in done.cells if cell.cell_type == "code" and cell.source)
        outputs = [output for cell in done.cells for output in cell.get("outputs", [])]
        images = [output for output in outputs if "image/png" in output.get("data", {})]
        assert len(images) == len(list(out.glob("*.png"))) > 1, "each figure is shown once, those of the paper's numbers too"
        said = "".join(output.get("text", "") for output in outputs)
        assert said.count("formulas: left out, needs formulas.csv") == 1 - tables


RUNS = {"small": ["scm.json"], "larger": ["scm.json", "formulas.csv"]}


def _a_run(folder: Path, *files: str) -> Path:
    folder.mkdir()
    for file in files:
        (folder / file).write_text((ROOT / "figures/data" / file).read_text())
    return folder


@pytest.mark.notebooks
@pytest.mark.parametrize(
    ("stem", "parameters", "message"),
    [
        ("07_paper_figures", {"run_dir": "/nowhere"}, "run_dir: '/nowhere' is no folder"),
        ("05_train_qlora", {"methods": ["grpo", "gcp"]}, "methods: .*gcp"),
        ("06_benchmarks", {"benchmarks": ["aime23"]}, "benchmark: 'aime23' is unknown, choose from"),
    ],
)
def test_a_wrong_parameter_is_refused_by_name(stem: str, parameters: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(PapermillExecutionError) as refused:
        _run(FOLDER / f"{stem}.ipynb", tmp_path, out_dir=str(tmp_path), **parameters)
    assert refused.value.ename == "UserError"
    assert re.search(message, refused.value.evalue)
