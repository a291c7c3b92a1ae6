"""The gains that a run's decisions promised beside those that the next checks measured: a picture and a sentence."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from pyeff.cli.plots import BLUE, INK, ORANGE, VERMILION, right_edge
from pyeff.cli.record import Event, RunRecord, observation

if TYPE_CHECKING:
    from pyeff.governor import Audit, Decision

# Times the median rate: where the largest is beyond, a linear axis shows the others as zero.
_WIDE = 20


@dataclass(frozen=True)
class Kept:
    """One promise and its outcome, in nats per unit of the budget.

    `interval` is the calibrated one of the promise, None before nine outcomes; `error` the 95 % interval of what was
    measured, None where the event does not say. `spent` is where the promise was made, `action` the decision's.
    """

    spent: float
    action: str
    predicted: float
    interval: tuple[float, float] | None
    realised: float
    error: tuple[float, float] | None


def audit_of(record: RunRecord) -> Audit:
    """The audit of a run from its events, as `pyeff audit` takes it from its log; what is damaged promised nothing."""
    from pyeff.governor import audit_decisions

    return audit_decisions([_decision(event) for event in record.of("decision")])


def kept(record: RunRecord) -> list[Kept]:
    """Every promise that a later check judged, in the order of the decisions."""
    from pyeff.governor import audit_decisions

    found = []
    for event, following in itertools.pairwise(record.of("decision")):
        for outcome in audit_decisions([_decision(event), _decision(following)]).outcomes:
            known = outcome.low is not None and outcome.high is not None
            found.append(
                Kept(
                    spent=record.spent_at(event),
                    action=event["action"],
                    predicted=outcome.predicted,
                    interval=(outcome.low or 0.0, outcome.high or 0.0) if known else None,
                    realised=outcome.realised,
                    error=_measured(following),
                )
            )
    return found


def promises(record: RunRecord) -> Figure:
    """Each promised rate of gain with its interval, and the rate that was measured until the next check with its own.

    Where rates fall by orders of magnitude within a run, the axis is linear around zero, up to the median size of the
    measured ones, and logarithmic beyond.
    """
    found, scale = kept(record), record.scale
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    usual = statistics.median(abs(each.realised) for each in found)
    largest = max(abs(rate) for each in found for rate in (each.predicted, each.realised))
    if 0 < _WIDE * usual < largest:
        axes.set_yscale("symlog", linthresh=scale.divisor * usual, linscale=1.0)
    axes.axhline(0, color="#9AA0A6", lw=0.8, zorder=1)
    shift = 0.004 * max(each.spent for each in found) / scale.divisor  # so that the two intervals stand side by side
    places = [each.spent / scale.divisor for each in found]
    for x, each in zip(places, found, strict=True):
        if each.action != "CONTINUE":
            axes.axvline(x, color=INK, lw=0.8, ls=":", zorder=1)
        if each.interval is not None:
            low, high = (scale.divisor * side for side in each.interval)
            axes.vlines(x - shift, low, high, color=BLUE, lw=4, alpha=0.3, zorder=2)
        if each.error is not None:
            low, high = (scale.divisor * side for side in each.error)
            axes.vlines(x + shift, low, high, color=VERMILION, lw=1.2, zorder=3)
    axes.plot(
        [x - shift for x in places],
        [scale.divisor * each.predicted for each in found],
        "_",
        ms=13,
        mew=2,
        color=BLUE,
        label="promised, with its calibrated 90 % interval from nine outcomes on",
        zorder=4,
    )
    axes.plot(
        [x + shift for x in places],
        [scale.divisor * each.realised for each in found],
        "o",
        ms=5,
        color=VERMILION,
        mec="white",
        label="measured by the next check, with the 95 % interval of the anchors",
        zorder=5,
    )
    if any(each.action != "CONTINUE" for each in found):
        axes.plot([], [], color=INK, lw=0.8, ls=":", label="a decision other than CONTINUE")
    if any(start < stop for start, stop in record.scoring_spans()):
        axes.fill([], [], color=ORANGE, alpha=0.16, label="scoring the pool")
    for start, stop in record.scoring_spans():
        axes.axvspan(start / scale.divisor, stop / scale.divisor, color=ORANGE, alpha=0.16, lw=0)
    axes.set_xlim(0, right_edge(record, scale))
    axes.set_title("Gain until the next check, promised and measured")
    axes.set_ylabel(f"nats per {scale.name}")
    axes.set_xlabel(scale.axis_label)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=8.5, columnspacing=1.2)
    return figure


def _decision(event: Event) -> Decision:
    """The decision of an event, as far as an audit needs it: of its action it asks nothing."""
    from pyeff.governor import Action, Decision

    return Decision(
        step=event["step"],
        action=Action.CONTINUE,
        reason=str(event["reason"]),
        inputs={"observation": observation(event)},
        values={},
        estimates=_estimates(event),
    )


def _estimates(event: Event) -> dict[str, Any]:
    """What the decision estimated, without promises and rates that are no numbers."""
    estimates = event.get("estimates")
    if not isinstance(estimates, dict):
        return {}
    forecast, rate = estimates.get("forecast"), estimates.get("gain_rate")
    promise = None
    if isinstance(forecast, dict) and _is_finite(forecast.get("rate")):
        low, high = forecast.get("low"), forecast.get("high")
        known = _is_finite(low) and _is_finite(high)
        promise = {"rate": forecast["rate"], "low": low if known else None, "high": high if known else None}
    return {**estimates, "forecast": promise, "gain_rate": rate if _is_finite(rate) else None}


def _is_finite(value: Any) -> bool:
    # Whole numbers of JSON have no bound: one that no float holds is none of ours.
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def _measured(event: Event) -> tuple[float, float] | None:
    """The interval of the rate of gain that a check measured, from that of its gain."""
    estimates = _estimates(event)
    gain, rate = estimates.get("gain"), estimates.get("gain_rate")
    if not (isinstance(gain, dict) and all(_is_finite(gain.get(name)) for name in ("mean", "low", "high"))):
        return None
    if not (rate and gain["mean"]):
        return None
    # Gain and rate differ by what was trained in between.
    trained = gain["mean"] / rate
    low, high = gain["low"] / trained, gain["high"] / trained
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None
