from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyeff.governor import Budget, Cost, Ledger
from pyeff.train import meter as meter_module
from pyeff.train.meter import Meter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still unless a test moves it."""
    now = [100.0]
    monkeypatch.setattr(meter_module.time, "monotonic", lambda: now[0])
    return now


def a_meter(tmp_path: Path, budget: str) -> Meter:
    return Meter(
        Budget.parse(budget), forward=Cost(2, 1, 4), train=Cost(6, 3, 12), heartbeat=tmp_path / "heartbeat.json"
    )


def test_every_second_is_charged_exactly_once(tmp_path: Path, clock: list[float]):
    meter = a_meter(tmp_path, "60s")
    clock[0] += 50  # loading
    meter.start_clock()
    for field, seconds in (("eval", 2.0), ("train", 3.0), ("train", 4.0), ("score", 5.0)):
        clock[0] += seconds
        meter.charge(field, flops=10)
    assert meter.spent == 14.0
    assert meter.ledger.entry("train").seconds == 7.0


def test_a_price_in_flops_or_tokens_reads_no_clock(tmp_path: Path, clock: list[float]):
    flops, tokens = a_meter(tmp_path, "1e9F"), a_meter(tmp_path, "1k tokens")
    for _ in range(2):
        assert flops.price("score", flops=77, tokens=5) == 77
        assert tokens.price("train", flops=77, tokens=5) == tokens.price("cooldown", flops=77, tokens=5) == 5
        assert tokens.price("score", flops=77, tokens=5) == 0
        clock[0] += 1000
        flops.charge("train", flops=1)
        tokens.charge("train", flops=1)


def test_a_price_in_seconds_follows_the_rate_measured_for_its_own_kind_of_work(tmp_path: Path, clock: list[float]):
    meter = a_meter(tmp_path, "60s")
    assert meter.price("train", flops=1000) == 0.0
    clock[0] += 2.0
    meter.charge("eval", flops=100)
    # Nothing was trained yet: the rate of what was done must do.
    assert meter.price("train", flops=1000) == pytest.approx(20.0)
    clock[0] += 9.0
    meter.charge("train", flops=300)
    assert meter.price("cooldown", flops=1000) == pytest.approx(30.0)
    assert meter.price("eval", flops=1000) == pytest.approx(20.0)


def test_what_fits_leaves_the_reserve(tmp_path: Path, clock: list[float]):
    meter = a_meter(tmp_path, "100F")
    meter.charge("train", flops=50)
    assert meter.fits(30, reserve=20)
    assert not meter.fits(31, reserve=20)


def test_work_lost_in_a_kill_is_discarded_even_when_it_is_lost_twice(tmp_path: Path, clock: list[float]):
    first = a_meter(tmp_path, "60s")
    clock[0] += 1.0
    first.charge("train", flops=10, tokens=1)
    saved = first.ledger.state_dict()
    clock[0] += 4.0
    first.charge("train", flops=40, tokens=4)

    for attempt, (flops, seconds) in enumerate(((40, 4.0), (60, 6.5)), start=1):
        meter = a_meter(tmp_path, "60s")
        ledger = Ledger()
        ledger.load_state_dict(json.loads(json.dumps(saved)))
        meter.lost_since(ledger)
        lost = meter.ledger.entry("discarded")
        assert (lost.flops, lost.seconds) == (flops, seconds), attempt
        assert meter.ledger.entry("train").flops == 10
        clock[0] += 2.5
        meter.charge("train", flops=20, tokens=2)
    # All that the machine ever did: 5 s before the first kill and 2.5 s in each attempt since.
    assert meter.spent == 10.0


@pytest.mark.parametrize("content", [None, "", "{", '{"flops": 1}', '{"flops": "x", "seconds": 1, "tokens": 0}'])
def test_a_heartbeat_that_is_missing_or_torn_costs_nothing(tmp_path: Path, clock: list[float], content: str | None):
    meter = a_meter(tmp_path, "60s")
    if content is not None:
        (tmp_path / "heartbeat.json").write_text(content)
    meter.lost_since(Ledger())
    assert meter.ledger == Ledger()


def test_a_heartbeat_that_cannot_be_written_does_not_stop_the_run(tmp_path: Path, clock: list[float]):
    meter = a_meter(tmp_path / "gone", "60s")
    meter.charge("train", flops=5)
    assert meter.ledger.entry("train").flops == 5
