"""The 8-bit AdamW step against torch's fused fp32 step and against other 8-bit optimizers.

pytest benchmarks/bench_adamw8bit.py --benchmark-only
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_as_accurate
from torch import Tensor, nn

import pyeff
from pyeff.optim import AdamW8bit

LR, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.999), 1e-8, 1e-2
# What must be read and written for each parameter: itself, its gradient, two bytes of states and two scales a block.
STATE_BYTES = 2 * (2 + 8 / 256)


def parameters(count: int, size: int, dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    generator = torch.Generator(device).manual_seed(0)
    made = []
    for _ in range(count):
        p = nn.Parameter((torch.randn(size, device=device, generator=generator) * 0.02).to(dtype))
        p.grad = (torch.randn(size, device=device, generator=generator) * 1e-3).to(dtype)
        made.append(p)
    return made


def check_answer(dtype: torch.dtype, device: str) -> None:
    """The first step against float64, before anything is timed."""
    ours, theirs = (parameters(1, 10_000, dtype, device)[0] for _ in range(2))
    p, g = ours.detach().double(), ours.grad.double()
    exact = p * (1 - LR * WEIGHT_DECAY) - LR * g / (g.abs() + EPS)
    AdamW8bit([ours], lr=LR).step()
    torch.optim.AdamW([theirs], lr=LR).step()
    assert_as_accurate(ours.detach(), exact, theirs.detach(), what="first step")


def peers(make: Callable[[], list[nn.Parameter]]) -> dict[str, Callable[[], object]]:
    """Whatever other 8-bit AdamW is installed, after a step that makes its states."""
    found: dict[str, Callable[[], object]] = {}
    for name, find in {"bitsandbytes": _bitsandbytes, "torchao": _torchao}.items():
        try:
            cls = find()
        except ImportError:
            continue
        found[f"{name} AdamW8bit"] = cls(make(), lr=LR).step
    return found


def _bitsandbytes() -> Any:
    from bitsandbytes.optim import AdamW8bit as cls

    return cls


def _torchao() -> Any:
    from torchao.optim import AdamW8bit as cls

    return cls


def copying(bytes: float, device: str) -> Callable[[], object]:
    """Reads and writes as many bytes in all."""
    source = torch.ones(int(bytes / 2) // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def fused_target() -> float:
    """Of torch's fused fp32 step; what a GPU allows by bytes is 0.57."""
    if torch.cuda.is_available():
        return 0.65
    return 0.75 if pyeff.info().extension.get("cpu level", "").startswith("avx512") else 1.0


@pytest.mark.benchmark(group="adamw8bit")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_large_parameter(contest: Callable[..., Any], device: str, dtype: torch.dtype) -> None:
    """Against fused AdamW on fp32 parameters, whichever dtype ours have."""
    size = 500_000_000 if device == "cuda" else 20_000_000
    check_answer(dtype, device)
    moved = size * (3 * dtype.itemsize + STATE_BYTES)
    functions: dict[str, Callable[[], Tensor | object]] = {
        "torch fused AdamW, fp32": torch.optim.AdamW(
            parameters(1, size, torch.float32, device), lr=LR, betas=BETAS, fused=True
        ).step,
        "pyeff AdamW8bit": AdamW8bit(parameters(1, size, dtype, device), lr=LR, betas=BETAS).step,
        "a copy of as many bytes": copying(moved, device),
        **peers(lambda: parameters(1, size, dtype, device)),
    }
    contest(
        "pyeff AdamW8bit",
        functions,
        baseline="torch fused AdamW, fp32",
        target=fused_target() if dtype == torch.float32 else None,
        bytes=moved,
        bound="a copy of as many bytes",
    )


@pytest.mark.benchmark(group="adamw8bit")
def test_many_small_parameters(contest: Callable[..., Any], device: str) -> None:
    def make() -> list[nn.Parameter]:
        return parameters(200, 10_000, torch.float32, device)

    contest(
        "pyeff AdamW8bit",
        {
            "torch foreach AdamW": torch.optim.AdamW(make(), lr=LR, foreach=True).step,
            "torch fused AdamW": torch.optim.AdamW(make(), lr=LR, fused=True).step,
            "pyeff AdamW8bit": AdamW8bit(make(), lr=LR).step,
            **peers(make),
        },
        baseline="torch foreach AdamW",
        bytes=200 * 10_000 * (12 + STATE_BYTES),
    )
