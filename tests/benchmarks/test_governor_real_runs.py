"""The real runs' engine on a task of a few numbers: what is shared, charged and resumed."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from governor import t1, t1_report, t1_results
from governor.baselines import Asha, CostGate, FixedInterval, Mixed, Static, UniformLinear, UniformWsd
from governor.governed import Governed
from governor.t1_cells import BranchOnce, Group, groups
from governor.t1_engine import Engine
from governor.t1_state import Cell
from governor.tasks import text
from governor.tasks.images import Images
from governor.tasks.language import LENGTH, Language
from governor.tasks.task import Data, Task
from governor.tasks.training import Network, Weights
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


class Line(Task):
    """Regression on four numbers; the second source, a quarter of the pool, has wrong answers."""

    name, modes, selectors = "line", ("full",), ("near", "far")
    batch, keep, pool, target, smallest_steps = 4, 0.5, 64, 16, 60
    anchors, weight_decay = (4, 4, 4, 4), 0.0
    rates = {"full": 0.05}  # noqa: RUF012
    forward_flops, train_flops, full_train_flops = 8, 24, 24

    def data(self, seed: int, control: str) -> Data:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(64 + 40, 4, generator=generator)
        y = x.sum(1)
        source = (torch.arange(64) % 4 == 0).long()
        y[:64][source == 1] *= -1
        rows = torch.cat([x, y[:, None]], 1)
        return Data(rows[:64], rows[64:68], rows[68:84], rows[84:], ("right", "wrong"), source)

    def network(self, seed: int) -> Network:
        torch.manual_seed(seed)
        return Network(nn.Linear(4, 1), self.weight_decay)

    def losses(self, module: nn.Module, samples: torch.Tensor) -> torch.Tensor:
        return (module(samples[:, :4])[:, 0] - samples[:, 4]).square()

    def score_flops(self, selector: str) -> int:
        return 8 * 64 * (1 if selector == "near" else 2)

    def scores(self, selector: str, network: Network, vector: torch.Tensor, data: Data) -> torch.Tensor:
        with network.at(vector) as module:
            return -self.evaluate(module, data.pool)


MAKES = {
    "uniform-linear": UniformLinear,
    "uniform-wsd": UniformWsd,
    "static": partial(Static, selector="near"),
    "free": partial(Static, selector="near", free=True),
    "every": partial(FixedInterval, selector="far", every=0.2),
    "asha": Asha,
    "gate": CostGate,
    "cads-s": partial(Mixed, rule="cads-s"),
    "branch": partial(BranchOnce, selector="near", cost=0.1),
    "governor": Governed,
}


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(Line("full", tmp_path), Cell("line", "full", 0, 3))


@pytest.mark.parametrize("name", MAKES)
def test_a_run_that_shares_is_the_run_made_alone(name: str, engine: Engine, tmp_path: Path) -> None:
    for make in MAKES.values():
        engine.run(make)
    shared, _ = engine.run(MAKES[name])
    alone, _ = Engine(Line("full", tmp_path), Cell("line", "full", 0, 3)).run(MAKES[name])
    assert (shared.loss, shared.flops, shared.moves) == (alone.loss, alone.flops, alone.moves)


@pytest.mark.parametrize("name", MAKES)
def test_no_policy_spends_more_than_its_budget_nor_leaves_a_step_of_it(name: str, engine: Engine) -> None:
    run, _ = engine.run(MAKES[name])
    assert run.spent <= engine.budget
    assert run.spent + engine.step_flops > engine.budget


def test_a_state_that_was_dropped_is_trained_again_to_the_bit(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = engine.run(MAKES["every"])
    monkeypatch.setattr("governor.t1_engine._KEPT", 1)
    again = Engine(engine.task, engine.cell)
    found, _ = again.run(MAKES["every"])
    assert (found.loss, found.flops) == (expected.loss, expected.flops)


def test_scoring_is_charged_what_the_policy_declares(engine: Engine) -> None:
    assert engine.run(MAKES["static"])[0].flops["score"] == engine.task.score_flops("near")
    assert engine.run(MAKES["free"])[0].flops["score"] == 0
    assert engine.run(MAKES["branch"])[0].flops["score"] == int(0.1 * engine.budget)
    dear = Engine(engine.task, Cell("line", "full", 0, 3, "tenfold"))
    assert dear.cost("near") == 10 * engine.cost("near")


def test_a_selection_by_loss_has_fewer_wrong_answers_than_one_by_shuffled_scores(engine: Engine) -> None:
    chosen = {}
    for control in ("", "shuffled"):
        other = Engine(engine.task, Cell("line", "full", 3, 3, control))
        other.run(MAKES["static"])
        last = [s for s in other._states.values() if s.refreshes][-1]
        chosen[control] = other.data.source[last.branches[0].chosen].float().mean()
    assert chosen[""] < chosen["shuffled"]


def test_averages_follow_the_parameters(engine: Engine) -> None:
    weights = Weights.fresh(engine.start)
    engine.network.load(weights)
    for _ in range(200):
        losses = engine.task.losses(engine.network.module, engine.data.target)
        weights = engine.network.step(weights, losses, 0.0 if weights.steps > 99 else 0.05, 0.9)
    # A hundred steps without a change leave 0.9^100 of the difference.
    torch.testing.assert_close(weights.average, weights.parameters)
    assert not torch.equal(weights.parameters, engine.start)


def test_a_group_makes_what_is_missing_and_the_governor_again_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(t1, "task_of", lambda name, mode, work: Line(mode, work))
    group = Group(Cell("line", "full", 0, 3), "main")
    everyone = len(group.makes(Line.selectors, lambda: 0))
    assert t1.run_group(group, tmp_path)[0] == everyone
    assert t1.run_group(group, tmp_path)[0] == 0
    path = t1.path_of(tmp_path, group, "uniform-linear")
    before = json.loads(path.read_text())["run"]
    path.unlink()
    assert t1.run_group(group, tmp_path)[0] == 1
    assert json.loads(path.read_text())["run"]["loss"] == before["loss"]
    monkeypatch.setattr(t1, "governor_digest", lambda: "another")
    # The governor and its six ablations, the placebo that imitates it, and two mixtures.
    assert t1.run_group(group, tmp_path)[0] == 10


def test_a_comment_does_not_make_a_cell_again_but_another_number_does() -> None:
    plain = "class A:\n    def f(self):\n        return 1\n"
    told = 'class A:\n    """Says so."""\n    def f(self):\n        """One."""\n        return 1  # one\n'
    assert t1._code(plain) == t1._code(told)
    assert t1._code(plain) != t1._code(plain.replace("1", "2"))
    assert t1.digest_of(UniformLinear) != t1.digest_of(UniformWsd)
    assert t1.digest_of(MAKES["static"]) == t1.digest_of(MAKES["free"])


def test_cells_survive_the_compact_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t1, "task_of", lambda name, mode, work: Line(mode, work))
    group = Group(Cell("line", "full", 0, 3), "main")
    t1.run_group(group, tmp_path)
    t1_results.collect(tmp_path, tmp_path / "results")
    t1_results.collect(tmp_path, tmp_path / "results")
    rows = t1_results.read(tmp_path / "results")
    assert len(rows) == len(group.makes(Line.selectors, lambda: 0))
    for row in rows:
        kept = json.loads(t1.path_of(tmp_path, group, row["policy"]).read_text())["run"]
        assert row["run"].loss == round(kept["loss"], 6)
        assert row["run"].spent == sum(kept["flops"].values())
    best = {run.policy: run.loss for run in t1_results.with_oracle(t1_results.runs_of(rows, "main"))}
    assert best["oracle"] == min(v for k, v in best.items() if not k.startswith("governor") and not k.endswith("-free"))


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_decoder_is_charged_what_torch_counts(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Language, "_base", lambda self, seed, network: network.flat())
    task = Language(mode, tmp_path)
    network = task.network(0)
    network.load(Weights.fresh(network.flat()))
    # The fused kernel counts as nothing on the CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        task.losses(network.module, torch.zeros(2, LENGTH).long()).mean().backward()
    assert counter.get_total_flops() == 2 * task.train_flops
    assert task.full_train_flops >= task.train_flops


def test_images_are_charged_what_torch_counts(tmp_path: Path) -> None:
    task = Images("full", tmp_path)
    network = task.network(0)
    network.load(Weights.fresh(network.flat()))
    with FlopCounterMode(display=False) as counter:
        task.losses(network.module, torch.zeros(2, 197)).mean().backward()
    assert counter.get_total_flops() == 2 * task.train_flops


def test_a_group_that_fails_is_named_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t1, "task_of", lambda name, mode, work: 1 / 0)
    group, count, _, fault = t1._job((Group(Cell("line", "full", 0, 3), "main"), tmp_path))
    assert (group.cell.seed, count) == (3, 0)
    assert "ZeroDivisionError" in fault


def test_every_cell_is_listed_once() -> None:
    cells = [(g.cell, g.kind) for g in groups()]
    assert len(set(cells)) == len(cells)
    budgets = [g.cell.budget for g in groups()]
    assert budgets == sorted(budgets)


def test_target_is_reached_between_two_budgets() -> None:
    by_budget = {1.0: 3.0, 4.0: 1.0}
    assert t1_report.flops_to_target(by_budget, 2.0) == pytest.approx(2.0)
    assert t1_report.flops_to_target(by_budget, 3.5) == 1.0
    assert t1_report.flops_to_target(by_budget, 0.5) == float("inf")


def test_held_out_code_is_of_other_files() -> None:
    pool, held = text.source_files("pool"), text.source_files("held out")
    assert min(len(pool), len(held)) > 10**6
    places = range(0, len(held) - 400, len(held) // 50)
    # Licences and stubs are shared by some files, long stretches of code are not.
    assert sum(held[i : i + 400] in pool for i in places) <= 2
