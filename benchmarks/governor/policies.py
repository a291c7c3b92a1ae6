"""What a contender is: a policy that is asked at every check what the next part of the budget is spent on.

A harness (the simulator, or a real training loop) owns the model, the data and the ledger. It

1. makes one policy per run from a :class:`Setup`, reads its attributes (``schedule``, ``data``, ``control``, ``needs``,
   ``free_selection``) and carries out ``begin()``;
2. trains at :func:`lr_factor` until ``check_every`` of the budget has been spent since the last check (or, on a
   plateau, until only the cooldown's share is left), evaluates what
   ``needs`` names, charges it, and asks ``decide(view)``;
3. carries out the :class:`Move`, charging a scoring its cost at that moment (nothing with ``free_selection``);
4. ends when the budget, or the cooldown that ends it early, has no room for another step.

Moves and their arguments:

================== ===================================================================================
CONTINUE           as now
REFRESH(selector)  score the pool with it and train on what it keeps; ``RANDOM`` keeps as many examples,
                   drawn uniformly, and costs nothing
SWITCH("pool")     back to the whole pool
SWITCH("mixture")  draw from the sources in proportion to ``weights``
COOLDOWN           anneal to zero over the reserve (or what is left) and stop
================== ===================================================================================

``branch`` says which branch trains next (always 0 but for tournaments): a number not seen before starts from a fresh
initialisation on the pool, before the move is applied to it; spending of all branches counts; the branch that cools
down is the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pyeff.governor import Action, Advantage, BatchSize, DriftReading

Schedule = Literal["linear", "wsd"]
Data = Literal["uniform", "epochs"]
Need = Literal["anchors", "raw", "sources", "noise"]

POOL, MIXTURE, RANDOM = "pool", "mixture", "random"


@dataclass(frozen=True)
class Setup:
    """What is known before a run.

    Args:
        budget: FLOPs, everything included.
        selectors: declared cost in FLOPs of scoring the pool once, by name, cheapest first.
        sources: number of examples of each source (domain) of the pool, by name.
        eval_flops: of one evaluation of the anchors.
        seed: of the run; a policy that draws random numbers draws them from it.
    """

    budget: float
    selectors: Mapping[str, float]
    sources: Mapping[str, int] = field(default_factory=dict)
    eval_flops: float = 0.0
    seed: int = 0


@dataclass(slots=True)
class View:
    """What a policy may look at in a check. All spending is in FLOPs.

    Args:
        step: optimizer steps done, of all branches.
        spent: of the budget, everything included.
        budget: the whole.
        reserve: what the cooldown and the final evaluation take.
        anchors: losses of the anchor samples under averaged weights; empty unless needed.
        raw_anchors: the same under the raw weights.
        train_loss: mean over the training batches since the last check.
        costs: of scoring the pool now, by selector; may differ from what was declared (a shock).
        selector: that made the present selection; None on the pool.
        scored_at: ``spent`` right after the last scoring; None before the first.
        refreshes: scorings done.
        overhead: spent on evaluation, scoring and probes.
        source_losses: mean training loss of each source since the last check; a source not drawn is absent.
        source_counts: examples (or tokens) drawn of each source since the last check.
        advantage: what the control batches say of the selection; None without them.
        control_cost: what measuring them would take until the end after a selection made now, beyond what checks take
            now; None where they would not be measured.
        batch: batch size and gradient noise scale; None unless needed.
        drift: readings of drift detectors since the last check.
        finite: whether every training loss was.
        branch: that trained since the last check.
        branches: (spent, mean anchor loss) of every branch at its last check.
    """

    step: int
    spent: float
    budget: float
    reserve: float
    anchors: Sequence[float] = ()
    raw_anchors: Sequence[float] = ()
    train_loss: float = math.nan
    costs: Mapping[str, float] = field(default_factory=dict)
    selector: str | None = None
    scored_at: float | None = None
    refreshes: int = 0
    overhead: float = 0.0
    source_losses: Mapping[str, float] = field(default_factory=dict)
    source_counts: Mapping[str, float] = field(default_factory=dict)
    advantage: Advantage | None = None
    control_cost: float | None = None
    batch: BatchSize | None = None
    drift: Sequence[DriftReading] = ()
    finite: bool = True
    branch: int = 0
    branches: Mapping[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """What can be spent before the cooldown."""
        return max(self.budget - self.spent - self.reserve, 0.0)


@dataclass(frozen=True, slots=True)
class Forecast:
    """The anchors' rate of gain (nats per FLOP) promised until the next check; bounds None while not calibrated."""

    rate: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Move:
    """What to do next; see the module. ``record`` is what a log should keep of the decision."""

    action: Action = Action.CONTINUE
    argument: str | None = None
    weights: Mapping[str, float] | None = None
    branch: int = 0
    forecast: Forecast | None = None
    record: dict[str, Any] | None = None


CONTINUE = Move()
COOLDOWN = Move(Action.COOLDOWN)


class Policy(Protocol):
    """One contender in one run.

    Attributes:
        name: in every table.
        schedule: "linear" (to zero at the budget's end; never cools down) or "wsd" (constant, then the cooldown).
        data: what "pool" means: "uniform" draws with replacement, "epochs" goes through all arms pooled, again and
            again.
        needs: what must be measured (and charged) at a check.
        control: share of batches drawn from the pool while a selection is in use.
        free_selection: scoring is charged nothing.
        check_every: share of the budget between checks.
        cooldown: share of the budget that the anneal takes.
        branches: how many branches it may train; 1 but for tournaments.
    """

    name: str
    schedule: Schedule
    data: Data
    needs: frozenset[Need]
    control: float
    free_selection: bool
    check_every: float
    cooldown: float
    branches: int

    def begin(self) -> Move:
        """Say what to train on first."""
        ...

    def decide(self, view: View) -> Move:
        """Take the decision of one check."""
        ...


class Base:
    """Defaults of a policy: the pool, a plateau and a cooldown, nothing measured, nothing decided."""

    name = "base"
    schedule: Schedule = "wsd"
    data: Data = "uniform"
    needs: frozenset[Need] = frozenset()
    control = 0.0
    free_selection = False
    check_every = 0.05
    cooldown = 0.2
    branches = 1

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def begin(self) -> Move:
        return CONTINUE

    def decide(self, view: View) -> Move:
        return COOLDOWN if self.due(view) else self.choose(view)

    def choose(self, view: View) -> Move:
        """Decide while the cooldown is not due."""
        return CONTINUE

    def due(self, view: View) -> bool:
        """Whether hardly any of an interval is left before the cooldown; never on a linear schedule.

        A harness checks at the end of the plateau as well.
        """
        return self.schedule == "wsd" and view.left < 0.1 * self.check_every * view.budget


def lr_factor(
    schedule: Schedule, spent: float, budget: float, *, cooldown_start: float | None = None, end: float | None = None
) -> float:
    """What to multiply the learning rate of a step by.

    Args:
        schedule: "linear": 1 - spent / budget. "wsd": 1, then 1 - sqrt(progress of the cooldown).
        spent: at the middle of the step, so that the last one still moves.
        budget: the whole.
        cooldown_start: ``spent`` when it began; None before it.
        end: of the cooldown; None is the budget.
    """
    if schedule == "linear":
        return max(1.0 - spent / budget, 0.0)
    if cooldown_start is None:
        return 1.0
    span = (budget if end is None else end) - cooldown_start
    return 1.0 - math.sqrt(min(max((spent - cooldown_start) / span, 0.0), 1.0)) if span > 0 else 0.0


def cooldown_end(cooldown_start: float, budget: float, *, cooldown: float, check_every: float) -> float:
    """Where an anneal begun at ``cooldown_start`` ends: at the budget's end, or earlier when it was begun early.

    An early stop anneals over the same share of what the run then has spent in all.
    """
    if cooldown_start + check_every * budget >= (1 - cooldown) * budget * (1 - 1e-9):
        return budget
    return cooldown_start / (1 - cooldown)
