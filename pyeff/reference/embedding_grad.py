"""The gradient of a table whose rows are looked up by index, and what each sample contributes to it: the definition.

Token t of sample s reads row i_t of the table, and g_t is the gradient by what it read. The sample's gradient D_s has
the rows D_s[v] = sum of g_t over its tokens with i_t = v, none for v = padding_idx, and

    weight_grad  sum_s D_s
    norms_sq     || D_s ||_F^2
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def embedding_grad(
    indices: Tensor,
    grad_outputs: Tensor,
    cu_seqlens: Tensor,
    num_embeddings: int,
    *,
    padding_idx: int | None = None,
    weight_grad: bool = True,
    norms: bool = True,
) -> tuple[Tensor, Tensor]:
    """weight_grad [V, d] in the dtype of `grad_outputs` and norms_sq [S]; empty [0] where not asked for.

    Computes in float64 if `grad_outputs` is, else in float32.
    """
    dtype = torch.float64 if grad_outputs.dtype == torch.float64 else torch.float32
    borders, d = cu_seqlens.tolist(), grad_outputs.shape[1]
    total = grad_outputs.new_zeros((num_embeddings, d) if weight_grad else 0, dtype=dtype)
    norms_sq = grad_outputs.new_zeros(len(borders) - 1 if norms else 0, dtype=dtype)
    for s, (start, end) in enumerate(pairwise(borders)):
        own, row = torch.unique(indices[start:end], return_inverse=True)
        grads = total.new_zeros(own.numel(), d).index_add_(0, row, grad_outputs[start:end].to(dtype))
        if padding_idx is not None:
            grads[own == padding_idx] = 0.0
        if weight_grad:
            total[own.long()] += grads
        if norms:
            norms_sq[s] = grads.square().sum()
    return total.to(grad_outputs.dtype), norms_sq
