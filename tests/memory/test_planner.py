"""What `pyeff.memory.plan` says of any model: what fits, what a change buys, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planned_models import config_of, model_of, step_inputs
from torch import nn

from pyeff.errors import UserError
from pyeff.memory import Rates, estimated_rates, measure_step, measured_rates, parse_size, plan, trace_step
from pyeff.memory.architecture import Parameter
from pyeff.memory.planned_model import Source
from pyeff.memory.planner import Planner, largest_that_fits
from pyeff.memory.plans import Settings
from pyeff.memory.states import state_bytes


def small(**options: Any) -> Any:
    return plan(config_of("llama"), **{"seq_len": 64, "batch": 4, "device": "cpu", **options})


# ---- states


@pytest.mark.parametrize("master", ["none", "stochastic", "ecc8", "fp32"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["AdamW8bit", "Adam8bit", "Lion8bit", "SGD8bit"])
def test_states_take_the_bytes_that_the_optimizer_allocates(name: str, dtype: str, master: str):
    import pyeff.optim

    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(300, 70).to(getattr(torch, dtype))), nn.Parameter(torch.randn(1000))]
    momentum = {"momentum": 0.9} if name == "SGD8bit" else {}
    optimizer = getattr(pyeff.optim, name)(weights, lr=1e-3, master=master, **momentum)
    check_states(optimizer, weights, name.lower(), master)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_of_torch_take_the_bytes_that_it_allocates(dtype: str):
    weights = [nn.Parameter(torch.randn(300, 70).to(getattr(torch, dtype)))]
    check_states(torch.optim.AdamW(weights, fused=True), weights, "adamw", "none")


def check_states(optimizer: Any, weights: list[nn.Parameter], name: str, master: str) -> None:
    for p in weights:
        p.grad = torch.ones_like(p)
    optimizer.step()
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    measured = sum(t.numel() * t.element_size() for t in tensors)
    predicted = sum(
        state_bytes(Parameter("w", "layer 0", tuple(p.shape), p.element_size(), True), name, master)  # type: ignore[arg-type]
        for p in weights
    )
    assert predicted == pytest.approx(measured, rel=0.05)


# ---- tracing


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_trace_sees_what_a_real_step_keeps(family: str, checkpointing: bool):
    model = model_of(config_of(family), "bfloat16", checkpointing=checkpointing)
    real, traced = measure_step(model, **step_inputs(2, 64)), trace_step(model, **step_inputs(2, 64))
    assert traced.saved == real.saved
    assert traced.gradients == real.gradients
    assert traced.flops == real.flops
    assert traced.peak == pytest.approx(real.peak, rel=0.05)


def test_an_unknown_architecture_is_traced():
    from transformers import GemmaConfig

    config = GemmaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    found = plan(config, seq_len=64, batch=4, dtype="float32", device="cpu", device_memory="3MB")
    assert found.method == "trace"
    measured = measure_step(model_of(config, "float32"), **step_inputs(4, 64))
    beside = found.peak.parameters + found.peak.states
    assert found.peak.total - beside == pytest.approx(measured.peak, rel=0.05)
    assert found.largest_batch is not None
    fits = [
        plan(config, seq_len=64, batch=rows, dtype="float32", device="cpu", device_memory="3MB").fits
        for rows in (found.largest_batch, found.largest_batch + 1)
    ]
    assert fits == [True, False]
    with pytest.raises(UserError, match="head fused cannot be planned"):
        plan(config, seq_len=64, head="fused")


def test_any_module_is_traced_with_inputs_of_its_own():
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 1))
    found = plan(model, seq_len=1, device="cpu", inputs={"input": torch.empty(32, 64, device="meta")})
    parameters = 4 * sum(p.numel() for p in model.parameters())
    assert found.peak.parameters == parameters
    assert found.phases[-1].gradients == parameters
    assert found.phases[-1].states == pytest.approx(2 * parameters, rel=0.01)


def test_a_model_that_reads_values_is_refused_in_one_sentence():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match="Reads decides by the values"):
        trace_step(Reads(), torch.zeros(2, 4))


def test_a_step_is_not_measured_on_top_of_gradients():
    model = nn.Linear(4, 4)
    model(torch.ones(1, 4)).sum().backward()
    with pytest.raises(ValueError, match="zero_grad"):
        measure_step(model, torch.ones(1, 4))


# ---- what fits


def test_the_largest_batch_and_length_fit_and_one_more_does_not():
    found = small(device_memory="6MB", checkpointing="layer")
    for name, value in (("batch", found.largest_batch), ("seq_len", found.largest_seq_len)):
        assert value is not None
        assert small(device_memory="6MB", checkpointing="layer", **{name: value}).fits
        assert not small(device_memory="6MB", checkpointing="layer", **{name: value + 1}).fits


@given(st.integers(0, 500), st.integers(1, 400))
def test_the_search_finds_the_border(border: int, limit: int):
    assert largest_that_fits(lambda n: n <= border, limit) == min(border, limit)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(2, 100), st.sampled_from(["none", "layer", "attention"]))
def test_more_work_never_needs_less_memory(batch: int, tokens: int, mode: str):
    planner = Planner(Source(config_of("llama"), "bfloat16"))

    def peak(batch: int, tokens: int) -> int:
        return planner.peak(Settings(batch=batch, seq_len=tokens, checkpointing=mode, device="cpu"))  # type: ignore[arg-type]

    assert peak(batch, tokens) <= peak(batch + 1, tokens)
    assert peak(batch, tokens) <= peak(batch, tokens + 1)


def test_options_rank_what_fits_by_time_and_name_the_best_single_change():
    found = small(device_memory="3MB", rates=Rates(1e12, 1e11, "given"), seq_len=128)
    assert found.fits is False
    fitting = [option for option in found.options if option.fits]
    assert list(found.options[: len(fitting)]) == fitting
    times = [option.seconds for option in fitting]
    assert times == sorted(times)
    single = [option for option in fitting if len(option.changes) == 1]
    assert found.best_change == min(single, key=lambda option: option.seconds)
    assert found.best_change.name in found.sentence


def test_where_no_single_change_is_enough_the_sentence_says_so():
    found = small(device_memory="100kB")
    assert "Nothing the planner knows makes it fit" in found.sentence


def test_a_plan_is_plain_values():
    found = small(device_memory="3MB")
    again = json.loads(json.dumps(found.to_dict()))
    assert again["peak"]["total"] == found.peak.total
    assert sum(layer["parameters"] for layer in again["layers"]) <= found.peak.parameters


def test_recomputation_costs_flops_and_saves_memory():
    plain, layer = small(), small(checkpointing="layer")
    assert layer.flops > plain.flops
    assert layer.peak.total < plain.peak.total


def test_rates_say_where_they_come_from():
    assert estimated_rates("H100").source == "estimate"
    assert measured_rates("cpu", size=64, seconds=0.01).source == "measured"
    assert small(rates="h100", device_memory=None).device_memory == 80_000_000_000


# ---- bad input


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"seq_len": 0}, ValueError, "seq_len must be at least 1, got 0"),
        ({"batch": -2}, ValueError, "batch must be at least 1, got -2"),
        ({"batch": 1.5}, TypeError, "batch must be a whole number"),
        ({"device_memory": "-3GB"}, ValueError, "memory must be a positive size"),
        ({"device_memory": "much"}, ValueError, "memory must be a positive size"),
        ({"optimizer": "adam"}, ValueError, "optimizer must be one of adamw, adamw8bit"),
        ({"checkpointing": "some"}, ValueError, "checkpointing must be one of none, layer, attention"),
        ({"dtype": "float16"}, ValueError, "dtype must be one of float32, bfloat16"),
        ({"lora_rank": -1}, ValueError, "lora_rank must be a whole number"),
        ({"lora_rank": 4, "lora_targets": ["query"]}, ValueError, "no linear layer is called query"),
        ({"packed": True}, ValueError, "batch must be 1 for packed samples"),
        ({"rates": "abacus"}, ValueError, "gpu must be one of"),
        ({"head_tokens": 10_000}, ValueError, "head_tokens must be between"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        small(**options)


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "no such model"}', '{"model_type": "bert"'])
def test_an_unreadable_configuration_is_one_sentence(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError) as caught:
        plan(str(tmp_path), seq_len=8)
    assert "\n" not in str(caught.value)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="model must be a module"):
        plan(7, seq_len=8)
    with pytest.raises(UserError, match="there is no model directory"):
        plan("/nowhere/at/all", seq_len=8)


def test_sizes_are_read_in_powers_of_ten_and_two():
    assert parse_size("20GB") == 20 * 10**9
    assert parse_size("20 GiB") == 20 * 2**30
