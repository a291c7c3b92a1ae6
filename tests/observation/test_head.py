"""A head whose logits never exist: its samples' norms are those of one-sample-at-a-time gradients all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from observed_models import VOCABULARY, Truth, model_named, observed, padded_batch, truth_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pyeff
from pyeff.observation import UnobservableError

EPS = torch.finfo(torch.float32).eps


def next_tokens(batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]


class WithLoss(nn.Module):
    """transformers' base model and head, with the loss in place of the logits."""

    def __init__(self, lm: nn.Module, *, bias: bool = False, softcap: float | None = None) -> None:
        super().__init__()
        self.lm, self.softcap = lm, softcap
        self.bias = nn.Parameter(torch.linspace(-1, 1, VOCABULARY).to(lm.dtype)) if bias else None

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        return self.lm.model(input_ids, attention_mask=attention_mask, use_cache=False, **inputs).last_hidden_state

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        weight = self.lm.lm_head.weight
        return pyeff.linear_cross_entropy(
            hidden, weight, targets, bias=self.bias, softcap=self.softcap, reduction="sum"
        )


class WithLossInside(WithLoss):
    def forward(self, input_ids: Tensor, labels: Tensor, **inputs: Any) -> Tensor:
        return self.loss(super().forward(input_ids, **inputs), labels)


def fused_loss(model: WithLoss, batch: dict[str, Tensor]) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if isinstance(model, WithLossInside):
        return model(**inputs, labels=next_tokens(batch)) / 16
    return model.loss(model(**inputs), next_tokens(batch)) / 16


def plain_loss(model: WithLoss, batch: dict[str, Tensor]) -> Tensor:
    """With logits."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = nn.functional.linear(WithLoss.forward(model, **inputs), model.lm.lm_head.weight, model.bias)
    if model.softcap is not None:
        logits = model.softcap * torch.tanh(logits / model.softcap)
    return nn.functional.cross_entropy(logits.flatten(0, 1), next_tokens(batch).flatten(), reduction="sum") / 16


def assert_agree(actual: Truth, exact: Truth, peer: Truth) -> None:
    """Each parameter's norms and gradient are as close to float64's as one-by-one gradients in float32 are."""
    assert set(actual.norms_sq) == set(exact.norms_sq)
    for name in exact.norms_sq:
        for found, true, other in (
            (actual.norms_sq[name], exact.norms_sq[name], peer.norms_sq[name]),
            (actual.gradient[name], exact.gradient[name], peer.gradient[name]),
        ):
            budget = 4 * (other.double() - true).abs().max() + 4 * EPS * true.abs().max()
            assert (found.double() - true).abs().max() <= budget, name


@pytest.mark.parametrize("kind", [WithLoss, WithLossInside], ids=["outside", "inside"])
@pytest.mark.parametrize("name", ["llama", "llama tied", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": 2.0}], ids=["plain", "bias and softcap"])
def test_norms_are_those_of_single_samples(
    name: str, kind: type[WithLoss], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    batch = padded_batch()
    exact = truth_of(kind(model_named(name), **options), batch, plain_loss)
    peer = truth_of(kind(model_named(name, torch.float32), **options), batch, plain_loss)
    model = kind(model_named(name, dtype), **options)
    seen, actual = observed(model, lambda: fused_loss(model, batch).backward())
    assert seen.unobserved == {}
    assert_agree(actual, exact, peer)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "llama tied"])
def test_norms_on_a_gpu(name: str) -> None:
    batch = padded_batch()
    exact, peer = (truth_of(WithLoss(model_named(name, d)), batch, plain_loss) for d in (torch.float64, torch.float32))
    model = WithLoss(model_named(name, torch.float32)).cuda()
    moved = {key: value.cuda() for key, value in batch.items()}
    seen, _ = observed(model, lambda: fused_loss(model, moved).backward())
    budget = 4 * (peer.grad_norms - exact.grad_norms).abs().max() + 8 * EPS * exact.grad_norms.max()
    assert (seen.grad_norms.cpu().double() - exact.grad_norms).abs().max() <= budget


@pytest.mark.parametrize("name", ["llama", "llama tied"])
def test_packed_samples_and_kept_tokens(name: str) -> None:
    """Samples of one row, and a loss that counts the tokens of some of them unequally."""
    lengths = (4, 1, 6)
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(1, VOCABULARY, (1, n), generator=generator) for n in lengths]
    labels = [torch.cat([ids.new_full((1, 1), -100), ids[:, 1:]], 1) for ids in samples]
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    batch = {"input_ids": torch.cat(samples, 1), "position_ids": positions, "labels": torch.cat(labels, 1)}
    singles = [{"input_ids": i, "labels": y} for i, y in zip(samples, labels, strict=True)]
    exact, peer = (
        torch.cat([truth_of(WithLoss(model_named(name, dtype)), s, plain_loss).grad_norms for s in singles])
        for dtype in (torch.float64, torch.float32)
    )
    model = WithLoss(model_named(name, torch.float32))
    with pyeff.observe(model) as seen:
        fused_loss(model, batch).backward()
    budget = 4 * (peer - exact).abs().max() + 8 * EPS * exact.max()
    assert (seen.grad_norms.double() - exact).abs().max() <= budget


def test_scoring_leaves_no_gradient() -> None:
    batch, model = padded_batch(), WithLossInside(model_named("llama tied", torch.float32))
    with pyeff.observe(model) as training:
        fused_loss(model, batch).backward()
    model.zero_grad(set_to_none=True)
    with pyeff.observe(model, gradient=False) as scoring:
        fused_loss(model, batch).backward()
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(scoring.grad_norms, training.grad_norms)


def test_autocast() -> None:
    """As close to float64 as one-by-one gradients under the same autocast."""

    def under_autocast(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(model: WithLoss, batch: dict[str, Tensor]) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return loss(model, batch)

        return run

    batch = padded_batch()
    exact = truth_of(WithLoss(model_named("llama tied")), batch, plain_loss)
    model = WithLoss(model_named("llama tied", torch.float32))
    peer = truth_of(model, batch, under_autocast(plain_loss))
    seen, actual = observed(model, lambda: under_autocast(fused_loss)(model, batch).backward())
    budget = 4 * (peer.grad_norms - exact.grad_norms).abs().max() + 8 * EPS * exact.grad_norms.max()
    assert (seen.grad_norms - exact.grad_norms).abs().max() <= budget
    assert all(gradient.dtype == torch.float32 for gradient in actual.gradient.values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_head_repeated_by_a_checkpoint_counts_once(reentrant: bool) -> None:
    class Checkpointed(WithLoss):
        def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
            return checkpoint(super().loss, hidden, targets, use_reentrant=reentrant)

    batch, model = padded_batch(), WithLoss(model_named("llama tied", torch.float32))
    with pyeff.observe(model) as plain:
        fused_loss(model, batch).backward()
    model = Checkpointed(model.lm)
    with pyeff.observe(model) as again:
        fused_loss(model, batch).backward()
    torch.testing.assert_close(again.grad_norms, plain.grad_norms)


def test_what_cannot_be_told_apart_is_named() -> None:
    batch, model = padded_batch(), WithLoss(model_named("llama", torch.float32))
    inputs = {name: value for name, value in batch.items() if name != "labels"}

    def shifted_and_flattened() -> Tensor:
        # Rows of tokens, but not of all: which are whose cannot be known.
        return model.loss(model(**inputs)[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    def of_a_reshaped_weight() -> Tensor:
        weight = model.lm.lm_head.weight.view(-1).view(VOCABULARY, -1)
        return pyeff.linear_cross_entropy(model(**inputs), weight, next_tokens(batch))

    for loss, reason in ((shifted_and_flattened, "does not keep the samples"), (of_a_reshaped_weight, "not observed")):
        with pyeff.observe(model):
            total = loss()
            with pytest.raises(UnobservableError, match=rf"lm\.lm_head\.weight: .*{reason}"):
                total.backward()


def test_shifting_hidden_states_keeps_the_samples() -> None:
    batch, model = padded_batch(), WithLoss(model_named("llama", torch.float32))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with pyeff.observe(model) as padded:
        fused_loss(model, batch).backward()
    with pyeff.observe(model) as shifted:
        (model.loss(model(**inputs)[:, :-1], batch["labels"][:, 1:]) / 16).backward()
    torch.testing.assert_close(shifted.grad_norms, padded.grad_norms)


def test_second_derivatives_of_an_observed_head_are_refused_and_never_left_out() -> None:
    class Head(nn.Linear):
        def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
            return pyeff.linear_cross_entropy(hidden, self.weight, targets)

    model = Head(8, 20, bias=False)
    hidden, targets = torch.randn(3, 5, 8), torch.randint(20, (3, 5))
    with pyeff.observe(model):
        # Another path, by which a derivative would come out even without the head's part.
        loss = model(hidden, targets) + model.weight.sin().sum()
        (grad,) = torch.autograd.grad(loss, model.weight, create_graph=True)
        with pytest.raises(RuntimeError, match="has no second derivatives"):
            torch.autograd.grad(grad.square().sum(), model.weight)
