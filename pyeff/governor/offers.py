"""What else a training loop can offer at a check: selectors, arms, batch sizes and memory modes, with their numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyeff.governor.drift import DriftReading

# Times as fast that a selector may claim to be: what more would be worth is no number.
_FASTEST = 1e9


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
        not_negative("cost", self.cost)
        if self.gain_ratio is not None:
            positive("gain_ratio", self.gain_ratio)
            if self.gain_ratio > _FASTEST:
                raise ValueError(f"gain_ratio must be at most {_FASTEST:g}, got {self.gain_ratio!r}")
        _store_plain(self, ("cost", "gain_ratio"))


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
            not_negative(name, getattr(self, name))
        if self.probe_cost is not None:
            not_negative("probe_cost", self.probe_cost)
        positive("probe_error", self.probe_error)
        _store_plain(self, ("ratio", "standard_error", "switch_cost", "probe_cost", "probe_error"))


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
            positive(name, getattr(self, name))
        if not self.low <= self.noise_scale <= self.high:
            raise ValueError(
                f"noise_scale must lie in its interval from {self.low!r} to {self.high!r}, got {self.noise_scale!r}"
            )
        _store_plain(self, ("size", "noise_scale", "low", "high", "doubled_rate", "halved_rate"))


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
        positive("relative_cost", self.relative_cost)
        not_negative("switch_cost", self.switch_cost)
        object.__setattr__(self, "fits", bool(self.fits))
        _store_plain(self, ("relative_cost", "switch_cost"))


OFFERS: dict[str, Any] = {"selectors": Selector, "arms": Arm, "memory_modes": MemoryMode, "drift": DriftReading}


def checked_offers(name: str, offers: Sequence[Any]) -> tuple[Any, ...]:
    """Return what is offered as ``name`` ("selectors", "arms", "memory_modes" or "drift").

    Raises TypeError for offers of another kind and ValueError for two of one name.
    """
    kind, checked = OFFERS[name], tuple(offers)
    for offer in checked:
        if not isinstance(offer, kind):
            raise TypeError(f"{name} must be of {kind.__name__}, got {type(offer).__name__}")
    names = [str(offer.detector if name == "drift" else offer.name) for offer in checked]
    if len(set(names)) < len(names):
        raise ValueError(f"{name} must have different names, got {', '.join(names)}")
    return checked


def _name(name: str) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"name must be a text that is not empty, got {name!r}")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"name must be a text that UTF-8 can hold, got {name!r}") from None


def _store_plain(item: Any, names: Sequence[str]) -> None:
    """Make numbers of NumPy and torch Python's own, which a log can hold."""
    for name in names:
        value = getattr(item, name)
        if value is not None and type(value) not in (int, float):
            object.__setattr__(item, name, float(value))


def not_negative(name: str, value: float) -> None:
    """Raise ValueError for an amount that is negative or not finite."""
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be finite and not negative, got {value!r}")


def positive(name: str, value: float) -> None:
    """Raise ValueError for a number that is not finite and above 0."""
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
