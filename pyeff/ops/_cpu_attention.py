"""Attention by torch's flash kernel for CPUs.

It aligns a causal mask at the first query and key, knows no window and no packed samples, and zero tokens end the
process inside it. Here it is asked only what it answers rightly.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import groupby, pairwise

import torch
from torch import Tensor

from pyeff.ops._lse_gradient import Grads, backward_with_lse, dense

_ATEN = torch.ops.aten
# Queries that share one mask: its row of keys is at most this much longer than what a query needs.
_MASKED_QUERIES = 256


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """out and lse by `_scaled_dot_product_flash_attention_for_cpu`, one call for samples of one length in a row."""
    q, k, v = dense(q, k, v)
    if cu_seqlens is None:
        out, lse = _forward(q, k, v, causal=causal, scale=scale, window=window)
        return out.contiguous(), lse.contiguous()
    out, lse = torch.zeros(q.shape, dtype=q.dtype), torch.full((q.shape[1], q.shape[0]), float("-inf"))
    for queries, keys, count in _runs(cu_seqlens, cu_seqlens_k):
        parts = (t[tokens].unflatten(0, (count, -1)) for t, tokens in ((q, queries), (k, keys), (v, keys)))
        part, part_lse = _forward(*parts, causal=causal, scale=scale, window=window)
        out[queries] = part.flatten(0, 1)
        lse[:, queries] = part_lse.transpose(0, 1).flatten(1)
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    grad_lse: Tensor | None,
    causal: bool,
    scale: float,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    window: int | None,
    softcap: float | None,
) -> Grads:
    """The gradients by that kernel's own backward."""

    def of_out(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Grads:
        if cu_seqlens is None:
            return _backward(grad_out, q, k, v, out, lse=lse, causal=causal, scale=scale, window=window)
        grads = (q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape))
        for queries, keys, count in _runs(cu_seqlens, cu_seqlens_k):
            tokens = (queries, queries, keys, keys, queries)
            parts = [t[own].unflatten(0, (count, -1)) for t, own in zip((grad_out, q, k, v, out), tokens, strict=True)]
            part_lse = lse[:, queries].unflatten(1, (count, -1)).transpose(0, 1)
            found = _backward(*parts, lse=part_lse, causal=causal, scale=scale, window=window)
            for grad, part, own in zip(grads, found, (queries, keys, keys), strict=True):
                grad[own] = part.flatten(0, 1)
        return grads

    grads = backward_with_lse(of_out, *dense(grad_out, q, k, v, out), lse=lse, grad_lse=grad_lse)
    dq, dk, dv = (grad.contiguous() for grad in grads)
    return dq, dk, dv


def _forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """out [B, T, H, D] and lse [B, H, T] of samples of one length, of at least one query and one key."""
    query, key, value = (t.transpose(1, 2) for t in (q, k, v))
    call = functools.partial(_ATEN._scaled_dot_product_flash_attention_for_cpu, scale=scale)
    if _is_plain(q, k, causal, window):
        out, lse = call(query, key, value, is_causal=causal and q.shape[1] > 1)
        return out.transpose(1, 2), lse
    out = torch.zeros(q.shape, dtype=q.dtype)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"))
    for rows, columns, mask in _masked_blocks(q, k, causal, window):
        part, part_lse = call(query[:, :, rows], key[:, :, columns], value[:, :, columns], attn_mask=mask)
        out[:, rows] = part.transpose(1, 2)
        lse[:, :, rows] = part_lse
    return out, lse


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    *,
    lse: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
) -> Grads:
    grad_out, query, key, value, out = (t.transpose(1, 2) for t in (grad_out, q, k, v, out))
    call = functools.partial(_ATEN._scaled_dot_product_flash_attention_for_cpu_backward, dropout_p=0.0, scale=scale)
    if _is_plain(q, k, causal, window):
        dq, dk, dv = call(grad_out, query, key, value, out, lse, is_causal=causal and q.shape[1] > 1)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
    dq = torch.zeros(q.shape, dtype=q.dtype)
    # Blocks that share keys add up in float32.
    dk, dv = torch.zeros(k.shape), torch.zeros(v.shape)
    for rows, columns, mask in _masked_blocks(q, k, causal, window):
        block = (t[:, :, own] for t, own in ((grad_out, rows), (query, rows), (key, columns), (value, columns)))
        parts = call(*block, out[:, :, rows], lse[:, :, rows], is_causal=False, attn_mask=mask)
        dq[:, rows] = parts[0].transpose(1, 2)
        dk[:, columns] += parts[1].transpose(1, 2)
        dv[:, columns] += parts[2].transpose(1, 2)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _is_plain(q: Tensor, k: Tensor, causal: bool, window: int | None) -> bool:
    """Whether all queries see all keys, or a causal mask is aligned as the kernel aligns it, at the first of both."""
    queries, keys = q.shape[1], k.shape[1]
    return (window is None or window >= max(queries, keys)) and (not causal or queries in (1, keys))


def _masked_blocks(q: Tensor, k: Tensor, causal: bool, window: int | None) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of queries that see a key, the keys that any of a block sees, and the mask to add between them."""
    queries, keys = q.shape[1], k.shape[1]
    reach = max(queries, keys) if window is None else window  # keys seen on one side, the one at the position included
    ahead = 1 if causal else reach
    ahead_of_first = keys - queries + ahead  # keys that the first query sees or could
    for start in range(max(0, 1 - ahead_of_first), queries, _MASKED_QUERIES):
        end = min(queries, start + _MASKED_QUERIES)
        first = max(0, start + keys - queries - reach + 1)
        last = min(keys, end - 1 + ahead_of_first)
        position = torch.arange(start, end)[:, None] + (keys - queries)
        key = torch.arange(first, last)[None, :]
        hidden = (key >= position + ahead) | (key <= position - reach)
        mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, float("-inf"))
        yield slice(start, end), slice(first, last), mask


def _runs(cu_seqlens: Tensor, cu_seqlens_k: Tensor | None) -> Iterator[tuple[slice, slice, int]]:
    """The tokens of samples of one length in a row, among queries and keys, and how many; empty ones left out."""
    queries, keys = cu_seqlens.tolist(), (cu_seqlens if cu_seqlens_k is None else cu_seqlens_k).tolist()
    lengths = [(b - a, d - c) for (a, b), (c, d) in zip(pairwise(queries), pairwise(keys), strict=True)]
    first = 0
    for length, run in groupby(lengths):
        count = len(list(run))
        if all(length):
            last = first + count
            yield slice(queries[first], queries[last]), slice(keys[first], keys[last]), count
        first += count
