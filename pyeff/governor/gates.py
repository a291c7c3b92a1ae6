"""Which actions are open at a check, and why the others are not."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pyeff.governor.account import State, usable
from pyeff.governor.budget import format_amount
from pyeff.governor.config import GovernorConfig
from pyeff.governor.drift import alarmed
from pyeff.governor.menu import over_cap
from pyeff.governor.observation import Action, Observation, Selector, action_key
from pyeff.governor.prospects import dwell_of
from pyeff.governor.signals import PairedGain

DUE = "one more interval would eat into the cooldown's reserve"


def refresh_key(selector: Selector) -> str:
    """Return "REFRESH" or "REFRESH(selector)"."""
    return action_key(Action.REFRESH, selector.name)


def refresh_keys(observation: Observation) -> list[str]:
    """Return the key of every refresh that is offered."""
    return [refresh_key(selector) for selector in observation.selectors] or ["REFRESH"]


def left_of(observation: Observation) -> float:
    """Return what is left of the budget before the cooldown."""
    return max(observation.budget - observation.spent - observation.cooldown_cost, 0.0)


def cooldown_due(observation: Observation, config: GovernorConfig) -> bool:
    """Whether going on to the next check would eat into the cooldown's reserve."""
    needed = config.last_interval * config.check_every * observation.budget
    return observation.budget - observation.spent - observation.cooldown_cost < needed


def room_of(new: State, observation: Observation, config: GovernorConfig) -> float:
    """Return what the overhead cap leaves for scoring and probes; infinite without a cap.

    Every check to come is paid for first, and what selections have lost so far, by the control arm, counts as overhead:
    looking for a better one must not cost more than the cap.
    """
    if config.overhead_cap is None:
        return math.inf
    each = observation.check_cost
    checks = math.ceil(left_of(observation) / (config.check_every * observation.budget + each))
    return config.overhead_cap * observation.budget - observation.overhead - checks * each + min(new.net_worth, 0.0)


def drifted(state: State, observation: Observation) -> bool:
    """Say whether any drift detector alarms, D5 among them."""
    return alarmed([*observation.drift, state.forecaster.cusum.reading])


def blocked_actions(
    config: GovernorConfig,
    state: State,
    new: State,
    observation: Observation,
    gain: PairedGain | None,
    left: float,
    room: float,
) -> dict[str, str]:
    """Return the actions that are not open at this check, and why."""

    def amount(value: float) -> str:
        return format_amount(value, observation.unit)

    refresh = refresh_keys(observation)
    if state.cooling:
        return dict.fromkeys(("CONTINUE", *refresh), "the cooldown has begun")
    if cooldown_due(observation, config):
        return dict.fromkeys(("CONTINUE", *refresh), DUE)
    if not observation.loss_finite:
        return dict.fromkeys((*refresh, "COOLDOWN"), "a training loss is not finite")
    if observation.problem is not None:
        return dict.fromkeys((*refresh, "COOLDOWN"), observation.problem)
    if not usable(observation):
        return dict.fromkeys((*refresh, "COOLDOWN"), "an anchor loss is not finite")
    warmup = config.warmup * observation.budget
    dwell = dwell_of(config, observation)
    if observation.step == 0 or not (observation.anchors_before or (observation.control and observation.anchors_now)):
        why = "a selection waits until this run has shown a first gain"
    elif observation.spent < warmup:
        why = f"only {amount(observation.spent)} of the {amount(warmup)} of warm-up are spent"
    elif observation.refreshes_done and new.checks_since_refresh < dwell:
        why = f"this is check {new.checks_since_refresh} of {dwell} since the last one"
    elif new.falling_back >= config.overfit_checks:
        why = "the anchors are getting worse"
    elif new.checks_since_move is not None and new.checks_since_move < config.min_dwell:
        why = f"this is check {new.checks_since_move} of {config.min_dwell} since the last change"
    elif observation.refreshes_done and config.require_alarm and not drifted(new, observation):
        why = "no drift detector alarms"
    else:
        closed = {}
        for selector in observation.selectors or (Selector(None, observation.refresh_cost),):
            reason = over_cap(observation, config, selector.cost, room - observation.control_cost)
            if selector.cost >= left:
                reason = f"it costs {amount(selector.cost)} and {amount(left)} is left before the cooldown"
            if reason is not None:
                closed[refresh_key(selector)] = reason
        return closed
    return dict.fromkeys(refresh_keys(observation), why)


def why_closed(
    config: GovernorConfig,
    state: State,
    new: State,
    observation: Observation,
    gain: PairedGain | None,
    blocked: Mapping[str, str],
    *,
    dwell: bool = True,
) -> str | None:
    """Why nothing about the training is changed at this check; None where it may be."""
    if "CONTINUE" in blocked:
        return blocked["CONTINUE"]
    if not observation.loss_finite:
        return "a training loss is not finite"
    if observation.problem is not None:
        return observation.problem
    if gain is None:
        return "this run has not shown a usable gain"
    if not dwell:
        return None
    since = [
        n for n in (new.checks_since_move, new.checks_since_refresh if new.refreshes_seen else None) if n is not None
    ]
    if since and min(since) < config.min_dwell:
        return f"this is check {min(since)} of {config.min_dwell} since the last change"
    return None
