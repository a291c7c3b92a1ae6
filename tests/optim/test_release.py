"""Steps inside the backward have the bits of steps after it, and keep no gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyeff.optim import AdamW8bit, GradientRelease


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 300), nn.Linear(300, 40), nn.Dropout(0.5), nn.Linear(40, 3))
    model[1].bfloat16()
    return model


def loss_of(model: nn.Module, step: int, scale: float = 1.0) -> Tensor:
    tokens = torch.randint(0, 9, (16,), generator=torch.Generator().manual_seed(step))
    x = model[1](model[0](tokens).bfloat16()).float()
    return scale * model[3](model[2](x)).square().mean()


def both(steps: int, *, ours: dict[str, Any], theirs: dict[str, Any], scale: float = 1.0) -> tuple[Any, ...]:
    """Runs with and without release, from the same weights and dropout; and the norms of the latter's gradients."""
    a = network()
    b = copy.deepcopy(a)
    optimizers = AdamW8bit(a.parameters(), lr=1e-2), AdamW8bit(b.parameters(), lr=1e-2, **theirs)
    norms = []
    release = GradientRelease(optimizers[0], **ours)
    for step in range(steps):
        torch.manual_seed(step)
        release.backward(lambda step=step: loss_of(a, step, scale))
        assert all(p.grad is None for p in a.parameters())
        torch.manual_seed(step)
        loss_of(b, step, scale).backward()
        norms.append(torch.stack([p.grad.double().norm() for p in b.parameters()]).norm())
        optimizers[1].step()
        optimizers[1].zero_grad()
    return a, b, release, norms


def test_without_clipping_the_bits_are_those_of_a_step_after_the_backward() -> None:
    a, b, release, _ = both(3, ours={}, theirs={})
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    release.close()
    loss_of(a, 0).backward()
    assert all(p.grad is not None for p in a.parameters())


def test_two_passes_clip_by_the_norm_of_all_gradients_and_repeat_the_dropout() -> None:
    a, b, release, norms = both(1, ours={"clip_norm": 0.01}, theirs={"clip_norm": 0.01}, scale=30.0)
    assert norms[-1] > 1.0, "there must be something to clip"
    # Squares are added in fp32 in chunks of 4096, sixteen in a lane, then eight halvings.
    assert abs(release.norm - norms[-1]) <= 25 * torch.finfo(torch.float32).eps * norms[-1]
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        # The coefficients differ by a rounding at most, and so do the steps of lr; in bf16 that is a last place.
        last = torch.finfo(p.dtype).eps * q.abs().clamp_min(1e-2) * 2
        assert ((p - q).abs() <= last).all()


def test_delayed_clipping_uses_the_norm_of_the_step_before() -> None:
    a = nn.Parameter(torch.zeros(300))
    optimizer = AdamW8bit([a], lr=0.0, betas=(0.5, 0.5), states="fp32")
    release = GradientRelease(optimizer, clip_norm=1.0, clip="delayed")
    seen = []
    for size in (4.0, 2.0, 0.0):
        release.backward(lambda size=size: (a * size).sum() / 300**0.5)
        seen.append(optimizer.state[a]["exp_avg"].norm().item())
    # m is halved and gets half of the gradient: 4 unclipped, 2 by the norm 4, nothing by the norm 2.
    assert seen == pytest.approx([2.0, 1.0 + 0.25, 0.625], rel=64 * torch.finfo(torch.float32).eps)
    assert release.norm == 0.0


def test_a_norm_that_is_not_finite_skips_the_step_of_every_parameter() -> None:
    model = network()
    optimizer = AdamW8bit(model.parameters())
    before = copy.deepcopy(model)
    with GradientRelease(optimizer, clip_norm=1.0) as release:
        release.backward(lambda: loss_of(model, 0) * torch.inf)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    assert optimizer.skipped_steps == 1
    assert all(optimizer.state[p]["step"] == 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "mine", "match"),
    [
        ({"clip_norm": 1.0}, {}, "all gradients at once"),
        ({"skip_nonfinite": True}, {}, "all gradients at once"),
        ({}, {"clip_norm": 0.0}, "clip_norm must be > 0"),
        ({}, {"clip": "later"}, "clip must be one of"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: Any, mine: Any, match: str) -> None:
    optimizer = AdamW8bit([nn.Parameter(torch.ones(3))], **options)
    with pytest.raises(ValueError, match=match):
        GradientRelease(optimizer, **mine)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_gradients_are_not_accumulated(clip_norm: float | None) -> None:
    """The sum over micro-batches would be needed for every parameter at once; the first of two passes would lose it."""
    model = network()
    before = copy.deepcopy(model)
    with GradientRelease(AdamW8bit(model.parameters()), clip_norm=clip_norm) as release:
        for p, g in zip(model.parameters(), torch.autograd.grad(loss_of(model, 0), model.parameters()), strict=True):
            p.grad = g
        gradients = [p.grad.clone() for p in model.parameters()]
        with pytest.raises(ValueError, match="gradients cannot be accumulated"):
            release.backward(lambda: loss_of(model, 1))
        with pytest.raises(TypeError, match="one loss, of the whole batch"):
            release.backward([lambda: loss_of(model, 1), lambda: loss_of(model, 2)])
    for p, q, g in zip(model.parameters(), before.parameters(), gradients, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p.grad, g)


def test_gradients_that_are_already_there_are_refused() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match="has a gradient already"):
        GradientRelease(AdamW8bit([p]))


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_plain_backward_or_empty_step_raises_the_cure_and_leaves_everything_as_it_was(
    clip_norm: float | None,
) -> None:
    model = network()
    before = copy.deepcopy(model)
    optimizer = AdamW8bit(model.parameters(), lr=1e-2)
    with GradientRelease(optimizer, clip_norm=clip_norm) as release:
        with pytest.raises(RuntimeError, match=r"call release\.backward\(lambda: loss\) instead of loss\.backward\(\)"):
            loss_of(model, 0).backward()
        with pytest.raises(RuntimeError, match=r"leave step\(\) out, or close\(\)"):
            optimizer.step()
        for p, q in zip(model.parameters(), before.parameters(), strict=True):
            assert p.grad is None
            assert torch.equal(p, q)
        release.backward(lambda: loss_of(model, 0))
        with pytest.raises(RuntimeError, match=r"leave step\(\) out, or close\(\)"):
            optimizer.step()
    loss_of(model, 0).backward()
    optimizer.step()
    assert all(optimizer.state[p]["step"] == 2 for p in model.parameters())


def test_states_can_be_made_by_a_step_on_gradients_that_were_set() -> None:
    """torch.distributed.checkpoint does so before it loads them."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = network()
    optimizer = AdamW8bit(model.parameters(), lr=1e-2)
    with GradientRelease(optimizer) as release:
        saved = get_optimizer_state_dict(model, optimizer)["state"]
        assert saved.keys() == dict(model.named_parameters()).keys()
        release.backward(lambda: loss_of(model, 0))


@pytest.mark.parametrize("same", [True, False])
def test_a_newer_release_of_the_same_parameters_closes_the_older(same: bool) -> None:
    """A cell of a notebook that is run again has lost the older one."""
    model = network()
    older = AdamW8bit(model.parameters(), lr=1e-2)
    newer = older if same else AdamW8bit(model.parameters(), lr=1e-2)
    first, second = GradientRelease(older), GradientRelease(newer)
    second.backward(lambda: loss_of(model, 0))
    assert all(newer.state[p]["step"] == 1 for p in model.parameters())
    with pytest.raises(ValueError, match="was closed"):
        first.backward(lambda: loss_of(model, 0))
    second.close()
    loss_of(model, 0).backward()


def test_a_parameter_that_was_frozen_before_is_not_left_out_silently() -> None:
    model = network()
    model[3].requires_grad_(False)
    with GradientRelease(AdamW8bit(model.parameters())) as release:
        release.backward(lambda: loss_of(model, 0))
        model[3].requires_grad_(True)
        with pytest.raises(RuntimeError, match="frozen or not in the optimizer when this GradientRelease was made"):
            release.backward(lambda: loss_of(model, 0))
