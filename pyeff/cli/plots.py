"""The pictures of a run: each function takes records and returns a matplotlib Figure, without pyplot's global state.

Colours are Okabe and Ito's set, told apart by every common form of colour blindness; every line and mark also
differs in shape or carries its name, so the pictures survive grey printing.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from pyeff.cli.record import Event, Point, RunRecord
from pyeff.cli.units import Scale, loss_text, number, percent
from pyeff.cli.verdict import verdict

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
INK, MUTED, FAINT = "#222222", "#5F6368", "#D9DCE0"

FIELD_COLOURS = {
    "train": BLUE,
    "cooldown": SKY,
    "score": ORANGE,
    "eval": GREEN,
    "probe": PURPLE,
    "discarded": MUTED,
}
FIELD_LABELS = {
    "train": "training",
    "cooldown": "cooldown",
    "score": "scoring",
    "eval": "evaluation",
    "probe": "probing",
    "discarded": "lost to a restart",
}
ACTION_MARKS = {"CONTINUE": ("o", MUTED), "REFRESH": ("D", ORANGE), "COOLDOWN": ("s", SKY)}

# 200 dots an inch: a figure of 9 inches is 1800 px wide and stays sharp where a page shows it at 900.
DPI = 200
# Characters of a bold line that fit into 9 inches.
_HEADLINE = 92
HALO = [withStroke(linewidth=2.5, foreground="white")]
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9AA0A6",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ECEEF0",
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "legend.frameon": True,
    "legend.framealpha": 0.92,
    "legend.edgecolor": "none",
    "legend.borderpad": 0.2,
    "savefig.facecolor": "white",
    "figure.facecolor": "white",
}


def png(draw: Callable[..., Figure], *args: Any) -> bytes:
    """The picture that `draw(*args)` returns, as PNG, drawn in this module's style."""
    with matplotlib.rc_context(STYLE):
        figure = draw(*args)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def overview(record: RunRecord) -> Figure:
    """The run in one picture: loss against what was spent, the decisions marked, and where the budget went."""
    figure = Figure(figsize=(9, 4.5), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
    left, right = figure.subplots(1, 2, width_ratios=[2.15, 1])
    _headline(figure, record)
    _loss(left, record)
    left.set_title("Loss against what was spent")
    _budget(right, record)
    right.set_title("Where the budget went")
    return figure


def loss(record: RunRecord) -> Figure:
    """Training, anchor and holdout loss against what was spent; scoring and every turn of the run are marked."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    _headline(figure, record)
    _loss(figure.subplots(), record)
    return figure


def budget(record: RunRecord) -> Figure:
    """The ledger as bars: how much of the budget each field took."""
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    figure.suptitle("Where the budget went", x=0.01, ha="left", fontsize=11, fontweight="bold")
    _budget(figure.subplots(), record)
    return figure


def samples(record: RunRecord) -> Figure:
    """The share of each source that the last selection kept; earlier selections as hollow marks."""
    selections = record.of("select")
    if not selections:
        return _empty("Nothing was selected: every sample of the pool was drawn alike")
    last = selections[-1]
    rows = sorted(last["by_source"].items(), key=lambda item: (item[1][0] / max(item[1][1], 1), item[0]))
    figure = Figure(figsize=(9, 1.5 + 0.27 * len(rows)), layout="constrained")
    figure.suptitle(
        f"Which samples were chosen: {last['kept']} of {last['of']} kept by "
        f"{str(last.get('selector', 'the selector')).replace('_', ' ')}",
        x=0.01,
        ha="left",
        fontsize=11,
        fontweight="bold",
    )
    axes = figure.subplots()
    target = record.target_sources()
    for y, (source, (kept, total)) in enumerate(rows):
        share = 100 * kept / max(total, 1)
        of_target = source in target
        axes.barh(
            y,
            share,
            height=0.66,
            color=BLUE if of_target else SKY,
            hatch=None if of_target else "////",
            edgecolor="white",
            linewidth=0,
        )
        axes.text(share + 1, y, f"{kept} of {total}", va="center", fontsize=8.5, path_effects=HALO)
    for i, earlier in enumerate(selections[:-1], start=1):
        shares = [
            100 * earlier["by_source"].get(s, [0, 1])[0] / max(earlier["by_source"].get(s, [0, 1])[1], 1)
            for s, _ in rows
        ]
        label = f"selection {i} of {len(selections)}"
        axes.plot(shares, range(len(rows)), "d", mfc="white", mec=VERMILION, ms=5, ls="none", label=label)
    overall = 100 * last["kept"] / max(last["of"], 1)
    axes.axvline(overall, color=INK, lw=1, ls="--", label=f"all sources together: {overall:.0f} %")
    if target:
        axes.barh([0], [0], color=BLUE, label="source of the target task")
        axes.barh([0], [0], color=SKY, hatch="////", edgecolor="white", label="other source")
    axes.set_yticks(range(len(rows)), [s for s, _ in rows], color=INK)
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("kept of the source's samples (%)")
    axes.grid(visible=False, axis="y")
    axes.legend(loc="lower right", fontsize=8.5)
    return figure


def decisions(record: RunRecord) -> Figure:
    """Every decision on the time line of the budget; those that changed something are numbered and explained."""
    made = record.of("decision")
    if not made:
        return _empty("No decision was made")
    turning = _turning_points(made)
    notes = [
        textwrap.wrap(
            f"{i}  {e['action']} at {percent(record.spent_at(e), record.budget)} (step {e['step']}): {e['reason']}",
            124,
            subsequent_indent="    ",
        )
        for i, e in enumerate(turning, start=1)
    ]
    lines = sum(len(n) for n in notes) + 0.4 * len(notes)
    height = 2.2 + 0.17 * lines
    figure = Figure(figsize=(9, height))
    top, bottom = 1 - 0.42 / height, (0.62 + 0.17 * lines) / height
    axes = figure.add_axes((0.115, bottom, 0.865, top - bottom))
    figure.text(0.01, 1 - 0.1 / height, _decision_headline(made), fontsize=11, fontweight="bold", va="top")
    scale = record.scale
    lanes = ["COOLDOWN", "REFRESH", "CONTINUE"]
    lanes += sorted({e["action"] for e in made} - set(lanes))
    _scoring_spans(axes, record, scale, label=False)
    for event in made:
        marker, colour = ACTION_MARKS.get(event["action"], ("X", VERMILION))
        x = record.spent_at(event) / scale.divisor
        axes.plot(x, lanes.index(event["action"]), marker, ms=8, mfc=colour, mec="white", mew=0.8)
    for i, event in enumerate(turning, start=1):
        axes.annotate(
            str(i),
            (record.spent_at(event) / scale.divisor, lanes.index(event["action"])),
            xytext=(7, 5),
            textcoords="offset points",
            fontsize=9,
            fontweight="bold",
        )
    axes.set_yticks(range(len(lanes)), lanes, color=INK)
    axes.set_ylim(-0.6, len(lanes) - 0.4)
    axes.set_xlim(0, right_edge(record, scale))
    axes.set_xlabel(scale.axis_label)
    y = bottom - 0.58 / height
    for note in notes:
        figure.text(0.02, y, "\n".join(note), fontsize=8.5, va="top", linespacing=1.35)
        y -= 0.17 * (len(note) + 0.4) / height
    return figure


def comparison(first: RunRecord, second: RunRecord, names: tuple[str, str], headline: str) -> Figure:
    """Two runs side by side: anchor and holdout loss against what was spent, and where each budget went."""
    figure = Figure(figsize=(9, 4.6), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
    figure.suptitle(textwrap.fill(headline, _HEADLINE), x=0.01, ha="left", fontsize=11, fontweight="bold")
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    scale = Scale.of(first.unit, max(first.budget, second.budget))
    ends: list[tuple[float, float, str, str]] = []
    # The first run's marks are large and hollow, so that both can be seen where they coincide.
    for record, name, colour, dash, mark in (
        (first, names[0], BLUE, "-", {"fmt": "o", "ms": 9, "mfc": "none", "mec": BLUE}),
        (second, names[1], VERMILION, "--", {"fmt": "s", "ms": 5, "mec": "white"}),
    ):
        anchors = record.losses("anchors")
        if anchors:
            _line(left, _held(anchors, record), scale, color=colour, ls=dash, lw=1.6, label=f"{name}, anchors")
        holdout = record.losses("holdout")
        if holdout:
            _errorbar(left, holdout, scale, color=colour, label=f"{name}, holdout (± 1 SE)", **mark)
            last = holdout[-1]
            ends.append((last.spent / scale.divisor, last.loss, loss_text(last.loss), colour))
    ends.sort(key=lambda end: end[1])
    for i, (x, y, text, colour) in enumerate(ends):
        left.annotate(
            text,
            (x, y),
            xytext=(9, -9 if i == 0 else 7),
            textcoords="offset points",
            color=colour,
            fontweight="bold",
            va="center",
        )
    left.set_xlabel(scale.axis_label)
    left.set_ylabel("loss (nats per answer token)")
    left.set_ylim(bottom=0)
    left.margins(x=0.09)
    left.set_xlim(left=0)
    left.set_title("Loss at equal spending")
    left.legend(loc="upper right")
    _two_budgets(right, (first, second), names, scale)
    right.set_title("Where each budget went")
    return figure


def _headline(figure: Figure, record: RunRecord) -> None:
    text = textwrap.fill(verdict(record).headline, _HEADLINE)
    figure.suptitle(text, x=0.01, ha="left", fontsize=11, fontweight="bold")


def _loss(axes: Axes, record: RunRecord) -> None:
    scale = record.scale
    _scoring_spans(axes, record, scale, label=True)
    steps = record.of("step")
    if steps:
        x = [record.spent_at(e) / scale.divisor for e in steps]
        y = [math.nan if e["loss"] is None else e["loss"] for e in steps]
        axes.plot(x, y, ".", ms=4, color="#A8ADB3", label="training batch", zorder=1.5)
    anchors = record.losses("anchors")
    if anchors:
        _line(axes, _held(anchors, record), scale, color=BLUE, lw=1.8, label="anchors (decisions)")
    holdout = record.losses("holdout")
    if holdout:
        _errorbar(axes, holdout, scale, color=VERMILION, label="holdout (± 1 SE)", fmt="s", ms=6, mec="white")
        for i in sorted({0, len(holdout) - 1}):
            point, at_end = holdout[i], i > 0
            axes.annotate(
                loss_text(point.loss),
                (point.spent / scale.divisor, point.loss),
                xytext=(-2, 12) if at_end else (8, 6),
                textcoords="offset points",
                color=VERMILION,
                fontweight="bold",
                path_effects=HALO,
                ha="right" if at_end else "left",
            )
    top = max(
        [p.loss for p in anchors + holdout if math.isfinite(p.loss)]
        + [e["loss"] for e in steps if e["loss"] is not None and math.isfinite(e["loss"])]
        + [1e-3]
    )
    ceiling = 1.3 * top  # room above the curves for the marks of the decisions
    _decision_marks(axes, record, scale, ceiling)
    axes.set_ylim(0, ceiling)
    axes.set_xlim(-0.012 * right_edge(record, scale), right_edge(record, scale))
    axes.set_xlabel(scale.axis_label)
    axes.set_ylabel("loss (nats per answer token)")
    if steps or anchors or holdout:
        axes.legend(loc="upper right", bbox_to_anchor=(1.0, 0.86), fontsize=8.5)


def _decision_marks(axes: Axes, record: RunRecord, scale: Scale, ceiling: float) -> None:
    y = 0.9 * ceiling
    made = record.of("decision")
    turning = _turning_points(made)
    for event in made:
        marker, colour = ACTION_MARKS.get(event["action"], ("X", VERMILION))
        x = record.spent_at(event) / scale.divisor
        important = any(event is e for e in turning)
        axes.plot(
            x,
            y,
            marker,
            ms=7.5 if important else 4,
            mfc=colour,
            mec="white",
            mew=0.7,
            clip_on=False,
            zorder=4,
        )
        if important:
            axes.axvline(x, ymax=0.9, color=INK, lw=0.8, ls=":", zorder=1)
            axes.annotate(
                event["action"].lower(),
                (x, y),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
                fontweight="bold",
            )
    if len(made) > len(turning):
        marker, colour = ACTION_MARKS["CONTINUE"]
        axes.plot([], [], marker, ms=4, mfc=colour, mec="white", label="decision to continue")


def _scoring_spans(axes: Axes, record: RunRecord, scale: Scale, *, label: bool) -> None:
    for i, (start, stop) in enumerate(record.scoring_spans()):
        axes.axvspan(
            start / scale.divisor,
            stop / scale.divisor,
            color=ORANGE,
            alpha=0.16,
            lw=0,
            label="scoring the pool" if label and i == 0 else None,
        )


def _budget(axes: Axes, record: RunRecord) -> None:
    amounts = record.where_the_budget_went()
    scale = record.scale
    names = list(amounts)
    for y, name in enumerate(names):
        amount = amounts[name]
        axes.barh(y, amount / scale.divisor, height=0.62, color=FIELD_COLOURS.get(name, MUTED))
        axes.annotate(
            f"{FIELD_LABELS.get(name, name)}  ",
            (0, y - 0.33),
            xytext=(1, 2),
            textcoords="offset points",
            fontsize=8.5,
            va="bottom",
        )
        axes.annotate(
            f"{number(amount / scale.divisor)}  ({percent(amount, record.budget)})",
            (amount / scale.divisor, y),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
    if not names:
        axes.text(0.5, 0.5, "nothing spent yet", transform=axes.transAxes, ha="center", color=MUTED)
    largest = max(amounts.values(), default=record.budget)
    axes.set_xlim(0, 1.45 * largest / scale.divisor)
    axes.set_ylim(len(names) - 0.45, -0.75)
    axes.set_yticks([])
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(f"{scale.name} (share of the budget)")


def _two_budgets(axes: Axes, records: Sequence[RunRecord], names: Sequence[str], scale: Scale) -> None:
    seen: list[str] = []
    for y, record in enumerate(records):
        start = 0.0
        for name, amount in record.where_the_budget_went().items():
            colour = FIELD_COLOURS.get(name, MUTED)
            width = amount / scale.divisor
            label = None if name in seen else FIELD_LABELS.get(name, name)
            axes.barh(y, width, left=start, height=0.4, color=colour, edgecolor="white", lw=1.2, label=label)
            share = amount / record.budget
            if share > 0.12:
                dark = name in ("train", "eval", "discarded")
                axes.text(
                    start + width / 2,
                    y,
                    f"{100 * share:.0f} %",
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color="white" if dark else "black",
                )
            seen.append(name)
            start += width
    axes.set_yticks(range(len(records)), names, color=INK)
    axes.set_ylim(len(records) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(scale.axis_label)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.17), ncols=2, fontsize=8.5, columnspacing=1.0)


def _held(points: Sequence[Point], record: RunRecord) -> list[Point]:
    """`points` with the loss before a scoring pass repeated at its end: scoring does not change the model."""
    held = list(points)
    for start, stop in record.scoring_spans():
        before = [p for p in points if p.spent <= start]
        if before:
            held.append(Point(stop, before[-1].loss))
    return sorted(held, key=lambda p: p.spent)


def _line(axes: Axes, points: Sequence[Point], scale: Scale, **style: Any) -> None:
    axes.plot([p.spent / scale.divisor for p in points], [p.loss for p in points], zorder=3, **style)


def _errorbar(axes: Axes, points: Sequence[Point], scale: Scale, **style: Any) -> None:
    axes.errorbar(
        [p.spent / scale.divisor for p in points],
        [p.loss for p in points],
        yerr=[0.0 if math.isnan(p.standard_error) else p.standard_error for p in points],
        capsize=3,
        lw=1.4,
        zorder=3.5,
        **style,
    )


def _turning_points(made: Sequence[Event]) -> list[Event]:
    """Decisions other than CONTINUE, without the repetitions of one that is already being carried out."""
    return [
        e
        for i, e in enumerate(made)
        if e["action"] != "CONTINUE"
        and not (e["action"] == "COOLDOWN" and i > 0 and made[i - 1]["action"] == "COOLDOWN")
    ]


def _decision_headline(made: Sequence[Event]) -> str:
    counts = {a: sum(e["action"] == a for e in made) for a in dict.fromkeys(e["action"] for e in made)}
    listed = ", ".join(f"{n} × {action}" for action, n in counts.items())
    return f"{len(made)} decision{'s' if len(made) != 1 else ''}: {listed}"


def right_edge(record: RunRecord, scale: Scale) -> float:
    """Where the axis of what was spent ends."""
    return 1.02 * max(record.budget if record.end is None else record.spent, record.spent) / scale.divisor


def _empty(sentence: str) -> Figure:
    figure = Figure(figsize=(9, 0.8))
    figure.text(0.01, 0.5, sentence, fontsize=11, fontweight="bold", va="center")
    return figure
