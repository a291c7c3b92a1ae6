from __future__ import annotations

import math
import random
import statistics
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyeff.governor import LocalLevel, clustered_gain, paired_gain

LOSSES = st.floats(-1e6, 1e6, width=32)  # the squares of the smallest doubles underflow
PAIRS = st.lists(st.tuples(LOSSES, LOSSES), min_size=2, max_size=40)


@given(PAIRS)
def test_mean_and_error_are_those_of_the_differences(pairs):
    before, now = zip(*pairs, strict=True)
    differences = [b - a for b, a in pairs]
    gain = paired_gain(before, now)
    assert gain.n == len(pairs)
    # fsum rounds once per operation; the textbook formulas round a few times more.
    scale = max(map(abs, differences)) * 2**-50
    assert abs(gain.mean - statistics.fmean(differences)) <= scale
    assert abs(gain.standard_error - statistics.stdev(differences) / math.sqrt(len(pairs))) <= scale
    assert gain.low <= gain.mean <= gain.high


@given(PAIRS, st.randoms())
def test_the_order_of_the_samples_does_not_matter_to_the_last_bit(pairs, random_):
    shuffled = list(pairs)
    random_.shuffle(shuffled)
    assert paired_gain(*zip(*pairs, strict=True)) == paired_gain(*zip(*shuffled, strict=True))


@given(PAIRS)
def test_swapping_before_and_now_turns_the_gain_round(pairs):
    before, now = zip(*pairs, strict=True)
    there, back = paired_gain(before, now), paired_gain(now, before)
    assert (back.mean, back.low, back.high) == (-there.mean, -there.high, -there.low)
    assert back.standard_error == there.standard_error


def test_what_is_hard_about_a_sample_cancels():
    source = random.Random(0)
    hard = [source.gauss(0, 100) for _ in range(64)]
    noise = [source.gauss(0, 0.01) for _ in range(64)]
    now = [h - 0.5 + e for h, e in zip(hard, noise, strict=True)]
    paired, plain = paired_gain(hard, now), paired_gain([0.0] * 64, noise)
    # h - (h - 0.5 + e) rounds at the scale of h.
    assert paired.standard_error == pytest.approx(plain.standard_error, abs=max(map(abs, hard)) * 2**-50)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    source = random.Random(1)
    trials, covered = 2000, 0
    for _ in range(trials):
        now = [source.gauss(0, 1) for _ in range(5)]
        gain = paired_gain([0.0] * 5, now, confidence=0.9)
        covered += gain.low <= 0 <= gain.high
    four_deviations = 4 * math.sqrt(0.9 * 0.1 / trials)
    assert abs(covered / trials - 0.9) <= four_deviations


@pytest.mark.parametrize(
    ("before", "now", "options", "message"),
    [
        ([1.0, 2.0], [1.0], {}, "same samples, got 2 and 1"),
        ([1.0], [1.0], {}, "at least 2 samples, got 1"),
        ([1.0, math.nan], [1.0, 2.0], {}, r"before\[1\] must be finite, got nan"),
        ([1.0, 2.0], [-math.inf, 2.0], {}, r"now\[0\] must be finite, got -inf"),
        ([1.0, 2.0], [1.0, 2.0], {"confidence": 1.0}, "confidence must lie between 0 and 1"),
    ],
)
def test_losses_that_cannot_be_compared_are_refused(before, now, options, message):
    with pytest.raises(ValueError, match=message):
        paired_gain(before, now, **options)


def documents(source, *, count, size, shared, own):
    """Differences of ``count`` documents of ``size`` pieces that share part of their error."""
    clusters, before, now = [], [], []
    for document in range(count):
        common = source.gauss(0.1, shared)
        for _ in range(size):
            clusters.append(document)
            before.append(source.gauss(3, 1))
            now.append(before[-1] - common - source.gauss(0, own))
    return before, now, clusters


def test_pieces_of_one_document_do_not_count_as_so_many_samples():
    source, trials = random.Random(0), 300
    covered = {"pieces": 0, "documents": 0}
    for trial in range(trials):
        before, now, clusters = documents(source, count=20, size=8, shared=0.2, own=0.05)
        gain = clustered_gain(before, now, clusters, confidence=0.9, seed=trial)
        naive = paired_gain(before, now, confidence=0.9)
        assert gain.mean == naive.mean
        covered["documents"] += gain.low <= 0.1 <= gain.high
        covered["pieces"] += naive.low <= 0.1 <= naive.high
    noise = 3 * math.sqrt(0.9 * 0.1 / trials)
    assert abs(covered["documents"] / trials - 0.9) <= noise
    assert covered["pieces"] / trials < 0.6


def test_clusters_of_one_sample_give_the_paired_error():
    source = random.Random(1)
    before, now, _ = documents(source, count=200, size=1, shared=0.2, own=0.0)
    gain = clustered_gain(before, now, range(200), draws=4000)
    # A standard deviation of 4000 draws is known to 1.1 %.
    assert gain.standard_error == pytest.approx(paired_gain(before, now).standard_error, rel=4 * 0.0112)


def test_the_bootstrap_is_a_function_of_its_seed():
    before, now, clusters = documents(random.Random(2), count=10, size=3, shared=0.1, own=0.1)
    assert clustered_gain(before, now, clusters, seed=5) == clustered_gain(before, now, clusters, seed=5)
    with pytest.raises(ValueError, match="at least 2 clusters"):
        clustered_gain(before, now, [4] * len(before))
    with pytest.raises(ValueError, match="clusters must name one for each sample"):
        clustered_gain(before, now, clusters[1:])


def test_the_filter_follows_a_wandering_level_better_than_the_last_reading_or_the_mean_of_all():
    source, level, belief = random.Random(3), 1.0, LocalLevel()
    walk, noise = 0.05, 0.3
    errors = {"filter": 0.0, "last": 0.0, "mean": 0.0}
    readings, covered, n = [], 0, 2000
    for _ in range(n):
        level += source.gauss(0, walk)
        readings.append(level + source.gauss(0, noise))
        belief = belief.predicted(drift_variance=walk**2).measured(readings[-1], noise**2)
        errors["filter"] += (belief.mean - level) ** 2
        errors["last"] += (readings[-1] - level) ** 2
        errors["mean"] += (sum(readings[-200:]) / len(readings[-200:]) - level) ** 2
        covered += abs(belief.mean - level) <= 1.645 * math.sqrt(belief.variance)
    assert errors["filter"] < 0.5 * min(errors["last"], errors["mean"])
    assert 0.86 < covered / n < 0.94


@given(
    st.lists(st.tuples(st.floats(-10, 10), st.floats(0.01, 10)), min_size=1, max_size=8),
    st.randoms(use_true_random=False),
)
def test_signals_of_one_check_may_come_in_any_order(signals, shuffler):
    belief, shuffled = LocalLevel(), LocalLevel()
    for value, variance in signals:
        belief = belief.measured(value, variance)
    others = list(signals)
    shuffler.shuffle(others)
    for value, variance in others:
        shuffled = shuffled.measured(value, variance)
    # Eight roundings a signal, of numbers up to 20; 1 - P / (P + R) loses up to P / R of its digits.
    variances = [variance for _, variance in signals]
    allowed = 8 * len(signals) * (1 + max(variances) / min(variances)) * sys.float_info.epsilon
    assert shuffled.mean == pytest.approx(belief.mean, rel=0, abs=20 * allowed)
    assert shuffled.variance == pytest.approx(belief.variance, rel=allowed)


def test_the_filter_knows_what_it_does_not_know():
    assert LocalLevel().probability_below(-1e9) == 0.5
    belief = LocalLevel(1.0, 0.25)
    assert belief.probability_below(1.0) == pytest.approx(0.5)
    assert belief.probability_below(1.0 - 1.645 * 0.5) == pytest.approx(0.05, abs=1e-3)
    assert LocalLevel(1.0, 0.0).probability_below(1.1) == 1.0
    slowed = belief.predicted(drift_variance=0.01, factor=0.5)
    assert (slowed.mean, slowed.variance) == (0.5, 0.25 * 0.25 + 0.01)
    for broken in (
        lambda: belief.measured(math.nan, 1.0),
        lambda: belief.measured(1.0, 0.0),
        lambda: belief.predicted(drift_variance=-1.0),
        lambda: belief.predicted(drift_variance=1.0, factor=0.0),
    ):
        with pytest.raises(ValueError, match=r"must be (positive|finite)"):
            broken()
