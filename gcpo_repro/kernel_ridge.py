"""Collider regression: kernel ridge that knows E[y_0 − m | G] = 0 (theory.md §5, after arXiv 2301.11214).

x₁ = y_n, the collider; x₂ = (q, y_1 … y_{n-1}) = G, its context; the target is y_0 − m, m = E[y_0 | q]. N training rows X;
S rows, the training rows first, then the unlabelled ones. With rbf(a, b; ℓ) = exp(−‖a − b‖²/(2ℓ²)):

    r₊(x, x') = rbf(x₁, x₁'; ℓ_r) + 1        l(x, x') = rbf(x₂, x₂'; ℓ_l)        k = r₊ · l
    W(x)  = (l(S,S) + λ_cme I)⁻¹ l(S, x)     so that W(x)ᵀ r₊(S, ·) estimates E[r₊(x, ·) | x₂]
    f(x)  = k(x, X) a                        a = (k(X,X) + N λ I)⁻¹ y, ridge as it is
    after: Ψf, that is f(x) − Σ_i a_i l(x, X_i) [W(x)ᵀ r₊(S, X_i)]
    before: the same ridge on the projected kernel, whose functions are all of the form Ψf:
    k_P(x, x') = [r₊(x,x') − W(x)ᵀ r₊(S,x') − r₊(x,S) W(x') + W(x)ᵀ r₊(S,S) W(x')] · l(x, x')
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve, lapack
from scipy.spatial.distance import cdist
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import gen_batches
from sklearn.utils.validation import check_is_fitted, validate_data

from .errors import UserError
from .mechanisms import SCM, Sample

__all__ = ["ProjectedKernelRidge", "kernel_experiment", "kernel_features"]

PROJECTIONS = ("none", "after", "before")
PREDICT_ROWS = 1024  # rows predicted at once: the memory is (S + N) times this, whatever the caller asks for


class ProjectedKernelRidge(RegressorMixin, BaseEstimator):
    """Kernel ridge regression of y_0 − m on [collider features | context features], projected onto E[f | context] = 0.

    The target must already be y_0 − m. The projections assume that its mean given the context is 0; a target with any
    other mean is not an error that can be seen here, it is silently lost. Add m to the predictions.

    Args:
        n_collider_features: how many of the first columns are y_n; the others, at least one, are q, y_1 … y_{n-1}.
        collider_length_scale: ℓ_r of r₊, in the units of y_n.
        context_length_scale: ℓ_l of l, in the units of the context.
        alpha: λ of K + NλI, at least 0. Not scikit-learn's KernelRidge(alpha), which is Nλ.
        cme_alpha: λ_cme of l(S,S) + λ_cme I, not multiplied by the number of rows; at least 0.
        project: "none", "after" (fit, then subtract E[f | context]) or "before" (fit among the projected functions).

    Defaults: the original experiment of collider regression (theory.md §5), which projects before.
    Computed in float64 whatever comes in. Memory: a few matrices of S × S numbers, S = all rows.

    Attributes:
        dual_coef_: a, (N,) or (N, p), like the target. rows_: (S, features), S. n_features_in_.
    """

    def __init__(
        self,
        n_collider_features: int,
        collider_length_scale: float = 8.0,
        context_length_scale: float = 2.0,
        alpha: float = 1e-3,
        cme_alpha: float = 1.0,
        project: str = "before",
    ):
        self.n_collider_features = n_collider_features
        self.collider_length_scale = collider_length_scale
        self.context_length_scale = context_length_scale
        self.alpha = alpha
        self.cme_alpha = cme_alpha
        self.project = project

    def fit(self, X, y, X_unlabelled=None):
        """Fit; extra rows without target sharpen the conditional mean.

        Args:
            X: (N, features), collider features first.
            y: (N,) or (N, p), y_0 − m; the components of a vector are fitted one by one with the same kernel.
            X_unlabelled: (any number of rows, features) or None; the training rows are always used too. It does not pass
                through the earlier steps of a pipeline: transform it yourself, or let
                `Pipeline(transform_input=["X_unlabelled"])` do it. Not used with project="none".

        Raises:
            UserError: a setting out of range; an X_unlabelled that doesn't fit X; a kernel matrix that is singular.
            ValueError: from scikit-learn, for an X or y that is empty, not finite or of the wrong shape.
        """
        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        y = y.astype(np.float64, copy=False)
        self._check_settings()
        S = X
        if X_unlabelled is not None:
            try:
                S = np.vstack([X, validate_data(self, X_unlabelled, reset=False, dtype=np.float64)])
            except ValueError as error:
                raise UserError(f"X_unlabelled: {error} Pass None for no extra rows") from error
        self.rows_ = X if self.project == "none" else S
        N, r_SS, l_SX = len(X), self._r(self.rows_, self.rows_), self._l(self.rows_, X)  # (S, S), (S, N)

        # k/l at (x, X) is r₊(x, X) − r₊(x, S) W(X) − W(x)ᵀ P, with P = r₊(S, X) − r₊(S, S) W(X). "after" has no W(X), and
        # W(x) in the prediction only.
        kernel = r_SS[:N, :N]
        self._W = self._P = None
        if self.project != "none":
            self._cme = _cholesky(self._l(S, S), self.cme_alpha, f"cme_alpha = {self.cme_alpha}")
            self._P = r_SS[:, :N]
        if self.project == "before":
            self._W = cho_solve(self._cme, l_SX)  # (S, N)
            self._P = r_SS[:, :N] - r_SS @ self._W
            kernel = self._P[:N] - self._W.T @ self._P
        K = (kernel + kernel.T) / 2 * l_SX[:N]
        self.dual_coef_ = cho_solve(_cholesky(K, N * self.alpha, f"alpha = {self.alpha}"), y)
        return self

    def predict(self, X):
        """f(x) or Ψf(x), (rows,) or (rows, p) like the target of `fit`; X is (rows, features)."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        return np.concatenate([self._predict(X[rows]) for rows in gen_batches(len(X), PREDICT_ROWS)])

    def _predict(self, X):
        N = len(self.dual_coef_)
        r, l = self._r(X, self.rows_), self._l(X, self.rows_)  # (rows, S)
        kernel = r[:, :N]
        if self._W is not None:
            kernel = kernel - r @ self._W
        if self._P is not None:
            kernel = kernel - cho_solve(self._cme, l.T).T @ self._P
        return (kernel * l[:, :N]) @ self.dual_coef_

    def _r(self, A, B):
        c = self.n_collider_features
        return _rbf(A[:, :c], B[:, :c], self.collider_length_scale) + 1

    def _l(self, A, B):
        c = self.n_collider_features
        return _rbf(A[:, c:], B[:, c:], self.context_length_scale)

    def _check_settings(self) -> None:
        c, width = self.n_collider_features, self.n_features_in_
        if not isinstance(c, Integral) or not 1 <= c < width:
            raise UserError(
                f"n_collider_features must be an integer from 1 to {width - 1}, got {c!r}: X has n_features = {width} "
                "columns, and both y_n and its context need at least one"
            )
        if self.project not in PROJECTIONS:
            raise UserError(f'project must be "none", "before" or "after", got {self.project!r}')
        for name in ("collider_length_scale", "context_length_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("alpha", "cme_alpha"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must be finite and at least 0, got {getattr(self, name)}")

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        # Whatever the context explains is projected away: on a target that is not y_0 − m the score is low by design.
        tags.regressor_tags.poor_score = self.project != "none"
        return tags


def _rbf(A: np.ndarray, B: np.ndarray, length_scale: float) -> np.ndarray:
    """exp(−‖a − b‖²/(2ℓ²)), (rows of A, rows of B). From differences: the usual dot products would cancel."""
    return np.exp(cdist(A, B, "sqeuclidean") / (-2 * length_scale**2))


def _cholesky(K: np.ndarray, ridge: float, setting: str) -> tuple[np.ndarray, bool]:
    """Cholesky factor of K + ridge · I, for scipy's cho_solve. UserError if that is singular to working precision."""
    A = K + ridge * np.eye(len(K))
    try:
        factor = cho_factor(A, lower=True)
        reciprocal_condition, _ = lapack.dpocon(factor[0], np.abs(A).sum(0).max(), uplo="L")
    except LinAlgError:
        reciprocal_condition = 0.0
    # The Cholesky factor of a singular matrix often exists by rounding, hence the second question. The bound is that of
    # numpy's matrix_rank: two equal rows leave a pivot of a few eps.
    if reciprocal_condition < len(A) * np.finfo(np.float64).eps:
        raise UserError(
            f"{setting}: the kernel matrix of {len(K)} rows is singular (reciprocal condition {reciprocal_condition:.1e}); "
            "raise it, or remove rows that are equal or nearly so"
        )
    return factor


def kernel_features(sample: Sample) -> np.ndarray:
    """[y_n | q, y_1 … y_{n-1}] as `ProjectedKernelRidge` wants them, (N, r + d + (n − 1)p); y_0 is not read."""
    return np.hstack([sample.y_n, sample.q, sample.y[:, 1:].reshape(len(sample.q), -1)])


def kernel_experiment(
    scm: SCM, n_rows: int, seeds: Iterable[int], unlabelled: int, test_rows: int, **settings: float
) -> dict[str, np.ndarray]:
    """Mean squared error of the three estimators on the same data, seed by seed (theory.md §5).

    Args:
        scm: where the rows come from; the target is y_0 − scm.query_predictor(q), and so is the floor of the error the
            scm's Bayes risk, not 0.
        n_rows: labelled rows N. unlabelled: extra rows for the conditional mean, may be 0.
        seeds: one repetition each. Training, unlabelled and test rows have independent streams of their own.
        test_rows: fresh rows on which the error is measured.
        settings: of `ProjectedKernelRidge`, except n_collider_features and project.

    Returns:
        {"none": (seeds,), "after": (seeds,), "before": (seeds,)}: paired, since all three see the same rows.
    """
    errors: dict[str, list[float]] = {project: [] for project in PROJECTIONS}
    for seed in seeds:
        train_seed, test_seed, extra_seed = np.random.SeedSequence(seed).spawn(3)
        train, test = scm.sample(n_rows, train_seed), scm.sample(test_rows, test_seed)
        extra = kernel_features(scm.sample(unlabelled, extra_seed)) if unlabelled else None
        y, y_test = (s.y[:, 0] - scm.query_predictor(s.q) for s in (train, test))
        for project in PROJECTIONS:
            model = ProjectedKernelRidge(train.y_n.shape[1], project=project, **settings)
            f = model.fit(kernel_features(train), y, extra).predict(kernel_features(test))
            errors[project].append(float(np.square(y_test - f).sum(1).mean()))
    return {project: np.array(values) for project, values in errors.items()}
