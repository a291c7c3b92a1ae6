"""`pyeff replay` and `pyeff audit`: take a run's decisions again, and hold its promises against what happened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pyeff.cli.units import Scale, plural
from pyeff.errors import UserError

if TYPE_CHECKING:
    from pyeff.governor import Audit, Decision


def log_of(run: Path) -> Path:
    """Return the log of a run's directory, or the path itself where it is a log."""
    path = run / "decisions.jsonl" if run.is_dir() else run
    if not run.exists():
        raise UserError(f"{run}: there is no such directory and no such log")
    if not path.is_file():
        raise UserError(f"{run}: no decisions.jsonl in it, so it is neither the directory of a run nor a log")
    return path


def replayed(path: Path) -> tuple[RenderableType, int]:
    """Take every decision again; returns a table of those that differ, and how many do."""
    from pyeff.governor import replay

    try:
        pairs = replay(path)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    if not pairs:
        return Text(f"{path} holds no decision."), 0
    different = [(logged, again) for logged, again in pairs if logged != again]
    if not different:
        return Text(f"All {len(pairs)} decisions of {path} come out as they were logged."), 0
    table = Table(
        title=f"{len(different)} of {len(pairs)} decisions of {path} come out otherwise", title_justify="left"
    )
    for title in ("step", "logged", "replayed", "difference"):
        table.add_column(title)
    for logged, again in different:
        table.add_row(str(logged.step), logged.key, again.key, ", ".join(_differing(logged, again)))
    return table, len(different)


def audited(path: Path) -> RenderableType:
    """Predicted against realised gains, one line a decision, and their coverage."""
    from pyeff.governor import audit_decisions, read_decisions

    try:
        decisions = read_decisions(path)
        found = audit_decisions(decisions)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    per, unit = _unit(decisions)
    table = Table(title=f"Rates of gain, nats per {unit}", title_justify="left")
    for title in ("step", "decision", "predicted", "90 % interval", "realised", "covered"):
        table.add_column(title, justify="left" if title in ("decision", "covered") else "right")
    for item in found.outcomes:
        interval = (
            "not calibrated yet"
            if item.low is None or item.high is None
            else f"{per * item.low:.3g} to {per * item.high:.3g}"
        )
        covered = {None: "", True: "yes", False: "no"}[item.covered]
        predicted, realised = f"{per * item.predicted:.3g}", f"{per * item.realised:.3g}"
        table.add_row(str(item.step), item.action, predicted, interval, realised, covered)
    return Group(table, Text(audit_sentence(found)))


def _unit(decisions: Sequence[Decision]) -> tuple[float, str]:
    """What rates of gain are given per, so that they are readable: (amount of the budget's unit, its name)."""
    try:
        seen = decisions[0].inputs["observation"]
        scale = Scale.of(seen["unit"], float(seen["budget"]))
    except (IndexError, KeyError, TypeError, ValueError):
        return 1.0, "unit of the budget"
    return scale.divisor, scale.name


def audit_sentence(found: Audit) -> str:
    """What an audit says in words."""
    if not found.outcomes:
        return "No decision made a promise that a later check could judge."
    promised = sum(item.predicted > 0 for item in found.outcomes)
    sentence = f"{plural(len(found.outcomes), 'promise')} could be judged by a later check"
    sentence += f", {plural(found.unjudged, 'decision')} made none or had none after."
    if found.median_ratio is not None:
        sentence += (
            f" {promised} promised a gain; what followed was {found.median_ratio:.2f} times as much in the median."
        )
    if found.coverage is None or found.coverage_interval is None:
        return sentence + " No interval was calibrated: that takes nine outcomes."
    low, high = found.coverage_interval
    return sentence + (
        f" Of {found.judged} calibrated 90 % intervals {found.coverage:.0%} held the gain "
        f"(95 % interval of that share: {low:.0%} to {high:.0%})."
    )


def _differing(logged: Decision, again: Decision) -> list[str]:
    before, after = logged.to_dict(), again.to_dict()
    return [name for name in before if before[name] != after[name]]
