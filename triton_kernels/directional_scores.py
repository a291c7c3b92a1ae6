"""Inner products of every sample's weight gradient with given directions, without that gradient.

For inputs A [N, D], output gradients G [N, P], packed samples s and directions Q_q [P, D]:

    scores [S, Q] = <G_s^T A_s, Q_q> = sum over the tokens t of s of g_t . (Q_q a_t).

With X the one of A and G that has more columns, K, Y the other, of C columns, and W_q [C, K] the direction or its
transpose, that is sum_t y_t . (W_q x_t). Two launches. `meet_rows`: a program forms a tile [BM, BN] of X W_q^T in
registers and meets it there with the tile of Y: one number for each of its tokens, stored. `sum_tokens` adds those of a
sample, which are neighbours, in a fixed order, in float64. No atomics: the same bits in every run.

Cost: 2 N D P FLOPs a direction, those of the layer's forward pass, and 2 N C of vector arithmetic, where the samples'
gradients would take 3 S D P. Traffic from memory: X, Y and the direction once, 4 bytes for each token and BN columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .common import capability_of, on_device_of, sent_to

# Tiles that share their rows of X run side by side in groups of this many, whose tokens stay in the L2 cache.
GROUP = tl.constexpr(8)
# Bytes for the numbers of (direction, token, tile); where they do not suffice directions go in several launches.
WORKSPACE = 32 << 20
SUM_BLOCK, SUM_WARPS = 4096, 8


@dataclass(frozen=True)
class Config:
    """Launch choices of `meet_rows`."""

    bm: int
    bn: int
    bk: int
    num_warps: int
    num_stages: int


def pick_config(dtype: torch.dtype, columns: int, capability: tuple[int, int]) -> Config:
    """Tiles for directions of so many columns C, by what registers and shared memory hold, as compiled; none of it has
    been timed on a GPU yet.
    """
    if dtype == torch.float32:
        # Exact float32 products run on the plain cores and keep both operands in registers.
        return Config(64, 64, 32, 4, 3)
    if columns <= 64:
        # Low-rank adapters: a wider tile would be empty. Without reuse of X it is bound by memory, whatever the tile.
        return Config(128, 64 if columns > 32 else 32, 64, 4, 4)
    if capability[0] in (9, 10):
        # Four stages take 128 KB of shared memory, which a lone program has.
        return Config(128, 128, 64, 8, 4)
    # A k of 32 keeps four stages under the 100 KB that sm_86, sm_89 and sm_120 have.
    return Config(128, 128, 32, 8, 4)


@triton.jit
def meet_rows(
    p_x,
    p_y,
    p_directions,
    p_partials,
    N,
    K,
    C,
    s_xn,
    s_xk,
    s_yn,
    s_yc,
    s_wq,
    s_wc,
    s_wk,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    OFFSET: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Within a group the row of tiles runs fastest, then the column.
    i = tl.program_id(0)
    i_q = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(C, BN)
    i_group = i // (GROUP * tiles)
    group_size = tl.minimum(tl.cdiv(N, BM) - i_group * GROUP, GROUP)
    i_m = i_group * GROUP + (i % (GROUP * tiles)) % group_size
    i_n = (i % (GROUP * tiles)) // group_size

    r_m, r_n, o_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    m_m = i_m * BM + r_m < N
    m_n = i_n * BN + r_n < C
    # A tile is addressed by a 64-bit base and offsets within it, which OFFSET makes as wide as the strides need.
    o_x = r_m.to(OFFSET)[:, None] * s_xn + o_k.to(OFFSET)[None, :] * s_xk  # [BM, BK]
    o_w = o_k.to(OFFSET)[:, None] * s_wk + r_n.to(OFFSET)[None, :] * s_wc  # [BK, BN]
    first_row, first_column = (i_m * BM).to(tl.int64), (i_n * BN).to(tl.int64)
    p_xk = p_x + first_row * s_xn
    p_wk = p_directions + i_q * s_wq + first_column * s_wc
    b_acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, tl.cdiv(K, BK)):
        if EVEN:
            b_x = tl.load(p_xk + o_x, mask=m_m[:, None], other=0.0)
            b_w = tl.load(p_wk + o_w, mask=m_n[None, :], other=0.0)
        else:
            m_k = o_k < K - k * BK
            b_x = tl.load(p_xk + o_x, mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_w = tl.load(p_wk + o_w, mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_acc = tl.dot(b_x, b_w, b_acc, input_precision=PRECISION)
        p_xk += tl.full([], BK, tl.int64) * s_xk
        p_wk += tl.full([], BK, tl.int64) * s_wk
    o_y = r_m.to(OFFSET)[:, None] * s_yn + r_n.to(OFFSET)[None, :] * s_yc
    p_yt = p_y + first_row * s_yn + first_column * s_yc
    b_y = tl.load(p_yt + o_y, mask=m_m[:, None] & m_n[None, :], other=0.0).to(tl.float32)
    # partials: [Q, N, tiles]
    p_out = p_partials + (i_q * N + first_row + r_m) * tiles + i_n
    tl.store(p_out, tl.sum(b_acc * b_y, 1), mask=m_m)


@triton.jit
def sum_tokens(p_partials, p_cu_seqlens, p_scores, N, tiles, Q, BLOCK: tl.constexpr):
    """scores[s, q] = sum over the tokens of s, and over tiles, of partials [Q, N, tiles]."""
    i_s = tl.program_id(0)
    i_q = tl.program_id(1).to(tl.int64)
    first = (i_q * N + tl.load(p_cu_seqlens + i_s).to(tl.int64)) * tiles
    end = (i_q * N + tl.load(p_cu_seqlens + i_s + 1).to(tl.int64)) * tiles
    o = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float64)
    for at in range(first, end, BLOCK):
        b_sum += tl.load(p_partials + at + o, mask=at + o < end, other=0.0).to(tl.float64)
    tl.store(p_scores + i_s.to(tl.int64) * Q + i_q, tl.sum(b_sum, 0).to(tl.float32))


def offset_type(config: Config, x: torch.Tensor, y: torch.Tensor, directions: torch.Tensor) -> tl.dtype:
    """The integer that holds the offsets within a tile."""
    spans = (
        config.bm * x.stride(0) + config.bk * x.stride(1),
        config.bm * y.stride(0) + config.bn * y.stride(1),
        config.bn * directions.stride(1) + config.bk * directions.stride(2),
    )
    return tl.int32 if max(spans) < 2**31 else tl.int64


def directional_scores(
    x: torch.Tensor,
    y: torch.Tensor,
    cu_seqlens: torch.Tensor,
    directions: torch.Tensor,
    *,
    config: Config | None = None,
) -> torch.Tensor:
    """scores [S, Q] in float32 of `x` [N, K], `y` [N, C] and `directions` [Q, C, K] in one dtype, `cu_seqlens` [S+1]
    int32 or int64.

    float32 products are exact unless torch.backends.cuda.matmul.allow_tf32. Beside the result: 32 MiB, or 4 bytes for
    each token and tile of columns if more.
    """
    (n, k), c, samples, count = x.shape, y.shape[1], cu_seqlens.numel() - 1, directions.shape[0]
    config = config or pick_config(x.dtype, c, capability_of(x))
    tiles = triton.cdiv(c, config.bn)
    together = max(1, min(count, WORKSPACE // max(1, 4 * n * tiles)))
    partials = torch.empty(together * n * tiles, dtype=torch.float32, device=x.device)
    scores = torch.empty((samples, count), dtype=torch.float32, device=x.device)
    cu_seqlens = sent_to(x.device, cu_seqlens)
    if samples == 0 or count == 0:
        return scores
    with on_device_of(x):
        for first in range(0, count, together):
            some = directions[first : first + together]
            if n and tiles:
                meet_rows[(triton.cdiv(n, config.bm) * tiles, some.shape[0])](
                    x,
                    y,
                    some,
                    partials,
                    n,
                    k,
                    c,
                    *x.stride(),
                    *y.stride(),
                    *some.stride(),
                    BM=config.bm,
                    BN=config.bn,
                    BK=config.bk,
                    OFFSET=offset_type(config, x, y, some),
                    EVEN=k % config.bk == 0,
                    PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
                    num_warps=config.num_warps,
                    num_stages=config.num_stages,
                )
            sum_tokens[(samples, some.shape[0])](
                partials, cu_seqlens, scores[:, first:], n, tiles, count, BLOCK=SUM_BLOCK, num_warps=SUM_WARPS
            )
    return scores
