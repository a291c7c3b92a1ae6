"""How similar samples are to target samples, by their features."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyeff.scoring.features import Features
from pyeff.scoring.scores import Scores, arrow, schema, shares
from pyeff.scoring.store import has_text_ids
from pyeff.selection import ScoreMatrix, per_sample


class TargetSimilarities:
    """Similarity of every sample to every target as a `pyeff.selection.ScoreMatrix`: formed from features when read.

        s_ij = <x_i - c, y_j - c>,   or that over |x_i - c| |y_j - c| with `cosine`

    c is 0, or with ``center`` the mean of the pool's features: hidden states share a large common direction, beside
    which every cosine is nearly one. A vector of norm zero is similar to nothing (0); a sample that is not finite gives
    NaN, and no rule takes it.

    Args:
        features: The pool's, [N, D].
        targets: Those of the targets, [M, D], of the same method and, if they are sketches, with the same sketch; its
            variant may differ, as in LESS, which compares updates with gradients.
        cosine: Divide by the norms.
        center: Subtract the pool's mean; one more reading of the pool.
        device: Where products are formed, float32 ("cuda" where there is one and many targets).

    Raises `ValueError` where widths or methods differ, or a target is not finite.

    Cost: reading the pool, and 2 N M D FLOPs, each time it is gone through; memory for one block.
    """

    def __init__(
        self,
        features: Features,
        targets: Features,
        *,
        cosine: bool = True,
        center: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        for key in ("method", "dim", "sketch"):
            own, other = (_comparable(each.header.get(key)) for each in (features, targets))
            if own != other:
                raise ValueError(f"features and targets must agree in their {key}, got {own!r} and {other!r}")
        models = [each.header.get("model") for each in (features, targets)]
        if all(models) and models[0] != models[1]:
            raise ValueError("features and targets must be of one model, but their headers name two")
        if len(targets) == 0:
            raise ValueError("targets must hold at least one row, got none")
        self._features, self._cosine, self._device = features, cosine, torch.device(device)
        goals = targets.rows(np.arange(len(targets)))
        if not np.isfinite(goals).all():
            bad = int(np.flatnonzero(~np.isfinite(goals).all(axis=1))[0])
            raise ValueError(f"targets must be finite, but {targets.ids[bad]!r} is not")
        self._mean: Tensor | None = None
        if center:
            self._mean = torch.from_numpy(_mean(features)).to(self._device, torch.float32)
        self._targets = self._ready(torch.from_numpy(goals).to(self._device))

    @property
    def shape(self) -> tuple[int, int]:
        """N samples and M targets."""
        return len(self._features), len(self._targets)

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Products of the features' blocks with the targets."""
        for first, rows in self._features.blocks():
            yield first, self._product(rows)

    def rows(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Products of these rows with the targets."""
        return self._product(self._features.rows(indices))

    def _ready(self, rows: Tensor) -> Tensor:
        if self._mean is not None:
            rows = rows - self._mean
        if not self._cosine:
            return rows
        # By the largest entry first: squares of small gradients leave the range of floats.
        rows = rows / rows.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return torch.nn.functional.normalize(rows, dim=1)

    def _product(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        # A row that is not finite is NaN throughout, and a product with NaN is NaN.
        product = self._ready(torch.from_numpy(rows).to(self._device)) @ self._targets.T
        found: NDArray[np.float32] = product.cpu().numpy()
        return found


def _comparable(value: Any) -> Any:
    """A header's entry without the variant of a sketch: LESS compares AdamW's updates with gradients."""
    return {k: v for k, v in value.items() if k != "variant"} if isinstance(value, dict) else value


def _mean(features: Features) -> NDArray[np.float64]:
    total, count = np.zeros(features.shape[1]), 0
    for _, rows in features.blocks():
        good = rows[np.isfinite(rows).all(axis=1)]
        total += good.sum(axis=0, dtype=np.float64)
        count += len(good)
    return total / max(1, count)


def target_scores(
    similarities: ScoreMatrix,
    pool: Features,
    targets: Features,
    *,
    method: str,
    reduction: str = "max",
    groups: Sequence[Any] | None = None,
) -> Scores:
    """One score a sample from its similarity to many targets, with everything it cost, in the order of the data set.

    ``reduction`` and ``groups`` are those of `pyeff.selection.per_sample`. FLOPs and seconds are those of the pool's
    and the targets' features, the latter parted among the samples, and of comparing them.
    """
    started = time.perf_counter()
    values = per_sample(similarities, reduction=reduction, groups=groups)
    flops, seconds = compared_costs(pool, targets)
    seconds = seconds + (time.perf_counter() - started) / max(1, len(pool))
    return score_table(pool, values, flops, seconds, method=method, checkpoint=str(pool.header.get("checkpoint", "")))


def compared_costs(pool: Features, targets: Features) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """FLOPs and seconds [N] of each sample's features, of its part of the targets', and FLOPs of comparing them."""
    columns = pool.columns
    more = np.array(shares(targets.flops, [1] * len(pool)), dtype=np.int64)
    flops = columns["flops"].to_numpy() + more + 2 * len(targets) * pool.shape[1]
    return flops, columns["seconds"].to_numpy() + targets.seconds / max(1, len(pool))


def score_table(
    pool: Features,
    values: NDArray[np.float64],
    flops: NDArray[np.int64],
    seconds: NDArray[np.float64],
    *,
    method: str,
    checkpoint: str,
) -> Scores:
    """A table of one value, and what it cost, for each row of ``pool``, in the order of the data set."""
    pa = arrow()
    columns, count = pool.columns, len(pool)
    table = pa.table(
        {
            "index": columns["index"],
            "id": columns["id"],
            "score": pa.array(values, pa.float64()),
            "flops": pa.array(flops, pa.int64()),
            "seconds": pa.array(seconds, pa.float64()),
            "method": pa.array([method] * count, pa.string()),
            "seed": pa.array([int(pool.header.get("seed", 0))] * count, pa.int64()),
            "checkpoint": pa.array([checkpoint] * count, pa.string()),
        },
        schema=schema(text_ids=has_text_ids(columns)),
    )
    return Scores(table.sort_by("index").combine_chunks())
