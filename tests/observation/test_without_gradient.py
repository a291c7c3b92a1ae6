"""Norms without the gradient: the same norms, no gradient, and logits of some positions alone."""

from __future__ import annotations

import pytest
import torch
from observed_models import VOCABULARY, gradient_of, loss_sum, model_named, padded_batch, truth_of
from oracle import assert_as_accurate
from torch import Tensor, nn

import pyeff


@pytest.mark.parametrize("name", ["llama", "llama tied", "gemma2", "gpt2", "bert", "mixtral"])
def test_norms_are_those_of_one_by_one_gradients_and_no_gradient_is_left(name: str) -> None:
    batch = padded_batch()
    model = model_named(name, torch.float32)
    first = next(model.parameters())
    first.grad = kept = torch.ones_like(first)
    with pyeff.observe(model, gradient=False) as seen:
        loss_sum(model, batch).backward()
    assert first.grad is kept
    assert torch.equal(kept, torch.ones_like(first))
    assert all(p.grad is None for p in model.parameters() if p is not first)
    exact = truth_of(model_named(name), batch).grad_norms
    peer = truth_of(model_named(name, torch.float32), batch).grad_norms
    assert_as_accurate(seen.grad_norms, exact, peer, multiple=8.0)


def test_convolutions_need_no_gradient_either() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.Flatten(), nn.Linear(27, 2)
        )

    x = torch.randn(5, 2, 6, 6)
    observed = model()
    with pyeff.observe(observed, gradient=False, by_parameter=True) as seen:
        observed(x).square().sum().backward()
    assert all(p.grad is None for p in observed.parameters())
    norms = {}
    for dtype in (torch.float64, torch.float32):
        plain = model().to(dtype)
        shares = [gradient_of(plain, plain(x[i : i + 1].to(dtype)).square().sum()) for i in range(5)]
        norms[dtype] = {name: torch.stack([s[name].square().sum() for s in shares]) for name in shares[0]}
    for name, values in seen.by_parameter.items():
        assert_as_accurate(values, norms[torch.float64][name], norms[torch.float32][name], multiple=8.0, what=name)


@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2"])
def test_logits_of_kept_positions_are_enough(name: str) -> None:
    lengths, kept = (4, 6, 3), (2, 0, 1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (1, sum(lengths)), generator=generator)
    borders = torch.tensor([0, 4, 10, 13], dtype=torch.int32)
    positions = torch.tensor([0, 2, 11])
    inputs = {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None], "use_cache": False}

    def loss(model: nn.Module, **where: Tensor) -> Tensor:
        logits = model(**inputs, **where).logits[0]
        return nn.functional.cross_entropy(logits if where else logits[positions], ids[0, positions], reduction="sum")

    model = model_named(name, torch.float32)
    with pyeff.observe(model) as seen:
        seen.segments(borders, kept=torch.tensor([0, *kept]).cumsum(0))
        loss(model, logits_to_keep=positions).backward()
    norms = []
    for dtype in (torch.float64, torch.float32):
        whole = model_named(name, dtype)
        with pyeff.observe(whole) as all_positions:
            loss(whole).backward()
        norms.append(all_positions.grad_norms)
    assert seen.grad_norms[1] == 0
    assert_as_accurate(seen.grad_norms, norms[0], norms[1], multiple=4.0)


def test_borders_of_kept_positions_are_checked() -> None:
    model = model_named("llama", torch.float32)
    ids = torch.ones(1, 6, dtype=torch.int64)
    with pyeff.observe(model) as seen:
        seen.segments(torch.tensor([0, 2, 6]), kept=torch.tensor([0, 1]))
        with pytest.raises(ValueError, match="kept must be borders of 2 samples"):
            model(input_ids=ids, use_cache=False)


def test_what_needs_the_gradient_is_refused() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="noise_scale needs the gradient"):
        pyeff.observe(model, gradient=False, noise_scale=pyeff.NoiseScale())
    with pyeff.observe(model, gradient=False) as seen:
        model(torch.ones(4, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="noise_scale needs the gradient"):
        seen.noise_scale


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama tied", "gpt2"])
def test_on_a_gpu_norms_of_kept_positions_need_no_gradient(name: str) -> None:
    lengths, kept = [4, 6, 3], torch.tensor([0, 2, 5, 6])
    positions = torch.tensor([0, 2, 5, 6, 8, 11])
    ids = torch.randint(1, VOCABULARY, (1, 13), generator=torch.Generator().manual_seed(0))
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    norms = []
    for dtype, device in ((torch.float64, "cpu"), (torch.float32, "cpu"), (torch.float32, "cuda")):
        model = model_named(name, dtype).to(device)
        with pyeff.observe(model, gradient=False) as seen:
            seen.segments(borders, kept=kept)
            inputs = {"input_ids": ids.to(device), "position_ids": places.to(device)}
            logits = model(**inputs, use_cache=False, logits_to_keep=positions.to(device)).logits[0]
            nn.functional.cross_entropy(logits, ids[0, positions].to(device), reduction="sum").backward()
        assert all(p.grad is None for p in model.parameters())
        norms.append(seen.grad_norms.cpu())
    # The GPU's sums have another order, and may round to TF32 nowhere.
    assert_as_accurate(norms[2], norms[0], norms[1], multiple=8.0)
