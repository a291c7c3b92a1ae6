"""A few uniform batches among the selected ones, and what a look at the target's gradient tells of both.

A batch moves the target's loss, to first order and at equal step sizes, by the dot product of its gradient with the
target's. After a selection ``control_share`` of the batches are drawn from the whole pool; the ratio of the mean gains
of selected and control batches is what the selection is worth (`pyeff.governor.control`), whatever else changes in the
run. The target's gradient is taken at the selection and at every check, in two halves, whose sketches also say whether
it points elsewhere by now (detector D3).

The gradients are the plain ones: the optimizer's scaling of single parameters is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyeff.data import DataOrder, label_positions, pack
from pyeff.governor.control import Advantage, advantage, is_control_batch
from pyeff.governor.drift import DriftReading, gradient_drift
from pyeff.ops import Sketch
from pyeff.scoring.language import PACKING_WINDOW
from pyeff.train.evaluate import summed_loss

if TYPE_CHECKING:
    from pyeff.train.job import Job

# Share of the budget that the looks at the target's gradient may take in all. Beside a selection that costs some
# percent this is small, and where it does not suffice there are too few batches to compare anyway.
_MOST = 0.01
_SKETCH_DIM = 1024
# Of either kind before they are compared: with fewer the error of their mean is itself hardly known.
_FEWEST = 4
# Of either kind that are remembered where a comparison cannot be told: older ones speak of another age.
_KEPT = 256


@dataclass(frozen=True)
class _Gain:
    """What one batch did for the target, and at what age of the selection."""

    age: float
    gain: float


@dataclass
class _State:
    active: bool = False
    why: str = "nothing was selected yet"
    selected: list[_Gain] = field(default_factory=list)
    control: list[_Gain] = field(default_factory=list)
    # Sketches of the two halves' mean gradients, when the selection was made and now.
    then: list[list[float]] = field(default_factory=list)
    now: list[list[float]] = field(default_factory=list)


class ControlArm:
    """The control batches of a run and the comparison with the selected ones; idle until a selection is made.

    Memory: the target's gradient in the parameters' type. Cost: one training pass over the samples of the target at
    every check, charged to ``probe``; where all of them would exceed 1 % of the budget the arm stays idle and the
    ``select`` event says so. Its state is in the checkpoint, so a resumed run measures the same.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        config, pool = job.config, job.task.pool
        # Apart from the order of the run itself by a seed that no configuration can name.
        self._order = DataOrder(len(pool), config.seed + 2**32, lengths=pool.lengths)
        target = job.task.target
        self._halves = [
            pack(target, part, max_tokens=job.step_shape.micro_tokens, window=PACKING_WINDOW) if part else []
            for part in (range(0, len(target), 2), range(1, len(target), 2))
        ]
        self._sketch = Sketch(_SKETCH_DIM, seed=config.seed)
        self._direction: dict[str, Tensor] = {}
        self._state = _State()

    @property
    def probe_flops(self) -> int:
        """Of one look at the target's gradient."""
        return sum(self._job.train_flops(batch) for half in self._halves for batch in half)

    @property
    def price(self) -> float:
        """Of the look at the next check, in the budget's unit; 0 while the arm is idle."""
        return self._job.meter.price("probe", flops=self.probe_flops) if self._state.active else 0.0

    @property
    def description(self) -> dict[str, Any]:
        """Whether it measures, and if not why; for the ``select`` event."""
        return {"share": self._job.config.control_share, "active": self._state.active, "why": self._state.why}

    def order_of(self, step: int, selected: DataOrder) -> DataOrder:
        """The order that the batch of a step comes from."""
        return self._order if self._is_control(step) else selected

    def _is_control(self, step: int) -> bool:
        config = self._job.config
        return self._state.active and is_control_batch(step, fraction=config.control_share, seed=config.seed)

    def _looks_price(self, checks_left: int) -> float:
        """Of one look right after a selection made now, and one at every check to come."""
        return self._job.meter.price("probe", flops=self.probe_flops) * (checks_left + 1)

    def cost(self, *, checks_left: int) -> float:
        """What a selection made now would spend on looks, beyond those that the checks to come take anyway."""
        if self.hindrance(checks_left=checks_left):
            return 0.0
        return self._looks_price(checks_left) - self.price * checks_left

    def hindrance(self, *, checks_left: int) -> str:
        """Why a selection made now could not be measured until the end; empty if it can."""
        job = self._job
        price = self._looks_price(checks_left)
        if job.config.control_share == 0:
            return "control_share is 0"
        if not all(self._halves):
            return "the target has one sample alone"
        if price > _MOST * job.meter.budget.amount:
            share = price / job.meter.budget.amount
            return f"the looks at the target's gradient would take {share:.1%} of the budget, more than {_MOST:.0%}"
        return ""

    def selection_made(self, *, checks_left: int) -> None:
        """Begin to compare anew, if what that costs until the end is small."""
        why = self.hindrance(checks_left=checks_left)
        self._state = _State(active=not why, why=why)
        if self._state.active:
            self.look()
            self._state.then = self._state.now

    def look(self) -> DriftReading | None:
        """Take the target's gradient under the present weights; returns the drift since the selection, D3.

        None while the arm is idle, and where a gradient is not finite: the batches until the next look then count
        for nothing.
        """
        if not self._state.active:
            return None
        job = self._job
        answers = [sum(int(label_positions(batch).targets.numel()) for batch in half) for half in self._halves]
        job.model.eval()
        job.optimizer.zero_grad(set_to_none=True)
        sketches: list[Tensor] = []
        for half, count in zip(self._halves, answers, strict=True):
            for batch in half:
                where = label_positions(batch)
                (summed_loss(job.model, batch, where) / count).backward()
                job.meter.charge("probe", flops=job.train_flops(batch), tokens=batch.tokens)
            # The second half's gradients are added to the first's: a sketch is linear.
            sketches.append(self._sketch({name: p.grad for name, p in job.parameters.items() if p.grad is not None}))
        self._direction = {name: p.grad for name, p in job.parameters.items() if p.grad is not None}
        job.optimizer.zero_grad(set_to_none=True)
        job.meter.charge("probe")
        first, both = sketches
        self._state.now = [first.tolist(), (both - first).tolist()]
        if not bool(both.isfinite().all()):
            self._direction, self._state.now = {}, []
        if not self._state.then or not self._state.now:
            return None
        return gradient_drift(_pair(self._state.then), _pair(self._state.now))

    @torch.no_grad()
    def measure(self, step: int, *, age: float) -> None:
        """Note what the gradients of the batch of a step, that now stand in the parameters, do for the target."""
        if not (self._state.active and self._direction):
            return
        dots = [
            torch.dot(p.grad.flatten(), self._direction[name].flatten())
            for name, p in self._job.parameters.items()
            if p.grad is not None and name in self._direction
        ]
        gain = float(torch.stack(dots).sum(dtype=torch.float64))
        if math.isfinite(gain):
            kind = self._state.control if self._is_control(step) else self._state.selected
            kind.append(_Gain(age, gain))
            del kind[:-_KEPT]

    def reading(self) -> Advantage | None:
        """The advantage since the last one that could be told; None where there are too few batches to tell."""
        selected, control = self._state.selected, self._state.control
        if min(len(selected), len(control)) < _FEWEST:
            return None
        age = math.fsum(each.age for each in selected) / len(selected)
        found = advantage([each.gain for each in selected], [each.gain for each in control], age=age)
        if found is not None:
            self._state.selected, self._state.control = [], []
        return found

    def state_dict(self) -> dict[str, Any]:
        """Everything but the direction; JSON-able."""
        return {"order": self._order.state_dict(), **asdict(self._state)}

    def tensors(self) -> dict[str, Tensor]:
        """The direction of the target's gradient, by parameter; empty while the arm is idle."""
        return self._direction

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on where :meth:`state_dict` and :meth:`tensors` were taken.

        Raises ValueError or LookupError for what belongs to another run.
        """
        for name, tensor in tensors.items():
            parameter = self._job.parameters[name]
            if (tensor.shape, tensor.dtype) != (parameter.shape, parameter.dtype):
                raise ValueError(f"control: {name} is {tensor.dtype} {tuple(tensor.shape)}")
        rest = dict(state)
        self._order.load_state_dict(rest.pop("order"))
        gains = {kind: [_Gain(**each) for each in rest[kind]] for kind in ("selected", "control")}
        self._state = _State(**{**rest, **gains})
        self._direction = dict(tensors)


def _pair(sketches: Sequence[Sequence[float]]) -> tuple[Sequence[float], Sequence[float]]:
    first, second = sketches
    return first, second
