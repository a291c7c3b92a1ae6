from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pyeff.selection import SELECTORS, hardest, round_robin, select, top_k

values = arrays(np.float64, st.integers(1, 30), elements=st.floats(-5, 5) | st.just(math.nan))
matrices = arrays(np.float64, st.tuples(st.integers(1, 20), st.integers(1, 5)), elements=st.floats(-1, 1, width=16))


@given(values, st.integers(0, 40))
def test_top_k_takes_no_sample_smaller_than_one_it_leaves(array: np.ndarray, k: int):
    taken = top_k(array, k)
    rest = np.setdiff1d(np.flatnonzero(~np.isnan(array)), taken)
    assert len(set(taken.tolist())) == len(taken) == min(k, np.count_nonzero(~np.isnan(array)))
    assert not np.isnan(array[taken]).any()
    if len(taken) and len(rest):
        assert array[taken].min() >= array[rest].max()


@given(values, st.integers(0, 40), st.randoms(use_true_random=False))
def test_top_k_of_permuted_samples_has_the_same_values(array: np.ndarray, k: int, random):
    order = list(range(len(array)))
    random.shuffle(order)
    assert sorted(array[order][top_k(array[order], k)]) == sorted(array[top_k(array, k)])


@given(matrices, st.integers(0, 25))
def test_round_robin_for_fewer_is_a_prefix_of_that_for_more(similarity: np.ndarray, k: int):
    everything = round_robin(similarity, len(similarity))
    assert sorted(everything) == list(range(len(similarity)))
    assert round_robin(similarity, k).tolist() == everything[:k].tolist()


@given(matrices)
def test_round_robin_gives_each_column_in_turn_its_best_free_row(similarity: np.ndarray):
    free = set(range(len(similarity)))
    for turn, row in enumerate(round_robin(similarity, len(similarity)).tolist()):
        column = turn % similarity.shape[1]
        assert similarity[row, column] == max(similarity[i, column] for i in free)
        free.remove(row)


def test_round_robin_serves_a_small_family_that_a_mean_would_forget():
    near_first, near_second = [1.0, 0.0], [0.0, 0.5]
    chosen = round_robin([near_first] * 10 + [near_second] * 10, 6)
    assert sum(row >= 10 for row in chosen) == 3


@given(values, st.floats(0, 0.99))
def test_hardest_takes_the_asked_fraction_from_the_top(array: np.ndarray, fraction: float):
    taken = hardest(array, fraction)
    assert len(taken) == math.floor(fraction * np.count_nonzero(~np.isnan(array)))
    assert set(taken.tolist()) == set(top_k(array, len(taken)).tolist())


@pytest.mark.parametrize("score", SELECTORS)
def test_every_selector_keeps_the_share_asked_for_and_none_of_the_hardest(score: str):
    rng = np.random.default_rng(0)
    fields = {name: rng.random(40) for name in ("nll", "el2n", "entropy", "head_grad_norm")}
    similarity = rng.random((40, 3))
    chosen = select(fields, score=score, keep=0.25, drop_hardest=0.1, similarity=similarity, seed=1)
    assert len(chosen.indices) == 10
    assert sorted(set(chosen.indices.tolist())) == chosen.indices.tolist()
    if score == "target_similarity":
        nearest = similarity.argmax(axis=1)
        for group in range(3):
            members = np.flatnonzero(nearest == group)
            dropped = np.intersect1d(chosen.dropped, members)
            rest = np.setdiff1d(members, dropped)
            assert len(dropped) == len(members) // 10
            assert not len(dropped) or fields["nll"][dropped].min() >= fields["nll"][rest].max()
    else:
        assert set(chosen.dropped.tolist()) == set(np.argsort(fields["nll"])[-4:].tolist())
    assert not set(chosen.indices.tolist()) & set(chosen.dropped.tolist())


def test_a_sample_without_a_score_is_never_chosen():
    chosen = select({"nll": [math.nan, 1.0, math.nan, 2.0]}, score="nll", keep=1.0)
    assert chosen.indices.tolist() == [1, 3]


def test_a_small_pool_keeps_at_least_one_sample():
    assert select({"nll": [3.0]}, score="nll", keep=0.01, drop_hardest=0.9).indices.tolist() == [0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"score": "luck"}, "score must be one of"),
        ({"score": "nll", "keep": 0.0}, "keep"),
        ({"score": "target_similarity"}, "similarity"),
        ({"score": "el2n"}, "was not computed"),
        ({"score": "random", "drop_hardest": 0.5, "scores": {"el2n": [1.0, 2.0]}}, "'nll'"),
        ({"score": "nll", "scores": {"nll": []}}, "non-empty pool"),
        ({"score": "nll", "scores": {"nll": [math.nan]}}, "no sample"),
        ({"score": "nll", "scores": {"nll": [1.0], "el2n": [1.0, 2.0]}}, "one value for every sample"),
    ],
)
def test_a_bad_argument_is_named(options: dict, words: str):
    options = {"scores": {"nll": [1.0, 2.0]}, "keep": 0.5, **options}
    with pytest.raises(ValueError, match=words):
        select(options.pop("scores"), **options)
