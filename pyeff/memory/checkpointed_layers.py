"""Which layers of a model are checkpointed, what attention they call, and the caches they are given."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from typing import Any

from torch import nn


def find_layers(model: nn.Module, layers: Any) -> dict[str, nn.Module]:
    """The layers that `checkpoint` was asked for, by their names in the model."""
    if isinstance(layers, str):
        if layers != "auto":
            raise ValueError(f"layers must be 'auto' or a list of modules or their names, got {layers!r}")
        return _decoder_layers(model)
    if isinstance(layers, nn.Module) and not isinstance(layers, nn.ModuleList):
        layers = [layers]
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers must be 'auto' or a list of modules or their names, got {type(layers).__name__}")
    names = {id(module): name for name, module in model.named_modules()}
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for given in layers:
        if isinstance(given, str):
            if given not in modules:
                raise ValueError(f"layers names {given!r}, which is no module of the model")
            given = modules[given]
        if not isinstance(given, nn.Module):
            raise TypeError(f"layers must hold modules or their names, got {type(given).__name__}")
        if id(given) not in names:
            raise ValueError(f"layers holds a {type(given).__name__} that is no module of the model")
        chosen = given if isinstance(given, nn.ModuleList) else [given]
        found.update({names[id(module)]: module for module in chosen})
    if not found:
        raise ValueError("layers is empty: name at least one module")
    return found


def _decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    found = {}
    if "transformers" in sys.modules:
        from transformers.modeling_layers import GradientCheckpointingLayer

        found = {name: m for name, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)}
    if not found:
        raise ValueError(
            f"layers='auto' finds the decoder layers of transformers' models, and {type(model).__name__} has none: "
            "give layers=[...], modules that call pyeff.attention, or their names"
        )
    return {name: layer for name, layer in found.items() if not _enclosed(name, found)}


def _enclosed(name: str, names: Iterable[str]) -> str | None:
    return next((other for other in names if other != name and (not other or name.startswith(f"{other}."))), None)


def refuse_nested(layers: dict[str, nn.Module]) -> None:
    """ValueError if one of the layers lies in another."""
    for name in layers:
        outer = _enclosed(name, layers)
        if outer is not None:
            raise ValueError(f"layers holds {name!r} and {outer!r}, which encloses it: name one of them")


def refuse_gradient_checkpointing(name: str, layer: nn.Module) -> None:
    """ValueError if transformers would checkpoint the layer too."""
    if getattr(layer, "gradient_checkpointing", False):
        raise ValueError(
            f"layer {name!r} has transformers' gradient checkpointing switched on: call "
            "model.gradient_checkpointing_disable() first"
        )


def replace_attention(model: nn.Module, layers: dict[str, nn.Module]) -> list[Any]:
    """Give `pyeff.attention` to the configurations that transformers' layers read; what undoes it."""
    if "transformers" not in sys.modules:
        return []
    from transformers import PreTrainedConfig, PreTrainedModel

    from pyeff.memory.attention_interface import register

    chosen = {id(layer) for layer in layers.values()}
    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or module._supports_attention_backend:
            continue
        if any(id(inner) in chosen for inner in module.modules()):
            raise ValueError(
                f"{name or 'the model'}: the attention of {type(module).__name__} does not go through transformers' "
                "AttentionInterface: checkpoint with keep='nothing'"
            )
    found = (getattr(module, "config", None) for layer in layers.values() for module in layer.modules())
    configs = {id(config): config for config in found if isinstance(config, PreTrainedConfig)}
    undo = []
    for config in configs.values():
        original = config._attn_implementation
        # Only this one: the public setter would change every configuration inside it too.
        config._attn_implementation_internal = register(original or "eager")
        undo.append(functools.partial(setattr, config, "_attn_implementation_internal", original))
    return undo


def without_caches(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments without caches of keys and values, which a re-run would write to again."""
    if "transformers" not in sys.modules or getattr(layer, "_can_checkpoint_with_cache", False):
        return args, kwargs
    from transformers import Cache

    def without(value: Any) -> Any:
        if not isinstance(value, Cache):
            return value
        dropped_by: set[int] = value.__dict__.setdefault("_dropped_by", set())
        if id(layer) in dropped_by:
            raise ValueError(
                "this cache was given before and is empty, as layers drop caches while gradients are wanted: decode "
                "under torch.no_grad()"
            )
        dropped_by.add(id(layer))
        if value.get_seq_length() > 0:
            raise ValueError(
                "a cache that holds tokens cannot be trained on top of, as the re-run would write to it again: pass "
                "use_cache=False and past_key_values=None"
            )
        return None

    kwargs = {name: False if name == "use_cache" else without(value) for name, value in kwargs.items()}
    return tuple(without(value) for value in args), kwargs


__all__ = ["find_layers", "refuse_gradient_checkpointing", "refuse_nested", "replace_attention", "without_caches"]
