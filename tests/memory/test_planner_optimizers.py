"""What the planner says of Muon and Adafactor is what they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pyeff.memory import plan
from pyeff.memory.architecture import Parameter
from pyeff.memory.rates import Rates
from pyeff.memory.states import state_bytes, step_flops, step_working
from pyeff.memory.trace import _LiveBytes
from pyeff.optim import Adafactor8bit, AdamW8bit, Muon8bit

# What the planner promises.
WITHIN = 0.05
MODEL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300,
}  # fmt: skip


def small(**options: Any) -> Any:
    from transformers import LlamaConfig

    return plan(LlamaConfig(**MODEL), **{"seq_len": 16, **options})


def taken(p: nn.Parameter, cls: Any, master: str) -> tuple[int, _LiveBytes]:
    """Bytes of states, and what a later step takes besides."""
    optimizer = cls([p], master=master)
    p.grad = torch.randn_like(p)
    optimizer.step()
    live = _LiveBytes(set())
    with live:
        optimizer.step()
    assert live.fault is None
    counts = sum(x.nbytes for name, x in optimizer.state[p].items() if name in ("step", "beta_powers"))
    return sum(x.nbytes for x in optimizer.state[p].values()) - counts, live


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("master", ["stochastic", "ecc8", "fp32"])
@pytest.mark.parametrize(
    ("name", "cls", "layer", "shape"),
    [
        *(("muon8bit", Muon8bit, "layer 0", shape) for shape in ((256, 256), (300, 100), (64, 1000))),
        ("muon8bit", AdamW8bit, "embedding", (300, 64)),
        ("muon8bit", AdamW8bit, "layer 0", (300,)),
        *(("adafactor8bit", Adafactor8bit, "layer 0", shape) for shape in ((256, 300), (3, 200, 100), (5000,))),
    ],
)
def test_states_working_memory_and_products_are_those_of_the_optimizer(
    name: Any, cls: Any, layer: str, shape: tuple[int, ...], master: Any, dtype: torch.dtype
) -> None:
    p = nn.Parameter(torch.randn(shape).to(dtype))
    known = Parameter("w", layer, shape, p.element_size(), True)
    states, live = taken(p, cls, master)
    assert state_bytes(known, name, master) == states
    # Numbers of a parameter or of a row are not counted.
    rows = 16 * (sum(shape) + 100)
    assert step_working([known], name, "cpu") == pytest.approx(live.peak, rel=WITHIN, abs=rows)
    assert step_flops([known], name) == live.flops


def test_a_plan_counts_the_step_and_its_products() -> None:
    rates = Rates(1e12, 1e11, "given", bus=1e9)
    adamw, muon = (small(optimizer=name, rates=rates) for name in ("adamw8bit", "muon8bit"))
    assert muon.phases[-1].working == 10 * 64 * 160 + 2 * 64**2
    assert adamw.phases[-1].working == 0
    assert muon.phases[-1].states < adamw.phases[-1].states
    attention, mlp = 4 * (4 * 64**3 + 2 * 64**3), 3 * (4 * 64**2 * 160 + 2 * 64**3)
    products = 2 * 5 * (attention + mlp)
    moved = 2 * (muon.phases[-1].states - adamw.phases[-1].states)
    assert muon.seconds - adamw.seconds == pytest.approx(products / 1e12 + moved / 1e11)
    assert muon.flops == adamw.flops


@pytest.mark.parametrize("name", ["AdamW8bit", "ADAMW8BIT", "Muon8bit"])
def test_names_of_classes_are_names_of_optimizers(name: str) -> None:
    assert small(optimizer=name).settings.optimizer == name.lower()


def test_optimizers_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="optimizer must be one of adamw, adamw8bit"):
        small(optimizer="adam")
    for name in ("muon8bit", "adafactor8bit"):
        with pytest.raises(ValueError, match="offload needs one of pyeff's optimizers, such as adamw8bit"):
            small(optimizer=name, offload=True)
        assert not any("offload" in option.changes for option in small(optimizer=name).options)
