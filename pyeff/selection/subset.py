"""Choose which samples of a pool to train on, given what each was scored.

Similarity to a target task is ranked by round robin (each target sample in turn takes its nearest sample
that is still free), so that a task of several families gets each of them; every other score is ranked by
its value. The hardest samples can be left out first, since among samples of one kind a loss far above the
others' marks a wrong answer more often than a lesson. Kinds differ in difficulty, so with a similarity the
hardest are sought among the samples nearest to the same target sample: over the whole pool they would be
the target's hardest family.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyeff.selection.matrix import IntArray
from pyeff.selection.sampling import generator
from pyeff.selection.targets import check_k, round_robin

SELECTORS = ("target_similarity", "nll", "el2n", "entropy", "head_grad_norm", "random")
"""What `select` can rank by; of each score the largest values are kept."""

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Selection:
    """A chosen subset of a pool of N samples.

    ``indices`` int64 [k], ascending. ``values`` float64 [N]: what was ranked, larger preferred (NaN: could
    not be scored, never chosen). ``dropped`` int64: samples left out as the hardest before the ranking.
    """

    indices: IntArray
    values: FloatArray
    dropped: IntArray


def top_k(values: ArrayLike, k: int) -> IntArray:
    """Indices of the ``k`` largest values, best first; of equal values the first comes first, NaN never.

    >>> top_k([0.5, float("nan"), 2.0, 0.5], 2).tolist()
    [2, 0]
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"values must be [samples], got {array.shape}")
    check_k(k)
    order = np.argsort(-array, kind="stable")
    return order[~np.isnan(array[order])][:k].astype(np.int64)


def hardest(nll: ArrayLike, fraction: float, *, groups: ArrayLike | None = None) -> IntArray:
    """Indices of the ``fraction`` of samples with the largest loss (rounded down), ascending.

    With ``groups`` [N], of each group its own ``fraction``.

    >>> hardest([1.0, 9.0, 2.0, 3.0], 0.25).tolist()
    [1]
    >>> hardest([1.0, 9.0, 2.0, 8.0], 0.5, groups=[0, 1, 0, 1]).tolist()
    [1, 2]
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be in [0, 1), got {fraction}")
    array = np.asarray(nll, dtype=np.float64)
    labels = np.zeros(array.shape[0], dtype=np.int64) if groups is None else np.asarray(groups)
    if labels.shape != array.shape:
        raise ValueError(f"groups must be one label for each loss, got {labels.shape} for {array.shape}")
    taken = [np.zeros(0, dtype=np.int64)]
    for label in np.unique(labels):
        members = np.flatnonzero((labels == label) & ~np.isnan(array))
        taken.append(members[top_k(array[members], math.floor(fraction * members.size))])
    return np.sort(np.concatenate(taken))


def select(
    scores: Mapping[str, ArrayLike],
    *,
    score: str,
    keep: float,
    drop_hardest: float = 0.0,
    similarity: ArrayLike | None = None,
    seed: int = 0,
) -> Selection:
    """Choose ``ceil(keep * N)`` of N samples, at least one.

    ``scores`` maps a field to [N] values; ``nll`` is needed for ``drop_hardest > 0``. ``score`` is one of
    `SELECTORS`; ``target_similarity`` needs ``similarity`` [N, M] to M target samples, and a sample's value
    is then its similarity to the nearest of them. ``random`` draws uniformly from the seed.

    Raises `ValueError` when a score is missing or unknown, the lengths differ, ``keep`` is not in (0, 1],
    or no sample is left that has a score.

    >>> select({"nll": [1.0, 3.0, 2.0, 9.0]}, score="nll", keep=0.5, drop_hardest=0.25).indices.tolist()
    [1, 2]
    """
    if score not in SELECTORS:
        raise ValueError(f"score must be one of {', '.join(SELECTORS)}, got {score!r}")
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    fields = {name: np.asarray(value, dtype=np.float64) for name, value in scores.items()}
    matrix = None if similarity is None else np.asarray(similarity, dtype=np.float64)
    lengths = {name: value.shape[0] for name, value in fields.items()}
    if matrix is not None:
        lengths["similarity"] = matrix.shape[0]
    if not lengths or len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(f"scores must have one value for every sample of a non-empty pool, got {lengths}")
    n = next(iter(lengths.values()))

    dropped = np.zeros(0, dtype=np.int64)
    if drop_hardest > 0:
        if "nll" not in fields:
            raise ValueError("drop_hardest needs the score 'nll'")
        nearest = None
        if score == "target_similarity" and matrix is not None:
            nearest = np.nan_to_num(matrix, nan=-np.inf).argmax(axis=1)
        dropped = hardest(fields["nll"], drop_hardest, groups=nearest)

    if score == "target_similarity":
        if matrix is None:
            raise ValueError("score 'target_similarity' needs similarity [N, M]")
        values = matrix.max(axis=1)
    elif score == "random":
        values = generator(seed).random(n)
    elif score in fields:
        values = fields[score]
    else:
        raise ValueError(f"score {score!r} was not computed; there are {', '.join(sorted(fields))}")

    k = max(1, math.ceil(keep * n))
    if matrix is not None and score == "target_similarity":
        allowed = matrix.copy()
        allowed[dropped] = np.nan
        chosen = round_robin(allowed, k)
    else:
        allowed = values.copy()
        allowed[dropped] = np.nan
        chosen = top_k(allowed, k)
    if chosen.size == 0:
        raise ValueError("no sample of the pool has a score")
    return Selection(indices=np.sort(chosen), values=values, dropped=dropped)
