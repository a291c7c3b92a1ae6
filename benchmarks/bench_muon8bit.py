"""Muon and Adafactor with states of a byte against torch's, and against the products that Muon cannot do without.

pytest benchmarks/bench_muon8bit.py --benchmark-only
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_as_accurate
from torch import nn

from pyeff.optim import Adafactor8bit, AdamW8bit, Muon8bit, newton_schulz

LR, DECAY = 1e-3, 0.1


def matrices(device: str, *, tiny: bool) -> list[nn.Parameter]:
    """The matrices of a layer: square ones of attention, wide ones of an MLP; in bf16 on a GPU."""
    width = 64 if tiny else 4096 if device == "cuda" else 128
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    made = []
    for rows, columns in ((1, 1), (1, 1), (3, 1), (1, 3)):
        shape = (rows * width, columns * width)
        p = nn.Parameter((torch.randn(shape, device=device, generator=generator) * 0.02).to(dtype))
        p.grad = (torch.randn(shape, device=device, generator=generator) * 1e-3).to(dtype)
        made.append(p)
    return made


def products(params: list[nn.Parameter]) -> float:
    """FLOPs of five rounds of Newton-Schulz for each."""
    sides = [sorted(p.shape) for p in params]
    return sum(5.0 * (4 * short**2 * long + 2 * short**3) for short, long in sides)


def check_answer(device: str) -> None:
    """The first step, whose direction is that of the gradient, against float64; torch's is in bf16 everywhere."""
    ours, theirs = (matrices(device, tiny=True)[2].detach().float() for _ in range(2))
    g = matrices(device, tiny=True)[2].grad
    assert g is not None
    g = g.float()
    exact = ours.double() * (1 - LR * DECAY) - LR * 3**0.5 * newton_schulz(g.double().cpu()).to(device)
    for cls, x in ((Muon8bit, ours), (torch.optim.Muon, theirs)):
        p = nn.Parameter(x)
        p.grad = g.clone()
        cls([p], lr=LR, weight_decay=DECAY).step()
    assert_as_accurate(ours, exact, theirs, what="first step")


@pytest.mark.benchmark(group="muon8bit")
def test_muon(contest: Callable[..., Any], device: str, tiny: bool) -> None:
    """The bound is Newton-Schulz of the same matrices, in bf16 on a GPU and in fp32 on a CPU; torch's is in bf16."""
    check_answer(device)
    grads = [p.grad.float() for p in matrices(device, tiny=tiny) if p.grad is not None]
    contest(
        "pyeff Muon8bit",
        {
            "torch Muon": torch.optim.Muon(matrices(device, tiny=tiny), lr=LR).step,
            "Newton-Schulz alone": lambda: [newton_schulz(g) for g in grads],
            "pyeff AdamW8bit": AdamW8bit(matrices(device, tiny=tiny), lr=LR).step,
            "pyeff Muon8bit": Muon8bit(matrices(device, tiny=tiny), lr=LR).step,
        },
        baseline="torch Muon",
        flops=products(matrices(device, tiny=tiny)),
        bound="Newton-Schulz alone",
    )


@pytest.mark.benchmark(group="muon8bit")
def test_adafactor(contest: Callable[..., Any], device: str, tiny: bool) -> None:
    """torch's waits for the device three times a parameter; ours does not wait."""
    contest(
        "pyeff Adafactor8bit",
        {
            "torch Adafactor": torch.optim.Adafactor(matrices(device, tiny=tiny), lr=LR).step,
            "pyeff AdamW8bit": AdamW8bit(matrices(device, tiny=tiny), lr=LR).step,
            "pyeff Adafactor8bit, first moment": Adafactor8bit(matrices(device, tiny=tiny), lr=LR, beta1=0.9).step,
            "pyeff Adafactor8bit": Adafactor8bit(matrices(device, tiny=tiny), lr=LR).step,
        },
        baseline="torch Adafactor",
    )
