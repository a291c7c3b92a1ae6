"""A run directory read back: `events.jsonl`, checked line by line, and the answers a report needs from it.

The event stream alone is the record of a run. A last line without its newline belongs to a run that is still
being written or was killed, and is left out; anything else that cannot be read is an error, for a report over
half-read events would mislead.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyeff.cli.units import Scale, percent, plural
from pyeff.errors import UserError

Event = dict[str, Any]

EVENT_FORMAT = 1
"""The event format that this version writes and reads (`start.format`; absent means 1)."""

LEDGER_FIELDS = ("train", "cooldown", "score", "eval", "probe", "discarded")

# What a report cannot do without; fields beyond these are read where they are present.
_REQUIRED: dict[str, tuple[str, ...]] = {
    "start": ("budget", "policy", "model"),
    "step": ("step", "phase", "loss"),
    "evaluate": ("step", "set", "loss"),
    "score": ("step", "samples", "flops"),
    "select": ("step", "kept", "of", "by_source"),
    "decision": ("step", "action", "reason"),
    "exact_match": ("when", "correct", "total"),
    "end": ("step", "ledger", "holdout"),
}
_NUMBERS = ("spent", "time", "step", "loss", "standard_error", "flops", "kept", "of", "correct", "total")
# Which ledger field the spending since the previous event belongs to, by kind; steps say it themselves.
_FIELD_OF = {
    "evaluate": "eval",
    "exact_match": "eval",
    "score": "score",
    "select": "score",
    "probe": "probe",
    "checkpoint": "train",
    "resume": "discarded",
}


@dataclass(frozen=True)
class Point:
    """One evaluation: `loss` in nats per token after `spent` of the budget; standard error NaN: unknown."""

    spent: float
    loss: float
    standard_error: float = math.nan
    step: int = 0
    losses: tuple[float, ...] | None = None


@dataclass
class Spending:
    """The budget so far by ledger field, from the differences of `spent` between successive events."""

    total: float = 0.0
    by_field: dict[str, float] = field(default_factory=dict)

    def add(self, event: Mapping[str, Any]) -> None:
        """Charge what was spent since the previous event to the field of this event's kind."""
        spent = event.get("spent")
        if spent is None or not spent > self.total:
            return
        kind = event["kind"]
        name = event.get("phase", "train") if kind == "step" else _FIELD_OF.get(kind, "eval")
        # Of a step that chose among candidates, what that took.
        chosen = min(event.get("scored") or 0.0, spent - self.total) if kind == "step" else 0.0
        for field_name, amount in ((name, spent - self.total - chosen), ("score", chosen)):
            if amount:
                self.by_field[field_name] = self.by_field.get(field_name, 0.0) + amount
        self.total = spent


@dataclass(frozen=True)
class RunRecord:
    """The events of one run, finished or not, in the order in which they were written."""

    path: Path
    events: tuple[Event, ...]

    @property
    def start(self) -> Event:
        """The first event: configuration, budget, policy, model and pool."""
        return self.events[0]

    @property
    def end(self) -> Event | None:
        """The last event of a finished run; None while it is unfinished."""
        return self.events[-1] if self.events[-1]["kind"] == "end" else None

    @property
    def name(self) -> str:
        """The run directory's own name."""
        return self.path.resolve().name

    @property
    def policy(self) -> str:
        """`governor` or `uniform`."""
        return str(self.start["policy"])

    @property
    def unit(self) -> str:
        """The unit of the budget: `flops`, `seconds` or `tokens`."""
        return str(self.start["budget"]["unit"])

    @property
    def budget(self) -> float:
        """The budget in its unit."""
        return float(self.start["budget"]["amount"])

    @property
    def scale(self) -> Scale:
        """How this run's amounts are shown."""
        return Scale.of(self.unit, self.budget)

    @property
    def spent(self) -> float:
        """What the last event says was spent, in the budget's unit."""
        return max((float(e["spent"]) for e in self.events if e.get("spent") is not None), default=0.0)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds: from the ledger when the run is finished, else between first and last event."""
        if self.end is not None:
            charged = [row.get("seconds") or 0.0 for row in self.end["ledger"].values()]
            if any(charged):
                return float(sum(charged))
        times = [e["time"] for e in self.events if e.get("time") is not None]
        return float(times[-1] - times[0]) if times else math.nan

    def of(self, kind: str) -> list[Event]:
        """All events of one kind."""
        return [e for e in self.events if e["kind"] == kind]

    @property
    def batch_selection(self) -> dict[str, Any] | None:
        """What was chosen within batches and what that took, as far as the events tell; None where all is taken."""
        found = [e["batch_selection"] for e in self.events if isinstance(e.get("batch_selection"), dict)]
        return found[-1] if found else None

    def spent_at(self, event: Event) -> float:
        """What was spent when `event` was written; the latest known amount where it does not say."""
        if event.get("spent") is not None:
            return float(event["spent"])
        latest = 0.0
        for other in self.events:
            if other is event:
                break
            if other.get("spent") is not None:
                latest = float(other["spent"])
        return latest

    def losses(self, which: str) -> list[Point]:
        """The evaluations on "anchors" or "holdout", in order."""
        return [
            Point(
                self.spent_at(e),
                _float(e["loss"]),
                _float(e.get("standard_error")),
                int(e["step"]),
                _losses(e.get("losses")),
            )
            for e in self.of("evaluate")
            if e["set"] == which
        ]

    def scoring_spans(self) -> list[tuple[float, float]]:
        """Where on the budget's axis the pool was scored: (from, to) in the budget's unit."""
        spans = []
        before = 0.0
        for event in self.events:
            now = self.spent_at(event)
            if event["kind"] == "score":
                spans.append((before, now))
            before = max(before, now)
        return spans

    def where_the_budget_went(self) -> dict[str, float]:
        """Amount by ledger field in the budget's unit, non-zero fields only, in the order of `LEDGER_FIELDS`.

        From the ledger of the end event; for an unfinished run from the differences of `spent` between events.
        Discarded work is left out of FLOPs and tokens, where it was repeated; only seconds are gone for good.
        A token budget counts only training tokens.
        """
        if self.end is not None:
            ledger = self.end["ledger"]
            names = [*LEDGER_FIELDS, *(n for n in ledger if n not in LEDGER_FIELDS)]
            if self.unit != "seconds":
                names.remove("discarded")
            if self.unit == "tokens":
                names = ["train", "cooldown"]
            amounts = {n: float(ledger.get(n, {}).get(self.unit) or 0.0) for n in names}
        else:
            spending = Spending()
            for event in self.events:
                spending.add(event)
            amounts = {n: spending.by_field.get(n, 0.0) for n in LEDGER_FIELDS}
        return {n: a for n, a in amounts.items() if a > 0}

    def target_sources(self) -> set[str]:
        """The names of the target task's own sources, as far as the exact-match events tell them."""
        return {name for e in self.of("exact_match") for name in e.get("by_source") or {}}


def load_run(path: Path | str) -> RunRecord:
    """Read and check the events of the run directory `path`.

    Raises UserError, naming file and line, for a directory that is missing, is no run directory, has no events
    yet, holds a line that is not an event, or was written in another event format.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"{path} is {'a file' if path.exists() else 'missing'}: expected the directory of a run "
            "(the `out` of its configuration)"
        )
    file = path / "events.jsonl"
    try:
        text = file.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{path} has no events.jsonl: it is not the directory of a run, or the run has not started yet"
        ) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{file}, line {line}: not UTF-8 text, the file is damaged") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    lines = text.split("\n")[:-1]  # what follows the last newline is torn or empty
    events = tuple(_parse(file, i, line) for i, line in enumerate(lines, start=1) if line.strip())
    if not events:
        raise UserError(f"{file} has no events yet: the run is still loading its model, or stopped before it began")
    _check_start(file, events[0])
    return RunRecord(path, events)


def _parse(file: Path, line_number: int, line: str) -> Event:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{file}, line {line_number}: not JSON, the file is damaged") from None
    if not isinstance(event, dict) or not isinstance(event.get("kind"), str):
        raise UserError(f"{file}, line {line_number}: not an event (an object with a `kind`)")
    kind = event["kind"]
    missing = [key for key in _REQUIRED.get(kind, ()) if key not in event]
    if missing:
        raise UserError(
            f"{file}, line {line_number}: event `{kind}` has no `{missing[0]}`; "
            "the run was written by another version of pyeff, make its report with that version"
        )
    for key in _NUMBERS:
        value = event.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"{file}, line {line_number}: `{key}` of event `{kind}` must be a number, got {value!r}")
    return event


def _check_start(file: Path, start: Event) -> None:
    if start["kind"] != "start":
        raise UserError(f"{file}, line 1: expected the event `start`, found `{start['kind']}`; the beginning is lost")
    found = start.get("format", EVENT_FORMAT)
    if found != EVENT_FORMAT:
        raise UserError(
            f"{file} is in event format {found}, this version of pyeff reads format {EVENT_FORMAT}; "
            "make its report with the version that wrote it"
        )
    budget = start["budget"]
    if (
        not isinstance(budget, dict)
        or budget.get("unit") not in ("flops", "seconds", "tokens")
        or not isinstance(budget.get("amount"), int | float)
    ):
        raise UserError(
            f"{file}, line 1: `budget` must hold amount and unit (flops, seconds or tokens), got {budget!r}"
        )


def _losses(values: Any) -> tuple[float, ...] | None:
    """Losses sample by sample, or None where they were not written or one of them is not finite."""
    if not values or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        return None
    return tuple(float(v) for v in values)


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield the leaves of a nested configuration as (dotted key, value)."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def observation(decision: Event) -> dict[str, Any]:
    """What the policy saw when it took this decision; empty where the event does not say."""
    inputs = decision.get("inputs")
    if not isinstance(inputs, dict):
        return {}
    nested = inputs.get("observation")
    return nested if isinstance(nested, dict) else inputs


def estimate_text(start: Event) -> str:
    """What a run expected to cost, from its start event, in one line; empty where it estimated nothing."""
    estimates = start.get("estimates") or {}
    unit, budget = start["budget"]["unit"], float(start["budget"]["amount"])

    def flops(key: str) -> str:
        amount = float(estimates[key])
        share = f" ({percent(amount, budget)} of the budget)" if unit == "flops" else ""
        return Scale.of("flops", amount).text(amount) + share

    said = []
    if estimates.get("steps") is not None:
        said.append(f"about {plural(int(estimates['steps']), 'step')}")
    if estimates.get("train_flops_per_token") is not None:
        amount = float(estimates["train_flops_per_token"])
        said.append(f"{Scale.of('flops', amount).text(amount)} for a training token")
    if estimates.get("score_pool_flops") is not None:
        said.append(f"{flops('score_pool_flops')} to score the pool")
    if estimates.get("check_flops") is not None:
        said.append(f"{flops('check_flops')} for a check")
    if estimates.get("cooldown_reserve") is not None:
        amount = float(estimates["cooldown_reserve"])
        said.append(f"{Scale.of(unit, budget).text(amount)} kept for the cooldown")
    return ", ".join(said)


def memory_text(start: Event) -> str:
    """What the planner chose within `memory`, and what it predicts; empty where nothing was planned."""
    from pyeff.memory.plans import size_text

    plan = start.get("memory")
    if not isinstance(plan, dict):
        return ""
    return (
        f"checkpointing {plan['checkpointing']}, micro_batch_tokens {plan['micro_batch_tokens']}: a step is predicted "
        f"to need {size_text(plan['predicted_peak'])} of {size_text(plan['limit'])}, in the {plan['peak_phase']}"
    )


def batch_selection_text(chosen: Mapping[str, Any], scale: Scale, budget: float) -> str:
    """What was kept of the candidates and what choosing took."""
    kept, candidates = int(chosen["kept"]), int(chosen["candidates"])
    cost = "nothing"
    if chosen["spent"]:
        cost = f"{scale.text(chosen['spent'])} ({percent(chosen['spent'], budget)} of the budget)"
    share = percent(kept, candidates) if candidates else "nothing yet"
    return f"{chosen['method']} kept {kept:,} of {candidates:,} candidates ({share}), which took {cost}"
