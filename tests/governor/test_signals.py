from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyeff.governor import paired_gain

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
