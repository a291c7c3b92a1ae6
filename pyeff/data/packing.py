"""Samples packed end to end on one token axis, and where in it the answers are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from pyeff.data.samples import EncodedSample, EncodedSamples

IGNORE_INDEX = -100


@dataclass(frozen=True)
class PackedBatch:
    """Samples laid end to end.

    `input_ids` and `position_ids` are int64 [1, T]; positions restart at 0 with each sample, which is how
    transformers knows the samples apart (only when no key-value cache is made: pass `use_cache=False`).
    `cu_seqlens` is int32 [S + 1], the borders. `labels` is int64 [1, T], aligned with `input_ids` (not
    shifted): the token itself where it belongs to an answer, -100 elsewhere. `sample_indices[s]` is the index
    of the s-th sample.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    labels: torch.Tensor
    sample_indices: list[int]

    @property
    def tokens(self) -> int:
        """Tokens in the batch, T."""
        return int(self.input_ids.shape[1])

    @property
    def samples(self) -> int:
        """Samples in the batch, S."""
        return len(self.sample_indices)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on a device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
            labels=self.labels.to(device),
        )


@dataclass(frozen=True)
class LabelPositions:
    """Where a packed batch is scored.

    `positions` int64 [A]: token positions whose next token is an answer token of the same sample, ascending.
    `targets` int64 [A]: those next tokens. `cu_seqlens` int32 [S + 1]: the positions of sample s are
    `positions[cu_seqlens[s]:cu_seqlens[s + 1]]`; the first of them is the end of its prompt.
    """

    positions: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor


def pack_one(samples: Sequence[EncodedSample]) -> PackedBatch:
    """Lay the given samples end to end in one batch, in the given order.

    Raises:
        ValueError: there is no sample, or one has no token.
    """
    if not samples:
        raise ValueError("samples must hold at least one sample, got none")
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    borders = [0]
    for sample in samples:
        length = len(sample.ids)
        if length == 0:
            raise ValueError(f"sample {sample.sample_index} has no tokens")
        # The first token of a sample is never predicted, whatever the prompt's length: nothing of its own
        # sample stands before it.
        start = max(sample.prompt_length, 1)
        ids += sample.ids
        labels += [IGNORE_INDEX] * start + sample.ids[start:]
        positions += range(length)
        borders.append(len(ids))
    return PackedBatch(
        input_ids=torch.tensor([ids], dtype=torch.int64),
        position_ids=torch.tensor([positions], dtype=torch.int64),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        labels=torch.tensor([labels], dtype=torch.int64),
        sample_indices=[sample.sample_index for sample in samples],
    )


def pack(
    encoded: EncodedSamples | Sequence[EncodedSample],
    indices: Sequence[int],
    *,
    max_tokens: int,
    window: int = 1,
) -> list[PackedBatch]:
    """Pack samples into batches of at most `max_tokens` tokens, each sample exactly once.

    First fit over the `window` batches opened last. With `window=1` the order of `indices` is kept exactly;
    a larger window fills batches better and may move a sample back by up to that many batches.

    Raises:
        ValueError: a sample is longer than `max_tokens`, or `window` < 1.
        IndexError: an index outside `encoded`.

    Example:
        >>> from pyeff.data import EncodedSample, pack
        >>> samples = [EncodedSample([7] * n, 1, i) for i, n in enumerate([3, 4, 2])]
        >>> [batch.sample_indices for batch in pack(samples, [0, 1, 2], max_tokens=5)]
        [[0], [1], [2]]
        >>> [batch.sample_indices for batch in pack(samples, [0, 1, 2], max_tokens=5, window=2)]
        [[0, 2], [1]]
    """
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    bins: list[list[EncodedSample]] = []
    used: list[int] = []
    for index in indices:
        sample: EncodedSample = encoded[index]
        length = len(sample.ids)
        if length > max_tokens:
            raise ValueError(
                f"max_tokens is {max_tokens}, but sample {sample.sample_index} has {length} tokens: "
                "a sample is never split"
            )
        for i in range(max(0, len(bins) - window), len(bins)):
            if used[i] + length <= max_tokens:
                bins[i].append(sample)
                used[i] += length
                break
        else:
            bins.append([sample])
            used.append(length)
    return [pack_one(samples) for samples in bins]


def label_positions(batch: PackedBatch) -> LabelPositions:
    """Find the positions that predict an answer token of their own sample, and what they should predict.

    Never reaches across a border: the last token of a sample predicts nothing. Feed `positions` to
    `logits_to_keep` of a transformers model, or take the hidden states there.

    Example:
        >>> from pyeff.data import EncodedSample, label_positions, pack
        >>> samples = [EncodedSample([5, 6, 7], 2, 0), EncodedSample([8, 9, 3], 1, 1)]
        >>> where = label_positions(pack(samples, [0, 1], max_tokens=6)[0])
        >>> where.positions.tolist(), where.targets.tolist(), where.cu_seqlens.tolist()
        ([1, 3, 4], [7, 9, 3], [0, 1, 3])
    """
    labels = batch.labels[0]
    predicted = labels != IGNORE_INDEX
    # A sample's first token has no predecessor in it. pack_one never labels it; a batch from elsewhere may.
    predicted[batch.cu_seqlens[:-1].long()] = False
    at = predicted.nonzero().squeeze(1)
    counts = torch.zeros(batch.tokens + 1, dtype=torch.int64, device=labels.device)
    counts[1:] = predicted.cumsum(0)
    return LabelPositions(
        positions=at - 1,
        targets=labels[at],
        cu_seqlens=counts[batch.cu_seqlens.long()].to(torch.int32),
    )
