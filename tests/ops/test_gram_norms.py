"""Norms of per-sample gradients from Gram matrices: right wherever float64 says so, on every implementation."""

from __future__ import annotations

import importlib
import itertools
import math
import subprocess
import sys

import backends
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_as_accurate
from torch import Tensor

import pyeff
from pyeff.ops._dispatch import interpreting
from pyeff.ops._packed import samples_of

pytestmark = backends.quiet_interpreter


class Backend(backends.Backend):
    def norms(self, inputs: Tensor, grad_outputs: Tensor, borders: list[int]) -> Tensor:
        """The squared norms, back on the CPU."""
        cu_seqlens = torch.tensor(borders, dtype=torch.int32, device=self.device)
        return pyeff.gram_norms(inputs.to(self.device), grad_outputs.to(self.device), cu_seqlens, impl=self.impl).cpu()


BACKENDS = backends.on_cpu(Backend)
every_backend = backends.on_every(Backend)


def borders_of(lengths: list[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


def problem(lengths: list[int], d: int, p: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, list[int]]:
    return torch.randn(sum(lengths), d).to(dtype), torch.randn(sum(lengths), p).to(dtype), borders_of(lengths)


def of_gradients(inputs: Tensor, grad_outputs: Tensor, borders: list[int]) -> Tensor:
    """The exact norms: of the gradients themselves, in float64."""
    samples = itertools.pairwise(borders)
    return torch.stack([(grad_outputs[i:j].double().T @ inputs[i:j].double()).square().sum() for i, j in samples])


def of_grams(inputs: Tensor, grad_outputs: Tensor, borders: list[int], dtype: torch.dtype) -> Tensor:
    """The formula in `dtype`, Gram matrices and all."""
    a, g = inputs.to(dtype), grad_outputs.to(dtype)
    return torch.stack([((a[i:j] @ a[i:j].T) * (g[i:j] @ g[i:j].T)).sum() for i, j in itertools.pairwise(borders)])


def assert_accurate(actual: Tensor, inputs: Tensor, grad_outputs: Tensor, borders: list[int]) -> None:
    """As accurate as the formula in float32; few samples are few draws of its rounding error, hence a multiple of 4."""
    exact = of_gradients(inputs, grad_outputs, borders)
    assert_as_accurate(actual, exact, of_grams(inputs, grad_outputs, borders, torch.float32), multiple=4.0)


SHAPES = [
    ([1], 1, 1),
    ([1, 1, 1], 5, 3),
    ([0, 7, 0, 0, 7, 7, 2, 0], 33, 18),
    ([70, 64, 1, 300], 40, 70),
    ([128, 128], 64, 96),
]


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_the_formula_in_float32(
    backend: Backend, shape: tuple[list[int], int, int], dtype: torch.dtype
) -> None:
    case = problem(*shape, dtype)
    if not backend.supports(dtype):
        with pytest.raises(RuntimeError, match="bfloat16"):
            backend.norms(*case)
        return
    found = backend.norms(*case)
    assert found.dtype == torch.float32
    assert_accurate(found, *case)


def test_reference_in_float64_is_the_norm_of_the_gradient() -> None:
    inputs, grad_outputs, borders = problem([3, 0, 2000], 4, 6, torch.float64)
    found = pyeff.gram_norms(inputs, grad_outputs, torch.tensor(borders))
    torch.testing.assert_close(found, of_gradients(inputs, grad_outputs, borders))


@every_backend
def test_small_norms_survive_tokens_that_cancel(backend: Backend) -> None:
    # Activations with a large mean in common, gradients that sum to zero over the tokens: in 16 bits nothing is left.
    inputs, grad_outputs, borders = problem([192] * 10, 64, 48, torch.float16)
    inputs = (inputs + 30).half()
    for start, end in itertools.pairwise(borders):
        half = (end - start) // 2
        grad_outputs[start + half : end] = -grad_outputs[start : start + half]
    exact = of_gradients(inputs, grad_outputs, borders)
    in_16_bits = of_grams(inputs, grad_outputs, borders, torch.float16).double()
    assert not ((in_16_bits / exact - 1).abs() < 0.5).any()
    assert_accurate(backend.norms(inputs, grad_outputs, borders), inputs, grad_outputs, borders)


@every_backend
def test_a_norm_that_rounds_below_zero_is_zero(backend: Backend) -> None:
    # Two tokens whose gradients are g and -g and whose activations are equal: the gradient is zero.
    inputs, grad_outputs, _ = problem([400], 60, 50)
    inputs[1::2], grad_outputs[1::2] = inputs[::2], -grad_outputs[::2]
    found = backend.norms(inputs, grad_outputs, list(range(0, 401, 2)))
    assert (found >= 0).all()


@every_backend
def test_a_sample_with_nan_or_infinity_spoils_only_itself(backend: Backend) -> None:
    inputs, grad_outputs, borders = problem([9, 70, 0, 200, 5], 20, 24)
    clean = backend.norms(inputs, grad_outputs, borders)
    inputs[78, 3] = math.nan
    grad_outputs[279, 7] = math.inf
    found = backend.norms(inputs, grad_outputs, borders)
    assert not found[[1, 4]].isfinite().any()
    assert torch.equal(found[[0, 2, 3]], clean[[0, 2, 3]])


@every_backend
@pytest.mark.parametrize("shape", [([], 4, 3), ([0, 0], 4, 3), ([5, 2], 0, 3), ([5, 2], 4, 0)], ids=str)
def test_nothing_has_norm_zero(backend: Backend, shape: tuple[list[int], int, int]) -> None:
    assert torch.equal(backend.norms(*problem(*shape)), torch.zeros(len(shape[0])))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_strides(backend: Backend, dtype: torch.dtype) -> None:
    inputs, grad_outputs, borders = problem([30, 30, 140], 40, 36, dtype)
    layouts = (inputs.T.contiguous().T, torch.cat([grad_outputs, -grad_outputs], dim=1)[:, :36])
    assert_accurate(backend.norms(*layouts, borders), inputs, grad_outputs, borders)
    repeated = (inputs[:1].expand_as(inputs), torch.repeat_interleave(grad_outputs, 2, dim=1)[:, ::2])
    assert_accurate(backend.norms(*repeated, borders), *repeated, borders)


@pytest.mark.parametrize(
    "backend",
    [
        *(b for b in BACKENDS if b.impl != "reference"),
        pytest.param(Backend("triton", "cuda"), marks=pytest.mark.gpu),
    ],
    ids=backends.name_of,
)
def test_repeats_give_the_same_bits(backend: Backend) -> None:
    case = problem([70, 70, 3, 300], 50, 40)
    assert torch.equal(backend.norms(*case), backend.norms(*case))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8), data=st.data())
def test_neither_order_nor_company_changes_a_sample_s_norm(seed: int, lengths: list[int], data: st.DataObject) -> None:
    # Small whole numbers, whose products sum exactly in any order.
    generator = torch.Generator().manual_seed(seed)
    inputs, grad_outputs = (torch.randint(-3, 4, (sum(lengths), k), generator=generator).float() for k in (7, 9))
    found = pyeff.gram_norms(inputs, grad_outputs, torch.tensor(borders_of(lengths)))
    some = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=8))
    parts = torch.arange(sum(lengths)).split(lengths)
    tokens = torch.cat([parts[s] for s in some]) if some else torch.zeros(0, dtype=torch.long)
    borders = torch.tensor(borders_of([lengths[s] for s in some]))
    assert torch.equal(pyeff.gram_norms(inputs[tokens], grad_outputs[tokens], borders), found[some])
    direct = pyeff.linear_grad(inputs, grad_outputs, torch.tensor(borders_of(lengths)), weight_grad=False)
    assert torch.equal(direct.norms_sq, found)


def test_opcheck() -> None:
    inputs, grad_outputs, borders = problem([3, 0, 4], 5, 6)
    for impl in ("reference", "cpu"):
        torch.library.opcheck(torch.ops.pyeff.gram_norms.default, (inputs, grad_outputs, torch.tensor(borders), impl))


def test_the_cheaper_way_is_told_by_flops() -> None:
    for tokens, d, p in itertools.product((1, 63, 64, 65, 1024), (1, 64, 96), (1, 64, 4096)):
        gram, direct = tokens**2 * (d + p), 2 * tokens * d * p
        assert pyeff.gram_is_cheaper(tokens, d, p) == (gram < direct)


@pytest.mark.parametrize("tile", [(16, 16), (32, 16), (64, 64), (128, 64)], ids=str)
def test_tiles_change_only_the_rounding(tile: tuple[int, int]) -> None:
    kernels = importlib.import_module("pyeff.triton_kernels.gram_norms")
    inputs, grad_outputs, borders = problem([5, 0, 170, 17, 64], 50, 30)
    device = "cpu" if interpreting() else "cuda"
    config = kernels.Config(*tile, 4, 2)
    plan = kernels.plan_of(torch.tensor(borders), config, torch.device(device))
    found = kernels.gram_norms(inputs.to(device), grad_outputs.to(device), plan)
    assert_accurate(found.cpu(), inputs, grad_outputs, borders)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)], ids=str)
def test_samples_that_would_leave_wide_tiles_empty_take_narrow_ones(capability: tuple[int, int]) -> None:
    kernels = importlib.import_module("pyeff.triton_kernels.gram_norms")

    def rows(*lengths: int) -> int:
        samples = samples_of(torch.tensor(borders_of(list(lengths))), sum(lengths))
        return kernels.pick_config(torch.bfloat16, capability, samples.block_pairs).bt

    # One token, or two blocks of 64, in tiles of 128: a quarter, or three quarters, of the work is not empty.
    assert rows(1) == rows(64) == 64
    assert rows(128) == rows(65) == rows(2048) == 128
    assert rows(64, 64, 2048) == 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("limits", [(1, 3, 5), (2000, 16, 7), (4 << 20, 128, 2048)], ids=str)
def test_tiles_on_the_cpu_change_only_the_rounding(
    limits: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("pyeff.ops.gram_norms")
    for name, limit in zip(("_TILES_BYTES", "_TILE_ROWS", "_COPY_COLUMNS"), limits, strict=True):
        monkeypatch.setattr(module, name, limit)
    inputs, grad_outputs, borders = problem([4, 4, 0, 4, 9, 2, 2, 30], 24, 20, dtype)
    found = pyeff.gram_norms(inputs, grad_outputs, torch.tensor(borders), impl="cpu")
    assert_accurate(found, inputs, grad_outputs, borders)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_beside_inputs_and_outputs_is_bounded(dtype: str) -> None:
    code = f"""
import resource, torch, pyeff
torch.set_num_threads(1)
inputs, grad_outputs = (torch.ones(4096, 256, dtype=torch.{dtype}) for _ in range(2))
pyeff.gram_norms(inputs[:4], grad_outputs[:4], torch.tensor([0, 4]), impl="cpu")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for length in (16, 4096):
    pyeff.gram_norms(inputs, grad_outputs, torch.arange(0, 4097, length), impl="cpu")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 32 * 1024, "the Gram matrices alone would be 128 MiB"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_features_have_norm_zero(dtype: torch.dtype) -> None:
    nothing = torch.zeros(3, 0, dtype=dtype)
    assert torch.equal(pyeff.gram_norms(nothing, nothing, torch.tensor([0, 2, 3])), torch.zeros(2))
