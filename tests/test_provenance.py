"""What result files record about their origin, and that a file is whole or absent."""

import json
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch

from gcpo_repro import provenance


def test_versions_are_the_installed_ones(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "trl", "no-such-package"))
    assert provenance.versions() == {
        "python": platform.python_version(), "torch": metadata.version("torch"), "trl": metadata.version("trl"),
        "no-such-package": "not installed",
    }  # fmt: skip


def test_versions_name_every_package_that_shapes_results():
    named = {"python", "gcpo-repro", "torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "numpy"}
    assert named <= provenance.versions().keys()


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A git repository with this package in it, and a function that runs git there."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # set while a git hook runs the tests
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "clone"
    module = root / "gcpo_repro" / "provenance.py"
    module.parent.mkdir(parents=True)
    module.write_text("1\n")

    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    monkeypatch.setattr(provenance, "__file__", str(module))
    return root, git


def test_commit_of_a_clone(clone):
    root, git = clone
    head = git("rev-parse", "HEAD")
    assert len(head) == 40 and provenance.git_commit() == head
    (root / "runs.txt").write_text("results are no change of the code")
    assert provenance.git_commit() == head
    (root / "gcpo_repro" / "provenance.py").write_text("2\n")
    assert provenance.git_commit() == head + "-dirty"
    git("add", ".")
    assert provenance.git_commit() == head + "-dirty"
    git("commit", "-q", "-m", "second")
    assert provenance.git_commit() == git("rev-parse", "HEAD") != head


def test_commit_is_not_that_of_another_repository_around_the_package(clone, monkeypatch):
    root, _ = clone
    monkeypatch.setattr(provenance, "__file__", str(root / ".venv" / "site-packages" / "gcpo_repro" / "provenance.py"))
    (root / ".venv" / "site-packages" / "gcpo_repro").mkdir(parents=True)
    assert provenance.git_commit() == "unknown"


def test_commit_outside_git(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    assert provenance.git_commit() == "unknown"


@pytest.mark.parametrize("error", [FileNotFoundError("git"), subprocess.TimeoutExpired("git", 10)])
def test_commit_without_a_working_git(clone, monkeypatch, error):
    def run(*arguments, **options):
        raise error

    monkeypatch.setattr(subprocess, "run", run)
    assert provenance.git_commit() == "unknown"


def test_hardware_is_this_machine():
    found = provenance.hardware()
    assert found.keys() == {"platform", "cpu", "cores", "memory_gib", "torch_threads", "gpus"}
    assert found["cores"] == len(os.sched_getaffinity(0)) and found["torch_threads"] == torch.get_num_threads()
    total = int(next(line for line in open("/proc/meminfo") if line.startswith("MemTotal")).split()[1])  # KiB
    assert found["memory_gib"] == pytest.approx(total / 2**20, abs=0.1)
    assert found["cpu"] and len(found["gpus"]) == torch.cuda.device_count()


def test_record_has_all_that_results_need():
    record = provenance.record({"steps": 3}, [1, 2], time.time() - 5)
    assert record.keys() == {
        "config", "seed", "versions", "commit", "hardware", "command", "started_unix", "wall_time_seconds"
    }  # fmt: skip
    assert record["config"] == {"steps": 3} and record["seed"] == [1, 2]
    assert 5 <= record["wall_time_seconds"] < 60
    assert abs(time.time() - record["started_unix"] - record["wall_time_seconds"]) < 5
    assert json.loads(json.dumps(record)) == record


def test_write_json_makes_folders_and_leaves_one_whole_file(tmp_path):
    path = provenance.write_json(tmp_path / "a" / "b" / "x.json", {"gain": 1.5, "none": None})
    assert json.loads(path.read_text()) == {"gain": 1.5, "none": None}
    assert os.listdir(path.parent) == ["x.json"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), {"a": {1, 2}}])
def test_write_json_refuses_what_json_cannot_say(tmp_path, bad):
    path = tmp_path / "x.json"
    with pytest.raises((ValueError, TypeError)):
        provenance.write_json(path, {"value": bad})
    assert os.listdir(tmp_path) == []
    provenance.write_json(path, "old")
    with pytest.raises((ValueError, TypeError)):
        provenance.write_json(path, {"value": bad})
    assert os.listdir(tmp_path) == ["x.json"] and json.loads(path.read_text()) == "old"


@pytest.mark.parametrize("fails", ["write_text", "replace"])
def test_write_json_that_fails_leaves_the_old_file(tmp_path, monkeypatch, fails):
    path = provenance.write_json(tmp_path / "x.json", "old")
    write_text = Path.write_text

    def fail(self, *arguments):
        if fails == "write_text":
            write_text(self, "half a")  # a full disk leaves a stump
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, fails, fail)
    with pytest.raises(OSError, match="No space left"):
        provenance.write_json(path, "new")
    assert os.listdir(tmp_path) == ["x.json"] and json.loads(path.read_text()) == "old"
