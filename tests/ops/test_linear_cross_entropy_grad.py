"""Gradients of a head's loss and their norms: right wherever float64 says so, on every implementation."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
import os
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
from torch.nn.functional import cross_entropy

import pyeff
from pyeff import HeadGrad
from pyeff._extension import extension
from pyeff.ops._dispatch import interpreting

pytestmark = backends.quiet_interpreter

FIELDS = ("losses", "hidden_grad", "weight_grad", "bias_grad", "norms_sq", "bias_norms_sq")
MODULE = importlib.import_module("pyeff.ops.linear_cross_entropy_grad")


class Backend(backends.Backend):
    def grad(self, hidden: Tensor, weight: Tensor, targets: Tensor, borders: list[int], **options: Any) -> HeadGrad:
        """The result, back on the CPU."""
        moved = {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in options.items()}
        tensors = (tensor.to(self.device) for tensor in (hidden, weight, targets, torch.tensor(borders)))
        found = pyeff.linear_cross_entropy_grad(*tensors, **moved, impl=self.impl)
        fields = {name: getattr(found, name) for name in FIELDS}
        return HeadGrad(**{name: None if value is None else value.cpu() for name, value in fields.items()})


BACKENDS = backends.on_cpu(Backend)
every_backend = backends.on_every(Backend)


def problem(
    lengths: list[int], d: int, v: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """hidden, weight, targets and borders."""
    n = sum(lengths)
    borders = [0, *itertools.accumulate(lengths)]
    return torch.randn(n, d).to(dtype), torch.randn(v, d).to(dtype), torch.randint(0, v, (n,)), borders


def by_autograd(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    borders: list[int],
    *,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    softcap: float | None = None,
    grad_losses: Tensor | float = 1.0,
    by_grams: bool = False,
) -> HeadGrad:
    """One sample at a time, logits and all, in `dtype`; gradients have it too. Norms may come from Gram matrices."""
    h, w = (t.to(dtype).requires_grad_() for t in (hidden, weight))
    b = None if bias is None else bias.to(dtype).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    scale = torch.as_tensor(grad_losses, dtype=dtype).expand(targets.shape)
    parameters = [h, w] if b is None else [h, w, b]
    totals, norms_sq, losses = [torch.zeros_like(p) for p in parameters], [], [h.new_zeros(0)]
    for start, end in itertools.pairwise(borders):
        x = h[start:end] @ w.T if b is None else h[start:end] @ w.T + b
        z = (x if softcap is None else softcap * torch.tanh(x / softcap)).to(wide)
        nll = cross_entropy(z, targets[start:end].long(), reduction="none")
        *grads, g = torch.autograd.grad((nll * scale[start:end]).sum(), [*parameters, x])
        for total, grad in zip(totals, grads, strict=True):
            total += grad
        norms_sq.append([grad.to(wide).square().sum() for grad in grads[1:]])
        if by_grams:
            a, g = h[start:end].detach().to(wide), g.to(wide)
            norms_sq[-1][0] = ((a @ a.T) * (g @ g.T)).sum()
        losses.append(nll.detach())
    table = torch.tensor(norms_sq).view(len(borders) - 1, len(parameters) - 1)
    if b is None:
        totals, table = [*totals, None], torch.cat([table, table], 1)
    return HeadGrad(torch.cat(losses), *totals, table[:, 0], None if b is None else table[:, 1])


def permuted(*case: Any, dtype: torch.dtype, draw: int, bias: Tensor | None = None, **options: Any) -> HeadGrad:
    """The same by autograd, with features and classes in another order: other roundings."""
    hidden, weight, targets, borders = case
    generator = torch.Generator().manual_seed(draw)
    features, classes = (torch.randperm(n, generator=generator) for n in (hidden.shape[1], weight.shape[0]))
    back = classes.argsort()
    found = by_autograd(
        hidden[:, features],
        weight[classes][:, features],
        back[targets],
        borders,
        dtype=dtype,
        bias=None if bias is None else bias[classes],
        **options,
    )
    return dataclasses.replace(
        found,
        hidden_grad=found.hidden_grad[:, features.argsort()],
        weight_grad=found.weight_grad[back][:, features.argsort()],
        bias_grad=None if bias is None else found.bias_grad[back],
    )


def assert_accurate(actual: HeadGrad, *case: Any, peer_dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """As accurate as autograd in that precision, at its worst of three orders of summation: norms are few."""
    exact = by_autograd(*case, dtype=torch.float64, **options)
    by_grams = actual.weight_grad is None
    peers = [permuted(*case, dtype=peer_dtype, draw=draw, by_grams=by_grams, **options) for draw in range(3)]
    for name in FIELDS:
        value, expected = getattr(actual, name), getattr(exact, name)
        if value is None:
            continue
        rounded = torch.stack([getattr(peer, name).to(value.dtype) for peer in peers])
        worst = (rounded.double() - expected).abs().argmax(0, keepdim=True)
        assert_as_accurate(value, expected, rounded.gather(0, worst)[0], multiple=4.0, what=name)


# Lengths of samples, d and V.
SHAPES = [
    ([1], 1, 1),
    ([1] * 15, 3, 2),
    ([0, 7, 0, 2, 0], 33, 19),
    ([70, 1, 30], 40, 290),
]


@every_backend
@pytest.mark.parametrize("weight_grad", [True, False], ids=["training", "scoring"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_autograd_sample_by_sample(
    backend: Backend, shape: tuple[list[int], int, int], dtype: torch.dtype, weight_grad: bool
) -> None:
    case = problem(*shape, dtype)
    if not backend.supports(dtype):
        with pytest.raises(RuntimeError, match="bfloat16"):
            backend.grad(*case)
        return
    found = backend.grad(*case, weight_grad=weight_grad)
    assert found.hidden_grad.dtype == dtype
    assert found.losses.dtype == found.norms_sq.dtype == torch.float32
    assert (found.weight_grad is None) != weight_grad
    # Kernels for GPUs round the gradient by the logits as autograd does; the others keep it in float32.
    assert_accurate(found, *case, peer_dtype=dtype if backend.impl == "triton" else torch.float32)


@every_backend
@pytest.mark.parametrize("softcap", [None, 0.5, 30.0])
def test_bias_softcap_and_gradients_of_the_losses(backend: Backend, softcap: float | None) -> None:
    case = problem([11, 0, 24], 48, 200)
    options = {"softcap": softcap, "bias": torch.randn(200), "grad_losses": torch.randn(35)}
    assert_accurate(backend.grad(*case, **options), *case, **options)


@every_backend
def test_the_gradient_of_a_float32_bias_is_never_rounded_to_the_16_bits_of_the_hidden_states(backend: Backend) -> None:
    case, bias = problem([11, 0, 24], 16, 200, torch.float16), torch.randn(200)
    for norms in (True, False):
        found = backend.grad(*case, bias=bias, norms=norms)
        assert found.bias_grad.dtype == torch.float32
        assert not torch.equal(found.bias_grad, found.bias_grad.half().float())
        assert_accurate(
            found, *case, bias=bias, peer_dtype=torch.float16 if backend.impl == "triton" else torch.float32
        )


def test_reference_in_float64_is_what_autograd_says() -> None:
    hidden, weight, targets, borders = problem([3, 0, 5], 4, 6)
    options = {"bias": torch.randn(6).double(), "softcap": 2.0, "grad_losses": torch.randn(8).double()}
    found = pyeff.linear_cross_entropy_grad(hidden.double(), weight.double(), targets, torch.tensor(borders), **options)
    exact = by_autograd(hidden.double(), weight.double(), targets, borders, dtype=torch.float64, **options)
    for name in FIELDS:
        torch.testing.assert_close(getattr(found, name), getattr(exact, name))


@every_backend
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
def test_what_is_not_asked_for_is_none_and_changes_nothing_else(
    backend: Backend, wanted: tuple[bool, bool, bool]
) -> None:
    case, bias = problem([20, 3], 24, 90), torch.randn(90)
    options = dict(zip(("hidden_grad", "weight_grad", "norms"), wanted, strict=True))
    if not any(wanted):
        with pytest.raises(ValueError, match="nothing is asked for"):
            backend.grad(*case, bias=bias, **options)
        return
    found = backend.grad(*case, bias=bias, **options)
    fields = {"hidden_grad": wanted[0], "weight_grad": wanted[1], "bias_grad": wanted[1]}
    for name, asked in (fields | {"norms_sq": wanted[2], "bias_norms_sq": wanted[2]}).items():
        assert (getattr(found, name) is not None) == asked, name
    assert_accurate(found, *case, bias=bias)


@every_backend
def test_gradients_keep_their_digits_where_the_target_is_almost_certain(backend: Backend) -> None:
    # With one feature the logits are exact: p_y - 1 goes from -0.04 down to -1e-37.
    gaps = torch.arange(4, 86, dtype=torch.float32)
    hidden, weight = gaps[:, None], torch.tensor([[0.0], [-1.0], [-1.0], [-1.5]])
    case = hidden, weight, torch.zeros(gaps.numel(), dtype=torch.long), list(range(gaps.numel() + 1))
    found = backend.grad(*case)
    exact = Backend("reference", "cpu").grad(hidden.double(), weight.double(), *case[2:])
    # e^-gap carries a relative error of one rounding of its argument; a square doubles it, and a few more follow.
    tolerance = 2 * (gaps + 8) * torch.finfo(torch.float32).eps
    assert ((found.hidden_grad.double() / exact.hidden_grad - 1).abs()[:, 0] <= tolerance).all()
    normal = exact.norms_sq > torch.finfo(torch.float32).tiny
    assert normal.sum() > 30
    assert ((found.norms_sq.double() / exact.norms_sq - 1).abs() <= tolerance)[normal].all()


INF, NAN = math.inf, math.nan
# Logits given through the bias, the target, and whether there is a softmax.
EDGES = {
    "masked class": ([0.0, -INF, 1.0, 2.0], 0, True),
    "masked target": ([0.0, -INF, 1.0, 2.0], 1, True),
    "target alone": ([-INF, 3.0, -INF, -INF], 1, True),
    "everything masked": ([-INF, -INF, -INF, -INF], 2, False),
    "infinite target": ([0.0, INF, 1.0, 2.0], 1, False),
    "nan other": ([0.0, NAN, 1.0, 2.0], 0, False),
    "huge": ([3e38, -3e38, 1.0, 2.9e38], 0, True),
}


@every_backend
@pytest.mark.parametrize("edge", EDGES)
def test_extreme_logits(backend: Backend, edge: str) -> None:
    logits, target, defined = EDGES[edge]
    bias = torch.tensor(logits + 200 * [-INF])
    targets = torch.tensor([3, target, 3])
    case = torch.ones(3, 2), torch.zeros(bias.numel(), 2), targets, [0, 1, 2, 3]
    found = backend.grad(*case, bias=bias)
    if not defined:
        for value in (found.losses, found.norms_sq, found.bias_norms_sq, found.weight_grad, found.hidden_grad):
            assert value.isnan().any()
        return
    p = torch.softmax(bias.double(), 0)
    g = p - torch.nn.functional.one_hot(targets, bias.numel())
    torch.testing.assert_close(found.bias_grad, g.sum(0).float())
    torch.testing.assert_close(found.bias_norms_sq, g.square().sum(1).float())
    torch.testing.assert_close(found.norms_sq, 2 * g.square().sum(1).float())


@every_backend
def test_a_token_with_nan_spoils_only_its_sample_and_the_sums(backend: Backend) -> None:
    hidden, weight, targets, borders = problem([9, 70, 0, 5], 20, 24)
    clean = backend.grad(hidden, weight, targets, borders)
    hidden[78, 3] = NAN
    found = backend.grad(hidden, weight, targets, borders)
    assert found.norms_sq.isnan().tolist() == [False, True, False, False]
    assert torch.equal(found.norms_sq[[0, 2, 3]], clean.norms_sq[[0, 2, 3]])
    assert found.hidden_grad.isnan().any(1).nonzero().tolist() == [[78]]
    assert found.weight_grad.isnan().all(0)[3]


@every_backend
@pytest.mark.parametrize("ignore_index", [-100, 7, 10**9])
def test_ignored_tokens_have_no_gradient(backend: Backend, ignore_index: int) -> None:
    hidden, weight, targets, borders = problem([140, 0, 9, 3, 48], 16, 50)
    bias = torch.randn(50)
    ignored = torch.zeros(200, dtype=torch.bool)
    ignored[:131] = True
    ignored[[150, 199]] = True
    ignored[149:152] = True  # a whole sample
    marked = torch.where(ignored, ignore_index, torch.where(targets == ignore_index, 8, targets))
    grad_losses = torch.randn(200).masked_fill(ignored, NAN)
    found = backend.grad(hidden, weight, marked, borders, bias=bias, ignore_index=ignore_index, grad_losses=grad_losses)
    assert torch.equal(found.losses.isnan(), ignored)
    assert torch.equal(found.hidden_grad[ignored], torch.zeros(int(ignored.sum()), 16))
    assert found.norms_sq[[1, 3]].tolist() == [0, 0]
    kept = ~ignored
    counts = torch.nn.functional.pad(kept.cumsum(0), (1, 0))[borders].tolist()
    rest = HeadGrad(
        found.losses[kept],
        found.hidden_grad[kept],
        found.weight_grad,
        found.bias_grad,
        found.norms_sq,
        found.bias_norms_sq,
    )
    assert_accurate(rest, hidden[kept], weight, marked[kept], counts, bias=bias, grad_losses=grad_losses[kept])


@every_backend
@pytest.mark.parametrize("shape", [([], 4, 3), ([0, 0], 4, 3), ([5, 2], 0, 3)], ids=str)
@pytest.mark.parametrize("ignored", [False, True])
def test_nothing_has_no_norm(backend: Backend, shape: tuple[list[int], int, int], ignored: bool) -> None:
    hidden, weight, targets, borders = problem(*shape)
    if ignored:
        targets = torch.full_like(targets, -100)
    found = backend.grad(hidden, weight, targets, borders)
    assert torch.equal(found.weight_grad, torch.zeros(weight.shape))
    assert torch.equal(found.hidden_grad, torch.zeros(hidden.shape))
    assert torch.equal(found.norms_sq, torch.zeros(len(shape[0])))


def strided(tensor: Tensor, how: str) -> Tensor:
    """The same values [N, K] in another layout."""
    if how == "transposed":
        return tensor.T.contiguous().T
    if how == "every other":
        return torch.repeat_interleave(tensor, 2, dim=1)[:, ::2]
    return torch.cat([tensor, -tensor], dim=1)[:, : tensor.shape[1]]


@every_backend
@pytest.mark.parametrize("how", ["transposed", "every other", "rows apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_strides(backend: Backend, how: str, dtype: torch.dtype) -> None:
    *tensors, borders = problem([30, 7], 40, 300, dtype)
    hidden, weight, targets = (t.to(backend.device) for t in tensors)
    views = strided(hidden, how), strided(weight, how), strided(targets[:, None], how)[:, 0]
    expected, found = backend.grad(*tensors, borders), backend.grad(*views, borders)
    for name in ("losses", "hidden_grad", "weight_grad", "norms_sq"):
        # The layout may change the order in which a product sums.
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


@every_backend
def test_offsets_beyond_32_bits(backend: Backend) -> None:
    # Memory that is reserved and never touched but for the rows themselves.
    far = 2**30 + 16
    hidden, weight, targets, borders = problem([1, 2], 16, 4, torch.float16)

    def spread(tensor: Tensor) -> Tensor:
        storage = torch.UntypedStorage(2 * (far * (tensor.shape[0] - 1) + 16), device=backend.device)
        view = torch.tensor([], dtype=torch.float16, device=backend.device)
        view.set_(storage, 0, tensor.shape, (far, 1))
        return view.copy_(tensor)

    expected = backend.grad(hidden, weight, targets, borders, weight_grad=False)
    for h, w in ((spread(hidden), weight), (hidden, spread(weight))):
        found = backend.grad(h, w, targets, borders, weight_grad=False)
        for name in ("losses", "hidden_grad", "norms_sq"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name))


native_backends = pytest.mark.parametrize(
    "backend",
    [
        *(b for b in BACKENDS if b.impl != "reference"),
        pytest.param(Backend("triton", "cuda"), marks=pytest.mark.gpu),
    ],
    ids=backends.name_of,
)


@native_backends
def test_repeats_give_the_same_bits(backend: Backend) -> None:
    case = problem([70, 70, 3], 50, 500)
    first, again = (backend.grad(*case, bias=torch.ones(500)) for _ in range(2))
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in FIELDS)


@native_backends
@pytest.mark.parametrize("panel", [1, 1 << 24], ids=["three panels", "one panel"])
@pytest.mark.parametrize("group", [1, 17], ids=["samples alone", "some samples"])
@pytest.mark.parametrize("wanted", [(True, True), (False, True), (False, False)], ids=["training", "norms", "hidden"])
def test_panels_and_groups_change_only_the_rounding(
    backend: Backend, panel: int, group: int, wanted: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "_PANEL_BYTES", {"cpu": panel, "triton": panel})
    monkeypatch.setattr(MODULE, "_LEAST_CLASSES", 100)
    monkeypatch.setattr(MODULE, "_GROUP_TOKENS", group)
    case = problem([14, 0, 3, 13, 1], 24, 290)
    options = {"bias": torch.randn(290), "grad_losses": torch.randn(31)}
    weight_grad, norms = wanted
    assert_accurate(backend.grad(*case, **options, weight_grad=weight_grad, norms=norms), *case, **options)


@native_backends
def test_scoring_takes_gram_matrices_or_gradients_by_their_flops(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    for name in ("gram_norms", "linear_grad"):
        run = getattr(MODULE, name)

        def noted(*args: Any, name: str = name, run: Any = run, **options: Any) -> Any:
            taken.append(name)
            return run(*args, **options)

        monkeypatch.setattr(MODULE, name, noted)
    # One panel: T^2 (d + V) against 2 T d V, that is T against 2 * 16 * 48 / 64 = 24.
    for length, expected in ((23, "gram_norms"), (24, "linear_grad")):
        taken.clear()
        case = problem([length, length], 16, 48)
        assert_accurate(backend.grad(*case, weight_grad=False, hidden_grad=False), *case)
        assert set(taken) == {expected}


lengths_of_samples = st.lists(st.integers(0, 9), min_size=1, max_size=6)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**31), lengths=lengths_of_samples)
def test_permuting_samples_permutes_their_norms(seed: int, lengths: list[int]) -> None:
    torch.manual_seed(seed)
    hidden, weight, targets, borders = problem(lengths, 7, 30)
    order = torch.randperm(len(lengths)).tolist()
    tokens = torch.cat([torch.arange(sum(lengths)).split(lengths)[s] for s in order])
    permuted_borders = torch.tensor([0, *itertools.accumulate(lengths[s] for s in order)])
    found = pyeff.linear_cross_entropy_grad(hidden, weight, targets, torch.tensor(borders))
    permuted = pyeff.linear_cross_entropy_grad(hidden[tokens], weight, targets[tokens], permuted_borders)
    torch.testing.assert_close(permuted.norms_sq, found.norms_sq[order])
    torch.testing.assert_close(permuted.hidden_grad, found.hidden_grad[tokens])
    torch.testing.assert_close(permuted.weight_grad, found.weight_grad)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**31), lengths=lengths_of_samples, data=st.data())
def test_splitting_the_batch_changes_nothing(seed: int, lengths: list[int], data: st.DataObject) -> None:
    torch.manual_seed(seed)
    hidden, weight, targets, borders = problem(lengths, 7, 30)
    at = data.draw(st.integers(0, len(lengths)))
    cut = sum(lengths[:at])
    whole = pyeff.linear_cross_entropy_grad(hidden, weight, targets, torch.tensor(borders))
    parts = [
        pyeff.linear_cross_entropy_grad(
            hidden[tokens], weight, targets[tokens], torch.tensor([0, *itertools.accumulate(part)])
        )
        for tokens, part in ((slice(0, cut), lengths[:at]), (slice(cut, None), lengths[at:]))
    ]
    torch.testing.assert_close(torch.cat([part.norms_sq for part in parts]), whole.norms_sq)
    torch.testing.assert_close(torch.cat([part.hidden_grad for part in parts]), whole.hidden_grad)
    torch.testing.assert_close(parts[0].weight_grad + parts[1].weight_grad, whole.weight_grad)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), lengths=lengths_of_samples, power=st.integers(-15, 15))
def test_scaling_the_loss_scales_the_norms(seed: int, lengths: list[int], power: int) -> None:
    torch.manual_seed(seed)
    hidden, weight, targets, borders = problem(lengths, 7, 30)
    case = hidden, weight, targets, torch.tensor(borders)
    plain, scaled = (pyeff.linear_cross_entropy_grad(*case, grad_losses=scale) for scale in (1.0, 2.0**power))
    assert torch.equal(scaled.norms_sq, plain.norms_sq * 4.0**power)
    assert torch.equal(scaled.hidden_grad, plain.hidden_grad * 2.0**power)
    assert torch.equal(scaled.weight_grad, plain.weight_grad * 2.0**power)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 12), v=st.integers(2, 40))
def test_norm_of_a_single_token_is_its_score(seed: int, n: int, v: int) -> None:
    torch.manual_seed(seed)
    hidden, weight, targets, borders = problem([1] * n, 8, v)
    found = pyeff.linear_cross_entropy_grad(hidden, weight, targets, torch.tensor(borders), softcap=3.0)
    scores = pyeff.linear_cross_entropy_scores(hidden, weight, targets, softcap=3.0)
    torch.testing.assert_close(found.norms_sq.sqrt(), scores.head_grad_norm)
    assert torch.equal(found.losses, scores.nll)


def test_autocast_and_gradients_leave_the_result_alone() -> None:
    hidden, weight, targets, borders = problem([3, 4], 5, 6)
    plain = pyeff.linear_cross_entropy_grad(hidden, weight, targets, torch.tensor(borders))
    with torch.autocast("cpu", torch.bfloat16):
        inside = pyeff.linear_cross_entropy_grad(
            hidden.requires_grad_(), weight.requires_grad_(), targets, torch.tensor(borders)
        )
    assert torch.equal(plain.weight_grad, inside.weight_grad)
    assert not inside.weight_grad.requires_grad


def test_opcheck() -> None:
    hidden, weight, targets, borders = problem([3, 0, 4], 5, 12)
    operator = torch.ops.pyeff.linear_cross_entropy_grad.default
    rows = torch.rand(7), torch.rand(7) + 9, torch.ones(7)
    for impl in ("reference", "cpu"):
        for bias, softcap in ((None, None), (torch.randn(12), 5.0)):
            for wanted in ((True, True, True), (True, False, False), (False, False, True)):
                arguments = (hidden, weight, targets, torch.tensor(borders), *rows, bias, softcap, -100, *wanted, impl)
                torch.library.opcheck(operator, arguments)


@pytest.mark.gpu
def test_known_borders_do_not_make_the_host_wait() -> None:
    hidden, weight, targets, borders = problem([64, 32], 64, 1000)
    case = hidden.cuda(), weight.cuda(), targets.cuda()
    for cu_seqlens in (torch.tensor(borders).cuda(), torch.tensor(borders)):
        for weight_grad in (True, False):
            pyeff.linear_cross_entropy_grad(*case, cu_seqlens, weight_grad=weight_grad)
            torch.cuda.set_sync_debug_mode("error")
            pyeff.linear_cross_entropy_grad(*case, cu_seqlens, weight_grad=weight_grad)
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_target_out_of_range_is_nan_on_a_gpu() -> None:
    hidden, weight, _, _ = problem([3], 4, 5)
    targets, borders = torch.tensor([0, 5, 1], device="cuda"), torch.tensor([0, 1, 2, 3])
    for impl in ("triton", "reference"):
        found = pyeff.linear_cross_entropy_grad(hidden.cuda(), weight.cuda(), targets, borders, impl=impl)
        assert found.norms_sq.isnan().tolist() == [False, True, False]


@pytest.mark.gpu
def test_memory_on_a_gpu_is_bounded() -> None:
    n, d, v = 4096, 1024, 128_000
    hidden, weight = (torch.randn(rows, d, device="cuda", dtype=torch.bfloat16) / 32 for rows in (n, v))
    targets, borders = torch.randint(0, v, (n,), device="cuda"), torch.tensor([0, 1000, n], device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pyeff.linear_cross_entropy_grad(hidden, weight, targets, borders)
    extra = torch.cuda.max_memory_allocated() - before
    promised = weight.nbytes + 3 * hidden.nbytes + (128 << 20) + (32 << 20)
    assert extra <= promised + (16 << 20), "the logits alone would be 1 GB in bfloat16"


# ------------------------------------------------------------------------------------------------- the Triton kernel


@pytest.mark.parametrize("tile", [(16, 16, 16), (32, 16, 32), (16, 64, 16), (128, 128, 64)], ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_tiles_change_only_the_rounding(tile: tuple[int, int, int], softcap: float | None) -> None:
    kernels = importlib.import_module("pyeff.triton_kernels.linear_cross_entropy_grad")
    reference = importlib.import_module("pyeff.reference.linear_cross_entropy_grad")
    device = "cpu" if interpreting() else "cuda"
    # Seventeen blocks of sixteen tokens: more than a group of sixteen.
    hidden, weight, targets, _ = problem([270], 20, 50)
    bias, scale = torch.randn(50), torch.randn(270)
    scores = pyeff.linear_cross_entropy_scores(hidden, weight, targets, bias=bias, softcap=softcap)
    part = slice(15, 47)
    grads = torch.full((270, 40), NAN, device=device)[:, :32]
    moved = (t.to(device) for t in (hidden, weight[part], targets, scores.lse, -torch.expm1(-scores.nll), scale))
    kernels.logit_grads(
        *moved,
        grads,
        first_class=15,
        bias=bias[part].to(device),
        softcap=softcap,
        config=kernels.Config(*tile, 4, 2),
    )
    wide = (t.double() for t in (hidden, weight))
    exact = reference.logit_grads(*wide, targets, scale.double(), bias.double(), softcap)
    z = (hidden @ weight.T + bias).requires_grad_()
    capped = z if softcap is None else softcap * torch.tanh(z / softcap)
    (peer,) = torch.autograd.grad((cross_entropy(capped, targets, reduction="none") * scale).sum(), z)
    assert_as_accurate(grads.cpu(), exact[:, part], peer[:, part], multiple=4.0)


# ---------------------------------------------------------------------------------------------------- the CPU kernel


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
for n, d, v in ((3, 5, 1), (40, 32, 3000), (70, 16, 33)):
    hidden, weight, targets = torch.randn(n, d), 3 * torch.randn(v, d), torch.randint(0, v, (n,))
    cu_seqlens = torch.tensor([0, 1, n // 2, n])
    for options in ({}, {"softcap": 3.0}, {"bias": torch.randn(v)}, {"bias": torch.randn(v), "softcap": 3.0}):
        for weight_grad in (True, False):
            grad = pyeff.linear_cross_entropy_grad(
                hidden, weight, targets, cu_seqlens, **options, weight_grad=weight_grad, impl="cpu"
            )
            for value in (grad.hidden_grad, grad.weight_grad, grad.bias_grad, grad.norms_sq, grad.bias_norms_sq):
                digest.update(b"" if value is None else value.numpy().tobytes())
print(pyeff._extension.extension().build_info()["cpu_level"], digest.hexdigest())
"""
    levels = ["baseline", "avx2", "avx512"]
    levels = levels[: levels.index(extension().build_info()["highest_cpu_level"]) + 1]
    outputs = [in_fresh_process(code, PYEFF_CPU_LEVEL=level).split() for level in levels]
    assert [level for level, _ in outputs] == levels
    assert len({digest for _, digest in outputs}) == 1


@pytest.mark.parametrize(("dtype", "promised_mib"), [("float32", 48), ("bfloat16", 80)])
def test_memory_beside_inputs_and_outputs_is_bounded(dtype: str, promised_mib: int) -> None:
    code = f"""
import resource, torch, pyeff
hidden = torch.randn(512, 48).to(torch.{dtype})
weight = torch.ones(2**17, 48, dtype=torch.{dtype})
targets = torch.zeros(512, dtype=torch.long)
cu_seqlens = torch.arange(0, 513, 128)
pyeff.linear_cross_entropy_grad(hidden[:1], weight[:64], targets[:1], torch.tensor([0, 1]), impl="cpu")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
grad = pyeff.linear_cross_entropy_grad(hidden, weight, targets, cu_seqlens, impl="cpu")
extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(extra - grad.weight_grad.nbytes // 1024)
"""
    extra_kib = int(in_fresh_process(code))
    assert extra_kib <= promised_mib * 1024, "the logits alone would be 256 MiB"


# ---------------------------------------------------------------------------------------------------- bad arguments

H, W, Y, B = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.long), torch.tensor([0, 3])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "complaint"),
    [
        ((H[0], W, Y, B), {}, ValueError, r"hidden must be \[tokens, features\]"),
        ((H, W.double(), Y, B), {}, ValueError, "weight must have the dtype of hidden"),
        ((H.int(), W.int(), Y, B), {}, TypeError, "hidden must be float16, bfloat16, float32 or float64"),
        ((H, W, torch.tensor([0, 5, 0]), B), {}, ValueError, r"targets must be in \[0, 5\)"),
        ((H, W, Y, [0, 3]), {}, TypeError, "cu_seqlens must be a tensor"),
        ((H, W, Y, B.to("meta")), {}, ValueError, "cu_seqlens must hold data"),
        ((H.to_sparse(), W, Y, B), {}, TypeError, "hidden must be a dense tensor"),
        ((H, W, Y, torch.tensor([0, 2])), {}, ValueError, "cu_seqlens must rise from 0 to the number of tokens, 3"),
        ((H, W, Y, B), {"grad_losses": torch.ones(2)}, ValueError, r"grad_losses must be \[3\]"),
        ((H, W, Y, B), {"grad_losses": torch.ones(3).long()}, TypeError, "grad_losses must be floating point"),
        ((H, W, Y, B), {"grad_losses": "1"}, TypeError, "grad_losses must be a number or a tensor, got str"),
        ((H, W, Y, B), {"grad_losses": torch.ones(3, device="meta")}, ValueError, "grad_losses must be on the device"),
        ((H, W, Y, B), {"impl": "fast"}, ValueError, "impl must be 'auto' or one of"),
        ((H.double(), W.double(), Y, B), {"impl": "cpu"}, RuntimeError, "it computes in float32, and hidden is"),
    ],
)
def test_bad_arguments_are_named(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        pyeff.linear_cross_entropy_grad(*arguments, **options)
