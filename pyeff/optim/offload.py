"""States in the host's memory, on the device only while a step needs them.

Parameters are stepped in buckets of `BUCKET_BYTES` of states. Two slots on the device take turns: while the bucket in
one is stepped and goes back, the next comes into the other, so that both directions of the bus are busy. There are
three queues, which each work in the order of issue and beside each other:

    up      copy a bucket to its slot     after the slot's last bucket went back, and after these states did
    step    the kernel                    after its bucket came up
    down    copy it back                  after its step

What waits for what is said once, in `OffloadedPlan.step`, in terms of marks. A `Transfers` makes streams and events of
them on a GPU, and a test whatever keeps to these waits and to nothing else. Nothing waits on the host before someone
looks at the states: `Offload.settle`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pyeff.ops._optimizer_plan import StepPlan
from pyeff.optim.pieces import OFFLOADED, Piece, Span, aligned, blocks_before, filled, laid_out, pieces_of
from pyeff.reference.optimizer_step import OptimizerRule

# At 50 GB/s 0.7 ms, long beside the start of a copy and short beside a step; two slots are then 64 MiB.
BUCKET_BYTES = 32 * 2**20
# Slots are not to be larger than what they save.
_BUCKETS, _SMALLEST_BUCKET = 8, 2**16
# Pinned memory is handed out in powers of two, so that states of any size share pieces of this one.
_PINNED_BYTES = 2**30

Mark = Any
"""When something issued is done, as a `Transfers` tells it."""


class Transfers(Protocol):
    """Three queues and two kinds of memory."""

    def run(self, queue: str, after: Iterable[Mark], work: Callable[[], None]) -> Mark:
        """Issue `work` to "up", "step" or "down"; it starts when what was issued there and all of `after` is done."""

    def finish(self) -> None:
        """Wait until everything issued to "up" and "down" is done."""

    def device_memory(self, nbytes: int) -> Tensor:
        """Bytes on the device that all queues may use."""

    def host_memory(self, nbytes: int) -> Tensor:
        """Bytes of the host that copies need not wait for."""

    def is_host_memory(self, t: Tensor) -> bool:
        """Whether this lies in such memory."""


class CudaTransfers:
    """Streams of a GPU; "step" is the stream that is current."""

    # What each does is said at `Transfers`.

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.streams = {queue: torch.cuda.Stream(device) for queue in ("up", "down")}

    def run(self, queue: str, after: Iterable[Mark], work: Callable[[], None]) -> Mark:  # noqa: D102
        stream = self.streams.get(queue) or torch.cuda.current_stream(self.device)
        for mark in after:
            stream.wait_event(mark)
        with torch.cuda.stream(stream):
            work()
        return stream.record_event()

    def finish(self) -> None:  # noqa: D102
        for stream in self.streams.values():
            stream.synchronize()

    def device_memory(self, nbytes: int) -> Tensor:  # noqa: D102
        made = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        for stream in self.streams.values():
            # Kernels in the queue may still use this memory; and once it is given back, copies may.
            stream.wait_stream(torch.cuda.current_stream(self.device))
            made.record_stream(stream)
        return made

    def host_memory(self, nbytes: int) -> Tensor:  # noqa: D102
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def is_host_memory(self, t: Tensor) -> bool:  # noqa: D102
        return t.is_pinned()


def transfers_to(device: torch.device) -> Transfers | None:
    """How states travel to this device; None where they are in the host's memory anyway."""
    return CudaTransfers(device) if device.type == "cuda" else None


@dataclass
class Slot:
    """Device memory for one bucket, and when it may be written again."""

    memory: Tensor
    free: Mark | None = None


def bucket_bytes(total: int) -> int:
    """How large buckets are for states of so many bytes."""
    return max(_SMALLEST_BUCKET, min(BUCKET_BYTES, total // _BUCKETS))


class Offload:
    """The slots of one device, and when states were last written; shared by all plans of an optimizer."""

    def __init__(self, transfers: Transfers, parameters: Sequence[tuple[Tensor, Sequence[Tensor | None], int]]) -> None:
        """`parameters`: each with its states in the order of `OptimizerStates.lists`, meta ones do, and block size."""
        self.transfers = transfers
        total = sum(aligned(t.nbytes) for _, states, _ in parameters for t in states[:OFFLOADED] if t is not None)
        self.bucket_bytes = bucket_bytes(total)
        pieces = (
            piece.nbytes
            for p, states, block_size in parameters
            for piece in pieces_of(0, p, states, block_size, self.bucket_bytes)
        )
        size = max(min(self.bucket_bytes, total), max(pieces, default=0))
        self.slots = [Slot(transfers.device_memory(size)) for _ in range(2)]
        self.written: dict[int, Mark] = {}
        self._taken = 0

    def next_slot(self) -> Slot:
        """The slots in turn."""
        self._taken += 1
        return self.slots[self._taken % 2]

    def settle(self) -> None:
        """Wait until the states in host memory are those of the last step."""
        self.transfers.finish()

    def to_host(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Copies of these in host memory that need not wait; what lies there already is taken as it is.

        They lie one behind the other, so that small ones travel together.
        """
        made = []
        left = sum(aligned(t.nbytes) for t in states)
        memory, at = torch.empty(0, dtype=torch.uint8, device="cpu"), 0
        for t in states:
            size = aligned(t.nbytes)
            if t.nbytes == 0 or (t.device.type == "cpu" and self.transfers.is_host_memory(t)):
                made.append(t.cpu())
            else:
                if at + size > memory.numel():
                    memory, at = self.transfers.host_memory(max(size, min(left, _PINNED_BYTES))), 0
                made.append(memory[at : at + t.nbytes].view(t.dtype).view(t.shape).copy_(t))
                at += size
            left -= size
        return made


@dataclass
class _Bucket:
    pieces: list[Piece]
    slot: Slot
    spans: list[Span]
    plan: StepPlan
    keys: list[int]  # of the states in `Offload.written`

    def copy(self, *, up: bool) -> None:
        for span in self.spans:
            there = self.slot.memory[span.at : span.stop]
            target, source = (there, span.host) if up else (span.host, there)
            target.copy_(source, non_blocking=True)


class OffloadedPlan:
    """A `StepPlan` in buckets, whose states are in the host's memory between steps."""

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        lists: Sequence[Sequence[Tensor]],
        *,
        master: str,
        block_size: int,
        keys: Sequence[int],
        first_blocks: Sequence[int],
        impl: str,
        offload: Offload,
    ) -> None:
        self.grads, self.offload = list(grads), offload
        self._counts: list[tuple[Tensor, Tensor]] = []  # (of a further piece, of its parameter)
        self._buckets: list[_Bucket] = []
        params = [p.detach() for p in params]
        pieces = [
            piece
            for i, p in enumerate(params)
            for piece in pieces_of(i, p, [one[i] if one else None for one in lists], block_size, offload.bucket_bytes)
        ]
        for some in filled(pieces, offload.bucket_bytes):
            slot = offload.next_slot()
            spans, device_lists = laid_out(some, slot.memory)
            columns: list[list[Tensor]] = []
            for one in lists[:OFFLOADED]:
                columns.append(device_lists.pop(0) if one else [])
            for one in lists[OFFLOADED:]:
                columns.append([self._count(one[piece.place], piece) for piece in some] if one else [])
            plan = StepPlan(
                [piece.of(params[piece.place]) for piece in some],
                [piece.of(self.grads[piece.place]) for piece in some],
                columns,
                master=master,
                block_size=block_size,
                keys=[keys[piece.place] for piece in some],
                first_blocks=[
                    first_blocks[piece.place] + blocks_before(params[piece.place].shape, piece.start, block_size)
                    for piece in some
                ],
                impl=impl,
            )
            self._buckets.append(_Bucket(some, slot, spans, plan, sorted({keys[piece.place] for piece in some})))

    def _count(self, own: Tensor, piece: Piece) -> Tensor:
        """Every piece advances a count of its own, from the same start."""
        if piece.start == 0:
            return own
        copied = torch.empty_like(own)
        self._counts.append((copied, own))
        return copied

    def set_grads(self, grads: Sequence[Tensor]) -> None:
        """Take the gradients of the next step."""
        self.grads = list(grads)
        for bucket in self._buckets:
            bucket.plan.set_grads([piece.of(self.grads[piece.place]) for piece in bucket.pieces])

    def release_grads(self) -> None:
        """Let go of the gradients."""
        self.grads = []
        for bucket in self._buckets:
            bucket.plan.release_grads()

    def step(
        self,
        rule: OptimizerRule,
        *,
        norm: Tensor | None = None,
        lr: Tensor | None = None,
        skipped: Tensor | None = None,
    ) -> None:
        """Take a step; see `optimizer_step`. Returns when it is issued."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise ValueError("a step with offload=True cannot be captured in a CUDA graph; capture one without it")
        run, written = self.offload.transfers.run, self.offload.written

        def bring(bucket: _Bucket) -> Mark:
            marks = [bucket.slot.free, *(written.get(key) for key in bucket.keys)]
            after = list({id(mark): mark for mark in marks if mark is not None}.values())
            return run("up", after, lambda: bucket.copy(up=True))

        if self._counts:
            run("step", (), self._copy_counts)
        came = bring(self._buckets[0]) if self._buckets else None
        for i, bucket in enumerate(self._buckets):
            there = came
            if i + 1 < len(self._buckets):
                came = bring(self._buckets[i + 1])
            # All pieces are skipped together; they are one step.
            counted = skipped if i == 0 else None
            stepped = run("step", (there,), _stepping(bucket.plan, rule, norm, lr, counted))
            bucket.slot.free = run("down", (stepped,), _returning(bucket))
            for key in bucket.keys:
                written[key] = bucket.slot.free

    def _copy_counts(self) -> None:
        for copied, own in self._counts:
            copied.copy_(own)


def _stepping(
    plan: StepPlan, rule: OptimizerRule, norm: Tensor | None, lr: Tensor | None, skipped: Tensor | None
) -> Callable[[], None]:
    return lambda: plan.step(rule, norm=norm, lr=lr, skipped=skipped)


def _returning(bucket: _Bucket) -> Callable[[], None]:
    return lambda: bucket.copy(up=False)
