from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest

import pyeff
from pyeff.governor import (
    Action,
    Advantage,
    Arm,
    BatchSize,
    Budget,
    DriftReading,
    Governor,
    GovernorConfig,
    MemoryMode,
    Selector,
    UniformPolicy,
    parse_price,
    read_decisions,
    replay,
)


class Loop:
    """A model whose loss falls with the logarithm of its steps, trained under a governor."""

    def __init__(self, budget="1000 tokens", **options):
        self.source = random.Random(0)
        self.difficulty = [self.source.gauss(2, 0.5) for _ in range(16)]
        self.useful, self.decisions, self.factors = 0.0, [], []
        self.pace = 1.0
        self.governor = Governor(budget, anchors=self.anchors, **options)

    def anchors(self):
        fallen = 0.4 * math.log1p(self.useful / 5)
        return [loss - fallen + self.source.gauss(0, 0.01) for loss in self.difficulty]

    def train(self, *, until=math.inf, **step):
        governor = self.governor
        while not governor.done and governor.steps < until:
            self.factors.append(governor.lr_factor)
            self.useful += self.pace
            decision = governor.step(**{"tokens": 10, "loss": 1.0} | step)
            if decision is not None:
                self.decisions.append(decision)
                if decision.action is Action.REFRESH:
                    self.pace *= 2
                    governor.scored(decision.argument, tokens=500, flops=1000.0)
        return self


def test_a_budget_is_spent_to_its_end_and_no_further_and_the_rate_anneals_to_nearly_zero():
    loop = Loop().train()
    assert loop.governor.spent == 1000
    assert loop.factors[0] == 1.0
    assert loop.factors[-1] < 0.05
    assert loop.factors == sorted(loop.factors, reverse=True)
    assert [decision.action for decision in loop.decisions].count(Action.COOLDOWN) == 1
    annealed = sum(factor < 1 for factor in loop.factors) / len(loop.factors)
    assert 0.2 <= annealed <= 0.2 + 0.05 + 0.02  # the share, and at most one check and one step more


def test_without_a_selector_none_is_asked_for_and_with_one_it_is_bought_when_it_pays():
    assert all(decision.action is not Action.REFRESH for decision in Loop().train().decisions)
    loop = Loop("1e5F", flops_per_token=10.0, selectors=[Selector("cheap", 1000.0)]).train()
    refreshed = [decision for decision in loop.decisions if decision.action is Action.REFRESH]
    assert refreshed
    assert refreshed[0].argument == "cheap"
    assert loop.governor.ledger.entry("score").flops == 1000 * len(refreshed)
    assert loop.governor.ledger.overhead() <= 0.05
    assert loop.governor.spent <= 1e5


def test_a_price_ends_a_run_that_no_longer_returns_it():
    free = Loop().train()
    priced = Loop(price=0.002).train()
    assert priced.governor.spent < 0.8 * free.governor.spent
    assert priced.factors[-1] < 0.1
    assert "less than its price" in priced.decisions[-1].reason
    generous = Loop(price="0.0001 for 10%").train()
    assert generous.governor.spent == free.governor.spent


@pytest.mark.parametrize("cut", [1, 37, 83, 95])
def test_a_resumed_loop_decides_as_one_that_went_on(tmp_path, cut):
    Loop(log=tmp_path / "whole.jsonl").train()
    first = Loop(log=tmp_path / "cut.jsonl").train(until=cut)
    state = json.loads(json.dumps(first.governor.state_dict(), allow_nan=False))
    model = (first.source.getstate(), first.useful)
    first.train(until=cut + 9)  # lost
    second = Loop(log=tmp_path / "cut.jsonl")
    second.source.setstate(model[0])
    second.useful = model[1]
    second.governor.load_state_dict(state)
    second.train()
    without_time = [[d.action, d.reason, d.values] for d in read_decisions(tmp_path / "cut.jsonl")]
    assert without_time == [[d.action, d.reason, d.values] for d in read_decisions(tmp_path / "whole.jsonl")]
    assert second.governor.ledger.spent("tokens") == 1000


def test_the_log_replays(tmp_path):
    Loop(log=tmp_path / "log.jsonl").train()
    assert all(logged == again for logged, again in replay(tmp_path / "log.jsonl"))


def test_offers_are_weighed_at_the_next_check():
    loop = Loop(config=GovernorConfig(window=1, min_dwell=1, warmup=0.0))
    loop.train(until=5)
    loop.governor.offer(arms=[Arm("code", 2.0, 0.1)])
    loop.train(until=12)
    assert (loop.decisions[-1].action, loop.decisions[-1].argument) == (Action.SWITCH, "code")


def test_a_clock_that_runs_backwards_decides_nothing_and_ends_nothing():
    ticks = iter([0.0, *(float(t) for t in range(1, 30)), 5.0, *(float(t) for t in range(6, 500))])
    loop = Loop("150s", clock=lambda: next(ticks)).train()
    reasons = [decision.reason for decision in loop.decisions]
    assert any("the clock ran backwards, so nothing is decided on it" in reason for reason in reasons)
    assert loop.governor.spent <= 150


def test_a_loss_that_is_not_finite_keeps_the_schedule():
    loop = Loop(selectors=[Selector("cheap", 1.0)]).train(loss=math.nan)
    assert {decision.action for decision in loop.decisions} == {Action.CONTINUE, Action.COOLDOWN}
    assert "a training loss is not finite" in loop.decisions[0].reason


def test_anchors_that_change_in_number_keep_the_schedule():
    sizes = iter([4, 4, 3, 4, *([4] * 40)])
    governor = Governor("1000 tokens", anchors=lambda: [1.0 + 0.1 * i for i in range(next(sizes))])
    decisions = []
    while not governor.done:
        decisions.append(governor.step(tokens=10))
    reasons = [decision.reason for decision in decisions if decision]
    assert "the anchors were 4 samples and are 3" in reasons[2]
    assert governor.spent == 1000


def test_a_second_budget_counts_evaluation_and_is_not_overrun_by_more_than_a_step():
    now = [0.0]

    def anchors():
        now[0] += 0.5
        return [2.0 - 0.01 * now[0], 3.0 - 0.01 * now[0]]

    governor = Governor("100s", anchors=anchors, clock=lambda: now[0])
    while not governor.done:
        now[0] += 1.0
        governor.step()
    assert governor.ledger.entry("eval").seconds > 0
    assert 98 <= governor.spent <= 100


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cooldown": 1.0}, ValueError, "cooldown must be at least 0 and below 1"),
        ({"budget": "10 F", "anchor_flops": 9.0}, ValueError, "is smaller than the 11 kept for its end"),
        ({"anchor_ids": [1, 2], "holdout_ids": [2, 3]}, ValueError, "must not overlap, 1 are in both, such as 2"),
        ({"price": -1.0}, ValueError, "price must be finite and not negative"),
        ({"price": "cheap"}, ValueError, "cannot read the price 'cheap'"),
        ({"price": "1 per PF"}, ValueError, "is per flops, but the budget"),
        ({"anchors": [1.0]}, TypeError, "anchors must be a function"),
        ({"budget": "soon"}, ValueError, "cannot read the budget"),
        ({"budget": 1000}, TypeError, "budget must be text such as '4e13F', got int"),
        ({"selectors": [Selector("a", 1.0), Selector("a", 2.0)]}, ValueError, "selectors must have different names"),
        ({"selectors": ["a"]}, TypeError, "selectors must be of Selector, got str"),
        ({"clusters": ["first", "second"]}, ValueError, "clusters must be whole numbers"),
        ({"clusters": [0.5, 1]}, ValueError, "clusters must be whole numbers"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(options, error, message):
    with pytest.raises(error, match=message):
        Governor(**{"budget": "1000 tokens", "anchors": lambda: [1.0, 2.0], **options})


def test_a_flop_budget_needs_flops():
    governor = Governor("1e6F", anchors=lambda: [1.0, 2.0])
    with pytest.raises(ValueError, match="flops must be given for a budget in FLOPs"):
        governor.step(tokens=1)
    assert governor.step(tokens=1, flops=10) is None


def test_a_state_of_another_budget_or_version_is_refused():
    state = Governor("1000 tokens", anchors=lambda: [1.0, 2.0]).state_dict()
    with pytest.raises(ValueError, match="belongs to a budget of 1k tokens"):
        Governor("2000 tokens", anchors=lambda: [1.0, 2.0]).load_state_dict(state)
    with pytest.raises(ValueError, match="state must be of version 3"):
        Governor("1000 tokens", anchors=lambda: [1.0, 2.0]).load_state_dict({**state, "version": 0})


def test_prices_are_read_as_people_write_them():
    budget = Budget.parse("2 PF")
    assert parse_price("0.5 per PF", budget) == 0.5 / 1e15
    assert parse_price("3 nats per 30 TF", budget) == 3 / 30e12
    assert parse_price("0.01 for 10%", budget) == 0.01 / (0.1 * 2e15)
    assert parse_price("1 loss per h", Budget.parse("5h")) == 1 / 3600
    for text in ("-1 per PF", "0.01 for nothing", "0.01 for 0%", "1 per apple"):
        with pytest.raises(ValueError, match="cannot read"):
            parse_price(text, budget)


def test_the_short_name_is_the_governor():
    assert pyeff.Governor is Governor


def test_a_selection_that_was_left_is_no_longer_in_use():
    """After SWITCH the next check must not see the old selection, or it would be left again and again."""
    slow = Advantage(10.0, 0.3, 0.05)
    loop = Loop(selectors=[Selector("cheap", 1.0)], control=True)
    governor, seen = loop.governor, []
    governor.offer(arms=[Arm("pool", 1.0, 1.0)])
    for _ in range(400):
        if governor.done:
            break
        decision = governor.step(tokens=2, loss=1.0)
        if decision is not None:
            seen.append((decision.key, decision.inputs["observation"].get("selector")))
            if decision.action is Action.REFRESH:
                governor.scored(decision.argument)
                governor.offer(advantage=slow)
    left = [key for key, _ in seen].index("SWITCH(pool)")
    assert seen[left][1] == "cheap"
    assert seen[left + 1][1] is None
    assert seen[left + 1][0] != "SWITCH(pool)"


def test_scoring_does_not_shorten_the_interval_after_it():
    loop = Loop("1e5F", flops_per_token=10.0, selectors=[Selector("dear", 8000.0)], config=GovernorConfig())
    governor, spends = loop.governor, []
    while not governor.done:
        decision = governor.step(tokens=10)
        if decision is not None:
            spends.append((decision.action, decision.inputs["observation"]["spent"]))
            if decision.action is Action.REFRESH:
                governor.scored("dear", flops=8000.0)
    refresh = [action for action, _ in spends].index(Action.REFRESH)
    interval = 0.05 * 1e5
    assert spends[refresh + 1][1] - spends[refresh][1] >= 8000.0 + interval


@pytest.mark.parametrize("anchor_flops", [100.0, 600.0])
def test_the_loop_keeps_the_overhead_under_its_cap_however_dear_its_evaluations_are(anchor_flops):
    loop = Loop("1e5F", flops_per_token=10.0, anchor_flops=anchor_flops, selectors=[Selector("cheap", 900.0)])
    decisions = loop.train().decisions
    assert loop.governor.ledger.overhead_spent("flops") <= 0.05 * 1e5
    told = any("no room to evaluate the anchors" in decision.reason for decision in decisions)
    assert told == (16 * anchor_flops > 0.05 * 1e5)
    assert decisions[-1].action is Action.COOLDOWN
    assert loop.governor.spent > 0.98 * 1e5


def test_measurements_offered_before_a_checkpoint_serve_the_check_after_it():
    def governor():
        return Loop(selectors=[Selector("cheap", 1.0)]).governor

    first = governor()
    reading = Advantage(3.0, 1.7, 0.2)
    first.offer(advantage=reading, drift=[DriftReading("D3", math.nan, math.nan, 0.5, False, False)])
    second = governor()
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    while (decision := second.step(tokens=10)) is None:
        pass
    assert decision.inputs["observation"]["advantage"] == vars(reading)
    assert decision.inputs["observation"]["drift"][0]["detector"] == "D3"


@pytest.mark.parametrize("budget", ["1000 tokens", "1e6F"])
def test_steps_that_cost_nothing_of_the_budget_are_refused(budget):
    governor = Governor(budget, anchors=lambda: [1.0, 2.0], flops_per_token=10.0)
    with pytest.raises(ValueError, match="of a step must be more than 0, or the budget never ends"):
        governor.step()


def test_a_clock_that_runs_backwards_while_the_anchors_change_ends_nothing():
    ticks = iter([0.0, *(float(t) for t in range(1, 12)), 5.0, *(float(t) for t in range(6, 500))])
    sizes = iter([4, *([3] * 40)])
    governor = Governor("150s", anchors=lambda: [1.0 + i for i in range(next(sizes))], clock=lambda: next(ticks))
    decisions = []
    while not governor.done:
        decisions.append(governor.step())
    assert any(decision and "so nothing is decided on it" in decision.reason for decision in decisions)


@pytest.mark.parametrize(
    ("anchors", "reason"),
    [
        (None, "the anchors must be losses, one a sample, and are NoneType"),
        (2.5, "one a sample, and are float"),
        ({"a": 1.0, "b": 2.0}, "one number a sample"),
        ([[1.0, 2.0], [3.0]], "one number a sample"),
        ([10**400, 1.0], "one number a sample"),
        ([1.0], "a gain takes at least 2 anchors, and there are 1"),
        ([1.0, 2.0, 3.0], "clusters name the documents of 2 anchors, and there are 3"),
    ],
)
def test_anchors_that_cannot_be_used_keep_the_schedule_and_say_why(tmp_path, anchors, reason):
    governor = Governor("1000 tokens", anchors=lambda: anchors, clusters=[0, 1], log=tmp_path / "log.jsonl")
    while not governor.done:
        governor.step(tokens=10)
    decisions = read_decisions(tmp_path / "log.jsonl")
    assert {decision.action for decision in decisions} == {Action.CONTINUE, Action.COOLDOWN}
    assert all(reason in decision.reason for decision in decisions[:-1])
    assert governor.spent == 1000


def test_what_the_anchors_raise_is_passed_on_also_from_a_generator():
    def anchors():
        yield 1.0
        raise ValueError("mine")

    governor = Governor("1000 tokens", anchors=anchors)
    with pytest.raises(ValueError, match="mine"):
        governor.step(tokens=100)


def test_numbers_of_numpy_can_be_offered_and_logged(tmp_path):
    single = np.float32
    loop = Loop(
        selectors=[Selector("cheap", single(1), single(2)), Selector("dear", np.int64(900))], log=tmp_path / "d"
    )
    loop.governor.offer(
        arms=[Arm("code", single(2), single(0.1), single(1), single(3), single(0.5))],
        batch=BatchSize(single(8), single(9), single(8), single(10), single(1.5), np.int64(1)),
        memory_modes=[MemoryMode("plain", single(0.9), np.bool_(True), single(1))],
        advantage=Advantage(single(1), single(2), single(0.5)),
    )
    loop.train()
    assert loop.decisions
    assert all(logged == again for logged, again in replay(tmp_path / "d"))


def test_two_offers_of_one_name_are_refused_where_they_are_made():
    governor = Governor("1000 tokens", anchors=lambda: [1.0, 2.0])
    with pytest.raises(ValueError, match="arms must have different names, got code, code"):
        governor.offer(arms=[Arm("code", 2.0, 0.1), Arm("code", 3.0, 0.1)])
    with pytest.raises(TypeError, match="advantage must be of Advantage, got float"):
        governor.offer(advantage=2.0)


def test_of_two_readings_by_one_detector_between_checks_the_later_counts():
    loop = Loop()
    for value in (0.9, 0.2):
        loop.governor.offer(drift=[DriftReading("D1", value, 0.1, 0.5, False)])
    loop.train()
    assert [reading["value"] for reading in loop.decisions[0].inputs["observation"]["drift"]] == [0.2]


@pytest.mark.parametrize("length", [200.0, 500.0])
def test_a_process_that_was_paused_goes_on_to_the_end_of_its_budget(length):
    now = [0.0]
    governor = Governor("1000s", anchors=lambda: [2.0 - 1e-3 * now[0], 3.0], clock=lambda: now[0])
    while not governor.done:
        now[0] += length if governor.steps == 100 else 1.0
        governor.step()
    assert governor.cooling
    assert 998 <= governor.spent <= 1000


def test_a_state_with_a_key_more_or_less_or_a_value_of_another_kind_is_refused_and_changes_nothing():
    state = Loop(selectors=[Selector("cheap", 1.0)]).train(until=60).governor.state_dict()
    damaged = [{**state, "extra": 1}, None, []]
    damaged += [{key: value for key, value in state.items() if key != missing} for missing in state]
    damaged += [{**state, key: ["x"]} for key in state if key not in ("selector", "finite", "problem", "decisions")]
    damaged += [{**state, key: math.nan} for key in ("steps", "next_check", "cooldown_start", "last_price")]
    damaged += [{**state, "policy": {**state["policy"], "checks": None, "belief": []}}]
    fresh = Loop(selectors=[Selector("cheap", 1.0)]).governor
    before = fresh.state_dict()
    for broken in damaged:
        with pytest.raises(ValueError, match=r"^state "):
            fresh.load_state_dict(broken)
        assert fresh.state_dict() == before
    fresh.load_state_dict(state)
    assert fresh.state_dict() == state


def test_a_log_in_a_directory_that_is_not_there_yet_is_written_from_the_first_check(tmp_path):
    loop = Loop(log=tmp_path / "runs" / "first" / "decisions.jsonl").train()
    assert len(read_decisions(tmp_path / "runs" / "first" / "decisions.jsonl")) == len(loop.decisions)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        Loop(log=tmp_path / "file" / "decisions.jsonl")


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_clock_that_gives_no_time_decides_nothing_and_ends_nothing(wrong):
    ticks = iter([*(float(t) for t in range(30)), wrong, *(float(t) for t in range(31, 500))])
    loop = Loop("150s", clock=lambda: next(ticks)).train()
    assert loop.governor.done
    assert any("the clock" in decision.reason for decision in loop.decisions)


def test_names_that_a_log_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="name must be a text that UTF-8 can hold"):
        Selector("\ud800", 1.0)
    with pytest.raises(ValueError, match="gain_ratio must be at most 1e\\+09"):
        Selector("boasting", 1.0, 1e308)


def test_settings_of_numpy_can_be_logged(tmp_path):
    config = GovernorConfig(
        check_every=np.float32(0.1), overhead_cap=np.float32(0.5), deadband=np.int64(0), window=np.int64(2)
    )
    loop = Loop(config=config, log=tmp_path / "log.jsonl").train()
    assert read_decisions(tmp_path / "log.jsonl") == loop.decisions


def test_a_governor_refuses_the_state_of_the_uniform_policy():
    governor = Loop().governor
    uniform = UniformPolicy(governor.config).state_dict()
    with pytest.raises(ValueError, match="state must hold a belief"):
        governor.policy.load_state_dict(uniform)
    with pytest.raises(ValueError, match=r"^state must be what state_dict returned: state must hold a belief"):
        governor.load_state_dict({**governor.state_dict(), "policy": uniform})
