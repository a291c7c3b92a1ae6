"""Norms of every sample's weight gradient without the gradient: the definition.

For inputs A [N, d] and output gradients G [N, p] of packed samples, the gradient of sample s is D_s = G_s^T A_s, and

    || D_s ||_F^2 = sum over its tokens t and u of (a_t . a_u) (g_t . g_u):

the sum of the elementwise product of two Gram matrices (Goodfellow 2015, arXiv:1510.01799, for one token; Li et al.
2021, arXiv:2110.05679, for sequences).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

# Rows of the Gram matrices in memory at a time.
_BLOCK_ROWS = 1024


def gram_norms(inputs: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor) -> Tensor:
    """norms_sq [S], in float64 if `inputs` is, else in float32; a sum that rounding has made negative is 0."""
    dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    borders = cu_seqlens.tolist()
    norms_sq = inputs.new_zeros(len(borders) - 1, dtype=dtype)
    for s, (start, end) in enumerate(pairwise(borders)):
        a, g = inputs[start:end].to(dtype), grad_outputs[start:end].to(dtype)
        for rows in range(0, end - start, _BLOCK_ROWS):
            block = slice(rows, rows + _BLOCK_ROWS)
            norms_sq[s] += ((a[block] @ a.T) * (g[block] @ g.T)).sum()
    return norms_sq.clamp(min=0)  # keeps NaN
