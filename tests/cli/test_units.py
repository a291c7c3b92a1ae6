from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyeff.cli.units import Scale, duration, number, percent


@given(st.floats(1e-3, 1e30))
def test_a_number_shows_its_value_within_rounding(value):
    assert math.isclose(float(number(value)), value, rel_tol=0.5e-2)


@given(st.sampled_from(["flops", "seconds", "tokens"]), st.floats(1, 1e24))
def test_a_scaled_amount_reads_back_as_itself(unit, amount):
    scale = Scale.of(unit, amount)
    shown, name = scale.text(amount).split(" ", 1)
    assert name == scale.name
    assert math.isclose(float(shown) * scale.divisor, amount, rel_tol=0.5e-2)


@given(st.integers(0, 10**7))
def test_a_duration_reads_back_as_its_seconds(seconds):
    digits, unit = duration(seconds).split()
    parts = [int(p) for p in digits.split(":")]
    assert {"s": 1, "min": 2, "h": 3}[unit] == len(parts)
    assert sum(p * 60**i for i, p in enumerate(reversed(parts))) == seconds


def test_gains_are_per_pflop_minute_or_thousand_tokens():
    assert Scale.of("flops", 4e13).rate(0.5, 1e13) == pytest.approx(50)
    assert Scale.of("seconds", 600).rate(0.5, 30) == pytest.approx(1)
    assert Scale.of("tokens", 1e5).rate(0.5, 500) == pytest.approx(1)
    assert math.isnan(Scale.of("flops", 1e13).rate(1.0, 0.0))


def test_what_is_not_known_is_not_zero():
    assert number(None) == number(math.nan) == duration(None) == percent(1, 0) == "n/a"


def test_an_unknown_unit_is_named():
    with pytest.raises(ValueError, match="'joules'"):
        Scale.of("joules", 1)
