"""Score a pool of packed samples in one forward pass: loss, EL2N, entropy, head gradient norm, embeddings.

For an answer token t with last hidden state h_t, logits z_t = W h_t and target y_t, the per-token scores
are those of `pyeff.linear_cross_entropy_scores`; a sample's score is the mean over its answer tokens. Its
embedding is the weighted mean of the hidden states that predict its answer,

    e = sum_t w_t h_t / sum_t w_t,      w_t = 1, 2, 3, ... along the answer,

the weights of RDS+ (Ivison et al., 2025, arXiv:2503.01807): under causal attention later states have seen
more of the sample. The pass costs one forward of the transformer over every token, and of the vocabulary
head over answer tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyeff.data import label_positions

if TYPE_CHECKING:
    from pyeff.data import LabelPositions, PackedBatch
    from pyeff.ops import TokenScores

FIELDS = ("nll", "el2n", "entropy", "head_grad_norm")
"""Scores of a sample: means of these `TokenScores` fields over its answer tokens."""


@dataclass(frozen=True)
class PoolScores:
    """Scores of N samples, by sample index.

    ``fields`` maps each of `FIELDS` to float64 [N]; ``embeddings`` is float32 [N, D]. A sample that was in
    no batch, or that has no answer token, is NaN.
    """

    fields: dict[str, NDArray[np.float64]]
    embeddings: NDArray[np.float32]


def answer_embeddings(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Position-weighted mean of each sample's rows: ``hidden`` [A, D], ``cu_seqlens`` [S+1] to float32 [S, D].

    A sample without rows is NaN.

    >>> answer_embeddings(torch.tensor([[3.0], [6.0], [1.0]]), torch.tensor([0, 2, 3])).tolist()
    [[5.0], [1.0]]
    """
    borders = cu_seqlens.to(torch.int64)
    counts = borders.diff()
    sample = torch.repeat_interleave(torch.arange(counts.numel(), device=hidden.device), counts)
    weight = (torch.arange(hidden.shape[0], device=hidden.device) - borders[sample] + 1).to(torch.float32)
    total = torch.zeros(counts.numel(), device=hidden.device).index_add_(0, sample, weight)
    pooled = torch.zeros(counts.numel(), hidden.shape[1], device=hidden.device)
    pooled.index_add_(0, sample, hidden.to(torch.float32) * weight[:, None])
    return pooled / total[:, None]


@torch.no_grad()
def answer_scores(
    rows: Tensor,
    weight: Tensor,
    where: LabelPositions,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    reduction: str = "mean",
) -> TokenScores:
    """Scores [S] of samples from the hidden states [A, D] that predict their answers, reduced over answer tokens."""
    from pyeff.ops import linear_cross_entropy_scores

    scores = linear_cross_entropy_scores(rows, weight, where.targets, bias=bias, softcap=softcap)
    return scores.per_sample(where.cu_seqlens, reduction=reduction)


@torch.no_grad()
def score_batches(
    batches: Iterable[PackedBatch],
    hidden_states: Callable[[PackedBatch], Tensor],
    weight: Tensor,
    *,
    samples: int,
    bias: Tensor | None = None,
    softcap: float | None = None,
    after_batch: Callable[[PackedBatch, int], None] | None = None,
) -> PoolScores:
    """Score the samples of ``batches``; ``hidden_states(batch)`` returns the last hidden states [T, D].

    ``weight`` [V, D], ``bias`` [V] and ``softcap`` are the model's head. ``samples`` is N, one more than the
    largest sample index. ``after_batch(batch, answer_tokens)`` is called when a batch is done, to charge it.
    Memory beyond one batch: (D + 8) * 4 bytes a sample.

    Raises `ValueError` when a batch names a sample index outside [0, N).
    """
    fields = {name: np.full(samples, np.nan) for name in FIELDS}
    embeddings = np.full((samples, weight.shape[1]), np.nan, dtype=np.float32)
    for batch in batches:
        index = np.asarray(batch.sample_indices, dtype=np.int64)
        if index.size and (index.min() < 0 or index.max() >= samples):
            raise ValueError(f"samples is {samples}, but a batch holds sample {int(index.max())}")
        where = label_positions(batch)
        rows = hidden_states(batch)[where.positions]
        means = answer_scores(rows, weight, where, bias=bias, softcap=softcap)
        for name in FIELDS:
            fields[name][index] = getattr(means, name).cpu().numpy()
        embeddings[index] = answer_embeddings(rows, where.cu_seqlens).cpu().numpy()
        if after_batch is not None:
            after_batch(batch, int(where.targets.numel()))
    return PoolScores(fields=fields, embeddings=embeddings)


def cosine_similarity(
    pool: NDArray[np.float32], target: NDArray[np.float32], *, center: bool = True
) -> NDArray[np.float64]:
    """Cosine of every pool embedding [N, D] with every target embedding [M, D]: float64 [N, M].

    ``center`` subtracts the mean of the pool first: hidden states share a large common direction, beside
    which every cosine is nearly one. A vector of norm zero is similar to nothing (0); NaN rows stay NaN.

    >>> cosine_similarity(np.float32([[2, 0], [0, 1]]), np.float32([[1, 0]]), center=False).tolist()
    [[1.0], [0.0]]
    """
    if pool.ndim != 2 or target.ndim != 2 or pool.shape[1] != target.shape[1]:
        raise ValueError(f"pool and target must be [N, D] and [M, D], got {pool.shape} and {target.shape}")
    a, b = pool.astype(np.float64), target.astype(np.float64)
    usable = ~np.isnan(a).any(axis=1)
    if center and usable.any():
        mean = a[usable].mean(axis=0)
        a, b = a - mean, b - mean

    def unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
        norm = np.linalg.norm(x, axis=1, keepdims=True)
        return np.divide(x, norm, out=np.zeros_like(x) * x, where=norm > 0)

    return unit(a) @ unit(b).T
