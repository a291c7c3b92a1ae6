"""Softmax attention over padded or packed samples: out and log-sum-exp in one pass, a tile of logits at a time.

For query head h and the key head h // (H / G) it uses, with queries at positions i + U - T among U keys:

    S = scale Q K^T  or  c tanh(scale Q K^T / c),   lse_i = log sum_j e^(S_ij),   out_i = sum_j e^(S_ij - lse_i) v_j

over the keys that query i sees. q [B, T, H, D] and k, v [B, U, G, D], or packed [N, H, D] and [M, G, D] with borders of
S samples; out like q, lse [B, H, T] or [H, N] float32. A query that sees nothing has out 0 and lse -inf.

A program holds BM queries of one head and walks the keys that any of them sees, with an online softmax (Milakov and
Gimelshein 2018, arXiv:1805.02867; Dao 2023, arXiv:2307.08691) in powers of two. Keys that all of them see need no mask,
so the walk is up to three loops: a masked one where the window begins, a plain one, a masked one at the diagonal or the
end. Programs of a head run side by side, those with most keys first, and heads that share keys follow one another.

Cost: 4 D FLOPs and one exponential for each query, head and key it sees. Traffic from memory: q and out once, k and v
once a head while they stay in the L2 cache. No atomics: the same bits in every run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .attention_tiles import (
    LN_2,
    NEVER,
    WIDEST_WINDOW,
    borders,
    capped,
    common_flags,
    dense,
    descriptor,
    extent,
    find_tile,
    keys_of,
    load_rows,
    padded_head_size,
    sample_of,
    scales,
    sees,
    strides,
    tiles_of,
    token_at,
)
from .common import capability_of, offset_type, on_device_of


@dataclass(frozen=True)
class Config:
    """Launch choices of `attend`: queries and keys of a tile; `described`: keys and values come by tensor
    descriptors where these can stand for them."""

    bm: int
    bn: int
    num_warps: int
    num_stages: int
    described: bool = False


# What `benchmarks/tune_attention.py` printed, for 16-bit inputs without window or softcap: the fastest choice by
# compute capability and padded head size. Empty: nothing has been timed on a GPU yet.
MEASURED: dict[tuple[tuple[int, int], int], Config] = {}


def pick_config(head_size: int, dtype: torch.dtype, narrow: bool, capability: tuple[int, int]) -> Config:
    """Tiles as measured, else by what registers and shared memory hold, as compiled. `narrow`: a window or a softcap,
    whose arithmetic takes registers of its own."""
    wide = padded_head_size(head_size)
    if dtype == torch.float32:
        # Exact float32 products run on the plain cores and keep both operands in registers.
        return Config(64, 32, 8, 3) if wide <= 64 else Config(32, 16, 8, 3)
    if not narrow and (capability, wide) in MEASURED:
        return MEASURED[capability, wide]
    if capability[0] in (9, 10):
        if wide <= 128:
            # D = 128: 218 registers and 224 of 227 KB for 128 keys; a window would spill 16 bytes, sm_100 376.
            return Config(128, 64 if narrow or capability[0] == 10 else 128, 8, 3)
        return Config(128, 32, 8, 3)
    if wide <= 64:
        return Config(128, 64, 4, 3)
    if wide == 128:
        return Config(128, 64, 8, 3)
    # Three stages take 100 KB, 1 KB more than sm_86, sm_89 and sm_120 have.
    return Config(64, 32, 8, 3 if capability == (8, 0) else 2)


@triton.jit
def walk(
    b_acc,
    b_peak,
    b_sum,
    b_q,
    p_k,
    p_v,
    d_k,
    d_v,
    o_k,
    o_v,
    s_kt,
    s_vt,
    i_b,
    i_g,
    start,
    o_position,
    begin,
    end,
    length_k,
    window,
    scale,
    factor,
    D,
    BN: tl.constexpr,
    BD: tl.constexpr,
    EVEN_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The online softmax over keys begin .. end - 1, by tiles of k and v [BN, BD]; b_peak is in units of u."""
    r_n = tl.arange(0, BN)
    r_d = tl.arange(0, BD)
    for n in range(begin, end, BN):
        if DESCRIBED:
            b_k = d_k.load([i_b, i_g, start + n, 0]).reshape(BN, BD)
        else:
            p = p_k + tl.full([], n, tl.int64) * s_kt
            b_k = load_rows(p, o_k, r_n, length_k - n, r_d, D, MASKED, EVEN_D)
        b_u, _ = capped(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION), scale, HAS_SOFTCAP)  # [BM, BN]
        if MASKED:
            m_s = sees(o_position[:, None], (n + r_n)[None, :], length_k, window, CAUSAL, HAS_WINDOW)
            b_u = tl.where(m_s, b_u, NEVER)
            b_new = tl.maximum(b_peak, tl.max(b_u, 1))
            # A row that has met no key has no peak to subtract.
            b_base = tl.where(b_new == NEVER, 0.0, b_new) * factor
        else:
            b_new = tl.maximum(b_peak, tl.max(b_u, 1))
            b_base = b_new * factor
        b_p = tl.exp2(tl.fma(b_u, factor, -b_base[:, None]))
        b_shrink = tl.exp2(tl.fma(b_peak, factor, -b_base))
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        if DESCRIBED:
            b_v = d_v.load([i_b, i_g, start + n, 0]).reshape(BN, BD)
        else:
            p = p_v + tl.full([], n, tl.int64) * s_vt
            b_v = load_rows(p, o_v, r_n, length_k - n, r_d, D, MASKED, EVEN_D)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_shrink[:, None], input_precision=PRECISION)
        b_peak = b_new
    return b_acc, b_peak, b_sum


@triton.jit
def attend(
    p_q,
    p_k,
    p_v,
    d_k,
    d_v,
    p_out,
    p_lse,
    p_cu_q,
    p_cu_k,
    scale,
    factor,
    window,
    S,
    steps,
    tiles,
    T,
    U,
    H,
    D,
    HEADS_PER_KEY,
    s_q,
    s_k,
    s_v,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    OFFSET: tl.constexpr,
    PACKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EVEN_D: tl.constexpr,
    DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The last queries of a causal sample see most.
    i = tl.num_programs(0) - 1 - tl.program_id(0)
    i_b, i_h, i_s, start_q, length_q, first = find_tile(i, p_cu_q, S, steps, tiles, T, H, BM, PACKED)
    start_k, length_k = sample_of(i_s, p_cu_k, U, PACKED)
    i_g = i_h // HEADS_PER_KEY

    # A tile is addressed by a 64-bit base and offsets within it, which OFFSET makes as wide as the strides need.
    r_m = tl.arange(0, BM)
    r_n = tl.arange(0, BN)
    r_d = tl.arange(0, BD)
    o_q = r_m.to(OFFSET)[:, None] * s_q[1] + r_d[None, :]  # [BM, BD]
    o_k = r_n.to(OFFSET)[:, None] * s_k[1] + r_d[None, :]  # [BN, BD]
    o_v = r_n.to(OFFSET)[:, None] * s_v[1] + r_d[None, :]  # [BN, BD]
    p_q = token_at(p_q, s_q, i_b, start_q + first, i_h)
    p_k = token_at(p_k, s_k, i_b, start_k, i_g)
    p_v = token_at(p_v, s_v, i_b, start_k, i_g)

    b_q = load_rows(p_q, o_q, r_m, length_q - first, r_d, D, True, EVEN_D)  # [BM, BD]
    b_acc = tl.zeros([BM, BD], tl.float32)
    b_peak = tl.full([BM], NEVER, tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    begin, plain, plain_end, end = keys_of(first, length_q, length_k, window, BM, BN, CAUSAL, HAS_WINDOW)
    for PART in tl.static_range(0 if HAS_WINDOW else 1, 3):
        b_acc, b_peak, b_sum = walk(
            b_acc,
            b_peak,
            b_sum,
            b_q,
            p_k,
            p_v,
            d_k,
            d_v,
            o_k,
            o_v,
            s_k[1],
            s_v[1],
            i_b,
            i_g,
            start_k.to(tl.int32),
            first + r_m + length_k - length_q,
            begin if PART == 0 else plain if PART == 1 else plain_end,
            tl.minimum(plain, end) if PART == 0 else plain_end if PART == 1 else end,
            length_k,
            window,
            scale,
            factor,
            D,
            BN,
            BD,
            EVEN_D,
            CAUSAL,
            HAS_WINDOW,
            HAS_SOFTCAP,
            PART != 1,
            # A descriptor would read on into the next sample, whose NaN no mask stops.
            DESCRIBED and (PART == 1 or not PACKED),
            PRECISION,
        )

    # out: [B, T, H, D] or [N, H, D]; lse: [B, H, T] or [H, N]
    m_m = first + r_m < length_q
    met = b_sum != 0.0
    b_out = b_acc / tl.where(met, b_sum, 1.0)[:, None]
    b_64, h_64 = tl.full([], i_b, tl.int64), tl.full([], i_h, tl.int64)
    token = start_q + first
    o_out = ((b_64 * T + token) * H + h_64) * D + (r_m.to(tl.int64) * H * D)[:, None] + r_d[None, :]
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_m[:, None] & (r_d < D)[None, :])
    b_lse = tl.where(met, b_peak * factor * LN_2 + tl.log(tl.where(met, b_sum, 1.0)), NEVER)
    tl.store(p_lse + (b_64 * H + h_64) * T + token + r_m, b_lse, mask=m_m)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out like `q`, contiguous, and lse, the natural logarithm, in float32; shapes as above, D up to 256.

    float32 products are exact unless torch.backends.cuda.matmul.allow_tf32.
    """
    q, k, v = (dense(t) for t in (q, k, v))
    heads, head_size = q.shape[-2:]
    capability = capability_of(q)
    config = config or pick_config(head_size, q.dtype, window is not None or softcap is not None, capability)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((*q.shape[:-3], heads, q.shape[-3]), dtype=torch.float32, device=q.device)
    cu_q, cu_k = borders(q.device, cu_seqlens, cu_seqlens_k)
    tiles, steps = tiles_of(q, cu_seqlens, config.bm)
    d_k, d_v = (descriptor(t, config.bn, capability) if config.described else None for t in (k, v))
    with on_device_of(q):
        attend[(tiles * heads * (1 if cu_seqlens is not None else q.shape[0]),)](
            q,
            k,
            v,
            d_k,
            d_v,
            out,
            lse,
            cu_q,
            cu_k,
            *scales(scale, softcap),
            0 if window is None else min(window, WIDEST_WINDOW),
            0 if cu_seqlens is None else cu_seqlens.numel() - 1,
            steps,
            tiles,
            q.shape[-3],
            k.shape[-3],
            heads,
            head_size,
            heads // k.shape[-2],
            *(strides(t, cu_seqlens) for t in (q, k, v)),
            BM=config.bm,
            BN=config.bn,
            OFFSET=offset_type(*(extent(t, max(config.bm, config.bn)) for t in (q, k, v))),
            DESCRIBED=d_k is not None and d_v is not None,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **common_flags(head_size, causal=causal, window=window, softcap=softcap, packed=cu_seqlens is not None),
        )
    return out, lse
