"""Ridge regression from sums: one pass over any number of rows, several strengths at once.

For inputs X and targets Y, both centred, the map of strength s is ``(X'X + s I)^-1 X'Y`` (Hoerl and
Kennard, 1970); the intercept, which is not penalised, follows from the means. With the
eigendecomposition ``X'X = Q L Q'``, each further strength costs a division.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from m2dexport.checkpoint.alignment import LinearMap

Floats = NDArray[np.float32]
_Matrix = NDArray[np.float64]


class Moments:
    """The sums that regressions of some outputs on some inputs follow from.

    Args:
        width: values of an input row.
        outputs: values of a target row.
        intercept: whether the maps have one.
    """

    def __init__(self, width: int, outputs: int, *, intercept: bool) -> None:
        self.rows = 0
        self._intercept = intercept
        self._x: _Matrix = np.zeros(width)
        self._y: _Matrix = np.zeros(outputs)
        self._xx: _Matrix = np.zeros((width, width))
        self._xy: _Matrix = np.zeros((width, outputs))

    def add(self, inputs: Floats, targets: Floats) -> None:
        """Count rows in: float32 (rows, width) and (rows, outputs)."""
        x, y = inputs.astype(np.float64), targets.astype(np.float64)
        with threadpool_limits(1):  # more threads take sums in another order
            self.rows += len(x)
            self._x += x.sum(axis=0)
            self._y += y.sum(axis=0)
            self._xx += x.T @ x
            self._xy += x.T @ y

    def joined(self, other: Moments) -> Moments:
        """Return the moments of the rows of both."""
        both = Moments(len(self._x), len(self._y), intercept=self._intercept)
        both.rows = self.rows + other.rows
        for name in ("_x", "_y", "_xx", "_xy"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def eigen(self) -> Eigen:
        """Return what maps of any strength follow from; at least one row was counted in."""
        x = self._x / self.rows if self._intercept else np.zeros_like(self._x)
        y = self._y / self.rows if self._intercept else np.zeros_like(self._y)
        with threadpool_limits(1):
            values, vectors = np.linalg.eigh(self._xx - self.rows * np.outer(x, x))
            rotated = vectors.T @ (self._xy - self.rows * np.outer(x, y))
        return Eigen(np.maximum(values, 0), vectors, rotated, x, y)


class Eigen:
    """The eigendecomposition of X'X, beside X'Y in its basis and the means."""

    def __init__(
        self, values: _Matrix, vectors: _Matrix, rotated: _Matrix, x: _Matrix, y: _Matrix
    ) -> None:
        self._values, self._vectors, self._rotated = values, vectors, rotated
        self._x, self._y = x, y

    def maps(self, strengths: Sequence[float], outputs: slice) -> list[LinearMap]:
        """Return the map of each strength, above 0, to some of the outputs."""
        rotated, y = self._rotated[:, outputs], self._y[outputs]
        found = []
        with threadpool_limits(1):
            for strength in strengths:
                weight = (self._vectors @ (rotated / (self._values + strength)[:, None])).T
                bias = y - weight @ self._x
                found.append(LinearMap(weight.astype(np.float32), bias.astype(np.float32)))
        return found
