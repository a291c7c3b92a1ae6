"""Control batches: which they are, what is measured of them, and that measuring survives a checkpoint."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pyeff.data import label_positions
from pyeff.governor import Budget, format_amount, is_control_batch
from pyeff.governor.log import replay
from pyeff.train import checkpoint, run
from pyeff.train.config import parse_config
from pyeff.train.control import ControlArm
from pyeff.train.course import Course
from pyeff.train.evaluate import summed_loss
from pyeff.train.events import read_events
from pyeff.train.job import Job
from pyeff.train.run import train_run

SHARE = 0.3


@pytest.fixture
def config(task_config: dict[str, Any], tmp_path: Path) -> Callable[..., Any]:
    """Of a run with many control batches; a budget in tokens charges nothing for looking at the target."""

    def config(**changes: Any) -> Any:
        values = {"budget": "20k tokens", "control_share": SHARE, "out": str(tmp_path / "out"), **changes}
        return parse_config({**copy.deepcopy(task_config), **values})

    return config


def active(job: Job) -> ControlArm:
    arm = ControlArm(job)
    arm.selection_made(checks_left=1)
    assert arm.description["active"]
    return arm


def gradients(job: Job, parts: list[list[Any]]) -> list[dict[str, torch.Tensor]]:
    """Of the mean loss of the answers in each list of batches."""
    found = []
    for part in parts:
        answers = sum(int(label_positions(batch).targets.numel()) for batch in part)
        job.optimizer.zero_grad(set_to_none=True)
        for batch in part:
            (summed_loss(job.model, batch, label_positions(batch)) / answers).backward()
        found.append({name: p.grad.double() for name, p in job.parameters.items() if p.grad is not None})
    job.optimizer.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("within", [None, {"method": "colm"}])
def test_after_a_selection_the_control_batches_and_only_they_come_from_the_whole_pool(config, monkeypatch, within):
    drawn: list[tuple[int, bool, bool]] = []
    step = run._Run._step

    def spying(self: Any, batch: Any, price: float) -> None:
        shown = {index for part in batch.micro_batches for index in part.sample_indices}
        inside = shown <= set(self.course.order.indices)
        drawn.append((self.state.steps, self.state.refreshes > 0, inside))
        step(self, batch, price)

    monkeypatch.setattr(run._Run, "_step", spying)
    # Candidates of a step that chooses among them are drawn as its whole batch would be.
    result = train_run(config(batch_selection=within, budget="10k tokens" if within else "20k tokens"))
    assert result.end["decisions"]["REFRESH"] >= 1
    after = [(number, inside) for number, selected, inside in drawn if selected]
    control = [inside for number, inside in after if is_control_batch(number, fraction=SHARE, seed=0)]
    assert all(inside for number, inside in after if not is_control_batch(number, fraction=SHARE, seed=0))
    # A quarter of the pool is selected: that a uniform batch of many samples lies in it happens next to never.
    assert control
    assert not any(control)


def test_the_policy_is_given_what_was_measured_and_its_log_replays(config):
    result = train_run(config(budget="60k tokens", optimizer={"lr": 1e-3}))
    decisions = [e for e in read_events(result.out / "events.jsonl") if e["kind"] == "decision"]
    observed = [decision["inputs"]["observation"] for decision in decisions]
    scored = [each for each in observed if each["scored_at"] is not None]
    assert any(each.get("advantage") for each in scored)
    assert all(reading["detector"] == "D3" for each in scored for reading in each["drift"])
    assert sum(len(each["drift"]) for each in scored) == len(scored)
    assert all(logged == again for logged, again in replay(result.out / "decisions.jsonl"))
    assert result.end["ledger"]["probe"]["flops"] > 0


def test_a_gain_is_the_dot_product_of_the_batchs_gradient_with_the_targets(config, tmp_path: Path):
    job = Job(config(), tmp_path)
    arm = active(job)
    halves = gradients(job, arm._halves)
    batch = job.batches["pool"][:1]
    (mine,) = gradients(job, [batch])
    expected = sum(float((mine[n] * sum(half[n] for half in halves)).sum()) for n in mine)
    for name, parameter in job.parameters.items():
        parameter.grad = mine[name].to(parameter.dtype)
    arm.measure(0, age=1.0)
    found = arm.state_dict()
    gains = [each["gain"] for each in found["selected"] + found["control"]]
    # Both gradients are sums in float32 of n terms; a dot product loses at most the norms times the roundings.
    norm = math.prod(math.sqrt(sum(float((g[n] ** 2).sum()) for n in mine)) for g in (mine, halves[0]))
    assert gains == [pytest.approx(expected, abs=torch.finfo(torch.float32).eps * norm * 64)]


def test_without_a_step_nothing_has_drifted(config, tmp_path: Path):
    job = Job(config(), tmp_path)
    reading = active(job).look()
    assert reading is not None
    # The same gradients twice: what is left is the rounding of three cosines and a root.
    assert reading.value == pytest.approx(1.0, rel=8 * sys.float_info.epsilon)
    assert not reading.alarm


def test_an_arm_that_is_loaded_measures_as_the_one_that_was_saved(config, tmp_path: Path):
    course = Course(Job(config(), tmp_path))
    arm = course.control
    arm.selection_made(checks_left=1)
    for number in range(12):
        for parameter in course.job.parameters.values():
            parameter.grad = torch.full_like(parameter, 0.5 + number % 3)
        arm.measure(number, age=float(number))
    course.job.optimizer.zero_grad(set_to_none=True)
    course.save(tmp_path / "checkpoints", events=0)
    path, content = checkpoint.newest_checkpoint(tmp_path / "checkpoints")
    again = Course(Job(config(), tmp_path))
    again.load(path, content)
    assert again.control.state_dict() == arm.state_dict()
    assert all(torch.equal(again.control.tensors()[name], each) for name, each in arm.tensors().items())
    assert again.control.look() == arm.look()
    assert again.control.reading() == arm.reading()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"control_share": 0.0}, "control_share is 0"),
        ({"budget": "6e8F"}, "more than 1%"),
    ],
)
def test_an_arm_that_would_cost_too_much_stays_idle_and_says_so(config, changes: dict[str, Any], why: str):
    result = train_run(config(**changes))
    selected = [e for e in read_events(result.out / "events.jsonl") if e["kind"] == "select"]
    assert selected
    assert not selected[0]["control"]["active"]
    assert why in selected[0]["control"]["why"]
    assert result.end["ledger"]["probe"]["flops"] == 0


def test_a_price_ends_a_run_that_no_longer_returns_it(config):
    free, priced = (
        train_run(config(budget="60k tokens", price=price, out=f"{config().out}-{price}"))
        for price in (None, "1000 per 1k tokens")
    )
    assert priced.steps < free.steps
    assert priced.reason == "training stopped paying"
    # What it says it took is what it took, not what it was given.
    assert f"{priced.steps} steps and {format_amount(priced.end['spent'], 'tokens')} took" in priced.end["sentence"]


def test_a_run_with_nothing_at_a_price_says_that_the_anchors_ended_it(config):
    """Anchors that must be shown to gain at every check: the first that is not ends the plateau."""
    governor = {"overfit_checks": 1, "confidence": 1e-6}
    wild = config(budget="60k tokens", governor=governor, optimizer={"lr": 1.0, "states": "32bit"})
    result = train_run(wild)
    assert result.end["spent"] < Budget.parse("60k tokens").amount / 2
    assert result.reason == "the anchors got worse"
