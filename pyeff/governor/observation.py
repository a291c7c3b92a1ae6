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
class Selector:
    """A selector that may be run, with the price it declares before it is.

    Args:
        name: unique among the offered ones; None where there is but one.
        cost: of scoring the pool with it and selecting, in the budget's unit.
        gain_ratio: prior median of rho for it; None takes the configuration's.
    """

    name: str | None
    cost: float
    gain_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.name is not None:
            _name(self.name)
        _not_negative("cost", self.cost)
        if self.gain_ratio is not None:
            _positive("gain_ratio", self.gain_ratio)


# The arm of this name is the whole pool, to which a selection that proves harmful gives way.
POOL = "pool"


@dataclass(frozen=True)
class Arm:
    """Other data that may be trained on, and what is believed of its rate of gain.

    Args:
        name: unique among the offered ones. "pool" is the whole pool: while a selection is in use, what the control arm
            has measured of it stands in for ``ratio`` and ``standard_error``, and going back waits for nothing.
        ratio: its rate of gain over that of the present data.
        standard_error: of ``ratio``; infinite is written as a large number.
        switch_cost: of going over to it.
        probe_cost: of a probe that would measure ``ratio``; None where it cannot be probed.
        probe_error: standard error of ``ratio`` that such a probe would have.
    """

    name: str
    ratio: float
    standard_error: float
    switch_cost: float = 0.0
    probe_cost: float | None = None
    probe_error: float = 0.1

    def __post_init__(self) -> None:
        _name(self.name)
        for name in ("ratio", "standard_error", "switch_cost"):
            _not_negative(name, getattr(self, name))
        if self.probe_cost is not None:
            _not_negative("probe_cost", self.probe_cost)
        _positive("probe_error", self.probe_error)


@dataclass(frozen=True)
class BatchSize:
    """The batch now, and what is known about changing it.

    Args:
        size: of the batch, in the unit of the noise scale.
        noise_scale: B_noise = tr(Sigma) / |G|^2, with a confidence interval from ``low`` to ``high``.
        doubled_rate: samples per unit of the budget at twice the batch over now: 1 with FLOPs, more with seconds where
            the device is not yet busy.
        halved_rate: the same at half the batch.
    """

    size: float
    noise_scale: float
    low: float
    high: float
    doubled_rate: float = 1.0
    halved_rate: float = 1.0

    def __post_init__(self) -> None:
        for name in ("size", "noise_scale", "low", "high", "doubled_rate", "halved_rate"):
            _positive(name, getattr(self, name))
        if not self.low <= self.noise_scale <= self.high:
            raise ValueError(
                f"noise_scale must lie in its interval from {self.low!r} to {self.high!r}, got {self.noise_scale!r}"
            )


@dataclass(frozen=True)
class MemoryMode:
    """Another way to fit the model, such as without checkpointing.

    Args:
        name: unique among the offered ones.
        relative_cost: of the same training in it over now, > 0.
        fits: whether it fits in memory.
        switch_cost: of going over to it (recompilation, new states).
    """

    name: str
    relative_cost: float
    fits: bool = True
    switch_cost: float = 0.0

    def __post_init__(self) -> None:
        _name(self.name)
        _positive("relative_cost", self.relative_cost)
        _not_negative("switch_cost", self.switch_cost)


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
            _not_negative(name, value)
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
            offers = tuple(getattr(self, name))
            object.__setattr__(self, name, offers)
            names = [str(offer.detector if name == "drift" else offer.name) for offer in offers]
            if len(set(names)) < len(names):
                raise ValueError(f"{name} must have different names, got {', '.join(names)}")

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able fields; a non-finite number becomes the text "nan", "inf" or "-inf"."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in ("anchors_before", "anchors_now"):
            plain[name] = [_plain(loss) for loss in plain[name]]
        plain["clusters"] = list(self.clusters)
        for name in _OFFERS:
            plain[name] = [_plain_fields(offer) for offer in plain[name]]
        for name in ("batch", "advantage"):
            plain[name] = None if plain[name] is None else _plain_fields(plain[name])
        # What was not offered is not written: most runs use few of these.
        return {name: value for name, value in plain.items() if _OPTIONAL.get(name, _ALWAYS) != value}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Observation:
        """Rebuild the observation that :meth:`to_dict` wrote."""
        kinds: dict[str, Any] = _OFFERS | {"batch": BatchSize, "advantage": Advantage}
        read = dict(plain)
        for name in kinds.keys() & plain.keys():
            value = plain[name]
            if isinstance(value, list):
                read[name] = [_read_fields(kinds[name], item) for item in value]
            elif value is not None:
                read[name] = _read_fields(kinds[name], value)
        return cls(**read)


_OFFERS: dict[str, Any] = {"selectors": Selector, "arms": Arm, "memory_modes": MemoryMode, "drift": DriftReading}
# And what they are where they are not offered.
_OPTIONAL: dict[str, Any] = {name: [] for name in (*_OFFERS, "clusters")}
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


def _name(name: str) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"name must be a text that is not empty, got {name!r}")


def _not_negative(name: str, value: float) -> None:
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be finite and not negative, got {value!r}")


def _positive(name: str, value: float) -> None:
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
