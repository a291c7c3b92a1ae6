"""What a selection costs, what training on its subset saves, and after how many runs it has paid."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SelectionPayBack:
    """A selection against what it saves, in one unit (FLOPs, or seconds).

    ``cost``: of scores, features and rule. ``full``: of training on the whole pool. ``fraction``: the part of the pool
    that is chosen. ``random_fraction``: the part that, chosen at random, would train as well; 1 where that is unknown,
    which is to say that the subset is as good as everything and that a random one is not.

    A selection pays when cost + fraction full < random_fraction full, in one run; and a table of scores that is used
    again pays after ceil(cost / ((random_fraction - fraction) full)) runs (after Yin and Rush, 2025, arXiv:2410.16208).

    Raises `ValueError` for amounts out of range.

    >>> SelectionPayBack(cost=3.0, full=2.0, fraction=0.25).runs
    2
    >>> SelectionPayBack(cost=3.0, full=2.0, fraction=0.25, random_fraction=0.25).runs
    inf
    """

    cost: float
    full: float
    fraction: float
    random_fraction: float = 1.0

    def __post_init__(self) -> None:
        for name in ("cost", "full"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be finite and not negative, got {value!r}")
        for name in ("fraction", "random_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)!r}")

    @property
    def subset(self) -> float:
        """What training on the subset costs."""
        return self.fraction * self.full

    @property
    def saved(self) -> float:
        """What one training on the subset saves; negative where random samples do better."""
        return (self.random_fraction - self.fraction) * self.full

    @property
    def runs(self) -> float:
        """Whole number of runs after which the selection has paid; infinity where it never does."""
        if self.saved <= 0:
            return math.inf
        return max(1, math.ceil(self.cost / self.saved))

    @property
    def pays_from(self) -> float:
        """What training on the whole pool must cost at least for the selection to pay in one run."""
        less = self.random_fraction - self.fraction
        return self.cost / less if less > 0 else math.inf
