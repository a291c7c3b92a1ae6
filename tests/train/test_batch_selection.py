"""Steps on chosen samples of a larger batch: what they are made on, what they cost, and what is refused."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pyeff
from pyeff.cli.record import Spending
from pyeff.data import label_positions
from pyeff.errors import UserError
from pyeff.scoring.flops import flop_counter
from pyeff.train.batch_selection import SelectedBatches
from pyeff.train.batches import make_batches
from pyeff.train.config import RunConfig, parse_config
from pyeff.train.course import Course
from pyeff.train.evaluate import summed_loss
from pyeff.train.events import read_events
from pyeff.train.job import Job
from pyeff.train.run import RunResult, train_run

LR = 1e-2
EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def config(task_config: dict[str, Any], tmp_path: Path) -> Callable[..., RunConfig]:
    def make(method: str | None, *, keep: float = 0.5, out: str = "out", **changes: Any) -> RunConfig:
        own = {name: changes.pop(name) for name in list(changes) if name in OPTIONS}
        values = {**copy.deepcopy(task_config), "budget": "1e9F", "policy": "uniform", "out": str(tmp_path / out)}
        if method is not None:
            values["batch_selection"] = {"method": method, "keep": keep, **own}
        return parse_config({**values, **changes})

    return make


OPTIONS = (
    "defer", "target", "target_batch", "sketch_size", "sketch_dim", "temperature", "keep_sources", "layer",
)  # fmt: skip


def course_of(config: RunConfig) -> Course:
    return Course(Job(config, config.out))


def step_of(course: Course, step: int = 0) -> tuple[Any, Any]:
    """Draw a batch and leave its gradient."""
    batch = course.batches.draw(course.order, step)
    course.job.model.train()
    torch.manual_seed(step)
    return batch, course.batches.backward(batch, step=step, phase="train", lr=LR)


def take_step(course: Course) -> None:
    course.job.optimizer.step()
    course.job.optimizer.zero_grad(set_to_none=True)


def charged(course: Course) -> dict[str, int]:
    return {field: course.job.meter.ledger.entry(field).flops for field in ("train", "score")}


def gradient_of(job: Job, indices: list[int]) -> dict[str, torch.Tensor]:
    """Of the mean loss of the answers of these samples alone."""
    batches = make_batches(job).packed(indices)
    answers = sum(int(label_positions(batch).targets.numel()) for batch in batches)
    job.optimizer.zero_grad(set_to_none=True)
    for batch in batches:
        (summed_loss(job.model, batch, label_positions(batch)) / answers).backward()
    return {name: p.grad.clone() for name, p in job.parameters.items()}


def events_of(result: RunResult, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(result.out / "events.jsonl") if event["kind"] == kind]


def comparable(result: RunResult) -> list[dict[str, Any]]:
    events = []
    for event in read_events(result.out / "events.jsonl"):
        event = json.loads(
            json.dumps({k: v for k, v in event.items() if k not in ("time", "seconds", "config", "bytes")})
        )
        for row in event.get("ledger", {}).values():
            row.pop("seconds")
        events.append(event)
    return events


@pytest.mark.parametrize("method", ["greats", "random"])
def test_keeping_everything_is_bit_for_bit_the_run_without_it(config, method: str):
    plain = train_run(config(None, out="plain", policy="governor"))
    kept = train_run(config(method, keep=1.0, out="kept", policy="governor"))
    assert comparable(kept) == comparable(plain)
    files = [result.out / "model" / "model.safetensors" for result in (plain, kept)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora": {"rank": 4, "dropout": 0.1}},
        {"checkpointing": "layer"},
        {"checkpointing": "layer", "lora": {"rank": 4, "target_modules": ["q_proj", "v_proj"]}},
        {"checkpointing": "layer", "lora": {"rank": 4, "dropout": 0.1}},
        {"checkpointing": "layer", "lora": {"rank": 4, "target_modules": ["q_proj", "v_proj"], "dropout": 0.1}},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("method", "defer"), [("random", True), ("greats", True), ("opus", True), ("opus", False), ("colm", False)]
)
def test_every_flop_is_charged_once(config, monkeypatch, method: str, defer: bool, changes: dict[str, Any]):
    course = course_of(config(method, defer=defer, **changes))
    choices: list[int] = []
    choose = SelectedBatches._choose

    def spying(self: Any, *args: Any, **kwargs: Any) -> Any:
        choice = choose(self, *args, **kwargs)
        choices.append(choice.flops)
        return choice

    monkeypatch.setattr(SelectedBatches, "_choose", spying)
    with flop_counter() as counter:
        batch, done = step_of(course)
    found = charged(course)
    # The choice itself is made by NumPy, which torch does not count.
    assert sum(found.values()) == counter.get_total_flops() + sum(choices)
    assert sum(found.values()) <= batch.flops
    assert done.tokens <= batch.tokens


def test_kept_samples_are_charged_to_training_as_if_they_were_the_batch(config):
    course = course_of(config("greats"))
    _, done = step_of(course)
    job = course.job
    assert done.chosen is not None
    tokens, answers = (
        sum(len(job.task.pool[i].ids) for i in done.chosen),
        sum(job.task.pool[i].answer_length for i in done.chosen),
    )
    # Of the dense mask of a micro-batch, their rows: at most as many columns as a micro-batch has tokens.
    least, most = (job.meter.train(tokens, tokens * columns, answers) for columns in (1, 96))
    assert done.tokens == tokens == job.meter.ledger.entry("train").tokens
    assert least < charged(course)["train"] <= most


@pytest.mark.parametrize(("method", "changes"), [
    ("greats", {}), ("opus", {"optimizer": {"lr": LR, "states": "32bit"}}), ("colm", {"checkpointing": "attention"}),
    ("greats", {"lora": {"rank": 4}}), ("colm", {"lora": {"rank": 4}, "checkpointing": "layer"}),
])  # fmt: skip
def test_the_gradient_is_that_of_the_kept_samples_alone(config, method: str, changes: dict[str, Any]):
    course = course_of(config(method, **changes))
    for step in range(2):
        batch, done = step_of(course, step)
        found = {name: p.grad.clone() for name, p in course.job.parameters.items()}
        assert done.chosen is not None
        assert len(done.chosen) == batch.kept < len(batch.drawn)
        assert set(done.chosen) <= set(batch.drawn)
        wanted = gradient_of(course.job, done.chosen)
        for name, gradient in wanted.items():
            # Sums over the tokens in another order, through as many layers of such sums as there are.
            allowed = 16 * EPS * math.sqrt(batch.tokens) * gradient.abs().max()
            assert (found[name] - gradient).abs().max() <= allowed, name
        for name, p in course.job.parameters.items():
            p.grad = found[name]
        take_step(course)


@pytest.mark.parametrize("method", ["greats", "opus", "colm"])
def test_passing_the_chosen_again_makes_the_same_choice_and_costs_more(config, method: str):
    held, again = (course_of(config(method, defer=defer)) for defer in (True, False))
    (_, first), (_, second) = step_of(held), step_of(again)
    assert first.chosen == second.chosen
    assert first.loss == pytest.approx(second.loss, rel=64 * EPS)
    assert sum(charged(held).values()) < sum(charged(again).values())


@pytest.mark.parametrize("states", ["8bit", "32bit"])
def test_opus_measures_in_the_space_of_the_optimizers_states(config, states: str):
    course = course_of(config("opus", optimizer={"lr": LR, "states": states}, sketch_dim=512))
    step_of(course)
    take_step(course)
    job, batches = course.job, course.batches
    assert isinstance(batches, SelectedBatches)
    batch = batches.draw(course.order, 1)
    job.model.eval()
    with batches._observed(optimizer=job.optimizer, defer=True) as seen:
        batches._pass(seen, batch.micro_batches)
    directions = pyeff.optimizer_directions(job.model, job.optimizer, variant="adamw-frozen")
    total = sum(job.task.pool[i].answer_length for i in batch.drawn)
    sketch = pyeff.Sketch(512, seed=0)
    for place in (0, len(batch.drawn) - 1):
        index = batch.drawn[place]
        share = job.task.pool[index].answer_length / total
        own = {name: directions[name](g[None])[0] * share for name, g in gradient_of(job, [index]).items()}
        wanted = sketch(own)
        # Sums of some hundred products, mapped entry by entry.
        scale = math.sqrt(sum(float(g.square().sum()) for g in own.values()))
        assert (batches._rows(seen)[place] - wanted).abs().max() <= 512 * EPS * scale


def test_a_random_draw_scores_nothing_and_depends_on_the_seed_and_the_step(config):
    course = course_of(config("random"))
    _, done = step_of(course)
    assert charged(course)["score"] == 0
    assert done.chosen is not None
    again, other = course_of(config("random")), course_of(config("random", seed=1))
    assert step_of(again)[1].chosen == done.chosen
    assert step_of(other)[1].chosen != done.chosen
    batch = course_of(config("random")).batches.draw(course_of(config("random")).order, 7)
    kept = {i for part in batch.micro_batches for i in part.sample_indices}
    assert set(done.chosen) != kept < set(batch.drawn)


@pytest.mark.parametrize("method", ["greats", "opus", "colm", "random"])
def test_a_run_keeps_its_budget_and_says_what_was_kept_and_what_that_took(config, method: str):
    result = train_run(config(method, policy="governor"))
    steps, end = events_of(result, "step"), result.end
    tally = end["batch_selection"]
    assert end["spent"] <= 1e9
    assert sum(row["flops"] for row in end["ledger"].values()) == end["spent"]
    assert sum(step["scored"] for step in steps) == tally["spent"] == tally["flops"]
    pool_scored = sum(event["flops"] for event in events_of(result, "score"))
    assert end["ledger"]["score"]["flops"] == pool_scored + tally["flops"]
    assert sum(step["kept"] for step in steps) == tally["kept"] == sum(k for k, _ in tally["by_source"].values())
    assert sum(step["candidates"] for step in steps) == tally["candidates"]
    assert sum(step["tokens"] for step in steps) == sum(end["ledger"][f]["tokens"] for f in ("train", "cooldown"))
    assert (tally["flops"] == 0) == (method == "random")
    assert end["decisions"]["REFRESH"] >= 1
    # Choosing within batches is no overhead that the governor could save: its cap concerns the rest.
    spending = Spending()
    for event in read_events(result.out / "events.jsonl"):
        spending.add(event)
        if event["kind"] == "decision":
            other = sum(spending.by_field.get(field, 0.0) for field in ("eval", "score", "probe"))
            assert event["inputs"]["observation"]["overhead"] == other - event["batch_selection"]["spent"]
    # What a display makes of the events is what the ledger says.
    assert spending.by_field["score"] == end["ledger"]["score"]["flops"]


@pytest.mark.parametrize("budget", ["3k tokens", "2s"])
def test_other_budgets_are_kept_too(config, budget: str):
    result = train_run(config("greats", budget=budget))
    amount = float(events_of(result, "start")[0]["budget"]["amount"])
    spendings = [event["spent"] for event in read_events(result.out / "events.jsonl")]
    # One in time may be overrun by what a step or an evaluation takes longer than the ones before it.
    dearest = max(b - a for a, b in itertools.pairwise(spendings))
    assert result.end["spent"] <= amount + (0 if "tokens" in budget else dearest)
    seconds = sum(row["seconds"] for row in result.end["ledger"].values())
    spent = {"s": seconds, "tokens": sum(step["tokens"] for step in events_of(result, "step"))}
    assert result.end["spent"] == pytest.approx(spent["tokens" if "tokens" in budget else "s"])


def test_a_target_that_shares_a_prompt_with_the_judges_is_refused(config, task_config, tmp_path: Path):
    job = Job(config(None), tmp_path)
    for kind in ("holdout", "anchors"):
        sample = getattr(job.task, kind).samples[0]
        path = tmp_path / "target.jsonl"
        path.write_text(json.dumps({"prompt": sample.prompt, "answer": sample.answer}))
        with pytest.raises(UserError, match=f"has the prompt of {kind.rstrip('s')} sample"):
            train_run(config("greats", target={"kind": "jsonl", "path": str(path)}))
    path.write_text(json.dumps({"prompt": "11+11=", "answer": "22"}))
    assert train_run(config("greats", budget="2e8F", target={"kind": "jsonl", "path": str(path)})).steps > 0


def test_a_planned_memory_goes_with_passing_the_chosen_again_and_not_with_keeping_activations(config):
    with pytest.raises(UserError, match=r"memory does not count .* set batch_selection.defer to false"):
        config("greats", memory="1GB")
    result = train_run(config("greats", memory="3MB", defer=False, micro_batch_tokens=None, budget="3e8F"))
    assert result.steps > 0


@pytest.mark.parametrize(("method", "options", "words"), [
    ("greats", {"temperature": 2.0}, "temperature has no meaning for method greats"),
    ("random", {"target_batch": 8}, "target_batch has no meaning for method random"),
    ("colm", {"sketch_dim": 64}, "sketch_dim has no meaning for method colm"),
    ("luck", {}, "batch_selection.method: Input should be"),
    ("greats", {"keep": 0.0}, "batch_selection.keep: Input should be greater than 0"),
])  # fmt: skip
def test_an_option_that_makes_no_sense_is_refused(config, method: str, options: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        config(method, **options)


def test_a_layer_that_is_not_there_is_refused_and_sources_are_kept_whole_while_they_fit(config, tmp_path: Path):
    with pytest.raises(UserError, match="'nothing' is no matrix that is trained; such as model"):
        course_of(config("colm", layer="nothing"))
    course = course_of(config("colm", keep_sources=["noise", "sum"]))
    batch, done = step_of(course)
    samples = course.job.task.pool.samples
    noise = {i for i in batch.drawn if samples[i].source == "noise"}
    # More than half of the batch cannot be kept.
    assert (noise <= set(done.chosen)) == (len(noise) <= batch.kept)


def test_what_is_not_finite_is_not_taken_and_too_much_of_it_ends_the_run(config, monkeypatch):
    rows, bad = SelectedBatches._rows, slice(1, 3)

    def spoiled(self: Any, seen: Any) -> torch.Tensor:
        found = rows(self, seen).clone()
        if len(found) > self.config.target_batch:  # the target's are as they were
            found[bad] = math.nan
        return found

    monkeypatch.setattr(SelectedBatches, "_rows", spoiled)
    course = course_of(config("greats"))
    batch, done = step_of(course)
    assert done.chosen is not None
    assert len(done.chosen) == batch.kept
    assert not {batch.drawn[1], batch.drawn[2]} & set(done.chosen)
    bad = slice(None)
    with pytest.raises(UserError, match="the loss became nan at step 1"):
        train_run(config("greats"))


def test_a_model_that_cannot_be_observed_is_refused_before_anything_is_spent(config, monkeypatch, tmp_path: Path):
    from pyeff.train import batch_selection

    def refusing(*args: Any, **kwargs: Any) -> Any:
        raise batch_selection.UnobservableError("these parameters cannot be observed:\n  w: no")

    monkeypatch.setattr(batch_selection, "observe", refusing)
    with pytest.raises(UserError, match="batch_selection greats cannot observe this model: these parameters"):
        train_run(config("greats"))
    assert not (tmp_path / "out" / "events.jsonl").exists()
