"""Dots of samples' gradients with a direction: against the product they need, and against forming the gradients.

pytest benchmarks/bench_directional_scores.py --benchmark-only
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_as_accurate
from torch import Tensor

import pyeff


@pytest.mark.benchmark(group="directional_scores")
@pytest.mark.parametrize("samples", ["short", "long"])
def test_dots_with_one_direction(contest: Callable[..., Any], device: str, tiny: bool, samples: str) -> None:
    tokens = {"short": {"cpu": 128, "cuda": 512}, "long": {"cpu": 512, "cuda": 2048}}[samples][device]
    batch, d, p, dtype = (8, 4096, 4096, torch.bfloat16) if device == "cuda" else (8, 1536, 576, torch.float32)
    if tiny:
        batch, tokens, d, p = 2, tokens // 64, 24, 40
    generator = torch.Generator(device).manual_seed(0)
    inputs, grad_outputs, directions = (
        torch.randn(*shape, dtype=dtype, device=device, generator=generator)
        for shape in ((batch * tokens, d), (batch * tokens, p), (1, p, d))
    )
    borders = torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32, device=device)

    exact, peer = (
        pyeff.directional_scores(*of, impl="reference")
        for of in (
            (inputs.double(), grad_outputs.double(), borders, directions.double()),
            (inputs, grad_outputs, borders, directions),
        )
    )
    found = pyeff.directional_scores(inputs, grad_outputs, borders, directions)
    assert_as_accurate(found, exact, peer, multiple=4.0, what="scores")
    del exact, peer

    weight = directions[0].T
    products = torch.empty(batch * tokens, p, dtype=dtype, device=device)

    def composed() -> Tensor:
        """The same in torch: the products in memory, in the dtype of the activations."""
        torch.mm(inputs, weight, out=products)
        return (products * grad_outputs).view(batch, -1).sum(1, dtype=torch.float32)

    contest(
        "pyeff",
        {
            "the product, torch.mm": lambda: torch.mm(inputs, weight, out=products),
            "pyeff": lambda: pyeff.directional_scores(inputs, grad_outputs, borders, directions),
            "torch, products in memory": composed,
            "pyeff.linear_grad, dots alone": lambda: pyeff.linear_grad(
                inputs, grad_outputs, borders, weight_grad=False, norms=False, reference=directions[0]
            ),
            "pyeff.linear_grad, norms too": lambda: pyeff.linear_grad(
                inputs, grad_outputs, borders, weight_grad=False, reference=directions[0]
            ),
            "pyeff, and Gram norms": lambda: (
                pyeff.directional_scores(inputs, grad_outputs, borders, directions),
                pyeff.gram_norms(inputs, grad_outputs, borders),
            ),
        },
        baseline="the product, torch.mm",
        target=1.15,
        flops=2.0 * batch * tokens * d * p,
        bound="the product, torch.mm",
    )
