from __future__ import annotations

import json

import pytest

from pyeff.train.state import FirstRefresh, State, recent_rate


def test_a_state_survives_json():
    state = State(
        steps=7,
        phase="cooldown",
        anchors=[0.1 + 0.2, 1.0],
        exact_before={"correct": 1, "total": 2, "by_source": {"a": [1, 2]}},
        first_refresh=FirstRefresh(trained=3.0, loss=2.0, rate=None, cost=1.0, anchors=[1.0, 3.0]),
        history=[(0.0, 2.0), (1.0, 1.5)],
        decisions={"CONTINUE": 2},
    )
    assert State.from_dict(json.loads(json.dumps(state.to_dict()))) == state
    assert State.from_dict(json.loads(json.dumps(State().to_dict()))) == State()


@pytest.mark.parametrize(
    ("history", "rate"),
    [
        ([], None),
        ([(0.0, 9.0), (1.0, 3.0)], None),
        ([(0.0, 9.0), (1.0, 3.0), (3.0, 2.0)], 7.0 / 3.0),
        ([(0.0, 9.0), (1.0, 3.0), (2.0, 2.5), (3.0, 2.0)], 0.5),
        ([(1.0, 3.0), (1.0, 3.0), (1.0, 3.0)], None),
    ],
)
def test_the_rate_of_gain_is_that_of_the_last_two_intervals(history: list, rate: float | None):
    assert recent_rate(history) == rate
