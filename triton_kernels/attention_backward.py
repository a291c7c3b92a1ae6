"""The gradient of attention from its output and log-sum-exp: logits are formed again, a tile at a time.

With P_ij = e^(S_ij - lse_i) for the keys j that query i sees, gradients dO of out and dl of lse, S and shapes as in
`attention`:

    delta_i = dO_i . out_i - dl_i,   dS = P * (dO V^T - delta) [* (1 - (S / c)^2)]
    dQ = scale dS K,   dK = scale dS^T Q,   dV = P^T dO,    the last two summed over the heads that share a key head.

Two launches. `query_gradients`: a program holds BM queries of one head and walks the keys they see, with a mask only
where not all of them see all; it forms delta first and leaves it, with lse, for the other, in rows where every sample
begins at a tile. `key_gradients`: a program holds BN keys of one key head and walks, for every query head of its group,
the queries that see them. No atomics: the same bits in every run, at the price of forming S and dO V^T twice.

Cost: 14 D FLOPs and two exponentials for each query, head and key it sees, where atomics would need 10 and one.
Traffic from memory: q, dO, k and v twice, while those of a head stay in the L2 cache; out, dQ, dK, dV once. Dao 2023,
arXiv:2307.08691, for the two walks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .attention_tiles import (
    LOG2_E,
    NEVER,
    WIDEST_WINDOW,
    borders,
    dense,
    find_tile,
    keys_of,
    load_rows,
    offset_type,
    padded_head_size,
    precision,
    queries_of,
    sample_of,
    scales,
    sees,
    strides,
    tiles_of,
)
from .common import INFINITE, capability_of, on_device_of, tanh_and_slope


@dataclass(frozen=True)
class Config:
    """Launch choices of one of the kernels: queries and keys of a tile."""

    bm: int
    bn: int
    num_warps: int
    num_stages: int


def pick_configs(
    head_size: int, dtype: torch.dtype, window: bool, softcap: bool, capability: tuple[int, int]
) -> tuple[Config, Config]:
    """Of `query_gradients` and `key_gradients`, by what registers and shared memory hold, as compiled; none of it has
    been timed on a GPU yet."""
    wide = padded_head_size(head_size)
    if dtype == torch.float32:
        # Exact float32 products run on the plain cores and keep both operands in registers.
        return (Config(32, 32, 8, 3), Config(32, 32, 8, 3)) if wide <= 64 else (Config(16, 16, 8, 3),) * 2
    if capability[0] in (9, 10):
        if wide <= 64:
            return Config(128, 64, 8, 3), Config(64, 128, 8, 3)
        if wide == 128:
            # `key_gradients` with 64 queries spills 8 bytes, `query_gradients` with a window and 64 keys 48; the
            # softcap's slope takes as many registers as the logits.
            return Config(128, 32 if window else 64, 8, 3), Config(
                32, 64 if softcap or capability[0] == 10 else 128, 8, 3
            )
        # Two accumulators of 64 keys do not fit, and 32 are too few for wgmma.
        return Config(64, 32, 8, 3), Config(32, 32, 8, 3)
    if wide <= 64:
        return Config(128, 64, 8, 3), Config(64, 128, 8, 3)
    if wide == 128:
        # The second keeps to the 100 KB of shared memory that sm_86, sm_89 and sm_120 have.
        if capability == (8, 0):
            return Config(64, 64, 8, 3), Config(64, 64, 8, 3)
        return Config(128, 32, 8, 3), Config(32, 64, 8, 3)
    return Config(32, 32, 8, 3), Config(32, 32, 8, 3)


@triton.jit
def probabilities(b_dot, b_lse, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """P from scale log2(e) (or scale / softcap and softcap log2(e)) and lse log2(e); the slope of the softcap, or 1."""
    if HAS_SOFTCAP:
        b_tanh, b_slope = tanh_and_slope(b_dot * scale)
        b_p = tl.exp2(b_tanh * softcap - b_lse)
    else:
        b_slope = 1.0
        b_p = tl.exp2(b_dot * scale - b_lse)
    return b_p, b_slope


@triton.jit
def walk_keys(
    b_dq,
    b_q,
    b_g,
    b_lse,
    b_delta,
    p_k,
    p_v,
    o_k,
    o_v,
    s_kt,
    s_vt,
    o_position,
    begin,
    end,
    length_k,
    window,
    scale,
    softcap,
    D,
    BN: tl.constexpr,
    BD: tl.constexpr,
    EVEN_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    r_n = tl.arange(0, BN)
    r_d = tl.arange(0, BD)
    for n in range(begin, end, BN):
        b_k = load_rows(p_k + tl.full([], n, tl.int64) * s_kt, o_k, r_n, length_k - n, r_d, D, MASKED, EVEN_D)
        b_v = load_rows(p_v + tl.full([], n, tl.int64) * s_vt, o_v, r_n, length_k - n, r_d, D, MASKED, EVEN_D)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        b_p, b_slope = probabilities(b_s, b_lse[:, None], scale, softcap, HAS_SOFTCAP)
        if MASKED:
            m_s = sees(o_position[:, None], (n + r_n)[None, :], length_k, window, CAUSAL, HAS_WINDOW)
            b_p = tl.where(m_s, b_p, 0.0)
        b_dp = tl.dot(b_g, tl.trans(b_v), input_precision=PRECISION)  # [BM, BN]
        b_ds = b_p * (b_dp - b_delta[:, None]) * b_slope
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)  # [BM, BD]
    return b_dq


@triton.jit
def query_gradients(
    p_q,
    p_k,
    p_v,
    p_out,
    p_grad,
    p_lse,
    p_grad_lse,
    p_rows,
    p_dq,
    p_cu_q,
    p_cu_k,
    scale,
    softcap,
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
    s_qb,
    s_qt,
    s_qh,
    s_kb,
    s_kt,
    s_kh,
    s_vb,
    s_vt,
    s_vh,
    s_gb,
    s_gt,
    s_gh,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    OFFSET: tl.constexpr,
    PACKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The last queries of a causal sample see most.
    i = tl.num_programs(0) - 1 - tl.program_id(0)
    i_b, i_h, i_s, start_q, length_q, first = find_tile(i, p_cu_q, S, steps, tiles, T, H, BM, PACKED)
    start_k, length_k = sample_of(i_s, p_cu_k, U, PACKED)
    i_g = i_h // HEADS_PER_KEY

    r_m = tl.arange(0, BM)
    r_n = tl.arange(0, BN)
    r_d = tl.arange(0, BD)
    o_q = r_m.to(OFFSET)[:, None] * s_qt + r_d[None, :]  # [BM, BD]
    o_g = r_m.to(OFFSET)[:, None] * s_gt + r_d[None, :]  # [BM, BD]
    o_k = r_n.to(OFFSET)[:, None] * s_kt + r_d[None, :]  # [BN, BD]
    o_v = r_n.to(OFFSET)[:, None] * s_vt + r_d[None, :]  # [BN, BD]
    b_64 = tl.full([], i_b, tl.int64)
    h_64 = tl.full([], i_h, tl.int64)
    g_64 = tl.full([], i_g, tl.int64)
    token = start_q + first
    p_q += b_64 * s_qb + token * s_qt + h_64 * s_qh
    p_grad += b_64 * s_gb + token * s_gt + h_64 * s_gh
    p_k += b_64 * s_kb + start_k * s_kt + g_64 * s_kh
    p_v += b_64 * s_vb + start_k * s_vt + g_64 * s_vh
    # out and dq: [B, T, H, D] or [N, H, D]; lse, its gradient and delta: [B, H, T] or [H, N]
    o_out = ((b_64 * T + token) * H + h_64) * D + (r_m.to(tl.int64) * H * D)[:, None] + r_d[None, :]
    o_lse = (b_64 * H + h_64) * T + token + r_m

    m_m = first + r_m < length_q
    m_out = m_m[:, None] & (r_d < D)[None, :]
    b_q = load_rows(p_q, o_q, r_m, length_q - first, r_d, D, True, EVEN_D)  # [BM, BD]
    b_g = load_rows(p_grad, o_g, r_m, length_q - first, r_d, D, True, EVEN_D)  # [BM, BD]
    b_out = tl.load(p_out + o_out, mask=m_out, other=0.0)
    b_delta = tl.sum(b_g.to(tl.float32) * b_out.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        b_delta -= tl.load(p_grad_lse + o_lse, mask=m_m, other=0.0)
    # Infinite where there is no query or it sees nothing, so that P is 0; in units of log 2.
    b_lse = tl.load(p_lse + o_lse, mask=m_m, other=INFINITE)
    b_lse = tl.where(b_lse == NEVER, INFINITE, b_lse * LOG2_E)
    # rows: [2, B, H, tiles * BM] or [2, H, tiles * BM], lse and delta with every sample beginning at a tile
    p_row = p_rows + tl.full([], i, tl.int64) * BM + r_m
    tl.store(p_row, b_lse)
    tl.store(p_row + tl.full([], tl.num_programs(0), tl.int64) * BM, b_delta)

    b_dq = tl.zeros([BM, BD], tl.float32)
    o_position = first + r_m + length_k - length_q
    begin, plain, plain_end, end = keys_of(first, length_q, length_k, window, BM, BN, CAUSAL, HAS_WINDOW)
    if HAS_WINDOW:
        b_dq = walk_keys(
            b_dq,
            b_q,
            b_g,
            b_lse,
            b_delta,
            p_k,
            p_v,
            o_k,
            o_v,
            s_kt,
            s_vt,
            o_position,
            begin,
            tl.minimum(plain, end),
            length_k,
            window,
            scale,
            softcap,
            D,
            BN,
            BD,
            EVEN_D,
            CAUSAL,
            HAS_WINDOW,
            HAS_SOFTCAP,
            True,
            PRECISION,
        )
    b_dq = walk_keys(
        b_dq,
        b_q,
        b_g,
        b_lse,
        b_delta,
        p_k,
        p_v,
        o_k,
        o_v,
        s_kt,
        s_vt,
        o_position,
        plain,
        plain_end,
        length_k,
        window,
        scale,
        softcap,
        D,
        BN,
        BD,
        EVEN_D,
        CAUSAL,
        HAS_WINDOW,
        HAS_SOFTCAP,
        False,
        PRECISION,
    )
    b_dq = walk_keys(
        b_dq,
        b_q,
        b_g,
        b_lse,
        b_delta,
        p_k,
        p_v,
        o_k,
        o_v,
        s_kt,
        s_vt,
        o_position,
        plain_end,
        end,
        length_k,
        window,
        scale,
        softcap,
        D,
        BN,
        BD,
        EVEN_D,
        CAUSAL,
        HAS_WINDOW,
        HAS_SOFTCAP,
        True,
        PRECISION,
    )
    tl.store(p_dq + o_out, (b_dq * factor).to(p_dq.dtype.element_ty), mask=m_out)


@triton.jit
def key_gradients(
    p_q,
    p_k,
    p_v,
    p_grad,
    p_rows,
    p_dk,
    p_dv,
    p_cu_q,
    p_cu_k,
    scale,
    softcap,
    factor,
    window,
    S,
    steps,
    tiles,
    row_tiles,
    T,
    U,
    G,
    D,
    HEADS_PER_KEY,
    s_qb,
    s_qt,
    s_qh,
    s_kb,
    s_kt,
    s_kh,
    s_vb,
    s_vt,
    s_vh,
    s_gb,
    s_gt,
    s_gh,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BLOCK: tl.constexpr,
    BD: tl.constexpr,
    OFFSET: tl.constexpr,
    PACKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The first keys of a causal sample are seen by most.
    i_b, i_g, i_s, start_k, length_k, first = find_tile(tl.program_id(0), p_cu_k, S, steps, tiles, U, G, BN, PACKED)
    start_q, length_q = sample_of(i_s, p_cu_q, T, PACKED)

    r_m = tl.arange(0, BM)
    r_n = tl.arange(0, BN)
    r_d = tl.arange(0, BD)
    o_q = r_m.to(OFFSET)[:, None] * s_qt + r_d[None, :]  # [BM, BD]
    o_g = r_m.to(OFFSET)[:, None] * s_gt + r_d[None, :]  # [BM, BD]
    o_k = r_n.to(OFFSET)[:, None] * s_kt + r_d[None, :]  # [BN, BD]
    o_v = r_n.to(OFFSET)[:, None] * s_vt + r_d[None, :]  # [BN, BD]
    b_64 = tl.full([], i_b, tl.int64)
    g_64 = tl.full([], i_g, tl.int64)
    token = start_k + first
    p_k += b_64 * s_kb + token * s_kt + g_64 * s_kh
    p_v += b_64 * s_vb + token * s_vt + g_64 * s_vh
    b_k = load_rows(p_k, o_k, r_n, length_k - first, r_d, D, True, EVEN_D)  # [BN, BD]
    b_v = load_rows(p_v, o_v, r_n, length_k - first, r_d, D, True, EVEN_D)  # [BN, BD]

    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    o_key = first + r_n
    offset = length_k - length_q
    # lse and delta as `query_gradients` left them, by tiles of BLOCK queries
    first_row_tile = start_q // BLOCK + i_s if PACKED else tl.full([], 0, tl.int64)
    s_rows = tl.full([], row_tiles, tl.int64) * BLOCK * (tl.num_programs(0) // tiles * HEADS_PER_KEY)
    begin, end = queries_of(first, length_q, length_k, window, BM, BN, CAUSAL, HAS_WINDOW)
    # The query heads of the group, one after the other, in one loop: nested ones spill.
    walk = tl.cdiv(end - begin, BM)
    for j in range(0, walk * HEADS_PER_KEY):
        m = tl.multiple_of(begin + j % walk * BM, BM)
        h_64 = g_64 * HEADS_PER_KEY + j // walk
        p_q_h = p_q + b_64 * s_qb + (start_q + m) * s_qt + h_64 * s_qh
        p_g_h = p_grad + b_64 * s_gb + (start_q + m) * s_gt + h_64 * s_gh
        b_q = load_rows(p_q_h, o_q, r_m, length_q - m, r_d, D, True, EVEN_D)  # [BM, BD]
        b_g = load_rows(p_g_h, o_g, r_m, length_q - m, r_d, D, True, EVEN_D)  # [BM, BD]
        p_row = p_rows + ((b_64 * G * HEADS_PER_KEY + h_64) * row_tiles + first_row_tile) * BLOCK + m + r_m
        b_lse = tl.load(p_row)
        b_delta = tl.load(p_row + s_rows)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BN, BM]
        b_p, b_slope = probabilities(b_s, b_lse[None, :], scale, softcap, HAS_SOFTCAP)
        if CAUSAL or HAS_WINDOW:
            m_s = sees((m + r_m + offset)[None, :], o_key[:, None], length_k, window, CAUSAL, HAS_WINDOW)
            b_p = tl.where(m_s, b_p, 0.0)
        b_dv = tl.dot(b_p.to(b_g.dtype), b_g, b_dv, input_precision=PRECISION)  # [BN, BD]
        b_dp = tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION)  # [BN, BM]
        b_ds = b_p * (b_dp - b_delta[None, :]) * b_slope
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)  # [BN, BD]

    # dk and dv: [B, U, G, D] or [M, G, D]
    m_out = (o_key < length_k)[:, None] & (r_d < D)[None, :]
    o_out = ((b_64 * U + token) * G + g_64) * D + (r_n.to(tl.int64) * G * D)[:, None] + r_d[None, :]
    tl.store(p_dk + o_out, (b_dk * factor).to(p_dk.dtype.element_ty), mask=m_out)
    tl.store(p_dv + o_out, b_dv.to(p_dv.dtype.element_ty), mask=m_out)


def attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    grad_lse: torch.Tensor | None = None,
    causal: bool = True,
    scale: float,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    configs: tuple[Config, Config] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv, contiguous, in the dtypes of q, k and v, from what `attention` returned.

    `configs` are of `query_gradients` and `key_gradients`; the second's queries of a tile divide the first's. Beside
    the results: lse and delta, 8 bytes for each query and head, more where samples are short. float32 products are
    exact unless torch.backends.cuda.matmul.allow_tf32.
    """
    grad_out, q, k, v = (dense(t) for t in (grad_out, q, k, v))
    out, lse = out.contiguous(), lse.contiguous()
    packed = cu_seqlens is not None
    heads, head_size = q.shape[-2:]
    key_heads = k.shape[-2]
    of_queries, of_keys = configs or pick_configs(
        head_size, q.dtype, window is not None, softcap is not None, capability_of(q)
    )
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    cu_q, cu_k = borders(q.device, cu_seqlens, cu_seqlens_k)
    batch = 1 if packed else q.shape[0]
    numbers = (*scales(scale, softcap), scale, 0 if window is None else min(window, WIDEST_WINDOW))
    samples = cu_seqlens.numel() - 1 if cu_seqlens is not None else 0
    shapes = (q.shape[-3], k.shape[-3])
    every_stride = [s for t in (q, k, v, grad_out) for s in strides(t, cu_seqlens)]
    flags = {
        "BD": padded_head_size(head_size),
        "PACKED": packed,
        "CAUSAL": causal,
        "HAS_WINDOW": window is not None,
        "HAS_SOFTCAP": softcap is not None,
        "EVEN_D": head_size == padded_head_size(head_size),
        "PRECISION": precision(),
    }
    with on_device_of(q):
        row_tiles, steps = tiles_of(q, cu_seqlens, of_queries.bm)
        rows = torch.empty(2, batch * heads * row_tiles * of_queries.bm, dtype=torch.float32, device=q.device)
        query_gradients[(row_tiles * heads * batch,)](
            q,
            k,
            v,
            out,
            grad_out,
            lse,
            grad_lse if grad_lse is None else grad_lse.contiguous(),
            rows,
            dq,
            cu_q,
            cu_k,
            *numbers,
            samples,
            steps,
            row_tiles,
            *shapes,
            heads,
            head_size,
            heads // key_heads,
            *every_stride,
            BM=of_queries.bm,
            BN=of_queries.bn,
            OFFSET=offset_type(max(of_queries.bm, of_queries.bn), q, k, v, grad_out),
            HAS_GRAD_LSE=grad_lse is not None,
            num_warps=of_queries.num_warps,
            num_stages=of_queries.num_stages,
            **flags,
        )
        tiles, steps = tiles_of(k, cu_seqlens, of_keys.bn)
        key_gradients[(tiles * key_heads * batch,)](
            q,
            k,
            v,
            grad_out,
            rows,
            dk,
            dv,
            cu_q,
            cu_k,
            *numbers,
            samples,
            steps,
            tiles,
            row_tiles,
            *shapes,
            key_heads,
            head_size,
            heads // key_heads,
            *every_stride,
            BM=of_keys.bm,
            BN=of_keys.bn,
            BLOCK=of_queries.bm,
            OFFSET=offset_type(max(of_keys.bm, of_keys.bn), q, k, v, grad_out),
            num_warps=of_keys.num_warps,
            num_stages=of_keys.num_stages,
            **flags,
        )
    return dq, dk, dv
