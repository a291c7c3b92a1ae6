"""The best that could have been done in a simulated world: dynamic programming with every law known.

The state is (spend, selection in use, its age) on a grid; at every point the oracle goes on, returns to the pool, or
scores with any selector and pays its price. It anneals as everybody does. Effective training adds up and the loss falls
with it, so the plan with the most of it is the best for whatever law.

Scoring may happen at any point of the grid and not only at a check, so the oracle is a little better than any policy
can be; it never evaluates anything.
"""

from __future__ import annotations

import numpy as np

from .metrics import Run
from .policies import cooldown_end
from .world import Array, Worlds, cooldown_pace

NAME = "oracle"
# Points of the grid to a budget.
POINTS = 200
COOLDOWN = 0.2


def best_training(worlds: Worlds, budget: float, *, points: int = POINTS) -> Array:
    """Return the effective training x [R] of the best plan."""
    step = budget / points
    plateau = round(points * (1 - COOLDOWN))
    runs, selectors = worlds.ratio.shape
    times = step * np.arange(plateau + 1)
    # Everything depends on when a selection was made and how old it is: age index a at time index t was made at t - a.
    end = cooldown_end(times[plateau], budget, cooldown=COOLDOWN, check_every=1 / points)
    progress = (np.arange(points - plateau) + 0.5) / (points - plateau)
    pace = cooldown_pace(progress) * (end - times[plateau]) / (points - plateau)
    # value[:, s, a]: still to come, with the selection of s made a points ago; pool[:]: on the pool.
    value = np.empty((runs, selectors, plateau + 1))
    for a in range(plateau + 1):
        made = np.full((runs, len(progress)), times[plateau] - a * step)
        age = a * step + (np.arange(len(progress)) + 0.5) * step
        value[:, :, a] = (worlds.advantage(made, np.broadcast_to(age, made.shape)) * pace).sum(axis=2)
    pool = np.full(runs, pace.sum())
    # later[t]: what a selection just made at time t is worth, for the jump over its cost.
    fresh = {plateau: value[:, :, 0].copy()}
    for t in range(plateau - 1, -1, -1):
        ages = np.arange(t + 1)
        made = np.broadcast_to(times[t] - ages * step, (runs, t + 1))
        rate = worlds.advantage(made, np.broadcast_to((ages + 0.5) * step, (runs, t + 1)))
        going_on = step * rate + value[:, :, 1 : t + 2]
        price = worlds.costs(np.full(runs, times[t])) / step
        jumps = np.floor(price + 1e-9).astype(np.int64)
        # What a price exceeds whole points by is charged as lost training at the new selection's rate.
        toll = np.maximum(price - jumps, 0.0) * step * rate[:, :, 0]
        scored = np.full((runs, selectors), -np.inf)
        for s in range(selectors):
            for jump in np.unique(jumps[:, s]):
                if t + jump <= plateau:
                    rows = jumps[:, s] == jump
                    worth = going_on[rows, s, 0] if jump == 0 else fresh[t + jump][rows, s]
                    scored[rows, s] = worth - toll[rows, s]
        best = np.maximum(scored.max(axis=1), step + pool)
        fresh[t] = np.maximum(going_on[:, :, 0], best[:, None])
        value = np.maximum(going_on, best[:, None, None])
        pool = best
    return pool


def oracle_runs(worlds: Worlds, budget: float, *, points: int = POINTS) -> list[Run]:
    """Return the oracle's runs: one for each seed, with its final loss."""
    x = best_training(worlds, budget, points=points)
    found = worlds.loss(x)
    return [
        Run(worlds.family, NAME, budget, seed, float(loss), flops={"train": budget}, effective=float(done))
        for seed, loss, done in zip(worlds.seeds, found, x, strict=True)
    ]
