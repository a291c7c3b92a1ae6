"""Factored sketches keep inner products, by the variance they state, and are the same however the gradient comes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_as_accurate
from torch import Tensor

import pyeff


def grads_of(inputs: Tensor, grad_outputs: Tensor, borders: list[int]) -> Tensor:
    return torch.stack([grad_outputs[i:j].T @ inputs[i:j] for i, j in itertools.pairwise(borders)])


def matrices(kind: str) -> tuple[Tensor, Tensor]:
    """Two matrices [6, 9] in float64."""
    generator = torch.Generator().manual_seed(7)
    u, v = torch.randn(2, 6, 9, generator=generator, dtype=torch.float64)
    if kind == "rank one":  # the variance's bound is nearly reached
        u = v = torch.outer(torch.randn(6, generator=generator).double(), torch.randn(9, generator=generator).double())
    if kind == "one entry":
        u = v = torch.zeros_like(u).index_put((torch.tensor(2), torch.tensor(3)), torch.tensor(1.0).double())
    if kind == "constant":
        u, v = torch.ones_like(u), v + 1
    if kind == "hot column":
        u[:, 4] *= 100
        v[:, 4] *= 100
    return u, v


@pytest.mark.parametrize("kind", ["dense", "rank one", "one entry", "constant", "hot column"])
@pytest.mark.parametrize("sizes", [(4, 3), (40, 2)], ids=str)
def test_inner_products_are_unbiased_with_the_stated_variance(kind: str, sizes: tuple[int, int]) -> None:
    (k_in, k_out), (u, v), seeds = sizes, matrices(kind), 1500
    both = torch.stack([u, v])
    found = []
    for seed in range(seeds):
        of_u, of_v = pyeff.FactoredSketch(k_in, k_out, seed=seed).of("w", both)
        found.append((of_u * of_v).sum())
    estimates = torch.stack(found)
    scale = float(u.square().sum() * v.square().sum())
    bound = scale * ((1 + 2 / k_in) * (1 + 2 / k_out) - 1)
    # Five standard errors of the mean, by the bound; of the variance, by the estimates' own fourth moment.
    rounding = 64 * torch.finfo(torch.float64).eps * math.sqrt(scale)
    assert abs(float(estimates.mean() - (u * v).sum())) <= 5 * math.sqrt(bound / seeds) + rounding
    deviations = (estimates - (u * v).sum()).square()
    error = float(deviations.std()) / math.sqrt(seeds)
    assert float(deviations.mean()) <= bound + 5 * error
    if kind == "rank one":
        # The exact variance: (1 + x) (1 + y) - 1, with x of one side |a|^4 2 / k less what a sign's square has.
        (a, b), norms = (torch.linalg.svd(u).U[:, 0], torch.linalg.svd(u).Vh[0]), []
        for side, k in ((a, k_out), (b, k_in)):
            norms.append(float(2 / k * (1 - side.pow(4).sum())))
        exact = scale * ((1 + norms[0]) * (1 + norms[1]) - 1)
        assert abs(float(deviations.mean()) - exact) <= 5 * error
    if kind == "one entry":
        assert float(deviations.max()) <= rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [[3, 0, 5, 1], [4, 4, 4], [1, 1, 90, 0], [], [0, 0]], ids=str)
def test_products_of_tokens_have_the_sketch_of_their_gradients(lengths: list[int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    borders = [0, *itertools.accumulate(lengths)]
    inputs, grad_outputs = (torch.randn(borders[-1], k).to(dtype) for k in (33, 18))
    sketch = pyeff.FactoredSketch(5, 37, seed=3)
    found = sketch.of_product("w", inputs, grad_outputs, torch.tensor(borders))
    assert found.shape == (len(lengths), 37, 5)
    assert found.dtype == torch.float32
    if not lengths:
        return
    exact = sketch.of("w", grads_of(inputs.double(), grad_outputs.double(), borders))
    peer = sketch.of("w", grads_of(inputs.float(), grad_outputs.float(), borders))
    assert_as_accurate(found, exact, peer, multiple=4.0)
    for s, length in enumerate(lengths):
        assert length > 0 or torch.equal(found[s], torch.zeros(37, 5))


def test_tables_and_stacks_are_parts_of_one_matrix() -> None:
    torch.manual_seed(0)
    borders = torch.tensor([0, 4, 4, 9])
    ids, rows = torch.randint(0, 11, (9,)), torch.randn(9, 6, dtype=torch.float64)
    sketch = pyeff.FactoredSketch(4, 35)
    table = grads_of(rows, torch.nn.functional.one_hot(ids, 11).double(), borders.tolist())
    torch.testing.assert_close(sketch.of_table("t", ids, rows, borders), sketch.of("t", table))
    stack = torch.zeros(3, 2, 5, 6, dtype=torch.float64)
    grad_outputs = torch.randn(9, 5, dtype=torch.float64)
    stack[:, 1] = grads_of(rows, grad_outputs, borders.tolist())
    found = sketch.of_product("e", rows, grad_outputs, borders, first_row=5)
    torch.testing.assert_close(found, sketch.of("e", stack))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8), data=st.data())
def test_neither_order_nor_company_changes_a_sample_s_sketch(
    seed: int, lengths: list[int], data: st.DataObject
) -> None:
    # Small whole numbers, whose products sum exactly in any order.
    generator = torch.Generator().manual_seed(seed)
    inputs, grad_outputs = (torch.randint(-3, 4, (sum(lengths), k), generator=generator).float() for k in (7, 9))
    sketch = pyeff.FactoredSketch(4, 3, seed=seed)
    borders = torch.tensor([0, *itertools.accumulate(lengths)])
    found = sketch.of_product("w", inputs, grad_outputs, borders)
    some = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=8))
    parts = torch.arange(sum(lengths)).split(lengths)
    tokens = torch.cat([parts[s] for s in some]) if some else torch.zeros(0, dtype=torch.long)
    borders = torch.tensor([0, *itertools.accumulate(lengths[s] for s in some)])
    assert torch.equal(sketch.of_product("w", inputs[tokens], grad_outputs[tokens], borders), found[some])


DEFINED = [[-1, 1, -1, 1], [1, 1, 1, 1], [-1, 1, -1, 1], [1, -1, 1, -1], [-1, -1, -1, -1], [1, -1, 1, -1]]


def test_the_definition_does_not_change() -> None:
    # Files keep sketches: these signs, worked out from the definition, must stay.
    x = torch.eye(6).reshape(6, 2, 3)
    found = pyeff.FactoredSketch(2, 2, seed=9).of("layer.weight", x).mul(2).round().int().flatten(1).tolist()
    assert found == DEFINED


def test_names_seeds_and_headers_tell_sketches_apart() -> None:
    grad = torch.randn(1, 8, 8)
    first = pyeff.FactoredSketch(4, 4)
    assert not torch.equal(first.of("a", grad), first.of("b", grad))
    assert not torch.equal(first.of("a", grad), pyeff.FactoredSketch(4, 4, seed=1).of("a", grad))
    headers = [pyeff.FactoredSketch(*sizes, seed=seed).header for sizes in ((4, 4), (4, 5), (5, 4)) for seed in (0, 1)]
    assert len({str(header) for header in headers}) == len(headers)
    assert first({"w": grad[0], "b": grad[0, 0]}).keys() == {"w"}


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="k_in must be at least 1"):
        pyeff.FactoredSketch(0, 4)
    with pytest.raises(TypeError, match="k_out must be an int"):
        pyeff.FactoredSketch(4, 2.5)
    with pytest.raises(ValueError, match="cu_seqlens must rise"):
        pyeff.FactoredSketch(4, 4).of_product("w", torch.ones(3, 2), torch.ones(3, 2), torch.tensor([0, 2]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_the_same_sketch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    lengths = [30, 0, 7]
    borders = [0, *itertools.accumulate(lengths)]
    inputs, grad_outputs = (torch.randn(37, k).to(dtype) for k in (64, 48))
    sketch = pyeff.FactoredSketch(16, 8)
    found = sketch.of_product("w", inputs.cuda(), grad_outputs.cuda(), torch.tensor(borders).cuda()).cpu()
    exact = sketch.of("w", grads_of(inputs.double(), grad_outputs.double(), borders))
    peer = sketch.of("w", grads_of(inputs.float(), grad_outputs.float(), borders))
    assert_as_accurate(found, exact, peer, multiple=8.0)
