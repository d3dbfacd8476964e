r"""Grading MATH500's golds, boxed in a sentence, against themselves and against their neighbours: answers per second.

Our grading in one process beside plain math-verify in one process on the same pairs, then files with 1, 2, … workers.
Run: GCPO_DATA=FOLDER python tests/benchmarks/grading.py [WORKERS…]
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from math_verify import parse, verify

from gcpo_repro.evaluation.grading import grade
from gcpo_repro.evaluation.grading_pool import Worker, grade_file

Pairs = list[tuple[str, str]]  # gold, response


def pairs() -> dict[str, Pairs]:
    with open(Path(os.environ["GCPO_DATA"]) / "math500.jsonl", encoding="utf-8") as file:
        golds = [json.loads(line)["answer"] for line in file]
    respelled = [
        gold.replace(r"\frac", r"\dfrac").replace(" ", r"\, ").replace("(", r"\left( ").replace(")", r" \right)")
        for gold in golds
    ]
    neighbours = golds[1:] + golds[:1]
    return {
        name: [
            (gold, rf"So, after all, the answer is $\boxed{{{answer}}}$.") for gold, answer in zip(golds, answers, strict=True)
        ]
        for name, answers in (("the gold", golds), ("respelled", respelled), ("another gold", neighbours))
    }


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


def file_seconds(cases: Pairs, workers: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "responses.jsonl"
        rows = [{"id": k, "gold": gold, "response": response} for k, (gold, response) in enumerate(cases)]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        start = time.perf_counter()
        grade_file("math500", source, Path(folder) / "out.jsonl", golds={}, workers=workers)
        return time.perf_counter() - start


def main(workers: list[int]) -> None:
    cases = pairs()
    plain("1", "$1$"), grade("$x+1$", "$1+x$")  # imports, and the start of the child
    print("answers/s      math-verify     grade()   one child   ratio   right: math-verify, grade()")
    for name, part in cases.items():
        theirs, their_right = timed(plain, part)
        ours, our_right = timed(lambda gold, response: grade(response, gold), part)
        child = one_worker(part)
        print(f"{name:13s} {theirs:12.0f} {ours:11.0f} {child:11.0f} {child / theirs:7.1f}   {their_right:5d} {our_right:10d}")
    hard = [("x^2+2x+1", rf"\boxed{{(x+1)^2+{k}-{k}}}") for k in range(800)]
    print(f"\n{len(hard)} answers that need algebra, as a file; the start of the workers is taken off (measured on one row)")
    first = 0.0
    for n in workers:
        start = file_seconds(hard[:1], n)
        seconds = file_seconds(hard, n) - start
        first = first or seconds
        print(
            f"{n:3d} workers: start {start:5.2f} s, then {seconds:6.2f} s: {first / seconds:5.2f} times as fast as {workers[0]}"
        )


if __name__ == "__main__":
    main([int(n) for n in sys.argv[1:]] or [1, 2])
