"""The backward pass of norm layers by sample: what autograd says in float64, on every implementation."""

from __future__ import annotations

import importlib
import itertools
import math

import backends
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate
from torch import Tensor

import pyeff
from pyeff.ops import NormLayerGrad, VectorGrad

pytestmark = backends.quiet_interpreter
EPS = 1e-5


class Backend(backends.Backend):
    def gradient(self, x: Tensor, g: Tensor, borders: list[int], w: Tensor, center: bool, **options: object) -> dict:
        """Everything, back on the CPU, by name."""
        cu_seqlens = torch.tensor(borders, device=self.device)
        moved = {name: t.to(self.device) if isinstance(t, Tensor) else t for name, t in options.items()}
        found = pyeff.norm_layer_grad(
            x.to(self.device),
            g.to(self.device),
            cu_seqlens,
            **{"eps": EPS, "weight": w.to(self.device), "bias_grad": True, "sample_grads": True, **moved},
            center=center,
            impl=self.impl,
        )
        return {name: t.cpu() for name, t in named(found).items()}


BACKENDS = backends.on_cpu(Backend)
every_backend = backends.on_every(Backend)


def named(found: NormLayerGrad) -> dict[str, Tensor]:
    tensors = {"input_grad": found.input_grad}
    for name, vector in (("weight", found.weight), ("bias", found.bias)):
        if isinstance(vector, VectorGrad):
            tensors |= {f"{name}.{field}": getattr(vector, field) for field in ("grad", "norms_sq", "sample_grads")}
    return {name: t for name, t in tensors.items() if t is not None}


def problem(lengths: list[int], d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, list[int], Tensor]:
    """inputs with a mean, grad_outputs, borders and a gain."""
    tokens = sum(lengths)
    x, g = (2 * torch.randn(tokens, d) + 1).to(dtype), torch.randn(tokens, d).to(dtype)
    return x, g, [0, *itertools.accumulate(lengths)], 1 + 0.3 * torch.randn(d)


def by_autograd(x: Tensor, g: Tensor, borders: list[int], w: Tensor, center: bool, dtype: torch.dtype) -> dict:
    """torch's own layer, differentiated one sample at a time."""
    input_grads, rows = [], {"weight": [], "bias": []}
    for start, end in itertools.pairwise(borders):
        leaf, gain, offset = (
            t.to(dtype).requires_grad_() for t in (x[start:end].clone(), w.clone(), torch.zeros(w.shape))
        )
        shape = (x.shape[1],)
        if center:
            y = F.layer_norm(leaf, shape, gain, offset, EPS)
        else:
            y = F.rms_norm(leaf, shape, gain, EPS) + offset
        grads = torch.autograd.grad(y, (leaf, gain, offset), g[start:end].to(dtype))
        input_grads.append(grads[0])
        rows["weight"].append(grads[1])
        rows["bias"].append(grads[2])
    found = {"input_grad": torch.cat(input_grads)}
    for name, grads in rows.items():
        stacked = torch.stack(grads)
        found |= {
            f"{name}.grad": stacked.sum(0),
            f"{name}.norms_sq": stacked.square().sum(1),
            f"{name}.sample_grads": stacked,
        }
    return found


def assert_accurate(found: dict[str, Tensor], *case: object) -> None:
    """As accurate as torch's float32 layers."""
    exact, peer = (by_autograd(*case, dtype) for dtype in (torch.float64, torch.float32))
    assert set(found) == set(exact)
    for name, value in found.items():
        assert_as_accurate(value, exact[name], peer[name], multiple=4.0, what=name)


SHAPES = [([1], 2), ([0, 5, 0, 70, 3, 200, 0], 33), ([130, 2], 576), ([2, 1], 1100)]


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("center", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_torch_in_float32(
    backend: Backend, shape: tuple[list[int], int], center: bool, dtype: torch.dtype
) -> None:
    case = (*problem(*shape, dtype), center)
    if not backend.supports(dtype):
        with pytest.raises(RuntimeError, match="bfloat16"):
            backend.gradient(*case)
        return
    found = backend.gradient(*case)
    assert found["input_grad"].dtype == dtype
    assert_accurate(found, *case)


@pytest.mark.parametrize("center", [False, True], ids=["rms", "layer"])
def test_float64_is_computed_by_the_reference_in_float64(center: bool) -> None:
    case = (*problem([3, 0, 20], 7, torch.float64), center)
    found = Backend("auto", "cpu").gradient(*case)
    for name, exact in by_autograd(*case, torch.float64).items():
        torch.testing.assert_close(found[name], exact)


@every_backend
@pytest.mark.parametrize("center", [False, True], ids=["rms", "layer"])
def test_kept_statistics_take_the_place_of_computed_ones(backend: Backend, center: bool) -> None:
    x, g, borders, w = problem([30, 4], 48)
    centred = x.double() - x.double().mean(1, keepdim=True) if center else x.double()
    rstd = (centred.square().mean(1) + EPS).rsqrt()
    kept = {"rstd": rstd.float(), **({"mean": x.double().mean(1).float()} if center else {})}
    # eps is nowhere else than in rstd.
    assert_accurate(backend.gradient(x, g, borders, w, center, eps=100.0, **kept), x, g, borders, w, center)


@every_backend
def test_what_is_not_asked_for_is_none(backend: Backend) -> None:
    x, g, borders, w = problem([30, 4], 48)
    whole = backend.gradient(x, g, borders, w, True)
    for wanted in itertools.product((False, True), repeat=3):
        flags = dict(zip(("input_grad", "weight_grad", "bias_grad"), wanted, strict=True))
        if any(wanted):
            found = backend.gradient(x, g, borders, w, True, **flags, norms=False, sample_grads=False)
            assert {name.split(".")[0] for name in found} == {
                name.removesuffix("_grad") if name != "input_grad" else name for name, is_in in flags.items() if is_in
            }
            for name, value in found.items():
                torch.testing.assert_close(value, whole[name])


@every_backend
def test_a_layer_without_gain_has_ones(backend: Backend) -> None:
    x, g, borders, _ = problem([7, 3], 20)
    cu_seqlens = torch.tensor(borders, device=backend.device)
    moved = (x.to(backend.device), g.to(backend.device))
    found = pyeff.norm_layer_grad(*moved, cu_seqlens, eps=EPS, weight_grad=False, impl=backend.impl)
    exact, peer = (
        by_autograd(x, g, borders, torch.ones(20), False, dtype)["input_grad"]
        for dtype in (torch.float64, torch.float32)
    )
    assert_as_accurate(found.input_grad.cpu(), exact, peer, multiple=4.0)


@every_backend
def test_a_token_with_nan_spoils_only_its_row_and_its_sample(backend: Backend) -> None:
    x, g, borders, w = problem([9, 70, 0, 200, 5], 20)
    clean = backend.gradient(x, g, borders, w, True)
    x[78, 3] = math.nan
    found = backend.gradient(x, g, borders, w, True)
    rows = torch.arange(x.shape[0]) != 78
    assert found["input_grad"][78].isnan().all()
    assert torch.equal(found["input_grad"][rows], clean["input_grad"][rows])
    assert found["weight.norms_sq"][1].isnan()
    assert torch.equal(found["weight.norms_sq"][[0, 2, 3, 4]], clean["weight.norms_sq"][[0, 2, 3, 4]])
    assert torch.equal(found["bias.norms_sq"], clean["bias.norms_sq"])


@every_backend
def test_rows_of_zeros_stay_finite(backend: Backend) -> None:
    x, g, borders, w = problem([5, 4], 16)
    x[3] = 0.0
    assert_accurate(backend.gradient(x, g, borders, w, False), x, g, borders, w, False)


@every_backend
@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_nothing_has_gradient_zero(backend: Backend, lengths: list[int]) -> None:
    found = backend.gradient(*problem(lengths, 6), True)
    assert found["input_grad"].shape == (0, 6)
    for name in ("weight", "bias"):
        assert torch.equal(found[f"{name}.grad"], torch.zeros(6))
        assert torch.equal(found[f"{name}.norms_sq"], torch.zeros(len(lengths)))


@every_backend
def test_any_strides(backend: Backend) -> None:
    x, g, borders, w = problem([30, 30], 64)
    layouts = (torch.cat([x, -x], 1)[:, :64], g.T.contiguous().T)
    assert_accurate(backend.gradient(*layouts, borders, w, True), x, g, borders, w, True)


def test_thread_count_changes_no_bit() -> None:
    threads = torch.get_num_threads()
    found = []
    case = (*problem([70, 0, 500, 3], 130), True)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(BACKENDS[1].gradient(*case))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


def test_wide_rows_are_read_twice_by_the_kernels_and_no_wider_ones_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = importlib.import_module("pyeff.triton_kernels.norm_layer_grad")
    monkeypatch.setattr(kernels, "FUSED", 8)
    device = "cpu" if backends.interpreting() else "cuda"
    wide = kernels.Config(1, 64, 4, False)
    monkeypatch.setattr(kernels, "pick_config", lambda d: wide)
    for center in (False, True):
        case = (*problem([70, 4], 50), center)
        assert_accurate(Backend("triton", device).gradient(*case), *case)
    with pytest.raises(RuntimeError, match="at most 16384"):
        Backend("triton", device).gradient(*problem([1], 16385), False)


def test_opcheck() -> None:
    x, g, borders, w = problem([3, 0, 4], 5)
    for impl, center in itertools.product(("reference", "cpu"), (False, True)):
        for flags in ((True, True, center), (False, True, False), (True, False, False)):
            arguments = (x, g, torch.tensor(borders), w, None, None, EPS, center, *flags, True, False, impl)
            torch.library.opcheck(torch.ops.pyeff.norm_layer_grad.default, arguments)


def test_arguments_that_do_not_fit_are_named() -> None:
    x, g, _, w = problem([7], 4)
    borders = torch.tensor([0, 7])
    with pytest.raises(ValueError, match="grad_outputs must have the shape of inputs"):
        pyeff.norm_layer_grad(x, g[:, :3], borders, eps=EPS)
    with pytest.raises(ValueError, match="weight must hold 4 numbers"):
        pyeff.norm_layer_grad(x, g, borders, eps=EPS, weight=w[:3])
    with pytest.raises(TypeError, match="rstd must be a tensor or None"):
        pyeff.norm_layer_grad(x, g, borders, eps=EPS, rstd=1.0)
    with pytest.raises(TypeError, match="weight must be floating point"):
        pyeff.norm_layer_grad(x, g, borders, eps=EPS, weight=w.long())
    with pytest.raises(ValueError, match="mean is of LayerNorm"):
        pyeff.norm_layer_grad(x, g, borders, eps=EPS, mean=x.mean(1))
    with pytest.raises(ValueError, match="nothing is asked for"):
        pyeff.norm_layer_grad(x, g, borders, eps=EPS, input_grad=False, weight_grad=False)
    with pytest.raises(ValueError, match="cu_seqlens must"):
        pyeff.norm_layer_grad(x, g, torch.tensor([0, 8]), eps=EPS)
    for eps in (-1e-6, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="eps must be a finite number of 0 or more"):
            pyeff.norm_layer_grad(x, x, borders, eps=eps)
    with pytest.raises(TypeError, match="eps must be a number, got None"):
        pyeff.norm_layer_grad(x, x, borders, eps=None)
    with pytest.raises(TypeError, match="weight must be a dense tensor"):
        pyeff.norm_layer_grad(x, x, borders, eps=0.0, weight=torch.ones(4).to_sparse())
