"""Options of parameter groups: which there are, when they are looked at again, and which may not change."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyeff.ops._optimizer_states import check_layout
from pyeff.ops.optimizer_step import check_rule

if TYPE_CHECKING:
    from pyeff.optim.engine import Optimizer8bit

# What decides which states there are; a state_dict that differs in one of these cannot be read.
LAYOUT = ("states", "master", "block_size")
# What states were made for: they would have to be made anew.
FIXED = (*LAYOUT, "offload", "code")
OPTIONAL = ("clip_norm", "beta1")  # None is to do without
_SWITCHES = ("skip_nonfinite", "nesterov", "offload")


def check_group(optimizer: Optimizer8bit, group: dict[str, Any], *, read_lr: bool = True) -> None:
    """TypeError or ValueError naming the first option of `group` that this optimizer cannot step with.

    read_lr: wait for an lr that is on a GPU.
    """
    for name in _SWITCHES:
        if name in group and group[name] not in (True, False):
            raise TypeError(f"{name} must be True or False; got {group[name]!r}")
    for name in optimizer._numbers:
        if name not in group or (group[name] is None and name in OPTIONAL):
            continue
        value = group[name]
        if not isinstance(value, (numbers.Real, Tensor)):
            raise TypeError(f"{name} must be a number; got {value!r}")
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{name} must be a number or a tensor of one element; got shape {tuple(value.shape)}")
    if "betas" in group and (not isinstance(group["betas"], (tuple, list)) or len(group["betas"]) != 2):
        raise ValueError(f"betas must be two numbers in [0, 1); got {group['betas']!r}")
    if optimizer._directed is not None and group["offload"]:
        raise ValueError(f"offload is not for {type(optimizer).__name__}: leave it False")
    check_layout(rule=optimizer._rule, **{name: group[name] for name in LAYOUT})
    lr = group["lr"]
    read = read_lr or not (isinstance(lr, Tensor) and lr.is_cuda)
    check_rule(optimizer._rule_of(group, float(lr) if read else 0.0))


@dataclass(frozen=True)
class _Seen:
    group: dict[str, Any]
    lr: Any
    names: tuple[str, ...]
    options: tuple[Any, ...]


class SeenOptions:
    """The options of an optimizer's groups as they were when last looked at.

    Schedulers and users write into `param_groups` between steps; what they wrote is checked before it is used. That
    costs a comparison where nothing but lr changed, and an lr on a GPU is not waited for.
    """

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}

    def note(self, optimizer: Optimizer8bit, index: int) -> None:
        """The options of this group are as they should be."""
        group = optimizer.param_groups[index]
        names = tuple(name for name in optimizer.defaults if name != "lr")
        self._seen[index] = _Seen(group, group["lr"], names, _values(group, names))

    def check(self, optimizer: Optimizer8bit, index: int) -> None:
        """TypeError or ValueError for an option of this group that changed to what cannot be."""
        group = optimizer.param_groups[index]
        seen, lr = self._seen.get(index), group["lr"]
        if seen is None or seen.group is not group:  # groups were taken out, or put in by hand
            optimizer._check_group(group, read_lr=False)
            self.note(optimizer, index)
            return
        if _alike(_values(group, seen.names), seen.options):
            if type(lr) is float:
                if 0.0 <= lr < math.inf:
                    return
            elif lr is seen.lr and isinstance(lr, Tensor) and lr.is_cuda:
                return
        before = dict(zip(seen.names, seen.options, strict=True))
        changed = [name for name in FIXED if group.get(name) != before[name]]
        # Any other beta1 will do; without one there is no first moment.
        changed += [name for name in before if name == "beta1" and (group.get(name) is None) != (before[name] is None)]
        for name in changed:
            if name == "code" or any(optimizer.state.get(p) for p in group["params"]):
                raise ValueError(
                    f"{name} of group {index} was {before[name]!r} when its states were made and cannot become "
                    f"{group.get(name)!r}; put it back, or make a new optimizer"
                )
        optimizer._check_group(group, read_lr=False)
        if changed:
            optimizer._check_parameters(index)
            optimizer._forget_plans()
        self.note(optimizer, index)


def _values(group: dict[str, Any], names: tuple[str, ...]) -> tuple[Any, ...]:
    # A list may be written into.
    return tuple([tuple(value) if type(value := group.get(name)) is list else value for name in names])


def _alike(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    try:
        return a == b
    except RuntimeError:  # of tensors with several elements
        return False
