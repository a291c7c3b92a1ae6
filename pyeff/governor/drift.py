"""Has a selection gone stale? Five detectors in the order of their cost, D5 < D3 < D2, D1 < D4.

== ========================================================== =========================================
D5 gains fall short of their predictions (CUSUM)              nothing: the checks' own numbers
D3 the target's mean gradient points elsewhere                two sketches of the target gradient
D2 the top of the ranking changes                             scoring a sample of the pool, twice halved
D1 the ranking changes                                        the same scores
D4 the selection trains no faster than uniform batches        a probe of both
== ========================================================== =========================================

D1 to D3 compare scores or gradients of two times, each known only with the noise of the target samples behind it.
Noise alone lowers every correlation, so each reading is divided by what two halves of the target samples agree on at
one time, and only *cross-half* pairs are compared between times: a half shared by both would hide its noise. Score
with averaged weights: those of single iterates change sign from step to step and are stale at once.

An alarm never refreshes anything. It enables REFRESH; the pay-back rule decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pyeff.governor.signals import paired_gain

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    _Array = NDArray[np.float64]

Detector = Literal["D1", "D2", "D3", "D4", "D5"]
# Cheapest first.
DETECTORS: tuple[Detector, ...] = ("D5", "D3", "D2", "D1", "D4")

# One-sided normal quantile of 5 %: the alarm rate of a reading on its threshold.
_ONE_SIDED = 1.6448536269514722


@dataclass(frozen=True)
class DriftReading:
    """What a detector found.

    Args:
        detector: "D1" to "D5".
        value: 1 is no drift for D1 to D3 (0 is nothing left), for D4 the advantage in nats, for D5 the CUSUM.
        standard_error: of ``value``; 0 for D5.
        threshold: alarm below it (D5: above) by more than sampling error.
        alarm: whether it alarms.
        usable: False where the halves agree too little to say anything; never an alarm. More target samples help.
    """

    detector: Detector
    value: float
    standard_error: float
    threshold: float
    alarm: bool
    usable: bool = True


def rank_drift(
    then: tuple[Sequence[float], Sequence[float]],
    now: tuple[Sequence[float], Sequence[float]],
    *,
    threshold: float = 0.8,
) -> DriftReading:
    """D1: rank correlation of scores at two times, corrected for noise.

    (rho(then_1, now_2) + rho(then_2, now_1)) / 2 / sqrt(rho(then_1, then_2) rho(now_1, now_2)), Spearman's rho.

    Args:
        then: scores of the same pool samples [n] by either half of the target, when the selection was made; n >= 16.
        now: the same now.
        threshold: alarm where the whole 95 % one-sided interval lies below.

    The error treats the four correlations as independent. Raises ValueError for unequal lengths or scores that are
    not finite. Cost: four rankings of n.
    """
    import numpy as np

    ranks = [_ranks(name, scores) for name, pair in (("then", then), ("now", now)) for scores in pair]
    n = _same_length(ranks, 16)
    centred = [rank - rank.mean() for rank in ranks]
    norms = [math.sqrt(float((each**2).sum())) for each in centred]

    def correlation(i: int, j: int) -> float:
        return float((centred[i] * centred[j]).sum()) / (norms[i] * norms[j]) if norms[i] * norms[j] else 0.0

    cross = (correlation(0, 3) + correlation(1, 2)) / 2
    # Fieller's variance of a rank correlation.
    variances = [1.06 * (1 - rho**2) ** 2 / (n - 3) for rho in (cross, correlation(0, 1), correlation(2, 3))]
    return _relative(
        "D1", cross, (correlation(0, 1), correlation(2, 3)), variances, threshold, np.isfinite(norms).all()
    )


def overlap_drift(
    then: tuple[Sequence[float], Sequence[float]],
    now: tuple[Sequence[float], Sequence[float]],
    *,
    keep: float = 0.25,
    threshold: float = 0.8,
) -> DriftReading:
    """D2: how much of the top ``keep`` is the same at both times, beyond chance and relative to the halves.

    kappa = (overlap - keep) / (1 - keep) replaces D1's correlation. Arguments and errors as for :func:`rank_drift`;
    ``keep`` in (0, 1).
    """
    import numpy as np

    if not 0 < keep < 1:
        raise ValueError(f"keep must lie between 0 and 1, got {keep!r}")
    ranks = [_ranks(name, scores) for name, pair in (("then", then), ("now", now)) for scores in pair]
    n = _same_length(ranks, 16)
    kept = max(round(keep * n), 1)
    # Ties break by position, alike at both times.
    tops = [np.isin(np.arange(n), np.argsort(-rank, kind="stable")[:kept]) for rank in ranks]
    chance = kept / n

    def kappa(i: int, j: int) -> float:
        return (float((tops[i] & tops[j]).sum()) / kept - chance) / (1 - chance)

    def variance(value: float) -> float:
        overlap = min(max(chance + value * (1 - chance), 0.0), 1.0)
        # Add half a sample, so that a full overlap is not known exactly.
        return (overlap * (1 - overlap) + 0.5 / kept) / kept / (1 - chance) ** 2

    cross, halves = (kappa(0, 3) + kappa(1, 2)) / 2, (kappa(0, 1), kappa(2, 3))
    return _relative("D2", cross, halves, [variance(value) for value in (cross, *halves)], threshold, True)


def gradient_drift(
    then: tuple[Sequence[float], Sequence[float]],
    now: tuple[Sequence[float], Sequence[float]],
    *,
    threshold: float = 0.5,
) -> DriftReading:
    """D3: cosine of the target's mean gradient at two times, relative to that of its halves.

    Args:
        then: sketches [k] of the mean gradient of either half of the target, when the selection was made; k >= 16.
            Sketches are unbiased for dot products, with an error of about 1 / sqrt(k) of the norms' product.
        now: the same now.
        threshold: alarm where the whole 95 % one-sided interval lies below. Gradients of averaged weights turn
            faster than the rankings they make, so it is lower than D1's.

    Raises ValueError for unequal lengths or values that are not finite.
    """
    import numpy as np

    vectors = [np.asarray(each, dtype=np.float64) for pair in (then, now) for each in pair]
    k = _same_length(vectors, 16)
    if not all(np.isfinite(vector).all() for vector in vectors):
        raise ValueError("then and now must be finite")
    norms = [math.sqrt(float((vector**2).sum())) for vector in vectors]

    def cosine(i: int, j: int) -> float:
        return float((vectors[i] * vectors[j]).sum()) / (norms[i] * norms[j]) if norms[i] * norms[j] else 0.0

    cross, halves = (cosine(0, 3) + cosine(1, 2)) / 2, (cosine(0, 1), cosine(2, 3))
    variances = [(1 + value**2) / k for value in (cross, *halves)]
    return _relative("D3", cross, halves, variances, threshold, True)


def utility_drift(
    stale_before: Sequence[float],
    stale_after: Sequence[float],
    uniform_after: Sequence[float],
    *,
    threshold: float = 0.0,
) -> DriftReading:
    """D4: does the selection still train faster than uniform batches? The only detector that asks what matters.

    Two short branches from one checkpoint, one on the present selection and one on uniform batches, end in losses of
    the same anchors. The advantage is the mean of uniform_after - stale_after.

    Args:
        stale_before: losses of the anchors at the branch point [n], used to refuse a probe that learned nothing.
        stale_after: at the end of the branch on the selection [n].
        uniform_after: at the end of the branch on uniform batches [n].
        threshold: nats; alarm where the advantage is not above it by a standard error: the probe is run after another
            alarm, so it is the selection's turn to show that it still helps.

    Not usable where neither branch gained more than its standard error. Raises ValueError as
    :func:`pyeff.governor.paired_gain` does.
    """
    gains = [paired_gain(stale_before, after, confidence=0.9) for after in (stale_after, uniform_after)]
    found = paired_gain(uniform_after, stale_after, confidence=0.9)
    usable = any(gain.mean > gain.standard_error for gain in gains)
    alarm = usable and found.mean - found.standard_error <= threshold
    return DriftReading("D4", found.mean, found.standard_error, threshold, alarm, usable)


@dataclass(frozen=True)
class Cusum:
    """D5: Page's cumulative sum of standardised shortfalls of realised gains below predicted ones.

    s <- max(0, s + (predicted - realised) / scale - slack); alarm when s > limit. With the defaults and standard
    normal errors the mean time to a false alarm is about 930 checks, and a shortfall of two scales is seen after
    about three (Page, 1954).

    Args:
        slack: shortfall per check that is tolerated, in scales.
        limit: of the sum.
        total: the sum so far.
    """

    slack: float = 0.5
    limit: float = 5.0
    total: float = 0.0

    def observed(self, *, predicted: float, realised: float, scale: float) -> Cusum:
        """Return the detector after one more check; ``scale`` > 0 is the error the prediction claimed."""
        if not (math.isfinite(predicted) and math.isfinite(realised)):
            raise ValueError(f"predicted and realised must be finite, got {predicted!r} and {realised!r}")
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale must be positive and finite, got {scale!r}")
        shortfall = min((predicted - realised) / scale, 1e9)
        return replace(self, total=max(0.0, self.total + shortfall - self.slack))

    def restarted(self) -> Cusum:
        """Return it at zero, as after a refresh."""
        return replace(self, total=0.0)

    @property
    def reading(self) -> DriftReading:
        """The reading now."""
        return DriftReading("D5", self.total, 0.0, self.limit, self.total > self.limit)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Cusum:
        """Rebuild what :meth:`to_dict` wrote."""
        return cls(**plain)


def next_detector(readings: Sequence[DriftReading]) -> Detector | None:
    """Say which detector is worth running now; None when nothing more is to be learned.

    The cheap ones run in order until one alarms; after any alarm only D4 is left to ask, since it alone tells
    whether the drift matters.
    """
    done = {reading.detector: reading for reading in readings}
    if "D4" in done:
        return None
    if any(reading.alarm for reading in readings):
        return "D4"
    return next((name for name in DETECTORS[:-1] if name not in done), None)


def alarmed(readings: Sequence[DriftReading]) -> bool:
    """Whether REFRESH is enabled: D4's word where it was asked and could tell, else any alarm."""
    asked = [reading for reading in readings if reading.detector == "D4" and reading.usable]
    return any(reading.alarm for reading in (asked or readings))


def _relative(
    detector: Detector,
    cross: float,
    halves: tuple[float, float],
    variances: Sequence[float],
    threshold: float,
    usable: bool | np.bool_,
) -> DriftReading:
    """cross / sqrt(product of halves) with the error of the delta method."""
    # A half that does not agree with the other measures noise: nothing can be divided by it.
    told = all(half > 2 * math.sqrt(variance) for half, variance in zip(halves, variances[1:], strict=True))
    if not (usable and told):
        return DriftReading(detector, math.nan, math.nan, threshold, alarm=False, usable=False)
    scale = math.sqrt(halves[0] * halves[1])
    value = cross / scale
    relative = [variance / half**2 / 4 for half, variance in zip(halves, variances[1:], strict=True)]
    error = math.sqrt(variances[0] / scale**2 + value**2 * math.fsum(relative))
    return DriftReading(detector, value, error, threshold, value + _ONE_SIDED * error < threshold)


def _ranks(name: str, scores: Sequence[float]) -> _Array:
    import numpy as np
    from scipy.stats import rankdata

    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"{name} must be one finite score a sample")
    return np.asarray(rankdata(values), dtype=np.float64)


def _same_length(arrays: Sequence[_Array], least: int) -> int:
    lengths = {array.shape for array in arrays}
    if len(lengths) != 1 or arrays[0].ndim != 1 or len(arrays[0]) < least:
        raise ValueError(f"then and now must be four of one length, at least {least}, got {sorted(lengths)}")
    return len(arrays[0])
