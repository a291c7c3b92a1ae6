"""Moments of a training, and sums of scores over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pyeff.scoring.store import BY_TARGETS
from pyeff.selection import ScoreMatrix

INFLUENCE = "influence"
"""Directory of the influence of every sample on every target, beside those of the states' features."""

# Rows of influence that are formed at a time; a fixed number, so that an interrupted run goes on at the same borders.
ROWS = 4096


@dataclass(frozen=True)
class TrainingState:
    """A moment of a training at which influence is measured.

    ``load()`` returns the model and, for `LESS`, its Adam or AdamW with the moments of that moment; it is called when
    the state is needed, one at a time. ``learning_rate`` weighs the state: the mean of its epoch, in LESS. ``name``
    names a directory.
    """

    name: str
    learning_rate: float
    load: Callable[[], tuple[nn.Module, torch.optim.Optimizer | None]]

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name or self.name in ("", "..", INFLUENCE, BY_TARGETS):
            raise ValueError(f"name becomes the name of a directory, and {self.name!r} is none")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")


class WeightedSum:
    """sum_c w_c s_c of matrices of scores [N, M] as a `pyeff.selection.ScoreMatrix`, formed when read.

    ``places[c]`` [N]: the row of matrix c that belongs to row i of the sum.
    """

    def __init__(
        self, matrices: Sequence[ScoreMatrix], weights: Sequence[float], places: Sequence[NDArray[np.int64]]
    ) -> None:
        self._terms = list(zip(matrices, weights, places, strict=True))

    @property
    def shape(self) -> tuple[int, int]:
        """N samples and M targets."""
        return self._terms[0][0].shape

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """The rows in order, some thousands at a time."""
        for first in range(0, self.shape[0], ROWS):
            yield first, self.rows(np.arange(first, min(first + ROWS, self.shape[0])))

    def rows(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """These rows, float64."""
        total = np.zeros((len(indices), self.shape[1]))
        for matrix, weight, places in self._terms:
            total += weight * matrix.rows(places[indices])
        return total
