from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from pyeff.errors import UserError
from pyeff.train.events import EventLog, read_events


def test_observers_see_exactly_what_is_written(tmp_path: Path):
    seen: list = []
    log = EventLog(tmp_path / "events.jsonl", [seen.append])
    log.emit("step", spent=1.0, loss=0.1 + 0.2, name="ü\ud800")
    log.emit("end", spent=2.0, values=(1, math.nan, math.inf))
    log.close()
    written = list(read_events(tmp_path / "events.jsonl"))
    assert [event["kind"] for event in written] == ["step", "end"]
    assert written[0]["loss"] == seen[0]["loss"] == 0.1 + 0.2
    assert written[1]["values"] == seen[1]["values"] == [1, None, None]
    for line in (tmp_path / "events.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))


def test_truncating_forgets_later_events_and_writing_goes_on_there(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.emit("step", spent=1.0)
    offset = log.offset
    log.emit("step", spent=2.0)
    log.truncate_to(offset)
    log.emit("step", spent=3.0)
    assert [event["spent"] for event in read_events(path)] == [1.0, 3.0]


def test_a_line_torn_by_a_kill_is_left_out_and_a_broken_one_named(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"kind": "a"}\n{"kind": "b"')
    assert [event["kind"] for event in read_events(path)] == ["a"]
    path.write_text('{"kind": "a"}\n{"kind"\n{"kind": "c"}\n')
    with pytest.raises(UserError, match="line 2"):
        list(read_events(path))


def test_a_full_disk_is_one_sentence():
    log = EventLog(Path("/dev/full"))
    with pytest.raises(UserError, match="No space left"):
        log.emit("step", spent=0.0)
