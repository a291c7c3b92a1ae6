from __future__ import annotations

import dataclasses
import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyeff.governor import Action, GovernorConfig, GovernorPolicy, Observation, UniformPolicy

BUDGET = 100.0


def observe(**changes):
    usual = {
        "step": 10,
        "spent": 10.0,
        "budget": BUDGET,
        "unit": "flops",
        "anchors_before": (2.0, 3.0, 2.5, 4.0),
        "anchors_now": (1.9, 2.8, 2.4, 3.7),
        "spent_before": 5.0,
        "refresh_cost": 5.0,
        "cooldown_cost": 20.0,
    }
    return Observation(**{**usual, **changes})


@dataclasses.dataclass
class Outcome:
    """A simulated run: its decisions, when the pool was scored, and training done in units of uniform training."""

    decisions: list
    scored: list
    trained: float


def simulate(policy, *, true_ratio=2.0, decay=0.5, cost=0.1, noise=0.02, seed=0, gain=0.5, worse_after=1.0, steps=100):
    """Train where selection multiplies progress by 1 + (ratio - 1) e^(-x / decay); loss falls with log(progress).

    From ``worse_after`` (share of the budget) on, the anchors rise as they fell before: overfitting.
    """
    source = random.Random(seed)
    difficulty = [source.gauss(2, 0.6) for _ in range(64)]
    spent = trained = harm = before = 0.0
    scored_at, step, step_cost = None, 0, BUDGET / steps
    outcome = Outcome([], [], 0.0)

    def rate():
        fresh = 0.0 if scored_at is None else math.exp(-(spent - scored_at) / (decay * BUDGET))
        return 1 + (true_ratio - 1) * fresh

    def losses():
        fallen = gain * (math.log1p((trained - harm) / 5) - math.log1p(harm / 5))
        return tuple(loss - fallen + source.gauss(0, noise) for loss in difficulty)

    now, previous = losses(), ()
    while True:
        decision = policy.decide(
            observe(
                step=step,
                spent=spent,
                spent_before=before,
                anchors_before=previous,
                anchors_now=now,
                refresh_cost=cost * BUDGET,
                scored_at=scored_at,
                refreshes_done=len(outcome.scored),
            )
        )
        outcome.decisions.append(decision)
        before, previous = spent, now
        if decision.action is Action.COOLDOWN:
            outcome.trained = trained + (BUDGET - spent) * rate()
            return outcome
        if decision.action is Action.REFRESH:
            outcome.scored.append(spent)
            spent += cost * BUDGET
            scored_at = spent
        for _ in range(round(0.05 * steps)):
            trained += step_cost * rate()
            harm += step_cost * rate() if spent >= worse_after * BUDGET else 0.0
            spent += step_cost
            step += 1
        now = losses()


WORLDS = {
    "true_ratio": st.floats(0.3, 6),
    "decay": st.floats(0.05, 3),
    "cost": st.floats(0, 1.2),
    "noise": st.floats(0.001, 1),
    "seed": st.integers(0, 10**6),
}


@settings(max_examples=60, deadline=None)
@given(**WORLDS)
def test_every_run_keeps_the_rules(**world):
    decisions = simulate(GovernorPolicy(), **world).decisions
    assert [d.action for d in decisions].count(Action.COOLDOWN) == 1
    last_refresh = -math.inf
    for index, decision in enumerate(decisions):
        seen = decision.inputs["observation"]
        left = seen["budget"] - seen["spent"] - seen["cooldown_cost"]
        open_values = {key: value for key, value in decision.values.items() if key not in decision.blocked}
        assert decision.chosen == max(open_values.values())
        assert decision.key in open_values
        if decision.action is Action.REFRESH:
            assert seen["refresh_cost"] < left
            assert seen["step"] > 0
            assert seen["spent"] >= 0.05 * BUDGET
            assert index - last_refresh >= GovernorConfig().min_dwell
            last_refresh = index
        if decision.action is not Action.COOLDOWN:
            assert left >= 0.05 * BUDGET
        json.dumps(decision.to_dict(), allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(**WORLDS, share=st.floats(0, 1))
def test_a_cheaper_refresh_never_comes_later(share, **world):
    dear = simulate(GovernorPolicy(), **world).scored
    cheap = simulate(GovernorPolicy(), **{**world, "cost": share * world["cost"]}).scored
    if dear:
        assert cheap
        assert cheap[0] <= dear[0]


@settings(max_examples=20, deadline=None)
@given(**WORLDS)
def test_the_same_run_gets_the_same_decisions(**world):
    assert simulate(GovernorPolicy(), **world).decisions == simulate(GovernorPolicy(), **world).decisions


@settings(max_examples=20, deadline=None)
@given(**WORLDS, cut=st.integers(0, 20))
def test_a_governor_resumed_from_json_decides_as_the_one_that_went_on(cut, **world):
    class Resumed:
        def __init__(self):
            self.governor, self.checks = GovernorPolicy(), 0

        def decide(self, observation):
            if self.checks == cut:
                saved, self.governor = json.dumps(self.governor.state_dict()), GovernorPolicy()
                self.governor.load_state_dict(json.loads(saved))
            self.checks += 1
            return self.governor.decide(observation)

    assert simulate(Resumed(), **world).decisions == simulate(GovernorPolicy(), **world).decisions


def test_selecting_beats_uniform_where_selection_helps_and_is_cheap():
    for seed in range(5):
        selected = simulate(GovernorPolicy(), true_ratio=3.0, cost=0.05, seed=seed)
        assert selected.trained > simulate(UniformPolicy(), seed=seed).trained == pytest.approx(BUDGET)


def test_where_selection_is_useless_the_governor_believes_less_in_it_and_loses_at_most_what_it_paid():
    for seed in range(5):
        outcome = simulate(GovernorPolicy(), true_ratio=1.0, cost=0.1, seed=seed)
        assert outcome.trained == pytest.approx(BUDGET - 10.0 * len(outcome.scored))
        assert outcome.decisions[-1].estimates["gain_ratio"] < GovernorConfig().prior_gain_ratio


def test_a_better_selector_is_believed_in_more():
    believed = [
        simulate(GovernorPolicy(), true_ratio=ratio, cost=0.1).decisions[-1].estimates["gain_ratio"]
        for ratio in (0.5, 1, 2, 6)
    ]
    assert believed == sorted(believed)


def test_a_scoring_that_costs_more_than_is_left_is_never_bought_however_good():
    config = GovernorConfig(prior_gain_ratio=16.0, prior_decay=100.0)
    assert simulate(GovernorPolicy(config), true_ratio=16.0, cost=0.8).scored == []


def test_scores_that_fade_faster_are_renewed_more_often():
    def refreshes(decay):
        config = GovernorConfig(prior_decay=decay)
        return len(simulate(GovernorPolicy(config), cost=0.02, decay=decay, true_ratio=2.0).scored)

    assert refreshes(0.1) > refreshes(10.0) == 1


def test_overfitting_ends_a_run_early():
    early = simulate(GovernorPolicy(), worse_after=0.3, true_ratio=1.0, cost=0.5)
    spent = [decision.inputs["observation"]["spent"] for decision in early.decisions]
    # Three intervals after the turn, one more for the check that straddles it.
    assert 0.45 * BUDGET <= spent[-1] <= 0.5 * BUDGET
    assert "got worse" in early.decisions[-1].reason
    assert early.decisions[-1].values["COOLDOWN"] > 0


def test_noise_alone_does_not_end_a_run():
    for seed in range(20):
        flat = simulate(GovernorPolicy(), gain=0.0, true_ratio=1.0, cost=0.9, seed=seed)
        assert flat.decisions[-1].inputs["observation"]["spent"] == pytest.approx(0.8 * BUDGET)


def test_the_first_check_never_scores_an_untrained_model():
    for first in ({"step": 0, "spent": 0.0, "spent_before": 0.0}, {"anchors_before": ()}):
        decision = GovernorPolicy().decide(observe(refresh_cost=0.001, **first))
        assert decision.action is Action.CONTINUE
        assert "REFRESH" in decision.blocked


def test_a_first_selection_waits_for_no_gain_where_a_control_arm_will_measure_it():
    first = observe(refresh_cost=0.001, anchors_before=(), control=True)
    assert GovernorPolicy().decide(first).action is Action.REFRESH
    assert GovernorPolicy().decide(dataclasses.replace(first, anchors_now=())).action is Action.CONTINUE
    broken = dataclasses.replace(first, anchors_now=(math.nan, 2.0, 2.0))
    assert "not finite" in GovernorPolicy().decide(broken).blocked["REFRESH"]


def test_the_warm_up_is_waited_for():
    governor = GovernorPolicy(GovernorConfig(warmup=0.2))
    assert "warm-up" in governor.decide(observe(spent=19.0)).blocked["REFRESH"]
    assert governor.decide(observe(spent=20.0)).action is Action.REFRESH


def test_a_scoring_that_cannot_be_afforded_is_refused_in_those_words():
    decision = GovernorPolicy().decide(observe(refresh_cost=70.0))
    assert decision.blocked == {"REFRESH": "it costs 70 F and 70 F is left before the cooldown"}


def test_an_affordable_refresh_is_taken_and_explained():
    decision = GovernorPolicy().decide(observe())
    assert decision.action is Action.REFRESH
    assert decision.reason == (
        "Refresh: scoring the pool costs 5 F and should return 36.4 F in the 70 F left before the cooldown "
        "(gain ratio 2.00, fading over 50 F); the anchors gained 0.175 ± 0.048 nats over the last 5 F."
    )


def test_the_deadband_refuses_what_barely_pays():
    # (rho - 1) tau (1 - e^(-(B - S) / tau)) between S and 1.1 S.
    barely = observe(refresh_cost=27.0)
    assert GovernorPolicy(GovernorConfig(deadband=0.0)).decide(barely).action is Action.REFRESH
    decision = GovernorPolicy().decide(barely)
    assert decision.action is Action.CONTINUE
    assert "not 10% more" in decision.reason


@pytest.mark.parametrize(
    "broken", [{"loss_finite": False}, {"anchors_now": (1.0, math.nan, 1.0, 1.0)}, {"anchors_before": (math.inf,) * 4}]
)
def test_when_a_loss_is_not_finite_the_schedule_is_kept(broken):
    decision = GovernorPolicy().decide(observe(**broken))
    assert decision.action is Action.CONTINUE
    assert "not finite" in decision.reason
    json.dumps(decision.to_dict(), allow_nan=False)


def test_the_reserve_is_kept_even_when_the_anchors_cannot_be_read():
    decision = GovernorPolicy().decide(observe(spent=78.0, anchors_now=(math.nan,) * 4))
    assert decision.action is Action.COOLDOWN


@given(st.floats(0, 100), st.floats(0, 100))
def test_the_cooldown_begins_before_its_reserve_is_touched(spent, reserve):
    observation = observe(spent=spent, spent_before=0.0, cooldown_cost=reserve)
    due = BUDGET - spent - reserve < 0.05 * BUDGET
    for policy in (GovernorPolicy(), UniformPolicy()):
        assert (policy.decide(observation).action is Action.COOLDOWN) == due


def test_a_loop_that_checks_at_the_plateaus_end_may_use_up_a_last_short_interval():
    short = observe(spent=76.0, spent_before=71.0)
    assert GovernorPolicy().decide(short).action is Action.COOLDOWN
    assert GovernorPolicy(GovernorConfig(last_interval=0.1)).decide(short).action is not Action.COOLDOWN


def test_once_annealing_always_annealing():
    governor = GovernorPolicy()
    assert governor.decide(observe(spent=79.0)).action is Action.COOLDOWN
    assert governor.decide(observe(spent=85.0, cooldown_cost=0.0)).action is Action.COOLDOWN


@settings(max_examples=20, deadline=None)
@given(**WORLDS)
def test_uniform_never_selects_and_anneals_when_the_governor_would(**world):
    outcome = simulate(UniformPolicy(), **world)
    assert {d.action for d in outcome.decisions[:-1]} == {Action.CONTINUE}
    assert outcome.decisions[-1].action is Action.COOLDOWN
    assert outcome.decisions[-1].inputs["observation"]["spent"] == pytest.approx(0.8 * BUDGET)


def test_the_cost_of_scoring_is_not_taken_for_slow_learning():
    governor = GovernorPolicy()
    governor.decide(observe(spent=5.0, spent_before=0.0, step=5))
    decision = governor.decide(observe(spent=30.0, spent_before=5.0, scored_at=25.0, refreshes_done=1))
    assert decision.estimates["gain_rate"] == pytest.approx(0.175 / 5)
    assert governor.state_dict()["scoring_spent"] == 20.0


def test_contradictions_are_refused():
    governor = GovernorPolicy()
    governor.decide(observe(refreshes_done=1, scored_at=6.0))
    with pytest.raises(ValueError, match="refreshes_done must not fall: 1 were seen, got 0"):
        governor.decide(observe())
    with pytest.raises(ValueError, match="scored_at must be given"):
        GovernorPolicy().decide(observe(refreshes_done=1))
    with pytest.raises(ValueError, match="state must have"):
        GovernorPolicy().load_state_dict({})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unit": "hours"}, "unit must be one of"),
        ({"spent": math.nan}, "spent must be finite"),
        ({"budget": 0.0}, "budget must be positive"),
        ({"refresh_cost": -1.0}, "refresh_cost must be finite and not negative"),
        ({"spent_before": 11.0}, "spent_before must not exceed spent"),
        ({"scored_at": 11.0}, "scored_at must not exceed spent"),
        ({"anchors_now": (1.0, 2.0)}, "must be the same samples, got 4 and 2"),
        ({"anchors_before": (), "anchors_now": (1.0,)}, "at least 2 samples"),
        ({"step": -1}, "step must be a whole number"),
    ],
)
def test_an_observation_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        observe(**changes)


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        ("check_every", 0.0),
        ("warmup", 1.0),
        ("last_interval", 0.0),
        ("prior_gain_ratio", 0.0),
        ("prior_gain_ratio", 17.0),
        ("prior_log_sd", -1.0),
        ("prior_decay", 0.0),
        ("trajectory_log_sd", 0.0),
        ("slowing", math.nan),
        ("slowing_sd", 0.0),
        ("response_checks", 0),
        ("min_dwell", 1.5),
        ("overfit_checks", True),
        ("deadband", -0.1),
        ("confidence", 1.0),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(option, wrong):
    with pytest.raises(ValueError, match=f"{option} must be"):
        GovernorConfig(**{option: wrong})


@pytest.mark.parametrize("unit", [1.0, 1e11])
def test_anchors_that_stand_still_for_most_of_a_run_leave_a_promise_with_a_spread(unit):
    policy, before, at = GovernorPolicy(), (), 0.0
    for check in range(1, 17):
        fallen = min(check, 2)
        now = tuple(2.0 / fallen + 0.1 * i for i in range(8))
        seen = Observation(
            step=check,
            spent=5.0 * check * unit,
            budget=100.0 * unit,
            unit="flops",
            anchors_before=before,
            anchors_now=now,
            spent_before=at,
            refresh_cost=90.0 * unit,
            cooldown_cost=20.0 * unit,
        )
        decision = policy.decide(seen)
        before, at = now, seen.spent
    assert decision.estimates["gain_rate"] == 0.0
    assert decision.estimates.get("forecast") is None or decision.estimates["forecast"]["scale"] > 0
