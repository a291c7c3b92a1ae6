"""Intervals that cover: split-conformal calibration of predicted gains by how earlier predictions turned out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

# Old mistakes belong to another phase of training.
_KEPT = 64
# A scale of next to nothing must not make a score that no JSON can hold.
_LARGEST = 1e9


@dataclass(frozen=True)
class Conformal:
    """Turn predicted gains with a guess of their scale into intervals with a stated coverage.

    With scores r_i = |realised_i - predicted_i| / scale_i of n earlier predictions, the next interval is

        predicted +- q scale,   q the ceil((n + 1) (1 - a))-th smallest score,

    which holds the realised value with probability at least 1 - a, and at most 1 - a + 1 / (n + 1), whatever the
    distribution, as long as scores are exchangeable (Vovk et al., 2005). Until n >= 1 / a - 1 (nine at 90 %) no finite
    interval keeps that promise and the interval is infinite: nothing may be decided on it.

    Training is not exchangeable, so from then on a itself moves: after each outcome a += step (1 - level - missed)
    (Gibbs and Candes, 2021, arXiv:2106.00170), which brings the long-run coverage to the level for any sequence.

    Args:
        level: coverage wanted, in (0, 1).
        step: of the adaption; 0 is plain split-conformal.
        scores: of earlier predictions, the latest 64, oldest first.
        miss_rate: a; None starts at 1 - level.

    >>> calibration = Conformal(level=0.5, step=0.0).observed(predicted=1.0, scale=1.0, realised=3.0)
    >>> calibration.interval(predicted=1.0, scale=0.5)
    (0.0, 2.0)
    """

    level: float = 0.9
    step: float = 0.03
    scores: tuple[float, ...] = ()
    miss_rate: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise ValueError(f"level must lie between 0 and 1, got {self.level!r}")
        if not 0 <= self.step < 1:
            raise ValueError(f"step must be at least 0 and below 1, got {self.step!r}")
        object.__setattr__(self, "scores", tuple(self.scores))

    @property
    def quantile(self) -> float:
        """q: how many scales wide an interval must be; infinite while too few outcomes are known."""
        n, missed = len(self.scores), self._missed
        # Rounded before the ceiling: 10 * 0.9 is a little more than 9.
        rank = math.ceil(round((n + 1) * (1 - missed), 9))
        if missed <= 0 or rank > n:
            return math.inf
        return sorted(self.scores)[max(rank, 1) - 1]

    @property
    def calibrated(self) -> bool:
        """Whether intervals are finite."""
        return math.isfinite(self.quantile)

    def interval(self, *, predicted: float, scale: float) -> tuple[float, float]:
        """Return (low, high) for a prediction with this scale (> 0), in the unit of the gain."""
        _check(predicted=predicted, scale=scale)
        width = self.quantile * scale
        return predicted - width, predicted + width

    def observed(self, *, predicted: float, scale: float, realised: float) -> Conformal:
        """Learn how a prediction turned out."""
        _check(predicted=predicted, scale=scale, realised=realised)
        score = min(abs(realised - predicted) / scale, _LARGEST)
        adapted = self._missed
        # What came before there could be an interval is no hit of one: counted so, the first ones would be too narrow.
        if len(self.scores) >= math.ceil(round(self.level / (1 - self.level), 9)):
            adapted += self.step * ((1 - self.level) - (score > self.quantile))
        return replace(self, scores=(*self.scores, score)[-_KEPT:], miss_rate=adapted)

    def taught(self, outcomes: Iterable[tuple[float, float, float]]) -> Conformal:
        """Learn the (predicted, scale, realised) of earlier runs."""
        calibration = self
        for predicted, scale, realised in outcomes:
            calibration = calibration.observed(predicted=predicted, scale=scale, realised=realised)
        return calibration

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able fields."""
        return asdict(self) | {"scores": list(self.scores)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Conformal:
        """Rebuild what :meth:`to_dict` wrote."""
        return cls(**plain)

    @property
    def _missed(self) -> float:
        return 1 - self.level if self.miss_rate is None else self.miss_rate


def _check(**values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value!r}")
    if values["scale"] <= 0:
        raise ValueError(f"scale must be positive, got {values['scale']!r}")
