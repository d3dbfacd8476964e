"""The gallery: every figure can be read at its final size, in grey as well, and the committed files are what the data give."""

import importlib
import itertools
import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import pytest
from click.testing import CliRunner
from matplotlib import colors
from matplotlib.container import BarContainer, ErrorbarContainer

from gcpo_repro import UserError, cli
from gcpo_repro.reporting import figures, gallery, manifest, parameters, tables
from tests.texts import assert_readable

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "figures"
COMMITTED = json.loads((FOLDER / "manifest.json").read_text())
AGAIN = "run `gcpo-repro figures` and commit what it makes"
OKABE_ITO = {"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"}


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


# The committed files


@pytest.mark.parametrize("name", [name for name in gallery.FIGURES if name in COMMITTED])
def test_committed_figure(name, tmp_path):
    """Drawn from the committed data: the same bytes under the same versions, else the same numbers; and it can be read."""
    figure = manifest.build(name, manifest.find(name, FOLDER / "data"))
    entry = COMMITTED[name]
    assert manifest.sha256(manifest.shown_numbers(figure).encode()) == entry["shown"], AGAIN
    files = figures.save_pictures(figure, tmp_path / name)
    if entry["versions"] == manifest.drawing_versions():
        assert {file.name: manifest.sha256(file.read_bytes()) for file in files} == entry["files"], AGAIN
    assert_readable(figure)
    assert figure.get_figwidth() <= 7.0, "two columns of text"
    assert_told_apart(figure)


def assert_told_apart(figure):
    """In every legend two entries differ in marker, line or hatch, or by a visible step in grey; colours are the style's."""
    for axes in figure.axes:
        looks = [look(handle) for handle in axes.get_legend_handles_labels()[0]]
        for (shape, grey, _), (other, other_grey, _) in itertools.combinations(looks, 2):
            assert shape != other or abs(grey - other_grey) > 0.1
        for _, _, color in looks:
            red, green, blue = colors.to_rgb(color)
            shade = max(red, green, blue) - min(red, green, blue) < 0.02
            assert shade or colors.to_hex(color) in OKABE_ITO or blue >= green >= red, color


def look(handle):
    if isinstance(handle, BarContainer):
        handle = handle.patches[0]
        shape, color = ("bar", handle.get_hatch()), handle.get_facecolor()
    elif isinstance(handle, ErrorbarContainer) and handle.lines[0] is None:  # intervals alone
        shape, color = ("interval", None), handle.lines[2][0].get_color()[0]
    else:
        handle = handle.lines[0] if isinstance(handle, ErrorbarContainer) else handle
        shape, color = (handle.get_marker(), handle.get_linestyle()), handle.get_color()
    return shape, sum(w * c for w, c in zip((0.299, 0.587, 0.114), colors.to_rgb(color), strict=True)), color


@pytest.mark.parametrize("name", [name for name in gallery.TABLES if name in COMMITTED])
def test_committed_table(name):
    table = manifest.build(name, manifest.find(name, FOLDER / "data"))
    assert tables.csv(table) == (FOLDER / f"tables/{name}.csv").read_text(), AGAIN
    caption = gallery.TABLES[name].caption
    assert tables.markdown(table, caption) == (FOLDER / f"tables/{name}.md").read_text(), AGAIN
    assert tables.latex(table, caption, name) == (FOLDER / f"tables/{name}.tex").read_text(), AGAIN


def test_manifest_tells_what_was_made_of_what():
    assert list(COMMITTED) == [name for name in gallery.ENTRIES if name in COMMITTED], "in the gallery's order"
    assert len(COMMITTED) >= len(gallery.ENTRIES) - 1  # the table of the sweeps waits for its data
    for name, entry in COMMITTED.items():
        module, function = entry["function"].rsplit(".", 1)
        assert callable(getattr(importlib.import_module(module), function)), entry["function"]
        assert entry["command"] == f"gcpo-repro figures --only {name}"
        assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", entry["commit"])
        assert entry["versions"]["matplotlib"] and entry["seconds"] < 60
        for file, sha256 in entry["files"].items():
            assert manifest.sha256((FOLDER / file).read_bytes()) == sha256, f"{file}: {AGAIN}"
        for data, origin in entry["data"].items():
            path = FOLDER / "data" / data if data != "published.csv" else manifest.published.FILE
            assert manifest.sha256(path.read_bytes()) == origin["sha256"], f"{data}: {AGAIN}"
            assert origin["made by"] and isinstance(origin["seeds"], list)
    assert sum(entry["seconds"] for entry in COMMITTED.values()) < 60


def test_no_file_is_left_over():
    listed = {file for entry in COMMITTED.values() for file in entry["files"]}
    there = {path.relative_to(FOLDER).as_posix() for folder in (FOLDER, FOLDER / "tables") for path in folder.glob("*.*")}
    assert there == listed | {"manifest.json"}


@pytest.mark.parametrize("name", [n for n, source in gallery.SOURCES.items() if source.seeds and "--only 0" in source.made])
def test_seeds_are_those_of_the_notebook(name):
    source = gallery.SOURCES[name]
    (notebook,) = (ROOT / "notebooks").glob(f"{source.made.split()[-1]}_*.ipynb")
    declared = parameters.declared_parameters(notebook)
    chosen = declared | parameters.read_parameters(ROOT / f"notebooks/profiles/cpu/{notebook.stem}.yaml", declared)
    count = chosen["kernel_seeds"] if name == "estimated" else 1
    expected = chosen["seeds"] if "seeds" in chosen else [chosen["seed"] + k for k in range(count)]
    assert list(source.seeds) == expected


# What is compared on other versions


def bars(height, size=8):
    with plt.rc_context({"font.size": size, "figure.dpi": 10 * size}):
        figure, axes = plt.subplots()
        axes.bar([0, 1], [1, height])
        axes.plot([0, 1], [2, 3], label="line")
        axes.set_title("title", loc="left")
        return figure


def test_shown_numbers_are_those_of_the_data_not_of_the_look():
    shown = manifest.shown_numbers(bars(2.0))
    assert shown == manifest.shown_numbers(bars(2.0, size=11)) == manifest.shown_numbers(bars(2.0 + 1e-9))
    assert shown != manifest.shown_numbers(bars(2.001))
    relabelled = bars(2.0)
    relabelled.axes[0].set_xlabel("other")
    assert shown != manifest.shown_numbers(relabelled)


# Redrawing


def scm(folder, n=4):
    folder.mkdir(exist_ok=True)
    (folder / "scm.json").write_text(json.dumps({"n": n, "given": ["q"]}))
    return folder


def test_redraw_one_keeps_the_others_and_the_old_record_of_the_same(tmp_path):
    data, out, said = scm(tmp_path / "data"), tmp_path / "out", []
    first = manifest.redraw(data, out, ["scm"], said.append)
    assert list(first) == ["scm"] and sorted(path.name for path in out.iterdir()) == ["manifest.json", "scm.png", "scm.svg"]
    assert said[0].startswith("scm: scm.png, scm.svg")
    old = json.loads((out / "manifest.json").read_text())
    old["scm"]["commit"] = "earlier"
    (out / "manifest.json").write_text(json.dumps(old))
    both = manifest.redraw(data, out, ["table_2", "scm"], said.append)
    assert list(both) == ["scm", "table_2"] and both["scm"]["commit"] == "earlier"
    changed = manifest.redraw(scm(data, 3), out, ["scm"], said.append)
    assert changed["scm"]["commit"] != "earlier" and changed["scm"]["files"] != old["scm"]["files"]
    assert both["table_2"]["data"].keys() == {"published.csv"}


@pytest.mark.parametrize(
    "old, new, kept", [("a", "b", "a"), ("a-dirty", "b", "b"), ("a-dirty", "b-dirty", "a-dirty"), ("a", "b-dirty", "a")]
)
def test_a_clean_commit_replaces_one_that_is_not(old, new, kept):
    record = {"files": {}, "seconds": 1.0}
    assert manifest._kept({**record, "commit": old}, {**record, "commit": new, "seconds": 2.0})["commit"] == kept


def test_a_run_of_notebooks_serves_as_data(tmp_path):
    folder = tmp_path / "02_projection_theorems"
    folder.mkdir()
    text = (FOLDER / "data/two_phis.json").read_text()
    (folder / "two_phis.json").write_text(text)
    found = manifest.find("two_phis", tmp_path)
    assert found == {"two_phis": [folder / "two_phis.json"]}
    entry = manifest.make("two_phis", found, tmp_path / "out")
    assert entry["shown"] == COMMITTED["two_phis"]["shown"] and entry["data"]["two_phis.json"]["seeds"] == [0]


def test_without_numbers_the_published_side_is_drawn_and_the_rest_said(tmp_path, monkeypatch):
    chosen = ("similarities", "two_phis", "table_1", "sweeps")
    monkeypatch.setattr(manifest, "ENTRIES", {name: gallery.ENTRIES[name] for name in chosen})
    said = []
    made = manifest.redraw(tmp_path, tmp_path / "out", echo=said.append)
    assert list(made) == ["similarities", "table_1"]
    assert "two_phis: left out, needs two_phis.json (gcpo-repro reproduce --profile cpu --only 02)" in said


def damaged(folder):
    scm(folder)
    (folder / "two_phis.json").write_text('{"kind": ["algorithm"]}')
    (folder / "gains_and_noise.json").write_text("{")
    (folder / "bad").mkdir()
    (folder / "bad/manifest.json").write_text("[")
    return folder


@pytest.mark.parametrize(
    "data, out, only, message",
    [
        ("missing", "out", [], "data: .*missing.* is no folder"),
        ("data", "out", ["alpha"], "only: alpha unknown; choose from scm, code_tasks"),
        ("data", "out", ["theorems"], r"only: theorems needs theorems.json \(gcpo-repro reproduce"),
        ("data", "out", ["two_phis"], "data: 'L' is missing in .*two_phis.json"),
        ("data", "out", ["gains_and_noise"], "gains_and_noise.json cannot be read"),
        ("data", "data/bad", ["scm"], "manifest.json cannot be read .*remove it"),
    ],
)
def test_bad_input(tmp_path, data, out, only, message):
    damaged(tmp_path / "data")
    with pytest.raises(UserError, match=message):
        manifest.redraw(tmp_path / data, tmp_path / out, only, print)


def test_command(tmp_path):
    data = scm(tmp_path / "data")
    done = CliRunner().invoke(cli.main, ["figures", "--data", str(data), "--out", str(tmp_path / "out"), "--only", "scm"])
    assert done.exit_code == 0 and "scm: scm.png, scm.svg" in done.output
    done = CliRunner().invoke(cli.main, ["figures", "--only", "nothing"])
    assert done.exit_code == 1 and done.output.startswith("Error: only: nothing unknown")
