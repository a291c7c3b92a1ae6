"""What autograd, the compiler, checkpoints and callers see of attention."""

from __future__ import annotations

import functools
import math
from typing import Any

import backends
import pytest
import torch
from attention_problems import (
    PROBLEMS,
    Backend,
    assert_accurate,
    every_backend,
    results,
)
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import pyeff

pytestmark = backends.quiet_interpreter


@every_backend
def test_gradients_of_either_result_alone(backend: Backend) -> None:
    problem = PROBLEMS["packed window"]
    tensors = problem.tensors()
    if backend.refuses(problem, tensors):
        return
    of_out = results(problem, tensors, impl=backend.impl, device=backend.device, with_lse=False)
    assert_accurate(of_out, problem, [*tensors[:4], torch.zeros_like(tensors[4])])
    q, k, v = (t.to(backend.device).requires_grad_() for t in tensors[:3])
    borders = {name: t.to(backend.device) for name, t in problem.borders().items()}
    out, lse = pyeff.attention(q, k, v, **borders, **problem.options, return_lse=True, impl=backend.impl)
    grads = torch.autograd.grad(lse, (q, k, v), tensors[4].to(backend.device))
    found = [t.detach().cpu() for t in (out, lse, *grads)]
    assert_accurate(found, problem, [*tensors[:3], torch.zeros_like(tensors[3]), tensors[4]])


@pytest.mark.parametrize("of", ["out", "lse"])
def test_second_derivatives_are_refused_and_never_left_out(of: str) -> None:
    q, k, v, *_ = (t.requires_grad_() for t in PROBLEMS["padded"].tensors())

    def gradient(create_graph: bool) -> Tensor:
        found = pyeff.attention(q, k, v, return_lse=True)[of == "lse"]
        # Another path to q, by which a derivative would come out even without attention's part.
        return torch.autograd.grad(found.sin().sum() + q.sin().sum(), q, create_graph=create_graph)[0]

    assert torch.equal(gradient(True), gradient(False))
    for inputs in ((q,), (q, v)):
        with pytest.raises(RuntimeError, match=r"no second derivatives: take pyeff\.reference\.attention"):
            torch.autograd.grad(gradient(True).square().sum(), inputs, allow_unused=True)


def test_nothing_but_inputs_and_results_is_kept_for_the_backward() -> None:
    q, k, v = (t.requires_grad_() for t in PROBLEMS["padded"].tensors()[:3])
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out, lse = pyeff.attention(q, k, v, return_lse=True)
    assert sum(t.nbytes for t in kept) == sum(t.nbytes for t in (q, k, v, out, lse))


def test_a_policy_of_selective_checkpointing_can_keep_the_results() -> None:
    q, k, v = (t.requires_grad_() for t in PROBLEMS["padded"].tensors()[:3])
    runs: list[str] = []

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op == torch.ops.pyeff.attention_forward.default:
            runs.append("recomputation" if context.is_recompute else "forward")
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return pyeff.attention(q * 2, k.sin(), v)

    expected = torch.autograd.grad(layer(q, k, v).square().sum(), (q, k, v))
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    out = checkpoint(layer, q, k, v, use_reentrant=False, context_fn=contexts)
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert runs[0] == "forward"
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_compiled_function_is_one_graph() -> None:
    problem = PROBLEMS["packed"]
    q, k, v = (t.requires_grad_() for t in problem.tensors()[:3])
    borders = problem.borders()

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = pyeff.attention(q, k, v, **borders, return_lse=True)
        return out.square().sum() + lse[:, 1:].sum()

    expected = torch.autograd.grad(layer(q, k, v), (q, k, v))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("which", ["padded", "packed, two lengths", "window"])
def test_opcheck(which: str, impl: str) -> None:
    problem = PROBLEMS[which]
    q, k, v, grad_out, grad_lse = problem.tensors()
    borders = problem.borders()
    options = (borders.get("cu_seqlens"), borders.get("cu_seqlens_k"), True, 0.2, problem.window, None, impl)
    torch.library.opcheck(torch.ops.pyeff.attention_forward.default, (q, k, v, *options))
    out, lse = torch.ops.pyeff.attention_forward.default(q, k, v, *options)
    for of_lse in (None, grad_lse):
        arguments = (grad_out, q, k, v, out, lse, of_lse, *options)
        torch.library.opcheck(torch.ops.pyeff.attention_backward.default, arguments)


def test_autocast_casts_as_torch_s_attention_does() -> None:
    q, k, v, *_ = PROBLEMS["padded"].tensors()
    narrow = pyeff.attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = pyeff.attention(q, k.bfloat16(), v)
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, narrow)


def test_the_choice_is_explained() -> None:
    q, k, v, *_ = PROBLEMS["padded"].tensors()
    assert pyeff.explain("attention", q, k, v).impl == "cpu"
    capped = pyeff.explain(pyeff.attention, q, k, v, softcap=30.0)
    assert capped.impl == "reference"
    assert "no softcap" in capped.refused["cpu"]
    assert pyeff.explain("attention", q.double(), k.double(), v.double()).impl == "reference"
    for impl, reason in (("flash", "CUDA tensors"), ("cudnn", "CUDA tensors"), ("flash_attn_2", "CUDA tensors")):
        with pytest.raises(RuntimeError, match=f"impl='{impl}' cannot be used: .*{reason}"):
            pyeff.attention(q, k, v, impl=impl)
    with pytest.raises(RuntimeError, match="no softcap"):
        pyeff.attention(q, k, v, softcap=30.0, impl="cpu")


def test_arguments_that_do_not_fit_are_named() -> None:
    q, k, v = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8)
    cu_seqlens = torch.tensor([0, 3, 5])
    packed = (q[0], k[0], v[0])
    cases: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (TypeError, "k must be a tensor, got list", (q, [1.0], v), {}),
        (TypeError, "q must be float16", (q.long(), k, v), {}),
        (ValueError, r"q must be \[batch, tokens, heads, head size\]", (q[0], k, v), {}),
        (ValueError, r"q must be \[tokens, heads, head size\]", (q, k, v), {"cu_seqlens": cu_seqlens}),
        (ValueError, "v must be on the device of q", (q, k, v.to("meta")), {}),
        (ValueError, "must have one dtype", (q, k.double(), v), {}),
        (ValueError, "v must be of the shape of k", (q, k, v[..., :4]), {}),
        (ValueError, "q and k must have one head size", (q[..., :4], k, v), {}),
        (ValueError, "multiple of the heads of k, got 3 and 2", (q[:, :, :3], k, v), {}),
        (ValueError, "one batch size", (q[:1], k, v), {}),
        (ValueError, "needs cu_seqlens", (q, k, v), {"cu_seqlens_k": cu_seqlens}),
        (ValueError, "give cu_seqlens_k", (q[0, :4], k[0], v[0]), {"cu_seqlens": torch.tensor([0, 4])}),
        (ValueError, "cu_seqlens must rise", packed, {"cu_seqlens": torch.tensor([0, 4, 3, 5])}),
        (ValueError, "cu_seqlens must rise", packed, {"cu_seqlens": torch.tensor([0, 4])}),
        (TypeError, "cu_seqlens must be a tensor", packed, {"cu_seqlens": [0, 5]}),
        (
            ValueError,
            "cu_seqlens_k must rise",
            packed,
            {"cu_seqlens": cu_seqlens, "cu_seqlens_k": torch.tensor([0, 6, 5])},
        ),
        (
            ValueError,
            "cu_seqlens_k must cut the keys into the 2 samples",
            packed,
            {"cu_seqlens": cu_seqlens, "cu_seqlens_k": torch.tensor([0, 5])},
        ),
        (TypeError, "q must be a dense tensor", (q.to_sparse(), k, v), {}),
        (TypeError, "causal must be True or False, got str", (q, k, v), {"causal": "no"}),
        (ValueError, "window must be at least 1", (q, k, v), {"window": 0}),
        (ValueError, "window must be at most", (q, k, v), {"window": 2**63}),
        (TypeError, "window must be a whole number", (q, k, v), {"window": 2.0}),
        (ValueError, "softcap must be positive and finite", (q, k, v), {"softcap": 0.0}),
        (ValueError, "scale must be positive and finite", (q, k, v), {"scale": math.inf}),
        (ValueError, "scale must be positive and finite", (q, k, v), {"scale": 10**400}),
        (TypeError, "scale must be a number", (q, k, v), {"scale": "1"}),
        (ValueError, "impl must be 'auto' or one of", (q, k, v), {"impl": "fast"}),
        (TypeError, "deterministic must be True or False, got int", (q, k, v), {"deterministic": 1}),
    ]
    for error, message, tensors, options in cases:
        with pytest.raises(error, match=message):
            pyeff.attention(*tensors, **options)
