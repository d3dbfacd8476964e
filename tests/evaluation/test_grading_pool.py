"""Grading in children: limits that cost one answer only, children that leave nothing behind, and files in and out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import psutil
import pyarrow.parquet
import pytest

from gcpo_repro import UserError
from gcpo_repro.evaluation.grading import grade
from gcpo_repro.evaluation.grading_files import Golds, Verdicts, examine
from gcpo_repro.evaluation.grading_pool import CRASHED, MEMORY, Pool, Worker, grade_file

TOWER = r"\boxed{9^{9^{9^9}}}"
GOLDS = {"a": r"\frac{1}{2}", "b": "x+1", "c": "(1,2)"}
ROWS = [
    {"id": "a", "sample": 0, "response": r"\boxed{0.5}"},
    {"id": "a", "sample": 1, "response": r"\boxed{\frac{2}{3}}"},
    {"id": "b", "sample": 0, "response": r"\boxed{1+x}"},
    {"id": "c", "response": "I do not know the answer."},
    {"id": "d", "gold": "7", "response": "<think>7"},
    {"id": 5, "gold": 7, "response": "The answer is 7."},
    {"id": "b", "sample": 1, "response": ""},
    {"id": "b", "sample": 2, "response": None},
]


@pytest.fixture(scope="module")
def worker():
    worker = Worker(memory=1 << 30)
    yield worker
    worker.close()


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


# Children and their limits


def test_a_timeout_costs_one_answer(worker):
    worker.start()
    requests = [
        (r"\boxed{x+1}", "1+x", False),
        (TOWER, "5", False),
        (r"\boxed{x+2}", "1+x", False),
        (r"\boxed{x+1}", "1+x", False),
    ]
    start = time.monotonic()
    verdicts = worker.grade(requests, limit=0.7)
    assert [v.reason for v in verdicts] == ["equal", "timed out", "different", "equal"]
    assert verdicts[1].answer == "9^{9^{9^9}}"
    assert 0.7 < time.monotonic() - start < 15  # once the limit, and a start


def test_too_much_memory_costs_one_answer():
    small = Worker(memory=500 << 20)
    try:
        verdicts = small.grade([(r"\boxed{2^{10^{11}}}", "5", False), ("5", "5", False)], limit=20)
    finally:
        small.close()
    assert not verdicts[0] and "memory" in verdicts[0].reason
    assert verdicts[1]


def test_a_killed_child_is_replaced(worker):
    worker.start()
    first = worker.child.pid
    os.kill(first, signal.SIGKILL)
    verdicts = worker.grade([("5", "5", False), ("6", "6", False)], limit=5)
    assert [v.reason for v in verdicts] == ["equal", "equal"]  # it died idle, which costs nobody
    assert worker.child.pid != first


def test_a_child_that_dies_at_work_costs_one_answer(worker):
    worker.start()
    killer = threading.Timer(0.5, worker.child.kill)
    killer.start()
    verdicts = worker.grade([("5", "5", False), (TOWER, "5", False), ("6", "6", False)], limit=20)
    killer.join()
    assert [v.reason for v in verdicts] == ["equal", CRASHED, "equal"]


def test_a_batch_that_does_not_fit_into_a_pipe(worker):
    requests = [("x" * 300_000 + rf"\boxed{{{k}}}", str(k - k % 2), False) for k in range(20)]
    assert [bool(v) for v in worker.grade(requests)] == [k % 2 == 0 for k in range(20)]


def test_a_pool_leaves_no_process_and_stops_at_once_when_it_fails():
    before = children()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Pool(1) as pool:
        futures = [pool.submit([(TOWER, "5", False)] * 20, 30) for _ in range(3)]
        pool.submit([], 1)
        while not children() - before:
            time.sleep(0.02)
        raise KeyboardInterrupt
    assert children() <= before and time.monotonic() - start < 15
    assert all(future.done() for future in futures)


def test_a_child_ends_with_its_parent():
    code = (
        "import os\nfrom gcpo_repro.evaluation.grading_pool import Worker\nworker = Worker()\nworker.start()\n"
        "print(worker.child.pid, flush=True)\nos._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    pid = int(done.stdout)
    deadline = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie"


# Files


def test_a_file_is_graded_in_its_order(tmp_path):
    source, out = write(tmp_path / "responses.jsonl", ROWS), tmp_path / "new" / "verdicts.jsonl"
    assert grade(r"\boxed{1+x}", "x+1")  # starts the process that `grade` keeps
    before = children()
    summary = grade_file("math500", source, out, golds=GOLDS)
    expected = [
        {key: row[key] for key in ("id", "sample") if key in row}
        | vars(grade(row["response"] or "", str(row.get("gold", GOLDS.get(row["id"])))))
        for row in ROWS
    ]
    assert read(out) == expected
    assert [row["correct"] for row in read(out)] == [True, False, True, False, False, True, False, False]
    assert summary == {
        "benchmark": "math500", "rows": 8, "ids": 5, "correct": 3, "no_answer": 4, "timed_out": 0,
        "wrong": {"empty response": 2, "different": 1, "no answer": 1, "unfinished thought": 1},
    }  # fmt: skip
    assert [path.name for path in out.parent.iterdir()] == ["verdicts.jsonl"]
    assert children() <= before


def test_hostile_rows_cost_no_other_row_and_workers_change_nothing(tmp_path):
    rows = [{"id": k, "sample": k % 3, "gold": str(k), "response": rf"\boxed{{{k}}}"} for k in range(150)]
    rows[3]["response"], rows[80]["response"], rows[81]["response"] = TOWER, "x" * 10**7, r"\boxed{" + "{" * 10**6
    source = write(tmp_path / "responses.jsonl", rows)
    summaries = [grade_file("gsm8k", source, tmp_path / f"{n}.jsonl", workers=n, golds={}, limit=1.5) for n in (1, 2)]
    assert summaries[0] == summaries[1] and summaries[0]["timed_out"] == 1 and summaries[0]["no_answer"] == 2
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()
    verdicts = read(tmp_path / "1.jsonl")
    assert [(v["id"], v["sample"]) for v in verdicts] == [(k, k % 3) for k in range(150)]
    assert Counter(v["correct"] for v in verdicts) == {True: 147, False: 3}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "a", "response": "1"', "line 3 is broken JSON"),
        ("[" * 100_000, "line 3 is broken JSON"),
        ("[1]", "line 3 holds a list; every line must be an object"),
        ('{"response": "1"}', "line 3: no 'id' among 'response'; add it"),
        ('{"id": "a", "text": "1"}', "line 3: no 'response' among 'id', 'text'"),
        (
            '{"id": "z", "response": "1"}',
            "line 3: id 'z' is not among the 3 of aime24 .such as 'a', 'b', 'c'.; .* another benchmark",
        ),
        ('{"id": ["a"], "response": "1"}', r"line 3: id \['a'\] is a list"),
        ('{"id": "a", "response": ["1"]}', "line 3: the response is a list"),
        ('{"id": "z", "response": "1", "gold": "$$ $$"}', "line 3: the gold answer of id 'z' is empty"),
        ('{"id": "z", "response": "1", "gold": ""}', "line 3: the gold answer of id 'z' is empty"),
        ('{"id": "z", "response": "1", "gold": true}', "line 3: the gold True is a bool; give one string or finite number"),
        ('{"id": "z", "response": "1", "gold": ["1"]}', r"line 3: the gold \['1'\] is a list"),
        ('{"id": "z", "response": "1", "gold": NaN}', "line 3: the gold nan is a float"),
        ('{"id": "a", "response": "1", "sample": {}}', "line 3: the sample {} is a dict"),
        ('{"id": false, "response": "1"}', "line 3: id False is a bool"),
    ],
)
def test_a_bad_row_is_told_with_its_line_before_anything_is_graded(tmp_path, line, message):
    good = {"id": "a", "response": r"\boxed{1}"}
    source = write(tmp_path / "responses.jsonl", [good, "", line, good])
    with pytest.raises(UserError, match=f"responses: .*responses.jsonl, {message}"):
        grade_file("aime24", source, tmp_path / "out.jsonl", golds=GOLDS)
    assert [path.name for path in tmp_path.iterdir()] == ["responses.jsonl"]


def test_files_that_cannot_be_used(tmp_path):
    source, out = tmp_path / "responses.jsonl", tmp_path / "out.jsonl"
    with pytest.raises(UserError, match="responses: no file .*responses.jsonl'"):
        grade_file("aime24", source, out, golds=GOLDS)
    source.write_bytes(b"\n\n")
    with pytest.raises(UserError, match="has no rows"):
        grade_file("aime24", source, out, golds=GOLDS)
    source.write_bytes(b'{"id": "a", "response": "1"}\n{"id": "a", "response": "\xff"}\n')
    with pytest.raises(UserError, match="line 2 is not UTF-8 .byte 26.; save"):
        grade_file("aime24", source, out, golds=GOLDS)
    write(source, ROWS)
    with pytest.raises(UserError, match="out: .* is the file of responses"):
        grade_file("aime24", source, source, golds=GOLDS)
    with pytest.raises(UserError, match="out: .* is a folder"):
        grade_file("aime24", source, tmp_path, golds=GOLDS)
    with pytest.raises(UserError, match="workers: 0 must be at least 1"):
        grade_file("aime24", source, out, golds=GOLDS, workers=0)
    with pytest.raises(UserError, match="graded by running its tests"):
        grade_file("humaneval", source, out, golds=GOLDS)
    assert read(source) == ROWS and not out.exists()


def test_a_parquet_file_and_a_byte_order_mark_are_read(tmp_path):
    whole = [{"id": str(row["id"]), **{key: row.get(key) for key in ("sample", "response")}} for row in ROWS[:4]]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(whole), tmp_path / "r.parquet", row_group_size=2)
    (tmp_path / "r.jsonl").write_bytes(b"\xef\xbb\xbf" + "".join(json.dumps(row) + "\n" for row in whole).encode())
    summaries = [grade_file("aime24", tmp_path / f"r.{kind}", tmp_path / kind, golds=GOLDS) for kind in ("parquet", "jsonl")]
    assert summaries[0] == summaries[1] and summaries[0]["rows"] == 4 and summaries[0]["correct"] == 2
    assert (tmp_path / "parquet").read_bytes() == (tmp_path / "jsonl").read_bytes()
    content = (tmp_path / "r.parquet").read_bytes()
    (tmp_path / "r.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="responses: .*r.parquet is torn or no Parquet"):
        grade_file("aime24", tmp_path / "r.parquet", tmp_path / "out", golds=GOLDS)
    assert not (tmp_path / "out").exists()


class Asked:
    """Counts the rows that children are asked to grade, and may stop the grading after some."""

    def __init__(self, monkeypatch):
        self.texts, self.stop_after, plain = [], None, Worker.grade

        def grade(worker, requests, limit):
            if self.stop_after is not None and len(self.texts) >= self.stop_after:
                raise KeyboardInterrupt
            self.texts += [text for text, _, _ in requests]
            return plain(worker, requests, limit)

        monkeypatch.setattr(Worker, "grade", grade)


def test_a_stopped_grading_goes_on_where_it_was(tmp_path, monkeypatch):
    rows = [{"id": k, "gold": str(k), "response": rf"\boxed{{{k - k % 3 % 2}}}"} for k in range(300)]
    source, whole, out = write(tmp_path / "r.jsonl", rows), tmp_path / "whole.jsonl", write(tmp_path / "out.jsonl", ["older"])
    expected = grade_file("gsm8k", source, whole, golds={})
    asked = Asked(monkeypatch)
    asked.stop_after = 128
    with pytest.raises(KeyboardInterrupt):
        grade_file("gsm8k", source, out, golds={})
    (partial,) = tmp_path.glob("out.jsonl.*.partial")
    assert out.read_text() == "older\n"  # the older verdicts stay until the new ones are complete
    kept = partial.read_bytes().splitlines(keepends=True)
    assert len(kept) == 128 and b"".join(kept) == b"".join(whole.read_bytes().splitlines(keepends=True)[:128])
    partial.write_bytes(b"".join(kept[:100]) + kept[100][:20])  # torn by a power cut
    asked.stop_after, asked.texts = None, []
    assert grade_file("gsm8k", source, out, golds={}) == expected
    assert asked.texts == [row["response"] for row in rows[100:]]
    assert out.read_bytes() == whole.read_bytes() and not list(tmp_path.glob("*.partial"))


def test_a_grading_of_other_rows_golds_or_limits_starts_anew(tmp_path, monkeypatch):
    asked, out = Asked(monkeypatch), tmp_path / "out.jsonl"
    base = {"rows": [{"id": k, "response": str(k)} for k in range(70)], "golds": {k: str(k) for k in range(70)}, "limit": 5.0}
    other_rows = [*base["rows"][:69], {"id": 69, "response": "7"}]
    changes = [{}, {"rows": other_rows}, {"golds": {**base["golds"], 0: "1"}}, {"limit": 4.0}]
    for change in changes:
        case = {**base, **change}
        asked.stop_after, asked.texts = 64, []
        with pytest.raises(KeyboardInterrupt):
            grade_file("gsm8k", write(tmp_path / "r.jsonl", case["rows"]), out, golds=case["golds"], limit=case["limit"])
        assert len(asked.texts) == 64, change
    assert len(list(tmp_path.glob("*.partial"))) == len(changes)


def test_one_process_writes_a_file_of_verdicts(tmp_path):
    source = write(tmp_path / "r.jsonl", ROWS)
    partial = tmp_path / f"o.jsonl.{examine(source, Golds('aime24', None, GOLDS), [5.0, MEMORY])[1][:16]}.partial"
    with Verdicts(partial), pytest.raises(UserError, match="out: another process is writing .*partial"):
        grade_file("aime24", source, tmp_path / "o.jsonl", golds=GOLDS)
    grade_file("aime24", source, tmp_path / "o.jsonl", golds=GOLDS)
    assert {path.name for path in tmp_path.iterdir()} == {"r.jsonl", "o.jsonl"}


def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    source = write(tmp_path / "r.jsonl", ROWS)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left on device.; what was graded is kept"):
        patch.setattr(os, "replace", full)
        grade_file("aime24", source, tmp_path / "o.jsonl", golds=GOLDS)
    asked = Asked(monkeypatch)
    assert grade_file("aime24", source, tmp_path / "o.jsonl", golds=GOLDS)["rows"] == 8 and not asked.texts


@pytest.mark.skipif(not os.environ.get("GCPO_DATA"), reason="GCPO_DATA names no folder with the benchmark files")
def test_golds_come_from_the_benchmark_where_a_row_has_none(tmp_path):
    from gcpo_repro.evaluation.benchmarks import load

    problems = load("aime24")
    rows = [
        {"id": row["id"], "sample": k, "response": rf"\boxed{{{int(row['answer']) + k}}}"} for row in problems for k in (0, 1)
    ]
    summary = grade_file("aime24", write(tmp_path / "r.jsonl", rows), tmp_path / "o.jsonl", data=os.environ["GCPO_DATA"])
    assert (summary["rows"], summary["ids"], summary["correct"], summary["wrong"]) == (60, 30, 30, {"different": 30})
    with pytest.raises(UserError, match="line 1: id .* is not among the 40 of amc23"):
        grade_file("amc23", tmp_path / "r.jsonl", tmp_path / "o.jsonl", data=os.environ["GCPO_DATA"])
