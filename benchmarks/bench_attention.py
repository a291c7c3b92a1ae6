"""Attention, forward and backward, against every kernel that is installed.

    pytest benchmarks/bench_attention.py --benchmark-only

On a GPU all implementations run the same bf16 problem; on a CPU pyeff calls torch's own kernel, so what is measured is
what it adds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from oracle import assert_as_accurate
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import pyeff
from pyeff.ops.attention import BACKWARD, FORWARD

# By the speed that others have published; the first that is installed is what ours is held against.
ON_GPU = ("flash_attn_3", "flash_attn_4", "cudnn", "flash_attn_2", "flash", "triton")


def problem(batch: int, tokens: int, heads: int, head_size: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v and the gradient of out."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, tokens, heads, head_size)
    return [torch.randn(shape, dtype=dtype, device=device, generator=generator) for _ in range(4)]


def options(q: Tensor, impl: str) -> tuple[Any, ...]:
    """What the operators want beside tensors: no borders, causal, the usual scale, no window, no softcap."""
    return (None, None, True, q.shape[-1] ** -0.5, None, None, impl)


def results(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, impl: str) -> tuple[Tensor, ...]:
    out, lse = FORWARD(q, k, v, *options(q, impl))
    return out, lse, *BACKWARD(grad_out, q, k, v, out, lse, None, *options(q, impl))


def check_answer(tensors: list[Tensor], impl: str) -> None:
    """Two heads of the first sample against float64 before anything is timed."""
    some = [t[:1, :, :2] for t in tensors]
    exact = results(*(t.double() for t in some), "reference")
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in some[:3]]
        q, k, v = (t.transpose(1, 2) for t in inputs)
        s = (q @ k.transpose(2, 3)).float() * q.shape[-1] ** -0.5
        s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), float("-inf"))
        out = (s.softmax(-1).to(q.dtype) @ v).transpose(1, 2)
        peer = (out.detach(), s.logsumexp(-1).detach(), *torch.autograd.grad(out, inputs, some[3]))
    names = ("out", "lse", "dq", "dk", "dv")
    for name, found, right, rounded in zip(names, results(*some, impl), exact, peer, strict=True):
        assert_as_accurate(found, right, rounded, multiple=4.0, what=f"{name} of {impl}")


def available(tensors: list[Tensor]) -> list[str]:
    """The implementations that take these, fastest first by reputation."""
    found = []
    for impl in ON_GPU:
        try:
            pyeff.explain("attention", *tensors[:3], impl=impl)
        except RuntimeError:
            continue
        found.append(impl)
    return found


def flops_of(tensors: list[Tensor], products: int) -> float:
    """Those of `products` matrix products of all queries with the keys they see."""
    batch, tokens, heads, head_size = tensors[0].shape
    return products * 2 * head_size * batch * heads * tokens * (tokens + 1) / 2


@pytest.mark.benchmark(group="attention")
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("tokens", [2048, 4096, 8192, 16384])
def test_forward_on_a_gpu(contest: Callable[..., Any], device: str, tokens: int, head_size: int) -> None:
    if device == "cpu":
        pytest.skip("compares kernels for GPUs")
    tensors = problem(16384 // tokens, tokens, 2048 // head_size, head_size, torch.bfloat16, device)
    if tokens == 2048:
        check_answer(tensors, "triton")
    q, k, v, _ = tensors
    functions = {impl: partial(FORWARD, q, k, v, *options(q, impl)) for impl in available(tensors)}
    contest(
        "triton",
        functions,
        baseline="flash",
        target=1 / 1.1 if head_size == 128 else None,
        flops=flops_of(tensors, 2),
        bound=next(iter(functions)),
    )


@pytest.mark.benchmark(group="attention")
@pytest.mark.parametrize("pass_", ["forward", "backward"])
@pytest.mark.parametrize("tokens", [2048, 4096, 8192, 16384])
def test_against_the_fastest_installed(contest: Callable[..., Any], device: str, tokens: int, pass_: str) -> None:
    if device == "cpu":
        pytest.skip("compares kernels for GPUs")
    tensors = problem(16384 // tokens, tokens, 16, 128, torch.bfloat16, device)
    q, k, v, grad_out = tensors
    found = available(tensors)
    if pass_ == "forward":
        functions = {impl: partial(FORWARD, q, k, v, *options(q, impl)) for impl in (found[0], "triton")}
    else:
        if tokens == 2048:
            check_answer(tensors, "triton")
        kept = {impl: FORWARD(q, k, v, *options(q, impl)) for impl in found}
        functions = {impl: partial(BACKWARD, grad_out, q, k, v, *kept[impl], None, *options(q, impl)) for impl in found}
    contest(
        "triton",
        functions,
        baseline=found[0],
        target=1 / (0.75 if pass_ == "forward" else 0.7),
        flops=flops_of(tensors, 2 if pass_ == "forward" else 5),
        bound=found[0],
    )


@pytest.mark.benchmark(group="attention")
def test_the_same_bits_in_every_run(contest: Callable[..., Any], device: str) -> None:
    if device == "cpu":
        pytest.skip("compares forms of the GPU's kernels")
    tensors = problem(2, 8192, 16, 128, torch.bfloat16, device)
    q, k, v, grad_out = tensors
    kept = FORWARD(q, k, v, *options(q, "triton"))
    arguments = (grad_out, q, k, v, *kept, None, *options(q, "triton"))
    functions = {
        "deterministic": partial(BACKWARD, *arguments, True),
        "atomics": partial(BACKWARD, *arguments, False),
        "flash": partial(BACKWARD, grad_out, q, k, v, *kept, None, *options(q, "flash")),
    }
    contest("deterministic", functions, baseline="atomics", flops=flops_of(tensors, 5), bound="flash")


@pytest.mark.benchmark(group="attention")
@pytest.mark.parametrize("tokens", [512, 2048])
@pytest.mark.parametrize("pass_", ["forward", "training"])
def test_beside_torch_s_attention(contest: Callable[..., Any], device: str, tokens: int, pass_: str) -> None:
    dtype, batch, heads = (torch.bfloat16, 8, 32) if device == "cuda" else (torch.float32, 1, 8)
    tensors = problem(batch, tokens, heads, 64, dtype, device)
    check_answer(tensors, "auto")
    *inputs, grad_out = tensors
    if pass_ == "training":
        inputs = [t.requires_grad_() for t in inputs]

    def torchs() -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in inputs)
        return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def training(attend: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(), inputs, grad_out)

    functions: dict[str, Callable[[], object]] = {"torch": torchs, "pyeff": partial(pyeff.attention, *inputs)}
    if pass_ == "training":
        functions = {name: partial(training, attend) for name, attend in functions.items()}
    contest(
        "pyeff",
        functions,
        baseline="torch",
        target=1.03 if device == "cpu" else None,
        flops=flops_of(tensors, 2 if pass_ == "forward" else 7),
        bound="torch",
    )
