"""What a person sees while a run goes on: a live panel in a terminal, plain lines everywhere else.

Both are observers of the event stream: `observer(event)`. They keep only what they show and decide nothing.
"""

from __future__ import annotations

import math
import time
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pyeff.cli.record import Event, Spending, batch_selection_text, estimate_text, load_run, memory_text, observation
from pyeff.cli.units import Scale, duration, loss_text, number, percent, plural

_BARS = "▁▂▃▄▅▆▇█"
# Okabe and Ito's colours, as in the plots; each field also has its own letter in the bar's legend.
_FIELD_STYLES = {
    "train": "#0072B2",
    "cooldown": "#56B4E9",
    "score": "#E69F00",
    "eval": "#009E73",
    "probe": "#CC79A7",
    "discarded": "#8A8F94",
}
_FIELD_NAMES = {"train": "train", "cooldown": "cooldown", "score": "score", "eval": "eval"}
_ACTION_STYLES = {"CONTINUE": "bold", "REFRESH": "bold #E69F00", "COOLDOWN": "bold #56B4E9"}


class Progress:
    """The state of a run as far as it is shown, fed with events."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        self.started = time.monotonic()
        self._forget()

    def _forget(self) -> None:
        self.scale = Scale.of("flops", 1e12)
        self.budget = math.nan
        self.policy = ""
        self.model: dict[str, Any] = {}
        self.pool: dict[str, Any] = {}
        self.spending = Spending()
        self.losses: list[float] = []
        self.anchors: list[tuple[float, float]] = []
        self.holdout: list[float] = []
        self.last_step: Event | None = None
        self.latest: Event | None = None
        self.latest_turn: Event | None = None  # the latest decision that changed something
        self.counts: dict[str, int] = {}
        self.gain: tuple[float, float] | None = None
        self.exact: Event | None = None
        self.selection: Event | None = None
        self.kept = (0, 0)  # of the candidates in all batches
        self.doing = "loading model and data"
        self.resumed_at = 0.0
        self.end: Event | None = None

    def __call__(self, event: Event) -> None:
        """Take in one event; kinds that are not shown are ignored."""
        if event["kind"] == "resume" and self.directory is not None:
            self._read_back()
        self._take(event)

    def _take(self, event: Event) -> None:
        self.spending.add(event)
        kind = event["kind"]
        take = getattr(self, f"_on_{kind}", None)
        if take is not None:
            take(event)

    @property
    def seconds(self) -> float:
        """Seconds since the display began."""
        return time.monotonic() - self.started

    @property
    def remaining_seconds(self) -> float:
        """Seconds to the end at the pace so far; NaN while that says nothing."""
        spent = self.spending.total - self.resumed_at
        if spent < 0.03 * self.budget:
            return math.nan
        return self.seconds * max(self.budget - self.spending.total, 0.0) / spent

    def _on_start(self, event: Event) -> None:
        budget = event["budget"]
        self.budget = float(budget["amount"])
        self.scale = Scale.of(budget["unit"], self.budget)
        self.policy = str(event["policy"])
        self.model = event.get("model") or {}
        self.pool = event.get("pool") or {}
        self.doing = "first evaluation"

    def _on_resume(self, event: Event) -> None:
        self.resumed_at = float(event.get("spent") or 0.0)
        self.doing = "resumed from a checkpoint"

    def _read_back(self) -> None:
        """Take in the events of the run before it was resumed: its file holds them, the observers never saw them."""
        assert self.directory is not None
        self._forget()
        for event in load_run(self.directory).events[:-1]:  # the last one is the resume itself
            self._take(event)

    def _on_step(self, event: Event) -> None:
        self.last_step = event
        if event.get("candidates"):
            kept, candidates = self.kept
            self.kept = (kept + int(event["kept"]), candidates + int(event["candidates"]))
        if event["loss"] is not None:
            self.losses.append(float(event["loss"]))
        self.doing = "cooldown" if event["phase"] == "cooldown" else "training"

    def _on_evaluate(self, event: Event) -> None:
        if event["loss"] is None:
            return
        if event["set"] == "anchors":
            self.anchors.append((self.spending.total, float(event["loss"])))
        else:
            self.holdout.append(float(event["loss"]))

    def _on_decision(self, event: Event) -> None:
        self.latest = event
        if event["action"] != "CONTINUE":
            self.latest_turn = event
        self.counts[event["action"]] = self.counts.get(event["action"], 0) + 1
        self.gain = self._measured_gain(observation(event))
        if event["action"] == "REFRESH":
            size = self.pool.get("samples")
            self.doing = f"scoring {size} samples" if size else "scoring the pool"

    def _measured_gain(self, inputs: dict[str, Any]) -> tuple[float, float] | None:
        """Gain per PFLOP, minute or 1000 tokens since the last check, and its standard error (NaN: unknown)."""
        before, now = inputs.get("anchors_before"), inputs.get("anchors_now")
        start, stop = inputs.get("spent_before"), inputs.get("spent")
        if before and now and len(before) == len(now) > 1 and start is not None and stop is not None:
            finite = all(isinstance(loss, int | float) for loss in (*before, *now))
            if finite and stop > start:
                gains = [b - a for b, a in zip(before, now, strict=True)]
                mean = math.fsum(gains) / len(gains)
                variance = math.fsum((g - mean) ** 2 for g in gains) / (len(gains) - 1)
                error = math.sqrt(variance / len(gains))
                return self.scale.rate(mean, stop - start), self.scale.rate(error, stop - start)
        if len(self.anchors) > 1:
            (x0, y0), (x1, y1) = self.anchors[-2:]
            return self.scale.rate(y0 - y1, x1 - x0), math.nan
        return None

    def _on_score(self, event: Event) -> None:
        self.doing = "selecting"

    def _on_select(self, event: Event) -> None:
        self.selection = event
        self.doing = "training on the selection"

    def _on_exact_match(self, event: Event) -> None:
        self.exact = event

    def _on_end(self, event: Event) -> None:
        self.end = event
        self.doing = "finished"


class LiveDisplay(Progress):
    """A panel that is redrawn in place; a context manager around the run."""

    def __init__(self, console: Console, *, directory: Path | None = None) -> None:
        super().__init__(directory)
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self.render, transient=False)

    def __enter__(self) -> LiveDisplay:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def __call__(self, event: Event) -> None:
        """Take in one event; the panel shows it at its next frame."""
        if event["kind"] == "warning":
            self._console.print(Text(_warning(event), style="yellow"))
        if event["kind"] == "start":
            self._console.print(_announcement(event), markup=False, highlight=False)
        super().__call__(event)

    def render(self) -> RenderableType:
        """The panel as it stands."""
        width = max(20, min(self._console.width, 110) - 4)
        if math.isnan(self.budget):
            return Panel(f"{self.doing} · {duration(self.seconds)}", title="pyeff", title_align="left", width=width + 4)
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="dim", no_wrap=True)
        rows.add_column()
        rows.add_row("now", self._now())
        rows.add_row("loss", self._loss())
        rows.add_row("gain", self._gain())
        if self.exact is not None:
            rows.add_row(
                "answers", f"{self.exact['correct']} of {self.exact['total']} exactly right ({self.exact['when']})"
            )
        if self.selection is not None:
            kept = self.selection
            rows.add_row("selection", f"{kept['kept']} of {kept['of']} samples kept at step {kept['step']}")
        if self.kept[1]:
            rows.add_row("batches", f"{self.kept[0]:,} of {self.kept[1]:,} candidates kept ({percent(*self.kept)})")
        rows.add_row("decision", self._decision())
        name = self.model.get("name", "model")
        title = f"pyeff · {name} · {self.policy} · budget {self.scale.text(self.budget)}"
        body = Group(self._bar(width), self._legend(), Text(), rows)
        # A title that is a plain string is read as markup, whatever the console is told.
        return Panel(body, title=Text(title), title_align="left", width=width + 4, padding=(0, 1))

    def _bar(self, width: int) -> Text:
        width -= 2
        bar = Text()
        used = 0
        spent = 0.0
        for name in _FIELD_STYLES:
            # Rounding the running sum rather than each part keeps the bar's length right.
            spent += self.spending.by_field.get(name, 0.0)
            until = min(width, round(width * spent / self.budget))
            bar.append("█" * (until - used), style=_FIELD_STYLES[name])
            used = max(used, until)
        bar.append("░" * (width - used), style="dim")
        return bar

    def _legend(self) -> Text:
        total = self.spending.total
        legend = Text(f"{percent(total, self.budget)}  {self.scale.of_total(total, self.budget)}", style="bold")
        for name in (n for n in _FIELD_STYLES if n in self.spending.by_field):
            amount = self.spending.by_field[name]
            legend.append("   ■ ", style=_FIELD_STYLES.get(name, "dim"))
            legend.append(f"{_FIELD_NAMES.get(name, name)} {percent(amount, self.budget)}", style="not bold")
        return legend

    def _now(self) -> str:
        step = f"step {self.last_step['step']}, " if self.last_step else ""
        left = self.remaining_seconds
        rest = "" if math.isnan(left) or self.end else f", about {duration(left)} left"
        return f"{self.doing} · {step}{duration(self.seconds)}{rest}"

    def _loss(self) -> Text:
        text = Text()
        if self.losses:
            recent = self.losses[-5:]
            text.append(f"{loss_text(math.fsum(recent) / len(recent))}", style="bold")
            text.append(f" train (last {len(recent)})  ")
            text.append(sparkline(self.losses, 24), style=_FIELD_STYLES["train"])
        if self.anchors:
            first, last = self.anchors[0][1], self.anchors[-1][1]
            text.append(f"   anchors {loss_text(first)} → ")
            text.append(loss_text(last), style="bold")
        return text if text else Text("not measured yet", style="dim")

    def _gain(self) -> Text:
        if self.gain is None:
            return Text("measured at the first check", style="dim")
        rate, error = self.gain
        spread = "" if math.isnan(error) else f" ± {number(error)}"
        return Text(f"{number(rate)}{spread} nats per {self.scale.rate_name} since the last check")

    def _decision(self) -> Text:
        if self.latest is None:
            return Text("none yet: warming up", style="dim")
        lines = self._decided(self.latest)
        if self.latest_turn is not None and self.latest_turn is not self.latest:
            lines.append("\n").append_text(self._decided(self.latest_turn, "dim"))
        counts = ", ".join(f"{n} × {action}" for action, n in self.counts.items())
        return lines.append(f"\nso far {counts}", style="dim")

    def _decided(self, event: Event, style: str = "") -> Text:
        text = Text(style=style)
        text.append(event["action"], style=_ACTION_STYLES.get(event["action"], "bold"))
        return text.append(f" at {percent(event.get('spent') or 0.0, self.budget)}: {event['reason']}")


class PlainDisplay(Progress):
    """Lines for logs and pipes: one for about every 5 % of the budget, and one for everything that matters."""

    def __init__(self, console: Console, *, directory: Path | None = None, every: float = 0.05) -> None:
        super().__init__(directory)
        self._console = console
        self._every = every
        self._next = 0.0

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def __call__(self, event: Event) -> None:
        """Take in one event and print its line, if it has one."""
        super().__call__(event)
        line = self._line(event)
        if line:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _line(self, event: Event) -> str | None:
        kind = event["kind"]
        if kind == "start":
            return _announcement(event)
        if kind == "resume":
            lost = duration(event.get("discarded_seconds"))
            return self._at(f"resumed at step {event['step']}; {lost} of work since its checkpoint is repeated")
        if kind == "step":
            share = self.spending.total / self.budget
            if share < self._next:
                return None
            self._next = (math.floor(share / self._every) + 1) * self._every
            return self._at(
                f"step {event['step']}  {event['phase']}  loss {loss_text(event['loss'])}"
                + (f"  lr {number(event['lr'])}" if event.get("lr") is not None else "")
            )
        if kind == "evaluate" and event["set"] == "holdout":
            return self._at(f"holdout loss {loss_text(event['loss'])} ± {loss_text(event.get('standard_error'))}")
        if kind == "exact_match":
            return self._at(f"{event['correct']} of {event['total']} answers exactly right ({event['when']})")
        if kind == "decision":
            gain = ""
            if self.gain is not None:
                gain = f" [gain {number(self.gain[0])} nats per {self.scale.rate_name}]"
            chosen = ""
            if event.get("batch_selection"):
                chosen = f"; {batch_selection_text(event['batch_selection'], self.scale, self.budget)}"
            return self._at(f"{event['action']}: {event['reason']}{gain}{chosen}")
        if kind == "score":
            took = f" in {duration(event['seconds'])}" if event.get("seconds") is not None else ""
            flops = Scale.of("flops", event["flops"]).text(event["flops"])
            return self._at(f"scored {plural(event['samples'], 'sample')} for {flops}{took}")
        if kind == "select":
            return self._at(f"selected {event['kept']} of {event['of']} samples by {event.get('selector', 'score')}")
        if kind == "warning":
            return self._at(_warning(event))
        return None

    def _at(self, text: str) -> str:
        share = 100 * self.spending.total / self.budget
        return f"{share:5.1f} %  {duration(self.seconds):>9}  {text}"


def display(console: Console, *, directory: Path | None = None) -> LiveDisplay | PlainDisplay:
    """The live panel where the console is a terminal that can redraw, else plain lines.

    `directory` is where the run keeps its events: what happened before a resume is read back from there.
    """
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveDisplay(console, directory=directory)
    return PlainDisplay(console, directory=directory)


def sparkline(values: list[float], width: int) -> str:
    """`values` averaged into at most `width` bars of eight heights, the newest on the right.

    >>> sparkline([4.0, 3.0, 2.0, 1.0], 4)
    '█▆▃▁'
    """
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return ""
    count = min(width, len(finite))
    edges = [round(i * len(finite) / count) for i in range(count + 1)]
    means = [math.fsum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    span = high - low or 1.0
    return "".join(_BARS[min(7, int(7 * (m - low) / span + 0.5))] for m in means)


def _announcement(start: Event) -> str:
    scale = Scale.of(start["budget"]["unit"], float(start["budget"]["amount"]))
    budget = scale.text(start["budget"]["amount"])
    first = f"{start['model'].get('name', 'model')}, {start['policy']} policy, budget {budget}"
    estimate, memory = estimate_text(start), memory_text(start)
    lines = [first, *([f"Memory: {memory}."] if memory else []), *([f"Estimate: {estimate}."] if estimate else [])]
    return "\n".join(lines)


def _warning(event: Event) -> str:
    return f"warning: {event.get('message') or event.get('text') or event.get('sentence') or ''}"
