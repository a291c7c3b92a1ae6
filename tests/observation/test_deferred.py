"""Gradients formed after the backward pass are those of the samples that were kept, and nothing else changes."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from observed_models import MODELS, gradient_of, loss_sum, model_named, padded_batch, sample_of, truth_of
from oracle import assert_as_accurate
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pyeff

Gradient = dict[str, Tensor]


def grads_of(model: nn.Module) -> Gradient:
    """What `.grad` holds; 0 where there is none."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def weighted(model: nn.Module, losses: list[Callable[[nn.Module], Tensor]], weights: list[float]) -> Gradient:
    """The plain gradient of some samples' losses, each with a weight."""
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for loss, weight in zip(losses, weights, strict=True):
        for name, gradient in gradient_of(model, loss(model)).items():
            total[name] += weight * gradient
    return total


def assert_gradients(found: Gradient, exact: Gradient, peer: Gradient) -> None:
    """Each as accurate as one sample at a time in the same precision."""
    assert found.keys() == exact.keys()
    for name, gradient in found.items():
        assert_as_accurate(gradient, exact[name], peer[name], multiple=8.0, what=name)


def losses_of(batch: dict[str, Tensor], samples: int = 3) -> list[Callable[[nn.Module], Tensor]]:
    return [lambda model, s=s: loss_sum(model, sample_of(batch, s)) for s in range(samples)]


TOLD_APART = ("llama tied", "mixtral")
KEEPS = {
    "all": (None, [1.0, 1.0, 1.0]),
    "indices": ([2, 0], [1.0, 0.0, 1.0]),
    "mask": (torch.tensor([False, True, True]), [0.0, 1.0, 1.0]),
    "weights": (torch.tensor([0.5, 0.0, -3.0]), [0.5, 0.0, -3.0]),
    "nothing": ([], [0.0, 0.0, 0.0]),
}


# Two models, of which one has experts, tell the ways to say it apart.
CASES = [(name, keep) for name in MODELS for keep in KEEPS if keep in ("all", "weights") or name in TOLD_APART]


@pytest.mark.parametrize(("name", "keep"), CASES)
def test_the_gradient_is_that_of_the_samples_that_were_kept(name: str, keep: str) -> None:
    batch = padded_batch()
    chosen, weights = KEEPS[keep]
    exact, peer = (
        weighted(model_named(name, dtype), losses_of(batch), weights) for dtype in (torch.float64, torch.float32)
    )
    model = model_named(name, torch.float32)
    with pyeff.observe(model, defer=True) as seen:
        loss_sum(model, batch).backward()
        assert all(p.grad is None for p in model.parameters())
        assert seen.held_bytes > 0
        seen.accumulate(chosen)
    assert seen.held_bytes == 0
    assert_gradients(grads_of(model), exact, peer)
    norms = (truth_of(model_named(name, dtype), batch).grad_norms for dtype in (torch.float64, torch.float32))
    assert_as_accurate(seen.grad_norms, *norms, multiple=8.0)


def test_sketches_and_dots_are_there_before_the_choice_and_norms_need_not_be() -> None:
    batch, name = padded_batch(), "llama tied"
    reference = {n: torch.randn_like(p) for n, p in model_named(name).named_parameters()}
    sketch = pyeff.Sketch(192, seed=5)
    for norms in (True, False):
        for options in ({"sketch": sketch}, {"reference": reference}, {"sketch": sketch, "reference": reference}):
            model = model_named(name)
            with pyeff.observe(model, **options) as plain:
                loss_sum(model, batch).backward()
            model.zero_grad()
            with pyeff.observe(model, defer=True, norms=norms, **options) as seen:
                loss_sum(model, batch).backward()
            for of in options:
                attribute = "sketches" if of == "sketch" else "dots"
                torch.testing.assert_close(getattr(seen, attribute), getattr(plain, attribute))
            if norms:
                torch.testing.assert_close(seen.grad_norms, plain.grad_norms)
            else:
                with pytest.raises(RuntimeError, match="norms=True"):
                    seen.grad_norms


def packed(lengths: tuple[int, ...]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    samples = [padded_batch(1, n) for n in lengths]
    labels = [torch.cat([s["labels"].new_full((1, 1), -100), s["labels"][:, 1:]], 1) for s in samples]
    batch = {
        "input_ids": torch.cat([s["input_ids"] for s in samples], 1),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "labels": torch.cat(labels, 1),
    }
    return batch, [{"input_ids": s["input_ids"], "labels": y} for s, y in zip(samples, labels, strict=True)]


def test_packed_samples_of_two_backward_passes_are_chosen_together() -> None:
    batches, samples = zip(*(packed(lengths) for lengths in ((4, 2, 6), (3, 5))), strict=True)
    weights = [0.0, 1.0, 2.0, 0.0, 1.0]
    losses = [lambda model, s=s: loss_sum(model, s) for some in samples for s in some]
    exact, peer = (
        weighted(model_named("llama tied", dtype), losses, weights) for dtype in (torch.float64, torch.float32)
    )
    model = model_named("llama tied", torch.float32)
    with pyeff.observe(model, defer=True) as seen:
        for batch in batches:
            loss_sum(model, batch).backward()
    seen.accumulate(torch.tensor(weights))  # the context may be left
    assert_gradients(grads_of(model), exact, peer)


def test_each_backward_pass_may_be_chosen_from_on_its_own() -> None:
    batch = padded_batch()
    exact, peer = (
        weighted(model_named("llama", dtype), losses_of(batch), [1.0, 0.0, 1.0])
        for dtype in (torch.float64, torch.float32)
    )
    model = model_named("llama", torch.float32)
    with pyeff.observe(model, defer=True) as seen:
        for keep in ([0], [2]):
            loss_sum(model, batch).backward()
            seen.accumulate(keep)
        with pytest.raises(RuntimeError, match="since gradients were last accumulated"):
            seen.accumulate()
    assert seen.grad_norms.shape == (6,)
    assert_gradients(grads_of(model), exact, peer)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_autocast_and_adapters(reentrant: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.down, self.up = nn.Linear(6, 8), nn.Linear(6, 2, bias=False), nn.Linear(2, 8, bias=False)
            self.frozen.requires_grad_(False)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            def block(x: Tensor) -> Tensor:
                return torch.tanh(self.frozen(x) + 0.5 * self.up(self.down(x)))

            return self.head(checkpoint(block, x, use_reentrant=reentrant))

    torch.manual_seed(0)
    model = Model()
    x = torch.randn(4, 5, 6, requires_grad=True)

    def loss(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model(x).float().square().sum()

    for dtype in (torch.float32, torch.bfloat16):
        plain = gradient_of(model, loss(model, x[[1, 3]], dtype))
        exact = gradient_of(model.double(), model(x[[1, 3]].double()).square().sum())
        model.float()
        with pyeff.observe(model, defer=True) as seen:
            loss(model, x, dtype).backward()
            seen.accumulate([1, 3])
        found = {n: g for n, g in grads_of(model).items() if n in exact}
        model.zero_grad()
        assert model.frozen.weight.grad is None
        for name, gradient in found.items():
            # Gradients are rounded to what autocast computes in, here once more.
            rounding = torch.finfo(dtype).eps * exact[name].abs().max()
            error = (gradient.double() - exact[name]).abs().max()
            assert error <= 4 * (plain[name].double() - exact[name]).abs().max() + rounding, name


class Pictures(nn.Module):
    """Grouped convolutions, norms with gains, a scalar, shared positions, transposed use."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, groups=2, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.second = nn.Conv1d(4, 3, 2, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.positions = nn.Parameter(torch.randn(1, 3, 35))
        self.turned = nn.Parameter(torch.randn(5, 35))
        self.mixed = nn.Parameter(torch.randn(35, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.norm(self.first(x)).flatten(2)) * self.scale
        y = y + self.positions.expand(y.shape[0], -1, -1)
        return torch.tanh((y + self.mixed.t()) @ self.turned.t())


@pytest.mark.parametrize("weights", [[1.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.25, 2.0]], ids=str)
def test_convolutions_scalars_positions_and_turned_weights(weights: list[float]) -> None:
    torch.manual_seed(0)
    model, x = Pictures(), torch.randn(3, 2, 6, 6)

    def loss(model: nn.Module, s: int) -> Tensor:
        return model(x[s : s + 1].to(model.scale.dtype)).square().sum()

    losses = [functools.partial(loss, s=s) for s in range(3)]
    exact, peer = (
        weighted(copy.deepcopy(model).to(dtype), losses, weights) for dtype in (torch.float64, torch.float32)
    )
    with pyeff.observe(model, defer=True, norms=False) as seen:
        model(x).square().sum().backward()
    seen.accumulate(torch.tensor(weights))
    assert_gradients(grads_of(model), exact, peer)


class Head(nn.Module):
    """A tied or untied head whose loss is fused."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 6, padding_idx=3), nn.Linear(6, 11)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        return pyeff.linear_cross_entropy(
            self.table(input_ids), self.head.weight, targets, bias=self.head.bias, softcap=3.0, reduction="sum"
        )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sketched", [False, True])
def test_a_head_that_never_stores_its_logits(tied: bool, sketched: bool) -> None:
    torch.manual_seed(0)
    model = Head(tied)
    ids, targets = torch.randint(0, 11, (4, 5)), torch.randint(0, 11, (4, 5))
    targets[1, 2] = -100
    weights = [1.0, 0.0, 0.5, 1.0]
    losses = [lambda model, s=s: model(ids[s : s + 1], targets[s : s + 1]) for s in range(4)]
    exact, peer = (
        weighted(copy.deepcopy(model).to(dtype), losses, weights) for dtype in (torch.float64, torch.float32)
    )
    sketch = pyeff.Sketch(64) if sketched else None
    with pyeff.observe(model, defer=True, sketch=sketch) as seen:
        model(ids, targets).backward()
        seen.accumulate(torch.tensor(weights))
    assert_gradients(grads_of(model), exact, peer)


def small() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2))


def both(x: Tensor, keep: list[int]) -> tuple[Gradient, Gradient]:
    """The gradient of some samples in float64 and in float32."""
    models = ((small().to(dtype), x[keep].to(dtype)) for dtype in (torch.float64, torch.float32))
    exact, peer = (gradient_of(model, model(some).square().sum()) for model, some in models)
    return exact, peer


def test_samples_that_are_not_kept_spoil_nothing() -> None:
    model, x = small(), torch.randn(3, 2, 4)
    exact, peer = both(x, [0, 2])
    x[1, 0, 0] = math.nan
    with pyeff.observe(model, defer=True) as seen:
        model(x).square().sum().backward()
        assert seen.grad_norms.isnan().tolist() == [False, True, False]
        seen.accumulate(~seen.grad_norms.isnan())
    assert_gradients(grads_of(model), exact, peer)


def test_gradients_that_are_there_are_added_to_and_hooks_run() -> None:
    model, x = small(), torch.randn(3, 2, 4)
    exact, peer = both(x, [0])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    called: list[str] = []
    model[0].weight.register_hook(lambda g: called.append("before") or 2 * g)
    model[3].bias.register_post_accumulate_grad_hook(lambda p: called.append("after"))
    with pyeff.observe(model, defer=True) as seen:
        model(x).square().sum().backward()
        assert called == []
        seen.accumulate([0])
    assert sorted(called) == ["after", "before"]
    for gradient in (exact, peer):
        gradient["0.weight"] *= 2
        for of_parameter in gradient.values():
            of_parameter += 1
    assert_gradients(grads_of(model), exact, peer)


def test_memory_that_is_held_is_counted_once() -> None:
    model = nn.Sequential(nn.Linear(4, 5, bias=False))
    x = torch.randn(3, 2, 4, requires_grad=True)
    with pyeff.observe(model, defer=True) as seen:
        y = model(x)
        y.backward(torch.ones(3, 2, 5))
    assert seen.held_bytes == 4 * (x.numel() + 3 * 2 * 5)
    shared = nn.ModuleList([nn.Linear(4, 5, bias=False), nn.Linear(4, 5, bias=False)])
    shared.forward = lambda x: shared[0](x) + shared[1](x)
    with pyeff.observe(shared, defer=True) as seen:
        shared(x).backward(torch.ones(3, 2, 5))
    assert seen.held_bytes == 4 * (x.numel() + 3 * 2 * 5)


def test_what_makes_no_sense_is_named_and_changes_nothing() -> None:
    model, x = small(), torch.randn(3, 2, 4)
    requests: dict[str, dict[str, Any]] = {
        "pass one of them": {"gradient": False},
        "needs strict=True": {"strict": False},
        "gradient of all samples": {"noise_scale": pyeff.NoiseScale()},
    }
    for message, options in requests.items():
        with pytest.raises(ValueError, match=message):
            pyeff.observe(model, defer=True, **options)
    with pytest.raises(ValueError, match="leaves nothing to observe"):
        pyeff.observe(model, norms=False)
    with pytest.raises(ValueError, match="by_parameter needs the norms"):
        pyeff.observe(model, norms=False, defer=True, by_parameter=True)
    with pyeff.observe(model) as seen:
        model(x).square().sum().backward()
    with pytest.raises(RuntimeError, match="defer=True"):
        seen.accumulate()
    model.zero_grad()
    with pyeff.observe(model, defer=True) as seen:
        with pytest.raises(RuntimeError, match="no backward pass"):
            seen.accumulate()
        model(x).square().sum().backward()
        bad: dict[str, tuple[Any, type[Exception]]] = {
            "indices from 0 to 2": ([0, 3], ValueError),
            "more than once": ([1, 1], ValueError),
            "a value for each of 3": (torch.ones(2), ValueError),
            "finite weights": ([1.0, math.inf, 0.0], ValueError),
            "list of indices": (torch.ones(3, 1), ValueError),
            "integers, booleans or real": (torch.ones(3, dtype=torch.complex64), TypeError),
        }
        for message, (keep, kind) in bad.items():
            with pytest.raises(kind, match=message):
                seen.accumulate(keep)
        assert all(p.grad is None for p in model.parameters())
        seen.accumulate()
    assert all(p.grad is not None for p in model.parameters())


def _data() -> Tensor:
    return torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(5))


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(small())
    found = []
    for _ in range(2):  # the second step finds the model as it was
        model.zero_grad()
        with pyeff.observe(model, defer=True, sketch=pyeff.Sketch(64)) as seen:
            model(_data()[2 * rank : 2 * rank + 2]).square().sum().backward()
            seen.accumulate([rank])
        found.append([p.grad.tolist() for p in model.parameters()])
    model.zero_grad()
    model(_data()[2 * rank : 2 * rank + 2]).square().sum().backward()  # and so does a plain one
    found.append([p.grad.tolist() for p in model.parameters()])
    sketches = seen.sketches.tolist()
    Path(folder, f"{rank}.json").write_text(json.dumps([found, sketches, seen.sketch_header]))
    dist.destroy_process_group()


def test_ranks_choose_from_their_own_samples_and_average(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    model, data = small(), _data()
    chosen = gradient_of(model, model(data[[0, 3]]).square().sum() / 2)
    every = gradient_of(model, model(data).square().sum() / 2)
    names = list(chosen)
    for found, _, _ in ranks:
        for step, wanted in zip(found, (chosen, chosen, every), strict=True):
            grads = {name: torch.tensor(grad) for name, grad in zip(names, step, strict=True)}
            assert_gradients(grads, {n: g.double() for n, g in wanted.items()}, wanted)
    # Sketches of a sample are the same in whichever process, by the names of the plain model.
    shares = [gradient_of(model, model(data[s : s + 1]).square().sum()) for s in range(4)]
    stacked = {name: torch.stack([share[name] for share in shares]) for name in names}
    sketch = pyeff.Sketch(64)
    exact = sketch({n: g.double() for n, g in stacked.items()}, batch_dims=1)
    found = torch.tensor(ranks[0][1] + ranks[1][1])
    assert_as_accurate(found, exact, sketch(stacked, batch_dims=1), multiple=8.0)
    assert ranks[0][2] == ranks[1][2]
    assert ranks[0][2]["parameters"] == sorted(names)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama tied", "gpt2", "mixtral"])
def test_on_a_gpu_the_gradient_is_that_of_the_samples_that_were_kept(name: str) -> None:
    batch, weights = padded_batch(), [0.5, 0.0, 2.0]
    exact, peer = (
        weighted(model_named(name, dtype), losses_of(batch), weights) for dtype in (torch.float64, torch.float32)
    )
    model = model_named(name, torch.float32).cuda()
    with pyeff.observe(model, defer=True) as seen:
        loss_sum(model, {key: value.cuda() for key, value in batch.items()}).backward()
        seen.accumulate(torch.tensor(weights, device="cuda"))
    assert_gradients({n: g.cpu() for n, g in grads_of(model).items()}, exact, peer)
