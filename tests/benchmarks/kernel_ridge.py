"""Projected kernel ridge regression: seconds to fit and to predict, and peak memory.

    python tests/benchmarks/kernel_ridge.py [--rows 2000] [--unlabelled 0 1000] [--threads 2]

The budget is 10 s for a fit of 2,000 rows on 2 cores. Rows come from a linear model with n = 4, d = p = r = 8.
"""

import argparse
import resource
import sys
import time

import numpy as np
from threadpoolctl import threadpool_limits

from gcpo_repro.projection import ProjectedKernelRidge, kernel_features
from gcpo_repro.scm import LinearGaussianSCM

PROJECTIONS = ("none", "after", "before")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000)
    parser.add_argument("--unlabelled", type=int, nargs="+", default=[0, 1_000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    scm = LinearGaussianSCM(np.eye(8), np.eye(8), np.ones((4, 1, 1)) * np.eye(8), np.eye(8), 0.25 * np.eye(8))
    train, test = scm.sample(options.rows, options.seed), scm.sample(options.rows, options.seed + 1)
    X, T, y = kernel_features(train), kernel_features(test), train.y[:, 0] - scm.query_predictor(train.q)

    print(f"{options.rows:,} rows of {X.shape[1]} features, targets of {y.shape[1]}, {options.threads} threads; seconds")
    print(f"{'project':8} {'unlabelled':>10} {'fit':>7} {'predict':>8}")
    for unlabelled in options.unlabelled:
        extra = kernel_features(scm.sample(unlabelled, options.seed + 2)) if unlabelled else None
        for project in PROJECTIONS:
            model = ProjectedKernelRidge(8, 16.0, 8.0, project=project)
            with threadpool_limits(options.threads):
                started = time.perf_counter()
                model.fit(X, y, extra)
                fitted = time.perf_counter()
                model.predict(T)
                done = time.perf_counter()
            print(f"{project:8} {unlabelled:10,} {fitted - started:7.2f} {done - fitted:8.2f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"peak memory {peak / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
