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
from torch.autograd.function import once_differentiable

from pyeff.observation.deferral import HeldCall, Kept
from pyeff.observation.layers import PARAMETER_INPUTS, cast_for_autocast
from pyeff.observation.recording import Use
from pyeff.ops.linear_cross_entropy import forward_of_head
from pyeff.ops.linear_cross_entropy_grad import HeadGrad, gradient_of_scored


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
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        rows, w, b, targets, nll, lse = saved = ctx.saved_tensors
        uses = [use for use in (ctx.w_use, ctx.b_use) if use is not None and use.open]
        of_hidden, of_w, of_b = ctx.needs_input_grad[:3]
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
    dtype = torch.promote_types(rows.dtype, torch.float32)
    x = rows[sample].to(dtype) @ w[classes].to(dtype).t()
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
