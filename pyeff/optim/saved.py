"""Going on from a state_dict: what it must be, and where its tensors go."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyeff.ops._optimizer_states import check_memory
from pyeff.optim.convert import converted
from pyeff.optim.options import LAYOUT
from pyeff.optim.pieces import OFFLOADED
from pyeff.optim.sharding import is_distributed, is_split, part_of, placed

if TYPE_CHECKING:
    from pyeff.optim.engine import Optimizer8bit


@dataclass(frozen=True)
class _Kept:
    tensor: Tensor


def restore(optimizer: Optimizer8bit, state_dict: dict[str, Any], load: Callable[[dict[str, Any]], None]) -> None:
    """See `Optimizer8bit.load_state_dict`; `load` is torch's."""
    state_dict = converted(optimizer, state_dict)
    check_state_dict(optimizer, state_dict)
    optimizer._forget_plans()
    # torch casts floating-point states to the dtype of their parameter, and would cast bytes too; what is wrapped
    # it passes on untouched.
    kept = {
        key: {name: _Kept(value) if isinstance(value, Tensor) else value for name, value in state.items()}
        for key, state in state_dict["state"].items()
    }
    # Where states live is this optimizer's matter.
    groups = [
        {**theirs, "offload": ours["offload"]}
        for theirs, ours in zip(state_dict["param_groups"], optimizer.param_groups, strict=True)
    ]
    load({**state_dict, "state": kept, "param_groups": groups})
    on_host = {
        p: optimizer._names(group)[:OFFLOADED]
        for group in optimizer.param_groups
        for p in group["params"]
        if optimizer._host_states.has(p, group)
    }
    for p, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, _Kept):
                part = part_of(value.tensor, p) if is_split(name, p) else value.tensor
                home = torch.device("cpu") if name in on_host.get(p, ()) else p.device
                part = part.detach().to(home, copy=True).contiguous()
                state[name] = placed(name, part, p, value.tensor.shape)
    # One for all groups; each counted alone once, and a step that one of them missed is not to be found any more.
    skipped = max((int(group["skipped_steps"]) for group in optimizer.param_groups), default=0)
    if optimizer.param_groups:
        device = device_of(optimizer.param_groups[0])
        optimizer._count_skipped_in(torch.tensor(skipped, dtype=torch.int64, device=device))
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = tuple(group["betas"])


def device_of(group: dict[str, Any]) -> torch.device:
    """Where a group counts its skipped steps."""
    return group["params"][0].device if group["params"] else torch.device("cpu")


def check_state_dict(optimizer: Optimizer8bit, state_dict: dict[str, Any]) -> None:
    """ValueError naming the first thing in `state_dict` that this optimizer cannot go on from; nothing is changed."""
    saved = state_dict["param_groups"]
    if len(saved) != len(optimizer.param_groups):
        raise ValueError(f"state_dict has {len(saved)} param_groups, this optimizer has {len(optimizer.param_groups)}")
    known = set()
    for i, (theirs, ours) in enumerate(zip(saved, optimizer.param_groups, strict=True)):
        where = f"state_dict: param_groups[{i}]"
        if len(theirs["params"]) != len(ours["params"]):
            raise ValueError(
                f"{where} has {len(theirs['params'])} parameters, this optimizer's has {len(ours['params'])}"
            )
        named, names = theirs.get("param_names"), ours.get("param_names")
        if named and names and named != names and sorted(named) == sorted(names):
            first = next(j for j, (a, b) in enumerate(zip(named, names, strict=True)) if a != b)
            raise ValueError(
                f"{where} has the same parameters in another order: place {first} is {named[first]!r} there and "
                f"{names[first]!r} here; build the optimizer with its order"
            )
        if theirs.get("code") != ours["code"]:
            raise ValueError(
                f"{where} is in code {theirs.get('code')!r}; "
                f"this {type(optimizer).__name__} reads {ours['code']!r} only"
            )
        for name in LAYOUT:
            if theirs.get(name) != ours[name]:
                raise ValueError(
                    f"{where} has {name} {theirs.get(name)}, this optimizer has {ours[name]}; "
                    f"build it with {name}={theirs.get(name)!r}"
                )
        for name in (*optimizer.defaults, "skipped_steps"):  # what schedulers write beside them may be missing
            if name not in theirs and name != "offload":
                raise ValueError(f"{where} lacks {name}; it was not written by {type(optimizer).__name__}")
        try:
            optimizer._check_group({**theirs, "offload": ours["offload"]})
            _check_count(theirs["skipped_steps"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None
        for key, p in zip(theirs["params"], ours["params"], strict=True):
            known.add(key)
            if state := state_dict["state"].get(key):
                _check_state(optimizer, state, p, ours, f"state_dict: state[{key!r}]")
    if unknown := [key for key in state_dict["state"] if key not in known]:
        raise ValueError(f"state_dict: state[{unknown[0]!r}] belongs to no parameter of its param_groups")


def _check_state(optimizer: Optimizer8bit, state: dict[str, Any], p: Tensor, group: dict[str, Any], where: str) -> None:
    for name, expected in zip(optimizer._names(group), optimizer._shapes(p, group), strict=True):
        if name is None or expected is None:
            continue
        if name not in state:
            raise ValueError(f"{where} lacks {name}; it was not written by {type(optimizer).__name__}")
        shape, dtype = expected
        value = state[name]
        if not isinstance(value, Tensor) or value.shape != torch.Size(shape) or value.dtype != dtype:
            came = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{where}: {name} must be {dtype} {tuple(shape)} for this parameter; got {came}")
        try:
            part = part_of(value, p) if is_split(name, p) or is_distributed(value) else value
        except ValueError as error:
            raise ValueError(f"{where}: {name} {error}") from None
        check_memory([part], f"{where}: {name}")
        if problem := _nonsense(name, part):
            raise ValueError(f"{where}: {name} must {problem}")


def _check_count(skipped: Any) -> None:
    """ValueError unless this counts steps."""
    count = skipped.item() if isinstance(skipped, Tensor) and skipped.numel() == 1 else skipped
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"skipped_steps must be a whole number >= 0; got {skipped!r}")


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
    elif name in ("exp_avg_sq", "row_var", "col_var", "variance") and (value < 0).any():
        return "be >= 0 everywhere"
    return None
