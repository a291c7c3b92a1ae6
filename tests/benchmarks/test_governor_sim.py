"""The simulated worlds, their oracle, the contenders and the measures that judge them."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
from governor import metrics, replay
from governor.baselines import Asha, FixedInterval, Static, UniformLinear, UniformWsd
from governor.governed import ABLATIONS, Governed
from governor.oracle import best_training, oracle_runs
from governor.policies import Setup, View, cooldown_end, lr_factor
from governor.roster import GOVERNOR, roster
from governor.sim import judge, run_cell
from governor.simulate import simulate
from governor.world import CONTROLS, EVAL_FLOPS, FAMILIES, SELECTORS, WSD_TOTAL, draw, linear_pace

from pyeff.governor import GovernorConfig, GovernorPolicy, Observation
from pyeff.governor.log import DecisionLog

SEEDS = range(20_000, 20_004)


@pytest.mark.parametrize("family", FAMILIES + CONTROLS)
def test_no_fixed_policy_beats_the_oracle(family):
    worlds, budget = draw(family, SEEDS), 2.5
    best = np.array([run.loss for run in oracle_runs(worlds, budget)])
    for make in (UniformWsd, *(partial(FixedInterval, selector=name, every=0.2) for name in SELECTORS)):
        own = np.array([run.loss for run in simulate(worlds, make, budget)])
        # A policy scores at its checks, the oracle on a grid: it may be behind by one point's worth of training.
        slack = worlds.loss(best_training(worlds, budget) - budget / 200 * 5) - best
        assert np.all(own >= best - slack)


def test_in_a_pool_of_one_kind_the_oracle_never_selects():
    worlds = draw("iid", SEEDS)
    assert best_training(worlds, 6.3) == pytest.approx(np.full(4, 6.3 * WSD_TOTAL), rel=1 / 200)


def test_uniform_trains_what_its_schedule_can():
    worlds = draw("fading", SEEDS)
    for make, edge in ((UniformWsd, 1.0), (UniformLinear, worlds.linear_edge)):
        done = np.array([run.effective for run in simulate(worlds, make, 2.5)])
        assert done == pytest.approx(2.5 * WSD_TOTAL * edge, rel=0.01)
    middles = (np.arange(1000) + 0.5) / 1000
    assert linear_pace(middles).mean() == pytest.approx(WSD_TOTAL, rel=1e-3)


def test_every_contender_spends_its_budget_and_not_more():
    worlds = draw("shock", SEEDS[:2])
    for name, make in roster(SELECTORS).items():
        for run in simulate(worlds, make, 1.0):
            assert run.policy == name
            assert run.spent <= 1.0 + 1e-9
            if not name.startswith("patience"):
                assert run.spent == pytest.approx(1.0, abs=1e-6)


def test_the_same_seeds_give_the_same_runs_alone_and_together():
    together = simulate(draw("late", SEEDS), Governed, 1.0)
    alone = simulate(draw("late", SEEDS[2:3]), Governed, 1.0)
    plain = [dataclasses.replace(run, decide_seconds=0.0) for run in (together[2], alone[0])]
    assert plain[0] == plain[1]


def test_a_selection_that_is_free_is_charged_nothing_and_no_worse():
    worlds = draw("fading", SEEDS)
    charged = simulate(worlds, partial(Static, selector="dear"), 2.5)
    free = simulate(worlds, partial(Static, selector="dear", free=True), 2.5)
    assert all(run.flops["score"] == 0 for run in free)
    assert all(a.flops["score"] == pytest.approx(c) for a, c in zip(charged, worlds.cost[:, 2], strict=True))
    # Where the selection helps at all, paying for it cannot be better.
    helps = worlds.ratio[:, 2] > 1
    assert all(f.loss < c.loss for f, c, h in zip(free, charged, helps, strict=True) if h)


def test_the_governor_scores_within_its_cap_and_not_at_all_where_nothing_is_affordable():
    for family in ("iid", "tenfold"):
        for run in simulate(draw(family, SEEDS), Governed, 1.0):
            # The cap is on what is spent when a scoring is bought; evaluations go on after that, 16 at most.
            assert run.overhead <= 0.05 + 16 * EVAL_FLOPS
    dear = draw("iid", SEEDS)
    dear = dataclasses.replace(dear, cost=dear.cost * 1e3)
    uniform = simulate(dear, UniformWsd, 1.0)
    for own, base in zip(simulate(dear, Governed, 1.0), uniform, strict=True):
        assert own.switches == 0
        assert 1 - own.effective / base.effective == pytest.approx(own.overhead / WSD_TOTAL, rel=0.05)


def test_the_governor_beats_uniform_where_selections_help_and_fade():
    worlds = draw("fading", range(20_000, 20_012))
    own, base = simulate(worlds, Governed, 6.3), simulate(worlds, UniformWsd, 6.3)
    by_seed = [{run.seed: run.loss for run in runs} for runs in (own, base)]
    assert metrics.paired(*by_seed).difference.high < 0


def test_every_ablation_takes_away_what_it_says():
    setup = Setup(budget=1.0, selectors={"a": 0.1})
    governors = {name: Governed(setup, name=name, ablation=each) for name, each in ABLATIONS.items()}
    assert governors["governor-free"].free_selection
    assert governors["governor-no-control"].control == 0
    assert governors["governor-raw-weights"].needs == {"raw"}
    assert governors["governor-no-damping"].policy.config.min_dwell == 1
    view = View(step=1, spent=0.05, budget=1.0, reserve=0.2, anchors=[2.0, 3.0], costs={"a": 0.1})
    for name, cost in (("governor-no-pay-back", 0.0), ("governor-no-uncertainty", 0.1)):
        governors[name].decide(dataclasses.replace(view))
        move = governors[name].decide(dataclasses.replace(view, step=2, spent=0.1, anchors=[1.9, 2.9]))
        # Half of the pool's worth at rho 2 less the price it was told.
        assert (move.record["values"]["REFRESH(a)"] > 0) == (cost == 0) or name == "governor-no-uncertainty"


def test_a_cell_is_judged_and_the_placebo_is_as_busy_as_the_governor():
    runs = run_cell("fading", 1.0, SEEDS, 2, held_out=False)
    found = judge(runs)
    assert found["policies"]["uniform-linear"]["regret"] in (None, pytest.approx(1.0))
    assert {"oracle", "placebo", "cads-s", "ado", "asha-2", GOVERNOR} <= found["policies"].keys()


def test_successive_halving_ranks_arms_that_have_selected():
    """Where nothing is scored before the first cut, the arms differ by chance alone."""
    worlds = draw("fading", SEEDS[:1])
    policy = Asha(Setup(budget=16.0, selectors=dict(zip(SELECTORS, worlds.cost[0].tolist(), strict=True))))
    at_first_cut: list[int] = []

    def watched(setup):
        deal = policy._deal

        def dealt():
            at_first_cut.append(len(policy.selected))
            deal()

        policy._deal = dealt
        return policy

    simulate(worlds, watched, 16.0)
    assert at_first_cut[0] == len(SELECTORS)


def test_regret_is_nothing_for_the_oracle_one_for_uniform_and_undecided_where_nothing_is_to_win():
    uniform, oracle = {1: 3.0, 2: 3.2, 3: 3.1}, {1: 2.0, 2: 2.1, 3: 2.2}
    assert metrics.regret(oracle, uniform, oracle).value == 0
    assert metrics.regret(uniform, uniform, oracle).value == 1
    assert not metrics.regret(uniform, uniform, uniform).decided


def test_holm_is_what_hand_calculation_gives():
    assert metrics.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


def test_flops_to_target_counts_everything_and_misses_are_infinite():
    run = metrics.Run("t", "p", 10.0, 0, 2.0, flops={"train": 8.0, "score": 2.0}, curve=[(4.0, 3.0), (8.0, 2.5)])
    assert [metrics.flops_to_target(run, target) for target in (3.0, 2.2, 1.9)] == [4.0, 10.0, math.inf]


def test_schedules_end_at_zero_and_an_early_anneal_ends_early():
    assert lr_factor("linear", 10.0, 10.0) == lr_factor("wsd", 10.0, 10.0, cooldown_start=8.0) == 0
    assert lr_factor("wsd", 5.0, 10.0) == 1
    assert cooldown_end(8.0, 10.0, cooldown=0.2, check_every=0.05) == 10
    assert cooldown_end(4.0, 10.0, cooldown=0.2, check_every=0.05) == pytest.approx(5.0)


def test_a_recorded_run_is_decided_again_and_a_changed_one_is_found(tmp_path):
    policy, log = GovernorPolicy(GovernorConfig()), DecisionLog(tmp_path / "decisions.jsonl")
    previous = ()
    for check in range(1, 6):
        now = (3.0 - 0.1 * check, 2.0 - 0.1 * check, 2.5 - 0.1 * check)
        log.append(
            policy.decide(
                Observation(
                    step=check,
                    spent=5.0 * check,
                    budget=100.0,
                    unit="flops",
                    anchors_before=previous,
                    anchors_now=now,
                    spent_before=5.0 * (check - 1) if check > 1 else 0.0,
                    refresh_cost=50.0,
                    cooldown_cost=20.0,
                )
            )
        )
        previous = now
    [path] = replay.find([tmp_path])
    assert replay.replay_log(path).otherwise == 0
    assert replay.main([str(tmp_path)]) == 0
    path.write_text(path.read_text().replace("Go on", "Stop", 1))
    assert replay.replay_log(path).otherwise == 1
    path.write_text("{}\n")
    assert replay.replay_log(path).refused
    assert replay.main([str(tmp_path)]) == 1
