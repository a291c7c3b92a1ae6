"""A network whose parameters are one vector, and the AdamW that trains it: a run is copied by copying four vectors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

BETAS, EPSILON = (0.9, 0.99), 1e-8


@dataclass(frozen=True)
class Weights:
    """A branch of a run: parameters, AdamW's two moments and the averaged parameters, all [n] fp32, and its steps."""

    parameters: Tensor
    first: Tensor
    second: Tensor
    average: Tensor
    steps: int = 0

    @classmethod
    def fresh(cls, parameters: Tensor) -> Weights:
        return cls(parameters.clone(), torch.zeros_like(parameters), torch.zeros_like(parameters), parameters.clone())

    def clone(self) -> Weights:
        tensors = {name: getattr(self, name).clone() for name in ("parameters", "first", "second", "average")}
        return replace(self, **tensors)


class Network:
    """A module whose trainable parameters are views of one vector; ``load`` points them at another one."""

    def __init__(self, module: nn.Module, weight_decay: float) -> None:
        self.module, self.weight_decay = module, weight_decay
        self.trained = [p for p in module.parameters() if p.requires_grad]
        self.size = sum(p.numel() for p in self.trained)
        self.gradient = torch.zeros(self.size)
        # Matrices decay, gains do not.
        self.decays = torch.cat([torch.full((p.numel(),), float(p.ndim > 1)) for p in self.trained])

    def flat(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.trained])

    def _views(self, vector: Tensor) -> Iterator[Tensor]:
        at = 0
        for p in self.trained:
            yield vector[at : at + p.numel()].view_as(p)
            at += p.numel()

    @contextmanager
    def at(self, vector: Tensor) -> Iterator[nn.Module]:
        """The module with these parameters; gradients are not collected."""
        for p, view in zip(self.trained, self._views(vector), strict=True):
            p.data, p.grad = view, None
        yield self.module

    def load(self, weights: Weights) -> None:
        """Train these weights, in place, from now on."""
        gradients = self._views(self.gradient)
        for p, view, gradient in zip(self.trained, self._views(weights.parameters), gradients, strict=True):
            p.data, p.grad = view, gradient

    def step(self, weights: Weights, losses: Tensor, lr: float, averaging: float) -> Weights:
        """One AdamW step on the mean of the samples' losses, and the averages; ``load`` must have been called."""
        self.gradient.zero_()
        losses.mean().backward()
        steps = weights.steps + 1
        g, m, v = self.gradient, weights.first, weights.second
        m.lerp_(g, 1 - BETAS[0])
        v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
        scale = (v / (1 - BETAS[1] ** steps)).sqrt_().add_(EPSILON)
        weights.parameters.addcmul_(weights.parameters, self.decays, value=-lr * self.weight_decay)
        weights.parameters.addcdiv_(m, scale, value=-lr / (1 - BETAS[0] ** steps))
        # A short memory at first, or the average would hold the start.
        weights.average.lerp_(weights.parameters, max(1 - averaging, 1 / (steps + 1)))
        return replace(weights, steps=steps)
