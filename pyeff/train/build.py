"""Make the model trainable and its optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pyeff.data import EncodedSample, pack_one
from pyeff.errors import UserError
from pyeff.governor import TransformerShape
from pyeff.scoring.language_model import packed_inputs, without_adapters
from pyeff.scoring.model_costs import LINEARS_OF_MODULE
from pyeff.train.config import LoRAConfig, OptimizerConfig


def own_memory(model: nn.Module) -> nn.Module:
    """Move the weights out of the mapped file: the bits of a product may depend on how its operands are aligned."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return model


def with_lora(model: nn.Module, lora: LoRAConfig, *, seed: int) -> nn.Module:
    """Put adapters on the model, which is frozen but for them; their first values depend on ``seed`` alone.

    Raises `UserError` when peft is missing or no module has a name asked for.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("lora needs the package peft: pip install peft") from error
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft's annotation is narrower than its meaning
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    try:
        wrapped: nn.Module = get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(f"lora.target_modules: {str(error).splitlines()[0]}") from error
    return wrapped


def lora_linears(model: nn.Module, shape: TransformerShape) -> set[str]:
    """The matrices that carry an adapter, in the words of the FLOP formulas."""
    names = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if ".lora_A" in name}
    if not names:
        raise UserError("lora.target_modules: adapters are only trained on linear layers, and none is among these")
    unknown = sorted(name for name in names if name not in LINEARS_OF_MODULE)
    if unknown:
        raise UserError(
            f"lora.target_modules: the FLOPs of an adapter on {unknown[0]!r} are not known; "
            f"known are {', '.join(sorted(LINEARS_OF_MODULE))}"
        )
    return {linear for name in names for linear in LINEARS_OF_MODULE[name]} & set(shape.linears)


def recompute_activations(model: Any) -> None:
    """Keep each layer's input alone and run its forward again in the backward."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the older name goes with transformers 6
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def keep_attention(model: nn.Module) -> None:
    """Keep each layer's input and what its attention returned, and run the rest of it again in the backward.

    Raises `UserError` where the model has attention that `pyeff.attention` cannot stand for. Cost: one forward pass of
    a few tokens.
    """
    from pyeff.memory import AttentionRerunError, checkpoint

    core = without_adapters(model)
    samples = [EncodedSample([1] * length, 1, i) for i, length in enumerate((2, 3))]
    batch = pack_one(samples).to(core.device)
    was = model.training
    try:
        checkpoint(model)
        model.train()
        core(**packed_inputs(batch))  # masks and dropout show when it runs
    except (ValueError, AttentionRerunError) as error:
        raise UserError(f"checkpointing attention: {error} (in a configuration: checkpointing: layer)") from error
    finally:
        model.train(was)


def make_optimizer(settings: OptimizerConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with its moments in 8 bits or in the parameters' own type."""
    options: dict[str, Any] = {
        "lr": settings.lr,
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.states == "8bit":
        from pyeff.optim import AdamW8bit

        return AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, **options, fused=True)
