"""Numbers as a person reads them: budgets in TFLOP, minutes or thousand tokens; losses, gains, times."""

from __future__ import annotations

import math
from dataclasses import dataclass

_FLOP_PREFIXES = (
    (1e18, "EFLOP"),
    (1e15, "PFLOP"),
    (1e12, "TFLOP"),
    (1e9, "GFLOP"),
    (1e6, "MFLOP"),
    (1.0, "FLOP"),
)
_TOKEN_PREFIXES = ((1e9, "B tokens"), (1e6, "M tokens"), (1e4, "k tokens"), (1.0, "tokens"))
_RATES = {"flops": (1e15, "PFLOP"), "seconds": (60.0, "minute"), "tokens": (1000.0, "1000 tokens")}
_QUANTITIES = {"flops": "compute spent", "seconds": "time spent", "tokens": "tokens trained"}


@dataclass(frozen=True)
class Scale:
    """How amounts of one budget unit are shown: `shown = amount / divisor`, followed by `name`.

    >>> Scale.of("flops", 4e13).text(2.48e13)
    '24.8 TFLOP'
    """

    unit: str
    divisor: float
    name: str

    @classmethod
    def of(cls, unit: str, amount: float) -> Scale:
        """Choose the prefix in which `amount` reads as a number of one to three digits.

        `unit` is "flops", "seconds" or "tokens"; anything else raises ValueError.
        """
        if unit == "seconds":
            # Up to two minutes the seconds matter; beyond two hours nobody counts minutes.
            prefixes = ((3600.0, "h"), (60.0, "min"), (1.0, "s"))
            divisor, name = next((p for p in prefixes if amount >= 2 * p[0]), prefixes[-1])
        elif unit in ("flops", "tokens"):
            table = _FLOP_PREFIXES if unit == "flops" else _TOKEN_PREFIXES
            divisor, name = next((p for p in table if amount >= p[0]), table[-1])
            if name == "k tokens":
                divisor = 1e3  # 10 000 tokens and more read as "10 k tokens"
        else:
            raise ValueError(f'unit must be "flops", "seconds" or "tokens", got {unit!r}')
        return cls(unit, divisor, name)

    @property
    def axis_label(self) -> str:
        """The label of a plot's axis, with its unit."""
        return f"{_QUANTITIES[self.unit]} ({self.name})"

    def text(self, amount: float) -> str:
        """`amount` with its unit."""
        return f"{number(amount / self.divisor)} {self.name}"

    def of_total(self, amount: float, total: float) -> str:
        """`amount` out of `total`, the unit written once."""
        return f"{number(amount / self.divisor)} of {number(total / self.divisor)} {self.name}"

    @property
    def rate_name(self) -> str:
        """What a gain is divided by: "PFLOP", "minute" or "1000 tokens"."""
        return _RATES[self.unit][1]

    def rate(self, gain: float, spent: float) -> float:
        """`gain` per PFLOP, minute or 1000 tokens; NaN where nothing was spent."""
        return gain / (spent / _RATES[self.unit][0]) if spent > 0 else math.nan


def number(value: float | None) -> str:
    """Three significant digits without an exponent where that is readable; "n/a" for None and NaN.

    >>> number(0.0123456), number(24.8), number(40.0), number(None)
    ('0.0123', '24.8', '40', 'n/a')
    """
    if value is None or math.isnan(value):
        return "n/a"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.2e}"
    digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def loss_text(value: float | None) -> str:
    """A loss in nats per token, three decimals; "n/a" for None and NaN."""
    return "n/a" if value is None or math.isnan(value) else f"{value:.3f}"


def percent(part: float, whole: float) -> str:
    """`part` of `whole` in per cent, one decimal below ten; "n/a" where there is no whole."""
    if not whole > 0:
        return "n/a"
    share = 100 * part / whole
    # Rounding must not turn 9.96 into "10.0" beside an honest "10".
    return f"{share:.1f} %" if 0 < share < 9.95 else f"{share:.0f} %"


def duration(seconds: float | None) -> str:
    """Seconds as "42 s", "3:07 min" or "1:05:00 h"; "n/a" for None and NaN.

    >>> duration(42), duration(187), duration(3900)
    ('42 s', '3:07 min', '1:05:00 h')
    """
    if seconds is None or math.isnan(seconds):
        return "n/a"
    if seconds < 9.95:
        return f"{number(round(seconds, 1))} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """`count noun`, or `count nouns` (by default with an s) for any count but one."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"
