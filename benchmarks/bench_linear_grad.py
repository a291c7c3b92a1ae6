"""Per-sample gradient norms of linear layers against the gradient alone, and against who else computes them.

    pytest benchmarks/bench_linear_grad.py --benchmark-only

The targets are of a training step (CPU) and of the weight gradient (GPU); what they are made of is timed beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from oracle import assert_as_accurate
from torch import Tensor, nn
from torch.nn import functional

import pyeff


def tokens_of(lengths: list[int], d: int, p: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """inputs, grad_outputs and cu_seqlens."""
    generator = torch.Generator(device).manual_seed(0)
    inputs = torch.randn(sum(lengths), d, dtype=dtype, device=device, generator=generator)
    grad_outputs = torch.randn(sum(lengths), p, dtype=dtype, device=device, generator=generator)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    return inputs, grad_outputs, cu_seqlens


def check_answer(inputs: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor) -> None:
    """Some rows of the gradient, and all norms, against float64 before anything is timed."""
    exact = pyeff.linear_grad(inputs.double(), grad_outputs.double(), cu_seqlens, impl="reference")
    peer = pyeff.linear_grad(inputs, grad_outputs, cu_seqlens, impl="reference")
    found = pyeff.linear_grad(inputs, grad_outputs, cu_seqlens)
    assert_as_accurate(found.weight_grad, exact.weight_grad, peer.weight_grad, multiple=4.0, what="weight_grad")
    assert_as_accurate(found.norms_sq, exact.norms_sq, peer.norms_sq, multiple=4.0, what="norms_sq")
    grams, peer_grams = (
        pyeff.gram_norms(inputs, grad_outputs, cu_seqlens, impl=impl) for impl in ("auto", "reference")
    )
    assert_as_accurate(grams, exact.norms_sq, peer_grams, multiple=4.0, what="gram_norms")


def ghost_norms(inputs: Tensor, grad_outputs: Tensor) -> Tensor:
    """Opacus' way: both Gram matrices [B, T, T] whole, in the dtype of the gradients."""
    return (inputs @ inputs.transpose(1, 2)).mul_(grad_outputs @ grad_outputs.transpose(1, 2)).sum((1, 2))


def panels_of_cublas(inputs: Tensor, grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
    """A sample and some rows at a time, small enough that the norm is read from the L2 cache."""
    (batch, _, d), p, rows = inputs.shape, grad_outputs.shape[2], 512
    total = torch.zeros(p, d, device=inputs.device)
    norms_sq = torch.zeros(batch, device=inputs.device)
    for first in range(0, p, rows):
        part = total[first : first + rows]
        for s in range(batch):
            panel = torch.mm(grad_outputs[s, :, first : first + rows].T, inputs[s], out_dtype=torch.float32)
            part += panel
            norms_sq[s] += torch.linalg.vector_norm(panel).square()
    return total, norms_sq


def materialised(inputs: Tensor, grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
    """What vmap(grad) comes to for a linear layer: a gradient for every sample [B, p, d], then norms and sum."""
    per_sample = grad_outputs.transpose(1, 2) @ inputs
    return per_sample.sum(0), per_sample.flatten(1).float().square().sum(1)


@pytest.mark.benchmark(group="linear_grad")
@pytest.mark.parametrize("samples", ["short", "long"])
def test_norms_beside_the_weight_gradient(contest: Callable[..., Any], device: str, samples: str) -> None:
    tokens = {"short": {"cpu": 128, "cuda": 512}, "long": {"cpu": 512, "cuda": 2048}}[samples][device]
    batch, d, p, dtype = (8, 4096, 4096, torch.bfloat16) if device == "cuda" else (8, 576, 1536, torch.float32)
    inputs, grad_outputs, cu_seqlens = tokens_of([tokens] * batch, d, p, dtype, device)
    check_answer(inputs, grad_outputs, cu_seqlens)
    reference = torch.randn(p, d, dtype=dtype, device=device)
    a, g = inputs.view(batch, tokens, d), grad_outputs.view(batch, tokens, p)

    functions = {
        "weight gradient, torch.mm": lambda: torch.mm(grad_outputs.T, inputs),
        "pyeff, gradient and norms": lambda: pyeff.linear_grad(inputs, grad_outputs, cu_seqlens),
        "pyeff, gradient, norms, dots": lambda: pyeff.linear_grad(
            inputs, grad_outputs, cu_seqlens, reference=reference
        ),
        "pyeff, norms alone": lambda: pyeff.linear_grad(inputs, grad_outputs, cu_seqlens, weight_grad=False),
        "pyeff, Gram norms alone": lambda: pyeff.gram_norms(inputs, grad_outputs, cu_seqlens),
        "torch.mm, pyeff Gram norms": lambda: (
            torch.mm(grad_outputs.T, inputs),
            pyeff.gram_norms(inputs, grad_outputs, cu_seqlens),
        ),
        "torch.mm, ghost norms": lambda: (torch.mm(grad_outputs.T, inputs), ghost_norms(a, g)),
        "a gradient for every sample": lambda: materialised(a, g),
    }
    if device == "cuda":
        functions["cuBLAS panels in L2"] = lambda: panels_of_cublas(a, g)
    contest(
        "pyeff, gradient and norms",
        functions,
        baseline="weight gradient, torch.mm",
        target=1 / 0.85 if device == "cuda" and samples == "long" else None,
        flops=2 * batch * tokens * d * p,
        bound="weight gradient, torch.mm",
    )


@pytest.mark.benchmark(group="linear_grad")
def test_packed_samples_of_many_lengths(contest: Callable[..., Any], device: str) -> None:
    d, p, dtype, total = (4096, 4096, torch.bfloat16, 16384) if device == "cuda" else (576, 1536, torch.float32, 4096)
    # 64 to 512 tokens with a mean near 200: short samples are the many.
    draws = 64 + 448 * torch.rand(1000, generator=torch.Generator().manual_seed(0)) ** 2.3
    lengths: list[int] = []
    for length in draws.int().tolist():
        lengths.append(min(length, total - sum(lengths)))
        if sum(lengths) == total:
            break
    inputs, grad_outputs, cu_seqlens = tokens_of(lengths, d, p, dtype, device)
    check_answer(inputs, grad_outputs, cu_seqlens)

    functions = {
        "weight gradient, torch.mm": lambda: torch.mm(grad_outputs.T, inputs),
        "pyeff, gradient and norms": lambda: pyeff.linear_grad(inputs, grad_outputs, cu_seqlens),
        "torch.mm, pyeff Gram norms": lambda: (
            torch.mm(grad_outputs.T, inputs),
            pyeff.gram_norms(inputs, grad_outputs, cu_seqlens),
        ),
        "pyeff, Gram norms alone": lambda: pyeff.gram_norms(inputs, grad_outputs, cu_seqlens),
    }
    contest(
        "pyeff, gradient and norms",
        functions,
        baseline="weight gradient, torch.mm",
        target=1.25 if device == "cuda" else None,
        flops=2 * sum(lengths) * d * p,
        bound="weight gradient, torch.mm",
    )


@pytest.mark.benchmark(group="linear_grad")
@pytest.mark.parametrize("tokens", [256, 2048])
def test_launch_choices_of_the_gpu(contest: Callable[..., Any], device: str, tokens: int) -> None:
    if device == "cpu":
        pytest.skip("chooses between tiles of the GPU's kernel")
    from pyeff.triton_kernels.linear_grad import Config, linear_grad

    d = p = 4096
    inputs, grad_outputs, cu_seqlens = tokens_of([tokens] * (16384 // tokens), d, p, torch.bfloat16, device)
    # None of these spills on sm_90; the narrow ones leave room for two programs on a processor.
    tiles = [(128, 128, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 32, 8, 4), (128, 64, 64, 4, 3), (128, 64, 64, 8, 3)]
    functions = {
        f"tile {tile}": partial(linear_grad, inputs, grad_outputs, cu_seqlens, config=Config(*tile)) for tile in tiles
    }
    functions["weight gradient, torch.mm"] = lambda: torch.mm(grad_outputs.T, inputs)
    contest(
        f"tile {tiles[0]}",
        functions,
        baseline="weight gradient, torch.mm",
        flops=2 * 16384 * d * p,
        bound="weight gradient, torch.mm",
    )


class WatchedLinear(torch.autograd.Function):
    """A linear layer whose backward adds every sample's squared norm to `norms_sq`."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, cu_seqlens: Tensor, norms_sq: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.cu_seqlens, ctx.norms_sq = cu_seqlens, norms_sq
        return functional.linear(inputs, weight)

    @staticmethod
    def backward(ctx: Any, grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        found = pyeff.linear_grad(inputs.flatten(0, 1), grad_outputs.flatten(0, 1), ctx.cu_seqlens)
        ctx.norms_sq += found.norms_sq
        return grad_outputs @ weight, found.weight_grad, None, None


class Blocks(nn.Module):
    """Six transformer MLP blocks without biases."""

    def __init__(self, d: int, f: int) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(d, f, bias=False) for _ in range(6))
        self.down = nn.ModuleList(nn.Linear(f, d, bias=False) for _ in range(6))

    def forward(self, x: Tensor, linear: Callable[[Tensor, Tensor], Tensor] = functional.linear) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + linear(functional.gelu(linear(x, up.weight)), down.weight)
        return x


@pytest.mark.benchmark(group="linear_grad")
@pytest.mark.parametrize(("tokens", "target"), [(128, 1.12), (512, 1.06)], ids=["128 tokens", "512 tokens"])
def test_training_step_of_six_blocks(contest: Callable[..., Any], device: str, tokens: int, target: float) -> None:
    batch, d, f = 8, 576, 1536
    torch.manual_seed(0)
    model = Blocks(d, f).to(device)
    x = torch.randn(batch, tokens, d, device=device, requires_grad=True)
    cu_seqlens = torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32, device=device)

    def step(linear: Callable[[Tensor, Tensor], Tensor] = functional.linear) -> None:
        model.zero_grad(set_to_none=True)
        x.grad = None
        model(x, linear).square().sum().backward()

    def watched() -> Tensor:
        norms_sq = torch.zeros(batch, device=device)
        step(lambda inputs, weight: WatchedLinear.apply(inputs, weight, cu_seqlens, norms_sq))
        return norms_sq

    norms_sq = watched()
    for s in range(2):
        gradients = torch.autograd.grad(model(x[s : s + 1]).square().sum(), list(model.parameters()))
        torch.testing.assert_close(norms_sq[s], sum(gradient.square().sum() for gradient in gradients))
    contest(
        "pyeff, step with norms",
        {"plain step": step, "pyeff, step with norms": watched},
        baseline="plain step",
        target=target if device == "cpu" else None,
        flops=3 * 12 * 2 * batch * tokens * d * f,
        bound="plain step",
    )
