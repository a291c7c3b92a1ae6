"""The learning rate of a step: a ramp, a constant, and 1 - sqrt(progress) in the cooldown."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyeff.train.config import RunConfig
    from pyeff.train.state import State


def learning_rate(config: RunConfig, state: State, *, spent: float, price: float) -> float:
    """Of the step about to be made, which costs ``price``."""
    settings = config.optimizer
    factor = 1.0
    if state.steps < settings.warmup_steps:
        factor = (state.steps + 1) / (settings.warmup_steps + 1)
    if state.phase == "cooldown" and config.cooldown > 0:
        # At the middle of the step: the last one still moves.
        span = state.cooldown_end - state.cooldown_start
        done = (spent + price / 2 - state.cooldown_start) / span if span > 0 else 1.0
        factor *= 1 - math.sqrt(min(max(done, 0.0), 1.0))
    return settings.lr * factor
