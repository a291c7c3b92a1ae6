"""Decide what the next part of a budget is spent on: go on, select data again, or anneal and stop.

Decisions are a pure function of an :class:`Observation`, the policy's settings and its state. They read no
clock and draw no random numbers, and all three are written into the decision, so a log can be replayed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from typing import Any, Protocol

from pyeff.governor.belief import RATIO_LIMITS, Belief, Interval
from pyeff.governor.budget import UNITS, format_amount
from pyeff.governor.payback import PayBack, pay_back, worth_of_training
from pyeff.governor.signals import PairedGain, paired_gain


class Action(str, Enum):
    """What a policy can ask for at a check."""

    CONTINUE = "CONTINUE"
    REFRESH = "REFRESH"
    COOLDOWN = "COOLDOWN"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Observation:
    """What a policy sees at a check; every cost is in the budget's unit.

    Args:
        step: optimizer steps done.
        spent: the budget used so far.
        budget: the whole budget.
        unit: "flops", "seconds" or "tokens".
        anchors_before: per-sample losses of the averaged weights at the previous check; empty at the first
            one.
        anchors_now: the same samples in the same order, now.
        spent_before: ``spent`` at the previous check (0 at the first).
        refresh_cost: what scoring the pool would cost, S.
        cooldown_cost: what must be left for annealing and the final evaluation.
        scored_at: ``spent`` right *after* the pool was last scored; None when it never was.
        refreshes_done: how many times the pool was scored.
        loss_finite: whether every training loss since the previous check was finite.

    Raises ValueError for amounts that are negative or not finite, an unknown unit, and anchors that do not
    match. Anchor losses may be non-finite: the policy then keeps its course and says so.
    """

    step: int
    spent: float
    budget: float
    unit: str
    anchors_before: Sequence[float]
    anchors_now: Sequence[float]
    spent_before: float
    refresh_cost: float
    cooldown_cost: float
    scored_at: float | None = None
    refreshes_done: int = 0
    loss_finite: bool = True

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {self.unit!r}")
        for name in ("step", "refreshes_done"):
            value = getattr(self, name)
            if isinstance(value, bool) or value != int(value) or value < 0:
                raise ValueError(f"{name} must be a whole number and not negative, got {value!r}")
        for name in ("spent", "budget", "spent_before", "refresh_cost", "cooldown_cost", "scored_at"):
            value = getattr(self, name)
            if value is None and name == "scored_at":
                continue
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be finite and not negative, got {value!r}")
            object.__setattr__(self, name, float(value))
        if self.budget <= 0:
            raise ValueError(f"budget must be positive, got {self.budget!r}")
        for name in ("spent_before", "scored_at"):
            value = getattr(self, name)
            if value is not None and value > self.spent:
                raise ValueError(f"{name} must not exceed spent ({self.spent!r}), got {value!r}")
        for name in ("anchors_before", "anchors_now"):
            object.__setattr__(self, name, tuple(float(loss) for loss in getattr(self, name)))
        if self.anchors_before and len(self.anchors_before) != len(self.anchors_now):
            raise ValueError(
                f"anchors_before and anchors_now must be the same samples, "
                f"got {len(self.anchors_before)} and {len(self.anchors_now)} of them"
            )
        if len(self.anchors_now) == 1:
            raise ValueError("anchors_now must be at least 2 samples (or none at all), got 1")

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able fields; a non-finite loss becomes the text "nan", "inf" or "-inf"."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in ("anchors_before", "anchors_now"):
            plain[name] = [loss if math.isfinite(loss) else str(loss) for loss in plain[name]]
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Observation:
        """Rebuild the observation that :meth:`to_dict` wrote."""
        return cls(**plain)


@dataclass(frozen=True)
class Decision:
    """An action, why, and everything needed to take it again.

    Args:
        step: the optimizer step it was taken at.
        action: what to do.
        reason: one sentence with the numbers.
        inputs: ``{"policy", "config", "state", "observation"}``: the decision is a function of these alone.
        values: for every action, what it is worth against CONTINUE, in units of the budget's worth of
            training on the present data (see docs/governor.md).
        estimates: measured and believed quantities behind the values: gain and its interval, gain ratio,
            staleness.
        blocked: actions that were not open at this check, and why; the chosen one is the best of the others.
    """

    step: int
    action: Action
    reason: str
    inputs: dict[str, Any]
    values: dict[str, float]
    estimates: dict[str, Any] = field(default_factory=dict)
    blocked: dict[str, str] = field(default_factory=dict)

    @property
    def chosen(self) -> float:
        """The value of the action taken."""
        return self.values[self.action.value]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able fields."""
        return {item.name: getattr(self, item.name) for item in fields(self)} | {"action": self.action.value}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Decision:
        """Rebuild the decision that :meth:`to_dict` wrote."""
        return cls(**{**plain, "action": Action(plain["action"])})


class Policy(Protocol):
    """What the training loop asks of a policy."""

    def decide(self, observation: Observation) -> Decision:
        """Take the decision of one check."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state, JSON-able."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the state."""
        ...


@dataclass(frozen=True)
class GovernorConfig:
    """Settings of the governor, each with the reason for its default.

    Args:
        check_every: share of the budget between checks. 5 %: some fifteen decisions before the cooldown, and
            an anchor evaluation that costs a hundredth of an interval stays at 1 % of the budget.
        warmup: share of the budget spent before the pool may be scored. Scores of an untrained model say
            nothing about the trained one; 5 % is one check.
        prior_gain_ratio: rho0, how many times faster the anchors improve on a fresh selection than on the
            whole pool, before this run has said anything. 2 with ``prior_decay`` 0.5 and a cooldown of 0.2
            buys a first scoring of up to 27 % of the budget and none dearer; set 1 to refuse every selection.
        prior_log_sd: standard deviation of log rho0. log 2: from no gain at all to fourfold within one.
        prior_decay: tau, share of the budget over which a selection's advantage falls to 1/e. Half: scores of
            averaged weights go stale over a good part of a short run, not within a few checks.
        trajectory_log_sd: scatter of a measured log gain ratio beyond the anchors' sampling error: the path
            of the weights is one draw, and gains of neighbouring checks commonly differ by half.
        slowing: p in "without a refresh the rate of gain goes on as (training done)^-p", before the run has
            shown its own. 0 is a loss falling on a straight line, 1 one falling with the logarithm of
            training; half lies between, where a short run of a pretrained model is.
        slowing_sd: standard deviation of p: from 0 to 1 within one. The run's own checks before a refresh
            narrow it.
        response_checks: checks over which a refresh is judged. Two: the first after a switch still sees
            averaged weights from before it.
        min_dwell: checks between two refreshes, so that one is judged before the next is bought.
        overfit_checks: m, successive checks with the whole confidence interval of the gain below zero that
            end the run early. Three at 95 %: by sampling error alone once in 64 000.
        deadband: the expected return must exceed the cost by this share; 10 % keeps rounding-size advantages
            from moving anything.
        confidence: of the interval on the gain.

    Raises ValueError for a value out of range.
    """

    check_every: float = 0.05
    warmup: float = 0.05
    prior_gain_ratio: float = 2.0
    prior_log_sd: float = math.log(2.0)
    prior_decay: float = 0.5
    trajectory_log_sd: float = 0.5
    slowing: float = 0.5
    slowing_sd: float = 0.5
    response_checks: int = 2
    min_dwell: int = 3
    overfit_checks: int = 3
    deadband: float = 0.1
    confidence: float = 0.95

    def __post_init__(self) -> None:
        def require(name: str, holds: bool, expected: str) -> None:
            if not holds:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

        for name in ("response_checks", "min_dwell", "overfit_checks"):
            value = getattr(self, name)
            require(name, not isinstance(value, bool) and isinstance(value, int) and value >= 1, "an integer >= 1")
        require("check_every", 0 < self.check_every < 1, "between 0 and 1")
        require("warmup", 0 <= self.warmup < 1, "at least 0 and below 1")
        require("confidence", 0 < self.confidence < 1, "between 0 and 1")
        low, high = RATIO_LIMITS
        require("prior_gain_ratio", low <= self.prior_gain_ratio <= high, f"between {low:g} and {high:g}")
        require("prior_decay", math.isfinite(self.prior_decay) and self.prior_decay > 0, "positive")
        for name in ("slowing_sd", "trajectory_log_sd"):  # precisions of the forecast are their inverse squares
            require(name, math.isfinite(getattr(self, name)) and getattr(self, name) > 0, "positive")
        for name in ("prior_log_sd", "slowing", "deadband"):
            require(name, math.isfinite(getattr(self, name)) and getattr(self, name) >= 0, "not negative")


@dataclass(frozen=True)
class _State:
    """What a policy remembers between checks.

    ``belief`` is None for the uniform policy. ``scoring_spent`` is what all scorings cost, so that rates are
    per unit of training.
    """

    checks: int = 0
    refreshes_seen: int = 0
    checks_since_refresh: int = 0
    falling_back: int = 0
    scoring_spent: float = 0.0
    cooling: bool = False
    belief: Belief | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            **{item.name: getattr(self, item.name) for item in fields(self)},
            "belief": None if self.belief is None else self.belief.to_dict(),
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> _State:
        names = {item.name for item in fields(cls)}
        if set(plain) != names:
            raise ValueError(f"state must have {sorted(names)}, got {sorted(map(str, plain))}")
        belief = plain["belief"]
        return cls(**{**plain, "belief": None if belief is None else Belief.from_dict(belief)})


def _cooldown_due(observation: Observation, config: GovernorConfig) -> bool:
    """Whether going on to the next check would eat into the cooldown's reserve."""
    interval = config.check_every * observation.budget
    return observation.budget - observation.spent - observation.cooldown_cost < interval


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


class Governor:
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
    config = GovernorConfig(**inputs["config"])
    state = _State.from_dict(inputs["state"])
    return deciders[inputs["policy"]](config, state, Observation.from_dict(inputs["observation"]))[0]


def _inputs(policy: str, config: GovernorConfig, state: _State, observation: Observation) -> dict[str, Any]:
    return {
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
    decay = config.prior_decay * observation.budget
    new = _account(config, state, observation, gain, decay)
    assert new.belief is not None
    left = max(observation.budget - observation.spent - observation.cooldown_cost, 0.0)
    stale_for = None if observation.scored_at is None else observation.spent - observation.scored_at
    ratio = new.belief.ratio
    weighed = pay_back(
        gain_ratio=ratio,
        decay=decay,
        refresh_cost=observation.refresh_cost,
        remaining=left,
        stale_for=stale_for,
    )
    rest = worth_of_training(gain_ratio=ratio, decay=decay, remaining=left, stale_for=stale_for)
    overfit = new.falling_back >= config.overfit_checks
    blocked = _blocked(config, state, new, observation, gain, left)
    annealing = "CONTINUE" in blocked
    values = {
        "CONTINUE": 0.0,
        "REFRESH": weighed.benefit - (1 + config.deadband) * weighed.cost,
        # To stop forgoes the rest, which is worth its negative once training makes the anchors worse.
        "COOLDOWN": 0.0 if annealing else rest if overfit else -rest,
    }
    # Of equals max takes the first: to go on.
    action = max((item for item in Action if item.value not in blocked), key=lambda item: values[item.value])
    low, high = new.belief.interval()
    decision = Decision(
        step=observation.step,
        action=action,
        reason=_reason(
            config, observation, gain, weighed, action, blocked, left=left, ratio=ratio, decay=decay, state=new
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
            "refresh_benefit": weighed.benefit,
            "refresh_cost": weighed.cost,
        },
        blocked=blocked,
    )
    return decision, replace(new, cooling=state.cooling or action is Action.COOLDOWN)


def _gain(config: GovernorConfig, observation: Observation) -> PairedGain | None:
    """Measure the gain since the previous check; None at the first check and when a loss is not finite."""
    losses = (*observation.anchors_before, *observation.anchors_now)
    if not observation.anchors_before or not all(map(math.isfinite, losses)):
        return None
    return paired_gain(observation.anchors_before, observation.anchors_now, confidence=config.confidence)


def _measured(gain: PairedGain | None, trained: float) -> dict[str, Any]:
    return {
        "gain": None if gain is None else asdict(gain),
        "gain_rate": None if gain is None or trained <= 0 else gain.mean / trained,
    }


def _account(
    config: GovernorConfig, state: _State, observation: Observation, gain: PairedGain | None, decay: float
) -> _State:
    """Count the check and hand its gain to the belief, before or after the latest refresh."""
    if observation.refreshes_done < state.refreshes_seen:
        raise ValueError(
            f"refreshes_done must not fall: {state.refreshes_seen} were seen, got {observation.refreshes_done}"
        )
    belief = state.belief
    assert belief is not None
    refreshed = observation.refreshes_done > state.refreshes_seen
    scoring_spent = state.scoring_spent
    if refreshed:
        if observation.scored_at is None:
            raise ValueError("scored_at must be given once refreshes_done is positive, got None")
        scoring_spent += max(observation.scored_at - observation.spent_before, 0.0)
        belief = belief.refreshed()
    start, end = observation.spent_before - state.scoring_spent, observation.spent - scoring_spent
    if gain is None or not 0 <= start < end:
        belief = belief.interrupted()
    else:
        freshness = 0.0
        if observation.scored_at is not None:
            since_scoring = observation.spent - (end - start) / 2 - observation.scored_at
            freshness = math.exp(-max(since_scoring, 0.0) / decay)
        belief = belief.measured(
            Interval(start, end, gain.mean, gain.standard_error, freshness),
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
        falling_back=state.falling_back + 1 if gain is not None and gain.high < 0 else 0,
        scoring_spent=scoring_spent,
        belief=belief,
    )


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

    if state.cooling:
        return dict.fromkeys(("CONTINUE", "REFRESH"), "the cooldown has begun")
    if not observation.loss_finite:
        return dict.fromkeys(("REFRESH", "COOLDOWN"), "a training loss is not finite")
    if _cooldown_due(observation, config):
        return dict.fromkeys(("CONTINUE", "REFRESH"), _DUE)
    if observation.anchors_before and gain is None:
        return dict.fromkeys(("REFRESH", "COOLDOWN"), "an anchor loss is not finite")
    warmup = config.warmup * observation.budget
    if observation.step == 0 or not observation.anchors_before:
        why = "a selection waits until this run has shown a first gain"
    elif observation.spent < warmup:
        why = f"only {amount(observation.spent)} of the {amount(warmup)} of warm-up are spent"
    elif observation.refreshes_done and new.checks_since_refresh < config.min_dwell:
        why = f"this is check {new.checks_since_refresh} of {config.min_dwell} since the last one"
    elif new.falling_back >= config.overfit_checks:
        why = "the anchors are getting worse"
    elif observation.refresh_cost >= left:
        why = f"it costs {amount(observation.refresh_cost)} and {amount(left)} is left before the cooldown"
    else:
        return {}
    return {"REFRESH": why}


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
) -> str:
    def amount(value: float) -> str:
        return format_amount(value, observation.unit)

    progress = _progress(gain, observation)
    if action is Action.COOLDOWN:
        if "CONTINUE" in blocked:
            return _anneal(blocked, left, observation, gain)
        return f"Anneal early: {state.falling_back} checks in a row the anchors got worse for sure; {progress}."
    if "COOLDOWN" in blocked:
        return f"Go on as planned: {blocked['COOLDOWN']}, so nothing is decided on it."
    if "REFRESH" in blocked:
        return f"Go on: {progress}; no refresh: {blocked['REFRESH']}."
    price = amount(observation.refresh_cost)
    if weighed.cost != observation.refresh_cost:
        price += f", worth {amount(weighed.cost)} of unselected training,"
    weights = (
        f"scoring the pool costs {price} and should return {amount(weighed.benefit)} in the {amount(left)} left "
        f"before the cooldown (gain ratio {ratio:.2f}, fading over {amount(decay)})"
    )
    if action is Action.REFRESH:
        return f"Refresh: {weights}; {progress}."
    short = f", not {config.deadband:.0%} more" if weighed.benefit > weighed.cost else ""
    return f"Go on: {weights}{short}; {progress}."
