"""Where a real run stands: its cell, its branches, and what it has spent."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from pyeff.governor import FIELDS, Advantage

from .tasks.training import Weights

# Pools or selectors on which there is nothing to win, and a sensor that stalls.
CONTROLS = ("one-kind", "shuffled", "tenfold", "plateau")


@dataclass(frozen=True)
class Cell:
    """What is run: everything but the policy.

    Args:
        task: its name. mode: memory mode. budget: index of the budget. seed: of the run.
        control: "" or a negative control, one of ``CONTROLS``.
    """

    task: str
    mode: str
    budget: int
    seed: int
    control: str = ""

    @property
    def label(self) -> str:
        """The task's name in tables."""
        return "-".join(part for part in (self.task, self.control, "" if self.mode == "full" else self.mode) if part)


@dataclass
class Branch:
    """One model of a run, what it draws from, and what its control batches showed.

    Args:
        weights: of the model.
        using: selector of the present selection, RANDOM or MIXTURE; None on the pool.
        chosen: samples it draws from. mixture: shares of the sources.
        control: share of control batches. direction: the target's gradient, and of how many samples.
        gains: (control, age, gain) of every batch since the last comparison.
        scored_at: ``spent`` right after the last scoring. owned: what this branch has spent.
    """

    weights: Weights
    using: str | None = None
    chosen: Tensor | None = None
    mixture: tuple[float, ...] | None = None
    drawn: int = 0
    control: float = 0.0
    direction: tuple[Tensor, ...] | None = None
    gains: tuple[tuple[bool, float, float], ...] = ()
    scored_at: float | None = None
    owned: float = 0.0


@dataclass
class State:
    """A run at a check. Spending is exact; ``seen`` and ``counts`` are of the interval before the check."""

    branches: dict[int, Branch]
    branch: int = 0
    flops: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FIELDS, 0))
    steps: int = 0
    next_check: float = 0.0
    cooling: float | None = None
    end: float = 0.0
    refreshes: int = 0
    last: float = 0.0
    finite: bool = True
    losses: Tensor | None = None
    counts: Tensor | None = None
    reading: Advantage | None = None
    frozen: dict[str, tuple[float, ...]] = field(default_factory=dict)
    done: bool = False

    @property
    def spent(self) -> float:
        return float(sum(self.flops.values()))

    def copy(self) -> State:
        """A state to train on: the branch in turn is its own, the others are shared and never written."""
        branches = dict(self.branches)
        branches[self.branch] = replace(branches[self.branch], weights=branches[self.branch].weights.clone())
        return replace(self, branches=branches, flops=dict(self.flops), frozen=dict(self.frozen))


@dataclass(frozen=True)
class Root:
    """What of a policy shapes a run beside its moves."""

    schedule: str
    data: str
    evaluations: int
    check_every: float
    cooldown: float
