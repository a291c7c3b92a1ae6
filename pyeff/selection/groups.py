"""Rules that part a subset among groups of the pool: sources, clusters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pyeff.selection.matrix import IntArray, ScoreMatrix, as_matrix, finite_rows
from pyeff.selection.sampling import generator
from pyeff.selection.subset import top_k
from pyeff.selection.targets import check_k

# k-means learns its centres from so many points a centre, as faiss does; more change little and cost in proportion.
_POINTS_PER_CENTRE = 256

# From here, in units of what was learned from, all centres are equally far in doubles; and squares do not overflow.
_FARTHEST = 2.0**300


def quotas(counts: ArrayLike, k: int, *, how: str = "balanced") -> IntArray:
    """How many of ``k`` samples each group of so many members gives, int64 [groups]; they add up to ``k``.

    "balanced": from the smallest group up, each gives its equal part of what is left, floor(left / groups left), or
    all it has (S2L's rule; Yang et al., 2024, arXiv:2403.07384). "proportional": to the members, by largest remainders;
    of equal remainders the first group's.

    Raises `ValueError` where ``k`` exceeds the members, or a count is negative.

    >>> quotas([2, 100, 50], 30).tolist(), quotas([2, 100, 50], 30, how="proportional").tolist()
    ([2, 14, 14], [0, 20, 10])
    """
    check_k(k)
    sizes = np.asarray(counts, dtype=np.int64)
    if sizes.ndim != 1 or (sizes < 0).any():
        raise ValueError(f"counts must be [groups] and not negative, got {np.asarray(counts).tolist()}")
    total = int(sizes.sum())
    if k > total:
        raise ValueError(f"k is {k}, but there are {total} samples to choose from")
    given = np.zeros(len(sizes), dtype=np.int64)
    if how == "balanced":
        left = int(k)
        order = np.argsort(sizes, kind="stable")
        for groups_left, group in zip(range(len(sizes), 0, -1), order, strict=True):
            given[group] = min(int(sizes[group]), left // groups_left)
            left -= int(given[group])
        return given
    if how != "proportional":
        raise ValueError(f"how must be 'balanced' or 'proportional', got {how!r}")
    if total:
        # In whole numbers: parts of a float sum may add up to one too few.
        exact = [int(k) * int(size) for size in sizes]
        given[:] = [part // total for part in exact]
        remainders = np.array([-(part % total) for part in exact], dtype=object)
        given[np.argsort(remainders, kind="stable")[: int(k) - int(given.sum())]] += 1
    return given


def by_group(
    groups: ArrayLike,
    k: int,
    choose: Callable[[IntArray, int], IntArray],
    *,
    how: str | Mapping[Any, int] = "balanced",
    usable: ArrayLike | None = None,
) -> IntArray:
    """Let a rule choose within each group its quota of ``k`` samples; group by group, in the order of the labels.

    ``groups`` [N] are labels, such as sources or clusters. ``choose(members, quota)`` gets the numbers of a group's
    samples and returns positions among them: `lambda members, quota: top_k(values[members], quota)`. ``how`` is that of
    `quotas`, or says for each label how many (labels left out give none). ``usable`` [N] leaves samples out beforehand.

    Raises `ValueError` where a group has fewer samples than it should give, or a rule returns too few.

    >>> values = np.array([0.1, 0.9, 0.5, 0.7])
    >>> by_group(["a", "a", "a", "b"], 2, lambda members, quota: top_k(values[members], quota)).tolist()
    [1, 3]
    """
    labels, codes = np.unique(np.asarray(groups), return_inverse=True)
    if codes.ndim != 1:
        raise ValueError(f"groups must be [samples], got {codes.shape}")
    allowed = np.ones(len(codes), dtype=bool) if usable is None else np.asarray(usable, dtype=bool)
    if allowed.shape != codes.shape:
        raise ValueError(f"usable must be one for each of the {len(codes)} samples, got {allowed.shape}")
    members = [np.flatnonzero((codes == code) & allowed) for code in range(len(labels))]
    sizes = [len(each) for each in members]
    if isinstance(how, str):
        wanted = quotas(sizes, k, how=how).tolist()
    else:
        names = labels.tolist()
        unknown = [name for name in how if name not in names]
        if unknown:
            raise ValueError(f"how names {unknown[0]!r}, which is no group; there are {', '.join(map(str, names))}")
        wanted = [int(how.get(name, 0)) for name in names]
        if sum(wanted) != k:
            raise ValueError(f"k is {k}, but the quotas add up to {sum(wanted)}")
        for name, quota, size in zip(names, wanted, sizes, strict=True):
            if not 0 <= quota <= size:
                raise ValueError(f"the quota of {name!r} is {quota}, but it has {size} samples to choose from")
    taken = [np.zeros(0, dtype=np.int64)]
    for name, group, quota in zip(labels.tolist(), members, wanted, strict=True):
        chosen = group[choose(group, quota)] if quota else group[:0]
        if len(chosen) != quota:
            raise ValueError(f"the rule chose {len(chosen)} samples of {name!r} where {quota} were asked for")
        taken.append(chosen)
    return np.concatenate(taken)


def kmeans(features: ArrayLike | ScoreMatrix, clusters: int, *, iterations: int = 20, seed: int = 0) -> IntArray:
    """Number of each sample's cluster, int64 [N]; -1 for one that is not finite.

    Lloyd's iterations (`scipy.cluster.vq.kmeans2`) from distinct samples drawn by the seed, on at most 256 samples a
    cluster; then every sample goes to the nearest centre, block by block. A cluster may be empty. These are the choices
    of faiss, with which S2L clusters trajectories of losses (100 clusters, 20 iterations).

    ``features`` [N, D]: an array or a `ScoreMatrix`.

    Raises `ValueError` where there are fewer finite samples than clusters.

    Cost: 2 D clusters operations a sample for the last step, and iterations times that for those learned from.

    >>> labels = kmeans([[0.0], [0.1], [5.0], [5.1]], 2)
    >>> bool(labels[0] == labels[1] != labels[2] == labels[3])
    True
    """
    from scipy.cluster.vq import kmeans2, vq

    matrix = as_matrix(features, name="features")
    for name, value in (("clusters", clusters), ("iterations", iterations)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    finite = np.flatnonzero(finite_rows(matrix))
    if len(finite) < clusters:
        raise ValueError(f"clusters is {clusters}, but only {len(finite)} samples are finite")
    draw = generator(seed)
    drawn = draw.permutation(finite)[: clusters * _POINTS_PER_CENTRE]
    points = matrix.rows(np.sort(drawn)).astype(np.float64)
    # SciPy reads memory that is not its own where a squared distance overflows. Powers of two change no other result.
    scale = -int(np.frexp(np.abs(points).max())[1])
    points = np.ldexp(points, scale)
    start = np.ldexp(matrix.rows(drawn[:clusters]).astype(np.float64), scale)
    with warnings.catch_warnings():
        # An empty cluster keeps its centre.
        warnings.simplefilter("ignore", UserWarning)
        centres, _ = kmeans2(points, start, iter=iterations, minit="matrix")
    labels = np.full(matrix.shape[0], -1, dtype=np.int64)
    for first, block in matrix.blocks():
        good = np.isfinite(block).all(axis=1)
        if good.any():
            with np.errstate(over="ignore"):
                near = np.clip(np.ldexp(block[good].astype(np.float64), scale), -_FARTHEST, _FARTHEST)
            nearest, _ = vq(near, centres)
            labels[first : first + len(block)][good] = nearest
    return labels


def kmeans_flops(samples: int, dim: int, clusters: int, *, iterations: int = 20) -> int:
    """FLOPs of the distances that `kmeans` forms, 2 D for a pair of sample and centre.

    >>> kmeans_flops(1000, 8, 2)
    359680
    """
    learned_from = min(samples, clusters * _POINTS_PER_CENTRE)
    return 2 * dim * clusters * (samples + iterations * learned_from)


def kmeans_balanced(
    features: ArrayLike | ScoreMatrix,
    k: int,
    *,
    clusters: int = 100,
    iterations: int = 20,
    values: ArrayLike | None = None,
    seed: int = 0,
) -> IntArray:
    """Part ``k`` samples evenly among clusters: small clusters whole, of large ones a draw; in ascending order.

    With losses of a small model at several checkpoints as ``features`` [N, checkpoints] this is S2L (Yang et al., 2024,
    arXiv:2403.07384; where the pool has sources, `by_group` parts ``k`` among them first). Within a cluster the draw is
    uniform, or with ``values`` [N] the largest are taken.

    Raises `ValueError` as `kmeans` does, and where ``k`` exceeds the samples that are finite.

    >>> kmeans_balanced([[0.0], [0.1], [0.2], [9.0]], 2, clusters=2).tolist()[1]
    3
    """
    labels = kmeans(features, clusters, iterations=iterations, seed=seed)
    return balanced(labels, k, values=values, seed=seed)


def balanced(labels: ArrayLike, k: int, *, values: ArrayLike | None = None, seed: int = 0) -> IntArray:
    """Part ``k`` samples evenly among groups by label, -1 left out; in ascending order.

    Within a group a uniform draw, or with ``values`` [N] its largest; NaN is never taken.
    """
    codes = np.asarray(labels)
    order = generator(seed).random(codes.size) if values is None else np.asarray(values, dtype=np.float64)
    if order.shape != codes.shape:
        raise ValueError(f"values must be one for each of the {codes.size} samples, got {order.shape}")
    usable = (codes != -1) & ~np.isnan(order)
    return np.sort(by_group(codes, k, lambda members, quota: top_k(order[members], quota), usable=usable))
