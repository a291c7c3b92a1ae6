from __future__ import annotations

import math

import numpy as np
import pytest

from pyeff.governor.drift import (
    Cusum,
    DriftReading,
    alarmed,
    gradient_drift,
    next_detector,
    overlap_drift,
    rank_drift,
    utility_drift,
)


def scores(rng, n, *, kept, noise):
    """Two halves' scores at two times; the true score of the second time correlates with the first's by ``kept``."""
    first = rng.standard_normal(n)
    second = kept * first + math.sqrt(1 - kept**2) * rng.standard_normal(n)
    halves = [[true + noise * rng.standard_normal(n) for _ in range(2)] for true in (first, second)]
    return tuple(halves[0]), tuple(halves[1])


def alarm_rate(detector, *, kept, noise, trials=200, n=256, **options):
    rng = np.random.default_rng(3)
    return np.mean([detector(*scores(rng, n, kept=kept, noise=noise), **options).alarm for _ in range(trials)])


@pytest.mark.parametrize("detector", [rank_drift, overlap_drift, gradient_drift])
@pytest.mark.parametrize("noise", [0.2, 0.7])
def test_without_drift_noise_alone_alarms_in_at_most_a_twentieth_of_checks(detector, noise):
    trials = 200
    assert alarm_rate(detector, kept=1.0, noise=noise, trials=trials) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / trials)


@pytest.mark.parametrize("detector", [rank_drift, overlap_drift, gradient_drift])
def test_a_ranking_that_is_gone_alarms_nearly_always(detector):
    assert alarm_rate(detector, kept=0.1, noise=0.3) > 0.9


def test_the_correction_recovers_the_correlation_of_the_noiseless_scores():
    rng = np.random.default_rng(0)
    readings = [rank_drift(*scores(rng, 1000, kept=0.8, noise=0.7)) for _ in range(30)]
    values = np.asarray([reading.value for reading in readings])
    # Spearman's rho of a normal pair with correlation r is 6 / pi asin(r / 2).
    expected = 6 / math.pi * math.asin(0.4)
    # Dividing rank correlations corrects exactly only for normal correlations: a per cent or so is left.
    assert abs(values.mean() - expected) <= 3 * values.std(ddof=1) / math.sqrt(30) + 0.02
    assert 0.5 < np.mean([reading.standard_error for reading in readings]) / values.std(ddof=1) < 2
    uncorrected = expected / (1 + 0.7**2)
    assert values.mean() > uncorrected + 0.1


def test_a_half_shared_between_times_would_hide_the_noise():
    rng = np.random.default_rng(1)
    (a, b), (c, d) = scores(rng, 500, kept=1.0, noise=1.0)
    assert rank_drift((a, b), (c, d)).value > np.corrcoef(a, c)[0, 1] + 0.2


@pytest.mark.parametrize("detector", [rank_drift, overlap_drift, gradient_drift])
def test_halves_that_disagree_say_nothing(detector):
    rng = np.random.default_rng(2)
    noise = [rng.standard_normal(64) for _ in range(4)]
    found = [detector((noise[0], -noise[0]), (noise[2], noise[3])), detector((np.ones(64),) * 2, (np.ones(64),) * 2)]
    assert not found[0].usable
    assert not found[0].alarm


@pytest.mark.parametrize("detector", [rank_drift, overlap_drift, gradient_drift])
def test_the_scale_of_scores_does_not_matter(detector):
    rng = np.random.default_rng(4)
    then, now = scores(rng, 128, kept=0.7, noise=0.3)
    scaled = detector(tuple(1e6 * each for each in then), tuple(1e-6 * each for each in now))
    assert scaled.value == pytest.approx(detector(then, now).value)


def test_the_probe_asks_whether_the_selection_still_helps():
    rng = np.random.default_rng(5)
    before = rng.normal(3, 0.5, 64)
    uniform = before - 0.10 + 0.01 * rng.standard_normal(64)
    better = before - 0.15 + 0.01 * rng.standard_normal(64)
    same = before - 0.10 + 0.01 * rng.standard_normal(64)
    worse = before - 0.05 + 0.01 * rng.standard_normal(64)
    assert not utility_drift(before, better, uniform).alarm
    assert utility_drift(before, worse, uniform).alarm
    assert utility_drift(before, same, uniform, threshold=0.01).alarm
    nothing = utility_drift(before, before + 0.1, before + 0.1)
    assert not nothing.usable
    assert not nothing.alarm


def test_gains_that_keep_their_promise_rarely_alarm_and_a_lasting_shortfall_does_soon():
    rng = np.random.default_rng(6)
    checks, alarms = 20_000, 0
    detector = Cusum()
    for error in rng.standard_normal(checks):
        detector = detector.observed(predicted=0.0, realised=float(error), scale=1.0)
        if detector.reading.alarm:
            alarms, detector = alarms + 1, detector.restarted()
    assert alarms / checks < 0.005  # 20 000 checks, 930 between false alarms: 22 expected
    delays = []
    for _ in range(50):
        detector, delay = Cusum(), 0
        while not detector.reading.alarm:
            delay += 1
            detector = detector.observed(predicted=2.0, realised=float(rng.standard_normal()), scale=1.0)
        delays.append(delay)
    assert np.mean(delays) < 6
    assert Cusum.from_dict(detector.to_dict()) == detector


def reading(detector, *, alarm=False, usable=True):
    return DriftReading(detector, 0.5, 0.1, 0.8, alarm, usable)


def test_detectors_run_from_the_cheapest_and_the_dearest_only_after_an_alarm():
    assert next_detector([]) == "D5"
    assert next_detector([reading("D5")]) == "D3"
    assert next_detector([reading("D5"), reading("D3"), reading("D2"), reading("D1")]) is None
    assert next_detector([reading("D5", alarm=True)]) == "D4"
    assert next_detector([reading("D5", alarm=True), reading("D4")]) is None


def test_the_probe_overrules_the_other_alarms_where_it_could_tell():
    loud = reading("D3", alarm=True)
    assert alarmed([loud])
    assert not alarmed([])
    assert not alarmed([reading("D3")])
    assert not alarmed([loud, reading("D4")])
    assert alarmed([loud, reading("D4", usable=False)])


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        (([1.0] * 20, [1.0] * 20), ([1.0] * 20, [1.0] * 19), "four of one length"),
        (([1.0] * 5, [1.0] * 5), ([1.0] * 5, [1.0] * 5), "at least 16"),
        (([math.nan] * 20, [1.0] * 20), ([1.0] * 20, [1.0] * 20), "finite"),
    ],
)
@pytest.mark.parametrize("detector", [rank_drift, overlap_drift, gradient_drift])
def test_scores_that_cannot_be_compared_are_refused(detector, then, now, message):
    with pytest.raises(ValueError, match=message):
        detector(then, now)
