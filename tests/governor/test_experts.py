from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyeff.governor import TransformerShape, expert_rows

COUNTS = st.lists(st.integers(0, 500), min_size=1, max_size=16)


@given(COUNTS, st.integers(1, 128))
def test_dropless_experts_keep_every_row_and_pad_each_by_less_than_a_tile(counts, tile):
    rows = expert_rows(counts, tile=tile)
    assert rows.kept == rows.routed == sum(counts)
    assert 0 <= rows.executed - rows.kept < tile * len(counts) or rows.executed == rows.kept
    assert rows.executed % tile == 0
    assert expert_rows(counts).executed == rows.routed


@given(COUNTS, st.integers(0, 600))
def test_a_capacity_fixes_what_is_executed_and_drops_the_rest(counts, capacity):
    rows = expert_rows(counts, capacity=capacity)
    assert rows.executed == capacity * len(counts)
    assert rows.kept == sum(min(count, capacity) for count in counts)
    assert rows.utilization <= 1


def test_padding_is_the_difference_between_executed_and_model_flops():
    balanced, skewed = expert_rows([64, 64], tile=64), expert_rows([127, 1], tile=64)
    size = {"hidden_size": 32, "expert_size": 48, "gated": True}
    assert balanced.padding_flops(**size) == 0
    assert skewed.padding_flops(**size) == 3 * (2 * 3 * 32 * 48) * 64
    assert skewed.padding_flops(**size, passes=1) * 3 == skewed.padding_flops(**size)


def test_a_mixture_is_priced_by_its_active_experts_and_its_router():
    common = {"layers": 2, "hidden_size": 32, "query_width": 32, "kv_width": 32, "gated_mlp": True, "vocab_size": 50}
    dense = TransformerShape(intermediate_size=2 * 48, **common)
    mixture = TransformerShape(intermediate_size=2 * 48, experts=8, **common)
    router = 2 * 2 * 32 * 8  # layers x 2 h E per token
    assert mixture.forward(10) - dense.forward(10) == 10 * router
    assert mixture.train(10) - dense.train(10) == 3 * 10 * router
    lora = {"trainable": "lora", "lora_rank": 4}
    # Frozen, the router owes no weight gradient, but passes one on to the adapters below it.
    assert mixture.train(10, **lora) - dense.train(10, **lora) == 2 * 10 * router


@pytest.mark.parametrize("options", [{"tile": 0}, {"tile": True}, {"capacity": -1}, {"capacity": 1.5}])
def test_arguments_out_of_range_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        expert_rows([1, 2], **options)
    with pytest.raises(ValueError, match="counts"):
        expert_rows([1, -2])
