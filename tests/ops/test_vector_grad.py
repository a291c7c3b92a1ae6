"""Gradients of vectors by sample: right wherever float64 says so, on every implementation."""

from __future__ import annotations

import itertools
import math

import backends
import pytest
import torch
from fresh_process import outputs_at_every_level
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_as_accurate
from torch import Tensor

import pyeff
from pyeff.ops import VectorGrad

pytestmark = backends.quiet_interpreter
FIELDS = ("grad", "norms_sq", "sample_grads")


class Backend(backends.Backend):
    def gradient(self, grad_outputs: Tensor, borders: list[int], inputs: Tensor | None = None) -> VectorGrad:
        """Everything, back on the CPU."""
        found = pyeff.vector_grad(
            grad_outputs.to(self.device),
            torch.tensor(borders, dtype=torch.int32, device=self.device),
            inputs=None if inputs is None else inputs.to(self.device),
            sample_grads=True,
            impl=self.impl,
        )
        return VectorGrad(*(getattr(found, name).cpu() for name in FIELDS))


BACKENDS = backends.on_cpu(Backend)
every_backend = backends.on_every(Backend)


def borders_of(lengths: list[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


def problem(lengths: list[int], d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[int], Tensor]:
    """grad_outputs, borders, inputs."""
    return torch.randn(sum(lengths), d).to(dtype), borders_of(lengths), (1 + torch.randn(sum(lengths), d)).to(dtype)


def by_loop(grad_outputs: Tensor, borders: list[int], inputs: Tensor | None, dtype: torch.dtype) -> VectorGrad:
    terms = grad_outputs.to(dtype) if inputs is None else grad_outputs.to(dtype) * inputs.to(dtype)
    sums = [terms[i:j].sum(0) for i, j in itertools.pairwise(borders)]
    grads = torch.stack(sums) if sums else terms.new_zeros(0, terms.shape[1])
    return VectorGrad(grads.sum(0), grads.square().sum(1), grads)


def assert_accurate(found: VectorGrad, grad_outputs: Tensor, borders: list[int], inputs: Tensor | None) -> None:
    """As accurate as float32 sums by torch in the worst of some orders: few numbers are few draws of their error."""
    exact = by_loop(grad_outputs, borders, inputs, torch.float64)
    peers = []
    for _ in range(8):
        order = torch.cat([i + torch.randperm(j - i) for i, j in itertools.pairwise(borders)])
        shuffled = None if inputs is None else inputs[order]
        peers.append(by_loop(grad_outputs[order], borders, shuffled, torch.float32))
    for name in FIELDS:
        assert getattr(found, name).dtype == torch.float32
        rounded, true = torch.stack([getattr(peer, name) for peer in peers]), getattr(exact, name)
        worst = (rounded - true).abs().nan_to_num(0.0).max(0, keepdim=True).indices
        assert_as_accurate(getattr(found, name), true, rounded.gather(0, worst)[0], multiple=4.0, what=name)


SHAPES = [
    ([1], 1),
    ([0, 5, 0, 70, 3, 200, 64, 0], 33),
    ([130, 2, 64], 576),
    ([3, *[300] * 30], 1),
    ([2, 1], 1100),
]


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gain", [False, True], ids=["offset", "gain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_float32_sums(
    backend: Backend, shape: tuple[list[int], int], gain: bool, dtype: torch.dtype
) -> None:
    grad_outputs, borders, inputs = problem(*shape, dtype)
    case = (grad_outputs, borders, inputs if gain else None)
    if not backend.supports(dtype):
        with pytest.raises(RuntimeError, match="bfloat16"):
            backend.gradient(*case)
        return
    assert_accurate(backend.gradient(*case), *case)


def test_long_samples_and_many_samples_lose_no_digits() -> None:
    for lengths in ([40000], [1] * 10000):
        for d in (1, 3):
            case = problem(lengths, d)
            assert_accurate(BACKENDS[1].gradient(*case), *case)


def test_float64_is_computed_by_the_reference_in_float64() -> None:
    grad_outputs, borders, inputs = problem([3, 0, 20], 4, torch.float64)
    found = pyeff.vector_grad(grad_outputs, torch.tensor(borders), inputs=inputs, sample_grads=True)
    exact = by_loop(grad_outputs, borders, inputs, torch.float64)
    for name in FIELDS:
        torch.testing.assert_close(getattr(found, name), getattr(exact, name))


def test_what_is_not_asked_for_is_none() -> None:
    grad_outputs, borders, _ = problem([3, 4], 5)
    for impl in ("reference", "cpu"):
        found = pyeff.vector_grad(grad_outputs, torch.tensor(borders), norms=False, impl=impl)
        assert found.norms_sq is None
        assert found.sample_grads is None
        torch.testing.assert_close(found.grad, grad_outputs.sum(0))


@every_backend
def test_a_sample_with_nan_or_infinity_spoils_only_itself(backend: Backend) -> None:
    grad_outputs, borders, inputs = problem([9, 70, 0, 200, 5], 20)
    clean = backend.gradient(grad_outputs, borders, inputs)
    grad_outputs[78, 3] = math.nan
    inputs[279, 7] = math.inf
    found = backend.gradient(grad_outputs, borders, inputs)
    assert not found.norms_sq[[1, 4]].isfinite().any()
    assert torch.equal(found.norms_sq[[0, 2, 3]], clean.norms_sq[[0, 2, 3]])
    exact = by_loop(grad_outputs, borders, inputs, torch.float64)
    assert torch.equal(found.grad.isfinite(), exact.grad.isfinite())
    assert torch.equal(found.sample_grads.isfinite(), exact.sample_grads.isfinite())


@every_backend
@pytest.mark.parametrize("shape", [([], 4), ([0, 0], 4), ([5, 2], 0)], ids=str)
def test_nothing_has_gradient_zero(backend: Backend, shape: tuple[list[int], int]) -> None:
    grad_outputs, borders, inputs = problem(*shape)
    for case in ((grad_outputs, borders), (grad_outputs, borders, inputs)):
        found = backend.gradient(*case)
        assert torch.equal(found.grad, torch.zeros(shape[1]))
        assert torch.equal(found.norms_sq, torch.zeros(len(shape[0])))
        assert torch.equal(found.sample_grads, torch.zeros(len(shape[0]), shape[1]))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_strides(backend: Backend, dtype: torch.dtype) -> None:
    grad_outputs, borders, inputs = problem([30, 30, 140], 64, dtype)
    layouts = (grad_outputs.T.contiguous().T, torch.cat([inputs, -inputs], 1)[:, :64])
    assert_accurate(backend.gradient(layouts[0], borders, layouts[1]), grad_outputs, borders, inputs)
    repeated = (grad_outputs[:1].expand_as(grad_outputs), inputs[:, :1].expand_as(inputs))
    assert_accurate(backend.gradient(repeated[0], borders, repeated[1]), repeated[0], borders, repeated[1])


@pytest.mark.parametrize(
    "backend", [*BACKENDS[1:], pytest.param(Backend("triton", "cuda"), marks=pytest.mark.gpu)], ids=backends.name_of
)
def test_repeats_give_the_same_bits(backend: Backend) -> None:
    case = problem([70, 70, 3, 300], 50)
    first, again = backend.gradient(*case), backend.gradient(*case)
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in FIELDS)


def test_thread_count_changes_no_bit() -> None:
    threads = torch.get_num_threads()
    case = problem([70, 0, 1000, 3], 130)
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(BACKENDS[1].gradient(*case))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(getattr(found[0], name), getattr(other, name)) for name in FIELDS)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8), data=st.data())
def test_neither_order_nor_company_changes_a_sample(seed: int, lengths: list[int], data: st.DataObject) -> None:
    # Small whole numbers, whose sums are exact in any order.
    generator = torch.Generator().manual_seed(seed)
    grad_outputs, inputs = (torch.randint(-3, 4, (sum(lengths), 7), generator=generator).float() for _ in range(2))
    found = pyeff.vector_grad(grad_outputs, torch.tensor(borders_of(lengths)), inputs=inputs, sample_grads=True)
    some = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=8))
    parts = torch.arange(sum(lengths)).split(lengths)
    tokens = torch.cat([parts[s] for s in some]) if some else torch.zeros(0, dtype=torch.long)
    borders = torch.tensor(borders_of([lengths[s] for s in some]))
    again = pyeff.vector_grad(grad_outputs[tokens], borders, inputs=inputs[tokens], sample_grads=True)
    assert torch.equal(again.norms_sq, found.norms_sq[some])
    assert torch.equal(again.sample_grads, found.sample_grads[some])
    assert torch.equal(again.grad, found.sample_grads[some].sum(0))


def test_opcheck() -> None:
    grad_outputs, borders, inputs = problem([3, 0, 4], 5)
    for impl, x, flags in itertools.product(
        ("reference", "cpu"), (None, inputs), itertools.product((True, False), repeat=2)
    ):
        torch.library.opcheck(
            torch.ops.pyeff.vector_grad.default, (grad_outputs, torch.tensor(borders), x, *flags, impl)
        )


def test_arguments_that_do_not_fit_are_named() -> None:
    g, borders = torch.randn(7, 4), torch.tensor([0, 7])
    with pytest.raises(TypeError, match="inputs must be a tensor, got list"):
        pyeff.vector_grad(g, borders, inputs=[1.0])
    with pytest.raises(ValueError, match=r"^grad_outputs must be \[tokens, features\]"):
        pyeff.vector_grad(g[None], borders)
    with pytest.raises(ValueError, match="grad_outputs must have the shape of inputs"):
        pyeff.vector_grad(g, borders, inputs=torch.randn(7, 3))
    with pytest.raises(ValueError, match="grad_outputs must have the dtype of inputs"):
        pyeff.vector_grad(g, borders, inputs=g.half())
    with pytest.raises(TypeError, match="float"):
        pyeff.vector_grad(g.long(), borders)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the number of tokens, 7"):
        pyeff.vector_grad(g, torch.tensor([0, 6]))
    with pytest.raises(RuntimeError, match="float64"):
        pyeff.vector_grad(g.double(), borders, impl="cpu")


def test_every_instruction_level_gives_the_same_bits() -> None:
    code = """
import hashlib, torch, pyeff
torch.manual_seed(0)
digest = hashlib.sha256()
for tokens, d in ((3, 5), (300, 128), (70, 67)):
    for dtype in (torch.float32, torch.bfloat16):
        g, x, w = torch.randn(tokens, d).to(dtype), torch.randn(tokens, d).to(dtype), torch.randn(d)
        cu_seqlens = torch.tensor([0, 1, tokens // 2, tokens])
        grads = [pyeff.vector_grad(g, cu_seqlens, inputs=i, sample_grads=True, impl="cpu") for i in (None, x)]
        for center in (False, True):
            found = pyeff.norm_layer_grad(
                x, g, cu_seqlens, weight=w, eps=1e-5, center=center, bias_grad=True, sample_grads=True, impl="cpu"
            )
            digest.update(found.input_grad.float().numpy().tobytes())
            grads += [found.weight, found.bias]
        for grad in grads:
            for value in (grad.grad, grad.norms_sq, grad.sample_grads):
                digest.update(value.numpy().tobytes())
        found = pyeff.embedding_grad(torch.randint(9, (tokens,)), g, cu_seqlens, 11, padding_idx=2, impl="cpu")
        digest.update(found.weight_grad.float().numpy().tobytes() + found.norms_sq.numpy().tobytes())
print(digest.hexdigest())
"""
    assert len(outputs_at_every_level(code)) == 1


@pytest.mark.gpu
def test_known_borders_do_not_make_the_host_wait() -> None:
    grad_outputs, borders, inputs = problem([64, 32], 64)
    grad_outputs, inputs, indices = grad_outputs.cuda(), inputs.cuda(), torch.arange(96).cuda() % 7
    for cu_seqlens in (torch.tensor(borders).cuda(), torch.tensor(borders)):
        for _ in range(2):
            pyeff.vector_grad(grad_outputs, cu_seqlens, inputs=inputs)
            pyeff.norm_layer_grad(inputs, grad_outputs, cu_seqlens, eps=1e-5)
            pyeff.embedding_grad(indices, grad_outputs, cu_seqlens, 7)
            torch.cuda.set_sync_debug_mode("error")
        torch.cuda.set_sync_debug_mode("default")
