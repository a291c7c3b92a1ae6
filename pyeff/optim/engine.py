"""What the optimizers over 8-bit states share: options, states, one call a step, saving and loading."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyeff.ops.global_norm import global_norm
from pyeff.ops.optimizer_step import (
    DTYPES,
    OPERATION,
    OptimizerStates,
    StepPlan,
    check_layout,
    check_parameter,
    check_rule,
    fits,
    state_shapes,
)
from pyeff.optim.convert import converted
from pyeff.optim.sharding import as_part, check_split, first_block, is_distributed, local, part_of, shard_groups
from pyeff.reference.optimizer_step import CODE, OptimizerRule

# What decides which states there are; a state_dict that differs in one of these cannot be read.
_LAYOUT = ("states", "master", "block_size")


class Optimizer8bit(torch.optim.Optimizer):
    """Options and behaviour that `AdamW8bit`, `Adam8bit`, `Lion8bit` and `SGD8bit` share.

    block_size: 64 to 2048, a power of two. states: "8bit", or "fp32" for moments as torch keeps them (and their
    memory), which makes the step torch's to a few roundings.

    master: how a **bf16 parameter** remembers changes below 2^-9 of itself (fp32 parameters need nothing):
    "stochastic" (default) rounds up or down at random with the right mean, by bits that depend on `seed`, the
    parameter (its name where the optimizer was given names, else its place), its step and the element alone, so that
    replicas and resumed runs agree; "ecc8" keeps the next eight bits of each weight in a byte, together a weight of 24
    bits; "fp32" keeps a twin; "none" rounds to nearest, which loses weight decay altogether. The twin or byte belongs
    to the weight: load weights before the optimizer takes its first step, or together with its state.

    clip_norm: scale the gradients of the group so that the norm of all gradients of the optimizer is at most this, as
    torch.nn.utils.clip_grad_norm_ does, without changing the gradients themselves. With clip_norm or
    skip_nonfinite=True in any group, a step whose gradients hold a NaN or Inf is skipped as a whole and counted in
    `skipped_steps`. Without, such a gradient makes its weight NaN, as in torch, and touches no other weight. The norm
    costs one more read of the gradients.

    All parameters of a group on a device are updated by one call of the compiled extension whatever their dtypes (on a
    GPU: one launch after a tiny one for the scalars; nothing waits for the device). With `lr` a CUDA tensor a step can
    be captured in a CUDA graph, after one step outside it. Parameters without a gradient are skipped and keep their
    own count of steps.

    Parameters may be DTensors that are replicated or split along dimension 0 (FSDP2): blocks run along rows, so a step
    and a resumed checkpoint have the same bits at any number of processes (clip_norm: to the rounding of the norm). A
    split that cuts a block, which for vectors is likely, raises ValueError: give vectors a group with states="fp32".

    `state_dict` holds tensors and plain values only, names its code and continues bit for bit in a fresh optimizer.
    `load_state_dict` also reads the states of torch's and bitsandbytes' optimizers of the same rule, and refuses,
    before anything changes, states of another rule, code, layout or shape and numbers that make no sense.
    """

    _rule: ClassVar[str]
    _coupled: ClassVar[bool]
    _moments: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        block_size: int,
        states: str,
        master: str,
        seed: int,
        clip_norm: float | None,
        skip_nonfinite: bool,
    ) -> None:
        self._plans: dict[tuple[int, torch.device, int | None], _Plan] = {}
        defaults |= {
            "block_size": block_size,
            "states": states,
            "master": master,
            "seed": seed,
            "clip_norm": clip_norm,
            "skip_nonfinite": skip_nonfinite,
            "code": CODE,
        }
        self._check_group(defaults)
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}

    # -------------------------------------------------------------------------------------------------- options

    def _rule_of(self, group: dict[str, Any], lr: float) -> OptimizerRule:
        beta1, beta2 = group["betas"] if "betas" in group else (group["momentum"], 0.0)
        clip_norm = group["clip_norm"]
        return OptimizerRule(
            self._rule,
            lr=lr,
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(group.get("eps", 0.0)),
            weight_decay=float(group["weight_decay"]),
            dampening=float(group.get("dampening", 0.0)),
            clip_norm=math.inf if clip_norm is None else float(clip_norm),
            seed=group["seed"],
            block_size=group["block_size"],
            coded=group["states"] == "8bit",
            coupled=self._coupled,
            nesterov=bool(group.get("nesterov", False)),
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr must be a number or a tensor of one element; got shape {tuple(lr.shape)}")
        if "betas" in group and (not isinstance(group["betas"], (tuple, list)) or len(group["betas"]) != 2):
            raise ValueError(f"betas must be two numbers in [0, 1); got {group['betas']!r}")
        check_layout(rule=self._rule, **{name: group[name] for name in _LAYOUT})
        check_rule(self._rule_of(group, float(lr)))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; nothing is added if one of them does not fit."""
        params = param_group["params"]
        if not isinstance(params, Tensor):
            params = param_group["params"] = list(params)
            if len({id(p[1] if isinstance(p, tuple) else p) for p in params}) != len(params):
                # torch warns; here both entries would be written at once, by different threads.
                raise ValueError("params must be different tensors; one of them is given twice")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            for i, p in enumerate(group["params"]):
                where = f"params[{i}] of group {len(self.param_groups) - 1}"
                check_parameter(p, where)
                if is_distributed(p):
                    at_random = group["master"] == "stochastic" and p.dtype == torch.bfloat16
                    in_blocks = group["states"] == "8bit"
                    check_split(p, where, block_size=group["block_size"], in_blocks=in_blocks, at_random=at_random)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        group["skipped_steps"] = torch.zeros((), dtype=torch.int64, device=_device_of(group))

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because gradients were not finite; waits for the device."""
        return int(self.param_groups[0]["skipped_steps"])

    # ----------------------------------------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; `closure` reevaluates the model and returns the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Everything is looked at before anything is changed.
        calls = [call for index, group in enumerate(self.param_groups) for call in self._calls(index, group)]
        norms = self._norms(calls)
        for call in calls:
            self._take(call, norms.get(call.device), call.group["clip_norm"])
        return loss

    def _take(self, call: _Call, norm: Tensor | None, clip_norm: float | None) -> None:
        lr: float | Tensor = call.group["lr"]
        tensor: Tensor | None = None
        if isinstance(lr, Tensor) and lr.device == call.device and lr.is_cuda and lr.dtype == torch.float32:
            tensor, lr = lr, 0.0  # read on the device
        call.plan.step(
            self._rule_of({**call.group, "clip_norm": clip_norm}, float(lr)),
            norm=norm,
            lr=tensor,
            skipped=call.group["skipped_steps"] if call.counts_skipped else None,
        )
        call.plan.release_grads()

    @torch.no_grad()
    def step_parameter(
        self,
        index: int,
        place: int,
        *,
        norm: Tensor | None = None,
        clip_norm: float | None = None,
        counts_skipped: bool = True,
    ) -> None:
        """Take a step of parameter `place` of group `index` alone, with the bits that `step` has for it.

        For steps inside a backward (`GradientRelease`). norm: float64 scalar on the parameter's device, of all
        gradients; needed by clip_norm, which takes the place of the group's. If the norm is not finite nothing is
        changed, and `skipped_steps` goes up if counts_skipped. A parameter without a gradient takes no step.
        """
        for call in self._calls(index, self.param_groups[index], only=place):
            self._take(dataclasses.replace(call, counts_skipped=counts_skipped), norm, clip_norm)

    def _norms(self, calls: list[_Call]) -> dict[torch.device, Tensor]:
        """The norm of all gradients on each device that has some, if a group asks for it."""
        asked = any(group["skip_nonfinite"] or group["clip_norm"] is not None for group in self.param_groups)
        if not (asked and calls):
            return {}
        # Parts of parameters are added up over the processes that hold the others; the order is the same on each.
        grads: dict[tuple[torch.device, tuple[Any, ...]], list[Tensor]] = {}
        for call in calls:
            for grad, groups in zip(call.plan.grads, call.shard_groups, strict=True):
                grads.setdefault((call.device, groups), []).append(grad)
        norms = []
        for (_, groups), some in grads.items():
            norm = global_norm(some)
            if groups:
                norm.square_()
                for group in groups:
                    torch.distributed.all_reduce(norm, group=group)
                norm.sqrt_()
            norms.append(norm)
        total = norms[0]
        if len(norms) > 1:
            total = torch.stack([norm.to(total.device) for norm in norms]).square().sum().sqrt()
        return {device: total.to(device) for device, _ in grads}

    def _calls(self, index: int, group: dict[str, Any], *, only: int | None = None) -> list[_Call]:
        """One call for each device; nearly always one. `only`: the place of the one parameter to be stepped."""
        calls: dict[torch.device, _Rows] = {}
        names = self._names(group)
        state_of = self.state
        for i, p in enumerate(group["params"]):
            grad = p.grad
            if grad is None or (only is not None and i != only):
                continue
            if grad.dtype not in DTYPES or grad.layout is not torch.strided:
                raise TypeError(
                    f"{type(self).__name__} takes dense fp32 or bf16 gradients; got {grad.dtype} with layout "
                    f"{grad.layout} for a parameter of shape {tuple(p.shape)}"
                )
            device = p.device
            if grad.shape != p.shape or grad.device != device:
                # torch checks this where a gradient is assigned, but not where `p.data` is, later.
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} on {device} has a gradient of shape "
                    f"{tuple(grad.shape)} on {grad.device}; it was made before the parameter changed: zero_grad() first"
                )
            state = state_of[p]
            if not state:
                state.update(self._fresh(p, group))
            rows = calls.get(device)
            if rows is None:
                rows = calls[device] = _Rows()
            groups: tuple[Any, ...] = ()
            if is_distributed(p) or is_distributed(grad):
                groups, grad = shard_groups(p), _part_of_grad(grad, p)
                p = local(p)
            rows.places.append(i)
            rows.params.append(p)
            rows.grads.append(grad)
            rows.shard_groups.append(groups)
            # What must not change while a plan is in use: where weights lie, and which tensors the states are.
            rows.key.append((p.data_ptr(), p.dtype, p.shape, p.stride()))
            rows.states.append([state.get(name) for name in names])
        return [
            _Call(group, device, self._plan(index, group, device, rows, only), rows.shard_groups, counts_skipped=j == 0)
            for j, (device, rows) in enumerate(calls.items())
        ]

    def _plan(self, index: int, group: dict[str, Any], device: torch.device, rows: _Rows, only: int | None) -> StepPlan:
        layout = {name: group[name] for name in _LAYOUT}
        cached = self._plans.get((index, device, only))
        if cached is not None and cached.layout == layout and cached.rows.key == rows.key:
            same = zip(cached.rows.states, rows.states, strict=True)
            if all(a is b for ours, theirs in same for a, b in zip(ours, theirs, strict=True)):
                cached.plan.set_grads(rows.grads)
                return cached.plan
        parts = [[state if state is None else local(state) for state in states] for states in rows.states]
        for p, states in zip(rows.params, parts, strict=True):
            for state, expected in zip(states, state_shapes(p, rule=self._rule, **layout), strict=False):
                if expected is not None and (state is None or not fits(state, *expected, device)):
                    raise ValueError(
                        f"the states of a parameter of shape {tuple(p.shape)} on {device} were made for another shape, "
                        "device or block_size; make a new optimizer, or load a state_dict, after moving parameters"
                    )
        if group["skipped_steps"].device != _device_of(group):
            group["skipped_steps"] = group["skipped_steps"].to(_device_of(group))
        columns = list(zip(*parts, strict=True))
        lists = [[] if column[0] is None else list(column) for column in columns]
        plan = StepPlan(
            rows.params,
            rows.grads,
            lists,
            master=group["master"],
            block_size=group["block_size"],
            keys=self._keys(index, rows.places),
            first_blocks=[first_block(group["params"][i], group["block_size"]) for i in rows.places],
            impl=OPERATION.on_device(device.type).impl,
        )
        rows.grads = []  # the plan has them, and lets go of them with the next step's
        self._plans[index, device, only] = _Plan(layout, rows, plan)
        return plan

    def _keys(self, index: int, places: list[int]) -> list[int]:
        """What tells the random bits of parameters apart: their names if the optimizer knows them, else their order."""
        names = self.param_groups[index].get("param_names")
        if names:
            return [int.from_bytes(hashlib.sha256(names[i].encode()).digest()[:7], "little") for i in places]
        start = sum(len(group["params"]) for group in self.param_groups[:index])
        return [start + i for i in places]

    # --------------------------------------------------------------------------------------------------- states

    def _names(self, group: dict[str, Any]) -> list[str | None]:
        """Names in `state`, in the order of `OptimizerStates.lists`; None where this layout has nothing."""
        names: list[str | None] = []
        for moment in (*self._moments, None)[:2]:
            if moment is None:
                names += [None, None]
            elif group["states"] == "8bit":
                names += [f"{moment}_code", f"{moment}_scale"]
            else:
                names += [moment, None]
        names.append({"ecc8": "master_error", "fp32": "master"}.get(group["master"]))
        return [*names, "step", "beta_powers" if self._rule == "adam" else None]

    def _fresh(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The states of a parameter that has taken no step."""
        layout = {name: group[name] for name in _LAYOUT}
        lists = OptimizerStates.zeros([local(p)], rule=self._rule, **layout).lists()
        named = zip(self._names(group), lists, state_shapes(p, rule=self._rule, **layout), strict=True)
        return {name: _placed(name, one[0], p, expected[0]) for name, one, expected in named if name and expected}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`: of this optimizer bit for bit, of torch's or bitsandbytes' of the same rule.

        Foreign moments are read as fp32 and stored in this optimizer's states (in 8 bits they are rounded once);
        hyperparameters come along, everything foreign optimizers do not have stays as it is here. The tensors are
        copied. Raises ValueError, before anything is changed, for states in another rule, code, layout or shape, and
        for numbers out of range.
        """
        state_dict = converted(self, state_dict)
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
                    part = part_of(value.tensor, p) if _is_split(name, p) else value.tensor
                    part = part.detach().to(p.device, copy=True).contiguous()
                    state[name] = _placed(name, part, p, value.tensor.shape)
        for group in self.param_groups:
            if "betas" in group:
                group["betas"] = tuple(group["betas"])
            group["skipped_steps"] = torch.as_tensor(group["skipped_steps"]).to(_device_of(group), copy=True)
        self._plans = {}

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict["param_groups"]
        if len(saved) != len(self.param_groups):
            raise ValueError(f"state_dict has {len(saved)} param_groups, this optimizer has {len(self.param_groups)}")
        known = set()
        for i, (theirs, ours) in enumerate(zip(saved, self.param_groups, strict=True)):
            where = f"state_dict: param_groups[{i}]"
            if len(theirs["params"]) != len(ours["params"]):
                raise ValueError(
                    f"{where} has {len(theirs['params'])} parameters, this optimizer's has {len(ours['params'])}"
                )
            if theirs.get("code") != ours["code"]:
                raise ValueError(
                    f"{where} is in code {theirs.get('code')!r}; this {type(self).__name__} reads {ours['code']!r} only"
                )
            for name in _LAYOUT:
                if theirs.get(name) != ours[name]:
                    raise ValueError(
                        f"{where} has {name} {theirs.get(name)}, this optimizer has {ours[name]}; "
                        f"build it with {name}={theirs.get(name)!r}"
                    )
            for name in ours:
                if name not in theirs and name != "param_names":
                    raise ValueError(f"{where} lacks {name}; it was not written by {type(self).__name__}")
            try:
                self._check_group(theirs)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where}: {error}") from None
            for key, p in zip(theirs["params"], ours["params"], strict=True):
                known.add(key)
                if state := state_dict["state"].get(key):
                    self._check_state(state, p, ours, f"state_dict: state[{key!r}]")
        if unknown := [key for key in state_dict["state"] if key not in known]:
            raise ValueError(f"state_dict: state[{unknown[0]!r}] belongs to no parameter of its param_groups")

    def _check_state(self, state: dict[str, Any], p: Tensor, group: dict[str, Any], where: str) -> None:
        shapes = state_shapes(p, rule=self._rule, **{name: group[name] for name in _LAYOUT})
        for name, expected in zip(self._names(group), shapes, strict=True):
            if name is None or expected is None:
                continue
            if name not in state:
                raise ValueError(f"{where} lacks {name}; it was not written by {type(self).__name__}")
            shape, dtype = expected
            value = state[name]
            if not isinstance(value, Tensor) or value.shape != torch.Size(shape) or value.dtype != dtype:
                came = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise ValueError(f"{where}: {name} must be {dtype} {tuple(shape)} for this parameter; got {came}")
            try:
                part = part_of(value, p) if _is_split(name, p) or is_distributed(value) else value
            except ValueError as error:
                raise ValueError(f"{where}: {name} {error}") from None
            if problem := _nonsense(name, part):
                raise ValueError(f"{where}: {name} must {problem}")


def _nonsense(name: str, value: Tensor) -> str | None:
    """What a state of this name must be and is not, or None."""
    if name == "step":
        step = value.item()
        if not (math.isfinite(step) and step >= 0 and step == int(step)):
            return f"be a whole number >= 0; got {step}"
    elif name == "beta_powers":
        if not ((value >= 0) & (value <= 1)).all():
            return f"be in [0, 1]; got {value.tolist()}"
    elif name.endswith("_scale"):
        if not (value.isfinite() & (value >= 0)).all():
            return "be finite and >= 0 everywhere"
    elif name == "exp_avg_sq" and (value < 0).any():
        return "be >= 0 everywhere"
    return None


@dataclass
class _Rows:
    """The parameters of one group on one device that have a gradient."""

    places: list[int] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    key: list[tuple[Any, ...]] = field(default_factory=list)
    states: list[list[Any]] = field(default_factory=list)
    shard_groups: list[tuple[Any, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class _Plan:
    layout: dict[str, Any]
    rows: _Rows
    plan: StepPlan


@dataclass(frozen=True)
class _Call:
    """One call of the operation, collected before it is made."""

    group: dict[str, Any]
    device: torch.device
    plan: StepPlan
    shard_groups: list[tuple[Any, ...]]
    counts_skipped: bool


@dataclass(frozen=True)
class _Kept:
    tensor: Tensor


def _is_split(name: str, p: Tensor) -> bool:
    """Whether a state of this name is split among processes as its parameter is; counts are the same on each."""
    if not is_distributed(p) or name in ("step", "beta_powers"):
        return False
    return p.dtype == torch.bfloat16 or not name.startswith("master")


def _placed(name: str, part: Tensor, p: Tensor, shape: Sequence[int]) -> Tensor:
    return as_part(part, p, shape) if _is_split(name, p) else part


def _part_of_grad(grad: Tensor, p: Tensor) -> Tensor:
    try:
        if is_distributed(p) and not is_distributed(grad):
            raise ValueError("is a whole one of a parameter that is split among processes")
        grad = part_of(grad, p)
    except ValueError as error:
        raise ValueError(f"the gradient of a parameter of shape {tuple(p.shape)} {error}") from None
    # What a collective has not delivered yet is waited for here; a kernel would read the memory as it is.
    return grad.wait() if hasattr(grad, "wait") else grad


def _device_of(group: dict[str, Any]) -> torch.device:
    return group["params"][0].device if group["params"] else torch.device("cpu")
