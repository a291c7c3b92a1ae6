"""Exponential moving average of the trained weights: what is evaluated and what scores the pool.

    average <- d_t * average + (1 - d_t) * weight,     d_t = min(decay, (1 + t) / (10 + t))

The ramp lets the average forget the initial weights quickly: with a constant decay of 0.9 a tenth of
the average would still be the initial model after 22 steps. The average is kept in float32, since
bfloat16 loses updates of relative size (1 - decay) * change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Averages of named parameters; costs one pass over them a step and 4 bytes a parameter."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.steps = 0
        self.parameters = dict(parameters)
        self.averages: dict[str, Tensor] = {
            name: parameter.detach().to(torch.float32, copy=True).contiguous()
            for name, parameter in self.parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Move every average towards its parameter."""
        self.steps += 1
        weight = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, parameter in self.parameters.items():
            self.averages[name].lerp_(parameter.detach().to(torch.float32), weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model run with the averages inside the block; its own weights return afterwards.

        For float32 parameters the two storages change places and nothing is copied.
        """
        own = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.data = self.averages[name].to(parameter.dtype)
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = own[name]
