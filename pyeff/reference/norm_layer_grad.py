"""The backward pass of LayerNorm and RMSNorm, and what each sample contributes to gain and offset: the definition.

For inputs X [N, d], output gradients G [N, d] and a gain w [d], with m_t the mean of x_t (RMSNorm: 0) and

    r_t = 1 / sqrt(mean((x_t - m_t)^2) + eps),   n_t = (x_t - m_t) r_t,   y_t = w n_t + b

the gradient by x_t is r_t (w g_t - n_t mean(w g_t n_t) - mean(w g_t)), the last term for LayerNorm alone; sample s
contributes sum_t g_t n_t to the gradient of w and sum_t g_t to that of b.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyeff.reference.vector_grad import sums_by_sample


def norm_layer_grad(
    inputs: Tensor,
    grad_outputs: Tensor,
    cu_seqlens: Tensor,
    *,
    weight: Tensor | None,
    center: bool,
    eps: float,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    input_grad: bool = True,
    weight_grad: bool = True,
    bias_grad: bool = False,
    norms: bool = True,
    sample_grads: bool = False,
) -> tuple[Tensor, ...]:
    """The gradient by `inputs` [N, d] in their dtype; then of gain and of offset: sum [d], norms_sq [S], sums [S, d].

    What is not asked for is empty [0]. Computes in float64 if `inputs` is, else in float32.
    """
    dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    x, g = inputs.to(dtype), grad_outputs.to(dtype)
    if center:
        x = x - (x.mean(1) if mean is None else mean.reshape(-1).to(dtype)).unsqueeze(1)
    inverse = (x.square().mean(1) + eps).rsqrt() if rstd is None else rstd.reshape(-1).to(dtype)
    inverse = inverse.unsqueeze(1)
    normed = x * inverse
    grad_x = inputs.new_zeros(0)
    if input_grad:
        inner = g if weight is None else g * weight.to(dtype)
        pulled = inner - normed * (inner * normed).mean(1, keepdim=True)
        if center:
            pulled = pulled - inner.mean(1, keepdim=True)
        grad_x = (pulled * inverse).to(inputs.dtype)
    found = [grad_x]
    for wanted, terms in ((weight_grad, g * normed), (bias_grad, g)):
        if wanted:
            found += sums_by_sample(terms, cu_seqlens, norms=norms, sample_grads=sample_grads)
        else:
            found += [x.new_zeros(0) for _ in range(3)]
    return tuple(found)
