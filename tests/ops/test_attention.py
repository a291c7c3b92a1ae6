"""Attention and its gradients: right wherever float64 says so, on every implementation that does not refuse."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace
from typing import Any

import backends
import pytest
import torch
from attention_problems import (
    BACKENDS,
    NAMES,
    ON_GPU,
    PROBLEMS,
    Backend,
    Problem,
    assert_accurate,
    every_backend,
    naive,
    results,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_as_accurate
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import pyeff
from pyeff.ops.attention import BACKWARD, FORWARD

pytestmark = backends.quiet_interpreter

# A GPU compiles a kernel for every kind of problem and dtype, which takes seconds.
GRID = [
    *itertools.product(BACKENDS, PROBLEMS, [torch.float32, torch.float16, torch.bfloat16]),
    *(
        pytest.param(Backend(impl, "cuda"), which, dtype, marks=pytest.mark.gpu)
        for impl in ON_GPU
        for which in PROBLEMS
        for dtype in (torch.bfloat16, *((torch.float32, torch.float16) if which == "packed" else ()))
    ),
]


@pytest.mark.parametrize(("backend", "which", "dtype"), GRID, ids=lambda value: backends.name_of(value) or str(value))
def test_as_accurate_as_the_softmax_of_all_logits(backend: Backend, which: str, dtype: torch.dtype) -> None:
    problem = replace(PROBLEMS[which], dtype=dtype)
    tensors = problem.tensors()
    if backend.refuses(problem, tensors):
        return
    found = results(problem, tensors, impl=backend.impl, device=backend.device)
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float32
    assert_accurate(found, problem, tensors, impl=backend.impl)


MIXED = {
    "packed": Problem((0, 1, 33, 0, 20)),
    "padded": Problem((21, 21), padded=True),
    "whole window": Problem((23,), window=7, causal=False),
    "two lengths": Problem((0, 1, 20), (3, 1, 25)),
    "softcap": Problem((23,), softcap=2.0, size=3.0),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("which", MIXED)
def test_any_backward_takes_the_results_of_any_forward(which: str, device: str) -> None:
    problem = replace(MIXED[which], dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    tensors = problem.tensors()
    impls = [b.impl for b in BACKENDS if b.device == "cpu"] if device == "cpu" else [*ON_GPU, "reference"]
    impls = [impl for impl in dict.fromkeys(impls) if not Backend(impl, device).refuses(problem, tensors)]
    q, k, v, grad_out, grad_lse = (t.to(device) for t in tensors)
    borders = {name: t.to(device) for name, t in problem.borders().items()}
    scale = problem.scale or problem.head_size**-0.5
    options = [borders.get("cu_seqlens"), borders.get("cu_seqlens_k"), problem.causal, scale]
    options += [problem.window, problem.softcap]
    kept = {impl: FORWARD(q, k, v, *options, impl) for impl in impls}
    assert len(impls) > 1
    for out, lse in kept.values():
        for backward in impls:
            grads = BACKWARD(grad_out, q, k, v, out, lse, grad_lse, *options, backward)
            found = [t.cpu() for t in (out, lse, *grads)]
            # Both roundings at once.
            assert_accurate(found, problem, tensors, impl=backward, multiple=6.0)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ON_GPU)
@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("causal", [True, False])
def test_long_samples_on_a_gpu(impl: str, head_size: int, causal: bool) -> None:
    lengths = (600, 1, 0, 431, 300)
    problem = Problem(lengths, head_size=head_size, causal=causal, dtype=torch.bfloat16)
    tensors = problem.tensors()
    for case in (problem, replace(problem, window=200), replace(problem, queries=(515, 515), padded=True)):
        tensors = case.tensors()
        if not Backend(impl, "cuda").refuses(case, tensors):
            assert_accurate(results(case, tensors, impl=impl, device="cuda"), case, tensors)


@pytest.mark.parametrize("causal", [True, False])
def test_reference_is_torch_s_attention(causal: bool) -> None:
    problem = Problem((13, 13), padded=True, dtype=torch.float64, causal=causal)
    q, k, v, *_ = problem.tensors()
    expected = scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=causal, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(pyeff.attention(q, k, v, causal=causal, impl="reference"), expected)


@pytest.mark.parametrize(
    "which", ["causal", "whole window", "softcap", "packed, two lengths", "more queries, whole window"]
)
def test_reference_passes_gradcheck(which: str) -> None:
    problem = replace(
        PROBLEMS[which], dtype=torch.float64, head_size=3, heads=2, key_heads=1, queries=(4, 0, 1), keys=(3, 2, 2)
    )
    q, k, v, *_ = (t.requires_grad_() for t in problem.tensors())

    def attention(q: Tensor, k: Tensor, v: Tensor, reference: bool) -> tuple[Tensor, Tensor]:
        if reference:  # by autograd through the definition
            out, lse = pyeff.reference.attention(q, k, v, **problem.borders(), **problem.options)
        else:  # by the definition of the backward
            out, lse = pyeff.attention(q, k, v, **problem.borders(), **problem.options, return_lse=True)
        return out, lse.masked_fill(lse.isneginf(), 0.0)

    for reference in (True, False):
        assert torch.autograd.gradcheck(functools.partial(attention, reference=reference), (q, k, v))


@every_backend
def test_queries_that_see_nothing(backend: Backend) -> None:
    problem = Problem((9, 3, 2), (4, 0, 7))
    tensors = problem.tensors()
    if backend.refuses(problem, tensors):
        return
    out, lse, dq, dk, dv = results(problem, tensors, impl=backend.impl, device=backend.device)
    blind = torch.tensor([True] * 5 + [False] * 4 + [True] * 3 + [False] * 2)
    assert torch.equal(out[blind], torch.zeros(8, 4, 32))
    assert torch.equal(lse[:, blind], torch.full((4, 8), -math.inf))
    assert torch.equal(dq[blind], torch.zeros(8, 4, 32))
    assert all(t.isfinite().all() for t in (out[~blind], lse[:, ~blind], dk, dv))


@every_backend
@pytest.mark.parametrize(
    "problem",
    [
        Problem((), ()),
        Problem((0, 0), (0, 0)),
        Problem((3, 2), (0, 0)),
        Problem((0, 0), (3, 2)),
        Problem((0, 2), (3, 0)),
        Problem((3, 3), (0, 0), padded=True),
        Problem((0, 0), (3, 3), padded=True),
    ],
    ids=str,
)
def test_nothing_to_attend_to(backend: Backend, problem: Problem) -> None:
    tensors = problem.tensors()
    if backend.refuses(problem, tensors):
        return
    out, lse, *grads = results(problem, tensors, impl=backend.impl, device=backend.device)
    assert torch.equal(out, torch.zeros_like(tensors[0]))
    assert torch.equal(lse, torch.full(tensors[4].shape, -math.inf))
    assert all(torch.equal(grad, torch.zeros_like(t)) for grad, t in zip(grads, tensors[:3], strict=True))


@every_backend
def test_a_sample_with_nan_or_infinity_spoils_only_itself(backend: Backend) -> None:
    problem = Problem((9, 40, 0, 30, 5), dtype=torch.float16)
    tensors = problem.tensors()
    if backend.refuses(problem, tensors):
        return
    clean = results(problem, tensors, impl=backend.impl, device=backend.device)
    # The last token of a sample and the first of the next.
    for t, value in zip(tensors[:3], (math.nan, math.inf, math.nan), strict=True):
        t[48, 0, 3] = value
        t[79, 1, 2] = value
    found = results(problem, tensors, impl=backend.impl, device=backend.device)
    untouched = torch.cat([torch.arange(0, 9), torch.arange(49, 79)])
    for name, now, before in zip(NAMES, found, clean, strict=True):
        where = (slice(None), untouched) if name == "lse" else untouched
        assert torch.equal(now[where], before[where]), name
    assert not found[0][48].isfinite().all()


def strided(tensor: Tensor, how: str) -> Tensor:
    """The same values in another layout; "one token repeated" keeps the first token's."""
    if how == "heads before tokens":
        return tensor.transpose(-3, -2).contiguous().transpose(-3, -2)
    if how == "every other":
        return torch.repeat_interleave(tensor, 2, dim=-1)[..., ::2]
    if how == "part of a projection":
        return torch.cat([tensor, -tensor], dim=-2)[..., : tensor.shape[-2], :]
    return tensor[:1].expand_as(tensor)


@every_backend
@pytest.mark.parametrize("how", ["heads before tokens", "every other", "part of a projection", "one token repeated"])
def test_any_strides(backend: Backend, how: str) -> None:
    problem = Problem((20, 7), dtype=torch.float16)
    tensors = problem.tensors()
    *parts, grad_lse = tensors
    parts = [strided(t.to(backend.device), how) for t in parts]
    if backend.refuses(problem, tensors):
        return
    found = results(problem, [*parts, grad_lse], impl=backend.impl, device=backend.device)
    assert_accurate(found, problem, [*(t.cpu() for t in parts), grad_lse], impl=backend.impl)


@every_backend
@pytest.mark.parametrize("which", ["q", "k", "v", "grad_out"])
def test_offsets_beyond_32_bits(backend: Backend, which: str) -> None:
    # Memory that is reserved and never touched but for the rows themselves.
    problem, far = Problem((1, 2), dtype=torch.float16, heads=1, key_heads=1), 2**30 + 16
    tensors = problem.tensors()
    if backend.refuses(problem, tensors):
        return

    def spread(tensor: Tensor) -> Tensor:
        storage = torch.UntypedStorage(2 * (far * (tensor.shape[0] - 1) + 32), device=backend.device)
        view = torch.tensor([], dtype=torch.float16, device=backend.device)
        view.set_(storage, 0, tensor.shape, (far, 32, 1))
        return view.copy_(tensor)

    moved = list(tensors)
    i = ["q", "k", "v", "grad_out"].index(which)
    moved[i] = spread(tensors[i])
    found = results(problem, moved, impl=backend.impl, device=backend.device)
    assert_accurate(found, problem, tensors, impl=backend.impl)


@pytest.mark.parametrize(
    "backend", [*BACKENDS, pytest.param(Backend("triton", "cuda"), marks=pytest.mark.gpu)], ids=backends.name_of
)
@pytest.mark.parametrize("which", ["packed", "window"])
def test_repeats_give_the_same_bits(backend: Backend, which: str) -> None:
    problem = PROBLEMS[which]
    tensors = problem.tensors()
    options = {"impl": backend.impl, "device": backend.device, "deterministic": True}
    first, again = (results(problem, tensors, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


lengths_of_samples = st.lists(st.integers(0, 12), min_size=1, max_size=6).map(tuple)
kinds = st.sampled_from([{}, {"causal": False}, {"window": 3}, {"window": 3, "causal": False}, {"softcap": 2.0}])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), lengths=lengths_of_samples, kind=kinds)
def test_permuting_samples_permutes_their_results(seed: int, lengths: tuple[int, ...], kind: dict[str, Any]) -> None:
    torch.manual_seed(seed)
    problem = Problem(lengths, head_size=8, **kind)
    tensors = problem.tensors()
    order = torch.randperm(len(lengths)).tolist()
    tokens = torch.cat([torch.arange(sum(lengths)).split(lengths)[s] for s in order])
    permuted = [*(t[tokens] for t in tensors[:4]), tensors[4][:, tokens]]
    found = results(problem, tensors)
    expected = [found[0][tokens], found[1][:, tokens], *(t[tokens] for t in found[2:])]
    of_permuted = results(replace(problem, queries=tuple(lengths[s] for s in order)), permuted)
    exact = naive(replace(problem, queries=tuple(lengths[s] for s in order)), permuted, torch.float64)
    for name, actual, peer, right in zip(NAMES, of_permuted, expected, exact, strict=True):
        assert_as_accurate(actual, right, peer, multiple=3.0, what=name)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), batch=st.integers(1, 4), length=st.integers(1, 12), kind=kinds)
def test_packed_samples_of_one_length_are_a_padded_batch(
    seed: int, batch: int, length: int, kind: dict[str, Any]
) -> None:
    torch.manual_seed(seed)
    padded = Problem((length,) * batch, head_size=8, padded=True, **kind)
    tensors = padded.tensors()
    packed = [*(t.flatten(0, 1) for t in tensors[:4]), tensors[4].transpose(0, 1).flatten(1)]
    found = results(padded, tensors)
    expected = results(replace(padded, padded=False), packed)
    found = [found[1].transpose(0, 1).flatten(1) if t is found[1] else t.flatten(0, 1) for t in found]
    exact = naive(replace(padded, padded=False), packed, torch.float64)
    for name, actual, peer, right in zip(NAMES, found, expected, exact, strict=True):
        assert_as_accurate(actual, right, peer, multiple=3.0, what=name)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), length=st.integers(1, 20), at=st.integers(1, 3), kind=kinds)
def test_splitting_the_heads_changes_nothing(seed: int, length: int, at: int, kind: dict[str, Any]) -> None:
    torch.manual_seed(seed)
    problem = Problem((length,), heads=8, key_heads=4, head_size=8, **kind)
    tensors = problem.tensors()
    whole = results(problem, tensors)
    q, k, v, grad_out, grad_lse = tensors
    for groups in (slice(0, at), slice(at, 4)):
        heads = slice(2 * groups.start, 2 * groups.stop)
        part = replace(problem, heads=heads.stop - heads.start, key_heads=groups.stop - groups.start)
        own = [q[:, heads], k[:, groups], v[:, groups], grad_out[:, heads], grad_lse[heads]]
        found = results(part, own)
        expected = [whole[0][:, heads], whole[1][heads], whole[2][:, heads], whole[3][:, groups], whole[4][:, groups]]
        exact = naive(part, own, torch.float64)
        for name, actual, peer, right in zip(NAMES, found, expected, exact, strict=True):
            assert_as_accurate(actual, right, peer, multiple=3.0, what=name)
