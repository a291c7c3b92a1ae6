"""What a pass of a dense language model costs by formula, trained in full or by LoRA's adapters alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from pyeff.errors import UserError
from pyeff.governor.flops import Cost, TransformerShape
from pyeff.scoring.language_model import shape_of_model, without_adapters

LINEARS_OF_MODULE = {
    **{f"{name}_proj": (name,) for name in ("q", "k", "v", "o", "gate", "up", "down")},
    "qkv_proj": ("q", "k", "v"),
    "gate_up_proj": ("gate", "up"),
    "out_proj": ("o",),
    "c_attn": ("q", "k", "v"),
    "query_key_value": ("q", "k", "v"),
    "c_fc": ("up",),
    "fc1": ("up",),
    "fc2": ("down",),
    "dense_h_to_4h": ("up",),
    "dense_4h_to_h": ("down",),
}
"""Names of the matrices in `pyeff.governor.flops` by what the modules are called in transformers."""


@dataclass(frozen=True)
class ModelCosts:
    """FLOPs of a model's passes: ``forward`` and ``train`` (forward and backward), its adapters included."""

    shape: TransformerShape
    forward: Cost
    train: Cost
    adapters: bool = False


def costs_of(model: nn.Module) -> ModelCosts | None:
    """The costs of a model that trains every parameter, or LoRA's alone; None where formulas do not fit."""
    core: Any = without_adapters(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    try:
        shape = shape_of_model(core)
    except UserError:
        return None
    forward = shape.forward_cost()
    lora = {name for name, _ in model.named_parameters() if ".lora_" in name}
    if not lora and len(trained) == sum(1 for _ in model.parameters()):
        return ModelCosts(shape, forward, shape.train_cost())
    if not lora or lora != trained.keys() or not all(".lora_A." in name or ".lora_B." in name for name in lora):
        return None
    modules = {name.partition(".lora_")[0].rpartition(".")[2] for name in lora}
    ranks = {p.shape[0 if ".lora_A." in name else 1] for name, p in trained.items()}
    if len(ranks) > 1 or not modules <= LINEARS_OF_MODULE.keys():
        return None
    rank = ranks.pop()
    targets = {linear for name in modules for linear in LINEARS_OF_MODULE[name]} & shape.linears.keys()
    multiplied = shape.layers * rank * sum(sum(shape.linears[name]) for name in targets)
    # Also where a fused matrix has one adapter, some layers have none, or two adapters stand side by side.
    if multiplied != sum(p.numel() for p in trained.values()):
        return None
    # A hook there may make the embedding's output require a gradient, which costs the first layer more.
    if core.get_input_embeddings()._forward_hooks:
        return None
    train = shape.train_cost(trainable="lora", lora_rank=rank, lora_targets=targets)
    forward = replace(forward, per_token=forward.per_token + 2 * multiplied)
    return ModelCosts(shape, forward, train, adapters=True)
