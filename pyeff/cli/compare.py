"""Two runs side by side: what each returned for the same spending, and whether that can be told from noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pyeff.cli.record import Point, RunRecord, flatten
from pyeff.cli.units import Scale, duration, loss_text, percent
from pyeff.errors import UserError
from pyeff.governor.budget import format_amount

# A run of constant rate bends little within a tenth of its budget; across more than that a straight line between two
# evaluations would be an invention.
MAX_INTERPOLATION = 0.1

_ABSENT = "(absent)"
# Settings that say where and how a run is kept, not what it computes.
_NOT_THE_RUN = ("out", "checkpoint_every", "save_model")


@dataclass(frozen=True)
class Comparison:
    """Two runs of one budget unit.

    `difference` is the second run's holdout loss minus the first's at the spending `at` that both reached (positive:
    the first is better), in nats per answer token; None where it was not measured. `standard_error` treats the holdout
    samples as the only source of chance: seeds are not repeated. `paired` says that both runs were judged on the same
    samples one by one; unpaired errors are wider.
    """

    first: RunRecord
    second: RunRecord
    names: tuple[str, str]
    at: float | None
    losses: tuple[float | None, float | None]
    interpolated: bool
    difference: float | None
    standard_error: float | None
    paired: bool
    differing: tuple[tuple[str, Any, Any], ...]
    headline: str


def compare_runs(first: RunRecord, second: RunRecord) -> Comparison:
    """Compare two runs at equal spending.

    Raises UserError when their budgets count different things, or when one of them has no holdout loss at all.
    """
    if first.unit != second.unit:
        raise UserError(
            f"{first.path} counts its budget in {first.unit}, {second.path} in {second.unit}: "
            "only runs that count the same can be compared at equal spending"
        )
    for record in (first, second):
        if not record.losses("holdout"):
            raise UserError(f"{record.path} has no holdout evaluation yet: let it finish, then compare")
    names = _names(first, second)
    # What both were before their first step says nothing about how they were trained.
    curves = [[p for p in r.losses("holdout") if p.step > 0] for r in (first, second)]
    at = min(curve[-1].spent if curve else 0.0 for curve in curves)
    tolerance = 0.02 * max(first.budget, second.budget)
    a, b = (_at(curve, at, tolerance, r.budget) for curve, r in zip(curves, (first, second), strict=True))
    interpolated = bool((a and a[1]) or (b and b[1]))
    difference = error = None
    paired = False
    if a and b:
        difference = b[0].loss - a[0].loss
        if a[0].losses and b[0].losses and len(a[0].losses) == len(b[0].losses) and len(a[0].losses) > 1:
            from pyeff.governor.signals import paired_gain  # a matter of two seconds of SciPy, only where needed

            gain = paired_gain(b[0].losses, a[0].losses)
            difference, error, paired = gain.mean, gain.standard_error, True
        else:
            error = math.hypot(a[0].standard_error, b[0].standard_error)
            error = None if math.isnan(error) else error
    return Comparison(
        first,
        second,
        names,
        at if a and b else None,
        (a[0].loss if a else None, b[0].loss if b else None),
        interpolated,
        difference,
        error,
        paired,
        _differing(first, second),
        _headline(first, second, names, difference, error, at),
    )


def rows(comparison: Comparison) -> list[tuple[str, str, str]]:
    """The comparison as (quantity, first, second), in the order in which it is shown."""
    records = comparison.first, comparison.second
    scale = Scale.of(records[0].unit, max(r.budget for r in records))

    def row(what: str, show: Any) -> tuple[str, str, str]:
        return what, show(records[0]), show(records[1])

    at = "equal spending" if comparison.at is None else scale.text(comparison.at)
    mark = " (interpolated)" if comparison.interpolated else ""
    out = [
        row("policy", lambda r: r.policy),
        row("budget spent", lambda r: scale.of_total(r.spent, r.budget)),
        row("steps", lambda r: str(len(r.of("step")))),
        row("time", lambda r: duration(r.seconds)),
        row("holdout loss, start", lambda r: _point(r.losses("holdout")[0])),
        row("holdout loss, end", lambda r: _point(r.losses("holdout")[-1]) if r.end else "unfinished"),
        (f"holdout loss at {at}{mark}", loss_text(comparison.losses[0]), loss_text(comparison.losses[1])),
        row("exactly right, start", lambda r: _exact(r, "start")),
        row("exactly right, end", lambda r: _exact(r, "end")),
    ]
    fields = list(dict.fromkeys(f for r in records for f in r.where_the_budget_went()))
    for name in fields:
        out.append(row(f"spent on {_spent_on(name)}", lambda r, n=name: _share(r, n, scale)))
    out.append(row("scoring passes", lambda r: str(len(r.of("score")))))
    return out


def notes(comparison: Comparison) -> list[str]:
    """What a reader must know before trusting the headline."""
    said = []
    if comparison.difference is not None:
        judged = "sample by sample" if comparison.paired else "as independent samples, which overstates the error"
        said.append(
            f"The error counts the holdout samples, compared {judged}; "
            "one run each, so the luck of a seed is not in it."
        )
    for record, name in zip((comparison.first, comparison.second), comparison.names, strict=True):
        if record.end is None:
            said.append(f"{name} is unfinished.")
    others = [d for d in comparison.differing if d[0] != "policy"]
    if others:
        listed = ", ".join(f"{key} ({a} and {b})" for key, a, b in others[:6])
        more = f" and {len(others) - 6} more" if len(others) > 6 else ""
        said.append(f"The runs differ in more than the policy: {listed}{more}. The difference may come from these.")
    starts = [r.losses("holdout")[0].loss for r in (comparison.first, comparison.second)]
    if not math.isclose(starts[0], starts[1], rel_tol=1e-4):
        said.append(
            f"They began at different holdout losses ({loss_text(starts[0])} and {loss_text(starts[1])}): "
            "another model or other holdout samples, so their losses need not be comparable."
        )
    return said


def write_comparison(comparison: Comparison, directory: Path) -> Path:
    """Write `compare.png` and `compare.html` into `directory`, which is made if needed; returns the page's path."""
    from pyeff.cli import plots, report

    picture = plots.png(plots.comparison, comparison.first, comparison.second, comparison.names, comparison.headline)
    parts = [
        f'<p class="kicker">pyeff compare {report.esc(comparison.first.path)} {report.esc(comparison.second.path)}</p>',
        f"<h1>{report.esc(comparison.headline)}</h1>",
        *(f'<p class="note">{report.esc(note)}</p>' for note in notes(comparison)),
        report.picture(picture, "Loss of both runs against what was spent, and where each budget went"),
        report.table(["", *comparison.names], rows(comparison), numeric=(1, 2)),
    ]
    if comparison.differing:
        parts.append("<h2>Settings that differ</h2>")
        parts.append(report.table(["setting", *comparison.names], comparison.differing))
    page = directory / "compare.html"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        report.write_atomic(directory / "compare.png", picture)
        report.write_atomic(page, report.page(comparison.headline, parts).encode("utf-8"))
    except OSError as error:
        raise UserError(f"{directory}: the comparison cannot be written: {error.strerror}") from None
    return page


def _at(curve: list[Point], spent: float, tolerance: float, budget: float) -> tuple[Point, bool] | None:
    """The evaluation at `spent` and whether it was interpolated; None where evaluations are too far apart for that."""
    if not curve:
        return None
    nearest = min(curve, key=lambda p: abs(p.spent - spent))
    if abs(nearest.spent - spent) <= tolerance:
        return nearest, False
    for low, high in pairwise(curve):
        if low.spent <= spent <= high.spent and high.spent - low.spent <= MAX_INTERPOLATION * budget:
            share = (spent - low.spent) / (high.spent - low.spent)
            loss = low.loss + share * (high.loss - low.loss)
            return Point(spent, loss, max(low.standard_error, high.standard_error)), True
    return None


def _headline(
    first: RunRecord,
    second: RunRecord,
    names: tuple[str, str],
    difference: float | None,
    error: float | None,
    at: float,
) -> str:
    """One sentence: which run is better at equal spending, or that it cannot be told."""
    spent = Scale.of(first.unit, max(first.budget, second.budget)).text(at)
    untrained = [
        n for n, r in zip(names, (first, second), strict=True) if all(p.step == 0 for p in r.losses("holdout"))
    ]
    if untrained:
        return f"Which run is better cannot be told yet: {untrained[0]} has no holdout loss after training."
    if difference is None or math.isnan(difference):
        return (
            f"Which run is better cannot be told: both did not evaluate the holdout at equal spending ({spent}). "
            f"{_remedy(first, second, at)}"
        )
    selected = [bool(r.of("select")) for r in (first, second)]
    size = f"{loss_text(abs(difference))} nats"
    noise = f" (standard error {loss_text(error)})" if error is not None else ""
    if error is None or abs(difference) <= 2 * error:
        about = "Whether selection paid" if selected[0] != selected[1] else "Which run is better"
        return f"{about} cannot be told: the holdout losses differ by {size} at {spent}{noise}."
    better = 0 if difference > 0 else 1
    result = f"{names[better]}'s holdout loss is {size} lower than {names[1 - better]}'s at {spent}{noise}."
    if selected[0] != selected[1]:
        paid = selected[better]
        return f"Selection {'paid' if paid else 'did not pay'}: {result}"
    return result[0].upper() + result[1:]


def _remedy(first: RunRecord, second: RunRecord, at: float) -> str:
    """What would let runs be compared that spent different amounts."""
    if first.budget != second.budget:
        return "Compare runs of the same budget."
    budget = format_amount(at, first.unit)
    return f"One of them ended early: give the other the budget that it used (--budget '{budget}')."


def _names(first: RunRecord, second: RunRecord) -> tuple[str, str]:
    """How two runs are called: by policy where that tells them apart, else by directory."""
    if first.policy != second.policy:
        return first.policy, second.policy
    if first.name != second.name:
        return first.name, second.name
    return str(first.path), str(second.path)


def _differing(first: RunRecord, second: RunRecord) -> tuple[tuple[str, Any, Any], ...]:
    a, b = (dict(flatten(r.start.get("config") or {})) for r in (first, second))
    # A policy given on the command line may not have reached the configuration; the event is what ran.
    a["policy"], b["policy"] = first.policy, second.policy
    ignored = list(_NOT_THE_RUN)
    if "uniform" in (first.policy, second.policy):
        # A uniform run never selects: how it would is no setting of it. How often it looks is.
        ignored += ["selector", *(k for k in (*a, *b) if k.startswith("governor.") and k != "governor.check_every")]
    keys = [k for k in dict.fromkeys([*a, *b]) if k not in ignored and k.split(".")[0] not in ignored]
    return tuple((k, a.get(k, _ABSENT), b.get(k, _ABSENT)) for k in keys if a.get(k, _ABSENT) != b.get(k, _ABSENT))


def _point(point: Point) -> str:
    error = "" if math.isnan(point.standard_error) else f" ± {loss_text(point.standard_error)}"
    return loss_text(point.loss) + error


def _exact(record: RunRecord, when: str) -> str:
    found = [e for e in record.of("exact_match") if e["when"] == when]
    return f"{found[-1]['correct']} of {found[-1]['total']}" if found else "n/a"


def _share(record: RunRecord, name: str, scale: Scale) -> str:
    amount = record.where_the_budget_went().get(name, 0.0)
    return f"{scale.text(amount)} ({percent(amount, record.budget)})" if amount else "nothing"


def _spent_on(name: str) -> str:
    return {"eval": "evaluation", "score": "scoring", "train": "training", "probe": "probing"}.get(name, name)
