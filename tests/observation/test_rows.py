"""Which rows belong to which sample."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyeff.observation.rows import Batch, UnknownRows
from pyeff.ops._packed import host_borders

CPU = torch.device("cpu")


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=5), per_token=st.integers(1, 3))
def test_sums_by_sample_are_those_of_a_loop(lengths: list[int], per_token: int) -> None:
    borders = torch.tensor([0, *lengths]).cumsum(0)
    tokens = int(borders[-1])
    rows = Batch(len(lengths), (1, tokens), borders).rows((1, tokens, per_token), CPU)
    values = torch.arange(tokens * per_token * 2, dtype=torch.float64).view(-1, 2)
    expected = [values[b * per_token : e * per_token].sum(0) for b, e in itertools.pairwise(borders)]
    assert torch.equal(rows.sum_by_sample(values), torch.stack(expected))
    assert torch.equal(rows.sample_of_row().bincount(minlength=len(lengths)), torch.tensor(lengths) * per_token)
    assert [s.stop - s.start for s in rows.spans()] == [n * per_token for n in lengths]


def test_samples_first_or_flattened_tokens() -> None:
    batch = Batch(3, (3, 5))
    assert batch.rows((3, 5, 2), CPU).each == 10
    assert batch.rows((15,), CPU).each == 5
    assert batch.rows((3,), CPU).each == 1
    for leading in [(5, 3), (1, 5), (14,), (5,), ()]:
        with pytest.raises(UnknownRows, match="expected 3 samples in dimension 0 or 15 rows of tokens"):
            batch.rows(leading, CPU)


def test_borders_on_another_device_are_not_read_back() -> None:
    """A tensor on `meta` holds no values, so that reading it back would fail."""
    meta = torch.device("meta")
    equal = Batch(2, (2, 4)).rows((2, 4), meta)
    assert host_borders(equal.borders, 8).tolist() == [0, 4, 8]
    packed = Batch(2, (1, 8), torch.tensor([0, 3, 8])).rows((1, 8), meta)
    assert host_borders(packed.borders, 8).tolist() == [0, 3, 8]
