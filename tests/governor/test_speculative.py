from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyeff.governor import best_speculation, speculation, tokens_per_pass

PUBLISHED = {  # (alpha, c): draft length, speed-up, arithmetic factor at equal costs in time and FLOPs
    (0.6, 0.05): (4, 1.92, 2.26),
    (0.7, 0.1): (4, 1.98, 1.95),
    (0.8, 0.2): (4, 1.87, 1.73),
    (0.9, 0.05): (13, 4.67, 1.90),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_the_best_draft_lengths_are_those_known(case):
    best = best_speculation(case[0], draft_time=case[1])
    length, speedup, arithmetic = PUBLISHED[case]
    assert best.draft_length == length
    assert abs(best.speedup - speedup) <= 0.005 * (1 + 1e-9)
    assert abs(best.arithmetic - arithmetic) <= 0.005 * (1 + 1e-9)


def test_a_simulation_emits_as_many_tokens_the_one_of_the_target_included():
    source, passes = random.Random(0), 20_000
    emitted = []
    for _ in range(passes):
        accepted = 0
        while accepted < 4 and source.random() < 0.7:
            accepted += 1
        emitted.append(accepted + 1)
    mean = sum(emitted) / passes
    error = (sum((each - mean) ** 2 for each in emitted) / passes / passes) ** 0.5
    assert abs(tokens_per_pass(0.7, 4) - mean) <= 4 * error


@given(st.floats(0, 1), st.floats(0, 1))
def test_drafting_helps_exactly_where_acceptance_exceeds_its_cost_and_never_saves_arithmetic(acceptance, cost):
    best = best_speculation(acceptance, draft_time=cost)
    if acceptance > cost + 1e-12:
        assert best.draft_length > 0
    elif acceptance < cost - 1e-12:
        assert best.draft_length == 0
    assert best.arithmetic >= 1 - 1e-12
    assert speculation(acceptance, 0, draft_time=cost).speedup == 1
    assert best.flops(2e9) == best.arithmetic * 2e9


def test_arguments_out_of_range_are_named():
    for call, name in (
        (lambda: tokens_per_pass(1.1, 2), "acceptance"),
        (lambda: tokens_per_pass(0.5, -1), "draft_length"),
        (lambda: speculation(0.5, 1, draft_time=-1.0), "draft_time"),
        (lambda: speculation(0.5, 1, draft_time=0.1, draft_flops=float("nan")), "draft_flops"),
    ):
        with pytest.raises(ValueError, match=name):
            call()
