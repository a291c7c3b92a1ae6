"""States of other libraries' optimizers, read into ours.

torch.optim: `exp_avg`, `exp_avg_sq` or `momentum_buffer` in the parameter's dtype, and `step`.

bitsandbytes: `state1` and, for Adam, `state2` (v itself); fp32 for small parameters, else uint8 codes of the
parameter's shape with a table `qmap` of 256 values and one `absmax` for each block of the flattened parameter, so that
a value is qmap[code] * absmax[block]. They may lie under one more key, hidden from FSDP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyeff.ops._optimizer_states import check_memory, encode_moment, encode_square, master_of, scale_shape
from pyeff.optim.sharding import as_part, local, part_of
from pyeff.reference.optimizer_step import from_blocks, to_blocks

if TYPE_CHECKING:
    from pyeff.optim.engine import Optimizer8bit

_HIDDEN = "__bnb_optimizer_quant_state__"
# Of torch's optimizers, by the names that ours have for them.
_HYPERPARAMETERS = (
    *("lr", "betas", "eps", "weight_decay", "momentum", "dampening", "nesterov"),
    *("ns_coefficients", "ns_steps", "adjust_lr_fn", "beta2_decay", "d"),
)
_BITSANDBYTES_BLOCKS = (256, 2048)


def converted(optimizer: Optimizer8bit, state_dict: dict[str, Any]) -> dict[str, Any]:
    """`state_dict` as `optimizer` would have written it; its own is returned as it is.

    Raises ValueError where a foreign one cannot be read.
    """
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError("state_dict must be a dict with the keys 'state' and 'param_groups'")
    groups, states = state_dict["param_groups"], state_dict["state"]
    if not isinstance(groups, list) or not all(
        isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups
    ):
        raise ValueError("state_dict: param_groups must be a list of dicts that each have a list of 'params'")
    if not isinstance(states, dict) or not all(isinstance(state, dict) for state in states.values()):
        raise ValueError("state_dict: state must be a dict of dicts, one for each parameter")
    if any("code" in group for group in groups) or not any(_is_foreign(state) for state in states.values()):
        return state_dict
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in optimizer.param_groups]:
        raise ValueError(
            f"state_dict has groups of {[len(group['params']) for group in groups]} parameters, "
            f"this optimizer of {[len(group['params']) for group in optimizer.param_groups]}"
        )
    new_groups, new_states = [], {}
    for i, (theirs, ours) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        new_groups.append(_group(optimizer, theirs, ours, f"state_dict: param_groups[{i}]"))
        for key, p in zip(theirs["params"], ours["params"], strict=True):
            if state := states.get(key):
                new_states[key] = optimizer._converted_state(state, p, new_groups[-1], f"state_dict: state[{key!r}]")
    return {"state": new_states, "param_groups": new_groups}


def _is_foreign(state: Any) -> bool:
    names = {"exp_avg", "momentum_buffer", "row_var", "variance", "state1", _HIDDEN}
    return isinstance(state, dict) and not names.isdisjoint(state)


def _group(optimizer: Optimizer8bit, theirs: dict[str, Any], ours: dict[str, Any], where: str) -> dict[str, Any]:
    for name in ("amsgrad", "maximize"):
        if theirs.get(name):
            raise ValueError(f"{where} has {name}, which {type(optimizer).__name__} has not")
    decoupled = theirs.get("decoupled_weight_decay")
    if decoupled is not None and decoupled == optimizer._coupled and theirs.get("weight_decay"):
        raise ValueError(
            f"{where} has weight decay {'beside' if decoupled else 'in'} the gradient, "
            f"{type(optimizer).__name__} {'in' if decoupled else 'beside'} it"
        )
    if ("ns_steps" in theirs) != ("ns_steps" in ours):
        raise ValueError(f"{where} was written by an optimizer of another rule than {type(optimizer).__name__}'s")
    taken = {name: theirs[name] for name in _HYPERPARAMETERS if name in ours and name in theirs}
    if "momentum" in ours and "momentum" not in theirs and "betas" in theirs:
        taken["momentum"] = theirs["betas"][0]  # bitsandbytes keeps it there
    return {**ours, **taken, "params": theirs["params"]}


def converted_state(
    optimizer: Optimizer8bit, state: dict[str, Any], p: Tensor, group: dict[str, Any], where: str
) -> dict[str, Any]:
    """One parameter's state as `optimizer` has it, of torch's or bitsandbytes' optimizer of its rule."""
    state = {**state, **state.get(_HIDDEN, {})}
    moments = [_moment(state, name, i + 1, p, where) for i, name in enumerate(optimizer._moments)]
    step = state.get("step")
    if step is None and optimizer._rule == "sgd":
        step = 1  # torch's SGD counts nothing; what matters is that this is not the first step
    if not isinstance(step, (int, float, Tensor)) or isinstance(step, bool):
        raise ValueError(f"{where} lacks step; it was not written by an optimizer that is known here")
    steps = float(step)
    new: dict[str, Any] = {"step": torch.tensor(steps, dtype=torch.float64)}
    if optimizer._rule == "adam":
        new["beta_powers"] = torch.tensor([float(beta) ** steps for beta in group["betas"]], dtype=torch.float64)
    for i, (name, moment) in enumerate(zip(optimizer._moments, moments, strict=True)):
        if name == "exp_avg_sq" and (moment < 0).any():
            raise ValueError(f"{where}: {name} must be >= 0 everywhere")
        if group["states"] == "fp32":
            new[name] = as_part(moment, p, p.shape)
        else:
            code, scale = (encode_moment if i == 0 else encode_square)(moment, group["block_size"])
            new[f"{name}_code"] = as_part(code, p, p.shape)
            new[f"{name}_scale"] = as_part(scale, p, scale_shape(p.shape, group["block_size"]))
    if group["master"] in ("ecc8", "fp32"):
        kept = master_of(local(p), group["master"])
        name = "master_error" if group["master"] == "ecc8" else "master"
        new[name] = as_part(kept, p, p.shape) if p.dtype == torch.bfloat16 else kept
    return new


def _moment(state: dict[str, Any], name: str, number: int, p: Tensor, where: str) -> Tensor:
    """This moment in fp32, of the parameter's shape, or this process's part of it if the parameter is split."""
    theirs = name if name in state else f"state{number}"
    value = state.get(theirs)
    if not isinstance(value, Tensor):
        raise ValueError(f"{where} has no {name}; it was written by an optimizer of another rule")
    check_memory([local(value)], f"{where}: {theirs}")
    if value.shape != p.shape:
        raise ValueError(f"{where}: {theirs} must have shape {tuple(p.shape)}; got {tuple(value.shape)}")
    if value.is_floating_point():
        return _part(value.detach(), p, f"{where}: {theirs}").float()
    table, largest = state.get(f"qmap{number}"), state.get(f"absmax{number}")
    if value.dtype != torch.uint8 or not isinstance(table, Tensor) or not isinstance(largest, Tensor):
        raise ValueError(f"{where}: {theirs} must be fp32, or uint8 with qmap{number} and absmax{number}")
    blocks = {-(-p.numel() // size): size for size in _BITSANDBYTES_BLOCKS[::-1]}
    if table.numel() != 256 or largest.numel() not in blocks:
        raise ValueError(
            f"{where}: qmap{number} must have 256 values and absmax{number} one for each block of 256; "
            f"got {table.numel()} and {largest.numel()} for {p.numel()} elements"
        )
    codes = to_blocks(value, blocks[largest.numel()])
    levels = table.float().to(codes.device)[codes.long()] * largest.float().to(codes.device).view(-1, 1)
    return _part(from_blocks(levels, value), p, f"{where}: {theirs}")


def _part(value: Tensor, p: Tensor, where: str) -> Tensor:
    try:
        return part_of(value, p)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from None
