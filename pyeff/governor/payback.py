"""When a selection returns more training than it costs."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class PayBack:
    """Both sides of the pay-back rule, in the budget's unit of training without a selection."""

    benefit: float
    cost: float

    def pays(self, deadband: float = 0.0) -> bool:
        """Whether the benefit exceeds the cost by the share ``deadband``."""
        return self.benefit > (1 + deadband) * self.cost


def pay_back(
    *,
    gain_ratio: float,
    decay: float,
    refresh_cost: float,
    remaining: float,
    stale_for: float | None,
    present_ratio: float | None = None,
    present_decay: float | None = None,
) -> PayBack:
    """Weigh a fresh selection against its cost.

    Training x after a scoring moves the anchors 1 + (rho - 1) exp(-x / tau) times as fast as training without
    a selection. A refresh now raises that rate over the B - S that remain after it, and forgoes S of training
    at most at the present rate:

        benefit = integral from 0 to B - S of (rho - 1) (exp(-x / tau) - exp(-(x + c) / tau)) dx
                = (rho - 1) tau (1 - exp(-c / tau)) (1 - exp(-(B - S) / tau))
        cost    = S (1 + (rho - 1) exp(-c / tau))

    Args:
        gain_ratio: rho > 0, rate of gain right after a selection over that without any.
        decay: tau > 0, spend over which the advantage falls to 1/e.
        refresh_cost: S >= 0.
        remaining: B, what is left before the cooldown's reserve; all amounts in one unit.
        stale_for: c, spent since the last scoring; None when the pool was never scored (c infinite).
        present_ratio: rho of the present selection where another selector made it, in place of ``gain_ratio`` in
            exp(-(x + c) / tau) and in the cost; None where it is the same.
        present_decay: likewise tau of the present selection.

    The benefit is 0 when S >= B. Raises ValueError for amounts out of range.

    >>> pay_back(gain_ratio=2.0, decay=100.0, refresh_cost=10.0, remaining=80.0, stale_for=None).pays()
    True
    """
    _check_selection(gain_ratio, decay, refresh_cost)
    for name, value in (("remaining", remaining), ("stale_for", stale_for or 0.0)):
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} must be finite and not negative, got {value!r}")
    present = gain_ratio if present_ratio is None else present_ratio
    fading = decay if present_decay is None else present_decay
    for name, value in (("present_ratio", present), ("present_decay", fading)):
        if not math.isfinite(value) or value <= 0:
            raise ValueError(f"{name} must be positive and finite, got {value!r}")
    lost = 1.0 if stale_for is None else -math.expm1(-stale_for / fading)  # share of the advantage gone
    after = max(remaining - refresh_cost, 0.0)
    reach, present_reach = -math.expm1(-after / decay), -math.expm1(-after / fading)
    # Written so that no difference of nearly equal terms is left where both selections are of one kind.
    benefit = (gain_ratio - 1) * decay * lost * reach
    if present != gain_ratio or fading != decay:
        benefit += ((gain_ratio - 1) * decay * reach - (present - 1) * fading * present_reach) * (1 - lost)
    return PayBack(benefit=benefit, cost=refresh_cost * (1 + (present - 1) * (1 - lost)))


def worth_of_training(*, gain_ratio: float, decay: float, remaining: float, stale_for: float | None) -> float:
    """Return what training on the present data until the cooldown is worth, without a selection's cost.

    integral from 0 to B of 1 + (rho - 1) exp(-(x + c) / tau) dx, arguments as in :func:`pay_back`.
    """
    kept = 0.0 if stale_for is None else math.exp(-stale_for / decay)
    return remaining + (gain_ratio - 1) * kept * decay * -math.expm1(-remaining / decay)


def refresh_period(*, gain_ratio: float, decay: float, refresh_cost: float) -> float:
    """Return the spend P between refreshes that maximises the mean rate of gain when there is no end in sight.

    A cycle pays S and then trains P at 1 + (rho - 1) exp(-x / tau); its mean rate

        (P + (rho - 1) tau (1 - exp(-P / tau))) / (P + S)

    is largest where it equals the rate at the cycle's end (Charnov's marginal value theorem). Infinite when even
    the best cycle is no better than never selecting: (rho - 1) tau <= S. For S << tau it is
    :func:`square_root_period`.

    Args:
        gain_ratio: rho > 0. decay: tau > 0. refresh_cost: S >= 0; amounts in one unit.

    >>> round(refresh_period(gain_ratio=2.0, decay=100.0, refresh_cost=1.0), 1)
    20.4
    """
    _check_selection(gain_ratio, decay, refresh_cost)
    surplus = gain_ratio - 1
    if surplus * decay <= refresh_cost:
        return math.inf
    if refresh_cost == 0:
        return 0.0

    def excess(period: float) -> float:
        """The cycle's mean rate less the rate at its end, times the cycle's length; rises with the period."""
        rest = math.exp(-period / decay)
        return surplus * decay * (1 - rest) - surplus * rest * (period + refresh_cost) - refresh_cost

    low, high = 0.0, decay
    while excess(high) < 0:
        low, high = high, 2 * high
        if not math.isfinite(high):
            return math.inf
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return (low + high) / 2


def square_root_period(*, gain_ratio: float, decay: float, refresh_cost: float) -> float:
    """Return sqrt(2 tau S rho / (rho - 1)), the limit of :func:`refresh_period` for S << tau; infinite for rho <= 1.

    A selector four times cheaper is worth running twice as often.
    """
    _check_selection(gain_ratio, decay, refresh_cost)
    if gain_ratio <= 1:
        return math.inf
    return math.sqrt(2 * decay * refresh_cost * gain_ratio / (gain_ratio - 1))


def _check_selection(gain_ratio: float, decay: float, refresh_cost: float) -> None:
    for name, value in (("gain_ratio", gain_ratio), ("decay", decay)):
        if not math.isfinite(value) or value <= 0:
            raise ValueError(f"{name} must be positive and finite, got {value!r}")
    if not math.isfinite(refresh_cost) or refresh_cost < 0:
        raise ValueError(f"refresh_cost must be finite and not negative, got {refresh_cost!r}")
