"""What every structural causal model here has in common: its three mechanisms, and the sample that they make.

    q ~ draw_query        y_0 … y_{n−1} ~ draw_candidates(q)        y_n ~ integrate(q, y)

N rows; n candidates; d, p, r the widths of q, y_i, y_n; float64. A *predictor of y_0* is a callable f(sample) → (N, p)
that reads q, y[:, 1:] and y_n, never y[:, 0].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from .arrays import Array, Seed, as_array, as_count, as_generator

__all__ = ["SCM", "Sample"]


@dataclass(frozen=True, eq=False)
class Sample:
    """N rows: q (N, d), y (N, n, p) with the candidates in order, y_n (N, r)."""

    q: Array
    y: Array
    y_n: Array

    def __post_init__(self) -> None:
        rows = {} if np.ndim(self.q) == 0 else {"N": len(self.q)}
        for name, axes in {"q": "N d", "y": "N n p", "y_n": "N r"}.items():
            object.__setattr__(self, name, as_array(name, getattr(self, name), axes, **rows))


class SCM(ABC):
    """Three mechanisms, one per kind of node, each drawing from the generator that it is given."""

    n: int
    p: int
    d: int
    r: int

    def draw_query(self, size: int, rng: np.random.Generator) -> Array:
        """q ~ N(0, I_d), (size, d)."""
        return rng.standard_normal((as_count("size", size), self.d))

    @abstractmethod
    def draw_candidates(self, q: Array, count: int, rng: np.random.Generator) -> Array:
        """`count` fresh candidates for each row of q (N, d): (N, count, p)."""

    @abstractmethod
    def integrate(self, q: Array, y: Array, rng: np.random.Generator) -> Array:
        """y_n (N, r) given q (N, d) and the whole group y (N, n, p)."""

    @abstractmethod
    def query_predictor(self, q: Array) -> Array:
        """m = E[y_0 | q], (N, p), for q (N, d)."""

    def sample(self, size: int, seed: Seed) -> Sample:
        """`size` independent rows. The same integer seed gives the same rows; a Generator is drawn from."""
        rng = as_generator(seed)
        q = self.draw_query(size, rng)
        y = self.draw_candidates(q, self.n, rng)
        return Sample(q, y, self.integrate(q, y, rng))

    def _group(self, q: Array, y: Array) -> tuple[Array, Array]:
        q = as_array("q", q, "N d", d=self.d)
        return q, as_array("y", y, "N n p", N=len(q), n=self.n, p=self.p)
