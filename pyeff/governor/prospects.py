"""What selections and the way back from them are believed to be worth."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from pyeff.governor.account import State
from pyeff.governor.belief import RATIO_LIMITS
from pyeff.governor.config import GovernorConfig
from pyeff.governor.control import Advantage, Fading, estimate_fading, recent_advantage
from pyeff.governor.observation import POOL, Arm, Observation, Selector
from pyeff.governor.plan import advantage_over, worth_of_renewing, worth_of_waiting

# Of a ratio nobody has measured.
_UNKNOWN_ERROR = 1e6
_FASTEST = RATIO_LIMITS[1]
# Of the control arm, until which a selection gets the benefit of the doubt.
_READINGS = 2


def dwell_of(config: GovernorConfig, observation: Observation) -> int:
    """Checks that a selection is kept at least: one where the control arm has just judged it."""
    return config.min_dwell if observation.advantage is None else 1


@dataclass(frozen=True)
class Renewal:
    """What refreshing now is worth with the renewals that follow, what waiting for a later check with the present
    selection is, and what the renewals add to the first."""

    now: float
    later: float
    more: float

    @classmethod
    def of(
        cls,
        fading: Fading,
        cost: float,
        left: float,
        room: float,
        config: GovernorConfig,
        observation: Observation,
        *,
        present: Fading,
        age: float | None,
    ) -> Renewal:
        """Weigh a selector of this cost with ``left`` of the budget before the cooldown, ``room`` of it for scoring."""
        interval = config.check_every * observation.budget
        how: dict[str, float] = {
            "gain_ratio": fading.gain_ratio,
            "decay": fading.decay,
            "refresh_cost": cost,
            "remaining": left,
            "shortest": interval * dwell_of(config, observation),
            "room": room,
        }
        now = worth_of_renewing(**how)
        later = worth_of_waiting(
            **how, interval=interval, present_ratio=present.gain_ratio, present_decay=present.decay, age=age
        )
        once = advantage_over(gain_ratio=fading.gain_ratio, decay=fading.decay, length=left - cost) - cost
        return cls(now, later, now - once)


def fading_of(config: GovernorConfig, state: State, observation: Observation) -> Fading:
    """rho and tau: of the belief and the prior, and of the control arm's advantages where there are any."""
    assert state.belief is not None
    points = [point for name, point in state.advantages if name == state.selector]
    return _with_advantages(config, observation, state.belief.ratio, math.sqrt(state.belief.log_variance), points)


def selector_fading(
    config: GovernorConfig, state: State, observation: Observation, selector: Selector, present: Fading
) -> Fading:
    """rho and tau of one selector: the present one's, or what an earlier use of it has shown, or its prior."""
    if selector.name is None or selector.name == state.selector:
        return present
    known = {name: (mean, variance) for name, mean, variance in state.selectors}
    points = [point for name, point in state.advantages if name == selector.name]
    prior = math.log(selector.gain_ratio or config.prior_gain_ratio)
    if selector.name not in known:
        # Selectors of one pool go together: each that was tried counts as much as the prior.
        tried = [math.log(each.gain_ratio) for each in _tried(config, state, observation, present)]
        prior = math.fsum([prior, *tried]) / (1 + len(tried))
    mean, variance = known.get(selector.name, (prior, config.prior_log_sd**2))
    return _with_advantages(config, observation, math.exp(mean), math.sqrt(variance), points)


def _tried(config: GovernorConfig, state: State, observation: Observation, present: Fading) -> list[Fading]:
    """What is known of every selector that has been in use; without a control arm little, and nothing is pooled."""
    in_use = {state.selector, *(name for name, _, _ in state.selectors)}
    names = {name for name, _ in state.advantages if name is not None and name in in_use}
    return [
        present if name == state.selector else selector_fading(config, state, observation, Selector(name, 0.0), present)
        for name in sorted(names)
    ]


def _with_advantages(
    config: GovernorConfig, observation: Observation, ratio: float, log_sd: float, points: list[Advantage]
) -> Fading:
    decay = config.prior_decay * observation.budget
    if not points or log_sd <= 0:
        return Fading(ratio, log_sd, decay, config.decay_log_sd)
    return estimate_fading(
        points, gain_ratio=ratio, gain_ratio_log_sd=log_sd, decay=decay, decay_log_sd=config.decay_log_sd
    )


def arms_of(state: State, observation: Observation, stale_for: float | None) -> tuple[Arm, ...]:
    """The arms offered, with what the control arm has shown of the way back to the pool."""
    if observation.selector is None or stale_for is None:
        return tuple(observation.arms)
    points = [point for name, point in state.advantages if name == observation.selector]
    recent = recent_advantage(points, within=stale_for)
    found = []
    for arm in observation.arms:
        if arm.name == POOL:
            ratio, error = 1.0, _UNKNOWN_ERROR  # nothing measured
            if recent is not None:
                mean, deviation, readings = recent
                ratio = min(1 / max(mean, 1 / _FASTEST), _FASTEST)
                # As sure as it is that the selection is slower than uniform batches. A few readings are enough to ask
                # of it that it be faster at all: going back is free.
                sure = (ratio - 1) / (1 - mean) if mean < 1 else ratio**2
                error = deviation * sure if readings < _READINGS else 0.0
            arm = replace(arm, ratio=ratio, standard_error=min(error, _UNKNOWN_ERROR))
        found.append(arm)
    return tuple(found)
