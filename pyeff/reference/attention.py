"""Attention with its log-sum-exp, and its gradient from the two: the definition.

For one head and one sample, queries Q [T, D] and keys and values K, V [U, D]. Query i stands at position
p_i = i + U - T, so the last query meets the last key, and sees key j if

    j <= p_i                   where causal,
    | p_i - j | < window       where there is a window.

    S = scale Q K^T,   or c tanh(scale Q K^T / c) with a softcap c
    lse_i = log sum_j e^(S_ij)      over the keys i sees,      P_ij = e^(S_ij - lse_i),      out = P V

and, for gradients dO of out and dl of lse, with delta_i = dO_i . out_i - dl_i,

    dV = P^T dO,   dS = P * (dO V^T - delta) [* (1 - (S / c)^2)],   dQ = scale dS K,   dK = scale dS^T Q.

A query that sees no key has out 0, lse -inf and gradient 0. Head h of H uses key head h // (H / G) of G.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """out like q, and lse [B, H, T] or [H, N] (natural log); q [B, T, H, D] or packed [N, H, D], k and v likewise.

    Computes in float64 if `q` is, else in float32; `lse` stays in it. Differentiable.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if cu_seqlens is not None:
        parts = []
        for queries, keys in samples(cu_seqlens, cu_seqlens_k):
            sample = (q[None, queries], k[None, keys], v[None, keys])
            parts.append(attention(*sample, causal=causal, scale=scale, window=window, softcap=softcap))
        if not parts:
            return q.new_zeros(q.shape), q.new_zeros(q.shape[1], 0, dtype=_wide(q))
        return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], dim=1)
    s = _logits(q, k, scale, softcap)  # [B, H, T, U]
    s = s.masked_fill(~visible(q.shape[1], k.shape[1], causal, window, q.device), float("-inf"))
    sees = s.isneginf().all(-1).logical_not()
    lse = torch.where(sees, s.masked_fill(~sees[..., None], 0.0).logsumexp(-1) if k.shape[1] else 0.0, float("-inf"))
    p = torch.exp(s - lse.masked_fill(~sees, 0.0)[..., None])
    out = torch.einsum("bhij,bjhd->bihd", p, _every_head(v, q))
    return out.to(q.dtype).contiguous(), lse


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    grad_lse: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv in the dtypes of q, k and v, from what `attention` returned and the gradients of it."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if cu_seqlens is not None:
        grads = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
        for queries, keys in samples(cu_seqlens, cu_seqlens_k):
            sample = (grad_out[None, queries], q[None, queries], k[None, keys], v[None, keys], out[None, queries])
            parts = attention_backward(
                *sample,
                lse[None, :, queries],
                grad_lse=None if grad_lse is None else grad_lse[None, :, queries],
                causal=causal,
                scale=scale,
                window=window,
                softcap=softcap,
            )
            for grad, part, tokens in zip(grads, parts, (queries, keys, keys), strict=True):
                grad[tokens] = part[0]
        return grads
    s = _logits(q, k, scale, softcap)
    p = torch.exp(s - lse.masked_fill(lse.isneginf(), 0.0)[..., None].to(s.dtype))
    p = p.masked_fill(~visible(q.shape[1], k.shape[1], causal, window, q.device), 0.0)
    grad_out = grad_out.to(s.dtype)
    delta = torch.einsum("bihd,bihd->bhi", grad_out, out.to(s.dtype))
    if grad_lse is not None:
        delta = delta - grad_lse
    ds = p * (torch.einsum("bihd,bjhd->bhij", grad_out, _every_head(v, q)) - delta[..., None])
    if softcap is not None:
        ds = ds * (1 - (s / softcap).square())
    dq = scale * torch.einsum("bhij,bjhd->bihd", ds, _every_head(k, q))
    dk = scale * torch.einsum("bhij,bihd->bjhd", ds, q.to(s.dtype))
    dv = torch.einsum("bhij,bihd->bjhd", p, grad_out)
    heads = (k.shape[2], -1)
    dk, dv = dk.unflatten(2, heads).sum(3), dv.unflatten(2, heads).sum(3)
    return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()


def samples(cu_seqlens: Tensor, cu_seqlens_k: Tensor | None) -> list[tuple[slice, slice]]:
    """The tokens of every sample, among the queries and among the keys."""
    queries, keys = cu_seqlens.tolist(), (cu_seqlens if cu_seqlens_k is None else cu_seqlens_k).tolist()
    return [(slice(*q), slice(*k)) for q, k in zip(pairwise(queries), pairwise(keys), strict=True)]


def visible(queries: int, keys: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """Whether query i sees key j: [queries, keys]."""
    position = torch.arange(queries, device=device)[:, None] + (keys - queries)
    key = torch.arange(keys, device=device)[None, :]
    seen = key <= position if causal else torch.ones(queries, keys, dtype=torch.bool, device=device)
    return seen if window is None else seen & ((position - key).abs() < window)


def _logits(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """S [B, H, T, U]."""
    s = scale * torch.einsum("bihd,bjhd->bhij", q.to(_wide(q)), _every_head(k, q))
    return s if softcap is None else softcap * torch.tanh(s / softcap)


def _every_head(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values [B, U, G, D], wide, repeated for every head of the queries: [B, U, H, D]."""
    return x.to(_wide(q)).repeat_interleave(q.shape[2] // x.shape[2], dim=2)


def _wide(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
