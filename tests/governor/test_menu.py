"""Actions beyond the schedule and the refresh: what they are worth, and what holds them back."""

from __future__ import annotations

import dataclasses
import json
import math
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyeff.governor import (
    Action,
    Advantage,
    Arm,
    BatchSize,
    DriftReading,
    GovernorConfig,
    GovernorPolicy,
    MemoryMode,
    Observation,
    Selector,
    recompute,
)

QUICK = GovernorConfig(window=1, min_dwell=1, warmup=0.0)
NEVER_REFRESH = {"refresh_cost": 90.0}


def observe(**changes):
    usual = {
        "step": 10,
        "spent": 20.0,
        "budget": 100.0,
        "unit": "flops",
        "anchors_before": (2.0, 3.0, 2.5, 4.0),
        "anchors_now": (1.9, 2.8, 2.4, 3.7),
        "spent_before": 15.0,
        "refresh_cost": 90.0,
        "cooldown_cost": 20.0,
    }
    return Observation(**{**usual, **changes})


def course(policy, checks, **offers):
    """Decide at checks 5 apart with the same offers, learning all the while."""
    decisions = []
    for index in range(checks):
        spent = 15.0 + 5 * index
        fall = 0.3 / (1 + index)
        decisions.append(
            policy.decide(
                observe(
                    step=10 * (index + 1),
                    spent=spent,
                    spent_before=spent - 5,
                    anchors_before=tuple(x + fall * (1 + 0.1 * i) for i, x in enumerate((2.0, 3.0, 2.5, 4.0))),
                    anchors_now=(2.0, 3.0, 2.5, 4.0),
                    **offers,
                )
            )
        )
    return decisions


def test_what_is_not_offered_is_not_weighed():
    assert set(GovernorPolicy().decide(observe()).values) == {"CONTINUE", "REFRESH", "COOLDOWN"}


def test_a_better_arm_is_taken_and_its_worth_is_the_training_it_saves():
    decision = GovernorPolicy(QUICK).decide(observe(arms=[Arm("code", 1.5, 0.1, switch_cost=2.0)]))
    assert (decision.action, decision.argument) == (Action.SWITCH, "code")
    assert decision.values["SWITCH(code)"] == pytest.approx(1.5 * 58 - 60)
    assert "Switch to code" in decision.reason


@pytest.mark.parametrize("arm", [Arm("same", 1.05, 0.01), Arm("unsure", 1.5, 0.6), Arm("worse", 0.8, 0.01)])
def test_an_arm_within_the_deadband_or_its_error_is_left_alone(arm):
    decision = GovernorPolicy(QUICK).decide(observe(arms=[arm]))
    assert decision.action is Action.CONTINUE
    assert "deadband" in decision.blocked[f"SWITCH({arm.name})"]


def test_a_change_must_be_best_on_as_many_checks_as_the_window_asks():
    config = dataclasses.replace(QUICK, window=3)
    actions = [decision.action for decision in course(GovernorPolicy(config), 3, arms=[Arm("code", 1.5, 0.1)])]
    assert actions == [Action.CONTINUE, Action.CONTINUE, Action.SWITCH]


def test_a_recommendation_that_alternates_is_never_followed():
    governor = GovernorPolicy(dataclasses.replace(QUICK, window=2))
    for index in range(6):
        arms = [Arm("a", 1.5 if index % 2 else 1.3, 0.05), Arm("b", 1.3 if index % 2 else 1.5, 0.05)]
        assert governor.decide(observe(arms=arms)).action is Action.CONTINUE


def test_after_a_change_every_other_one_waits_out_the_dwell():
    governor = GovernorPolicy(GovernorConfig(window=1, min_dwell=3, warmup=0.0))
    offers = {"arms": [Arm("code", 1.5, 0.1)], "memory_modes": [MemoryMode("plain", 0.75)], "refresh_cost": 1.0}
    offers["refresh_cost"] = 90.0
    actions = [decision.action for decision in course(governor, 5, **offers)]
    assert actions[0] is Action.SWITCH
    assert actions[1:3] == [Action.CONTINUE] * 2
    assert actions[3] is not Action.CONTINUE


def test_a_probe_is_worth_what_it_may_reveal_and_nothing_where_all_is_known():
    def value(**arm):
        offered = Arm("code", **{"ratio": 1.0, "standard_error": 0.5, "probe_cost": 2.0} | arm)
        return GovernorPolicy(QUICK).decide(observe(arms=[offered])).values["PROBE(code)"]

    assert value() > 0
    assert value(standard_error=0.001) < 0
    assert value(probe_error=10.0) < value(probe_error=0.01)
    assert value(ratio=0.2) < value()
    # E max(0, X) = s / sqrt(2 pi) for X ~ N(0, s), s the deviation of the mean that the probe will leave.
    left, cost, error = 60.0, 2.0, 0.5
    spread = error**2 / math.hypot(error, 0.1)
    assert value() == pytest.approx((left - cost) * spread / math.sqrt(2 * math.pi) - 1.1 * cost)


def test_the_overhead_cap_is_kept():
    config = dataclasses.replace(QUICK, overhead_cap=0.05)
    arms = [Arm("code", 1.0, 0.5, probe_cost=2.0)]
    assert GovernorPolicy(config).decide(observe(arms=arms, overhead=2.9)).action is Action.PROBE
    decision = GovernorPolicy(config).decide(observe(arms=arms, overhead=3.1, refresh_cost=2.0))
    assert decision.action is Action.CONTINUE
    assert "the cap of 5% of the budget leaves 1.9 F" in decision.blocked["PROBE(code)"]
    assert "the cap of 5% of the budget leaves 1.9 F" in decision.blocked["REFRESH"]


def test_a_price_of_nothing_is_replayed_as_one():
    seen = observe(price=0.0)
    assert Observation.from_dict(json.loads(json.dumps(seen.to_dict()))).price == 0.0


def test_a_promise_is_that_of_the_selector_that_is_run():
    """Its factor is the new selection's pace over the present one's, not the present selector's own."""

    def promised(ratio):
        policy = GovernorPolicy(QUICK)
        policy.decide(observe(spent=15.0, spent_before=10.0, selectors=[Selector("loss", 50.0)]))
        decision = policy.decide(observe(selectors=[Selector("loss", 0.1, gain_ratio=ratio)]))
        assert decision.action is Action.REFRESH
        assert f"gain ratio {ratio:.2f}" in decision.reason
        return decision.estimates["forecast"]["rate"]

    assert promised(3.0) == pytest.approx(1.5 * promised(2.0))


def test_the_cap_keeps_what_the_checks_to_come_will_cost():
    config = dataclasses.replace(QUICK, overhead_cap=0.05)
    seen = observe(overhead=1.0, refresh_cost=3.0)
    assert GovernorPolicy(config).decide(seen).action is Action.REFRESH
    # 60 are left before the cooldown: at an interval of 5 that is twelve checks, and 3 + 1 + 12 x 0.1 is above 5.
    seen = dataclasses.replace(seen, check_cost=0.1)
    assert "leaves 2.8" in GovernorPolicy(config).decide(seen).blocked["REFRESH"]


def test_the_cap_keeps_what_the_control_arm_of_a_selection_will_cost():
    config = dataclasses.replace(QUICK, overhead_cap=0.05)
    seen = observe(overhead=1.0, refresh_cost=3.0, control=True, control_cost=1.0)
    assert GovernorPolicy(config).decide(seen).action is Action.REFRESH
    seen = dataclasses.replace(seen, control_cost=1.25)
    assert "leaves 2.75" in GovernorPolicy(config).decide(seen).blocked["REFRESH"]


def batch(size, noise, **options):
    return BatchSize(size, noise, noise / 1.2, noise * 1.2, **options)


def test_the_batch_follows_the_noise_scale_only_where_both_bounds_agree():
    def decide(given):
        return GovernorPolicy(QUICK).decide(observe(batch=given))

    grown = decide(batch(8, 100, doubled_rate=1.8))
    assert (grown.action, grown.argument) == (Action.BATCH, "x2")
    shrunk = decide(batch(1000, 100))
    assert (shrunk.action, shrunk.argument) == (Action.BATCH, "/2")
    # With FLOPs, twice the batch is never more learning a unit.
    assert decide(batch(8, 100)).action is Action.CONTINUE
    unsure = decide(BatchSize(8, 100, 10, 1000, doubled_rate=1.8))
    assert unsure.action is Action.CONTINUE
    assert "is not below 0.5 of the noise scale" in unsure.blocked["BATCH(x2)"]


def test_a_cheaper_memory_mode_is_taken_only_where_it_fits():
    decision = GovernorPolicy(QUICK).decide(
        observe(memory_modes=[MemoryMode("plain", 0.75), MemoryMode("offload", 3.0)])
    )
    assert (decision.action, decision.argument) == (Action.MEMORY, "plain")
    assert decision.values["MEMORY(plain)"] == pytest.approx(60 / 0.75 - 60)
    decision = GovernorPolicy(QUICK).decide(observe(memory_modes=[MemoryMode("plain", 0.75, fits=False)]))
    assert decision.blocked["MEMORY(plain)"] == "it does not fit in memory"


def test_each_selector_is_priced_and_believed_on_its_own():
    selectors = [Selector("cheap", 2.0, gain_ratio=1.6), Selector("dear", 70.0, gain_ratio=3.0)]
    decision = GovernorPolicy(QUICK).decide(observe(selectors=selectors))
    assert (decision.action, decision.argument) == (Action.REFRESH, "cheap")
    assert decision.blocked == {"REFRESH(dear)": "it costs 70 F and 60 F is left before the cooldown"}
    assert "Refresh by cheap: scoring the pool costs 2 F" in decision.reason
    # The one in use has learned from its own run; the other keeps its prior.
    governor = GovernorPolicy(QUICK)
    course(governor, 3, selectors=selectors)
    used = {"selectors": selectors, "selector": "cheap", "scored_at": 32.0, "refreshes_done": 1}
    governor.decide(observe(spent=35.0, spent_before=30.0, **used))
    assert governor.state_dict()["selector"] == "cheap"
    assert math.exp(governor.state_dict()["belief"]["log_mean"]) == pytest.approx(1.6, rel=0.5)


def test_with_a_detector_required_no_alarm_means_no_second_refresh():
    config = dataclasses.replace(QUICK, require_alarm=True)
    seen = {"refresh_cost": 1.0, "scored_at": 2.0, "refreshes_done": 1}
    prior = GovernorPolicy(config)
    calm = prior.decide(observe(**seen))
    assert calm.blocked["REFRESH"] == "no drift detector alarms"
    loud = DriftReading("D3", 0.1, 0.05, 0.5, alarm=True)
    assert GovernorPolicy(config).decide(observe(drift=[loud], **seen)).action is Action.REFRESH
    # An alarm only enables: a refresh that does not pay stays undone.
    assert (
        GovernorPolicy(config).decide(observe(drift=[loud], **{**seen, "refresh_cost": 58.0})).action is Action.CONTINUE
    )


def test_the_control_arm_moves_rho_and_tau():
    governor = GovernorPolicy(QUICK)
    seen = {"refresh_cost": 1.0, "scored_at": 2.0, "refreshes_done": 1}
    for age in (2.0, 6.0, 10.0, 14.0, 18.0):
        decision = governor.decide(observe(advantage=Advantage(age, 1 + 2 * math.exp(-age / 8), 0.02), **seen))
    assert decision.estimates["gain_ratio"] == pytest.approx(3.0, rel=0.1)
    assert decision.estimates["decay"] == pytest.approx(8.0, rel=0.15)


def test_a_paid_budget_is_trained_to_its_end_and_a_price_ends_a_run_that_does_not_return_it():
    free = course(GovernorPolicy(QUICK), 12)
    assert all(decision.action is Action.CONTINUE for decision in free)
    dear = course(GovernorPolicy(QUICK), 12, price=10.0)
    first = next(i for i, decision in enumerate(dear) if decision.action is Action.COOLDOWN)
    assert first == QUICK.stop_checks - 1
    assert "returned less than its price" in dear[first].reason
    assert all(decision.action is Action.COOLDOWN for decision in dear[first:])
    cheap = course(GovernorPolicy(QUICK), 12, price=1e-9)
    assert all(decision.action is Action.CONTINUE for decision in cheap)


def lowest_price_that_ends(cooldown):
    low, high = 0.0, 10.0
    for _ in range(60):
        price = (low + high) / 2
        seen = course(GovernorPolicy(QUICK), QUICK.stop_checks, price=price, cooldown_cost=cooldown, refresh_cost=100.0)
        low, high = (low, price) if seen[-1].action is Action.COOLDOWN else (price, high)
    return high


def test_the_share_of_a_unit_that_the_anneal_takes_returns_a_third():
    whole, annealed = lowest_price_that_ends(0.0), lowest_price_that_ends(30.0)
    # Both are halved down to an interval of 10 / 2^60, and rounded in a few products.
    allowed = 2 * 10.0 * 2.0**-60 + 8 * sys.float_info.epsilon * whole
    assert annealed == pytest.approx(whole * (0.7 + 0.3 / 3), rel=0, abs=allowed)


def test_nothing_is_stopped_for_its_price_before_a_gain_was_measured():
    assert GovernorPolicy(QUICK).decide(observe(anchors_before=(), price=1e9)).action is Action.CONTINUE


@pytest.mark.parametrize("broken", [{"loss_finite": False}, {"anchors_now": (math.nan, 1.0, 1.0, 1.0)}])
def test_on_a_loss_that_is_not_finite_nothing_is_changed(broken):
    offers = {
        "arms": [Arm("code", 3.0, 0.1, probe_cost=0.1)],
        "memory_modes": [MemoryMode("plain", 0.5)],
        "batch": batch(1000, 10),
        "price": 1e9,
    }
    assert GovernorPolicy(QUICK).decide(observe(**offers, **broken)).action is Action.CONTINUE


def test_pieces_of_one_document_widen_the_gains_interval():
    fine = observe(anchors_before=(2.0, 2.1, 4.0, 4.1), anchors_now=(1.9, 2.0, 3.6, 3.7))
    coarse = dataclasses.replace(fine, clusters=(0, 0, 1, 1))
    narrow = GovernorPolicy().decide(fine).estimates["gain"]
    wide = GovernorPolicy().decide(coarse).estimates["gain"]
    assert wide["n"] == 2
    assert wide["high"] - wide["low"] > narrow["high"] - narrow["low"]


OFFERS = st.fixed_dictionaries(
    {
        "arms": st.lists(
            st.builds(Arm, st.sampled_from("ab"), st.floats(0, 4), st.floats(0, 2), st.floats(0, 20), st.floats(0, 9)),
            max_size=2,
            unique_by=lambda arm: arm.name,
        ),
        "memory_modes": st.lists(
            st.builds(MemoryMode, st.sampled_from("pq"), st.floats(0.1, 4), st.booleans()),
            max_size=2,
            unique_by=lambda mode: mode.name,
        ),
        "batch": st.none() | st.builds(batch, st.floats(1, 1e4), st.floats(1, 1e4), doubled_rate=st.floats(0.5, 2)),
        "price": st.none() | st.floats(1e-6, 10),
        "overhead": st.floats(0, 10),
        "selectors": st.lists(
            st.builds(Selector, st.sampled_from("xy"), st.floats(0, 50), st.none() | st.floats(0.1, 8)),
            max_size=2,
            unique_by=lambda selector: selector.name,
        ),
    }
)


@settings(max_examples=25, deadline=None)
@given(offers=OFFERS, cap=st.none() | st.floats(0.01, 0.2), window=st.integers(1, 3))
def test_any_offers_give_one_open_action_within_the_cap_that_replays_from_json(offers, cap, window):
    config = GovernorConfig(overhead_cap=cap, window=window, min_dwell=2, warmup=0.0)
    for decision in course(GovernorPolicy(config), 5, **offers):
        assert decision.key not in decision.blocked
        assert decision.chosen == max(v for key, v in decision.values.items() if key not in decision.blocked)
        if cap is not None and decision.action in (Action.PROBE, Action.REFRESH):
            costs = {arm.name: arm.probe_cost for arm in offers["arms"]}
            if decision.action is Action.REFRESH:
                costs = {selector.name: selector.cost for selector in offers["selectors"]} or {None: 90.0}
            assert offers["overhead"] + costs[decision.argument] <= cap * 100
        plain = json.loads(json.dumps(decision.to_dict(), allow_nan=False))
        assert recompute(plain["inputs"]) == decision


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Arm("", 1.0, 0.1), "name must be a text"),
        (lambda: Arm("a", -1.0, 0.1), "ratio must be finite and not negative"),
        (lambda: Selector("a", math.nan), "cost must be finite"),
        (lambda: BatchSize(1, 5, 6, 7), "noise_scale must lie in its interval"),
        (lambda: MemoryMode("m", 0.0), "relative_cost must be positive"),
        (lambda: observe(arms=[Arm("a", 1, 1), Arm("a", 1, 1)]), "arms must have different names"),
        (lambda: observe(clusters=[1, 2]), "clusters must name the document of each anchor"),
        (lambda: observe(price=-1.0), "price must be finite and not negative"),
        (lambda: GovernorConfig(overhead_cap=0.0), "overhead_cap must be above 0"),
        (lambda: GovernorConfig(window=0), "window must be an integer >= 1"),
        (lambda: GovernorConfig(stop_probability=0.6), "stop_probability must be above 0"),
        (lambda: GovernorConfig(overhead_cap=True), "overhead_cap must be a number"),
        (lambda: GovernorConfig(window=2.5), "window must be an integer >= 1"),
    ],
)
def test_offers_and_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
