"""The model of a plan: its parameters for any settings, and what a trace of its step says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pyeff.errors import UserError
from pyeff.memory.architecture import (
    LINEARS,
    Adapters,
    Architecture,
    Parameter,
    architecture_of,
    empty_model,
    parameters_of,
    read_config,
    with_adapters,
)
from pyeff.memory.plans import DType, Settings


class Source:
    """The model as given: its parameters for any settings, and how its activations are found."""

    def __init__(self, model: Any, dtype: DType | None, inputs: Mapping[str, Any] | None = None) -> None:
        from pathlib import Path

        self.inputs = inputs
        self.module: Any = None
        if isinstance(model, (str, Path)):
            model = read_config(model)
        if hasattr(model, "named_parameters"):
            self.module = model
            self.config = getattr(model, "config", None)
            self.name = type(model).__name__
        elif hasattr(model, "model_type"):
            self.config = model
            self.name = str(model.model_type)
        else:
            raise TypeError(
                f"model must be a module, a transformers configuration or its directory, got {type(model).__name__}"
            )
        self.dtype: DType = dtype or self._own_dtype()
        self._empty: dict[str, Any] = {}
        plain = self.module is None or not any(".lora_" in name for name, _ in self.module.named_parameters())
        frozen = self.module is not None and not all(p.requires_grad for p in self.module.parameters())
        # The account knows models that are trained whole, or by adapters that it places itself.
        known = plain and not frozen and inputs is None and hasattr(self.config, "model_type")
        self.architecture: Architecture | None = architecture_of(self.config) if known else None

    def _own_dtype(self) -> DType:
        import torch

        found = next((p.dtype for p in self.module.parameters()), None) if self.module is not None else torch.bfloat16
        return "float32" if found is torch.float32 else "bfloat16"

    def empty(self, dtype: str) -> Any:
        """The model with this type's shapes; a module given is used as it is."""
        import torch

        if self.module is not None:
            return self.module
        if dtype not in self._empty:
            self._empty[dtype] = empty_model(self.config, getattr(torch, dtype))
        return self._empty[dtype]

    def parameters(self, settings: Settings) -> list[Parameter]:
        """Those of the model in these settings' type, adapters and all."""
        found = [dataclasses.replace(p, itemsize=settings.itemsize) for p in parameters_of(self.empty(self.dtype))]
        adapters = self.adapters(settings)
        return found if adapters is None else with_adapters(self.empty(self.dtype), found, adapters)

    def buffer_bytes(self) -> int:
        """Bytes of what is no parameter."""
        return sum(b.numel() * b.element_size() for b in self.empty(self.dtype).buffers())

    def adapters(self, settings: Settings) -> Adapters | None:
        """What these settings add to the linear layers they name, if anything."""
        if not settings.lora_rank:
            return None
        names = set(settings.lora_targets)
        if names == {"all-linear"}:
            present = {name.rsplit(".", 1)[-1] for name, _ in self.empty(self.dtype).named_modules()}
            names = present & set(LINEARS)
        # peft makes adapters in fp32 whatever the model is in.
        return Adapters(settings.lora_rank, frozenset(names), settings.lora_dropout, itemsize=4)


def trace_model(source: Source, settings: Settings) -> Any:
    """Trace a step of a model whose layers the planner does not know; see `pyeff.memory.trace`."""
    from pyeff.memory.trace import StepError

    model = source.empty(settings.dtype)
    if settings.head == "fused":
        raise UserError(f"head fused cannot be planned for {source.name}: its layers are traced, logits and all")
    if settings.lora_rank:
        raise UserError(f"adapters cannot be placed by the planner in {source.name}: give the model with its adapters")
    if settings.checkpointing == "attention":
        raise UserError(f"checkpointing attention cannot be planned for {source.name}: its layers are traced")
    if settings.compress is not None or settings.offload_activations:
        raise UserError(
            f"compressed or offloaded activations cannot be planned for {source.name}: its layers are traced"
        )
    if settings.release != "none":
        raise UserError(f"release {settings.release} cannot be planned for {source.name}: its layers are traced")
    try:
        return _traced(model, source, settings)
    except StepError as error:
        raise UserError(f"a step of {source.name} cannot be traced: {error}") from error


def _traced(model: Any, source: Source, settings: Settings) -> Any:
    import torch

    from pyeff.memory.trace import trace_step

    if source.inputs is not None:
        return trace_step(model, **source.inputs)
    ids = torch.empty(settings.batch, settings.seq_len, dtype=torch.int64, device="meta")
    arguments: dict[str, Any] = {"input_ids": ids, "labels": ids, "use_cache": False}
    if settings.packed:  # a mask of four dimensions is taken as it is
        size = (settings.batch, 1, settings.seq_len, settings.seq_len)
        arguments["attention_mask"] = torch.empty(size, dtype=torch.bool, device="meta")
    was = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    wanted = settings.checkpointing == "layer"
    if wanted and not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(f"checkpointing layer cannot be planned for {source.name}: the model does not support it")
    training = model.training
    try:
        if wanted and not was:
            _checkpoint_layers(model, True)
        model.train()
        return trace_step(model, **arguments)
    finally:
        model.train(training)
        if wanted and not was:
            _checkpoint_layers(model, False)


def _checkpoint_layers(model: Any, on: bool) -> None:
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # before transformers 5.2
    if on:
        options = {f"{name}_checkpointing_kwargs": {"use_reentrant": False}}
        getattr(model, f"{name}_checkpointing_enable")(**options)
    else:
        getattr(model, f"{name}_checkpointing_disable")()
