"""One step of Adam, AdamW, Lion or SGD over a list of parameters whose moments live in 8 bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyeff.ops._dispatch import Operation
from pyeff.ops._optimizer_plan import NUMBERS, StepPlan
from pyeff.ops._optimizer_states import (
    OptimizerStates,
    check_layout,
    check_memory,
    check_parameter,
    check_writable,
    fits,
    state_shapes,
)
from pyeff.reference.optimizer_step import CODE, RULES, OptimizerRule

_INTEGERS = ("seed", "block_size", "coded", "coupled", "nesterov")


def optimizer_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: OptimizerStates,
    rule: OptimizerRule,
    *,
    norm: Tensor | None = None,
    lr: Tensor | None = None,
    skipped: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Take one step in place, for all parameters in one call and, on a GPU, one launch for all dtypes.

    The formulas are torch's, in torch's order (Lion's are its paper's), computed in fp32; only what is kept between
    steps is rounded: see `pyeff.reference.optimizer_step`. params: fp32 or bf16, any shape; grads: the same shapes,
    fp32 or bf16; `states` from `OptimizerStates.zeros(params)`. All are on one device and read or changed in place.

    norm: float64 scalar on that device, the norm of the gradients (`pyeff.global_norm`). `rule.clip_norm` needs it.
    If it is NaN or Inf nothing changes but `skipped` (int64 scalar), which goes up by one. lr: fp32 scalar on the
    device that takes the place of `rule.lr`; nothing then waits for the device, and the call can be captured in a
    CUDA graph. A NaN or Inf gradient without a norm makes that weight NaN, as in torch (SGD, Adam), and leaves its
    block alone: scales are taken from finite values, and the element's own codes saturate.

    Every parameter counts its own steps, and beta^t is a running product, so betas may change between steps. All
    implementations give the same bits (NaN payloads aside), whatever the order or the splitting of the list, on any
    number of threads; random bits depend on `rule.seed`, `states.keys`, the step and the element alone. impl="auto"
    takes "cuda" for CUDA tensors and "cpu" for CPU tensors where the compiled extension can run, else "reference".

    Raises ValueError or TypeError when shapes, dtypes, devices, layouts or hyperparameters do not fit, before anything
    is changed. Cost for Adam: 16 bytes moved per fp32 parameter with fp32 gradient, 10 with bf16 for both (12 with
    "ecc8", 16 with "fp32"); no memory is allocated except a copy of each parameter or gradient that is not contiguous.

    Dettmers et al., 8-bit Optimizers via Block-wise Quantization (2022); Loshchilov and Hutter, Decoupled Weight
    Decay Regularization (2019); Chen et al., Symbolic Discovery of Optimization Algorithms (2023).

    >>> p, g = torch.ones(1000), torch.full((1000,), 0.5)
    >>> states = OptimizerStates.zeros([p])
    >>> optimizer_step([p], [g], states, OptimizerRule("adam", lr=0.1))
    >>> print(f"{p[0]:.4f}")
    0.9000
    """
    params, grads = list(params), list(grads)
    lists = states.lists()
    _check(params, grads, states, rule, lists)
    check_rule(rule)
    chosen = OPERATION.explain(params, grads, impl=impl).impl
    for name, scalar, dtype in (
        ("norm", norm, torch.float64),
        ("lr", lr, torch.float32),
        ("skipped", skipped, torch.int64),
    ):
        if scalar is not None and params:
            check_scalar(name, scalar, dtype, params[0].device)
    if rule.clip_norm < math.inf and norm is None:
        raise ValueError("rule.clip_norm needs norm, the norm of all gradients; got None")
    if params:
        step(
            params,
            grads,
            *lists,
            norm,
            lr,
            skipped,
            rule=rule.rule,
            numbers=[float(getattr(rule, name)) for name in NUMBERS],
            integers=[int(getattr(rule, name)) for name in _INTEGERS],
            master=states.master,
            keys=states.keys,
            impl=chosen,
        )


def check_rule(rule: OptimizerRule) -> None:
    """ValueError naming the first hyperparameter that is out of range (NaN is)."""
    if rule.rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}; got {rule.rule!r}")
    for name in ("lr", "eps", "weight_decay"):
        if not 0.0 <= float(getattr(rule, name)) < math.inf:
            raise ValueError(f"{name} must be >= 0 and finite; got {getattr(rule, name)!r}")
    if not (0.0 <= float(rule.beta1) < 1.0 and 0.0 <= float(rule.beta2) < 1.0):
        what = "momentum must be a number" if rule.rule == "sgd" else "betas must be two numbers"
        raise ValueError(f"{what} in [0, 1); got {rule.beta1!r} and {rule.beta2!r}")
    if not 0.0 <= float(rule.dampening) <= 1.0:
        raise ValueError(f"dampening must be in [0, 1]; got {rule.dampening!r}")
    if rule.nesterov and rule.dampening:
        raise ValueError(f"nesterov needs dampening 0; got {rule.dampening!r}")
    if not float(rule.clip_norm) > 0.0:
        raise ValueError(f"clip_norm must be > 0, or None not to clip; got {rule.clip_norm!r}")
    if isinstance(rule.seed, bool) or not isinstance(rule.seed, int) or not 0 <= rule.seed < 2**63:
        raise ValueError(f"seed must be an integer in [0, 2^63); got {rule.seed!r}")


def check_scalar(name: str, scalar: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """ValueError unless this is one number of that dtype on that device."""
    if scalar.numel() != 1 or scalar.dtype != dtype or scalar.device != device:
        raise ValueError(
            f"{name} must be one {dtype} number on {device}; "
            f"got {scalar.dtype} {tuple(scalar.shape)} on {scalar.device}"
        )


_LISTS = ("first", "first_scale", "second", "second_scale", "masters", "steps", "beta_powers")


def _check(
    params: list[Tensor],
    grads: list[Tensor],
    states: OptimizerStates,
    rule: OptimizerRule,
    lists: tuple[list[Tensor], ...],
) -> None:
    layout: dict[str, Any] = {"rule": states.rule, "states": states.states, "master": states.master}
    layout["block_size"] = states.block_size
    check_layout(**layout)
    if (rule.rule, rule.coded, rule.block_size) != (states.rule, states.states == "8bit", states.block_size):
        raise ValueError(
            f"the rule is for {rule.rule!r} with coded={rule.coded} and block_size={rule.block_size}; the states are "
            f"{states.states} of {states.rule!r} with block_size={states.block_size}"
        )
    if states.code != CODE:
        raise ValueError(f"states are in code {states.code!r}; this version reads {CODE!r}")
    if len(grads) != len(params) or len(states.keys) != len(params):
        raise ValueError(
            f"{len(params)} params need as many grads and states; got {len(grads)} grads and {len(states.keys)} keys"
        )
    if len({id(p) for p in params}) != len(params):
        # Both entries would be written at once, by different threads.
        raise ValueError("params must be different tensors; one of them is given twice")
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        check_parameter(p, f"params[{i}]")
        check_parameter(g, f"grads[{i}]")
        if p.device != params[0].device:
            raise ValueError(f"params[{i}] is on {p.device} and params[0] on {params[0].device}; call once per device")
        if g.shape != p.shape or g.device != p.device:
            raise ValueError(
                f"grads[{i}] must be {tuple(p.shape)} on {p.device} like its parameter; "
                f"got {tuple(g.shape)} on {g.device}"
            )
        for name, one, expected in zip(_LISTS, lists, state_shapes(p, **layout), strict=True):
            if len(one) != (0 if expected is None else len(params)):
                raise ValueError(
                    f"states.{name} must have {0 if expected is None else len(params)} tensors; got {len(one)}"
                )
            if expected is not None and not fits(one[i], *expected, p.device):
                raise ValueError(
                    f"states.{name}[{i}] must be contiguous {expected[1]} {expected[0]} on {p.device}; "
                    f"got {one[i].dtype} {tuple(one[i].shape)} on {one[i].device}"
                )


# Lists of tensors go through the dispatcher as they are; every argument that changes is declared so.
torch.library.define(
    "pyeff::optimizer_step",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] first, Tensor(c!)[] first_scale, Tensor(d!)[] second, "
    "Tensor(e!)[] second_scale, Tensor(f!)[] masters, Tensor(g!)[] steps, Tensor(h!)[] beta_powers, Tensor? norm, "
    "Tensor? lr, Tensor(i!)? skipped, *, str rule, float[] numbers, int[] integers, str master, int[] keys, "
    "str impl) -> ()",
)


@torch.library.impl("pyeff::optimizer_step", ("CPU", "CUDA"))
def _step(
    params: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor],
    first_scale: list[Tensor],
    second: list[Tensor],
    second_scale: list[Tensor],
    masters: list[Tensor],
    steps: list[Tensor],
    beta_powers: list[Tensor],
    norm: Tensor | None,
    lr: Tensor | None,
    skipped: Tensor | None,
    *,
    rule: str,
    numbers: list[float],
    integers: list[int],
    master: str,
    keys: list[int],
    impl: str,
) -> None:
    seed, block_size, coded, coupled, nesterov = integers
    made = OptimizerRule(
        rule,
        **dict(zip(NUMBERS, numbers, strict=True)),
        seed=seed,
        block_size=block_size,
        coded=bool(coded),
        coupled=bool(coupled),
        nesterov=bool(nesterov),
    )
    lists = (first, first_scale, second, second_scale, masters, steps, beta_powers)
    check_memory(params, "a parameter")
    for p in params:
        check_writable(p)
    for one in lists:
        check_memory(one, "a state")
    grads = [g.resolve_neg() for g in grads]
    plan = StepPlan(params, grads, lists, master=master, block_size=block_size, keys=keys, impl=impl)
    plan.step(made, norm=norm, lr=lr, skipped=skipped)


@torch.library.register_fake("pyeff::optimizer_step")
def _step_fake(*args: Any, **kwargs: Any) -> None:
    return None


step = torch.ops.pyeff.optimizer_step.default

OPERATION = Operation("optimizer_step", ("cuda", "cpu", "reference"))
