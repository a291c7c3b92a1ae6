"""What the kernels of attention share: where samples, heads and tiles lie, who sees whom, and logits.

q is [B, T, H, D] or packed [N, H, D], k and v likewise. Packed samples are cut into tiles of a BLOCK of tokens so that
the grid is known without reading their borders back: those of sample s begin at tile borders[s] // BLOCK + s of
N // BLOCK + S, which leaves each at least as many as it needs; the others find nothing to do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import sent_to, tanh_and_slope

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
    the last. The tile's queries are first .. first + BM - 1."""
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
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Where the walk over queries begins, a multiple of BM, and ends. The tile's keys are first .. first + BN - 1."""
    offset = length_k - length_q
    last = tl.minimum(first + BN, length_k) - 1
    begin = 0
    end = length_q
    if HAS_WINDOW:
        begin = first - offset - window + 1
        end = tl.minimum(end, last - offset + window)
    if CAUSAL:
        begin = first - offset
    # A tile past the end of its sample has nothing to walk.
    end = tl.where(first < length_k, tl.maximum(end, 0), 0)
    begin = tl.minimum(tl.maximum(begin, 0), end) // BM * BM
    return begin, end


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
def logits(b_dot, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Logits in units of log 2 from scale log2(e), or from scale / softcap and softcap log2(e)."""
    if HAS_SOFTCAP:
        b_tanh, _ = tanh_and_slope(b_dot * scale)
        b_s = b_tanh * softcap
    else:
        b_s = b_dot * scale
    return b_s


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
    """What `logits` multiplies by."""
    return (scale * LOG2_E.value, 0.0) if softcap is None else (scale / softcap, softcap * LOG2_E.value)


def strides(t: torch.Tensor, cu_seqlens: torch.Tensor | None) -> tuple[int, int, int]:
    """From one batch element, token and head to the next."""
    return (0 if cu_seqlens is not None else t.stride(0), t.stride(-3), t.stride(-2))


def offset_type(rows: int, *tensors: torch.Tensor) -> tl.dtype:
    """The integer that holds the offsets within a tile."""
    return tl.int32 if all(rows * t.stride(-3) + t.shape[-1] < 2**31 for t in tensors) else tl.int64


def precision() -> str:
    """How float32 is multiplied."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
