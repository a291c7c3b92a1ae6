"""What the planner says of states in host memory and of released gradients, and whose fault a failed trace is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planned_models import config_of, model_of, step_inputs
from torch import nn

from pyeff.errors import UserError
from pyeff.memory import Rates, measure_step, plan, trace, trace_step
from pyeff.memory.architecture import Parameter
from pyeff.memory.planned_model import Source
from pyeff.memory.planner import Planner
from pyeff.memory.plans import Settings
from pyeff.memory.states import slot_bytes, state_bytes
from pyeff.memory.trace import StepError
from pyeff.optim import AdamW8bit, GradientRelease, SGD8bit
from pyeff.optim.offload import Offload

# What the planner promises.
WITHIN = 0.05


def small(**options: Any) -> Any:
    return plan(config_of("llama"), **{"seq_len": 64, "batch": 4, "optimizer": "adamw8bit", **options})


# ---- states in host memory


class Bytes:
    """Counts what an offload asks of the device."""

    def __init__(self) -> None:
        self.asked = 0

    def device_memory(self, nbytes: int) -> torch.Tensor:
        self.asked += nbytes
        return torch.empty(0)


@pytest.mark.parametrize("master", ["none", "ecc8", "fp32"])
@pytest.mark.parametrize("name", ["adamw8bit", "sgd8bit"])
@pytest.mark.parametrize("shapes", [[(70, 300), (9,)], [(40_000, 512), (50, 512), (512,)], [(2, 40_000_000)]])
def test_slots_take_the_bytes_that_the_optimizer_asks_for(shapes: Any, name: str, master: Any) -> None:
    cls: Any = {"adamw8bit": AdamW8bit, "sgd8bit": SGD8bit}[name]
    weights = [nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta")) for shape in shapes]
    optimizer = cls(weights, master=master, offload=True)
    counted: Any = Bytes()
    Offload(counted, optimizer._host_states.parameters_on(torch.device("meta")))
    known = [Parameter("w", "layer 0", shape, 2, True) for shape in shapes]
    # Every state is aligned to 16 bytes.
    assert slot_bytes(known, name, master) == pytest.approx(counted.asked, rel=0.01)  # type: ignore[arg-type]
    assert counted.asked < 2 * sum(state_bytes(p, name, master) for p in known) or shapes[0][0] == 70  # type: ignore[arg-type]


def test_offload_takes_the_states_off_a_gpu_and_costs_the_bus() -> None:
    options: Any = {"rates": Rates(1e12, 1e11, "given", bus=1e9)}
    kept, away = small(**options), small(offload=True, **options)
    states = sum(layer.states for layer in kept.layers)
    assert kept.peak.states == states
    assert away.peak.states < states
    assert sum(layer.states for layer in away.layers) == 0
    assert away.seconds - kept.seconds == pytest.approx(states / 1e9)
    assert away.flops == kept.flops


def test_offload_changes_nothing_on_a_cpu() -> None:
    kept, away = small(device="cpu"), small(device="cpu", offload=True)
    assert kept.phases == away.phases
    assert not any("offload" in option.changes for option in kept.options)


# ---- released gradients


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_peak_with_released_gradients_is_the_peak(family: str, checkpointing: bool, tied: bool) -> None:
    """Against the storages that are live in a backward that steps and frees; a tied gradient waits for its last use."""
    config = config_of(family, tie_word_embeddings=tied, vocab_size=600)
    model = model_of(config, "float32", checkpointing=checkpointing)
    optimizer = SGD8bit(model.parameters(), lr=0.0)
    for p in model.parameters():  # states are there from the second step on
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    batch, tokens = 2, 32
    with GradientRelease(optimizer) as release:
        release._steps = True  # the hooks work in any backward then
        measured = measure_step(model, **step_inputs(batch, tokens))
    found = plan(
        config, seq_len=tokens, batch=batch, dtype="float32", device="cpu", optimizer="sgd8bit", release="one-pass",
        checkpointing="layer" if checkpointing else "none",
    )  # fmt: skip
    beside = found.peak.parameters + found.peak.states
    assert found.peak.total - beside == pytest.approx(measured.peak, rel=WITHIN)
    assert found.phases[-1].gradients == 0
    kept = plan(config, seq_len=tokens, batch=batch, dtype="float32", device="cpu", optimizer="sgd8bit",
                checkpointing="layer" if checkpointing else "none")  # fmt: skip
    assert found.peak.total <= kept.peak.total
    assert found.phases[-2].total < kept.phases[-2].total


def test_two_passes_cost_two_and_accumulation_needs_all_gradients() -> None:
    once, twice = small(release="one-pass"), small(release="two-pass")
    assert twice.flops == 2 * once.flops == 2 * small().flops
    assert twice.peak == once.peak
    with pytest.raises(ValueError, match="release must be none where gradients are accumulated"):
        small(release="one-pass", accumulation=2)
    for option in ({"offload": True}, {"release": "one-pass"}):
        with pytest.raises(ValueError, match="needs one of pyeff's optimizers"):
            small(optimizer="adamw", **option)
    with pytest.raises(ValueError, match="release must be one of none, one-pass, two-pass"):
        small(release="later")


def test_options_hold_both_and_only_what_goes_together() -> None:
    found = small(optimizer="adamw", device_memory="4MB", rates=Rates(1e12, 1e11, "given"))
    assert {"optimizer": "adamw8bit", "offload": True} in [dict(option.changes) for option in found.options]
    assert {"optimizer": "adamw8bit", "release": "two-pass"} in [dict(option.changes) for option in found.options]
    for option in found.options:
        ours = option.changes.get("optimizer") == "adamw8bit"
        assert ours or not {"offload", "release"} & set(option.changes)
        assert not ("release" in option.changes and "batch" in option.changes)
    planner = Planner(Source(config_of("llama"), "bfloat16"), device_memory=1)
    chosen = planner.plan(Settings(64, optimizer="adamw8bit"))
    assert "offload" in chosen.best_change.changes or chosen.best_change.peak <= min(
        option.peak for option in chosen.options if dict(option.changes) == {"offload": True}
    )


# ---- whose fault


class Broken(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.linear, self.error = nn.Linear(4, 4), error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        raise self.error
        return y


@pytest.mark.parametrize("error", [RuntimeError("no such kernel"), KeyError("states"), ZeroDivisionError("by zero")])
def test_an_error_of_the_model_is_a_sentence(error: Exception) -> None:
    inputs = {"x": torch.zeros(2, 4)}
    with pytest.raises(UserError, match=r"a step of Broken cannot be traced: ") as found:
        plan(Broken(error), seq_len=1, device="cpu", inputs=inputs)
    assert found.value.__cause__.__cause__ is error  # type: ignore[union-attr]
    with pytest.raises(StepError):
        trace_step(Broken(error), **inputs)


@pytest.mark.parametrize("where", ["see", "_count"])
def test_an_error_of_ours_is_not_said_to_be_the_models(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*args: Any) -> None:
        raise TypeError("a fault in the tracer")

    monkeypatch.setattr(trace._LiveBytes, where, fault)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    with pytest.raises(TypeError, match="a fault in the tracer"):
        plan(model, seq_len=1, device="cpu", inputs={"input": torch.zeros(2, 4)})


# ---- the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"offload": True}, {"release": "one-pass"}], ids=str)
def test_gpu_peak_is_within_five_per_cent(options: dict[str, Any]) -> None:
    """Of a step with bf16 weights, whose states and gradients weigh as much as its activations."""
    config = config_of(
        "llama",
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=12,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    model: Any = model_of(config, "bfloat16").to("cuda")
    optimizer = AdamW8bit(model.parameters(), offload=options.get("offload", False))
    inputs = step_inputs(1, 1024, device="cuda")
    release = GradientRelease(optimizer) if "release" in options else None

    def step() -> None:
        if release is not None:
            release.backward(lambda: model(**inputs).loss)
            return
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    found = plan(config, seq_len=1024, dtype="bfloat16", optimizer="adamw8bit", **options)
    assert found.peak.total == pytest.approx(torch.cuda.max_memory_allocated(), rel=WITHIN)
