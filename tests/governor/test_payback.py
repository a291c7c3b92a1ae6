from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from pyeff.governor import pay_back, refresh_period, square_root_period, worth_of_training

RATIO = st.floats(1 / 16, 16)
DECAY = st.floats(0.05, 20)
AMOUNT = st.floats(0, 5)
STALE = st.none() | st.floats(0, 5)


def advantage(x, ratio, decay, stale_for):
    return 0.0 if stale_for is None else (ratio - 1) * math.exp(-(x + stale_for) / decay)


@given(RATIO, DECAY, AMOUNT, AMOUNT, STALE)
def test_closed_forms_are_the_integrals_they_stand_for(ratio, decay, cost, remaining, stale_for):
    weighed = pay_back(gain_ratio=ratio, decay=decay, refresh_cost=cost, remaining=remaining, stale_for=stale_for)
    benefit, error = quad(
        lambda x: advantage(x, ratio, decay, 0.0) - advantage(x, ratio, decay, stale_for),
        0,
        max(remaining - cost, 0.0),
    )
    assert abs(weighed.benefit - benefit) <= error + 1e-12 * ratio * decay
    assert math.isclose(weighed.cost, cost * (1 + advantage(0.0, ratio, decay, stale_for)), rel_tol=1e-12)
    rest, error = quad(lambda x: 1 + advantage(x, ratio, decay, stale_for), 0, remaining)
    worth = worth_of_training(gain_ratio=ratio, decay=decay, remaining=remaining, stale_for=stale_for)
    assert abs(worth - rest) <= error + 1e-12 * ratio * (decay + remaining)


@given(RATIO, DECAY, AMOUNT, st.floats(0, 1), STALE)
def test_never_pays_when_it_costs_all_that_is_left(ratio, decay, cost, share, stale_for):
    assert not pay_back(
        gain_ratio=ratio, decay=decay, refresh_cost=cost, remaining=share * cost, stale_for=stale_for
    ).pays()


@given(st.floats(1 / 16, 1), DECAY, AMOUNT, AMOUNT, STALE)
def test_never_pays_when_selection_does_not_help(ratio, decay, cost, remaining, stale_for):
    assert not pay_back(
        gain_ratio=ratio, decay=decay, refresh_cost=cost, remaining=remaining, stale_for=stale_for
    ).pays()


@given(RATIO, DECAY, AMOUNT, AMOUNT, STALE, st.floats(0, 1))
def test_what_pays_still_pays_when_it_is_cheaper(ratio, decay, cost, remaining, stale_for, share):
    def pays(price):
        return pay_back(
            gain_ratio=ratio, decay=decay, refresh_cost=price, remaining=remaining, stale_for=stale_for
        ).pays()

    if pays(cost) and share > 0:
        assert pays(share * cost)


@given(RATIO, DECAY, AMOUNT, AMOUNT, STALE)
def test_the_rule_only_ever_errs_towards_not_refreshing(ratio, decay, cost, remaining, stale_for):
    # Against the exact comparison, which forgoes the last S of the plateau and not the next.
    if pay_back(gain_ratio=ratio, decay=decay, refresh_cost=cost, remaining=remaining, stale_for=stale_for).pays(
        deadband=1e-9
    ):
        common = {"gain_ratio": ratio, "decay": decay}
        refreshed = worth_of_training(remaining=remaining - cost, stale_for=0.0, **common)
        as_it_is = worth_of_training(remaining=remaining, stale_for=stale_for, **common)
        rounding = 8 * 2**-52 * (remaining + ratio * decay)
        assert refreshed >= as_it_is - rounding


def test_without_decay_the_threshold_is_one_over_what_is_left():
    # rho (B - S) > B, so a third of the rest needs 1.5 and half of it 2. A decay of 1e6 B is no decay.
    for share in (0.1, 1 / 3, 0.5):
        threshold = 1 / (1 - share)
        weigh = {"decay": 1e6, "refresh_cost": share, "remaining": 1.0, "stale_for": None}
        assert pay_back(gain_ratio=threshold * 1.0001, **weigh).pays()
        assert not pay_back(gain_ratio=threshold * 0.9999, **weigh).pays()


def test_the_defaults_buy_a_first_scoring_of_up_to_27_per_cent():
    def pays(cost, spent=0.0):
        return pay_back(gain_ratio=2.0, decay=0.5, refresh_cost=cost, remaining=0.8 - spent, stale_for=None).pays(0.1)

    assert pays(0.27, spent=0.05)
    assert not pays(0.28, spent=0.05)


def test_wrong_amounts_are_named():
    amounts = {"gain_ratio": 2.0, "decay": 1.0, "refresh_cost": 1.0, "remaining": 1.0, "stale_for": None}
    for name, wrong in (("gain_ratio", 0.0), ("decay", math.inf), ("refresh_cost", -1.0), ("remaining", math.nan)):
        with pytest.raises(ValueError, match=name):
            pay_back(**{**amounts, name: wrong})


@pytest.mark.parametrize(
    ("decay", "cost", "ratio", "exact", "square_root"),
    [(100, 1, 2.0, 20.4, 20.0), (100, 2, 1.5, 37.0, 34.6), (100, 10, 1.3, 126.7, 93.1)],
)
def test_the_best_period_between_refreshes_and_its_square_root_limit(decay, cost, ratio, exact, square_root):
    arguments = {"gain_ratio": ratio, "decay": decay, "refresh_cost": cost}
    period = refresh_period(**arguments)
    assert abs(period - exact) <= 0.05
    assert abs(square_root_period(**arguments) - square_root) <= 0.05

    def rate(length):
        return (length + (ratio - 1) * decay * -math.expm1(-length / decay)) / (length + cost)

    assert rate(period) >= max(rate(0.99 * period), rate(1.01 * period))


@given(st.floats(1.05, 8), st.floats(1, 100), st.floats(1e-6, 1e-4))
def test_a_four_times_cheaper_selector_is_refreshed_twice_as_often(ratio, decay, share):
    def period(cost):
        return refresh_period(gain_ratio=ratio, decay=decay, refresh_cost=cost)

    cost = share * decay * (ratio - 1)
    # The next term of the expansion is of the order of the period over tau.
    assert period(4 * cost) / period(cost) == pytest.approx(2, rel=period(4 * cost) / decay)


@given(st.floats(1 / 16, 16), st.floats(0.1, 10), st.floats(0, 200))
def test_a_selection_that_never_returns_its_price_is_never_refreshed(ratio, decay, cost):
    period = refresh_period(gain_ratio=ratio, decay=decay, refresh_cost=cost)
    assert math.isinf(period) == ((ratio - 1) * decay <= cost)
    if ratio <= 1:
        assert math.isinf(square_root_period(gain_ratio=ratio, decay=decay, refresh_cost=cost))
