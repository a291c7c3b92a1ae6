"""Which samples of a batch to step on: GREATS, OPUS and CoLM, from the sketches of one backward pass.

with pyeff.observe(model, defer=True, norms=False, sketch=sketch) as seen:
    summed_losses(model, batch).backward()  # the candidates, then the target samples
chosen = greats(seen.sketches[:n], seen.sketches[n:], k, lr=lr)
seen.accumulate(chosen.indices)  # the gradient of these alone
optimizer.step()
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyeff.selection.coverage import facility_location
from pyeff.selection.groups import by_group
from pyeff.selection.matrix import IntArray
from pyeff.selection.sampling import generator
from pyeff.selection.targets import check_k

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class BatchChoice:
    """Samples of a batch to step on.

    ``indices`` int64 [k] and ``values`` float64 [k], the utility of each when it was taken, in the order taken.
    ``method`` names the rule and its variant; ``flops`` and ``seconds`` are those of the choice, not of the sketches.
    """

    indices: IntArray
    values: FloatArray
    method: str
    flops: int
    seconds: float

    def weights(self, samples: int, *, scale: float = 1.0) -> FloatArray:
        """``scale`` for each chosen sample and 0 for the others, [samples]: for `accumulate` of `pyeff.observe`.

        Where the loss was a mean over B samples, ``scale=B / k`` makes it the mean over the chosen.
        """
        found = np.zeros(samples)
        found[self.indices] = scale
        return found


def greats(candidates: Any, targets: Any, k: int, *, lr: float) -> BatchChoice:
    """Take greedily the samples that lower the targets' loss most, less what is taken already does for them.

        value(i | S) = lr <g_i, t> - lr^2 sum over j in S of <g_i, g_j>,   t = mean of the targets' gradients

    the second-order expansion of one SGD step with the identity for the Hessian, as published; the term of a sample
    with itself is not in it. ``candidates`` [S, D] and ``targets`` [M, D]: gradients, or sketches of them, arrays or
    tensors. ``lr``: what a sample's gradient is multiplied by in the step, so the learning rate over k where the loss
    is a mean. Exactly ``k`` are taken, even where that harms. Of equal values the first is taken.

    Wang et al., 2024, "GREATS: Online Selection of High-Quality Data for LLM Training in Every Iteration", NeurIPS.

    Raises `ValueError` where shapes do not fit, ``k`` exceeds the candidates that are finite (one that is not is never
    taken), a target is not finite or ``lr`` is not positive.

    Cost: 2 S D (S + 1) FLOPs and M D additions; k S of greedy search.

    >>> greats([[1.0, 0.0], [1.0, 0.0], [0.0, 0.9]], [[1.0, 1.0]], 2, lr=0.5).indices.tolist()
    [0, 2]
    """
    started = time.perf_counter()
    rows, goal, usable = _gradients(candidates, targets, k, lr)
    first, gram = lr * (rows @ goal), lr * lr * (rows @ rows.T)

    indices, values = _greedy(first, gram, usable, k, lambda values, step: values)
    method = f"GREATS (greedy, pairwise term with identity Hessian, lr {lr:g})"
    return BatchChoice(indices, values, method, _flops(rows), time.perf_counter() - started)


def opus(
    candidates: Any,
    targets: Any,
    k: int,
    *,
    lr: float,
    temperature: float = 0.9,
    standardize: bool = True,
    seed: int = 0,
) -> BatchChoice:
    """Draw samples one by one with probability proportional to exp(utility / temperature), in the optimizer's space.

        utility(i | S) = lr <u_i, t> - lr^2 sum over j in S of <u_i, u_j>,   t = mean of the targets' gradients

    u_i is what the optimizer makes of a sample's gradient, t is plain: take ``candidates`` [S, D] from
    `pyeff.observe(model, sketch=, optimizer=adamw, variant="adamw-frozen")` and ``targets`` [M, D] from a pass without
    ``optimizer``. Utilities are of the order of lr times a gradient squared, so with ``standardize`` the temperature is
    in standard deviations of the first utilities (the publication does not say; without it they are taken as they
    are). Draws repeat from the ``seed``: give another one at each step.

    Wang et al., 2026, "OPUS", arXiv:2602.05400, AdamW's diagonal without momentum; the sketch is the caller's.

    Raises as `greats` does, and `ValueError` for a temperature that is not positive.

    Cost: as `greats`.

    >>> import numpy as np
    >>> candidates = np.eye(4)
    >>> opus(candidates, [[9.0, 0.0, 8.0, 0.0]], 2, lr=1.0, temperature=1e-6).indices.tolist()
    [0, 2]
    """
    started = time.perf_counter()
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    rows, goal, usable = _gradients(candidates, targets, k, lr)
    first, gram = lr * (rows @ goal), lr * lr * (rows @ rows.T)
    spread = float(first[usable].std()) if standardize and usable.any() else 1.0
    noise = generator(seed).gumbel(size=(k, len(rows)))

    def drawn(values: FloatArray, step: int) -> FloatArray:
        perturbed: FloatArray = values / (temperature * (spread or 1.0)) + noise[step]
        return perturbed

    indices, values = _greedy(first, gram, usable, k, drawn)
    unit = "standard deviations" if standardize else "units of utility"
    method = f"OPUS (Boltzmann, temperature {temperature:g} {unit}, lr {lr:g})"
    return BatchChoice(indices, values, method, _flops(rows), time.perf_counter() - started)


def colm(
    features: Any, sources: ArrayLike, k: int, *, keep_sources: Collection[Any] = (), coordinates: int | None = None
) -> BatchChoice:
    """Keep all samples of small sources, and of the others medoids of their gradients, by L1 distance.

    Sources share what the small ones, ``keep_sources``, leave of ``k`` in proportion to their samples in the batch;
    within a source facility location takes greedily what has least distance to everything:

        max over S of sum_i max over j in S of (c - |x_i - x_j|_1),   c = the largest distance in the source

    ``features`` [S, D]: the gradient of one layer for each sample, or its sketch, such as
    `seen.layer_sketches[name].flatten(1)` of `pyeff.observe(..., sketch=pyeff.FactoredSketch(...))`, exact up to the
    sketch. The publication takes `pyeff.scoring.zeroth_order_slopes` of the last value projection, which with one
    direction for the whole run is a point on a line. ``coordinates``: only so many of the largest mean magnitude in
    each source (2560 in the publication). ``values``: that sum, within the sample's source, once it was taken.

    Nguyen et al., 2025, "Mini-batch Coresets for Memory-efficient Language Model Training on Data Mixtures",
    arXiv:2407.19580; medoids are not weighted.

    Raises `ValueError` where shapes do not fit, the kept sources alone exceed ``k``, or ``k`` exceeds the samples that
    are finite.

    Cost: n^2 D operations for a source of n samples.

    >>> rows = [[0.0], [0.1], [5.0], [5.2], [9.0]]
    >>> colm(rows, ["a", "a", "a", "a", "b"], 3, keep_sources=["b"]).indices.tolist()
    [4, 1, 2]
    """
    from scipy.spatial.distance import cdist

    started = time.perf_counter()
    rows = _rows("features", features)
    labels = np.asarray(sources)
    if labels.shape != (len(rows),):
        raise ValueError(f"sources must be one for each of {len(rows)} samples, got {labels.shape}")
    if isinstance(keep_sources, str):  # whose letters are a collection too
        raise TypeError(f"keep_sources must be a list of sources, got the string {keep_sources!r}")
    if coordinates is not None and coordinates < 1:
        raise ValueError(f"coordinates must be at least 1, got {coordinates}")
    usable = np.asarray(np.isfinite(rows).all(axis=1))
    _check_count(k, usable)
    kept = np.flatnonzero(np.isin(labels, list(keep_sources)) & usable)
    if len(kept) > k:
        raise ValueError(f"k is {k}, but the sources to keep have {len(kept)} samples: raise k, or keep fewer sources")
    rest = usable.copy()
    rest[kept] = False
    reached = np.full(len(rows), np.nan)
    flops = 0

    def medoids(members: IntArray, quota: int) -> IntArray:
        nonlocal flops
        own = rows[members]
        if coordinates is not None and coordinates < own.shape[1]:
            largest = np.argsort(-np.abs(own).mean(axis=0), kind="stable")[:coordinates]
            own = own[:, np.sort(largest)]
        distances = cdist(own, own, "cityblock")
        flops += 2 * own.shape[1] * len(own) ** 2
        cover = facility_location(distances.max() - distances, quota)
        reached[members[cover.indices]] = cover.values
        return cover.indices

    taken = by_group(labels, k - len(kept), medoids, how="proportional", usable=rest)
    indices = np.concatenate([kept, taken])
    method = f"CoLM (L1 medoids, {len(set(labels[kept].tolist()))} sources kept whole, unweighted)"
    return BatchChoice(indices, reached[indices], method, flops, time.perf_counter() - started)


def _greedy(
    first: FloatArray,
    gram: FloatArray,
    usable: NDArray[np.bool_],
    k: int,
    rank: Callable[[FloatArray, int], FloatArray],
) -> tuple[IntArray, FloatArray]:
    """Take ``k`` one by one, each the largest by ``rank``; it lowers the others' values by its row of ``gram``."""
    values, free = first, np.flatnonzero(usable)
    taken, reached = np.empty(k, dtype=np.int64), np.empty(k)
    for step in range(k):
        # Among the free alone: a value that overflowed may be as low as any mark of what is taken.
        place = int(np.argmax(rank(values, step)[free]))
        chosen = free[place]
        taken[step], reached[step] = chosen, values[chosen]
        values, free = values - gram[chosen], np.delete(free, place)
    return taken, reached


def _gradients(candidates: Any, targets: Any, k: int, lr: float) -> tuple[FloatArray, FloatArray, NDArray[np.bool_]]:
    """Candidates with zeros where they are not finite, the mean of the targets, and which candidates are finite."""
    rows, goals = _rows("candidates", candidates), _rows("targets", targets)
    if len(goals) == 0 or goals.shape[1] != rows.shape[1]:
        raise ValueError(f"targets must be [targets, {rows.shape[1]}], at least one, got {goals.shape}")
    if not np.isfinite(goals).all():
        bad = int(np.flatnonzero(~np.isfinite(goals).all(axis=1))[0])
        raise ValueError(f"targets must be finite, but target {bad} is not")
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr must be positive and finite, got {lr}")
    usable = np.asarray(np.isfinite(rows).all(axis=1))
    _check_count(k, usable)
    return np.where(usable[:, None], rows, 0.0), goals.mean(axis=0), usable


def _check_count(k: int, usable: NDArray[np.bool_]) -> None:
    check_k(k)
    if k > usable.sum():
        raise ValueError(f"k is {k}, but only {int(usable.sum())} of {len(usable)} samples have a finite gradient")


def _rows(name: str, given: Any) -> FloatArray:
    if hasattr(given, "detach"):  # a tensor on a GPU, in bfloat16, or one that requires a gradient, is no array
        given = given.detach().cpu()
        given = given.double() if given.is_floating_point() else given
    if np.iscomplexobj(given):
        raise TypeError(f"{name} must be real numbers, got complex ones")
    rows = np.asarray(given, dtype=np.float64)
    if rows.ndim != 2:
        raise ValueError(f"{name} must be [samples, numbers], got shape {rows.shape}")
    return rows


def _flops(rows: FloatArray) -> int:
    return 2 * rows.size * (len(rows) + 1)
