"""`memory:` in a run's configuration: what the planner chooses, says, and refuses."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pyeff.data import label_positions
from pyeff.errors import UserError
from pyeff.memory import measure_step
from pyeff.train.batches import Batches
from pyeff.train.config import RunConfig, parse_config
from pyeff.train.evaluate import summed_loss
from pyeff.train.events import read_events
from pyeff.train.job import Job
from pyeff.train.run import train_run


@pytest.fixture
def config(task_config: dict[str, Any], tmp_path: Path) -> Callable[..., RunConfig]:
    def make(**changes: Any) -> RunConfig:
        values = copy.deepcopy(
            {**task_config, "budget": "2k tokens", "policy": "uniform", "out": str(tmp_path / "out")}
        )
        del values["micro_batch_tokens"]
        return parse_config({**values, **changes})

    return make


def size(nbytes: int) -> str:
    """As a configuration may say it: a number as small without its unit is taken for a slip."""
    return f"{nbytes}B"


def peak_of(job: Job) -> int:
    assert job.step_shape.plan is not None
    return job.step_shape.plan.peak.total


def test_less_memory_means_smaller_micro_batches_or_recomputation(config, tmp_path: Path):
    plenty = Job(config(memory="1GB"), tmp_path)
    assert plenty.step_shape.checkpointing == "none"
    least = 0
    for limit in range(peak_of(plenty) - 1, 0, -20_000):
        try:
            job = Job(config(memory=size(limit)), tmp_path)
        except UserError:
            break
        assert peak_of(job) <= limit
        least += job.step_shape.checkpointing != "none" or job.step_shape.micro_tokens < plenty.step_shape.micro_tokens
    assert least > 0


def test_attention_is_kept_where_not_everything_fits(config, tmp_path: Path):
    fixed = {"micro_batch_tokens": 96}
    everything = peak_of(Job(config(memory="1GB", **fixed), tmp_path))
    asked = peak_of(Job(config(memory="1GB", checkpointing="attention", **fixed), tmp_path))
    assert asked < everything
    for limit in (everything - 1, asked):
        assert Job(config(memory=size(limit), **fixed), tmp_path).step_shape.checkpointing == "attention"
    run = train_run(config(memory=size(asked), **fixed))
    start = next(event for event in read_events(run.out / "events.jsonl") if event["kind"] == "start")
    assert start["memory"]["checkpointing"] == "attention"
    assert start["memory"]["predicted_peak"] == asked


def test_attention_with_dropout_is_never_chosen_to_be_kept(config, tiny, tmp_path: Path):
    directory = tiny.write_tiny_model(tmp_path / "model", attention_dropout=0.1)
    chosen = set()
    for limit in range(2_000_000, 100_000, -100_000):
        try:
            chosen.add(Job(config(memory=size(limit), model=str(directory)), tmp_path).step_shape.checkpointing)
        except UserError:
            break
    assert chosen == {"none", "layer"}


def test_what_the_configuration_names_is_kept(config, tmp_path: Path):
    chosen = Job(config(memory="1GB", checkpointing="layer", micro_batch_tokens=40), tmp_path).step_shape
    assert chosen.checkpointing == "layer"
    assert chosen.micro_tokens == 40


@pytest.mark.parametrize(
    "changes", [{}, {"checkpointing": "layer"}, {"checkpointing": "attention"}, {"lora": {"rank": 4}}]
)
def test_the_predicted_peak_is_that_of_the_fullest_micro_batch(config, tmp_path: Path, changes: dict[str, Any]):
    job = Job(config(memory="1GB", batch_tokens=64, **changes), tmp_path)
    micro_batches = Batches(job).draw(_order(job), 0).micro_batches
    job.model.train()
    plan = job.step_shape.plan
    assert plan is not None
    beside = plan.peak.parameters + plan.peak.states + plan.peak.other
    measured = max(measure_step(_OnBatch(job.model), batch, loss=lambda value: value).peak for batch in micro_batches)
    predicted = max(phase.total for phase in plan.phases[:-1]) - beside
    # The plan is for a full micro-batch of the most answer tokens and at least two samples; real ones hold less.
    assert 0.75 * predicted <= measured <= 1.05 * predicted


class _OnBatch(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> torch.Tensor:
        return summed_loss(self.model, batch, label_positions(batch))


def _order(job: Job) -> Any:
    from pyeff.data import DataOrder

    return DataOrder(len(job.task.pool), 0, lengths=job.task.pool.lengths)


def test_a_run_says_what_was_planned_and_goes_on_the_same_way(config, tmp_path: Path):
    limit = peak_of(Job(config(memory="1GB"), tmp_path)) - 1
    result = train_run(config(memory=size(limit)))
    start = next(event for event in read_events(result.out / "events.jsonl") if event["kind"] == "start")
    assert start["memory"]["limit"] == limit
    assert start["memory"]["predicted_peak"] <= limit
    assert sum(start["memory"]["by_component"].values()) == start["memory"]["predicted_peak"]
    assert json.loads((result.out / "result.json").read_text())["config"]["memory"] == size(limit)
    assert train_run(resume=result.out, config=config(memory=size(limit))).steps == result.steps


def test_too_little_memory_ends_in_one_sentence_with_the_nearest_option(config, tmp_path: Path):
    with pytest.raises(
        UserError, match=r"memory: 100 kB do not hold .* the nearest option needs .* lower data.max_tokens"
    ):
        Job(config(memory="100kB"), tmp_path)


@pytest.mark.parametrize("size", ["a lot", "-3GB", 0, "0GB", -5])
def test_a_size_that_is_none_is_refused(config, size: Any):
    with pytest.raises(UserError, match="memory: must be a positive size"):
        config(memory=size)


def test_a_size_that_cannot_be_read_is_shown_once(config):
    with pytest.raises(UserError) as error:
        config(memory="lots")
    assert str(error.value).count("lots") == 1
    assert "memory: must be a positive size" in str(error.value)


def test_a_size_without_its_unit_is_refused_with_a_hint(config):
    for size in (24, "24"):
        with pytest.raises(UserError, match=r'memory: must be a size with its unit, such as "24GB", got .*24'):
            config(memory=size)
    assert config(memory=2**20).memory == 2**20
