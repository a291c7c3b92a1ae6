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

from pyeff.governor.budget import UNITS, format_amount
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
            buys a first scoring of up to 28 % of the budget and none dearer; set 1 to refuse every selection.
        prior_log_sd: standard deviation of log rho0. log 2: from no gain at all to fourfold within one.
        prior_decay: tau, share of the budget over which a selection's advantage falls to 1/e. Half: scores of
            averaged weights go stale over a good part of a short run, not within a few checks.
        trajectory_log_sd: scatter of a measured log gain ratio beyond the anchors' sampling error: the path
            of the weights is one draw, and gains of neighbouring checks commonly differ by half.
        slowing_exponent: p in "without a refresh the gain rate would have gone on as (training done)^-p". 1
            is loss falling with the logarithm of training; a power law L0 + A C^-a has p = 1 + a.
        response_checks: checks over which a refresh is judged, and before it its baseline. Two: the first
            check after a switch still sees averaged weights from before it.
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
    slowing_exponent: float = 1.0
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
        low, high = _RATIO_LIMITS
        require("prior_gain_ratio", low <= self.prior_gain_ratio <= high, f"between {low:g} and {high:g}")
        require("prior_decay", math.isfinite(self.prior_decay) and self.prior_decay > 0, "positive")
        for name in ("prior_log_sd", "trajectory_log_sd", "slowing_exponent", "deadband"):
            require(name, math.isfinite(getattr(self, name)) and getattr(self, name) >= 0, "not negative")


# One run's noise must not convince the governor of more than a sixteenfold gain or loss.
_RATIO_LIMITS = (1 / 16, 16.0)


@dataclass(frozen=True)
class PayBack:
    """Both sides of the pay-back rule, in the budget's unit of training on the present data."""

    benefit: float
    cost: float

    def pays(self, deadband: float = 0.0) -> bool:
        """Whether the benefit exceeds the cost by the share ``deadband``."""
        return self.benefit > (1 + deadband) * self.cost


def pay_back(
    *, gain_ratio: float, decay: float, refresh_cost: float, remaining: float, stale_for: float | None
) -> PayBack:
    """Weigh a fresh selection against its cost.

    benefit = integral from 0 to B - S of (rho - 1) (exp(-x / tau) - exp(-(x + c) / tau)) dx
            = (rho - 1) tau (1 - exp(-c / tau)) (1 - exp(-(B - S) / tau)),
    cost    = S (1 + (rho - 1) exp(-c / tau)).

    Args:
        gain_ratio: rho > 0, rate of gain right after a selection over that without any.
        decay: tau > 0, spend over which the advantage falls to 1/e.
        refresh_cost: S >= 0.
        remaining: B, what is left before the cooldown reserve; all four in the same unit.
        stale_for: c, spent since the last scoring; None when the pool was never scored (c infinite).

    The benefit is 0 when S >= B. Raises ValueError for amounts out of range.

    >>> pay_back(gain_ratio=2.0, decay=100.0, refresh_cost=10.0, remaining=80.0, stale_for=None).pays()
    True
    """
    for name, value in (("gain_ratio", gain_ratio), ("decay", decay)):
        if not math.isfinite(value) or value <= 0:
            raise ValueError(f"{name} must be positive and finite, got {value!r}")
    for name, value in (
        ("refresh_cost", refresh_cost),
        ("remaining", remaining),
        ("stale_for", stale_for or 0.0),
    ):
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} must be finite and not negative, got {value!r}")
    left = 1.0 if stale_for is None else -math.expm1(-stale_for / decay)  # share of the advantage that was lost
    after = max(remaining - refresh_cost, 0.0)
    benefit = (gain_ratio - 1) * decay * left * -math.expm1(-after / decay)
    return PayBack(benefit=benefit, cost=refresh_cost * (1 + (gain_ratio - 1) * (1 - left)))


@dataclass(frozen=True)
class _Interval:
    """Gain between two checks, against training spend (scoring not counted)."""

    start: float
    end: float
    gain: float
    standard_error: float

    @property
    def rate(self) -> float:
        return self.gain / (self.end - self.start)

    @property
    def midpoint(self) -> float:
        return (self.start + self.end) / 2


@dataclass(frozen=True)
class _Baseline:
    """How fast the anchors improved before a refresh, and what the refresh replaced."""

    rate: float
    log_variance: float
    midpoint: float
    freshness: float  # what was left of the replaced selection's advantage, 0 without one
    refreshed_at: float


@dataclass(frozen=True)
class _State:
    checks: int = 0
    refreshes_seen: int = 0
    checks_since_refresh: int = 0
    falling_back: int = 0
    log_ratio: float = 0.0
    log_ratio_variance: float = 0.0
    scoring_spent: float = 0.0
    scored_at: float | None = None
    history: tuple[_Interval, ...] = ()
    baseline: _Baseline | None = None
    cooling: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"history": [asdict(interval) for interval in self.history]}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> _State:
        names = {item.name for item in fields(cls)}
        if set(plain) != names:
            raise ValueError(f"state must have {', '.join(sorted(names))}, got {', '.join(sorted(map(str, plain)))}")
        baseline = plain["baseline"]
        return cls(
            **{
                **plain,
                "history": tuple(_Interval(**interval) for interval in plain["history"]),
                "baseline": None if baseline is None else _Baseline(**baseline),
            }
        )


def _cooldown_due(observation: Observation, config: GovernorConfig) -> bool:
    """Whether going on to the next check would eat into the cooldown's reserve."""
    interval = config.check_every * observation.budget
    return observation.budget - observation.spent - observation.cooldown_cost < interval


class UniformPolicy:
    """Train on the whole pool: CONTINUE until the cooldown is due, and never REFRESH.

    The baseline of the same budget without selection. It uses ``check_every`` of the config and ignores the rest.
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

    At each check the governor compares the losses of the same anchor samples with those of the check before, updates
    what it believes a selection is worth (:func:`pay_back`), and chooses

    - REFRESH when scoring the pool again is expected to return more training than it costs, by the deadband;
    - COOLDOWN when one more interval would eat into the reserve, or when the whole interval of the gain lay below
      zero ``overfit_checks`` times in a row;
    - CONTINUE otherwise, and whenever a loss is not finite.

    Deterministic: equal observations in equal order give equal decisions. Cost: microseconds.
    """

    name = "governor"

    def __init__(self, config: GovernorConfig | None = None) -> None:
        self.config = config or GovernorConfig()
        self._state = _State(
            log_ratio=math.log(self.config.prior_gain_ratio), log_ratio_variance=self.config.prior_log_sd**2
        )

    @property
    def gain_ratio(self) -> float:
        """What the governor believes now: rate of gain on a fresh selection over that on the whole pool."""
        return math.exp(self._state.log_ratio)

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
    due = state.cooling or _cooldown_due(observation, config)
    left_text = format_amount(left, observation.unit)
    if due:
        reason = f"{left_text} before the cooldown's reserve is less than one check interval: anneal now."
    else:
        reason = f"{left_text} left before the cooldown's reserve; this policy never selects."
    decision = Decision(
        step=observation.step,
        action=Action.COOLDOWN if due else Action.CONTINUE,
        reason=reason,
        inputs=_inputs("uniform", config, state, observation),
        values={"CONTINUE": 0.0, "REFRESH": -observation.refresh_cost, "COOLDOWN": 0.0 if due else -left},
        blocked={"REFRESH": "the uniform policy never selects"} | ({"CONTINUE": "the cooldown is due"} if due else {}),
    )
    return decision, replace(state, checks=state.checks + 1, cooling=due)


def _decide_governor(config: GovernorConfig, state: _State, observation: Observation) -> tuple[Decision, _State]:
    usable = bool(observation.anchors_before) and all(
        math.isfinite(loss) for loss in (*observation.anchors_before, *observation.anchors_now)
    )
    gain = None
    if usable:
        gain = paired_gain(observation.anchors_before, observation.anchors_now, confidence=config.confidence)
    decay = config.prior_decay * observation.budget
    new = _learn(config, _account(config, state, observation, gain), decay)
    left = max(observation.budget - observation.spent - observation.cooldown_cost, 0.0)
    stale_for = None if observation.scored_at is None else observation.spent - observation.scored_at
    ratio = math.exp(new.log_ratio)
    weighed = pay_back(
        gain_ratio=ratio,
        decay=decay,
        refresh_cost=observation.refresh_cost,
        remaining=left,
        stale_for=stale_for,
    )
    freshness = 0.0 if stale_for is None else math.exp(-stale_for / decay)
    # What the rest of the plateau yields as things are, in training on unselected data.
    worth_of_rest = left + (ratio - 1) * freshness * decay * -math.expm1(-left / decay)
    overfit = new.falling_back >= config.overfit_checks
    due = _cooldown_due(observation, config)
    sound = observation.loss_finite and (usable or not observation.anchors_before)

    def amount(value: float) -> str:
        return format_amount(value, observation.unit)

    blocked: dict[str, str] = {}
    if state.cooling:
        blocked = dict.fromkeys(("CONTINUE", "REFRESH"), "the cooldown has begun")
    elif not observation.loss_finite:
        blocked = dict.fromkeys(("REFRESH", "COOLDOWN"), "a training loss is not finite")
    elif due:
        blocked = dict.fromkeys(("CONTINUE", "REFRESH"), "one more interval would eat into the reserve")
    elif not sound:
        blocked = dict.fromkeys(("REFRESH", "COOLDOWN"), "an anchor loss is not finite")
    elif overfit:
        blocked["REFRESH"] = "the anchors are getting worse, and what a selection is worth presumes the opposite"
    else:
        warmup = config.warmup * observation.budget
        if observation.step == 0 or not observation.anchors_before:
            blocked["REFRESH"] = "nothing is known of this run yet: a selection waits for the first gain"
        elif observation.spent < warmup:
            blocked["REFRESH"] = f"warm-up: {amount(observation.spent)} of {amount(warmup)} spent"
        elif observation.refreshes_done and new.checks_since_refresh < config.min_dwell:
            done = new.checks_since_refresh
            blocked["REFRESH"] = f"check {done} of {config.min_dwell} since the last refresh"
        elif observation.refresh_cost >= left:
            blocked["REFRESH"] = (
                f"it costs {amount(observation.refresh_cost)} and only {amount(left)} is left before the cooldown"
            )
    values = {
        "CONTINUE": 0.0,
        "REFRESH": weighed.benefit - (1 + config.deadband) * weighed.cost,
        "COOLDOWN": worth_of_rest if overfit else 0.0 if due or state.cooling else -worth_of_rest,
    }
    # Ties go to the action that comes first: to do nothing new.
    action = max((item for item in Action if item.value not in blocked), key=lambda item: values[item.value])
    decision = Decision(
        step=observation.step,
        action=action,
        reason=_reason(
            config, observation, gain, weighed, action, blocked, left=left, ratio=ratio, decay=decay, state=new
        ),
        inputs=_inputs("governor", config, state, observation),
        values=values,
        estimates={
            "gain": None if gain is None else asdict(gain),
            "gain_rate": new.history[-1].rate if new.history else None,
            "gain_ratio": ratio,
            "gain_ratio_low": math.exp(new.log_ratio - 1.96 * math.sqrt(new.log_ratio_variance)),
            "gain_ratio_high": math.exp(new.log_ratio + 1.96 * math.sqrt(new.log_ratio_variance)),
            "decay": decay,
            "stale_for": stale_for,
            "refresh_benefit": weighed.benefit,
            "refresh_cost": weighed.cost,
            "left": left,
        },
        blocked=blocked,
    )
    return decision, replace(new, cooling=state.cooling or action is Action.COOLDOWN)


def _account(config: GovernorConfig, state: _State, observation: Observation, gain: PairedGain | None) -> _State:
    """Count the check, and file its gain before or after the latest refresh."""
    if observation.refreshes_done < state.refreshes_seen:
        raise ValueError(
            f"refreshes_done must not fall: {state.refreshes_seen} were seen, got {observation.refreshes_done}"
        )
    refreshed = observation.refreshes_done > state.refreshes_seen
    scoring_spent = state.scoring_spent
    history, baseline = state.history, state.baseline
    if refreshed:
        scored_at = observation.scored_at
        if scored_at is None:
            raise ValueError("scored_at must be given once refreshes_done is positive, got None")
        paid_for = max(scored_at - observation.spent_before, 0.0)
        baseline = _baseline(config, state, observation)
        scoring_spent += paid_for
        history = ()
    falling = gain is not None and gain.high < 0
    start, end = observation.spent_before - state.scoring_spent, observation.spent - scoring_spent
    if gain is None or end <= start:
        history = ()  # a window must have no gap
    else:
        interval = _Interval(start, end, gain.mean, gain.standard_error)
        history = (*history, interval)[-config.response_checks :]
    return replace(
        state,
        checks=state.checks + 1,
        refreshes_seen=observation.refreshes_done,
        checks_since_refresh=1 if refreshed else state.checks_since_refresh + 1,
        falling_back=state.falling_back + 1 if falling else 0,
        scoring_spent=scoring_spent,
        scored_at=observation.scored_at,
        history=history,
        baseline=baseline,
    )


def _baseline(config: GovernorConfig, state: _State, observation: Observation) -> _Baseline | None:
    """Sum up the intervals before a refresh; None when they show no gain to compare with."""
    total = _sum_intervals(state.history)
    if total is None or total.gain <= 0:
        return None
    freshness = 0.0
    if state.scored_at is not None:
        stale_for = observation.spent_before - state.scored_at - (total.end - total.start) / 2
        freshness = math.exp(-max(stale_for, 0.0) / (config.prior_decay * observation.budget))
    return _Baseline(
        rate=total.rate,
        log_variance=(total.standard_error / total.gain) ** 2,
        midpoint=total.midpoint,
        freshness=freshness,
        refreshed_at=total.end,
    )


def _sum_intervals(history: Sequence[_Interval]) -> _Interval | None:
    """Join neighbouring intervals.

    Their errors share the anchors, so they are not independent: the sum of standard errors bounds that of the sum.
    """
    if not history:
        return None
    return _Interval(
        start=history[0].start,
        end=history[-1].end,
        gain=math.fsum(interval.gain for interval in history),
        standard_error=math.fsum(interval.standard_error for interval in history),
    )


def _learn(config: GovernorConfig, state: _State, decay: float) -> _State:
    """Update the gain ratio once a refresh has been watched for ``response_checks`` checks.

    Observed is y = log(rate after / rate expected without the refresh), modelled as
    h(log rho) = log(1 + (rho - 1) a) - log(1 + (rho - 1) b) plus noise, where a and b are what is left of the new and
    of the replaced selection's advantage in the two windows. With a = 1 and b = 0, h is log rho itself and this is
    the conjugate Gaussian update; otherwise it is linearised at the present estimate.
    """
    baseline, after = state.baseline, _sum_intervals(state.history)
    if baseline is None or after is None or len(state.history) < config.response_checks:
        return state
    # Learning slows down by itself: the refresh is judged against the slowed rate, not the last one.
    expected = baseline.rate * (baseline.midpoint / after.midpoint) ** config.slowing_exponent
    # A loss has no logarithm. It counts as a gain the size of its own error, one standard deviation in the log.
    floor = max(after.standard_error, _RATIO_LIMITS[0] * expected * (after.end - after.start))
    gained = max(after.gain, floor)
    observed = math.log(gained / (after.end - after.start) / expected)
    noise = (after.standard_error / gained) ** 2 + baseline.log_variance + config.trajectory_log_sd**2

    fresh, stale = math.exp(-(after.midpoint - baseline.refreshed_at) / decay), baseline.freshness
    ratio = math.exp(state.log_ratio)
    with_fresh, with_stale = 1 + (ratio - 1) * fresh, 1 + (ratio - 1) * stale
    slope = ratio * (fresh / with_fresh - stale / with_stale)
    variance = state.log_ratio_variance
    spread = slope**2 * variance + noise
    weight = variance * slope / spread if spread > 0 else 0.0
    moved = state.log_ratio + weight * (observed - math.log(with_fresh / with_stale))
    low, high = _RATIO_LIMITS
    return replace(
        state,
        log_ratio=min(max(moved, math.log(low)), math.log(high)),
        log_ratio_variance=max(variance * (1 - weight * slope), 0.0),
        baseline=None,
    )


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

    if gain is None:
        progress = "no gain has been measured yet"
    else:
        progress = (
            f"the anchors gained {gain.mean:.3g} ± {gain.standard_error:.2g} nats "
            f"over the last {amount(observation.spent - observation.spent_before)}"
        )
    if action is Action.COOLDOWN:
        if "CONTINUE" in blocked:
            return f"Anneal: {blocked['CONTINUE']}, with {amount(left)} left before it; {progress}."
        return f"Anneal early: at {state.falling_back} checks in a row the anchors got worse beyond doubt; {progress}."
    weights = (
        f"scoring the pool costs {amount(weighed.cost)} of training and should return {amount(weighed.benefit)} "
        f"in the {amount(left)} left before the cooldown (gain ratio {ratio:.2f}, fading over {amount(decay)})"
    )
    if action is Action.REFRESH:
        return f"Refresh: {weights}; {progress}."
    if "COOLDOWN" in blocked:
        return f"Keep the schedule: {blocked['COOLDOWN']}, so nothing is decided on it."
    if "REFRESH" in blocked:
        return f"Go on: {progress}; no refresh: {blocked['REFRESH']}."
    short = "" if weighed.benefit <= weighed.cost else f", less than {config.deadband:.0%} more"
    return f"Go on: {weights}{short}; {progress}."
