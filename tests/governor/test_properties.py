"""Laws of a run's decisions, under whatever a run can show."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyeff.governor import (
    Action,
    Advantage,
    Arm,
    BatchSize,
    Decision,
    DriftReading,
    GovernorConfig,
    GovernorPolicy,
    MemoryMode,
    Observation,
    Selector,
    recompute,
)

CAPPED = GovernorConfig(overhead_cap=0.05, last_interval=0.1)
CONFIGS = (GovernorConfig(), CAPPED, GovernorConfig(require_alarm=True, min_dwell=1, window=1))
WILD = st.one_of(st.floats(), st.sampled_from([0.0, 1e-320, 1e-300, 1e154, 1e300, -1e308]), st.floats(0, 10))
POSITIVE = st.one_of(st.floats(1e-12, 1e12), st.sampled_from([1e-300, 1e-30, 1e30]), st.floats(0.1, 5))
ADVANTAGE = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.floats(0, 4))
PROBLEM = st.sampled_from([None, None, None, "the clock ran backwards"])


@st.composite
def wild_runs(draw):
    """The checks of a run in which everything that may happen does."""
    budget = draw(st.sampled_from([1.0, 100.0, 1e25, 1e-3]))
    size = draw(st.integers(2, 5))
    spent, before, before_at, scored_at, refreshes, selector = 0.0, (), 0.0, None, 0, None
    pool = Arm("pool", 1.0, 1.0)
    checks = []
    for check in range(draw(st.integers(1, 10))):
        spent += draw(st.one_of(st.floats(0, 0.2), st.sampled_from([0.0, 1e-12, 1e-9, 0.05]))) * budget
        if draw(st.integers(0, 3)):
            now = tuple(2 - 0.1 * check + draw(st.floats(-0.05, 0.05)) for _ in range(size))
        else:
            now = tuple(draw(st.lists(WILD, min_size=size, max_size=size)))
        if not draw(st.integers(0, 4)) and spent > before_at:
            refreshes, selector = refreshes + 1, draw(st.sampled_from("ab"))
            scored_at = min(before_at + draw(st.floats(0, 1)) * (spent - before_at), spent)
        other = Arm("other", draw(POSITIVE), draw(POSITIVE), 0.1 * budget, 0.01 * budget, draw(POSITIVE))
        reading = Advantage(draw(st.floats(0, 1)) * budget, draw(ADVANTAGE), draw(POSITIVE))
        selectors = (Selector("a", 0.01 * budget), Selector("b", 0.0)), (Selector("b", 1e-300), Selector("a", budget))
        batches = BatchSize(8, 100, 50, 200), BatchSize(1e300, 1e-300, 1e-300, 1e300), BatchSize(1000, 10, 5, 20)
        readings = DriftReading("D3", math.nan, math.nan, 0.5, False, False), DriftReading("D1", 0.2, 0.1, 0.8, True)
        checks.append(
            Observation(
                step=check + draw(st.integers(0, 1)),
                spent=spent,
                budget=budget,
                unit="flops",
                anchors_before=before,
                anchors_now=now,
                spent_before=before_at,
                refresh_cost=draw(st.floats(0, 2)) * budget,
                cooldown_cost=0.2 * budget,
                scored_at=scored_at,
                refreshes_done=refreshes,
                loss_finite=draw(st.integers(0, 6)) > 0,
                clusters=draw(st.sampled_from([(), tuple(range(size)), (0,) * (size - 1) + (1,)])),
                overhead=draw(st.floats(0, 0.1)) * budget,
                price=draw(st.sampled_from([None, 0.0, 1e-3, 1e300])),
                selectors=draw(st.sampled_from([(), *selectors])),
                selector=selector,
                arms=draw(st.sampled_from([(), (pool,), (pool, other)])),
                batch=draw(st.sampled_from([None, *batches])),
                memory_modes=draw(st.sampled_from([(), (MemoryMode("half", 0.5),), (MemoryMode("none", 1e-300),)])),
                advantage=reading if draw(st.booleans()) else None,
                drift=draw(st.sampled_from([(), readings])),
                problem=draw(PROBLEM),
                check_cost=draw(st.floats(0, 0.01)) * budget,
                control=draw(st.booleans()),
                control_cost=draw(st.floats(0, 0.01)) * budget,
            )
        )
        before, before_at = now, spent
    return checks


@settings(max_examples=60, deadline=None)
@given(checks=wild_runs(), config=st.sampled_from(CONFIGS))
def test_every_check_of_any_run_is_decided_logged_replayed_and_resumed_to_the_same_end(checks, config):
    whole, resumed = GovernorPolicy(config), GovernorPolicy(config)
    for seen in checks:
        decision = whole.decide(seen)
        line = json.dumps(decision.to_dict(), allow_nan=False)
        assert recompute(json.loads(line)["inputs"]) == Decision.from_dict(json.loads(line)) == decision
        assert resumed.decide(seen) == decision
        state = json.loads(json.dumps(resumed.state_dict(), allow_nan=False))
        resumed = GovernorPolicy(config)
        resumed.load_state_dict(state)


def plain_run(gains, *, loss_unit=1.0, unit=1.0, order=1, size=6, config=CAPPED):
    """Decisions of a run that carries out what it is told; every gain is that of one interval."""
    policy, taken, before, before_at = GovernorPolicy(config), [], (), 0.0
    level, spent, overhead, scored_at, refreshes, selector = 4.0, 0.0, 0.0, None, 0, None
    for check, gain in enumerate(gains):
        level -= gain
        spent += 5.0
        overhead += 0.0625
        now = tuple(loss_unit * (level + 0.25 * i + 0.0625 * ((i + check) % 3)) for i in range(size))
        selectors = [Selector("a", 0.5 * unit), Selector("b", 1.0 * unit), Selector("c", 1.5 * unit)]
        reading = None if selector is None else Advantage((spent - scored_at) * unit, 1 + 4 * gain, 0.25)
        seen = Observation(
            step=check + 1,
            spent=spent * unit,
            budget=100.0 * unit,
            unit="flops",
            anchors_before=before,
            anchors_now=now,
            spent_before=before_at * unit,
            refresh_cost=100.0 * unit,
            cooldown_cost=20.0 * unit,
            scored_at=None if scored_at is None else scored_at * unit,
            refreshes_done=refreshes,
            overhead=overhead * unit,
            selectors=selectors[::order],
            selector=selector,
            arms=[Arm("pool", 1.0, 1.0)],
            advantage=reading,
            check_cost=0.0625 * unit,
        )
        decision = policy.decide(seen)
        taken.append(decision.key)
        before, before_at = now, spent
        if decision.action is Action.REFRESH:
            cost = {"a": 0.5, "b": 1.0, "c": 1.5}[decision.argument]
            spent, overhead, refreshes, selector = spent + cost, overhead + cost, refreshes + 1, decision.argument
            scored_at = spent
        elif decision.action is Action.SWITCH:
            selector = scored_at = None
    return taken, overhead


GAINS = st.lists(st.integers(-4, 24).map(lambda n: n / 64), min_size=15, max_size=15)


@settings(max_examples=25, deadline=None)
@given(gains=GAINS, power=st.integers(-30, 30))
def test_neither_the_unit_of_the_loss_nor_that_of_the_budget_changes_a_decision(gains, power):
    # Powers of two, so that every product is exact.
    usual = plain_run(gains)[0]
    assert plain_run(gains, loss_unit=2.0**power)[0] == usual
    assert plain_run(gains, unit=2.0**power)[0] == usual


@settings(max_examples=25, deadline=None)
@given(gains=GAINS)
def test_the_order_in_which_selectors_are_offered_changes_no_decision(gains):
    assert plain_run(gains, order=-1)[0] == plain_run(gains)[0]


@settings(max_examples=25, deadline=None)
@given(gains=GAINS)
def test_overhead_stays_under_the_cap_whatever_the_run_shows(gains):
    assert plain_run(gains)[1] <= 0.05 * 100.0


@pytest.mark.parametrize("gain", [0.25, 0.0])
def test_a_run_of_selections_is_among_those_tried(gain):
    """The properties above say something only where something is decided."""
    assert any(key.startswith("REFRESH") for key in plain_run([gain] * 15)[0])
