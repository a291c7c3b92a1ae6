from __future__ import annotations

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyeff.governor import (
    DecisionLog,
    GovernorConfig,
    GovernorPolicy,
    Observation,
    UniformPolicy,
    read_decisions,
    replay,
)

LOSS = st.floats(-10, 10) | st.just(math.nan) | st.just(math.inf)
ANY_LOSSES = st.lists(LOSS, min_size=4, max_size=4)
CHECKS = st.lists(
    st.fixed_dictionaries(
        {
            "advance": st.floats(0.001, 20),
            "losses": ANY_LOSSES | st.lists(st.floats(0, 5), min_size=4, max_size=4),
            "refresh": st.floats(0, 30),
            "obey": st.booleans(),
            "finite": st.booleans() | st.just(True),
        }
    ),
    min_size=1,
    max_size=15,
)


def decide_all(policy, checks):
    """Give a policy any course of events, obeyed or not, with any losses."""
    spent = before = 0.0
    previous, scored_at, refreshes, decisions = (), None, 0, []
    for step, check in enumerate(checks):
        decision = policy.decide(
            Observation(
                step=step,
                spent=spent,
                budget=100.0,
                unit="tokens",
                anchors_before=previous,
                anchors_now=check["losses"],
                spent_before=before,
                refresh_cost=check["refresh"],
                cooldown_cost=20.0,
                scored_at=scored_at,
                refreshes_done=refreshes,
                loss_finite=check["finite"],
            )
        )
        decisions.append(decision)
        before, previous = spent, check["losses"]
        if decision.action == "REFRESH" and check["obey"]:
            spent += check["refresh"]
            scored_at, refreshes = spent, refreshes + 1
        spent += check["advance"]
    return decisions


def policies():
    return [
        GovernorPolicy(),
        UniformPolicy(),
        GovernorPolicy(GovernorConfig(response_checks=1, min_dwell=1, warmup=0.0)),
    ]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(checks=CHECKS, which=st.integers(0, 2))
def test_every_decision_can_be_taken_again_from_its_line_alone(tmp_path_factory, checks, which):
    path = tmp_path_factory.mktemp("log") / "decisions.jsonl"
    log = DecisionLog(path)
    decisions = decide_all(policies()[which], checks)
    for decision in decisions:
        log.append(decision)
    assert read_decisions(path) == decisions
    for logged, recomputed in replay(path):
        assert recomputed == logged
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # NaN and Infinity are not JSON


def a_decision(step=3):
    observation = Observation(
        step=step,
        spent=10,
        budget=100,
        unit="tokens",
        anchors_before=(2.0, 3.0),
        anchors_now=(1.0, 2.5),
        spent_before=5,
        refresh_cost=5,
        cooldown_cost=20,
    )
    return GovernorPolicy().decide(observation)


def test_a_changed_line_no_longer_replays(tmp_path):
    path = tmp_path / "decisions.jsonl"
    DecisionLog(path).append(a_decision())
    line = json.loads(path.read_text())
    line["inputs"]["observation"]["refresh_cost"] = 90.0
    path.write_text(json.dumps(line) + "\n")
    [(logged, recomputed)] = replay(path)
    assert logged.action == "REFRESH"
    assert recomputed.action == "CONTINUE"


@given(st.integers(0, 5), st.integers(0, 5))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_resume_keeps_the_lines_of_its_checkpoint_and_no_more(tmp_path_factory, kept, added):
    path = tmp_path_factory.mktemp("log") / "decisions.jsonl"
    log = DecisionLog(path)
    for step in range(5):
        log.append(a_decision(step))
    resumed = DecisionLog(path)
    resumed.truncate_to(kept)
    for step in range(100, 100 + added):
        resumed.append(a_decision(step))
    assert len(resumed) == kept + added
    assert [d.step for d in read_decisions(path)] == [*range(kept), *range(100, 100 + added)]


def test_a_line_torn_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "decisions.jsonl"
    log = DecisionLog(path)
    log.append(a_decision(1))
    log.append(a_decision(2))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(first, len(whole), 37):
        path.write_bytes(whole[:size])
        assert [d.step for d in read_decisions(path)] == [1]
    torn = DecisionLog(path)
    torn.append(a_decision(3))
    assert [d.step for d in read_decisions(path)] == [1, 3]


def test_broken_logs_are_reported_with_their_line(tmp_path):
    path = tmp_path / "decisions.jsonl"
    DecisionLog(path).append(a_decision())
    good = path.read_text()
    path.write_text(good + "{}\n")
    with pytest.raises(ValueError, match="line 2, is not a decision"):
        read_decisions(path)
    unknown = json.loads(good)
    unknown["inputs"]["policy"] = "oracle"
    path.write_text(good + json.dumps(unknown) + "\n")
    with pytest.raises(ValueError, match="line 2, cannot be replayed: policy must be one of governor, uniform"):
        replay(path)
    with pytest.raises(ValueError, match="n_lines must lie between 0 and the 2 decisions"):
        DecisionLog(path).truncate_to(3)


def test_logs_that_no_policy_can_have_written_are_reported_with_their_line(tmp_path):
    path = tmp_path / "decisions.jsonl"
    path.write_text("[" * 200_000 + "\n")
    with pytest.raises(ValueError, match="line 1, is not a decision"):
        read_decisions(path)
    path.unlink()
    DecisionLog(path).append(a_decision())
    good = json.loads(path.read_text())
    inputs = good["inputs"]
    for changed in (
        {"state": {**inputs["state"], "belief": None}},  # that of the uniform policy
        {"config": {**inputs["config"], "check_every": 1e-320}},
        {"observation": {**inputs["observation"], "spent": 10**400}},
    ):
        path.write_text(json.dumps({**good, "inputs": {**inputs, **changed}}) + "\n")
        with pytest.raises(ValueError, match="line 1, cannot be replayed"):
            replay(path)
