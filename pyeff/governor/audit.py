"""Hold a log of decisions against what happened: predicted and realised gains, and how often intervals covered."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pyeff.governor.observation import Decision


@dataclass(frozen=True)
class Outcome:
    """One decision's promise and what the next check measured; rates in nats per unit of the budget.

    ``low`` and ``high`` are None while too few outcomes were known to calibrate an interval.
    """

    step: int
    action: str
    predicted: float
    low: float | None
    high: float | None
    realised: float

    @property
    def covered(self) -> bool | None:
        """Whether the interval holds the realised rate; None without an interval."""
        if self.low is None or self.high is None:
            return None
        return self.low <= self.realised <= self.high


@dataclass(frozen=True)
class Audit:
    """All promises of a log.

    Args:
        outcomes: in the order of the decisions.
        unjudged: decisions without a promise, or without a measured gain after them.
    """

    outcomes: tuple[Outcome, ...]
    unjudged: int

    @property
    def judged(self) -> int:
        """How many outcomes had a calibrated interval."""
        return sum(outcome.covered is not None for outcome in self.outcomes)

    @property
    def coverage(self) -> float | None:
        """Share of calibrated intervals that held the realised gain; None where there were none."""
        return sum(bool(outcome.covered) for outcome in self.outcomes) / self.judged if self.judged else None

    @property
    def coverage_interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % interval of the coverage, which takes outcomes as independent."""
        n, share = self.judged, self.coverage
        if share is None:
            return None
        z = 1.959963984540054
        centre = (share + z * z / 2 / n) / (1 + z * z / n)
        width = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + (z / 2 / n) ** 2)
        return max(centre - width, 0.0), min(centre + width, 1.0)

    @property
    def median_ratio(self) -> float | None:
        """Median of realised over predicted gain: below 1 where promises were too large."""
        ratios = sorted(item.realised / item.predicted for item in self.outcomes if item.predicted > 0)
        if not ratios:
            return None
        middle = len(ratios) // 2
        return ratios[middle] if len(ratios) % 2 else (ratios[middle - 1] + ratios[middle]) / 2


def audit_decisions(decisions: Sequence[Decision]) -> Audit:
    """Pair each decision's promise with the gain the next check measured.

    Args:
        decisions: a whole log in order, as `read_decisions` returns it. Promises stand in ``estimates["forecast"]``,
            realised rates in the next decision's ``estimates["gain_rate"]``. What a check measured counts only where it
            began at the decision before it: not across a line that is missing, repeated or of another run.

    Raises ValueError for estimates that are not those of a decision.
    """
    outcomes = []
    for decision, following in itertools.pairwise(decisions):
        try:
            promise, realised = decision.estimates.get("forecast"), following.estimates.get("gain_rate")
            if promise is None or realised is None or not _follows(decision, following):
                continue
            low, high = promise["low"], promise["high"]
            rates = [None if rate is None else float(rate) for rate in (promise["rate"], low, high, realised)]
            predicted, low, high, measured = rates
            if predicted is None or measured is None:
                raise TypeError("a rate is missing")
        except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
            raise ValueError(f"the decision of step {decision.step} or the next holds no rates: {error}") from error
        outcomes.append(Outcome(decision.step, decision.key, predicted, low, high, measured))
    return Audit(tuple(outcomes), len(decisions) - len(outcomes))


def _follows(decision: Decision, following: Decision) -> bool:
    """Whether the later one's interval began where the earlier one was taken."""
    before, after = (each.inputs.get("observation", {}) for each in (decision, following))
    return decision.step < following.step and before.get("spent") == after.get("spent_before")
