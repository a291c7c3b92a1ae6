"""Small models of the real classes for tests of the memory planner, and the step they take."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

LLAMA: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {
    "vocab_size": 96,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config_of(family: str, **changes: Any) -> Any:
    """A small configuration of Llama or GPT-2."""
    return LlamaConfig(**{**LLAMA, **changes}) if family == "llama" else GPT2Config(**{**GPT2, **changes})


def model_of(config: Any, dtype: str, *, checkpointing: bool = False, lora: dict[str, Any] | None = None) -> nn.Module:
    """The model in training mode, with adapters and recomputed layers if asked for."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    if lora is not None:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    if checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def step_inputs(batch: int, tokens: int, *, packed: bool = False, device: str = "cpu") -> dict[str, Any]:
    """Arguments of one forward with its loss; packed: one row of two samples."""
    ids = torch.arange(batch * tokens, device=device).reshape(batch, tokens) % 90
    arguments: dict[str, Any] = {"input_ids": ids, "labels": ids, "use_cache": False}
    if packed:
        first = tokens // 3
        places = torch.cat([torch.arange(first), torch.arange(tokens - first)])
        arguments["position_ids"] = places[None].to(device)
    return arguments
