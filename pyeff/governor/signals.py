"""What anchor losses say about progress."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PairedGain:
    """Mean fall of the loss on the same samples, with its uncertainty; positive is progress.

    ``low`` and ``high`` bound a two-sided Student-t interval with n - 1 degrees of freedom.
    """

    mean: float
    standard_error: float
    low: float
    high: float
    n: int


def paired_gain(before: Sequence[float], now: Sequence[float], *, confidence: float = 0.95) -> PairedGain:
    """Measure the mean of ``before[i] - now[i]`` over the same samples in the same order.

    d_i = before_i - now_i; mean = sum d / n; standard error = sqrt(sum (d - mean)^2 / (n - 1) / n).
    Sample-to-sample spread of the loss, much larger than a step's progress, cancels in d. The error is that
    of sampling anchors; how far the weights happened to wander between the two checks is not in it.

    Sums are correctly rounded (``math.fsum``): the result does not depend on the order of the samples, the
    machine or the instruction set.

    Args:
        before: losses at the earlier check [n], n >= 2.
        now: losses of the same samples now [n].
        confidence: of the interval, in (0, 1).

    Raises ValueError for different lengths, fewer than two samples and any loss that is not finite.

    >>> gain = paired_gain([2.0, 3.0, 5.0], [1.5, 2.5, 4.5])
    >>> gain.mean, gain.standard_error
    (0.5, 0.0)
    """
    from scipy.special import stdtrit  # a tenth of a second, paid at the first check and not at import

    if len(before) != len(now):
        raise ValueError(f"before and now must be losses of the same samples, got {len(before)} and {len(now)} of them")
    n = len(before)
    if n < 2:
        raise ValueError(f"a standard error needs at least 2 samples, got {n}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence!r}")
    for name, losses in (("before", before), ("now", now)):
        for index, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise ValueError(f"{name}[{index}] must be finite, got {loss!r}")
    differences = [float(b) - float(a) for b, a in zip(before, now, strict=True)]
    mean = math.fsum(differences) / n
    variance = math.fsum((d - mean) ** 2 for d in differences) / (n - 1)
    standard_error = math.sqrt(variance / n)
    width = float(stdtrit(n - 1, 0.5 + confidence / 2)) * standard_error
    return PairedGain(mean, standard_error, mean - width, mean + width, n)
