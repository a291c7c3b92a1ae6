"""Contenders without a governor: fixed schedules, one rule each."""

from __future__ import annotations

import random

from pyeff.governor import Action

from .policies import CONTINUE, MIXTURE, POOL, RANDOM, Base, Move, Setup, View


class UniformLinear(Base):
    """B0: the pool, the rate linear to zero at the exact end of the budget. Its peak rate is to be tuned."""

    name = "uniform-linear"
    schedule = "linear"


class UniformWsd(Base):
    """B1: the pool, a plateau and a cooldown."""

    name = "uniform-wsd"


class FullData(Base):
    """B2: all arms pooled and gone through in epochs, linear to zero."""

    name = "full-data"
    schedule = "linear"
    data = "epochs"


class RandomSubset(Base):
    """B3: a random subset with as many different examples as a selector keeps; linear to zero."""

    name = "random-subset"
    schedule = "linear"

    def begin(self) -> Move:
        return Move(Action.REFRESH, RANDOM)


class Static(Base):
    """B4: one selection at the first check after ``warmup``, then linear to zero; with or without its cost."""

    schedule = "linear"

    def __init__(self, setup: Setup, *, selector: str, free: bool = False, warmup: float = 0.05) -> None:
        super().__init__(setup)
        self.name = f"static-{selector}" + ("-free" if free else "")
        self.selector, self.free_selection, self.warmup = selector, free, warmup

    def choose(self, view: View) -> Move:
        if view.refreshes or view.spent < self.warmup * view.budget * (1 - 1e-9):
            return CONTINUE
        if not self.free_selection and view.costs[self.selector] >= view.budget - view.spent:
            return CONTINUE
        return Move(Action.REFRESH, self.selector)


class FixedInterval(Base):
    """B5: a selection every ``every`` of the budget, from the first check on. The best of a grid is in hindsight."""

    def __init__(self, setup: Setup, *, selector: str, every: float) -> None:
        super().__init__(setup)
        self.name = f"every-{every:g}-{selector}"
        self.selector, self.every = selector, every

    def choose(self, view: View) -> Move:
        last = view.scored_at
        if last is not None and view.spent - last < self.every * view.budget * (1 - 1e-9):
            return CONTINUE
        return Move(Action.REFRESH, self.selector) if view.costs[self.selector] < view.left else CONTINUE


class Patience(Base):
    """B6: the pool; anneal and stop after ``patience`` checks without a new best of the anchors' mean loss."""

    needs = frozenset({"anchors"})

    def __init__(self, setup: Setup, *, patience: int) -> None:
        super().__init__(setup)
        self.name = f"patience-{patience}"
        self.patience, self.best, self.bad = patience, float("inf"), 0

    def choose(self, view: View) -> Move:
        loss = sum(view.anchors) / len(view.anchors)
        self.bad = 0 if loss < self.best else self.bad + 1
        self.best = min(self.best, loss)
        return Move(Action.COOLDOWN) if self.bad >= self.patience else CONTINUE


class Asha(Base):
    """B7: successive halving over the arms (the pool and every selection), the best ``1 / eta`` go on each rung.

    Each rung has the same share of the plateau, so the first one's branches are short. A branch selects once, when it
    gets its second turn: none scores untrained weights. The first rung has two turns of each at least, since arms that
    have not selected yet are all the same.
    """

    needs = frozenset({"anchors"})

    def __init__(self, setup: Setup, *, eta: int = 2) -> None:
        super().__init__(setup)
        self.name = f"asha-{eta}"
        self.eta = eta
        self.arms = [POOL, *setup.selectors]
        self.branches = len(self.arms)
        self.turns: list[int] = []
        self.alive = list(range(len(self.arms)))
        self.selected: set[int] = set()
        self.rungs = 1
        while len(self.arms) > eta**self.rungs:
            self.rungs += 1
        self.rung = 0
        self._deal()

    def _deal(self) -> None:
        intervals = int((1 - self.cooldown) / self.check_every + 1e-9)
        # The last rung keeps one branch and everything left.
        each = max(intervals // (self.rungs + 1) // len(self.alive), 1 if self.rung else 2)
        self.turns = [branch for branch in self.alive for _ in range(each)]

    def choose(self, view: View) -> Move:
        if self.turns:
            self.turns.pop(0)
        if not self.turns and len(self.alive) > 1:
            ranked = sorted(self.alive, key=lambda branch: view.branches[branch][1])
            self.alive = ranked[: max(len(ranked) // self.eta, 1)]
            self.rung += 1
            self._deal()
        branch = self.turns[0] if self.turns else self.alive[0]
        arm = self.arms[branch]
        known = branch in view.branches
        if arm != POOL and known and branch not in self.selected and view.costs[arm] < view.left:
            self.selected.add(branch)
            return Move(Action.REFRESH, arm, branch=branch)
        return Move(branch=branch)

    def decide(self, view: View) -> Move:
        if self.due(view):
            best = min(self.alive, key=lambda branch: view.branches.get(branch, (0.0, float("inf")))[1])
            return Move(Action.COOLDOWN, branch=best)
        return self.choose(view)


class CostGate(Base):
    """B9: the dearest selector whose cost is at most ``share`` of the budget, else the cheapest; once, then linear."""

    name = "cost-gate"
    schedule = "linear"

    def __init__(self, setup: Setup, *, share: float = 1 / 3) -> None:
        super().__init__(setup)
        self.share = share

    def choose(self, view: View) -> Move:
        if view.refreshes or not view.costs:
            return CONTINUE
        affordable = [name for name, cost in view.costs.items() if cost <= self.share * view.budget]
        name = (
            max(affordable, key=view.costs.__getitem__) if affordable else min(view.costs, key=view.costs.__getitem__)
        )
        return Move(Action.REFRESH, name) if view.costs[name] < view.budget - view.spent else CONTINUE


class Placebo(Base):
    """B11: what the governor does, at the same rate but at random times and with random selectors.

    ``rate`` is the governor's mean number of scorings in a run of this task and budget.
    """

    name = "placebo"
    needs = frozenset({"anchors"})  # it pays for what the governor pays for

    def __init__(self, setup: Setup, *, rate: float) -> None:
        super().__init__(setup)
        self.random = random.Random(setup.seed * 7919 + 17)
        self.chance = min(rate / max((1 - self.cooldown) / self.check_every - 1, 1.0), 1.0)

    def choose(self, view: View) -> Move:
        if not view.costs or self.random.random() >= self.chance:
            return CONTINUE
        name = self.random.choice(sorted(view.costs))
        return Move(Action.REFRESH, name) if view.costs[name] < view.left else CONTINUE


class Mixed(Base):
    """B8: a mixture over the sources, steered by one of `pyeff.governor`'s mixture rules."""

    needs = frozenset({"anchors", "sources"})

    def __init__(self, setup: Setup, *, rule: str) -> None:
        from pyeff.governor import AdoMixture, CadsMixture

        super().__init__(setup)
        self.name = rule
        names = tuple(sorted(setup.sources))
        self.mixture = {"ado": AdoMixture, "cads-s": CadsMixture}[rule](names, prior=setup.sources)
        self.previous: tuple[float, float] | None = None

    def choose(self, view: View) -> Move:
        loss = sum(view.anchors) / len(view.anchors)
        before, self.previous = self.previous, (view.spent, loss)
        gain = None if before is None else (before[1] - loss) / (view.spent - before[0])
        self.mixture = self.mixture.observed(counts=view.source_counts, losses=view.source_losses, rate=gain)
        return Move(Action.SWITCH, MIXTURE, weights=self.mixture.weights)
