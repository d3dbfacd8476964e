"""Theorem 1, Corollary 2 and the two Φ of the paper, measured for any predictor f(x) of y_0 (theory.md §1, §3, §5).

x = (q, y_1 … y_{n-1}, y_n), G = (q, y_1 … y_{n-1}), m = E[y_0 | q] = π*(q), R(f) = E‖y_0 − f(x)‖², and

    Φf = E[f(x) | G]        Ψf = f − Φf        Πf = Ψf + m                                    (Eq. 2)

Which projection lives where:

* here: operators on predictors, whose Φ is a conditional mean over data: `conditional_mean` draws it from an SCM,
  `projected_risk` and `projected_slope` have it in closed form, `ProjectedKernelRidge` (kernel_ridge.py) learns it;
* `gcpo_repro.loss`, used by the trainer: the same Ψ on a policy's own outputs. `projected_target` takes it of hidden
  states (Eq. 11), `projected_reference` of probabilities (Eq. 13), their Φ being the mean over the integrated outputs.

numpy, scipy and scikit-learn only.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from .arrays import Seed, as_array, as_count, as_generator
from .errors import UserError
from .kernel_ridge import ProjectedKernelRidge, kernel_experiment, kernel_features
from .linear_gaussian import LinearGaussianSCM
from .mechanisms import SCM, Sample

__all__ = [
    "Estimate", "ProjectedKernelRidge", "calibration_slope", "conditional_mean", "kernel_experiment", "kernel_features",
    "leave_one_out_mean", "projected_risk", "projected_slope", "risk_gap_corollary2", "risk_gap_theorem1",
]  # fmt: skip

KINDS = ("theorem", "algorithm")
Predictor = Callable[[Sample], np.ndarray]
Values = ArrayLike | Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """An estimate with its standard error; n counts the independent units, rows or groups."""

    value: float
    standard_error: float
    n: int


# --- The gaps and the slope, from data ------------------------------------------------------------------------


def risk_gap_theorem1(y_0: ArrayLike | Sample, f: Values, Phi_f: Values, m: Values, groups: ArrayLike | None = None) -> Estimate:
    """Theorem 1: R(f) − R(Πf), which is E‖Φf − m‖² ≥ 0 for exact Φ and m, whatever f.

    Args:
        y_0: the target, (N, p) or (N,); or a `Sample`, which brings its y_0 and on which callables are evaluated.
        f: f(x), shaped like y_0; or a callable of the sample.
        Phi_f: Φf(x), shaped like y_0; or a callable of the sample. An estimated Φf counts with its errors: drawn from
            `conditional_mean` with K draws it adds E tr Var(f | G)/K to R(Πf).
        m: E[y_0 | q], shaped like y_0; or a callable of q, such as the SCM's `query_predictor`.
        groups: (N,) labels; rows with the same label are dependent, and the standard error allows for it. None: all
            rows are independent.

    Callables get the sample with NaN in place of y_0.

    Returns:
        The mean of the paired differences ‖y_0 − f‖² − ‖y_0 − Πf‖², with its standard error.

    Raises:
        UserError: shapes that don't agree; values that are not finite (a callable that reads y_0); fewer than 2 rows,
            or groups.
    """
    y_0, f, Phi_f, m = _arrays(y_0, f, Phi_f, m)
    return _mean(_square(y_0 - f) - _square(y_0 - (f - Phi_f + m)), groups)


def risk_gap_corollary2(
    y_0: ArrayLike | Sample, f: Values, Phi_f: Values, m: Values, groups: ArrayLike | None = None
) -> Estimate:
    """Corollary 2: R(m) − R(Πf) = 2E⟨y_0, Ψf⟩ − E‖Ψf‖², at least 0 if and only if `calibration_slope` is at least 1/2.

    Arguments, result and errors: as `risk_gap_theorem1`. No sign is promised: for the Bayes f the gap is
    E tr Cov(E[y_0 | x] | q), for others it can be negative.
    """
    y_0, f, Phi_f, m = _arrays(y_0, f, Phi_f, m)
    return _mean(_square(y_0 - m) - _square(y_0 - (f - Phi_f + m)), groups)


def calibration_slope(y_0: ArrayLike | Sample, f: Values, Phi_f: Values, m: Values, groups: ArrayLike | None = None) -> Estimate:
    """b = E⟨y_0 − m, Ψf⟩ / E‖Ψf‖², the best factor of Ψf: R(m + aΨf) is smallest at a = b.

    Arguments and errors: as `risk_gap_theorem1`; also UserError if Ψf = 0 in every row. The standard error is that of a
    ratio, by the delta method.

    The slope b̂ that the trainer logs (theory.md §3) is this with z_i, Z̄_i, Z̄'_i and `leave_one_out_mean(z, group)` for
    y_0, f, Φf and m; `groups` then are the prompts or questions, since the rows of one are dependent.
    """
    y_0, f, Phi_f, m = _arrays(y_0, f, Phi_f, m)
    residual = f - Phi_f  # Ψf
    product, square = ((y_0 - m) * residual).sum(1), _square(residual)
    if not square.any():
        raise UserError("f and Phi_f are equal in every row: Ψf = 0 has no slope (a mean over one observed output does this)")
    b = float(product.sum() / square.sum())
    return dataclasses.replace(_mean((product - b * square) / square.mean(), groups), value=b)


def leave_one_out_mean(z: ArrayLike, groups: ArrayLike) -> np.ndarray:
    """z̄_{−i}: for each row of z (N, H) the mean of the other rows of its group; groups (N,) labels. (N, H)

    z̄ with z_i inside is a dishonest predictor of z_i. Raises UserError for a group of one row.
    """
    z = as_array("z", z, "N H")
    group = _group_numbers(groups, len(z))
    size = np.bincount(group)
    if size.min() < 2:
        raise UserError(f"groups: {np.sum(size < 2)} of {len(size)} groups have a single row; drop those")
    sums = np.zeros((len(size), z.shape[1]))
    np.add.at(sums, group, z)
    return (sums[group] - z) / (size[group] - 1)[:, None]


# --- Φ by simulation -------------------------------------------------------------------------------------------


def conditional_mean(
    scm: SCM, sample: Sample, predictor: Predictor, kind: str, draws: int, seed: Seed, observed: bool = False
) -> np.ndarray:
    """Φf at each row of the sample, by Monte Carlo: the mean of f(q, y_1 … y_{n-1}, y_n') over `draws` outputs y_n'.

    Args:
        scm: its `draw_candidates` and `integrate` draw y_n'.
        sample: N rows.
        predictor: f, called with a Sample of N rows that has NaN for y_0; returns (N, p).
        kind: "theorem": for each y_n' a fresh y_0' is drawn given q. By the fork it estimates E[f | G], Eq. 2.
            "algorithm": y_n' is decoded again from the same group, y_0 included, as in the paper's steps. Then it
            estimates E[f | q, y_0 … y_{n-1}], and f − Φf is orthogonal to y_0 (theory.md §3).
        draws: number of outputs in the mean; the paper's is n.
        seed: of the draws.
        observed: the first of the outputs is the sample's own y_n, as in the paper's Z̄'_i, and draws − 1 are fresh. A
            predictor that is itself random (a mean over rollouts) is better combined by hand: its value at the observed
            y_n must be the same in f and in the mean.

    Returns:
        (N, p).

    Raises:
        UserError: an unknown kind; draws < 1; a predictor that reads y_0, or whose values are not (N, p) and finite.
    """
    _check_kind(kind)
    rng = as_generator(seed)
    total = _evaluate("predictor", predictor, sample) if observed else np.zeros_like(sample.y[:, 0])
    for _ in range(as_count("draws", draws) - observed):
        y = sample.y
        if kind == "theorem":
            y = np.concatenate([scm.draw_candidates(sample.q, 1, rng), y[:, 1:]], axis=1)
        total = total + _evaluate("predictor", predictor, _replace(sample, y_n=scm.integrate(sample.q, y, rng)))
    return total / draws


# --- What must come out, for the linear SCM ----------------------------------------------------------------------


def projected_risk(
    scm: LinearGaussianSCM,
    kind: str,
    draws: float,
    F_n: np.ndarray | None = None,
    observed: bool = True,
    rollout_variance: float = 0.0,
) -> float:
    """R(m + f − Φ̂f) for a linear f and the Φ̂f of `conditional_mean`, in closed form (theory.md §3).

    Args:
        scm: the SCM.
        kind, draws, observed: as in `conditional_mean`; draws = math.inf for the exact conditional mean.
        F_n: (p, r), the coefficient of y_n in f, all that is left of f in f − Φ̂f; None: that of the Bayes predictor.
        rollout_variance: trace of the variance of f(x) where that is itself a mean of M rollouts, independent for each
            y_n: for rollouts of y_0 from the true conditional distribution it is scm.risk_bayes()/M.

    With L draws, V = E tr Var(f | G), or given the whole group, c = E⟨y_0, Ψf⟩ and v the rollout variance:

        the observed y_n among the draws    h = f − Φ̂f has E⟨y_0, h⟩ = (1 − 1/L) c, E‖h‖² = (1 − 1/L)(V + v)
        all draws fresh                                    E⟨y_0, h⟩ = c,           E‖h‖² = (1 + 1/L)(V + v)

    and R = R(m) − 2E⟨y_0, h⟩ + E‖h‖². Kind "algorithm" has c = 0: R is never below R(m). Exact for an SCM with rho > 0
    too, but there a fresh y_0' given q does not make Φ̂f an estimate of E[f | G].
    Raises UserError: an unknown kind; draws < 1; F_n of the wrong shape; a negative rollout variance.
    """
    product, square = _residual_moments(scm, kind, draws, F_n, observed, rollout_variance)
    return float(scm.risk_query() - 2 * product + square)


def projected_slope(
    scm: LinearGaussianSCM,
    kind: str,
    draws: float,
    F_n: np.ndarray | None = None,
    observed: bool = True,
    rollout_variance: float = 0.0,
) -> float:
    """The slope b of the same h = f − Φ̂f: E⟨y_0, h⟩ / E‖h‖². Arguments and errors: as `projected_risk`.

    Also UserError where h = 0, so with the observed y_n as the only draw.
    """
    product, square = _residual_moments(scm, kind, draws, F_n, observed, rollout_variance)
    if square <= 0:
        raise UserError(f"draws = {draws}: f − Φf is 0, and 0 has no slope; take at least 2 draws and an F_n that is not 0")
    return float(product / square)


def _residual_moments(
    scm: LinearGaussianSCM, kind: str, draws: float, F_n: np.ndarray | None, observed: bool, rollout_variance: float
) -> tuple[float, float]:
    """E⟨y_0, h⟩ and E‖h‖² of h = f − Φ̂f."""
    _check_kind(kind)
    if not (draws >= 1 and 0 <= rollout_variance < math.inf):
        raise UserError(f"draws, rollout_variance: got {draws} and {rollout_variance}; at least 1 and 0, the second finite")
    C_0, S_e, S_h = scm.C[0], scm.S_e, scm.S_h
    F_n = scm.K if F_n is None else as_array("F_n", F_n, "p r", p=scm.p, r=scm.r)
    # From one draw to the next y_n varies by C_0 e_0 + η, or by η alone, which knows nothing of y_0.
    S = C_0 @ S_e @ C_0.T + S_h if kind == "theorem" else S_h
    c = float(np.trace(F_n @ C_0 @ S_e)) if kind == "theorem" else 0.0
    V = float(np.trace(F_n @ S @ F_n.T)) + rollout_variance
    if observed:
        return (1 - 1 / draws) * c, (1 - 1 / draws) * V
    return c, (1 + 1 / draws) * V


# --- Helpers -----------------------------------------------------------------------------------------------------


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise UserError(f'kind: must be "theorem" or "algorithm", got {kind!r}')


def _arrays(y_0: ArrayLike | Sample, f: Values, Phi_f: Values, m: Values) -> list[np.ndarray]:
    """The four arguments as finite arrays (N, p)."""
    named: dict[str, Values] = {"f": f, "Phi_f": Phi_f, "m": m}
    if isinstance(y_0, Sample):
        named = {name: _evaluate(name, value, y_0) if callable(value) else value for name, value in named.items()}
        y_0 = y_0.y[:, 0]
    target = as_array("y_0", _column(y_0), "N p")
    N, p = target.shape
    arrays = [target]
    for name, value in named.items():
        if callable(value):
            raise UserError(f"{name}: a callable needs a Sample to be evaluated on: pass that as y_0")
        arrays.append(as_array(name, _column(value), "N p", N=N, p=p))
    return arrays


def _evaluate(name: str, predictor: Callable[..., np.ndarray], sample: Sample) -> np.ndarray:
    """predictor(sample), y_0 being hidden from it, or m(q); (N, p)."""
    y = sample.y.copy()
    y[:, 0] = np.nan
    value = _column(predictor(sample.q if name == "m" else _replace(sample, y=y)))
    if value.shape != y[:, 0].shape:
        raise UserError(f"{name}: returned shape {value.shape} instead of (N, p) = {y[:, 0].shape}")
    if not np.isfinite(value).all():
        raise UserError(
            f"{name}: returned {np.sum(~np.isfinite(value))} values that are not finite. It was given NaN for y_0, its "
            "target: it may read q, y[:, 1:] and y_n, but not y[:, 0]"
        )
    return value


def _replace(sample: Sample, **fields: np.ndarray) -> Sample:
    """dataclasses.replace without the checks: the NaN that hides y_0 would not pass them."""
    changed = copy.copy(sample)
    for name, value in fields.items():
        object.__setattr__(changed, name, value)
    return changed


def _column(value: ArrayLike) -> np.ndarray:
    """(N,) as (N, 1), in float64."""
    x = np.asarray(value, dtype=float)
    return x[:, None] if x.ndim == 1 else x


def _square(v: np.ndarray) -> np.ndarray:
    return np.square(v).sum(1)


def _group_numbers(groups: ArrayLike, rows: int) -> np.ndarray:
    """Labels (rows,) of any kind as numbers 0 … number of groups − 1."""
    labels = np.asarray(groups)
    if labels.shape != (rows,):
        raise UserError(f"groups: must hold a label for each of the {rows} rows, got shape {labels.shape}")
    return np.unique(labels, return_inverse=True)[1]


def _mean(values: np.ndarray, groups: ArrayLike | None) -> Estimate:
    """Mean of (N,) values and its standard error; the deviations of one group are summed before they are squared."""
    N = len(values)
    sums = np.bincount(_group_numbers(np.arange(N) if groups is None else groups, N), values - values.mean())
    n = len(sums)
    if n < 2:
        raise UserError(f"groups: {N} rows in {n} group; a standard error needs at least 2 that are independent")
    error = math.sqrt(n / (n - 1) * np.square(sums).sum()) / N
    return Estimate(float(values.mean()), error, n)
