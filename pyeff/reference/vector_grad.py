"""The gradient of a vector that acts on every token, and what each sample contributes to it: the definition.

For output gradients G [N, d] of packed samples, sample s owning the tokens cu_seqlens[s] <= t < cu_seqlens[s+1], the
sample's gradient of an offset (y = x + b) or of a gain (y = x * w, elementwise, with inputs X [N, d]) is

    D_s = sum_t g_t        or        D_s = sum_t g_t * x_t        [d]

and the vector's is sum_s D_s.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def vector_grad(
    grad_outputs: Tensor,
    cu_seqlens: Tensor,
    *,
    inputs: Tensor | None = None,
    norms: bool = True,
    sample_grads: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_s D_s [d], ||D_s||^2 [S] and D_s [S, d], in float64 if `grad_outputs` is, else in float32.

    The latter two are empty [0] where not asked for.
    """
    dtype = torch.float64 if grad_outputs.dtype == torch.float64 else torch.float32
    terms = grad_outputs.to(dtype) if inputs is None else grad_outputs.to(dtype) * inputs.to(dtype)
    return sums_by_sample(terms, cu_seqlens, norms=norms, sample_grads=sample_grads)


def sums_by_sample(
    terms: Tensor, cu_seqlens: Tensor, *, norms: bool = True, sample_grads: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of all rows of `terms` [N, d], its samples' squared norms [S] and the samples' sums [S, d] themselves."""
    sums = [terms[start:end].sum(0) for start, end in pairwise(cu_seqlens.tolist())]
    grads = torch.stack(sums) if sums else terms.new_zeros(0, terms.shape[1])
    norms_sq = grads.square().sum(1) if norms else grads.new_zeros(0)
    return grads.sum(0), norms_sq, grads if sample_grads else grads.new_zeros(0)
