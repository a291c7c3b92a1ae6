"""Which states of an optimizer are in the host's memory, and the slots of each device that they are brought to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyeff.ops._optimizer_states import state_shapes
from pyeff.optim import offload
from pyeff.optim.offload import Offload
from pyeff.optim.options import LAYOUT
from pyeff.optim.pieces import OFFLOADED
from pyeff.optim.sharding import local

if TYPE_CHECKING:
    from pyeff.optim.engine import Optimizer8bit


class HostStates:
    """Those of all groups that asked for it; an optimizer has one, and a new one when its groups or states change."""

    def __init__(self, optimizer: Optimizer8bit) -> None:
        self.optimizer = optimizer
        self.devices: dict[torch.device, Offload | None] = {}

    def offload_to(self, device: torch.device) -> Offload | None:
        """The slots on a device, shared by all groups; None where states are in host memory anyway."""
        if device not in self.devices:
            transfers = offload.transfers_to(device)
            self.devices[device] = None if transfers is None else Offload(transfers, self.parameters_on(device))
        return self.devices[device]

    def parameters_on(self, device: torch.device) -> list[tuple[Tensor, list[Tensor | None], int]]:
        """What `Offload` wants to know of the parameters whose states are to be brought to a device."""
        found = []
        for group in self.optimizer.param_groups:
            layout = {name: group[name] for name in LAYOUT}
            for p in map(local, group["params"]):
                if group["offload"] and p.device == device:
                    shapes = state_shapes(p, rule=self.optimizer._rule, **layout)
                    metas = [e and torch.empty(e[0], dtype=e[1], device="meta") for e in shapes]
                    found.append((p.detach(), metas, group["block_size"]))
        return found

    def has(self, p: Tensor, group: dict[str, Any]) -> bool:
        """Whether the large states of this parameter are in host memory and the parameter is not."""
        return group["offload"] and self.offload_to(p.device) is not None

    def taken_in(self, slots: Offload, states: list[list[Tensor | None]]) -> Iterator[tuple[int, int, Tensor]]:
        """Copies of the large states, [parameter][list], that were not in pinned memory, with their place."""
        slots.settle()
        places = [(i, j) for i, own in enumerate(states) for j in range(OFFLOADED) if own[j] is not None]
        before: list[Any] = [states[i][j] for i, j in places]
        for (i, j), old, new in zip(places, before, slots.to_host(before), strict=True):
            if new is not old:
                yield i, j, new

    def settle(self) -> None:
        """Wait until they are those of the last step."""
        for slots in self.devices.values():
            if slots is not None:
                slots.settle()
