"""The weight gradient of a linear layer, and what each sample contributes to it: the definition.

For inputs A [N, d] and output gradients G [N, p] of packed samples, sample s owning the tokens
cu_seqlens[s] <= t < cu_seqlens[s+1], its gradient is D_s = sum_t g_t a_t^T = G_s^T A_s [p, d], and

    weight_grad  sum_s D_s
    norms_sq     || D_s ||_F^2 = sum_ij D_s[i, j]^2
    dots         <D_s, R> = sum_ij D_s[i, j] R[i, j]        for a reference gradient R [p, d]
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def linear_grad(
    inputs: Tensor,
    grad_outputs: Tensor,
    cu_seqlens: Tensor,
    *,
    weight_grad: bool = True,
    norms: bool = True,
    reference: Tensor | None = None,
    sketched: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight_grad [p, d] in the dtype of `inputs`, norms_sq [S], dots [S] and what `sketched` makes
    of every sample's gradient [1, p, d]; empty [0] where not asked for.

    Computes in float64 if `inputs` is, else in float32. One sample's gradient is in memory at a time.
    """
    dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    borders = cu_seqlens.tolist()
    samples, shape = len(borders) - 1, (grad_outputs.shape[1], inputs.shape[1])
    total = inputs.new_zeros(shape if weight_grad else 0, dtype=dtype)
    norms_sq = inputs.new_zeros(samples if norms else 0, dtype=dtype)
    dots = inputs.new_zeros(samples if reference is not None else 0, dtype=dtype)
    sketches: list[Tensor] = []
    for s, (start, end) in enumerate(pairwise(borders)):
        grad = grad_outputs[start:end].to(dtype).T @ inputs[start:end].to(dtype)  # [p, d]
        if weight_grad:
            total += grad
        if norms:
            norms_sq[s] = grad.square().sum()
        if reference is not None:
            dots[s] = (grad * reference.to(dtype)).sum()
        if sketched is not None:
            sketches.append(sketched(grad[None]))
    found = torch.cat(sketches) if sketches else inputs.new_zeros(0, dtype=dtype)
    return total.to(inputs.dtype), norms_sq, dots, found
