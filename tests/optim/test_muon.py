"""Muon is torch.optim.Muon, with a momentum of a byte a parameter."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_as_accurate
from torch import Tensor, nn

from pyeff.ops._optimizer_states import decode_moment
from pyeff.optim import AdamW8bit, Muon8bit, newton_schulz

torch_muon = importlib.import_module("torch.optim._muon")
SHAPES = [(24, 70), (70, 24), (48, 48), (1, 9)]
OPTIONS: list[dict[str, Any]] = [
    {"lr": 0.02},
    {"lr": 0.02, "nesterov": False, "momentum": 0.8, "weight_decay": 0.0},
    {"lr": 1e-3, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 3},
    {"lr": 1e-2, "adjust_lr_fn": "original", "ns_coefficients": (2.0, -1.5, 0.5)},
]


def orthogonalised(grad: Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float) -> Tensor:
    """The published iteration in the precision of its argument."""
    a, b, c = ns_coefficients
    x = grad.T if grad.shape[0] > grad.shape[1] else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(ns_steps):
        xx = x @ x.T
        x = a * x + (b * xx + c * xx @ xx) @ x
    return x.T if grad.shape[0] > grad.shape[1] else x


@pytest.fixture
def in_its_own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's Muon orthogonalises in bf16 whatever it is given, and would then be exact to three digits."""
    monkeypatch.setattr(torch_muon, "_zeropower_via_newtonschulz", orthogonalised)


def start() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(shape, generator=generator) * 10.0 ** (step % 3 - 1) for shape in SHAPES]


def neighbour(code: Tensor, by: int) -> Tensor:
    """The code so many levels on, or the last one."""
    return (code.view(torch.int8).int() + by).clamp(-127, 127).to(torch.int8).view(torch.uint8)


def run(cls: Any, dtype: torch.dtype, steps: int = 12, **options: Any) -> tuple[list[nn.Parameter], Any]:
    params = [nn.Parameter(x.to(dtype)) for x in start()]
    optimizer = cls(params, **options)
    for step in range(steps):
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = g.to(dtype)
        optimizer.step()
    return params, optimizer


# ---- the iteration


@pytest.mark.parametrize("shape", [*SHAPES, (64, 200), (3, 3)])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12, 1e30])
def test_singular_values_end_near_one(shape: tuple[int, int], size: float) -> None:
    m = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * size
    found = newton_schulz(m, eps=1e-30)
    exact = orthogonalised(m.double(), (3.4445, -4.775, 2.0315), 5, 1e-30)
    small = m / size  # squares of 1e30 would not fit where the peer adds them up
    assert_as_accurate(found, exact, orthogonalised(small, (3.4445, -4.775, 2.0315), 5, 1e-30))
    s = torch.linalg.svdvals(small.double())
    values = torch.linalg.svdvals(found.double())
    # The quintic never leaves this interval for what starts above a hundredth of the norm.
    if (s / s.norm()).min() > 0.01:
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_torchs_own_iteration_is_the_same_to_the_rounding_of_bf16() -> None:
    m = start()[0]
    theirs = torch_muon._zeropower_via_newtonschulz(m, (3.4445, -4.775, 2.0315), 5, 1e-7).float()
    exact = orthogonalised(m.double(), (3.4445, -4.775, 2.0315), 5, 1e-7)
    assert_as_accurate(newton_schulz(m), exact, orthogonalised(m, (3.4445, -4.775, 2.0315), 5, 1e-7))
    assert_as_accurate(theirs, exact, newton_schulz(m.bfloat16()).float(), multiple=4.0)


def test_a_matrix_of_zeros_or_of_nothing_stays_one() -> None:
    for shape in ((4, 7), (0, 5), (5, 0)):
        assert torch.equal(newton_schulz(torch.zeros(shape)), torch.zeros(shape))


def test_what_cannot_be_orthogonalised_is_refused() -> None:
    for shape in ((), (4,), (2, 3, 4)):
        with pytest.raises(ValueError, match="m must be a matrix"):
            newton_schulz(torch.ones(shape))
    with pytest.raises(TypeError, match="m must be floating point"):
        newton_schulz(torch.ones(3, 3, dtype=torch.int64))


# ---- the optimizer


@pytest.mark.usefixtures("in_its_own_precision")
@pytest.mark.parametrize("options", OPTIONS)
def test_fp32_states_are_torchs_optimizer_to_the_rounding(options: dict[str, Any]) -> None:
    ours, our = run(Muon8bit, torch.float32, states="fp32", **options)
    theirs, their = run(torch.optim.Muon, torch.float32, **options)
    exact, right = run(torch.optim.Muon, torch.float64, **options)
    for p, q, x in zip(ours, theirs, exact, strict=True):
        assert_as_accurate(p.detach(), x.detach(), q.detach())
        moments = (o.state[y]["momentum_buffer"] for o, y in ((our, p), (right, x), (their, q)))
        assert_as_accurate(*moments, what="momentum")


@pytest.mark.parametrize("options", OPTIONS)
def test_torchs_optimizer_as_it_is_comes_no_nearer(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = run(Muon8bit, torch.float32, states="fp32", **options)
    theirs, _ = run(torch.optim.Muon, torch.float32, **options)
    monkeypatch.setattr(torch_muon, "_zeropower_via_newtonschulz", orthogonalised)
    exact, _ = run(torch.optim.Muon, torch.float64, **options)
    for p, q, x in zip(ours, theirs, exact, strict=True):
        assert (p - x).abs().max() <= (q - x).abs().max()


@pytest.mark.usefixtures("in_its_own_precision")
@pytest.mark.parametrize("options", OPTIONS)
def test_each_step_with_8_bits_is_torchs_from_the_momentum_that_was_kept(options: dict[str, Any]) -> None:
    """The error of a code comes in between steps and never inside one."""
    ours = [nn.Parameter(x) for x in start()]
    theirs = [nn.Parameter(x.clone()) for x in start()]
    exact = [nn.Parameter(x.double()) for x in start()]
    optimizer = Muon8bit(ours, **options)
    peer, right = (torch.optim.Muon(own, **options) for own in (theirs, exact))
    for step in range(8):
        for p, q, x, g in zip(ours, theirs, exact, gradients(step), strict=True):
            p.grad, q.grad, x.grad = g, g.clone(), g.double()
        for one in (optimizer, peer, right):
            one.step()
        for p, q, x in zip(ours, theirs, exact, strict=True):
            assert_as_accurate(p.detach(), x.detach(), q.detach())
            state = optimizer.state[p]
            code, scale = state["momentum_buffer_code"], state["momentum_buffer_scale"]
            kept, above, below = (decode_moment(neighbour(code, by), scale, 256) for by in (0, 1, -1))
            moment = right.state[x]["momentum_buffer"]
            # Within a level of the exact momentum, beside a handful of roundings of the largest.
            rounding = 4 * torch.finfo(torch.float32).eps * moment.abs().max()
            assert (moment <= above + rounding).all()
            assert (moment >= below - rounding).all()
            peer.state[q]["momentum_buffer"].copy_(kept)
            moment.copy_(kept)
            with torch.no_grad():
                q.copy_(p)
                x.copy_(p)


@settings(max_examples=20, deadline=None)
@given(st.integers(-40, 40), st.integers(1, 20), st.integers(1, 300), st.sampled_from(["8bit", "fp32"]))
def test_the_size_of_gradients_does_not_matter(exponent: int, rows: int, columns: int, states: str) -> None:
    """To the bit for powers of two: codes are relative to their scales, and the direction to its norm."""
    ends = []
    for size in (1.0, 2.0**exponent):
        p = nn.Parameter(torch.ones(rows, columns))
        optimizer = Muon8bit([p], lr=0.1, states=states, eps=0.0)
        for step in range(3):
            p.grad = torch.randn(rows, columns, generator=torch.Generator().manual_seed(step)) * size
            optimizer.step()
        ends.append(p.detach())
    assert torch.equal(*ends)


def test_a_nan_spoils_its_matrix_as_in_torch_and_no_other() -> None:
    for cls in (Muon8bit, torch.optim.Muon):
        params = [nn.Parameter(x) for x in start()[:2]]
        for p, g in zip(params, gradients(0), strict=False):
            p.grad = g.clone()
        params[0].grad[3, 3] = torch.nan
        cls(params).step()
        assert params[0].isnan().all()
        assert params[1].isfinite().all()


def test_training_ends_within_the_spread_of_seeds_of_fp32_states() -> None:
    losses: dict[str, list[float]] = {"8bit": [], "fp32": []}
    untrained = 0.0
    for seed in range(3):
        for states, found in losses.items():
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(24, 70), nn.Tanh(), nn.Linear(70, 5))
            weights = [p for p in model.parameters() if p.ndim == 2]
            rest = [p for p in model.parameters() if p.ndim == 1]
            both = [Muon8bit(weights, lr=0.02, states=states), AdamW8bit(rest, lr=3e-3, states=states)]
            last = []
            for step in range(60):
                x = torch.randn(64, 24, generator=torch.Generator().manual_seed(step))
                loss = nn.functional.cross_entropy(model(x), (x[:, :5] + x[:, 5:10]).argmax(1))
                untrained = untrained or loss.item()
                model.zero_grad()
                loss.backward()
                for one in both:
                    one.step()
                last.append(loss.item())
            found.append(sum(last[-10:]) / 10)
    assert max(losses["fp32"]) < untrained / 2, "the task must be learned for this to mean anything"
    assert abs(sum(losses["8bit"]) - sum(losses["fp32"])) / 3 <= max(losses["fp32"]) - min(losses["fp32"])


@pytest.mark.usefixtures("in_its_own_precision")
@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_states_of_torchs_optimizer_are_read(states: str) -> None:
    options = {"lr": 0.01, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 4}
    theirs, their = run(torch.optim.Muon, torch.float32, **options)
    ours = [nn.Parameter(p.detach().clone()) for p in theirs]
    optimizer = Muon8bit(ours, states=states)
    optimizer.load_state_dict(their.state_dict())
    assert {name: optimizer.param_groups[0][name] for name in options} == options
    exact = [nn.Parameter(p.detach().double()) for p in theirs]
    right = torch.optim.Muon(exact, **options)
    for p, q, x, g in zip(ours, theirs, exact, gradients(50), strict=True):
        state = optimizer.state[p]
        if states == "8bit":
            kept = decode_moment(state["momentum_buffer_code"], state["momentum_buffer_scale"], 256)
            their.state[q]["momentum_buffer"].copy_(kept)
        right.state[x]["momentum_buffer"] = their.state[q]["momentum_buffer"].double()
        p.grad, q.grad, x.grad = g, g.clone(), g.double()
    for one in (optimizer, their, right):
        one.step()
    for p, q, x in zip(ours, theirs, exact, strict=True):
        assert_as_accurate(p.detach(), x.detach(), q.detach())


def test_a_state_of_a_byte_a_parameter_is_all_there_is() -> None:
    p = nn.Parameter(torch.ones(512, 512))
    p.grad = torch.randn(512, 512)
    optimizer = Muon8bit([p])
    optimizer.step()
    assert sum(x.nbytes for x in optimizer.state[p].values()) == p.numel() * (1 + 4 / 256) + 8


@pytest.mark.parametrize("shape", [(5,), (), (2, 3, 4), (8, 4, 3, 3)])
def test_what_is_no_matrix_is_refused_with_a_place_to_go(shape: tuple[int, ...]) -> None:
    optimizer = Muon8bit([nn.Parameter(torch.ones(3, 3))])
    with pytest.raises(ValueError, match=r"params\[0\] of group 1 has shape .* matrices only; give it to AdamW8bit"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(shape))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"ns_steps": 100}, ValueError, r"ns_steps must be in \[0, 100\)"),
        ({"ns_steps": 2.5}, TypeError, "ns_steps must be a whole number"),
        ({"ns_coefficients": (1.0, 2.0)}, ValueError, "ns_coefficients must be three numbers"),
        ({"ns_coefficients": (1.0, 2.0, "a")}, ValueError, "ns_coefficients must be three numbers"),
        ({"momentum": None}, TypeError, "momentum must be a number; got None"),
        ({"ns_coefficients": (1.0, 2.0, float("nan"))}, ValueError, "ns_coefficients must be finite"),
        ({"adjust_lr_fn": "spectral"}, ValueError, "adjust_lr_fn must be None, 'original' or 'match_rms_adamw'"),
        ({"momentum": 1.0}, ValueError, "momentum must be a number in"),
        ({"eps": -1.0}, ValueError, "eps must be >= 0"),
        ({"lr": -1.0}, ValueError, "lr must be >= 0"),
    ],
)
def test_options_out_of_range_are_refused_at_once_and_later(options: dict[str, Any], error: Any, match: str) -> None:
    p = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(error, match=match):
        Muon8bit([p], **options)
    p.grad = torch.ones(3, 3)
    optimizer = Muon8bit([p])
    optimizer.param_groups[0] |= options
    with pytest.raises(error, match=match):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_direction_is_that_of_the_cpu_to_the_rounding_of_bf16(dtype: torch.dtype) -> None:
    m = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    exact = orthogonalised(m.double(), (3.4445, -4.775, 2.0315), 5, 1e-7)
    assert_as_accurate(newton_schulz(m.cuda()).cpu(), exact, newton_schulz(m.bfloat16()).float(), multiple=4.0)
    p = nn.Parameter(m.to("cuda", dtype))
    optimizer = Muon8bit([p], skip_nonfinite=True, lr=torch.tensor(0.02, device="cuda"))
    for _ in range(2):
        p.grad = torch.randn_like(p)
        with torch.cuda.device(p.device):
            torch.cuda.set_sync_debug_mode("error")
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert p.isfinite().all()
    assert not torch.equal(p.detach(), m.to("cuda", dtype))
