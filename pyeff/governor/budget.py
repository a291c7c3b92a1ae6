"""A budget is an amount of one currency: FLOPs, seconds or tokens."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

Unit = Literal["flops", "seconds", "tokens"]
UNITS: tuple[str, ...] = get_args(Unit)

_PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18, "Z": 1e21}
_PLAIN = {"flops": " F", "seconds": "s", "tokens": " tokens"}
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_TIME_NAMES = {"sec": "s", "second": "s", "seconds": "s", "min": "m", "minute": "m", "minutes": "m"}
_TIME_NAMES |= {"hour": "h", "hours": "h", "day": "d", "days": "d"}

_NUMBER = r"(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)"
_FLOPS = re.compile(rf"{_NUMBER}\s*([kKMGTPEZ]?)(?:F|FLOPs?|FLOPS|flops?)")
_TOKENS = re.compile(rf"{_NUMBER}\s*([kKMGTPEZ]?)\s*(?:tokens?|tok)")
_TIME = re.compile(rf"{_NUMBER}\s*(seconds?|sec|s|minutes?|min|m|hours?|h|days?|d)")
_TIMES = re.compile(rf"{_TIME.pattern}(?:\s*{_TIME.pattern})*")

_EXPECTED = "expected a number with a unit, such as '4e13F', '30 PF', '90s', '5m', '1.5h', '200k tokens' or '1M tokens'"


def format_amount(amount: float, unit: str) -> str:
    """Write an amount for a person, to three significant digits.

    Args:
        amount: in FLOPs, seconds or tokens; negative and non-finite amounts are written too.
        unit: ``"flops"``, ``"seconds"`` or ``"tokens"``.

    >>> format_amount(1.2345e13, "flops"), format_amount(90.0, "seconds"), format_amount(200000, "tokens")
    ('12.3 TF', '1.5 m', '200k tokens')
    """
    _check_unit(unit)
    if unit == "seconds":
        suffix = _pick(abs(amount), {"s": 1.0, "m": 60.0, "h": 3600.0})
        return f"{_three_digits(amount / _SECONDS[suffix])} {suffix}"
    prefix = _pick(abs(amount), _PREFIXES)
    number = _three_digits(amount / _PREFIXES[prefix])
    return f"{number} {prefix}F" if unit == "flops" else f"{number}{prefix} tokens"


@dataclass(frozen=True)
class Budget:
    """What a run may spend: ``amount`` > 0 of ``unit``, which is "flops", "seconds" or "tokens".

    Raises ValueError for an amount that is not positive and finite, or an unknown unit.

    >>> Budget.parse("30 PF")
    Budget(amount=3e+16, unit='flops')
    >>> str(Budget.parse("1h 30m"))
    '1.5h'
    """

    amount: float
    unit: Unit

    def __post_init__(self) -> None:
        _check_unit(self.unit)
        if isinstance(self.amount, bool) or not isinstance(self.amount, (int, float)):
            raise TypeError(f"amount must be a number, got {type(self.amount).__name__}")
        if not (math.isfinite(self.amount) and self.amount > 0):
            raise ValueError(f"amount must be positive and finite, got {self.amount!r}")
        object.__setattr__(self, "amount", float(self.amount))

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read a budget as a person writes it.

        FLOPs: ``F``, ``FLOP`` or ``FLOPs`` with an SI prefix (``4e13F``, ``30 PF``, ``2.5 TFLOPs``). Time:
        ``s``, ``m`` (minutes), ``h``, ``d``, their names, and sums such as ``1h 30m``. Tokens: ``200k
        tokens``, ``1M tokens``. A bare number has no unit and is refused. ``Budget.parse(str(budget)) ==
        budget`` always.

        Raises ValueError with the accepted forms when the text is none of them.
        """
        if not isinstance(text, str):
            raise TypeError(f"budget must be text such as '4e13F', got {type(text).__name__}")
        stripped = text.strip()
        amount, unit = math.nan, "flops"
        if match := _FLOPS.fullmatch(stripped):
            amount = float(match[1]) * _prefix(match[2])
        elif match := _TOKENS.fullmatch(stripped):
            amount, unit = float(match[1]) * _prefix(match[2]), "tokens"
        elif _TIMES.fullmatch(stripped):
            parts = [float(number) * _SECONDS[_TIME_NAMES.get(name, name)] for number, name in _TIME.findall(stripped)]
            amount, unit = math.fsum(parts), "seconds"
        else:
            raise ValueError(f"cannot read the budget {text!r}: {_EXPECTED}")
        if not (math.isfinite(amount) and amount > 0):
            raise ValueError(f"the budget {text!r} must be more than nothing and finite: {_EXPECTED}")
        return cls(amount, unit)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """Give the shortest form that parses back to exactly this budget."""
        candidates = {
            "flops": [(_PREFIXES[prefix], f" {prefix}F") for prefix in "ZEPTGMk"],
            "tokens": [(_PREFIXES[prefix], f"{prefix} tokens") for prefix in "ZEPTGMk"],
            "seconds": [(_SECONDS[name], name) for name in "hm"],
        }[self.unit]
        for scale, suffix in candidates:
            mantissa = self.amount / scale
            # 1.1e13 / 1e12 * 1e12 need not be 1.1e13: a prefix is used only where nothing is lost.
            if 1 <= mantissa < 1e4 and float(f"{mantissa:.6g}") * scale == self.amount:
                return f"{mantissa:.6g}{suffix}"
        return f"{self.amount!r}{_PLAIN[self.unit]}"


def parse_price(text: str, budget: Budget) -> float:
    """Read what a budget must return, in nats per unit of it.

    Args:
        text: "0.01 per PF", "2e-3 nats per hour", "0.1 per 1M tokens": a loss per amount of the budget's currency; or
            "0.02 for 10%": what one would give for that much more of this budget.
        budget: the budget it is about.

    Raises ValueError for text that says neither, a price per another currency, and one that is negative.

    >>> parse_price("0.5 per PF", Budget.parse("30 PF"))
    5e-16
    >>> parse_price("0.5 for 10%", Budget.parse("50 s"))
    0.1
    """
    match = re.fullmatch(rf"\s*{_NUMBER}\s*(?:nats?|loss)?\s*(per|for)\s+(.+?)\s*", text)
    if match is None:
        raise ValueError(f"cannot read the price {text!r}: expected such as '0.01 per PF' or '0.02 for 10%'")
    loss, word, amount = float(match[1]), match[2], match[3]
    if word == "for":
        share = re.fullmatch(rf"{_NUMBER}\s*%", amount)
        if share is None or float(share[1]) <= 0:
            raise ValueError(f"cannot read the price {text!r}: after 'for' comes a share of the budget such as '10%'")
        return loss / (float(share[1]) / 100 * budget.amount)
    per = Budget.parse(amount if amount[0].isdigit() or amount[0] == "." else f"1 {amount}")
    if per.unit != budget.unit:
        raise ValueError(f"the price {text!r} is per {per.unit}, but the budget {budget} is in {budget.unit}")
    return loss / per.amount


def _check_unit(unit: str) -> None:
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")


def _prefix(letter: str) -> float:
    return _PREFIXES["k" if letter == "K" else letter]


def _pick(size: float, scales: dict[str, float]) -> str:
    # 999.7 shows as 1000, so it already belongs to the next name.
    fitting = [name for name, scale in scales.items() if size >= 0.9995 * scale]
    return fitting[-1] if fitting else next(iter(scales))


def _three_digits(number: float) -> str:
    return f"{number:.0f}" if 999.5 <= abs(number) < 1e6 else f"{number:.3g}"
