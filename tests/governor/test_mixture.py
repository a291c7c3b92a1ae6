from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyeff.governor import AdoMixture, CadsMixture

NAMES = ("a", "b", "c")
PRIOR = {"a": 1.0, "b": 2.0, "c": 1.0}


def curve(check, power):
    return 1.0 + (1.0 + check) ** -power


def test_ado_keeps_the_prior_until_there_are_curves_and_then_follows_the_loss_that_falls():
    mixture = AdoMixture(NAMES, prior=PRIOR, refit_every=1)
    for check in range(20):
        if check < 5:
            assert mixture.weights == {"a": 0.25, "b": 0.5, "c": 0.25}
        losses = {"a": 3.0 - 0.05 * check, "b": 2.0, "c": curve(check, 3.0)}
        mixture = mixture.observed(counts={"a": 1.0, "b": 2.0, "c": 1.0}, losses=losses)
    assert mixture.weights["a"] > 0.5 > 0.25 > mixture.weights["b"]


def test_cads_moves_towards_what_the_held_out_rate_rewards():
    mixture = CadsMixture(NAMES, prior=PRIOR)
    for _ in range(300):
        mixture = mixture.observed(counts={}, losses={}, rate=1.0 + mixture.weights["c"])
    total = sum(map(math.exp, mixture.logits))
    assert math.exp(mixture.logits[2]) / total > 0.25


@given(st.lists(st.floats(-10, 10), max_size=12), st.integers(0, 100))
def test_weights_are_probabilities_above_their_floor_and_repeat_themselves(rates, seed):
    def run():
        mixture = CadsMixture(NAMES, prior=PRIOR, seed=seed)
        for rate in rates:
            mixture = mixture.observed(counts={}, losses={}, rate=rate)
        return mixture.weights

    weights = run()
    assert sum(weights.values()) == pytest.approx(1.0)
    assert min(weights.values()) >= CadsMixture(NAMES, prior=PRIOR).floor * (1 - 1e-12)
    assert weights == run()


@pytest.mark.parametrize("rule", [AdoMixture, CadsMixture])
@pytest.mark.parametrize(
    ("names", "prior", "message"), [((), {}, "names"), (("a",), {}, "'a' has none"), (("a",), {"a": 0.0}, "positive")]
)
def test_sources_without_a_size_are_refused(rule, names, prior, message):
    with pytest.raises(ValueError, match=message):
        rule(names, prior=prior)
