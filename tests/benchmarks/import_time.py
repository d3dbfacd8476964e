"""Seconds of `import gcpo_repro`, beside Python's own start and `import torch`: medians of fresh processes.

    python tests/benchmarks/import_time.py [--repeats 7]
"""

import argparse
import statistics
import subprocess
import sys
import time

STATEMENTS = ("pass", "import gcpo_repro", "import torch", "from gcpo_repro import GCPOTrainer")


def seconds(statement: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="fresh processes per statement")
    repeats = parser.parse_args().repeats
    times: dict[str, list[float]] = {statement: [] for statement in STATEMENTS}
    for _ in range(repeats):  # interleaved, so that a busy moment meets all of them
        for statement in STATEMENTS:
            times[statement].append(seconds(statement))
    start = statistics.median(times["pass"])
    print(f"{'statement':36} {'median s':>9} {'over python s':>14}")
    for statement in STATEMENTS:
        median = statistics.median(times[statement])
        print(f"{statement:36} {median:9.3f} {median - start:14.3f}")


if __name__ == "__main__":
    main()
