"""The gradient of attention's queries, by tiles of queries.

A program holds BM queries of one head and walks the keys they see, as `attend` does: a mask only where not all of them
see all. lse and delta come as `row_terms` left them; notation and shapes as in `attention_backward`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tiles import find_tile, keys_of, load_rows, padded_start, probabilities, sample_of, sees, token_at


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
    factor,
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
        b_p, b_slope = probabilities(b_s, b_lse[:, None], scale, factor, HAS_SOFTCAP)
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
    p_grad,
    p_rows,
    p_dq,
    p_cu_q,
    p_cu_k,
    scale,
    factor,
    dot_scale,
    window,
    S,
    steps,
    tiles,
    row_tiles,
    T,
    U,
    H,
    D,
    HEADS_PER_KEY,
    s_q,
    s_k,
    s_v,
    s_g,
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
    # The last queries of a causal sample see most.
    i = tl.num_programs(0) - 1 - tl.program_id(0)
    i_b, i_h, i_s, start_q, length_q, first = find_tile(i, p_cu_q, S, steps, tiles, T, H, BM, PACKED)
    start_k, length_k = sample_of(i_s, p_cu_k, U, PACKED)
    i_g = i_h // HEADS_PER_KEY

    r_m = tl.arange(0, BM)
    r_n = tl.arange(0, BN)
    r_d = tl.arange(0, BD)
    o_q = r_m.to(OFFSET)[:, None] * s_q[1] + r_d[None, :]  # [BM, BD]
    o_g = r_m.to(OFFSET)[:, None] * s_g[1] + r_d[None, :]  # [BM, BD]
    o_k = r_n.to(OFFSET)[:, None] * s_k[1] + r_d[None, :]  # [BN, BD]
    o_v = r_n.to(OFFSET)[:, None] * s_v[1] + r_d[None, :]  # [BN, BD]
    token = start_q + first
    p_k = token_at(p_k, s_k, i_b, start_k, i_g)
    p_v = token_at(p_v, s_v, i_b, start_k, i_g)
    b_64, h_64 = tl.full([], i_b, tl.int64), tl.full([], i_h, tl.int64)
    s_rows = tl.full([], row_tiles, tl.int64) * BLOCK  # of a head
    p_row = p_rows + (b_64 * H + h_64) * s_rows + padded_start(start_q, i_s, BLOCK, PACKED) + first + r_m
    m_m = first + r_m < length_q
    b_q = load_rows(token_at(p_q, s_q, i_b, token, i_h), o_q, r_m, length_q - first, r_d, D, True, EVEN_D)  # [BM, BD]
    b_g = load_rows(token_at(p_grad, s_g, i_b, token, i_h), o_g, r_m, length_q - first, r_d, D, True, EVEN_D)
    b_lse = tl.load(p_row, mask=m_m, other=float("inf"))
    b_delta = tl.load(p_row + tl.num_programs(0) // tiles * s_rows, mask=m_m, other=0.0)

    b_dq = tl.zeros([BM, BD], tl.float32)
    begin, plain, plain_end, end = keys_of(first, length_q, length_k, window, BM, BN, CAUSAL, HAS_WINDOW)
    for PART in tl.static_range(0 if HAS_WINDOW else 1, 3):
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
            s_k[1],
            s_v[1],
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
            PRECISION,
        )
    # dq: [B, T, H, D] or [N, H, D]
    o_dq = ((b_64 * T + token) * H + h_64) * D + (r_m.to(tl.int64) * H * D)[:, None] + r_d[None, :]
    tl.store(p_dq + o_dq, (b_dq * dot_scale).to(p_dq.dtype.element_ty), mask=m_m[:, None] & (r_d < D)[None, :])
