"""Partial correlations of many rows of the scalar model, streamed: seconds, peak memory, and how near theory they come.

    python tests/benchmarks/partial_correlations.py [--rows 10000000] [--candidates 4]

The budget is 10 s and 2 GB for 10 million rows with n = 4 on 2 cores; one core is used.
"""

import argparse
import resource
import sys
import time

import numpy as np

from gcpo_repro.independence import streamed_covariance
from gcpo_repro.scm import LinearGaussianSCM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--candidates", type=int, default=4, help="n")
    parser.add_argument("--tau", type=float, default=1.0, help="standard deviation of the integration noise")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    scm = LinearGaussianSCM.scalar([1.0] * options.candidates, options.tau)
    started = time.perf_counter()
    streamed = streamed_covariance(scm, options.rows, options.seed)
    found = {given: streamed.partial_correlation(0, 1, given) for given in ("q", "q,yn", "all")}
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{options.rows:,} rows, n = {options.candidates}: {seconds:.2f} s, peak memory {peak / 2**30:.2f} GiB")
    print(f"{'given':8} {'simulated':>10} {'theory':>10} {'error / SE':>10}")
    for given, simulated in found.items():
        exact = scm.partial_correlation(0, 1, given)
        z = (np.arctanh(simulated) - np.arctanh(exact)) * np.sqrt(options.rows)
        print(f"{given:8} {simulated:10.5f} {exact:10.5f} {z:10.2f}")


if __name__ == "__main__":
    main()
