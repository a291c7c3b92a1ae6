"""What the next interval should gain, how sure that is, and how such promises turned out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pyeff.governor.belief import Interval
from pyeff.governor.calibration import Conformal
from pyeff.governor.drift import Cusum
from pyeff.governor.signals import LocalLevel

# A law with four coefficients says something from here on; beyond it the oldest points are of another phase.
_LAW_POINTS = (6, 40)
# Anchors that did not move at all leave a variance of zero.
_SMALLEST = 1e-300


@dataclass(frozen=True)
class Promise:
    """A predicted rate of gain (nats per unit of training) and the standard deviation it claims."""

    rate: float
    scale: float


@dataclass(frozen=True)
class Forecaster:
    """The filtered rate of gain, the curve behind it, the last promise and the record of earlier ones.

    Two signals are fused: the paired gains of the checks, through a local level that slows as training goes on, and
    an offset power law through the anchors' losses since the training was last changed. Neither's own error is
    believed: promises are calibrated by their outcomes (:class:`Conformal`).

    Args:
        level: belief about the rate at ``midpoint``; None before the first gain.
        midpoint: training done at the middle of the last interval.
        curve: (training done, mean anchor loss) since the training was last changed.
        promise: of the interval that is running.
        calibration: of promises.
        cusum: D5.
    """

    level: LocalLevel | None = None
    midpoint: float = 0.0
    curve: tuple[tuple[float, float], ...] = ()
    promise: Promise | None = None
    calibration: Conformal = field(default_factory=Conformal)
    cusum: Cusum = field(default_factory=Cusum)

    def measured(self, interval: Interval, loss: float, *, slowing: float, scatter: float) -> Forecaster:
        """Take in one interval's gain, and the anchors' mean loss at its end.

        ``slowing`` is p in rate ~ training^-p, ``scatter`` the relative standard deviation of a rate beyond the
        sampling error.
        """
        rate, error = interval.rate, interval.standard_error / (interval.end - interval.start)
        calibration, cusum = self.calibration, self.cusum
        if self.promise is not None:
            outcome = {"predicted": self.promise.rate, "scale": self.promise.scale, "realised": rate}
            calibration, cusum = calibration.observed(**outcome), cusum.observed(**outcome)
        level = self._moved(interval.midpoint, slowing, scatter)
        if level is None:
            level, spread = LocalLevel(), scatter * abs(rate)
        else:
            # A rate far from the level is more likely a change of the level than a rare error: follow it.
            surprise = scatter * (rate - level.mean)
            level, spread = replace(level, variance=max(level.variance, surprise**2)), scatter * abs(level.mean)
        return replace(
            self,
            level=level.measured(rate, max(error**2 + spread**2, _SMALLEST)),
            midpoint=interval.midpoint,
            curve=(*self.curve, (interval.end, loss))[-_LAW_POINTS[1] :],
            promise=None,
            calibration=calibration,
            cusum=cusum,
        )

    def interrupted(self) -> Forecaster:
        """Drop the running promise after a check without a usable gain."""
        return replace(self, promise=None)

    def changed(self) -> Forecaster:
        """Begin a new curve after the training was changed."""
        return replace(self, curve=(), cusum=self.cusum.restarted())

    def forecast(self, start: float, end: float, *, error: float, slowing: float, scatter: float) -> Promise | None:
        """Predict the rate measured over training from ``start`` to ``end``; None before the first gain.

        ``error`` is the sampling error that the measurement will have, as a rate.
        """
        level = self._moved((start + end) / 2, slowing, scatter)
        if level is None:
            return None
        if len(self.curve) >= _LAW_POINTS[0] and len({x for x, _ in self.curve}) >= _LAW_POINTS[0]:
            from pyeff.governor.laws import fit_offset_power_law

            law = fit_offset_power_law([x for x, _ in self.curve], [loss for _, loss in self.curve])
            rate = law.gain(start, end) / (end - start)
            spread = scatter * max(abs(rate), abs(level.mean))
            if math.isfinite(rate):
                level = level.measured(rate, max(spread**2, _SMALLEST))
        variance = level.variance + error**2 + (scatter * level.mean) ** 2
        return Promise(level.mean, math.sqrt(max(variance, _SMALLEST)))

    def upper(self, probability: float) -> float | None:
        """Return the rate that is exceeded with this probability only; None before the first gain."""
        if self.level is None:
            return None
        from statistics import NormalDist

        return self.level.mean + NormalDist().inv_cdf(1 - probability) * math.sqrt(self.level.variance)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able fields."""
        return {
            "level": None if self.level is None else asdict(self.level),
            "midpoint": self.midpoint,
            "curve": [list(point) for point in self.curve],
            "promise": None if self.promise is None else asdict(self.promise),
            "calibration": self.calibration.to_dict(),
            "cusum": self.cusum.to_dict(),
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Forecaster:
        """Rebuild what :meth:`to_dict` wrote."""
        level, promise = plain["level"], plain["promise"]
        return cls(
            level=None if level is None else LocalLevel(**level),
            midpoint=plain["midpoint"],
            curve=tuple((x, loss) for x, loss in plain["curve"]),
            promise=None if promise is None else Promise(**promise),
            calibration=Conformal.from_dict(plain["calibration"]),
            cusum=Cusum.from_dict(plain["cusum"]),
        )

    def _moved(self, midpoint: float, slowing: float, scatter: float) -> LocalLevel | None:
        """The level carried to a later point of training."""
        if self.level is None:
            return None
        factor = (self.midpoint / midpoint) ** slowing if 0 < self.midpoint < midpoint else 1.0
        # Half of a check's scatter lasts: rates of neighbouring intervals go together.
        return self.level.predicted(factor=factor, drift_variance=(scatter / 2 * self.level.mean) ** 2)
