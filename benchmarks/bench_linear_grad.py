"""Per-sample gradient norms of linear layers against the gradient alone, and against who else computes them.

    pytest benchmarks/bench_linear_grad.py --benchmark-only

The targets are of a training step (CPU) and of the weight gradient (GPU); what they are made of is timed beside them.
Opacus takes part where it can be imported: `pip install --no-deps opacus` is enough.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from oracle import assert_as_accurate
from torch import Tensor, nn
from torch.nn import functional

import pyeff


def tokens_of(lengths: list[int], d: int, p: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """inputs, grad_outputs and cu_seqlens."""
    generator = torch.Generator(device).manual_seed(0)
    inputs = torch.randn(sum(lengths), d, dtype=dtype, device=device, generator=generator)
    grad_outputs = torch.randn(sum(lengths), p, dtype=dtype, device=device, generator=generator)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    return inputs, grad_outputs, cu_seqlens


def check_answer(inputs: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor) -> None:
    """Some rows of the gradient, and all norms, against float64 before anything is timed."""
    exact = pyeff.linear_grad(inputs.double(), grad_outputs.double(), cu_seqlens, impl="reference")
    peer = pyeff.linear_grad(inputs, grad_outputs, cu_seqlens, impl="reference")
    found = pyeff.linear_grad(inputs, grad_outputs, cu_seqlens)
    assert_as_accurate(found.weight_grad, exact.weight_grad, peer.weight_grad, multiple=4.0, what="weight_grad")
    assert_as_accurate(found.norms_sq, exact.norms_sq, peer.norms_sq, multiple=4.0, what="norms_sq")
    grams, peer_grams = (
        pyeff.gram_norms(inputs, grad_outputs, cu_seqlens, impl=impl) for impl in ("auto", "reference")
    )
    assert_as_accurate(grams, exact.norms_sq, peer_grams, multiple=4.0, what="gram_norms")


def opacus_problem() -> str | None:
    """Why Opacus takes no part, or None."""
    try:
        import opacus.grad_sample.grad_sample_module_fast_gradient_clipping  # noqa: F401
    except ImportError as problem:
        return f"Opacus takes no part: {problem}"
    return None


def ghost_norms(inputs: Tensor, grad_outputs: Tensor) -> Tensor:
    """Ghost norms restated in plain torch: both Gram matrices [B, T, T] whole, in the dtype of the gradients."""
    return (inputs @ inputs.transpose(1, 2)).mul_(grad_outputs @ grad_outputs.transpose(1, 2)).sum((1, 2))


def opacus_norms(inputs: Tensor, grad_outputs: Tensor) -> Tensor:
    """Ghost norms by Opacus' own function."""
    from opacus.grad_sample.linear import compute_linear_norm_sample

    layer = nn.Linear(inputs.shape[2], grad_outputs.shape[2], bias=False, device="meta")
    return compute_linear_norm_sample(layer, [inputs], grad_outputs)[layer.weight]


def materialised(inputs: Tensor, grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
    """What vmap(grad) comes to for a linear layer: a gradient for every sample [B, p, d], then norms and sum."""
    per_sample = grad_outputs.transpose(1, 2) @ inputs
    return per_sample.sum(0), per_sample.flatten(1).float().square().sum(1)


def ways_of(inputs: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor) -> dict[str, Callable[[], object]]:
    """The gradient alone, ours, and each of the ways that `auto` chooses from on a GPU."""
    functions: dict[str, Callable[[], object]] = {
        "weight gradient, torch.mm": lambda: torch.mm(grad_outputs.T, inputs),
        "pyeff, gradient and norms": lambda: pyeff.linear_grad(inputs, grad_outputs, cu_seqlens),
    }
    for impl in ("triton", "panels", "gram") if inputs.is_cuda else ():
        functions[f"pyeff, {impl}"] = partial(pyeff.linear_grad, inputs, grad_outputs, cu_seqlens, impl=impl)
    functions["torch.mm, pyeff Gram norms"] = lambda: (
        torch.mm(grad_outputs.T, inputs),
        pyeff.gram_norms(inputs, grad_outputs, cu_seqlens),
    )
    functions["pyeff, Gram norms alone"] = lambda: pyeff.gram_norms(inputs, grad_outputs, cu_seqlens)
    return functions


@pytest.mark.benchmark(group="linear_grad")
@pytest.mark.parametrize("samples", ["short", "long"])
def test_norms_beside_the_weight_gradient(contest: Callable[..., Any], device: str, tiny: bool, samples: str) -> None:
    tokens = {"short": {"cpu": 128, "cuda": 512}, "long": {"cpu": 512, "cuda": 2048}}[samples][device]
    batch, d, p, dtype = (8, 4096, 4096, torch.bfloat16) if device == "cuda" else (8, 576, 1536, torch.float32)
    if tiny:
        batch, tokens, d, p = 2, tokens // 64, 24, 40
    inputs, grad_outputs, cu_seqlens = tokens_of([tokens] * batch, d, p, dtype, device)
    check_answer(inputs, grad_outputs, cu_seqlens)
    reference = torch.randn(p, d, dtype=dtype, device=device)
    a, g = inputs.view(batch, tokens, d), grad_outputs.view(batch, tokens, p)

    functions = ways_of(inputs, grad_outputs, cu_seqlens) | {
        "pyeff, gradient, norms, dots": lambda: pyeff.linear_grad(
            inputs, grad_outputs, cu_seqlens, reference=reference
        ),
        "pyeff, norms alone": lambda: pyeff.linear_grad(inputs, grad_outputs, cu_seqlens, weight_grad=False),
        "torch.mm, ghost norms in torch": lambda: (torch.mm(grad_outputs.T, inputs), ghost_norms(a, g)),
        "a gradient for every sample": lambda: materialised(a, g),
    }
    if (problem := opacus_problem()) is None:
        functions["torch.mm, ghost norms by Opacus"] = lambda: (torch.mm(grad_outputs.T, inputs), opacus_norms(a, g))
    else:
        print(problem)
    contest(
        "pyeff, gradient and norms",
        functions,
        baseline="weight gradient, torch.mm",
        target=1 / 0.85 if device == "cuda" and samples == "long" else None,
        flops=2 * batch * tokens * d * p,
        bound="weight gradient, torch.mm",
    )


def packed_lengths(total: int, longest: int = 512) -> list[int]:
    """Lengths that sum to `total`, from an eighth of `longest` to `longest`, 0.39 of it on average: short ones are the
    many, and 64 to 512 have a mean of 200.
    """
    draws = longest / 8 * (1 + 7 * torch.rand(1000, generator=torch.Generator().manual_seed(0)) ** 2.3)
    lengths: list[int] = []
    for length in draws.int().tolist():
        lengths.append(min(length, total - sum(lengths)))
        if sum(lengths) == total:
            break
    return lengths


@pytest.mark.benchmark(group="linear_grad")
def test_packed_samples_of_many_lengths(contest: Callable[..., Any], device: str, tiny: bool) -> None:
    d, p, dtype, total = (4096, 4096, torch.bfloat16, 16384) if device == "cuda" else (576, 1536, torch.float32, 4096)
    if tiny:
        d, p, total = 24, 40, 256
    lengths = packed_lengths(total, 32 if tiny else 512)
    inputs, grad_outputs, cu_seqlens = tokens_of(lengths, d, p, dtype, device)
    check_answer(inputs, grad_outputs, cu_seqlens)
    contest(
        "pyeff, gradient and norms",
        ways_of(inputs, grad_outputs, cu_seqlens),
        baseline="weight gradient, torch.mm",
        target=1.25 if device == "cuda" else None,
        flops=2 * sum(lengths) * d * p,
        bound="weight gradient, torch.mm",
    )


class WatchedLinear(torch.autograd.Function):
    """A linear layer whose backward adds every sample's squared norm to `norms_sq`."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, cu_seqlens: Tensor, norms_sq: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.cu_seqlens, ctx.norms_sq = cu_seqlens, norms_sq
        return functional.linear(inputs, weight)

    @staticmethod
    def backward(ctx: Any, grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        found = pyeff.linear_grad(inputs.flatten(0, 1), grad_outputs.flatten(0, 1), ctx.cu_seqlens)
        ctx.norms_sq += found.norms_sq
        return grad_outputs @ weight, found.weight_grad, None, None


class Blocks(nn.Module):
    """Six transformer MLP blocks without biases."""

    def __init__(self, d: int, f: int) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(d, f, bias=False) for _ in range(6))
        self.down = nn.ModuleList(nn.Linear(f, d, bias=False) for _ in range(6))

    def forward(self, x: Tensor, apply: Callable[[nn.Linear, Tensor], Tensor] = nn.Linear.__call__) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + apply(down, functional.gelu(apply(up, x)))
        return x


def opacus_step(model: Blocks, x: Tensor) -> Callable[[], Tensor]:
    """Forward and backward under Opacus' ghost norms: its first pass, which leaves norms and the gradient."""
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(copy.deepcopy(model), loss_reduction="sum")

    def step() -> Tensor:
        wrapped.zero_grad(set_to_none=True)
        x.grad = None
        wrapped(x).square().sum().backward()
        return wrapped.get_norm_sample().square()

    return step


def vmap_step(model: Blocks, x: Tensor) -> Callable[[], Tensor]:
    """Forward and backward by vmap(grad): a gradient of the model for every sample, then norms and their sum."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))

    def step() -> Tensor:
        gradients = per_sample(parameters, x.detach())
        norms_sq = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients.values()]).sum(0)
        for gradient in gradients.values():
            gradient.sum(0)
        return norms_sq

    return step


@pytest.mark.benchmark(group="linear_grad")
@pytest.mark.parametrize(("tokens", "target"), [(128, 1.12), (512, 1.06)], ids=["128 tokens", "512 tokens"])
def test_training_step_of_six_blocks(
    contest: Callable[..., Any], device: str, tiny: bool, tokens: int, target: float
) -> None:
    batch, d, f = 8, 576, 1536
    if tiny:
        batch, tokens, d, f = 2, tokens // 64, 24, 40
    torch.manual_seed(0)
    model = Blocks(d, f).to(device)
    x = torch.randn(batch, tokens, d, device=device, requires_grad=True)
    cu_seqlens = torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32, device=device)

    def step(apply: Callable[[nn.Linear, Tensor], Tensor] = nn.Linear.__call__) -> None:
        model.zero_grad(set_to_none=True)
        x.grad = None
        model(x, apply).square().sum().backward()

    def watched() -> Tensor:
        norms_sq = torch.zeros(batch, device=device)
        step(lambda layer, inputs: WatchedLinear.apply(inputs, layer.weight, cu_seqlens, norms_sq))
        return norms_sq

    def observed() -> Tensor:
        with pyeff.observe(model) as seen:
            step()
        return seen.grad_norms.square()

    norms_sq = watched()
    for s in range(2):
        gradients = torch.autograd.grad(model(x[s : s + 1]).square().sum(), list(model.parameters()))
        torch.testing.assert_close(norms_sq[s], sum(gradient.square().sum() for gradient in gradients))
    functions = {
        "plain step": step,
        "pyeff, step with norms": watched,
        "pyeff.observe": observed,
        "vmap(grad)": vmap_step(model, x),
    }
    if (problem := opacus_problem()) is None:
        functions["Opacus, ghost norms"] = opacus_step(model, x)
    else:
        print(problem)
    for name in functions.keys() - {"plain step"}:
        # Ghost norms are sums over pairs of tokens in float32: each may lose a rounding.
        rtol = (tokens if name.startswith("Opacus") else 11) * torch.finfo(torch.float32).eps
        found = functions[name]()
        torch.testing.assert_close(found, norms_sq, rtol=rtol, atol=0, msg=lambda text, name=name: f"{name}: {text}")
    contest(
        "pyeff, step with norms",
        functions,
        baseline="plain step",
        target=target if device == "cpu" else None,
        flops=3 * 12 * 2 * batch * tokens * d * f,
        bound="plain step",
    )


def packed_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **named: Any) -> Any:
    """Attention within each sample of a packed batch, for transformers: no scores between samples, and no mask."""
    borders: Tensor = named["cu_seq_lens_q"]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, heads, size]
    if q.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        causal = {"window_size": (-1, 0)}
        if "window_size" not in inspect.signature(varlen_attn).parameters:  # before torch 2.12
            causal = {"is_causal": True}
        longest = named["max_length_q"]
        return varlen_attn(q, k, v, borders, borders, longest, longest, **causal)[None], None
    samples = [
        functional.scaled_dot_product_attention(
            *(x[start:end].transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, enable_gqa=True
        )
        for start, end in pairwise(borders.tolist())
    ]
    return torch.cat(samples, 2).transpose(1, 2), None


def check_share(model: nn.Module, ids: Tensor, scored: Tensor, norm: Tensor, **inputs: Any) -> None:
    """`norm` is that of the gradient of the loss whose labels are `ids` where `scored` [1 or B, T], of all of them."""
    labels = ids.masked_fill(~scored, -100)
    model.zero_grad(set_to_none=True)
    # The loss is a mean over all labels but the first of each row.
    loss = model(input_ids=ids, labels=labels, **inputs).loss
    (loss * ((labels[:, 1:] != -100).sum() / labels[:, 1:].numel())).backward()
    alone = torch.stack([parameter.grad.double().norm() for parameter in model.parameters()]).norm()
    torch.testing.assert_close(norm, alone.to(norm.dtype), rtol=16 * torch.finfo(model.dtype).eps, atol=0)


@pytest.mark.benchmark(group="linear_grad")
def test_training_step_of_smollm2(contest: Callable[..., Any], device: str, tiny: bool) -> None:
    transformers = pytest.importorskip("transformers")
    shape = (
        {"vocab_size": 64, "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 2}
        if tiny
        else {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    )
    config = transformers.LlamaConfig(
        **shape, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, use_cache=False
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    batch, tokens = (2, 8) if tiny else (8, 128)
    ids = torch.randint(config.vocab_size, (batch, tokens), device=device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()

    def observed() -> Tensor:
        with pyeff.observe(model) as seen:
            step()
        return seen.grad_norms

    found = observed()
    assert found.shape == (batch,)
    for s in (0, batch - 1):
        check_share(model, ids, torch.arange(batch, device=device)[:, None].expand_as(ids) == s, found[s])
    contest(
        "pyeff.observe",
        {"plain step": step, "pyeff.observe": observed},
        baseline="plain step",
        target=1.12 if device == "cpu" else None,
        flops=6 * ids.numel() * sum(parameter.numel() for parameter in model.parameters()),
        bound="plain step",
    )


@pytest.mark.benchmark(group="linear_grad")
def test_training_step_of_a_billion_parameters(contest: Callable[..., Any], device: str, tiny: bool) -> None:
    if device == "cpu" and not tiny:
        pytest.skip("too large for a CPU")
    transformers = pytest.importorskip("transformers")
    transformers.AttentionInterface.register("packed", packed_attention)
    shape = (
        {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
        if tiny
        else {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
    )
    config = transformers.LlamaConfig(
        **shape,
        num_attention_heads=4 if tiny else 32,
        num_key_value_heads=2 if tiny else 4,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="packed",
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    tokens = 128 if tiny else 16384
    lengths = packed_lengths(tokens, 32 if tiny else 512)
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    ids = torch.randint(config.vocab_size, (1, tokens), device=device)
    packed = {
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None].to(device),
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, **packed).loss.backward()

    def observed() -> Tensor:
        with pyeff.observe(model) as seen:
            step()
        return seen.grad_norms

    found = observed()
    assert found.shape == (len(lengths),)
    sample = torch.repeat_interleave(torch.tensor(lengths))[None].to(device)
    for s in (0, len(lengths) - 1):
        # A token's label is the next token: the first label of a sample belongs to the last token of the one before.
        scored = torch.cat([torch.zeros_like(sample[:, :1], dtype=torch.bool), sample[:, :-1] == s], 1)
        check_share(model, ids, scored, found[s], **packed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    contest(
        "pyeff.observe",
        {"plain step": step, "pyeff.observe": observed},
        baseline="plain step",
        target=1.10 if device == "cuda" else None,
        memory_target=1.01,
        flops=6 * tokens * parameters,
        bound="plain step",
        pairs=10 if device == "cuda" else 1,
    )
