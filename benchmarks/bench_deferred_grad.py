"""A step on half a batch that is chosen by its gradients, against a step on a batch of that half alone.

    pytest benchmarks/bench_deferred_grad.py --benchmark-only

Six transformer MLP blocks, as in bench_linear_grad.py. Choosing by two passes costs 3 such steps: a pass forward and
backward over the whole batch with norms, and a step on what was chosen.
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


class Blocks(nn.Module):
    """Six transformer MLP blocks without biases."""

    def __init__(self, d: int, f: int) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(d, f, bias=False) for _ in range(6))
        self.down = nn.ModuleList(nn.Linear(f, d, bias=False) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(functional.gelu(up(x)))
        return x


@pytest.mark.benchmark(group="deferred_grad")
@pytest.mark.parametrize("tokens", [128, 512], ids=["128 tokens", "512 tokens"])
def test_choosing_half_a_batch(contest: Callable[..., Any], device: str, tiny: bool, tokens: int) -> None:
    batch, d, f = 8, 576, 1536
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if device == "cuda":
        batch, d, f, tokens = 16, 2048, 5632, 4 * tokens
    if tiny:
        batch, tokens, d, f = 4, tokens // 64, 24, 40
    torch.manual_seed(0)
    model = Blocks(d, f).to(device, dtype)
    x = torch.randn(batch, tokens, d, device=device, dtype=dtype, requires_grad=True)
    half = list(range(0, batch, 2))
    rows = x.detach()[half].requires_grad_()

    def cleared(inputs: Tensor) -> Tensor:
        model.zero_grad(set_to_none=True)
        inputs.grad = None
        return model(inputs).square().sum()

    def plain(inputs: Tensor = rows) -> None:
        cleared(inputs).backward()

    def deferred(**options: Any) -> None:
        with pyeff.observe(model, defer=True, **options) as seen:
            cleared(x).backward()
            seen.accumulate(half)

    def twice() -> None:
        with pyeff.observe(model, gradient=False):
            cleared(x).backward()
        plain()

    factored = pyeff.FactoredSketch(16, 16)
    reference = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    plain()
    peer = [p.grad.clone() for p in model.parameters()]
    exact = torch.autograd.grad(model.double()(rows.double()).square().sum(), list(model.parameters()))
    model.to(dtype)
    deferred()
    for p, wanted, same in zip(model.parameters(), exact, peer, strict=True):
        assert_as_accurate(p.grad, wanted, same, multiple=4.0, what="gradient of the chosen half")

    contest(
        "pyeff, deferred, with norms",
        {
            "step on half the batch": plain,
            "pyeff, deferred, nothing measured": lambda: deferred(norms=False),
            "pyeff, deferred, factored sketches": lambda: deferred(norms=False, sketch=factored),
            "pyeff, deferred, with norms": deferred,
            "pyeff, deferred, dots": lambda: deferred(norms=False, reference=reference),
            "pyeff, norms, then a step": twice,
            "step on the whole batch": lambda: plain(x),
        },
        baseline="step on half the batch",
        target=1.67,
        flops=2.5 * 12 * 2 * batch * tokens * d * f,
        pairs=10,
        enforced=False,
    )
