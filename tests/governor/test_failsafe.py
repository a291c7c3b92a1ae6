from __future__ import annotations

import errno
import math

import pytest

import pyeff.governor.log as log_module
from pyeff.governor import Action, Governor, GovernorPolicy, Selector, read_decisions, replay


class Failing(GovernorPolicy):
    """A policy that makes no decision of any measurement after some checks, as numbers too large to square do."""

    def __init__(self, config, fail):
        super().__init__(config)
        self.fail, self.checks = fail, 0

    def decide(self, observation):
        self.checks += 1
        decision = super().decide(observation)
        return self.fail(decision) if self.checks > 4 and observation.anchors_now else decision


def too_large(decision):
    raise OverflowError("too large")


def not_a_number(decision):
    decision.values["CONTINUE"] = math.nan
    return decision


@pytest.mark.parametrize("fail", [too_large, not_a_number])
def test_a_check_whose_numbers_make_no_decision_keeps_the_schedule_and_says_why(tmp_path, fail):
    losses = iter(range(1000))
    governor = Governor(
        "1000 tokens",
        anchors=lambda: [3.0 - 0.01 * next(losses), 2.0],
        selectors=[Selector("dear", 900.0)],
        log=tmp_path / "log.jsonl",
    )
    governor.policy = Failing(governor.config, fail)
    while not governor.done:
        governor.step(tokens=10)
    decisions = read_decisions(tmp_path / "log.jsonl")
    assert governor.spent == 1000
    assert decisions[-1].action is Action.COOLDOWN
    assert all("make no decision" not in decision.reason for decision in decisions[:4])
    assert all("its numbers make no decision" in decision.reason for decision in decisions[4:-1])
    assert all(logged == again for logged, again in replay(tmp_path / "log.jsonl"))
    # What failed left no trace: each check was counted once.
    assert governor.policy.state_dict()["checks"] == len(decisions)


def test_a_full_disk_costs_lines_of_the_log_and_not_the_training(tmp_path, monkeypatch):
    path, sync, calls = tmp_path / "log.jsonl", log_module._sync, []

    def full_at_times(file):
        calls.append(len(calls))
        if calls[-1] in (3, 5):  # of decisions 3 and 4: to cut the part that is on the disk is call 4
            file.flush()
            file.truncate(path.stat().st_size - 7)
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    monkeypatch.setattr(log_module, "_sync", full_at_times)
    governor = Governor("1000 tokens", anchors=lambda: [3.0, 2.0], log=path)

    def train():
        made = []
        while not governor.done:
            made.append(governor.step(tokens=10))
        return [decision for decision in made if decision is not None]

    with pytest.warns(RuntimeWarning, match=r"is not in the log .*No space left on device") as warned:
        decisions = train()
    assert len(warned) == 2
    assert governor.spent == 1000
    kept = [decision for number, decision in enumerate(decisions) if number not in (3, 4)]
    assert read_decisions(path) == kept
    assert governor.state_dict()["decisions"] == len(kept)
