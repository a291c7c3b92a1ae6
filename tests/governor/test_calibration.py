from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyeff.governor.calibration import Conformal


@pytest.mark.parametrize("errors", ["normal", "heavy"])
@pytest.mark.parametrize("known", [9, 19, 30])
def test_intervals_cover_as_often_as_they_say_whatever_the_errors(errors, known):
    source, trials, level = random.Random(known), 2000, 0.9

    def error():
        normal = source.gauss(0, 1)
        return normal if errors == "normal" else normal / max(abs(source.gauss(0, 1)), 1e-9)  # Cauchy

    covered = 0
    for _ in range(trials):
        calibration = Conformal(level=level, step=0.0).taught((0.0, 1.0, error()) for _ in range(known))
        low, high = calibration.interval(predicted=0.0, scale=1.0)
        covered += low <= error() <= high
    noise = 3 * math.sqrt(level * (1 - level) / trials)
    assert level - noise <= covered / trials <= level + 1 / (known + 1) + noise


@pytest.mark.parametrize("step", [0.0, 0.03, 0.2])
def test_too_few_outcomes_give_no_finite_interval(step):
    """Nor does adapting to them: what had no interval was no hit."""
    calibration = Conformal(step=step)
    for known in range(12):
        assert calibration.calibrated == (known >= 9)
        calibration = calibration.observed(predicted=1.0, scale=1.0, realised=1.5)
    assert calibration.interval(predicted=2.0, scale=2.0) == (1.0, 3.0)


def test_under_a_lasting_change_the_adaptive_interval_covers_again_and_the_fixed_one_does_not():
    def coverage(step):
        source = random.Random(0)
        calibration, covered = Conformal(step=step), []
        for check in range(600):
            scale = 1.02 ** min(check, 300)  # errors outgrow the claimed scale all the time, then stop
            realised = source.gauss(0, scale)
            low, high = calibration.interval(predicted=0.0, scale=1.0)
            covered.append(low <= realised <= high)
            calibration = calibration.observed(predicted=0.0, scale=1.0, realised=realised)
        return sum(covered[50:300]) / 250

    assert abs(coverage(0.05) - 0.9) <= abs(coverage(0.0) - 0.9)
    # Gibbs and Candes: |coverage - level| <= (max rate + step) / (step n), for any sequence.
    assert abs(coverage(0.05) - 0.9) <= (0.9 + 0.05) / (0.05 * 250)


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0.01, 5), st.floats(-5, 5)), max_size=80))
def test_a_saved_calibration_goes_on_as_it_would_have(outcomes):
    calibration = Conformal().taught(outcomes)
    again = Conformal.from_dict(json.loads(json.dumps(calibration.to_dict())))
    assert again == calibration
    assert len(again.scores) <= 64


def test_arguments_out_of_range_are_named():
    with pytest.raises(ValueError, match="level must lie between 0 and 1"):
        Conformal(level=1.0)
    with pytest.raises(ValueError, match="step must be at least 0"):
        Conformal(step=-0.1)
    with pytest.raises(ValueError, match="scale must be positive"):
        Conformal().interval(predicted=1.0, scale=0.0)
    with pytest.raises(ValueError, match="realised must be finite"):
        Conformal().observed(predicted=1.0, scale=1.0, realised=math.nan)
