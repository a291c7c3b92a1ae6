"""On a GPU: the bits of the CPU, no waiting, graphs, and more elements than 32 bits can count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimizer_runs import assert_same_run, network
from torch import nn

from pyeff.optim import Adam8bit, AdamW8bit, Lion8bit, SGD8bit


@pytest.mark.gpu
@pytest.mark.parametrize("cls", [Adam8bit, AdamW8bit, Lion8bit, SGD8bit])
def test_gpu_trains_with_the_bits_of_the_cpu(cls: Any) -> None:
    """Parameters of both dtypes and several groups, clipped, from the same gradients."""
    there, here = network().cuda(), network()
    for model in (there, here):
        model[2].bfloat16()
    options = {"lr": 1e-2, "clip_norm": 0.5}
    optimizers = [
        cls([{"params": model[0].parameters()}, {"params": model[2:].parameters(), "weight_decay": 0.1}], **options)
        for model in (there, here)
    ]
    for step in range(5):
        for i, (p, q) in enumerate(zip(there.parameters(), here.parameters(), strict=True)):
            g = torch.randn(q.shape, generator=torch.Generator().manual_seed(100 * step + i)).to(q.dtype)
            p.grad, q.grad = g.cuda(), g
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(there.parameters(), here.parameters(), strict=True):
        assert torch.equal(p.cpu(), q)
        for name, value in optimizers[1].state[q].items():
            assert torch.equal(optimizers[0].state[p][name].cpu(), value)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_captured_step_is_the_step_with_the_lr_of_the_moment(dtype: torch.dtype) -> None:
    a, b = network().cuda(), network().cuda()
    lr = torch.tensor(1e-2, device="cuda", dtype=dtype)
    captured = AdamW8bit(a.parameters(), lr=lr, clip_norm=1.0)
    plain = AdamW8bit(b.parameters(), lr=1e-2, clip_norm=1.0)

    def gradients(model: nn.Module, step: int) -> None:
        for i, p in enumerate(model.parameters()):
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)).cuda()
            if p.grad is None:
                p.grad = g
            else:
                p.grad.copy_(g)

    gradients(a, 0)
    captured.step()
    gradients(a, 1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for step in range(4):
        gradients(b, step)
        plain.param_groups[0]["lr"] = rate = torch.tensor(1e-2 / (step + 1)).item()
        if step > 0:
            gradients(a, step)
            lr.fill_(rate)
            if step == 2:
                for model in (a, b):
                    model[0].bias.grad[0] = torch.nan
            graph.replay()
        plain.step()
    torch.cuda.synchronize()
    assert captured.skipped_steps == plain.skipped_steps == 1
    assert_same_run((a, captured), (b, plain))


@pytest.mark.gpu
def test_gpu_optimizer_does_not_synchronise() -> None:
    model = network().cuda()
    optimizer = AdamW8bit(model.parameters(), lr=torch.tensor(1e-3, device="cuda"), clip_norm=1.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2**31 + 4097])
def test_more_than_32_bits_of_elements(size: int) -> None:
    """The last elements take the step the first ones take."""
    if torch.cuda.mem_get_info()[0] < 7 * size:
        pytest.skip("needs 14 GB of GPU memory")
    p = nn.Parameter(torch.ones(size, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.ones_like(p)
    AdamW8bit([p], lr=0.5, weight_decay=0.0, master="none").step()
    assert torch.equal(p[:5000], p[-5000:])
    assert p[-1] == 0.5
