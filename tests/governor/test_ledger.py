from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyeff.governor import FIELDS, UNITS, Ledger

CHARGES = st.lists(
    st.tuples(
        st.sampled_from(FIELDS),
        st.fixed_dictionaries(
            {
                "flops": st.integers(0, 10**25),
                "seconds": st.floats(0, 1e6),
                "tokens": st.integers(0, 10**12),
                "joules": st.none() | st.floats(0, 1e9),
            }
        ),
    ),
    max_size=20,
)


def charged(charges):
    ledger = Ledger()
    for field, amounts in charges:
        ledger.charge(field, **amounts)
    return ledger


@given(CHARGES)
def test_each_unit_counts_the_fields_it_says(charges):
    ledger = charged(charges)
    kept = [(field, amounts) for field, amounts in charges if field != "discarded"]
    assert ledger.spent("flops") == float(sum(amounts["flops"] for _, amounts in kept))
    trained = [amounts["tokens"] for field, amounts in charges if field in ("train", "cooldown")]
    assert ledger.spent("tokens") == float(sum(trained))
    every_second = sum(amounts["seconds"] for _, amounts in charges)
    rounding = len(charges) * 2**-52 * every_second
    assert abs(ledger.spent("seconds") - every_second) <= rounding


@given(CHARGES, st.randoms())
def test_flops_and_tokens_do_not_depend_on_the_order_of_charges(charges, random):
    shuffled = list(charges)
    random.shuffle(shuffled)
    one, other = charged(charges), charged(shuffled)
    for field in FIELDS:
        assert one.entry(field).flops == other.entry(field).flops
        assert one.entry(field).tokens == other.entry(field).tokens


@given(st.lists(st.integers(0, 10**20), min_size=1), st.sampled_from(FIELDS))
def test_micro_batches_charge_what_their_batch_does(parts, field):
    whole, split = Ledger(), Ledger()
    whole.charge(field, flops=sum(parts), tokens=sum(parts))
    for part in parts:
        split.charge(field, flops=part, tokens=part)
    assert whole == split


@given(CHARGES)
def test_no_total_ever_falls(charges):
    ledger = Ledger()
    totals = dict.fromkeys(UNITS, 0.0)
    for field, amounts in charges:
        ledger.charge(field, **amounts)
        for unit in UNITS:
            assert ledger.spent(unit) >= totals[unit]
            totals[unit] = ledger.spent(unit)


@given(CHARGES, CHARGES)
def test_a_ledger_saved_as_json_goes_on_exactly(first, then):
    ledger, resumed = charged(first), Ledger()
    resumed.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert resumed == ledger
    for field, amounts in then:
        ledger.charge(field, **amounts)
        resumed.charge(field, **amounts)
    assert resumed == ledger
    assert [resumed.spent(unit) for unit in UNITS] == [ledger.spent(unit) for unit in UNITS]


@given(CHARGES)
def test_the_table_lists_every_field_and_their_sum(charges):
    rows = charged(charges).table()
    assert [row["field"] for row in rows] == [*FIELDS, "total"]
    for column in ("flops", "tokens"):
        assert rows[-1][column] == sum(row[column] for row in rows[:-1])
    if rows[-1]["flops"]:
        assert rows[-1]["share"] == 1.0
    json.dumps(rows)


def test_unmeasured_energy_is_not_shown_as_a_partial_sum():
    ledger = Ledger()
    ledger.charge("train", flops=10, seconds=1.0, joules=5.0)
    assert ledger.table()[-1]["joules"] == 5.0
    ledger.charge("train", flops=10, seconds=1.0)
    assert ledger.entry("train").joules is None
    assert ledger.entry("score").joules == 0.0
    ledger.charge("train", flops=10, seconds=1.0, joules=5.0)
    assert ledger.table()[-1]["joules"] is None


def test_overhead_is_the_share_that_trained_nothing():
    ledger = Ledger()
    assert ledger.overhead() == 0.0
    for field, flops in zip(FIELDS, itertools.repeat(10)):
        ledger.charge(field, flops=flops)
    assert ledger.overhead() == pytest.approx(3 / 5)


@pytest.mark.parametrize(
    ("charge", "message"),
    [
        ({"field": "testing", "flops": 1}, "field must be one of train, eval, score"),
        ({"field": "train", "flops": -1}, "flops must be finite and not negative"),
        ({"field": "train", "seconds": float("nan")}, "seconds must be finite"),
        ({"field": "train", "joules": float("inf")}, "joules must be finite"),
        ({"field": "train", "tokens": 1.5}, "tokens must be a whole number"),
    ],
)
def test_a_charge_that_makes_no_sense_is_refused_and_leaves_nothing_behind(charge, message):
    ledger = Ledger()
    with pytest.raises(ValueError, match=message):
        ledger.charge(charge.pop("field"), **charge)
    assert ledger == Ledger()


def test_a_state_that_is_not_one_is_refused_and_changes_nothing():
    ledger = Ledger()
    ledger.charge("train", flops=7)
    broken = ledger.state_dict()
    del broken["probe"]
    with pytest.raises(ValueError, match="state must have the fields"):
        ledger.load_state_dict(broken)
    negative = ledger.state_dict()
    negative["eval"]["seconds"] = -1.0
    with pytest.raises(ValueError, match="seconds"):
        ledger.load_state_dict(negative)
    assert ledger.spent("flops") == 7
    with pytest.raises(ValueError, match="unit must be one of"):
        ledger.spent("hours")


def test_model_flops_stand_beside_those_executed_and_are_unknown_once_one_charge_came_without():
    ledger = Ledger()
    ledger.charge("train", flops=400, model_flops=300)
    ledger.charge("eval", seconds=1.0)  # no FLOPs: nothing is missing
    assert ledger.table()[-1]["model_flops"] == 300
    assert ledger.spent("flops") == 400
    ledger.charge("train", flops=10)
    assert ledger.entry("train").model_flops is None
    assert ledger.table()[-1]["model_flops"] is None
    with pytest.raises(ValueError, match="model_flops must not exceed flops"):
        ledger.charge("train", flops=10, model_flops=11)


def test_a_ledger_saved_before_model_flops_were_counted_is_read():
    ledger = Ledger()
    ledger.charge("train", flops=400, model_flops=300, seconds=2.0)
    state = ledger.state_dict()
    for entry in state.values():
        del entry["model_flops"]
    again = Ledger()
    again.load_state_dict(state)
    assert again.spent("flops") == 400
    assert again.entry("train").model_flops is None


def test_overhead_is_what_trained_nothing_in_the_budgets_own_unit():
    ledger = Ledger()
    for field, flops in (("train", 100), ("cooldown", 20), ("eval", 3), ("score", 5), ("probe", 2), ("discarded", 50)):
        ledger.charge(field, flops=flops, seconds=flops / 2, tokens=flops)
    assert ledger.overhead_spent("flops") == 10
    assert ledger.overhead_spent("seconds") == 5
    assert ledger.overhead_spent("tokens") == 0
    assert ledger.overhead() == 10 / 130
    with pytest.raises(ValueError, match="unit must be one of"):
        ledger.overhead_spent("joules")
