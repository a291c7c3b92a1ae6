"""PROBE, SWITCH, BATCH, MEMORY and stopping at a price, in worlds where each has something to gain."""

from __future__ import annotations

import numpy as np
import pytest
from governor import actions
from governor.actions import BUDGET, KINDS, WORLDS, Run
from scipy.stats import wilcoxon

from pyeff.governor import Action, Arm, MemoryMode

SEEDS = range(1000, 1020)
# Most runs end before they may stop: a stop takes three checks and a rate that is surely below the price.
MORE = {"price": range(1000, 1050)}


@pytest.fixture(scope="module", params=WORLDS)
def world(request):
    own, stayed, best, runs = zip(
        *(WORLDS[request.param](seed) for seed in MORE.get(request.param, SEEDS)), strict=True
    )
    return request.param, np.array(own), np.array(stayed), np.array(best), runs


def test_acting_is_better_than_never_acting(world):
    """Of the runs that did something, by the signs and sizes of what it brought; what they brought is very skewed."""
    _, own, stayed, _, runs = world
    acted = np.array([run.spent < 0.99 * BUDGET or any(d.action in KINDS for d in run.decisions) for run in runs])
    assert acted.sum() >= 8
    assert wilcoxon((own - stayed)[acted], alternative="greater").pvalue < 0.01


def test_no_run_beats_its_oracle_or_its_budget_or_the_overhead_cap(world):
    _, own, _, best, runs = world
    assert np.all(own <= best + 1e-9)
    assert all(run.spent <= BUDGET * (1 + 1e-12) and run.overhead <= 0.05 * BUDGET for run in runs)


def test_the_worlds_bring_out_every_action(world):
    name, _, _, _, runs = world
    taken = {decision.action for run in runs for decision in run.decisions}
    expected = {
        "probe": {Action.PROBE, Action.SWITCH},
        "batch": {Action.BATCH},
        "memory": {Action.MEMORY},
        "price": {Action.COOLDOWN},
    }
    assert expected[name] <= taken
    if name == "price":
        assert min(run.spent for run in runs) < 0.8 * BUDGET < max(run.spent for run in runs)


def test_where_nothing_is_to_be_gained_nothing_is_done():
    offered = {"arms": [Arm("same", 1.0, 0.02, probe_cost=1.0)], "memory_modes": [MemoryMode("same", 1.0)]}
    for seed in SEEDS[:4]:
        run = Run.start(seed).go(lambda: 1.0, lambda: offered, actions._nothing)
        assert {decision.action for decision in run.decisions} == {Action.CONTINUE, Action.COOLDOWN}
