"""What a run has shown about the worth of its selections: a Gaussian belief about log rho.

rho is how many times faster the anchors improve right after a selection than without one. It is never seen
alone: learning slows down by itself, so the rate after a refresh must be compared with the rate there would
have been. That rate is extrapolated from the checks before the refresh, with its uncertainty, and the ratio
moves the belief only as far as the two uncertainties allow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

# One run's noise must not convince anyone of more than a sixteenfold gain or loss.
RATIO_LIMITS = (1 / 16, 16.0)
# Rates more than this many checks old say little about the next one.
_KEPT_INTERVALS = 8


@dataclass(frozen=True)
class Interval:
    """Gain of the anchors between two checks.

    Args:
        start: training spent at the earlier check, scoring not counted.
        end: the same at the later one; > ``start``.
        gain: mean paired fall of the anchors' loss.
        standard_error: of ``gain``.
        freshness: exp(-x / tau) at the interval's middle, x spent since the scoring; 0 without a selection.
    """

    start: float
    end: float
    gain: float
    standard_error: float
    freshness: float

    @property
    def rate(self) -> float:
        """Gain per unit of training."""
        return self.gain / (self.end - self.start)

    @property
    def midpoint(self) -> float:
        """Training spent at the middle."""
        return (self.start + self.end) / 2


@dataclass(frozen=True)
class Belief:
    """log rho ~ N(log_mean, log_variance), and the intervals that will next move it.

    Args:
        log_mean: mean of log rho.
        log_variance: variance of log rho.
        before: intervals before the latest refresh, while its effect is being watched; else empty.
        since: intervals since the latest refresh, or since the start; contiguous, the last eight.
    """

    log_mean: float
    log_variance: float
    before: tuple[Interval, ...] = ()
    since: tuple[Interval, ...] = ()

    @property
    def ratio(self) -> float:
        """The median of rho."""
        return math.exp(self.log_mean)

    def interval(self, deviations: float = 1.96) -> tuple[float, float]:
        """Return rho at this many standard deviations of its logarithm below and above the median."""
        width = deviations * math.sqrt(self.log_variance)
        return math.exp(self.log_mean - width), math.exp(self.log_mean + width)

    def refreshed(self) -> Belief:
        """Begin to watch a refresh: what was measured until now becomes what it is compared with."""
        return replace(self, before=self.since, since=())

    def interrupted(self) -> Belief:
        """Forget the running window after a check without a usable gain: a window must have no gap."""
        return replace(self, since=())

    def measured(
        self,
        interval: Interval,
        *,
        response_checks: int,
        slowing: float,
        slowing_sd: float,
        trajectory_log_sd: float,
    ) -> Belief:
        """Add one interval, and learn from the latest refresh once ``response_checks`` of them follow it."""
        grown = replace(self, since=(*self.since, interval)[-_KEPT_INTERVALS:])
        if not grown.before or len(grown.since) < response_checks:
            return grown
        learned = _learn(grown, slowing, slowing_sd, trajectory_log_sd)
        return replace(learned, before=())

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able fields."""
        return {
            "log_mean": self.log_mean,
            "log_variance": self.log_variance,
            "before": [asdict(interval) for interval in self.before],
            "since": [asdict(interval) for interval in self.since],
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Belief:
        """Rebuild the belief that :meth:`to_dict` wrote."""
        intervals = {name: tuple(Interval(**item) for item in plain[name]) for name in ("before", "since")}
        return cls(**{**plain, **intervals})


@dataclass(frozen=True)
class _Forecast:
    """log rate expected at a later time: a weighted sum of the log rates seen, plus a constant."""

    mean: float
    variance: float
    weights: tuple[float, ...]


def _forecast(
    seen: Sequence[Interval], midpoint: float, slowing: float, slowing_sd: float, trajectory_log_sd: float
) -> _Forecast:
    """Extrapolate log rate = a - p log(training) by weighted least squares, a free and p ~ N(slowing, slowing_sd^2).

    With one interval p is the prior's; the further the target lies from what was seen, the less the forecast
    claims.
    """
    places = [math.log(interval.midpoint) for interval in seen]
    rates = [math.log(interval.rate) for interval in seen]
    precisions = [1 / ((interval.standard_error / interval.gain) ** 2 + trajectory_log_sd**2) for interval in seen]
    total = math.fsum(precisions)
    centre = math.fsum(w * x for w, x in zip(precisions, places, strict=True)) / total
    prior = slowing_sd**-2
    curvature = math.fsum(w * (x - centre) ** 2 for w, x in zip(precisions, places, strict=True)) + prior
    distance = math.log(midpoint) - centre
    weights = tuple(
        w / total + distance * w * (x - centre) / curvature for w, x in zip(precisions, places, strict=True)
    )
    mean = math.fsum(w * rate for w, rate in zip(weights, rates, strict=True))
    return _Forecast(
        mean=mean - distance * slowing * prior / curvature,
        variance=1 / total + distance**2 / curvature,
        weights=weights,
    )


def _learn(belief: Belief, slowing: float, slowing_sd: float, trajectory_log_sd: float) -> Belief:
    """Compare the rate after a refresh with the forecast and move the belief.

    Observed is y = log(rate after) - forecast(log rates before), modelled as

        h(log rho) = log(1 + (rho - 1) f) - sum_i w_i log(1 + (rho - 1) f_i) + noise,

    f being the freshness of the selection in each window and w_i the forecast's weights. With a first refresh
    judged at once, f = 1 and f_i = 0, h is log rho itself and this is the conjugate Gaussian update;
    otherwise h is linearised at the present mean. A selection that is replaced while fresh has h close to 0
    and teaches little.
    """
    # A gain lost in its own error has no usable logarithm.
    seen = [i for i in belief.before if i.gain > 0.01 * i.standard_error and i.rate > 0]
    if not seen:  # nothing was being learned: no rate to compare with
        return belief
    window = belief.since
    length = window[-1].end - window[0].start
    gain = math.fsum(interval.gain for interval in window)
    # Neighbouring intervals share their anchors, so their errors are not independent: the sum bounds that of
    # the sum.
    error = math.fsum(interval.standard_error for interval in window)
    fresh = math.fsum(i.freshness * (i.end - i.start) for i in window) / length
    forecast = _forecast(seen, (window[0].start + window[-1].end) / 2, slowing, slowing_sd, trajectory_log_sd)
    # Lost ground has no logarithm: it counts as a gain of the size of its error, one standard deviation in the log.
    low, high = (math.log(limit) for limit in RATIO_LIMITS)
    usable = max(gain, error)
    observed = math.log(usable / length) - forecast.mean if usable / length > 0 else low
    observed = min(max(observed, low), high)
    noise = (error / usable if usable > 0 else 0.0) ** 2 + trajectory_log_sd**2 + forecast.variance

    ratio = belief.ratio
    terms = [(1.0, fresh), *((-w, i.freshness) for w, i in zip(forecast.weights, seen, strict=True))]
    expected = math.fsum(weight * math.log1p((ratio - 1) * f) for weight, f in terms)
    slope = math.fsum(weight * ratio * f / (1 + (ratio - 1) * f) for weight, f in terms)
    spread = slope**2 * belief.log_variance + noise
    trust = belief.log_variance * slope / spread
    return replace(
        belief,
        log_mean=min(max(belief.log_mean + trust * (observed - expected), low), high),
        log_variance=belief.log_variance * noise / spread,
    )
