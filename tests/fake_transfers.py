"""A device's queues on a CPU: what is issued runs in the worst order that the waits allow.

Each queue runs what it was given in order; between queues nothing is promised but the marks that a piece of work waits
for. `order` says which queue is served first whenever it can: with "down" last, copies back are as late as they may be.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from pyeff.optim import offload

QUEUES = ("up", "step", "down")


@dataclass
class Work:
    queue: str
    after: list[Work]
    run: Callable[[], None]
    done: bool = False


class FakeTransfers:
    """ignored: waits (of a queue, for another) that are left out."""

    def __init__(self, order: tuple[str, ...] = QUEUES, ignored: frozenset[tuple[str, str]] = frozenset()) -> None:
        self.order, self.ignored = order, ignored
        self.waiting: dict[str, deque[Work]] = {queue: deque() for queue in QUEUES}
        self.host: list[Tensor] = []
        self.device_bytes = 0
        self.log: list[str] = []

    def run(self, queue: str, after: Iterable[Work], work: Callable[[], None]) -> Work:
        made = Work(queue, [mark for mark in after if (queue, mark.queue) not in self.ignored], work)
        self.waiting[queue].append(made)
        return made

    def _advance(self, goes_on: Callable[[], bool]) -> None:
        while goes_on():
            ready = (
                self.waiting[queue]
                for queue in self.order
                if self.waiting[queue] and all(mark.done for mark in self.waiting[queue][0].after)
            )
            work = next(ready).popleft()  # StopIteration: every queue waits for another
            work.run()
            work.done = True
            self.log.append(work.queue)

    def flush(self) -> None:
        """As if the host waited for the current stream alone."""
        self._advance(lambda: bool(self.waiting["step"]))

    def finish(self) -> None:
        self._advance(lambda: any(self.waiting.values()))

    def device_memory(self, nbytes: int) -> Tensor:
        self.device_bytes += nbytes
        return torch.full((nbytes,), 0xFF, dtype=torch.uint8)

    def host_memory(self, nbytes: int) -> Tensor:
        self.host.append(torch.full((nbytes,), 0xFF, dtype=torch.uint8))
        return self.host[-1]

    def is_host_memory(self, t: Tensor) -> bool:
        return any(t.untyped_storage().data_ptr() == one.data_ptr() for one in self.host)


def pretend(monkeypatch: pytest.MonkeyPatch, *, bucket_bytes: int = 4096, **options: Any) -> list[FakeTransfers]:
    """Let the CPU be a device with memory of its own, in whose buckets no more than so many bytes fit."""
    made: list[FakeTransfers] = []

    def transfers_to(device: torch.device) -> FakeTransfers:
        made.append(FakeTransfers(**options))
        return made[-1]

    step = offload.OffloadedPlan.step

    def flushed(self: offload.OffloadedPlan, *args: Any, **kwargs: Any) -> None:
        step(self, *args, **kwargs)
        self.offload.transfers.flush()  # type: ignore[attr-defined]

    monkeypatch.setattr(offload, "transfers_to", transfers_to)
    monkeypatch.setattr(offload, "BUCKET_BYTES", bucket_bytes)
    monkeypatch.setattr(offload, "_SMALLEST_BUCKET", bucket_bytes)
    monkeypatch.setattr(offload.OffloadedPlan, "step", flushed)
    return made
