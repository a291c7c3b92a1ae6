"""What Muon and Adafactor share with the other optimizers: masters, resume, clipping, skipping, any memory layout."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyeff.ops import global_norm
from pyeff.optim import Adafactor8bit, AdamW8bit, GradientRelease, Muon8bit, Optimizer8bit
from pyeff.reference.optimizer_step import MASTERS, join_from_24_bits
from pyeff.train.checkpoint import join_tensors, split_tensors

# Rows of whole blocks and ragged ones, tall and wide.
SHAPES = [(24, 70), (70, 24), (3, 300)]
MAKERS = [
    pytest.param(Muon8bit, {}, id="muon"),
    pytest.param(Adafactor8bit, {}, id="adafactor"),
    pytest.param(Adafactor8bit, {"beta1": 0.9}, id="adafactor-momentum"),
]


def matrices(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).bfloat16().to(dtype)) for shape in SHAPES]


def take_steps(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range, scale: float = 1.0) -> None:
    """On gradients that depend on the step and the place alone."""
    for step in steps:
        for i, p in enumerate(params):
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)) * scale
            p.grad = g.bfloat16().to(p.dtype)
        optimizer.step()


def everything(params: list[nn.Parameter], optimizer: Optimizer8bit) -> list[Tensor]:
    return [x.detach().clone() for p in params for x in (p, *optimizer.state[p].values())]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("states", ["8bit", "fp32"])
@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize(("cls", "options"), MAKERS)
def test_a_saved_run_goes_on_bit_for_bit(cls: Any, options: Any, master: str, states: str, tmp_path: Path) -> None:
    options = {"lr": 1e-2, "master": master, "states": states, "clip_norm": 20.0, **options}
    params = matrices(torch.bfloat16)
    optimizer = cls(params, **options)
    take_steps(params, optimizer, range(3))
    copied = copy.deepcopy(params)
    tree, tensors = split_tensors(optimizer.state_dict())
    save_file(tensors, tmp_path / "file")
    fresh = cls(copied, **options | {"lr": 0.5})
    fresh.load_state_dict(join_tensors(json.loads(json.dumps(tree)), load_file(tmp_path / "file")))
    take_steps(params, optimizer, range(3, 6))
    take_steps(copied, fresh, range(3, 6))
    assert same(everything(params, optimizer), everything(copied, fresh))


@pytest.mark.parametrize(("cls", "options"), MAKERS)
def test_an_fp32_master_takes_the_steps_of_an_fp32_weight(cls: Any, options: Any) -> None:
    """What a bf16 weight shows is the twin, rounded."""
    half, full = matrices(torch.bfloat16), matrices()
    options = {"lr": 1e-2, "weight_decay": 0.1, **options}
    if cls is Adafactor8bit:
        options["scale_parameter"] = False  # the size of the weight is that of the bf16 one
    first, second = cls(half, master="fp32", **options), cls(full, **options)
    take_steps(half, first, range(4))
    take_steps(full, second, range(4))
    for p, q in zip(half, full, strict=True):
        assert torch.equal(first.state[p]["master"], q)
        assert torch.equal(p, q.bfloat16())


@pytest.mark.parametrize("master", ["stochastic", "ecc8"])
@pytest.mark.parametrize(("cls", "options"), MAKERS)
def test_decay_of_bf16_weights_is_kept_on_average(cls: Any, options: Any, master: str) -> None:
    steps, decay = 40, 1e-4
    p = nn.Parameter(torch.rand(256, 256).add(0.5).bfloat16())
    start = p.detach().double()
    optimizer = cls([p], lr=1e-3, weight_decay=decay / 1e-3, master=master, **options)
    p.grad = torch.zeros_like(p)
    for _ in range(steps):
        optimizer.step()
    kept = p.detach().float()
    if master == "ecc8":
        kept = join_from_24_bits(p.detach(), optimizer.state[p]["master_error"])
    expected = start * (1 - decay) ** steps
    # Each rounding is off by at most half a last place in the root of the mean square, at random.
    place = torch.finfo(p.dtype).eps / (256 if master == "ecc8" else 1)
    error = 0.5 * place * math.sqrt(steps / p.numel())
    lost = (start - expected).mean().item()
    assert lost > 10 * error
    assert abs((kept - expected).mean().item()) <= 5 * error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("cls", "options"), MAKERS)
def test_layout_in_memory_and_empty_matrices_change_nothing(cls: Any, options: Any, dtype: torch.dtype) -> None:
    plain, strided = matrices(dtype), matrices(dtype)
    for p in strided:
        p.data = p.data.T.contiguous().T
        assert not p.is_contiguous()
    empty = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((0, 5), (5, 0))]
    # Without names, random bits would depend on the place in the list.
    first = cls([(str(i), p) for i, p in enumerate(plain)], lr=1e-2, **options)
    second = cls([("a", empty[0]), *((str(i), p) for i, p in enumerate(strided)), ("b", empty[1])], lr=1e-2, **options)
    for step in range(3):
        take_steps(plain, first, range(step, step + 1))
        for e in empty:
            e.grad = torch.zeros_like(e)
        for p, q in zip(plain, strided, strict=True):
            q.grad = p.grad.T.contiguous().T
        second.step()
    assert same(everything(plain, first), everything(strided, second))
    assert [second.state[e]["step"].item() for e in empty] == [3, 3]


@pytest.mark.parametrize(("cls", "options"), MAKERS)
def test_clipping_is_a_step_with_gradients_that_are_already_clipped(cls: Any, options: Any) -> None:
    a, b = matrices(), matrices()
    clipped, plain = cls([{"params": a[:1]}, {"params": a[1:]}], clip_norm=0.5, **options), cls(b, **options)
    for step in range(3):
        take_steps(a, clipped, range(step, step + 1), scale=10.0**step)
        norm = global_norm([p.grad for p in a]).item()
        assert norm > 0.5, "there must be something to clip"
        for p, q in zip(a, b, strict=True):
            q.grad = p.grad * torch.tensor(0.5 / (norm + 1e-6))  # in float64, rounded once
        plain.step()
    assert same(everything(a, clipped), everything(b, plain))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(("cls", "options"), MAKERS)
def test_a_step_with_a_bad_gradient_is_skipped_as_a_whole(cls: Any, options: Any, bad: float) -> None:
    params = matrices(torch.bfloat16)
    optimizer = cls(params, skip_nonfinite=True, **options)
    take_steps(params, optimizer, range(2))
    before = everything(params, optimizer)
    params[2].grad[1, 7] = bad
    optimizer.step()
    assert same(everything(params, optimizer), before)
    assert optimizer.skipped_steps == 1
    take_steps(params, optimizer, range(2, 3))
    assert all(p.isfinite().all() for p in params)
    assert [optimizer.state[p]["step"].item() for p in params] == [3, 3, 3]


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize(("cls", "options"), MAKERS)
def test_steps_inside_the_backward_are_those_after_it(cls: Any, options: Any, clip_norm: float | None) -> None:
    a, b = (nn.Sequential(nn.Linear(24, 70, bias=False), nn.Tanh(), nn.Linear(70, 5, bias=False)) for _ in range(2))
    b.load_state_dict(a.state_dict())
    inside, after = (
        cls(a.parameters(), lr=1e-2, **options),
        cls(b.parameters(), lr=1e-2, clip_norm=clip_norm, **options),
    )
    with GradientRelease(inside, clip_norm=clip_norm) as release:
        for step in range(3):
            x = torch.randn(32, 24, generator=torch.Generator().manual_seed(step))
            release.backward(lambda x=x: a(x).square().sum())
            after.zero_grad()
            b(x).square().sum().backward()
            after.step()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        # The squares of gradients are added in another order where there is clipping.
        eps = 0.0 if clip_norm is None else 1e-2 / 8
        assert ((p - q).abs() <= eps).all()


@pytest.mark.parametrize(("cls", "options"), MAKERS)
def test_lr_may_be_a_tensor_and_follows_schedules(cls: Any, options: Any) -> None:
    a, b = matrices(), matrices()
    first, second = cls(a, lr=0.125, **options), cls(b, lr=torch.tensor(0.125), **options)
    for step in range(3):
        for optimizer, params in ((first, a), (second, b)):
            take_steps(params, optimizer, range(step, step + 1))
        first.param_groups[0]["lr"] /= 2
        second.param_groups[0]["lr"].div_(2)
    assert same(everything(a, first), everything(b, second))
    first.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in a]
    take_steps(a, first, range(3, 4))
    assert same([p.detach() for p in a], before)


@pytest.mark.parametrize(("cls", "options"), MAKERS)
def test_offload_is_refused(cls: Any, options: Any) -> None:
    with pytest.raises(ValueError, match=f"offload is not for {cls.__name__}"):
        cls([{"params": matrices(), "offload": True}], **options)


@pytest.mark.parametrize(("cls", "options"), MAKERS)
def test_gradients_of_other_kinds_are_refused_before_anything_changes(cls: Any, options: Any) -> None:
    params = matrices()
    optimizer = cls(params, **options)
    take_steps(params, optimizer, range(1))
    before = everything(params, optimizer)
    params[2].grad = torch.randn(SHAPES[2]).to_sparse()
    with pytest.raises(TypeError, match="dense fp32 or bf16 gradients"):
        optimizer.step()
    params[2].grad = torch.ones(SHAPES[2])
    params[2].grad.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"a gradient of .* has no memory"):
        optimizer.step()
    assert same(everything(params, optimizer), before)


@pytest.mark.parametrize(("cls", "options"), MAKERS)
def test_states_of_other_optimizers_are_refused(cls: Any, options: Any) -> None:
    params = matrices()
    optimizer = cls(params, **options)
    take_steps(params, optimizer, range(1))
    for other in (AdamW8bit, Muon8bit, Adafactor8bit):
        if other is not cls:
            with pytest.raises(ValueError, match=r"lacks|another rule"):
                other(params).load_state_dict(optimizer.state_dict())
    sgd = torch.optim.SGD(params, momentum=0.9)
    sgd.step()
    with pytest.raises(ValueError, match=r"lacks|another rule"):
        optimizer.load_state_dict(sgd.state_dict())
