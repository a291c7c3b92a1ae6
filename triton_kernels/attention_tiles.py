"""What the kernels of attention share: where samples, heads and tiles lie, who sees whom, and logits.

q is [B, T, H, D] or packed [N, H, D], k and v likewise. Packed samples are cut into tiles of a BLOCK of tokens so that
the grid is known without reading their borders back: those of sample s begin at tile borders[s] // BLOCK + s of
N // BLOCK + S, which leaves each at least as many as it needs; the others find nothing to do.

Logits are u f in units of log 2, where f is a number and u is what the product gave, or the softcap's tanh of it: so an
exponential costs one fused multiply-add and one exp2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import describable, sent_to, tanh_and_slope

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
NEVER = tl.constexpr(float("-inf"))
# No sample has more tokens, and positions beside it still fit 32 bits.
WIDEST_WINDOW = 1 << 30


@triton.jit
def find_tile(i, p_cu_seqlens, S, steps, tiles, T, H, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """Batch element, head and sample of tile i, of `tiles` for each head; the sample's first token and its length; the
    tile's first token within it, which may lie past its end."""
    i_tile = i % tiles
    i_h = i // tiles
    i_b = 0
    start = tl.full([], 0, tl.int64)
    length = tl.full([], T, tl.int32)
    i_s = 0
    if PACKED:
        last = S - 1
        for _ in range(steps):
            middle = (i_s + last + 1) // 2
            before = tl.load(p_cu_seqlens + middle).to(tl.int32) // BLOCK + middle <= i_tile
            i_s = tl.where(before, middle, i_s)
            last = tl.where(before, last, middle - 1)
        start = tl.load(p_cu_seqlens + i_s).to(tl.int64)
        length = (tl.load(p_cu_seqlens + i_s + 1).to(tl.int64) - start).to(tl.int32)
        first = (i_tile - (start.to(tl.int32) // BLOCK + i_s)) * BLOCK
    else:
        i_b = i_h // H
        i_h = i_h % H
        first = i_tile * BLOCK
    return i_b, i_h, i_s, start, length, first


@triton.jit
def sample_of(i_s, p_cu_seqlens, T, PACKED: tl.constexpr):
    """First token and number of tokens of sample i_s."""
    start = tl.full([], 0, tl.int64)
    length = tl.full([], T, tl.int32)
    if PACKED:
        start = tl.load(p_cu_seqlens + i_s).to(tl.int64)
        length = (tl.load(p_cu_seqlens + i_s + 1).to(tl.int64) - start).to(tl.int32)
    return start, length


@triton.jit
def keys_of(
    first,
    length_q,
    length_k,
    window,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Where the walk over keys begins, where its plain part does, where that ends, and the end; multiples of BN but for
    the last. The tile's queries are first .. first + BM - 1, and all of them see the keys of the plain part."""
    position = first + length_k - length_q
    last_position = tl.minimum(first + BM, length_q) - 1 + length_k - length_q
    begin = 0
    plain = 0
    end = length_k
    plain_end = length_k
    if HAS_WINDOW:
        begin = tl.maximum(0, position - window + 1) // BN * BN
        plain = tl.cdiv(tl.maximum(0, last_position - window + 1), BN) * BN
        end = tl.minimum(end, last_position + window)
        plain_end = tl.minimum(plain_end, position + window)
    if CAUSAL:
        end = tl.minimum(end, last_position + 1)
        plain_end = tl.minimum(plain_end, position + 1)
    # A tile past the end of its sample has nothing to walk.
    end = tl.where(first < length_q, tl.maximum(end, 0), 0)
    begin = tl.minimum(begin, end)
    plain = tl.minimum(plain, tl.cdiv(end, BN) * BN)
    plain_end = tl.maximum(plain, tl.maximum(plain_end, 0) // BN * BN)
    return begin, plain, tl.minimum(plain_end, tl.cdiv(end, BN) * BN), end


@triton.jit
def queries_of(
    first,
    length_q,
    length_k,
    window,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EDGE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Where the walk over queries begins, a multiple of EDGE, where its plain part does and ends, multiples of BM, and
    the end. The tile's keys are first .. first + BN - 1, and the queries of the plain part see all of them."""
    offset = length_k - length_q
    last = tl.minimum(first + BN, length_k) - 1
    begin = 0
    plain = 0
    end = length_q
    plain_end = length_q
    if HAS_WINDOW:
        begin = first - offset - window + 1
        plain = last - offset - window + 1
        end = tl.minimum(end, last - offset + window)
        plain_end = tl.minimum(plain_end, first - offset + window)
    if CAUSAL:
        begin = first - offset
        plain = last - offset
    # A tile past the end of its sample has nothing to walk, and one across it needs a mask throughout.
    end = tl.where(first < length_k, tl.maximum(end, 0), 0)
    plain_end = tl.where(first + BN <= length_k, tl.maximum(plain_end, 0), 0)
    begin = tl.minimum(tl.maximum(begin, 0), end) // EDGE * EDGE
    plain = tl.minimum(tl.cdiv(tl.maximum(plain, 0), BM) * BM, tl.cdiv(end, EDGE) * EDGE)
    return begin, plain, tl.maximum(plain, plain_end // BM * BM), end


@triton.jit
def sees(o_position, o_key, length_k, window, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Whether the queries at these positions see these keys; the shapes broadcast."""
    m = o_key < length_k
    if CAUSAL:
        m = m & (o_key <= o_position)
    if HAS_WINDOW:
        m = m & (o_key > o_position - window)
        if not CAUSAL:
            m = m & (o_key < o_position + window)
    return m


@triton.jit
def token_at(p, strides, i_b, token, i_h):
    """Where a token of a batch element and head lies, in 64 bits."""
    return p + tl.full([], i_b, tl.int64) * strides[0] + token * strides[1] + tl.full([], i_h, tl.int64) * strides[2]


@triton.jit
def load_rows(p, o, r_row, rows, r_d, D, MASKED: tl.constexpr, EVEN_D: tl.constexpr):
    """A tile of rows at p + o; 0 beyond `rows` (if MASKED) and beyond D."""
    if MASKED:
        if EVEN_D:
            b = tl.load(p + o, mask=(r_row < rows)[:, None], other=0.0)
        else:
            b = tl.load(p + o, mask=(r_row < rows)[:, None] & (r_d < D)[None, :], other=0.0)
    else:
        if EVEN_D:
            b = tl.load(p + o)
        else:
            b = tl.load(p + o, mask=(r_d < D)[None, :], other=0.0)
    return b


@triton.jit
def capped(b_dot, scale, HAS_SOFTCAP: tl.constexpr):
    """u, and the slope of tanh or 1."""
    if HAS_SOFTCAP:
        b_u, b_slope = tanh_and_slope(b_dot * scale)
    else:
        b_u = b_dot
        b_slope = 1.0
    return b_u, b_slope


@triton.jit
def probabilities(b_dot, b_lse, scale, factor, HAS_SOFTCAP: tl.constexpr):
    """P from lse in units of log 2, and the slope of the softcap or 1."""
    b_u, b_slope = capped(b_dot, scale, HAS_SOFTCAP)
    return tl.exp2(tl.fma(b_u, factor, -b_lse)), b_slope


@triton.jit
def padded_start(start, i_s, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """Where a sample begins in rows in which every sample begins at a tile."""
    row = tl.full([], 0, tl.int64)
    if PACKED:
        row = (start // BLOCK + i_s) * BLOCK
    return row


def padded_head_size(head_size: int) -> int:
    """The columns of a tile: a power of two, as Triton wants."""
    return max(16, triton.next_power_of_2(head_size))


def dense(t: torch.Tensor) -> torch.Tensor:
    """The kernels read a head's numbers one after the other."""
    return t if t.stride(-1) == 1 else t.contiguous()


def borders(
    device: torch.device, cu_seqlens: torch.Tensor | None, cu_seqlens_k: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The samples' borders on the device, of queries and of keys; None for padded samples."""
    if cu_seqlens is None:
        return None, None
    of_queries = sent_to(device, cu_seqlens)
    return of_queries, of_queries if cu_seqlens_k is None else sent_to(device, cu_seqlens_k)


def tiles_of(t: torch.Tensor, cu_seqlens: torch.Tensor | None, block: int) -> tuple[int, int]:
    """Tiles of `block` tokens for each head, and the steps of a search among samples."""
    if cu_seqlens is None:
        return triton.cdiv(t.shape[1], block), 0
    samples = cu_seqlens.numel() - 1
    return t.shape[0] // block + samples, max(0, samples - 1).bit_length()


def scales(scale: float, softcap: float | None) -> tuple[float, float]:
    """What `capped` multiplies by, and f."""
    return (1.0, scale * LOG2_E.value) if softcap is None else (scale / softcap, softcap * LOG2_E.value)


def strides(t: torch.Tensor, cu_seqlens: torch.Tensor | None) -> tuple[int, int, int]:
    """From one batch element, token and head to the next."""
    return (0 if cu_seqlens is not None else t.stride(0), t.stride(-3), t.stride(-2))


def descriptor(t: torch.Tensor, rows: int, capability: tuple[int, int]) -> TensorDescriptor | None:
    """Of [batch, heads, tokens, D], for tiles of so many tokens of one head; None where none can stand for it, and
    before sm_90, where no unit reads by descriptor."""
    by_head = (t if t.ndim == 4 else t.unsqueeze(0)).transpose(1, 2)
    if capability < (9, 0) or not describable(by_head):
        return None
    block = [1, 1, rows, padded_head_size(t.shape[-1])]
    return TensorDescriptor(by_head, list(by_head.shape), list(by_head.stride()), block)


def extent(t: torch.Tensor, rows: int) -> tuple[torch.Tensor, tuple[int, ...]]:
    """A tile of so many tokens of one head, for `offset_type`."""
    return t, (*(0,) * (t.ndim - 3), rows, 0, t.shape[-1])


def common_flags(
    head_size: int, *, causal: bool, window: int | None, softcap: float | None, packed: bool
) -> dict[str, Any]:
    """Constants that every kernel of attention takes."""
    return {
        "BD": padded_head_size(head_size),
        "PACKED": packed,
        "CAUSAL": causal,
        "HAS_WINDOW": window is not None,
        "HAS_SOFTCAP": softcap is not None,
        "EVEN_D": head_size == padded_head_size(head_size),
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
    }
