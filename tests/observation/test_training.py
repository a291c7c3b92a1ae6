"""What happens around a step: packing, accumulation, autocast, checkpoints, adapters, refusals, and leaving."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from observed_models import (
    VOCABULARY,
    Truth,
    loss_sum,
    model_named,
    observed,
    padded_batch,
    sample_of,
    truth_of,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pyeff
from pyeff.observation import UnobservableError, estimate_noise_scale

EPS = torch.finfo(torch.float32).eps


def assert_norms(actual: Tensor, exact: Tensor, peer: Tensor) -> None:
    """Within four times the error of one-by-one gradients of the same precision, and fp32's own rounding."""
    budget = 4 * (peer - exact).abs().max() + 8 * EPS * exact.abs().max()
    assert (actual.double() - exact).abs().max() <= budget, f"{actual.tolist()} for {exact.tolist()}"


def both_truths(name: str, batch: dict[str, Tensor]) -> tuple[Truth, Truth]:
    return truth_of(model_named(name), batch), truth_of(model_named(name, torch.float32), batch)


# Packed batches


def packed(lengths: tuple[int, ...]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    samples = [torch.randint(1, VOCABULARY, (1, n), generator=generator) for n in lengths]
    labels = [torch.cat([ids.new_full((1, 1), -100), ids[:, 1:]], 1) for ids in samples]
    batch = {
        "input_ids": torch.cat(samples, 1),
        "position_ids": torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0),
        "labels": torch.cat(labels, 1),
    }
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return batch, [{"input_ids": i, "labels": y} for i, y in zip(samples, labels, strict=True)], borders


@pytest.mark.parametrize("source", ["positions", "cu_seq_lens_q", "segments"])
@pytest.mark.parametrize("name", ["llama tied", "qwen3", "gpt2", "mixtral"])
def test_packed_samples_are_told_apart(name: str, source: str) -> None:
    batch, samples, borders = packed((4, 1, 6))
    single = [truth_of(model_named(name), sample).grad_norms for sample in samples]
    peer = [truth_of(model_named(name, torch.float32), sample).grad_norms for sample in samples]
    model = model_named(name, torch.float32)
    if source == "cu_seq_lens_q":
        batch["cu_seq_lens_q"] = borders
    with pyeff.observe(model) as seen:
        if source == "segments":
            seen.segments(borders)
        loss_sum(model, batch).backward()
    assert_norms(seen.grad_norms, torch.cat(single), torch.cat(peer))


def test_positions_of_a_left_padded_batch_part_nothing() -> None:
    batch = padded_batch(2, 5)
    batch = {name: value.flip(1) for name, value in batch.items()}
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    model = model_named("llama", torch.float32)
    with pyeff.observe(model) as seen:
        loss_sum(model, batch).backward()
    assert seen.grad_norms.shape == (2,)


@pytest.mark.parametrize("borders", [[1, 4, 11], [0, 6, 4, 11], [0, 4, 12], [0, 4, 10]])
def test_borders_that_do_not_fit_are_named_and_nothing_is_changed(borders: list[int]) -> None:
    batch, _, _ = packed((4, 7))
    model = model_named("llama", torch.float32)
    before = copy.deepcopy(model.state_dict())
    with pyeff.observe(model) as seen:
        seen.segments(torch.tensor(borders))
        with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to the number of tokens, 11"):
            loss_sum(model, batch)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# Steps


def test_accumulated_batches_follow_each_other() -> None:
    first, second = padded_batch(3, 7), padded_batch(2, 5)
    exact = [truth_of(model_named("llama tied"), batch) for batch in (first, second)]
    peer = [truth_of(model_named("llama tied", torch.float32), batch) for batch in (first, second)]
    model = model_named("llama tied", torch.float32)
    model.zero_grad()
    with pyeff.observe(model) as seen:
        for batch in (first, second):
            loss_sum(model, batch).backward()
    assert_norms(seen.grad_norms, torch.cat([t.grad_norms for t in exact]), torch.cat([t.grad_norms for t in peer]))
    for name, parameter in model.named_parameters():
        total = exact[0].gradient[name] + exact[1].gradient[name]
        budget = 4 * (peer[0].gradient[name] + peer[1].gradient[name] - total).abs().max() + 8 * EPS * total.abs().max()
        assert (parameter.grad - total).abs().max() <= budget


def test_two_losses_of_two_batches_in_one_backward_pass() -> None:
    first, second = padded_batch(3, 7), padded_batch(2, 5)
    exact = [truth_of(model_named("llama"), batch).grad_norms for batch in (first, second)]
    peer = [truth_of(model_named("llama", torch.float32), batch).grad_norms for batch in (first, second)]
    model = model_named("llama", torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pyeff.observe(model) as seen:
        (loss_sum(model, first) + loss_sum(model, second)).backward()
    assert_norms(seen.grad_norms, torch.cat(exact), torch.cat(peer))


@pytest.mark.parametrize("name", ["llama tied", "gpt2", "mixtral"])
def test_autocast(name: str) -> None:
    """As close to float64 as one-by-one gradients under the same autocast."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_sum(model, batch)

    batch = padded_batch()
    exact = truth_of(model_named(name), batch)
    model = model_named(name, torch.float32)
    if name == "mixtral":
        model.config._experts_implementation = "eager"
    peer = truth_of(model, batch, loss)
    seen, actual = observed(model, lambda: loss(model, batch).backward())
    assert_norms(seen.grad_norms, exact.grad_norms, peer.grad_norms)
    for parameter_name, gradient in exact.gradient.items():
        assert actual.gradient[parameter_name].dtype == torch.float32
        error = (actual.gradient[parameter_name] - gradient).abs().max()
        assert error <= 4 * (peer.gradient[parameter_name] - gradient).abs().max() + 8 * EPS


def test_bfloat16_parameters() -> None:
    batch = padded_batch()
    model = model_named("llama tied").bfloat16()
    exact = truth_of(copy.deepcopy(model).double(), batch)
    peer = truth_of(model, batch)
    seen, _ = observed(model, lambda: loss_sum(model, batch).backward())
    assert_norms(seen.grad_norms, exact.grad_norms, peer.grad_norms)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama tied", "gpt2", "qwen3 moe"])
def test_a_forward_pass_repeated_by_a_checkpoint_counts_once(name: str, reentrant: bool) -> None:
    batch = padded_batch()
    exact, peer = both_truths(name, batch)
    model = model_named(name, torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    for _ in range(2):
        seen, actual = observed(model, lambda: loss_sum(model, batch).backward())
        assert_norms(seen.grad_norms, exact.grad_norms, peer.grad_norms)
    for parameter_name, gradient in exact.gradient.items():
        budget = 4 * (peer.gradient[parameter_name] - gradient).abs().max() + 8 * EPS * gradient.abs().max()
        assert (actual.gradient[parameter_name] - gradient).abs().max() <= budget


def test_a_re_entrant_checkpoint_of_several_waiting_batches_is_refused() -> None:
    layer = nn.Linear(3, 3)
    x = torch.randn(2, 3, requires_grad=True)
    model = _Calls(lambda x: checkpoint(layer, x, use_reentrant=True), layer)
    with pytest.raises(RuntimeError, match="use_reentrant=False"), pyeff.observe(model):
        (model(x).sum() + model(x).sum()).backward()


class _Calls(nn.Module):
    """A model whose forward pass is a function of its input."""

    def __init__(self, function: Callable[[Tensor], Tensor], *modules: nn.Module, **parameters: nn.Parameter) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)
        for name, value in parameters.items():
            self.register_parameter(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_low_rank_adapters() -> None:
    peft = pytest.importorskip("peft")
    batch = padded_batch()

    def adapted(dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model_named("llama"), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape)
        return model.to(dtype)

    exact = truth_of(adapted(torch.float64), batch)
    peer = truth_of(adapted(torch.float32), batch)
    model = adapted(torch.float32)
    seen, actual = observed(model, lambda: loss_sum(model, batch).backward())
    assert all("lora" in name for name in actual.norms_sq)
    assert len(actual.norms_sq) == 8
    assert_norms(seen.grad_norms, exact.grad_norms, peer.grad_norms)


def test_frozen_parameters_have_no_share() -> None:
    batch = padded_batch()

    def frozen(dtype: torch.dtype) -> nn.Module:
        model = model_named("gpt2", dtype)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "ln_" in name or "c_fc.bias" in name or "wpe" in name
        return model

    exact, peer = truth_of(frozen(torch.float64), batch), truth_of(frozen(torch.float32), batch)
    model = frozen(torch.float32)
    seen, actual = observed(model, lambda: loss_sum(model, batch).backward())
    assert set(actual.norms_sq) == set(exact.norms_sq)
    assert_norms(seen.grad_norms, exact.grad_norms, peer.grad_norms)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_forward_passes_without_gradient_are_no_samples() -> None:
    batch = padded_batch()
    model = model_named("llama", torch.float32)
    with pyeff.observe(model) as seen:
        with torch.no_grad():
            loss_sum(model, padded_batch(5, 4))
        loss_sum(model, batch).backward()
    assert seen.grad_norms.shape == (3,)


# Laws


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(4)), power=st.integers(-8, 8))
def test_norms_follow_their_samples_and_the_scale_of_the_loss(order: list[int], power: int) -> None:
    batch = padded_batch(4, 6)
    model = model_named("llama tied", torch.float32)
    seen, _ = observed(model, lambda: loss_sum(model, batch).backward())
    permuted = {name: value[order] for name, value in batch.items()}
    again, _ = observed(model, lambda: (loss_sum(model, permuted) * 2.0**power).backward())
    expected = seen.grad_norms[list(order)] * 2.0**power
    # Scaling by a power of two is exact; only sums over a batch of another order may round differently.
    assert (again.grad_norms - expected).abs().max() <= 64 * EPS * expected.max()


def test_a_spoiled_sample_spoils_its_own_norm_only() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2))
    x = torch.randn(3, 6, 4)
    clean, _ = observed(model, lambda: model(x).square().sum().backward())
    weight = torch.ones(3, 6, 2)
    weight[1, 2, 0] = float("nan")
    spoiled, _ = observed(model, lambda: (model(x).square() * weight).sum().backward())
    assert spoiled.grad_norms.isnan().tolist() == [False, True, False]
    kept = torch.tensor([0, 2])
    assert torch.equal(spoiled.grad_norms[kept], clean.grad_norms[kept])


def test_an_empty_batch_has_no_norms() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.RMSNorm(5))
    seen, actual = observed(model, lambda: model(torch.randn(0, 6, 4)).sum().backward())
    assert seen.grad_norms.shape == (0,)
    assert all((gradient == 0).all() for gradient in actual.gradient.values())


# Refusals


class _Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return 2 * x * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return 2 * g * w, (2 * g * x).flatten(0, -2).sum(0)


def _refused() -> dict[str, tuple[Callable[[], nn.Module], str]]:
    linear = nn.Linear(4, 4)
    weight = nn.Parameter(torch.randn(4))
    table = nn.Parameter(torch.randn(4, 4))
    norm = nn.BatchNorm1d(3)
    models = {
        "recurrent": (nn.GRU(4, 4, batch_first=True), "does not show its steps"),
        "batch norm": (nn.Sequential(norm), "mixes the samples"),
        "attention of torch": (nn.TransformerEncoderLayer(4, 1, 4, 0.0, batch_first=True), "MultiheadAttention"),
        "foreign function": (_Calls(lambda x: _Doubling.apply(x, weight), w=weight), "_DoublingBackward"),
        "einsum": (_Calls(lambda x: torch.einsum("btd,de->bte", x, table), w=table), "is not observed"),
        "in place": (_Calls(lambda x: (x * 1.0).mul_(weight), w=weight), "is not observed"),
        "a function of it": (_Calls(lambda x: x * weight.exp(), w=weight), "ExpBackward"),
        "a product of two": (_Calls(lambda x: F.linear(x, linear.weight * weight), linear, w=weight), "MulBackward"),
        "used twice": (_Calls(lambda x: linear(linear(x)), linear), "used 2 times"),
        "samples added up before": (_Calls(lambda x: linear(x.mean(0)), linear), "does not keep the samples"),
        "time first": (_Calls(lambda x: linear(x.transpose(0, 1)), linear), "does not keep the samples"),
        "both parts of a vector": (_Calls(lambda x: x[..., :2] * weight[:2] + x[..., 2:] * weight[2:], w=weight), "2"),
    }
    return {name: ((lambda m=model: m), match) for name, (model, match) in models.items()}


def test_a_forward_pass_outside_the_context_is_said_in_one_sentence() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.LayerNorm(3))
    loss = model(torch.randn(2, 3)).sum()
    with pytest.raises(UnobservableError, match=r"inside the context, and then backward$"), pyeff.observe(model):
        loss.backward()
    with pyeff.observe(model, strict=False) as seen:
        model(torch.randn(2, 3)).sum().backward()
    assert not seen.unobserved


@pytest.mark.parametrize("name", _refused())
def test_what_cannot_be_observed_is_named_before_any_gradient(name: str) -> None:
    make, match = _refused()[name]
    model = make()
    x = torch.randn(2, 3, 4)

    def step() -> None:
        y = model(x)
        y = y[0] if isinstance(y, tuple) else y
        (y * torch.arange(y.numel()).view_as(y)).square().sum().backward()

    with pytest.raises(UnobservableError, match=match), pyeff.observe(model):
        step()
    assert all(p.grad is None for p in model.parameters())
    step()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with pyeff.observe(model, strict=False) as seen:
        step()
    assert any(match in reason for reason in seen.unobserved.values())
    for parameter_name, parameter in model.named_parameters():
        if parameter_name in expected:
            gradient = expected[parameter_name]
            assert (parameter.grad - gradient).abs().max() <= 64 * EPS * gradient.abs().max()


def test_without_strict_the_rest_is_exact() -> None:
    weight = nn.Parameter(torch.rand(4) + 0.5)
    linear = nn.Linear(4, 3)
    model = _Calls(lambda x: linear(x * weight.exp()), linear, w=weight)
    batch = {"x": torch.randn(3, 5, 4)}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"]).square().sum()

    with pyeff.observe(model, strict=False, by_parameter=True) as seen:
        loss(model, batch).backward()
    single = []
    for sample in range(3):
        model.zero_grad()
        loss(model, sample_of(batch, sample)).backward()
        single.append(torch.stack([linear.weight.grad.square().sum(), linear.bias.grad.square().sum()]).sum().sqrt())
    assert list(seen.unobserved) == ["w"]
    assert set(seen.by_parameter) == {"parts.0.weight", "parts.0.bias"}
    torch.testing.assert_close(seen.grad_norms, torch.stack(single), rtol=64 * EPS, atol=0)


def test_relative_positions_shared_by_all_samples_are_refused_whatever_the_batch_size() -> None:
    table = nn.Embedding(8, 4)
    linear = nn.Linear(4, 4)

    def forward(x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1])
        bias = table((steps[:, None] - steps[None, :]).abs())  # [T, T, 4]
        return torch.einsum("btd,tsd->bsd", linear(x), bias)

    model = _Calls(forward, table, linear)
    for samples in (2, 3):
        with pyeff.observe(model, strict=False) as seen:
            model(torch.randn(samples, 3, 4)).square().sum().backward()
        assert set(seen.unobserved) == {"parts.0.weight"}


def test_a_table_that_has_as_many_rows_as_the_batch_is_no_batch() -> None:
    """Relative positions go through linear layers too; as many of them as samples or tokens prove nothing."""
    table = nn.Parameter(torch.randn(6, 4))
    norm, linear = nn.LayerNorm(4), nn.Linear(4, 4)
    model = _Calls(lambda x: x + linear(norm(table)).sum(0) + linear.bias.new_ones(4), norm, linear, w=table)
    with pyeff.observe(model, strict=False) as seen:
        model(torch.randn(2, 3, 4)).square().sum().backward()
    assert set(seen.unobserved) == {n for n, _ in model.named_parameters()}


def test_queries_repeated_for_each_sample_are_samples() -> None:
    torch.manual_seed(0)
    queries, linear = nn.Parameter(torch.randn(2, 4)), nn.Linear(4, 4)

    def forward(x: Tensor) -> Tensor:
        return linear(queries.unsqueeze(0).expand(x.shape[0], -1, -1)) @ x.transpose(1, 2)

    model, x = _Calls(forward, linear, w=queries), torch.randn(2, 3, 4)
    single = [torch.stack([g.square().sum() for g in _gradients(model, x[s : s + 1])]).sum().sqrt() for s in range(2)]
    with pyeff.observe(model) as seen:
        model(x).square().sum().backward()
    torch.testing.assert_close(seen.grad_norms, torch.stack(single), rtol=64 * EPS, atol=0)


def _gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))


def test_a_compiled_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].compile()
    with pytest.raises(ValueError, match="module '0' is compiled"), pyeff.observe(model):
        pass
    with pytest.raises(ValueError, match="is compiled"), pyeff.observe(torch.compile(nn.Linear(2, 2))):
        pass


def test_a_second_gradient_of_one_forward_pass_is_refused() -> None:
    model = nn.Linear(3, 2)
    with pyeff.observe(model):
        loss = model(torch.randn(2, 3)).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(UnobservableError, match="computed twice"):
            loss.backward()


def test_a_model_without_anything_to_train_is_refused() -> None:
    model = nn.Linear(3, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to observe"), pyeff.observe(model):
        pass
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got int"):
        pyeff.observe(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="norms=False"):
        pyeff.observe(model, norms=False)


# Leaving


def fingerprint(model: nn.Module) -> dict[str, Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_parameters")
    found = {
        name: ({hook: dict(vars(module)[hook]) for hook in hooks}, sorted(vars(module)), type(module).forward)
        for name, module in model.named_modules()
    }
    return {**found, **{name: (id(p), p._backward_hooks or None) for name, p in model.named_parameters()}}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ["llama tied", "mixtral"])
def test_leaving_restores_the_model(name: str, fails: bool) -> None:
    batch = padded_batch()
    model = model_named(name, torch.float32)
    loss_sum(model, batch).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    before = fingerprint(model)

    def step() -> None:
        with pyeff.observe(model):
            loss_sum(model, batch).backward()
            if fails:
                raise KeyError("an error of the user's own")

    if fails:
        with pytest.raises(KeyError):
            step()
    else:
        step()
    assert str(fingerprint(model)) == str(before)
    assert not torch.overrides._get_current_function_mode_stack()
    model.zero_grad()
    loss_sum(model, batch).backward()
    assert all(torch.equal(p.grad, expected[n]) for n, p in model.named_parameters())


def test_an_observation_is_entered_once_and_read_after_a_backward_pass() -> None:
    model = nn.Linear(3, 2)
    seen = pyeff.observe(model)
    with seen, pytest.raises(RuntimeError, match="no backward pass"):
        seen.grad_norms
    with pytest.raises(RuntimeError, match="entered once"), seen:
        pass
    with pytest.raises(RuntimeError, match="by_parameter=True"):
        seen.by_parameter


def test_no_gradient_of_a_sample_is_stored() -> None:
    """The samples' weight gradients together would take 128 MiB; nothing larger than 32 MiB is ever allocated."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        nbytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for t in result if isinstance(result, tuple | list) else (result,):
                if isinstance(t, Tensor):
                    self.nbytes = max(self.nbytes, t.untyped_storage().nbytes())
            return result

    samples, width = 512, 256
    model = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
    x = torch.randn(samples, 2, width)
    largest = Largest()
    with largest, pyeff.observe(model) as seen:
        model(x).square().sum().backward()
    assert seen.grad_norms.shape == (samples,)
    assert samples * width * width * 4 == 128 << 20
    assert 0 < largest.nbytes <= 32 << 20


# The noise scale


def test_the_noise_scale_is_unbiased() -> None:
    """Means over many batches of samples with known mean and covariance, within four standard errors."""
    generator = torch.Generator().manual_seed(0)
    mean, spread, samples, batches = torch.tensor([0.5, -1.0, 0.25]), torch.tensor([1.0, 2.0, 0.5]), 4, 4000
    draws = (mean + spread * torch.randn(batches, samples, 3, generator=generator)).double() / samples
    estimates = [estimate_noise_scale(float(d.square().sum()), float(d.sum(0).square().sum()), samples) for d in draws]
    for name, truth in {"trace": spread.square().sum(), "signal": mean.square().sum()}.items():
        values = torch.tensor([getattr(estimate, name) for estimate in estimates], dtype=torch.float64)
        assert (values.mean() - truth).abs() <= 4 * values.std() / batches**0.5


def test_the_noise_scale_comes_from_the_gradient_that_the_shares_add_up_to() -> None:
    batch = padded_batch(4, 6)
    exact = truth_of(model_named("llama tied"), batch)
    norms_sq = float(exact.grad_norms.square().sum())
    batch_norm_sq = float(sum(g.square().sum() for g in exact.gradient.values()))
    expected = estimate_noise_scale(norms_sq, batch_norm_sq, 4)
    model = model_named("llama tied", torch.float32)
    smoothed = pyeff.NoiseScale(half_life=5)
    with pyeff.observe(model, noise_scale=smoothed) as seen:
        for half in (slice(0, 2), slice(2, 4)):
            loss_sum(model, {name: value[half] for name, value in batch.items()}).backward()
    assert seen.noise_scale.samples == 4
    assert abs(seen.noise_scale.trace - expected.trace) <= 1e3 * EPS * abs(expected.trace)
    assert abs(smoothed.value - seen.noise_scale.value) <= 1e3 * EPS * abs(expected.value)
    restored = pyeff.NoiseScale()
    restored.load_state_dict(smoothed.state_dict())
    assert restored == smoothed
    with pyeff.observe(model) as late:
        loss_sum(model, batch).backward()
    with pytest.raises(ValueError, match="set_to_none=True"):
        late.noise_scale
