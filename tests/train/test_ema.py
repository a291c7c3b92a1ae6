from __future__ import annotations

import pytest
import torch
from torch import nn

from pyeff.train.ema import EMA


def test_the_average_is_the_recursion_it_promises():
    weight = nn.Parameter(torch.tensor([0.0, 8.0], dtype=torch.float64))
    ema = EMA({"w": weight}, decay=0.5)
    expected = weight.detach().clone()
    for step in range(1, 20):
        with torch.no_grad():
            weight.add_(torch.tensor([1.0, -0.5]))
        ema.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach()
    # 20 roundings of float32 on values up to 20.
    assert torch.allclose(ema.averages["w"].double(), expected, rtol=0, atol=20 * 20 * torch.finfo(torch.float32).eps)


def test_constant_weights_are_their_own_average_bit_for_bit():
    weight = nn.Parameter(torch.randn(100))
    ema = EMA({"w": weight}, decay=0.9)
    for _ in range(10):
        ema.update()
    assert torch.equal(ema.averages["w"], weight.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_runs_with_the_averages_inside_and_its_own_weights_outside(dtype: torch.dtype):
    layer = nn.Linear(3, 2, bias=False, dtype=dtype)
    ema = EMA(dict(layer.named_parameters()), decay=0.9)
    own = layer.weight.data
    ema.averages["weight"].fill_(2.0)
    inside = []

    def fail_inside() -> None:
        with ema.applied():
            inside.append(layer.weight.detach().clone())
            raise RuntimeError("the evaluation failed")

    with pytest.raises(RuntimeError):
        fail_inside()
    assert torch.equal(inside[0], torch.full_like(own, 2.0))
    assert layer.weight.data.data_ptr() == own.data_ptr()


def test_a_small_step_of_bfloat16_weights_is_not_lost():
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    ema = EMA({"w": weight}, decay=0.99)
    ema.steps = 10_000
    with torch.no_grad():
        weight.fill_(1.0078125)
    ema.update()
    assert ema.averages["w"].item() > 1.0


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_outside_its_range_is_refused(decay: float):
    with pytest.raises(ValueError, match="decay"):
        EMA({}, decay=decay)
