"""What a run may claim about itself, in one plain sentence: did selection pay, or can that not be told?"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pyeff.cli.record import RunRecord
from pyeff.cli.units import loss_text, percent


@dataclass(frozen=True)
class Verdict:
    """`paid` is None where it cannot be told; `headline` is one line, `detail` the run's own account or empty."""

    paid: bool | None
    headline: str
    detail: str


def loss_change(before: float | None, after: float | None, standard_error: float | None) -> str:
    """How the holdout loss moved, without a full stop; a change within two standard errors counts as none."""
    if before is None or after is None or math.isnan(before) or math.isnan(after):
        return "The holdout loss was not measured"
    numbers = f"from {loss_text(before)} to {loss_text(after)}"
    gain = before - after
    known = standard_error is not None and not math.isnan(standard_error)
    if known and abs(gain) <= 2 * standard_error:  # type: ignore[operator]
        error = loss_text(standard_error)
        return f"The holdout loss did not change measurably ({numbers}, standard error {error})"
    return f"The holdout loss {'fell' if gain > 0 else 'rose'} {numbers}"


def verdict(record: RunRecord) -> Verdict:
    """The verdict of a finished run, from its end event; an unfinished run has none yet.

    One run has no twin to be compared with: `selection_paid` is the run's own estimate from its gain rates
    before and after a selection. `pyeff compare` with a uniform run of the same budget is the measurement.
    """
    end = record.end
    if end is None:
        share = percent(record.spent, record.budget)
        return Verdict(
            None,
            f"Unfinished: {share} of {record.scale.text(record.budget)} spent; "
            "whether selection pays cannot be told yet.",
            "",
        )
    holdout = end["holdout"]
    change = loss_change(holdout.get("before"), holdout.get("after"), holdout.get("standard_error"))
    paid = end.get("selection_paid")
    detail = str(end.get("sentence") or "")
    selections = len(record.of("select"))
    if not selections:
        paid = None  # nothing was selected, so nothing can have paid, whatever the event says
        if record.policy == "uniform":
            headline = f"No selection was made (uniform policy). {change}."
        else:
            headline = f"The governor selected nothing, so selection can neither have paid nor cost. {change}."
    elif paid is None:
        headline = f"Whether selection paid cannot be told from this run. {change}."
    elif paid:
        headline = f"Selection paid by the run's own estimate. {change}."
    else:
        headline = f"Selection did not pay. {change}."
    if record.batch_selection is not None:
        method = record.batch_selection["method"]
        headline += f" Each step chose within its batch by {method}: only a run without that tells what it was worth."
    return Verdict(paid, headline, detail)
