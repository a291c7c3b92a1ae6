"""Per-sample gradient norms of norm layers and vectors against the plain backward pass, and against who else has them.

    pytest benchmarks/bench_norm_layers.py --benchmark-only

The bound reads two activations and writes one, which is all that the backward pass must move.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_as_accurate
from torch import Tensor, nn
from torch.nn import functional

import pyeff

EPS = 1e-5


def activations(device: str) -> tuple[Tensor, Tensor, Tensor, int]:
    """inputs, grad_outputs, cu_seqlens and the number of samples."""
    batch, tokens, d, dtype = (8, 2048, 4096, torch.bfloat16) if device == "cuda" else (8, 128, 576, torch.float32)
    generator = torch.Generator(device).manual_seed(0)
    inputs, grad_outputs = (
        torch.randn(batch * tokens, d, dtype=dtype, device=device, generator=generator) for _ in range(2)
    )
    return inputs, grad_outputs, torch.arange(0, batch * tokens + 1, tokens, device=device), batch


def opacus_sampler(module: nn.Module, inputs: Tensor, grad_outputs: Tensor) -> Callable[[], Any] | None:
    """Per-sample gradients of the layer by Opacus, if that is installed and knows the layer."""
    try:
        from opacus.grad_sample import GradSampleModule
    except ImportError:
        return None
    sampler = GradSampleModule.GRAD_SAMPLERS.get(type(module))
    if sampler is None:
        return None

    def norms() -> dict[Any, Tensor]:
        found = sampler(module, [inputs], grad_outputs)
        return {p: grad.flatten(1).float().square().sum(1) for p, grad in found.items()}

    return norms


@pytest.mark.benchmark(group="norm_layer_grad")
@pytest.mark.parametrize("center", [False, True], ids=["rms", "layer"])
def test_norm_layer_backward_with_norms(contest: Callable[..., Any], device: str, center: bool) -> None:
    inputs, grad_outputs, cu_seqlens, batch = activations(device)
    d, dtype = inputs.shape[1], inputs.dtype
    kinds = {"device": device, "dtype": dtype}
    module = nn.LayerNorm(d, EPS, **kinds) if center else nn.RMSNorm(d, EPS, **kinds)
    leaf = inputs.clone().requires_grad_()
    y = module(leaf)
    parameters = list(module.parameters())
    normed = (functional.layer_norm if center else functional.rms_norm)(inputs, (d,), eps=EPS)

    def ours(impl: str = "auto") -> pyeff.NormLayerGrad:
        return pyeff.norm_layer_grad(
            inputs, grad_outputs, cu_seqlens, weight=module.weight, center=center, eps=EPS, bias_grad=center, impl=impl
        )

    def plain() -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, (leaf, *parameters), grad_outputs, retain_graph=True)

    def materialised() -> tuple[Any, ...]:
        g = grad_outputs.view(batch, -1, d)
        per_sample = torch.einsum("btd,btd->bd", g.float(), normed.view(batch, -1, d).float())
        offsets = g.sum(1, dtype=torch.float32) if center else per_sample
        return plain(), per_sample.square().sum(1), offsets.square().sum(1)

    found, peer = ours(), ours(impl="reference")
    exact = pyeff.norm_layer_grad(
        inputs.double(),
        grad_outputs.double(),
        cu_seqlens,
        weight=module.weight.double(),
        center=center,
        eps=EPS,
        bias_grad=center,
    )
    assert_as_accurate(found.input_grad, exact.input_grad, peer.input_grad, multiple=4.0, what="input_grad")
    assert_as_accurate(found.weight.norms_sq, exact.weight.norms_sq, peer.weight.norms_sq, multiple=4.0, what="norms")

    buffer = torch.empty_like(inputs)
    functions = {
        "backward, torch": plain,
        "pyeff, backward and norms": ours,
        "backward, torch, and an einsum": materialised,
        "two reads and a write": lambda: torch.add(inputs, grad_outputs, out=buffer),
    }
    sampled = opacus_sampler(module, inputs.view(batch, -1, d), grad_outputs.view(batch, -1, d))
    if sampled is not None:
        functions["backward, torch, and Opacus"] = lambda: (plain(), sampled())
    contest(
        "pyeff, backward and norms",
        functions,
        baseline="backward, torch",
        bytes=3 * inputs.nbytes,
        bound="two reads and a write",
    )


@pytest.mark.benchmark(group="vector_grad")
@pytest.mark.parametrize("gain", [False, True], ids=["offset", "gain"])
def test_vector_gradient_with_norms(contest: Callable[..., Any], device: str, gain: bool) -> None:
    inputs, grad_outputs, cu_seqlens, batch = activations(device)
    d = inputs.shape[1]
    x = inputs if gain else None

    def plain() -> Tensor:
        return (grad_outputs * inputs if gain else grad_outputs).sum(0)

    def materialised() -> tuple[Tensor, Tensor]:
        terms = (grad_outputs * inputs if gain else grad_outputs).view(batch, -1, d)
        per_sample = terms.sum(1, dtype=torch.float32)
        return per_sample.sum(0), per_sample.square().sum(1)

    found, peer = (pyeff.vector_grad(grad_outputs, cu_seqlens, inputs=x, impl=i) for i in ("auto", "reference"))
    wide = None if x is None else x.double()
    exact = pyeff.vector_grad(grad_outputs.double(), cu_seqlens, inputs=wide)
    assert_as_accurate(found.grad, exact.grad, peer.grad, multiple=4.0, what="grad")
    assert_as_accurate(found.norms_sq, exact.norms_sq, peer.norms_sq, multiple=4.0, what="norms")
    functions = {
        "gradient, torch": plain,
        "pyeff, gradient and norms": lambda: pyeff.vector_grad(grad_outputs, cu_seqlens, inputs=x),
        "per-sample sums, torch": materialised,
        "a dot of what is read": lambda: torch.dot(
            grad_outputs.flatten(), (inputs if gain else grad_outputs).flatten()
        ),
    }
    contest(
        "pyeff, gradient and norms",
        functions,
        baseline="gradient, torch",
        bytes=(1 + gain) * inputs.nbytes,
        bound="a dot of what is read",
    )
