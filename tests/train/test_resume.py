"""A run that is killed at any moment and resumed is the run that was not killed, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyeff.train.events import read_events

# What each kill hits is asserted by `killed_runs.py`: the process must die of it.
KILLS: dict[str, list[dict[str, Any]]] = {
    "before the first event": [{"at": "event", "n": 1}],
    "in the first evaluation": [{"at": "charge", "n": 2}],
    "before the first checkpoint": [{"at": "charge", "n": 12}],
    "in the first checkpoint's tensors": [{"at": "tensors", "n": 2}],
    "in a later checkpoint's state": [{"at": "charge", "n": 45}, {"at": "state", "n": 1}],
    "between a file and its event": [{"at": "event", "n": 30}],
    "while an old checkpoint is deleted": [{"at": "delete", "n": 5}],
    "while the pool is scored, twice": [{"at": "charge", "n": 26}, {"at": "charge", "n": 20}],
    "in the middle, three times": [{"at": "charge", "n": 60}, {"at": "charge", "n": 33}, {"at": "event", "n": 9}],
    "at the very end": [{"at": "result", "n": 1}],
}


def run_all(config: dict[str, Any], directory: Path, kills: dict[str, list[dict[str, Any]]]) -> dict[str, Path]:
    """Run every scenario in a fresh interpreter; returns their directories by name."""
    outs = {name: directory / name.replace(" ", "-") for name in kills}
    runs = [{"out": str(outs[name]), "kills": kills[name]} for name in kills]
    script = Path(__file__).with_name("killed_runs.py")
    done = subprocess.run(
        [sys.executable, str(script), json.dumps({"config": config, "runs": runs})],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return outs


def history(out: Path) -> list[dict[str, Any]]:
    """The events but for what the clock wrote and for the resumes themselves."""
    events = []
    for event in read_events(out / "events.jsonl"):
        if event["kind"] in ("resume", "checkpoint"):
            continue
        event = {key: value for key, value in event.items() if key not in ("time", "seconds")}
        if event["kind"] == "start":
            event["config"].pop("out")
        if event["kind"] == "end":
            event["ledger"].pop("discarded")
            for row in event["ledger"].values():
                row.pop("seconds")
        events.append(event)
    return events


@pytest.fixture(scope="module", params=["flops", "tokens", "opus", "greats"])
def runs(request: pytest.FixtureRequest, task_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory):
    if request.param == "flops":
        config, kills = {**task_config, "budget": "8e8F"}, KILLS
    elif request.param == "opus":
        # What is chosen depends on the 8-bit moments, the rate, the target samples that come next, and on draws.
        config = {**task_config, "budget": "1e9F", "batch_selection": {"method": "opus"}}
        kills = {
            "while candidates are passed": [{"at": "charge", "n": 30}, {"at": "charge", "n": 40}],
            "in a later checkpoint's tensors": [{"at": "tensors", "n": 7}],
        }
    elif request.param == "greats":
        config = {
            **task_config,
            "budget": "1e9F",
            "batch_selection": {"method": "greats", "defer": False},
            "lora": {"rank": 4, "dropout": 0.1},
            "optimizer": {"states": "32bit", "lr": 1e-2},
        }
        kills = {"between two passes": [{"at": "charge", "n": 70}], "at the very end": [{"at": "result", "n": 1}]}
    else:
        # Dropout draws random numbers in every step; 32-bit states have another state dictionary.
        config = {
            **task_config,
            "budget": "4k tokens",
            "lora": {"rank": 4, "dropout": 0.1},
            "optimizer": {"states": "32bit", "lr": 1e-2},
        }
        kills = {name: KILLS[name] for name in list(KILLS)[2:5]}
    return run_all(config, tmp_path_factory.mktemp(request.param), {"not killed": [], **kills})


def test_a_resumed_run_has_every_loss_and_decision_of_the_uninterrupted_one(runs: dict[str, Path]):
    whole = history(runs["not killed"])
    assert {event["kind"] for event in whole} >= {"step", "evaluate", "decision", "score", "select", "end"}
    for name, out in runs.items():
        assert history(out) == whole, name


def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(runs: dict[str, Path]):
    for name in ("model", "checkpoints"):
        whole = runs["not killed"] / name
        files = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
        assert files
        for scenario, out in runs.items():
            found = sorted(path.relative_to(out / name) for path in (out / name).rglob("*.safetensors"))
            assert found == files, scenario
            for file in files:
                assert (out / name / file).read_bytes() == (whole / file).read_bytes(), (scenario, file)


def test_the_decision_log_is_the_same_and_nothing_torn_is_left(runs: dict[str, Path]):
    whole = (runs["not killed"] / "decisions.jsonl").read_text()
    for name, out in runs.items():
        assert (out / "decisions.jsonl").read_text() == whole, name
        assert not list(out.rglob(".partial*")), name
        assert len(list((out / "checkpoints").iterdir())) == 2, name


def test_work_done_twice_is_charged_to_discarded_and_to_nothing_else(runs: dict[str, Path]):
    def ledger(out: Path) -> dict[str, Any]:
        return json.loads((out / "result.json").read_text())["ledger"]

    whole = ledger(runs["not killed"])
    assert whole["discarded"]["flops"] == 0
    for name, out in runs.items():
        own = ledger(out)
        for field in whole:
            if field != "discarded":
                assert own[field]["flops"] == whole[field]["flops"], (name, field)
    lost = runs.get(
        "before the first checkpoint", runs.get("while candidates are passed", runs.get("between two passes"))
    )
    assert ledger(lost)["discarded"]["flops"] > 0
    assert ledger(lost)["discarded"]["seconds"] > 0
