"""Small worlds for the actions that no selection needs: PROBE and SWITCH, BATCH, MEMORY, and stopping at a price.

    python -m benchmarks.governor --tier actions [--seeds 200]

One budget of 100 units and a check every 5. x is effective training; the annealed loss is a power law of it, as in
`world`. In each world one thing can be gained, and its oracle knows all of it from the start:

======= =========================================================================================================
probe   two arms whose pace is drawn around that of the pool; a probe costs 1 and shows an arm's to within 0.1
batch   the gradient's noise scale grows as training goes on; a device that is not yet busy at small batches
memory  at some time a mode that is a third faster begins to fit
price   training costs as much per unit as it returns somewhere between a fifth and all of the budget
======= =========================================================================================================

A world's result is the share of what its oracle gains over staying as it began: 1 is the oracle, 0 is never acting.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyeff.governor import Action, Arm, BatchSize, Decision, GovernorConfig, GovernorPolicy, MemoryMode, Observation

from .governed import LAST_INTERVAL, OVERHEAD_CAP
from .world import cooldown_pace

BUDGET, INTERVAL, COOLDOWN = 100.0, 5.0, 0.2
EVALUATION = 0.05
ANCHORS = 64
SUBSTEPS = 50
KINDS = (Action.PROBE, Action.SWITCH, Action.BATCH, Action.MEMORY)


@dataclass
class Run:
    """Where one run is: what was spent, the effective training done, and what it is trained with."""

    random: np.random.Generator
    policy: GovernorPolicy
    floor: float
    scale: float
    power: float
    spent: float = 0.0
    trained: float = 0.0
    overhead: float = 0.0
    end: float = BUDGET
    decisions: list[Decision] = field(default_factory=list)

    @classmethod
    def start(cls, seed: int) -> Run:
        random = np.random.default_rng(seed)
        config = GovernorConfig(overhead_cap=OVERHEAD_CAP, last_interval=LAST_INTERVAL)
        floor, power = float(random.uniform(1.5, 3.0)), float(random.uniform(0.3, 0.8))
        return cls(random, GovernorPolicy(config), floor, float(1.5 * 5**power), power)

    def loss(self, trained: float) -> float:
        return float(self.floor + self.scale * (trained + 5.0) ** -self.power)

    def train(self, amount: float, pace: Callable[[], float]) -> None:
        for _ in range(SUBSTEPS):
            self.trained += amount / SUBSTEPS * pace()
        self.spent += amount

    def cool(self, pace: Callable[[], float]) -> None:
        """Anneal over what is left of the run."""
        amount = self.end - self.spent
        for i in range(SUBSTEPS):
            factor = float(cooldown_pace(np.array((i + 0.5) / SUBSTEPS)))
            self.trained += amount / SUBSTEPS * pace() * factor
        self.spent = self.end

    def anchors(self) -> tuple[float, ...]:
        """Losses under averaged weights: levels of their own, and noise in units of an interval's gain."""
        loss = self.loss(self.trained)
        unit = loss - self.loss(self.trained + INTERVAL)
        levels = np.random.default_rng(0).normal(0, 0.5, ANCHORS)
        noise = self.random.normal(0, unit, ANCHORS) + self.random.normal(0, 0.25 * unit)
        return tuple((loss + levels + noise).tolist())

    def go(
        self, pace: Callable[[], float], offers: Callable[[], dict[str, Any]], act: Callable[[Decision], None]
    ) -> Run:
        """Train under the governor; ``offers`` are what it may do now, ``act`` does it."""
        before: tuple[float, ...] = ()
        before_at = 0.0
        while True:
            self.train(min(INTERVAL, (1 - COOLDOWN) * BUDGET - self.spent), pace)
            now = self.anchors()
            self.spent, self.overhead = self.spent + EVALUATION, self.overhead + EVALUATION
            decision = self.policy.decide(
                Observation(
                    step=len(self.decisions) + 1,
                    spent=self.spent,
                    budget=BUDGET,
                    unit="flops",
                    anchors_before=before,
                    anchors_now=now,
                    spent_before=before_at,
                    refresh_cost=BUDGET,
                    cooldown_cost=COOLDOWN * BUDGET,
                    overhead=self.overhead,
                    check_cost=EVALUATION,
                    **offers(),
                )
            )
            self.decisions.append(decision)
            before, before_at = now, self.spent
            if decision.action is Action.COOLDOWN:
                if self.spent + INTERVAL < (1 - COOLDOWN) * BUDGET:
                    self.end = self.spent / (1 - COOLDOWN)
                self.cool(pace)
                return self
            act(decision)

    def stay(self, pace: Callable[[], float], *, until: float = BUDGET) -> Run:
        """Train without a governor, evaluations or decisions."""
        self.end = until
        self.train((1 - COOLDOWN) * until, pace)
        self.cool(pace)
        return self


def _nothing(decision: Decision) -> None:
    pass


def probe_world(seed: int) -> tuple[float, float, float, Run]:
    """Effective training of the governor, of never acting and of the oracle, and the governor's run."""
    run = Run.start(seed)
    worth = {"pool": 1.0} | {name: float(1 + 0.4 * run.random.standard_normal()) for name in ("books", "code")}
    known = {name: (1.0, 0.4) for name in worth if name != "pool"}
    using = ["pool"]

    def offers() -> dict[str, Any]:
        # An arm's ratio is over the present data, which was chosen by what is known of it.
        here = 1.0 if using[0] == "pool" else max(known[using[0]][0], 0.1)
        return {
            "arms": [
                Arm(name, max(mean, 0.0) / here, error / here, probe_cost=1.0, probe_error=0.1)
                for name, (mean, error) in known.items()
                if name != using[0]
            ]
        }

    def act(decision: Decision) -> None:
        name = str(decision.argument)
        if decision.action is Action.SWITCH:
            using[0] = name
        elif decision.action is Action.PROBE:
            run.spent, run.overhead = run.spent + 1.0, run.overhead + 1.0
            seen = worth[name] + 0.1 * float(run.random.standard_normal())
            mean, error = known[name]
            trust = error**2 / (error**2 + 0.1**2)
            known[name] = mean + trust * (seen - mean), error * math.sqrt(1 - trust)

    run.go(lambda: worth[using[0]], offers, act)
    stayed = Run.start(seed).stay(lambda: 1.0)
    best = Run.start(seed).stay(lambda: max(worth.values()))
    return run.trained, stayed.trained, best.trained, run


def batch_world(seed: int) -> tuple[float, float, float, Run]:
    """Likewise, for the batch size."""

    def world() -> tuple[Run, float, float, Callable[[Run, float], float]]:
        run = Run.start(seed)
        first, busy = 4 * math.exp(run.random.normal(0, 0.5)), 64 * math.exp(run.random.normal(0, 0.5))

        def pace(run: Run, size: float) -> float:
            noise = first * (1 + run.trained)
            # Samples a second times the gain of each, 1 at the start.
            return size / (size + busy) / (size + noise) * (16 + busy) / 16 * (16 + first)

        return run, first, busy, pace

    run, first, busy, pace = world()
    size = [16.0]

    def offers() -> dict[str, Any]:
        seen = first * (1 + run.trained) * math.exp(0.2 * run.random.standard_normal())
        rate = {factor: factor * (size[0] + busy) / (factor * size[0] + busy) for factor in (2.0, 0.5)}
        return {"batch": BatchSize(size[0], seen, seen / 1.5, seen * 1.5, rate[2.0], rate[0.5])}

    def act(decision: Decision) -> None:
        if decision.action is Action.BATCH:
            size[0] *= 2 if decision.argument == "x2" else 0.5

    run.go(lambda: pace(run, size[0]), offers, act)
    other, _, _, pace = world()
    stayed = other.stay(lambda: pace(other, 16.0)).trained
    ideal, _, _, pace = world()
    sizes = [2.0**k for k in range(1, 12)]
    return run.trained, stayed, ideal.stay(lambda: max(pace(ideal, each) for each in sizes)).trained, run


def memory_world(seed: int) -> tuple[float, float, float, Run]:
    """Likewise, for the memory mode."""
    run = Run.start(seed)
    fits_at, cost = float(run.random.uniform(0, 60)), 0.5
    fast = [False]

    def offers() -> dict[str, Any]:
        modes = [] if fast[0] else [MemoryMode("plain", 0.75, fits=run.spent >= fits_at, switch_cost=cost)]
        return {"memory_modes": modes}

    def act(decision: Decision) -> None:
        if decision.action is Action.MEMORY:
            fast[0], run.spent = True, run.spent + cost

    run.go(lambda: 1 / 0.75 if fast[0] else 1.0, offers, act)
    stayed = Run.start(seed).stay(lambda: 1.0)
    best = stayed.trained + (1 / 0.75 - 1) * max(stayed.trained - fits_at, 0.0) - cost
    return run.trained, stayed.trained, best, run


def price_world(seed: int) -> tuple[float, float, float, Run]:
    """Minus (loss + price x spent) of the governor, of spending all and of the best time to stop."""
    run = Run.start(seed)
    ends = np.linspace(5, BUDGET, 96)
    losses = []
    for end in ends:
        each = Run.start(seed).stay(lambda: 1.0, until=float(end))
        losses.append(each.loss(each.trained))
    # What the annealed curve returns at a point drawn between a fifth and all of the budget.
    at = int(np.searchsorted(ends, run.random.uniform(0.2, 1.0) * BUDGET))
    at = min(max(at, 1), len(ends) - 2)
    price = (losses[at - 1] - losses[at + 1]) / (ends[at + 1] - ends[at - 1])
    run.go(lambda: 1.0, lambda: {"price": float(price)}, _nothing)
    objective = [loss + price * end for loss, end in zip(losses, ends, strict=True)]
    return -(run.loss(run.trained) + price * run.spent), -objective[-1], -min(objective), run


WORLDS = {"probe": probe_world, "batch": batch_world, "memory": memory_world, "price": price_world}


@dataclass(frozen=True)
class Found:
    """Share of the oracle's gain that was had over all seeds, actions a run, and the largest overhead's share."""

    share: float
    actions: float
    overhead: float


def judge(name: str, seeds: range) -> Found:
    """Run one world."""
    own, stayed, best, runs = zip(*(WORLDS[name](seed) for seed in seeds), strict=True)
    taken = sum(decision.action in KINDS for run in runs for decision in run.decisions)
    share = (sum(own) - sum(stayed)) / (sum(best) - sum(stayed))
    return Found(share, taken / len(runs), max(run.overhead for run in runs) / BUDGET)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.governor --tier actions")
    parser.add_argument("--seeds", type=int, default=200)
    options = parser.parse_args(arguments)
    print("| world | share of the oracle's gain | actions a run | largest overhead |\n|---|---|---|---|")
    for name in WORLDS:
        found = judge(name, range(options.seeds))
        print(f"| {name} | {found.share:.2f} | {found.actions:.1f} | {found.overhead:.1%} |", flush=True)
    return 0
