# ruff: noqa: D102 (forward and backward are what torch calls them)
"""The loss of a language-model head, differentiable, without its logits in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from pyeff.ops._differentiation import differentiable_once
from pyeff.ops.linear_cross_entropy_grad import gradient_of_scored
from pyeff.ops.linear_cross_entropy_scores import linear_cross_entropy_scores

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of a language-model head: what `cross_entropy(linear(hidden, weight, bias), targets)` is.

        x = hidden weight^T + bias,   z = x, or softcap tanh(x / softcap),   loss = log sum_v e^z_v - z_y

    The logits are never stored, neither for the loss nor for its gradient: kept for the backward pass are two numbers a
    token. It forms the softmax again, a panel of classes at a time, see `linear_cross_entropy_grad` for its memory.

    Shapes and dtypes: `hidden` [..., d] and `weight` [V, d] of one dtype (under autocast both are cast, as for
    `linear`), `targets` [...] int64 or int32, `bias` [V]. The loss is float32 (float64 inputs: float64): a number, or
    [...] for reduction "none", where an ignored position has loss 0. "mean" is over the positions that count, NaN if
    there are none. Logits and sums are float32, more exact than a head in 16 bits.

    Differentiable once, in `hidden`, `weight` and `bias`. Inside `pyeff.observe` every sample's gradient norm of the
    head's weight and bias is noted, also where the weight is the embedding's.

    Raises `TypeError` or `ValueError` for arguments that are wrong or do not fit together. A target that is no class
    raises `ValueError` on the CPU and makes the loss NaN on a GPU, where finding it would wait for the stream.

    Cost: 2 N d V FLOPs forward, 2 N d V for forming the softmax again, and 2 N d V for each of the gradients of
    `hidden` and `weight`.

    >>> import torch, pyeff
    >>> hidden, weight = torch.randn(2, 5, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    >>> loss = pyeff.linear_cross_entropy(hidden, weight, torch.randint(50, (2, 5)))
    >>> loss.backward()
    >>> weight.grad.shape
    torch.Size([50, 16])
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none'; got {reduction!r}")
    tensors = (hidden, weight, targets, bias)
    if has_torch_function(tensors):
        return handle_torch_function(
            linear_cross_entropy,
            tensors,
            hidden,
            weight,
            targets,
            bias=bias,
            softcap=softcap,
            ignore_index=ignore_index,
            reduction=reduction,
        )
    check_leading(hidden, targets)
    rows, head = cast_for_autocast(hidden, weight)
    rows = rows.reshape(targets.numel(), rows.shape[-1])
    losses = TokenLosses.apply(rows, head, bias, targets.reshape(-1), softcap, ignore_index)
    return reduced(losses, targets, ignore_index, reduction)


class TokenLosses(torch.autograd.Function):
    """nll [N] of `hidden` [N, d], 0 at ignored positions."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        ignore_index: int,
    ) -> Tensor:
        return forward_of_head(ctx, hidden, weight, bias, targets, softcap, ignore_index)

    @staticmethod
    @differentiable_once("pyeff.linear_cross_entropy", "cross_entropy(linear(hidden, weight, bias), targets)")
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        hidden, weight, bias, targets, nll, lse = ctx.saved_tensors
        found = gradient_of_scored(
            hidden,
            weight,
            targets,
            torch.tensor([0, hidden.shape[0]]),
            nll,
            lse,
            grad_losses.contiguous(),
            bias=bias,
            softcap=ctx.softcap,
            ignore_index=ctx.ignore_index,
            hidden_grad=of_hidden,
            weight_grad=of_weight or of_bias,
            norms=False,
        )
        return found.hidden_grad, found.weight_grad if of_weight else None, found.bias_grad, None, None, None


def forward_of_head(
    ctx: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    ignore_index: int,
) -> Tensor:
    """The losses of `TokenLosses`, and what their gradient needs, kept on `ctx`."""
    scores = linear_cross_entropy_scores(hidden, weight, targets, bias=bias, softcap=softcap, ignore_index=ignore_index)
    ctx.softcap, ctx.ignore_index = softcap, ignore_index
    ctx.save_for_backward(hidden, weight, bias, targets, scores.nll.clone(), scores.lse.clone())
    return scores.nll.masked_fill(~scores.scored, 0.0)


def check_leading(hidden: Tensor, targets: Tensor) -> None:
    """Raise `TypeError` or `ValueError` unless there is a target for every hidden state."""
    for name, tensor in {"hidden": hidden, "targets": targets}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if hidden.ndim < 1 or targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets must be {list(hidden.shape[:-1])} to fit hidden [..., d], got shape {tuple(targets.shape)}"
        )


def cast_for_autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What autocast makes of the operands of a matrix product; both as they are where it is off."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight
    dtype = torch.get_autocast_dtype(device)
    hidden, weight = (t if t.dtype == torch.float64 else t.to(dtype) for t in (hidden, weight))
    return hidden, weight


def reduced(losses: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The loss of token losses [N] that are 0 at ignored positions."""
    if reduction == "none":
        return losses.view(targets.shape)
    total = losses.sum()
    return total if reduction == "sum" else total / (targets != ignore_index).sum()
