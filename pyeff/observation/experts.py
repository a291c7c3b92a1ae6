# ruff: noqa: D102 (forward and backward are what torch calls them)
"""Stacked experts: 3-D parameters [experts, ...], each slice of which serves the tokens that were routed to it.

transformers 5 runs such modules through its experts interface. While observed, they run the forward pass below: pairs
of token and expert are sorted by expert and, within an expert, lie in the order of the tokens, so that the pairs of one
expert and one sample are neighbours. A token routed to an expert counts for its sample.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyeff.observation.deferral import HeldExperts, HeldSamples
from pyeff.observation.features import Noted
from pyeff.observation.layers import PARAMETER_INPUTS, cast_for_autocast, measured, no_autocast, observed_once
from pyeff.observation.recording import Use
from pyeff.observation.rows import Rows

if TYPE_CHECKING:
    from pyeff.observation.observer import GradientObservation

# What the decorator of the experts interface gives a module.
_INTERFACE = ("_apply_gate", "has_gate", "has_bias", "is_transposed", "num_experts")


class ObservedExperts(torch.autograd.Function):
    """y_r = W_e x_r + b_e for the rows r of each expert e; `pairs` tells the rows of each (expert, sample)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        transposed: bool,
        autocast: bool,
        pairs: Rows,
        w_use: Use | None,
        b_use: Use | None,
    ) -> Tensor:
        ctx.transposed, ctx.pairs, ctx.w_use, ctx.b_use = transposed, pairs, w_use, b_use
        ctx.x_dtype, ctx.w_shape, ctx.w_dtype = x.dtype, w.shape, w.dtype
        w_cast = cast_for_autocast(w, x) if autocast else w
        x_cast = x.to(w_cast.dtype)
        ctx.compute_dtype = w_cast.dtype
        ctx.save_for_backward(x_cast if ctx.needs_input_grad[1] else None, w if ctx.needs_input_grad[0] else None)
        with no_autocast(x):
            y = _per_expert(x_cast, w_cast if transposed else w_cast.mT, pairs)
            if b is not None:
                counts = pairs.borders.diff().view(w.shape[0], -1).sum(1)
                y += torch.repeat_interleave(b, counts, dim=0, output_size=pairs.total)
        ctx.b_dtype = None if b is None else b.dtype
        return y

    @staticmethod
    @observed_once
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        pairs: Rows = ctx.pairs
        experts = ctx.w_shape[0]
        grad_x = grad_w = grad_b = None
        g = g.to(ctx.compute_dtype)
        with no_autocast(g):
            if ctx.needs_input_grad[0]:
                w = w.to(ctx.compute_dtype)
                grad_x = _per_expert(g, w.mT if ctx.transposed else w, pairs).to(ctx.x_dtype)
            if ctx.needs_input_grad[1]:
                inputs, outputs = (g, x) if ctx.transposed else (x, g)
                grad_w = _weight_grad(inputs, outputs, pairs, ctx.w_shape, ctx.w_dtype, ctx.w_use)
            if ctx.needs_input_grad[2]:
                sums = pairs.sum_by_sample(g).view(experts, -1, g.shape[1])
                use = ctx.b_use
                if use is not None and use.open:
                    use.hold(HeldSamples(sums.transpose(0, 1)))
                    use.add_norms_sq(sums.square().sum((0, 2)))
                    features = use.forward.observation.features
                    if features is not None:
                        use.add_features(features.of_sample_grads(use.name, sums.transpose(0, 1)))
                grad_b = None if use is not None and use.deferred else sums.sum(1).to(ctx.b_dtype)
        return grad_x, grad_w, grad_b, None, None, None, None, None


PARAMETER_INPUTS[ObservedExperts] = (1, 2)


def _per_expert(x: Tensor, w: Tensor, pairs: Rows) -> Tensor:
    """x_r W_e for the rows of each expert; `w` [experts, n, m]."""
    aligned = all(size * x.element_size() % 16 == 0 for size in w.shape[1:])
    if x.is_cuda and x.dtype == torch.bfloat16 and aligned and torch.cuda.get_device_capability(x.device) >= (8, 0):
        ends = pairs.borders.view(-1)[1:].view(w.shape[0], -1)[:, -1]
        return F.grouped_mm(x, w, offs=ends.contiguous())
    y = x.new_empty(x.shape[0], w.shape[2])
    for expert, (begin, end) in enumerate(_spans(pairs, w.shape[0])):
        if end > begin:
            torch.mm(x[begin:end], w[expert], out=y[begin:end])
    return y


def _weight_grad(
    inputs: Tensor, outputs: Tensor, pairs: Rows, shape: torch.Size, dtype: torch.dtype, use: Use | None
) -> Tensor | None:
    assert pairs.host is not None
    experts = shape[0]
    samples = pairs.samples // experts
    watched = use if use is not None and use.open else None
    observation = None if watched is None else watched.forward.observation
    features = None if observation is None else observation.features
    if watched is not None:
        watched.hold(HeldExperts(pairs, inputs, outputs, experts))
    gradient = observation is None or observation.gradient
    grad = torch.zeros(shape, dtype=dtype, device=inputs.device) if gradient else None
    norms_sq = torch.zeros(samples, dtype=torch.promote_types(inputs.dtype, torch.float32), device=inputs.device)
    for expert, (begin, end) in enumerate(_spans(pairs, experts)):
        if end == begin and (features is None or features.linear):
            continue
        a, g = inputs[begin:end], outputs[begin:end]
        if watched is None:
            assert grad is not None
            grad[expert] = g.t() @ a
            continue
        borders = pairs.host[expert * samples : (expert + 1) * samples + 1] - begin
        reference = sketch = factored = None
        if features is not None:
            reference = features.parameter_reference(watched.name)
            reference = None if reference is None else reference[expert]
            sketch = features.parameter_sketch(watched.name, expert)
            factored = features.factored_sketch(watched.name, a, g, borders, expert * g.shape[1])
        result = measured(a, g, borders, int(borders.diff().square().sum()), watched, reference, sketch)
        if grad is not None and result.weight_grad is not None:
            grad[expert] = result.weight_grad
        if result.norms_sq is not None:
            norms_sq += result.norms_sq
        watched.add_features(Noted(result.sketches, result.dots, factored))
    if watched is not None and observation is not None:
        watched.add_norms_sq(norms_sq if observation.norms else None)
    return grad


def _spans(pairs: Rows, experts: int) -> list[tuple[int, int]]:
    assert pairs.host is not None
    edges = pairs.host[:: pairs.samples // experts].tolist() if pairs.samples else [0] * (experts + 1)
    return list(itertools.pairwise(edges))


def observe_experts(observation: GradientObservation) -> list[Callable[[], None]]:
    """Give the experts of the model their observed forward pass; returns what takes it away again."""
    undo: list[Callable[[], None]] = []
    for module in observation.model.modules():
        own = [p for p in module.parameters(recurse=False) if id(p) in observation.parameters]
        if not own or not all(hasattr(module, name) for name in _INTERFACE) or _has_own_forward(module):
            continue
        module.forward = _ObservedForward(observation, module)
        undo.append(functools.partial(delattr, module, "forward"))
    return undo


class _ObservedForward:
    """The observed forward pass of a module; in a copy of the module, that of its class."""

    def __init__(self, observation: GradientObservation, module: nn.Module) -> None:
        self._call, self._module = functools.partial(_experts_forward, observation, module), module

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._call(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._module, "forward")


def _has_own_forward(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def _experts_forward(
    observation: GradientObservation, module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    up = "gate_up_proj" if module.has_gate else "up_proj"
    names = [up, "down_proj", *((f"{up}_bias", "down_proj_bias") if module.has_bias else ())]
    tensors = {name: getattr(module, name, None) for name in names}
    plain = functools.partial(type(module).forward, module, hidden_states, top_k_index, top_k_weights)
    supported = (
        torch.is_grad_enabled()
        and all(isinstance(t, nn.Parameter) for t in tensors.values())
        and not getattr(module, "_is_expert_parallel", False)
        and not getattr(module, "has_post_expert_norm", False)
        and hidden_states.ndim == 2
    )
    if not supported:
        return plain()
    uses, tokens = observation.mode.expert_uses(tensors, hidden_states)
    if tokens is None:
        return plain()

    choices = top_k_index.shape[-1]
    experts = module.num_experts
    expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
    sample = tokens.sample_of_row()[order // choices]
    pairs = _pairs(expert, sample, experts, tokens.samples)
    autocast = getattr(getattr(module, "config", None), "_experts_implementation", None) in ("eager", "batched_mm")

    def layer(x: Tensor, name: str) -> Tensor:
        bias = tensors.get(f"{name}_bias")
        return ObservedExperts.apply(
            x, tensors[name], bias, module.is_transposed, autocast, pairs, uses[name], uses.get(f"{name}_bias")
        )

    hidden = layer(hidden_states[order // choices], up)
    hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
    weighted = layer(hidden, "down_proj") * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return weighted[back].view(-1, choices, weighted.shape[-1]).sum(1).to(hidden_states.dtype)


def _pairs(expert: Tensor, sample: Tensor, experts: int, samples: int) -> Rows:
    counts = torch.zeros(experts * samples, dtype=torch.int64, device=expert.device)
    counts.scatter_add_(0, expert * samples + sample, torch.ones_like(expert))
    borders = F.pad(counts.cumsum(0), (1, 0))
    host = borders.to("cpu")  # the one wait for a GPU: the loop over experts needs their sizes
    return Rows(experts * samples, expert.numel(), None, borders.to(torch.int32), host)
