"""What everything in a run costs: FLOPs by formula before the work, seconds by the clock after it.

Whether the next step fits is decided by formulas in the budget's unit. For FLOP and token budgets they are
exact and read no clock; for a time budget FLOPs are turned into seconds at the rate measured so far.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from pathlib import Path

from pyeff._files import write_text_atomic
from pyeff.governor import Budget, Cost, Ledger

_LEARNING = ("train", "cooldown")


class Meter:
    """A budget, the ledger of what was spent, and the clock that charges every second exactly once.

    ``forward`` and ``train`` are the FLOPs of a forward pass and of a training step as functions of
    tokens, attention pairs and positions with logits.
    """

    def __init__(self, budget: Budget, *, forward: Cost, train: Cost, heartbeat: Path) -> None:
        self.budget = budget
        self.forward = forward
        self.train = train
        self.ledger = Ledger()
        self._heartbeat = heartbeat
        self._mark = time.monotonic()

    @property
    def unit(self) -> str:
        """The budget's unit."""
        return self.budget.unit

    @property
    def spent(self) -> float:
        """Spent so far, in the budget's unit."""
        return self.ledger.spent(self.unit)

    def start_clock(self) -> None:
        """Count seconds from now on: what came before (loading) belongs to no field."""
        self._mark = time.monotonic()

    def charge(self, field: str, *, flops: int = 0, tokens: int = 0) -> None:
        """Charge work just done, with the seconds since the last charge."""
        now = time.monotonic()
        self.ledger.charge(field, flops=flops, seconds=max(now - self._mark, 0.0), tokens=tokens)
        self._mark = now
        self._beat()

    def charge_parts(self, **parts: tuple[int, int]) -> None:
        """Charge FLOPs and tokens of work just done to several fields, which share its seconds in proportion to FLOPs.

        For what one pass over the data did for two purposes.
        """
        now = time.monotonic()
        seconds, total = max(now - self._mark, 0.0), sum(flops for flops, _ in parts.values())
        for field, (flops, tokens) in parts.items():
            share = flops / total if total else 1 / len(parts)
            self.ledger.charge(field, flops=flops, seconds=seconds * share, tokens=tokens)
        self._mark = now
        self._beat()

    def price(self, field: str, *, flops: int, tokens: int = 0) -> float:
        """What work would cost in the budget's unit; 0 seconds while no work of any kind was timed."""
        if self.unit == "flops":
            return float(flops)
        if self.unit == "tokens":
            return float(tokens) if field in _LEARNING else 0.0
        return flops * self._seconds_per_flop(field)

    def fits(self, price: float, *, reserve: float) -> bool:
        """Whether something of this price can be bought and ``reserve`` still be left."""
        return self.spent + price + reserve <= self.budget.amount

    def lost_since(self, ledger: Ledger) -> None:
        """Take over a checkpoint's ledger and charge to ``discarded`` what was done after it and is lost.

        What was done is known from the heartbeat, which is replaced after every batch: at most one batch
        is missing from it.
        """
        try:
            beat = json.loads(self._heartbeat.read_text(encoding="utf-8"))
            flops, seconds, tokens = int(beat["flops"]), float(beat["seconds"]), int(beat["tokens"])
            if not math.isfinite(seconds):
                raise ValueError(seconds)
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            flops, seconds, tokens = 0, 0.0, 0
        total = ledger.table()[-1]
        self.ledger = ledger
        self.ledger.charge(
            "discarded",
            flops=max(flops - total["flops"], 0),
            seconds=max(seconds - total["seconds"], 0.0),
            tokens=max(tokens - total["tokens"], 0),
        )
        self._mark = time.monotonic()
        self._beat()

    def _seconds_per_flop(self, field: str) -> float:
        fields = _LEARNING if field in _LEARNING else (field,)
        entries = [self.ledger.entry(name) for name in fields]
        if not any(entry.flops for entry in entries):
            entries = [self.ledger.entry(name) for name in ("train", "cooldown", "eval", "score")]
        flops = sum(entry.flops for entry in entries)
        return sum(entry.seconds for entry in entries) / flops if flops else 0.0

    def _beat(self) -> None:
        total = self.ledger.table()[-1]
        beat = {name: total[name] for name in ("flops", "seconds", "tokens")}
        # A heartbeat that cannot be written costs accuracy after a kill, not the run.
        with suppress(OSError):
            write_text_atomic(self._heartbeat, json.dumps(beat), sync=False)
