"""The weight gradient with every sample's norm and dot: right wherever float64 says so, on every implementation."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import backends
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_as_accurate
from torch import Tensor

import pyeff
from pyeff import LinearGrad
from pyeff._extension import extension
from pyeff.ops._dispatch import interpreting
from pyeff.ops._packed import samples_of

pytestmark = backends.quiet_interpreter

FIELDS = ("weight_grad", "norms_sq", "dots")


class Backend(backends.Backend):
    def grad(self, inputs: Tensor, grad_outputs: Tensor, borders: list[int], **options: Any) -> LinearGrad:
        """The result, back on the CPU."""
        moved = {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in options.items()}
        found = pyeff.linear_grad(
            inputs.to(self.device),
            grad_outputs.to(self.device),
            torch.tensor(borders, dtype=torch.int32, device=self.device),
            **moved,
            impl=self.impl,
        )
        fields = {name: getattr(found, name) for name in FIELDS}
        return LinearGrad(**{name: value if value is None else value.cpu() for name, value in fields.items()})

    def takes(self, reference: Tensor) -> Tensor | None:
        return None if self.impl == "gram" else reference


BACKENDS = backends.on_cpu(Backend, "panels", "gram")
every_backend = backends.on_every(Backend, "panels", "gram")


def borders_of(lengths: list[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


def problem(
    lengths: list[int], d: int, p: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, list[int], Tensor]:
    """inputs, grad_outputs, borders and a reference gradient."""
    tokens = sum(lengths)
    return torch.randn(tokens, d).to(dtype), torch.randn(tokens, p).to(dtype), borders_of(lengths), torch.randn(p, d)


def materialised(
    inputs: Tensor, grad_outputs: Tensor, borders: list[int], reference: Tensor, dtype: torch.dtype
) -> LinearGrad:
    """All samples' gradients at once, in `dtype`: one outer product a token, summed by sample."""
    outer = grad_outputs.to(dtype)[:, :, None] * inputs.to(dtype)[:, None, :]  # [N, p, d]
    owner = torch.repeat_interleave(torch.tensor(borders).diff())
    per_sample = outer.new_zeros(len(borders) - 1, *outer.shape[1:]).index_add_(0, owner, outer)
    return LinearGrad(
        per_sample.sum(0), per_sample.square().sum((1, 2)), (per_sample * reference.to(dtype)).sum((1, 2))
    )


def of_grams(inputs: Tensor, grad_outputs: Tensor, borders: list[int]) -> Tensor:
    """The norms by Gram matrices in float32."""
    a, g = inputs.float(), grad_outputs.float()
    return torch.stack([((a[i:j] @ a[i:j].T) * (g[i:j] @ g[i:j].T)).sum() for i, j in itertools.pairwise(borders)])


def assert_accurate(
    actual: LinearGrad,
    inputs: Tensor,
    grad_outputs: Tensor,
    borders: list[int],
    reference: Tensor,
    impl: str = "auto",
) -> None:
    """As accurate as torch in float32; few numbers are few draws of its rounding errors, hence a multiple of 4."""
    exact = materialised(inputs, grad_outputs, borders, reference, torch.float64)
    peer = materialised(inputs, grad_outputs, borders, reference, torch.float32)
    if impl == "gram":
        assert actual.dots is None
        peer = dataclasses.replace(peer, norms_sq=of_grams(inputs, grad_outputs, borders))
    for name in FIELDS[: 2 if impl == "gram" else 3]:
        expected = getattr(peer, name)
        if name == "weight_grad":
            expected = expected.to(inputs.dtype)
        assert_as_accurate(getattr(actual, name), getattr(exact, name), expected, multiple=4.0, what=name)


# Lengths of samples, d and p.
SHAPES = [
    ([1], 1, 1),
    ([1, 1, 1], 5, 3),
    ([0, 7, 0, 0, 7, 7, 2, 0], 33, 18),
    ([70, 64, 1, 130], 40, 150),
    ([128, 128], 160, 64),
]


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_materialised_gradients(
    backend: Backend, shape: tuple[list[int], int, int], dtype: torch.dtype
) -> None:
    inputs, grad_outputs, borders, reference = problem(*shape, dtype)
    if not backend.supports(dtype):
        with pytest.raises(RuntimeError, match="bfloat16"):
            backend.grad(inputs, grad_outputs, borders)
        return
    found = backend.grad(inputs, grad_outputs, borders, reference=backend.takes(reference))
    assert found.weight_grad.dtype == dtype
    assert found.norms_sq.dtype == torch.float32
    assert found.dots is None or found.dots.dtype == torch.float32
    assert_accurate(found, inputs, grad_outputs, borders, reference, backend.impl)


def test_reference_in_float64_is_what_autograd_says_of_one_sample_at_a_time() -> None:
    inputs, grad_outputs, borders, reference = (
        t.double() if isinstance(t, Tensor) else t for t in problem([3, 0, 5], 4, 6)
    )
    found = pyeff.linear_grad(inputs, grad_outputs, torch.tensor(borders), reference=reference)
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    total = torch.zeros_like(weight)
    for s, (start, end) in enumerate(itertools.pairwise(borders)):
        loss = (torch.nn.functional.linear(inputs[start:end], weight) * grad_outputs[start:end]).sum()
        (gradient,) = torch.autograd.grad(loss, weight)
        torch.testing.assert_close(found.norms_sq[s], gradient.square().sum())
        torch.testing.assert_close(found.dots[s], (gradient * reference).sum())
        total += gradient
    torch.testing.assert_close(found.weight_grad, total)


@every_backend
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
def test_what_is_not_asked_for_is_none_and_changes_nothing_else(
    backend: Backend, wanted: tuple[bool, bool, bool]
) -> None:
    inputs, grad_outputs, borders, reference = problem([20, 3], 24, 20)
    weight_grad, norms, dots = wanted
    options = {"weight_grad": weight_grad, "norms": norms, "reference": reference if dots else None}
    if not any(wanted):
        with pytest.raises(ValueError, match="nothing is asked for"):
            backend.grad(inputs, grad_outputs, borders, **options)
        return
    if dots and backend.takes(reference) is None:
        with pytest.raises(RuntimeError, match="no dots"):
            backend.grad(inputs, grad_outputs, borders, **options)
        return
    everything = backend.grad(inputs, grad_outputs, borders, reference=backend.takes(reference))
    found = backend.grad(inputs, grad_outputs, borders, **options)
    for name, asked in zip(FIELDS, wanted, strict=True):
        value = getattr(found, name)
        assert (value is not None) == asked
        if asked:
            torch.testing.assert_close(value, getattr(everything, name))


def cancelling(lengths: list[int], d: int, p: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[int], Tensor]:
    """Activations with a large mean in common, gradients that sum to zero over each sample's tokens, exactly."""
    inputs, grad_outputs, borders, reference = problem(lengths, d, p, dtype)
    inputs = (inputs + 60).to(dtype)
    for start, end in itertools.pairwise(borders):
        half = (end - start) // 2
        grad_outputs[start + half : end] = -grad_outputs[start : start + half]
    return inputs, grad_outputs, borders, reference


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_of_tokens_that_cancel(backend: Backend, dtype: torch.dtype) -> None:
    case = cancelling([128, 2, 64], 48, 40, dtype)
    inputs, grad_outputs, borders, reference = case
    found = backend.grad(inputs, grad_outputs, borders, reference=backend.takes(reference))
    assert_accurate(found, *case, backend.impl)


@every_backend
def test_a_sample_with_nan_or_infinity_spoils_only_itself(backend: Backend) -> None:
    inputs, grad_outputs, borders, reference = problem([9, 70, 0, 66, 5], 20, 24)
    taken = backend.takes(reference)
    clean = backend.grad(inputs, grad_outputs, borders, reference=taken)
    # The last token of a sample and the first of the next lie in one block of tokens.
    inputs[78, 3] = math.nan
    grad_outputs[145, 7] = math.inf
    found = backend.grad(inputs, grad_outputs, borders, reference=taken)
    for name in ("norms_sq", "dots") if taken is not None else ("norms_sq",):
        assert not getattr(found, name)[[1, 4]].isfinite().any()
        assert torch.equal(getattr(found, name)[[0, 2, 3]], getattr(clean, name)[[0, 2, 3]])
    assert found.weight_grad[:, 3].isnan().all()


@every_backend
@pytest.mark.parametrize("shape", [([], 4, 3), ([0, 0], 4, 3), ([5, 2], 0, 3), ([5, 2], 4, 0)], ids=str)
def test_nothing_sums_to_zero(backend: Backend, shape: tuple[list[int], int, int]) -> None:
    inputs, grad_outputs, borders, reference = problem(*shape)
    taken = backend.takes(reference)
    found = backend.grad(inputs, grad_outputs, borders, reference=taken)
    assert torch.equal(found.weight_grad, torch.zeros(reference.shape))
    assert torch.equal(found.norms_sq, torch.zeros(len(shape[0])))
    assert taken is None or torch.equal(found.dots, torch.zeros(len(shape[0])))


def strided(tensor: Tensor, how: str) -> Tensor:
    """The same values [N, K] in another layout; "one row repeated" keeps the first row's."""
    if how == "transposed":
        return tensor.T.contiguous().T
    if how == "every other":
        return torch.repeat_interleave(tensor, 2, dim=1)[:, ::2]
    if how == "rows apart":
        return torch.cat([tensor, -tensor], dim=1)[:, : tensor.shape[1]]
    return tensor[:1].expand_as(tensor)


@every_backend
@pytest.mark.parametrize("how", ["transposed", "every other", "rows apart", "one row repeated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_strides(backend: Backend, how: str, dtype: torch.dtype) -> None:
    inputs, grad_outputs, borders, reference = problem([30, 30, 7], 40, 36, dtype)
    inputs, grad_outputs, reference = (strided(t.to(backend.device), how) for t in (inputs, grad_outputs, reference))
    found = backend.grad(inputs, grad_outputs, borders, reference=backend.takes(reference))
    assert_accurate(found, inputs.cpu(), grad_outputs.cpu(), borders, reference.cpu(), backend.impl)


@every_backend
def test_offsets_beyond_32_bits(backend: Backend) -> None:
    # Memory that is reserved and never touched but for the rows themselves.
    far = 2**30 + 16
    inputs, grad_outputs, borders, reference = problem([1, 2], 16, 16, torch.float16)

    def spread(tensor: Tensor) -> Tensor:
        storage = torch.UntypedStorage(2 * (far * (tensor.shape[0] - 1) + 16), device=backend.device)
        view = torch.tensor([], dtype=torch.float16, device=backend.device)
        view.set_(storage, 0, tensor.shape, (far, 1))
        return view.copy_(tensor)

    for a, g in ((spread(inputs), grad_outputs), (inputs, spread(grad_outputs))):
        found = backend.grad(a, g, borders, reference=backend.takes(reference))
        assert_accurate(found, inputs, grad_outputs, borders, reference, backend.impl)


@pytest.mark.parametrize(
    "backend",
    [
        *(b for b in BACKENDS if b.impl != "reference"),
        *(pytest.param(Backend(impl, "cuda"), marks=pytest.mark.gpu) for impl in ("triton", "panels", "gram")),
    ],
    ids=backends.name_of,
)
def test_repeats_give_the_same_bits(backend: Backend) -> None:
    inputs, grad_outputs, borders, reference = problem([70, 70, 3, 140], 150, 140)
    taken = backend.takes(reference)
    first, again = (backend.grad(inputs, grad_outputs, borders, reference=taken) for _ in range(2))
    for name in FIELDS if taken is not None else FIELDS[:2]:
        assert torch.equal(getattr(first, name), getattr(again, name)), name


lengths_of_samples = st.lists(st.integers(0, 9), min_size=1, max_size=8)


def whole_numbers(seed: int, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Small whole numbers, whose products and their sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    inputs, grad_outputs, reference = (
        torch.randint(-3, 4, shape, generator=generator).float()
        for shape in ((sum(lengths), 7), (sum(lengths), 9), (9, 7))
    )
    return inputs, grad_outputs, reference


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), lengths=lengths_of_samples)
def test_permuting_samples_permutes_their_numbers(seed: int, lengths: list[int]) -> None:
    inputs, grad_outputs, reference = whole_numbers(seed, lengths)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    tokens = torch.cat([torch.arange(sum(lengths)).split(lengths)[s] for s in order])
    found = pyeff.linear_grad(inputs, grad_outputs, torch.tensor(borders_of(lengths)), reference=reference)
    permuted_borders = torch.tensor(borders_of([lengths[s] for s in order]))
    permuted = pyeff.linear_grad(inputs[tokens], grad_outputs[tokens], permuted_borders, reference=reference)
    assert torch.equal(permuted.norms_sq, found.norms_sq[order])
    assert torch.equal(permuted.dots, found.dots[order])
    assert torch.equal(permuted.weight_grad, found.weight_grad)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), lengths=lengths_of_samples, data=st.data())
def test_splitting_the_batch_changes_nothing(seed: int, lengths: list[int], data: st.DataObject) -> None:
    inputs, grad_outputs, reference = whole_numbers(seed, lengths)
    at = data.draw(st.integers(0, len(lengths)))
    cut = sum(lengths[:at])
    whole = pyeff.linear_grad(inputs, grad_outputs, torch.tensor(borders_of(lengths)), reference=reference)
    parts = [
        pyeff.linear_grad(inputs[tokens], grad_outputs[tokens], torch.tensor(borders_of(part)), reference=reference)
        for tokens, part in ((slice(0, cut), lengths[:at]), (slice(cut, None), lengths[at:]))
    ]
    assert torch.equal(torch.cat([part.norms_sq for part in parts]), whole.norms_sq)
    assert torch.equal(torch.cat([part.dots for part in parts]), whole.dots)
    assert torch.equal(parts[0].weight_grad + parts[1].weight_grad, whole.weight_grad)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), lengths=lengths_of_samples)
def test_a_gradient_s_dot_with_the_batch_s_sums_to_the_batch_s_squared_norm(seed: int, lengths: list[int]) -> None:
    inputs, grad_outputs, _ = whole_numbers(seed, lengths)
    borders = torch.tensor(borders_of(lengths))
    total = pyeff.linear_grad(inputs, grad_outputs, borders).weight_grad
    dots = pyeff.linear_grad(inputs, grad_outputs, borders, weight_grad=False, norms=False, reference=total).dots
    assert dots.double().sum() == total.double().square().sum()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), lengths=lengths_of_samples, power=st.integers(-20, 20))
def test_scaling_the_loss_scales_the_norms(seed: int, lengths: list[int], power: int) -> None:
    inputs, grad_outputs, _ = whole_numbers(seed, lengths)
    borders = torch.tensor(borders_of(lengths))
    plain = pyeff.linear_grad(inputs, grad_outputs, borders)
    scaled = pyeff.linear_grad(inputs, grad_outputs * 2.0**power, borders)
    assert torch.equal(scaled.norms_sq, plain.norms_sq * 4.0**power)


def test_borders_of_either_integer_type() -> None:
    inputs, grad_outputs, borders, _ = problem([3, 4], 5, 6)
    expected = pyeff.linear_grad(inputs, grad_outputs, torch.tensor(borders)).norms_sq
    assert torch.equal(pyeff.linear_grad(inputs, grad_outputs, torch.tensor(borders).int()).norms_sq, expected)


def test_memory_kept_from_inference_mode_serves_outside_of_it() -> None:
    inputs, grad_outputs, borders, _ = problem([3, 4], 5, 6)

    def norms() -> Tensor:
        return pyeff.linear_grad(inputs, grad_outputs, torch.tensor(borders)).norms_sq

    def inside_then_outside() -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            first = norms()
        return first, norms()

    with ThreadPoolExecutor(1) as pool:  # a thread that has kept nothing yet
        first, second = pool.submit(inside_then_outside).result()
    assert torch.equal(first, second)


def test_autocast_and_gradients_leave_the_result_alone() -> None:
    inputs, grad_outputs, borders, _ = problem([3, 4], 5, 6)
    plain = pyeff.linear_grad(inputs, grad_outputs, torch.tensor(borders))
    with torch.autocast("cpu", torch.bfloat16):
        inside = pyeff.linear_grad(inputs.requires_grad_(), grad_outputs.requires_grad_(), torch.tensor(borders))
    assert torch.equal(plain.weight_grad, inside.weight_grad)
    assert not inside.weight_grad.requires_grad


BAD_BORDERS = {
    "starts late": torch.tensor([1, 4, 7]),
    "ends early": torch.tensor([0, 4, 6]),
    "ends late": torch.tensor([0, 4, 8]),
    "falls": torch.tensor([0, 5, 4, 7]),
    "of two dimensions": torch.tensor([[0, 7]]),
    "empty": torch.tensor([], dtype=torch.int64),
}


@pytest.mark.parametrize("which", BAD_BORDERS)
def test_borders_that_are_none_are_refused(which: str) -> None:
    inputs, grad_outputs, *_ = problem([7], 4, 3)
    for operation in (pyeff.linear_grad, pyeff.gram_norms):
        with pytest.raises(ValueError, match="cu_seqlens must"):
            operation(inputs, grad_outputs, BAD_BORDERS[which])
        with pytest.raises(TypeError, match="cu_seqlens must be int32 or int64"):
            operation(inputs, grad_outputs, BAD_BORDERS[which].float())


def test_borders_need_not_lie_side_by_side() -> None:
    torch.manual_seed(0)
    a, g, gains = torch.randn(37, 5), torch.randn(37, 3), torch.randn(37, 5)
    indices, head, targets = torch.randint(4, (37,)), torch.randn(6, 5), torch.randint(6, (37,))
    operations = (
        lambda borders: pyeff.linear_grad(a, g, borders).norms_sq,
        lambda borders: pyeff.gram_norms(a, g, borders),
        lambda borders: pyeff.vector_grad(gains, borders).norms_sq,
        lambda borders: pyeff.norm_layer_grad(a, gains, borders, eps=1e-6).weight.norms_sq,
        lambda borders: pyeff.embedding_grad(indices, gains, borders, 4).norms_sq,
        lambda borders: pyeff.linear_cross_entropy_grad(a, head, targets, borders).norms_sq,
    )
    plain = torch.tensor([0, 5, 6, 37])
    for borders in (torch.stack([plain, plain * 0 - 1], 1)[:, 0], torch._neg_view(-plain)):
        for operation in operations:
            assert torch.equal(operation(borders), operation(plain))


def test_arguments_that_are_no_dense_tensors_with_data_are_named() -> None:
    a, g, borders = torch.randn(7, 4), torch.randn(7, 3), torch.tensor([0, 7])
    for operation in (pyeff.linear_grad, pyeff.gram_norms):
        with pytest.raises(TypeError, match=r"inputs must be a dense tensor, got torch\.sparse_coo"):
            operation(a.to_sparse(), g, borders)
        with pytest.raises(TypeError, match="inputs must be a dense tensor, got nested"):
            operation(torch.nested.nested_tensor([a, a]), g, borders)
        with pytest.raises(TypeError, match="cu_seqlens must be a dense tensor"):
            operation(a, g, borders.to_sparse())
        with pytest.raises(ValueError, match="cu_seqlens must hold data, and is on the meta device"):
            operation(a, g, borders.to("meta"))
        with pytest.raises(ValueError, match="inputs must hold data, and is on the meta device"):
            operation(a.to("meta"), g.to("meta"), borders)
    with pytest.raises(TypeError, match="reference must be a dense tensor"):
        pyeff.linear_grad(a, g, borders, reference=torch.randn(3, 4).to_sparse())


def test_arguments_that_do_not_fit_are_named() -> None:
    a, g, borders = torch.randn(7, 4), torch.randn(7, 3), torch.tensor([0, 7])
    for operation in (pyeff.linear_grad, pyeff.gram_norms):
        with pytest.raises(TypeError, match="inputs must be a tensor, got list"):
            operation([1.0], g, borders)
        with pytest.raises(TypeError, match="cu_seqlens must be a tensor"):
            operation(a, g, [0, 7])
        with pytest.raises(ValueError, match=r"inputs must be \[tokens, features\]"):
            operation(a[None], g, borders)
        with pytest.raises(ValueError, match="grad_outputs must have the 7 tokens"):
            operation(a, g[:6], borders)
        with pytest.raises(ValueError, match="grad_outputs must have the dtype of inputs"):
            operation(a, g.double(), borders)
        with pytest.raises(TypeError, match="grad_outputs must be float16"):
            operation(a, g.long(), borders)
        with pytest.raises(TypeError, match="inputs must be float16"):
            operation(a.long(), g.long(), borders)
        with pytest.raises(ValueError, match="grad_outputs must be on the device of inputs"):
            operation(a, g.to("meta"), borders)
        with pytest.raises(ValueError, match="impl must be"):
            operation(a, g, borders, impl="fast")
        with pytest.raises(RuntimeError, match="inputs are float64"):
            operation(a.double(), g.double(), borders, impl="cpu")
    with pytest.raises(TypeError, match="reference must be a tensor or None"):
        pyeff.linear_grad(a, g, borders, reference=1.0)
    with pytest.raises(ValueError, match=r"reference must be \[3, 4\]"):
        pyeff.linear_grad(a, g, borders, reference=torch.randn(4, 3))
    with pytest.raises(TypeError, match="reference must be floating point"):
        pyeff.linear_grad(a, g, borders, reference=torch.ones(3, 4, dtype=torch.long))


def test_opcheck() -> None:
    inputs, grad_outputs, borders, reference = problem([3, 0, 4], 5, 6)
    operator = torch.ops.pyeff.linear_grad.default
    for impl in ("reference", "cpu"):
        for options in ((True, True, reference), (True, False, None), (False, True, None)):
            torch.library.opcheck(operator, (inputs, grad_outputs, torch.tensor(borders), *options, impl))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    def norms(inputs: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor, reference: Tensor) -> tuple[Tensor, ...]:
        grad = pyeff.linear_grad(inputs * 2, grad_outputs, cu_seqlens, reference=reference)
        return grad.weight_grad, grad.norms_sq + 1, grad.dots, pyeff.gram_norms(inputs, grad_outputs, cu_seqlens)

    compiled = torch.compile(norms, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for lengths in ([3, 0, 4], [5, 6, 7]):
        inputs, grad_outputs, borders, reference = problem(lengths, 5, 6)
        arguments = (inputs.requires_grad_(), grad_outputs, torch.tensor(borders), reference)
        for found, expected in zip(compiled(*arguments), norms(*arguments), strict=True):
            assert torch.equal(found, expected)
            assert not found.requires_grad
    with pytest.raises(ValueError, match="cu_seqlens must rise"):
        compiled(inputs, grad_outputs, torch.tensor([0, 2, 1, 18]), reference)


def test_known_borders_are_not_read_back_twice_unless_written(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("pyeff.ops._packed")

    class Counted(torch.Tensor):
        """Borders on some device that is not the CPU's."""

        reads = 0
        device = torch.device("meta")

        def cpu(self) -> Tensor:
            Counted.reads += 1
            return self.as_subclass(Tensor)

    borders = torch.tensor([0, 3, 7]).as_subclass(Counted)
    first = module.samples_of(borders, 7)
    assert module.samples_of(borders, 7) is first
    assert first.block_pairs(2) == 3 + 3
    with pytest.raises(ValueError, match="number of tokens, 8"):
        module.samples_of(borders, 8)
    assert Counted.reads == 1
    borders[1] = 9
    with pytest.raises(ValueError, match=r"got \[0, 9, 7\]"):
        module.samples_of(borders, 7)
    assert Counted.reads == 2


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "panels", "gram"])
def test_known_borders_do_not_make_the_host_wait(impl: str) -> None:
    inputs, grad_outputs, borders, reference = (
        t.cuda() if isinstance(t, Tensor) else torch.tensor(t) for t in problem([64, 0, 32], 64, 128)
    )
    taken = Backend(impl, "cuda").takes(reference)
    for cu_seqlens in (borders.cuda(), borders):
        for _ in range(2):
            pyeff.linear_grad(inputs, grad_outputs, cu_seqlens, reference=taken, impl=impl)
            pyeff.gram_norms(inputs, grad_outputs, cu_seqlens)
            torch.cuda.set_sync_debug_mode("error")
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------------------------------------- the Triton kernel


TILES = [(16, 16, 16), (16, 32, 32), (64, 16, 16), (128, 128, 64)]


@pytest.mark.parametrize("described", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("workspace", [1, 32 << 20], ids=["many launches", "one launch"])
def test_tiles_and_launches_change_only_the_rounding(
    tile: tuple[int, int, int], workspace: int, described: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = importlib.import_module("pyeff.triton_kernels.linear_grad")
    monkeypatch.setattr(kernels, "WORKSPACE", workspace)
    monkeypatch.setattr(kernels, "LEAST_TILES", 7)
    # Ten rows of tiles of sixteen: more than a group of eight. Whole blocks of tokens, and what is left of a sample.
    inputs, grad_outputs, borders, reference = problem([5, 0, 40, 64, 81], 52, 152)
    device = "cpu" if interpreting() else "cuda"
    moved = [t.to(device) for t in (inputs, grad_outputs, torch.tensor(borders))]
    assert all(kernels.describable(t) for t in moved[:2])
    config = kernels.Config(*tile, 4, 2, described)
    fields = kernels.linear_grad(*moved, reference=reference.to(device), config=config)
    found = LinearGrad(*(field.cpu() for field in fields))
    assert_accurate(found, inputs, grad_outputs, borders, reference)


@pytest.mark.parametrize(
    ("how", "told"),
    [("plain", True), ("rows apart", True), ("transposed", False), ("every other", False), ("one row repeated", False)],
)
def test_only_rows_that_begin_aligned_are_described(how: str, told: bool) -> None:
    kernels = importlib.import_module("pyeff.triton_kernels.linear_grad")
    tensor = torch.randn(12, 8)
    assert kernels.describable(tensor if how == "plain" else strided(tensor, how)) == told
    # A row of seven is 28 bytes; a column later the first row begins at 4.
    assert not kernels.describable(torch.randn(12, 7))
    assert not kernels.describable(tensor[:, 1:5])


def test_measured_launch_choices_come_before_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = importlib.import_module("pyeff.triton_kernels.linear_grad")
    large, small = kernels.Config(128, 128, 64, 8, 3, True), kernels.Config(64, 64, 64, 4, 4)
    monkeypatch.setattr(kernels, "MEASURED", {((9, 0), False): ((1 << 20, large), (0, small))})
    picked = [kernels.pick_config(torch.bfloat16, False, (9, 0), elements) for elements in (1 << 24, 1 << 20, 9)]
    assert picked == [large, large, small]
    for others in ((torch.float32, False, (9, 0)), (torch.bfloat16, True, (9, 0)), (torch.bfloat16, False, (8, 0))):
        assert kernels.pick_config(*others, 9) not in (large, small)


# ------------------------------------------------------------------------------------------------- panels and Grams


@pytest.mark.parametrize("panel", [1, 3000, 60000], ids=["rows", "samples", "all"])
@pytest.mark.parametrize("block", [16, 1024])
def test_panels_of_the_gpu_change_only_the_rounding(panel: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("pyeff.ops.linear_grad")
    kernels = importlib.import_module("pyeff.triton_kernels.linear_grad")
    monkeypatch.setattr(module, "_panel_bytes", lambda device: panel)
    monkeypatch.setattr(kernels, "PANEL_BLOCK", block)
    backend = Backend("panels", "cpu" if interpreting() else "cuda")
    for dtype in (torch.float32, torch.float16):
        inputs, grad_outputs, borders, reference = problem([4, 4, 0, 9], 12, 10, dtype)
        found = backend.grad(inputs, grad_outputs, borders, reference=reference)
        assert_accurate(found, inputs, grad_outputs, borders, reference)


def lengths_between(low: int, high: int, tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        drawn = int(torch.randint(low, high, (), generator=generator))
        lengths.append(min(drawn, tokens - sum(lengths)))
    return lengths


def test_gram_norms_are_added_exactly_where_they_cost_less_than_the_interruptions() -> None:
    module = importlib.import_module("pyeff.ops.linear_grad")
    capability, processors, d, p = (9, 0), 132, 4096, 1024
    rates = module.GPU_RATES[capability]
    for lengths in ([64] * 256, [200] * 80, [512] * 32, [2048] * 8, [16384], lengths_between(64, 513, 16384), []):
        samples = samples_of(torch.tensor(borders_of(lengths)), sum(lengths))
        # Pairs of blocks counted one by one: both Grams, two FLOPs a product.
        flops = {64: 0, 128: 0}
        for block, length in itertools.product(flops, lengths):
            starts = range(0, length, block)
            flops[block] += 2 * block**2 * (d + p) * sum(i <= j for i, j in itertools.product(starts, starts))
        waves = math.ceil(math.ceil(d / 128) * math.ceil(p / 128) / processors)
        gram = min(flops[128], flops[64] / 0.75) / rates.gram_flops + module._GRAM_LAUNCHES_SECONDS
        drains = len(lengths) * waves * rates.drain_seconds
        assert module.gram_add_on_is_cheaper(samples, d, p, capability, processors) == (gram < drains)
    assert not module.gram_add_on_is_cheaper(samples, d, p, (7, 5), processors)


def test_short_samples_take_gram_norms_and_long_ones_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("pyeff.ops.linear_grad")
    monkeypatch.setattr(module, "_gpu", lambda device: ((9, 0), 132))

    class OnGpu:
        """What the rule asks of a tensor."""

        is_cuda, dtype, device = True, torch.bfloat16, "cuda:0"
        shape = (16384, 4096)

    short, long = torch.arange(0, 16385, 128), torch.arange(0, 16385, 2048)
    gpu: Any = OnGpu()
    assert module._order(gpu, gpu, short)[0] == "gram"
    assert module._order(gpu, gpu, long)[0] == "triton"
    for options in ({"norms": False}, {"weight_grad": False}, {"reference": gpu}):
        assert module._order(gpu, gpu, short, **options)[0] == "triton"
    OnGpu.dtype = torch.float32
    assert module._order(gpu, gpu, short)[0] == "triton"


@pytest.mark.gpu
def test_auto_on_a_gpu_keeps_to_its_rule() -> None:
    module = importlib.import_module("pyeff.ops.linear_grad")
    inputs = torch.randn(4096, 512, dtype=torch.bfloat16, device="cuda")
    for length in (64, 4096):
        cu_seqlens = torch.arange(0, 4097, length, device="cuda")
        samples = samples_of(cu_seqlens, 4096)
        gram = module.gram_add_on_is_cheaper(samples, 512, 512, *module._gpu(inputs.device))
        found = pyeff.explain(pyeff.linear_grad, inputs, inputs, cu_seqlens)
        assert found.impl == ("gram" if gram else "triton")


# ---------------------------------------------------------------------------------------------------- the CPU kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("panel", [1, 3000, 60000], ids=["rows", "samples", "all"])
@pytest.mark.parametrize("copy", [1, 2000, 1 << 24], ids=["token by token", "some tokens", "all tokens"])
@pytest.mark.parametrize("least_rows", [7, 1024], ids=["all samples", "all rows"])
def test_panels_and_copies_change_only_the_rounding(
    panel: int, copy: int, least_rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("pyeff.ops.linear_grad")
    monkeypatch.setattr(module, "_LEAST_ROWS", least_rows)
    monkeypatch.setattr(module, "_PANEL_BYTES", panel)
    monkeypatch.setattr(module, "_COPY_BYTES", copy)
    inputs, grad_outputs, borders, reference = problem([4, 4, 0, 4, 9, 2, 2, 30], 24, 20, dtype)
    found = pyeff.linear_grad(inputs, grad_outputs, torch.tensor(borders), reference=reference, impl="cpu")
    assert_accurate(found, inputs, grad_outputs, borders, reference)


def in_fresh_process(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_instruction_level_gives_the_same_bits() -> None:
    code = """
import hashlib, torch, pyeff
torch.manual_seed(0)
digest = hashlib.sha256()
for tokens, d, p in ((3, 5, 1), (40, 32, 500), (70, 67, 133)):
    inputs, grad_outputs, reference = torch.randn(tokens, d), torch.randn(tokens, p), torch.randn(p, d)
    cu_seqlens = torch.tensor([0, 1, tokens // 2, tokens])
    for weight_grad in (True, False):
        for norms, r in ((True, None), (False, reference), (True, reference)):
            grad = pyeff.linear_grad(
                inputs, grad_outputs, cu_seqlens, weight_grad=weight_grad, norms=norms, reference=r, impl="cpu"
            )
            for value in (grad.weight_grad, grad.norms_sq, grad.dots):
                digest.update(b"" if value is None else value.numpy().tobytes())
    digest.update(pyeff.gram_norms(inputs, grad_outputs, cu_seqlens, impl="cpu").numpy().tobytes())
print(pyeff._extension.extension().build_info()["cpu_level"], digest.hexdigest())
"""
    levels = ["baseline", "avx2", "avx512"]
    levels = levels[: levels.index(extension().build_info()["highest_cpu_level"]) + 1]
    outputs = [in_fresh_process(code, PYEFF_CPU_LEVEL=level).split() for level in levels]
    assert [level for level, _ in outputs] == levels
    assert len({digest for _, digest in outputs}) == 1


@pytest.mark.parametrize("elements", [1, 17, 4096, 70001])
def test_thread_count_changes_no_bit_of_the_reductions(elements: int) -> None:
    panel, reference = torch.randn(3, elements), torch.randn(elements)

    def reduced(threads: int) -> tuple[Tensor, Tensor, Tensor]:
        total, sums = torch.empty(elements), torch.zeros(2, 3, dtype=torch.float64)
        extension().reduce_panel(
            panel=panel.data_ptr(),
            samples=3,
            elements=elements,
            reference=reference.data_ptr(),
            reference_stride=0,
            total=total.data_ptr(),
            start_total=True,
            norms_sq=sums[0].data_ptr(),
            dots=sums[1].data_ptr(),
            threads=threads,
        )
        return total, *sums

    alone = reduced(1)
    for threads in (2, 5):
        assert all(torch.equal(a, b) for a, b in zip(alone, reduced(threads), strict=True))


@pytest.mark.parametrize(("dtype", "promised_mib"), [("float32", 32), ("bfloat16", 48)])
def test_memory_beside_inputs_and_outputs_is_bounded(dtype: str, promised_mib: int) -> None:
    code = f"""
import resource, torch, pyeff
torch.set_num_threads(1)
inputs, grad_outputs = (torch.ones(1024, 512, dtype=torch.{dtype}) for _ in range(2))
cu_seqlens = torch.arange(0, 1025, 4)
pyeff.linear_grad(inputs[:4], grad_outputs[:4, :8], cu_seqlens[:2], impl="cpu")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
grad = pyeff.linear_grad(inputs, grad_outputs, cu_seqlens, impl="cpu")
extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(extra - grad.weight_grad.nbytes // 1024)
"""
    extra_kib = int(in_fresh_process(code))
    assert extra_kib <= promised_mib * 1024, "the samples' gradients alone would be 256 MiB"
