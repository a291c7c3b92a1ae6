"""When to renew a selection: a refresh that pays may pay better later."""

from __future__ import annotations

import math

# More renewals than checks in a run are of no use.
_MOST_CYCLES = 24


def advantage_over(*, gain_ratio: float, decay: float, length: float, age: float | None = 0.0) -> float:
    """Return what a selection adds over ``length``: integral of (rho - 1) exp(-(x + c) / tau) dx.

    Args:
        gain_ratio: rho. decay: tau > 0. length: >= 0.
        age: c, spent since its scoring; None: there is no selection, and it adds nothing.

    In units of unselected training.
    """
    if age is None:
        return 0.0
    return (gain_ratio - 1) * decay * math.exp(-age / decay) * -math.expm1(-max(length, 0.0) / decay)


def worth_of_renewing(
    *, gain_ratio: float, decay: float, refresh_cost: float, remaining: float, shortest: float = 0.0
) -> float:
    """Return what refreshing now, and again as often as is best, adds to training without a selection.

        max over n >= 1 of  n ((rho - 1) tau (1 - exp(-P / tau)) - S),   P = (B - n S) / n >= ``shortest``

    n = 1 is the pay-back rule's gain of a first selection. Without an end in sight the best P is that of
    `refresh_period`. Cost: at most 24 exponentials.

    >>> once = worth_of_renewing(gain_ratio=2.0, decay=100.0, refresh_cost=1.0, remaining=50.0, shortest=50.0)
    >>> often = worth_of_renewing(gain_ratio=2.0, decay=100.0, refresh_cost=1.0, remaining=50.0)
    >>> round(once, 2), round(often, 2)
    (37.74, 40.67)
    """
    best = advantage_over(gain_ratio=gain_ratio, decay=decay, length=remaining - refresh_cost) - refresh_cost
    if gain_ratio <= 1:
        return best
    for n in range(2, _MOST_CYCLES + 1):
        period = remaining / n - refresh_cost
        if period < max(shortest, 0.0):
            break
        worth = n * (advantage_over(gain_ratio=gain_ratio, decay=decay, length=period) - refresh_cost)
        if worth <= best:  # concave in n
            break
        best = worth
    return best
