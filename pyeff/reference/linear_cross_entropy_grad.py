"""The gradient of a language-model head's loss, and what each sample contributes to it: the definition.

For tokens with hidden states h_t, targets y_t and logits x = W h + b, let z = x, or z = c tanh(x / c) under a softcap
c, p = softmax(z) and nll_t = -log p_y. Of a loss L whose gradient by nll_t is w_t, the gradient by the logits is

    g_t = w_t (p - onehot(y_t)) dz/dx          [V]

with dz/dx = 1 - (z / c)^2, or 1 without a softcap; an ignored token has g_t = 0. Then

    hidden_grad     g_t W                          [N, D]
    weight_grad     sum_s D_s,  D_s = sum over the tokens t of sample s of g_t h_t^T      [V, D]
    bias_grad       sum_t g_t                      [V]
    norms_sq        || D_s ||_F^2                  [S]
    bias_norms_sq   || sum over the tokens of s of g_t ||^2      [S]

p_y - 1 is formed as minus the sum of the other probabilities, which keeps its digits where p_y is near 1.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def linear_cross_entropy_grad(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    *,
    grad_losses: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    hidden_grad: bool = True,
    weight_grad: bool = True,
    norms: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden_grad, weight_grad, bias_grad, norms_sq and bias_norms_sq; empty [0] where not asked for.

    Computes in float64 if `hidden` is, else in float32; gradients have the dtypes of what they are gradients of. The
    logits and the weight gradient of one sample are in memory at a time. Tokens whose logits have no softmax, or whose
    target is no class, have NaN gradients.
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    samples = cu_seqlens.numel() - 1
    has_bias = bias is not None
    wide_weight, wide_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    grad_hidden = hidden.new_zeros(hidden.shape if hidden_grad else 0)
    grad_weight = hidden.new_zeros(weight.shape if weight_grad else 0, dtype=dtype)
    grad_bias = hidden.new_zeros(weight.shape[0] if weight_grad and has_bias else 0, dtype=dtype)
    norms_sq = hidden.new_zeros(samples if norms else 0, dtype=dtype)
    bias_norms_sq = hidden.new_zeros(samples if norms and has_bias else 0, dtype=dtype)
    for s, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        kept = start + (targets[start:end] != ignore_index).nonzero()[:, 0]
        h = hidden[kept].to(dtype)
        g = logit_grads(h, wide_weight, targets[kept], grad_losses[kept].to(dtype), wide_bias, softcap)
        if hidden_grad:
            grad_hidden[kept] = (g @ wide_weight).to(hidden.dtype)
        if weight_grad or norms:
            grad = g.T @ h  # [V, D]
            if weight_grad:
                grad_weight += grad
            if norms:
                norms_sq[s] = grad.square().sum()
        if has_bias:
            sums = g.sum(0)
            if weight_grad:
                grad_bias += sums
            if norms:
                bias_norms_sq[s] = sums.square().sum()
    return (
        grad_hidden,
        grad_weight.to(weight.dtype),
        grad_bias if bias is None else grad_bias.to(bias.dtype),
        norms_sq,
        bias_norms_sq,
    )


def logit_grads(
    h: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, bias: Tensor | None, softcap: float | None
) -> Tensor:
    """g [N, V] of tokens that all count."""
    vocabulary = weight.shape[0]
    x = h @ weight.T
    if bias is not None:
        x = x + bias
    z, slope = x, torch.ones_like(x)
    if softcap is not None:
        u = x / softcap
        z = softcap * torch.tanh(u)
        slope = 4 * torch.sigmoid(2 * u) * torch.sigmoid(-2 * u)  # 1 - tanh^2, exact where tanh rounds to 1
    is_class = (targets >= 0) & (targets < vocabulary)
    y = torch.where(is_class, targets, 0).to(torch.int64)[:, None]
    top = z.amax(1, keepdim=True)
    e = torch.exp(z - top)
    others = e.scatter(1, y, 0.0)
    total = e.sum(1, keepdim=True)
    error = (others / total).scatter(1, y, -others.sum(1, keepdim=True) / total)  # p - onehot(y)
    undefined = ~is_class[:, None] | ~top.isfinite() | z.isnan().any(1, True)
    return torch.where(undefined, torch.nan, scale[:, None] * error * slope)
