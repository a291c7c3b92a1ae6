"""Attention and its gradients: right wherever float64 says so, on every implementation that does not refuse."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import backends
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_as_accurate
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import pyeff
from pyeff.ops import OPERATIONS
from pyeff.ops._dispatch import interpreting
from pyeff.ops.attention import BACKWARD, FORWARD

pytestmark = backends.quiet_interpreter

NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Problem:
    """Samples of these many queries and keys, packed unless they are all alike."""

    queries: tuple[int, ...] = (37,)
    keys: tuple[int, ...] | None = None
    heads: int = 4
    key_heads: int = 2
    head_size: int = 32
    size: float = 1.0  # of queries
    dtype: torch.dtype = torch.float32
    padded: bool = False
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None

    @property
    def lengths(self) -> list[tuple[int, int]]:
        return list(zip(self.queries, self.keys or self.queries, strict=True))

    @property
    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("causal", "window", "softcap", "scale")}

    def borders(self) -> dict[str, Tensor]:
        if self.padded:
            return {}
        found = {"cu_seqlens": borders_of(self.queries)}
        return found if self.keys is None else found | {"cu_seqlens_k": borders_of(self.keys)}

    def tensors(self) -> list[Tensor]:
        """q, k, v and the gradients of out and lse."""
        queries, keys = (
            (len(of), of[0]) if self.padded else (sum(of),) for of in (self.queries, self.keys or self.queries)
        )
        q = torch.randn(*queries, self.heads, self.head_size) * self.size
        k, v = (torch.randn(*keys, self.key_heads, self.head_size) for _ in range(2))
        grad_out = torch.randn(q.shape)
        grad_lse = torch.randn(*queries[:-1], self.heads, queries[-1])
        return [*(t.to(self.dtype) for t in (q, k, v, grad_out)), grad_lse]


def borders_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def results(
    problem: Problem,
    tensors: list[Tensor],
    *,
    impl: str = "auto",
    device: str = "cpu",
    with_lse: bool = True,
    deterministic: bool = False,
) -> list[Tensor]:
    """out, lse, dq, dk, dv, back on the CPU."""
    q, k, v, grad_out, grad_lse = (t.to(device).detach() for t in tensors)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    borders = {name: t.to(device) for name, t in problem.borders().items()}
    options = problem.options | {"impl": impl, "deterministic": deterministic}
    out, lse = pyeff.attention(*inputs, **borders, **options, return_lse=True)
    outputs, grads = ([out, lse], [grad_out, grad_lse]) if with_lse else ([out], [grad_out])
    return [t.detach().cpu() for t in (out, lse, *torch.autograd.grad(outputs, inputs, grads))]


@functools.cache
def sees(queries: int, keys: int, causal: bool, window: int | None) -> Tensor:
    """Who sees whom, one pair at a time."""
    table = [
        [not (causal and j > i) and (window is None or abs(i - j) < window) for j in range(keys)]
        for i in range(keys - queries, keys)
    ]
    return torch.tensor(table, dtype=torch.bool).view(queries, keys)


def naive(problem: Problem, tensors: list[Tensor], dtype: torch.dtype, *, replayed: bool = False) -> list[Tensor]:
    """All logits at once, every step rounded to `dtype` but for the softmax, by way of lse; autograd for the rest.

    If `replayed`, gradients are those of a backward that is given out and lse alone: of logits formed anew, here summed
    in another order, and dS = P (dO v^T - delta). Where logits are large, their rounding is all of the error of
    P = exp(S - lse), and where one key takes a whole softmax, dS is a difference of sums that should be equal.
    """
    q, k, v, grad_out, grad_lse = (t.detach().to(dtype) for t in tensors)
    grad_lse = tensors[-1].to(torch.float64 if dtype == torch.float64 else torch.float32)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    group = problem.heads // problem.key_heads
    flat_q, flat_k, flat_v, flat_grad = (t.flatten(0, 1) if problem.padded else t for t in (q, k, v, grad_out))
    flat_grad_lse = grad_lse.transpose(0, 1).flatten(1) if problem.padded else grad_lse
    outs, lses, start_q, start_k = [flat_q[:0]], [grad_lse.new_zeros(problem.heads, 0)], 0, 0
    pairs: list[tuple[Tensor, Tensor]] = []
    for queries, keys in problem.lengths:
        rows, columns = slice(start_q, start_q + queries), slice(start_k, start_k + keys)
        start_q, start_k = rows.stop, columns.stop
        own_q, grad = (t[rows].transpose(0, 1) for t in (flat_q, flat_grad))
        own_k, own_v = (t[columns].transpose(0, 1).repeat_interleave(group, 0) for t in (flat_k, flat_v))
        some = sees(queries, keys, problem.causal, problem.window).any(1)
        s = logits(problem, own_q, own_k, grad_lse.dtype)
        lse = s.logsumexp(-1) if keys else s.sum(-1)
        p = torch.exp(s - lse[..., None]).masked_fill(~some[:, None], 0.0).to(dtype)
        outs.append((p @ own_v).transpose(0, 1))
        lses.append(lse.masked_fill(~some, -math.inf))
        if replayed:
            s = logits(problem, own_q.flip(-1), own_k.flip(-1), grad_lse.dtype)
            delta = (grad * (p @ own_v)).sum(-1) - flat_grad_lse[:, rows]
            p = torch.exp(s - lse[..., None]).masked_fill(~some[:, None], 0.0).to(dtype).detach()
            pairs += [(s, p * (grad @ own_v.transpose(1, 2) - delta[..., None])), (p @ own_v, grad)]
    out, lse = torch.cat(outs), torch.cat(lses, 1)
    if problem.padded:
        out = out.unflatten(0, q.shape[:2])
        lse = lse.unflatten(1, q.shape[:2]).transpose(0, 1)
    pairs = pairs if replayed else [(out, grad_out), (lse, grad_lse)]
    grads = torch.autograd.grad([t for t, _ in pairs], [q, k, v], [upstream.to(t.dtype) for t, upstream in pairs])
    return [t.detach() for t in (out, lse, *grads)]


def logits(problem: Problem, q: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
    """S of one sample [H, T, U], -inf where a query does not see a key, 0 where it sees none."""
    table = sees(q.shape[1], k.shape[1], problem.causal, problem.window)
    s = (q @ k.transpose(1, 2)) * (problem.scale or problem.head_size**-0.5)
    if problem.softcap is not None:
        s = problem.softcap * torch.tanh(s / problem.softcap)
    return s.to(dtype).masked_fill(~table, -math.inf).masked_fill(~table.any(1)[:, None], 0.0)


def assert_accurate(
    found: list[Tensor], problem: Problem, tensors: list[Tensor], *, impl: str = "", multiple: float = 3.0
) -> None:
    """As accurate as the plain computation in the same precision; lse as that of unrounded logits, but for torch's CPU
    kernel, whose exponential of 16-bit inputs is a short polynomial."""
    exact, peer = naive(problem, tensors, torch.float64), naive(problem, tensors, problem.dtype, replayed=True)
    if problem.dtype != torch.float32 and impl != "cpu":
        peer[1] = naive(problem, tensors, torch.float32)[1]
    for name, actual, right, rounded in zip(NAMES, found, exact, peer, strict=True):
        assert_as_accurate(actual, right, rounded, multiple=multiple, what=name)


class Backend(backends.Backend):
    def refuses(self, problem: Problem, tensors: list[Tensor]) -> bool:
        """Whether the arguments are not for it, in which case asking for it must say so."""
        q, k, v = (t.to(self.device) for t in tensors[:3])
        borders = {name: t.to(self.device) for name, t in problem.borders().items()}
        try:
            pyeff.explain("attention", q, k, v, **borders, **problem.options, impl=self.impl)
        except RuntimeError:
            with pytest.raises(RuntimeError, match=rf"attention: impl='{self.impl}' cannot be used: "):
                pyeff.attention(q, k, v, **borders, **problem.options, impl=self.impl)
            return True
        return False


BACKENDS = backends.on_cpu(Backend)
ON_GPU = [name for name in OPERATIONS["attention"].implementations if name != "cpu"]
every_backend = pytest.mark.parametrize(
    "backend",
    [*BACKENDS, *(pytest.param(Backend(impl, "cuda"), marks=pytest.mark.gpu) for impl in ON_GPU)],
    ids=backends.name_of,
)

PROBLEMS = {
    "causal": Problem(),
    "whole": Problem(causal=False),
    "padded": Problem((33, 33), padded=True, key_heads=4),
    "padded whole": Problem((33, 33), (40, 40), padded=True, key_heads=1, causal=False),
    "window": Problem((60,), window=7),
    "wide window": Problem((60,), window=100),
    "whole window": Problem((60,), window=7, causal=False),
    "softcap": Problem(softcap=1.5, size=3.0),
    "more keys": Problem((9, 9), (41, 41), padded=True),
    "more keys, window": Problem((9,), (41,), window=5),
    "more queries": Problem((41,), (9,)),
    "more queries, whole window": Problem((41,), (9,), window=4, causal=False),
    "one query against a cache": Problem((1, 1), (45, 45), padded=True),
    "packed": Problem((0, 1, 33, 0, 40, 1, 0)),
    "packed, two lengths": Problem((0, 1, 33, 0, 20, 5), (3, 1, 10, 0, 34, 0)),
    "packed window": Problem((1, 33, 40), window=12),
    "small head": Problem(head_size=8),
    "odd head": Problem(head_size=37),
    "large head": Problem((20,), head_size=136),
    "large logits": Problem(size=300.0),
    "scale": Problem(scale=0.5),
}


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


@every_backend
def test_gradients_of_either_result_alone(backend: Backend) -> None:
    problem = PROBLEMS["packed window"]
    tensors = problem.tensors()
    if backend.refuses(problem, tensors):
        return
    of_out = results(problem, tensors, impl=backend.impl, device=backend.device, with_lse=False)
    assert_accurate(of_out, problem, [*tensors[:4], torch.zeros_like(tensors[4])])
    q, k, v = (t.to(backend.device).requires_grad_() for t in tensors[:3])
    borders = {name: t.to(backend.device) for name, t in problem.borders().items()}
    out, lse = pyeff.attention(q, k, v, **borders, **problem.options, return_lse=True, impl=backend.impl)
    grads = torch.autograd.grad(lse, (q, k, v), tensors[4].to(backend.device))
    found = [t.detach().cpu() for t in (out, lse, *grads)]
    assert_accurate(found, problem, [*tensors[:3], torch.zeros_like(tensors[3]), tensors[4]])


@pytest.mark.parametrize("of", ["out", "lse"])
def test_second_derivatives_are_refused_and_never_left_out(of: str) -> None:
    q, k, v, *_ = (t.requires_grad_() for t in PROBLEMS["padded"].tensors())

    def gradient(create_graph: bool) -> Tensor:
        found = pyeff.attention(q, k, v, return_lse=True)[of == "lse"]
        # Another path to q, by which a derivative would come out even without attention's part.
        return torch.autograd.grad(found.sin().sum() + q.sin().sum(), q, create_graph=create_graph)[0]

    assert torch.equal(gradient(True), gradient(False))
    for inputs in ((q,), (q, v)):
        with pytest.raises(RuntimeError, match=r"no second derivatives: take pyeff\.reference\.attention"):
            torch.autograd.grad(gradient(True).square().sum(), inputs, allow_unused=True)


def test_nothing_but_inputs_and_results_is_kept_for_the_backward() -> None:
    q, k, v = (t.requires_grad_() for t in PROBLEMS["padded"].tensors()[:3])
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out, lse = pyeff.attention(q, k, v, return_lse=True)
    assert sum(t.nbytes for t in kept) == sum(t.nbytes for t in (q, k, v, out, lse))


def test_a_policy_of_selective_checkpointing_can_keep_the_results() -> None:
    q, k, v = (t.requires_grad_() for t in PROBLEMS["padded"].tensors()[:3])
    runs: list[str] = []

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op == torch.ops.pyeff.attention_forward.default:
            runs.append("recomputation" if context.is_recompute else "forward")
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return pyeff.attention(q * 2, k.sin(), v)

    expected = torch.autograd.grad(layer(q, k, v).square().sum(), (q, k, v))
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    out = checkpoint(layer, q, k, v, use_reentrant=False, context_fn=contexts)
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert runs[0] == "forward"
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_compiled_function_is_one_graph() -> None:
    problem = PROBLEMS["packed"]
    q, k, v = (t.requires_grad_() for t in problem.tensors()[:3])
    borders = problem.borders()

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = pyeff.attention(q, k, v, **borders, return_lse=True)
        return out.square().sum() + lse[:, 1:].sum()

    expected = torch.autograd.grad(layer(q, k, v), (q, k, v))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("which", ["padded", "packed, two lengths", "window"])
def test_opcheck(which: str, impl: str) -> None:
    problem = PROBLEMS[which]
    q, k, v, grad_out, grad_lse = problem.tensors()
    borders = problem.borders()
    options = (borders.get("cu_seqlens"), borders.get("cu_seqlens_k"), True, 0.2, problem.window, None, impl)
    torch.library.opcheck(torch.ops.pyeff.attention_forward.default, (q, k, v, *options))
    out, lse = torch.ops.pyeff.attention_forward.default(q, k, v, *options)
    for of_lse in (None, grad_lse):
        arguments = (grad_out, q, k, v, out, lse, of_lse, *options)
        torch.library.opcheck(torch.ops.pyeff.attention_backward.default, arguments)


def test_autocast_casts_as_torch_s_attention_does() -> None:
    q, k, v, *_ = PROBLEMS["padded"].tensors()
    narrow = pyeff.attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = pyeff.attention(q, k.bfloat16(), v)
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, narrow)


def test_the_choice_is_explained() -> None:
    q, k, v, *_ = PROBLEMS["padded"].tensors()
    assert pyeff.explain("attention", q, k, v).impl == "cpu"
    capped = pyeff.explain(pyeff.attention, q, k, v, softcap=30.0)
    assert capped.impl == "reference"
    assert "no softcap" in capped.refused["cpu"]
    assert pyeff.explain("attention", q.double(), k.double(), v.double()).impl == "reference"
    for impl, reason in (("flash", "CUDA tensors"), ("cudnn", "CUDA tensors"), ("flash_attn_2", "CUDA tensors")):
        with pytest.raises(RuntimeError, match=f"impl='{impl}' cannot be used: .*{reason}"):
            pyeff.attention(q, k, v, impl=impl)
    with pytest.raises(RuntimeError, match="no softcap"):
        pyeff.attention(q, k, v, softcap=30.0, impl="cpu")


def test_arguments_that_do_not_fit_are_named() -> None:
    q, k, v = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8)
    cu_seqlens = torch.tensor([0, 3, 5])
    packed = (q[0], k[0], v[0])
    cases: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (TypeError, "k must be a tensor, got list", (q, [1.0], v), {}),
        (TypeError, "q must be float16", (q.long(), k, v), {}),
        (ValueError, r"q must be \[batch, tokens, heads, head size\]", (q[0], k, v), {}),
        (ValueError, r"q must be \[tokens, heads, head size\]", (q, k, v), {"cu_seqlens": cu_seqlens}),
        (ValueError, "v must be on the device of q", (q, k, v.to("meta")), {}),
        (ValueError, "must have one dtype", (q, k.double(), v), {}),
        (ValueError, "v must be of the shape of k", (q, k, v[..., :4]), {}),
        (ValueError, "q and k must have one head size", (q[..., :4], k, v), {}),
        (ValueError, "multiple of the heads of k, got 3 and 2", (q[:, :, :3], k, v), {}),
        (ValueError, "one batch size", (q[:1], k, v), {}),
        (ValueError, "needs cu_seqlens", (q, k, v), {"cu_seqlens_k": cu_seqlens}),
        (ValueError, "give cu_seqlens_k", (q[0, :4], k[0], v[0]), {"cu_seqlens": torch.tensor([0, 4])}),
        (ValueError, "cu_seqlens must rise", packed, {"cu_seqlens": torch.tensor([0, 4, 3, 5])}),
        (ValueError, "cu_seqlens must rise", packed, {"cu_seqlens": torch.tensor([0, 4])}),
        (TypeError, "cu_seqlens must be a tensor", packed, {"cu_seqlens": [0, 5]}),
        (
            ValueError,
            "cu_seqlens_k must rise",
            packed,
            {"cu_seqlens": cu_seqlens, "cu_seqlens_k": torch.tensor([0, 6, 5])},
        ),
        (
            ValueError,
            "cu_seqlens_k must cut the keys into the 2 samples",
            packed,
            {"cu_seqlens": cu_seqlens, "cu_seqlens_k": torch.tensor([0, 5])},
        ),
        (TypeError, "q must be a dense tensor", (q.to_sparse(), k, v), {}),
        (TypeError, "causal must be True or False, got str", (q, k, v), {"causal": "no"}),
        (ValueError, "window must be at least 1", (q, k, v), {"window": 0}),
        (ValueError, "window must be at most", (q, k, v), {"window": 2**63}),
        (TypeError, "window must be a whole number", (q, k, v), {"window": 2.0}),
        (ValueError, "softcap must be positive and finite", (q, k, v), {"softcap": 0.0}),
        (ValueError, "scale must be positive and finite", (q, k, v), {"scale": math.inf}),
        (ValueError, "scale must be positive and finite", (q, k, v), {"scale": 10**400}),
        (TypeError, "scale must be a number", (q, k, v), {"scale": "1"}),
        (ValueError, "impl must be 'auto' or one of", (q, k, v), {"impl": "fast"}),
        (TypeError, "deterministic must be True or False, got int", (q, k, v), {"deterministic": 1}),
    ]
    for error, message, tensors, options in cases:
        with pytest.raises(error, match=message):
            pyeff.attention(*tensors, **options)


# ---------------------------------------------------------------------------------------------------- the CPU kernel


@pytest.mark.parametrize("block", [1, 5, 64])
@pytest.mark.parametrize(
    "which", ["window", "whole window", "more keys", "more queries", "more queries, whole window", "more keys, window"]
)
def test_blocks_of_masked_queries_change_only_the_rounding(
    block: int, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("pyeff.ops._cpu_attention"), "_MASKED_QUERIES", block)
    for dtype in (torch.float32, torch.bfloat16):
        problem = replace(PROBLEMS[which], dtype=dtype)
        tensors = problem.tensors()
        assert_accurate(results(problem, tensors, impl="cpu"), problem, tensors, impl="cpu")


# ------------------------------------------------------------------------------------------------- the Triton kernel


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("tile", [(16, 16), (32, 16), (64, 32)], ids=str)
@pytest.mark.parametrize("which", ["causal", "packed, two lengths", "whole window", "window"])
def test_tiles_change_only_the_rounding(tile: tuple[int, int], which: str, deterministic: bool) -> None:
    forward = importlib.import_module("pyeff.triton_kernels.attention")
    backward = importlib.import_module("pyeff.triton_kernels.attention_backward")
    problem, device = PROBLEMS[which], "cpu" if interpreting() else "cuda"
    tensors = problem.tensors()
    q, k, v, grad_out, grad_lse = (t.to(device) for t in tensors)
    options = problem.options | {"scale": 32**-0.5} | {name: t.to(device) for name, t in problem.borders().items()}
    out, lse = forward.attention(q, k, v, **options, config=forward.Config(*tile, 4, 2, described=deterministic))
    config = backward.Config(*tile, 4, 2)
    configs = backward.Configs(config if deterministic else None, config)
    grads = backward.attention_backward(grad_out, q, k, v, out, lse, grad_lse=grad_lse, **options, configs=configs)
    assert_accurate([t.cpu() for t in (out, lse, *grads)], problem, tensors)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("which", PROBLEMS)
def test_the_deterministic_backward_is_as_accurate(which: str, device: str) -> None:
    if device == "cpu" and not interpreting():
        pytest.skip("a GPU is here: Triton does not interpret")
    problem = replace(PROBLEMS[which], dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    tensors = problem.tensors()
    found = results(problem, tensors, impl="triton", device=device, deterministic=True)
    assert_accurate(found, problem, tensors, impl="triton")


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("head_size", [32, 64, 128, 256])
def test_head_sizes_of_the_triton_kernels(head_size: int, deterministic: bool) -> None:
    device = "cpu" if interpreting() else "cuda"
    problem = Problem((0, 1, 33, 0, 20), head_size=head_size, dtype=torch.float16)
    tensors = problem.tensors()
    found = results(problem, tensors, impl="triton", device=device, deterministic=deterministic)
    assert_accurate(found, problem, tensors, impl="triton")


def test_the_triton_kernels_are_told_to_be_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("pyeff.triton_kernels.attention_backward")
    device = "cpu" if interpreting() else "cuda"
    asked: list[bool] = []
    pick = module.pick_configs
    monkeypatch.setattr(module, "pick_configs", lambda *args: asked.append(args[-1]) or pick(*args))
    problem = Problem((3, 2))
    tensors = problem.tensors()
    for deterministic in (False, True):
        results(problem, tensors, impl="triton", device=device, deterministic=deterministic)
    torch.use_deterministic_algorithms(True)
    try:
        results(problem, tensors, impl="triton", device=device)
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [False, True, True]


def test_descriptors_stay_within_a_sample() -> None:
    module = importlib.import_module("pyeff.triton_kernels.attention")
    device = "cpu" if interpreting() else "cuda"
    problem = Problem((50, 30), dtype=torch.float16, causal=False)
    q, k, v, *_ = (t.to(device) for t in problem.tensors())
    config = module.Config(16, 16, 4, 2, described=True)
    assert module.descriptor(k, config.bn, (9, 0)) is not None
    options = {"scale": 0.1, "cu_seqlens": borders_of(problem.queries), "causal": False, "config": config}
    clean, _ = module.attention(q, k, v, **options)
    for t in (q, k, v):
        t[50:] = math.nan
    found, _ = module.attention(q, k, v, **options)
    assert torch.equal(found[:50], clean[:50])
    # Every second head: rows that begin at 16 bytes and follow one another at 128; and rows that do not.
    assert module.descriptor(k[:, ::2], config.bn, (9, 0)) is not None
    assert module.descriptor(k[..., 1:], config.bn, (9, 0)) is None
