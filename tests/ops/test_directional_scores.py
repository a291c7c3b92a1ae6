"""Inner products of samples' gradients with directions: right wherever float64 says so, on every implementation."""

from __future__ import annotations

import importlib
import itertools
import math
import subprocess
import sys
from typing import Any

import backends
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_as_accurate
from torch import Tensor

import pyeff
from pyeff.ops._dispatch import interpreting

pytestmark = backends.quiet_interpreter

Case = tuple[Tensor, Tensor, list[int], Tensor]


class Backend(backends.Backend):
    def scores(self, inputs: Tensor, grad_outputs: Tensor, borders: list[int], directions: Tensor) -> Tensor:
        """The result, back on the CPU."""
        moved = (t.to(self.device) for t in (inputs, grad_outputs, torch.tensor(borders).int(), directions))
        return pyeff.directional_scores(*moved, impl=self.impl).cpu()


BACKENDS = backends.on_cpu(Backend)
every_backend = backends.on_every(Backend)


def borders_of(lengths: list[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


def problem(lengths: list[int], d: int, p: int, count: int, dtype: torch.dtype = torch.float32) -> Case:
    """inputs, grad_outputs, borders and directions."""
    tokens = sum(lengths)
    directions = torch.randn(count, p, d).to(dtype)
    return torch.randn(tokens, d).to(dtype), torch.randn(tokens, p).to(dtype), borders_of(lengths), directions


def materialised(
    inputs: Tensor, grad_outputs: Tensor, borders: list[int], directions: Tensor, dtype: torch.dtype
) -> Tensor:
    """By the samples' gradients, in `dtype`."""
    a, g, q = (t.to(dtype) for t in (inputs, grad_outputs, directions))
    grads = [g[i:j].T @ a[i:j] for i, j in itertools.pairwise(borders)]
    return torch.stack([(grad * q).sum((1, 2)) for grad in grads]) if grads else q.new_zeros(0, q.shape[0])


def assert_accurate(actual: Tensor, case: Case) -> None:
    """As accurate as torch in float32; few numbers are few draws of its rounding errors, hence a multiple of 4."""
    assert actual.dtype == torch.float32
    assert_as_accurate(actual, materialised(*case, torch.float64), materialised(*case, torch.float32), multiple=4.0)


# Lengths of samples, d, p and Q.
SHAPES = [
    ([1], 1, 1, 1),
    ([1, 1, 1], 5, 3, 2),
    ([0, 7, 0, 0, 7, 7, 2, 0], 33, 18, 3),
    ([70, 64, 1, 130], 40, 150, 2),
    ([128, 128], 160, 64, 1),
]


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_materialised_gradients(
    backend: Backend, shape: tuple[list[int], int, int, int], dtype: torch.dtype
) -> None:
    case = problem(*shape, dtype)
    if not backend.supports(dtype):
        with pytest.raises(RuntimeError, match="bfloat16"):
            backend.scores(*case)
        return
    assert_accurate(backend.scores(*case), case)


def test_reference_in_float64_is_what_autograd_says_of_one_sample_at_a_time() -> None:
    inputs, grad_outputs, borders, directions = problem([3, 0, 5], 4, 6, 2, torch.float64)
    found = pyeff.directional_scores(inputs, grad_outputs, torch.tensor(borders), directions)
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    for s, (start, end) in enumerate(itertools.pairwise(borders)):
        loss = (torch.nn.functional.linear(inputs[start:end], weight) * grad_outputs[start:end]).sum()
        (gradient,) = torch.autograd.grad(loss, weight)
        torch.testing.assert_close(found[s], (gradient * directions).sum((1, 2)))


@every_backend
def test_gradients_of_tokens_that_cancel(backend: Backend) -> None:
    inputs, grad_outputs, borders, directions = problem([128, 2, 64], 48, 40, 2)
    inputs += 60
    for start, end in itertools.pairwise(borders):
        half = (end - start) // 2
        grad_outputs[start + half : end] = -grad_outputs[start : start + half]
    found = backend.scores(inputs, grad_outputs, borders, directions)
    case = inputs, grad_outputs, borders, directions
    # Token by token, as the operation: the sum of what cancels has the rounding of its largest term.
    terms = (grad_outputs.double()[:, None] * (inputs.double() @ directions.double().mT).transpose(0, 1)).abs().sum(2)
    largest = torch.stack([terms[i:j].sum(0) for i, j in itertools.pairwise(borders)])
    error = (found.double() - materialised(*case, torch.float64)).abs()
    assert (error <= 4 * torch.finfo(torch.float32).eps * math.sqrt(48) * largest).all()


@every_backend
def test_a_sample_or_a_direction_with_nan_or_infinity_spoils_only_itself(backend: Backend) -> None:
    inputs, grad_outputs, borders, directions = problem([9, 70, 0, 66, 5], 20, 24, 3)
    clean = backend.scores(inputs, grad_outputs, borders, directions)
    # The last token of a sample and the first of the next lie in one block of tokens.
    inputs[78, 3], grad_outputs[145, 7], directions[2, 4, 4] = math.nan, math.inf, math.nan
    found = backend.scores(inputs, grad_outputs, borders, directions)
    assert not found[[1, 4]].isfinite().any()
    assert found[[0, 3], 2].isnan().all()
    assert torch.equal(found[[0, 2, 3]][:, :2], clean[[0, 2, 3]][:, :2])


@every_backend
@pytest.mark.parametrize(
    "shape",
    [([], 4, 3, 2), ([0, 0], 4, 3, 2), ([5, 2], 0, 3, 2), ([5, 2], 4, 0, 2), ([5, 2], 0, 0, 1), ([5], 4, 3, 0)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nothing_sums_to_zero(backend: Backend, shape: tuple[list[int], int, int, int], dtype: torch.dtype) -> None:
    case = problem(*shape, dtype)
    assert torch.equal(backend.scores(*case), torch.zeros(len(shape[0]), shape[3]))


def strided(tensor: Tensor, how: str) -> Tensor:
    """The same values in another layout; "one row repeated" keeps the first row's."""
    if how == "transposed":
        return tensor.mT.contiguous().mT
    if how == "every other":
        return torch.repeat_interleave(tensor, 2, dim=-1)[..., ::2]
    if how == "rows apart":
        return torch.cat([tensor, -tensor], dim=-1)[..., : tensor.shape[-1]]
    return tensor[..., :1, :].expand_as(tensor)


@every_backend
@pytest.mark.parametrize("how", ["transposed", "every other", "rows apart", "one row repeated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("p", [36, 44], ids=["narrow", "wide"])
def test_any_strides(backend: Backend, how: str, dtype: torch.dtype, p: int) -> None:
    inputs, grad_outputs, borders, directions = problem([30, 30, 7], 40, p, 2, dtype)
    inputs, grad_outputs, directions = (strided(t.to(backend.device), how) for t in (inputs, grad_outputs, directions))
    found = backend.scores(inputs, grad_outputs, borders, directions)
    assert_accurate(found, (inputs.cpu(), grad_outputs.cpu(), borders, directions.cpu()))


@every_backend
def test_offsets_beyond_32_bits(backend: Backend) -> None:
    # Memory that is reserved and never touched but for the rows themselves.
    far = 2**30 + 16
    inputs, grad_outputs, borders, directions = problem([1, 2], 16, 3, 2, torch.float16)

    def spread(tensor: Tensor) -> Tensor:
        rows = tensor.shape[-2]
        storage = torch.UntypedStorage(2 * (far * (rows - 1) + 32), device=backend.device)
        view = torch.tensor([], dtype=torch.float16, device=backend.device)
        strides = (far, 1) if tensor.ndim == 2 else (16, far, 1)
        view.set_(storage, 0, tensor.shape, strides)
        return view.copy_(tensor)

    case = inputs, grad_outputs, borders, directions
    for a, g, q in (
        (spread(inputs), grad_outputs, directions),
        (inputs, spread(grad_outputs), directions),
        (inputs, grad_outputs, spread(directions)),
    ):
        assert_accurate(backend.scores(a, g, borders, q), case)


@every_backend
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_directions_of_another_dtype_are_neither_too_small_nor_too_large_for_16_bits(
    backend: Backend, scale: float
) -> None:
    inputs, grad_outputs, borders, _ = problem([30, 7], 40, 36, 2, torch.float16)
    wide = torch.randn(2, 36, 40) * scale
    wide[1] *= 1e-3
    found = backend.scores(inputs, grad_outputs, borders, wide)
    for q in range(2):
        # What rounding the direction to 16 bits costs, against the same sums with it as it is.
        case = inputs, grad_outputs, borders, wide[q : q + 1]
        exact = materialised(*case, torch.float64)
        rounded = (wide[q] / wide[q].abs().max()).half().double() * wide[q].abs().max().double()
        peer = materialised(inputs, grad_outputs, borders, rounded[None], torch.float64)
        assert_as_accurate(found[:, q : q + 1], exact, peer, multiple=4.0)


@pytest.mark.parametrize(
    "backend",
    [*(b for b in BACKENDS if b.impl != "reference"), pytest.param(Backend("triton", "cuda"), marks=pytest.mark.gpu)],
    ids=backends.name_of,
)
def test_repeats_give_the_same_bits(backend: Backend) -> None:
    case = problem([70, 70, 3, 140], 150, 140, 2)
    assert torch.equal(backend.scores(*case), backend.scores(*case))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8), data=st.data())
def test_neither_order_nor_company_changes_a_sample_s_scores(
    seed: int, lengths: list[int], data: st.DataObject
) -> None:
    # Small whole numbers, whose products sum exactly in any order.
    generator = torch.Generator().manual_seed(seed)
    inputs, grad_outputs = (torch.randint(-3, 4, (sum(lengths), k), generator=generator).float() for k in (7, 9))
    directions = torch.randint(-3, 4, (3, 9, 7), generator=generator).float()
    found = pyeff.directional_scores(inputs, grad_outputs, torch.tensor(borders_of(lengths)), directions)
    some = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=8))
    parts = torch.arange(sum(lengths)).split(lengths)
    tokens = torch.cat([parts[s] for s in some]) if some else torch.zeros(0, dtype=torch.long)
    borders = torch.tensor(borders_of([lengths[s] for s in some]))
    again = pyeff.directional_scores(inputs[tokens], grad_outputs[tokens], borders, directions.flip(0))
    assert torch.equal(again, found[some].flip(1))
    for q in range(3):
        grad = pyeff.linear_grad(
            inputs, grad_outputs, torch.tensor(borders_of(lengths)), norms=False, reference=directions[q]
        )
        assert torch.equal(grad.dots, found[:, q])
    # Samples' gradients sum to the batch's.
    assert torch.equal(found.sum(0), (grad.weight_grad * directions).sum((1, 2)))


def test_adamw_s_diagonal_folds_into_the_direction() -> None:
    inputs, grad_outputs, borders, directions = problem([3, 4], 5, 6, 2, torch.float64)
    frozen = pyeff.AdamWDirection(torch.randn(6, 5).double(), torch.rand(6, 5).double(), 3, frozen=True)
    folded = pyeff.directional_scores(inputs, grad_outputs, torch.tensor(borders), frozen(directions))
    grads = torch.stack([grad_outputs[i:j].T @ inputs[i:j] for i, j in itertools.pairwise(borders)])
    torch.testing.assert_close(folded, torch.einsum("spd,qpd->sq", frozen(grads), directions))


def test_arguments_that_do_not_fit_are_named() -> None:
    a, g, borders, q = torch.randn(7, 4), torch.randn(7, 3), torch.tensor([0, 7]), torch.randn(2, 3, 4)

    def scores(*arguments: Any, **options: Any) -> Tensor:
        return pyeff.directional_scores(*arguments, **options)

    with pytest.raises(TypeError, match="directions must be a tensor, got list"):
        scores(a, g, borders, [1.0])
    with pytest.raises(TypeError, match="directions must be float16"):
        scores(a, g, borders, q.long())
    with pytest.raises(TypeError, match="directions must be a dense tensor"):
        scores(a, g, borders, q.to_sparse())
    with pytest.raises(ValueError, match="directions must hold data"):
        scores(a, g, borders, q.to("meta"))
    for wrong in (q[0], q.mT, q[:, :2]):
        with pytest.raises(ValueError, match=r"directions must be \[Q, 3, 4\]"):
            scores(a, g, borders, wrong)
    with pytest.raises(ValueError, match="grad_outputs must have the 7 tokens"):
        scores(a, g[:6], borders, q)
    with pytest.raises(ValueError, match="cu_seqlens must rise"):
        scores(a, g, torch.tensor([0, 6]), q)
    with pytest.raises(ValueError, match="impl must be"):
        scores(a, g, borders, q, impl="panels")
    with pytest.raises(RuntimeError, match="inputs are float64"):
        scores(a.double(), g.double(), borders, q, impl="cpu")


def test_opcheck_and_one_graph() -> None:
    inputs, grad_outputs, borders, directions = problem([3, 0, 4], 5, 6, 2)
    operator = torch.ops.pyeff.directional_scores.default
    for impl in ("reference", "cpu"):
        torch.library.opcheck(operator, (inputs, grad_outputs, torch.tensor(borders), directions, impl))

    def doubled(inputs: Tensor, cu_seqlens: Tensor) -> Tensor:
        return 2 * pyeff.directional_scores(inputs + 1, grad_outputs, cu_seqlens, directions)

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs, torch.tensor(borders)), doubled(inputs, torch.tensor(borders)))


def test_explained() -> None:
    a, g, borders, q = torch.randn(7, 4), torch.randn(7, 3), torch.tensor([0, 7]), torch.randn(2, 3, 4)
    assert pyeff.explain(pyeff.directional_scores, a, g, borders, q).impl == "cpu"
    assert pyeff.explain(pyeff.directional_scores, a.double(), g.double(), borders, q).impl == "reference"


@pytest.mark.parametrize("tile", [(16, 16, 16), (32, 64, 16), (128, 128, 64)], ids=str)
@pytest.mark.parametrize("workspace", [1, 32 << 20], ids=["many launches", "one launch"])
def test_tiles_and_launches_change_only_the_rounding(
    tile: tuple[int, int, int], workspace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = importlib.import_module("pyeff.triton_kernels.directional_scores")
    monkeypatch.setattr(kernels, "WORKSPACE", workspace)
    monkeypatch.setattr(kernels, "SUM_BLOCK", 16)
    case = problem([5, 0, 40, 33], 72, 20, 3)
    inputs, grad_outputs, borders, directions = case
    device = "cpu" if interpreting() else "cuda"
    moved = [t.to(device) for t in (inputs, grad_outputs, torch.tensor(borders), directions)]
    assert_accurate(kernels.directional_scores(*moved, config=kernels.Config(*tile, 4, 2)).cpu(), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("limits", [(1, 1, 1), (3000, 2000, 3), (4 << 20, 16 << 20, 128)], ids=str)
def test_panels_and_copies_change_only_the_rounding(
    limits: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("pyeff.ops.directional_scores")
    for name, limit in zip(("_PANEL_BYTES", "_COPY_BYTES", "_LEAST_TOKENS"), limits, strict=True):
        monkeypatch.setattr(module, name, limit)
    case = problem([4, 4, 0, 4, 9, 2, 2, 30], 24, 20, 2, dtype)
    inputs, grad_outputs, borders, directions = case
    found = pyeff.directional_scores(inputs, grad_outputs, torch.tensor(borders), directions, impl="cpu")
    assert_accurate(found, case)


def test_memory_beside_inputs_and_outputs_is_bounded() -> None:
    code = """
import resource, torch, pyeff
torch.set_num_threads(1)
inputs, grad_outputs, directions = torch.ones(16384, 512), torch.ones(16384, 512), torch.ones(2, 512, 512)
pyeff.directional_scores(inputs[:4], grad_outputs[:4], torch.tensor([0, 4]), directions)
torch.mm(inputs[:2048], directions[0])  # what the product's library takes for itself
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pyeff.directional_scores(inputs, grad_outputs, torch.arange(0, 16385, 512), directions)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # 4 MiB of products and two numbers in double for each token and direction.
    assert int(done.stdout) <= (4 << 10) + 2 * 2 * 8 * 16, "the products alone would be 32 MiB"


@pytest.mark.gpu
def test_known_borders_do_not_make_the_host_wait() -> None:
    inputs, grad_outputs, borders, directions = problem([64, 0, 32], 64, 128, 2)
    moved = [t.cuda() for t in (inputs, grad_outputs, torch.tensor(borders), directions)]
    for _ in range(2):
        pyeff.directional_scores(*moved)
        torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")
