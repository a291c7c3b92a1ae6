"""A training step of a Llama body whose layers run again in the backward pass, with attention kept and without.

    pytest benchmarks/bench_checkpoint.py --benchmark-only [--long]

Both sides run the same layers of transformers with `pyeff.attention`; the baseline re-runs all of a layer, as
`torch.utils.checkpoint` does. On a CPU, layers of width 512 in float32, four with --long and one without, as layers are
alike; on a GPU, the body of a 1B model in bf16.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyeff
from pyeff.memory.attention_interface import register

# What the arithmetic below leaves of a step when attention is kept: one of its four passes, if all ran at one rate.
CPU_TARGETS = {4096: 0.90, 8192: 0.86}
GPU_TARGETS = {16384: 1 / 1.05, 65536: 1 / 1.12}


def body(device: str, *, layers: int = 1, tiny: bool = False) -> Any:
    """The layers, without embedding and head."""
    from transformers import LlamaConfig, LlamaModel

    small: dict[str, Any] = {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    large: dict[str, Any] = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    if tiny:
        small |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
        small["num_key_value_heads"] = 2
    torch.manual_seed(0)
    shape = large if device == "cuda" and not tiny else small
    config = LlamaConfig(**shape, vocab_size=32, max_position_embeddings=1 << 17)
    with torch.device(device):
        return LlamaModel(config).to(torch.bfloat16 if device == "cuda" else torch.float32).train()


def rerun_all(model: Any) -> Any:
    """A twin with our attention and transformers' own checkpoints."""
    model = copy.deepcopy(model)
    model.config._attn_implementation_internal = register("sdpa")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def with_checkpoints(model: Any, **options: Any) -> Any:
    """A twin with ours."""
    model = copy.deepcopy(model)
    pyeff.checkpoint(model, **options)
    return model


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The gradients of one forward and backward pass."""
    model.zero_grad(set_to_none=True)
    hidden = model(inputs_embeds=x, use_cache=False).last_hidden_state
    hidden.backward(x)
    return [p.grad for p in model.parameters() if p.grad is not None]


def check_answer(models: dict[str, Any], device: str, dtype: torch.dtype) -> None:
    """The same gradients before anything is timed, to the rounding of kernels that may add in another order."""
    x = torch.randn(1, 256, models["torch"].config.hidden_size, device=device, dtype=dtype)
    expected = step(models["torch"], x)
    for name, model in models.items():
        for found, right in zip(step(model, x), expected, strict=True):
            error = (found - right).float().norm() / right.float().norm()
            assert error <= 16 * torch.finfo(dtype).eps, name
        model.zero_grad(set_to_none=True)


def step_flops(config: Any, tokens: int) -> float:
    """Those that every contender does: forward, re-run without attention, and backward."""
    head_size = config.hidden_size // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_size, config.num_key_value_heads * head_size
    matrices = 2 * config.hidden_size * (queries + keys) + 3 * config.hidden_size * config.intermediate_size
    attention = 2 * queries * tokens * (tokens + 1)
    return config.num_hidden_layers * (4 * 2 * tokens * matrices + 3.5 * attention)


@pytest.mark.benchmark(group="checkpoint")
@pytest.mark.parametrize("tokens", [4096, 8192, 16384, 65536])
def test_a_step_with_kept_attention(
    contest: Callable[..., Any], request: pytest.FixtureRequest, device: str, tiny: bool, tokens: int
) -> None:
    long = request.config.getoption("--long")
    targets = CPU_TARGETS if device == "cpu" else GPU_TARGETS
    if tokens not in targets:
        pytest.skip("a length for another device")
    if device == "cpu" and tokens > 4096 and not long:
        pytest.skip("takes minutes on a CPU: --long")
    model = body(device, layers=4 if long else 1, tiny=tiny)
    dtype = next(model.parameters()).dtype
    models = {"torch": rerun_all(model), "pyeff": with_checkpoints(model)}
    if device == "cuda":
        models["pyeff, offloaded"] = with_checkpoints(model, offload=True)
    check_answer(models, device, dtype)
    length = 64 if tiny else tokens
    x = torch.randn(1, length, model.config.hidden_size, device=device, dtype=dtype)
    functions = {name: lambda m=m: step(m, x) for name, m in models.items()}
    contest(
        "pyeff",
        functions,
        baseline="torch",
        target=targets[tokens],
        flops=step_flops(model.config, length),
        pairs=20 if device == "cuda" or long else 5,
    )


@pytest.mark.benchmark(group="checkpoint")
def test_a_step_with_offloaded_tensors(contest: Callable[..., Any], device: str, tiny: bool) -> None:
    if device == "cpu":
        pytest.skip("tensors on a CPU are not offloaded")
    model = body(device, tiny=tiny)
    models = {"kept": with_checkpoints(model), "offloaded": with_checkpoints(model, offload=True)}
    x = torch.randn(1, 64 if tiny else 16384, model.config.hidden_size, device=device, dtype=torch.bfloat16)
    functions = {name: lambda m=m: step(m, x) for name, m in models.items()}
    contest("offloaded", functions, baseline="kept", target=1.02, memory_target=1.0)
