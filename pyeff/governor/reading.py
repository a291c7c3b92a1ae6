"""Read what a training loop or a file hands to the governor, which may be anything."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


def losses_of(given: Any) -> tuple[tuple[float, ...], str]:
    """Return the anchors' losses, and why they are none where they are not."""
    try:
        items = iter(given)
    except TypeError:
        return (), f"the anchors must be losses, one a sample, and are {type(given).__name__}"
    losses = list(items)  # what a generator raises is the user's
    try:
        return tuple(float(loss) for loss in losses), ""
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        return (), f"the anchors must be losses, one number a sample ({error})"


def whole_numbers(name: str, values: Iterable[Any]) -> tuple[int, ...]:
    """Return the values as integers; ValueError naming them where one is none."""
    try:
        given = tuple(values)
        whole = tuple(int(value) for value in given)
        if any(number != value for number, value in zip(whole, given, strict=True)):
            raise ValueError(f"among them {given}")
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be whole numbers: {error}") from None
    return whole


def amount_of(name: str, value: Any) -> float:
    """Return a number of a saved state; ValueError where it is none, not finite or negative."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value!r}")
    return float(value)
