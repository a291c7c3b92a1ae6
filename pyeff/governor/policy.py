"""Decide what the next part of a budget is spent on: go on, select data again, change the training, or stop.

Decisions are a pure function of an :class:`Observation`, the policy's settings and its state. They read no
clock and draw no random numbers, and all three are written into the decision, so a log can be replayed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from pyeff.governor.account import State, account, gain_of, measured
from pyeff.governor.belief import RATIO_LIMITS, Belief
from pyeff.governor.config import GovernorConfig
from pyeff.governor.forecast import Promise
from pyeff.governor.gates import (
    DUE,
    blocked_actions,
    cooldown_due,
    left_of,
    refresh_key,
    refresh_keys,
    room_of,
    why_closed,
)
from pyeff.governor.menu import Option, options
from pyeff.governor.observation import (
    POOL,
    Action,
    Decision,
    Observation,
    Policy,
    Selector,
    action_key,
)
from pyeff.governor.payback import pay_back, worth_of_training
from pyeff.governor.plan import advantage_over
from pyeff.governor.prospects import Renewal, arms_of, fading_of, selector_fading
from pyeff.governor.signals import PairedGain
from pyeff.governor.wording import progress_of, reason_of, why_anneal

__all__ = [
    "Action",
    "Decision",
    "GovernorConfig",
    "GovernorPolicy",
    "Observation",
    "Policy",
    "UniformPolicy",
    "recompute",
]

# Of what a decision's inputs hold. A log of another version cannot be replayed by this one.
VERSION = 4

_LARGEST = 1e300
_WINDOWED = (Action.SWITCH, Action.BATCH, Action.MEMORY)
_RETREAT = action_key(Action.SWITCH, POOL)


class UniformPolicy:
    """Train on the whole pool: CONTINUE until the cooldown is due, and never REFRESH.

    The baseline of the same budget without selection. It uses ``check_every`` of the config and ignores the
    rest.
    """

    name = "uniform"

    def __init__(self, config: GovernorConfig | None = None) -> None:
        self.config = config or GovernorConfig()
        self._state = State()

    def decide(self, observation: Observation) -> Decision:
        """Take the decision of one check."""
        decision, self._state = _decide_uniform(self.config, self._state, observation)
        return decision

    def state_dict(self) -> dict[str, Any]:
        """Return the state, JSON-able."""
        return self._state.to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the state; ValueError when its fields are not those of :meth:`state_dict`."""
        self._state = State.from_dict(state)


class GovernorPolicy:
    """Weigh every way of spending the next part of the budget and take the best.

    At each check the governor compares the losses of the same anchor samples with those of the check before,
    updates what it believes a selection is worth (:class:`Belief`, :func:`pay_back`), and chooses

    - REFRESH when scoring the pool again is expected to return more training than it costs, by the deadband;
    - COOLDOWN when one more interval would eat into the reserve, or when the whole interval of the gain lay
      below zero ``overfit_checks`` times in a row;
    - CONTINUE otherwise, and whenever a loss is not finite.

    Deterministic: equal observations in equal order give equal decisions. Cost: microseconds.
    """

    name = "governor"

    def __init__(self, config: GovernorConfig | None = None) -> None:
        self.config = config or GovernorConfig()
        prior = Belief(math.log(self.config.prior_gain_ratio), self.config.prior_log_sd**2)
        self._state = State(belief=prior)

    def decide(self, observation: Observation) -> Decision:
        """Take the decision of one check and remember what it showed.

        Raises ValueError when the observation contradicts the ones before (fewer refreshes than were seen).
        """
        decision, self._state = _decide_governor(self.config, self._state, observation)
        return decision

    def state_dict(self) -> dict[str, Any]:
        """Return the state, JSON-able; a governor that loads it decides as this one would."""
        return self._state.to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the state; ValueError when its fields are not those of :meth:`state_dict`."""
        loaded = State.from_dict(state)
        if loaded.belief is None:
            raise ValueError("state must hold a belief, this is one of the uniform policy")
        self._state = loaded


def recompute(inputs: Mapping[str, Any]) -> Decision:
    """Take a decision again from its logged inputs alone.

    Raises ValueError for inputs of a policy this version does not know.
    """
    deciders = {"governor": _decide_governor, "uniform": _decide_uniform}
    if inputs.get("policy") not in deciders:
        raise ValueError(f"policy must be one of {', '.join(deciders)}, got {inputs.get('policy')!r}")
    if inputs.get("version") != VERSION:
        raise ValueError(
            f"it was written by another version of pyeff (inputs of version {inputs.get('version', 1)}, "
            f"this one reads {VERSION})"
        )
    config = GovernorConfig(**inputs["config"])
    state = State.from_dict(inputs["state"])
    return deciders[inputs["policy"]](config, state, Observation.from_dict(inputs["observation"]))[0]


def _inputs(policy: str, config: GovernorConfig, state: State, observation: Observation) -> dict[str, Any]:
    return {
        "version": VERSION,
        "policy": policy,
        "config": asdict(config),
        "state": state.to_dict(),
        "observation": observation.to_dict(),
    }


def _decide_uniform(config: GovernorConfig, state: State, observation: Observation) -> tuple[Decision, State]:
    left = max(observation.budget - observation.spent - observation.cooldown_cost, 0.0)
    gain = gain_of(config, observation)
    due = state.cooling or cooldown_due(observation, config)
    blocked = {"REFRESH": "the uniform policy never selects"}
    if due:
        blocked["CONTINUE"] = DUE
    decision = Decision(
        step=observation.step,
        action=Action.COOLDOWN if due else Action.CONTINUE,
        reason=why_anneal(blocked, left, observation, gain)
        if due
        else f"Go on: {progress_of(gain, observation)}; this policy never selects.",
        inputs=_inputs("uniform", config, state, observation),
        values={"CONTINUE": 0.0, "REFRESH": -observation.refresh_cost, "COOLDOWN": 0.0 if due else -left},
        estimates=measured(gain, observation.spent - observation.spent_before) | {"left": left},
        blocked=blocked,
    )
    return decision, replace(state, checks=state.checks + 1, cooling=due)


def _decide_governor(config: GovernorConfig, state: State, observation: Observation) -> tuple[Decision, State]:
    gain = gain_of(config, observation)
    new = account(config, state, observation, gain)
    assert new.belief is not None
    fading = fading_of(config, new, observation)
    ratio, decay = fading.gain_ratio, fading.decay
    left = left_of(observation)
    room = room_of(new, observation, config)
    stale_for = None if observation.scored_at is None else observation.spent - observation.scored_at
    selectors = observation.selectors or (Selector(None, observation.refresh_cost),)
    known = {refresh_key(each): selector_fading(config, new, observation, each, fading) for each in selectors}
    weighed = {
        refresh_key(selector): pay_back(
            gain_ratio=known[refresh_key(selector)].gain_ratio,
            decay=known[refresh_key(selector)].decay,
            refresh_cost=selector.cost,
            remaining=left,
            stale_for=stale_for,
            present_ratio=ratio,
            present_decay=decay,
        )
        for selector in selectors
    }
    renewals = {
        refresh_key(selector): Renewal.of(
            known[refresh_key(selector)], selector.cost, left, room, config, observation, present=fading, age=stale_for
        )
        for selector in selectors
    }
    # To go on, and take the best refresh at a later check or none.
    waiting = advantage_over(gain_ratio=ratio, decay=decay, length=left, age=stale_for)
    waiting = max([waiting, *(renewal.later for renewal in renewals.values())])
    rest = worth_of_training(gain_ratio=ratio, decay=decay, remaining=left, stale_for=stale_for)
    overfit = new.falling_back >= config.overfit_checks
    blocked = blocked_actions(config, state, new, observation, gain, left, room)
    annealing = "CONTINUE" in blocked
    values = {"CONTINUE": 0.0}
    choices: dict[str, tuple[Action, str | None]] = {"CONTINUE": (Action.CONTINUE, None)}
    for selector in selectors:
        key = refresh_key(selector)
        values[key] = weighed[key].benefit - (1 + config.deadband) * weighed[key].cost
        if values[key] > 0:
            values[key] += renewals[key].more
            if renewals[key].now < waiting:
                blocked.setdefault(key, "it will be worth more later, when the present selection has aged")
        choices[key] = (Action.REFRESH, selector.name)
    choices["COOLDOWN"] = (Action.COOLDOWN, None)
    # To stop forgoes the rest, which is worth its negative once training makes the anchors worse.
    values["COOLDOWN"] = 0.0 if annealing else rest if overfit else -rest
    arms = arms_of(new, observation, stale_for)
    menu = options(replace(observation, arms=arms), config, left, room)
    for option in menu:
        key = action_key(option.action, option.argument)
        values[key], choices[key] = option.value, (option.action, option.argument)
        retreat = key == _RETREAT and observation.selector is not None
        why = option.blocked or why_closed(config, state, new, observation, gain, blocked, dwell=not retreat)
        if why is not None:
            blocked[key] = why
    new, unpriced = _price(config, state, observation, new, ratio, menu, blocked)
    if unpriced is not None and not annealing and "COOLDOWN" not in blocked:
        values["COOLDOWN"] = unpriced * left
    # A worth that no log can hold is as good, or as bad, as any other of its size.
    values = {name: min(max(value, -_LARGEST), _LARGEST) for name, value in values.items()}
    # Of equals max takes the first: to go on.
    ranked = sorted((key for key in choices if key not in blocked), key=lambda key: -values[key])
    new, key = _wait_for_window(config, new, ranked, choices, blocked)
    action, argument = choices[key]
    # Of refreshes not taken the best is shown.
    refresh = key if action is Action.REFRESH else max(known, key=lambda each: values[each])
    shown, fresh = weighed[refresh], known[refresh]
    kept = 0.0 if stale_for is None else math.exp(-stale_for / decay)
    pace = 1 + (ratio - 1) * kept  # of the present selection, in units of the pool's
    factor = fresh.gain_ratio / pace if action is Action.REFRESH else 1.0
    if action is Action.SWITCH:
        factor = next(arm.ratio for arm in arms if arm.name == argument)
    promise = _promise(config, new, observation, gain, action, min(factor, RATIO_LIMITS[1]))
    assert new.belief is not None
    low, high = new.belief.interval()
    decision = Decision(
        step=observation.step,
        action=action,
        reason=reason_of(
            config,
            observation,
            gain,
            shown,
            action,
            blocked,
            left=left,
            fading=fresh,
            selector=refresh,
            state=new,
            argument=argument,
            key=key,
            value=values[key],
        ),
        inputs=_inputs("governor", config, state, observation),
        values=values,
        estimates=measured(
            gain, observation.spent - observation.spent_before - (new.scoring_spent - state.scoring_spent)
        )
        | {
            "left": left,
            "gain_ratio": ratio,
            "gain_ratio_low": low,
            "gain_ratio_high": high,
            "decay": decay,
            "stale_for": stale_for,
            "refresh_benefit": shown.benefit,
            "refresh_cost": shown.cost,
            "forecast": promise,
            "cusum": new.forecaster.cusum.total,
        },
        blocked=blocked,
        argument=argument,
    )
    moved = action in (*_WINDOWED, Action.REFRESH)
    after = new.forecaster
    if promise is not None:
        after = replace(after, promise=Promise(promise["rate"], promise["scale"]))
    if moved:
        after = after.changed()
    return decision, replace(
        new,
        cooling=state.cooling or action is Action.COOLDOWN,
        forecaster=after,
        checks_since_move=0 if action in (*_WINDOWED, Action.PROBE) and key != _RETREAT else new.checks_since_move,
    )


def _price(
    config: GovernorConfig,
    state: State,
    observation: Observation,
    new: State,
    ratio: float,
    menu: list[Option],
    blocked: Mapping[str, str],
) -> tuple[State, float | None]:
    """Count checks on which training is not worth its price; the unreturned share of it once they are enough.

    The rate that counts is that of the annealed run: what is filtered, exceeded with ``stop_probability`` only, times
    the best change that is open. Of a unit more the anneal takes its share, and trains a third as fast on average.
    """
    upper = new.forecaster.upper(config.stop_probability)
    if observation.price is None or upper is None:
        return replace(new, below_price=0), None
    best = max([1.0, *(1 + max(o.value, 0.0) / max(left_of(observation), 1e-300) for o in menu if o.blocked is None)])
    if any(key not in blocked for key in refresh_keys(observation)):
        best = max(best, ratio)
    hopeful = max(upper, 0.0) * best * (1 - 2 / 3 * min(observation.cooldown_cost / observation.budget, 1.0))
    count = state.below_price + 1 if hopeful <= observation.price else state.below_price
    if hopeful > config.rearm * observation.price:
        count = 0
    new = replace(new, below_price=count)
    if count < config.stop_checks or hopeful > observation.price:
        return new, None
    return new, 1 - hopeful / observation.price if observation.price > 0 else None


def _wait_for_window(
    config: GovernorConfig,
    new: State,
    ranked: list[str],
    choices: Mapping[str, tuple[Action, str | None]],
    blocked: dict[str, str],
) -> tuple[State, str]:
    """Take the best action, but a change of the training only when it was best for ``window`` checks."""
    best = ranked[0]
    if choices[best][0] not in _WINDOWED or best == _RETREAT:
        return replace(new, candidate=None, candidate_checks=0), best
    count = new.candidate_checks + 1 if new.candidate == best else 1
    if count >= config.window:
        return replace(new, candidate=None, candidate_checks=0), best
    # One class of action per decision: the other changes wait as well.
    for key in ranked[1:]:
        if choices[key][0] in _WINDOWED:
            blocked[key] = f"it waits for {best}, which is better"
    blocked[best] = f"it is best on {count} of the {config.window} checks that it must be"
    waiting = [key for key in ranked if key not in blocked]
    return replace(new, candidate=best, candidate_checks=count), waiting[0]


def _promise(
    config: GovernorConfig,
    new: State,
    observation: Observation,
    gain: PairedGain | None,
    action: Action,
    factor: float,
) -> dict[str, Any] | None:
    """What the next interval should gain under the action taken, for the audit; None where it cannot be said.

    ``factor`` is how many times faster than before it should train.
    """
    if action is Action.COOLDOWN or gain is None:
        return None
    length = config.check_every * observation.budget
    start = observation.spent - new.scoring_spent
    error = gain.standard_error / length
    found = new.forecaster.forecast(
        start, start + length, error=error, slowing=config.slowing, scatter=config.trajectory_log_sd
    )
    if found is None:
        return None
    rate, scale = found.rate * factor, found.scale * factor
    low, high = new.forecaster.calibration.interval(predicted=rate, scale=scale)
    known = new.forecaster.calibration.calibrated
    return {"rate": rate, "scale": scale, "low": low if known else None, "high": high if known else None}
