"""Whole runs on the tiny model: budgets kept, bad input refused, decisions carried out and written down."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pyeff.errors import UserError
from pyeff.governor import FIELDS
from pyeff.governor.log import replay
from pyeff.memory.attention_interface import register
from pyeff.train import batches, checkpoint, job, refresh, run
from pyeff.train.config import parse_config
from pyeff.train.events import read_events
from pyeff.train.model import load_model
from pyeff.train.result import selection_paid
from pyeff.train.run import RunResult, train_run
from pyeff.train.state import FirstRefresh

# At 6e8 F one run takes about a second.
BUDGET = "6e8F"


@pytest.fixture
def start(task_config: dict[str, Any], tmp_path: Path) -> Callable[..., RunResult]:
    """Run the small task with some keys changed; "data.pool" reaches into the nesting."""

    def start(observers: Any = (), **changes: Any) -> RunResult:
        values = copy.deepcopy({**task_config, "budget": BUDGET, "out": str(tmp_path / "out")})
        for path, value in changes.items():
            *parents, last = path.split("__")
            place = values
            for part in parents:
                place = place.setdefault(part, {})
            place[last] = value
        return train_run(parse_config(values), observers=observers)

    return start


def events_of(result: RunResult, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(result.out / "events.jsonl") if event["kind"] == kind]


def test_a_flop_budget_is_never_exceeded_and_nearly_used_up(start):
    result = start()
    amount = events_of(result, "start")[0]["budget"]["amount"]
    spent = [event["spent"] for event in read_events(result.out / "events.jsonl")]
    assert spent == sorted(spent)
    assert spent[-1] <= amount
    steps = events_of(result, "step")
    dearest = max(b["spent"] - a["spent"] for a, b in itertools.pairwise(steps))
    assert amount - spent[-1] < 2 * dearest


def test_the_ledger_adds_up_to_what_was_spent(start):
    result = start()
    ledger = result.end["ledger"]
    assert set(ledger) == set(FIELDS)
    assert sum(ledger[field]["flops"] for field in FIELDS) == result.end["spent"]
    tokens = sum(event["tokens"] for event in events_of(result, "step"))
    assert ledger["train"]["tokens"] + ledger["cooldown"]["tokens"] == tokens
    assert sum(event["flops"] for event in events_of(result, "score")) == ledger["score"]["flops"]


def test_a_token_budget_counts_training_tokens_alone(start):
    result = start(budget="3k tokens")
    assert 3000 - 128 < result.end["spent"] <= 3000
    assert result.end["spent"] == sum(event["tokens"] for event in events_of(result, "step"))


def test_a_time_budget_ends_in_time(start):
    result = start(budget="3s")
    # One step or evaluation may take longer than the ones before it.
    assert result.end["spent"] <= 3 * 1.25
    assert result.end["spent"] == pytest.approx(sum(row["seconds"] for row in result.end["ledger"].values()))


def test_the_rate_is_constant_and_falls_to_nearly_nothing_in_the_cooldown(start):
    steps = events_of(start(optimizer__warmup_steps=3), "step")
    rates = [event["lr"] for event in steps]
    phases = [event["phase"] for event in steps]
    first = phases.index("cooldown")
    assert phases == ["train"] * first + ["cooldown"] * (len(phases) - first)
    assert rates[:3] == sorted(rates[:3])
    assert set(rates[3:first]) == {1e-2}
    assert rates[first:] == sorted(rates[first:], reverse=True)
    # The last step's middle lies half a step before the end.
    count = len(rates) - first
    assert rates[-1] <= 1e-2 * (1 - math.sqrt(1 - 2 / count))


def test_the_model_learns_and_the_saved_model_is_the_one_that_was_judged(start):
    result = start(budget="1.5e9F")
    assert result.end["holdout"]["gain"] > 5 * result.end["holdout"]["standard_error"]
    again = start(model=str(result.out / "model"), out=str(result.out.with_name("again")))
    holdout = next(event for event in events_of(again, "evaluate") if event["set"] == "holdout")
    assert holdout["loss"] == result.end["holdout"]["after"]


def test_after_a_refresh_only_selected_samples_are_trained_on(start, monkeypatch):
    shown: list[set[int]] = []
    chosen: list[set[int]] = []
    step, select = run._Run._step, refresh.select

    def spying_step(self: Any, batch: Any, price: float) -> None:
        shown.append({index for part in batch.micro_batches for index in part.sample_indices})
        if chosen:
            assert shown[-1] <= chosen[-1]
        step(self, batch, price)

    def spying_select(*args: Any, **kwargs: Any) -> Any:
        selection = select(*args, **kwargs)
        chosen.append(set(selection.indices.tolist()))
        return selection

    monkeypatch.setattr(run._Run, "_step", spying_step)
    monkeypatch.setattr(refresh, "select", spying_select)
    result = start()
    assert result.end["decisions"]["REFRESH"] == len(chosen) >= 1
    selected = events_of(result, "select")[0]
    assert selected["kept"] == len(chosen[0]) == math.ceil(0.25 * selected["of"])
    assert sum(kept for kept, _ in selected["by_source"].values()) == selected["kept"]
    assert {example["kept"] for example in selected["examples"]} == {True, False}


def test_the_uniform_policy_never_scores(start):
    result = start(policy="uniform")
    assert result.end["decisions"].keys() <= {"CONTINUE", "COOLDOWN"}
    assert result.end["ledger"]["score"]["flops"] == 0
    assert result.end["selection_paid"] is None
    assert events_of(result, "select") == []


def test_every_decision_can_be_taken_again_from_its_log(start):
    result = start()
    pairs = replay(result.out / "decisions.jsonl")
    assert len(pairs) == sum(result.end["decisions"].values())
    assert all(logged == again for logged, again in pairs)


def test_evaluations_without_room_under_the_overhead_cap_are_left_out(start):
    """Twenty-five anchors take more than a twentieth of this budget: the schedule goes on without them."""
    result = start(data__anchors=25, data__holdout=6, governor__overhead_cap=0.05)
    decisions = [logged for logged, _ in replay(result.out / "decisions.jsonl")]
    unseen = [not decision.inputs["observation"]["anchors_now"] for decision in decisions]
    assert any(unseen)
    for decision, without in zip(decisions, unseen, strict=True):
        seen = decision.inputs["observation"]
        assert seen["overhead"] <= 0.05 * seen["budget"]
        assert (seen.get("problem") == "the overhead cap has no room to evaluate the anchors") == without
    assert decisions[-1].key == "COOLDOWN"


def test_two_runs_of_one_configuration_are_equal_bit_for_bit(start, tmp_path: Path):
    first, second = (start(out=str(tmp_path / name)) for name in "ab")
    assert [event["loss"] for event in events_of(first, "step")] == [
        event["loss"] for event in events_of(second, "step")
    ]
    files = [result.out / "model" / "model.safetensors" for result in (first, second)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_anchors_holdout_and_target_share_no_prompt_and_the_pool_none_with_the_judges(task_config):
    from pyeff.train.task import read_task

    values = copy.deepcopy(task_config)
    # The target itself in the pool: the judging prompts must go.
    values["data"]["pool"] += values["data"]["target"]
    raw = read_task(parse_config(values).data, seed=0)
    prompts = [{sample.prompt for sample in part} for part in (raw.anchors, raw.holdout, raw.target)]
    assert not prompts[0] & prompts[1]
    assert not (prompts[0] | prompts[1]) & prompts[2]
    assert not {sample.prompt for sample in raw.pool} & (prompts[0] | prompts[1])
    assert raw.removed == len(raw.anchors) + len(raw.holdout)


@pytest.mark.parametrize("states", ["8bit", "32bit"])
def test_lora_trains_saves_and_checkpoints_adapters_alone(start, states: str):
    result = start(lora={"rank": 4}, optimizer__states=states)
    model = events_of(result, "start")[0]["model"]
    assert 0 < model["trainable"] < model["parameters"]
    assert (result.out / "model" / "adapter_model.safetensors").exists()
    newest = checkpoint.complete_checkpoints(result.out / "checkpoints")[-1]
    weights = checkpoint.load_tensors(newest / "weights.safetensors")
    assert weights
    assert all("lora_" in name for name in weights)
    assert result.end["holdout"]["gain"] > 0


def losses_of(result: RunResult) -> list[float]:
    return [event["loss"] for event in events_of(result, "step")]


def train_flops(result: RunResult) -> int:
    return result.end["ledger"]["train"]["flops"]


def test_checkpointing_layers_changes_the_price_and_not_the_losses(start, tmp_path: Path):
    plain = start(budget="2k tokens", policy="uniform", out=str(tmp_path / "plain"))
    less = start(budget="2k tokens", policy="uniform", checkpointing="layer", out=str(tmp_path / "less"))
    assert train_flops(less) > train_flops(plain)
    assert losses_of(less) == losses_of(plain)


@pytest.mark.parametrize("changes", [{}, {"lora": {"rank": 4}}, {"dtype": "bfloat16"}], ids=str)
def test_keeping_attention_changes_no_bit_where_a_micro_batch_is_one_sample(start, tmp_path: Path, changes):
    # No two samples fit. One needs no mask, so that the model's own attention runs the kernel of `pyeff.attention`.
    single = {"budget": "2k tokens", "policy": "uniform", "data__max_tokens": 11, "micro_batch_tokens": 11, **changes}
    plain = start(out=str(tmp_path / "plain"), **single)
    kept = start(out=str(tmp_path / "kept"), checkpointing="attention", **single)
    assert losses_of(kept) == losses_of(plain)
    saved, expected = (sorted((r.out / "model").glob("*.safetensors")) for r in (kept, plain))
    assert [file.read_bytes() for file in saved] == [file.read_bytes() for file in expected]


def test_keeping_attention_changes_no_bit_of_packed_training_with_the_same_kernels(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = {"budget": "2k tokens", "policy": "uniform", "checkpointing": "attention"}
    kept = start(out=str(tmp_path / "kept"), **options)

    def only_replace_attention(model: Any) -> None:
        model.config._attn_implementation_internal = register(model.config._attn_implementation)

    monkeypatch.setattr(job, "keep_attention", only_replace_attention)
    plain = start(out=str(tmp_path / "plain"), **options)
    assert losses_of(kept) == losses_of(plain)


def test_kept_attention_is_charged_by_the_pairs_of_each_sample_once(start, tmp_path: Path):
    runs = {
        mode: start(budget="2k tokens", policy="uniform", checkpointing=mode, out=str(tmp_path / mode))
        for mode in ("none", "attention", "layer")
    }
    # Packed samples of other modes are multiplied with all tokens of their row.
    assert train_flops(runs["none"]) < train_flops(runs["layer"])
    assert train_flops(runs["attention"]) < train_flops(runs["layer"])


def test_kept_attention_is_left_out_of_the_saved_model(start, tmp_path: Path):
    result = start(checkpointing="attention")
    config = json.loads((result.out / "model" / "config.json").read_text())
    assert "pyeff" not in json.dumps(config)
    loaded = load_model(str(result.out / "model"))
    assert loaded.model.config._attn_implementation == "sdpa"


def test_attention_that_cannot_be_kept_is_refused_before_anything_is_spent(start, tiny, tmp_path: Path):
    directory = tiny.write_tiny_model(tmp_path / "model", attention_dropout=0.1)
    with pytest.raises(UserError, match=r"checkpointing attention: .*attention_dropout.*checkpointing: layer"):
        start(model=str(directory), checkpointing="attention")
    assert not (tmp_path / "out" / "events.jsonl").exists()
    start(model=str(directory), checkpointing="layer", budget="2k tokens", policy="uniform")


@pytest.mark.parametrize("score", ["nll", "el2n", "entropy", "head_grad_norm", "random"])
def test_every_selector_runs(start, score: str):
    result = start(selector={"score": score, "keep": 0.5, "drop_hardest": 0.0})
    assert events_of(result, "select")[0]["selector"] == score


def test_bfloat16_runs(start):
    assert math.isfinite(start(dtype="bfloat16", optimizer__lr=1e-3).end["holdout"]["after"])


def test_a_budget_too_small_for_one_step_is_refused_before_anything_is_spent(start, tmp_path: Path):
    for budget in ("1e6F", "20 tokens"):
        with pytest.raises(UserError, match="too small for one step"):
            start(budget=budget)
    assert not (tmp_path / "out" / "events.jsonl").exists()
    # So the directory is still free for a run that can be paid.
    start()


def test_the_smallest_budget_that_is_accepted_buys_a_step(start, tmp_path: Path):
    """Around the limit a run is either refused unspent or ends normally within its budget."""
    outcomes = set()
    for i, amount in enumerate((4.2e7, 4.6e7, 5.0e7, 5.4e7, 5.8e7, 6.6e7)):
        out = tmp_path / str(i)
        try:
            result = start(budget=f"{amount}F", out=str(out))
        except UserError:
            outcomes.add("refused")
            assert not (out / "events.jsonl").exists()
        else:
            outcomes.add("accepted")
            assert result.steps >= 1
            assert result.end["spent"] <= amount
    assert outcomes == {"refused", "accepted"}


def test_a_loss_that_is_not_finite_ends_in_one_sentence_naming_the_last_good_checkpoint(start, monkeypatch):
    good = batches.summed_loss
    calls = 0

    def failing(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return good(*args) * (math.nan if calls > 30 else 1.0)

    monkeypatch.setattr(batches, "summed_loss", failing)
    with pytest.raises(UserError) as error:
        start()
    text = str(error.value)
    assert "\n" not in text
    assert "the loss became nan at step" in text
    named = Path(text.split("the last good checkpoint is ")[1].split(";")[0])
    weights = checkpoint.load_tensors(named / "weights.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_a_rate_that_explodes_is_a_sentence_too(start):
    with pytest.raises(UserError, match=r"became (nan|inf)"):
        start(optimizer__lr=1e30, optimizer__warmup_steps=0)


def test_a_pool_of_nothing_but_judging_prompts_is_refused(start, task_config, tmp_path: Path):
    from pyeff.train.task import read_task

    raw = read_task(parse_config(task_config).data, seed=0)
    rows = [{"prompt": sample.prompt, "answer": "7"} for sample in raw.anchors + raw.holdout]
    (tmp_path / "pool.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"data\.pool is empty"):
        start(data__pool=[{"kind": "jsonl", "path": str(tmp_path / "pool.jsonl")}])


def test_a_pool_of_one_sample_is_enough(start, tmp_path: Path):
    (tmp_path / "one.jsonl").write_text('{"prompt": "say a", "answer": "a"}\n')
    result = start(data__pool=[{"kind": "jsonl", "path": str(tmp_path / "one.jsonl")}], budget="2e8F")
    assert result.steps > 1


def test_a_sample_longer_than_the_context_is_named_before_anything_is_spent(start, tmp_path: Path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "x" * 300, "answer": "a"}) + "\n")
    with pytest.raises(UserError, match="more than the 128 allowed"):
        start(
            data__pool=[{"kind": "jsonl", "path": str(tmp_path / "long.jsonl")}],
            data__max_tokens=500,
            batch_tokens=600,
            micro_batch_tokens=600,
        )
    assert not (tmp_path / "out" / "events.jsonl").exists()


def test_a_directory_with_a_run_is_not_overwritten(start):
    result = start()
    before = (result.out / "events.jsonl").read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        start()
    assert (result.out / "events.jsonl").read_bytes() == before


def test_resuming_a_finished_run_changes_nothing(start):
    result = start()
    before = {path: path.stat().st_mtime_ns for path in result.out.rglob("*") if path.name != "lock"}
    again = train_run(resume=result.out)
    assert again.end == result.end
    assert {path: path.stat().st_mtime_ns for path in result.out.rglob("*") if path.name != "lock"} == before


def test_a_run_resumes_only_with_its_own_configuration(start, task_config, tmp_path: Path):
    result = start()
    values = {**task_config, "budget": BUDGET, "out": str(result.out), "seed": 5}
    with pytest.raises(UserError, match="another seed"):
        train_run(parse_config(values), resume=result.out)
    with pytest.raises(UserError, match="there is no run in"):
        train_run(resume=tmp_path / "nowhere")


def test_two_processes_cannot_write_one_run(start, tmp_path: Path):
    import fcntl

    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            start()


def test_a_disk_too_small_for_a_checkpoint_is_refused_before_anything_is_spent(start, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    with pytest.raises(UserError, match="GB free"):
        start()
    assert not (tmp_path / "out" / "events.jsonl").exists()


def test_a_disk_that_fills_up_during_the_run_costs_a_warning_and_not_the_run(start, monkeypatch):
    save, calls = checkpoint.save_checkpoint, 0

    def sometimes(*args: Any, **kwargs: Any) -> int:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise checkpoint.NoSpaceError("the disk is full")
        return save(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_checkpoint", sometimes)
    result = start()
    assert "the disk is full" in events_of(result, "warning")[0]["message"]
    assert len(checkpoint.complete_checkpoints(result.out / "checkpoints")) == 1


def test_observers_get_every_event_in_order(start):
    seen: list[dict[str, Any]] = []
    result = start(observers=[seen.append])
    assert seen == list(read_events(result.out / "events.jsonl"))
    assert [seen[0]["kind"], seen[-1]["kind"]] == ["start", "end"]


def test_nothing_of_the_result_lives_in_a_pickle(start):
    result = start()
    kinds = {path.suffix for path in result.out.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".jsonl", ".yaml", ".safetensors", ".jinja", ""}


@pytest.mark.parametrize(
    ("fall", "paid"),
    [(1.9, True), (0.8, None), (0.0, False), (-0.5, False)],
)
def test_a_run_claims_of_its_selection_only_what_lies_outside_both_extrapolations(fall: float, paid: bool | None):
    # At a rate of 1 a unit after 1 unit of training, settling by 1 a unit: 0.95 or 1.39 in 3 more units, give or take
    # the factor by which rates scatter.
    before = [3.0 + 0.01 * i for i in range(10)]
    first = FirstRefresh(trained=1.0, loss=3.0, trend=[1.0, 1.0], cost=0.5, anchors=before)
    claim, sentence = selection_paid(first, [loss - fall for loss in before], spent=4.0, log_scatter=math.log(1.25))
    assert claim is paid
    assert ("cannot be told" in sentence) == (paid is None)
    assert f"the anchor loss {'rose' if fall < 0 else 'fell'} by {abs(fall):.3f} ±" in sentence


def test_a_run_without_a_selection_or_without_a_trend_claims_nothing():
    for first in (None, FirstRefresh(trained=1.0, loss=3.0, trend=None, cost=0.5, anchors=[3.0, 3.1])):
        assert selection_paid(first, [1.0, 1.0], spent=4.0, log_scatter=0.5)[0] is None


@pytest.mark.parametrize("keep", [1, 4])
def test_as_many_checkpoints_stay_as_were_asked_for(start, keep: int):
    result = start(keep_checkpoints=keep, checkpoint_every=0.1)
    kept = checkpoint.complete_checkpoints(result.out / "checkpoints")
    made = [event["step"] for event in events_of(result, "checkpoint")]
    assert len(made) > 4
    assert [int(path.name.removeprefix("step-")) for path in kept] == made[-keep:]


def test_a_run_that_was_trained_out_makes_no_further_step_when_it_is_resumed(start, monkeypatch, tmp_path: Path):
    class Killed(BaseException):
        pass

    def killed(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run, "save_model", killed)
        with pytest.raises(Killed):
            start(policy="uniform")
    draw = batches.Batches.draw
    # The batch after the one that did not fit may be smaller, and would fit.
    monkeypatch.setattr(
        batches.Batches, "draw", lambda *args: dataclasses.replace(draw(*args), flops=0, micro_batches=[])
    )
    steps = [e["step"] for e in read_events(tmp_path / "out" / "events.jsonl") if e["kind"] == "step"]
    result = train_run(resume=tmp_path / "out")
    assert result.steps == steps[-1]
