"""The gradients of attention's keys and values, and of its queries if asked for, by tiles of keys.

A program holds BN keys of one key head and walks, for every query head of its group, the queries that see them: S and
dO V^T are formed transposed, so that P^T and dS^T meet the tensor cores from registers. lse and delta come as
`row_terms` left them; notation and shapes as in `attention_backward`.

With ADDS_DQ each tile of queries also gets this program's dS K, added to float32 sums in memory: five products instead
of the seven that two kernels need, at the price of 4 D bytes of atomic traffic to the L2 cache for every BN pairs, and
of sums whose order, and so their last bits, differ from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tiles import (
    find_tile,
    load_rows,
    padded_start,
    probabilities,
    queries_of,
    sample_of,
    sees,
    token_at,
)


@triton.jit
def walk_queries(
    b_dk,
    b_dv,
    b_k,
    b_v,
    p_q,
    p_grad,
    p_rows,
    p_sums,
    s_q,
    s_g,
    s_row,
    s_rows,
    T,
    o_key,
    begin,
    turn,
    resume,
    end,
    heads,
    length_q,
    length_k,
    window,
    scale,
    factor,
    D,
    BM: tl.constexpr,
    BD: tl.constexpr,
    OFFSET: tl.constexpr,
    EVEN_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ADDS_DQ: tl.constexpr,
    FROM_SHARED: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Queries begin .. turn - 1 and resume .. end - 1 of every head, by tiles of q and dO [BM, BD]."""
    r_m = tl.arange(0, BM)
    r_d = tl.arange(0, BD)
    o_q = r_m.to(OFFSET)[:, None] * s_q[1] + r_d[None, :]  # [BM, BD]
    o_g = r_m.to(OFFSET)[:, None] * s_g[1] + r_d[None, :]  # [BM, BD]
    before = (turn - begin) // BM
    walk = before + tl.cdiv(end - resume, BM)
    # One loop over heads and queries: nested ones spill. So do invariants that are hoisted, mostly the addresses that
    # the tensor cores want of k and v.
    for j in tl.range(0, walk * heads, disable_licm=FROM_SHARED):
        i_m = j % walk
        m = begin + i_m * BM
        if MASKED:
            m = tl.where(i_m < before, m, resume + (i_m - before) * BM)
        m = tl.multiple_of(m, BM)
        m_64, h_64 = tl.full([], m, tl.int64), tl.full([], j // walk, tl.int64)
        b_q = load_rows(p_q + m_64 * s_q[1] + h_64 * s_q[2], o_q, r_m, length_q - m, r_d, D, MASKED, EVEN_D)
        b_g = load_rows(p_grad + m_64 * s_g[1] + h_64 * s_g[2], o_g, r_m, length_q - m, r_d, D, MASKED, EVEN_D)
        p_row = p_rows + h_64 * s_row + m + r_m
        b_lse = tl.load(p_row)
        b_delta = tl.load(p_row + s_rows)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BN, BM]
        b_p, b_slope = probabilities(b_s, b_lse[None, :], scale, factor, HAS_SOFTCAP)
        if MASKED:
            o_position = m + r_m + length_k - length_q
            m_s = sees(o_position[None, :], o_key[:, None], length_k, window, CAUSAL, HAS_WINDOW)
            b_p = tl.where(m_s, b_p, 0.0)
        b_dv = tl.dot(b_p.to(b_g.dtype), b_g, b_dv, input_precision=PRECISION)  # [BN, BD]
        b_dp = tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION)  # [BN, BM]
        b_ds = (b_p * (b_dp - b_delta[None, :]) * b_slope).to(b_q.dtype)
        b_dk = tl.dot(b_ds, b_q, b_dk, input_precision=PRECISION)  # [BN, BD]
        if ADDS_DQ:
            if FROM_SHARED:
                # Transposed, so that k is the first operand.
                b_dq = tl.trans(tl.dot(tl.trans(b_k), b_ds, input_precision=PRECISION))  # [BM, BD]
            else:
                b_dq = tl.dot(tl.trans(b_ds), b_k, input_precision=PRECISION)
            p_sum = p_sums + (h_64 * T + m) * BD + r_m[:, None] * BD + r_d[None, :]
            if MASKED:
                tl.atomic_add(p_sum, b_dq, sem="relaxed", mask=(m + r_m < length_q)[:, None])
            else:
                tl.atomic_add(p_sum, b_dq, sem="relaxed")
    return b_dk, b_dv


@triton.jit
def key_gradients(
    p_q,
    p_k,
    p_v,
    p_grad,
    p_rows,
    p_dk,
    p_dv,
    p_sums,
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
    G,
    D,
    HEADS_PER_KEY,
    s_q,
    s_k,
    s_v,
    s_g,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EDGE: tl.constexpr,
    BLOCK: tl.constexpr,
    BD: tl.constexpr,
    OFFSET: tl.constexpr,
    PACKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ADDS_DQ: tl.constexpr,
    FROM_SHARED: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The first keys of a causal sample are seen by most.
    i_b, i_g, i_s, start_k, length_k, first = find_tile(tl.program_id(0), p_cu_k, S, steps, tiles, U, G, BN, PACKED)
    start_q, length_q = sample_of(i_s, p_cu_q, T, PACKED)

    r_n = tl.arange(0, BN)
    r_d = tl.arange(0, BD)
    o_k = r_n.to(OFFSET)[:, None] * s_k[1] + r_d[None, :]  # [BN, BD]
    o_v = r_n.to(OFFSET)[:, None] * s_v[1] + r_d[None, :]  # [BN, BD]
    p_k = token_at(p_k, s_k, i_b, start_k + first, i_g)
    p_v = token_at(p_v, s_v, i_b, start_k + first, i_g)
    b_k = load_rows(p_k, o_k, r_n, length_k - first, r_d, D, True, EVEN_D)  # [BN, BD]
    b_v = load_rows(p_v, o_v, r_n, length_k - first, r_d, D, True, EVEN_D)  # [BN, BD]

    # The first query head of the group, in q and dO, in rows [2, B, H, tiles * BLOCK] or [2, H, tiles * BLOCK], and in
    # the sums of dq [B, H, T, BD] or [H, N, BD], whose offsets within a tile are constants
    i_h = i_g * HEADS_PER_KEY
    h_64 = tl.full([], i_b, tl.int64) * G * HEADS_PER_KEY + i_h
    s_row = tl.full([], row_tiles, tl.int64) * BLOCK
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    begin, plain, plain_end, end = queries_of(first, length_q, length_k, window, BM, BN, EDGE, CAUSAL, HAS_WINDOW)
    # The queries at the borders, which need a mask, then those between.
    for PLAIN in tl.static_range(2):
        b_dk, b_dv = walk_queries(
            b_dk,
            b_dv,
            b_k,
            b_v,
            token_at(p_q, s_q, i_b, start_q, i_h),
            token_at(p_grad, s_g, i_b, start_q, i_h),
            p_rows + h_64 * s_row + padded_start(start_q, i_s, BLOCK, PACKED),
            p_sums + (h_64 * T + start_q) * BD if ADDS_DQ else p_sums,
            s_q,
            s_g,
            s_row,
            tl.num_programs(0) // tiles * HEADS_PER_KEY * s_row,
            T,
            first + r_n,
            plain if PLAIN else begin,
            plain_end if PLAIN else plain,
            plain_end,
            plain_end if PLAIN else end,
            HEADS_PER_KEY,
            length_q,
            length_k,
            window,
            scale,
            factor,
            D,
            BM if PLAIN else EDGE,
            BD,
            OFFSET,
            EVEN_D,
            CAUSAL,
            HAS_WINDOW,
            HAS_SOFTCAP,
            ADDS_DQ,
            FROM_SHARED,
            not PLAIN,
            PRECISION,
        )

    # dk and dv: [B, U, G, D] or [M, G, D]
    m_out = (first + r_n < length_k)[:, None] & (r_d < D)[None, :]
    token = tl.full([], i_b, tl.int64) * U + start_k + first
    o_out = (token * G + i_g) * D + (r_n.to(tl.int64) * G * D)[:, None] + r_d[None, :]
    tl.store(p_dk + o_out, (b_dk * dot_scale).to(p_dk.dtype.element_ty), mask=m_out)
    tl.store(p_dv + o_out, b_dv.to(p_dv.dtype.element_ty), mask=m_out)
