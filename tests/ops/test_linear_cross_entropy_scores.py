"""Scores of tokens at the head: right wherever float64 says so, on every implementation, for any input."""

from __future__ import annotations

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
from pyeff import TokenScores
from pyeff._extension import extension
from pyeff.reference.linear_cross_entropy_scores import FIELDS

pytestmark = backends.quiet_interpreter


class Backend(backends.Backend):
    def scores(self, hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> TokenScores:
        """The scores, back on the CPU."""
        moved = {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in options.items()}
        inputs = (tensor.to(self.device) for tensor in (hidden, weight, targets))
        found = pyeff.linear_cross_entropy_scores(*inputs, **moved, impl=self.impl)
        return TokenScores(**{name: getattr(found, name).cpu() for name in (*FIELDS, "scored")})


BACKENDS = backends.on_cpu(Backend)
every_backend = backends.on_every(Backend)


def problem(n: int, d: int, v: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(n, d).to(dtype), torch.randn(v, d).to(dtype), torch.randint(0, v, (n,))


def eager(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, softcap: float | None = None
) -> dict[str, Tensor]:
    """The scores as one would write them down, logits and all."""
    x = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    z = x if softcap is None else softcap * torch.tanh(x / softcap)
    slope = torch.ones_like(z) if softcap is None else 1 - (z / softcap) ** 2
    p, log_p = torch.softmax(z, 1), torch.log_softmax(z, 1)
    y = targets[:, None]
    error = p - torch.zeros_like(p).scatter(1, y, 1.0)
    z_y, others = z.gather(1, y)[:, 0], z.scatter(1, y, -torch.inf)
    return {
        "nll": cross_entropy(z, targets, reduction="none"),
        "lse": torch.logsumexp(z, 1),
        "entropy": -torch.where(p > 0, p * log_p, 0.0).sum(1),
        "el2n": error.norm(dim=1),
        "margin": z_y - others.amax(1) if weight.shape[0] > 1 else torch.full_like(z_y, torch.nan),
        "p_target": p.gather(1, y)[:, 0],
        "head_grad_norm": hidden.norm(dim=1) * (error * slope).norm(dim=1),
    }


def exact_scores(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> TokenScores:
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}
    return pyeff.linear_cross_entropy_scores(hidden.double(), weight.double(), targets, **wide, impl="reference")


def assert_accurate(actual: TokenScores, hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> None:
    """As accurate as eager torch in float32; few rows are few draws of its rounding errors, hence a multiple of 4."""
    exact = exact_scores(hidden, weight, targets, **options)
    peer = eager(hidden.float(), weight.float(), targets, **options)
    for name in FIELDS:
        assert_as_accurate(getattr(actual, name), getattr(exact, name), peer[name], multiple=4.0, what=name)
    assert torch.equal(actual.scored, exact.scored)


SHAPES = [(1, 1, 2), (5, 24, 7), (3, 8, 1), (130, 70, 300), (70, 64, 1500), (17, 33, 4099)]


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_eager_torch(backend: Backend, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    inputs = problem(*shape, dtype)
    if not backend.supports(dtype):
        with pytest.raises(RuntimeError, match="bfloat16"):
            backend.scores(*inputs)
        return
    assert_accurate(backend.scores(*inputs), *inputs)


@every_backend
@pytest.mark.parametrize("softcap", [None, 0.5, 30.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_bias_and_softcap(backend: Backend, softcap: float | None, with_bias: bool) -> None:
    inputs = problem(40, 48, 700)
    options = {"softcap": softcap, "bias": torch.randn(700) if with_bias else None}
    assert_accurate(backend.scores(*inputs, **options), *inputs, **options)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_reference_is_the_definition_and_its_gradient_norm_that_of_autograd(softcap: float | None) -> None:
    hidden, weight, targets = (t.double() if t.is_floating_point() else t for t in problem(6, 5, 11))
    bias = torch.randn(11, dtype=torch.float64)
    scores = pyeff.linear_cross_entropy_scores(hidden, weight, targets, bias=bias, softcap=softcap, impl="reference")
    for name, expected in eager(hidden, weight, targets, bias=bias, softcap=softcap).items():
        torch.testing.assert_close(getattr(scores, name), expected)
    weight.requires_grad_()
    for t in range(6):
        nll = eager(hidden[t : t + 1], weight, targets[t : t + 1], bias=bias, softcap=softcap)["nll"].sum()
        (gradient,) = torch.autograd.grad(nll, weight)
        torch.testing.assert_close(scores.head_grad_norm[t], gradient.norm())


@every_backend
def test_scores_keep_their_digits_where_the_target_is_almost_certain(backend: Backend) -> None:
    # With one feature the logits are exact: 0 for the target and -gap or less for the others, so that 1 - p_y goes from
    # 0.04 down to 1e-37.
    gaps = torch.arange(4, 86, dtype=torch.float32)
    hidden, weight = gaps[:, None], torch.tensor([[0.0], [-1.0], [-1.0], [-1.5]])
    targets = torch.zeros(gaps.numel(), dtype=torch.long)
    found, exact = backend.scores(hidden, weight, targets), exact_scores(hidden, weight, targets)
    # e^-gap carries a relative error of one rounding of its argument, and a few more follow.
    tolerance = (gaps + 8) * torch.finfo(torch.float32).eps
    for name in ("nll", "el2n", "entropy", "head_grad_norm"):
        relative = (getattr(found, name).double() / getattr(exact, name) - 1).abs()
        assert (relative <= tolerance).all(), name


@every_backend
def test_slope_keeps_its_digits_where_the_softcap_saturates(backend: Backend) -> None:
    # z rounds to the cap, where 1 - (z / c)^2 is 0 and the true slope 4 e^(-2 x / c) is not.
    hidden, weight, targets = torch.ones(1, 1), torch.tensor([[20.0], [19.0]]), torch.zeros(1, dtype=torch.long)
    found, exact = (f(hidden, weight, targets, softcap=2.0) for f in (backend.scores, exact_scores))
    relative = (found.head_grad_norm.double() / exact.head_grad_norm - 1).abs().item()
    assert relative <= (20 + 8) * torch.finfo(torch.float32).eps


INF, NAN = math.inf, math.nan
# Logits given through the bias, the target, and whether the row has scores.
EDGES = {
    "masked class": ([0.0, -INF, 1.0, 2.0], 0, True),
    "masked target": ([0.0, -INF, 1.0, 2.0], 1, True),
    "target alone": ([-INF, 3.0, -INF, -INF], 1, True),
    "everything masked": ([-INF, -INF, -INF, -INF], 2, False),
    "infinite target": ([0.0, INF, 1.0, 2.0], 1, False),
    "infinite other": ([0.0, INF, 1.0, 2.0], 0, False),
    "nan target": ([0.0, NAN, 1.0, 2.0], 1, False),
    "nan other": ([0.0, NAN, 1.0, 2.0], 0, False),
    "huge": ([3e38, -3e38, 1.0, 2.9e38], 0, True),
    "huge, target last": ([3e38, -3e38, 1.0, 2.9e38], 1, True),
    "all equal and huge": ([-3e38, -3e38, -3e38, -3e38], 1, True),
}


@every_backend
@pytest.mark.parametrize("filler", [0, 200], ids=["alone", "beside 200 masked classes"])
@pytest.mark.parametrize("edge", EDGES)
def test_extreme_logits(backend: Backend, edge: str, filler: int) -> None:
    logits, target, defined = EDGES[edge]
    bias = torch.tensor(logits + filler * [-INF])
    hidden, weight, targets = torch.zeros(3, 2), torch.ones(bias.numel(), 2), torch.tensor([target] * 3)
    found = backend.scores(hidden, weight, targets, bias=bias)
    if not defined:
        assert all(getattr(found, name).isnan().all() for name in FIELDS)
        assert found.scored.all()
        return
    exact = exact_scores(hidden, weight, targets, bias=bias)
    for name in FIELDS:
        rounded = getattr(exact, name).float()  # a difference of two huge numbers may be infinite there
        assert_as_accurate(getattr(found, name), rounded, rounded, what=name)


@every_backend
def test_ignored_positions_are_nan_and_change_nothing_else(backend: Backend) -> None:
    hidden, weight, targets = problem(200, 16, 50)
    hidden[3] = NAN
    for ignore_index in (-100, 7, 10**9):
        ignored = torch.zeros(200, dtype=torch.bool)
        ignored[:131] = True  # a whole block of the Triton kernel, and more
        ignored[[150, 199]] = True
        marked = torch.where(ignored, ignore_index, torch.where(targets == ignore_index, 8, targets))
        scores = backend.scores(hidden, weight, marked, ignore_index=ignore_index)
        kept = ~ignored
        assert torch.equal(scores.scored, kept)
        for name in FIELDS:
            assert getattr(scores, name)[ignored].isnan().all()
        rest = TokenScores(**{name: getattr(scores, name)[kept] for name in (*FIELDS, "scored")})
        assert_accurate(rest, hidden[kept], weight, marked[kept])


@every_backend
def test_nothing_to_score(backend: Backend) -> None:
    empty = backend.scores(torch.randn(0, 4), torch.randn(3, 4), torch.zeros(0, dtype=torch.long))
    assert all(getattr(empty, name).shape == (0,) for name in FIELDS)
    ignored = backend.scores(torch.randn(2, 4), torch.randn(3, 4), torch.full((2,), -100))
    assert all(getattr(ignored, name).isnan().all() for name in FIELDS)


@every_backend
def test_no_features_means_a_uniform_distribution(backend: Backend) -> None:
    scores = backend.scores(torch.zeros(2, 0), torch.zeros(5, 0), torch.tensor([1, 4]))
    torch.testing.assert_close(scores.nll, torch.full((2,), math.log(5)))
    assert torch.equal(scores.head_grad_norm, torch.zeros(2))


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
    hidden, weight, targets = (tensor.to(backend.device) for tensor in problem(37, 40, 300, dtype))
    hidden = strided(hidden, how)
    if how != "one row repeated":  # equal logits leave margins of exactly 0, which no tolerance can be computed from
        weight, targets = strided(weight, how), strided(targets[:, None], how)[:, 0]
    assert_accurate(backend.scores(hidden, weight, targets), hidden.cpu(), weight.cpu(), targets.cpu())


@every_backend
def test_offsets_beyond_32_bits(backend: Backend) -> None:
    # Memory that is reserved and never touched but for the rows themselves.
    far = 2**30 + 16
    hidden, weight, targets = problem(3, 16, 4, torch.float16)

    def spread(tensor: Tensor) -> Tensor:
        storage = torch.UntypedStorage(2 * (far * (tensor.shape[0] - 1) + 16), device=backend.device)
        view = torch.tensor([], dtype=torch.float16, device=backend.device)
        view.set_(storage, 0, tensor.shape, (far, 1))
        return view.copy_(tensor)

    assert_accurate(backend.scores(spread(hidden), weight, targets), hidden, weight, targets)
    assert_accurate(backend.scores(hidden, spread(weight), targets), hidden, weight, targets)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.impl != "reference"], ids=backends.name_of)
def test_repeats_give_the_same_bits(backend: Backend) -> None:
    inputs = problem(150, 24, 1100)
    first, again = backend.scores(*inputs), backend.scores(*inputs)
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in FIELDS)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 20), v=st.integers(2, 40), scale=st.sampled_from([0.25, 1.0, 4.0]))
def test_order_of_tokens_and_of_classes_means_nothing(seed: int, n: int, v: int, scale: float) -> None:
    # Small whole numbers, whose products sum exactly in any order: only the reductions can differ.
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randint(-2, 3, (rows, 8), generator=generator).float() for rows in (n, v))
    weight, targets = weight * scale, torch.randint(0, v, (n,), generator=generator)
    tokens, classes = torch.randperm(n, generator=generator), torch.randperm(v, generator=generator)
    scores = pyeff.linear_cross_entropy_scores(hidden, weight, targets)
    permuted = pyeff.linear_cross_entropy_scores(hidden[tokens], weight[classes], classes.argsort()[targets[tokens]])
    largest = 1 + max((hidden @ weight.T).abs().max().item(), hidden.norm(dim=1).max().item())
    for name in FIELDS:
        difference = (getattr(permuted, name) - getattr(scores, name)[tokens]).abs().max().item()
        assert difference <= 8 * torch.finfo(torch.float32).eps * largest, name


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), v=st.integers(2, 100), scale=st.floats(0.01, 30))
def test_scores_obey_their_bounds(seed: int, v: int, scale: float) -> None:
    torch.manual_seed(seed)
    hidden, weight, targets = problem(10, 4, v)
    s = pyeff.linear_cross_entropy_scores(hidden, weight * scale, targets)
    slack = 1 + 8 * torch.finfo(torch.float32).eps
    assert (s.nll >= 0).all()
    assert ((s.el2n >= 0) & (s.el2n <= math.sqrt(2) * slack)).all()
    assert ((s.entropy >= 0) & (s.entropy <= math.log(v) * slack)).all()
    assert ((s.p_target >= 0) & (s.p_target <= 1)).all()
    # Whoever has more than half of the probability is ahead of everyone.
    assert ((s.p_target <= 0.5) | (s.margin > 0)).all()


def test_autocast_and_gradients_leave_the_scores_alone() -> None:
    hidden, weight, targets = problem(9, 16, 30)
    plain = pyeff.linear_cross_entropy_scores(hidden, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        inside = pyeff.linear_cross_entropy_scores(hidden.requires_grad_(), weight.requires_grad_(), targets)
    assert torch.equal(plain.nll, inside.nll)
    assert not inside.nll.requires_grad


def test_compiles_as_one_graph() -> None:
    def surprise(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        scores = pyeff.linear_cross_entropy_scores(hidden * 2, weight, targets, softcap=5.0)
        return scores.nll + scores.entropy, scores.scored

    compiled = torch.compile(surprise, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (6, 9):
        hidden, weight, targets = torch.randn(tokens, 8), torch.randn(20, 8), torch.arange(tokens)
        for found, expected in zip(compiled(hidden, weight, targets), surprise(hidden, weight, targets), strict=True):
            assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="targets must be in"):
        compiled(hidden, weight, targets + 12)


def test_opcheck() -> None:
    hidden, weight, targets = problem(5, 8, 12)
    operator = torch.ops.pyeff.linear_cross_entropy_scores.default
    for impl in ("reference", "cpu"):
        torch.library.opcheck(operator, (hidden, weight, targets, None, None, -100, impl))
        torch.library.opcheck(operator, (hidden, weight, targets, torch.randn(12), 5.0, -100, impl))


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
from pyeff.reference.linear_cross_entropy_scores import FIELDS
torch.manual_seed(0)
digest = hashlib.sha256()
for n, d, v in ((3, 5, 1), (40, 32, 5000), (70, 16, 33)):
    hidden, weight, targets = torch.randn(n, d), 3 * torch.randn(v, d), torch.randint(0, v, (n,))
    for options in ({}, {"softcap": 3.0}, {"bias": torch.randn(v)}, {"bias": torch.full((v,), -torch.inf)}):
        scores = pyeff.linear_cross_entropy_scores(hidden, weight, targets, **options, impl="cpu")
        for name in FIELDS:
            digest.update(getattr(scores, name).numpy().tobytes())
print(pyeff._extension.extension().build_info()["cpu_level"], digest.hexdigest())
"""
    levels = ["baseline", "avx2", "avx512"]
    levels = levels[: levels.index(extension().build_info()["highest_cpu_level"]) + 1]
    outputs = [in_fresh_process(code, PYEFF_CPU_LEVEL=level).split() for level in levels]
    assert [level for level, _ in outputs] == levels
    assert len({digest for _, digest in outputs}) == 1


def reduced_states(logits: Tensor, targets: Tensor, *, threads: int) -> Tensor:
    """What the kernel keeps of each row after one tile: [N, 8] of peak, s1, s2, zs1 and the rest."""
    logits = logits.clone()
    states = torch.zeros(logits.shape[0], extension().SCORE_STATE_BYTES // 4)
    extension().meet_logits(
        logits=logits.data_ptr(),
        rows=logits.shape[0],
        columns=logits.shape[1],
        first_class=0,
        targets=targets.data_ptr(),
        bias=0,
        softcap=0.0,
        states=states.data_ptr(),
        threads=threads,
    )
    return states


def test_thread_count_changes_no_bit_of_the_reductions() -> None:
    logits, targets = 9 * torch.randn(33, 100), torch.arange(33)
    alone = reduced_states(logits, targets, threads=1)
    for threads in (2, 5):
        assert torch.equal(reduced_states(logits, targets, threads=threads), alone)


def test_exponential_is_good_to_one_and_a_half_units_in_the_last_place() -> None:
    # The sums are relative to the largest logit, here 0, which adds nothing to the sum of x e^x.
    x = torch.linspace(-87, -2e-3, 400_001)
    logits = torch.stack([torch.zeros_like(x), x], dim=1)
    states = reduced_states(logits, torch.full((x.numel(),), -1), threads=1)
    exact = x.double() * x.double().exp()
    unit = 2.0 ** (exact.abs().log2().floor() - 23)
    # Half a unit more for the product with x, and a unit of e^x may be two of x e^x.
    assert ((states[:, 3].double() - exact).abs() / unit).max() <= 2 * 1.5 + 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_beside_inputs_and_outputs_is_bounded(dtype: str) -> None:
    code = f"""
import resource, torch, pyeff
hidden = torch.randn(512, 128).to(torch.{dtype})
weight = torch.ones(2**17, 128, dtype=torch.{dtype})
targets = torch.zeros(512, dtype=torch.long)
pyeff.linear_cross_entropy_scores(hidden[:1], weight[:64], targets[:1], impl="cpu")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pyeff.linear_cross_entropy_scores(hidden, weight, targets, impl="cpu")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    extra_kib = int(in_fresh_process(code))
    assert extra_kib <= 64 * 1024, "the logits alone would be 256 MiB"


# ---------------------------------------------------------------------------------------------------- per sample


def reduced_by_hand(values: list[float], scored: list[bool], borders: list[int], reduction: str) -> list[float]:
    reduced = []
    for start, end in itertools.pairwise(borders):
        kept = [v for v, ok in zip(values[start:end], scored[start:end], strict=True) if ok]
        total = max(kept, default=NAN) if reduction == "max" else math.fsum(kept)
        reduced.append(NAN if not kept else total / len(kept) if reduction == "mean" else total)
    return reduced


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "max"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_per_sample_reduces_what_is_scored(backend: Backend, reduction: str, index: torch.dtype) -> None:
    hidden, weight, targets = problem(12, 6, 9)
    targets[[0, 4, 5, 6, 10]] = -100
    borders = [0, 0, 4, 7, 11, 12]  # an empty sample first, an all-ignored one third
    scores = backend.scores(hidden, weight, targets)
    samples = scores.per_sample(torch.tensor(borders, dtype=index), reduction=reduction)
    assert samples.scored.tolist() == [False, True, False, True, True]
    for name in FIELDS:
        expected = reduced_by_hand(getattr(scores, name).tolist(), scores.scored.tolist(), borders, reduction)
        torch.testing.assert_close(getattr(samples, name), torch.tensor(expected), equal_nan=True)


def test_a_broken_token_breaks_its_sample_and_no_other() -> None:
    hidden, weight, targets = problem(6, 4, 5)
    hidden[1] = NAN
    scores = pyeff.linear_cross_entropy_scores(hidden, weight, targets)
    for reduction in ("mean", "sum", "max"):
        samples = scores.per_sample(torch.tensor([0, 3, 6]), reduction=reduction)
        assert samples.nll.isnan().tolist() == [True, False]


def test_no_samples() -> None:
    scores = pyeff.linear_cross_entropy_scores(*problem(0, 4, 5))
    assert scores.per_sample(torch.tensor([0])).nll.shape == (0,)


@pytest.mark.parametrize(
    ("borders", "reduction", "complaint"),
    [
        (torch.tensor([0, 2]), "mean", "cu_seqlens must rise from 0 to the number of tokens, 3"),
        (torch.tensor([1, 3]), "mean", "cu_seqlens must rise from 0"),
        (torch.tensor([0, 2, 1, 3]), "mean", "cu_seqlens must rise from 0"),
        (torch.tensor([[0, 3]]), "mean", "cu_seqlens must be a list of samples"),
        (torch.tensor([0, 3]), "median", "reduction must be 'mean', 'sum' or 'max'; got 'median'"),
    ],
)
def test_per_sample_refuses(borders: Tensor, reduction: str, complaint: str) -> None:
    scores = pyeff.linear_cross_entropy_scores(*problem(3, 4, 5))
    with pytest.raises(ValueError, match=complaint):
        scores.per_sample(borders, reduction=reduction)
    with pytest.raises(TypeError, match="cu_seqlens must be int32 or int64"):
        scores.per_sample(borders.float())


# ---------------------------------------------------------------------------------------------------- bad arguments

H, W, Y = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "complaint"),
    [
        ((H[0], W, Y), {}, ValueError, r"hidden must be \[tokens, features\], got shape \(4,\)"),
        ((H, W[:, :3], Y), {}, ValueError, r"weight must be \[vocabulary, 4\]"),
        ((H, W[:0], Y), {}, ValueError, r"weight must be \[vocabulary, 4\]"),
        ((H, W, Y[:2]), {}, ValueError, r"targets must be \[3\]"),
        ((H, W, Y), {"bias": torch.zeros(4)}, ValueError, r"bias must be \[5\]"),
        ((H, W.double(), Y), {}, ValueError, "weight must have the dtype of hidden"),
        ((H.int(), W.int(), Y), {}, TypeError, "hidden must be float16, bfloat16, float32 or float64"),
        ((H, W, Y.float()), {}, TypeError, "targets must be int64 or int32"),
        ((H, W, Y), {"bias": torch.zeros(5, dtype=torch.long)}, TypeError, "bias must be floating point"),
        ((H, W, Y), {"softcap": 0.0}, ValueError, "softcap must be a positive number"),
        ((H, W, Y), {"softcap": INF}, ValueError, "softcap must be a positive number"),
        ((H, W, Y), {"softcap": 1e-300}, ValueError, "softcap must be a positive number"),
        ((H, W, Y), {"softcap": "30"}, TypeError, "softcap must be a number or None, got str"),
        ((H, W, Y), {"ignore_index": 1.5}, TypeError, "ignore_index must be an int"),
        ((H, W, [0, 0, 0]), {}, TypeError, "targets must be a tensor, got list"),
        ((H, W, torch.tensor([0, 5, 0])), {}, ValueError, r"targets must be in \[0, 5\).*got 5 at position 1"),
        ((H, W, torch.tensor([0, 0, -1])), {}, ValueError, r"got -1 at position 2"),
        ((H, W, Y), {"impl": "fast"}, ValueError, "impl must be 'auto' or one of"),
        ((H.double(), W.double(), Y), {"impl": "cpu"}, RuntimeError, "it computes in float32, and hidden is float64"),
    ],
)
def test_bad_arguments_are_named(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        pyeff.linear_cross_entropy_scores(*arguments, **options)


@pytest.mark.gpu
def test_target_out_of_range_is_nan_on_a_gpu() -> None:
    for impl in ("triton", "reference"):
        scores = pyeff.linear_cross_entropy_scores(
            H.cuda(), W.cuda(), torch.tensor([0, 5, -1], device="cuda"), impl=impl
        )
        assert scores.nll.isnan().tolist() == [False, True, True]
