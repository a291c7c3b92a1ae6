"""The sketches of linear_grad: those of the samples' own gradients, which it never stores, on every implementation."""

from __future__ import annotations

import itertools

import backends
import pytest
import torch
from oracle import assert_as_accurate
from torch import Tensor

import pyeff
from pyeff import AdamWDirection, ParameterSketch, Sketch

pytestmark = backends.quiet_interpreter
every_backend = backends.on_every(backends.Backend, "panels")

# Samples of several lengths, one without a token; (p, d), first row, dim, density
LENGTHS = [3, 0, 5]
CASES = [((20, 30), 0, 256, 1), ((12, 50), 41, 1024, 2), ((9, 150), 5, 4096, 1)]


def problem(p: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens = sum(LENGTHS)
    return torch.randn(tokens, d), torch.randn(tokens, p), torch.tensor([0, *itertools.accumulate(LENGTHS)])


def direction_of(p: int, d: int, frozen: bool, device: str = "cpu") -> AdamWDirection:
    generator = torch.Generator().manual_seed(p)
    m, v = torch.randn(p, d, generator=generator), torch.rand(p, d, generator=generator)
    return AdamWDirection(m.to(device), v.to(device), 2, eps=1e-6, frozen=frozen)


def sample_grads(inputs: Tensor, grad_outputs: Tensor, borders: Tensor) -> Tensor:
    return torch.stack([grad_outputs[a:b].T @ inputs[a:b] for a, b in itertools.pairwise(borders.tolist())])


@every_backend
@pytest.mark.parametrize("variant", ["gradient", "adamw", "adamw-frozen"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sketches_are_those_of_the_samples_gradients(
    backend: backends.Backend, case: tuple[tuple[int, int], int, int, int], variant: str
) -> None:
    (p, d), first_row, dim, density = case
    inputs, grad_outputs, borders = problem(p, d)
    sketch = Sketch(dim, seed=4, density=density)
    directions = [
        None if variant == "gradient" else direction_of(p, d, variant == "adamw-frozen", device)
        for device in (backend.device, "cpu")
    ]
    found = pyeff.linear_grad(
        *(t.to(backend.device) for t in (inputs, grad_outputs, borders)),
        sketch=ParameterSketch(sketch, "w", first_row, directions[0]),
        impl=backend.impl,
    )
    grads = sample_grads(inputs, grad_outputs, borders)
    exact_grads = sample_grads(inputs.double(), grad_outputs.double(), borders)
    exact = pyeff.sketch_grads(exact_grads, sketch, "w", first_row=first_row, direction=directions[1])
    peer = pyeff.sketch_grads(grads, sketch, "w", first_row=first_row, direction=directions[1], impl="reference")
    assert found.sketched == variant
    assert_as_accurate(found.sketches.cpu(), exact, peer, multiple=4.0, what="sketches")
    # What else is asked for is not disturbed.
    assert_as_accurate(found.weight_grad.cpu(), exact_grads.sum(0), grads.sum(0), multiple=4.0, what="weight_grad")
    assert_as_accurate(
        found.norms_sq.cpu(), exact_grads.square().sum((1, 2)), grads.square().sum((1, 2)), multiple=4.0, what="norms"
    )


@pytest.mark.parametrize("kind", ["countsketch", "rademacher"])
def test_every_kind_is_formed_by_panels(kind: str) -> None:
    inputs, grad_outputs, borders = problem(5, 7)
    sketch = ParameterSketch(Sketch(16, kind=kind), "w")
    found = pyeff.linear_grad(inputs, grad_outputs, borders, sketch=sketch, norms=False, weight_grad=False)
    grads = sample_grads(inputs, grad_outputs, borders)
    exact = pyeff.sketch_grads(sample_grads(inputs.double(), grad_outputs.double(), borders), sketch.sketch, "w")
    assert found.weight_grad is None
    assert_as_accurate(found.sketches, exact, pyeff.sketch_grads(grads, sketch.sketch, "w"), multiple=4.0)


def test_a_panel_of_some_rows_continues_the_sketch(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    module = importlib.import_module("pyeff.ops.linear_grad")
    inputs, grad_outputs, borders = problem(60, 40)
    options = {"sketch": ParameterSketch(Sketch(300), "w", 7, direction_of(60, 40, False)), "impl": "cpu"}
    whole = pyeff.linear_grad(inputs, grad_outputs, borders, **options).sketches
    monkeypatch.setattr(module, "_PANEL_BYTES", 4 * 40 * 13)
    monkeypatch.setattr(module, "_LEAST_ROWS", 5)
    cut = pyeff.linear_grad(inputs, grad_outputs, borders, **options).sketches
    exact = pyeff.linear_grad(inputs.double(), grad_outputs.double(), borders, sketch=options["sketch"]).sketches
    assert_as_accurate(cut, exact, whole, multiple=4.0)


@every_backend
def test_without_samples_or_features_there_is_nothing(backend: backends.Backend) -> None:
    sketch = ParameterSketch(Sketch(64), "w")
    for samples, p, d in ((0, 4, 5), (2, 0, 5), (2, 4, 0)):
        borders = torch.zeros(samples + 1, dtype=torch.int64, device=backend.device)
        inputs, grad_outputs = torch.zeros(0, d, device=backend.device), torch.zeros(0, p, device=backend.device)
        found = pyeff.linear_grad(inputs, grad_outputs, borders, sketch=sketch, impl=backend.impl).sketches
        assert torch.equal(found.cpu(), torch.zeros(samples, 64))


def test_too_many_numbers_for_the_kernel_are_refused_with_the_reason() -> None:
    inputs, grad_outputs, borders = problem(4, 4)
    sketch = ParameterSketch(Sketch(1 << 17), "w")
    with pytest.raises(RuntimeError, match="sketches of"):
        pyeff.linear_grad(inputs, grad_outputs, borders, sketch=sketch, impl="triton")


def test_bad_sketches_are_named() -> None:
    inputs, grad_outputs, borders = problem(4, 6)
    with pytest.raises(TypeError, match="sketch must be"):
        pyeff.linear_grad(inputs, grad_outputs, borders, sketch=Sketch(8))
    with pytest.raises(ValueError, match="sketch must have moments of shape"):
        pyeff.linear_grad(
            inputs, grad_outputs, borders, sketch=ParameterSketch(Sketch(8), "w", 0, direction_of(6, 4, False))
        )


def test_opcheck() -> None:
    inputs, grad_outputs, borders = problem(4, 6)
    flat = ParameterSketch(Sketch(8), "w", 0, direction_of(4, 6, False)).flat
    for impl in ("reference", "cpu"):
        args = (inputs, grad_outputs, borders, True, True, None, *flat, impl)
        torch.library.opcheck(torch.ops.pyeff.linear_grad_sketches.default, args)
