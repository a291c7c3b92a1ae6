from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyeff.data import IGNORE_INDEX, EncodedSample, PackedBatch, label_positions, pack, pack_one


@st.composite
def encoded_samples(draw: st.DrawFn) -> list[EncodedSample]:
    sizes = draw(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 5)), min_size=1, max_size=12))
    token = st.integers(0, 30)
    return [
        EncodedSample(draw(st.lists(token, min_size=p + a, max_size=p + a)), p, i) for i, (p, a) in enumerate(sizes)
    ]


@given(samples=encoded_samples(), max_tokens=st.integers(11, 40), window=st.integers(1, 4), data=st.data())
def test_every_sample_is_packed_exactly_once_and_unchanged(
    samples: list[EncodedSample], max_tokens: int, window: int, data: st.DataObject
) -> None:
    indices = data.draw(st.permutations(range(len(samples))))
    batches = pack(samples, indices, max_tokens=max_tokens, window=window)
    shown = [index for batch in batches for index in batch.sample_indices]
    assert sorted(shown) == sorted(indices)
    if window == 1:
        assert shown == list(indices)
    for batch in batches:
        assert 0 < batch.tokens <= max_tokens
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.input_ids.dtype == batch.position_ids.dtype == batch.labels.dtype == torch.int64
        borders = batch.cu_seqlens.tolist()
        assert borders[0] == 0
        assert borders[-1] == batch.tokens
        for s, index in enumerate(batch.sample_indices):
            start, end = borders[s], borders[s + 1]
            sample = samples[index]
            assert batch.input_ids[0, start:end].tolist() == sample.ids
            assert batch.position_ids[0, start:end].tolist() == list(range(len(sample.ids)))
            labelled = [i for i in range(start, end) if batch.labels[0, i] != IGNORE_INDEX]
            assert labelled == list(range(start + max(sample.prompt_length, 1), end))
            assert batch.labels[0, labelled].tolist() == batch.input_ids[0, labelled].tolist()


@given(samples=encoded_samples())
def test_label_positions_predict_answers_and_never_cross_a_border(samples: list[EncodedSample]) -> None:
    batch = pack_one(samples)
    where = label_positions(batch)
    borders = batch.cu_seqlens.tolist()
    expected_positions, expected_targets, counts = [], [], [0]
    for s, sample in enumerate(samples):
        for i in range(max(sample.prompt_length, 1), len(sample.ids)):
            expected_positions.append(borders[s] + i - 1)
            expected_targets.append(sample.ids[i])
        counts.append(len(expected_positions))
    assert where.positions.tolist() == expected_positions
    assert where.targets.tolist() == expected_targets
    assert where.cu_seqlens.tolist() == counts
    assert where.positions.dtype == where.targets.dtype == torch.int64
    assert where.cu_seqlens.dtype == torch.int32


def test_a_foreign_batch_that_labels_a_first_token_does_not_predict_across_the_border() -> None:
    batch = PackedBatch(
        input_ids=torch.tensor([[5, 6, 7, 8]]),
        position_ids=torch.tensor([[0, 1, 0, 1]]),
        cu_seqlens=torch.tensor([0, 2, 4], dtype=torch.int32),
        labels=torch.tensor([[5, 6, 7, 8]]),
        sample_indices=[0, 1],
    )
    where = label_positions(batch)
    assert where.positions.tolist() == [0, 2]
    assert where.targets.tolist() == [6, 8]
    assert where.cu_seqlens.tolist() == [0, 1, 2]
    assert batch.labels.tolist() == [[5, 6, 7, 8]]


def test_a_wider_window_never_needs_more_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 30, (200,), generator=generator).tolist()
    samples = [EncodedSample([1] * n, 1, i) for i, n in enumerate(lengths)]
    plain = pack(samples, range(200), max_tokens=64)
    wide = pack(samples, range(200), max_tokens=64, window=16)
    assert len(wide) < len(plain)
    assert [b.sample_indices for b in wide] == [
        b.sample_indices for b in pack(samples, range(200), max_tokens=64, window=16)
    ]


def test_what_cannot_be_packed_is_refused_by_name() -> None:
    samples = [EncodedSample([1, 2, 3], 1, 0)]
    with pytest.raises(ValueError, match="max_tokens is 2, but sample 0 has 3 tokens"):
        pack(samples, [0], max_tokens=2)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        pack(samples, [0], max_tokens=8, window=0)
    with pytest.raises(ValueError, match="at least one sample, got none"):
        pack_one([])
    with pytest.raises(ValueError, match="sample 4 has no tokens"):
        pack_one([EncodedSample([], 0, 4)])
    with pytest.raises(IndexError):
        pack(samples, [1], max_tokens=8)
    assert pack(samples, [], max_tokens=8) == []
