"""The norms are those of one-sample-at-a-time gradients, on the models people train."""

from __future__ import annotations

import pytest
import torch
from observed_models import MODELS, Truth, loss_sum, model_named, observed, padded_batch, truth_of

EPS = torch.finfo(torch.float32).eps


def assert_agree(actual: Truth, exact: Truth, peer: Truth) -> None:
    """Each parameter's norms and gradient are as close to float64's as one-by-one gradients in float32 are.

    Four times their error, as it varies by sample, and one rounding of fp32 at the largest value of the parameter.
    """
    assert set(actual.norms_sq) == set(exact.norms_sq)
    for name, norms_sq in exact.norms_sq.items():
        budget = 4 * (peer.norms_sq[name] - norms_sq).abs().max() + 4 * EPS * norms_sq.abs().max()
        error = (actual.norms_sq[name].double() - norms_sq).abs().max()
        assert error <= budget, f"{name}: {actual.norms_sq[name].tolist()} for {norms_sq.tolist()}"
        gradient = exact.gradient[name]
        budget = 4 * (peer.gradient[name].double() - gradient).abs().max() + 4 * EPS * gradient.abs().max()
        error = (actual.gradient[name].double() - gradient).abs().max()
        assert error <= budget, f"gradient of {name}: error {error:.2e}, granted {budget:.2e}"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_norms_are_those_of_single_samples(name: str, dtype: torch.dtype) -> None:
    batch = padded_batch()
    exact = truth_of(model_named(name), batch)
    peer = truth_of(model_named(name, torch.float32), batch)
    model = model_named(name, dtype)
    seen, actual = observed(model, lambda: loss_sum(model, batch).backward())
    assert seen.unobserved == {}
    assert seen.grad_norms.dtype == torch.float32
    assert_agree(actual, exact, peer)
    budget = 4 * (peer.grad_norms - exact.grad_norms).abs().max() + 4 * EPS * exact.grad_norms.max()
    assert (seen.grad_norms.double() - exact.grad_norms).abs().max() <= budget
