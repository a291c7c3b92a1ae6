"""Steps along a direction that torch computes between two calls of the kernel: of the momentum, then of the weight.

The kernel has what is delicate: states in 8 bits, clipping, weights in bf16 with their masters and random bits, steps
skipped on the device. It is SGD that is asked for, twice. A weight of zeros in fp32, stepped with lr = -1, is the new
momentum before it is coded. And SGD without momentum takes any direction d as a gradient,
p <- p - lr (d + weight_decay p), which is a step of d after decoupled decay.

Parameters are stepped one by one, so that one direction is in memory at a time.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from pyeff.ops._optimizer_plan import StepPlan
from pyeff.ops._optimizer_states import check_memory
from pyeff.reference.optimizer_step import OptimizerRule

# Of a parameter's states, in the order of `OptimizerStates.lists`.
MOMENT, SCALE, SECOND, SECOND_SCALE, MASTER, STEP, LAST = range(7)


class DirectionPlan(ABC):
    """Parameters of a group on a device that step along directions of their own making; stands for a `StepPlan`."""

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[Sequence[Tensor | None]],
        whole: Sequence[Tensor],
        *,
        master: str,
        block_size: int,
        keys: Sequence[int],
        first_blocks: Sequence[int],
        impl: str,
    ) -> None:
        """states: [parameter][kind]. whole: the parameters as the optimizer has them, of which `params` are parts."""
        self.params, self.states, self.whole = list(params), list(states), list(whole)
        self.master, self.block_size, self.impl = master, block_size, impl
        self.keys, self.first_blocks = list(keys), list(first_blocks)
        self.set_grads(grads)

    def set_grads(self, grads: Sequence[Tensor]) -> None:
        """Take the gradients of the next step; ValueError for one whose memory was freed or never there."""
        check_memory(grads, "a gradient")
        self.grads = list(grads)

    def release_grads(self) -> None:
        """Let go of the gradients."""
        self.grads = []

    @abstractmethod
    def direction(self, i: int, rule: OptimizerRule, lr: float | Tensor, norm: Tensor | None) -> Tensor:
        """What parameter i is to be moved by, over lr: fp32 of its shape. Changes its moments, unless norm is NaN."""

    def step(
        self,
        rule: OptimizerRule,
        *,
        norm: Tensor | None = None,
        lr: Tensor | None = None,
        skipped: Tensor | None = None,
    ) -> None:
        """Take a step; see `optimizer_step`."""
        for i, p in enumerate(self.params):
            with torch.autocast(p.device.type, enabled=False):  # the kernel takes the address of fp32 numbers
                d = self.direction(i, rule, rule.lr if lr is None else lr, norm).contiguous()
            # The momentum that SGD would keep is the direction itself, in its own memory.
            along = dataclasses.replace(
                rule, beta1=0.0, dampening=0.0, nesterov=False, coded=False, coupled=True, clip_norm=math.inf
            )
            self._plan(i, p, d, d, None).step(along, norm=norm, lr=lr, skipped=skipped if i == 0 else None)

    def gradient(self, i: int, rule: OptimizerRule, norm: Tensor | None) -> Tensor:
        """Gradient i in fp32, clipped as the kernel clips."""
        g = self.grads[i].float().contiguous()  # sums do not depend on the layout in memory
        if rule.clip_norm == math.inf or norm is None:
            return g
        return g * (rule.clip_norm / (norm + 1e-6)).clamp_max(1.0).float()

    def momentum(self, i: int, g: Tensor, rule: OptimizerRule, norm: Tensor | None) -> Tensor:
        """beta1 m + (1 - beta1) g, fp32 as it is before it is coded, which becomes the momentum of parameter i."""
        into = torch.zeros(g.shape, dtype=torch.float32, device=g.device)
        averaged = dataclasses.replace(
            rule, lr=-1.0, weight_decay=0.0, dampening=rule.beta1, nesterov=False, clip_norm=math.inf
        )
        moment = self.states[i][MOMENT]
        assert moment is not None
        self._plan(i, into, g, moment, self.states[i][SCALE]).step(averaged, norm=norm)
        return into

    def _plan(self, i: int, p: Tensor, g: Tensor, moment: Tensor, scale: Tensor | None) -> StepPlan:
        weight = p is self.params[i]
        master, step = self.states[i][MASTER], self.states[i][STEP]
        assert step is not None
        # SGD takes a gradient for the momentum in its first step, which is not to be; only the weight's are counted.
        steps = step if weight else step + 1.0
        masters = [master] if weight and master is not None else []
        return StepPlan(
            [p],
            [g],
            [[moment], [] if scale is None else [scale], [], [], masters, [steps], []],
            master=self.master if weight else "none",
            block_size=self.block_size,
            keys=[self.keys[i]],
            first_blocks=[self.first_blocks[i]],
            impl=self.impl,
        )
