"""What contenders are judged by, and how sure that is. NumPy and SciPy only; results are plain numbers.

J is the final holdout loss after the anneal. Everything is paired over seeds: the same seeds under every policy.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

OVERHEAD = ("eval", "score", "probe")


@dataclass(frozen=True)
class Promised:
    """A rate of gain as promised, its calibrated interval (None before the ninth outcome), and as measured."""

    rate: float
    low: float | None
    high: float | None
    realised: float


@dataclass(frozen=True)
class Run:
    """One cell: what one policy did with one budget and one seed of a task.

    Args:
        task: its name.
        policy: its name.
        budget: FLOPs.
        seed: of the run, shared by all policies.
        loss: J.
        flops: spent, by field of the ledger.
        curve: (FLOPs spent, holdout loss) over the run, measured free of charge for the reports.
        moves: (FLOPs spent, "ACTION(argument)") other than CONTINUE.
        promises: forecasts that were judged by a later check.
        decide_seconds: the longest decision.
        effective: training done, in units of training on the pool, where a simulator knows it.
    """

    task: str
    policy: str
    budget: float
    seed: int
    loss: float
    flops: Mapping[str, float] = field(default_factory=dict)
    curve: Sequence[tuple[float, float]] = ()
    moves: Sequence[tuple[float, str]] = ()
    promises: Sequence[Promised] = ()
    decide_seconds: float = 0.0
    effective: float = math.nan

    @property
    def spent(self) -> float:
        """FLOPs, everything included."""
        return math.fsum(self.flops.values())

    @property
    def overhead(self) -> float:
        """Share of the budget that went into evaluation, scoring and probes."""
        return math.fsum(self.flops.get(name, 0.0) for name in OVERHEAD) / self.budget

    @property
    def switches(self) -> int:
        """Changes of what is trained on; the cooldown is none."""
        return sum(not key.startswith("COOLDOWN") for _, key in self.moves)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Run:
        lists = {
            "curve": tuple((x, y) for x, y in plain["curve"]),
            "moves": tuple((x, key) for x, key in plain["moves"]),
            "promises": tuple(Promised(**item) for item in plain["promises"]),
        }
        return cls(**{**plain, **lists})


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % bootstrap interval over ``n`` seeds."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Comparison:
    """Paired difference of two policies' losses (negative: the first is better) and Wilcoxon's two-sided p."""

    difference: Estimate
    p: float


def bootstrap(values: Sequence[float], *, draws: int = 2000, seed: int = 0) -> Estimate:
    """Return the mean and its 95 % percentile interval, resampling the values (of paired seeds)."""
    data = np.asarray(values, dtype=np.float64)
    if len(data) == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    picks = np.random.default_rng(seed).integers(0, len(data), size=(draws, len(data)))
    low, high = np.quantile(data[picks].mean(axis=1), [0.025, 0.975])
    return Estimate(float(data.mean()), float(low), float(high), len(data))


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Comparison:
    """Compare losses by seed; seeds that only one of them has are left out."""
    seeds = sorted(first.keys() & second.keys())
    differences = np.array([first[seed] - second[seed] for seed in seeds])
    p = 1.0
    if np.any(differences != 0):
        p = float(wilcoxon(differences).pvalue)
    return Comparison(bootstrap(differences.tolist()), p)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return Holm's adjusted p-values: of m sorted ones, the running maximum of (m - i) p_i."""
    adjusted, running = {}, 0.0
    for i, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        running = max(running, min((len(p_values) - i) * p_values[name], 1.0))
        adjusted[name] = running
    return adjusted


def losses(runs: Iterable[Run]) -> dict[tuple[str, float, str], dict[int, float]]:
    """J by (task, budget, policy), then by seed."""
    table: dict[tuple[str, float, str], dict[int, float]] = defaultdict(dict)
    for run in runs:
        table[run.task, run.budget, run.policy][run.seed] = run.loss
    return dict(table)


@dataclass(frozen=True)
class Regret:
    """(J - J_oracle) / (J_uniform - J_oracle) of one policy in one cell of task and budget, means over seeds.

    ``decided`` is False where J_uniform - J_oracle is below twice its standard error: there is nothing to win, and the
    regret means nothing.
    """

    value: float
    excess: float
    decided: bool


def regret(policy: Mapping[int, float], uniform: Mapping[int, float], oracle: Mapping[int, float]) -> Regret:
    """Regret by ratio of means over the shared seeds; ``excess`` is mean J / mean uniform J - 1."""
    seeds = sorted(policy.keys() & uniform.keys() & oracle.keys())
    own, base, best = (np.array([each[seed] for seed in seeds]) for each in (policy, uniform, oracle))
    room = base - best
    error = float(room.std(ddof=1)) / math.sqrt(len(room)) if len(room) > 1 else math.inf
    decided = bool(room.mean() > 2 * error)
    value = float((own - best).mean() / room.mean()) if decided else math.nan
    return Regret(value, float(own.mean() / base.mean() - 1), decided)


def best_single(regrets: Mapping[str, Sequence[float]]) -> tuple[str, float]:
    """Return the policy with the lowest mean regret over all cells, one policy for all of them, and that mean."""
    means = {name: float(np.mean(values)) for name, values in regrets.items() if len(values)}
    name = min(means, key=means.__getitem__)
    return name, means[name]


def best_in_family(runs: Sequence[Run], prefix: str) -> dict[tuple[str, float], str]:
    """Return the policy of a family (names with this prefix) with the lowest mean J in each cell, in hindsight."""
    best: dict[tuple[str, float], tuple[float, str]] = {}
    for (task, budget, policy), by_seed in losses(runs).items():
        if policy.startswith(prefix):
            mean = float(np.mean(list(by_seed.values())))
            best[task, budget] = min(best.get((task, budget), (math.inf, "")), (mean, policy))
    return {cell: name for cell, (_, name) in best.items()}


def flops_to_target(run: Run, target: float) -> float:
    """FLOPs, everything included, when the holdout loss first was at most ``target``; infinite if never."""
    for spent, loss in (*run.curve, (run.spent, run.loss)):
        if loss <= target:
            return spent
    return math.inf


def coverage(runs: Iterable[Run]) -> tuple[float, int]:
    """Share of calibrated intervals that held what was measured next, and how many there were."""
    held = [p.low <= p.realised <= p.high for run in runs for p in run.promises if p.low is not None]
    return (sum(held) / len(held) if held else math.nan), len(held)


def worst_seed(policy: Mapping[int, float], uniform: Mapping[int, float]) -> float:
    """The largest J / uniform J - 1 of any seed."""
    return max(policy[seed] / uniform[seed] - 1 for seed in policy.keys() & uniform.keys())


def compute_lost(runs: Iterable[Run], policy: str, uniform: str) -> dict[tuple[str, float], float]:
    """Share of uniform's effective training that a policy did not do, by (task, budget); < 0 where it did more."""
    totals: dict[tuple[str, float, str], float] = defaultdict(float)
    for run in runs:
        if run.policy in (policy, uniform):
            totals[run.task, run.budget, run.policy] += run.effective
    cells = {(task, budget) for task, budget, _ in totals}
    return {(t, b): 1 - totals[t, b, policy] / totals[t, b, uniform] for t, b in sorted(cells)}


@dataclass(frozen=True)
class Summary:
    """One policy in one cell of task and budget."""

    task: str
    budget: float
    policy: str
    loss: Estimate
    against_uniform: Comparison
    regret: Regret | None
    target_flops: float
    target_misses: float
    overhead: float
    switches: float
    worst_seed: float
    coverage: float
    intervals: int
    decide_seconds: float


def summarise(runs: Sequence[Run], *, uniform: str, oracle: str | None = None) -> list[Summary]:
    """Judge every policy in every cell. The target is the median J of ``uniform`` in the cell."""
    table = losses(runs)
    groups: dict[tuple[str, float, str], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.task, run.budget, run.policy].append(run)
    found = []
    for (task, budget, policy), mine in groups.items():
        base = table.get((task, budget, uniform))
        if base is None:
            continue
        own, best = table[task, budget, policy], table.get((task, budget, oracle or ""))
        target = float(np.median(list(base.values())))
        reached = [flops_to_target(run, target) for run in mine]
        share, intervals = coverage(mine)
        found.append(
            Summary(
                task=task,
                budget=budget,
                policy=policy,
                loss=bootstrap([own[seed] for seed in sorted(own)]),
                against_uniform=paired(own, base),
                regret=None if best is None else regret(own, base, best),
                # The middle one itself: a mean of the middle two would be infinite with one of them.
                target_flops=sorted(reached)[len(reached) // 2],
                target_misses=sum(map(math.isinf, reached)) / len(reached),
                overhead=float(np.mean([run.overhead for run in mine])),
                switches=float(np.mean([run.switches for run in mine])),
                worst_seed=worst_seed(own, base),
                coverage=share,
                intervals=intervals,
                decide_seconds=max(run.decide_seconds for run in mine),
            )
        )
    return found
