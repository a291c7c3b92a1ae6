"""LESS and TracIn are their definitions, one sample at a time with the same hash, however samples are batched."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from observed_models import VOCABULARY, gradient_of, model_named
from oracle import assert_as_accurate
from torch import Tensor, nn

import pyeff
from pyeff.data import EncodedSample, EncodedSamples, Sample
from pyeff.errors import UserError
from pyeff.scoring import LESS, GradientSketches, TracIn, TrainingState, language, read_features, read_scores
from pyeff.selection import per_sample, round_robin

SKETCH = pyeff.Sketch(192, seed=5)
RATES = (3e-4, 1e-4)
BETAS, EPSILON = (0.8, 0.95), 1e-4


def encoded(count: int = 6, seed: int = 2, name: str = "sample") -> EncodedSamples:
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(1, VOCABULARY, (3 + 4 * i % 7,), generator=generator).tolist() for i in range(count)]
    samples = [Sample(f"{name}-{i}", "", f"{seed} {i}", f"task {i % 2}") for i in range(count)]
    return EncodedSamples(samples, [EncodedSample(ids, 1 + i % 2, i) for i, ids in enumerate(tokens)])


POOL, TARGETS = encoded(), encoded(3, seed=5, name="target")


def with_adapters(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    # peft makes its adapters in float32.
    return lora.to(next(model.parameters()).dtype)


def model_at(name: str, state: int, dtype: torch.dtype) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model as it is after so many epochs, and its optimizer, the same numbers in every dtype."""
    base = model_named(name.removesuffix(" lora"), torch.float64)
    model = with_adapters(base) if name.endswith("lora") else base
    trained = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(state)
    draws = [[torch.randn(p.shape, generator=generator) for _ in range(3)] for p in trained]
    with torch.no_grad():
        for parameter, (shift, _, _) in zip(trained, draws, strict=True):
            parameter += 0.05 * shift
    model = model.to(dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=BETAS, eps=EPSILON)
    for parameter, (_, m, v) in zip(trained, draws, strict=True):
        moments = {"exp_avg": m.to(dtype) / 64, "exp_avg_sq": v.square().to(dtype) / 4096}
        optimizer.state[parameter] = {"step": torch.tensor(3.0), **moments}
    return model, optimizer


def states(name: str, rates: tuple[float, ...] = RATES) -> list[TrainingState]:
    return [
        TrainingState(f"epoch-{i}", rate, lambda i=i: model_at(name, i, torch.float32)) for i, rate in enumerate(rates)
    ]


def own_gradients(model: nn.Module, samples: EncodedSamples) -> dict[str, Tensor]:
    found = []
    for sample in samples:
        logits = model(torch.tensor([sample.ids]), use_cache=False).logits[0, sample.prompt_length - 1 : -1]
        loss = nn.functional.cross_entropy(logits, torch.tensor(sample.ids[sample.prompt_length :]))
        found.append(gradient_of(model, loss))
    return {key: torch.stack([each[key] for each in found]) for key in found[0]}


def sketches(name: str, state: int, dtype: torch.dtype, variant: str | None) -> tuple[Tensor, Tensor]:
    """Sketches of pool and targets by the definition."""
    model, optimizer = model_at(name, state, dtype)
    model.eval()
    directions = None
    if variant is not None:
        directions = {
            key: pyeff.AdamWDirection(
                optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"], 3, BETAS, EPSILON, variant != "adamw"
            )
            for key, p in model.named_parameters()
            if p.requires_grad
        }
    pool = SKETCH(own_gradients(model, POOL), batch_dims=1, directions=directions, impl="reference")
    return pool, SKETCH(own_gradients(model, TARGETS), batch_dims=1, impl="reference")


def influence(name: str, dtype: torch.dtype, variant: str | None, *, cosine: bool) -> Tensor:
    total = torch.zeros(len(POOL), len(TARGETS), dtype=dtype)
    for state, rate in enumerate(RATES):
        pool, targets = sketches(name, state, dtype, variant)
        if cosine:
            pool, targets = nn.functional.normalize(pool, dim=1), nn.functional.normalize(targets, dim=1)
        total += rate * (pool @ targets.T).to(dtype)
    return total


def less_of(similarity: Tensor) -> Tensor:
    # Targets 0 and 2 are of one source, target 1 of another.
    return torch.stack([similarity[:, [0, 2]].mean(1), similarity[:, 1]], 1).amax(1)


OPTIONS: dict[str, Any] = {"batch_tokens": 20, "progress": False, "dtype": "float32"}


@pytest.mark.parametrize(
    ("name", "variant"),
    [("llama", "adamw"), ("gpt2 lora", "adamw"), ("llama tied", "adamw-frozen"), ("qwen3 lora", "adamw-frozen")],
)
def test_less_is_its_definition_one_sample_at_a_time(name: str, variant: Any) -> None:
    got = LESS(TARGETS, sketch=SKETCH, variant=variant).score(states(name), POOL, **OPTIONS)
    exact, peer = (less_of(influence(name, dtype, variant, cosine=True)) for dtype in (torch.float64, torch.float32))
    assert_as_accurate(torch.from_numpy(got.values).float(), exact, peer, multiple=4.0)
    assert got.ids == [sample.id for sample in POOL.samples]
    assert variant in got.method
    assert "2 subtasks" in got.method
    assert got.table["checkpoint"][0].as_py() == "epoch-0 x 0.0003, epoch-1 x 0.0001"
    assert got.flops > 0 < got.seconds


def test_tracin_is_its_definition_one_sample_at_a_time() -> None:
    got = TracIn(TARGETS, sketch=SKETCH).score(states("llama tied"), POOL, **OPTIONS)
    exact, peer = (
        influence("llama tied", dtype, None, cosine=False).mean(1) for dtype in (torch.float64, torch.float32)
    )
    assert_as_accurate(torch.from_numpy(got.values).float(), exact, peer, multiple=4.0)


@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2"])
def test_features_cost_a_forward_and_a_backward_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, method = model_named(name, torch.float32), GradientSketches(SKETCH)
    by_formula = method.features(model, POOL, **OPTIONS)
    monkeypatch.setattr(language, "costs_of", lambda model: None)
    counted = method.features(model, POOL, **OPTIONS)
    assert by_formula.flops == counted.flops > 0


def classes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=generator), torch.arange(count) % 3


def classifier() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    adamw = torch.optim.AdamW(model.parameters())
    for seed in (7, 8):
        x, y = classes(9, seed)
        adamw.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        adamw.step()
    return model, adamw


def score_classes(data: Any, *, batch_size: int = 4, rate: float = 1.0, method: Any = LESS) -> np.ndarray:
    chosen = method(classes(4, 3), sketch=SKETCH)
    found = chosen.score(
        [TrainingState("end", rate, classifier)], data, batch_size=batch_size, progress=False, dtype="float32"
    )
    return found.values


# A product of sketches is a sum of so many terms, each rounded; cosines are at most 1.
ROUNDING = 8 * SKETCH.dim * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("method", [LESS, TracIn])
def test_scores_do_not_depend_on_order_or_batches_and_scale_with_the_learning_rate(method: Any) -> None:
    x, y = classes(11, 2)
    scores = score_classes((x, y), method=method)
    allowed = ROUNDING * max(1.0, np.abs(scores).max())
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(score_classes((x[order], y[order]), method=method), scores[order], rtol=0, atol=allowed)
    for batch_size in (1, 3, 11):
        again = score_classes((x, y), batch_size=batch_size, method=method)
        np.testing.assert_allclose(again, scores, rtol=0, atol=allowed)
    scaled = score_classes((x, y), rate=0.25, method=method)  # a power of two: exact
    assert scaled.tolist() == (scores / 4).tolist()
    assert len(set(scores.tolist())) == 11


def test_an_interrupted_scoring_goes_on_and_rules_choose_from_what_it_leaves(tmp_path: Path, monkeypatch) -> None:
    less, options = LESS(TARGETS, sketch=SKETCH), {**OPTIONS, "batch_tokens": 10}
    whole = less.score(states("llama"), POOL, path=tmp_path / "whole", **options)
    read, calls = GradientSketches.read, 0

    def broken(self: GradientSketches, *args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 12:  # in the second state
            raise KeyboardInterrupt
        return read(self, *args)

    monkeypatch.setattr(GradientSketches, "read", broken)
    with pytest.raises(KeyboardInterrupt):
        less.score(states("llama"), POOL, path=tmp_path / "cut", **options)
    assert (tmp_path / "cut" / "epoch-1").is_dir()
    before = calls
    resumed = less.score(states("llama"), POOL, path=tmp_path / "cut", **options)
    assert calls - before < before
    assert resumed.table.drop(["seconds"]).equals(whole.table.drop(["seconds"]))
    assert read_scores(tmp_path / "cut").table.equals(resumed.table)
    matrix = read_features(tmp_path / "cut" / "influence")
    assert matrix.shape == (len(POOL), len(TARGETS))
    assert matrix.flops == resumed.flops
    groups = [sample.source for sample in TARGETS.samples]
    assert per_sample(matrix, groups=groups)[np.argsort(matrix.index)].tolist() == whole.values.tolist()
    assert len(set(round_robin(matrix, 3).tolist())) == 3
    shutil.copytree(tmp_path / "cut", tmp_path / "features")
    (tmp_path / "features" / "scores.parquet").unlink()
    for other, words in (
        (LESS(TARGETS, sketch=pyeff.Sketch(192, seed=6)), "another sketch"),
        (LESS(encoded(3, seed=6), sketch=SKETCH), "another dataset"),
    ):
        for place, reason in (("cut", "another method"), ("features", words)):
            with pytest.raises(UserError, match=reason):
                other.score(states("llama"), POOL, path=tmp_path / place, **options)
    with pytest.raises(UserError, match="another states"):
        less.score(states("llama", (1e-3, 1e-4)), POOL, path=tmp_path / "cut", **options)
    with pytest.raises(UserError, match="holds these scores already"):
        less.score(states("llama"), POOL, path=tmp_path / "cut", resume=False, **options)
    assert read_scores(tmp_path / "cut").table.equals(resumed.table)


def moved(state: TrainingState) -> TrainingState:
    """The same weights with other moments."""

    def load() -> tuple[nn.Module, torch.optim.Optimizer]:
        model, optimizer = copy.deepcopy(state.load())
        for parameter in model.parameters():
            optimizer.state[parameter]["exp_avg_sq"] += 1.0
        return model, optimizer

    return TrainingState(state.name, state.learning_rate, load)


def test_features_by_other_moments_are_refused(tmp_path: Path) -> None:
    first = TrainingState("end", 1.0, classifier)
    less = LESS(classes(3, 3), sketch=SKETCH)
    less.score([first], classes(6, 2), path=tmp_path, progress=False)
    with pytest.raises(UserError, match="another optimizer"):
        less.score([moved(first)], classes(6, 2), path=tmp_path, progress=False)


def test_a_pool_sample_that_is_not_finite_is_undefined_and_such_a_target_an_error() -> None:
    x, y = classes(6, 2)
    x[3, 0] = torch.inf
    scores = score_classes((x, y))
    assert np.isnan(scores).tolist() == [place == 3 for place in range(6)]
    with pytest.raises(ValueError, match="gradient of target 3 is not finite"):
        LESS((x, y), sketch=SKETCH).score([TrainingState("end", 1.0, classifier)], classes(6, 2), progress=False)


def test_a_gradient_of_zero_is_like_nothing() -> None:
    def dead() -> tuple[nn.Module, None]:
        model = nn.Linear(5, 3)
        nn.init.zeros_(model.weight)
        model.bias.requires_grad_(False)
        return model, None

    x, y = classes(6, 2)
    x[2] = 0  # the gradient of the weight is error x^T
    scores = TracIn(classes(4, 3), sketch=SKETCH).score([TrainingState("end", 1.0, dead)], (x, y), progress=False)
    assert scores.values[2] == 0.0
    assert np.count_nonzero(scores.values) == 5


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LESS(classes(3, 3), sketch=SKETCH).score([], classes(4, 2)), "states must hold at least one"),
        (
            lambda: LESS(classes(3, 3), sketch=SKETCH).score([TrainingState("a", 1.0, classifier)] * 2, classes(4, 2)),
            "different names",
        ),
        (
            lambda: LESS(classes(3, 3), sketch=SKETCH).score(
                [TrainingState("a", 1.0, lambda: (classifier()[0], None))], classes(4, 2)
            ),
            "needs the optimizer of 'a'",
        ),
        (
            lambda: LESS(classes(3, 3), sketch=SKETCH, groups=["x"]).score(
                [TrainingState("a", 1.0, classifier)], classes(4, 2), progress=False
            ),
            "groups must be one for each of 3 targets",
        ),
        (lambda: LESS(classes(3, 3), variant="sgd"), "variant must be"),  # type: ignore[arg-type]
        (lambda: LESS(classes(3, 3), reduction="min"), "reduction must be"),
        (lambda: TrainingState("a", 0.0, classifier), "learning_rate must be positive"),
        (lambda: TrainingState("a/b", 1.0, classifier), "name of a directory"),
    ],
)
def test_a_bad_argument_is_named(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
