"""Rules that serve many targets at once: round robin and BIDS, from the best rows of each column alone.

Both take, at every step, the best free row of some column. So a sorted list of each column's best rows is all that is
needed of the scores: it is gathered in one reading, and should a list run out, again from the rows still free.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyeff.selection.matrix import ArrayMatrix, FloatArray, IntArray, ScoreMatrix, as_matrix

# Hits are sorted together once there are so many; a sort of this many takes a fraction of a second.
_SORT_AT = 1 << 21

# So many rows are listed over all columns at most, beyond what the first reading lists: 0.8 GB.
_LISTED = 1 << 25


class _BestRows:
    """The free rows of each column, best first, as far as they have been listed; of equal values the first comes first.

    Rows with a value that is not finite are not free.
    """

    def __init__(self, matrix: ScoreMatrix, k: int, *, gather: bool = False) -> None:
        n, m = matrix.shape
        self._matrix = matrix
        self._gather = gather and not isinstance(matrix, ArrayMatrix)
        self.free = np.ones(n, dtype=bool)
        self._read(max(1, min(n, 2 * -(-k // m) + 16)))

    def _read(self, count: int) -> None:
        m = self._matrix.shape[1]
        self._count = count
        rows = np.zeros(0, dtype=np.int64)
        columns = np.zeros(0, dtype=np.int64)
        values = np.zeros(0, dtype=np.float64)
        waiting: list[tuple[IntArray, IntArray, NDArray[np.float64]]] = []
        # A row must be above the last of a full list; equal ones come later and so behind.
        least = np.full(m, -np.inf)

        def settle() -> None:
            nonlocal rows, columns, values
            rows = np.concatenate([rows, *(part[0] for part in waiting)])
            columns = np.concatenate([columns, *(part[1] for part in waiting)])
            values = np.concatenate([values, *(part[2] for part in waiting)])
            waiting.clear()
            # Stable, and of equal values the smaller row stands first already. Numbers of 16 bits sort fastest.
            narrow = columns.astype(np.uint16) if m <= 1 << 16 else columns
            order = np.lexsort((-values, narrow))
            rows, columns, values = rows[order], columns[order], values[order]
            starts = np.searchsorted(columns, np.arange(m))
            kept = np.arange(len(columns)) - starts[columns] < count
            rows, columns, values = rows[kept], columns[kept], values[kept]
            lengths = np.bincount(columns, minlength=m)
            full = lengths == count
            least[full] = values[np.cumsum(lengths)[full] - 1]

        held = 0
        for first, block in self._matrix.blocks():
            free = self.free[first : first + len(block)]
            free &= np.isfinite(block).all(axis=1)
            if not free.all():
                block = np.where(free[:, None], block, -np.inf)
            above = np.asarray(block > least)
            if len(block) > count and np.isneginf(least).any():
                # What is not among the best of its own block cannot be among the best of all.
                above &= block >= np.partition(block, len(block) - count, axis=0)[len(block) - count]
            at, column = np.nonzero(above)
            waiting.append((at + first, column, block[at, column].astype(np.float64)))
            held += len(at)
            if held >= _SORT_AT or np.isneginf(least).any():
                settle()
                held = 0
        settle()
        lengths = np.bincount(columns, minlength=m)
        self._rows, self._values = rows, values
        self._ends = np.cumsum(lengths)
        self._at = self._ends - lengths
        if self._gather:
            self._gathered = np.unique(rows)
            self._gathered_rows = self._matrix.rows(self._gathered)

    def head(self, column: int) -> tuple[int, float]:
        """The column's best free row and its value; some row must be free."""
        while True:
            place, end = int(self._at[column]), int(self._ends[column])
            if place == end:
                # What is not listed is below what was listed, and that is taken: list what is free, a longer way down.
                most = max(self._count, _LISTED // self._matrix.shape[1])
                self._read(min(4 * self._count, most, len(self.free)))
                continue
            found = np.flatnonzero(self.free[self._rows[place : min(end, place + 64)]])
            if found.size:
                place += int(found[0])
                self._at[column] = place
                return int(self._rows[place]), float(self._values[place])
            self._at[column] = min(end, place + 64)

    def row(self, index: int) -> FloatArray:
        """Scores [M] of a listed row."""
        if self._gather:
            found: FloatArray = self._gathered_rows[np.searchsorted(self._gathered, index)]
            return found
        single: FloatArray = self._matrix.rows(np.array([index]))[0]
        return single


def round_robin(scores: ArrayLike | ScoreMatrix, k: int) -> IntArray:
    """Let each column in turn take its largest free row until ``k`` rows are taken; in the order taken.

    ``scores`` [N, M]: of N samples for M targets. Rows with a value that is not finite are never taken, so that fewer
    than ``k`` may come back. Every prefix of the result is the result for a smaller ``k``. RDS+ chooses this way
    (Ivison et al., 2025, arXiv:2503.01807).

    Raises `ValueError` for scores that are no matrix and for a negative ``k``.

    Cost: one reading of the scores and memory for about 2 k + 16 M of them; more of both where columns rank alike.

    >>> round_robin([[0.9, 0.1], [0.8, 0.2], [0.0, 0.3]], 2).tolist()
    [0, 2]
    """
    matrix = as_matrix(scores)
    check_k(k)
    m = matrix.shape[1]
    best = _BestRows(matrix, k)
    taken = np.empty(min(k, int(np.count_nonzero(best.free))), dtype=np.int64)
    for turn in range(len(taken)):
        row, _ = best.head(turn % m)
        best.free[row] = False
        taken[turn] = row
    return taken


def bids(scores: ArrayLike | ScoreMatrix, k: int) -> IntArray:
    """Take, ``k`` times, the row that most exceeds what the rows taken give some target: the most under-served first.

        z_ij = (s_ij - mean_i s_ij) / std_i s_ij
        next = argmax over free i of max_j (z_ij - mean over taken t of z_tj)

    In the order taken; of equal gains the first column's, then the first row. Balanced and Influential Data Selection
    (Dai et al., 2025, arXiv:2501.12147): scores are normalised per target *instance*; a target for which all samples
    score alike counts nothing (z = 0). The published text gives the rule in words; this is its greedy form, with the
    mean over nothing taken as zero.

    ``scores`` [N, M]; rows with a value that is not finite are neither counted nor taken, so that fewer than ``k`` may
    come back. Every prefix of the result is the result for a smaller ``k``.

    Raises `ValueError` for scores that are no matrix and for a negative ``k``.

    Cost: the best free row of a column stays its best whatever was taken, so a step costs M, not N M; with two or
    three readings of the scores.

    >>> bids([[9.0, 0.0], [8.0, 0.0], [0.0, 0.1], [0.0, 0.0]], 2).tolist()
    [2, 0]
    """
    matrix = as_matrix(scores)
    check_k(k)
    m = matrix.shape[1]
    mean, deviation = column_moments(matrix)
    best = _BestRows(matrix, k, gather=True)
    taken = np.empty(min(k, int(np.count_nonzero(best.free))), dtype=np.int64)
    scale = np.divide(1.0, deviation, out=np.zeros(m), where=deviation > 0)
    heads = np.full(m, -1, dtype=np.int64)
    values = np.zeros(m)
    total = np.zeros(m)
    row = -1
    for step in range(len(taken)):
        for column in np.flatnonzero(heads == row).tolist():
            heads[column], values[column] = best.head(column)
        row = int(heads[np.argmax((values - mean) * scale - total / max(1, step))])
        best.free[row] = False
        taken[step] = row
        total += (best.row(row).astype(np.float64) - mean) * scale
    return taken


def column_moments(matrix: ScoreMatrix) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation [M] of each column over the rows that are finite; float64."""
    m = matrix.shape[1]
    count, mean, squares = 0, np.zeros(m), np.zeros(m)
    constant = np.ones(m, dtype=bool)
    value: NDArray[np.float64] | None = None
    for _, block in matrix.blocks():
        rows = block[np.isfinite(block).all(axis=1)].astype(np.float64)
        if len(rows) == 0:
            continue
        value = rows[0] if value is None else value
        constant &= (rows == value).all(axis=0)
        own = rows.mean(axis=0)
        difference = own - mean
        both = count + len(rows)
        squares += np.square(rows - own).sum(axis=0) + np.square(difference) * (count * len(rows) / both)
        mean += difference * (len(rows) / both)
        count = both
    deviation = np.sqrt(squares / max(1, count))
    # The mean of equal numbers is rounded, and what is left must not be scaled up.
    deviation[constant] = 0.0
    return mean, deviation


def check_k(k: int) -> None:
    """Raise unless ``k`` is a number of samples."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}")
