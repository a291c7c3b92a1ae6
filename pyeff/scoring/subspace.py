"""Similarity within the subspace that the targets' gradients span: after GIST."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pyeff.scoring.features import Features
from pyeff.scoring.targets import TargetSimilarities
from pyeff.selection import ScoreMatrix
from pyeff.selection.matrix import unit_rows


class SubspaceSimilarities:
    """Cosine of samples with targets within the targets' leading directions, as a `pyeff.selection.ScoreMatrix`.

        Y = U diag(s) V^T of the targets' features [M, D],  P = V_r V_r^T,  s_ij = <P x_i, P y_j> / (|P x_i| |P y_j|)

    with the r largest singular values: no optimizer's diagonal, a poor geometry for low-rank adapters, but the
    directions that the target task moves in. Variant: the SVD is of sketched gradients (`GradientSketches` without an
    optimizer), whose products are those of the gradients up to the sketch's error; the score is a cosine in the
    subspace; r is given or reaches a part of the energy. Min et al., 2026, "GIST: Targeted Data Selection for
    Instruction Tuning via Coupled Optimization Geometry", arXiv:2602.18584, with up to 150 directions of unsketched
    gradients.

    Args:
        features: The pool's, [N, D].
        targets: Those of the targets, [M, D], with the same sketch and of the same model.
        rank: r; None for the smallest whose directions hold ``energy`` of the squares of the targets' features.
        energy: In (0, 1].

    `rank` and `energy` of the result say what was taken. A sample without a component in the subspace has similarity 0.

    Raises `ValueError` as `TargetSimilarities` does, for a rank beyond that of the targets, or targets all zero.

    Cost: 2 M^2 D FLOPs once, then 2 N D r and 2 N M r each time it is gone through, where `TargetSimilarities` takes
    2 N M D; r D numbers.
    """

    def __init__(self, features: Features, targets: Features, *, rank: int | None = None, energy: float = 0.95) -> None:
        if not 0 < energy <= 1:
            raise ValueError(f"energy must be in (0, 1], got {energy}")
        TargetSimilarities(features, targets)  # refuses what cannot be compared
        goals = targets.rows(np.arange(len(targets))).astype(np.float64)
        # By the Gram matrix: there are fewer targets than numbers.
        values, vectors = np.linalg.eigh(goals @ goals.T)
        values, vectors = values[::-1], vectors[:, ::-1]
        # What lies below is rounding.
        independent = int((values > len(goals) * np.finfo(np.float64).eps * max(values[0], 0.0)).sum())
        if independent == 0:
            raise ValueError("targets are all zero: they span nothing")
        parts = np.cumsum(values[:independent]) / values[:independent].sum()
        if rank is None:
            rank = min(independent, int(np.searchsorted(parts, energy * (1 - 1e-12))) + 1)
        if isinstance(rank, bool) or not 1 <= rank <= independent:
            raise ValueError(f"rank must be from 1 to {independent}, that of the targets, got {rank}")
        self.rank, self.energy = rank, float(parts[rank - 1])
        self._features: ScoreMatrix = features
        self._basis = (vectors[:, :rank] / np.sqrt(values[:rank])).T @ goals  # [r, D], orthonormal rows
        self._goals = unit_rows(goals @ self._basis.T)

    @property
    def method(self) -> str:
        """The method with its variant."""
        return f"GIST-style (SVD of sketched target gradients, rank {self.rank}, cosine in the subspace)"

    @property
    def shape(self) -> tuple[int, int]:
        """N samples and M targets."""
        return self._features.shape[0], len(self._goals)

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """Products of the features' blocks with the targets."""
        for first, rows in self._features.blocks():
            yield first, self._product(rows)

    def rows(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Products of these rows with the targets."""
        return self._product(self._features.rows(indices))

    def _product(self, rows: NDArray[np.floating]) -> NDArray[np.float64]:
        finite = np.asarray(np.isfinite(rows).all(axis=1))
        within = np.where(finite[:, None], rows, 0.0) @ self._basis.T
        # A projection that is rounding alone has no direction.
        lengths = np.linalg.norm(np.where(finite[:, None], rows, 0.0), axis=1, keepdims=True)
        noise = np.linalg.norm(within, axis=1, keepdims=True) <= np.finfo(np.float32).eps * lengths
        product: NDArray[np.float64] = unit_rows(np.where(noise, 0.0, within)) @ self._goals.T
        product[~finite] = np.nan
        return product
