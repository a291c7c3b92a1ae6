"""Scores of N samples for M targets, read in blocks of rows, so that they need not lie in memory.

Every rule takes an array, a memory-mapped file, or any other `ScoreMatrix`: products of features that are formed block
by block (`Similarities`), or a store of features on disk (`pyeff.scoring.FeatureStore`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.int64]

# A block is small beside memory and large beside a call of NumPy.
BLOCK_BYTES = 32 << 20


@runtime_checkable
class ScoreMatrix(Protocol):
    """Floats [N, M] that are read by rows; every reading gives the same values."""

    @property
    def shape(self) -> tuple[int, int]:
        """N samples and M columns."""

    def blocks(self) -> Iterator[tuple[int, FloatArray]]:
        """Number of the first row and the rows [b, M], in order, until all N are through."""

    def rows(self, indices: IntArray) -> FloatArray:
        """The rows [r, M] of these numbers, in their order."""


class ArrayMatrix:
    """An array [N, M] as a `ScoreMatrix`; a memory-mapped one is read block by block."""

    def __init__(self, array: ArrayLike, *, name: str = "scores") -> None:
        values = np.asanyarray(array)
        if values.dtype.kind not in "fiub":
            raise TypeError(f"{name} must be real numbers, got {values.dtype}")
        if values.dtype.kind != "f":
            values = values.astype(np.float64)
        if values.ndim != 2 or values.shape[1] == 0:
            raise ValueError(f"{name} must be [rows, columns] with at least one column, got {values.shape}")
        self._values = values

    @property
    def shape(self) -> tuple[int, int]:
        """N samples and M columns."""
        return int(self._values.shape[0]), int(self._values.shape[1])

    def blocks(self) -> Iterator[tuple[int, FloatArray]]:
        """Views of the array."""
        step = rows_of_block(self.shape[1], self._values.itemsize)
        for first in range(0, self.shape[0], step):
            yield first, np.asarray(self._values[first : first + step])

    def rows(self, indices: IntArray) -> FloatArray:
        """A copy of these rows."""
        return np.asarray(self._values[indices])


class Similarities:
    """Similarity of every sample to every target, from their features; formed when read, float64.

        s_ij = <x_i, y_j>,   or that over |x_i| |y_j| with `cosine`

    ``features`` [N, D] is an array or a `ScoreMatrix`, ``targets`` [M, D] an array. A vector of norm zero is similar to
    nothing (0); one that is not finite gives NaN, and no rule takes such a sample.

    Raises `ValueError` where the widths differ or a target is not finite.

    >>> Similarities([[2.0, 0.0], [3.0, 3.0]], [[1.0, 0.0]]).rows(np.array([0, 1])).round(3).tolist()
    [[1.0], [0.707]]
    """

    def __init__(self, features: ArrayLike | ScoreMatrix, targets: ArrayLike, *, cosine: bool = True) -> None:
        self._features = as_matrix(features, name="features")
        goals = np.asarray(targets, dtype=np.float64)
        if goals.ndim != 2 or goals.shape[0] == 0 or goals.shape[1] != self._features.shape[1]:
            raise ValueError(
                f"targets must be [targets, {self._features.shape[1]}], as wide as the features, got {goals.shape}"
            )
        if not np.isfinite(goals).all():
            bad = int(np.flatnonzero(~np.isfinite(goals).all(axis=1))[0])
            raise ValueError(f"targets must be finite, but target {bad} is not")
        self._cosine = cosine
        self._targets = unit_rows(goals) if cosine else goals

    @property
    def shape(self) -> tuple[int, int]:
        """N samples and M targets."""
        return self._features.shape[0], int(self._targets.shape[0])

    def blocks(self) -> Iterator[tuple[int, FloatArray]]:
        """Products of the features' blocks with the targets."""
        step = rows_of_block(self.shape[1], 8)
        for first, block in self._features.blocks():
            for start in range(0, len(block), step):
                yield first + start, self._product(block[start : start + step])

    def rows(self, indices: IntArray) -> FloatArray:
        """Products of these rows with the targets."""
        return self._product(self._features.rows(indices))

    def _product(self, features: FloatArray) -> FloatArray:
        rows = features.astype(np.float64)
        finite = np.isfinite(rows).all(axis=1)
        rows[~finite] = 0.0
        product: FloatArray = (unit_rows(rows) if self._cosine else rows) @ self._targets.T
        product[~finite] = np.nan
        return product


def as_matrix(scores: ArrayLike | ScoreMatrix, *, name: str = "scores") -> ScoreMatrix:
    """An array as a `ScoreMatrix`; a matrix as it is."""
    if not isinstance(scores, np.ndarray) and isinstance(scores, ScoreMatrix):
        return scores
    return ArrayMatrix(scores, name=name)


def unit_rows(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows divided by their norms; rows of zeros stay zero."""
    # By the largest entry first: squares of very small or large numbers leave the range of doubles.
    largest = np.abs(rows).max(axis=1, keepdims=True, initial=0.0)
    scaled = np.divide(rows, largest, out=np.zeros_like(rows), where=largest > 0)
    norms = np.linalg.norm(scaled, axis=1, keepdims=True)
    return np.divide(scaled, norms, out=np.zeros_like(rows), where=norms > 0)


def rows_of_block(columns: int, itemsize: int) -> int:
    """How many rows of so many columns make a block."""
    return max(1, BLOCK_BYTES // max(1, columns * itemsize))


def finite_rows(matrix: ScoreMatrix) -> NDArray[np.bool_]:
    """Which rows [N] hold finite numbers alone."""
    found = np.zeros(matrix.shape[0], dtype=bool)
    for first, block in matrix.blocks():
        found[first : first + len(block)] = np.isfinite(block).all(axis=1)
    return found


def per_sample(
    scores: ArrayLike | ScoreMatrix, *, reduction: str = "max", groups: ArrayLike | None = None
) -> NDArray[np.float64]:
    """One value a sample from its scores for many targets, float64 [N].

    ``reduction`` over the targets is "max", "mean" or "sum". With ``groups`` [M], the mean within each group of targets
    comes first: "max" is then what LESS ranks by, subtasks being the groups (Xia et al., 2024, arXiv:2402.04333). A row
    that is not finite is NaN.

    Cost: one reading of the scores.

    >>> per_sample([[1.0, 3.0, 0.0], [2.0, 2.0, 2.5]]).tolist()
    [3.0, 2.5]
    >>> per_sample([[1.0, 3.0, 0.0], [2.0, 2.0, 2.5]], groups=["a", "a", "b"]).tolist()
    [2.0, 2.5]
    """
    if reduction not in ("max", "mean", "sum"):
        raise ValueError(f"reduction must be 'max', 'mean' or 'sum', got {reduction!r}")
    matrix = as_matrix(scores)
    n, m = matrix.shape
    averaging: NDArray[np.float64] | None = None
    if groups is not None:
        _, codes = np.unique(np.asarray(groups), return_inverse=True)
        if codes.shape != (m,):
            raise ValueError(f"groups must be one label for each of the {m} targets, got {codes.shape}")
        averaging = np.zeros((m, int(codes.max()) + 1))
        averaging[np.arange(m), codes] = 1.0 / np.bincount(codes)[codes]
    values = np.empty(n)
    for first, block in matrix.blocks():
        rows = block.astype(np.float64)
        finite = np.isfinite(rows).all(axis=1)
        rows[~finite] = 0.0
        if averaging is not None:
            rows = rows @ averaging
        reduced = getattr(rows, reduction)(axis=1)
        reduced[~finite] = np.nan
        values[first : first + len(block)] = reduced
    return values
