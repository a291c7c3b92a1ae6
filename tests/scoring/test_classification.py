"""Scores of classifiers are what their formulas say, whatever the batches, and leave the model as it was."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_as_accurate
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import pyeff
from pyeff.scoring import EL2N, GraNd, LastLayerGraNd, ScoreMethod, Scores, average

CLASSES = 4
METHODS: list[ScoreMethod] = [EL2N(), GraNd(), LastLayerGraNd()]


def classifier(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.LayerNorm(48),
            nn.Dropout(0.5),
            nn.Linear(48, 6),
            nn.ReLU(),
            nn.Linear(6, CLASSES),
        )


def samples(count: int = 11, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(count, 1, 4, 4, generator=generator)
    return x, torch.randint(CLASSES, (count,), generator=generator)


def score(method: ScoreMethod, data: Any, model: nn.Module | None = None, **options: Any) -> Scores:
    return method.score(model or classifier(), data, progress=False, **options)


def one_by_one(method: ScoreMethod, dtype: torch.dtype) -> Tensor:
    """Each score from its definition, one sample at a time."""
    model = classifier().to(dtype).eval()
    found = []
    for x, y in zip(*samples(), strict=True):
        model.zero_grad()
        logits = model(x[None].to(dtype))
        if isinstance(method, EL2N):
            found.append((logits.softmax(1)[0] - nn.functional.one_hot(y, CLASSES)).norm())
            continue
        nn.functional.cross_entropy(logits, y[None]).backward()
        last = model[-1].weight if isinstance(model, nn.Sequential) else None
        parameters = list(model.parameters()) if isinstance(method, GraNd) else [last]
        found.append(torch.stack([p.grad.square().sum() for p in parameters]).sum().sqrt())
    return torch.stack(found).detach()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_scores_are_those_of_their_definition(method: ScoreMethod) -> None:
    got = torch.from_numpy(score(method, samples(), batch_size=4).values).float()
    exact, peer = (one_by_one(method, dtype) for dtype in (torch.float64, torch.float32))
    assert_as_accurate(got, exact, peer, multiple=4.0)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 12), st.permutations(range(11)))
def test_neither_batches_nor_order_change_a_score(method: ScoreMethod, batch_size: int, order: list[int]) -> None:
    x, y = samples()
    whole = score(method, (x, y)).values
    other = score(method, (torch.tensor(order), x[order], y[order]), batch_size=batch_size)
    exact, peer = (one_by_one(method, dtype) for dtype in (torch.float64, torch.float32))
    got = torch.from_numpy(other.values).float()
    assert other.ids == order
    assert_as_accurate(got, exact[order], peer[order], multiple=4.0)
    assert_as_accurate(torch.from_numpy(whole).float(), exact, peer, multiple=4.0)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_the_model_its_gradients_and_the_generator_are_left_as_they_were(method: ScoreMethod) -> None:
    model = classifier().train()
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    score(method, samples(), model, seed=3)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(p.grad is None for p in model.parameters() if p is not model[0].weight)


def test_the_flops_of_a_forward_pass_are_those_torch_counts_and_the_column_adds_up() -> None:
    x, y = samples()
    scores = score(EL2N(), (x, y), batch_size=4)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        classifier()(x)
    assert scores.flops == counter.get_total_flops()
    assert scores.flops == sum(scores.table["flops"].to_pylist())
    assert scores.seconds > 0


def test_norms_without_the_gradient_cost_fewer_flops_than_the_gradient() -> None:
    x, y = samples()
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    scores = score(GraNd(), (x, y), model)
    with FlopCounterMode(display=False) as counter:
        nn.functional.cross_entropy(model(x), y).backward()
    # Of a sample of one row, the weights' gradients 2 d p each against d + p.
    saved = sum((2 * d * p - d - p) * len(x) for d, p in ((16, 32), (32, CLASSES)))
    assert scores.flops == counter.get_total_flops() - saved


class Named(Dataset[Any]):
    def __init__(self, ids: list[Any], y: Tensor | None = None) -> None:
        self.ids, (self.x, own) = ids, samples(len(ids))
        self.y = own if y is None else y

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: int) -> Any:
        return self.ids[place], self.x[place], int(self.y[place])


def test_every_form_of_a_data_set_gives_the_same_scores() -> None:
    x, y = samples()
    expected = score(EL2N(), (x, y), batch_size=4).values.tolist()
    names = [f"image-{i}" for i in range(11)]
    pairs = list(zip(x, y, strict=True))
    assert score(EL2N(), TensorDataset(x, y), batch_size=4).values.tolist() == expected
    assert score(EL2N(), pairs, batch_size=4).values.tolist() == expected
    named = score(EL2N(), Named(names), batch_size=4)
    assert named.ids == names
    assert named.values.tolist() == expected
    assert score(EL2N(), (names, x, y), batch_size=4).table.drop(["seconds"]).equals(named.table.drop(["seconds"]))
    assert score(EL2N(), pairs, batch_size=4).ids == list(range(11))


def test_a_model_may_return_its_logits_in_an_object_and_take_a_mapping() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = classifier()

        def forward(self, pixels: Tensor) -> Any:
            class Output:
                logits = self.inner(pixels)

            return Output()

    x, y = samples()
    rows = [({"pixels": a}, b) for a, b in zip(x, y, strict=True)]
    for method in METHODS:
        assert score(method, rows, Wrapped()).values.tolist() == score(method, (x, y)).values.tolist()


def test_samples_that_other_processes_load_have_the_same_scores() -> None:
    names = [f"image-{i}" for i in range(11)]
    alone, helped = (score(EL2N(), Named(names), batch_size=4, workers=workers) for workers in (0, 1))
    assert helped.table.drop(["seconds"]).equals(alone.table.drop(["seconds"]))


def test_random_inputs_are_drawn_again_the_same() -> None:
    class Noisy(Dataset[Any]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, place: int) -> Any:
            return torch.randn(1, 4, 4), place % CLASSES

    first = score(EL2N(), Noisy(), batch_size=2, seed=1).values.tolist()
    assert score(EL2N(), Noisy(), batch_size=2, seed=1).values.tolist() == first
    assert score(EL2N(), Noisy(), batch_size=2, seed=2).values.tolist() != first


def test_what_is_not_finite_is_nan_for_its_own_sample() -> None:
    x, y = samples()
    clean = [score(method, (x, y)).values for method in METHODS]
    x[3] = math.nan
    for method, expected in zip(METHODS, clean, strict=True):
        values = score(method, (x, y)).values
        assert math.isnan(values[3])
        kept = [i for i in range(11) if i != 3]
        assert values[kept].tolist() == expected[kept].tolist()


def test_the_digits_of_samples_that_are_nearly_certain_are_kept() -> None:
    model = nn.Linear(2, 2, bias=False)
    nn.init.eye_(model.weight)
    x = torch.tensor([[20.0, 0.0], [30.0, 0.0]])
    values = score(EL2N(), (x, torch.tensor([0, 0])), model).values
    for value, gap in zip(values, (20.0, 30.0), strict=True):
        exact = math.sqrt(2) / (1 + math.exp(gap))
        assert abs(value - exact) <= 8 * torch.finfo(torch.float32).eps * exact


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=4, unique=True), st.randoms())
def test_the_average_is_the_mean_and_its_cost_the_sum(seeds: list[int], random: Any) -> None:
    x, y = samples()
    parts = []
    for seed in seeds:
        order = random.sample(range(11), 11)
        parts.append(score(EL2N(), (torch.tensor(order), x[order], y[order]), classifier(seed), seed=seed))
    mean = average(parts)
    by_id = [dict(zip(part.ids, part.values, strict=True)) for part in parts]
    assert mean.ids == parts[0].ids
    for sample, value in zip(mean.ids, mean.values, strict=True):
        values = [scores[sample] for scores in by_id]
        exact = math.fsum(values) / len(values)
        assert abs(value - exact) <= 2 * len(values) * torch.finfo(torch.float64).eps * exact
    assert mean.flops == sum(part.flops for part in parts)
    assert mean.table["seed"].null_count == 11


def test_an_average_needs_equal_samples_and_one_method() -> None:
    x, y = samples()
    one = score(EL2N(), (x, y))
    with pytest.raises(ValueError, match="same samples: 10 is not"):
        average([one, score(EL2N(), (x[:10], y[:10]))])
    with pytest.raises(ValueError, match="same samples: 10 is not"):
        average([score(EL2N(), (x[:10], y[:10])), one])
    with pytest.raises(ValueError, match="of one method"):
        average([one, score(GraNd(), (x, y))])
    with pytest.raises(ValueError, match="at least one"):
        average([])


def test_several_models_are_loaded_one_at_a_time_and_averaged(tmp_path: Any) -> None:
    x, y = samples()
    alive: list[str] = []

    def loading(name: str, seed: int) -> Callable[[], nn.Module]:
        def load() -> nn.Module:
            alive.append(name)
            return classifier(seed)

        return load

    models = {"a": loading("a", 1), "b": classifier(2)}
    mean = EL2N().score_all(models, (x, y), path=tmp_path / "s", progress=False)
    parts = [score(EL2N(), (x, y), classifier(seed)) for seed in (1, 2)]
    assert mean.values.tolist() == average(parts).values.tolist()
    assert mean.table["checkpoint"][0].as_py() == "a, b"
    assert alive == ["a"]
    from pyeff.scoring import read_scores

    assert read_scores(tmp_path / "s").values.tolist() == mean.values.tolist()
    assert read_scores(tmp_path / "s" / "b").values.tolist() == parts[1].values.tolist()
    for name in ("../b", "..", "", "average.parquet"):
        with pytest.raises(ValueError, match=f"{re.escape(repr(name))} is none"):
            EL2N().score_all({name: classifier(2)}, (x, y), path=tmp_path / "t")


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "empty tensors": (lambda: (torch.zeros(0, 1, 4, 4), torch.zeros(0).long()), ValueError, "dataset is empty"),
    "empty list": (list, ValueError, "dataset is empty"),
    "no length": (Stream, TypeError, "must have a length"),
    "no id": (lambda: Named(["a", None]), ValueError, "sample 1 of the dataset has no id"),
    "empty id": (lambda: Named(["a", ""]), ValueError, "sample 1 of the dataset has no id"),
    "id there twice": (lambda: Named(["a", "b", "a"]), ValueError, "'a' of sample 2 is there twice"),
    "tensor id there twice": (lambda: (torch.tensor([4, 4]), *samples(2)), ValueError, "4 of sample 1 is there twice"),
    "id of another type": (lambda: Named([1.5, 2.5]), TypeError, "must be a string or an integer, got float"),
    "id of too many bits": (lambda: Named([1, 2**63]), ValueError, "does not fit in 64 bits"),
    "ids of two types": (lambda: Named(["a", 1]), ValueError, "all strings or all integers"),
    "no class": (lambda: Named([0, 1], torch.tensor([0, 9])), ValueError, r"targets must be in \[0, 4\)"),
    "negative class": (lambda: (samples(2)[0], torch.tensor([0, -1])), ValueError, r"targets must be in \[0, 4\)"),
    "targets of floats": (lambda: (samples(2)[0], torch.rand(2)), ValueError, "must be class numbers"),
    "rows of four": (lambda: [(1, 2, 3, 4)], ValueError, r"\(x, y\), or every one \(id, x, y\)"),
    "inputs of two shapes": (
        lambda: [(torch.zeros(1, 4, 4), 0), (torch.zeros(1, 4, 5), 0)],
        ValueError,
        "cannot be made a batch",
    ),
    "tensors of two lengths": (lambda: (samples(3)[0], samples(2)[1]), ValueError, "one length"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("method", [EL2N(), GraNd()], ids=lambda m: m.name)
def test_a_data_set_that_cannot_be_scored_is_refused_in_a_sentence(what: str, method: ScoreMethod) -> None:
    make, error, words = BAD[what]
    with pytest.raises(error, match=words):
        score(method, make(), batch_size=2)


def test_a_model_that_gives_no_logits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"logits \[batch, classes\], got shape"):
        score(EL2N(), samples(), nn.Conv2d(1, 2, 3))
    with pytest.raises(ValueError, match=r"what one of its torch\.nn\.Linear modules"):
        score(LastLayerGraNd(), samples(), nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.ReLU()))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        EL2N().score(lambda x: x, samples())  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("batch_tokens", 0), ("seed", -1), ("seed", 2**63)])
def test_options_out_of_range_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        score(EL2N(), samples(), **{name: value})


def test_ids_and_targets_that_would_be_cut_off_or_cannot_be_written_are_refused() -> None:
    model, (x, y) = nn.Linear(4, 3), (torch.randn(4, 4), torch.tensor([0, 1, 2, 0]))
    for ids in (torch.tensor([0.2, 1.7, 2.0, 3.0]), torch.zeros(4, 2)):
        with pytest.raises(TypeError, match="the id of sample 0 must be a string or an integer"):
            EL2N().score(model, (ids, x, y), progress=False)
    with pytest.raises(ValueError, match=r"the id .* of sample 1 is not valid Unicode"):
        EL2N().score(model, (["a", "\ud800", "c", "d"], x, y), progress=False)
    with pytest.raises(ValueError, match="must be class numbers"):
        EL2N().score(model, (x, y + 1j), progress=False)
    with pytest.raises(TypeError, match="must be class numbers, got"):
        EL2N().score(model, [(x[0], "cat")], progress=False)
    with pytest.raises(TypeError, match="dataset must have a length and items by number, got dict"):
        EL2N().score(model, {"x": x, "y": y}, progress=False)
    with pytest.raises(TypeError, match="checkpoint must be a str, got int"):
        EL2N().score(model, (x, y), checkpoint=5, progress=False)
    with pytest.raises(TypeError, match="models must be a mapping of names to models, got list"):
        EL2N().score_all([model], (x, y), progress=False)


def test_a_method_that_loses_samples_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    class Short(ScoreMethod):
        name = "short"

        def classify(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
            return torch.zeros(3 if len(targets) == 2 else len(targets))

    x, y = torch.randn(10, 4), torch.zeros(10, dtype=torch.long)
    with pytest.raises(ValueError, match="short must make a tensor with a row for each of 2 samples, got shape"):
        Short().score(nn.Linear(4, 3), (x, y), batch_size=4, path=tmp_path / "scores", progress=False)
    part = next((tmp_path / "scores").glob("part-*"))
    assert pq.read_table(part).num_rows == 8, "what was scored before is kept"


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_model_with_one_logit_is_refused(method: ScoreMethod) -> None:
    with pytest.raises(ValueError, match=r"at least 2 classes, got logits \[3, 1\]"):
        score(method, (torch.randn(3, 2), torch.zeros(3, dtype=torch.int64)), nn.Linear(2, 1))


def test_a_loader_and_arrays_are_refused_with_what_to_give_instead() -> None:
    x, y = samples()
    with pytest.raises(TypeError, match=r"got a DataLoader: give its dataset"):
        score(EL2N(), DataLoader(TensorDataset(x, y)))
    with pytest.raises(TypeError, match=r"got arrays: give torch\.from_numpy"):
        score(EL2N(), (x.numpy(), y.numpy()))


def test_what_grand_cannot_observe_is_said_with_the_way_out() -> None:
    model = nn.Sequential(nn.Conv1d(2, 2, 1), nn.InstanceNorm1d(2, affine=True), nn.Flatten(), nn.Linear(8, 3))
    data = torch.randn(3, 2, 4), torch.arange(3)
    with pytest.raises(pyeff.UnobservableError, match=r"1\.weight(.|\n)*GraNd\(strict=False\)"):
        score(GraNd(), data, model)
    assert (score(GraNd(strict=False), data, model).values > 0).all()


def test_grand_scores_a_model_with_batch_normalisation_by_its_running_statistics() -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).double()
    x, y = torch.randn(6, 1, 4, 4, dtype=torch.float64), torch.arange(6) % 3
    model(x)  # statistics of its own
    found = score(GraNd(), (x, y), model).values
    model.eval()
    for i in range(len(x)):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
        # Norms are handed out in float32.
        assert abs(found[i] - norm) <= torch.finfo(torch.float32).eps * norm


def test_a_method_of_classifiers_alone_says_so_of_a_language_model_and_the_other_way_round():
    from pyeff.errors import UserError
    from pyeff.scoring.method import BatchMethod

    class Neither(BatchMethod):
        name = "neither"

    with pytest.raises(UserError, match="neither reads language models, and this data set is a classifier's"):
        Neither().classify(torch.nn.Linear(1, 1), torch.zeros(1, 1), torch.zeros(1))
    with pytest.raises(UserError, match="neither reads classifiers, and this data set is a language model's"):
        Neither().read(torch.nn.Linear(1, 1), None, None)
