from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import subprocess
import sys
import time

import pytest

from pyeff.governor import (
    DecisionLog,
    GovernorConfig,
    GovernorPolicy,
    Observation,
    audit_decisions,
    read_decisions,
    replay,
)


def run(policy, *, checks=60, noise=0.01, seed=0, scatter=0.2, anchors=64):
    """Loss falls with the logarithm of training, by amounts that scatter from check to check."""
    source = random.Random(seed)
    difficulty = [source.gauss(2, 0.5) for _ in range(anchors)]
    budget, spent, fallen, before, previous = 100.0, 0.0, 0.0, 0.0, ()
    decisions = []
    for step in range(checks):
        now = tuple(loss - fallen + source.gauss(0, noise) for loss in difficulty)
        decisions.append(
            policy.decide(
                Observation(
                    step=step,
                    spent=spent,
                    budget=budget,
                    unit="tokens",
                    anchors_before=previous,
                    anchors_now=now,
                    spent_before=before,
                    refresh_cost=90.0,
                    cooldown_cost=1.0,
                )
            )
        )
        previous, before = now, spent
        step_size = 80.0 / checks
        fallen += (
            0.5 * (math.log1p((spent + step_size) / 5) - math.log1p(spent / 5)) * math.exp(source.gauss(0, scatter))
        )
        spent += step_size
    return decisions


CONFIG = GovernorConfig(check_every=80 / 60 / 100, warmup=0.0)


def test_calibrated_promises_cover_what_was_realised_about_as_often_as_they_say():
    judged = covered = 0
    for seed in range(6):
        found = audit_decisions(run(GovernorPolicy(CONFIG), seed=seed))
        judged += found.judged
        covered += round(found.coverage * found.judged)
        assert found.judged >= 40
        assert 0.7 < found.median_ratio < 1.4
    # Six runs of some 48: the adaption holds each near its level (step 0.03), beside the sampling error.
    assert abs(covered / judged - 0.9) <= 3 * math.sqrt(0.09 / judged) + 0.02


def test_an_audit_pairs_each_promise_with_the_gain_that_followed():
    decisions = run(GovernorPolicy(CONFIG), checks=12)
    found = audit_decisions(decisions)
    assert len(found.outcomes) + found.unjudged == len(decisions)
    by_step = {outcome.step: outcome for outcome in found.outcomes}
    for decision, following in itertools.pairwise(decisions):
        if decision.step in by_step:
            assert by_step[decision.step].predicted == decision.estimates["forecast"]["rate"]
            assert by_step[decision.step].realised == following.estimates["gain_rate"]
    assert audit_decisions(decisions[:1]).coverage is None


def test_long_runs_replay_bit_for_bit_with_laws_filter_and_calibration(tmp_path):
    log = DecisionLog(tmp_path / "decisions.jsonl")
    for decision in run(GovernorPolicy(CONFIG), checks=30):
        log.append(decision)
    assert all(logged == again for logged, again in replay(log.path))
    assert read_decisions(log.path)[-1].inputs["state"]["forecaster"]["calibration"]["scores"]


def test_a_governor_resumed_in_the_middle_makes_the_same_promises(tmp_path):
    whole = run(GovernorPolicy(CONFIG), checks=30)
    resumed = GovernorPolicy(CONFIG)
    resumed.load_state_dict(json.loads(json.dumps(whole[20].inputs["state"])))
    assert resumed.decide(Observation.from_dict(whole[20].inputs["observation"])) == whole[20]


def test_a_decision_takes_less_than_five_milliseconds():
    decisions = run(GovernorPolicy(CONFIG), checks=55, anchors=128)
    governor, times = GovernorPolicy(CONFIG), []
    governor.load_state_dict(decisions[-1].inputs["state"])
    state = decisions[-1].inputs["state"]
    observation = Observation.from_dict(decisions[-1].inputs["observation"])
    for _ in range(15):
        governor.load_state_dict(state)
        start = time.perf_counter()
        governor.decide(observation)
        times.append(time.perf_counter() - start)
    assert min(times) < 5e-3


def test_a_log_of_another_version_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "decisions.jsonl"
    decision = run(GovernorPolicy(CONFIG), checks=1)[0]
    old = {name: value for name, value in decision.inputs.items() if name != "version"}
    DecisionLog(path).append(dataclasses.replace(decision, inputs=old))
    with pytest.raises(ValueError, match=r"line 1, cannot be replayed: it was written by another version of pyeff"):
        replay(path)


@pytest.fixture
def logged(tmp_path):
    log = DecisionLog(tmp_path / "decisions.jsonl")
    for decision in run(GovernorPolicy(CONFIG), checks=20):
        log.append(decision)
    return tmp_path


def command(*arguments):
    done = subprocess.run([sys.executable, "-m", "pyeff.cli", *map(str, arguments)], capture_output=True, text=True)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_pyeff_replay_says_whether_every_decision_comes_out_as_logged(logged):
    code, said = command("replay", logged)
    assert code == 0
    assert "All 20 decisions" in said
    (logged / "none.jsonl").touch()
    assert "holds no decision" in command("replay", logged / "none.jsonl")[1]
    path = logged / "decisions.jsonl"
    lines = path.read_text().splitlines()
    changed = json.loads(lines[7])
    changed["inputs"]["observation"]["anchors_now"][0] += 1.0
    lines[7] = json.dumps(changed)
    path.write_text("\n".join(lines) + "\n")
    code, said = command("replay", logged)
    assert code == 1
    assert "1 of 20 decisions" in said


def test_pyeff_audit_prints_predicted_and_realised_gains_and_their_coverage(logged, tmp_path_factory):
    code, said = command("audit", logged)
    assert code == 0
    assert "18 promises could be judged" in said
    assert "calibrated 90 % intervals" in said
    code, said = command("audit", tmp_path_factory.mktemp("empty"))
    assert code == 2
    assert "no decisions.jsonl" in said
    code, said = command("audit", "nowhere")
    assert code == 2
    assert "there is no such directory" in said


def test_an_audit_judges_no_promise_across_a_line_that_is_missing_or_repeated():
    decisions = run(GovernorPolicy(CONFIG), checks=20)
    whole = {outcome.step for outcome in audit_decisions(decisions).outcomes}
    repeated = audit_decisions([*decisions[:10], decisions[9], *decisions[10:]])
    assert [outcome.step for outcome in repeated.outcomes] == sorted(whole)
    missing = audit_decisions([*decisions[:10], *decisions[11:]])
    assert {outcome.step for outcome in missing.outcomes} == whole - {decisions[9].step, decisions[10].step}
    twice = audit_decisions(decisions + decisions)
    assert [outcome.step for outcome in twice.outcomes] == 2 * sorted(whole)


@pytest.mark.parametrize("estimates", [None, {"forecast": {}, "gain_rate": 1.0}, {"forecast": "x", "gain_rate": 1.0}])
def test_estimates_that_hold_no_rates_are_refused_in_one_sentence(estimates):
    decisions = run(GovernorPolicy(CONFIG), checks=5)
    decisions[3] = dataclasses.replace(decisions[3], estimates=estimates)
    with pytest.raises(ValueError, match="holds no rates"):
        audit_decisions(decisions)
