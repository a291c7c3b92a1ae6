"""What each token is worth to a language-model head: the definition.

For a token with hidden state h, target y and logits x = W h + b, let z = x, or z = c tanh(x / c) under a softcap c,
and p = softmax(z). The seven scores, in the order of `FIELDS`:

    nll             -log p_y
    lse             log sum_v exp z_v
    entropy         -sum_v p_v log p_v
    el2n            || p - onehot(y) ||_2                                (Paul et al. 2021, arXiv:2107.07075)
    margin          z_y - max_{v != y} z_v
    p_target        p_y
    head_grad_norm  || h ||_2 || (p - onehot(y)) * dz/dx ||_2            = || d nll / d W ||_F

dz/dx is 1 without a softcap and 1 - (z / c)^2 with one. Nothing is computed as a difference of nearly equal numbers:
1 - p_y is the sum of the other probabilities, and nll = log1p((1 - p_y) / p_y) where y is the largest logit.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIELDS = ("nll", "lse", "entropy", "el2n", "margin", "p_target", "head_grad_norm")
# Logits held at a time, so that [N, V] never exists here either.
_BLOCK_ELEMENTS = 1 << 22


def linear_cross_entropy_scores(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The scores of `hidden` [N, D] against `weight` [V, D] and `targets` [N]: [7, N] in the order of `FIELDS`.

    Computes in float64 if `hidden` is, else in float32. Rows that have no score are NaN: the target is `ignore_index`
    or no class, or the logits hold NaN or +inf or nothing but -inf.
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    scores = hidden.new_empty((len(FIELDS), hidden.shape[0]), dtype=dtype)
    block = max(1, _BLOCK_ELEMENTS // max(1, weight.shape[0]))
    for start in range(0, hidden.shape[0], block):
        rows = slice(start, start + block)
        scores[:, rows] = _scores_of_block(hidden[rows].to(dtype), weight, targets[rows], bias, softcap, ignore_index)
    return scores


def _scores_of_block(
    h: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, ignore_index: int
) -> Tensor:
    vocabulary = weight.shape[0]
    x = h @ weight.T  # [N, V]
    if bias is not None:
        x = x + bias
    z, slope = x, torch.ones_like(x)
    if softcap is not None:
        u = x / softcap
        z = softcap * torch.tanh(u)
        slope = 4 * torch.sigmoid(2 * u) * torch.sigmoid(-2 * u)  # 1 - tanh^2, exact where tanh rounds to 1

    is_class = (targets >= 0) & (targets < vocabulary)
    y = torch.where(is_class, targets, 0)[:, None]
    z_y = z.gather(1, y)
    others = z.scatter(1, y, -torch.inf)
    best_other = others.amax(1, keepdim=True)
    top = torch.maximum(z_y, best_other)

    e_y = torch.exp(z_y - top)
    e = torch.exp(others - top)  # [N, V], 0 at y
    rest = e.sum(1, keepdim=True)
    total = e_y + rest
    log_total = torch.where(z_y >= best_other, torch.log1p(rest), torch.log(total))
    p_y, p_rest, p = e_y / total, rest / total, e / total
    q = torch.where(rest > 0, e / rest, 0.0)  # the distribution over the others: p = p_rest q, whose squares underflow

    nll = log_total + (top - z_y)
    # Both terms are sums of non-negative numbers, so an entropy near zero keeps its digits.
    surprise = _times_where_positive(p, top - others).sum(1, keepdim=True) + _times_where_positive(p_y, top - z_y)
    entropy = log_total + surprise
    el2n = p_rest * torch.sqrt(1 + (q**2).sum(1, keepdim=True))
    margin = z_y - best_other if vocabulary > 1 else torch.full_like(z_y, torch.nan)
    pulled = p_rest * torch.sqrt(slope.gather(1, y) ** 2 + ((q * slope) ** 2).sum(1, keepdim=True))
    head_grad_norm = torch.linalg.vector_norm(h, dim=1, keepdim=True) * pulled

    scores = torch.cat([nll, top + log_total, entropy, el2n, margin, p_y, head_grad_norm], dim=1)
    undefined = ~is_class[:, None] | (targets == ignore_index)[:, None] | ~top.isfinite() | z.isnan().any(1, True)
    return scores.masked_fill(undefined, torch.nan).T


def _times_where_positive(p: Tensor, x: Tensor) -> Tensor:
    """p x, and 0 where p is 0 even if x is infinite."""
    return torch.where(p > 0, p * x, 0.0)
