from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyeff.governor import UNITS, Budget, format_amount


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("4e13F", 4e13, "flops"),
        ("30 PF", 30e15, "flops"),
        ("2.5TFLOPs", 2.5e12, "flops"),
        ("1e18 FLOP", 1e18, "flops"),
        (" 7 GF ", 7e9, "flops"),
        ("5m", 300.0, "seconds"),
        ("1.5h", 5400.0, "seconds"),
        ("90s", 90.0, "seconds"),
        ("1h 30m", 5400.0, "seconds"),
        ("2 min 5 sec", 125.0, "seconds"),
        ("1 day", 86400.0, "seconds"),
        ("200k tokens", 200e3, "tokens"),
        ("1M tokens", 1e6, "tokens"),
        ("1 token", 1.0, "tokens"),
    ],
)
def test_budgets_are_read_as_people_write_them(text, amount, unit):
    assert Budget.parse(text) == Budget(amount, unit)


@pytest.mark.parametrize(
    "text",
    ["", "5", "4e13", "F", "-3 PF", "0 PF", "0 tokens", "0s", "1e999F", "5 M", "5 parsecs", "nan F", "1h later", "m5"],
)
def test_what_cannot_be_read_is_refused_with_the_accepted_forms(text):
    with pytest.raises(ValueError, match=r"budget .*'4e13F', '30 PF', '90s', '5m'"):
        Budget.parse(text)


def test_minutes_and_millions_are_told_apart():
    assert Budget.parse("5m").unit == "seconds"
    assert Budget.parse("5M tokens").unit == "tokens"


@given(st.floats(min_value=1e-300, max_value=1e300), st.sampled_from(UNITS))
def test_writing_and_reading_gives_the_same_budget(amount, unit):
    budget = Budget(amount, unit)
    assert Budget.parse(str(budget)) == budget


@given(st.integers(1, 9999), st.sampled_from(["kF", "MF", "GF", "TF", "PF", "EF"]))
def test_round_amounts_are_written_with_a_prefix(number, unit):
    assert len(str(Budget.parse(f"{number} {unit}"))) <= len(f"{number} {unit}") + 1


@given(st.floats(allow_nan=True, allow_infinity=True), st.sampled_from(UNITS))
def test_any_amount_can_be_shown(amount, unit):
    assert format_amount(amount, unit)


@given(st.floats(min_value=1e-3, max_value=1e23), st.sampled_from(UNITS))
def test_a_shown_amount_is_right_to_three_digits(amount, unit):
    shown = Budget.parse(format_amount(amount, unit)).amount
    assert abs(shown - amount) <= 0.005 * amount * (1 + 1e-9)  # half a unit of the third digit of 1.00


def test_an_amount_just_below_a_prefix_is_not_shown_with_an_exponent():
    assert format_amount(9.999e14, "flops") == "1 PF"
    assert format_amount(999.7, "tokens") == "1k tokens"
    assert format_amount(1234 * 3600, "seconds") == "1234 h"


def test_wrong_amounts_and_units_are_named():
    with pytest.raises(ValueError, match="amount must be positive and finite, got -1"):
        Budget(-1.0, "flops")
    with pytest.raises(ValueError, match="unit must be one of flops, seconds, tokens, got 'hours'"):
        Budget(1.0, "hours")
    with pytest.raises(TypeError, match="amount must be a number"):
        Budget("5", "flops")
    with pytest.raises(TypeError, match="budget must be text"):
        Budget.parse(5)
