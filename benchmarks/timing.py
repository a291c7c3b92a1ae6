"""Timing that a shared machine cannot mislead: ratios of interleaved repeats, and a rule for when they count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# A baseline whose own repeats differ by more has been disturbed, and so has whatever is compared with it.
STEADY = 1.15


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the fastest and the median of the repeats."""

    minimum: float
    median: float

    @property
    def steady(self) -> bool:
        """Whether a ratio to this baseline counts."""
        return self.median <= STEADY * self.minimum

    def ratio(self, baseline: Timing) -> Timing:
        """Fastest to fastest and median to median."""
        return Timing(self.minimum / baseline.minimum, self.median / baseline.median)


def interleaved(functions: dict[str, Callable[[], object]], *, pairs: int = 20) -> dict[str, Timing]:
    """Time the functions in turn, `pairs` rounds of one call each, after a round that does not count.

    On a machine with a GPU a call is timed by CUDA events on the current stream, which must hold all of its work, and
    the L2 cache is overwritten before each call, as the rest of a training step would.
    """
    once = _once_on_gpu() if torch.cuda.is_available() else _once_on_cpu
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(pairs):
        for name, function in functions.items():
            seconds[name].append(once(function))
    return {name: Timing(min(taken), statistics.median(taken)) for name, taken in seconds.items()}


def interleaved_until_steady(
    functions: dict[str, Callable[[], object]], *, baseline: str, pairs: int = 20, attempts: int = 3
) -> dict[str, Timing]:
    """`interleaved`, repeated while the baseline is unsteady; the last attempt is returned, steady or not."""
    for _ in range(attempts - 1):
        timings = interleaved(functions, pairs=pairs)
        if timings[baseline].steady:
            return timings
    return interleaved(functions, pairs=pairs)


def _once_on_cpu(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _once_on_gpu() -> Callable[[Callable[[], object]], float]:
    cache = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once(function: Callable[[], object]) -> float:
        cache.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return once
