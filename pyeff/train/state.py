"""What changes in a run besides its tensors, in a form that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class FirstRefresh:
    """How training stood at the first selection; amounts in the budget's unit, scoring not counted."""

    trained: float
    loss: float
    rate: float | None
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
    saved_at: int = -1
    reason: str = ""

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


def recent_rate(history: Sequence[tuple[float, float]]) -> float | None:
    """Fall of the anchor loss per unit of training over the last two intervals; None before there are two.

    One interval would be the first steps, which teach the format of an answer at a rate that nothing keeps up.
    """
    if len(history) < 3:
        return None
    (start, before), (end, now) = history[-3], history[-1]
    return (before - now) / (end - start) if end > start else None
