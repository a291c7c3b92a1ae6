"""Run a policy in all runs of a simulated family at once: the worlds are vectors, the policies are asked one by one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pyeff.governor import Action, Advantage

from .metrics import Promised, Run
from .policies import MIXTURE, POOL, RANDOM, Forecast, Move, Policy, Setup, View, cooldown_end
from .world import (
    ANCHORS,
    BUDGETS,
    CHECKS,
    EVAL_FLOPS,
    REPEAT,
    SELECTORS,
    SOURCES,
    Array,
    Worlds,
    cooldown_pace,
    generator,
    linear_pace,
)

# What is trained on, beside the number of a selector.
_POOL, _MIXTURE, _RANDOM = -1, -2, -3
# A random subset has as many examples as this selector keeps.
_LIKE = SELECTORS.index("middle")
_SUBSTEPS = 4
_TINY = 1e-9


@dataclass(frozen=True)
class Noise:
    """What the sensors add, drawn once for a family and the same for every policy.

    Args:
        level: of each anchor, [R, N]. slope: relative steepness of its loss, [R, N].
        sample: [R, C, N]. wander: of averaged and raw weights, [R, C, 2], with half of one check's left at the next.
        control: [R, C]. source: [R, C, K].
    """

    level: Array
    slope: Array
    sample: Array
    wander: Array
    control: Array
    source: Array


def draw_noise(worlds: Worlds) -> Noise:
    """Draw the sensors' noise of every run from its seed."""
    parts: dict[str, list[Array]] = {name: [] for name in ("level", "slope", "sample", "wander", "control", "source")}
    for seed in worlds.seeds:
        random = generator(worlds.family, seed, purpose=1)
        parts["level"].append(0.5 * random.standard_normal(ANCHORS))
        parts["slope"].append(1 + 0.5 * random.standard_normal(ANCHORS))
        parts["sample"].append(random.standard_normal((CHECKS, ANCHORS)))
        wander = random.standard_normal((CHECKS, 2))
        for check in range(1, CHECKS):
            wander[check] = 0.5 * wander[check - 1] + math.sqrt(0.75) * wander[check]
        parts["wander"].append(wander)
        parts["control"].append(random.standard_normal(CHECKS))
        parts["source"].append(random.standard_normal((CHECKS, len(SOURCES))))
    return Noise(**{name: np.stack(rows) for name, rows in parts.items()})


@dataclass
class _State:
    """Where all runs are; [R], or [R, branches] for what a branch owns."""

    x: Array
    owned: Array
    using: np.ndarray
    scored_at: Array
    spent: Array
    next_check: Array
    cooling: Array
    end: Array
    branch: np.ndarray
    weights: Array
    drawn: Array
    live: np.ndarray
    flops: dict[str, Array]
    refreshes: np.ndarray
    age_middle: Array
    pure: np.ndarray
    rate: Array = field(default_factory=lambda: np.zeros(0))


def _start(worlds: Worlds, budget: float, policy: Policy) -> _State:
    runs, branches = len(worlds.seeds), policy.branches
    zeros = np.zeros(runs)
    return _State(
        x=np.zeros((runs, branches)),
        owned=np.zeros((runs, branches)),
        using=np.full((runs, branches), _POOL),
        scored_at=np.full((runs, branches), np.nan),
        spent=zeros.copy(),
        next_check=np.full(runs, policy.check_every * budget),
        cooling=np.full(runs, np.nan),
        end=np.full(runs, budget),
        branch=np.zeros(runs, dtype=np.int64),
        weights=np.tile(1.0, (runs, len(SOURCES))) * worlds.shares,
        drawn=np.zeros((runs, len(SOURCES))),
        live=np.ones(runs, dtype=bool),
        flops={name: zeros.copy() for name in ("train", "eval", "score", "cooldown")},
        refreshes=np.zeros(runs, dtype=np.int64),
        age_middle=zeros.copy(),
        pure=np.zeros(runs, dtype=bool),
    )


def _multiplier(worlds: Worlds, state: _State, age: Array, scored: Array, using: np.ndarray, control: float) -> Array:
    m = np.ones(len(age))
    chosen = using >= 0
    if chosen.any():
        ratios = worlds.advantage(np.where(chosen, scored, 0.0)[:, None], np.where(chosen, age, 0.0)[:, None])[:, :, 0]
        picked = ratios[np.arange(len(age)), np.clip(using, 0, None)]
        m = np.where(chosen, (1 - control) * picked + control, m)
    if (using == _RANDOM).any():
        repeated = np.maximum(age / worlds.unique[:, _LIKE] - 1.0, 0.0)
        m = np.where(using == _RANDOM, np.exp(-repeated / REPEAT), m)
    mixed = using == _MIXTURE
    return np.where(mixed, worlds.mixture_ratio(state.weights), m) if mixed.any() else m


def _train(worlds: Worlds, state: _State, target: Array, budget: float, policy: Policy) -> None:
    """Spend until ``target`` on the branch in turn."""
    rows = np.arange(len(target))
    amount = np.where(state.live, np.maximum(target - state.spent, 0.0), 0.0)
    cooling = ~np.isnan(state.cooling)
    at, owned = state.spent.copy(), state.owned[rows, state.branch].copy()
    using, scored = state.using[rows, state.branch], state.scored_at[rows, state.branch]
    span = np.maximum(state.end - state.cooling, _TINY)
    for _ in range(_SUBSTEPS):
        part = amount / _SUBSTEPS
        middle = at + part / 2
        if policy.schedule == "linear":
            pace = linear_pace(middle / budget) * worlds.linear_edge
        else:
            progress = np.clip((middle - np.where(cooling, state.cooling, 0.0)) / span, 0.0, 1.0)
            pace = np.where(cooling, cooldown_pace(np.where(cooling, progress, 0.0)), 1.0)
        m = _multiplier(worlds, state, owned + part / 2 - scored, scored, using, policy.control)
        state.x[rows, state.branch] += part * pace * m
        at, owned = at + part, owned + part
    state.age_middle = np.where(using >= 0, owned - amount / 2 - scored, 0.0)
    state.pure = using >= 0
    state.spent, state.owned[rows, state.branch] = state.spent + amount, owned
    state.drawn = amount[:, None] * np.where((using == _MIXTURE)[:, None], state.weights, worlds.shares)
    state.rate = amount
    state.flops["cooldown"] += np.where(cooling, amount, 0.0)
    state.flops["train"] += np.where(cooling, 0.0, amount)


def _seen_losses(worlds: Worlds, state: _State, noise: Noise, check: int, policy: Policy, budget: float) -> list[Array]:
    """Losses of every anchor under averaged and under raw weights [R, N] each."""
    rows = np.arange(len(state.spent))
    x = state.x[rows, state.branch]
    loss = worlds.loss(x)
    # What an interval on the pool would gain from here is the unit of all noise.
    unit = loss - worlds.loss(x + policy.check_every * budget)
    pace = linear_pace(state.spent / budget) ** 2 if policy.schedule == "linear" else np.ones(len(rows))
    found = []
    for kind in (1, 0):
        mean = loss + worlds.excess[:, kind] * pace + worlds.wander[:, kind] * unit * noise.wander[:, check, kind]
        single = mean[:, None] + noise.level + (noise.slope - 1) * (loss - worlds.floor - worlds.scale)[:, None]
        found.append(single + (worlds.sample_noise * unit)[:, None] * noise.sample[:, check])
    return found


def simulate(
    worlds: Worlds, make: Callable[[Setup], Policy], budget: float, *, noise: Noise | None = None
) -> list[Run]:
    """Let one contender spend the budget in every run of a family.

    Args:
        worlds: the runs.
        make: of the policy, one for each run.
        budget: FLOPs.
        noise: of the sensors; None draws it.
    """
    noise = noise or draw_noise(worlds)
    policies = [
        make(
            Setup(
                budget=budget,
                selectors=dict(zip(SELECTORS, worlds.cost[i].tolist(), strict=True)),
                sources=dict(zip(SOURCES, worlds.shares[i].tolist(), strict=True)),
                eval_flops=EVAL_FLOPS,
                seed=seed,
            )
        )
        for i, seed in enumerate(worlds.seeds)
    ]
    policy = policies[0]
    state = _start(worlds, budget, policy)
    runs = len(policies)
    moves: list[list[tuple[float, str]]] = [[] for _ in range(runs)]
    promises: list[list[Promised]] = [[] for _ in range(runs)]
    curves: list[list[tuple[float, float]]] = [[] for _ in range(runs)]
    known: list[dict[int, tuple[float, float]]] = [{} for _ in range(runs)]
    last: list[tuple[float, float, Forecast | None]] = [(0.0, math.nan, None)] * runs
    slowest = [0.0] * runs
    for i, each in enumerate(policies):
        _apply(worlds, state, i, each.begin(), moves[i], each, budget)
    plateau_end = budget * (1 - policy.cooldown) if policy.schedule == "wsd" else budget
    for check in range(4 * CHECKS):
        cooling = ~np.isnan(state.cooling)
        _train(worlds, state, np.where(cooling, state.end, np.minimum(state.next_check, plateau_end)), budget, policy)
        over = cooling if policy.schedule == "wsd" else state.spent >= budget * (1 - _TINY)
        state.live &= ~over
        if not state.live.any():
            break
        k = check % CHECKS
        measures = len(policy.needs & {"anchors", "raw"})
        state.spent += np.where(state.live, EVAL_FLOPS * measures, 0.0)
        state.owned[np.arange(runs), state.branch] += np.where(state.live, EVAL_FLOPS * measures, 0.0)
        state.flops["eval"] += np.where(state.live, EVAL_FLOPS * measures, 0.0)
        averaged, raw = _seen_losses(worlds, state, noise, k, policy, budget) if measures else (None, None)
        means = np.zeros(runs) if averaged is None else averaged.mean(axis=1)
        costs = worlds.costs(state.spent)
        truth = worlds.loss(state.x[np.arange(runs), state.branch]) + worlds.excess[:, 1]
        ratios = _multiplier(
            worlds,
            state,
            state.age_middle,
            state.scored_at[np.arange(runs), state.branch],
            state.using[np.arange(runs), state.branch],
            0.0,
        )
        sources = _source_losses(worlds, state, noise, k) if "sources" in policy.needs else None
        judged = raw if "anchors" not in policy.needs else averaged
        seen = None if judged is None else judged.mean(axis=1)
        state.next_check = np.where(state.live, state.spent + policy.check_every * budget, state.next_check)
        for i in np.flatnonzero(state.live).tolist():
            each, branch = policies[i], int(state.branch[i])
            curves[i].append((float(state.spent[i]), float(truth[i])))
            known[i][branch] = (float(state.owned[i, branch]), float(means[i]))
            if seen is not None:
                _judge(promises[i], last[i], float(state.rate[i]), float(seen[i]))
            reading = None
            if policy.control and state.pure[i] and state.age_middle[i] >= 0:
                error = float(worlds.control_noise[i] * ratios[i])
                reading = Advantage(float(state.age_middle[i]), float(ratios[i] + error * noise.control[i, k]), error)
            using = int(state.using[i, branch])
            view = View(
                step=check + 1,
                spent=float(state.spent[i]),
                budget=budget,
                reserve=policy.cooldown * budget if policy.schedule == "wsd" else 0.0,
                anchors=averaged[i].tolist() if averaged is not None and "anchors" in policy.needs else (),
                raw_anchors=raw[i].tolist() if raw is not None and "raw" in policy.needs else (),
                costs=dict(zip(SELECTORS, costs[i].tolist(), strict=True)),
                selector=SELECTORS[using] if using >= 0 else None,
                scored_at=None if np.isnan(state.scored_at[i, branch]) else float(state.scored_at[i, branch]),
                refreshes=int(state.refreshes[i]),
                overhead=float(state.flops["eval"][i] + state.flops["score"][i]),
                source_losses={} if sources is None else dict(zip(SOURCES, sources[i].tolist(), strict=True)),
                source_counts=dict(zip(SOURCES, state.drawn[i].tolist(), strict=True)),
                advantage=reading,
                control_cost=0.0,
                branch=branch,
                branches=known[i],
            )
            began = time.perf_counter()
            move = each.decide(view)
            slowest[i] = max(slowest[i], time.perf_counter() - began)
            last[i] = (view.spent, math.nan if seen is None else float(seen[i]), move.forecast)
            _apply(worlds, state, i, move, moves[i], each, budget)
    final = worlds.loss(state.x[np.arange(runs), state.branch])
    return [
        Run(
            task=worlds.family,
            policy=policies[i].name,
            budget=budget,
            seed=seed,
            loss=float(final[i]),
            flops={name: float(values[i]) for name, values in state.flops.items()},
            curve=tuple(curves[i]),
            moves=tuple(moves[i]),
            promises=tuple(promises[i]),
            decide_seconds=slowest[i],
            effective=float(state.x[i, state.branch[i]]),
        )
        for i, seed in enumerate(worlds.seeds)
    ]


def _judge(promises: list[Promised], last: tuple[float, float, Forecast | None], trained: float, loss: float) -> None:
    _, before, forecast = last
    if forecast is not None and trained > 0 and math.isfinite(before):
        promises.append(Promised(forecast.rate, forecast.low, forecast.high, (before - loss) / trained))


def _source_losses(worlds: Worlds, state: _State, noise: Noise, check: int) -> Array:
    """Each source's own training loss [R, K]: it falls whether or not that helps the anchors."""
    floor, scale, power = np.moveaxis(worlds.source_law, 2, 0)
    x = state.x[np.arange(len(state.spent)), state.branch][:, None]
    return floor + scale * (x + worlds.offset[:, None]) ** -power + 0.01 * noise.source[:, check]


def _apply(
    worlds: Worlds, state: _State, i: int, move: Move, moves: list[tuple[float, str]], policy: Policy, budget: float
) -> None:
    """Carry out one run's move."""
    state.branch[i] = branch = move.branch
    action, argument = move.action, move.argument
    if action is not Action.CONTINUE and not (action is Action.SWITCH and argument == MIXTURE):
        moves.append((float(state.spent[i]), action.value if argument is None else f"{action.value}({argument})"))
    if action is Action.COOLDOWN:
        start = float(state.spent[i])
        state.cooling[i] = start
        state.end[i] = cooldown_end(start, budget, cooldown=policy.cooldown, check_every=policy.check_every)
    elif action is Action.REFRESH and argument != RANDOM:
        chosen = SELECTORS.index(str(argument))
        cost = float(worlds.cost[i, chosen] * (worlds.shock[i] if state.spent[i] >= worlds.shock_at[i] else 1.0))
        cost = 0.0 if policy.free_selection else min(cost, budget - float(state.spent[i]))
        state.spent[i] += cost
        state.owned[i, branch] += cost
        state.flops["score"][i] += cost
        state.using[i, branch], state.scored_at[i, branch] = chosen, state.owned[i, branch]
        state.refreshes[i] += 1
        state.next_check[i] += cost
    elif action is Action.SWITCH and argument == MIXTURE:
        state.using[i, branch] = _MIXTURE
        state.weights[i] = [dict(move.weights or {})[name] for name in SOURCES]
    elif action is Action.SWITCH and argument == POOL:
        state.using[i, branch], state.scored_at[i, branch] = _POOL, np.nan
    elif action is Action.REFRESH:
        state.using[i, branch], state.scored_at[i, branch] = _RANDOM, state.owned[i, branch]
    elif action is not Action.CONTINUE:
        raise ValueError(f"a simulated world knows no {action.value}({argument})")


__all__ = ["BUDGETS", "Noise", "draw_noise", "simulate"]
