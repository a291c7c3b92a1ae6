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
