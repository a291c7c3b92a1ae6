"""Under DistributedDataParallel every rank sees its own samples, and the noise scale is of all of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import pyeff
from pyeff.observation import estimate_noise_scale


def _model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2))


def _data() -> torch.Tensor:
    return torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(5))


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(_model())
    with pyeff.observe(model) as seen:
        model(_data()[2 * rank : 2 * rank + 2]).square().sum().backward()
    estimate = seen.noise_scale
    gradient = model.module[0].weight.grad
    found = [seen.grad_norms.tolist(), gradient.tolist(), estimate.trace, estimate.signal, estimate.samples]
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_each_rank_sees_its_own_samples(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    model = _model()
    norms, total = [], [torch.zeros_like(p) for p in model.parameters()]
    for sample in _data():
        model.zero_grad()
        model(sample.unsqueeze(0)).square().sum().backward()
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())
        total = [t + p.grad for t, p in zip(total, model.parameters(), strict=True)]
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(torch.tensor(ranks[0][0] + ranks[1][0]), torch.stack(norms), rtol=32 * eps, atol=0)
    torch.testing.assert_close(
        torch.tensor(ranks[0][1]), total[0] / 2, rtol=0, atol=float(32 * eps * total[0].abs().max())
    )
    # The ranks' gradients are averaged, so the four samples' shares are half of what their own rank says.
    norms_sq = sum(float(n) ** 2 for n in norms) / 4
    batch_norm_sq = sum(float((t / 2).square().sum()) for t in total)
    expected = estimate_noise_scale(norms_sq, batch_norm_sq, 4)
    for _, _, trace, signal, samples in ranks:
        assert samples == 4
        assert abs(trace - expected.trace) <= 1e3 * eps * abs(expected.trace)
        assert abs(signal - expected.signal) <= 1e3 * eps * abs(expected.signal)
