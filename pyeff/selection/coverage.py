"""Facility location: a subset in which everything to be represented has something near."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyeff.selection.matrix import IntArray, ScoreMatrix, as_matrix
from pyeff.selection.sampling import generator
from pyeff.selection.targets import check_k

# Rows whose gain is formed anew in one go, where one of them would do: a product of features is cheaper by the block.
_AT_ONCE = 32


@dataclass(frozen=True)
class Coverage:
    """A subset and what it covers.

    ``indices`` int64 [k], in the order taken; ``values`` float64 [k]: f of the first 1, 2, ... of them. ``evaluated``:
    rows whose gain was formed; N k is what a plain greedy search would form.
    """

    indices: IntArray
    values: NDArray[np.float64]
    evaluated: int


def facility_location(
    scores: ArrayLike | ScoreMatrix, k: int, *, method: str = "lazy", epsilon: float = 0.01, seed: int = 0
) -> Coverage:
    """Take ``k`` rows greedily so that every column has a large value among them.

        f(S) = sum_j max(0, max over i in S of s_ij),   next = argmax_i f(S + i) - f(S)

    ``scores`` [N, M]: how well sample i represents j, for instance `Similarities(x, x[sample])`; the pool itself, a
    sample of it where N^2 is too much, or target samples. Similarities below 0 represent nothing. Of equal gains the
    first row is taken; when nothing is left to gain, too. Rows with a value that is not finite are never taken, so that
    fewer than ``k`` may come back.

    ``method``: "lazy" takes exactly what a plain greedy search takes, forming gains anew only while they may matter
    (Minoux, 1978); f is at least 1 - 1/e of the best. "stochastic" looks at (N / k) ln(1 / epsilon) free rows at a
    time, drawn from the seed: 1 - 1/e - epsilon in expectation (Mirzasoleiman et al., 2015, arXiv:1409.7938).

    Raises `ValueError` for scores that are no matrix, a negative ``k``, another method, or epsilon not in (0, 1).

    Cost: "lazy" one reading of the scores, then few rows a step; "stochastic" N ln(1 / epsilon) rows in all, M
    operations each.

    >>> facility_location([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 0.5]], 2).indices.tolist()
    [0, 2]
    """
    matrix = as_matrix(scores)
    check_k(k)
    if method not in ("lazy", "stochastic"):
        raise ValueError(f"method must be 'lazy' or 'stochastic', got {method!r}")
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon must be between 0 and 1, got {epsilon}")
    search = _Search(matrix)
    if method == "lazy":
        _lazy(search, k)
    else:
        _stochastic(search, k, epsilon, seed)
    return Coverage(np.asarray(search.taken, dtype=np.int64), np.asarray(search.values), search.evaluated)


class _Search:
    """What has been taken, and how well each column is covered by it."""

    def __init__(self, matrix: ScoreMatrix) -> None:
        self.matrix = matrix
        self.covered = np.zeros(matrix.shape[1])
        self.taken: list[int] = []
        self.values: list[float] = []
        self.evaluated = 0

    def gains(self, rows: NDArray[np.floating]) -> NDArray[np.float64]:
        """What each row [r, M] would add; NaN where it is not finite.

        Adding up in one order, so a gain formed later is never larger, roundings included.
        """
        self.evaluated += len(rows)
        usable = np.isfinite(rows).all(axis=1)
        more = np.subtract(np.where(usable[:, None], rows, 0.0), self.covered, order="C")
        gained: NDArray[np.float64] = np.maximum(more, 0.0).sum(axis=1)
        gained[~usable] = np.nan
        return gained

    def take(self, index: int) -> None:
        np.maximum(self.covered, self.matrix.rows(np.array([index]))[0], out=self.covered)
        self.taken.append(index)
        self.values.append(float(self.covered.sum()))


def _lazy(search: _Search, k: int) -> None:
    first = [search.gains(block) for _, block in search.matrix.blocks()]
    if not first:
        return
    gains = np.concatenate(first)
    # Larger gain first, then the smaller row; the last entry says after how many rows taken the gain was formed.
    heap = [(-gain, row, 0) for row, gain in enumerate(gains.tolist()) if not math.isnan(gain)]
    heapq.heapify(heap)
    while heap and len(search.taken) < k:
        if heap[0][2] == len(search.taken):
            search.take(heapq.heappop(heap)[1])
            continue
        stale: list[int] = []
        while heap and heap[0][2] != len(search.taken) and len(stale) < _AT_ONCE:
            stale.append(heapq.heappop(heap)[1])
        for row, gain in zip(stale, search.gains(search.matrix.rows(np.array(stale))).tolist(), strict=True):
            heapq.heappush(heap, (-gain, row, len(search.taken)))


def _stochastic(search: _Search, k: int, epsilon: float, seed: int) -> None:
    n = search.matrix.shape[0]
    draw = generator(seed)
    free, left = np.arange(n), n
    size = max(1, math.ceil(n / max(1, k) * math.log(1 / epsilon)))
    while len(search.taken) < k and left:
        places = draw.choice(left, min(size, left), replace=False, shuffle=False)
        places = places[np.argsort(free[places])]
        gains = search.gains(search.matrix.rows(free[places]))
        struck = np.isnan(gains)
        if not struck.all():
            best = int(np.nanargmax(gains))
            search.take(int(free[places[best]]))
            struck[best] = True
        for place in sorted(places[struck].tolist(), reverse=True):
            left -= 1
            free[place] = free[left]
