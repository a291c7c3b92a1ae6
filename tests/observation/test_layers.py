"""Each kind of layer by itself, against gradients of single samples."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from observed_models import gradient_of, observed, truth_of
from oracle import assert_as_accurate
from torch import Tensor, nn

import pyeff


class Gains(nn.Module):
    """Parameters that no module of torch's stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(1, 1, 6))
        self.positions = nn.Parameter(torch.randn(1, 8, 6))
        self.gain = nn.Parameter(torch.randn(6))
        self.scalar = nn.Parameter(torch.randn(()))
        self.matrix = nn.Parameter(torch.randn(6, 6))
        self.norm = nn.RMSNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1)
        x = x + self.positions[:, : x.shape[1]]
        # The same norm twice: its gradients add up before they are squared.
        x = self.norm(self.norm(x) * (1.0 + self.gain.float()).to(x.dtype)) @ self.matrix
        return F.gelu(x * self.scalar) @ self.matrix.new_ones(6, 3)


class Positions(nn.Module):
    """Positions as one row of indices without a dimension for the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.table(torch.arange(x.shape[1])))


def _tied_projection() -> nn.Module:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 6, padding_idx=2)

        def forward(self, x: Tensor) -> Tensor:
            ids = (x[..., 0].abs() * 100).long() % 11
            return torch.tanh(self.embedding(ids)) @ self.embedding.weight.T

    return Tied()


class Scaled(nn.Module):
    """Parameters that are scaled before they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))
        self.gain = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 0.5 * self.weight.to(x.dtype)) * (self.gain * 3 + 1)


def _evaluated(norm: nn.Module) -> nn.Module:
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return norm.eval()


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (3, 7, 6)),
    "linear of one token": (lambda: nn.Linear(6, 5, bias=False), (3, 6)),
    "layer norm": (lambda: nn.LayerNorm(6), (3, 7, 6)),
    "layer norm of two dimensions": (lambda: nn.LayerNorm((2, 6)), (3, 7, 2, 6)),
    "layer norm without offset": (lambda: nn.LayerNorm(6, bias=False), (3, 7, 6)),
    "rms norm": (lambda: nn.RMSNorm(6), (3, 7, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (3, 4, 9)),
    "conv1d in groups": (lambda: nn.Conv1d(4, 6, 3, groups=2, dilation=2), (3, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0)), (3, 4, 6, 5)),
    "conv2d in groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding="same", bias=False), (3, 4, 6, 5)),
    "depthwise conv2d": (lambda: nn.Conv2d(4, 8, 3, groups=4), (3, 4, 6, 5)),
    "batch norm in evaluation": (lambda: _evaluated(nn.BatchNorm2d(4)), (3, 4, 6, 5)),
    "batch norm of rows in evaluation": (lambda: _evaluated(nn.BatchNorm1d(6)), (3, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (3, 4, 6, 5)),
    "group norm of rows": (lambda: nn.GroupNorm(2, 6), (3, 6)),
    "scaled": (Scaled, (3, 4, 6)),
    "gains": (Gains, (3, 4, 6)),
    "positions": (Positions, (3, 4, 6)),
    "tied": (_tied_projection, (3, 12, 6)),
}


def squares(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    y = model(batch["x"])
    return (y * (y - torch.arange(y.shape[-1], dtype=y.dtype))).sum()


@pytest.mark.parametrize("name", LAYERS)
def test_norms_are_those_of_single_samples(name: str) -> None:
    torch.manual_seed(1)
    make, shape = LAYERS[name]
    exact_model = make().double()
    with torch.no_grad():
        for parameter in exact_model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    x = torch.randn(shape, dtype=torch.float64)
    exact = truth_of(exact_model, {"x": x}, squares)
    peer = truth_of(exact_model.float(), {"x": x.float()}, squares)
    model = exact_model.float()
    _, actual = observed(model, lambda: squares(model, {"x": x.float()}).backward())
    eps = torch.finfo(torch.float32).eps
    assert set(actual.norms_sq) == set(exact.norms_sq)
    for parameter_name, norms_sq in exact.norms_sq.items():
        assert (norms_sq > 0).any()
        budget = 4 * (peer.norms_sq[parameter_name] - norms_sq).abs().max() + 8 * eps * norms_sq.max()
        assert (actual.norms_sq[parameter_name].double() - norms_sq).abs().max() <= budget, parameter_name
        gradient = exact.gradient[parameter_name]
        budget = 4 * (peer.gradient[parameter_name].double() - gradient).abs().max() + 8 * eps * gradient.abs().max()
        assert (actual.gradient[parameter_name].double() - gradient).abs().max() <= budget, parameter_name


@pytest.mark.parametrize("name", LAYERS)
def test_second_derivatives_are_refused_and_never_left_out(name: str) -> None:
    torch.manual_seed(1)
    make, shape = LAYERS[name]
    model = make()
    parameters = list(model.parameters())

    def gradients(create_graph: bool) -> tuple[Tensor, ...]:
        # Another path, by which a derivative would come out even without the layer's part.
        loss = squares(model, {"x": x}) + sum(p.sin().sum() for p in parameters)
        return torch.autograd.grad(loss, parameters, create_graph=create_graph)

    x = torch.randn(shape)
    with pyeff.observe(model):
        for once, again in zip(gradients(False), gradients(True), strict=True):
            assert torch.equal(once, again)
            with pytest.raises(RuntimeError, match=r"a layer that pyeff\.observe measures has no second derivatives"):
                torch.autograd.grad(again.square().sum(), parameters, allow_unused=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_an_rms_norm_without_eps_takes_the_one_torch_takes(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    # Rows so small that the rounding unit of a 16-bit type would dominate their mean square, and float32's does not.
    x, slopes = (1e-2 * torch.randn(3, 5, 6)).to(dtype), torch.randn(3, 5, 6)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (model(batch["x"]) * batch["slopes"].to(model.weight.dtype)).sum()

    def example(rows: torch.dtype) -> dict[str, Tensor]:
        return {"x": x.to(rows), "slopes": slopes.to(dtype).to(rows)}

    exact_model = nn.RMSNorm(6, eps=torch.finfo(torch.float32).eps, dtype=torch.float64)
    exact = truth_of(exact_model, example(torch.float64), loss)
    model = nn.RMSNorm(6, dtype=dtype)
    peer = gradient_of(model, loss(model, example(dtype)))
    _, actual = observed(model, lambda: loss(model, example(dtype)).backward())
    assert_as_accurate(actual.gradient["weight"], exact.gradient["weight"], peer["weight"])


@pytest.mark.parametrize("gradient", [True, False])
def test_images_of_one_sample_count_together(gradient: bool) -> None:
    def model() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))

    x, cuts = torch.randn(6, 2, 6, 6), [0, 2, 2, 5, 6]
    norms = []
    for dtype in (torch.float64, torch.float32):
        plain = model().to(dtype)
        shares = [gradient_of(plain, plain(x[a:b].to(dtype)).square().sum()) for a, b in pairwise(cuts)]
        norms.append(torch.stack([torch.stack([g.square().sum() for g in share.values()]).sum() for share in shares]))
    observed_model = model()
    with pyeff.observe(observed_model, gradient=gradient) as seen:
        seen.segments(torch.tensor(cuts))
        observed_model(x).square().sum().backward()
    assert_as_accurate(seen.grad_norms, norms[0].sqrt(), norms[1].sqrt(), multiple=8.0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("make", [lambda: _evaluated(nn.BatchNorm2d(4)), lambda: nn.GroupNorm(2, 4)], ids=["b", "g"])
def test_norms_by_channel_leave_value_type_and_layout_as_they_are(
    make: Callable[[], nn.Module], dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(3)
    norm = make()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(3, 4, 5, 6).to(dtype).contiguous(memory_format=memory_format)
    norm = norm.to(dtype)
    plain = norm(x)
    with pyeff.observe(norm):
        seen = norm(x)
    assert (seen.dtype, seen.stride()) == (plain.dtype, plain.stride())
    # One more rounding, of what is normalised, before the gain and the offset.
    eps = torch.finfo(dtype).eps
    budget = 4 * eps * (plain.abs().max() + norm.bias.abs().max())
    assert (seen - plain).abs().max() <= budget


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_norm_by_channel_may_be_trained_in_part(frozen: str) -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)).double()
    getattr(model[1], frozen).requires_grad_(False)
    batch = {"x": torch.randn(3, 4, 5, 6, dtype=torch.float64)}
    exact = truth_of(model, batch, squares)
    _, actual = observed(model, lambda: squares(model, batch).backward())
    assert set(actual.norms_sq) == set(exact.norms_sq)
    for name, norms_sq in exact.norms_sq.items():
        torch.testing.assert_close(actual.norms_sq[name].double(), norms_sq)


def test_a_norm_by_channel_fed_with_moved_samples_is_refused() -> None:
    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.transpose(0, 1).transpose(1, 2).contiguous())

    model = Moved()
    x = torch.randn(4, 4, 4)
    with pytest.raises(pyeff.UnobservableError, match="dimension 0 was moved"), pyeff.observe(model):
        model(x).square().sum().backward()
