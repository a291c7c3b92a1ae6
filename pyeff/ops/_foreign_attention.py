"""Attention by the kernels of torch and of flash-attn, brought to one meaning.

They differ in layout, in what a causal mask means where queries and keys differ in number, in what lse is for a query
that sees nothing, and in what zero tokens do to them. Here each is asked only what it answers rightly.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyeff.ops._packed import samples_of

_ATEN = torch.ops.aten
# Queries that share one mask on the CPU: its row of keys is at most this much longer than what a query needs.
_MASKED_QUERIES = 256
# Columns that carry the gradient of lse through a kernel that knows none; GPU kernels want head sizes in eights.
_EXTRA = 8

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
    grad_out, q, k, v, out = (pad(t, (0, _EXTRA)) for t in (grad_out, q, k, v, out))
    out[..., head_size] = 1
    grad_out[..., head_size] = -grad_lse.transpose(-1, -2)
    dq, dk, dv = backward(grad_out, q, k, v, out, lse)
    return dq[..., :head_size], dk[..., :head_size], dv[..., :head_size]


# ------------------------------------------------------------------------------------------------- torch's CPU kernel


def cpu_forward(
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
    q, k, v = _dense(q, k, v)
    if cu_seqlens is None:
        out, lse = _cpu_forward(q, k, v, causal=causal, scale=scale, window=window)
        return out.contiguous(), lse.contiguous()
    out, lse = torch.zeros(q.shape, dtype=q.dtype), torch.full((q.shape[1], q.shape[0]), float("-inf"))
    for queries, keys, count in _runs(cu_seqlens, cu_seqlens_k):
        parts = (t[tokens].unflatten(0, (count, -1)) for t, tokens in ((q, queries), (k, keys), (v, keys)))
        part, part_lse = _cpu_forward(*parts, causal=causal, scale=scale, window=window)
        out[queries] = part.flatten(0, 1)
        lse[:, queries] = part_lse.transpose(0, 1).flatten(1)
    return out, lse


def cpu_backward(
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

    def backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Grads:
        if cu_seqlens is None:
            return _cpu_backward(grad_out, q, k, v, out, lse=lse, causal=causal, scale=scale, window=window)
        grads = (q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape))
        for queries, keys, count in _runs(cu_seqlens, cu_seqlens_k):
            tokens = (queries, queries, keys, keys, queries)
            parts = [t[own].unflatten(0, (count, -1)) for t, own in zip((grad_out, q, k, v, out), tokens, strict=True)]
            part_lse = lse[:, queries].unflatten(1, (count, -1)).transpose(0, 1)
            found = _cpu_backward(*parts, lse=part_lse, causal=causal, scale=scale, window=window)
            for grad, part, own in zip(grads, found, (queries, keys, keys), strict=True):
                grad[own] = part.flatten(0, 1)
        return grads

    grads = backward_with_lse(backward, *_dense(grad_out, q, k, v, out), lse=lse, grad_lse=grad_lse)
    dq, dk, dv = (grad.contiguous() for grad in grads)
    return dq, dk, dv


def _cpu_forward(
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


def _cpu_backward(
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


def _dense(*tensors: Tensor) -> list[Tensor]:
    """Kernels read a head's numbers one after the other."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


# ------------------------------------------------------------------------------------------------ kernels on the GPU


@dataclass(frozen=True)
class _Call:
    """What GPU kernels are told beside the tensors; a window of -1 is none."""

    causal: bool
    scale: float
    softcap: float
    left: int
    right: int
    cu_q: Tensor | None
    cu_k: Tensor | None
    longest_q: int
    longest_k: int
    deterministic: bool = False


def gpu_forward(
    impl: str,
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
    """out and lse by a kernel for GPUs."""
    q, k, v = _dense(q, k, v)
    pack = _Pack.of(q, k, cu_seqlens, cu_seqlens_k)
    call = pack.call(causal, scale, window, softcap)
    if pack.longest_q == 0:
        return q.new_zeros(q.shape), q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=torch.float32)
    out, lse = _FORWARD[impl](pack.queries(q), pack.keys(k), pack.keys(v), call)
    if pack.more_queries:
        # Kernels disagree about the sign.
        lse = lse.masked_fill(lse == float("inf"), float("-inf"))
    if pack.own_q is not None:
        whole = q.new_zeros(q.shape)
        whole_lse = lse.new_full((q.shape[1], q.shape[0]), float("-inf"))
        return whole.index_copy_(0, pack.own_q, out), whole_lse.index_copy_(1, pack.own_q, lse)
    return out.contiguous(), lse.contiguous()


def gpu_backward(
    impl: str,
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
    deterministic: bool,
) -> Grads:
    """The gradients by that kernel's own backward."""
    pack = _Pack.of(q, k, cu_seqlens, cu_seqlens_k)
    call = replace(pack.call(causal, scale, window, softcap), deterministic=deterministic)
    if pack.longest_q == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    if pack.more_queries:
        lse = lse.masked_fill(lse == float("-inf"), float("inf"))

    def backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Grads:
        return _BACKWARD[impl](grad_out, q, k, v, out, lse, call)

    grad_out, q, k, v, out = _dense(grad_out, q, k, v, out)
    shapes = (q.shape, k.shape, v.shape)
    grad_out, q, out = (pack.queries(t) for t in (grad_out, q, out))
    k, v = pack.keys(k), pack.keys(v)
    if pack.own_q is not None:
        lse = lse.index_select(1, pack.own_q)
        grad_lse = None if grad_lse is None else grad_lse.index_select(1, pack.own_q)
    found = backward_with_lse(backward, grad_out, q, k, v, out, lse=lse.contiguous(), grad_lse=grad_lse)
    if pack.own_q is None or pack.own_k is None:
        return found[0].contiguous(), found[1].contiguous(), found[2].contiguous()
    dq, dk, dv = (q.new_zeros(shape) for shape in shapes)
    return (
        dq.index_copy_(0, pack.own_q, found[0]),
        dk.index_copy_(0, pack.own_k, found[1]),
        dv.index_copy_(0, pack.own_k, found[2]),
    )


@dataclass(frozen=True)
class _Pack:
    """Samples as kernels want them: none without a query or without a key."""

    cu_q: Tensor | None
    cu_k: Tensor | None
    longest_q: int
    longest_k: int
    more_queries: bool  # some sample has more queries than keys, so some queries may see nothing
    own_q: Tensor | None = None  # tokens of the samples that are left, where some were not
    own_k: Tensor | None = None

    @staticmethod
    def of(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None) -> _Pack:
        if cu_seqlens is None:
            return _Pack(None, None, q.shape[1], k.shape[1], q.shape[1] > k.shape[1])
        cuts_q = samples_of(cu_seqlens, q.shape[0]).cuts
        cuts_k = cuts_q if cu_seqlens_k is None else samples_of(cu_seqlens_k, k.shape[0]).cuts
        cut = list(zip(pairwise(cuts_q), pairwise(cuts_k), strict=True))
        kept = [(own_q, own_k) for own_q, own_k in cut if own_q[0] < own_q[1] and own_k[0] < own_k[1]]
        lengths = [(own_q[1] - own_q[0], own_k[1] - own_k[0]) for own_q, own_k in kept]
        longest_q, longest_k = (max(of, default=0) for of in ([a for a, _ in lengths], [b for _, b in lengths]))
        more_queries = any(a > b for a, b in lengths)
        if len(kept) == len(cut):
            cu_q = cu_seqlens.to(q.device, torch.int32)
            cu_k = cu_q if cu_seqlens_k is None else cu_seqlens_k.to(q.device, torch.int32)
            return _Pack(cu_q, cu_k, longest_q, longest_k, more_queries)
        cu_q, cu_k = (
            torch.tensor([0, *(pair[i] for pair in lengths)]).cumsum(0).to(q.device, torch.int32) for i in (0, 1)
        )
        own_q, own_k = (
            torch.cat([torch.arange(0), *(torch.arange(*sample[i]) for sample in kept)]).to(q.device) for i in (0, 1)
        )
        return _Pack(cu_q, cu_k, longest_q, longest_k, more_queries, own_q, own_k)

    def call(self, causal: bool, scale: float, window: int | None, softcap: float | None) -> _Call:
        left = -1 if window is None else window - 1
        borders = (self.cu_q, self.cu_k, self.longest_q, self.longest_k)
        return _Call(causal, scale, softcap or 0.0, left, 0 if causal else left, *borders)

    def queries(self, t: Tensor) -> Tensor:
        return t if self.own_q is None else t.index_select(0, self.own_q)

    def keys(self, t: Tensor) -> Tensor:
        return t if self.own_k is None else t.index_select(0, self.own_k)


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    borders = (call.cu_q, call.cu_k, call.longest_q, call.longest_k)
    window = {"window_size_left": call.left, "window_size_right": call.right}
    out, lse, *_ = _ATEN._flash_attention_forward(
        q, k, v, *borders, 0.0, call.causal, False, scale=call.scale, **window
    )
    return out, lse


def _flash_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: _Call) -> Grads:
    borders = (call.cu_q, call.cu_k, call.longest_q, call.longest_k)
    window = {"window_size_left": call.left, "window_size_right": call.right}
    # What a dropout would have drawn from.
    state = (torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device))
    return _ATEN._flash_attention_backward(
        grad_out, q, k, v, out, lse, *borders, 0.0, call.causal, *state, scale=call.scale, **window
    )


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _ATEN._scaled_dot_product_cudnn_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), None, True, 0.0, call.causal, False, scale=call.scale
    )
    return out.transpose(1, 2), lse.view(out.shape[:3])


def _cudnn_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: _Call) -> Grads:
    tensors = (t.transpose(1, 2) for t in (grad_out, q, k, v, out))
    state = [torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2)]
    borders = (None, None, call.longest_q, call.longest_k)
    dq, dk, dv = _ATEN._scaled_dot_product_cudnn_attention_backward(
        *tensors, lse[..., None], *state, None, *borders, 0.0, call.causal, scale=call.scale
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


# Where flash-attn keeps what its public functions call; those return no lse that can be differentiated.
_MODULES = {
    "flash_attn_2": "flash_attn.flash_attn_interface",
    "flash_attn_3": "flash_attn_interface",
    "flash_attn_4": "flash_attn.cute.interface",
}


def _module(impl: str) -> Any:
    return importlib.import_module(_MODULES[impl])


def _flash_attn_2_forward(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    module, options = _module("flash_attn_2"), _flash_attn_2_options(call)
    run = module._flash_attn_forward if call.cu_q is None else module._flash_attn_varlen_forward
    out, lse, *_ = run(q, k, v, **options, return_softmax=False)
    return out, lse


def _flash_attn_2_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: _Call
) -> Grads:
    module, options = _module("flash_attn_2"), _flash_attn_2_options(call)
    run = module._flash_attn_backward if call.cu_q is None else module._flash_attn_varlen_backward
    dq, dk, dv = _empty_like(q, k, v)
    run(grad_out, q, k, v, out, lse, dq, dk, dv, **options, deterministic=call.deterministic)
    return dq, dk, dv


def _flash_attn_2_options(call: _Call) -> dict[str, Any]:
    options: dict[str, Any] = {
        "dropout_p": 0.0,
        "softmax_scale": call.scale,
        "causal": call.causal,
        "window_size_left": call.left,
        "window_size_right": call.right,
        "softcap": call.softcap,
        "alibi_slopes": None,
    }
    return options | _borders(call)


def _flash_attn_3_forward(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {"softmax_scale": call.scale, "causal": call.causal, "softcap": call.softcap}
    options |= {"window_size_left": call.left, "window_size_right": call.right}
    out, lse, *_ = _module("flash_attn_3")._flash_attn_forward(q, k, v, **options, **_borders(call))
    return out, lse


def _flash_attn_3_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: _Call
) -> Grads:
    dq, dk, dv = _empty_like(q, k, v)
    options: dict[str, Any] = {"softmax_scale": call.scale, "is_causal": call.causal, "softcap": call.softcap}
    options |= {"window_size_left": call.left, "window_size_right": call.right, "deterministic": call.deterministic}
    _module("flash_attn_3")._flash_attn_backward(
        grad_out, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, **options, **_borders(call)
    )
    return dq, dk, dv


def _flash_attn_4_forward(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    return _module("flash_attn_4")._flash_attn_fwd(q, k, v, **_flash_attn_4_options(call), return_lse=True)[:2]


def _flash_attn_4_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: _Call
) -> Grads:
    options = _flash_attn_4_options(call) | {"deterministic": call.deterministic}
    return _module("flash_attn_4")._flash_attn_bwd(q, k, v, out, grad_out, lse, **options)[:3]


def _flash_attn_4_options(call: _Call) -> dict[str, Any]:
    windowed = call.left >= 0
    return {
        "softmax_scale": call.scale,
        "causal": call.causal and not windowed,
        "softcap": call.softcap,
        "window_size_left": call.left if windowed else None,
        "window_size_right": call.right if windowed else None,
        **_borders(call),
    }


def _borders(call: _Call) -> dict[str, Any]:
    if call.cu_q is None:
        return {}
    return {
        "cu_seqlens_q": call.cu_q,
        "cu_seqlens_k": call.cu_k,
        "max_seqlen_q": call.longest_q,
        "max_seqlen_k": call.longest_k,
    }


def _empty_like(*tensors: Tensor) -> list[Tensor]:
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors]


_FORWARD: dict[str, Callable[[Tensor, Tensor, Tensor, _Call], tuple[Tensor, Tensor]]] = {
    "flash": _flash_forward,
    "cudnn": _cudnn_forward,
    "flash_attn_2": _flash_attn_2_forward,
    "flash_attn_3": _flash_attn_3_forward,
    "flash_attn_4": _flash_attn_4_forward,
}
_BACKWARD: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, _Call], Grads]] = {
    "flash": _flash_backward,
    "cudnn": _cudnn_backward,
    "flash_attn_2": _flash_attn_2_backward,
    "flash_attn_3": _flash_attn_3_backward,
    "flash_attn_4": _flash_attn_4_backward,
}


@functools.cache
def gpu_problem(impl: str) -> str | None:
    """Why this environment has no such kernel for GPUs, or None; found without importing it."""
    if impl == "flash":
        return None if torch.backends.cuda.is_flash_attention_available() else "this torch was built without it"
    if impl == "cudnn":
        return None if torch.backends.cudnn.is_available() else "this torch has no cuDNN"
    try:
        found = importlib.util.find_spec(_MODULES[impl]) is not None
    except ImportError:
        found = False
    return None if found else f"{_MODULES[impl]} is not installed"


def gpu_limits(
    impl: str,
    q: Tensor,
    k: Tensor,
    *,
    causal: bool,
    packed: bool,
    window: int | None,
    softcap: float | None,
    deterministic: bool,
) -> str | None:
    """Why the kernel `impl` for GPUs cannot take these arguments, or None."""
    head_size, capability = q.shape[-1], torch.cuda.get_device_capability(q.device)
    most = 128 if impl == "cudnn" else 256
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, and q is {q.dtype}"
    if head_size % 8 or head_size > most:
        return f"it takes head sizes up to {most} that are multiples of 8, and q has {head_size}"
    if capability < (8, 0):
        return "it needs a GPU of compute capability 8.0 or higher"
    if softcap is not None and impl in ("flash", "cudnn"):
        return "it has no softcap"
    if impl == "flash" and head_size > 192 and capability in ((8, 6), (8, 9), (12, 0)):
        return f"its backward needs an A100 or H100 for head sizes above 192, and q has {head_size}"
    if impl == "flash" and deterministic and not torch.are_deterministic_algorithms_enabled():
        return "its backward is deterministic only under torch.use_deterministic_algorithms"
    if impl == "flash_attn_3" and capability[0] != 9:
        return "it needs a Hopper GPU"
    if impl == "flash_attn_4" and capability[0] not in (9, 10):
        return "it needs a Hopper or Blackwell GPU"
    if impl == "cudnn":
        if packed:
            return "it takes no packed samples"
        if window is not None:
            return "it has no window"
        if causal and q.shape[1] != k.shape[1]:
            return "its causal mask meets the first key, not the last"
        if q.shape[1] == 1 or k.shape[1] == 1:
            return "it does not take a single token"
        if deterministic:
            return "its backward is not deterministic, which was asked for"
    return None
