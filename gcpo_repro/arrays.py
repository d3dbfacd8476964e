"""Arrays of numbers as the analysis modules take them: checked by name, float64; covariances and their roots.

Bad input raises UserError: which argument, which value, what to do.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .errors import UserError

Array = np.ndarray
Seed = int | np.random.SeedSequence | np.random.Generator
TINY = 1e-12  # an eigenvalue or a variance below this share of the largest is rounding: 0


def as_array(name: str, value: ArrayLike, axes: str, **known: int) -> Array:
    """value as float64, with the named axes ("N n p"), none empty, those already known as given, and finite."""
    try:
        x = np.asarray(value, dtype=float)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: not an array of numbers ({error})") from None
    names = axes.split()
    fits = x.ndim == len(names) and all(
        size > 0 and size == known.get(axis, size) for axis, size in zip(names, x.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(f"{axis} = {known[axis]}" if axis in known else axis for axis in names)
        raise UserError(f"{name}: must have shape ({wanted}), no axis empty, got {x.shape}: reshape or slice it")
    if not np.isfinite(x).all():
        at = tuple(np.argwhere(~np.isfinite(x))[0].tolist())
        raise UserError(f"{name}: {x[at]} at {at} is not finite: mend or drop it")
    return x


def as_covariance(name: str, value: ArrayLike, size: int) -> Array:
    """value as a symmetric positive semidefinite matrix (size, size)."""
    S = as_array(name, value, "k k", k=size)
    if not np.allclose(S, S.T, rtol=0, atol=1e-9 * np.abs(S).max()):
        raise UserError(f"{name}: {S.tolist()} is not symmetric; pass (S + Sᵀ) / 2 if only rounding is to blame")
    if (lowest := np.linalg.eigvalsh(S)[0]) < -TINY * np.abs(S).max():
        raise UserError(f"{name}: {S.tolist()} has the negative eigenvalue {lowest:.3g}; a covariance has none")
    return S


def as_generator(seed: Seed) -> np.random.Generator:
    """A fresh generator for an integer or a SeedSequence; a Generator itself."""
    if not isinstance(seed, Seed | np.integer) or (isinstance(seed, int | np.integer) and seed < 0):
        raise UserError(f"seed: {seed!r} must be an integer ≥ 0 or a numpy Generator: without one no draw can be repeated")
    return np.random.default_rng(seed)


def inverse(S: Array) -> Array:
    """Inverse of a covariance; without noise (S_h = 0) the pseudo-inverse, which Gaussian conditioning then needs."""
    return np.linalg.pinv(S, rcond=TINY, hermitian=True)


def root(S: Array) -> Array:
    """L with L Lᵀ = S, singular or not."""
    values, vectors = np.linalg.eigh(S)
    return vectors * np.sqrt(values.clip(min=0))


def as_count(name: str, value: int, least: int = 1) -> int:
    if not isinstance(value, int | np.integer) or value < least:
        raise UserError(f"{name}: {value!r} must be an integer of at least {least}")
    return int(value)
