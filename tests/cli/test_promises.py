"""Promised beside measured gains in the report of a run."""

from __future__ import annotations

import itertools
import json
import math

import pytest

from pyeff.cli.audit import audit_sentence
from pyeff.cli.promises import audit_of, kept, promises
from pyeff.cli.record import load_run
from pyeff.cli.report import write_report


def with_estimates(run, estimates):
    """The run with `estimates(i)` in its i-th decision."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    made = [event for event in events if event["kind"] == "decision"]
    for i, event in enumerate(made):
        event["estimates"] = estimates(i)
        event["inputs"]["observation"]["spent_before"] = made[i - 1]["inputs"]["observation"]["spent"] if i else 0.0
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return load_run(run)


def falling(i):
    """A rate of 2^-i that was promised to be as large as the one before, give or take a half."""
    trained, rate = 4.0, 2.0**-i
    return {
        "gain": {"mean": rate * trained, "low": 0.5 * rate * trained, "high": 2 * rate * trained},
        "gain_rate": rate,
        "forecast": {"rate": rate, "low": 0.5 * rate if i > 2 else None, "high": 1.5 * rate if i > 2 else None},
    }


def judged(record):
    """How many promises a check judged; the last decision of these runs repeats the step of the one before it."""
    steps = [event["step"] for event in record.of("decision")]
    return sum(before < after for before, after in itertools.pairwise(steps))


def test_a_promise_stands_beside_what_the_next_check_measured(make_run):
    record = with_estimates(make_run(), falling)
    made, found = record.of("decision"), kept(record)
    assert len(found) == judged(record)
    assert tuple(each.realised for each in found) == tuple(each.realised for each in audit_of(record).outcomes)
    for i, each in enumerate(found):
        assert each.spent == made[i]["spent"]
        assert (each.predicted, each.realised) == (2.0**-i, 2.0 ** -(i + 1))
        assert each.error == pytest.approx((0.5 * each.realised, 2 * each.realised))
        assert (each.interval is None) == (i <= 2)
    # The next is half of what was promised, on the lower end of its interval.
    said = audit_sentence(audit_of(record))
    assert f"{len(found)} promised a gain; what followed was 0.50 times as much" in said
    assert f"Of {len(found) - 3} calibrated 90 % intervals 100% held" in said


def test_a_report_shows_promises_where_there_were_any(make_run):
    plain, promised = make_run("plain"), make_run("promised")
    with_estimates(promised, falling)
    for run, shown in ((plain, False), (promised, True)):
        page = write_report(load_run(run)).read_text()
        assert ("Promised and measured gains" in page) == shown
        assert (run / "plots" / "promises.png").exists() == shown


@pytest.mark.parametrize(
    "damage",
    [
        {"forecast": {"rate": "fast"}},
        {"forecast": {}},
        {"forecast": {"rate": math.nan}},
        {"forecast": [1.0]},
        {"gain_rate": "fast"},
        {"gain_rate": math.inf},
        {"gain": {"mean": 1.0}},
        {"gain": None},
    ],
)
def test_what_is_damaged_is_left_out_and_the_rest_is_drawn(make_run, damage):
    record = with_estimates(make_run(), lambda i: falling(i) | (damage if i == 1 else {}))
    found = kept(record)
    assert len(found) == judged(record) - ("gain" not in damage)
    if "gain" in damage:
        assert found[0].error is None
    promises(record)


def test_no_gain_at_all_is_drawn_too(make_run):
    record = with_estimates(make_run(), lambda i: falling(i) | {"gain_rate": 0.0})
    assert {each.error for each in kept(record)} == {None}
    promises(record)
