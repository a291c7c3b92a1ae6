"""`report.html` and `plots/*.png` of a run, from its events alone: what it cost, what it returned, and every decision.

The page is one file: pictures are embedded, nothing is fetched, and all text of samples is escaped.
"""

from __future__ import annotations

import base64
import html
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pyeff.cli import plots
from pyeff.cli.audit import audit_sentence
from pyeff.cli.promises import audit_of, promises
from pyeff.cli.record import RunRecord, batch_selection_text, estimate_text, flatten, observation
from pyeff.cli.units import Scale, duration, loss_text, number, percent, plural
from pyeff.cli.verdict import verdict
from pyeff.errors import UserError

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: #222;
       background: #fff; max-width: 960px; margin: 2.2rem auto 4rem; padding: 0 1.2rem; }}
h1 {{ font-size: 1.5rem; line-height: 1.25; margin: 0 0 .5rem; }}
h2 {{ font-size: 1.12rem; margin: 2.6rem 0 .6rem; padding-top: .7rem; border-top: 1px solid #dfe2e5; }}
p {{ margin: .4rem 0 .8rem; }}
.kicker, .note {{ color: #5f6368; font-size: .88rem; }}
.facts {{ display: flex; flex-wrap: wrap; gap: .7rem; margin: 1.2rem 0; padding: 0; list-style: none; }}
.facts li {{ flex: 1 1 9.5rem; border: 1px solid #dfe2e5; border-radius: 6px; padding: .6rem .8rem; }}
.facts b {{ display: block; font-size: 1.12rem; font-variant-numeric: tabular-nums; }}
.facts span {{ color: #5f6368; font-size: .82rem; }}
img {{ max-width: 100%; height: auto; display: block; margin: .8rem 0; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: .88rem; margin: .6rem 0 1rem; }}
th, td {{ padding: .35rem .6rem; vertical-align: top; }}
th {{ text-align: left; font-weight: 600; border-bottom: 2px solid #c4c8cc; vertical-align: bottom; }}
td {{ border-bottom: 1px solid #eceef0; }}
th.n, td.n {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
td.text {{ white-space: pre-wrap; overflow-wrap: anywhere; max-width: 26rem; }}
tr.turn td {{ background: #fff6e5; }}
tr.total td {{ border-top: 2px solid #c4c8cc; font-weight: 600; }}
code, pre {{ font: .84rem/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }}
pre {{ background: #f6f7f8; padding: .8rem; border-radius: 6px; overflow-x: auto; }}
summary {{ cursor: pointer; color: #0060a0; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


class _Cell(str):
    """HTML that is already escaped."""


def write_report(record: RunRecord) -> Path:
    """Write `plots/*.png` and `report.html` into the run's directory and return the page's path.

    Existing files are replaced whole. Raises UserError where the directory cannot be written.
    """
    pictures = {
        draw.__name__: plots.png(draw, record)
        for draw in (plots.overview, plots.loss, plots.budget, plots.samples, plots.decisions)
    }
    if audit_of(record).outcomes:
        pictures[promises.__name__] = plots.png(promises, record)
    page = record.path / "report.html"
    try:
        (record.path / "plots").mkdir(exist_ok=True)
        for name, data in pictures.items():
            write_atomic(record.path / "plots" / f"{name}.png", data)
        write_atomic(page, render(record, pictures).encode("utf-8"))
    except OSError as error:
        raise UserError(f"{record.path}: the report cannot be written: {error.strerror}") from None
    return page


def render(record: RunRecord, pictures: dict[str, bytes]) -> str:
    """The page as text; `pictures` are the PNG files by name (overview, samples, decisions, promises)."""
    judged = verdict(record)
    model = record.start["model"]
    title = f"{record.name}: {judged.headline}"
    parts = [
        f'<p class="kicker">pyeff run {esc(record.name)} · {esc(model.get("name"))} · {esc(record.policy)} policy '
        f"· budget {esc(record.scale.text(record.budget))}</p>",
        f"<h1>{esc(judged.headline)}</h1>",
        f"<p>{esc(judged.detail)}</p>" if judged.detail else "",
        _caveat(record),
        facts(record),
        picture(pictures["overview"], "Loss against what was spent, and where the budget went"),
        "<h2>Where the budget went</h2>",
        _spending(record),
        "<h2>Which samples were chosen</h2>",
        _samples(record, pictures),
        "<h2>Every decision</h2>",
        _decisions(record, pictures),
        _promises(record, pictures),
        _answers(record),
        _warnings(record),
        "<h2>How this run was made</h2>",
        _setup(record),
    ]
    return page(title, parts)


def page(title: str, parts: Iterable[str]) -> str:
    """A whole HTML page around `parts`."""
    return _PAGE.format(title=esc(title), body="\n".join(p for p in parts if p))


def facts(record: RunRecord) -> str:
    """The numbers of a run that everyone asks for first."""
    end = record.end
    rows: list[tuple[str, str]] = []
    if end is not None:
        holdout = end["holdout"]
        error = holdout.get("standard_error")
        change = f"{loss_text(holdout.get('before'))} → {loss_text(holdout.get('after'))}"
        gain = loss_text(holdout.get("gain"))
        rows.append((change, f"holdout loss, nats/token (gain {gain} ± {loss_text(error)} SE)"))
        exact = end.get("exact_match")
        if exact and exact.get("total"):
            rows.append((f"{exact['before']} → {exact['after']} of {exact['total']}", "answers exactly right"))
    rows.append((record.scale.of_total(record.spent, record.budget), "of the budget spent"))
    scored = record.where_the_budget_went().get("score", 0.0)
    chosen = record.batch_selection
    if chosen is not None:
        scored = max(scored - chosen["spent"], 0.0)
        share = percent(chosen["spent"], record.budget) if chosen["spent"] else "nothing"
        rows.append((share, f"spent on choosing {percent(chosen['kept'], chosen['candidates'])} of each batch"))
    rows.append((percent(scored, record.budget) if scored else "nothing", "spent on scoring the pool"))
    steps = record.of("step")
    rows.append((duration(record.seconds), f"on the clock, {plural(len(steps), 'step')}"))
    items = "".join(f"<li><b>{esc(value)}</b><span>{esc(what)}</span></li>" for value, what in rows)
    return f'<ul class="facts">{items}</ul>'


def ledger_rows(record: RunRecord) -> list[list[str]]:
    """The ledger as rows of text: field, FLOPs, seconds, tokens, share of the budget; the total last."""
    if record.end is None:
        return [
            [plots.FIELD_LABELS.get(n, n), record.scale.text(a), "", "", percent(a, record.budget)]
            for n, a in record.where_the_budget_went().items()
        ]
    ledger = record.end["ledger"]
    flops = Scale.of("flops", sum(row.get("flops") or 0.0 for row in ledger.values()))
    counted = record.where_the_budget_went()
    rows = []
    totals = {"flops": 0.0, "seconds": 0.0, "tokens": 0.0}
    for name, row in sorted(ledger.items(), key=lambda item: _ledger_place(item[0])):
        if not any(row.get(k) for k in totals):
            continue
        for key in totals:
            if name != "discarded" or key == "seconds":
                totals[key] += row.get(key) or 0.0
        rows.append(
            [
                plots.FIELD_LABELS.get(name, name),
                flops.text(row.get("flops") or 0.0),
                duration(row.get("seconds") or 0.0),
                f"{int(row.get('tokens') or 0):,}",
                percent(counted[name], record.budget) if name in counted else "not counted",
            ]
        )
    spent = sum(counted.values())
    rows.append(
        [
            "total",
            flops.text(totals["flops"]),
            duration(totals["seconds"]),
            f"{int(totals['tokens']):,}",
            percent(spent, record.budget),
        ]
    )
    return rows


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    numeric: Iterable[int] = (),
    classes: Sequence[str] | None = None,
) -> str:
    """An HTML table; columns in `numeric` are set right, `classes` names one class for each row."""
    right = set(numeric)

    def cell(tag: str, i: int, value: Any) -> str:
        kind = ' class="n"' if i in right else ' class="text"' if tag == "td" else ""
        return f"<{tag}{kind}>{value if isinstance(value, _Cell) else esc(value)}</{tag}>"

    head = "".join(cell("th", i, h) for i, h in enumerate(header))
    body = []
    for r, row in enumerate(rows):
        attribute = f' class="{esc(classes[r])}"' if classes and classes[r] else ""
        body.append(f"<tr{attribute}>{''.join(cell('td', i, v) for i, v in enumerate(row))}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def picture(data: bytes, description: str) -> str:
    """An embedded PNG with its description for readers who cannot see it."""
    encoded = base64.b64encode(data).decode("ascii")
    return f'<img src="data:image/png;base64,{encoded}" alt="{esc(description)}">'


def esc(value: Any) -> str:
    """`value` as text that is safe inside HTML."""
    return html.escape("" if value is None else str(value))


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` under a temporary name and rename it, so that a reader never meets half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _caveat(record: RunRecord) -> str:
    if record.end is None or not record.of("select"):
        return ""
    return (
        '<p class="note">One run has no twin: its own estimate compares the gain rates before and after a selection. '
        f"A measurement is <code>pyeff run CONFIG --policy uniform</code> at the same budget and then "
        f"<code>pyeff compare {esc(record.path)} DIR</code>.</p>"
    )


def _spending(record: RunRecord) -> str:
    rows = ledger_rows(record)
    header = ["field", "FLOPs", "time", "tokens", "share of the budget"]
    if record.end is None:
        header = ["field", "spent so far", "", "", "share of the budget"]
    classes = ["total" if row[0] == "total" else "" for row in rows]
    parts = [table(header, rows, numeric=range(1, 5), classes=classes)]
    scored = record.of("score")
    if scored:
        flops = Scale.of("flops", scored[-1]["flops"])
        passes = "; ".join(
            f"step {e['step']}: {plural(e['samples'], 'sample')}, {flops.text(e['flops'])}"
            + (f", {duration(e['seconds'])}" if e.get("seconds") is not None else "")
            for e in scored
        )
        parts.append(f"<p>{plural(len(scored), 'scoring pass', 'scoring passes')}: {esc(passes)}.</p>")
    estimate = estimate_text(record.start)
    if estimate:
        parts.append(f'<p class="note">Estimated before the start: {esc(estimate)}.</p>')
    return "".join(parts)


def _samples(record: RunRecord, pictures: dict[str, bytes]) -> str:
    return _of_the_pool(record, pictures) + _within_batches(record)


def _within_batches(record: RunRecord) -> str:
    """What was kept of each source's candidates."""
    chosen = record.batch_selection
    if chosen is None:
        return ""
    rows = [[source, *counts, percent(*counts)] for source, counts in sorted(chosen["by_source"].items())]
    rows.append(["total", chosen["kept"], chosen["candidates"], percent(chosen["kept"], chosen["candidates"])])
    text = batch_selection_text(chosen, record.scale, record.budget)
    header = ["source", "kept within batches", "candidates", "share"]
    classes = [""] * (len(rows) - 1) + ["total"]
    return f"<p>Within each batch {esc(text)}.</p>" + table(header, rows, numeric=range(1, 4), classes=classes)


def _of_the_pool(record: RunRecord, pictures: dict[str, bytes]) -> str:
    selections = record.of("select")
    if not selections:
        pool = record.start.get("pool") or {}
        size = f"{pool['samples']} samples" if "samples" in pool else "samples"
        return f"<p>None were chosen of the pool: all its {esc(size)} were drawn alike.</p>"
    last = selections[-1]
    parts = [picture(pictures["samples"], "Share of each source that the last selection kept")]
    selector = (record.start.get("config") or {}).get("selector")
    if isinstance(selector, dict):
        settings = ", ".join(f"{key} {value}" for key, value in selector.items())
        parts.append(f'<p class="note">Selector: {esc(settings)}.</p>')
    sources = sorted(last["by_source"], key=lambda s: -last["by_source"][s][0] / max(last["by_source"][s][1], 1))
    header = ["source", *(f"kept at step {e['step']}" for e in selections), "of"]
    rows = [[s, *(e["by_source"].get(s, ["n/a"])[0] for e in selections), last["by_source"][s][1]] for s in sources]
    rows.append(["total", *(e["kept"] for e in selections), last["of"]])
    classes = [""] * len(sources) + ["total"]
    parts.append(table(header, rows, numeric=range(1, len(header)), classes=classes))
    examples = sorted(last.get("examples") or [], key=lambda e: (not e.get("kept"), -(e.get("score") or 0.0)))
    if examples:
        parts.append(f"<p>Some of them, by {esc(str(last.get('selector', 'score')).replace('_', ' '))}:</p>")
        shown = [
            [
                "kept" if e.get("kept") else "left out",
                number(e.get("score")),
                e.get("source"),
                e.get("prompt"),
                e.get("answer"),
            ]
            for e in examples
        ]
        parts.append(table(["", "score", "source", "prompt", "answer"], shown, numeric=[1]))
    return "".join(parts)


def _decisions(record: RunRecord, pictures: dict[str, bytes]) -> str:
    made = record.of("decision")
    if not made:
        return "<p>No decision was made.</p>"
    rows = []
    for event in made:
        values = event.get("values") or {}
        rows.append(
            [
                event["step"],
                percent(record.spent_at(event), record.budget),
                event["action"],
                event["reason"],
                _Cell("<br>".join(f"{esc(k)} {_worth(record, v)}" for k, v in values.items() if _is_number(v))),
                _inputs(observation(event) | (event.get("estimates") or {})),
            ]
        )
    classes = ["turn" if e["action"] != "CONTINUE" else "" for e in made]
    header = ["step", "spent", "action", "why", "worth against CONTINUE, as training", "measured"]
    return picture(pictures["decisions"], "Every decision on the time line of the budget") + table(
        header, rows, numeric=[0, 1], classes=classes
    )


def _promises(record: RunRecord, pictures: dict[str, bytes]) -> str:
    drawn = pictures.get(promises.__name__)
    if drawn is None:
        return ""
    return (
        "<h2>Promised and measured gains</h2>"
        + picture(drawn, "Each decision's promised rate of gain and the one that the next check measured")
        + f"<p>{esc(audit_sentence(audit_of(record)))}</p>"
    )


def _worth(record: RunRecord, value: float) -> str:
    return "0" if value == 0 else esc(record.scale.text(value))


def _inputs(inputs: dict[str, Any]) -> _Cell:
    lines = []
    for key, value in inputs.items():
        if isinstance(value, list) and len(value) > 6 and all(_is_number(v) for v in value):
            lines.append(f"{key}: {len(value)} values, mean {number(sum(value) / len(value))}")
        else:
            lines.append(f"{key}: {number(value) if isinstance(value, float) else json.dumps(value)}")
    return _Cell(f"<details><summary>show</summary><code>{'<br>'.join(esc(x) for x in lines)}</code></details>")


def _answers(record: RunRecord) -> str:
    events = record.of("exact_match")
    if not events:
        return ""
    sources = sorted({s for e in events for s in e.get("by_source") or {}})
    header = ["target task", *(f"{e['when']}" for e in events)]
    rows = [[s, *(_right(e.get("by_source", {}).get(s)) for e in events)] for s in sources]
    rows.append(["total", *(f"{e['correct']} of {e['total']}" for e in events)])
    classes = [""] * len(sources) + ["total"]
    note = (
        "<p>Greedy answers compared with the right ones, character by character. "
        "Much of a first gain is the format of the answer rather than the skill.</p>"
    )
    return "<h2>Answers exactly right</h2>" + note + table(header, rows, numeric=range(1, len(header)), classes=classes)


def _right(pair: Any) -> str:
    return f"{pair[0]} of {pair[1]}" if isinstance(pair, list) and len(pair) == 2 else "n/a"


def _warnings(record: RunRecord) -> str:
    lines = [
        f"step {e.get('step', '?')}: resumed from a checkpoint, {duration(e.get('discarded_seconds'))} of work repeated"
        for e in record.of("resume")
    ]
    lines += [str(e.get("message") or e.get("text") or e.get("sentence") or "") for e in record.of("warning")]
    lines = [line for line in lines if line]
    if not lines:
        return ""
    return "<h2>Interruptions and warnings</h2><ul>" + "".join(f"<li>{esc(x)}</li>" for x in lines) + "</ul>"


def _setup(record: RunRecord) -> str:
    start = record.start
    model = start["model"]
    rows = [["model", model.get("name")]]
    if _is_number(model.get("parameters")):
        trained = model.get("trainable", model["parameters"])
        rows.append(["parameters", f"{model['parameters']:,}, {trained:,} of them trained"])
    pool = start.get("pool") or {}
    if pool:
        rows.append(["pool", f"{pool.get('samples', '?'):,} samples, {pool.get('tokens', '?'):,} tokens"])
    if record.end is not None:
        rows.append(["ended because", record.end.get("reason")])
    if start.get("threads") is not None:
        rows.append(["threads", start["threads"]])
    planned = start.get("memory")
    if isinstance(planned, dict) and _is_number(planned.get("predicted_peak")) and _is_number(planned.get("limit")):
        recomputed = {
            "layer": "layers recomputed",
            "attention": "layers recomputed but for their attention",
        }.get(str(planned.get("checkpointing")), "nothing recomputed")
        rows.append(
            [
                "memory of a step",
                f"{planned['predicted_peak'] / 1e9:.3g} GB predicted in the {planned.get('peak_phase')}, "
                f"of {planned['limit'] / 1e9:.3g} GB; the planner chose micro-batches of "
                f"{planned.get('micro_batch_tokens')} tokens, {recomputed}",
            ]
        )
    config = "\n".join(f"{k}: {v}" for k, v in flatten(start.get("config") or {}))
    details = f"<details><summary>configuration</summary><pre>{esc(config)}</pre></details>" if config else ""
    return table(["", ""], rows) + details


def _ledger_place(name: str) -> int:
    order = list(plots.FIELD_LABELS)
    return order.index(name) if name in order else len(order)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
