"""What a loop is charged, where a selector takes more than it declared."""

from __future__ import annotations

import json
import math

import pytest

from pyeff.governor import Action, Governor, GovernorConfig, Selector


def run(*, takes: float, resume: bool = False) -> tuple[Governor, list[dict[str, float]]]:
    """Spend 1e5 FLOPs on a loss that falls ever slower, with a selector that declares 300; and what was offered."""

    def made() -> Governor:
        return Governor(
            "1e5F",
            anchors=lambda: [1 + (1 + governor.steps / 50) ** -0.5 + 0.1 * math.sin(i) for i in range(8)],
            flops_per_token=10.0,
            selectors=[Selector("a", 300.0), Selector("b", 3e5)],
            config=GovernorConfig(overhead_cap=0.05, last_interval=0.1),
        )

    governor, offered = made(), []
    while not governor.done:
        decision = governor.step(tokens=10)
        if decision is None:
            continue
        offered.append({each["name"]: each["cost"] for each in decision.inputs["observation"]["selectors"]})
        if decision.action is Action.REFRESH:
            governor.scored(decision.argument, flops=takes)
        if resume:
            state = json.loads(json.dumps(governor.state_dict()))
            governor = made()
            governor.load_state_dict(state)
    return governor, offered


def test_a_selector_is_offered_at_what_it_took_where_that_was_more_than_it_declared():
    governor, offered = run(takes=3000.0)
    costs = [each["a"] for each in offered]
    first = costs.index(3000.0)
    assert set(costs[:first]) == {300.0}
    assert set(costs[first:]) == {3000.0}
    assert {each["b"] for each in offered} == {3e5}
    # One surprise fits under the cap; believing the declaration again would have cost it.
    assert governor.ledger.entry("score").flops == 3000.0


def test_a_selector_that_takes_less_stays_at_what_it_declared():
    _, offered = run(takes=100.0)
    assert {each["a"] for each in offered} == {300.0}


def test_what_selectors_took_outlives_a_restart():
    assert run(takes=3000.0, resume=True)[1] == run(takes=3000.0)[1]


@pytest.mark.parametrize(
    "change",
    [{"steps": -3}, {"refreshes": -1}, {"finite": "x"}, {"problem": 5}, {"selector": 7}, {"took": {"a": -1.0}}],
)
def test_a_state_that_no_loop_can_have_is_refused(change: dict[str, object]):
    governor = Governor("1e5F", anchors=lambda: [1.0, 2.0], flops_per_token=10.0)
    with pytest.raises(ValueError, match="state must be what state_dict returned"):
        governor.load_state_dict({**governor.state_dict(), **change})
