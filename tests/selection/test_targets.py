"""Rules for many targets choose what their definitions choose, however the scores are read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pyeff.selection import ArrayMatrix, Similarities, bids, matrix, per_sample, round_robin, targets
from pyeff.selection.targets import column_moments

# Few values, so that ties are common, and rows that cannot be taken.
entries = st.integers(-3, 3).map(float) | st.sampled_from([np.nan, np.inf, -np.inf])
tables = arrays(np.float64, st.tuples(st.integers(1, 24), st.integers(1, 4)), elements=entries)
finite_tables = arrays(
    np.float64, st.tuples(st.integers(1, 24), st.integers(1, 4)), elements=st.floats(-2, 2, width=16)
)


class Streamed:
    """A matrix that cannot be indexed at will: blocks of a few rows, and a count of the rows read."""

    def __init__(self, array: np.ndarray, step: int = 3) -> None:
        self.array, self.step, self.read = array, step, 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.array.shape[0], self.array.shape[1]

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        for first in range(0, len(self.array), self.step):
            block = self.array[first : first + self.step].copy()
            self.read += len(block)
            yield first, block

    def rows(self, indices: np.ndarray) -> np.ndarray:
        return self.array[indices]


def plain_round_robin(scores: np.ndarray, k: int) -> list[int]:
    free = np.isfinite(scores).all(axis=1)
    taken: list[int] = []
    while len(taken) < k and free.any():
        column = scores[:, len(taken) % scores.shape[1]]
        taken.append(int(np.argmax(np.where(free, column, -np.inf))))
        free[taken[-1]] = False
    return taken


@given(tables, st.integers(0, 30), st.integers(1, 5), st.integers(1, 6))
def test_round_robin_is_its_definition_however_the_scores_are_read(scores, k, step, listed):
    with pytest.MonkeyPatch.context() as patch:
        # Short lists run out, and are made again from what is free.
        patch.setattr(targets, "_LISTED", listed)
        assert round_robin(Streamed(scores, step), k).tolist() == plain_round_robin(scores, k)
    assert round_robin(scores, k).tolist() == plain_round_robin(scores, k)


@given(finite_tables, st.integers(1, 30))
def test_every_step_of_bids_takes_the_row_that_most_exceeds_what_a_target_has(scores, k):
    mean, deviation = column_moments(ArrayMatrix(scores))
    z = np.where(deviation > 0, (scores - mean) / np.where(deviation > 0, deviation, 1), 0.0)
    free = np.ones(len(z), dtype=bool)
    total = np.zeros(z.shape[1])
    taken = bids(scores, k)
    assert len(taken) == min(k, len(z))
    for step, row in enumerate(taken.tolist()):
        gains = (z - total / max(1, step)).max(axis=1)
        # As many roundings as there are additions before, of numbers so large.
        allowed = 8 * (step + 4) * np.finfo(float).eps * max(1.0, np.abs(z).max())
        assert free[row]
        assert gains[row] >= gains[free].max() - allowed
        free[row] = False
        total += z[row]


@given(st.integers(0, 2**31), st.integers(8, 40), st.integers(1, 5), st.integers(0, 45), st.integers(1, 7))
def test_bids_of_streamed_scores_is_that_of_an_array(seed, n, m, k, step):
    # Continuous scores, and more than two of them: moments are summed in another order, which may turn a tie around.
    scores = np.random.default_rng(seed).normal(size=(n, m))
    scores[:: step + 3] = np.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "_LISTED", 3)
        assert bids(Streamed(scores, step), k).tolist() == bids(scores, k).tolist()


@given(tables, st.integers(0, 30))
def test_bids_takes_no_row_twice_and_none_that_is_not_finite(scores, k):
    taken = bids(scores, k)
    assert len(set(taken.tolist())) == len(taken) == min(k, int(np.isfinite(scores).all(axis=1).sum()))
    assert np.isfinite(scores[taken]).all()


@given(finite_tables, st.integers(1, 12))
def test_bids_does_not_know_the_scale_of_a_target(scores, k):
    exact = scores * np.array([4.0, 0.25, 1024.0, 1.0])[: scores.shape[1]]
    assert bids(exact, k).tolist() == bids(scores, k).tolist()


@given(finite_tables, st.integers(1, 12))
def test_bids_for_fewer_is_a_prefix_of_that_for_more(scores, k):
    assert bids(scores, k).tolist() == bids(scores, len(scores)).tolist()[:k]


def test_bids_serves_a_target_whose_scores_are_small():
    rng = np.random.default_rng(0)
    scores = np.zeros((40, 2))
    scores[:20, 0] = 100 + rng.random(20)
    scores[20:, 1] = 0.01 + rng.random(20) / 1000
    chosen = bids(scores, 10)
    assert (chosen < 20).sum() == 5
    assert (np.argsort(-scores.sum(axis=1))[:10] < 20).all()  # the sum forgets it


def test_a_target_that_all_serve_alike_counts_nothing():
    scores = np.random.default_rng(1).random((30, 3))
    with_constant = np.column_stack([scores, np.full(30, 0.1)])
    assert bids(with_constant, 9).tolist() == bids(scores, 9).tolist()


@given(tables, st.integers(1, 5), st.sampled_from(["max", "mean", "sum"]))
def test_a_value_for_each_sample_is_the_same_from_blocks(scores, step, reduction):
    expected = per_sample(scores, reduction=reduction)
    np.testing.assert_array_equal(per_sample(Streamed(scores, step), reduction=reduction), expected)
    assert (np.isfinite(scores).all(axis=1) == np.isfinite(expected)).all()


def test_groups_are_averaged_before_the_largest_is_taken():
    scores = np.random.default_rng(2).random((7, 5))
    groups = ["b", "a", "b", "c", "a"]
    means = [scores[:, [g == name for g in groups]].mean(axis=1) for name in "abc"]
    np.testing.assert_allclose(per_sample(scores, groups=groups), np.max(means, axis=0), rtol=8 * np.finfo(float).eps)


def test_scores_in_a_file_are_chosen_from_in_blocks(tmp_path, monkeypatch):
    scores = np.random.default_rng(3).random((500, 4)).astype(np.float32)
    np.save(tmp_path / "scores.npy", scores)
    monkeypatch.setattr(matrix, "BLOCK_BYTES", 1000)
    mapped = np.load(tmp_path / "scores.npy", mmap_mode="r")
    assert len(list(ArrayMatrix(mapped).blocks())) > 5
    assert round_robin(mapped, 50).tolist() == plain_round_robin(scores, 50)


def test_one_reading_is_enough_where_targets_differ():
    scores = Streamed(np.random.default_rng(4).random((2000, 8)), 100)
    round_robin(scores, 200)
    assert scores.read == 2000


@pytest.mark.parametrize("cosine", [True, False])
def test_similarities_are_products_and_undefined_where_features_are(cosine, monkeypatch):
    monkeypatch.setattr(matrix, "BLOCK_BYTES", 200)
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(20, 6)), rng.normal(size=(3, 6))
    x[4], x[7, 2] = 0.0, np.nan
    expected = x @ y.T
    if cosine:
        with np.errstate(invalid="ignore"):
            expected /= np.linalg.norm(x, axis=1, keepdims=True) * np.linalg.norm(y, axis=1)
        expected[4] = 0.0
    found = Similarities(x, y, cosine=cosine)
    whole = np.concatenate([block for _, block in found.blocks()])
    allowed = 16 * np.finfo(float).eps * np.abs(np.nan_to_num(expected)).max()
    np.testing.assert_allclose(whole, expected, rtol=0, atol=allowed)
    np.testing.assert_allclose(found.rows(np.array([7, 4, 0])), expected[[7, 4, 0]], rtol=0, atol=allowed)
    assert 7 not in round_robin(found, 20)


def test_norms_that_leave_the_range_of_doubles_are_no_zeros():
    found = Similarities([[1e-200, 1e-200], [1e200, 0.0]], [[1e200, 1e200]]).rows(np.array([0, 1]))
    np.testing.assert_allclose(found[:, 0], [1.0, 0.5**0.5], rtol=8 * np.finfo(float).eps)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: round_robin([1.0, 2.0], 1), ValueError, "scores must be .rows, columns."),
        (lambda: round_robin(np.zeros((3, 0)), 1), ValueError, "at least one column"),
        (lambda: bids([["a"]], 1), TypeError, "scores must be real numbers"),
        (lambda: bids([[1.0]], -1), ValueError, "k must not be negative"),
        (lambda: bids([[1.0]], 1.5), TypeError, "k must be an int"),
        (lambda: per_sample([[1.0]], reduction="median"), ValueError, "reduction must be"),
        (lambda: per_sample([[1.0]], groups=["a", "b"]), ValueError, "groups must be one label"),
        (lambda: Similarities([[1.0]], [[1.0, 2.0]]), ValueError, "as wide as the features"),
        (lambda: Similarities([[1.0]], [[np.nan]]), ValueError, "target 0 is not"),
    ],
)
def test_bad_scores_are_refused_in_a_sentence(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_no_rows_give_none():
    for rule in (round_robin, bids):
        assert rule(np.zeros((0, 2)), 3).tolist() == []
        assert rule(np.full((3, 2), np.nan), 3).tolist() == []
