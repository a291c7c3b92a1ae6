"""Which real runs are made, in which order, and the policies that only the claims' experiments need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from pyeff.governor import Action

from .baselines import FixedInterval, Placebo, Static
from .policies import CONTINUE, Base, Move, Policy, Setup, View
from .roster import GOVERNOR, UNIFORM, roster
from .t1_state import CONTROLS, Cell

Make = Callable[[Setup], Policy]

TASKS = ("code", "images")
SEEDS = tuple(range(10))
BUDGETS = (0, 1, 2, 3)
# Claims P1 and P2 charge one selector of each task what they need it to cost.
CHARGED = {"code": "loss", "images": "el2n"}
P1_COSTS = (0.01, 0.03, 0.1, 0.3)
P1_AT = 0.25
P2_BUDGET, P2_COST, P2_FACTORS, P2_INTERVALS = 2, 0.005, (1, 4, 16), (0.05, 0.1, 0.2, 0.4, 0.8)
CONTROL_BUDGETS = (1, 2)
BRANCH, PERIOD = "branch", "period"


class BranchOnce(Base):
    """P1: the pool, one selection at a quarter of the budget at a given charge, the plateau and the cooldown."""

    def __init__(self, setup: Setup, *, selector: str, cost: float) -> None:
        super().__init__(setup)
        self.name = f"{BRANCH}-{cost:g}"
        self.selector, self.charges = selector, {selector: cost * setup.budget}

    def choose(self, view: View) -> Move:
        if view.refreshes or view.spent < P1_AT * view.budget * (1 - 1e-9):
            return CONTINUE
        return Move(Action.REFRESH, self.selector)


class ChargedInterval(FixedInterval):
    """P2: a selection every so often at a given charge."""

    def __init__(self, setup: Setup, *, selector: str, every: float, cost: float) -> None:
        super().__init__(setup, selector=selector, every=every)
        self.name = f"{PERIOD}-{every:g}-{cost:g}"
        self.charges: Mapping[str, float] = {selector: cost * setup.budget}


@dataclass(frozen=True)
class Group:
    """Policies of one cell, which share what they train."""

    cell: Cell
    kind: str

    def makes(self, selectors: tuple[str, ...], refreshes: Callable[[], int]) -> dict[str, Make]:
        """Makers by name, in the order in which they run.

        Args:
            selectors: of the task.
            refreshes: how often the governor scored in this cell; asked for after it has run.
        """
        everyone = roster(selectors)
        if self.kind == "main":
            # The placebo scores as often as the governor did on this seed.
            everyone["placebo"] = lambda setup: Placebo(setup, rate=float(refreshes()))
            placebo = everyone.pop("placebo")
            return {**everyone, "placebo": placebo}
        if self.kind == "control":
            # The others' runs are those of the task itself, to the bit, unless the pool is another.
            names = (UNIFORM, "uniform-wsd", GOVERNOR) if self.cell.control == "one-kind" else (GOVERNOR,)
            return {name: everyone[name] for name in names}
        if self.kind == "mode":
            names = (UNIFORM, *(f"static-{name}" for name in selectors))
            return {name: everyone[name] for name in names}
        selector = CHARGED[self.cell.task]
        if self.kind == BRANCH:
            return {f"{BRANCH}-{c:g}": partial(BranchOnce, selector=selector, cost=c) for c in P1_COSTS}
        costs = [P2_COST * factor for factor in P2_FACTORS]
        return {
            f"{PERIOD}-{every:g}-{cost:g}": partial(ChargedInterval, selector=selector, every=every, cost=cost)
            for cost in costs
            for every in P2_INTERVALS
        }


def groups(seeds: tuple[int, ...] = SEEDS) -> Iterator[Group]:
    """All groups, small budgets first, and of each all seeds of one kind before the next."""
    for budget in BUDGETS:
        for kind in ("main", BRANCH, "mode", "control", PERIOD):
            for seed in seeds:
                for task in TASKS:
                    if kind == "mode" and task != "code":
                        continue
                    if kind == PERIOD and budget != P2_BUDGET:
                        continue
                    if kind == "control":
                        if budget in CONTROL_BUDGETS:
                            for control in CONTROLS:
                                yield Group(Cell(task, "full", budget, seed, control), kind)
                        continue
                    yield Group(Cell(task, "lora" if kind == "mode" else "full", budget, seed), kind)


__all__ = ["BRANCH", "PERIOD", "BranchOnce", "ChargedInterval", "Group", "Static", "groups"]
