"""Operations with a gradient and no gradient of that, which say so rather than leave it out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


def differentiable_once(operation: str, instead: str) -> Callable[[Backward], Backward]:
    """Mark the backward of an autograd function as one without second derivatives; asked for, they raise RuntimeError.

    torch's `once_differentiable` ties its error to no input: where `torch.autograd.grad` is asked for named ones, no
    way leads to it, and the second derivative comes out without this operation's part.
    """
    message = f"{operation} has no second derivatives: take {instead} where they are needed"

    def mark(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def marked(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            if not torch.is_grad_enabled():  # it is under create_graph alone
                return backward(ctx, *grads)
            read = _Read(ctx)
            with torch.no_grad():
                found = backward(read, *grads)
            through = [t for t in (*grads, *read.saved_tensors) if t is not None and t.requires_grad]
            refusing = iter(_Refusal.apply(message, len(through), *through, *(t for t in found if t is not None)))
            return tuple(None if t is None else next(refusing) for t in found)

        return marked

    return mark


class _Read:
    """A node of autograd whose saved tensors are taken once, as checkpoints that make them again allow."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.saved_tensors: tuple[Tensor | None, ...] = ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _Refusal(torch.autograd.Function):
    """Gradients as they are, which hang on everything that they were made of."""

    @staticmethod
    def forward(ctx: Any, message: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.message = message
        return tuple(t.detach() for t in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(ctx.message)
