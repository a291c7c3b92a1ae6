"""What GREATS, OPUS and CoLM take of a batch is what their formulas say, and steps are made on these samples alone."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pyeff
from pyeff.scoring import zeroth_order_slopes
from pyeff.selection import colm, greats, opus

LR = 0.125


def gradients(count: int, dim: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dim))


def plain_greats(rows: np.ndarray, goals: np.ndarray, k: int) -> tuple[list[int], list[float]]:
    taken: list[int] = []
    values = []
    for _ in range(k):
        gains = {}
        for i in set(range(len(rows))) - set(taken):
            gain = LR * sum(rows[i] @ goal for goal in goals) / len(goals)
            gains[i] = gain - LR**2 * sum(rows[i] @ rows[j] for j in taken)
        taken.append(max(gains, key=gains.__getitem__))
        values.append(gains[taken[-1]])
    return taken, values


@given(st.integers(0, 2**32 - 1), st.integers(0, 7))
@settings(deadline=None)
def test_greats_takes_what_its_formula_says(seed: int, k: int) -> None:
    rows, goals = gradients(7, seed=seed), gradients(2, seed=seed + 1)
    chosen = greats(rows, goals, k, lr=LR)
    taken, values = plain_greats(rows, goals, k)
    assert chosen.indices.tolist() == taken
    allowed = 64 * np.finfo(np.float64).eps * (1 + np.square(rows).sum())
    np.testing.assert_allclose(chosen.values, values, rtol=0, atol=allowed)
    order = np.random.default_rng(seed).permutation(7)
    assert order[greats(rows[order], goals, k, lr=LR).indices].tolist() == taken
    # Gradients twice as large and half the rate: the same step.
    assert greats(2 * rows, goals, k, lr=LR / 2).indices.tolist() == taken


def test_the_pairwise_term_keeps_greats_from_taking_a_sample_twice() -> None:
    rows = np.array([[3.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
    assert greats(rows, [[1.0, 1.0]], 2, lr=1e-6).indices.tolist() == [0, 1]
    assert greats(rows, [[1.0, 1.0]], 2, lr=0.25).indices.tolist() == [0, 2]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("rule", [greats, opus])
def test_no_sample_is_taken_twice_even_where_products_overflow(rule: Any) -> None:
    rows = np.full((6, 3), 1e200)
    assert sorted(rule(rows, rows[:1], 6, lr=1.0).indices.tolist()) == list(range(6))


def test_gradients_in_bfloat16_are_taken_as_they_are() -> None:
    rows = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = greats(rows.double().numpy(), rows[:2].double().numpy(), 3, lr=0.1)
    assert greats(rows, rows[:2], 3, lr=0.1).indices.tolist() == wanted.indices.tolist()


def test_opus_draws_with_the_probabilities_of_its_utilities() -> None:
    rows, goals, temperature, draws = gradients(4, 2), gradients(1, 2, seed=9), 0.7, 4000
    first, gram = LR * rows @ goals[0], LR**2 * rows @ rows.T
    scale = temperature * first.std()

    def probabilities(values: np.ndarray, free: list[int]) -> dict[int, float]:
        weights = np.exp(values[free] / scale)
        return dict(zip(free, weights / weights.sum(), strict=True))

    expected: Counter[tuple[int, int]] = Counter()
    for i, p in probabilities(first, [0, 1, 2, 3]).items():
        for j, q in probabilities(first - gram[i], [j for j in range(4) if j != i]).items():
            expected[i, j] = p * q
    found = Counter(
        tuple(opus(rows, goals, 2, lr=LR, temperature=temperature, seed=seed).indices.tolist()) for seed in range(draws)
    )
    for pair, p in expected.items():
        # Five standard errors of a frequency.
        assert abs(found[pair] / draws - p) <= 5 * np.sqrt(p * (1 - p) / draws), pair


def test_opus_without_temperature_is_greats_and_repeats_itself() -> None:
    rows, goals = gradients(9), gradients(3, seed=1)
    cold = opus(rows, goals, 4, lr=LR, temperature=1e-9)
    assert cold.indices.tolist() == greats(rows, goals, 4, lr=LR).indices.tolist()
    draws = [opus(rows, goals, 4, lr=LR, seed=seed).indices.tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert "OPUS" in cold.method
    assert cold.flops == 2 * 9 * 6 * 10


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)  # the first call imports SciPy
def test_colm_covers_a_source_nearly_as_well_as_the_best_subset(seed: int) -> None:
    rows = gradients(7, 3, seed=seed)
    chosen = colm(rows, ["a"] * 7, 2)
    distance = np.abs(rows[:, None] - rows[None]).sum(-1)

    def covered(subset: Any) -> float:
        return float((distance.max() - distance[:, list(subset)].min(axis=1)).sum())

    best = max(covered(pair) for pair in combinations(range(7), 2))
    rounding = 64 * np.finfo(np.float64).eps * best
    assert abs(chosen.values[-1] - covered(chosen.indices)) <= rounding
    assert covered(chosen.indices) >= (1 - 1 / np.e) * best - rounding
    assert chosen.indices[0] == max(range(7), key=lambda i: covered([i]))


def test_colm_keeps_small_sources_whole_and_parts_the_rest_in_proportion() -> None:
    sources = np.array(["big"] * 8 + ["small"] * 2 + ["other"] * 4)
    rows = gradients(14)
    rows[3] = np.nan
    chosen = colm(rows, sources, 8, keep_sources=["small"])
    assert chosen.indices[:2].tolist() == [8, 9]
    counts = Counter(sources[chosen.indices].tolist())
    assert counts == {"small": 2, "big": 4, "other": 2}
    assert 3 not in chosen.indices
    with pytest.raises(ValueError, match="sources to keep have 2 samples"):
        colm(rows, sources, 1, keep_sources=["small"])
    # The only coordinate of any size decides.
    rows = gradients(6) * np.array([1e-9, 1.0, 1e-9, 1e-9, 1e-9, 1e-9])
    one = colm(rows, ["a"] * 6, 2, coordinates=1)
    assert one.indices.tolist() == colm(rows[:, 1:2], ["a"] * 6, 2).indices.tolist()


def small_model() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, torch.randn(10, 5), torch.randn(10, 3)


def test_a_step_on_what_greats_takes_has_the_gradient_of_these_samples_alone() -> None:
    model, x, y = small_model()

    def losses(rows: Any) -> torch.Tensor:
        return (model(x[rows]) - y[rows]).square().sum(1)

    with pyeff.observe(model, defer=True, norms=False, sketch=pyeff.Sketch(4096)) as seen:
        losses(slice(None)).sum().backward()  # eight candidates, then two targets
    chosen = greats(seen.sketches[:8], seen.sketches[8:], 4, lr=1e-3)
    seen.accumulate(chosen.weights(10, scale=0.25))
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    losses(chosen.indices.tolist()).mean().backward()
    peer = [p.grad.clone() for p in model.parameters()]
    for got, wanted in zip(found, peer, strict=True):
        # Sums of four samples' products in another order.
        assert (got - wanted).abs().max() <= 16 * torch.finfo(torch.float32).eps * wanted.abs().max()
    # 75 weights in 4096 places hardly collide: the choice is that by the gradients themselves.
    grads = []
    for row in range(10):
        model.zero_grad()
        losses([row]).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    whole = torch.stack(grads)
    assert greats(whole[:8], whole[8:], 4, lr=1e-3).indices.tolist() == chosen.indices.tolist()


def test_slopes_are_those_of_the_gradient_along_the_direction() -> None:
    model, x, y = small_model()
    model, x, y = model.double(), x.double(), y.double()
    weight = model[2].weight
    before = weight.detach().clone()

    def losses() -> torch.Tensor:
        return (model(x) - y).square().sum(1)

    slopes, z = zeroth_order_slopes(losses, weight, epsilon=1e-3, seed=4)
    assert torch.equal(weight, before)
    exact = torch.stack([torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses()])
    expected = (exact * z).sum((1, 2))
    # The loss is a square of what is linear in this weight, so central differences are exact but for rounding.
    size = losses().detach().abs().max()
    assert (slopes - expected).abs().max() <= 16 * torch.finfo(torch.float64).eps * size / 1e-3
    assert np.linalg.matrix_rank((slopes[:, None] * z.flatten()).detach().numpy()) == 1
    assert torch.equal(zeroth_order_slopes(losses, weight, seed=4)[1], z)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, t: greats(x, t, 9, lr=LR), "k is 9, but only 7 of 8"),
        (lambda x, t: greats(x, t[:, :2], 2, lr=LR), r"targets must be \[targets, 6\]"),
        (lambda x, t: greats(x, t * np.nan, 2, lr=LR), "target 0 is not"),
        (lambda x, t: greats(x, t, 2, lr=0.0), "lr must be positive"),
        (lambda x, t: greats(x[0], t, 2, lr=LR), r"candidates must be \[samples, numbers\]"),
        (lambda x, t: opus(x, t, 2, lr=LR, temperature=0.0), "temperature must be positive"),
        (lambda x, t: colm(x, ["a"], 2), "sources must be one for each of 8"),
        (lambda x, t: colm(x, ["a"] * 8, 2, coordinates=0), "coordinates must be"),
        (lambda x, t: colm(x, ["a"] * 8, 8), "k is 8, but only 7 of 8"),
    ],
)
def test_a_bad_argument_is_named(call: Any, words: str) -> None:
    rows, goals = gradients(8), gradients(2, seed=1)
    rows[5, 2] = np.inf
    with pytest.raises(ValueError, match=words):
        call(rows, goals)
    assert 5 not in greats(rows, goals, 7, lr=LR).indices


def test_what_is_no_list_of_sources_or_no_real_number_is_named() -> None:
    with pytest.raises(TypeError, match="keep_sources must be a list of sources, got the string 'web'"):
        colm(gradients(3), ["web", "web", "sum"], 1, keep_sources="web")
    for rows in (gradients(3) * 1j, torch.ones(3, 2, dtype=torch.complex64)):
        with pytest.raises(TypeError, match="candidates must be real numbers"):
            greats(rows, gradients(1), 1, lr=LR)
