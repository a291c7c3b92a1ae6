"""What attention is asked in its tests, and how close its answers must be to those of float64."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

import backends
import pytest
import torch
from oracle import assert_as_accurate
from torch import Tensor

import pyeff
from pyeff.ops import OPERATIONS

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
        if pyeff.explain("attention", q, k, v, **borders, **problem.options, impl=self.impl).impl != "none":
            return False
        with pytest.raises(RuntimeError, match=rf"attention: impl='{self.impl}' cannot be used: "):
            pyeff.attention(q, k, v, **borders, **problem.options, impl=self.impl)
        return True


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
