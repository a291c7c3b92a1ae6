"""Decide what the next part of a budget is spent on: go on, select data again, change the training, or stop.

Decisions are a pure function of an :class:`Observation`, the policy's settings and its state. They read no
clock and draw no random numbers, and all three are written into the decision, so a log can be replayed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from pyeff.governor.belief import RATIO_LIMITS, Belief, Interval
from pyeff.governor.budget import format_amount
from pyeff.governor.config import GovernorConfig
from pyeff.governor.control import Advantage, Fading, estimate_fading, recent_advantage
from pyeff.governor.drift import alarmed
from pyeff.governor.forecast import Forecaster, Promise
from pyeff.governor.menu import Option, options, over_cap
from pyeff.governor.observation import (
    POOL,
    Action,
    Arm,
    Decision,
    Observation,
    Policy,
    Selector,
    action_key,
)
from pyeff.governor.payback import PayBack, pay_back, worth_of_training
from pyeff.governor.plan import advantage_over, worth_of_renewing
from pyeff.governor.signals import PairedGain, clustered_gain, paired_gain

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
VERSION = 3

_KEPT_ADVANTAGES = 32
# Share of the budget: a rate over less says nothing, and its square overflows.
_SHORTEST = 1e-9
_WINDOWED = (Action.SWITCH, Action.BATCH, Action.MEMORY)
_RETREAT = action_key(Action.SWITCH, POOL)
# Of a ratio nobody has measured.
_UNKNOWN_ERROR = 1e6
_FASTEST = RATIO_LIMITS[1]
# Of the control arm, until which a selection gets the benefit of the doubt.
_READINGS = 3


@dataclass(frozen=True)
class _State:
    """What a policy remembers between checks.

    ``belief`` is None for the uniform policy. ``scoring_spent`` is what all scorings cost, so that rates are
    per unit of training. ``selectors`` are the beliefs (mean and variance of log rho) about those not in use.
    ``candidate`` is the change that was best, but not yet made, on the last ``candidate_checks`` checks.
    """

    checks: int = 0
    refreshes_seen: int = 0
    checks_since_refresh: int = 0
    checks_since_move: int | None = None
    falling_back: int = 0
    below_price: int = 0
    scoring_spent: float = 0.0
    cooling: bool = False
    candidate: str | None = None
    candidate_checks: int = 0
    selector: str | None = None
    selectors: tuple[tuple[str, float, float], ...] = ()
    advantages: tuple[tuple[str | None, Advantage], ...] = ()
    forecaster: Forecaster = field(default_factory=Forecaster)
    belief: Belief | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            **{item.name: getattr(self, item.name) for item in fields(self)},
            "selectors": [list(known) for known in self.selectors],
            "advantages": [[name, asdict(point)] for name, point in self.advantages],
            "forecaster": self.forecaster.to_dict(),
            "belief": None if self.belief is None else self.belief.to_dict(),
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> _State:
        names = {item.name for item in fields(cls)}
        if set(plain) != names:
            raise ValueError(f"state must have {sorted(names)}, got {sorted(map(str, plain))}")
        belief = plain["belief"]
        parts = {
            "selectors": tuple((name, mean, variance) for name, mean, variance in plain["selectors"]),
            "advantages": tuple((name, Advantage(**point)) for name, point in plain["advantages"]),
            "forecaster": Forecaster.from_dict(plain["forecaster"]),
            "belief": None if belief is None else Belief.from_dict(belief),
        }
        return cls(**{**plain, **parts})


def _cooldown_due(observation: Observation, config: GovernorConfig) -> bool:
    """Whether going on to the next check would eat into the cooldown's reserve."""
    needed = config.last_interval * config.check_every * observation.budget
    return observation.budget - observation.spent - observation.cooldown_cost < needed


class UniformPolicy:
    """Train on the whole pool: CONTINUE until the cooldown is due, and never REFRESH.

    The baseline of the same budget without selection. It uses ``check_every`` of the config and ignores the
    rest.
    """

    name = "uniform"

    def __init__(self, config: GovernorConfig | None = None) -> None:
        self.config = config or GovernorConfig()
        self._state = _State()

    def decide(self, observation: Observation) -> Decision:
        """Take the decision of one check."""
        decision, self._state = _decide_uniform(self.config, self._state, observation)
        return decision

    def state_dict(self) -> dict[str, Any]:
        """Return the state, JSON-able."""
        return self._state.to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the state; ValueError when its fields are not those of :meth:`state_dict`."""
        self._state = _State.from_dict(state)


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
        self._state = _State(belief=prior)

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
        self._state = _State.from_dict(state)


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
    state = _State.from_dict(inputs["state"])
    return deciders[inputs["policy"]](config, state, Observation.from_dict(inputs["observation"]))[0]


def _inputs(policy: str, config: GovernorConfig, state: _State, observation: Observation) -> dict[str, Any]:
    return {
        "version": VERSION,
        "policy": policy,
        "config": asdict(config),
        "state": state.to_dict(),
        "observation": observation.to_dict(),
    }


def _decide_uniform(config: GovernorConfig, state: _State, observation: Observation) -> tuple[Decision, _State]:
    left = max(observation.budget - observation.spent - observation.cooldown_cost, 0.0)
    gain = _gain(config, observation)
    due = state.cooling or _cooldown_due(observation, config)
    blocked = {"REFRESH": "the uniform policy never selects"}
    if due:
        blocked["CONTINUE"] = _DUE
    decision = Decision(
        step=observation.step,
        action=Action.COOLDOWN if due else Action.CONTINUE,
        reason=_anneal(blocked, left, observation, gain)
        if due
        else f"Go on: {_progress(gain, observation)}; this policy never selects.",
        inputs=_inputs("uniform", config, state, observation),
        values={"CONTINUE": 0.0, "REFRESH": -observation.refresh_cost, "COOLDOWN": 0.0 if due else -left},
        estimates=_measured(gain, observation.spent - observation.spent_before) | {"left": left},
        blocked=blocked,
    )
    return decision, replace(state, checks=state.checks + 1, cooling=due)


def _decide_governor(config: GovernorConfig, state: _State, observation: Observation) -> tuple[Decision, _State]:
    gain = _gain(config, observation)
    new = _account(config, state, observation, gain)
    assert new.belief is not None
    fading = _fading(config, new, observation)
    ratio, decay = fading.gain_ratio, fading.decay
    interval = config.check_every * observation.budget
    left = max(observation.budget - observation.spent - observation.cooldown_cost, 0.0)
    stale_for = None if observation.scored_at is None else observation.spent - observation.scored_at
    selectors = observation.selectors or (Selector(None, observation.refresh_cost),)
    known = {_refresh_key(each): _selector_fading(config, new, observation, each, fading) for each in selectors}
    weighed = {
        _refresh_key(selector): pay_back(
            gain_ratio=known[_refresh_key(selector)].gain_ratio,
            decay=known[_refresh_key(selector)].decay,
            refresh_cost=selector.cost,
            remaining=left,
            stale_for=stale_for,
            present_ratio=ratio,
            present_decay=decay,
        )
        for selector in selectors
    }
    renewals = {
        _refresh_key(selector): _Renewal.of(known[_refresh_key(selector)], selector.cost, left, config, observation)
        for selector in selectors
    }
    # To wait for the next check and take the best refresh then.
    waiting = advantage_over(gain_ratio=ratio, decay=decay, length=min(interval, left), age=stale_for)
    waiting += max([0.0, *(renewal.later for renewal in renewals.values())])
    rest = worth_of_training(gain_ratio=ratio, decay=decay, remaining=left, stale_for=stale_for)
    overfit = new.falling_back >= config.overfit_checks
    blocked = _blocked(config, state, new, observation, gain, left)
    annealing = "CONTINUE" in blocked
    values = {"CONTINUE": 0.0}
    choices: dict[str, tuple[Action, str | None]] = {"CONTINUE": (Action.CONTINUE, None)}
    for selector in selectors:
        key = _refresh_key(selector)
        values[key] = weighed[key].benefit - (1 + config.deadband) * weighed[key].cost
        if values[key] > 0:
            values[key] += renewals[key].more
            if renewals[key].now < waiting and stale_for is not None:
                blocked.setdefault(key, "it will be worth more later, when the present selection has aged")
        choices[key] = (Action.REFRESH, selector.name)
    choices["COOLDOWN"] = (Action.COOLDOWN, None)
    # To stop forgoes the rest, which is worth its negative once training makes the anchors worse.
    values["COOLDOWN"] = 0.0 if annealing else rest if overfit else -rest
    menu = options(replace(observation, arms=_arms(new, observation, stale_for)), config, left)
    for option in menu:
        key = action_key(option.action, option.argument)
        values[key], choices[key] = option.value, (option.action, option.argument)
        retreat = key == _RETREAT and observation.selector is not None
        why = option.blocked or _closed(config, state, new, observation, gain, blocked, dwell=not retreat)
        if why is not None:
            blocked[key] = why
    new, unpriced = _price(config, state, observation, new, ratio, menu, blocked)
    if unpriced is not None and not annealing and "COOLDOWN" not in blocked:
        values["COOLDOWN"] = unpriced * left
    # Of equals max takes the first: to go on.
    ranked = sorted((key for key in choices if key not in blocked), key=lambda key: -values[key])
    new, key = _wait_for_window(config, new, ranked, choices, blocked)
    action, argument = choices[key]
    promise = _promise(config, new, observation, gain, action, ratio, decay, stale_for)
    shown = weighed[key if action is Action.REFRESH else _refresh_key(selectors[0])]
    assert new.belief is not None
    low, high = new.belief.interval()
    decision = Decision(
        step=observation.step,
        action=action,
        reason=_reason(
            config,
            observation,
            gain,
            shown,
            action,
            blocked,
            left=left,
            ratio=ratio,
            decay=decay,
            state=new,
            argument=argument,
            key=key,
            value=values[key],
        ),
        inputs=_inputs("governor", config, state, observation),
        values=values,
        estimates=_measured(
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


def _arms(state: _State, observation: Observation, stale_for: float | None) -> tuple[Arm, ...]:
    """The arms offered, with what the control arm has shown of the way back to the pool."""
    if observation.selector is None or stale_for is None:
        return tuple(observation.arms)
    points = [point for name, point in state.advantages if name == observation.selector]
    recent = recent_advantage(points, within=stale_for)
    found = []
    for arm in observation.arms:
        if arm.name == POOL:
            if recent is None or recent[0] <= 0:
                # Nothing measured, or a selection that does no good at all: as fast a way back as can be written.
                ratio, error = (1.0, _UNKNOWN_ERROR) if recent is None else (_FASTEST, 0.0)
            else:
                # A few readings are enough to ask of a selection that it be faster at all: going back is free.
                proof = recent[2] < _READINGS
                ratio, error = 1 / recent[0], recent[1] / recent[0] ** 2 if proof else 0.0
            arm = replace(arm, ratio=min(ratio, _FASTEST), standard_error=min(error, _UNKNOWN_ERROR))
        found.append(arm)
    return tuple(found)


def _refresh_key(selector: Selector) -> str:
    return action_key(Action.REFRESH, selector.name)


@dataclass(frozen=True)
class _Renewal:
    """What refreshing now is worth with the renewals that follow, what it is worth at the next check, and what the
    renewals add to it."""

    now: float
    later: float
    more: float

    @classmethod
    def of(cls, fading: Fading, cost: float, left: float, config: GovernorConfig, observation: Observation) -> _Renewal:
        interval = config.check_every * observation.budget
        how: dict[str, float] = {"gain_ratio": fading.gain_ratio, "decay": fading.decay, "refresh_cost": cost}
        now = worth_of_renewing(**how, remaining=left, shortest=interval * config.min_dwell)
        later = worth_of_renewing(**how, remaining=max(left - interval, 0.0), shortest=interval * config.min_dwell)
        once = advantage_over(gain_ratio=fading.gain_ratio, decay=fading.decay, length=left - cost) - cost
        return cls(now, later, now - once)


def _selector_fading(
    config: GovernorConfig, state: _State, observation: Observation, selector: Selector, present: Fading
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


def _tried(config: GovernorConfig, state: _State, observation: Observation, present: Fading) -> list[Fading]:
    """What is known of every selector that has been in use; without a control arm little, and nothing is pooled."""
    in_use = {state.selector, *(name for name, _, _ in state.selectors)}
    names = {name for name, _ in state.advantages if name is not None and name in in_use}
    return [
        present
        if name == state.selector
        else _selector_fading(config, state, observation, Selector(name, 0.0), present)
        for name in sorted(names)
    ]


def _fading(config: GovernorConfig, state: _State, observation: Observation) -> Fading:
    """rho and tau: of the belief and the prior, and of the control arm's advantages where there are any."""
    assert state.belief is not None
    points = [point for name, point in state.advantages if name == state.selector]
    return _with_advantages(config, observation, state.belief.ratio, math.sqrt(state.belief.log_variance), points)


def _with_advantages(
    config: GovernorConfig, observation: Observation, ratio: float, log_sd: float, points: list[Advantage]
) -> Fading:
    decay = config.prior_decay * observation.budget
    if not points or log_sd <= 0:
        return Fading(ratio, log_sd, decay, config.decay_log_sd)
    return estimate_fading(
        points, gain_ratio=ratio, gain_ratio_log_sd=log_sd, decay=decay, decay_log_sd=config.decay_log_sd
    )


def _closed(
    config: GovernorConfig,
    state: _State,
    new: _State,
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


def _price(
    config: GovernorConfig,
    state: _State,
    observation: Observation,
    new: _State,
    ratio: float,
    menu: list[Option],
    blocked: Mapping[str, str],
) -> tuple[_State, float | None]:
    """Count checks on which training is not worth its price; the unreturned share of it once they are enough.

    The rate that counts is an optimistic one: the upper bound of the filtered rate, times the best change that is
    open.
    """
    upper = new.forecaster.upper(config.stop_probability)
    if observation.price is None or upper is None:
        return replace(new, below_price=0), None
    best = max([1.0, *(1 + max(o.value, 0.0) / max(_left(observation), 1e-300) for o in menu if o.blocked is None)])
    if any(key not in blocked for key in _refresh_keys(observation)):
        best = max(best, ratio)
    hopeful = max(upper, 0.0) * best
    count = state.below_price + 1 if hopeful <= observation.price else state.below_price
    if hopeful > config.rearm * observation.price:
        count = 0
    new = replace(new, below_price=count)
    if count < config.stop_checks or hopeful > observation.price:
        return new, None
    return new, 1 - hopeful / observation.price if observation.price > 0 else None


def _left(observation: Observation) -> float:
    return max(observation.budget - observation.spent - observation.cooldown_cost, 0.0)


def _wait_for_window(
    config: GovernorConfig,
    new: _State,
    ranked: list[str],
    choices: Mapping[str, tuple[Action, str | None]],
    blocked: dict[str, str],
) -> tuple[_State, str]:
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
    new: _State,
    observation: Observation,
    gain: PairedGain | None,
    action: Action,
    ratio: float,
    decay: float,
    stale_for: float | None,
) -> dict[str, Any] | None:
    """What the next interval should gain under the action taken, for the audit; None where it cannot be said."""
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
    factor = 1.0
    if action is Action.REFRESH:
        kept = 0.0 if stale_for is None else math.exp(-stale_for / decay)
        factor = ratio / (1 + (ratio - 1) * kept)
    rate, scale = found.rate * factor, found.scale * factor
    low, high = new.forecaster.calibration.interval(predicted=rate, scale=scale)
    known = new.forecaster.calibration.calibrated
    return {"rate": rate, "scale": scale, "low": low if known else None, "high": high if known else None}


def _gain(config: GovernorConfig, observation: Observation) -> PairedGain | None:
    """Measure the gain since the previous check; None at the first check and when a loss is not finite."""
    losses = (*observation.anchors_before, *observation.anchors_now)
    if not observation.anchors_before or observation.problem is not None or not all(map(math.isfinite, losses)):
        return None
    if len(set(observation.clusters)) >= 2:
        return clustered_gain(
            observation.anchors_before, observation.anchors_now, observation.clusters, confidence=config.confidence
        )
    return paired_gain(observation.anchors_before, observation.anchors_now, confidence=config.confidence)


def _measured(gain: PairedGain | None, trained: float) -> dict[str, Any]:
    return {
        "gain": None if gain is None else asdict(gain),
        "gain_rate": None if gain is None or trained <= 0 else gain.mean / trained,
    }


def _account(config: GovernorConfig, state: _State, observation: Observation, gain: PairedGain | None) -> _State:
    """Count the check and hand its gain to the belief, before or after the latest refresh."""
    if observation.refreshes_done < state.refreshes_seen:
        raise ValueError(
            f"refreshes_done must not fall: {state.refreshes_seen} were seen, got {observation.refreshes_done}"
        )
    belief, forecaster = state.belief, state.forecaster
    assert belief is not None
    decay = config.prior_decay * observation.budget
    refreshed = observation.refreshes_done > state.refreshes_seen
    scoring_spent = state.scoring_spent
    if refreshed:
        if observation.scored_at is None:
            raise ValueError("scored_at must be given once refreshes_done is positive, got None")
        scoring_spent += max(observation.scored_at - observation.spent_before, 0.0)
        belief = belief.refreshed()
    state, belief = _use_selector(config, state, belief, observation)
    start, end = observation.spent_before - state.scoring_spent, observation.spent - scoring_spent
    if gain is None or not 0 <= start < end:
        belief, forecaster = belief.interrupted(), forecaster.interrupted()
    else:
        freshness = 0.0
        if observation.scored_at is not None:
            since_scoring = observation.spent - (end - start) / 2 - observation.scored_at
            freshness = math.exp(-max(since_scoring, 0.0) / decay)
        interval = Interval(start, end, gain.mean, gain.standard_error, freshness)
        loss = math.fsum(observation.anchors_now) / len(observation.anchors_now)
        if end - start > _SHORTEST * observation.budget:
            forecaster = forecaster.measured(interval, loss, slowing=config.slowing, scatter=config.trajectory_log_sd)
        belief = belief.measured(
            interval,
            response_checks=config.response_checks,
            slowing=config.slowing,
            slowing_sd=config.slowing_sd,
            trajectory_log_sd=config.trajectory_log_sd,
        )
    return replace(
        state,
        checks=state.checks + 1,
        refreshes_seen=observation.refreshes_done,
        checks_since_refresh=1 if refreshed else state.checks_since_refresh + 1,
        checks_since_move=None if state.checks_since_move is None else state.checks_since_move + 1,
        falling_back=state.falling_back + 1 if gain is not None and gain.high < 0 else 0,
        scoring_spent=scoring_spent,
        advantages=_advantages(state, observation),
        forecaster=forecaster,
        belief=belief,
    )


def _advantages(state: _State, observation: Observation) -> tuple[tuple[str | None, Advantage], ...]:
    if observation.advantage is None:
        return state.advantages
    return (*state.advantages, (observation.selector, observation.advantage))[-_KEPT_ADVANTAGES:]


def _use_selector(
    config: GovernorConfig, state: _State, belief: Belief, observation: Observation
) -> tuple[_State, Belief]:
    """Put aside the belief about one selector and take up that about the one now in use."""
    name = observation.selector
    if name == state.selector:
        return state, belief
    known = {key: (mean, variance) for key, mean, variance in state.selectors}
    if state.selector is not None:
        known[state.selector] = (belief.log_mean, belief.log_variance)
    offered = {selector.name: selector.gain_ratio for selector in observation.selectors}
    prior = (math.log(offered.get(name) or config.prior_gain_ratio), config.prior_log_sd**2)
    mean, variance = known.pop(name, prior) if name is not None else prior
    kept = tuple((key, *known[key]) for key in sorted(known))
    return replace(state, selector=name, selectors=kept), replace(belief, log_mean=mean, log_variance=variance)


_DUE = "one more interval would eat into the cooldown's reserve"


def _blocked(
    config: GovernorConfig,
    state: _State,
    new: _State,
    observation: Observation,
    gain: PairedGain | None,
    left: float,
) -> dict[str, str]:
    """Return the actions that are not open at this check, and why."""

    def amount(value: float) -> str:
        return format_amount(value, observation.unit)

    refresh = _refresh_keys(observation)
    if state.cooling:
        return dict.fromkeys(("CONTINUE", *refresh), "the cooldown has begun")
    if _cooldown_due(observation, config):
        return dict.fromkeys(("CONTINUE", *refresh), _DUE)
    if not observation.loss_finite:
        return dict.fromkeys((*refresh, "COOLDOWN"), "a training loss is not finite")
    if observation.problem is not None:
        return dict.fromkeys((*refresh, "COOLDOWN"), observation.problem)
    if observation.anchors_before and gain is None:
        return dict.fromkeys((*refresh, "COOLDOWN"), "an anchor loss is not finite")
    warmup = config.warmup * observation.budget
    if observation.step == 0 or not observation.anchors_before:
        why = "a selection waits until this run has shown a first gain"
    elif observation.spent < warmup:
        why = f"only {amount(observation.spent)} of the {amount(warmup)} of warm-up are spent"
    elif observation.refreshes_done and new.checks_since_refresh < config.min_dwell:
        why = f"this is check {new.checks_since_refresh} of {config.min_dwell} since the last one"
    elif new.falling_back >= config.overfit_checks:
        why = "the anchors are getting worse"
    elif new.checks_since_move is not None and new.checks_since_move < config.min_dwell:
        why = f"this is check {new.checks_since_move} of {config.min_dwell} since the last change"
    elif observation.refreshes_done and config.require_alarm and not _drifted(new, observation):
        why = "no drift detector alarms"
    else:
        closed = {}
        for selector in observation.selectors or (Selector(None, observation.refresh_cost),):
            reason = over_cap(observation, config, selector.cost)
            if selector.cost >= left:
                reason = f"it costs {amount(selector.cost)} and {amount(left)} is left before the cooldown"
            if reason is not None:
                closed[_refresh_key(selector)] = reason
        return closed
    return dict.fromkeys(_refresh_keys(observation), why)


def _refresh_keys(observation: Observation) -> list[str]:
    return [_refresh_key(selector) for selector in observation.selectors] or ["REFRESH"]


def _drifted(state: _State, observation: Observation) -> bool:
    return alarmed([*observation.drift, state.forecaster.cusum.reading])


def _progress(gain: PairedGain | None, observation: Observation) -> str:
    if gain is None:
        return "no gain has been measured yet"
    spent = format_amount(observation.spent - observation.spent_before, observation.unit)
    return f"the anchors gained {gain.mean:.3g} ± {gain.standard_error:.2g} nats over the last {spent}"


def _anneal(blocked: Mapping[str, str], left: float, observation: Observation, gain: PairedGain | None) -> str:
    left_text = format_amount(left, observation.unit)
    return f"Anneal: {blocked['CONTINUE']}, {left_text} away; {_progress(gain, observation)}."


def _reason(
    config: GovernorConfig,
    observation: Observation,
    gain: PairedGain | None,
    weighed: PayBack,
    action: Action,
    blocked: Mapping[str, str],
    *,
    left: float,
    ratio: float,
    decay: float,
    state: _State,
    key: str,
    argument: str | None,
    value: float,
) -> str:
    def amount(value: float) -> str:
        return format_amount(value, observation.unit)

    progress = _progress(gain, observation)
    if action is Action.COOLDOWN:
        if "CONTINUE" in blocked:
            return _anneal(blocked, left, observation, gain)
        if observation.price is not None and state.falling_back < config.overfit_checks:
            return (
                f"Anneal: on {state.below_price} checks in a row training returned less than its price of "
                f"{observation.price:.3g} nats per unit of the budget; {progress}."
            )
        return f"Anneal early: {state.falling_back} checks in a row the anchors got worse for sure; {progress}."
    if "COOLDOWN" in blocked:
        return f"Go on as planned: {blocked['COOLDOWN']}, so nothing is decided on it."
    if action not in (Action.CONTINUE, Action.REFRESH):
        doing = {Action.SWITCH: "Switch to", Action.BATCH: "Batch", Action.PROBE: "Probe", Action.MEMORY: "Memory mode"}
        return f"{doing[action]} {argument}: worth {amount(value)} of the {amount(left)} left; {progress}."
    refused = [blocked.get(each) for each in _refresh_keys(observation)]
    if action is Action.CONTINUE and all(refused):
        return f"Go on: {progress}; no refresh: {refused[0]}."
    offered = {selector.name: selector.cost for selector in observation.selectors}
    cost = offered.get(argument, observation.selectors[0].cost if offered else observation.refresh_cost)
    price = amount(cost)
    if weighed.cost != cost:
        price += f", worth {amount(weighed.cost)} of unselected training,"
    weights = (
        f"scoring the pool costs {price} and should return {amount(weighed.benefit)} in the {amount(left)} left "
        f"before the cooldown (gain ratio {ratio:.2f}, fading over {amount(decay)})"
    )
    if action is Action.REFRESH:
        return f"Refresh{'' if argument is None else f' by {argument}'}: {weights}; {progress}."
    short = f", not {config.deadband:.0%} more" if weighed.benefit > weighed.cost else ""
    return f"Go on: {weights}{short}; {progress}."
