"""The notebook runner against each of papermill's silences (style.md) and each fault it promises to tell."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from gcpo_repro import provenance
from gcpo_repro.errors import UserError
from gcpo_repro.reporting import execution, run_folders, runner

SEED = "seed = 1  # of every draw"


class Clone:
    """A little clone: `notebooks/`, their profile cpu, and what the runner said."""

    def __init__(self, root: Path) -> None:
        self.notebooks, self.profile = root / "notebooks", root / "notebooks/profiles/cpu"
        self.out, self.said = root / "runs/cpu", list[str]()
        self.profile.mkdir(parents=True)

    def add(
        self, name: str, *cells: str, parameters: str = SEED, given: str = "seed: 3", kernel: str = "python3"
    ) -> None:
        tagged = new_code_cell(parameters, metadata={"tags": ["parameters"]})
        nb = new_notebook(cells=[new_markdown_cell("# Title"), tagged, *map(new_code_cell, cells)])
        nb.metadata["kernelspec"] = {"name": kernel, "display_name": kernel, "language": "python"}
        nbformat.write(nb, self.notebooks / f"{name}.ipynb")
        (self.profile / f"{name}.yaml").write_text(given)

    def reproduce(self, **options: Any) -> bool:
        self.said.clear()
        options = {"with_report": False} | options  # test_report.py looks at the page
        return runner.reproduce(notebooks=self.notebooks, echo=self.said.append, **options)

    def json(self, name: str) -> dict[str, Any]:
        content = json.loads((self.out / name).read_text())
        assert isinstance(content, dict)
        return content

    def spoken(self) -> str:
        return "\n".join(self.said)


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


@pytest.fixture(autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A one-file package in place of ours, and no torch only to describe the machine."""
    package = tmp_path_factory.mktemp("package")
    (package / "loss.py").write_text("kappa = 0.06\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "PACKAGE", package)
        patch.setattr(provenance, "hardware", dict)
        yield package


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No kernels: every notebook succeeds at once. The names of those that would have run."""
    started: list[str] = []

    def execute(notebook: Path, folder: Path, parameters: dict[str, Any], log: Any) -> Any:
        assert not (folder / runner.MARKER).exists(), "a notebook that runs must not look finished"
        started.append(notebook.stem)
        nb = nbformat.read(notebook, as_version=4)
        nb.metadata.papermill = nbformat.from_dict({"exception": None})
        for cell in nb.cells:
            cell.execution_count = 1
        (folder / notebook.name).write_text("executed")
        return nb

    monkeypatch.setattr(runner, "through_papermill", execute)
    return started


# --- real kernels: one run of many notebooks, looked at by many tests ---------------------------------------

LOOK = """
import json, os, sys
from pathlib import Path
facts = {"cwd": os.getcwd(), "python": sys.executable, "lr": repr(lr), "seeds": seeds, "text": text}
facts["marked"] = os.path.exists(os.path.join(out_dir, "success.json"))
Path(out_dir, "facts.json").write_text(json.dumps(facts))
print("looked around")
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    clone = Clone(tmp_path_factory.mktemp("a {clone}"))  # braces: papermill formats its paths
    declared = 'lr = 1e-3  # rate\nseeds = [1]  # runs\ntext = "a"  # any\nout_dir = ""  # results\n'
    given = "lr: 1\nseeds: [4, 5]\ntext: 'b \"quoted\"'\n"
    clone.add("00_looks", LOOK, parameters=declared, given=given)
    clone.add("01_killed", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "print('after')")
    clone.add("02_exits", "import sys; sys.exit(0)", "print('after')")
    clone.add("03_exits_last", "import sys", "sys.exit(0)")
    clone.add("04_raises", "print('so far')\nraise RuntimeError('no such\\nbenchmark')", "print('after')")
    clone.add("05_asserts", "gain = 1\nassert gain > 20")
    clone.add("06_foreign", "print('seed', seed)", kernel="kernel-of-another-machine")
    fake = clone.notebooks / "jupyter/kernels/python3"  # a kernel of the user's, of the same name
    fake.mkdir(parents=True)
    (fake / "kernel.json").write_text('{"argv": ["/bin/false"], "display_name": "x", "language": "python"}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provenance, "hardware", dict)
        patch.setenv("JUPYTER_PATH", str(clone.notebooks / "jupyter"))
        patch.setenv("PATH", "/usr/bin:/bin")
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        assert clone.reproduce(with_report=True) is False
    return clone


def test_results_and_marker(ran: Clone) -> None:
    marker = ran.json("00_looks/success.json")
    assert marker["config"]["lr"] == 1.0
    assert marker["config"]["seeds"] == marker["seed"] == [4, 5]
    assert {"versions", "commit", "hardware", "wall_time_seconds", "inputs"} <= marker.keys()
    assert ran.json("00_looks/facts.json")["marked"] is False
    assert "looked around" in (ran.out / "00_looks/log.txt").read_text()
    assert not list((ran.out / "00_looks").glob(".*")), "no drafts left behind"


def test_parameters_arrive_in_the_type_of_their_default(ran: Clone) -> None:
    facts = ran.json("00_looks/facts.json")
    assert (facts["lr"], facts["seeds"], facts["text"]) == ("1.0", [4, 5], 'b "quoted"')


def test_runs_in_the_clone_whatever_the_callers_folder(ran: Clone) -> None:
    assert ran.json("00_looks/facts.json")["cwd"] == str(ran.notebooks.parent)


def test_runs_in_this_interpreter_whatever_is_called_python3(ran: Clone) -> None:
    assert ran.json("00_looks/facts.json")["python"] == sys.executable


def test_kernel_name_of_another_machine_does_not_matter(ran: Clone) -> None:
    assert "seed 3" in (ran.out / "06_foreign/log.txt").read_text()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("01_killed", "the kernel died"),
        ("02_exits", "left early, 1 of 4 code cells never ran"),
        ("03_exits_last", "left early, 0 of 4 code cells never ran"),
        ("04_raises", "In [3]: RuntimeError: no such benchmark"),
        ("05_asserts", "In [3]: AssertionError: assert gain > 20"),
    ],
)
def test_failures(ran: Clone, name: str, reason: str) -> None:
    assert not (ran.out / name / "success.json").exists()
    assert reason in ran.json(f"{name}/failure.json")["reason"]
    assert (ran.out / name / f"{name}.ipynb").exists()
    assert any(name in line and "FAILED" in line and reason in line for line in ran.said)
    summary = ran.said[ran.said.index("5 of 7 notebooks failed:") :]
    assert any(line.startswith(f"  {name}: {reason}") for line in summary)
    assert f"    log: {ran.out / name / 'log.txt'}" in summary
    assert all("\n" not in line for line in ran.said)


def test_the_last_step_is_a_report_also_after_failures(ran: Clone) -> None:
    assert ran.said[-1] == f"report: {ran.out / 'report/index.html'}"
    front, problems = ((ran.out / "report" / name).read_text() for name in ("index.html", "problems.html"))
    assert "2 of 7 notebooks succeeded." in front
    assert "the kernel died" in problems and "RuntimeError: no such benchmark" in problems
    assert json.loads((ran.out / "report/report.json").read_text())["warnings"] == []


def test_log_tells_the_failure(ran: Clone) -> None:
    log = (ran.out / "04_raises/log.txt").read_text()
    assert "so far" in log
    assert "Traceback" in log
    assert "\x1b[" not in log


def test_failures_do_not_stop_the_rest_and_are_told_in_run_json(ran: Clone) -> None:
    run = ran.json("run.json")
    assert (run["kind"], run["state"], run["pid"]) == ("reproduce", "failed", os.getpid())
    assert [name for name, state in run["notebooks"].items() if state == "done"] == ["00_looks", "06_foreign"]
    assert runner.list_runs(ran.out.parent)[0]["state"] == "failed"


def test_interrupt_and_lock(clone: Clone) -> None:
    cell = "import os, time; open(out_dir + '/pid', 'w').write(str(os.getpid())); time.sleep(60)"
    clone.add("00_sleeps", cell, parameters='out_dir = ""  # results', given="")
    clone.add("01_after", "1")
    script = (
        "from gcpo_repro import provenance; from gcpo_repro.reporting import runner; import sys\n"
        f"try: runner.reproduce(notebooks={str(clone.notebooks)!r}, with_report=False)\n"
        "except KeyboardInterrupt: sys.exit(130)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(runner.__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    kernel = int(_wait_for((clone.out / "00_sleeps/pid").read_text))
    assert [run["state"] for run in runner.list_runs(clone.out.parent)] == ["running"]
    with pytest.raises(UserError, match=f"{clone.out} is being written by process {process.pid}; wait"):
        clone.reproduce()

    process.send_signal(signal.SIGINT)
    said, complaints = process.communicate(timeout=30)
    assert process.returncode == 130
    assert complaints == ""
    assert f"interrupted: what succeeded is kept in {clone.out}; the same command goes on" in said
    assert not run_folders.alive(kernel, time.time())
    assert not (clone.out / "00_sleeps/success.json").exists()
    run = clone.json("run.json")
    assert (run["state"], run["notebooks"]["00_sleeps"]) == ("interrupted", "interrupted")
    assert run["notebooks"]["01_after"] == "pending"
    with run_folders.locked(clone.out):  # the lock went with its process
        pass


def _wait_for(read: Callable[[], str]) -> str:
    for _ in range(300):
        try:
            if content := read():
                return content
        except FileNotFoundError:
            pass
        time.sleep(0.1)
    raise AssertionError("nothing came within 30 s")


# --- refused before anything starts -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "given", "message"),
    [
        (SEED, "seeed: 3", "unknown parameter 'seeed'; the notebook 00_a has seed"),
        ("lr = 1e-6  # rate", "lr: 1e-6", "lr: '1e-6' is not of the same type .* write 1.0e-6"),
        ("lrs = [1e-6]  # rates", "lrs: [1.0e-6, 1e-6]", "lrs: .*write 1.0e-6"),
        (SEED, "seed: 3.0", "seed: 3.0 is not of the same type as the default 1"),
        (SEED, "seed: true", "seed: True is not"),
        (SEED, "seed:", "seed: None is not"),
        (SEED, "seed: [3]", r"seed: \[3\] is not"),
        ("lr = 1.0  # rate", "lr: true", "lr: True is not"),
        ("lr = 1.0  # rate", "lr: .inf", "lr: inf is not a finite number"),
        ("flag = True  # switch", "flag: 1", "flag: 1 is not"),
        ("method = 'gcpo'  # name", "method: no", "method: False is not"),
        ("seeds = [1]  # all", "seeds: 1", "seeds: 1 is not"),
        ("seeds = [1]  # all", "seeds: [[1]]", "seeds: .* is not"),
        ("seeds = []  # all", "seeds: [{a: 1}]", "seeds: .* is not"),
        ("out_dir = ''  # results", "out_dir: here", "out_dir is set by the runner; remove"),
        (SEED, "- seed", "holds a list; write lines of `name: value`"),
        (SEED, "seed: [", "cannot be read as YAML"),
        ("n: int | None = 3  # count", "", "papermill does not see the parameter 'n'"),
        ("from typing import Literal\nm: Literal['a'] = 'a'  # x", "", "not a plain assignment: from typing"),
        ("m: Literal['a'] = 'a'  # x", "", "papermill does not see the parameter 'm'"),
        ("kappa = 0.06  # kappa = 0 is GRPO", "", "does not see the parameter 'kappa'.*any second '='"),
        ("seed = None  # none", "", "not a plain value: seed = None"),
        ("seed = {'a': 1}  # dict", "", "not a plain value"),
        ("seeds = [[1], [2]]  # nested", "", "not a plain value"),
        ("%matplotlib inline", "", "the parameters cell may hold only lines `name = value"),
    ],
)
def test_parameters_are_refused(
    clone: Clone, kernels: list[str], declared: str, given: str, message: str
) -> None:
    clone.add("00_a", "1", parameters=declared, given=given)
    with pytest.raises(UserError, match=message):
        clone.reproduce()
    assert kernels == []
    assert not clone.out.exists()


@pytest.mark.parametrize(
    ("declared", "given", "value"),
    [
        ("lr = 1e-3  # rate", "lr: 2", 2.0),
        ("lr: float = 1  # rate", "lr: 0.5", 0.5),
        ("lr = 1.0  # rate", "lr: 1.0e-6", 1e-6),
        ("lrs = [0.1]  # rates", "lrs: [1, 0.5]", [1.0, 0.5]),
        ("seeds = []  # all", "seeds: [1, 2]", [1, 2]),
        ("seeds = [1]  # all", "seeds: []", []),
        ("seed: int = -1  # with annotation", "", -1),
    ],
)
def test_parameters_are_taken(
    clone: Clone, kernels: list[str], declared: str, given: str, value: object
) -> None:
    clone.add("00_a", "1", parameters=declared, given=given)
    assert clone.reproduce()
    (found,) = clone.json("00_a/success.json")["config"].values()
    assert repr(found) == repr(value)


def test_all_are_checked_before_the_first_starts(clone: Clone, kernels: list[str]) -> None:
    clone.add("00_a", "1")
    clone.add("01_b", "1", given="seed: x")
    with pytest.raises(UserError, match=r"01_b\.yaml: seed"):
        clone.reproduce()
    assert kernels == []


@pytest.mark.parametrize("tags", [[], ["parameters", "parameters"]])
def test_one_parameters_cell(clone: Clone, tags: list[str]) -> None:
    clone.add("00_a")
    cells = [new_code_cell("a = 1", metadata={"tags": [tag]}) for tag in tags]
    nbformat.write(new_notebook(cells=cells), clone.notebooks / "00_a.ipynb")
    with pytest.raises(UserError, match=f"{len(tags)} code cells are tagged 'parameters'; tag exactly one"):
        clone.reproduce()


@pytest.mark.parametrize("content", ["", "no JSON", "{}", "[]", '{"nbformat": 4, "nbformat_minor": 5}'])
def test_broken_notebook(clone: Clone, content: str) -> None:
    clone.add("00_a")
    (clone.notebooks / "00_a.ipynb").write_text(content)
    with pytest.raises(UserError, match=r"00_a\.ipynb: not a readable notebook"):
        clone.reproduce()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile": "gpu"}, "profile: 'gpu' is unknown; choose one of smoke, cpu, t4"),
        ({"profile": "t4"}, "profile: 't4' has no files in"),
        ({"only": ["5"]}, "only: '5' is no notebook; the known ones are 00_a, 05_train, 06_new"),
        ({"only": ["06"]}, "only: '06' is not part of this profile, which has 00_a, 05_train"),
    ],
)
def test_unknown_profile_or_notebook(clone: Clone, options: dict[str, Any], message: str) -> None:
    for name in ("00_a", "05_train", "06_new"):
        clone.add(name)
    (clone.profile / "06_new.yaml").unlink()
    with pytest.raises(UserError, match=message):
        clone.reproduce(**options)


def test_parameter_file_of_no_notebook(clone: Clone) -> None:
    clone.add("00_a")
    (clone.profile / "00_aa.yaml").write_text("")
    with pytest.raises(UserError, match=r"00_aa\.yaml: no notebook 00_aa\.ipynb in .*; rename or remove"):
        clone.reproduce()


def test_only_works_from_a_clone() -> None:
    with pytest.raises(UserError, match=r"works from a clone .* `git clone`"):
        runner.reproduce()


def test_finds_the_notebooks_of_the_clone(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "PACKAGE", package / "clone/gcpo_repro")
    (package / "clone/notebooks/profiles").mkdir(parents=True)
    assert runner.notebooks_folder() == package / "clone/notebooks"


# --- what runs, what is skipped -----------------------------------------------------------------------------


def test_skips_what_succeeded_with_the_same_inputs(clone: Clone, kernels: list[str], package: Path) -> None:
    clone.add("00_a", "1")
    clone.add("01_b", "1", parameters='out_dir = ""  # results', given="")

    def ran_again(**options: Any) -> list[str]:
        kernels.clear()
        assert clone.reproduce(**options)
        return list(kernels)

    assert ran_again() == ["00_a", "01_b"]
    assert clone.said[-1] == f"all 2 notebooks succeeded; results in {clone.out}"
    assert ran_again() == []
    assert "[1/2] 00_a: skipped, it succeeded before with the same inputs" in clone.spoken()
    assert ran_again(force=True) == ["00_a", "01_b"]
    assert ran_again(force=True, only=["01"]) == ["01_b"]
    assert ran_again(force=True, only=["00_a", "01_b.ipynb"]) == ["00_a", "01_b"]

    (clone.profile / "00_a.yaml").write_text("seed: 4")  # a changed parameter
    assert ran_again() == ["00_a"]
    clone.add("01_b", "2", parameters='out_dir = ""  # results', given="")  # a changed notebook
    assert ran_again() == ["01_b"]
    (package / "loss.py").write_text("kappa = 0.07\n")  # a changed package
    assert ran_again() == ["00_a", "01_b"]
    (package / "policy.safetensors").write_bytes(b"\0")  # or its data
    assert ran_again() == ["00_a", "01_b"]
    (package / "__pycache__").mkdir()
    (package / "__pycache__/loss.pyc").write_bytes(b"\0")  # this is no change
    assert ran_again() == []
    (clone.out / "00_a/00_a.ipynb").unlink()  # a lost result
    assert ran_again() == ["00_a"]
    (clone.out / "00_a/success.json").write_text("{")  # half a marker is none
    assert ran_again() == ["00_a"]


def test_a_notebook_that_reads_the_run_runs_again_after_the_others(clone: Clone, kernels: list[str]) -> None:
    clone.add("00_a", "1")
    clone.add("01_b", "1")
    nb = nbformat.read(clone.notebooks / "01_b.ipynb", as_version=4)
    nb.cells[-1].metadata["tags"] = [runner.READS_RUN]
    nbformat.write(nb, clone.notebooks / "01_b.ipynb")
    assert clone.reproduce() and clone.reproduce()
    clone.add("00_a", "2")  # its result is another one, whatever the clock says
    assert clone.reproduce() and clone.reproduce()
    assert kernels == ["00_a", "01_b", "00_a", "01_b"]


def test_changed_versions_run_again(
    clone: Clone, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clone.add("00_a", "1")
    assert clone.reproduce()
    monkeypatch.setattr(runner, "versions", lambda: {"torch": "another"})
    assert clone.reproduce()
    assert kernels == ["00_a", "00_a"]


def test_part_of_a_profile(clone: Clone, kernels: list[str]) -> None:
    for name in ("00_a", "01_b", "02_c"):
        clone.add(name, "1")
    (clone.profile / "01_b.yaml").unlink()
    assert clone.reproduce(only=["02"])
    assert "01_b: not part of profile cpu (no profiles/cpu/01_b.yaml)" in clone.said
    assert clone.json("run.json")["state"] == "incomplete"
    assert clone.reproduce()
    assert clone.json("run.json") | {"pid": 0} == {
        "kind": "reproduce",
        "state": "done",
        "pid": 0,
        "profile": "cpu",
        "notebooks": {"00_a": "done", "02_c": "done"},
    }


def test_marker_is_written_last(clone: Clone, kernels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clone.add("00_a", "1")
    assert clone.reproduce()

    def crash(*_: Any) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(runner, "through_papermill", crash)
    assert not clone.reproduce(force=True)
    assert not (clone.out / "00_a/success.json").exists(), "the old marker must go before a new run"
    assert clone.json("00_a/failure.json")["reason"] == "RuntimeError: in the middle"
    assert clone.said[-2] == "  00_a: RuntimeError: in the middle"


def test_progress_is_plain_and_rare(clone: Clone, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: list[str] = []
    with (tmp_path / "log.txt").open("w") as file:
        log = execution.Log(file, "[1/1] 05", said.append)
        for index in range(100):
            log.cell_started(None, index)
            log.write(f"step {index}\n")
        assert said == []
        monkeypatch.setattr(execution, "SECONDS_BETWEEN_LINES", 0.0)
        log.write("10%\r20%\n")
    assert said == ["[1/1] 05: cell 100, 0 s: 20%"]
    assert (tmp_path / "log.txt").read_text().startswith("step 0\nstep 1\n")


# --- the output folder --------------------------------------------------------------------------------------


def _read_only(tmp_path: Path) -> Path:
    if os.geteuid() == 0:  # root writes everywhere but here
        return Path("/proc/runs")
    (tmp_path / "closed").mkdir(mode=0o555)
    return tmp_path / "closed"


def _file_in_the_way(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    return tmp_path / "file"


@pytest.mark.parametrize("place", [_read_only, _file_in_the_way])
def test_folder_that_cannot_be_written(
    clone: Clone, kernels: list[str], tmp_path: Path, place: Callable[[Path], Path]
) -> None:
    clone.add("00_a", "1")
    out = place(tmp_path)
    with pytest.raises(
        UserError, match=rf"out: cannot write into {out} \(.*make it writable or give another"
    ):
        clone.reproduce(out=out)
    assert kernels == []


def test_full_disk_before_the_start(
    clone: Clone, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    clone.add("00_a", "1")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device\); free some space"):
        clone.reproduce()
    assert kernels == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_in_mid_run(clone: Clone) -> None:
    clone.add("00_a", "1")
    (clone.out / "00_a").mkdir(parents=True)
    (clone.out / "00_a/00_a.ipynb").symlink_to("/dev/full")
    with pytest.raises(
        UserError, match=r"No space left on device.*free some space and give the same command"
    ):
        clone.reproduce()
    assert not (clone.out / "00_a/success.json").exists()
    assert clone.json("run.json")["state"] == "failed"


def test_list_runs(tmp_path: Path) -> None:
    def folder(name: str, run: dict[str, Any] | None = None, *files: str) -> None:
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text("{}")
        if run is not None:
            provenance.write_json(tmp_path / name / "run.json", run)

    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True)
    dead = int(child.stdout)
    folder("cpu", {"kind": "reproduce", "state": "done", "pid": dead}, "05/log.txt", "05/results.json")
    folder("deep/seed0", {"kind": "train", "state": "failed", "pid": dead}, "config.json")
    folder("mine", {"kind": "train", "state": "running", "pid": os.getpid()})
    folder("killed", {"kind": "train", "state": "running", "pid": dead})
    folder("nobody", {"kind": "train", "state": "running"})
    folder("old", None, "results.json")
    folder("older", None, "config.json")
    folder("partly", None, "00_a/success.json", "01_b/log.txt")
    folder("notes", None, "ideas.txt")
    folder("page", None, "report.json", "_downloads/1/results.json")  # a report of a run is no run
    found = {run["name"]: (run["kind"], run["state"]) for run in runner.list_runs(tmp_path)}
    assert found == {
        "cpu": ("reproduce", "done"),
        "deep/seed0": ("train", "failed"),
        "killed": ("train", "interrupted"),
        "mine": ("train", "running"),
        "nobody": ("train", "interrupted"),
        "old": ("train", "done"),
        "older": ("train", "incomplete"),
        "partly": ("reproduce", "incomplete"),
    }
    old = next(run for run in runner.list_runs(str(tmp_path)) if run["name"] == "old")
    assert old["size"] == len("{}")
    assert old["modified"][:10] in {
        time.strftime("%Y-%m-%d", time.localtime(time.time() - s)) for s in (0, 60)
    }
    assert runner.list_runs(tmp_path / "nowhere") == []


def test_inherited_process_number_is_not_alive() -> None:
    assert run_folders.alive(os.getpid(), time.time())
    assert not run_folders.alive(os.getpid(), time.time() - 10**6)  # written long before this process began
