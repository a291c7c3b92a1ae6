from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyeff.governor import Belief, Interval

SETTINGS = {"response_checks": 2, "slowing": 0.5, "slowing_sd": 0.5, "trajectory_log_sd": 0.5}
PRIOR = Belief(math.log(2.0), math.log(2.0) ** 2)


def watched(rates_before, rates_after, *, error=0.0, fresh_before=0.0, fresh_after=1.0, belief=PRIOR, **settings):
    """Unit intervals with these rates of gain, and a refresh between the two groups."""
    rates = [(rate, fresh_before) for rate in rates_before] + [(rate, fresh_after) for rate in rates_after]
    for index, (rate, freshness) in enumerate(rates):
        if index == len(rates_before):
            belief = belief.refreshed()
        interval = Interval(index, index + 1, rate, error, freshness)
        belief = belief.measured(interval, **{**SETTINGS, **settings})
    return belief


def test_nothing_is_learned_before_the_response_is_complete():
    one = watched([1.0, 1.0], [3.0])
    assert (one.log_mean, one.log_variance) == (PRIOR.log_mean, PRIOR.log_variance)
    two = watched([1.0, 1.0], [3.0, 3.0])
    assert two.log_variance < PRIOR.log_variance


def test_one_scored_refresh_is_the_conjugate_update():
    # A known slowing leaves two terms of noise beside the forecast's own: one interval before, one window after.
    settings = {"slowing": 0.0, "slowing_sd": 1e-9, "trajectory_log_sd": 0.3, "response_checks": 1}
    after = watched([1.0], [4.0], **settings)
    prior, noise = PRIOR.log_variance, 2 * 0.3**2
    expected = PRIOR.log_mean + prior / (prior + noise) * (math.log(4.0) - PRIOR.log_mean)
    assert after.log_mean == pytest.approx(expected)
    assert after.log_variance == pytest.approx(1 / (1 / prior + 1 / noise))


@given(st.floats(0, 2), st.floats(0.2, 5))
def test_a_known_slowing_is_taken_out_exactly(slowing, ratio):
    def learned(exponent):
        rates = [(i + 0.5) ** -exponent for i in range(3)]
        response = ratio * 4.0**-exponent  # the window of two intervals has its middle at 4
        return watched(rates, [response] * 2, slowing=exponent, slowing_sd=1e-6)

    steady, slowed = learned(0.0), learned(slowing)
    # Four standard deviations of an exponent known to 1e-6, which a log training of at most log 8 multiplies.
    assert slowed.log_mean == pytest.approx(steady.log_mean, rel=0, abs=4 * 1e-6 * math.log(8))
    assert slowed.log_variance == pytest.approx(steady.log_variance)


def test_the_run_shows_its_own_slowing():
    # The prior says none; six checks say rates fall as training^-1, and that explains the response.
    rates = [1 / (i + 0.5) for i in range(8)]
    watching = watched(rates[:6], rates[6:], slowing=0.0, slowing_sd=0.5)
    trusting_the_prior = watched(rates[:6], rates[6:], slowing=0.0, slowing_sd=1e-6)
    assert trusting_the_prior.ratio < watching.ratio


def test_a_forecast_over_a_longer_way_claims_less():
    def after(checks_before):
        belief = PRIOR.measured(Interval(0.0, 1.0, 1.0, 0.0, 0.0), **SETTINGS).refreshed()
        for start in (checks_before, checks_before + 1):
            belief = belief.measured(Interval(start, start + 1.0, 5.0, 0.0, 1.0), **SETTINGS)
        return belief

    assert after(1).log_variance < after(10).log_variance < PRIOR.log_variance


def test_natural_slowing_is_not_blamed_on_the_selection():
    # Rates fall as training^-1 all through: the selection did nothing, and must look the same as no slowing at all.
    slowing = [1 / (i + 0.5) for i in range(8)]
    judged = watched(slowing[:6], slowing[6:])
    unaware = watched(slowing[:6], slowing[6:], slowing=0.0, slowing_sd=1e-9)
    assert unaware.ratio < judged.ratio
    true_ratio_deviations = abs(judged.log_mean) / math.sqrt(judged.log_variance)
    assert true_ratio_deviations < 2


@given(st.floats(0.01, 10), st.floats(0.01, 10), st.floats(0.01, 10))
def test_a_better_response_never_lowers_the_belief(before, after, more):
    assert watched([before] * 3, [after] * 2).log_mean <= watched([before] * 3, [after + more] * 2).log_mean


@given(st.lists(st.floats(-1, 1), max_size=8), st.lists(st.floats(-1, 1), min_size=2, max_size=3), st.floats(0, 1))
def test_any_measurement_leaves_a_finite_belief_that_is_no_less_certain(before, after, error):
    belief = watched(before, after, error=error)
    assert math.isfinite(belief.log_mean)
    assert belief.ratio * (1 + 1e-12) >= 1 / 16
    assert belief.ratio <= 16 * (1 + 1e-12)
    assert 0 <= belief.log_variance <= PRIOR.log_variance


def test_noisy_measurements_move_the_belief_less():
    clear, noisy = watched([1.0] * 3, [6.0] * 2), watched([1.0] * 3, [6.0] * 2, error=2.0)
    assert PRIOR.log_mean < noisy.log_mean < clear.log_mean


def test_a_refresh_that_replaced_a_fresh_selection_teaches_nothing():
    same = watched([1.0] * 3, [5.0] * 2, fresh_before=1.0, fresh_after=1.0)
    assert same.log_variance == pytest.approx(PRIOR.log_variance)
    assert same.log_mean == pytest.approx(PRIOR.log_mean)


def test_without_progress_before_there_is_nothing_to_compare_with():
    assert watched([-1.0, 0.0], [1.0, 1.0]).log_mean == PRIOR.log_mean


def test_losing_ground_after_a_refresh_lowers_the_belief():
    assert watched([1.0] * 3, [-1.0] * 2, error=0.1).ratio < PRIOR.ratio


@pytest.mark.parametrize("checks_before", [1, 4])
@pytest.mark.parametrize("true_ratio", [0.5, 2.0])
def test_the_belief_is_calibrated_in_the_world_it_assumes(true_ratio, checks_before):
    """Draws from the belief's own model: 95 % intervals hold the truth in 95 % of the runs, to four deviations."""
    source = random.Random(7)
    runs, held = 400, 0
    for _ in range(runs):
        prior = Belief(math.log(true_ratio) + source.gauss(0, 0.7), 0.7**2)
        p = source.gauss(0.5, 0.5)
        rates = [math.exp(-p * math.log(i + 0.5) + source.gauss(0, 0.5)) for i in range(checks_before)]
        # One window: its trajectory noise is shared by its intervals.
        noise = source.gauss(0, 0.5)
        response = [true_ratio * math.exp(-p * math.log(checks_before + 1) + noise)] * 2
        low, high = watched(rates, response, belief=prior).interval()
        held += low <= true_ratio <= high
    assert held / runs >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / runs)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=4), st.booleans())
def test_a_belief_saved_as_json_goes_on_exactly(rates, refreshed):
    belief = watched(rates, [], error=0.1)
    belief = belief.refreshed() if refreshed else belief
    loaded = Belief.from_dict(json.loads(json.dumps(belief.to_dict())))
    assert loaded == belief
