"""Rows that a mixture-of-experts layer routes, drops and executes.

A token is routed to k experts, so a layer routes k rows a token; `TransformerShape` counts their products when its
``intermediate_size`` is the sum over the active experts and ``experts`` the number of all of them (for the router).
What runs is another number: dropless kernels round each expert's rows up to a tile, capacity-based ones run
``capacity`` rows of every expert, needed or not, and drop what does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertRows:
    """Rows of one mixture-of-experts layer.

    Args:
        routed: sent by the router.
        kept: not dropped; these train the model.
        executed: multiplied, padding included.
    """

    routed: int
    kept: int
    executed: int

    @property
    def utilization(self) -> float:
        """kept / executed, the share of the experts' arithmetic that serves the model; 1 for no rows."""
        return self.kept / self.executed if self.executed else 1.0

    def padding_flops(self, *, hidden_size: int, expert_size: int, gated: bool, passes: int = 3) -> int:
        """Return the FLOPs of executed rows beyond the kept ones: hardware FLOPs less model FLOPs of this layer.

        2 x 3 (gated; else 2) x hidden_size x expert_size per row and pass; ``passes`` is 3 for a training step, 1 for a
        forward.
        """
        per_row = 2 * (3 if gated else 2) * hidden_size * expert_size
        return passes * per_row * (self.executed - self.kept)


def expert_rows(counts: Sequence[int], *, tile: int = 1, capacity: int | None = None) -> ExpertRows:
    """Count a layer's rows from how many were routed to each expert.

    Args:
        counts: rows routed to each expert [experts], not negative.
        tile: rows of a kernel's tile, >= 1: dropless kernels execute ceil(count / tile) tiles of each expert.
        capacity: rows every expert runs whatever it was sent, as in Switch; ``tile`` rounds it up. None is dropless.

    >>> expert_rows([100, 28, 0, 0], tile=64)
    ExpertRows(routed=128, kept=128, executed=192)
    >>> expert_rows([100, 28, 0, 0], capacity=40)
    ExpertRows(routed=128, kept=68, executed=160)
    """
    if isinstance(tile, bool) or not isinstance(tile, int) or tile < 1:
        raise ValueError(f"tile must be a positive integer, got {tile!r}")
    if capacity is not None and (isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 0):
        raise ValueError(f"capacity must be None or an integer >= 0, got {capacity!r}")
    for count in counts:
        if count != int(count) or count < 0:
            raise ValueError(f"counts must be whole numbers and not negative, got {count!r}")
    rows = [int(count) for count in counts]
    if capacity is None:
        return ExpertRows(sum(rows), sum(rows), sum(-(-count // tile) * tile for count in rows))
    executed = len(rows) * (-(-capacity // tile) * tile)
    return ExpertRows(sum(rows), sum(min(count, capacity) for count in rows), executed)
