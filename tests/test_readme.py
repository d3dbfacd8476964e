"""What the README says is held against the repository: its numbers, names, files, commands and its ten lines of Python."""

import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pandas as pd
import pytest

from gcpo_repro import cli
from gcpo_repro.reporting import figures

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
DATA = ROOT / "figures/data"


def tables():
    """Each table as a list of rows, a row as a list of cells."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", TEXT, re.MULTILINE)
    return [[[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()] for block in blocks]


def table_with(column):
    (found,) = [rows for rows in tables() if column in rows[0]]
    return found[2:]


def test_training_numbers_are_the_committed_ones():
    results = json.loads((DATA / "training_cpu.json").read_text())
    expected = figures.pass_at_1_table(results).reset_index().to_numpy().tolist()
    assert table_with("gain") == expected
    assert f"n = {results['config']['group_size']}, {results['config']['steps']} steps" in TEXT
    assert f"{len(results['config']['seeds'])} seeds" in TEXT


def test_the_figure_is_drawn_from_the_committed_numbers():
    results = json.loads((DATA / "training_cpu.json").read_text())
    drawn = json.loads((DATA / "learning_curves.json").read_text())
    found = figures.learning_curve_data(results)
    assert found.keys() == drawn.keys() and found["curves"].keys() == drawn["curves"].keys()
    for method, panels in found["curves"].items():
        for panel, columns in panels.items():
            for name, values in columns.items():
                assert values == pytest.approx(drawn["curves"][method][panel][name], abs=1e-12), (method, panel, name)


def test_formulas_are_the_committed_ones():
    expected = pd.read_csv(DATA / "formulas.csv")
    rows = table_with("closed form")
    assert len(rows) == len(expected) >= 20
    for row, (_, found) in zip(rows, expected.iterrows(), strict=True):
        assert row[0].replace("\\|", "|") == found["formula"]
        assert row[1:] == [f"{found['closed form']:.4f}", f"{found['simulated']:.4f} ± {found['standard error']:.4f}"]


def test_collider_numbers_are_the_committed_ones():
    found = json.loads((DATA / "collider_in_a_model.json").read_text())
    r = {n: cell["q_right"]["r"] for n, cell in found["dependence"].items()}
    z = {n: cell["q_right"]["z"] for n, cell in found["dependence"].items()}
    for n in r:
        assert f"{r[n]:+.2f} (z = {z[n]:.0f}) at n = {n}".replace("-", "−") in TEXT
    for kind, cell in found["slope"].items():
        assert f"{cell['value']:.2f} [{cell['low']:.2f}, {cell['high']:.2f}] for the {kind}'s".replace("-", "−") in TEXT


def test_audit_numbers_are_computed():
    from gcpo_repro.evaluation import audit

    tables = audit.audit()
    gains, averages = tables["gains"], tables["averages"]
    gains = gains[gains["rho"] == gains["rho"].iloc[0]]
    single = gains[gains["k"] == 1]
    assert not single["exceeds"].any() and not gains[gains["problems"] == "resampled"]["exceeds"].any()
    assert f"Of {len(single) // 2} gains over the next best method none exceeds" in TEXT and gains["k"].max() == 64
    assert (averages["verdict"] == "inconsistent").sum() == 4 and "four printed averages" in TEXT


def resume_rows():
    """Where it was killed, and for num_iterations 1 and 2: from which step it went on, and whether the result is the same."""
    found = json.loads((DATA / "resume.json").read_text())["rows"]
    places: dict[str, list[list[dict]]] = {}
    for row in found:
        place = "at a random time" if row["killed"].startswith("at a random time") else row["killed"]
        places.setdefault(place, [[], []])[row["num_iterations"] - 1].append(row)
    said = []
    for place, cells in places.items():
        texts = []
        for cell in cells:
            same = "identical" if all(row["identical"] for row in cell) else "DIFFERENT"
            torn = ", past a torn checkpoint" if any(row["torn_checkpoint_found"] for row in cell) else ""
            texts.append(f"{same} (from step {', '.join(str(row['resumed_at']) for row in cell)}{torn})")
        said.append([place, *texts])
    return said


def memory_rows():
    cases = json.loads((DATA / "memory.json").read_text())["cases"]
    return [
        [
            name.replace("-", " parameters, "), f"{case['weights_estimated_mb']:.0f} / {case['weights_mb']:.0f}",
            f"{case['estimated_mb']:.0f} / {case['measured_mb']:.0f}", f"{case['ratio']:.2f}",
        ] for name, case in cases.items()
    ]  # fmt: skip


def cost_rows():
    """A GCPO step in GRPO steps of the same run: measured, and its token floor; memory that steps add."""
    rows = []
    for name in ("cost_n4", "cost_n8"):
        run = json.loads((DATA / f"{name}.json").read_text())
        size = f"n = {run['config']['group_size']}, {run['config']['tokens']} tokens"
        for method, label in (("fast", "fast"), ("full", "whole answers, L = 2")):
            rows.append([
                size, label, f"{run[f'{method}_ratio']:.2f}", f"{run[f'{method}_floor_ratio']:.2f}",
                f"{run[f'{method}_memory_ratio']:.2f}",
            ])  # fmt: skip
        short = f"n = {run['config']['group_size']}, {run['literal_tokens']} tokens"
        rows.append([short, "to the letter, n³ rollouts", f"{run['literal_ratio']:.0f}", "–", "–"])
    return rows


def agreement_rows():
    rows = []
    for found in json.loads((DATA / "agreement.json").read_text())["settings"][1:]:  # the first is the reference itself
        cells = [
            "none" if found[name] is None else f"{found[name]:.2f} [{found[f'{name} low']:.2f}, {found[f'{name} high']:.2f}]"
            for name in ("rank", "projection")
        ]
        cells += [f"{100 * found['order changed']:.0f}", f"{found['log_rho correlation']:.2f}", f"{found['generated']:.0f}"]
        rows.append([found["setting"], found["approximates"], *cells])
    return rows


def grading_rows():
    found = json.loads((DATA / "grading_throughput.json").read_text())["one_process"]
    return [
        [
            row["answers"], f"{row['math_verify_per_second']:.0f}", f"{row['child_per_second']:.0f}",
            f"{row['math_verify_correct']} / {row['grade_correct']} of {row['pairs']}",
        ] for row in found
    ]  # fmt: skip


TABLES = {
    "killed": resume_rows, "a step: estimated / measured, MB": memory_rows, "token floor": cost_rows,
    "rank of Υ": agreement_rows, "`grade`, one child": grading_rows,
}  # fmt: skip


@pytest.mark.parametrize("column", TABLES)
def test_measured_tables_are_the_committed_numbers(column):
    assert table_with(column) == TABLES[column]()


def test_sweeps_and_scaling_are_the_committed_numbers():
    sweeps = json.loads((DATA / "sweeps.json").read_text())
    for name, least in (("alpha", 0.1), ("kappa", 0.0), ("similarity", 0.0), ("ablation", 0.0)):
        points = [point for point in sweeps["points"] if point["sweep"] == name]
        values = [100 * point["mean"] for point in points if name != "alpha" or point["value"] > least]
        assert f"{min(values):.1f}–{max(values):.1f} %" in TEXT.replace("\n", " "), name
    files = json.loads((DATA / "grading_throughput.json").read_text())["files"]
    scaling = {row["file"]: row for row in files if row["workers"] == 2}
    phrases = {"ordinary": "as fast as one on a file", "algebra only": "where every answer", "the gold only": "where none"}
    for file, words in phrases.items():
        assert f"{scaling[file]['speed_up']:.1f} times {words}" in TEXT, file


def test_functions_and_tests_of_the_table_exist():
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for _, function, test, notebooks in table_with("test"):
        module, name = re.fullmatch(r"`(\w+)\.(\w+)`", function).groups()
        assert re.search(rf"^(?:def|class) {name}\b", (ROOT / f"gcpo_repro/{module}.py").read_text(), re.MULTILINE), function
        assert f"def {test.strip('`')}(" in tests, test
        for number in notebooks.split(", "):
            assert list((ROOT / "notebooks").glob(f"{number}_*.ipynb")), number


def test_every_metric_has_its_line():
    source = (ROOT / "gcpo_repro/metrics.py").read_text().split("def upsilon_metrics")[1].split("\ndef within")[0]
    logged = set(re.findall(r'"(\w+)": |found\["(\w+)"\] =', source))
    logged = {one or other for one, other in logged}
    logged |= {"kl", "unscorable", "clamped_low", "clamped_high", "integrated_length", "integrated_truncated"}
    logged |= {"extra_seconds", "extra_generated_tokens"}
    explained = set()
    for names, *_ in table_with("a bad value means"):
        first, *others = re.findall(r"`(\w+)`", names)
        explained |= {first, *(first.rsplit("_", 1)[0] + other if other.startswith("_") else other for other in others)}
    assert explained == logged


def test_files_and_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("http") or (ROOT / target).exists(), target
    for path in re.findall(r"`((?:gcpo_repro|notebooks|figures|tests)/[\w/.]+)`", TEXT):
        assert (ROOT / path).exists(), path
    headings = {re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", TEXT)) <= headings


def test_every_notebook_has_its_line():
    stems = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert set(re.findall(r"\| `(\d\d_\w+)` \|", TEXT)) == stems


def test_commands_exist_with_their_options():
    commands = re.findall(r"`gcpo-repro (\w+)([^`]*)`", TEXT)
    assert {name for name, _ in commands} >= {"reproduce", "train", "pretrain", "runs", "env"}
    for name, rest in commands:
        command = cli.main.commands[name]
        assert isinstance(command, click.Command)
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known, (name, rest)
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|    )make ([a-z-]+)", TEXT)) <= targets


def test_the_ten_lines_of_python_run(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(code.strip().splitlines()) <= 13 and "max_steps=20" in code and '"runs/first"' in code
    code = code.replace("max_steps=20", "max_steps=1").replace('"runs/first"', repr(str(tmp_path)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "gcpo/upsilon_mean" in done.stdout


def test_the_configuration_file_of_the_readme_is_valid(tmp_path):
    from gcpo_repro.settings import load_settings

    (content,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(content)
    settings = load_settings(tmp_path / "mine.yaml")
    assert settings.data_config == "main" and settings.max_completion_length == 512
    assert settings.batch_size % settings.device_batch_size == 0


@pytest.mark.parametrize("target", ["reproduce", "test"])
def test_the_two_commands_are_on_the_first_screen(target):
    assert TEXT.index(f"    make {target} ") < len(TEXT) / 3
