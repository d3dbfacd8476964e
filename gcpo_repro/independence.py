"""Tests of conditional independence, x ⊥ y | given, and partial correlations from a stream of rows.

No single test is enough. `fisher_z` sees linear dependence and takes every departure from linearity for dependence;
`gcm` sees correlation of what a nonlinear regression leaves; `kci` sees any dependence and costs the most.

x, y, given are arrays (N,) or (N, k) of N independent rows. Bad input raises UserError: which argument, which value,
what to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from sklearn.kernel_ridge import KernelRidge

from .arrays import TINY, Array, Seed, as_array, as_count, as_generator, inverse
from .errors import UserError
from .mechanisms import SCM

__all__ = ["CITest", "StreamedCovariance", "fisher_z", "gcm", "kci", "partial_correlation", "streamed_covariance"]

LEAST_ROWS = 10  # gcm and kci rest on limits in N; below this their p-values mean nothing


@dataclass(frozen=True)
class CITest:
    """Outcome of a test of x ⊥ y | given on n rows: its statistic, and the p-value under independence."""

    statistic: float
    p_value: float
    n: int


def fisher_z(x: ArrayLike, y: ArrayLike, given: ArrayLike | None = None) -> CITest:
    """Fisher's z of the partial correlation ρ: √(N − k − 3) artanh ρ ~ N(0, 1), two-sided.

    x, y   one column each
    given  k columns, or None; linearly dependent ones count once

    Exact to first order for Gaussian data. Where y_i is a nonlinear function of `given`, its rejections are false.
    """
    x, y, Z = _columns(x, y, given)
    if x.shape[1] + y.shape[1] > 2:
        raise UserError(f"x, y: {x.shape[1]} and {y.shape[1]} columns; fisher_z takes one each, gcm and kci take more")
    k, N = int(np.linalg.matrix_rank(_standard(Z))) if Z.size else 0, len(x)
    if N < k + 4:
        raise UserError(f"x: {N} rows are too few for {k} conditioning columns; pass at least {k + 4}")
    rx, ry = _linear_residuals("x", x, Z), _linear_residuals("y", y, Z)
    rho = np.clip((rx @ ry) / np.sqrt((rx @ rx) * (ry @ ry)), -1, 1)
    with np.errstate(divide="ignore"):  # ρ = ±1: z = ±∞, p = 0
        z = float(np.sqrt(N - k - 3) * np.arctanh(rho))
    return CITest(z, float(2 * stats.norm.sf(abs(z))), N)


def gcm(x: ArrayLike, y: ArrayLike, given: ArrayLike | None = None, length_scale: float = 1.0, alpha: float = 0.01) -> CITest:
    """Generalised covariance measure (Shah and Peters, 2020) with residuals of kernel ridge regressions on `given`.

    With R_t = (x_t − x̂(given_t)) (y_t − ŷ(given_t)):  T = √N mean R / std R ~ N(0, 1), two-sided. For several columns,
    R holds all their products, and the statistic is N R̄ᵀ Cov(R)⁻¹ R̄ ~ χ² with
    as many degrees of freedom.

    length_scale  of the Gaussian kernel in standard deviations of a column of `given`, times √(number of columns)
    alpha         scikit-learn's KernelRidge penalty (not scaled by N) for columns of unit variance

    In-sample residuals: T is scale-free, so what the fit takes from their size does not matter, and cross-fitting cost
    power and time without bettering the size. With the defaults the size at N = 200 was .05 to .06 with one column
    given and .07 with two or three, on y = q + ε and on y = sin(2q) + .75 ε (400 to 500 repetitions; nominal .05).
    Blind to dependence without correlation. Time O(N³), memory O(N²): some thousands of rows.
    """
    x, y, Z = _columns(x, y, given)
    if not (0 < length_scale < np.inf and 0 < alpha < np.inf):
        raise UserError(f"length_scale, alpha: got {length_scale} and {alpha}; both must be positive and finite")
    N, pairs = len(x), x.shape[1] * y.shape[1]
    if N < max(LEAST_ROWS, 2 * pairs):
        raise UserError(f"x: {N} rows are too few for {pairs} pairs of columns; pass at least {max(LEAST_ROWS, 2 * pairs)}")
    residuals = _kernel_residuals(np.hstack([x, y]), Z, length_scale, alpha)
    rx, ry = residuals[:, : x.shape[1]], residuals[:, x.shape[1] :]
    R = (rx[:, :, None] * ry[:, None]).reshape(N, pairs)
    if pairs == 1:
        T = float(np.sqrt(N) * R.mean() / R.std())
        return CITest(T, float(2 * stats.norm.sf(abs(T))), N)
    mean, covariance = R.mean(0), np.cov(R.T, bias=True)
    T = float(N * mean @ inverse(covariance) @ mean)
    return CITest(T, float(stats.chi2.sf(T, np.linalg.matrix_rank(covariance, rtol=TINY, hermitian=True))), N)


def has_kci() -> bool:
    """Whether causal-learn, which `kci` needs, is installed."""
    return find_spec("causallearn") is not None


def kci(x: ArrayLike, y: ArrayLike, given: ArrayLike | None = None) -> CITest:
    """Kernel-based conditional independence test (Zhang et al., 2011), as causal-learn has it.

    Its defaults: Gaussian kernels of empirical widths, the gamma approximation of the null distribution (no random
    draws). Time O(N³). Raises UserError when causal-learn is missing: pip install "gcpo-repro[kci]".
    """
    x, y, Z = _columns(x, y, given)
    if len(x) < LEAST_ROWS:
        raise UserError(f"x: {len(x)} rows are too few for a kernel test; pass at least {LEAST_ROWS}")
    try:
        library = import_module("causallearn.utils.KCI.KCI")
    except ImportError as error:
        raise UserError(f'kci needs causal-learn ({error}): pip install "gcpo-repro[kci]", or use gcm') from None
    test, data = (library.KCI_CInd(), (x, y, Z)) if Z.shape[1] else (library.KCI_UInd(), (x, y))
    p_value, statistic = test.compute_pvalue(*data)
    return CITest(float(statistic), float(p_value), len(x))


def _columns(x: ArrayLike, y: ArrayLike, given: ArrayLike | None) -> tuple[Array, Array, Array]:
    """All three as (N, k), finite, none of their columns constant; `given` = None has k = 0."""
    arrays: dict[str, Array] = {}
    for name, value in {"x": x, "y": y, "given": given}.items():
        if value is None and name == "given":
            arrays[name] = np.empty((len(arrays["x"]), 0))
            continue
        a = np.asarray(value)
        a = as_array(name, a[:, None] if a.ndim == 1 else a, "N k")
        if len(a) != len(arrays.get("x", a)):
            raise UserError(f"{name}: {len(a)} rows, but x has {len(arrays['x'])}; every row needs all of them")
        constant = np.flatnonzero(np.ptp(a, axis=0) == 0)
        if len(constant):
            raise UserError(f"{name}: column {constant[0]} is constant ({a[0, constant[0]]}): nothing to test, drop it")
        arrays[name] = a
    return arrays["x"], arrays["y"], arrays["given"]


def _linear_residuals(name: str, x: Array, Z: Array) -> Array:
    """(N,) residuals of the one column of x after least squares on 1 and Z."""
    centred = x[:, 0] - x.mean()
    Z = _standard(Z)
    residual = centred - Z @ np.linalg.lstsq(Z, centred, rcond=None)[0] if Z.size else centred
    if residual @ residual <= TINY * (centred @ centred):
        raise UserError(f"{name}: is a linear function of given: nothing is left to test")
    return residual


def _kernel_residuals(x: Array, Z: Array, length_scale: float, alpha: float) -> Array:
    """Columns of x in units of their standard deviation, less their kernel ridge regression on Z."""
    x, Z = _standard(x), _standard(Z)
    if not Z.size:
        return x
    ridge = KernelRidge(alpha=alpha, kernel="rbf", gamma=1 / (2 * length_scale**2 * Z.shape[1]))
    return x - ridge.fit(Z, x).predict(Z)


def _standard(x: Array) -> Array:
    """Every column with mean 0 and variance 1."""
    return (x - x.mean(0)) / x.std(0)


# --- Partial correlations of many rows ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class StreamedCovariance:
    """Mean (v,) and covariance (v, v; divided by rows − 1) of the columns q, y_0 … y_{n−1}, y_n over `rows` rows.

    d, n, p, r: widths as in the model; v = d + n p + r.
    """

    rows: int
    mean: Array
    covariance: Array
    d: int
    n: int
    p: int
    r: int

    def partial_correlation(self, i: int, j: int, given: str) -> float:
        """Sample correlation of y_i and y_j (p = 1) given "q", "q,yn" or "all": q, y_n and the other candidates.

        Its closed form is `LinearGaussianSCM.partial_correlation`; its standard error is about (1 − ρ²)/√rows.
        """
        if self.p != 1:
            raise UserError(f"partial_correlation: p = {self.p}; a single number needs candidates of width 1")
        if i == j or not {i, j} <= set(range(self.n)):
            raise UserError(f"i, j: got {i!r} and {j!r}; take two different candidates of 0 … {self.n - 1}")
        q, y_n = range(self.d), range(self.d + self.n, self.d + self.n + self.r)
        others = (self.d + k for k in range(self.n) if k not in (i, j))
        sets = {"q": [*q], "q,yn": [*q, *y_n], "all": [*q, *y_n, *others]}
        if given not in sets:
            raise UserError(f'given: {given!r} is not known; choose "q", "q,yn" or "all"')
        return partial_correlation(self.covariance, self.d + i, self.d + j, sets[given])


def partial_correlation(covariance: Array, i: int, j: int, given: list[int]) -> float:
    """Correlation of variables i and j given those of the list, from the covariance (v, v) of all."""
    pair = [i, j]
    to_given = covariance[np.ix_(pair, given)]
    left = covariance[np.ix_(pair, pair)] - to_given @ inverse(covariance[np.ix_(given, given)]) @ to_given.T
    return float(left[0, 1] / np.sqrt(left[0, 0] * left[1, 1]))


def streamed_covariance(scm: SCM, rows: int, seed: Seed, block: int = 65_536) -> StreamedCovariance:
    """Draw `rows` rows from the model, `block` at a time, and keep their mean and covariance only.

    Memory is that of a block. The same seed and block give the same numbers. The covariance is summed around the mean
    of each block (Chan, Golub and LeVeque), so a large mean costs no digits.
    """
    left, rng = as_count("rows", rows, 2), as_generator(seed)
    as_count("block", block)
    count, mean, scatter = 0, np.zeros(1), np.zeros((1, 1))
    while left > 0:
        sample = scm.sample(min(block, left), rng)
        size = len(sample.q)
        X = np.hstack([sample.q, sample.y.reshape(size, -1), sample.y_n])
        block_mean = X.mean(0)
        X -= block_mean
        shift = block_mean - mean
        scatter = scatter + X.T @ X + np.outer(shift, shift) * (count * size / (count + size))
        mean = mean + shift * (size / (count + size))
        count, left = count + size, left - size
    return StreamedCovariance(rows, mean, scatter / (rows - 1), scm.d, scm.n, scm.p, scm.r)
