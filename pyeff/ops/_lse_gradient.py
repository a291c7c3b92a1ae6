"""The gradient of attention's log-sum-exp, by kernels that know none."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import pad

# Columns that carry the gradient; GPU kernels want head sizes in eights.
EXTRA_COLUMNS = 8

Grads = tuple[Tensor, Tensor, Tensor]


def backward_with_lse(
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Grads],
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    *,
    lse: Tensor,
    grad_lse: Tensor | None,
) -> Grads:
    """`backward(grad_out, q, k, v, out, lse)` of a kernel that computes delta = rowsum(grad_out * out) for itself.

    The gradient of lse joins delta as one more column, where `grad_out` is -grad_lse and `out` is 1; the zeros that q,
    k and v have there keep it out of everything else.
    """
    if grad_lse is None:
        return backward(grad_out, q, k, v, out, lse)
    head_size = q.shape[-1]
    grad_out, q, k, v, out = (pad(t, (0, EXTRA_COLUMNS)) for t in (grad_out, q, k, v, out))
    out[..., head_size] = 1
    grad_out[..., head_size] = -grad_lse.transpose(-1, -2)
    dq, dk, dv = backward(grad_out, q, k, v, out, lse)
    return dq[..., :head_size], dk[..., :head_size], dv[..., :head_size]


def dense(*tensors: Tensor) -> list[Tensor]:
    """Kernels read a head's numbers one after the other."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]
