from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pyeff.cli.display import LiveDisplay, PlainDisplay, Progress, display, sparkline
from pyeff.cli.record import load_run


def terminal(width=100):
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system="truecolor", legacy_windows=False)


def pipe():
    return Console(file=io.StringIO(), width=80)


def panel(shown, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(shown.render())
    return console.file.getvalue()


def plain_lines(events, **options):
    console = pipe()
    with PlainDisplay(console, **options) as observer:
        for event in events:
            observer(event)
    return console.file.getvalue().splitlines()


def test_a_terminal_gets_the_panel_and_a_pipe_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    assert isinstance(display(terminal()), LiveDisplay)
    assert isinstance(display(pipe()), PlainDisplay)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(display(terminal()), PlainDisplay)


def test_the_panel_shows_loss_gain_budget_and_the_last_decision_with_its_reason(make_run):
    record = load_run(make_run())
    shown = LiveDisplay(terminal())
    for event in record.events:
        shown(event)
        panel(shown)  # no event leaves it unable to draw
    text = panel(shown, 130)
    assert "39.8 of 40 TFLOP" in text
    assert "nats per PFLOP" in text
    assert f"anchors {record.losses('anchors')[0].loss:.3f} → {record.losses('anchors')[-1].loss:.3f}" in text
    last = record.of("decision")[-1]
    assert f"{last['action']} at" in text
    assert last["reason"][:40] in text


@pytest.mark.parametrize("width", [30, 60, 100, 200])
def test_the_panel_fits_the_terminal(make_run, width):
    shown = LiveDisplay(terminal(width))
    for event in load_run(make_run()).events:
        shown(event)
    assert max(map(len, panel(shown, width).splitlines())) <= width


def test_before_the_first_event_the_panel_says_what_it_waits_for():
    assert "loading model and data" in panel(LiveDisplay(terminal()))


def test_lines_come_once_for_each_part_of_the_budget_and_for_every_decision(make_run):
    record = load_run(make_run())
    lines = plain_lines(record.events)
    steps = [line for line in lines if "  step " in line]
    assert 10 <= len(steps) <= 21
    for event in record.of("decision"):
        assert any(f"{event['action']}: {event['reason']}" in line for line in lines)
    assert any("selected 164 of 600" in line for line in lines)
    assert lines[1].startswith("Estimate: about 50 steps")
    assert "9.6 TFLOP (24 % of the budget) to score the pool" in lines[1]


def with_batch_selection(events: list[dict]) -> list[dict]:
    """The events of a run whose steps kept half of their candidates."""
    found, kept = [], 0
    for event in events:
        event = dict(event)
        if event["kind"] == "step":
            kept += 4
            event |= {"kept": 4, "candidates": 8, "scored": 1e9}
        if event["kind"] in ("decision", "end"):
            counts = {"kept": kept, "candidates": 2 * kept, "by_source": {"sums": [kept, 2 * kept]}}
            event["batch_selection"] = {"method": "greats", "spent": 1e9 * kept / 4, **counts}
        found.append(event)
    return found


def test_what_is_kept_of_the_candidates_and_what_that_took_is_shown(make_run):
    events = with_batch_selection(load_run(make_run()).events)
    shown = LiveDisplay(terminal())
    for event in events:
        shown(event)
    steps = sum(event["kind"] == "step" for event in events)
    assert f"{4 * steps:,} of {8 * steps:,} candidates kept (50 %)" in panel(shown)
    assert any("greats kept 20 of 40 candidates (50 %), which took" in line for line in plain_lines(events))


def test_what_the_planner_chose_is_announced(make_run):
    start = dict(load_run(make_run()).events[0])
    assert not any("Memory" in line for line in plain_lines([start]))
    start["memory"] = {
        "limit": 20_000_000_000,
        "predicted_peak": 3_200_000_000,
        "peak_phase": "optimizer step",
        "checkpointing": "layer",
        "micro_batch_tokens": 256,
    }
    words = "checkpointing layer, micro_batch_tokens 256: a step is predicted to need 3.2 GB of 20 GB"
    assert any(words in line for line in plain_lines([start]))


def test_lines_hold_no_markup_and_no_colour(make_run):
    events = list(load_run(make_run()).events)
    warning = {"kind": "warning", "message": "[red]disk[/red] nearly full", "spent": 0.0}
    text = "\n".join(plain_lines([*events[:2], warning]))
    assert "[red]disk[/red] nearly full" in text
    assert "\x1b" not in text


def test_gain_is_the_paired_fall_of_the_anchors_for_what_was_spent(make_run):
    shown = Progress()
    for event in load_run(make_run()).events[:2]:
        shown(event)
    seen = {"anchors_before": [2.0, 3.0], "anchors_now": [1.5, 2.3], "spent_before": 1e12, "spent": 3e12}
    decision = {"kind": "decision", "step": 1, "action": "CONTINUE", "reason": "", "inputs": {"observation": seen}}
    shown({**decision, "spent": 3e12})
    rate, error = shown.gain
    assert rate == pytest.approx(0.6 / (2e12 / 1e15))
    assert error == pytest.approx(0.1 / (2e12 / 1e15))  # differences 0.5 and 0.7: sd 0.1414, over sqrt 2


def test_a_resumed_run_shows_what_happened_before_it(make_run):
    run = make_run(finish=False)
    record = load_run(run)
    resume = {"kind": "resume", "step": 20, "discarded_seconds": 12.0, "spent": record.spent, "time": 0.0}
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps(resume) + "\n")
    shown = LiveDisplay(terminal(), directory=run)
    shown(resume)
    whole = Progress()
    for event in record.events:
        whole(event)
    assert shown.losses == whole.losses
    assert shown.spending == whole.spending
    assert "resumed from a checkpoint" in panel(shown)
    (line,) = plain_lines([resume], directory=run)
    assert line.strip().startswith("52.6 %") or "resumed at step 20; 12 s of work" in line


def test_a_loss_that_is_not_finite_is_shown_as_such(make_run):
    events = [*load_run(make_run()).events[:2]]
    step = {"kind": "step", "step": 1, "phase": "train", "loss": None, "lr": 1e-4, "spent": 3e12}
    assert any("loss n/a" in line for line in plain_lines([*events, step]))


@given(st.lists(st.floats(-1e6, 1e6), max_size=200), st.integers(1, 40))
def test_a_sparkline_is_never_wider_than_asked_and_spans_its_range(values, width):
    line = sparkline(values, width)
    assert len(line) == min(width, len(values))
    if len(set(values)) > 1 and len(values) <= width:
        assert {"▁", "█"} <= set(line)


@pytest.mark.parametrize("name", ["models/[red]tiny[/red]", "models/[/nothing]", "models/:smile:"])
def test_the_name_of_a_model_is_shown_as_it_is(make_run, name):
    events = load_run(make_run()).events
    events[0]["model"]["name"] = name
    shown = LiveDisplay(terminal())
    for event in events:
        Progress.__call__(shown, event)
    assert name in panel(shown)
