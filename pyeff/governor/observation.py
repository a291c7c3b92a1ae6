"""What a policy sees at a check, what it may do, and what it decided: plain values that survive JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import Any, Protocol

from pyeff.governor.budget import UNITS
from pyeff.governor.control import Advantage
from pyeff.governor.drift import DriftReading
from pyeff.governor.offers import OFFERS, Arm, BatchSize, MemoryMode, Selector, checked_offers, not_negative
from pyeff.governor.offers import POOL as POOL


class Action(str, Enum):
    """What a policy can ask for at a check. All but the first and the last change one thing about the training.

    ========== ==================================================================
    CONTINUE   go on as now
    REFRESH    score the pool and select anew; the argument names the selector
    SWITCH     train on another arm: a mixture, a subset, a curriculum
    BATCH      "x2" or "/2" the batch
    PROBE      train an arm for a few steps on a branch, only to learn its worth
    MEMORY     another memory mode
    COOLDOWN   anneal the learning rate to zero, evaluate and stop
    ========== ==================================================================
    """

    CONTINUE = "CONTINUE"
    REFRESH = "REFRESH"
    COOLDOWN = "COOLDOWN"
    SWITCH = "SWITCH"
    BATCH = "BATCH"
    PROBE = "PROBE"
    MEMORY = "MEMORY"

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
        clusters: the document of each anchor, where several come from one; empty where they are independent.
        overhead: what was spent on evaluation, scoring and probes, where a cap on it is set.
        check_cost: of that, what every check costs; the cap keeps it for the checks to come.
        price: nats that a unit of the budget must return (priced compute); None where the budget is already paid for.
        selectors: what REFRESH may run; empty: the one of ``refresh_cost``.
        selector: name of the one that made the present selection.
        arms: what SWITCH and PROBE may choose from.
        batch: None where the batch is fixed.
        memory_modes: what MEMORY may choose from.
        advantage: what the control arm measured since the previous check.
        drift: readings of detectors D1 to D4 since the previous check.
        control: whether a control arm will measure what a selection is worth. A first one then need not wait for a gain
            to be compared with.
        control_cost: what that arm would spend after a selection made now, until the cooldown, beyond ``check_cost``;
            the cap keeps it before a selection is offered.
        problem: why this check could not be measured, as words to follow a colon; nothing is then decided on it.

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
    clusters: Sequence[int] = ()
    overhead: float = 0.0
    price: float | None = None
    selectors: Sequence[Selector] = ()
    selector: str | None = None
    arms: Sequence[Arm] = ()
    batch: BatchSize | None = None
    memory_modes: Sequence[MemoryMode] = ()
    advantage: Advantage | None = None
    drift: Sequence[DriftReading] = ()
    problem: str | None = None
    check_cost: float = 0.0
    control: bool = False
    control_cost: float = 0.0

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {self.unit!r}")
        for name in ("step", "refreshes_done"):
            value = getattr(self, name)
            if isinstance(value, bool) or value != int(value) or value < 0:
                raise ValueError(f"{name} must be a whole number and not negative, got {value!r}")
        amounts = ("spent", "budget", "spent_before", "refresh_cost", "cooldown_cost", "scored_at")
        for name in (*amounts, "overhead", "check_cost", "control_cost", "price"):
            value = getattr(self, name)
            if value is None and name in ("scored_at", "price"):
                continue
            not_negative(name, value)
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
        object.__setattr__(self, "clusters", tuple(int(document) for document in self.clusters))
        if self.clusters and len(self.clusters) != len(self.anchors_now):
            raise ValueError(
                f"clusters must name the document of each anchor, "
                f"got {len(self.clusters)} for {len(self.anchors_now)} anchors"
            )
        for name in ("selectors", "arms", "memory_modes", "drift"):
            object.__setattr__(self, name, checked_offers(name, getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able fields; a non-finite number becomes the text "nan", "inf" or "-inf"."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in ("anchors_before", "anchors_now"):
            plain[name] = [_plain(loss) for loss in plain[name]]
        plain["clusters"] = list(self.clusters)
        for name in OFFERS:
            plain[name] = [_plain_fields(offer) for offer in plain[name]]
        for name in ("batch", "advantage"):
            plain[name] = None if plain[name] is None else _plain_fields(plain[name])
        # What was not offered is not written: most runs use few of these.
        return {name: value for name, value in plain.items() if _OPTIONAL.get(name, _ALWAYS) != value}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Observation:
        """Rebuild the observation that :meth:`to_dict` wrote."""
        kinds: dict[str, Any] = OFFERS | {"batch": BatchSize, "advantage": Advantage}
        read = dict(plain)
        for name in kinds.keys() & plain.keys():
            value = plain[name]
            if isinstance(value, list):
                read[name] = [_read_fields(kinds[name], item) for item in value]
            elif value is not None:
                read[name] = _read_fields(kinds[name], value)
        return cls(**read)


# What offers are where there are none.
_OPTIONAL: dict[str, Any] = {name: [] for name in (*OFFERS, "clusters")}
_OPTIONAL |= dict.fromkeys(("price", "selector", "batch", "advantage", "problem"))
_OPTIONAL |= {"overhead": 0.0, "check_cost": 0.0, "control": False, "control_cost": 0.0}
_ALWAYS = object()


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
        argument: what the action is applied to: the name of a selector, arm or memory mode, "x2" or "/2"; None where
            there is nothing to choose. Keys of ``values`` and ``blocked`` are "ACTION" or "ACTION(argument)".
    """

    step: int
    action: Action
    reason: str
    inputs: dict[str, Any]
    values: dict[str, float]
    estimates: dict[str, Any] = field(default_factory=dict)
    blocked: dict[str, str] = field(default_factory=dict)
    argument: str | None = None

    @property
    def key(self) -> str:
        """The action with its argument, as ``values`` names it."""
        return action_key(self.action, self.argument)

    @property
    def chosen(self) -> float:
        """The value of the action taken."""
        return self.values[self.key]

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


def action_key(action: Action, argument: str | None = None) -> str:
    """Return "ACTION" or "ACTION(argument)"."""
    return action.value if argument is None else f"{action.value}({argument})"


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _plain_fields(item: Any) -> dict[str, Any]:
    return {name: _plain(value) for name, value in asdict(item).items()}


def _read_fields(kind: Any, plain: Mapping[str, Any]) -> Any:
    names = {item.name: item.type for item in fields(kind)}
    return kind(**{k: float(v) if isinstance(v, str) and names.get(k) == "float" else v for k, v in plain.items()})
