"""AdamW with 8-bit moments, a drop-in for torch.optim.AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyeff.ops.adamw8bit_step import (
    CODE,
    OPERATION,
    AdamWStates,
    check_block_size,
    check_hyperparameters,
    check_parameter,
    fits_states,
    step,
)

_TENSORS = ("exp_avg_code", "exp_avg_scale", "exp_avg_sq_code", "exp_avg_sq_scale")
_NUMBERS = ("step", "beta1_power", "beta2_power")


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose two moments take one byte each: 2 + 8 / block_size bytes of state per parameter instead of 8.

    The update is torch.optim.AdamW's, decay first, computed in fp32 (see `pyeff.adamw8bit_step`); between steps m and
    sqrt(v) are kept as 8-bit codes relative to the largest of their block. All parameters of a group that have taken
    equally many steps are updated by one call of the compiled extension (on a GPU, one launch for each combination of
    dtypes), without synchronising the device.

    params: fp32 or bf16 tensors, or groups of them that may set every option for themselves. lr: a float or a
    one-element tensor (one on a GPU is read back, which waits for it). block_size: 64 to 2048, a power of two.

    **bf16 parameters** are rounded to nearest even after each step, so what changes a weight by less than 2^-9 of
    itself is lost: with lr * weight_decay below about 2e-3 there is no weight decay at all. Keep fp32 parameters
    (and compute in bf16 under autocast) where decay matters.

    A NaN or Inf in a gradient makes that weight NaN, as in torch, and touches no other weight. Parameters without a
    gradient are skipped and keep their own count of steps.

    `state_dict` holds tensors and plain numbers only, names its code and continues bit for bit in a fresh optimizer;
    `load_state_dict` refuses states of another code, block size or shape before it changes anything.

    Raises TypeError for parameters or gradients that are sparse or neither fp32 nor bf16, ValueError for
    hyperparameters out of range.

    Dettmers et al., 8-bit Optimizers via Block-wise Quantization (2022).

    >>> model = torch.nn.Linear(256, 64)
    >>> optimizer = AdamW8bit(model.parameters(), lr=1e-3)
    >>> model(torch.ones(1, 256)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.state[model.weight]["exp_avg_code"].dtype
    torch.uint8
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        block_size: int = 256,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "block_size": block_size,
            "code": CODE,
        }
        _check_group(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; nothing is added if one of them does not fit."""
        params = param_group["params"]
        if not isinstance(params, Tensor):
            params = param_group["params"] = list(params)
            if len({id(p) for p in params}) != len(params):
                # torch warns; here both entries would be written at once, by different threads.
                raise ValueError("params must be different tensors; one of them is given twice")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
            for i, p in enumerate(group["params"]):
                check_parameter(p, f"params[{i}] of group {len(self.param_groups) - 1}")
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; `closure` reevaluates the model and returns the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Everything is looked at before anything is changed.
        calls = [call for group in self.param_groups for call in self._calls(group)]
        for call in calls:
            call()
        return loss

    def _calls(self, group: dict[str, Any]) -> list[_Call]:
        """One call for each device and count of steps; nearly always one."""
        beta1, beta2 = map(float, group["betas"])
        block_size = group["block_size"]
        calls: dict[tuple[Any, ...], _Call] = {}
        hyperparameters: dict[str, Any] = {}
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            if grad.layout is not torch.strided or grad.dtype not in (torch.float32, torch.bfloat16):
                raise TypeError(
                    f"AdamW8bit takes dense fp32 or bf16 gradients; got {grad.dtype} with layout {grad.layout} "
                    f"for a parameter of shape {tuple(p.shape)}"
                )
            if grad.shape != p.shape or grad.device != p.device:
                # torch checks this where a gradient is assigned, but not where `p.data` is, later.
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} on {p.device} has a gradient of shape "
                    f"{tuple(grad.shape)} on {grad.device}; it was made before the parameter changed: zero_grad() first"
                )
            if not hyperparameters:
                hyperparameters = {
                    "block_size": block_size,
                    "lr": float(group["lr"]),
                    "beta1": beta1,
                    "beta2": beta2,
                    "eps": float(group["eps"]),
                    "weight_decay": float(group["weight_decay"]),
                }
            state = self.state[p]
            if not state:
                fresh = AdamWStates.zeros([p], block_size=block_size)
                state.update({"step": 0, "beta1_power": 1.0, "beta2_power": 1.0})
                state.update({name: getattr(fresh, name)[0] for name in _TENSORS})
            elif _misfit(state, p, block_size):
                raise ValueError(
                    f"the states of a parameter of shape {tuple(p.shape)} on {p.device} were made for another shape, "
                    "device or block_size; make a new optimizer, or load a state_dict, after moving parameters"
                )
            key = (p.device, state["beta1_power"], state["beta2_power"])
            call = calls.get(key)
            if call is None:
                call = calls[key] = _Call(
                    {
                        **hyperparameters,
                        "beta1_power": state["beta1_power"] * beta1,
                        "beta2_power": state["beta2_power"] * beta2,
                        "impl": OPERATION.on_device(p.device.type).impl,
                    }
                )
            call.params.append(p)
            call.grads.append(grad)
            call.states.append(state)
        return list(calls.values())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the `state_dict` of an AdamW8bit over parameters of the same shapes, bit for bit.

        The tensors are copied. Raises ValueError, before anything is changed, for states in another code, block size
        or shape.
        """
        self._check_state_dict(state_dict)
        # torch casts floating-point states to the dtype of their parameter, and would cast bytes too; what is wrapped
        # it passes on untouched.
        kept = {
            key: {name: _Kept(value) if isinstance(value, Tensor) else value for name, value in state.items()}
            for key, state in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": kept})
        for p, state in self.state.items():
            for name, value in state.items():
                if isinstance(value, _Kept):
                    state[name] = value.tensor.detach().to(p.device, copy=True).contiguous()
        for group in self.param_groups:
            group["betas"] = tuple(group["betas"])

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict["param_groups"]
        if len(saved) != len(self.param_groups):
            raise ValueError(f"state_dict has {len(saved)} param_groups, this optimizer has {len(self.param_groups)}")
        for i, (theirs, ours) in enumerate(zip(saved, self.param_groups, strict=True)):
            if len(theirs["params"]) != len(ours["params"]):
                raise ValueError(
                    f"state_dict: param_groups[{i}] has {len(theirs['params'])} parameters, "
                    f"this optimizer's has {len(ours['params'])}"
                )
            if theirs.get("code") != ours["code"]:
                raise ValueError(
                    f"state_dict: param_groups[{i}] is in code {theirs.get('code')!r}; "
                    f"this AdamW8bit reads {ours['code']!r} only"
                )
            if theirs.get("block_size") != ours["block_size"]:
                raise ValueError(
                    f"state_dict: param_groups[{i}] has block_size {theirs.get('block_size')}, this optimizer has "
                    f"{ours['block_size']}; build it with block_size={theirs.get('block_size')}"
                )
            for key, p in zip(theirs["params"], ours["params"], strict=True):
                if state := state_dict["state"].get(key):
                    _check_state(state, p, ours["block_size"], f"state_dict: state[{key!r}]")


@dataclass
class _Call:
    """One call of the operation, collected before it is made."""

    options: dict[str, Any]
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self) -> None:
        step(
            self.params,
            self.grads,
            *([state[name] for state in self.states] for name in _TENSORS),
            **self.options,
        )
        for state in self.states:
            state["step"] += 1
            state["beta1_power"] = self.options["beta1_power"]
            state["beta2_power"] = self.options["beta2_power"]


@dataclass(frozen=True)
class _Kept:
    tensor: Tensor


def _check_group(group: dict[str, Any]) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor of one element; got shape {tuple(lr.shape)}")
    check_hyperparameters(lr=lr, betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"])
    check_block_size(group["block_size"])


def _misfit(state: dict[str, Any], p: Tensor, block_size: int) -> bool:
    # The kernels trust shapes: a group's block_size or a state edited in place would make them write out of bounds.
    return not fits_states(p, *(state[name] for name in _TENSORS), block_size=block_size)


def _check_state(state: dict[str, Any], p: Tensor, block_size: int, where: str) -> None:
    missing = [name for name in (*_NUMBERS, *_TENSORS) if name not in state]
    if missing:
        raise ValueError(f"{where} lacks {missing[0]}; it was not written by AdamW8bit")
    blocks = (-(-p.numel() // block_size),)
    for name in _TENSORS:
        shape, dtype = (p.shape, torch.uint8) if name.endswith("code") else (blocks, torch.float32)
        value = state[name]
        if not isinstance(value, Tensor) or value.shape != torch.Size(shape) or value.dtype != dtype:
            came = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{where}: {name} must be {dtype} {tuple(shape)} for this parameter; got {came}")
