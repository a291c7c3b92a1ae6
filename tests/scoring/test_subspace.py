"""Similarity in the targets' subspace is the cosine of projections, and says how much of the targets it holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pyeff.scoring import Features, FeatureStore, SubspaceSimilarities, TargetSimilarities, target_scores
from pyeff.selection import per_sample, round_robin

EPS = float(np.finfo(np.float32).eps)


def kept(rows: np.ndarray, name: str = "x") -> Features:
    with FeatureStore(None, {"method": "noise"}, dim=rows.shape[1], dtype="float32") as store:
        store.append(0, [f"{name}{i}" for i in range(len(rows))], rows, flops=10 * len(rows))
        return store.features()


def rows_of(count: int, seed: int, dim: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_it_is_the_cosine_of_what_is_left_by_projection_on_the_leading_directions(rank: int) -> None:
    x, y = rows_of(9, 0), rows_of(4, 1)
    found = SubspaceSimilarities(kept(x), kept(y), rank=rank)
    basis = np.linalg.svd(y.astype(np.float64), full_matrices=False)[2][:rank]
    a, b = x @ basis.T @ basis, y @ basis.T @ basis
    expected = (a @ b.T) / np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
    # Directions of the Gram matrix: the root of its rounding, over the gap between singular values.
    gaps = -np.diff(np.append(np.linalg.svd(y, compute_uv=False).astype(np.float64) ** 2, 0.0))
    allowed = 64 * np.finfo(np.float64).eps * np.square(y).sum() / gaps[rank - 1] / np.linalg.norm(a, axis=1).min()
    got = np.concatenate([block for _, block in found.blocks()])
    np.testing.assert_allclose(got, expected, rtol=0, atol=allowed)
    assert found.rows(np.array([3, 0])).tolist() == got[[3, 0]].tolist()
    energy = np.linalg.svd(y, compute_uv=False)[:rank].astype(np.float64) ** 2
    assert found.energy == pytest.approx(energy.sum() / np.square(y, dtype=np.float64).sum(), rel=8 * EPS)
    assert f"rank {rank}" in found.method


def test_the_rank_is_the_smallest_that_holds_the_energy_asked_for() -> None:
    y = np.diag([3.0, 2.0, 1.0, 0.0]).astype(np.float32)[:, :4]
    pool = kept(rows_of(3, 0, 4))
    assert SubspaceSimilarities(pool, kept(y), energy=9 / 14).rank == 1
    assert SubspaceSimilarities(pool, kept(y), energy=0.9).rank == 2
    assert SubspaceSimilarities(pool, kept(y), energy=1.0).rank == 3  # not the row of zeros


def test_all_directions_leave_out_only_what_no_target_has() -> None:
    y = rows_of(4, 1)
    x = rows_of(9, 0) @ y.T @ y  # within their span
    whole = SubspaceSimilarities(kept(x), kept(y), energy=1.0)
    plain = TargetSimilarities(kept(x), kept(y))
    condition = np.linalg.cond(y)
    allowed = 16 * EPS * condition**2
    np.testing.assert_allclose(whole.rows(np.arange(9)), plain.rows(np.arange(9)), rtol=0, atol=allowed)


def test_samples_outside_are_like_nothing_and_such_that_are_not_finite_undefined() -> None:
    x = np.eye(4, dtype=np.float32)
    x[2, 0] = np.nan
    found = SubspaceSimilarities(kept(x), kept(np.float32([[1, 1, 0, 0], [1, -1, 0, 0]])))
    values = per_sample(found)
    assert values[3] == 0.0
    assert np.isnan(values).tolist() == [False, False, True, False]
    assert set(round_robin(found, 3).tolist()) == {0, 1, 3}
    pool, targets = kept(x), kept(x[:1], "t")
    assert target_scores(found, pool, targets, method=found.method).method == found.method


@pytest.mark.parametrize(
    ("options", "targets", "words"),
    [
        ({"rank": 5}, rows_of(4, 1), "rank must be from 1 to 4"),
        ({"rank": 0}, rows_of(4, 1), "rank must be from 1 to 4"),
        ({"energy": 0.0}, rows_of(4, 1), "energy must be in"),
        ({}, np.zeros((3, 12), np.float32), "all zero"),
        ({}, np.full((3, 12), np.inf, np.float32), "must be finite"),
        ({}, rows_of(4, 1, 11), "dim"),
    ],
)
def test_a_bad_argument_is_named(options: dict[str, Any], targets: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SubspaceSimilarities(kept(rows_of(3, 0)), kept(targets), **options)
