from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyeff.data import DataOrder

SEEDS = st.integers(0, 2**64 - 1)
SETS = st.sets(st.integers(0, 60), min_size=1, max_size=25)


def draws(order: DataOrder, count: int) -> list[int]:
    return [order.next_index() for _ in range(count)]


@given(indices=SETS, seed=SEEDS)
def test_every_epoch_shows_every_sample_once(indices: set[int], seed: int) -> None:
    order = DataOrder(sorted(indices), seed)
    for epoch in range(3):
        assert set(draws(order, len(indices))) == indices
        assert order.epoch == epoch


@given(indices=SETS, seed=SEEDS, steps=st.integers(0, 70))
def test_a_restored_order_goes_on_exactly_where_it_was(indices: set[int], seed: int, steps: int) -> None:
    order = DataOrder(sorted(indices), seed)
    draws(order, steps)
    state = json.loads(json.dumps(order.state_dict()))
    restored = DataOrder(1, 0)
    restored.load_state_dict(state)
    assert restored.state_dict() == order.state_dict()
    assert draws(restored, 60) == draws(order, 60)


@given(indices=SETS, seed=SEEDS)
def test_the_order_of_a_subset_is_the_whole_order_restricted_to_it(indices: set[int], seed: int) -> None:
    whole = draws(DataOrder(61, seed), 61)
    assert draws(DataOrder(sorted(indices), seed), len(indices)) == [i for i in whole if i in indices]


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=15),
    seed=SEEDS,
    max_tokens=st.integers(20, 80),
)
def test_batches_fit_hold_no_sample_twice_and_follow_the_order(lengths: list[int], seed: int, max_tokens: int) -> None:
    order = DataOrder(len(lengths), seed, lengths=lengths)
    shown: list[int] = []
    for _ in range(10):
        batch = order.next_batch(max_tokens)
        assert batch
        assert len(set(batch)) == len(batch)
        assert sum(lengths[i] for i in batch) <= max_tokens
        shown += batch
    assert shown == draws(DataOrder(len(lengths), seed), len(shown))


def test_another_seed_and_another_epoch_are_another_order() -> None:
    order = DataOrder(50, 1)
    first, second = draws(order, 50), draws(order, 50)
    assert first != second
    assert first != draws(DataOrder(50, 2), 50)


def philox_4x64_10(counter: list[int], key: list[int]) -> list[int]:
    """One block of Philox4x64-10 as printed by Salmon et al. (SC 2011): four words from a counter and a key."""
    words, keys = list(counter), list(key)
    for _ in range(10):
        first = words[0] * 0xD2E7470EE14C6C93
        second = words[2] * 0xCA5A826395121157
        mask = 2**64 - 1
        words = [
            (second >> 64) ^ words[1] ^ keys[0],
            second & mask,
            (first >> 64) ^ words[3] ^ keys[1],
            first & mask,
        ]
        keys = [(keys[0] + 0x9E3779B97F4A7C15) & mask, (keys[1] + 0xBB67AE8584CAA73B) & mask]
    return words


@given(seed=SEEDS)
def test_the_order_is_that_of_the_published_generator(seed: int) -> None:
    """Checkpoints outlive NumPy versions, so an order may depend on nothing a release may change."""
    order = DataOrder(8, seed)
    for epoch in range(2):
        # NumPy counts up before the first block.
        words = [w for block in (1, 2) for w in philox_4x64_10([block, 0, 0, epoch], [seed, 0])]
        assert draws(order, 8) == sorted(range(8), key=words.__getitem__)


def test_a_new_set_begins_a_new_epoch_at_once() -> None:
    order = DataOrder(10, 3)
    draws(order, 4)
    order.set_indices([7, 2, 5])
    assert order.indices == [2, 5, 7]
    assert (order.epoch, order.position) == (1, 0)
    assert set(draws(order, 3)) == {2, 5, 7}


def test_impossible_sets_and_states_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample, got none"):
        DataOrder(0, 0)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        DataOrder([3, -1], 0)
    with pytest.raises(ValueError, match="must not repeat"):
        DataOrder([3, 3], 0)
    with pytest.raises(ValueError, match="seed must be a whole number"):
        DataOrder(3, -1)
    with pytest.raises(ValueError, match="indices go up to 3, but there are 3 lengths"):
        DataOrder([3], 0, lengths=[1, 1, 1])
    with pytest.raises(ValueError, match="next_batch needs the lengths"):
        DataOrder(3, 0).next_batch(8)
    with pytest.raises(ValueError, match=r"max_tokens is 4, but sample 0 has 5 tokens"):
        DataOrder(1, 0, lengths=[5]).next_batch(4)
    order = DataOrder(3, 0)
    before = order.state_dict()
    with pytest.raises(ValueError, match="state lacks epoch"):
        order.load_state_dict({"seed": 0, "position": 0, "indices": [0]})
    with pytest.raises(ValueError, match="position 9 for a set of 1"):
        order.load_state_dict({"seed": 0, "epoch": 0, "position": 9, "indices": [0]})
    assert order.state_dict() == before
