"""What users do to a model while it is observed, and batches that are not what they seem."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import observed_models
import pytest
import torch
from torch import Tensor, nn

import pyeff

BATCH = torch.linspace(-1.0, 2.0, 20).sin().view(5, 4)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


def loss(outputs: Tensor) -> Tensor:
    return outputs.square().sum()


def one_by_one(model: nn.Module, batch: Tensor) -> Tensor:
    model = copy.deepcopy(model)
    norms = []
    for sample in batch:
        model.zero_grad(set_to_none=True)
        loss(model(sample[None])).backward()
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())
    return torch.stack(norms)


class Between(nn.Module):
    """Two linear layers with something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(4, 4), nn.Linear(4, 3), between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x.sum(0),
        lambda x: torch.mean(x, dim=(0,)),
        lambda x: x.amax(-3),
        lambda x: x.transpose(0, 1),
        lambda x: torch.permute(x, (1, 0, 2)).relu().contiguous(),
        lambda x: x.movedim(1, 0) * 2,
        lambda x: torch.stack([x[:, i] for i in range(5)]),
    ],
)
def test_samples_that_left_dimension_0_are_noticed_where_it_is_as_long_as_the_batch(
    between: Callable[[Tensor], Tensor],
) -> None:
    model = Between(between)
    with pytest.raises(pyeff.UnobservableError, match=r"second\.weight.* does not keep the samples"):  # noqa: SIM117
        with pyeff.observe(model):
            loss(model(torch.randn(5, 5, 4))).backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x.transpose(0, 1).relu().transpose(0, 1),
        lambda x: torch.stack([x, x.relu(), x, x, x]).sum(0),
        lambda x: torch.stack([x, x, x.tanh(), x, x])[2],
        lambda x: torch.stack([x, x, x, x, x.tanh()]).unbind(0)[4],
        lambda x: x.transpose(1, 2).softmax(1).transpose(1, 2),
        lambda x: x.sum(1),
        lambda x: (
            x.unflatten(2, (2, 2)).permute(0, 2, 1, 3).flatten(2).mean(1, keepdim=True).expand(-1, 3, -1)[..., :4]
        ),
    ],
)
def test_samples_that_stay_or_come_back_are_observed(between: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, batch = Between(between), torch.randn(5, 5, 4)
    with pyeff.observe(model) as seen:
        loss(model(batch)).backward()
    whole = [p.grad.clone() for p in model.parameters()]
    alone = []
    for sample in range(5):
        model.zero_grad(set_to_none=True)
        loss(model(batch)[sample]).backward()
        alone.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())
    torch.testing.assert_close(seen.grad_norms, torch.stack(alone))
    assert len(whole) == 4


def test_parameters_that_were_not_there_when_the_observation_began_are_named() -> None:
    def thaw(model: nn.Sequential) -> None:
        model[0].requires_grad_(True)

    def append(model: nn.Sequential) -> None:
        model.append(nn.Linear(3, 3))

    def replace(model: nn.Sequential) -> None:
        model[3].weight = nn.Parameter(torch.randn(3, 8))

    for change, names in ((thaw, ("0.weight", "0.bias")), (append, ("4.weight", "4.bias")), (replace, ("3.weight",))):
        model = small()
        model[0].requires_grad_(change is not thaw)
        with pyeff.observe(model):
            change(model)
            total = loss(model(BATCH))
            with pytest.raises(pyeff.UnobservableError, match="when the observation began"):
                total.backward()
        assert all(p.grad is None for p in model.parameters())
        model = small()
        model[0].requires_grad_(change is not thaw)
        with pyeff.observe(model, strict=False) as seen:
            change(model)
            loss(model(BATCH)).backward()
        assert set(seen.unobserved) == set(names)


def test_a_parameter_has_one_observation_at_a_time() -> None:
    model = small()
    with pyeff.observe(model) as seen:
        for inner in (model, model[3]):
            with pytest.raises(ValueError, match="weight is observed already"):
                pyeff.observe(inner).__enter__()
        loss(model(BATCH)).backward()
    torch.testing.assert_close(seen.grad_norms, one_by_one(model, BATCH))
    with pyeff.observe(model[3]):
        pass


def test_observations_of_two_models_may_end_in_any_order() -> None:
    first, second = small(), small()
    one, other = pyeff.observe(first).__enter__(), pyeff.observe(second).__enter__()
    loss(first(BATCH)).backward()
    one.__exit__(None, None, None)
    loss(second(BATCH)).backward()
    other.__exit__(None, None, None)
    for seen, model in ((one, first), (other, second)):
        torch.testing.assert_close(seen.grad_norms, one_by_one(model, BATCH))
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_an_observed_model_is_not_observed(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = small()
    with pyeff.observe(model) as seen:
        other = copied(model)
        loss(other(BATCH)).backward()
        loss(model(BATCH)).backward()
        other(2 * BATCH)
    torch.testing.assert_close(seen.grad_norms, one_by_one(model, BATCH))
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad)


def test_copies_of_experts_run_their_own_forward_pass() -> None:
    torch.manual_seed(0)
    ids = torch.randint(1, observed_models.VOCABULARY, (3, 6))
    model, batch = observed_models.MODELS["mixtral"](), {"input_ids": ids, "labels": ids}
    with pyeff.observe(model):
        other = copy.deepcopy(model)
        loaded = pickle.loads(pickle.dumps(model))
    for copied in (other, loaded):
        torch.testing.assert_close(copied(**batch).loss, model(**batch).loss)
        with pyeff.observe(copied) as seen:
            copied(**batch).loss.backward()
        assert seen.grad_norms.shape[0] == batch["input_ids"].shape[0]


def test_a_batch_may_come_in_a_dictionary_or_a_tuple() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = small()

        def forward(self, batch: dict[str, Tensor] | tuple[Tensor, ...]) -> Tensor:
            return self.model(batch["x"] if isinstance(batch, dict) else batch[0])

    model = Wrapped()
    for batch in ({"x": BATCH, "y": torch.zeros(5)}, (BATCH, torch.zeros(5))):
        with pyeff.observe(model) as seen:
            loss(model(batch)).backward()
        torch.testing.assert_close(seen.grad_norms, one_by_one(model.model, BATCH))
        with pyeff.observe(model) as seen:
            seen.segments(torch.tensor([0, 2, 5]))
            loss(model(batch)).backward()
        assert seen.grad_norms.shape == (2,)
    with pytest.raises(ValueError, match="hand it the batch as an argument, or in a dictionary or tuple"):  # noqa: SIM117
        with pyeff.observe(model):
            model({})


def test_the_noise_scale_of_gradients_that_are_gone_or_changed_is_refused() -> None:
    def clear(model: nn.Module) -> None:
        model.zero_grad(set_to_none=True)

    def zero(model: nn.Module) -> None:
        model.zero_grad(set_to_none=False)

    def clip(model: nn.Module) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    for change in (clear, zero, clip):
        model, smoothed = small(), pyeff.NoiseScale()
        seen = pyeff.observe(model, noise_scale=smoothed).__enter__()
        loss(model(BATCH)).backward()
        change(model)
        with pytest.raises(ValueError, match="no longer what the backward pass left"):
            seen.__exit__(None, None, None)
        assert smoothed.batches == 0
    model = small()
    with pyeff.observe(model) as seen:
        torch.autograd.grad(loss(model(BATCH)), list(model.parameters()))
    torch.testing.assert_close(seen.grad_norms, one_by_one(model, BATCH))
    with pytest.raises(ValueError, match="no longer what the backward pass left"):
        _ = seen.noise_scale
    with pytest.raises(TypeError, match=r"noise_scale must be a pyeff\.NoiseScale or None, got bool"):
        pyeff.observe(model, noise_scale=True)


def test_a_backward_pass_after_the_context_computes_every_gradient() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mix, self.head = nn.Embedding(9, 4), nn.Conv1d(4, 4, 1), nn.Linear(4, 9)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.mix(self.table(ids).transpose(1, 2)).transpose(1, 2))

    model, ids = Tokens(), torch.randint(9, (5, 6))
    with pyeff.observe(model, gradient=False):
        late = loss(model(ids))
    late.backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    loss(model(ids)).backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_borders_of_kept_tokens_are_called_by_their_name() -> None:
    for kept, error in (
        ([0, 1, 2], TypeError),
        (torch.tensor([0.0, 1.0, 2.0]), TypeError),
        (torch.tensor([0, 3, 1]), ValueError),
    ):
        model = small()
        with pyeff.observe(model) as seen:
            seen.segments(torch.tensor([0, 2, 5]), kept=kept)
            with pytest.raises(error, match=r"^kept must"):
                model(BATCH)
