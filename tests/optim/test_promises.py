"""What users of 8-bit optimizers ask for first: the bounds bitsandbytes holds itself to, and rare tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from pyeff.ops.optimizer_step import decode_moment, decode_square
from pyeff.optim import Adam8bit, AdamW8bit, SGD8bit


@pytest.mark.parametrize("columns", [32, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (Adam8bit, torch.optim.Adam, {"lr": 1e-3}),
        (AdamW8bit, torch.optim.AdamW, {"lr": 1e-3}),
        (SGD8bit, torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
    ],
)
def test_each_step_is_within_the_bounds_of_bitsandbytes_own_tests(
    ours: Any, theirs: Any, options: dict[str, Any], dtype: torch.dtype, columns: int
) -> None:
    """Its procedure and its numbers: 32-bit torch starts each step from our weights and moments; a resume every ten."""
    torch.manual_seed(0)
    p = nn.Parameter((torch.randn(256, columns) * 0.1).to(dtype))
    q = nn.Parameter(p.detach().float())
    optimizer, exact = ours([p], master="none", **options), theirs([q], **options)
    mean, relative = (6e-5, 6e-4) if dtype == torch.float32 else (1.7e-4, 1.6e-3)
    for step in range(21):
        g = (torch.randn(256, columns) * 0.01).to(dtype)
        p.grad, q.grad = g, g.float()
        optimizer.step()
        exact.step()
        error = (p.detach().float() - q.detach()).abs()
        assert error.mean() < mean
        assert (error / (q.detach().abs() + 1e-9)).mean() < relative
        state = optimizer.state[p]
        for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            if name in exact.state[q]:
                decode = decode_square if name == "exp_avg_sq" else decode_moment
                decoded = decode(state[f"{name}_code"], state[f"{name}_scale"], 256)
                close = torch.isclose(exact.state[q][name], decoded, atol=3e-3, rtol=1e-3)
                assert (~close).sum() < 20
                exact.state[q][name].copy_(decoded)
        with torch.no_grad():
            q.copy_(p)
        if step % 10 == 9:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = ours([p], master="none", **options)
            optimizer.load_state_dict(saved)


@pytest.mark.parametrize("touches", [1, 3])
def test_a_token_seen_once_in_a_thousand_steps_takes_no_large_step(touches: int) -> None:
    """Of an embedding whose elements differ widely in size, against the same with fp32 states.

    No gradients whatever can make |m| / sqrt(v) larger than (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)), by Cauchy and
    Schwarz. A code may be off by a sixteenth of its value in m and in sqrt(v), each time it is written.
    """
    torch.manual_seed(0)
    start = torch.randn(4, 300)
    sizes = torch.exp(2 * torch.randn(4, 300))
    beta1, beta2 = 0.9, 0.999
    bound = (1 - beta1) / ((1 - beta2) * (1 - beta1**2 / beta2)) ** 0.5
    largest = {}
    for states in ("8bit", "fp32"):
        table = nn.Parameter(start.clone())
        optimizer = AdamW8bit([table], lr=1.0, betas=(beta1, beta2), eps=1e-8, weight_decay=0.0, states=states)
        generator = torch.Generator().manual_seed(1)
        largest[states] = 0.0
        for step in range(2003):
            g = torch.randn(4, 300, generator=generator) * sizes
            if step % 1000 not in range(touches):
                g[0] = 0.0  # the rare token
            table.grad = g
            before = table.detach().clone()
            optimizer.step()
            largest[states] = max(largest[states], (table.detach()[0] - before[0]).abs().max().item())
    assert largest["fp32"] <= bound
    assert largest["8bit"] <= bound * (1 + 1 / 16) / (1 - 1 / 16)
