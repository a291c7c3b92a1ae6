"""Kernels share torch's threads: what runs between two of our calls is as fast as without them."""

from __future__ import annotations

import time

import torch
from timing import STEADY

import pyeff
from pyeff.optim import AdamW8bit


def test_a_matmul_between_two_calls_is_not_slowed() -> None:
    """A second OpenMP runtime would keep its threads spinning on the cores that torch's matmul needs."""
    left, product = torch.randn(768, 768), torch.zeros(768, 768)
    hidden, weight, targets = torch.randn(64, 64), torch.randn(4096, 64), torch.zeros(64, dtype=torch.long)
    parameter = torch.nn.Parameter(torch.randn(200_000))
    parameter.grad = torch.randn(200_000)
    optimizer = AdamW8bit([parameter])
    before = {
        "a call of torch": lambda: hidden.mul_(1.0),
        "AdamW8bit.step": optimizer.step,
        "linear_cross_entropy_scores": lambda: pyeff.linear_cross_entropy_scores(hidden, weight, targets),
    }
    seconds: dict[str, float] = dict.fromkeys(before, float("inf"))
    for _ in range(40):
        for name, call in before.items():
            call()
            start = time.perf_counter()
            torch.mm(left, left, out=product)
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    alone = seconds.pop("a call of torch")
    for name, between in seconds.items():
        assert between <= STEADY * alone, f"after {name}: {between / alone:.2f} x"
