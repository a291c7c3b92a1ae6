"""What a policy remembers between checks, and what each check adds to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from pyeff.governor.belief import Belief, Interval
from pyeff.governor.config import GovernorConfig
from pyeff.governor.control import Advantage
from pyeff.governor.forecast import Forecaster
from pyeff.governor.observation import Observation
from pyeff.governor.signals import PairedGain, clustered_gain, paired_gain

_KEPT_ADVANTAGES = 32
# Of a single reading of a ratio less 1, where they are added up.
_BOUND = 2.0
# Share of the budget: a rate over less says nothing, and its square overflows.
_SHORTEST = 1e-9
# A loss from here on counts as not finite, as nan does: its square, over a short interval's, would be infinite.
_LARGEST = 1e100


@dataclass(frozen=True)
class State:
    """What a policy remembers between checks.

    ``belief`` is None for the uniform policy. ``scoring_spent`` is what all scorings cost, so that rates are
    per unit of training; ``net_worth`` is what the control arm saw selections add to it or take from it.
    ``selectors`` are the beliefs (mean and variance of log rho) about those not in use.
    ``candidate`` is the change that was best, but not yet made, on the last ``candidate_checks`` checks.
    """

    checks: int = 0
    refreshes_seen: int = 0
    checks_since_refresh: int = 0
    checks_since_move: int | None = None
    falling_back: int = 0
    below_price: int = 0
    scoring_spent: float = 0.0
    net_worth: float = 0.0
    cooling: bool = False
    candidate: str | None = None
    candidate_checks: int = 0
    selector: str | None = None
    selectors: tuple[tuple[str, float, float], ...] = ()
    advantages: tuple[tuple[str | None, Advantage], ...] = ()
    forecaster: Forecaster = field(default_factory=Forecaster)
    belief: Belief | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able fields."""
        return {
            **{item.name: getattr(self, item.name) for item in fields(self)},
            "selectors": [list(known) for known in self.selectors],
            "advantages": [[name, asdict(point)] for name, point in self.advantages],
            "forecaster": self.forecaster.to_dict(),
            "belief": None if self.belief is None else self.belief.to_dict(),
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> State:
        """Rebuild the state that :meth:`to_dict` wrote; ValueError for other fields."""
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


def usable(observation: Observation) -> bool:
    """Whether every anchor loss is a number whose square is one too."""
    return all(abs(loss) < _LARGEST for loss in (*observation.anchors_before, *observation.anchors_now))


def gain_of(config: GovernorConfig, observation: Observation) -> PairedGain | None:
    """Measure the gain since the previous check; None at the first check and when a loss is not finite."""
    if not observation.anchors_before or observation.problem is not None or not usable(observation):
        return None
    if len(set(observation.clusters)) >= 2:
        return clustered_gain(
            observation.anchors_before, observation.anchors_now, observation.clusters, confidence=config.confidence
        )
    return paired_gain(observation.anchors_before, observation.anchors_now, confidence=config.confidence)


def measured(gain: PairedGain | None, trained: float) -> dict[str, Any]:
    """Return the gain and its rate per unit of training, as a decision's estimates hold them."""
    rate = None if gain is None or trained <= 0 else gain.mean / trained
    return {
        "gain": None if gain is None else asdict(gain),
        "gain_rate": None if rate is None or math.isinf(rate) else rate,
    }


def account(config: GovernorConfig, state: State, observation: Observation, gain: PairedGain | None) -> State:
    """Count the check and hand its gain to the belief, before or after the latest refresh."""
    if observation.refreshes_done < state.refreshes_seen:
        raise ValueError(
            f"refreshes_done must not fall: {state.refreshes_seen} were seen, got {observation.refreshes_done}"
        )
    belief, forecaster = state.belief, state.forecaster
    if belief is None:
        raise ValueError("state must hold a belief, this is one of the uniform policy")
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
        net_worth=state.net_worth + _added(observation, end - start),
        advantages=_advantages(state, observation),
        forecaster=forecaster,
        belief=belief,
    )


def _added(observation: Observation, trained: float) -> float:
    """What the selection in use added to an interval's training, by the control arm."""
    if observation.advantage is None:
        return 0.0
    return min(max(observation.advantage.ratio - 1, -_BOUND), _BOUND) * max(trained, 0.0)


def _advantages(state: State, observation: Observation) -> tuple[tuple[str | None, Advantage], ...]:
    if observation.advantage is None:
        return state.advantages
    return (*state.advantages, (observation.selector, observation.advantage))[-_KEPT_ADVANTAGES:]


def _use_selector(
    config: GovernorConfig, state: State, belief: Belief, observation: Observation
) -> tuple[State, Belief]:
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
