"""The calls of the operation that a step makes, looked at before anything changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from pyeff.ops._optimizer_plan import StepPlan
from pyeff.ops._optimizer_states import DTYPES, check_memory, check_parameter, check_writable, fits
from pyeff.ops.optimizer_step import OPERATION
from pyeff.optim.directions import DirectionPlan
from pyeff.optim.offload import OffloadedPlan
from pyeff.optim.options import LAYOUT
from pyeff.optim.pieces import OFFLOADED
from pyeff.optim.sharding import first_block, is_distributed, local, part_of_grad, placed, shard_groups

if TYPE_CHECKING:
    from pyeff.optim.engine import Optimizer8bit

AnyPlan: TypeAlias = "StepPlan | OffloadedPlan | DirectionPlan"


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
    plan: AnyPlan


@dataclass(frozen=True)
class Call:
    """One call of the operation, collected before it is made."""

    group: dict[str, Any]
    device: torch.device
    plan: AnyPlan
    shard_groups: list[tuple[Any, ...]]


class Plans:
    """The plans of an optimizer, kept from one step to the next; a new one begins when groups or states change."""

    def __init__(self, optimizer: Optimizer8bit) -> None:
        self.optimizer = optimizer
        self.kept: dict[tuple[int, torch.device, int | None], _Plan] = {}

    def calls(self, index: int, group: dict[str, Any], *, only: int | None = None) -> list[Call]:
        """One call for each device; nearly always one. `only`: the place of the one parameter to be stepped."""
        calls: dict[torch.device, _Rows] = {}
        names = self.optimizer._names(group)
        state_of = self.optimizer.state
        looked_at = 1 if self.optimizer._directed is None else len(names)
        for i, p in enumerate(group["params"]):
            grad = p.grad
            if grad is None or (only is not None and i != only):
                continue
            if grad.dtype not in DTYPES or grad.layout is not torch.strided:
                raise TypeError(
                    f"{type(self.optimizer).__name__} takes dense fp32 or bf16 gradients; got {grad.dtype} with layout "
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
                state.update(self.optimizer._fresh(p, group))
            rows = calls.get(device)
            if rows is None:
                rows = calls[device] = _Rows()
            groups: tuple[Any, ...] = ()
            place: Callable[[Tensor], int] = Tensor.data_ptr
            if is_distributed(p) or is_distributed(grad):
                place = id  # a DTensor has no address
                groups, grad = shard_groups(p), part_of_grad(grad, p)
                p = local(p)
            elif grad.is_neg():
                grad = grad.resolve_neg()  # the kernels read the memory as it is
            rows.places.append(i)
            rows.params.append(p)
            rows.grads.append(grad)
            rows.shard_groups.append(groups)
            # What must not change while a plan is in use: where weights lie, which tensors the states are, and where,
            # of which the first answers for all: to ask each takes a sixth of a step of small parameters. (Of a
            # direction it takes nothing, and the plan holds on to the memory of the others.)
            states = [state.get(name) for name in names]
            try:
                address = p.data_ptr()
            except RuntimeError:  # a wrapper's
                check_memory([p], "a parameter")
                raise
            rows.key.append(
                (address, p.dtype, p.shape, p.stride(), *(s is None or place(s) for s in states[:looked_at]))
            )
            rows.states.append(states)
        return [
            Call(group, device, self._plan(index, group, device, rows, only), rows.shard_groups)
            for device, rows in calls.items()
        ]

    def _plan(self, index: int, group: dict[str, Any], device: torch.device, rows: _Rows, only: int | None) -> AnyPlan:
        layout = {name: group[name] for name in LAYOUT}
        cached = self.kept.get((index, device, only))
        if cached is not None and cached.layout == layout and cached.rows.key == rows.key:
            same = zip(cached.rows.states, rows.states, strict=True)
            if all(a is b for ours, theirs in same for a, b in zip(ours, theirs, strict=True)):
                cached.plan.set_grads(rows.grads)
                return cached.plan
        offload = self.optimizer._host_states.offload_to(device) if group["offload"] else None
        parts = [[state if state is None else local(state) for state in states] for states in rows.states]
        for p, states in zip(rows.params, parts, strict=True):
            check_parameter(p, "parameters, also where `p.data` was assigned,")
            shapes = self.optimizer._shapes(p, group)
            for i, (state, expected) in enumerate(zip(states, shapes, strict=True)):
                where = torch.device("cpu") if offload is not None and i < OFFLOADED else device
                if expected is not None and (state is None or not fits(state, *expected, where)):
                    raise ValueError(
                        f"the states of a parameter of shape {tuple(p.shape)} on {device} were made for another shape, "
                        "device or block_size; make a new optimizer, or load a state_dict, after moving parameters"
                    )
            check_memory([p], "a parameter")
            check_writable(p)
            check_memory([t for t in states if t is not None], "a state")
        if offload is not None:
            names = self.optimizer._names(group)
            for i, j, part in self.optimizer._host_states.taken_in(offload, parts):
                p, name, before = group["params"][rows.places[i]], names[j], rows.states[i][j]
                assert name is not None
                self.optimizer.state[p][name] = rows.states[i][j] = now = placed(name, part, p, before.shape)
                parts[i][j] = part
                if j == 0:
                    rows.key[i] = (*rows.key[i][:-1], id(now) if is_distributed(now) else now.data_ptr())
        layout_of_list: dict[str, Any] = {
            "master": group["master"],
            "block_size": group["block_size"],
            "keys": self._keys(index, rows.places),
            "first_blocks": [first_block(group["params"][i], group["block_size"]) for i in rows.places],
            "impl": OPERATION.on_device(device.type).impl,
        }
        lists = [[] if column[0] is None else list(column) for column in zip(*parts, strict=True)]
        plan: AnyPlan
        if self.optimizer._directed is not None:
            whole = [group["params"][i] for i in rows.places]
            plan = self.optimizer._directed(rows.params, rows.grads, parts, whole, **layout_of_list)
        elif offload is None:
            plan = StepPlan(rows.params, rows.grads, lists, **layout_of_list)
        else:
            plan = OffloadedPlan(rows.params, rows.grads, lists, **layout_of_list, offload=offload)
        rows.grads = []  # the plan has them, and lets go of them with the next step's
        self.kept[index, device, only] = _Plan(layout, rows, plan)
        return plan

    def _keys(self, index: int, places: list[int]) -> list[int]:
        """What tells the random bits of parameters apart: their names if the optimizer knows them, else their order."""
        names = self.optimizer.param_groups[index].get("param_names")
        if names:
            return [int.from_bytes(hashlib.sha256(names[i].encode()).digest()[:7], "little") for i in places]
        start = sum(len(group["params"]) for group in self.optimizer.param_groups[:index])
        return [start + i for i in places]
