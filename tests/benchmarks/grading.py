r"""Grading MATH500's golds, boxed in a sentence, against themselves and against one another: answers per second.

Our grading in one process beside plain math-verify in one process on the same pairs; then files with 1, 2, … workers, the CPU
seconds of parent and children counted: answers per CPU second are what compares with math-verify on one core.
Run: GCPO_DATA=FOLDER python tests/benchmarks/grading.py [--workers 1 2] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from math_verify import parse, verify

from gcpo_repro import provenance
from gcpo_repro.evaluation.grading import grade
from gcpo_repro.evaluation.grading_pool import Worker, grade_file

Pairs = list[tuple[str, str]]  # gold, response
ROUNDS = 10  # answers of each kind to each problem, in the file of ordinary answers


def golds() -> list[str]:
    with open(Path(os.environ["GCPO_DATA"]) / "math500.jsonl", encoding="utf-8") as file:
        return [json.loads(line)["answer"] for line in file]


def respelled(gold: str) -> str:
    return gold.replace(r"\frac", r"\dfrac").replace(" ", r"\, ").replace("(", r"\left( ").replace(")", r" \right)")


def boxed(right: list[str], answers: list[str]) -> Pairs:
    return [(gold, rf"So, after all, the answer is $\boxed{{{answer}}}$.") for gold, answer in zip(right, answers, strict=True)]


def pairs() -> dict[str, Pairs]:
    right = golds()
    return {
        "the gold": boxed(right, right),
        "respelled": boxed(right, [respelled(gold) for gold in right]),
        "another gold": boxed(right, right[1:] + right[:1]),
    }


def files() -> dict[str, Pairs]:
    """What is graded as files. Ordinary: a third each is the gold, the gold respelled, and another gold plus a number, so that
    every wrong answer is a new one and none was parsed before."""
    right = golds()
    same = boxed(right, right)
    ordinary = ROUNDS * [*same, *boxed(right, [respelled(gold) for gold in right])]
    for k in range(1, ROUNDS + 1):
        ordinary += boxed(right, [f"{other}+{k}" for other in right[k:] + right[:k]])
    return {
        "ordinary": ordinary, "the gold only": 40 * same,
        "algebra only": [("x^2+2x+1", rf"\boxed{{(x+1)^2+{k}-{k}}}") for k in range(800)],
    }  # fmt: skip


def plain(gold: str, response: str) -> bool:
    return verify(parse(f"${gold}$"), parse(response))


def timed(run: Callable[[str, str], object], cases: Pairs) -> tuple[float, int]:
    start = time.perf_counter()
    right = sum(bool(run(gold, response)) for gold, response in cases)
    return len(cases) / (time.perf_counter() - start), right


def one_worker(cases: Pairs) -> float:
    """Everything, the text work too, in one warm child."""
    worker = Worker()
    worker.start()
    start = time.perf_counter()
    worker.grade([(response, gold, False) for gold, response in cases])
    rate = len(cases) / (time.perf_counter() - start)
    worker.close()
    return rate


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def file_seconds(cases: Pairs, workers: int) -> tuple[float, float]:
    """Wall and CPU seconds of grading a file."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "responses.jsonl"
        rows = [{"id": k, "gold": gold, "response": response} for k, (gold, response) in enumerate(cases)]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        start, used = time.perf_counter(), cpu_seconds()
        grade_file("math500", source, Path(folder) / "out.jsonl", golds={}, workers=workers)
        return time.perf_counter() - start, cpu_seconds() - used


def single() -> list[dict[str, Any]]:
    """One process each, on the same pairs."""
    plain("1", "$1$"), grade("$x+1$", "$1+x$")  # imports, and the start of the child
    rows = []
    for name, part in pairs().items():
        theirs, their_right = timed(plain, part)
        ours, our_right = timed(lambda gold, response: grade(response, gold), part)
        rows.append({
            "answers": name, "pairs": len(part), "math_verify_per_second": theirs, "grade_per_second": ours,
            "child_per_second": one_worker(part), "math_verify_correct": their_right, "grade_correct": our_right,
        })  # fmt: skip
    return rows


def scaling(workers: list[int]) -> list[dict[str, Any]]:
    """Whole files; the start of the workers, measured on a batch of trivial rows for each, is taken off both clocks. Beside the
    speed-up stands that of processes which share nothing at all."""
    rows: list[dict[str, Any]] = []
    trivial = 64 * [("1", r"\boxed{1}")]
    file_seconds(trivial, 1)  # imports
    alone = busy_seconds(1)
    for name, cases in files().items():
        for n in workers:
            start, start_cpu = file_seconds(n * trivial, n)
            wall, cpu = file_seconds(cases, n)
            possible = n * alone / busy_seconds(n)  # right after, for others may work on this machine too
            first = next((r["seconds"] for r in rows if r["file"] == name), wall - start)
            rows.append({
                "file": name, "answers": len(cases), "workers": n, "start_seconds": start, "seconds": wall - start,
                "cpu_seconds": cpu - start_cpu, "per_second": len(cases) / (wall - start),
                "per_cpu_second": len(cases) / (cpu - start_cpu), "speed_up": first / (wall - start),
                "speed_up_of_empty_loops": possible,
            })  # fmt: skip
    return rows


def busy_seconds(processes: int, loops: int = 40_000_000) -> float:
    """Wall seconds of the same empty loop in each of several processes: what this machine's cores are worth at this hour."""
    start = time.perf_counter()
    code = f"for _ in range({loops}): pass"
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(processes)]
    for process in running:
        process.wait()
    return time.perf_counter() - start


def show(rows: list[dict[str, Any]]) -> None:
    print("  ".join(rows[0]))
    for row in rows:
        print("  ".join(f"{value:{max(len(key), 8)}.5g}" if isinstance(value, float) else f"{value!s:{len(key)}}"
                        for key, value in row.items()))  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers (default: 1 2)")
    arguments.add_argument("--out", type=Path, help="a JSON file with the numbers and where they come from")
    asked = arguments.parse_args()
    started, one, many = time.time(), single(), scaling(asked.workers)
    show(one)
    show(many)
    if asked.out:
        where = provenance.record({"workers": asked.workers, "rounds": ROUNDS}, 0, started)
        provenance.write_json(asked.out, {**where, "kind": "grading throughput", "one_process": one, "files": many})


if __name__ == "__main__":
    main()
