"""Gradients of embedding tables by sample: right wherever float64 says so, on every implementation."""

from __future__ import annotations

import itertools
import math

import backends
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_as_accurate
from torch import Tensor

import pyeff
from pyeff.ops import EmbeddingGrad

pytestmark = backends.quiet_interpreter


class Backend(backends.Backend):
    def gradient(
        self, indices: Tensor, grad_outputs: Tensor, borders: list[int], entries: int, **options: object
    ) -> EmbeddingGrad:
        """The result, back on the CPU."""
        moved = (indices.to(self.device), grad_outputs.to(self.device))
        cu_seqlens = torch.tensor(borders, dtype=torch.int32, device=self.device)
        found = pyeff.embedding_grad(*moved, cu_seqlens, entries, **options, impl=self.impl)
        return EmbeddingGrad(*(None if t is None else t.cpu() for t in (found.weight_grad, found.norms_sq)))


BACKENDS = backends.on_cpu(Backend)
every_backend = backends.on_every(Backend)


def borders_of(lengths: list[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


def problem(
    lengths: list[int], d: int, entries: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, list[int], int]:
    tokens = sum(lengths)
    return torch.randint(entries, (tokens,)), torch.randn(tokens, d).to(dtype), borders_of(lengths), entries


def by_loop(
    indices: Tensor, grad_outputs: Tensor, borders: list[int], entries: int, padding: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """torch's own backward pass, one sample at a time."""
    grads = [
        torch.ops.aten.embedding_dense_backward(
            grad_outputs[i:j].to(dtype), indices[i:j].long(), entries, -1 if padding is None else padding, False
        )
        for i, j in itertools.pairwise(borders)
    ]
    whole = torch.stack(grads) if grads else torch.zeros(0, entries, grad_outputs.shape[1], dtype=dtype)
    return whole.sum(0), whole.square().sum((1, 2))


def assert_accurate(found: EmbeddingGrad, *case: object, padding: int | None = None) -> None:
    """As accurate as torch in float32; few numbers are few draws of their rounding error, hence 4."""
    exact, peer = (by_loop(*case, padding, dtype) for dtype in (torch.float64, torch.float32))
    assert_as_accurate(found.weight_grad, exact[0], peer[0], multiple=4.0, what="weight_grad")
    assert_as_accurate(found.norms_sq, exact[1], peer[1], multiple=4.0, what="norms_sq")


SHAPES = [
    ([1], 1, 1),
    ([0, 5, 0, 70, 3, 40, 0], 33, 17),
    ([30, 2], 600, 5),
    ([4, 4], 64, 1000),
    ([90], 8, 2),
]


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_torch_in_float32(
    backend: Backend, shape: tuple[list[int], int, int], dtype: torch.dtype
) -> None:
    case = problem(*shape, dtype)
    if not backend.supports(dtype):
        with pytest.raises(RuntimeError, match="bfloat16"):
            backend.gradient(*case)
        return
    found = backend.gradient(*case)
    assert found.weight_grad.dtype == dtype
    assert found.norms_sq.dtype == torch.float32
    assert_accurate(found, *case)


def test_float64_is_computed_by_the_reference_in_float64() -> None:
    case = problem([3, 0, 20], 4, 6, torch.float64)
    found = Backend("auto", "cpu").gradient(*case)
    for value, exact in zip((found.weight_grad, found.norms_sq), by_loop(*case, None, torch.float64), strict=True):
        torch.testing.assert_close(value, exact)


@every_backend
@pytest.mark.parametrize("padding", [0, 3, -1])
def test_the_row_of_padding_has_no_gradient(backend: Backend, padding: int) -> None:
    case = problem([20, 0, 30], 10, 7)
    case[0][:9] = padding % 7
    found = backend.gradient(*case, padding_idx=padding)
    assert torch.equal(found.weight_grad[padding], torch.zeros(10))
    assert_accurate(found, *case, padding=padding % 7)


@every_backend
def test_either_result_alone(backend: Backend) -> None:
    case = problem([20, 0, 30], 10, 7)
    both = backend.gradient(*case)
    table, norms = backend.gradient(*case, norms=False), backend.gradient(*case, weight_grad=False)
    assert table.norms_sq is None
    assert norms.weight_grad is None
    assert torch.equal(table.weight_grad, both.weight_grad)
    assert torch.equal(norms.norms_sq, both.norms_sq)


@every_backend
def test_tokens_that_cancel_leave_nothing(backend: Backend) -> None:
    indices, grad_outputs, borders, entries = problem([40], 12, 3)
    indices[20:], grad_outputs[20:] = indices[:20], -grad_outputs[:20]
    found = backend.gradient(indices, grad_outputs, borders, entries)
    assert_accurate(found, indices, grad_outputs, borders, entries)
    alone = backend.gradient(indices[[0, 20]], grad_outputs[[0, 20]], [0, 2], entries)
    assert torch.equal(alone.norms_sq, torch.zeros(1))


@every_backend
def test_a_sample_with_nan_spoils_only_itself_and_its_rows(backend: Backend) -> None:
    indices, grad_outputs, borders, entries = problem([9, 30, 0, 20], 20, 50)
    clean = backend.gradient(indices, grad_outputs, borders, entries)
    grad_outputs[38, 3] = math.nan
    found = backend.gradient(indices, grad_outputs, borders, entries)
    assert found.norms_sq[1].isnan()
    assert torch.equal(found.norms_sq[[0, 2, 3]], clean.norms_sq[[0, 2, 3]])
    rows = torch.arange(entries) != indices[38]
    assert torch.equal(found.weight_grad[rows], clean.weight_grad[rows])


@every_backend
@pytest.mark.parametrize("shape", [([], 4, 3), ([0, 0], 4, 3), ([5, 2], 0, 3)], ids=str)
def test_nothing_has_gradient_zero(backend: Backend, shape: tuple[list[int], int, int]) -> None:
    found = backend.gradient(*problem(*shape))
    assert torch.equal(found.weight_grad, torch.zeros(3, shape[1]))
    assert torch.equal(found.norms_sq, torch.zeros(len(shape[0])))


@every_backend
def test_any_strides_and_32_bit_indices(backend: Backend) -> None:
    indices, grad_outputs, borders, entries = problem([30, 14], 64, 9)
    for layout in (grad_outputs.T.contiguous().T, torch.cat([grad_outputs, -grad_outputs], 1)[:, :64]):
        found = backend.gradient(indices.int(), layout, borders, entries)
        assert_accurate(found, indices, grad_outputs, borders, entries)


@pytest.mark.parametrize(
    "backend", [*BACKENDS[1:], pytest.param(Backend("triton", "cuda"), marks=pytest.mark.gpu)], ids=backends.name_of
)
def test_repeats_give_the_same_bits(backend: Backend) -> None:
    case = problem([70, 70, 3], 50, 11)
    first, again = backend.gradient(*case), backend.gradient(*case)
    assert torch.equal(first.weight_grad, again.weight_grad)
    assert torch.equal(first.norms_sq, again.norms_sq)


def test_thread_count_changes_no_bit() -> None:
    threads = torch.get_num_threads()
    case, found = problem([70, 0, 300, 3], 700, 40), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(BACKENDS[1].gradient(*case))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(found[0].weight_grad, other.weight_grad)
        assert torch.equal(found[0].norms_sq, other.norms_sq)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8), data=st.data())
def test_neither_order_nor_company_changes_a_sample(seed: int, lengths: list[int], data: st.DataObject) -> None:
    # Small whole numbers, whose sums are exact in any order.
    generator = torch.Generator().manual_seed(seed)
    grad_outputs = torch.randint(-3, 4, (sum(lengths), 7), generator=generator).float()
    indices = torch.randint(0, 5, (sum(lengths),), generator=generator)
    found = pyeff.embedding_grad(indices, grad_outputs, torch.tensor(borders_of(lengths)), 5)
    some = data.draw(st.permutations(range(len(lengths))))
    parts = torch.arange(sum(lengths)).split(lengths)
    tokens = torch.cat([parts[s] for s in some])
    borders = torch.tensor(borders_of([lengths[s] for s in some]))
    again = pyeff.embedding_grad(indices[tokens], grad_outputs[tokens], borders, 5)
    assert torch.equal(again.norms_sq, found.norms_sq[some])
    assert torch.equal(again.weight_grad, found.weight_grad)


def test_numbers_that_are_no_integers_and_gradients_that_are_no_rows_are_named() -> None:
    indices, grad_outputs, borders = torch.tensor([0, 1]), torch.ones(2, 3), torch.tensor([0, 2])
    for number in (3.5, "3", None, True):
        with pytest.raises(TypeError, match="num_embeddings must be an int"):
            pyeff.embedding_grad(indices, grad_outputs, borders, number)
    for number in (0.5, "0", False):
        with pytest.raises(TypeError, match="padding_idx must be an int"):
            pyeff.embedding_grad(indices, grad_outputs, borders, 2, padding_idx=number)
    with pytest.raises(ValueError, match=r"^grad_outputs must be \[tokens, features\]"):
        pyeff.embedding_grad(indices, grad_outputs[0], borders, 2)


@pytest.mark.parametrize("bad", [-1, 7])
def test_an_index_outside_of_the_table_is_refused_on_the_cpu(bad: int) -> None:
    indices, grad_outputs, borders, entries = problem([5], 4, 7)
    indices[2] = bad
    for backend in BACKENDS:
        with pytest.raises(ValueError, match="indices must be from 0 to 6"):
            backend.gradient(indices, grad_outputs, borders, entries)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [-1, 7])
def test_an_index_outside_of_the_table_spoils_its_sample_on_a_gpu(bad: int) -> None:
    indices, grad_outputs, borders, entries = problem([5, 3], 4, 7)
    backend = Backend("triton", "cuda")
    clean = backend.gradient(indices, grad_outputs, borders, entries)
    indices[2] = bad
    found = backend.gradient(indices, grad_outputs, borders, entries)
    assert found.norms_sq[0].isnan()
    assert torch.equal(found.norms_sq[1], clean.norms_sq[1])
    assert found.weight_grad.isfinite().all()


def test_opcheck() -> None:
    indices, grad_outputs, borders, entries = problem([3, 0, 4], 5, 6)
    for impl, padding, flags in itertools.product(
        ("reference", "cpu"), (None, 2), ((True, True), (True, False), (False, True))
    ):
        arguments = (indices, grad_outputs, torch.tensor(borders), entries, padding, *flags, impl)
        torch.library.opcheck(torch.ops.pyeff.embedding_grad.default, arguments)


def test_arguments_that_do_not_fit_are_named() -> None:
    indices, g, _, _ = problem([7], 4, 3)
    borders = torch.tensor([0, 7])
    with pytest.raises(TypeError, match="indices must be a tensor, got list"):
        pyeff.embedding_grad([0], g, borders, 3)
    with pytest.raises(TypeError, match="indices must be int32 or int64"):
        pyeff.embedding_grad(indices.float(), g, borders, 3)
    with pytest.raises(ValueError, match="indices must be one for each of the 7 rows"):
        pyeff.embedding_grad(indices[:6], g, borders, 3)
    with pytest.raises(ValueError, match="padding_idx must be an index of the 3 rows, got 3"):
        pyeff.embedding_grad(indices, g, borders, 3, padding_idx=3)
    with pytest.raises(ValueError, match="num_embeddings must be 0 or more"):
        pyeff.embedding_grad(indices, g, borders, -1)
    with pytest.raises(ValueError, match="nothing is asked for"):
        pyeff.embedding_grad(indices, g, borders, 3, weight_grad=False, norms=False)
    with pytest.raises(ValueError, match="cu_seqlens must"):
        pyeff.embedding_grad(indices, g, torch.tensor([0, 8]), 3)


def test_a_table_without_rows_is_named() -> None:
    cu_seqlens = torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"indices must be none for a table without rows \(num_embeddings=0\), got 1"):
        pyeff.embedding_grad(torch.tensor([0]), torch.ones(1, 2), cu_seqlens, 0)
    with pytest.raises(ValueError, match=r"padding_idx must be None for a table without rows"):
        pyeff.embedding_grad(torch.tensor([0]), torch.ones(1, 2), cu_seqlens, 0, padding_idx=0)
