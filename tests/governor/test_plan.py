from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyeff.governor import (
    Action,
    Advantage,
    Arm,
    GovernorConfig,
    GovernorPolicy,
    Observation,
    Selector,
    pay_back,
    refresh_period,
)
from pyeff.governor.control import recent_advantage
from pyeff.governor.plan import advantage_over, worth_of_renewing, worth_of_waiting

AMOUNTS = {
    "gain_ratio": st.floats(0.2, 5),
    "decay": st.floats(1, 500),
    "refresh_cost": st.floats(0.01, 30),
    "remaining": st.floats(1, 200),
}


@given(**AMOUNTS)
def test_one_renewal_is_the_pay_back_rule_and_more_are_taken_only_where_better(**amounts):
    best = worth_of_renewing(**amounts)
    once = worth_of_renewing(**amounts, shortest=amounts["remaining"])
    rule = pay_back(**amounts, stale_for=None)
    if amounts["refresh_cost"] < amounts["remaining"]:
        assert math.isclose(once, rule.benefit - rule.cost, rel_tol=1e-9, abs_tol=1e-9 * amounts["decay"])
    assert best >= once


@given(**AMOUNTS)
def test_no_number_of_renewals_pays_where_one_does_not(**amounts):
    if worth_of_renewing(**amounts, shortest=amounts["remaining"]) <= 0:
        assert worth_of_renewing(**amounts) <= 0


def test_with_no_end_in_sight_the_best_period_is_that_of_the_marginal_value_theorem():
    amounts = {"gain_ratio": 2.0, "decay": 100.0, "refresh_cost": 1.0}
    period = refresh_period(**amounts)
    # Between 20 and 24 renewals fit: the discrete optimum is within one of the continuous one.
    remaining = 10 * (period + 1.0)
    each = advantage_over(gain_ratio=2.0, decay=100.0, length=period) - 1.0
    assert worth_of_renewing(**amounts, remaining=remaining) >= 10 * each * (1 - 1e-12)


@given(**AMOUNTS, room=st.floats(0, 60))
def test_scorings_fit_into_their_room_and_more_room_is_never_worth_less(room, **amounts):
    within = worth_of_renewing(**amounts, room=room)
    assert within <= worth_of_renewing(**amounts, room=2 * room) <= worth_of_renewing(**amounts)
    if room < 2 * amounts["refresh_cost"]:
        assert within == worth_of_renewing(**amounts, shortest=amounts["remaining"])


@given(**AMOUNTS, age=st.floats(0, 100), interval=st.floats(0.5, 20))
def test_the_best_wait_is_no_worse_than_any_one_of_them(age, interval, **amounts):
    present = {"gain_ratio": 1.5, "decay": 50.0}
    waiting = worth_of_waiting(**amounts, interval=interval, present_ratio=1.5, present_decay=50.0, age=age)
    for waits in (1, 2, 5):
        rest = amounts["remaining"] - waits * interval
        if rest > amounts["refresh_cost"]:
            then = worth_of_renewing(**{**amounts, "remaining": rest})
            assert waiting >= advantage_over(**present, length=waits * interval, age=age) + then - 1e-9
    if amounts["remaining"] - interval <= amounts["refresh_cost"]:
        assert waiting == -math.inf


def test_under_the_cap_a_selector_is_chosen_that_can_still_be_renewed():
    """Both are best renewed several times; the cap has room for one scoring by the dear one, or for several."""
    both = [Selector("dear", 2.6, gain_ratio=3.0), Selector("cheap", 0.5, gain_ratio=2.0)]
    free = GovernorConfig(prior_decay=0.1)
    assert GovernorPolicy(free).decide(observation(selectors=both)).argument == "dear"
    capped = dataclasses.replace(free, overhead_cap=0.05)
    assert GovernorPolicy(capped).decide(observation(selectors=both)).argument == "cheap"


def observation(**changes):
    usual = {
        "step": 10,
        "spent": 30.0,
        "budget": 100.0,
        "unit": "flops",
        "anchors_before": (2.0, 3.0, 2.5, 4.0),
        "anchors_now": (1.9, 2.8, 2.4, 3.7),
        "spent_before": 25.0,
        "refresh_cost": 100.0,
        "cooldown_cost": 20.0,
        "selectors": [Selector("loss", 0.5)],
        "arms": [Arm("pool", 1.0, 1.0)],
    }
    return Observation(**{**usual, **changes})


def harmed(ratio, error=0.05):
    return observation(scored_at=25.0, refreshes_done=1, selector="loss", advantage=Advantage(2.5, ratio, error))


def test_a_selection_that_harms_gives_way_to_the_pool_at_the_first_clear_reading():
    decision = GovernorPolicy().decide(harmed(0.5))
    assert (decision.action, decision.argument) == (Action.SWITCH, "pool")


@pytest.mark.parametrize(("ratio", "error"), [(2.0, 0.05), (0.97, 0.05), (0.8, 0.5)])
def test_a_selection_that_helps_or_harms_within_the_error_stays(ratio, error):
    assert GovernorPolicy().decide(harmed(ratio, error)).action is not Action.SWITCH


def test_what_a_selector_showed_is_remembered_while_another_is_in_use():
    both = [Selector("loss", 1.0), Selector("norm", 1.0)]
    ratios = []
    for shown in (0.6, 3.0):
        policy = GovernorPolicy()
        policy.decide(
            observation(
                scored_at=25.0, refreshes_done=1, selector="loss", selectors=both, advantage=Advantage(2.5, shown, 0.05)
            )
        )
        later = observation(spent=40.0, spent_before=30.0, scored_at=35.0, refreshes_done=2, selector="norm")
        ratios.append(policy.decide(Observation(**{**vars(later), "selectors": both})).values["REFRESH(loss)"])
    assert ratios[0] < 0 < ratios[1]


def test_a_renewal_waits_while_it_would_be_worth_more_later():
    def decide(scored_at):
        seen = observation(scored_at=scored_at, refreshes_done=1, selector="loss", selectors=[Selector("loss", 1.0)])
        policy = GovernorPolicy()
        policy.decide(Observation(**{**vars(seen), "spent": seen.spent - 5, "spent_before": seen.spent_before - 5}))
        return policy.decide(seen)

    fresh, stale = decide(20.0), decide(1.0)
    assert "worth more later" in fresh.blocked["REFRESH(loss)"]
    assert stale.action is Action.REFRESH


def test_what_selections_lost_counts_as_overhead():
    """Looking for a better selection must not cost more than the cap: 5 trained at 0.5 times the pace are 2.5 lost."""
    config = GovernorConfig(overhead_cap=0.05)
    for ratio, blocked in ((0.5, True), (1.5, False)):
        seen = observation(
            scored_at=25.0,
            refreshes_done=1,
            selector="loss",
            selectors=[Selector("loss", 0.5), Selector("norm", 3.0)],
            overhead=1.0,
            advantage=Advantage(2.5, ratio, 0.05),
        )
        why = GovernorPolicy(config).decide(seen).blocked.get("REFRESH(norm)", "")
        assert ("the cap of 5% of the budget leaves 1.5" in why) == blocked


def test_a_control_arm_that_has_just_judged_a_selection_need_not_be_waited_for():
    seen = observation(scored_at=25.0, refreshes_done=1, selector="loss", selectors=[Selector("norm", 0.1)])
    assert "check 1 of 2" in GovernorPolicy().decide(seen).blocked["REFRESH(norm)"]
    judged = dataclasses.replace(seen, advantage=Advantage(2.5, 1.0, 0.1))
    assert "check 1" not in GovernorPolicy().decide(judged).blocked.get("REFRESH(norm)", "")


def test_one_reading_below_nothing_with_a_large_error_is_not_yet_harm():
    assert GovernorPolicy().decide(harmed(-0.1, error=2.0)).action is not Action.SWITCH
    assert GovernorPolicy().decide(harmed(-0.1, error=0.5)).action is Action.SWITCH


def test_recent_readings_are_those_of_the_present_selection():
    points = [Advantage(1.0, 3.0, 0.1), Advantage(5.0, 3.0, 0.1), Advantage(1.0, 0.5, 0.1), Advantage(2.0, 0.7, 0.1)]
    mean, error, readings = recent_advantage(points, within=10.0)
    assert mean == pytest.approx(0.6)
    assert error == pytest.approx(0.1 / math.sqrt(2))
    assert readings == 2
    assert recent_advantage(points, within=0.5) is None
