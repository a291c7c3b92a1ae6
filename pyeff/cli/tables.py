"""Tables for the terminal: the end of a run, two runs side by side, and what is installed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pyeff.cli import compare
from pyeff.cli.record import RunRecord, batch_selection_text
from pyeff.cli.units import Scale, duration, loss_text, percent, plural
from pyeff.cli.verdict import verdict

if TYPE_CHECKING:
    from pyeff import Info
    from pyeff.scoring import Scores
    from pyeff.train.select import Chosen


def summary(record: RunRecord) -> RenderableType:
    """The end of a run: the verdict first, then loss, answers, and where the budget went."""
    judged = verdict(record)
    lines = Text(judged.headline, style="bold")
    if judged.detail:
        lines.append(f"\n{judged.detail}", style="not bold")
    results = _plain()
    end = record.end
    if end is not None:
        holdout = end["holdout"]
        results.add_row(
            "holdout loss",
            f"{loss_text(holdout.get('before'))} → {loss_text(holdout.get('after'))} nats per answer token "
            f"(gain {loss_text(holdout.get('gain'))} ± {loss_text(holdout.get('standard_error'))} SE)",
        )
        exact = end.get("exact_match")
        if exact and exact.get("total"):
            results.add_row("exactly right", f"{exact['before']} → {exact['after']} of {exact['total']} answers")
    chosen = record.of("select")
    if chosen:
        results.add_row("selection", "; ".join(f"step {e['step']}: {e['kept']} of {e['of']} kept" for e in chosen))
    if record.batch_selection is not None:
        results.add_row("batches", batch_selection_text(record.batch_selection, record.scale, record.budget))
    made = [e["action"] for e in record.of("decision")]
    results.add_row("decisions", ", ".join(f"{made.count(a)} × {a}" for a in dict.fromkeys(made)) or "none")
    results.add_row(
        "spent",
        f"{record.scale.of_total(record.spent, record.budget)} ({percent(record.spent, record.budget)}), "
        f"{plural(len(record.of('step')), 'step')}",
    )
    return Group(Panel(lines, padding=(0, 1), width=100), results, ledger(record))


def ledger(record: RunRecord) -> Table:
    """Where the budget went, one row for each field that was charged."""
    from pyeff.cli.report import ledger_rows

    table = Table(title="Where the budget went", title_justify="left", title_style="bold")
    table.add_column("field")
    unfinished = record.end is None
    for name in ("spent so far",) if unfinished else ("FLOPs", "time", "tokens"):
        table.add_column(name, justify="right")
    table.add_column("share of the budget", justify="right")
    for row in ledger_rows(record):
        cells = [row[0], row[1], row[-1]] if unfinished else row
        table.add_row(*cells, style="bold" if row[0] == "total" else None)
    return table


def comparison(compared: compare.Comparison) -> RenderableType:
    """Two runs side by side under the sentence that says which is better."""
    table = Table(show_edge=True)
    table.add_column("")
    for name in compared.names:
        table.add_column(name, justify="right")
    for row in compare.rows(compared):
        table.add_row(*row)
    notes = Text("\n".join(compare.notes(compared)), style="dim")
    return Group(Panel(Text(compared.headline, style="bold"), padding=(0, 1), width=100), table, notes)


def scored(scores: Scores) -> RenderableType:
    """What a scoring cost and how its scores are spread."""
    facts = _plain()
    facts.add_row("method", Text(scores.method))
    names = dict.fromkeys(str(name) for name in scores.table["checkpoint"].unique().to_pylist() if name)
    if names:
        facts.add_row("checkpoints", Text(", ".join(names)))
    facts.add_row("samples", f"{len(scores):,}")
    facts.add_row("compute", Scale.of("flops", scores.flops).text(scores.flops))
    facts.add_row("time", duration(scores.seconds))
    values = scores.values[~np.isnan(scores.values)]
    if len(values) < len(scores):
        facts.add_row("without a score", f"{plural(len(scores) - len(values), 'sample')}")
    table = Table(title="Scores", title_justify="left", title_style="bold")
    shares = {"least": 0.0, "10 %": 0.1, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "90 %": 0.9, "greatest": 1.0}
    for name in shares:
        table.add_column(name, justify="right")
    if values.size:
        table.add_row(*(f"{value:.4g}" for value in np.quantile(values, list(shares.values()))))
    return Group(facts, table)


def selected(chosen: Chosen) -> RenderableType:
    """What was chosen, from what, and when its cost has been earned back."""
    facts = _plain()
    facts.add_row("chosen", f"{len(chosen.ids):,} of {chosen.samples:,} samples by {chosen.rule}")
    facts.add_row("scores", Text(chosen.method))
    if chosen.undefined:
        facts.add_row("without a finite score", plural(chosen.undefined, "sample"))
    if chosen.left_out:
        facts.add_row("in the holdout", f"{plural(chosen.left_out, 'sample')}, left out")
    for name, (kept, whole) in chosen.by_source.items():
        facts.add_row(Text(name), f"{kept:,} of {whole:,}")
    table = Table(title="When the selection has paid", title_justify="left", title_style="bold")
    for name in ("", "selection", "training on the pool", "on the subset", "saved a run", "pays after"):
        table.add_column(name, justify="left" if not name else "right")
    notes = []
    for unit, each in chosen.pay_back.items():
        name = "compute" if unit == "flops" else "time"

        def shown(amount: float, unit: str = unit) -> str:
            return Scale.of(unit, abs(amount)).text(amount) if unit == "flops" else duration(amount)

        if each.full:
            runs = "never" if math.isinf(each.runs) else plural(int(each.runs), "run")
            table.add_row(name, shown(each.cost), shown(each.full), shown(each.subset), shown(each.saved), runs)
        else:
            table.add_row(name, shown(each.cost), "not given", "", "", "")
            if each.cost and math.isfinite(each.pays_from):
                notes.append(
                    f"{name}: pays in one run where training on the pool costs {shown(each.pays_from)} or more"
                )
    first = next(iter(chosen.pay_back.values()))
    against = (
        "the whole pool, as if the subset trained as well"
        if first.random_fraction == 1
        else f"{percent(first.random_fraction, 1)} of the pool drawn at random, said to train as well"
    )
    notes.append(f"saved: against training on {against}")
    return Group(facts, table, Text("\n".join(notes), style="dim"))


def installed(info: Info, *, verbose: bool = False) -> RenderableType:
    """Versions, devices, the extension, and for every operation what each device would run; why, if `verbose`."""
    facts = _plain()
    facts.add_row("pyeff", info.version)
    for name, value in info.versions.items():
        facts.add_row(name, value)
    for i, device in enumerate(info.devices):
        facts.add_row("devices" if i == 0 else "", device)
    for i, (name, value) in enumerate(info.extension.items()):
        facts.add_row("extension" if i == 0 else "", value if name == "state" else f"{name}: {value}")
    table = Table(title="Operations", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    devices = list(dict.fromkeys(found.device for found in info.operations))
    for column in ("operation", *(f"on {device}" for device in devices)):
        table.add_column(column, no_wrap=True)
    taken = {(found.operation, found.device): found.impl for found in info.operations}
    for operation in dict.fromkeys(found.operation for found in info.operations):
        table.add_row(operation, *(taken.get((operation, device), "") for device in devices))
    parts: list[RenderableType] = [facts, table]
    if verbose:
        reasons = Table.grid(padding=(0, 1))
        for line in info.refusals():
            reasons.add_row("not", line)
        parts.append(reasons)
    else:
        parts.append(Text("Why not another implementation: pyeff info --verbose", style="dim"))
    return Group(*parts)


def _plain() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    return table
