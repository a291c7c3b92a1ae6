"""Per-sample gradient norms of an embedding against its plain backward pass, and against who else has them.

    pytest benchmarks/bench_embedding_grad.py --benchmark-only

The bound clears the table's gradient and copies the activations' once, which is all that must be moved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_as_accurate
from torch import Tensor

import pyeff


def by_unique_pairs(indices: Tensor, grad_outputs: Tensor, batch: int) -> Tensor:
    """Opacus' way: unique (sample, index) pairs, their rows added up, squares added by sample."""
    samples = torch.arange(batch, device=indices.device).repeat_interleave(indices.numel() // batch)
    pairs, which = torch.unique(torch.stack([samples, indices], 1), dim=0, return_inverse=True)
    rows = grad_outputs.new_zeros(pairs.shape[0], grad_outputs.shape[1]).index_add_(0, which, grad_outputs)
    return torch.zeros(batch, device=indices.device).index_add_(0, pairs[:, 0], rows.float().square().sum(1))


@pytest.mark.benchmark(group="embedding_grad")
@pytest.mark.parametrize("skewed", [False, True], ids=["uniform", "skewed"])
def test_embedding_backward_with_norms(contest: Callable[..., Any], device: str, skewed: bool) -> None:
    batch, tokens, d, entries, dtype = (
        (8, 2048, 4096, 131072, torch.bfloat16) if device == "cuda" else (8, 128, 576, 49152, torch.float32)
    )
    generator = torch.Generator(device).manual_seed(0)
    draws = torch.rand(batch * tokens, device=device, generator=generator)
    # Words are skewed: here the most frequent index has some 8 % of the tokens.
    indices = ((draws**4 if skewed else draws) * (entries // 4 if skewed else entries)).long()
    grad_outputs = torch.randn(batch * tokens, d, dtype=dtype, device=device, generator=generator)
    cu_seqlens = torch.arange(0, batch * tokens + 1, tokens, device=device)

    def plain() -> Tensor:
        return torch.ops.aten.embedding_dense_backward(grad_outputs, indices, entries, -1, False)

    def materialised() -> tuple[Tensor, Tensor]:
        total, norms_sq = torch.zeros(entries, d, dtype=dtype, device=device), []
        for g, ids in zip(grad_outputs.chunk(batch), indices.chunk(batch), strict=True):
            grad = torch.ops.aten.embedding_dense_backward(g, ids, entries, -1, False)
            total += grad
            norms_sq.append(torch.linalg.vector_norm(grad, dtype=torch.float32).square())
        return total, torch.stack(norms_sq)

    found, peer = (
        pyeff.embedding_grad(indices, grad_outputs, cu_seqlens, entries, impl=i) for i in ("auto", "reference")
    )
    exact = pyeff.embedding_grad(indices, grad_outputs.double(), cu_seqlens, entries)
    assert_as_accurate(found.weight_grad, exact.weight_grad, peer.weight_grad, multiple=4.0, what="weight_grad")
    assert_as_accurate(found.norms_sq, exact.norms_sq, peer.norms_sq, multiple=4.0, what="norms_sq")
    del exact, peer

    copied = torch.empty_like(grad_outputs)
    functions = {
        "backward, torch": plain,
        "pyeff, backward and norms": lambda: pyeff.embedding_grad(indices, grad_outputs, cu_seqlens, entries),
        "pyeff, norms alone": lambda: pyeff.embedding_grad(
            indices, grad_outputs, cu_seqlens, entries, weight_grad=False
        ),
        "backward, torch, and unique pairs": lambda: (plain(), by_unique_pairs(indices, grad_outputs, batch)),
        "a gradient for every sample": materialised,
        "clear and copy": lambda: (torch.zeros(entries, d, dtype=dtype, device=device), copied.copy_(grad_outputs)),
    }
    contest(
        "pyeff, backward and norms",
        functions,
        baseline="backward, torch",
        bytes=entries * d * dtype.itemsize + grad_outputs.nbytes,
        bound="clear and copy",
    )
