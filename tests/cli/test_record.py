from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyeff.cli.record import Spending, load_run
from pyeff.errors import UserError


def lines_of(run):
    return (run / "events.jsonl").read_text().splitlines(keepends=True)


def rewrite(run, lines):
    (run / "events.jsonl").write_text("".join(lines))


def refused(path):
    with pytest.raises(UserError) as caught:
        load_run(path)
    return str(caught.value)


def test_a_missing_directory_a_file_and_a_foreign_directory_are_told_apart(tmp_path):
    (tmp_path / "file").write_text("")
    assert "is missing" in refused(tmp_path / "nothing")
    assert "is a file" in refused(tmp_path / "file")
    assert "has no events.jsonl" in refused(tmp_path)


@pytest.mark.parametrize("content", ["", '{"kind": "sta'])
def test_a_run_without_a_whole_event_has_no_events_yet(tmp_path, content):
    (tmp_path / "events.jsonl").write_text(content)
    assert "no events yet" in refused(tmp_path)


@pytest.mark.parametrize("damage", ["not json\n", "[1, 2]\n", '{"step": 3}\n', '{"kind": 7}\n'])
def test_a_corrupt_line_is_named_with_its_number(make_run, damage):
    run = make_run()
    lines = lines_of(run)
    rewrite(run, [*lines[:6], damage, *lines[7:]])
    assert "events.jsonl, line 7:" in refused(run)


def test_bytes_that_are_not_text_are_named_with_their_line(make_run):
    run = make_run()
    lines = lines_of(run)
    (run / "events.jsonl").write_bytes("".join(lines[:3]).encode() + b'{"kind": "\xff\xfe"}\n')
    assert "line 4: not UTF-8" in refused(run)


def test_a_number_that_is_text_is_named(make_run):
    run = make_run()
    lines = lines_of(run)
    event = json.loads(lines[5])
    rewrite(run, [*lines[:5], json.dumps({**event, "spent": "a lot"}) + "\n", *lines[6:]])
    assert "line 6: `spent`" in refused(run)


def test_another_event_format_is_refused_with_both_numbers(make_run):
    run = make_run()
    lines = lines_of(run)
    rewrite(run, [json.dumps({**json.loads(lines[0]), "format": 9}) + "\n", *lines[1:]])
    assert "format 9" in refused(run)
    assert "format 1" in refused(run)


def test_an_event_without_its_fields_is_of_another_version(make_run):
    run = make_run()
    lines = lines_of(run)
    event = json.loads(lines[4])
    missing = {k: v for k, v in event.items() if k != "loss"}
    assert "loss" in event
    rewrite(run, [*lines[:4], json.dumps(missing) + "\n", *lines[5:]])
    assert "another version" in refused(run)


def test_a_run_that_lost_its_beginning_is_refused(make_run):
    run = make_run()
    rewrite(run, lines_of(run)[1:])
    assert "expected the event `start`" in refused(run)


@pytest.mark.parametrize("budget", [3, {"amount": "4e13"}, {"amount": 1.0, "unit": "furlongs"}])
def test_a_budget_that_cannot_be_read_is_refused(make_run, budget):
    run = make_run()
    lines = lines_of(run)
    rewrite(run, [json.dumps({**json.loads(lines[0]), "budget": budget}) + "\n", *lines[1:]])
    assert "`budget` must hold" in refused(run)


def test_kinds_of_a_later_version_are_passed_over(make_run):
    run = make_run()
    before = load_run(run).spent
    rewrite(run, [*lines_of(run)[:-1], '{"kind": "applause", "volume": 11}\n', lines_of(run)[-1]])
    assert load_run(run).spent == before


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_run_killed_at_any_byte_reads_back_as_its_whole_events(make_run, data):
    run = make_run()
    whole = (run / "events.jsonl").read_bytes()
    first = whole.index(b"\n") + 1
    cut = data.draw(st.integers(first, len(whole)))
    (run / "events.jsonl").write_bytes(whole[:cut])
    assert len(load_run(run).events) == whole[:cut].count(b"\n")


@pytest.mark.parametrize("unit", ["flops", "seconds"])
def test_spending_by_events_agrees_with_the_ledger(make_run, unit):
    record = load_run(make_run(unit=unit))
    spending = Spending()
    for event in record.events:
        spending.add(event)
    assert spending.total == pytest.approx(record.spent)
    assert spending.by_field == pytest.approx(record.where_the_budget_went())


def test_the_fields_of_a_finished_run_add_up_to_what_was_spent(make_run):
    for unit in ("flops", "seconds", "tokens"):
        record = load_run(make_run(unit, unit=unit))
        assert sum(record.where_the_budget_went().values()) == pytest.approx(record.spent)


def test_discarded_seconds_count_in_a_time_budget_only(make_run):
    for unit, counted in (("flops", False), ("seconds", True)):
        run = make_run(unit, unit=unit)
        lines = lines_of(run)
        end = json.loads(lines[-1])
        end["ledger"]["discarded"] = {"flops": 1e12, "seconds": 9.0, "tokens": 100}
        rewrite(run, [*lines[:-1], json.dumps(end) + "\n"])
        assert ("discarded" in load_run(run).where_the_budget_went()) is counted


def test_scoring_spans_cover_exactly_what_scoring_cost(make_run):
    record = load_run(make_run(refreshes=2))
    spans = record.scoring_spans()
    assert len(spans) == len(record.of("score")) == 2
    assert sum(b - a for a, b in spans) == pytest.approx(record.where_the_budget_went()["score"])
