"""The FLOPs of a model under adapters are those torch counts, and no formula is used where it does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from observed_models import VOCABULARY, model_named
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import pyeff
from pyeff.data import EncodedSample, EncodedSamples, Sample
from pyeff.data.packing import pack
from pyeff.governor import TransformerShape
from pyeff.scoring import EL2N, GradientSketches, HiddenStates, LastLayerGraNd, Perplexity, language
from pyeff.scoring.model_costs import costs_of

OPTIONS: dict[str, Any] = {"batch_tokens": 16, "progress": False}


def pool() -> EncodedSamples:
    generator = torch.Generator().manual_seed(4)
    lengths = [5, 9, 3, 7, 6]
    ids = [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    encoded = [EncodedSample(tokens, 1 + i % 2, i) for i, tokens in enumerate(ids)]
    return EncodedSamples([Sample(f"s{i}", "p", "a", source="test") for i in range(len(ids))], encoded)


def with_lora(name: str, targets: list[str], **options: Any) -> PeftModel:
    model = model_named(name, torch.float32)
    settings = LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM", **options)
    wrapped = get_peft_model(model, settings)
    assert isinstance(wrapped, PeftModel)
    return wrapped


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ["q_proj", "v_proj"]),
        ("llama tied", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        ("qwen2", ["o_proj"]),
        ("qwen3", ["up_proj", "down_proj"]),
        ("llama", ["down_proj"]),
    ],
)
@pytest.mark.parametrize(
    "method",
    [GradientSketches(pyeff.Sketch(64)), Perplexity(), EL2N(), LastLayerGraNd(), HiddenStates()],
    ids=lambda method: method.name,
)
def test_flops_under_adapters_are_those_torch_counts(
    method: Any, name: str, targets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_lora(name, targets)
    costs = costs_of(model)
    assert costs is not None
    assert costs.adapters

    def flops() -> int:
        run = method.features if isinstance(method, GradientSketches | HiddenStates) else method.score
        found: int = run(model, pool(), **OPTIONS).flops
        return found

    by_formula = flops()
    monkeypatch.setattr(language, "costs_of", lambda model: None)
    assert by_formula + products_of_no_use(method, targets, costs.shape) == flops() > 0


def products_of_no_use(method: Any, targets: list[str], shape: TransformerShape) -> int:
    """What fused attention multiplies in the first layer for gradients that nothing there needs."""
    inputs = {"q_proj", "k_proj", "v_proj"}
    if not isinstance(method, GradientSketches) or inputs.isdisjoint(targets):
        return 0
    pairs = sum(
        sum(len(encoded[i].ids) for i in batch.sample_indices) ** 2
        for encoded in [pool().encoded]
        for batch in pack(encoded, range(len(encoded)), max_tokens=16, window=language.PACKING_WINDOW)
    )
    return 2 * shape.query_width * pairs * len(inputs - set(targets))


def frozen_embedding() -> nn.Module:
    model = model_named("llama", torch.float32)
    model.get_input_embeddings().requires_grad_(False)  # type: ignore[operator]
    return model


def frozen() -> nn.Module:
    return model_named("llama", torch.float32).requires_grad_(False)


def embedding_required() -> nn.Module:
    model = with_lora("llama", ["q_proj"])
    model.enable_input_require_grads()
    return model


def second_adapter() -> nn.Module:
    model = with_lora("llama", ["q_proj"])
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    return model


@pytest.mark.parametrize(
    "make",
    [
        frozen_embedding,
        frozen,
        embedding_required,
        second_adapter,
        lambda: with_lora("llama", ["q_proj"], use_dora=True),
        lambda: with_lora("llama", ["q_proj"], modules_to_save=["lm_head"]),
        lambda: with_lora("llama with biases", ["q_proj"], bias="all"),
        lambda: with_lora("llama", ["q_proj", "o_proj"], rank_pattern={"o_proj": 2}),
        lambda: with_lora("llama", ["q_proj"], layers_to_transform=[1]),
        lambda: with_lora("llama", ["q_proj", "embed_tokens"]),
        lambda: with_lora("gpt2", ["c_attn"]),  # one adapter on three matrices
        lambda: with_lora("mixtral", ["q_proj"]),
    ],
)
def test_where_formulas_do_not_fit_torch_counts(make: Callable[[], nn.Module]) -> None:
    assert costs_of(make()) is None
