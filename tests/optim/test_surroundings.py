"""What a caller set for torch as a whole (autocast, a default device, a default dtype) does not reach into a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyeff.optim import Adafactor8bit, AdamW8bit, GradientRelease, Muon8bit

MAKERS = [
    pytest.param(AdamW8bit, {}, id="adamw"),
    pytest.param(Muon8bit, {}, id="muon"),
    pytest.param(Adafactor8bit, {}, id="adafactor"),
    pytest.param(Adafactor8bit, {"beta1": 0.9}, id="adafactor-momentum"),
]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS = {
    "nothing": contextlib.nullcontext,
    "autocast to bf16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to fp16": lambda: torch.autocast("cpu", torch.float16),
    "another default device": lambda: torch.device("meta"),
    "default dtype bf16": lambda: default_dtype(torch.bfloat16),
    "default dtype fp64": lambda: default_dtype(torch.float64),
}


def values(params: list[nn.Parameter], optimizer: Any) -> list[Tensor]:
    return [x.detach().clone() for p in params for x in (p, *optimizer.state[p].values())]


def run(cls: Any, options: dict[str, Any], surroundings: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = [torch.randn(40, 300, generator=generator).to(dtype) for dtype in (torch.float32, torch.bfloat16)]
    params = [nn.Parameter(x) for x in first]
    grads = [torch.randn(2, 40, 300, generator=generator) * 1e-4 for _ in params]
    with surroundings():
        optimizer = cls(params, lr=1e-2, **options)
        for step in range(2):
            for p, g in zip(params, grads, strict=True):
                p.grad = g[step].to(p.dtype)
            optimizer.step()
    return values(params, optimizer)


@pytest.mark.parametrize("surroundings", list(SURROUNDINGS)[1:])
@pytest.mark.parametrize("more", [{}, {"master": "fp32", "clip_norm": 1e-2}], ids=str)
@pytest.mark.parametrize(("cls", "options"), MAKERS)
def test_a_step_has_the_same_bits_in_any(cls: Any, options: dict[str, Any], more: Any, surroundings: str) -> None:
    options = {**options, **more}
    found, alone = run(cls, options, SURROUNDINGS[surroundings]), run(cls, options, contextlib.nullcontext)
    assert [x.dtype for x in found] == [x.dtype for x in alone]
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


@pytest.mark.parametrize(("cls", "options"), MAKERS)
def test_nor_into_one_inside_the_backward(cls: Any, options: dict[str, Any]) -> None:
    ends = []
    for inside in (False, True):
        p = nn.Parameter(torch.randn(40, 300, generator=torch.Generator().manual_seed(0)))
        with GradientRelease(cls([p], lr=1e-2, **options)) as release, torch.autocast("cpu", enabled=inside):
            release.backward(lambda p=p: p.square().sum())
        ends.append(p.detach())
    assert torch.equal(*ends)
