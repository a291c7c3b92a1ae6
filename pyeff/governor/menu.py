"""What changing one thing about the training is worth: SWITCH, BATCH, PROBE, MEMORY.

All values are in the budget's unit of training as it is now. With L left before the cooldown, a change that costs S
and then trains r times as fast is worth r (L - S) - L. It is open only when r exceeds 1 by more than the deadband
and by more than h standard errors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pyeff.governor.budget import format_amount
from pyeff.governor.config import GovernorConfig
from pyeff.governor.observation import POOL, Action, Arm, BatchSize, MemoryMode, Observation

# Of what is offered: beyond it a ratio says no more, and what it is worth would be no number.
_FASTEST = 1e9


@dataclass(frozen=True)
class Option:
    """One action with its argument, what it is worth, and why it is not open (None where it is)."""

    action: Action
    argument: str
    value: float
    blocked: str | None = None


def options(observation: Observation, config: GovernorConfig, left: float, room: float = math.inf) -> list[Option]:
    """Weigh every offered SWITCH, PROBE, BATCH and MEMORY with ``left`` of the budget before the cooldown and ``room``
    under the overhead cap."""
    found = []
    for arm in observation.arms:
        found.append(_switch(arm, config, left))
        if arm.probe_cost is not None:
            found.append(_probe(arm, observation, config, left, room))
    if observation.batch is not None:
        found += [_batch(observation.batch, config, left, doubled) for doubled in (True, False)]
    return found + [_memory(mode, config, left) for mode in observation.memory_modes]


def over_cap(observation: Observation, config: GovernorConfig, cost: float, room: float) -> str | None:
    """Say why this cost does not fit into ``room``, what the cap has left; None where it does."""
    if cost <= room:
        return None
    unit = observation.unit
    return (
        f"it costs {format_amount(cost, unit)}, and beside what was spent and the checks to come the cap of "
        f"{config.overhead_cap or 1.0:.0%} of the budget leaves {format_amount(max(room, 0.0), unit)}"
    )


def _switch(arm: Arm, config: GovernorConfig, left: float) -> Option:
    needed = config.deviations * arm.standard_error
    if arm.name != POOL:  # going back costs nothing, and repeating a selection turns it harmful little by little
        needed = max(config.deadband, needed)
    blocked = None
    if arm.ratio - 1 <= needed:
        blocked = f"it trains {arm.ratio:.2f} ± {arm.standard_error:.2g} times as fast, within the deadband"
    return Option(Action.SWITCH, arm.name, _worth(arm.ratio, arm.switch_cost, left), blocked)


def _probe(arm: Arm, observation: Observation, config: GovernorConfig, left: float, room: float) -> Option:
    """The value of knowing: E max(0, best after the probe) - max(0, best now) - cost, by a normal posterior."""
    assert arm.probe_cost is not None
    after = max(left - arm.probe_cost, 0.0)
    # Standard deviation of the mean that the probe will leave: what it can be expected to teach.
    known = min(arm.standard_error, _FASTEST)
    spread = known * (known / math.hypot(known, arm.probe_error))
    mean = _worth(arm.ratio, arm.switch_cost, after)
    deviation = spread * max(after - arm.switch_cost, 0.0)
    if deviation > 0:
        z = mean / deviation
        density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        informed = mean * 0.5 * math.erfc(-z / math.sqrt(2)) + deviation * density
    else:
        informed = max(mean, 0.0)
    value = informed - max(mean, 0.0) - (1 + config.deadband) * arm.probe_cost
    return Option(Action.PROBE, arm.name, value, over_cap(observation, config, arm.probe_cost, room))


def _batch(batch: BatchSize, config: GovernorConfig, left: float, doubled: bool) -> Option:
    """Goodput: samples per unit of budget times the gain per sample, which is in proportion to 1 / (B + B_noise)."""
    factor, name = (2.0, "x2") if doubled else (0.5, "/2")
    noise = batch.low if doubled else batch.high  # the end of the interval that speaks against
    rate = batch.doubled_rate if doubled else batch.halved_rate
    # Divided by the larger of both, so that no sum overflows.
    unit = max(batch.size, noise)
    ratio = rate * (batch.size / unit + noise / unit) / (factor * (batch.size / unit) + noise / unit)
    blocked = None
    if doubled and not batch.size < config.batch_ratio * batch.low:
        blocked = f"{batch.size:g} is not below {config.batch_ratio:g} of the noise scale, at least {batch.low:.3g}"
    elif not doubled and not config.batch_ratio * batch.size > batch.high:
        blocked = f"{batch.size:g} is not above 1/{config.batch_ratio:g} of the noise scale, at most {batch.high:.3g}"
    elif ratio - 1 <= config.deadband:
        blocked = f"it would train {ratio:.2f} times as fast, within the deadband"
    return Option(Action.BATCH, name, _worth(ratio, 0.0, left), blocked)


def _memory(mode: MemoryMode, config: GovernorConfig, left: float) -> Option:
    ratio = 1 / mode.relative_cost
    blocked = None
    if not mode.fits:
        blocked = "it does not fit in memory"
    elif ratio - 1 <= config.deadband:
        blocked = f"it trains {ratio:.2f} times as fast, within the deadband"
    return Option(Action.MEMORY, mode.name, _worth(ratio, mode.switch_cost, left), blocked)


def _worth(ratio: float, cost: float, left: float) -> float:
    return min(ratio, _FASTEST) * max(left - cost, 0.0) - left
