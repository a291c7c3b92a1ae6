# ruff: noqa: D102 (forward and backward are what torch calls them)
"""A language-model head and its loss in one, `pyeff.linear_cross_entropy`: observed without its logits in memory.

Memory beyond the plain loss: the workspace of `pyeff.ops.linear_grad`, and for a head whose weight is also the
embedding, a piece of _PIECE_BYTES of the gradient by the logits of one sample's own tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyeff.observation.deferral import HeldCall, Kept
from pyeff.observation.features import Features, Noted
from pyeff.observation.layers import PARAMETER_INPUTS, cast_for_autocast, measured, observed_once
from pyeff.observation.recording import Use
from pyeff.ops import ParameterSketch, VectorGrad, vector_grad
from pyeff.ops.linear_cross_entropy import forward_of_head
from pyeff.ops.linear_cross_entropy_grad import HeadGrad, gradient_of_scored

# With sketches and dots the gradient by the logits is formed for so many classes, at least, and bytes at a time.
_LEAST_CLASSES, _PIECE_BYTES = 128, 32 << 20


class ObservedHead(torch.autograd.Function):
    """-log p_y [N] of the tokens of `hidden` [..., d], 0 where ignored."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        w: Tensor,
        b: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        ignore_index: int,
        w_use: Use | None,
        b_use: Use | None,
    ) -> Tensor:
        ctx.w_use, ctx.b_use, ctx.shape, ctx.dtype, ctx.w_dtype = w_use, b_use, hidden.shape, hidden.dtype, w.dtype
        rows = cast_for_autocast(hidden, hidden).reshape(targets.numel(), hidden.shape[-1])
        return forward_of_head(ctx, rows, cast_for_autocast(w, hidden), b, targets.reshape(-1), softcap, ignore_index)

    @staticmethod
    @observed_once
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        rows, w, b, targets, nll, lse = saved = ctx.saved_tensors
        uses = [use for use in (ctx.w_use, ctx.b_use) if use is not None and use.open]
        of_hidden, of_w, of_b = ctx.needs_input_grad[:3]
        if uses and uses[0].forward.observation.features is not None:
            return _by_panels(ctx, saved, grad_losses, uses)
        gradient = not uses or uses[0].forward.observation.gradient
        norms = bool(uses) and uses[0].forward.observation.norms
        options = {"softcap": ctx.softcap, "ignore_index": ctx.ignore_index}
        borders = uses[0].rows.borders if uses else torch.tensor([0, rows.shape[0]])
        found = HeadGrad(nll, None, None, None, None, None)
        if of_hidden or norms or (gradient and (of_w or of_b)):
            found = gradient_of_scored(
                rows,
                w,
                targets,
                borders,
                nll,
                lse,
                grad_losses.contiguous(),
                bias=b,
                hidden_grad=of_hidden,
                weight_grad=gradient and (of_w or of_b),
                norms=norms,
                **options,
            )
        _hold(ctx.w_use, ctx.b_use, saved, grad_losses, options)
        if ctx.w_use in uses:
            ctx.w_use.add_norms_sq(found.norms_sq)

            def columns(sample: slice, classes: Tensor) -> Tensor:
                return _logit_grads(saved, grad_losses, sample, classes, ctx.softcap, ctx.ignore_index)

            ctx.w_use.add_columns(rows, columns)
        if ctx.b_use in uses:
            ctx.b_use.add_norms_sq(found.bias_norms_sq)
        grad_hidden = None if found.hidden_grad is None else found.hidden_grad.view(ctx.shape).to(ctx.dtype)
        grad_w = found.weight_grad.to(ctx.w_dtype) if of_w and found.weight_grad is not None else None
        return grad_hidden, grad_w, found.bias_grad if of_b else None, None, None, None, None, None


PARAMETER_INPUTS[ObservedHead] = (1, 2)


def _by_panels(ctx: Any, saved: tuple[Tensor, ...], grad_losses: Tensor, uses: list[Use]) -> tuple[Tensor | None, ...]:
    """The backward pass where sketches or dots are wanted: the gradient by the logits of some classes at a time, and
    what these rows of the weight add to everything."""
    rows, w, b, *_ = saved
    observation = uses[0].forward.observation
    (of_hidden, of_w, of_b), borders = ctx.needs_input_grad[:3], uses[0].rows.borders
    wide = torch.promote_types(rows.dtype, torch.float32)
    options = {"softcap": ctx.softcap, "ignore_index": ctx.ignore_index}
    w_use, b_use = (use if use in uses else None for use in (ctx.w_use, ctx.b_use))
    hidden_grad = rows.new_zeros(rows.shape, dtype=wide) if of_hidden else None
    weight_grads: list[Tensor] = []
    bias_grads: list[Tensor] = []
    noted, norms_sq = Noted(None, None), None
    width = max(_LEAST_CLASSES, _PIECE_BYTES // (wide.itemsize * max(1, rows.shape[0])))
    for first in range(0, w.shape[0], width):
        classes = torch.arange(first, min(first + width, w.shape[0]), device=w.device)
        grads = _logit_grads(saved, grad_losses, slice(None), classes, **options)
        if of_b:
            sums = vector_grad(grads, borders, norms=False, sample_grads=True).sample_grads
            assert sums is not None
            bias_grads.append(sums)
        grads = grads.to(rows.dtype)
        if hidden_grad is not None:
            hidden_grad += _product(grads, w[first : first + width].t())
        if w_use is not None:
            part = _rows_of_features(observation.features, w_use.name, rows, grads, borders, first)
            found = measured(rows, grads, borders, w_use.rows.pairs, w_use, *part[:2])
            noted = Noted(*map(_added, noted, (found.sketches, found.dots, part[2])))
            norms_sq = _added(norms_sq, found.norms_sq)
            weight_grads += [] if found.weight_grad is None else [found.weight_grad]
        elif of_w:
            weight_grads.append(grads.t() @ rows)
    if w_use is not None:
        _hold(w_use, None, saved, grad_losses, options)
        w_use.add_norms_sq(norms_sq)
        w_use.add_columns(rows, lambda sample, some: _logit_grads(saved, grad_losses, sample, some, **options))
        w_use.add_features(noted)
    grad_b = None
    if of_b:
        sample_grads = torch.cat(bias_grads, 1)
        grad_b = sample_grads.sum(0).to(b.dtype)
        if b_use is not None:
            b_use.add_vector(VectorGrad(grad_b, None, sample_grads))
            grad_b = None if b_use.deferred else grad_b
    grad_hidden = None if hidden_grad is None else hidden_grad.view(ctx.shape).to(ctx.dtype)
    grad_w = torch.cat(weight_grads).to(ctx.w_dtype) if weight_grads else None
    return grad_hidden, grad_w, grad_b, None, None, None, None, None


def _rows_of_features(
    features: Features | None, name: str, rows: Tensor, grads: Tensor, borders: Tensor, first: int
) -> tuple[Tensor | None, ParameterSketch | None, Tensor | None]:
    """The reference and the sketch of some rows of a weight, and the factored sketches of what is formed of them."""
    assert features is not None
    reference, sketch, count = features.parameter_reference(name), features.parameter_sketch(name), grads.shape[1]
    if sketch is not None:
        direction = None if sketch.direction is None else sketch.direction.rows(first, count)
        sketch = ParameterSketch(sketch.sketch, sketch.name, first, direction)
    factored = features.factored_sketch(name, rows, grads, borders, first)
    return None if reference is None else reference[first : first + count], sketch, factored


def _added(known: Tensor | None, more: Tensor | None) -> Tensor | None:
    return more if known is None else known if more is None else known + more


def _hold(
    w_use: Use | None, b_use: Use | None, saved: tuple[Tensor, ...], grad_losses: Tensor, options: dict[str, Any]
) -> None:
    """Keep what the gradients of weight and bias take later: rows, labels, and the numbers of each row's softmax."""
    rows, w, b, targets, nll, lse = saved

    @functools.lru_cache(maxsize=1)  # one pass for both
    def formed(places: Tensor | None, factors: Tensor | None) -> HeadGrad:
        kept = Kept(places, factors, [])
        some = kept.rows(rows)
        return gradient_of_scored(
            some,
            w,
            kept.rows(targets),
            torch.tensor([0, some.shape[0]]),
            kept.rows(nll),
            kept.rows(lse),
            kept.scaled(grad_losses).contiguous(),
            bias=b,
            hidden_grad=False,
            weight_grad=True,
            norms=False,
            **options,
        )

    def of(use: Use | None, gradient: Callable[[HeadGrad], Tensor | None]) -> None:
        def form(kept: Kept) -> Tensor:
            found = gradient(formed(kept.places, kept.factors))
            assert found is not None
            return found

        if use is not None and use.deferred:
            use.hold(HeldCall(use.rows, (rows, targets, nll, lse, grad_losses), form))

    of(w_use, lambda found: found.weight_grad)
    of(b_use, lambda found: found.bias_grad)


def _logit_grads(
    saved: tuple[Tensor, ...],
    grad_losses: Tensor,
    sample: slice,
    classes: Tensor,
    softcap: float | None,
    ignore_index: int,
) -> Tensor:
    """The gradient of the loss by the logits [T, C] of some rows for some classes, from their softmax formed again."""
    rows, w, b, targets, nll, lse = saved
    x = _product(rows[sample], w[classes])
    if b is not None:
        x += b[classes]
    slope = None
    if softcap is not None:
        u = x / softcap
        x = softcap * torch.tanh(u)
        slope = 4 * torch.sigmoid(2 * u) * torch.sigmoid(-2 * u)
    error = torch.exp_(x - lse[sample, None])
    error = torch.where(targets[sample, None] == classes, torch.expm1(-nll[sample, None]), error)  # p - onehot(y)
    error = error * grad_losses[sample, None] if slope is None else error * slope * grad_losses[sample, None]
    return error.masked_fill_(targets[sample, None] == ignore_index, 0.0)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x y^T in float32 or wider."""
    if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(x, y.to(x.dtype).t(), out_dtype=torch.float32)
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide) @ y.to(wide).t()
