from __future__ import annotations

import json
import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyeff.train.state import FirstRefresh, State, Trend, trend


def test_a_state_survives_json():
    state = State(
        steps=7,
        phase="cooldown",
        anchors=[0.1 + 0.2, 1.0],
        exact_before={"correct": 1, "total": 2, "by_source": {"a": [1, 2]}},
        first_refresh=FirstRefresh(trained=3.0, loss=2.0, trend=[0.5, 0.1], cost=1.0, anchors=[1.0, 3.0]),
        history=[(0.0, 2.0), (1.0, 1.5)],
        decisions={"CONTINUE": 2},
    )
    assert State.from_dict(json.loads(json.dumps(state.to_dict()))) == state
    assert State.from_dict(json.loads(json.dumps(State().to_dict()))) == State()


def test_the_trend_of_a_settling_loss_is_its_own_exponential():
    """For loss = exp(-k x) the rate and its decay are known: k exp(-k x) and k."""
    k, step = 0.7, 0.01
    found = trend([(x, math.exp(-k * x)) for x in (1.0, 1.0 + step, 1.0 + 2 * step)])
    assert found is not None
    end = 1.0 + 2 * step
    # Differences over a step miss derivatives by a share of (k * step)^2.
    assert found.rate == pytest.approx(k * math.exp(-k * end), rel=(k * step) ** 2)
    assert found.decay == pytest.approx(k, rel=(k * step) ** 2 + 1e-9)
    low, high = found.expected(end, 5.0)
    assert low == pytest.approx(math.exp(-k * end) - math.exp(-k * (end + 5.0)), rel=4 * (k * step) ** 2)
    assert high > low


@given(st.floats(0, 10), st.floats(0, 10), st.floats(0.01, 10), st.floats(0, 10))
def test_more_training_never_promises_less(rate: float, decay: float, done: float, more: float):
    low, high = Trend(rate, decay).expected(done, more)
    later_low, later_high = Trend(rate, decay).expected(done, more + 1.0)
    # Numbers near the end of a float's range are rounded to its last place there, whatever their size.
    assert 0 <= low <= high <= rate * more * (1 + 1e-12) + sys.float_info.min
    assert later_low >= low
    assert later_high >= high


@pytest.mark.parametrize(
    "history",
    [
        [],
        [(0.0, 9.0), (1.0, 3.0)],
        [(0.0, 9.0), (1.0, 3.0), (2.0, 3.5)],
        [(0.0, 9.0), (1.0, 9.5), (2.0, 3.5)],
        [(1.0, 3.0), (1.0, 2.0), (1.0, 1.0)],
    ],
)
def test_without_two_gains_there_is_no_trend(history: list):
    assert trend(history) is None


def test_a_rate_that_does_not_slow_down_is_not_expected_to():
    assert trend([(0.0, 9.0), (1.0, 8.0), (2.0, 6.0)]) == Trend(rate=2.0, decay=0.0)
