"""A training step as a list of tensors: which are kept for the backward, which gradients appear, what is live when.

A `Tape` is written by walking a model's forward pass (see `pyeff.memory.transformer`) with one `Op` for each autograd
node: what it reads, what it writes, what it saves, and which parameters it gives a gradient. `simulate` then plays the
step as autograd runs it: values die after their last reader unless something saved them, nodes run backwards in the
reverse order of their making, saved tensors die with the node that saved them, gradients are accumulated in place, and
a checkpointed segment keeps its inputs and runs again when its turn comes. Nothing is allocated, no torch is needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class Buffer:
    """One storage, or a view of one (`base`): its size, and whether gradients flow to it."""

    name: str
    nbytes: int
    grad: bool = False
    base: Buffer | None = None

    @property
    def storage(self) -> Buffer:
        """What is really allocated; views of one storage share it."""
        return self if self.base is None else self.base.storage


@dataclass(eq=False)
class Op:
    """One node: `saved` are kept for its backward, `parameters` get a gradient from it (name, bytes).

    `passes` says that its backward hands the gradient on without a copy; `workspace` are bytes its backward needs
    besides the gradients it returns; `keep` are outputs that a checkpoint may keep instead of computing them again;
    `held` are not read, but a variable of a running function still names them; `saves_weight` says that a parameter is
    saved, which costs nothing.
    """

    name: str
    layer: str
    inputs: tuple[Buffer, ...]
    outputs: tuple[Buffer, ...]
    saved: tuple[Buffer, ...] = ()
    parameters: tuple[tuple[str, int], ...] = ()
    passes: bool = False
    workspace: int = 0
    forward_workspace: int = 0
    keep: tuple[Buffer, ...] = ()
    held: tuple[Buffer, ...] = ()
    saves_weight: bool = False

    @property
    def asks(self) -> bool:
        """Whether its backward asks for something saved, so that a checkpointed segment must have run again by then."""
        return bool(self.saved) or self.saves_weight


@dataclass(eq=False)
class Segment:
    """Consecutive nodes; a checkpointed one keeps `inputs`, and with `keep` the outputs its nodes offer to keep.

    `compressed` says which of `inputs` are kept as something smaller, made before the nodes run and expanded before
    they run again. With `offload` all that is kept leaves the device while the next segment runs, and comes back while
    the one after it runs again.
    """

    ops: list[Op] = field(default_factory=list)
    checkpoint: bool = False
    inputs: tuple[Buffer, ...] = ()
    keep: bool = False
    compressed: dict[Buffer, Buffer] = field(default_factory=dict)
    offload: bool = False

    def kept(self) -> list[Buffer]:
        """What a checkpointed segment holds between its forward and its backward."""
        inputs = [self.compressed.get(b, b) for b in self.inputs]
        outputs = [b for op in self.ops for b in op.keep] if self.keep else []
        return [b.storage for b in (*inputs, *outputs)]


class Tape:
    """Records nodes in the order of the forward pass."""

    def __init__(self) -> None:
        self.segments: list[Segment] = [Segment()]
        self.layer = "model"
        self.leaves: list[Buffer] = []  # made by an operation, but held by autograd as something to give a gradient to

    def begin(
        self,
        layer: str,
        *,
        checkpoint: bool = False,
        inputs: Sequence[Buffer] = (),
        keep: bool = False,
        compressed: Mapping[Buffer, Buffer] | None = None,
        offload: bool = False,
    ) -> None:
        """What follows belongs to `layer`."""
        self.layer = layer
        self.segments.append(
            Segment(
                checkpoint=checkpoint,
                inputs=tuple(inputs),
                keep=keep,
                compressed=dict(compressed or {}),
                offload=offload,
            )
        )

    def op(
        self,
        name: str,
        inputs: Sequence[Buffer],
        outputs: Sequence[Buffer],
        *,
        saved: Iterable[Buffer] = (),
        parameters: Iterable[tuple[str, int]] = (),
        passes: bool = False,
        workspace: int = 0,
        forward_workspace: int = 0,
        keep: Sequence[Buffer] = (),
        held: Sequence[Buffer] = (),
        saves_weight: bool = False,
    ) -> Buffer:
        """Append a node and return its first output; without anything to differentiate it saves nothing."""
        parameters = tuple(parameters)
        differentiated = bool(parameters) or any(b.grad for b in inputs)
        for output in outputs:
            output.grad = differentiated
        self.segments[-1].ops.append(
            Op(
                name,
                self.layer,
                tuple(inputs),
                tuple(outputs),
                tuple(saved) if differentiated else (),
                parameters,
                passes,
                workspace if differentiated else 0,
                forward_workspace,
                tuple(keep),  # attention below every adapter is not run again either
                tuple(held),
                saves_weight and any(b.grad for b in inputs),
            )
        )
        return outputs[0]


@dataclass(frozen=True)
class Saved:
    """A storage kept from the forward to the backward."""

    layer: str
    name: str
    nbytes: int


@dataclass(frozen=True)
class Moment:
    """What is live besides parameters and optimizer states at one moment, in bytes."""

    phase: str
    activations: int
    gradients: int
    working: int

    @property
    def total(self) -> int:
        """Sum of the three."""
        return self.activations + self.gradients + self.working


@dataclass(frozen=True)
class Simulation:
    """A played step: what is saved at the end of the forward, that moment, and the fullest moment of each phase.

    `phases` are "forward", "head backward", "backward" in this order; `gradients` are the bytes of all parameter
    gradients after the backward.
    """

    saved: tuple[Saved, ...]
    forward_end: Moment
    phases: tuple[Moment, ...]
    gradients: int

    @property
    def saved_bytes(self) -> int:
        """Bytes kept for the backward."""
        return sum(item.nbytes for item in self.saved)

    def by_layer(self) -> dict[str, int]:
        """Saved bytes of each layer, in the order of the forward."""
        total: Counter[str] = Counter()
        for item in self.saved:
            total[item.layer] += item.nbytes
        return dict(total)


def simulate(
    tape: Tape, *, head: str = "head", gradients_held: bool = False, gradients_released: bool = False
) -> Simulation:
    """Play one micro-batch's forward and backward.

    head: the layer whose backward is reported as a phase of its own. gradients_held: parameters have a gradient
    already (gradient accumulation), so that every new one is live beside the sum it is added to. gradients_released:
    a gradient is used and freed when the last node that adds to it is done.
    """
    return _Player(tape, head, gradients_held, gradients_released).play()


class _Gradient:
    """The storage of a gradient, counted by the nodes that wait for it."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.users = 1


class _Player:
    def __init__(self, tape: Tape, head: str, gradients_held: bool, gradients_released: bool) -> None:
        self.segments = [segment for segment in tape.segments if segment.ops]
        self.ops = [op for segment in self.segments for op in segment.ops]
        self.leaves = tape.leaves
        self.head = head
        self.alive: set[Buffer] = set()
        self.holds: Counter[Buffer] = Counter()  # by nodes that saved a storage, checkpoints and the caller
        self.activations = self.gradients = self.working = 0
        self.phase = "forward"
        self.fullest: dict[str, Moment] = {}
        self.incoming: dict[Buffer, _Gradient] = {}
        self.parameters: dict[str, int] = {}
        self.returned: list[Segment] = []
        self.released = gradients_released
        self.uses = Counter(name for op in self.ops for name, _ in op.parameters)
        if gradients_held:
            for op in self.ops:
                self.parameters.update(op.parameters)
            self.gradients = sum(self.parameters.values())

    def play(self) -> Simulation:
        made = {b.storage for op in self.ops for b in op.outputs}
        for op in self.ops:
            for b in (*op.inputs, *op.saved):
                if b.storage not in made and b.storage not in self.alive:  # token ids: the caller holds them
                    self._allocate(b.storage)
                    self.holds[b.storage] += 1
        for b in self.leaves:
            self.holds[b.storage] += 1
        saved: dict[Buffer, Saved] = {}
        last = _last_use(self.ops)
        leaving: list[Buffer] = []
        for segment in self.segments:
            if segment.checkpoint:
                for small in segment.compressed.values():
                    self._allocate(small)
                for storage in segment.kept():
                    if not segment.offload:
                        saved.setdefault(storage, Saved(segment.ops[0].layer, storage.name, storage.nbytes))
                    self.holds[storage] += 1
            for op in segment.ops:
                self._forward(op, last, save=not segment.checkpoint)
                if not segment.checkpoint:
                    for b in op.saved:
                        saved.setdefault(b.storage, Saved(op.layer, b.storage.name, b.storage.nbytes))
            self._leave_device(leaving)
            leaving = segment.kept() if segment.offload else []
        self._leave_device(leaving)
        end = self._moment("forward end")
        for i, segment in reversed(list(enumerate(self.segments))):
            self.phase = "head backward" if segment.ops[0].layer == self.head else "backward"
            done = segment.ops
            if segment.checkpoint:
                # Nodes after the last saved tensor need nothing: they run before the first that asks for one.
                needed = 1 + max((i for i, op in enumerate(segment.ops) if op.asks), default=-1)
                for op in reversed(segment.ops[needed:]):
                    self._backward(op)
                done = segment.ops[:needed]
                last = _last_use(segment.ops)
                for moved in self.segments[max(0, i - 1) : i + 1]:
                    if moved.offload:
                        self._return(moved)
                # The function that runs again names its inputs until it ends.
                for b in segment.compressed:
                    self._allocate(b.storage)
                    self.holds[b.storage] += 1
                for op in done:
                    self._forward(op, last, save=True, last_saver=op is done[-1])
                for b in segment.compressed:
                    self._release(b.storage)
                # What the nodes left out would have read lives until the recomputation is broken off.
                for storage in {b.storage for op in done for b in op.outputs}:
                    if self.holds[storage] == 0:
                        self._free(storage)
            for op in reversed(done):
                self._backward(op)
            if segment.checkpoint:
                for storage in segment.kept():
                    self._release(storage)
        order = ("forward", "head backward", "backward")
        return Simulation(
            tuple(saved.values()),
            end,
            tuple(self.fullest[phase] for phase in order if phase in self.fullest),
            sum(self.parameters.values()),
        )

    def _forward(self, op: Op, last: dict[Buffer, int], *, save: bool, last_saver: bool = False) -> None:
        # Inputs are saved before a node computes: a recomputation that waits for them ends there.
        if not last_saver or {b.storage for b in op.saved} & {b.storage for b in op.outputs}:
            for b in op.outputs:
                self._allocate(b.storage)
            self._mark(op.forward_workspace)
        if save:
            for storage in {b.storage for b in op.saved}:
                self.holds[storage] += 1
        for storage in {b.storage for b in (*op.inputs, *op.outputs, *op.held)}:
            if last[storage] == id(op) and self.holds[storage] == 0:
                self._free(storage)

    def _backward(self, op: Op) -> None:
        arrived = [self.incoming.pop(b) for b in op.outputs if b in self.incoming]
        if arrived or op is self.ops[-1]:
            targets = list(dict.fromkeys(b for b in op.inputs if b.grad))
            if op.passes and arrived:
                for b in targets:
                    arrived[0].users += 1
                    self._accumulate(b, arrived[0])
            else:
                found = [(b, _Gradient(b.nbytes)) for b in targets]
                self.working += sum(gradient.nbytes for _, gradient in found)
                summed = 0
                for name, nbytes in op.parameters:
                    if name in self.parameters:
                        summed += nbytes
                    else:
                        self.parameters[name] = nbytes
                        self.gradients += nbytes
                self._mark(op.workspace + summed)
                for name, nbytes in op.parameters:
                    self.uses[name] -= 1
                    if self.released and self.uses[name] == 0:
                        self.gradients -= nbytes
                for b, gradient in found:
                    self._accumulate(b, gradient)
        for gradient in arrived:
            self._leave(gradient)
        for storage in {b.storage for b in op.saved}:
            self._release(storage)

    def _accumulate(self, b: Buffer, new: _Gradient) -> None:
        old = self.incoming.get(b)
        if old is None:
            self.incoming[b] = new
            return
        if old.users > 1:  # somebody else still reads it: the sum needs a storage of its own
            total = _Gradient(b.nbytes)
            self.working += total.nbytes
            self._mark(0)
            self._leave(old)
            self.incoming[b] = total
        self._leave(new)

    def _leave(self, gradient: _Gradient) -> None:
        gradient.users -= 1
        if gradient.users == 0:
            self.working -= gradient.nbytes

    def _allocate(self, storage: Buffer) -> None:
        if storage not in self.alive:
            self.alive.add(storage)
            self.activations += storage.nbytes

    def _free(self, storage: Buffer) -> None:
        if storage in self.alive:
            self.alive.remove(storage)
            self.activations -= storage.nbytes

    def _release(self, storage: Buffer) -> None:
        self.holds[storage] -= 1
        if self.holds[storage] == 0:
            self._free(storage)

    def _leave_device(self, storages: Iterable[Buffer]) -> None:
        for storage in storages:
            self._release(storage)

    def _return(self, segment: Segment) -> None:
        if segment not in self.returned:
            self.returned.append(segment)
            for storage in segment.kept():
                self._allocate(storage)
                self.holds[storage] += 1

    def _moment(self, phase: str, workspace: int = 0) -> Moment:
        return Moment(phase, self.activations, self.gradients, self.working + workspace)

    def _mark(self, workspace: int) -> None:
        now = self._moment(self.phase, workspace)
        if self.phase not in self.fullest or now.total > self.fullest[self.phase].total:
            self.fullest[self.phase] = now


def _last_use(ops: Sequence[Op]) -> dict[Buffer, int]:
    return {b.storage: id(op) for op in ops for b in (*op.inputs, *op.outputs, *op.held)}
