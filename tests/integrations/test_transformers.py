from __future__ import annotations

import json
import warnings

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from pyeff.governor import Action, Governor, GovernorConfig, Selector, replay  # noqa: E402
from pyeff.integrations.transformers import GovernedSampler, GovernorCallback, SamplerMixin  # noqa: E402

ROWS, LENGTH = 32, 8


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.ids = torch.randint(0, 17, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
        self.drawn = []

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        self.drawn.append(index)
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class GovernedTrainer(SamplerMixin, transformers.Trainer):
    pass


def tiny():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=17,
    )
    return transformers.LlamaForCausalLM(config)


def prepare(tmp_path, *, budget=f"{40 * 4 * LENGTH} tokens", selectors=(), sampler=None, arguments=None, **options):
    model, rows = tiny(), Rows()

    def anchors():
        with torch.no_grad():
            return [float(model(input_ids=row[None], labels=row[None]).loss) for row in rows.ids[:4]]

    governor = Governor(
        budget,
        anchors=anchors,
        selectors=selectors,
        log=tmp_path / "decisions.jsonl",
        config=GovernorConfig(warmup=0.0),
    )
    callback = GovernorCallback(governor, sampler=sampler, **options)
    settings = {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 4,
        "max_steps": 1000,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "include_num_input_tokens_seen": "all",
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    } | (arguments or {})
    trainer = GovernedTrainer(model, transformers.TrainingArguments(**settings), train_dataset=rows)
    trainer.train_sampler = sampler
    trainer.add_callback(callback)
    return trainer, callback, rows


def rates_of(optimizer):
    """A list that fills with the rate of each step as it is made."""
    used, step = [], optimizer.step

    def watched(*args, **options):
        used.append(optimizer.param_groups[0]["lr"])
        return step(*args, **options)

    optimizer.step = watched
    return used


def test_a_trainer_ends_with_its_budget_and_anneals_into_the_end(tmp_path):
    trainer, callback, _ = prepare(tmp_path)
    trainer.create_optimizer()
    rates = rates_of(trainer.optimizer)
    trainer.train()
    assert trainer.state.global_step == 40
    assert callback.governor.spent == 40 * 4 * LENGTH
    assert rates[0] == pytest.approx(1e-2)
    assert rates[-1] < 0.2 * 1e-2
    assert rates == sorted(rates, reverse=True)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2)  # the schedule's own rate is untouched
    assert [decision.action for decision in callback.decisions].count(Action.COOLDOWN) == 1
    assert all(logged == again for logged, again in replay(tmp_path / "decisions.jsonl"))


def test_a_refresh_steers_what_is_drawn(tmp_path):
    sampler = GovernedSampler(ROWS, seed=1)
    asked = []

    def refresh(model, decision):
        asked.append((type(model).__name__, decision.argument))
        return [3, 5, 7, 9]

    trainer, _, rows = prepare(tmp_path, selectors=[Selector("few", 1.0)], sampler=sampler, refresh=refresh)
    trainer.train()
    assert asked[0] == ("LlamaForCausalLM", "few")
    assert set(rows.drawn[-20:]) <= {3, 5, 7, 9}
    assert set(rows.drawn[:8]) - {3, 5, 7, 9}


def test_a_resumed_trainer_goes_on_with_the_state_of_its_checkpoint(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 15}
    trainer, callback, _ = prepare(tmp_path, arguments=saving | {"max_steps": 18})
    trainer.train()
    saved = json.loads((tmp_path / "out" / "checkpoint-15" / "governor.json").read_text())
    assert saved["governor"]["steps"] == 15
    trainer, callback, _ = prepare(tmp_path, arguments=saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-15"))
    assert trainer.state.global_step == 40
    assert callback.governor.steps == 40
    assert callback.governor.spent == 40 * 4 * LENGTH
    for text in ("{", "[]", "{}"):
        (tmp_path / "out" / "checkpoint-15" / "governor.json").write_text(text)
        trainer, _, _ = prepare(tmp_path, arguments=saving)
        with pytest.raises(ValueError, match=r"governor\.json is damaged"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-15"))
    with pytest.raises(ValueError, match="state must be what state_dict returned, it lacks passes"):
        GovernedSampler(8).load_state_dict({"size": 8, "seed": 0, "selected": None})


def test_a_trainer_that_ends_before_its_budget_warns_that_it_did_not_anneal(tmp_path):
    trainer, _, _ = prepare(tmp_path, arguments={"max_steps": 10})
    said = f"after 10 steps with {10 * 4 * LENGTH} tokens spent of a budget of .* more max_steps"
    with pytest.warns(UserWarning, match=said):
        trainer.train()
    trainer, _, _ = prepare(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*max_steps")
        trainer.train()


@pytest.mark.parametrize(
    ("step", "accumulated"),
    # In the middle of an epoch of 8 batches of 4; before its last batch, which is drawn by then; at its end; and again
    # with two batches a step.
    [(13, 1), (15, 1), (16, 1), (9, 2), (7, 2), (8, 2)],
)
def test_a_resumed_trainer_repeats_an_uninterrupted_one_to_the_last_bit(tmp_path, step, accumulated):
    ends = []
    for resumed in (False, True):
        # At a step between two checks, and shortly after the refreshes that come at every second one.
        calls = []

        def refresh(model, decision, calls=calls):
            calls.append(decision.step)
            return [(decision.step + i) % ROWS for i in range(0, 20, 2)]

        trainer, callback, _ = prepare(
            tmp_path,
            budget=f"{40 * 4 * accumulated * LENGTH} tokens",
            selectors=[Selector("few", 0.0)],
            sampler=GovernedSampler(ROWS, seed=1),
            refresh=refresh,
            arguments={"save_strategy": "steps", "save_steps": step, "gradient_accumulation_steps": accumulated},
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}") if resumed else None)
        assert any(at <= step for at in calls) != resumed
        assert any(at > step for at in calls)
        assert callback.governor.steps == 40
        weights = [each.clone() for each in trainer.model.state_dict().values()]
        ends.append((weights, (tmp_path / "decisions.jsonl").read_bytes(), trainer.train_sampler.state_dict()))
    (whole, log, drawn), (again, log_again, drawn_again) = ends
    assert all(map(torch.equal, whole, again))
    assert log == log_again
    assert drawn == drawn_again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arguments": {"include_num_input_tokens_seen": "no"}}, "tokens are not counted: give tokens_per_step"),
        ({"selectors": [Selector("few", 1.0)]}, "refresh must be given where the governor has selectors"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(tmp_path, options, message):
    trainer, _, _ = prepare(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_sampler_draws_each_index_once_a_pass_and_the_same_ones_for_one_seed():
    first, second = list(GovernedSampler(20, seed=3)), list(GovernedSampler(20, seed=3))
    assert first == second != list(GovernedSampler(20, seed=4))
    assert sorted(first) == list(range(20))
    sampler = GovernedSampler(20, seed=3)
    drawing = iter(sampler)
    before = [next(drawing) for _ in range(5)]
    sampler.select([1, 2])
    assert before == first[:5]
    rest = list(drawing)
    assert len(rest) == 15
    assert set(rest) == {1, 2}
    sampler.select(None)
    assert sorted(sampler) == list(range(20))


def test_a_sampler_refuses_what_it_cannot_draw():
    sampler = GovernedSampler(4)
    for indices, message in (([], "must not be empty"), ([4], "between 0 and 3"), ([-1], "between 0 and 3")):
        with pytest.raises(ValueError, match=message):
            sampler.select(indices)
    with pytest.raises(ValueError, match="size must be a positive integer"):
        GovernedSampler(0)
    with pytest.raises(ValueError, match="belongs to a dataset of 4 samples"):
        GovernedSampler(5).load_state_dict(sampler.state_dict())
    with pytest.raises(ValueError, match="sampler must be given with refresh"):
        GovernorCallback(Governor("10 tokens", anchors=lambda: [1.0, 2.0]), refresh=lambda model, decision: None)
