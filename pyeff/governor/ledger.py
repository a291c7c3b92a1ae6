"""Where a run's FLOPs, seconds, tokens and joules went."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pyeff.governor.budget import UNITS

FIELDS = ("train", "eval", "score", "probe", "cooldown", "discarded")
_TOKEN_FIELDS = ("train", "cooldown")
_OVERHEAD_FIELDS = ("eval", "score", "probe")


@dataclass
class LedgerEntry:
    """What one field has cost: FLOPs and tokens as exact integers, seconds, and joules or None.

    ``flops`` are those executed; ``model_flops`` those the mathematics needed, without recomputation, masked pairs and
    padding. ``joules`` and ``model_flops`` are None as soon as some work was charged without them.
    """

    flops: int = 0
    seconds: float = 0.0
    tokens: int = 0
    joules: float | None = 0.0
    model_flops: int | None = 0


class Ledger:
    """Count what a run costs, in six fields that do not overlap.

    ========== =========================================================================
    train      forward and backward of optimizer steps at the constant rate
    cooldown   the same while the learning rate is annealed
    eval       anchor, holdout and exact-match evaluation
    score      scoring the pool for a selection
    probe      short branches run only to learn something
    discarded  work lost to a crash and done again after the resume
    ========== =========================================================================

    FLOPs and tokens are kept as integers of any size, so their sums do not depend on how work was cut into
    micro-batches. Every charge is non-negative, so no total ever falls.

    >>> ledger = Ledger()
    >>> ledger.charge("train", flops=6_000, tokens=10)
    >>> ledger.charge("score", flops=2_000, tokens=10)
    >>> ledger.spent("flops"), ledger.spent("tokens")
    (8000.0, 10.0)
    """

    def __init__(self) -> None:
        self._entries = {field: LedgerEntry() for field in FIELDS}

    def charge(
        self,
        field: str,
        *,
        flops: float = 0,
        seconds: float = 0.0,
        tokens: int = 0,
        joules: float | None = None,
        model_flops: float | None = None,
    ) -> None:
        """Add the cost of some work to one field.

        Args:
            field: one of ``FIELDS``.
            flops: floating-point operations executed; a fraction is rounded to the nearest integer.
            seconds: wall time.
            tokens: input tokens processed (a token trained on twice counts twice).
            joules: energy over the same work, or None where no counter was read; a single such charge makes
                the field's joules None, since a partial sum would be read as a total.
            model_flops: FLOPs the mathematics needed, at most ``flops`` (`TransformerShape.model_flops`); likewise.

        Raises ValueError for an unknown field and for a negative, non-finite or fractional (tokens) amount.
        """
        entry = self._entry(field)
        new_flops = entry.flops + round(_amount("flops", flops))
        new_seconds = entry.seconds + _amount("seconds", seconds)
        new_tokens = entry.tokens + _whole("tokens", tokens)
        new_joules = entry.joules
        if joules is not None:
            energy = _amount("joules", joules)
            new_joules = None if new_joules is None else new_joules + energy
        elif flops or seconds:
            new_joules = None
        new_model = entry.model_flops
        if model_flops is not None:
            needed = round(_amount("model_flops", model_flops))
            if needed > round(flops):
                raise ValueError(f"model_flops must not exceed flops ({flops!r}), got {model_flops!r}")
            new_model = None if new_model is None else new_model + needed
        elif flops:
            new_model = None
        self._entries[field] = LedgerEntry(new_flops, new_seconds, new_tokens, new_joules, new_model)

    def entry(self, field: str) -> LedgerEntry:
        """Return a copy of one field's totals; ValueError for an unknown field."""
        return LedgerEntry(**asdict(self._entry(field)))

    def spent(self, unit: str) -> float:
        """Return how much of a budget in this unit is used up.

        - ``"flops"``: all fields but ``discarded``. A resumed run can repeat the lost
          steps, and with them every later decision, bit for bit only if the loss leaves no trace here.
        - ``"seconds"``: all fields, ``discarded`` included: lost time is gone and is not granted twice.
        - ``"tokens"``: ``train`` and ``cooldown`` only: a token budget buys training tokens; scoring and
          evaluation process tokens too (see :meth:`table`) but learn nothing from them.

        Raises ValueError for another unit.
        """
        if unit not in UNITS:
            raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")
        if unit == "flops":
            return float(sum(entry.flops for field, entry in self._entries.items() if field != "discarded"))
        if unit == "seconds":
            return math.fsum(entry.seconds for entry in self._entries.values())
        return float(sum(self._entries[field].tokens for field in _TOKEN_FIELDS))

    def overhead(self) -> float:
        """Return the share of spent FLOPs that trained nothing: (eval + score + probe) / spent, 0 when none."""
        spent = self.spent("flops")
        return self.overhead_spent("flops") / spent if spent else 0.0

    def overhead_spent(self, unit: str) -> float:
        """Return what evaluation, scoring and probes used of a budget in this unit: 0 of one in tokens.

        Raises ValueError for another unit.
        """
        if unit not in UNITS:
            raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")
        entries = [self._entries[field] for field in _OVERHEAD_FIELDS]
        if unit == "tokens":
            return 0.0
        return (
            float(sum(entry.flops for entry in entries)) if unit == "flops" else math.fsum(e.seconds for e in entries)
        )

    def table(self) -> list[dict[str, Any]]:
        """Return rows for a report: one per field in the order of ``FIELDS``, then ``total``.

        Each row has ``field``, ``flops``, ``seconds``, ``tokens``, ``joules`` and ``model_flops`` (or None) and
        ``share``, the fraction of all FLOPs. The total includes ``discarded``: it is what the machine did, which may
        be more than :meth:`spent`.
        """
        total = LedgerEntry(
            flops=sum(entry.flops for entry in self._entries.values()),
            seconds=math.fsum(entry.seconds for entry in self._entries.values()),
            tokens=sum(entry.tokens for entry in self._entries.values()),
            joules=_sum_known(entry.joules for entry in self._entries.values()),
            model_flops=_sum_known(entry.model_flops for entry in self._entries.values()),
        )
        rows = [(field, self._entries[field]) for field in FIELDS] + [("total", total)]
        return [
            {"field": name, **asdict(entry), "share": entry.flops / total.flops if total.flops else 0.0}
            for name, entry in rows
        ]

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return ``{field: {flops, seconds, tokens, joules, model_flops}}``; survives JSON exactly."""
        return {field: asdict(entry) for field, entry in self._entries.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Replace all totals by a saved state; ValueError, and no change, when a field is missing or unknown."""
        if set(state) != set(FIELDS):
            raise ValueError(f"state must have the fields {', '.join(FIELDS)}, got {', '.join(map(str, state))}")
        names = {"flops", "seconds", "tokens", "joules", "model_flops"}
        entries = {}
        for field in FIELDS:
            # Ledgers saved before model FLOPs were counted: not known.
            saved = {"model_flops": None, **state[field]}
            if set(saved) != names:
                raise ValueError(f"state[{field!r}] must have {', '.join(sorted(names))}, got {sorted(saved)}")
            entries[field] = LedgerEntry(
                flops=_whole("flops", saved["flops"]),
                seconds=_amount("seconds", saved["seconds"]),
                tokens=_whole("tokens", saved["tokens"]),
                joules=None if saved["joules"] is None else _amount("joules", saved["joules"]),
                model_flops=None if saved["model_flops"] is None else _whole("model_flops", saved["model_flops"]),
            )
        self._entries = entries

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ledger) and self._entries == other._entries

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        spent = ", ".join(f"{field}={entry.flops}" for field, entry in self._entries.items())
        return f"Ledger(flops: {spent})"

    def _entry(self, field: str) -> LedgerEntry:
        if field not in self._entries:
            raise ValueError(f"field must be one of {', '.join(FIELDS)}, got {field!r}")
        return self._entries[field]


def _amount(name: str, value: float) -> float:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got bool")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an int beyond the range of float is finite
        finite = True
    except TypeError:
        raise TypeError(f"{name} must be a number, got {type(value).__name__}") from None
    if not finite or value < 0:
        raise ValueError(f"{name} must be finite and not negative, got {value!r}")
    return value


def _whole(name: str, value: float) -> int:
    amount = _amount(name, value)
    if amount != int(amount):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return int(amount)


def _sum_known(values: Any) -> Any:
    known = list(values)
    if any(value is None for value in known):
        return None
    return sum(known) if all(isinstance(value, int) for value in known) else math.fsum(known)
