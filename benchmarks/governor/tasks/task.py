"""What a task must say: its data, its network, its selectors and what they cost."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .training import Network

# Four budgets that span sixteenfold.
SPANS = (1.0, 16 ** (1 / 3), 16 ** (2 / 3), 16.0)


def stream(*name: object) -> int:
    """A seed for one named use of randomness, independent of the others."""
    return int.from_bytes(hashlib.blake2b(repr(name).encode(), digest_size=8).digest(), "big") >> 1


def cached(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """A vector that is expensive to make and equal wherever it is made."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        with partial.open("wb") as file:
            np.save(file, make().numpy())
        partial.replace(path)
    return torch.from_numpy(np.load(path))


@dataclass(frozen=True)
class Data:
    """Samples of a seed's pool, of the anchors, the selectors' target and the holdout (disjoint), and each pool
    sample's source."""

    pool: Tensor
    anchors: Tensor
    target: Tensor
    held_out: Tensor
    sources: tuple[str, ...]
    source: Tensor


class Task(ABC):
    """One task in one memory mode.

    Attributes:
        name, modes, selectors: as reported, selectors cheapest first.
        batch: samples of a step; ``pool``: samples of the pool; ``keep``: share of it that a selection keeps.
        rates: peak learning rate of each mode; ``weight_decay``.
        smallest_steps: what the smallest budget buys on the pool with nothing else.
        anchors: samples evaluated at a check, by budget.
        train_flops, forward_flops: of one sample. full_train_flops: with everything trained, the unit of budgets.
    """

    name: str
    modes: tuple[str, ...]
    selectors: tuple[str, ...]
    batch: int
    pool: int
    keep: float
    rates: dict[str, float]
    weight_decay: float
    smallest_steps: int
    anchors: tuple[int, ...]
    target: int
    train_flops: int
    full_train_flops: int
    forward_flops: int

    def __init__(self, mode: str, cache: Path) -> None:
        if mode not in self.modes:
            raise ValueError(f"mode must be one of {', '.join(self.modes)}, got {mode!r}")
        self.mode, self.cache = mode, cache

    @abstractmethod
    def data(self, seed: int, control: str) -> Data:
        """The seed's samples; ``control`` is a negative control that changes them, or empty."""

    @abstractmethod
    def network(self, seed: int) -> Network:
        """A network at the seed's start."""

    @abstractmethod
    def losses(self, module: nn.Module, samples: Tensor) -> Tensor:
        """The loss of each sample, differentiable."""

    @abstractmethod
    def score_flops(self, selector: str) -> int:
        """What scoring the pool costs."""

    @abstractmethod
    def scores(self, selector: str, network: Network, vector: Tensor, data: Data) -> Tensor:
        """A score of each pool sample under these parameters; the highest are kept."""

    def evaluate(self, module: nn.Module, samples: Tensor) -> Tensor:
        """Losses without gradients."""
        with torch.no_grad():
            return torch.cat([self.losses(module, chunk) for chunk in samples.split(256)])

    def mean_gradient(self, module: nn.Module, samples: Tensor) -> dict[str, Tensor]:
        """Of the mean loss, by parameter."""
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(self.losses(module, samples).mean(), list(named.values()))
        return dict(zip(named, found, strict=True))
