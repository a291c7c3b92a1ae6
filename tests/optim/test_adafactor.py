"""Adafactor is torch.optim.Adafactor where that has the option, and the published formula where it has not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle import assert_as_accurate
from torch import Tensor, nn

from pyeff.ops._optimizer_states import decode_moment
from pyeff.optim import Adafactor8bit

# Matrices, vectors, a number, and more dimensions than two.
SHAPES = [(24, 70), (70,), (), (3, 8, 10), (2, 3, 4, 5)]
EPS = torch.finfo(torch.float32).eps
OPTIONS: list[dict[str, Any]] = [
    {"lr": 1e-2},
    {"lr": 0.9, "weight_decay": 0.01},  # 1 / sqrt(t) is soon smaller
    {"lr": 1e-2, "beta2_decay": -0.5, "d": 2.0, "eps": (1e-4, 0.5)},
]


def start() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(shape, generator=generator) * 10.0 ** (step % 3 - 1) for shape in SHAPES]


def flat(tensors: list[Any]) -> Tensor:
    """All of them at once: a peer may be exact in a single number by luck."""
    return torch.cat([x.detach().flatten() for x in tensors])


def run(cls: Any, dtype: torch.dtype, steps: int = 12, **options: Any) -> tuple[list[nn.Parameter], Any]:
    params = [nn.Parameter(x.to(dtype)) for x in start()]
    options.setdefault("eps", (EPS, 1e-3))  # torch's default depends on the dtype
    optimizer = cls(params, **options)
    for step in range(steps):
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = g.to(dtype)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("options", OPTIONS)
def test_without_a_first_moment_it_is_torchs_to_the_rounding(options: dict[str, Any]) -> None:
    ours, our = run(Adafactor8bit, torch.float32, **options)
    theirs, their = run(torch.optim.Adafactor, torch.float32, **options)
    exact, right = run(torch.optim.Adafactor, torch.float64, **options)
    assert_as_accurate(flat(ours), flat(exact), flat(theirs))
    for p, q, x in zip(ours, theirs, exact, strict=True):
        for name in ("row_var", "col_var", "variance"):
            assert (name in our.state[p]) == (name in right.state[x])
            if name in our.state[p]:
                assert_as_accurate(our.state[p][name], right.state[x][name], their.state[q][name], what=name)


def test_eps_of_none_is_that_of_fp32_as_torch_has_it_for_fp32_weights() -> None:
    ours, _ = run(Adafactor8bit, torch.float32, eps=(None, 1e-3))
    named, _ = run(Adafactor8bit, torch.float32, eps=(EPS, 1e-3))
    assert all(torch.equal(p, q) for p, q in zip(ours, named, strict=True))


def test_the_size_of_a_large_parameter_is_its_size() -> None:
    """torch adds squares up in fp32, on a CPU one after the other: 1 % is lost here, and more in larger ones."""
    p = nn.Parameter(torch.full((2**24,), 1.37))
    p.grad = torch.full_like(p, 3.0)
    before = p[0].item()
    Adafactor8bit([p], lr=1e-2).step()  # U is 1
    # Roundings of p, and of the four factors of the step.
    assert abs(before - p[0].item() - 1e-2 * before) <= EPS * before + 1e-2 * before * 8 * EPS


def formula(
    x: Tensor, states: dict[str, Tensor], g: Tensor, t: int, options: dict[str, Any], *, m: Tensor | None = None
) -> Tensor:
    """A step of the formula in the docstring, in the precision of its arguments; `m` in place of the old momentum."""
    weight, (eps1, eps2) = t**-0.8, (EPS, 1e-3)

    def mean(name: str, new: Tensor) -> Tensor:
        states[name] = (1 - weight) * states.get(name, torch.zeros_like(new)) + weight * new
        return states[name]

    if g.ndim > 1:
        row, col = mean("row", g.square().mean(-1, keepdim=True)), mean("col", g.square().mean(-2, keepdim=True))
        v = row * col / row.mean(-2, keepdim=True).clamp_min(eps1)
    else:
        v = mean("v", g.square())
    u = g / v.sqrt().clamp_min(eps1)
    u = u / max(1.0, u.square().mean().sqrt().item())
    if options.get("beta1") is not None:
        old = states.get("m", torch.zeros_like(g)) if m is None else m
        u = states["m"] = options["beta1"] * old + (1 - options["beta1"]) * u
    lr = options["lr"]
    size = max(eps2, x.square().mean().sqrt().item()) if options.get("scale_parameter", True) else 1.0
    rho = min(lr, 1 / math.sqrt(t)) if options.get("relative_step", True) else lr
    return x * (1 - lr * options.get("weight_decay", 0.0)) - size * rho * u


@pytest.mark.parametrize("options", [{}, {"relative_step": False}, {"scale_parameter": False}, {"weight_decay": 0.1}])
@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("lr", [1e-2, 0.6])
def test_options_that_torch_lacks_are_the_formula(lr: float, beta1: float | None, options: dict[str, Any]) -> None:
    options = {"lr": lr, "beta1": beta1, **options}
    ours, our = run(Adafactor8bit, torch.float32, states="fp32", **options)
    ends: dict[torch.dtype, list[Tensor]] = {torch.float64: [], torch.float32: []}
    moments: dict[torch.dtype, list[Tensor]] = {torch.float64: [], torch.float32: []}
    for dtype, found in ends.items():
        for i, x in enumerate(start()):
            x, states = x.to(dtype), {}
            for step in range(12):
                x = formula(x, states, gradients(step)[i].to(dtype), step + 1, options)
            found.append(x)
            moments[dtype].append(states.get("m", x))
    assert_as_accurate(flat(ours), flat(ends[torch.float64]), flat(ends[torch.float32]))
    if beta1 is not None:
        kept = [our.state[p]["exp_avg"] for p in ours]
        assert_as_accurate(flat(kept), flat(moments[torch.float64]), flat(moments[torch.float32]), what="moment")


def test_each_step_with_8_bits_is_the_formula_from_the_first_moment_that_was_kept() -> None:
    options = {"lr": 1e-2, "beta1": 0.9}
    ours = [nn.Parameter(x) for x in start()]
    optimizer = Adafactor8bit(ours, eps=(EPS, 1e-3), **options)
    exact: list[dict[str, Tensor]] = [{} for _ in ours]
    peer: list[dict[str, Tensor]] = [{} for _ in ours]
    for step in range(8):
        before = [p.detach().clone() for p in ours]
        kept = [decoded(optimizer, p) for p in ours]
        for p, g in zip(ours, gradients(step), strict=True):
            p.grad = g
        optimizer.step()
        ends, peers = [], []
        for old, m, right, near, g in zip(before, kept, exact, peer, gradients(step), strict=True):
            wide = None if m is None else m.double()
            ends.append(formula(old.double(), right, g.double(), step + 1, options, m=wide))
            peers.append(formula(old, near, g, step + 1, options, m=m))
        assert_as_accurate(flat(ours), flat(ends), flat(peers))


def decoded(optimizer: Adafactor8bit, p: Tensor) -> Tensor | None:
    state = optimizer.state[p]
    return decode_moment(state["exp_avg_code"], state["exp_avg_scale"], 256) if state else None


@pytest.mark.parametrize("beta1", [None, 0.9])
def test_states_of_torchs_optimizer_are_read(beta1: float | None) -> None:
    theirs, their = run(torch.optim.Adafactor, torch.float32, lr=0.02, beta2_decay=-0.7)
    ours = [nn.Parameter(p.detach().clone()) for p in theirs]
    optimizer = Adafactor8bit(ours, beta1=beta1)
    optimizer.load_state_dict(their.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.02
    assert optimizer.param_groups[0]["beta1"] == beta1
    for p, q in zip(ours, theirs, strict=True):
        state = optimizer.state[p]
        assert state["step"] == 12
        for name in ("row_var", "col_var", "variance"):
            if name in state:
                assert torch.equal(state[name], their.state[q][name])
    if beta1 is None:
        exact = [nn.Parameter(p.detach().double()) for p in theirs]
        right = torch.optim.Adafactor(exact, lr=0.02, beta2_decay=-0.7, eps=(EPS, 1e-3))
        for q, x in zip(theirs, exact, strict=True):
            right.state[x] = {k: v if k == "step" else v.double() for k, v in their.state[q].items()}
            right.state[x]["step"] = right.state[x]["step"].clone()
        for p, q, x, g in zip(ours, theirs, exact, gradients(50), strict=True):
            p.grad, q.grad, x.grad = g, g.clone(), g.double()
        for one in (optimizer, their, right):
            one.step()
        assert_as_accurate(flat(ours), flat(exact), flat(theirs))


def test_states_that_make_no_sense_are_refused() -> None:
    _, optimizer = run(Adafactor8bit, torch.float32)
    for name, value, match in (
        ("row_var", -torch.ones(24, 1), "row_var must be >= 0"),
        ("row_var", torch.ones(24), "row_var must be torch.float32"),
        ("step", torch.tensor(0.5, dtype=torch.float64), "step must be a whole number"),
    ):
        saved = optimizer.state_dict()
        saved["state"][0] = {**saved["state"][0], name: value}
        with pytest.raises(ValueError, match=match):
            Adafactor8bit([nn.Parameter(x) for x in start()]).load_state_dict(saved)


def test_second_moments_take_the_rows_and_columns_and_no_more() -> None:
    p = nn.Parameter(torch.ones(512, 256))
    p.grad = torch.randn(512, 256)
    for beta1, first in ((None, 0), (0.9, p.numel() * (1 + 4 / 256))):
        optimizer = Adafactor8bit([p], beta1=beta1)
        optimizer.step()
        assert sum(x.nbytes for x in optimizer.state[p].values()) == first + 4 * (512 + 256) + 8


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"beta2_decay": 0.1}, ValueError, "beta2_decay must be <= 0"),
        ({"d": 0.5}, ValueError, "d must be >= 1"),
        ({"d": None}, TypeError, "d must be a number"),
        ({"eps": 1e-3}, ValueError, "eps must be two numbers"),
        ({"eps": ("a", 1e-3)}, ValueError, "eps must be two numbers"),
        ({"weight_decay": None}, TypeError, "weight_decay must be a number; got None"),
        ({"eps": (0.0, 1e-3)}, ValueError, "eps must be > 0"),
        ({"eps": (1e-3, -1.0)}, ValueError, "eps must be >= 0"),
        ({"beta1": 1.0}, ValueError, r"beta1 must be in \[0, 1\)"),
        ({"relative_step": 3}, TypeError, "relative_step must be True or False"),
        ({"lr": float("nan")}, ValueError, "lr must be >= 0"),
    ],
)
def test_options_out_of_range_are_refused_at_once_and_later(options: dict[str, Any], error: Any, match: str) -> None:
    p = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(error, match=match):
        Adafactor8bit([p], **options)
    p.grad = torch.ones(3, 3)
    optimizer = Adafactor8bit([p])
    optimizer.param_groups[0] |= options
    with pytest.raises(error, match=match):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3, 3))


@pytest.mark.parametrize(("before", "after"), [(None, 0.9), (0.9, None)])
def test_a_first_moment_cannot_come_or_go_once_there_are_states(before: float | None, after: float | None) -> None:
    p = nn.Parameter(torch.ones(3, 3))
    p.grad = torch.ones(3, 3)
    optimizer = Adafactor8bit([p], beta1=before)
    optimizer.step()
    optimizer.param_groups[0]["beta1"] = after
    with pytest.raises(ValueError, match=f"beta1 of group 0 was {before} .* cannot become {after}"):
        optimizer.step()
    optimizer.param_groups[0]["beta1"] = before and 0.5
    optimizer.step()
    assert optimizer.state[p]["step"] == 2
