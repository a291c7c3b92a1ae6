"""When to renew a selection, and how often: a refresh that pays may pay better later, and the cap has to last."""

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
    *,
    gain_ratio: float,
    decay: float,
    refresh_cost: float,
    remaining: float,
    shortest: float = 0.0,
    room: float = math.inf,
) -> float:
    """Return what refreshing now, and again as often as is best, adds to training without a selection.

        max over n >= 1 of  n ((rho - 1) tau (1 - exp(-P / tau)) - S),   P = (B - n S) / n >= ``shortest``

    n = 1 is the pay-back rule's gain of a first selection. Without an end in sight the best P is that of
    `refresh_period`. ``room`` is what scorings may cost together, n S <= ``room``; the first is not asked. Cost: at
    most 24 exponentials.

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
        if period < max(shortest, 0.0) or n * refresh_cost > room:
            break
        worth = n * (advantage_over(gain_ratio=gain_ratio, decay=decay, length=period) - refresh_cost)
        if worth <= best:  # concave in n
            break
        best = worth
    return best


def worth_of_waiting(
    *,
    gain_ratio: float,
    decay: float,
    refresh_cost: float,
    remaining: float,
    interval: float,
    present_ratio: float,
    present_decay: float,
    age: float | None,
    shortest: float = 0.0,
    room: float = math.inf,
) -> float:
    """Return what the best plan adds that goes on with the present selection for one check or more, then renews.

        max over w = 1, 2, ... of  present advantage over w ``interval`` + `worth_of_renewing` with w ``interval`` less

    Args:
        gain_ratio: of the selector that would renew; likewise ``decay`` and ``refresh_cost``.
        remaining: B. interval: between checks, > 0; all amounts in one unit.
        present_ratio: rho of the selection in use; likewise ``present_decay`` and its ``age`` (None: there is none).
        shortest: time between renewals at least. room: as for `worth_of_renewing`.

    Minus infinity where no renewal can wait.
    """
    best = -math.inf
    for waits in range(1, _MOST_CYCLES + 1):
        rest = remaining - waits * interval
        if rest <= refresh_cost:
            break
        until = advantage_over(gain_ratio=present_ratio, decay=present_decay, length=remaining - rest, age=age)
        then = worth_of_renewing(
            gain_ratio=gain_ratio,
            decay=decay,
            refresh_cost=refresh_cost,
            remaining=rest,
            shortest=shortest,
            room=room,
        )
        best = max(best, until + then)
    return best
