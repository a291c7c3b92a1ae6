"""A network to train, what a training is compared by, and torch's optimizers beside ours."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyeff.optim import Adam8bit, AdamW8bit, Optimizer8bit, SGD8bit
from pyeff.train.checkpoint import join_tensors, split_tensors


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 70), nn.Tanh(), nn.Linear(70, 70), nn.Tanh(), nn.Linear(70, 5))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 24, generator=generator)
    return x, (x[:, :5] + x[:, 5:10]).argmax(1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> float:
    """Steps on batches of these numbers; the mean loss of the last ten."""
    losses = []
    for step in steps:
        x, y = batch(step)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / len(losses[-10:])


def assert_same_run(a: tuple[nn.Module, Optimizer8bit], b: tuple[nn.Module, Optimizer8bit]) -> None:
    for p, q in zip(a[0].parameters(), b[0].parameters(), strict=True):
        assert torch.equal(p, q)
        left, right = a[1].state[p], b[1].state[q]
        assert left.keys() == right.keys()
        for name, value in left.items():
            same = torch.equal(value, right[name]) if isinstance(value, Tensor) else value == right[name]
            assert same, name


def saved_by(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    train(model, optimizer, range(2))
    return copy.deepcopy(optimizer.state_dict())


def through_safetensors(state_dict: dict[str, Any], folder: Path) -> dict[str, Any]:
    tree, tensors = split_tensors(state_dict)
    save_file(tensors, folder / "optimizer.safetensors")
    (folder / "optimizer.json").write_text(json.dumps(tree))
    return join_tensors(
        json.loads((folder / "optimizer.json").read_text()), load_file(folder / "optimizer.safetensors")
    )


PAIRS = [
    (AdamW8bit, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95)}),
    (Adam8bit, torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1}),
    (SGD8bit, torch.optim.SGD, {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9}),
    (SGD8bit, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
    (SGD8bit, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.5, "dampening": 0.25}),
]
