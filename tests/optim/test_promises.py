"""What users of 8-bit optimizers ask for first: the bounds bitsandbytes holds itself to, and rare tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyeff.ops._optimizer_states import decode_moment, decode_square
from pyeff.optim import Adam8bit, AdamW8bit, SGD8bit


def neighbour(code: Tensor, by: int, moment: str) -> Tensor:
    """The code of the next level, or itself at the end: sqrt(v) counts from 0 to 255, m from -127 to 127."""
    if moment == "exp_avg_sq":
        return (code.int() + by).clamp(0, 255).to(torch.uint8)
    return (code.view(torch.int8).int() + by).clamp(-127, 127).to(torch.int8).view(torch.uint8)


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
    """Its procedure and its numbers: 32-bit torch starts each step from our weights and moments; a resume every ten.

    Its numbers allow much more than rounding does, so that bound is held too; and its tolerance of moments, which is
    larger than they are, gives way to the distance of the levels beside the stored one.
    """
    torch.manual_seed(0)
    p = nn.Parameter((torch.randn(256, columns) * 0.1).to(dtype))
    q = nn.Parameter(p.detach().float())
    optimizer, exact = ours([p], master="none", **options), theirs([q], **options)
    mean, relative = (6e-5, 6e-4) if dtype == torch.float32 else (1.7e-4, 1.6e-3)
    eps = torch.finfo(torch.float32).eps
    for step in range(21):
        g = (torch.randn(256, columns) * 0.01).to(dtype)
        p.grad, q.grad = g, g.float()
        before = q.detach().clone()
        optimizer.step()
        exact.step()
        error = (p.detach().float() - q.detach()).abs()
        assert error.mean() < mean
        assert (error / (q.detach().abs() + 1e-9)).mean() < relative
        # Half a place of the weight's dtype, and a handful of fp32's roundings of the weight and of the largest step.
        size = q.detach().abs()
        rounding = 4 * eps * (size + (q.detach() - before).abs().max())
        assert (error <= torch.finfo(dtype).eps / 2 * size + rounding).all()
        state = optimizer.state[p]
        for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            if name in exact.state[q]:
                decode = decode_square if name == "exp_avg_sq" else decode_moment
                code, scale = state[f"{name}_code"], state[f"{name}_scale"]
                decoded = decode(code, scale, 256)
                # Within a level of the exact moment, beside some eight roundings of the largest, doubled by squaring.
                above, below = (decode(neighbour(code, by, name), scale, 256) for by in (1, -1))
                moment = exact.state[q][name]
                assert (moment >= below - 8 * eps * moment.abs().max()).all(), name
                assert (moment <= above + 8 * eps * moment.abs().max()).all(), name
                moment.copy_(decoded)
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
