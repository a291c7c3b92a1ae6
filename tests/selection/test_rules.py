"""Coverage, groups and draws: definitions, totals, bounds, and the same choice from the same seed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pyeff.selection import (
    Similarities,
    balanced,
    boltzmann,
    by_group,
    facility_location,
    kmeans,
    kmeans_balanced,
    quotas,
    top_k,
    uniform,
)

similarities = arrays(
    np.float64, st.tuples(st.integers(1, 16), st.integers(1, 6)), elements=st.integers(-2, 4).map(float)
)


def covered(scores: np.ndarray, rows: list[int]) -> float:
    return float(np.maximum(scores[rows], 0).max(axis=0, initial=0.0).sum())


def plain_greedy(scores: np.ndarray, k: int) -> list[int]:
    taken: list[int] = []
    free = np.flatnonzero(np.isfinite(scores).all(axis=1)).tolist()
    while free and len(taken) < k:
        gains = [covered(scores, [*taken, row]) - covered(scores, taken) for row in free]
        taken.append(free.pop(int(np.argmax(gains))))
    return taken


@given(similarities, st.integers(0, 20), st.booleans())
def test_lazy_facility_location_takes_what_a_plain_greedy_search_takes(scores, k, spoiled):
    if spoiled:
        scores = scores.copy()
        scores[0, 0] = np.nan
    found = facility_location(scores, k)
    assert found.indices.tolist() == plain_greedy(scores, k)
    assert found.values.tolist() == [
        covered(scores, found.indices[: i + 1].tolist()) for i in range(len(found.indices))
    ]


@given(similarities, st.integers(1, 20), st.integers(0, 9))
def test_stochastic_facility_location_repeats_itself_and_takes_no_row_twice(scores, k, seed):
    once, again = (facility_location(scores, k, method="stochastic", seed=seed) for _ in range(2))
    assert once.indices.tolist() == again.indices.tolist()
    assert len(set(once.indices.tolist())) == len(once.indices) == min(k, len(scores))


def test_facility_location_forms_a_fraction_of_the_gains_and_comes_near_the_greedy_value():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 8))
    scores = Similarities(x, x[::2])
    lazy = facility_location(scores, 40)
    stochastic = facility_location(scores, 40, method="stochastic", epsilon=0.05, seed=1)
    assert lazy.evaluated < 400 * 40 / 4
    assert stochastic.evaluated <= 40 * math.ceil(10 * math.log(20))
    # The guarantee, from below the best: the greedy value is at most the best one.
    assert stochastic.values[-1] >= (1 - 1 / math.e - 0.05) * lazy.values[-1]
    drawn = np.concatenate([block for _, block in scores.blocks()])
    assert lazy.values[-1] > max(covered(drawn, uniform(400, 40, seed=s).tolist()) for s in range(5))


def test_coverage_takes_one_of_each_cluster_first():
    rng = np.random.default_rng(2)
    centres = np.eye(6) * 10
    x = np.repeat(centres, 10, axis=0) + rng.normal(size=(60, 6))
    assert sorted(facility_location(Similarities(x, x), 6).indices // 10) == list(range(6))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.data(), st.sampled_from(["balanced", "proportional"]))
def test_quotas_add_up_and_no_group_gives_more_than_it_has(counts, data, how):
    k = data.draw(st.integers(0, sum(counts)))
    given_ = quotas(counts, k, how=how)
    assert given_.sum() == k
    assert ((given_ >= 0) & (given_ <= counts)).all()
    if how == "balanced":
        # Who gives less than another gives all it has, up to the one that cannot be parted.
        for own, size in zip(given_, counts, strict=True):
            assert own == size or own >= given_.max() - 1
    else:
        exact = np.array(counts) * k / max(1, sum(counts))
        assert (np.abs(given_ - exact) < 1 + 1e-9).all()


def test_groups_give_their_quotas_of_their_best():
    values = np.array([0.1, 0.9, 0.5, 0.7, np.nan, 0.2])
    groups = ["a", "a", "a", "b", "b", "b"]

    def best(members, quota):
        return top_k(values[members], quota)

    usable = ~np.isnan(values)
    assert by_group(groups, 4, best, usable=usable).tolist() == [1, 2, 3, 5]
    assert by_group(groups, 3, best, how={"a": 1, "b": 2}, usable=usable).tolist() == [1, 3, 5]
    for how, words in (({"a": 1}, "add up to 1"), ({"c": 3}, "no group"), ({"b": 3}, "has 2 samples to choose from")):
        with pytest.raises(ValueError, match=words):
            by_group(groups, 3, best, how=how, usable=usable)
    with pytest.raises(ValueError, match="chose 2 samples of 'b' where 3"):
        by_group(groups, 6, best)
    with pytest.raises(ValueError, match="k is 7, but there are 6"):
        by_group(groups, 7, best)


def test_kmeans_finds_clusters_far_apart_and_leaves_out_what_is_undefined():
    rng = np.random.default_rng(3)
    truth = np.repeat(np.arange(4), [5, 50, 10, 100])
    x = np.eye(4)[truth] * 50 + rng.normal(size=(165, 4))
    x[3] = np.nan
    # Lloyd's iterations may end badly from one start, with two centres in one cluster; not from all of fifty.
    starts = [kmeans(x, 4, seed=seed) for seed in range(50)]
    assert all(labels[3] == -1 for labels in starts)
    found = [labels for labels in starts if len(set(zip(labels.tolist(), truth.tolist(), strict=True))) == 5]
    assert found
    # Of 30, four are all of the smallest; 26 // 3, 18 // 2 and the rest follow.
    assert np.bincount(truth[balanced(found[0], 30, seed=0)]).tolist() == [4, 9, 8, 9]


@pytest.mark.parametrize("scale", [-600, 600])
def test_kmeans_of_numbers_whose_squares_leave_the_range_of_doubles_is_that_of_others(scale):
    rows = np.random.default_rng(0).normal(size=(40, 3))
    assert kmeans(np.ldexp(rows, scale), 4).tolist() == kmeans(rows, 4).tolist()


def test_kmeans_balanced_repeats_itself_and_takes_the_best_of_each_cluster():
    x = np.random.default_rng(4).normal(size=(300, 3))
    values = np.arange(300.0)
    once, again = (kmeans_balanced(x, 40, clusters=7, seed=5) for _ in range(2))
    assert once.tolist() == again.tolist()
    assert len(set(once.tolist())) == 40
    labels = kmeans(x, 7, seed=5)
    for label in set(labels.tolist()):
        chosen = [i for i in kmeans_balanced(x, 40, clusters=7, values=values, seed=5) if labels[i] == label]
        assert chosen == np.flatnonzero(labels == label)[-len(chosen) :].tolist()


def test_kmeans_from_blocks_is_that_of_the_array(monkeypatch):
    from pyeff.selection import matrix

    x = np.random.default_rng(6).normal(size=(200, 5)).astype(np.float32)
    whole = kmeans(x, 6, seed=1)
    monkeypatch.setattr(matrix, "BLOCK_BYTES", 256)
    assert kmeans(x, 6, seed=1).tolist() == whole.tolist()


@given(st.integers(1, 40), st.integers(0, 50), st.integers(0, 5), st.floats(0.1, 10))
def test_draws_are_prefixes_of_longer_draws_and_repeat(n, k, seed, temperature):
    values = np.linspace(-1, 1, n)
    assert uniform(n, k, seed=seed).tolist() == uniform(n, n, seed=seed).tolist()[:k]
    drawn = boltzmann(values, n, temperature=temperature, seed=seed)
    assert sorted(drawn.tolist()) == list(range(n))
    assert boltzmann(values, k, temperature=temperature, seed=seed).tolist() == drawn.tolist()[:k]


def test_boltzmann_draws_in_proportion_to_the_exponentials():
    values, temperature, draws = np.array([0.0, 1.0, 2.0, np.nan, -np.inf]), 1.5, 4000
    first = np.bincount([boltzmann(values, 1, temperature=temperature, seed=s)[0] for s in range(draws)], minlength=5)
    weights = np.exp(values[:3] / temperature)
    expected = weights / weights.sum()
    # Five standard deviations of a share of so many draws.
    assert (np.abs(first[:3] / draws - expected) < 5 * np.sqrt(expected * (1 - expected) / draws)).all()
    assert first[3:].sum() == 0
    assert len(boltzmann(values, 5)) == 3


def test_a_cold_draw_is_the_top():
    values = np.random.default_rng(7).permutation(50).astype(float)
    assert boltzmann(values, 10, temperature=1e-3, seed=1).tolist() == top_k(values, 10).tolist()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: facility_location([[1.0]], 1, method="best"), ValueError, "method must be"),
        (lambda: facility_location([[1.0]], 1, epsilon=0.0), ValueError, "epsilon must be"),
        (lambda: quotas([1, 2], 4), ValueError, "k is 4, but there are 3"),
        (lambda: quotas([1, 2], 1, how="fair"), ValueError, "how must be"),
        (lambda: kmeans([[1.0], [np.nan]], 2), ValueError, "only 1 samples are finite"),
        (lambda: kmeans([[1.0]], 0), ValueError, "clusters must be"),
        (lambda: kmeans_balanced([[1.0], [2.0]], 3, clusters=1), ValueError, "k is 3, but there are 2"),
        (lambda: boltzmann([1.0], 1, temperature=0.0), ValueError, "temperature must be"),
        (lambda: boltzmann([np.inf], 1), ValueError, "must not be .inf"),
        (lambda: top_k([[1.0], [2.0]], 1), ValueError, r"values must be \[samples\]"),
        (lambda: uniform(3, 1, seed=-1), ValueError, "seed must be"),
        (lambda: uniform(3, 1, seed=0.5), TypeError, "seed must be an int"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(call, error, words):
    with pytest.raises(error, match=words):
        call()
