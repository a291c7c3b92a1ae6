"""The head's loss without logits: torch's loss and torch's gradients, in less memory."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from oracle import assert_as_accurate
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

import pyeff


def problem(shape: tuple[int, ...], d: int, v: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """hidden, weight, targets and bias; some targets are ignored."""
    targets = torch.randint(0, v, shape)
    targets.view(-1)[::5] = -100
    return torch.randn(*shape, d).to(dtype), torch.randn(v, d).to(dtype), targets, torch.randn(v).to(dtype)


def eager(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    logits = linear(hidden, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)
    return loss.view(targets.shape) if reduction == "none" else loss


def gradients(loss: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor, **options: Any) -> list[Tensor]:
    """The loss and its gradients by hidden, weight and bias."""
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    value = loss(leaves[0], leaves[1], targets, bias=leaves[2], **options)
    outer = torch.linspace(0.5, 2, value.numel(), dtype=value.dtype, device=value.device).view(value.shape)
    return [value.detach(), *torch.autograd.grad(value, leaves, outer)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_as_accurate_as_torch_with_logits(
    device: str, dtype: torch.dtype, reduction: str, softcap: float | None
) -> None:
    case, options = problem((3, 40), 32, 300, dtype), {"softcap": softcap, "reduction": reduction}
    exact = gradients(eager, *(t.double() if t.is_floating_point() else t for t in case), **options)
    peer = gradients(eager, *case, **options)
    found = gradients(pyeff.linear_cross_entropy, *(t.to(device) for t in case), **options)
    assert found[0].dtype == torch.float32
    assert [t.dtype for t in found[1:]] == [dtype] * 3
    for what, actual, true, other in zip(("loss", "hidden", "weight", "bias"), found, exact, peer, strict=True):
        assert_as_accurate(actual.cpu(), true, other.to(actual.dtype), multiple=4.0, what=what)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradient_is_that_of_finite_differences(reduction: str) -> None:
    hidden, weight, targets, bias = problem((2, 3), 4, 7, torch.float64)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return pyeff.linear_cross_entropy(h, w, targets, bias=b, softcap=3.0, reduction=reduction)

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("wanted", [w for w in itertools.product([False, True], repeat=3) if any(w)], ids=str)
def test_frozen_tensors_get_no_gradient_and_change_no_other(wanted: tuple[bool, ...]) -> None:
    hidden, weight, targets, bias = problem((7,), 8, 30)
    _, *expected = gradients(pyeff.linear_cross_entropy, hidden, weight, targets, bias, reduction="sum")
    leaves = [t.requires_grad_(w) for t, w in zip((hidden, weight, bias), wanted, strict=True)]
    (pyeff.linear_cross_entropy(hidden, weight, targets, bias=bias, reduction="sum") * 0.5).backward()
    for leaf, asked, gradient in zip(leaves, wanted, expected, strict=True):
        assert (leaf.grad is not None) == asked
        if asked:
            torch.testing.assert_close(leaf.grad, gradient)


def test_ignored_positions_count_for_nothing() -> None:
    hidden, weight, targets, _ = problem((2, 5), 6, 9)
    losses = pyeff.linear_cross_entropy(hidden, weight, targets, reduction="none")
    assert torch.equal(losses[targets == -100], torch.zeros(int((targets == -100).sum())))
    mean = pyeff.linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(mean, losses.sum() / (targets != -100).sum())
    nobody = torch.full_like(targets, -100)
    assert pyeff.linear_cross_entropy(hidden, weight, nobody).isnan()
    assert pyeff.linear_cross_entropy(hidden, weight, nobody, reduction="sum") == 0
    other = targets.masked_fill(targets == -100, 3)
    assert pyeff.linear_cross_entropy(hidden, weight, other, ignore_index=3, reduction="none")[0, 0] == 0


def test_autocast_casts_as_it_does_for_linear() -> None:
    hidden, weight, targets, bias = problem((40,), 16, 60)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(pyeff.linear_cross_entropy, hidden, weight, targets, bias)
    cast = gradients(pyeff.linear_cross_entropy, hidden.bfloat16(), weight.bfloat16(), targets, bias)
    assert [t.dtype for t in found] == [torch.float32] * 4
    for actual, expected in zip(found, cast, strict=True):
        assert torch.equal(actual, expected.float())


def test_repeats_give_the_same_bits() -> None:
    case = problem((60,), 24, 500)
    first, again = (gradients(pyeff.linear_cross_entropy, *case) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("of", ["hidden", "weight", "bias"])
def test_second_derivatives_are_refused_and_never_left_out(of: str) -> None:
    hidden, weight, targets, bias = problem((7,), 8, 30)
    of_head = {"hidden": hidden, "weight": weight, "bias": bias}
    for tensor in of_head.values():
        tensor.requires_grad_()

    def gradient(create_graph: bool) -> Tensor:
        loss = pyeff.linear_cross_entropy(hidden, weight, targets, bias=bias).square()
        # Another path, by which a derivative would come out even without the loss's part.
        return torch.autograd.grad(loss + of_head[of].sin().sum(), of_head[of], create_graph=create_graph)[0]

    assert torch.equal(gradient(True), gradient(False))
    for inputs in (None, (of_head[of],), tuple(of_head.values())):
        with pytest.raises(RuntimeError, match=r"pyeff\.linear_cross_entropy has no second derivatives: take"):
            gradient(True).square().sum().backward(inputs=inputs)


def test_what_is_saved_is_two_numbers_a_token() -> None:
    hidden, weight, targets, bias = problem((64,), 8, 500)
    hidden.requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        pyeff.linear_cross_entropy(hidden, weight.requires_grad_(), targets, bias=bias)
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    for t in (hidden, weight, targets, bias):
        kept.pop(t.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) <= 2 * 4 * 64 + 8  # and the number of tokens


def test_logits_never_exist() -> None:
    code = """
import resource, torch, pyeff
hidden = torch.randn(512, 16, requires_grad=True)
weight = torch.zeros(2**17, 16, requires_grad=True)
targets = torch.zeros(512, dtype=torch.long)
pyeff.linear_cross_entropy(hidden[:1], weight[:64], targets[:1]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pyeff.linear_cross_entropy(hidden, weight, targets).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before - weight.grad.nbytes // 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # Panels, the scoring pass, and the weight's gradient once more where it is added to what is there.
    assert int(done.stdout) <= (64 + 16) * 1024, "the logits are 256 MiB"


@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        ({"reduction": "max"}, ValueError, "reduction must be 'mean', 'sum' or 'none'; got 'max'"),
        ({"targets": torch.zeros(6).long()}, ValueError, r"targets must be \[2, 3\] to fit hidden"),
        ({"targets": [0]}, TypeError, "targets must be a tensor, got list"),
        ({"targets": torch.full((2, 3), 9)}, ValueError, r"targets must be in \[0, 5\)"),
        ({"weight": torch.zeros(5, 3)}, ValueError, r"weight must be \[vocabulary, 4\]"),
        ({"weight": torch.zeros(5, 4).double()}, ValueError, "weight must have the dtype of hidden"),
        ({"hidden": 1.0}, TypeError, "hidden must be a tensor, got float"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must be \[5\]"),
        ({"softcap": -1.0}, ValueError, "softcap must be a positive number"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], complaint: str) -> None:
    fitting = {"hidden": torch.zeros(2, 3, 4), "weight": torch.zeros(5, 4), "targets": torch.zeros(2, 3).long()}
    with pytest.raises(error, match=complaint):
        pyeff.linear_cross_entropy(**{**fitting, **change})


def test_hidden_states_without_features_have_the_loss_of_equal_logits() -> None:
    hidden, weight = torch.zeros(2, 3, 0, requires_grad=True), torch.zeros(5, 0, requires_grad=True)
    loss = pyeff.linear_cross_entropy(hidden, weight, torch.zeros(2, 3).long())
    loss.backward()
    assert loss.item() == pytest.approx(math.log(5))
    assert hidden.grad is not None
    assert hidden.grad.shape == hidden.shape
