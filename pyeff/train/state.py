"""What changes in a run besides its tensors, in a form that a checkpoint can hold."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class FirstRefresh:
    """How training stood at the first selection; amounts in the budget's unit, scoring not counted."""

    trained: float
    loss: float
    trend: list[float] | None
    cost: float
    anchors: list[float]


@dataclass
class State:
    """What changes in a run besides tensors, order, policy and ledger; all JSON."""

    steps: int = 0
    phase: str = "train"
    next_check: float = 0.0
    next_checkpoint: float = 0.0
    cooldown_start: float = 0.0
    cooldown_end: float = 0.0
    anchors: list[float] = field(default_factory=list)
    anchors_at: float = 0.0
    holdout_before: list[float] = field(default_factory=list)
    exact_before: dict[str, Any] | None = None
    scored_at: float | None = None
    scoring_spent: float = 0.0
    refreshes: int = 0
    first_refresh: FirstRefresh | None = None
    # (training spend, mean anchor loss) at every check
    history: list[tuple[float, float]] = field(default_factory=list)
    decisions: dict[str, int] = field(default_factory=dict)
    checkpoint_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    saved_at: int = -1
    reason: str = ""
    # No step fits any more. The next batch might be smaller, and is not tried after a resume either.
    trained_out: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        plain = dict(self.__dict__)
        if self.first_refresh is not None:
            plain["first_refresh"] = dict(self.first_refresh.__dict__)
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> State:
        """The state that `to_dict` wrote."""
        first = plain["first_refresh"]
        return cls(
            **{
                **plain,
                "first_refresh": None if first is None else FirstRefresh(**first),
                "history": [(spent, loss) for spent, loss in plain["history"]],
            }
        )


@dataclass(frozen=True)
class Trend:
    """How fast the anchor loss fell at some moment, per unit of training, and how fast that rate was itself falling.

    Two extrapolations bracket what a run commonly does next. The slow one lets the rate fall as 1 / training:
    a loss that goes on as the logarithm of training. The fast one lets it fall exponentially, by ``decay``
    per unit of training, as between the last two intervals: a loss that settles.
    """

    rate: float
    decay: float

    def expected(self, done: float, more: float) -> tuple[float, float]:
        """Least and most that the loss would fall over ``more`` training after ``done``, had all gone on as before.

        >>> low, high = Trend(rate=1.0, decay=1.0).expected(1.0, 3.0)
        >>> round(low, 3), round(high, 3)
        (0.95, 1.386)
        """
        logarithmic = self.rate * done * math.log1p(more / done)
        x = self.decay * more
        # Below the normal numbers x has lost digits; there nothing has settled.
        settling = self.rate * (-math.expm1(-x) / self.decay if x >= sys.float_info.min else more)
        return min(logarithmic, settling), max(logarithmic, settling)


def trend(history: Sequence[tuple[float, float]]) -> Trend | None:
    """Of (training, anchor loss) pairs, the trend at the last; None before there are two intervals with a gain."""
    if len(history) < 3:
        return None
    (a, loss_a), (b, loss_b), (c, loss_c) = history[-3:]
    if not a < b < c or not loss_a > loss_b > loss_c:
        return None
    earlier, later = (loss_a - loss_b) / (b - a), (loss_b - loss_c) / (c - b)
    # Each interval's rate is that of its middle; the last one is carried on to its end.
    decay = max(math.log(earlier / later) / ((c - a) / 2), 0.0)
    return Trend(rate=later * math.exp(-decay * (c - b) / 2), decay=decay)
